//! B-trees (`btree_redo` in `src/backend/access/nbtree/nbtxlog.c`; layouts:
//! `src/include/access/nbtxlog.h`, `nbtree.h`).
//!
//! The special space of a page (`BTPageOpaqueData`), 16 bytes: u32 left sibling, u32 right
//! sibling, u32 level, u16 flags, u16 vacuum cycle.

use super::Redoing;
use super::btree_posting::{
    ALT_TID, INDEX_TUPLE_HEADER, Made, Pending, swap, tuple, tuple_size, without,
};
use super::compact::{index_delete, index_multi_delete, index_overwrite};
use super::page::{
    Add, Fit, HEADER, INDEX_LINES_MAX, Line, add_item, bounds, empty_like, init, item,
    item_pointer, line, lines, max_align, pointer_block, put, put_u16, put_u32, rest_at, set_lower,
    set_upper, size_at, slice_at, special, u8_at, u16_at, u32_at,
};
use crate::base::page::{PAGE_SIZE, Page};

const INSERT_LEAF: u8 = 0x00;
const INSERT_UPPER: u8 = 0x10;
const INSERT_META: u8 = 0x20;
const SPLIT_L: u8 = 0x30;
const SPLIT_R: u8 = 0x40;
const INSERT_POST: u8 = 0x50;
const DEDUP: u8 = 0x60;
const DELETE: u8 = 0x70;
const UNLINK_PAGE: u8 = 0x80;
const UNLINK_PAGE_META: u8 = 0x90;
const NEWROOT: u8 = 0xA0;
const MARK_PAGE_HALFDEAD: u8 = 0xB0;
const VACUUM: u8 = 0xC0;
const META_CLEANUP: u8 = 0xE0;

/// Size of the special space.
const SPECIAL: usize = 16;
const PREV: usize = 0;
const NEXT: usize = 4;
const LEVEL: usize = 8;
const FLAGS: usize = 12;
const CYCLE: usize = 14;

const LEAF: u16 = 0x0001;
const ROOT: u16 = 0x0002;
const DELETED: u16 = 0x0004;
const META: u16 = 0x0008;
const HALF_DEAD: u16 = 0x0010;
const HAS_GARBAGE: u16 = 0x0040;
const INCOMPLETE_SPLIT: u16 = 0x0080;
const HAS_FULLXID: u16 = 0x0100;

/// `P_NONE`.
const NO_BLOCK: u32 = 0;
/// `P_HIKEY`.
const HIGH_KEY: usize = 1;
/// `BTREE_MAGIC`.
const MAGIC: u32 = 0x0005_3162;
/// Size of `BTMetaPageData`.
const META_BYTES: usize = 48;

/// All records of the resource manager.
pub(super) fn redo(at: &mut Redoing<'_>) -> Fit<()> {
    let info = at.view.operation();
    match (info, at.view.id) {
        (INSERT_LEAF | INSERT_UPPER | INSERT_META, 0) => insert(at),
        (INSERT_POST, 0) => insert_posting(at),
        (INSERT_UPPER | INSERT_META | NEWROOT, 1) => clear_incomplete_split(at),
        (INSERT_META | NEWROOT, 2) | (UNLINK_PAGE_META, 4) | (META_CLEANUP, 0) => meta(at),
        (SPLIT_L | SPLIT_R, 0) => split_left(at, info == SPLIT_L),
        (SPLIT_L | SPLIT_R, 1) => split_right(at),
        (SPLIT_L | SPLIT_R, 2) => {
            let right = at.view.other_block(1).ok_or("a split names no right page")?;
            link(at, PREV, right)
        }
        (SPLIT_L | SPLIT_R, 3) => clear_incomplete_split(at),
        (DEDUP, 0) => dedup(at),
        // xl_btree_vacuum: u16 deleted, u16 updated; xl_btree_delete: the same after a u32 xid
        (VACUUM, 0) => delete(at, 0),
        (DELETE, 0) => delete(at, 4),
        (MARK_PAGE_HALFDEAD, 0) => half_dead_leaf(at),
        (MARK_PAGE_HALFDEAD, 1) => half_dead_parent(at),
        (UNLINK_PAGE | UNLINK_PAGE_META, id) => unlink(at, id),
        (NEWROOT, 0) => new_root(at),
        _ => Err("B-trees have no such record, or it has more blocks than its kind"),
    }
}

