//! Counts by size: how long redo takes, of how many records and bytes it is.

use std::cell::Cell;

use serde::{Deserialize, Serialize};

/// Classes of a histogram: class `n` is that of numbers up to 2^n. The last has no bound.
pub const CLASSES: usize = 36;

/// Numbers of one executor, by class.
#[derive(Debug)]
pub struct Histogram {
    counts: [Cell<u64>; CLASSES],
    sum: Cell<u64>,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { counts: [const { Cell::new(0) }; CLASSES], sum: Cell::new(0) }
    }
}

impl Histogram {
    /// Counts a number.
    pub fn count(&self, number: u64) {
        // Of 0 and 1 it is class 0, of 2 class 1, of 3 and 4 class 2.
        let class = (u64::BITS - number.saturating_sub(1).leading_zeros()) as usize;
        if let Some(count) = self.counts.get(class.min(CLASSES - 1)) {
            count.set(count.get().saturating_add(1));
        }
        self.sum.set(self.sum.get().saturating_add(number));
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
            histogram.count(number);
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
