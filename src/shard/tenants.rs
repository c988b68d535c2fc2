//! The shard: all tenants and timelines of one core.
//!
//! Directory layout under the node's data directory:
//!
//! ```text
//! tenants/<tenant shard>/timelines/<timeline>/index       what the timeline consists of
//! tenants/<tenant shard>/timelines/<timeline>/<layer>     layer files
//! tenants/<tenant shard>/timelines/<timeline>/wal/        the journal
//! tenants/<tenant shard>/timelines/<timeline>/import/     only while a base backup comes in
//! ```

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::background::Background;
use super::control::{
    ControlError, CoreControl, CoreMetrics, CreateTimeline, TimelineInfo, TimelineState,
};
use super::follow::Connector;
use super::history::{HistoryReply, HistoryRequest};
use super::import::{self, ImportError, ImportJob, Progress};
use super::index::INDEX_FILE;
use super::load::{LoadError, load};
use super::metrics::Counters;
use super::reader::{PageBackend, ReadError};
use super::timeline::{Timeline, TimelineConfig, TimelineContext};
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::io::{Io, IoCause, IoError, TaskClass};
use crate::layers::{BlockCache, LayerOwner};
use crate::limits::{STOP_POLL_MS, STOP_WAIT_MS};
use crate::redo::{Redo, RedoSettings};

/// Makes and stops the redo service of a tenant.
pub trait RedoFactory: 'static {
    /// The service for one tenant.
    fn start(&self, tenant: TenantShardId, settings: RedoSettings) -> Rc<dyn Redo>;
    /// Stops every service that was started.
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
    /// Connects to WAL sources.
    pub connector: C,
    /// Redo services.
    pub redo: Rc<dyn RedoFactory>,
    /// Tells which tenants belong to this core.
    pub owns: Rc<dyn Fn(TenantShardId) -> bool>,
}

/// See the module's text.
pub struct Shard<I: Io, C: Connector> {
    context: ShardContext<I, C>,
    cache: Rc<BlockCache>,
    counters: Rc<Counters>,
    slots: RefCell<BTreeMap<(TenantShardId, TimelineId), Slot<I>>>,
    /// By tenant, and by what redo must know of the cluster: timelines may come from several.
    redo: RefCell<HashMap<(TenantShardId, RedoSettings), Rc<dyn Redo>>>,
    stopping: Cell<bool>,
}

enum Slot<I: Io> {
    Importing(Arc<Progress>),
    /// An import that failed: nothing of it is left, and it may be tried again.
    Failed(String),
    /// A timeline that is on disk but cannot be opened: only an operator may remove it.
    Damaged(String),
    Ready(Rc<Timeline<I>>),
}

impl<I: Io, C: Connector> Shard<I, C> {
    /// Opens all tenants of this core. A timeline that cannot be opened is shown as broken and
    /// hurts no other.
    pub async fn start(context: ShardContext<I, C>) -> Result<Rc<Self>, IoError> {
        let cache = Rc::new(BlockCache::new(context.block_cache_bytes));
        let shard = Rc::new(Shard {
            cache,
            counters: Rc::new(Counters::default()),
            slots: RefCell::default(),
            redo: RefCell::default(),
            stopping: Cell::new(false),
            context,
        });
        let tenants = shard.context.data_dir.join("tenants");
        shard.context.io.create_dir(&tenants).await?;
        // Everything that will be acknowledged lies below this name.
        shard.context.io.sync_dir(&shard.context.data_dir).await?;
        for entry in shard.context.io.list(&tenants).await? {
            let Ok(tenant) = entry.name.parse::<TenantShardId>() else {
                tracing::warn!("{} in {} is no tenant", entry.name, tenants.display());
                continue;
            };
            if (shard.context.owns)(tenant) {
                shard.open_tenant(tenant).await?;
            }
        }
        Ok(shard)
    }

    fn timelines_dir(&self, tenant: TenantShardId) -> PathBuf {
        self.context.data_dir.join("tenants").join(tenant.to_string()).join("timelines")
    }

    async fn open_tenant(self: &Rc<Self>, tenant: TenantShardId) -> Result<(), IoError> {
        let dir = self.timelines_dir(tenant);
        self.context.io.create_dir(&dir).await?;
        for entry in self.context.io.list(&dir).await? {
            let Ok(id) = entry.name.parse::<TimelineId>() else { continue };
            let timeline_dir = dir.join(&entry.name);
            if !self.has_index(&timeline_dir).await? {
                tracing::warn!(%tenant, timeline = %id, "removing an import that did not end");
                self.context.io.remove_dir_all(&timeline_dir).await?;
                continue;
            }
            let slot = match self.open_timeline(tenant, id).await {
                Ok(timeline) => Slot::Ready(timeline),
                Err(error) => {
                    tracing::error!(%tenant, timeline = %id, "cannot be opened: {error}");
                    Slot::Damaged(error.to_string())
                }
            };
            self.slots.borrow_mut().insert((tenant, id), slot);
        }
        Ok(())
    }

