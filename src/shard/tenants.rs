//! The shard: all tenants and timelines of one core.
//!
//! Directory layout under the node's data directory:
//!
//! ```text
//! tenants/<tenant shard>/config                           settings of the tenant
//! tenants/<tenant shard>/deleted                          only while the tenant is being removed
//! tenants/<tenant shard>/timelines/<timeline>/index       what the timeline consists of
//! tenants/<tenant shard>/timelines/<timeline>/deleted     the index of a timeline being removed
//! tenants/<tenant shard>/timelines/<timeline>/<layer>     layer files
//! tenants/<tenant shard>/timelines/<timeline>/journal_mark  how far the journal was synced
//! tenants/<tenant shard>/timelines/<timeline>/wal/        the journal
//! tenants/<tenant shard>/timelines/<timeline>/import/     only while a base backup comes in
//! ```
//!
//! Beside `tenants/` stands `spare/`, with the space of removed files ([`crate::io::spares`]).
//!
//! What is known of each timeline, and how it is opened: [`super::activate`]. Branches, deletion,
//! archives, settings: [`super::lifecycle`].

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use super::activate::{Slot, TimelineKey, readable_from};
use super::background::Background;
use super::control::{
    Change, ControlError, CoreControl, CoreMetrics, CreateTimeline, TenantInfo, TimelineInfo,
};
use super::follow::Connector;
use super::history::{HistoryReply, HistoryRequest};
use super::idle::Round;
use super::import::{self, ImportError, ImportJob, Progress};
use super::index::INDEX_FILE;
use super::memory::MemoryBudget;
use super::metrics::Counters;
use super::pages::PageCache;
use super::reader::{PageBackend, ReadError};
use super::readers::Readers;
use super::tenant_config::TenantConfig;
use super::timeline::{Signal, Timeline, TimelineConfig};
use super::turn::Turn;
use super::warm::RecentPages;
use crate::base::{Kind, TenantShardId, TimelineId};
use crate::io::durable::TEMP_SUFFIX;
use crate::io::{Io, IoCause, IoError, TaskClass};
use crate::layers::{BlockCache, LayerOwner};
use crate::redo::{Redo, RedoMaker, RedoSettings};

/// Name of the directory of a tenant's timelines.
pub(super) const TIMELINES_DIR: &str = "timelines";

/// Makes and stops the redo service of a tenant.
pub trait RedoFactory: 'static {
    /// The service for one tenant.
    fn start(&self, tenant: TenantShardId, settings: RedoSettings) -> Rc<dyn Redo>;
    /// The service for jobs of the same tenant on the background executor.
    fn background(&self, tenant: TenantShardId, settings: RedoSettings) -> RedoMaker;
    /// Stops every service of one tenant that was started by `start`; when this returns, no
    /// process of it is left.
    fn stop(&self, tenant: TenantShardId) -> futures_util::future::LocalBoxFuture<'_, ()>;
    /// Stops every service that was started by `start`.
    fn stop_all(&self) -> futures_util::future::LocalBoxFuture<'_, ()>;
    /// Adds its counters.
    fn metrics(&self, metrics: &mut CoreMetrics);
}

/// What a shard needs from its surroundings.
pub struct ShardContext<I: Io, C: Connector> {
    /// Number of the core.
    pub core: usize,
    /// The serve executor.
    pub io: I,
    /// The background executor.
    pub background: Background<I>,
    /// The node's data directory.
    pub data_dir: PathBuf,
    /// Sizes and times of timelines.
    pub config: TimelineConfig,
    /// Memory for verified blocks of layer files, in bytes.
    pub block_cache_bytes: usize,
    /// Memory for recently rebuilt pages, in bytes.
    pub page_cache_bytes: usize,
    /// Layer files that may be open.
    pub layer_files_max: usize,
    /// Memory for open and frozen layers, in bytes.
    pub memory_budget_bytes: u64,
    /// Connects to WAL sources.
    pub connector: C,
    /// Redo services.
    pub redo: Rc<dyn RedoFactory>,
    /// Tells which tenants belong to this core.
    pub owns: Rc<dyn Fn(TenantShardId) -> bool>,
}

