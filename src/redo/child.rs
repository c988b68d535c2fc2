//! Redo by a wal-redo process: stock PostgreSQL with `pgxn/neon_walredo`.
//!
//! [`ChildRedo`] is the place of one tenant in a pool of processes ([`super::pool`]). Requests go
//! over a bounded channel to a blocking thread, which writes all that are waiting to the process
//! and hands each reply back. Short ones, where a process is there and free, do without the thread
//! ([`inline`]). Thread and process are pinned to the CPU of the core that asks: a round trip over
//! pipes within one CPU costs a fraction of one across CPUs.
//!
//! - A process is bound to one tenant for its whole life, and ends with it.
//! - Where the process dies, hangs, talks nonsense or answers with an error, it is ended, and the
//!   request whose turn it was is tried once more, alone, on a fresh process; if that fails too, it
//!   gets the error. Requests behind it are sent again.
//! - The input of a request that failed is kept on disk ([`super::failed`]).
//! - A request whose caller went away is dropped before it is sent; if it was sent already, its
//!   reply is read and dropped.

#![allow(
    clippy::disallowed_methods,
    reason = "processes, and the threads that drive them, are started here"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_channel::oneshot;
use futures_lite::future::yield_now;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use serde::{Deserialize, Serialize};

use super::histogram::Histogram;
use super::pool::{Pool, PoolSettings, Seat};
use super::{Redo, RedoError, RedoRequest, RedoSettings, protocol, record};
use crate::base::{BlockNumber, RelNode, RelTag};
use crate::limits::{REDO_IDLE, REDO_SLICE};

mod inline;
pub(in crate::redo) mod process;
pub(in crate::redo) mod worker;

#[cfg(test)]
pub(crate) mod tests;

/// How to run a process for one tenant alone; see [`PoolSettings`] for many.
#[derive(Clone, Debug)]
pub struct ChildSettings {
    /// Whose records it replays; for the log.
    pub tenant: String,
    /// PostgreSQL's server binary, an absolute path.
    pub postgres_bin: PathBuf,
    /// `neon_walredo.so`, an absolute path.
    pub walredo_so: PathBuf,
    /// An existing directory. A process has a subdirectory of it until it is up.
    pub scratch_dir: PathBuf,
    /// CPU for thread and process; `None` leaves them where the caller runs.
    pub cpu: Option<usize>,
    /// What redo must know of the cluster.
    pub redo: RedoSettings,
    /// Time for one request, from the reply before it.
    pub timeout: Duration,
}

/// What happened so far in a pool; written by its threads, read by anybody.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that were answered, with a page or an error.
    pub requests: AtomicU64,
    /// Of these, requests that the caller's own thread has seen to from end to end.
    pub inline: AtomicU64,
    /// Records in the requests.
    pub records: AtomicU64,
    /// Requests that were answered with an error.
    pub errors: AtomicU64,
    /// Processes started that have answered.
    pub started: AtomicU64,
    /// Time from the start of a process to its first answer, in microseconds.
    pub launch_micros: Histogram,
    /// Processes that died, hung or talked nonsense, or did not start.
    pub failures: AtomicU64,
    /// Time with requests under way, in microseconds.
    pub busy_micros: AtomicU64,
    /// Processes that run now.
    pub alive: AtomicU64,
    /// Most processes that ran at the same time.
    pub alive_max: AtomicU64,
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// A process at work, for the admin API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildStatus {
    /// Whose records it replays.
    pub tenant: String,
    /// Process id.
    pub pid: u32,
    /// Time since it was bound to the tenant, in milliseconds.
    pub age_ms: u64,
    /// Requests that it has answered.
    pub requests: u64,
    /// Time since it answered the last of them, in milliseconds; `None`: it has answered none.
    pub last_redo_ms_ago: Option<u64>,
}

type Answer = Result<Bytes, RedoError>;

/// A request on its way.
pub(in crate::redo) struct Job {
    frames: Bytes,
    /// None in a ping.
    records: u64,
    rel: RelTag,
    block: BlockNumber,
    pub(in crate::redo) answer: oneshot::Sender<Answer>,
    failures: u32,
}

/// WAL redo for one tenant, by processes of a pool.
pub struct ChildRedo {
    pool: Pool,
    seat: Arc<Seat>,
    near: inline::Near,
    /// Nobody else uses the pool.
    alone: bool,
}

