//! The wal-redo process of one tenant: stock PostgreSQL with `pgxn/neon_walredo`.
//!
//! Requests go over a bounded channel to a blocking thread, which writes all that are waiting to
//! the process and hands each reply back. Thread and process are pinned to the CPU of the core
//! that asks: a round trip over pipes within one CPU costs a fraction of one across CPUs.
//!
//! - Thread and process are started by the first request. The process dies with the thread: its
//!   stdin closes, and the kernel kills it (`PR_SET_PDEATHSIG`); before, by [`Redo::rest`].
//! - A record that PostgreSQL refuses is an answer to its request. The process ends then, and the
//!   other requests are sent to a fresh one.
//! - Where the process dies, hangs or talks nonsense, the request whose turn it was is tried once
//!   more, alone, on a fresh process; if that fails too, it gets the error. Requests behind it
//!   are sent again.
//! - A request whose caller went away is dropped before it is sent; if it was sent already, its
//!   reply is read and dropped.

#![allow(
    clippy::disallowed_methods,
    reason = "processes, and the threads that drive them, are started here"
)]

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_channel::oneshot;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::protocol::{self, PONG_PREFIX, Reply};
use super::{Redo, RedoError, RedoRequest, RedoSettings, record};
use crate::base::{BlockNumber, RelTag};
use crate::limits::{
    REDO_BATCH_BYTES, REDO_BATCH_REQUESTS, REDO_POLL, REDO_QUEUE_REQUESTS, REDO_START_TIMEOUT,
    REDO_TEXT_BYTES_MAX,
};

#[cfg(test)]
mod tests;

/// User and group that the process becomes when the node runs as root: `nobody`.
const UNPRIVILEGED_ID: u32 = 65534;

/// How to run the process.
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

/// What happened so far; written by the thread, read by anybody.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that were answered, with a page or an error.
    pub requests: AtomicU64,
    /// Records in those.
    pub records: AtomicU64,
    /// Requests that were answered with an error.
    pub errors: AtomicU64,
    /// Processes started.
    pub started: AtomicU64,
    /// Processes that died, hung or talked nonsense.
    pub failures: AtomicU64,
    /// Time with requests under way, in microseconds.
    pub busy_micros: AtomicU64,
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

type Answer = Result<Bytes, RedoError>;

struct Job {
    frames: Vec<u8>,
    records: u64,
    rel: RelTag,
    block: BlockNumber,
    answer: oneshot::Sender<Answer>,
    failures: u32,
}

/// `None` in the channel: the process is not needed.
type Jobs = async_channel::Sender<Option<Job>>;

enum State {
    Idle,
    Running { jobs: Jobs, thread: JoinHandle<()> },
    Stopped,
}

/// WAL redo for one tenant on one core.
pub struct ChildRedo {
    settings: ChildSettings,
    counters: Arc<Counters>,
    stop: Arc<AtomicBool>,
    state: RefCell<State>,
    /// There was a request since the last [`Redo::rest`].
    used: Cell<bool>,
}

impl ChildRedo {
    /// Starts nothing yet.
    pub fn new(settings: ChildSettings) -> Self {
        ChildRedo::counted(settings, Arc::default())
    }

    /// As [`ChildRedo::new`], with counters that the caller keeps.
    pub fn counted(settings: ChildSettings, counters: Arc<Counters>) -> Self {
        let (stop, used) = Default::default();
        ChildRedo { settings, counters, stop, state: RefCell::new(State::Idle), used }
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Ends thread and process; requests that wait get [`RedoError::Shutdown`]. When this
    /// returns, no process is left. Calling it again does nothing.
    ///
    /// Waits, without yielding, for at most one poll of the thread.
    pub async fn shutdown(&self) {
        self.stop.store(true, Ordering::Release);
        let state = std::mem::replace(&mut *self.state.borrow_mut(), State::Stopped);
        if let State::Running { jobs, thread } = state {
            jobs.close();
            if thread.join().is_err() {
                tracing::error!(tenant = %self.settings.tenant, "the wal-redo thread panicked");
            }
        }
    }

    fn jobs(&self) -> Result<Jobs, RedoError> {
        let mut state = self.state.borrow_mut();
        match &*state {
            State::Running { jobs, .. } => return Ok(jobs.clone()),
            State::Stopped => return Err(RedoError::Shutdown),
            State::Idle => {}
        }
        let (jobs, queue) = async_channel::bounded(REDO_QUEUE_REQUESTS);
        let driver = Driver {
            settings: self.settings.clone(),
            counters: self.counters.clone(),
            stop: self.stop.clone(),
            queue,
            waiting: VecDeque::new(),
            process: None,
        };
        let thread = std::thread::Builder::new()
            .name("wal-redo".into())
            .spawn(move || driver.run())
            .map_err(|error| failure(format!("no thread could be started: {error}")))?;
        *state = State::Running { jobs: jobs.clone(), thread };
        Ok(jobs)
    }
}

impl Drop for ChildRedo {
    fn drop(&mut self) {
        // The thread sees the flag, or its channel close, and ends on its own.
        self.stop.store(true, Ordering::Release);
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
            let (answer, reply) = oneshot::channel();
            let job = Job { frames, records, rel, block, answer, failures: 0 };
            self.used.set(true);
            self.jobs()?.send(Some(job)).await.map_err(|_| RedoError::Shutdown)?;
            reply.await.unwrap_or(Err(RedoError::Shutdown))
        }
        .boxed_local()
    }

