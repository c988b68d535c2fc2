//! Applying our own small records to a page: changes that WAL implies without naming the block.
//!
//! Sources of the layouts: `access/heap/visibilitymap.c`, `access/transam/clog.c`,
//! `access/transam/multixact.c`, `storage/page/bufpage.c` of PostgreSQL 15.

use crate::base::page::{PAGE_SIZE, Page, page_is_new};
use crate::base::slru::{clog_place, members_place, offsets_place};
use crate::base::{BlockNumber, SmallRecord};

/// Bytes of the page header; the map follows it (`MAXALIGN(SizeOfPageHeaderData)`).
const HEADER_BYTES: usize = 24;
/// Two bits per heap block: heap blocks per byte of the map.
const BLOCKS_PER_BYTE: u32 = 4;
/// Bytes of map in one page (`MAPSIZE`).
const MAP_BYTES: u32 = (PAGE_SIZE - HEADER_BYTES) as u32;
/// Heap blocks that one page of the map covers (`HEAPBLOCKS_PER_PAGE`).
pub const HEAP_BLOCKS_PER_MAP_PAGE: u32 = MAP_BYTES * BLOCKS_PER_BYTE;

/// Page of the visibility map that covers a heap block (`HEAPBLK_TO_MAPBLOCK`).
pub fn heap_block_to_map_block(heap_block: BlockNumber) -> BlockNumber {
    heap_block / HEAP_BLOCKS_PER_MAP_PAGE
}

/// Byte of the map within its page, and place (0..4) within the byte, of a heap block
/// (`HEAPBLK_TO_MAPBYTE`, `HEAPBLK_TO_OFFSET` / 2).
pub fn heap_block_to_map_byte(heap_block: BlockNumber) -> (u32, u8) {
    let within = heap_block % HEAP_BLOCKS_PER_MAP_PAGE;
    (within / BLOCKS_PER_BYTE, (within % BLOCKS_PER_BYTE) as u8)
}

/// A page as `PageInit` leaves it, without special space.
pub fn initialised_page() -> Box<Page> {
    let mut page = Box::new([0; PAGE_SIZE]);
    initialise(&mut page);
    page
}

