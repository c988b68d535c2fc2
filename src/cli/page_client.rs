//! A blocking client of the page service: libpq start-up, a page stream, pipelined requests.
//!
//! Requests are numbered; replies come in the order of the requests, and each is checked against
//! the request that it echoes.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line client that blocks: no data path, nothing to simulate"
)]

use std::collections::VecDeque;
use std::io::{BufReader, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};

use bytes::{BufMut, Bytes, BytesMut};

use crate::base::{Kind, Lsn, TenantId, TimelineId};
use crate::limits::{PAGE_CLIENT_MESSAGE_BYTES_MAX, PAGE_CLIENT_TIMEOUT, VERIFY_PIPELINE_DEPTH};
use crate::server::page_protocol::{
    Answer, Header, ProtocolError, Query, Request, Version, decode_response, encode_request,
};
use crate::shard::reader::RequestLsn;

/// Why the node could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection failed.
    #[error("page service at {address}: {what}: {source}")]
    Connection {
        /// The node.
        address: String,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The node refused the connection or the command.
    #[error("the node refuses: {0}")]
    Refused(String),
    /// The node sent what the protocol does not allow.
    #[error("protocol of the page service: {0}")]
    Protocol(String),
    /// A reply could not be read or is not the request's.
    #[error(transparent)]
    Reply(#[from] ProtocolError),
}

impl ClientError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            ClientError::Connection { .. } => Kind::Retry,
            ClientError::Refused(_) => Kind::Invalid,
            ClientError::Protocol(_) => Kind::Corrupt,
            ClientError::Reply(error) => error.kind(),
        }
    }
}

/// An open page stream of one timeline.
#[derive(Debug)]
pub struct PageClient {
    address: String,
    reader: BufReader<TcpStream>,
    version: Version,
    lsn: RequestLsn,
    next_id: u64,
    unanswered: VecDeque<Request>,
    out: BytesMut,
}

impl PageClient {
    /// Connects to `address` (`host:port`) and opens a stream; all requests read at `lsn`.
    ///
    /// # Errors
    /// When the node cannot be reached, or refuses.
    pub fn connect(
        address: &str,
        tenant: TenantId,
        timeline: TimelineId,
        lsn: Lsn,
    ) -> Result<PageClient, ClientError> {
        PageClient::connect_with(address, tenant, timeline, lsn, Version::V3)
    }

    /// The same with a version of the messages.
    ///
    /// # Errors
    /// As [`PageClient::connect`].
    pub fn connect_with(
        address: &str,
        tenant: TenantId,
        timeline: TimelineId,
        lsn: Lsn,
        version: Version,
    ) -> Result<PageClient, ClientError> {
        let fail = |what| {
            let address = address.to_owned();
            move |source| ClientError::Connection { address, what, source }
        };
        let mut addresses = address.to_socket_addrs().map_err(fail("look-up"))?;
        let first = addresses
            .next()
            .ok_or_else(|| ClientError::Refused(format!("'{address}' has no address")))?;
        let stream = TcpStream::connect(first).map_err(fail("connect"))?;
        stream.set_nodelay(true).map_err(fail("connect"))?;
        stream.set_read_timeout(Some(PAGE_CLIENT_TIMEOUT)).map_err(fail("connect"))?;
        stream.set_write_timeout(Some(PAGE_CLIENT_TIMEOUT)).map_err(fail("connect"))?;
        let mut client = PageClient {
            address: address.to_owned(),
            reader: BufReader::with_capacity(1 << 18, stream),
            version,
            lsn: RequestLsn { request: lsn, not_modified_since: lsn },
            next_id: 1,
            unanswered: VecDeque::new(),
            out: BytesMut::new(),
        };
        client.start_up()?;
        let command = match version {
            Version::V2 => "pagestream_v2",
            Version::V3 => "pagestream_v3",
        };
        client.open_stream(&format!("{command} {tenant} {timeline}"))?;
        Ok(client)
    }

    fn start_up(&mut self) -> Result<(), ClientError> {
        let mut body = BytesMut::new();
        body.put_u32(3 << 16);
        body.put_slice(b"user\0pgstrata\0application_name\0pgstrata\0\0");
        self.out.put_u32(u32::try_from(body.len()).unwrap_or(0) + 4);
        self.out.put_slice(&body);
        self.send()?;
        loop {
            match self.message()? {
                (b'Z', _) => return Ok(()),
                (b'R', body) if body.starts_with(&[0, 0, 0, 0]) => {}
                (b'R', _) => {
                    return Err(ClientError::Refused("it asks for a password".to_owned()));
                }
                (b'S' | b'K' | b'N', _) => {}
                (tag, _) => return Err(unexpected(tag, "start-up")),
            }
        }
    }

