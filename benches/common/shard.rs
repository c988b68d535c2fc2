//! A shard on two executors of one CPU, as in a node, that is fed recorded WAL.

use std::cell::Cell;
use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{LocalBoxFuture, select};
use glommio::{ExecutorJoinHandle, LocalExecutorBuilder, Placement};
use pgstrata::base::lsn::Lsn;
use pgstrata::base::{TenantId, TenantShardId, TimelineId};
use pgstrata::cli::pg::bin_dir;
use pgstrata::config::Config;
use pgstrata::io::spares::Spares;
use pgstrata::io::uring::UringIo;
use pgstrata::limits::{HEARTBEAT_INTERVAL_MS, PREEMPT_INTERVAL_US};
use pgstrata::redo::child::{ChildRedo, ChildSettings};
use pgstrata::redo::native::run::NativeRedo;
use pgstrata::redo::{Redo, RedoMaker, RedoSettings};
use pgstrata::server::mesh::Pulse;
use pgstrata::server::node::{Claim, start_beat, started_executor};
use pgstrata::server::priority;
use pgstrata::shard::background;
use pgstrata::shard::control::{CoreControl, CoreMetrics, CreateTimeline, TimelineSource};
use pgstrata::shard::follow::Connector;
use pgstrata::shard::index::{ClusterIdentity, WalSourceConfig};
use pgstrata::shard::reader::{PageBackend, ReadError};
use pgstrata::shard::tenants::{RedoFactory, Shard, ShardContext};
use pgstrata::shard::timeline::{Timeline, TimelineConfig};
use pgstrata::wal::receiver::{StandbyStatus, WalMessage, WalSource};
use pgstrata::wal::source::SourceError;

use super::{Result, recorded::Recorded, walredo_library};

pub const TENANT: TenantShardId = TenantShardId { tenant: TenantId([1; 16]), number: 0, count: 0 };
pub const TIMELINE: TimelineId = TimelineId([2; 16]);
/// A wal sender sends so much at a time (`MAX_SEND_SIZE`).
const CHUNK: usize = 128 * 1024;

/// Hands out recorded WAL, once the gate is open.
#[derive(Clone)]
pub struct Replay {
    from: Lsn,
    wal: Bytes,
    open: Rc<Cell<bool>>,
}

pub struct ReplaySource {
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

impl Children {
    fn redo(&self, tenant: TenantShardId, redo: RedoSettings) -> RedoMaker {
        let settings = ChildSettings {
            tenant: tenant.to_string(),
            postgres_bin: bin_dir().join("postgres"),
            walredo_so: walredo_library().unwrap_or_default(),
            scratch_dir: self.0.clone(),
            cpu: Some(0),
            redo,
            timeout: Duration::from_secs(10),
        };
        Box::new(move || Rc::new(NativeRedo::new(ChildRedo::new(settings), redo)))
    }
}

impl RedoFactory for Children {
    fn start(&self, tenant: TenantShardId, redo: RedoSettings) -> Rc<dyn Redo> {
        self.redo(tenant, redo)()
    }

    fn background(&self, tenant: TenantShardId, redo: RedoSettings) -> RedoMaker {
        self.redo(tenant, redo)
    }