    fn rest(&self) {
        if let State::Running { jobs, .. } = &*self.state.borrow()
            && !self.used.replace(false)
        {
            let _ = jobs.try_send(None); // Full: it is needed after all.
        }
    }
}

fn failure(problem: String) -> RedoError {
    RedoError::Child { problem }
}

/// How an exchange with the process ended early.
enum Trouble {
    /// The process is of no use any more.
    Process(String),
    /// It could not even be started.
    Start(String),
    /// It answered with an error, and ended.
    Refused,
    /// We are to stop.
    Stop,
}

struct Driver {
    settings: ChildSettings,
    counters: Arc<Counters>,
    stop: Arc<AtomicBool>,
    queue: async_channel::Receiver<Option<Job>>,
    waiting: VecDeque<Job>,
    process: Option<Process>,
}

impl Driver {
    fn run(mut self) {
        self.pin();
        while !self.stop.load(Ordering::Acquire) {
            if self.waiting.is_empty() {
                match self.queue.recv_blocking() {
                    Ok(Some(job)) => self.waiting.push_back(job),
                    Ok(None) => self.end_process(),
                    Err(_) => break,
                }
            }
            while self.waiting.len() < REDO_BATCH_REQUESTS {
                let Ok(job) = self.queue.try_recv() else { break };
                self.waiting.extend(job);
            }
            self.waiting.retain(|job| !job.answer.is_canceled());
            if !self.waiting.is_empty() {
                let start = Instant::now();
                let trouble = self.exchange().err();
                add(&self.counters.busy_micros, start.elapsed().as_micros() as u64);
                if let Some(trouble) = trouble {
                    self.recover(trouble);
                }
            }
        }
        self.end_process();
        self.queue.close();
        self.waiting.extend(std::iter::from_fn(|| self.queue.try_recv().ok()).flatten());
        while !self.waiting.is_empty() {
            self.answer(Err(RedoError::Shutdown));
        }
    }

    fn pin(&self) {
        let Some(cpu) = self.settings.cpu else { return };
        let mut set = CpuSet::new();
        let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
        if let Err(error) = pinned {
            tracing::warn!(tenant = %self.settings.tenant, cpu, %error, "wal-redo is not pinned");
        }
    }

    /// Answers the request whose turn it is.
    fn answer(&mut self, answer: Answer) {
        let Some(job) = self.waiting.pop_front() else { return };
        add(&self.counters.requests, 1);
        add(&self.counters.records, job.records);
        add(&self.counters.errors, u64::from(answer.is_err()));
        // The caller may be gone; that is its right.
        let _ = job.answer.send(answer);
    }

    /// Sends a batch and takes in its replies.
    fn exchange(&mut self) -> Result<(), Trouble> {
        if self.process.is_none() {
            let process = Process::start(&self.settings).map_err(Trouble::Start)?;
            add(&self.counters.started, 1);
            self.process = Some(process);
            self.check_pong()?;
        }
        if self.process.as_ref().is_some_and(|process| !process.input.is_empty()) {
            return Err(Trouble::Process("it answered more than it was asked".into()));
        }
        let alone = self.waiting.front().is_some_and(|job| job.failures > 0);
        let mut frames = Vec::new();
        let mut left = 0;
        for job in self.waiting.iter().take(if alone { 1 } else { REDO_BATCH_REQUESTS }) {
            if left > 0 && frames.len() + job.frames.len() > REDO_BATCH_BYTES {
                break;
            }
            frames.extend_from_slice(&job.frames);
            left += 1;
        }
        let mut written = 0;
        while left > 0 {
            match self.next_reply(&frames, &mut written, self.settings.timeout)? {
                Reply::Page(page) => self.answer(Ok(page)),
                Reply::Error(message) => {
                    if let Some(Job { rel, block, .. }) = self.waiting.front() {
                        let (rel, block) = (*rel, *block);
                        self.answer(Err(RedoError::Refused { rel, block, message }));
                    }
                    return Err(Trouble::Refused);
                }
                Reply::Pong(_) => return Err(Trouble::Process("it answered out of turn".into())),
            }
            left -= 1;
        }
        Ok(())
    }

