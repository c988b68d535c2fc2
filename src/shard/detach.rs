//! Detaching a branch from its ancestor: everything that is visible at the branch point is copied
//! into image layers of the branch, and then the branch stands alone.
//!
//! 1. The serve executor walks the keys in order and rebuilds each value at the branch point; the
//!    background executor writes them into image layers that together cover all keys. Between
//!    the two is a queue of a few values, so memory does not grow with the data.
//! 2. One replacement of the index names the layers, drops the ancestor, and makes the branch
//!    point the first readable LSN.
//! 3. In one synchronous step reads go to the new layers.
//!
//! A crash before 2 leaves files that no index names; the next opening removes them. Reads of the
//! timeline's older history end with 3; those under way are told so.

use std::path::PathBuf;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::join;
use futures_util::stream;

use super::background::BackgroundStopped;
use super::control::DetachState;
use super::gate::GateGuard;
use super::index::{INDEX_FILE, IndexLayer, TimelineIndex};
use super::reader::ReadError;
use super::stored::StoredLayer;
use super::timeline::Timeline;
use crate::base::{Key, KeyRange, Kind, Lsn, RelTag, SlruKind, Value};
use crate::io::{Io, IoError, durable};
use crate::layers::{ImageWriter, LayerDesc, LayerError, LayerOwner};
use crate::limits::{DETACH_QUEUE_VALUES, DETACH_READS_CONCURRENT, LAYER_IMAGE_VALUES_MAX};

/// Why a branch was not detached. Nothing has changed, and it may be tried again.
#[derive(Debug, Clone, thiserror::Error)]
#[allow(missing_docs, reason = "the texts of the variants say it")]
pub enum DetachError {
    #[error("timeline {0} has no ancestor")]
    NoAncestor(crate::base::TimelineId),
    #[error("timeline {0} is being detached already")]
    UnderWay(crate::base::TimelineId),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{0}")]
    Layer(String),
    #[error(transparent)]
    Io(#[from] IoError),
    #[error(transparent)]
    Background(#[from] BackgroundStopped),
    #[error("the timeline is going away")]
    Stopped,
}

impl DetachError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            DetachError::NoAncestor(_) => Kind::Invalid,
            DetachError::UnderWay(_) | DetachError::Layer(_) => Kind::Retry,
            DetachError::Read(error) => error.kind(),
            DetachError::Io(error) => error.kind(),
            DetachError::Background(_) | DetachError::Stopped => Kind::Shutdown,
        }
    }
}

/// What goes to the background executor.
enum Item {
    Value(Key, Value),
    /// All values have come; without this the layers are thrown away.
    End,
}

type Queue = async_channel::Sender<Item>;

impl<I: Io> Timeline<I> {
    /// Claims the detaching, so that there is one at a time.
    pub(super) fn begin_detach(&self) -> Result<(), DetachError> {
        let mut mutable = self.mutable.borrow_mut();
        if mutable.ancestor.is_none() {
            return Err(DetachError::NoAncestor(self.id));
        }
        if mutable.detach.as_ref().is_some_and(|state| state.error.is_none()) {
            return Err(DetachError::UnderWay(self.id));
        }
        mutable.detach = Some(DetachState::default());
        Ok(())
    }

    /// Does what [`Timeline::begin_detach`] has claimed.
    pub(super) async fn detach(self: Rc<Self>) -> Result<(), DetachError> {
        let result = self.copy_and_publish().await;
        let mut mutable = self.mutable.borrow_mut();
        match &result {
            Ok(()) => mutable.detach = None,
            Err(error) => {
                tracing::error!(tenant = %self.tenant, timeline = %self.id, "detaching: {error}");
                if let Some(state) = &mut mutable.detach {
                    state.error = Some(error.to_string());
                }
            }
        }
        result
    }

    async fn copy_and_publish(&self) -> Result<(), DetachError> {
        let ancestor = self.ancestor().ok_or(DetachError::NoAncestor(self.id))?;
        let lsn = ancestor.lsn;
        let (queue, values) = async_channel::bounded(DETACH_QUEUE_VALUES);
        let writer = ImageJob {
            dir: self.context.dir.clone(),
            owner: LayerOwner { shard: self.tenant, timeline: self.id },
            lsn,
            layer_bytes: self.context.config.get().image_layer_bytes,
            values,
        };
        let write = self.context.background.run(move |io: I| writer.run(io));
        let (written, fed) = join(write, self.feed(lsn, queue)).await;
        let layers = match (written?, fed) {
            (Ok(layers), Ok(())) => layers,
            // The reason why the values stopped is the better one.
            (_, Err(error)) if !matches!(error, DetachError::Stopped) => return Err(error),
            (Err(error), _) => return Err(DetachError::Layer(error.to_string())),
            (Ok(_), Err(error)) => return Err(error),
        };
        self.publish_images(lsn, layers).await?;
        ancestor.timeline.set_branch(self.id, None);
        tracing::info!(
            tenant = %self.tenant, timeline = %self.id,
            "detached from {} at {lsn}", ancestor.timeline.id
        );
        Ok(())
    }

