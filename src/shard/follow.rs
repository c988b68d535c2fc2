//! Following a WAL source: connect, stream, ingest, acknowledge, reconnect.
//!
//! What is reported to the source: written = received, flushed = on disk and synced in the
//! journal, applied = ingested and readable. A synchronous primary therefore returns from a
//! commit only when the journal has it.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};

use super::index::{ClusterIdentity, WalSourceConfig};
use super::ingest::IngestError;
use super::lsns::Advance;
use super::plan::pressure::Pace;
use super::timeline::Timeline;
use crate::base::{Kind, Lsn};
use crate::io::Io;
use crate::limits::{NO_SPACE_RETRY_MS, STATUS_INTERVAL_MS};
use crate::wal::journal::JournalError;
use crate::wal::receiver::{EndOfStream, StandbyStatus, WalMessage, WalSource};
use crate::wal::source::SourceError;
use crate::wal::source::pace::{Backoff, Liveness, SilenceWatch};
use crate::wal::stream::StreamError;

/// Opens connections to WAL sources.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait Connector: Clone + 'static {
    /// An open connection.
    type Source: WalSource;
    /// Connects, and makes sure that the source is the cluster that the timeline belongs to.
    async fn connect(
        &self,
        source: &WalSourceConfig,
        cluster: &ClusterIdentity,
    ) -> Result<Self::Source, SourceError>;
}

/// Why taking in WAL stopped.
#[derive(Debug, thiserror::Error)]
pub enum TakeInError {
    /// Bytes that do not continue what came before.
    #[error("the source sent WAL at {got}, expected {expected}")]
    Gap {
        /// End of what came before.
        expected: Lsn,
        /// Start of what came.
        got: Lsn,
    },
    /// The source sent zeros where a record should begin.
    #[error("the source sent zeros instead of the WAL record after {at}")]
    Zeros {
        /// End of the last record.
        at: Lsn,
    },
    /// The bytes are no WAL.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A record could not be ingested.
    #[error(transparent)]
    Ingest(#[from] IngestError),
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The timeline is stopping or broken.
    #[error("the timeline takes in no more WAL")]
    Stopped,
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum FollowError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    TakeIn(#[from] TakeInError),
    #[error(
        "{error}; this timeline needs the WAL from {from} on: copy it back into the primary's \
         pg_wal, or delete the timeline and attach it anew, best with a slot, which keeps WAL"
    )]
    WalRemoved { error: SourceError, from: Lsn },
    #[error("nothing was heard of the primary for too long")]
    Silent,
    #[error("the primary was shut down")]
    PrimaryShutdown,
    #[error("the primary moved to timeline {next_timeline} at {at}; attach to the new primary")]
    TimelineSwitch { next_timeline: u32, at: Lsn },
}

impl<I: Io> Timeline<I> {
    /// Follows the timeline's source until the timeline stops or breaks.
    pub(super) async fn follow<C: Connector>(self: Rc<Self>, connector: C) {
        let Some(config) = self.source.clone() else {
            self.follow_ended.set(true);
            return;
        };
        let mut backoff = Backoff::default();
        while self.may_follow() && self.broken().is_none() {
            let before = self.lsns().received;
            let result = match connector.connect(&config, &self.cluster).await {
                Ok(mut source) => self.stream(&mut source).await,
                Err(error) => Err(error.into()),
            }
            .map_err(|error| match error {
                FollowError::Source(error) if error.is_removed_wal() => {
                    FollowError::WalRemoved { error, from: self.lsns().received }
                }
                other => other,
            });
            self.source_connected.set(false);
            match result {
                // The stop may have been taken back by now, as that of an archiving that failed.
                Ok(()) => {}
                Err(FollowError::TakeIn(error)) if breaks(&error) => {
                    self.set_broken(Kind::Corrupt, error.to_string());
                }
                Err(error) => {
                    if self.lsns().received > before {
                        backoff.succeeded();
                    }
                    self.mutable.borrow_mut().source_error = Some(error.to_string());
                    let pause = backoff.failed(self.context.io.random_u64());
                    tracing::warn!(
                        tenant = %self.tenant, timeline = %self.id,
                        "WAL source: {error}; connecting again in {} ms", pause.as_millis()
                    );
                    self.pause(pause).await;
                }
            }
        }
        self.follow_ended.set(true);
    }

    /// False when [`Timeline::follow`] is to end.
    fn may_follow(&self) -> bool {
        !self.stopping.get() && !self.archived.get()
    }

    /// Asks [`Timeline::follow`] to end.
    pub(super) fn stop_following(&self) {
        self.stopping.set(true);
        self.stop_signal.set();
    }

    /// True when no WAL comes in any more.
    pub(crate) fn has_stopped_following(&self) -> bool {
        self.follow_ended.get()
    }

    /// Sleeps, but not past a stop.
    async fn pause(&self, duration: Duration) {
        let sleep = std::pin::pin!(self.context.io.sleep(duration));
        let stop = std::pin::pin!(self.stop_signal.wait());
        select(sleep, stop).await;
    }

