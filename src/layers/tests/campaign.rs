//! The campaign of damage: random bit flips, truncations and swapped blocks in layer files of
//! every form, as their writers make them. For every mutation:
//! 1. `verify`, told whose file it should be, refuses the file: 100 %, because every byte of a
//!    file is checked by it;
//! 2. every read gives an error or what it gave before the damage, byte for byte;
//! 3. nothing panics.
//!
//! Each file stands on two timelines, under the same name and with other content, so that a block
//! or a whole file can stray from one to the other.
//!
//! To be quick: a mutation is read by `verify`, by one scan, and key by key where the damage is,
//! which the reads of the undamaged file tell; other keys are drawn, and all are read now and
//! then.
//!
//! `LAYER_MUTATIONS` sets the number of mutations (`make soak` runs 100,000 and more); `LAYER_SEED`
//! the seed. A failure names seed and mutation.

mod files;
mod memory;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use fastrand::Rng;
use futures_lite::future::block_on;

use crate::base::{Key, Lsn};
use crate::io::ALIGNMENT;
use crate::layers::*;
use files::{Form, dir, make, owner};
use memory::MemoryIo;

const MUTATIONS: u64 = 4_000;
/// The large files have one mutation in so many: they take long.
const LARGE_EVERY: u64 = 200;
/// All keys are read after one mutation in so many.
const ALL_KEYS_EVERY: u64 = 32;
/// Keys that are read wherever the damage is.
const DRAWN_KEYS: usize = 8;
/// Most keys of a file that are ever read alone.
const KEYS_MAX: usize = 2_000;

const SMALL_FORMS: [Form; 6] = [
    Form::DeltaPacked,
    Form::DeltaRaw,
    Form::DeltaOneKey,
    Form::ImagePacked,
    Form::ImageRaw,
    Form::ImageMixed,
];
const TIMELINES: [u8; 2] = [0x22, 0x33];

type Answer = (Values, Lookup);

/// What is read of one key.
struct Asked {
    key: Key,
    right: Answer,
    /// The device blocks that the answer came from.
    blocks: Vec<usize>,
}

/// What a reader gets out of a layer: every key alone, and all in one scan.
struct Truth {
    owner: LayerOwner,
    path: PathBuf,
    name: LayerName,
    bytes: Vec<u8>,
    asked: Vec<Asked>,
    scanned: Newest,
}

const ALL_LSNS: std::ops::Range<Lsn> = Lsn(0)..Lsn(u64::MAX);

async fn open(
    io: &MemoryIo,
    owner: LayerOwner,
    name: &LayerName,
    cache_bytes: usize,
) -> Result<FileLayer<MemoryIo>, LayerError> {
    let cache = Rc::new(BlockCache::new(cache_bytes));
    FileLayer::open(io, &dir(owner), name, owner, cache).await
}

impl Truth {
    async fn new(io: &MemoryIo, owner: LayerOwner, path: PathBuf, desc: &LayerDesc) -> Truth {
        let layer = open(io, owner, &desc.name, 0).await.unwrap();
        let mut scanned = Newest::new();
        layer.scan(&(Key::MIN..Key::MAX), Lsn::MAX, &mut scanned).await.unwrap();
        let mut asked = Vec::new();
        let step = scanned.len().div_ceil(KEYS_MAX);
        for key in scanned.keys().step_by(step) {
            io.take_reads();
            let mut out = Vec::new();
            let lookup = layer.collect(*key, &ALL_LSNS, &mut out).await.unwrap().lookup;
            let block = |at: u64| at as usize / ALIGNMENT;
            let blocks = io.take_reads().into_iter().flat_map(|r| block(r.start)..block(r.end));
            asked.push(Asked { key: *key, right: (out, lookup), blocks: blocks.collect() });
        }
        layer.close().await.unwrap();
        let verified = verify(io, &path).await.unwrap();
        assert_eq!((verified.owner, &verified.desc), (owner, desc));
        let bytes = io.get(&path);
        Truth { owner, path, name: desc.name.clone(), bytes, asked, scanned }
    }
}

/// The files that stand in for one another.
struct Family<'a> {
    /// The file that is damaged.
    right: &'a [u8],
    /// One of the same timeline under another name.
    neighbour: &'a [u8],
    /// That of the same name on another timeline.
    twin: &'a [u8],
}

fn range(block: usize, count: usize) -> std::ops::Range<usize> {
    block * ALIGNMENT..(block + count) * ALIGNMENT
}

