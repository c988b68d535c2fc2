//! What redo of one block needs of a record, found without copies or allocation.
//!
//! Taking a record apart wholly ([`Record::parse`]) costs more than applying it. [`find`] walks
//! over its headers once and notes where things stand. It leaves to [`Record::parse`] whatever is
//! not plain: records that contradict themselves, blocks with images.

use crate::base::{BlockNumber, RelTag};
use crate::wal::image::BlockImage;
use crate::wal::record::{BlockRef, HEADER, Record};

use super::page::{slice_at, u8_at, u16_at, u32_at};

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
    pub(super) image: Option<&'a BlockImage<'a>>,
    /// The block's data.
    pub(super) data: &'a [u8],
    /// The main data.
    pub(super) main: &'a [u8],
    blocks: [Option<BlockNumber>; BLOCKS],
}

impl<'a> View<'a> {
    /// A record that was taken apart.
    pub(super) fn of(record: &'a Record<'a>, block: &'a BlockRef<'a>) -> View<'a> {
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
            data: block.data,
            main: record.main_data,
            blocks,
        }
    }

    /// The resource manager's part of `xl_info`.
    pub(super) fn operation(&self) -> u8 {
        self.info & 0xF0
    }

    /// The image, if redo is to restore it.
    pub(super) fn applied_image(&self) -> Option<&'a BlockImage<'a>> {
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

/// The wanted block's reference.
struct Target {
    id: u8,
    will_init: bool,
    /// Where its data begins, counted from the end of the headers.
    from: usize,
    len: usize,
}

/// A walk over the headers of a record.
struct Walk<'a> {
    record: &'a [u8],
    wanted: (RelTag, BlockNumber),
    /// Where the next header stands.
    at: usize,
    /// Length of the blocks' data and images so far, which stand behind the headers.
    behind: usize,
    next_id: u8,
    node: Option<[u32; 3]>,
    blocks: [Option<BlockNumber>; BLOCKS],
    target: Option<Target>,
}

/// `None` for what is not plain.
fn walk(record: &[u8], rel: RelTag, block: BlockNumber) -> Option<Found<'_>> {
    if u32_at(record, 0).ok()? as usize != record.len() {
        return None;
    }
    let mut walk = Walk {
        record,
        wanted: (rel, block),
        at: HEADER,
        behind: 0,
        next_id: 0,
        node: None,
        blocks: [None; BLOCKS],
        target: None,
    };
    let main_len = walk.headers()?;
    let Walk { at, behind, blocks, target, .. } = walk;
    if record.len() != at.checked_add(behind)?.checked_add(main_len)? {
        return None;
    }
    let Some(target) = target else { return Some(Found::Absent) };
    Some(Found::View(View {
        rmgr: u8_at(record, 17).ok()?,
        info: u8_at(record, 16).ok()?,
        xid: u32_at(record, 4).ok()?,
        id: target.id,
        number: block,
        will_init: target.will_init,
        image: None,
        data: slice_at(record, at + target.from, target.len).ok()?,
        main: slice_at(record, at + behind, main_len).ok()?,
        blocks,
    }))
}

impl Walk<'_> {
    /// All headers; gives the length of the main data.
    fn headers(&mut self) -> Option<usize> {
        while self.record.len().checked_sub(self.at)? > self.behind {
            let id = u8_at(self.record, self.at).ok()?;
            let (header, main_len) = match id {
                255 => (2, Some(usize::from(u8_at(self.record, self.at + 1).ok()?))),
                254 => (5, Some(u32_at(self.record, self.at + 1).ok()? as usize)),
                253 => (3, None),
                252 => (5, None),
                _ => (self.block(id)?, None),
            };
            self.at += header;
            if main_len.is_some() {
                return main_len;
            }
        }
        Some(0)
    }

    /// A block reference; gives the length of its header.
    fn block(&mut self, id: u8) -> Option<usize> {
        if id > BLOCK_ID_MAX || id < self.next_id {
            return None;
        }
        self.next_id = id + 1;
        let (record, mut at) = (self.record, self.at);
        let flags = u8_at(record, at + 1).ok()?;
        let len = usize::from(u16_at(record, at + 2).ok()?);
        if (flags & HAS_DATA != 0) != (len > 0) || flags & FORK_MASK > 3 {
            return None;
        }
        at += 4;
        if flags & HAS_IMAGE != 0 {
            self.behind += usize::from(u16_at(record, at).ok()?);
            let info = u8_at(record, at + 4).ok()?;
            let hole_stored = info & IMAGE_COMPRESSED != 0 && info & IMAGE_HAS_HOLE != 0;
            at += if hole_stored { 7 } else { 5 };
        }
        if flags & SAME_REL == 0 {
            let [spc, db, rel] = [0, 4, 8].map(|field| u32_at(record, at + field).ok());
            self.node = Some([spc?, db?, rel?]);
            at += 12;
        }
        let number = u32_at(record, at).ok()?;
        if let Some(place) = self.blocks.get_mut(usize::from(id)) {
            *place = Some(number);
        }
        let (rel, block) = self.wanted;
        let same_rel = self.node? == [rel.node.spc, rel.node.db, rel.node.rel];
        if same_rel && number == block && flags & FORK_MASK == rel.fork {
            if self.target.is_some() || flags & HAS_IMAGE != 0 {
                return None;
            }
            let will_init = flags & WILL_INIT != 0;
            self.target = Some(Target { id, will_init, from: self.behind, len });
        }
        self.behind += len;
        Some(at + 4 - self.at)
    }
}
