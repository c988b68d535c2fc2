//! Form of layer files: header, footer, data blocks. Pure; numbers are little-endian, keys as in
//! [`crate::base::key`].
//!
//! ```text
//! 0            4096                                                  length-4096      length
//! | header     | data region | index region | filter region | zeros | footer         |
//! ```
//!
//! The length is a multiple of 4,096. Index and filter follow the data without a gap. The footer
//! is written after everything that it names, and a reader starts there: footer → index → block,
//! each step checked with a checksum that the step before delivered. So a block that was written
//! or read at a wrong place is found out, not only one with flipped bits.
//!
//! Header and footer describe the layer in the same place:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic: `PGSTRATA` header, `PGSTRATF` footer |
//! | 8 | 4 | format version, 1 |
//! | 12 | 1 | kind: 1 delta, 2 image |
//! | 13 | 1 | shard number |
//! | 14 | 1 | shard count, 0 if the tenant is not sharded |
//! | 15 | 1 | zero |
//! | 16 | 16 | tenant id |
//! | 32 | 16 | timeline id |
//! | 48 | 18 | key range, start |
//! | 66 | 18 | key range, end (exclusive) |
//! | 84 | 4 | zero |
//! | 88 | 8 | LSN range, start; LSN of an image layer |
//! | 96 | 8 | LSN range, end (exclusive); of an image layer start + 1 |
//!
//! In the header, zeros follow. The footer goes on:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 104 | 8 | length of the file |
//! | 112 | 8 | end of the data region, which is the start of the index region |
//! | 120 | 4 | length of the index region as stored |
//! | 124 | 4 | length of the index, unpacked |
//! | 128 | 4 | CRC-32C of the index region |
//! | 132 | 1 | codec of the index region: 0 raw, 1 lz4 block, 2 zstd frame |
//! | 133 | 3 | zero |
//! | 136 | 4 | length of the filter region, 0 for none |
//! | 140 | 4 | CRC-32C of the filter region |
//! | 144 | 8 | number of values |
//! | 152 | 8 | number of distinct keys |
//! | 160 | 4 | the header's CRC-32C, as it stands at its end |
//! | 164 | 3928 | zeros |
//!
//! Both end with the CRC-32C of their first 4,092 bytes, at offset 4,092.
//!
//! A **data block** of a delta layer, unpacked, is a sequence of values in order of key, then LSN:
//!
//! | bytes | field |
//! |---|---|
//! | 1 | 0: a key follows; 1: the key of the value before |
//! | 18 or 0 | key |
//! | 8 | LSN |
//! | 4 | length of the value |
//! | … | the value, as in [`crate::base::value`] |
//!
//! Its place, codec and checksum stand in the [index](crate::layers::index). The data region of an
//! image layer holds the contents of the values themselves; see there too.

use bytes::{BufMut, Bytes, BytesMut};

use crate::base::checksum::crc32c;
use crate::base::key::KEY_SIZE;
use crate::base::{Key, Lsn, TenantId, TenantShardId, TimelineId, Value};
use crate::layers::{Damage, LayerName, LayerOwner};
use crate::limits::{LAYER_FILTER_BYTES_MAX, LAYER_INDEX_BYTES_MAX};

/// Format version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Length of header and footer, each.
pub const HEADER_BYTES: usize = crate::io::ALIGNMENT;
/// Shortest layer file: header, index, footer.
pub const FILE_BYTES_MIN: u64 = 3 * HEADER_BYTES as u64;

const HEADER_MAGIC: &[u8; 8] = b"PGSTRATA";
const FOOTER_MAGIC: &[u8; 8] = b"PGSTRATF";
const CRC_AT: usize = HEADER_BYTES - 4;
const HEADER_USED: usize = 104;
const FOOTER_USED: usize = 164;

const _: () = assert!(HEADER_USED == 8 + 4 + 4 + 16 + 16 + 2 * KEY_SIZE + 4 + 2 * 8);
const _: () = assert!(FOOTER_USED == HEADER_USED + 2 * 8 + 4 * 4 + 2 * 4 + 2 * 8 + 4);

