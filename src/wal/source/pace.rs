//! When to try again, and when a silent peer counts as dead. Pure: time and randomness are
//! handed in.

use std::time::Duration;

use crate::io::Instant;
use crate::limits::{SOURCE_ASK_AFTER, SOURCE_BACKOFF_MAX, SOURCE_BACKOFF_MIN, SOURCE_SILENCE_MAX};

/// Waits between attempts to connect: they double from [`SOURCE_BACKOFF_MIN`] up to
/// [`SOURCE_BACKOFF_MAX`], each cut at random to between half and the whole of it, so that
/// timelines that lost the same primary do not come back in step.
#[derive(Debug, Clone, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// Counts a failed attempt; returns how long to wait before the next one. `random` is a
    /// fresh random number.
    pub fn failed(&mut self, random: u64) -> Duration {
        let doubled = SOURCE_BACKOFF_MIN.saturating_mul(1 << self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        let whole = doubled.min(SOURCE_BACKOFF_MAX);
        let half_us = (whole / 2).as_micros() as u64;
        Duration::from_micros(half_us + random % (half_us + 1))
    }

    /// Counts a success (data came in): the next failure waits the shortest time again.
    pub fn succeeded(&mut self) {
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

/// What to do about a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Liveness {
    /// It was heard of lately.
    Fine,
    /// Send a status that asks for a reply.
    Ask,
    /// Give the connection up.
    Dead,
}

/// Watches for silence, as PostgreSQL's `wal_receiver_timeout` does: an idle primary says nothing
/// as long as we report our position, so after [`SOURCE_ASK_AFTER`] it is asked, and after
/// [`SOURCE_SILENCE_MAX`] the connection counts as dead.
#[derive(Debug, Clone)]
pub struct SilenceWatch {
    heard: Instant,
}

impl SilenceWatch {
    /// Starts at `now`.
    pub fn new(now: Instant) -> Self {
        SilenceWatch { heard: now }
    }

    /// Something came from the peer.
    pub fn heard(&mut self, now: Instant) {
        self.heard = now;
    }

    /// Judges the silence up to `now`.
    pub fn check(&self, now: Instant) -> Liveness {
        let silence = now.saturating_sub(self.heard);
        if silence >= SOURCE_SILENCE_MAX {
            Liveness::Dead
        } else if silence >= SOURCE_ASK_AFTER {
            Liveness::Ask
        } else {
            Liveness::Fine
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_between_their_bounds() {
        let mut backoff = Backoff::default();
        let mut whole = SOURCE_BACKOFF_MIN;
        for _ in 0..100 {
            let mut low = backoff.clone();
            assert_eq!(low.failed(0), whole / 2);
            let wait = backoff.failed(u64::MAX);
            assert!(wait >= whole / 2 && wait <= whole, "{wait:?} of {whole:?}");
            whole = (whole * 2).min(SOURCE_BACKOFF_MAX);
        }
        assert_eq!(backoff.failures(), 100);
        backoff.succeeded();
        assert!(backoff.failed(7) <= SOURCE_BACKOFF_MIN);
    }

    #[test]
    fn silence_is_asked_about_before_it_is_death() {
        let start = Duration::from_secs(1000);
        let mut watch = SilenceWatch::new(start);
        assert_eq!(watch.check(start), Liveness::Fine);
        assert_eq!(watch.check(start + SOURCE_ASK_AFTER), Liveness::Ask);
        assert_eq!(watch.check(start + SOURCE_SILENCE_MAX), Liveness::Dead);
        watch.heard(start + SOURCE_SILENCE_MAX);
        assert_eq!(watch.check(start + SOURCE_SILENCE_MAX), Liveness::Fine);
    }
}
