//! Single incidents of garbage collection, each with what must hold after it.

use super::*;
use crate::shard::control::{Change, CoreControl};
use crate::shard::tenant_config::TenantConfig;

/// A life with layers and an image at their end, which `story` is told, that collects garbage by
/// itself.
fn with_collections_each<F: Future<Output = ()> + 'static>(
    period_s: u64,
    story: impl FnOnce(Life, Lsn) -> F + 'static,
) {
    let mut world = SimWorld::new(1, SimOptions::default());
    let model = new_model(1);
    model.outside.gc_period_s.set(period_s);
    let run = |io: SimIo| async move {
        import(io.clone()).await.unwrap();
        let life = Life::begin(io, model).await.unwrap();
        let end = fill(&life).await;
        story(life, end).await;
    };
    world.run(run).unwrap();
}

#[test]
fn collections_come_by_themselves() {
    with_collections_each(1, |life, end| async move {
        life.io.sleep(Duration::from_millis(2_100)).await;
        assert_eq!(life.timeline.gc_cutoff(), end);
        assert_eq!(life.timeline.layer_names().len(), 1);
        life.shard.shutdown().await;
    });
}

#[test]
fn no_collection_comes_after_they_were_switched_off() {
    with_collections_each(2, |life, _| async move {
        let before = life.timeline.gc_cutoff();
        let off = TenantConfig { gc_period_s: Some(0), ..TenantConfig::default() };
        let change = Change::Tenant { tenant: TENANT, config: off, create: false };
        life.shard.change(change).await.unwrap();
        life.io.sleep(Duration::from_secs(5)).await;
        assert_eq!(life.timeline.gc_cutoff(), before);
        life.shard.shutdown().await;
    });
}

#[test]
fn what_damaged_files_held_is_neither_forgotten_nor_a_reason_to_stop() {
    for (name, leases_known) in [(HISTORY_FILES[0], true), (HISTORY_FILES[1], false)] {
        let mut world = SimWorld::new(1, SimOptions::default());
        let model = new_model(1);
        model.outside.records_per_commit.set(2);
        let story = move |io: SimIo| async move {
            import(io.clone()).await.unwrap();
            let life = Life::begin(io.clone(), model.clone()).await.unwrap();
            io.sleep(Duration::from_millis(20)).await;
            let end = fill(&life).await;
            life.timeline.lease(Lsn(end.0 - 1), None).await.unwrap();
            let known = life.timeline.lsn_by_timestamp(life.now());
            assert_eq!(known.kind, TimeKind::Future);
            life.shard.shutdown().await;
            drop(life);
            let path = timeline_dir().join(name);
            io.remove(&path).await.unwrap();
            io.create(&path).await.unwrap().close().await.unwrap();
            let life = Life::begin_anyhow(io.clone(), model).await.unwrap();
            let gc = life.timeline.collect_garbage(GcRequest::default(), || Ok(Vec::new())).await;
            let lease = life.timeline.lease(end, None).await;
            if leases_known {
                assert_eq!(life.timeline.lsn_by_timestamp(life.now()).kind, TimeKind::Nodata);
                assert_eq!(gc.unwrap().retained_lsns, 1);
                lease.unwrap();
            } else {
                assert_eq!(life.timeline.lsn_by_timestamp(life.now()), known);
                assert!(gc.unwrap_err().to_string().contains("leases"));
                assert!(matches!(lease, Err(LeaseError::Unreadable { .. })));
            }
            life.read().await.unwrap();
            life.shard.shutdown().await;
        };
        world.run(story).unwrap();
    }
}

#[test]
fn what_is_refused_says_why() {
    let mut world = SimWorld::new(1, SimOptions::default());
    let model = new_model(1);
    let story = move |io: SimIo| async move {
        import(io.clone()).await.unwrap();
        let life = Life::begin(io.clone(), model).await.unwrap();
        let end = fill(&life).await;
        life.collect(end, 0).await.unwrap();
        let below = RequestLsn { request: Lsn(end.0 - 1), not_modified_since: START };
        let refused = life.timeline.get_page(rel(0), 0, below).await.unwrap_err();
        assert_eq!(refused.kind(), crate::base::Kind::Invalid);
        let text = refused.to_string();
        let known = "tried to request a page version that was garbage collected";
        assert!(text.starts_with(known) && text.contains(&end.to_string()), "{text}");
        let lease = |lsn, seconds| life.timeline.lease(lsn, seconds);
        assert!(matches!(lease(below.request, None).await, Err(LeaseError::BelowCutoff { .. })));
        assert!(matches!(lease(Lsn(1), None).await, Err(LeaseError::BelowStart { .. })));
        assert!(matches!(lease(Lsn::MAX, None).await, Err(LeaseError::NotThereYet { .. })));
        assert!(matches!(lease(end, Some(0)).await, Err(LeaseError::Length { seconds: 0 })));
        let length = lease(end, Some(u64::MAX)).await;
        assert!(matches!(length, Err(LeaseError::Length { .. })));
        assert!(life.timeline.check_holdable(below.request).is_err());
        assert!(life.timeline.check_holdable(end).is_ok());
        life.shard.shutdown().await;
    };
    world.run(story).unwrap();
}

/// Collects up to the byte before an image, and reads everything there.
async fn read_just_before_an_image(io: SimIo, model: Rc<Model>) -> Result<(), String> {
    import(io.clone()).await?;
    let life = Life::begin(io, model).await?;
    let image = fill(&life).await;
    let lsn = Lsn(image.0 - 1);
    life.collect(lsn, 0).await?;
    let request = RequestLsn { request: lsn, not_modified_since: START };
    let mut result = Ok(());
    for number in 0..4 {
        for block in 0..28 {
            let page = life.timeline.get_page(rel(number), block, request).await;
            let expected = life.model.outside.primary.borrow().page_at(rel(number), block, lsn);
            if !page.is_ok_and(|page| page == expected) {
                result = Err(format!("block {block} at {lsn} is wrong"));
            }
        }
    }
    life.shard.shutdown().await;
    result
}

#[test]
fn a_cutoff_that_is_off_by_one_is_found() {
    for plant in [0, 1] {
        LATE_READ_POINT.set(plant);
        let mut world = SimWorld::new(1, SimOptions::default());
        let model = new_model(1);
        let result = world.run(move |io| read_just_before_an_image(io, model)).unwrap();
        LATE_READ_POINT.set(0);
        assert_eq!(result.is_err(), plant > 0, "{result:?}");
    }
}
