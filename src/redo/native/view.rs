//! What redo of one block needs of a record, found without copies or allocation.
//!
//! Taking a record apart wholly ([`Record::parse`]) costs more than applying it. [`find`] walks
//! over its headers once and notes where things stand. It leaves to [`Record::parse`] whatever is
//! not plain: records that contradict themselves, blocks with images.

use crate::base::{BlockNumber, RelTag};
use crate::wal::image::BlockImage;
use crate::wal::record::{BlockRef, HEADER, Record};

use super::page::{bytes_at, slice_at, u8_at, u16_at, u32_at};

/// Block references that records of natively applied kinds have at most, generic ones apart, which
/// do not ask for other blocks.
const BLOCKS: usize = 5;
/// `XLR_MAX_BLOCK_ID`.
const BLOCK_ID_MAX: u8 = 32;
const HAS_IMAGE: u8 = 0x10;
const HAS_DATA: u8 = 0x20;
const WILL_INIT: u8 = 0x40;
const SAME_REL: u8 = 0x80;
const FORK_MASK: u8 = 0x0F;
const IMAGE_HAS_HOLE: u8 = 0x01;
const IMAGE_COMPRESSED: u8 = 0x1C;

/// A record as one of its blocks sees it.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    /// `xl_rmid`.
    pub(super) rmgr: u8,
    /// `xl_info`.
    pub(super) info: u8,
    /// `xl_xid`.
    pub(super) xid: u32,
    /// Number of the block reference.
    pub(super) id: u8,
    /// The block.
    pub(super) number: BlockNumber,
    /// The page is to be made anew.
    pub(super) will_init: bool,
    /// The block's image.
    pub(super) image: Option<&'a BlockImage>,
    /// The block's data.
    pub(super) data: &'a [u8],
    /// The main data.
    pub(super) main: &'a [u8],
    blocks: [Option<BlockNumber>; BLOCKS],
}

impl<'a> View<'a> {
    /// A record that was taken apart.
    pub(super) fn of(record: &'a Record, block: &'a BlockRef) -> View<'a> {
        let mut blocks = [None; BLOCKS];
        for other in &record.blocks {
            if let Some(place) = blocks.get_mut(usize::from(other.id)) {
                *place = Some(other.block);
            }
        }
        View {
            rmgr: record.header.rmgr,
            info: record.header.info,
            xid: record.header.xid,
            id: block.id,
            number: block.block,
            will_init: block.will_init,
            image: block.image.as_ref(),
            data: &block.data,
            main: &record.main_data,
            blocks,
        }
    }

    /// The resource manager's part of `xl_info`.
    pub(super) fn operation(&self) -> u8 {
        self.info & 0xF0
    }

    /// The image, if redo is to restore it.
    pub(super) fn applied_image(&self) -> Option<&'a BlockImage> {
        self.image.filter(|image| image.apply())
    }

    /// The number of a block that the record names.
    pub(super) fn other_block(&self, id: u8) -> Option<BlockNumber> {
        self.blocks.get(usize::from(id)).copied().flatten()
    }
}

/// What [`find`] found.
pub(super) enum Found<'a> {
    /// The block, once and without an image.
    View(View<'a>),
    /// The record does not name the block.
    Absent,
    /// The record is to be taken apart wholly.
    Other,
}

/// Looks for a block in a record whose checksum was checked.
pub(super) fn find(record: &[u8], rel: RelTag, block: BlockNumber) -> Found<'_> {
    walk(record, rel, block).unwrap_or(Found::Other)
}

