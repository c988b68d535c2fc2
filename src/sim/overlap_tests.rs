//! Changes of one tenant that overlap: it is as if they had come one after the other.

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join;

use super::engine::{Outside, SimShard, TENANT, TIMELINE, import, start_shard};
use super::lifecycle_tests::{B, C, Op, branch, prepare};
use super::{SimIo, SimOptions, SimWorld};
use crate::base::{Kind, TimelineId};
use crate::io::{Io, durable};
use crate::shard::control::{
    Change, ControlError, CoreControl, CreateBranch, CreateTimeline, TimelineSource, TimelineState,
};
use crate::shard::index::{DELETED_FILE, WalSourceConfig};
use crate::shard::reader::PageBackend;
use crate::shard::tenant_config::TenantConfig;

const SEEDS: u64 = 60;

/// Runs a story on a node with root, A and B, which are closed where the seed is even.
fn with_trees<F: Future<Output = ()> + 'static>(
    story: impl Fn(SimIo, SimShard, Rc<Outside>) -> F + Copy + 'static,
) {
    for seed in 0..SEEDS {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        let run = world.run(move |io: SimIo| async move {
            io.set_faults(false);
            prepare(io.clone(), outside.clone(), Op::Branch).await;
            let shard = start_shard(&io, &outside).await.unwrap();
            if !seed.is_multiple_of(2) {
                shard.timeline(TENANT, B).await.unwrap();
            }
            io.sleep(Duration::from_micros(io.random_u64() % 1000)).await;
            story(io, shard, outside).await;
        });
        run.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

/// An import of what is not there.
async fn import_of_nothing(shard: &SimShard, id: TimelineId) -> Result<(), ControlError> {
    let source =
        TimelineSource::Backup { path: "/nowhere/at/all".into(), primary: None, slot: None };
    shard.create_timeline(CreateTimeline { tenant: TENANT, timeline: id, source }).await
}

async fn until_imported(io: &SimIo, shard: &SimShard) {
    while shard.timelines().iter().any(|info| info.state == TimelineState::Importing) {
        io.sleep(Duration::from_micros(50)).await;
    }
}

async fn later(io: &SimIo) {
    io.sleep(Duration::from_micros(io.random_u64() % 2000)).await;
}

#[test]
fn two_that_make_one_timeline_do_not_meet() {
    with_trees(|io, shard, outside| async move {
        let importing = async {
            later(&io).await;
            import_of_nothing(&shard, C).await
        };
        let branching = async {
            later(&io).await;
            shard.change(branch(C, B, None)).await
        };
        let (_, branched) = join(importing, branching).await;
        until_imported(&io, &shard).await;
        let is_there = shard.timeline(TENANT, C).await.is_ok();
        assert_eq!(is_there, branched.is_ok(), "{branched:?}");
        shard.shutdown().await;
        let shard = start_shard(&io, &outside).await.unwrap();
        assert_eq!(shard.timeline(TENANT, C).await.is_ok(), branched.is_ok());
        shard.shutdown().await;
    });
}

#[test]
fn a_tenant_that_is_deleted_stays_deleted() {
    with_trees(|io, shard, outside| async move {
        let importing = async {
            later(&io).await;
            import_of_nothing(&shard, C).await
        };
        let deleting = async {
            later(&io).await;
            shard.change(Change::DeleteTenant(TENANT)).await
        };
        let (imported, deleted) = join(importing, deleting).await;
        until_imported(&io, &shard).await;
        if let Err(error) = &deleted {
            // The import came first.
            assert!(imported.is_ok() && error.kind == Kind::Retry, "{error}");
        }
        let there: Vec<TimelineId> = shard.timelines().iter().map(|info| info.timeline).collect();
        assert!(deleted.is_err() || there.iter().all(|id| *id == C), "{there:?}");
        shard.shutdown().await;
        let shard = start_shard(&io, &outside).await.unwrap();
        assert_eq!(shard.timelines().is_empty(), deleted.is_ok());
        shard.shutdown().await;
    });
}

#[test]
fn a_tenant_that_is_configured_while_it_is_deleted_is_deleted() {
    with_trees(|io, shard, outside| async move {
        let configuring = async {
            later(&io).await;
            let (tenant, config) = (TENANT, TenantConfig::default());
            shard.change(Change::Tenant { tenant, config, create: false }).await
        };
        let deleting = async {
            later(&io).await;
            shard.change(Change::DeleteTenant(TENANT)).await
        };
        let (configured, deleted) = join(configuring, deleting).await;
        deleted.unwrap();
        if let Err(error) = configured {
            assert!(error.message.contains("is not on this node"), "{error}");
        }
        shard.shutdown().await;
        let shard = start_shard(&io, &outside).await.unwrap();
        assert!(shard.tenants().is_empty());
        shard.shutdown().await;
    });
}

/// The mark of a tenant that was deleted is not that of the next one of that name.
#[test]
fn what_is_left_of_a_deleted_tenant_is_not_taken_over() {
    let mut world = SimWorld::new(1, SimOptions::varied(1));
    let outside = Outside::new(1);
    let run = world.run(move |io: SimIo| async move {
        io.create_dir(Path::new("data")).await.unwrap();
        let shard = start_shard(&io, &outside).await.unwrap();
        let dir = Path::new("data/tenants").join(TENANT.to_string());
        import(io.clone()).await.unwrap();
        durable::write_file_atomic(&io, &dir.join(DELETED_FILE), b"").await.unwrap();
        import_of_nothing(&shard, C).await.unwrap();
        until_imported(&io, &shard).await;
        let names = |entries: Vec<crate::io::DirEntry>| -> Vec<String> {
            entries.into_iter().map(|entry| entry.name).collect()
        };
        assert_eq!(names(io.list(&dir).await.unwrap()), ["timelines"]);
        assert_eq!(names(io.list(&dir.join("timelines")).await.unwrap()), Vec::<String>::new());
        shard.shutdown().await;
    });
    run.unwrap();
}

#[test]
fn an_unarchived_timeline_follows_once() {
    for seed in 0..SEEDS {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        let run = world.run(move |io: SimIo| async move {
            io.set_faults(false);
            import(io.clone()).await.unwrap();
            let shard = start_shard(&io, &outside).await.unwrap();
            shard.change(Change::Archive(TENANT, TIMELINE, true)).await.unwrap();
            shard.shutdown().await;
            // It is closed now.
            let shard = start_shard(&io, &outside).await.unwrap();
            shard.change(Change::Archive(TENANT, TIMELINE, false)).await.unwrap();
            let connections = || Rc::strong_count(&outside.connections) - 1;
            while connections() == 0 {
                io.sleep(Duration::from_micros(50)).await;
            }
            for _ in 0..200 {
                assert!(connections() <= 1, "seed {seed}");
                io.sleep(Duration::from_micros(50)).await;
            }
            shard.shutdown().await;
        });
        run.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
    }
}

/// A timeline that does not end is not deleted, and what is deleted later takes in nothing.
#[test]
fn what_does_not_stop_is_not_deleted() {
    let mut world = SimWorld::new(2, SimOptions::varied(2));
    let outside = Outside::new(2);
    let run = world.run(move |io: SimIo| async move {
        io.set_faults(false);
        prepare(io.clone(), outside.clone(), Op::Branch).await;
        let shard = start_shard(&io, &outside).await.unwrap();
        outside.connecting_hangs.set(true);
        let source = Some(WalSourceConfig { conninfo: "host=other user=u".into(), slot: None });
        let new = |timeline, source| {
            let (tenant, ancestor, lsn) = (TENANT, B, None);
            Change::Branch(CreateBranch { tenant, timeline, ancestor, lsn, source })
        };
        shard.change(new(C, source)).await.unwrap();
        io.sleep(Duration::from_millis(5)).await;
        let last = shard.timeline(TENANT, C).await.unwrap();
        for change in [Change::DeleteTimeline(TENANT, C), Change::DeleteTenant(TENANT)] {
            let error = shard.change(change).await.unwrap_err();
            assert!(error.message.contains("does not stop following"), "{error}");
            let infos = shard.timelines();
            assert!(infos.iter().all(|info| info.state != TimelineState::Broken), "{infos:?}");
            assert!(!last.has_stopped_following());
        }
        outside.connecting_hangs.set(false);
        shard.change(Change::DeleteTenant(TENANT)).await.unwrap();
        assert!(last.has_stopped_following());
        assert_eq!(Rc::strong_count(&outside.connections), 1);
        let flushed = outside.flushed.borrow().clone();
        io.sleep(Duration::from_millis(100)).await;
        assert_eq!(*outside.flushed.borrow(), flushed);
        assert!(shard.timelines().is_empty());
        shard.shutdown().await;
    });
    run.unwrap();
}
