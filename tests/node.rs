//! A running node on damaged files, and as it stops.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test that runs programs"
)]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::*;
use pgstrata::base::key::FORK_FSM;
use pgstrata::base::{Lsn, RelNode, RelTag};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::pg::{PgCluster, StopMode};
use pgstrata::cli::verify_files::{DataDirectory, scan};
use pgstrata::server::page_protocol::{Answer, Query};
use pgstrata::shard::control::TimelineState;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn start_up() -> Vec<u8> {
    let body = b"\0\x03\0\0user\0u\0\0";
    let mut out = (body.len() as u32 + 4).to_be_bytes().to_vec();
    out.extend_from_slice(body);
    out
}

fn timeline_dir(node: &DemoNode, id: Id) -> PathBuf {
    let tenant = node.data_dir().join("tenants").join(id.shard().to_string());
    tenant.join("timelines").join(id.timeline().to_string())
}

fn flip(path: &Path, offset: u64) {
    let mut file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.read_exact(&mut byte).unwrap();
    byte[0] ^= 0x10;
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&byte).unwrap();
}

/// The largest layer file.
fn largest(dir: &Path) -> (PathBuf, u64) {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let files = entries.map(|entry| (entry.path(), entry.metadata().unwrap()));
    let sizes = files.filter(|(_, meta)| meta.is_file()).map(|(path, meta)| (path, meta.len()));
    sizes.max_by_key(|(_, len)| *len).unwrap()
}

/// Reads every block: how many are equal, and the errors. A wrong page fails the test.
fn read_all(node: &DemoNode, id: Id, lsn: Lsn, files: &DataDirectory) -> (u64, Vec<String>) {
    let mut client = client(node, id, lsn);
    let (mut equal, mut errors) = (0, Vec::new());
    let blocks = |(rel, fork): (&RelTag, &pgstrata::cli::verify_files::ForkFiles)| {
        let rel = *rel;
        (0..fork.blocks).map(move |block| Query::GetPage { rel, block }).collect::<Vec<_>>()
    };
    let queries: Vec<Query> = files.forks.iter().flat_map(blocks).collect();
    client
        .ask_all(queries, |query, answer| {
            let Query::GetPage { rel, block } = query else { return };
            match answer {
                Answer::GetPage(page) => {
                    let expected = files.forks[&rel].page(block).unwrap().unwrap();
                    assert!(page == expected, "{rel} block {block} is wrong");
                    equal += 1;
                }
                Answer::Error(text) => errors.push(text),
                other => panic!("{other:?}"),
            }
        })
        .unwrap();
    (equal, errors)
}

#[test]
fn damaged_layers_and_indexes_are_named_and_stay_alone() {
    let root = Root::new("damage");
    let cluster = root.stopped_cluster();
    let mut node = root.node(&[]);
    let [layer, index, healthy] = [Id(1, 1), Id(1, 2), Id(1, 3)];
    let args = ["--pgdata", text(cluster.data())];
    for id in [layer, index, healthy] {
        succeeds(&node, "import", id, &args);
    }
    let lsn = info(&node, healthy).last_record_lsn;
    node.stop().unwrap();
    let (file, len) = largest(&timeline_dir(&node, layer));
    for part in 1..6 {
        flip(&file, len * part / 8);
    }
    flip(&timeline_dir(&node, index).join("index"), 100);
    node.start_again().unwrap();

    let files = scan(cluster.data()).unwrap();
    let (equal, errors) = read_all(&node, layer, lsn, &files);
    println!(
        "{equal} blocks are equal, {} are errors, such as: {:?}",
        errors.len(),
        errors.first()
    );
    assert!(!errors.is_empty() && equal > 0);
    let name = file.file_name().unwrap().to_str().unwrap();
    let bad = errors.iter().find(|text| !text.contains(name) || !text.contains("damaged"));
    assert!(bad.is_none(), "{bad:?}");

    let broken = info(&node, index);
    assert_eq!(broken.state, TimelineState::Broken);
    let error = broken.error.unwrap();
    assert!(error.contains("index is damaged"), "{error}");
    // It must not be made anew over what may still be saved.
    fails(&node, "import", index, &args, "exists already; if it is broken");
    assert!(timeline_dir(&node, index).join("index").exists());
    let (_, len) = largest(&timeline_dir(&node, index));
    assert!(len > 1_000_000, "its layers are gone");

    let (equal, errors) = read_all(&node, healthy, lsn, &files);
    assert!(errors.is_empty() && equal > 2000, "{errors:?}");
}

