//! PostgreSQL's client/server protocol, version 3, from the server's side.
//!
//! 1. [`decode_startup`] reads the packets before the session: encryption requests, cancel
//!    requests, the start-up packet (`pqcomm.h`, `ProcessStartupPacket`).
//! 2. [`decode_message`] reads the messages of the session, simple and extended queries and COPY.
//! 3. The `put_*` functions append the server's messages to a buffer.
//! 4. [`parse_command`] reads the node's commands, which clients send as query text ([`command`]).
//!
//! Both decoders take bytes off the front of a buffer once a whole packet or message is there,
//! and return `None` until then. Lengths are checked before anything is waited for, so that
//! garbage is found at once. After an error the position in the byte stream is lost and the
//! connection is of no more use.
//!
//! | bytes | start-up packet | later message |
//! |---|---|---|
//! | 1 | | type |
//! | 4 | length with itself, i32 BE | length with itself, without the type, i32 BE |
//! | 4 | protocol version or request code, u32 BE | |
//! | rest | NUL-terminated names and values, closed by a NUL | by type |

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::base::Kind;
use crate::limits::{CLIENT_MESSAGE_BYTES_MAX, STARTUP_PACKET_BYTES_MAX};

pub mod command;

pub use command::{Command, CommandError, parse_command};

const LENGTH_BYTES: usize = 4;
/// Protocol 3.0; the minor version does not matter to this server.
const PROTOCOL_MAJOR: u32 = 3;
/// Codes that stand where the protocol version would (`CANCEL_REQUEST_CODE`, …).
const CANCEL_CODE: u32 = (1234 << 16) | 5678;
const SSL_CODE: u32 = (1234 << 16) | 5679;
const GSSENC_CODE: u32 = (1234 << 16) | 5680;
/// `TEXTOID`.
const TEXT_TYPE: u32 = 25;

/// A packet before the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Startup {
    /// "May we speak TLS?"
    Ssl,
    /// "May we encrypt by GSSAPI?"
    GssEncryption,
    /// A request to cancel another session's query.
    Cancel,
    /// The start of a session.
    Session {
        /// Name and value of each parameter, as sent.
        parameters: Vec<(String, String)>,
        /// The client wants a minor version other than 0, or protocol options (`_pq_.…`): the
        /// server must say what it does not know.
        negotiate: bool,
    },
}

/// A message of the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// `Q`: a simple query.
    Query(String),
    /// `P`: a statement to prepare.
    Parse {
        /// Name of the statement; empty for the unnamed one.
        statement: String,
        /// Its text.
        query: String,
    },
    /// `B`: a portal for a statement. Parameter values are not looked at.
    Bind {
        /// Name of the portal.
        portal: String,
        /// Name of the statement.
        statement: String,
    },
    /// `D`: describe a statement or portal.
    Describe(Target),
    /// `E`: run a portal.
    Execute {
        /// Name of the portal.
        portal: String,
    },
    /// `C`: forget a statement or portal.
    Close(Target),
    /// `S`: end of an extended query.
    Sync,
    /// `H`.
    Flush,
    /// `d`: a piece of a COPY stream.
    CopyData(Bytes),
    /// `c`: end of a COPY stream.
    CopyDone,
    /// `f`: the client gives a COPY stream up, and why.
    CopyFail(String),
    /// `X`: good-bye.
    Terminate,
}

impl Message {
    /// The message's name in PostgreSQL's documentation.
    pub fn name(&self) -> &'static str {
        match self {
            Message::Query(_) => "Query",
            Message::Parse { .. } => "Parse",
            Message::Bind { .. } => "Bind",
            Message::Describe(_) => "Describe",
            Message::Execute { .. } => "Execute",
            Message::Close(_) => "Close",
            Message::Sync => "Sync",
            Message::Flush => "Flush",
            Message::CopyData(_) => "CopyData",
            Message::CopyDone => "CopyDone",
            Message::CopyFail(_) => "CopyFail",
            Message::Terminate => "Terminate",
        }
    }
}

/// A prepared statement or a portal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// `S`: the statement with this name.
    Statement(String),
    /// `P`: the portal with this name.
    Portal(String),
}