/// A run of blocks of `other` is put into `bytes`, as a rule at the place where it stood.
fn stray_blocks(bytes: &mut [u8], other: &[u8], rng: &mut Rng) {
    let (blocks, others) = (bytes.len() / ALIGNMENT, other.len() / ALIGNMENT);
    let count = 1 + rng.usize(..blocks.min(others).min(4));
    let to = rng.usize(..=blocks - count);
    let from = match rng.bool() {
        true => to.min(others - count),
        false => rng.usize(..=others - count),
    };
    bytes[range(to, count)].copy_from_slice(&other[range(from, count)]);
}

/// Damages a file in one of the ways in which devices and people do; says in which.
fn mutate_once(family: &Family<'_>, rng: &mut Rng) -> (&'static str, Vec<u8>) {
    let mut bytes = family.right.to_vec();
    let blocks = bytes.len() / ALIGNMENT;
    let what = match rng.u8(..20) {
        0..=4 => {
            let at = rng.usize(..bytes.len());
            bytes[at] ^= 1 << rng.u8(..8);
            "one bit flipped"
        }
        5 | 6 => {
            for _ in 0..rng.usize(2..64) {
                let at = rng.usize(..bytes.len());
                bytes[at] ^= 1 << rng.u8(..8);
            }
            "several bits flipped"
        }
        7 | 8 => {
            // Mostly as a device truncates, by blocks.
            let len = rng.usize(..bytes.len());
            bytes.truncate(if rng.u8(..4) > 0 { len / ALIGNMENT * ALIGNMENT } else { len });
            "cut off"
        }
        9 => {
            let other = if rng.bool() { family.twin } else { family.neighbour };
            let count = 1 + rng.usize(..other.len() / ALIGNMENT);
            bytes.extend_from_slice(&other[other.len() - count * ALIGNMENT..]);
            "lengthened"
        }
        10 | 11 => {
            let sector = rng.usize(..bytes.len() / 512) * 512;
            let end = bytes.len().min(sector + 512 * rng.usize(1..9));
            bytes[sector..end].fill(if rng.bool() { 0 } else { 0xFF });
            "sectors lost"
        }
        12..=14 => {
            // Up to four device blocks, for what stands in two of its own is exchanged whole.
            let count = 1 + rng.usize(..4.min(blocks / 2));
            let a = rng.usize(..=blocks - 2 * count);
            let b = rng.usize(a + count..=blocks - count);
            let (left, right) = (bytes[range(a, count)].to_vec(), bytes[range(b, count)].to_vec());
            bytes[range(a, count)].copy_from_slice(&right);
            bytes[range(b, count)].copy_from_slice(&left);
            "blocks swapped"
        }
        15 | 16 => {
            stray_blocks(&mut bytes, family.neighbour, rng);
            "blocks of another layer"
        }
        17 | 18 => {
            stray_blocks(&mut bytes, family.twin, rng);
            "blocks of another timeline"
        }
        _ if rng.bool() => {
            bytes = family.neighbour.to_vec();
            "another layer's file"
        }
        _ => {
            bytes = family.twin.to_vec();
            "another timeline's file"
        }
    };
    (what, bytes)
}

/// The same; never gives the bytes that were there before.
fn mutate(family: &Family<'_>, rng: &mut Rng) -> (&'static str, Vec<u8>) {
    loop {
        let (what, bytes) = mutate_once(family, rng);
        if bytes != family.right {
            return (what, bytes);
        }
    }
}

/// What became of the mutations of one kind.
#[derive(Default, Debug)]
struct Tally {
    refused_at_open: u64,
    refused_in_reads: u64,
    /// Damage where no reader looks; `verify` finds it.
    only_verify: u64,
}

impl Tally {
    fn all(&self) -> u64 {
        self.refused_at_open + self.refused_in_reads + self.only_verify
    }
}

