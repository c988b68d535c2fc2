//! Taking in WAL records: decode, learn the sizes they need, carry out their changes, publish.
//!
//! For each record:
//! 1. [`decode_into`] turns it into changes (pure);
//! 2. sizes of the forks that it touches are read from the layers, unless they are known, as they
//!    nearly always are: then nothing waits;
//! 3. [`Apply`] carries the changes out in the open layer, in one synchronous step;
//! 4. `last_record_lsn` moves, and readers that wait for it wake up.
//!
//! A record that only changes blocks that are there, as most do, goes into the open layer directly.
//!
//! Records for which nothing waits are taken in by the slice: the steps of all of them run without
//! a pause, and the last step once for all.
//!
//! Only copying a database file by file ([`super::copy_database`]) takes several steps, all of them
//! below the new `last_record_lsn`, so that no reader sees a half-made database. While a record is under way
//! (`ingesting`) the open layer is not frozen: its end must not cut a record in two.

use bytes::Bytes;

use super::apply::{Apply, ApplyError, Sink, touched_forks};
use super::copy_database::CopiedPages;
use super::follow::TakeInError;
use super::lsns::Advance;
use super::reader::ReadError;
use super::sizes::Sizes;
use super::timeline::{Mutable, Timeline};
use crate::base::{Key, Kind, Lsn, RelTag, SlruKind, Value};
use crate::io::Io;
use crate::layers::{LayerError, OpenLayer};
use crate::limits::INGEST_SLICE_RECORDS;
use crate::wal::change::{Change, Parameters};
use crate::wal::checkpoint::Checkpoint;
use crate::wal::control_file;
use crate::wal::decode::{DecodeError, decode_into, decode_or_take, page_in_record};

use crate::wal::stream::{Event, StreamRecord};

/// Why a record could not be ingested. Ingest of the timeline stops; nothing is skipped.
#[derive(Debug, thiserror::Error)]
pub enum IngestError {
    /// The record makes no sense.
    #[error("WAL record at {start}: {cause}")]
    Decode {
        /// Start of the record.
        start: Lsn,
        /// What is wrong.
        cause: DecodeError,
    },
    /// The record asks for something that cannot be done.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// State that the record needs cannot be read.
    #[error("WAL record at {start} needs what cannot be read: {cause}")]
    Read {
        /// Start of the record.
        start: Lsn,
        /// What is wrong.
        cause: ReadError,
    },
    /// What the record makes cannot be written.
    #[error("what the WAL record at {start} makes cannot be written: {cause}")]
    Write {
        /// Start of the record.
        start: Lsn,
        /// What is wrong.
        cause: LayerError,
    },
}

impl IngestError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            IngestError::Decode { .. } | IngestError::Apply(_) => Kind::Corrupt,
            IngestError::Read { cause, .. } => cause.kind(),
            IngestError::Write { cause, .. } => cause.kind(),
        }
    }
}

/// Counts values on their way into the open layer.
pub(super) struct CountingSink<'a> {
    pub(super) open: &'a mut OpenLayer,
    /// Start of the record that is being carried out.
    pub(super) start: Lsn,
    pub(super) values: u64,
}

impl Sink for CountingSink<'_> {
    fn put(&mut self, key: Key, lsn: Lsn, value: Value) {
        self.open.put(key, lsn, value);
        self.values += 1;
    }

    fn put_record(&mut self, key: Key, lsn: Lsn, will_init: bool) {
        self.open.put_record(key, lsn, self.start, will_init);
        self.values += 1;
    }

    fn put_page(&mut self, key: Key, lsn: Lsn) {
        self.open.put_page(key, lsn, self.start, page_in_record);
        self.values += 1;
    }
}

/// Where a record stands: its start, and the LSN of its changes.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) start: Lsn,
    pub(super) end: Lsn,
}

/// Counts of what was carried out.
#[derive(Clone, Copy, Default)]
struct Done {
    records: u64,
    values: u64,
    skipped: u64,
}

/// Why a slice of records ended.
enum SliceEnd {
    /// Others have their turn.
    Pause,
    /// This record cannot be carried out at once.
    Wait(StreamRecord),
    /// All bytes are used up.
    NeedInput,
}