    /// Steps 2 and 3 of the module's text.
    async fn publish_images(&self, lsn: Lsn, layers: Vec<LayerDesc>) -> Result<(), DetachError> {
        let _checkpoint = self.checkpoint_turn.acquire().await;
        let _index = self.index_turn.acquire().await;
        let _read = self.keep()?;
        let entry =
            |desc: &LayerDesc| IndexLayer { name: desc.name.to_string(), len: desc.file_bytes };
        let added: Vec<IndexLayer> = layers.iter().map(entry).collect();
        let index = TimelineIndex {
            ancestor: None,
            start_lsn: lsn,
            ..self.index_with(&added, self.lsns().disk_consistent)
        };
        let path = self.context.dir.join(INDEX_FILE);
        durable::write_file_atomic(&self.context.io, &path, &index.encode()).await?;
        let owner = LayerOwner { shard: self.tenant, timeline: self.id };
        let mut mutable = self.mutable.borrow_mut();
        for desc in layers {
            self.context.counters.layer_bytes.add(desc.file_bytes);
            let layer = StoredLayer::new(&self.context, desc.name, desc.file_bytes, owner);
            mutable.layers.insert(layer.span(), layer);
        }
        mutable.ancestor = None;
        mutable.start_lsn = lsn;
        Ok(())
    }

    /// Keeps the timeline from going away for a step of the work.
    fn keep(&self) -> Result<GateGuard, DetachError> {
        self.gate.enter().filter(|_| !self.stopping.get()).ok_or(DetachError::Stopped)
    }

    /// Sends every value that is visible at `lsn`, in key order.
    async fn feed(&self, lsn: Lsn, queue: Queue) -> Result<(), DetachError> {
        let mut forks = self.all_forks(lsn).await?;
        forks.sort_unstable();
        let mut databases: Vec<(u32, u32)> =
            forks.iter().map(|rel| (rel.node.spc, rel.node.db)).collect();
        let known = self.small_values(&Key::database_all(), lsn).await?;
        databases.extend(known.iter().filter_map(|(key, _)| key.as_database()));
        databases.sort_unstable();
        databases.dedup();
        let mut forks = forks.into_iter().peekable();
        for (spc, db) in databases {
            self.feed_small(Key::relmap(spc, db), lsn, &queue).await?;
            while let Some(rel) = forks.next_if(|rel| (rel.node.spc, rel.node.db) == (spc, db)) {
                self.feed_fork(rel, lsn, &queue).await?;
            }
        }
        for kind in SlruKind::ALL {
            self.feed_slru(kind, lsn, &queue).await?;
        }
        self.feed_range(&Key::two_phase_all(), lsn, &queue).await?;
        self.feed_small(Key::CONTROL_FILE, lsn, &queue).await?;
        self.feed_small(Key::CHECKPOINT, lsn, &queue).await?;
        self.feed_range(&Key::replication_origin_all(), lsn, &queue).await?;
        self.feed_range(&Key::database_all(), lsn, &queue).await?;
        self.feed_range(&Key::rel_dir_all(), lsn, &queue).await?;
        queue.send(Item::End).await.map_err(|_| DetachError::Stopped)
    }

    async fn feed_fork(&self, rel: RelTag, lsn: Lsn, queue: &Queue) -> Result<(), DetachError> {
        let Some(blocks) = self.stored_u32(Key::rel_size(rel), lsn).await? else { return Ok(()) };
        let keys = (0..blocks.1).map(|block| Key::rel_block(rel, block));
        self.feed_pages(keys, lsn, queue).await?;
        self.feed_small(Key::rel_size(rel), lsn, queue).await
    }

    async fn feed_slru(&self, kind: SlruKind, lsn: Lsn, queue: &Queue) -> Result<(), DetachError> {
        let directory = self.small_values(&Key::slru_dir_range(kind), lsn).await?;
        let segments: Vec<u32> = directory
            .iter()
            .filter_map(|(key, _)| key.as_slru_dir())
            .map(|(_, segment)| segment)
            .collect();
        for (key, bytes) in directory {
            send(queue, key, Value::Image(bytes)).await?;
        }
        for segment in segments {
            let size = Key::slru_size(kind, segment);
            let Some((_, blocks)) = self.stored_u32(size, lsn).await? else { continue };
            let keys = (0..blocks).map(|block| Key::slru_block(kind, segment, block));
            self.feed_pages(keys, lsn, queue).await?;
            self.feed_small(size, lsn, queue).await?;
        }
        Ok(())
    }

