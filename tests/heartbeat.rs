//! glommio's sleep over runnable tasks, provoked, and ended by heartbeats.
//!
//! When an executor is held off its CPU between arming its preemption timer and looking at it
//! for the first time, it takes the expiry for "nothing to run" and goes to sleep; nothing but a
//! wake-up by another thread ends that. Busy threads on the executor's CPU and a short timer make
//! it happen within seconds. With heartbeats, the longest time without any progress is that of
//! the kernel's own scheduling.

#![allow(clippy::disallowed_methods, reason = "a test with threads and clocks of its own")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use glommio::{LocalExecutorBuilder, Placement};
use pgstrata::limits::{HEARTBEAT_INTERVAL_MS, PREEMPT_INTERVAL_US};
use pgstrata::server::mesh::{Progress, Pulse};
use pgstrata::server::node::{Claim, start_beat, started_executor};

const CPU: usize = 0;

fn pin() {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(CPU).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).unwrap();
}

fn spin(time: Duration) {
    let begin = Instant::now();
    while begin.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// Two tasks that always have something to do, and one that answers heartbeats.
async fn work_until(progress: Progress, stop: Arc<AtomicBool>, steps: Arc<AtomicU64>) {
    progress.begin().await;
    start_beat(progress);
    let workers: Vec<_> = (0..2)
        .map(|_| {
            let (stop, steps) = (stop.clone(), steps.clone());
            glommio::spawn_local(async move {
                while !stop.load(Ordering::Acquire) {
                    spin(Duration::from_micros(50));
                    steps.fetch_add(1, Ordering::Relaxed);
                    glommio::yield_if_needed().await;
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await;
    }
}

/// Runs work that never ends on an executor for `seconds`, beside two busy threads. Returns the
/// longest time without progress.
fn longest_gap(seconds: u64, heartbeats: bool) -> Duration {
    let stop = Arc::new(AtomicBool::new(false));
    let work = Arc::new(AtomicU64::new(0));
    let mut pulse = Pulse::default();
    let make = |claim: Claim| {
        let (progress, stopped, steps) = (pulse.progress(), stop.clone(), work.clone());
        let builder = LocalExecutorBuilder::new(Placement::Fixed(CPU))
            .io_memory(64 << 10)
            .preempt_timer(Duration::from_micros(PREEMPT_INTERVAL_US));
        builder.spawn(move || async move {
            if claim.take() {
                work_until(progress, stopped, steps).await;
            }
        })
    };
    // Over its first task nothing could wake it yet, heartbeats or not.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let executor = runtime.block_on(started_executor(make)).unwrap();
    let hogs: Vec<_> = (0..2)
        .map(|_| {
            let stop = stop.clone();
            thread::spawn(move || {
                pin();
                while !stop.load(Ordering::Acquire) {
                    spin(Duration::from_millis(1));
                }
            })
        })
        .collect();
    let (begin, mut last, mut seen, mut gap) = (Instant::now(), Instant::now(), 0, Duration::ZERO);
    while begin.elapsed() < Duration::from_secs(seconds) {
        thread::sleep(Duration::from_millis(HEARTBEAT_INTERVAL_MS));
        if heartbeats {
            pulse.tick();
        }
        let now = work.load(Ordering::Relaxed);
        if now != seen {
            (seen, last) = (now, Instant::now());
        }
        gap = gap.max(last.elapsed());
    }
    // Without heartbeats it may sleep from its first step to the end: that is what they are for.
    assert!(!heartbeats || seen > 100, "the executor never ran: {seen} steps");
    stop.store(true, Ordering::Release);
    hogs.into_iter().for_each(|hog| hog.join().unwrap());
    // An executor that sleeps is woken, so that it can end.
    let done = Arc::new(AtomicBool::new(false));
    let ended = done.clone();
    let waker = thread::spawn(move || {
        while !ended.load(Ordering::Acquire) {
            pulse.tick();
            thread::sleep(Duration::from_millis(HEARTBEAT_INTERVAL_MS));
        }
    });
    executor.join().unwrap();
    done.store(true, Ordering::Release);
    waker.join().unwrap();
    gap
}

#[test]
fn heartbeats_end_a_sleep_over_runnable_tasks() {
    let without = longest_gap(4, false);
    let with = longest_gap(6, true);
    println!("longest time without progress: {without:?} without heartbeats, {with:?} with");
    assert!(with < Duration::from_secs(2), "{with:?} without progress in spite of heartbeats");
}
