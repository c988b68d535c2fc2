//! Chains of records: natively where that goes, by the wal-redo child where it does not.
//!
//! [`NativeRedo`] stands before another redo service. A chain is cut into runs: records that are
//! applied here, then records that are not, then records that are again. Only the latter, with
//! the page as it is before them, go to the other service. A chain without such records never
//! gets there, so no process is started for it.
//!
//! A record goes to the other service
//! - if records of its kind are not applied here;
//! - if it does not fit the page: what was applied before it is applied anew then, because the
//!   attempt may have left the page half changed;
//! - if it carries an image of the page after it for comparison (`wal_consistency_checking`):
//!   the child compares, masked as PostgreSQL masks.

use std::cell::OnceCell;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_lite::future::yield_now;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::{NotNative, apply_bytes, is_foreign};
use crate::base::page::{PAGE_SIZE, Page};
use crate::base::seldom::Seldom;
use crate::base::{BlockNumber, Lsn, RelTag};
use crate::limits::REDO_NATIVE_SLICE_RECORDS;
use crate::redo::histogram::{Count, Histogram};
use crate::redo::{Redo, RedoError, RedoRequest, RedoSettings, record as check};
use crate::wal::record::rmgr_id;

/// Record types that have counters of their own: 16 of each built-in resource manager.
pub const TYPES: usize = 16 * (rmgr_id::BUILTIN_MAX as usize + 1);

/// What happened so far: counted by one executor, read by any.
#[derive(Debug)]
pub struct NativeCounters {
    /// Records applied natively, by type (see [`NativeCounters::types`]). A record counts once
    /// for each page.
    pub native: [Count; TYPES],
    /// Records left to the other service, by type.
    pub child: [Count; TYPES],
    /// Of these, records that are of a kind that is applied natively, but did not fit their page.
    pub misfits: Count,
    /// Pages rebuilt without the other service.
    pub pages_native: Count,
    /// Pages for which the other service was needed.
    pub pages_child: Count,
    /// Time to rebuild a page, in nanoseconds.
    pub time_ns: Histogram,
    /// Records of one request.
    pub records: Histogram,
    /// Bytes of those.
    pub bytes: Histogram,
}

impl Default for NativeCounters {
    fn default() -> Self {
        NativeCounters {
            native: [const { Count::new() }; TYPES],
            child: [const { Count::new() }; TYPES],
            misfits: Count::new(),
            pages_native: Count::new(),
            pages_child: Count::new(),
            time_ns: Histogram::default(),
            records: Histogram::default(),
            bytes: Histogram::default(),
        }
    }
}

fn add(counter: Option<&Count>) {
    if let Some(counter) = counter {
        counter.add(1);
    }
}

impl NativeCounters {
    /// Every record type that was seen: `xl_rmid` and the resource manager's part of `xl_info`;
    /// how many were applied natively, and how many were not.
    pub fn types(&self) -> impl Iterator<Item = ((u8, u8), u64, u64)> + '_ {
        let types = self.native.iter().zip(&self.child).zip(0u16..);
        types.filter(|((native, child), _)| native.get() + child.get() > 0).map(
            |((native, child), at)| {
                (((at / 16) as u8, (at % 16 * 16) as u8), native.get(), child.get())
            },
        )
    }

    /// Sum over all record types.
    pub fn native_records(&self) -> u64 {
        self.native.iter().map(Count::get).sum()
    }

    /// Sum over all record types.
    pub fn child_records(&self) -> u64 {
        self.child.iter().map(Count::get).sum()
    }
}

/// Applies records natively, and has `inner` apply what is left.
pub struct NativeRedo<R> {
    inner: R,
    settings: RedoSettings,
    counters: Arc<NativeCounters>,
}

/// Records that are not applied natively.
struct Foreign {
    /// The first of them, counted from the first record that was tried.
    at: usize,
    /// The page may be half changed.
    misfit: bool,
}

/// The page that records are applied to.
#[derive(Clone, Copy)]
struct Target {
    rel: RelTag,
    block: BlockNumber,
}

impl Target {
    fn pair(self) -> (RelTag, BlockNumber) {
        (self.rel, self.block)
    }
}

/// The counter of a record's type: `xl_info` is byte 16 of a record, `xl_rmid` byte 17.
fn counter<'a>(counters: &'a [Count], record: &[u8]) -> Option<&'a Count> {
    let (info, rmgr) = (record.get(16)?, record.get(17)?);
    counters.get(16 * usize::from(*rmgr) + usize::from(info >> 4))
}

impl<R: Redo> NativeRedo<R> {
    /// `settings` are those of `inner`.
    pub fn new(inner: R, settings: RedoSettings) -> Self {
        Self::counting(inner, settings, Arc::default())
    }

    /// As [`NativeRedo::new`]; counts in `counters`, which nobody else may count in.
    pub fn counting(inner: R, settings: RedoSettings, counters: Arc<NativeCounters>) -> Self {
        NativeRedo { inner, settings, counters }
    }

    /// The service behind.
    pub fn inner(&self) -> &R {
        &self.inner
    }

    /// What happened so far.
    pub fn counters(&self) -> &NativeCounters {
        &self.counters
    }

