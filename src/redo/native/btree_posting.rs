//! Index tuples of B-trees, and posting lists: the heap positions of equal keys in one tuple
//! (`src/include/access/nbtree.h`, `src/backend/access/nbtree/nbtdedup.c`).
//!
//! An index tuple begins with an item pointer (6 bytes) and two bytes of which 13 bits are its
//! size. In a posting list tuple a bit of those two is set, and a bit of the pointer's offset;
//! the pointer then holds where the list begins within the tuple (as block number) and how many
//! entries it has (as offset, 12 bits).

use super::page::{
    Fit, bytes_at, item_pointer, max_align, pointer_block, put, put_u16, rest_at, size_at,
    slice_at, u16_at,
};
use crate::base::page::PAGE_SIZE;

/// Size of `IndexTupleData`.
pub(super) const INDEX_TUPLE_HEADER: usize = 8;
/// `t_info`.
const INFO: usize = 6;
/// `INDEX_SIZE_MASK`.
const SIZE_MASK: u16 = 0x1FFF;
/// `INDEX_ALT_TID_MASK`.
pub(super) const ALT_TID: u16 = 0x2000;
/// `BT_IS_POSTING`.
const IS_POSTING: u16 = 0x2000;
/// `BT_OFFSET_MASK`.
const COUNT_MASK: u16 = 0x0FFF;
/// Size of a heap position.
const TID: usize = 6;
/// `BTMaxItemSize`: the longest tuple of a B-tree page.
const TUPLE_BYTES_MAX: usize = 2704;

/// A tuple that is made here, and its length.
pub(super) struct Made {
    bytes: [u8; PAGE_SIZE],
    len: usize,
}

impl Made {
    /// An empty one.
    pub(super) fn new() -> Made {
        Made { bytes: [0; PAGE_SIZE], len: 0 }
    }