/// Header or footer as it stands in the file.
pub type Frame = [u8; HEADER_BYTES];

/// Why a header or footer was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// Of another format version.
    Version(u32),
    /// Damaged; the text says what is wrong.
    Damaged(&'static str),
}

/// Takes fields off the front of a slice.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }
    pub(super) fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }
    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    pub(super) fn key(&mut self) -> Option<Key> {
        self.array::<KEY_SIZE>().map(|bytes| Key::from_bytes(&bytes))
    }
    fn skip(&mut self, len: usize) -> Option<()> {
        self.0 = self.0.get(len..)?;
        Some(())
    }
}

/// What header and footer both say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Whose data it is.
    pub owner: LayerOwner,
    /// Kind and ranges.
    pub name: LayerName,
}

impl Description {
    fn encode(&self, magic: &[u8; 8], out: &mut Vec<u8>) {
        let LayerOwner { shard, timeline } = self.owner;
        let lsns = self.name.lsns();
        out.put_slice(magic);
        out.put_u32_le(VERSION);
        out.put_u8(if self.name.is_delta() { 1 } else { 2 });
        out.put_slice(&[shard.number, shard.count, 0]);
        out.put_slice(&shard.tenant.0);
        out.put_slice(&timeline.0);
        out.put_slice(&self.name.keys().start.to_bytes());
        out.put_slice(&self.name.keys().end.to_bytes());
        out.put_u32_le(0);
        out.put_u64_le(lsns.start.0);
        out.put_u64_le(lsns.end.0);
    }

    fn decode(fields: &mut Fields<'_>) -> Option<Description> {
        let kind = fields.u8()?;
        let [number, count, zero] = fields.array()?;
        let tenant = TenantId(fields.array()?);
        let timeline = TimelineId(fields.array()?);
        let keys = fields.key()?..fields.key()?;
        let zeros = fields.u32()?;
        let lsns = Lsn(fields.u64()?)..Lsn(fields.u64()?);
        let name = match kind {
            1 => LayerName::Delta { keys, lsns: lsns.clone() },
            2 => LayerName::Image { keys, lsn: lsns.start },
            _ => return None,
        };
        let valid = name.check().is_ok() && name.lsns() == lsns && zero == 0 && zeros == 0;
        let shard = TenantShardId { tenant, number, count };
        valid.then_some(Description { owner: LayerOwner { shard, timeline }, name })
    }

    /// The header.
    pub fn encode_header(&self) -> Frame {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        self.encode(HEADER_MAGIC, &mut out);
        assert_eq!(out.len(), HEADER_USED);
        seal(out)
    }

    /// Reads a header.
    pub fn decode_header(frame: &[u8]) -> Result<Description, FrameError> {
        let mut fields = open_frame(frame, HEADER_MAGIC)?;
        let description = Description::decode(&mut fields);
        let description = description.ok_or(FrameError::Damaged("the header makes no sense"))?;
        rest_is_zero(&fields)?;
        Ok(description)
    }
}

/// Fills up with zeros and puts the checksum at the end.
fn seal(mut out: Vec<u8>) -> Frame {
    out.resize(CRC_AT, 0);
    out.put_u32_le(crc32c(&out));
    let mut frame = [0; HEADER_BYTES];
    frame.copy_from_slice(&out);
    frame
}

/// The checksum at the end of a header or footer.
pub fn frame_crc(frame: &Frame) -> u32 {
    frame.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Checks magic, version and checksum of a frame, in this order: a file of another version must
/// be called that, wherever that version keeps its checksum.
fn open_frame<'a>(frame: &'a [u8], magic: &[u8; 8]) -> Result<Fields<'a>, FrameError> {
    let damaged = FrameError::Damaged;
    let mut fields = Fields(frame);
    if frame.len() != HEADER_BYTES || fields.array() != Some(*magic) {
        return Err(damaged("no magic number where header or footer should be"));
    }
    let version = fields.u32().ok_or(damaged("cut off"))?;
    if version != VERSION {
        return Err(FrameError::Version(version));
    }
    let (content, crc) = frame.split_last_chunk::<4>().ok_or(damaged("cut off"))?;
    if crc32c(content) != u32::from_le_bytes(*crc) {
        return Err(damaged("wrong checksum of header or footer"));
    }
    Ok(fields)
}

