//! Back-pressure of a timeline, carried out; the rules are [`super::plan::pressure`]'s.
//!
//! - WAL is taken from its source at the rate that the rules give: the source sees that by the
//!   positions it is told, which are those of what was really taken in and synced.
//! - A frozen layer becomes an L0 layer only where there is room for one, so that their number is
//!   bounded at all times. What finds no room when the timeline stops stays in the journal.
//! - Where memory would grow without bound, ingest stops within a message.

#[cfg(test)]
use std::cell::Cell;
use std::time::Duration;

use super::health::Part;
use super::plan::pressure::{Load, Merging, limit, may_add_l0, must_stop};
use super::timeline::Timeline;
use crate::io::Io;
use crate::limits::{FROZEN_LAYERS_MAX, INGEST_PAUSE_MS, LSN_DISTANCE_FACTOR};

/// Bugs that tests plant.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    /// Frozen layers become L0 layers whether there is room or not, at whatever rate.
    NoBound,
    /// The rate is not kept to.
    NoDelay,
}

#[cfg(test)]
thread_local! {
    /// See [`Planted`].
    pub(crate) static PLANTED: Cell<Option<Planted>> = const { Cell::new(None) };
    /// The most L0 layers that a timeline of this thread has had.
    pub(crate) static L0_MOST: Cell<usize> = const { Cell::new(0) };
}

#[cfg(test)]
fn planted(bug: Planted) -> bool {
    PLANTED.get() == Some(bug)
}

/// There is no room for another L0 layer, and there will be none: compaction has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "there are {0} L0 layers, and compaction has ended; the layer stays in memory, and its WAL in \
     the journal"
)]
pub(super) struct NoRoom(usize);

impl<I: Io> Timeline<I> {
    /// What waits to be written or merged.
    fn load(&self) -> Load {
        let config = self.context.config.get();
        let layer_bytes = config.checkpoint_distance_bytes;
        let mutable = self.mutable.borrow();
        let milli = |part: u64, whole: u64| {
            let milli = u128::from(part) * 1000 / u128::from(whole.max(1));
            u64::try_from(milli).unwrap_or(u64::MAX).min(1000)
        };
        let wal_bytes = mutable.lsns.last_record.bytes_since(mutable.open.start());
        let by_memory = milli(mutable.open.memory_bytes() as u64, layer_bytes);
        let by_lsn = milli(wal_bytes, layer_bytes.saturating_mul(LSN_DISTANCE_FACTOR));
        Load {
            l0_count: mutable.layers.l0_count(),
            layer_records_milli: self.compaction.layer_records_milli.get(),
            frozen_count: mutable.frozen.len(),
            open_milli: by_memory.max(by_lsn),
            memory_percent: self.memory.used_percent(),
            layer_bytes,
            merging: self.merging(),
            merge_bytes_per_s: self.compaction.capacity.bytes_per_s(),
        }
    }

    /// How compaction gets on with L0 layers.
    pub(super) fn merging(&self) -> Merging {
        let compaction = &self.compaction;
        let threshold = self.context.config.get().compaction_threshold;
        let is_idle = compaction.has_nothing_to_do();
        Merging::of(self.l0_count(), threshold, compaction.is_stuck(), is_idle)
    }

    /// Bytes of WAL per second that may be taken in at the moment; `None`: as many as come.
    pub fn ingest_limit(&self) -> Option<u64> {
        #[cfg(test)]
        if planted(Planted::NoDelay) || planted(Planted::NoBound) {
            return None;
        }
        limit(&self.load())
    }

    /// The open layer may be frozen: another frozen layer may wait.
    pub(super) fn may_freeze(&self) -> bool {
        self.mutable.borrow().frozen.len() < FROZEN_LAYERS_MAX
    }

    /// Waits while nothing may be taken in at all; false if the timeline stops.
    pub(super) async fn wait_for_memory(&self) -> bool {
        if self.may_freeze() && self.memory.is_within_budget() {
            return true;
        }
        let began = self.context.io.now();
        while must_stop(&self.load()) {
            if self.stopping.get() {
                return false;
            }
            self.context.io.sleep(Duration::from_millis(INGEST_PAUSE_MS)).await;
        }
        let waited = self.context.io.now().saturating_sub(began);
        self.context.counters.ingest_stopped_us.add(waited.as_micros() as u64);
        true
    }

    /// Waits until a frozen layer may become an L0 layer.
    pub(super) async fn wait_for_l0_room(&self) -> Result<(), NoRoom> {
        while !self.has_l0_room() {
            let over = self.stopping.get() || self.broken().is_some();
            if over || self.compaction.has_ended() {
                return Err(NoRoom(self.l0_count()));
            }
            self.context.io.sleep(Duration::from_millis(INGEST_PAUSE_MS)).await;
        }
        Ok(())
    }

    /// True if a frozen layer may become an L0 layer now.
    pub(super) fn has_l0_room(&self) -> bool {
        #[cfg(test)]
        if planted(Planted::NoBound) {
            return true;
        }
        may_add_l0(self.l0_count(), self.merging())
    }

    /// Tests look at the most that there ever were.
    #[cfg(test)]
    pub(super) fn note_l0(&self) {
        L0_MOST.set(L0_MOST.get().max(self.l0_count()));
    }

    /// A merge of L0 layers succeeded (`None`), or why it did not.
    pub(super) fn note_l0_merge(&self, failure: Option<&str>) {
        let Some(reason) = failure else {
            self.compaction.l0_failures.set(0);
            self.part_goes_on(Part::Compaction);
            return;
        };
        let failures = &self.compaction.l0_failures;
        failures.set(failures.get().saturating_add(1));
        if self.compaction.is_stuck() {
            let text = format!(
                "L0 layers cannot be merged, so WAL is taken in slowly, and reads become slower \
                 as their number grows: {reason}"
            );
            self.part_waits(Part::Compaction, text);
        }
    }
}

#[cfg(test)]
impl<I: Io> Timeline<I> {
    /// Path of the newest L0 layer.
    pub(crate) fn newest_l0_path(&self) -> Option<std::path::PathBuf> {
        let mutable = self.mutable.borrow();
        mutable.layers.iter().find(|(span, _)| span.is_l0()).map(|(_, layer)| layer.path())
    }

    /// Blocks of layers that were not in the cache when they were asked for.
    pub(crate) fn blocks_read(&self) -> u64 {
        self.context.cache.stats().misses
    }
}
