//! `pgstrata check` on the directory of a simulated node: silent on a sound one, also while the
//! node runs; every kind of damage is found and named.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::engine::{Outside, START, import, start, timeline_dir};
use super::lifecycle_tests::{self, branch};
use super::{Outcome, SimIo, SimOptions, SimWorld, story_seeds};
use crate::base::{Lsn, TenantId, TenantShardId, TimelineId};
use crate::io::{File, Io, TaskClass, durable};
use crate::layers::LayerName;
use crate::limits::JOURNAL_SEGMENT_BYTES;
use crate::shard::check::check;
use crate::shard::check::report::{FileKind, FileReport, Severity, Summary};
use crate::shard::control::{Change, CoreControl};
use crate::shard::index::{BranchPoint, DELETED_FILE, INDEX_FILE, TimelineIndex};
use crate::shard::journal_mark::{JOURNAL_MARK_FILE, encode};
use crate::shard::leases::{LEASES_FILE, Leases};
use crate::shard::tenant_config::{CONFIG_FILE, TenantConfig};
use crate::shard::timestamps::{COMMIT_TIMES_FILE, CommitTimes};
use crate::sim::engine::{TENANT, TIMELINE};
use crate::wal::journal::segment_name;

/// What a check says, file by file.
async fn look(io: &SimIo) -> (Vec<FileReport>, Summary) {
    let mut reports = Vec::new();
    let summary = check(io, Path::new("data"), &mut |one| reports.push(one.clone())).await;
    (reports, summary.unwrap())
}

/// The damage that a check finds: file name and text.
pub(super) async fn damage(io: &SimIo) -> Vec<(String, String)> {
    let (reports, summary) = look(io).await;
    let mut found = Vec::new();
    for report in &reports {
        let name = report.path.file_name().unwrap().to_string_lossy().into_owned();
        let texts = report.findings.iter().filter(|one| one.severity == Severity::Damage);
        found.extend(texts.map(|finding| (name.clone(), finding.text.clone())));
    }
    assert_eq!(summary.damaged_files > 0, !found.is_empty());
    found
}

async fn contents(io: &SimIo, path: &Path) -> Vec<u8> {
    let file = io.open(path).await.unwrap();
    let len = file.len().await.unwrap();
    let bytes = file.read_at(0, len as usize).await.unwrap().to_vec();
    file.close().await.unwrap();
    bytes
}

async fn replace(io: &SimIo, path: &Path, bytes: &[u8]) {
    let _ = io.remove(path).await;
    let file = io.create(path).await.unwrap();
    for (index, chunk) in bytes.chunks(1 << 20).enumerate() {
        let mut buf = file.alloc(chunk.len().next_multiple_of(4096));
        buf[..chunk.len()].copy_from_slice(chunk);
        file.write_at((index << 20) as u64, buf).await.unwrap();
    }
    file.close().await.unwrap();
}

async fn read_index(io: &SimIo) -> TimelineIndex {
    let bytes = durable::read_file(io, &timeline_dir().join(INDEX_FILE)).await.unwrap();
    TimelineIndex::decode(&bytes).unwrap()
}

async fn write_index(io: &SimIo, index: &TimelineIndex) {
    let path = timeline_dir().join(INDEX_FILE);
    durable::write_file_atomic(io, &path, &index.encode()).await.unwrap();
}

/// Runs a node until it has a few layers, and WAL in its journal that is in none of them; stops
/// it and hands its directory to `test`.
fn with_node<F: Future<Output = ()> + 'static>(seed: u64, test: impl FnOnce(SimIo) -> F + 'static) {
    let options = SimOptions { steps_max: u64::MAX, ..SimOptions::default() };
    let mut world = SimWorld::new(seed, options);
    let outside = Outside::new(seed);
    // An index of earlier is put back below: its layers must still be there.
    outside.compaction.set(Some((usize::MAX, 10)));
    let story = move |io: SimIo| async move {
        import(io.clone()).await.unwrap();
        let (shard, timeline) = start(&io, &outside).await.unwrap();
        let mut index = read_index(&io).await;
        while index.layers.len() < 4 {
            io.sleep(Duration::from_millis(1)).await;
            index = read_index(&io).await;
        }
        while timeline.lsns().journal.bytes_since(index.disk_consistent_lsn) < 60_000 {
            io.sleep(Duration::from_millis(1)).await;
        }
        // The stop writes everything to layers, so the clock is put back to what was before.
        shard.shutdown().await;
        write_index(&io, &index).await;
        for entry in io.list(&timeline_dir()).await.unwrap() {
            let is_named = index.layers.iter().any(|layer| layer.name == entry.name);
            if !entry.is_dir && entry.name != INDEX_FILE && !is_named {
                io.remove(&timeline_dir().join(&entry.name)).await.unwrap();
            }
        }
    };
    world.run(story).unwrap();
    world.run(test).unwrap();
}

