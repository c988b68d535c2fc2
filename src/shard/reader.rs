//! What the page service reads from a shard, and how a read can fail.

use std::rc::Rc;

use bytes::Bytes;

use super::base_backup::{BackupError, BackupRequest, BackupSink};
use super::leases::LeaseError;
use crate::base::{BlockNumber, Kind, Lsn, RelTag, SlruKind, TenantShardId, TimelineId, Timestamp};
use crate::limits::{QUOTA_BYTES_IN_FLIGHT, QUOTA_REQUESTS_PER_S};
use crate::redo::RedoError;

/// The pair of LSNs that a page request carries (facts of the page service protocol).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLsn {
    /// The version wanted: the newest at or below this. [`Lsn::MAX`] asks for the newest of all.
    pub request: Lsn,
    /// The client's promise that nothing changed in `(not_modified_since, request]`.
    pub not_modified_since: Lsn,
}

/// Why a read failed. The text goes to the client.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// No such tenant here.
    #[error("tenant {0} is not on this node")]
    TenantNotFound(TenantShardId),
    /// No such timeline.
    #[error("timeline {1} of tenant {0} is not on this node")]
    TimelineNotFound(TenantShardId, TimelineId),
    /// Making the timeline failed; nothing but removing it is left.
    #[error("timeline {timeline} could not be made: {reason}; delete it and make it again")]
    NotMade {
        /// The timeline.
        timeline: TimelineId,
        /// Why.
        reason: String,
    },
    /// The timeline is still being created.
    #[error("timeline {timeline} is not readable yet: {reason}")]
    NotReady {
        /// The timeline.
        timeline: TimelineId,
        /// Why.
        reason: String,
    },
    /// The timeline is on disk but cannot be opened.
    #[error("timeline {timeline} cannot be opened: {reason}")]
    Unreadable {
        /// The timeline.
        timeline: TimelineId,
        /// Why.
        reason: String,
    },
    /// The timeline is archived.
    #[error("timeline {timeline} is archived; unarchive it to read it")]
    Archived {
        /// The timeline.
        timeline: TimelineId,
    },
    /// WAL up to the wanted LSN did not come in time.
    #[error(
        "timed out after {waited_ms} ms waiting for WAL up to {wanted}; the timeline is at {last_record_lsn}"
    )]
    LsnTimeout {
        /// The LSN waited for.
        wanted: Lsn,
        /// How far ingest is.
        last_record_lsn: Lsn,
        /// Time waited, in milliseconds.
        waited_ms: u64,
    },
    /// WAL up to the wanted LSN will not come.
    #[error(
        "cannot read at {wanted}: the timeline ends at {last_record_lsn} and has no WAL source"
    )]
    NoMoreWal {
        /// The LSN asked for.
        wanted: Lsn,
        /// Where the timeline ends.
        last_record_lsn: Lsn,
    },
    /// Below the first LSN at which the timeline is consistent.
    #[error(
        "cannot read at {request}: history of this timeline begins at {start}, the end of its base backup"
    )]
    BelowStart {
        /// The LSN asked for.
        request: Lsn,
        /// The first readable LSN.
        start: Lsn,
    },
    /// Below the cut-off of garbage collection, and no lease holds it.
    #[error(
        "tried to request a page version that was garbage collected. requested at {request} gc cutoff {cutoff}; read at {cutoff} or later, and take a lease on an LSN to keep it readable"
    )]
    GarbageCollected {
        /// The LSN asked for.
        request: Lsn,
        /// The lowest LSN of which all history is readable.
        cutoff: Lsn,
    },
    /// The request's LSNs make no sense.
    #[error("bad LSNs in request: {0}")]
    BadLsn(String),
    /// The request is wrong otherwise.
    #[error("bad request: {0}")]
    BadRequest(String),
    /// What is stored for the key is damaged or missing.
    #[error("{what} cannot be read at {lsn}: {problem}")]
    Damaged {
        /// The key, for humans.
        what: String,
        /// The LSN.
        lsn: Lsn,
        /// What is wrong.
        problem: String,
    },
    /// Redo failed.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// The node or the timeline is shutting down.
    #[error("shutting down")]
    Shutdown,
}

