//! The logical size of a timeline: the sum of the sizes of all relation forks at
//! `last_record_lsn`.
//!
//! The first look starts a task that adds the sizes up once, at the LSN of that moment. From then
//! on the sum is kept by what ingest says of every size that it changes ([`super::sizes`]).

use std::rc::Rc;

use super::reader::ReadError;
use super::timeline::{LogicalBase, Mutable, Timeline};
use crate::base::page::PAGE_SIZE;
use crate::base::{Key, Lsn, RelTag, Value};
use crate::io::{Io, TaskClass};

impl<I: Io> Timeline<I> {
    /// The size in bytes, if it is known.
    pub(super) fn logical_bytes(&self, mutable: &Mutable<I>) -> Option<u64> {
        let LogicalBase::Known(base) = self.logical_base.get() else { return None };
        let blocks = base.saturating_add(mutable.sizes.growth());
        Some(u64::try_from(blocks).unwrap_or(0).saturating_mul(PAGE_SIZE as u64))
    }

    /// The size when the timeline was closed. All that it had then was in layer files, so the
    /// sizes have grown since by what came from the journal, if anything.
    pub(super) fn recall_logical_size(&self, bytes: Option<u64>) {
        if let Some(bytes) = bytes {
            let blocks = bytes / PAGE_SIZE as u64;
            self.logical_base.set(LogicalBase::Known(blocks.cast_signed()));
        }
    }

    /// What is shown of layers agrees with the layers; for tests.
    #[cfg(test)]
    pub(crate) fn check_totals(&self) -> Result<(), String> {
        let mutable = self.mutable.borrow();
        let (info, counted) = (mutable.layers.totals(), mutable.layers.recount());
        match (info.layer_bytes(), info.history_bytes()) {
            kept if kept == counted => Ok(()),
            kept => Err(format!("{} keeps sizes {kept:?}, counted anew {counted:?}", self.id)),
        }
    }

    /// Starts to add up the sizes, unless that was done.
    pub(super) fn want_logical_size(self: &Rc<Self>) {
        let readable = self.lsns().last_record >= self.start_lsn() && !self.gate.is_closed();
        if readable && self.logical_base.get() == LogicalBase::Unknown {
            self.logical_base.set(LogicalBase::Adding);
            self.context.io.spawn(TaskClass::Background, self.clone().add_up_sizes());
        }
    }

    async fn add_up_sizes(self: Rc<Self>) {
        // In the middle of a record, growth and LSN do not belong together.
        while self.ingesting.get() && !self.stopping.get() {
            self.context.io.sleep(std::time::Duration::from_millis(1)).await;
        }
        let (lsn, growth) = {
            let mutable = self.mutable.borrow();
            (mutable.lsns.last_record, mutable.sizes.growth())
        };
        let base = match self.sum_of_sizes(lsn).await {
            Ok(Some(blocks)) => LogicalBase::Known(blocks - growth),
            Ok(None) => LogicalBase::Unknown,
            Err(error) => {
                tracing::warn!(tenant = %self.tenant, timeline = %self.id, "logical size: {error}");
                LogicalBase::Unknown
            }
        };
        self.logical_base.set(base);
    }

    /// Blocks of all relations at `lsn`; `None` when the timeline goes away meanwhile.
    pub(crate) async fn sum_of_sizes(&self, lsn: Lsn) -> Result<Option<i64>, ReadError> {
        let mut blocks = 0i64;
        for rel in self.all_forks(lsn).await? {
            let Some(_read) = self.gate.enter().filter(|_| !self.stopping.get()) else {
                return Ok(None);
            };
            blocks += i64::from(self.fork_size(rel, lsn).await?.unwrap_or(0));
            self.context.io.yield_if_needed().await;
        }
        Ok(Some(blocks))
    }

    /// Every fork of every relation at `lsn`, in key order. Memory: 20 bytes for each, and for a
    /// moment what the directory holds.
    pub(super) async fn all_forks(&self, lsn: Lsn) -> Result<Vec<RelTag>, ReadError> {
        let _read = self.gate.enter().ok_or_else(|| self.gone())?;
        let exists = |value: &Value| matches!(value, Value::Image(bytes) if !bytes.is_empty());
        let entries = self.scan(&Key::rel_dir_all(), lsn).await?.into_iter();
        Ok(entries
            .filter(|(_, (_, value))| exists(value))
            .filter_map(|(key, _)| key.as_rel_dir())
            .collect())
    }
}
