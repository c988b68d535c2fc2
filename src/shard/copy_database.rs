//! `CREATE DATABASE ... STRATEGY file_copy`: one record after which a whole database is there, page
//! by page as its template stands before the record (`dbase_redo` of
//! `XLOG_DBASE_CREATE_FILE_COPY`).
//!
//! What fits into the open layer goes there. A larger database is written into image layers at the
//! record's LSN, by a job of the background executor, before anything of the record is carried
//! out; so memory is bounded whatever the size. Layers in memory are written first: a read looks
//! into memory before it looks into files, and must not find what a database of the same number
//! once had.
//!
//! The images become layers together with the rest of the record. An index may name them before a
//! checkpoint has come so far; when the record is then replayed, they are there and are left as
//! they are. If none names them, they are removed at the start, and made again.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join;
use futures_util::{StreamExt, stream};

use super::apply::{Apply, EXISTS};
use super::follow::TakeInError;
use super::health::Part;
use super::image_job::{ImageQueue, QueueEnded};
use super::ingest::{CountingSink, IngestError, Place};
use super::pages::zero_page;
use super::reader::ReadError;
use super::timeline::{Mutable, Timeline};
use crate::base::page::PAGE_SIZE;
use crate::base::{Key, KeyRange, Kind, Lsn, RelTag, Value};
use crate::io::Io;
use crate::layers::{LayerDesc, LayerError};
use crate::limits::{CHECKPOINT_RETRY_MS, IMAGE_READS_CONCURRENT};
use crate::wal::change::Change;

/// Tablespace and database.
type Database = (u32, u32);

/// What a database is copied from.
struct Template {
    /// Its relation map, if it has one.
    relmap: Option<Bytes>,
    /// Its forks, ascending, with their sizes in blocks.
    forks: Vec<(RelTag, u32)>,
}

/// Pages of a copied database that are in image layer files.
pub(super) struct CopiedPages(Vec<LayerDesc>);

/// Why no copy was prepared.
enum CopyError {
    Read(ReadError),
    Layer(LayerError),
    Stopped,
}

impl From<ReadError> for CopyError {
    fn from(error: ReadError) -> Self {
        CopyError::Read(error)
    }
}

impl From<QueueEnded> for CopyError {
    fn from(_: QueueEnded) -> Self {
        CopyError::Stopped
    }
}

/// The fork of the copy that a fork of the template becomes.
fn of_copy(mut rel: RelTag, target: Database) -> RelTag {
    (rel.node.spc, rel.node.db) = target;
    rel
}

/// Pages, sizes and relation map of a database.
fn keys_of((spc, db): Database) -> KeyRange {
    let start = Key::relmap(spc, db);
    start..Key { field4: u32::MAX, field5: u8::MAX, field6: u32::MAX, ..start }
}

impl<I: Io> Timeline<I> {
    /// Before a record is carried out: writes the pages of a database that it copies into files,
    /// if they are many.
    ///
    /// # Errors
    /// [`TakeInError::Stopped`], [`TakeInError::Ingest`]; nothing has changed.
    pub(super) async fn prepare_copies(
        &self,
        place: Place,
        changes: &[Change],
    ) -> Result<Option<CopiedPages>, TakeInError> {
        let copy = changes.iter().find_map(|change| match change {
            Change::DatabaseCopy { source, target } => Some((*source, *target)),
            _ => None,
        });
        let Some((source, target)) = copy else { return Ok(None) };
        loop {
            let start = place.start;
            let error = match self.prepare_copy(place.end, source, target).await {
                Ok(pages) => {
                    self.part_goes_on(Part::Checkpoint);
                    return Ok(pages);
                }
                Err(CopyError::Stopped) => return Err(TakeInError::Stopped),
                Err(CopyError::Read(cause)) => IngestError::Read { start, cause },
                Err(CopyError::Layer(cause)) => IngestError::Write { start, cause },
            };
            // Whoever opens a timeline must not wait for room: it is opened again later.
            if error.kind() != Kind::Retry || self.replaying.get() {
                return Err(error.into());
            }
            self.part_waits(Part::Checkpoint, format!("{error}; trying again"));
            self.context.io.sleep(Duration::from_millis(CHECKPOINT_RETRY_MS)).await;
            if self.stopping.get() {
                return Err(TakeInError::Stopped);
            }
        }
    }

