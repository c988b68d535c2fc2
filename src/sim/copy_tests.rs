//! Databases that are copied file by file, through kills and power losses.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use super::engine::{Outside, catch_up, check_page, import, live_and_die, start};
use super::{SimIo, SimOptions, SimWorld, story_seeds};
use crate::base::Lsn;
use crate::io::Io;
use crate::shard::control::CoreControl;

const LAYER_BYTES: u64 = 96 << 10;

async fn live(io: SimIo, outside: Rc<Outside>, end: Option<Lsn>) -> Result<(), String> {
    let (shard, timeline) = start(&io, &outside).await?;
    loop {
        check_page(&timeline, &outside, &io).await?;
        if let Some(reason) = timeline.broken() {
            return Err(format!("ingest stopped: {reason}"));
        }
        if end.is_some_and(|end| timeline.lsns().last_record >= end) {
            break;
        }
        io.sleep(Duration::from_micros(io.random_u64() % 1000)).await;
    }
    for _ in 0..150 {
        check_page(&timeline, &outside, &io).await?;
    }
    shard.shutdown().await;
    Ok(())
}

fn scenario(seed: u64, most: &Cell<usize>) -> Result<(), String> {
    let mut world = SimWorld::new(seed, SimOptions::varied(seed));
    let outside = Outside::new(seed);
    outside.layer_bytes.set(Some((LAYER_BYTES, 64 << 10)));
    outside.records_per_copy.set(300);
    outside.collects.set(seed.is_multiple_of(2));
    world.run(import).map_err(|error| error.to_string())??;
    for _ in 0..1 + world.draw("lives", 3) {
        let steps = 3_000 + world.draw("life", 9_000);
        let outside = outside.clone();
        live_and_die(&mut world, steps, move |io| live(io, outside, None))?;
    }
    let copies = outside.primary.borrow().forks().iter().filter(|rel| rel.node.db > 5).count();
    most.set(most.get().max(copies));
    outside.quiet.set(true);
    let end = outside.primary.borrow().record_ends().last().copied();
    world.run(move |io| live(io, outside, end)).map_err(|error| error.to_string())?
}

#[test]
fn a_copied_database_is_right() {
    let most = Cell::new(0);
    for seed in story_seeds(24) {
        scenario(seed, &most).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
    assert!(most.get() >= 8, "{} forks of copies", most.get());
}

#[test]
fn a_large_database_is_not_copied_into_memory() {
    let mut world = SimWorld::new(1, SimOptions::varied(1));
    let outside = Outside::new(1);
    outside.layer_bytes.set(Some((LAYER_BYTES, 64 << 10)));
    let story = async |io: SimIo, outside: Rc<Outside>| {
        import(io.clone()).await?;
        let (shard, timeline) = start(&io, &outside).await?;
        let primary = || outside.primary.borrow_mut();
        let size = |rel| primary().size_at(rel, Lsn::MAX);
        let forks = || primary().forks();
        let blocks = || forks().into_iter().map(size).sum::<u32>();
        while blocks() < 40 {
            io.sleep(Duration::from_millis(1)).await;
        }
        outside.quiet.set(true);
        primary().copy_database();
        let end = primary().record_ends().last().copied().ok_or("no record")?;
        catch_up(&timeline, end, 1).await?;
        let copied = shard.timelines().remove(0);
        for _ in 0..100 {
            check_page(&timeline, &outside, &io).await?;
        }
        shard.shutdown().await;
        Ok::<_, String>(copied.open_layer_bytes)
    };
    let open_bytes = world.run(move |io| story(io, outside)).unwrap().unwrap();
    assert!(open_bytes < LAYER_BYTES, "{open_bytes} bytes");
}