/// True when [`Mutable::apply`] can carry out these changes without anything being read.
fn is_ready_for(sizes: &Sizes, changes: &[Change]) -> bool {
    changes.iter().all(|change| match change {
        Change::DatabaseCopy { .. } | Change::DatabaseDrop { .. } | Change::Parameters(_) => false,
        other => {
            let mut known = true;
            touched_forks(other, |rel| known &= sizes.rel(rel).is_some());
            known
        }
    })
}

impl<I: Io> Mutable<I> {
    /// Carries out changes of the record at `place`.
    fn apply(
        &mut self,
        place: Place,
        changes: impl IntoIterator<Item = Change>,
        done: &mut Done,
    ) -> Result<(), ApplyError> {
        let lsn = place.end;
        let mut sink = CountingSink { open: &mut self.open, start: place.start, values: 0 };
        let sizes = &mut self.sizes;
        let mut apply = Apply { sink: &mut sink, sizes, lsn, skipped: 0 };
        let mut checkpoint_changed = false;
        for change in changes {
            match change {
                Change::Checkpoint(news) => {
                    let checkpoint = self.checkpoint.as_mut().ok_or(ApplyError::NotLoaded)?;
                    checkpoint_changed |= checkpoint.apply(&news);
                }
                other => apply.change(other)?,
            }
        }
        done.skipped += apply.skipped;
        if let Some(checkpoint) = self.checkpoint.as_ref().filter(|_| checkpoint_changed) {
            let bytes = Bytes::copy_from_slice(&checkpoint.encode());
            sink.put(Key::CHECKPOINT, lsn, Value::Image(bytes));
        }
        done.values += sink.values;
        Ok(())
    }
}

impl<I: Io> Timeline<I> {
    /// Holds WAL that comes in next; gives the same bytes in the memory in which they are held.
    /// [`Timeline::ingest_bytes`] follows.
    pub(super) fn hold(&self, bytes: Bytes) -> Bytes {
        let mut mutable = self.mutable.borrow_mut();
        let (start, boundary) = (mutable.wal.position(), mutable.lsns.last_record);
        mutable.open.hold_wal(start, bytes, boundary)
    }

    /// Ingests every record that is whole with `bytes`, which continue what was given before and
    /// were given to [`Timeline::hold`].
    pub(super) async fn ingest_bytes(&self, bytes: Bytes) -> Result<(), TakeInError> {
        self.freeze_if_old();
        let mut rest = &bytes[..];
        loop {
            match self.ingest_slice(&mut rest)? {
                SliceEnd::NeedInput => {
                    self.note_memory();
                    return Ok(());
                }
                SliceEnd::Wait(record) => self.ingest(&record).await?,
                SliceEnd::Pause => {}
            }
            self.freeze_if_full();
            if !self.wait_for_memory().await {
                return Err(TakeInError::Stopped);
            }
            self.context.io.yield_if_needed().await;
        }
    }

    /// Ingests records for which nothing waits, up to the end of the slice.
    fn ingest_slice(&self, bytes: &mut &[u8]) -> Result<SliceEnd, TakeInError> {
        let limit = self.context.config.get().checkpoint_distance_bytes;
        // The list is kept from slice to slice, for its memory.
        let mut changes = self.changes.take();
        let mut done = Done::default();
        let mut mutable = self.mutable.borrow_mut();
        let before = mutable.lsns.last_record;
        let mut last = before;
        let result = loop {
            changes.clear();
            let full = mutable.open.memory_bytes() as u64 >= limit;
            if done.records >= INGEST_SLICE_RECORDS as u64 || full && done.records > 0 {
                break Ok(SliceEnd::Pause);
            }
            match self.ingest_next(&mut mutable, bytes, &mut changes, &mut done) {
                Ok(Ok(end)) => last = end,
                Ok(Err(why)) => break Ok(why),
                Err(error) => break Err(error),
            }
        };
        self.changes.set(changes);
        if last > before {
            mutable.lsns.advance(Advance::LastRecord(last));
            mutable.sizes.trim();
        }
        drop(mutable);
        self.count(done);
        if last > before {
            self.waiters.wake(last);
        }
        result
    }

