//! Everything against a real PostgreSQL 15: logging in, base backup, scan, streaming.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use glommio::{LocalExecutorBuilder, Placement};

use super::base_backup::{BackupEvent, BaseBackup};
use super::connection::SlotName;
use super::conninfo::ConnInfo;
use super::data_dir::DataDir;
use super::error::SourceError;
use super::staging::Staging;
use crate::base::key::FORK_INIT;
use crate::base::{Key, Kind, Lsn, SlruKind, Value};
use crate::wal::receiver::{
    EndOfStream, PrimaryStream, StandbyStatus, WalMessage, WalSource, connect,
};

const BIN: &str = "/usr/lib/postgresql/15/bin";

/// A cluster of its own, stopped and removed at the end.
struct Cluster {
    root: PathBuf,
    port: u16,
}

impl Cluster {
    fn start() -> Cluster {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let root = std::env::temp_dir().join(format!("pgstrata-source-{}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(&root).unwrap();
        if let Some((uid, gid)) = postgres_ids() {
            std::os::unix::fs::chown(&root, Some(uid), Some(gid)).unwrap();
        }
        let cluster = Cluster { root, port };
        let data = cluster.data();
        let data = data.to_str().unwrap();
        cluster.run("initdb", &["-D", data, "-U", "postgres", "-N", "--locale=C", "-k"]);
        let config = format!(
            "port={port}\nlisten_addresses='127.0.0.1'\nunix_socket_directories='{}'\nfsync=off\n\
             autovacuum=off\nmax_prepared_transactions=5\nshared_buffers=16MB\nmax_wal_size=4GB\n\
             wal_keep_size=1GB\n",
            cluster.root.display()
        );
        let conf = cluster.data().join("postgresql.conf");
        fs::write(&conf, fs::read_to_string(&conf).unwrap() + &config).unwrap();
        fs::write(
            cluster.data().join("pg_hba.conf"),
            "local all all trust\nlocal replication all trust\n\
             host replication repl 127.0.0.1/32 scram-sha-256\n\
             host replication old 127.0.0.1/32 md5\n\
             host replication plain 127.0.0.1/32 password\n",
        )
        .unwrap();
        let log = cluster.root.join("log");
        cluster.run("pg_ctl", &["-D", data, "-l", log.to_str().unwrap(), "-w", "start"]);
        cluster
    }

    fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(format!("{BIN}/{program}"));
        command.env("PGHOST", &self.root).env("PGPORT", self.port.to_string());
        command.env("PGUSER", "postgres").current_dir(&self.root).stdin(Stdio::null());
        if let Some((uid, gid)) = postgres_ids() {
            command.uid(uid).gid(gid);
        }
        command
    }

    /// Runs a program of PostgreSQL. A file takes its output: a server that it starts would keep
    /// a pipe open.
    fn run(&self, program: &str, arguments: &[&str]) -> String {
        let path = self.root.join(format!("{program}.out"));
        let out = fs::File::create(&path).unwrap();
        let mut command = self.command(program);
        command.args(arguments).stderr(out.try_clone().unwrap()).stdout(out);
        let status = command.status().unwrap();
        let output = fs::read_to_string(&path).unwrap();
        assert!(status.success(), "{program} {arguments:?}: {output}");
        output
    }

    fn sql(&self, text: &str) -> String {
        let arguments = ["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", text];
        self.run("psql", &[&arguments[..], &["-d", "postgres"]].concat())
    }

    fn tcp(&self, user: &str, password: &str) -> ConnInfo {
        let port = self.port;
        let text = format!("host=127.0.0.1 port={port} user={user} password='{password}'");
        text.parse().unwrap()
    }

    fn unix(&self) -> ConnInfo {
        format!("host={} port={} user=repl", self.root.display(), self.port).parse().unwrap()
    }

    fn stop(&self) {
        let data = self.data();
        self.run("pg_ctl", &["-D", data.to_str().unwrap(), "-m", "fast", "-w", "stop"]);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut stop = self.command("pg_ctl");
        stop.arg("-D").arg(self.data()).args(["-m", "immediate", "-w", "stop"]);
        let _ = stop.stdout(Stdio::null()).stderr(Stdio::null()).status();
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// PostgreSQL refuses to run as root.
fn postgres_ids() -> Option<(u32, u32)> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let user = nix::unistd::User::from_name("postgres").unwrap().unwrap();
    Some((user.uid.as_raw(), user.gid.as_raw()))
}

/// Runs async code on a small executor.
fn glommio<T: Send + 'static>(task: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let builder = LocalExecutorBuilder::new(Placement::Unbound).io_memory(64 * 1024);
    builder.spawn(move || async move { task().await }).unwrap().join().unwrap()
}

fn fill(cluster: &Cluster) {
    let space = cluster.root.join("space");
    fs::create_dir(&space).unwrap();
    if let Some((uid, gid)) = postgres_ids() {
        std::os::unix::fs::chown(&space, Some(uid), Some(gid)).unwrap();
    }
    cluster.sql("create role repl login replication password 'it''s secret'");
    cluster.sql("set password_encryption=md5; create role old login replication password 'o'");
    cluster.sql("create role plain login replication password 'p'");
    cluster.sql(&format!("create tablespace away location '{}'", space.display()));
    cluster.run("pgbench", &["-i", "-q", "-s", "1", "postgres"]);
    for sql in [
        "create unlogged table volatile as select generate_series(1, 1000) i",
        "create index on volatile(i)",
        "create table far tablespace away as select generate_series(1, 5000) i",
        "create database other",
        "begin; create table p(i int); insert into p values (1); prepare transaction 'gid'",
        "begin; select * from pgbench_branches for share; savepoint s; \
         select * from pgbench_branches for update; commit",
        "vacuum",
        "checkpoint",
    ] {
        cluster.sql_each(sql);
    }
}

impl Cluster {
    /// VACUUM and CREATE DATABASE want a statement of their own.
    fn sql_each(&self, text: &str) {
        let mut psql = self.command_psql();
        for sql in text.split("; ") {
            psql.args(["-c", sql]);
        }
        let output = psql.output().unwrap();
        assert!(output.status.success(), "{text}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn command_psql(&self) -> Command {
        let mut psql = self.command("psql");
        psql.args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "postgres"]);
        psql
    }
}

