//! The campaign of damage: random bit flips, truncations and swapped blocks in layer files of the
//! shape that real ones have. For every mutation:
//! 1. `verify` refuses the file: 100 %, because every byte of a file is checked by it;
//! 2. every read gives an error or what it gave before the damage, byte for byte;
//! 3. nothing panics.
//!
//! `LAYER_MUTATIONS` sets the number of mutations (`make soak` runs 100,000); `LAYER_SEED` the
//! seed. A failure names seed and mutation.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use fastrand::Rng;
use futures_lite::future::block_on;

use super::*;
use crate::base::key::{FORK_MAIN, FORK_VM};
use crate::base::page::PAGE_SIZE;
use crate::base::{RelNode, SmallRecord, TenantId};
use crate::io::{ALIGNMENT, DirEntry, File, Instant, Io, IoCause, IoError, TaskClass};
use crate::sim::wal::{BlockName, Body, WalWriter};

const MUTATIONS: u64 = 4_000;

type Content = Rc<RefCell<Vec<u8>>>;

/// Files in memory, without faults, time or tasks: as fast as it gets.
#[derive(Clone, Default)]
struct MemoryIo {
    files: Rc<RefCell<BTreeMap<PathBuf, Content>>>,
}

struct MemoryFile(Content);

fn missing(path: &Path) -> IoError {
    IoError { operation: "open", path: path.to_owned(), cause: IoCause::NotFound }
}

impl Io for MemoryIo {
    type File = MemoryFile;
    async fn create(&self, path: &Path) -> Result<MemoryFile, IoError> {
        let file = Content::default();
        self.files.borrow_mut().insert(path.to_owned(), file.clone());
        Ok(MemoryFile(file))
    }
    async fn open(&self, path: &Path) -> Result<MemoryFile, IoError> {
        self.files.borrow().get(path).cloned().map(MemoryFile).ok_or_else(|| missing(path))
    }
    async fn rename(&self, source: &Path, target: &Path) -> Result<(), IoError> {
        let file = self.files.borrow_mut().remove(source).ok_or_else(|| missing(source))?;
        self.files.borrow_mut().insert(target.to_owned(), file);
        Ok(())
    }
    async fn remove(&self, path: &Path) -> Result<(), IoError> {
        self.files.borrow_mut().remove(path).map(|_| ()).ok_or_else(|| missing(path))
    }
    async fn create_dir(&self, _: &Path) -> Result<(), IoError> {
        Ok(())
    }
    async fn remove_dir_all(&self, _: &Path) -> Result<(), IoError> {
        Ok(())
    }
    async fn list(&self, _: &Path) -> Result<Vec<DirEntry>, IoError> {
        Ok(Vec::new())
    }
    async fn sync_dir(&self, _: &Path) -> Result<(), IoError> {
        Ok(())
    }
    fn now(&self) -> Instant {
        Instant::ZERO
    }
    fn unix_time_us(&self) -> i64 {
        0
    }
    fn random_u64(&self) -> u64 {
        4
    }
    async fn sleep(&self, _: Duration) {}
    async fn yield_if_needed(&self) {}
    fn spawn(&self, _: TaskClass, _: impl Future<Output = ()> + 'static) {
        panic!("layers start no tasks");
    }
}

impl File for MemoryFile {
    type ReadBuf = Vec<u8>;
    type WriteBuf = Vec<u8>;
    fn alloc(&self, len: usize) -> Vec<u8> {
        vec![0; len]
    }
    async fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
        assert!(offset.is_multiple_of(ALIGNMENT as u64) && len.is_multiple_of(ALIGNMENT));
        let bytes = self.0.borrow();
        let start = bytes.len().min(offset as usize);
        Ok(bytes[start..bytes.len().min(start + len)].to_vec())
    }
    async fn write_at(&self, offset: u64, buf: Vec<u8>) -> Result<(), IoError> {
        let mut bytes = self.0.borrow_mut();
        let end = offset as usize + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(&buf);
        Ok(())
    }
    async fn allocate(&self, _: u64) -> Result<(), IoError> {
        Ok(())
    }
    async fn sync(&self) -> Result<(), IoError> {
        Ok(())
    }
    async fn len(&self) -> Result<u64, IoError> {
        Ok(self.0.borrow().len() as u64)
    }
    async fn close(self) -> Result<(), IoError> {
        Ok(())
    }
}

fn owner() -> LayerOwner {
    let shard = TenantShardId::unsharded(TenantId([0x11; 16]));
    LayerOwner { shard, timeline: TimelineId([0x22; 16]) }
}

const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };
const START: u64 = 0x200_0000;

/// A heap page as they are: a header, line pointers, a hole, tuples that look alike.
fn page(rng: &mut Rng) -> Bytes {
    let mut page = vec![0; PAGE_SIZE];
    page[..8].copy_from_slice(&rng.u64(..).to_le_bytes());
    let tuples = rng.usize(0..60);
    for n in 0..tuples {
        page[24 + 4 * n..28 + 4 * n].copy_from_slice(&(n as u32 * 128).to_le_bytes());
        let at = PAGE_SIZE - 100 * (n + 1);
        page[at..at + 4].copy_from_slice(&rng.u32(1000..2000).to_le_bytes());
        page[at + 20..at + 90].fill(b' ');
        page[at + 20..at + 28].copy_from_slice(&rng.u64(..).to_le_bytes());
    }
    page.into()
}

