//! What is stored under a key at an LSN.
//!
//! Written form (little-endian): one byte for the kind, then the body; the length comes from
//! outside.
//!
//! | kind | value | body |
//! |---|---|---|
//! | 0 | [`Value::Image`] | the bytes |
//! | 1 | [`Value::ZeroPage`] | none |
//! | 2 | [`Value::WalRecord`], needs a base | the WAL record, or an excerpt |
//! | 3 | [`Value::WalRecord`], initialises the page | the same |
//! | 4 | [`SmallRecord::VmClear`] | u8 flags, u32 heap block, u32 heap block |
//! | 5 | [`SmallRecord::VmTruncate`] | u32 byte of the map, u8 heap blocks kept in that byte |
//! | 6 | [`SmallRecord::ClogSet`] | u8 status, i64 timestamp, u32 xid … |
//! | 7 | [`SmallRecord::MultiXactOffset`] | u32 multixact, u32 offset, and u32 next offset if there is one |
//! | 8 | [`SmallRecord::MultiXactMembers`] | u32 first offset, (u32 xid, u32 status) … |

use bytes::{BufMut, Bytes, BytesMut};

/// "No heap block" in the written form of [`SmallRecord::VmClear`] (`InvalidBlockNumber`).
const NO_BLOCK: u32 = u32::MAX;

/// A version of what a key names.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// The whole content: 8,192 bytes for a page, any length for metadata.
    Image(Bytes),
    /// A page of zeros, as relation extension leaves it.
    ZeroPage,
    /// A WAL record to be applied to the older content: as it stands in the WAL, or, in a layer
    /// file, an excerpt for this page of one that changes several (`src/redo/excerpt.rs`).
    WalRecord {
        /// The record does not need the older content (`WILL_INIT`, or a full-page image).
        will_init: bool,
        /// `XLogRecord` header and body, `xl_tot_len` bytes; the checksum fits.
        record: Bytes,
    },
    /// A change that WAL implies without naming the block.
    Small(SmallRecord),
}

/// Changes that WAL implies without naming the block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SmallRecord {
    /// Clears visibility-map bits (`visibilitymap_clear`). The page LSN stays.
    VmClear {
        /// Bits to clear: 1 all-visible, 2 all-frozen.
        flags: u8,
        /// Heap blocks whose bits are cleared; both are covered by the page it is stored under.
        heap_blocks: [Option<u32>; 2],
    },
    /// Clears the tail of a visibility-map page (`visibilitymap_prepare_truncate`). The page LSN
    /// stays.
    VmTruncate {
        /// First byte of the map (after the page header) that is cleared, wholly or in part.
        map_byte: u32,
        /// Heap blocks (0..4) of that byte whose bits stay.
        blocks_kept: u8,
    },
    /// Sets the status of transactions in a `pg_xact` page.
    ClogSet {
        /// `TRANSACTION_STATUS_*`: 1 committed, 2 aborted, 3 sub-committed.
        status: u8,
        /// Time of commit or abort, microseconds since 2000-01-01 UTC.
        timestamp: i64,
        /// The transactions; all on the page it is stored under.
        xids: Vec<u32>,
    },
    /// Sets one entry of a `pg_multixact/offsets` page, or two neighbours.
    MultiXactOffset {
        /// The multixact.
        multi: u32,
        /// Offset of its first member.
        offset: u32,
        /// Offset of the first member of `multi + 1`, where its entry is set by the same record
        /// and stands on the same page.
        next_offset: Option<u32>,
    },
    /// Sets consecutive entries of a `pg_multixact/members` page.
    MultiXactMembers {
        /// Offset of the first of them.
        first_offset: u32,
        /// Transaction and `MultiXactStatus` of each; all on the page it is stored under.
        members: Vec<(u32, u32)>,
    },
}

/// Why bytes are no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a stored value of kind {kind} with {len} bytes of body is malformed")]
pub struct ValueError {
    /// The kind byte; 255 when even that is missing.
    pub kind: u8,
    /// Length of the body in bytes.
    pub len: usize,
}

impl Value {
    /// True when no older content is needed: reading may stop here.
    pub fn is_base(&self) -> bool {
        match self {
            Value::Image(_) | Value::ZeroPage => true,
            Value::WalRecord { will_init, .. } => *will_init,
            Value::Small(_) => false,
        }
    }

    /// Length of the written form in bytes.
    pub fn encoded_len(&self) -> usize {
        1 + match self {
            Value::Image(bytes) => bytes.len(),
            Value::ZeroPage => 0,
            Value::WalRecord { record, .. } => record.len(),
            Value::Small(small) => match small {
                SmallRecord::VmClear { .. } => 9,
                SmallRecord::VmTruncate { .. } => 5,
                SmallRecord::ClogSet { xids, .. } => 9 + 4 * xids.len(),
                SmallRecord::MultiXactOffset { next_offset, .. } => {
                    8 + 4 * usize::from(next_offset.is_some())
                }
                SmallRecord::MultiXactMembers { members, .. } => 4 + 8 * members.len(),
            },
        }
    }

    /// Appends the written form.
    pub fn encode(&self, out: &mut BytesMut) {
        match self {
            Value::Image(bytes) => {
                out.put_u8(0);
                out.put_slice(bytes);
            }
            Value::ZeroPage => out.put_u8(1),
            Value::WalRecord { will_init, record } => {
                out.put_u8(2 + u8::from(*will_init));
                out.put_slice(record);
            }
            Value::Small(small) => small.encode(out),
        }
    }

