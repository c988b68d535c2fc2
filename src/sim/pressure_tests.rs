//! Back-pressure: a background executor whose disk is far too slow for the primary, a damaged L0
//! layer, compaction switched off. And what reading layers together is worth.

use std::rc::Rc;
use std::time::Duration;

use super::engine::{Outside, TENANT, TIMELINE, check_page, import, start};
use super::{SimIo, SimOptions, SimWorld};
use crate::base::{Lsn, RelTag};
use crate::io::{ALIGNMENT, File, Io};
use crate::limits::{
    INGEST_EVEN_LAYERS, INGEST_STUCK_BYTES_PER_S, L0_LAYERS_MAX, READ_LAYERS_CONCURRENT_MAX,
};
use crate::shard::control::{CoreControl, CoreMetrics};
use crate::shard::get_page::ONE_AFTER_THE_OTHER;
use crate::shard::memory::NO_RESIDENTS;
use crate::shard::pressure::{L0_MOST, PLANTED, Planted};
use crate::shard::reader::{RequestLsn, TimelineReader};
use crate::shard::timeline::Timeline;

const SEEDS: std::ops::Range<u64> = 0..5;
const LAYER_BYTES: u64 = 48 * 1024;
const BACKGROUND_SLOWNESS: u32 = 40;
/// So long the primary writes.
const BUSY: Duration = Duration::from_millis(600);

/// So far comes a primary only when nothing slows it.
const MUCH: Lsn = Lsn(0x0140_0000);

fn options() -> SimOptions {
    SimOptions { slow_per_million: 0, latency_us_max: 100, ..SimOptions::default() }
}

fn world_of(seed: u64, compaction: (usize, u64)) -> (SimWorld, Rc<Outside>) {
    let mut world = SimWorld::new(seed, options());
    let outside = Outside::new(seed);
    outside.layer_bytes.set(Some((LAYER_BYTES, LAYER_BYTES)));
    outside.compaction.set(Some(compaction));
    world.run(import).unwrap().unwrap();
    (world, outside)
}

/// The primary writes as fast as it can, then nothing more; the timeline catches up.
async fn busy_then_quiet(io: SimIo, outside: Rc<Outside>) -> Result<CoreMetrics, String> {
    let (shard, timeline) = start(&io, &outside).await?;
    let (mut limited, mut limits, mut last) = (0, 0, None);
    let until = io.now() + BUSY;
    while io.now() < until {
        io.sleep(Duration::from_millis(1)).await;
        check_page(&timeline, &outside, &io).await?;
        let info = shard.timelines().remove(0);
        limited += u32::from(info.ingest_limit_bytes_per_s.is_some());
        limits += u32::from(info.ingest_limit_bytes_per_s != last);
        last = info.ingest_limit_bytes_per_s;
        if outside.acknowledged.get() > timeline.lsns().journal {
            return Err("more was acknowledged than is in the journal".to_owned());
        }
    }
    outside.quiet.set(true);
    let end = outside.primary.borrow().record_ends().last().copied().ok_or("no WAL")?;
    timeline.wait_for_lsn(end).await.map_err(|error| format!("no progress: {error}"))?;
    for _ in 0..50 {
        check_page(&timeline, &outside, &io).await?;
    }
    let metrics = shard.metrics();
    println!(
        "limited {limited} times, {limits} limits; slowed {:.3} s, stopped {:.3} s; {} L0 at most; \
         {} checkpoints, {} compactions of {} bytes of WAL",
        metrics.ingest_slowed_seconds,
        metrics.ingest_stopped_seconds,
        L0_MOST.get(),
        metrics.checkpoints,
        metrics.compactions,
        metrics.wal_bytes_received,
    );
    shard.shutdown().await;
    Ok(metrics)
}