/// See the module's text.
pub struct Shard<I: Io, C: Connector> {
    pub(super) context: ShardContext<I, C>,
    pub(super) cache: Rc<BlockCache>,
    pub(crate) readers: Rc<Readers<I>>,
    pub(super) recent: Rc<RecentPages>,
    pub(super) pages: Rc<PageCache>,
    pub(super) memory: Rc<MemoryBudget>,
    pub(super) counters: Rc<Counters>,
    pub(super) slots: RefCell<BTreeMap<TimelineKey, Slot<I>>>,
    pub(super) tenants: RefCell<BTreeMap<TenantShardId, TenantSlot>>,
    /// By tenant, and by what redo must know of the cluster: timelines may come from several.
    redo: RefCell<HashMap<(TenantShardId, RedoSettings), Rc<dyn Redo>>>,
    pub(super) stopping: Cell<bool>,
    /// Ends the pause of the look for idle timelines.
    pub(super) idle_signal: Signal,
    pub(super) round: Round,
}

/// What the shard knows of a tenant.
pub(super) struct TenantSlot {
    /// Its settings over those of the node.
    pub(super) overrides: TenantConfig,
    /// What they amount to; all its timelines look here.
    pub(super) config: Rc<Cell<TimelineConfig>>,
    /// Why it cannot be used.
    pub(super) error: Option<String>,
    /// Changes of the tenant and its timelines happen one after the other.
    pub(super) turn: Rc<Turn>,
}

impl<I: Io, C: Connector> Shard<I, C> {
    /// Opens all tenants of this core. A timeline that cannot be opened is shown as broken and
    /// hurts no other.
    pub async fn start(context: ShardContext<I, C>) -> Result<Rc<Self>, IoError> {
        let cache = Rc::new(BlockCache::new(context.block_cache_bytes));
        let pages = Rc::new(PageCache::new(context.page_cache_bytes));
        let shard = Rc::new(Shard {
            cache,
            readers: Rc::new(Readers::new(context.layer_files_max)),
            recent: Rc::default(),
            pages,
            memory: MemoryBudget::new(context.memory_budget_bytes),
            counters: Rc::new(Counters::default()),
            slots: RefCell::default(),
            tenants: RefCell::default(),
            redo: RefCell::default(),
            stopping: Cell::new(false),
            idle_signal: Signal::new(),
            round: Round::default(),
            context,
        });
        let tenants = shard.context.data_dir.join("tenants");
        // Everything that will be acknowledged lies below this name.
        let change = shard.context.io.dir_change(&shard.context.data_dir);
        shard.context.io.create_dir(&tenants).await?;
        shard.context.io.sync_dir(&change).await?;
        for entry in shard.context.io.list(&tenants).await? {
            // A tenant whose making did not end has its name with a suffix.
            let (name, half_made) = match entry.name.strip_suffix(TEMP_SUFFIX) {
                Some(name) => (name, true),
                None => (entry.name.as_str(), false),
            };
            let Ok(tenant) = name.parse::<TenantShardId>() else {
                tracing::warn!("{} in {} is no tenant", entry.name, tenants.display());
                continue;
            };
            match (shard.context.owns)(tenant) {
                true if half_made => {
                    shard.context.io.remove_dir_all(&tenants.join(&entry.name)).await?;
                }
                true => shard.open_tenant(tenant).await?,
                false => {}
            }
        }
        if shard.context.config.timeline_idle_ms > 0 {
            shard.context.io.spawn(TaskClass::Background, shard.clone().idle_loop());
        }
        Ok(shard)
    }

    pub(super) fn tenant_dir(&self, tenant: TenantShardId) -> PathBuf {
        self.context.data_dir.join("tenants").join(tenant.to_string())
    }

    pub(super) fn timelines_dir(&self, tenant: TenantShardId) -> PathBuf {
        self.tenant_dir(tenant).join(TIMELINES_DIR)
    }

    pub(super) fn new_tenant(&self, overrides: TenantConfig) -> TenantSlot {
        TenantSlot {
            overrides,
            config: Rc::new(Cell::new(overrides.over(self.context.config))),
            error: None,
            turn: Rc::default(),
        }
    }