    async fn feed_pages(
        &self,
        keys: impl Iterator<Item = Key>,
        lsn: Lsn,
        queue: &Queue,
    ) -> Result<(), DetachError> {
        let read = |key| async move {
            let _read = self.keep()?;
            Ok::<_, DetachError>((key, self.page(key, lsn).await?))
        };
        let mut pages =
            std::pin::pin!(stream::iter(keys).map(read).buffered(DETACH_READS_CONCURRENT));
        while let Some(page) = pages.next().await {
            let (key, page) = page?;
            send(queue, key, Value::Image(page)).await?;
            if let Some(state) = &mut self.mutable.borrow_mut().detach {
                state.values += 1;
            }
            self.context.io.yield_if_needed().await;
        }
        Ok(())
    }

    async fn feed_small(&self, key: Key, lsn: Lsn, queue: &Queue) -> Result<(), DetachError> {
        let _read = self.keep()?;
        match self.metadata(key, lsn).await? {
            Some((_, bytes)) => send(queue, key, Value::Image(bytes)).await,
            None => Ok(()),
        }
    }

    async fn feed_range(
        &self,
        keys: &KeyRange,
        lsn: Lsn,
        queue: &Queue,
    ) -> Result<(), DetachError> {
        for (key, bytes) in self.small_values(keys, lsn).await? {
            send(queue, key, Value::Image(bytes)).await?;
        }
        Ok(())
    }

    /// The small values of a range that exist.
    async fn small_values(
        &self,
        keys: &KeyRange,
        lsn: Lsn,
    ) -> Result<Vec<(Key, Bytes)>, DetachError> {
        let _read = self.keep()?;
        let mut found = Vec::new();
        for (key, (_, value)) in self.scan(keys, lsn).await? {
            match value {
                Value::Image(bytes) if bytes.is_empty() => {}
                Value::Image(bytes) => found.push((key, bytes)),
                other => {
                    return Err(DetachError::Read(ReadError::Damaged {
                        what: format!("{key:?}"),
                        lsn,
                        problem: format!("a small value is stored as {other:?}"),
                    }));
                }
            }
        }
        Ok(found)
    }
}

async fn send(queue: &Queue, key: Key, value: Value) -> Result<(), DetachError> {
    queue.send(Item::Value(key, value)).await.map_err(|_| DetachError::Stopped)
}

/// The part of the background executor.
struct ImageJob {
    dir: PathBuf,
    owner: LayerOwner,
    lsn: Lsn,
    layer_bytes: u64,
    values: async_channel::Receiver<Item>,
}

impl ImageJob {
    async fn run<I: Io>(self, io: I) -> Result<Vec<LayerDesc>, LayerError> {
        let mut done = Vec::new();
        let result = self.write(&io, &mut done).await;
        if !matches!(result, Ok(true)) {
            // What cannot be removed now is removed at the next opening.
            for desc in std::mem::take(&mut done) {
                let _ = io.remove(&self.dir.join(desc.name.to_string())).await;
            }
        }
        result.map(|_| done)
    }

    async fn writer<I: Io>(&self, io: &I) -> Result<ImageWriter<I>, LayerError> {
        let least = self.layer_bytes / 8;
        ImageWriter::create(io, &self.dir, self.owner, self.lsn, least).await
    }

    /// False when the values ended before their end.
    async fn write<I: Io>(&self, io: &I, done: &mut Vec<LayerDesc>) -> Result<bool, LayerError> {
        let mut start = Key::MIN;
        let mut writer = self.writer(io).await?;
        loop {
            let (key, value) = match self.values.recv().await {
                Ok(Item::Value(key, value)) => (key, value),
                Ok(Item::End) => break,
                Err(_) => {
                    writer.abort().await;
                    return Ok(false);
                }
            };
            let full = writer.file_bytes() >= self.layer_bytes
                || writer.value_count() >= LAYER_IMAGE_VALUES_MAX;
            if full && key > start {
                done.push(writer.finish(start..key).await?);
                start = key;
                writer = self.writer(io).await?;
            }
            if let Err(error) = writer.add(key, &value).await {
                writer.abort().await;
                return Err(error);
            }
            io.yield_if_needed().await;
        }
        done.push(writer.finish(start..Key::MAX).await?);
        Ok(true)
    }
}
