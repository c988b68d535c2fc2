//! When what was committed: from LSNs to times and back.
//!
//! Commit and abort records carry a time. Of each, `max` is the latest time at or before its LSN:
//! a clock may go back, and what was committed before an LSN must never look younger for it. The
//! map keeps samples `(LSN, max)`; a sample stands for its *bucket*, the records after the sample
//! before it, up to and including its own LSN. A bucket grows, and its sample moves with it, until
//! `max` has moved on by [`COMMIT_TIMES_WIDTH_US`].
//!
//! **Exactness.** Answers are rounded down. For a time `t`, the answer is the LSN of the last
//! sample with `max <= t`: nothing before that LSN was committed later than `t`, whatever was
//! merged. The exact answer, the last LSN of which that can be said, lies in the next bucket, so
//! the answer is short by less than one bucket: one second of commit time, or 1/14,000 of its age,
//! whichever is more (a checkpoint ends a bucket early). While the primary's clock is behind a
//! time that it showed before, `max` stands still: an earlier time is answered with an LSN before
//! the clock first showed it.
//!
//! **Bounds.** At [`COMMIT_TIMES_MAX`] samples the map is thinned: old buckets are merged until
//! none is narrower than a share of its age. Merging drops the earlier sample, which keeps the rule
//! above. Garbage collection trims what lies before the cut-off.
//!
//! **Branches.** A branch begins with one sample, at its branch point ([`CommitTimes::of_branch`]),
//! so its answers agree with its ancestor's, which is asked for what was before. That sample's time
//! is the one that is rounded up, within its bucket: until a later commit, it may show.
//!
//! **Durability.** A checkpoint up to `l` closes the bucket at `l` and writes the samples up to `l`
//! to a file before the index; after a crash, samples past the index's `disk_consistent_lsn` are
//! dropped, and replaying the journal brings them again.
//!
//! Body of the file, little-endian, inside the container of `io::durable`:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | version, 1 |
//! | 4 | 4 | number of samples |
//! | 8 + 16 i | 8 | LSN of sample i; they ascend |
//! | 16 + 16 i | 8 | its time, microseconds since 1970-01-01 UTC, signed; they do not descend |

use crate::base::{Kind, Lsn, Timestamp};
use crate::limits::{COMMIT_TIMES_MAX, COMMIT_TIMES_SHARE_OF_AGE, COMMIT_TIMES_WIDTH_US};

/// File name within the timeline's directory.
pub const COMMIT_TIMES_FILE: &str = "commit_times";

const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8;
const SAMPLE_BYTES: usize = 16;

/// Nothing at or before `lsn` was committed after `max`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    lsn: Lsn,
    max: i64,
}

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitTimes {
    /// By ascending LSN; times do not descend.
    samples: Vec<Sample>,
    /// `max` of the first record in the last bucket; `None` when that bucket is closed.
    open_since: Option<i64>,
}

/// What is known of a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtTime {
    /// The last known LSN with nothing committed after the time; later commits are known.
    Present(Lsn),
    /// The same, but nothing later is known.
    Future(Lsn),
    /// Everything known was committed later.
    Past,
    /// Nothing is known.
    NoData,
}

/// Why the file of commit times cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the file of commit times is no such file: {problem}")]
pub struct CommitTimesError {
    problem: &'static str,
}

impl CommitTimesError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

impl CommitTimes {
    /// A transaction ended at `time`, with a record whose LSN is `lsn`. LSNs ascend; one that
    /// does not is left out.
    pub fn note(&mut self, lsn: Lsn, time: Timestamp) {
        let last = self.samples.last_mut();
        if last.as_ref().is_some_and(|last| last.lsn >= lsn) {
            return;
        }
        let max = last.as_ref().map_or(time.0, |last| last.max.max(time.0));
        match (last, self.open_since) {
            (Some(last), Some(since)) if max < since.saturating_add(COMMIT_TIMES_WIDTH_US) => {
                *last = Sample { lsn, max };
            }
            _ => {
                self.samples.push(Sample { lsn, max });
                self.open_since = Some(max);
                if self.samples.len() >= COMMIT_TIMES_MAX {
                    self.thin();
                }
            }
        }
    }

    /// Ends the newest bucket: samples so far stay where they are.
    pub fn close_bucket(&mut self) {
        self.open_since = None;
    }

    /// Merges old buckets until a quarter of the room is free.
    fn thin(&mut self) {
        let mut share = COMMIT_TIMES_SHARE_OF_AGE;
        while self.samples.len() > COMMIT_TIMES_MAX / 4 * 3 {
            self.merge(share);
            share /= 2;
        }
    }

    /// Drops samples where the bucket that takes in theirs stays narrow enough: no wider than
    /// `1/share` of its age, or of any width when `share` is 0. First and last stay.
    fn merge(&mut self, share: i64) {
        let (Some(newest), Some(oldest)) = (self.samples.last(), self.samples.first()) else {
            return;
        };
        let (now, oldest) = (newest.max, *oldest);
        let mut kept = vec![*newest];
        for pair in self.samples.windows(2).rev().skip(1) {
            let [before, this] = pair else { continue };
            let next = kept.last().map_or(*this, |sample| *sample);
            let age = now.saturating_sub(next.max);
            let width = age.checked_div(share).map_or(i64::MAX, |w| w.max(COMMIT_TIMES_WIDTH_US));
            if next.max.saturating_sub(before.max) > width {
                kept.push(*this);
            }
        }
        if self.samples.len() > 1 {
            kept.push(oldest);
        }
        kept.reverse();
        self.samples = kept;
    }

