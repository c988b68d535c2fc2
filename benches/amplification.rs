//! Write amplification and read depth at a steady load of random updates, by size of the database.
//!
//! Real WAL of a stock primary, `full_page_writes = off`, goes into a shard with real files and
//! compaction, while random pages are read. See `docs/benchmarks.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a benchmark drives other programs and measures time"
)]

mod common;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use common::recorded::Recorded;
use common::shard::{Bed, run};
use common::{MB, Result, Scratch, sized};
use pgstrata::base::lsn::Lsn;
use pgstrata::base::{RelNode, RelTag};
use pgstrata::cli::oracle::Mark;
use pgstrata::cli::pg::{self, PgCluster};
use pgstrata::config::Config;
use pgstrata::shard::control::{CoreControl, CoreMetrics};
use pgstrata::shard::reader::{RequestLsn, TimelineReader};
use pgstrata::shard::timeline::TimelineConfig;

/// The shard is a model of one with default settings: all sizes are divided by this.
const SCALE: u64 = 64;
/// Random updates for each page of the table; the first third is not measured.
const UPDATES_PER_PAGE: u64 = 75;
/// Room for the versions of updated rows, so that they stay on their page and need no new index
/// entries (HOT): 49 rows where 61 fit.
const FILLFACTOR: &str = "80";
const UPDATES_PER_TRANSACTION: u64 = 100;
/// Compaction that does nothing for so long has nothing to do.
const IDLE: Duration = Duration::from_millis(400);
const PATIENCE: Duration = Duration::from_secs(1800);

/// What a size of the database is loaded with.
struct Load {
    recorded: Recorded,
    table: RelTag,
    blocks: u32,
}

fn prepare(primary: &PgCluster, scale: u32) -> Result<()> {
    let mut init = primary.client("pgbench", "postgres");
    init.args(["-i", "-q", "-F", FILLFACTOR, "-s"]).arg(scale.to_string());
    pg::run(init)?;
    primary.psql(
        "postgres",
        "CREATE FUNCTION touch(count int, rows int) RETURNS void LANGUAGE plpgsql AS $$ \
         DECLARE one int; BEGIN FOR i IN 1..count LOOP one := 1 + floor(random() * rows)::int; \
         UPDATE pgbench_accounts SET abalance = abalance + (random() * 5000)::int \
         WHERE aid = one; END LOOP; END $$",
    )?;
    Ok(())
}

/// `count` updates of random rows.
fn update(primary: &PgCluster, root: &Path, scale: u32, count: u64) -> Result<()> {
    let script = root.join("script.sql");
    let rows = u64::from(scale) * 100_000;
    fs::write(&script, format!("SELECT touch({UPDATES_PER_TRANSACTION}, {rows});\n"))?;
    let transactions = (count / UPDATES_PER_TRANSACTION / 2).to_string();
    let script = script.to_str().ok_or("path")?;
    let args = ["-n", "-c", "2", "-j", "1", "-M", "prepared", "-t", &transactions, "-f", script];
    Ok(primary.pgbench("postgres", &args, |_| ())?)
}

fn record(root: &Path, scale: u32) -> Result<Load> {
    let facts = root.join("facts");
    if !facts.is_file() {
        fs::create_dir_all(root)?;
        let mut found = String::new();
        let load = |primary: &PgCluster| {
            let path =
                primary.value("postgres", "SELECT pg_relation_filepath('pgbench_accounts')")?;
            let bytes = primary.value("postgres", "SELECT pg_relation_size('pgbench_accounts')")?;
            let blocks: u64 = bytes.parse::<u64>()? / 8192;
            update(primary, root, scale, blocks * UPDATES_PER_PAGE)?;
            found = format!("{path} {blocks}");
            Ok(())
        };
        let made = Recorded::make(root, false, |primary| prepare(primary, scale), load)?;
        fs::write(&facts, format!("{found} {} {}", made.mark.record, made.mark.end))?;
    }
    let text = fs::read_to_string(&facts)?;
    let words: Vec<&str> = text.split_whitespace().collect();
    let &[path, blocks, record, end] = words.as_slice() else { return Err("facts".into()) };
    let numbers: Vec<u32> =
        path.split('/').skip(1).map(str::parse).collect::<std::result::Result<_, _>>()?;
    let &[db, rel] = numbers.as_slice() else { return Err(format!("relation '{path}'").into()) };
    let lsn = |text: &str| text.parse::<Lsn>().map_err(|_| format!("LSN '{text}'"));
    let mark = Mark { record: lsn(record)?, end: lsn(end)? };
    let primary = PgCluster::at(&root.join("primary"))?;
    let recorded = Recorded { primary, backup: root.join("backup"), mark };
    Ok(Load { recorded, table: RelNode { spc: 1663, db, rel }.fork(0), blocks: blocks.parse()? })
}

/// What is to be told of one size.
struct Told {
    begin: CoreMetrics,
    end: CoreMetrics,
    wall: Duration,
    layers: usize,
}

