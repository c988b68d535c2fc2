//! A replication connection to a PostgreSQL server, over any byte stream.
//!
//! Formats: PostgreSQL documentation, "Frontend/Backend Protocol" and "Streaming Replication
//! Protocol". Reading is safe against cancellation: bytes go straight into the connection's
//! buffer and leave it as whole messages. So is sending: what was not sent stays queued.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use bytes::{Buf, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use futures_util::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;

use super::conninfo::{ConnInfo, Secret};
use super::error::SourceError;
use super::message::{Backend, check_version, row, server_error, take};
use crate::base::Lsn;
use crate::limits::{SOURCE_READ_BYTES, SOURCE_ROWS_MAX};

/// Longest name of a replication slot (`NAMEDATALEN - 1`), in bytes.
const SLOT_NAME_BYTES_MAX: usize = 63;

/// What a server says about itself (`IDENTIFY_SYSTEM`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SystemIdentity {
    /// Number that all copies of one cluster share.
    pub system_id: u64,
    /// The timeline it is on.
    pub timeline: u32,
    /// End of its flushed WAL.
    pub flushed: Lsn,
}

/// Name of a replication slot: 1 to 63 of `a-z`, `0-9`, `_`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotName(String);

impl SlotName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SlotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SlotName {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if text.is_empty() || text.len() > SLOT_NAME_BYTES_MAX || !text.bytes().all(plain) {
            return Err(SourceError::Invalid {
                what: format!(
                    "'{text}' is no name of a replication slot; use 1 to 63 of a-z, 0-9 and _"
                ),
            });
        }
        Ok(SlotName(text.to_owned()))
    }
}

/// A physical replication slot on the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotState {
    /// Oldest WAL that the slot keeps; `None` when it keeps none yet.
    pub restart_lsn: Option<Lsn>,
    /// True when the slot did not exist before.
    pub created: bool,
}

/// What one statement returned.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ResultSet {
    /// Rows of columns, as text; `None` for NULL.
    pub rows: Vec<Vec<Option<String>>>,
    /// The command tag.
    pub tag: String,
}

impl ResultSet {
    /// A column of the first row that must be there.
    pub fn text(&self, column: usize, during: &'static str) -> Result<&str, SourceError> {
        let first = self.rows.first().and_then(|row| row.get(column)).and_then(Option::as_deref);
        first.ok_or_else(|| {
            SourceError::protocol(during, format!("the answer lacks column {column}"))
        })
    }

    /// The same, read as a number, an LSN, ….
    pub fn parsed<T: FromStr>(
        &self,
        column: usize,
        during: &'static str,
    ) -> Result<T, SourceError> {
        let text = self.text(column, during)?;
        let bad = |_| SourceError::protocol(during, format!("column {column} holds '{text}'"));
        text.parse().map_err(bad)
    }
}

/// A step of a copy from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CopyStep {
    /// One `CopyData` message.
    Data(Bytes),
    /// The server ended its side (`CopyDone`).
    Done,
    /// The command is complete, as a server that shuts down says it.
    Complete,
}

/// A connection that is logged in.
pub struct Connection<S> {
    stream: S,
    input: BytesMut,
    scratch: Box<[u8]>,
    output: BytesMut,
    parameters: BTreeMap<String, String>,
    /// The result set that is being read; kept here so that a cancelled read loses no row.
    partial: ResultSet,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Logs in for physical replication and checks that the server is PostgreSQL 15. `info`
    /// must hold the password, where one is needed; time-outs are the caller's.
    pub async fn start(stream: S, info: &ConnInfo) -> Result<Self, SourceError> {
        let mut connection = Connection {
            stream,
            input: BytesMut::new(),
            scratch: vec![0; SOURCE_READ_BYTES].into_boxed_slice(),
            output: BytesMut::new(),
            parameters: BTreeMap::new(),
            partial: ResultSet::default(),
        };
        let mut parameters = vec![
            ("user", info.user.as_str()),
            ("replication", "true"),
            ("application_name", info.application_name.as_str()),
            ("client_encoding", "UTF8"),
        ];
        if let Some(options) = &info.options {
            parameters.push(("options", options));
        }
        frontend::startup_message(parameters, &mut connection.output).map_err(cannot_write)?;
        connection.log_in(info).await?;
        let version = connection.parameters.get("server_version");
        check_version(version.map_or("of unknown version", String::as_str))?;
        Ok(connection)
    }