    fn open_stream(&mut self, command: &str) -> Result<(), ClientError> {
        let length = command.len().saturating_add(5);
        self.out.put_u8(b'Q');
        self.out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
        self.out.put_slice(command.as_bytes());
        self.out.put_u8(0);
        self.send()?;
        match self.message()? {
            (b'W', _) => Ok(()),
            (tag, _) => Err(unexpected(tag, "the pagestream command")),
        }
    }

    /// LSN of the requests that follow.
    pub fn set_lsn(&mut self, lsn: Lsn) {
        self.lsn = RequestLsn { request: lsn, not_modified_since: lsn };
    }

    /// Both LSNs of the requests that follow.
    pub fn set_request_lsn(&mut self, lsn: RequestLsn) {
        self.lsn = lsn;
    }

    /// The socket, for who goes on by himself. Nothing may be unanswered.
    pub fn into_stream(self) -> TcpStream {
        self.reader.into_inner()
    }

    /// Queues a request. It leaves with the next [`PageClient::receive`].
    pub fn queue(&mut self, query: Query) {
        // Version 2 does not number them.
        let id = if self.version == Version::V3 { self.next_id } else { 0 };
        let request = Request { header: Header { id, lsn: self.lsn }, query };
        self.next_id = self.next_id.wrapping_add(1);
        let mut message = BytesMut::new();
        encode_request(self.version, &request, &mut message);
        self.out.put_u8(b'd');
        self.out.put_u32(u32::try_from(message.len()).unwrap_or(0) + 4);
        self.out.put_slice(&message);
        self.unanswered.push_back(request);
    }

    /// The answer to the oldest request that has none yet.
    ///
    /// # Errors
    /// When the connection is useless. An error that the node reports for the one request is an
    /// [`Answer::Error`].
    pub fn receive(&mut self) -> Result<Answer, ClientError> {
        self.send()?;
        let request = self
            .unanswered
            .pop_front()
            .ok_or_else(|| ClientError::Protocol("nothing was asked".to_owned()))?;
        match self.message()? {
            (b'd', body) => Ok(decode_response(self.version, &body)?.answer_to(&request)?),
            (tag, _) => Err(unexpected(tag, "the page stream")),
        }
    }

    /// One request and its answer.
    ///
    /// # Errors
    /// As [`PageClient::receive`].
    pub fn ask(&mut self, query: Query) -> Result<Answer, ClientError> {
        self.queue(query);
        self.receive()
    }

    /// Asks all `queries`, a bounded number at a time, and gives every answer to `take`.
    ///
    /// # Errors
    /// As [`PageClient::receive`].
    pub fn ask_all(
        &mut self,
        queries: impl IntoIterator<Item = Query>,
        mut take: impl FnMut(Query, Answer),
    ) -> Result<(), ClientError> {
        let mut queries = queries.into_iter();
        loop {
            let room = VERIFY_PIPELINE_DEPTH.saturating_sub(self.unanswered.len());
            queries.by_ref().take(room).for_each(|query| self.queue(query));
            // Half of the pipeline is drained before it is filled again: few, larger writes.
            for _ in 0..VERIFY_PIPELINE_DEPTH.div_ceil(2) {
                let Some(query) = self.unanswered.front().map(|request| request.query) else {
                    return Ok(());
                };
                let answer = self.receive()?;
                take(query, answer);
            }
        }
    }

    fn send(&mut self) -> Result<(), ClientError> {
        let result = self.reader.get_mut().write_all(&self.out);
        self.out.clear();
        result.map_err(self.failed("write"))
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(std::io::Error) -> ClientError + use<> {
        let address = self.address.clone();
        move |source| ClientError::Connection { address, what, source }
    }

    /// The next message: tag and body. An error report ends the connection.
    fn message(&mut self) -> Result<(u8, Bytes), ClientError> {
        let mut head = [0u8; 5];
        self.reader.read_exact(&mut head).map_err(self.failed("read"))?;
        let [tag, length @ ..] = head;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        let body = length
            .checked_sub(4)
            .filter(|body| *body <= PAGE_CLIENT_MESSAGE_BYTES_MAX)
            .ok_or_else(|| ClientError::Protocol(format!("a message of {length} bytes")))?;
        let mut bytes = vec![0; body];
        self.reader.read_exact(&mut bytes).map_err(self.failed("read"))?;
        if tag == b'E' {
            return Err(ClientError::Refused(error_text(&bytes)));
        }
        Ok((tag, bytes.into()))
    }
}

fn unexpected(tag: u8, place: &str) -> ClientError {
    ClientError::Protocol(format!("message '{}' in answer to {place}", tag.escape_ascii()))
}

/// The fields of an `ErrorResponse` that a human wants: severity, code, text.
fn error_text(body: &[u8]) -> String {
    body.split(|byte| *byte == 0)
        .filter_map(|field| field.split_first())
        .filter(|(tag, _)| matches!(tag, b'S' | b'C' | b'M'))
        .map(|(_, text)| String::from_utf8_lossy(text).into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
