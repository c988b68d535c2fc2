//! Taking items out of a page, and closing the gaps (`src/backend/storage/page/bufpage.c`).
//!
//! PostgreSQL moves items one by one or in groups, within the page if they lie there in the order
//! in which they will, else out of a copy. Nothing but the places where items end up is written,
//! the rest of the hole keeps what stood there. Out of a copy each item is what it was; within
//! the page too if no two of them overlap, which is checked here. Half of the time that redo of
//! pruning takes is spent here, so nothing is copied or cleared that need not be.

use super::page::{
    Bounds, Fit, HAS_FREE_LINES, HEADER, HEAP_LINES_MAX, INDEX_LINES_MAX, LINE, Line,
    aligned_bounds, change_flags, item, line, lines, max_align, move_bytes, put, put_u32, set_line,
    set_lower, set_upper, slice_at, u32_at,
};
use crate::base::page::Page;

/// Where the line pointers stand. A part of one before `pd_lower` is none.
fn places(page: &Page) -> Fit<impl Iterator<Item = usize> + use<>> {
    Ok((HEADER..HEADER + LINE * lines(page)?).step_by(LINE))
}

/// What [`survey`] found about the items of a page.
struct Survey {
    /// Each item begins before the one whose line pointer comes before.
    descend: bool,
    /// Items from here on are where they are to be.
    settled: usize,
}

/// Checks that all items lie where items may; if they descend, also that none lies on another.
fn survey(page: &Page, bounds: Bounds) -> Fit<Survey> {
    let mut found = Survey { descend: true, settled: bounds.special };
    let (mut before, mut in_place, mut overlap) = (bounds.special, true, false);
    for place in places(page)? {
        let line = Line::unpack(u32_at(page, place)?);
        if !line.has_storage() {
            continue;
        }
        let (offset, end) = (line.offset, line.offset + max_align(line.len));
        if offset < bounds.upper || end > bounds.special {
            return Err("an item lies outside of the items' space");
        }
        if !offset.is_multiple_of(8) {
            return Err("an item is not aligned");
        }
        in_place &= end == found.settled;
        if in_place {
            found.settled = offset;
        }
        found.descend &= offset < before;
        overlap |= end > before;
        before = offset;
    }
    match found.descend && overlap {
        true => Err("items overlap"),
        false => Ok(found),
    }
}

/// Items that lie behind each other, and go on doing so elsewhere: from, end, and where to.
#[derive(Clone, Copy)]
struct Run {
    from: usize,
    end: usize,
    to: usize,
}

impl Run {
    /// `old` is the page from `old_at` on as it was, if items may have been written over meanwhile.
    fn carry_out(self, page: &mut Page, old: Option<&[u8]>, old_at: usize) -> Fit<()> {
        let Run { from, end, to } = self;
        match old {
            _ if from == to => Ok(()),
            Some(old) => put(page, to, slice_at(old, from - old_at, end - from)?),
            None => move_bytes(page, from, to, end - from),
        }
    }
}

/// Moves the items to the end of the page, in the order of their line pointers
/// (`compactify_tuples`).
fn compactify(page: &mut Page, bounds: Bounds) -> Fit<()> {
    let Survey { descend, settled } = survey(page, bounds)?;
    // One that lies before another never lands on that one's old place, if that has moved first.
    let old = match descend {
        true => None,
        false => Some(slice_at(page, bounds.upper, settled - bounds.upper)?.to_vec()),
    };
    let mut run = Run { from: bounds.special, end: bounds.special, to: bounds.special };
    for place in places(page)? {
        let line = Line::unpack(u32_at(page, place)?);
        if !line.has_storage() {
            continue;
        }
        let size = max_align(line.len);
        let to = run.to.checked_sub(size).filter(|to| *to >= bounds.lower);
        let to = to.ok_or("items are larger than their space")?;
        if line.offset + size == run.from {
            run = Run { from: line.offset, to, ..run };
        } else {
            run.carry_out(page, old.as_deref(), bounds.upper)?;
            run = Run { from: line.offset, end: line.offset + size, to };
        }
        if line.offset != to {
            put_u32(page, place, Line { offset: to, ..line }.pack())?;
        }
    }
    run.carry_out(page, old.as_deref(), bounds.upper)?;
    set_upper(page, run.to)
}

