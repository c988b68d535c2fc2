//! One timeline: its layers, its milestones, its journal.
//!
//! Everything that changes lives in [`Mutable`] behind one `RefCell`, is changed by synchronous
//! methods only, and is never borrowed across an `.await`.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use super::background::Background;
use super::branch::Ancestor;
use super::compact::Compaction;
use super::control::{DetachState, ImportProgress, TimelineInfo, TimelineState};
use super::gate::Gate;
use super::health::Health;
use super::held::Room;
use super::history::History;
use super::idle::Usage;
use super::index::{ClusterIdentity, IndexLayer, TimelineIndex, WalSourceConfig};
use super::journal_mark::JournalMark;
use super::layer_map::LayerMap;
use super::lsns::{Advance, LsnWaiters, Lsns};
use super::memory::{MemoryBudget, Share};
use super::metrics::Counters;
use super::pages::{PageCache, TimelineNumber};
use super::reader::PageQuota;
use super::readers::Readers;
use super::sizes::{FoundSizes, Sizes};
use super::stored::StoredLayer;
use super::turn::Turn;
use super::warm::RecentPages;
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::config::Config;
use crate::io::{Instant, Io};
use crate::layers::{BlockCache, FrozenLayer, OpenLayer};
use crate::redo::{Redo, RedoMaker};
use crate::wal::change::Change;
use crate::wal::checkpoint::Checkpoint;
use crate::wal::journal::Journal;
use crate::wal::page::WalLayout;
use crate::wal::stream::{StreamError, WalStream};

/// Sizes and times of a timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimelineConfig {
    /// The open layer is frozen when it takes this much memory, in bytes.
    pub checkpoint_distance_bytes: u64,
    /// The open layer is frozen at this age, in seconds.
    pub checkpoint_timeout_s: u64,
    /// A read waits this long for its LSN, in milliseconds.
    pub wait_lsn_timeout_ms: u64,
    /// An import cuts image layers at this size, in bytes.
    pub image_layer_bytes: u64,
    /// L0 layers are merged when there are so many.
    pub compaction_threshold: usize,
    /// Compaction cuts layers at this size, in bytes.
    pub compaction_target_bytes: u64,
    /// Images are made of a key range when the deltas on it have grown to so many percent of its
    /// images.
    pub compaction_image_percent: u64,
    /// So many bytes of WAL before the newest record stay readable.
    pub gc_horizon_bytes: u64,
    /// What was committed within this time stays readable, in seconds; 0: `gc_horizon_bytes`
    /// decides alone.
    pub pitr_interval_s: u64,
    /// Pause between two garbage collections, in seconds; 0: there are none by themselves.
    pub gc_period_s: u64,
    /// A timeline that takes in no WAL and is not used is closed after so many milliseconds; 0:
    /// it stays open. Of the node alone.
    pub timeline_idle_ms: u64,
    /// What page requests of the tenant may take of a core.
    pub page_quota: PageQuota,
}

impl From<&Config> for TimelineConfig {
    fn from(config: &Config) -> Self {
        TimelineConfig {
            checkpoint_distance_bytes: config.checkpoint_distance_bytes,
            checkpoint_timeout_s: config.checkpoint_timeout_s,
            wait_lsn_timeout_ms: config.wait_lsn_timeout_ms,
            image_layer_bytes: config.image_layer_bytes,
            compaction_threshold: config.compaction_threshold as usize,
            compaction_target_bytes: config.compaction_target_bytes,
            compaction_image_percent: config.compaction_image_percent,
            gc_horizon_bytes: config.gc_horizon_bytes,
            pitr_interval_s: config.pitr_interval_s,
            gc_period_s: config.gc_period_s,
            timeline_idle_ms: config.timeline_idle_s.saturating_mul(1000),
            page_quota: PageQuota {
                requests_per_s: config.page_requests_per_s,
                bytes_in_flight: config.page_bytes_in_flight,
            },
        }
    }
}

/// What a timeline needs from its surroundings.
pub struct TimelineContext<I: Io> {
    /// The serve executor.
    pub io: I,
    /// The core's background executor.
    pub background: Background<I>,
    /// Applies WAL records; serves the timeline's tenant.
    pub redo: Rc<dyn Redo>,
    /// Makes a redo service of the same tenant for a job on the background executor.
    pub background_redo: Rc<dyn Fn() -> RedoMaker>,
    /// Verified blocks of the core's layer files.
    pub cache: Rc<BlockCache>,
    /// Open layer files of the core.
    pub readers: Rc<Readers<I>>,
    /// Pages of the core that were asked for last.
    pub recent: Rc<RecentPages>,
    /// Recently rebuilt pages of the core.
    pub pages: Rc<PageCache>,
    /// Memory of all open and frozen layers of the core.
    pub memory: Rc<MemoryBudget>,
    /// Counters of the core.
    pub counters: Rc<Counters>,
    /// Sizes and times of the tenant; they may change at any time.
    pub config: Rc<Cell<TimelineConfig>>,
    /// The timeline's directory.
    pub dir: PathBuf,
}

