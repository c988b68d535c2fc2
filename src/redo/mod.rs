//! Rebuilding pages from WAL records.
//!
//! A request names a block, the newest page image at or below the wanted LSN (if there is one)
//! and the records after it. [`plan`] cuts the records into runs; our own small records and
//! images are applied there. WAL records are applied in Rust where that goes ([`native`]), else
//! by a child process: unmodified PostgreSQL with `pgxn/neon_walredo` loaded ([`child`]), of
//! which a core has a few ([`pool`]). What layer files keep of a record that changes several blocks
//! is an [`excerpt`] for each.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;

use crate::base::{BlockNumber, Kind, Lsn, RelTag};

#[cfg(test)]
mod captured;
pub mod child;
pub mod excerpt;
pub mod failed;
pub mod histogram;
pub mod native;
pub mod plan;
pub mod pool;
pub mod protocol;
pub mod record;
pub mod small;

/// A page to rebuild from WAL records.
#[derive(Clone, Debug)]
pub struct RedoRequest {
    /// The relation fork.
    pub rel: RelTag,
    /// The block.
    pub block: BlockNumber,
    /// The page before the first record; `None` when that record initialises it.
    pub base: Option<Bytes>,
    /// LSN after the record, and the whole WAL record; ascending.
    pub records: Vec<(Lsn, Bytes)>,
}

/// What redo must know about the cluster that the WAL comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RedoSettings {
    /// The cluster has data checksums or `wal_log_hints = on` (`XLogHintBitIsNeeded`). Redo of
    /// `XLOG_HEAP2_VISIBLE` sets the heap page's LSN only then.
    pub hint_bits_logged: bool,
}

/// Why a page could not be rebuilt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RedoError {
    /// The request has no records.
    #[error("nothing to redo: the request for {rel} block {block} has no records")]
    NoRecords {
        /// The fork.
        rel: RelTag,
        /// The block.
        block: BlockNumber,
    },
    /// A record that is no whole, undamaged WAL record of an allowed resource manager.
    #[error("WAL record at {lsn} for {rel} block {block} is not fit for redo: {problem}")]
    BadRecord {
        /// LSN after the record.
        lsn: Lsn,
        /// The fork.
        rel: RelTag,
        /// The block.
        block: BlockNumber,
        /// What is wrong with it.
        problem: String,
    },
    /// PostgreSQL refused a record, on a fresh process as well; its message.
    #[error("redo of {rel} block {block} failed in PostgreSQL: {message}")]
    Refused {
        /// The fork.
        rel: RelTag,
        /// The block.
        block: BlockNumber,
        /// PostgreSQL's error message.
        message: String,
    },
    /// The child process ended, hung or answered nonsense.
    #[error("wal-redo process failed: {problem}")]
    Child {
        /// What happened.
        problem: String,
    },
    /// The pool is being shut down.
    #[error("wal-redo is shutting down")]
    Shutdown,
}

impl RedoError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            RedoError::NoRecords { .. } => Kind::Invalid,
            RedoError::BadRecord { .. } | RedoError::Refused { .. } => Kind::Corrupt,
            RedoError::Child { .. } => Kind::Retry,
            RedoError::Shutdown => Kind::Shutdown,
        }
    }
}

/// Applies WAL records to a page. One value serves one tenant.
pub trait Redo {
    /// The page after all records of the request: 8,192 bytes.
    fn redo(&self, request: RedoRequest) -> LocalBoxFuture<'_, Result<Bytes, RedoError>>;

    /// Ends what was started for it; requests that wait, and later ones, get
    /// [`RedoError::Shutdown`].
    fn stop(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }
}

/// Makes a [`Redo`] on another executor; whoever calls it also stops what it gets.
pub type RedoMaker = Box<dyn FnOnce() -> Rc<dyn Redo> + Send>;