fn initialise(page: &mut Page) {
    const LAYOUT_VERSION: u16 = 4;
    let size = PAGE_SIZE as u16;
    let fields = [(12, HEADER_BYTES as u16), (14, size), (16, size), (18, size | LAYOUT_VERSION)];
    for (offset, value) in fields {
        page[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }
}

/// Applies a record. The page LSN of a visibility-map page stays, as in PostgreSQL's redo; SLRU
/// pages have none. What lies outside the page, by whatever mistake, is left out.
pub fn apply(page: &mut Page, record: &SmallRecord) {
    match record {
        SmallRecord::VmClear { flags, heap_blocks } => {
            // A page of zeros stays one: PostgreSQL initialises it in memory only, because
            // clearing no bit does not make it dirty.
            for heap_block in heap_blocks.iter().flatten() {
                let (byte, place) = heap_block_to_map_byte(*heap_block);
                page[HEADER_BYTES + byte as usize] &= !((flags & 3) << (2 * place));
            }
        }
        SmallRecord::VmTruncate { map_byte, blocks_kept } => {
            initialise_if_new(page);
            let from = HEADER_BYTES + *map_byte as usize;
            if let Some((first, rest)) = page.get_mut(from..).and_then(<[u8]>::split_first_mut) {
                rest.fill(0);
                *first &= (1u8 << (2 * (blocks_kept & 3))) - 1;
            }
        }
        SmallRecord::ClogSet { status, xids, .. } => {
            for xid in xids {
                let (byte, shift) = clog_place(*xid);
                page[byte] = page[byte] & !(3 << shift) | (status & 3) << shift;
            }
        }
        SmallRecord::MultiXactOffset { multi, offset, next_offset } => {
            set_offset(page, *multi, *offset);
            if let Some(next_offset) = next_offset {
                set_offset(page, multi.wrapping_add(1), *next_offset);
            }
        }
        SmallRecord::MultiXactMembers { first_offset, members } => {
            for (index, (xid, status)) in members.iter().enumerate() {
                let offset = first_offset.wrapping_add(index as u32);
                set_member(page, offset, *xid, *status as u8);
            }
        }
    }
}

/// `vm_readbuf`: a page of zeros gets its header when it is first used.
fn initialise_if_new(page: &mut Page) {
    if page_is_new(&page[..]) {
        initialise(page);
    }
}

fn set_offset(page: &mut Page, multi: u32, offset: u32) {
    let at = offsets_place(multi);
    page[at..at + 4].copy_from_slice(&offset.to_le_bytes());
}

/// `RecordNewMultiXact`: groups of four status bytes and four transactions.
fn set_member(page: &mut Page, offset: u32, xid: u32, status: u8) {
    let (status_at, at) = members_place(offset);
    page[status_at] = status;
    page[at..at + 4].copy_from_slice(&xid.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visibility_bits_are_cleared_and_nothing_else() {
        let mut page = initialised_page();
        page[HEADER_BYTES..].fill(0xFF);
        apply(&mut page, &SmallRecord::VmClear { flags: 3, heap_blocks: [Some(5), Some(32672)] });
        assert_eq!(page[HEADER_BYTES], 0b1111_1100, "block 32672 is the first of its map page");
        assert_eq!(page[HEADER_BYTES + 1], 0b1111_0011);
        apply(&mut page, &SmallRecord::VmClear { flags: 2, heap_blocks: [None, Some(7)] });
        assert_eq!(page[HEADER_BYTES + 1], 0b0111_0011);
        assert!(page[HEADER_BYTES + 2..].iter().all(|byte| *byte == 0xFF));
        assert_eq!(page[..HEADER_BYTES], initialised_page()[..HEADER_BYTES]);
    }

    #[test]
    fn truncation_keeps_the_bits_before_it() {
        let mut page = initialised_page();
        page[HEADER_BYTES..].fill(0xFF);
        let (map_byte, blocks_kept) = heap_block_to_map_byte(4 * 100 + 3);
        apply(&mut page, &SmallRecord::VmTruncate { map_byte, blocks_kept });
        assert!(page[HEADER_BYTES..HEADER_BYTES + 100].iter().all(|byte| *byte == 0xFF));
        assert_eq!(page[HEADER_BYTES + 100], 0b0011_1111);
        assert!(page[HEADER_BYTES + 101..].iter().all(|byte| *byte == 0));
        let mut page = [0; PAGE_SIZE];
        apply(&mut page, &SmallRecord::VmTruncate { map_byte: u32::MAX - 40, blocks_kept: 0 });
        assert_eq!(page, *initialised_page(), "a new page gets its header");
    }

    #[test]
    fn statuses_offsets_and_members_have_their_places() {
        let mut page = [0; PAGE_SIZE];
        let xids = vec![32768 + 5, 32768 + 6];
        apply(&mut page, &SmallRecord::ClogSet { status: 1, timestamp: 0, xids });
        assert_eq!(page[1], 0b0001_0100);
        let xids = vec![32768 + 5];
        apply(&mut page, &SmallRecord::ClogSet { status: 2, timestamp: 0, xids });
        assert_eq!(page[1], 0b0001_1000);

        let mut page = [0; PAGE_SIZE];
        let (multi, offset, next_offset) = (2048 + 3, 0x0102_0304, Some(0x0102_0306));
        apply(&mut page, &SmallRecord::MultiXactOffset { multi, offset, next_offset });
        assert_eq!(page[12..20], [4, 3, 2, 1, 6, 3, 2, 1]);

        let mut page = [0; PAGE_SIZE];
        let members = vec![(700, 1), (0x0A0B_0C0D, 5)];
        apply(&mut page, &SmallRecord::MultiXactMembers { first_offset: 1636 + 3, members });
        assert_eq!((page[3], page[20]), (1, 5), "the fourth of a group, the first of the next");
        assert_eq!(page[16..20], 700u32.to_le_bytes());
        assert_eq!(page[24..28], [0x0D, 0x0C, 0x0B, 0x0A]);
    }
}
