//! Applies our own small records to pages, as PostgreSQL 15's redo would.
//!
//! - Visibility map (`access/heap/visibilitymap.c`): after the page header, two bits per heap
//!   block, four blocks per byte, the lowest block in the lowest bits. The page LSN stays.
//! - `pg_xact` (`access/transam/clog.c`): two bits per transaction, four per byte, no header.
//! - `pg_multixact/offsets` (`access/transam/multixact.c`): u32 per multixact, no header.
//! - `pg_multixact/members`: groups of four members, 20 bytes: a byte of status for each, then a
//!   u32 transaction for each. 409 groups fit on a page; the last 12 bytes are unused.

use crate::base::page::{PAGE_SIZE, page_is_new};
use crate::base::{BlockNumber, SmallRecord};

const PAGE_HEADER: usize = 24;
/// Bytes of map on a visibility map page.
const MAP_BYTES: usize = PAGE_SIZE - PAGE_HEADER;

/// Heap blocks that one visibility map page covers.
pub const HEAP_BLOCKS_PER_VM_PAGE: u32 = 32_672;
/// Transactions per `pg_xact` page.
pub const XIDS_PER_CLOG_PAGE: u32 = 32_768;
/// Multixacts per `pg_multixact/offsets` page.
pub const OFFSETS_PER_PAGE: u32 = 2_048;
/// Members per `pg_multixact/members` page.
pub const MEMBERS_PER_PAGE: u32 = 1_636;

const MEMBERS_PER_GROUP: u32 = 4;
const GROUP_BYTES: u32 = 20;
const CLOG_COMMITTED: u8 = 1;
const CLOG_SUB_COMMITTED: u8 = 3;

/// Visibility map block that covers a heap block.
pub const fn heap_block_to_map_block(heap_block: BlockNumber) -> BlockNumber {
    heap_block / HEAP_BLOCKS_PER_VM_PAGE
}

/// Byte of the map, after the page header, that covers a heap block.
pub const fn heap_block_to_map_byte(heap_block: BlockNumber) -> u32 {
    heap_block % HEAP_BLOCKS_PER_VM_PAGE / 4
}

/// `pg_xact` page of a transaction.
pub const fn xid_to_clog_page(xid: u32) -> u32 {
    xid / XIDS_PER_CLOG_PAGE
}

/// `pg_multixact/offsets` page of a multixact.
pub const fn multi_to_offset_page(multi: u32) -> u32 {
    multi / OFFSETS_PER_PAGE
}

/// `pg_multixact/members` page of a member.
pub const fn offset_to_member_page(offset: u32) -> u32 {
    offset / MEMBERS_PER_PAGE
}

/// Why a small record could not be applied.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SmallError {
    /// The page is not 8,192 bytes long.
    #[error("the page has {len} bytes")]
    PageSize {
        /// Its length in bytes.
        len: usize,
    },
    /// The record belongs on another page, or has impossible numbers.
    #[error("{what} {number} does not belong on page {page}")]
    Misplaced {
        /// What the number counts.
        what: &'static str,
        /// The number.
        number: u32,
        /// The page, counted over all segments of an SLRU.
        page: u32,
    },
}

