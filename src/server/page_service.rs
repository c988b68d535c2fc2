//! One connection, from its first byte to its end.
//!
//! 1. Start-up: TLS begins where it is set up and asked for, everybody is welcome.
//! 2. Commands, by simple or extended query. A command that names a tenant of another core ends
//!    the work here: [`End::Move`] carries everything that the other core must know.
//! 3. Page stream: see `stream`.
//!
//! Errors: a request that fails is answered with an error reply, and the stream goes on. A
//! message out of place ends the stream, bytes that are no messages end the connection.
//!
//! Time-outs are the stream's: an idle or stuck peer shows as [`ErrorKind::TimedOut`].

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io::{Error, ErrorKind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use async_channel::Receiver;
use bytes::BytesMut;
use futures_util::future::{Either, LocalBoxFuture, select};
use futures_util::{AsyncWriteExt, StreamExt};

use self::lease::describe;
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::limits::{CONNECTION_HOPS_MAX, CONNECTION_REPLY_BYTES_MAX, CONNECTION_STATEMENTS_MAX};
use crate::server::admission::Admission;
use crate::server::buffers::Buffers;
use crate::server::counters::Counters;
use crate::server::page_protocol::Version;
use crate::server::pq::{self, Command, Message, Severity, SqlState, Target};
use crate::server::router;
use crate::server::socket::Stream;
use crate::shard::base_backup::BackupRequest;
use crate::shard::reader::{PageBackend, ReadError};

mod backup;
mod lease;
mod request;
mod start_up;
mod stream;

/// A connection between two waits: what a core must know to go on with it.
#[derive(Default)]
pub struct Session {
    /// Bytes that were read and not used yet.
    unread: BytesMut,
    /// Replies that were not written yet; empty when the session moves.
    unwritten: BytesMut,
    /// The start-up packet was answered.
    started: bool,
    /// After an error in an extended query: everything up to `Sync` is passed over.
    skip_to_sync: bool,
    statements: BTreeMap<String, String>,
    portals: BTreeMap<String, String>,
    /// The command of a tenant to carry out next.
    pending: Option<Wanted>,
    /// Moves since the last command that was served.
    hops: u32,
}

/// A command that needs a timeline.
#[derive(Clone, Copy)]
struct Wanted {
    tenant: TenantShardId,
    timeline: TimelineId,
    work: Work,
    /// A simple query asked for it.
    simple: bool,
}

/// What is to be done with the timeline.
#[derive(Clone, Copy)]
enum Work {
    /// A page stream.
    Pages(Version),
    /// A lease on an LSN.
    Lease(Lsn),
    /// A backup, packed by gzip or not.
    Backup(BackupRequest, bool),
}

/// How the work on a connection ended.
pub enum End {
    /// It is over.
    Closed,
    /// Core `target` must go on with it. Nothing waits to be written.
    Move {
        /// The owner of the tenant that the client named.
        target: usize,
        /// All that is known about the connection.
        session: Box<Session>,
    },
}

/// What all connections of a core share.
pub struct Service<B> {
    /// The core's timelines.
    pub backend: Rc<B>,
    /// This core.
    pub core: usize,
    /// Number of cores.
    pub cores: usize,
    /// The core's counters.
    pub counters: Counters,
    /// Who may work on page requests.
    pub admission: Rc<Admission>,
    /// The core's buffers.
    pub buffers: Buffers,
    /// What TLS is set up with, where it is.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Closed when the node shuts down.
    pub stop: Receiver<()>,
    /// The monotonic clock.
    pub now: fn() -> Duration,
    /// Waits.
    pub sleep: fn(Duration) -> LocalBoxFuture<'static, ()>,
}

/// Why a connection ends early.
enum Fault {
    /// The socket is gone: nothing can be said.
    Io(Error),
    /// Said to the client before the end.
    Fatal(SqlState, String),
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        match error.kind() {
            ErrorKind::TimedOut => {
                Fault::Fatal(SqlState::IDLE_TIMEOUT, "terminating idle connection".to_owned())
            }
            _ => Fault::Io(error),
        }
    }
}

impl From<pq::PqError> for Fault {
    fn from(error: pq::PqError) -> Self {
        Fault::Fatal(SqlState::PROTOCOL_VIOLATION, error.to_string())
    }
}

fn shutdown() -> Fault {
    let text = "terminating connection: the server is shutting down".to_owned();
    Fault::Fatal(SqlState::ADMIN_SHUTDOWN, text)
}

/// Serves a connection until it ends or has to move.
pub async fn serve<S, B>(stream: &mut S, session: Session, service: &Service<B>) -> End
where
    S: Stream,
    B: PageBackend,
{
    let stop = Box::pin(service.stop.clone());
    let mut connection = Conn { stream, session, service, stop };
    match connection.run().await {
        Ok(None) => End::Closed,
        Ok(Some(target)) => End::Move { target, session: Box::new(connection.session) },
        Err(Fault::Io(error)) => {
            tracing::debug!("connection ended: {error}");
            End::Closed
        }
        Err(Fault::Fatal(state, text)) => {
            tracing::debug!("connection closed: {text}");
            let out = &mut connection.session.unwritten;
            pq::put_error(out, Severity::Fatal, state, &text);
            // The client may be gone; there is nobody else to tell.
            let _ = connection.flush().await;
            End::Closed
        }
    }
}

