//! PostgreSQL's page header (`src/include/storage/bufpage.h`, `PageHeaderData`), 24 bytes:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | `pd_lsn`: two little-endian u32, high half first |
//! | 8 | 2 | `pd_checksum` |
//! | 10 | 2 | `pd_flags` |
//! | 12 | 2 | `pd_lower` |
//! | 14 | 2 | `pd_upper` |
//! | 16 | 2 | `pd_special` |
//! | 18 | 2 | `pd_pagesize_version` |
//! | 20 | 4 | `pd_prune_xid` |

use super::lsn::Lsn;

/// Size of a page in bytes (`BLCKSZ`).
pub const PAGE_SIZE: usize = 8192;
/// Offset of `pd_checksum`, two bytes.
pub const PD_CHECKSUM: std::ops::Range<usize> = 8..10;

/// One page.
pub type Page = [u8; PAGE_SIZE];

fn u16_at(page: &[u8], offset: usize) -> u16 {
    match page.get(offset..offset + 2) {
        Some(bytes) => u16::from_le_bytes([bytes[0], bytes[1]]),
        None => 0,
    }
}

fn u32_at(page: &[u8], offset: usize) -> u32 {
    u32::from(u16_at(page, offset)) | u32::from(u16_at(page, offset + 2)) << 16
}

/// `pd_lsn`, position after the last record that changed the page; zero for a page too short.
pub fn page_lsn(page: &[u8]) -> Lsn {
    if page.len() < 8 {
        return Lsn::INVALID;
    }
    Lsn(u64::from(u32_at(page, 0)) << 32 | u64::from(u32_at(page, 4)))
}

/// Sets `pd_lsn`. Pages shorter than the header are left alone.
pub fn set_page_lsn(page: &mut [u8], lsn: Lsn) {
    if let Some(bytes) = page.get_mut(0..8) {
        bytes[0..4].copy_from_slice(&((lsn.0 >> 32) as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&(lsn.0 as u32).to_le_bytes());
    }
}

/// `PageIsNew`: the page was never initialised (`pd_upper == 0`).
pub fn page_is_new(page: &[u8]) -> bool {
    u16_at(page, 14) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lsn_is_kept_high_half_first() {
        let mut page = [0u8; PAGE_SIZE];
        assert!(page_is_new(&page));
        set_page_lsn(&mut page, Lsn(0x1122_3344_5566_7788));
        assert_eq!(&page[..8], &[0x44, 0x33, 0x22, 0x11, 0x88, 0x77, 0x66, 0x55]);
        assert_eq!(page_lsn(&page), Lsn(0x1122_3344_5566_7788));
        assert_eq!(page_lsn(&page[..3]), Lsn(0));
    }
}
