//! The job that makes image layers of a column; runs on the background executor.
//!
//! The image layer below and the delta layers above it are read in key order, side by side, each
//! byte once. Every key of the column that exists at the images' LSN gets its content:
//!
//! - small values are taken as they are, also the empty ones that say "removed": a scan over
//!   older layers must find them;
//! - pages are rebuilt, several at once, where the deltas have changes of them;
//! - pages of a fork or segment that has become shorter, or is gone, are left out: nobody can
//!   read them, and they get a new base if the fork grows again.
//!
//! A layer that is finished is good by itself, so the job may end after any of them. A page that
//! cannot be rebuilt lies between two layers: reads of it go on to what is below.

use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesOrdered;

use super::job::{CompactError, Flags, JobBase, Made, Pages};
use super::points::Points;
#[cfg(test)]
use super::{Planted, planted};
use crate::base::{Key, KeyKind, KeyRange, Kind, Lsn, Value};
use crate::io::Io;
use crate::layers::{
    DeltaMerge, ImageCursor, ImageWriter, InputLayer, LayerDesc, LayerError, LayerOwner, Values,
};
use crate::limits::{
    COMPACT_GROUP_BYTES_MAX, COMPACT_IMAGE_PIECES_MAX, COMPACT_IMAGE_VALUES_MAX,
    COMPACT_REDO_CONCURRENT_MAX,
};
use crate::redo::RedoError;

/// A column to make images of.
pub(super) struct ImageJob {
    pub(super) base: JobBase,
    pub(super) keys: KeyRange,
    pub(super) lsn: Lsn,
    /// The image layer below, perhaps an ancestor's.
    pub(super) image: InputLayer,
    /// All delta layers between it and `lsn`.
    pub(super) deltas: Vec<InputLayer>,
    /// All layers with values at or below `lsn`, those of ancestors last: sizes of forks are looked
    /// up in them.
    pub(super) all: Vec<Vec<InputLayer>>,
}

/// A key and its content; or why there is none.
type Content = (Key, Result<Value, RedoError>);

/// Writes the layers.
struct Output<I: Io> {
    io: I,
    dir: PathBuf,
    owner: LayerOwner,
    lsn: Lsn,
    target_bytes: u64,
    /// About what is still to be written.
    left: u64,
    flags: Arc<Flags>,
    writer: Option<ImageWriter<I>>,
    /// First key that no finished layer has.
    start: Key,
    done: Vec<LayerDesc>,
}

impl<I: Io> Output<I> {
    /// A layer shall end when it has so many bytes.
    fn layer_bytes(&self) -> u64 {
        if self.flags.is_hurried() { self.target_bytes / 8 } else { self.target_bytes }
    }

    /// True if a layer shall end before the next key.
    fn is_due(&self) -> bool {
        let Some(writer) = &self.writer else { return false };
        writer.file_bytes() >= self.layer_bytes()
            || writer.value_count() >= COMPACT_IMAGE_VALUES_MAX
    }

    /// True if the job has done enough.
    fn is_enough(&self) -> bool {
        let hurried = self.flags.is_hurried() && !self.done.is_empty();
        hurried || self.done.len() >= COMPACT_IMAGE_PIECES_MAX
    }

    async fn writer(&mut self) -> Result<&mut ImageWriter<I>, LayerError> {
        let writer = match self.writer.take() {
            Some(writer) => writer,
            None => {
                #[cfg(test)]
                let late = if planted(Planted::ImageLsn) { 100_000 } else { 0 };
                #[cfg(not(test))]
                let late = 0;
                let lsn = Lsn(self.lsn.0 + late);
                let (io, dir, least) = (&self.io, &self.dir, self.layer_bytes().min(self.left));
                ImageWriter::create(io, dir, self.owner, lsn, least).await?.pack_tightly()
            }
        };
        Ok(self.writer.insert(writer))
    }

    /// Ends a layer that has every key below `end`.
    async fn end_layer(&mut self, end: Key) -> Result<(), LayerError> {
        if self.start < end {
            self.writer().await?;
            if let Some(writer) = self.writer.take() {
                let desc = writer.finish(self.start..end).await?;
                self.left = self.left.saturating_sub(desc.file_bytes);
                self.done.push(desc);
            }
            self.start = end;
        }
        Ok(())
    }

    /// Takes the next key; false when the job shall end.
    async fn put(&mut self, (key, value): (Key, Value)) -> Result<bool, LayerError> {
        if self.is_due() {
            self.end_layer(key).await?;
        }
        if self.is_enough() {
            return Ok(false);
        }
        self.writer().await?.add(key, &value).await?;
        Ok(true)
    }

    /// Leaves a key out, and so ends the layer before it.
    async fn skip(&mut self, key: Key) -> Result<(), LayerError> {
        self.end_layer(key).await?;
        self.start = key.next();
        Ok(())
    }

    async fn abort(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.abort().await;
        }
    }
}

/// Tells which pages exist.
struct Sizes {
    lsn: Lsn,
    /// Key of the size that was looked up last, and the size.
    last: Option<(Key, u32)>,
}

