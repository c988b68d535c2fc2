//! What the admin API asks of a core, and what a core tells about itself.

use serde::{Deserialize, Serialize};

use super::history::{HistoryReply, HistoryRequest};
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};

/// Where a new timeline comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineSource {
    /// A running primary: base backup, then streaming.
    Primary {
        /// libpq connection string.
        conninfo: String,
        /// Physical replication slot to use; it is created if it does not exist.
        slot: Option<String>,
    },
    /// A base backup on this machine's disk: a directory, or a directory of tar files.
    Backup {
        /// Absolute path.
        path: String,
        /// Go on by streaming from this primary (libpq connection string).
        primary: Option<String>,
        /// Physical replication slot to use.
        slot: Option<String>,
    },
    /// The data directory of a cleanly shut-down cluster on this machine's disk.
    Pgdata {
        /// Absolute path.
        path: String,
        /// Go on by streaming from this primary (libpq connection string).
        primary: Option<String>,
        /// Physical replication slot to use.
        slot: Option<String>,
    },
}

/// A timeline to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateTimeline {
    /// The tenant; created if it does not exist.
    pub tenant: TenantShardId,
    /// The new timeline.
    pub timeline: TimelineId,
    /// Where its data comes from.
    pub source: TimelineSource,
}

/// Life of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimelineState {
    /// Its base backup is being taken or read.
    Importing,
    /// WAL up to the end of the base backup is not in yet.
    CatchingUp,
    /// Readable.
    Active,
    /// Unusable until an operator steps in; `error` says why.
    Broken,
}

/// Progress of an import.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportProgress {
    /// Bytes done.
    pub bytes_done: u64,
    /// Bytes expected, where known.
    pub bytes_total: Option<u64>,
}

/// One timeline as `/v1/tenant` shows it. LSNs: DESIGN "Data flow".
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the documented terms")]
pub struct TimelineInfo {
    pub tenant: TenantShardId,
    pub timeline: TimelineId,
    pub core: usize,
    pub state: TimelineState,
    pub error: Option<String>,
    pub import: Option<ImportProgress>,
    /// First LSN that can be read: the end of the base backup.
    pub start_lsn: Lsn,
    pub received_lsn: Lsn,
    pub last_record_lsn: Lsn,
    pub journal_lsn: Lsn,
    pub disk_consistent_lsn: Lsn,
    /// WAL source and whether it is connected.
    pub wal_source: Option<String>,
    pub wal_source_connected: bool,
    /// Why no WAL comes from the source at the moment; the node goes on trying.
    pub wal_source_error: Option<String>,
    pub layer_count: u64,
    pub layer_bytes: u64,
    pub open_layer_bytes: u64,
    pub journal_bytes: u64,
}

/// Counters of one core, for `/metrics`; all but the gauges only grow.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the metrics' names")]
pub struct CoreMetrics {
    pub core: usize,
    pub connections_accepted: u64,
    pub connections_moved: u64,
    /// Gauge.
    pub connections_open: u64,
    pub get_page_requests: u64,
    pub get_page_seconds: f64,
    pub other_requests: u64,
    pub request_errors: u64,
    pub wal_bytes_received: u64,
    pub wal_records_ingested: u64,
    pub values_ingested: u64,
    pub wal_changes_skipped: u64,
    pub journal_syncs: u64,
    pub journal_bytes_written: u64,
    pub layer_bytes_written: u64,
    pub checkpoints: u64,
    pub redo_requests: u64,
    pub redo_seconds: f64,
    pub redo_records: u64,
    pub redo_children_started: u64,
    pub redo_failures: u64,
}

/// Why an admin command failed.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// What the caller can do.
    pub kind: Kind,
    /// What happened and what to do.
    pub message: String,
}

/// A core's side of the admin API.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait CoreControl: 'static {
    /// All timelines of this core.
    fn timelines(&self) -> Vec<TimelineInfo>;
    /// Counters.
    fn metrics(&self) -> CoreMetrics;
    /// Starts to make a timeline; returns as soon as the work has begun.
    async fn create_timeline(&self, request: CreateTimeline) -> Result<(), ControlError>;
    /// Writes everything in memory to layer files; returns when it is durable.
    async fn checkpoint(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<(), ControlError>;
    /// Asks about a timeline's history, or holds or cuts it.
    async fn history(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        request: HistoryRequest,
    ) -> Result<HistoryReply, ControlError>;
    /// Stops ingest and everything else, with all data synced. No call follows.
    async fn shutdown(&self);
}