#[test]
fn a_sound_directory_is_silent() {
    with_node(1, |io| async move {
        let (reports, summary) = look(&io).await;
        assert!(reports.iter().all(|one| one.findings.is_empty()), "{reports:?}");
        assert!(reports.iter().all(|one| !one.content.is_empty()), "{reports:?}");
        assert_eq!((summary.tenants, summary.timelines), (1, 1));
        assert!(summary.files[&FileKind::DeltaLayer].files >= 3, "{summary:?}");
        assert_eq!(summary.files[&FileKind::ImageLayer].files, 1);
        assert!(summary.files[&FileKind::JournalSegment].files >= 1);
        assert!(summary.records > 10 && summary.values > 100, "{summary:?}");
        let index = read_index(&io).await;
        let named: u64 = index.layers.iter().map(|layer| layer.len).sum();
        let layers = [FileKind::DeltaLayer, FileKind::ImageLayer];
        assert_eq!(named, layers.iter().map(|kind| summary.files[kind].bytes).sum::<u64>());
    });
}

#[test]
fn a_running_node_is_not_called_damaged() {
    for seed in 0..2 {
        let mut world =
            SimWorld::new(seed, SimOptions { steps_max: u64::MAX, ..SimOptions::varied(seed) });
        let outside = Outside::new(seed);
        let story = move |io: SimIo| async move {
            import(io.clone()).await.unwrap();
            let (shard, _timeline) = start(&io, &outside).await.unwrap();
            for _ in 0..4 {
                io.sleep(Duration::from_micros(io.random_u64() % 10_000)).await;
                assert_eq!(damage(&io).await, [], "seed {seed}");
            }
            shard.shutdown().await;
            assert_eq!(damage(&io).await, [], "seed {seed}");
        };
        world.run(story).unwrap();
    }
}

#[test]
fn a_crash_damages_nothing_but_the_end_of_a_journal() {
    let mut torn = 0;
    for seed in story_seeds(6) {
        let mut world = SimWorld::new(seed, SimOptions::varied(seed));
        let outside = Outside::new(seed);
        world.run(import).unwrap().unwrap();
        for life in 0..4 {
            let (steps, shared) = (1_000 + world.draw("life", 4_000), outside.clone());
            let lived = world.run_steps(steps, move |io| async move {
                let _node = start(&io, &shared).await.unwrap();
                io.sleep(Duration::from_secs(3600)).await;
            });
            assert!(matches!(lived, Ok(Outcome::Stopped { .. })), "{lived:?}");
            if life % 2 == 0 {
                world.crash();
            }
            let found = world.run(|io| async move { look(&io).await.0 }).unwrap();
            for report in found.iter().filter(|report| report.is_damaged()) {
                assert_eq!(report.kind, FileKind::JournalSegment, "seed {seed}: {report:?}");
                assert!(report.findings.iter().all(|one| one.text.contains("breaks off at")));
                torn += 1;
            }
        }
        // Once the WAL has come in again, there is nothing to see any more.
        let end = outside.primary.borrow().record_ends().last().copied().unwrap();
        let story = move |io: SimIo| async move {
            let (shard, timeline) = start(&io, &outside).await.unwrap();
            timeline.wait_for_lsn(end).await.unwrap();
            shard.shutdown().await;
            assert_eq!(damage(&io).await, [], "seed {seed}");
        };
        world.run(story).unwrap();
    }
    println!("{torn} journals ended in whole records behind a torn one");
}

/// Exactly one file is damaged, and this is said of it.
async fn only(io: &SimIo, name: &str, part: &str) {
    let found = damage(io).await;
    assert!(!found.is_empty(), "{name} is damaged ({part}), nothing was found");
    for (file, text) in &found {
        assert_eq!(file, name, "{text}");
    }
    assert!(found.iter().any(|(_, text)| text.contains(part)), "'{part}' is not in {found:?}");
}

