//! From a WAL record to what it changes.
//!
//! 1. The transaction of the record moves `nextXid`.
//! 2. What the record means beyond the blocks that it names is the business of its resource
//!    manager (`rmgr/*`).
//! 3. Every block reference, of whatever resource manager, becomes a [`Change::Block`].
//!
//! Commit timestamps (`pg_commit_ts`) are not kept, so their records change nothing. Nor do
//! tablespace records: a tablespace is no more than a part of keys.

use bytes::Bytes;

use super::change::{BlockChange, BlockValue, Change, CheckpointChange};
use super::image::{BlockImage, ImageError};
use super::record::{BlockRef, Record, RecordError, rmgr_id};
use super::rmgr;
use crate::base::page::{page_is_new, set_page_lsn};
use crate::base::xid::FIRST_NORMAL_XID;
use crate::base::{BlockNumber, Kind, Lsn, RelTag};

/// Why a record cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The record itself is bad.
    #[error("the WAL record at {lsn} is damaged: {error}")]
    Record {
        /// Start of the record.
        lsn: Lsn,
        /// What is wrong.
        error: RecordError,
    },
    /// What the resource manager wrote is cut or makes no sense.
    #[error(
        "the WAL record at {lsn} (resource manager {rmgr}, info {info:02X}) is malformed: {what}"
    )]
    Body {
        /// Start of the record.
        lsn: Lsn,
        /// `xl_rmid`.
        rmgr: u8,
        /// `xl_info`.
        info: u8,
        /// What is wrong.
        what: &'static str,
    },
    /// PostgreSQL 15 has no such operation.
    #[error(
        "the WAL record at {lsn} (resource manager {rmgr}, info {info:02X}) is of no kind that PostgreSQL 15 writes"
    )]
    Operation {
        /// Start of the record.
        lsn: Lsn,
        /// `xl_rmid`.
        rmgr: u8,
        /// `xl_info`.
        info: u8,
    },
    /// A page image cannot be restored.
    #[error("the WAL record at {lsn} has a bad image of {rel} block {block}: {error}")]
    Image {
        /// Start of the record.
        lsn: Lsn,
        /// The relation fork.
        rel: RelTag,
        /// The block.
        block: BlockNumber,
        /// What is wrong.
        error: ImageError,
    },
}

impl DecodeError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

/// A record that is being decoded: where it stands, and where its changes go.
pub(crate) struct Decoding<'r, 'b> {
    /// Start of the record.
    pub(crate) start: Lsn,
    /// LSN of its changes.
    pub(crate) end: Lsn,
    /// The record.
    pub(crate) record: &'r Record<'b>,
    changes: &'r mut Vec<Change>,
}

impl Decoding<'_, '_> {
    /// Adds a change.
    pub(crate) fn push(&mut self, change: Change) {
        self.changes.push(change);
    }

    /// `nextXid` lies after this transaction, if it is one.
    pub(crate) fn xid_seen(&mut self, xid: u32) {
        if xid >= FIRST_NORMAL_XID {
            self.push(Change::Checkpoint(CheckpointChange::Xid(xid)));
        }
    }

    /// "The body is malformed".
    pub(crate) fn malformed(&self, what: &'static str) -> DecodeError {
        let header = &self.record.header;
        DecodeError::Body { lsn: self.start, rmgr: header.rmgr, info: header.info, what }
    }

    /// "There is no such operation".
    pub(crate) fn unknown(&self) -> DecodeError {
        let header = &self.record.header;
        DecodeError::Operation { lsn: self.start, rmgr: header.rmgr, info: header.info }
    }

    /// The changes of all blocks. `extends(id)` says whether redo creates a block although the
    /// record does not replace the page.
    pub(crate) fn blocks(&mut self, extends: impl Fn(u8) -> bool) {
        for block in &self.record.blocks {
            let will_init = block.replaces_page();
            let value = BlockValue::Record { will_init };
            self.push_block(block, value, will_init || extends(block.id));
        }
    }

    /// A change of a block that is the image in the record, with the LSN of the record as redo
    /// sets it.
    pub(crate) fn image_block(&mut self, block: &BlockRef<'_>) -> Result<(), DecodeError> {
        let Some(image) = block.applied_image() else {
            return Err(self.malformed("a block of a full-page image record has no image"));
        };
        if self.record.blocks.len() == 1 && image.is_whole() {
            self.push_block(block, BlockValue::PageInRecord, true);
            return Ok(());
        }
        let page = restore(image, self.end).map_err(|error| DecodeError::Image {
            lsn: self.start,
            rel: block.rel,
            block: block.block,
            error,
        })?;
        self.push_block(block, BlockValue::Page(page), true);
        Ok(())
    }

    fn push_block(&mut self, block: &BlockRef<'_>, value: BlockValue, extends: bool) {
        let (rel, block) = (block.rel, block.block);
        self.push(Change::Block(BlockChange { rel, block, value, extends }));
    }
}

/// The page of an image, with the LSN of its record.
fn restore(image: &BlockImage<'_>, lsn: Lsn) -> Result<Bytes, ImageError> {
    let mut page = image.restore_bytes()?;
    // A new page has no header yet; an LSN in it would make it look like a damaged one.
    if !page_is_new(&page) {
        set_page_lsn(&mut page, lsn);
    }
    Ok(Bytes::from(page))
}

/// The page of which a record, which ends at `lsn`, was decoded as [`BlockValue::PageInRecord`].
pub fn page_in_record(record: &[u8], lsn: Lsn) -> Option<Bytes> {
    let record = Record::parse(record).ok()?;
    restore(record.blocks.first()?.applied_image()?, lsn).ok()
}

