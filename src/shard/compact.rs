//! Compaction: carries out what [`super::plan::compaction`] says, one action after the other.
//!
//! One action:
//! 1. the serve executor plans, from the layers as they are; it holds on to all of them, so no
//!    file goes away meanwhile;
//! 2. a job on the background executor reads the inputs and writes new layer files, each durable
//!    under its name when it is finished ([`merge`], [`images`]);
//! 3. the timeline's index is replaced by one that names the new layers and no longer the old;
//! 4. in one synchronous step the layer map does the same. A read has either the old layers or
//!    the new, never both: it takes its layers in one synchronous step too, and keeps them;
//! 5. a file that the index no longer names is removed when the last read that has its layer is
//!    done.
//!
//! A crash at any point leaves an index that names either the old layers or the new ones, and both
//! are whole: inputs go only after the index without them is durable. What the index does not
//! name is removed at the next start. After a failed index write it is not known which of the two
//! is on disk, so the files of both stay until an index has been written.
//!
//! Invariants: checkpoint and compaction replace the index in turn (`index_turn`), each together
//! with its step of the layer map; a timeline has one compaction at a time; no read waits for one,
//! and ingest only where it would run out of what [`super::plan::pressure`] allows it. A failure is
//! logged and counted, and the next attempt is made after a pause, with the next action of the plan
//! if there is one: a damaged layer does not hold up the others.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select;

use self::images::ImageJob;
pub use self::job::CompactError;
use self::job::{Flags, JobBase};
use self::merge::MergeJob;
use super::branch::below_branch_point;
use super::plan::compaction::{Action, PlanConfig, PlanLayer, bars, plan};
use super::stored::StoredLayer;
use super::timeline::{Mutable, Signal, Timeline};
use super::turn::Turn;
use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::io::Io;
use crate::layers::{InputLayer, LayerName, LayerOwner};
use crate::limits::{
    COMPACT_L0_INPUT_BYTES_MAX, COMPACT_REMOVE_POLL_MS, COMPACT_RETRY_MS_MAX, COMPACT_RETRY_MS_MIN,
    L0_LAYERS_MAX, L0_LAYERS_URGENT, L0_MERGE_FAILURES_MAX,
};

mod adopt;
mod chain;
mod images;
mod job;
mod merge;
mod points;

#[cfg(test)]
thread_local! {
    /// Bugs that the simulator must find; see [`Planted`].
    pub(crate) static PLANTED: Cell<Option<Planted>> = const { Cell::new(None) };
}

/// Bugs that tests plant.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    /// Removes the inputs before the index without them is durable.
    RemoveBeforeIndex,
    /// Leaves the inputs in the layer map beside what they were merged into.
    KeepInputs,
    /// Leaves one value in a thousand out of a merge.
    DropValues,
    /// Gives an image an LSN that is later than what it shows.
    ImageLsn,
    /// Makes images without looking at the newest delta layer.
    StaleImages,
    /// Lets reads take what a delta layer has below the image that they end at.
    ReadBelowImage,
}

#[cfg(test)]
thread_local! {
    /// What was done on this thread: merges of L0, of L1, image jobs, pages rebuilt, merges of L0
    /// with rows of L1.
    pub(crate) static WRITTEN: Cell<[u64; 5]> = const { Cell::new([0; 5]) };
    /// Bytes that a merge of L0 layers takes at most.
    pub(crate) static MERGE_BYTES_MAX: Cell<u64> = const { Cell::new(COMPACT_L0_INPUT_BYTES_MAX) };
}

#[cfg(test)]
fn merge_bytes_max() -> u64 {
    MERGE_BYTES_MAX.get()
}

#[cfg(not(test))]
fn merge_bytes_max() -> u64 {
    COMPACT_L0_INPUT_BYTES_MAX
}

#[cfg(test)]
fn count(kind: usize, amount: u64) {
    let mut written = WRITTEN.get();
    written[kind] += amount;
    WRITTEN.set(written);
}

/// True if this bug is planted.
#[cfg(test)]
pub(super) fn planted(bug: Planted) -> bool {
    PLANTED.get() == Some(bug)
}