    async fn log_in(&mut self, info: &ConnInfo) -> Result<(), SourceError> {
        const DURING: &str = "logging in";
        let mut scram: Option<sasl::ScramSha256> = None;
        // Whether the server has proved that it knows the password, where it must.
        let mut server_proved = true;
        loop {
            self.flush(DURING).await?;
            match self.message(DURING).await? {
                Message::AuthenticationOk if server_proved => break,
                Message::AuthenticationOk => {
                    return Err(refused(
                        "the server skipped the end of SCRAM; it may be an impostor",
                    ));
                }
                Message::AuthenticationCleartextPassword => {
                    let password = password(info)?;
                    frontend::password_message(password.reveal().as_bytes(), &mut self.output)
                        .map_err(cannot_write)?;
                }
                Message::AuthenticationMd5Password(body) => {
                    let password = password(info)?;
                    let (user, password) = (info.user.as_bytes(), password.reveal().as_bytes());
                    let answer = md5_hash(user, password, body.salt());
                    frontend::password_message(answer.as_bytes(), &mut self.output)
                        .map_err(cannot_write)?;
                }
                Message::AuthenticationSasl(body) => {
                    let mut mechanisms = body.mechanisms();
                    let known = mechanisms.any(|name| Ok(name == sasl::SCRAM_SHA_256));
                    if !known.unwrap_or(false) {
                        return Err(refused("the server offers no SCRAM-SHA-256"));
                    }
                    let password = password(info)?;
                    let binding = sasl::ChannelBinding::unsupported();
                    let start = sasl::ScramSha256::new(password.reveal().as_bytes(), binding);
                    let (name, out) = (sasl::SCRAM_SHA_256, &mut self.output);
                    frontend::sasl_initial_response(name, start.message(), out)
                        .map_err(cannot_write)?;
                    scram = Some(start);
                    server_proved = false;
                }
                Message::AuthenticationSaslContinue(body) => {
                    let Some(scram) = scram.as_mut() else { return Err(out_of_order(DURING)) };
                    scram.update(body.data()).map_err(|error| refused(&error.to_string()))?;
                    frontend::sasl_response(scram.message(), &mut self.output)
                        .map_err(cannot_write)?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    let Some(scram) = scram.as_mut() else { return Err(out_of_order(DURING)) };
                    scram.finish(body.data()).map_err(|error| refused(&error.to_string()))?;
                    server_proved = true;
                }
                Message::ErrorResponse(body) => {
                    let error = Box::new(server_error(body.fields()));
                    return Err(SourceError::Server { during: DURING, error });
                }
                Message::AuthenticationGss
                | Message::AuthenticationSspi
                | Message::AuthenticationKerberosV5
                | Message::AuthenticationScmCredential => {
                    return Err(refused(
                        "the server wants GSSAPI, SSPI or Kerberos; let pg_hba.conf use \
                         scram-sha-256, md5, password or trust for this node",
                    ));
                }
                _ => return Err(out_of_order(DURING)),
            }
        }
        self.await_ready(DURING).await
    }

    /// What follows a good log-in.
    async fn await_ready(&mut self, during: &'static str) -> Result<(), SourceError> {
        loop {
            match self.message(during).await? {
                Message::ReadyForQuery(_) => return Ok(()),
                Message::BackendKeyData(_) => {}
                Message::ErrorResponse(body) => {
                    let error = Box::new(server_error(body.fields()));
                    return Err(SourceError::Server { during, error });
                }
                _ => return Err(out_of_order(during)),
            }
        }
    }

    /// A setting that the server reported, as `server_version`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Queues a simple query.
    pub(crate) fn queue_query(&mut self, sql: &str) -> Result<(), SourceError> {
        frontend::query(sql, &mut self.output).map_err(cannot_write)
    }

    /// Queues a `CopyData` message.
    pub(crate) fn queue_copy_data(&mut self, data: &[u8]) -> Result<(), SourceError> {
        frontend::CopyData::new(data).map_err(cannot_write)?.write(&mut self.output);
        Ok(())
    }

    /// Ends our side of a copy.
    pub(crate) fn queue_copy_done(&mut self) {
        frontend::copy_done(&mut self.output);
    }