/// The fields of the special space.
struct Opaque {
    prev: u32,
    next: u32,
    level: u32,
    flags: u16,
}

/// An empty page with this special space; the vacuum cycle is 0.
fn init_page(at: &mut Redoing<'_>, opaque: &Opaque) -> Fit<()> {
    at.will_init()?;
    init(at.page, SPECIAL)?;
    let place = special(at.page, SPECIAL)?;
    put_u32(at.page, place + PREV, opaque.prev)?;
    put_u32(at.page, place + NEXT, opaque.next)?;
    put_u32(at.page, place + LEVEL, opaque.level)?;
    put_u16(at.page, place + FLAGS, opaque.flags)
}

fn change_flags(page: &mut Page, set: u16, clear: u16) -> Fit<()> {
    let place = special(page, SPECIAL)? + FLAGS;
    let flags = u16_at(page, place)?;
    put_u16(page, place, flags & !clear | set)
}

/// Number of the first item that is not the high key (`P_FIRSTDATAKEY`).
fn first_data(page: &Page) -> Fit<usize> {
    let place = special(page, SPECIAL)?;
    Ok(if u32_at(page, place + NEXT)? == NO_BLOCK { 1 } else { 2 })
}

/// An item as an index tuple, without what may follow it.
fn index_tuple(page: &Page, number: usize) -> Fit<&[u8]> {
    tuple(item(page, line(page, number)?, INDEX_TUPLE_HEADER)?)
}

fn clear_incomplete_split(at: &mut Redoing<'_>) -> Fit<()> {
    if at.needs_redo()? {
        change_flags(at.page, 0, INCOMPLETE_SPLIT)?;
        at.set_lsn();
    }
    Ok(())
}

/// Sets a link to a sibling.
fn link(at: &mut Redoing<'_>, field: usize, sibling: u32) -> Fit<()> {
    if at.needs_redo()? {
        let place = special(at.page, SPECIAL)?;
        put_u32(at.page, place + field, sibling)?;
        at.set_lsn();
    }
    Ok(())
}

/// The meta page, made anew. Block data (`xl_btree_metadata`): u32 version, root, level, fast
/// root, fast level, pages deleted at the last cleanup, u8 "equal is identical".
fn meta(at: &mut Redoing<'_>) -> Fit<()> {
    let data = at.view.data;
    init_page(at, &Opaque { prev: 0, next: 0, level: 0, flags: META })?;
    put_u32(at.page, HEADER, MAGIC)?;
    put(at.page, HEADER + 4, slice_at(data, 0, 24)?)?;
    put(at.page, HEADER + 32, &(-1.0f64).to_le_bytes())?;
    put(at.page, HEADER + 40, &[u8_at(data, 24)?])?;
    set_lower(at.page, HEADER + META_BYTES)?;
    at.set_lsn();
    Ok(())
}

/// `xl_btree_insert`: u16 offset; block data: the tuple.
fn insert(at: &mut Redoing<'_>) -> Fit<()> {
    let number = size_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    add_item(at.page, at.view.data, number, Add::Shift)?;
    at.set_lsn();
    Ok(())
}

/// A tuple that may be changed: its size is a multiple of the alignment, as that of every tuple
/// that PostgreSQL makes.
fn copy_tuple<'a>(bytes: &[u8], buffer: &'a mut Page) -> Fit<&'a mut [u8]> {
    let source = tuple(bytes)?;
    let target = buffer.get_mut(..source.len()).ok_or("an index tuple is too long")?;
    if !source.len().is_multiple_of(8) {
        return Err("the size of an index tuple is not aligned");
    }
    target.copy_from_slice(source);
    Ok(target)
}

