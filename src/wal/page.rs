//! WAL page headers (`src/include/access/xlog_internal.h`), little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 2 | `xlp_magic`: `D110` in PostgreSQL 15 |
//! | 2 | 2 | `xlp_info`: flags |
//! | 4 | 4 | `xlp_tli` |
//! | 8 | 8 | `xlp_pageaddr`: LSN of the page |
//! | 16 | 4 | `xlp_rem_len`: bytes of a record from the page before, 0 if none |
//! | 20 | 4 | padding |
//! | 24 | 8 | `xlp_sysid`, long header only |
//! | 32 | 4 | `xlp_seg_size`, long header only |
//! | 36 | 4 | `xlp_xlog_blcksz`, long header only |
//!
//! The first page of a segment has the long header, all others the short one.

use crate::base::lsn::WAL_PAGE_SIZE;
use crate::base::raw_wal::page_header_len;
pub use crate::base::raw_wal::{LONG_HEADER, SHORT_HEADER};
use crate::base::{Kind, Lsn};

/// `XLOG_PAGE_MAGIC` of PostgreSQL 15.
pub const MAGIC: u16 = 0xD110;

/// The page starts with the rest of a record (`XLP_FIRST_IS_CONTRECORD`).
pub const FIRST_IS_CONTRECORD: u16 = 0x0001;
/// The header is a long one (`XLP_LONG_HEADER`).
pub const IS_LONG: u16 = 0x0002;
/// The rest of the record that the page before began was never written
/// (`XLP_FIRST_IS_OVERWRITE_CONTRECORD`).
pub const FIRST_IS_OVERWRITE_CONTRECORD: u16 = 0x0008;
/// All flags that PostgreSQL 15 knows (`XLP_ALL_FLAGS`).
const ALL_FLAGS: u16 = 0x000F;

/// What is known about the WAL before a page is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct WalLayout {
    /// `wal_segment_size` in bytes: a power of two from 1 MiB to 1 GiB.
    pub segment_bytes: u64,
    /// System identifier of the cluster, if it is to be checked.
    pub system_id: Option<u64>,
}

impl WalLayout {
    /// Length of the header of the page at `page`, in bytes.
    pub fn header_len(&self, page: Lsn) -> usize {
        page_header_len(page, self.segment_bytes)
    }

    /// The LSN, or where the first record can stand if the LSN is at the start of a page.
    pub fn skip_page_header(&self, lsn: Lsn) -> Option<Lsn> {
        match lsn.page_offset() {
            0 => lsn.checked_add(self.header_len(lsn) as u64),
            _ => Some(lsn),
        }
    }

    /// True for the segment sizes that PostgreSQL allows (`IsValidWalSegSize`).
    pub fn valid_segment_bytes(bytes: u64) -> bool {
        bytes.is_power_of_two() && (1 << 20..=1 << 30).contains(&bytes)
    }
}

/// A valid page header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageHeader {
    /// Flags.
    pub info: u16,
    /// PostgreSQL timeline of the first record of the page.
    pub timeline: u32,
    /// Bytes of a record that began on an earlier page.
    pub rem_len: u32,
}

/// Why bytes are no header of the page at `page`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// Too few bytes.
    #[error("the WAL page at {page} is cut: {len} bytes where its header has {expected}")]
    Short {
        /// The page.
        page: Lsn,
        /// Bytes given.
        len: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// All bytes of the header are zero: WAL ends before this page.
    #[error("the WAL page at {page} is empty")]
    Zero {
        /// The page.
        page: Lsn,
    },
    /// Not a WAL page, or one of another PostgreSQL version.
    #[error(
        "the WAL page at {page} has magic number {magic:04X}, PostgreSQL 15 writes {MAGIC:04X}: the WAL is damaged or of another major version"
    )]
    Magic {
        /// The page.
        page: Lsn,
        /// What stands there.
        magic: u16,
    },
    /// Unknown flags, or a long header at the wrong place.
    #[error("the WAL page at {page} has invalid info bits {info:04X}")]
    Info {
        /// The page.
        page: Lsn,
        /// What stands there.
        info: u16,
    },
    /// The page belongs elsewhere, as in a recycled segment.
    #[error("the WAL page at {page} says that it is the page at {found}")]
    Address {
        /// The page.
        page: Lsn,
        /// What stands there.
        found: Lsn,
    },
    /// WAL of another cluster.
    #[error(
        "the WAL page at {page} is of the database system {found}, expected {expected}: the source is another cluster"
    )]
    SystemId {
        /// The page.
        page: Lsn,
        /// What stands there.
        found: u64,
        /// What was expected.
        expected: u64,
    },
    /// Another geometry than the one told.
    #[error("the WAL page at {page} says that {what} is {found} bytes, expected {expected}")]
    Geometry {
        /// The page.
        page: Lsn,
        /// Which size.
        what: &'static str,
        /// What stands there.
        found: u32,
        /// What was expected.
        expected: u64,
    },
}

impl PageError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        match self {
            PageError::SystemId { .. } | PageError::Geometry { .. } => Kind::Invalid,
            _ => Kind::Corrupt,
        }
    }
}

