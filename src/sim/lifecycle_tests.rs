//! Each change of tenants and timelines, cut off at a random moment by a power loss: it is as if
//! it had not been asked for, or it is wholly true; and true if it was acknowledged.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::engine::{Outside, SimShard, TENANT, TIMELINE, import, start_shard, timeline_dir};
use super::{SimIo, SimOptions, SimWorld};
use crate::base::{Kind, Lsn, RelNode, TenantId, TenantShardId, TimelineId};
use crate::io::durable;
use crate::io::{Io, TaskClass};
use crate::shard::control::{Change, CoreControl, CreateBranch, TimelineState};
use crate::shard::index::{DELETED_FILE, INDEX_FILE, TimelineIndex};
use crate::shard::reader::{PageBackend, ReadError, RequestLsn, TimelineReader};
use crate::shard::tenant_config::TenantConfig;

pub(super) const A: TimelineId = TimelineId([0xa; 16]);
pub(super) const B: TimelineId = TimelineId([0xb; 16]);
pub(super) const C: TimelineId = TimelineId([0xc; 16]);
const OTHER: TenantShardId = TenantShardId { tenant: TenantId([9; 16]), number: 0, count: 0 };

/// Moments at which each change is cut off.
const CUTS: u64 = 30;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Op {
    Branch,
    Delete,
    Archive,
    Unarchive,
    Detach,
    CreateTenant,
    Configure,
    DeleteTenant,
}

const SETTINGS: TenantConfig = TenantConfig {
    checkpoint_distance_bytes: None,
    checkpoint_timeout_s: Some(77),
    wait_lsn_timeout_ms: None,
    image_layer_bytes: None,
    compaction_threshold: None,
    compaction_target_bytes: None,
    compaction_image_percent: None,
    gc_horizon_bytes: None,
    pitr_interval_s: Some(77),
    gc_period_s: None,
    page_requests_per_s: None,
    page_bytes_in_flight: None,
};

pub(super) fn branch(timeline: TimelineId, ancestor: TimelineId, lsn: Option<Lsn>) -> Change {
    let tenant = TENANT;
    Change::Branch(CreateBranch { tenant, timeline, ancestor, lsn, source: None })
}

impl Op {
    fn change(self) -> Change {
        match self {
            Op::Branch => branch(C, B, None),
            Op::Delete => Change::DeleteTimeline(TENANT, B),
            Op::Archive => Change::Archive(TENANT, A, true),
            Op::Unarchive => Change::Archive(TENANT, A, false),
            Op::Detach => Change::DetachAncestor(TENANT, A),
            Op::CreateTenant => Change::Tenant { tenant: OTHER, config: SETTINGS, create: true },
            Op::Configure => Change::Tenant { tenant: TENANT, config: SETTINGS, create: false },
            Op::DeleteTenant => Change::DeleteTenant(TENANT),
        }
    }

    /// Is it true?
    fn is_done(self, shard: &SimShard) -> bool {
        let infos = shard.timelines();
        let tenants = shard.tenants();
        let find = |id| infos.iter().find(|info| info.timeline == id);
        let tenant = |id| tenants.iter().find(|info| info.tenant == id);
        match self {
            Op::Branch => find(C).is_some(),
            Op::Delete => find(B).is_none(),
            Op::Archive => find(A).unwrap().state == TimelineState::Archived,
            Op::Unarchive => find(A).unwrap().state != TimelineState::Archived,
            Op::Detach => find(A).unwrap().ancestor.is_none(),
            Op::CreateTenant => tenant(OTHER).is_some_and(|info| info.config == SETTINGS),
            Op::Configure => tenant(TENANT).unwrap().config == SETTINGS,
            Op::DeleteTenant => tenant(TENANT).is_none() && infos.is_empty(),
        }
    }
}

/// Root with some WAL, A off the root, B off A; returns their ends.
pub(super) async fn prepare(io: SimIo, outside: Rc<Outside>, op: Op) -> Lsn {
    import(io.clone()).await.unwrap();
    let shard = start_shard(&io, &outside).await.unwrap();
    let root = shard.timeline(TENANT, TIMELINE).await.unwrap();
    while root.lsns().last_record < Lsn(root.start_lsn().0 + 60_000) {
        io.sleep(Duration::from_millis(1)).await;
    }
    let lsn = Lsn(root.start_lsn().0 + 48_000);
    shard.change(branch(A, TIMELINE, Some(lsn))).await.unwrap();
    shard.change(branch(B, A, None)).await.unwrap();
    if op == Op::Unarchive {
        shard.change(Op::Archive.change()).await.unwrap();
    }
    shard.shutdown().await;
    lsn
}