/// `xl_btree_insert`: u16 offset; block data: u16 entry at which the list of the tuple before is
/// split, the new tuple.
fn insert_posting(at: &mut Redoing<'_>) -> Fit<()> {
    let number = size_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let entry = size_at(at.view.data, 0)?;
    let data = rest_at(at.view.data, 2)?;
    let (mut old_buffer, mut new_buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let new = copy_tuple(data, &mut new_buffer)?;
    if new.len() != data.len() {
        return Err("a new tuple has another size than its data");
    }
    let before = number.checked_sub(1).ok_or("there is no tuple before the first")?;
    let found = line(at.page, before)?;
    let old = copy_tuple(item(at.page, found, INDEX_TUPLE_HEADER)?, &mut old_buffer)?;
    swap(old, new, entry)?;
    put(at.page, found.offset, old)?;
    add_item(at.page, new, number, Add::Shift)?;
    at.set_lsn();
    Ok(())
}

/// Adds items to an empty page; they stand in `data` in reverse order (`_bt_restore_page`).
fn restore_items(page: &mut Page, data: &[u8]) -> Fit<()> {
    let mut items: [&[u8]; INDEX_LINES_MAX] = [&[]; INDEX_LINES_MAX];
    let (mut count, mut from) = (0, 0);
    while from < data.len() {
        let rest = rest_at(data, from)?;
        let size = max_align(tuple_size(rest)?);
        *items.get_mut(count).ok_or("too many items")? = slice_at(rest, 0, size)?;
        count += 1;
        from += size;
    }
    let items = items.get(..count).unwrap_or_default();
    for (index, item) in items.iter().rev().enumerate() {
        add_item(page, item, index + 1, Add::Shift)?;
    }
    Ok(())
}

/// The new page of a split. `xl_btree_split`: u32 level, u16 first item of the right page, u16
/// offset of the new item, u16 entry at which a list is split, 0 if none is.
fn split_right(at: &mut Redoing<'_>) -> Fit<()> {
    let level = u32_at(at.view.main, 0)?;
    let opaque = Opaque {
        prev: at.view.other_block(0).ok_or("a split names no left page")?,
        next: at.view.other_block(2).unwrap_or(NO_BLOCK),
        level,
        flags: if level == 0 { LEAF } else { 0 },
    };
    init_page(at, &opaque)?;
    restore_items(at.page, at.view.data)?;
    at.set_lsn();
    Ok(())
}

/// The page that is split: what stays on it, in the order of numbers. Block data: the new tuple if
/// it goes here or splits a list, the new high key.
fn split_left(at: &mut Redoing<'_>, new_on_left: bool) -> Fit<()> {
    let main = at.view.main;
    let level = u32_at(main, 0)?;
    let (first_right, new_number, entry) =
        (size_at(main, 4)?, size_at(main, 6)?, size_at(main, 8)?);
    let right = at.view.other_block(1).ok_or("a split names no right page")?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let mut data = at.view.data;
    let (mut old_buffer, mut new_buffer) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    let (mut new_item, mut replaced): (&[u8], Option<(usize, &[u8])>) = (&[], None);
    if new_on_left || entry != 0 {
        new_item = slice_at(data, 0, max_align(tuple_size(data)?))?;
        data = rest_at(data, new_item.len())?;
        if entry != 0 {
            let number = new_number.checked_sub(1).ok_or("there is no tuple before the first")?;
            let old = item(at.page, line(at.page, number)?, INDEX_TUPLE_HEADER)?;
            let old = copy_tuple(old, &mut old_buffer)?;
            let new = copy_tuple(new_item, &mut new_buffer)?;
            swap(old, new, entry)?;
            new_item = new;
            replaced = Some((number, old));
        }
    }
    let mut left = empty_like(at.page)?;
    let high_key = slice_at(data, 0, max_align(tuple_size(data)?))?;
    add_item(&mut left, high_key, HIGH_KEY, Add::Shift)?;
    let mut next = HIGH_KEY + 1;
    let mut append = |left: &mut Page, item: &[u8]| -> Fit<()> {
        add_item(left, item, next, Add::Shift)?;
        next += 1;
        Ok(())
    };
    let first = first_data(at.page)?;
    for number in first..first_right {
        if let Some((_, list)) = replaced.filter(|(replaced, _)| *replaced == number) {
            append(&mut left, list)?;
            continue;
        }
        if new_on_left && number == new_number {
            append(&mut left, new_item)?;
        }
        append(&mut left, item(at.page, line(at.page, number)?, 0)?)?;
    }
    if new_on_left && first_right.max(first) == new_number {
        append(&mut left, new_item)?;
    }
    *at.page = left;
    let place = special(at.page, SPECIAL)?;
    let leaf = if level == 0 { LEAF } else { 0 };
    put_u16(at.page, place + FLAGS, INCOMPLETE_SPLIT | leaf)?;
    put_u32(at.page, place + NEXT, right)?;
    put_u16(at.page, place + CYCLE, 0)?;
    at.set_lsn();
    Ok(())
}

/// `xl_btree_dedup`: u16 intervals; block data: u16 first tuple, u16 tuples, for each interval.
fn dedup(at: &mut Redoing<'_>) -> Fit<()> {
    let count = size_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let page: &Page = at.page;
    let data = at.view.data;
    let interval = |index: usize| -> Fit<Option<(usize, usize)>> {
        match index < count {
            true => Ok(Some((size_at(data, 4 * index)?, size_at(data, 4 * index + 2)?))),
            false => Ok(None),
        }
    };
    let mut new = empty_like(page)?;
    let first = first_data(page)?;
    if first > HIGH_KEY {
        add_item(&mut new, item(page, line(page, HIGH_KEY)?, 0)?, HIGH_KEY, Add::Shift)?;
    }
    let last = lines(page)?;
    if first > last {
        return Err("a page to be deduplicated has no items");
    }
    let mut pending = Pending::new(index_tuple(page, first)?, first)?;
    let (mut done, mut next) = (0, first);
    let mut append = |pending: &mut Pending<'_>| -> Fit<()> {
        add_item(&mut new, pending.finish()?, next, Add::Shift)?;
        next += 1;
        Ok(())
    };
    for number in first + 1..=last {
        let tuple = index_tuple(page, number)?;
        let wanted = interval(done)?;
        if wanted.is_some_and(|(base, tuples)| pending.number == base && pending.tuples < tuples) {
            pending.add(tuple)?;
            continue;
        }
        done += usize::from(pending.tuples > 1);
        append(&mut pending)?;
        pending.restart(tuple, number)?;
    }
    done += usize::from(pending.tuples > 1);
    append(&mut pending)?;
    if done != count {
        return Err("not all intervals were found");
    }
    *at.page = new;
    change_flags(at.page, 0, HAS_GARBAGE)?;
    at.set_lsn();
    Ok(())
}