impl PageHeader {
    /// Reads and checks the header of the page at `page` from its first bytes, as
    /// `XLogReaderValidatePageHeader` does.
    pub fn parse(bytes: &[u8], page: Lsn, layout: &WalLayout) -> Result<PageHeader, PageError> {
        let expected = layout.header_len(page);
        let short = PageError::Short { page, len: bytes.len(), expected };
        let Some(bytes) = bytes.get(..expected) else { return Err(short) };
        if bytes.iter().all(|byte| *byte == 0) {
            return Err(PageError::Zero { page });
        }
        let (Some(magic), Some(info), Some(timeline), Some(address), Some(rem_len)) = (
            u16_at(bytes, 0),
            u16_at(bytes, 2),
            u32_at(bytes, 4),
            u64_at(bytes, 8),
            u32_at(bytes, 16),
        ) else {
            return Err(short);
        };
        if magic != MAGIC {
            return Err(PageError::Magic { page, magic });
        }
        let is_long = info & IS_LONG != 0;
        if info & !ALL_FLAGS != 0 || is_long != (expected == LONG_HEADER) {
            return Err(PageError::Info { page, info });
        }
        if address != page.0 {
            return Err(PageError::Address { page, found: Lsn(address) });
        }
        if is_long {
            check_long(bytes, page, layout).unwrap_or(Err(short))?;
        }
        Ok(PageHeader { info, timeline, rem_len })
    }

    /// The page starts with the rest of a record.
    pub fn is_contrecord(&self) -> bool {
        self.info & FIRST_IS_CONTRECORD != 0
    }

    /// The record that the page before began was given up.
    pub fn is_overwrite_contrecord(&self) -> bool {
        self.info & FIRST_IS_OVERWRITE_CONTRECORD != 0
    }
}

/// Checks the fields that only the long header has; `None` if they are cut.
fn check_long(bytes: &[u8], page: Lsn, layout: &WalLayout) -> Option<Result<(), PageError>> {
    let (system_id, segment, block) = (u64_at(bytes, 24)?, u32_at(bytes, 32)?, u32_at(bytes, 36)?);
    let geometry = |what, found, expected| PageError::Geometry { page, what, found, expected };
    Some(match layout.system_id {
        Some(expected) if system_id != expected => {
            Err(PageError::SystemId { page, found: system_id, expected })
        }
        _ if u64::from(segment) != layout.segment_bytes => {
            Err(geometry("the segment size", segment, layout.segment_bytes))
        }
        _ if u64::from(block) != WAL_PAGE_SIZE => {
            Err(geometry("the page size", block, WAL_PAGE_SIZE))
        }
        _ => Ok(()),
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: WalLayout = WalLayout { segment_bytes: 1 << 24, system_id: Some(77) };

    fn header(page: u64, info: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&MAGIC.to_le_bytes());
        bytes.extend_from_slice(&info.to_le_bytes());
        bytes.extend_from_slice(&1u32.to_le_bytes());
        bytes.extend_from_slice(&page.to_le_bytes());
        bytes.extend_from_slice(&5u32.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&77u64.to_le_bytes());
        bytes.extend_from_slice(&(1u32 << 24).to_le_bytes());
        bytes.extend_from_slice(&8192u32.to_le_bytes());
        bytes
    }

    #[test]
    fn good_headers_are_read() {
        let long = PageHeader::parse(&header(1 << 24, 3), Lsn(1 << 24), &LAYOUT).unwrap();
        assert_eq!(long, PageHeader { info: 3, timeline: 1, rem_len: 5 });
        assert!(long.is_contrecord() && !long.is_overwrite_contrecord());
        let short = &header(8192, 8)[..SHORT_HEADER];
        assert!(PageHeader::parse(short, Lsn(8192), &LAYOUT).unwrap().is_overwrite_contrecord());
    }

    #[test]
    fn each_wrong_field_is_named() {
        let page = Lsn(1 << 24);
        let parse = |bytes: &[u8]| PageHeader::parse(bytes, page, &LAYOUT).unwrap_err();
        assert_eq!(parse(&[0; 40]), PageError::Zero { page });
        assert!(matches!(parse(&header(1 << 24, 2)[..39]), PageError::Short { len: 39, .. }));
        assert!(matches!(parse(&header(1 << 25, 2)), PageError::Address { .. }));
        for info in [0, 1, 0x12] {
            assert!(matches!(parse(&header(1 << 24, info)), PageError::Info { .. }), "{info}");
        }
        // Every byte of the header but timeline, remaining length and padding is checked.
        for at in (0..4).chain(8..16).chain(24..40) {
            let mut bytes = header(1 << 24, 2);
            bytes[at] ^= 0x40;
            PageHeader::parse(&bytes, page, &LAYOUT).expect_err(&format!("byte {at}"));
        }
        assert_eq!(LAYOUT.skip_page_header(Lsn(8192)), Some(Lsn(8216)));
        assert_eq!(LAYOUT.skip_page_header(page), Some(Lsn((1 << 24) + 40)));
    }
}
