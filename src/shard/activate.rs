//! What a shard knows of each timeline, and how one is opened.
//!
//! At start the shard reads the index of every timeline and keeps a few numbers of it. A timeline
//! with a WAL source is opened at once, because it must follow; any other is opened when somebody
//! asks for it first. A branch is opened after its ancestor, and holds it open. What nobody uses
//! is closed again ([`super::idle`]).
//!
//! Opening runs as a task of its own, so that an asker who goes away does not leave it half done;
//! askers wait for its end. One that fails for a reason that may pass (a full disk, say) is tried
//! again by the next asker; other failures stand until the node is started again.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use super::control::{DetachState, TimelineInfo, TimelineState};
use super::follow::Connector;
use super::import::Progress;
use super::index::{BranchPoint, DELETED_FILE, INDEX_FILE, TimelineIndex};
use super::layer_map::{LayerSpan, Totals};
use super::load::{LoadError, load, read_index};
use super::reader::ReadError;
use super::tenant_config::{CONFIG_FILE, TenantConfig};
use super::tenants::{Shard, TenantSlot};
use super::timeline::{Timeline, TimelineContext, redacted};
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::io::durable::{self, DurableError};
use crate::io::{DirEntry, Io, IoCause, IoError, TaskClass};
use crate::layers::{LayerName, LayerOwner};

/// Tenant and timeline.
pub(super) type TimelineKey = (TenantShardId, TimelineId);

/// What is kept of a timeline that is not open.
#[derive(Clone, Debug)]
pub(super) struct Brief {
    pub(super) ancestor: Option<BranchPoint>,
    pub(super) archived: bool,
    /// Connection string without its password.
    pub(super) source: Option<Box<str>>,
    pub(super) start_lsn: Lsn,
    pub(super) gc_cutoff_lsn: Lsn,
    pub(super) disk_consistent_lsn: Lsn,
    pub(super) layer_count: u64,
    pub(super) layer_bytes: u64,
    pub(super) history_bytes: u64,
    /// Known if it was when the timeline was closed.
    pub(super) logical_bytes: Option<u64>,
}

impl Brief {
    /// The few numbers of an index.
    pub(super) fn of(index: &TimelineIndex) -> Box<Brief> {
        let mut totals = Totals::default();
        for (layer, id) in index.layers.iter().zip(0..) {
            if let Ok(name) = layer.name.parse::<LayerName>() {
                totals.add(&LayerSpan::from(&name), id, layer.len);
            }
        }
        Box::new(Brief {
            ancestor: index.ancestor,
            archived: index.archived,
            source: index.source.as_ref().map(|source| redacted(&source.conninfo).into()),
            start_lsn: index.start_lsn,
            gc_cutoff_lsn: index.gc_cutoff_lsn.max(index.start_lsn),
            disk_consistent_lsn: index.disk_consistent_lsn,
            layer_count: index.layers.len() as u64,
            layer_bytes: totals.layer_bytes(),
            history_bytes: totals.history_bytes(),
            logical_bytes: None,
        })
    }

    /// It takes in WAL, so it must be open.
    fn follows(&self) -> bool {
        self.source.is_some() && !self.archived
    }
}

/// Whose branch a timeline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ancestry {
    /// Nobody's.
    Root,
    /// This one's.
    Branch(BranchPoint),
    /// Its index cannot be read.
    Unknown,
}

impl From<Option<BranchPoint>> for Ancestry {
    fn from(point: Option<BranchPoint>) -> Self {
        point.map_or(Ancestry::Root, Ancestry::Branch)
    }
}

/// A timeline that is being opened, or closed.
#[derive(Clone)]
pub(super) struct Loading {
    pub(super) brief: Box<Brief>,
    /// Closed when it is over.
    done: async_channel::Receiver<()>,
    /// Why it failed.
    failure: Rc<RefCell<Option<ReadError>>>,
}

impl Loading {
    /// The work begins; it is over when the sender is dropped.
    pub(super) fn new(brief: Box<Brief>) -> (Loading, async_channel::Sender<()>) {
        let (sender, done) = async_channel::bounded(1);
        (Loading { brief, done, failure: Rc::default() }, sender)
    }
}

