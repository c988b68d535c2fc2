//! The engine passes its seeds, and bugs that are planted in it are found.

use std::cell::Cell;
use std::thread::LocalKey;

use super::*;
use crate::base::Key;
use crate::limits::COMPACT_L0_INPUT_BYTES_MAX;
use crate::shard::compact::{MERGE_BYTES_MAX, PLANTED, Planted, WRITTEN};
use crate::shard::gc::GcRequest;
use crate::shard::get_page::{CANARY_STALE_PAGES, CANARY_WRONG_END};
use crate::shard::held::CANARY_NOT_THE_NEWEST;
use crate::shard::reader::ReadError;
use crate::sim::check_seeds;

/// A planted bug must be found within this many seeds.
const CANARY_SEEDS: u64 = 50;

/// Seeds of which each is run twice, to see that a seed decides everything.
const TWICE: u64 = 50;

#[test]
fn seeds_are_deterministic() {
    check_seeds("seeds_are_deterministic", 0..TWICE, scenario).unwrap();
}

fn all_pass(seeds: std::ops::Range<u64>) {
    for seed in seeds {
        if let Err(problem) = scenario(seed) {
            panic!("seed {seed}: {problem}\nreplay: pgstrata simulate --seed {seed}");
        }
    }
}

// A thousand seeds, in two parts for two cores.

#[test]
fn the_first_500_seeds_pass() {
    all_pass(0..500);
}

#[test]
fn the_next_500_seeds_pass() {
    all_pass(500..1000);
}

fn found(plant: Plant) -> Option<(u64, String)> {
    (0..CANARY_SEEDS).find_map(|seed| Some((seed, calm(seed, plant).err()?)))
}

#[test]
fn a_skipped_file_sync_is_found() {
    let (seed, problem) = found(Plant::FileSync).expect("the planted bug was not found");
    println!("found at seed {seed}: {problem}");
}

#[test]
fn a_skipped_directory_sync_is_found() {
    let (seed, problem) = found(Plant::DirSync).expect("the planted bug was not found");
    println!("found at seed {seed}: {problem}");
}

fn is_found(canary: &'static LocalKey<Cell<bool>>) {
    canary.set(true);
    let result = found(Plant::Nothing);
    canary.set(false);
    let (seed, problem) = result.expect("the planted bug was not found");
    println!("found at seed {seed}: {problem}");
}

fn planted_is_found(bug: Planted) {
    planted_is_found_within(CANARY_SEEDS, bug);
}

fn planted_is_found_within(seeds: u64, bug: Planted) {
    PLANTED.set(Some(bug));
    let result = (0..seeds).find_map(|seed| Some((seed, calm(seed, Plant::Nothing).err()?)));
    PLANTED.set(None);
    let (seed, problem) = result.unwrap_or_else(|| panic!("{bug:?} was not found"));
    println!("{bug:?} found at seed {seed}: {problem}");
}

#[test]
fn inputs_removed_before_the_index_are_found() {
    planted_is_found(Planted::RemoveBeforeIndex);
}

#[test]
fn inputs_kept_beside_their_merge_are_found() {
    planted_is_found(Planted::KeepInputs);
}

#[test]
fn values_lost_in_a_merge_are_found() {
    planted_is_found(Planted::DropValues);
}

#[test]
fn an_image_with_a_wrong_lsn_is_found() {
    planted_is_found(Planted::ImageLsn);
}

#[test]
fn an_image_without_the_newest_delta_is_found() {
    planted_is_found(Planted::StaleImages);
}

/// Every page as of some records after `lsn`.
async fn check_after(
    timeline: &Timeline<SimIo>,
    outside: &Outside,
    lsn: Lsn,
) -> Result<(), String> {
    let (at, forks) = {
        let primary = outside.primary.borrow();
        let ends = primary.record_ends();
        let after = ends.partition_point(|end| *end <= lsn) + 10;
        let at = ends.get(after).copied().unwrap_or(lsn);
        (at.min(timeline.lsns().last_record), primary.forks())
    };
    let request = RequestLsn { request: at, not_modified_since: at };
    for (rel, block) in forks.iter().flat_map(|rel| (0..28).map(move |block| (*rel, block))) {
        let page = timeline.get_page(rel, block, request).await.map_err(|e| e.to_string())?;
        if page != outside.primary.borrow().page_at(rel, block, at) {
            return Err(format!("{rel} block {block} at {at} is wrong"));
        }
    }
    Ok(())
}

