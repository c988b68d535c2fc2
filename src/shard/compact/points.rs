//! Single values out of many layers, for a job that reads a key here and there.
//!
//! Layers are opened when they are needed, a few are kept open, and blocks are kept in a small
//! cache of the job's own: the cache that serves reads is left alone.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use crate::base::{Key, Lsn, LsnRange};
use crate::io::Io;
use crate::layers::{BlockCache, FileLayer, LayerError, LayerName, LayerOwner, Lookup, Values};
use crate::limits::{COMPACT_POINT_CACHE_BYTES, COMPACT_POINT_READERS_MAX};
use crate::shard::layer_map::{LayerMap, LayerSpan};

/// See the module's text.
pub(super) struct Points<I: Io> {
    io: I,
    dir: PathBuf,
    owner: LayerOwner,
    cache: Rc<BlockCache>,
    map: LayerMap<Rc<LayerName>>,
    /// Open layers, the one that was used last at the end.
    readers: RefCell<Vec<Rc<FileLayer<I>>>>,
}

impl<I: Io> Points<I> {
    pub(super) fn new(io: &I, dir: &Path, owner: LayerOwner, names: Vec<LayerName>) -> Self {
        let mut map = LayerMap::default();
        for name in names {
            let (keys, lsns) = (name.keys().clone(), name.lsns());
            map.insert(LayerSpan { keys, lsns, is_image: name.is_image() }, Rc::new(name));
        }
        let cache = Rc::new(BlockCache::new(COMPACT_POINT_CACHE_BYTES));
        let (io, dir) = (io.clone(), dir.to_owned());
        Points { io, dir, owner, cache, map, readers: RefCell::default() }
    }

    /// Versions of `key` with LSNs below `below`, newest first, up to a base.
    pub(super) async fn collect(&self, key: Key, below: Lsn) -> Result<Values, LayerError> {
        let mut found = Vec::new();
        let names = self.map.search(key, below);
        // As in a read: what deltas have below the image is in the image already.
        let image = names.last().filter(|name| name.is_image());
        let floor = image.map_or(Lsn(0), |name| name.lsns().end);
        for name in names {
            let range = if name.is_image() { Lsn(0)..below } else { floor..below };
            let reader = self.reader(&name).await?;
            if reader.collect(key, &range, &mut found).await?.lookup != Lookup::Continue {
                break;
            }
        }
        Ok(found)
    }

    /// LSNs of the image layers within `lsns` that have `key`, newest first.
    pub(super) fn image_lsns(&self, key: Key, lsns: &LsnRange) -> Vec<Lsn> {
        let older = |lsn: &Lsn| self.map.image_lsn(key, *lsn);
        let images = std::iter::successors(older(&lsns.end), older);
        images.take_while(|lsn| *lsn >= lsns.start).collect()
    }

    fn opened(&self, name: &LayerName) -> Option<Rc<FileLayer<I>>> {
        let mut readers = self.readers.borrow_mut();
        let at = readers.iter().position(|reader| reader.name() == name)?;
        let reader = readers.remove(at);
        readers.push(reader.clone());
        Some(reader)
    }

    async fn reader(&self, name: &LayerName) -> Result<Rc<FileLayer<I>>, LayerError> {
        if let Some(reader) = self.opened(name) {
            return Ok(reader);
        }
        let cache = self.cache.clone();
        let opened = FileLayer::open(&self.io, &self.dir, name, self.owner, cache).await?;
        if let Some(reader) = self.opened(name) {
            // Another page of the job opened it meanwhile.
            opened.close().await?;
            return Ok(reader);
        }
        let reader = Rc::new(opened);
        self.readers.borrow_mut().push(reader.clone());
        self.close_unused(COMPACT_POINT_READERS_MAX).await;
        Ok(reader)
    }

    /// Closes layers that nobody reads until `count` are left.
    async fn close_unused(&self, count: usize) {
        loop {
            let unused = {
                let mut readers = self.readers.borrow_mut();
                let unused = readers.iter().position(|reader| Rc::strong_count(reader) == 1);
                match unused {
                    Some(at) if readers.len() > count => Rc::try_unwrap(readers.remove(at)).ok(),
                    _ => None,
                }
            };
            let Some(reader) = unused else { return };
            // It was only read.
            let _ = reader.close().await;
        }
    }

    pub(super) async fn close(self) {
        self.close_unused(0).await;
    }
}