/// What the shard knows of a timeline.
pub(super) enum Slot<I: Io> {
    Importing(Arc<Progress>),
    /// An import that failed: nothing of it is left, and it may be tried again.
    Failed(String),
    /// A timeline that is on disk but cannot be opened: only an operator may remove it.
    Damaged(String, Ancestry),
    /// On disk, not open.
    Idle(Box<Brief>),
    /// On its way from one of its neighbours to the other.
    Loading(Loading),
    /// A branch whose index is being written.
    Branching(Box<Brief>),
    Deleting(Ancestry),
    Ready(Rc<Timeline<I>>),
}

impl<I: Io> Slot<I> {
    pub(super) fn ancestry(&self) -> Ancestry {
        match self {
            Slot::Importing(_) | Slot::Failed(_) => Ancestry::Root,
            Slot::Damaged(_, ancestry) | Slot::Deleting(ancestry) => *ancestry,
            Slot::Idle(brief) | Slot::Branching(brief) => brief.ancestor.into(),
            Slot::Loading(loading) => loading.brief.ancestor.into(),
            Slot::Ready(timeline) => timeline.ancestor().map(|older| older.point()).into(),
        }
    }

    /// The timeline as the admin API shows it, when it is not open; but see [`readable_from`].
    pub(super) fn info(&self, (tenant, timeline): TimelineKey, core: usize) -> TimelineInfo {
        let (state, error, brief) = match self {
            Slot::Importing(_) => (TimelineState::Importing, None, None),
            Slot::Failed(reason) | Slot::Damaged(reason, _) => {
                (TimelineState::Broken, Some(reason.clone()), None)
            }
            Slot::Idle(brief) | Slot::Loading(Loading { brief, .. }) => match brief.archived {
                true => (TimelineState::Archived, None, Some(brief)),
                false => (TimelineState::Idle, None, Some(brief)),
            },
            Slot::Branching(_) => (TimelineState::Importing, None, None),
            Slot::Deleting(_) => (TimelineState::Deleting, None, None),
            Slot::Ready(ready) => return ready.info(core),
        };
        let import = match self {
            Slot::Importing(progress) => Some(progress.read()),
            _ => None,
        };
        let ancestor = match self.ancestry() {
            Ancestry::Branch(point) => Some(point),
            Ancestry::Root | Ancestry::Unknown => None,
        };
        let number = |read: fn(&Brief) -> u64| brief.map_or(0, |brief| read(brief));
        let at = brief.map_or(Lsn::INVALID, |brief| brief.disk_consistent_lsn);
        TimelineInfo {
            tenant,
            timeline,
            core,
            state,
            error,
            import,
            start_lsn: brief.map_or(Lsn::INVALID, |brief| brief.start_lsn),
            gc_cutoff_lsn: brief.map_or(Lsn::INVALID, |brief| brief.gc_cutoff_lsn),
            ancestor,
            detach: None::<DetachState>,
            received_lsn: at,
            last_record_lsn: at,
            journal_lsn: at,
            disk_consistent_lsn: at,
            wal_source: brief.and_then(|brief| brief.source.as_deref().map(str::to_owned)),
            wal_source_connected: false,
            wal_source_error: None,
            ingest_paused: None,
            damaged: Vec::new(),
            ingest_limit_bytes_per_s: None,
            layer_count: number(|brief| brief.layer_count),
            l0_count: 0,
            frozen_count: 0,
            layer_bytes: number(|brief| brief.layer_bytes),
            history_bytes: number(|brief| brief.history_bytes),
            logical_bytes: brief.and_then(|brief| brief.logical_bytes),
            open_layer_bytes: 0,
            journal_bytes: 0,
        }
    }
}