/// Some records, which go to a layer.
async fn layer(
    (shard, timeline): &(SimShard, Rc<Timeline<SimIo>>),
    outside: &Outside,
    records: usize,
) -> Result<(), String> {
    for _ in 0..records {
        outside.primary.borrow_mut().step();
    }
    let end = outside.primary.borrow().record_ends().last().copied();
    let came = timeline.wait_for_lsn(end.unwrap_or(Lsn::INVALID)).await;
    came.map_err(|error| error.to_string())?;
    shard.checkpoint(TENANT, TIMELINE).await.map_err(|error| error.to_string())
}

/// So often some records, which go to a layer, and an image of everything behind it. Ends when at
/// most `l0_max` L0 layers are left.
async fn layers_and_images(
    io: SimIo,
    outside: Rc<Outside>,
    (rounds, records, l0_max): (usize, usize, usize),
) -> Result<Vec<Lsn>, String> {
    let started = start(&io, &outside).await?;
    let (shard, timeline) = &started;
    let mut images = Vec::new();
    for _ in 0..rounds {
        layer(&started, &outside, records).await?;
        images.extend(timeline.make_image_layer(Key::MIN..Key::MAX).await?);
    }
    while timeline.l0_count() > l0_max {
        io.sleep(Duration::from_millis(1)).await;
    }
    shard.shutdown().await;
    Ok(images)
}

async fn read_above(io: SimIo, outside: Rc<Outside>, images: Vec<Lsn>) -> Result<(), String> {
    let (shard, timeline) = start(&io, &outside).await?;
    for image in images {
        check_after(&timeline, &outside, image).await?;
    }
    shard.shutdown().await;
    Ok(())
}

/// A world in which tests decide when there are records and layers.
fn by_hand(seed: u64, options: SimOptions) -> Result<(SimWorld, Rc<Outside>), String> {
    let mut world = SimWorld::new(seed, options);
    let outside = Outside::new(seed);
    outside.large_layers.set(true);
    outside.quiet.set(true);
    world.run(import).map_err(|error| error.to_string())??;
    Ok((world, outside))
}

/// Layers between images are merged into some that reach below images.
fn merge_across_images(seed: u64) -> Result<(), String> {
    let (mut world, outside) = by_hand(seed, SimOptions::varied(seed))?;
    let mut live = |threshold, what| {
        outside.compaction.set(Some((threshold, 1_000_000)));
        let outside = outside.clone();
        let images = world.run(move |io| layers_and_images(io, outside, what));
        images.map_err(|error| error.to_string())?
    };
    // Most pages get their base in layers of their own. Then few records and no merge; then that.
    live(1, (1, 500, 0))?;
    let images = live(usize::MAX, (10, 40, usize::MAX))?;
    live(2, (0, 0, 1))?;
    assert!(images.len() == 10, "only {} images", images.len());
    world.run(move |io| read_above(io, outside, images)).map_err(|error| error.to_string())?
}

#[test]
fn merges_across_images_are_read_right() {
    for seed in 0..3 {
        merge_across_images(seed).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
    }
    PLANTED.set(Some(Planted::ReadBelowImage));
    let found = (0..3).find_map(|seed| merge_across_images(seed).err());
    PLANTED.set(None);
    println!("found: {}", found.expect("the planted bug was not found"));
}

/// Layers of records that need what is before them, each with so many.
async fn layers(
    started: &(SimShard, Rc<Timeline<SimIo>>),
    outside: &Outside,
    count: usize,
) -> Result<(), String> {
    for _ in 0..count {
        layer(started, outside, 3_000).await?;
        outside.primary.borrow_mut().without_bases();
    }
    Ok(())
}