/// Closes the gaps in a heap page after line pointers were cut from their items, takes unused line
/// pointers from the end, and notes whether others are left (`PageRepairFragmentation`).
pub(super) fn repair_fragmentation(page: &mut Page) -> Fit<()> {
    let bounds = aligned_bounds(page)?;
    let count = lines(page)?;
    if count > HEAP_LINES_MAX {
        return Err("a heap page has too many line pointers");
    }
    let (mut unused, mut last_used) = (0, 0);
    for (number, place) in (1..).zip(places(page)?) {
        if Line::unpack(u32_at(page, place)?).is_used() {
            last_used = number;
        } else {
            put_u32(page, place, Line::UNUSED.pack())?;
            unused += 1;
        }
    }
    compactify(page, bounds)?;
    let cut = count - last_used;
    set_lower(page, bounds.lower - LINE * cut)?;
    set_free_lines(page, unused > cut)
}

fn set_free_lines(page: &mut Page, has: bool) -> Fit<()> {
    match has {
        true => change_flags(page, HAS_FREE_LINES, 0),
        false => change_flags(page, 0, HAS_FREE_LINES),
    }
}

/// Takes unused line pointers from the end of a heap page but for the first one, and notes
/// whether others are left (`PageTruncateLinePointerArray`).
pub(super) fn truncate_lines(page: &mut Page) -> Fit<()> {
    let count = lines(page)?;
    let mut kept = count;
    while kept > 1 && !line(page, kept)?.is_used() {
        kept -= 1;
    }
    let mut has_free = false;
    for number in (1..=kept).rev() {
        if !line(page, number)?.is_used() {
            has_free = true;
            break;
        }
    }
    if kept < count {
        let lower = aligned_bounds(page)?.lower;
        set_lower(page, lower - LINE * (count - kept))?;
    }
    set_free_lines(page, has_free)
}

/// An item of an index page, checked as `PageIndexTupleDelete` checks it.
fn index_item(page: &Page, number: usize, bounds: Bounds) -> Fit<Line> {
    let found = line(page, number)?;
    let outside = found.offset < bounds.upper || found.offset + found.len > bounds.special;
    if outside || !found.offset.is_multiple_of(8) {
        return Err("a line pointer of an index page is wrong");
    }
    Ok(found)
}

/// Adds `shift` to the offsets of all items at or before `offset`.
fn shift_lines(page: &mut Page, offset: usize, shift: isize, only_stored: bool) -> Fit<()> {
    for place in places(page)? {
        let found = Line::unpack(u32_at(page, place)?);
        if found.offset <= offset && (found.has_storage() || !only_stored) {
            let moved = found.offset.checked_add_signed(shift).ok_or("an item would be lost")?;
            put_u32(page, place, Line { offset: moved, ..found }.pack())?;
        }
    }
    Ok(())
}

/// Removes an item from an index page, its line pointer too (`PageIndexTupleDelete`).
pub(super) fn index_delete(page: &mut Page, number: usize) -> Fit<()> {
    let bounds = aligned_bounds(page)?;
    let found = index_item(page, number, bounds)?;
    let size = max_align(found.len);
    let place = HEADER + LINE * number;
    let after = bounds.lower.checked_sub(place).ok_or("the line pointers are cut")?;
    move_bytes(page, place, place - LINE, after)?;
    move_bytes(page, bounds.upper, bounds.upper + size, found.offset - bounds.upper)?;
    set_upper(page, bounds.upper + size)?;
    set_lower(page, bounds.lower - LINE)?;
    shift_lines(page, found.offset, size.cast_signed(), false)
}

/// Removes an item from an index page but keeps its line pointer, unless it is the last one
/// (`PageIndexTupleDeleteNoCompact`).
pub(super) fn index_delete_keep_lines(page: &mut Page, number: usize) -> Fit<()> {
    let bounds = aligned_bounds(page)?;
    let found = index_item(page, number, bounds)?;
    let size = max_align(found.len);
    if number < lines(page)? {
        set_line(page, number, Line::UNUSED)?;
    } else {
        set_lower(page, bounds.lower - LINE)?;
    }
    move_bytes(page, bounds.upper, bounds.upper + size, found.offset - bounds.upper)?;
    set_upper(page, bounds.upper + size)?;
    shift_lines(page, found.offset, size.cast_signed(), true)
}

