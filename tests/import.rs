//! Everything that a timeline can be made from, end to end, against stock PostgreSQL: base
//! backups (plain, tar) with and without a primary, data directories, primaries with passwords,
//! restarts and lost slots, several tenants at once.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::*;
use pgstrata::base::{Lsn, RelNode};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::oracle::{self, Mark};
use pgstrata::cli::pg::{PgCluster, StopMode, control_data, free_port, make_dir, run};
use pgstrata::server::page_protocol::{Answer, Query};
use pgstrata::shard::control::TimelineState;

/// A base backup in `dir/data`, with the WAL that it needs.
fn backup(primary: &PgCluster, dir: &Path, options: &[&str]) -> PathBuf {
    make_dir(dir).unwrap();
    let mut command = primary.client("pg_basebackup", "postgres");
    command.args(["--no-sync", "-c", "fast", "-X", "stream"]).args(options);
    let target = dir.join("data");
    command.arg("-D").arg(&target);
    run(command).unwrap();
    target
}

fn unpack(tars: &Path, dir: &Path) {
    make_dir(dir).unwrap();
    let data = dir.join("data");
    make_dir(&data).unwrap();
    make_dir(&data.join("pg_wal")).unwrap();
    for (archive, target) in [("base.tar", data.clone()), ("pg_wal.tar", data.join("pg_wal"))] {
        let mut tar = Command::new("tar");
        tar.arg("-xpf").arg(tars.join(archive)).arg("-C").arg(target);
        assert!(tar.status().unwrap().success());
    }
}

/// The files of `dir/data`, a base backup with its WAL, at the end of the backup: a stock server
/// replays up to consistency, is promoted, and writes all its pages as it is shut down.
fn replay_to_consistency(dir: &Path) -> PgCluster {
    let mut server = PgCluster::at(dir).unwrap();
    let signal = server.data().join("recovery.signal");
    std::fs::write(&signal, b"").unwrap();
    pgstrata::cli::pg::give_to_servers(&signal).unwrap();
    let settings = [
        "restore_command = 'false'",
        "hot_standby = off",
        "recovery_target = 'immediate'",
        "recovery_target_timeline = current",
        "recovery_target_action = promote",
    ];
    server.configure(settings).unwrap();
    // A look with pg_isready would log in, and that sets hint bits in catalogs.
    server.spawn().unwrap();
    until("the promotion", || {
        let log = std::fs::read_to_string(server.log()).unwrap_or_default();
        log.contains("ready to accept connections")
    });
    server.stop(StopMode::Fast).unwrap();
    let state = control_data(server.data(), "Database cluster state").unwrap();
    assert_eq!(state, "shut down");
    server
}

fn stand_by(dir: &Path, primary: &PgCluster, mark: Mark) -> PgCluster {
    let mut standby = oracle::prepare(dir, primary, &[]).unwrap();
    oracle::replay(&mut standby, mark).unwrap();
    standby
}

fn conninfo(primary: &PgCluster, user: &str) -> String {
    primary.conninfo().replace("user=postgres", user)
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

const PG_CLASS: RelNode = RelNode { spc: 1663, db: 5, rel: 1259 };

/// Reads before the end of the backup are refused, with a reason.
fn refuses_before(node: &DemoNode, id: Id, start: Lsn) {
    let query = Query::GetPage { rel: PG_CLASS.fork(0), block: 0 };
    let answer = client(node, id, Lsn(start.0 - 8)).ask(query).unwrap();
    let Answer::Error(text) = answer else { panic!("{answer:?}") };
    assert!(text.contains(&format!("history of this timeline begins at {start}")), "{text}");
    let answer = client(node, id, start).ask(query).unwrap();
    assert!(matches!(answer, Answer::GetPage(_)), "{answer:?}");
}

#[test]
fn backups_taken_under_load_are_equal() {
    let root = Root::new("backups");
    let primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 2).unwrap();
    oracle::keep_wal(&primary).unwrap();
    let (plain, tar) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let options = ["-c", "3", "-j", "2", "-T", "8"];
            primary.pgbench("postgres", &options, |_| {}).map_err(|error| error.to_string())
        });
        std::thread::sleep(Duration::from_secs(1));
        let plain = backup(&primary, &root.join("plain"), &[]);
        let tar = backup(&primary, &root.join("tar"), &["-Ft"]);
        assert!(!load.is_finished(), "the backups took longer than the load");
        load.join().unwrap().unwrap();
        (plain, tar)
    });
    let node = root.node(&["checkpoint_distance_bytes=4000000", "image_layer_bytes=8000000"]);

    // Without a primary: readable from the end of the backup on, and equal there.
    for (id, path) in [(Id(1, 1), &plain), (Id(1, 2), &tar)] {
        succeeds(&node, "import", id, &["--backup", text(path)]);
        let found = info(&node, id);
        assert_eq!(found.state, TimelineState::Active);
        assert_eq!(found.wal_source, None);
        refuses_before(&node, id, found.start_lsn);
        let dir = root.join(&format!("alone{}", id.1));
        match id.1 {
            1 => copy(path, &dir.join("data")),
            _ => unpack(path, &dir),
        }
        let judge = replay_to_consistency(&dir);
        is_equal(&node, id, found.start_lsn, judge.data(), false);
    }

    // With a primary: the node follows it from there.
    let source = conninfo(&primary, "user=postgres");
    for (id, path) in [(Id(2, 1), &plain), (Id(2, 2), &tar)] {
        let slot = format!("slot{}", id.1);
        let args = ["--backup", text(path), "--primary", &source, "--slot", &slot];
        succeeds(&node, "import", id, &args);
    }
    let mark = oracle::mark(&primary).unwrap();
    copy(&plain, &root.join("judge1").join("data"));
    unpack(&tar, &root.join("judge2"));
    for (id, dir) in [(Id(2, 1), "judge1"), (Id(2, 2), "judge2")] {
        let judge = stand_by(&root.join(dir), &primary, mark);
        wait_for(&node, id, mark.end);
        is_equal(&node, id, mark.end, judge.data(), false);
    }
}

