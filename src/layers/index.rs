//! Indexes of layer files: which keys are where. Pure.
//!
//! **Delta layer**: one entry for each data block, in order. The blocks lie one after the other
//! from offset 4,096, without gaps, so that lengths tell offsets.
//!
//! | bytes | field |
//! |---|---|
//! | 4 | number of blocks; then for each: |
//! | 18 | key of its first value |
//! | 8 | LSN of its first value |
//! | 4 | length as stored |
//! | 4 | length unpacked |
//! | 4 | number of values |
//! | 4 | CRC-32C of the bytes as stored |
//! | 1 | codec: 0 raw, 1 lz4 block, 2 zstd frame |
//!
//! **Image layer**: runs of keys that differ only in `field6`, which counts up by one. The data
//! region holds the content of each value (without kind byte), in key order. A run:
//!
//! | bytes | field |
//! |---|---|
//! | 18 | first key |
//! | 4 | number of values (1 or more); then for each: |
//! | 1 | form: 0 page of zeros, 1 raw, 2 raw and aligned, 3 lz4 block, 4 zstd frame |
//! | 4 | length as stored; not for form 0 |
//! | 4 | CRC-32C of the bytes as stored; not for form 0 |
//! | 4 | length unpacked; only for forms 3 and 4 |
//!
//! before which stands, in 4 bytes, the number of runs. Each content begins where the one before
//! ended, for form 2 at the next multiple of 4,096 (zeros between): a raw page is two whole device
//! blocks. A page of zeros has no content.

use bytes::BufMut;

use crate::base::key::KEY_SIZE;
use crate::base::{Key, KeyRange, Lsn};
use crate::io::align_up;
use crate::layers::format::{Codec, Fields, HEADER_BYTES, Packed};
use crate::limits::{
    LAYER_BLOCK_BYTES_MAX, LAYER_DELTA_BLOCKS_MAX, LAYER_IMAGE_VALUES_MAX, LAYER_INDEX_BYTES_MAX,
};

const BLOCK_ENTRY_BYTES: usize = KEY_SIZE + 8 + 4 * 4 + 1;
const RUN_BYTES: usize = KEY_SIZE + 4;
const BLOB_BYTES_MAX: usize = 1 + 3 * 4;

const _: () = assert!(4 + BLOCK_ENTRY_BYTES * LAYER_DELTA_BLOCKS_MAX <= LAYER_INDEX_BYTES_MAX);
const _: () =
    assert!(4 + (RUN_BYTES + BLOB_BYTES_MAX) * LAYER_IMAGE_VALUES_MAX <= LAYER_INDEX_BYTES_MAX);

/// Place of a data block of a delta layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockRef {
    pub(super) key: Key,
    pub(super) lsn: Lsn,
    /// Offset in the file.
    pub(super) offset: u64,
    pub(super) value_count: u32,
    pub(super) packed: Packed,
}

/// Writes the index of a delta layer.
pub(super) fn encode_delta(blocks: &[BlockRef]) -> Vec<u8> {
    let mut out = Vec::with_capacity(4 + blocks.len() * BLOCK_ENTRY_BYTES);
    out.put_u32_le(u32::try_from(blocks.len()).expect("the writer bounds the number of blocks"));
    for block in blocks {
        out.put_slice(&block.key.to_bytes());
        out.put_u64_le(block.lsn.0);
        out.put_u32_le(block.packed.stored_bytes);
        out.put_u32_le(block.packed.raw_bytes);
        out.put_u32_le(block.value_count);
        out.put_u32_le(block.packed.crc);
        out.put_u8(block.packed.codec as u8);
    }
    out
}

/// What an index must agree with; from the footer.
pub(super) struct Expected<'a> {
    pub(super) keys: &'a KeyRange,
    pub(super) lsns: std::ops::Range<Lsn>,
    pub(super) data_end: u64,
    pub(super) value_count: u64,
}

const CUT: &str = "the index is cut off";

