//! What the admin API asks of a core, and what a core tells about itself.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::history::{HistoryReply, HistoryRequest};
use super::index::{BranchPoint, WalSourceConfig};
use super::tenant_config::TenantConfig;
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
pub use crate::redo::child::ChildStatus;
pub use crate::redo::histogram::HistogramCounts;

/// Where a new timeline comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
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

/// A branch to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateBranch {
    /// The tenant, which exists.
    pub tenant: TenantShardId,
    /// The new timeline.
    pub timeline: TimelineId,
    /// The timeline to branch off.
    pub ancestor: TimelineId,
    /// Its changes at this LSN and below are the branch's too; all that it has if not given.
    pub lsn: Option<Lsn>,
    /// Where the branch gets WAL of its own, from the branch point on.
    pub source: Option<WalSourceConfig>,
}

/// A change of tenants and timelines. All of them are durable when they are acknowledged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Makes a branch.
    Branch(CreateBranch),
    /// Removes a timeline without branches.
    DeleteTimeline(TenantShardId, TimelineId),
    /// Archives a timeline (true) or takes that back (false).
    Archive(TenantShardId, TimelineId, bool),
    /// Starts to copy what a branch needs of its ancestor; the timeline's `detach` tells how far
    /// it is, and its `ancestor` is gone when it is done.
    DetachAncestor(TenantShardId, TimelineId),
    /// Makes a tenant without timelines, or changes the settings of one.
    Tenant {
        /// The tenant.
        tenant: TenantShardId,
        /// Its settings over those of the node; all of them.
        config: TenantConfig,
        /// It must not exist (true), or it must (false).
        create: bool,
    },
    /// Removes a tenant with all its timelines.
    DeleteTenant(TenantShardId),
}

