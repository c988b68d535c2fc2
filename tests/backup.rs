//! Backups at any LSN, end to end: what the page service sends is unpacked, and stock PostgreSQL is
//! started on it, as it is. It must dump what the primary dumped at that moment, and every table
//! and index must be sound.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::*;
use pgstrata::base::checksum::crc32c;
use pgstrata::base::{Lsn, RelNode};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::pg::{PgCluster, StopMode, command, control_data, make_dir, run};
use pgstrata::cli::verify_files::scan;
use pgstrata::cli::workload;
use pgstrata::server::page_protocol::{Answer, Query};

const ROOT: Id = Id(1, 1);
const BRANCH: Id = Id(1, 2);

/// A quiet moment of the primary.
struct Moment {
    lsn: Lsn,
    dump: Dump,
    prepared: Vec<Vec<String>>,
}

const PREPARED: &str = "SELECT gid, transaction, database FROM pg_prepared_xacts ORDER BY gid";

/// All databases as text, without the positions of sequences; and these.
struct Dump {
    text: String,
    sequences: BTreeMap<String, i64>,
}

fn dump(cluster: &PgCluster) -> Dump {
    let mut dump = cluster.client("pg_dumpall", "postgres");
    // Unlogged tables are empty in a backup, as after a crash.
    dump.arg("--no-unlogged-table-data");
    let text = run(dump).unwrap();
    assert!(text.contains("pgbench_accounts"), "the dump lacks tables");
    // Newer minor versions put a random word around a dump.
    let is_kept =
        |line: &&str| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict");
    let is_setval = |line: &&str| line.starts_with("SELECT pg_catalog.setval(");
    let (setvals, text): (Vec<&str>, Vec<&str>) = text.lines().filter(is_kept).partition(is_setval);
    let mut sequences = BTreeMap::new();
    for line in setvals {
        let (name, value) = line.split_once("', ").unwrap();
        let (value, _) = value.split_once(',').unwrap();
        sequences.insert(format!("{name} {}", sequences.len()), value.parse().unwrap());
    }
    Dump { text: text.join("\n"), sequences }
}

impl Dump {
    /// A sequence logs up to 32 values ahead of those that it gives out: after a crash, on a
    /// stand-by and here it stands there. Everything else is equal.
    fn is_equal_to(&self, primary: &Dump, lsn: Lsn) {
        if self.text != primary.text {
            let mut pairs = self.text.lines().zip(primary.text.lines());
            let differs = pairs.find(|(a, b)| a != b);
            panic!("the dump differs from the primary's at {lsn}: {differs:?}");
        }
        assert!(self.sequences.keys().eq(primary.sequences.keys()));
        for (name, value) in &self.sequences {
            let ahead = value - primary.sequences[name];
            assert!((0..=32).contains(&ahead), "{name} is {ahead} ahead");
        }
    }
}

fn moment(primary: &PgCluster) -> Moment {
    let dump = dump(primary);
    let prepared = primary.psql("postgres", PREPARED).unwrap();
    let lsn = primary.lsn("SELECT pg_current_wal_flush_lsn()").unwrap();
    Moment { lsn, dump, prepared }
}

/// `psql` at the page service.
fn psql(node: &DemoNode, sql: &str) -> Command {
    let address = node.page_address();
    let (host, port) = address.split_once(':').unwrap();
    let mut psql = command("psql");
    psql.arg("-X").args(["-h", host, "-p", port, "-U", "any", "-d", "any", "-c", sql]);
    psql
}

fn sql(command: &str, id: Id, rest: &str) -> String {
    format!("{command} {} {} {rest}", id.shard(), id.timeline())
}

/// Unpacks a backup into `dir/data`, as the documents tell to do it.
fn unpack(node: &DemoNode, sql: &str, dir: &Path) -> PgCluster {
    make_dir(dir).unwrap();
    let cluster = PgCluster::at(dir).unwrap();
    make_dir(cluster.data()).unwrap();
    let begin = Instant::now();
    let mut psql = psql(node, sql).stdout(Stdio::piped()).spawn().unwrap();
    let mut tar = Command::new("tar");
    tar.arg("-x").arg(if sql.contains("--gzip") { "-zf" } else { "-f" }).arg("-");
    tar.arg("-C").arg(cluster.data()).stdin(psql.stdout.take().unwrap());
    assert!(tar.status().unwrap().success(), "{sql}\n{}", log_tail(node));
    assert!(psql.wait().unwrap().success(), "{sql}\n{}", log_tail(node));
    println!("{sql}: {:.1} s", begin.elapsed().as_secs_f64());
    cluster
}