/// Reads the index of a delta layer.
pub(super) fn decode_delta(
    bytes: &[u8],
    expected: &Expected<'_>,
) -> Result<Vec<BlockRef>, &'static str> {
    let mut fields = Fields(bytes);
    let count = fields.u32().ok_or(CUT)? as usize;
    if count == 0 || fields.0.len() != count.saturating_mul(BLOCK_ENTRY_BYTES) {
        return Err("the index has another length than its number of blocks says");
    }
    let mut blocks: Vec<BlockRef> = Vec::with_capacity(count);
    let mut offset = HEADER_BYTES as u64;
    let mut values = 0u64;
    for _ in 0..count {
        let block = decode_block_ref(&mut fields, offset)?;
        let ordered =
            blocks.last().is_none_or(|before| (before.key, before.lsn) <= (block.key, block.lsn));
        if !ordered {
            return Err("the blocks of the index are out of order");
        }
        if !expected.keys.contains(&block.key) || !expected.lsns.contains(&block.lsn) {
            return Err("a block of the index is outside the ranges of the layer");
        }
        offset = offset.saturating_add(u64::from(block.packed.stored_bytes));
        values = values.saturating_add(u64::from(block.value_count));
        blocks.push(block);
    }
    if offset != expected.data_end || values != expected.value_count {
        return Err("the index does not cover the data region");
    }
    Ok(blocks)
}

fn decode_block_ref(fields: &mut Fields<'_>, offset: u64) -> Result<BlockRef, &'static str> {
    let (key, lsn) = (fields.key().ok_or(CUT)?, Lsn(fields.u64().ok_or(CUT)?));
    let (stored_bytes, raw_bytes) = (fields.u32().ok_or(CUT)?, fields.u32().ok_or(CUT)?);
    let (value_count, crc) = (fields.u32().ok_or(CUT)?, fields.u32().ok_or(CUT)?);
    let codec = fields.u8().and_then(Codec::from_number).ok_or("unknown codec of a block")?;
    if stored_bytes == 0 || value_count == 0 || raw_bytes as usize > LAYER_BLOCK_BYTES_MAX {
        return Err("a block of the index has an impossible length");
    }
    let packed = Packed { stored_bytes, raw_bytes, crc, codec };
    Ok(BlockRef { key, lsn, offset, value_count, packed })
}

/// How the content of a value lies in an image layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Form {
    Zero = 0,
    Raw = 1,
    Aligned = 2,
    Lz4 = 3,
    Zstd = 4,
}

impl Form {
    fn from_number(number: u8) -> Option<Form> {
        [Form::Zero, Form::Raw, Form::Aligned, Form::Lz4, Form::Zstd]
            .into_iter()
            .find(|form| *form as u8 == number)
    }

    /// Where the content begins if the one before ended at `end`.
    pub(super) fn place(self, end: u64) -> u64 {
        if self == Form::Aligned { align_up(end) } else { end }
    }
}

/// Place of the content of a value of an image layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlobRef {
    /// Offset in the file.
    pub(super) offset: u64,
    pub(super) form: Form,
    /// All zero for a page of zeros.
    pub(super) packed: Packed,
}

impl BlobRef {
    /// Offset just after the content.
    pub(super) fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.packed.stored_bytes))
    }

    pub(super) const ZERO: Packed =
        Packed { stored_bytes: 0, raw_bytes: 0, crc: 0, codec: Codec::Raw };
}

/// Keys that differ only in `field6`, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Run {
    first: Key,
    /// Number of the first value among all of the layer.
    start: u32,
    count: u32,
}

impl Run {
    fn last(&self) -> Key {
        let field6 = self.first.field6.saturating_add(self.count.saturating_sub(1));
        Key { field6, ..self.first }
    }
}

/// The index of an image layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ImageIndex {
    runs: Vec<Run>,
    blobs: Vec<BlobRef>,
}