fn rest_is_zero(fields: &Fields<'_>) -> Result<(), FrameError> {
    let (rest, _crc) = fields.0.split_last_chunk::<4>().unwrap_or((fields.0, &[0; 4]));
    match is_zero(rest) {
        true => Ok(()),
        false => Err(FrameError::Damaged("unused bytes of header or footer are not zero")),
    }
}

/// True if all bytes are zero.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Where the parts of a layer file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    /// Owner, kind and ranges, as in the header.
    pub description: Description,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// End of the data region and start of the index region, offset in the file.
    pub data_end: u64,
    /// The index region.
    pub index: Packed,
    /// Length of the filter region in bytes, which follows the index; 0 for none.
    pub filter_bytes: u32,
    /// CRC-32C of the filter region.
    pub filter_crc: u32,
    /// Number of values.
    pub value_count: u64,
    /// Number of distinct keys.
    pub key_count: u64,
    /// CRC-32C of the header.
    pub header_crc: u32,
}

impl Footer {
    /// Start of the filter region, offset in the file.
    pub fn filter_start(&self) -> u64 {
        self.data_end.saturating_add(u64::from(self.index.stored_bytes))
    }

    /// End of the filter region, where the zeros up to the footer begin.
    pub fn regions_end(&self) -> u64 {
        self.filter_start().saturating_add(u64::from(self.filter_bytes))
    }

    /// The footer as it is written.
    pub fn encode(&self) -> Frame {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        self.description.encode(FOOTER_MAGIC, &mut out);
        out.put_u64_le(self.file_bytes);
        out.put_u64_le(self.data_end);
        out.put_u32_le(self.index.stored_bytes);
        out.put_u32_le(self.index.raw_bytes);
        out.put_u32_le(self.index.crc);
        out.put_slice(&[self.index.codec as u8, 0, 0, 0]);
        out.put_u32_le(self.filter_bytes);
        out.put_u32_le(self.filter_crc);
        out.put_u64_le(self.value_count);
        out.put_u64_le(self.key_count);
        out.put_u32_le(self.header_crc);
        assert_eq!(out.len(), FOOTER_USED);
        seal(out)
    }

    /// Reads the footer of a file of `file_bytes` bytes.
    pub fn decode(frame: &[u8], file_bytes: u64) -> Result<Footer, FrameError> {
        let mut fields = open_frame(frame, FOOTER_MAGIC)?;
        let footer = Footer::decode_fields(&mut fields)
            .ok_or(FrameError::Damaged("the footer makes no sense"))?;
        rest_is_zero(&fields)?;
        if footer.file_bytes != file_bytes {
            return Err(FrameError::Damaged("the file has another length than its footer says"));
        }
        let regions = HEADER_BYTES as u64..=file_bytes.saturating_sub(HEADER_BYTES as u64);
        let inside = regions.contains(&footer.data_end) && regions.contains(&footer.regions_end());
        let bounded = footer.index.raw_bytes as usize <= LAYER_INDEX_BYTES_MAX
            && footer.filter_bytes as usize <= LAYER_FILTER_BYTES_MAX;
        if !inside || !bounded {
            return Err(FrameError::Damaged("the regions that the footer names do not fit"));
        }
        Ok(footer)
    }

    fn decode_fields(fields: &mut Fields<'_>) -> Option<Footer> {
        let description = Description::decode(fields)?;
        let (file_bytes, data_end) = (fields.u64()?, fields.u64()?);
        let (stored_bytes, raw_bytes, crc) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let [codec, zeros @ ..] = fields.array::<4>()?;
        if zeros != [0; 3] {
            return None;
        }
        let index = Packed { stored_bytes, raw_bytes, crc, codec: Codec::from_number(codec)? };
        Some(Footer {
            description,
            file_bytes,
            data_end,
            index,
            filter_bytes: fields.u32()?,
            filter_crc: fields.u32()?,
            value_count: fields.u64()?,
            key_count: fields.u64()?,
            header_crc: fields.u32()?,
        })
    }
}

