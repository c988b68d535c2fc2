//! Layers: where the versions of values are kept, in memory and in files.
//!
//! | layer | holds | module |
//! |---|---|---|
//! | open | values since the last checkpoint, in memory, growing | [`open`] |
//! | frozen | the same, closed: a delta file is being made of it | [`frozen`] |
//! | delta | all versions of one key range within one LSN range, in a file | [`delta`] |
//! | image | every key of one key range at one LSN, in a file | [`image`] |
//!
//! A read descends from the newest layer to the oldest. In each it calls `collect`, which appends
//! versions newest first, until a layer answers [`Lookup::Complete`] (a base was found) or
//! [`Lookup::Absent`] (an image layer covers the key and does not have it).
//!
//! LSN ranges are half-open. A delta layer `start..end` holds the values with
//! `start <= lsn < end`. An image layer at LSN `l` is the state after every change with
//! `lsn <= l`; it answers reads at `l` and above.
//!
//! Layer files are immutable: written once by [`DeltaWriter`] or [`ImageWriter`], published by a
//! rename after a sync, and then only read. Their form is described by the byte tables in
//! [`format`] and [`index`], with the reasons in `docs/file-format.md`.
//!
//! Invariants: a value that a reader returns was read under a valid checksum that was found
//! through the footer of that very file; a damaged byte leads to an error that names file and
//! offset, or lies where no reader looks, and then [`verify`] reports it.

pub mod block_cache;
pub mod delta;
pub mod dump;
pub mod error;
pub mod filter;
pub mod format;
pub mod frozen;
#[doc(hidden)]
pub mod fuzzing;
pub mod image;
pub mod index;
pub mod merge;
pub mod name;
pub mod open;
pub mod verify;

mod file;
mod packer;
mod places;
mod rows;
mod writer;

#[cfg(test)]
mod tests;

pub use block_cache::{BlockCache, BlockCacheStats};
pub use delta::{DeltaLayer, DeltaWriter};
pub use error::{Damage, LayerError};
pub use file::FileLayer;
pub use frozen::FrozenLayer;
pub use image::{ImageLayer, ImageWriter};
pub use merge::{DeltaMerge, ImageCursor, InputLayer, MergeEntry};
pub use name::{LayerName, LayerNameError};
pub use open::OpenLayer;
pub use verify::{Verified, verify};

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::base::{Key, Lsn, TenantShardId, TimelineId, Value};

/// Whose data a layer file holds. Stored in the file, so that a file that strays into another
/// directory is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerOwner {
    /// The tenant shard.
    pub shard: TenantShardId,
    /// The timeline that wrote the layer.
    pub timeline: TimelineId,
}

/// A layer file that was written and published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerDesc {
    /// Name of the file; tells key range and LSN range.
    pub name: LayerName,
    /// Length of the file in bytes.
    pub file_bytes: u64,
    /// Number of values in it.
    pub value_count: u64,
    /// CRC-32C of its footer; it covers, by way of the index, the whole file.
    pub footer_crc: u32,
}

/// What a layer says about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Older layers must be searched too.
    Continue,
    /// A base (`value.is_base()`) was found; it is the last value that was appended.
    Complete,
    /// An image layer covers the key and has no value for it: the key does not exist at the
    /// LSN of the image, and older layers need not be searched.
    Absent,
}

/// Versions of one value, each with its LSN, newest first.
pub type Values = Vec<(Lsn, Value)>;

/// What a layer said when it was asked for a key, apart from the versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Whether older layers must be searched too.
    pub lookup: Lookup,
    /// True if blocks of a file were needed, from the cache or the disk: what filter or index tell,
    /// or memory, is free.
    pub is_read: bool,
}

impl Answer {
    /// Nothing of the key, which no block was needed for.
    const NOTHING: Answer = Answer { lookup: Lookup::Continue, is_read: false };
}

/// The newest value of each key, as `scan` gathers it from several layers in any order.
pub type Newest = BTreeMap<Key, (Lsn, Value)>;

/// Keeps `value` if it is at least as new as the one that is there.
fn keep_newest(out: &mut Newest, key: Key, lsn: Lsn, value: &Value) {
    match out.entry(key) {
        Entry::Vacant(entry) => {
            entry.insert((lsn, value.clone()));
        }
        Entry::Occupied(mut entry) if entry.get().0 <= lsn => {
            entry.insert((lsn, value.clone()));
        }
        Entry::Occupied(_) => {}
    }
}