async fn carry_out(io: &SimIo, shard: &SimShard, op: Op) {
    shard.change(op.change()).await.unwrap();
    while op == Op::Detach && !op.is_done(shard) {
        io.sleep(Duration::from_micros(50)).await;
    }
}

/// Starts a node, begins the change, and goes away after `cut`; without it, after the change.
/// Returns how long it took.
async fn life(
    io: SimIo,
    outside: Rc<Outside>,
    op: Op,
    cut: Option<Duration>,
    acknowledged: Rc<Cell<bool>>,
) -> Duration {
    let shard = start_shard(&io, &outside).await.unwrap();
    let begin = io.now();
    let (task_io, done) = (io.clone(), acknowledged.clone());
    io.spawn(TaskClass::Serve, async move {
        carry_out(&task_io, &shard, op).await;
        done.set(true);
    });
    match cut {
        Some(cut) => io.sleep(cut).await,
        None => {
            while !acknowledged.get() {
                io.sleep(Duration::from_micros(20)).await;
            }
        }
    }
    io.now() - begin
}

/// Reads some pages of every timeline that there is.
async fn read_all(io: &SimIo, shard: &SimShard, outside: &Outside, end: Lsn) {
    for info in shard.timelines() {
        let found = shard.timeline(TENANT, info.timeline).await;
        if info.state == TimelineState::Archived {
            assert!(matches!(found, Err(ReadError::Archived { .. })), "{:?}", found.err());
            continue;
        }
        let timeline = found.unwrap();
        let start = timeline.start_lsn();
        for number in 0..12 {
            let rel = RelNode { spc: 1663, db: 5, rel: 16384 + number % 4 }.fork(0);
            let block = (io.random_u64() % 24) as u32;
            let at = Lsn(start.0 + io.random_u64() % (end.0 - start.0 + 1));
            let request = RequestLsn { request: at, not_modified_since: start };
            let page = timeline.get_page(rel, block, request).await.unwrap();
            let expected = outside.primary.borrow().page_at(rel, block, at);
            assert!(page == expected, "{} {rel} block {block} at {at}", info.timeline);
        }
    }
}

/// Every file is named by something.
async fn no_litter(io: &SimIo, shard: &SimShard) {
    let timelines = timeline_dir().parent().unwrap().to_owned();
    let dirs = match shard.timelines().is_empty() {
        true => Vec::new(),
        false => io.list(&timelines).await.unwrap(),
    };
    assert_eq!(dirs.len(), shard.timelines().len(), "{dirs:?}");
    // The root is writing.
    for dir in dirs.iter().filter(|dir| dir.name != TIMELINE.to_string()) {
        let path = timelines.join(&dir.name);
        let bytes = durable::read_file(io, &path.join(INDEX_FILE)).await.unwrap();
        let index = TimelineIndex::decode(&bytes).unwrap();
        for file in io.list(&path).await.unwrap().iter().filter(|entry| !entry.is_dir) {
            let named = index.layers.iter().any(|layer| layer.name == file.name);
            assert!(named || file.name == INDEX_FILE, "{} in {}", file.name, path.display());
        }
    }
    let tenants = io.list(Path::new("data/tenants")).await.unwrap();
    assert_eq!(tenants.len(), shard.tenants().len(), "{tenants:?}");
}

async fn check(io: SimIo, outside: Rc<Outside>, op: Op, acknowledged: bool, end: Lsn) -> bool {
    let shard = start_shard(&io, &outside).await.unwrap();
    let done = op.is_done(&shard);
    assert!(done || !acknowledged, "{op:?} was acknowledged and is lost");
    read_all(&io, &shard, &outside, end).await;
    // What opening removes is gone now.
    if op != Op::Archive {
        no_litter(&io, &shard).await;
    }
    if !done {
        carry_out(&io, &shard, op).await;
        assert!(op.is_done(&shard));
        read_all(&io, &shard, &outside, end).await;
    }
    shard.shutdown().await;
    done
}