impl ChildRedo {
    /// With a process of its own. Starts nothing yet.
    pub fn new(settings: ChildSettings) -> Self {
        let pool = Pool::new(PoolSettings {
            postgres_bin: settings.postgres_bin,
            walredo_so: settings.walredo_so,
            scratch_dir: settings.scratch_dir,
            cpu: settings.cpu,
            timeout: settings.timeout,
            processes_max: 1,
            spares: 0,
            idle: REDO_IDLE,
            slice: REDO_SLICE,
            failed_dir: None,
            sandbox_optional: false,
        });
        let seat = Seat::new(&pool, settings.tenant, settings.redo);
        ChildRedo { pool, seat, near: inline::Near::default(), alone: true }
    }

    /// With processes of `pool`. Starts nothing yet.
    pub fn in_pool(pool: &Pool, tenant: String, redo: RedoSettings) -> Self {
        let seat = Seat::new(pool, tenant, redo);
        ChildRedo { pool: pool.clone(), seat, near: inline::Near::default(), alone: false }
    }

    /// What happened so far in its pool.
    pub fn counters(&self) -> &Counters {
        self.pool.counters()
    }

    /// Its process, if it has one now.
    pub fn status(&self) -> Option<ChildStatus> {
        self.seat.status(&self.pool.shared)
    }

    /// Asks its process, which is started if there is none, for a sign of life; gives what it says
    /// of itself. It has its turn among the other requests.
    ///
    /// # Errors
    /// Those of a request.
    pub async fn ping(&self) -> Result<String, RedoError> {
        let mut frames = Vec::new();
        protocol::encode_ping(&mut frames);
        let rel = RelNode { spc: 0, db: 0, rel: 0 }.fork(0);
        let text = self.ask(frames, 0, rel, 0).await?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    async fn ask(&self, frames: Vec<u8>, records: u64, rel: RelTag, block: BlockNumber) -> Answer {
        let (answer, reply) = oneshot::channel();
        let job = Job { frames: frames.into(), records, rel, block, answer, failures: 0 };
        let shared = &self.pool.shared;
        let mut far = self.near.put(&self.seat, job);
        if far.is_none() {
            // Those that ask at the same time come along.
            yield_now().await;
            while self.near.has(&reply) && inline::drive(shared, &self.seat, &self.near) {
                if self.near.has(&reply) {
                    yield_now().await;
                }
            }
            far = self.near.take(&reply);
        }
        if let Some(job) = far {
            self.seat.send(shared, job).await?;
        }
        reply.await.unwrap_or(Err(RedoError::Shutdown))
    }

    /// As [`ChildRedo::status`], for those that do not keep the value alive.
    pub fn watch(&self) -> impl Fn() -> Option<Option<ChildStatus>> + Send + use<> {
        let (seat, shared) = (Arc::downgrade(&self.seat), self.pool.shared.clone());
        move || seat.upgrade().map(|seat| seat.status(&shared))
    }

    /// Ends its process; requests that wait, and later ones, get [`RedoError::Shutdown`]. When
    /// this returns, no process is left for it, and none can start. True if this call did it; a
    /// later call waits for it.
    pub async fn shutdown(&self) -> bool {
        let first = self.seat.begin_stop();
        self.seat.stopped().await;
        if self.alone {
            self.pool.shutdown().await;
        }
        first
    }
}

impl Drop for ChildRedo {
    fn drop(&mut self) {
        // The worker sees the flag, or its channel close, and ends the process on its own.
        self.seat.begin_stop();
        if self.alone {
            self.pool.abandon();
        }
    }
}

impl Redo for ChildRedo {
    fn redo(&self, request: RedoRequest) -> LocalBoxFuture<'_, Answer> {
        async move {
            let RedoRequest { rel, block, .. } = request;
            if request.records.is_empty() {
                return Err(RedoError::NoRecords { rel, block });
            }
            for (lsn, bytes) in &request.records {
                record::check(*lsn, rel, block, bytes)?;
            }
            let mut frames = Vec::new();
            protocol::encode_request(&request, &mut frames)?;
            let records = request.records.len() as u64;
            drop(request);
            self.ask(frames, records, rel, block).await
        }
        .boxed_local()
    }

    fn stop(&self) -> LocalBoxFuture<'_, ()> {
        async {
            self.shutdown().await;
        }
        .boxed_local()
    }
}
