//! Why WAL cannot be taken apart.

use crate::base::{Kind, Lsn};
use crate::wal::page::PageError;
use crate::wal::record::RecordError;

/// Why the WAL cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The start position cannot be that of a record.
    #[error("WAL cannot be read from {lsn}: records start at multiples of 8, not in page headers")]
    Start {
        /// The position.
        lsn: Lsn,
    },
    /// The segment size is impossible.
    #[error("{bytes} bytes is no WAL segment size; it is a power of two from 1 MiB to 1 GiB")]
    SegmentSize {
        /// The size.
        bytes: u64,
    },
    /// A page header is bad.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The PostgreSQL timeline goes back.
    #[error("the WAL page at {page} is of timeline {found}, after one of timeline {before}")]
    Timeline {
        /// The page.
        page: Lsn,
        /// Its timeline.
        found: u32,
        /// The highest timeline before.
        before: u32,
    },
    /// A record is bad.
    #[error("the WAL record at {lsn} is damaged: {error}")]
    Record {
        /// Start of the record.
        lsn: Lsn,
        /// What is wrong.
        error: RecordError,
    },
    /// A record does not follow the one before.
    #[error("the WAL record at {lsn} follows one at {found}, but the one before is at {expected}")]
    Previous {
        /// Start of the record.
        lsn: Lsn,
        /// Its `xl_prev`.
        found: Lsn,
        /// Start of the record before; the record itself where the one before is not known.
        expected: Lsn,
    },
    /// The page where a record should go on says something else.
    #[error(
        "the WAL record at {lsn} has {missing} bytes left at {page}, but the page says {rem_len}"
    )]
    Continuation {
        /// Start of the record.
        lsn: Lsn,
        /// The page where it should go on.
        page: Lsn,
        /// Bytes that the record still lacks.
        missing: u64,
        /// What the page header says; 0 if it says that no record goes on.
        rem_len: u32,
    },
    /// A page starts with the rest of a record although none is open.
    #[error("the WAL page at {page} starts with the rest of a record, but none was begun")]
    Orphan {
        /// The page.
        page: Lsn,
    },
    /// `XLOG_OVERWRITE_CONTRECORD` names another record than the one given up.
    #[error(
        "the WAL record at {lsn} takes the place of one at {found}, but that was at {expected}"
    )]
    Overwrite {
        /// Start of the record.
        lsn: Lsn,
        /// The record that it names.
        found: Lsn,
        /// The record that was given up.
        expected: Lsn,
    },
}

impl StreamError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        match self {
            StreamError::Start { .. } | StreamError::SegmentSize { .. } => Kind::Invalid,
            StreamError::Page(error) => error.kind(),
            _ => Kind::Corrupt,
        }
    }
}