    fn stop(&self, _: TenantShardId) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn stop_all(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn metrics(&self, _: &mut CoreMetrics) {}
}

async fn until(done: Arc<AtomicBool>) {
    while !done.load(Ordering::Acquire) {
        glommio::timer::sleep(Duration::from_millis(5)).await;
    }
}

/// As in a node: an executor that went to sleep over a task that can run is woken from outside. A
/// timer of its own would not do: the task that waits for it may be the one that is slept over.
fn tick_until(done: Arc<AtomicBool>, mut pulses: [Pulse; 2]) {
    while !done.load(Ordering::Acquire) {
        thread::sleep(Duration::from_millis(HEARTBEAT_INTERVAL_MS));
        pulses.iter_mut().for_each(Pulse::tick);
    }
}

fn executor() -> LocalExecutorBuilder {
    LocalExecutorBuilder::new(Placement::Fixed(0))
        .preempt_timer(Duration::from_micros(PREEMPT_INTERVAL_US))
}

/// Starts an executor with `work`, as a node starts its own.
fn started<T, F>(work: impl FnOnce() -> F + Send + 'static) -> Result<ExecutorJoinHandle<Result<T>>>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + 'static,
{
    let work = Arc::new(Mutex::new(Some(work)));
    let make = |claim: Claim| {
        let work = work.clone();
        executor().spawn(move || async move {
            let work = claim.take().then(|| work.lock().ok()?.take()).flatten();
            work.ok_or("it woke up too late")?().await
        })
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    Ok(runtime.block_on(started_executor(make))?)
}

/// Runs `story` on an executor of CPU 0, with the heartbeat of a node.
pub fn on_executor<T, F>(story: impl FnOnce() -> F + Send + 'static) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + 'static,
{
    let done = Arc::new(AtomicBool::new(false));
    let pulses = [Pulse::default(), Pulse::default()];
    let progress = pulses[0].progress();
    let ticked = done.clone();
    let ticks = thread::spawn(move || tick_until(ticked, pulses));
    let serve = started(move || async move {
        progress.begin().await;
        start_beat(progress);
        story().await
    })?;
    let result = serve.join();
    done.store(true, Ordering::Release);
    ticks.join().map_err(|_| "the heartbeat's thread panicked")?;
    result.map_err(|error| error.to_string())?
}

/// What a benchmark works with.
pub struct Bed {
    pub shard: Rc<Shard<UringIo, Replay>>,
    pub timeline: Rc<Timeline<UringIo>>,
    /// The serve executor.
    pub io: UringIo,
    /// WAL comes in once this is true.
    pub gate: Rc<Cell<bool>>,
}

/// Imports the backup of `recorded` in `dir`, then runs `story`, then shuts the shard down.
pub fn run<T, F>(
    dir: &Path,
    recorded: &Recorded,
    wal: Bytes,
    config: TimelineConfig,
    story: impl FnOnce(Rc<Bed>) -> F + Send + 'static,
) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + 'static,
{
    fs::create_dir_all(dir)?;
    let spares = Spares::new(&dir.join("spare"), Config::default().spare_bytes);
    spares.prepare()?;
    let trimming = spares.start_trimming()?;
    let spares = Arc::new(spares);
    let of_background = spares.clone();
    // A model on a smaller scale has less memory, too.
    let defaults = Config::default();
    let scale = (defaults.checkpoint_distance_bytes / config.checkpoint_distance_bytes).max(1);
    let memory_budget_bytes = defaults.memory_budget_bytes / scale;
    let (background, runner) = background::channel();
    // Tasks that wait keep their ends of the channel when the serve executor goes.
    let [done, beats_done] = [(); 2].map(|()| Arc::new(AtomicBool::new(false)));
    let seen = done.clone();
    let pulses = [Pulse::default(), Pulse::default()];
    let [background_progress, serve_progress] = [pulses[0].progress(), pulses[1].progress()];
    let ticked = beats_done.clone();
    let ticks = thread::spawn(move || tick_until(ticked, pulses));
    let runner = started(move || async move {
        priority::lower();
        background_progress.begin().await;
        start_beat(background_progress);
        let work = std::pin::pin!(runner.run(UringIo::new(Some(of_background))));
        let end = std::pin::pin!(until(seen));
        select(work, end).await;
        Ok(())
    })?;
    let (data_dir, backup) = (dir.to_owned(), recorded.backup.join("data"));
    let from = recorded.start()?;
    let serve = started(move || async move {
        priority::shorten_turns();
        serve_progress.begin().await;
        start_beat(serve_progress);
        let gate = Rc::new(Cell::new(false));
        let io = UringIo::new(Some(spares));
        let context = ShardContext {
            core: 0,
            io: io.clone(),
            background,
            data_dir: data_dir.clone(),
            config,
            block_cache_bytes: Config::default().block_cache_bytes as usize,
            page_cache_bytes: (defaults.page_cache_bytes / scale) as usize,
            layer_files_max: pgstrata::limits::LAYER_READERS_MAX,
            memory_budget_bytes,
            connector: Replay { from, wal, open: gate.clone() },
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
                Err(ReadError::NotReady { .. }) => {
                    glommio::timer::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let result = story(Rc::new(Bed { shard: shard.clone(), timeline, io, gate })).await;
        shard.shutdown().await;
        result
    })?;
    let result = serve.join();
    done.store(true, Ordering::Release);
    let result = result.map_err(|error| error.to_string())??;
    runner.join().map_err(|error| error.to_string())??;
    // Not earlier: an executor that is to end may sleep over that, too.
    beats_done.store(true, Ordering::Release);
    ticks.join().map_err(|_| "the heartbeat's thread panicked")?;
    drop(trimming);
    fs::remove_dir_all(dir)?;
    Ok(result)
}
