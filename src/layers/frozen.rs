//! The frozen layer: an open layer that takes no more values.
//!
//! It is shared between the executor that owns the timeline, which still reads from it, and a
//! background executor, which writes it to a delta file; hence `Send + Sync`. It goes when the
//! file has been published.

use std::path::Path;

use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::io::Io;
use crate::layers::open::Versions;
use crate::layers::{DeltaWriter, LayerDesc, LayerError, LayerOwner, Lookup, Newest, Values};

/// A closed layer in memory.
#[derive(Debug)]
pub struct FrozenLayer {
    lsns: LsnRange,
    versions: Versions,
}

/// Fails to compile if the layer could not be handed to another executor.
const _: fn() = || {
    fn shareable<T: Send + Sync>() {}
    shareable::<FrozenLayer>();
};

impl FrozenLayer {
    pub(super) fn new(lsns: LsnRange, versions: Versions) -> FrozenLayer {
        FrozenLayer { lsns, versions }
    }

    /// The LSN range that the layer covers, half-open.
    pub fn lsns(&self) -> &LsnRange {
        &self.lsns
    }

    /// Appends the values of `key` within `lsns` to `out`, newest first, up to and including the
    /// first base.
    pub fn collect(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Lookup {
        self.versions.collect(key, lsns, out)
    }

    /// Appends the newest value of `key` within `lsns` to `out` if that is a base; `None` if it is
    /// not.
    pub fn newest(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Lookup> {
        self.versions.newest(key, lsns, out)
    }

    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    pub fn scan(&self, keys: &KeyRange, below: Lsn, out: &mut Newest) {
        self.versions.scan(keys, below, out);
    }

    /// All values in order of key, then LSN.
    pub fn entries(&self) -> impl Iterator<Item = (Key, Lsn, Value)> {
        self.versions.entries()
    }

    /// Number of values.
    pub fn value_count(&self) -> u64 {
        self.versions.value_count()
    }

    /// Number of keys that the values are of.
    pub fn key_count(&self) -> u64 {
        self.versions.key_count()
    }

    /// Estimate of the memory in use, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.versions.memory_bytes()
    }

    /// Writes the layer to a delta file over all keys, published in `dir` when this returns.
    /// `form` makes of each value the one that the file keeps, which must mean the same: what keys
    /// share in memory may have a smaller form for each of them.
    ///
    /// # Errors
    /// [`LayerError::Empty`] without values; whatever [`DeltaWriter`] says. Nothing is left behind.
    pub async fn write<I: Io>(
        &self,
        io: &I,
        dir: &Path,
        owner: LayerOwner,
        form: impl Fn(Key, Value) -> Value,
    ) -> Result<LayerDesc, LayerError> {
        // Values take less room in a file, and shrink.
        let least = self.memory_bytes() as u64 / 4;
        let mut writer = DeltaWriter::create(io, dir, owner, self.lsns.clone(), least).await?;
        for (key, lsn, value) in self.entries() {
            if let Err(error) = writer.add(key, lsn, &form(key, value)).await {
                writer.abort().await;
                return Err(error);
            }
        }
        writer.finish(Key::MIN..Key::MAX).await
    }
}
