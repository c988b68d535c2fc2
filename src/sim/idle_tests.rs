//! Timelines that are closed when nobody uses them, and opened again: nobody notices.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use super::engine::{Outside, SimShard, TENANT, TIMELINE, start_shard, timeline_dir};
use super::lifecycle_tests::{A, B, C, Op, branch, prepare, with_tree};
use super::{SimIo, SimOptions, SimWorld, story_seeds};
use crate::base::{Lsn, RelNode};
use crate::io::durable;
use crate::io::{Io, TaskClass};
use crate::shard::control::{Change, CoreControl, TimelineState};
use crate::shard::gc::GcRequest;
use crate::shard::history::{HistoryReply, HistoryRequest};
use crate::shard::index::{INDEX_FILE, TimelineIndex};
use crate::shard::reader::{PageBackend, ReadError, RequestLsn, TimelineReader};

/// Reads of A and B, with pauses of a slow client in between; ends with the first problem.
async fn read_slowly(io: SimIo, shard: SimShard, outside: Rc<Outside>, end: Lsn) -> String {
    loop {
        io.sleep(Duration::from_micros(io.random_u64() % 9_000)).await;
        let id = if io.random_u64().is_multiple_of(2) { A } else { B };
        let timeline = match shard.timeline(TENANT, id).await {
            Ok(timeline) => timeline,
            // Somebody else is archiving it.
            Err(ReadError::Archived { .. }) => continue,
            Err(error) => return error.to_string(),
        };
        io.sleep(Duration::from_micros(io.random_u64() % 5_000)).await;
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 + (io.random_u64() % 4) as u32 }.fork(0);
        let block = (io.random_u64() % 24) as u32;
        let request = RequestLsn { request: end, not_modified_since: end };
        match timeline.get_page(rel, block, request).await {
            Ok(page) if page == outside.primary.borrow().page_at(rel, block, end) => {}
            Ok(_) => return format!("{id} {rel} block {block} is wrong"),
            Err(ReadError::Archived { .. }) => {}
            Err(error) => return error.to_string(),
        }
    }
}

/// One thing that an operator or a client does with A or B; what it was.
async fn do_something(io: &SimIo, shard: &SimShard, end: Lsn) -> Result<&'static str, String> {
    let text = |error: crate::shard::control::ControlError| error.to_string();
    let id = if io.random_u64().is_multiple_of(2) { A } else { B };
    match io.random_u64() % 6 {
        0 => {
            let lease = HistoryRequest::Lease(end, Some(3600));
            shard.history(TENANT, id, lease).await.map_err(text)?;
            let known = shard.history(TENANT, id, HistoryRequest::Leases).await.map_err(text)?;
            match known {
                HistoryReply::Leases { leases, .. } if leases.len() == 1 => Ok("lease"),
                other => Err(format!("{other:?}")),
            }
        }
        1 | 2 => {
            let id = if io.random_u64().is_multiple_of(2) { TIMELINE } else { id };
            let all = GcRequest { gc_horizon_bytes: Some(0), pitr_interval_s: Some(0) };
            shard.history(TENANT, id, HistoryRequest::Gc(all)).await.map_err(text)?;
            Ok("gc")
        }
        3 => {
            shard.change(branch(C, id, Some(end))).await.map_err(text)?;
            let made = shard.timeline(TENANT, C).await.map_err(|error| error.to_string())?;
            io.sleep(Duration::from_micros(io.random_u64() % 9_000)).await;
            if made.lsns().last_record != end {
                return Err(format!("the branch ends at {}", made.lsns().last_record));
            }
            drop(made);
            io.sleep(Duration::from_micros(io.random_u64() % 9_000)).await;
            shard.change(Change::DeleteTimeline(TENANT, C)).await.map_err(text)?;
            Ok("branch")
        }
        4 => {
            shard.change(Change::Archive(TENANT, id, true)).await.map_err(text)?;
            io.sleep(Duration::from_micros(io.random_u64() % 9_000)).await;
            let archived = |shard: &SimShard| {
                let infos = shard.timelines();
                infos.iter().any(|one| one.timeline == id && one.state == TimelineState::Archived)
            };
            if !archived(shard) {
                return Err(format!("{id} is not archived"));
            }
            shard.change(Change::Archive(TENANT, id, false)).await.map_err(text)?;
            Ok("archive")
        }
        _ => {
            shard.checkpoint(TENANT, id).await.map_err(text)?;
            Ok("checkpoint")
        }
    }
}

