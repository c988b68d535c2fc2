//! `pgstrata simulate`: runs the engine in the seeded simulator.

use super::admin_client::CommandError;
use crate::sim::crash_points::{Choice, Explored, explore};
use crate::sim::disk::CrashMode;
use crate::sim::engine::scenario;

/// States between two lines of progress.
const PROGRESS_STATES: u64 = 1000;

/// `pgstrata simulate`.
#[derive(clap::Args, Debug)]
pub struct SimulateArgs {
    /// Run this one seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Run so many seeds; 100, with --crash-points 1.
    #[arg(long, conflicts_with = "seed", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// First seed of a row.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Take the power away before each disk operation of a script, in each way.
    #[arg(long)]
    crash_points: bool,
    /// Only before the operation with this number.
    #[arg(long, requires = "crash_points")]
    at: Option<u64>,
    /// Only in this way: lost, names-only, torn or reordered.
    #[arg(long, requires = "crash_points", value_parser = crash_mode)]
    mode: Option<CrashMode>,
    /// Only every so many states.
    #[arg(long, requires = "crash_points", default_value_t = 1)]
    every: u64,
    /// The first of them, below --every.
    #[arg(long, requires = "crash_points", default_value_t = 0)]
    first: u64,
}

fn crash_mode(text: &str) -> Result<CrashMode, String> {
    let mode = CrashMode::ALL.into_iter().find(|mode| mode.name() == text);
    mode.ok_or_else(|| format!("'{text}' is none of lost, names-only, torn, reordered"))
}

/// Runs seeds; stops at the first that fails, with the line that replays it.
pub fn simulate(args: SimulateArgs) -> Result<(), CommandError> {
    let seeds = match args.seed {
        Some(seed) => seed..seed.saturating_add(1),
        None => {
            let count = args.seeds.unwrap_or(if args.crash_points { 1 } else { 100 });
            args.from..args.from.saturating_add(count)
        }
    };
    if args.crash_points {
        return crash_points(&args, seeds);
    }
    let (mut done, total) = (0, seeds.end - seeds.start);
    for seed in seeds {
        let hash = scenario(seed).map_err(|problem| {
            format!("seed {seed}: {problem}\nreplay: pgstrata simulate --seed {seed}")
        })?;
        done += 1;
        if total == 1 {
            println!("seed {seed} passed, trace {hash:016x}");
        } else if done % 1000 == 0 || done == total {
            println!("{done} of {total} seeds passed");
        }
    }
    Ok(())
}

fn crash_points(args: &SimulateArgs, seeds: std::ops::Range<u64>) -> Result<(), CommandError> {
    let mut total = Explored::default();
    for seed in seeds {
        let (every, first, at, mode) = (args.every, args.first, args.at, args.mode);
        let choice = Choice { every, first, at, mode, ..Choice::all(seed) };
        let explored = explore(&choice, |states| {
            if states % PROGRESS_STATES == 0 {
                println!("seed {seed}: {states} states passed");
            }
        });
        let explored = explored.map_err(|error| error.to_string())?;
        total.operations += explored.operations;
        total.states += explored.states;
    }
    let Explored { operations, states } = total;
    println!("{states} states after power losses at {operations} disk operations passed");
    Ok(())
}