/// Applies `record` to `page`, which is number `page_number` of its fork or, over all segments,
/// of its SLRU. The page is unchanged after an error.
pub fn apply(record: &SmallRecord, page_number: u32, page: &mut [u8]) -> Result<(), SmallError> {
    let len = page.len();
    let page: &mut [u8; PAGE_SIZE] = page.try_into().map_err(|_| SmallError::PageSize { len })?;
    let placed = |what, number, right: bool| {
        if right { Ok(()) } else { Err(SmallError::Misplaced { what, number, page: page_number }) }
    };
    match record {
        SmallRecord::VmClear { flags, heap_blocks } => {
            for block in heap_blocks.iter().flatten() {
                placed("heap block", *block, heap_block_to_map_block(*block) == page_number)?;
            }
            heap_blocks.iter().flatten().for_each(|block| vm_clear(page, *block, *flags));
        }
        SmallRecord::VmTruncate { map_byte, blocks_kept } => {
            placed("map byte", *map_byte, (*map_byte as usize) < MAP_BYTES)?;
            placed("kept block", u32::from(*blocks_kept), *blocks_kept < 4)?;
            vm_truncate(page, *map_byte as usize, *blocks_kept);
        }
        SmallRecord::ClogSet { status, xids, .. } => {
            placed("transaction status", u32::from(*status), *status < 4)?;
            for xid in xids {
                placed("transaction", *xid, xid_to_clog_page(*xid) == page_number)?;
            }
            xids.iter().for_each(|xid| clog_set(page, *xid, *status));
        }
        SmallRecord::MultiXactOffset { multi, offset } => {
            placed("multixact", *multi, multi_to_offset_page(*multi) == page_number)?;
            put_u32(page, (multi % OFFSETS_PER_PAGE * 4) as usize, *offset);
        }
        SmallRecord::MultiXactMembers { first_offset, members } => {
            for (at, (_, status)) in (*first_offset..=u32::MAX).zip(members) {
                placed("member", at, offset_to_member_page(at) == page_number)?;
                placed("member status", *status, *status <= u32::from(u8::MAX))?;
            }
            for (at, (xid, status)) in (*first_offset..=u32::MAX).zip(members) {
                member_set(page, at, *xid, *status as u8);
            }
        }
    }
    Ok(())
}