/// All files below a directory, links followed.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if fs::metadata(&path).unwrap().is_dir() {
                pending.push(path);
            } else {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                found.insert(name, fs::read(&path).unwrap());
            }
        }
    }
    found
}

fn values(dir: &Path) -> BTreeMap<Key, Value> {
    let dir = DataDir::scan(dir).unwrap();
    let mut iterator = dir.values();
    let mut last = None;
    let mut all = BTreeMap::new();
    for item in iterator.by_ref() {
        let (key, value) = item.unwrap();
        assert!(last < Some(key), "{key:?} is out of order");
        last = Some(key);
        all.insert(key, value);
    }
    assert_eq!(iterator.bytes_done(), dir.total_bytes());
    all
}

fn log_in(cluster: &Cluster) {
    let good = [
        cluster.tcp("repl", "it\\'s secret"),
        cluster.tcp("old", "o"),
        cluster.tcp("plain", "p"),
        cluster.unix(),
    ];
    let bad = [cluster.tcp("repl", "x"), cluster.tcp("old", "x"), cluster.tcp("plain", "x")];
    let missing = ConnInfo { password: None, ..cluster.tcp("repl", "x") };
    glommio(async move || {
        for info in good {
            let mut connection = connect(&info).await.unwrap_or_else(|e| panic!("{info}: {e}"));
            assert_eq!(connection.show("wal_segment_size").await.unwrap(), "16MB");
            let error = connection.query("NONSENSE", "testing").await.unwrap_err();
            assert!(matches!(error, SourceError::Server { .. }), "{error}");
            assert_eq!(connection.identify_system().await.unwrap().timeline, 1);
            connection.close().await;
        }
        for info in bad {
            let error = connect(&info).await.err().unwrap();
            assert!(error.to_string().contains("28P01"), "{error}");
            assert_eq!(error.kind(), Kind::Invalid);
        }
        let error = connect(&missing).await.err().unwrap();
        assert!(error.to_string().contains("wants a password"), "{error}");
    });
}