    /// Ingests the next record and gives its end, if nothing waits for it.
    fn ingest_next(
        &self,
        mutable: &mut Mutable<I>,
        bytes: &mut &[u8],
        changes: &mut Vec<Change>,
        done: &mut Done,
    ) -> Result<Result<Lsn, SliceEnd>, TakeInError> {
        let Mutable { wal, open, sizes, checkpoint, .. } = mutable;
        let StreamRecord { start, end, bytes: record } = match wal.next_slice(bytes)? {
            Event::Record(record) => record,
            Event::NeedInput => return Ok(Err(SliceEnd::NeedInput)),
            Event::EndOfWal => {
                let at = wal.boundary();
                return Err(TakeInError::Zeros { at });
            }
        };
        let mut taken = false;
        decode_or_take(record, start, end, changes, |plain| {
            let mut sink = CountingSink { open, start, values: 0 };
            let mut apply = Apply { sink: &mut sink, sizes, lsn: end, skipped: 0 };
            let knows = |known: &Checkpoint| known.is_past(plain.header.xid);
            taken = checkpoint.as_ref().is_some_and(knows) && apply.plain(plain);
            done.values += sink.values;
            taken
        })
        .map_err(|cause| IngestError::Decode { start, cause })?;
        if taken {
            done.records += 1;
            return Ok(Ok(end));
        }
        if !is_ready_for(sizes, changes) {
            let bytes = Bytes::copy_from_slice(record);
            return Ok(Err(SliceEnd::Wait(StreamRecord { start, end, bytes })));
        }
        self.history.note_commits(end, changes);
        mutable.apply(Place { start, end }, changes.drain(..), done).map_err(IngestError::Apply)?;
        done.records += 1;
        Ok(Ok(end))
    }

    /// Ingests a record for which something may wait. Called for one record at a time, in WAL
    /// order.
    async fn ingest(&self, record: &StreamRecord) -> Result<(), TakeInError> {
        let StreamRecord { start, end, ref bytes } = *record;
        let mut changes = Vec::new();
        decode_into(bytes, start, end, &mut changes)
            .map_err(|cause| IngestError::Decode { start, cause })?;
        let place = Place { start, end };
        let copied = self.prepare_copies(place, &changes).await?;
        self.history.note_commits(end, &changes);
        self.ingesting.set(true);
        let result = self.carry_out(place, changes, copied).await;
        self.ingesting.set(false);
        result.map_err(|error| match error {
            CarryOutError::Apply(error) => IngestError::Apply(error),
            CarryOutError::Read(cause) => IngestError::Read { start, cause },
        })?;
        let mut mutable = self.mutable.borrow_mut();
        mutable.lsns.advance(Advance::LastRecord(end));
        mutable.sizes.trim();
        drop(mutable);
        self.count(Done { records: 1, ..Done::default() });
        self.waiters.wake(end);
        Ok(())
    }

    fn count(&self, done: Done) {
        self.context.counters.wal_records.add(done.records);
        self.context.counters.values.add(done.values);
        self.context.counters.changes_skipped.add(done.skipped);
    }

    async fn carry_out(
        &self,
        place: Place,
        changes: Vec<Change>,
        mut copied: Option<CopiedPages>,
    ) -> Result<(), CarryOutError> {
        let lsn = place.end;
        let mut ready = Vec::with_capacity(changes.len());
        for change in changes {
            match change {
                Change::DatabaseCopy { source, target } => {
                    self.apply_now(place, ready.drain(..))?;
                    self.drop_database(lsn, target.1, &[target.0]).await?;
                    self.copy_database(lsn, source, target, copied.take()).await?;
                }
                Change::DatabaseDrop { db, spcs } => {
                    self.apply_now(place, ready.drain(..))?;
                    self.drop_database(lsn, db, &spcs).await?;
                }
                Change::Parameters(parameters) => self.set_parameters(lsn, parameters).await?,
                other => {
                    let mut forks = Vec::new();
                    touched_forks(&other, |rel| forks.push(rel));
                    for rel in forks {
                        self.load_fork_size(rel).await?;
                    }
                    ready.push(other);
                }
            }
        }
        Ok(self.apply_now(place, ready)?)
    }

    fn apply_now(
        &self,
        place: Place,
        changes: impl IntoIterator<Item = Change>,
    ) -> Result<(), ApplyError> {
        let mut done = Done::default();
        self.mutable.borrow_mut().apply(place, changes, &mut done)?;
        self.count(done);
        Ok(())
    }