fn put_u32(page: &mut [u8; PAGE_SIZE], at: usize, value: u32) {
    if let Some(bytes) = page.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

/// A page that was never initialised has no bits to clear. PostgreSQL initialises it in memory
/// then, without marking it dirty, so on disk it stays as it is; so it does here.
fn vm_clear(page: &mut [u8; PAGE_SIZE], heap_block: BlockNumber, flags: u8) {
    let at = PAGE_HEADER + heap_block_to_map_byte(heap_block) as usize;
    if let Some(byte) = page.get_mut(at) {
        *byte &= !((flags & 3) << (heap_block % 4 * 2));
    }
}

fn vm_truncate(page: &mut [u8; PAGE_SIZE], map_byte: usize, blocks_kept: u8) {
    if page_is_new(&page[..]) {
        page_init(page);
    }
    if let Some([first, rest @ ..]) = page.get_mut(PAGE_HEADER + map_byte..) {
        *first &= (1u8 << (blocks_kept * 2)) - 1;
        rest.fill(0);
    }
}

/// `PageInit` without special space.
fn page_init(page: &mut [u8; PAGE_SIZE]) {
    page.fill(0);
    page[12..14].copy_from_slice(&(PAGE_HEADER as u16).to_le_bytes());
    page[14..16].copy_from_slice(&(PAGE_SIZE as u16).to_le_bytes());
    page[16..18].copy_from_slice(&(PAGE_SIZE as u16).to_le_bytes());
    page[18..20].copy_from_slice(&(PAGE_SIZE as u16 | 4).to_le_bytes());
}

fn clog_set(page: &mut [u8; PAGE_SIZE], xid: u32, status: u8) {
    let shift = xid % 4 * 2;
    if let Some(byte) = page.get_mut((xid % XIDS_PER_CLOG_PAGE / 4) as usize) {
        let old = *byte >> shift & 3;
        // Redo of a commit marks subtransactions first, even those that are committed already.
        if status == CLOG_SUB_COMMITTED && old == CLOG_COMMITTED {
            return;
        }
        *byte = *byte & !(3 << shift) | status << shift;
    }
}

fn member_set(page: &mut [u8; PAGE_SIZE], offset: u32, xid: u32, status: u8) {
    let index = offset % MEMBERS_PER_PAGE;
    let group = (index / MEMBERS_PER_GROUP * GROUP_BYTES) as usize;
    let member = (index % MEMBERS_PER_GROUP) as usize;
    if let Some(byte) = page.get_mut(group + member) {
        *byte = status;
    }
    put_u32(page, group + 4 + member * 4, xid);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(byte: u8) -> Vec<u8> {
        vec![byte; PAGE_SIZE]
    }

    /// Bytes that differ: offset and new value.
    fn diff(old: &[u8], new: &[u8]) -> Vec<(usize, u8)> {
        (0..PAGE_SIZE).filter(|&i| old[i] != new[i]).map(|i| (i, new[i])).collect()
    }

    fn applied(record: SmallRecord, number: u32, old: &[u8]) -> Vec<(usize, u8)> {
        let mut page = old.to_vec();
        apply(&record, number, &mut page).unwrap();
        diff(old, &page)
    }

    #[test]
    fn vm_clear_clears_two_blocks() {
        // block 32,672 + 5: second byte of page 1, bits 2 and 3; block 32,672: first byte.
        let record = SmallRecord::VmClear { flags: 3, heap_blocks: [Some(32_677), Some(32_672)] };
        assert_eq!(applied(record, 1, &filled(0xFF)), [(24, 0xFC), (25, 0xF3)]);
        let frozen = SmallRecord::VmClear { flags: 2, heap_blocks: [Some(3), None] };
        assert_eq!(applied(frozen.clone(), 0, &filled(0xFF)), [(24, 0x7F)]);
        assert_eq!(applied(frozen.clone(), 0, &filled(0)), []);
        assert!(apply(&frozen, 1, &mut filled(0)).is_err());
    }

    #[test]
    fn vm_truncate_clears_the_tail() {
        let old = filled(0xFF);
        let new = applied(SmallRecord::VmTruncate { map_byte: 8166, blocks_kept: 1 }, 0, &old);
        assert_eq!(new, [(8190, 3), (8191, 0)]);
        let init = applied(SmallRecord::VmTruncate { map_byte: 0, blocks_kept: 1 }, 0, &filled(0));
        assert_eq!(init, [(12, 24), (15, 0x20), (17, 0x20), (18, 4), (19, 0x20)]);
        let beyond = SmallRecord::VmTruncate { map_byte: 8168, blocks_kept: 0 };
        assert!(apply(&beyond, 0, &mut filled(0)).is_err());
    }

    #[test]
    fn clog_sets_two_bits() {
        let set = |status, xid| SmallRecord::ClogSet { status, timestamp: 0, xids: vec![xid] };
        assert_eq!(applied(set(1, 32_768 + 6), 1, &filled(0)), [(1, 0x10)]);
        assert_eq!(applied(set(2, 7), 0, &filled(0x55)), [(1, 0x95)]);
        assert_eq!(applied(set(3, 7), 0, &filled(0x55)), []);
        assert_eq!(applied(set(1, 7), 0, &filled(0xFF)), [(1, 0x7F)]);
        assert!(apply(&set(1, 32_768), 0, &mut filled(0)).is_err());
    }

    #[test]
    fn multixacts() {
        let offset = SmallRecord::MultiXactOffset { multi: 2049, offset: 0x0102_0304 };
        assert_eq!(applied(offset, 1, &filled(0)), [(4, 4), (5, 3), (6, 2), (7, 1)]);
        // member 1636 + 7 is the last of the second group of page 1, the next starts the third
        let members =
            SmallRecord::MultiXactMembers { first_offset: 1643, members: vec![(9, 5), (10, 4)] };
        let expected = [(23, 5), (36, 9), (40, 4), (44, 10)];
        assert_eq!(applied(members, 1, &filled(0)), expected);
        let across =
            SmallRecord::MultiXactMembers { first_offset: 1635, members: vec![(9, 5), (10, 4)] };
        assert!(apply(&across, 0, &mut filled(0)).is_err());
        let wrap = SmallRecord::MultiXactMembers { first_offset: u32::MAX, members: vec![(9, 5)] };
        assert_eq!(offset_to_member_page(u32::MAX), 2_625_285);
        assert!(!applied(wrap, 2_625_285, &filled(0)).is_empty());
    }
}