/// How bytes are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As they are.
    Raw = 0,
    /// An lz4 block without length prefix.
    Lz4 = 1,
    /// One zstd frame.
    Zstd = 2,
}

impl Codec {
    /// The codec with this number.
    pub fn from_number(number: u8) -> Option<Codec> {
        [Codec::Raw, Codec::Lz4, Codec::Zstd].into_iter().find(|codec| *codec as u8 == number)
    }
}

/// Length, codec and checksum of a piece of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed {
    /// Length in the file, in bytes.
    pub stored_bytes: u32,
    /// Length unpacked, in bytes.
    pub raw_bytes: u32,
    /// CRC-32C of the bytes in the file.
    pub crc: u32,
    /// How they are packed.
    pub codec: Codec,
}

/// Bytes that a value takes in a block beside itself, at most.
pub(super) const ENTRY_OVERHEAD_BYTES: usize = 1 + KEY_SIZE + 8 + 4;

/// Appends a value to a data block. `previous` is the key before it in the same block.
pub(super) fn encode_entry(
    out: &mut BytesMut,
    previous: Option<Key>,
    key: Key,
    lsn: Lsn,
    value: &Value,
) {
    if previous == Some(key) {
        out.put_u8(1);
    } else {
        out.put_u8(0);
        out.put_slice(&key.to_bytes());
    }
    out.put_u64_le(lsn.0);
    let len = u32::try_from(value.encoded_len()).expect("the writer checked the length");
    out.put_u32_le(len);
    value.encode(out);
}

/// One value of a data block; its bytes are not looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockEntry {
    pub(super) key: Key,
    pub(super) lsn: Lsn,
    start: usize,
    len: usize,
}

/// Walks over the values of a data block.
pub(super) struct BlockEntries<'a> {
    block: &'a Bytes,
    at: usize,
    key: Option<Key>,
}

impl<'a> BlockEntries<'a> {
    pub(super) fn new(block: &'a Bytes) -> Self {
        BlockEntries { block, at: 0, key: None }
    }

    /// The value of an entry: a slice of the block, not a copy.
    pub(super) fn value(&self, entry: &BlockEntry) -> Result<Value, &'static str> {
        let bytes = self.block.slice(entry.start..entry.start + entry.len);
        Value::decode(&bytes).map_err(|_| "a value of a block is malformed")
    }

    fn step(&mut self) -> Option<BlockEntry> {
        let mut fields = Fields(self.block.get(self.at..)?);
        let key = match (fields.u8()?, self.key) {
            (0, _) => fields.key()?,
            (1, Some(key)) => key,
            _ => return None,
        };
        let lsn = Lsn(fields.u64()?);
        let len = fields.u32()? as usize;
        let start = self.block.len() - fields.0.len();
        fields.skip(len)?;
        self.at = start + len;
        self.key = Some(key);
        Some(BlockEntry { key, lsn, start, len })
    }
}

impl Iterator for BlockEntries<'_> {
    type Item = Result<BlockEntry, &'static str>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at == self.block.len() {
            return None;
        }
        let entry = self.step();
        if entry.is_none() {
            self.at = self.block.len();
        }
        Some(entry.ok_or("a block does not consist of whole values"))
    }
}

/// Ties a text to the place that it is about.
pub(super) fn damage(offset: u64) -> impl Fn(&'static str) -> Damage {
    move |what| Damage { offset, what }
}
/// Bugs that the simulator must find.
#[cfg(test)]
pub(crate) mod planted {
    thread_local! {
        /// Nobody looks at the checksum of a block.
        pub(crate) static BLOCKS_UNCHECKED: std::cell::Cell<bool> =
            const { std::cell::Cell::new(false) };
    }
}
