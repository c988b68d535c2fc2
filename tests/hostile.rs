//! A running node under hostile input: messages that are none, or half, or nonsense, floods, slow
//! senders. Nobody else may notice, and nothing may be left over.
//!
//! `HOSTILE_MESSAGES` says how many messages are sent; those that nobody waits for the answers of
//! (floods, resets) come on top.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a test that runs programs"
)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::*;
use fastrand::Rng;
use pgstrata::base::RelTag;
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::page_client::PageClient;
use pgstrata::cli::verify_files::{ForkFiles, scan};
use pgstrata::server::page_protocol::{Answer, Query};

/// Connections that attack at the same time, slow ones and floods apart.
const ATTACKERS: u64 = 4;
const SLOW_SENDERS: usize = 64;
/// What a node may have grown by at the end: pieces that its allocator keeps.
const RSS_SLACK_KIB: u64 = 16 * 1024;
/// How long a client in order may wait for a page meanwhile: a hundred times and more what it waits
/// when it is alone, for all threads of attackers may run on the core that serves it.
const MEDIAN_US_MAX: u64 = 20_000;
const P99_US_MAX: u64 = 250_000;
/// What others say wrong is no news for the operator.
const LOG_BYTES_MAX: usize = 4096;
const TIME_MAX: Duration = Duration::from_secs(60);

/// What the open descriptors of a process stand for, without files of its data directory: those
/// are opened when they are first read.
fn open_files(pid: u32, data: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    // A descriptor may be closed between the listing and the look at it.
    let links = entries.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    let outside = links.filter(|link| !link.starts_with(data));
    let mut kinds: Vec<String> = outside
        .map(|link| link.to_string_lossy().split('[').next().unwrap_or_default().to_owned())
        .collect();
    kinds.sort();
    kinds
}

fn rss_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn packet(code: u32, body: &[u8]) -> Vec<u8> {
    let mut out = (body.len() as u32 + 8).to_be_bytes().to_vec();
    out.extend(code.to_be_bytes());
    out.extend_from_slice(body);
    out
}

fn start_up() -> Vec<u8> {
    packet(0x3_0000, b"user\0u\0\0")
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.extend((body.len() as u32 + 4).to_be_bytes());
    out.extend(body);
    out
}

fn noise(rng: &mut Rng, lengths: std::ops::Range<usize>) -> Vec<u8> {
    (0..rng.usize(lengths)).map(|_| rng.u8(..)).collect()
}

/// Text without a NUL.
fn words(rng: &mut Rng, length: usize) -> Vec<u8> {
    (0..rng.usize(0..=length)).map(|_| rng.u8(1..128)).collect()
}

/// What one connection sends, and how many replies of which type must come back.
struct Script {
    bytes: Vec<u8>,
    messages: u64,
    reply: u8,
    replies: u64,
}

/// Tenant, timeline and LSN that exist, and messages that fuzzing has kept.
struct Target {
    address: String,
    id: Id,
    lsn: u64,
    corpus: Vec<Vec<u8>>,
}

/// The last message of a connection: one that cannot be gone on after, or half of one.
fn last_words(rng: &mut Rng, out: &mut Vec<u8>) -> u64 {
    match rng.u8(0..6) {
        0 => return 0,
        1 => out.push(*rng.choice(b"\0\x01AZNR~\xff").unwrap()),
        2 => {
            out.push(*rng.choice(b"QPBDECSHdcfX").unwrap());
            out.extend(rng.u32(0..4).to_be_bytes());
        }
        3 => {
            out.push(*rng.choice(b"QPBDECSHdcfX").unwrap());
            out.extend(rng.u32(65_537..).to_be_bytes());
        }
        4 => {
            let (tag, body): (u8, &[u8]) = rng
                .choice([
                    (b'Q', &b"no end"[..]),
                    (b'Q', b"\xff\xfe\0"),
                    (b'Q', b"two\0texts\0"),
                    (b'P', b"s\0q\0\xff\xff"),
                    (b'D', b"Xs\0"),
                    (b'E', b"p\0\0"),
                    (b'S', b"more"),
                    (b'C', b""),
                ])
                .unwrap();
            out.extend(message(tag, body));
        }
        _ => {
            out.push(b'd');
            out.extend(rng.u32(500..60_000).to_be_bytes());
            out.extend(noise(rng, 0..300));
        }
    }
    1
}

