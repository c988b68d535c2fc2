//! The wal-redo processes of one core: at most so many, whatever the number of tenants.
//!
//! A tenant has a seat: a queue of its requests ([`Seat`]). A seat with requests goes, once, into
//! the queue of ready seats. Worker threads take seats from there in order; each has at most one
//! process, bound to the tenant whose seat it serves, and ended when the worker turns to another.
//!
//! - Threads, and their processes, are started by need, one for each seat that finds no free
//!   worker, up to the bound; so requests that come together share one start. Nothing of that
//!   happens on the caller's executor but the start of a thread.
//! - A worker keeps its seat while requests come in, and for [`PoolSettings::idle`] after. It
//!   gives it up when other seats are ready and no worker is free: at once if it has nothing to
//!   do, else after [`PoolSettings::slice`]. The seat then queues up again, behind the others.
//!   So every seat has its turn, and no request is lost.
//! - From the first use of the pool on there is a spare: a process that is bound to nobody yet.
//!   Whoever needs a process takes it, and with its first answer asks for the next: of a free
//!   worker, else of a new one.
//! - At shutdown every process is ended and reaped, and none can start afterwards.
//!
//! Bound: each worker at a seat has one process at most, and each other worker may have started
//! one spare, not more. Spares are taken before anything is started. So there are never more
//! processes than workers.

#![allow(
    clippy::disallowed_methods,
    reason = "threads that drive processes are started here; they look at the clock"
)]

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_channel::{Receiver, RecvError, Sender};
use futures_lite::future::{block_on, or};

use super::RedoError;
use super::child::Counters;
use super::child::process::Process;
use super::child::worker::Worker;
use crate::limits::REDO_SEATS_MAX;

mod seat;
#[cfg(test)]
mod tests;

pub(in crate::redo) use seat::Seat;

/// How processes are run, and how many.
#[derive(Clone, Debug)]
pub struct PoolSettings {
    /// PostgreSQL's server binary, an absolute path.
    pub postgres_bin: PathBuf,
    /// `neon_walredo.so`, an absolute path.
    pub walredo_so: PathBuf,
    /// An existing directory. A process has a subdirectory of it until it is up.
    pub scratch_dir: PathBuf,
    /// CPU for threads and processes; `None` leaves them where the caller runs.
    pub cpu: Option<usize>,
    /// Time for one request, from the reply before it.
    pub timeout: Duration,
    /// Processes at the same time.
    pub processes_max: usize,
    /// Of these, spares: fewer than `processes_max`.
    pub spares: usize,
    /// A process without a request for so long is ended.
    pub idle: Duration,
    /// A process that others wait for is given up after so long.
    pub slice: Duration,
    /// Where inputs of failed redo are kept; `None` keeps none.
    pub failed_dir: Option<PathBuf>,
    /// Processes may run where the kernel has no filter for system calls. For developers' machines.
    pub sandbox_optional: bool,
}

/// Set in [`Shared::workers`] when no worker may start any more.
const STOPPED: usize = 1 << (usize::BITS - 1);

struct Queue<T> {
    put: Sender<T>,
    take: Receiver<T>,
}

impl<T> Queue<T> {
    fn bounded(len: usize) -> Self {
        let (put, take) = async_channel::bounded(len.max(1));
        Queue { put, take }
    }
}

/// What the threads of a pool share.
pub(in crate::redo) struct Shared {
    pub(in crate::redo) settings: PoolSettings,
    pub(in crate::redo) counters: Arc<Counters>,
    begin: Instant,
    /// Each seat is in it at most once.
    ready: Queue<Arc<Seat>>,
    /// Asks a worker that has nothing to do to give up its seat.
    give_up: Queue<()>,
    spares: Queue<Process>,
    /// Asks a free worker to look whether a spare is wanted.
    refill: Queue<()>,
    filling: AtomicBool,
    /// Workers that wait for a seat.
    free: AtomicUsize,
    /// Workers that have one.
    seated: AtomicUsize,
    /// Workers ever started, and [`STOPPED`].
    workers: AtomicUsize,
    /// Workers that have ended, or did not start when the end had begun.
    gone: AtomicUsize,
    /// Of the workers that were started.
    threads: Queue<JoinHandle<()>>,
    /// Somebody sees to what the workers have left behind.
    clearing: AtomicBool,
    /// Closed when nothing is left.
    ended: Queue<Infallible>,
    seats: Arc<AtomicUsize>,
    /// The system gives no more threads.
    #[cfg(test)]
    no_threads: AtomicBool,
}