#[test]
fn data_directories_are_equal_and_running_ones_refused() {
    let root = Root::new("pgdata");
    let mut cluster = root.cluster("cluster", true);
    cluster.pgbench_init("postgres", 2).unwrap();
    let sql = "CREATE TABLE i (v int) ; INSERT INTO i SELECT generate_series(1, 9000);
        CREATE INDEX ON i (v); BEGIN; DELETE FROM i WHERE v % 3 = 0; PREPARE TRANSACTION 'open'";
    cluster.psql("postgres", sql).unwrap();
    let mut node = root.node(&["image_layer_bytes=8000000"]);
    let path = cluster.data().to_owned();
    let args = ["--pgdata", text(&path)];
    fails(&node, "import", Id(1, 1), &args, "stop its server with pg_ctl stop -m fast");
    fails(&node, "import", Id(1, 1), &["--backup", text(&path)], "backup_label is missing");
    cluster.stop(StopMode::Immediate).unwrap();
    fails(&node, "import", Id(1, 1), &args, "shut down cleanly");
    cluster.start().unwrap();
    cluster.stop(StopMode::Fast).unwrap();
    // The same timeline: an import that failed leaves nothing behind.
    succeeds(&node, "import", Id(1, 1), &args);
    let found = info(&node, Id(1, 1));
    assert_eq!(found.state, TimelineState::Active);
    is_equal(&node, Id(1, 1), found.last_record_lsn, &path, true);
    refuses_before(&node, Id(1, 1), found.start_lsn);
    fails(&node, "import", Id(1, 1), &args, "exists already");
    node.stop().unwrap();
    node.start_again().unwrap();
    assert_eq!(info(&node, Id(1, 1)).last_record_lsn, found.last_record_lsn);
    is_equal(&node, Id(1, 1), found.last_record_lsn, &path, true);
    node.kill().unwrap();
    node.start_again().unwrap();
    is_equal(&node, Id(1, 1), found.last_record_lsn, &path, true);
    // The cluster goes on, and the node follows it from where the files ended.
    cluster.start().unwrap();
    let source = conninfo(&cluster, "user=postgres");
    let args = ["--pgdata", text(&path), "--primary", &source];
    fails(&node, "import", Id(1, 2), &args, "stop its server");
}

