//! The engine in the simulator: one shard that follows a simulated primary through power losses
//! and kills, and is read all the time.
//!
//! Checked, against [`Primary`]'s own idea of every page:
//! 1. every page read at any LSN is right, byte for byte;
//! 2. what was acknowledged to the primary as flushed is there after every restart;
//! 3. at the end, without faults, the timeline catches up with all of the WAL (liveness).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;

use super::faults::{self, FaultClass};
use super::primary::Primary;
use super::redo::ToyRedoFactory;
use super::{Outcome, SimIo, SimOptions, SimWorld};
use crate::base::{
    BlockNumber, Key, Kind, Lsn, RelTag, TenantId, TenantShardId, TimelineId, Timestamp, Value,
};
use crate::io::{Io, TaskClass, durable};
use crate::layers::{ImageWriter, LayerOwner};
use crate::limits::LAYER_READERS_MAX;
use crate::shard::background;
use crate::shard::control::CoreControl;
use crate::shard::follow::Connector;
use crate::shard::gc::GcRequest;
use crate::shard::index::{
    ClusterIdentity, INDEX_FILE, INDEX_VERSION, IndexLayer, TimelineIndex, WalSourceConfig,
};
use crate::shard::reader::{PageBackend, PageQuota, ReadError, RequestLsn, TimelineReader};
use crate::shard::tenants::{Shard, ShardContext};
use crate::shard::timeline::{Timeline, TimelineConfig};
use crate::wal::checkpoint::CHECKPOINT_BYTES;
use crate::wal::receiver::{StandbyStatus, WalMessage, WalSource};
use crate::wal::source::SourceError;

pub(super) const START: Lsn = Lsn(0x100_0000);
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
const SYSTEM_ID: u64 = 7;
pub(super) const TENANT: TenantShardId =
    TenantShardId { tenant: TenantId([1; 16]), number: 0, count: 0 };
pub(super) const TIMELINE: TimelineId = TimelineId([2; 16]);
/// Versions of pages that are compared at the end of a run.
const FINAL_READS: u64 = 200;

/// A bug that is planted in the machine below the engine; the run must fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plant {
    /// None: the run must succeed.
    Nothing,
    /// Syncs of files do nothing.
    FileSync,
    /// Syncs of directories do nothing.
    DirSync,
}

/// The primary and what it was told; it survives all crashes of the node.
pub(super) struct Outside {
    pub(super) primary: Rc<RefCell<Primary>>,
    pub(super) acknowledged: Cell<Lsn>,
    /// No layer is closed for its size.
    pub(super) large_layers: Cell<bool>,
    /// Garbage is collected now and then, in the midst of everything.
    pub(super) collects: Cell<bool>,
    /// Threshold and image percentage of compaction; `None`: by chance.
    pub(super) compaction: Cell<Option<(usize, u64)>>,
    /// About one in so many records is a commit, at the time of the simulated clock; 0: none is.
    pub(super) records_per_commit: Cell<u64>,
    /// About one in so many records copies a database; 0: none does.
    pub(super) records_per_copy: Cell<u64>,
    /// How far the primary's clock is ahead, in microseconds.
    pub(super) clock_ahead_us: Cell<i64>,
    /// The primary does nothing any more.
    pub(super) quiet: Cell<bool>,
    /// `gc_period_s` of the timeline.
    pub(super) gc_period_s: Cell<u64>,
    /// The primary shows no WAL from here on.
    pub(super) visible_end: Cell<Lsn>,
    /// `checkpoint_distance_bytes` and `compaction_target_bytes`; `None`: by chance.
    pub(super) layer_bytes: Cell<Option<(u64, u64)>>,
    /// What was acknowledged as flushed, by the connection string of the timeline's source.
    pub(super) flushed: RefCell<BTreeMap<String, Lsn>>,
    /// `timeline_idle_ms` of the node.
    pub(super) timeline_idle_ms: Cell<u64>,
    /// Bytes of the block cache; `None`: by chance.
    pub(super) cache_bytes: Cell<Option<usize>>,
    /// Everything that the background executor does takes so many times as long.
    pub(super) background_slowness: Cell<u32>,
    /// Whoever wants to connect waits.
    pub(super) connecting_hangs: Cell<bool>,
    /// One owner more than there are connections.
    pub(super) connections: Rc<()>,
}

