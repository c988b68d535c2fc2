//! Replies about tenants and timelines as clients of other pageservers read them.
//!
//! Neon's load generator pagebench and its client library want certain fields, and ignore others;
//! our own fields stand beside theirs. Where both have a field of one name it has their meaning:
//! `state` is how far a timeline can be used, in their words, and `phase` is ours
//! ([`crate::shard::control::TimelineState`]).

use serde::Serialize;
use serde_json::{Value, json};

use crate::base::{Lsn, TenantShardId, TimelineId};
use crate::shard::control::{TenantInfo, TimelineInfo, TimelineState};

/// Major version of PostgreSQL that timelines are of.
const PG_VERSION: u32 = 15;

/// What a tenant is called, and that it is there.
#[derive(Serialize)]
pub(super) struct Attachment {
    id: TenantShardId,
    state: Value,
    attachment_status: Value,
    /// Of a node's right to write: there is one node for a tenant, so it never changes.
    generation: u32,
}

impl Attachment {
    fn of(info: &TenantInfo) -> Attachment {
        let (state, status) = match &info.error {
            None => (json!({ "slug": "Active" }), json!({ "slug": "attached" })),
            Some(reason) => {
                let data = json!({ "reason": reason, "backtrace": "" });
                let failed = json!({ "slug": "failed", "data": { "reason": reason } });
                (json!({ "slug": "Broken", "data": data }), failed)
            }
        };
        Attachment { id: info.tenant, state, attachment_status: status, generation: 1 }
    }
}

/// A tenant in a list.
#[derive(Serialize)]
pub(super) struct Tenant {
    #[serde(flatten)]
    info: TenantInfo,
    #[serde(flatten)]
    attachment: Attachment,
    timelines: Vec<Timeline>,
}

impl Tenant {
    pub(super) fn new(info: TenantInfo, timelines: Vec<TimelineInfo>) -> Tenant {
        let timelines = timelines.into_iter().map(Timeline::new).collect();
        Tenant { attachment: Attachment::of(&info), info, timelines }
    }

    pub(super) fn id(&self) -> TenantShardId {
        self.info.tenant
    }
}

/// A tenant by itself.
#[derive(Serialize)]
pub(super) struct TenantDetails {
    #[serde(flatten)]
    info: TenantInfo,
    #[serde(flatten)]
    attachment: Attachment,
    timelines: Vec<TimelineId>,
}

impl TenantDetails {
    pub(super) fn new(info: TenantInfo, timelines: &[TimelineInfo]) -> TenantDetails {
        let timelines = timelines.iter().map(|timeline| timeline.timeline).collect();
        TenantDetails { attachment: Attachment::of(&info), info, timelines }
    }
}

/// A timeline.
#[derive(Serialize)]
pub(super) struct Timeline {
    #[serde(flatten)]
    info: TimelineInfo,
    tenant_id: TenantShardId,
    timeline_id: TimelineId,
    state: Value,
    ancestor_timeline_id: Option<TimelineId>,
    ancestor_lsn: Option<Lsn>,
    initdb_lsn: Lsn,
    applied_gc_cutoff_lsn: Lsn,
    min_readable_lsn: Lsn,
    /// Nothing is uploaded anywhere.
    remote_consistent_lsn: Lsn,
    remote_consistent_lsn_visible: Lsn,
    current_physical_size: u64,
    current_logical_size: u64,
    current_logical_size_is_accurate: bool,
    pitr_history_size: u64,
    within_ancestor_pitr: bool,
    /// Of their kinds of directories there is none.
    directory_entries_counts: [u64; 0],
    is_archived: bool,
    pg_version: u32,
    walreceiver_status: &'static str,
}

impl Timeline {
    pub(super) fn new(info: TimelineInfo) -> Timeline {
        let source = match (&info.wal_source, info.wal_source_connected) {
            (None, _) => "no WAL source",
            (Some(_), true) => "streaming",
            (Some(_), false) => "not connected",
        };
        Timeline {
            tenant_id: info.tenant,
            timeline_id: info.timeline,
            state: usable(&info),
            ancestor_timeline_id: info.ancestor.as_ref().map(|point| point.timeline),
            ancestor_lsn: info.ancestor.as_ref().map(|point| point.lsn),
            initdb_lsn: info.start_lsn,
            applied_gc_cutoff_lsn: info.gc_cutoff_lsn,
            min_readable_lsn: info.gc_cutoff_lsn.max(info.start_lsn),
            remote_consistent_lsn: Lsn::INVALID,
            remote_consistent_lsn_visible: Lsn::INVALID,
            current_physical_size: info.layer_bytes,
            current_logical_size: info.logical_bytes.unwrap_or(0),
            current_logical_size_is_accurate: info.logical_bytes.is_some(),
            pitr_history_size: info.history_bytes,
            within_ancestor_pitr: false,
            directory_entries_counts: [],
            is_archived: info.state == TimelineState::Archived,
            pg_version: PG_VERSION,
            walreceiver_status: source,
            info,
        }
    }
}

/// How far a timeline can be used, in the words of Neon's `TimelineState`.
fn usable(info: &TimelineInfo) -> Value {
    match info.state {
        TimelineState::Active | TimelineState::Idle | TimelineState::Archived => json!("Active"),
        TimelineState::Importing | TimelineState::CatchingUp => json!("Loading"),
        TimelineState::Deleting => json!("Stopping"),
        TimelineState::Broken => {
            let reason = info.error.as_deref().unwrap_or_default();
            json!({ "Broken": { "reason": reason, "backtrace": "" } })
        }
    }
}
