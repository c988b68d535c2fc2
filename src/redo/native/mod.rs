//! Redo of PostgreSQL 15's WAL records without PostgreSQL: page in, record → page out.
//!
//! [`apply`] does to one page what PostgreSQL's redo does to it, byte for byte, what nobody reads
//! included (the hole, padding): the proof compares raw pages (`pgstrata redo compare`). It is a
//! pure function. What it does not know, or what does not fit the page, it refuses
//! ([`NotNative`]); the wal-redo child then applies the record, and has the last word.
//! [`run::NativeRedo`] does that for chains of records.
//!
//! Common rules (`XLogReadBufferForRedoExtended`), before the resource manager's turn:
//!
//! - A page that the record initialises is made anew, whatever was there and whatever its LSN.
//! - A full-page image that is to be applied is the page; its LSN becomes that of the record
//!   unless the page is new.
//! - A page that is still new (`pd_upper` is 0) is left alone.
//! - A page whose LSN is at or after the record's has seen the record and is left alone.
//!
//! Hash and GiST stay with the child altogether (their redo goes on after it has restored an
//! image), of GIN and SP-GiST all but images.

#![forbid(unsafe_code)]

use crate::base::page::{Page, page_is_new, page_lsn, set_page_lsn};
use crate::base::{BlockNumber, Lsn, RelTag};
use crate::wal::record::{BlockRef, Record, rmgr_id};

use super::RedoSettings;
use page::Fit;

mod brin;
mod btree;
mod btree_posting;
mod compact;
mod heap;
mod heap_tuple;
mod heap_vacuum;
mod page;
pub mod run;
mod simple;

#[cfg(test)]
mod tests;

const XLOG_FPI_FOR_HINT: u8 = 0xA0;
const XLOG_FPI: u8 = 0xB0;

/// What a record did to a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Applied {
    /// It was carried out.
    Changed,
    /// It has nothing to do with the page, or the page has it already, or is new.
    Skipped,
}

/// Why a record is left to PostgreSQL.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotNative {
    /// Records of this kind are not replayed here.
    #[error("records of resource manager {rmid} with info {info:02X} are not replayed natively")]
    Unsupported {
        /// `xl_rmid`.
        rmid: u8,
        /// The resource manager's part of `xl_info`.
        info: u8,
    },
    /// The record does not fit the page, or contradicts itself.
    #[error("the record does not fit the page: {0}")]
    Misfit(&'static str),
}

/// Applies the part of a record that concerns `block`, which is one of its references, to that
/// block's page. `lsn` is the position after the record.
///
/// # Errors
/// The page must be thrown away then: it may hold half of the change.
pub fn apply(
    page: &mut Page,
    record: &Record,
    block: &BlockRef,
    lsn: Lsn,
    settings: &RedoSettings,
) -> Result<Applied, NotNative> {
    let info = record.header.operation();
    let rmid = record.header.rmgr;
    let unsupported = Err(NotNative::Unsupported { rmid, info });
    let mut at = Redoing { page, record, block, lsn, settings, applied: Applied::Skipped };
    let done = match rmid {
        rmgr_id::XLOG if info == XLOG_FPI || info == XLOG_FPI_FOR_HINT => at.full_page(info),
        rmgr_id::HEAP => heap::redo(&mut at),
        rmgr_id::HEAP2 => match heap_vacuum::redo(&mut at) {
            Some(done) => done,
            None => return unsupported,
        },
        rmgr_id::BTREE => btree::redo(&mut at),
        rmgr_id::SEQ => simple::sequence(&mut at),
        rmgr_id::BRIN => brin::redo(&mut at),
        rmgr_id::GENERIC => simple::generic(&mut at),
        rmgr_id::GIN | rmgr_id::SPGIST if is_image(block) => at.needs_redo().map(drop),
        _ => return unsupported,
    };
    match done {
        Ok(()) => Ok(at.applied),
        Err(what) => Err(NotNative::Misfit(what)),
    }
}

/// Applies a record to the page of one block; a record that does not name the block changes
/// nothing.
///
/// # Errors
/// As [`apply`].
pub fn apply_to(
    page: &mut Page,
    record: &Record,
    rel: RelTag,
    block: BlockNumber,
    lsn: Lsn,
    settings: &RedoSettings,
) -> Result<Applied, NotNative> {
    let mut named = record.blocks.iter().filter(|found| found.block == block && found.rel == rel);
    match (named.next(), named.next()) {
        (None, _) => Ok(Applied::Skipped),
        (Some(found), None) => apply(page, record, found, lsn, settings),
        (Some(_), Some(_)) => Err(NotNative::Misfit("the record names the block twice")),
    }
}

/// False for records that [`apply`] never takes for this block, whatever the page; a chain need
/// not try them.
pub fn may_apply(record: &Record, block: &BlockRef) -> bool {
    match record.header.rmgr {
        rmgr_id::GIN | rmgr_id::SPGIST => is_image(block),
        rmgr_id::HEAP | rmgr_id::BTREE | rmgr_id::SEQ | rmgr_id::BRIN | rmgr_id::GENERIC => true,
        rmgr_id::HEAP2 => !heap_vacuum::is_foreign(record.header.operation()),
        rmgr_id::XLOG => matches!(record.header.operation(), XLOG_FPI | XLOG_FPI_FOR_HINT),
        _ => false,
    }
}

fn is_image(block: &BlockRef) -> bool {
    block.applied_image().is_some() && !block.will_init
}

/// A record that is being applied to a page.
struct Redoing<'a> {
    page: &'a mut Page,
    record: &'a Record,
    block: &'a BlockRef,
    lsn: Lsn,
    settings: &'a RedoSettings,
    applied: Applied,
}

impl Redoing<'_> {
    /// The common rules for a page that is changed, not made anew. True if the change is still to
    /// be made.
    fn needs_redo(&mut self) -> Fit<bool> {
        if self.block.will_init {
            return Err("the page is to be made anew, but this record cannot do that");
        }
        if let Some(image) = self.block.applied_image() {
            image.restore_into(self.page).map_err(|_| "the page image cannot be restored")?;
            if !page_is_new(&self.page[..]) {
                set_page_lsn(&mut self.page[..], self.lsn);
            }
            self.applied = Applied::Changed;
            return Ok(false);
        }
        if page_is_new(&self.page[..]) || self.lsn <= page_lsn(&self.page[..]) {
            return Ok(false);
        }
        self.applied = Applied::Changed;
        Ok(true)
    }

    /// The common rules for a page that is made anew, by an initialisation that follows.
    fn will_init(&mut self) -> Fit<()> {
        if !self.block.will_init || self.block.applied_image().is_some() {
            return Err("the page is not marked as to be made anew");
        }
        self.applied = Applied::Changed;
        Ok(())
    }

    /// Sets the page LSN to that of the record.
    fn set_lsn(&mut self) {
        set_page_lsn(&mut self.page[..], self.lsn);
    }

    /// The number of another block that the record names.
    fn other_block(&self, id: u8) -> Option<BlockNumber> {
        self.record.block(id).map(|block| block.block)
    }

    /// `XLOG_FPI` and `XLOG_FPI_FOR_HINT`. The latter has no images while `full_page_writes` is
    /// off, and then means nothing.
    fn full_page(&mut self, info: u8) -> Fit<()> {
        if self.block.image.is_none() && info == XLOG_FPI_FOR_HINT {
            return Ok(());
        }
        match self.block.applied_image() {
            Some(_) => self.needs_redo().map(drop),
            None => Err("a full-page image record has no image"),
        }
    }
}