/// One run; the most L0 layers that there were, and seconds for which ingest stood still.
fn too_fast(seed: u64) -> Result<(usize, f64), String> {
    let (mut world, outside) = world_of(seed, (3, 200));
    outside.background_slowness.set(BACKGROUND_SLOWNESS);
    L0_MOST.set(0);
    let metrics = world.run(move |io| busy_then_quiet(io, outside));
    let metrics = metrics.map_err(|error| error.to_string())??;
    if metrics.ingest_slowed_seconds == 0.0 && PLANTED.get().is_none() {
        return Err("the primary was not too fast".to_owned());
    }
    Ok((L0_MOST.get(), metrics.ingest_stopped_seconds))
}

/// What a run must show.
fn holds(seed: u64) -> Result<usize, String> {
    let (most, stopped) = too_fast(seed)?;
    match most <= L0_LAYERS_MAX {
        true if stopped == 0.0 => Ok(most),
        true => Err(format!("ingest stood still for {stopped} s")),
        false => Err(format!("there were {most} L0 layers")),
    }
}

#[test]
fn l0_layers_are_bounded_and_ingest_slows_smoothly() {
    let mut most = 0;
    for seed in SEEDS {
        most = most.max(holds(seed).unwrap_or_else(|problem| panic!("seed {seed}: {problem}")));
    }
    // It was slowed for them.
    assert!(most as u64 >= INGEST_EVEN_LAYERS, "{most} L0 layers at most");
}

fn planted_is_found(bug: Planted) {
    PLANTED.set(Some(bug));
    let found = SEEDS.into_iter().find_map(|seed| Some((seed, holds(seed).err()?)));
    PLANTED.set(None);
    let (seed, problem) = found.unwrap_or_else(|| panic!("{bug:?} was not found"));
    println!("{bug:?} found at seed {seed}: {problem}");
}

#[test]
fn l0_layers_without_a_bound_are_found() {
    planted_is_found(Planted::NoBound);
}

#[test]
fn a_rate_that_is_not_kept_to_is_found() {
    planted_is_found(Planted::NoDelay);
}

/// Destroys the first data block of the newest L0 layer; `None` if it was merged meanwhile.
async fn damage_an_l0_layer(io: &SimIo, timeline: &Timeline<SimIo>) -> Option<String> {
    let path = timeline.newest_l0_path()?;
    let file = io.open(&path).await.ok()?;
    let mut buf = file.alloc(ALIGNMENT);
    buf.fill(0xA5);
    file.write_at(ALIGNMENT as u64, buf).await.unwrap();
    file.close().await.unwrap();
    Some(path.file_name().unwrap().to_string_lossy().into_owned())
}

#[test]
fn a_damaged_l0_layer_makes_ingest_slow_and_does_not_stop_it() {
    assert!((0..20).any(slowed_by_damage), "no merge met the damage");
}

/// False if the layer had been merged before it was damaged, or if ingest itself needed it.
fn slowed_by_damage(seed: u64) -> bool {
    let (mut world, outside) = world_of(seed, (3, 200));
    let story = move |io: SimIo| async move {
        let (shard, timeline) = start(&io, &outside).await.unwrap();
        while timeline.l0_count() == 0 {
            io.sleep(Duration::from_millis(1)).await;
        }
        let Some(name) = damage_an_l0_layer(&io, &timeline).await else { return false };
        let info = || shard.timelines().remove(0);
        let end = io.now() + Duration::from_secs(5);
        while !info().ingest_paused.is_some_and(|reason| reason.contains(&name)) {
            io.sleep(Duration::from_millis(5)).await;
            if timeline.broken().is_some() || io.now() > end || timeline.lsns().last_record > MUCH {
                return false;
            }
        }
        while timeline.l0_count() < L0_LAYERS_MAX {
            io.sleep(Duration::from_millis(5)).await;
        }
        io.sleep(Duration::from_millis(100)).await;
        let (before, at) = (timeline.lsns().last_record, io.now());
        io.sleep(Duration::from_secs(1)).await;
        let taken = timeline.lsns().last_record.bytes_since(before) as f64;
        let rate = taken / (io.now() - at).as_secs_f64();
        let expected = INGEST_STUCK_BYTES_PER_S as f64;
        assert!((expected * 0.8..expected * 1.2).contains(&rate), "{rate} bytes per second");
        let info = info();
        assert_eq!(info.ingest_limit_bytes_per_s, Some(INGEST_STUCK_BYTES_PER_S));
        assert!(info.l0_count as usize > L0_LAYERS_MAX, "{} L0 layers", info.l0_count);
        assert!(info.ingest_paused.unwrap().contains(&name));
        shard.shutdown().await;
        true
    };
    world.run(story).unwrap()
}

