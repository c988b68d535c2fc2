//! Garbage collection, leases and commit times under kills and power losses.
//!
//! Checked, against the primary's own idea of every page and a model of what was promised:
//! 1. a read that is answered is right; one that is refused lies before the cut-off, and no lease
//!    that was granted and lasts holds it;
//! 2. leases survive everything until they end, and so do pages at branch points;
//! 3. the cut-off never goes back;
//! 4. no LSN that is given for a time has a later commit at or before it, and it is no more than a
//!    second short;
//! 5. in the end, all that nobody can need is gone, and so are its files.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{join, try_join3};

use super::engine::{
    Outside, START, SimShard, TENANT, TIMELINE, import, live_and_die, read_page, start,
    timeline_dir,
};
use super::{SimIo, SimOptions, SimWorld, story_seeds};
use crate::base::{Key, Lsn, RelTag, Timestamp};
use crate::io::{File, Io};
use crate::shard::control::CoreControl;
use crate::shard::gc::{GcRequest, planted};
use crate::shard::history::{HISTORY_FILES, LsnByTimestamp, TimeKind};
use crate::shard::index::INDEX_FILE;
use crate::shard::journal_mark::JOURNAL_MARK_FILE;
use crate::shard::leases::LeaseError;
use crate::shard::plan::gc::planted::LATE_READ_POINT;
use crate::shard::reader::{ReadError, RequestLsn, TimelineReader};
use crate::shard::timeline::Timeline;

const SEEDS: u64 = 40;
const CANARY_SEEDS: u64 = 60;
pub(super) const SECOND_US: i64 = 1_000_000;

/// What the node has promised; it survives the node.
struct Model {
    outside: Rc<Outside>,
    /// Leases that were granted, and until when.
    leases: RefCell<BTreeMap<Lsn, Timestamp>>,
    branches: RefCell<BTreeSet<Lsn>>,
    /// The highest cut-off seen.
    cutoff: Cell<Lsn>,
    images: RefCell<Vec<Lsn>>,
    collected: Cell<u64>,
}

struct Life {
    io: SimIo,
    model: Rc<Model>,
    shard: SimShard,
    timeline: Rc<Timeline<SimIo>>,
}

/// What is wrong with an answer about a time, given all commits, in order, and the first LSN that
/// is readable.
pub(super) fn wrong_time(
    known: &[(Lsn, Timestamp)],
    time: Timestamp,
    answer: &LsnByTimestamp,
    floor: Lsn,
) -> Option<&'static str> {
    let exact = |time: Timestamp| {
        known.iter().take_while(|(_, at)| *at <= time).last().map_or(Lsn(0), |(lsn, _)| *lsn)
    };
    let at_least = exact(Timestamp(time.0 - SECOND_US));
    match (answer.lsn, answer.kind) {
        (Some(lsn), _) if known.iter().any(|(at, when)| *at <= lsn && *when > time) => {
            Some("a later commit is at or before it")
        }
        (Some(lsn), _) if lsn < at_least => Some("it is more than a second short"),
        (Some(lsn), _) if lsn < floor => Some("it cannot be read"),
        (Some(_), TimeKind::Future) if known.iter().any(|(_, when)| *when > time) => {
            Some("there are later commits")
        }
        (None, TimeKind::Past) if at_least >= floor => Some("it is not so old"),
        (None, TimeKind::Nodata) => Some("there are data"),
        _ => None,
    }
}

impl Life {
    async fn begin(io: SimIo, model: Rc<Model>) -> Result<Life, String> {
        let life = Life::begin_anyhow(io, model).await?;
        let (cutoff, seen) = (life.timeline.gc_cutoff(), life.model.cutoff.get());
        if cutoff < seen {
            return Err(format!("the cut-off went back from {seen} to {cutoff}"));
        }
        let present = life.timeline.leases();
        let now = life.now();
        for (lsn, end) in life.model.leases.borrow().iter().filter(|(_, end)| **end > now) {
            if !present.iter().any(|lease| lease.lsn == *lsn && lease.valid_until >= *end) {
                return Err(format!("the lease on {lsn} until {end} is lost at {now}"));
            }
        }
        Ok(life)
    }

