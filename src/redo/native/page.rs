//! Pages as PostgreSQL's buffer page code changes them (`src/backend/storage/page/bufpage.c`).
//!
//! A page is its header, line pointers that grow upwards to `pd_lower`, a hole, items that grow
//! downwards from `pd_special` to `pd_upper`, and the special space of the access method. A line
//! pointer is four bytes: 15 bits offset, 2 bits state, 15 bits length (`ItemIdData`).
//!
//! Bytes that PostgreSQL leaves alone are left alone here: the hole keeps what once stood in it,
//! and so does the padding of items to eight bytes. That makes whole pages equal, not only their
//! meaning. Whatever does not fit is an `Err` with the reason; the page is of no use then.

use crate::base::page::{PAGE_SIZE, Page};

/// A result, or why record and page do not fit together.
pub(super) type Fit<T> = Result<T, &'static str>;

/// Size of the page header (`SizeOfPageHeaderData`).
pub(super) const HEADER: usize = 24;
/// Size of a line pointer.
pub(super) const LINE: usize = 4;
const PD_FLAGS: usize = 10;
const PD_LOWER: usize = 12;
const PD_UPPER: usize = 14;
const PD_SPECIAL: usize = 16;
const PD_PAGESIZE_VERSION: usize = 18;
/// Offset of `pd_prune_xid`.
pub(super) const PD_PRUNE_XID: usize = 20;
/// `BLCKSZ | PG_PAGE_LAYOUT_VERSION`.
const SIZE_AND_VERSION: u16 = PAGE_SIZE as u16 | 4;

/// `PD_HAS_FREE_LINES`.
pub(super) const HAS_FREE_LINES: u16 = 0x0001;
/// `PD_ALL_VISIBLE`.
pub(super) const ALL_VISIBLE: u16 = 0x0004;

/// `MaxHeapTuplesPerPage`.
pub(super) const HEAP_LINES_MAX: usize = 291;
/// `MaxIndexTuplesPerPage`.
pub(super) const INDEX_LINES_MAX: usize = 408;

const SHORT: &str = "something lies outside of the page or the record";

/// Rounds up to eight (`MAXALIGN`).
pub(super) fn max_align(size: usize) -> usize {
    size.saturating_add(7) & !7
}

/// `N` bytes at `at`.
pub(super) fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> Fit<[u8; N]> {
    bytes.get(at..).and_then(<[u8]>::first_chunk::<N>).copied().ok_or(SHORT)
}

/// `len` bytes at `at`.
pub(super) fn slice_at(bytes: &[u8], at: usize, len: usize) -> Fit<&[u8]> {
    bytes.get(at..).and_then(|rest| rest.get(..len)).ok_or(SHORT)
}

/// What begins at `at`.
pub(super) fn rest_at(bytes: &[u8], at: usize) -> Fit<&[u8]> {
    bytes.get(at..).ok_or(SHORT)
}

/// A little-endian number of one byte.
pub(super) fn u8_at(bytes: &[u8], at: usize) -> Fit<u8> {
    bytes.get(at).copied().ok_or(SHORT)
}

/// A little-endian number of two bytes.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> Fit<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

/// A little-endian number of two bytes, as a size.
pub(super) fn size_at(bytes: &[u8], at: usize) -> Fit<usize> {
    u16_at(bytes, at).map(usize::from)
}

/// A little-endian number of four bytes.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> Fit<u32> {
    bytes_at(bytes, at).map(u32::from_le_bytes)
}

/// Writes bytes at `at`.
pub(super) fn put(bytes: &mut [u8], at: usize, data: &[u8]) -> Fit<()> {
    let target = bytes.get_mut(at..).and_then(|rest| rest.get_mut(..data.len())).ok_or(SHORT)?;
    target.copy_from_slice(data);
    Ok(())
}

/// Writes a number of two bytes at `at`.
pub(super) fn put_u16(bytes: &mut [u8], at: usize, value: u16) -> Fit<()> {
    put(bytes, at, &value.to_le_bytes())
}

/// Writes a number of four bytes at `at`.
pub(super) fn put_u32(bytes: &mut [u8], at: usize, value: u32) -> Fit<()> {
    put(bytes, at, &value.to_le_bytes())
}

/// Writes a size or offset within the page as a number of two bytes.
fn put_size(page: &mut Page, at: usize, value: usize) -> Fit<()> {
    put_u16(page, at, u16::try_from(value).map_err(|_| SHORT)?)
}

/// Moves `len` bytes within the page; the places may overlap (`memmove`).
pub(super) fn move_bytes(page: &mut Page, from: usize, to: usize, len: usize) -> Fit<()> {
    let fits = |at: usize| at.checked_add(len).is_some_and(|end| end <= PAGE_SIZE);
    if !fits(from) || !fits(to) {
        return Err(SHORT);
    }
    page.copy_within(from..from + len, to);
    Ok(())
}