impl Outside {
    pub(super) fn new(seed: u64) -> Rc<Outside> {
        let primary = Primary::new(seed, START, SEGMENT_BYTES, SYSTEM_ID);
        Outside::of(Rc::new(RefCell::new(primary)))
    }

    /// A primary that there is already; nothing was acknowledged to it.
    pub(super) fn of(primary: Rc<RefCell<Primary>>) -> Rc<Outside> {
        Rc::new(Outside {
            primary,
            acknowledged: Cell::new(START),
            large_layers: Cell::new(false),
            collects: Cell::new(false),
            compaction: Cell::new(None),
            records_per_commit: Cell::new(0),
            records_per_copy: Cell::new(0),
            clock_ahead_us: Cell::new(0),
            quiet: Cell::new(false),
            gc_period_s: Cell::new(0),
            visible_end: Cell::new(Lsn::MAX),
            layer_bytes: Cell::new(None),
            flushed: RefCell::default(),
            timeline_idle_ms: Cell::new(0),
            cache_bytes: Cell::new(None),
            background_slowness: Cell::new(1),
            connecting_hangs: Cell::new(false),
            connections: Rc::new(()),
        })
    }
}

#[derive(Clone)]
pub(super) struct SimConnector {
    io: SimIo,
    outside: Rc<Outside>,
}

pub(super) struct SimSource {
    io: SimIo,
    outside: Rc<Outside>,
    conninfo: String,
    at: Lsn,
    _counted: Rc<()>,
}

impl Connector for SimConnector {
    type Source = SimSource;

    async fn connect(
        &self,
        source: &WalSourceConfig,
        _: &ClusterIdentity,
    ) -> Result<SimSource, SourceError> {
        let (io, outside) = (self.io.clone(), self.outside.clone());
        while outside.connecting_hangs.get() {
            io.sleep(Duration::from_millis(1)).await;
        }
        let (conninfo, at, _counted) =
            (source.conninfo.clone(), Lsn::INVALID, outside.connections.clone());
        Ok(SimSource { io, outside, conninfo, at, _counted })
    }
}

impl WalSource for SimSource {
    async fn start(&mut self, from: Lsn) -> Result<(), SourceError> {
        self.at = from;
        Ok(())
    }

    async fn next(&mut self) -> Result<WalMessage, SourceError> {
        let pause = Duration::from_micros(self.io.random_u64() % 400);
        self.io.sleep(pause).await;
        if self.io.random_u64().is_multiple_of(200) {
            return Err(SourceError::Closed { during: "streaming" });
        }
        let len = 1 + (self.io.random_u64() % 20_000) as usize;
        let mut primary = self.outside.primary.borrow_mut();
        let records = self.io.random_u64() % 12;
        for _ in 0..if self.outside.quiet.get() { 0 } else { records } {
            primary.step();
            let one_in = self.outside.records_per_commit.get();
            if one_in > 0 && self.io.random_u64().is_multiple_of(one_in) {
                let time = self.io.unix_time_us() + self.outside.clock_ahead_us.get();
                primary.commit(Timestamp(time));
            }
            let one_in = self.outside.records_per_copy.get();
            if one_in > 0 && self.io.random_u64().is_multiple_of(one_in) {
                primary.copy_database();
            }
        }
        let end_of_wal = primary.end().min(self.outside.visible_end.get());
        let len = len.min(end_of_wal.bytes_since(self.at) as usize);
        let bytes = Bytes::copy_from_slice(primary.read(self.at, len));
        if bytes.is_empty() {
            return Ok(WalMessage::KeepAlive { end_of_wal, reply_requested: false });
        }
        let start = self.at;
        self.at = Lsn(start.0 + bytes.len() as u64);
        Ok(WalMessage::Data { start, end_of_wal, bytes })
    }

    async fn send_status(&mut self, status: StandbyStatus) -> Result<(), SourceError> {
        let known = self.outside.acknowledged.get();
        self.outside.acknowledged.set(known.max(status.flush));
        let mut flushed = self.outside.flushed.borrow_mut();
        let known = flushed.entry(self.conninfo.clone()).or_insert(Lsn::INVALID);
        *known = status.flush.max(*known);
        Ok(())
    }
}

pub(super) fn timeline_dir() -> PathBuf {
    let tenant = TENANT.to_string();
    Path::new("data/tenants").join(tenant).join("timelines").join(TIMELINE.to_string())
}