/// Why bytes are not PostgreSQL's protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PqError {
    /// A start-up packet of an impossible length.
    #[error("invalid length of startup packet: {length}")]
    StartupLength {
        /// The length that it gives itself, in bytes.
        length: u32,
    },
    /// A protocol version that this server does not speak.
    #[error("unsupported frontend protocol {major}.{minor}: server supports 3.0")]
    Version {
        /// Major version.
        major: u32,
        /// Minor version.
        minor: u32,
    },
    /// A start-up packet with broken contents.
    #[error("invalid startup packet layout: {problem}")]
    StartupLayout {
        /// What is wrong.
        problem: &'static str,
    },
    /// A message type that does not exist.
    #[error("invalid frontend message type {tag}")]
    MessageType {
        /// The type byte.
        tag: u8,
    },
    /// A message of an impossible length.
    #[error("invalid length {length} of frontend message '{}'", char::from(*tag))]
    MessageLength {
        /// The type byte.
        tag: u8,
        /// The length that it gives itself, in bytes.
        length: u32,
    },
    /// A message with broken contents.
    #[error("invalid frontend message '{}': {problem}", char::from(*tag))]
    MessageLayout {
        /// The type byte.
        tag: u8,
        /// What is wrong.
        problem: &'static str,
    },
}

impl PqError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// The next big-endian u32 of `bytes`, which stay as they are.
fn peek_u32(bytes: &[u8]) -> Option<u32> {
    bytes.first_chunk().map(|chunk| u32::from_be_bytes(*chunk))
}

/// Takes a start-up packet off the front of `buffer`; `None` when it is not all there.
///
/// # Errors
/// The bytes are no start-up packet.
pub fn decode_startup(buffer: &mut BytesMut) -> Result<Option<Startup>, PqError> {
    let Some(length) = peek_u32(buffer) else { return Ok(None) };
    let size = length as usize;
    if !(2 * LENGTH_BYTES..=STARTUP_PACKET_BYTES_MAX).contains(&size) {
        return Err(PqError::StartupLength { length });
    }
    let Some(code) = buffer.get(LENGTH_BYTES..).and_then(peek_u32) else { return Ok(None) };
    let (major, minor) = (code >> 16, code & 0xffff);
    let request = match code {
        SSL_CODE => Some(Startup::Ssl),
        GSSENC_CODE => Some(Startup::GssEncryption),
        CANCEL_CODE => Some(Startup::Cancel),
        _ if major == PROTOCOL_MAJOR => None,
        _ => return Err(PqError::Version { major, minor }),
    };
    if buffer.len() < size {
        return Ok(None);
    }
    let mut packet = buffer.split_to(size);
    packet.advance(2 * LENGTH_BYTES);
    if request.is_some() {
        return Ok(request);
    }
    let mut negotiate = minor != 0;
    let mut parameters = Vec::new();
    let mut rest: &[u8] = &packet;
    let broken = |problem| PqError::StartupLayout { problem };
    loop {
        let name = take_string(&mut rest).map_err(broken)?;
        if name.is_empty() {
            break;
        }
        negotiate |= name.starts_with("_pq_.");
        let value = take_string(&mut rest).map_err(broken)?;
        parameters.push((name, value));
    }
    if !rest.is_empty() {
        return Err(broken("expected terminator as last byte"));
    }
    Ok(Some(Startup::Session { parameters, negotiate }))
}

/// Takes a NUL-terminated string off the front of `rest`.
fn take_string(rest: &mut &[u8]) -> Result<String, &'static str> {
    let end = rest.iter().position(|byte| *byte == 0).ok_or("a text without terminator")?;
    let (text, tail) = rest.split_at_checked(end).ok_or("a text without terminator")?;
    let text = std::str::from_utf8(text).map_err(|_| "a text that is not UTF-8")?;
    *rest = tail.get(1..).unwrap_or_default();
    Ok(text.to_owned())
}

/// Takes a message off the front of `buffer`; `None` when it is not all there.
///
/// # Errors
/// The bytes are no message.
pub fn decode_message(buffer: &mut BytesMut) -> Result<Option<Message>, PqError> {
    let Some(&tag) = buffer.first() else { return Ok(None) };
    if !b"QPBDECSHdcfX".contains(&tag) {
        return Err(PqError::MessageType { tag });
    }
    let Some(length) = buffer.get(1..).and_then(peek_u32) else { return Ok(None) };
    let size = length as usize;
    if !(LENGTH_BYTES..=CLIENT_MESSAGE_BYTES_MAX).contains(&size) {
        return Err(PqError::MessageLength { tag, length });
    }
    if buffer.len() < 1 + size {
        return Ok(None);
    }
    let mut message = buffer.split_to(1 + size);
    message.advance(1 + LENGTH_BYTES);
    decode_body(tag, message.freeze())
        .map(Some)
        .map_err(|problem| PqError::MessageLayout { tag, problem })
}

/// Body of the `CopyData` message at the front of `buffer`, if that is one and is all there, and
/// what is behind it.
pub fn split_copy_data(buffer: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = buffer.strip_prefix(b"d")?;
    let size = peek_u32(rest)? as usize;
    let is_possible = (LENGTH_BYTES..=CLIENT_MESSAGE_BYTES_MAX).contains(&size);
    let (message, behind) = is_possible.then_some(rest)?.split_at_checked(size)?;
    Some((message.get(LENGTH_BYTES..)?, behind))
}

