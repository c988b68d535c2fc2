//! `pgstrata redo replay`: an input of a failed redo once more ([`super::redo_replay`]).
//!
//! `pgstrata redo compare`: native redo against the wal-redo child, on WAL of a load of its own or
//! on WAL that is there.
//!
//! With a load: a stock primary is made, its data directory copied before it ever starts, the load
//! runs, the primary is stopped, and all WAL since the copy is compared
//! ([`super::redo_compare`]). At the end of each load a stock server recovers the copy up to there,
//! and its files are compared too ([`super::redo_recovery`]).

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_lite::future::block_on;

use super::admin_client::CommandError;
use super::pg::{PgCluster, StopMode, bin_dir, control_data};
use super::redo_compare::{Compare, CompareReport, LIKE_TPCC, PGBENCH, read_wal};
use super::redo_recovery::{Recovery, Stop};
use super::redo_replay::{ReplayArgs, replay};
use super::scratch::Scratch;
use super::service::find_library;
use super::verify_files::{DataDirectory, scan};
use super::{oracle, tpcc, workload};
use crate::base::Lsn;
use crate::redo::RedoSettings;
use crate::redo::child::{ChildRedo, ChildSettings};

/// `pgstrata redo`.
#[derive(clap::Args, Debug)]
pub struct RedoArgs {
    #[command(subcommand)]
    command: RedoCommand,
}

#[derive(clap::Subcommand, Debug)]
enum RedoCommand {
    /// Compare native redo with PostgreSQL's, record by record, raw bytes.
    Compare(CompareArgs),
    /// Carry out a redo that failed in a node once more, from the file that the node kept.
    Replay(ReplayArgs),
}

/// What runs on the primary.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// pgbench.
    Pgbench,
    /// Every kind of index, DDL, vacuum, locks, two-phase commit, databases.
    Mixed,
    /// Orders, payments and deliveries of warehouses, like TPC-C.
    Tpcc,
    /// All of them, one after the other.
    All,
}

impl Load {
    /// True if `one`, which is not `All`, is to run.
    pub fn has(self, one: Load) -> bool {
        self == one || self == Load::All
    }
}

/// `pgstrata redo compare`.
#[derive(clap::Args, Debug)]
pub struct CompareArgs {
    /// Compare this WAL (a directory of segments of 16 MiB) instead of making some.
    #[arg(long, value_name = "DIR", requires = "from")]
    wal: Option<PathBuf>,
    /// Start of the first record to compare.
    #[arg(long, requires = "wal")]
    from: Option<Lsn>,
    /// Stop after the last record that ends at or before this position; otherwise at the end of
    /// the WAL.
    #[arg(long)]
    to: Option<Lsn>,
    /// The data directory as it was at the first position; without it, pages of which the WAL has no
    /// image begin as zeros.
    #[arg(long, value_name = "DIR", requires = "wal")]
    pgdata: Option<PathBuf>,
    /// The WAL is of a cluster with data checksums or `wal_log_hints`.
    #[arg(long, requires = "wal")]
    hint_bits: bool,
    /// What runs on the primary that is made.
    #[arg(long, value_enum, default_value = "all")]
    workload: Load,
    /// pgbench's scale.
    #[arg(long, default_value_t = 5)]
    scale: u32,
    /// Transactions of each of pgbench's four clients.
    #[arg(long, default_value_t = 5000)]
    transactions: u32,
    /// Warehouses of the load like TPC-C.
    #[arg(long, default_value_t = 2)]
    warehouses: u32,
    /// Transactions of each of its four clients.
    #[arg(long, default_value_t = 1000)]
    orders: u32,
    /// Runs of pgbench and of the load like TPC-C, each followed by stock recovery up to its end.
    #[arg(long, default_value_t = 1)]
    rounds: u32,
    /// Size of the mixed workload.
    #[arg(long, default_value_t = 1)]
    size: u32,
    /// The primary has data checksums.
    #[arg(long)]
    data_checksums: bool,
    /// A setting of the primary, such as full_page_writes=off.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
    /// Fail if fewer records that change pages were compared.
    #[arg(long, default_value_t = 0, value_name = "RECORDS")]
    at_least: u64,
    /// The wal-redo library; as a rule it is found beside this program.
    #[arg(long, value_name = "FILE")]
    library: Option<PathBuf>,
}

/// Runs `pgstrata redo`.
pub fn run(args: RedoArgs) -> Result<(), CommandError> {
    let args = match args.command {
        RedoCommand::Compare(args) => args,
        RedoCommand::Replay(args) => return replay(args),
    };
    let report = compare(&args, &Scratch::new("compare")?)?;
    Ok(report.judge(args.at_least)?)
}

fn say(text: &str) {
    println!("==> {text}");
}

fn compare(args: &CompareArgs, root: &Path) -> Result<CompareReport, CommandError> {
    if let (Some(wal), Some(from)) = (&args.wal, args.from) {
        let base = match &args.pgdata {
            Some(data) => scan(data)?,
            None => DataDirectory::default(),
        };
        return compare_wal(args, root, wal, from, &base, args.hint_bits, None);
    }
    let logs_hints = |setting: &String| setting.replace(' ', "") == "wal_log_hints=on";
    let hint_bits = args.data_checksums || args.settings.iter().any(logs_hints);
    let made = make_wal(args, root)?;
    let recovery = Recovery::new(&root.join("recovery"), &made.base, &made.primary)?;
    let judge = Some((recovery, made.stops));
    let wal = made.primary.data().join("pg_wal");
    compare_wal(args, root, &wal, made.from, &scan(&made.base)?, hint_bits, judge)
}

