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

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Result, Rounds, Scratch, cpu_time, sized};
use futures_util::future::{LocalBoxFuture, select};
use glommio::{LocalExecutorBuilder, Placement};
use nix::sys::resource::UsageWho;
use pgstrata::base::lsn::Lsn;
use pgstrata::base::{TenantId, TenantShardId, TimelineId};
use pgstrata::cli::oracle::{self, Mark};
use pgstrata::cli::pg::{PgCluster, StopMode, bin_dir, control_data, give_to_servers};
use pgstrata::config::Config;
use pgstrata::io::uring::UringIo;
use pgstrata::redo::child::{ChildRedo, ChildSettings};
use pgstrata::redo::{Redo, RedoSettings};
use pgstrata::shard::background;
use pgstrata::shard::control::{CoreControl, CoreMetrics, CreateTimeline, TimelineSource};
use pgstrata::shard::follow::Connector;
use pgstrata::shard::index::{ClusterIdentity, WalSourceConfig};
use pgstrata::shard::reader::PageBackend;
use pgstrata::shard::tenants::{RedoFactory, Shard, ShardContext};
use pgstrata::shard::timeline::TimelineConfig;
use pgstrata::wal::receiver::{StandbyStatus, WalMessage, WalSource};
use pgstrata::wal::source::SourceError;

const TENANT: TenantShardId = TenantShardId { tenant: TenantId([1; 16]), number: 0, count: 0 };
const TIMELINE: TimelineId = TimelineId([2; 16]);
const SEGMENT: u64 = 16 << 20;
/// A wal sender sends so much at a time (`MAX_SEND_SIZE`).
const CHUNK: usize = 128 * 1024;
const PATIENCE: Duration = Duration::from_secs(600);
const MB: f64 = 1e6;

/// WAL of a primary, from its base backup to a checkpoint.
struct Recorded {
    primary: PgCluster,
    backup: PathBuf,
    mark: Mark,
}

fn record(root: &Path, full_page_writes: bool) -> Result<Recorded> {
    let settings = [
        format!("full_page_writes = {}", if full_page_writes { "on" } else { "off" }),
        "autovacuum = off".to_owned(),
        "checkpoint_timeout = 1h".to_owned(),
        "max_wal_size = 20GB".to_owned(),
    ];
    let mut primary = PgCluster::init(&root.join("primary"), false, &settings)?;
    primary.start()?;
    oracle::keep_wal(&primary)?;
    let backup = root.join("backup");
    primary.base_backup(&backup)?;
    primary.pgbench_init("postgres", sized(1, 10))?;
    // From here on the first change of every page is a full-page image, where those are on.
    primary.psql("postgres", "CHECKPOINT")?;
    let seconds = sized("2", "10");
    primary.pgbench("postgres", &["-c", "4", "-j", "2", "-T", seconds], |_| ())?;
    let mark = oracle::mark(&primary)?;
    primary.stop(StopMode::Fast)?;
    Ok(Recorded { primary, backup, mark })
}

/// The segment files of `from..mark.end`.
fn segments(recorded: &Recorded, from: Lsn) -> Vec<(u64, PathBuf)> {
    let last = (recorded.mark.end.0 - 1) / SEGMENT;
    let name = |number: u64| format!("00000001{:08X}{:08X}", number / 256, number % 256);
    let dir = recorded.primary.data().join("pg_wal");
    (from.0 / SEGMENT..=last).map(|number| (number, dir.join(name(number)))).collect()
}

/// Where recovery of the backup begins.
fn backup_start(backup: &Path) -> Result<Lsn> {
    let label = fs::read_to_string(backup.join("data/backup_label"))?;
    let line = label.lines().next().unwrap_or_default();
    let text = line.split_whitespace().nth(3).ok_or("backup_label")?;
    Ok(text.parse().map_err(|_| format!("backup_label: {line}"))?)
}

struct Cost {
    cpu: Duration,
    wall: Duration,
    metrics: CoreMetrics,
}

