//! `pgstrata demo`: a node, a primary, load, and the proof.
//!
//! 1. A stock primary is made and filled; a node is started as a child process and attached.
//! 2. A base backup for the oracle is taken while the primary is quiet.
//! 3. Load runs; if asked for, the node is killed in the middle of it, several times.
//! 4. At a checkpoint of the primary, everything that the node serves is compared with the files
//!    of a stock stand-by that stopped at the same LSN ([`super::oracle`]); then the node is
//!    stopped, started again, and compared once more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::admin_client::CommandError;
use super::attach::wait_until_active;
use super::demo_node::DemoNode;
use super::kills::{Followed, Kills};
use super::oracle::{self, Mark};
use super::page_client::PageClient;
use super::pg::PgCluster;
use super::scratch::Scratch;
use super::verify::verify;
use super::verify_wal::verify_images;
use super::{verify_files, workload};
use crate::base::{Lsn, RelTag, TenantId, TenantShardId, TimelineId};
use crate::shard::control::TimelineSource;
use crate::shard::tenant_config::TenantConfig;

const TENANT: TenantId = TenantId([0x11; 16]);
const TIMELINE: TimelineId = TimelineId([0x22; 16]);
/// Replication slot of the node.
const SLOT: &str = "pgstrata";
/// Pause between two looks at which files the primary has.
const LOOK_PAUSE: Duration = Duration::from_millis(700);
/// Kills come within this part of pgbench's time.
const KILL_TIME: f64 = 0.9;
/// Kills come within this time of another load.
const MIXED_TIME: Duration = Duration::from_secs(3);
/// Time for the node to take in what the primary has written.
const CATCH_UP: Duration = Duration::from_secs(120);

/// What runs on the primary.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Load {
    /// pgbench.
    Pgbench,
    /// Every kind of index, DDL, vacuum, locks, two-phase commit, databases.
    Mixed,
    /// Both, one after the other.
    All,
}

/// `pgstrata demo`.
#[derive(clap::Args, Debug)]
pub struct DemoArgs {
    /// Stop everything at the end instead of waiting for Ctrl-C.
    #[arg(long)]
    exit: bool,
    /// pgbench's scale.
    #[arg(long, default_value_t = 10)]
    scale: u32,
    /// Seconds of pgbench.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// What runs on the primary.
    #[arg(long, value_enum, default_value = "pgbench")]
    workload: Load,
    /// Size of the mixed workload.
    #[arg(long, default_value_t = 1)]
    size: u32,
    /// The primary has data checksums.
    #[arg(long)]
    data_checksums: bool,
    /// A setting of the primary, such as full_page_writes=off.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    settings: Vec<String>,
    /// Kill the node (SIGKILL) so many times during the load, at moments that are drawn.
    #[arg(long, default_value_t = 0)]
    kill: u32,
    /// Seed of these moments.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The primary writes the image of every page after every record into the WAL
    /// (wal_consistency_checking = all), and each is compared with the page that the node
    /// rebuilds at that LSN.
    #[arg(long)]
    check_images: bool,
    /// A setting of the node.
    #[arg(short = 'c', value_name = "KEY=VALUE")]
    node_settings: Vec<String>,
}

fn say(text: &str) {
    println!("==> {text}");
}

/// Runs the demo; fails if anything differs.
pub fn demo(args: DemoArgs) -> Result<(), CommandError> {
    run(&args, &Scratch::new("demo")?)
}