    /// The settings of a tenant's timelines; one that is not known yet gets those of the node.
    pub(super) fn config_of(&self, tenant: TenantShardId) -> Rc<Cell<TimelineConfig>> {
        let mut tenants = self.tenants.borrow_mut();
        let new = || self.new_tenant(TenantConfig::default());
        tenants.entry(tenant).or_insert_with(new).config.clone()
    }

    async fn has_index(&self, dir: &Path) -> Result<bool, IoError> {
        Ok(self.context.io.list(dir).await?.iter().any(|entry| entry.name == INDEX_FILE))
    }

    pub(super) fn redo_of(&self, tenant: TenantShardId, settings: RedoSettings) -> Rc<dyn Redo> {
        let start = || self.context.redo.start(tenant, settings);
        self.redo.borrow_mut().entry((tenant, settings)).or_insert_with(start).clone()
    }

    pub(super) fn background_redo_of(
        &self,
        tenant: TenantShardId,
        settings: RedoSettings,
    ) -> Rc<dyn Fn() -> RedoMaker> {
        let factory = self.context.redo.clone();
        Rc::new(move || factory.background(tenant, settings))
    }

    /// Ends the redo services of a tenant that is gone, or of which nothing is open.
    pub(super) async fn forget_redo(&self, tenant: TenantShardId) {
        self.redo.borrow_mut().retain(|(other, _), _| *other != tenant);
        self.context.redo.stop(tenant).await;
    }

    /// Brings a base backup in, then opens the timeline. Runs as a task of its own.
    pub(super) async fn create(self: Rc<Self>, request: CreateTimeline, progress: Arc<Progress>) {
        let key = (request.tenant, request.timeline);
        let slot = match self.import(&request, progress).await {
            Ok(timeline) => {
                self.start_following(&timeline);
                Slot::Ready(timeline)
            }
            Err(reason) => {
                tracing::error!(tenant = %key.0, timeline = %key.1, "import failed: {reason}");
                let dir = self.timelines_dir(key.0).join(key.1.to_string());
                if let Err(error) = self.context.io.remove_dir_all(&dir).await {
                    tracing::warn!("{error}");
                }
                Slot::Failed(reason)
            }
        };
        self.slots.borrow_mut().insert(key, slot);
    }

    async fn import(
        self: &Rc<Self>,
        request: &CreateTimeline,
        progress: Arc<Progress>,
    ) -> Result<Rc<Timeline<I>>, String> {
        let text = |error: IoError| error.to_string();
        let io = &self.context.io;
        let timelines = self.timelines_dir(request.tenant);
        let tenant_dir = timelines.parent().unwrap_or(&timelines).to_owned();
        let dir = timelines.join(request.timeline.to_string());
        let parents = [tenant_dir.parent().unwrap_or(&tenant_dir), &tenant_dir, &timelines];
        let changes = parents.map(|parent| io.dir_change(parent));
        // What an earlier attempt may have left: its journal must not be taken for ours.
        io.remove_dir_all(&dir).await.map_err(text)?;
        for parent in [&tenant_dir, &timelines, &dir] {
            io.create_dir(parent).await.map_err(text)?;
        }
        for change in &changes {
            io.sync_dir(change).await.map_err(text)?;
        }
        let job = ImportJob {
            owner: LayerOwner { shard: request.tenant, timeline: request.timeline },
            dir: dir.clone(),
            source: request.source.clone(),
            image_layer_bytes: self.config_of(request.tenant).get().image_layer_bytes,
            progress,
        };
        let imported = self.context.background.run(move |io: I| import::run(io, job)).await;
        let index = imported
            .map_err(|error| error.to_string())?
            .map_err(|error: ImportError| error.to_string())?;
        import::publish(io, &dir, &index).await.map_err(|error| error.to_string())?;
        self.open_timeline((request.tenant, request.timeline), None)
            .await
            .map_err(|error| error.to_string())
    }

    /// Data that could not be opened is not overwritten: an operator may still save it.
    pub(super) async fn refuse_existing(
        &self,
        tenant: TenantShardId,
        id: TimelineId,
    ) -> Result<(), ControlError> {
        let dir = self.timelines_dir(tenant).join(id.to_string());
        match self.has_index(&dir).await {
            Ok(false) => Ok(()),
            Err(error) if error.cause == IoCause::NotFound => Ok(()),
            Ok(true) => Err(ControlError {
                kind: Kind::Invalid,
                message: format!(
                    "timeline {id} of tenant {tenant} exists already; if it is broken and its \
                     data are not needed, delete it first (its files are in {})",
                    dir.display()
                ),
            }),
            Err(error) => Err(ControlError { kind: error.kind(), message: error.to_string() }),
        }
    }

