//! The end of a journal: damage is told from it, and nothing that was acknowledged is taken for it.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::engine::{
    Outside, START, SimShard, TENANT, TIMELINE, check_page, import, start, start_shard,
    timeline_dir,
};
use super::{Outcome, SimIo, SimOptions, SimWorld, story_seeds};
use crate::base::Lsn;
use crate::io::{File, Io, durable};
use crate::limits::JOURNAL_SEGMENT_BYTES;
use crate::shard::check::check;
use crate::shard::check::report::Severity;
use crate::shard::control::CoreControl;
use crate::shard::index::INDEX_FILE;
use crate::shard::journal_mark::{JOURNAL_MARK_FILE, decode};
use crate::shard::reader::PageBackend;
use crate::wal::journal::segment_name;
use crate::wal::journal_aside::parse_aside_name;

/// The journal's only segment.
fn segment() -> PathBuf {
    timeline_dir().join("wal").join(segment_name(1, START.segment_number(JOURNAL_SEGMENT_BYTES)))
}

async fn mark(io: &SimIo) -> Option<Lsn> {
    let bytes = durable::read_file(io, &timeline_dir().join(JOURNAL_MARK_FILE)).await.ok()?;
    Some(decode(TIMELINE, &bytes).unwrap())
}

async fn contents(io: &SimIo, path: &Path) -> Vec<u8> {
    let file = io.open(path).await.unwrap();
    let len = file.len().await.unwrap().max(4096);
    let bytes = file.read_at(0, len as usize).await.unwrap().to_vec();
    file.close().await.unwrap();
    bytes
}

/// The names that were kept of damaged segments.
async fn kept(io: &SimIo) -> Vec<String> {
    let entries = io.list(&timeline_dir().join("wal")).await.unwrap();
    let names = entries.into_iter().map(|entry| entry.name);
    names.filter(|name| parse_aside_name(name).is_some()).collect()
}

fn damaged(shard: &SimShard) -> Vec<String> {
    let infos = shard.timelines();
    infos.into_iter().find(|info| info.timeline == TIMELINE).unwrap().damaged
}

/// What `pgstrata check` calls damage.
async fn found(io: &SimIo) -> Vec<String> {
    let mut texts = Vec::new();
    let mut note = |report: &crate::shard::check::report::FileReport| {
        let damage = report.findings.iter().filter(|one| one.severity == Severity::Damage);
        texts.extend(damage.map(|one| one.text.clone()));
    };
    check(io, Path::new("data"), &mut note).await.unwrap();
    texts
}

/// Leaves a timeline whose journal has all of its WAL, more than 100,000 bytes, synced and marked.
async fn prepare(io: &SimIo, outside: &Rc<Outside>) {
    import(io.clone()).await.unwrap();
    let path = timeline_dir().join(INDEX_FILE);
    let index = durable::read_file(io, &path).await.unwrap();
    outside.large_layers.set(true);
    let (shard, timeline) = start(io, outside).await.unwrap();
    while timeline.lsns().journal.bytes_since(START) < 100_000 {
        io.sleep(Duration::from_millis(1)).await;
    }
    outside.quiet.set(true);
    while mark(io).await.is_none_or(|lsn| lsn < timeline.lsns().last_record) {
        io.sleep(Duration::from_millis(50)).await;
    }
    shard.shutdown().await;
    // The stop has written everything to layers; they are left out again.
    durable::write_file_atomic(io, &path, &index).await.unwrap();
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    /// One bit in the midst, whole records behind it.
    Bit,
    /// Zeros to the end.
    Zeros,
    /// The segment is gone.
    Missing,
}

impl Harm {
    async fn strike(self, io: &SimIo) {
        let path = segment();
        if let Harm::Missing = self {
            return io.remove(&path).await.unwrap();
        }
        let mut bytes = contents(io, &path).await;
        match self {
            Harm::Bit => bytes[40_000] ^= 4,
            Harm::Zeros | Harm::Missing => bytes[40_000..].fill(0),
        }
        let file = io.open(&path).await.unwrap();
        for (number, chunk) in bytes.chunks(1 << 20).enumerate() {
            let mut buf = file.alloc(chunk.len());
            buf.copy_from_slice(chunk);
            file.write_at((number << 20) as u64, buf).await.unwrap();
        }
        file.close().await.unwrap();
    }
}

