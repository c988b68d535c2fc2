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

use bytes::Bytes;

use crate::base::page::{Page, page_is_new, page_lsn, set_page_lsn};
use crate::base::{BlockNumber, Lsn, RelTag};
use crate::wal::image::BlockImage;
use crate::wal::record::{BlockRef, Record, rmgr_id};

use super::RedoSettings;
use page::Fit;
use view::{Found, View};

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
mod view;

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
    record: &Record<'_>,
    block: &BlockRef<'_>,
    lsn: Lsn,
    settings: &RedoSettings,
) -> Result<Applied, NotNative> {
    apply_view(page, &View::of(record, block), lsn, settings)
}

/// Applies a record, as it stands in the WAL, to the page of one block. A record that does not
/// name the block changes nothing. The checksum is not looked at.
///
/// A record that carries an image of the page for comparison (`wal_consistency_checking`) is not
/// supported here: the child compares, masked as PostgreSQL masks.
///
/// # Errors
/// As [`apply`].
pub fn apply_bytes(
    page: &mut Page,
    bytes: &Bytes,
    target: (RelTag, BlockNumber),
    lsn: Lsn,
    settings: &RedoSettings,
) -> Result<Applied, NotNative> {
    match view::find(bytes, target.0, target.1) {
        Found::View(view) => return apply_view(page, &view, lsn, settings),
        Found::Absent => return Ok(Applied::Skipped),
        Found::Other => {}
    }
    let record = Record::parse(bytes).map_err(|_| NotNative::Misfit("the record is malformed"))?;
    let is_target = |found: &&BlockRef<'_>| found.block == target.1 && found.rel == target.0;
    let mut named = record.blocks.iter().filter(is_target);
    match (named.next(), named.next()) {
        (None, _) => Ok(Applied::Skipped),
        (Some(found), None) if found.image.as_ref().is_none_or(BlockImage::apply) => {
            apply(page, &record, found, lsn, settings)
        }
        (Some(found), None) => Err(unsupported(&View::of(&record, found))),
        (Some(_), Some(_)) => Err(NotNative::Misfit("the record names the block twice")),
    }
}

/// True for records that [`apply_bytes`] never applies to this block, whatever the page: a row of
/// them need not be tried one by one.
pub fn is_foreign(bytes: &Bytes, target: (RelTag, BlockNumber)) -> bool {
    match view::find(bytes, target.0, target.1) {
        Found::View(view) => return manager(&view).is_none(),
        Found::Absent => return false,
        Found::Other => {}
    }
    let Ok(record) = Record::parse(bytes) else { return true };
    let mut blocks = record.blocks.iter();
    blocks.find(|found| found.block == target.1 && found.rel == target.0).is_some_and(|found| {
        found.image.as_ref().is_some_and(|image| !image.apply())
            || manager(&View::of(&record, found)).is_none()
    })
}

fn unsupported(view: &View<'_>) -> NotNative {
    NotNative::Unsupported { rmid: view.rmgr, info: view.operation() }
}

fn apply_view(
    page: &mut Page,
    view: &View<'_>,
    lsn: Lsn,
    settings: &RedoSettings,
) -> Result<Applied, NotNative> {
    let redo = manager(view).ok_or_else(|| unsupported(view))?;
    let mut at = Redoing { page, view, lsn, settings, applied: Applied::Skipped };
    match redo(&mut at) {
        Ok(()) => Ok(at.applied),
        Err(what) => Err(NotNative::Misfit(what)),
    }
}

/// Redo of one resource manager.
type Manager = fn(&mut Redoing<'_>) -> Fit<()>;

/// Who applies a record to this block; `None` if the child is to do it.
fn manager(view: &View<'_>) -> Option<Manager> {
    let is_image = || view.applied_image().is_some() && !view.will_init;
    Some(match view.rmgr {
        rmgr_id::HEAP => heap::redo,
        rmgr_id::HEAP2 if heap_vacuum::is_known(view.operation()) => heap_vacuum::redo,
        rmgr_id::BTREE => btree::redo,
        rmgr_id::SEQ => simple::sequence,
        rmgr_id::BRIN => brin::redo,
        rmgr_id::GENERIC => simple::generic,
        rmgr_id::XLOG if matches!(view.operation(), XLOG_FPI | XLOG_FPI_FOR_HINT) => full_page,
        rmgr_id::GIN | rmgr_id::SPGIST if is_image() => image_only,
        _ => return None,
    })
}

/// `XLOG_FPI` and `XLOG_FPI_FOR_HINT`. The latter has no images while `full_page_writes` is off,
/// and then means nothing.
fn full_page(at: &mut Redoing<'_>) -> Fit<()> {
    if at.view.image.is_none() && at.view.operation() == XLOG_FPI_FOR_HINT {
        return Ok(());
    }
    match at.view.applied_image() {
        Some(_) => image_only(at),
        None => Err("a full-page image record has no image"),
    }
}

/// A block whose image is all that redo looks at.
fn image_only(at: &mut Redoing<'_>) -> Fit<()> {
    at.needs_redo().map(drop)
}

/// A record that is being applied to a page.
struct Redoing<'a> {
    page: &'a mut Page,
    view: &'a View<'a>,
    lsn: Lsn,
    settings: &'a RedoSettings,
    applied: Applied,
}

impl Redoing<'_> {
    /// The common rules for a page that is changed, not made anew. True if the change is still to
    /// be made.
    fn needs_redo(&mut self) -> Fit<bool> {
        if self.view.will_init {
            return Err("the page is to be made anew, but this record cannot do that");
        }
        if let Some(image) = self.view.applied_image() {
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
        if !self.view.will_init || self.view.applied_image().is_some() {
            return Err("the page is not marked as to be made anew");
        }
        self.applied = Applied::Changed;
        Ok(())
    }

    /// Sets the page LSN to that of the record.
    fn set_lsn(&mut self) {
        set_page_lsn(&mut self.page[..], self.lsn);
    }

    /// Redo does not need the page as it was.
    fn replaces_page(&self) -> bool {
        self.view.will_init || self.view.applied_image().is_some()
    }
}