fn cut_off(op: Op) {
    let mut seen: BTreeMap<(bool, bool), u64> = BTreeMap::new();
    for seed in 0..CUTS {
        let run = |cut: Option<Duration>| {
            let mut world = SimWorld::new(seed, SimOptions::varied(seed));
            let (outside, acknowledged) = (Outside::new(seed), Rc::new(Cell::new(false)));
            let theirs = outside.clone();
            let end = world.run(move |io| prepare(io, theirs, op)).unwrap();
            let (theirs, told) = (outside.clone(), acknowledged.clone());
            let took = world.run(move |io| life(io, theirs, op, cut, told)).unwrap();
            (world, outside, acknowledged.get(), end, took)
        };
        let (.., took) = run(None);
        let share = fastrand::Rng::with_seed(seed).f64() * 1.05;
        let (mut world, outside, acknowledged, end, _) = run(Some(took.mul_f64(share)));
        world.crash();
        let checked = world.run(move |io| check(io, outside, op, acknowledged, end));
        let done = checked.unwrap_or_else(|error| panic!("{op:?}, seed {seed}: {error}"));
        *seen.entry((acknowledged, done)).or_default() += 1;
    }
    println!("{op:?}: (acknowledged, done) {seen:?}");
    assert!(seen.get(&(false, false)).is_some_and(|count| *count >= 3), "{op:?}: {seen:?}");
    assert!(seen.keys().any(|(_, done)| *done), "{op:?}: {seen:?}");
}

#[test]
fn a_branch_is_made_or_not() {
    cut_off(Op::Branch);
}

#[test]
fn a_timeline_is_deleted_or_not() {
    cut_off(Op::Delete);
}

#[test]
fn a_timeline_is_archived_or_not() {
    cut_off(Op::Archive);
    cut_off(Op::Unarchive);
}

#[test]
fn a_branch_is_detached_or_not() {
    cut_off(Op::Detach);
}

#[test]
fn a_tenant_is_made_configured_removed_or_not() {
    cut_off(Op::CreateTenant);
    cut_off(Op::Configure);
    cut_off(Op::DeleteTenant);
}

/// Runs a story on a node with root, A and B.
pub(super) fn with_tree<F: Future<Output = ()> + 'static>(
    story: impl FnOnce(SimIo, SimShard, Rc<Outside>, Lsn) -> F + 'static,
) {
    let mut world = SimWorld::new(3, SimOptions::varied(3));
    let outside = Outside::new(3);
    let run = world.run(move |io| async move {
        let end = prepare(io.clone(), outside.clone(), Op::Branch).await;
        let shard = start_shard(&io, &outside).await.unwrap();
        story(io, shard, outside, end).await;
    });
    run.unwrap();
}

#[test]
fn what_makes_no_sense_is_refused_with_a_reason() {
    with_tree(|io, shard, outside, end| async move {
        let refused = async |change: Change, part: &str| {
            let error = shard.change(change).await.unwrap_err();
            assert_eq!(error.kind, Kind::Invalid, "{error}");
            assert!(error.message.contains(part), "'{part}' is not in: {error}");
        };
        let tenant = OTHER;
        refused(branch(C, TIMELINE, Some(Lsn(5))), "its history begins at").await;
        refused(branch(C, A, Some(Lsn(end.0 + 1))), "it has WAL up to").await;
        refused(branch(B, A, None), "exists already").await;
        refused(branch(C, C, None), "is not on this node").await;
        refused(Change::DeleteTimeline(TENANT, TIMELINE), &A.to_string()).await;
        refused(Change::DeleteTimeline(TENANT, A), &B.to_string()).await;
        refused(Change::DeleteTimeline(TENANT, C), "is not on this node").await;
        refused(Change::DetachAncestor(TENANT, TIMELINE), "has no ancestor").await;
        refused(Change::DeleteTenant(tenant), "is not on this node").await;
        let config = TenantConfig { checkpoint_timeout_s: Some(0), ..SETTINGS };
        refused(Change::Tenant { tenant: TENANT, config, create: false }, "from 1 to").await;
        refused(Change::Tenant { tenant, config: SETTINGS, create: false }, "not on").await;
        let create = Change::Tenant { tenant: TENANT, config: SETTINGS, create: true };
        refused(create, "exists already").await;
        shard.change(Op::Archive.change()).await.unwrap();
        refused(branch(C, A, None), "is archived").await;
        // Children of an archived timeline are read through it.
        read_all(&io, &shard, &outside, end).await;
        shard.shutdown().await;
    });
}