/// Commands that are refused; each query, and each group that a `Sync` ends, is answered once.
fn commands(rng: &mut Rng, target: &Target) -> Script {
    let mut script = Script { bytes: start_up(), messages: 1, reply: b'Z', replies: 1 };
    let (tenant, timeline) = (target.id.tenant(), target.id.timeline());
    let unknown = "ab".repeat(16);
    let count = rng.u64(1..300);
    while script.messages < count {
        let mut put = |tag, body: &[u8]| {
            script.bytes.extend(message(tag, body));
            script.messages += 1;
        };
        if rng.bool() {
            let text = match rng.u8(0..8) {
                0 => format!("pagestream_v2 {unknown} {timeline}"),
                1 => format!("pagestream_v3 {tenant} {unknown}"),
                2 => format!("pagestream_v9 {tenant} {timeline}"),
                3 => format!("basebackup {tenant} {timeline} 0/1000"),
                4 => format!("lease lsn {tenant} {timeline} FFFFFFFF/FFFFFFF8"),
                5 => format!("fullbackup {tenant} {timeline} {} --zip", "9".repeat(40)),
                6 => String::new(),
                _ => String::from_utf8(words(rng, 200)).unwrap(),
            };
            put(b'Q', &[text.as_bytes(), b"\0"].concat());
            // Text that happens to be a setting is answered too.
            script.replies += 1;
            continue;
        }
        for _ in 0..rng.u8(0..6) {
            let name = [&words(rng, 8)[..], b"\0"].concat();
            match rng.u8(0..8) {
                0 => put(b'P', &[&name[..], &words(rng, 90), b"\0\0\0"].concat()),
                1 => put(b'B', &[&name[..], &name, &noise(rng, 0..40)].concat()),
                2 => put(b'D', &[b"S", &name[..]].concat()),
                3 => put(b'C', &[b"P", &name[..]].concat()),
                4 => put(b'E', &[&name[..], b"\0\0\0\0"].concat()),
                5 => put(b'd', &noise(rng, 0..200)),
                6 => put(b'f', &name),
                _ => put(*rng.choice(b"cH").unwrap(), b""),
            }
        }
        put(b'S', b"");
        script.replies += 1;
    }
    script.messages += last_words(rng, &mut script.bytes);
    script
}

/// A request that is none, or one for what there is not.
fn request(rng: &mut Rng, target: &Target, v3: bool) -> Vec<u8> {
    let mut head = vec![rng.u8(0..5)];
    if v3 {
        head.extend(rng.u64(..).to_be_bytes());
    }
    let lsns = [target.lsn, u64::MAX, 0, 8, rng.u64(..)];
    for _ in 0..2 {
        head.extend(rng.choice(lsns).unwrap().to_be_bytes());
    }
    let header = head.len();
    let relation = |rng: &mut Rng, head: &mut Vec<u8>| {
        for number in [1663, rng.u32(..), rng.u32(0..40_000)] {
            head.extend(number.to_be_bytes());
        }
        head.push(rng.u8(..));
    };
    match rng.u8(0..40) {
        // Nothing but noise; in version 3 what is shorter than a header ends the connection.
        0..10 => return noise(rng, if v3 { header..90 } else { 0..90 }),
        10..20 => {
            let mut kept = rng.choice(&target.corpus).unwrap().clone();
            kept.resize(kept.len().max(if v3 { header } else { 0 }), 0);
            for _ in 0..rng.u8(0..3) {
                let place = rng.usize(0..kept.len().max(1));
                if let Some(byte) = kept.get_mut(place) {
                    *byte = rng.u8(..);
                }
            }
            return kept;
        }
        20..28 => {
            head[0] = 2;
            relation(rng, &mut head);
            head.extend(rng.u32(..).to_be_bytes());
        }
        28..31 => {
            relation(rng, &mut head);
            head.truncate(header + rng.usize(0..14));
        }
        31..34 => head.extend(noise(rng, 0..40)),
        34..38 => {
            head[0] = *rng.choice(&[5, 9, 99, 102, 255]).unwrap();
            relation(rng, &mut head);
        }
        38 => head.extend(vec![7; rng.usize(1000..20_000)]),
        _ => {}
    }
    head
}

/// A page stream in which every message is answered once.
fn stream(rng: &mut Rng, target: &Target) -> Script {
    let v3 = rng.bool();
    let (tenant, timeline) = (target.id.tenant(), target.id.timeline());
    let open = format!("pagestream_v{} {tenant} {timeline}\0", if v3 { 3 } else { 2 });
    let mut bytes = start_up();
    bytes.extend(message(b'Q', open.as_bytes()));
    let replies = rng.u64(1..400);
    for _ in 0..replies {
        bytes.extend(message(b'd', &request(rng, target, v3)));
    }
    let mut messages = 2 + replies;
    if v3 && rng.bool() {
        bytes.extend(message(b'd', &noise(rng, 0..25)));
        messages += 1;
    } else {
        messages += last_words(rng, &mut bytes);
    }
    Script { bytes, messages, reply: b'd', replies }
}