#[test]
fn damaged_layers_are_named() {
    with_node(2, |io| async move {
        let index = read_index(&io).await;
        for layer in &index.layers {
            let path = timeline_dir().join(&layer.name);
            let right = contents(&io, &path).await;
            for at in [3, 4096 + 9, right.len() / 2, right.len() - 5000, right.len() - 9] {
                let mut wrong = right.clone();
                wrong[at] ^= 4;
                replace(&io, &path, &wrong).await;
                only(&io, &layer.name, "is damaged").await;
            }
            replace(&io, &path, &right[..right.len() - 4096]).await;
            only(&io, &layer.name, "is damaged").await;
            replace(&io, &path, &[]).await;
            only(&io, &layer.name, "is damaged").await;
            io.remove(&path).await.unwrap();
            only(&io, &layer.name, "no such file").await;
            replace(&io, &path, &right).await;
        }
        let [one, two] = [1, 2].map(|n| timeline_dir().join(&index.layers[n].name));
        let (first, second) = (contents(&io, &one).await, contents(&io, &two).await);
        replace(&io, &one, &second).await;
        only(&io, &index.layers[1].name, "another one than expected").await;
        replace(&io, &one, &first).await;
        assert_eq!(damage(&io).await, []);
    });
}

#[test]
fn a_wrong_index_is_named() {
    with_node(3, |io| async move {
        let right = read_index(&io).await;
        let mut wrong = right.clone();
        wrong.layers[1].len += 4096;
        write_index(&io, &wrong).await;
        only(&io, &right.layers[1].name, "the index says").await;
        wrong = right.clone();
        wrong
            .layers
            .retain(|layer| layer.name.parse().is_ok_and(|name: LayerName| name.is_delta()));
        write_index(&io, &wrong).await;
        only(&io, INDEX_FILE, "no image layer").await;
        wrong = right.clone();
        wrong.disk_consistent_lsn = Lsn(0x100_0028);
        write_index(&io, &wrong).await;
        only(&io, INDEX_FILE, "beyond disk_consistent_lsn").await;
        wrong = right.clone();
        wrong.tenant = TenantShardId::unsharded(TenantId([7; 16]));
        write_index(&io, &wrong).await;
        only(&io, INDEX_FILE, "of timeline").await;
        // Without an index the layers are looked at all the same.
        let path = timeline_dir().join(INDEX_FILE);
        let mut bytes = contents(&io, &path).await;
        bytes[40] ^= 1;
        replace(&io, &path, &bytes).await;
        let layer = timeline_dir().join(&right.layers[2].name);
        let mut bytes = contents(&io, &layer).await;
        bytes[5000] ^= 1;
        replace(&io, &layer, &bytes).await;
        let found = damage(&io).await;
        let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, [INDEX_FILE, right.layers[2].name.as_str()], "{found:?}");
    });
}

#[test]
fn a_layer_of_another_timeline_is_refused() {
    with_node(4, |io| async move {
        // The whole timeline under another name: the index and each layer say whose they are.
        let index = read_index(&io).await;
        let other = Path::new("data/tenants").join(TENANT.to_string()).join("timelines");
        let other = other.join("ff".repeat(16));
        io.create_dir(&other).await.unwrap();
        let layer = &index.layers[1].name;
        for name in [INDEX_FILE, layer] {
            let bytes = contents(&io, &timeline_dir().join(name)).await;
            replace(&io, &other.join(name), &bytes).await;
        }
        let found = damage(&io).await;
        assert_eq!(found.len(), 2, "{found:?}");
        let part = format!("of timeline {TIMELINE}");
        assert!(found.iter().all(|(_, text)| text.contains(&part)), "{found:?}");
    });
}

/// The segment where the journal begins, and the offset of `disk_consistent_lsn` in it.
async fn journal(io: &SimIo) -> (PathBuf, String, usize) {
    let from = read_index(io).await.disk_consistent_lsn;
    let name = segment_name(1, from.segment_number(JOURNAL_SEGMENT_BYTES));
    let offset = from.segment_offset(JOURNAL_SEGMENT_BYTES) as usize;
    (timeline_dir().join("wal").join(&name), name, offset)
}