/// Counts at `from` of the main data: u16 deleted, u16 updated; block data: u16 offset of each
/// deleted item, u16 offset of each updated one, then for each updated one u16 count and so many
/// u16 entries of its list that are gone.
fn delete(at: &mut Redoing<'_>, from: usize) -> Fit<()> {
    let main = at.view.main;
    let (deleted, updated) = (size_at(main, from)?, size_at(main, from + 2)?);
    if !at.needs_redo()? {
        return Ok(());
    }
    let data = at.view.data;
    let mut entries = 2 * (deleted + updated);
    if updated > 0 {
        let mut made = Made::new();
        for index in 0..updated {
            let number = size_at(data, 2 * (deleted + index))?;
            let gone = size_at(data, entries)?;
            let gone = slice_at(data, entries + 2, 2 * gone)?;
            entries += 2 + gone.len();
            without(index_tuple(at.page, number)?, gone, &mut made)?;
            index_overwrite(at.page, number, made.tuple())?;
        }
    }
    if deleted > 0 {
        index_multi_delete(at.page, slice_at(data, 0, 2 * deleted)?)?;
    }
    change_flags(at.page, 0, HAS_GARBAGE)?;
    at.set_lsn();
    Ok(())
}

/// An empty leaf that is still linked, with a high key that says where its subtree begins.
fn half_dead(at: &mut Redoing<'_>, prev: u32, next: u32, top_parent: u32) -> Fit<()> {
    init_page(at, &Opaque { prev, next, level: 0, flags: HALF_DEAD | LEAF })?;
    let mut high_key = [0; INDEX_TUPLE_HEADER];
    put(&mut high_key, 0, &item_pointer(top_parent, 0))?;
    put_u16(&mut high_key, 6, INDEX_TUPLE_HEADER as u16 | ALT_TID)?;
    add_item(at.page, &high_key, HIGH_KEY, Add::Shift)?;
    at.set_lsn();
    Ok(())
}

