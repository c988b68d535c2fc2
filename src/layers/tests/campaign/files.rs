//! The layer files that the campaign damages: what the writers make of values as real WAL has
//! them, in every form that the format has.

use std::path::{Path, PathBuf};

use bytes::Bytes;
use fastrand::Rng;

use super::memory::MemoryIo;
use crate::base::key::{FORK_MAIN, FORK_VM};
use crate::base::page::PAGE_SIZE;
use crate::base::{Key, Lsn, RelNode, SmallRecord, TenantId, TenantShardId, TimelineId, Value};
use crate::layers::{DeltaWriter, ImageWriter, LayerDesc, LayerOwner};
use crate::sim::wal::{BlockName, Body, WalWriter};

const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };
const START: u64 = 0x200_0000;
/// LSNs that one delta layer spans.
const SPAN: u64 = 1 << 23;

/// What a layer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A delta layer whose blocks lz4 shrinks.
    DeltaPacked,
    /// One whose blocks it does not.
    DeltaRaw,
    /// One whose blocks nearly all hold versions of a single page.
    DeltaOneKey,
    /// Images, packed.
    ImagePacked,
    /// Images as they are, each in two device blocks of its own.
    ImageRaw,
    /// Both, small values, and pages of zeros.
    ImageMixed,
    /// A delta layer with a value that takes several reads, and an index and a filter that are
    /// not read together with the footer.
    DeltaLarge,
}

pub(super) fn owner(timeline: u8) -> LayerOwner {
    let shard = TenantShardId::unsharded(TenantId([0x11; 16]));
    LayerOwner { shard, timeline: TimelineId([timeline; 16]) }
}

/// A directory for each timeline, as on a disk.
pub(super) fn dir(owner: LayerOwner) -> PathBuf {
    PathBuf::from(owner.timeline.to_string())
}

fn random_bytes(len: usize, rng: &mut Rng) -> Vec<u8> {
    (0..len).map(|_| rng.u8(..)).collect()
}

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

/// WAL records of updates of a table with a full image now and then, and the small values beside
/// them. `text`: the tuples look alike.
fn delta_values(
    start: Lsn,
    (updates, blocks, text): (u32, u32, bool),
    rng: &mut Rng,
) -> Vec<(Key, Lsn, Value)> {
    let mut wal = WalWriter::new(start, 1 << 24, 7);
    let mut values = Vec::new();
    for xid in 0..updates {
        let block = rng.u32(0..blocks);
        let name = BlockName { node: [1663, 5, 16384], fork: 0, block };
        let (body, init) = match rng.u8(..40) {
            0 => (Body::default().image(0, name, &page(rng)).finish(&[7; 14]), true),
            _ => {
                let len = rng.usize(20..300);
                let tuple = match text {
                    true => vec![b'a' + rng.u8(..3); len],
                    false => random_bytes(len, rng),
                };
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

/// Many keys, and a record of more than a megabyte.
fn large_values(start: Lsn, rng: &mut Rng) -> Vec<(Key, Lsn, Value)> {
    let key = |block| Key::rel_block(REL.fork(FORK_MAIN), block);
    let value = |block, rng: &mut Rng| match block {
        7 => Value::Image(random_bytes(1_200_000, rng).into()),
        _ => Value::ZeroPage,
    };
    (0..50_000).map(|block| (key(block), Lsn(start.0 + 8), value(block, rng))).collect()
}

async fn delta_layer(
    io: &MemoryIo,
    owner: LayerOwner,
    start: Lsn,
    values: Vec<(Key, Lsn, Value)>,
) -> LayerDesc {
    let lsns = start..Lsn(start.0 + SPAN);
    let mut writer = DeltaWriter::create(io, &dir(owner), owner, lsns, 0).await.unwrap();
    for (key, lsn, value) in values {
        writer.add(key, lsn, &value).await.unwrap();
    }
    writer.finish(Key::MIN..Key::MAX).await.unwrap()
}

async fn image_layer(
    io: &MemoryIo,
    owner: LayerOwner,
    lsn: Lsn,
    form: Form,
    rng: &mut Rng,
) -> LayerDesc {
    let mut writer = ImageWriter::create(io, &dir(owner), owner, lsn, 0).await.unwrap();
    let pages = if form == Form::ImagePacked { 60 } else { 12 };
    for block in 0..pages {
        let value = match (form, block % 3) {
            (Form::ImageMixed, 0) => Value::ZeroPage,
            (Form::ImagePacked, _) | (Form::ImageMixed, 1) => Value::Image(page(rng)),
            _ => Value::Image(random_bytes(PAGE_SIZE, rng).into()),
        };
        writer.add(Key::rel_block(REL.fork(FORK_MAIN), block), &value).await.unwrap();
    }
    let size = Value::Image(pages.to_le_bytes().to_vec().into());
    writer.add(Key::rel_size(REL.fork(FORK_MAIN)), &size).await.unwrap();
    writer.add(Key::CHECKPOINT, &Value::Image(random_bytes(88, rng).into())).await.unwrap();
    writer.finish(Key::MIN..Key::MAX).await.unwrap()
}

/// Makes a layer; its path and what its writer says. `number`: layers of one form on one
/// timeline have different ones, and by it other LSNs.
pub(super) async fn make(
    io: &MemoryIo,
    owner: LayerOwner,
    form: Form,
    number: u64,
    rng: &mut Rng,
) -> (PathBuf, LayerDesc) {
    // Different forms never have the same name.
    let start = Lsn(START + (number * 16 + form as u64) * SPAN);
    let values = match form {
        Form::DeltaPacked => delta_values(start, (900, 60, true), rng),
        Form::DeltaRaw => delta_values(start, (350, 60, false), rng),
        Form::DeltaOneKey => delta_values(start, (350, 1, false), rng),
        Form::DeltaLarge => large_values(start, rng),
        Form::ImagePacked | Form::ImageRaw | Form::ImageMixed => Vec::new(),
    };
    let desc = match values.is_empty() {
        true => image_layer(io, owner, start, form, rng).await,
        false => delta_layer(io, owner, start, values).await,
    };
    (Path::new(&dir(owner)).join(desc.name.to_string()), desc)
}