#[test]
fn a_damaged_journal_is_named() {
    with_node(5, |io| async move {
        let (path, name, from) = journal(&io).await;
        let right = contents(&io, &path).await;
        let used = from + right[from..].iter().rposition(|byte| *byte != 0).unwrap();
        assert!(used - from > 40_000 && used < right.len() - 4096, "{from} {used}");
        // Every flipped bit is found, but for the padding of records, of pages and what stands in
        // the last record, which may be a write that a crash cut short.
        let (mut found, mut tried) = (0, 0);
        for at in (from..used - 16_000).step_by(4777) {
            let mut wrong = right.clone();
            wrong[at] ^= 0x10;
            replace(&io, &path, &wrong).await;
            let text = damage(&io).await;
            tried += 1;
            found += usize::from(!text.is_empty());
            for (file, text) in &text {
                assert_eq!(file, &name);
                assert!(text.contains("breaks off at"), "{text}");
            }
        }
        assert!(tried > 5 && found * 10 >= tried * 9, "{found} of {tried} flips were found");
        let zeroed = |range: std::ops::Range<usize>| {
            let mut wrong = right.clone();
            wrong[range].fill(0);
            wrong
        };
        let page = (from + 8192).next_multiple_of(8192);
        replace(&io, &path, &zeroed(page..page + 8192)).await;
        only(&io, &name, "there are zeros").await;
        replace(&io, &path, &right[..used.next_multiple_of(4096)]).await;
        only(&io, &name, "cut off").await;
        replace(&io, &path, &[]).await;
        only(&io, &name, "is missing or cut off").await;
        io.remove(&path).await.unwrap();
        only(&io, &name, "is missing or cut off").await;
        // A torn end is none of these.
        replace(&io, &path, &zeroed(used - 100..right.len())).await;
        let (reports, summary) = look(&io).await;
        assert_eq!((summary.damaged_files, summary.notes), (0, 0), "{reports:?}");
    });
}

#[test]
fn what_nobody_needs_is_no_damage() {
    with_node(6, |io| async move {
        let dir = timeline_dir();
        let index = read_index(&io).await;
        let is_delta = |name: &str| name.parse().is_ok_and(|name: LayerName| name.is_delta());
        let one = index.layers.iter().position(|layer| is_delta(&layer.name)).unwrap();
        let layer = contents(&io, &dir.join(&index.layers[one].name)).await;
        let mut wrong = index.clone();
        wrong.layers.remove(one);
        write_index(&io, &wrong).await;
        replace(&io, &dir.join("0123456789abcdef.tmp"), &layer[..8192]).await;
        replace(&io, &dir.join("notes.txt"), b"hello").await;
        replace(&io, &dir.join("wal").join(segment_name(1, 0)), &[]).await;
        replace(&io, &dir.join("wal").join(segment_name(2, 9)), &[]).await;
        io.create_dir(Path::new("data/tenants/lost+found")).await.unwrap();
        let (reports, summary) = look(&io).await;
        assert_eq!((summary.damaged_files, summary.notes), (0, 6), "{reports:?}");
        assert_eq!(summary.files[&FileKind::Leftover].files, 3);
        assert_eq!(summary.files[&FileKind::Unknown].files, 3);
        // Another small file is checked as such.
        let path = dir.join("more");
        durable::write_file_atomic(&io, &path, b"content").await.unwrap();
        assert_eq!(look(&io).await.1.files[&FileKind::SmallFile].files, 1);
        let mut bytes = contents(&io, &path).await;
        bytes[30] ^= 1;
        replace(&io, &path, &bytes).await;
        only(&io, "more", "checksum").await;
        // Without an index there is no timeline.
        io.remove(&path).await.unwrap();
        io.remove(&dir.join(INDEX_FILE)).await.unwrap();
        let (reports, summary) = look(&io).await;
        assert_eq!((summary.damaged_files, summary.notes), (0, 2), "{reports:?}");
    });
}

/// A small file is what its name says, whatever is left of its content.
#[test]
fn damaged_small_files_are_named() {
    with_node(7, |io| async move {
        let tenant = timeline_dir().parent().unwrap().parent().unwrap().to_owned();
        let files = [
            (tenant.join(CONFIG_FILE), TenantConfig::default().encode()),
            (timeline_dir().join(LEASES_FILE), Leases::default().encode()),
            (timeline_dir().join(COMMIT_TIMES_FILE), CommitTimes::default().encode(Lsn(7))),
            (timeline_dir().join(JOURNAL_MARK_FILE), encode(TIMELINE, Lsn(7))),
            (timeline_dir().join(DELETED_FILE), Vec::new()),
        ];
        for (path, body) in files {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            durable::write_file_atomic(&io, &path, &body).await.unwrap();
            assert_eq!(damage(&io).await, []);
            let right = contents(&io, &path).await;
            for (at, part) in [(0, "magic number"), (9, "header"), (24, "header")] {
                let mut wrong = right.clone();
                wrong[at] ^= 1;
                replace(&io, &path, &wrong).await;
                only(&io, &name, part).await;
            }
            // Whole, but not what the node could read.
            durable::write_file_atomic(&io, &path, b"rubbish").await.unwrap();
            only(&io, &name, "").await;
            io.remove(&path).await.unwrap();
            io.create_dir(&path).await.unwrap();
            only(&io, &name, "directory").await;
            io.remove_dir_all(&path).await.unwrap();
        }
        // What is left of a deleted timeline is not looked at, but its mark is.
        let index = timeline_dir().join(INDEX_FILE);
        io.rename(&index, &timeline_dir().join(DELETED_FILE)).await.unwrap();
        assert_eq!(damage(&io).await, []);
        assert!(look(&io).await.1.notes > 0);
    });
}

