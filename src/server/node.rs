//! All cores of a node: start and stop.
//!
//! Each core has two executors on one CPU: *serve*, which owns the core's shards and connections,
//! and *background*, at low priority, which runs jobs that own no state.
//!
//! Start: executors, then every core's service, then, when all of them are loaded, the sockets.
//! Stop: sockets and connections, services, serve executors, background executors.

#![allow(clippy::disallowed_methods, reason = "executors and their main tasks are started here")]

use std::cell::Cell;
use std::future::Future;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_channel::{Receiver, Sender};
use futures_channel::oneshot;
use futures_util::future::{FutureExt, LocalBoxFuture};
use glommio::{ExecutorJoinHandle, Latency, LocalExecutorBuilder, Placement, Shares};

use crate::base::Kind;
use crate::config::Config;
use crate::limits::{
    BACKGROUND_JOBS_MAX, CONNECTION_DRAIN_MS_MAX, EXECUTOR_START_MS_MAX, EXECUTOR_STARTS_MAX,
    HEARTBEAT_INTERVAL_MS, PREEMPT_INTERVAL_US,
};
use crate::server::admission::Admission;
use crate::server::buffers::Buffers;
use crate::server::counters::Counters;
use crate::server::listener;
use crate::server::mesh::{Control, Mesh, Message, Progress, Pulse, beat};
use crate::server::page_service::Service;
use crate::server::priority;
use crate::server::socket;
use crate::shard::control::{CoreControl, CoreMetrics};
use crate::shard::reader::PageBackend;

/// A job for a background executor. It is sent there and makes its future there.
pub type Job = Box<dyn FnOnce() -> LocalBoxFuture<'static, ()> + Send>;

/// Sends jobs to the background executor of a core.
#[derive(Clone)]
pub struct BackgroundSpawner {
    jobs: Sender<Job>,
}

/// The background executor has ended, or the job panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the background executor has stopped")]
pub struct BackgroundStopped;

impl BackgroundStopped {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Shutdown
    }
}

impl BackgroundSpawner {
    /// Runs a job on the background executor and returns its result. Waits while the queue of
    /// jobs is full. The job goes on when the returned future is dropped.
    ///
    /// # Errors
    /// The executor has ended.
    pub async fn run<T, F>(
        &self,
        job: impl FnOnce() -> F + Send + 'static,
    ) -> Result<T, BackgroundStopped>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (reply, result) = oneshot::channel();
        let job: Job = Box::new(move || {
            Box::pin(async move {
                // Nobody may be waiting any more.
                let _ = reply.send(job().await);
            })
        });
        self.jobs.send(job).await.map_err(|_| BackgroundStopped)?;
        result.await.map_err(|_| BackgroundStopped)
    }
}

/// What a core's service is started with.
#[derive(Clone)]
pub struct CoreContext {
    /// This core.
    pub core: usize,
    /// Number of cores.
    pub cores: usize,
    /// CPU of this core.
    pub cpu: usize,
    /// The node's settings.
    pub config: Arc<Config>,
    /// The core's background executor.
    pub background: BackgroundSpawner,
    /// What TLS is set up with, where it is.
    pub tls: Option<Arc<rustls::ServerConfig>>,
}

/// One core's shards.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait CoreService: PageBackend + CoreControl + Sized {
    /// Loads what the core owns; runs on the core's serve executor.
    ///
    /// # Errors
    /// A message for the operator; the node does not start.
    async fn start(context: CoreContext) -> Result<Self, String>;
}

/// Why a node does not start, or how it ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NodeError {
    /// An executor could not be made.
    #[error("core {core}: cannot start an executor on CPU {cpu}: {problem}")]
    Executor {
        /// The core.
        core: usize,
        /// Its CPU.
        cpu: usize,
        /// glommio's words.
        problem: String,
    },
    /// A core's service did not start.
    #[error("core {core} does not start: {problem}")]
    Start {
        /// The core.
        core: usize,
        /// Why.
        problem: String,
    },
    /// The page service cannot listen.
    #[error("{0}")]
    Listen(String),
    /// An executor panicked; the panic's message is in the log.
    #[error("the executor of core {core} ended unasked (panic)")]
    Died {
        /// The core.
        core: usize,
    },
}

impl NodeError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// A running node. To be used on the control thread's tokio runtime.
pub struct Node {
    mesh: Mesh,
    address: SocketAddr,
    serve: Vec<ExecutorJoinHandle<()>>,
    background: Vec<ExecutorJoinHandle<()>>,
    jobs: Vec<Sender<Job>>,
    heartbeat: tokio::task::JoinHandle<()>,
}

/// What names of executors' threads begin with; a dash follows.
const SERVE: &str = "serve";
const BACKGROUND: &str = "background";

