//! Heap tables (`src/include/access/heapam_xlog.h`; redo: `heap_redo`, `heap2_redo`).
//!
//! A record that takes a page's all-visible mark away clears the page's bits in the visibility
//! map too, without naming the map's block. Redo does so before it looks at the heap page, and
//! whether or not the heap page needs the record; so the change comes before those of the blocks.

use crate::base::{BlockNumber, RelNode};
use crate::wal::change::Change;
use crate::wal::decode::{DecodeError, Decoding};
use crate::wal::record::Record;

/// Part of `xl_info` with the operation; the remaining bit says that the page is initialised
/// (`XLOG_HEAP_OPMASK`).
const OPERATION_MASK: u8 = 0x70;

const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_HOT_UPDATE: u8 = 0x40;
const HEAP_LOCK: u8 = 0x60;
const HEAP2_VISIBLE: u8 = 0x40;
const HEAP2_MULTI_INSERT: u8 = 0x50;
const HEAP2_LOCK_UPDATED: u8 = 0x60;

/// Both bits of a heap block: all-visible and all-frozen (`VISIBILITYMAP_VALID_BITS`).
const VALID_BITS: u8 = 0x03;
/// `VISIBILITYMAP_ALL_FROZEN`.
const ALL_FROZEN: u8 = 0x02;

/// `XLH_*_ALL_VISIBLE_CLEARED`, `XLH_UPDATE_OLD_ALL_VISIBLE_CLEARED` and
/// `XLH_LOCK_ALL_FROZEN_CLEARED`, all the same bit.
const CLEARED: u8 = 0x01;
/// `XLH_UPDATE_NEW_ALL_VISIBLE_CLEARED`.
const NEW_CLEARED: u8 = 0x02;

pub(crate) fn decode_heap(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    match at.record.header.info & OPERATION_MASK {
        // xl_heap_insert: u16 offset, u8 flags
        HEAP_INSERT => clear(at, 2, VALID_BITS)?,
        // xl_heap_delete: u32 xmax, u16 offset, u8 infobits, u8 flags
        HEAP_DELETE => clear(at, 7, VALID_BITS)?,
        // xl_heap_update: u32 old xmax, u16 old offset, u8 infobits, u8 flags, …
        HEAP_UPDATE | HEAP_HOT_UPDATE => clear_update(at)?,
        // xl_heap_lock: u32 xid, u16 offset, i8 infobits, u8 flags
        HEAP_LOCK => clear(at, 7, ALL_FROZEN)?,
        _ => {}
    }
    at.blocks(|_| false);
    Ok(())
}

/// True for a record of which [`decode_heap`] makes nothing but its blocks.
pub(crate) fn is_plain_heap(record: &Record<'_>) -> bool {
    match record.header.info & OPERATION_MASK {
        HEAP_INSERT => has_no_flag(record, 2, CLEARED),
        HEAP_DELETE | HEAP_LOCK => has_no_flag(record, 7, CLEARED),
        HEAP_UPDATE | HEAP_HOT_UPDATE => has_no_flag(record, 7, CLEARED | NEW_CLEARED),
        _ => true,
    }
}

/// The same of [`decode_heap2`].
pub(crate) fn is_plain_heap2(record: &Record<'_>) -> bool {
    match record.header.info & OPERATION_MASK {
        HEAP2_MULTI_INSERT => has_no_flag(record, 0, CLEARED),
        HEAP2_LOCK_UPDATED => has_no_flag(record, 7, CLEARED),
        _ => true,
    }
}

fn has_no_flag(record: &Record<'_>, offset: usize, bits: u8) -> bool {
    record.main_data.get(offset).is_some_and(|flags| flags & bits == 0)
}

pub(crate) fn decode_heap2(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let operation = at.record.header.info & OPERATION_MASK;
    match operation {
        // xl_heap_multi_insert: u8 flags, u16 count, …
        HEAP2_MULTI_INSERT => clear(at, 0, VALID_BITS)?,
        // xl_heap_lock_updated: u32 xmax, u16 offset, u8 infobits, u8 flags
        HEAP2_LOCK_UPDATED => clear(at, 7, ALL_FROZEN)?,
        _ => {}
    }
    // Redo reads the visibility map's block, the first reference, with RBM_ZERO_ON_ERROR. No
    // other redo routine of PostgreSQL 15 extends a relation for a page that it does not
    // initialise.
    at.blocks(|id| operation == HEAP2_VISIBLE && id == 0);
    Ok(())
}

fn flags_at(at: &Decoding<'_, '_>, offset: usize) -> Result<u8, DecodeError> {
    at.record.main_data.get(offset).copied().ok_or_else(|| at.malformed("it is cut"))
}

/// Relation and number of the block with this reference number.
fn heap_block(at: &Decoding<'_, '_>, id: u8) -> Option<(RelNode, BlockNumber)> {
    at.record.block(id).map(|block| (block.rel.node, block.block))
}

/// A record whose only heap block is the first reference, with its flags at `offset`.
fn clear(at: &mut Decoding<'_, '_>, offset: usize, bits: u8) -> Result<(), DecodeError> {
    if flags_at(at, offset)? & CLEARED == 0 {
        return Ok(());
    }
    let (node, block) = heap_block(at, 0).ok_or_else(|| at.malformed("it names no block"))?;
    at.push(Change::VmClear { node, flags: bits, heap_blocks: [Some(block), None] });
    Ok(())
}

/// An update: the new page is reference 0, the old one reference 1 or the same page.
fn clear_update(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let flags = flags_at(at, 7)?;
    let (node, new) = heap_block(at, 0).ok_or_else(|| at.malformed("it names no block"))?;
    let old = heap_block(at, 1).map_or(new, |(_, old)| old);
    let old = (flags & CLEARED != 0).then_some(old);
    let new = (flags & NEW_CLEARED != 0).then_some(new).filter(|new| Some(*new) != old);
    let heap_blocks = match (old, new) {
        (None, None) => return Ok(()),
        (None, new) => [new, None],
        blocks => blocks.into(),
    };
    // One change for both, because both may be on the same page of the map.
    at.push(Change::VmClear { node, flags: VALID_BITS, heap_blocks });
    Ok(())
}