/// A timeline's compaction.
pub(super) struct Compaction<I: Io> {
    /// Tells the compaction task that there are new layers.
    pub(super) signal: Signal,
    turn: Turn,
    flags: Arc<Flags>,
    /// No longer part of the timeline; their files go when nobody reads them any more.
    retired: RefCell<Vec<Rc<StoredLayer<I>>>>,
    /// Files that are perhaps named by the index on disk, but not by the one in memory.
    strays: RefCell<Vec<LayerName>>,
    /// Failures one after the other.
    failures: Cell<u32>,
    /// Merges of L0 layers that failed one after the other.
    pub(super) l0_failures: Cell<u32>,
    /// What compaction gets done.
    pub(super) capacity: Capacity,
    /// Values that the newest L0 layer has of each key that is in it, in thousandths.
    pub(super) layer_records_milli: Cell<u64>,
}

/// How much WAL compaction works off when it does nothing else but that, from what the last
/// actions took.
#[derive(Debug, Default)]
pub(super) struct Capacity {
    bytes_per_s: Cell<Option<u64>>,
    /// Time of the actions since the last merge of L0 layers.
    busy: Cell<Duration>,
}

impl Capacity {
    /// Bytes of WAL per second; `None` before the first merge.
    pub(super) fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s.get()
    }

    /// An action took so long, and merged L0 layers of so many bytes of WAL, if any.
    fn note(&self, took: Duration, merged_bytes: u64) {
        let busy = self.busy.get() + took;
        self.busy.set(busy);
        if merged_bytes == 0 {
            return;
        }
        self.busy.set(Duration::ZERO);
        let now = u128::from(merged_bytes) * 1_000_000 / busy.as_micros().max(1);
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        // Images are made now and then only.
        let before = self.bytes_per_s.get().unwrap_or(now);
        self.bytes_per_s.set(Some((before - before / 4).saturating_add(now / 4).max(1)));
    }
}

impl<I: Io> Default for Compaction<I> {
    fn default() -> Self {
        Compaction {
            signal: Signal::new(),
            turn: Turn::default(),
            flags: Arc::default(),
            retired: RefCell::default(),
            strays: RefCell::default(),
            failures: Cell::new(0),
            l0_failures: Cell::new(0),
            capacity: Capacity::default(),
            layer_records_milli: Cell::new(0),
        }
    }
}

impl<I: Io> Compaction<I> {
    /// New L0 layers: an image job that runs gives way when there are many.
    pub(super) fn wake(&self, l0_count: usize) {
        if l0_count >= L0_LAYERS_URGENT {
            self.flags.hurry(true);
        }
        self.signal.set();
    }

    /// Nothing is being done or waits to be done again.
    pub(super) fn is_at_rest(&self) -> bool {
        self.has_nothing_to_do() && self.retired.borrow().is_empty()
    }

    /// No job runs, and none that failed is to be tried again.
    pub(super) fn has_nothing_to_do(&self) -> bool {
        self.turn.is_free() && self.failures.get() == 0
    }

    /// L0 layers cannot be merged.
    pub(super) fn is_stuck(&self) -> bool {
        self.l0_failures.get() >= L0_MERGE_FAILURES_MAX
    }

    /// There will be no more jobs.
    pub(super) fn has_ended(&self) -> bool {
        self.flags.is_cancelled()
    }

    /// Ends a job that runs; no other begins.
    pub(super) fn cancel(&self) {
        self.flags.cancel();
        self.signal.set();
    }
}

/// The layers of a timeline as they were planned for, then those of its ancestors that it sees.
struct Snapshot<I: Io> {
    plan: Vec<PlanLayer>,
    stored: Vec<Rc<StoredLayer<I>>>,
    /// For the timeline and each ancestor: its part of the lists, and where it ends.
    levels: Vec<(Range<usize>, Lsn)>,
}

impl<I: Io> Snapshot<I> {
    /// Adds the timeline's own layers, or what is below an LSN of an ancestor's.
    fn add(&mut self, mutable: &Mutable<I>, below: Option<Lsn>) {
        let from = self.plan.len();
        let (end, inherited) = (below.unwrap_or(Lsn::MAX), below.is_some());
        for (span, layer) in mutable.layers.iter().filter(|(span, _)| span.lsns.start < end) {
            let mut span = span.clone();
            span.lsns.end = span.lsns.end.min(end);
            self.plan.push(PlanLayer { span, bytes: layer.file_bytes(), inherited });
            self.stored.push(layer.clone());
        }
        self.levels.push((from..self.plan.len(), end));
    }