/// Takes a backup into `staging`; returns where WAL starts and where the data is consistent.
fn back_up(info: ConnInfo, staging: PathBuf) -> (Lsn, Lsn) {
    glommio(async move || {
        let mut connection = connect(&info).await.unwrap();
        let slot: SlotName = "pgstrata_test".parse().unwrap();
        let made = connection.ensure_slot(&slot).await.unwrap();
        assert!(made.created && made.restart_lsn.is_some());
        assert!(!connection.ensure_slot(&slot).await.unwrap().created);
        let mut backup = BaseBackup::start(&mut connection).await.unwrap();
        assert_eq!(backup.tablespaces.len(), 2);
        assert!(backup.size_kib() > 10_000);
        let mut staging = Staging::create(&staging).unwrap();
        let (start, mut progress) = (backup.start.lsn, 0);
        let end = loop {
            let event = backup.next().await.unwrap();
            staging.apply(&event).unwrap();
            match event {
                BackupEvent::Progress(bytes) => progress = bytes,
                BackupEvent::End(end) => break end.lsn,
                _ => {}
            }
        };
        assert!(progress >= staging.bytes_written());
        // The connection is usable again.
        connection.identify_system().await.unwrap();
        (start, end)
    })
}

fn compare_with_pg_basebackup(cluster: &Cluster, staging: &Path) {
    let plain = cluster.root.join("plain");
    let tar = cluster.root.join("tar");
    let map = format!("{0}={0}_copy", cluster.root.join("space").display());
    let common = ["-X", "none", "--no-manifest", "-c", "fast", "--no-sync", "-D"];
    cluster.run("pg_basebackup", &[&common[..], &[plain.to_str().unwrap(), "-T", &map]].concat());
    cluster.run("pg_basebackup", &[&common[..], &[tar.to_str().unwrap(), "-Ft"]].concat());
    // These differ from backup to backup.
    let differs = |name: &str| {
        ["backup_label", "tablespace_map", "global/pg_control"].contains(&name)
            || name.starts_with("pg_wal/")
    };
    let keep = |root: &Path| {
        let mut all = files(root);
        all.retain(|name, _| !differs(name));
        all
    };
    let (ours, theirs) = (keep(staging), keep(&plain));
    let names = |all: &BTreeMap<String, Vec<u8>>| all.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&ours), names(&theirs));
    assert!(ours == theirs, "a file differs");

    let without_control = |dir: &Path| {
        let mut all = values(dir);
        assert_eq!(all.remove(&Key::CHECKPOINT).map(|v| v.encoded_len()), Some(89));
        assert!(all.remove(&Key::CONTROL_FILE).is_some());
        all
    };
    let ours = without_control(staging);
    assert!(ours == without_control(&plain), "the plain backup reads differently");
    assert!(ours == without_control(&tar), "the tar backup reads differently");
    assert!(ours.contains_key(&Key::slru_block(SlruKind::Clog, 0, 0)));
    assert!(ours.contains_key(&Key::slru_size(SlruKind::MultiXactOffsets, 0)));
    assert_eq!(ours.range(Key::two_phase_all()).count(), 1);
    // The tablespace's directory of the database holds no PG_VERSION.
    assert_eq!(ours.range(Key::database_all()).count(), 4);
}

/// Compares with what the server itself says about its relations.
fn compare_sizes(cluster: &Cluster, dir: &DataDir) {
    let listed = cluster.sql(
        "select case when reltablespace = 0 then 1663 else reltablespace end, \
                case when relisshared then 0 else d.oid end, pg_relation_filenode(c.oid), n, \
                pg_relation_size(c.oid, f) / 8192 \
         from pg_class c, pg_database d, \
              (values (0, 'main'), (1, 'fsm'), (2, 'vm'), (3, 'init')) forks(n, f) \
         where d.datname = current_database() and pg_relation_filenode(c.oid) is not null \
           and (relpersistence = 'p' or f = 'init') and pg_relation_size(c.oid, f) > 0",
    );
    let sizes: BTreeMap<String, u32> =
        dir.relations().map(|(tag, blocks)| (format!("{tag:?}"), blocks)).collect();
    let mut compared = 0;
    for line in listed.lines() {
        let numbers: Vec<u32> = line.split('|').map(|text| text.parse().unwrap()).collect();
        let node = crate::base::RelNode { spc: numbers[0], db: numbers[1], rel: numbers[2] };
        let tag = node.fork(numbers[3] as u8);
        assert_eq!(sizes.get(&format!("{tag:?}")), Some(&numbers[4]), "{tag}");
        compared += 1;
    }
    assert!(compared > 300, "only {compared} forks were listed");
    let templates = dir.relations().filter(|(tag, _)| tag.fork == FORK_INIT);
    assert_eq!(templates.count(), 2, "the unlogged table and its index");
}

