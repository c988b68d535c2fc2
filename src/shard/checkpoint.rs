//! From memory to files: the journal's flushes and the checkpoint of frozen layers.
//!
//! A checkpoint of one frozen layer:
//! 1. the journal is synced past the layer's end;
//! 2. the background executor writes the delta file and publishes it (sync, rename, sync dir); of
//!    a record that changes several pages each gets what it needs ([`stored_form`]);
//! 3. commit times up to there are written (`timestamps`), then the timeline's index is replaced by one that names the file and moves
//!    `disk_consistent_lsn`;
//! 4. in one synchronous step the file takes the frozen layer's place, which stays in memory for
//!    reads as long as there is room ([`super::memory`]);
//! 5. journal segments that lie wholly before `disk_consistent_lsn` go.
//!
//! A crash before 3 leaves a file that no index names: it is removed at start and made again from
//! the journal. A crash after 3 finds the new state.

use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::select;

use super::health::Part;
use super::index::{INDEX_FILE, IndexLayer};
use super::lsns::Advance;
use super::stored::StoredLayer;
use super::timeline::Timeline;
use crate::base::Lsn;
use crate::io::{Io, TaskClass, durable};
use crate::layers::{FrozenLayer, LayerDesc, LayerOwner};
use crate::limits::{CHECKPOINT_RETRY_MS, LSN_DISTANCE_FACTOR, NO_SPACE_RETRY_MS};
use crate::redo::excerpt::stored_form;
use crate::wal::journal::JournalError;

/// Why a checkpoint failed. It is tried again: the layer is still in memory and its WAL in the
/// journal.
#[derive(Debug, thiserror::Error)]
#[error("checkpoint of {tenant}/{timeline} up to {lsn}: {cause}")]
pub struct CheckpointError {
    tenant: crate::base::TenantShardId,
    timeline: crate::base::TimelineId,
    lsn: Lsn,
    cause: String,
}

impl<I: Io> Timeline<I> {
    /// Starts the tasks that write: journal, checkpoint, compaction.
    pub(super) fn start_writers(self: &Rc<Self>) {
        self.spawn_own(TaskClass::Ingest, Self::journal_loop);
        self.spawn_own(TaskClass::Background, Self::checkpoint_loop);
        self.spawn_own(TaskClass::Background, Self::compaction_loop);
    }

    /// Flushes the journal whenever bytes wait, and notes now and then how far it is synced.
    async fn journal_loop(self: Rc<Self>) {
        loop {
            self.wait_for_journal().await;
            if self.stopping.get() {
                return;
            }
            match self.flush_journal().await {
                Ok(()) => self.mark_if_due().await,
                Err(JournalError::NoSpace(_)) => {
                    self.context.io.sleep(Duration::from_millis(NO_SPACE_RETRY_MS)).await;
                    self.journal_signal.set();
                }
                Err(_) => return,
            }
        }
    }

    /// Writes and syncs what waits in the journal; whoever needs it synced calls this, and flushes
    /// take turns. After an error the timeline is broken and every later call fails at once, unless
    /// there was just no room: then ingest pauses.
    pub(super) async fn flush_journal(&self) -> Result<(), JournalError> {
        let _turn = self.flush_turn.acquire().await;
        let before = self.journal.counters();
        let synced = match self.journal.flush().await {
            Ok(synced) => synced,
            Err(error @ JournalError::NoSpace(_)) => {
                self.part_waits(Part::Journal, format!("the journal cannot be written: {error}"));
                return Err(error);
            }
            Err(error) => {
                let reason = format!("the journal cannot be written: {error}");
                self.set_broken(error.kind(), reason);
                return Err(error);
            }
        };
        self.part_goes_on(Part::Journal);
        let after = self.journal.counters();
        self.context.counters.journal_syncs.add(after.syncs - before.syncs);
        self.context.counters.journal_bytes.add(after.bytes_written - before.bytes_written);
        if synced > self.lsns().journal {
            self.mutable.borrow_mut().journal_synced(synced);
            self.status_signal.set();
        }
        Ok(())
    }

    pub(super) fn part_waits(&self, part: Part, reason: String) {
        let text = reason.clone();
        if self.health.borrow_mut().pause(part, reason) {
            tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{text}");
        }
    }

    pub(super) fn part_goes_on(&self, part: Part) {
        if self.health.borrow_mut().resume(part) {
            tracing::info!(tenant = %self.tenant, timeline = %self.id, "{part:?} goes on");
        }
    }

