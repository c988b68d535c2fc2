//! What an operator gets to see: mistakes are told with what, where and what to do.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;

use common::*;
use pgstrata::base::Lsn;
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::wal::control_file::ControlFile;

/// Runs the program, not for longer than half a minute; whether it succeeded, and what it said.
fn pgstrata(args: &[&str]) -> (bool, String) {
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "30", env!("CARGO_BIN_EXE_pgstrata")]).args(args);
    let output = command.output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

fn refuses(args: &[&str], part: &str) {
    let (ok, text) = pgstrata(args);
    assert!(!ok && text.contains(part), "{args:?}: '{part}' is not in: {text}");
    assert!(!text.contains("panicked"), "{text}");
}

fn says(args: &[&str], part: &str) {
    let (ok, text) = pgstrata(args);
    assert!(ok && text.contains(part), "{args:?}: '{part}' is not in: {text}");
}

/// Status and body of an answer of the admin API.
fn http(node: &DemoNode, method: &str, path: &str, body: &str) -> (u32, String) {
    let address = node.admin_url().replace("http://", "");
    let mut stream = TcpStream::connect(&address).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let status = text.split(' ').nth(1).unwrap().parse().unwrap();
    (status, text.split_once("\r\n\r\n").unwrap().1.to_owned())
}

#[test]
fn commands_name_what_is_wrong() {
    let root = Root::new("mistakes");
    let (none, file) = (root.join("none"), root.join("file"));
    std::fs::write(&file, "no file of ours").unwrap();
    let (none, file) = (none.to_str().unwrap(), file.to_str().unwrap());
    let (tenant, timeline) = (Id(1, 1).shard().to_string(), Id(1, 1).timeline().to_string());
    let ids = ["--tenant", tenant.as_str(), "--timeline", timeline.as_str()];

    // A directory without a cluster has no block that could differ.
    for dir in [none, root.0.to_str().unwrap(), file] {
        let args = ["verify", "--pgdata", dir, "--lsn", "0/1"];
        refuses(&[&args[..], &ids].concat(), "is no data directory");
    }
    refuses(&["redo", "replay", none], none);
    refuses(&["redo", "replay", file], file);
    for admin in ["127.0.0.1:9898", "nonsense", ""] {
        refuses(&["status", "--admin", admin], "http://HOST:PORT");
    }
    refuses(&["tenant", "create", "-c", "gc_period_s=soon"], "gc_period_s=soon: that is no number");
    refuses(&["redo", "compare", "--from", "0/1000000"], "--wal");
    refuses(&["simulate", "--seeds", "0"], "--seeds");
    refuses(&[&["bench", "ingest", "-T", "0"][..], &ids].concat(), "--time");
    let library = format!("walredo_library={}", root.0.display());
    refuses(&["serve", "-c", "data_dir=/", "-c", &library], "is no file");
    let postgres = format!("postgres_bin={none}");
    refuses(&["serve", "-c", "data_dir=/", "-c", &postgres], "is no file");
}

