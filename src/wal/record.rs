//! WAL records (`src/include/access/xlogrecord.h`).
//!
//! A record is a 24-byte header, then headers of blocks and of the main data, then the data of
//! the blocks (image, then data, block by block), then the main data. Little-endian, unaligned:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | `xl_tot_len`: length of the record |
//! | 4 | 4 | `xl_xid` |
//! | 8 | 8 | `xl_prev`: start of the record before |
//! | 16 | 1 | `xl_info`: high half for the resource manager, low half flags |
//! | 17 | 1 | `xl_rmid`: resource manager |
//! | 18 | 2 | padding |
//! | 20 | 4 | `xl_crc`: CRC-32C of the bytes from 24 on, then of bytes 0..20 |
//!
//! | first byte | what follows it |
//! |---|---|
//! | 0–32 | block: u8 fork and flags, u16 data length; with an image: u16 length, u16 hole offset, u8 flags, u16 hole length if compressed with a hole; u32 × 3 relation unless the same as before; u32 block number |
//! | 252 | u32 top-level transaction |
//! | 253 | u16 replication origin |
//! | 254 | u32 length of the main data; the last header |
//! | 255 | u8 length of the main data; the last header |
//!
//! [`Record::parse`] checks what PostgreSQL's reader checks (`DecodeXLogRecord`); data stays where
//! it is, the record keeps slices of it, and nothing is allocated for a record of few blocks.

use std::ops::{Deref, DerefMut};

use super::bytes::Reader;
use super::image::{BlockImage, ImageError, ImageHeader};
use crate::base::page::Page;
use crate::base::wal_record::{
    WAL_RECORD_CRC_AT as CRC_AT, WAL_RECORD_HEADER_BYTES, wal_record_crc,
};
use crate::base::{BlockNumber, Kind, Lsn, RelNode, RelTag};
use crate::limits::WAL_RECORD_BYTES_MAX;

/// Length of the record header in bytes (`SizeOfXLogRecord`).
pub const HEADER: usize = WAL_RECORD_HEADER_BYTES;
/// The highest number of a block reference (`XLR_MAX_BLOCK_ID`).
const BLOCK_ID_MAX: u8 = 32;
/// The highest fork number (`MAX_FORKNUM`).
const FORK_MAX: u8 = 3;
/// `XLR_CHECK_CONSISTENCY`: written under `wal_consistency_checking`.
const CHECK_CONSISTENCY: u8 = 0x02;

pub(super) const HAS_IMAGE: u8 = 0x10;
pub(super) const HAS_DATA: u8 = 0x20;
pub(super) const WILL_INIT: u8 = 0x40;
pub(super) const SAME_REL: u8 = 0x80;

/// `XLR_BLOCK_ID_DATA_SHORT` and its like, in the place of a block's number.
pub(super) const MAIN_DATA_SHORT: u8 = 255;
pub(super) const MAIN_DATA_LONG: u8 = 254;
pub(super) const ORIGIN: u8 = 253;
pub(super) const TOPLEVEL_XID: u8 = 252;

/// Resource managers of PostgreSQL 15 (`src/include/access/rmgrlist.h`).
#[allow(missing_docs, reason = "the names are those of PostgreSQL")]
pub mod rmgr_id {
    pub const XLOG: u8 = 0;
    pub const XACT: u8 = 1;
    pub const SMGR: u8 = 2;
    pub const CLOG: u8 = 3;
    pub const DBASE: u8 = 4;
    pub const TBLSPC: u8 = 5;
    pub const MULTIXACT: u8 = 6;
    pub const RELMAP: u8 = 7;
    pub const STANDBY: u8 = 8;
    pub const HEAP2: u8 = 9;
    pub const HEAP: u8 = 10;
    pub const BTREE: u8 = 11;
    pub const HASH: u8 = 12;
    pub const GIN: u8 = 13;
    pub const GIST: u8 = 14;
    pub const SEQ: u8 = 15;
    pub const SPGIST: u8 = 16;
    pub const BRIN: u8 = 17;
    pub const COMMIT_TS: u8 = 18;
    pub const REPLORIGIN: u8 = 19;
    pub const GENERIC: u8 = 20;
    pub const LOGICALMSG: u8 = 21;
    /// The last built-in one.
    pub const BUILTIN_MAX: u8 = LOGICALMSG;
    /// The first that an extension can take.
    pub const CUSTOM_MIN: u8 = 128;
}

/// The header of a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RecordHeader {
    /// Length of the whole record in bytes.
    pub tot_len: u32,
    /// The transaction; 0 if none.
    pub xid: u32,
    /// Start of the record before.
    pub prev: Lsn,
    /// Operation and flags.
    pub info: u8,
    /// Resource manager.
    pub rmgr: u8,
    /// Checksum.
    pub crc: u32,
}