    /// Imports that were cancelled remove what they have written; then they are no longer there.
    /// What is being opened is open, or has failed; what is being closed is closed.
    async fn wait_for_imports(&self) {
        let importing = |slot: &Slot<I>| {
            matches!(slot, Slot::Importing(_) | Slot::Loading(_) | Slot::Branching(_))
        };
        self.wait_until(|| !self.slots.borrow().values().any(importing)).await;
    }

    fn all_ready(&self) -> Vec<Rc<Timeline<I>>> {
        let slots = self.slots.borrow();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(timeline) => Some(timeline.clone()),
            _ => None,
        });
        ready.collect()
    }
}

impl<I: Io, C: Connector> PageBackend for Rc<Shard<I, C>> {
    type Timeline = Timeline<I>;

    async fn timeline(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<Rc<Timeline<I>>, ReadError> {
        let found = self.activate((tenant, timeline)).await?;
        // Refused here already, so that the command fails and not each of its requests.
        found.enter().map(|_| found.clone())
    }
}

impl<I: Io, C: Connector> CoreControl for Rc<Shard<I, C>> {
    fn timelines(&self) -> Vec<TimelineInfo> {
        let slots = self.slots.borrow();
        let one = |(key, slot): (&TimelineKey, &Slot<I>)| {
            if let Slot::Ready(timeline) = slot {
                timeline.want_logical_size();
            }
            TimelineInfo {
                gc_cutoff_lsn: readable_from(&slots, *key),
                ..slot.info(*key, self.context.core)
            }
        };
        slots.iter().map(one).collect()
    }

    fn tenants(&self) -> Vec<TenantInfo> {
        let tenants = self.tenants.borrow();
        tenants
            .iter()
            .map(|(tenant, slot)| TenantInfo {
                tenant: *tenant,
                core: self.context.core,
                config: slot.overrides,
                effective_config: TenantConfig::effective(slot.config.get()),
                timeline_count: self.of_tenant(*tenant, |_, _| ()).len(),
                error: slot.error.clone(),
            })
            .collect()
    }

    async fn change(&self, change: Change) -> Result<(), ControlError> {
        if self.stopping.get() {
            let message = "the node is shutting down".to_owned();
            return Err(ControlError { kind: Kind::Shutdown, message });
        }
        self.carry_out(change).await
    }

    fn metrics(&self) -> CoreMetrics {
        let (counters, cache) = (&self.counters, self.cache.stats());
        let mut metrics = CoreMetrics {
            core: self.context.core,
            wal_bytes_received: counters.wal_bytes.get(),
            wal_records_ingested: counters.wal_records.get(),
            values_ingested: counters.values.get(),
            wal_changes_skipped: counters.changes_skipped.get(),
            journal_syncs: counters.journal_syncs.get(),
            journal_bytes_written: counters.journal_bytes.get(),
            layer_bytes_written: counters.layer_bytes.get(),
            checkpoints: counters.checkpoints.get(),
            compactions: counters.compactions.get(),
            compaction_failures: counters.compaction_failures.get(),
            merged_bytes_written: counters.merged_bytes.get(),
            image_bytes_written: counters.image_bytes.get(),
            compaction_pages: counters.compaction_pages.get(),
            compaction_page_failures: counters.compaction_page_failures.get(),
            compaction_l0_merges: counters.merges_l0.get(),
            compaction_l1_merges: counters.merges_l1.get(),
            compaction_image_jobs: counters.image_jobs.get(),
            gc_runs: counters.gc_runs.get(),
            gc_failures: counters.gc_failures.get(),
            gc_layers_removed: counters.gc_layers_removed.get(),
            gc_bytes_removed: counters.gc_bytes_removed.get(),
            timelines_closed: counters.timelines_closed.get(),
            ingest_slowed_seconds: counters.ingest_slowed_us.get() as f64 / 1e6,
            ingest_stopped_seconds: counters.ingest_stopped_us.get() as f64 / 1e6,
            index_bytes_written: counters.index_bytes.get(),
            l0_layers_max: counters.l0_layers.get(),
            memory_used_bytes: self.memory.used_bytes(),
            memory_resident_bytes: self.memory.resident_bytes(),
            block_cache_hits: cache.hits,
            block_cache_misses: cache.misses,
            block_cache_bytes: cache.held_bytes as u64,
            layer_files_opened: self.readers.opened(),
            layer_files_open: self.readers.count() as u64,
            layer_files_open_bytes: self.readers.bytes() as u64,
            page_cache_hits: counters.page_cache_hits.get(),
            page_cache_bytes: self.pages.held_bytes() as u64,
            read_layers: counters.read_layers.get(),
            read_records: counters.read_records.get(),
            ..CoreMetrics::default()
        };
        self.context.redo.metrics(&mut metrics);
        metrics
    }

