//! What a core of a real node is made of: io_uring, primaries, wal-redo processes.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use nix::sys::resource::{Resource, getrlimit};

use crate::base::TenantShardId;
use crate::config::Config;
use crate::io::spares::Spares;
use crate::io::uring::UringIo;
use crate::limits::{
    LAYER_READERS_MAX, LAYER_READERS_MIN, REDO_IDLE, REDO_PROCESSES_MAX, REDO_SLICE, REDO_SPARES,
};
use crate::redo::child::{ChildRedo, ChildStatus};
use crate::redo::native::run::{NativeCounters, NativeRedo};
use crate::redo::pool::{Pool, PoolSettings};
use crate::redo::{Redo, RedoMaker, RedoSettings};
use crate::server::node::{CoreContext, CoreService};
use crate::server::router::owner;
use crate::shard::background;
use crate::shard::control::CoreMetrics;
use crate::shard::primary::PrimaryConnector;
use crate::shard::tenants::{RedoFactory, Shard, ShardContext};
use crate::shard::timeline::TimelineConfig;

/// Directory, within the data directory, where children start.
pub const REDO_DIR: &str = "redo";
/// Directory, within the data directory, of inputs of failed redo.
pub const REDO_FAILED_DIR: &str = "redo_failed";

/// Directory, within the data directory, of files whose space is kept.
const SPARE_DIR: &str = "spare";

/// Where the node keeps space of removed files.
pub fn spares(config: &Config) -> Spares {
    Spares::new(&config.data_dir.join(SPARE_DIR), config.spare_bytes)
}

/// Files that the process may have open.
fn open_files_max() -> u64 {
    // It cannot fail with these arguments.
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(files, _)| files)
}

/// Layer files that each of `cores` cores keeps open where the process may have `files` open: half
/// of them in all, as connections, journals and jobs have files too.
fn layer_files_max(files: u64, cores: usize) -> usize {
    let share = usize::try_from(files / 2).unwrap_or(usize::MAX) / cores.max(1);
    share.clamp(LAYER_READERS_MIN, LAYER_READERS_MAX)
}

/// One core's shard.
pub type NodeShard = Rc<Shard<UringIo, PrimaryConnector>>;

impl CoreService for NodeShard {
    async fn start(context: CoreContext) -> Result<Self, String> {
        let (background, runner) = background::channel();
        let spawner = context.background.clone();
        let spares = Arc::new(spares(&context.config));
        let of_background = spares.clone();
        glommio::spawn_local(async move {
            // It ends with the node; a failure shows at the first job that is sent.
            let io = move || UringIo::new(Some(of_background));
            let _ = spawner.run(move || async move { runner.run(io()).await }).await;
        })
        .detach();
        let (core, cores, config) = (context.core, context.cores, &context.config);
        Shard::start(ShardContext {
            core,
            io: UringIo::new(Some(spares)),
            background,
            data_dir: config.data_dir.clone(),
            config: TimelineConfig::from(&**config),
            block_cache_bytes: config.block_cache_bytes as usize,
            page_cache_bytes: config.page_cache_bytes as usize,
            layer_files_max: layer_files_max(open_files_max(), cores),
            memory_budget_bytes: config.memory_budget_bytes,
            connector: PrimaryConnector,
            redo: Rc::new(ChildFactory::new(config, context.cpu)),
            owns: Rc::new(move |tenant| owner(&tenant, cores) == core),
        })
        .await
        .map_err(|error| error.to_string())
    }
}

/// Redo of a job in the background.
struct Job {
    /// Says what process it has; `None` when the job is gone.
    watch: Box<dyn Fn() -> Option<Option<ChildStatus>>>,
    counters: Arc<NativeCounters>,
}

/// Gives every tenant native redo, and behind it processes of the core's pool.
pub struct ChildFactory {
    pool: Pool,
    tenants: RefCell<Vec<(TenantShardId, Rc<NativeRedo<ChildRedo>>)>>,
    background: RefCell<Vec<Job>>,
    /// What was counted by services that have ended.
    ended: RefCell<CoreMetrics>,
}