    fn layers(&self, chosen: &[usize]) -> Vec<Rc<StoredLayer<I>>> {
        chosen.iter().filter_map(|at| self.stored.get(*at).cloned()).collect()
    }

    fn input(&self, at: usize) -> Option<InputLayer> {
        let level = self.levels.iter().find(|(part, _)| part.contains(&at))?;
        Some(self.stored.get(at)?.input(level.1))
    }

    fn inputs(&self, chosen: &[usize]) -> Vec<InputLayer> {
        chosen.iter().filter_map(|at| self.input(*at)).collect()
    }

    /// WAL of the L0 layers among these, in bytes.
    fn l0_wal_bytes(&self, chosen: &[usize]) -> u64 {
        let chosen = chosen.iter().filter_map(|at| self.plan.get(*at));
        let l0 = chosen.filter(|layer| layer.is_l0()).map(|layer| &layer.span.lsns);
        l0.map(|lsns| lsns.end.bytes_since(lsns.start)).sum()
    }

    /// Layers that begin below `below`, without the `inputs`; those of each timeline together.
    fn older(&self, below: Lsn, inputs: &[usize]) -> Vec<Vec<InputLayer>> {
        let begins = |at: &usize| self.plan.get(*at).map(|layer| layer.span.lsns.start);
        let is_older = |at: &usize| begins(at) < Some(below) && !inputs.contains(at);
        let of_level = |(part, _): &(Range<usize>, Lsn)| {
            part.clone().filter(is_older).filter_map(|at| self.input(at)).collect()
        };
        self.levels.iter().map(of_level).collect()
    }

    /// Keys where image layers begin, ascending.
    fn cuts(&self) -> Vec<Key> {
        let images = self.plan.iter().filter(|layer| layer.span.is_image);
        let keys: BTreeSet<Key> = images.map(|layer| layer.span.keys.start).collect();
        keys.into_iter().collect()
    }
}

impl<I: Io> Timeline<I> {
    /// Number of L0 layers, which compaction keeps down.
    pub fn l0_count(&self) -> usize {
        self.mutable.borrow().layers.l0_count()
    }

    /// Number of image layers, and of all layers.
    #[cfg(test)]
    pub(crate) fn layer_counts(&self) -> (usize, usize) {
        let mutable = self.mutable.borrow();
        (mutable.layers.iter().filter(|(span, _)| span.is_image).count(), mutable.layers.len())
    }

    /// Two delta layers that have keys and LSNs in common, described; there must never be any.
    pub fn overlapping_layers(&self) -> Option<String> {
        let mutable = self.mutable.borrow();
        let (one, other) = mutable.layers.overlapping_deltas()?;
        Some(format!("{one:?} overlaps with {other:?}"))
    }

    pub(super) async fn compaction_loop(self: Rc<Self>) {
        let compaction = &self.compaction;
        compaction.signal.set();
        while !self.stopping.get() {
            let signal = pin!(compaction.signal.wait());
            if compaction.retired.borrow().is_empty() {
                signal.await;
            } else {
                let pause = Duration::from_millis(COMPACT_REMOVE_POLL_MS);
                select(signal, pin!(self.context.io.sleep(pause))).await;
            }
            while !self.stopping.get() && !self.compact_and_report().await {}
            self.remove_unused().await;
        }
    }

    /// Carries out one action; true if there is nothing more to do.
    async fn compact_and_report(&self) -> bool {
        let compaction = &self.compaction;
        match self.compact_once().await {
            Ok(true) => {
                compaction.failures.set(0);
                self.remove_unused().await;
                false
            }
            Ok(false) => true,
            Err(CompactError::Cancelled | CompactError::Background(_)) => true,
            Err(error) => {
                let failures = compaction.failures.get().saturating_add(1);
                compaction.failures.set(failures);
                self.context.counters.compaction_failures.add(1);
                tracing::error!(tenant = %self.tenant, timeline = %self.id,
                    "compaction failed: {error}; trying again");
                let pause = COMPACT_RETRY_MS_MIN << failures.saturating_sub(1).min(16);
                let pause = Duration::from_millis(pause.min(COMPACT_RETRY_MS_MAX));
                self.context.io.sleep(pause).await;
                false
            }
        }
    }

