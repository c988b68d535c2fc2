//! How threads talk to cores: one bounded inbox per core, and heartbeats.
//!
//! A core takes its messages in order. Replies come through one-shot channels. Nothing else is
//! shared between threads, one progress counter per executor apart.
//!
//! **Heartbeats.** glommio 0.9 can go to sleep with runnable tasks, when its preemption timer
//! expires between being armed and first being looked at; with no I/O under way, nothing wakes it
//! again. Every executor therefore has a [`Pulse`]: the control thread looks at its progress
//! counter every few milliseconds and, where that stands still, sends a message through a waker
//! of another thread, which does wake it. [`beat`] is the executor's end.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Poll, Waker};

use async_channel::{Receiver, Sender, TrySendError};
use futures_channel::oneshot;

use crate::base::{TenantShardId, TimelineId};
use crate::limits::{CORE_INBOX_MESSAGES_MAX, HEARTBEATS_UNANSWERED_MAX};
use crate::server::page_service::Session;
use crate::server::socket::Tls;
use crate::shard::control::{
    Change, ControlError, CoreMetrics, CreateTimeline, TenantInfo, TimelineInfo,
};
use crate::shard::history::{HistoryReply, HistoryRequest};

/// A message to a core.
pub enum Message {
    /// Serve this connection from here on.
    Adopt(Connection),
    /// A command of the admin API.
    Control(Control),
    /// Take connections at this address; port 0 asks for any. The reply is the address in use.
    Listen(std::net::SocketAddr, oneshot::Sender<Result<std::net::SocketAddr, String>>),
    /// Stop accepting, end all connections, shut the shards down, reply, end.
    Shutdown(oneshot::Sender<()>),
}

/// A connection on its way between cores: nothing reads from it or writes to it.
pub struct Connection {
    /// The socket.
    pub fd: OwnedFd,
    /// TLS on it.
    pub tls: Option<Tls>,
    /// Everything known about it, with the bytes that were read and not used.
    pub session: Session,
}

/// A command of the admin API to one core.
pub enum Control {
    /// All timelines of the core.
    Timelines(oneshot::Sender<Vec<TimelineInfo>>),
    /// All tenants of the core.
    Tenants(oneshot::Sender<Vec<TenantInfo>>),
    /// Change tenants or timelines.
    Change(Change, oneshot::Sender<Result<(), ControlError>>),
    /// The core's counters.
    Metrics(oneshot::Sender<CoreMetrics>),
    /// Start to make a timeline.
    CreateTimeline(CreateTimeline, oneshot::Sender<Result<(), ControlError>>),
    /// Write what is in memory to layer files.
    Checkpoint(TenantShardId, TimelineId, oneshot::Sender<Result<(), ControlError>>),
    /// Ask about a timeline's history, or hold or cut it.
    History(
        TenantShardId,
        TimelineId,
        HistoryRequest,
        oneshot::Sender<Result<HistoryReply, ControlError>>,
    ),
}

/// The sending ends of all cores' inboxes.
#[derive(Clone)]
pub struct Mesh {
    inboxes: Arc<[Sender<Message>]>,
}

/// Why a message did not get into an inbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The inbox is full.
    #[error("core {0} is overloaded")]
    Full(usize),
    /// The core has ended, or does not exist.
    #[error("core {0} has stopped")]
    Stopped(usize),
}

impl SendError {
    /// What a caller can do about it.
    pub fn kind(&self) -> crate::base::Kind {
        match self {
            SendError::Full(_) => crate::base::Kind::Retry,
            SendError::Stopped(_) => crate::base::Kind::Shutdown,
        }
    }
}

impl Mesh {
    /// A mesh of `cores` inboxes and their receiving ends, in order of the cores.
    pub fn new(cores: usize) -> (Mesh, Vec<Receiver<Message>>) {
        let (senders, receivers): (Vec<_>, Vec<_>) =
            (0..cores).map(|_| async_channel::bounded(CORE_INBOX_MESSAGES_MAX)).unzip();
        (Mesh { inboxes: senders.into() }, receivers)
    }

    /// Number of cores.
    pub fn cores(&self) -> usize {
        self.inboxes.len()
    }

    /// Puts a message into a core's inbox, without waiting. Completion says nothing about its
    /// having been handled.
    ///
    /// # Errors
    /// The inbox is full or closed; the message is dropped.
    pub fn send(&self, core: usize, message: Message) -> Result<(), SendError> {
        let inbox = self.inboxes.get(core).ok_or(SendError::Stopped(core))?;
        inbox.try_send(message).map_err(|error| match error {
            TrySendError::Full(_) => SendError::Full(core),
            TrySendError::Closed(_) => SendError::Stopped(core),
        })
    }
}

/// What the two ends of a heartbeat share.
#[derive(Default)]
struct Shared {
    progress: AtomicU64,
    waker: OnceLock<Waker>,
    /// The main task's, for as long as [`beat`] has not run yet.
    early: OnceLock<Waker>,
}

/// The control thread's end of one executor's heartbeat.
#[derive(Default)]
pub struct Pulse {
    shared: Arc<Shared>,
    seen: u64,
    kicks: u64,
}

/// Counts what an executor does, so that a busy one needs no heartbeats.
#[derive(Clone)]
pub struct Progress(Arc<Shared>);

impl Progress {
    /// Lets the control thread wake the executor before [`beat`] has first run; to be awaited
    /// first of all by the executor's main task.
    pub async fn begin(&self) {
        std::future::poll_fn(|context| {
            self.0.early.get_or_init(|| context.waker().clone());
            Poll::Ready(())
        })
        .await;
    }

    /// Something was done.
    pub fn step(&self) {
        self.0.progress.fetch_add(1, Ordering::Relaxed);
    }
}

impl Pulse {
    /// The executor's counter.
    pub fn progress(&self) -> Progress {
        Progress(self.shared.clone())
    }

    /// To be called every [`crate::limits::HEARTBEAT_INTERVAL_MS`]: wakes the executor unless it
    /// has moved since the last call. Never waits.
    ///
    /// The waker is that of [`beat`]'s task and not a channel's: a wake-up must be repeatable
    /// while the task stands in the run queue of an executor that went to sleep over it. Each
    /// one takes a reference of the task, of which glommio counts no more than 32,767, so an
    /// executor that does not move at all is given up at some point.
    pub fn tick(&mut self) {
        let progress = self.shared.progress.load(Ordering::Relaxed);
        if progress != self.seen {
            self.seen = progress;
            self.kicks = 0;
        } else if self.kicks < HEARTBEATS_UNANSWERED_MAX
            && let Some(waker) = self.shared.waker.get().or(self.shared.early.get())
        {
            self.kicks += 1;
            waker.wake_by_ref();
        }
    }
}

/// Answers heartbeats for as long as the executor runs. To be spawned as a task of its own, in a
/// task queue whose latency matters: only those are looked at promptly after a wake-up by another
/// thread.
pub async fn beat(progress: Progress) {
    std::future::poll_fn(|context| {
        progress.0.waker.get_or_init(|| context.waker().clone());
        progress.step();
        Poll::Pending
    })
    .await
}
