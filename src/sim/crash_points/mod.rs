//! Exhaustive crash points: a script that does everything an engine does, cut off by a power loss
//! before each of its disk operations, in each kind of power loss.
//!
//! The script ([`script`]) runs on one simulated machine, from a seed. Before each change of the
//! disk (each part of a write, sync, rename, removal, creation) a copy of the disk is taken,
//! together with what had been acknowledged by then ([`Facts`]). Each copy is then put through each
//! [`CrashMode`] and given to a new machine, which must have everything that was acknowledged,
//! read every page right, and catch up with the primary ([`check`]).
//!
//! Right before an operation the disk is as the operation before has left it, and more has been
//! acknowledged than right after that one: what is torn or lost is the operation before.

use std::cell::RefCell;
use std::fmt;
use std::rc::Rc;
use std::time::Duration;

use super::disk::{CrashMode, Disk};
use super::engine::{Outside, import};
use super::random::{Stream, derive_seed};
use super::{Seen, SimOptions, SimWorld};

mod check;
mod facts;
mod script;
#[cfg(test)]
mod tests;

use facts::{Facts, Story};

/// Copies of the disk that are held at once.
const COPIES_MAX: usize = 512;

/// One state of the disk after a power loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashPoint {
    /// Decides the order of everything in the script.
    pub seed: u64,
    /// Number of the disk operation before which the power goes; the first is 1, and one more
    /// than there are is the end of the script.
    pub at: u64,
    /// What it leaves.
    pub mode: CrashMode,
}

impl fmt::Display for CrashPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seed, at, mode) = (self.seed, self.at, self.mode.name());
        write!(f, "pgstrata simulate --crash-points --seed {seed} --at {at} --mode {mode}")
    }
}

/// Which states are looked at.
#[derive(Clone, Debug)]
pub struct Choice {
    /// See [`CrashPoint::seed`].
    pub seed: u64,
    /// Every so many states, counted over operations and modes.
    pub every: u64,
    /// The first of them.
    pub first: u64,
    /// Only at this operation.
    pub at: Option<u64>,
    /// Only in this mode.
    pub mode: Option<CrashMode>,
    /// A bug of the disk that is planted.
    pub options: SimOptions,
}

impl Choice {
    /// All states of a seed.
    pub fn all(seed: u64) -> Choice {
        let options = script_options(seed);
        Choice { seed, every: 1, first: 0, at: None, mode: None, options }
    }

    fn modes(&self, at: u64) -> Vec<CrashMode> {
        let modes = CrashMode::ALL.into_iter().enumerate();
        let chosen = modes.filter(|(index, mode)| {
            let number = (at - 1) * CrashMode::ALL.len() as u64 + *index as u64;
            let on_turn = number % self.every.max(1) == self.first % self.every.max(1);
            let only = self.mode.is_none_or(|only| only == *mode);
            on_turn && only && self.at.is_none_or(|only| only == at)
        });
        chosen.map(|(_, mode)| mode).collect()
    }
}

/// What was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Explored {
    /// Disk operations of the script.
    pub operations: u64,
    /// States that were checked.
    pub states: u64,
}

/// A state that is wrong, or a script that fails without a crash.
#[derive(Debug, thiserror::Error)]
pub enum CrashError {
    /// The script itself fails.
    #[error("the script of seed {seed} fails without a crash: {problem}")]
    Script {
        /// The seed.
        seed: u64,
        /// What happened.
        problem: String,
    },
    /// What was found after a power loss.
    #[error("power loss ({}) before operation {} ({operation}): {problem}\nreplay: {point}", point.mode.name(), point.at)]
    State {
        /// Where and how.
        point: CrashPoint,
        /// The operation, and its file.
        operation: String,
        /// What is wrong.
        problem: String,
    },
}

/// The disk at one operation, and what was true then.
struct Copy {
    at: u64,
    operation: String,
    disk: Disk,
    now: Duration,
    facts: Facts,
}