    /// Layers of ancestors are part of it where everything that the branch sees of them is in
    /// files.
    fn snapshot(&self) -> Snapshot<I> {
        let mut snapshot = Snapshot { plan: Vec::new(), stored: Vec::new(), levels: Vec::new() };
        snapshot.add(&self.mutable.borrow(), None);
        // Nobody waits for compaction before an ancestor goes away: a job fails then.
        let (mut older, mut below) = (self.ancestor(), Lsn::MAX);
        let mut found = Vec::new();
        while let Some(ancestor) = older {
            if ancestor.timeline.lsns().disk_consistent < ancestor.lsn {
                return snapshot;
            }
            older = ancestor.timeline.ancestor();
            found.push(ancestor);
        }
        for ancestor in found {
            below = below_branch_point(below, ancestor.lsn);
            snapshot.add(&ancestor.timeline.mutable.borrow(), Some(below));
        }
        snapshot
    }

    fn plan_config(&self) -> PlanConfig {
        let config = self.context.config.get();
        PlanConfig {
            l0_threshold: config.compaction_threshold,
            target_bytes: config.compaction_target_bytes,
            image_percent: config.compaction_image_percent,
            merge_bytes_max: merge_bytes_max(),
            start_lsn: self.start_lsn(),
            layer_records_milli: self.compaction.layer_records_milli.get(),
        }
    }

    /// Plans, and carries out one action; false if there is nothing to do.
    pub(crate) async fn compact_once(&self) -> Result<bool, CompactError> {
        let _turn = self.compaction.turn.acquire().await;
        if self.stopping.get() || self.broken().is_some() || self.compaction.flags.is_cancelled() {
            return Ok(false);
        }
        let snapshot = self.snapshot();
        let config = self.plan_config();
        let actions = plan(&snapshot.plan, &config);
        let merges_l0 = |action: &Action| matches!(action, Action::MergeL0 { .. });
        if self.l0_count() >= L0_LAYERS_MAX.max(config.l0_threshold)
            && !actions.iter().any(merges_l0)
        {
            // Nothing would ask again.
            self.compaction.l0_failures.set(L0_MERGE_FAILURES_MAX);
            self.note_l0_merge(Some("they overlap with other layers"));
        }
        if actions.is_empty() {
            return Ok(false);
        }
        let chosen = self.compaction.failures.get() as usize % actions.len();
        let Some(action) = actions.into_iter().nth(chosen) else { return Ok(false) };
        self.compaction.flags.hurry(false);
        tracing::debug!(tenant = %self.tenant, timeline = %self.id, ?action, "compaction");
        #[cfg(test)]
        if let Action::MergeL0 { inputs, .. } = &action {
            let chosen = inputs.iter().filter_map(|at| snapshot.plan.get(*at));
            count(4, u64::from(chosen.into_iter().any(|layer| !layer.is_l0())));
        }
        #[cfg(test)]
        let kind = match action {
            Action::MergeL0 { .. } => 0,
            Action::MergeL1 { .. } => 1,
            Action::MakeImages { .. } => 2,
        };
        let began = self.context.io.now();
        let mut merged_bytes = 0;
        match action {
            Action::MergeL0 { inputs, lsns, chain_max } => {
                let merged = self.merge(&snapshot, &inputs, lsns, chain_max).await;
                match &merged {
                    Ok(()) => self.note_l0_merge(None),
                    Err(CompactError::Cancelled | CompactError::Background(_)) => {}
                    Err(error) => self.note_l0_merge(Some(&error.to_string())),
                }
                merged?;
                self.context.counters.merges_l0.add(1);
                merged_bytes = snapshot.l0_wal_bytes(&inputs);
            }
            Action::MergeL1 { inputs, lsns, chain_max } => {
                self.merge(&snapshot, &inputs, lsns, chain_max).await?;
                self.context.counters.merges_l1.add(1);
            }
            Action::MakeImages { keys, lsn, base, deltas } => {
                self.make_images(&snapshot, keys, lsn, (base, &deltas)).await?;
                self.context.counters.image_jobs.add(1);
            }
        }
        let took = self.context.io.now().saturating_sub(began);
        self.compaction.capacity.note(took, merged_bytes);
        #[cfg(test)]
        count(kind, 1);
        self.context.counters.compactions.add(1);
        Ok(true)
    }

