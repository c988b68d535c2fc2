//! Heap records of resource manager `Heap`, and multi-insert and lock of `Heap2`
//! (`heap_redo`, `heap_xlog_*` in `src/backend/access/heap/heapam.c`; layouts:
//! `src/include/access/heapam_xlog.h`).
//!
//! Bits of the visibility map that these clear are records of their own here
//! ([`crate::base::SmallRecord::VmClear`]); the free space map is not kept by WAL at all.

use super::Redoing;
use super::heap_tuple::{
    HOFF, HotUpdated, LoggedHeader, TUPLE_BYTES_MAX, TUPLE_HEADER, XMAX, XMIN, clear_cmax,
    clear_hot_updated, is_only_locked, set_ctid, set_prunable, set_xmax_bits, write_header,
};
use super::page::{
    ALL_VISIBLE, Add, Fit, Line, change_flags, init, item_pointer, move_bytes, normal_item, put,
    put_u32, reserve, rest_at, size_at, slice_at, u8_at, u16_at, u32_at,
};

/// `XLOG_HEAP_INIT_PAGE`.
pub(super) const INIT_PAGE: u8 = 0x80;
/// `XLOG_HEAP_OPMASK`.
pub(super) const OPERATION_MASK: u8 = 0x70;

const INSERT: u8 = 0x00;
const DELETE: u8 = 0x10;
const UPDATE: u8 = 0x20;
const TRUNCATE: u8 = 0x30;
const HOT_UPDATE: u8 = 0x40;
const CONFIRM: u8 = 0x50;
const LOCK: u8 = 0x60;

/// `XLH_*_ALL_VISIBLE_CLEARED`; in an update, that of the old page.
const ALL_VISIBLE_CLEARED: u8 = 0x01;
/// `XLH_UPDATE_NEW_ALL_VISIBLE_CLEARED`.
const NEW_ALL_VISIBLE_CLEARED: u8 = 0x02;
const UPDATE_PREFIX_FROM_OLD: u8 = 0x20;
const UPDATE_SUFFIX_FROM_OLD: u8 = 0x40;
const DELETE_IS_SUPER: u8 = 0x08;
const DELETE_IS_PARTITION_MOVE: u8 = 0x10;
const INSERT_ALL_FROZEN_SET: u8 = 0x20;

/// Size of `xl_heap_header`.
const LOGGED_HEADER: usize = 5;
/// Size of `xl_multi_insert_tuple`.
const MULTI_INSERT_TUPLE: usize = 7;
/// `InvalidBlockNumber`, `MovedPartitionsOffsetNumber`.
const MOVED_PARTITIONS: (u32, u16) = (u32::MAX, 0xFFFD);

/// All records of resource manager `Heap`.
pub(super) fn redo(at: &mut Redoing<'_>) -> Fit<()> {
    match at.view.info & OPERATION_MASK {
        INSERT => insert(at),
        DELETE => delete(at),
        UPDATE => update(at, false),
        HOT_UPDATE => update(at, true),
        CONFIRM => confirm(at),
        LOCK => lock(at),
        // Of no meaning to redo.
        TRUNCATE => Ok(()),
        _ => inplace(at),
    }
}

fn only_first_block(at: &Redoing<'_>) -> Fit<()> {
    match at.view.id {
        0 => Ok(()),
        _ => Err("the record has more blocks than its kind"),
    }
}

/// The common rules for a page to which tuples are added.
fn prepare(at: &mut Redoing<'_>) -> Fit<bool> {
    if at.view.info & INIT_PAGE == 0 {
        return at.needs_redo();
    }
    at.will_init()?;
    init(at.page, 0)?;
    Ok(true)
}

fn clear_all_visible(at: &mut Redoing<'_>, flags: u8, flag: u8) -> Fit<()> {
    match flags & flag {
        0 => Ok(()),
        _ => change_flags(at.page, 0, ALL_VISIBLE),
    }
}

