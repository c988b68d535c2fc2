//! Records of resource manager `Heap2`: pruning, vacuum, freezing, visibility, and what of
//! [`super::heap`] belongs to it (`heap2_redo` in `src/backend/access/heap/heapam.c`).

use super::Redoing;
use super::compact::{repair_fragmentation, truncate_lines};
use super::heap::{OPERATION_MASK, lock_updated, multi_insert};
use super::heap_tuple::{CID, INFOMASK, INFOMASK2, TUPLE_HEADER, XMAX};
use super::page::{
    ALL_VISIBLE, Fit, HEADER, Line, LineState, change_flags, init, normal_item, put, put_u16,
    put_u32, set_line, size_at, u8_at, u16_at, u32_at,
};
use crate::base::page::page_is_new;
use crate::redo::small::{heap_block_to_map_block, heap_block_to_map_byte};

const REWRITE: u8 = 0x00;
const PRUNE: u8 = 0x10;
const VACUUM: u8 = 0x20;
const FREEZE_PAGE: u8 = 0x30;
const VISIBLE: u8 = 0x40;
const MULTI_INSERT: u8 = 0x50;
const LOCK_UPDATED: u8 = 0x60;

const FREEZE_XVAC: u8 = 0x02;
const INVALID_XVAC: u8 = 0x04;
/// `FrozenTransactionId`.
const FROZEN_XID: u32 = 2;
/// Size of `xl_heap_freeze_tuple`.
const FREEZE_TUPLE: usize = 12;
/// `VISIBILITYMAP_VALID_BITS`.
const MAP_BITS: u8 = 0x03;

/// False for what does not concern pages and is not expected for one.
pub(super) fn is_known(operation: u8) -> bool {
    operation & OPERATION_MASK != REWRITE
}

/// All records of resource manager `Heap2` that concern pages.
pub(super) fn redo(at: &mut Redoing<'_>) -> Fit<()> {
    match at.view.info & OPERATION_MASK {
        PRUNE => prune(at),
        VACUUM => vacuum(at),
        FREEZE_PAGE => freeze(at),
        VISIBLE => visible(at),
        MULTI_INSERT => multi_insert(at),
        LOCK_UPDATED => lock_updated(at),
        REWRITE => Err("the record does not concern pages"),
        // XLOG_HEAP2_NEW_CID serves logical decoding alone.
        _ => Ok(()),
    }
}

fn only_first_block(at: &Redoing<'_>) -> Fit<()> {
    match at.view.id {
        0 => Ok(()),
        _ => Err("the record has more blocks than its kind"),
    }
}

/// `xl_heap_prune`: u32 xid, u16 redirections, u16 dead; block data: (u16 from, u16 to) …, u16 dead
/// …, u16 unused up to the end.
fn prune(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let main = at.view.main;
    let (redirected, dead) = (size_at(main, 4)?, size_at(main, 6)?);
    if !at.needs_redo()? {
        return Ok(());
    }
    let data = at.view.data;
    let mut from = 0;
    for _ in 0..redirected {
        let (number, target) = (size_at(data, from)?, size_at(data, from + 2)?);
        let line = Line { offset: target, state: LineState::Redirect, len: 0 };
        set_line(at.page, number, line)?;
        from += 4;
    }
    for _ in 0..dead {
        set_line(at.page, size_at(data, from)?, Line::DEAD)?;
        from += 2;
    }
    while from < data.len() {
        set_line(at.page, size_at(data, from)?, Line::UNUSED)?;
        from += 2;
    }
    repair_fragmentation(at.page)?;
    at.set_lsn();
    Ok(())
}

/// `xl_heap_vacuum`: u16 count; block data: u16 unused ….
fn vacuum(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let count = size_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    for index in 0..count {
        set_line(at.page, size_at(at.view.data, 2 * index)?, Line::UNUSED)?;
    }
    truncate_lines(at.page)?;
    at.set_lsn();
    Ok(())
}

/// `xl_heap_freeze_page`: u32 xid, u16 count; block data: entries of 12 bytes: u32 xmax, u16
/// offset, u16 infomask2, u16 infomask, u8 flags.
fn freeze(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let count = size_at(at.view.main, 4)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let data = at.view.data;
    for index in 0..count {
        let entry = index * FREEZE_TUPLE;
        let number = size_at(data, entry + 4)?;
        let flags = u8_at(data, entry + 10)?;
        let place = normal_item(at.page, number, TUPLE_HEADER)?.offset;
        put_u32(at.page, place + XMAX, u32_at(data, entry)?)?;
        if flags & FREEZE_XVAC != 0 {
            put_u32(at.page, place + CID, FROZEN_XID)?;
        }
        if flags & INVALID_XVAC != 0 {
            put_u32(at.page, place + CID, 0)?;
        }
        put_u16(at.page, place + INFOMASK, u16_at(data, entry + 8)?)?;
        put_u16(at.page, place + INFOMASK2, u16_at(data, entry + 6)?)?;
    }
    at.set_lsn();
    Ok(())
}

/// `xl_heap_visible`: u32 xid, u8 flags. Reference 0 is the visibility map's page, reference 1 the
/// heap page.
fn visible(at: &mut Redoing<'_>) -> Fit<()> {
    let flags = u8_at(at.view.main, 4)?;
    let heap_block = at.view.other_block(1).ok_or("the record names no heap page")?;
    match at.view.id {
        0 => visible_in_map(at, flags, heap_block),
        1 => {
            if at.needs_redo()? {
                change_flags(at.page, ALL_VISIBLE, 0)?;
                if at.settings.hint_bits_logged {
                    at.set_lsn();
                }
            }
            Ok(())
        }
        _ => Err("the record has more blocks than its kind"),
    }
}

/// Sets bits in the map. The page may be new, and gets its header then; its LSN changes with the
/// bits only.
fn visible_in_map(at: &mut Redoing<'_>, flags: u8, heap_block: u32) -> Fit<()> {
    if heap_block_to_map_block(heap_block) != at.view.number {
        return Err("the heap page belongs to another page of the map");
    }
    if page_is_new(&at.page[..]) && !at.replaces_page() {
        if at.lsn <= crate::base::page::page_lsn(&at.page[..]) {
            return Ok(());
        }
        init(at.page, 0)?;
        at.applied = super::Applied::Changed;
    } else if !at.needs_redo()? {
        return Ok(());
    }
    let (byte, place) = heap_block_to_map_byte(heap_block);
    let (byte, shift) = (HEADER + byte as usize, 2 * place);
    let old = u8_at(at.page, byte)?;
    if flags != old >> shift & MAP_BITS {
        let bits = u16::from(flags) << shift;
        put(at.page, byte, &[old | bits as u8])?;
        at.set_lsn();
    }
    Ok(())
}