impl ImageIndex {
    /// Memory that it takes, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        self.runs.len() * size_of::<Run>() + self.blobs.len() * size_of::<BlobRef>()
    }

    /// Adds a key that is above all others.
    pub(super) fn push(&mut self, key: Key, blob: BlobRef) {
        match self.runs.last_mut() {
            Some(run)
                if run.last().next() == key
                    && Key { field6: 0, ..run.first } == Key { field6: 0, ..key } =>
            {
                run.count += 1
            }
            _ => {
                let start = u32::try_from(self.blobs.len()).expect("the writer bounds the values");
                self.runs.push(Run { first: key, start, count: 1 });
            }
        }
        self.blobs.push(blob);
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.blobs.len()
    }

    /// Number and place of a key's value.
    pub(super) fn find(&self, key: Key) -> Option<(u32, BlobRef)> {
        let after = self.runs.partition_point(|run| run.first <= key);
        let run = self.runs.get(after.checked_sub(1)?)?;
        if key > run.last() {
            return None;
        }
        let number = run.start + (key.field6 - run.first.field6);
        Some((number, *self.blobs.get(number as usize)?))
    }

    /// Key, number and place of every value of a key range, in order.
    pub(super) fn range(&self, keys: &KeyRange) -> impl Iterator<Item = (Key, u32, BlobRef)> {
        let first = self.runs.partition_point(|run| run.last() < keys.start);
        let runs = self.runs.get(first..).unwrap_or_default();
        let KeyRange { start, end: last } = keys.clone();
        runs.iter()
            .take_while(move |run| run.first < last)
            .flat_map(move |run| {
                // A run that begins before the range and reaches into it has its keys in a row.
                let skipped = match run.first < start {
                    true => start.field6.saturating_sub(run.first.field6),
                    false => 0,
                };
                (skipped..run.count)
                    .map(|n| (Key { field6: run.first.field6 + n, ..run.first }, run.start + n))
            })
            .take_while(move |(key, _)| *key < last)
            .filter(move |(key, _)| *key >= start)
            .filter_map(|(key, number)| Some((key, number, *self.blobs.get(number as usize)?)))
    }

    /// All places, in order.
    pub(super) fn blobs(&self) -> &[BlobRef] {
        &self.blobs
    }

    /// Writes the index.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out =
            Vec::with_capacity(4 + self.runs.len() * RUN_BYTES + self.blobs.len() * BLOB_BYTES_MAX);
        out.put_u32_le(u32::try_from(self.runs.len()).expect("the writer bounds the values"));
        for run in &self.runs {
            out.put_slice(&run.first.to_bytes());
            out.put_u32_le(run.count);
            let blobs = self.blobs.iter().skip(run.start as usize).take(run.count as usize);
            for BlobRef { form, packed, .. } in blobs {
                out.put_u8(*form as u8);
                if *form != Form::Zero {
                    out.put_u32_le(packed.stored_bytes);
                    out.put_u32_le(packed.crc);
                }
                if matches!(form, Form::Lz4 | Form::Zstd) {
                    out.put_u32_le(packed.raw_bytes);
                }
            }
        }
        out
    }

    /// Reads the index.
    pub(super) fn decode(
        bytes: &[u8],
        expected: &Expected<'_>,
    ) -> Result<ImageIndex, &'static str> {
        let mut fields = Fields(bytes);
        let mut index = ImageIndex::default();
        let mut end = HEADER_BYTES as u64;
        for _ in 0..fields.u32().ok_or(CUT)? {
            let first = fields.key().ok_or(CUT)?;
            let count = fields.u32().ok_or(CUT)?;
            if count == 0 || first.field6.checked_add(count - 1).is_none() {
                return Err("a run of the index has an impossible length");
            }
            let start = u32::try_from(index.blobs.len()).map_err(|_| "the index is too large")?;
            let run = Run { first, start, count };
            let ordered = index.runs.last().is_none_or(|before| before.last() < first);
            if !ordered || !expected.keys.contains(&first) || run.last() >= expected.keys.end {
                return Err("a run of the index is out of order or outside the key range");
            }
            for _ in 0..count {
                let blob = decode_blob(&mut fields, end)?;
                end = blob.end();
                index.blobs.push(blob);
            }
            index.runs.push(run);
        }
        let values = index.blobs.len() as u64;
        if !fields.0.is_empty() || end != expected.data_end || values != expected.value_count {
            return Err("the index does not cover the data region");
        }
        Ok(index)
    }
}

fn decode_blob(fields: &mut Fields<'_>, end: u64) -> Result<BlobRef, &'static str> {
    let form = fields.u8().and_then(Form::from_number).ok_or("unknown form of a value")?;
    if form == Form::Zero {
        return Ok(BlobRef { offset: end, form, packed: BlobRef::ZERO });
    }
    let (stored_bytes, crc) = (fields.u32().ok_or(CUT)?, fields.u32().ok_or(CUT)?);
    let (raw_bytes, codec) = match form {
        Form::Lz4 => (fields.u32().ok_or(CUT)?, Codec::Lz4),
        Form::Zstd => (fields.u32().ok_or(CUT)?, Codec::Zstd),
        _ => (stored_bytes, Codec::Raw),
    };
    if raw_bytes as usize > LAYER_BLOCK_BYTES_MAX {
        return Err("a value of the index has an impossible length");
    }
    let packed = Packed { stored_bytes, raw_bytes, crc, codec };
    Ok(BlobRef { offset: form.place(end), form, packed })
}