    /// Without looking whether promises are kept.
    async fn begin_anyhow(io: SimIo, model: Rc<Model>) -> Result<Life, String> {
        let (shard, timeline) = start(&io, &model.outside).await?;
        Ok(Life { io, model, shard, timeline })
    }

    fn now(&self) -> Timestamp {
        Timestamp(self.io.unix_time_us())
    }

    fn below(&self, bound: u64) -> u64 {
        self.io.random_u64() % bound
    }

    fn pick<T: Copy>(&self, from: &[T]) -> Option<T> {
        from.get(self.below(from.len().max(1) as u64) as usize).copied()
    }

    /// An LSN that can be read, or could once, biased to the edges.
    fn some_lsn(&self) -> Lsn {
        let last = self.timeline.lsns().last_record;
        let lsn = match self.below(8) {
            0 => Some(self.timeline.gc_cutoff()),
            1 => Some(Lsn(self.timeline.gc_cutoff().0 + 1)),
            2 | 3 => {
                let leased: Vec<Lsn> = self.model.leases.borrow().keys().copied().collect();
                self.pick(&leased)
            }
            4 => self.pick(&self.model.images.borrow()),
            _ => {
                let primary = self.model.outside.primary.borrow();
                let ends = primary.record_ends();
                self.pick(&ends[..ends.partition_point(|end| *end <= last)])
            }
        };
        lsn.unwrap_or(last).clamp(START, last)
    }

    fn some_page(&self) -> Option<(RelTag, u32)> {
        let forks = self.model.outside.primary.borrow().forks();
        Some((self.pick(&forks)?, self.below(28) as u32))
    }

    /// A lease that was granted before, and lasts still.
    fn is_leased(&self, lsn: Lsn) -> bool {
        self.model.leases.borrow().get(&lsn).is_some_and(|end| *end > self.now())
    }

    async fn read(&self) -> Result<(), String> {
        let Some((rel, block)) = self.some_page() else { return Ok(()) };
        let lsn = self.some_lsn();
        let granted = self.is_leased(lsn);
        let request = RequestLsn { request: lsn, not_modified_since: START };
        let primary = &self.model.outside.primary;
        let answer = match self.below(4) {
            0 => self.timeline.rel_size(rel, request).await.map(|blocks| {
                let expected = primary.borrow().size_at(rel, lsn);
                (blocks == expected, format!("{rel} at {lsn} has {blocks} blocks, not {expected}"))
            }),
            _ => read_page(&self.timeline, rel, block, request).await?.map(|page| {
                let expected = primary.borrow().page_at(rel, block, lsn);
                (page == expected, format!("{rel} block {block} at {lsn} is wrong"))
            }),
        };
        match answer {
            Ok((true, _)) => Ok(()),
            Ok((false, problem)) => Err(problem),
            Err(ReadError::GarbageCollected { cutoff, .. }) => {
                if lsn >= cutoff || (granted && self.is_leased(lsn)) {
                    return Err(format!("{lsn} was refused, the cut-off is {cutoff}"));
                }
                Ok(())
            }
            Err(error) => Err(format!("reading {rel} block {block} at {lsn}: {error}")),
        }
    }

    async fn read_branch(&self) -> Result<(), String> {
        let branches: Vec<Lsn> = self.model.branches.borrow().iter().copied().collect();
        let (Some((rel, block)), Some(lsn)) = (self.some_page(), self.pick(&branches)) else {
            return Ok(());
        };
        let page = self.timeline.page_at_branch(rel, block, lsn).await;
        let page = page.map_err(|error| format!("branch at {lsn}: {error}"))?;
        let expected = self.model.outside.primary.borrow().page_at(rel, block, lsn);
        if page == expected {
            Ok(())
        } else {
            Err(format!("{rel} block {block} at the branch point {lsn} is wrong"))
        }
    }

