//! Headers of heap tuples (`src/include/access/htup_details.h`, `HeapTupleHeaderData`), 23 bytes:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 4 | `t_xmin` |
//! | 4 | 4 | `t_xmax` |
//! | 8 | 4 | `t_cid`, or `t_xvac` |
//! | 12 | 6 | `t_ctid` |
//! | 18 | 2 | `t_infomask2` |
//! | 20 | 2 | `t_infomask` |
//! | 22 | 1 | `t_hoff` |

use super::page::{Fit, PD_PRUNE_XID, item_pointer, put, put_u16, put_u32, u16_at, u32_at};
use crate::base::page::Page;
use crate::base::xid::FIRST_NORMAL_XID;

/// `SizeofHeapTupleHeader`.
pub(super) const TUPLE_HEADER: usize = 23;
/// `MaxHeapTupleSize`.
pub(super) const TUPLE_BYTES_MAX: usize = 8160;

/// `t_xmin`.
pub(super) const XMIN: usize = 0;
/// `t_xmax`.
pub(super) const XMAX: usize = 4;
/// `t_cid` or `t_xvac`.
pub(super) const CID: usize = 8;
/// `t_ctid`.
pub(super) const CTID: usize = 12;
/// `t_infomask2`.
pub(super) const INFOMASK2: usize = 18;
/// `t_infomask`.
pub(super) const INFOMASK: usize = 20;
/// `t_hoff`.
pub(super) const HOFF: usize = 22;

const XMAX_KEYSHR_LOCK: u16 = 0x0010;
const COMBOCID: u16 = 0x0020;
const XMAX_EXCL_LOCK: u16 = 0x0040;
const XMAX_LOCK_ONLY: u16 = 0x0080;
const XMAX_COMMITTED: u16 = 0x0400;
const XMAX_INVALID: u16 = 0x0800;
const XMAX_IS_MULTI: u16 = 0x1000;
/// `HEAP_MOVED`.
const MOVED: u16 = 0xC000;
/// `HEAP_LOCK_MASK`.
const LOCK_MASK: u16 = XMAX_KEYSHR_LOCK | XMAX_EXCL_LOCK;
/// `HEAP_XMAX_BITS`.
const XMAX_BITS: u16 = XMAX_COMMITTED | XMAX_INVALID | XMAX_IS_MULTI | LOCK_MASK | XMAX_LOCK_ONLY;

const KEYS_UPDATED: u16 = 0x2000;
const HOT_UPDATED: u16 = 0x4000;

/// The five bytes that records carry of a tuple's header (`xl_heap_header`).
#[derive(Clone, Copy)]
pub(super) struct LoggedHeader {
    /// `t_infomask2`.
    pub(super) infomask2: u16,
    /// `t_infomask`.
    pub(super) infomask: u16,
    /// `t_hoff`.
    pub(super) hoff: u8,
}

/// Writes the header of a new tuple: as logged, with this `t_xmin`, `t_xmax` and `t_ctid`, and
/// the first command's number.
pub(super) fn write_header(
    page: &mut Page,
    at: usize,
    logged: LoggedHeader,
    xids: (u32, u32),
    ctid: [u8; 6],
) -> Fit<()> {
    put_u32(page, at + XMIN, xids.0)?;
    put_u32(page, at + XMAX, xids.1)?;
    put_u32(page, at + CID, 0)?;
    put(page, at + CTID, &ctid)?;
    put_u16(page, at + INFOMASK2, logged.infomask2)?;
    // HeapTupleHeaderSetCmin: the number is no combination of two.
    put_u16(page, at + INFOMASK, logged.infomask & !COMBOCID)?;
    put(page, at + HOFF, &[logged.hoff])
}

/// What becomes of the mark "followed by a version on the same page".
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HotUpdated {
    /// It is set.
    Set,
    /// It is cleared.
    Clear,
    /// It stays.
    Keep,
}

/// Puts the bits that say what `t_xmax` means into the tuple at `at` (the bits' logged form is
/// `infobits`, see `fix_infomask_from_infobits`).
pub(super) fn set_xmax_bits(page: &mut Page, at: usize, infobits: u8, hot: HotUpdated) -> Fit<()> {
    let bit = |mask: u8, bit: u16| if infobits & mask != 0 { bit } else { 0 };
    let mut infomask = u16_at(page, at + INFOMASK)? & !(XMAX_BITS | MOVED);
    infomask |= bit(0x01, XMAX_IS_MULTI) | bit(0x02, XMAX_LOCK_ONLY);
    infomask |= bit(0x04, XMAX_EXCL_LOCK) | bit(0x08, XMAX_KEYSHR_LOCK);
    let mut infomask2 = u16_at(page, at + INFOMASK2)? & !KEYS_UPDATED;
    infomask2 |= bit(0x10, KEYS_UPDATED);
    match hot {
        HotUpdated::Set => infomask2 |= HOT_UPDATED,
        HotUpdated::Clear => infomask2 &= !HOT_UPDATED,
        HotUpdated::Keep => {}
    }
    put_u16(page, at + INFOMASK, infomask)?;
    put_u16(page, at + INFOMASK2, infomask2)
}

/// `HEAP_XMAX_IS_LOCKED_ONLY`.
pub(super) fn is_only_locked(page: &Page, at: usize) -> Fit<bool> {
    let infomask = u16_at(page, at + INFOMASK)?;
    Ok(infomask & XMAX_LOCK_ONLY != 0 || infomask & (XMAX_IS_MULTI | LOCK_MASK) == XMAX_EXCL_LOCK)
}

/// `HeapTupleHeaderClearHotUpdated`.
pub(super) fn clear_hot_updated(page: &mut Page, at: usize) -> Fit<()> {
    let infomask2 = u16_at(page, at + INFOMASK2)?;
    put_u16(page, at + INFOMASK2, infomask2 & !HOT_UPDATED)
}

/// Sets `t_cmax` to the first command (`HeapTupleHeaderSetCmax`).
pub(super) fn clear_cmax(page: &mut Page, at: usize) -> Fit<()> {
    put_u32(page, at + CID, 0)?;
    let infomask = u16_at(page, at + INFOMASK)?;
    put_u16(page, at + INFOMASK, infomask & !COMBOCID)
}

/// Sets `t_ctid`.
pub(super) fn set_ctid(page: &mut Page, at: usize, block: u32, number: u16) -> Fit<()> {
    put(page, at + CTID, &item_pointer(block, number))
}

/// Notes that the page may be worth pruning once `xid` is over (`PageSetPrunable`).
pub(super) fn set_prunable(page: &mut Page, xid: u32) -> Fit<()> {
    if xid < FIRST_NORMAL_XID {
        return Err("a record without a transaction makes a page prunable");
    }
    let oldest = u32_at(page, PD_PRUNE_XID)?;
    let precedes = match oldest < FIRST_NORMAL_XID {
        true => xid < oldest,
        false => xid.wrapping_sub(oldest).cast_signed() < 0,
    };
    if oldest == 0 || precedes { put_u32(page, PD_PRUNE_XID, xid) } else { Ok(()) }
}
