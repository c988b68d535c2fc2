//! The simulated executor: tasks, wakers, timers and the clock.
//!
//! One thread. In each step one of the runnable tasks, chosen by the seed, is polled once, and
//! the clock moves a little; where nothing is runnable the clock jumps to the next timer. Task
//! classes play no part in the choice: code must be correct in any order.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::future::Future;
use std::panic::Location;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use super::SimOptions;
use super::disk::Disk;
use super::random::{Stream, Trace};
use crate::io::{DirSyncs, TaskClass};

/// Set by a waker, cleared before the poll.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// One task. The future is out of its place while it is being polled.
pub(super) struct Task {
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
    woken: Arc<Woken>,
    class: TaskClass,
    origin: &'static Location<'static>,
    /// The operation it waited for last, for the report of a deadlock.
    waits_for: String,
}

/// Streams of randomness, one per purpose.
pub(super) struct Streams {
    pub scheduler: Stream,
    pub clock: Stream,
    pub latency: Stream,
    pub yields: Stream,
    pub faults: Stream,
    pub zeroed: Stream,
    pub crash: Stream,
    pub product: Stream,
}

/// Everything that changes during a run, except the tasks.
pub(super) struct State {
    pub options: SimOptions,
    pub streams: Streams,
    pub disk: Disk,
    pub trace: Trace,
    pub now: Duration,
    pub step: u64,
    pub faults_enabled: bool,
    pub violations: Vec<String>,
    /// True while tasks are being dropped: files left open then are no bug.
    pub stopping: bool,
    pub timers: BTreeMap<(Duration, u64), Waker>,
    pub next_timer: u64,
    /// Changes of the disk so far: parts of writes, syncs, and changes of names.
    pub changes: u64,
    /// Is told of each change before it takes place.
    pub watch: Option<Watch>,
    /// Files of which the last read was wrong: the next one is not.
    pub misread: std::collections::BTreeSet<super::disk::Inode>,
    /// Directories of which the last sync failed, and the changes that there were by then: the
    /// kernel has forgotten these until there are others. A new process knows nothing of it.
    pub failed_dir_syncs: BTreeMap<super::disk::Inode, super::disk::DirSeq>,
    pub dir_syncs: DirSyncs,
}

/// A change of the disk that is about to take place.
pub struct Seen<'a> {
    /// Its number; the first is 1.
    pub number: u64,
    /// `write`, `sync`, `rename`, ….
    pub operation: &'static str,
    /// The file or directory.
    pub path: &'a std::path::Path,
    /// The disk before it.
    pub disk: &'a Disk,
    /// Simulated time.
    pub now: Duration,
}