/// A disk without faults, on which operations overtake each other.
pub fn script_options(seed: u64) -> SimOptions {
    let mut stream = Stream::new(seed, "crash.script");
    let latency_us_max = [60, 400, 2_000][stream.below(3) as usize];
    SimOptions {
        latency_us_min: 5,
        latency_us_max,
        yield_per_million: 50_000,
        ..Default::default()
    }
}

/// Runs the script once; copies the disk before the operations from `from` on for which
/// `wanted`, up to [`COPIES_MAX`]. Returns the number of operations.
fn run_script(
    choice: &Choice,
    from: u64,
    wanted: impl Fn(u64) -> bool + 'static,
) -> Result<(u64, Vec<Copy>, Rc<Outside>), CrashError> {
    let seed = choice.seed;
    let fail = |problem: String| CrashError::Script { seed, problem };
    let mut world = SimWorld::new(seed, choice.options.clone());
    let story = Story::new(seed);
    world.run(import).map_err(|error| fail(error.to_string()))?.map_err(fail)?;
    let base = world.disk_changes();
    let copies: Rc<RefCell<Vec<Copy>>> = Rc::default();
    let (kept, told) = (copies.clone(), story.clone());
    world.watch(Rc::new(move |seen: &Seen<'_>| {
        let at = seen.number - base;
        let mut kept = kept.borrow_mut();
        if at >= from && kept.len() < COPIES_MAX && wanted(at) {
            let operation = format!("{} {}", seen.operation, seen.path.display());
            let (disk, now, facts) = (seen.disk.clone(), seen.now, told.facts());
            kept.push(Copy { at, operation, disk, now, facts });
        }
    }));
    let told = story.clone();
    let run = world.run(move |io| script::run(io, told));
    run.map_err(|error| fail(error.to_string()))?.map_err(fail)?;
    let operations = world.disk_changes() - base;
    let mut copies = copies.take();
    if copies.len() < COPIES_MAX {
        let (disk, now, facts) = (world.disk(), world.now(), story.facts());
        copies.push(Copy { at: operations + 1, operation: "end".into(), disk, now, facts });
    }
    Ok((operations, copies, story.outside.clone()))
}

/// Checks the chosen states; `progress` is told how many are done.
///
/// # Errors
/// The first state that is wrong.
pub fn explore(
    choice: &Choice,
    mut progress: impl FnMut(u64),
) -> Result<Explored, Box<CrashError>> {
    let mut explored = Explored::default();
    let mut from = 1;
    loop {
        let its = choice.clone();
        let wanted = move |at| !its.modes(at).is_empty();
        let (operations, copies, outside) = run_script(choice, from, wanted)?;
        explored.operations = operations;
        for copy in copies {
            from = copy.at + 1;
            for mode in choice.modes(copy.at) {
                let point = CrashPoint { seed: choice.seed, at: copy.at, mode };
                check_state(point, &copy, &outside).map_err(|problem| CrashError::State {
                    point,
                    operation: copy.operation.clone(),
                    problem,
                })?;
                explored.states += 1;
                progress(explored.states);
            }
        }
        if from > operations + 1 {
            return Ok(explored);
        }
    }
}

/// Takes the power away and looks at what is left.
fn check_state(point: CrashPoint, copy: &Copy, outside: &Rc<Outside>) -> Result<(), String> {
    let seed = derive_seed(point.seed, &format!("{} {}", point.at, point.mode.name()));
    let mut disk = copy.disk.clone();
    disk.kill();
    disk.crash_as(point.mode, &mut Stream::new(seed, "power"));
    let options = SimOptions { latency_us_max: 20, yield_per_million: 0, ..Default::default() };
    let mut world = SimWorld::with_disk(seed, options, disk, copy.now);
    let (facts, primary) = (copy.facts.clone(), outside.primary.clone());
    world.run(move |io| check::run(io, facts, primary)).map_err(|error| error.to_string())?
}
