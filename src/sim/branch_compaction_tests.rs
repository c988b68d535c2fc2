//! A branch that takes in WAL for long: it is compacted like any other timeline, from images that
//! are its ancestor's at first.

use std::time::Duration;

use super::engine::{Outside, TENANT, TIMELINE, catch_up, check_page, import, start};
use super::{SimIo, SimOptions, SimWorld, story_seeds};
use crate::base::TimelineId;
use crate::io::Io;
use crate::shard::control::{Change, CoreControl, CreateBranch};
use crate::shard::gc::GcRequest;
use crate::shard::index::WalSourceConfig;
use crate::shard::reader::PageBackend;

const BRANCH: TimelineId = TimelineId([7; 16]);
/// WAL that the branch takes in, in bytes.
const WAL_BYTES: u64 = 3 << 20;

async fn story(io: SimIo, outside: std::rc::Rc<Outside>) -> Result<(), String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    import(io.clone()).await?;
    let (shard, root) = start(&io, &outside).await?;
    while root.lsns().last_record.bytes_since(root.start_lsn()) < WAL_BYTES / 4 {
        io.sleep(Duration::from_millis(5)).await;
    }
    let ends = outside.primary.borrow().record_ends().to_vec();
    let last = root.lsns().last_record;
    let lsn = ends.into_iter().rfind(|end| *end <= last).ok_or("no record")?;
    let source = Some(WalSourceConfig { conninfo: "host=primary user=u".into(), slot: None });
    let branch = CreateBranch {
        tenant: TENANT,
        timeline: BRANCH,
        ancestor: TIMELINE,
        lsn: Some(lsn),
        source,
    };
    shard.change(Change::Branch(branch)).await.map_err(|error| text(&error))?;
    let timeline = shard.timeline(TENANT, BRANCH).await.map_err(|error| text(&error))?;
    while timeline.lsns().last_record.bytes_since(lsn) < WAL_BYTES {
        io.sleep(Duration::from_millis(5)).await;
        check_page(&timeline, &outside, &io).await?;
    }
    outside.quiet.set(true);
    let end = outside.primary.borrow().record_ends().last().copied().ok_or("no record")?;
    catch_up(&timeline, end, 100).await?;
    shard.checkpoint(TENANT, BRANCH).await.map_err(|error| text(&error))?;
    while timeline.compact_once().await.map_err(|error| text(&error))? {}
    let (images, before) = timeline.layer_counts();
    if images == 0 {
        return Err(format!("{before} layers, and no images"));
    }
    let all = GcRequest { gc_horizon_bytes: Some(0), pitr_interval_s: Some(0) };
    let collected = timeline.collect_garbage(all, || Ok(Vec::new())).await;
    collected.map_err(|error| text(&error))?;
    let (_, after) = timeline.layer_counts();
    if after >= before {
        return Err(format!("{before} layers, and none was collected"));
    }
    for _ in 0..100 {
        check_page(&timeline, &outside, &io).await?;
        check_page(&root, &outside, &io).await?;
    }
    let failures = shard.metrics().compaction_page_failures;
    if failures > 0 {
        return Err(format!("{failures} pages could not be rebuilt for compaction"));
    }
    shard.shutdown().await;
    Ok(())
}

#[test]
fn a_branch_gets_images_and_its_history_goes() {
    for seed in story_seeds(12) {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        outside.compaction.set(Some((2, [10, 50][seed as usize % 2])));
        outside.layer_bytes.set(Some((64 << 10, 32 << 10)));
        let done = world.run(move |io| story(io, outside)).unwrap_or_else(|_| Err("stuck".into()));
        done.unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
}