/// Looks at changes of the disk. It must not touch the simulated machine.
pub type Watch = Rc<dyn Fn(&Seen<'_>)>;

impl State {
    /// To be called right before each change of the disk.
    pub fn note_change(&mut self, operation: &'static str, path: &std::path::Path) {
        self.changes += 1;
        if let Some(watch) = &self.watch {
            let (number, disk, now) = (self.changes, &self.disk, self.now);
            watch(&Seen { number, operation, path, disk, now });
        }
    }
}

/// A machine, shared by the world and all of its [`super::SimIo`] handles.
pub(super) struct Shared {
    pub state: RefCell<State>,
    pub tasks: RefCell<BTreeMap<u64, Task>>,
    pub current: RefCell<(u64, u64)>,
}

/// Result of one step.
pub(super) enum Step {
    Polled,
    /// Nothing is runnable and no timer is pending.
    Stuck,
}

impl Shared {
    /// Adds a task, runnable at once.
    pub fn add_task(
        &self,
        class: TaskClass,
        origin: &'static Location<'static>,
        future: impl Future<Output = ()> + 'static,
    ) {
        let id = {
            let mut current = self.current.borrow_mut();
            current.1 += 1;
            current.1
        };
        let task = Task {
            future: Some(Box::pin(future)),
            woken: Arc::new(Woken(AtomicBool::new(true))),
            class,
            origin,
            waits_for: String::new(),
        };
        self.tasks.borrow_mut().insert(id, task);
    }

    /// Notes what the running task waits for.
    pub fn note_wait(&self, operation: impl FnOnce() -> String) {
        let id = self.current.borrow().0;
        if let Some(task) = self.tasks.borrow_mut().get_mut(&id) {
            task.waits_for = operation();
        }
    }

    fn fire_due_timers(&self) {
        let due = {
            let mut state = self.state.borrow_mut();
            let not_due = (state.now + Duration::from_nanos(1), 0);
            let later = state.timers.split_off(&not_due);
            std::mem::replace(&mut state.timers, later)
        };
        for waker in due.into_values() {
            waker.wake();
        }
    }

    fn runnable(&self) -> Vec<u64> {
        let tasks = self.tasks.borrow();
        let woken = |(id, task): (&u64, &Task)| task.woken.0.load(Ordering::Acquire).then_some(*id);
        tasks.iter().filter_map(woken).collect()
    }

    /// Polls one task.
    pub fn step(&self) -> Step {
        self.fire_due_timers();
        let mut runnable = self.runnable();
        if runnable.is_empty() {
            {
                let mut state = self.state.borrow_mut();
                let Some(((due, _), _)) = state.timers.first_key_value() else {
                    return Step::Stuck;
                };
                state.now = *due;
            }
            self.fire_due_timers();
            runnable = self.runnable();
        }
        let id = {
            let mut state = self.state.borrow_mut();
            state.step += 1;
            let pause = state.streams.clock.below(3_000);
            state.now += Duration::from_nanos(pause);
            let choice = state.streams.scheduler.below(runnable.len() as u64) as usize;
            let Some(id) = runnable.get(choice).copied() else { return Step::Polled };
            let now = state.now.as_nanos() as u64;
            state.trace.fold(id);
            state.trace.fold(now);
            id
        };
        self.poll(id);
        Step::Polled
    }

    fn poll(&self, id: u64) {
        let (mut future, woken) = {
            let mut tasks = self.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(&id) else { return };
            let Some(future) = task.future.take() else { return };
            task.woken.0.store(false, Ordering::Release);
            (future, Arc::clone(&task.woken))
        };
        self.current.borrow_mut().0 = id;
        let waker = Waker::from(woken);
        let done = future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        if done {
            self.tasks.borrow_mut().remove(&id);
        } else if let Some(task) = self.tasks.borrow_mut().get_mut(&id) {
            task.future = Some(future);
        }
    }

    /// Drops all tasks, as a process that dies does.
    pub fn drop_tasks(&self) {
        self.state.borrow_mut().stopping = true;
        loop {
            let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
            if tasks.is_empty() {
                break;
            }
            drop(tasks);
        }
        let mut state = self.state.borrow_mut();
        state.timers.clear();
        state.disk.kill();
        state.failed_dir_syncs.clear();
        state.dir_syncs = DirSyncs::new();
        state.stopping = false;
    }

    /// The tasks that there are, one line each.
    pub fn describe_tasks(&self) -> Vec<String> {
        let describe = |(id, task): (&u64, &Task)| {
            let waits_for = match task.waits_for.as_str() {
                "" => "nothing of the disk or clock yet",
                operation => operation,
            };
            format!(
                "task {id} ({:?}, from {}), last waited for {waits_for}",
                task.class, task.origin
            )
        };
        self.tasks.borrow().iter().map(describe).collect()
    }
}

/// Waits until a point of simulated time.
pub(super) struct Sleep {
    shared: Rc<Shared>,
    until: Duration,
    timer: Option<u64>,
}

impl Sleep {
    pub fn new(shared: Rc<Shared>, until: Duration) -> Sleep {
        Sleep { shared, until, timer: None }
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let shared = Rc::clone(&self.shared);
        let mut state = shared.state.borrow_mut();
        // The timer has to fire once even where its time has come already: a sleep always yields.
        if self.timer.is_some() && state.now >= self.until {
            return Poll::Ready(());
        }
        let timer = *self.timer.get_or_insert_with(|| {
            state.next_timer += 1;
            state.next_timer
        });
        state.timers.insert((self.until, timer), context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer
            && let Ok(mut state) = self.shared.state.try_borrow_mut()
        {
            state.timers.remove(&(self.until, timer));
        }
    }
}
