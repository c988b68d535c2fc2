//! The load generators against a real node.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::process::Command;

use common::*;
use pgstrata::base::Lsn;
use serde_json::Value;

const ID: Id = Id(1, 1);

/// Runs `pgstrata bench KIND …`: whether it succeeded, standard output, standard error.
fn bench(kind: &str, args: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    let output = command.args(["bench", kind]).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

fn figures(kind: &str, args: &[&str]) -> Value {
    let (ok, out, errors) = bench(kind, &[args, &["--json"]].concat());
    assert!(ok, "{args:?}: {errors}");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn load_generators_measure_a_node() {
    let root = Root::new("bench");
    let primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 1).unwrap();
    let node = root.node(&["checkpoint_distance_bytes=4000000"]);
    succeeds(&node, "attach", ID, &["--primary", &primary.conninfo(), "--slot", "pgstrata"]);
    let (address, admin) = (node.page_address(), node.admin_url());
    let target = format!("{}/{}", ID.tenant(), ID.timeline());
    let base = ["--address", address.as_str(), "--tenants", target.as_str(), "-T", "1"];
    let with = |args: &[&str]| figures("getpage", &[&base[..], args].concat());

    // Relations found by their sizes, newest versions, closed loop.
    let found = with(&["-c", "4", "-j", "2", "--depth", "8"]);
    assert!(found["pages"].as_u64().unwrap() > 100, "{found}");
    assert_eq!((&found["errors"], &found["wrong_replies"]), (&Value::from(0), &Value::from(0)));
    let ms = |name: &str| found[format!("latency_{name}_ms")].as_f64().unwrap();
    assert!(ms("p50") <= ms("p99") && ms("p99") <= ms("max") && ms("p50") > 0.0, "{found}");
    // One relation, at an LSN, skewed, in version 2; one after the other; open loop.
    let lsn = info(&node, ID).last_record_lsn.to_string();
    let path =
        primary.value("postgres", "SELECT pg_relation_filenode('pgbench_accounts')").unwrap();
    let database =
        primary.value("postgres", "SELECT oid FROM pg_database WHERE datname = 'postgres'");
    let relation = format!("1663/{}/{path}", database.unwrap());
    let of_relation = ["--relation", relation.as_str(), "--lsn", lsn.as_str()];
    for more in [
        &["--protocol", "2", "--key-distribution", "zipf"][..],
        &["--key-distribution", "sequential", "--depth", "32"],
        &["--rate", "200", "-c", "2"],
    ] {
        let found = with(&[&of_relation[..], more].concat());
        assert!(found["pages"].as_u64().unwrap() > 20, "{found}");
        assert_eq!(found["zero_pages"], 0);
    }
    // For people.
    let (ok, text, errors) = bench("getpage", &[&base[..], &["-P", "0.4"]].concat());
    assert!(ok && text.contains("latency p99.9 = ") && text.contains("pages/s = "), "{text}");
    assert!(errors.contains("progress: "), "{errors}");
    // What goes wrong is told.
    let nobody = format!("{}/{}", "77".repeat(16), ID.timeline());
    let (ok, _, errors) = bench("getpage", &["--address", &address, "--tenants", &nobody]);
    assert!(!ok && errors.contains("is not on this node"), "{errors}");
    let early = ["--relation", relation.as_str(), "--lsn", "0/1000"];
    let (ok, _, errors) = bench("getpage", &[&base[..], &early].concat());
    assert!(!ok && errors.contains("history of this timeline begins at"), "{errors}");

    // Ingest, up to what the primary has written.
    primary.pgbench("postgres", &["-c", "2", "-t", "500"], |_| {}).unwrap();
    let end = primary.lsn("SELECT pg_current_wal_flush_lsn()").unwrap();
    let until = end.to_string();
    let (tenant, timeline) = (ID.shard().to_string(), ID.timeline().to_string());
    let place = ["--admin", admin.as_str(), "--tenant", &tenant, "--timeline", &timeline];
    let found = figures("ingest", &[&place[..], &["--until", &until, "-T", "60"]].concat());
    assert!(found["to"].as_str().unwrap().parse::<Lsn>().unwrap() >= end, "{found}");
    let (ok, _, errors) = bench("ingest", &[&place[..], &["--until", "F/0", "-T", "0.3"]].concat());
    assert!(!ok && errors.contains("not at F/0"), "{errors}");

    for engine in ["native", "child"] {
        let found = figures("redo", &["--engine", engine, "-T", "0.5", "--records", "5"]);
        assert!(found["pages"].as_u64().unwrap() > 10, "{found}");
    }
}
