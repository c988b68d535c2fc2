//! Work for the core's background executor.
//!
//! A CPU-bound task starves the I/O of everything beside it on an executor, so checkpoint and
//! import run on a second, low-priority executor of the same core. A job takes immutable inputs
//! and hands back values; it owns no state of the shard.

use std::future::Future;
use std::pin::Pin;

use futures_channel::oneshot;

use crate::io::{Io, TaskClass};
use crate::limits::BACKGROUND_JOBS_MAX;

type LocalTask = Pin<Box<dyn Future<Output = ()>>>;
type Job<I> = Box<dyn FnOnce(I) -> LocalTask + Send>;

/// The serve executor's end: hands over jobs.
pub struct Background<I> {
    jobs: async_channel::Sender<Job<I>>,
}

impl<I> Clone for Background<I> {
    fn clone(&self) -> Self {
        Background { jobs: self.jobs.clone() }
    }
}

/// The background executor's end.
pub struct BackgroundRunner<I> {
    jobs: async_channel::Receiver<Job<I>>,
}

/// The background executor is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the background executor has stopped")]
pub struct BackgroundStopped;

/// Both ends of a new queue.
pub fn channel<I>() -> (Background<I>, BackgroundRunner<I>) {
    let (sender, receiver) = async_channel::bounded(BACKGROUND_JOBS_MAX);
    (Background { jobs: sender }, BackgroundRunner { jobs: receiver })
}

impl<I: Io> Background<I> {
    /// Takes no more jobs; the runner ends when it has taken those that wait.
    pub fn close(&self) {
        self.jobs.close();
    }

    /// Runs `work` on the background executor and waits for its result.
    pub async fn run<T, W, F>(&self, work: W) -> Result<T, BackgroundStopped>
    where
        T: Send + 'static,
        W: FnOnce(I) -> F + Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job<I> = Box::new(move |io| {
            Box::pin(async move {
                // Whoever asked may be gone; the job's files are found by the next start.
                let _ = reply.send(work(io).await);
            })
        });
        self.jobs.send(job).await.map_err(|_| BackgroundStopped)?;
        answer.await.map_err(|_| BackgroundStopped)
    }
}

impl<I: Io> BackgroundRunner<I> {
    /// Runs jobs, several at once, until every [`Background`] is dropped.
    pub async fn run(self, io: I) {
        while let Ok(job) = self.jobs.recv().await {
            io.spawn(TaskClass::Background, job(io.clone()));
        }
    }
}
