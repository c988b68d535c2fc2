//! How far a timeline's journal was synced: what tells damage from the end.
//!
//! A journal ends where its records stop making sense. After a power loss that may be a torn
//! write with whole records behind it, which nobody was told of; and the same sight is offered by
//! a journal of which a block in the midst has gone bad. So the file [`JOURNAL_MARK_FILE`] notes
//! up to which record everything was synced, and could be acknowledged. Nothing before the mark
//! can be the end: a journal that ends before it is damaged.
//!
//! The mark follows at some distance ([`JOURNAL_MARK_INTERVAL_MS`], [`JOURNAL_MARK_BYTES`]), so
//! that acknowledging waits for nothing but the journal: a mark that is too low claims less, and is
//! true. It is never too high, because
//! 1. it is written after the sync that it speaks of;
//! 2. the end of the journal goes back in one place only, where damage is found at start, and there
//!    the mark goes back before anything is written to the journal.
//!
//! Without the file nothing is known, and every end is believed.
//!
//! Body of the file, little-endian, inside the container of `io::durable`:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | version, 1 |
//! | 4 | 16 | the timeline |
//! | 20 | 8 | LSN: end of the last record of which every byte is synced |

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use futures_util::future::select;

use super::load::{JOURNAL_DIR, LoadError};
use super::timeline::Timeline;
use super::turn::Turn;
use crate::base::{Kind, Lsn, TimelineId};
use crate::io::durable::{self, DurableError};
use crate::io::{Instant, Io, IoCause, IoError};
use crate::limits::{JOURNAL_MARK_BYTES, JOURNAL_MARK_INTERVAL_MS};
use crate::wal::journal_aside::{parse_aside_name, set_aside};

/// File name within the timeline's directory.
pub const JOURNAL_MARK_FILE: &str = "journal_mark";

const VERSION: u32 = 1;
const BODY_BYTES: usize = 28;

/// Why the file of a mark cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the file with the journal's mark is no such file: {problem}")]
pub struct MarkError {
    problem: &'static str,
}

/// Why a mark cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum MarkReadError {
    /// The file is damaged, or the device does not give it.
    #[error(transparent)]
    File(#[from] DurableError),
    /// It holds something else.
    #[error(transparent)]
    Content(#[from] MarkError),
}

impl MarkError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

/// The written form.
pub fn encode(timeline: TimelineId, lsn: Lsn) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(BODY_BYTES);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&timeline.0);
    bytes.extend_from_slice(&lsn.0.to_le_bytes());
    bytes
}

/// Reads the written form of this timeline's mark.
///
/// # Errors
/// [`MarkError`] if it is none, or that of another timeline.
pub fn decode(timeline: TimelineId, bytes: &[u8]) -> Result<Lsn, MarkError> {
    let wrong = |problem| MarkError { problem };
    let bytes: &[u8; BODY_BYTES] = bytes.try_into().map_err(|_| wrong("its length is wrong"))?;
    let (version, rest) = bytes.split_at(4);
    let (owner, lsn) = rest.split_at(16);
    if version != VERSION.to_le_bytes() {
        return Err(wrong("it was written by another version of the program"));
    }
    if owner != timeline.0 {
        return Err(wrong("it is that of another timeline"));
    }
    let lsn = lsn.first_chunk().ok_or_else(|| wrong("its length is wrong"))?;
    Ok(Lsn(u64::from_le_bytes(*lsn)))
}

/// The mark of the timeline in `dir`; [`Lsn::INVALID`] if there is none.
///
/// # Errors
/// What is wrong with the file, or that it cannot be read.
pub(super) async fn read<I: Io>(
    io: &I,
    dir: &Path,
    timeline: TimelineId,
) -> Result<Lsn, MarkReadError> {
    match durable::read_file(io, &dir.join(JOURNAL_MARK_FILE)).await {
        Ok(bytes) => Ok(decode(timeline, &bytes)?),
        Err(DurableError::Io(error)) if error.cause == IoCause::NotFound => Ok(Lsn::INVALID),
        Err(error) => Err(error.into()),
    }
}

/// What a timeline has noted.
pub(super) struct JournalMark {
    written: Cell<Lsn>,
    written_at: Cell<Instant>,
    /// Who writes the file has it.
    turn: Turn,
}

impl JournalMark {
    pub(super) fn new(now: Instant) -> Self {
        JournalMark {
            written: Cell::new(Lsn::INVALID),
            written_at: Cell::new(now),
            turn: Turn::default(),
        }
    }
}

impl<I: Io> Timeline<I> {
    /// The mark that was found; [`Lsn::INVALID`] if there is none, or none that can be believed.
    pub(super) async fn read_mark(&self) -> Result<Lsn, LoadError> {
        let problem = match read(&self.context.io, &self.context.dir, self.id).await {
            Ok(lsn) => {
                self.mark.written.set(lsn);
                return Ok(lsn);
            }
            Err(MarkReadError::File(DurableError::Io(error))) => return Err(error.into()),
            Err(problem) => problem,
        };
        tracing::error!(
            tenant = %self.tenant, timeline = %self.id,
            "how far the journal was synced is unknown, so its end is believed: {problem}"
        );
        Ok(Lsn::INVALID)
    }