/// Adds what a service has counted.
fn add_counters(metrics: &mut CoreMetrics, native: &NativeCounters) {
    metrics.redo_requests += native.pages_native.get() + native.pages_child.get();
    metrics.redo_records += native.native_records() + native.child_records();
    metrics.redo_pages_native += native.pages_native.get();
    metrics.redo_records_native += native.native_records();
    metrics.redo_misfits += native.misfits.get();
    for ((manager, info), native, child) in native.types() {
        let key = u16::from(manager) << 8 | u16::from(info);
        let split = metrics.redo_types.entry(key).or_default();
        split.native += native;
        split.child += child;
    }
    native.time_ns.add_to(&mut metrics.redo_time_ns);
    native.records.add_to(&mut metrics.redo_chain_records);
    native.bytes.add_to(&mut metrics.redo_chain_bytes);
}

impl ChildFactory {
    /// A factory for the core on `cpu`.
    pub fn new(config: &Config, cpu: usize) -> Self {
        let pool = Pool::new(PoolSettings {
            postgres_bin: config.postgres_bin.clone(),
            walredo_so: config.walredo_library.clone(),
            scratch_dir: config.data_dir.join(REDO_DIR),
            cpu: Some(cpu),
            timeout: Duration::from_millis(config.redo_timeout_ms),
            processes_max: REDO_PROCESSES_MAX,
            spares: REDO_SPARES,
            idle: REDO_IDLE,
            slice: REDO_SLICE,
            failed_dir: Some(config.data_dir.join(REDO_FAILED_DIR)),
            sandbox_optional: config.redo_sandbox_optional,
        });
        let (tenants, background, ended) = Default::default();
        ChildFactory { pool, tenants, background, ended }
    }

    /// The processes that are bound to a tenant now.
    fn children(&self) -> Vec<ChildStatus> {
        let tenants = self.tenants.borrow();
        let mut all: Vec<_> =
            tenants.iter().filter_map(|(_, redo)| redo.inner().status()).collect();
        all.extend(self.background.borrow().iter().filter_map(|job| (job.watch)().flatten()));
        all
    }

    /// Lets go of jobs that are over; what they have counted stays.
    fn end_jobs(&self) {
        self.background.borrow_mut().retain_mut(|job| {
            // Nobody else has them: nobody counts any more.
            let last = Arc::get_mut(&mut job.counters);
            let is_over = last.is_some();
            if let Some(counters) = last {
                add_counters(&mut self.ended.borrow_mut(), counters);
            }
            !is_over
        });
    }
}

impl RedoFactory for ChildFactory {
    fn start(&self, tenant: TenantShardId, redo: RedoSettings) -> Rc<dyn Redo> {
        let child = ChildRedo::in_pool(&self.pool, tenant.to_string(), redo);
        let redo = Rc::new(NativeRedo::new(child, redo));
        self.tenants.borrow_mut().push((tenant, redo.clone()));
        redo
    }

    fn background(&self, tenant: TenantShardId, redo: RedoSettings) -> RedoMaker {
        let child = ChildRedo::in_pool(&self.pool, tenant.to_string(), redo);
        self.end_jobs();
        let counters = Arc::<NativeCounters>::default();
        let job = Job { watch: Box::new(child.watch()), counters: counters.clone() };
        self.background.borrow_mut().push(job);
        Box::new(move || Rc::new(NativeRedo::counting(child, redo, counters)))
    }

    fn stop(&self, tenant: TenantShardId) -> LocalBoxFuture<'_, ()> {
        let all = std::mem::take(&mut *self.tenants.borrow_mut());
        let (mine, others): (Vec<_>, _) = all.into_iter().partition(|(other, _)| *other == tenant);
        *self.tenants.borrow_mut() = others;
        mine.iter().for_each(|(_, redo)| {
            add_counters(&mut self.ended.borrow_mut(), redo.counters());
        });
        Box::pin(async {
            for (_, redo) in mine {
                redo.inner().shutdown().await;
            }
        })
    }

    fn stop_all(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {
            let tenants = std::mem::take(&mut *self.tenants.borrow_mut());
            for (_, redo) in tenants {
                redo.inner().shutdown().await;
            }
            if self.pool.shutdown().await {
                let started = self.pool.counters().started.load(Ordering::Relaxed);
                tracing::debug!(started, "wal-redo has ended; no process of it is left");
            }
        })
    }

    fn metrics(&self, metrics: &mut CoreMetrics) {
        self.end_jobs();
        let ended = self.ended.borrow().clone();
        *metrics = CoreMetrics {
            redo_requests: ended.redo_requests,
            redo_records: ended.redo_records,
            redo_pages_native: ended.redo_pages_native,
            redo_records_native: ended.redo_records_native,
            redo_misfits: ended.redo_misfits,
            redo_types: ended.redo_types,
            redo_time_ns: ended.redo_time_ns,
            redo_chain_records: ended.redo_chain_records,
            redo_chain_bytes: ended.redo_chain_bytes,
            ..std::mem::take(metrics)
        };
        for (_, redo) in self.tenants.borrow().iter() {
            add_counters(metrics, redo.counters());
        }
        self.background.borrow().iter().for_each(|job| add_counters(metrics, &job.counters));
        let pool = self.pool.counters();
        let seconds = |micros: &AtomicU64| micros.load(Ordering::Relaxed) as f64 / 1e6;
        metrics.redo_inline += pool.inline.load(Ordering::Relaxed);
        metrics.redo_children_started += pool.started.load(Ordering::Relaxed);
        metrics.redo_children_alive += pool.alive.load(Ordering::Relaxed);
        metrics.redo_failures += pool.failures.load(Ordering::Relaxed);
        metrics.redo_child_errors += pool.errors.load(Ordering::Relaxed);
        metrics.redo_seconds += seconds(&pool.busy_micros);
        pool.launch_micros.add_to(&mut metrics.redo_launch_us);
        metrics.redo_children = self.children();
    }
}

