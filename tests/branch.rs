//! Branches end to end: made while pgbench runs, compared block by block with stock stand-bys
//! that stopped at the branch points, detached, archived, deleted, through a kill of the node.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::process::Command;
use std::time::Duration;

use common::*;
use pgstrata::base::{Lsn, RelNode};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::oracle::{self, Mark};
use pgstrata::cli::page_client::PageClient;
use pgstrata::cli::pg::PgCluster;
use pgstrata::server::page_protocol::{Answer, Query};
use pgstrata::shard::control::TimelineState;

const ROOT: Id = Id(1, 1);
const MIDDLE: Id = Id(1, 2);
const LATE: Id = Id(1, 3);
const LEAF: Id = Id(1, 4);

/// Runs `pgstrata WORDS --admin … --tenant …`.
fn run(node: &DemoNode, words: &[&str], args: &[&str]) -> (bool, String) {
    let mut process = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    process.args(words).args(["--admin", &node.admin_url()]).args(args);
    let output = process.output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
}

fn timeline(node: &DemoNode, command: &str, id: Id, args: &[&str]) -> (bool, String) {
    let (tenant, timeline) = (id.shard().to_string(), id.timeline().to_string());
    let mut all = vec!["--tenant", &tenant, "--timeline", &timeline];
    all.extend(args);
    run(node, &["timeline", command], &all)
}

fn done(result: (bool, String)) -> String {
    assert!(result.0, "{}", result.1);
    result.1
}

fn refused(result: (bool, String), part: &str) {
    assert!(!result.0, "this must fail: {}", result.1);
    assert!(result.1.contains(part), "'{part}' is not in: {}", result.1);
}

fn branch(node: &DemoNode, id: Id, from: Id, lsn: Option<Lsn>) -> String {
    let (from, lsn) = (from.timeline().to_string(), lsn.map(|lsn| lsn.to_string()));
    let mut args = vec!["--from", from.as_str()];
    if let Some(lsn) = &lsn {
        args.extend(["--lsn", lsn.as_str()]);
    }
    done(timeline(node, "branch", id, &args))
}

/// A stand-by out of a copy of the base backup, at a mark.
fn stand_by(root: &Root, name: &str, primary: &PgCluster, mark: Mark) -> PgCluster {
    let dir = root.join(name);
    pgstrata::cli::pg::make_dir(&dir).unwrap();
    copy(&root.join("backup").join("data"), &dir.join("data"));
    let mut standby = oracle::prepare(&dir, primary, &[]).unwrap();
    oracle::replay(&mut standby, mark).unwrap();
    standby
}

fn ask(client: &mut PageClient) -> Answer {
    let pg_class = RelNode { spc: 1663, db: 5, rel: 1259 };
    client.ask(Query::GetPage { rel: pg_class.fork(0), block: 0 }).unwrap()
}

fn answers_with_error(node: &DemoNode, id: Id, lsn: Lsn, part: &str) {
    let (address, tenant) = (node.page_address(), id.tenant());
    let error = PageClient::connect(&address, tenant, id.timeline(), lsn).unwrap_err().to_string();
    assert!(error.contains(part), "'{part}' is not in: {error}");
}

