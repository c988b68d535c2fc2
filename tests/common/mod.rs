//! What the tests with real servers share: a directory, a node, positions, comparisons.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pgstrata::base::{Lsn, TenantId, TenantShardId, TimelineId};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::page_client::PageClient;
use pgstrata::cli::pg::{PgCluster, StopMode, make_dir};
use pgstrata::cli::scratch::Scratch;
use pgstrata::cli::verify::verify;
use pgstrata::cli::verify_files::scan;
use pgstrata::shard::control::{TimelineInfo, TimelineState};

/// A directory that goes with the test. Declare it first: what is in it must end before it.
pub struct Root(pub Scratch);

impl Root {
    pub fn new(name: &str) -> Root {
        Root(Scratch::new(name).unwrap())
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn node(&self, settings: &[&str]) -> DemoNode {
        let settings: Vec<String> = settings.iter().map(|text| (*text).to_owned()).collect();
        let program = Path::new(env!("CARGO_BIN_EXE_pgstrata"));
        DemoNode::start_program(program, &self.join("node"), &settings).unwrap()
    }

    /// A running cluster that changes nothing by itself.
    pub fn cluster(&self, name: &str, checksums: bool) -> PgCluster {
        let settings = ["autovacuum = off".to_owned()];
        let mut cluster = PgCluster::init(&self.join(name), checksums, &settings).unwrap();
        cluster.start().unwrap();
        cluster
    }

    /// One with pgbench's tables, stopped: a directory to import.
    pub fn stopped_cluster(&self) -> PgCluster {
        let mut cluster = self.cluster("cluster", false);
        cluster.pgbench_init("postgres", 1).unwrap();
        cluster.stop(StopMode::Fast).unwrap();
        cluster
    }
}

/// Tenant and timeline by number.
#[derive(Clone, Copy)]
pub struct Id(pub u8, pub u8);

impl Id {
    pub fn tenant(self) -> TenantId {
        TenantId([self.0; 16])
    }
    pub fn shard(self) -> TenantShardId {
        TenantShardId::unsharded(self.tenant())
    }
    pub fn timeline(self) -> TimelineId {
        TimelineId([self.1; 16])
    }
}

/// Runs the program against a node; its output, and whether it succeeded.
pub fn program(node: &DemoNode, command: &str, id: Id, args: &[&str]) -> (bool, String) {
    let mut process = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    process.arg(command).args(["--admin", &node.admin_url()]);
    if command != "status" {
        process.args(["--tenant", &id.shard().to_string()]);
        process.args(["--timeline", &id.timeline().to_string()]);
    }
    let output = process.args(args).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

pub fn succeeds(node: &DemoNode, command: &str, id: Id, args: &[&str]) -> String {
    let (ok, text) = program(node, command, id, args);
    assert!(ok, "{command} {args:?}: {text}\n{}", log_tail(node));
    text
}

pub fn fails(node: &DemoNode, command: &str, id: Id, args: &[&str], part: &str) {
    let (ok, text) = program(node, command, id, args);
    assert!(!ok, "{command} {args:?} must fail: {text}");
    assert!(text.contains(part), "'{part}' is not in: {text}");
}

pub fn info(node: &DemoNode, id: Id) -> TimelineInfo {
    node.admin().unwrap().timeline(id.shard(), id.timeline()).unwrap()
}

/// Waits until `done` says so.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what} took too long");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn wait_for(node: &DemoNode, id: Id, lsn: Lsn) {
    until(&format!("WAL up to {lsn}"), || {
        let info = info(node, id);
        assert!(info.state != TimelineState::Broken, "{info:?}");
        info.last_record_lsn >= lsn
    });
}

pub fn client(node: &DemoNode, id: Id, lsn: Lsn) -> PageClient {
    PageClient::connect(&node.page_address(), id.tenant(), id.timeline(), lsn).unwrap()
}

/// Everything that the node serves at `lsn` equals these files.
pub fn is_equal(node: &DemoNode, id: Id, lsn: Lsn, data: &Path, checksums: bool) {
    let files = scan(data).unwrap();
    let report = verify(&mut client(node, id, lsn), &files, checksums, &[]).unwrap();
    let blocks: u64 = report.forks.values().map(|sums| sums.blocks).sum();
    assert!(report.is_equal(), "{}\n{}", report.table(), log_tail(node));
    assert!(blocks > 2000, "only {blocks} blocks were compared");
}

pub fn log_tail(node: &DemoNode) -> String {
    let log = std::fs::read_to_string(node.log_path()).unwrap_or_default();
    let tail: Vec<&str> = log.lines().rev().take(15).collect();
    tail.into_iter().rev().collect::<Vec<_>>().join("\n")
}

/// Copies a directory with owners and modes.
pub fn copy(from: &Path, to: &Path) {
    make_dir(to.parent().unwrap()).unwrap();
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}