/// `None` for what is not plain.
fn walk(record: &[u8], rel: RelTag, block: BlockNumber) -> Option<Found<'_>> {
    if u32_at(record, 0).ok()? as usize != record.len() {
        return None;
    }
    let mut walk = Walk { record, at: HEADER, ..Walk::default() };
    let main_len = loop {
        match walk.header()? {
            Header::Main(len) => break len,
            Header::Other => {}
            Header::Block(id) => walk.block(id, rel, block)?,
        }
    };
    let Walk { at, behind, blocks, target, .. } = walk;
    if record.len() != at.checked_add(behind)?.checked_add(main_len)? {
        return None;
    }
    let Some((id, will_init, from, len)) = target else { return Some(Found::Absent) };
    Some(Found::View(View {
        rmgr: u8_at(record, 17).ok()?,
        info: u8_at(record, 16).ok()?,
        xid: u32_at(record, 4).ok()?,
        id,
        number: block,
        will_init,
        image: None,
        data: slice_at(record, at + from, len).ok()?,
        main: slice_at(record, at + behind, main_len).ok()?,
        blocks,
    }))
}

/// What a header inside of a record begins.
enum Header {
    /// The main data, of this length; nothing follows it.
    Main(usize),
    /// A block reference with this number; the walk stands at its first byte.
    Block(u8),
    /// Something else; the walk stands behind it.
    Other,
}

/// A walk over the headers of a record.
#[derive(Default)]
struct Walk<'a> {
    record: &'a [u8],
    at: usize,
    /// Length of what stands behind the headers, for those that were passed.
    behind: usize,
    next_id: u8,
    /// Relation of the last block reference.
    node: Option<[u32; 3]>,
    blocks: [Option<BlockNumber>; BLOCKS],
    /// The wanted block: number, "replaces the page", place behind the headers and length of its
    /// data.
    target: Option<(u8, bool, usize, usize)>,
}

impl Walk<'_> {
    fn header(&mut self) -> Option<Header> {
        if self.record.len().checked_sub(self.at)? <= self.behind {
            return Some(Header::Main(0));
        }
        let (len, header) = match u8_at(self.record, self.at).ok()? {
            255 => (2, Header::Main(usize::from(u8_at(self.record, self.at + 1).ok()?))),
            254 => (5, Header::Main(u32_at(self.record, self.at + 1).ok()? as usize)),
            253 => (3, Header::Other),
            252 => (5, Header::Other),
            id if id > BLOCK_ID_MAX || id < self.next_id => return None,
            id => {
                self.next_id = id + 1;
                (0, Header::Block(id))
            }
        };
        self.at += len;
        Some(header)
    }

    fn block(&mut self, id: u8, rel: RelTag, block: BlockNumber) -> Option<()> {
        let record = self.record;
        let flags = u8_at(record, self.at + 1).ok()?;
        let len = usize::from(u16_at(record, self.at + 2).ok()?);
        if (flags & HAS_DATA != 0) != (len > 0) || flags & FORK_MASK > 3 {
            return None;
        }
        self.at += 4;
        let mut image_len = 0;
        if flags & HAS_IMAGE != 0 {
            image_len = usize::from(u16_at(record, self.at).ok()?);
            let info = u8_at(record, self.at + 4).ok()?;
            let hole_stored = info & IMAGE_COMPRESSED != 0 && info & IMAGE_HAS_HOLE != 0;
            self.at += if hole_stored { 7 } else { 5 };
        }
        if flags & SAME_REL == 0 {
            let [spc, db, rel] = [0, 4, 8].map(|field| u32_at(record, self.at + field));
            self.node = Some([spc.ok()?, db.ok()?, rel.ok()?]);
            self.at += 12;
        }
        let node = self.node?;
        let number = u32::from_le_bytes(bytes_at(record, self.at).ok()?);
        self.at += 4;
        if let Some(place) = self.blocks.get_mut(usize::from(id)) {
            *place = Some(number);
        }
        self.behind += image_len;
        let wanted = [rel.node.spc, rel.node.db, rel.node.rel];
        if number == block && node == wanted && flags & FORK_MASK == rel.fork {
            if self.target.is_some() || flags & HAS_IMAGE != 0 {
                return None;
            }
            self.target = Some((id, flags & WILL_INIT != 0, self.behind, len));
        }
        self.behind += len;
        Some(())
    }
}