/// Why bytes are no record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The length field is impossible.
    #[error("its length field says {len} bytes; 24 to {WAL_RECORD_BYTES_MAX} are possible")]
    Length {
        /// `xl_tot_len`.
        len: u32,
    },
    /// The number of bytes is not that of the length field.
    #[error("it has {found} bytes, its header says {expected}")]
    Cut {
        /// Bytes given.
        found: usize,
        /// `xl_tot_len`.
        expected: u32,
    },
    /// No such resource manager.
    #[error("resource manager {rmgr} does not exist")]
    Rmgr {
        /// `xl_rmid`.
        rmgr: u8,
    },
    /// The checksum does not fit.
    #[error("its checksum is {found:08X}, its header says {expected:08X}")]
    Crc {
        /// Checksum of the bytes.
        found: u32,
        /// `xl_crc`.
        expected: u32,
    },
    /// The headers inside contradict themselves.
    #[error("{what} (block reference {block_id:?})")]
    Malformed {
        /// What is wrong.
        what: &'static str,
        /// Number of the block reference, if one is meant.
        block_id: Option<u8>,
    },
}

impl RecordError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

fn malformed(what: &'static str, block_id: Option<u8>) -> RecordError {
    RecordError::Malformed { what, block_id }
}

impl RecordHeader {
    /// Reads and checks a header from the first bytes of a record, as far as it can be checked
    /// without the rest.
    pub fn parse(bytes: &[u8]) -> Result<RecordHeader, RecordError> {
        let cut = RecordError::Cut { found: bytes.len(), expected: HEADER as u32 };
        let Some(head) = bytes.first_chunk::<HEADER>() else { return Err(cut) };
        let u32_at =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let header = RecordHeader {
            tot_len: u32_at(0),
            xid: u32_at(4),
            prev: Lsn(u64::from(u32_at(8)) | u64::from(u32_at(12)) << 32),
            info: head[16],
            rmgr: head[17],
            crc: u32_at(CRC_AT),
        };
        check_len(header.tot_len)?;
        if (rmgr_id::BUILTIN_MAX + 1..rmgr_id::CUSTOM_MIN).contains(&header.rmgr) {
            return Err(RecordError::Rmgr { rmgr: header.rmgr });
        }
        Ok(header)
    }

    /// Checks the checksum of the whole record that has this header.
    pub fn check_crc(&self, record: &[u8]) -> Result<(), RecordError> {
        let (expected, found) = (self.crc, checksum(record));
        if found == expected { Ok(()) } else { Err(RecordError::Crc { found, expected }) }
    }

    /// The operation: the part of `xl_info` that belongs to the resource manager.
    pub fn operation(&self) -> u8 {
        self.info & 0xF0
    }
}

/// Checks `xl_tot_len`.
pub fn check_len(len: u32) -> Result<(), RecordError> {
    if (HEADER..=WAL_RECORD_BYTES_MAX).contains(&(len as usize)) {
        Ok(())
    } else {
        Err(RecordError::Length { len })
    }
}

/// Checks the checksum of a whole record.
pub fn check_crc(record: &[u8]) -> Result<(), RecordError> {
    RecordHeader::parse(record)?.check_crc(record)
}

/// The checksum that a record has to have; 0 for bytes shorter than a header.
pub fn checksum(record: &[u8]) -> u32 {
    wal_record_crc(record).unwrap_or(0)
}

/// A reference to a block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockRef<'a> {
    /// Number of the reference; numbers rise, with gaps.
    pub id: u8,
    /// The relation fork.
    pub rel: RelTag,
    /// The block.
    pub block: BlockNumber,
    /// Redo initialises the page without a look at its old content (`BKPBLOCK_WILL_INIT`).
    pub will_init: bool,
    /// Full-page image.
    pub image: Option<BlockImage<'a>>,
    /// Data for the resource manager.
    pub data: &'a [u8],
}

impl<'a> BlockRef<'a> {
    /// The record carries an image that redo restores (`BKPIMAGE_APPLY`). Images without that
    /// flag only serve comparison.
    pub fn applied_image(&self) -> Option<&BlockImage<'a>> {
        self.image.as_ref().filter(|image| image.apply())
    }

    /// Redo does not need the old content of the page.
    pub fn replaces_page(&self) -> bool {
        self.will_init || self.applied_image().is_some()
    }
}

/// Block references that a record has without memory of its own for them.
const BLOCKS_INLINE: usize = 4;