/// Uses a node whose timelines are closed after a few milliseconds; how often what happened.
fn use_and_rest(seed: u64) -> Result<BTreeMap<&'static str, u64>, String> {
    let mut world = SimWorld::new(seed, SimOptions::varied(seed));
    let outside = Outside::new(seed);
    let run = world.run(move |io| async move {
        let end = prepare(io.clone(), outside.clone(), Op::Branch).await;
        outside.timeline_idle_ms.set(1 + seed % 4);
        let shard = start_shard(&io, &outside).await?;
        let problem: Rc<std::cell::RefCell<Option<String>>> = Rc::default();
        let reader = read_slowly(io.clone(), shard.clone(), outside.clone(), end);
        let found = problem.clone();
        io.spawn(TaskClass::Serve, async move {
            let text = reader.await;
            found.borrow_mut().get_or_insert(text);
        });
        let mut done: BTreeMap<&'static str, u64> = BTreeMap::new();
        for _ in 0..60 {
            io.sleep(Duration::from_micros(io.random_u64() % 20_000)).await;
            *done.entry(do_something(&io, &shard, end).await?).or_default() += 1;
            let is_idle = |state| state == TimelineState::Idle;
            let idle = shard.timelines().iter().filter(|info| is_idle(info.state)).count();
            *done.entry("idle").or_default() += idle as u64;
            if let Some(problem) = problem.borrow_mut().take() {
                return Err(problem);
            }
        }
        done.insert("closed", shard.metrics().timelines_closed);
        shard.shutdown().await;
        Ok(done)
    });
    run.map_err(|error| error.to_string())?
}

#[test]
fn what_is_idle_is_closed_and_nobody_notices() {
    let mut done: BTreeMap<&'static str, u64> = BTreeMap::new();
    for seed in story_seeds(16) {
        let one = use_and_rest(seed).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        one.into_iter().for_each(|(what, count)| *done.entry(what).or_default() += count);
    }
    println!("{done:?}");
    for what in ["lease", "gc", "branch", "archive", "checkpoint", "idle", "closed"] {
        assert!(done.get(what).is_some_and(|count| *count >= 30), "{what}: {done:?}");
    }
}

#[test]
fn a_timeline_that_is_closed_while_it_is_used_is_found() {
    crate::shard::CANARY_CLOSE_IN_USE.set(true);
    let found = (0..16).find_map(|seed| Some((seed, use_and_rest(seed).err()?)));
    crate::shard::CANARY_CLOSE_IN_USE.set(false);
    let (seed, problem) = found.expect("the planted bug was not found");
    println!("found at seed {seed}: {problem}");
}

#[test]
fn what_is_closed_is_collected_once_a_day() {
    with_tree(|io, shard, outside, _| async move {
        shard.shutdown().await;
        let path = timeline_dir().join(INDEX_FILE);
        let bytes = durable::read_file(&io, &path).await.unwrap();
        let mut index = TimelineIndex::decode(&bytes).unwrap();
        // It takes in no more WAL, and may be closed.
        index.source = None;
        durable::write_file_atomic(&io, &path, &index.encode()).await.unwrap();
        outside.timeline_idle_ms.set(600_000);
        outside.gc_period_s.set(3 * 24 * 3600);
        let shard = start_shard(&io, &outside).await.unwrap();
        let root = |shard: &SimShard| {
            shard.timelines().into_iter().find(|info| info.timeline == TIMELINE).unwrap()
        };
        let before = root(&shard);
        assert!(before.state == TimelineState::Idle && before.history_bytes > 0, "{before:?}");
        assert!(before.gc_cutoff_lsn < before.last_record_lsn);
        io.sleep(Duration::from_secs(26 * 3600)).await;
        let after = root(&shard);
        assert_eq!(after.gc_cutoff_lsn, after.last_record_lsn);
        assert!(after.state == TimelineState::Idle, "{after:?}");
        // The size that was added up in between is still known.
        shard.timeline(TENANT, TIMELINE).await.unwrap();
        while root(&shard).logical_bytes.is_none() {
            io.sleep(Duration::from_millis(1)).await;
        }
        let bytes = root(&shard).logical_bytes;
        io.sleep(Duration::from_secs(1800)).await;
        let closed = root(&shard);
        assert_eq!((closed.state, closed.logical_bytes), (TimelineState::Idle, bytes));
        let open = shard.timeline(TENANT, TIMELINE).await.unwrap();
        let again = root(&shard);
        assert_eq!((again.state, again.logical_bytes), (TimelineState::Active, bytes));
        let blocks = open.sum_of_sizes(open.lsns().last_record).await.unwrap();
        assert_eq!(blocks.map(|blocks| blocks as u64 * 8192), bytes);
        shard.shutdown().await;
    });
}