    /// Freezes the open layer when it is large enough. Between records only.
    pub(super) fn freeze_if_full(&self) {
        let (bytes, distance) = {
            let mutable = self.mutable.borrow();
            let distance = mutable.lsns.last_record.bytes_since(mutable.open.start());
            (mutable.open.memory_bytes() as u64, distance)
        };
        let limit = self.context.config.get().checkpoint_distance_bytes;
        let is_due = bytes >= limit
            || self.memory.is_asked()
            || distance >= limit.saturating_mul(LSN_DISTANCE_FACTOR);
        if is_due && self.may_freeze() {
            self.freeze();
        }
    }

    /// Freezes the open layer when it is old enough. Between records only.
    pub(super) fn freeze_if_old(&self) {
        let age = self.context.io.now() - self.mutable.borrow().open_since;
        let timeout = Duration::from_secs(self.context.config.get().checkpoint_timeout_s);
        if age >= timeout && self.may_freeze() {
            self.freeze();
        }
    }

    /// Freezes the open layer if there is anything new in it. Between records only. The open layer
    /// of a broken timeline may hold parts of a record that failed, which must not reach a file.
    pub(super) fn freeze(&self) {
        assert!(!self.ingesting.get(), "a layer's end would cut a record in two");
        let mut mutable = self.mutable.borrow_mut();
        let end = Lsn(mutable.lsns.last_record.0 + 1);
        if end <= mutable.open.start() || mutable.broken.is_some() {
            return;
        }
        let full = {
            let next = mutable.open.successor(end);
            std::mem::replace(&mut mutable.open, next)
        };
        mutable.open_since = self.context.io.now();
        mutable.frozen.push(full.freeze(end));
        drop(mutable);
        self.memory.done();
        self.note_memory();
        self.history.times.borrow_mut().close_bucket();
        self.checkpoint_signal.set();
    }

    async fn checkpoint_loop(self: Rc<Self>) {
        while !self.stopping.get() {
            let timeout = Duration::from_secs(self.context.config.get().checkpoint_timeout_s);
            let signal = pin!(self.checkpoint_signal.wait());
            select(signal, pin!(self.context.io.sleep(timeout))).await;
            // Nothing may come in that would close the layer of a timeline that is idle.
            if !self.ingesting.get() && !self.stopping.get() {
                self.freeze_if_old();
                self.freeze_if_full();
            }
            while let Err(error) = self.write_frozen_layers().await {
                if self.journal.has_failed() {
                    tracing::error!("{error}");
                    return;
                }
                if self.stopping.get() {
                    return;
                }
                self.part_waits(Part::Checkpoint, format!("{error}; trying again"));
                self.context.io.sleep(Duration::from_millis(CHECKPOINT_RETRY_MS)).await;
                if self.stopping.get() {
                    return;
                }
            }
            // There may have been no place for another frozen layer until now.
            if !self.ingesting.get() && !self.stopping.get() {
                self.freeze_if_full();
            }
        }
    }

    /// Writes all frozen layers, oldest first, each when there is room for an L0 layer.
    pub(super) async fn write_frozen_layers(&self) -> Result<(), CheckpointError> {
        loop {
            let oldest = self.mutable.borrow().frozen.first().cloned();
            let Some(frozen) = oldest else { return Ok(()) };
            if let Err(no_room) = self.wait_for_l0_room().await {
                let lsn = Lsn(frozen.lsns().end.0 - 1);
                let cause = no_room.to_string();
                return Err(CheckpointError { tenant: self.tenant, timeline: self.id, lsn, cause });
            }
            // Others write too; they must not wait for the room.
            let _turn = self.checkpoint_turn.acquire().await;
            if self.abandoned.get() {
                return Ok(());
            }
            let oldest = self.mutable.borrow().frozen.first().cloned();
            if let Some(frozen) = oldest
                && self.has_l0_room()
            {
                self.write_frozen(frozen).await?;
            }
        }
    }

    async fn write_frozen(&self, frozen: Arc<FrozenLayer>) -> Result<(), CheckpointError> {
        let lsn = Lsn(frozen.lsns().end.0 - 1);
        let fail =
            |cause: String| CheckpointError { tenant: self.tenant, timeline: self.id, lsn, cause };
        while self.lsns().journal < lsn {
            self.flush_journal().await.map_err(|error| fail(error.to_string()))?;
        }
        let owner = LayerOwner { shard: self.tenant, timeline: self.id };
        let desc = if frozen.value_count() == 0 {
            None
        } else {
            let (dir, frozen) = (self.context.dir.clone(), frozen.clone());
            let write =
                move |io: I| async move { frozen.write(&io, &dir, owner, stored_form).await };
            let written = self.context.background.run(write).await;
            let written = written.map_err(|error| fail(error.to_string()))?;
            Some(written.map_err(|error| fail(error.to_string()))?)
        };
        let added: Vec<IndexLayer> = desc
            .iter()
            .map(|desc| IndexLayer { name: desc.name.to_string(), len: desc.file_bytes })
            .collect();
        self.write_commit_times(lsn).await.map_err(|error| fail(error.to_string()))?;
        let _turn = self.index_turn.acquire().await;
        let index = self.index_with(&added, lsn).encode();
        durable::write_file_atomic(&self.context.io, &self.context.dir.join(INDEX_FILE), &index)
            .await
            .map_err(|error| fail(error.to_string()))?;
        self.context.counters.index_bytes.add(index.len() as u64);
        self.take_place(&frozen, desc, owner, lsn);
        self.drop_elsewhere(frozen);
        self.part_goes_on(Part::Checkpoint);
        self.compaction.wake(self.l0_count());
        self.context.counters.checkpoints.add(1);
        if let Err(error) = self.journal.remove_before(lsn).await {
            // Old segments cost space only; the next checkpoint tries again.
            tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{error}");
        }
        Ok(())
    }