/// Reads random pages at the newest LSN until told to stop.
async fn read(bed: Rc<Bed>, table: RelTag, blocks: u32, stop: Rc<Cell<bool>>) -> Result<()> {
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let since = bed.timeline.lsns().last_record;
    while !stop.get() {
        glommio::timer::sleep(Duration::from_millis(1)).await;
        if !bed.gate.get() {
            // Nothing comes in: what is read now does not count.
            continue;
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let block = (random % u64::from(blocks)) as u32;
        let lsn = RequestLsn { request: Lsn::MAX, not_modified_since: since };
        bed.timeline.get_page(table, block, lsn).await?;
    }
    Ok(())
}

/// Lets WAL in, as fast as it is taken, up to `end`, and waits until compaction has nothing left to do.
async fn feed(bed: &Bed, end: Lsn) -> Result<()> {
    let begin = Instant::now();
    bed.gate.set(true);
    while bed.timeline.lsns().last_record < end {
        glommio::timer::sleep(Duration::from_millis(1)).await;
        if begin.elapsed() > PATIENCE {
            return Err("ingest does not come to an end".into());
        }
    }
    bed.gate.set(false);
    let mut last = (0, Instant::now());
    while last.1.elapsed() < IDLE {
        glommio::timer::sleep(Duration::from_millis(5)).await;
        let metrics = bed.shard.metrics();
        let done = metrics.compactions + metrics.checkpoints;
        if done != last.0 {
            last = (done, Instant::now());
        }
    }
    Ok(())
}

fn measure(root: &Path, load: &Load) -> Result<Told> {
    let wal = load.recorded.wal()?;
    let defaults = Config::default();
    let config = TimelineConfig {
        checkpoint_distance_bytes: defaults.checkpoint_distance_bytes / SCALE,
        compaction_target_bytes: defaults.compaction_target_bytes / SCALE,
        image_layer_bytes: defaults.compaction_target_bytes / SCALE,
        wait_lsn_timeout_ms: PATIENCE.as_millis() as u64,
        ..TimelineConfig::from(&defaults)
    };
    let (start, end) = (load.recorded.start()?, load.recorded.mark.end);
    let warm = Lsn(start.0 + (end.0 - start.0) / 3);
    let (table, blocks) = (load.table, load.blocks);
    run(&root.join("node"), &load.recorded, wal, config, move |bed| async move {
        let stop = Rc::new(Cell::new(false));
        feed(&bed, warm).await?;
        let (begin, clock) = (bed.shard.metrics(), Instant::now());
        let reads = read(bed.clone(), table, blocks, stop.clone());
        let reads = glommio::spawn_local(reads).detach();
        feed(&bed, end).await?;
        stop.set(true);
        reads.await.ok_or("the reads were cancelled")??;
        let (end, wall) = (bed.shard.metrics(), clock.elapsed());
        let layers = bed.shard.timelines().iter().map(|info| info.layer_count as usize).sum();
        Ok(Told { begin, end, wall, layers })
    })
}

fn report(times: u64, load: &Load, told: &Told) {
    let Told { begin, end, wall, layers } = told;
    let since = |read: fn(&CoreMetrics) -> u64| (read(end) - read(begin)) as f64;
    let wal = since(|m| m.wal_bytes_received);
    let share = |read: fn(&CoreMetrics) -> u64| since(read) / wal;
    let [l0, l1, images, index, journal] = [
        share(|m| m.layer_bytes_written),
        share(|m| m.merged_bytes_written),
        share(|m| m.image_bytes_written),
        share(|m| m.index_bytes_written),
        share(|m| m.journal_bytes_written),
    ];
    let checkpoints = since(|m| m.checkpoints);
    println!(
        "{times}x: {} pages; {:.1} MB of WAL in {:.1} s ({:.1} MB/s), {checkpoints} checkpoints, \
         {:.2} values per page in each, {layers} layers at the end",
        load.blocks,
        wal / MB,
        wall.as_secs_f64(),
        wal / MB / wall.as_secs_f64(),
        since(|m| m.values_ingested) / checkpoints / f64::from(load.blocks),
    );
    println!(
        "    written per byte of WAL: journal {journal:.2}, L0 {l0:.2}, L1 {l1:.2}, images \
         {images:.2}, index {index:.3}; layers {:.2}, with journal {:.2}",
        l0 + l1 + images + index,
        l0 + l1 + images + index + journal,
    );
    println!(
        "    {} merges of L0, {} of L1, {} image jobs; {} pages rebuilt, {:.2} for each page of the \
         table",
        since(|m| m.compaction_l0_merges),
        since(|m| m.compaction_l1_merges),
        since(|m| m.compaction_image_jobs),
        since(|m| m.compaction_pages),
        since(|m| m.compaction_pages) / f64::from(load.blocks),
    );
    let layers = end.read_layers.since(&begin.read_layers);
    let records = end.read_records.since(&begin.read_records);
    println!(
        "    L0 at most {}; {} reads: layers p50 {} p99 {} max {}, records p50 {} p99 {} max {}",
        end.l0_layers_max,
        layers.count(),
        layers.percentile(50),
        layers.percentile(99),
        layers.max,
        records.percentile(50),
        records.percentile(99),
        records.max,
    );
}

fn benchmark() -> Result<()> {
    let distance = Config::default().checkpoint_distance_bytes / SCALE;
    println!(
        "amplification: random updates, full_page_writes = off, fillfactor {FILLFACTOR} (HOT); \
         checkpoint distance {} MiB",
        distance >> 20
    );
    // Where WAL is recorded once for several runs.
    let kept = std::env::var_os("PGSTRATA_BENCH_WAL");
    for times in sized(vec![1, 2], vec![1, 2, 4, 8]) {
        let scratch = Scratch::new("amplification")?;
        let root = kept.as_ref().map_or_else(
            || scratch.join("recorded"),
            |dir| Path::new(dir).join(format!("{times}")),
        );
        // 16 MiB of `pgbench_accounts` each.
        let load = record(&root, times as u32)?;
        let told = measure(&scratch, &load)?;
        report(times, &load, &told);
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    common::main(benchmark)
}