    async fn rebuild(&self, request: RedoRequest) -> Result<Bytes, RedoError> {
        let RedoRequest { rel, block, mut base, records } = request;
        if records.is_empty() {
            return Err(RedoError::NoRecords { rel, block });
        }
        let target = Target { rel, block };
        let mut page = start(target, base.as_ref())?;
        let (mut from, mut next, mut needed_child) = (0, 0, false);
        while next < records.len() {
            let stop = records.len().min(next + REDO_NATIVE_SLICE_RECORDS);
            let slice = records.get(next..stop).unwrap_or_default();
            let Some(foreign) = self.slice(&mut page, target, slice)? else {
                next = stop;
                if next < records.len() {
                    yield_now().await;
                }
                continue;
            };
            let at = next + foreign.at;
            if foreign.misfit {
                page = start(target, base.as_ref())?;
                self.again(&mut page, target, records.get(from..at).unwrap_or_default())?;
            }
            let rest = records.get(at..).unwrap_or_default();
            let run = rest.get(..self.foreign_run(target, rest)).unwrap_or_default();
            let before = (at > 0 || base.is_some()).then(|| Bytes::copy_from_slice(&page[..]));
            let request = RedoRequest { rel, block, base: before, records: run.to_vec() };
            base = Some(self.inner.redo(request).await?);
            needed_child = true;
            page = start(target, base.as_ref())?;
            from = at + run.len();
            next = from;
        }
        add(Some(match needed_child {
            true => &self.counters.pages_child,
            false => &self.counters.pages_native,
        }));
        let page: Box<[u8]> = page;
        Ok(Bytes::from(page))
    }

    /// Applies records as far as that goes; says where it does not.
    fn slice(
        &self,
        page: &mut Page,
        target: Target,
        records: &[(Lsn, Bytes)],
    ) -> Result<Option<Foreign>, RedoError> {
        for (at, (lsn, bytes)) in records.iter().enumerate() {
            check::check(*lsn, target.rel, target.block, bytes)?;
            match apply_bytes(page, bytes, target.pair(), *lsn, &self.settings) {
                Ok(_) => add(counter(&self.counters.native, bytes)),
                Err(NotNative::Unsupported { .. }) => {
                    return Ok(Some(Foreign { at, misfit: false }));
                }
                Err(NotNative::Misfit(what)) => {
                    add(Some(&self.counters.misfits));
                    say_misfit(target, *lsn, what);
                    return Ok(Some(Foreign { at, misfit: true }));
                }
            }
        }
        Ok(None)
    }

    /// Applies records that were applied before.
    fn again(
        &self,
        page: &mut Page,
        target: Target,
        records: &[(Lsn, Bytes)],
    ) -> Result<(), RedoError> {
        for (lsn, bytes) in records {
            let Target { rel, block } = target;
            let bad = |problem| RedoError::BadRecord { lsn: *lsn, rel, block, problem };
            apply_bytes(page, bytes, target.pair(), *lsn, &self.settings)
                .map_err(|error| bad(error.to_string()))?;
        }
        Ok(())
    }

    /// How many records of a row that begins with a foreign one are to go to the other service:
    /// up to the next one that may be applied here. Counts them.
    fn foreign_run(&self, target: Target, records: &[(Lsn, Bytes)]) -> usize {
        let foreign = |bytes: &Bytes| is_foreign(bytes, target.pair());
        let len = records.iter().skip(1).take_while(|(_, bytes)| foreign(bytes)).count() + 1;
        for (_, bytes) in records.iter().take(len) {
            add(counter(&self.counters.child, bytes));
        }
        len
    }
}

impl<R: Redo> Redo for NativeRedo<R> {
    #[allow(clippy::disallowed_methods, reason = "it measures; nothing depends on the time")]
    fn redo(&self, request: RedoRequest) -> LocalBoxFuture<'_, Result<Bytes, RedoError>> {
        async move {
            let begin = Instant::now();
            self.counters.records.count(request.records.len() as u64);
            let bytes: usize = request.records.iter().map(|(_, record)| record.len()).sum();
            self.counters.bytes.count(bytes as u64);
            let page = self.rebuild(request).await;
            self.counters.time_ns.count(begin.elapsed().as_nanos() as u64);
            page
        }
        .boxed_local()
    }

    fn stop(&self) -> LocalBoxFuture<'_, ()> {
        self.inner.stop()
    }
}

/// A chain that fits its page in no place may be asked for as often as a client likes.
#[allow(clippy::disallowed_methods, reason = "nothing but a line of the log depends on the time")]
fn say_misfit(target: Target, lsn: Lsn, what: &str) {
    thread_local! {
        static MISFITS: (OnceCell<Instant>, Seldom) = Default::default();
    }
    let others = MISFITS.with(|(begin, seldom)| {
        let begin = begin.get_or_init(Instant::now);
        seldom.pass(begin.elapsed())
    });
    let Some(others) = others else { return };
    let Target { rel, block } = target;
    tracing::warn!(%rel, block, %lsn, what, others_since = others, "left to the wal-redo process");
}

fn start(target: Target, base: Option<&Bytes>) -> Result<Box<Page>, RedoError> {
    let Some(base) = base else { return Ok(Box::new([0; PAGE_SIZE])) };
    <Box<Page>>::try_from(base.to_vec()).map_err(|bytes| RedoError::Refused {
        rel: target.rel,
        block: target.block,
        message: format!("the base page has {} bytes", bytes.len()),
    })
}