fn run(args: &DemoArgs, root: &Path) -> Result<(), CommandError> {
    let primary = make_primary(args, root)?;
    say("starting a node");
    let mut node = DemoNode::start(&root.join("node"), &args.node_settings)?;
    say(&format!("attaching it to the primary: {}", primary.conninfo()));
    let tenant = TenantShardId::unsharded(TENANT);
    let source =
        TimelineSource::Primary { conninfo: primary.conninfo(), slot: Some(SLOT.to_owned()) };
    node.admin()?.create_timeline(tenant, TIMELINE, &source)?;
    wait_until_active(&node.admin()?, tenant, TIMELINE, |line| println!("    {line}"))?;
    say("taking a base backup for the stand-by that will be the judge");
    let standby_dir = root.join("standby");
    primary.base_backup(&standby_dir)?;
    primary.psql("postgres", "ALTER SYSTEM SET autovacuum = on")?;
    primary.psql("postgres", "SELECT pg_reload_conf()")?;

    let seen = load(args, &primary, &mut node)?;
    // Both comparisons are at one LSN, while WAL goes on behind it.
    let keep = TenantConfig { gc_period_s: Some(0), ..TenantConfig::default() };
    node.admin()?.configure_tenant(tenant, &keep)?;
    let mark = oracle::mark(&primary)?;
    say(&format!("waiting until the node has taken in WAL up to {}", mark.end));
    wait_for(&node, mark.end)?;
    say("replaying the same WAL on a stock stand-by, up to the same LSN");
    let mut standby = oracle::prepare(&standby_dir, &primary, &[])?;
    oracle::replay(&mut standby, mark)?;
    say("comparing every block of every relation fork");
    prove(args, &node, &standby, mark, &seen)?;
    if args.check_images {
        prove_images(&node, &primary, mark)?;
    }
    say("stopping the node (SIGTERM), starting it again, comparing once more");
    node.stop()?;
    node.start_again()?;
    wait_for(&node, mark.end)?;
    prove(args, &node, &standby, mark, &seen)?;
    say("no block differs");
    if !args.exit {
        println!("\nThe primary:   psql '{} dbname=postgres'", primary.conninfo());
        println!("Page service:  {}   (tenant {TENANT}, timeline {TIMELINE})", node.page_address());
        println!("Admin API:     {}/v1/tenant, {}/metrics", node.admin_url(), node.admin_url());
        println!("Ctrl-C stops everything.");
        wait_for_ctrl_c()?;
    }
    node.stop()
}

fn make_primary(args: &DemoArgs, root: &Path) -> Result<PgCluster, CommandError> {
    say("making a stock PostgreSQL 15 primary");
    let mut settings: Vec<String> = args
        .settings
        .iter()
        .map(|setting| match setting.split_once('=') {
            Some((name, value)) => Ok(format!("{name} = '{value}'")),
            None => Err(format!("--set {setting}: write NAME=VALUE")),
        })
        .collect::<Result<_, _>>()?;
    if args.check_images {
        settings.push("wal_consistency_checking = all".to_owned());
    }
    // Quiet until both base backups are taken: hint bits are not in the WAL.
    settings.push("autovacuum = off".to_owned());
    let mut primary = PgCluster::init(&root.join("primary"), args.data_checksums, &settings)?;
    primary.start()?;
    if args.workload != Load::Mixed {
        say(&format!("pgbench -i -s {}", args.scale));
        primary.pgbench_init("postgres", args.scale)?;
    }
    for database in ["postgres", "template1"] {
        primary.psql(database, "VACUUM")?;
    }
    oracle::keep_wal(&primary)?;
    primary.psql("postgres", "CHECKPOINT")?;
    Ok(primary)
}

/// Runs the load, kills the node in the middle if asked to; returns all forks that were ever
/// seen on the primary's disk.
fn load(
    args: &DemoArgs,
    primary: &PgCluster,
    node: &mut DemoNode,
) -> Result<Vec<RelTag>, CommandError> {
    let done = AtomicBool::new(false);
    let mut seen = BTreeSet::new();
    let followed =
        Followed { tenant: TenantShardId::unsharded(TENANT), timeline: TIMELINE, slot: SLOT };
    let time = match args.workload {
        Load::Pgbench => Duration::from_secs(args.seconds.into()).mul_f64(KILL_TIME),
        // Nobody knows how long it takes; at least so long.
        Load::Mixed | Load::All => MIXED_TIME,
    };
    let mut kills = Kills::new(followed, args.kill, time, args.seed);
    let result = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let result = run_load(args, primary);
            done.store(true, Ordering::Release);
            result.map_err(|error| error.to_string())
        });
        let mut killed = Ok(());
        let mut next_look = Instant::now();
        while !done.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(20));
            // Files come and go while they are listed; the next look sees the rest.
            if Instant::now() >= next_look
                && let Ok(files) = verify_files::scan(primary.data())
            {
                seen.extend(files.forks.keys().copied());
                next_look = Instant::now() + LOOK_PAUSE;
            }
            if killed.is_ok() {
                killed = kills.tick(primary, node).map_err(|error| error.to_string());
            }
        }
        let finished = worker.join().unwrap_or_else(|_| Err("the load panicked".to_owned()));
        finished.and(killed)
    });
    result?;
    if kills.missing() > 0 {
        let missing = kills.missing();
        return Err(format!("the load ended {missing} kills of {} too early", args.kill).into());
    }
    if args.kill > 0 {
        kills.finish(node)?;
        println!("    {kills}");
    }
    Ok(seen.into_iter().collect())
}