    /// Waits until bytes wait for the journal, or the mark is to be written.
    pub(super) async fn wait_for_journal(&self) {
        let signal = self.journal_signal.wait();
        if self.unmarked_bytes() == 0 {
            return signal.await;
        }
        let since = self.context.io.now().saturating_sub(self.mark.written_at.get());
        let rest = Duration::from_millis(JOURNAL_MARK_INTERVAL_MS).saturating_sub(since);
        let sleep = std::pin::pin!(self.context.io.sleep(rest));
        select(std::pin::pin!(signal), sleep).await;
    }

    /// Writes the mark if it is due. A failure costs nothing but certainty, and it is tried again.
    pub(super) async fn mark_if_due(&self) {
        let (bytes, now) = (self.unmarked_bytes(), self.context.io.now());
        let since = now.saturating_sub(self.mark.written_at.get());
        let is_due = since >= Duration::from_millis(JOURNAL_MARK_INTERVAL_MS);
        if bytes == 0 || !is_due && bytes < JOURNAL_MARK_BYTES {
            return;
        }
        let lsn = self.mutable.borrow().flushed_record;
        if let Err(error) = self.write_mark(lsn).await {
            tracing::warn!(
                tenant = %self.tenant, timeline = %self.id,
                "how far the journal is synced cannot be noted: {error}; trying again"
            );
        }
    }

    /// Bytes of acknowledged WAL behind the mark.
    fn unmarked_bytes(&self) -> u64 {
        let mutable = self.mutable.borrow();
        // What is in layers nobody looks for in the journal.
        let known = self.mark.written.get().max(mutable.lsns.disk_consistent);
        mutable.flushed_record.0.saturating_sub(known.0)
    }

    async fn write_mark(&self, lsn: Lsn) -> Result<(), IoError> {
        let _turn = self.mark.turn.acquire().await;
        if self.stopping.get() {
            // The directory may be going away.
            return Ok(());
        }
        // An attempt that failed is not repeated at once.
        self.mark.written_at.set(self.context.io.now());
        let path = self.context.dir.join(JOURNAL_MARK_FILE);
        let body = encode(self.id, lsn);
        durable::write_file_in_place(&self.context.io, &path, &body).await?;
        self.mark.written.set(lsn);
        Ok(())
    }

    /// Waits until nobody writes the mark; when the timeline is stopping, nobody will.
    pub(super) async fn end_marking(&self) {
        let _turn = self.mark.turn.acquire().await;
    }

    /// The journal can be read up to `end` only, though it was synced up to `mark`: keeps what is
    /// behind, and lets the journal go on at `end`.
    pub(super) async fn journal_is_damaged(&self, end: Lsn, mark: Lsn) -> Result<(), LoadError> {
        let dir = self.context.dir.join(JOURNAL_DIR);
        tracing::error!(
            tenant = %self.tenant, timeline = %self.id,
            "the journal in {} was synced up to {mark}, but ends at {end}: it is damaged there. \
             What is behind is kept; the WAL is asked of the source again", dir.display()
        );
        set_aside(&self.context.io, &dir, self.cluster.tli, end).await?;
        // Until here, another start finds the same.
        self.write_mark(end).await?;
        Ok(())
    }

    /// Names what was kept of a damaged journal, as long as somebody leaves it there.
    pub(super) async fn name_damaged_journal(&self) -> Result<(), LoadError> {
        let dir = self.context.dir.join(JOURNAL_DIR);
        for entry in self.context.io.list(&dir).await? {
            let Some(lsn) = parse_aside_name(&entry.name) else { continue };
            let path = dir.join(&entry.name);
            self.health.borrow_mut().damage(format!(
                "the journal was damaged at {lsn}, and WAL from there on is asked of the source \
                 again; {} is what it had, to be removed once the timeline has passed that WAL",
                path.display()
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_and_refused() {
        let timeline = TimelineId([7; 16]);
        let bytes = encode(timeline, Lsn(0x0102));
        let mut expected = vec![1, 0, 0, 0];
        expected.extend([7; 16]);
        expected.extend([2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes, expected);
        assert_eq!(decode(timeline, &bytes), Ok(Lsn(0x0102)));
        assert!(decode(TimelineId([8; 16]), &bytes).is_err());
        assert!(decode(timeline, &bytes[..27]).is_err());
        for at in 0..20 {
            let mut wrong = bytes.clone();
            wrong[at] ^= 2;
            assert!(decode(timeline, &wrong).is_err(), "byte {at}");
        }
    }
}