/// From where on a timeline can be read. What a branch has of its ancestor's history is as long as
/// that of the ancestor; and a collection of the ancestor leaves of it the branch point at least.
/// Indexes that nobody has opened yet may name each other as ancestors, so the line is no longer
/// than there are timelines.
pub(super) fn readable_from<I: Io>(
    slots: &BTreeMap<TimelineKey, Slot<I>>,
    key: TimelineKey,
) -> Lsn {
    let mut line = Vec::new();
    let (mut at, mut readable) = (key, Lsn::INVALID);
    while let Some(own) = slots.get(&at).and_then(retained_from)
        && line.len() < slots.len()
    {
        let Some(Ancestry::Branch(point)) = slots.get(&at).map(Slot::ancestry) else {
            readable = own;
            break;
        };
        line.push((own, point.lsn));
        at.1 = point.timeline;
    }
    for (own, point) in line.into_iter().rev() {
        readable = own.max(point.min(readable));
    }
    readable
}

/// From where on a timeline keeps its own history, if there is one.
fn retained_from<I: Io>(slot: &Slot<I>) -> Option<Lsn> {
    match slot {
        Slot::Ready(timeline) => Some(timeline.gc_cutoff().max(timeline.start_lsn())),
        Slot::Idle(brief) | Slot::Branching(brief) => Some(brief.gc_cutoff_lsn),
        Slot::Loading(loading) => Some(loading.brief.gc_cutoff_lsn),
        Slot::Importing(_) | Slot::Failed(_) | Slot::Damaged(..) | Slot::Deleting(_) => None,
    }
}

impl<I: Io, C: Connector> Shard<I, C> {
    /// Reads what there is of a tenant, and opens what must be open.
    pub(super) async fn open_tenant(self: &Rc<Self>, tenant: TenantShardId) -> Result<(), IoError> {
        let io = &self.context.io;
        let dir = self.tenant_dir(tenant);
        if has(&io.list(&dir).await?, DELETED_FILE) {
            tracing::info!(%tenant, "removing the rest of a deleted tenant");
            return self.remove_deleted(&dir).await;
        }
        let stored = self.read_config(&dir).await;
        let slot = self.new_tenant(stored.as_ref().copied().unwrap_or_default());
        let problem = stored.err().map(|problem| {
            format!(
                "the settings of tenant {tenant} cannot be read: {problem}; set them anew and \
                 start the node again"
            )
        });
        if let Some(problem) = &problem {
            tracing::error!("{problem}");
        }
        self.tenants.borrow_mut().insert(tenant, TenantSlot { error: problem.clone(), ..slot });
        let timelines = self.timelines_dir(tenant);
        io.create_dir(&timelines).await?;
        for entry in io.list(&timelines).await? {
            let Ok(id) = entry.name.parse::<TimelineId>() else { continue };
            self.find_timeline((tenant, id), &timelines.join(&entry.name), problem.as_deref())
                .await?;
        }
        let follows = |slot: &Slot<I>| matches!(slot, Slot::Idle(brief) if brief.follows());
        let must_open: Vec<TimelineId> = self
            .of_tenant(tenant, |id, slot| follows(slot).then_some(id))
            .into_iter()
            .flatten()
            .collect();
        for id in must_open {
            if let Err(error) = self.activate((tenant, id)).await {
                tracing::error!(%tenant, timeline = %id, "{error}");
            }
        }
        Ok(())
    }

