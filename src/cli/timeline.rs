//! `pgstrata timeline`: branch, delete, archive and detach timelines of a running node.

use std::time::Duration;

use super::admin_client::{AdminClient, CommandError};
use super::attach::random_id;
use super::history::{self, HistoryCommand, Target};
use crate::base::{Lsn, TenantShardId, TimelineId};
use crate::shard::control::TimelineInfo;
use crate::shard::index::WalSourceConfig;

/// Pause between two looks at a timeline that is being detached.
const LOOK: Duration = Duration::from_millis(100);

/// `pgstrata timeline`.
#[derive(clap::Args, Debug)]
pub struct TimelineArgs {
    #[command(subcommand)]
    command: TimelineCommand,
}

#[derive(clap::Subcommand, Debug)]
enum TimelineCommand {
    /// Show the timelines of a tenant with their ancestors and sizes.
    List(ListArgs),
    /// Make a branch: a timeline with all of another's history up to an LSN. Nothing is copied.
    Branch(BranchArgs),
    /// Remove a timeline that has no branches.
    Delete(Target),
    /// Take in no more WAL and refuse reads; branches stay readable.
    Archive(Target),
    /// Take archiving back.
    Unarchive(Target),
    /// Copy what a branch needs of its ancestor, so that it stands alone.
    DetachAncestor(Target),
    #[command(flatten)]
    History(HistoryCommand),
}

#[derive(clap::Args, Debug)]
struct ListArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
    /// Tenant, 32 hexadecimal digits.
    #[arg(long)]
    tenant: TenantShardId,
}

#[derive(clap::Args, Debug)]
struct BranchArgs {
    /// Address of the node's admin API.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
    /// Tenant, 32 hexadecimal digits.
    #[arg(long)]
    tenant: TenantShardId,
    /// The timeline to branch off.
    #[arg(long, value_name = "TIMELINE")]
    from: TimelineId,
    /// Where to branch off, such as 0/1A2B3C0; the end of the WAL that the node has, if not given.
    #[arg(long)]
    lsn: Option<Lsn>,
    /// Name of the branch, 32 hexadecimal digits; a random one if not given.
    #[arg(long)]
    timeline: Option<TimelineId>,
    /// Where the branch gets WAL of its own, from the branch point on (libpq connection string).
    #[arg(long, value_name = "CONNINFO")]
    primary: Option<String>,
    /// Physical replication slot to use.
    #[arg(long, value_name = "NAME", requires = "primary")]
    slot: Option<String>,
}

/// Runs `pgstrata timeline`.
pub fn run(args: TimelineArgs) -> Result<(), CommandError> {
    match args.command {
        TimelineCommand::List(args) => list(&args),
        TimelineCommand::Branch(args) => branch(args),
        TimelineCommand::Delete(args) => {
            AdminClient::new(&args.admin)?.delete_timeline(args.tenant, args.timeline)
        }
        TimelineCommand::Archive(args) => change(&args, "archive"),
        TimelineCommand::Unarchive(args) => change(&args, "unarchive"),
        TimelineCommand::DetachAncestor(args) => detach(&args),
        TimelineCommand::History(command) => history::run(command),
    }
}

fn change(args: &Target, what: &str) -> Result<(), CommandError> {
    AdminClient::new(&args.admin)?.change_timeline(args.tenant, args.timeline, what)
}

fn branch(args: BranchArgs) -> Result<(), CommandError> {
    let client = AdminClient::new(&args.admin)?;
    let timeline = args.timeline.unwrap_or_else(|| TimelineId(random_id()));
    let source = args.primary.map(|conninfo| WalSourceConfig { conninfo, slot: args.slot });
    client.create_branch(args.tenant, timeline, args.from, args.lsn, source.as_ref())?;
    let info = client.timeline(args.tenant, timeline)?;
    println!("timeline {timeline}");
    if let Some(point) = info.ancestor {
        println!("branched off {} at {}", point.timeline, point.lsn);
    }
    Ok(())
}

fn list(args: &ListArgs) -> Result<(), CommandError> {
    let timelines = AdminClient::new(&args.admin)?.timelines_of(args.tenant)?;
    println!(
        "{:<32} {:<10} {:<14} {:<14} {:<32} {:<14} {:>10} {:>10} {:>10}",
        "timeline",
        "state",
        "gc cutoff",
        "last record",
        "ancestor",
        "branch point",
        "logical",
        "physical",
        "history"
    );
    for info in timelines {
        let (ancestor, lsn) = match info.ancestor {
            Some(point) => (point.timeline.to_string(), point.lsn.to_string()),
            None => ("-".to_owned(), "-".to_owned()),
        };
        println!(
            "{:<32} {:<10} {:<14} {:<14} {ancestor:<32} {lsn:<14} {:>10} {:>10} {:>10}",
            info.timeline.to_string(),
            format!("{:?}", info.state),
            info.gc_cutoff_lsn.to_string(),
            info.last_record_lsn.to_string(),
            info.logical_bytes.map_or("-".to_owned(), mebibytes),
            mebibytes(info.layer_bytes),
            mebibytes(info.history_bytes),
        );
        if let Some(error) = info.error {
            println!("  {error}");
        }
        if let Some(error) = info.detach.and_then(|detach| detach.error) {
            println!("  not detached: {error}");
        }
    }
    Ok(())
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1024.0 * 1024.0))
}

fn detach(args: &Target) -> Result<(), CommandError> {
    change(args, "detach_ancestor")?;
    let client = AdminClient::new(&args.admin)?;
    let mut looks = 0u64;
    loop {
        let info = client.timeline(args.tenant, args.timeline)?;
        match progress(&info) {
            Progress::Done => return Ok(()),
            Progress::Failed(error) => return Err(error.into()),
            Progress::Values(values) if looks.is_multiple_of(10) => println!("{values} pages"),
            Progress::Values(_) => {}
        }
        looks += 1;
        std::thread::sleep(LOOK);
    }
}

enum Progress {
    Done,
    Failed(String),
    Values(u64),
}

fn progress(info: &TimelineInfo) -> Progress {
    match (&info.ancestor, &info.detach) {
        (None, _) => Progress::Done,
        (Some(_), Some(state)) => match &state.error {
            Some(error) => Progress::Failed(error.clone()),
            None => Progress::Values(state.values),
        },
        (Some(_), None) => Progress::Failed("the node was started again meanwhile".to_owned()),
    }
}