/// Real WAL records of random updates of a table with a full image now and then, and the small
/// values beside them.
fn delta_values(rng: &mut Rng) -> Vec<(Key, Lsn, Value)> {
    let mut wal = WalWriter::new(Lsn(START), 1 << 24, 7);
    let mut values = Vec::new();
    for xid in 0..1200u32 {
        let block = rng.u32(0..300);
        let name = BlockName { node: [1663, 5, 16384], fork: 0, block };
        let (body, init) = match rng.u8(..10) {
            0 => (Body::default().image(0, name, &page(rng)).finish(&[7; 14]), true),
            _ => {
                let tuple: Vec<u8> = (0..rng.usize(20..120)).map(|_| rng.u8(..)).collect();
                (Body::default().block(0, name, false, &tuple).finish(&[1; 14]), false)
            }
        };
        let (start, end) = wal.append(xid, 0, 10, &body);
        let record = wal.record(start, 24 + body.len()).into();
        let key = Key::rel_block(REL.fork(FORK_MAIN), block);
        values.push((key, end, Value::WalRecord { will_init: init, record }));
        if rng.u8(..8) == 0 {
            let small = SmallRecord::VmClear { flags: 3, heap_blocks: [Some(block), None] };
            values.push((Key::rel_block(REL.fork(FORK_VM), 0), end, Value::Small(small)));
        }
        if rng.u8(..40) == 0 {
            values.push((Key::rel_block(REL.fork(FORK_VM), 1), end, Value::ZeroPage));
            let size = Value::Image(block.to_le_bytes().to_vec().into());
            values.push((Key::rel_size(REL.fork(FORK_MAIN)), end, size));
        }
    }
    values.sort_by_key(|(key, lsn, _)| (*key, *lsn));
    values
}

async fn delta_layer(io: &MemoryIo, rng: &mut Rng) -> LayerDesc {
    let lsns = Lsn(START)..Lsn(START + (1 << 23));
    let mut writer = DeltaWriter::create(io, Path::new(""), owner(), lsns).await.unwrap();
    for (key, lsn, value) in delta_values(rng) {
        writer.add(key, lsn, &value).await.unwrap();
    }
    writer.finish(Key::MIN..Key::MAX).await.unwrap()
}

async fn image_layer(io: &MemoryIo, rng: &mut Rng) -> LayerDesc {
    let mut writer = ImageWriter::create(io, Path::new(""), owner(), Lsn(START)).await.unwrap();
    for block in 0..60 {
        let value = match rng.u8(..8) {
            0 => Value::ZeroPage,
            1 => Value::Image((0..PAGE_SIZE).map(|_| rng.u8(..)).collect()),
            _ => Value::Image(page(rng)),
        };
        writer.add(Key::rel_block(REL.fork(FORK_MAIN), block), &value).await.unwrap();
    }
    let size = Value::Image(60u32.to_le_bytes().to_vec().into());
    writer.add(Key::rel_size(REL.fork(FORK_MAIN)), &size).await.unwrap();
    writer.add(Key::CHECKPOINT, &Value::Image(vec![1; 88].into())).await.unwrap();
    writer.finish(Key::MIN..Key::MAX).await.unwrap()
}

type Answer = (Vec<(Lsn, Value)>, Lookup);

/// What a reader gets out of a layer: every key alone, and all in one scan.
struct Truth {
    path: PathBuf,
    name: LayerName,
    bytes: Vec<u8>,
    collected: Vec<(Key, Answer)>,
    scanned: Newest,
}

const ALL_LSNS: std::ops::Range<Lsn> = Lsn(0)..Lsn(u64::MAX);

async fn open(io: &MemoryIo, name: &LayerName) -> Result<FileLayer<MemoryIo>, LayerError> {
    let cache = Rc::new(BlockCache::new(8 << 20));
    FileLayer::open(io, Path::new(""), name, owner(), cache).await
}

async fn truth(io: &MemoryIo, desc: &LayerDesc) -> Truth {
    let path = PathBuf::from(desc.name.to_string());
    let bytes = io.open(&path).await.unwrap().0.borrow().clone();
    let layer = open(io, &desc.name).await.unwrap();
    let mut scanned = Newest::new();
    layer.scan(&(Key::MIN..Key::MAX), Lsn::MAX, &mut scanned).await.unwrap();
    let mut collected = Vec::new();
    for key in scanned.keys() {
        let mut out = Vec::new();
        let lookup = layer.collect(*key, &ALL_LSNS, &mut out).await.unwrap();
        collected.push((*key, (out, lookup)));
    }
    layer.close().await.unwrap();
    verify(io, &path).await.unwrap();
    Truth { path, name: desc.name.clone(), bytes, collected, scanned }
}