/// The block references of a record: a slice, see [`Deref`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Blocks<'a> {
    first: [BlockRef<'a>; BLOCKS_INLINE],
    count: usize,
    /// All of them, where they are more than `first` has room for.
    many: Vec<BlockRef<'a>>,
}

impl<'a> Blocks<'a> {
    #[inline]
    fn new() -> Self {
        const NODE: RelNode = RelNode { spc: 0, db: 0, rel: 0 };
        let rel = RelTag { node: NODE, fork: 0 };
        let none = BlockRef { id: 0, rel, block: 0, will_init: false, image: None, data: &[] };
        Blocks { first: [none; BLOCKS_INLINE], count: 0, many: Vec::new() }
    }

    fn push(&mut self, block: BlockRef<'a>) {
        match self.first.get_mut(self.count) {
            Some(place) => *place = block,
            None => {
                if self.many.is_empty() {
                    self.many.extend_from_slice(&self.first);
                }
                self.many.push(block);
            }
        }
        self.count += 1;
    }
}

impl<'a> Deref for Blocks<'a> {
    type Target = [BlockRef<'a>];

    fn deref(&self) -> &[BlockRef<'a>] {
        let all = if self.many.is_empty() { &self.first[..] } else { &self.many };
        all.get(..self.count).unwrap_or_default()
    }
}

impl DerefMut for Blocks<'_> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        let all = if self.many.is_empty() { &mut self.first[..] } else { &mut self.many };
        all.get_mut(..self.count).unwrap_or_default()
    }
}

impl<'r, 'a> IntoIterator for &'r Blocks<'a> {
    type Item = &'r BlockRef<'a>;
    type IntoIter = std::slice::Iter<'r, BlockRef<'a>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// A record taken apart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record<'a> {
    /// The header.
    pub header: RecordHeader,
    /// The block references, by rising number.
    pub blocks: Blocks<'a>,
    /// Data for the resource manager.
    pub main_data: &'a [u8],
    /// Replication origin; 0 if none.
    pub origin: u16,
    /// Top-level transaction, where the record is the first of a subtransaction; 0 if none.
    pub toplevel_xid: u32,
}

/// Lengths of what stands behind the headers, for one block.
#[derive(Clone, Copy, Default)]
struct Lengths {
    image: u16,
    data: u16,
}

impl<'a> Record<'a> {
    /// Takes a record apart. The checksum is not looked at: [`check_crc`] does that, once, when
    /// the record comes in.
    pub fn parse(bytes: &'a [u8]) -> Result<Record<'a>, RecordError> {
        let mut record = Record::blank();
        record.fill(bytes)?;
        Ok(record)
    }

    /// A record for [`Record::fill`], which spares those who take in many the moving about.
    #[inline]
    pub(super) fn blank() -> Record<'a> {
        let prev = Lsn::INVALID;
        let header = RecordHeader { tot_len: 0, xid: 0, prev, info: 0, rmgr: 0, crc: 0 };
        Record { header, blocks: Blocks::new(), main_data: &[], origin: 0, toplevel_xid: 0 }
    }

    /// As [`Record::parse`], into a blank record.
    pub(super) fn fill(&mut self, bytes: &'a [u8]) -> Result<(), RecordError> {
        self.header = RecordHeader::parse(bytes)?;
        if self.header.tot_len as usize != bytes.len() {
            return Err(RecordError::Cut { found: bytes.len(), expected: self.header.tot_len });
        }
        let mut rest = Reader::new(bytes.get(HEADER..).unwrap_or_default());
        let mut lengths = [Lengths::default(); BLOCK_ID_MAX as usize + 1];
        let main_len = self.parse_headers(&mut rest, &mut lengths)?;
        self.take_data(rest, &lengths, main_len)
    }

    /// Reads all headers; gives the length of the main data.
    fn parse_headers(
        &mut self,
        rest: &mut Reader<'a>,
        lengths: &mut [Lengths; BLOCK_ID_MAX as usize + 1],
    ) -> Result<usize, RecordError> {
        let cut = || malformed("a header inside is cut", None);
        let mut total: usize = 0;
        while rest.len() > total {
            match rest.u8().ok_or_else(cut)? {
                MAIN_DATA_SHORT => return Ok(usize::from(rest.u8().ok_or_else(cut)?)),
                MAIN_DATA_LONG => return Ok(rest.u32().ok_or_else(cut)? as usize),
                ORIGIN => self.origin = rest.u16().ok_or_else(cut)?,
                TOPLEVEL_XID => self.toplevel_xid = rest.u32().ok_or_else(cut)?,
                id if id <= BLOCK_ID_MAX => {
                    if self.blocks.last().is_some_and(|last| last.id >= id) {
                        return Err(malformed("block references are out of order", Some(id)));
                    }
                    let previous = self.blocks.last().map(|block| block.rel.node);
                    let (block, len) = parse_block(id, previous, rest)?;
                    total += usize::from(len.image) + usize::from(len.data);
                    self.blocks.push(block);
                    if let Some(place) = lengths.get_mut(usize::from(id)) {
                        *place = len;
                    }
                }
                id => return Err(malformed("there is no such kind of header", Some(id))),
            }
        }
        Ok(0)
    }