    /// Streams over one connection; `Ok` when the timeline is stopping.
    async fn stream<S: WalSource>(&self, source: &mut S) -> Result<(), FollowError> {
        source.start(self.lsns().received).await?;
        self.source_connected.set(true);
        let began = self.context.io.now();
        let (mut watch, mut pace) = (SilenceWatch::new(began), Pace::new(began));
        let (mut reported, mut reported_at) = (None, began);
        loop {
            let (positions, now) = (self.positions(), self.context.io.now());
            let liveness = watch.check(now);
            if liveness == Liveness::Dead {
                return Err(FollowError::Silent);
            }
            // The source acts on the flushed position; the others ride along.
            if reported.is_none_or(|[_, flush, _]: [Lsn; 3]| flush != positions[1])
                || liveness == Liveness::Ask
                || now.saturating_sub(reported_at) >= Duration::from_millis(STATUS_INTERVAL_MS)
            {
                let [write, flush, apply] = positions;
                let unix_time_us = self.context.io.unix_time_us();
                let reply_requested = liveness == Liveness::Ask;
                source
                    .send_status(StandbyStatus {
                        write,
                        flush,
                        apply,
                        unix_time_us,
                        reply_requested,
                    })
                    .await?;
                (reported, reported_at) = (Some(positions), now);
            }
            if let Some(pause) = pace.pause(now, self.ingest_limit())
                && self.may_follow()
            {
                self.stay_behind(pause).await;
                // Nobody listened, so silence means nothing.
                watch.heard(self.context.io.now());
                continue;
            }
            let event = self.next_event(source).await;
            if let Event::Message(message) = &event {
                watch.heard(self.context.io.now());
                // A start that is answered may still end in an error, such as WAL that is gone.
                if message.is_ok() {
                    self.mutable.borrow_mut().source_error = None;
                }
            }
            match event {
                Event::Stop => return Ok(()),
                Event::Report => {}
                Event::Tick => reported = None,
                Event::Message(message) => match message? {
                    WalMessage::Data { start, bytes, .. } => {
                        pace.took(bytes.len() as u64);
                        self.take_in(start, bytes).await?;
                        // It may have taken long, and nobody listened.
                        watch.heard(self.context.io.now());
                    }
                    WalMessage::KeepAlive { reply_requested: true, .. } => reported = None,
                    WalMessage::KeepAlive { reply_requested: false, .. } => {}
                    WalMessage::End(EndOfStream::Shutdown) => {
                        return Err(FollowError::PrimaryShutdown);
                    }
                    WalMessage::End(EndOfStream::TimelineSwitch { next_timeline, at }) => {
                        return Err(FollowError::TimelineSwitch { next_timeline, at });
                    }
                },
            }
        }
    }

    /// Leaves WAL with its source for a moment.
    async fn stay_behind(&self, pause: Duration) {
        let began = self.context.io.now();
        self.pause(pause).await;
        let waited = self.context.io.now().saturating_sub(began);
        self.context.counters.ingest_slowed_us.add(waited.as_micros() as u64);
    }

    async fn next_event<S: WalSource>(&self, source: &mut S) -> Event {
        let next = std::pin::pin!(source.next());
        let report = std::pin::pin!(self.status_signal.wait());
        let stop = std::pin::pin!(self.stop_signal.wait());
        let tick = std::pin::pin!(self.context.io.sleep(Duration::from_millis(STATUS_INTERVAL_MS)));
        if !self.may_follow() {
            return Event::Stop;
        }
        match select(next, select(report, select(stop, tick))).await {
            Either::Left((message, _)) => Event::Message(message),
            Either::Right((Either::Left(_), _)) => Event::Report,
            Either::Right((Either::Right((Either::Left(_), _)), _)) => Event::Stop,
            Either::Right((Either::Right((Either::Right(_), _)), _)) => Event::Tick,
        }
    }

    /// Written, flushed, applied.
    fn positions(&self) -> [Lsn; 3] {
        let mutable = self.mutable.borrow();
        [mutable.lsns.received, mutable.flushed_record, mutable.lsns.last_record]
    }

    /// Takes in WAL bytes: into the journal's memory, and all records that are whole now into the
    /// open layer. They are durable when `journal_lsn` has passed them.
    pub(super) async fn take_in(&self, start: Lsn, bytes: Bytes) -> Result<(), TakeInError> {
        let expected = self.lsns().received;
        if start != expected {
            return Err(TakeInError::Gap { expected, got: start });
        }
        while self.journal.is_full() {
            match self.flush_journal().await {
                Err(JournalError::NoSpace(_)) if self.may_follow() => {
                    self.context.io.sleep(Duration::from_millis(NO_SPACE_RETRY_MS)).await;
                }
                flushed => flushed?,
            }
        }
        let bytes = self.hold(bytes);
        self.journal.append(start, bytes.clone())?;
        {
            let mut mutable = self.mutable.borrow_mut();
            let end = Lsn(start.0 + bytes.len() as u64);
            mutable.lsns.advance(Advance::Received(end));
        }
        self.context.counters.wal_bytes.add(bytes.len() as u64);
        self.journal_signal.set();
        let result = self.ingest_bytes(bytes).await;
        let mut mutable = self.mutable.borrow_mut();
        let (end, boundary) = (mutable.lsns.received, mutable.lsns.last_record);
        if mutable.lsns.journal >= end {
            mutable.flushed_record = boundary;
            self.status_signal.set();
        } else {
            mutable.unsynced.push_back((end, boundary));
        }
        result
    }
}

/// True when trying again cannot help.
fn breaks(error: &TakeInError) -> bool {
    match error {
        TakeInError::Gap { .. } | TakeInError::Journal(JournalError::NoSpace(_)) => false,
        TakeInError::Stopped => false,
        TakeInError::Zeros { .. }
        | TakeInError::Stream(_)
        | TakeInError::Ingest(_)
        | TakeInError::Journal(_) => true,
    }
}

enum Event {
    Message(Result<WalMessage, SourceError>),
    Report,
    Tick,
    Stop,
}
