//! `pgstrata bench getpage`: load on a page service, and what came of it.
//!
//! 1. The first connection asks for the sizes of the relations; their blocks are the pages.
//! 2. Clients are shared out over threads. A thread serves its clients by one `ppoll` loop.
//! 3. After `--time`, what is still in flight is waited for; then all counts are put together.
//!
//! Every reply is checked: its echo of the request, the header of the page. Any wrong reply or
//! error makes the command fail after it has printed its figures.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fastrand::Rng;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

use super::client::{Client, Manner};
use super::distribution::{Distribution, Keys};
use super::pages::{self, Fork, PageSpace, Target};
use super::report::{Summary, Tally};
use crate::base::Lsn;
use crate::cli::admin_client::CommandError;
use crate::cli::page_client::PageClient;
use crate::limits::{BENCH_CLIENTS_MAX, BENCH_DEPTH_MAX, BENCH_DRAIN};
use crate::server::page_protocol::Version;
use crate::shard::reader::RequestLsn;

/// Version of the messages.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// `pagestream_v2`.
    #[value(name = "2")]
    V2,
    /// `pagestream_v3`.
    #[value(name = "3")]
    V3,
}

/// `pgstrata bench getpage`.
#[derive(clap::Args, Debug, Clone)]
pub struct GetPageArgs {
    /// Page service: host:port.
    #[arg(long, default_value = "127.0.0.1:6400")]
    pub address: String,
    /// Timelines to read, TENANT/TIMELINE each; clients are shared out over them.
    #[arg(long, required = true, value_delimiter = ',', value_name = "TENANT/TIMELINE,…")]
    pub tenants: Vec<Target>,
    /// Connections.
    #[arg(short = 'c', long, default_value_t = 1)]
    pub clients: usize,
    /// Threads that serve them.
    #[arg(short = 'j', long, default_value_t = 1)]
    pub threads: usize,
    /// Requests in flight on each connection.
    #[arg(long, default_value_t = 1)]
    pub depth: usize,
    /// Seconds.
    #[arg(short = 'T', long, default_value_t = 10.0)]
    pub time: f64,
    /// Open loop: so many requests per second in all, at random times, whether replies come or not.
    #[arg(short = 'R', long)]
    pub rate: Option<f64>,
    /// A reply that comes later after its request's time has missed its deadline, in milliseconds.
    #[arg(long, default_value_t = 100.0)]
    pub deadline: f64,
    /// Print a line every so many seconds; 0: none.
    #[arg(short = 'P', long, default_value_t = 0.0)]
    pub progress: f64,
    /// How pages are drawn.
    #[arg(long, value_enum, default_value = "uniform")]
    pub key_distribution: Distribution,
    /// Read the newest version of every page (the default).
    #[arg(long, conflicts_with = "lsn")]
    pub latest: bool,
    /// Read at this LSN.
    #[arg(long)]
    pub lsn: Option<Lsn>,
    /// A fork to read, such as 1663/5/16384 or 1663/5/16384_vm; may be given several times.
    #[arg(long = "relation", value_name = "SPC/DB/REL")]
    pub relations: Vec<Fork>,
    /// Without --relation: read the relations of this database, found by asking for the size of
    /// every relation number up to --probe-to.
    #[arg(long, default_value_t = 5)]
    pub database: u32,
    /// Highest relation number that is asked for.
    #[arg(long, default_value_t = 20_000)]
    pub probe_to: u32,
    /// Version of the page stream's messages.
    #[arg(long, value_enum, default_value = "3")]
    pub protocol: Protocol,
    /// Seed of all draws.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Print the figures as JSON.
    #[arg(long)]
    pub json: bool,
}

/// One timeline and its pages.
struct Source {
    target: Target,
    pages: PageSpace,
}

/// Counts that progress lines are made of.
#[derive(Default)]
struct Live {
    answered: AtomicU64,
    latency_ns: AtomicU64,
}

/// Runs the load and prints the figures.
///
/// # Errors
/// Wrong arguments, no connection, or replies that were errors or wrong.
pub fn run(args: &GetPageArgs) -> Result<(), CommandError> {
    let (tally, took) = load(args)?;
    let summary = tally.summary(took);
    show(args, &summary)?;
    if tally.errors + tally.wrong == 0 {
        return Ok(());
    }
    let (errors, wrong) = (tally.errors, tally.wrong);
    let texts = tally.texts.join("\n  ");
    Err(format!("{errors} errors, {wrong} wrong replies; the first:\n  {texts}").into())
}

