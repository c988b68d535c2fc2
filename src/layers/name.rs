//! Names of layer files.
//!
//! ```text
//! <key start>-<key end>__<lsn start>-<lsn end>-v1     delta layer
//! <key start>-<key end>__<lsn>-v1                     image layer
//! ```
//!
//! Keys are 36 and LSNs 16 upper-case hexadecimal digits; both ranges are half-open. `v1` is the
//! format version of the file. So a directory listing is in key order, and everything that a layer
//! map needs stands in the names. Only the exact printed form is read back: one layer, one name.

use std::fmt;
use std::str::FromStr;

use crate::base::key::KEY_SIZE;
use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::layers::format::VERSION;

/// Name of a layer file, and thereby what the file covers.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum LayerName {
    /// All versions of a key range within an LSN range.
    Delta {
        /// The key range, half-open.
        keys: KeyRange,
        /// The LSN range, half-open.
        lsns: LsnRange,
    },
    /// Every key of a key range at one LSN.
    Image {
        /// The key range, half-open.
        keys: KeyRange,
        /// The LSN; changes at this LSN are included.
        lsn: Lsn,
    },
}

/// Why a text is no name of a layer file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no name of a layer file: {problem}")]
pub struct LayerNameError {
    /// The text that was given.
    pub text: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

impl LayerName {
    /// The key range, half-open.
    pub fn keys(&self) -> &KeyRange {
        match self {
            LayerName::Delta { keys, .. } | LayerName::Image { keys, .. } => keys,
        }
    }

    /// The LSN range, half-open; of an image layer its LSN alone.
    pub fn lsns(&self) -> LsnRange {
        match self {
            LayerName::Delta { lsns, .. } => lsns.clone(),
            LayerName::Image { lsn, .. } => *lsn..Lsn(lsn.0.saturating_add(1)),
        }
    }

    /// True for a delta layer.
    pub fn is_delta(&self) -> bool {
        matches!(self, LayerName::Delta { .. })
    }

    /// True for an image layer.
    pub fn is_image(&self) -> bool {
        matches!(self, LayerName::Image { .. })
    }

    /// Checks what every name obeys: ranges are not empty, LSNs below [`Lsn::MAX`].
    pub fn check(&self) -> Result<(), &'static str> {
        if self.keys().start >= self.keys().end {
            return Err("the key range is empty");
        }
        match self {
            LayerName::Delta { lsns, .. } if lsns.start >= lsns.end => {
                Err("the LSN range is empty")
            }
            LayerName::Image { lsn, .. } if *lsn == Lsn::MAX => Err("the LSN is out of range"),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}__", self.keys().start, self.keys().end)?;
        match self {
            LayerName::Delta { lsns, .. } => {
                write!(f, "{:016X}-{:016X}-v{VERSION}", lsns.start.0, lsns.end.0)
            }
            LayerName::Image { lsn, .. } => write!(f, "{:016X}-v{VERSION}", lsn.0),
        }
    }
}

impl FromStr for LayerName {
    type Err = LayerNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|problem| LayerNameError { text: text.to_owned(), problem })
    }
}

fn parse(text: &str) -> Result<LayerName, &'static str> {
    const SHAPE: &str = "write <36 hex>-<36 hex>__<16 hex>[-<16 hex>]-v<number>";
    let (keys, rest) = text.split_once("__").ok_or(SHAPE)?;
    let (start, end) = keys.split_once('-').ok_or(SHAPE)?;
    let keys = parse_key(start)?..parse_key(end)?;
    let (lsns, version) = rest.rsplit_once("-v").ok_or("it ends without a format version")?;
    if version != VERSION.to_string() {
        return Err("its format version is not known");
    }
    let name = match lsns.split_once('-') {
        None => LayerName::Image { keys, lsn: parse_lsn(lsns)? },
        Some((start, end)) => LayerName::Delta { keys, lsns: parse_lsn(start)?..parse_lsn(end)? },
    };
    name.check()?;
    Ok(name)
}

/// True for `len` upper-case hexadecimal digits.
fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'A'..=b'F'))
}