#[test]
fn passwords_restarts_and_lost_slots() {
    let root = Root::new("attach");
    let mut primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 2).unwrap();
    let sql = "CREATE ROLE repl LOGIN REPLICATION PASSWORD 'it''s \\ secret'; VACUUM";
    primary.psql("postgres", sql).unwrap();
    oracle::keep_wal(&primary).unwrap();
    let rules = "local all all trust\nlocal replication all trust\n\
        host all all 127.0.0.1/32 scram-sha-256\nhost replication all 127.0.0.1/32 scram-sha-256\n";
    std::fs::write(primary.data().join("pg_hba.conf"), rules).unwrap();
    primary.psql("postgres", "SELECT pg_reload_conf(); CHECKPOINT").unwrap();
    let mut node = root.node(&["checkpoint_distance_bytes=4000000"]);

    let id = Id(1, 1);
    let with = |user: &str| conninfo(&primary, user);
    let wrong = with("user=repl password=wrong");
    fails(&node, "attach", id, &["--primary", &wrong], "password authentication failed");
    fails(&node, "attach", id, &["--primary", &with("user=repl")], "wants a password");
    let down = format!("host=127.0.0.1 port={} user=repl", free_port().unwrap());
    fails(&node, "attach", id, &["--primary", &down], "cannot connect to 127.0.0.1");
    let good = with(r"user=repl password='it\'s \\ secret'");
    let output = succeeds(&node, "attach", id, &["--primary", &good, "--slot", "one"]);
    assert!(output.contains("readable from"), "{output}");
    let shown = format!("{:?}", info(&node, id));
    assert!(!shown.contains("secret"), "a password is shown: {shown}");
    let judge_dir = root.join("judge");
    primary.base_backup(&judge_dir).unwrap();

    // The primary restarts in the middle of the load.
    std::thread::scope(|scope| {
        let load = |seconds: &'static str| {
            // It is cut off by the restart, and its failure is no matter.
            let _ = primary.pgbench("postgres", &["-c", "2", "-T", seconds], |_| {});
        };
        let first = scope.spawn(move || load("20"));
        std::thread::sleep(Duration::from_secs(2));
        primary_restarts(&primary);
        first.join().unwrap();
    });
    primary.wait_exit(Duration::from_secs(30)).unwrap();
    until("the node sees that the primary is gone", || info(&node, id).wal_source_error.is_some());
    let gone = info(&node, id);
    assert!(!gone.wal_source_connected && gone.state == TimelineState::Active, "{gone:?}");
    primary.start().unwrap();
    primary.pgbench("postgres", &["-c", "2", "-T", "2"], |_| {}).unwrap();
    let mark = oracle::mark(&primary).unwrap();
    wait_for(&node, id, mark.end);
    let back = info(&node, id);
    assert!(back.wal_source_connected && back.wal_source_error.is_none(), "{back:?}");
    let judge = stand_by(&judge_dir, &primary, mark);
    is_equal(&node, id, mark.end, judge.data(), false);

    // The slot is lost while the node is away, and the WAL with it.
    node.stop().unwrap();
    oracle::release_wal(&primary).unwrap();
    primary.psql("postgres", "SELECT pg_drop_replication_slot('one')").unwrap();
    let sql = "CREATE TABLE more AS SELECT generate_series(1, 9) v; SELECT pg_switch_wal();
        INSERT INTO more VALUES (1); SELECT pg_switch_wal(); CHECKPOINT; CHECKPOINT";
    primary.psql("postgres", sql).unwrap();
    node.start_again().unwrap();
    until("the node is told that the WAL is gone", || {
        let error = info(&node, id).wal_source_error.unwrap_or_default();
        error.contains("has already been removed")
    });
    let shown = succeeds(&node, "status", id, &[]);
    assert!(shown.contains("has already been removed"), "{shown}");
    assert!(shown.contains("copy it back into the primary's pg_wal"), "{shown}");
    // What it has, it serves.
    is_equal(&node, id, mark.end, judge.data(), false);
}

/// Asks the server to stop; whoever owns the cluster waits for it and starts it again.
fn primary_restarts(primary: &PgCluster) {
    let text = std::fs::read_to_string(primary.data().join("postmaster.pid")).unwrap();
    let pid: i32 = text.lines().next().unwrap().parse().unwrap();
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
}

/// Two primaries, of which one logs hint bits; a tenant on each core, and one with timelines of
/// both clusters.
#[test]
fn tenants_of_two_primaries_at_once() {
    let root = Root::new("tenants");
    let node = root.node(&["checkpoint_distance_bytes=4000000"]);
    let clusters = [root.cluster("plain", false), root.cluster("checked", true)];
    for cluster in &clusters {
        cluster.pgbench_init("postgres", 1).unwrap();
        cluster.psql("postgres", "VACUUM").unwrap();
        oracle::keep_wal(cluster).unwrap();
        cluster.psql("postgres", "CHECKPOINT").unwrap();
    }
    let ids = [(Id(1, 1), 0), (Id(1, 2), 1), (Id(3, 1), 1), (Id(4, 1), 0)];
    std::thread::scope(|scope| {
        for (id, of) in ids {
            let (node, cluster) = (&node, &clusters[of]);
            scope.spawn(move || {
                let (source, slot) = (cluster.conninfo(), format!("s{}_{}", id.0, id.1));
                succeeds(node, "attach", id, &["--primary", &source, "--slot", &slot]);
            });
        }
    });
    let cores: std::collections::BTreeSet<usize> =
        ids.iter().map(|(id, _)| info(&node, *id).core).collect();
    println!("cores in use: {cores:?}");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    assert_eq!(cores.len(), cpus.min(2), "choose tenants that spread");
    let judges = [root.join("judge0"), root.join("judge1")];
    std::thread::scope(|scope| {
        for (cluster, dir) in clusters.iter().zip(&judges) {
            scope.spawn(move || {
                cluster.base_backup(dir).unwrap();
                cluster.pgbench("postgres", &["-c", "2", "-T", "4"], |_| {}).unwrap();
                let sql = "CREATE TABLE v AS SELECT generate_series(1, 20000) i; VACUUM v;
                    VACUUM pgbench_accounts; VACUUM pgbench_branches";
                cluster.psql("postgres", sql).unwrap();
            });
        }
    });
    let marks = [0, 1].map(|of| oracle::mark(&clusters[of]).unwrap());
    let standbys = [0, 1].map(|of| stand_by(&judges[of], &clusters[of], marks[of]));
    for (id, of) in ids {
        wait_for(&node, id, marks[of].end);
        is_equal(&node, id, marks[of].end, standbys[of].data(), of == 1);
    }
}
