//! The door to a core's page requests: [`FairQueue`] with tasks that wait.
//!
//! A connection asks for a [`Permit`] before it works on a batch, and drops it when the batch is
//! answered. Most often it gets one at once. Otherwise it stands in line, and [`Admission::pump`]
//! admits from there, tick by tick. A tick is one round of the executor: a timer so short that it has
//! run out when the executor has nothing left to run wakes the pump, in the step in which the
//! executor looks at its sockets. So what each tick admits is worked on, and everything that came in
//! meanwhile stands in line, before the next.

#![allow(clippy::disallowed_methods, reason = "the pump belongs to the executor, not to a shard")]

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use async_channel::{Receiver, Sender};
use futures_channel::oneshot;
use futures_util::future::{Either, LocalBoxFuture, select};

use crate::base::TenantShardId;
use crate::limits::FAIR_TICK_PAUSE;
use crate::server::fair::{Ask, FairQueue};
use crate::shard::control::CoreMetrics;

/// See the module's text.
pub struct Admission {
    queue: RefCell<FairQueue<oneshot::Sender<Permit>>>,
    wake: Sender<()>,
    woken: Receiver<()>,
    delayed: Cell<u64>,
    delayed_time: Cell<Duration>,
    over_quota: Cell<u64>,
}

/// Leave to work on a batch, until it is dropped.
pub struct Permit {
    admission: Rc<Admission>,
    tenant: TenantShardId,
    pages: u64,
}

/// What was counted; requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AdmissionCounts {
    /// In line now.
    pub waiting: u64,
    /// Being worked on now.
    pub in_flight: u64,
    /// Had to stand in line.
    pub delayed: u64,
    /// Time for which they did, of each batch.
    pub delayed_time: Duration,
    /// Of those in line, how many met a quota of their tenant.
    pub over_quota: u64,
}

impl Default for Admission {
    fn default() -> Self {
        let (wake, woken) = async_channel::bounded(1);
        let (delayed, delayed_time, over_quota) = Default::default();
        Admission { queue: RefCell::default(), wake, woken, delayed, delayed_time, over_quota }
    }
}

impl Admission {
    /// A door with its pump, on this executor, until `stop` closes.
    pub fn start(
        now: fn() -> Duration,
        sleep: fn(Duration) -> LocalBoxFuture<'static, ()>,
        stop: Receiver<()>,
    ) -> Rc<Self> {
        let admission = Rc::new(Admission::default());
        glommio::spawn_local(admission.clone().pump(now, sleep, stop)).detach();
        admission
    }

    /// Leave to begin now, without waiting.
    pub fn try_admit(self: &Rc<Self>, ask: &Ask, now: Duration) -> Option<Permit> {
        let admitted = self.queue.borrow_mut().try_admit(ask, now);
        admitted.then(|| self.permit(ask.tenant, ask.pages))
    }

    fn permit(self: &Rc<Self>, tenant: TenantShardId, pages: u64) -> Permit {
        Permit { admission: self.clone(), tenant, pages }
    }

    /// Stands in line. Needs [`Admission::pump`]. Whoever drops the receiver leaves the line.
    pub fn stand_in_line(&self, ask: &Ask, now: Duration) -> oneshot::Receiver<Permit> {
        let (sender, receiver) = oneshot::channel();
        let mut queue = self.queue.borrow_mut();
        let over_quota = if queue.is_over_quota(ask, now) { ask.pages } else { 0 };
        self.over_quota.set(self.over_quota.get() + over_quota);
        queue.enqueue(ask, sender, now);
        drop(queue);
        self.wake();
        receiver
    }

    fn wake(&self) {
        // Full means that the pump is told already.
        let _ = self.wake.try_send(());
    }

    /// What was counted.
    pub fn counts(&self) -> AdmissionCounts {
        let queue = self.queue.borrow();
        AdmissionCounts {
            waiting: queue.waiting(),
            in_flight: queue.in_flight(),
            delayed: self.delayed.get(),
            delayed_time: self.delayed_time.get(),
            over_quota: self.over_quota.get(),
        }
    }

    /// The same, for the node's metrics.
    pub fn metrics(&self, metrics: &mut CoreMetrics) {
        let counts = self.counts();
        metrics.page_requests_waiting = counts.waiting;
        metrics.page_requests_in_flight = counts.in_flight;
        metrics.page_requests_delayed = counts.delayed;
        metrics.page_requests_delayed_seconds = counts.delayed_time.as_secs_f64();
        metrics.page_requests_over_quota = counts.over_quota;
    }

    /// One tick.
    fn tick(self: &Rc<Self>, now: Duration) {
        self.queue.borrow_mut().start_tick(now);
        loop {
            let next = self.queue.borrow_mut().next(now);
            let Some(next) = next else { return };
            self.delayed.set(self.delayed.get() + next.pages);
            self.delayed_time.set(self.delayed_time.get() + next.waited);
            // Who has gone meanwhile gives the permit back by dropping it.
            let _ = next.waiter.send(self.permit(next.tenant, next.pages));
        }
    }

    /// Admits from the line until `stop` closes.
    pub async fn pump(
        self: Rc<Self>,
        now: fn() -> Duration,
        sleep: fn(Duration) -> LocalBoxFuture<'static, ()>,
        stop: Receiver<()>,
    ) {
        loop {
            let next_time = self.queue.borrow().next_time();
            match next_time.map(|time| time.saturating_sub(now())) {
                Some(Duration::ZERO) => {
                    sleep(FAIR_TICK_PAUSE).await;
                    self.tick(now());
                }
                Some(pause) => {
                    // Somebody else may come, who need not wait so long.
                    select(sleep(pause), pin!(self.woken.recv())).await;
                }
                None => {
                    let woken = pin!(self.woken.recv());
                    if let Either::Right(_) = select(woken, pin!(stop.recv())).await {
                        return;
                    }
                }
            }
            if stop.is_closed() {
                return;
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut queue = self.admission.queue.borrow_mut();
        queue.release(self.tenant, self.pages);
        // Somebody may wait for just that.
        let is_waited_for = queue.waiting() > 0;
        drop(queue);
        if is_waited_for {
            self.admission.wake();
        }
    }
}

#[cfg(test)]
mod tests;