    async fn has_index(&self, dir: &Path) -> Result<bool, IoError> {
        Ok(self.context.io.list(dir).await?.iter().any(|entry| entry.name == INDEX_FILE))
    }

    async fn open_timeline(
        self: &Rc<Self>,
        tenant: TenantShardId,
        id: TimelineId,
    ) -> Result<Rc<Timeline<I>>, LoadError> {
        let dir = self.timelines_dir(tenant).join(id.to_string());
        let owner = LayerOwner { shard: tenant, timeline: id };
        let context = &self.context;
        let timeline = load(
            |settings| TimelineContext {
                io: context.io.clone(),
                background: context.background.clone(),
                redo: self.redo_of(tenant, settings),
                cache: self.cache.clone(),
                counters: self.counters.clone(),
                config: context.config,
                dir: dir.clone(),
            },
            &context.io,
            &dir,
            owner,
        )
        .await?;
        let follow = timeline.clone().follow(context.connector.clone());
        context.io.spawn(TaskClass::Ingest, follow);
        context.io.spawn(TaskClass::Background, self.clone().gc_loop(timeline.clone()));
        Ok(timeline)
    }

    fn redo_of(&self, tenant: TenantShardId, settings: RedoSettings) -> Rc<dyn Redo> {
        let start = || self.context.redo.start(tenant, settings);
        self.redo.borrow_mut().entry((tenant, settings)).or_insert_with(start).clone()
    }