/// Bytes of a new tuple.
#[derive(Clone, Copy)]
enum Part<'a> {
    /// From the record.
    Record(&'a [u8]),
    /// From another tuple of the page.
    Page { from: usize, len: usize },
}

impl Part<'_> {
    fn len(&self) -> usize {
        match *self {
            Part::Record(bytes) => bytes.len(),
            Part::Page { len, .. } => len,
        }
    }
}

/// Adds a tuple of logged header and `parts`, which follow each other.
fn add_tuple(
    at: &mut Redoing<'_>,
    number: u16,
    header: LoggedHeader,
    xmax: u32,
    parts: &[Part<'_>],
) -> Fit<()> {
    let len: usize = TUPLE_HEADER + parts.iter().map(Part::len).sum::<usize>();
    if len > TUPLE_BYTES_MAX {
        return Err("a tuple is too long");
    }
    let place = reserve(at.page, len, usize::from(number), Add::Heap)?;
    let xids = (at.view.xid, xmax);
    write_header(at.page, place, header, xids, item_pointer(at.view.number, number))?;
    let mut end = place + TUPLE_HEADER;
    for part in parts {
        match *part {
            Part::Record(bytes) => put(at.page, end, bytes)?,
            // PostgreSQL puts the tuple together elsewhere: it must not be written over before.
            Part::Page { from, .. } if from < place + len => {
                return Err("a tuple lies in free space");
            }
            Part::Page { from, len } => move_bytes(at.page, from, end, len)?,
        }
        end += part.len();
    }
    Ok(())
}

fn logged_header(data: &[u8], from: usize) -> Fit<LoggedHeader> {
    Ok(LoggedHeader {
        infomask2: u16_at(data, from)?,
        infomask: u16_at(data, from + 2)?,
        hoff: u8_at(data, from + 4)?,
    })
}

/// `xl_heap_insert`: u16 offset, u8 flags; block data: header, tuple.
fn insert(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let main = at.view.main;
    let (number, flags) = (u16_at(main, 0)?, u8_at(main, 2)?);
    if !prepare(at)? {
        return Ok(());
    }
    let data = at.view.data;
    let header = logged_header(data, 0)?;
    add_tuple(at, number, header, 0, &[Part::Record(rest_at(data, LOGGED_HEADER)?)])?;
    at.set_lsn();
    clear_all_visible(at, flags, ALL_VISIBLE_CLEARED)
}

/// `xl_heap_multi_insert`: u8 flags, u8 padding, u16 count, u16 offset … unless the page is made
/// anew; block data: tuples, each aligned to 2: u16 length, header, tuple.
pub(super) fn multi_insert(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let main = at.view.main;
    let (flags, count) = (u8_at(main, 0)?, size_at(main, 2)?);
    if !prepare(at)? {
        return Ok(());
    }
    let is_init = at.view.info & INIT_PAGE != 0;
    let data = at.view.data;
    let mut from = 0;
    for index in 0..count {
        let number = match is_init {
            true => u16::try_from(index + 1).map_err(|_| "too many tuples")?,
            false => u16_at(main, 4 + 2 * index)?,
        };
        from += from % 2;
        let len = size_at(data, from)?;
        let header = logged_header(data, from + 2)?;
        from += MULTI_INSERT_TUPLE;
        add_tuple(at, number, header, 0, &[Part::Record(slice_at(data, from, len)?)])?;
        from += len;
    }
    if from != data.len() {
        return Err("the tuples' lengths do not add up");
    }
    at.set_lsn();
    clear_all_visible(at, flags, ALL_VISIBLE_CLEARED)?;
    match flags & INSERT_ALL_FROZEN_SET {
        0 => Ok(()),
        _ => change_flags(at.page, ALL_VISIBLE, 0),
    }
}

/// A tuple that a record changes in its place.
fn tuple(at: &Redoing<'_>, number: u16) -> Fit<Line> {
    normal_item(at.page, usize::from(number), TUPLE_HEADER)
}

/// `xl_heap_delete`: u32 xmax, u16 offset, u8 infobits, u8 flags.
fn delete(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let main = at.view.main;
    let (xmax, number) = (u32_at(main, 0)?, u16_at(main, 4)?);
    let (infobits, flags) = (u8_at(main, 6)?, u8_at(main, 7)?);
    if !at.needs_redo()? {
        return Ok(());
    }
    let place = tuple(at, number)?.offset;
    set_xmax_bits(at.page, place, infobits, HotUpdated::Clear)?;
    match flags & DELETE_IS_SUPER {
        0 => put_u32(at.page, place + XMAX, xmax)?,
        _ => put_u32(at.page, place + XMIN, 0)?,
    }
    clear_cmax(at.page, place)?;
    set_prunable(at.page, at.view.xid)?;
    clear_all_visible(at, flags, ALL_VISIBLE_CLEARED)?;
    let (block, offset) = match flags & DELETE_IS_PARTITION_MOVE {
        0 => (at.view.number, number),
        _ => MOVED_PARTITIONS,
    };
    set_ctid(at.page, place, block, offset)?;
    at.set_lsn();
    Ok(())
}

/// `xl_heap_update`: u32 old xmax, u16 old offset, u8 old infobits, u8 flags, u32 new xmax, u16 new
/// offset. Reference 0 is the page of the new version, reference 1 that of the old one if it is
/// another.
fn update(at: &mut Redoing<'_>, hot: bool) -> Fit<()> {
    let new_block = at.view.other_block(0).ok_or("an update names no page")?;
    let old_block = at.view.other_block(1);
    if old_block == Some(new_block) || at.view.id > 1 {
        return Err("an update names its pages in a wrong way");
    }
    if at.view.id == 1 {
        return match at.needs_redo()? {
            true => update_old(at, hot, new_block).map(drop),
            false => Ok(()),
        };
    }
    if old_block.is_some() {
        return match prepare(at)? {
            true => update_new(at, None),
            false => Ok(()),
        };
    }
    if !at.needs_redo()? {
        return Ok(());
    }
    let old = update_old(at, hot, new_block)?;
    update_new(at, Some(old))
}

/// Marks the old version; gives its place.
fn update_old(at: &mut Redoing<'_>, hot: bool, new_block: u32) -> Fit<Line> {
    let main = at.view.main;
    let (xmax, number) = (u32_at(main, 0)?, u16_at(main, 4)?);
    let (infobits, flags, new_number) = (u8_at(main, 6)?, u8_at(main, 7)?, u16_at(main, 12)?);
    let old = tuple(at, number)?;
    let mark = if hot { HotUpdated::Set } else { HotUpdated::Clear };
    set_xmax_bits(at.page, old.offset, infobits, mark)?;
    put_u32(at.page, old.offset + XMAX, xmax)?;
    clear_cmax(at.page, old.offset)?;
    set_ctid(at.page, old.offset, new_block, new_number)?;
    set_prunable(at.page, at.view.xid)?;
    clear_all_visible(at, flags, ALL_VISIBLE_CLEARED)?;
    at.set_lsn();
    Ok(old)
}

/// Adds the new version, of which the begin and the end may be those of the old one on the same
/// page. Block data: u16 prefix length and u16 suffix length if there are such, header, bytes up
/// to `t_hoff`, then what stands between prefix and suffix.
fn update_new(at: &mut Redoing<'_>, old: Option<Line>) -> Fit<()> {
    let main = at.view.main;
    let (flags, xmax, number) = (u8_at(main, 7)?, u32_at(main, 8)?, u16_at(main, 12)?);
    let data = at.view.data;
    let mut from = 0;
    let mut shared = |flag: u8| -> Fit<usize> {
        if flags & flag == 0 {
            return Ok(0);
        }
        let len = size_at(data, from)?;
        from += 2;
        Ok(len)
    };
    let prefix = shared(UPDATE_PREFIX_FROM_OLD)?;
    let suffix = shared(UPDATE_SUFFIX_FROM_OLD)?;
    let header = logged_header(data, from)?;
    let logged = rest_at(data, from + LOGGED_HEADER)?;
    if prefix == 0 && suffix == 0 {
        add_tuple(at, number, header, xmax, &[Part::Record(logged)])?;
    } else {
        let old = old.ok_or("an update takes bytes from a tuple on another page")?;
        let old_data = usize::from(u8_at(at.page, old.offset + HOFF)?);
        let (head, middle) = match prefix {
            0 => (&[][..], logged),
            _ => {
                let head = usize::from(header.hoff).checked_sub(TUPLE_HEADER);
                let head = head.ok_or("a tuple's data begins in its header")?;
                logged.split_at_checked(head).ok_or("a tuple's data is cut")?
            }
        };
        let inside = |from: Option<usize>, len: usize| -> Fit<Part<'_>> {
            let from = from.filter(|from| from.checked_add(len).is_some_and(|to| to <= old.len));
            let outside = "an update takes bytes from outside of the old tuple";
            Ok(Part::Page { from: old.offset + from.ok_or(outside)?, len })
        };
        let first = inside(Some(old_data), prefix)?;
        let last = inside(old.len.checked_sub(suffix), suffix)?;
        add_tuple(
            at,
            number,
            header,
            xmax,
            &[Part::Record(head), first, Part::Record(middle), last],
        )?;
    }
    clear_all_visible(at, flags, NEW_ALL_VISIBLE_CLEARED)?;
    at.set_lsn();
    Ok(())
}

