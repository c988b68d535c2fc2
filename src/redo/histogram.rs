//! Counts, also by size: how long redo takes, of how many records and bytes it is.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Classes of a histogram: class `n` is that of numbers up to 2^n. The last has no bound.
pub const CLASSES: usize = 36;

/// A number that one executor counts up, for others to read. Without the cost of an addition that
/// several may do at once: of two that did, one would be lost.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Nothing yet.
    pub const fn new() -> Self {
        Count(AtomicU64::new(0))
    }

    /// The number.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// For the executor that it belongs to.
    pub fn add(&self, amount: u64) {
        self.0.store(self.get().saturating_add(amount), Ordering::Relaxed);
    }

    /// For numbers that several threads count up.
    pub fn add_shared(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }
}

/// Numbers by class.
#[derive(Debug)]
pub struct Histogram {
    counts: [Count; CLASSES],
    sum: Count,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: [const { Count::new() }; CLASSES], sum: Count::new() }
    }
}

impl Histogram {
    /// Counts a number; for the executor that it belongs to.
    pub fn count(&self, number: u64) {
        if let Some(count) = self.class(number) {
            count.add(1);
        }
        self.sum.add(number);
    }

    /// Counts a number, where several threads do.
    pub fn count_shared(&self, number: u64) {
        if let Some(count) = self.class(number) {
            count.add_shared(1);
        }
        self.sum.add_shared(number);
    }

    fn class(&self, number: u64) -> Option<&Count> {
        // Of 0 and 1 it is class 0, of 2 class 1, of 3 and 4 class 2.
        let class = (u64::BITS - number.saturating_sub(1).leading_zeros()) as usize;
        self.counts.get(class.min(CLASSES - 1))
    }

    /// Adds it to others.
    pub fn add_to(&self, counts: &mut HistogramCounts) {
        counts.counts.resize(CLASSES, 0);
        for (sum, count) in counts.counts.iter_mut().zip(&self.counts) {
            *sum += count.get();
        }
        counts.sum += self.sum.get();
    }
}

/// What histograms had counted, for `/metrics`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistogramCounts {
    /// By class; empty if there is nothing.
    pub counts: Vec<u64>,
    /// Of all numbers.
    pub sum: u64,
}

impl HistogramCounts {
    /// Largest number of each class but the last, which has none, and the count of the class.
    pub fn classes(&self) -> impl Iterator<Item = (Option<u64>, u64)> + '_ {
        (0..CLASSES).map(|class| {
            let bound = (class + 1 < CLASSES).then(|| 1 << class);
            (bound, self.counts.get(class).copied().unwrap_or_default())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_within_the_bound_of_its_class_and_above_the_one_before() {
        let numbers = [0, 1, 2, 3, 4, 5, 8, 9, 1023, 1024, 1025, u64::from(u32::MAX), 1 << 34];
        for number in numbers.into_iter().chain([(1 << 34) + 1, u64::MAX]) {
            let histogram = Histogram::default();
            if number % 2 == 0 {
                histogram.count(number)
            } else {
                histogram.count_shared(number)
            };
            let mut counts = HistogramCounts::default();
            histogram.add_to(&mut counts);
            let mut before = None;
            let mut seen = 0;
            for (bound, count) in counts.classes() {
                if count > 0 {
                    seen += count;
                    assert!(bound.is_none_or(|bound| number <= bound), "{number} {bound:?}");
                    assert!(before.is_none_or(|before| number > before), "{number} {before:?}");
                }
                before = bound;
            }
            assert_eq!((seen, counts.sum), (1, number));
        }
    }
}
