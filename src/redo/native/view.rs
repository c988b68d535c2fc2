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
    let wanted = [rel.node.spc, rel.node.db, rel.node.rel];
    let mut at = HEADER;
    let mut same: Option<[u32; 3]> = None;
    let mut blocks = [None; BLOCKS];
    // Length of what stands behind the headers, before and with the data of the wanted block.
    let (mut behind, mut next_id) = (0, 0);
    let mut target: Option<(u8, bool, usize, usize)> = None;
    let main_len = loop {
        if record.len().checked_sub(at)? <= behind {
            break 0;
        }
        let id = u8_at(record, at).ok()?;
        match id {
            255 => {
                let len = usize::from(u8_at(record, at + 1).ok()?);
                at += 2;
                break len;
            }
            254 => {
                let len = u32_at(record, at + 1).ok()? as usize;
                at += 5;
                break len;
            }
            253 => {
                at += 3;
                continue;
            }
            252 => {
                at += 5;
                continue;
            }
            id if id > BLOCK_ID_MAX || id < next_id => return None,
            _ => next_id = id + 1,
        }
        let flags = u8_at(record, at + 1).ok()?;
        let len = usize::from(u16_at(record, at + 2).ok()?);
        if (flags & HAS_DATA != 0) != (len > 0) || flags & FORK_MASK > 3 {
            return None;
        }
        at += 4;
        let mut image_len = 0;
        if flags & HAS_IMAGE != 0 {
            image_len = usize::from(u16_at(record, at).ok()?);
            let info = u8_at(record, at + 4).ok()?;
            let hole_stored = info & IMAGE_COMPRESSED != 0 && info & IMAGE_HAS_HOLE != 0;
            at += if hole_stored { 7 } else { 5 };
        }
        if flags & SAME_REL == 0 {
            let [spc, db, rel] = [0, 4, 8].map(|field| u32_at(record, at + field));
            same = Some([spc.ok()?, db.ok()?, rel.ok()?]);
            at += 12;
        }
        let node = same?;
        let number = u32::from_le_bytes(bytes_at(record, at).ok()?);
        at += 4;
        if let Some(place) = blocks.get_mut(usize::from(id)) {
            *place = Some(number);
        }
        behind += image_len;
        if number == block && node == wanted && flags & FORK_MASK == rel.fork {
            if target.is_some() || flags & HAS_IMAGE != 0 {
                return None;
            }
            target = Some((id, flags & WILL_INIT != 0, behind, len));
        }
        behind += len;
    };
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