/// Pages of the largest relation, by block.
fn pages(node: &DemoNode, id: Id, lsn: Lsn, rel: RelTag, blocks: u32) -> BTreeMap<u32, Vec<u8>> {
    let mut found = BTreeMap::new();
    let queries = (0..blocks).map(|block| Query::GetPage { rel, block });
    client(node, id, lsn)
        .ask_all(queries, |query, answer| {
            let (Query::GetPage { block, .. }, Answer::GetPage(page)) = (query, answer) else {
                panic!("no page");
            };
            found.insert(block, page.to_vec());
        })
        .unwrap();
    found
}

#[test]
fn a_damaged_journal_is_streamed_again_or_said_to_be_short() {
    let root = Root::new("journal");
    let mut primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 1).unwrap();
    let mut node = root.node(&["wait_lsn_timeout_ms=1500"]);
    let id = Id(1, 1);
    let source = primary.conninfo();
    succeeds(&node, "attach", id, &["--primary", &source, "--slot", "one"]);
    primary.pgbench("postgres", &["-c", "2", "-T", "3"], |_| {}).unwrap();
    let end = primary.lsn("SELECT pg_current_wal_flush_lsn()").unwrap();
    wait_for(&node, id, end);
    let (tag, fork) = {
        let files = scan(primary.data()).unwrap();
        let found = files.forks.into_iter().max_by_key(|(_, fork)| fork.blocks).unwrap();
        (found.0, found.1.blocks)
    };
    let before = pages(&node, id, end, tag, fork);
    node.kill().unwrap();
    let found = node_journal(&node, id);
    flip(&found, middle(&found));
    node.start_again().unwrap();
    wait_for(&node, id, end);
    assert!(before == pages(&node, id, end, tag, fork), "pages differ");
    let log = std::fs::read_to_string(node.log_path()).unwrap();
    assert!(log.contains("the journal in"), "{}", log_tail(&node));

    // Again, and this time the primary is not there.
    node.kill().unwrap();
    flip(&found, middle(&found));
    primary.stop(StopMode::Fast).unwrap();
    node.start_again().unwrap();
    let short = info(&node, id);
    assert!(short.last_record_lsn < end, "{short:?}");
    until("the error of the source", || info(&node, id).wal_source_error.is_some());
    let error = info(&node, id).wal_source_error.unwrap();
    assert!(error.contains("cannot connect"), "{error}");
    let answer = client(&node, id, end).ask(Query::GetPage { rel: tag, block: 0 }).unwrap();
    let Answer::Error(text) = answer else { panic!("a page of the past: {answer:?}") };
    assert!(text.contains(&format!("waiting for WAL up to {end}")), "{text}");
}

/// The segment of the journal in which most was written.
fn node_journal(node: &DemoNode, id: Id) -> PathBuf {
    let files = std::fs::read_dir(timeline_dir(node, id).join("wal")).unwrap();
    let mut files: Vec<PathBuf> = files.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().max_by_key(|path| middle(path)).unwrap()
}

/// Half of the length up to the last byte that is not zero.
fn middle(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 / 2 + 5000)
}

/// Processes whose parent is `pid`.
fn children(pid: u32) -> Vec<u32> {
    let numbers = std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let parent = |of: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{of}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok()
    };
    numbers.filter(|of| parent(of) == Some(pid)).collect()
}

#[test]
fn tables_and_b_trees_need_no_process() {
    let root = Root::new("no-process");
    let primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 1).unwrap();
    let node = root.node(&[]);
    let id = Id(1, 1);
    succeeds(&node, "attach", id, &["--primary", &primary.conninfo()]);
    primary.pgbench("postgres", &["-c", "2", "-T", "2"], |_| {}).unwrap();
    primary.psql("postgres", "VACUUM").unwrap();
    let end = primary.lsn("SELECT pg_current_wal_flush_lsn()").unwrap();
    wait_for(&node, id, end);
    for (rel, fork) in scan(primary.data()).unwrap().forks {
        if rel.fork != FORK_FSM {
            pages(&node, id, end, rel, fork.blocks);
        }
    }
    let redone = counter(&node, "redo_pages_native");
    assert!(redone > 100, "{redone} pages");
    assert_eq!(redone, counter(&node, "redo_requests"));
    assert_eq!(counter(&node, "redo_misfits"), 0);
    assert_eq!(children(node.pid().unwrap()), Vec::<u32>::new());
}

