//! A part of the crash points, and bugs that they must find.

use super::*;
use crate::shard::compact::{PLANTED, Planted};
use crate::shard::gc::planted::{INDEX_UNWRITTEN, LEASES_UNWRITTEN};

/// One in so many states is checked here; all of them by `pgstrata simulate --crash-points`, or
/// with another number in this variable. The number is prime, so that all modes have their turn.
const EVERY: u64 = 23;
const EVERY_VARIABLE: &str = "CRASH_POINTS_EVERY";

#[test]
fn a_part_of_the_crash_points_passes() {
    let every = std::env::var(EVERY_VARIABLE).ok().and_then(|text| text.parse().ok());
    let every = every.unwrap_or(EVERY);
    let choice = Choice { every, first: 5 % every, ..Choice::all(0) };
    let explored = explore(&choice, |states| {
        if states % 1000 == 0 {
            println!("{states} states passed");
        }
    });
    let explored = explored.unwrap_or_else(|error| panic!("{error}"));
    println!("{explored:?}");
    assert!(explored.operations > 2000, "{explored:?}");
    assert!(explored.states >= explored.operations * 4 / every, "{explored:?}");
}

#[test]
fn a_point_is_the_same_every_time() {
    let copy = |at: u64| {
        let (operations, copies, _) = run_script(&Choice::all(0), at, move |n| n == at).unwrap();
        let copy = &copies[0];
        (operations, copy.operation.clone(), copy.now, format!("{:?}", copy.facts))
    };
    for at in [1, 77, 800] {
        assert_eq!(copy(at), copy(at));
    }
}

/// Looks at one kind of power loss before every operation, until something is wrong.
fn finds(what: &str, mode: CrashMode, options: SimOptions) {
    let choice = Choice { mode: Some(mode), options, ..Choice::all(0) };
    match explore(&choice, |_| {}) {
        Ok(explored) => panic!("the planted bug was not found: {what}: {explored:?}"),
        Err(error) => println!("{what}: {error}"),
    }
}

fn without_syncs_of(end: &'static str) -> SimOptions {
    SimOptions { ignore_syncs_of: Some(end), ..script_options(0) }
}

#[test]
fn skipped_file_syncs_are_found() {
    let options = SimOptions { ignore_file_sync: true, ..script_options(0) };
    finds("no file is synced", CrashMode::Lost, options);
    let segment = without_syncs_of("000000010000000000000001");
    finds("the journal's segments are not synced", CrashMode::Lost, segment);
    finds("the index is not synced", CrashMode::NamesOnly, without_syncs_of("/index.tmp"));
}

#[test]
fn skipped_directory_syncs_are_found() {
    let options = SimOptions { ignore_dir_sync: true, ..script_options(0) };
    finds("no directory is synced", CrashMode::Lost, options);
    finds("the journal's directory is not synced", CrashMode::Lost, without_syncs_of("/wal"));
    let timelines = without_syncs_of("/timelines");
    finds("the directory of timelines is not synced", CrashMode::Lost, timelines);
}

#[test]
fn inputs_removed_before_the_index_are_found() {
    PLANTED.set(Some(Planted::RemoveBeforeIndex));
    finds("inputs of a merge go first", CrashMode::NamesOnly, script_options(0));
    PLANTED.set(None);
}

#[test]
fn files_collected_before_the_index_are_found() {
    INDEX_UNWRITTEN.set(true);
    finds("a collection writes no index", CrashMode::NamesOnly, script_options(0));
    INDEX_UNWRITTEN.set(false);
}

#[test]
fn leases_that_are_not_written_are_found() {
    LEASES_UNWRITTEN.set(true);
    finds("a lease is granted unwritten", CrashMode::Lost, script_options(0));
    LEASES_UNWRITTEN.set(false);
}
