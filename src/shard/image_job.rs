//! Image layers from values that come one after the other: the serve executor rebuilds them, the
//! background executor writes them. Between the two is a queue of a few values, so memory does not
//! grow with the data.

use std::path::PathBuf;

use super::stored::StoredLayer;
use super::timeline::Timeline;
use crate::base::{Key, KeyRange, Lsn, Value};
use crate::io::Io;
use crate::layers::{ImageWriter, LayerDesc, LayerError, LayerOwner};
use crate::limits::{IMAGE_QUEUE_VALUES, LAYER_IMAGE_VALUES_MAX};

/// What goes to the background executor.
enum Item {
    Value(Key, Value),
    /// All values have come; without this the layers are thrown away.
    End,
}

/// The serve executor's end.
pub(super) struct ImageQueue(async_channel::Sender<Item>);

/// The job has ended: its result says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct QueueEnded;

impl ImageQueue {
    /// The next value; keys ascend.
    pub(super) async fn send(&self, key: Key, value: Value) -> Result<(), QueueEnded> {
        self.0.send(Item::Value(key, value)).await.map_err(|_| QueueEnded)
    }

    /// All values have been sent.
    pub(super) async fn end(self) -> Result<(), QueueEnded> {
        self.0.send(Item::End).await.map_err(|_| QueueEnded)
    }
}

/// The background executor's end: writes what is sent.
pub(super) struct ImageJob {
    dir: PathBuf,
    owner: LayerOwner,
    lsn: Lsn,
    keys: KeyRange,
    layer_bytes: u64,
    values: async_channel::Receiver<Item>,
}

impl ImageJob {
    /// Writes layers until the values end, and gives them; none if they end before their end.
    ///
    /// # Errors
    /// As [`ImageWriter::add`]. No file is left.
    pub(super) async fn run<I: Io>(self, io: I) -> Result<Vec<LayerDesc>, LayerError> {
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
        let mut start = self.keys.start;
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
        done.push(writer.finish(start..self.keys.end).await?);
        Ok(true)
    }
}

impl<I: Io> Timeline<I> {
    /// A job that writes image layers at `lsn` which together cover `keys`, and its queue.
    pub(super) fn image_job(&self, lsn: Lsn, keys: KeyRange) -> (ImageQueue, ImageJob) {
        let (queue, values) = async_channel::bounded(IMAGE_QUEUE_VALUES);
        let job = ImageJob {
            dir: self.context.dir.clone(),
            owner: LayerOwner { shard: self.tenant, timeline: self.id },
            lsn,
            keys,
            layer_bytes: self.context.config.get().image_layer_bytes,
            values,
        };
        (ImageQueue(queue), job)
    }

    /// Files that a job has written become layers, in one synchronous step.
    pub(super) fn add_layers(&self, layers: Vec<LayerDesc>) {
        let owner = LayerOwner { shard: self.tenant, timeline: self.id };
        let mut mutable = self.mutable.borrow_mut();
        for desc in layers {
            self.context.counters.layer_bytes.add(desc.file_bytes);
            let layer = StoredLayer::new(&self.context, desc.name, desc.file_bytes, owner);
            mutable.layers.insert(layer.span(), layer);
        }
    }
}