    /// Brings a base backup in, then opens the timeline. Runs as a task of its own.
    async fn create(self: Rc<Self>, request: CreateTimeline, progress: Arc<Progress>) {
        let key = (request.tenant, request.timeline);
        let slot = match self.import(&request, progress).await {
            Ok(timeline) => Slot::Ready(timeline),
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
        // What an earlier attempt may have left: its journal must not be taken for ours.
        io.remove_dir_all(&dir).await.map_err(text)?;
        for parent in [&tenant_dir, &timelines, &dir] {
            io.create_dir(parent).await.map_err(text)?;
        }
        for parent in [tenant_dir.parent().unwrap_or(&tenant_dir), &tenant_dir, &timelines] {
            io.sync_dir(parent).await.map_err(text)?;
        }
        let job = ImportJob {
            owner: LayerOwner { shard: request.tenant, timeline: request.timeline },
            dir: dir.clone(),
            source: request.source.clone(),
            image_layer_bytes: self.context.config.image_layer_bytes,
            progress,
        };
        let imported =
            self.context.background.run(move |io: I| import::run_until_cancelled(io, job)).await;
        let index = imported
            .map_err(|error| error.to_string())?
            .map_err(|error: ImportError| error.to_string())?;
        import::publish(io, &dir, &index).await.map_err(|error| error.to_string())?;
        self.open_timeline(request.tenant, request.timeline)
            .await
            .map_err(|error| error.to_string())
    }

    /// Data that could not be opened is not overwritten: an operator may still save it.
    async fn refuse_existing(
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
                     data are not needed, remove {} while the node is stopped",
                    dir.display()
                ),
            }),
            Err(error) => Err(ControlError { kind: error.kind(), message: error.to_string() }),
        }
    }

    /// LSNs of a timeline at which other timelines branch off.
    pub(super) fn branch_points(&self, _: TenantShardId, _: TimelineId) -> Vec<Lsn> {
        Vec::new()
    }

    fn ready(&self, tenant: TenantShardId, id: TimelineId) -> Result<Rc<Timeline<I>>, ReadError> {
        let slots = self.slots.borrow();
        match slots.get(&(tenant, id)) {
            Some(Slot::Ready(timeline)) => Ok(timeline.clone()),
            Some(Slot::Importing(_)) => Err(ReadError::NotReady {
                timeline: id,
                reason: "its base backup is being imported".to_owned(),
            }),
            Some(Slot::Failed(reason) | Slot::Damaged(reason)) => {
                Err(ReadError::NotReady { timeline: id, reason: reason.clone() })
            }
            None if slots.keys().any(|(present, _)| *present == tenant) => {
                Err(ReadError::TimelineNotFound(tenant, id))
            }
            None => Err(ReadError::TenantNotFound(tenant)),
        }
    }

    /// Imports that were cancelled remove what they have written; then they are no longer there.
    async fn wait_for_imports(&self) {
        let importing = |slot: &Slot<I>| matches!(slot, Slot::Importing(_));
        let mut waited_ms = 0;
        while waited_ms < STOP_WAIT_MS && self.slots.borrow().values().any(importing) {
            self.context.io.sleep(Duration::from_millis(STOP_POLL_MS)).await;
            waited_ms += STOP_POLL_MS;
        }
    }

    fn all_ready(&self) -> Vec<Rc<Timeline<I>>> {
        let slots = self.slots.borrow();
        let ready = slots.values().filter_map(|slot| match slot {
            Slot::Ready(timeline) => Some(timeline.clone()),
            Slot::Importing(_) | Slot::Failed(_) | Slot::Damaged(_) => None,
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
        self.ready(tenant, timeline)
    }
}

impl<I: Io, C: Connector> CoreControl for Rc<Shard<I, C>> {
    fn timelines(&self) -> Vec<TimelineInfo> {
        let slots = self.slots.borrow();
        let info = |(&(tenant, timeline), slot): (&(TenantShardId, TimelineId), &Slot<I>)| {
            let (state, error, import) = match slot {
                Slot::Ready(ready) => return ready.info(self.context.core),
                Slot::Importing(progress) => {
                    (TimelineState::Importing, None, Some(progress.read()))
                }
                Slot::Failed(reason) | Slot::Damaged(reason) => {
                    (TimelineState::Broken, Some(reason.clone()), None)
                }
            };
            TimelineInfo {
                tenant,
                timeline,
                core: self.context.core,
                state,
                error,
                import,
                start_lsn: Lsn::INVALID,
                received_lsn: Lsn::INVALID,
                last_record_lsn: Lsn::INVALID,
                journal_lsn: Lsn::INVALID,
                disk_consistent_lsn: Lsn::INVALID,
                wal_source: None,
                wal_source_connected: false,
                wal_source_error: None,
                layer_count: 0,
                layer_bytes: 0,
                open_layer_bytes: 0,
                journal_bytes: 0,
            }
        };
        slots.iter().map(info).collect()
    }

    fn metrics(&self) -> CoreMetrics {
        let counters = &self.counters;
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
            ..CoreMetrics::default()
        };
        self.context.redo.metrics(&mut metrics);
        metrics
    }

    async fn create_timeline(&self, request: CreateTimeline) -> Result<(), ControlError> {
        if self.stopping.get() {
            let message = "the node is shutting down".to_owned();
            return Err(ControlError { kind: Kind::Shutdown, message });
        }
        self.refuse_existing(request.tenant, request.timeline).await?;
        let progress = Arc::new(Progress::default());
        {
            let mut slots = self.slots.borrow_mut();
            let key = (request.tenant, request.timeline);
            let name = format!("timeline {} of tenant {}", key.1, key.0);
            let refuse = |message| Err(ControlError { kind: Kind::Invalid, message });
            match slots.get(&key) {
                None | Some(Slot::Failed(_)) => {}
                Some(Slot::Importing(_) | Slot::Ready(_)) => {
                    return refuse(format!("{name} exists already"));
                }
                Some(Slot::Damaged(reason)) => {
                    return refuse(format!("{name} exists but cannot be opened: {reason}"));
                }
            }
            slots.insert(key, Slot::Importing(progress.clone()));
        }
        self.context.io.spawn(TaskClass::Background, self.clone().create(request, progress));
        Ok(())
    }

    async fn checkpoint(
        &self,
        tenant: TenantShardId,
        timeline: TimelineId,
    ) -> Result<(), ControlError> {
        let control = |kind: Kind, message: String| ControlError { kind, message };
        let found = self.ready(tenant, timeline).map_err(|e| control(e.kind(), e.to_string()))?;
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
        let found = self.ready(tenant, timeline).map_err(|e| control(e.kind(), e.to_string()))?;
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
                gc_cutoff_lsn: found.gc_cutoff(),
                leases: found.leases(),
            }),
            HistoryRequest::Gc(request) => {
                let report = self.collect_timeline(&found, request).await;
                report.map(HistoryReply::Gc).map_err(|e| control(e.kind(), e.to_string()))
            }
        }
    }

    async fn shutdown(&self) {
        self.stopping.set(true);
        for slot in self.slots.borrow().values() {
            if let Slot::Importing(progress) = slot {
                progress.cancel();
            }
        }
        let timelines = self.all_ready();
        timelines.iter().for_each(|timeline| timeline.stop_following());
        let mut waited_ms = 0;
        while waited_ms < STOP_WAIT_MS && timelines.iter().any(|one| !one.has_stopped_following()) {
            self.context.io.sleep(Duration::from_millis(STOP_POLL_MS)).await;
            waited_ms += STOP_POLL_MS;
        }
        for timeline in timelines {
            timeline.shut_down().await;
        }
        self.wait_for_imports().await;
        self.context.redo.stop_all().await;
        // Not left to the last owner: a task that is stuck must not keep the runner alive.
        self.context.background.close();
    }
}
