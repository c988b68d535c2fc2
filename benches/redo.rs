//! Redo of a page in the wal-redo process, against a bare pipe round trip of the same bytes.
//!
//! All on one CPU: a bare child (this program again) that reads as many bytes and answers as
//! many, the wal-redo process over blocking pipes, the wal-redo process as the node uses it
//! ([`ChildRedo`] from an executor), and native redo ([`NativeRedo`]), which needs no process.
//! Then the latter two with up to 128 callers, and whole loads. See `docs/benchmarks.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::too_many_lines,
    reason = "a benchmark drives other programs and measures time"
)]

mod common;

#[path = "redo/callers.rs"]
mod callers;
#[path = "redo/load.rs"]
mod load;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Result, Rounds, Scratch, sized, wanted};
use futures_lite::future::block_on;
use futures_util::future::{LocalBoxFuture, join_all};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pgstrata::base::page::page_lsn;
use pgstrata::base::wal_record::wal_record_crc;
use pgstrata::base::{Lsn, RelNode};
use pgstrata::cli::pg::bin_dir;
use pgstrata::redo::child::{ChildRedo, ChildSettings};
use pgstrata::redo::native::run::NativeRedo;
use pgstrata::redo::protocol::{encode_ping, encode_request};
use pgstrata::redo::{Redo, RedoError, RedoRequest, RedoSettings};

const CPU: usize = 0;
const DEPTH: usize = 16;
const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };
const ECHO: &str = "--echo-child";

/// A WAL record of the heap: tuple number `line` of block 0 with `data` bytes. As the first one
/// it initialises the page. `pad` more bytes at its end are read by nobody, but make it longer.
fn insert(line: u16, data: usize, pad: usize) -> Bytes {
    let first = line == 1;
    let tuple_len = u16::try_from(5 + 1 + data).unwrap_or(u16::MAX);
    let mut body = vec![0, if first { 0x60 } else { 0x20 }];
    body.extend(tuple_len.to_le_bytes());
    for number in [REL.spc, REL.db, REL.rel, 0] {
        body.extend(number.to_le_bytes());
    }
    body.extend([255, u8::try_from(3 + pad).unwrap_or(u8::MAX)]);
    body.extend([1, 0, 0, 8, 24, 0]);
    body.extend((0..data).map(|byte| byte as u8));
    body.extend(line.to_le_bytes());
    body.extend(std::iter::repeat_n(0, 1 + pad));
    let mut record = Vec::new();
    record.extend(u32::try_from(24 + body.len()).unwrap_or(u32::MAX).to_le_bytes());
    record.extend([0; 12]);
    record.extend([if first { 0x80 } else { 0 }, 10, 0, 0, 0, 0, 0, 0]);
    record.extend(body);
    let crc = wal_record_crc(&record).unwrap_or(0);
    record[20..24].copy_from_slice(&crc.to_le_bytes());
    record.into()
}

fn request(base: Option<Bytes>, records: impl Iterator<Item = Bytes>) -> RedoRequest {
    let records = records.enumerate().map(|(n, bytes)| (Lsn(0x1000 + 8 * n as u64), bytes));
    RedoRequest { rel: REL.fork(0), block: 0, base, records: records.collect() }
}

