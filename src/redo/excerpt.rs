//! What redo of one page needs of a record that changes several: a shorter record.
//!
//! In memory the pages that a record changes share its bytes; in a layer file each of them has a
//! record of its own. [`excerpt`] makes that record for one page: the same header, the same main
//! data, the same block references, but of the *other* blocks neither images nor data, as far as
//! redo gets along without. It is a WAL record like any other, with its own length and checksum,
//! so no reader has to know. [`stored_form`] is what a checkpoint asks for. Pure.
//!
//! The result must be the same, byte for byte, by native redo and by the wal-redo process.
//!
//! - Native redo looks at one block: main data, numbers of the other blocks, its own data and
//!   image ([`super::native`]). It needs nothing of what is left out.
//! - PostgreSQL's redo goes over all blocks. In the wal-redo process every other block is a page
//!   that is newer than any record (`pgxn/neon_walredo/pages.c`), so
//!   `XLogReadBufferForRedoExtended` answers `BLK_DONE` for it, or `BLK_RESTORED` if it has an image
//!   that is to be applied, and the routines of the list below read data of a block only after
//!   `BLK_NEEDS_REDO`. Without image and data the answer is `BLK_DONE`. Nobody looks at what becomes
//!   of such a page, and no routine of the list carries anything from one page to another but the
//!   number of its block.
//! - Blocks that the record *initialises* are made anew, whatever their page is, and redo reads
//!   their data then. They keep it, but for two routines that are known to put up with none.
//!
//! The list is [`others`]: what it does not name stays whole. `pgstrata redo compare` makes every
//! page version from both forms, both ways, and compares raw bytes.

use bytes::Bytes;

use crate::base::{BlockNumber, Key, KeyKind, RelTag, Value};
use crate::wal::image::BlockImage;
use crate::wal::record::{BlockRef, Record, check_crc, rmgr_id};

/// A page split of a GiST index without tuples: i32 number of tuples.
const NO_TUPLES: [u8; 4] = [0; 4];

/// What a kind of record must keep of the blocks that it is not wanted for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Others {
    /// The data of blocks that are initialised; of any other, its number.
    Plain,
    /// Nothing but numbers: a page that is initialised takes any number of items, none too
    /// (`_bt_restore_page`).
    NoItems,
    /// As before, but the number of tuples is part of the data (`decodePageSplitRecord`).
    NoTuples,
    /// Redo insists on images: `BLK_RESTORED` or an error. A blank page will do.
    Blank,
}

