//! `pgstrata attach` and `pgstrata import`: make a timeline on a running node, and watch it come.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::admin_client::{AdminClient, CommandError};
use crate::base::{TenantId, TenantShardId, TimelineId};
use crate::shard::control::{TimelineInfo, TimelineSource, TimelineState};

/// Which node and which timeline.
#[derive(clap::Args, Debug)]
pub struct TargetArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    pub admin: String,
    /// Tenant, 32 hexadecimal digits; a random one if not given.
    #[arg(long)]
    pub tenant: Option<TenantShardId>,
    /// Timeline, 32 hexadecimal digits; a random one if not given.
    #[arg(long)]
    pub timeline: Option<TimelineId>,
}

/// `pgstrata attach`.
#[derive(clap::Args, Debug)]
pub struct AttachArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// The running primary, as a libpq connection string; the role needs REPLICATION.
    #[arg(long, value_name = "CONNINFO")]
    primary: String,
    /// Physical replication slot to use; it is created if it does not exist. Without a slot the
    /// primary may recycle WAL that the node has not had yet.
    #[arg(long, value_name = "NAME")]
    slot: Option<String>,
}

/// `pgstrata import`.
#[derive(clap::Args, Debug)]
#[command(group(clap::ArgGroup::new("from").required(true).args(["backup", "pgdata"])))]
pub struct ImportArgs {
    #[command(flatten)]
    target: TargetArgs,
    /// Directory that pg_basebackup made, plain or tar.
    #[arg(long, value_name = "DIR")]
    backup: Option<PathBuf>,
    /// Data directory of a cleanly shut-down cluster.
    #[arg(long, value_name = "DIR")]
    pgdata: Option<PathBuf>,
    /// Go on by streaming from this primary (libpq connection string).
    #[arg(long, value_name = "CONNINFO")]
    primary: Option<String>,
    /// Physical replication slot to use.
    #[arg(long, value_name = "NAME", requires = "primary")]
    slot: Option<String>,
}

/// Runs `pgstrata attach`.
pub fn attach(args: AttachArgs) -> Result<(), CommandError> {
    let source = TimelineSource::Primary { conninfo: args.primary, slot: args.slot };
    make(&args.target, &source)
}

/// Runs `pgstrata import`.
pub fn import(args: ImportArgs) -> Result<(), CommandError> {
    let ImportArgs { target, backup, pgdata, primary, slot } = args;
    let source = match (backup, pgdata) {
        (Some(dir), _) => TimelineSource::Backup { path: absolute(&dir)?, primary, slot },
        (None, Some(dir)) => TimelineSource::Pgdata { path: absolute(&dir)?, primary, slot },
        (None, None) => return Err("give --backup or --pgdata".into()),
    };
    make(&target, &source)
}

fn absolute(path: &Path) -> Result<String, CommandError> {
    let full =
        std::fs::canonicalize(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let text = full.to_str().ok_or_else(|| format!("{} is no UTF-8", full.display()))?;
    Ok(text.to_owned())
}

fn make(target: &TargetArgs, source: &TimelineSource) -> Result<(), CommandError> {
    let client = AdminClient::new(&target.admin)?;
    let tenant = target.tenant.unwrap_or_else(|| TenantShardId::unsharded(TenantId(random_id())));
    let timeline = target.timeline.unwrap_or_else(|| TimelineId(random_id()));
    println!("tenant   {tenant}\ntimeline {timeline}");
    client.create_timeline(tenant, timeline, source)?;
    wait_until_active(&client, tenant, timeline, |line| println!("{line}"))?;
    Ok(())
}

/// A random identifier.
pub fn random_id() -> [u8; 16] {
    fastrand::u128(..).to_be_bytes()
}

/// Waits until a timeline that is being made is readable; gives a progress line every second.
pub fn wait_until_active(
    client: &AdminClient,
    tenant: TenantShardId,
    timeline: TimelineId,
    mut progress: impl FnMut(String),
) -> Result<TimelineInfo, CommandError> {
    const LOOK_MS: u64 = 100;
    let mut looks = 0u64;
    loop {
        let info = client.timeline(tenant, timeline)?;
        match info.state {
            TimelineState::Active | TimelineState::Idle => {
                progress(format!("readable from {} on", info.start_lsn));
                return Ok(info);
            }
            TimelineState::Broken => {
                return Err(info.error.unwrap_or_else(|| "the timeline is broken".into()).into());
            }
            TimelineState::Archived | TimelineState::Deleting => {
                return Err(format!("the timeline is {:?} by now", info.state).into());
            }
            TimelineState::Importing | TimelineState::CatchingUp => {}
        }
        looks += 1;
        if looks.is_multiple_of(10) {
            progress(progress_line(&info));
        }
        std::thread::sleep(Duration::from_millis(LOOK_MS));
    }
}

fn progress_line(info: &TimelineInfo) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    match info.import {
        Some(import) => {
            let done = import.bytes_done as f64 / MIB;
            match import.bytes_total {
                Some(total) => format!("base backup: {done:.0} of {:.0} MiB", total as f64 / MIB),
                None => format!("base backup: {done:.0} MiB"),
            }
        }
        None => {
            let (at, end) = (info.last_record_lsn, info.start_lsn);
            let trouble = info.wal_source_error.as_ref().map(|error| format!("; {error}"));
            let trouble = trouble.unwrap_or_default();
            format!("WAL of the base backup: at {at}, readable from {end} on{trouble}")
        }
    }
}

/// `pgstrata status`.
#[derive(clap::Args, Debug)]
pub struct StatusArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
}

/// Runs `pgstrata status`.
pub fn status(args: StatusArgs) -> Result<(), CommandError> {
    let timelines = AdminClient::new(&args.admin)?.timelines()?;
    let header = ["tenant", "timeline", "state", "last record", "journal", "on disk", "layers"];
    println!(
        "{:<37} {:<32} {:<11} {:<14} {:<14} {:<14} {:>6}",
        header[0], header[1], header[2], header[3], header[4], header[5], header[6]
    );
    for info in timelines {
        let state = format!("{:?}", info.state);
        println!(
            "{:<37} {:<32} {:<11} {:<14} {:<14} {:<14} {:>6}",
            info.tenant.to_string(),
            info.timeline.to_string(),
            state,
            info.last_record_lsn.to_string(),
            info.journal_lsn.to_string(),
            info.disk_consistent_lsn.to_string(),
            info.layer_count
        );
        if let Some(error) = info.error {
            println!("  {error}");
        }
        if let Some(error) = info.wal_source_error {
            println!("  WAL source: {error}");
        }
        if let Some(reason) = info.ingest_paused {
            println!("  ingest waits: {reason}");
        }
        for what in info.damaged {
            println!("  damaged: {what}");
        }
    }
    Ok(())
}
