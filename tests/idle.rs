//! Ten thousand connections that wait: what they cost, and that they are served when they speak.
//!
//! `IDLE_CONNECTIONS` says how many.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use common::*;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pgstrata::base::RelTag;
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::verify_files::{ForkFiles, scan};

/// What a connection may take of the node's memory, the kernel's part apart.
const BYTES_PER_CONNECTION_MAX: u64 = 6 * 1024;

fn rss_bytes(node: &DemoNode) -> u64 {
    let path = format!("/proc/{}/status", node.pid().unwrap());
    let status = std::fs::read_to_string(path).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn message(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
    out.push(tag);
    out.extend((body.len() as u32 + 4).to_be_bytes());
    out.extend(body);
}

fn reply(stream: &mut TcpStream) -> (u8, Vec<u8>) {
    let mut head = [0; 5];
    stream.read_exact(&mut head).unwrap();
    let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).unwrap();
    (head[0], body)
}

/// An open page stream of version 2.
fn open(node: &DemoNode, id: Id) -> TcpStream {
    let mut stream = TcpStream::connect(node.page_address()).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let body = b"\0\x03\0\0user\0u\0\0";
    let mut out = (body.len() as u32 + 4).to_be_bytes().to_vec();
    out.extend_from_slice(body);
    let query = format!("pagestream_v2 {} {}\0", id.tenant(), id.timeline());
    message(&mut out, b'Q', query.as_bytes());
    stream.write_all(&out).unwrap();
    while reply(&mut stream).0 != b'W' {}
    stream
}

fn page_is_served(stream: &mut TcpStream, rel: RelTag, fork: &ForkFiles, lsn: u64) {
    let block = fastrand::u32(0..fork.blocks);
    let mut body = vec![2];
    body.extend(u64::MAX.to_be_bytes());
    body.extend(lsn.to_be_bytes());
    for number in [rel.node.spc, rel.node.db, rel.node.rel] {
        body.extend(number.to_be_bytes());
    }
    body.push(rel.fork);
    body.extend(block.to_be_bytes());
    let mut out = Vec::new();
    message(&mut out, b'd', &body);
    stream.write_all(&out).unwrap();
    let (tag, body) = reply(stream);
    assert_eq!((tag, body[0]), (b'd', 102), "{}", String::from_utf8_lossy(&body));
    assert!(body[1..] == fork.page(block).unwrap().unwrap(), "block {block} is wrong");
}

#[test]
fn idle_connections_are_cheap() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    let wanted = std::env::var("IDLE_CONNECTIONS").map_or(10_000, |text| text.parse().unwrap());
    // The node has as many files as this process, and some of its own.
    let connections: usize = wanted.min((hard as usize).saturating_sub(500));
    let root = Root::new("idle");
    let cluster = root.stopped_cluster();
    // One core has them all.
    let node = root.node(&["cores=[0]", "log_filter=warn"]);
    let id = Id(1, 1);
    succeeds(&node, "import", id, &["--pgdata", cluster.data().to_str().unwrap()]);
    let lsn = info(&node, id).last_record_lsn;
    is_equal(&node, id, lsn, cluster.data(), false);
    let files = scan(cluster.data()).unwrap();
    let (rel, fork) = files.forks.iter().max_by_key(|(_, fork)| fork.blocks).unwrap();

    let before = rss_bytes(&node);
    let begin = Instant::now();
    let mut streams = Vec::new();
    for _ in 0..connections {
        let mut stream = open(&node, id);
        page_is_served(&mut stream, *rel, fork, lsn.0);
        streams.push(stream);
    }
    let opened = begin.elapsed();
    let idle = rss_bytes(&node);
    let each = idle.saturating_sub(before) / connections as u64;
    println!(
        "{connections} connections, opened and served in {:.1} s: RSS {} KiB before, {} KiB with \
         them, {each} bytes each",
        opened.as_secs_f64(),
        before / 1024,
        idle / 1024,
    );
    assert!(each <= BYTES_PER_CONNECTION_MAX, "an idle connection takes {each} bytes");
    // They are all alive, and do not slow each other down.
    let begin = Instant::now();
    for stream in streams.iter_mut().step_by(7) {
        page_is_served(stream, *rel, fork, lsn.0);
    }
    let mean = begin.elapsed() / (connections / 7).max(1) as u32;
    println!("a page for one of them takes {:.2} ms", mean.as_secs_f64() * 1e3);
    drop(streams);
    let open = || {
        let metrics = node.admin().unwrap().metrics().unwrap();
        let lines = metrics.lines().filter(|line| line.starts_with("pgstrata_connections_open{"));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum::<u64>()
    };
    until("the end of the connections", || open() == 0);
    let log = std::fs::read_to_string(node.log_path()).unwrap();
    assert!(!log.contains("ERROR") && !log.contains("WARN"), "{}", log_tail(&node));
}