/// Makes the timeline as an import leaves it: an image layer with the control values, an index.
pub(super) async fn import(io: SimIo) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut path = PathBuf::new();
    for part in &timeline_dir() {
        let parent = path.clone();
        path.push(part);
        io.create_dir(&path).await.map_err(|e| text(&e))?;
        let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { &parent };
        io.sync_dir(&io.dir_change(parent)).await.map_err(|e| text(&e))?;
    }
    let owner = LayerOwner { shard: TENANT, timeline: TIMELINE };
    let mut writer =
        ImageWriter::create(&io, &path, owner, START, 0).await.map_err(|e| text(&e))?;
    let checkpoint = Value::Image(Bytes::from(vec![0; CHECKPOINT_BYTES]));
    writer.add(Key::CHECKPOINT, &checkpoint).await.map_err(|e| text(&e))?;
    let layer = writer.finish(Key::MIN..Key::MAX).await.map_err(|e| text(&e))?;
    let index = TimelineIndex {
        version: INDEX_VERSION,
        tenant: TENANT,
        timeline: TIMELINE,
        cluster: ClusterIdentity {
            system_id: SYSTEM_ID,
            tli: 1,
            wal_segment_bytes: SEGMENT_BYTES,
            data_checksums: false,
            hint_bits_logged: false,
        },
        source: Some(WalSourceConfig { conninfo: "host=primary user=u".into(), slot: None }),
        ancestor: None,
        archived: false,
        start_lsn: START,
        disk_consistent_lsn: START,
        gc_cutoff_lsn: START,
        layers: vec![IndexLayer { name: layer.name.to_string(), len: layer.file_bytes }],
    };
    durable::write_file_atomic(&io, &path.join(INDEX_FILE), &index.encode())
        .await
        .map_err(|e| text(&e))
}

pub(super) type SimShard = Rc<Shard<SimIo, SimConnector>>;

pub(super) async fn start_shard(io: &SimIo, outside: &Rc<Outside>) -> Result<SimShard, String> {
    let (background, runner) = background::channel();
    let slow = io.slowed(outside.background_slowness.get());
    io.spawn(TaskClass::Background, runner.run(slow));
    let distance = 64 * 1024 + io.random_u64() % (512 * 1024);
    let budget = 256 * 1024 + io.random_u64() % (1 << 20);
    let target = 16 * 1024 + io.random_u64() % (256 * 1024);
    let (distance, target) = outside.layer_bytes.get().unwrap_or((distance, target));
    let large = outside.large_layers.get();
    let by_chance =
        (1 + (io.random_u64() % 4) as usize, [10, 50, 200, 5_000][(io.random_u64() % 4) as usize]);
    let (threshold, image_percent) = outside.compaction.get().unwrap_or(by_chance);
    let by_chance = (io.random_u64() % (1 << 20)) as usize;
    let block_cache_bytes = outside.cache_bytes.get().unwrap_or(by_chance);
    let context = ShardContext {
        core: 0,
        io: io.clone(),
        background,
        data_dir: PathBuf::from("data"),
        config: TimelineConfig {
            checkpoint_distance_bytes: if large { 1 << 30 } else { distance },
            checkpoint_timeout_s: 1,
            wait_lsn_timeout_ms: 60_000,
            image_layer_bytes: 1 << 20,
            compaction_threshold: threshold,
            compaction_target_bytes: target,
            compaction_image_percent: image_percent,
            gc_horizon_bytes: 0,
            pitr_interval_s: 0,
            gc_period_s: outside.gc_period_s.get(),
            timeline_idle_ms: outside.timeline_idle_ms.get(),
            page_quota: PageQuota::default(),
        },
        block_cache_bytes,
        // Half of the nodes rebuild every page anew: what is wrong below must be seen.
        page_cache_bytes: if block_cache_bytes.is_multiple_of(2) {
            0
        } else {
            block_cache_bytes / 4
        },
        layer_files_max: LAYER_READERS_MAX,
        memory_budget_bytes: if large { 1 << 30 } else { budget },
        connector: SimConnector { io: io.clone(), outside: outside.clone() },
        redo: Rc::new(ToyRedoFactory),
        owns: Rc::new(|_| true),
    };
    Shard::start(context).await.map_err(|error| error.to_string())
}