/// A block number and an offset within the block (`ItemPointerData`): two halves of the block
/// number, high half first, then the offset.
pub(super) fn item_pointer(block: u32, offset: u16) -> [u8; 6] {
    let (high, low) = (((block >> 16) as u16).to_le_bytes(), (block as u16).to_le_bytes());
    let offset = offset.to_le_bytes();
    [high[0], high[1], low[0], low[1], offset[0], offset[1]]
}

/// The block number in an item pointer.
pub(super) fn pointer_block(bytes: &[u8], at: usize) -> Fit<u32> {
    Ok(u32::from(u16_at(bytes, at)?) << 16 | u32::from(u16_at(bytes, at + 2)?))
}

/// State of a line pointer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum LineState {
    /// `LP_UNUSED`.
    Unused,
    /// `LP_NORMAL`.
    Normal,
    /// `LP_REDIRECT`.
    Redirect,
    /// `LP_DEAD`.
    Dead,
}

/// A line pointer (`ItemIdData`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Line {
    /// Where the item begins; the target of a redirection.
    pub(super) offset: usize,
    /// Its state.
    pub(super) state: LineState,
    /// Length of the item in bytes; 0 if it has no storage.
    pub(super) len: usize,
}

impl Line {
    /// A line pointer that nobody uses.
    pub(super) const UNUSED: Line = Line { offset: 0, state: LineState::Unused, len: 0 };
    /// A line pointer of an item that is gone but may still be pointed at.
    pub(super) const DEAD: Line = Line { offset: 0, state: LineState::Dead, len: 0 };

    /// As it stands in the page.
    pub(super) fn unpack(value: u32) -> Line {
        let state = match value >> 15 & 3 {
            0 => LineState::Unused,
            1 => LineState::Normal,
            2 => LineState::Redirect,
            _ => LineState::Dead,
        };
        Line { offset: (value & 0x7FFF) as usize, state, len: (value >> 17) as usize }
    }

    /// To stand in the page.
    pub(super) fn pack(self) -> u32 {
        let state = match self.state {
            LineState::Unused => 0,
            LineState::Normal => 1,
            LineState::Redirect => 2,
            LineState::Dead => 3,
        };
        (self.offset as u32 & 0x7FFF) | state << 15 | (self.len as u32 & 0x7FFF) << 17
    }

    /// `ItemIdIsUsed`.
    pub(super) fn is_used(&self) -> bool {
        self.state != LineState::Unused
    }

    /// `ItemIdHasStorage`.
    pub(super) fn has_storage(&self) -> bool {
        self.len != 0
    }
}

/// The three boundaries of a page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// End of the line pointers.
    pub(super) lower: usize,
    /// Begin of the items.
    pub(super) upper: usize,
    /// Begin of the special space.
    pub(super) special: usize,
}

/// The boundaries, as `PageAddItemExtended` wants them.
pub(super) fn bounds(page: &Page) -> Fit<Bounds> {
    let lower = size_at(page, PD_LOWER)?;
    let upper = size_at(page, PD_UPPER)?;
    let special = size_at(page, PD_SPECIAL)?;
    if lower < HEADER || lower > upper || upper > special || special > PAGE_SIZE {
        return Err("the boundaries in the page header are wrong");
    }
    Ok(Bounds { lower, upper, special })
}

/// The boundaries, as the functions want them that move items.
pub(super) fn aligned_bounds(page: &Page) -> Fit<Bounds> {
    let bounds = bounds(page)?;
    match bounds.special.is_multiple_of(8) {
        true => Ok(bounds),
        false => Err("the special space of the page is not aligned"),
    }
}

/// Sets `pd_lower`.
pub(super) fn set_lower(page: &mut Page, lower: usize) -> Fit<()> {
    put_size(page, PD_LOWER, lower)
}

/// Sets `pd_upper`.
pub(super) fn set_upper(page: &mut Page, upper: usize) -> Fit<()> {
    put_size(page, PD_UPPER, upper)
}

/// `pd_special`, if `len` bytes of special space lie within the page there.
pub(super) fn special(page: &Page, len: usize) -> Fit<usize> {
    let special = size_at(page, PD_SPECIAL)?;
    match special >= HEADER && special + len <= PAGE_SIZE {
        true => Ok(special),
        false => Err("the special space lies outside of the page"),
    }
}

/// Sets and clears bits of `pd_flags`.
pub(super) fn change_flags(page: &mut Page, set: u16, clear: u16) -> Fit<()> {
    let flags = u16_at(page, PD_FLAGS)?;
    put_u16(page, PD_FLAGS, flags & !clear | set)
}

