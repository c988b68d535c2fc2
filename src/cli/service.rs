//! What a core of a real node is made of: io_uring, primaries, wal-redo children.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;

use crate::base::TenantShardId;
use crate::config::Config;
use crate::io::uring::UringIo;
use crate::redo::child::{ChildRedo, ChildSettings};
use crate::redo::{Redo, RedoSettings};
use crate::server::node::{CoreContext, CoreService};
use crate::server::router::owner;
use crate::shard::background;
use crate::shard::control::CoreMetrics;
use crate::shard::primary::PrimaryConnector;
use crate::shard::tenants::{RedoFactory, Shard, ShardContext};
use crate::shard::timeline::TimelineConfig;

/// Directory, within the data directory, where children start.
pub const REDO_DIR: &str = "redo";

/// One core's shard.
pub type NodeShard = Rc<Shard<UringIo, PrimaryConnector>>;

/// Sizes and times of timelines.
pub fn timeline_config(config: &Config) -> TimelineConfig {
    TimelineConfig {
        checkpoint_distance_bytes: config.checkpoint_distance_bytes,
        checkpoint_timeout_s: config.checkpoint_timeout_s,
        wait_lsn_timeout_ms: config.wait_lsn_timeout_ms,
        image_layer_bytes: config.image_layer_bytes,
        gc_horizon_bytes: config.gc_horizon_bytes,
        pitr_interval_s: config.pitr_interval_s,
        gc_period_s: config.gc_period_s,
    }
}

impl CoreService for NodeShard {
    async fn start(context: CoreContext) -> Result<Self, String> {
        let (background, runner) = background::channel();
        let spawner = context.background.clone();
        glommio::spawn_local(async move {
            // It ends with the node; a failure shows at the first job that is sent.
            let _ = spawner.run(move || async move { runner.run(UringIo::new()).await }).await;
        })
        .detach();
        let (core, cores, config) = (context.core, context.cores, &context.config);
        Shard::start(ShardContext {
            core,
            io: UringIo::new(),
            background,
            data_dir: config.data_dir.clone(),
            config: timeline_config(config),
            block_cache_bytes: config.block_cache_bytes as usize,
            connector: PrimaryConnector,
            redo: Rc::new(ChildFactory::new(config, context.cpu)),
            owns: Rc::new(move |tenant| owner(&tenant, cores) == core),
        })
        .await
        .map_err(|error| error.to_string())
    }
}

/// Gives every tenant a wal-redo child of its own, on the core's CPU.
pub struct ChildFactory {
    settings: ChildSettings,
    children: RefCell<Vec<Rc<ChildRedo>>>,
}

impl ChildFactory {
    /// A factory for the core on `cpu`.
    pub fn new(config: &Config, cpu: usize) -> Self {
        let settings = ChildSettings {
            tenant: String::new(),
            postgres_bin: config.postgres_bin.clone(),
            walredo_so: config.walredo_library.clone(),
            scratch_dir: config.data_dir.join(REDO_DIR),
            cpu: Some(cpu),
            redo: RedoSettings { hint_bits_logged: false },
            timeout: Duration::from_millis(config.redo_timeout_ms),
        };
        ChildFactory { settings, children: RefCell::default() }
    }
}

impl RedoFactory for ChildFactory {
    fn start(&self, tenant: TenantShardId, redo: RedoSettings) -> Rc<dyn Redo> {
        let tenant = tenant.to_string();
        let settings = ChildSettings { tenant, redo, ..self.settings.clone() };
        let child = Rc::new(ChildRedo::new(settings));
        self.children.borrow_mut().push(child.clone());
        child
    }

    fn stop_all(&self) -> LocalBoxFuture<'_, ()> {
        Box::pin(async {
            let children = std::mem::take(&mut *self.children.borrow_mut());
            for child in children {
                child.shutdown().await;
            }
        })
    }

    fn metrics(&self, metrics: &mut CoreMetrics) {
        for child in self.children.borrow().iter() {
            let counters = child.counters();
            metrics.redo_requests += counters.requests.load(Ordering::Relaxed);
            metrics.redo_records += counters.records.load(Ordering::Relaxed);
            metrics.redo_children_started += counters.started.load(Ordering::Relaxed);
            metrics.redo_failures += counters.failures.load(Ordering::Relaxed);
            let micros = counters.busy_micros.load(Ordering::Relaxed);
            metrics.redo_seconds += micros as f64 / 1e6;
        }
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
            Err(format!("walredo_library: there is no {}", configured.display()))
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
