//! WAL ingest, in MB per CPU-second, against PostgreSQL's own recovery of the same WAL.
//!
//! Both start from the same base backup and end with everything in their files. See
//! `docs/benchmarks.md` for what each side's CPU time contains.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::too_many_lines,
    reason = "a benchmark drives other programs and measures time"
)]

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::recorded::{Recorded, Recovered};
use common::{MB, Result, Rounds, Scratch, cpu_time, images, parts, shard, sized, wanted};
use nix::sys::resource::UsageWho;
use pgstrata::config::Config;
use pgstrata::shard::control::{CoreControl, CoreMetrics};
use pgstrata::shard::timeline::TimelineConfig;

const PATIENCE: Duration = Duration::from_secs(600);

fn record(root: &Path, full_page_writes: bool) -> Result<Recorded> {
    Recorded::make(
        root,
        full_page_writes,
        |_| Ok(()),
        |primary| {
            primary.pgbench_init("postgres", sized(1, 10))?;
            // From here on the first change of every page is a full-page image, where those are on.
            primary.psql("postgres", "CHECKPOINT")?;
            let seconds = sized("2", "10");
            Ok(primary.pgbench("postgres", &["-c", "4", "-j", "2", "-T", seconds], |_| ())?)
        },
    )
}

struct Cost {
    cpu: Duration,
    /// Of that, until everything was readable and in the synced journal; layers come after.
    ingest_cpu: Duration,
    wall: Duration,
    metrics: CoreMetrics,
}

/// Recovery by PostgreSQL.
fn recover(root: &Path, recorded: &Recorded) -> Result<Cost> {
    let Recovered { cpu, wall } = recorded.recover(root)?;
    Ok(Cost { cpu, ingest_cpu: cpu, wall, metrics: CoreMetrics::default() })
}

fn ingest(root: &Path, recorded: &Recorded, wal: Bytes) -> Result<Cost> {
    let config = TimelineConfig {
        // Layers are written after the rest, so that each has its own figure.
        checkpoint_distance_bytes: u64::MAX,
        checkpoint_timeout_s: PATIENCE.as_secs(),
        wait_lsn_timeout_ms: PATIENCE.as_millis() as u64,
        ..TimelineConfig::from(&Config::default())
    };
    let end = recorded.mark.end;
    shard::run(&root.join("node"), recorded, wal, config, move |bed| async move {
        let before = (cpu_time(UsageWho::RUSAGE_SELF)?, Instant::now());
        bed.gate.set(true);
        bed.timeline.wait_for_lsn(end).await?;
        while bed.timeline.lsns().journal < end {
            glommio::timer::sleep(Duration::from_millis(1)).await;
        }
        let ingest_cpu = cpu_time(UsageWho::RUSAGE_SELF)?.saturating_sub(before.0);
        bed.shard.checkpoint(shard::TENANT, shard::TIMELINE).await?;
        let cpu = cpu_time(UsageWho::RUSAGE_SELF)?.saturating_sub(before.0);
        let metrics = bed.shard.metrics();
        let lsns = bed.timeline.lsns();
        if lsns.disk_consistent < end || lsns.journal < end {
            return Err(format!("not all is on disk: {lsns:?}, the WAL ends at {end}").into());
        }
        Ok(Cost { cpu, ingest_cpu, wall: before.1.elapsed(), metrics })
    })
}

fn compare(full_page_writes: bool) -> Result<()> {
    let scratch = Scratch::new(if full_page_writes { "ingest-fpw" } else { "ingest" })?;
    let recorded = record(&scratch, full_page_writes)?;
    let (from, wal) = (recorded.start()?, recorded.wal()?);
    let megabytes = wal.len() as f64 / MB;
    let on = if full_page_writes { "on" } else { "off" };
    println!(
        "full_page_writes = {on}: {megabytes:.1} MB of WAL from {from} to {}",
        recorded.mark.end
    );
    parts::print(from, &wal)?;
    let [mut theirs, mut ours, mut ratio, mut their_cpu, mut our_cpu, mut records] =
        std::array::from_fn(|_| Rounds::default());
    let [mut ours_in, mut ratio_in] = std::array::from_fn(|_| Rounds::default());
    let (mut their_wall, mut our_wall) = (Rounds::default(), Rounds::default());
    for round in 1..=sized(1, 3) {
        let stock = recover(&scratch, &recorded)?;
        let cost = ingest(&scratch, &recorded, wal.clone())?;
        let (a, b) = (stock.cpu.as_secs_f64(), cost.cpu.as_secs_f64());
        let c = cost.ingest_cpu.as_secs_f64();
        println!(
            "  round {round}: PostgreSQL {a:.2} CPU-s, pgstrata {c:.2} + {:.2} CPU-s, {} records, {} values, \
             {:.1} MB of layers, {:.1} MB of journal in {} syncs",
            b - c,
            cost.metrics.wal_records_ingested,
            cost.metrics.values_ingested,
            cost.metrics.layer_bytes_written as f64 / MB,
            cost.metrics.journal_bytes_written as f64 / MB,
            cost.metrics.journal_syncs,
        );
        their_cpu.add(a);
        our_cpu.add(b);
        theirs.add(megabytes / a);
        ours.add(megabytes / b);
        ratio.add(a / b);
        ours_in.add(megabytes / c);
        ratio_in.add(a / c);
        their_wall.add(stock.wall.as_secs_f64());
        our_wall.add(cost.wall.as_secs_f64());
        records.add(cost.metrics.wal_records_ingested as f64 / b);
    }
    println!(
        "  PostgreSQL recovery: {} CPU-s, {} MB/CPU-s, {} s",
        their_cpu.text(2),
        theirs.text(1),
        their_wall.text(2)
    );
    println!(
        "  pgstrata ingest:     {} CPU-s, {} MB/CPU-s, {} s",
        our_cpu.text(2),
        ours.text(1),
        our_wall.text(2)
    );
    println!("  pgstrata:            {} records/CPU-s", records.text(0));
    println!("  without layers:      {} MB/CPU-s", ours_in.text(1));
    println!("  ratio pgstrata / PostgreSQL in MB/CPU-s: {}", ratio.text(2));
    println!("  the same, decoding and journal only:     {}", ratio_in.text(2));
    Ok(())
}

fn main() -> std::process::ExitCode {
    common::main(|| {
        println!("ingest: WAL per CPU-second; median (min..max) of the rounds");
        if wanted("images") {
            let scratch = Scratch::new("ingest-images")?;
            images::compare(scratch.to_owned())?;
        }
        for (part, full_page_writes) in [("on", true), ("off", false)] {
            if wanted(part) {
                compare(full_page_writes)?;
            }
        }
        Ok(())
    })
}
