//! The whole program against stock PostgreSQL: the demo's proof, in several settings. Each run
//! compares every block of every relation fork with a stock stand-by's files, before and after
//! a restart of the node.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

use std::process::Command;

/// Runs the demo; its output is part of the failure.
fn demo(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    command.arg("demo").arg("--exit").args(args);
    // Small layers, so that checkpoints happen within seconds of load.
    command.args(["-c", "checkpoint_distance_bytes=4000000", "-c", "image_layer_bytes=4000000"]);
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "demo {args:?} failed\n{text}\n{errors}");
    assert!(text.contains("no block differs"), "{text}");
    println!("{text}");
    text
}

#[test]
fn pgbench_is_equal() {
    demo(&["--scale", "3", "--seconds", "10"]);
}

#[test]
fn mixed_workload_is_equal() {
    demo(&["--workload", "mixed"]);
}

#[test]
fn without_full_page_writes_with_checksums_is_equal() {
    demo(&["--workload", "mixed", "--data-checksums", "--set", "full_page_writes=off"]);
}

#[test]
fn compressed_images_are_equal() {
    for method in ["pglz", "lz4", "zstd"] {
        let setting = format!("wal_compression={method}");
        demo(&["--workload", "mixed", "--set", &setting, "--set", "wal_log_hints=on"]);
    }
}

#[test]
fn five_kills_lose_nothing() {
    demo(&["--scale", "2", "--seconds", "20", "--kill", "5"]);
}

#[test]
fn every_image_in_the_wal_is_equal() {
    let text = demo(&["--workload", "mixed", "--check-images"]);
    let line = text.lines().find(|line| line.contains("equal (masked)")).unwrap();
    let numbers: Vec<u64> =
        line.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
    let (images, equal) = (numbers[1], numbers[2]);
    assert!(images > 100_000, "{line}");
    assert_eq!(images, equal, "{line}");
}