#[test]
fn without_compaction_l0_layers_slow_nothing() {
    let (mut world, outside) = world_of(4, (usize::MAX, 200));
    let story = move |io: SimIo| async move {
        let (shard, timeline) = start(&io, &outside).await.unwrap();
        while timeline.l0_count() < 3 * L0_LAYERS_MAX {
            io.sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(shard.timelines()[0].ingest_paused, None);
        outside.quiet.set(true);
        let end = outside.primary.borrow().record_ends().last().copied().unwrap();
        timeline.wait_for_lsn(end).await.unwrap();
        io.sleep(Duration::from_millis(100)).await;
        assert_eq!(shard.timelines()[0].ingest_limit_bytes_per_s, None);
        shard.shutdown().await;
    };
    world.run(story).unwrap();
}

/// Reads one page; time that it takes, and blocks that are read.
async fn read_cost(
    timeline: &Timeline<SimIo>,
    outside: &Outside,
    io: &SimIo,
    (rel, block): (RelTag, u32),
    together: bool,
) -> (Duration, u64) {
    ONE_AFTER_THE_OTHER.set(!together);
    let at = timeline.lsns().last_record;
    let request = RequestLsn { request: at, not_modified_since: at };
    let before = (io.now(), timeline.blocks_read());
    let page = timeline.get_page(rel, block, request).await.unwrap();
    let spent = (io.now() - before.0, timeline.blocks_read() - before.1);
    assert_eq!(page, outside.primary.borrow().page_at(rel, block, at));
    ONE_AFTER_THE_OTHER.set(false);
    spent
}

#[test]
fn layers_are_read_together_where_one_is_not_enough() {
    let (mut world, outside) = world_of(5, (usize::MAX, 200));
    outside.layer_bytes.set(Some((1 << 30, 1 << 20)));
    outside.cache_bytes.set(Some(0));
    NO_RESIDENTS.set(true);
    let story = move |io: SimIo| async move {
        let (shard, timeline) = start(&io, &outside).await.unwrap();
        for _ in 0..12 {
            io.sleep(Duration::from_millis(1)).await;
            shard.checkpoint(TENANT, TIMELINE).await.unwrap();
        }
        outside.quiet.set(true);
        let end = outside.primary.borrow().record_ends().last().copied().unwrap();
        timeline.wait_for_lsn(end).await.unwrap();
        shard.checkpoint(TENANT, TIMELINE).await.unwrap();
        let forks = outside.primary.borrow().forks();
        let pages = forks.into_iter().flat_map(|rel| (0..24).map(move |block| (rel, block)));
        let (mut one_by_one, mut together, mut deep) = (Duration::ZERO, Duration::ZERO, 0);
        for page in pages {
            // The first read opens files.
            read_cost(&timeline, &outside, &io, page, true).await;
            let (slow, blocks) = read_cost(&timeline, &outside, &io, page, false).await;
            let (fast, read) = read_cost(&timeline, &outside, &io, page, true).await;
            match blocks {
                0 | 1 => assert_eq!(read, blocks, "{page:?}"),
                _ => assert!(read < blocks + READ_LAYERS_CONCURRENT_MAX as u64, "{page:?}"),
            }
            if blocks > 2 {
                (one_by_one, together, deep) = (one_by_one + slow, together + fast, deep + 1);
            }
        }
        shard.shutdown().await;
        println!("{deep} pages of 3 blocks and more: {one_by_one:?}, together {together:?}");
        assert!(deep > 10, "{deep}");
        assert!(together * 10 < one_by_one * 8, "{together:?} instead of {one_by_one:?}");
    };
    world.run(story).unwrap();
    NO_RESIDENTS.set(false);
}
