//! Counters of one core. Plain cells: only the core's own executor touches them.

use std::cell::Cell;

use super::control::Distribution;
use crate::limits::{READ_LAYERS_COUNTED, READ_RECORDS_COUNTED};

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

/// The largest of some numbers.
#[derive(Default)]
pub struct Maximum(Cell<u64>);

impl Maximum {
    /// Takes one more.
    pub fn note(&self, value: u64) {
        self.0.set(self.0.get().max(value));
    }

    /// Its value; 0 without any.
    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

/// How often each small number came: one place for each from 0 to `N - 2`, the last for all above.
pub struct SmallNumbers<const N: usize> {
    counts: [Cell<u64>; N],
    sum: Counter,
    max: Maximum,
}

impl<const N: usize> Default for SmallNumbers<N> {
    fn default() -> Self {
        let counts = std::array::from_fn(|_| Cell::new(0));
        SmallNumbers { counts, sum: Counter::default(), max: Maximum::default() }
    }
}

impl<const N: usize> SmallNumbers<N> {
    /// Takes one more.
    pub fn note(&self, value: u64) {
        let place = usize::try_from(value).unwrap_or(N).min(N.saturating_sub(1));
        if let Some(count) = self.counts.get(place) {
            count.set(count.get().wrapping_add(1));
        }
        self.sum.add(value);
        self.max.note(value);
    }

    /// What came so far.
    pub fn get(&self) -> Distribution {
        let counts = self.counts.iter().map(Cell::get).collect();
        Distribution { counts, sum: self.sum.get(), max: self.max.get() }
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
    pub page_cache_hits: Counter,
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
    pub index_bytes: Counter,
    pub l0_layers: Maximum,
    pub read_layers: SmallNumbers<READ_LAYERS_COUNTED>,
    pub read_records: SmallNumbers<READ_RECORDS_COUNTED>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_are_counted_one_by_one_and_large_ones_together() {
        let numbers = SmallNumbers::<4>::default();
        assert_eq!(numbers.get().percentile(99), 0);
        [0, 1, 1, 2, 3, 70].into_iter().for_each(|number| numbers.note(number));
        let found = numbers.get();
        assert_eq!((found.counts.clone(), found.sum, found.max), (vec![1, 2, 1, 2], 77, 70));
        assert_eq!((found.count(), found.percentile(50), found.percentile(99)), (6, 1, 70));
        let later = numbers.get();
        numbers.note(2);
        assert_eq!(numbers.get().since(&later).counts, [0, 0, 1, 0]);
    }
}
