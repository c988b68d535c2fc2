//! One running wal-redo process, and our ends of its pipes.
//!
//! Started by a thread of the pool; the kernel kills it when that thread ends. It is of use only
//! after [`Process::launch`] has had the answer to a ping: then it is sandboxed, and said so.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::time::TimeSpec;

use super::inline::Sent;
use super::{Counters, add};
use crate::base::{BlockNumber, RelTag};
use crate::limits::{REDO_INPUT_BYTES, REDO_PIPE_BYTES, REDO_POLL};
use crate::limits::{REDO_START_TIMEOUT, REDO_TEXT_BYTES_MAX};
use crate::redo::RedoSettings;
use crate::redo::pool::PoolSettings;
use crate::redo::protocol::{self, PONG_PREFIX, REPLY_BYTES_MAX, Reply};

/// User and group that the process becomes when the node runs as root: `nobody`.
const UNPRIVILEGED_ID: u32 = 65534;

/// How an exchange with the process ended early.
#[derive(Debug)]
pub(in crate::redo) enum Trouble {
    /// The process is of no use any more.
    Process(String),
    /// It could not even be started.
    Start(String),
    /// It answered with an error, and ended.
    Refused(String),
    /// We are to stop.
    Stop,
}

/// What has come is not the answer that was asked for.
#[derive(Debug)]
pub(super) struct NotPlain;

/// See the module's text. None of the pipes blocks.
pub(in crate::redo) struct Process {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    stderr: ChildStderr,
    input: Input,
    log_line: Vec<u8>,
    scratch: Option<PathBuf>,
    /// Whose records it replays; nobody's while it is a spare.
    pub(super) tenant: String,
    /// What it is asked for; for the log.
    pub(super) page: Option<(RelTag, BlockNumber)>,
    /// Time with requests under way.
    pub(super) busy: Duration,
    /// What it was sent by somebody who did not wait for all of the answers.
    pub(in crate::redo) sent: Option<Sent>,
    /// How it had ended.
    ended: Option<String>,
    counters: Arc<Counters>,
}

/// Bytes that were read and not yet taken.
struct Input {
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Input { buffer: vec![0; REDO_INPUT_BYTES].into(), start: 0, end: 0 }
    }

    fn bytes(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// Room for at least the rest of a reply.
    fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < REPLY_BYTES_MAX {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.buffer.get_mut(self.end..).unwrap_or_default()
    }
}

static SCRATCH_NUMBER: AtomicU64 = AtomicU64::new(0);

impl Process {
    /// Starts a process and waits for its first answer: is it ours, and sandboxed?
    pub(in crate::redo) fn launch(
        settings: &PoolSettings,
        counters: &Arc<Counters>,
        tenant: &str,
        page: Option<(RelTag, BlockNumber)>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Process, Trouble> {
        let start = Instant::now();
        let mut process = Self::start(settings, counters, tenant).map_err(Trouble::Start)?;
        process.page = page;
        let mut ping = Vec::new();
        protocol::encode_ping(&mut ping);
        let text = process.pong(&ping, stop, &settings.walredo_so)?;
        if !text.contains(" sandbox seccomp") {
            if !settings.sandbox_optional {
                return Err(Trouble::Start(format!("it is not in a sandbox: '{text}'")));
            }
            tracing::error!(
                "redo_sandbox_optional is on and the kernel has no system call filter: \
                 wal-redo processes RUN WITHOUT A SANDBOX. Never do this with WAL of others"
            );
        }
        process.remove_scratch();
        add(&counters.started, 1);
        counters.launch_micros.count_shared(start.elapsed().as_micros() as u64);
        Ok(process)
    }

    /// Binds it to a tenant, for life.
    pub(super) fn bind(
        &mut self,
        settings: &PoolSettings,
        tenant: &str,
        redo: RedoSettings,
        stop: &dyn Fn() -> bool,
    ) -> Result<(), Trouble> {
        self.tenant = tenant.to_owned();
        let mut frames = Vec::new();
        protocol::encode_settings(redo, &mut frames);
        let text = self.pong(&frames, stop, &settings.walredo_so)?;
        let hints = if redo.hint_bits_logged { "hint-bits on" } else { "hint-bits off" };
        match text.ends_with(hints) {
            true => Ok(()),
            false => Err(Trouble::Start(format!("it was told '{hints}' and answered '{text}'"))),
        }
    }

    /// Process id.
    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    /// True if it has sent more than was taken.
    pub(super) fn has_input(&self) -> bool {
        !self.input.bytes().is_empty()
    }

    fn pong(
        &mut self,
        frames: &[u8],
        stop: &dyn Fn() -> bool,
        library: &std::path::Path,
    ) -> Result<String, Trouble> {
        match self.reply(frames, &mut 0, REDO_START_TIMEOUT, stop) {
            Ok(Reply::Pong(text)) if text.starts_with(PONG_PREFIX) => Ok(text),
            Ok(other) => Err(Trouble::Start(format!(
                "{} does not match this program: it answered {other:?}",
                library.display()
            ))),
            Err(Trouble::Process(problem)) => {
                Err(Trouble::Start(format!("{problem}; {}", self.end())))
            }
            Err(other) => Err(other),
        }
    }

    /// The next reply, while what is left of `frames` is written.
    pub(super) fn reply(
        &mut self,
        frames: &[u8],
        written: &mut usize,
        timeout: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<Reply, Trouble> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some((reply, len)) = protocol::decode_reply(self.input.bytes())
                .map_err(|error| Trouble::Process(error.to_string()))?
            {
                self.input.start += len;
                return Ok(reply);
            }
            if stop() {
                return Err(Trouble::Stop);
            }
            if Instant::now() >= deadline {
                return Err(Trouble::Process(format!("no answer within {timeout:?}")));
            }
            self.move_bytes(frames, written).map_err(Trouble::Process)?;
        }
    }

