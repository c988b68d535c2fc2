//! A layer file of a timeline, opened when it is first read. One that a checkpoint has written may
//! be in memory still; then it is read there.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

use futures_channel::oneshot;

use super::index::IndexLayer;
use super::layer_map::LayerSpan;
use super::memory::Resident;
use super::readers::{Readers, Slot};
use super::timeline::TimelineContext;
use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::io::{Io, TaskClass};
use crate::layers::{
    Answer, BlockCache, FileLayer, FrozenLayer, InputLayer, LayerError, LayerName, LayerOwner,
    Newest, Values,
};

/// See the module's text.
pub struct StoredLayer<I: Io> {
    io: I,
    dir: PathBuf,
    name: LayerName,
    len: u64,
    owner: LayerOwner,
    cache: Rc<BlockCache>,
    readers: Rc<Readers<I>>,
    slot: Rc<Slot<I>>,
    resident: OnceCell<Rc<Resident>>,
}

/// Where a layer is read.
pub(super) enum Source<I: Io> {
    /// In the memory that it still has.
    Memory(Arc<FrozenLayer>),
    /// In its file.
    File(Rc<FileLayer<I>>),
}

type Opened<I> = Result<Rc<FileLayer<I>>, LayerError>;

impl<I: Io> Source<I> {
    /// Appends the values of `key` within `lsns` to `out`, newest first, up to the first base.
    pub(super) async fn collect(
        &self,
        key: Key,
        lsns: &LsnRange,
        out: &mut Values,
    ) -> Result<Answer, LayerError> {
        match self {
            Source::Memory(layer) => {
                Ok(Answer { lookup: layer.collect(key, lsns, out), is_read: false })
            }
            Source::File(reader) => reader.collect(key, lsns, out).await,
        }
    }
}

impl<I: Io> StoredLayer<I> {
    /// A layer file `name` of `len` bytes in the timeline's directory; it is not touched yet.
    pub fn new(
        context: &TimelineContext<I>,
        name: LayerName,
        len: u64,
        owner: LayerOwner,
    ) -> Rc<Self> {
        let (slot, resident) = Default::default();
        Rc::new(StoredLayer {
            io: context.io.clone(),
            dir: context.dir.clone(),
            name,
            len,
            owner,
            cache: context.cache.clone(),
            readers: context.readers.clone(),
            slot,
            resident,
        })
    }

    /// The layer is in memory, too; said once, before the first read.
    pub(super) fn stay_in_memory(&self, resident: Rc<Resident>) {
        let was_said = self.resident.set(resident).is_err();
        debug_assert!(!was_said, "{} was in memory already", self.name);
    }

    fn in_memory(&self) -> Option<Arc<FrozenLayer>> {
        self.resident.get().and_then(|resident| resident.layer())
    }

    /// Gives up what is in memory of it. Letting go of that takes time.
    pub(super) fn leave_memory(&self) -> Option<Arc<FrozenLayer>> {
        self.resident.get().and_then(|resident| resident.take())
    }

    /// What it covers.
    pub fn span(&self) -> LayerSpan {
        LayerSpan::from(&self.name)
    }

    /// Name of the file.
    pub fn name(&self) -> &LayerName {
        &self.name
    }

    /// The file as the input of a job that takes its values below an LSN.
    pub(super) fn input(&self, below: Lsn) -> InputLayer {
        let (dir, owner, name) = (Arc::from(&*self.dir), self.owner, self.name.clone());
        InputLayer { dir, owner, name, below }
    }

    /// Path of the file.
    pub fn path(&self) -> PathBuf {
        self.dir.join(self.name.to_string())
    }

    /// Its line in the index.
    pub fn index_entry(&self) -> IndexLayer {
        IndexLayer { name: self.name.to_string(), len: self.len }
    }

    /// Length in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.len
    }

    /// The open file; opens it if need be.
    ///
    /// Who asks may go away at any time, as clients do, but a file that is being opened must not be
    /// dropped half way: it would be closed by a system call that blocks. So a task of its own opens
    /// it.
    pub(super) async fn reader(self: &Rc<Self>) -> Result<Rc<FileLayer<I>>, LayerError> {
        if let Some(reader) = self.readers.get(&self.slot) {
            return Ok(reader);
        }
        let (asker, answer) = oneshot::channel();
        self.io.spawn(TaskClass::Serve, self.clone().open(asker));
        match answer.await {
            Ok(opened) => opened,
            // The executor ends, and its tasks with it.
            Err(oneshot::Canceled) => std::future::pending().await,
        }
    }

    /// Opens the file for `asker`. If that one has gone the layer may be about to go as well, and
    /// the file is closed again.
    async fn open(self: Rc<Self>, asker: oneshot::Sender<Opened<I>>) {
        let cache = self.cache.clone();
        let opened = FileLayer::open(&self.io, &self.dir, &self.name, self.owner, cache).await;
        let answer = match opened {
            Err(error) => Err(error),
            Ok(opened) => match self.readers.get(&self.slot) {
                // Another read opened it meanwhile.
                Some(reader) => opened.close().await.map(|()| reader),
                None if asker.is_canceled() => {
                    if let Err(error) = opened.close().await {
                        tracing::warn!("a layer file that nobody wants any more: {error}");
                    }
                    return;
                }
                None => Ok(self.readers.put(&self.slot, opened, &self.io)),
            },
        };
        let _ = asker.send(answer);
    }

    /// [`Source::collect`], if it need not wait. `None` also after an error and where a layer in
    /// memory has a newest value that is no base; `out` may have got some of the values then.
    pub(super) fn held(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Answer> {
        match self.in_memory() {
            Some(layer) => Some(Answer { lookup: layer.newest(key, lsns, out)?, is_read: false }),
            None => self.readers.ask(&self.slot, |reader| reader.held(key, lsns, out)),
        }
    }

    /// Where it is read: in memory or in its file, which is opened if need be.
    pub(super) async fn source(self: &Rc<Self>) -> Result<Source<I>, LayerError> {
        match self.in_memory() {
            Some(layer) => Ok(Source::Memory(layer)),
            None => Ok(Source::File(self.reader().await?)),
        }
    }

    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    pub async fn scan(
        self: &Rc<Self>,
        keys: &KeyRange,
        below: Lsn,
        out: &mut Newest,
    ) -> Result<(), LayerError> {
        match self.source().await? {
            Source::Memory(layer) => layer.scan(keys, below, out),
            Source::File(reader) => reader.scan(keys, below, out).await?,
        }
        Ok(())
    }

    /// Closes the file if no read is under way. Reads that are keep it open until they end; then
    /// the executor's end closes it.
    pub async fn close(&self) -> Result<(), LayerError> {
        match self.readers.take(&self.slot).map(Rc::try_unwrap) {
            Some(Ok(reader)) => reader.close().await,
            Some(Err(_)) | None => Ok(()),
        }
    }
}

impl<I: Io> Drop for StoredLayer<I> {
    fn drop(&mut self) {
        // One that nobody closed is not counted any more.
        drop(self.readers.take(&self.slot));
    }
}