    /// Reads the written form; `bytes` must hold exactly one value.
    pub fn decode(bytes: &Bytes) -> Result<Value, ValueError> {
        let Some(&kind) = bytes.first() else {
            return Err(ValueError { kind: u8::MAX, len: 0 });
        };
        let body = bytes.slice(1..);
        let error = ValueError { kind, len: body.len() };
        match kind {
            0 => Ok(Value::Image(body)),
            1 if body.is_empty() => Ok(Value::ZeroPage),
            2 | 3 => Ok(Value::WalRecord { will_init: kind == 3, record: body }),
            4..=8 => SmallRecord::decode(kind, &body).map(Value::Small).ok_or(error),
            _ => Err(error),
        }
    }
}

impl SmallRecord {
    fn encode(&self, out: &mut BytesMut) {
        match self {
            SmallRecord::VmClear { flags, heap_blocks } => {
                out.put_u8(4);
                out.put_u8(*flags);
                for block in heap_blocks {
                    out.put_u32_le(block.unwrap_or(NO_BLOCK));
                }
            }
            SmallRecord::VmTruncate { map_byte, blocks_kept } => {
                out.put_u8(5);
                out.put_u32_le(*map_byte);
                out.put_u8(*blocks_kept);
            }
            SmallRecord::ClogSet { status, timestamp, xids } => {
                out.put_u8(6);
                out.put_u8(*status);
                out.put_i64_le(*timestamp);
                xids.iter().for_each(|xid| out.put_u32_le(*xid));
            }
            SmallRecord::MultiXactOffset { multi, offset, next_offset } => {
                out.put_u8(7);
                out.put_u32_le(*multi);
                out.put_u32_le(*offset);
                if let Some(next_offset) = next_offset {
                    out.put_u32_le(*next_offset);
                }
            }
            SmallRecord::MultiXactMembers { first_offset, members } => {
                out.put_u8(8);
                out.put_u32_le(*first_offset);
                for (xid, status) in members {
                    out.put_u32_le(*xid);
                    out.put_u32_le(*status);
                }
            }
        }
    }

    fn decode(kind: u8, body: &[u8]) -> Option<SmallRecord> {
        let mut rest = Reader(body);
        let small = match kind {
            4 => {
                let flags = rest.u8()?;
                let block = |raw: u32| (raw != NO_BLOCK).then_some(raw);
                SmallRecord::VmClear {
                    flags,
                    heap_blocks: [block(rest.u32()?), block(rest.u32()?)],
                }
            }
            5 => SmallRecord::VmTruncate { map_byte: rest.u32()?, blocks_kept: rest.u8()? },
            6 => {
                let status = rest.u8()?;
                let timestamp = (u64::from(rest.u32()?) | u64::from(rest.u32()?) << 32) as i64;
                let mut xids = Vec::with_capacity(rest.0.len() / 4);
                while !rest.0.is_empty() {
                    xids.push(rest.u32()?);
                }
                SmallRecord::ClogSet { status, timestamp, xids }
            }
            7 => SmallRecord::MultiXactOffset {
                multi: rest.u32()?,
                offset: rest.u32()?,
                next_offset: if rest.0.is_empty() { None } else { Some(rest.u32()?) },
            },
            8 => {
                let first_offset = rest.u32()?;
                let mut members = Vec::with_capacity(rest.0.len() / 8);
                while !rest.0.is_empty() {
                    members.push((rest.u32()?, rest.u32()?));
                }
                SmallRecord::MultiXactMembers { first_offset, members }
            }
            _ => return None,
        };
        rest.0.is_empty().then_some(small)
    }
}

/// Takes little-endian numbers off the front of a slice.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn u8(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        let (first, rest) = self.0.split_first_chunk::<4>()?;
        self.0 = rest;
        Some(u32::from_le_bytes(*first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Value> {
        vec![
            Value::Image(Bytes::from_static(b"page")),
            Value::Image(Bytes::new()),
            Value::ZeroPage,
            Value::WalRecord { will_init: true, record: Bytes::from_static(b"record") },
            Value::WalRecord { will_init: false, record: Bytes::from_static(b"record") },
            Value::Small(SmallRecord::VmClear { flags: 3, heap_blocks: [Some(7), None] }),
            Value::Small(SmallRecord::VmTruncate { map_byte: 77, blocks_kept: 3 }),
            Value::Small(SmallRecord::ClogSet { status: 1, timestamp: -5, xids: vec![3, 9] }),
            Value::Small(SmallRecord::MultiXactOffset { multi: 4, offset: 9, next_offset: None }),
            Value::Small(SmallRecord::MultiXactOffset {
                multi: 4,
                offset: 9,
                next_offset: Some(11),
            }),
            Value::Small(SmallRecord::MultiXactMembers {
                first_offset: 12,
                members: vec![(700, 1), (701, 5)],
            }),
        ]
    }

    #[test]
    fn round_trip_and_length() {
        for value in samples() {
            let mut out = BytesMut::new();
            value.encode(&mut out);
            assert_eq!(out.len(), value.encoded_len(), "{value:?}");
            assert_eq!(Value::decode(&out.freeze()), Ok(value));
        }
    }

    #[test]
    fn cut_and_unknown_values_are_refused() {
        for value in samples().into_iter().filter(|value| matches!(value, Value::Small(_))) {
            let mut out = BytesMut::new();
            value.encode(&mut out);
            let cut = out.freeze();
            let cut = cut.slice(..cut.len() - 1);
            assert!(Value::decode(&cut).is_err(), "{value:?} was read from a cut form");
        }
        assert!(Value::decode(&Bytes::new()).is_err());
        assert!(Value::decode(&Bytes::from_static(&[1, 0])).is_err());
        assert!(Value::decode(&Bytes::from_static(&[99])).is_err());
    }
}
