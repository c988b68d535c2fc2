//! BRIN (`brin_redo` in `src/backend/access/brin/brin_xlog.c`; layouts:
//! `src/include/access/brin_xlog.h`, `brin_page.h`).
//!
//! Pages have eight bytes of special space, the page's type in the last two.

use super::Redoing;
use super::compact::{index_delete_keep_lines, index_overwrite};
use super::page::{
    Add, Fit, HEADER, add_item, init, item_pointer, put, put_u16, put_u32, set_lower, size_at,
    special, u16_at, u32_at,
};

const CREATE_INDEX: u8 = 0x00;
const INSERT: u8 = 0x10;
const UPDATE: u8 = 0x20;
const SAMEPAGE_UPDATE: u8 = 0x30;
const REVMAP_EXTEND: u8 = 0x40;
const DESUMMARIZE: u8 = 0x50;
/// `XLOG_BRIN_OPMASK`.
const OPERATION_MASK: u8 = 0x70;
/// `XLOG_BRIN_INIT_PAGE`.
const INIT_PAGE: u8 = 0x80;

const SPECIAL: usize = 8;
/// Where in the special space the type stands.
const TYPE_AT: usize = 6;
const TYPE_META: u16 = 0xF091;
const TYPE_REVMAP: u16 = 0xF092;
const TYPE_REGULAR: u16 = 0xF093;
const META_MAGIC: u32 = 0xA810_9CFA;
/// End of `BrinMetaPageData`: u32 magic, u32 version, u32 pages per range, u32 last map page.
const META_END: usize = HEADER + 16;
const META_LAST_REVMAP: usize = HEADER + 12;
/// `REVMAP_PAGE_MAXITEMS`.
const REVMAP_ITEMS: u32 = 1360;

const NO_SUCH_BLOCK: &str = "the record has more blocks than its kind";

/// All records of the resource manager.
pub(super) fn redo(at: &mut Redoing<'_>) -> Fit<()> {
    match (at.view.info & OPERATION_MASK, at.view.id) {
        (CREATE_INDEX, 0) => create(at),
        (INSERT, 0 | 1) => insert(at, 0),
        // xl_brin_update: u16 old offset, u16 padding, xl_brin_insert
        (UPDATE, 0 | 1) => insert(at, 4),
        (UPDATE, 2) => remove(at, 0),
        (SAMEPAGE_UPDATE, 0) => overwrite(at),
        (REVMAP_EXTEND, 0 | 1) => extend(at),
        // xl_brin_desummarize: u32 pages per range, u32 heap block, u16 offset
        (DESUMMARIZE, 0) => forget(at),
        (DESUMMARIZE, 1) => remove(at, 8),
        (CREATE_INDEX..=DESUMMARIZE, _) => Err(NO_SUCH_BLOCK),
        _ => Err("BRIN has no such record"),
    }
}

fn init_page(at: &mut Redoing<'_>, kind: u16) -> Fit<()> {
    at.will_init()?;
    init(at.page, SPECIAL)?;
    let place = special(at.page, SPECIAL)?;
    put_u16(at.page, place + TYPE_AT, kind)
}

/// `xl_brin_createidx`: u32 pages per range, u16 version.
fn create(at: &mut Redoing<'_>) -> Fit<()> {
    let main = at.view.main;
    let (pages_per_range, version) = (u32_at(main, 0)?, u16_at(main, 4)?);
    init_page(at, TYPE_META)?;
    put_u32(at.page, HEADER, META_MAGIC)?;
    put_u32(at.page, HEADER + 4, u32::from(version))?;
    put_u32(at.page, HEADER + 8, pages_per_range)?;
    set_lower(at.page, META_END)?;
    at.set_lsn();
    Ok(())
}

/// `xl_brin_insert` at `from`: u32 heap block, u32 pages per range, u16 offset. Reference 0 is the
/// page of the tuple, reference 1 that of the map.
fn insert(at: &mut Redoing<'_>, from: usize) -> Fit<()> {
    let main = at.view.main;
    let number = u16_at(main, from + 8)?;
    if at.view.id == 1 {
        if !at.needs_redo()? {
            return Ok(());
        }
        let block = at.view.other_block(0).ok_or("the record names no page for the tuple")?;
        let pointer = match number {
            0 => item_pointer(u32::MAX, 0),
            _ => item_pointer(block, number),
        };
        return set_pointer(at, u32_at(main, from + 4)?, u32_at(main, from)?, pointer);
    }
    if at.view.info & INIT_PAGE != 0 {
        init_page(at, TYPE_REGULAR)?;
    } else if !at.needs_redo()? {
        return Ok(());
    }
    add_item(at.page, at.view.data, usize::from(number), Add::Overwrite)?;
    at.set_lsn();
    Ok(())
}

/// Sets the map's entry for a heap block (`brinSetHeapBlockItemptr`).
fn set_pointer(at: &mut Redoing<'_>, per_range: u32, heap: u32, pointer: [u8; 6]) -> Fit<()> {
    let range = heap.checked_div(per_range).ok_or("ranges of no pages")?;
    let entry = HEADER + 6 * (range % REVMAP_ITEMS) as usize;
    put(at.page, entry, &pointer)?;
    at.set_lsn();
    Ok(())
}

/// Removes the tuple whose offset stands at `from`.
fn remove(at: &mut Redoing<'_>, from: usize) -> Fit<()> {
    let number = size_at(at.view.main, from)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    index_delete_keep_lines(at.page, number)?;
    at.set_lsn();
    Ok(())
}

/// `xl_brin_samepage_update`: u16 offset.
fn overwrite(at: &mut Redoing<'_>) -> Fit<()> {
    let number = size_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    index_overwrite(at.page, number, at.view.data)?;
    at.set_lsn();
    Ok(())
}

/// `xl_brin_revmap_extend`: u32 new map page. Reference 0 is the meta page, reference 1 the new one.
fn extend(at: &mut Redoing<'_>) -> Fit<()> {
    let target = u32_at(at.view.main, 0)?;
    if at.view.id == 1 {
        init_page(at, TYPE_REVMAP)?;
    } else if at.needs_redo()? {
        put_u32(at.page, META_LAST_REVMAP, target)?;
        set_lower(at.page, META_END)?;
    } else {
        return Ok(());
    }
    at.set_lsn();
    Ok(())
}

/// Removes the map's entry for a heap block.
fn forget(at: &mut Redoing<'_>) -> Fit<()> {
    let main = at.view.main;
    let (per_range, heap) = (u32_at(main, 0)?, u32_at(main, 4)?);
    if !at.needs_redo()? {
        return Ok(());
    }
    set_pointer(at, per_range, heap, item_pointer(u32::MAX, 0))
}