/// An empty page with `special` bytes of special space (`PageInit`).
pub(super) fn init(page: &mut Page, special: usize) -> Fit<()> {
    let special = PAGE_SIZE.checked_sub(max_align(special)).ok_or(SHORT)?;
    page.fill(0);
    set_lower(page, HEADER)?;
    set_upper(page, special)?;
    put_size(page, PD_SPECIAL, special)?;
    put_u16(page, PD_PAGESIZE_VERSION, SIZE_AND_VERSION)
}

/// Number of line pointers (`PageGetMaxOffsetNumber`).
pub(super) fn lines(page: &Page) -> Fit<usize> {
    let lower = size_at(page, PD_LOWER)?;
    Ok(lower.saturating_sub(HEADER) / LINE)
}

/// Where line pointer `number`, counted from 1, stands.
fn line_place(number: usize) -> Fit<usize> {
    match number {
        0 => Err("offset number 0"),
        _ => Ok(HEADER + LINE * (number - 1)),
    }
}

/// Line pointer `number`, which must exist.
pub(super) fn line(page: &Page, number: usize) -> Fit<Line> {
    if number > lines(page)? {
        return Err("the page has no such line pointer");
    }
    u32_at(page, line_place(number)?).map(Line::unpack)
}

/// Changes line pointer `number`, which must exist.
pub(super) fn set_line(page: &mut Page, number: usize, line: Line) -> Fit<()> {
    if number > lines(page)? {
        return Err("the page has no such line pointer");
    }
    put_u32(page, line_place(number)?, line.pack())
}

/// The item of a line pointer that is in normal state and has at least `len_min` bytes.
pub(super) fn normal_item(page: &Page, number: usize, len_min: usize) -> Fit<Line> {
    let line = line(page, number)?;
    if line.state != LineState::Normal {
        return Err("a line pointer is not in normal state");
    }
    item(page, line, len_min)?;
    Ok(line)
}

/// The bytes of an item, at least `len_min`.
pub(super) fn item(page: &Page, line: Line, len_min: usize) -> Fit<&[u8]> {
    if line.len < len_min || line.offset < HEADER {
        return Err("an item is too short, or lies in the page header");
    }
    slice_at(page, line.offset, line.len)
}

/// How an item is added.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Add {
    /// At an unused line pointer or behind the last one (`PAI_OVERWRITE`), of a heap page
    /// (`PAI_IS_HEAP`).
    Heap,
    /// The same, of another kind of page.
    Overwrite,
    /// Before the item that has the number now.
    Shift,
}

/// Makes room for an item of `size` bytes under line pointer `number`, and gives the place where
/// it is to be written (`PageAddItemExtended` without the copying).
pub(super) fn reserve(page: &mut Page, size: usize, number: usize, how: Add) -> Fit<usize> {
    let Bounds { lower, upper, .. } = bounds(page)?;
    let limit = lines(page)? + 1;
    if number > limit {
        return Err("a new item would leave a gap in the line pointers");
    }
    let place = line_place(number)?;
    if number < limit && how != Add::Shift {
        let line = line(page, number)?;
        if line.is_used() || line.has_storage() {
            return Err("the line pointer of a new item is in use");
        }
    }
    if how == Add::Heap && number > HEAP_LINES_MAX {
        return Err("a heap page has too many line pointers");
    }
    let shift = number < limit && how == Add::Shift;
    let lower = if number == limit || shift { lower + LINE } else { lower };
    let upper = upper.checked_sub(max_align(size)).filter(|upper| lower <= *upper);
    let upper = upper.ok_or("the page has no room for a new item")?;
    if shift {
        move_bytes(page, place, place + LINE, (limit - number) * LINE)?;
    }
    let line = Line { offset: upper, state: LineState::Normal, len: size };
    put_u32(page, place, line.pack())?;
    set_lower(page, lower)?;
    set_upper(page, upper)?;
    Ok(upper)
}

/// Adds an item (`PageAddItemExtended`).
pub(super) fn add_item(page: &mut Page, item: &[u8], number: usize, how: Add) -> Fit<()> {
    let at = reserve(page, item.len(), number, how)?;
    put(page, at, item)
}

/// An empty page with the special space of another (`PageGetTempPageCopySpecial`).
pub(super) fn empty_like(page: &Page) -> Fit<Page> {
    let at = aligned_bounds(page)?.special;
    let mut new = [0; PAGE_SIZE];
    init(&mut new, PAGE_SIZE - at)?;
    put(&mut new, at, rest_at(page, at)?)?;
    Ok(new)
}
