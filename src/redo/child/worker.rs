//! A worker at a seat: takes the requests of one tenant, has its process answer them.

use std::cell::OnceCell;
use std::collections::VecDeque;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::inline::Sent;
use super::process::{Process, Trouble};
use super::{Answer, Job, add};
use crate::base::seldom::Seldom;
use crate::limits::{
    REDO_BATCH_BYTES, REDO_BATCH_REQUESTS, REDO_FAILED_BYTES_MAX, REDO_PROCESS_BUSY_MAX, REDO_QUIET,
};
use crate::redo::RedoError;
use crate::redo::failed::{self, Failed, Kept};
use crate::redo::pool::{Seat, Shared};
use crate::redo::protocol::Reply;

thread_local! {
    /// When what PostgreSQL refuses was in the log last.
    static REFUSALS: (OnceCell<Instant>, Seldom) = Default::default();
}

/// Keeps the thread, and the processes that it starts, on a CPU.
pub(in crate::redo) fn pin(cpu: Option<usize>) {
    let Some(cpu) = cpu else { return };
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    if let Err(error) = pinned {
        tracing::warn!(cpu, %error, "a thread of wal-redo is not pinned");
    }
}

pub(in crate::redo) struct Worker<'a> {
    shared: &'a Arc<Shared>,
    seat: &'a Arc<Seat>,
    waiting: VecDeque<Job>,
    /// What somebody else has sent of the first of these.
    begun: Option<Batch>,
    process: Option<Process>,
    /// It has not answered yet.
    is_fresh: bool,
    begin: Instant,
}

/// The first requests that wait, on their way.
struct Batch {
    frames: Bytes,
    written: usize,
    requests: usize,
}

/// Answers a request.
pub(super) fn answer(shared: &Shared, seat: &Seat, job: Job, answer: Answer) {
    let counters = &shared.counters;
    add(&counters.requests, 1);
    add(&counters.records, job.records);
    add(&counters.errors, u64::from(answer.is_err()));
    add(&seat.requests, 1);
    seat.last_us.store(shared.now_us().max(1), Ordering::Relaxed);
    // The caller may be gone; that is its right.
    let _ = job.answer.send(answer);
}