    async fn prepare_copy(
        &self,
        lsn: Lsn,
        source: Database,
        target: Database,
    ) -> Result<Option<CopiedPages>, CopyError> {
        let template = self.template(source).await?;
        let blocks: u64 = template.forks.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
        let limit = self.context.config.get().checkpoint_distance_bytes;
        if blocks.saturating_mul(PAGE_SIZE as u64) <= limit {
            return Ok(None);
        }
        let keys = keys_of(target);
        if self.has_image(&keys, lsn) {
            return Ok(Some(CopiedPages(Vec::new())));
        }
        self.checkpoint_now().await.map_err(|error| self.not_ready(error))?;
        tracing::info!(
            tenant = %self.tenant, timeline = %self.id,
            "database {} is copied from {} at {lsn}: {blocks} blocks", target.1, source.1
        );
        let (queue, job) = self.image_job(lsn, keys);
        let write = self.context.background.run(move |io: I| job.run(io));
        let (written, sent) = join(write, self.send_copy(template, target, queue)).await;
        match (written.map_err(|_| CopyError::Stopped)?, sent) {
            (Ok(layers), Ok(())) => {
                // No index may name them before the journal has the record.
                while self.lsns().journal < lsn {
                    self.flush_journal().await.map_err(|error| self.not_ready(error))?;
                }
                Ok(Some(CopiedPages(layers)))
            }
            // The queue ends before its time when the job fails, and then that is the reason.
            (_, Err(CopyError::Read(error))) => Err(CopyError::Read(error)),
            (Err(error), _) => Err(CopyError::Layer(error)),
            (Ok(_), Err(error)) => Err(error),
        }
    }

    /// What must be written first cannot be.
    fn not_ready(&self, error: impl std::fmt::Display) -> CopyError {
        match self.stopping.get() || self.broken().is_some() {
            true => CopyError::Stopped,
            false => {
                let reason = error.to_string();
                CopyError::Read(ReadError::NotReady { timeline: self.id, reason })
            }
        }
    }

    /// True if image layers at `lsn` have these keys already.
    fn has_image(&self, keys: &KeyRange, lsn: Lsn) -> bool {
        let mutable = self.mutable.borrow();
        let mut images = mutable.layers.iter().filter(|(span, _)| span.is_image);
        images.any(|(span, _)| span.lsns.start == lsn && span.keys.start == keys.start)
    }

    async fn template(&self, (spc, db): Database) -> Result<Template, ReadError> {
        let lsn = self.lsns().last_record;
        let relmap = self.metadata(Key::relmap(spc, db), lsn).await?.map(|(_, bytes)| bytes);
        let mut forks = Vec::new();
        for rel in self.database_forks(spc, db, lsn).await? {
            forks.push((rel, self.fork_size(rel, lsn).await?.unwrap_or(0)));
        }
        forks.sort_unstable_by_key(|(rel, _)| *rel);
        Ok(Template { relmap, forks })
    }

    /// The template's page.
    async fn copied_page(&self, from: RelTag, block: u32) -> Result<Value, ReadError> {
        let page = self.page(Key::rel_block(from, block), self.lsns().last_record).await?;
        Ok(if page == zero_page() { Value::ZeroPage } else { Value::Image(page) })
    }

    async fn send_copy(
        &self,
        template: Template,
        target: Database,
        queue: ImageQueue,
    ) -> Result<(), CopyError> {
        if let Some(relmap) = template.relmap {
            queue.send(Key::relmap(target.0, target.1), Value::Image(relmap)).await?;
        }
        for (from, blocks) in template.forks {
            let to = of_copy(from, target);
            let read = |block| async move { (block, self.copied_page(from, block).await) };
            let pages = stream::iter(0..blocks).map(read).buffered(IMAGE_READS_CONCURRENT);
            let mut pages = pin!(pages);
            while let Some((block, page)) = pages.next().await {
                if self.stopping.get() {
                    return Err(CopyError::Stopped);
                }
                queue.send(Key::rel_block(to, block), page?).await?;
                self.context.io.yield_if_needed().await;
            }
            let size = Bytes::copy_from_slice(&blocks.to_le_bytes());
            queue.send(Key::rel_size(to), Value::Image(size)).await?;
        }
        Ok(queue.end().await?)
    }

    /// Carries the copy out: `pages` are in files already, or else go into the open layer.
    pub(super) async fn copy_database(
        &self,
        lsn: Lsn,
        source: Database,
        target: Database,
        pages: Option<CopiedPages>,
    ) -> Result<(), ReadError> {
        let template = self.template(source).await?;
        for (from, _) in &template.forks {
            self.load_fork_size(of_copy(*from, target)).await?;
        }
        if pages.is_none() {
            for &(from, blocks) in &template.forks {
                for block in 0..blocks {
                    let (key, value) = (
                        Key::rel_block(of_copy(from, target), block),
                        self.copied_page(from, block).await?,
                    );
                    self.mutable.borrow_mut().open.put(key, lsn, value);
                }
            }
        }
        let mut mutable = self.mutable.borrow_mut();
        mutable.open.put(Key::database(target.0, target.1), lsn, Value::Image(EXISTS));
        if let Some(relmap) = template.relmap {
            mutable.open.put(Key::relmap(target.0, target.1), lsn, Value::Image(relmap));
        }
        let Mutable { open, sizes, .. } = &mut *mutable;
        let mut sink = CountingSink { open, start: lsn, values: 0 };
        let mut apply = Apply { sink: &mut sink, sizes, lsn, skipped: 0 };
        for (from, blocks) in template.forks {
            apply.ensure_fork(of_copy(from, target));
            apply.set_size(of_copy(from, target), blocks);
        }
        drop(mutable);
        self.add_layers(pages.map_or(Vec::new(), |pages| pages.0));
        Ok(())
    }
}
