//! Single incidents, each with what must hold after it.

use std::path::Path;
use std::time::Duration;

use super::engine::{
    Outside, TENANT, TIMELINE, check_page, import, start, start_shard, timeline_dir,
};
use super::{SimOptions, SimWorld, story_seeds};
use crate::base::{Kind, TimelineId};
use crate::io::Io;
use crate::shard::control::{
    Change, CoreControl, CreateBranch, CreateTimeline, TimelineSource, TimelineState,
};
use crate::shard::index::INDEX_FILE;

#[test]
fn a_failed_journal_fails_checkpoints_and_lets_the_node_stop() {
    for seed in story_seeds(20) {
        let options = SimOptions { sync_error_per_million: 1_000_000, ..SimOptions::varied(seed) };
        let mut world = SimWorld::new(seed, options);
        let outside = Outside::new(seed);
        // With small layers ingest may wait for a checkpoint that fails again and again, and the
        // journal has nothing to sync.
        outside.large_layers.set(true);
        let story = move |io: crate::sim::SimIo| async move {
            io.set_faults(false);
            import(io.clone()).await.unwrap();
            let (shard, timeline) = start(&io, &outside).await.unwrap();
            io.sleep(Duration::from_millis(20)).await;
            io.set_faults(true);
            io.sleep(Duration::from_secs(2)).await;
            assert!(timeline.broken().is_some(), "no sync of the journal failed");
            let failure = shard.checkpoint(TENANT, TIMELINE).await.unwrap_err();
            assert!(failure.message.contains("journal"), "{}", failure.message);
            let acknowledged = outside.acknowledged.get();
            assert!(acknowledged <= timeline.lsns().journal);
            shard.shutdown().await;
        };
        world.run(story).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

/// Reads go on while ingest waits for room, nothing that was not written is acknowledged, and
/// with room again everything goes on by itself.
#[test]
fn a_full_disk_pauses_ingest_and_nothing_else() {
    for seed in story_seeds(30) {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        let story = move |io: crate::sim::SimIo| async move {
            import(io.clone()).await.unwrap();
            // The journal has its room in advance, a segment at a time: only the first is missing.
            let in_journal = seed % 2 == 0;
            if in_journal {
                io.set_capacity(Some(io.used_bytes()));
            }
            let (shard, timeline) = start(&io, &outside).await.unwrap();
            io.sleep(Duration::from_millis(5 + 10 * seed)).await;
            while !in_journal && timeline.lsns().journal <= timeline.start_lsn() {
                io.sleep(Duration::from_millis(1)).await;
            }
            io.set_capacity(Some(io.used_bytes() + 4096 * (seed % 5)));
            let info = || shard.timelines().remove(0);
            while info().ingest_paused.is_none() {
                io.sleep(Duration::from_millis(5)).await;
            }
            io.sleep(Duration::from_secs(2)).await;
            let info = info();
            let reason = info.ingest_paused.expect("ingest must wait for room");
            assert!(reason.contains("no space left"), "{reason}");
            assert_eq!(reason.contains("journal"), in_journal, "{reason}");
            assert_eq!(info.state, TimelineState::Active);
            assert!(outside.acknowledged.get() <= timeline.lsns().journal);
            check_page(&timeline, &outside, &io).await.unwrap();
            if seed % 3 == 0 {
                // There is no room for what it would write, either, and it changes nothing.
                io.set_capacity(Some(io.used_bytes()));
                let archive = Change::Archive(TENANT, TIMELINE, true);
                shard.change(archive).await.expect_err("the disk is full");
            }
            io.set_capacity(None);
            let end = outside.primary.borrow().record_ends().last().copied().unwrap();
            timeline.wait_for_lsn(end).await.unwrap();
            while shard.timelines().remove(0).ingest_paused.is_some() {
                io.sleep(Duration::from_millis(5)).await;
            }
            for _ in 0..20 {
                check_page(&timeline, &outside, &io).await.unwrap();
            }
            shard.shutdown().await;
        };
        world.run(story).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

#[test]
fn the_directory_of_all_tenants_survives_a_power_loss() {
    for seed in story_seeds(20) {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        let story = move |io: crate::sim::SimIo| async move {
            io.create_dir(Path::new("data")).await.unwrap();
            io.sync_dir(&io.dir_change(Path::new("."))).await.unwrap();
            start_shard(&io, &outside).await.unwrap();
        };
        world.run(story).unwrap();
        world.crash();
        let entries = world.run(|io| async move { io.list(Path::new("data")).await.unwrap() });
        let names: Vec<String> = entries.unwrap().into_iter().map(|entry| entry.name).collect();
        assert_eq!(names, ["tenants"], "seed {seed}");
    }
}

#[test]
fn data_that_cannot_be_opened_is_not_overwritten() {
    let mut world = SimWorld::new(1, SimOptions::varied(1));
    let outside = Outside::new(1);
    let story = move |io: crate::sim::SimIo| async move {
        import(io.clone()).await.unwrap();
        let entries = io.list(&timeline_dir()).await.unwrap();
        let layer = entries.iter().find(|entry| entry.name != INDEX_FILE && !entry.is_dir).unwrap();
        io.remove(&timeline_dir().join(&layer.name)).await.unwrap();
        let shard = start_shard(&io, &outside).await.unwrap();
        assert_eq!(shard.timelines()[0].state, TimelineState::Broken);
        let request = |timeline| CreateTimeline {
            tenant: TENANT,
            timeline,
            source: TimelineSource::Pgdata { path: "nowhere".into(), primary: None, slot: None },
        };
        let refused = shard.create_timeline(request(TIMELINE)).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Invalid);
        io.sleep(Duration::from_secs(1)).await;
        let entries = io.list(&timeline_dir()).await.unwrap();
        assert!(entries.iter().any(|entry| entry.name == INDEX_FILE), "the index is gone");
        // Another one may be tried, and tried again after it failed.
        for _ in 0..2 {
            shard.create_timeline(request(TimelineId([9; 16]))).await.unwrap();
            io.sleep(Duration::from_secs(1)).await;
        }
        shard.shutdown().await;
    };
    world.run(story).unwrap();
}

/// The name is changed by the first attempt, and its sync fails: a second attempt finds nothing to
/// change, and must not take that for durable.
#[test]
fn a_deletion_is_acknowledged_only_when_it_is_durable() {
    for seed in story_seeds(10) {
        let options = SimOptions { sync_error_per_million: 1_000_000, ..SimOptions::varied(seed) };
        let mut world = SimWorld::new(seed, options);
        let outside = Outside::new(seed);
        outside.quiet.set(true);
        let branch = TimelineId([9; 16]);
        let shared = outside.clone();
        let story = move |io: crate::sim::SimIo| async move {
            io.set_faults(false);
            import(io.clone()).await.unwrap();
            let (shard, _) = start(&io, &shared).await.unwrap();
            let (tenant, timeline, ancestor) = (TENANT, branch, TIMELINE);
            let request = CreateBranch { tenant, timeline, ancestor, lsn: None, source: None };
            shard.change(Change::Branch(request)).await.unwrap();
            io.set_faults(true);
            let mut acknowledged = false;
            for _ in 0..2 {
                acknowledged |= shard.change(Change::DeleteTimeline(TENANT, branch)).await.is_ok();
            }
            acknowledged
        };
        let acknowledged = world.run(story).unwrap();
        world.crash();
        let story = move |io: crate::sim::SimIo| async move {
            io.set_faults(false);
            let (shard, _) = start(&io, &outside).await.unwrap();
            let there = shard.timelines().iter().any(|info| info.timeline == branch);
            assert!(!there || !acknowledged, "seed {seed}: a deleted timeline is there again");
            if there {
                shard.change(Change::DeleteTimeline(TENANT, branch)).await.unwrap();
            }
            shard.shutdown().await;
        };
        world.run(story).unwrap();
    }
}
