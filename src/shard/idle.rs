//! Timelines that nobody uses are closed again, and cost no more than before their first use.
//!
//! A timeline is closed when it has been open without use for the configured time, and
//! 1. it takes in no WAL: it has no source, or is archived;
//! 2. nobody but the shard and the timeline's own tasks holds it: no request, no change by an
//!    operator, no branch that is open, nothing that is being detached or added up;
//! 3. everything in memory is in layer files, the journal is synced, and no collection, checkpoint
//!    or compaction is under way or has failed.
//!
//! Whoever uses a timeline holds it by reference from the moment at which the shard gives it out,
//! so 2 is a question of counting references, and deciding and closing the door are one
//! synchronous step: nobody can be left with a timeline that is closed. Page streams hold their
//! timeline while they answer, not while they wait for requests. From that step until the files
//! are closed and the timeline's tasks have ended, the slot is like that of a timeline that is
//! being opened: whoever comes waits, and opens it anew.
//!
//! With the last timeline of a tenant its wal-redo process ends. That of a tenant that stays open
//! ends when it was not needed for the same time.
//!
//! What is closed is not forgotten by garbage collection: time alone makes garbage. Once a day
//! each such timeline is opened and collected.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::select;

use super::activate::{Brief, Loading, Slot, TimelineKey};
use super::follow::Connector;
use super::gc::{GcError, GcRequest};
use super::tenants::Shard;
use super::timeline::Timeline;
use crate::base::TenantShardId;
use crate::io::{Instant, Io, TaskClass};
use crate::limits::{CLOSED_GC_PERIOD_MS, CLOSING_POLL_MS, IDLE_LOOKS};

/// Who uses a timeline, and since when nobody does.
pub(super) struct Usage {
    last: Cell<Instant>,
    /// The timeline's own tasks; each holds it once.
    tasks: Rc<Cell<usize>>,
}

/// One of the timeline's own tasks, while it runs.
struct OwnTask(Rc<Cell<usize>>);

impl Usage {
    /// A timeline that is used at this moment.
    pub(super) fn new(now: Instant) -> Self {
        Usage { last: Cell::new(now), tasks: Rc::default() }
    }

    fn begin_task(&self) -> OwnTask {
        self.tasks.set(self.tasks.get() + 1);
        OwnTask(self.tasks.clone())
    }
}

impl Drop for OwnTask {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
thread_local! {
    /// Plants a bug that the tests must find: a timeline is closed though somebody holds it.
    pub(crate) static CANARY_CLOSE_IN_USE: Cell<bool> = const { Cell::new(false) };
}

impl<I: Io> Timeline<I> {
    /// Somebody uses the timeline.
    pub(super) fn touch(&self) {
        self.usage.last.set(self.context.io.now());
    }

    /// Starts one of the timeline's own tasks: `work` holds it once and does not keep it open.
    pub(super) fn spawn_own<F: Future<Output = ()> + 'static>(
        self: &Rc<Self>,
        class: TaskClass,
        work: impl FnOnce(Rc<Self>) -> F,
    ) {
        let task = self.usage.begin_task();
        // Not an async block, which would have room for the task twice.
        self.context.io.spawn(class, work(self.clone()).map(move |()| drop(task)));
    }

    /// Rules 1 and 2 of the module's text, and the time.
    fn is_unused(self: &Rc<Self>, idle: Duration) -> bool {
        let held = Rc::strong_count(self) > 1 + self.usage.tasks.get();
        #[cfg(test)]
        let held = held && !CANARY_CLOSE_IN_USE.get();
        let follows = self.source.is_some() && !self.archived.get();
        !held
            && !follows
            && self.has_stopped_following()
            && self.context.io.now().saturating_sub(self.usage.last.get()) >= idle
    }

    /// Rule 3 of the module's text.
    fn is_at_rest(&self) -> bool {
        let turns = [
            &self.flush_turn,
            &self.checkpoint_turn,
            &self.index_turn,
            &self.history.lease_turn,
            &self.history.gc_turn,
        ];
        let mutable = self.mutable.borrow();
        let lsns = mutable.lsns;
        turns.iter().all(|turn| turn.is_free())
            && self.compaction.is_at_rest()
            && self.history.doomed.borrow().is_empty()
            && self.gate.is_idle()
            && !self.ingesting.get()
            && !self.stopping.get()
            && !self.deleting.get()
            && mutable.broken.is_none()
            && mutable.frozen.is_empty()
            && lsns.last_record <= lsns.disk_consistent
            && lsns.received <= lsns.journal
    }

    /// What is kept of it when it is closed.
    fn brief(&self) -> Box<Brief> {
        let mut brief = Brief::of(&self.index_with(&[], self.lsns().disk_consistent));
        brief.logical_bytes = self.logical_bytes(&self.mutable.borrow());
        brief
    }
}