/// Recovery by PostgreSQL: CPU time of the server from its start to its end.
fn recover(root: &Path, recorded: &Recorded, from: Lsn) -> Result<Cost> {
    let dir = root.join("standby");
    let copied = Command::new("cp").arg("-a").arg(&recorded.backup).arg(&dir).status()?.success();
    if !copied {
        return Err("cp of the base backup failed".into());
    }
    // The WAL lies where the server looks by itself: no copying in the time that is measured.
    for (_, segment) in segments(recorded, from) {
        let target = dir.join("data/pg_wal").join(segment.file_name().unwrap_or_default());
        fs::copy(&segment, &target)?;
        give_to_servers(&target)?;
    }
    let settings = ["restore_command = 'false'", "shared_buffers = 512MB", "full_page_writes = on"];
    let mut standby = oracle::prepare(&dir, &recorded.primary, &settings.map(str::to_owned))?;
    standby.configure([format!("recovery_target_lsn = '{}'", recorded.mark.record).as_str()])?;
    let (cpu, begin) = (cpu_time(UsageWho::RUSAGE_CHILDREN)?, Instant::now());
    standby.spawn()?;
    standby.wait_exit(PATIENCE)?;
    let wall = begin.elapsed();
    let cpu = cpu_time(UsageWho::RUSAGE_CHILDREN)?.saturating_sub(cpu);
    let end = control_data(standby.data(), "Minimum recovery ending location")?;
    if end != recorded.mark.end.to_string() {
        return Err(format!("recovery ended at {end}\n{}", standby.log_tail()).into());
    }
    drop(standby);
    fs::remove_dir_all(&dir)?;
    Ok(Cost { cpu, wall, metrics: CoreMetrics::default() })
}

/// Hands out recorded WAL, once the gate is open.
#[derive(Clone)]
struct Replay {
    from: Lsn,
    wal: Bytes,
    open: Rc<Cell<bool>>,
}

struct ReplaySource {
    replay: Replay,
    at: Lsn,
}

impl Connector for Replay {
    type Source = ReplaySource;

    async fn connect(
        &self,
        _: &WalSourceConfig,
        _: &ClusterIdentity,
    ) -> std::result::Result<ReplaySource, SourceError> {
        Ok(ReplaySource { replay: self.clone(), at: Lsn::INVALID })
    }
}

impl WalSource for ReplaySource {
    async fn start(&mut self, from: Lsn) -> std::result::Result<(), SourceError> {
        assert!(from >= self.replay.from, "asked for WAL from {from}");
        self.at = from;
        Ok(())
    }

    async fn next(&mut self) -> std::result::Result<WalMessage, SourceError> {
        let done = (self.at.0 - self.replay.from.0) as usize;
        while !self.replay.open.get() || done >= self.replay.wal.len() {
            glommio::timer::sleep(Duration::from_millis(5)).await;
        }
        let bytes = self.replay.wal.slice(done..self.replay.wal.len().min(done + CHUNK));
        let start = self.at;
        self.at = Lsn(start.0 + bytes.len() as u64);
        let end_of_wal = Lsn(self.replay.from.0 + self.replay.wal.len() as u64);
        Ok(WalMessage::Data { start, end_of_wal, bytes })
    }

    async fn send_status(&mut self, _: StandbyStatus) -> std::result::Result<(), SourceError> {
        Ok(())
    }
}

/// Redo as the node has it; its process starts only when a page is asked for, which is never.
struct Children(PathBuf);

impl RedoFactory for Children {
    fn start(&self, tenant: TenantShardId, redo: RedoSettings) -> Rc<dyn Redo> {
        Rc::new(ChildRedo::new(ChildSettings {
            tenant: tenant.to_string(),
            postgres_bin: bin_dir().join("postgres"),
            walredo_so: common::walredo_library().unwrap_or_default(),
            scratch_dir: self.0.clone(),
            cpu: Some(0),
            redo,
            timeout: Duration::from_secs(10),
        }))
    }