/// Writes the index of a branch of the timeline; nothing else is needed for one.
async fn write_branch(io: &SimIo, id: TimelineId, change: impl FnOnce(&mut TimelineIndex)) {
    let mut index = read_index(io).await;
    index.timeline = id;
    index.layers.clear();
    index.ancestor = Some(BranchPoint { timeline: TIMELINE, lsn: index.disk_consistent_lsn });
    change(&mut index);
    let dir = timeline_dir().parent().unwrap().join(id.to_string());
    io.create_dir(&dir).await.unwrap();
    durable::write_file_atomic(io, &dir.join(INDEX_FILE), &index.encode()).await.unwrap();
}

#[test]
fn timelines_that_do_not_fit_together_are_named() {
    with_node(8, |io| async move {
        let (one, two) = (TimelineId([0xb; 16]), TimelineId([0xc; 16]));
        write_branch(&io, one, |_| {}).await;
        write_branch(&io, two, |_| {}).await;
        assert_eq!(damage(&io).await, []);
        // What only the journal of the ancestor has is its history, too.
        let later = read_index(&io).await.disk_consistent_lsn.0 + 30_000;
        let at = |lsn: u64| {
            move |index: &mut TimelineIndex| {
                index.ancestor = Some(BranchPoint { timeline: TIMELINE, lsn: Lsn(lsn) });
                index.disk_consistent_lsn = index.disk_consistent_lsn.max(Lsn(lsn));
            }
        };
        write_branch(&io, one, at(later - later % 8)).await;
        assert_eq!(damage(&io).await, []);
        write_branch(&io, one, at(later + (1 << 30))).await;
        only(&io, INDEX_FILE, "ends").await;
        write_branch(&io, one, at(8)).await;
        only(&io, INDEX_FILE, "begins").await;
        let of = |timeline| {
            move |index: &mut TimelineIndex| index.ancestor.as_mut().unwrap().timeline = timeline
        };
        write_branch(&io, one, of(TimelineId([9; 16]))).await;
        only(&io, INDEX_FILE, "is not there").await;
        write_branch(&io, one, of(two)).await;
        write_branch(&io, two, of(one)).await;
        only(&io, INDEX_FILE, "leads back").await;
        assert_eq!(damage(&io).await.len(), 2);
        write_branch(&io, two, |_| {}).await;
        let late = |index: &mut TimelineIndex| index.gc_cutoff_lsn.0 += 1 << 30;
        write_branch(&io, one, late).await;
        only(&io, INDEX_FILE, "gc_cutoff_lsn").await;
    });
}

#[test]
fn timelines_that_come_and_go_are_not_called_damaged() {
    lifecycle_tests::with_tree(|io, shard, outside, _| async move {
        let over = Rc::new(Cell::new(false));
        let (task_io, task_shard, told) = (io.clone(), shard.clone(), over.clone());
        io.spawn(TaskClass::Serve, async move {
            for round in 0..12 {
                let [one, two] = [1, 2].map(|n| TimelineId([round * 2 + n + 0x20; 16]));
                task_shard.change(branch(one, TIMELINE, None)).await.unwrap();
                task_shard.change(branch(two, one, None)).await.unwrap();
                task_io.sleep(Duration::from_millis(u64::from(round) * 7)).await;
                task_shard.change(Change::DeleteTimeline(TENANT, two)).await.unwrap();
                task_shard.change(Change::DeleteTimeline(TENANT, one)).await.unwrap();
            }
            told.set(true);
        });
        let mut looks = 0;
        while !over.get() {
            assert_eq!(damage(&io).await, []);
            looks += 1;
        }
        assert!(looks > 2 && outside.primary.borrow().end() > START);
        shard.shutdown().await;
        assert_eq!(damage(&io).await, []);
    });
}

#[test]
fn a_directory_that_is_none_cannot_be_checked() {
    let mut world = SimWorld::new(0, SimOptions::default());
    let checked = world.run(|io| async move {
        io.create_dir(Path::new("data")).await.unwrap();
        check(&io, Path::new("data"), &mut |_| {}).await
    });
    assert!(checked.unwrap().is_err());
}