    /// Makes the newest size of a fork known to [`super::sizes::Sizes`].
    pub(super) async fn load_fork_size(&self, rel: RelTag) -> Result<(), ReadError> {
        let lsn = {
            let mutable = self.mutable.borrow();
            if mutable.sizes.rel(rel).is_some() {
                return Ok(());
            }
            mutable.lsns.last_record
        };
        let stored = self.stored_u32(Key::rel_size(rel), lsn).await?;
        let mut mutable = self.mutable.borrow_mut();
        match stored {
            Some((since, blocks)) => mutable.sizes.loaded(rel, Some(blocks), since),
            None => mutable.sizes.loaded(rel, None, lsn),
        }
        Ok(())
    }

    /// Reads sizes of all SLRU segments; once, before the first record.
    pub(super) async fn load_slru_sizes(&self) -> Result<(), ReadError> {
        let lsn = self.lsns().last_record;
        for kind in SlruKind::ALL {
            for (key, (_, value)) in self.scan(&Key::slru_dir_range(kind), lsn).await? {
                let exists = matches!(&value, Value::Image(bytes) if !bytes.is_empty());
                let Some((kind, segment)) = key.as_slru_dir().filter(|_| exists) else { continue };
                let size = self.stored_u32(Key::slru_size(kind, segment), lsn).await?;
                let blocks = size.map(|(_, blocks)| blocks);
                self.mutable.borrow_mut().sizes.set_slru(kind, segment, blocks);
            }
        }
        Ok(())
    }

    /// Reads positions of all replication origins; once, before the first record.
    pub(super) async fn load_origins(&self) -> Result<(), ReadError> {
        let lsn = self.lsns().last_record;
        for (key, (_, value)) in self.scan(&Key::replication_origin_all(), lsn).await? {
            let Value::Image(bytes) = value else { continue };
            if let Ok(position) = <[u8; 8]>::try_from(&bytes[..]) {
                let position = Lsn(u64::from_le_bytes(position));
                let id = key.field6 as u16;
                self.mutable.borrow_mut().sizes.set_origin(id, Some(position));
            }
        }
        Ok(())
    }

    /// Settings of the source that `pg_control` records.
    async fn set_parameters(&self, lsn: Lsn, new: Parameters) -> Result<(), CarryOutError> {
        let hints = self.cluster.data_checksums || new.wal_log_hints;
        if hints != self.cluster.hint_bits_logged {
            tracing::warn!(
                tenant = %self.tenant, timeline = %self.id,
                "wal_log_hints changed on the primary at {lsn}: LSNs of heap pages that VACUUM \
                 touches may differ from the primary's until the timeline is attached anew"
            );
        }
        let read_lsn = self.lsns().last_record;
        let Some((_, control)) = self.metadata(Key::CONTROL_FILE, read_lsn).await? else {
            return Ok(());
        };
        let changed = control_file::with_parameters(&control, &new);
        let mut mutable = self.mutable.borrow_mut();
        mutable.open.put(Key::CONTROL_FILE, lsn, Value::Image(changed));
        Ok(())
    }

    /// `dbase_redo` of `XLOG_DBASE_DROP`: every fork goes, then the database itself.
    async fn drop_database(&self, lsn: Lsn, db: u32, spcs: &[u32]) -> Result<(), CarryOutError> {
        let read_lsn = self.lsns().last_record;
        for &spc in spcs {
            let forks = self.database_forks(spc, db, read_lsn).await?;
            for &rel in &forks {
                self.load_fork_size(rel).await?;
            }
            let known = self.metadata(Key::database(spc, db), read_lsn).await?.is_some();
            let mut mutable = self.mutable.borrow_mut();
            let Mutable { open, sizes, .. } = &mut *mutable;
            let mut sink = CountingSink { open, start: lsn, values: 0 };
            let mut apply = Apply { sink: &mut sink, sizes, lsn, skipped: 0 };
            forks.into_iter().for_each(|rel| apply.drop_fork(rel));
            if known {
                for key in [Key::database(spc, db), Key::relmap(spc, db)] {
                    sink.put(key, lsn, Value::Image(Bytes::new()));
                }
            }
            self.context.counters.values.add(sink.values);
        }
        Ok(())
    }
}

/// An error without the record's position.
enum CarryOutError {
    Apply(ApplyError),
    Read(ReadError),
}

impl From<ApplyError> for CarryOutError {
    fn from(error: ApplyError) -> Self {
        CarryOutError::Apply(error)
    }
}

impl From<ReadError> for CarryOutError {
    fn from(error: ReadError) -> Self {
        CarryOutError::Read(error)
    }
}