/// Puts a damaged file in place, and reads it in every way.
async fn endure(
    io: &MemoryIo,
    truth: &Truth,
    bytes: Vec<u8>,
    all_keys: bool,
    rng: &mut Rng,
    tally: &mut Tally,
) {
    let blocks = truth.bytes.chunks(ALIGNMENT).enumerate();
    let damaged: Vec<bool> = blocks
        .map(|(n, right)| bytes.get(range(n, 1)).is_none_or(|found| found != right))
        .collect();
    io.put(&truth.path, bytes);
    let verified = verify(io, &truth.path).await;
    let is_sound = verified.is_ok_and(|verified| verified.owner == truth.owner);
    assert!(!is_sound, "verify says that the file is sound");
    let layer = match open(io, truth.owner, &truth.name, 8 << 20).await {
        Ok(layer) => layer,
        Err(_) => {
            tally.refused_at_open += 1;
            return;
        }
    };
    let mut refused = false;
    let mut scanned = Newest::new();
    match layer.scan(&(Key::MIN..Key::MAX), Lsn::MAX, &mut scanned).await {
        Ok(()) => assert!(scanned == truth.scanned, "a scan gives something else"),
        Err(error) => {
            refused = true;
            assert!(matches!(error, LayerError::Damaged { .. }), "{error}");
            // What it had gathered by then is right: another version of the key only if the
            // newest was still to come.
            for (key, found) in &scanned {
                let right = &truth.scanned[key];
                assert!(found == right || found.0 < right.0, "{key:?}");
            }
        }
    }
    for asked in &truth.asked {
        let near = asked.blocks.iter().any(|block| damaged[*block]);
        if !near && !all_keys && rng.usize(..truth.asked.len()) >= DRAWN_KEYS {
            continue;
        }
        let mut out = Vec::new();
        match layer.collect(asked.key, &ALL_LSNS, &mut out).await {
            Ok(answer) => {
                assert!((out, answer.lookup) == asked.right, "{:?} reads otherwise", asked.key)
            }
            Err(error) => {
                refused = true;
                assert!(matches!(error, LayerError::Damaged { .. }), "{error}");
                let right = asked.right.0.starts_with(&out);
                assert!(right, "{:?} gives wrong values before the error", asked.key);
            }
        }
    }
    layer.close().await.unwrap();
    match refused {
        true => tally.refused_in_reads += 1,
        false => tally.only_verify += 1,
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Two layers of each form on each timeline, or one of the large form: timeline, then form and
/// number.
async fn truths(io: &MemoryIo, forms: &[Form], rng: &mut Rng) -> Vec<Vec<Truth>> {
    let mut all = Vec::new();
    for timeline in TIMELINES {
        let mut truths = Vec::new();
        for (form, number) in forms.iter().flat_map(|form| [(*form, 0), (*form, 1)]) {
            let (path, desc) = make(io, owner(timeline), form, number, rng).await;
            let truth = Truth::new(io, owner(timeline), path, &desc).await;
            let (len, keys) = (truth.bytes.len(), truth.asked.len());
            assert!(len >= 8 * ALIGNMENT, "{form:?} has {len} bytes");
            if timeline == TIMELINES[0] && number == 0 {
                println!("{form:?}: {len} bytes, {} values, {keys} keys read", desc.value_count);
            }
            truths.push(truth);
        }
        all.push(truths);
    }
    all
}

#[test]
fn damage_is_always_detected_and_never_served() {
    let (mutations, seed) = (number("LAYER_MUTATIONS", MUTATIONS), number("LAYER_SEED", 1));
    let mut rng = Rng::with_seed(seed);
    let io = MemoryIo::default();
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    let begin = Instant::now();
    block_on(async {
        let small = truths(&io, &SMALL_FORMS, &mut rng).await;
        let large = truths(&io, &[Form::DeltaLarge], &mut rng).await;
        for turn in 0..mutations {
            let files = if turn % LARGE_EVERY == LARGE_EVERY - 1 { &large } else { &small };
            let side = rng.usize(..files.len());
            let place = rng.usize(..files[side].len());
            let truth = &files[side][place];
            let other = (place + rng.usize(1..files[side].len())) % files[side].len();
            let family = Family {
                right: &truth.bytes,
                neighbour: &files[side][other].bytes,
                twin: &files[1 - side][place].bytes,
            };
            let (what, bytes) = mutate(&family, &mut rng);
            let tally = tallies.entry(what).or_default();
            let guard = Announce(format!("seed {seed}, mutation {turn} of {}: {what}", truth.name));
            let all_keys = turn % ALL_KEYS_EVERY == 0;
            endure(&io, truth, bytes, all_keys, &mut rng, tally).await;
            drop(guard);
        }
    });
    for (what, tally) in &tallies {
        println!("{:>7} {what}: {tally:?}", tally.all());
    }
    let took = begin.elapsed().as_secs_f64();
    println!("{mutations} mutations, all detected, no wrong byte, {took:.1} s");
    assert_eq!(tallies.values().map(Tally::all).sum::<u64>(), mutations);
    assert_eq!(tallies.len(), 10);
    for (what, tally) in &tallies {
        assert!(tally.all() > mutations / 100, "{what}: {tally:?}");
    }
    let in_reads: u64 = tallies.values().map(|tally| tally.refused_in_reads).sum();
    assert!(in_reads > mutations / 4, "{in_reads}");
}

/// Says what was going on when an assertion fails.
struct Announce(String);

impl Drop for Announce {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.0);
        }
    }
}