/// Wakes the thread from `park`.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl<'a> Worker<'a> {
    pub(in crate::redo) fn new(shared: &'a Arc<Shared>, seat: &'a Arc<Seat>) -> Self {
        let (waiting, begun, process) = (VecDeque::new(), None, None);
        Worker { shared, seat, waiting, begun, process, is_fresh: false, begin: Instant::now() }
    }

    fn is_stopped(&self) -> bool {
        self.seat.is_stopped() || self.shared.is_stopped()
    }

    /// Serves until the seat is to be given up; the process is gone then. No request that was
    /// taken is left unanswered.
    pub(in crate::redo) fn serve(mut self) {
        while !self.is_stopped() {
            let gives_up =
                self.shared.others_wait() && self.begin.elapsed() >= self.shared.settings.slice;
            if !gives_up {
                self.take_waiting();
            }
            if self.begun.is_none() {
                self.waiting.retain(|job| !job.answer.is_canceled());
            }
            if self.waiting.is_empty() {
                if gives_up || self.process.is_none() || !self.wait() {
                    break;
                }
                continue;
            }
            let start = Instant::now();
            let result = self.exchange();
            let took = start.elapsed();
            add(&self.shared.counters.busy_micros, took.as_micros() as u64);
            match (result, &mut self.process) {
                (Err(trouble), _) => self.recover(trouble),
                (Ok(()), Some(process)) => {
                    process.busy += took;
                    if process.busy > REDO_PROCESS_BUSY_MAX {
                        self.end_process();
                    }
                    // Not before: the start of another would hold up the answer.
                    if std::mem::take(&mut self.is_fresh) {
                        self.shared.want_spare();
                    }
                }
                (Ok(()), None) => {}
            }
        }
        self.end_process();
        while !self.waiting.is_empty() {
            self.answer(Err(RedoError::Shutdown));
        }
    }

    fn take_waiting(&mut self) {
        while self.waiting.len() < REDO_BATCH_REQUESTS {
            let Ok(job) = self.seat.jobs().try_recv() else { break };
            self.waiting.push_back(job);
        }
    }

    /// Waits for a request, with the process lent meanwhile. False if it is to be given up: it was
    /// idle for too long, or others need one, or this is the end.
    fn wait(&mut self) -> bool {
        let Some(process) = self.process.take() else { return false };
        self.seat.lend(process);
        let stays = self.wait_for_request();
        self.process = self.seat.take_back();
        let Some(Sent { jobs, frames, written }) =
            self.process.as_mut().and_then(|process| process.sent.take())
        else {
            return stays;
        };
        // What they have sent must be seen to first, whatever comes next.
        self.begun = Some(Batch { frames, written, requests: jobs.len() });
        jobs.into_iter().rev().for_each(|job| self.waiting.push_front(job));
        true
    }

    /// Time since the process answered, in microseconds.
    fn quiet_us(&self) -> u64 {
        self.shared.now_us().saturating_sub(self.seat.last_us.load(Ordering::Relaxed))
    }

    fn wait_for_request(&mut self) -> bool {
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        let idle = self.shared.settings.idle;
        let begin = Instant::now();
        let jobs = self.seat.jobs().clone();
        let mut job = pin!(jobs.recv());
        let mut nudged = pin!(self.seat.nudged());
        let mut asked = pin!(self.shared.asked_to_give_up());
        loop {
            match job.as_mut().poll(&mut context) {
                Poll::Ready(Ok(job)) => {
                    self.waiting.push_back(job);
                    return true;
                }
                Poll::Ready(Err(_)) => return false,
                Poll::Pending => {}
            }
            if nudged.as_mut().poll(&mut context).is_ready() {
                return true;
            }
            if self.shared.others_wait() {
                let slice_ends = self.begin.elapsed() >= self.shared.settings.slice;
                if slice_ends || self.quiet_us() >= REDO_QUIET.as_micros() as u64 {
                    return false;
                }
                // Another worker may be asked meanwhile.
                asked.set(self.shared.asked_to_give_up());
                std::thread::park_timeout(REDO_QUIET);
                continue;
            }
            match asked.as_mut().poll(&mut context) {
                // It may be an old one: others may have been served meanwhile.
                Poll::Ready(Ok(())) => {
                    asked.set(self.shared.asked_to_give_up());
                    continue;
                }
                Poll::Ready(Err(_)) => return false,
                Poll::Pending => {}
            }
            let quiet = begin.elapsed().min(Duration::from_micros(self.quiet_us()));
            let left = idle.saturating_sub(quiet);
            if left.is_zero() {
                return false;
            }
            std::thread::park_timeout(left);
        }
    }

    /// Answers the request whose turn it is.
    fn answer(&mut self, answer: Answer) {
        if let Some(job) = self.waiting.pop_front() {
            self::answer(self.shared, self.seat, job, answer);
        }
    }

    /// A process that is bound to the tenant.
    fn start_process(&mut self) -> Result<(), Trouble> {
        if self.process.is_some() {
            return Ok(());
        }
        let (shared, seat) = (self.shared, self.seat);
        let stop = || seat.is_stopped() || shared.is_stopped();
        if stop() {
            return Err(Trouble::Stop);
        }
        let page = self.waiting.front().map(|job| (job.rel, job.block));
        let (settings, counters) = (&shared.settings, &shared.counters);
        let mut process = match shared.take_spare() {
            Some(spare) => spare,
            None => Process::launch(settings, counters, &seat.tenant, page, &stop)?,
        };
        process.page = page;
        process.bind(&shared.settings, &seat.tenant, seat.redo, &stop)?;
        seat.requests.store(0, Ordering::Relaxed);
        seat.last_us.store(0, Ordering::Relaxed);
        seat.since_us.store(shared.now_us(), Ordering::Relaxed);
        seat.pid.store(process.id(), Ordering::Relaxed);
        (self.process, self.is_fresh) = (Some(process), true);
        Ok(())
    }

    /// What is sent next.
    fn batch(&mut self) -> Result<Batch, Trouble> {
        self.start_process()?;
        if self.process.as_ref().is_some_and(Process::has_input) {
            return Err(Trouble::Process("it answered more than it was asked".into()));
        }
        let alone = self.waiting.front().is_some_and(|job| job.failures > 0);
        let mut frames = Vec::new();
        let mut requests = 0;
        for job in self.waiting.iter().take(if alone { 1 } else { REDO_BATCH_REQUESTS }) {
            if requests > 0 && frames.len() + job.frames.len() > REDO_BATCH_BYTES {
                break;
            }
            frames.extend_from_slice(&job.frames);
            requests += 1;
        }
        Ok(Batch { frames: frames.into(), written: 0, requests })
    }

    /// Sends a batch and takes in its replies.
    fn exchange(&mut self) -> Result<(), Trouble> {
        let Batch { frames, mut written, requests } = match self.begun.take() {
            Some(begun) => begun,
            None => self.batch()?,
        };
        for _ in 0..requests {
            let is_ping = self.waiting.front().is_some_and(|job| job.records == 0);
            match self.next_reply(&frames, &mut written)? {
                Reply::Page(page) if !is_ping => self.answer(Ok(page)),
                Reply::Pong(text) if is_ping => self.answer(Ok(text.into())),
                Reply::Error(message) => return Err(Trouble::Refused(message)),
                Reply::Page(_) | Reply::Pong(_) => {
                    return Err(Trouble::Process("it answered out of turn".into()));
                }
            }
        }
        Ok(())
    }

    fn next_reply(&mut self, frames: &[u8], written: &mut usize) -> Result<Reply, Trouble> {
        let (shared, seat) = (self.shared, self.seat);
        let stop = || seat.is_stopped() || shared.is_stopped();
        let process = self.process.as_mut().ok_or(Trouble::Process("it is gone".into()))?;
        process.page = self.waiting.front().map(|job| (job.rel, job.block));
        process.reply(frames, written, shared.settings.timeout, &stop)
    }

    fn recover(&mut self, trouble: Trouble) {
        let (problem, for_all) = match trouble {
            Trouble::Process(problem) => (problem, false),
            Trouble::Start(problem) => (problem, true),
            Trouble::Refused(message) => return self.refused(message),
            Trouble::Stop => return self.end_process(),
        };
        add(&self.shared.counters.failures, 1);
        let status = match &mut self.process {
            Some(process) => process.end(),
            None => "it was not running".into(),
        };
        self.end_process();
        let problem = format!("{problem}; {status}");
        let page = self.waiting.front().map(|job| format!("{} block {}", job.rel, job.block));
        let (tenant, page) = (&self.seat.tenant, page.unwrap_or_default());
        tracing::warn!(%tenant, %page, %problem, "the wal-redo process failed");
        if !for_all {
            self.keep_input(&problem);
        }
        let concerned = if for_all { self.waiting.len() } else { 1 };
        for job in self.waiting.iter_mut().take(concerned) {
            job.failures += 1;
        }
        for _ in 0..concerned {
            if self.waiting.front().is_some_and(|job| job.failures > 1) {
                self.answer(Err(RedoError::Child { problem: problem.clone() }));
            }
        }
    }

    /// PostgreSQL has answered with an error. That may be the state of this process, its memory
    /// for one, rather than the record: only what a fresh process says as well is final.
    fn refused(&mut self, message: String) {
        self.end_process();
        self.keep_input(&message);
        let Some(job) = self.waiting.front_mut() else { return };
        job.failures += 1;
        let (rel, block) = (job.rel, job.block);
        if job.failures > 1 {
            return self.answer(Err(RedoError::Refused { rel, block, message }));
        }
        // A client may ask for such a page as often as it likes.
        let unsaid =
            REFUSALS.with(|(begin, seldom)| seldom.pass(begin.get_or_init(Instant::now).elapsed()));
        if let Some(others_since) = unsaid {
            let tenant = &self.seat.tenant;
            tracing::warn!(%tenant, %rel, block, %message, others_since,
                "redo failed in PostgreSQL; once more");
        }
    }

    /// Keeps the request whose turn it is, for `pgstrata redo replay`.
    fn keep_input(&self, problem: &str) {
        let (Some(dir), Some(job)) = (&self.shared.settings.failed_dir, self.waiting.front())
        else {
            return;
        };
        if job.records == 0 {
            return;
        }
        let input = Failed {
            tenant: self.seat.tenant.clone(),
            redo: self.seat.redo,
            problem: problem.to_owned(),
            frames: job.frames.clone(),
        };
        let (tenant, rel, block) = (&self.seat.tenant, job.rel, job.block);
        match failed::keep(dir, &input) {
            Ok(Kept::New(path)) => tracing::warn!(%tenant, %rel, block, path = %path.display(),
                "kept the input of a failed redo"),
            Ok(Kept::Known) => {}
            Ok(Kept::TooLarge(_)) if job.failures > 0 => {}
            Ok(Kept::TooLarge(bytes)) => tracing::warn!(%tenant, %rel, block, bytes,
                bytes_max = REDO_FAILED_BYTES_MAX,
                "the input of a failed redo is not kept: it is too large"),
            Err(error) => tracing::warn!(%error, "the input of a failed redo is not kept"),
        }
    }

    fn end_process(&mut self) {
        self.seat.pid.store(0, Ordering::Relaxed);
        if let Some(mut process) = self.process.take() {
            process.end();
        }
    }
}