#[test]
fn branches_equal_stock_stand_bys_at_their_points() {
    let root = Root::new("branch");
    let primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 2).unwrap();
    for database in ["postgres", "template1"] {
        primary.psql(database, "VACUUM").unwrap();
    }
    oracle::keep_wal(&primary).unwrap();
    primary.psql("postgres", "CHECKPOINT").unwrap();
    let mut node = root.node(&["checkpoint_distance_bytes=4000000", "image_layer_bytes=4000000"]);
    let conninfo = primary.conninfo();
    succeeds(&node, "attach", ROOT, &["--primary", &conninfo, "--slot", "pgstrata"]);
    primary.base_backup(&root.join("backup")).unwrap();

    // Two marks in the middle of the load; branches are made and read while it goes on.
    let (middle, late) = std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let options = ["-c", "3", "-j", "2", "-T", "20"];
            primary.pgbench("postgres", &options, |_| {}).map_err(|error| error.to_string())
        });
        std::thread::sleep(Duration::from_secs(4));
        let middle = oracle::mark(&primary).unwrap();
        wait_for(&node, ROOT, middle.end);
        branch(&node, MIDDLE, ROOT, Some(middle.end));
        let standby = stand_by(&root, "middle", &primary, middle);
        is_equal(&node, MIDDLE, middle.end, standby.data(), false);
        let late = oracle::mark(&primary).unwrap();
        wait_for(&node, ROOT, late.end);
        branch(&node, LATE, ROOT, Some(late.end));
        let text = branch(&node, LEAF, LATE, None);
        assert!(text.contains(&LATE.timeline().to_string()), "{text}");
        load.join().unwrap().unwrap();
        (middle, late)
    });
    assert!(info(&node, ROOT).last_record_lsn > late.end, "the load ended too early");
    let standby = stand_by(&root, "late", &primary, late);
    let early = root.join("middle").join("data");
    let compare = |node: &DemoNode| {
        is_equal(node, MIDDLE, middle.end, &early, false);
        // The history of a branch is that of its ancestors.
        is_equal(node, LEAF, late.end, standby.data(), false);
        is_equal(node, LEAF, middle.end, &early, false);
    };
    compare(&node);
    node.kill().unwrap();
    node.start_again().unwrap();
    assert_eq!(info(&node, LEAF).state, TimelineState::Idle);
    compare(&node);

    // Nothing will come after the branch point, so nobody waits for it.
    let Answer::Error(text) = ask(&mut client(&node, LEAF, Lsn(late.end.0 + 8))) else {
        panic!("a branch has what came after its branch point");
    };
    assert!(text.contains("has no WAL source"), "{text}");

    // What others need stays.
    refused(timeline(&node, "delete", ROOT, &[]), &MIDDLE.timeline().to_string());
    refused(timeline(&node, "delete", LATE, &[]), "delete or detach them first");
    refused(timeline(&node, "detach-ancestor", ROOT, &[]), "has no ancestor");
    let from = ROOT.timeline().to_string();
    let args = ["--from", &from, "--lsn", "0/10"];
    refused(timeline(&node, "branch", Id(1, 9), &args), "its history begins at");
    let args = ["--from", &from, "--lsn", "FF/10"];
    refused(timeline(&node, "branch", Id(1, 9), &args), "it has WAL up to");

    // An archived ancestor is read by its branches only.
    done(timeline(&node, "archive", ROOT, &[]));
    answers_with_error(&node, ROOT, middle.end, "is archived");
    compare(&node);
    node.stop().unwrap();
    node.start_again().unwrap();
    assert_eq!(info(&node, ROOT).state, TimelineState::Archived);
    compare(&node);

    // A detached branch stands alone, from its branch point on.
    done(timeline(&node, "detach-ancestor", LATE, &[]));
    is_equal(&node, LATE, late.end, standby.data(), false);
    is_equal(&node, LEAF, late.end, standby.data(), false);
    let Answer::Error(text) = ask(&mut client(&node, LEAF, middle.end)) else {
        panic!("history before the detached branch is read");
    };
    assert!(text.contains(&format!("begins at {}", late.end)), "{text}");
    done(timeline(&node, "unarchive", ROOT, &[]));
    wait_for(&node, ROOT, late.end);
    is_equal(&node, ROOT, late.end, standby.data(), false);

    // The root goes when its last branch has gone; what was detached stays.
    let mut open = client(&node, MIDDLE, middle.end);
    assert!(matches!(ask(&mut open), Answer::GetPage(_)));
    done(timeline(&node, "delete", MIDDLE, &[]));
    let pg_class = RelNode { spc: 1663, db: 5, rel: 1259 };
    let ended = open.ask(Query::GetPage { rel: pg_class.fork(0), block: 0 });
    let text = ended.expect_err("a deleted timeline is read").to_string();
    assert!(text.contains("is not on this node"), "{text}");
    answers_with_error(&node, MIDDLE, middle.end, "is not on this node");
    done(timeline(&node, "delete", ROOT, &[]));
    is_equal(&node, LEAF, late.end, standby.data(), false);
    let list = done(run(&node, &["timeline", "list"], &["--tenant", &ROOT.shard().to_string()]));
    assert_eq!(list.lines().count(), 3, "{list}");
    let tenant = ROOT.shard().to_string();
    done(run(&node, &["tenant", "delete"], &["--tenant", &tenant]));
    assert!(node.admin().unwrap().tenants().unwrap().is_empty());
    let left = std::fs::read_dir(node.data_dir().join("tenants")).unwrap().count();
    assert_eq!(left, 0);
    node.stop().unwrap();
}