impl ReadError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            ReadError::TenantNotFound(_)
            | ReadError::TimelineNotFound(..)
            | ReadError::NotMade { .. }
            | ReadError::Archived { .. }
            | ReadError::NoMoreWal { .. }
            | ReadError::BelowStart { .. }
            | ReadError::GarbageCollected { .. }
            | ReadError::BadLsn(_)
            | ReadError::BadRequest(_) => Kind::Invalid,
            ReadError::NotReady { .. } | ReadError::LsnTimeout { .. } => Kind::Retry,
            ReadError::Damaged { .. } | ReadError::Unreadable { .. } => Kind::Corrupt,
            ReadError::Redo(error) => error.kind(),
            ReadError::Shutdown => Kind::Shutdown,
        }
    }
}

/// What the requests of one tenant may take of one core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageQuota {
    /// Requests per second; 0: any number.
    pub requests_per_s: u64,
    /// Bytes of pages that are worked on at once.
    pub bytes_in_flight: u64,
}

impl Default for PageQuota {
    fn default() -> Self {
        PageQuota { requests_per_s: QUOTA_REQUESTS_PER_S, bytes_in_flight: QUOTA_BYTES_IN_FLIGHT }
    }
}

/// A timeline as the page service sees it.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait TimelineReader: 'static {
    /// One page, 8,192 bytes; zeros at and past the end of the fork.
    async fn get_page(
        &self,
        rel: RelTag,
        block: BlockNumber,
        lsn: RequestLsn,
    ) -> Result<Bytes, ReadError>;
    /// The same page, if it can be told at once; `None` says nothing of it, and nothing was begun.
    fn held_page(&self, rel: RelTag, block: BlockNumber, lsn: RequestLsn) -> Option<Bytes> {
        let _ = (rel, block, lsn);
        None
    }
    /// What the timeline's tenant may have, at the moment.
    fn quota(&self) -> PageQuota {
        PageQuota::default()
    }
    /// Does the fork exist?
    async fn rel_exists(&self, rel: RelTag, lsn: RequestLsn) -> Result<bool, ReadError>;
    /// Size of the fork in blocks; 0 if it does not exist.
    async fn rel_size(&self, rel: RelTag, lsn: RequestLsn) -> Result<BlockNumber, ReadError>;
    /// Size of the main forks and others of a database in `pg_default`, in bytes.
    async fn db_size(&self, db: u32, lsn: RequestLsn) -> Result<i64, ReadError>;
    /// All blocks of an SLRU segment, up to 32 × 8,192 bytes.
    async fn slru_segment(
        &self,
        kind: SlruKind,
        segment: u32,
        lsn: RequestLsn,
    ) -> Result<Bytes, ReadError>;
    /// Keeps `lsn` readable for the usual time of a lease, or prolongs that; returns its end. It
    /// is durable then.
    ///
    /// # Errors
    /// [`LeaseError`]; [`Kind::Invalid`] means that there will be no lease on this LSN.
    async fn lease_lsn(&self, lsn: Lsn) -> Result<Timestamp, LeaseError>;
    /// Writes a data directory as of an LSN, as a tar archive; returns that LSN. Nothing is written
    /// before it is settled.
    ///
    /// # Errors
    /// [`BackupError`].
    async fn backup<S: BackupSink>(
        &self,
        request: BackupRequest,
        sink: &mut S,
    ) -> Result<Lsn, BackupError>;
}

/// One core's timelines, as the page service finds them.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait PageBackend: 'static {
    /// What reads of one timeline go to.
    type Timeline: TimelineReader;

    /// The timeline, ready or not.
    ///
    /// # Errors
    /// [`ReadError::TenantNotFound`], [`ReadError::TimelineNotFound`], [`ReadError::Shutdown`].
    async fn timeline(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<Rc<Self::Timeline>, ReadError>;
}