#[test]
fn a_branch_hangs_on_the_timeline_that_has_its_point() {
    with_tree(|_, shard, _, end| async move {
        let early = Lsn(end.0 - 16_000);
        shard.change(branch(C, B, Some(early))).await.unwrap();
        let infos = shard.timelines();
        let point = |id| infos.iter().find(|info| info.timeline == id).unwrap().ancestor.unwrap();
        assert_eq!(point(C).timeline, TIMELINE);
        assert_eq!(point(B).timeline, A);
        let root = shard.timeline(TENANT, TIMELINE).await.unwrap();
        assert_eq!(root.branch_points(), [point(C).lsn, point(A).lsn]);
        shard.change(Change::DeleteTimeline(TENANT, C)).await.unwrap();
        assert_eq!(root.branch_points(), [point(A).lsn]);
        shard.shutdown().await;
    });
}

#[test]
fn settings_take_effect_at_once_and_stay() {
    with_tree(|io, shard, outside, _| async move {
        shard.change(Op::Configure.change()).await.unwrap();
        let effective = |shard: &SimShard| shard.tenants()[0].effective_config;
        assert_eq!(effective(&shard).checkpoint_timeout_s, Some(77));
        let wait = TenantConfig { wait_lsn_timeout_ms: Some(5), ..TenantConfig::default() };
        let change = Change::Tenant { tenant: TENANT, config: wait, create: false };
        // The timeline is open already.
        let root = shard.timeline(TENANT, TIMELINE).await.unwrap();
        shard.change(change).await.unwrap();
        let begin = io.now();
        let error = root.wait_for_lsn(Lsn(1 << 40)).await.unwrap_err();
        assert!(matches!(error, ReadError::LsnTimeout { .. }), "{error}");
        // A branch without a source will never have it.
        let branch = shard.timeline(TENANT, B).await.unwrap();
        let error = branch.wait_for_lsn(Lsn(1 << 40)).await.unwrap_err();
        assert!(matches!(error, ReadError::NoMoreWal { .. }), "{error}");
        assert!(io.now() - begin < Duration::from_secs(1));
        shard.shutdown().await;
        let shard = start_shard(&io, &outside).await.unwrap();
        assert_eq!(effective(&shard).wait_lsn_timeout_ms, Some(5));
        assert_eq!(shard.tenants()[0].config, wait);
        shard.shutdown().await;
    });
}

#[test]
fn a_damaged_ancestor_is_named_by_its_branches() {
    with_tree(|io, shard, outside, _| async move {
        shard.shutdown().await;
        let dir: PathBuf = timeline_dir();
        let layers = io.list(&dir).await.unwrap();
        let layer = layers.iter().find(|entry| !entry.is_dir && entry.name != INDEX_FILE).unwrap();
        io.remove(&dir.join(&layer.name)).await.unwrap();
        let shard = start_shard(&io, &outside).await.unwrap();
        for id in [A, B] {
            let error = shard.timeline(TENANT, id).await.err().unwrap().to_string();
            assert!(error.contains(&TIMELINE.to_string()), "{error}");
            assert!(error.contains("there is no such file"), "{error}");
        }
        // It still has branches, so it cannot go; when they are gone, it can.
        let delete = |id| Change::DeleteTimeline(TENANT, id);
        assert!(shard.change(delete(TIMELINE)).await.is_err());
        for id in [B, A, TIMELINE] {
            shard.change(delete(id)).await.unwrap();
        }
        assert!(shard.timelines().is_empty() && shard.tenants().len() == 1);
        shard.shutdown().await;
    });
}

#[test]
fn an_index_that_cannot_be_read_keeps_the_others_from_being_deleted() {
    with_tree(|io, shard, outside, _| async move {
        shard.shutdown().await;
        let dir = timeline_dir().parent().unwrap().join(B.to_string());
        durable::write_file_atomic(&io, &dir.join(INDEX_FILE), b"{").await.unwrap();
        let shard = start_shard(&io, &outside).await.unwrap();
        let error = shard.change(Change::DeleteTimeline(TENANT, A)).await.unwrap_err();
        assert!(error.message.contains("damaged"), "{error}");
        let open = shard.timeline(TENANT, A).await.unwrap();
        assert_eq!(open.branch_points(), [Lsn::INVALID], "nothing may be removed");
        shard.change(Change::DeleteTimeline(TENANT, B)).await.unwrap();
        shard.change(Change::DeleteTimeline(TENANT, A)).await.unwrap();
        shard.shutdown().await;
    });
}