/// Streams from `start` while pgbench runs, until the server is shut down.
fn stream(cluster: &Cluster, start: Lsn) -> (Vec<u8>, EndOfStream) {
    let info = cluster.tcp("repl", "it\\'s secret");
    let receiver = std::thread::spawn(move || {
        glommio(async move || {
            let connection = connect(&info).await.unwrap();
            let slot = "pgstrata_test".parse().unwrap();
            let mut source = PrimaryStream::new(connection, Some(slot), 1);
            source.start(start).await.unwrap();
            let mut wal = Vec::new();
            let began = Instant::now();
            loop {
                assert!(began.elapsed() < Duration::from_secs(60), "the stream does not end");
                // A short timer cancels many reads in the middle.
                let wait = glommio::timer::timeout(Duration::from_micros(500), async {
                    Ok(source.next().await)
                });
                match wait.await {
                    Ok(message) => match message.unwrap() {
                        WalMessage::Data { start: at, bytes, .. } => {
                            assert_eq!(at, Lsn(start.0 + wal.len() as u64));
                            wal.extend_from_slice(&bytes);
                        }
                        WalMessage::KeepAlive { .. } => {}
                        WalMessage::End(end) => return (wal, end),
                    },
                    Err(_) => {
                        let at = Lsn(start.0 + wal.len() as u64);
                        let unix_time_us = 1_700_000_000_000_000;
                        let reply_requested = true;
                        let status = StandbyStatus {
                            write: at,
                            flush: at,
                            apply: at,
                            unix_time_us,
                            reply_requested,
                        };
                        source.send_status(status).await.unwrap();
                    }
                }
            }
        })
    });
    cluster.run("pgbench", &["-n", "-c", "2", "-T", "2", "postgres"]);
    let flushed = cluster.sql("select flush_lsn > '0/0' from pg_stat_replication");
    assert_eq!(flushed.trim(), "t");
    cluster.stop();
    receiver.join().unwrap()
}

fn compare_with_pg_wal(cluster: &Cluster, start: Lsn, wal: &[u8]) {
    const SEGMENT: u64 = 16 << 20;
    let mut at = start.0;
    let end = start.0 + wal.len() as u64;
    while at < end {
        let name = format!("{:08X}{:08X}{:08X}", 1, at / SEGMENT / 256, at / SEGMENT % 256);
        let file = fs::read(cluster.data().join("pg_wal").join(&name)).unwrap();
        let stop = end.min((at / SEGMENT + 1) * SEGMENT);
        let ours = &wal[(at - start.0) as usize..(stop - start.0) as usize];
        let theirs = &file[(at % SEGMENT) as usize..][..ours.len()];
        assert!(ours == theirs, "WAL differs in {name}");
        at = stop;
    }
}

#[test]
fn a_stock_primary_comes_in() {
    let cluster = Cluster::start();
    fill(&cluster);
    log_in(&cluster);
    let staging = cluster.root.join("staging");
    let (start, end) = back_up(cluster.unix(), staging.clone());
    assert!(start < end);
    compare_with_pg_basebackup(&cluster, &staging);
    let dir = DataDir::scan(&staging).unwrap();
    assert_eq!((dir.start_lsn, dir.timeline), (start, 1));
    assert_eq!(dir.cluster.data_checksum_version, 1);
    compare_sizes(&cluster, &dir);
    let running = DataDir::scan(&cluster.data()).unwrap_err();
    assert!(running.to_string().contains("shut down cleanly"), "{running}");

    let (wal, outcome) = stream(&cluster, start);
    assert_eq!(outcome, EndOfStream::Shutdown);
    assert!(wal.len() > 1 << 20, "only {} bytes of WAL", wal.len());
    compare_with_pg_wal(&cluster, start, &wal);

    let stopped = DataDir::scan(&cluster.data()).unwrap();
    assert!(stopped.backup_label.is_none() && stopped.cluster.state.is_shut_down());
    assert!(stopped.start_lsn < Lsn(start.0 + wal.len() as u64) && stopped.start_lsn > end);
    assert!(!stopped.wal.is_empty());
    values(&cluster.data());

    for info in [cluster.unix(), cluster.tcp("repl", "x")] {
        let error = glommio(async move || connect(&info).await.err().unwrap());
        assert!(matches!(error, SourceError::Connect { .. }), "{error}");
        assert_eq!(error.kind(), Kind::Retry);
    }
}