/// Three layers of which a lease holds the first, an image above them, and the collection that
/// takes the others away; then more layers.
async fn layers_with_a_hole(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let started = start(&io, &outside).await?;
    let timeline = &started.1;
    layers(&started, &outside, 1).await?;
    let lease = timeline.lease(timeline.lsns().last_record, Some(1_000)).await;
    lease.map_err(|error| error.to_string())?;
    layers(&started, &outside, 2).await?;
    let image = timeline.make_image_layer(Key::MIN..Key::MAX).await?;
    let collected = timeline.collect_garbage(GcRequest::default(), || Ok(Vec::new())).await;
    let collected = collected.map_err(|error| error.to_string())?;
    assert!(image.is_some() && timeline.l0_count() == 1, "{collected:?}");
    layers(&started, &outside, 2).await?;
    started.0.shutdown().await;
    Ok(())
}

/// Waits until all layers are merged. Gives the end.
async fn merge_all(io: SimIo, outside: Rc<Outside>) -> Result<Vec<Lsn>, String> {
    let started = start(&io, &outside).await?;
    while started.1.l0_count() > 0 {
        io.sleep(Duration::from_millis(1)).await;
    }
    let end = started.1.lsns().last_record;
    started.0.shutdown().await;
    Ok(vec![end])
}

/// A merge takes layers of which garbage collection has removed some between.
fn merge_across_a_hole(seed: u64) -> Result<(), String> {
    let (mut world, outside) = by_hand(seed, SimOptions::varied(seed))?;
    let (first, second) = (outside.clone(), outside.clone());
    outside.compaction.set(Some((usize::MAX, 1_000_000)));
    let made = world.run(move |io| layers_with_a_hole(io, first));
    made.map_err(|error| error.to_string())??;
    outside.compaction.set(Some((2, 1_000_000)));
    let end = world.run(move |io| merge_all(io, second));
    let end = end.map_err(|error| error.to_string())??;
    world.run(move |io| read_above(io, outside, end)).map_err(|error| error.to_string())?
}

#[test]
fn a_merge_across_what_was_collected_makes_right_images() {
    for seed in 0..3 {
        WRITTEN.set([0; 5]);
        merge_across_a_hole(seed).unwrap_or_else(|problem| panic!("seed {seed}: {problem}"));
        let [l0, _, _, pages, _] = WRITTEN.get();
        assert!(l0 > 0 && pages > 0, "{l0} merges made {pages} pages");
    }
}

/// Layers with an image behind the second, without compaction.
async fn layers_below_an_image(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let started = start(&io, &outside).await?;
    layers(&started, &outside, 2).await?;
    started.1.make_image_layer(Key::MIN..Key::MAX).await?;
    layers(&started, &outside, 1).await?;
    started.0.shutdown().await;
    Ok(())
}

