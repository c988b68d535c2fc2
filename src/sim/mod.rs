//! A simulated machine: tasks, clock, randomness and disk, all decided by one seed.
//!
//! [`SimIo`] implements [`crate::io::Io`]. The same seed gives the same run, to the last
//! latency; [`SimWorld::trace_hash`] proves it. The fault model, as a contract:
//!
//! 1. A completed write is seen by every later read, and is durable after the next successful
//!    sync of its file. Before that, a power loss keeps or loses each of its 512-byte sectors,
//!    and each growth of the file, independently. What was lost reads as it was before, or as
//!    zeros where there was nothing.
//! 2. A directory change (create, rename, remove, create directory) is durable after a sync of
//!    its directory. Before that, a power loss keeps a prefix of the directory's changes,
//!    independently of other directories; a rename between two is kept in both or in neither.
//!    Syncing a file does not make its name durable.
//! 3. An operation that is under way may have had its effect wholly, partly (writes: any run of
//!    sectors from either end) or not at all, also when its task is dropped.
//! 4. A failed write may have had part of its effect; after a failed sync of a file each later
//!    one fails.
//! 5. By option, reads, writes, syncs and directory operations fail, bits turn, writes land in a
//!    wrong place and report success, and the disk fills up.
//! 6. Tasks run in any order; time passes with every step; the clock never runs backwards.
//!
//! A run ends when its main task does or at a given step. All tasks are dropped then: the process
//! is dead, the machine is not, and reads still see everything. [`SimWorld::crash`] takes the
//! power away as well.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::Location;
use std::rc::Rc;
use std::time::Duration;

#[cfg(test)]
mod branch_compaction_tests;
#[cfg(test)]
mod branch_tests;
#[cfg(test)]
mod check_tests;
#[cfg(test)]
mod copy_tests;
pub mod crash_points;
pub mod disk;
pub mod engine;
mod executor;
pub mod faults;
pub mod file_data;
#[cfg(test)]
mod gc_tests;
#[cfg(test)]
mod idle_tests;
#[cfg(test)]
mod incident_tests;
mod io;
#[cfg(test)]
mod journal_tests;
#[cfg(test)]
mod lifecycle_tests;
mod options;
#[cfg(test)]
mod overlap_tests;
#[cfg(test)]
mod pressure_tests;
pub mod primary;
pub mod random;
#[cfg(test)]
mod reader_tests;
pub mod redo;
#[cfg(test)]
mod tests;
pub mod wal;

pub use io::{SimFile, SimIo};
pub use options::SimOptions;

use crate::io::{DirSyncs, TaskClass};
use disk::Disk;
pub use executor::{Seen, Watch};
use executor::{Shared, State, Step, Streams};
use random::{Stream, Trace};

/// How a run ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T> {
    /// The main task came to its end.
    Finished(T),
    /// The step limit of the call came first; all tasks were dropped.
    Stopped {
        /// Steps since the world began.
        step: u64,
    },
}

/// Why a run is a failure whatever it computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimError {
    /// The main task waits and nothing can wake it.
    #[error("deadlock at step {step}: {}", tasks.join("; "))]
    Deadlock {
        /// Steps since the world began.
        step: u64,
        /// The tasks there were.
        tasks: Vec<String>,
    },
    /// More steps than [`SimOptions::steps_max`].
    #[error("no end after {step} steps: {}", tasks.join("; "))]
    NoEnd {
        /// Steps since the world began.
        step: u64,
        /// The tasks there were.
        tasks: Vec<String>,
    },
    /// The contract of [`crate::io`] was broken.
    #[error("contract broken: {}", .0.join("; "))]
    Violations(Vec<String>),
}

/// One simulated machine. It survives its runs.
pub struct SimWorld {
    seed: u64,
    shared: Rc<Shared>,
    draws: BTreeMap<String, Stream>,
}

/// Prints what replays the run when a task panics.
struct Replay<'a>(&'a SimWorld);

impl Drop for Replay<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("panic in {}", self.0);
        }
    }
}

impl SimWorld {
    /// A machine with an empty disk.
    pub fn new(seed: u64, options: SimOptions) -> SimWorld {
        let streams = Streams {
            scheduler: Stream::new(seed, "scheduler"),
            clock: Stream::new(seed, "clock"),
            latency: Stream::new(seed, "latency"),
            yields: Stream::new(seed, "yields"),
            faults: Stream::new(seed, "faults"),
            zeroed: Stream::new(seed, "zeroed"),
            crash: Stream::new(seed, "crash"),
            product: Stream::new(seed, "product"),
        };
        let state = State {
            disk: Disk::new(options.capacity_bytes),
            options,
            streams,
            trace: Trace::new(),
            now: Duration::ZERO,
            step: 0,
            faults_enabled: true,
            violations: Vec::new(),
            stopping: false,
            timers: BTreeMap::new(),
            next_timer: 0,
            changes: 0,
            watch: None,
            misread: std::collections::BTreeSet::new(),
            failed_dir_syncs: BTreeMap::new(),
            dir_syncs: DirSyncs::new(),
        };
        let shared = Shared {
            state: RefCell::new(state),
            tasks: RefCell::default(),
            current: RefCell::default(),
        };
        SimWorld { seed, shared: Rc::new(shared), draws: BTreeMap::new() }
    }

    /// A machine with this disk, at this time: as after a power loss.
    pub fn with_disk(seed: u64, options: SimOptions, disk: Disk, now: Duration) -> SimWorld {
        let world = SimWorld::new(seed, options);
        {
            let mut state = world.shared.state.borrow_mut();
            state.disk = disk;
            state.now = now;
        }
        world
    }

    /// Has `watch` told of each change of the disk, right before it takes place.
    pub fn watch(&mut self, watch: Watch) {
        self.shared.state.borrow_mut().watch = Some(watch);
    }