fn parse_key(text: &str) -> Result<Key, &'static str> {
    const WRONG: &str = "a key is 36 upper-case hexadecimal digits";
    let mut bytes = [0; KEY_SIZE];
    if !is_hex(text, 2 * KEY_SIZE) {
        return Err(WRONG);
    }
    hex::decode_to_slice(text, &mut bytes).map_err(|_| WRONG)?;
    Ok(Key::from_bytes(&bytes))
}

fn parse_lsn(text: &str) -> Result<Lsn, &'static str> {
    const WRONG: &str = "an LSN is 16 upper-case hexadecimal digits";
    if !is_hex(text, 16) {
        return Err(WRONG);
    }
    u64::from_str_radix(text, 16).map(Lsn).map_err(|_| WRONG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: u32) -> Key {
        Key { field6: n, field4: 16384, field3: 5, field2: 1663, ..Key::MIN }
    }

    #[test]
    fn names_look_as_documented() {
        let delta =
            LayerName::Delta { keys: Key::MIN..Key::MAX, lsns: Lsn(0x16B3748)..Lsn(1 << 40) };
        assert_eq!(
            delta.to_string(),
            "000000000000000000000000000000000000-FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF\
             __00000000016B3748-0000010000000000-v1"
        );
        let image = LayerName::Image { keys: key(0)..key(7), lsn: Lsn(0x16B3748) };
        assert_eq!(
            image.to_string(),
            "000000067F00000005000040000000000000-000000067F00000005000040000000000007\
             __00000000016B3748-v1"
        );
        assert_eq!(image.lsns(), Lsn(0x16B3748)..Lsn(0x16B3749));
    }

    #[test]
    fn every_change_of_a_name_is_refused_or_is_another_name() {
        let names = [
            LayerName::Delta { keys: key(1)..key(9), lsns: Lsn(0x10)..Lsn(0x20) },
            LayerName::Image { keys: key(1)..key(9), lsn: Lsn(0x20) },
        ];
        for name in names {
            let text = name.to_string();
            for at in 0..text.len() {
                assert!(text[..at].parse::<LayerName>().is_err(), "{} was taken", &text[..at]);
                for other in ["", "0", "a", "F", "-", "_", "v", "+", "é"] {
                    let changed = format!("{}{other}{}", &text[..at], &text[at + 1..]);
                    if let Ok(read) = changed.parse::<LayerName>() {
                        assert_eq!(read.to_string(), changed);
                        assert_eq!(read == name, changed == text);
                    }
                }
            }
        }
    }

    #[test]
    fn empty_ranges_and_other_versions_are_refused() {
        let text = LayerName::Delta { keys: key(1)..key(9), lsns: Lsn(1)..Lsn(2) }.to_string();
        assert!(text.replace("-v1", "-v2").parse::<LayerName>().is_err());
        assert!(text.replace("-v1", "").parse::<LayerName>().is_err());
        let empty = LayerName::Delta { keys: key(1)..key(1), lsns: Lsn(1)..Lsn(2) };
        assert!(empty.to_string().parse::<LayerName>().is_err());
        let empty = LayerName::Delta { keys: key(1)..key(2), lsns: Lsn(2)..Lsn(2) };
        assert!(empty.to_string().parse::<LayerName>().is_err());
        let last = LayerName::Image { keys: key(1)..key(2), lsn: Lsn::MAX };
        assert!(last.to_string().parse::<LayerName>().is_err());
    }

    proptest! {
        #[test]
        fn round_trip(a: [u8; KEY_SIZE], b: [u8; KEY_SIZE], c in 0..u64::MAX, d in 0..u64::MAX) {
            prop_assume!(a != b && c != d);
            let keys = Key::from_bytes(&a.min(b))..Key::from_bytes(&a.max(b));
            let delta = LayerName::Delta { keys: keys.clone(), lsns: Lsn(c.min(d))..Lsn(c.max(d)) };
            prop_assert_eq!(delta.to_string().parse(), Ok(delta));
            let image = LayerName::Image { keys, lsn: Lsn(c) };
            prop_assert_eq!(image.to_string().parse(), Ok(image));
        }
    }
}
