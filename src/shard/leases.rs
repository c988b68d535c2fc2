//! Leases: promises to keep what is needed to read at an LSN until a given time.
//!
//! A lease holds one LSN of a timeline. While it lasts, garbage collection keeps every layer that
//! a read at that LSN looks at, and such reads are answered though the cut-off has passed them.
//! Leases are durable before they are granted: they survive restarts and crashes. Several holders
//! of one LSN share a lease, so a renewal never shortens it.
//!
//! **Below the cut-off** a lease can only be renewed while it lasts: what an expired one held may
//! be gone. So at any moment, the LSN of a lease that lasts was either at or above the cut-off, or
//! a read point of every collection that has passed it; this is what makes reads at it safe. The
//! wall clock may go back and make an expired lease look alive, therefore a collection first drops
//! expired leases, durably.
//!
//! Body of the file, little-endian, inside the container of `io::durable`:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | version, 1 |
//! | 4 | 4 | number of leases |
//! | 8 + 16 i | 8 | LSN of lease i; they ascend |
//! | 16 + 16 i | 8 | when it ends, microseconds since 1970-01-01 UTC, signed |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::timeline::Timeline;
use crate::base::{Kind, Lsn, TimelineId, Timestamp};
use crate::io::{Io, IoError, durable};
use crate::limits::{LEASE_S_DEFAULT, LEASE_S_MAX, LEASES_MAX};

/// File name within the timeline's directory.
pub const LEASES_FILE: &str = "leases";

const VERSION: u32 = 1;
const HEADER_BYTES: usize = 8;
const LEASE_BYTES: usize = 16;

/// A lease as it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// What can be read.
    pub lsn: Lsn,
    /// Until when.
    pub valid_until: Timestamp,
}

/// Why a lease is not granted, or leases cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The history at the LSN is going, or gone.
    #[error(
        "no lease on {lsn}: garbage collection has passed it (gc cutoff {cutoff}), and no lease on \
         it lasts; take one at {cutoff} or later"
    )]
    BelowCutoff {
        /// The LSN asked for.
        lsn: Lsn,
        /// The lowest LSN of which all history is kept.
        cutoff: Lsn,
    },
    /// Before the first readable LSN.
    #[error("no lease on {lsn}: history of this timeline begins at {start}")]
    BelowStart {
        /// The LSN asked for.
        lsn: Lsn,
        /// The first readable LSN.
        start: Lsn,
    },
    /// Before the branch point: that history is the ancestor's.
    #[error("no lease on {lsn}: that history is of timeline {timeline}; take the lease there")]
    OfAncestor {
        /// The LSN asked for.
        lsn: Lsn,
        /// The ancestor.
        timeline: TimelineId,
    },
    /// That far the WAL has not come.
    #[error("no lease on {lsn}: the timeline is at {last_record_lsn}; ask again when it is there")]
    NotThereYet {
        /// The LSN asked for.
        lsn: Lsn,
        /// How far ingest is.
        last_record_lsn: Lsn,
    },
    /// Too many leases.
    #[error("no lease on {lsn}: {LEASES_MAX} leases last on this timeline; wait for one to end")]
    TooMany {
        /// The LSN asked for.
        lsn: Lsn,
    },
    /// Longer than leases are given.
    #[error("a lease lasts from 1 to {LEASE_S_MAX} s, not {seconds} s; renew it before it ends")]
    Length {
        /// The length asked for.
        seconds: u64,
    },
    /// Not the written form of leases.
    #[error("the file of leases is no such file: {problem}")]
    Malformed {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The file of leases cannot be read.
    #[error(
        "the leases of this timeline cannot be read, so none is granted and nothing is collected: \
         {problem}; restore the file, or remove it while the node is stopped to give them up"
    )]
    Unreadable {
        /// Why.
        problem: String,
    },
    /// The lease could not be made durable.
    #[error("no lease: it cannot be written: {0}")]
    Io(#[from] IoError),
    /// The timeline is going away.
    #[error("shutting down")]
    Shutdown,
}

impl LeaseError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            LeaseError::BelowCutoff { .. }
            | LeaseError::BelowStart { .. }
            | LeaseError::OfAncestor { .. }
            | LeaseError::Length { .. } => Kind::Invalid,
            LeaseError::NotThereYet { .. } | LeaseError::TooMany { .. } => Kind::Retry,
            LeaseError::Malformed { .. } | LeaseError::Unreadable { .. } => Kind::Corrupt,
            LeaseError::Io(error) => error.kind(),
            LeaseError::Shutdown => Kind::Shutdown,
        }
    }
}

/// The leases of a timeline, those that ended included until they are purged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leases {
    ends: BTreeMap<Lsn, Timestamp>,
}

impl Leases {
    /// True when a lease on exactly this LSN lasts.
    pub fn covers(&self, lsn: Lsn, now: Timestamp) -> bool {
        self.ends.get(&lsn).is_some_and(|end| *end > now)
    }

    /// Leases that last.
    pub fn active(&self, now: Timestamp) -> impl Iterator<Item = Lease> {
        let lasting = self.ends.iter().filter(move |(_, end)| **end > now);
        lasting.map(|(&lsn, &valid_until)| Lease { lsn, valid_until })
    }