/// Decodes the record that stands at `start..end` and appends its changes to `changes`, in the
/// order in which they are to be carried out, all at the LSN `end`.
///
/// The checksum is not looked at again. After an error `changes` holds a part of the changes.
pub fn decode_into(
    bytes: &[u8],
    start: Lsn,
    end: Lsn,
    changes: &mut Vec<Change>,
) -> Result<(), DecodeError> {
    decode_or_take(bytes, start, end, changes, |_| false)
}

/// As [`decode_into`], unless the record [is plain](is_plain) and `take` takes it; then `changes`
/// stays as it is. The record's checksum was checked.
pub fn decode_or_take(
    bytes: &[u8],
    start: Lsn,
    end: Lsn,
    changes: &mut Vec<Change>,
    take: impl FnOnce(&Record<'_>) -> bool,
) -> Result<(), DecodeError> {
    let mut record = Record::blank();
    record.fill(bytes).map_err(|error| DecodeError::Record { lsn: start, error })?;
    if is_plain(&record) && take(&record) {
        return Ok(());
    }
    decode_record(&record, start, end, changes)
}

/// True for records that mean no more than that their transaction exists and their blocks change,
/// provided that the blocks are there. That is most records; not of all kinds that are so.
fn is_plain(record: &Record<'_>) -> bool {
    match record.header.rmgr {
        rmgr_id::HEAP => rmgr::heap::is_plain_heap(record),
        rmgr_id::HEAP2 => rmgr::heap::is_plain_heap2(record),
        rmgr_id::BTREE => true,
        _ => false,
    }
}

fn decode_record(
    record: &Record<'_>,
    start: Lsn,
    end: Lsn,
    changes: &mut Vec<Change>,
) -> Result<(), DecodeError> {
    let mut decoding = Decoding { start, end, record, changes };
    decoding.xid_seen(record.header.xid);
    match record.header.rmgr {
        rmgr_id::XLOG => rmgr::xlog::decode(&mut decoding),
        rmgr_id::XACT => rmgr::xact::decode(&mut decoding),
        rmgr_id::SMGR => rmgr::smgr::decode(&mut decoding),
        rmgr_id::CLOG => rmgr::clog::decode(&mut decoding),
        rmgr_id::DBASE => rmgr::dbase::decode(&mut decoding),
        rmgr_id::MULTIXACT => rmgr::multixact::decode(&mut decoding),
        rmgr_id::RELMAP => rmgr::relmap::decode(&mut decoding),
        rmgr_id::STANDBY => rmgr::standby::decode(&mut decoding),
        rmgr_id::HEAP2 => rmgr::heap::decode_heap2(&mut decoding),
        rmgr_id::HEAP => rmgr::heap::decode_heap(&mut decoding),
        rmgr_id::REPLORIGIN => rmgr::replorigin::decode(&mut decoding),
        // Everything these do is in their block references.
        _ => {
            decoding.blocks(|_| false);
            Ok(())
        }
    }
}

/// As [`decode_into`], with a list of its own.
pub fn decode(bytes: &Bytes, start: Lsn, end: Lsn) -> Result<Vec<Change>, DecodeError> {
    let mut changes = Vec::new();
    decode_into(bytes, start, end, &mut changes)?;
    Ok(changes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::page::PAGE_SIZE;

    /// An `XLOG_FPI` of pages with a hole of 1,000 bytes.
    fn page_images(count: u8, fill: u8) -> Vec<u8> {
        let (hole_offset, image_len) = (100u16, PAGE_SIZE as u16 - 1000);
        let mut bytes = vec![0; 24];
        bytes[16] = 0xB0;
        for id in 0..count {
            // An image and no data; the image is to be applied and has a hole.
            bytes.extend_from_slice(&[id, 0x10, 0, 0]);
            bytes.extend_from_slice(&image_len.to_le_bytes());
            bytes.extend_from_slice(&hole_offset.to_le_bytes());
            bytes.push(3);
            for field in [1663u32, 5, 16384, u32::from(id)] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        bytes.extend(std::iter::repeat_n(fill, usize::from(count) * usize::from(image_len)));
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    fn values(bytes: &[u8]) -> Vec<BlockValue> {
        let changes = decode(&Bytes::copy_from_slice(bytes), Lsn(64), Lsn(0x1_0000_0080)).unwrap();
        let value = |change| match change {
            Change::Block(block) => block.value,
            other => panic!("{other:?}"),
        };
        changes.into_iter().map(value).collect()
    }

    #[test]
    fn an_only_page_stays_in_its_record_and_is_the_same_page() {
        let (one, two) = (page_images(1, 7), page_images(2, 7));
        assert_eq!(values(&one), [BlockValue::PageInRecord]);
        let page = page_in_record(&one, Lsn(0x1_0000_0080)).unwrap();
        let mut expected = [vec![7; 100], vec![0; 1000], vec![7; PAGE_SIZE - 1100]].concat();
        expected[..8].copy_from_slice(&[1, 0, 0, 0, 0x80, 0, 0, 0]);
        assert_eq!(page, expected);
        assert_eq!(values(&two), [BlockValue::Page(page.clone()), BlockValue::Page(page)]);
        // A page of zeros stays one.
        let page = page_in_record(&page_images(1, 0), Lsn(0x80)).unwrap();
        assert!(page.iter().all(|byte| *byte == 0));
        assert_eq!(page_in_record(&one[..one.len() - 1], Lsn(0x80)), None);
    }
}