    /// The first exchange with a process: is it ours, and set as we want it?
    fn check_pong(&mut self) -> Result<(), Trouble> {
        let mut ping = Vec::new();
        protocol::encode_ping(&mut ping);
        let hints = if self.settings.redo.hint_bits_logged { "on" } else { "off" };
        let reply = self.next_reply(&ping, &mut 0, REDO_START_TIMEOUT);
        match reply {
            Ok(Reply::Pong(text)) if text.starts_with(PONG_PREFIX) && text.ends_with(hints) => {
                if let Some(process) = &mut self.process {
                    process.remove_scratch();
                }
                Ok(())
            }
            Ok(other) => Err(Trouble::Start(format!(
                "{} does not match this program: it answered {other:?}",
                self.settings.walredo_so.display()
            ))),
            Err(Trouble::Process(problem)) => Err(Trouble::Start(problem)),
            Err(other) => Err(other),
        }
    }

    fn next_reply(
        &mut self,
        frames: &[u8],
        written: &mut usize,
        timeout: Duration,
    ) -> Result<Reply, Trouble> {
        let process = self.process.as_mut().ok_or(Trouble::Process("it is gone".into()))?;
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(reply) = protocol::decode_reply(&mut process.input)
                .map_err(|error| Trouble::Process(error.to_string()))?
            {
                return Ok(reply);
            }
            if self.stop.load(Ordering::Acquire) {
                return Err(Trouble::Stop);
            }
            if Instant::now() >= deadline {
                return Err(Trouble::Process(format!("no answer within {timeout:?}")));
            }
            process.move_bytes(frames, written).map_err(Trouble::Process)?;
        }
    }

    fn recover(&mut self, trouble: Trouble) {
        let (problem, for_all) = match trouble {
            Trouble::Process(problem) => (problem, false),
            Trouble::Start(problem) => (problem, true),
            Trouble::Refused | Trouble::Stop => return self.end_process(),
        };
        add(&self.counters.failures, 1);
        let status = self.end_process_status();
        let problem = format!("{problem}; {status}");
        tracing::warn!(tenant = %self.settings.tenant, %problem, "the wal-redo process failed");
        let concerned = if for_all { self.waiting.len() } else { 1 };
        for job in self.waiting.iter_mut().take(concerned) {
            job.failures += 1;
        }
        for _ in 0..concerned {
            if self.waiting.front().is_some_and(|job| job.failures > 1) {
                self.answer(Err(failure(problem.clone())));
            }
        }
    }

    fn end_process(&mut self) {
        self.end_process_status();
    }

    fn end_process_status(&mut self) -> String {
        match self.process.take() {
            Some(process) => process.end(),
            None => "it was not running".into(),
        }
    }
}

/// A running process with our ends of its pipes, none of which blocks.
struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    stderr: ChildStderr,
    input: BytesMut,
    log_line: Vec<u8>,
    scratch: Option<PathBuf>,
    tenant: String,
}

static SCRATCH_NUMBER: AtomicU64 = AtomicU64::new(0);

impl Process {
    fn start(settings: &ChildSettings) -> Result<Process, String> {
        let number = SCRATCH_NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("walredo-{}-{number}", std::process::id());
        let scratch = settings.scratch_dir.join(name);
        let process = Self::start_in(settings, scratch.clone());
        if process.is_err() {
            let _ = std::fs::remove_dir_all(&scratch);
        }
        process
    }