/// Where the daily round over closed timelines is.
#[derive(Default)]
pub(super) struct Round {
    last: RefCell<Option<TimelineKey>>,
    due_ms: Cell<u64>,
}

impl<I: Io, C: Connector> Shard<I, C> {
    /// Looks for idle timelines again and again until the shard stops.
    pub(super) async fn idle_loop(self: Rc<Self>) {
        let idle_ms = self.context.config.timeline_idle_ms;
        let pause_ms = (idle_ms / IDLE_LOOKS).max(1);
        loop {
            let sleep = std::pin::pin!(self.context.io.sleep(Duration::from_millis(pause_ms)));
            select(sleep, std::pin::pin!(self.idle_signal.wait())).await;
            if self.stopping.get() {
                return;
            }
            self.close_idle(Duration::from_millis(idle_ms));
            self.collect_closed(pause_ms).await;
        }
    }

    /// Begins to close every timeline that may be closed.
    fn close_idle(self: &Rc<Self>, idle: Duration) {
        let may_close = |slot: &Slot<I>| match slot {
            Slot::Ready(timeline) => timeline.is_unused(idle) && timeline.is_at_rest(),
            _ => false,
        };
        let keys: Vec<TimelineKey> = {
            let slots = self.slots.borrow();
            slots.iter().filter(|(_, slot)| may_close(slot)).map(|(key, _)| *key).collect()
        };
        for key in keys {
            let mut slots = self.slots.borrow_mut();
            let Some(Slot::Ready(timeline)) = slots.get(&key) else { continue };
            let (timeline, brief) = (timeline.clone(), timeline.brief());
            let (loading, done) = Loading::new(brief.clone());
            slots.insert(key, Slot::Loading(loading));
            drop(slots);
            let work = self.clone().finish_closing(key, timeline, brief, done);
            self.context.io.spawn(TaskClass::Background, work);
        }
    }

    async fn finish_closing(
        self: Rc<Self>,
        key: TimelineKey,
        timeline: Rc<Timeline<I>>,
        brief: Box<Brief>,
        done: async_channel::Sender<()>,
    ) {
        timeline.gate.close();
        timeline.abandon().await;
        // The files are the next opener's once nothing of this one is at work.
        while timeline.usage.tasks.get() > 0 {
            self.context.io.sleep(Duration::from_millis(CLOSING_POLL_MS)).await;
        }
        drop(timeline);
        self.context_closed(key).await;
        self.slots.borrow_mut().insert(key, Slot::Idle(brief));
        drop(done);
    }

    /// The tenant's redo ends with its last open timeline.
    async fn context_closed(&self, (tenant, id): TimelineKey) {
        self.counters.timelines_closed.add(1);
        let is_open =
            |slot: &Slot<I>| matches!(slot, Slot::Ready(_) | Slot::Loading(_) | Slot::Importing(_));
        let others = self.of_tenant(tenant, |other, slot| other != id && is_open(slot));
        if !others.contains(&true) {
            self.forget_redo(tenant).await;
        }
    }

    /// Opens and collects the closed timelines whose turn it is in the daily round; `passed_ms`
    /// have passed since the last call.
    async fn collect_closed(self: &Rc<Self>, passed_ms: u64) {
        let count = self.slots.borrow().len() as u64;
        let due_ms = self.round.due_ms.get() + passed_ms.saturating_mul(count);
        self.round.due_ms.set(due_ms % CLOSED_GC_PERIOD_MS);
        for _ in 0..(due_ms / CLOSED_GC_PERIOD_MS).min(count) {
            let Some(key) = self.next_of_round() else { return };
            let has_history = |slot: &Slot<I>| match slot {
                Slot::Idle(brief) => brief.history_bytes > 0,
                _ => false,
            };
            let worth_it = self.slots.borrow().get(&key).is_some_and(has_history);
            if !worth_it || self.config_of_known(key.0).is_none_or(|one| one.gc_period_s == 0) {
                continue;
            }
            let Ok(timeline) = self.activate(key).await else { continue };
            match self.collect_timeline(&timeline, GcRequest::default()).await {
                Ok(_) | Err(GcError::Shutdown | GcError::Broken(_)) => {}
                Err(error) => tracing::error!(tenant = %key.0, timeline = %key.1, "{error}"),
            }
        }
    }

    fn next_of_round(&self) -> Option<TimelineKey> {
        let slots = self.slots.borrow();
        let mut last = self.round.last.borrow_mut();
        let after = last.and_then(|key| {
            let later = (std::ops::Bound::Excluded(key), std::ops::Bound::Unbounded);
            slots.range(later).next()
        });
        *last = after.or_else(|| slots.iter().next()).map(|(key, _)| *key);
        *last
    }

    fn config_of_known(&self, tenant: TenantShardId) -> Option<super::timeline::TimelineConfig> {
        self.tenants.borrow().get(&tenant).map(|slot| slot.config.get())
    }
}