/// The other end of a bare pipe: answers every `request` bytes by `reply` bytes.
fn echo_child(request: usize, reply: usize) -> Result<()> {
    let (input, output) = (std::io::stdin(), std::io::stdout());
    let answer = vec![7; reply];
    let mut buffer = vec![0; 64 * 1024];
    let mut have = 0;
    loop {
        // Past the standard library's own buffers, which a bare pipe would not have.
        let count = nix::unistd::read(&input, &mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        have += count;
        while have >= request {
            have -= request;
            let mut rest = &answer[..];
            while !rest.is_empty() {
                rest = &rest[nix::unistd::write(&output, rest)?..];
            }
        }
    }
}

/// A process with pipes to it.
struct Piped {
    child: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
}

impl Piped {
    fn start(mut command: Command) -> Result<Piped> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        Ok(Piped { child, stdin: stdin.ok_or("pipe")?, stdout: stdout.ok_or("pipe")? })
    }

    fn echo(request: usize, reply: usize) -> Result<Piped> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args([ECHO, &request.to_string(), &reply.to_string()]);
        Piped::start(command)
    }

    /// The wal-redo process, started as `redo::child` starts it.
    fn wal_redo(scratch: &Path) -> Result<Piped> {
        let dir = scratch.join("direct");
        std::fs::create_dir_all(&dir)?;
        let mut command = Command::new(bin_dir().join("postgres"));
        command.args(["--wal-redo", "--hint-bits=off"]);
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&dir, Some(65534), Some(65534))?;
            command.args(["--uid=65534", "--gid=65534"]);
        }
        command.env_clear().env("LC_ALL", "C").env("LD_PRELOAD", common::walredo_library()?);
        command.current_dir(dir);
        Piped::start(command)
    }

    fn blocking(&self, blocking: bool) -> Result<()> {
        let flags = if blocking { OFlag::empty() } else { OFlag::O_NONBLOCK };
        fcntl(self.stdin.as_fd(), FcntlArg::F_SETFL(flags))?;
        fcntl(self.stdout.as_fd(), FcntlArg::F_SETFL(flags))?;
        Ok(())
    }

    /// One request, one reply.
    fn round_trip(&mut self, request: &[u8], reply: &mut [u8]) -> Result<()> {
        self.stdin.write_all(request)?;
        Ok(self.stdout.read_exact(reply)?)
    }

    /// Writes all of `requests` and reads `left` bytes, whichever is possible.
    fn exchange(&mut self, requests: &[u8], mut left: usize, buffer: &mut [u8]) -> Result<()> {
        let mut rest = requests;
        while left > 0 {
            let mut fds = vec![PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            if !rest.is_empty() {
                fds.push(PollFd::new(self.stdin.as_fd(), PollFlags::POLLOUT));
            }
            poll(&mut fds, PollTimeout::NONE)?;
            match self.stdout.read(buffer) {
                Ok(0) => return Err("the child ended".into()),
                Ok(count) => left = left.checked_sub(count).ok_or("too long a reply")?,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if !rest.is_empty() {
                match self.stdin.write(rest) {
                    Ok(count) => rest = &rest[count..],
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

impl Drop for Piped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn median_us(mut samples: Vec<Duration>) -> f64 {
    samples.sort_unstable();
    samples.get(samples.len() / 2).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1e6)
}

fn timed(count: usize, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut samples = Vec::with_capacity(count);
    for _ in 0..count {
        let begin = Instant::now();
        work()?;
        samples.push(begin.elapsed());
    }
    Ok(median_us(samples))
}

/// Microseconds per request: alone, and with [`DEPTH`] at a time.
#[derive(Clone, Copy)]
struct Figures {
    alone: f64,
    deep: f64,
}

fn piped(process: &mut Piped, frame: &[u8], reply: usize, count: usize) -> Result<Figures> {
    let mut buffer = vec![0; 64 * 1024];
    process.blocking(true)?;
    for _ in 0..count / 10 {
        process.round_trip(frame, &mut buffer[..reply])?;
    }
    let alone = timed(count, || process.round_trip(frame, &mut buffer[..reply]))?;
    process.blocking(false)?;
    let frames = frame.repeat(DEPTH);
    let batch = timed(count / 4, || process.exchange(&frames, DEPTH * reply, &mut buffer))?;
    Ok(Figures { alone, deep: batch / DEPTH as f64 })
}

fn child_settings(scratch: &Path) -> Result<ChildSettings> {
    Ok(ChildSettings {
        tenant: "benchmark".into(),
        postgres_bin: bin_dir().join("postgres"),
        walredo_so: common::walredo_library()?,
        scratch_dir: scratch.to_owned(),
        cpu: Some(CPU),
        redo: RedoSettings { hint_bits_logged: false },
        timeout: Duration::from_secs(10),
    })
}

fn through_executor(scratch: &Path, request: &RedoRequest, count: usize) -> Result<Figures> {
    let settings = child_settings(scratch)?;
    let request = request.clone();
    let last = request.records.last().map(|(lsn, _)| *lsn).unwrap_or_default();
    common::shard::on_executor(move || async move {
        let child = ChildRedo::new(settings);
        for _ in 0..count / 10 + 1 {
            let page = child.redo(request.clone()).await?;
            if page_lsn(&page) != last {
                return Err(format!("the page has LSN {}", page_lsn(&page)).into());
            }
        }
        let mut samples = Vec::new();
        for _ in 0..count {
            let begin = Instant::now();
            child.redo(request.clone()).await?;
            samples.push(begin.elapsed());
        }
        let alone = median_us(samples);
        let mut samples = Vec::new();
        for _ in 0..count / 4 {
            let begin = Instant::now();
            let pages = join_all((0..DEPTH).map(|_| child.redo(request.clone()))).await;
            samples.push(begin.elapsed());
            pages.into_iter().collect::<std::result::Result<Vec<_>, _>>()?;
        }
        child.shutdown().await;
        Ok(Figures { alone, deep: median_us(samples) / DEPTH as f64 })
    })
}

/// What stands behind native redo where no record needs it.
struct Nobody;

impl Redo for Nobody {
    fn redo(&self, _: RedoRequest) -> LocalBoxFuture<'_, std::result::Result<Bytes, RedoError>> {
        Box::pin(async { Err(RedoError::Shutdown) })
    }
}

fn native(request: &RedoRequest, expected: &Bytes, count: usize) -> Result<Figures> {
    let redo = NativeRedo::new(Nobody, RedoSettings { hint_bits_logged: false });
    for _ in 0..count / 10 + 1 {
        if block_on(redo.redo(request.clone()))? != expected {
            return Err("native redo made another page than PostgreSQL".into());
        }
    }
    let alone = timed(count, || {
        block_on(redo.redo(request.clone()))?;
        Ok(())
    })?;
    let batch = timed(count / 4, || {
        for _ in 0..DEPTH {
            block_on(redo.redo(request.clone()))?;
        }
        Ok(())
    })?;
    Ok(Figures { alone, deep: batch / DEPTH as f64 })
}

struct Case {
    name: &'static str,
    frame: Vec<u8>,
    reply: usize,
    /// None for a ping, which the node sends only once.
    request: Option<RedoRequest>,
    /// The page after the request.
    page: Bytes,
}

/// What a page looks like after `request`.
fn page_of(process: &mut Piped, request: &RedoRequest) -> Result<Bytes> {
    let mut frame = Vec::new();
    encode_request(request, &mut frame)?;
    let mut reply = vec![0; 5 + 8192];
    process.round_trip(&frame, &mut reply)?;
    if reply[4] != 0 {
        return Err("wal-redo answered with an error".into());
    }
    Ok(Bytes::from(reply).slice(5..))
}

fn cases(scratch: &Path) -> Result<Vec<Case>> {
    let mut process = Piped::wal_redo(scratch)?;
    let mut ping = Vec::new();
    encode_ping(&mut ping);
    let mut head = [0; 5];
    process.round_trip(&ping, &mut head)?;
    let text = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
    process.stdout.read_exact(&mut vec![0; text])?;
    let mut cases = vec![Case {
        name: "ping",
        frame: ping,
        reply: 5 + text,
        request: None,
        page: Bytes::new(),
    }];
    let base = page_of(&mut process, &request(None, (1..=10).map(|n| insert(n, 8, 0))))?;
    let requests = [
        ("short: 2 records", request(None, (1..=2).map(|n| insert(n, 462, 0)))),
        ("medium: 227 records", request(None, (1..=227).map(|n| insert(n, 0, 46)))),
        ("page + 10 records", request(Some(base), (11..=20).map(|n| insert(n, 8, 0)))),
    ];
    for (name, request) in requests {
        let last = request.records.last().map(|(lsn, _)| *lsn).unwrap_or_default();
        let page = page_of(&mut process, &request)?;
        if page_lsn(&page) != last {
            return Err(format!("{name}: wrong page").into());
        }
        let mut frame = Vec::new();
        encode_request(&request, &mut frame)?;
        cases.push(Case { name, frame, reply: 5 + 8192, request: Some(request), page });
    }
    Ok(cases)
}

/// Figures of one way over all rounds.
#[derive(Default)]
struct Way {
    figures: [Rounds; 2],
    ratios: [Rounds; 2],
}

impl Way {
    fn add(&mut self, figures: Figures, bare: Figures) {
        self.figures[0].add(figures.alone);
        self.figures[1].add(figures.deep);
        self.ratios[0].add(figures.alone / bare.alone);
        self.ratios[1].add(figures.deep / bare.deep);
    }

    fn print(&self, name: &str) {
        println!(
            "  {name:<24} alone {} us, ratio {}; {DEPTH} at a time {} us each, ratio {}",
            self.figures[0].text(1),
            self.ratios[0].text(2),
            self.figures[1].text(1),
            self.ratios[1].text(2)
        );
    }
}

fn benchmark() -> Result<()> {
    println!(
        "redo: median time of a page in one round; median (min..max) of the rounds; \
         ratios to the bare pipe of the same round"
    );
    let scratch = Scratch::new("redo")?;
    common::pin(CPU)?;
    let cases = cases(&scratch)?;
    for case in cases.iter().filter(|_| wanted("pages")) {
        println!("{}: {} bytes there, {} back", case.name, case.frame.len(), case.reply);
        let [mut bare, mut direct, mut ours, mut here] = std::array::from_fn(|_| Way::default());
        let mut beyond = Rounds::default();
        let count = sized(50, if case.frame.len() > 16_384 { 2_000 } else { 5_000 });
        for _ in 0..sized(2, 5) {
            let mut echo = Piped::echo(case.frame.len(), case.reply)?;
            let pipe = piped(&mut echo, &case.frame, case.reply, count)?;
            drop(echo);
            bare.add(pipe, pipe);
            let mut process = Piped::wal_redo(&scratch)?;
            let by_pipe = piped(&mut process, &case.frame, case.reply, count)?;
            direct.add(by_pipe, pipe);
            drop(process);
            if let Some(request) = &case.request {
                let by_node = through_executor(&scratch, request, count)?;
                beyond.add(by_node.alone / by_pipe.alone);
                ours.add(by_node, pipe);
                here.add(native(request, &case.page, count)?, pipe);
            }
        }
        bare.print("bare pipe");
        direct.print("wal-redo, blocking pipe");
        if case.request.is_some() {
            ours.print("wal-redo in the node");
            here.print("native");
            let [alone, deep] = [0, 1].map(|n| ours.figures[n].median() / here.figures[n].median());
            println!("  the wal-redo process in the node takes {alone:.1} x, {deep:.1} x as long");
            println!(
                "  and, alone, {} x as long as a bare pipe's round trip plus PostgreSQL's CPU time, \
                 which is what the blocking pipe takes",
                beyond.text(2)
            );
        }
    }
    if wanted("callers") {
        callers::run(&scratch, &cases)?;
    }
    if wanted("loads") { load::run() } else { Ok(()) }
}

fn main() -> std::process::ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, mode, request, reply] = args.as_slice()
        && mode == ECHO
    {
        let size = |text: &String| text.parse::<usize>().unwrap_or(1);
        return common::main(|| echo_child(size(request), size(reply)));
    }
    common::main(benchmark)
}
