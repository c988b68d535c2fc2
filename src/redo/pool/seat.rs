//! The place of one tenant in a pool.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use async_channel::Receiver;

use super::{Pool, Queue, Shared};
use crate::limits::{REDO_QUEUE_REQUESTS, REDO_SEATS_MAX};
use crate::redo::child::process::Process;
use crate::redo::child::{ChildStatus, Job};
use crate::redo::{RedoError, RedoSettings};

/// The place of one tenant in a pool: its requests, and who serves them.
pub(in crate::redo) struct Seat {
    pub(in crate::redo) tenant: String,
    pub(in crate::redo) redo: RedoSettings,
    pub(super) jobs: Queue<Job>,
    /// It is in the queue of ready seats, or served.
    pub(super) scheduled: AtomicBool,
    pub(super) serving: AtomicBool,
    /// Its process, while its worker has nothing to do.
    lent: Queue<Process>,
    /// It may be borrowed.
    lends: AtomicBool,
    /// Tells the worker that the process came back with something to do.
    nudge: Queue<()>,
    stop: AtomicBool,
    /// Closed when it is stopped and nobody serves it.
    pub(super) done: Queue<Infallible>,
    /// The process that is bound to it; 0: none.
    pub(in crate::redo) pid: AtomicU32,
    /// When that was bound.
    pub(in crate::redo) since_us: AtomicU64,
    /// Requests that it has answered.
    pub(in crate::redo) requests: AtomicU64,
    /// When it answered the last of them; 0: never.
    pub(in crate::redo) last_us: AtomicU64,
    seats: Arc<AtomicUsize>,
    /// There are too many seats for this one.
    surplus: bool,
}

impl Seat {
    /// A seat in `pool`, with nobody to serve it yet.
    pub(in crate::redo) fn new(pool: &Pool, tenant: String, redo: RedoSettings) -> Arc<Seat> {
        let seats = pool.shared.seats.clone();
        let surplus = seats.fetch_add(1, Ordering::SeqCst) >= REDO_SEATS_MAX;
        Arc::new(Seat {
            tenant,
            redo,
            jobs: Queue::bounded(REDO_QUEUE_REQUESTS),
            scheduled: AtomicBool::new(false),
            serving: AtomicBool::new(false),
            lent: Queue::bounded(1),
            lends: AtomicBool::new(false),
            nudge: Queue::bounded(1),
            stop: AtomicBool::new(false),
            done: Queue::bounded(1),
            pid: AtomicU32::new(0),
            since_us: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            last_us: AtomicU64::new(0),
            seats,
            surplus,
        })
    }

    /// Queues a request, waiting while the queue is full, and sees to it that it is served.
    pub(in crate::redo) async fn send(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        job: Job,
    ) -> Result<(), RedoError> {
        if self.surplus {
            let problem = format!("a core has redo for {REDO_SEATS_MAX} tenants at most");
            return Err(RedoError::Child { problem });
        }
        if self.is_stopped() || shared.is_stopped() {
            return Err(RedoError::Shutdown);
        }
        self.jobs.put.send(job).await.map_err(|_| RedoError::Shutdown)?;
        shared.schedule(self);
        Ok(())
    }

    pub(in crate::redo) fn jobs(&self) -> &Receiver<Job> {
        &self.jobs.take
    }

    /// The worker lends the process until [`Seat::take_back`].
    pub(in crate::redo) fn lend(&self, process: Process) {
        // It is empty: there is one process, and it was not lent.
        let _ = self.lent.put.try_send(process);
        self.lends.store(true, Ordering::SeqCst);
    }

    /// Waits for whoever has borrowed the process, which is not for long.
    pub(in crate::redo) fn take_back(&self) -> Option<Process> {
        self.lends.store(false, Ordering::SeqCst);
        // Never closed, and what is borrowed is given back.
        self.lent.take.recv_blocking().ok()
    }

    /// A process is lent, and no requests wait for it.
    pub(in crate::redo) fn lends(&self) -> bool {
        self.lends.load(Ordering::SeqCst) && self.jobs.take.is_empty()
    }

    /// The process, if nobody else has it. It must be given back, and soon.
    pub(in crate::redo) fn borrow_process(&self) -> Option<Process> {
        self.lent.take.try_recv().ok()
    }

    pub(in crate::redo) fn give_back(&self, process: Process) {
        let has_work = process.sent.is_some();
        // It came from there.
        let _ = self.lent.put.try_send(process);
        if has_work {
            // One that is full wakes the worker as well.
            let _ = self.nudge.put.try_send(());
        }
    }

    /// Resolves when the process came back with something to do.
    pub(in crate::redo) fn nudged(&self) -> async_channel::Recv<'_, ()> {
        self.nudge.take.recv()
    }

    pub(in crate::redo) fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Begins the end of it; false if it had begun before.
    pub(in crate::redo) fn begin_stop(&self) -> bool {
        let first = !self.stop.swap(true, Ordering::SeqCst);
        self.jobs.put.close();
        first
    }

    /// After [`Seat::begin_stop`]: waits until its process is gone.
    ///
    /// A worker says that it serves the seat before it looks whether that is stopped, and starts
    /// nothing if so. Whoever is not seen here looks later than the stop, so starts nothing; who is
    /// seen leaves later than the stop, so closes `done` ([`Shared::leave`]).
    pub(in crate::redo) async fn stopped(&self) {
        if self.serving.load(Ordering::SeqCst) {
            // Closed, never sent to.
            let _ = self.done.take.recv().await;
        }
        self.refuse_all();
    }

    pub(super) fn refuse_all(&self) {
        self.jobs.put.close();
        self.fail_all(&RedoError::Shutdown);
    }

    pub(super) fn fail_all(&self, error: &RedoError) {
        while let Ok(job) = self.jobs.take.try_recv() {
            // The caller may be gone; that is its right.
            let _ = job.answer.send(Err(error.clone()));
        }
    }

    /// Of its process, if it has one.
    pub(in crate::redo) fn status(&self, shared: &Shared) -> Option<ChildStatus> {
        let pid = self.pid.load(Ordering::Relaxed);
        let ago = |us: &AtomicU64| shared.now_us().saturating_sub(us.load(Ordering::Relaxed));
        let answered = self.last_us.load(Ordering::Relaxed) > 0;
        (pid > 0).then(|| ChildStatus {
            tenant: self.tenant.clone(),
            pid,
            age_ms: ago(&self.since_us) / 1000,
            requests: self.requests.load(Ordering::Relaxed),
            last_redo_ms_ago: answered.then(|| ago(&self.last_us) / 1000),
        })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.fetch_sub(1, Ordering::SeqCst);
    }
}