/// `xl_heap_confirm`: u16 offset. A speculative insertion has come true.
fn confirm(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let number = u16_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let place = tuple(at, number)?.offset;
    set_ctid(at.page, place, at.view.number, number)?;
    at.set_lsn();
    Ok(())
}

/// `xl_heap_lock`: u32 xmax, u16 offset, i8 infobits, u8 flags.
fn lock(at: &mut Redoing<'_>) -> Fit<()> {
    set_lock(at, |at, number, place| {
        if is_only_locked(at.page, place)? {
            clear_hot_updated(at.page, place)?;
            set_ctid(at.page, place, at.view.number, number)?;
        }
        clear_cmax(at.page, place)
    })
}

/// `xl_heap_lock_updated`: as `xl_heap_lock`. The tuple's chain stays as it is.
pub(super) fn lock_updated(at: &mut Redoing<'_>) -> Fit<()> {
    set_lock(at, |_, _, _| Ok(()))
}

/// Sets xmax and its bits; `rest` gets the tuple's number and place.
fn set_lock(
    at: &mut Redoing<'_>,
    rest: impl FnOnce(&mut Redoing<'_>, u16, usize) -> Fit<()>,
) -> Fit<()> {
    only_first_block(at)?;
    let main = at.view.main;
    let (xmax, number, infobits) = (u32_at(main, 0)?, u16_at(main, 4)?, u8_at(main, 6)?);
    if !at.needs_redo()? {
        return Ok(());
    }
    let place = tuple(at, number)?.offset;
    set_xmax_bits(at.page, place, infobits, HotUpdated::Keep)?;
    put_u32(at.page, place + XMAX, xmax)?;
    rest(at, number, place)?;
    at.set_lsn();
    Ok(())
}

/// `xl_heap_inplace`: u16 offset; block data: the tuple's data, of the same length.
fn inplace(at: &mut Redoing<'_>) -> Fit<()> {
    only_first_block(at)?;
    let number = u16_at(at.view.main, 0)?;
    if !at.needs_redo()? {
        return Ok(());
    }
    let found = tuple(at, number)?;
    let data = usize::from(u8_at(at.page, found.offset + HOFF)?);
    if found.len.checked_sub(data) != Some(at.view.data.len()) {
        return Err("a tuple is overwritten by one of another length");
    }
    put(at.page, found.offset + data, at.view.data)?;
    at.set_lsn();
    Ok(())
}