/// How many messages at the front of `buffer` are `CopyData` and all there.
pub fn copy_data_count(buffer: &[u8]) -> usize {
    let skip = |rest| split_copy_data(rest).map(|(_, behind)| behind);
    std::iter::successors(Some(buffer), |rest| skip(*rest)).count() - 1
}

fn decode_body(tag: u8, body: Bytes) -> Result<Message, &'static str> {
    if tag == b'd' {
        return Ok(Message::CopyData(body));
    }
    let mut rest: &[u8] = &body;
    let message = match tag {
        b'Q' => Message::Query(take_string(&mut rest)?),
        b'P' => {
            let statement = take_string(&mut rest)?;
            let query = take_string(&mut rest)?;
            let types = rest.try_get_u16().map_err(|_| "it ends early")?;
            let bytes = usize::from(types) * 4;
            rest = rest.get(bytes..).ok_or("it ends early")?;
            Message::Parse { statement, query }
        }
        b'B' => {
            let portal = take_string(&mut rest)?;
            let statement = take_string(&mut rest)?;
            rest = &[];
            Message::Bind { portal, statement }
        }
        b'D' => Message::Describe(take_target(&mut rest)?),
        b'C' => Message::Close(take_target(&mut rest)?),
        b'E' => {
            let portal = take_string(&mut rest)?;
            rest.try_get_u32().map_err(|_| "it ends early")?;
            Message::Execute { portal }
        }
        b'f' => Message::CopyFail(take_string(&mut rest)?),
        b'S' => Message::Sync,
        b'H' => Message::Flush,
        b'c' => Message::CopyDone,
        b'X' => Message::Terminate,
        _ => return Err("unknown type"),
    };
    if rest.is_empty() { Ok(message) } else { Err("bytes after its end") }
}

fn take_target(rest: &mut &[u8]) -> Result<Target, &'static str> {
    match rest.try_get_u8() {
        Ok(b'S') => Ok(Target::Statement(take_string(rest)?)),
        Ok(b'P') => Ok(Target::Portal(take_string(rest)?)),
        _ => Err("neither statement nor portal"),
    }
}

/// Appends a message of type `tag` whose body `put` writes.
pub fn put_message(out: &mut BytesMut, tag: u8, put: impl FnOnce(&mut BytesMut)) {
    put_message_head(out, tag, 0, put);
}

/// The same of a message of which `rest` bytes follow behind those.
pub fn put_message_head(out: &mut BytesMut, tag: u8, rest: usize, put: impl FnOnce(&mut BytesMut)) {
    out.put_u8(tag);
    let start = out.len();
    out.put_u32(0);
    put(out);
    let length = (out.len() - start + rest) as u32;
    if let Some(field) = out.get_mut(start..start + LENGTH_BYTES) {
        field.copy_from_slice(&length.to_be_bytes());
    }
}

/// The answer to a request for TLS that comes next on the connection.
pub fn put_encryption(out: &mut BytesMut) {
    out.put_u8(b'S');
}

/// The answer to a request for encryption that this server does not have.
pub fn put_no_encryption(out: &mut BytesMut) {
    out.put_u8(b'N');
}

/// `NegotiateProtocolVersion`: only 3.0, and none of the options in `parameters`.
pub fn put_negotiate_version(out: &mut BytesMut, parameters: &[(String, String)]) {
    let options = || parameters.iter().filter(|(name, _)| name.starts_with("_pq_."));
    put_message(out, b'v', |out| {
        out.put_u32(PROTOCOL_MAJOR << 16);
        out.put_u32(options().count() as u32);
        for (name, _) in options() {
            put_string(out, name);
        }
    });
}

/// What a client gets after its start-up packet where everybody is trusted: `AuthenticationOk`,
/// the parameters that drivers look for, `ReadyForQuery`.
pub fn put_welcome(out: &mut BytesMut) {
    put_message(out, b'R', |out| out.put_u32(0));
    for (name, value) in
        [("client_encoding", "UTF8"), ("integer_datetimes", "on"), ("server_version", "14.1")]
    {
        put_message(out, b'S', |out| {
            put_string(out, name);
            put_string(out, value);
        });
    }
    put_ready(out);
}

/// `ReadyForQuery`, outside a transaction.
pub fn put_ready(out: &mut BytesMut) {
    put_message(out, b'Z', |out| out.put_u8(b'I'));
}

/// `CommandComplete`.
pub fn put_command_complete(out: &mut BytesMut, tag: &str) {
    put_message(out, b'C', |out| put_string(out, tag));
}

/// `CopyBothResponse`: binary, no columns.
pub fn put_copy_both(out: &mut BytesMut) {
    put_message(out, b'W', |out| {
        out.put_u8(1);
        out.put_u16(0);
    });
}