/// The processes of one core. Clones are the same pool, and may go to other threads.
#[derive(Clone)]
pub struct Pool {
    pub(in crate::redo) shared: Arc<Shared>,
}

impl Pool {
    /// Starts nothing yet.
    pub fn new(mut settings: PoolSettings) -> Self {
        settings.processes_max = settings.processes_max.max(1);
        settings.spares = settings.spares.min(settings.processes_max - 1);
        let workers = settings.processes_max;
        let shared = Arc::new(Shared {
            counters: Arc::default(),
            begin: Instant::now(),
            ready: Queue::bounded(REDO_SEATS_MAX),
            give_up: Queue::bounded(workers),
            spares: Queue::bounded(settings.spares),
            refill: Queue::bounded(1),
            filling: AtomicBool::new(false),
            free: AtomicUsize::new(0),
            seated: AtomicUsize::new(0),
            workers: AtomicUsize::new(0),
            gone: AtomicUsize::new(0),
            threads: Queue::bounded(workers),
            clearing: AtomicBool::new(false),
            ended: Queue::bounded(1),
            seats: Arc::default(),
            settings,
            #[cfg(test)]
            no_threads: AtomicBool::new(false),
        });
        Pool { shared }
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Ends all threads and processes; requests that wait, and later ones, get
    /// [`RedoError::Shutdown`]. When this returns, no process is left, and none can start.
    /// True if this call began it; a later call waits for it. The end comes also if nobody waits:
    /// this may be dropped at any time, and called again.
    pub async fn shutdown(&self) -> bool {
        let shared = &self.shared;
        let first = shared.stop();
        // Closed, never sent to.
        let _ = shared.ended.take.recv().await;
        while let Ok(thread) = shared.threads.take.try_recv() {
            // It has said that it ends; a panic is in the log.
            let _ = thread.join();
        }
        first
    }

    /// As the start of [`Pool::shutdown`], without waiting.
    pub(in crate::redo) fn abandon(&self) {
        self.shared.stop();
    }
}

impl Shared {
    pub(in crate::redo) fn is_stopped(&self) -> bool {
        self.workers.load(Ordering::SeqCst) & STOPPED != 0
    }

    /// Begins the end of everything; true if it had not begun before.
    fn stop(&self) -> bool {
        // Before the flag: once the last worker has ended, no seat may get ready any more.
        self.ready.put.close();
        self.give_up.put.close();
        self.refill.put.close();
        let before = self.workers.fetch_or(STOPPED, Ordering::SeqCst);
        self.clear_if_last();
        before & STOPPED == 0
    }

    /// Sees to what the workers have left behind, if all of them have ended. Called by each that
    /// ends, and by who stops the pool: whoever of them is the last finds that he is.
    fn clear_if_last(&self) {
        let workers = self.workers.load(Ordering::SeqCst);
        let is_last = workers & STOPPED != 0
            && self.gone.load(Ordering::SeqCst) == workers & !STOPPED
            && !self.clearing.swap(true, Ordering::SeqCst);
        if !is_last {
            return;
        }
        while let Ok(seat) = self.ready.take.try_recv() {
            seat.refuse_all();
        }
        while let Ok(spare) = self.spares.take.try_recv() {
            drop(spare);
        }
        self.ended.put.close();
    }