/// Requests for encryption, each answered by one byte, and a start-up that is none.
fn start_ups(rng: &mut Rng) -> Script {
    let kind = rng.u8(0..6);
    // Who asks for a cancellation waits for no answer.
    let replies = if kind == 0 { 0 } else { rng.u64(0..50) };
    let mut bytes = Vec::new();
    for _ in 0..replies {
        bytes.extend(packet(*rng.choice(&[80_877_103, 80_877_104]).unwrap(), b""));
    }
    match kind {
        0 => bytes.extend(packet(80_877_102, &[0; 8])),
        1 => bytes.extend(packet(0x2_0000, b"\0")),
        2 => bytes.extend(packet(0x3_0000, b"user")),
        3 => bytes.extend(packet(0x3_0000, b"user\0\xff\xff\0\0")),
        4 => bytes.extend(rng.u32(10_001..).to_be_bytes()),
        _ => bytes.extend(rng.u32(0..8).to_be_bytes()),
    }
    Script { bytes, messages: replies + 1, reply: b'N', replies }
}

/// How many replies of a type there are.
fn count(script: &Script, mut bytes: &[u8]) -> u64 {
    if script.reply == b'N' {
        return bytes.iter().take_while(|byte| **byte == b'N').count() as u64;
    }
    let mut found = 0;
    while let Some((head, rest)) = bytes.split_first_chunk::<5>() {
        let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize - 4;
        found += u64::from(head[0] == script.reply);
        bytes = rest.get(length..).unwrap_or_else(|| panic!("a reply is cut"));
    }
    found
}

/// Sends `quota` messages, as many as a script has on one connection; returns messages and
/// connections.
fn attack(target: &Target, seed: u64, quota: u64) -> (u64, u64) {
    let mut rng = Rng::with_seed(seed);
    let (mut messages, mut connections) = (0, 0);
    while messages < quota {
        let script = match rng.u8(0..10) {
            0 => start_ups(&mut rng),
            1..5 => commands(&mut rng, target),
            _ => stream(&mut rng, target),
        };
        let mut socket = TcpStream::connect(&target.address).unwrap();
        socket.set_read_timeout(Some(TIME_MAX)).unwrap();
        socket.set_write_timeout(Some(TIME_MAX)).unwrap();
        connections += 1;
        if rng.u8(0..20) == 0 {
            // Cut anywhere, and gone before the answers are there.
            let part = rng.usize(0..=script.bytes.len());
            let _ = socket.write_all(&script.bytes[..part]);
            continue;
        }
        socket.write_all(&script.bytes).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        let end = socket.read_to_end(&mut back);
        let found = count(&script, &back);
        assert!(
            end.is_ok() && found == script.replies,
            "seed {seed}, after {messages} messages: {found} replies of type {} instead of {}, {end:?}",
            char::from(script.reply),
            script.replies
        );
        messages += script.messages;
    }
    (messages, connections)
}

/// Requests that are in order, thousands at once, whose answers nobody takes.
fn flood(target: &Target, fork: (RelTag, u32), done: &AtomicBool) -> u64 {
    let mut floods = 0;
    let (tenant, timeline) = (target.id.tenant(), target.id.timeline());
    while !done.load(Ordering::Acquire) {
        let mut bytes = start_up();
        bytes.extend(message(b'Q', format!("pagestream_v2 {tenant} {timeline}\0").as_bytes()));
        for _ in 0..3000 {
            let mut body = vec![2];
            body.extend(u64::MAX.to_be_bytes());
            body.extend(target.lsn.to_be_bytes());
            for number in [fork.0.node.spc, fork.0.node.db, fork.0.node.rel] {
                body.extend(number.to_be_bytes());
            }
            body.push(fork.0.fork);
            body.extend(fastrand::u32(0..fork.1).to_be_bytes());
            bytes.extend(message(b'd', &body));
        }
        let mut socket = TcpStream::connect(&target.address).unwrap();
        socket.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // The node stops reading when nobody takes its answers.
        let _ = socket.write_all(&bytes);
        std::thread::sleep(Duration::from_millis(300));
        floods += 1;
    }
    floods
}

