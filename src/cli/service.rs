//! What a core of a real node is made of: io_uring, primaries, wal-redo children.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;

use crate::base::TenantShardId;
use crate::config::Config;
use crate::io::uring::UringIo;
use crate::redo::child::{ChildRedo, ChildSettings, Counters};
use crate::redo::native::run::NativeRedo;
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

/// One core's shard.
pub type NodeShard = Rc<Shard<UringIo, PrimaryConnector>>;

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
            config: TimelineConfig::from(&**config),
            block_cache_bytes: config.block_cache_bytes as usize,
            memory_budget_bytes: config.memory_budget_bytes,
            connector: PrimaryConnector,
            redo: Rc::new(ChildFactory::new(config, context.cpu)),
            owns: Rc::new(move |tenant| owner(&tenant, cores) == core),
        })
        .await
        .map_err(|error| error.to_string())
    }
}

/// Gives every tenant native redo, and behind it a wal-redo child of its own, on the core's CPU.
pub struct ChildFactory {
    settings: ChildSettings,
    tenants: RefCell<Vec<(TenantShardId, Rc<NativeRedo<ChildRedo>>)>>,
    /// Of the children that jobs have for their time.
    background: Arc<Counters>,
    /// What was counted by services that have ended.
    ended: RefCell<CoreMetrics>,
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
        let (tenants, background, ended) = Default::default();
        ChildFactory { settings, tenants, background, ended }
    }
}

/// Adds what a service has counted.
fn add_counters(metrics: &mut CoreMetrics, redo: &NativeRedo<ChildRedo>) {
    let (native, child) = (redo.counters(), redo.inner().counters());
    metrics.redo_requests += native.pages_native.get() + native.pages_child.get();
    metrics.redo_records += native.native_records() + native.child_records();
    metrics.redo_pages_native += native.pages_native.get();
    metrics.redo_records_native += native.native_records();
    metrics.redo_misfits += native.misfits.get();
    metrics.redo_children_started += child.started.load(Ordering::Relaxed);
    metrics.redo_failures += child.failures.load(Ordering::Relaxed);
    metrics.redo_seconds += child.busy_micros.load(Ordering::Relaxed) as f64 / 1e6;
    let managers = native.native.iter().zip(&native.child).zip(0u8..);
    for ((native, child), manager) in managers {
        let (native, child) = (native.get(), child.get());
        if native + child > 0 {
            let split = metrics.redo_managers.entry(manager).or_default();
            split.native += native;
            split.child += child;
        }
    }
}

impl RedoFactory for ChildFactory {
    fn start(&self, tenant: TenantShardId, redo: RedoSettings) -> Rc<dyn Redo> {
        let settings = ChildSettings { tenant: tenant.to_string(), redo, ..self.settings.clone() };
        let redo = Rc::new(NativeRedo::new(ChildRedo::new(settings), redo));
        self.tenants.borrow_mut().push((tenant, redo.clone()));
        redo
    }

    fn background(&self, tenant: TenantShardId, redo: RedoSettings) -> RedoMaker {
        let settings = ChildSettings { tenant: tenant.to_string(), redo, ..self.settings.clone() };
        let counters = self.background.clone();
        Box::new(move || Rc::new(NativeRedo::new(ChildRedo::counted(settings, counters), redo)))
    }

    fn stop(&self, tenant: TenantShardId) -> LocalBoxFuture<'_, ()> {
        let all = std::mem::take(&mut *self.tenants.borrow_mut());
        let (mine, others): (Vec<_>, _) = all.into_iter().partition(|(other, _)| *other == tenant);
        *self.tenants.borrow_mut() = others;
        mine.iter().for_each(|(_, redo)| add_counters(&mut self.ended.borrow_mut(), redo));
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
        })
    }

    fn metrics(&self, metrics: &mut CoreMetrics) {
        let ended = self.ended.borrow().clone();
        *metrics = CoreMetrics {
            redo_requests: ended.redo_requests,
            redo_records: ended.redo_records,
            redo_pages_native: ended.redo_pages_native,
            redo_records_native: ended.redo_records_native,
            redo_misfits: ended.redo_misfits,
            redo_children_started: ended.redo_children_started,
            redo_failures: ended.redo_failures,
            redo_seconds: ended.redo_seconds,
            redo_managers: ended.redo_managers,
            ..std::mem::take(metrics)
        };
        for (_, redo) in self.tenants.borrow().iter() {
            add_counters(metrics, redo);
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