fn show(args: &GetPageArgs, summary: &Summary) -> Result<(), CommandError> {
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(summary)?),
        false => println!("{summary}"),
    }
    Ok(())
}

impl GetPageArgs {
    fn version(&self) -> Version {
        match self.protocol {
            Protocol::V2 => Version::V2,
            Protocol::V3 => Version::V3,
        }
    }

    fn request_lsn(&self) -> RequestLsn {
        match self.lsn {
            Some(lsn) => RequestLsn { request: lsn, not_modified_since: lsn },
            None => RequestLsn { request: Lsn::MAX, not_modified_since: Lsn::INVALID },
        }
    }

    fn check(&self) -> Result<(), CommandError> {
        let bad = |text: String| Err(text.into());
        if !(1..=BENCH_CLIENTS_MAX).contains(&self.clients) {
            return bad(format!("--clients: from 1 to {BENCH_CLIENTS_MAX}"));
        }
        if !(1..=self.clients).contains(&self.threads) {
            return bad("--threads: from 1 to the number of clients".to_owned());
        }
        if !(1..=BENCH_DEPTH_MAX).contains(&self.depth) {
            return bad(format!("--depth: from 1 to {BENCH_DEPTH_MAX}"));
        }
        for (name, value) in [("time", self.time), ("deadline", self.deadline)] {
            if !(value > 0.0 && value < 1e7) {
                return bad(format!("--{name}: a number above 0"));
            }
        }
        match self.rate {
            Some(rate) if !(rate > 0.0 && rate < 1e9) => bad("--rate: a number above 0".to_owned()),
            _ => Ok(()),
        }
    }

    fn connect(&self, target: Target) -> Result<PageClient, CommandError> {
        let Target { tenant, timeline } = target;
        let version = self.version();
        let mut client =
            PageClient::connect_with(&self.address, tenant, timeline, Lsn::MAX, version)?;
        client.set_request_lsn(self.request_lsn());
        Ok(client)
    }
}

/// Runs the load; all counts, and how long it took.
///
/// # Errors
/// Wrong arguments, or no connection.
pub fn load(args: &GetPageArgs) -> Result<(Tally, Duration), CommandError> {
    args.check()?;
    let mut sources = Vec::new();
    for target in &args.tenants {
        let mut client = args.connect(*target)?;
        let pages = match args.relations.is_empty() {
            true => pages::found(&mut client, args.database, args.probe_to)?,
            false => pages::named(&mut client, &args.relations)?,
        };
        if pages.is_empty() {
            let Target { tenant, timeline } = target;
            return Err(format!("timeline {timeline} of tenant {tenant} has no such pages").into());
        }
        if !args.json {
            println!("{} pages in {} relations", pages.len(), pages.forks());
        }
        sources.push(Source { target: *target, pages });
    }
    let manner = Manner {
        version: args.version(),
        lsn: args.request_lsn(),
        newest: args.lsn,
        depth: args.depth,
        rate: args.rate.map(|rate| rate / args.clients as f64),
        deadline: Duration::from_secs_f64(args.deadline / 1000.0),
    };
    let mut threads: Vec<Vec<Client<'_>>> = (0..args.threads).map(|_| Vec::new()).collect();
    for nth in 0..args.clients {
        let Some(source) = sources.get(nth % sources.len()) else { break };
        let stream = args.connect(source.target)?.into_stream();
        let kind = args.key_distribution;
        let keys = Keys::new(kind, source.pages.len(), nth as u64, args.clients as u64);
        let rng = Rng::with_seed(args.seed.wrapping_add(nth as u64));
        let client = Client::new(stream, manner, &source.pages, keys, rng)?;
        if let Some(thread) = threads.get_mut(nth % args.threads) {
            thread.push(client);
        }
    }
    Ok(run_threads(args, threads))
}