    /// Hands the bytes behind the headers out.
    fn take_data(
        &mut self,
        mut rest: Reader<'a>,
        lengths: &[Lengths; BLOCK_ID_MAX as usize + 1],
        main_len: usize,
    ) -> Result<(), RecordError> {
        let cut = |id| malformed("the lengths inside exceed the record", id);
        for block in self.blocks.iter_mut() {
            let id = Some(block.id);
            let len = lengths.get(usize::from(block.id)).copied().unwrap_or_default();
            if let Some(image) = &mut block.image {
                image.set_bytes(rest.take(usize::from(len.image)).ok_or_else(|| cut(id))?);
            }
            block.data = rest.take(usize::from(len.data)).ok_or_else(|| cut(id))?;
        }
        self.main_data = rest.take(main_len).ok_or_else(|| cut(None))?;
        match rest.is_empty() {
            true => Ok(()),
            false => Err(malformed("the lengths inside fall short of the record", None)),
        }
    }

    /// The block reference with this number.
    pub fn block(&self, id: u8) -> Option<&BlockRef<'a>> {
        self.blocks.iter().find(|block| block.id == id)
    }

    /// Page images that serve to check redo (`wal_consistency_checking`): what the page was on
    /// the source after this record. Hint bits and the like differ and must be masked first.
    pub fn consistency_images(
        &self,
    ) -> impl Iterator<Item = (RelTag, BlockNumber, Result<Box<Page>, ImageError>)> + '_ {
        let checked = self.header.info & CHECK_CONSISTENCY != 0;
        self.blocks.iter().filter(move |_| checked).filter_map(|block| {
            let image = block.image.as_ref().filter(|image| !image.apply())?;
            Some((block.rel, block.block, image.restore()))
        })
    }
}

/// Reads the header of one block reference.
fn parse_block<'a>(
    id: u8,
    previous: Option<RelNode>,
    rest: &mut Reader<'_>,
) -> Result<(BlockRef<'a>, Lengths), RecordError> {
    let cut = || malformed("the header of a block reference is cut", Some(id));
    let flags = rest.u8().ok_or_else(cut)?;
    let data_len = rest.u16().ok_or_else(cut)?;
    if (flags & HAS_DATA != 0) != (data_len > 0) {
        return Err(malformed("data flag and data length contradict each other", Some(id)));
    }
    let fork = flags & 0x0F;
    if fork > FORK_MAX {
        return Err(malformed("there is no such fork", Some(id)));
    }
    let (image, image_len) = if flags & HAS_IMAGE == 0 {
        (None, 0)
    } else {
        let header = parse_image(rest).ok_or_else(cut)?;
        header.check().map_err(|what| malformed(what, Some(id)))?;
        (Some(BlockImage::new(header)), header.len)
    };
    let node = if flags & SAME_REL == 0 {
        let (spc, db, rel) = (rest.u32(), rest.u32(), rest.u32());
        RelNode { spc: spc.ok_or_else(cut)?, db: db.ok_or_else(cut)?, rel: rel.ok_or_else(cut)? }
    } else {
        previous.ok_or_else(|| malformed("no relation to refer back to", Some(id)))?
    };
    let block = BlockRef {
        id,
        rel: node.fork(fork),
        block: rest.u32().ok_or_else(cut)?,
        will_init: flags & WILL_INIT != 0,
        image,
        data: &[],
    };
    Ok((block, Lengths { image: image_len, data: data_len }))
}

/// Reads the fixed part of an image header.
fn parse_image(rest: &mut Reader<'_>) -> Option<ImageHeader> {
    let mut header =
        ImageHeader { len: rest.u16()?, hole_offset: rest.u16()?, info: rest.u8()?, hole_len: 0 };
    header.hole_len = match (header.compressed(), header.has_hole()) {
        (true, true) => rest.u16()?,
        (true, false) => 0,
        // A length beyond the page is refused by the checks of the header.
        (false, _) => (crate::base::page::PAGE_SIZE as u16).wrapping_sub(header.len),
    };
    Some(header)
}