    async fn take_lease(&self) -> Result<(), String> {
        let lsn = self.some_lsn();
        let seconds = 1 + self.below(3);
        match self.timeline.lease(lsn, Some(seconds)).await {
            Ok(lease) => {
                assert_eq!(lease.lsn, lsn);
                let mut leases = self.model.leases.borrow_mut();
                let end = leases.entry(lsn).or_insert(lease.valid_until);
                *end = lease.valid_until.max(*end);
                Ok(())
            }
            Err(LeaseError::BelowCutoff { .. }) if self.is_leased(lsn) => {
                Err(format!("the lease on {lsn} lasts, but was not prolonged"))
            }
            Err(LeaseError::BelowCutoff { .. }) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn make_branch(&self) {
        let lsn = self.some_lsn();
        let mut branches = self.model.branches.borrow_mut();
        // A real branch has its ancestor's journal synced first; without that a restart may find
        // less than the branch point.
        let is_durable = lsn <= self.timeline.lsns().journal;
        if branches.len() < 3 && is_durable && self.timeline.check_holdable(lsn).is_ok() {
            branches.insert(lsn);
        }
    }

    async fn collect(&self, target: Lsn, pitr_interval_s: u64) -> Result<(), String> {
        let last = self.timeline.lsns().last_record;
        let request = GcRequest {
            gc_horizon_bytes: Some(last.bytes_since(target)),
            pitr_interval_s: Some(pitr_interval_s),
        };
        let before = self.now();
        let points = || Ok(self.model.branches.borrow().iter().copied().collect());
        let report = self.timeline.collect_garbage(request, points).await;
        let report = report.map_err(|error| error.to_string())?;
        let (old, new) = (report.cutoff_before, report.gc_cutoff_lsn);
        if new < old || new != self.timeline.gc_cutoff() {
            return Err(format!("the cut-off went from {old} to {new}"));
        }
        // Somebody else's collection may have been planned with a shorter interval before.
        let young = Timestamp(before.0 - pitr_interval_s as i64 * SECOND_US);
        let primary = self.model.outside.primary.borrow();
        let mut commits = primary.commits().iter();
        if pitr_interval_s > 0 && commits.any(|(lsn, at)| *at > young && *lsn <= new && *lsn > old)
        {
            return Err(format!("a commit before {new} is younger than {pitr_interval_s} s"));
        }
        self.model.cutoff.set(self.model.cutoff.get().max(new));
        self.model.collected.set(self.model.collected.get() + report.layers_removed);
        Ok(())
    }

    async fn make_image(&self) -> Result<(), String> {
        let cuts = [
            Key::MIN,
            Key::CHECKPOINT,
            Key::rel_dir_range(1663, 5).start,
            Key::rel_block(rel(1), 0),
            Key::rel_block(rel(1), 9),
            Key::rel_block(rel(2), 0),
            Key::MAX,
        ];
        let (a, b) = (cuts[self.below(7) as usize], cuts[self.below(7) as usize]);
        let keys = if a < b { a..b } else { Key::MIN..Key::MAX };
        let lsn = self.timeline.make_image_layer(keys).await?;
        self.model.images.borrow_mut().extend(lsn);
        Ok(())
    }

    fn ask_time(&self) -> Result<(), String> {
        let last = self.timeline.lsns().last_record;
        let primary = self.model.outside.primary.borrow();
        let commits = primary.commits();
        let known = &commits[..commits.partition_point(|(lsn, _)| *lsn <= last)];
        let Some((_, near)) = self.pick(known) else { return Ok(()) };
        let time = Timestamp(near.0 + self.below(4_000_000) as i64 - 2 * SECOND_US);
        let answer = self.timeline.lsn_by_timestamp(time);
        match wrong_time(known, time, &answer, self.timeline.gc_cutoff()) {
            Some(problem) => Err(format!("{time} gives {answer:?}, but {problem}")),
            None => Ok(()),
        }
    }

    async fn pause(&self, us: u64) {
        self.io.sleep(Duration::from_micros(self.below(us))).await;
    }

    async fn maintain(&self) -> Result<(), String> {
        loop {
            self.pause(3_000).await;
            match self.below(6) {
                0 | 1 => {
                    let done = self.shard.checkpoint(TENANT, TIMELINE).await;
                    done.map_err(|error| error.to_string())?;
                    self.make_image().await?;
                }
                2 => {
                    let ahead = self.below(6_000_000) as i64 - 3 * SECOND_US;
                    self.model.outside.clock_ahead_us.set(ahead);
                }
                3 => self.make_branch(),
                4 => self.collect(self.some_lsn(), 1).await?,
                _ => {
                    let target = self.some_lsn();
                    let target = Lsn((target.0 + self.below(3)).saturating_sub(1));
                    self.collect(target, 0).await?;
                }
            }
        }
    }

    async fn read_on(&self) -> Result<(), String> {
        loop {
            self.pause(300).await;
            self.read().await?;
            self.read_branch().await?;
            self.ask_time()?;
            if let Some(reason) = self.timeline.broken() {
                return Err(format!("ingest stopped: {reason}"));
            }
        }
    }

    async fn lease_on(&self) -> Result<(), String> {
        loop {
            self.pause(5_000).await;
            self.take_lease().await?;
        }
    }

    /// Without holders, one whole image and the newest LSN leave nothing old.
    async fn clean_up(&self) -> Result<(), String> {
        self.model.branches.borrow_mut().clear();
        let end = loop {
            let done = self.shard.checkpoint(TENANT, TIMELINE).await;
            done.map_err(|error| error.to_string())?;
            if let Some(lsn) = self.timeline.make_image_layer(Key::MIN..Key::MAX).await? {
                break lsn;
            }
            // An image is there already: one more record makes room for another.
            self.model.outside.primary.borrow_mut().step();
            let end = self.model.outside.primary.borrow().end();
            self.timeline.wait_for_lsn(end).await.map_err(|error| error.to_string())?;
        };
        self.collect(end, 0).await?;
        if self.timeline.gc_cutoff() != end || !self.timeline.leases().is_empty() {
            return Err(format!("history goes back to {}", self.timeline.gc_cutoff()));
        }
        let layers = self.timeline.layer_names();
        if layers.len() != 1 {
            return Err(format!("these layers are left: {layers:?}"));
        }
        let entries = self.io.list(&timeline_dir()).await.map_err(|error| error.to_string())?;
        for entry in entries.into_iter().filter(|entry| !entry.is_dir) {
            let known = [INDEX_FILE, JOURNAL_MARK_FILE].contains(&&entry.name[..])
                || HISTORY_FILES.contains(&&entry.name[..]);
            if !known && !layers.contains(&entry.name) {
                return Err(format!("the file {} is left", entry.name));
            }
        }
        for _ in 0..50 {
            self.read().await?;
        }
        Ok(())
    }
}

fn rel(number: u32) -> RelTag {
    crate::base::RelNode { spc: 1663, db: 5, rel: 16384 + number }.fork(0)
}

async fn live(io: SimIo, model: Rc<Model>) -> Result<(), String> {
    let life = Life::begin(io, model).await?;
    try_join3(life.maintain(), life.read_on(), life.lease_on()).await.map(|_| ())
}

async fn finish(io: SimIo, model: Rc<Model>) -> Result<(), String> {
    let life = Life::begin(io, model).await?;
    let end = life.model.outside.primary.borrow().record_ends().last().copied().unwrap_or(START);
    life.timeline.wait_for_lsn(end).await.map_err(|error| format!("no progress: {error}"))?;
    for _ in 0..100 {
        life.read().await?;
        life.read_branch().await?;
        life.ask_time()?;
    }
    life.shard.shutdown().await;
    Ok(())
}

/// When all leases have ended.
async fn late(io: SimIo, model: Rc<Model>) -> Result<(), String> {
    let life = Life::begin(io, model).await?;
    life.ask_time()?;
    life.clean_up().await?;
    life.shard.shutdown().await;
    Ok(())
}

fn scenario(seed: u64) -> Result<u64, String> {
    let mut world = SimWorld::new(seed, SimOptions::varied(seed));
    let model = new_model(seed);
    model.outside.records_per_commit.set(1 + world.draw("commits", 60));
    world.run(import).map_err(|error| error.to_string())??;
    for _ in 0..1 + world.draw("lives", 4) {
        let steps = 500 + world.draw("life", 3_000);
        let shared = model.clone();
        live_and_die(&mut world, steps, move |io| live(io, shared))?;
        let pause = Duration::from_millis(world.draw("pause", 4_000));
        world.run(move |io| async move { io.sleep(pause).await }).map_err(|e| e.to_string())?;
    }
    model.outside.quiet.set(true);
    let shared = model.clone();
    world.run(move |io| finish(io, shared)).map_err(|error| error.to_string())??;
    let pause = Duration::from_secs(5);
    world.run(move |io| async move { io.sleep(pause).await }).map_err(|e| e.to_string())?;
    let shared = model.clone();
    world.run(move |io| late(io, shared)).map_err(|error| error.to_string())??;
    Ok(model.collected.get())
}

#[test]
fn history_holds_what_was_promised() {
    let (mut collected, mut runs) = (0, 0);
    for seed in story_seeds(SEEDS) {
        runs += 1;
        collected += scenario(seed).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
    println!("{collected} layers were collected in {runs} runs");
    assert!(collected > 10 * runs, "{collected} layers were collected: the runs say little");
}

fn found(what: &str, plant: impl Fn(bool)) {
    plant(true);
    let result = (0..CANARY_SEEDS).find_map(|seed| {
        let run = std::panic::AssertUnwindSafe(|| scenario(seed));
        match std::panic::catch_unwind(run) {
            Ok(result) => Some((seed, result.err()?)),
            Err(_) => Some((seed, "panic".to_owned())),
        }
    });
    plant(false);
    let (seed, problem) = result.unwrap_or_else(|| panic!("the planted bug was not found: {what}"));
    println!("{what}: found at seed {seed}: {problem}");
}

#[test]
fn ignored_leases_are_found() {
    found("leases hold nothing", |on| planted::LEASES_IGNORED.set(on));
}

#[test]
fn leases_that_are_not_written_are_found() {
    found("leases are granted unwritten", |on| planted::LEASES_UNWRITTEN.set(on));
}

#[test]
fn an_index_that_is_not_written_is_found() {
    found("files go before the index does", |on| planted::INDEX_UNWRITTEN.set(on));
}

/// Reads at an LSN that a collection passes at the same time, with nothing cached.
fn overtaken(seed: u64) -> Result<(), String> {
    let mut world =
        SimWorld::new(seed, SimOptions { yield_per_million: 0, ..SimOptions::default() });
    let model = new_model(seed);
    world.run(import).map_err(|error| error.to_string())??;
    let shared = model.clone();
    let story = move |io| async move {
        let life = Life::begin(io, shared).await.unwrap();
        fill(&life).await;
        life.shard.shutdown().await;
    };
    world.run(story).map_err(|error| error.to_string())?;
    let story = move |io| async move {
        let life = Life::begin(io, model).await?;
        let end = life.timeline.lsns().disk_consistent;
        let reads = async {
            life.pause(1_500).await;
            for _ in 0..4 {
                life.read().await?;
            }
            Ok(())
        };
        let (read, collected) = join(reads, life.collect(end, 0)).await;
        life.shard.shutdown().await;
        read.and(collected)
    };
    world.run(story).map_err(|error| error.to_string())?
}

#[test]
fn a_read_that_is_overtaken_is_right_or_refused() {
    for seed in 0..2 * CANARY_SEEDS {
        overtaken(seed).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
    planted::NO_SECOND_LOOK.set(true);
    let found = (0..20 * CANARY_SEEDS).find_map(|seed| Some((seed, overtaken(seed).err()?)));
    planted::NO_SECOND_LOOK.set(false);
    let (seed, problem) = found.expect("the planted bug was not found");
    println!("found at seed {seed}: {problem}");
}

fn new_model(seed: u64) -> Rc<Model> {
    let outside = Outside::new(seed);
    // Images are made by the test itself here; compaction beside collections: see `engine`.
    outside.compaction.set(Some((usize::MAX, 10)));
    Rc::new(Model {
        outside,
        leases: RefCell::default(),
        branches: RefCell::default(),
        cutoff: Cell::new(START),
        images: RefCell::default(),
        collected: Cell::new(0),
    })
}

/// Some WAL, all of it in layers, and one image of all keys at the end.
async fn fill(life: &Life) -> Lsn {
    for _ in 0..100 {
        life.model.outside.primary.borrow_mut().step();
    }
    life.model.outside.quiet.set(true);
    let end = life.model.outside.primary.borrow().end();
    life.timeline.wait_for_lsn(end).await.unwrap();
    life.shard.checkpoint(TENANT, TIMELINE).await.unwrap();
    life.timeline.make_image_layer(Key::MIN..Key::MAX).await.unwrap().unwrap()
}

mod single_tests;