/// The sum of a counter over all cores.
fn counter(node: &DemoNode, name: &str) -> u64 {
    let text = node.admin().unwrap().metrics().unwrap();
    let prefix = format!("pgstrata_{name}_total{{");
    let lines = text.lines().filter(|line| line.starts_with(&prefix));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

/// Each of the tenants has a process that has worked for it; what the admin API and the metrics
/// say agrees with the kernel.
fn shows_its_processes(node: &DemoNode, ids: &[Id]) {
    let cores = node.admin().unwrap().redo().unwrap();
    let cores = cores.as_array().unwrap();
    let shown: Vec<_> =
        cores.iter().flat_map(|core| core["children"].as_array().unwrap()).collect();
    let running = children(node.pid().unwrap());
    for id in ids {
        let of = |child: &&&serde_json::Value| child["tenant"] == id.shard().to_string();
        let child = shown.iter().find(of).unwrap();
        let number = |name: &str| child[name].as_u64().unwrap();
        assert!(running.contains(&(number("pid") as u32)), "{child} {running:?}");
        assert!(number("requests") > 0 && number("last_redo_ms_ago") <= number("age_ms"));
    }
    let alive: u64 = cores.iter().map(|core| core["alive"].as_u64().unwrap()).sum();
    assert!(alive >= ids.len() as u64, "{cores:?}");
    assert!(counter(node, "redo_children_started") >= ids.len() as u64);
    assert_eq!(counter(node, "redo_failures"), 0);
    let text = node.admin().unwrap().metrics().unwrap();
    let sum = |name: &str, label: &str| -> f64 {
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    // Resource manager 12 is Hash.
    assert!(sum("pgstrata_redo_type_records_total{", "manager=\"12\"") > 0.0, "{text}");
    let by = |who: &str| sum("pgstrata_redo_type_records_total{", &format!("by=\"{who}\""));
    let total = |name: &str| sum(&format!("pgstrata_{name}_total{{"), "");
    assert_eq!(by("native"), total("redo_records_native"));
    assert_eq!(by("native") + by("child"), total("redo_records"));
    assert!(sum("pgstrata_redo_children_alive{", "") >= ids.len() as f64);
    assert_eq!(total("redo_child_errors"), 0.0);
    let launches = sum("pgstrata_redo_launch_seconds_count{", "");
    assert_eq!(launches, total("redo_children_started"));
    assert!(sum("pgstrata_redo_launch_seconds_sum{", "") > 0.0);
    let requests = total("redo_requests");
    for histogram in ["seconds", "records", "bytes"] {
        let name = format!("pgstrata_redo_page_{histogram}");
        assert_eq!(sum(&format!("{name}_count{{"), ""), requests, "{name}");
        assert!(sum(&format!("{name}_sum{{"), "") > 0.0, "{name}");
    }
}

#[test]
fn sigterm_ends_connections_and_children() {
    let root = Root::new("sigterm");
    let primary = root.cluster("primary", false);
    // The second base backup's checkpoint must not take WAL that the first timeline has yet to get.
    primary.psql("postgres", "ALTER SYSTEM SET wal_keep_size = '1GB'").unwrap();
    primary.psql("postgres", "SELECT pg_reload_conf()").unwrap();
    primary.pgbench_init("postgres", 1).unwrap();
    let mut node = root.node(&[]);
    let source = primary.conninfo();
    for id in [Id(1, 1), Id(2, 1)] {
        succeeds(&node, "attach", id, &["--primary", &source]);
    }
    primary.pgbench("postgres", &["-c", "2", "-T", "1"], |_| {}).unwrap();
    // Hash indexes are left to the wal-redo processes.
    let hashed = "CREATE TABLE hashed (id int); CREATE INDEX hashed_id ON hashed USING hash (id);
        INSERT INTO hashed SELECT generate_series(1, 5000)";
    primary.psql("postgres", hashed).unwrap();
    let end = primary.lsn("SELECT pg_current_wal_flush_lsn()").unwrap();
    let number = |sql| primary.value("postgres", sql).unwrap().parse::<u32>().unwrap();
    let rel = RelNode {
        spc: 1663,
        db: number("SELECT oid FROM pg_database WHERE datname = current_database()"),
        rel: number("SELECT pg_relation_filenode('hashed_id')"),
    }
    .fork(0);
    let blocks = scan(primary.data()).unwrap().forks[&rel].blocks;
    let mut clients = Vec::new();
    for id in [Id(1, 1), Id(2, 1)] {
        wait_for(&node, id, end);
        pages(&node, id, end, rel, blocks);
        clients.extend((0..20).map(|_| client(&node, id, end)));
    }
    shows_its_processes(&node, &[Id(1, 1), Id(2, 1)]);
    // Half of a start-up message, a request without an end, and one that waits for its LSN.
    let mut half = TcpStream::connect(node.page_address()).unwrap();
    half.write_all(&start_up()[..5]).unwrap();
    let mut late = client(&node, Id(1, 1), Lsn(end.0 + (1 << 30)));
    let waiting = std::thread::spawn(move || late.ask(Query::Exists { rel }));
    // A base backup that stands still.
    let stalled = stalling_proxy(&primary);
    let create = node.admin().unwrap();
    create
        .create_timeline(
            Id(5, 1).shard(),
            Id(5, 1).timeline(),
            &pgstrata::shard::control::TimelineSource::Primary {
                conninfo: format!("host=127.0.0.1 port={stalled} user=postgres"),
                slot: None,
            },
        )
        .unwrap();
    until("the base backup begins", || {
        info(&node, Id(5, 1)).import.is_some_and(|import| import.bytes_done > 1_000_000)
    });

    let pid = node.pid().unwrap();
    let redo = children(pid);
    assert!(redo.len() >= 2, "{redo:?}: no wal-redo children were started");
    let begin = Instant::now();
    node.stop().unwrap();
    let took = begin.elapsed();
    println!("{} children; SIGTERM took {took:?}", redo.len());
    assert!(took < Duration::from_secs(15), "SIGTERM took {took:?}");
    for child in redo {
        assert!(!Path::new(&format!("/proc/{child}")).exists(), "child {child} is left over");
    }
    assert!(!matches!(waiting.join().unwrap(), Ok(Answer::Exists(_))));
    // Nothing of the base backup is left after the next start.
    node.start_again().unwrap();
    assert!(!timeline_dir(&node, Id(5, 1)).exists());
    assert_eq!(info(&node, Id(1, 1)).state, TimelineState::Active);
}

/// The port of a proxy that lets 4 MB of the primary's bytes through and then holds still.
fn stalling_proxy(primary: &PgCluster) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let target = primary.conninfo();
    let target = target.split("port=").nth(1).unwrap().split(' ').next().unwrap();
    let target: u16 = target.parse().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let there = TcpStream::connect(("127.0.0.1", target)).unwrap();
            let (mut from, mut to) = (stream.try_clone().unwrap(), there.try_clone().unwrap());
            std::thread::spawn(move || std::io::copy(&mut from, &mut to));
            std::thread::spawn(move || {
                let (mut stream, there) = (stream, there);
                let _ = std::io::copy(&mut (&there).take(4_000_000), &mut stream);
                std::thread::sleep(Duration::from_secs(60));
            });
        }
    });
    port
}

