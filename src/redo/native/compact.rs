//! Taking items out of a page, and closing the gaps (`src/backend/storage/page/bufpage.c`).
//!
//! PostgreSQL moves items in different ways, depending on their order and number; where no two
//! of them overlap, all ways leave the same bytes, the hole included, as nothing but the places
//! where items end up is written. That no two overlap is checked here. Half of the time that redo
//! of pruning takes is spent here, so nothing is copied or cleared that need not be.

use super::page::{
    Bounds, Fit, HAS_FREE_LINES, HEADER, HEAP_LINES_MAX, INDEX_LINES_MAX, LINE, Line,
    aligned_bounds, change_flags, item, line, lines, max_align, move_bytes, put, set_line,
    set_lower, set_upper, slice_at,
};
use crate::base::page::{PAGE_SIZE, Page};

/// An item that stays: its line pointer's number afterwards, its place, its length with padding.
#[derive(Clone, Copy, Default)]
struct Kept {
    number: u16,
    offset: u16,
    len: u16,
}

impl Kept {
    /// Line pointers have no larger numbers, nor have pages.
    fn new(number: usize, offset: usize, len: usize) -> Kept {
        Kept { number: number as u16, offset: offset as u16, len: len as u16 }
    }

    fn offset(self) -> usize {
        usize::from(self.offset)
    }

    fn len(self) -> usize {
        usize::from(self.len)
    }
}

/// Marks eight-byte units of the page as taken.
struct Taken([u64; PAGE_SIZE / 512]);

impl Taken {
    fn take(&mut self, offset: usize, len: usize) -> Fit<()> {
        let (mut unit, end) = (offset / 8, (offset + len) / 8);
        while unit < end {
            let (from, to) = (unit % 64, (end - unit / 64 * 64).min(64));
            let mask = (u64::MAX << from) & (u64::MAX >> (64 - to));
            let word = self.0.get_mut(unit / 64).ok_or("an item lies outside of the page")?;
            if *word & mask != 0 {
                return Err("items overlap");
            }
            *word |= mask;
            unit += to - from;
        }
        Ok(())
    }
}

/// Moves the items to the end of the page, in the order of `items` (`compactify_tuples`).
fn compactify(page: &mut Page, items: &[Kept], bounds: Bounds) -> Fit<()> {
    let mut taken = Taken([0; PAGE_SIZE / 512]);
    let (mut descend, mut before) = (true, bounds.special);
    for kept in items {
        if kept.offset() < bounds.upper || kept.offset() + kept.len() > bounds.special {
            return Err("an item lies outside of the items' space");
        }
        if !kept.offset().is_multiple_of(8) {
            return Err("an item is not aligned");
        }
        taken.take(kept.offset(), kept.len())?;
        descend &= kept.offset() < before;
        before = kept.offset();
    }
    let mut upper = bounds.special;
    let mut rest = items;
    // What is in its place stays there.
    while let Some((kept, after)) = rest.split_first() {
        if kept.offset() + kept.len() != upper {
            break;
        }
        upper = kept.offset();
        rest = after;
    }
    // One that lies before another never lands on that one's old place, if that has moved first.
    let old = match descend || rest.is_empty() {
        true => Vec::new(),
        false => slice_at(page, bounds.upper, upper - bounds.upper)?.to_vec(),
    };
    for kept in rest {
        upper = upper.checked_sub(kept.len()).ok_or("items are larger than their space")?;
        match descend {
            true => move_bytes(page, kept.offset(), upper, kept.len())?,
            false => put(page, upper, slice_at(&old, kept.offset() - bounds.upper, kept.len())?)?,
        }
        let number = usize::from(kept.number);
        let moved = line(page, number)?;
        set_line(page, number, Line { offset: upper, ..moved })?;
    }
    set_upper(page, upper)
}

/// Closes the gaps in a heap page after line pointers were cut from their items, takes unused line
/// pointers from the end, and notes whether others are left (`PageRepairFragmentation`).
pub(super) fn repair_fragmentation(page: &mut Page) -> Fit<()> {
    let bounds = aligned_bounds(page)?;
    let count = lines(page)?;
    if count > HEAP_LINES_MAX {
        return Err("a heap page has too many line pointers");
    }
    let mut items = [Kept::default(); HEAP_LINES_MAX];
    let (mut stored, mut unused, mut last_used, mut total) = (0, 0, 0, 0);
    for number in 1..=count {
        let found = line(page, number)?;
        if !found.is_used() {
            set_line(page, number, Line::UNUSED)?;
            unused += 1;
            continue;
        }
        last_used = number;
        if found.has_storage() {
            let len = max_align(found.len);
            *items.get_mut(stored).ok_or("too many items")? = Kept::new(number, found.offset, len);
            stored += 1;
            total += len;
        }
    }
    if total > bounds.special - bounds.lower {
        return Err("items are larger than their space");
    }
    compactify(page, items.get(..stored).unwrap_or_default(), bounds)?;
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
    for number in 1..=lines(page)? {
        let found = line(page, number)?;
        if found.offset <= offset && (found.has_storage() || !only_stored) {
            let moved = found.offset.checked_add_signed(shift).ok_or("an item would be lost")?;
            set_line(page, number, Line { offset: moved, ..found })?;
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
    let mut items = [Kept::default(); INDEX_LINES_MAX];
    let (mut kept, mut total) = (0, 0);
    let mut delete = numbers().peekable();
    for number in 1..=count {
        let found = index_item(page, number, bounds)?;
        if delete.next_if_eq(&number).is_some() {
            continue;
        }
        let len = max_align(found.len);
        *items.get_mut(kept).ok_or("too many items")? = Kept::new(kept + 1, found.offset, len);
        kept += 1;
        total += len;
        // Never before it is read.
        set_line(page, kept, found)?;
    }
    if delete.next().is_some() {
        return Err("offsets of items to be deleted are out of order or too high");
    }
    if total > bounds.special - bounds.lower {
        return Err("items are larger than their space");
    }
    set_lower(page, HEADER + LINE * kept)?;
    compactify(page, items.get(..kept).unwrap_or_default(), bounds)
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

    #[test]
    fn units_are_taken_once() {
        for (start, end) in [(0, 1), (0, 64), (3, 64), (3, 65), (60, 200), (64, 128), (1000, 1024)]
        {
            let mut taken = Taken([0; PAGE_SIZE / 512]);
            taken.take(start * 8, (end - start) * 8).unwrap();
            for unit in 0..PAGE_SIZE / 8 {
                let word = taken.0[unit / 64];
                assert_eq!(word >> (unit % 64) & 1 == 1, (start..end).contains(&unit), "{unit}");
                let free = Taken(taken.0).take(unit * 8, 8).is_ok();
                assert_eq!(free, !(start..end).contains(&unit), "{unit}");
            }
        }
        assert!(Taken([0; PAGE_SIZE / 512]).take(PAGE_SIZE - 8, 16).is_err());
    }

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
        let bounds = Bounds { lower: 0, upper, special };
        let descending = [(8168, 8), (8136, 24), (7000, 1000), (4104, 96), (4096, 8)];
        let some_in_place = [(8152, 24), (8128, 24), (4096, 8), (6000, 80), (5000, 800)];
        let ascending = [(4096, 8), (4104, 96), (7000, 1000), (8136, 24), (8168, 8)];
        for items in [descending, some_in_place, ascending] {
            let before = page_of(&items);
            let mut page = before;
            let kept: Vec<Kept> =
                (1..).zip(items).map(|(number, (at, len))| Kept::new(number, at, len)).collect();
            compactify(&mut page, &kept, bounds).unwrap();
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
