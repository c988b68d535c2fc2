//! A part of the crash points, and bugs that they must find.

use super::*;
use crate::shard::compact::{PLANTED, Planted};
use crate::shard::gc::planted;

/// Every so many states are checked here; all of them by `pgstrata simulate --crash-points`. The
/// number is prime, so that all modes have their turn.
const EVERY: u64 = 23;

#[test]
fn a_part_of_the_crash_points_passes() {
    let choice = Choice { every: EVERY, first: 5, ..Choice::all(0) };
    let explored = explore(&choice, |_| {}).unwrap_or_else(|error| panic!("{error}"));
    println!("{explored:?}");
    assert!(explored.operations > 2000, "{explored:?}");
    assert!(explored.states >= explored.operations * 4 / EVERY, "{explored:?}");
}