#[test]
fn a_node_names_what_is_wrong() {
    let root = Root::new("operator");
    let mut cluster = root.stopped_cluster();
    let mut node = root.node(&[]);
    let (admin, id) = (node.admin_url(), Id(1, 1));
    let (tenant, timeline) = (id.shard().to_string(), id.timeline().to_string());
    let data = cluster.data().to_str().unwrap().to_owned();

    // Another node would get a part of the connections.
    let pages = format!("listen_pg_addr={}", node.page_address());
    let other = format!("data_dir={}", root.join("other").display());
    let serve = ["serve", "-c", "listen_http_addr=127.0.0.1:0", "-c", &pages, "-c", &other];
    refuses(&serve, &format!("cannot listen at {}", node.page_address()));
    let mut few = Command::new("prlimit");
    let few = few.args(["--nofile=300:300", env!("CARGO_BIN_EXE_pgstrata")]).args(serve).output();
    let text = String::from_utf8(few.unwrap().stderr).unwrap();
    assert!(text.contains("may have only 300 files open"), "{text}");

    let (status, body) = http(&node, "POST", "/v1/status", "");
    assert!(status == 405 && body.contains("\"error\":\"/v1/status is nothing to POST"), "{body}");

    // What cannot be right is refused before there is a timeline.
    let path = format!("/v1/tenant/{tenant}/timeline");
    let wrong = [
        (r#""source": {"primary": {"conninfo": "hst=a"}}"#, "'hst' is no keyword"),
        (r#""source": {"primary": {"conninfo": "host=a user=a", "slot": "A-B"}}"#, "A-B"),
        (r#""source": {"backup": {"path": "/a", "primary": "host"}}"#, "'='"),
        (r#""source": {"backup": {"path": "/a", "slot": "s"}}"#, "no primary"),
        (r#""source": {"primary": {"conninfo": "host=a user=a", "slot_name": "s"}}"#, "slot_name"),
    ];
    for (source, part) in wrong {
        let body = format!(r#"{{"timeline": "{timeline}", {source}}}"#);
        let (status, text) = http(&node, "POST", &path, &body);
        assert!(
            (status == 400 || status == 422) && text.contains(part),
            "{source}: {status} {text}"
        );
    }
    assert!(node.admin().unwrap().timelines().unwrap().is_empty());

    let conninfo = cluster.conninfo();
    succeeds(&node, "import", id, &["--pgdata", &data, "--primary", &conninfo]);
    let start = info(&node, id).last_record_lsn;
    let unknown = "77777777777777777777777777777777";
    let body = format!(r#"{{"timeline": "{unknown}", "branch": {{"ancestor": "{unknown}"}}}}"#);
    let (status, text) = http(&node, "POST", &path, &body);
    assert!(status == 404 && text.contains("is not on this node"), "{status} {text}");

    for (method, what, body) in [
        ("PUT", "checkpoint", ""),
        ("PUT", "do_gc", "{}"),
        ("GET", "lsn_lease", ""),
        ("GET", "keyspace", ""),
        ("GET", "get_timestamp_of_lsn?lsn=0/1", ""),
    ] {
        let (status, text) = http(&node, method, &format!("{path}/{unknown}/{what}"), body);
        assert!(status == 404 && text.contains("is not on this node"), "{what}: {status} {text}");
    }

    let page_address = node.page_address();
    let lsn = start.to_string();
    let ids = ["--tenant", tenant.as_str(), "--timeline", timeline.as_str()];
    let verify = ["verify", "--pgdata", &data, "--node", &page_address, "--lsn", &lsn];
    says(&[&verify[..], &ids].concat(), "sum of relation forks");
    // Without an LSN, where the directory stands: at the shutdown's checkpoint.
    let control = std::fs::read(cluster.data().join("global/pg_control")).unwrap();
    let stands_at = ControlFile::parse(&control).unwrap().checkpoint_lsn;
    says(&[&verify[..5], &ids].concat(), &format!("at {stands_at}\n"));
    cluster.start().unwrap();
    refuses(&[&verify[..], &ids].concat(), "was not shut down");

    std::thread::scope(|scope| {
        // It waits for WAL, and then says what it waited for.
        scope.spawn(|| {
            let (status, body) =
                http(&node, "GET", &format!("{path}/{timeline}/keyspace?at_lsn=FF/1"), "");
            assert!(status == 409 && body.contains("FF/1 has not come yet"), "{status} {body}");
        });
        branches_say_where_they_can_be_read(&node, &cluster, &admin);
    });
    // A request that does not end does not keep the node.
    let mut endless = TcpStream::connect(admin.replace("http://", "")).unwrap();
    endless
        .write_all(b"POST /v1/tenant HTTP/1.1\r\nhost: a\r\ncontent-length: 10\r\n\r\n")
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    node.stop().unwrap();
    let log = std::fs::read_to_string(node.log_path()).unwrap();
    assert!(log.contains("INFO") && !log.contains('\x1b'), "colours in a file: {log}");
}

/// What a branch says of itself is true, open or not, also when its ancestor is collected.
fn branches_say_where_they_can_be_read(
    node: &DemoNode,
    cluster: &pgstrata::cli::pg::PgCluster,
    admin: &str,
) {
    let (id, middle, alone) = (Id(1, 1), Id(1, 2), Id(1, 3));
    let more = || -> Lsn {
        cluster.psql("postgres", "UPDATE pgbench_branches SET bbalance = 1").unwrap();
        let lsn = cluster.lsn("SELECT pg_current_wal_flush_lsn()").unwrap();
        wait_for(node, id, lsn);
        lsn
    };
    let run = |command: &str, of: Id, args: &[&str]| -> String {
        let (tenant, timeline) = (of.shard().to_string(), of.timeline().to_string());
        let ids = ["--admin", admin, "--tenant", &tenant, "--timeline", &timeline];
        let (ok, text) = pgstrata(&[&["timeline", command][..], &ids, args].concat());
        assert!(ok, "{command} {args:?}: {text}");
        text
    };
    let ancestor = id.timeline().to_string();
    let branch = |branch: Id| -> Lsn {
        run("branch", branch, &["--from", &ancestor]);
        info(node, branch).last_record_lsn
    };
    more();
    let (point, end) = (branch(middle), {
        more();
        branch(alone)
    });
    assert!(point < end);
    run("detach-ancestor", alone, &[]);
    assert!(run("lease", alone, &[]).starts_with(&format!("readable from {end} on")));
    more();
    // What is collected is in files.
    let path = format!("/v1/tenant/{}/timeline/{ancestor}/checkpoint", id.shard());
    assert_eq!(http(node, "PUT", &path, "").0, 204);
    run("gc", id, &["--horizon-bytes", "0", "--pitr-interval-s", "0"]);
    let cutoff = info(node, id).gc_cutoff_lsn;
    assert!(cutoff > end, "{cutoff}");
    // First while it is closed.
    assert_eq!(info(node, middle).gc_cutoff_lsn, point);
    assert!(run("lease", middle, &[]).starts_with(&format!("readable from {point} on")));
    assert_eq!(info(node, middle).gc_cutoff_lsn, point);
    assert_eq!(info(node, alone).gc_cutoff_lsn, end);
}