/// See the module's text.
pub struct Timeline<I: Io> {
    pub(super) context: TimelineContext<I>,
    /// The tenant shard.
    pub tenant: TenantShardId,
    /// The timeline.
    pub id: TimelineId,
    /// Its number in the cache of pages.
    pub(super) number: TimelineNumber,
    pub(super) cluster: ClusterIdentity,
    pub(super) source: Option<WalSourceConfig>,
    pub(super) journal: Journal<I>,
    pub(super) mutable: RefCell<Mutable<I>>,
    pub(super) waiters: LsnWaiters,
    pub(super) history: History<I>,
    /// Tells the checkpoint task that a layer is frozen or the journal moved.
    pub(super) checkpoint_signal: Signal,
    /// Tells the journal task that bytes wait.
    pub(super) journal_signal: Signal,
    /// How far the journal is known to have been synced.
    pub(super) mark: JournalMark,
    /// Tells the WAL receiver that there is something to report.
    pub(super) status_signal: Signal,
    pub(super) flush_turn: Turn,
    /// Whoever writes the index holds it.
    pub(super) checkpoint_turn: Turn,
    /// Whoever replaces the index holds this until the layer map says the same.
    pub(super) index_turn: Turn,
    pub(super) compaction: Compaction<I>,
    /// Reads under way, those of branches too. Closed when the timeline goes away.
    pub(super) gate: Gate,
    /// All that writes of itself has ended; nothing writes any more.
    pub(super) abandoned: Cell<bool>,
    /// The timeline is being deleted.
    pub(super) deleting: Cell<bool>,
    /// Takes in no WAL and answers only its branches.
    pub(super) archived: Cell<bool>,
    /// A record is being ingested: the open layer must not be frozen.
    pub(super) ingesting: Cell<bool>,
    /// The journal is being replayed: somebody waits for the timeline to be opened.
    pub(super) replaying: Cell<bool>,
    /// Room for the changes of one record.
    pub(super) changes: Cell<Vec<Change>>,
    /// Room for what a read finds that does not wait.
    pub(super) held: Cell<Room>,
    pub(super) found_sizes: FoundSizes,
    pub(super) stopping: Cell<bool>,
    pub(super) usage: Usage,
    /// Tells the WAL receiver to stop.
    pub(super) stop_signal: Signal,
    /// The WAL receiver has ended.
    pub(super) follow_ended: Cell<bool>,
    pub(super) source_connected: Cell<bool>,
    pub(super) health: RefCell<Health>,
    pub(super) memory: Share,
    /// Sum of the sizes of all relations when they were added up, and [`Sizes::growth`] then.
    pub(super) logical_base: Cell<LogicalBase>,
}

/// What is known of the logical size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogicalBase {
    /// Nobody has asked yet.
    Unknown,
    /// The sizes are being added up.
    Adding,
    /// The sum, less the growth until then, in blocks.
    Known(i64),
}

/// The parts of a timeline that change.
pub struct Mutable<I: Io> {
    pub(super) lsns: Lsns,
    /// First readable LSN.
    pub(super) start_lsn: Lsn,
    /// Where the history before the own layers is.
    pub(super) ancestor: Option<Ancestor<I>>,
    /// Branch points of the timelines whose ancestor this one is.
    pub(super) branches: BTreeMap<TimelineId, Lsn>,
    /// A detaching that is under way, or how the last one failed.
    pub(super) detach: Option<DetachState>,
    pub(super) open: OpenLayer,
    pub(super) open_since: Instant,
    /// Oldest first.
    pub(super) frozen: Vec<Arc<FrozenLayer>>,
    pub(super) layers: LayerMap<Rc<StoredLayer<I>>>,
    pub(super) sizes: Sizes,
    /// The tracked `CheckPoint` struct; loaded before the first record.
    pub(super) checkpoint: Option<Checkpoint>,
    /// Cuts the incoming bytes into records.
    pub(super) wal: WalStream,
    pub(super) broken: Option<String>,
    /// Why no WAL comes from the source; `None` once it has come again.
    pub(super) source_error: Option<String>,
    /// For each piece of WAL that is not synced yet: its end, and the end of the last record that
    /// was whole with it.
    pub(super) unsynced: VecDeque<(Lsn, Lsn)>,
    /// End of the last record of which every byte is synced: what the source is told. It may
    /// drop WAL before it, so it must never lie within a record that a restart has to read.
    pub(super) flushed_record: Lsn,
}