/// Connections that send a byte now and then.
fn send_slowly(target: &Target, done: &AtomicBool) {
    let (tenant, timeline) = (target.id.tenant(), target.id.timeline());
    let mut bytes = start_up();
    bytes.extend(message(b'Q', format!("pagestream_v3 {tenant} {timeline}\0").as_bytes()));
    bytes.extend(message(b'd', &[2; 42]));
    let connect = |_| TcpStream::connect(&target.address).unwrap();
    loop {
        let mut sockets: Vec<TcpStream> = (0..SLOW_SENDERS).map(connect).collect();
        for byte in &bytes {
            if done.load(Ordering::Acquire) {
                return;
            }
            for socket in &mut sockets {
                socket.write_all(&[*byte]).unwrap();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Set when the value goes, also by a panic: other threads of the scope wait for it.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// In microseconds.
type Latencies = hdrhistogram::Histogram<u64>;

/// A client in order: every page that it gets is right.
fn steady(client: &mut PageClient, rel: RelTag, fork: &ForkFiles, done: &AtomicBool) -> Latencies {
    let mut seen = Latencies::new(3).unwrap();
    while !done.load(Ordering::Acquire) {
        let block = fastrand::u32(0..fork.blocks);
        let begin = Instant::now();
        let answer = client.ask(Query::GetPage { rel, block }).unwrap();
        seen.record(begin.elapsed().as_micros() as u64).unwrap();
        let Answer::GetPage(page) = answer else { panic!("{answer:?}") };
        assert_eq!(page, fork.page(block).unwrap().unwrap());
    }
    seen
}

fn percentiles(of: &Latencies) -> String {
    let ms = |quantile| of.value_at_quantile(quantile) as f64 / 1e3;
    format!(
        "{} pages: half within {:.2} ms, 99 % within {:.1} ms, all within {:.0} ms",
        of.len(),
        ms(0.5),
        ms(0.99),
        of.max() as f64 / 1e3
    )
}

/// The status line of the reply to `request`.
fn http(node: &DemoNode, request: &[u8]) -> String {
    let address = node.admin_url().replace("http://", "");
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let _ = stream.write_all(request);
    if !request.ends_with(b"\r\n\r\n") && !request.starts_with(b"POST") {
        let _ = stream.shutdown(Shutdown::Write);
    }
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    String::from_utf8_lossy(&reply).lines().next().unwrap_or_default().to_owned()
}

fn attack_admin(node: &DemoNode, id: Id) {
    let request = |method: &str, path: &str, body: &str| {
        let length = body.len();
        http(
            node,
            format!(
                "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                 content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
            )
            .as_bytes(),
        )
    };
    let tenant = id.shard().to_string();
    let path = format!("/v1/tenant/{tenant}/timeline");
    let deep = "[".repeat(50_000);
    for body in
        ["", "{", "null", "[1]", "{\"timeline\":1}", "{\"timeline\":\"zz\",\"source\":{}}", &deep]
    {
        let status = request("POST", &path, body);
        assert!(status.contains(" 400 "), "{body:.20}: {status}");
    }
    let huge = "x".repeat(200_000);
    let status = request("POST", &path, &huge);
    assert!(status.contains(" 413 ") || status.contains(" 400 ") || status.is_empty(), "{status}");
    for (path, expected) in [
        ("/", " 404 "),
        ("/v1/tenant/zz/timeline", " 400 "),
        ("/v1/tenant/%00%ff/timeline", " 400 "),
        ("/v1/tenant/../../etc/passwd", " 404 "),
        (&format!("{path}/zz"), " 400 "),
        (&format!("{path}/{}", "ee".repeat(16)), " 404 "),
        (&format!("/v1/tenant/{}/timeline", "ee".repeat(16)), " 404 "),
    ] {
        let status = request("GET", path, "");
        assert!(status.contains(expected), "{path}: {status}");
    }
    assert!(request("DELETE", &path, "").contains(" 405 "));
    // A tenant's name must never leave the data directory.
    let source = r#"{"pgdata":{"path":"/nonexistent","primary":null,"slot":null}}"#;
    let body = format!("{{\"timeline\":\"../../../x\",\"source\":{source}}}");
    assert!(request("POST", &path, &body).contains(" 400 "));
    for _ in 0..200 {
        let bytes: Vec<u8> = (0..fastrand::usize(0..300)).map(|_| fastrand::u8(..)).collect();
        http(node, &bytes);
    }
}

/// What was sent, and what was seen meanwhile.
struct Attacked {
    messages: u64,
    connections: u64,
    floods: u64,
    rss_peak_kib: u64,
    steady: Latencies,
}

/// All kinds of attackers at once, and a client in order among them.
fn attack_all(
    node: &DemoNode,
    target: &Target,
    wanted: u64,
    (rel, fork): (RelTag, &ForkFiles),
    client: &mut PageClient,
) -> Attacked {
    let pid = node.pid().unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let steady = scope.spawn(|| steady(client, rel, fork, &done));
        scope.spawn(|| send_slowly(target, &done));
        let floods = scope.spawn(|| flood(target, (rel, fork.blocks), &done));
        // Also when an attack fails: the scope waits for the others.
        let _finish = Finish(&done);
        let attackers: Vec<_> = (1..=ATTACKERS)
            .map(|seed| scope.spawn(move || attack(target, seed, wanted.div_ceil(ATTACKERS))))
            .collect();
        attack_admin(node, target.id);
        let mut rss_peak_kib = 0;
        while attackers.iter().any(|attacker| !attacker.is_finished()) {
            rss_peak_kib = rss_peak_kib.max(rss_kib(pid));
            std::thread::sleep(Duration::from_millis(50));
        }
        let (mut messages, mut connections) = (0, 0);
        for attacker in attackers {
            let sent = attacker.join().unwrap();
            messages += sent.0;
            connections += sent.1;
        }
        done.store(true, Ordering::Release);
        let (steady, floods) = (steady.join().unwrap(), floods.join().unwrap());
        Attacked { messages, connections, floods, rss_peak_kib, steady }
    })
}

/// What the same client gets when nobody else is there.
fn alone(client: &mut PageClient, rel: RelTag, fork: &ForkFiles) -> Latencies {
    let enough = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let alone = scope.spawn(|| steady(client, rel, fork, &enough));
        std::thread::sleep(Duration::from_secs(1));
        enough.store(true, Ordering::Release);
        alone.join().unwrap()
    })
}