/// The allow-list, by `xl_rmid` and `xl_info`. It has all operations of PostgreSQL 15 that change
/// several pages, but those that have nothing to leave out (`XLOG_FPI`, whose blocks are stored as
/// pages; `XLOG_GIN_DELETE_LISTPAGE`, which has no data), and was made by reading their redo
/// routines:
///
/// | routine | operations, and what to look at |
/// |---|---|
/// | `heap_xlog_update` | the new page's data is read if that page needs redo or is initialised; the old tuple is read only where both versions are on one page |
/// | `heap_xlog_visible` | an image of the heap page changes only what is noted as its free space |
/// | `btree_redo` | insertions above the leaves, splits, page deletion, new root: each page for itself; meta pages are initialised and keep their data |
/// | `brin_redo` | the map's entry takes the number of the tuple's page, not its content |
/// | `ginRedoInsert`, `…DeletePage`, `…UpdateMetapage` | each page for itself; the pending list's tuples are the tail page's data |
/// | `ginRedoSplit` | all pages are images, and must be |
/// | `gistRedoPageUpdateRecord`, `…PageDelete`, `…PageSplitRecord` | each page for itself; the child's image only decides whether the child is marked |
/// | `hash_redo` | each page for itself; some are only locked |
/// | `spg_redo` | all is in the main data, so only images go |
/// | `generic_redo` | each page for itself |
fn others(rmgr: u8, info: u8) -> Option<Others> {
    Some(match (rmgr, info & 0xF0) {
        // XLOG_HEAP_UPDATE, with and without XLOG_HEAP_INIT_PAGE. A hot update has one page.
        (rmgr_id::HEAP, 0x20 | 0xA0) => Others::Plain,
        // XLOG_HEAP2_VISIBLE
        (rmgr_id::HEAP2, 0x40) => Others::Plain,
        // INSERT_UPPER, INSERT_META, UNLINK_PAGE, UNLINK_PAGE_META, NEWROOT, MARK_PAGE_HALFDEAD
        (rmgr_id::BTREE, 0x10 | 0x20 | 0x80 | 0x90 | 0xA0 | 0xB0) => Others::Plain,
        // SPLIT_L, SPLIT_R
        (rmgr_id::BTREE, 0x30 | 0x40) => Others::NoItems,
        // INSERT and UPDATE, with and without XLOG_BRIN_INIT_PAGE, REVMAP_EXTEND, DESUMMARIZE
        (rmgr_id::BRIN, 0x10 | 0x20 | 0x40 | 0x50 | 0x90 | 0xA0) => Others::Plain,
        // INSERT, DELETE_PAGE, UPDATE_META_PAGE
        (rmgr_id::GIN, 0x20 | 0x50 | 0x60) => Others::Plain,
        // SPLIT
        (rmgr_id::GIN, 0x30) => Others::Blank,
        // PAGE_UPDATE, PAGE_DELETE
        (rmgr_id::GIST, 0x00 | 0x60) => Others::Plain,
        // PAGE_SPLIT
        (rmgr_id::GIST, 0x30) => Others::NoTuples,
        // INIT_BITMAP_PAGE, INSERT, ADD_OVFL_PAGE, SPLIT_ALLOCATE_PAGE, SPLIT_COMPLETE,
        // MOVE_PAGE_CONTENTS, SQUEEZE_PAGE, DELETE, VACUUM_ONE_PAGE
        (rmgr_id::HASH, 0x10 | 0x20 | 0x30 | 0x40 | 0x60 | 0x70 | 0x80 | 0x90 | 0xC0) => {
            Others::Plain
        }
        // ADD_LEAF, MOVE_LEAFS, ADD_NODE, SPLIT_TUPLE, PICKSPLIT
        (rmgr_id::SPGIST, 0x10 | 0x20 | 0x30 | 0x40 | 0x50) => Others::Plain,
        (rmgr_id::GENERIC, 0x00) => Others::Plain,
        _ => return None,
    })
}

impl Others {
    /// Takes out of a block what redo of another does not need. `None` for a block as PostgreSQL
    /// does not write it: initialised and with an image that is to be applied.
    fn reduce(self, block: &mut BlockRef<'_>) -> Option<()> {
        let restores = block.applied_image().is_some();
        block.image = None;
        if !block.will_init {
            block.data = &[];
            if self == Others::Blank && restores {
                block.image = Some(BlockImage::blank());
            }
            return Some(());
        }
        match self {
            Others::Plain | Others::Blank => {}
            Others::NoItems => block.data = &[],
            Others::NoTuples if block.data.len() > NO_TUPLES.len() => block.data = &NO_TUPLES,
            Others::NoTuples => {}
        }
        (!restores).then_some(())
    }
}

/// The record that does to this block what `record` does, if there is a shorter one; `None` if not,
/// or if that is not known.
///
/// The checksum of `record` is looked at first: the excerpt gets a checksum of its own, and damage
/// must not get a good one with it.
pub fn excerpt(record: &[u8], rel: RelTag, block: BlockNumber) -> Option<Bytes> {
    let (info, rmgr) = (*record.get(16)?, *record.get(17)?);
    let others = others(rmgr, info)?;
    let mut parsed = Record::parse(record).ok()?;
    let is_wanted = |found: &BlockRef<'_>| found.rel == rel && found.block == block;
    if parsed.blocks.iter().filter(|found| is_wanted(found)).count() != 1 {
        return None;
    }
    let has_more = |found: &BlockRef<'_>| !found.data.is_empty() || found.image.is_some();
    if !parsed.blocks.iter().any(|found| !is_wanted(found) && has_more(found)) {
        return None;
    }
    check_crc(record).ok()?;
    for other in parsed.blocks.iter_mut().filter(|found| !is_wanted(found)) {
        others.reduce(other)?;
    }
    let short = parsed.encode()?;
    (short.len() < record.len()).then(|| short.into())
}

/// A value of `key` as a layer file keeps it: an [`excerpt`] of a record, everything else as it is.
pub fn stored_form(key: Key, value: Value) -> Value {
    let (Value::WalRecord { will_init, record }, KeyKind::RelBlock(rel, block)) =
        (&value, key.kind())
    else {
        return value;
    };
    match excerpt(record, rel, block) {
        Some(record) => Value::WalRecord { will_init: *will_init, record },
        None => value,
    }
}

#[cfg(test)]
mod tests;