    /// Changes of the disk so far.
    pub fn disk_changes(&self) -> u64 {
        self.shared.state.borrow().changes
    }

    /// The disk as it is.
    pub fn disk(&self) -> Disk {
        self.shared.state.borrow().disk.clone()
    }

    /// The simulated time.
    pub fn now(&self) -> Duration {
        self.shared.state.borrow().now
    }

    /// Runs until the main task ends.
    ///
    /// # Errors
    /// [`SimError`]
    pub fn run<T: 'static, F: Future<Output = T> + 'static>(
        &mut self,
        main: impl FnOnce(SimIo) -> F,
    ) -> Result<T, SimError> {
        match self.run_steps(u64::MAX, main)? {
            Outcome::Finished(value) => Ok(value),
            Outcome::Stopped { step } => Err(SimError::NoEnd { step, tasks: Vec::new() }),
        }
    }

    /// Runs until the main task ends, for at most `steps` steps.
    ///
    /// # Errors
    /// [`SimError`]
    #[track_caller]
    pub fn run_steps<T: 'static, F: Future<Output = T> + 'static>(
        &mut self,
        steps: u64,
        main: impl FnOnce(SimIo) -> F,
    ) -> Result<Outcome<T>, SimError> {
        let result = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&result);
        let main = main(SimIo { shared: Rc::clone(&self.shared), slowness: 1 });
        self.shared.add_task(TaskClass::Serve, Location::caller(), async move {
            let value = main.await;
            *slot.borrow_mut() = Some(value);
        });
        let outcome = {
            let _replay = Replay(self);
            self.drive(steps, &result)
        };
        self.shared.drop_tasks();
        let violations = std::mem::take(&mut self.shared.state.borrow_mut().violations);
        if violations.is_empty() { outcome } else { Err(SimError::Violations(violations)) }
    }

    fn drive<T>(&self, steps: u64, result: &RefCell<Option<T>>) -> Result<Outcome<T>, SimError> {
        let steps_max = self.shared.state.borrow().options.steps_max;
        for done in 0.. {
            if let Some(value) = result.borrow_mut().take() {
                return Ok(Outcome::Finished(value));
            }
            if done >= steps {
                break;
            }
            if done >= steps_max {
                let tasks = self.shared.describe_tasks();
                return Err(SimError::NoEnd { step: self.step(), tasks });
            }
            if let Step::Stuck = self.shared.step() {
                let tasks = self.shared.describe_tasks();
                return Err(SimError::Deadlock { step: self.step(), tasks });
            }
        }
        Ok(Outcome::Stopped { step: self.step() })
    }

    /// Takes the power away: only durable state survives, and of the rest what chance keeps.
    pub fn crash(&mut self) {
        let state = &mut *self.shared.state.borrow_mut();
        state.disk.crash(&mut state.streams.crash);
        state.trace.fold_bytes(b"crash");
    }

    /// A random number below `bound`, from the test's own stream called `name`.
    pub fn draw(&mut self, name: &str, bound: u64) -> u64 {
        let new = || Stream::new(self.seed, &format!("test.{name}"));
        self.draws.entry(name.to_owned()).or_insert_with(new).below(bound)
    }

    /// Steps since the world began.
    pub fn step(&self) -> u64 {
        self.shared.state.borrow().step
    }

    /// Hash of everything that has happened. Equal seeds and equal calls give equal hashes.
    pub fn trace_hash(&self) -> u64 {
        self.shared.state.borrow().trace.hash()
    }
}

impl fmt::Display for SimWorld {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shared.state.try_borrow() {
            Ok(state) => {
                write!(f, "simulation: seed {}, step {}, {}", self.seed, state.step, state.options)
            }
            Err(_) => write!(f, "simulation: seed {}", self.seed),
        }
    }
}

/// Environment variable that reduces [`check_seeds`] to one seed.
pub const SEED_VARIABLE: &str = "PGSTRATA_SEED";

/// Environment variable that sets the seeds of the stories of tests: how many, or `from..to`.
#[cfg(test)]
pub(crate) const STORIES_VARIABLE: &str = "PGSTRATA_STORIES";

/// The seeds of a story: so many, unless [`STORIES_VARIABLE`] says otherwise.
#[cfg(test)]
pub(crate) fn story_seeds(count: u64) -> std::ops::Range<u64> {
    let Ok(text) = std::env::var(STORIES_VARIABLE) else { return 0..count };
    let (from, to) = text.split_once("..").unwrap_or(("0", &text));
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("{STORIES_VARIABLE}: {text}"));
    number(from)..number(to)
}

/// Runs a scenario for each seed, twice, and compares the trace hashes. The scenario returns
/// its hash, or says what went wrong. The seed in [`SEED_VARIABLE`] replaces the range.
///
/// # Errors
/// The first failing seed, with the line that replays it.
pub fn check_seeds(
    test_name: &str,
    seeds: std::ops::Range<u64>,
    scenario: impl Fn(u64) -> Result<u64, String>,
) -> Result<(), String> {
    let chosen = std::env::var(SEED_VARIABLE).ok().and_then(|text| text.parse().ok());
    let seeds = chosen.map_or(seeds, |seed: u64| seed..seed.saturating_add(1));
    for seed in seeds {
        let replay = format!("replay: {SEED_VARIABLE}={seed} cargo test --lib {test_name}");
        let first = scenario(seed).map_err(|text| format!("seed {seed}: {text}\n{replay}"))?;
        let second = scenario(seed).map_err(|text| format!("seed {seed}: {text}\n{replay}"))?;
        if first != second {
            return Err(format!(
                "seed {seed}: not deterministic, {first:x} and {second:x}\n{replay}"
            ));
        }
    }
    Ok(())
}