/// What `psql` prints for one command of the page service, and what it complains of.
fn psql(node: &DemoNode, command: &str) -> (String, String) {
    let program = pgstrata::cli::pg::bin_dir().join("psql");
    let address = node.page_address();
    let port = address.split_once(':').unwrap().1;
    let target = format!("host=127.0.0.1 port={port} user=u dbname=d sslmode=disable");
    let output = std::process::Command::new(program)
        .args(["--no-psqlrc", "-At", "--pset", "null=NULL", "-d", &target, "-c", command])
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[test]
fn leases_are_taken_over_libpq() {
    let root = Root::new("lease");
    let cluster = root.stopped_cluster();
    let mut node = root.node(&[]);
    let id = Id(1, 1);
    succeeds(&node, "import", id, &["--pgdata", text(cluster.data())]);
    let lsn = info(&node, id).last_record_lsn;
    let command = |lsn: Lsn| format!("lease lsn {} {} {lsn}", id.shard(), id.timeline());
    let now_ms = || {
        let now = std::time::SystemTime::now();
        now.duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
    };
    let before = now_ms();
    let (answer, complaint) = psql(&node, &command(lsn));
    let valid_until: u64 = answer.parse().unwrap_or_else(|_| panic!("{answer} {complaint}"));
    let minutes = (before + 599_000)..=(now_ms() + 600_000);
    assert!(minutes.contains(&valid_until), "{valid_until}, it is {before}");
    let held = |node: &DemoNode| {
        let client = node.admin().unwrap();
        let args: [(&str, String); 0] = [];
        client.history::<serde_json::Value>(id.shard(), id.timeline(), "lsn_lease", &args).unwrap()
    };
    assert_eq!(held(&node)["leases"][0]["lsn"], lsn.to_string());
    // Never: NULL, and why. Not yet: an error.
    let (answer, complaint) = psql(&node, &command(Lsn(8)));
    assert!(
        answer == "NULL" && complaint.contains("history of this timeline begins"),
        "{complaint}"
    );
    let (answer, complaint) = psql(&node, &command(Lsn(lsn.0 + (1 << 30))));
    assert!(answer.is_empty() && complaint.contains("ask again when it is there"), "{complaint}");
    let other = Id(2, 2);
    let unknown = format!("lease lsn {} {} {lsn}", other.shard(), other.timeline());
    assert!(psql(&node, &unknown).1.contains("is not on this node"));
    assert!(psql(&node, "lease lsn 1 2 3").1.contains("write: lease lsn TENANT TIMELINE LSN"));
    // The lease is there after a crash; a renewal does not shorten it.
    node.kill().unwrap();
    node.start_again().unwrap();
    assert_eq!(held(&node)["leases"][0]["lsn"], lsn.to_string());
    let renewed: u64 = psql(&node, &command(lsn)).0.parse().unwrap();
    assert!(renewed >= valid_until);
    // The page service goes on after it, and it is all counted.
    is_equal(&node, id, lsn, cluster.data(), false);
}