#[test]
fn acknowledged_wal_behind_damage_is_kept_and_named() {
    for harm in [Harm::Bit, Harm::Zeros, Harm::Missing] {
        let mut world =
            SimWorld::new(1, SimOptions { steps_max: u64::MAX, ..SimOptions::varied(1) });
        let outside = Outside::new(1);
        let story = move |io: SimIo| async move {
            prepare(&io, &outside).await;
            assert_eq!(found(&io).await, [""; 0]);
            harm.strike(&io).await;
            let told = found(&io).await;
            assert!(told.iter().any(|text| text.contains("synced")), "{harm:?}: {told:?}");
            let before = match harm {
                Harm::Missing => Vec::new(),
                Harm::Bit | Harm::Zeros => contents(&io, &segment()).await,
            };
            // Less than was acknowledged, which `start` would not have.
            let shard = start_shard(&io, &outside).await.unwrap();
            let timeline = shard.timeline(TENANT, TIMELINE).await.unwrap();
            assert!(timeline.lsns().last_record < outside.acknowledged.get());
            let names = kept(&io).await;
            assert_eq!(names.len(), 1, "{harm:?}");
            let told = damaged(&shard);
            assert!(told.len() == 1 && told[0].contains(&names[0]), "{harm:?}: {told:?}");
            // All of it comes again from the source.
            outside.quiet.set(false);
            let end = outside.primary.borrow().end().0 + 200_000;
            timeline.wait_for_lsn(Lsn(end)).await.unwrap();
            for _ in 0..20 {
                check_page(&timeline, &outside, &io).await.unwrap();
            }
            shard.shutdown().await;
            let aside = timeline_dir().join("wal").join(&names[0]);
            assert!(contents(&io, &aside).await == before, "{harm:?}: it was overwritten");
            assert_eq!(found(&io).await, [""; 0], "{harm:?}");
            // It is named until somebody removes it, and found once.
            let (shard, _timeline) = start(&io, &outside).await.unwrap();
            assert_eq!(damaged(&shard), told, "{harm:?}");
            assert!(shard.timelines().iter().all(|info| info.error.is_none()));
            shard.shutdown().await;
            io.remove(&aside).await.unwrap();
            let (shard, timeline) = start(&io, &outside).await.unwrap();
            assert_eq!(damaged(&shard), [""; 0], "{harm:?}");
            check_page(&timeline, &outside, &io).await.unwrap();
            shard.shutdown().await;
        };
        world.run(story).unwrap_or_else(|error| panic!("{harm:?}: {error}"));
    }
}

/// A power loss leaves torn writes, with whole records behind them. They are the end.
#[test]
fn what_was_not_acknowledged_is_no_damage() {
    let mut marked = 0;
    for seed in story_seeds(5) {
        let mut world =
            SimWorld::new(seed, SimOptions { steps_max: u64::MAX, ..SimOptions::varied(seed) });
        let outside = Outside::new(seed);
        world.run(import).unwrap().unwrap();
        for life in 0..2 {
            let (steps, shared) = (22_000 + world.draw("life", 12_000), outside.clone());
            let lived = world.run_steps(steps, move |io| async move {
                let (shard, timeline) = start(&io, &shared).await.unwrap();
                assert_eq!(damaged(&shard), [""; 0]);
                assert_eq!(kept(&io).await, [""; 0]);
                assert!(timeline.lsns().journal >= shared.acknowledged.get(), "life {life}");
                // Long enough for a mark, short of steps.
                shared.quiet.set(false);
                io.sleep(Duration::from_millis(5)).await;
                shared.quiet.set(true);
                io.sleep(Duration::from_millis(1100)).await;
                shared.quiet.set(false);
                io.sleep(Duration::from_secs(3600)).await;
            });
            let lived = lived.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
            assert!(matches!(lived, Outcome::Stopped { .. }));
            world.crash();
            marked += u64::from(world.run(|io| async move { mark(&io).await }).unwrap().is_some());
        }
    }
    assert!(marked > 4, "{marked} marks");
}