impl<I: Io> Mutable<I> {
    /// The journal is synced up to `lsn`.
    pub(super) fn journal_synced(&mut self, lsn: Lsn) {
        self.lsns.advance(Advance::Journal(lsn));
        while let Some((end, boundary)) = self.unsynced.front().copied() {
            if end > lsn {
                break;
            }
            self.unsynced.pop_front();
            self.flushed_record = self.flushed_record.max(boundary);
        }
    }
}

/// A one-place signal: setting it twice before it is seen counts once. One task waits.
pub(super) struct Signal {
    sender: async_channel::Sender<()>,
    receiver: async_channel::Receiver<()>,
}

impl Signal {
    pub(super) fn new() -> Self {
        let (sender, receiver) = async_channel::bounded(1);
        Signal { sender, receiver }
    }

    pub(super) fn set(&self) {
        // Full means that the signal is set already.
        let _ = self.sender.try_send(());
    }

    /// Forgets a signal that nobody has seen.
    pub(super) fn clear(&self) {
        let _ = self.receiver.try_recv();
    }

    pub(super) async fn wait(&self) {
        // The sender lives as long as the receiver, so this cannot fail.
        let _ = self.receiver.recv().await;
    }
}

/// What opening a timeline found.
pub struct Opened<I: Io> {
    /// The index.
    pub index: TimelineIndex,
    /// Its layers.
    pub layers: LayerMap<Rc<StoredLayer<I>>>,
    /// The journal, open at its end.
    pub journal: Journal<I>,
    /// The ancestor that the index names.
    pub ancestor: Option<Rc<Timeline<I>>>,
}

impl<I: Io> Timeline<I> {
    /// A timeline from its parts, at the index's `disk_consistent_lsn`. What the journal has after
    /// that is ingested by `load`.
    pub fn new(context: TimelineContext<I>, opened: Opened<I>) -> Result<Rc<Self>, StreamError> {
        let Opened { index, layers, journal, ancestor } = opened;
        let lsn = index.disk_consistent_lsn;
        let ancestor = ancestor
            .zip(index.ancestor)
            .map(|(timeline, point)| Ancestor { timeline, lsn: point.lsn });
        let open_since = context.io.now();
        let checkpoint_signal = Signal::new();
        let segment_bytes = index.cluster.wal_segment_bytes;
        let wal = WalStream::new(lsn, wal_layout(&index.cluster))?;
        Ok(Rc::new(Timeline {
            tenant: index.tenant,
            id: index.timeline,
            number: context.pages.next_timeline(),
            cluster: index.cluster,
            source: index.source,
            journal,
            mutable: RefCell::new(Mutable {
                lsns: Lsns::at(lsn),
                start_lsn: index.start_lsn,
                ancestor,
                branches: BTreeMap::new(),
                detach: None,
                open: OpenLayer::new(Lsn(lsn.0 + 1), segment_bytes),
                open_since,
                frozen: Vec::new(),
                layers,
                sizes: Sizes::default(),
                checkpoint: None,
                wal,
                broken: None,
                source_error: None,
                unsynced: VecDeque::new(),
                flushed_record: lsn,
            }),
            waiters: LsnWaiters::default(),
            memory: context.memory.share(checkpoint_signal.sender.clone()),
            history: History::new(index.gc_cutoff_lsn.max(index.start_lsn)),
            checkpoint_signal,
            journal_signal: Signal::new(),
            mark: JournalMark::new(open_since),
            status_signal: Signal::new(),
            flush_turn: Turn::default(),
            checkpoint_turn: Turn::default(),
            index_turn: Turn::default(),
            compaction: Compaction::default(),
            gate: Gate::default(),
            abandoned: Cell::new(false),
            deleting: Cell::new(false),
            archived: Cell::new(index.archived),
            ingesting: Cell::new(false),
            replaying: Cell::new(false),
            changes: Cell::default(),
            held: Cell::default(),
            found_sizes: FoundSizes::default(),
            stopping: Cell::new(false),
            usage: Usage::new(open_since),
            stop_signal: Signal::new(),
            follow_ended: Cell::new(true),
            source_connected: Cell::new(false),
            health: RefCell::default(),
            logical_base: Cell::new(LogicalBase::Unknown),
            context,
        }))
    }

    /// Tells the core's memory budget what this timeline takes.
    pub(super) fn note_memory(&self) {
        let mutable = self.mutable.borrow();
        if mutable.broken.is_some() {
            return;
        }
        let frozen = mutable.frozen.iter().map(|layer| layer.memory_bytes() as u64).sum();
        self.memory.set(mutable.open.memory_bytes() as u64, frozen);
        drop(mutable);
        for layer in self.context.memory.evict() {
            self.drop_elsewhere(layer);
        }
    }

    /// The milestones.
    pub fn lsns(&self) -> Lsns {
        self.mutable.borrow().lsns
    }

