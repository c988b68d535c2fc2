//! Image layers (being filled in; the signatures stand).

use std::path::Path;
use std::rc::Rc;

use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::io::Io;
use crate::layers::{BlockCache, LayerDesc, LayerError, LayerName, LayerOwner, Lookup, Newest};

/// Writes an image layer.
pub struct ImageWriter<I: Io> {
    _io: I,
}

impl<I: Io> ImageWriter<I> {
    /// Starts a temporary file in `dir`.
    pub async fn create(
        _io: &I,
        _dir: &Path,
        _owner: LayerOwner,
        _lsn: Lsn,
    ) -> Result<Self, LayerError> {
        unimplemented!()
    }
    /// Adds a value; keys ascend, values are bases. After an error: `abort`.
    pub async fn add(&mut self, _key: Key, _value: &Value) -> Result<(), LayerError> {
        unimplemented!()
    }
    /// Bytes that the file has so far, for the caller to decide when to cut.
    pub fn file_bytes(&self) -> u64 {
        unimplemented!()
    }
    /// Publishes the file under its name; on an error nothing is left behind.
    pub async fn finish(self, _keys: KeyRange) -> Result<LayerDesc, LayerError> {
        unimplemented!()
    }
    /// Removes the temporary file.
    pub async fn abort(self) {
        unimplemented!()
    }
}

/// An open delta layer.
pub struct ImageLayer<I: Io> {
    _io: I,
}

impl<I: Io> ImageLayer<I> {
    /// Opens `dir/name`.
    pub async fn open(
        _io: &I,
        _dir: &Path,
        _name: &LayerName,
        _owner: LayerOwner,
        _cache: Rc<BlockCache>,
    ) -> Result<Self, LayerError> {
        unimplemented!()
    }
    /// Appends the values of `key` within `lsns` to `out`, newest first, up to the first base.
    pub async fn collect(
        &self,
        _key: Key,
        _lsns: &LsnRange,
        _out: &mut Vec<(Lsn, Value)>,
    ) -> Result<Lookup, LayerError> {
        unimplemented!()
    }
    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    pub async fn scan(
        &self,
        _keys: &KeyRange,
        _below: Lsn,
        _out: &mut Newest,
    ) -> Result<(), LayerError> {
        unimplemented!()
    }
    /// Name of the layer.
    pub fn name(&self) -> &LayerName {
        unimplemented!()
    }
    /// Closes the file.
    pub async fn close(self) -> Result<(), LayerError> {
        unimplemented!()
    }
}