fn is_executor(thread: Option<&str>) -> bool {
    let kind = thread.and_then(|name| name.split_once('-')).map(|(kind, _)| kind);
    matches!(kind, Some(SERVE | BACKGROUND))
}

/// From now on a panic of an executor ends the process, once it is in the log. glommio neither runs
/// nor drops the tasks of an executor that unwound: whoever waits for one of them would wait for
/// ever, and an orderly stop too. What was acknowledged is synced, so the next start has it.
pub fn abort_with_executors() {
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        if is_executor(std::thread::current().name()) {
            tracing::error!("an executor panicked, which is a bug; the node ends at once");
            std::process::abort();
        }
    }));
}

/// Who is first to take it: an executor that runs its first task, or the control thread that has
/// waited long enough for that.
#[derive(Clone, Default)]
pub struct Claim(Arc<AtomicBool>);

impl Claim {
    /// True for the first who asks.
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    fn is_taken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// An executor that has run its first task.
///
/// glommio 0.9 may go to sleep over runnable tasks ([`crate::server::mesh`]), the first one too,
/// and before that has run there is no waker that could end it. Such an executor is left asleep,
/// without work and harmless, and another is made. What `make` starts takes the claim first of all,
/// and ends at once if that is taken already.
///
/// # Errors
/// No executor can be made, or none runs its first task.
pub async fn started_executor<T: Send + 'static>(
    make: impl Fn(Claim) -> Result<ExecutorJoinHandle<T>, glommio::GlommioError<()>>,
) -> Result<ExecutorJoinHandle<T>, String> {
    for _ in 0..EXECUTOR_STARTS_MAX {
        let claim = Claim::default();
        let handle = make(claim.clone()).map_err(|error| error.to_string())?;
        let mut waited_ms = 0;
        while !claim.is_taken() && waited_ms < EXECUTOR_START_MS_MAX {
            tokio::time::sleep(Duration::from_millis(1)).await;
            waited_ms += 1;
        }
        if !claim.take() {
            return Ok(handle);
        }
        tracing::warn!("an executor fell asleep before its first task; making another");
    }
    Err("executors fall asleep before their first task".to_owned())
}

fn builder(name: &str, core: usize, cpu: usize, io_memory: usize) -> LocalExecutorBuilder {
    LocalExecutorBuilder::new(Placement::Fixed(cpu))
        .name(&format!("{name}-{core}"))
        .io_memory(io_memory)
        .preempt_timer(Duration::from_micros(PREEMPT_INTERVAL_US))
}

/// Starts the executor's end of a heartbeat, after [`Progress::begin`].
pub fn start_beat(progress: Progress) {
    let latency = Latency::Matters(Duration::from_millis(1));
    let queue = glommio::executor().create_task_queue(Shares::default(), latency, "heartbeat");
    if let Ok(task) = glommio::spawn_local_into(beat(progress), queue) {
        task.detach();
    }
}

/// Looks at every executor's progress for ever, and wakes those that stand still.
async fn beat_all(mut pulses: Vec<Pulse>) {
    let period = Duration::from_millis(HEARTBEAT_INTERVAL_MS);
    let mut ticks = tokio::time::interval(period);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        pulses.iter_mut().for_each(Pulse::tick);
    }
}

/// CPU numbers of the cores: as configured, or all that this process may use.
fn cpus(config: &Config) -> Vec<usize> {
    if !config.cores.is_empty() {
        return config.cores.clone();
    }
    let own = nix::unistd::Pid::from_raw(0);
    let allowed = nix::sched::sched_getaffinity(own).unwrap_or_default();
    let is_set = |cpu: &usize| allowed.is_set(*cpu).unwrap_or(false);
    let all: Vec<usize> = (0..nix::sched::CpuSet::count()).filter(is_set).collect();
    if all.is_empty() { vec![0] } else { all }
}

