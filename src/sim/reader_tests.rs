//! Open layer files: bounded in number and memory, whatever is read, and read right.

use std::time::Duration;

use futures_util::future::select;

use super::engine::{Outside, check_page, import, start};
use super::{SimIo, SimOptions, SimWorld};
use crate::io::Io;
use crate::shard::control::CoreControl;

/// Files that reads, a warm-up and a look at small values have in hand at once.
const IN_HAND: usize = 24;

/// The simulator hears of a file that is dropped without being closed.
#[test]
fn who_asks_may_go_away_while_a_file_is_opened() {
    for seed in 0..40 {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        outside.compaction.set(Some((2, 50)));
        outside.layer_bytes.set(Some((16 * 1024, 16 * 1024)));
        let story = move |io: SimIo| async move {
            import(io.clone()).await.unwrap();
            let (shard, timeline) = start(&io, &outside).await.unwrap();
            shard.readers.set_bounds(3, usize::MAX);
            while shard.timelines().iter().all(|info| info.layer_count < 6) {
                io.sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..100 {
                let patience = io.sleep(Duration::from_micros(io.random_u64() % 300));
                let read = std::pin::pin!(check_page(&timeline, &outside, &io));
                select(read, std::pin::pin!(patience)).await;
            }
            shard.shutdown().await;
            assert_eq!(shard.readers.count(), 0, "seed {seed}");
        };
        world.run(story).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn open_layer_files_are_bounded() {
    // By number, and by memory: no file has so little.
    for (seed, count_max, bytes_max) in [(0, 3, usize::MAX), (1, usize::MAX, 1), (2, 3, 1 << 20)] {
        let mut world =
            SimWorld::new(seed, SimOptions { steps_max: u64::MAX, ..SimOptions::varied(seed) });
        let outside = Outside::new(seed);
        // Many small layers; those that were merged are in files only.
        outside.compaction.set(Some((2, 50)));
        outside.layer_bytes.set(Some((16 * 1024, 16 * 1024)));
        outside.cache_bytes.set(Some(0));
        let story = move |io: SimIo| async move {
            import(io.clone()).await.unwrap();
            let (shard, timeline) = start(&io, &outside).await.unwrap();
            shard.readers.set_bounds(count_max, bytes_max);
            while shard.timelines().iter().all(|info| info.layer_count < 6) {
                io.sleep(Duration::from_millis(1)).await;
            }
            let (mut open_max, mut reads) = (0, 0);
            while shard.readers.opened() < 40 && reads < 4000 {
                check_page(&timeline, &outside, &io).await.unwrap();
                open_max = open_max.max(shard.readers.count());
                reads += 1;
            }
            let opened = shard.readers.opened();
            assert!(opened >= 40, "seed {seed}: {opened} files were opened in {reads} reads");
            assert!(open_max <= IN_HAND, "seed {seed}: {open_max} files are open");
            assert_eq!(shard.metrics().layer_files_open, shard.readers.count() as u64);
            assert_eq!(shard.readers.count() == 0, shard.readers.bytes() == 0);
            shard.shutdown().await;
            assert_eq!((shard.readers.count(), shard.readers.bytes()), (0, 0), "seed {seed}");
        };
        world.run(story).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}