    fn stop_all(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metrics(&self, _: &mut CoreMetrics) {}
}

/// Timers move an executor on that slept over a wake-up by the other one.
async fn beat_until(done: Arc<AtomicBool>) {
    while !done.load(Ordering::Acquire) {
        glommio::timer::sleep(Duration::from_millis(5)).await;
    }
}

/// Ingest by a shard on two executors of one CPU, as in a node.
fn ingest(root: &Path, recorded: &Recorded, from: Lsn, wal: Bytes) -> Result<Cost> {
    let dir = root.join("node");
    fs::create_dir_all(&dir)?;
    let (background, runner) = background::channel();
    // Tasks that wait keep their ends of the channel when the serve executor goes.
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    let runner = LocalExecutorBuilder::new(Placement::Fixed(0)).spawn(move || async move {
        let work = std::pin::pin!(runner.run(UringIo::new()));
        let end = std::pin::pin!(beat_until(seen));
        select(work, end).await;
    });
    let runner = runner.map_err(|error| error.to_string())?;
    let (data_dir, backup) = (dir.clone(), recorded.backup.join("data"));
    let end = recorded.mark.end;
    let serve = LocalExecutorBuilder::new(Placement::Fixed(0)).spawn(move || async move {
        glommio::spawn_local(beat_until(Arc::default())).detach();
        let config = Config::default();
        let open = Rc::new(Cell::new(false));
        let context = ShardContext {
            core: 0,
            io: UringIo::new(),
            background,
            data_dir: data_dir.clone(),
            config: TimelineConfig {
                checkpoint_distance_bytes: config.checkpoint_distance_bytes,
                checkpoint_timeout_s: config.checkpoint_timeout_s,
                wait_lsn_timeout_ms: PATIENCE.as_millis() as u64,
                image_layer_bytes: config.image_layer_bytes,
                gc_horizon_bytes: config.gc_horizon_bytes,
                pitr_interval_s: config.pitr_interval_s,
                gc_period_s: config.gc_period_s,
            },
            block_cache_bytes: config.block_cache_bytes as usize,
            connector: Replay { from, wal, open: open.clone() },
            redo: Rc::new(Children(data_dir)),
            owns: Rc::new(|_| true),
        };
        let shard = Shard::start(context).await?;
        let path = backup.to_str().ok_or("path")?.to_owned();
        let primary = Some("host=recorded user=nobody".to_owned());
        let source = TimelineSource::Backup { path, primary, slot: None };
        shard
            .create_timeline(CreateTimeline { tenant: TENANT, timeline: TIMELINE, source })
            .await?;
        let timeline = loop {
            match shard.timeline(TENANT, TIMELINE).await {
                Ok(timeline) => break timeline,
                Err(error) if !error.to_string().contains("being imported") => {
                    return Err(error.into());
                }
                Err(_) => glommio::timer::sleep(Duration::from_millis(5)).await,
            }
        };
        let before = (cpu_time(UsageWho::RUSAGE_SELF)?, Instant::now());
        open.set(true);
        timeline.wait_for_lsn(end).await?;
        shard.checkpoint(TENANT, TIMELINE).await?;
        let cpu = cpu_time(UsageWho::RUSAGE_SELF)?.saturating_sub(before.0);
        let cost = Cost { cpu, wall: before.1.elapsed(), metrics: shard.metrics() };
        let lsns = timeline.lsns();
        if lsns.disk_consistent < end || lsns.journal < end {
            return Err(format!("not all is on disk: {lsns:?}, the WAL ends at {end}").into());
        }
        shard.shutdown().await;
        Result::Ok(cost)
    });
    let serve = serve.map_err(|error| error.to_string())?;
    let cost = serve.join();
    done.store(true, Ordering::Release);
    let cost = cost.map_err(|error| error.to_string())??;
    runner.join().map_err(|error| error.to_string())?;
    fs::remove_dir_all(&dir)?;
    Ok(cost)
}

fn compare(full_page_writes: bool) -> Result<()> {
    let scratch = Scratch::new(if full_page_writes { "ingest-fpw" } else { "ingest" })?;
    let recorded = record(scratch.path(), full_page_writes)?;
    let from = backup_start(&recorded.backup)?;
    let mut wal = Vec::new();
    for (number, path) in segments(&recorded, from) {
        let segment = fs::read(path)?;
        let begin = from.0.saturating_sub(number * SEGMENT) as usize;
        let end = (recorded.mark.end.0 - number * SEGMENT).min(SEGMENT) as usize;
        wal.extend_from_slice(&segment[begin..end]);
    }
    let wal = Bytes::from(wal);
    let megabytes = wal.len() as f64 / MB;
    let on = if full_page_writes { "on" } else { "off" };
    println!(
        "full_page_writes = {on}: {megabytes:.1} MB of WAL from {from} to {}",
        recorded.mark.end
    );
    let [mut theirs, mut ours, mut ratio, mut their_cpu, mut our_cpu, mut records] =
        std::array::from_fn(|_| Rounds::default());
    let (mut their_wall, mut our_wall) = (Rounds::default(), Rounds::default());
    for round in 1..=sized(1, 3) {
        let stock = recover(scratch.path(), &recorded, from)?;
        let cost = ingest(scratch.path(), &recorded, from, wal.clone())?;
        let (a, b) = (stock.cpu.as_secs_f64(), cost.cpu.as_secs_f64());
        println!(
            "  round {round}: PostgreSQL {a:.2} CPU-s, pgstrata {b:.2} CPU-s, {} records, {} values, \
             {:.1} MB of layers, {:.1} MB of journal in {} syncs",
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
    println!("  ratio pgstrata / PostgreSQL in MB/CPU-s: {}", ratio.text(2));
    Ok(())
}

fn main() -> std::process::ExitCode {
    common::main(|| {
        println!("ingest: WAL per CPU-second; median (min..max) of the rounds");
        compare(true)?;
        compare(false)
    })
}