impl Node {
    /// Starts all cores; returns when they take connections.
    ///
    /// # Errors
    /// See [`NodeError`]; nothing is left running.
    pub async fn start<S: CoreService>(config: Arc<Config>) -> Result<Node, NodeError> {
        let cpus = cpus(&config);
        let tls = socket::load(&config).map_err(NodeError::Listen)?;
        let (mesh, inboxes) = Mesh::new(cpus.len());
        // Hearts beat before there is an executor: it may fall asleep while it loads its shards.
        let pulses: Vec<[Pulse; 2]> = cpus.iter().map(|_| Default::default()).collect();
        let progress: Vec<[Progress; 2]> =
            pulses.iter().map(|pair| pair.each_ref().map(Pulse::progress)).collect();
        let mut node = Node {
            mesh: mesh.clone(),
            address: config.listen_pg_addr,
            serve: Vec::new(),
            background: Vec::new(),
            jobs: Vec::new(),
            heartbeat: tokio::spawn(beat_all(pulses.into_iter().flatten().collect())),
        };
        let mut ready = Vec::new();
        let mut failure = None;
        let cores = cpus.iter().copied().zip(inboxes).zip(progress);
        for (core, ((cpu, inbox), [serve_progress, background_progress])) in cores.enumerate() {
            let (jobs, queue) = async_channel::bounded(BACKGROUND_JOBS_MAX);
            node.jobs.push(jobs.clone());
            let background = BackgroundSpawner { jobs };
            let (config, tls) = (config.clone(), tls.clone());
            let context = CoreContext { core, cores: cpus.len(), cpu, config, background, tls };
            let (started, is_started) = async_channel::bounded(1);
            let serve = started_executor(|claim| {
                let (context, inbox, mesh) = (context.clone(), inbox.clone(), mesh.clone());
                let (progress, started) = (serve_progress.clone(), started.clone());
                builder(SERVE, core, cpu, 512 << 10).spawn(move || async move {
                    if claim.take() {
                        run_core::<S>(context, inbox, mesh, progress, started).await;
                    }
                })
            });
            let serve = serve.await;
            let background = start_background(core, cpu, &queue, &background_progress).await;
            ready.push(is_started);
            for (handle, list) in [(serve, &mut node.serve), (background, &mut node.background)] {
                match handle {
                    Ok(handle) => list.push(handle),
                    Err(problem) => failure = Some(NodeError::Executor { core, cpu, problem }),
                }
            }
        }
        for (core, ready) in ready.into_iter().enumerate() {
            let problem = match ready.recv().await {
                Ok(Ok(())) => continue,
                Ok(Err(problem)) => problem,
                Err(_) => "its executor ended".to_owned(),
            };
            failure.get_or_insert(NodeError::Start { core, problem });
        }
        if failure.is_none() {
            failure = node.listen().await.err();
        }
        match failure {
            None => Ok(node),
            Some(error) => {
                let _ = node.stop().await;
                Err(error)
            }
        }
    }

    /// All cores listen at the address that the first one got.
    async fn listen(&mut self) -> Result<(), NodeError> {
        listener::check_free(self.address).map_err(NodeError::Listen)?;
        for core in 0..self.mesh.cores() {
            let (reply, bound) = oneshot::channel();
            let sent = self.mesh.send(core, Message::Listen(self.address, reply));
            sent.map_err(|error| NodeError::Listen(error.to_string()))?;
            let bound = bound.await.map_err(|_| NodeError::Died { core })?;
            self.address = bound.map_err(NodeError::Listen)?;
        }
        Ok(())
    }

    /// The way to the cores.
    pub fn mesh(&self) -> Mesh {
        self.mesh.clone()
    }

    /// The address of the page service, with its real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops everything, with all data synced.
    ///
    /// # Errors
    /// An executor panicked.
    pub async fn stop(self) -> Result<(), NodeError> {
        let mut replies = Vec::new();
        for core in 0..self.mesh.cores() {
            let (reply, stopped) = oneshot::channel();
            // A core that has ended already has nothing to stop.
            if self.mesh.send(core, Message::Shutdown(reply)).is_ok() {
                replies.push(stopped);
            }
        }
        for stopped in replies {
            let _ = stopped.await;
        }
        let mut died = join_all(self.serve).await;
        for jobs in &self.jobs {
            jobs.close();
        }
        died = died.or(join_all(self.background).await);
        self.heartbeat.abort();
        died.map_or(Ok(()), |core| Err(NodeError::Died { core }))
    }
}

/// Joins executors on another thread, so that heartbeats go on; returns one that panicked.
async fn join_all(handles: Vec<ExecutorJoinHandle<()>>) -> Option<usize> {
    let mut died = None;
    for (core, handle) in handles.into_iter().enumerate() {
        let joined = tokio::task::spawn_blocking(move || handle.join().is_ok()).await;
        if !matches!(joined, Ok(true)) {
            died = Some(core);
        }
    }
    died
}

/// The background executor of a core.
async fn start_background(
    core: usize,
    cpu: usize,
    queue: &Receiver<Job>,
    progress: &Progress,
) -> Result<ExecutorJoinHandle<()>, String> {
    started_executor(|claim| {
        let (queue, progress) = (queue.clone(), progress.clone());
        builder(BACKGROUND, core, cpu, 128 << 10).spawn(move || async move {
            if claim.take() {
                run_background(queue, progress).await;
            }
        })
    })
    .await
}