    /// The tuple.
    pub(super) fn tuple(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    fn push(&mut self, bytes: &[u8]) -> Fit<()> {
        put(&mut self.bytes, self.len, bytes)?;
        self.len += bytes.len();
        Ok(())
    }

    /// Starts anew with these bytes.
    fn start(&mut self, bytes: &[u8]) -> Fit<()> {
        self.len = 0;
        self.push(bytes)
    }

    /// Fills up with zeros to the alignment, and sets the tuple's size.
    fn finish(&mut self) -> Fit<()> {
        let padding = max_align(self.len) - self.len;
        self.push([0; 8].get(..padding).unwrap_or_default())?;
        let size = u16::try_from(self.len).ok().filter(|size| *size <= SIZE_MASK);
        let info = u16_at(&self.bytes, INFO)? & !SIZE_MASK;
        put_u16(&mut self.bytes, INFO, info | size.ok_or("an index tuple is too long")?)
    }

    /// Makes it a posting list tuple of `count` entries from `list` on (`BTreeTupleSetPosting`).
    fn set_posting(&mut self, list: usize, count: usize) -> Fit<()> {
        let count = u16::try_from(count).ok().filter(|count| *count <= COUNT_MASK);
        let count = count.ok_or("a posting list is too long")?;
        put(&mut self.bytes, 0, &item_pointer(list as u32, count | IS_POSTING))?;
        let info = u16_at(&self.bytes, INFO)?;
        put_u16(&mut self.bytes, INFO, info | ALT_TID)
    }

    /// Makes it a tuple of one heap position.
    fn set_plain(&mut self, tid: &[u8]) -> Fit<()> {
        put(&mut self.bytes, 0, tid)?;
        let info = u16_at(&self.bytes, INFO)?;
        put_u16(&mut self.bytes, INFO, info & !ALT_TID)
    }
}

/// `IndexTupleSize` of the tuple that `bytes` begins with, if it has that many bytes.
pub(super) fn tuple_size(bytes: &[u8]) -> Fit<usize> {
    let size = usize::from(u16_at(bytes, INFO)? & SIZE_MASK);
    if size < INDEX_TUPLE_HEADER || size > bytes.len() {
        return Err("an index tuple is cut");
    }
    Ok(size)
}

/// The tuple that `bytes` begins with.
pub(super) fn tuple(bytes: &[u8]) -> Fit<&[u8]> {
    slice_at(bytes, 0, tuple_size(bytes)?)
}

/// Where the posting list of a tuple begins, and its bytes; `None` if it has none.
fn posting(tuple: &[u8]) -> Fit<Option<(usize, &[u8])>> {
    let offset = u16_at(tuple, 4)?;
    if u16_at(tuple, INFO)? & ALT_TID == 0 || offset & IS_POSTING == 0 {
        return Ok(None);
    }
    let begin = pointer_block(tuple, 0)? as usize;
    if begin < INDEX_TUPLE_HEADER {
        return Err("a posting list begins in its tuple's header");
    }
    let list = slice_at(tuple, begin, usize::from(offset & COUNT_MASK) * TID)?;
    Ok(Some((begin, list)))
}

/// The heap positions of a tuple, and the size of what stands before them: all of it for a tuple
/// without a list.
fn positions(tuple: &[u8]) -> Fit<(usize, &[u8])> {
    match posting(tuple)? {
        Some(found) => Ok(found),
        None => Ok((tuple.len(), slice_at(tuple, 0, TID)?)),
    }
}

/// Puts the position of `new` into the list of `old` as entry `at`; the last entry becomes the
/// position of `new` (`_bt_swap_posting`). Both are changed in place.
pub(super) fn swap(old: &mut [u8], new: &mut [u8], at: usize) -> Fit<()> {
    let (begin, list) = posting(old)?.ok_or("a tuple to be split has no posting list")?;
    let count = list.len() / TID;
    if at == 0 || at >= count {
        return Err("a posting list cannot be split at this entry");
    }
    let (from, last) = (begin + at * TID, begin + (count - 1) * TID);
    let (mine, final_tid) = (bytes_at::<TID>(new, 0)?, bytes_at::<TID>(old, last)?);
    let list_end = begin + count * TID;
    let moved = old.get_mut(from..list_end).ok_or("a posting list is cut")?;
    moved.rotate_right(TID);
    put(old, from, &mine)?;
    put(new, 0, &final_tid)
}

/// The tuple without some entries of its list, whose numbers ascend in `deleted`, u16 each
/// (`_bt_update_posting`).
pub(super) fn without(tuple: &[u8], deleted: &[u8], made: &mut Made) -> Fit<()> {
    let (begin, list) = posting(tuple)?.ok_or("a tuple to be thinned has no posting list")?;
    let count = list.len() / TID;
    let left = count.checked_sub(deleted.len() / 2).filter(|left| *left > 0);
    let left = left.ok_or("nothing is left of a posting list")?;
    made.start(slice_at(tuple, 0, begin)?)?;
    let (mut next, mut kept, mut plain) = (0, 0, [0; TID]);
    for (index, tid) in list.chunks_exact(TID).enumerate() {
        if next < deleted.len() && size_at(deleted, next)? == index {
            next += 2;
            continue;
        }
        kept += 1;
        match left {
            1 => put(&mut plain, 0, tid)?,
            _ => made.push(tid)?,
        }
    }
    if kept != left {
        return Err("entries to be deleted are out of order or too high");
    }
    match left {
        1 => made.set_plain(&plain)?,
        _ => made.set_posting(begin, left)?,
    }
    made.finish()
}

/// A posting list tuple in the making (`BTDedupState`).
pub(super) struct Pending<'a> {
    base: &'a [u8],
    /// Number of the first tuple.
    pub(super) number: usize,
    /// Tuples in it.
    pub(super) tuples: usize,
    key: usize,
    made: Made,
}

impl<'a> Pending<'a> {
    /// Begins with a tuple (`_bt_dedup_start_pending`).
    pub(super) fn new(base: &'a [u8], number: usize) -> Fit<Pending<'a>> {
        let mut pending = Pending { base, number, tuples: 0, key: 0, made: Made::new() };
        pending.restart(base, number)?;
        Ok(pending)
    }

    /// Begins anew with another tuple.
    pub(super) fn restart(&mut self, base: &'a [u8], number: usize) -> Fit<()> {
        let (key, list) = positions(base)?;
        if list.len() > TUPLE_BYTES_MAX {
            return Err("a posting list is too long");
        }
        (self.base, self.number, self.tuples, self.key) = (base, number, 1, key);
        self.made.start(slice_at(base, 0, key)?)?;
        self.made.push(list)
    }

    /// Adds the positions of another tuple (`_bt_dedup_save_htid`).
    pub(super) fn add(&mut self, tuple: &[u8]) -> Fit<()> {
        let (_, list) = positions(tuple)?;
        if max_align(self.made.len + list.len()) > TUPLE_BYTES_MAX {
            return Err("a posting list is too long");
        }
        self.tuples += 1;
        self.made.push(list)
    }

    /// The tuple: the first one as it was if no other was added (`_bt_dedup_finish_pending`).
    pub(super) fn finish(&mut self) -> Fit<&[u8]> {
        if self.tuples == 1 {
            return Ok(self.base);
        }
        let count = rest_at(self.made.tuple(), self.key)?.len() / TID;
        self.made.set_posting(self.key, count)?;
        self.made.finish()?;
        Ok(self.made.tuple())
    }
}
