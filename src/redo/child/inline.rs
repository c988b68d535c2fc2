//! The short way to a process: whoever asks writes and reads, without a thread in between.
//!
//! Waking a thread, and being woken by it, costs several times what a short redo takes. So a
//! worker that has nothing to do lends its process to the executors of its tenant
//! ([`Seat::lends`]). There, requests that come together are collected in [`Near`]; one of their
//! callers takes the process, writes them and waits for the answers, at most
//! [`REDO_INLINE_WAIT`]. Process and executor have one CPU between them, so that while the one
//! waits the other works: nothing is lost by not going on with something else, and going to sleep
//! in the executor's own manner would take longer than the whole redo.
//!
//! Only what is expected is done here: short requests, answered at once by pages. All else is left
//! to the worker, which gets back the process together with the requests that it was sent, and goes
//! on from there: process slow, hung or dead, answers that are errors or nonsense. It must get its
//! process back soon whenever it wants it; so nothing here awaits with a process in hand.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::time::Instant;

use bytes::Bytes;
use futures_channel::oneshot::Receiver;

use super::process::Process;
use super::worker::answer;
use super::{Answer, Job, add};
use crate::limits::{
    REDO_INLINE_BYTES, REDO_INLINE_RECORDS, REDO_INLINE_REQUESTS, REDO_INLINE_WAIT,
    REDO_PROCESS_BUSY_MAX, REDO_QUEUE_REQUESTS,
};
use crate::redo::pool::{Seat, Shared};

#[cfg(test)]
mod tests;

/// Requests that a process was sent and has not answered yet, in order.
pub(in crate::redo) struct Sent {
    pub(super) jobs: VecDeque<Job>,
    /// The messages of these, and maybe of some before that were answered.
    pub(super) frames: Bytes,
    /// Bytes of the messages that were written.
    pub(super) written: usize,
}

/// Requests whose callers are about to see to them: at most [`REDO_QUEUE_REQUESTS`].
#[derive(Default)]
pub(super) struct Near {
    jobs: RefCell<VecDeque<Job>>,
}

fn fits(jobs: usize, records: usize, bytes: usize) -> bool {
    jobs <= REDO_INLINE_REQUESTS && records <= REDO_INLINE_RECORDS && bytes <= REDO_INLINE_BYTES
}

impl Near {
    /// Gives the request back if it is not one for the short way, or if there are too many.
    pub(super) fn put(&self, seat: &Seat, job: Job) -> Option<Job> {
        if !seat.lends() || !fits(1, job.records as usize, job.frames.len()) {
            return Some(job);
        }
        let mut jobs = self.jobs.borrow_mut();
        if jobs.len() >= REDO_QUEUE_REQUESTS {
            // Callers that went away before their turn have left them.
            jobs.retain(|job| !job.answer.is_canceled());
            if jobs.len() >= REDO_QUEUE_REQUESTS {
                return Some(job);
            }
        }
        jobs.push_back(job);
        None
    }

    /// True if nobody has seen to the request whose answer goes to `reply`.
    pub(super) fn has(&self, reply: &Receiver<Answer>) -> bool {
        self.jobs.borrow().iter().any(|job| job.answer.is_connected_to(reply))
    }

    /// That request.
    pub(super) fn take(&self, reply: &Receiver<Answer>) -> Option<Job> {
        let mut jobs = self.jobs.borrow_mut();
        let at = jobs.iter().position(|job| job.answer.is_connected_to(reply))?;
        jobs.remove(at)
    }

    /// The first of them, as many as go together.
    fn batch(&self) -> Option<Sent> {
        let mut jobs = self.jobs.borrow_mut();
        let mut batch: VecDeque<Job> = VecDeque::new();
        let (mut records, mut bytes) = (0, 0);
        while let Some(job) = jobs.pop_front() {
            if job.answer.is_canceled() {
                continue;
            }
            (records, bytes) = (records + job.records as usize, bytes + job.frames.len());
            if !batch.is_empty() && !fits(batch.len() + 1, records, bytes) {
                jobs.push_front(job);
                break;
            }
            batch.push_back(job);
        }
        let frames = match batch.len() {
            0 => return None,
            1 => batch.front()?.frames.clone(),
            _ => batch.iter().map(|job| job.frames.as_ref()).collect::<Vec<_>>().concat().into(),
        };
        Some(Sent { jobs: batch, frames, written: 0 })
    }
}

/// A process out of the worker's hands; goes back when this is dropped.
struct Lease<'a> {
    seat: &'a Seat,
    process: Option<Process>,
    sent: Option<Sent>,
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // What somebody has left in it before stays there.
            process.sent = self.sent.take().or(process.sent.take());
            self.seat.give_back(process);
        }
    }
}

/// Sends the first requests to the process, if it is to be had. False: it is not.
pub(super) fn drive(shared: &Shared, seat: &Seat, near: &Near) -> bool {
    if seat.is_stopped() || shared.is_stopped() || !seat.lends() {
        return false;
    }
    let Some(process) = seat.borrow_process() else { return false };
    let is_fit =
        process.sent.is_none() && !process.has_input() && process.busy <= REDO_PROCESS_BUSY_MAX;
    let mut lease = Lease { seat, process: Some(process), sent: None };
    if !is_fit {
        return false;
    }
    lease.sent = near.batch();
    let begin = Instant::now();
    let is_done = lease.exchange(shared, begin).is_some();
    let took = begin.elapsed();
    if is_done {
        lease.sent = None;
    }
    if let Some(process) = &mut lease.process {
        process.busy += took;
    }
    add(&shared.counters.busy_micros, took.as_micros() as u64);
    true
}

impl Lease<'_> {
    /// `None` if there is more to do than this.
    fn exchange(&mut self, shared: &Shared, begin: Instant) -> Option<()> {
        let (Some(process), Some(sent)) = (&mut self.process, &mut self.sent) else {
            return Some(());
        };
        process.write(&sent.frames, &mut sent.written).ok()?;
        if sent.written < sent.frames.len() {
            return None;
        }
        let (mut looked, mut left) = (false, REDO_INLINE_WAIT);
        while let Some(job) = sent.jobs.front() {
            process.page = Some((job.rel, job.block));
            if let Some(reply) = process.plain_reply(job.records == 0).ok()? {
                add(&shared.counters.inline, 1);
                answer(shared, self.seat, sent.jobs.pop_front()?, Ok(reply));
                continue;
            }
            if !looked {
                // It has the CPU next, and mostly answers before it gives it back: that is cheaper
                // to see by looking than to wait for with a clock.
                std::thread::yield_now();
                process.read_now().ok()?;
                looked = true;
                continue;
            }
            if left.is_zero() {
                return None;
            }
            process.read_within(left).ok()?;
            left = REDO_INLINE_WAIT.saturating_sub(begin.elapsed());
        }
        Some(())
    }
}
