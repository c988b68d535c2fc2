//! The exchanges of Neon's load generator pagebench with a pageserver, byte for byte: its HTTP
//! client's requests on one connection, its libpq messages, and the fields that it wants in
//! replies.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::*;
use pgstrata::base::{Key, Lsn, RelTag};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::pg::StopMode;
use pgstrata::cli::verify_files::{DataDirectory, scan};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const TIME_MAX: Duration = Duration::from_secs(60);

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(TIME_MAX)).unwrap();
    stream.set_write_timeout(Some(TIME_MAX)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// One kept-alive connection of its HTTP client, and the token that it was given.
struct Http {
    host: String,
    stream: BufReader<TcpStream>,
    token: Option<&'static str>,
}

impl Http {
    fn new(node: &DemoNode, token: Option<&'static str>) -> Http {
        let host = node.admin_url().replace("http://", "");
        let stream = BufReader::new(connect(&host));
        Http { host, stream, token }
    }

    /// Status and body. `pieces`: the body follows its head after a while.
    fn request(&mut self, method: &str, path: &str, pieces: bool) -> (u16, Value) {
        let authorization = self
            .token
            .map_or_else(String::new, |token| format!("authorization: Bearer {token}\r\n"));
        let head = format!(
            "{method} {path} HTTP/1.1\r\ncontent-type: application/json\r\n{authorization}\
             accept: */*\r\nhost: {}\r\ncontent-length: 4\r\n\r\n",
            self.host
        );
        let out = self.stream.get_mut();
        if pieces {
            out.write_all(head.as_bytes()).unwrap();
            std::thread::sleep(Duration::from_millis(60));
            out.write_all(b"null").unwrap();
        } else {
            out.write_all(format!("{head}null").as_bytes()).unwrap();
        }
        let mut line = || {
            let mut line = String::new();
            self.stream.read_line(&mut line).unwrap();
            assert!(line.ends_with("\r\n"), "the connection was not kept: {line:?}");
            line.trim_end().to_owned()
        };
        let status = line();
        let status: u16 = status.strip_prefix("HTTP/1.1 ").unwrap()[..3].parse().unwrap();
        let mut length = None;
        loop {
            let header = line().to_ascii_lowercase();
            if header.is_empty() {
                break;
            }
            assert_ne!(header, "connection: close");
            if let Some(value) = header.strip_prefix("content-length: ") {
                length = Some(value.parse::<usize>().unwrap());
            }
        }
        let mut body = vec![0; length.unwrap()];
        self.stream.read_exact(&mut body).unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    fn get<T: DeserializeOwned>(&mut self, path: &str) -> T {
        let (status, body) = self.request("GET", path, false);
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_value(body.clone()).unwrap_or_else(|e| panic!("{path}: {e} in {body}"))
    }
}

#[derive(Deserialize)]
struct Slug {
    slug: String,
}

#[derive(Deserialize)]
struct TenantInfo {
    id: String,
    state: Slug,
    attachment_status: Slug,
    generation: u32,
}

#[derive(Deserialize)]
struct TenantDetails {
    #[serde(flatten)]
    info: TenantInfo,
    timelines: Vec<String>,
}

#[derive(Deserialize)]
struct Keyspace {
    keys: Vec<(String, String)>,
    sparse_keys: Vec<(String, String)>,
    at_lsn: String,
}

/// What its `TimelineInfo` cannot do without.
#[derive(Deserialize)]
#[allow(dead_code, reason = "a missing field fails the test")]
struct TimelineInfo {
    tenant_id: String,
    timeline_id: String,
    last_record_lsn: String,
    disk_consistent_lsn: String,
    remote_consistent_lsn: String,
    remote_consistent_lsn_visible: String,
    initdb_lsn: String,
    current_logical_size: u64,
    current_logical_size_is_accurate: bool,
    directory_entries_counts: Vec<u64>,
    pitr_history_size: u64,
    within_ancestor_pitr: bool,
    pg_version: u32,
    state: String,
    walreceiver_status: String,
}

/// Without targets on its command line, it asks for them; returns tenant and timeline.
fn discover(http: &mut Http) -> (String, String) {
    let tenants: Vec<TenantInfo> = http.get("/v1/tenant");
    let [tenant] = &tenants[..] else { panic!("{} tenants", tenants.len()) };
    assert_eq!(tenant.id.len(), 32, "it refuses tenants of several shards");
    let details: TenantDetails = http.get(&format!("/v1/tenant/{}", tenant.id));
    for info in [tenant, &details.info] {
        assert_eq!(info.id, tenant.id);
        assert_eq!((&*info.state.slug, &*info.attachment_status.slug), ("Active", "attached"));
        assert!(info.generation > 0);
    }
    let [timeline] = &details.timelines[..] else { panic!("{:?}", details.timelines) };
    (tenant.id.clone(), timeline.clone())
}

/// The forks that a keyspace has, by walking it key by key as pagebench does.
fn walk(keyspace: &Keyspace) -> BTreeMap<RelTag, u32> {
    let parse = |text: &String| {
        assert_eq!(text, &text.to_uppercase());
        Key::from_bytes(&hex::decode(text).unwrap().try_into().unwrap())
    };
    let mut forks = BTreeMap::new();
    for (start, end) in &keyspace.keys {
        let (mut key, end) = (parse(start), parse(end));
        assert!(key < end);
        let tag = pgstrata::base::RelNode { spc: key.field2, db: key.field3, rel: key.field4 }
            .fork(key.field5);
        let mut blocks = 0;
        while key < end {
            // `is_rel_block_key`.
            assert!(key.field1 == 0 && key.field4 != 0 && key.field6 != u32::MAX, "{key}");
            assert_eq!(key, Key::rel_block(tag, blocks));
            blocks += 1;
            key = key.next();
        }
        assert_eq!(forks.insert(tag, blocks), None, "two ranges for {tag}");
    }
    forks
}

/// Its libpq connection: messages by hand.
struct Pg(BufReader<TcpStream>);

impl Pg {
    fn connect(node: &DemoNode) -> Pg {
        let mut pg = Pg(BufReader::new(connect(&node.page_address())));
        let body = b"\0\x03\0\0client_encoding\0UTF8\0user\0postgres\0\0";
        let mut packet = (body.len() as u32 + 4).to_be_bytes().to_vec();
        packet.extend_from_slice(body);
        pg.0.get_mut().write_all(&packet).unwrap();
        assert_eq!(pg.message(), (b'R', vec![0; 4]), "AuthenticationOk");
        let mut names = Vec::new();
        loop {
            match pg.message() {
                (b'S', body) => {
                    let name = body.split(|byte| *byte == 0).next().unwrap();
                    names.push(String::from_utf8(name.to_vec()).unwrap());
                }
                (b'Z', status) => {
                    assert_eq!(status, b"I");
                    break;
                }
                (tag, body) => panic!("{}: {body:?}", char::from(tag)),
            }
        }
        assert_eq!(names, ["client_encoding", "integer_datetimes", "server_version"]);
        pg
    }

    fn send(&mut self, messages: &[(u8, &[u8])]) {
        let mut out = Vec::new();
        for (tag, body) in messages {
            out.push(*tag);
            out.extend((body.len() as u32 + 4).to_be_bytes());
            out.extend_from_slice(body);
        }
        self.0.get_mut().write_all(&out).unwrap();
    }

    fn message(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4;
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        (head[0], body)
    }

    /// The tags of messages to come, which all have these bodies.
    fn expects(&mut self, messages: &[(u8, &[u8])]) {
        for (tag, body) in messages {
            let found = self.message();
            let text = String::from_utf8_lossy(&found.1).into_owned();
            assert_eq!((char::from(found.0), &found.1[..]), (char::from(*tag), *body), "{text}");
        }
    }

    fn page_stream(&mut self, (tenant, timeline): &(String, String)) {
        let query = format!("pagestream_v3 {tenant} {timeline}\0");
        self.send(&[(b'Q', query.as_bytes())]);
        // CopyBothResponse; nobody looks at the format.
        assert_eq!(self.message().0, b'W');
    }
}

/// The request of 42 bytes.
fn get_page(reqid: u64, request_lsn: u64, since: Lsn, tag: RelTag, block: u32) -> Vec<u8> {
    let mut out = vec![2];
    for number in [reqid, request_lsn, since.0] {
        out.extend(number.to_be_bytes());
    }
    for number in [tag.node.spc, tag.node.db, tag.node.rel] {
        out.extend(number.to_be_bytes());
    }
    out.push(tag.fork);
    out.extend(block.to_be_bytes());
    assert_eq!(out.len(), 42);
    out
}

/// Pages drawn uniformly, `batch` requests with one number each time; every reply is the echo of
/// its request and the page of the primary's file.
fn load(pg: &mut Pg, at: Lsn, request_lsn: u64, batch: u64, files: &DataDirectory) -> u64 {
    let forks: Vec<(&RelTag, u32)> =
        files.forks.iter().map(|(tag, fork)| (tag, fork.blocks)).filter(|one| one.1 > 0).collect();
    let total: u64 = forks.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
    let draw = || {
        let mut nth = fastrand::u64(0..total);
        for (tag, blocks) in &forks {
            match nth.checked_sub(u64::from(*blocks)) {
                None => return (**tag, nth as u32),
                Some(rest) => nth = rest,
            }
        }
        unreachable!("less than the sum")
    };
    let mut pages = 0;
    for reqid in 1..=100 {
        let wanted: Vec<(RelTag, u32)> = (0..batch).map(|_| draw()).collect();
        let bodies: Vec<Vec<u8>> = wanted
            .iter()
            .map(|(tag, block)| get_page(reqid, request_lsn, at, *tag, *block))
            .collect();
        let messages: Vec<(u8, &[u8])> = bodies.iter().map(|body| (b'd', &body[..])).collect();
        pg.send(&messages);
        for ((tag, block), request) in wanted.iter().zip(&bodies) {
            let (kind, reply) = pg.message();
            assert_eq!((kind, reply[0]), (b'd', 102), "{}", String::from_utf8_lossy(&reply));
            assert_eq!(reply[1..42], request[1..], "the request is echoed");
            let page = files.forks[tag].page(*block).unwrap().unwrap();
            assert!(reply[42..] == page, "{tag} block {block} differs from the primary's");
            pages += 1;
        }
    }
    pages
}

/// `copy_out` of a named statement.
fn base_backup(node: &DemoNode, (tenant, timeline): &(String, String), lsn: Lsn, options: &str) {
    let mut pg = Pg::connect(node);
    let parse = format!("s0\0basebackup {tenant} {timeline} {lsn}{options}\0\0\0");
    pg.send(&[(b'P', parse.as_bytes()), (b'D', b"Ss0\0"), (b'S', b"")]);
    pg.expects(&[(b'1', b""), (b't', b"\0\0"), (b'n', b""), (b'Z', b"I")]);
    // No parameters; results in binary.
    let bind = b"\0s0\0\0\0\0\0\0\x01\0\x01";
    pg.send(&[(b'B', bind), (b'E', b"\0\0\0\0\0"), (b'S', b"")]);
    pg.expects(&[(b'2', b"")]);
    assert_eq!(pg.message().0, b'H', "CopyOutResponse");
    let mut archive = Vec::new();
    loop {
        match pg.message() {
            (b'd', bytes) => archive.extend(bytes),
            (b'c', _) => break,
            (tag, body) => panic!("{}: {}", char::from(tag), String::from_utf8_lossy(&body)),
        }
    }
    assert_eq!(pg.message().0, b'C', "CommandComplete");
    pg.expects(&[(b'Z', b"I")]);
    // When it lets the statement go.
    pg.send(&[(b'C', b"Ss0\0"), (b'S', b"")]);
    pg.expects(&[(b'3', b""), (b'Z', b"I")]);
    pg.send(&[(b'X', b"")]);
    let mut plain = Vec::new();
    match options {
        "" => plain = archive,
        _ => drop(flate2::read::GzDecoder::new(&archive[..]).read_to_end(&mut plain).unwrap()),
    }
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(&plain[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        files.insert(entry.path().unwrap().to_string_lossy().into_owned(), content);
    }
    assert_eq!(files["PG_VERSION"], b"15\n");
    assert_eq!(files["global/pg_control"].len(), 8192);
    assert!(files.keys().any(|name| name.starts_with("pg_xact/")), "{:?}", files.keys());
}

#[test]
fn the_exchanges_of_pagebench_are_answered() {
    let root = Root::new("pagebench");
    let mut cluster = root.cluster("primary", false);
    cluster.pgbench_init("postgres", 2).unwrap();
    cluster.pgbench("postgres", &["-c", "2", "-T", "2"], |_| {}).unwrap();
    cluster.stop(StopMode::Fast).unwrap();
    let mut node = root.node(&["timeline_idle_s=2"]);
    let id = Id(7, 9);
    succeeds(&node, "import", id, &["--pgdata", cluster.data().to_str().unwrap()]);
    let files = scan(cluster.data()).unwrap();

    for token in [None, Some("eyJhbGciOiJFZERTQSJ9.e30.c2ln")] {
        let mut http = Http::new(&node, token);
        let target = discover(&mut http);
        assert_eq!(target, (id.shard().to_string(), id.timeline().to_string()));
        let path = format!("/v1/tenant/{}/timeline/{}", target.0, target.1);
        let keyspace: Keyspace = http.get(&format!("{path}/keyspace"));
        assert!(keyspace.sparse_keys.is_empty());
        let of_files = files.forks.iter().map(|(tag, fork)| (*tag, fork.blocks));
        let of_files: BTreeMap<RelTag, u32> = of_files.filter(|one| one.1 > 0).collect();
        assert_eq!(walk(&keyspace), of_files);
        let at: Lsn = keyspace.at_lsn.parse().unwrap();
        let again: Keyspace = http.get(&format!("{path}/keyspace?at_lsn={at}"));
        assert_eq!((again.keys, again.at_lsn), (keyspace.keys, keyspace.at_lsn));

        let mut pg = Pg::connect(&node);
        pg.page_stream(&target);
        let mut pages = 0;
        for (request_lsn, batch) in [(u64::MAX, 1), (u64::MAX, 32), (at.0, 1), (at.0, 7)] {
            pages += load(&mut pg, at, request_lsn, batch, &files);
        }
        assert_eq!(pages, 4100);
        // It ends with requests in flight: the socket is reset, or closed, or gives COPY up.
        let (tag, fork) = files.forks.iter().max_by_key(|(_, fork)| fork.blocks).unwrap();
        let many: Vec<Vec<u8>> =
            (0..fork.blocks.min(300)).map(|n| get_page(1, u64::MAX, at, *tag, n)).collect();
        let many: Vec<(u8, &[u8])> = many.iter().map(|body| (b'd', &body[..])).collect();
        pg.send(&many);
        drop(pg);
        let mut pg = Pg::connect(&node);
        pg.page_stream(&target);
        pg.send(&many[..1]);
        pg.send(&[(b'f', b"\0")]);
        assert_eq!(pg.message().0, b'd');
        drop(pg);

        let info: TimelineInfo = http.get(&path);
        assert_eq!((info.tenant_id, info.timeline_id), target.clone());
        assert_eq!((info.pg_version, &*info.state), (15, "Active"));
        let last: Lsn = info.last_record_lsn.parse().unwrap();
        assert_eq!(last, at);
        for lsn in [&info.disk_consistent_lsn, &info.initdb_lsn, &info.remote_consistent_lsn] {
            assert!(lsn.parse::<Lsn>().unwrap() <= last);
        }
        base_backup(&node, &target, last, " --gzip");
        base_backup(&node, &target, last, "");

        // trigger-initial-size-calculation
        let info: TimelineInfo = http.get(&format!("{path}?force-await-logical-size=true"));
        assert!(info.current_logical_size_is_accurate);
        let blocks: u64 = of_files.values().map(|blocks| u64::from(*blocks)).sum();
        assert_eq!(info.current_logical_size, blocks * 8192);
        // What is in memory keeps a timeline open.
        node.admin().unwrap().checkpoint(id.shard(), id.timeline()).unwrap();
        sizes_of_closed(&mut http, &path, blocks * 8192);

        // A body that is late is no request of its own, on GET and on DELETE.
        let (status, _) = http.request("GET", &path, true);
        assert_eq!(status, 200);
        let missing = format!("/v1/tenant/{}", "ee".repeat(16));
        for method in ["GET", "DELETE"] {
            let (status, body) = http.request(method, &missing, true);
            assert_eq!(status, 404);
            assert!(body["msg"].as_str().unwrap().contains("is not on this node"), "{body}");
        }
        discover(&mut http);
    }
    let log = std::fs::read_to_string(node.log_path()).unwrap();
    assert!(!log.contains("ERROR") && !log.contains("panic"), "{}", log_tail(&node));
    node.stop().unwrap();
}

/// The timeline is closed after two seconds, and is as usable then: state, LSNs and size are told,
/// and the keyspace opens it.
fn sizes_of_closed(http: &mut Http, path: &str, bytes: u64) {
    until("the timeline's closing", || {
        let (_, body) = http.request("GET", path, false);
        body["phase"] == "idle"
    });
    let info: TimelineInfo = http.get(&format!("{path}?force-await-logical-size=true"));
    assert_eq!((&*info.state, info.current_logical_size), ("Active", bytes));
    let keyspace: Keyspace = http.get(&format!("{path}/keyspace"));
    assert_eq!(keyspace.at_lsn, info.last_record_lsn);
}