struct Conn<'a, S, B> {
    stream: &'a mut S,
    session: Session,
    service: &'a Service<B>,
    /// The service's, for reads: it stays registered from one to the next.
    stop: Pin<Box<Receiver<()>>>,
}

/// What a message at the command level leads to.
enum Next {
    Go,
    Open(Wanted),
    Terminate,
}

impl<S, B> Conn<'_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    /// Returns the core to move to, or `None` at an orderly end.
    async fn run(&mut self) -> Result<Option<usize>, Fault> {
        if !self.session.started && !self.start_up_in_time().await? {
            return Ok(None);
        }
        loop {
            if let Some(wanted) = self.session.pending.take() {
                let owner = router::owner(&wanted.tenant, self.service.cores);
                if owner != self.service.core {
                    return self.leave_for(owner, wanted).await.map(Some);
                }
                self.session.hops = 0;
                match wanted.work {
                    Work::Pages(version) => {
                        if !self.open_stream(wanted, version).await? {
                            return Ok(None);
                        }
                    }
                    Work::Lease(lsn) => self.lease(wanted, lsn).await?,
                    // In memory of its own: every connection would have room for it.
                    Work::Backup(request, gzip) => {
                        Box::pin(self.backup(wanted, request, gzip)).await?;
                    }
                }
                continue;
            }
            let Some(message) = self.next_message().await? else { return Ok(None) };
            match self.command_level(message) {
                Next::Go => {}
                Next::Open(wanted) => self.session.pending = Some(wanted),
                Next::Terminate => return Ok(None),
            }
            if self.session.unwritten.len() > CONNECTION_REPLY_BYTES_MAX {
                self.flush().await?;
            }
        }
    }

    async fn leave_for(&mut self, owner: usize, wanted: Wanted) -> Result<usize, Fault> {
        self.session.hops += 1;
        if self.session.hops > CONNECTION_HOPS_MAX {
            let text = format!("no core takes tenant {}", wanted.tenant);
            return Err(Fault::Fatal(SqlState::INTERNAL, text));
        }
        self.session.pending = Some(wanted);
        self.flush().await?;
        Ok(owner)
    }

    /// The next message, after everything that is ready was written; `None` at the end of input.
    async fn next_message(&mut self) -> Result<Option<Message>, Fault> {
        loop {
            if let Some(message) = pq::decode_message(&mut self.session.unread)? {
                return Ok(Some(message));
            }
            self.flush().await?;
            if !self.read().await? {
                return Ok(None);
            }
        }
    }

    /// Waits for bytes; false at the end of input. The end of a connection in the middle of a
    /// message is an end like any other.
    async fn read(&mut self) -> Result<bool, Fault> {
        let Session { unread, unwritten, .. } = &mut self.session;
        let (stream, buffers) = (&mut *self.stream, &self.service.buffers);
        let read = pin!(poll_fn(|context| buffers.poll_read(stream, context, unread, unwritten)));
        match select(read, self.stop.next()).await {
            Either::Left((Ok(length), _)) => Ok(length > 0),
            Either::Left((Err(error), _)) => Err(error.into()),
            Either::Right(_) => Err(shutdown()),
        }
    }

    async fn flush(&mut self) -> Result<(), Fault> {
        if !self.session.unwritten.is_empty() {
            let mut written = self.stream.write_all(&self.session.unwritten).await;
            self.session.unwritten.clear();
            if written.is_ok() {
                written = self.stream.flush().await;
            }
            // After a write that failed the position in the stream is unknown: nothing more can
            // be said, a time-out included.
            written.map_err(Fault::Io)?;
        }
        Ok(())
    }

    fn error(&mut self, state: SqlState, text: &str) {
        pq::put_error(&mut self.session.unwritten, Severity::Error, state, text);
    }

    fn command_level(&mut self, message: Message) -> Next {
        if self.session.skip_to_sync && !matches!(message, Message::Sync | Message::Terminate) {
            return Next::Go;
        }
        match message {
            Message::Query(text) => return self.command(&text, true),
            Message::Execute { portal } => {
                let Some(text) = self.session.portals.get(&portal).cloned() else {
                    let text = format!("portal \"{portal}\" does not exist");
                    self.extended_error(SqlState::UNDEFINED_PORTAL, &text);
                    return Next::Go;
                };
                return self.command(&text, false);
            }
            Message::Sync => {
                self.session.skip_to_sync = false;
                pq::put_ready(&mut self.session.unwritten);
            }
            Message::Terminate => return Next::Terminate,
            // Left over from a stream that ended with an error, and ignored as PostgreSQL does.
            Message::CopyData(_) | Message::CopyDone | Message::CopyFail(_) | Message::Flush => {}
            Message::Parse { .. }
            | Message::Bind { .. }
            | Message::Describe(_)
            | Message::Close(_) => {
                self.prepare(message);
            }
        }
        Next::Go
    }

    fn extended_error(&mut self, state: SqlState, text: &str) {
        self.error(state, text);
        self.session.skip_to_sync = true;
    }

    fn prepare(&mut self, message: Message) {
        let Session { statements, portals, unwritten: out, .. } = &mut self.session;
        let missing = |name: &str| format!("prepared statement \"{name}\" does not exist");
        let full = |map: &BTreeMap<String, String>, name: &str| {
            map.len() >= CONNECTION_STATEMENTS_MAX && !map.contains_key(name)
        };
        let too_many = || "too many prepared statements or portals".to_owned();
        let failure = match message {
            Message::Parse { statement, query: _ } if full(statements, &statement) => {
                Some((SqlState::LIMIT_EXCEEDED, too_many()))
            }
            Message::Parse { statement, query } => {
                statements.insert(statement, query);
                pq::put_empty(out, b'1');
                None
            }
            Message::Bind { portal, statement } => match statements.get(&statement) {
                None => Some((SqlState::UNDEFINED_STATEMENT, missing(&statement))),
                Some(_) if full(portals, &portal) => Some((SqlState::LIMIT_EXCEEDED, too_many())),
                Some(text) => {
                    portals.insert(portal, text.clone());
                    pq::put_empty(out, b'2');
                    None
                }
            },
            Message::Describe(Target::Statement(name)) if !statements.contains_key(&name) => {
                Some((SqlState::UNDEFINED_STATEMENT, missing(&name)))
            }
            Message::Describe(Target::Portal(name)) if !portals.contains_key(&name) => {
                Some((SqlState::UNDEFINED_PORTAL, format!("portal \"{name}\" does not exist")))
            }
            Message::Describe(target) => {
                let text = match &target {
                    Target::Statement(name) => {
                        pq::put_no_parameters(out);
                        statements.get(name)
                    }
                    Target::Portal(name) => portals.get(name),
                };
                describe(out, text.map_or("", String::as_str));
                None
            }
            Message::Close(target) => {
                match target {
                    Target::Statement(name) => statements.remove(&name),
                    Target::Portal(name) => portals.remove(&name),
                };
                pq::put_empty(out, b'3');
                None
            }
            _ => None,
        };
        if let Some((state, text)) = failure {
            self.extended_error(state, &text);
        }
    }

    fn command(&mut self, text: &str, simple: bool) -> Next {
        let open = |tenant, timeline, work| Next::Open(Wanted { tenant, timeline, work, simple });
        match pq::parse_command(text) {
            Ok(Command::PageStream { version, tenant, timeline }) => {
                return open(tenant, timeline, Work::Pages(version));
            }
            Ok(Command::Lease { tenant, timeline, lsn }) => {
                return open(tenant, timeline, Work::Lease(lsn));
            }
            Ok(Command::Backup { tenant, timeline, request, gzip }) => {
                return open(tenant, timeline, Work::Backup(request, gzip));
            }
            // "SELECT 1" is what other page services answer, and what drivers are used to.
            Ok(Command::Set) => pq::put_command_complete(&mut self.session.unwritten, "SELECT 1"),
            Ok(Command::Empty) => pq::put_empty(&mut self.session.unwritten, b'I'),
            Err(error) => self.error_of_command(simple, error.sql_state(), &error.to_string()),
        }
        if simple {
            self.ready_after_command();
        }
        Next::Go
    }

    fn error_of_command(&mut self, simple: bool, state: SqlState, text: &str) {
        self.error(state, text);
        self.session.skip_to_sync = !simple;
    }

    fn ready_after_command(&mut self) {
        pq::put_ready(&mut self.session.unwritten);
    }

    /// The timeline that a command names; `None` when the client has been told why not.
    async fn find(&mut self, wanted: &Wanted) -> Result<Option<Rc<B::Timeline>>, Fault> {
        let found = self.service.backend.timeline(wanted.tenant, wanted.timeline).await;
        let error = match found {
            Ok(timeline) => return Ok(Some(timeline)),
            Err(error) if error.kind() == Kind::Shutdown => return Err(shutdown()),
            Err(error) => error,
        };
        let state = match error {
            ReadError::TenantNotFound(_) | ReadError::TimelineNotFound(..) => {
                SqlState::UNDEFINED_OBJECT
            }
            ReadError::NotReady { .. }
            | ReadError::NotMade { .. }
            | ReadError::Unreadable { .. }
            | ReadError::Archived { .. } => SqlState::NOT_READY,
            _ => SqlState::INTERNAL,
        };
        self.end_with_error(wanted, state, &error.to_string());
        Ok(None)
    }

    /// Ends a command with an error.
    fn end_with_error(&mut self, wanted: &Wanted, state: SqlState, text: &str) {
        self.error_of_command(wanted.simple, state, text);
        if wanted.simple {
            self.ready_after_command();
        }
    }
}