    fn start_in(settings: &ChildSettings, scratch: PathBuf) -> Result<Process, String> {
        let at = |what: &str, path: &PathBuf, error: &dyn std::fmt::Display| {
            format!("{what} {}: {error}", path.display())
        };
        std::fs::create_dir(&scratch).map_err(|e| at("cannot create", &scratch, &e))?;
        let hints = if settings.redo.hint_bits_logged { "on" } else { "off" };
        let mut command = Command::new(&settings.postgres_bin);
        command.arg("--wal-redo").arg(format!("--hint-bits={hints}"));
        if nix::unistd::geteuid().is_root() {
            let id = UNPRIVILEGED_ID;
            std::os::unix::fs::chown(&scratch, Some(id), Some(id))
                .map_err(|e| at("cannot give away", &scratch, &e))?;
            command.arg(format!("--uid={id}")).arg(format!("--gid={id}"));
        }
        let mut child = command
            .env_clear()
            .env("LC_ALL", "C")
            .env("LD_PRELOAD", &settings.walredo_so)
            .current_dir(&scratch)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| at("cannot start", &settings.postgres_bin, &e))?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            let _ = child.kill();
            let _ = child.wait();
            return Err("the process has no pipes".into());
        };
        let process = Process {
            child,
            stdin,
            stdout,
            stderr,
            input: BytesMut::new(),
            log_line: Vec::new(),
            scratch: Some(scratch),
            tenant: settings.tenant.clone(),
        };
        let fds = [process.stdin.as_fd(), process.stdout.as_fd(), process.stderr.as_fd()];
        let blocking = fds.into_iter().find_map(|fd| set_nonblocking(fd).err());
        match blocking {
            None => Ok(process),
            Some(error) => {
                process.end();
                Err(format!("cannot set up the pipes: {error}"))
            }
        }
    }

    /// Waits until a pipe is ready, at most [`REDO_POLL`], and moves what can be moved.
    fn move_bytes(&mut self, frames: &[u8], written: &mut usize) -> Result<(), String> {
        let rest = frames.get(*written..).unwrap_or_default();
        let mut fds = vec![
            PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stderr.as_fd(), PollFlags::POLLIN),
        ];
        if !rest.is_empty() {
            fds.push(PollFd::new(self.stdin.as_fd(), PollFlags::POLLOUT));
        }
        let wait = PollTimeout::try_from(REDO_POLL).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, wait) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(format!("poll: {error}")),
        }
        self.read_log();
        self.read_replies()?;
        if !rest.is_empty() {
            match self.stdin.write(rest) {
                Ok(count) => *written += count,
                Err(error) if is_transient(&error) => {}
                // What it said before it died comes first; the end of its output follows.
                Err(_) if !self.input.is_empty() => {}
                Err(error) => {
                    return self.read_replies().map_err(|end| format!("{end} ({error})"));
                }
            }
        }
        Ok(())
    }

    fn read_replies(&mut self) -> Result<(), String> {
        let mut piece = [0; 64 * 1024];
        match self.stdout.read(&mut piece) {
            Ok(0) => Err("it ended".into()),
            Ok(count) => {
                self.input.extend_from_slice(piece.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) if is_transient(&error) => Ok(()),
            Err(error) => Err(format!("reading from it: {error}")),
        }
    }

    /// Hands its complaints to the log, line by line.
    fn read_log(&mut self) {
        let mut piece = [0; 4096];
        // A bound, because a process gone mad must not keep us from looking at the clock.
        for _ in 0..16 {
            let Ok(count @ 1..) = self.stderr.read(&mut piece) else { break };
            for &byte in piece.iter().take(count) {
                if byte == b'\n' || self.log_line.len() >= REDO_TEXT_BYTES_MAX {
                    self.log();
                }
                if byte != b'\n' {
                    self.log_line.push(byte);
                }
            }
            if count < piece.len() {
                break;
            }
        }
    }

    fn log(&mut self) {
        if !self.log_line.is_empty() {
            let line = String::from_utf8_lossy(&self.log_line);
            tracing::warn!(tenant = %self.tenant, "wal-redo: {line}");
            self.log_line.clear();
        }
    }

    fn remove_scratch(&mut self) {
        if let Some(path) = self.scratch.take()
            && let Err(error) = std::fs::remove_dir_all(&path)
        {
            tracing::warn!(tenant = %self.tenant, path = %path.display(), %error,
                "cannot remove a scratch directory");
        }
    }

    /// Kills and reaps the process, and says how it had ended.
    fn end(mut self) -> String {
        let ended = self.child.try_wait().ok().flatten();
        if ended.is_none() {
            let _ = self.child.kill();
        }
        let status = self.child.wait();
        self.read_log();
        self.log();
        self.remove_scratch();
        match (ended, status) {
            (_, Err(error)) => format!("it cannot be reaped: {error}"),
            (Some(status), _) => status.to_string(),
            (None, Ok(status)) => format!("{status} (killed by us unless it was dying)"),
        }
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
}

fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