    /// Sends what is queued. Dropping the future leaves the rest queued.
    pub(crate) async fn flush(&mut self, during: &'static str) -> Result<(), SourceError> {
        let broken = |error: std::io::Error| broken(during, &error);
        while !self.output.is_empty() {
            let sent = self.stream.write(&self.output).await.map_err(broken)?;
            if sent == 0 {
                return Err(SourceError::Closed { during });
            }
            self.output.advance(sent.min(self.output.len()));
        }
        self.stream.flush().await.map_err(broken)
    }

    /// The next message, notices and parameters apart. Safe against cancellation.
    pub(crate) async fn backend(&mut self, during: &'static str) -> Result<Backend, SourceError> {
        loop {
            match take(&mut self.input, during)? {
                Some(Backend::Message(Message::NoticeResponse(body))) => {
                    let notice = server_error(body.fields());
                    tracing::info!(%notice, during, "the WAL source says");
                }
                Some(Backend::Message(Message::ParameterStatus(body))) => {
                    if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                        self.note_parameter(name, value);
                    }
                }
                Some(message) => return Ok(message),
                None => {
                    let read = self.stream.read(&mut self.scratch).await;
                    let read = read.map_err(|error| broken(during, &error))?;
                    match self.scratch.get(..read) {
                        Some(bytes) if !bytes.is_empty() => self.input.extend_from_slice(bytes),
                        _ => return Err(SourceError::Closed { during }),
                    }
                }
            }
        }
    }

    /// Keeps the one parameter that is looked at; others would be memory that the server rules.
    fn note_parameter(&mut self, name: &str, value: &str) {
        if ["server_version", "in_hot_standby"].contains(&name) {
            self.parameters.insert(name.to_owned(), value.to_owned());
        }
    }

    async fn message(&mut self, during: &'static str) -> Result<Message, SourceError> {
        match self.backend(during).await? {
            Backend::Message(message) => Ok(message),
            Backend::CopyBoth => Err(out_of_order(during)),
        }
    }

    /// Runs a query that returns rows only; several statements give several result sets. Not
    /// safe against cancellation: drop the connection then.
    pub async fn query(
        &mut self,
        sql: &str,
        during: &'static str,
    ) -> Result<Vec<ResultSet>, SourceError> {
        self.queue_query(sql)?;
        self.flush(during).await?;
        self.result_sets(during).await
    }

    /// Reads result sets up to `ReadyForQuery`.
    pub(crate) async fn result_sets(
        &mut self,
        during: &'static str,
    ) -> Result<Vec<ResultSet>, SourceError> {
        let mut sets = Vec::new();
        while let Some(set) = self.result_set(during).await? {
            sets.push(set);
            if sets.len() > SOURCE_ROWS_MAX {
                return Err(SourceError::protocol(during, "too many result sets"));
            }
        }
        Ok(sets)
    }

    /// Reads one result set; `None` at `ReadyForQuery`. After an error of the server the
    /// connection is ready for the next query, unless the server closed it.
    pub(crate) async fn result_set(
        &mut self,
        during: &'static str,
    ) -> Result<Option<ResultSet>, SourceError> {
        loop {
            match self.message(during).await? {
                Message::RowDescription(_) | Message::EmptyQueryResponse => {}
                Message::DataRow(body) => {
                    if self.partial.rows.len() >= SOURCE_ROWS_MAX {
                        return Err(SourceError::protocol(during, "too many rows"));
                    }
                    self.partial.rows.push(row(&body, during)?);
                }
                Message::CommandComplete(body) => {
                    let mut set = std::mem::take(&mut self.partial);
                    set.tag = body.tag().unwrap_or_default().to_owned();
                    return Ok(Some(set));
                }
                Message::ReadyForQuery(_) => return Ok(None),
                Message::ErrorResponse(body) => {
                    let error = Box::new(server_error(body.fields()));
                    self.partial = ResultSet::default();
                    self.skip_to_ready(during).await;
                    return Err(SourceError::Server { during, error });
                }
                _ => return Err(out_of_order(during)),
            }
        }
    }

    /// Reads up to `ReadyForQuery` or the end of the connection.
    async fn skip_to_ready(&mut self, during: &'static str) {
        while let Ok(message) = self.message(during).await {
            if matches!(message, Message::ReadyForQuery(_)) {
                return;
            }
        }
    }

    /// The next step of a copy that is under way. Safe against cancellation.
    pub(crate) async fn copy_step(
        &mut self,
        during: &'static str,
    ) -> Result<CopyStep, SourceError> {
        match self.message(during).await? {
            Message::CopyData(body) => Ok(CopyStep::Data(body.into_bytes())),
            Message::CopyDone => Ok(CopyStep::Done),
            Message::CommandComplete(_) => Ok(CopyStep::Complete),
            Message::ErrorResponse(body) => {
                let error = Box::new(server_error(body.fields()));
                Err(SourceError::Server { during, error })
            }
            _ => Err(out_of_order(during)),
        }
    }

    /// Waits for the start of a copy from the server, or to and from it.
    pub(crate) async fn copy_begin(&mut self, during: &'static str) -> Result<(), SourceError> {
        match self.backend(during).await? {
            Backend::CopyBoth | Backend::Message(Message::CopyOutResponse(_)) => Ok(()),
            Backend::Message(Message::ErrorResponse(body)) => {
                let error = Box::new(server_error(body.fields()));
                self.skip_to_ready(during).await;
                Err(SourceError::Server { during, error })
            }
            Backend::Message(_) => Err(out_of_order(during)),
        }
    }

    /// Asks the server who it is.
    pub async fn identify_system(&mut self) -> Result<SystemIdentity, SourceError> {
        const DURING: &str = "identifying the server";
        let sets = self.query("IDENTIFY_SYSTEM", DURING).await?;
        let set = sets.first().cloned().unwrap_or_default();
        Ok(SystemIdentity {
            system_id: set.parsed(0, DURING)?,
            timeline: set.parsed(1, DURING)?,
            flushed: set.parsed(2, DURING)?,
        })
    }

    /// The value of a server setting. `name` is ours, never the user's.
    pub async fn show(&mut self, name: &'static str) -> Result<String, SourceError> {
        const DURING: &str = "reading a setting of the server";
        let sets = self.query(&format!("SHOW {name}"), DURING).await?;
        Ok(sets.first().cloned().unwrap_or_default().text(0, DURING)?.to_owned())
    }

    /// Makes sure that a physical replication slot exists and keeps WAL from now on.
    pub async fn ensure_slot(&mut self, slot: &SlotName) -> Result<SlotState, SourceError> {
        if let Some(restart_lsn) = self.read_slot(slot).await? {
            return Ok(SlotState { restart_lsn, created: false });
        }
        let create = format!("CREATE_REPLICATION_SLOT \"{slot}\" PHYSICAL RESERVE_WAL");
        self.query(&create, "creating a replication slot").await?;
        let restart_lsn = self.read_slot(slot).await?.flatten();
        Ok(SlotState { restart_lsn, created: true })
    }

    /// `restart_lsn` of a physical slot; the outer `None` when there is no such slot.
    async fn read_slot(&mut self, slot: &SlotName) -> Result<Option<Option<Lsn>>, SourceError> {
        const DURING: &str = "reading a replication slot";
        let sets = self.query(&format!("READ_REPLICATION_SLOT \"{slot}\""), DURING).await?;
        let set = sets.first().cloned().unwrap_or_default();
        let column = |at: usize| set.rows.first().and_then(|row| row.get(at)).cloned().flatten();
        match (column(0), column(1)) {
            (None, _) => Ok(None),
            (Some(_), None) => Ok(Some(None)),
            (Some(_), Some(_)) => Ok(Some(Some(set.parsed(1, DURING)?))),
        }
    }

    /// Says good-bye, so that the server does not log a broken connection.
    pub async fn close(mut self) {
        frontend::terminate(&mut self.output);
        // The connection is given up either way.
        if self.flush("closing").await.is_ok() {
            drop(self.stream.close().await);
        }
    }
}

fn password(info: &ConnInfo) -> Result<&Secret, SourceError> {
    info.password.as_ref().ok_or_else(|| {
        refused("the server wants a password; add password=… to the connection string")
    })
}

fn refused(detail: &str) -> SourceError {
    SourceError::Authentication { detail: detail.to_owned() }
}

fn out_of_order(during: &'static str) -> SourceError {
    SourceError::protocol(during, "a message that does not belong here")
}

fn broken(during: &'static str, error: &std::io::Error) -> SourceError {
    SourceError::Broken { during, cause: error.to_string() }
}

fn cannot_write(error: std::io::Error) -> SourceError {
    SourceError::Invalid { what: format!("cannot write a message to the WAL source: {error}") }
}
