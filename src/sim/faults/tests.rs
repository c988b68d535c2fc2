//! Faults strike, and bugs that only faults bring to light are found.

use std::thread::LocalKey;

use super::*;
use crate::layers::format::planted::BLOCKS_UNCHECKED;
use crate::sim::engine;
use crate::wal::journal::planted::{READS_BELIEVED, SYNC_ERRORS_IGNORED};

/// Seeds within which a planted bug has to be found; three in eight have faults.
const CANARY_SEEDS: u64 = 400;

fn with_faults(seeds: std::ops::Range<u64>) -> impl Iterator<Item = u64> {
    seeds.filter(|seed| FaultClass::of(*seed).is_some())
}

#[test]
fn faults_strike_and_most_pages_are_read() {
    take_seen();
    for seed in with_faults(1000..1200) {
        if let Err(problem) = engine::scenario(seed) {
            panic!("seed {seed}: {problem}\nreplay: pgstrata simulate --seed {seed}");
        }
    }
    let seen = take_seen();
    println!("{seen:?}");
    assert!(seen.right > 5 * seen.refused && seen.refused > 50, "{seen:?}");
    assert!(seen.unopened > 5 && seen.broken > 5 && seen.recovered > 5, "{seen:?}");
    assert!(seen.at_the_end.0 > seen.at_the_end.1 && seen.at_the_end.1 > 0, "{seen:?}");
}

fn found(what: &str, plant: &'static LocalKey<Cell<bool>>) {
    plant.set(true);
    let result = with_faults(0..CANARY_SEEDS).find_map(|seed| {
        match std::panic::catch_unwind(|| engine::scenario(seed)) {
            Ok(result) => Some((seed, result.err()?)),
            Err(_) => Some((seed, "panic".to_owned())),
        }
    });
    plant.set(false);
    let (seed, problem) = result.unwrap_or_else(|| panic!("the planted bug was not found: {what}"));
    println!("{what}: found at seed {seed}: {problem}");
}

#[test]
fn a_read_of_the_journal_that_is_believed_at_once_is_found() {
    found("the journal ends where one read says so", &READS_BELIEVED);
}

#[test]
fn a_failed_sync_that_is_ignored_is_found() {
    found("the journal goes on after a failed sync", &SYNC_ERRORS_IGNORED);
}

#[test]
fn blocks_that_are_not_checked_are_found() {
    found("the checksum of a block is not looked at", &BLOCKS_UNCHECKED);
}
