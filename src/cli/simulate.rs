//! `pgstrata simulate`: runs the engine in the seeded simulator.

use super::admin_client::CommandError;
use crate::sim::engine::{Plant, scenario};

/// `pgstrata simulate`.
#[derive(clap::Args, Debug)]
pub struct SimulateArgs {
    /// Run this one seed.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run so many seeds.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// First seed of a row.
    #[arg(long, default_value_t = 0)]
    from: u64,
}

/// Runs seeds; stops at the first that fails, with the line that replays it.
pub fn simulate(args: SimulateArgs) -> Result<(), CommandError> {
    let seeds = match args.seed {
        Some(seed) => seed..seed.saturating_add(1),
        None => args.from..args.from.saturating_add(args.seeds),
    };
    let (mut done, total) = (0, seeds.end - seeds.start);
    for seed in seeds {
        let hash = scenario(seed, Plant::Nothing).map_err(|problem| {
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