fn run_load(args: &DemoArgs, primary: &PgCluster) -> Result<(), CommandError> {
    if args.workload != Load::Mixed {
        let seconds = args.seconds.to_string();
        say(&format!("pgbench -c 4 -T {seconds}"));
        let options = ["-c", "4", "-j", "2", "-P", "5", "-T", &seconds];
        primary.pgbench("postgres", &options, |line| println!("    {line}"))?;
    }
    if args.workload != Load::Pgbench {
        say("mixed workload");
        workload::mixed(primary, args.size, &|line| println!("    {line}"))?;
    }
    Ok(())
}

fn wait_for(node: &DemoNode, lsn: Lsn) -> Result<(), CommandError> {
    let client = node.admin()?;
    let mut reached = (Lsn::INVALID, Instant::now());
    loop {
        let info = client.timeline(TenantShardId::unsharded(TENANT), TIMELINE)?;
        if let Some(error) = info.error {
            return Err(error.into());
        }
        // A node that is slower than the load may be far behind, but it goes on.
        if info.last_record_lsn > reached.0 {
            reached = (info.last_record_lsn, Instant::now());
        }
        if info.last_record_lsn >= lsn {
            return Ok(());
        }
        if reached.1.elapsed() > CATCH_UP {
            return Err(format!("the node is at {}, not at {lsn}", info.last_record_lsn).into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn prove(
    args: &DemoArgs,
    node: &DemoNode,
    standby: &PgCluster,
    mark: Mark,
    seen: &[RelTag],
) -> Result<(), CommandError> {
    let files = verify_files::scan(standby.data())?;
    let gone: Vec<RelTag> =
        seen.iter().filter(|tag| !files.forks.contains_key(tag)).copied().collect();
    let begin = Instant::now();
    let mut client = PageClient::connect(&node.page_address(), TENANT, TIMELINE, mark.end)?;
    let report = verify(&mut client, &files, args.data_checksums, &gone)?;
    print!("{}", report.table());
    println!("compared at {} in {:.1} s", mark.end, begin.elapsed().as_secs_f64());
    if report.is_equal() {
        return Ok(());
    }
    let kept: PathBuf = node.log_path();
    let log = std::fs::read_to_string(&kept).unwrap_or_default();
    let tail: Vec<&str> = log.lines().rev().take(20).collect();
    Err(format!("the node differs from the stand-by; its log ends:\n{}", tail.join("\n")).into())
}

fn prove_images(node: &DemoNode, primary: &PgCluster, mark: Mark) -> Result<(), CommandError> {
    say("comparing every image in the WAL with the page rebuilt at its LSN");
    let info = node.admin()?.timeline(TenantShardId::unsharded(TENANT), TIMELINE)?;
    let mut client = PageClient::connect(&node.page_address(), TENANT, TIMELINE, mark.end)?;
    let begin = Instant::now();
    let wal = primary.data().join("pg_wal");
    let report = verify_images(&mut client, &wal, info.start_lsn, mark.end)?;
    println!(
        "{} records, {} images, {} equal (masked); of {} pages {} byte for byte; {:.1} s",
        report.records,
        report.images,
        report.equal,
        report.pages,
        report.pages_unmasked,
        begin.elapsed().as_secs_f64()
    );
    if report.images == 0 {
        return Err("the WAL has no images to compare with".into());
    }
    if report.equal < report.images {
        let first = report.details.join("\n");
        return Err(format!("{} images differ:\n{first}", report.images - report.equal).into());
    }
    Ok(())
}

fn wait_for_ctrl_c() -> Result<(), CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(tokio::signal::ctrl_c())?;
    Ok(())
}
