//! 1 to 128 callers at the same time, each with one request under way: pings and pages per second,
//! by a wal-redo process of the node and natively.

use std::future::Future;
use std::path::Path;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use pgstrata::base::page::page_lsn;
use pgstrata::redo::child::ChildRedo;
use pgstrata::redo::native::run::NativeRedo;
use pgstrata::redo::{Redo, RedoRequest, RedoSettings};

use super::{Case, Nobody, child_settings};
use crate::common::{Result, Rounds, shard, sized};

const CALLERS: [usize; 8] = [1, 2, 4, 8, 16, 32, 64, 128];

/// One round with so many callers.
#[derive(Clone, Copy)]
struct Figures {
    per_second: f64,
    median_us: f64,
    p99_us: f64,
}

/// `callers` ask `each` times, one after another.
async fn crowd<F: Future<Output = Result<()>>>(
    callers: usize,
    each: usize,
    ask: impl Fn() -> F,
) -> Result<Figures> {
    let begin = Instant::now();
    let calls = join_all((0..callers).map(|_| async {
        let mut times = Vec::with_capacity(each);
        for _ in 0..each {
            let begin = Instant::now();
            ask().await?;
            times.push(begin.elapsed());
        }
        Result::Ok(times)
    }));
    let mut times: Vec<Duration> = Vec::new();
    for call in calls.await {
        times.extend(call?);
    }
    let took = begin.elapsed().as_secs_f64();
    times.sort_unstable();
    let at = |share: usize| {
        times.get(times.len() * share / 100).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
    };
    Ok(Figures { per_second: times.len() as f64 / took, median_us: at(50), p99_us: at(99) })
}

async fn ask_process(child: &ChildRedo, request: Option<&RedoRequest>) -> Result<()> {
    let Some(request) = request else {
        child.ping().await?;
        return Ok(());
    };
    let page = child.redo(request.clone()).await?;
    match request.records.last() {
        Some((last, _)) if page_lsn(&page) == *last => Ok(()),
        _ => Err(format!("the page has LSN {}", page_lsn(&page)).into()),
    }
}

async fn ask_native(native: &NativeRedo<Nobody>, request: &RedoRequest) -> Result<()> {
    native.redo(request.clone()).await?;
    Ok(())
}

/// A round with each number of callers, through a process.
fn by_process(scratch: &Path, request: Option<RedoRequest>, count: usize) -> Result<Vec<Figures>> {
    let settings = child_settings(scratch)?;
    shard::on_executor(move || async move {
        let child = ChildRedo::new(settings);
        let ask = || ask_process(&child, request.as_ref());
        crowd(1, count / 10 + 1, ask).await?;
        let mut rounds = Vec::new();
        for callers in CALLERS {
            rounds.push(crowd(callers, count.div_ceil(callers), ask).await?);
        }
        child.shutdown().await;
        Ok(rounds)
    })
}

/// The same natively, which needs no process, and so no waiting: the callers take turns.
fn natively(request: RedoRequest, count: usize) -> Result<Vec<Figures>> {
    shard::on_executor(move || async move {
        let native = NativeRedo::new(Nobody, RedoSettings { hint_bits_logged: false });
        let ask = || ask_native(&native, &request);
        crowd(1, count / 10 + 1, ask).await?;
        let mut rounds = Vec::new();
        for callers in CALLERS {
            rounds.push(crowd(callers, count.div_ceil(callers), ask).await?);
        }
        Ok(rounds)
    })
}

#[derive(Default)]
struct Sums {
    per_second: Rounds,
    median_us: Rounds,
    p99_us: Rounds,
}

impl Sums {
    fn add(&mut self, figures: Figures) {
        self.per_second.add(figures.per_second);
        self.median_us.add(figures.median_us);
        self.p99_us.add(figures.p99_us);
    }

    fn text(&self) -> String {
        format!(
            "{:>9.0} /s, {:>8.1} us, 99 % {:>8.1} us",
            self.per_second.median(),
            self.median_us.median(),
            self.p99_us.median()
        )
    }
}

/// Runs and prints everything.
pub fn run(scratch: &Path, cases: &[Case]) -> Result<()> {
    println!(
        "callers at the same time, each with one request under way; all together per second, time \
         of one request; medians of the rounds"
    );
    for case in cases {
        println!("{}:", case.name);
        let [mut process, mut native] = std::array::from_fn(|_| CALLERS.map(|_| Sums::default()));
        let count = sized(256, if case.frame.len() > 16_384 { 2_000 } else { 6_000 });
        for _ in 0..sized(1, 3) {
            let figures = by_process(scratch, case.request.clone(), count)?;
            process.iter_mut().zip(figures).for_each(|(sums, figures)| sums.add(figures));
            if let Some(request) = &case.request {
                let figures = natively(request.clone(), count)?;
                native.iter_mut().zip(figures).for_each(|(sums, figures)| sums.add(figures));
            }
        }
        for ((callers, process), native) in CALLERS.iter().zip(&process).zip(&native) {
            print!("  {callers:>3}: process {}", process.text());
            if case.request.is_some() {
                let times = native.per_second.median() / process.per_second.median();
                print!("; native {}, {times:.1} x", native.text());
            }
            println!();
        }
    }
    Ok(())
}