    async fn read_config(&self, dir: &Path) -> Result<TenantConfig, String> {
        match durable::read_file(&self.context.io, &dir.join(CONFIG_FILE)).await {
            Ok(bytes) => TenantConfig::decode(&bytes).map_err(|error| error.to_string()),
            // A tenant that nobody has configured.
            Err(DurableError::Io(error)) if error.cause == IoCause::NotFound => {
                Ok(TenantConfig::default())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Looks at one directory of a timeline.
    async fn find_timeline(
        &self,
        key: TimelineKey,
        dir: &Path,
        problem: Option<&str>,
    ) -> Result<(), IoError> {
        let entries = self.context.io.list(dir).await?;
        let deleted = has(&entries, DELETED_FILE);
        if deleted || !has(&entries, INDEX_FILE) {
            let what = if deleted { "a deleted timeline" } else { "an import that did not end" };
            tracing::warn!(tenant = %key.0, timeline = %key.1, "removing {what}");
            return self.context.io.remove_dir_all(dir).await;
        }
        let owner = LayerOwner { shard: key.0, timeline: key.1 };
        let slot = match read_index(&self.context.io, dir, owner).await {
            Ok(index) => match problem {
                None => Slot::Idle(Brief::of(&index)),
                Some(problem) => Slot::Damaged(problem.to_owned(), index.ancestor.into()),
            },
            Err(error) => {
                tracing::error!(tenant = %key.0, timeline = %key.1, "cannot be opened: {error}");
                Slot::Damaged(error.to_string(), Ancestry::Unknown)
            }
        };
        self.slots.borrow_mut().insert(key, slot);
        Ok(())
    }

    /// The timeline, opened if need be.
    pub(super) async fn activate(
        self: &Rc<Self>,
        key: TimelineKey,
    ) -> Result<Rc<Timeline<I>>, ReadError> {
        loop {
            let loading = match self.look(key)? {
                Look::Ready(timeline) => return Ok(timeline),
                Look::Wait(loading) => loading,
            };
            // The channel has no message: it is closed when the work is over.
            let _ = loading.done.recv().await;
            if let Some(error) = loading.failure.borrow().clone() {
                return Err(error);
            }
        }
    }

    fn look(self: &Rc<Self>, key: TimelineKey) -> Result<Look<I>, ReadError> {
        let (tenant, id) = key;
        let mut slots = self.slots.borrow_mut();
        let brief = match slots.get(&key) {
            Some(Slot::Ready(timeline)) => {
                timeline.touch();
                return Ok(Look::Ready(timeline.clone()));
            }
            Some(Slot::Loading(loading)) => return Ok(Look::Wait(loading.clone())),
            Some(Slot::Idle(brief)) => brief.clone(),
            Some(Slot::Importing(_) | Slot::Branching(_)) => {
                let reason = "it is being made".to_owned();
                return Err(ReadError::NotReady { timeline: id, reason });
            }
            Some(Slot::Failed(reason)) => {
                return Err(ReadError::NotMade { timeline: id, reason: reason.clone() });
            }
            Some(Slot::Damaged(reason, _)) => {
                return Err(ReadError::Unreadable { timeline: id, reason: reason.clone() });
            }
            Some(Slot::Deleting(_)) => return Err(ReadError::TimelineNotFound(tenant, id)),
            None if self.tenants.borrow().contains_key(&tenant) => {
                return Err(ReadError::TimelineNotFound(tenant, id));
            }
            None => return Err(ReadError::TenantNotFound(tenant)),
        };
        if self.stopping.get() {
            return Err(ReadError::Shutdown);
        }
        let (loading, sender) = Loading::new(brief);
        slots.insert(key, Slot::Loading(loading.clone()));
        let work = self.clone().load_slot(key, loading.clone(), sender);
        // Boxed, because opening an ancestor comes through here again.
        let work: Pin<Box<dyn Future<Output = ()>>> = Box::pin(work);
        self.context.io.spawn(TaskClass::Ingest, work);
        Ok(Look::Wait(loading))
    }

    async fn load_slot(
        self: Rc<Self>,
        key: TimelineKey,
        loading: Loading,
        done: async_channel::Sender<()>,
    ) {
        let brief = loading.brief;
        let slot = match self.load_with_ancestor(key, brief.ancestor).await {
            Ok(timeline) => {
                for (branch, point) in self.branches_of(key) {
                    timeline.set_branch(branch, Some(point));
                }
                timeline.recall_logical_size(brief.logical_bytes);
                self.start_following(&timeline);
                Slot::Ready(timeline)
            }
            Err(error) => {
                let (reason, kind) = (error.to_string(), error.kind());
                tracing::error!(tenant = %key.0, timeline = %key.1, "cannot be opened: {reason}");
                let unreadable = ReadError::Unreadable { timeline: key.1, reason: reason.clone() };
                *loading.failure.borrow_mut() = Some(match kind {
                    Kind::Shutdown => ReadError::Shutdown,
                    _ => unreadable,
                });
                match kind {
                    Kind::Retry | Kind::Shutdown => Slot::Idle(brief),
                    Kind::Invalid | Kind::Corrupt => Slot::Damaged(reason, brief.ancestor.into()),
                }
            }
        };
        self.slots.borrow_mut().insert(key, slot);
        drop(done);
    }

    async fn load_with_ancestor(
        self: &Rc<Self>,
        key: TimelineKey,
        point: Option<BranchPoint>,
    ) -> Result<Rc<Timeline<I>>, LoadError> {
        let ancestor = match point {
            None => None,
            Some(point) => {
                let unreadable = |error: ReadError| LoadError::Ancestor {
                    reason: error.to_string(),
                    kind: error.kind(),
                };
                self.check_ancestry(key)?;
                Some(self.activate((key.0, point.timeline)).await.map_err(unreadable)?)
            }
        };
        self.open_timeline(key, ancestor).await
    }

    /// A line of ancestors that leads back to its start would be waited for without end.
    fn check_ancestry(&self, key: TimelineKey) -> Result<(), LoadError> {
        let slots = self.slots.borrow();
        let mut at = key;
        for _ in 0..=slots.len() {
            match slots.get(&at).map(Slot::ancestry) {
                Some(Ancestry::Branch(point)) => at.1 = point.timeline,
                _ => return Ok(()),
            }
        }
        let reason = format!("the line of ancestors of {} is a circle", key.1);
        Err(LoadError::Ancestor { reason, kind: Kind::Corrupt })
    }

    /// Opens a timeline from its directory.
    pub(super) async fn open_timeline(
        self: &Rc<Self>,
        (tenant, id): TimelineKey,
        ancestor: Option<Rc<Timeline<I>>>,
    ) -> Result<Rc<Timeline<I>>, LoadError> {
        let dir = self.timelines_dir(tenant).join(id.to_string());
        let owner = LayerOwner { shard: tenant, timeline: id };
        let context = &self.context;
        let make = |settings| TimelineContext {
            io: context.io.clone(),
            background: context.background.clone(),
            redo: self.redo_of(tenant, settings),
            background_redo: self.background_redo_of(tenant, settings),
            cache: self.cache.clone(),
            readers: self.readers.clone(),
            recent: self.recent.clone(),
            pages: self.pages.clone(),
            memory: self.memory.clone(),
            counters: self.counters.clone(),
            config: self.config_of(tenant),
            dir: dir.clone(),
        };
        let timeline = load(make, &context.io, &dir, owner, ancestor).await?;
        timeline.spawn_own(TaskClass::Background, |timeline| self.clone().gc_loop(timeline));
        Ok(timeline)
    }

    /// Starts to take in WAL, if the timeline has a source and may, and does not already.
    pub(super) fn start_following(&self, timeline: &Rc<Timeline<I>>) {
        timeline.stop_signal.clear();
        if !timeline.follow_ended.replace(false) {
            return;
        }
        let follow = timeline.clone().follow(self.context.connector.clone());
        self.context.io.spawn(TaskClass::Ingest, follow);
    }

    /// Branches of a timeline with their branch points; one that may be a branch of it, which is
    /// not known, with [`Lsn::INVALID`].
    pub(super) fn branches_of(&self, (tenant, id): TimelineKey) -> Vec<(TimelineId, Lsn)> {
        let branches = self.of_tenant(tenant, |other, slot| match slot.ancestry() {
            Ancestry::Branch(point) if point.timeline == id => Some((other, point.lsn)),
            Ancestry::Unknown if other != id => Some((other, Lsn::INVALID)),
            Ancestry::Root | Ancestry::Branch(_) | Ancestry::Unknown => None,
        });
        branches.into_iter().flatten().collect()
    }

    /// Asks about every timeline of a tenant.
    pub(super) fn of_tenant<T>(
        &self,
        tenant: TenantShardId,
        mut ask: impl FnMut(TimelineId, &Slot<I>) -> T,
    ) -> Vec<T> {
        let slots = self.slots.borrow();
        let all = (tenant, TimelineId([0; 16]))..=(tenant, TimelineId([u8::MAX; 16]));
        slots.range(all).map(|((_, id), slot)| ask(*id, slot)).collect()
    }
}

enum Look<I: Io> {
    Ready(Rc<Timeline<I>>),
    Wait(Loading),
}

fn has(entries: &[DirEntry], name: &str) -> bool {
    entries.iter().any(|entry| entry.name == name)
}