/// The wal-redo library: as configured, or beside this program, or in `walredo/` beside the
/// directory of this program (where a build puts it).
pub fn find_library(configured: &Path) -> Result<PathBuf, String> {
    const NAME: &str = "neon_walredo.so";
    if !configured.as_os_str().is_empty() {
        return if configured.is_file() {
            Ok(configured.to_owned())
        } else {
            Err(format!("walredo_library: {} is no file", configured.display()))
        };
    }
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut tried = Vec::new();
    for dir in program.ancestors().skip(1).take(4) {
        for candidate in [dir.join(NAME), dir.join("walredo").join(NAME)] {
            if candidate.is_file() {
                return Ok(candidate);
            }
            tried.push(candidate.display().to_string());
        }
    }
    Err(format!(
        "{NAME} was not found; run 'make walredo', or name it by -c walredo_library=PATH \
         (looked for {})",
        tried.join(", ")
    ))
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "an executor's thread of its own")]
mod tests {
    use std::sync::mpsc::channel;

    use futures_lite::future::block_on;

    use super::*;
    use crate::redo::child::tests::{ask, inserts};

    #[test]
    fn layer_files_leave_half_of_the_files_to_others() {
        assert_eq!(layer_files_max(1_048_576, 2), LAYER_READERS_MAX);
        assert_eq!(layer_files_max(u64::MAX, 1), LAYER_READERS_MAX);
        assert_eq!(layer_files_max(4096, 2), 1024);
        assert_eq!(layer_files_max(1024, 4), 128);
        assert_eq!(layer_files_max(0, 4), LAYER_READERS_MIN);
    }

    /// What a job in the background rebuilds is counted with the rest, while it goes on and after.
    #[test]
    fn redo_in_the_background_is_counted() {
        let factory = ChildFactory::new(&Config::default(), 0);
        let tenant: TenantShardId = "00112233445566778899aabbccddeeff".parse().unwrap();
        let settings = RedoSettings { hint_bits_logged: false };
        let counted = || {
            let mut metrics = CoreMetrics::default();
            factory.metrics(&mut metrics);
            let types: u64 = metrics.redo_types.values().map(|split| split.native).sum();
            let times: u64 = metrics.redo_time_ns.counts.iter().sum();
            assert_eq!((types, times), (metrics.redo_records_native, metrics.redo_requests));
            (metrics.redo_requests, metrics.redo_records)
        };
        let make = factory.background(tenant, settings);
        assert_eq!(counted(), (0, 0));
        let (done, wait) = channel();
        let (go_on, may_end) = channel();
        let job = std::thread::spawn(move || {
            let redo = make();
            block_on(redo.redo(ask(0, 9, None, inserts(9, 3)))).unwrap();
            done.send(()).unwrap();
            may_end.recv().unwrap();
            block_on(redo.redo(ask(0, 9, None, inserts(9, 4)))).unwrap();
        });
        wait.recv().unwrap();
        assert_eq!(counted(), (1, 3));
        go_on.send(()).unwrap();
        job.join().unwrap();
        assert_eq!(counted(), (2, 7));
        assert_eq!(counted(), (2, 7), "what has ended is added once");
        assert!(factory.background.borrow().is_empty());
        let redo = factory.start(tenant, settings);
        block_on(redo.redo(ask(0, 9, None, inserts(9, 1)))).unwrap();
        assert_eq!(counted(), (3, 8));
    }
}