/// Damages a file in one of the ways in which devices do. Never gives the same bytes.
fn mutate(right: &[u8], other: &[u8], rng: &mut Rng) -> (String, Vec<u8>) {
    loop {
        let mut bytes = right.to_vec();
        let blocks = bytes.len() / ALIGNMENT;
        let block = |n: usize| n * ALIGNMENT..(n + 1) * ALIGNMENT;
        let what = match rng.u8(..10) {
            0..=4 => {
                let (at, bit) = (rng.usize(..bytes.len()), rng.u8(..8));
                bytes[at] ^= 1 << bit;
                format!("bit {bit} of byte {at} flipped")
            }
            5 => {
                let bits = rng.usize(2..64);
                for _ in 0..bits {
                    let at = rng.usize(..bytes.len());
                    bytes[at] ^= 1 << rng.u8(..8);
                }
                format!("{bits} bits flipped")
            }
            6 => {
                // Mostly as a device truncates, by blocks.
                let len = rng.usize(..bytes.len());
                let len = if rng.u8(..4) > 0 { len / ALIGNMENT * ALIGNMENT } else { len };
                bytes.truncate(len);
                format!("cut off at {len}")
            }
            7 => {
                let (a, b) = (rng.usize(..blocks), rng.usize(..blocks));
                let (left, right_block) = (bytes[block(a)].to_vec(), bytes[block(b)].to_vec());
                bytes[block(a)].copy_from_slice(&right_block);
                bytes[block(b)].copy_from_slice(&left);
                format!("blocks {a} and {b} swapped")
            }
            8 => {
                // A write that went astray: a block of another layer file, or of this one.
                let (a, b) = (rng.usize(..blocks), rng.usize(..other.len() / ALIGNMENT));
                bytes[block(a)].copy_from_slice(&other[block(b)]);
                format!("block {a} replaced by block {b} of another file")
            }
            _ => {
                let sector = rng.usize(..bytes.len() / 512) * 512;
                let len = 512 * rng.usize(1..9);
                let end = bytes.len().min(sector + len);
                bytes[sector..end].fill(if rng.bool() { 0 } else { 0xFF });
                format!("bytes {sector} to {end} lost")
            }
        };
        if bytes != right {
            return (what, bytes);
        }
    }
}

/// What became of one mutation.
#[derive(Default, Debug)]
struct Tally {
    refused_at_open: u64,
    refused_in_reads: u64,
    /// Damage where no reader looks; `verify` finds it.
    only_verify: u64,
}

async fn endure(io: &MemoryIo, truth: &Truth, bytes: Vec<u8>, turn: usize, tally: &mut Tally) {
    *io.open(&truth.path).await.unwrap().0.borrow_mut() = bytes;
    let verified = verify(io, &truth.path).await;
    assert!(verified.is_err(), "verify says that the file is sound");
    let layer = match open(io, &truth.name).await {
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
        Err(_) => {
            refused = true;
            // What it had gathered by then is right.
            for (key, found) in &scanned {
                assert!(truth.scanned.get(key).is_some_and(|(lsn, _)| found.0 <= *lsn), "{key:?}");
            }
        }
    }
    // Every key in turn over a few mutations, and all of them where something was refused.
    let step = if refused { 1 } else { 5 };
    for (key, right) in truth.collected.iter().skip(turn % step).step_by(step) {
        let mut out = Vec::new();
        match layer.collect(*key, &ALL_LSNS, &mut out).await {
            Ok(lookup) => assert!((out, lookup) == *right, "{key:?} reads otherwise"),
            Err(error) => {
                refused = true;
                assert!(matches!(error, LayerError::Damaged { .. }), "{error}");
                assert!(right.0.starts_with(&out), "{key:?} gives wrong values before the error");
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

#[test]
fn damage_is_always_detected_and_never_served() {
    let (mutations, seed) = (number("LAYER_MUTATIONS", MUTATIONS), number("LAYER_SEED", 1));
    let mut rng = Rng::with_seed(seed);
    let io = MemoryIo::default();
    let mut tally = Tally::default();
    block_on(async {
        let descs = [delta_layer(&io, &mut rng).await, image_layer(&io, &mut rng).await];
        let truths = [truth(&io, &descs[0]).await, truth(&io, &descs[1]).await];
        for truth in &truths {
            assert!(truth.bytes.len() > 100_000, "{} is small", truth.name);
        }
        for turn in 0..mutations {
            let (truth, other) = match turn % 2 {
                0 => (&truths[0], &truths[1]),
                _ => (&truths[1], &truths[0]),
            };
            let other = if rng.bool() { &other.bytes } else { &truth.bytes };
            let (what, bytes) = mutate(&truth.bytes, other, &mut rng);
            let guard = Announce(format!("seed {seed}, mutation {turn} of {}: {what}", truth.name));
            endure(&io, truth, bytes, turn as usize, &mut tally).await;
            drop(guard);
        }
    });
    println!("{mutations} mutations, all detected, no wrong byte: {tally:?}");
    let all = tally.refused_at_open + tally.refused_in_reads + tally.only_verify;
    assert_eq!(all, mutations);
    assert!(tally.refused_at_open > 0 && tally.refused_in_reads > mutations / 2);
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
