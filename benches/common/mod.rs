//! What the benchmarks share: rounds, their medians and spreads, CPU time, places.
//!
//! No figure here passes or fails: the machine may be shared and noisy. Each benchmark runs
//! baseline and product in turns within one process's lifetime and prints ratios.

#![allow(dead_code, reason = "no benchmark uses everything")]
#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a benchmark drives other programs and measures time"
)]

pub mod images;
pub mod node;
pub mod parts;
pub mod recorded;
pub mod shard;

use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::Pid;

#[allow(unused_imports, reason = "layer_map writes no files")]
pub use pgstrata::cli::scratch::Scratch;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

pub const MB: f64 = 1e6;

/// `PGSTRATA_BENCH_QUICK=1`: small sizes and few rounds, to see that a benchmark runs at all.
pub fn quick() -> bool {
    std::env::var_os("PGSTRATA_BENCH_QUICK").is_some_and(|value| value != "0")
}

/// The first value in a quick run, else the second.
pub fn sized<T>(quick_value: T, full: T) -> T {
    if quick() { quick_value } else { full }
}

/// True unless the command line names other parts of the benchmark only, as in
/// `cargo bench --bench ingest -- images`.
pub fn wanted(part: &str) -> bool {
    let named: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    named.is_empty() || named.iter().any(|name| name == part)
}

/// The numbers of several rounds.
#[derive(Clone, Debug, Default)]
pub struct Rounds(Vec<f64>);

impl Rounds {
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            count if count % 2 == 1 => sorted[middle],
            _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
        }
    }

    /// `median (min..max)`.
    pub fn text(&self, digits: usize) -> String {
        let min = self.0.iter().copied().fold(f64::INFINITY, f64::min);
        let max = self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        format!("{:.digits$} ({min:.digits$}..{max:.digits$})", self.median())
    }
}

/// User and system time of this process and all its threads, or of its children that were
/// waited for, with theirs.
pub fn cpu_time(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who)?;
    let part = |time: nix::sys::time::TimeVal| {
        Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()).unsigned_abs())
    };
    Ok(part(usage.user_time()) + part(usage.system_time()))
}

/// User and system time of another process and its descendants that live, from `/proc`.
/// The kernel counts in ticks of 10 ms.
pub fn process_cpu(pid: u32) -> Result<Duration> {
    const TICK: Duration = Duration::from_millis(10);
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').ok_or("/proc/PID/stat")?.1;
    let fields: Vec<&str> = after_name.split_whitespace().collect();
    let ticks = |at: usize| -> Result<u32> { Ok(fields.get(at).ok_or("stat")?.parse()?) };
    // After the name: field 3 of proc(5) has index 0; utime is 14, stime 15.
    let mut total = TICK * (ticks(11)? + ticks(12)?);
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let children = std::fs::read_to_string(task?.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace() {
            total += process_cpu(child.parse()?)?;
        }
    }
    Ok(total)
}

/// Pins the calling thread, and what it starts from now on.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
}

/// The CPU for load generators: another one than 0, where there is one.
pub fn client_cpu() -> usize {
    usize::from(std::thread::available_parallelism().is_ok_and(|count| count.get() > 1))
}

/// `neon_walredo.so` where `make walredo` puts it.
pub fn walredo_library() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/walredo/neon_walredo.so");
    if path.is_file() { Ok(path) } else { Err("run 'make walredo' first".into()) }
}

/// Runs `benchmark`; an error ends the program with its text. `PGSTRATA_BENCH_LOG` is a filter for
/// what the shard logs meanwhile, as `pgstrata=debug`.
pub fn main(benchmark: impl FnOnce() -> Result<()>) -> std::process::ExitCode {
    if let Ok(filter) = std::env::var("PGSTRATA_BENCH_LOG") {
        let log = tracing_subscriber::fmt().with_env_filter(filter);
        log.with_writer(std::io::stderr).init();
    }
    if quick() {
        std::thread::spawn(give_up);
    }
    match benchmark() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("benchmark: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// A quick run that takes so long hangs; what its threads wait for says where.
fn give_up() {
    const LONGEST: Duration = Duration::from_secs(600);
    std::thread::sleep(LONGEST);
    eprintln!("benchmark: not done after {} s; its threads:", LONGEST.as_secs());
    for task in std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        let line = |name| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let [name, place, call] = ["comm", "wchan", "syscall"].map(line);
        eprintln!("  {}: {} {}", name.trim(), place.trim(), call.trim());
    }
    std::process::abort();
}