    /// Enters or prolongs a lease. `cutoff` is the lowest LSN of which no collection that is under
    /// way or done has taken anything. Returns when the lease ends.
    ///
    /// # Errors
    /// [`LeaseError::BelowCutoff`], [`LeaseError::TooMany`].
    pub fn grant(
        &mut self,
        lease: Lease,
        now: Timestamp,
        cutoff: Lsn,
    ) -> Result<Timestamp, LeaseError> {
        let lsn = lease.lsn;
        if lsn < cutoff && !self.covers(lsn, now) {
            return Err(LeaseError::BelowCutoff { lsn, cutoff });
        }
        if !self.ends.contains_key(&lsn) && self.ends.len() >= LEASES_MAX {
            self.purge(now);
            if self.ends.len() >= LEASES_MAX {
                return Err(LeaseError::TooMany { lsn });
            }
        }
        let end = self.ends.entry(lsn).or_insert(lease.valid_until);
        *end = lease.valid_until.max(*end);
        Ok(*end)
    }

    /// Forgets leases that ended; true when there were any.
    pub fn purge(&mut self, now: Timestamp) -> bool {
        let before = self.ends.len();
        self.ends.retain(|_, end| *end > now);
        self.ends.len() < before
    }

    /// The written form.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES + self.ends.len() * LEASE_BYTES);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(self.ends.len() as u32).to_le_bytes());
        for (lsn, end) in &self.ends {
            out.extend_from_slice(&lsn.0.to_le_bytes());
            out.extend_from_slice(&end.0.to_le_bytes());
        }
        out
    }

    /// Reads the written form.
    ///
    /// # Errors
    /// [`LeaseError::Malformed`].
    pub fn decode(bytes: &[u8]) -> Result<Leases, LeaseError> {
        let fail = |problem| Err(LeaseError::Malformed { problem });
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return fail("it is shorter than its header");
        };
        let number =
            |part: &[u8]| part.iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        let (version, count) = header.split_at(4);
        if number(version) != u64::from(VERSION) {
            return fail("it was written by another version of the program");
        }
        let (chunks, tail) = rest.as_chunks::<LEASE_BYTES>();
        if !tail.is_empty() || chunks.len() as u64 != number(count) || chunks.len() > LEASES_MAX {
            return fail("its length does not agree with its number of leases");
        }
        let lease = |chunk: &[u8; LEASE_BYTES]| {
            let (lsn, end) = chunk.split_at(8);
            (Lsn(number(lsn)), Timestamp(number(end).cast_signed()))
        };
        let listed: Vec<(Lsn, Timestamp)> = chunks.iter().map(lease).collect();
        if !listed.is_sorted_by(|a, b| a.0 < b.0) {
            return fail("its leases are out of order");
        }
        Ok(Leases { ends: listed.into_iter().collect() })
    }
}

impl<I: Io> Timeline<I> {
    /// Takes a lease on `lsn` for `seconds` from now, or prolongs the one there is. When this
    /// returns, the lease is durable. Returns when it ends.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing is promised then, though a lease that could not be written for
    /// sure may hold the LSN until its end.
    pub async fn lease(&self, lsn: Lsn, seconds: Option<u64>) -> Result<Lease, LeaseError> {
        let seconds = seconds.unwrap_or(LEASE_S_DEFAULT);
        if !(1..=LEASE_S_MAX).contains(&seconds) {
            return Err(LeaseError::Length { seconds });
        }
        let history = &self.history;
        let _turn = history.lease_turn.acquire().await;
        if self.stopping.get() {
            return Err(LeaseError::Shutdown);
        }
        if let Some(problem) = history.leases_problem.borrow().clone() {
            return Err(LeaseError::Unreadable { problem });
        }
        let last_record_lsn = self.lsns().last_record;
        if lsn > last_record_lsn {
            return Err(LeaseError::NotThereYet { lsn, last_record_lsn });
        }
        let start = self.start_lsn();
        if lsn < start {
            return Err(LeaseError::BelowStart { lsn, start });
        }
        if let Some(ancestor) = self.ancestor().filter(|ancestor| lsn < ancestor.lsn) {
            return Err(LeaseError::OfAncestor { lsn, timeline: ancestor.timeline.id });
        }
        let now = self.wall_clock();
        let wanted = Lease { lsn, valid_until: now.plus_seconds(seconds) };
        // Entered before it is written: a collection that is planned meanwhile respects it.
        let valid_until =
            history.leases.borrow_mut().grant(wanted, now, history.planned_cutoff.get())?;
        history.leases_changed();
        #[cfg(test)]
        if super::gc::planted::LEASES_UNWRITTEN.get() {
            return Ok(Lease { lsn, valid_until });
        }
        self.write_leases().await?;
        Ok(Lease { lsn, valid_until })
    }

    /// Leases that last, by LSN.
    pub fn leases(&self) -> Vec<Lease> {
        self.history.leases.borrow().active(self.wall_clock()).collect()
    }

    /// Writes all leases. The caller has the lease turn.
    pub(super) async fn write_leases(&self) -> Result<(), IoError> {
        let history = &self.history;
        let (version, body) = (history.leases_version.get(), history.leases.borrow().encode());
        let path = self.context.dir.join(LEASES_FILE);
        durable::write_file_atomic(&self.context.io, &path, &body).await?;
        history.leases_written.set(version);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
