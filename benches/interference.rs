//! Latency of GetPage while nothing else happens, and while WAL comes in at full rate and
//! checkpoint and compaction are at work: the same pages, the same core, the same run.
//!
//! Requests come in at fixed times, whether the ones before are answered or not, and latency
//! counts from the time at which a request should have begun. See `docs/benchmarks.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::too_many_lines,
    reason = "a benchmark drives other programs and measures time"
)]

mod common;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use common::recorded::Recorded;
use common::shard::{self, Bed};
use common::{MB, Result, Rounds, Scratch, sized};
use glommio::timer::sleep;
use pgstrata::base::{Lsn, RelNode, RelTag};
use pgstrata::config::Config;
use pgstrata::io::{Io, TaskClass};
use pgstrata::shard::control::{CoreControl, CoreMetrics};
use pgstrata::shard::reader::{RequestLsn, TimelineReader};
use pgstrata::shard::timeline::TimelineConfig;

/// Time between two requests, on average.
const EVERY: Duration = Duration::from_micros(1000);
/// Part of the WAL that is taken in before anything is measured.
const PREPARED: f64 = 0.2;
/// A window is not longer than this.
const WINDOW_MAX: Duration = Duration::from_secs(4);

struct Setting {
    recorded: Recorded,
    rel: RelTag,
    blocks: u32,
}

fn record(root: &Path) -> Result<Setting> {
    let mut found = None;
    let recorded = Recorded::make(
        root,
        false,
        |primary| Ok(primary.pgbench_init("postgres", sized(1, 10))?),
        |primary| {
            let path =
                primary.value("postgres", "SELECT pg_relation_filepath('pgbench_accounts')")?;
            let mut numbers = path.split('/').skip(1).map(str::parse::<u32>);
            let (Some(Ok(db)), Some(Ok(rel))) = (numbers.next(), numbers.next()) else {
                return Err(format!("relation file '{path}'").into());
            };
            let blocks =
                primary.value("postgres", "SELECT pg_relation_size('pgbench_accounts') / 8192")?;
            found = Some((RelNode { spc: 1663, db, rel }.fork(0), blocks.parse()?));
            let seconds = sized("3", "40");
            Ok(primary.pgbench("postgres", &["-c", "8", "-j", "2", "-T", seconds], |_| ())?)
        },
    )?;
    let (rel, blocks) = found.ok_or("no pgbench_accounts")?;
    Ok(Setting { recorded, rel, blocks })
}

/// Latencies of one window, in microseconds, and how many blocks were read for all of them.
#[derive(Clone, Default)]
struct Latencies(Vec<f64>, u64);