    fn job_base(&self) -> JobBase {
        JobBase {
            owner: LayerOwner { shard: self.tenant, timeline: self.id },
            dir: self.context.dir.clone(),
            target_bytes: self.context.config.get().compaction_target_bytes,
            start_lsn: self.start_lsn().max(self.gc_cutoff()),
            redo: (self.context.background_redo)(),
            flags: self.compaction.flags.clone(),
        }
    }

    async fn merge(
        &self,
        snapshot: &Snapshot<I>,
        inputs: &[usize],
        lsns: LsnRange,
        chain_max: usize,
    ) -> Result<(), CompactError> {
        let removed = snapshot.layers(inputs);
        let bars = bars(&snapshot.plan, inputs, &lsns);
        let job = MergeJob {
            base: self.job_base(),
            inputs: snapshot.inputs(inputs),
            others: snapshot.older(lsns.end, inputs),
            lsns,
            cuts: snapshot.cuts(),
            bars,
            chain_max,
        };
        let began = self.context.io.now();
        let made = self.context.background.run(move |io: I| merge::run(io, job)).await??;
        let bytes = made.layers.iter().map(|layer| layer.file_bytes).sum();
        self.context.counters.merged_bytes.add(bytes);
        self.adopt(made, &removed, began).await
    }

    async fn make_images(
        &self,
        snapshot: &Snapshot<I>,
        keys: KeyRange,
        lsn: Lsn,
        (image, deltas): (usize, &[usize]),
    ) -> Result<(), CompactError> {
        #[cfg(test)]
        let deltas = deltas.get(usize::from(planted(Planted::StaleImages))..).unwrap_or_default();
        let Some(image) = snapshot.input(image) else { return Err(CompactError::Changed) };
        let job = ImageJob {
            base: self.job_base(),
            keys,
            lsn,
            image,
            deltas: snapshot.inputs(deltas),
            all: snapshot.older(Lsn(lsn.0.saturating_add(1)), &[]),
        };
        let began = self.context.io.now();
        let made = self.context.background.run(move |io: I| images::run(io, job)).await??;
        let bytes = made.layers.iter().map(|layer| layer.file_bytes).sum();
        self.context.counters.image_bytes.add(bytes);
        self.adopt(made, &[], began).await
    }

    /// Removes files that belong to nothing any more and are not being read. Has the turn, so that
    /// a timeline that is closed and opened again does not find files that are about to go.
    async fn remove_unused(&self) {
        let _turn = self.compaction.turn.acquire().await;
        let unused: Vec<Rc<StoredLayer<I>>> = {
            let mut retired = self.compaction.retired.borrow_mut();
            let (unused, used) = retired.drain(..).partition(|layer| Rc::strong_count(layer) == 1);
            *retired = used;
            unused
        };
        for layer in unused {
            let closed = layer.close().await.map_err(|error| error.to_string());
            let removed = self.context.io.remove(&layer.path()).await;
            let removed = removed.map_err(|error| error.to_string());
            for problem in [closed.err(), removed.err()].into_iter().flatten() {
                // It costs space until the next start, which removes it.
                tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{problem}");
            }
        }
        self.remove_strays().await;
    }

    /// Removes what failed attempts have left, once an index has been written after them.
    async fn remove_strays(&self) {
        if self.compaction.failures.get() > 0 {
            return;
        }
        let strays: Vec<LayerName> = {
            let present: BTreeSet<String> = {
                let mutable = self.mutable.borrow();
                mutable.layers.iter().map(|(_, layer)| layer.name().to_string()).collect()
            };
            let mut strays = self.compaction.strays.borrow_mut();
            strays.drain(..).filter(|name| !present.contains(&name.to_string())).collect()
        };
        for name in strays {
            let path = self.context.dir.join(name.to_string());
            if let Err(error) = self.context.io.remove(&path).await {
                tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{error}");
            }
        }
    }

    /// Waits until no compaction is under way, and closes what waits for removal. The timeline
    /// is stopping.
    pub(super) async fn end_compaction(&self) {
        self.compaction.cancel();
        let _turn = self.compaction.turn.acquire().await;
        let retired = self.compaction.retired.take();
        for layer in retired {
            // The next start removes the file.
            let _ = layer.close().await;
        }
    }
}