#[test]
fn a_circle_of_ancestors_is_an_error_and_no_standstill() {
    with_tree(|io, shard, outside, _| async move {
        shard.shutdown().await;
        let path = timeline_dir().parent().unwrap().join(A.to_string()).join(INDEX_FILE);
        let mut index =
            TimelineIndex::decode(&durable::read_file(&io, &path).await.unwrap()).unwrap();
        index.ancestor.as_mut().unwrap().timeline = B;
        durable::write_file_atomic(&io, &path, &index.encode()).await.unwrap();
        let shard = start_shard(&io, &outside).await.unwrap();
        // Nothing was opened that could have found it.
        assert!(shard.timelines().iter().any(|info| info.timeline == B));
        let error = shard.timeline(TENANT, B).await.err().unwrap().to_string();
        assert!(error.contains("circle"), "{error}");
        shard.shutdown().await;
    });
}

#[test]
fn logical_sizes_follow_the_wal() {
    with_tree(|io, shard, outside, end| async move {
        let size_of = async |id: TimelineId| loop {
            let infos = shard.timelines();
            let info = infos.into_iter().find(|info| info.timeline == id).unwrap();
            match info.logical_bytes {
                Some(bytes) => return (bytes, info.last_record_lsn),
                None => io.sleep(Duration::from_millis(1)).await,
            }
        };
        let expected = |lsn: Lsn| {
            let primary = outside.primary.borrow();
            let blocks = primary.forks().iter().map(|rel| primary.size_at(*rel, lsn)).sum::<u32>();
            u64::from(blocks) * 8192
        };
        for id in [A, B] {
            shard.timeline(TENANT, id).await.unwrap();
            assert_eq!(size_of(id).await.0, expected(end));
        }
        for _ in 0..20 {
            let (bytes, lsn) = size_of(TIMELINE).await;
            assert_eq!(bytes, expected(lsn), "at {lsn}");
            io.sleep(Duration::from_millis(3)).await;
        }
        shard.shutdown().await;
    });
}

#[test]
fn a_tenant_that_was_being_deleted_does_not_come_back() {
    with_tree(|io, shard, outside, _| async move {
        shard.shutdown().await;
        let dir = Path::new("data/tenants").join(TENANT.to_string());
        durable::write_file_atomic(&io, &dir.join(DELETED_FILE), b"").await.unwrap();
        let shard = start_shard(&io, &outside).await.unwrap();
        assert!(shard.tenants().is_empty() && shard.timelines().is_empty());
        assert!(matches!(
            shard.timeline(TENANT, A).await.err(),
            Some(ReadError::TenantNotFound(_))
        ));
        shard.shutdown().await;
    });
}

/// A second sync of the directory alone would say that it is gone, and know nothing.
#[test]
fn a_deletion_whose_sync_failed_is_made_anew() {
    for seed in 0..10 {
        let options = SimOptions { sync_error_per_million: 1_000_000, ..SimOptions::varied(seed) };
        let mut world = SimWorld::new(seed, options);
        let outside = Outside::new(seed);
        let theirs = outside.clone();
        let story = move |io: SimIo| async move {
            io.set_faults(false);
            prepare(io.clone(), theirs.clone(), Op::Delete).await;
            let shard = start_shard(&io, &theirs).await.unwrap();
            io.set_faults(true);
            for _ in 0..2 {
                let error = shard.change(Op::Delete.change()).await.unwrap_err();
                assert!(error.message.contains("sync"), "{error}");
            }
            io.set_faults(false);
            shard.change(Op::Delete.change()).await.unwrap();
        };
        world.run(story).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        world.crash();
        let story = move |io: SimIo| async move {
            io.set_faults(false);
            let shard = start_shard(&io, &outside).await.unwrap();
            assert!(Op::Delete.is_done(&shard), "seed {seed}");
            shard.change(Op::Detach.change()).await.unwrap();
            shard.shutdown().await;
        };
        world.run(story).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}
