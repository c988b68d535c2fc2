//! Log sequence numbers.
//!
//! An [`Lsn`] is a byte position in a WAL stream. Every LSN *range* in this program is half-open:
//! `start..end` holds the changes with `start <= lsn < end`. The LSN of a change is the position
//! just after its WAL record (PostgreSQL's `EndRecPtr`), because that is what pages carry.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Size of a WAL page in bytes (`XLOG_BLCKSZ`).
pub const WAL_PAGE_SIZE: u64 = 8192;

/// A byte position in the WAL (`XLogRecPtr`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lsn(pub u64);

/// A half-open range of LSNs.
pub type LsnRange = std::ops::Range<Lsn>;

impl Lsn {
    /// Zero: no position (`InvalidXLogRecPtr`).
    pub const INVALID: Lsn = Lsn(0);
    /// "The newest there is", in requests of the page service.
    pub const MAX: Lsn = Lsn(u64::MAX);

    /// True for every position but zero.
    pub fn is_valid(self) -> bool {
        self.0 != 0
    }

    /// The position rounded up to 8 bytes (`MAXALIGN`), where WAL records start.
    pub fn align(self) -> Lsn {
        Lsn(self.0.saturating_add(7) & !7)
    }

    /// `self + bytes`, or `None` where that would pass the end of the number range.
    pub fn checked_add(self, bytes: u64) -> Option<Lsn> {
        self.0.checked_add(bytes).map(Lsn)
    }

    /// Bytes from `earlier` to `self`; 0 when `earlier` is not earlier.
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// Offset within a WAL page, in bytes.
    pub fn page_offset(self) -> u64 {
        self.0 % WAL_PAGE_SIZE
    }

    /// Number of the WAL segment that holds this position.
    pub fn segment_number(self, segment_bytes: u64) -> u64 {
        self.0 / segment_bytes
    }

    /// Offset within its WAL segment, in bytes.
    pub fn segment_offset(self, segment_bytes: u64) -> u64 {
        self.0 % segment_bytes
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl fmt::Debug for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is no LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no LSN; write it as PostgreSQL does, two hexadecimal numbers with a slash: 0/16B3748"
)]
pub struct LsnParseError {
    /// The text that was given.
    pub text: String,
}

impl FromStr for Lsn {
    type Err = LsnParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (high, low) = text.split_once('/')?;
            let hex = |part: &str| {
                let plain = !part.is_empty() && part.bytes().all(|b| b.is_ascii_hexdigit());
                plain.then(|| u32::from_str_radix(part, 16).ok()).flatten()
            };
            Some(Lsn(u64::from(hex(high)?) << 32 | u64::from(hex(low)?)))
        };
        parse().ok_or_else(|| LsnParseError { text: text.to_owned() })
    }
}

impl Serialize for Lsn {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_form_is_that_of_postgres() {
        assert_eq!(Lsn(0x16B3748).to_string(), "0/16B3748");
        assert_eq!("16/B374D848".parse(), Ok(Lsn(0x16_B374_D848)));
        for bad in ["", "/", "1", "1/", "/1", "1/2/3", "x/1", "1/100000000", "+1/2", " 0/1"] {
            assert!(bad.parse::<Lsn>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn alignment_and_distance() {
        assert_eq!(Lsn(9).align(), Lsn(16));
        assert_eq!(Lsn(16).align(), Lsn(16));
        assert_eq!(Lsn(5).bytes_since(Lsn(9)), 0);
        assert_eq!(Lsn::MAX.checked_add(1), None);
    }
}