/// Starts stock PostgreSQL on a full backup and holds it against the moment that it is of.
fn is_that_moment(node: &DemoNode, sql: &str, dir: &Path, moment: &Moment) {
    let mut cluster = unpack(node, sql, dir);
    let begin = Instant::now();
    let mut check = command("pg_checksums");
    check.args(["--check", "-D"]).arg(cluster.data());
    let checked = run(check).unwrap();
    assert!(checked.contains("Bad checksums:  0"), "{checked}");
    let found = control_data(cluster.data(), "Database cluster state").unwrap();
    assert_eq!(found, "shut down");
    cluster.start().unwrap();
    let log = std::fs::read_to_string(cluster.log()).unwrap();
    assert!(log.contains("database system was shut down at"), "{log}");
    assert!(!log.contains("redo starts") && !log.contains("WARNING"), "{log}");
    dump(&cluster).is_equal_to(&moment.dump, moment.lsn);
    assert_eq!(cluster.psql("postgres", PREPARED).unwrap(), moment.prepared);
    let mut amcheck = cluster.client("pg_amcheck", "postgres");
    amcheck.args(["--all", "--install-missing", "--jobs", "2"]);
    run(amcheck).unwrap_or_else(|error| panic!("pg_amcheck: {error}"));
    // It writes, and it starts again from its own WAL, also after a crash.
    for row in &moment.prepared {
        let commit = format!("COMMIT PREPARED '{}'", row[0]);
        cluster.psql(&row[2], &commit).unwrap();
    }
    let write = "CREATE TABLE after AS SELECT 1 AS one; UPDATE pgbench_branches SET bbalance = 0;";
    cluster.psql("postgres", write).unwrap();
    cluster.stop(StopMode::Immediate).unwrap();
    cluster.start().unwrap();
    assert_eq!(cluster.value("postgres", "SELECT one FROM after").unwrap(), "1");
    cluster.stop(StopMode::Fast).unwrap();
    println!("checked at {}: {:.1} s", moment.lsn, begin.elapsed().as_secs_f64());
    std::fs::remove_dir_all(dir).unwrap();
}

/// The relations that a base backup names: number, fork, blocks, of each database.
fn named_relations(data: &Path, lsn: Lsn) -> BTreeMap<(RelNode, u32), u32> {
    let list = std::fs::read(data.join("pgstrata.relations")).unwrap();
    let (body, crc) = list.split_last_chunk::<4>().unwrap();
    assert_eq!(crc32c(body), u32::from_le_bytes(*crc));
    let number = |at: usize| u32::from_le_bytes(list[at..at + 4].try_into().unwrap());
    assert_eq!((&list[..4], number(4)), (&b"PGSR"[..], 1));
    assert_eq!(u64::from(number(8)) | u64::from(number(12)) << 32, lsn.0);
    let forks = (0..number(16) as usize).map(|nth| {
        let field = |field: usize| number(20 + 20 * nth + 4 * field);
        let node = RelNode { spc: field(0), db: field(1), rel: field(2) };
        ((node, field(3)), field(4))
    });
    forks.collect()
}

/// Everything but relations, and what a compute must know of them.
fn is_for_a_compute(node: &DemoNode, lsn: Lsn, root: &Root) {
    let dir = root.join("compute");
    let base = unpack(node, &sql("basebackup", ROOT, &format!("{lsn} --gzip")), &dir);
    let named = named_relations(base.data(), lsn);
    let data = scan(base.data()).unwrap();
    assert!(data.forks.keys().all(|tag| tag.fork == 3), "only templates are in it");
    assert!(!data.forks.is_empty(), "the templates of unlogged relations are missing");
    let full = unpack(node, &sql("fullbackup", ROOT, &lsn.to_string()), &root.join("judge"));
    let files = scan(full.data()).unwrap();
    let of_files: BTreeMap<_, _> = files
        .forks
        .iter()
        .filter(|(tag, _)| tag.fork != 3)
        .map(|(tag, fork)| ((tag.node, u32::from(tag.fork)), fork.blocks))
        .collect();
    assert_eq!(named, of_files);
    assert_eq!(data.slru, files.slru);
    assert_eq!(data.databases, files.databases);
    let mut client = client(node, ROOT, lsn);
    for ((rel, fork), blocks) in named.iter().take(200) {
        let answer = client.ask(Query::Nblocks { rel: rel.fork(*fork as u8) }).unwrap();
        assert_eq!(answer, Answer::Nblocks(*blocks));
    }
    let control = |name| control_data(base.data(), name).unwrap();
    assert_eq!(control("Data page checksum version"), "0", "pages come without checksums");
    assert_eq!(control("Latest checkpoint's REDO location"), control("Latest checkpoint location"));
    assert!(shutdown_record(&base).contains("CHECKPOINT_SHUTDOWN"));
    // The newest record is known, so the new one names it.
    let newest = unpack(node, &sql("basebackup", ROOT, ""), &root.join("newest"));
    let record = shutdown_record(&newest);
    assert!(record.contains("CHECKPOINT_SHUTDOWN"), "{record}");
    assert!(!record.contains("prev 0/00000000"), "{record}");
}