/// A primary that has run its loads and is stopped.
struct Made {
    primary: PgCluster,
    /// Its data directory from before that.
    base: PathBuf,
    /// Where its WAL begins.
    from: Lsn,
    stops: Vec<Stop>,
}

/// Runs the loads on a fresh primary.
fn make_wal(args: &CompareArgs, root: &Path) -> Result<Made, CommandError> {
    say("making a stock PostgreSQL 15 primary");
    let mut settings: Vec<String> = vec![
        "wal_keep_size = 100GB".to_owned(),
        "synchronous_commit = off".to_owned(),
        "autovacuum_naptime = 2s".to_owned(),
    ];
    for setting in &args.settings {
        let (name, value) =
            setting.split_once('=').ok_or_else(|| format!("--set {setting}: write NAME=VALUE"))?;
        settings.push(format!("{} = '{}'", name.trim(), value.trim()));
    }
    let mut primary = PgCluster::init(&root.join("primary"), args.data_checksums, &settings)?;
    let base = root.join("base");
    let copied =
        std::process::Command::new("cp").arg("-a").args([primary.data(), &base]).status()?;
    if !copied.success() {
        return Err("the data directory could not be copied".into());
    }
    let from = control_data(primary.data(), "Latest checkpoint's REDO location")?.parse()?;
    primary.start()?;
    let stops = run_loads(args, root, &primary)?;
    primary.stop(StopMode::Fast)?;
    Ok(Made { primary, base, from, stops })
}

fn run_loads(
    args: &CompareArgs,
    root: &Path,
    primary: &PgCluster,
) -> Result<Vec<Stop>, CommandError> {
    let rounds = args.rounds.max(1);
    let (transactions, orders) = (args.transactions / rounds, args.orders / rounds);
    let mut stops = Vec::new();
    let mut stop = |load: &str| -> Result<(), CommandError> {
        stops.push(Stop { load: load.to_owned(), mark: oracle::mark(primary)? });
        Ok(())
    };
    if args.workload.has(Load::Pgbench) {
        say(&format!("pgbench: scale {}, {rounds} x 4 x {transactions}", args.scale));
        primary.pgbench_init("postgres", args.scale)?;
        let transactions = transactions.to_string();
        for _ in 0..rounds {
            primary.pgbench("postgres", &["-c", "4", "-j", "1", "-t", &transactions], |_| {})?;
            primary.psql("postgres", "VACUUM")?;
            stop(PGBENCH)?;
        }
    }
    if args.workload.has(Load::Tpcc) {
        say(&format!("like TPC-C: {} warehouses, {rounds} x 4 x {orders}", args.warehouses));
        tpcc::init(primary, args.warehouses)?;
        for _ in 0..rounds {
            tpcc::run(primary, &root.join("tpcc"), args.warehouses, orders)?;
            primary.psql(tpcc::DATABASE, "VACUUM")?;
            stop(LIKE_TPCC)?;
        }
    }
    if args.workload.has(Load::Mixed) {
        workload::mixed(primary, args.size, &say)?;
        stop("mixed")?;
        workload::rare(primary)?;
        stop("rare kinds")?;
    }
    Ok(stops)
}

fn compare_wal(
    args: &CompareArgs,
    root: &Path,
    wal: &Path,
    from: Lsn,
    base: &DataDirectory,
    hint_bits_logged: bool,
    judge: Option<(Recovery, Vec<Stop>)>,
) -> Result<CompareReport, CommandError> {
    let redo = RedoSettings { hint_bits_logged };
    let scratch = root.join("redo");
    // The child's user has to get through.
    std::fs::create_dir_all(&scratch)?;
    let child = ChildRedo::new(ChildSettings {
        tenant: "compare".to_owned(),
        postgres_bin: bin_dir().join("postgres"),
        walredo_so: std::path::absolute(find_library(&args.library.clone().unwrap_or_default())?)?,
        scratch_dir: scratch,
        cpu: None,
        redo,
        timeout: Duration::from_secs(60),
    });
    say(&format!("comparing every page version from {from} on"));
    let begin = Instant::now();
    let mut compare = Compare::new(&child, redo, base);
    let (mut recovery, stops) = judge.map_or((None, Vec::new()), |(one, two)| (Some(one), two));
    let mut stops = stops.into_iter().peekable();
    let mut recovered_well = true;
    let end = read_wal(wal, from, |record| {
        if args.to.is_some_and(|to| record.end > to) {
            return Ok(false);
        }
        block_on(compare.record(&record))?;
        while let Some(stop) = stops.next_if(|stop| record.end >= stop.mark.end) {
            compare.end_load(&stop.load);
            if let Some(recovery) = &mut recovery {
                recovered_well &= judge_by(recovery, &stop, &compare)?;
            }
        }
        Ok(true)
    })?;
    if let Some(stop) = stops.next() {
        return Err(format!("the WAL ends at {end}, before {}", stop.mark.end).into());
    }
    let report = block_on(compare.finish());
    block_on(child.shutdown());
    print!("{}", report.table());
    say(&format!("WAL from {from} to {end}, {:.1} s", begin.elapsed().as_secs_f64()));
    match recovered_well {
        true => Ok(report),
        false => Err("stock recovery made other pages".into()),
    }
}

/// Compares with stock recovery at a stop; true if all is equal.
fn judge_by(
    recovery: &mut Recovery,
    stop: &Stop,
    compare: &Compare<'_>,
) -> Result<bool, CommandError> {
    let outcome = recovery.compare(stop.mark, compare)?;
    println!(
        "stock recovery to {} ({}): {} pages, {} different; {} without a file",
        stop.mark.end, stop.load, outcome.pages, outcome.different, outcome.left_out
    );
    print!("{}", outcome.details);
    Ok(outcome.different == 0 && outcome.pages > 0)
}
