//! Reading layers from end to end, for compaction: cursors and the merge of several deltas.
//!
//! A cursor reads the neighbouring blocks of one layer in pieces of [`COMPACT_READ_BYTES`], past
//! the block cache, and hands out values in order. A merge takes the smallest of the heads of its
//! cursors. A layer is opened when the merge comes to its first key and closed after its last, so
//! of a row of layers with neighbouring key ranges one is open at a time.
//!
//! Memory: for each open layer its index and one piece, packed and unpacked. A value that is
//! larger than a piece is a piece.
//!
//! Delta layers that share keys have disjoint LSN ranges, so no key and LSN comes from two of
//! them; values at one key and LSN keep the order that they have in their layer.

use std::collections::VecDeque;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;

use crate::base::{Key, KeyRange, Lsn, Value};
use crate::io::Io;
use crate::layers::format::{BlockEntries, Packed};
use crate::layers::{BlockCache, DeltaLayer, ImageLayer, LayerError, LayerName, LayerOwner};
use crate::limits::COMPACT_READ_BYTES;

/// A layer file that a job reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputLayer {
    /// Where it is.
    pub dir: Arc<Path>,
    /// Whose it is.
    pub owner: LayerOwner,
    /// Its name.
    pub name: LayerName,
    /// Values with LSNs from here on do not count: in a layer of an ancestor they came after the
    /// branch point.
    pub below: Lsn,
}

/// A value of a delta layer.
pub type MergeEntry = (Key, Lsn, Value);

/// Reads the values of a delta layer within a key range, in order.
pub struct DeltaCursor<I: Io> {
    layer: DeltaLayer<I>,
    keys: KeyRange,
    below: Lsn,
    /// The next block to be read.
    block: usize,
    /// Blocks that were read, with their offsets.
    blocks: VecDeque<(u64, Bytes)>,
    values: VecDeque<MergeEntry>,
}

impl<I: Io> DeltaCursor<I> {
    /// Opens a layer for the values of `keys`.
    ///
    /// # Errors
    /// As [`DeltaLayer::open`].
    pub async fn open(io: &I, input: &InputLayer, keys: KeyRange) -> Result<Self, LayerError> {
        let cache = Rc::new(BlockCache::new(0));
        let InputLayer { dir, owner, name, below } = input;
        let layer = DeltaLayer::open(io, dir, name, *owner, cache).await?;
        let block = layer.first_block(keys.start);
        let (blocks, values) = (VecDeque::new(), VecDeque::new());
        Ok(DeltaCursor { layer, keys, below: *below, block, blocks, values })
    }

    /// Key and LSN of the next value; `None` at the end.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn head(&mut self) -> Result<Option<(Key, Lsn)>, LayerError> {
        while self.values.is_empty() {
            if self.blocks.is_empty() && !self.read().await? {
                return Ok(None);
            }
            let Some((offset, block)) = self.blocks.pop_front() else { continue };
            let decoded = decode(&block, &self.keys, self.below, &mut self.values);
            decoded.map_err(|what| self.layer.file().damaged(offset, what))?;
        }
        Ok(self.values.front().map(|(key, lsn, _)| (*key, *lsn)))
    }

    /// The value whose key and LSN [`DeltaCursor::head`] has told.
    pub fn take(&mut self) -> Option<MergeEntry> {
        self.values.pop_front()
    }

    /// Reads the next piece; false at the end.
    async fn read(&mut self) -> Result<bool, LayerError> {
        let places = self.layer.places(self.block, self.keys.end, COMPACT_READ_BYTES);
        let blocks = self.layer.file().read_run(&places).await?;
        self.block += blocks.len();
        self.blocks.extend(places.iter().map(|(offset, _)| *offset).zip(blocks));
        Ok(!self.blocks.is_empty())
    }

    /// Closes the file.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn close(self) -> Result<(), LayerError> {
        self.layer.close().await
    }
}

fn decode(
    block: &Bytes,
    keys: &KeyRange,
    below: Lsn,
    out: &mut VecDeque<MergeEntry>,
) -> Result<(), &'static str> {
    let mut entries = BlockEntries::new(block);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if keys.contains(&entry.key) && entry.lsn < below {
            out.push_back((entry.key, entry.lsn, entries.value(&entry)?));
        }
    }
    Ok(())
}

/// The values of several delta layers in order of key, then LSN.
pub struct DeltaMerge<I: Io> {
    io: I,
    keys: KeyRange,
    /// Not open yet, by falling start of the key range.
    waiting: Vec<InputLayer>,
    /// Open, each with its head.
    open: Vec<((Key, Lsn), DeltaCursor<I>)>,
}