async fn run_background(queue: Receiver<Job>, progress: Progress) {
    priority::lower();
    progress.begin().await;
    start_beat(progress.clone());
    let running = Rc::new(Cell::new(0_usize));
    while let Ok(job) = queue.recv().await {
        running.set(running.get() + 1);
        let (running, progress) = (running.clone(), progress.clone());
        glommio::spawn_local(async move {
            job().await;
            progress.step();
            running.set(running.get() - 1);
        })
        .detach();
    }
    while running.get() > 0 {
        glommio::timer::sleep(Duration::from_millis(2)).await;
    }
}

async fn run_core<S: CoreService>(
    context: CoreContext,
    inbox: Receiver<Message>,
    mesh: Mesh,
    progress: Progress,
    started: Sender<Result<(), String>>,
) {
    priority::shorten_turns();
    progress.begin().await;
    start_beat(progress.clone());
    let (core, cores, tls) = (context.core, context.cores, context.tls.clone());
    let backend = match S::start(context).await {
        Ok(backend) => Rc::new(backend),
        Err(problem) => {
            let _ = started.try_send(Err(problem));
            return;
        }
    };
    let (stopper, stop) = async_channel::bounded::<()>(1);
    let (counters, buffers) = (Counters::default(), Buffers::default());
    let sleep = |time| glommio::timer::sleep(time).boxed_local();
    let now = monotonic;
    let admission = Admission::start(now, sleep, stop.clone());
    let service = Rc::new(Service {
        backend,
        core,
        cores,
        counters,
        admission,
        buffers,
        tls,
        stop,
        now,
        sleep,
    });
    let _ = started.try_send(Ok(()));
    drop(started);
    while let Ok(message) = inbox.recv().await {
        progress.step();
        match message {
            Message::Adopt(connection) => {
                listener::adopt(connection, service.clone(), mesh.clone());
            }
            Message::Control(command) => control(&service, command),
            Message::Listen(address, reply) => {
                let bound = listener::listen(address).map(|(listener, bound)| {
                    let accept = listener::accept(listener, service.clone(), mesh.clone());
                    glommio::spawn_local(accept).detach();
                    bound
                });
                let _ = reply.send(bound);
            }
            Message::Shutdown(reply) => {
                stopper.close();
                drain(&service).await;
                service.backend.shutdown().await;
                let _ = reply.send(());
                return;
            }
        }
    }
}

/// Waits for connections to end, but not for long.
async fn drain<S: CoreService>(service: &Service<S>) {
    let deadline = monotonic() + Duration::from_millis(CONNECTION_DRAIN_MS_MAX);
    while service.counters.open.get() > 0 && monotonic() < deadline {
        glommio::timer::sleep(Duration::from_millis(2)).await;
    }
}

/// Time since the first call in this process; for measuring only, so it may bypass `Io`.
#[allow(clippy::disallowed_methods, reason = "the page service's latency figures need a clock")]
fn monotonic() -> Duration {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed()
}

/// Handles a command of the admin API; long ones in a task of their own.
fn control<S: CoreService>(service: &Rc<Service<S>>, command: Control) {
    let backend = service.backend.clone();
    // The asker may have given up, so replies may fail.
    match command {
        Control::Timelines(reply) => {
            let _ = reply.send(backend.timelines());
        }
        Control::Tenants(reply) => {
            let _ = reply.send(backend.tenants());
        }
        Control::Change(change, reply) => {
            let work = async move {
                let _ = reply.send(backend.change(change).await);
            };
            glommio::spawn_local(work).detach();
        }
        Control::Metrics(reply) => {
            let _ = reply.send(metrics(service));
        }
        Control::CreateTimeline(request, reply) => {
            let work = async move {
                let _ = reply.send(backend.create_timeline(request).await);
            };
            glommio::spawn_local(work).detach();
        }
        Control::Checkpoint(tenant, timeline, reply) => {
            let work = async move {
                let _ = reply.send(backend.checkpoint(tenant, timeline).await);
            };
            glommio::spawn_local(work).detach();
        }
        Control::History(tenant, timeline, request, reply) => {
            let work = async move {
                let _ = reply.send(backend.history(tenant, timeline, request).await);
            };
            glommio::spawn_local(work).detach();
        }
    }
}

fn metrics<S: CoreService>(service: &Service<S>) -> CoreMetrics {
    let counters = &service.counters;
    let mut metrics = CoreMetrics {
        core: service.core,
        connections_accepted: counters.accepted.get(),
        connections_moved: counters.moved.get(),
        connections_open: counters.open.get(),
        get_page_requests: counters.get_page_requests.get(),
        get_page_seconds: counters.get_page_time.get().as_secs_f64(),
        other_requests: counters.other_requests.get(),
        request_errors: counters.request_errors.get(),
        ..service.backend.metrics()
    };
    service.admission.metrics(&mut metrics);
    metrics
}

#[cfg(test)]
mod tests;
