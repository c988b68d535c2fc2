//! A node on a real file system that is full: reads go on, ingest pauses, and goes on by itself
//! when there is room again.
//!
//! The file system is ext4 in a file, because direct I/O needs more than tmpfs has. Mounting it takes
//! root and loop devices; where they are missing the test says so and does nothing.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test that runs programs"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::*;
use pgstrata::cli::oracle;
use pgstrata::cli::pg::StopMode;
use pgstrata::shard::control::TimelineState;

const DISK_BYTES: u64 = 224 << 20;
/// What the ballast leaves: a journal segment and a little.
const ROOM_BYTES: u64 = 24 << 20;

/// A file system of its own; it goes with this value.
struct Disk(PathBuf);

impl Disk {
    /// `None` where nothing can be mounted.
    fn mount(image: &Path, dir: PathBuf) -> Option<Disk> {
        let file = std::fs::File::create(image).unwrap();
        file.set_len(DISK_BYTES).unwrap();
        std::fs::create_dir_all(&dir).unwrap();
        let run = |command: &mut Command| match command.output() {
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
            Err(error) => Err(error.to_string()),
        };
        let made = run(Command::new("/sbin/mkfs.ext4").args(["-q", "-F"]).arg(image));
        match made
            .and_then(|()| run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(&dir)))
        {
            Ok(()) => Some(Disk(dir)),
            Err(problem) => {
                eprintln!("SKIPPED: no file system can be mounted here: {problem}");
                None
            }
        }
    }

    fn free_bytes(&self) -> u64 {
        let df = Command::new("df").args(["-B1", "--output=avail"]).arg(&self.0).output().unwrap();
        let text = String::from_utf8(df.stdout).unwrap();
        text.lines().last().unwrap().trim().parse().unwrap()
    }

    /// Takes space away, so that `left` bytes remain.
    fn fill(&self, left: u64) -> PathBuf {
        let ballast = self.0.join("ballast");
        let bytes = self.free_bytes() - left;
        let mut command = Command::new("fallocate");
        let status = command.args(["-l", &bytes.to_string()]).arg(&ballast).status().unwrap();
        assert!(status.success());
        ballast
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Lazily: a node that has just been killed may still hold files.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_is_waited_for() {
    let root = Root::new("full-disk");
    let Some(disk) = Disk::mount(&root.join("image"), root.join("node/data")) else { return };
    let mut primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 1).unwrap();
    primary.stop(StopMode::Fast).unwrap();
    copy(primary.data(), &root.join("standby/data"));
    let node = root.node(&["checkpoint_distance_bytes=8000000", "log_filter=warn"]);
    let id = Id(1, 1);
    let data = primary.data().to_str().unwrap().to_owned();
    let conninfo = primary.conninfo();
    succeeds(&node, "import", id, &["--pgdata", &data, "--primary", &conninfo, "--slot", "node"]);
    let start = info(&node, id).last_record_lsn;
    primary.start().unwrap();
    oracle::keep_wal(&primary).unwrap();
    until("the connection", || info(&node, id).wal_source_connected);

    let ballast = disk.fill(ROOM_BYTES);
    let load = "CREATE TABLE much AS SELECT i, md5(i::text) || md5((i * 7)::text) AS t \
                FROM generate_series(1, 400000) AS i";
    primary.psql("postgres", load).unwrap();
    let mark = oracle::mark(&primary).unwrap();
    let paused = |reason: &Option<String>| {
        reason.as_ref().is_some_and(|text| text.contains("no space left on the device"))
    };
    until("the pause", || paused(&info(&node, id).ingest_paused));
    // It stays so, as long as there is no room.
    std::thread::sleep(Duration::from_secs(2));
    let full = info(&node, id);
    assert!(full.state == TimelineState::Active && full.last_record_lsn < mark.end, "{full:?}");
    assert!(full.wal_source_connected, "{full:?}");
    is_equal(&node, id, start, &root.join("standby/data"), false);
    let told = primary.lsn("SELECT flush_lsn FROM pg_stat_replication").unwrap();
    assert!(told < mark.end && told <= info(&node, id).journal_lsn, "{told} was acknowledged");

    std::fs::remove_file(ballast).unwrap();
    wait_for(&node, id, mark.end);
    until("the end of the pause", || info(&node, id).ingest_paused.is_none());
    let mut standby = oracle::prepare(&root.join("standby"), &primary, &[]).unwrap();
    oracle::replay(&mut standby, mark).unwrap();
    is_equal(&node, id, mark.end, standby.data(), false);
    is_equal_again(&root, node, id, mark, &standby);
    drop(disk);
}

/// The same after a restart, and no file is damaged.
fn is_equal_again(
    root: &Root,
    mut node: pgstrata::cli::demo_node::DemoNode,
    id: Id,
    mark: oracle::Mark,
    standby: &pgstrata::cli::pg::PgCluster,
) {
    node.stop().unwrap();
    let mut check = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    let output = check.args(["check", "--quiet"]).arg(root.join("node/data")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    node.start_again().unwrap();
    wait_for(&node, id, mark.end);
    is_equal(&node, id, mark.end, standby.data(), false);
}