fn corpus() -> Vec<Vec<u8>> {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("test_data/fuzz/page_protocol");
    let kept = std::fs::read_dir(kept).unwrap().map(|entry| entry.unwrap().path());
    kept.map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn garbage_hurts_nobody() {
    let wanted = std::env::var("HOSTILE_MESSAGES").map_or(20_000, |text| text.parse().unwrap());
    let root = Root::new("hostile");
    let cluster = root.stopped_cluster();
    let node = root.node(&["log_filter=warn"]);
    let id = Id(1, 1);
    succeeds(&node, "import", id, &["--pgdata", cluster.data().to_str().unwrap()]);
    let lsn = info(&node, id).last_record_lsn;
    is_equal(&node, id, lsn, cluster.data(), false);
    let pid = node.pid().unwrap();
    let mut client = client(&node, id, lsn);
    let files = scan(cluster.data()).unwrap();
    let (rel, fork) = files.forks.iter().max_by_key(|(_, fork)| fork.blocks).unwrap();
    let data = std::fs::canonicalize(node.data_dir()).unwrap();
    let target = Target { address: node.page_address(), id, lsn: lsn.0, corpus: corpus() };
    // What a node takes once is taken before the count.
    attack(&target, 0, wanted / 20);
    let (before, rss_before) = (open_files(pid, &data), rss_kib(pid));
    println!("the good client alone: {}", percentiles(&alone(&mut client, *rel, fork)));
    let begin = Instant::now();
    let seen = attack_all(&node, &target, wanted, (*rel, fork), &mut client);
    let spent = begin.elapsed().as_secs_f64();
    assert!(seen.messages >= wanted);
    let quantile = |quantile| seen.steady.value_at_quantile(quantile);
    assert!(
        !seen.steady.is_empty() && quantile(0.5) <= MEDIAN_US_MAX && quantile(0.99) <= P99_US_MAX,
        "the good client was held up: {}",
        percentiles(&seen.steady)
    );
    assert_eq!(node.pid(), Some(pid));
    is_equal(&node, id, lsn, cluster.data(), false);
    until("the end of the descriptors and the memory of connections", || {
        let after = open_files(pid, &data);
        let count = |all: &[String], kind: &String| all.iter().filter(|one| *one == kind).count();
        after.iter().all(|kind| count(&after, kind) <= count(&before, kind))
            && rss_kib(pid) <= rss_before + RSS_SLACK_KIB
    });
    let log = std::fs::read_to_string(node.log_path()).unwrap();
    println!(
        "{} messages on {} connections and {} floods in {spent:.1} s; descriptors {} before, {} \
         after; RSS {rss_before} KiB before, {} at most, {} after; {} bytes of log; the good client \
         read {}",
        seen.messages,
        seen.connections,
        seen.floods,
        before.len(),
        open_files(pid, &data).len(),
        seen.rss_peak_kib,
        rss_kib(pid),
        log.len(),
        percentiles(&seen.steady),
    );
    assert!(!log.contains("panic"), "{}", log_tail(&node));
    assert!(log.len() <= LOG_BYTES_MAX, "{} bytes of log: {}", log.len(), log_tail(&node));
}