/// `xl_btree_mark_page_halfdead`: u16 offset in the parent, u16 padding, u32 leaf, u32 left
/// sibling, u32 right sibling, u32 top parent.
fn half_dead_leaf(at: &mut Redoing<'_>) -> Fit<()> {
    let main = at.view.main;
    half_dead(at, u32_at(main, 8)?, u32_at(main, 12)?, u32_at(main, 16)?)
}

/// The parent: the link to the leaf becomes that to its right sibling, whose own goes.
fn half_dead_parent(at: &mut Redoing<'_>) -> Fit<()> {
    let number = size_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let right = pointer_block(item(at.page, line(at.page, number + 1)?, INDEX_TUPLE_HEADER)?, 0)?;
    let found: Line = line(at.page, number)?;
    let offset = u16_at(item(at.page, found, INDEX_TUPLE_HEADER)?, 4)?;
    put(at.page, found.offset, &item_pointer(right, offset))?;
    index_delete(at.page, number + 1)?;
    at.set_lsn();
    Ok(())
}

/// `xl_btree_unlink_page`: u32 left sibling, u32 right sibling, u32 level, u32 padding, u64 xid, u32
/// left sibling and u32 right sibling and u32 top parent of the leaf.
fn unlink(at: &mut Redoing<'_>, id: u8) -> Fit<()> {
    let main = at.view.main;
    let (prev, next, level) = (u32_at(main, 0)?, u32_at(main, 4)?, u32_at(main, 8)?);
    match id {
        0 => {
            let leaf = if level == 0 { LEAF } else { 0 };
            let flags = DELETED | HAS_FULLXID | leaf;
            let xid = slice_at(main, 16, 8)?;
            init_page(at, &Opaque { prev, next, level, flags })?;
            put(at.page, HEADER, xid)?;
            set_lower(at.page, HEADER + 8)?;
            let upper = bounds(at.page)?.special;
            set_upper(at.page, upper)?;
            at.set_lsn();
            Ok(())
        }
        1 if prev != NO_BLOCK => link(at, NEXT, next),
        2 => link(at, PREV, prev),
        3 => half_dead(at, u32_at(main, 24)?, u32_at(main, 28)?, u32_at(main, 32)?),
        _ => Err("an unlinked page has more neighbours than its record knows"),
    }
}

/// `xl_btree_newroot`: u32 block, u32 level; block data: the items, unless the root is a leaf.
fn new_root(at: &mut Redoing<'_>) -> Fit<()> {
    let level = u32_at(at.view.main, 4)?;
    let flags = if level == 0 { ROOT | LEAF } else { ROOT };
    init_page(at, &Opaque { prev: NO_BLOCK, next: NO_BLOCK, level, flags })?;
    if level > 0 {
        restore_items(at.page, at.view.data)?;
    }
    at.set_lsn();
    Ok(())
}