pub(super) async fn start(
    io: &SimIo,
    outside: &Rc<Outside>,
) -> Result<(SimShard, Rc<Timeline<SimIo>>), String> {
    let shard = start_shard(io, outside).await?;
    let timeline =
        shard.timeline(TENANT, TIMELINE).await.map_err(|error| format!("restart: {error}"))?;
    let (found, promised) = (timeline.lsns().last_record, outside.acknowledged.get());
    if found < promised {
        return Err(format!(
            "WAL up to {promised} was acknowledged, after the restart it ends at {found}"
        ));
    }
    Ok((shard, timeline))
}

/// What a read of one page came to.
pub(super) enum Compared {
    /// There is nothing to read yet, or it was collected.
    Nothing,
    Right,
    Refused(ReadError),
}

thread_local! {
    /// Pages that were told without waiting, and pages that were not.
    pub(super) static HELD: Cell<[u64; 2]> = const { Cell::new([0; 2]) };
}

/// Reads a page in both ways.
///
/// # Errors
/// The outer one: they contradict each other.
pub(super) async fn read_page(
    timeline: &Timeline<SimIo>,
    rel: RelTag,
    block: BlockNumber,
    request: RequestLsn,
) -> Result<Result<Bytes, ReadError>, String> {
    let last = timeline.lsns().last_record;
    let before = timeline.held_page(rel, block, request);
    let page = timeline.get_page(rel, block, request).await;
    let is_same_lsn = request.request <= last || timeline.lsns().last_record == last;
    let after = timeline.held_page(rel, block, request).filter(|_| is_same_lsn);
    let [told, not] = HELD.get();
    HELD.set(if after.is_some() { [told + 1, not] } else { [told, not + 1] });
    let contradicts = |held: &Bytes| match &page {
        Ok(page) => page != held,
        // In the same step, or for good.
        Err(error) => error.kind() == Kind::Invalid,
    };
    let before = before.filter(|_| is_same_lsn && page.is_ok());
    match before.iter().chain(&after).any(contradicts) {
        true => Err(format!("{rel} block {block} at {request:?} is held as another page")),
        false => Ok(page),
    }
}

/// Reads one page and the size of its fork at an LSN, and compares them.
///
/// # Errors
/// They are wrong.
pub(super) async fn compare_page(
    timeline: &Timeline<SimIo>,
    outside: &Outside,
    io: &SimIo,
) -> Result<Compared, String> {
    let last = timeline.lsns().last_record;
    let (rel, block, lsn, expected) = {
        let primary = outside.primary.borrow();
        let forks = primary.forks();
        let ends = primary.record_ends();
        let readable = ends.partition_point(|end| *end <= last);
        if readable == 0 || forks.is_empty() {
            return Ok(Compared::Nothing);
        }
        let rel = forks[io.random_u64() as usize % forks.len()];
        let block = (io.random_u64() % 28) as u32;
        let lsn = ends[io.random_u64() as usize % readable];
        (rel, block, lsn, primary.page_at(rel, block, lsn))
    };
    let request = RequestLsn { request: lsn, not_modified_since: lsn };
    let page = read_page(timeline, rel, block, request).await?;
    if page.as_ref().is_ok_and(|page| *page != expected) {
        return Err(format!("{rel} block {block} at {lsn} is wrong"));
    }
    let blocks = match page {
        Ok(_) => timeline.rel_size(rel, request).await,
        Err(error) => Err(error),
    };
    let expected = outside.primary.borrow().size_at(rel, lsn);
    match blocks {
        Ok(blocks) if blocks == expected => Ok(Compared::Right),
        Ok(blocks) => Err(format!("{rel} at {lsn} has {blocks} blocks instead of {expected}")),
        Err(ReadError::GarbageCollected { .. }) if lsn < timeline.gc_cutoff() => {
            Ok(Compared::Nothing)
        }
        Err(error) => Ok(Compared::Refused(error)),
    }
}

/// The same where no read may fail.
pub(super) async fn check_page(
    timeline: &Timeline<SimIo>,
    outside: &Outside,
    io: &SimIo,
) -> Result<(), String> {
    if let Some(problem) = timeline.overlapping_layers() {
        return Err(problem);
    }
    match compare_page(timeline, outside, io).await? {
        Compared::Nothing | Compared::Right => Ok(()),
        Compared::Refused(error) => Err(error.to_string()),
    }
}