    /// Forgets what is older than `lsn`, but for the last sample at or before it.
    pub fn trim(&mut self, lsn: Lsn) {
        let after = self.samples.partition_point(|sample| sample.lsn <= lsn);
        self.samples.drain(..after.saturating_sub(1));
    }

    /// Forgets what is newer than `lsn`.
    pub fn truncate(&mut self, lsn: Lsn) {
        self.samples.truncate(self.samples.partition_point(|sample| sample.lsn <= lsn));
        self.close_bucket();
    }

    /// The last known LSN with nothing committed after `time`.
    pub fn at_time(&self, time: Timestamp) -> AtTime {
        let after = self.samples.partition_point(|sample| sample.max <= time.0);
        match after.checked_sub(1).and_then(|place| self.samples.get(place)) {
            None if self.samples.is_empty() => AtTime::NoData,
            None => AtTime::Past,
            Some(sample) if after == self.samples.len() => AtTime::Future(sample.lsn),
            Some(sample) => AtTime::Present(sample.lsn),
        }
    }

    /// When the last known commit at or before `lsn` was, and up to where that was so at least;
    /// `None` when none is known.
    pub fn of_lsn(&self, lsn: Lsn) -> Option<(Lsn, Timestamp)> {
        let after = self.samples.partition_point(|sample| sample.lsn <= lsn);
        let sample = self.samples.get(after.checked_sub(1)?)?;
        Some((sample.lsn, Timestamp(sample.max)))
    }

    /// What a branch at `lsn` knows from its beginning: a time after which nothing at or before
    /// `lsn` was committed, that of the bucket in which `lsn` is. `None` when no time is known.
    pub fn of_branch(&self, lsn: Lsn) -> Option<CommitTimes> {
        let place = self.samples.partition_point(|sample| sample.lsn < lsn);
        let max = self.samples.get(place).or(self.samples.last())?.max;
        Some(CommitTimes { samples: vec![Sample { lsn, max }], open_since: None })
    }

    /// The latest commit time known.
    pub fn newest(&self) -> Option<Timestamp> {
        self.samples.last().map(|sample| Timestamp(sample.max))
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// True when nothing is known.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// What [`CommitTimes::encode`] would write, in short: two equal marks, one content. Samples
    /// before a closed bucket never change, so their number and the ends tell.
    pub fn mark(&self, through: Lsn) -> (usize, Lsn, Lsn) {
        let count = self.samples.partition_point(|sample| sample.lsn <= through);
        let lsn_at = |place: Option<usize>| {
            place.and_then(|place| self.samples.get(place)).map_or(Lsn::INVALID, |s| s.lsn)
        };
        (count, lsn_at(Some(0)), lsn_at(count.checked_sub(1)))
    }

    /// The written form of the samples up to `through`.
    pub fn encode(&self, through: Lsn) -> Vec<u8> {
        let count = self.samples.partition_point(|sample| sample.lsn <= through);
        let mut out = Vec::with_capacity(HEADER_BYTES + count * SAMPLE_BYTES);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(count as u32).to_le_bytes());
        for sample in self.samples.iter().take(count) {
            out.extend_from_slice(&sample.lsn.0.to_le_bytes());
            out.extend_from_slice(&sample.max.to_le_bytes());
        }
        out
    }

    /// Reads the written form. The newest bucket is closed.
    ///
    /// # Errors
    /// Not the written form of anything.
    pub fn decode(bytes: &[u8]) -> Result<CommitTimes, CommitTimesError> {
        let fail = |problem| Err(CommitTimesError { problem });
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return fail("it is shorter than its header");
        };
        let [version, count] = [&header[..4], &header[4..]]
            .map(|part| part.iter().rev().fold(0u32, |n, byte| n << 8 | u32::from(*byte)));
        if version != VERSION {
            return fail("it was written by another version of the program");
        }
        let (chunks, tail) = rest.as_chunks::<SAMPLE_BYTES>();
        if !tail.is_empty() || chunks.len() != count as usize || chunks.len() > COMMIT_TIMES_MAX {
            return fail("its length does not agree with its number of samples");
        }
        let number =
            |part: &[u8]| part.iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let sample = |chunk: &[u8; SAMPLE_BYTES]| {
            let (lsn, max) = chunk.split_at(8);
            Sample { lsn: Lsn(number(lsn)), max: number(max).cast_signed() }
        };
        let samples: Vec<Sample> = chunks.iter().map(sample).collect();
        if samples.is_sorted_by(|a, b| a.lsn < b.lsn && a.max <= b.max) {
            Ok(CommitTimes { samples, open_since: None })
        } else {
            fail("its samples are out of order")
        }
    }
}

#[cfg(test)]
mod tests;
