//! What a benchmark counts, and how it is shown.

use std::fmt;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

/// Texts of what went wrong that are kept.
const TEXTS_MAX: usize = 5;
/// Longest latency that is told apart, in nanoseconds.
const LONGEST_NS: u64 = 600_000_000_000;

/// Counts of one thread, or of all together.
#[derive(Clone, Debug)]
pub struct Tally {
    latencies: Histogram<u64>,
    latency_sum_ns: u64,
    /// Requests that came back with an error.
    pub errors: u64,
    /// Replies that do not belong to their requests, or pages that are none.
    pub wrong: u64,
    /// Pages that consist of zeros.
    pub zero_pages: u64,
    /// Replies that came later than the deadline.
    pub missed: u64,
    /// The first errors and wrong replies, for humans.
    pub texts: Vec<String>,
}

impl Default for Tally {
    fn default() -> Self {
        // The arguments are in range: 3 digits, bounds more than a factor of two apart.
        let latencies = Histogram::new_with_bounds(1, LONGEST_NS, 3);
        let latencies = latencies.unwrap_or_else(|_| unreachable!("the bounds are constants"));
        Tally {
            latencies,
            latency_sum_ns: 0,
            errors: 0,
            wrong: 0,
            zero_pages: 0,
            missed: 0,
            texts: Vec::new(),
        }
    }
}

impl Tally {
    /// A request was answered as it should be, after so long.
    pub fn done(&mut self, latency: Duration) {
        let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.latencies.saturating_record(nanoseconds.max(1));
        self.latency_sum_ns = self.latency_sum_ns.saturating_add(nanoseconds);
    }

    /// Sum of all latencies, in nanoseconds.
    pub fn latency_sum_ns(&self) -> u64 {
        self.latency_sum_ns
    }

    /// Keeps a text, if there is room.
    pub fn say(&mut self, text: impl FnOnce() -> String) {
        if self.texts.len() < TEXTS_MAX {
            self.texts.push(text());
        }
    }

    /// Adds the counts of another thread.
    pub fn add(&mut self, other: &Tally) {
        // Both have the same bounds, so there is room for every value.
        let _ = self.latencies.add(&other.latencies);
        self.latency_sum_ns = self.latency_sum_ns.saturating_add(other.latency_sum_ns);
        self.errors += other.errors;
        self.wrong += other.wrong;
        self.zero_pages += other.zero_pages;
        self.missed += other.missed;
        other.texts.iter().for_each(|text| self.say(|| text.clone()));
    }

    /// Requests that were answered as they should be.
    pub fn answered(&self) -> u64 {
        self.latencies.len()
    }

    /// The summary of a run that took so long.
    pub fn summary(&self, took: Duration) -> Summary {
        let ms = |nanoseconds: f64| nanoseconds / 1e6;
        let at = |quantile| ms(self.latencies.value_at_quantile(quantile) as f64);
        Summary {
            seconds: took.as_secs_f64(),
            pages: self.answered(),
            pages_per_second: self.answered() as f64 / took.as_secs_f64().max(1e-9),
            latency_mean_ms: ms(self.latencies.mean()),
            latency_p50_ms: at(0.5),
            latency_p95_ms: at(0.95),
            latency_p99_ms: at(0.99),
            latency_p999_ms: at(0.999),
            latency_max_ms: ms(self.latencies.max() as f64),
            zero_pages: self.zero_pages,
            missed_deadlines: self.missed,
            errors: self.errors,
            wrong_replies: self.wrong,
        }
    }
}

/// Figures of a run.
#[allow(missing_docs, reason = "the names say it")]
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub seconds: f64,
    pub pages: u64,
    pub pages_per_second: f64,
    pub latency_mean_ms: f64,
    pub latency_p50_ms: f64,
    pub latency_p95_ms: f64,
    pub latency_p99_ms: f64,
    pub latency_p999_ms: f64,
    pub latency_max_ms: f64,
    pub zero_pages: u64,
    pub missed_deadlines: u64,
    pub errors: u64,
    pub wrong_replies: u64,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "duration: {:.1} s", self.seconds)?;
        writeln!(f, "number of pages: {} ({} of zeros)", self.pages, self.zero_pages)?;
        for (name, value) in [
            ("average", self.latency_mean_ms),
            ("p50", self.latency_p50_ms),
            ("p95", self.latency_p95_ms),
            ("p99", self.latency_p99_ms),
            ("p99.9", self.latency_p999_ms),
            ("max", self.latency_max_ms),
        ] {
            writeln!(f, "latency {name} = {value:.3} ms")?;
        }
        writeln!(f, "missed deadlines: {}", self.missed_deadlines)?;
        writeln!(f, "errors: {}, wrong replies: {}", self.errors, self.wrong_replies)?;
        write!(f, "pages/s = {:.1}", self.pages_per_second)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_of_the_counts() {
        let (mut all, mut other) = (Tally::default(), Tally::default());
        (1..=500u64).for_each(|ms| all.done(Duration::from_millis(ms)));
        (501..=1000u64).for_each(|ms| other.done(Duration::from_millis(ms)));
        other.errors = 2;
        (0..9).for_each(|nth| other.say(|| format!("text {nth}")));
        all.add(&other);
        let summary = all.summary(Duration::from_secs(10));
        assert_eq!((summary.pages, summary.errors, all.texts.len()), (1000, 2, TEXTS_MAX));
        assert!((summary.pages_per_second - 100.0).abs() < 1e-6);
        for (found, expected) in [
            (summary.latency_mean_ms, 500.5),
            (summary.latency_p50_ms, 500.0),
            (summary.latency_p95_ms, 950.0),
            (summary.latency_p99_ms, 990.0),
            (summary.latency_p999_ms, 999.0),
            (summary.latency_max_ms, 1000.0),
        ] {
            assert!((found / expected - 1.0).abs() < 0.002, "{found} for {expected}");
        }
        let text = summary.to_string();
        assert!(text.contains("latency p99 = ") && text.ends_with("pages/s = 100.0"), "{text}");
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["pages"], 1000);
    }
}