fn run_threads(args: &GetPageArgs, threads: Vec<Vec<Client<'_>>>) -> (Tally, Duration) {
    let live: Vec<Live> = threads.iter().map(|_| Live::default()).collect();
    let begin = Instant::now();
    let end = begin + Duration::from_secs_f64(args.time);
    let mut all = Tally::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = threads
            .into_iter()
            .zip(&live)
            .map(|(clients, live)| scope.spawn(move || serve(clients, end, live)))
            .collect();
        if args.progress > 0.0 {
            show_progress(args.progress, begin, end, &live);
        }
        for worker in workers {
            match worker.join() {
                Ok(tally) => all.add(&tally),
                Err(_) => {
                    all.errors += 1;
                    all.say(|| "a thread of the load generator panicked".to_owned());
                }
            }
        }
    });
    (all, begin.elapsed())
}

fn show_progress(seconds: f64, begin: Instant, end: Instant, live: &[Live]) {
    let pause = Duration::from_secs_f64(seconds);
    let (mut last, mut at) = ((0, 0), begin);
    while at + pause <= end {
        at += pause;
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        let sum = |count: fn(&Live) -> &AtomicU64| -> u64 {
            live.iter().map(|live| count(live).load(Ordering::Relaxed)).sum()
        };
        let now = (sum(|live| &live.answered), sum(|live| &live.latency_ns));
        let (pages, nanoseconds) = (now.0 - last.0, now.1.saturating_sub(last.1));
        last = now;
        let ms = nanoseconds as f64 / 1e6 / (pages.max(1) as f64);
        let elapsed = begin.elapsed().as_secs_f64();
        let rate = pages as f64 / seconds;
        // Standard output has the figures alone, for those who read them by program.
        eprintln!("progress: {elapsed:.1} s, {rate:.1} pages/s, latency {ms:.3} ms");
    }
}

/// Serves the clients of one thread. A client whose connection fails counts as one error for
/// each request that it leaves, and at least as one.
fn serve(mut clients: Vec<Client<'_>>, end: Instant, live: &Live) -> Tally {
    let mut tally = Tally::default();
    loop {
        let now = Instant::now();
        let over = now >= end;
        let idle = clients.iter().all(|client| client.unanswered() == 0);
        if clients.is_empty() || over && (idle || now >= end + BENCH_DRAIN) {
            break;
        }
        let failed = |client: &mut Client<'_>, tally: &mut Tally, result: Result<(), String>| {
            let Err(text) = result else { return true };
            tally.errors += client.unanswered().max(1) as u64;
            tally.say(|| text);
            false
        };
        clients.retain_mut(|client| {
            let sent = if over { client.flush() } else { client.send(now) };
            failed(client, &mut tally, sent)
        });
        let wakes = clients.iter().filter_map(Client::wakes_at).chain([end, now + BENCH_DRAIN]);
        let wake = wakes.filter(|at| *at > now).min().unwrap_or(now);
        let ready = wait(&clients, wake.saturating_duration_since(now));
        let mut ready = ready.into_iter();
        clients.retain_mut(|client| {
            let received = match ready.next() {
                Some(true) => client.receive(&mut tally),
                _ => Ok(()),
            };
            failed(client, &mut tally, received)
        });
        live.answered.store(tally.answered(), Ordering::Relaxed);
        live.latency_ns.store(tally.latency_sum_ns(), Ordering::Relaxed);
    }
    let left: u64 = clients.iter().map(|client| client.unanswered() as u64).sum();
    if left > 0 {
        tally.errors += left;
        tally.say(|| format!("{left} requests were not answered within {BENCH_DRAIN:?}"));
    }
    tally
}

/// Waits for a socket, for so long at most; which clients have something to read.
fn wait(clients: &[Client<'_>], timeout: Duration) -> Vec<bool> {
    let mut sockets: Vec<PollFd<'_>> = clients
        .iter()
        .map(|client| {
            let writes = if client.is_sending() { PollFlags::POLLOUT } else { PollFlags::empty() };
            PollFd::new(client.stream().as_fd(), PollFlags::POLLIN | writes)
        })
        .collect();
    // A signal ends the wait early, which is no matter.
    let _ = ppoll(&mut sockets, Some(TimeSpec::from_duration(timeout)), None);
    let readable = PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR;
    let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|found| found.intersects(readable));
    sockets.iter().map(is_ready).collect()
}

#[cfg(test)]
mod tests;
