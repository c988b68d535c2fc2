//! Counters of one core. Plain cells: only the core's own executor touches them.

use std::cell::Cell;

/// A number that grows.
#[derive(Default)]
pub struct Counter(Cell<u64>);

impl Counter {
    /// Adds to it.
    pub fn add(&self, amount: u64) {
        self.0.set(self.0.get().wrapping_add(amount));
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

/// What a core counts.
#[derive(Default)]
#[allow(missing_docs, reason = "the names say it; see `control::CoreMetrics`")]
pub struct Counters {
    pub wal_bytes: Counter,
    pub wal_records: Counter,
    pub values: Counter,
    pub changes_skipped: Counter,
    pub journal_syncs: Counter,
    pub journal_bytes: Counter,
    pub layer_bytes: Counter,
    pub checkpoints: Counter,
    pub compactions: Counter,
    pub compaction_failures: Counter,
    pub merged_bytes: Counter,
    pub image_bytes: Counter,
    pub compaction_pages: Counter,
    pub compaction_page_failures: Counter,
    pub merges_l0: Counter,
    pub merges_l1: Counter,
    pub image_jobs: Counter,
    pub gc_runs: Counter,
    pub gc_failures: Counter,
    pub gc_layers_removed: Counter,
    pub gc_bytes_removed: Counter,
    pub timelines_closed: Counter,
    pub ingest_slowed_us: Counter,
    pub ingest_stopped_us: Counter,
}