/// What PostgreSQL's own tool says of the record that a server starts from.
fn shutdown_record(backup: &PgCluster) -> String {
    let start = control_data(backup.data(), "Latest checkpoint location").unwrap();
    let mut waldump = command("pg_waldump");
    waldump.args(["-n", "1", "-s", &start, "-p"]).arg(backup.data().join("pg_wal"));
    run(waldump).unwrap()
}

/// The command fails, with this in its message.
fn is_refused(node: &DemoNode, sql: &str, part: &str) {
    let output = psql(node, sql).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{sql} must fail");
    assert!(text.contains(part), "'{part}' is not in: {text}");
}

#[test]
fn stock_postgres_starts_at_any_lsn() {
    let root = Root::new("fullbackup");
    let primary = root.cluster("primary", true);
    primary.pgbench_init("postgres", 2).unwrap();
    let unlogged = "CREATE UNLOGGED TABLE quick (id int PRIMARY KEY, v text);
        INSERT INTO quick SELECT i, 'q' FROM generate_series(1, 500) i; CHECKPOINT";
    primary.psql("postgres", unlogged).unwrap();
    let node = root.node(&[
        "checkpoint_distance_bytes=4000000",
        "image_layer_bytes=4000000",
        "wait_lsn_timeout_ms=20000",
    ]);
    let conninfo = primary.conninfo();
    succeeds(&node, "attach", ROOT, &["--primary", &conninfo, "--slot", "pgstrata"]);

    let load = |seconds: &str| {
        let options = ["-c", "3", "-j", "2", "-T", seconds];
        primary.pgbench("postgres", &options, |_| {}).map_err(|error| error.to_string())
    };
    load("3").unwrap();
    let first = moment(&primary);
    workload::mixed(&primary, 1, &|_| {}).unwrap();
    let second = moment(&primary);
    assert!(!second.prepared.is_empty(), "no prepared transaction is open");
    std::thread::scope(|scope| {
        // The primary goes on, and the node with it.
        let running = scope.spawn(|| load("12"));
        std::thread::sleep(Duration::from_secs(1));
        let full = sql("fullbackup", ROOT, &first.lsn.to_string());
        is_that_moment(&node, &full, &root.join("first"), &first);
        let full = sql("fullbackup", ROOT, &second.lsn.to_string());
        is_that_moment(&node, &full, &root.join("second"), &second);
        running.join().unwrap().unwrap();
    });
    let third = moment(&primary);
    assert!(third.dump.text != second.dump.text);
    // The newest one: no LSN is given, but the node must have it.
    wait_for(&node, ROOT, third.lsn);
    is_that_moment(&node, &sql("fullbackup", ROOT, "--gzip"), &root.join("third"), &third);
    is_for_a_compute(&node, second.lsn, &root);

    // A branch, as it was made, and its history.
    let (tenant, from) = (ROOT.shard().to_string(), ROOT.timeline().to_string());
    let at = second.lsn.to_string();
    let mut branch = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    branch.args(["timeline", "branch", "--admin", &node.admin_url(), "--tenant", &tenant]);
    branch.args(["--timeline", &BRANCH.timeline().to_string(), "--from", &from, "--lsn", &at]);
    assert!(branch.output().unwrap().status.success());
    is_that_moment(&node, &sql("fullbackup", BRANCH, "latest"), &root.join("branch"), &second);

    // What cannot be had.
    is_refused(&node, &sql("fullbackup", ROOT, "0/1000"), "history of this timeline begins at");
    let beyond = Lsn(second.lsn.0 + 4096).to_string();
    is_refused(&node, &sql("fullbackup", BRANCH, &beyond), "has no WAL source");
    is_refused(&node, &sql("basebackup", Id(1, 9), ""), "is not on this node");
    is_refused(&node, &sql("basebackup", Id(9, 1), ""), "is not on this node");
    let gc = ["timeline", "gc", "--admin", &node.admin_url(), "--tenant", &tenant, "--timeline"];
    let mut collect = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    collect.args(gc).arg(&from).args(["--horizon-bytes", "0", "--pitr-interval-s", "0"]);
    let collected = collect.output().unwrap();
    assert!(collected.status.success(), "{}", String::from_utf8_lossy(&collected.stderr));
    // Held by the lease of the backup that was made there, and not held.
    unpack(&node, &sql("basebackup", ROOT, &first.lsn.to_string()), &root.join("leased"));
    let unheld = Lsn(first.lsn.0 + 8).to_string();
    is_refused(&node, &sql("basebackup", ROOT, &unheld), "was garbage collected");
}