/// One tenant as `/v1/tenant` shows it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct TenantInfo {
    /// The tenant shard.
    pub tenant: TenantShardId,
    /// The core that has it.
    pub core: usize,
    /// Its settings over those of the node.
    pub config: TenantConfig,
    /// What they amount to.
    pub effective_config: TenantConfig,
    /// Number of its timelines.
    pub timeline_count: usize,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// A detaching that is under way or has failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetachState {
    /// Values copied so far.
    pub values: u64,
    /// Why it failed; it may be started again.
    pub error: Option<String>,
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
    /// Readable: it is on disk and will be opened when it is first asked for.
    Idle,
    /// Takes in no WAL and is not read, but by its branches.
    Archived,
    /// It is being removed.
    Deleting,
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
    /// In JSON `phase`: `state` says the same in the words of other pageservers there.
    #[serde(rename = "phase")]
    pub state: TimelineState,
    pub error: Option<String>,
    pub import: Option<ImportProgress>,
    /// First LSN that can be read: the end of the base backup.
    pub start_lsn: Lsn,
    /// Reads before this LSN are refused, unless a lease holds it: what garbage collection has
    /// passed.
    #[serde(default)]
    pub gc_cutoff_lsn: Lsn,
    /// The timeline that this one branched off, and where.
    pub ancestor: Option<BranchPoint>,
    /// A detaching that is under way or has failed.
    pub detach: Option<DetachState>,
    pub received_lsn: Lsn,
    pub last_record_lsn: Lsn,
    pub journal_lsn: Lsn,
    pub disk_consistent_lsn: Lsn,
    /// WAL source and whether it is connected.
    pub wal_source: Option<String>,
    pub wal_source_connected: bool,
    /// Why no WAL comes from the source at the moment; the node goes on trying.
    pub wal_source_error: Option<String>,
    /// Why ingest waits or is slow at the moment; it goes on by itself when that is gone.
    pub ingest_paused: Option<String>,
    /// What reads found damaged since the start; not everything, if it is much.
    pub damaged: Vec<String>,
    /// Bytes of WAL per second that are taken in at most at the moment; none: as many as come.
    pub ingest_limit_bytes_per_s: Option<u64>,
    pub layer_count: u64,
    /// Layers over all keys, as checkpoints write them, that wait for compaction.
    pub l0_count: u64,
    /// Layers in memory that wait for a checkpoint.
    pub frozen_count: u64,
    /// Physical size: bytes of all layer files of its own.
    pub layer_bytes: u64,
    /// Of these, what is kept beyond one copy of everything: delta layers, and image layers that
    /// newer ones cover wholly.
    pub history_bytes: u64,
    /// Bytes of all relations at `last_record_lsn`; none until they have been added up, which
    /// the first look starts.
    pub logical_bytes: Option<u64>,
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
    /// Gauge: bytes of open and frozen layers.
    pub memory_used_bytes: u64,
    /// Gauge: bytes of layers that have become files and stay in memory for reads.
    pub memory_resident_bytes: u64,
    /// Blocks of layer files that were in the cache when they were asked for.
    pub block_cache_hits: u64,
    /// Blocks that were read from files.
    pub block_cache_misses: u64,
    /// Gauge: memory of the cache's blocks.
    pub block_cache_bytes: u64,
    /// Times that a layer file was opened to be read.
    pub layer_files_opened: u64,
    /// Gauge: layer files that are open.
    pub layer_files_open: u64,
    /// Gauge: memory of the indexes and filters of open layer files.
    pub layer_files_open_bytes: u64,
    /// Page reads that began with a page that was rebuilt before.
    pub page_cache_hits: u64,
    /// Gauge: memory of the cache of rebuilt pages.
    pub page_cache_bytes: u64,
    pub get_page_requests: u64,
    pub get_page_seconds: f64,
    /// Requests that stand in line; gauge.
    pub page_requests_waiting: u64,
    /// Requests that are being worked on; gauge.
    pub page_requests_in_flight: u64,
    /// Requests that stood in line.
    pub page_requests_delayed: u64,
    /// Time for which batches of requests did.
    pub page_requests_delayed_seconds: f64,
    /// Requests that had to because of their tenant's quota.
    pub page_requests_over_quota: u64,
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
    pub compactions: u64,
    pub compaction_failures: u64,
    /// Bytes of L1 layers that compaction has written.
    pub merged_bytes_written: u64,
    /// Bytes of image layers that compaction has written.
    pub image_bytes_written: u64,
    pub compaction_pages: u64,
    pub compaction_page_failures: u64,
    /// Merges of L0 layers that compaction has carried out.
    pub compaction_l0_merges: u64,
    /// Merges of L1 layers.
    pub compaction_l1_merges: u64,
    /// Jobs that made image layers.
    pub compaction_image_jobs: u64,
    pub gc_runs: u64,
    /// Collections that did not come to their end; those that were ended by a shutdown apart.
    pub gc_failures: u64,
    pub gc_layers_removed: u64,
    pub gc_bytes_removed: u64,
    /// Timelines that were closed because nobody used them.
    pub timelines_closed: u64,
    /// Time for which WAL was left with its source, to keep to a rate.
    pub ingest_slowed_seconds: f64,
    /// Time for which nothing was taken in for want of memory.
    pub ingest_stopped_seconds: f64,
    /// Bytes of timeline indexes that checkpoints and compaction have written.
    pub index_bytes_written: u64,
    /// The most L0 layers that a timeline had at once.
    pub l0_layers_max: u64,
    /// Layer files of which a page's read took blocks.
    pub read_layers: Distribution,
    /// Records that a page's read applied.
    pub read_records: Distribution,
    pub redo_requests: u64,
    pub redo_seconds: f64,
    pub redo_records: u64,
    pub redo_pages_native: u64,
    pub redo_records_native: u64,
    pub redo_misfits: u64,
    /// Requests to wal-redo processes that went there without a thread in between.
    pub redo_inline: u64,
    pub redo_children_started: u64,
    /// Gauge.
    pub redo_children_alive: u64,
    pub redo_failures: u64,
    /// Requests that wal-redo processes were to answer and that ended in an error.
    pub redo_child_errors: u64,
    /// Processes that are bound to a tenant now.
    pub redo_children: Vec<ChildStatus>,
    /// Time from the start of a wal-redo process to its first answer, in microseconds.
    pub redo_launch_us: HistogramCounts,
    /// Time to rebuild a page from WAL records, in nanoseconds.
    pub redo_time_ns: HistogramCounts,
    /// WAL records of one redo.
    pub redo_chain_records: HistogramCounts,
    /// Bytes of those.
    pub redo_chain_bytes: HistogramCounts,
    /// By record type: resource manager (`xl_rmid`), and its part of `xl_info`.
    pub redo_types: BTreeMap<u16, RedoSplit>,
}

/// How often each small number came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Distribution {
    /// How often 0, 1, 2 and so on came; the last place is for that number and all above.
    pub counts: Vec<u64>,
    /// All numbers added up.
    pub sum: u64,
    /// The largest.
    pub max: u64,
}

impl Distribution {
    /// How many numbers came.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The smallest number that so many percent of all do not exceed; 0 without numbers. In the
    /// last place it is the largest number of all.
    pub fn percentile(&self, percent: u64) -> u64 {
        let wanted = (self.count().saturating_mul(percent)).div_ceil(100).max(1);
        let mut seen = 0u64;
        for (number, count) in self.counts.iter().enumerate() {
            seen = seen.saturating_add(*count);
            if seen >= wanted {
                let is_last = number + 1 == self.counts.len();
                return if is_last { self.max } else { number as u64 };
            }
        }
        0
    }

    /// What came since `earlier`; the largest is still that of all.
    pub fn since(&self, earlier: &Distribution) -> Distribution {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        let counts = self.counts.iter().zip(before);
        Distribution {
            counts: counts.map(|(now, before)| now.saturating_sub(before)).collect(),
            sum: self.sum.saturating_sub(earlier.sum),
            max: self.max,
        }
    }
}

/// WAL records applied to pages, by who applied them.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct RedoSplit {
    /// In this process.
    pub native: u64,
    /// By a wal-redo process.
    pub child: u64,
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
    /// All tenants of this core.
    fn tenants(&self) -> Vec<TenantInfo>;
    /// Changes tenants or timelines.
    async fn change(&self, change: Change) -> Result<(), ControlError>;
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
