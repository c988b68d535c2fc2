//! Those commands of `pgstrata timeline` that ask about a timeline's history, hold it, cut it.

use serde::Deserialize;

use super::admin_client::{AdminClient, CommandError};
use crate::base::{Lsn, TenantShardId, TimelineId, Timestamp};
use crate::shard::gc::GcRequest;
use crate::shard::history::{LsnByTimestamp, TimeKind};
use crate::shard::leases::Lease;

/// Subcommands of `pgstrata timeline`.
#[derive(clap::Subcommand, Debug)]
pub(super) enum HistoryCommand {
    /// The LSN of a point in time: nothing before it was committed later.
    LsnByTimestamp {
        /// Which timeline.
        #[command(flatten)]
        target: Target,
        /// RFC 3339, such as 2026-03-25T14:03:27Z or "2026-03-25 15:03:27+01:00".
        timestamp: Timestamp,
    },
    /// When the last commit at or before an LSN was.
    TimestampOfLsn {
        /// Which timeline.
        #[command(flatten)]
        target: Target,
        /// As PostgreSQL writes it: 0/16B3748.
        lsn: Lsn,
    },
    /// Keep an LSN readable for a time, or show what is kept.
    Lease {
        /// Which timeline.
        #[command(flatten)]
        target: Target,
        /// The LSN; without it, the leases that last are shown.
        lsn: Option<Lsn>,
        /// How long from now, in seconds; a lease that lasts longer stays as it is.
        #[arg(long, requires = "lsn")]
        seconds: Option<u64>,
    },
    /// Remove, now, layers that no allowed read can need.
    Gc {
        /// Which timeline.
        #[command(flatten)]
        target: Target,
        /// Bytes of WAL before the newest record that stay readable, instead of the setting.
        #[arg(long, value_name = "BYTES")]
        horizon_bytes: Option<u64>,
        /// What was committed within so many seconds stays readable, instead of the setting.
        #[arg(long, value_name = "SECONDS")]
        pitr_interval_s: Option<u64>,
    },
}

/// A timeline of a running node.
#[derive(clap::Args, Debug)]
pub(super) struct Target {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    pub(super) admin: String,
    /// Tenant, 32 hexadecimal digits.
    #[arg(long)]
    pub(super) tenant: TenantShardId,
    /// Timeline, 32 hexadecimal digits.
    #[arg(long)]
    pub(super) timeline: TimelineId,
}

impl Target {
    fn client(&self) -> Result<AdminClient, CommandError> {
        AdminClient::new(&self.admin)
    }
}

/// Runs one of them.
pub(super) fn run(command: HistoryCommand) -> Result<(), CommandError> {
    match command {
        HistoryCommand::LsnByTimestamp { target, timestamp } => {
            lsn_by_timestamp(&target, timestamp)
        }
        HistoryCommand::TimestampOfLsn { target, lsn } => timestamp_of_lsn(&target, lsn),
        HistoryCommand::Lease { target, lsn: Some(lsn), seconds } => {
            let lease = target.client()?.lease(target.tenant, target.timeline, lsn, seconds)?;
            println!("{} stays readable until {}", lease.lsn, lease.valid_until);
            Ok(())
        }
        HistoryCommand::Lease { target, lsn: None, .. } => leases(&target),
        HistoryCommand::Gc { target, horizon_bytes, pitr_interval_s } => {
            gc(&target, GcRequest { gc_horizon_bytes: horizon_bytes, pitr_interval_s })
        }
    }
}

fn lsn_by_timestamp(target: &Target, timestamp: Timestamp) -> Result<(), CommandError> {
    let query = [("timestamp", timestamp.to_string())];
    let path = "get_lsn_by_timestamp";
    let answer: LsnByTimestamp =
        target.client()?.history(target.tenant, target.timeline, path, &query)?;
    match (answer.lsn, answer.kind) {
        (Some(lsn), TimeKind::Future) => println!("{lsn} (nothing was committed later)"),
        (Some(lsn), _) => println!("{lsn}"),
        (None, TimeKind::Nodata) => return Err("no commit is known yet".into()),
        (None, _) => {
            return Err(
                format!("no readable LSN is known before the commits after {timestamp}").into()
            );
        }
    }
    Ok(())
}

fn timestamp_of_lsn(target: &Target, lsn: Lsn) -> Result<(), CommandError> {
    #[derive(Deserialize)]
    struct Answer {
        timestamp: Option<Timestamp>,
    }
    let query = [("lsn", lsn.to_string())];
    let path = "get_timestamp_of_lsn";
    let answer: Answer = target.client()?.history(target.tenant, target.timeline, path, &query)?;
    let timestamp = answer.timestamp.ok_or("no commit at or before that LSN is known")?;
    println!("{timestamp}");
    Ok(())
}

fn leases(target: &Target) -> Result<(), CommandError> {
    #[derive(Deserialize)]
    struct Answer {
        gc_cutoff_lsn: Lsn,
        leases: Vec<Lease>,
    }
    let answer: Answer =
        target.client()?.history(target.tenant, target.timeline, "lsn_lease", &[])?;
    println!("readable from {} on", answer.gc_cutoff_lsn);
    for lease in answer.leases {
        println!("{} until {}", lease.lsn, lease.valid_until);
    }
    Ok(())
}

fn gc(target: &Target, request: GcRequest) -> Result<(), CommandError> {
    let report = target.client()?.collect_garbage(target.tenant, target.timeline, request)?;
    println!(
        "readable from {} on (before: {}), and at {} LSNs that branches or leases hold",
        report.gc_cutoff_lsn, report.cutoff_before, report.retained_lsns
    );
    println!(
        "removed {} of {} layers, {} bytes",
        report.layers_removed, report.layers_before, report.bytes_removed
    );
    if report.held_by_reads > 0 {
        println!("{} files go when the reads that hold them end", report.held_by_reads);
    }
    for name in &report.removed {
        println!("  {name}");
    }
    let unnamed = report.layers_removed.saturating_sub(report.removed.len() as u64);
    if unnamed > 0 {
        println!("  and {unnamed} more");
    }
    Ok(())
}