/// All layers are being merged when those below the image are collected.
async fn collect_while_merging(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let started = start(&io, &outside).await?;
    let (shard, timeline) = &started;
    io.sleep(Duration::from_millis(1)).await;
    let collected = timeline.collect_garbage(GcRequest::default(), || Ok(Vec::new())).await;
    assert_eq!(collected.map(|report| report.layers_removed).ok(), Some(3), "two and an image");
    while timeline.l0_count() > 0 {
        io.sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(shard.metrics().compaction_failures, 0);
    check_after(timeline, &outside, timeline.lsns().last_record).await?;
    started.0.shutdown().await;
    Ok(())
}

#[test]
fn a_merge_goes_on_when_inputs_are_collected() {
    for seed in 0..3 {
        let (mut world, outside) = by_hand(seed, SimOptions::default()).unwrap();
        outside.background_slowness.set(50);
        let (first, second) = (outside.clone(), outside.clone());
        outside.compaction.set(Some((usize::MAX, 1_000_000)));
        world.run(move |io| layers_below_an_image(io, first)).unwrap().unwrap();
        outside.compaction.set(Some((3, 1_000_000)));
        WRITTEN.set([0; 5]);
        world.run(move |io| collect_while_merging(io, second)).unwrap().unwrap();
        assert_eq!(WRITTEN.get()[0], 1, "merges");
    }
}

/// Blocks that are read for all pages after four layers were merged into others.
async fn reads_after_a_merge(
    io: SimIo,
    outside: Rc<Outside>,
    asked_before: bool,
) -> Result<u64, String> {
    let started = start(&io, &outside).await?;
    let (shard, timeline) = &started;
    layers(&started, &outside, 3).await?;
    if asked_before {
        check_after(timeline, &outside, timeline.lsns().last_record).await?;
    }
    layers(&started, &outside, 1).await?;
    while timeline.l0_count() > 0 {
        io.sleep(Duration::from_millis(1)).await;
    }
    let before = shard.metrics().block_cache_misses;
    check_after(timeline, &outside, timeline.lsns().last_record).await?;
    let reads = shard.metrics().block_cache_misses - before;
    started.0.shutdown().await;
    Ok(reads)
}

#[test]
fn pages_that_were_asked_for_are_in_the_cache_after_a_merge() {
    let reads = |asked_before| {
        let (mut world, outside) = by_hand(1, SimOptions::default()).unwrap();
        outside.cache_bytes.set(Some(64 << 20));
        outside.compaction.set(Some((4, 1_000_000)));
        world.run(move |io| reads_after_a_merge(io, outside, asked_before)).unwrap().unwrap()
    };
    assert_eq!(reads(true), 0);
    assert!(reads(false) > 10);
}

/// Reads every page as a backup does, and as clients do.
async fn reads_of_both_kinds(io: SimIo, outside: Rc<Outside>) -> Result<(), String> {
    let started = start(&io, &outside).await?;
    let (shard, timeline) = &started;
    layers(&started, &outside, 1).await?;
    let lsn = timeline.lsns().last_record;
    let (rel, blocks) = {
        let primary = outside.primary.borrow();
        let rels = primary.forks().into_iter().map(|rel| (rel, primary.size_at(rel, lsn)));
        rels.max_by_key(|(_, blocks)| *blocks).ok_or("no fork")?
    };
    let text = |error: ReadError| error.to_string();
    for block in 0..blocks {
        timeline.page_at_branch(rel, block, lsn).await.map_err(text)?;
    }
    assert_eq!(shard.metrics().page_cache_bytes, 0);
    let request = RequestLsn { request: lsn, not_modified_since: lsn };
    for block in 0..blocks {
        timeline.get_page(rel, block, request).await.map_err(text)?;
        timeline.get_page(rel, block, request).await.map_err(text)?;
    }
    let kept = shard.metrics();
    assert!(kept.page_cache_bytes > 0 && kept.page_cache_hits > 0);
    started.0.shutdown().await;
    Ok(())
}

#[test]
fn only_what_clients_ask_for_is_kept() {
    let (mut world, outside) = by_hand(1, SimOptions::default()).unwrap();
    outside.compaction.set(Some((usize::MAX, 1_000_000)));
    world.run(move |io| reads_of_both_kinds(io, outside)).unwrap().unwrap();
}

#[test]
fn every_kind_of_compaction_happens() {
    let written = |seeds: std::ops::Range<u64>| {
        WRITTEN.set([0; 5]);
        for seed in seeds {
            calm(seed, Plant::Nothing).unwrap();
        }
        let [l0, l1, images, pages, rows] = WRITTEN.get();
        println!(
            "{l0} merges of L0, {rows} of them with L1, {l1} of L1, {images} of images, {pages} \
             pages"
        );
        WRITTEN.get()
    };
    let [l0, _, images, pages, rows] = written(0..20);
    assert!(l0 > 50 && rows > 5 && images > 50 && pages > 100);
    // As if all rows were too large.
    MERGE_BYTES_MAX.set(1);
    let [_, l1, ..] = written(20..40);
    MERGE_BYTES_MAX.set(COMPACT_L0_INPUT_BYTES_MAX);
    assert!(l1 > 5);
}

#[test]
fn pages_are_read_with_and_without_waiting() {
    HELD.set([0; 2]);
    for seed in 0..20 {
        calm(seed, Plant::Nothing).unwrap();
    }
    let [told, not] = HELD.get();
    assert!(told > 300 && not > 300, "{told} told, {not} not");
}

#[test]
fn a_held_page_that_is_not_the_newest_is_found() {
    is_found(&CANARY_NOT_THE_NEWEST);
}

#[test]
fn a_rebuilt_page_that_is_used_for_too_long_is_found() {
    is_found(&CANARY_STALE_PAGES);
}

#[test]
fn a_range_closed_at_the_wrong_end_is_found() {
    is_found(&CANARY_WRONG_END);
}
