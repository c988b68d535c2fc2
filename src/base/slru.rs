//! Pages and segments of the simple-LRU logs (`src/backend/access/transam/{slru,clog,multixact}.c`).
//!
//! A segment has [`SLRU_PAGES_PER_SEGMENT`] pages. A `pg_xact` page holds two bits for each of
//! 32,768 transactions. A `pg_multixact/offsets` page holds 2,048 offsets of four bytes. A
//! `pg_multixact/members` page holds 409 groups of 20 bytes, each four status bytes and four
//! transactions; the last 12 bytes are unused.

use super::key::{BlockNumber, SLRU_PAGES_PER_SEGMENT, SlruKind};
use super::xid::{FIRST_MULTI, FIRST_NORMAL_XID, precedes, xid_precedes};

/// Transactions per `pg_xact` page.
pub const CLOG_XIDS_PER_PAGE: u32 = 32_768;
/// Entries per `pg_multixact/offsets` page.
pub const OFFSETS_PER_PAGE: u32 = 2_048;
/// Members per group of a `pg_multixact/members` page.
pub const MEMBERS_PER_GROUP: u32 = 4;
/// Bytes per group: a status byte for each member, then the members.
pub const MEMBER_GROUP_BYTES: u32 = 20;
/// Members per `pg_multixact/members` page.
pub const MEMBERS_PER_PAGE: u32 = 409 * MEMBERS_PER_GROUP;
/// The last segment of `pg_multixact/members`.
pub const MEMBERS_SEGMENT_MAX: u32 = u32::MAX / MEMBERS_PER_PAGE / SLRU_PAGES_PER_SEGMENT;

/// Page of `pg_xact` with the status of a transaction.
pub fn clog_page(xid: u32) -> u32 {
    xid / CLOG_XIDS_PER_PAGE
}

/// Byte of its `pg_xact` page, and shift of the two bits in it.
pub fn clog_place(xid: u32) -> (usize, u32) {
    ((xid % CLOG_XIDS_PER_PAGE / 4) as usize, xid % 4 * 2)
}

/// Page of `pg_multixact/offsets` with the entry of a multixact.
pub fn offsets_page(multi: u32) -> u32 {
    multi / OFFSETS_PER_PAGE
}

/// Byte of the entry in its `pg_multixact/offsets` page.
pub fn offsets_place(multi: u32) -> usize {
    (multi % OFFSETS_PER_PAGE * 4) as usize
}

/// Page of `pg_multixact/members` with a member.
pub fn members_page(offset: u32) -> u32 {
    offset / MEMBERS_PER_PAGE
}

/// Segment of `pg_multixact/members` with a member.
pub fn members_segment(offset: u32) -> u32 {
    members_page(offset) / SLRU_PAGES_PER_SEGMENT
}

/// Bytes of a member in its `pg_multixact/members` page: of its status, and of its transaction
/// (four bytes).
pub fn members_place(offset: u32) -> (usize, usize) {
    let group = offset % MEMBERS_PER_PAGE / MEMBERS_PER_GROUP * MEMBER_GROUP_BYTES;
    let member = offset % MEMBERS_PER_GROUP;
    ((group + member) as usize, (group + MEMBERS_PER_GROUP + member * 4) as usize)
}

/// Segment of a page, and block within the segment.
pub fn segment_of(page: u32) -> (u32, BlockNumber) {
    (page / SLRU_PAGES_PER_SEGMENT, page % SLRU_PAGES_PER_SEGMENT)
}

/// True if `page` lies wholly before `cutoff` on the circle of numbers: both the first and the
/// last entry of the cutoff page are later than the first of `page` (`CLOGPagePrecedes`,
/// `MultiXactOffsetPagePrecedes`, `MultiXactMemberPagePrecedes`).
pub fn page_precedes(kind: SlruKind, page: u32, cutoff: u32) -> bool {
    let (per_page, shift) = match kind {
        SlruKind::Clog => (CLOG_XIDS_PER_PAGE, FIRST_NORMAL_XID + 1),
        SlruKind::MultiXactOffsets => (OFFSETS_PER_PAGE, FIRST_MULTI + 1),
        SlruKind::MultiXactMembers => (MEMBERS_PER_PAGE, 0),
    };
    let first = |page: u32| page.wrapping_mul(per_page).wrapping_add(shift);
    let before = match kind {
        SlruKind::Clog => xid_precedes,
        SlruKind::MultiXactOffsets | SlruKind::MultiXactMembers => precedes,
    };
    let entry = first(page);
    before(entry, first(cutoff)) && before(entry, first(cutoff).wrapping_add(per_page - 1))
}

/// True if a truncation that keeps pages from `cutoff` on removes the segment
/// (`SlruMayDeleteSegment`).
pub fn segment_precedes(kind: SlruKind, segment: u32, cutoff: u32) -> bool {
    let first = segment.wrapping_mul(SLRU_PAGES_PER_SEGMENT);
    let last = first.wrapping_add(SLRU_PAGES_PER_SEGMENT - 1);
    page_precedes(kind, first, cutoff) && page_precedes(kind, last, cutoff)
}

/// True if removing the member segments `first..end`, around the end of the number range if
/// `end < first`, removes this one (`PerformMembersTruncation`).
pub fn members_segment_removed(segment: u32, first: u32, end: u32) -> bool {
    if segment > MEMBERS_SEGMENT_MAX {
        return false;
    }
    if first <= end { (first..end).contains(&segment) } else { segment >= first || segment < end }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_those_of_postgres() {
        assert_eq!((clog_page(32_768), clog_place(32_773)), (1, (1, 2)));
        assert_eq!((offsets_page(2_048), offsets_place(2_049)), (1, 4));
        assert_eq!((members_page(1_636), members_segment(1_636 * 32)), (1, 1));
        assert_eq!(members_place(0), (0, 4));
        assert_eq!(members_place(5), (21, 28));
        assert_eq!(members_place(1_635), (408 * 20 + 3, 408 * 20 + 16));
        assert_eq!(MEMBERS_SEGMENT_MAX, 0x14078);
        assert_eq!(segment_of(65), (2, 1));
    }

    #[test]
    fn segments_are_cut_around_the_circle() {
        for kind in SlruKind::ALL {
            assert!(segment_precedes(kind, 0, 32));
            assert!(!segment_precedes(kind, 0, 31), "{kind:?}: the cutoff page is in the segment");
            assert!(!segment_precedes(kind, 1, 32));
            assert!(!segment_precedes(kind, 2, 32));
        }
        // The last segment of pg_xact is older than the first one after the wrap.
        let last = u32::MAX / CLOG_XIDS_PER_PAGE / 32;
        assert!(segment_precedes(SlruKind::Clog, last, 5));
        assert!(!segment_precedes(SlruKind::Clog, 5, last * 32));
    }

    /// What PostgreSQL does, step by step.
    fn removed_by_loop(first: u32, end: u32) -> Vec<u32> {
        let (mut segment, mut removed) = (first, Vec::new());
        while segment != end {
            removed.push(segment);
            segment = if segment == MEMBERS_SEGMENT_MAX { 0 } else { segment + 1 };
        }
        removed.sort_unstable();
        removed
    }

    #[test]
    fn member_ranges_wrap() {
        let max = MEMBERS_SEGMENT_MAX;
        for (first, end) in [(0, 0), (3, 9), (max - 2, 4), (max, 0), (0, max), (9, 9)] {
            let removed: Vec<u32> =
                (0..=max + 3).filter(|s| members_segment_removed(*s, first, end)).collect();
            assert_eq!(removed, removed_by_loop(first, end), "{first}..{end}");
        }
    }
}