    /// A layer has very many values; giving their memory back would hold up reads.
    pub(super) fn drop_elsewhere(&self, frozen: Arc<FrozenLayer>) {
        let background = self.context.background.clone();
        self.context.io.spawn(TaskClass::Background, async move {
            // If the executor is gone, it is done here.
            let _ = background.run(move |_| async move { drop(frozen) }).await;
        });
    }

    /// Step 4: the file takes the frozen layer's place.
    fn take_place(
        &self,
        frozen: &Arc<FrozenLayer>,
        desc: Option<LayerDesc>,
        owner: LayerOwner,
        lsn: Lsn,
    ) {
        let mut mutable = self.mutable.borrow_mut();
        if let Some(desc) = desc {
            self.context.counters.layer_bytes.add(desc.file_bytes);
            let layer = StoredLayer::new(&self.context, desc.name, desc.file_bytes, owner);
            layer.stay_in_memory(self.context.memory.keep(frozen.clone()));
            mutable.layers.insert(layer.span(), layer);
            let records = frozen.value_count() * 1000 / frozen.key_count().max(1);
            self.compaction.layer_records_milli.set(records);
            self.context.counters.l0_layers.note(mutable.layers.l0_count() as u64);
        }
        let first = mutable.frozen.remove(0);
        assert!(Arc::ptr_eq(&first, frozen), "frozen layers are written in order");
        mutable.lsns.advance(Advance::DiskConsistent(lsn));
        drop(mutable);
        self.note_memory();
        #[cfg(test)]
        self.note_l0();
    }

    /// Freezes, and waits until all that is ingested by now is in layer files.
    pub(super) async fn checkpoint_now(&self) -> Result<Lsn, CheckpointError> {
        while self.ingesting.get() || !self.may_freeze() {
            self.write_frozen_layers().await?;
            self.context.io.sleep(Duration::from_millis(1)).await;
        }
        self.freeze();
        let lsn = self.lsns().last_record;
        self.write_frozen_layers().await?;
        match self.broken() {
            None => Ok(lsn),
            Some(cause) => {
                Err(CheckpointError { tenant: self.tenant, timeline: self.id, lsn, cause })
            }
        }
    }

    /// Flushes the journal, writes a last checkpoint, closes the files. Ingest has ended before.
    pub(super) async fn shut_down(&self) {
        self.compaction.cancel();
        // A failure is in the log, and the timeline is broken then.
        let _ = self.flush_journal().await;
        if self.broken().is_none()
            && let Err(error) = self.checkpoint_now().await
        {
            tracing::error!("{error}; the journal has what is missing");
        }
        self.abandon().await;
    }

    /// Ends the timeline's tasks and closes its files; writes nothing.
    pub(super) async fn abandon(&self) {
        self.stopping.set(true);
        self.checkpoint_signal.set();
        self.journal_signal.set();
        self.waiters.fail_all();
        self.history.gc_signal.set();
        self.end_compaction().await;
        {
            let _gc = self.history.gc_turn.acquire().await;
            let _lease = self.history.lease_turn.acquire().await;
            // Whoever writes comes to an end first.
            let _checkpoint = self.checkpoint_turn.acquire().await;
            let _flush = self.flush_turn.acquire().await;
            self.end_marking().await;
            self.abandoned.set(true);
        }
        let layers: Vec<_> =
            self.mutable.borrow().layers.iter().map(|(_, layer)| layer.clone()).collect();
        for layer in layers {
            if let Some(in_memory) = layer.leave_memory() {
                self.drop_elsewhere(in_memory);
            }
            if let Err(error) = layer.close().await {
                tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{error}");
            }
        }
        self.close_doomed().await;
        if let Err(error) = self.journal.close().await {
            tracing::warn!(tenant = %self.tenant, timeline = %self.id, "{error}");
        }
    }
}