impl<I: Io> DeltaMerge<I> {
    /// A merge of the values that delta layers have of `keys`. It ends with
    /// [`DeltaMerge::close`], after an error too.
    pub fn new(io: &I, mut inputs: Vec<InputLayer>, keys: KeyRange) -> Self {
        inputs.sort_by_key(|input| std::cmp::Reverse(input.name.keys().start));
        DeltaMerge { io: io.clone(), keys, waiting: inputs, open: Vec::new() }
    }

    /// Opens the layers that may have the next value.
    async fn open_due(&mut self) -> Result<(), LayerError> {
        while let Some(input) = self.waiting.last() {
            let first = self.open.iter().map(|((key, _), _)| *key).min();
            if first.is_some_and(|first| first < input.name.keys().start) {
                return Ok(());
            }
            let Some(input) = self.waiting.pop() else { return Ok(()) };
            let cursor = DeltaCursor::open(&self.io, &input, self.keys.clone()).await?;
            self.admit(cursor).await?;
        }
        Ok(())
    }

    /// Puts a cursor among the open ones if it has a value left.
    async fn admit(&mut self, mut cursor: DeltaCursor<I>) -> Result<(), LayerError> {
        match cursor.head().await {
            Ok(Some(head)) => self.open.push((head, cursor)),
            Ok(None) => cursor.close().await?,
            Err(error) => {
                let _ = cursor.close().await;
                return Err(error);
            }
        }
        Ok(())
    }

    /// Key and LSN of the next value; `None` at the end.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn head(&mut self) -> Result<Option<(Key, Lsn)>, LayerError> {
        self.open_due().await?;
        Ok(self.open.iter().map(|(head, _)| *head).min())
    }

    /// The next value; `None` at the end.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn next(&mut self) -> Result<Option<MergeEntry>, LayerError> {
        self.open_due().await?;
        let heads = self.open.iter().enumerate();
        let smallest = heads.min_by_key(|(_, (head, _))| *head).map(|(place, _)| place);
        let Some(place) = smallest else { return Ok(None) };
        let Some((head, cursor)) = self.open.get_mut(place) else { return Ok(None) };
        let entry = cursor.take();
        match cursor.values.front() {
            Some((key, lsn, _)) => *head = (*key, *lsn),
            None => {
                let (_, cursor) = self.open.swap_remove(place);
                self.admit(cursor).await?;
            }
        }
        Ok(entry)
    }

    /// Closes the files.
    pub async fn close(self) {
        for (_, cursor) in self.open {
            // They were only read.
            let _ = cursor.close().await;
        }
    }
}

/// Reads the values of an image layer within a key range, in order.
pub struct ImageCursor<I: Io> {
    layer: ImageLayer<I>,
    keys: KeyRange,
    values: VecDeque<(Key, Value)>,
}

/// Pages that are read at once if they lie together.
const PAGES_AT_ONCE: usize = 16;

impl<I: Io> ImageCursor<I> {
    /// Opens a layer for the values of `keys`.
    ///
    /// # Errors
    /// As [`ImageLayer::open`].
    pub async fn open(io: &I, input: &InputLayer, keys: KeyRange) -> Result<Self, LayerError> {
        let cache = Rc::new(BlockCache::new(0));
        let InputLayer { dir, owner, name, .. } = input;
        let layer = ImageLayer::open(io, dir, name, *owner, cache).await?;
        Ok(ImageCursor { layer, keys, values: VecDeque::new() })
    }

    /// Length of the layer that is read, in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.layer.desc().file_bytes
    }

    /// The next key; `None` at the end.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn head(&mut self) -> Result<Option<Key>, LayerError> {
        if self.values.is_empty() {
            self.read().await?;
        }
        Ok(self.values.front().map(|(key, _)| *key))
    }

    /// The value of the key that [`ImageCursor::head`] has told.
    pub fn take(&mut self) -> Option<(Key, Value)> {
        self.values.pop_front()
    }

    async fn read(&mut self) -> Result<(), LayerError> {
        let places = self.layer.places(&self.keys, PAGES_AT_ONCE, COMPACT_READ_BYTES);
        let Some((last, _)) = places.last() else { return Ok(()) };
        self.keys.start = last.next();
        let stored: Vec<(u64, Packed)> = places.iter().filter_map(|(_, place)| *place).collect();
        let mut contents = self.layer.file().read_run(&stored).await?.into_iter();
        for (key, place) in places {
            let value = match place {
                None => Value::ZeroPage,
                Some(_) => Value::Image(contents.next().unwrap_or_default()),
            };
            self.values.push_back((key, value));
        }
        Ok(())
    }

    /// Closes the file.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn close(self) -> Result<(), LayerError> {
        self.layer.close().await
    }
}

#[cfg(test)]
mod tests;