/// Removes items from an index page; `numbers` ascend (`PageIndexMultiDelete`).
pub(super) fn index_multi_delete(page: &mut Page, numbers: &[u8]) -> Fit<()> {
    let numbers = || {
        numbers.chunks_exact(2).map(|pair| match pair {
            [low, high] => usize::from(u16::from_le_bytes([*low, *high])),
            _ => 0,
        })
    };
    let wanted = numbers().count();
    if wanted <= 2 {
        // PostgreSQL takes few items out one by one, which leaves other bytes in the hole.
        return numbers().rev().try_for_each(|number| index_delete(page, number));
    }
    let bounds = aligned_bounds(page)?;
    let count = lines(page)?;
    if count > INDEX_LINES_MAX {
        return Err("an index page has too many line pointers");
    }
    let mut kept = 0;
    let mut delete = numbers().peekable();
    for number in 1..=count {
        let found = index_item(page, number, bounds)?;
        if delete.next_if_eq(&number).is_some() {
            continue;
        }
        if !found.has_storage() {
            return Err("a line pointer of an index page has no item");
        }
        kept += 1;
        // Never before it is read.
        set_line(page, kept, found)?;
    }
    if delete.next().is_some() {
        return Err("offsets of items to be deleted are out of order or too high");
    }
    set_lower(page, HEADER + LINE * kept)?;
    // PostgreSQL compares with the space that there was before line pointers went.
    compactify(page, bounds)
}

/// Replaces an item of an index page in its place; what lies before it moves if the size differs
/// (`PageIndexTupleOverwrite`).
pub(super) fn index_overwrite(page: &mut Page, number: usize, new: &[u8]) -> Fit<()> {
    let bounds = aligned_bounds(page)?;
    let found = index_item(page, number, bounds)?;
    item(page, found, 1)?;
    let (old_size, new_size) = (max_align(found.len), max_align(new.len()));
    if new_size > old_size + (bounds.upper - bounds.lower) {
        return Err("the page has no room for a larger item");
    }
    let shift = old_size.cast_signed() - new_size.cast_signed();
    let moved = |at: usize| at.checked_add_signed(shift).ok_or("an item would be lost");
    if shift != 0 {
        let upper = moved(bounds.upper)?;
        move_bytes(page, bounds.upper, upper, found.offset - bounds.upper)?;
        set_upper(page, upper)?;
        shift_lines(page, found.offset, shift, true)?;
    }
    let offset = moved(found.offset)?;
    set_line(page, number, Line { offset, len: new.len(), ..found })?;
    put(page, offset, new)
}

#[cfg(test)]
mod tests {
    use super::super::page::LineState;
    use super::*;
    use crate::base::page::PAGE_SIZE;

    /// A page whose line pointers are `items`, all of its bytes different where items are.
    fn page_of(items: &[(usize, usize)]) -> Page {
        let mut page = [0; PAGE_SIZE];
        let bytes = page.iter_mut().zip(0u32..);
        bytes.for_each(|(byte, at)| *byte = (at.wrapping_mul(2_654_435_761) >> 24) as u8);
        set_lower(&mut page, HEADER + LINE * items.len()).unwrap();
        for (number, (offset, len)) in (1..).zip(items) {
            let normal = Line { offset: *offset, len: *len, state: LineState::Normal };
            set_line(&mut page, number, normal).unwrap();
        }
        page
    }

    #[test]
    fn items_move_to_the_end_in_their_order_whatever_that_is() {
        let (upper, special) = (4096, 8176);
        let descending = [(8168, 8), (8136, 24), (7000, 1000), (4104, 96), (4096, 8)];
        let some_in_place = [(8152, 24), (8128, 24), (4096, 8), (6000, 80), (5000, 800)];
        let ascending = [(4096, 8), (4104, 96), (7000, 1000), (8136, 24), (8168, 8)];
        for items in [descending, some_in_place, ascending] {
            let before = page_of(&items);
            let mut page = before;
            let lower = HEADER + LINE * items.len();
            compactify(&mut page, Bounds { lower, upper, special }).unwrap();
            let mut end = special;
            for (number, (offset, len)) in (1..).zip(items) {
                end -= len;
                assert_eq!(page[end..end + len], before[offset..offset + len], "{number}");
                assert_eq!(line(&page, number).unwrap().offset, end);
            }
            let lines_end = HEADER + LINE * items.len();
            assert_eq!(page[lines_end..end], before[lines_end..end], "nothing else is written");
        }
    }
}
