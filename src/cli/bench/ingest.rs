//! `pgstrata bench ingest`: how fast a node takes in the WAL of a timeline.
//!
//! The node is watched by its admin API: the load is the primary's, or the backlog that a node has
//! when it is attached to a primary, or started again, with WAL waiting for it.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::base::{Lsn, TenantShardId, TimelineId};
use crate::cli::admin_client::{AdminClient, CommandError};
use crate::limits::BENCH_LOOK;

/// `pgstrata bench ingest`.
#[derive(clap::Args, Debug)]
pub struct IngestArgs {
    /// Admin API of the node.
    #[arg(long, default_value = "http://127.0.0.1:9898")]
    admin: String,
    /// The tenant.
    #[arg(long)]
    tenant: TenantShardId,
    /// The timeline.
    #[arg(long)]
    timeline: TimelineId,
    /// Seconds, at most.
    #[arg(short = 'T', long, default_value_t = 10.0)]
    time: f64,
    /// Stop as soon as WAL up to here is readable.
    #[arg(long)]
    until: Option<Lsn>,
    /// Print a line every so many seconds; 0: none.
    #[arg(short = 'P', long, default_value_t = 0.0)]
    progress: f64,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

/// Figures of a run.
#[derive(Clone, Copy, Debug, Serialize)]
struct Figures {
    from: Lsn,
    to: Lsn,
    seconds: f64,
    bytes: u64,
    mib_per_second: f64,
}

/// Watches, and prints the figures.
///
/// # Errors
/// The node cannot be asked, does not take in WAL any more, or is not there in time.
pub fn run(args: &IngestArgs) -> Result<(), CommandError> {
    if !(args.time > 0.0 && args.time < 1e7) {
        return Err("--time: a number above 0".into());
    }
    if args.progress.is_nan() || args.progress < 0.0 {
        return Err("--progress: a number of seconds, or 0".into());
    }
    let client = AdminClient::new(&args.admin)?;
    let look = || -> Result<(Instant, Lsn), CommandError> {
        let info = client.timeline(args.tenant, args.timeline)?;
        match info.error {
            Some(error) => Err(error.into()),
            None => Ok((Instant::now(), info.last_record_lsn)),
        }
    };
    let (begin, from) = look()?;
    let rate = |(start, from): (Instant, Lsn), (end, to): (Instant, Lsn)| {
        let seconds = (end - start).as_secs_f64();
        let bytes = to.bytes_since(from);
        let mib_per_second = bytes as f64 / seconds.max(1e-9) / f64::from(1 << 20);
        Figures { from, to, seconds, bytes, mib_per_second }
    };
    let reached = |lsn: Lsn| args.until.is_some_and(|until| lsn >= until);
    let (mut now, mut shown) = ((begin, from), (begin, from));
    while !reached(now.1) && (now.0 - begin).as_secs_f64() < args.time {
        std::thread::sleep(BENCH_LOOK.min(Duration::from_secs_f64(args.time)));
        now = look()?;
        if args.progress > 0.0 && (now.0 - shown.0).as_secs_f64() >= args.progress {
            let Figures { mib_per_second, .. } = rate(shown, now);
            let elapsed = (now.0 - begin).as_secs_f64();
            eprintln!("progress: {elapsed:.1} s, {mib_per_second:.1} MiB/s, at {}", now.1);
            shown = now;
        }
    }
    let figures = rate((begin, from), now);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&figures)?),
        false => println!(
            "{} bytes of WAL, {} to {}, in {:.1} s\nMiB/s = {:.2}",
            figures.bytes, figures.from, figures.to, figures.seconds, figures.mib_per_second
        ),
    }
    match args.until {
        Some(until) if !reached(now.1) => {
            Err(format!("the timeline is at {}, not at {until}", now.1).into())
        }
        _ => Ok(()),
    }
}
