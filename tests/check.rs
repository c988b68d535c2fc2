//! `pgstrata check` and `pgstrata layer dump` on real files: silent on a node that runs under
//! load, and after it was killed; what is damaged is named.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;
mod corpus;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::*;
use pgstrata::cli::oracle;

/// Runs the program; its exit status and output.
fn run(args: &[&str]) -> (i32, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_pgstrata")).args(args).output().unwrap();
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap(), text)
}

fn files(dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let mut found: Vec<PathBuf> = entries.filter(|path| wanted(&name(path))).collect();
    found.sort();
    found
}

#[test]
fn a_real_directory_is_checked() {
    let root = Root::new("check");
    let primary = root.cluster("primary", false);
    primary.pgbench_init("postgres", 2).unwrap();
    let mut node = root.node(&[
        "checkpoint_distance_bytes=2000000",
        "image_layer_bytes=8000000",
        "compaction_image_percent=5",
        "gc_horizon_bytes=100000",
        "pitr_interval_s=0",
        "gc_period_s=1",
        "timeline_idle_s=1",
    ]);
    let id = Id(3, 4);
    let data = node.data_dir();
    let data = data.to_str().unwrap();
    let (status, text) = run(&["check", data]);
    assert_eq!(status, 0, "a node without tenants: {text}");
    succeeds(&node, "attach", id, &["--primary", &primary.conninfo(), "--slot", "s"]);

    // While it runs, layers and segments come and go, branches too.
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let options = ["-c", "3", "-j", "2", "-T", "8"];
            primary.pgbench("postgres", &options, |_| {}).map_err(|error| error.to_string())
        });
        let node = &node;
        let branches = scope.spawn(move || {
            let (client, branch) = (node.admin().unwrap(), Id(3, 5).timeline());
            let mut made = 0;
            while !load.is_finished() {
                client.create_branch(id.shard(), branch, id.timeline(), None, None).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(fastrand::u64(0..300)));
                client.delete_timeline(id.shard(), branch).unwrap();
                made += 1;
            }
            (made, load.join())
        });
        let mut checks = 0;
        while !branches.is_finished() {
            let (status, text) = run(&["check", data]);
            assert_eq!(status, 0, "{text}");
            checks += 1;
        }
        let (made, loaded) = branches.join().unwrap();
        loaded.unwrap().unwrap();
        let metric = |name: &str| {
            let text = node.admin().unwrap().metrics().unwrap();
            let line =
                |line: &str| line.strip_prefix(name)?.rsplit(' ').next()?.parse::<u64>().ok();
            text.lines().filter_map(line).sum::<u64>()
        };
        let removed = metric("pgstrata_gc_layers_removed_total{");
        let collections = metric("pgstrata_gc_runs_total{");
        let merges = metric("pgstrata_compaction_l0_merges_total{");
        println!(
            "{checks} checks, {made} branches, {merges} merges, {collections} collections of \
             {removed} layers"
        );
        assert!(checks > 1 && made > 1 && merges > 0 && collections > 0);
    });
    wait_for(&node, id, oracle::mark(&primary).unwrap().end);
    node.kill().unwrap();
    let (status, text) = run(&["check", data]);
    assert_eq!(status, 0, "{text}");
    let listed = text.clone();
    assert!(text.contains("no damage") && text.contains("1 timeline,"), "{text}");
    let (status, text) = run(&["check", data, "--quiet", "--json"]);
    let sums: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((status, &sums["summary"]["damaged_files"]), (0, &0.into()));
    assert!(sums["summary"]["values"].as_u64().unwrap() > 5_000, "{text}");

    let timeline = Path::new(data)
        .join("tenants")
        .join(id.shard().to_string())
        .join("timelines")
        .join(id.timeline().to_string());
    // What the kill left over is nobody's: damage to it is none.
    let left_over = |name: &str| {
        let mut lines = listed.lines();
        lines.any(|line| line.contains(name) && line.contains(": leftover, "))
    };
    let layers = files(&timeline, |name| name.contains("__") && !left_over(name));
    assert!(layers.len() > 2, "{listed}");
    for layer in &layers {
        dump_is_complete(layer);
    }
    let journal = files(&timeline.join("wal"), |_| true);
    if std::env::var_os("RECORD_FUZZ_CORPUS").is_some() {
        corpus::record(&layers, &journal);
    }
    let mut victims = layers.clone();
    victims.push(timeline.join("index"));
    for victim in &victims {
        let right = std::fs::read(victim).unwrap();
        let mut wrong = right.clone();
        let at = if wrong.len() > 4096 { right.len() / 2 } else { 50 };
        wrong[at] ^= 0x20;
        std::fs::write(victim, &wrong).unwrap();
        let (status, text) = run(&["check", data, "--quiet"]);
        let name = victim.file_name().unwrap().to_str().unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("DAMAGED "));
        assert_eq!(status, 1, "{name} {text}");
        assert!(name != "index" || text.contains("put an index back"), "{text}");
        assert!(lines.next().unwrap().contains(name), "{name} {text}");
        std::fs::write(victim, &right).unwrap();
    }
    let (status, text) = run(&["check", data, "--quiet"]);
    assert_eq!(status, 0, "{text}");
    assert!(!journal.is_empty());
    let (status, text) = run(&["check", journal[0].to_str().unwrap()]);
    assert_eq!(status, 2, "{text}");
    // The node opens what was looked at.
    node.start_again().unwrap();
    wait_for(&node, id, oracle::mark(&primary).unwrap().end);
}

/// The dump has a line for every value, and names what is damaged.
fn dump_is_complete(layer: &Path) {
    let name = layer.to_str().unwrap();
    let (status, text) = run(&["layer", "dump", name, "--values", "--blocks"]);
    assert_eq!(status, 0, "{text}");
    let total: usize = text
        .lines()
        .find_map(|line| line.strip_prefix("values    "))
        .and_then(|line| line.split(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap();
    let lines = text.lines().filter(|line| line.starts_with("value  ")).count();
    assert_eq!((lines, text.contains("UNKNOWN(")), (total, false), "{name}");
    assert!(total < 1000 || text.contains(" block 0  "), "{name}");
    let (status, filtered) = run(&["layer", "dump", name, "--values", "--key", "03"]);
    assert_eq!(status, 0);
    let values = |text: &str, part: &str| {
        text.lines().filter(|line| line.starts_with(&format!("value     {part}"))).count()
    };
    assert_eq!(values(&filtered, ""), values(&text, "03"), "{name}");

    let right = std::fs::read(layer).unwrap();
    let mut wrong = right.clone();
    wrong[4096] ^= 1;
    std::fs::write(layer, &wrong).unwrap();
    let (status, text) = run(&["layer", "dump", name]);
    std::fs::write(layer, &right).unwrap();
    assert_eq!(status, 1, "{text}");
    assert!(text.contains("wrong checksum of a block (offset 4096)"), "{text}");
}