    fn start(
        settings: &PoolSettings,
        counters: &Arc<Counters>,
        tenant: &str,
    ) -> Result<Process, String> {
        let number = SCRATCH_NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("walredo-{}-{number}", std::process::id());
        let scratch = settings.scratch_dir.join(name);
        let process = Self::start_in(settings, counters, tenant, scratch.clone());
        if process.is_err() {
            let _ = std::fs::remove_dir_all(&scratch);
        }
        process
    }

    fn start_in(
        settings: &PoolSettings,
        counters: &Arc<Counters>,
        tenant: &str,
        scratch: PathBuf,
    ) -> Result<Process, String> {
        let at = |what: &str, path: &PathBuf, error: &dyn std::fmt::Display| {
            format!("{what} {}: {error}", path.display())
        };
        std::fs::create_dir(&scratch).map_err(|e| at("cannot create", &scratch, &e))?;
        let mut command = Command::new(&settings.postgres_bin);
        command.args(["--wal-redo", "--hint-bits=off"]);
        if nix::unistd::geteuid().is_root() {
            let id = UNPRIVILEGED_ID;
            std::os::unix::fs::chown(&scratch, Some(id), Some(id))
                .map_err(|e| at("cannot give away", &scratch, &e))?;
            command.arg(format!("--uid={id}")).arg(format!("--gid={id}"));
        }
        if settings.sandbox_optional {
            command.arg("--sandbox=optional");
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
        let alive = counters.alive.fetch_add(1, Ordering::Relaxed) + 1;
        counters.alive_max.fetch_max(alive, Ordering::Relaxed);
        let mut process = Process {
            child,
            stdin,
            stdout,
            stderr,
            input: Input::new(),
            log_line: Vec::new(),
            scratch: Some(scratch),
            tenant: tenant.to_owned(),
            page: None,
            busy: Duration::ZERO,
            sent: None,
            ended: None,
            counters: counters.clone(),
        };
        let fds = [process.stdin.as_fd(), process.stdout.as_fd(), process.stderr.as_fd()];
        let blocking = fds.into_iter().find_map(|fd| set_nonblocking(fd).err());
        // So that many pages fit. Where the kernel does not allow it, they need more turns.
        let _ = fcntl(process.stdout.as_fd(), FcntlArg::F_SETPIPE_SZ(REDO_PIPE_BYTES));
        match blocking {
            None => Ok(process),
            Some(error) => {
                process.end();
                Err(format!("cannot set up the pipes: {error}"))
            }
        }
    }

    /// The answer of a page or a pong, if that is what has come; `Err`: it is something else,
    /// which is left for [`Process::reply`].
    pub(super) fn plain_reply(&mut self, is_ping: bool) -> Result<Option<Bytes>, NotPlain> {
        let bytes = self.input.bytes();
        let status = if is_ping { 2 } else { 0 };
        if bytes.get(4).is_some_and(|found| *found != status) {
            return Err(NotPlain);
        }
        let Some((reply, len)) = protocol::decode_reply(bytes).map_err(|_| NotPlain)? else {
            return Ok(None);
        };
        let answer = match reply {
            Reply::Page(page) => page,
            Reply::Pong(text) => text.into(),
            Reply::Error(_) => return Err(NotPlain),
        };
        self.input.start += len;
        Ok(Some(answer))
    }

    /// Reads what output there is.
    pub(super) fn read_now(&mut self) -> Result<(), String> {
        self.read_log();
        self.read_replies()
    }

    /// Waits until there is output, at most `wait`, and reads it.
    pub(super) fn read_within(&mut self, wait: Duration) -> Result<(), String> {
        let mut fds = [
            PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stderr.as_fd(), PollFlags::POLLIN),
        ];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(format!("poll: {error}")),
        }
        let [has_reply, has_log] = fds.map(|fd| fd.any().unwrap_or(true));
        if has_log {
            self.read_log();
        }
        if has_reply { self.read_replies() } else { Ok(()) }
    }

    /// Writes what the pipe takes, waits until a pipe is ready, at most [`REDO_POLL`], and reads
    /// from those that are. Three system calls for a short request and its reply: they are a good
    /// part of what it costs.
    fn move_bytes(&mut self, frames: &[u8], written: &mut usize) -> Result<(), String> {
        self.write(frames, written)?;
        let mut fds = vec![
            PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.stderr.as_fd(), PollFlags::POLLIN),
        ];
        if *written < frames.len() {
            fds.push(PollFd::new(self.stdin.as_fd(), PollFlags::POLLOUT));
        }
        let wait = PollTimeout::try_from(REDO_POLL).unwrap_or(PollTimeout::ZERO);
        match poll(&mut fds, wait) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(format!("poll: {error}")),
        }
        // The end of a pipe counts as well.
        let ready = |fd: usize| fds.get(fd).and_then(PollFd::any).unwrap_or(true);
        let (has_reply, has_log) = (ready(0), ready(1));
        if has_log {
            self.read_log();
        }
        if has_reply { self.read_replies() } else { Ok(()) }
    }

    /// Writes what the pipe takes of the rest of `frames`.
    pub(super) fn write(&mut self, frames: &[u8], written: &mut usize) -> Result<(), String> {
        let rest = frames.get(*written..).unwrap_or_default();
        if rest.is_empty() {
            return Ok(());
        }
        match self.stdin.write(rest) {
            Ok(count) => *written += count,
            Err(error) if is_transient(&error) => {}
            // What it said before it died comes first; the end of its output follows.
            Err(_) if self.has_input() => {}
            Err(error) => {
                return self.read_replies().map_err(|end| format!("{end} ({error})"));
            }
        }
        Ok(())
    }

    fn read_replies(&mut self) -> Result<(), String> {
        match self.stdout.read(self.input.room()) {
            Ok(0) => Err("it ended".into()),
            Ok(count) => {
                self.input.end += count;
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
        if self.log_line.is_empty() {
            return;
        }
        let (tenant, pid) = (&self.tenant, self.child.id());
        let line = String::from_utf8_lossy(&self.log_line);
        match self.page {
            Some((rel, block)) => tracing::warn!(%tenant, pid, %rel, block, "wal-redo: {line}"),
            None => tracing::warn!(%tenant, pid, "wal-redo: {line}"),
        }
        self.log_line.clear();
    }

    fn remove_scratch(&mut self) {
        if let Some(path) = self.scratch.take()
            && let Err(error) = std::fs::remove_dir_all(&path)
        {
            tracing::warn!(tenant = %self.tenant, path = %path.display(), %error,
                "cannot remove a scratch directory");
        }
    }

    /// Kills and reaps the process if it was not yet, and says how it had ended.
    pub(super) fn end(&mut self) -> String {
        if let Some(ended) = &self.ended {
            return ended.clone();
        }
        let by_itself = self.child.try_wait().ok().flatten();
        if by_itself.is_none() {
            let _ = self.child.kill();
        }
        let status = self.child.wait();
        self.counters.alive.fetch_sub(1, Ordering::Relaxed);
        self.read_log();
        self.log();
        self.remove_scratch();
        let text = match (by_itself, status) {
            (_, Err(error)) => format!("it cannot be reaped: {error}"),
            (Some(status), _) => status.to_string(),
            (None, Ok(status)) => format!("{status} (killed by us unless it was dying)"),
        };
        self.ended = Some(text.clone());
        text
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
}

fn is_transient(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