impl Latencies {
    fn at(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let place = (sorted.len() as f64 * part) as usize;
        sorted.get(place.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
    }

    fn reads(&self) -> f64 {
        self.1 as f64 / self.0.len() as f64
    }
}

/// Asks for pages until `done` says so or the window is over; waits for all answers.
async fn window(
    bed: &Rc<Bed>,
    rel: RelTag,
    blocks: u32,
    done: impl Fn() -> bool,
) -> Result<(Latencies, Duration)> {
    let answers = Rc::new(RefCell::new(Latencies::default()));
    let (failed, under_way) = (Rc::new(RefCell::new(None)), Rc::new(Cell::new(0u64)));
    let asker = {
        let (bed, answers, failed, under_way) =
            (bed.clone(), answers.clone(), failed.clone(), under_way.clone());
        let end = Rc::new(Cell::new(false));
        let ended = end.clone();
        let io = bed.io.clone();
        let task_io = io.clone();
        under_way.set(1);
        io.spawn(TaskClass::Serve, async move {
            let mut due = Instant::now();
            let mut random = 0x9E37_79B9_7F4A_7C15u64;
            while !ended.get() {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                // Between nothing and twice the mean, so that nothing falls into step.
                due += EVERY.mul_f64((random >> 40) as f64 / (1 << 23) as f64);
                sleep(due.saturating_duration_since(Instant::now())).await;
                let block = ((random >> 33) % u64::from(blocks)) as u32;
                let (bed, answers, failed) = (bed.clone(), answers.clone(), failed.clone());
                let count = under_way.clone();
                count.set(count.get() + 1);
                task_io.spawn(TaskClass::Serve, async move {
                    let start = bed.timeline.start_lsn();
                    let lsn = RequestLsn { request: Lsn::MAX, not_modified_since: start };
                    match bed.timeline.get_page(rel, block, lsn).await {
                        Ok(_) => answers.borrow_mut().0.push(due.elapsed().as_secs_f64() * 1e6),
                        Err(error) => *failed.borrow_mut() = Some(error.to_string()),
                    }
                    count.set(count.get() - 1);
                });
            }
            under_way.set(under_way.get() - 1);
        });
        end
    };
    let misses = || bed.shard.metrics().block_cache_misses;
    let (begin, misses_before) = (Instant::now(), misses());
    while begin.elapsed() < WINDOW_MAX && !done() {
        sleep(Duration::from_millis(2)).await;
    }
    let length = begin.elapsed();
    asker.set(true);
    while under_way.get() > 0 {
        sleep(Duration::from_millis(2)).await;
    }
    if let Some(error) = failed.borrow_mut().take() {
        return Err(error.into());
    }
    let mut answers = answers.borrow().clone();
    answers.1 = misses() - misses_before;
    Ok((answers, length))
}

/// Nothing is being written any more.
async fn settle(bed: &Bed) {
    let written = |m: &CoreMetrics| (m.checkpoints, m.compactions);
    let mut quiet = 0;
    while quiet < 10 {
        let before = written(&bed.shard.metrics());
        sleep(Duration::from_millis(50)).await;
        quiet = if written(&bed.shard.metrics()) == before { quiet + 1 } else { 0 };
    }
}

struct Round {
    idle: Latencies,
    busy: Latencies,
    after: Latencies,
    busy_time: Duration,
    wal_bytes: u64,
    checkpoints: u64,
    compactions: u64,
    l0_most: u64,
    slowed: f64,
}

async fn story(bed: Rc<Bed>, rel: RelTag, blocks: u32, middle: Lsn, end: Lsn) -> Result<Round> {
    bed.gate.set(true);
    while bed.timeline.lsns().last_record < middle {
        sleep(Duration::from_micros(200)).await;
    }
    bed.gate.set(false);
    sleep(Duration::from_millis(50)).await;
    bed.shard.checkpoint(shard::TENANT, shard::TIMELINE).await?;
    settle(&bed).await;
    // What is in the cache is in the cache.
    window(&bed, rel, blocks, || false).await?;
    let (idle, _) = window(&bed, rel, blocks, || false).await?;
    let before = (bed.shard.metrics(), bed.timeline.lsns().last_record);
    let l0_most = Cell::new(0);
    bed.gate.set(true);
    let (busy, busy_time) = window(&bed, rel, blocks, || {
        l0_most.set(l0_most.get().max(bed.timeline.l0_count() as u64));
        bed.timeline.lsns().last_record >= end
    })
    .await?;
    let after_load = (bed.shard.metrics(), bed.timeline.lsns().last_record);
    bed.timeline.wait_for_lsn(end).await?;
    settle(&bed).await;
    let (after, _) = window(&bed, rel, blocks, || false).await?;
    Ok(Round {
        idle,
        busy,
        after,
        busy_time,
        wal_bytes: after_load.1.bytes_since(before.1),
        checkpoints: after_load.0.checkpoints - before.0.checkpoints,
        compactions: after_load.0.compactions - before.0.compactions,
        l0_most: l0_most.get(),
        slowed: after_load.0.ingest_slowed_seconds - before.0.ingest_slowed_seconds,
    })
}

fn benchmark() -> Result<()> {
    let scratch = Scratch::new("interference")?;
    let setting = record(&scratch)?;
    let (from, wal) = (setting.recorded.start()?, setting.recorded.wal()?);
    let end = setting.recorded.mark.end;
    let middle = Lsn(from.0 + (wal.len() as f64 * PREPARED) as u64);
    println!(
        "interference: {:.1} MB of WAL; a page every {} us, of {} blocks; us, median (min..max) of the rounds",
        wal.len() as f64 / MB,
        EVERY.as_micros(),
        setting.blocks,
    );
    let config = TimelineConfig {
        // So that checkpoint and compaction are at work all the time.
        checkpoint_distance_bytes: 16 << 20,
        compaction_target_bytes: 16 << 20,
        wait_lsn_timeout_ms: 600_000,
        ..TimelineConfig::from(&Config::default())
    };
    let mut all: [Rounds; 9] = Default::default();
    for round in 1..=sized(1, 5) {
        let (rel, blocks) = (setting.rel, setting.blocks);
        let dir = scratch.join("node");
        let done = shard::run(&dir, &setting.recorded, wal.clone(), config, move |bed| {
            story(bed, rel, blocks, middle, end)
        })?;
        let [idle, busy, after] =
            [&done.idle, &done.busy, &done.after].map(|l| (l.at(0.5), l.at(0.99)));
        println!(
            "  round {round}: idle {:.0} / {:.0}, busy {:.0} / {:.0} (most {:.0}), idle after it {:.0} / {:.0}; \
             blocks read for a page {:.2}, {:.2}, {:.2}; ratio {:.2}; {} requests in {:.1} s, {:.1} MB/s of WAL, {} checkpoints, {} compactions, \
             {} L0 at most, slowed for {:.2} s",
            idle.0,
            idle.1,
            busy.0,
            busy.1,
            done.busy.at(1.0),
            after.0,
            after.1,
            done.idle.reads(),
            done.busy.reads(),
            done.after.reads(),
            busy.1 / idle.1,
            done.busy.0.len(),
            done.busy_time.as_secs_f64(),
            done.wal_bytes as f64 / MB / done.busy_time.as_secs_f64(),
            done.checkpoints,
            done.compactions,
            done.l0_most,
            done.slowed,
        );
        let values = [
            idle.0,
            idle.1,
            busy.0,
            busy.1,
            after.0,
            after.1,
            busy.0 / idle.0,
            busy.1 / idle.1,
            busy.1 / after.1,
        ];
        for (rounds, value) in all.iter_mut().zip(values) {
            rounds.add(value);
        }
    }
    let [idle_50, idle_99, busy_50, busy_99, after_50, after_99, ratio_50, ratio_99, ratio_after] =
        &all;
    println!("  idle:          p50 {}, p99 {}", idle_50.text(0), idle_99.text(0));
    println!("  full ingest:   p50 {}, p99 {}", busy_50.text(0), busy_99.text(0));
    println!("  idle after it: p50 {}, p99 {}", after_50.text(0), after_99.text(0));
    println!("  ratio full ingest / idle: p50 {}, p99 {}", ratio_50.text(2), ratio_99.text(2));
    println!("  ratio full ingest / idle after it: p99 {}", ratio_after.text(2));
    Ok(())
}

fn main() -> std::process::ExitCode {
    common::main(benchmark)
}