    /// Time since the pool was made, in microseconds.
    pub(in crate::redo) fn now_us(&self) -> u64 {
        self.begin.elapsed().as_micros() as u64
    }

    /// Sees to it that a seat with requests is served.
    pub(in crate::redo) fn schedule(self: &Arc<Self>, seat: &Arc<Seat>) {
        if seat.scheduled.swap(true, Ordering::SeqCst) {
            return;
        }
        match self.ready.put.try_send(seat.clone()) {
            Ok(()) => self.attend(),
            // Closed; never full, as there are no more seats than it holds.
            Err(_) => seat.refuse_all(),
        }
    }

    /// Finds somebody for the seats that are ready: a free worker, else a new one, else one that
    /// has nothing to do.
    pub(in crate::redo) fn attend(self: &Arc<Self>) {
        if self.ready.take.len() <= self.free.load(Ordering::SeqCst) {
            return;
        }
        if !self.start_worker() {
            // One that is full asks all of them already.
            let _ = self.give_up.put.try_send(());
        }
    }

    /// One more worker; false if there are as many as may be, or the system gives no thread.
    fn start_worker(self: &Arc<Self>) -> bool {
        let most = self.settings.processes_max;
        let one_more = |workers: usize| (workers < most).then_some(workers + 1);
        if self.workers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more).is_err() {
            return false;
        }
        let error = match self.start_thread() {
            Ok(thread) => {
                // It holds as many as may ever be started.
                let _ = self.threads.put.try_send(thread);
                return true;
            }
            Err(error) => error,
        };
        tracing::error!(%error, "a thread for wal-redo could not be started");
        let one_less = |workers: usize| (workers & STOPPED == 0).then_some(workers - 1);
        match self.workers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less) {
            Ok(1) => self.fail_ready(&format!("no thread could be started: {error}")),
            // The others see to the seats that are ready.
            Ok(_) => {}
            Err(_) => {
                self.gone.fetch_add(1, Ordering::SeqCst);
                self.clear_if_last();
            }
        }
        false
    }

    fn start_thread(self: &Arc<Self>) -> std::io::Result<JoinHandle<()>> {
        #[cfg(test)]
        if self.no_threads.load(Ordering::SeqCst) {
            return Err(std::io::ErrorKind::WouldBlock.into());
        }
        let shared = self.clone();
        std::thread::Builder::new().name("wal-redo".into()).spawn(move || shared.work())
    }

    /// Without a single worker nobody would ever answer. Whoever makes a seat ready looks for a
    /// worker afterwards: either he finds that there is none, or it was ready before there was none,
    /// and is found here.
    fn fail_ready(&self, problem: &str) {
        while self.workers.load(Ordering::SeqCst) == 0
            && let Ok(seat) = self.ready.take.try_recv()
        {
            // In this order: a request that comes later than this is scheduled anew.
            seat.scheduled.store(false, Ordering::SeqCst);
            seat.fail_all(&RedoError::Child { problem: problem.to_owned() });
        }
    }

    /// Life of a worker.
    fn work(self: Arc<Self>) {
        struct Exit(Arc<Shared>);
        impl Drop for Exit {
            fn drop(&mut self) {
                self.0.gone.fetch_add(1, Ordering::SeqCst);
                self.0.clear_if_last();
            }
        }
        let exit = Exit(self);
        let shared = &exit.0;
        super::child::worker::pin(shared.settings.cpu);
        while !shared.is_stopped() {
            if shared.ready.take.is_empty() && shared.fill_spare() {
                // There may be room for more than one.
                shared.want_spare();
            }
            shared.free.fetch_add(1, Ordering::SeqCst);
            let turn = shared.next_turn();
            shared.free.fetch_sub(1, Ordering::SeqCst);
            let Ok(turn) = turn else { break };
            let Some(seat) = turn else { continue };
            shared.seated.fetch_add(1, Ordering::SeqCst);
            let serving = Serving { shared, seat: &seat };
            shared.attend();
            seat.serving.store(true, Ordering::SeqCst);
            Worker::new(shared, &seat).serve();
            drop(serving);
        }
    }

    /// The next seat that is ready; `None`: a spare may be wanted. An error: the pool stops.
    fn next_turn(&self) -> Result<Option<Arc<Seat>>, RecvError> {
        let seat = async { self.ready.take.recv().await.map(Some) };
        let refill = async { self.refill.take.recv().await.map(|()| None) };
        block_on(or(seat, refill))
    }

    /// A worker turns from a seat, without a process.
    ///
    /// No other worker comes to the seat while `scheduled` is set. So the stop is looked at before
    /// that ends: `done` must not be closed by one who has left while another serves it again. It
    /// stays set after a stop, and nobody comes.
    ///
    /// A stop that comes later than the look finds either that nobody serves the seat, or another
    /// worker, who leaves it in his turn ([`Seat::stopped`]).
    fn leave(self: &Arc<Self>, seat: &Arc<Seat>) {
        seat.pid.store(0, Ordering::Relaxed);
        seat.serving.store(false, Ordering::SeqCst);
        if seat.is_stopped() || self.is_stopped() {
            seat.refuse_all();
            seat.done.put.close();
            return;
        }
        seat.scheduled.store(false, Ordering::SeqCst);
        if !seat.jobs.take.is_empty() {
            self.schedule(seat);
        }
    }

    /// True if seats are ready and nobody is free to serve them.
    pub(in crate::redo) fn others_wait(&self) -> bool {
        self.ready.take.len() > self.free.load(Ordering::SeqCst)
    }

    /// Resolves when a worker that has nothing to do is asked to give up its seat; an error means
    /// that the pool stops.
    pub(in crate::redo) fn asked_to_give_up(&self) -> async_channel::Recv<'_, ()> {
        self.give_up.take.recv()
    }

    /// The spare, if there is one.
    pub(in crate::redo) fn take_spare(&self) -> Option<Process> {
        self.spares.take.try_recv().ok()
    }

    /// A process has come into use. Nodes that never need one have no spare either.
    pub(in crate::redo) fn want_spare(self: &Arc<Self>) {
        if self.spares.take.len() >= self.settings.spares {
            return;
        }
        // One that is full asks already. If all are busy, the first to be free looks by himself.
        let _ = self.refill.put.try_send(());
        if self.free.load(Ordering::SeqCst) == 0 && !self.filling.load(Ordering::SeqCst) {
            self.start_worker();
        }
    }

    /// Starts a spare if one is wanted, and a worker without a seat has started none; true if it
    /// did. For workers without a seat.
    fn fill_spare(&self) -> bool {
        let is_wanted = || {
            let spares = self.spares.take.len();
            let workers = self.workers.load(Ordering::SeqCst) & !STOPPED;
            spares < self.settings.spares && self.seated.load(Ordering::SeqCst) + spares < workers
        };
        if !is_wanted() || self.filling.swap(true, Ordering::SeqCst) {
            return false;
        }
        let mut is_filled = false;
        // Another worker may have filled it in between.
        if is_wanted() {
            let stop = || self.is_stopped();
            match Process::launch(&self.settings, &self.counters, "none yet", None, &stop) {
                // If it does not fit, it is dropped, and so ended.
                Ok(process) => is_filled = self.spares.put.try_send(process).is_ok(),
                Err(trouble) if !self.is_stopped() => {
                    tracing::warn!(?trouble, "a spare wal-redo process could not be started");
                }
                Err(_) => {}
            }
        }
        self.filling.store(false, Ordering::SeqCst);
        is_filled
    }
}

/// A worker is at a seat, until this is dropped.
struct Serving<'a> {
    shared: &'a Arc<Shared>,
    seat: &'a Arc<Seat>,
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.shared.seated.fetch_sub(1, Ordering::SeqCst);
        self.shared.leave(self.seat);
    }
}