    /// Why the timeline takes in no more WAL, if so.
    pub fn broken(&self) -> Option<String> {
        self.mutable.borrow().broken.clone()
    }

    /// Stops ingest for good; reads of what is there go on. Only a restart, after an operator has
    /// looked, tries again.
    pub(super) fn set_broken(&self, kind: Kind, reason: String) {
        tracing::error!(tenant = %self.tenant, timeline = %self.id, ?kind, "ingest stops: {reason}");
        self.mutable.borrow_mut().broken.get_or_insert(reason);
        // What it holds will never be written, and must not make others wait.
        self.memory.set(0, 0);
        self.waiters.fail_all();
    }

    /// The index that describes the timeline with `added` layers and this `disk_consistent_lsn`.
    /// The caller has the `index_turn`.
    pub(super) fn index_with(
        &self,
        added: &[IndexLayer],
        disk_consistent_lsn: Lsn,
    ) -> TimelineIndex {
        self.index_replacing(added, &BTreeSet::new(), disk_consistent_lsn)
    }

    /// The same, without the layers that are named in `removed`. The caller has the `index_turn`.
    pub(super) fn index_replacing(
        &self,
        added: &[IndexLayer],
        removed: &BTreeSet<String>,
        disk_consistent_lsn: Lsn,
    ) -> TimelineIndex {
        let mutable = self.mutable.borrow();
        let present = mutable.layers.iter().map(|(_, layer)| layer.index_entry());
        let present = present.filter(|layer| !removed.contains(&layer.name));
        TimelineIndex {
            version: super::index::INDEX_VERSION,
            tenant: self.tenant,
            timeline: self.id,
            cluster: self.cluster,
            source: self.source.clone(),
            ancestor: mutable.ancestor.as_ref().map(Ancestor::point),
            archived: self.archived.get(),
            start_lsn: mutable.start_lsn,
            disk_consistent_lsn,
            gc_cutoff_lsn: self.history.cutoff.get(),
            layers: present.chain(added.iter().cloned()).collect(),
        }
    }

    /// The timeline as the admin API shows it.
    pub fn info(&self, core: usize) -> TimelineInfo {
        let (start_lsn, ingest_limit_bytes_per_s) = (self.start_lsn(), self.ingest_limit());
        let mutable = self.mutable.borrow();
        let health = self.health.borrow();
        let lsns = mutable.lsns;
        let state = match mutable.broken {
            _ if self.archived.get() => TimelineState::Archived,
            Some(_) => TimelineState::Broken,
            None if lsns.last_record < start_lsn => TimelineState::CatchingUp,
            None => TimelineState::Active,
        };
        let frozen: u64 = mutable.frozen.iter().map(|layer| layer.memory_bytes() as u64).sum();
        TimelineInfo {
            tenant: self.tenant,
            timeline: self.id,
            core,
            state,
            error: mutable.broken.clone(),
            import: None::<ImportProgress>,
            start_lsn,
            gc_cutoff_lsn: self.history.cutoff.get(),
            ancestor: mutable.ancestor.as_ref().map(Ancestor::point),
            detach: mutable.detach.clone(),
            received_lsn: lsns.received,
            last_record_lsn: lsns.last_record,
            journal_lsn: lsns.journal,
            disk_consistent_lsn: lsns.disk_consistent,
            wal_source: self.source.as_ref().map(|source| redacted(&source.conninfo)),
            wal_source_connected: self.source_connected.get(),
            wal_source_error: mutable.source_error.clone(),
            ingest_paused: health.paused().map(str::to_owned),
            damaged: health.damaged().cloned().collect(),
            ingest_limit_bytes_per_s,
            layer_count: mutable.layers.len() as u64,
            l0_count: mutable.layers.l0_count() as u64,
            frozen_count: mutable.frozen.len() as u64,
            layer_bytes: mutable.layers.totals().layer_bytes(),
            history_bytes: mutable.layers.totals().history_bytes(),
            logical_bytes: self.logical_bytes(&mutable),
            open_layer_bytes: mutable.open.memory_bytes() as u64 + frozen,
            journal_bytes: lsns.received.bytes_since(lsns.disk_consistent),
        }
    }
}

/// What is known of the cluster's WAL before it is read.
pub(super) fn wal_layout(cluster: &ClusterIdentity) -> WalLayout {
    WalLayout { segment_bytes: cluster.wal_segment_bytes, system_id: Some(cluster.system_id) }
}

/// A connection string without its password.
pub(super) fn redacted(conninfo: &str) -> String {
    match conninfo.parse::<crate::wal::source::conninfo::ConnInfo>() {
        Ok(parsed) => parsed.to_string(),
        Err(_) => "(unreadable connection string)".to_owned(),
    }
}
