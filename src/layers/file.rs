//! What delta and image layers share (being filled in; the signatures stand).

use std::path::Path;
use std::rc::Rc;

use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::io::Io;
use crate::layers::{
    BlockCache, DeltaLayer, ImageLayer, LayerError, LayerName, LayerOwner, Lookup, Newest,
};

/// An open layer file of either kind.
pub enum FileLayer<I: Io> {
    /// A delta layer.
    Delta(DeltaLayer<I>),
    /// An image layer.
    Image(ImageLayer<I>),
}

impl<I: Io> FileLayer<I> {
    /// Opens `dir/name`, checks that it is the layer of this owner, loads its index.
    pub async fn open(
        io: &I,
        dir: &Path,
        name: &LayerName,
        owner: LayerOwner,
        cache: Rc<BlockCache>,
    ) -> Result<Self, LayerError> {
        Ok(match name {
            LayerName::Delta { .. } => {
                FileLayer::Delta(DeltaLayer::open(io, dir, name, owner, cache).await?)
            }
            LayerName::Image { .. } => {
                FileLayer::Image(ImageLayer::open(io, dir, name, owner, cache).await?)
            }
        })
    }

    /// Appends the values of `key` within `lsns` to `out`, newest first, up to the first base.
    pub async fn collect(
        &self,
        key: Key,
        lsns: &LsnRange,
        out: &mut Vec<(Lsn, Value)>,
    ) -> Result<Lookup, LayerError> {
        match self {
            FileLayer::Delta(layer) => layer.collect(key, lsns, out).await,
            FileLayer::Image(layer) => layer.collect(key, lsns, out).await,
        }
    }

    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    pub async fn scan(
        &self,
        keys: &KeyRange,
        below: Lsn,
        out: &mut Newest,
    ) -> Result<(), LayerError> {
        match self {
            FileLayer::Delta(layer) => layer.scan(keys, below, out).await,
            FileLayer::Image(layer) => layer.scan(keys, below, out).await,
        }
    }

    /// Name of the layer.
    pub fn name(&self) -> &LayerName {
        match self {
            FileLayer::Delta(layer) => layer.name(),
            FileLayer::Image(layer) => layer.name(),
        }
    }

    /// Closes the file.
    pub async fn close(self) -> Result<(), LayerError> {
        match self {
            FileLayer::Delta(layer) => layer.close().await,
            FileLayer::Image(layer) => layer.close().await,
        }
    }
}
