//! Single values out of many layers, for a job that reads a key here and there.
//!
//! Layers are opened when they are needed, a few are kept open, and blocks are kept in a small
//! cache of the job's own: the cache that serves reads is left alone. As a read, a search that finds
//! no base in the timeline's own layers goes on in those of its ancestors.

use std::cell::RefCell;
use std::rc::Rc;

use crate::base::{Key, Lsn, LsnRange};
use crate::io::Io;
use crate::layers::{BlockCache, FileLayer, InputLayer, LayerError, Lookup, Values};
use crate::limits::{COMPACT_POINT_CACHE_BYTES, COMPACT_POINT_READERS_MAX};
use crate::shard::layer_map::{LayerMap, LayerSpan};

/// See the module's text.
pub(super) struct Points<I: Io> {
    io: I,
    cache: Rc<BlockCache>,
    /// The timeline's own layers, then those of each ancestor.
    levels: Vec<Level>,
    /// Open layers, the one that was used last at the end.
    readers: RefCell<Vec<Opened<I>>>,
}

/// A layer and its open file.
type Opened<I> = (Rc<InputLayer>, Rc<FileLayer<I>>);

/// The layers of one timeline.
struct Level {
    map: LayerMap<Rc<InputLayer>>,
    /// Values with LSNs from here on do not count.
    below: Lsn,
}

impl Level {
    fn new(inputs: Vec<InputLayer>) -> Level {
        let below = inputs.iter().map(|input| input.below).min().unwrap_or(Lsn::MAX);
        let mut map = LayerMap::default();
        for input in inputs {
            map.insert(LayerSpan::from(&input.name), Rc::new(input));
        }
        Level { map, below }
    }
}

impl<I: Io> Points<I> {
    pub(super) fn new(io: &I, levels: Vec<Vec<InputLayer>>) -> Self {
        let levels = levels.into_iter().map(Level::new).collect();
        let cache = Rc::new(BlockCache::new(COMPACT_POINT_CACHE_BYTES));
        Points { io: io.clone(), cache, levels, readers: RefCell::default() }
    }

    /// Versions of `key` with LSNs below `below`, newest first, up to a base.
    pub(super) async fn collect(&self, key: Key, below: Lsn) -> Result<Values, LayerError> {
        let mut found = Vec::new();
        for level in &self.levels {
            let below = below.min(level.below);
            if self.collect_at(level, key, below, &mut found).await? != Lookup::Continue {
                break;
            }
        }
        Ok(found)
    }

    async fn collect_at(
        &self,
        level: &Level,
        key: Key,
        below: Lsn,
        found: &mut Values,
    ) -> Result<Lookup, LayerError> {
        let inputs = level.map.search(key, below);
        // As in a read: what deltas have below the image is in the image already.
        let image = inputs.last().filter(|input| input.name.is_image());
        let floor = image.map_or(Lsn(0), |input| input.name.lsns().end);
        for input in inputs {
            let range = if input.name.is_image() { Lsn(0)..below } else { floor..below };
            let reader = self.reader(&input).await?;
            let lookup = reader.collect(key, &range, found).await?.lookup;
            if lookup != Lookup::Continue {
                return Ok(lookup);
            }
        }
        Ok(Lookup::Continue)
    }

    /// LSNs of the timeline's own image layers within `lsns` that have `key`, newest first.
    pub(super) fn image_lsns(&self, key: Key, lsns: &LsnRange) -> Vec<Lsn> {
        let Some(own) = self.levels.first() else { return Vec::new() };
        let older = |lsn: &Lsn| own.map.image_lsn(key, *lsn);
        let images = std::iter::successors(older(&lsns.end), older);
        images.take_while(|lsn| *lsn >= lsns.start).collect()
    }

    fn opened(&self, input: &Rc<InputLayer>) -> Option<Rc<FileLayer<I>>> {
        let mut readers = self.readers.borrow_mut();
        let at = readers.iter().position(|(other, _)| Rc::ptr_eq(other, input))?;
        let entry = readers.remove(at);
        let reader = entry.1.clone();
        readers.push(entry);
        Some(reader)
    }

    async fn reader(&self, input: &Rc<InputLayer>) -> Result<Rc<FileLayer<I>>, LayerError> {
        if let Some(reader) = self.opened(input) {
            return Ok(reader);
        }
        let InputLayer { dir, owner, name, .. } = &**input;
        let opened = FileLayer::open(&self.io, dir, name, *owner, self.cache.clone()).await?;
        if let Some(reader) = self.opened(input) {
            // Another page of the job opened it meanwhile.
            opened.close().await?;
            return Ok(reader);
        }
        let reader = Rc::new(opened);
        self.readers.borrow_mut().push((input.clone(), reader.clone()));
        self.close_unused(COMPACT_POINT_READERS_MAX).await;
        Ok(reader)
    }

    /// Closes layers that nobody reads until `count` are left.
    async fn close_unused(&self, count: usize) {
        loop {
            let unused = {
                let mut readers = self.readers.borrow_mut();
                let unused = readers.iter().position(|(_, reader)| Rc::strong_count(reader) == 1);
                match unused {
                    Some(at) if readers.len() > count => Rc::try_unwrap(readers.remove(at).1).ok(),
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
