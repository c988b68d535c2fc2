//! Which page is asked for next. Pure.
//!
//! Zipf's law by rejection-inversion (W. Hörmann, G. Derflinger, "Rejection-inversion to generate
//! variates from monotone discrete distributions", 1996): no table, whatever the number of pages.

use fastrand::Rng;

/// How pages are drawn.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    /// Each page as often as any other.
    Uniform,
    /// Few pages often, by Zipf's law with exponent 0.99; which ones is spread over all.
    Zipf,
    /// One after the other; each client begins somewhere else.
    Sequential,
}

/// Exponent of Zipf's law: that of the usual key-value benchmarks.
const EXPONENT: f64 = 0.99;

/// Draws numbers of pages.
#[derive(Clone, Debug)]
pub struct Keys {
    kind: Distribution,
    count: u64,
    next: u64,
    zipf: Zipf,
}

impl Keys {
    /// Draws from `0..count`; `count` is not 0. Client `nth` of `clients` begins at its share of
    /// a sequence.
    pub fn new(kind: Distribution, count: u64, nth: u64, clients: u64) -> Keys {
        let start = u128::from(count) * u128::from(nth) / u128::from(clients.max(1));
        let next = u64::try_from(start).unwrap_or(0);
        Keys { kind, count: count.max(1), next, zipf: Zipf::new(count.max(1)) }
    }

    /// The next page.
    pub fn draw(&mut self, rng: &mut Rng) -> u64 {
        match self.kind {
            Distribution::Uniform => rng.u64(..self.count),
            Distribution::Zipf => spread(self.zipf.draw(rng) - 1) % self.count,
            Distribution::Sequential => {
                let now = self.next % self.count;
                self.next = now + 1;
                now
            }
        }
    }
}

/// Spreads neighbours far apart (the finaliser of MurmurHash3).
fn spread(number: u64) -> u64 {
    let mut hash = number;
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    hash ^ (hash >> 33)
}

/// Ranks `1..=count`; rank `k` is drawn in proportion to `k^-EXPONENT`.
#[derive(Clone, Copy, Debug)]
struct Zipf {
    count: u64,
    low: f64,
    high: f64,
    skip: f64,
}

impl Zipf {
    fn new(count: u64) -> Zipf {
        Zipf {
            count,
            low: integral(1.5) - 1.0,
            high: integral(count as f64 + 0.5),
            skip: 2.0 - inverse(integral(2.5) - weight(2.0)),
        }
    }

    fn draw(&self, rng: &mut Rng) -> u64 {
        loop {
            let area = self.high + rng.f64() * (self.low - self.high);
            let x = inverse(area);
            let rank = x.round().clamp(1.0, self.count as f64);
            if rank - x <= self.skip || area >= integral(rank + 0.5) - weight(rank) {
                return rank as u64;
            }
        }
    }
}

fn weight(x: f64) -> f64 {
    (-EXPONENT * x.ln()).exp()
}

/// The integral of [`weight`] from 1.
fn integral(x: f64) -> f64 {
    let log = x.ln();
    let y = (1.0 - EXPONENT) * log;
    let factor = if y.abs() > 1e-8 { y.exp_m1() / y } else { 1.0 + y / 2.0 };
    factor * log
}

fn inverse(area: f64) -> f64 {
    let y = (area * (1.0 - EXPONENT)).max(-1.0);
    let factor = if y.abs() > 1e-8 { y.ln_1p() / y } else { 1.0 - y / 2.0 };
    (factor * area).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(kind: Distribution, pages: u64, draws: u64) -> Vec<u64> {
        let mut rng = Rng::with_seed(7);
        let mut keys = Keys::new(kind, pages, 0, 1);
        let mut counts = vec![0; pages as usize];
        (0..draws).for_each(|_| counts[keys.draw(&mut rng) as usize] += 1);
        counts
    }

    #[test]
    fn uniform_draws_are_even() {
        let counts = counts(Distribution::Uniform, 100, 100_000);
        assert!(counts.iter().all(|count| (800..1200).contains(count)), "{counts:?}");
    }

    #[test]
    fn ranks_follow_the_law() {
        let mut rng = Rng::with_seed(3);
        let zipf = Zipf::new(1000);
        let mut counts = vec![0u64; 1001];
        (0..400_000).for_each(|_| counts[zipf.draw(&mut rng) as usize] += 1);
        assert_eq!(counts[0], 0);
        let sum: f64 = (1..=1000).map(|k| weight(f64::from(k))).sum();
        for rank in [1u32, 2, 5, 10, 100] {
            let expected = 400_000.0 * weight(f64::from(rank)) / sum;
            let found = counts[rank as usize] as f64;
            let error = 5.0 * expected.sqrt();
            assert!((found - expected).abs() < error, "{rank}: {found} for {expected}");
        }
    }

    #[test]
    fn popular_pages_are_spread() {
        let counts = counts(Distribution::Zipf, 10_000, 200_000);
        let (most, _) = counts.iter().enumerate().max_by_key(|(_, count)| **count).unwrap();
        let second = counts.iter().enumerate().filter(|(page, _)| *page != most);
        let (second, _) = second.max_by_key(|(_, count)| **count).unwrap();
        assert!(most.abs_diff(second) > 10, "{most} {second}");
        assert!(counts[most] > 10_000);
    }

    #[test]
    fn sequences_wrap_and_begin_apart() {
        let mut rng = Rng::with_seed(1);
        let mut keys = Keys::new(Distribution::Sequential, 10, 1, 2);
        let drawn: Vec<u64> = (0..7).map(|_| keys.draw(&mut rng)).collect();
        assert_eq!(drawn, [5, 6, 7, 8, 9, 0, 1]);
        for kind in [Distribution::Uniform, Distribution::Zipf, Distribution::Sequential] {
            assert_eq!(Keys::new(kind, 1, 0, 1).draw(&mut rng), 0);
        }
    }
}