/// A collection, now and then.
pub(super) async fn collect_sometimes(
    timeline: &Timeline<SimIo>,
    outside: &Outside,
    io: &SimIo,
) -> Result<(), String> {
    if outside.collects.get() && io.random_u64().is_multiple_of(16) {
        let horizon = Some(io.random_u64() % (1 << 20));
        let request = GcRequest { gc_horizon_bytes: horizon, pitr_interval_s: Some(0) };
        let collected = timeline.collect_garbage(request, || Ok(Vec::new())).await;
        collected.map_err(|error| error.to_string())?;
    }
    Ok(())
}

async fn live(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let (_shard, timeline) = start(&io, &outside).await?;
    loop {
        io.sleep(Duration::from_micros(io.random_u64() % 3000)).await;
        check_page(&timeline, &outside, &io).await?;
        collect_sometimes(&timeline, &outside, &io).await?;
        if let Some(reason) = timeline.broken() {
            return Err(format!("ingest stopped: {reason}"));
        }
    }
}

/// Waits so often for WAL up to `end`, as long as there is any progress.
pub(super) async fn catch_up(
    timeline: &Timeline<SimIo>,
    end: Lsn,
    patience: u32,
) -> Result<(), String> {
    for _ in 0..patience {
        let before = timeline.lsns().last_record;
        let Err(error) = timeline.wait_for_lsn(end).await else { return Ok(()) };
        if timeline.lsns().last_record <= before {
            return Err(format!("{}: no progress: {error}", timeline.id));
        }
    }
    Err(format!("{} goes on, but too slowly", timeline.id))
}

async fn finish(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let (shard, timeline) = start(&io, &outside).await?;
    let end = outside.primary.borrow().record_ends().last().copied().unwrap_or(START);
    // A copied database may take longer than a wait lasts.
    let patience = if outside.records_per_copy.get() > 0 { 100 } else { 1 };
    catch_up(&timeline, end, patience).await?;
    for _ in 0..FINAL_READS {
        check_page(&timeline, &outside, &io).await?;
    }
    shard.shutdown().await;
    let (_shard, timeline) = start(&io, &outside).await?;
    check_page(&timeline, &outside, &io).await?;
    let _ = timeline;
    Ok(())
}

/// One life of the node, which is killed after so many steps; often the power goes with it.
pub(super) fn live_and_die<F: Future<Output = Result<(), String>> + 'static>(
    world: &mut SimWorld,
    steps: u64,
    life: impl FnOnce(SimIo) -> F,
) -> Result<(), String> {
    match world.run_steps(steps, life).map_err(|error| error.to_string())? {
        Outcome::Finished(Ok(())) => return Err("a life ended by itself".to_owned()),
        Outcome::Finished(Err(problem)) => return Err(problem),
        Outcome::Stopped { .. } => {}
    }
    if world.draw("power", 3) > 0 {
        world.crash();
    }
    Ok(())
}

/// One run: a few lives of the node, each ended by a kill or a power loss, then the checks of a
/// quiet end; in a part of the seeds on a disk with faults. Returns the hash of the run.
///
/// # Errors
/// What went wrong.
pub fn scenario(seed: u64) -> Result<u64, String> {
    match FaultClass::of(seed) {
        None => calm(seed, Plant::Nothing),
        Some(class) => faults::scenario(seed, class),
    }
}

/// A run on a disk that fails only by losing its power.
///
/// # Errors
/// What went wrong.
pub fn calm(seed: u64, plant: Plant) -> Result<u64, String> {
    let options = SimOptions {
        ignore_file_sync: plant == Plant::FileSync,
        ignore_dir_sync: plant == Plant::DirSync,
        ..SimOptions::varied(seed)
    };
    let mut world = SimWorld::new(seed, options);
    let outside = Outside::new(seed);
    outside.collects.set(seed.is_multiple_of(2));
    outside.records_per_copy.set(if seed % 5 == 3 { 1_000 } else { 0 });
    world.run(import).map_err(|error| error.to_string())??;
    for _ in 0..1 + world.draw("lives", 4) {
        let steps = 200 + world.draw("life", 6_000);
        let shared = outside.clone();
        live_and_die(&mut world, steps, move |io| live(io, shared))?;
    }
    let shared = outside.clone();
    world.run(move |io| finish(io, shared)).map_err(|error| error.to_string())??;
    Ok(world.trace_hash())
}

#[cfg(test)]
mod tests;