    async fn create_timeline(&self, request: CreateTimeline) -> Result<(), ControlError> {
        self.import_in_turn(request).await
    }

    async fn checkpoint(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<(), ControlError> {
        let control = |kind: Kind, message: String| ControlError { kind, message };
        let found = self.activate((tenant, timeline)).await;
        let found = found.map_err(|e| control(e.kind(), e.to_string()))?;
        let done = found.checkpoint_now().await;
        done.map(|_| ()).map_err(|e| control(Kind::Retry, e.to_string()))
    }

    async fn history(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
        request: HistoryRequest,
    ) -> Result<HistoryReply, ControlError> {
        let control = |kind: Kind, message: String| ControlError { kind, message };
        let found = self.activate((tenant, timeline)).await;
        let found = found.map_err(|e| control(e.kind(), e.to_string()))?;
        match request {
            HistoryRequest::LsnByTimestamp(time) => {
                Ok(HistoryReply::LsnByTimestamp(found.lsn_by_timestamp(time)))
            }
            HistoryRequest::TimestampOfLsn(lsn) => {
                let timestamp = found.timestamp_of_lsn(lsn);
                let timestamp = timestamp.map_err(|e| control(e.kind(), e.to_string()))?;
                Ok(HistoryReply::TimestampOfLsn { timestamp })
            }
            HistoryRequest::Lease(lsn, seconds) => {
                let lease = found.lease(lsn, seconds).await;
                lease.map(HistoryReply::Lease).map_err(|e| control(e.kind(), e.to_string()))
            }
            HistoryRequest::Leases => Ok(HistoryReply::Leases {
                gc_cutoff_lsn: readable_from(&self.slots.borrow(), (tenant, timeline)),
                leases: found.leases(),
            }),
            HistoryRequest::Gc(request) => {
                let report = self.collect_timeline(&found, request).await;
                report.map(HistoryReply::Gc).map_err(|e| control(e.kind(), e.to_string()))
            }
            HistoryRequest::Keyspace(lsn) => {
                let keyspace = found.keyspace(lsn).await;
                let keyspace = keyspace.map_err(|e| control(e.kind(), e.to_string()))?;
                let (keys, at_lsn) = (keyspace.ranges(), keyspace.lsn);
                Ok(HistoryReply::Keyspace { keys, sparse_keys: Vec::new(), at_lsn })
            }
        }
    }

    async fn shutdown(&self) {
        self.stopping.set(true);
        self.idle_signal.set();
        for slot in self.slots.borrow().values() {
            if let Slot::Importing(progress) = slot {
                progress.cancel();
            }
        }
        self.wait_for_imports().await;
        let timelines = self.all_ready();
        timelines.iter().for_each(|timeline| timeline.stop_following());
        self.wait_until(|| timelines.iter().all(|one| one.has_stopped_following())).await;
        // What reads goes first: files are closed when nobody reads them, ancestors' too.
        timelines.iter().for_each(|one| one.gate.close());
        timelines.iter().for_each(|one| one.waiters.fail_all());
        self.wait_until(|| timelines.iter().all(|one| one.gate.is_idle())).await;
        for timeline in timelines {
            timeline.shut_down().await;
        }
        self.context.redo.stop_all().await;
        // Not left to the last owner: a task that is stuck must not keep the runner alive.
        self.context.background.close();
    }
}