/// `CopyOutResponse`: no columns, as PostgreSQL says it of a base backup.
pub fn put_copy_out(out: &mut BytesMut) {
    put_message(out, b'H', |out| {
        out.put_u8(0);
        out.put_u16(0);
    });
}

/// An answer without contents: `ParseComplete` (`1`), `BindComplete` (`2`), `CloseComplete` (`3`),
/// `NoData` (`n`), `EmptyQueryResponse` (`I`), `CopyDone` (`c`).
pub fn put_empty(out: &mut BytesMut, tag: u8) {
    put_message(out, tag, |_| {});
}

/// `RowDescription`: one column of type text.
pub fn put_row_description(out: &mut BytesMut, column: &str) {
    put_message(out, b'T', |out| {
        out.put_u16(1);
        put_string(out, column);
        // No table, no column of one.
        out.put_u32(0);
        out.put_u16(0);
        out.put_u32(TEXT_TYPE);
        // Of variable length (-1), without a modifier (-1), as text (0).
        out.put_i16(-1);
        out.put_i32(-1);
        out.put_u16(0);
    });
}

/// `DataRow` with one column; `None` is NULL.
pub fn put_data_row(out: &mut BytesMut, value: Option<&str>) {
    put_message(out, b'D', |out| {
        out.put_u16(1);
        match value {
            None => out.put_i32(-1),
            Some(text) => {
                out.put_u32(text.len() as u32);
                out.put_slice(text.as_bytes());
            }
        }
    });
}

/// `ParameterDescription` of a statement without parameters.
pub fn put_no_parameters(out: &mut BytesMut) {
    put_message(out, b't', |out| out.put_u16(0));
}

/// How bad an error is for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// The command failed.
    Error,
    /// The session ends.
    Fatal,
}

/// SQLSTATE of an error (`errcodes.txt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SqlState(pub &'static str);

impl SqlState {
    /// `protocol_violation`.
    pub const PROTOCOL_VIOLATION: SqlState = SqlState("08P01");
    /// `warning`.
    pub const WARNING: SqlState = SqlState("01000");
    /// `feature_not_supported`.
    pub const NOT_SUPPORTED: SqlState = SqlState("0A000");
    /// `syntax_error`.
    pub const SYNTAX_ERROR: SqlState = SqlState("42601");
    /// `undefined_object`: no such tenant or timeline.
    pub const UNDEFINED_OBJECT: SqlState = SqlState("42704");
    /// `invalid_sql_statement_name`.
    pub const UNDEFINED_STATEMENT: SqlState = SqlState("26000");
    /// `invalid_cursor_name`.
    pub const UNDEFINED_PORTAL: SqlState = SqlState("34000");
    /// `invalid_parameter_value`: an LSN that cannot be read.
    pub const INVALID_PARAMETER: SqlState = SqlState("22023");
    /// `data_corrupted`.
    pub const DATA_CORRUPTED: SqlState = SqlState("XX001");
    /// `too_many_connections`.
    pub const TOO_MANY_CONNECTIONS: SqlState = SqlState("53300");
    /// `program_limit_exceeded`.
    pub const LIMIT_EXCEEDED: SqlState = SqlState("54000");
    /// `cannot_connect_now`: the timeline is being made, or not there yet.
    pub const NOT_READY: SqlState = SqlState("57P03");
    /// `admin_shutdown`.
    pub const ADMIN_SHUTDOWN: SqlState = SqlState("57P01");
    /// `idle_session_timeout`.
    pub const IDLE_TIMEOUT: SqlState = SqlState("57P05");
    /// `internal_error`.
    pub const INTERNAL: SqlState = SqlState("XX000");
}

/// `ErrorResponse`. NUL characters in the text, which would end it early, are left out.
pub fn put_error(out: &mut BytesMut, severity: Severity, state: SqlState, text: &str) {
    let severity = match severity {
        Severity::Error => "ERROR",
        Severity::Fatal => "FATAL",
    };
    put_report(out, b'E', severity, state, text);
}

/// `NoticeResponse`: a warning beside the answer to a command.
pub fn put_warning(out: &mut BytesMut, text: &str) {
    put_report(out, b'N', "WARNING", SqlState::WARNING, text);
}

fn put_report(out: &mut BytesMut, tag: u8, severity: &str, state: SqlState, text: &str) {
    put_message(out, tag, |out| {
        for (field, value) in [(b'S', severity), (b'V', severity), (b'C', state.0), (b'M', text)] {
            out.put_u8(field);
            put_string(out, value);
        }
        out.put_u8(0);
    });
}

fn put_string(out: &mut BytesMut, text: &str) {
    for part in text.split('\0') {
        out.put_slice(part.as_bytes());
    }
    out.put_u8(0);
}

#[cfg(test)]
mod tests;