impl Sizes {
    async fn has<I: Io>(&mut self, points: &Points<I>, key: Key) -> Result<bool, LayerError> {
        let (size_key, block) = match key.kind() {
            KeyKind::RelBlock(rel, block) => (Key::rel_size(rel), block),
            KeyKind::SlruBlock(kind, segment, block) => (Key::slru_size(kind, segment), block),
            KeyKind::Metadata => return Ok(true),
        };
        if let Some((known, blocks)) = self.last
            && known == size_key
        {
            return Ok(block < blocks);
        }
        let found = points.collect(size_key, Lsn(self.lsn.0.saturating_add(1))).await?;
        let blocks = match found.first() {
            Some((_, Value::Image(bytes))) => {
                <[u8; 4]>::try_from(&bytes[..]).map_or(0, u32::from_le_bytes)
            }
            _ => 0,
        };
        self.last = Some((size_key, blocks));
        Ok(block < blocks)
    }
}

/// What is read: the image layer below and the deltas above it.
struct Input<I: Io> {
    image: ImageCursor<I>,
    image_lsn: Lsn,
    deltas: DeltaMerge<I>,
    lsn: Lsn,
}

impl<I: Io> Input<I> {
    /// The next key with its values since the newest base. Values that have grown too large are
    /// folded into a page.
    async fn next(&mut self, pages: &Pages<I>) -> Result<Option<(Key, Values)>, CompactError> {
        let image = self.image.head().await?;
        let delta = self.deltas.head().await?.map(|(key, _)| key);
        let Some(key) = image.into_iter().chain(delta).min() else { return Ok(None) };
        let mut values = Vec::new();
        if image == Some(key)
            && let Some((_, value)) = self.image.take()
        {
            values.push((self.image_lsn, value));
        }
        let mut bytes = 0;
        while self.deltas.head().await?.is_some_and(|(next, _)| next == key) {
            let Some((_, lsn, value)) = self.deltas.next().await? else { break };
            if lsn <= self.image_lsn || lsn > self.lsn {
                continue;
            }
            if value.is_base() {
                values.clear();
                bytes = 0;
            }
            bytes += value.encoded_len();
            values.push((lsn, value));
            if bytes > COMPACT_GROUP_BYTES_MAX && values.len() > 1 {
                // A failure shows again when the whole page is made.
                if let Ok(page) = pages.rebuild(key, values.clone()).await {
                    values = vec![(lsn, Value::Image(page))];
                }
                bytes = 0;
            }
        }
        Ok(Some((key, values)))
    }

    async fn close(self) {
        let _ = self.image.close().await;
        self.deltas.close().await;
    }
}

/// Makes image layers from the start of the column on; perhaps not up to its end.
pub(super) async fn run<I: Io>(io: I, job: ImageJob) -> Result<Made, CompactError> {
    let ImageJob { base, keys, lsn, image, deltas, all } = job;
    let JobBase { owner, dir, target_bytes, redo, flags, .. } = base;
    let image_lsn = image.name.lsns().start;
    let is_whole = *image.name.keys() == keys;
    let image = ImageCursor::open(&io, &image, keys.clone()).await?;
    // Images of the same keys have about the same length; of a part of them it is not known.
    let left = if is_whole { image.file_bytes() } else { target_bytes / 8 };
    let deltas = DeltaMerge::new(&io, deltas, keys.clone());
    let mut input = Input { image, image_lsn, deltas, lsn };
    let pages = Pages::new(Points::new(&io, all), redo());
    let mut out = Output {
        io,
        dir,
        owner,
        lsn,
        target_bytes,
        left,
        flags,
        writer: None,
        start: keys.start,
        done: Vec::new(),
    };
    let made = make(&mut input, &pages, &mut out, keys.end).await;
    out.abort().await;
    input.close().await;
    let (count, failures) = (pages.made.get(), pages.failures.get());
    pages.close().await;
    Ok(Made { layers: out.done, pages: count, failures, error: made.err() })
}

async fn make<I: Io>(
    input: &mut Input<I>,
    pages: &Pages<I>,
    out: &mut Output<I>,
    end: Key,
) -> Result<(), CompactError> {
    let mut sizes = Sizes { lsn: out.lsn, last: None };
    let mut window: FuturesOrdered<LocalBoxFuture<'_, Content>> = FuturesOrdered::new();
    let mut at_end = false;
    loop {
        while !at_end && window.len() < COMPACT_REDO_CONCURRENT_MAX {
            if out.flags.is_cancelled() {
                return Err(CompactError::Cancelled);
            }
            match input.next(pages).await? {
                Some((key, values)) if sizes.has(&pages.points, key).await? => {
                    window.push_back(Box::pin(content(pages, key, values)));
                }
                Some(_) => {}
                None => at_end = true,
            }
        }
        let Some((key, content)) = window.next().await else { break };
        out.io.yield_if_needed().await;
        match content {
            Ok(value) => {
                if !out.put((key, value)).await? {
                    return Ok(());
                }
            }
            // The page itself is to blame; or else the whole job has to be tried again.
            Err(error) if matches!(error.kind(), Kind::Corrupt | Kind::Invalid) => {
                pages.failed(key, &error);
                out.skip(key).await?;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(out.end_layer(end).await?)
}

/// The content of a key after its values.
async fn content<I: Io>(pages: &Pages<I>, key: Key, mut values: Values) -> Content {
    let is_done =
        values.len() == 1 && matches!(values.first(), Some((_, Value::Image(_) | Value::ZeroPage)));
    if (is_done || key.kind() == KeyKind::Metadata)
        && let Some((_, value @ (Value::Image(_) | Value::ZeroPage))) = values.pop()
    {
        return (key, Ok(value));
    }
    (key, pages.rebuild(key, values).await.map(|page: Bytes| Value::Image(page)))
}
