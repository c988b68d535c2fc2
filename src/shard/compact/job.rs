//! What the jobs of compaction share: where they work, how they end early, how they fail.

use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;

use super::points::Points;
use crate::base::page::PAGE_SIZE;
use crate::base::{Key, Kind, Lsn};
use crate::io::{Io, IoError};
use crate::layers::{LayerDesc, LayerError, LayerOwner, Values};
use crate::limits::COMPACT_FAILURES_LOGGED;
use crate::redo::{Redo, RedoError, RedoMaker, plan};
use crate::shard::background::BackgroundStopped;

/// Why a compaction failed. Nothing is lost by it; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum CompactError {
    /// A layer cannot be read or written.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The index cannot be written.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A page cannot be rebuilt, and it is not the page's fault.
    #[error(transparent)]
    Redo(#[from] RedoError),
    /// The background executor is gone.
    #[error(transparent)]
    Background(#[from] BackgroundStopped),
    /// The layers that were merged are no longer those of the timeline.
    #[error("the layers changed while they were being merged")]
    Changed,
    /// None of the pages that need an image can be rebuilt.
    #[error("none of the pages that need an image can be rebuilt")]
    Nothing,
    /// The timeline stops.
    #[error("the timeline stops")]
    Cancelled,
}

impl CompactError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            CompactError::Layer(error) => error.kind(),
            CompactError::Io(error) => error.kind(),
            CompactError::Redo(error) => error.kind(),
            CompactError::Changed => Kind::Retry,
            CompactError::Nothing => Kind::Corrupt,
            CompactError::Background(_) | CompactError::Cancelled => Kind::Shutdown,
        }
    }
}

/// What the serve executor tells a job that runs.
#[derive(Default)]
pub struct Flags {
    cancelled: AtomicBool,
    hurried: AtomicBool,
}

impl Flags {
    /// The job shall end, and leave nothing.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Other work waits: the job shall end with what it has, if it can.
    pub fn hurry(&self, on: bool) {
        self.hurried.store(on, Ordering::Relaxed);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(super) fn is_hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }
}

/// What every job needs; handed to the background executor.
pub(super) struct JobBase {
    pub(super) owner: LayerOwner,
    pub(super) dir: PathBuf,
    /// Layers are cut at this size, in bytes.
    pub(super) target_bytes: u64,
    /// Pages can be rebuilt from this LSN on.
    pub(super) start_lsn: Lsn,
    pub(super) redo: RedoMaker,
    pub(super) flags: Arc<Flags>,
}

/// What a job has made.
#[derive(Default)]
pub(super) struct Made {
    pub(super) layers: Vec<LayerDesc>,
    /// Pages that were rebuilt.
    pub(super) pages: u64,
    /// Pages that could not be rebuilt.
    pub(super) failures: u64,
    /// Why the job ended before its time; what it had made by then is good.
    pub(super) error: Option<CompactError>,
}

/// Rebuilds pages for a job.
pub(super) struct Pages<I: Io> {
    pub(super) points: Points<I>,
    pub(super) redo: Rc<dyn Redo>,
    pub(super) made: Cell<u64>,
    pub(super) failures: Cell<u64>,
}

impl<I: Io> Pages<I> {
    pub(super) fn new(points: Points<I>, redo: Rc<dyn Redo>) -> Self {
        Pages { points, redo, made: Cell::new(0), failures: Cell::new(0) }
    }

    /// The page after `values`, which ascend and begin with a base.
    pub(super) async fn rebuild(&self, key: Key, values: Values) -> Result<Bytes, RedoError> {
        let lsn = values.last().map_or(Lsn(0), |(lsn, _)| *lsn);
        let bad = |problem: String| {
            let (rel, block) = plan::name(key);
            RedoError::BadRecord { lsn, rel, block, problem }
        };
        if !values.first().is_some_and(|(_, value)| value.is_base()) {
            return Err(bad("no base version was found in any layer".to_owned()));
        }
        let page = plan::rebuild(&*self.redo, key, None, values).await?;
        if page.len() != PAGE_SIZE {
            return Err(bad(format!("the page has {} bytes", page.len())));
        }
        self.made.set(self.made.get() + 1);
        Ok(page)
    }

    /// Notes a page that could not be rebuilt.
    pub(super) fn failed(&self, key: Key, error: &dyn std::fmt::Display) {
        self.failures.set(self.failures.get() + 1);
        // One damaged block may be what very many pages need.
        match self.failures.get() {
            ..COMPACT_FAILURES_LOGGED => {
                tracing::warn!("compaction cannot rebuild {key:?}: {error}");
            }
            COMPACT_FAILURES_LOGGED => {
                tracing::warn!("compaction cannot rebuild {key:?}: {error}; more are only counted");
            }
            _ => {}
        }
    }

    pub(super) async fn close(self) {
        self.points.close().await;
        self.redo.stop().await;
    }
}
