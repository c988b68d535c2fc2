//! Messages of the page service: requests of a compute, replies of the node.
//!
//! The format is that of Neon's page service, so that its clients work with this node. Each
//! message is the payload of one libpq `CopyData` message; replies come in the order of the
//! requests. All integers are big-endian. This module has both directions, because load
//! generators and tests are clients.
//!
//! Request:
//!
//! | bytes | field |
//! |---|---|
//! | 1 | tag |
//! | 8 | request id (version 3 only) |
//! | 8 | request LSN; `u64::MAX` asks for the newest version |
//! | 8 | not-modified-since LSN |
//! | | body |
//!
//! | tag | request | body |
//! |---|---|---|
//! | 0 | Exists | rel |
//! | 1 | Nblocks | rel |
//! | 2 | GetPage | rel, u32 block |
//! | 3 | DbSize | u32 database |
//! | 4 | GetSlruSegment | u8 kind (0 clog, 1 multixact members, 2 multixact offsets), u32 segment |
//!
//! `rel` is u32 tablespace, u32 database, u32 relation, u8 fork: 13 bytes.
//!
//! Reply: u8 tag, then in version 3 the echo of the request's id, LSNs and body, then the payload:
//!
//! | tag | reply | payload |
//! |---|---|---|
//! | 100 | Exists | u8, 0 or 1 |
//! | 101 | Nblocks | u32 |
//! | 102 | GetPage | 8,192 bytes |
//! | 103 | Error | UTF-8 text, closed by a NUL byte; version 3 echoes id and LSNs, not the body |
//! | 104 | DbSize | i64, bytes |
//! | 105 | GetSlruSegment | u32 number of blocks, then the blocks |
//!
//! The decoders take exactly one message; bytes left over are an error. What they accept, they
//! encode back to the same bytes: no byte of a message is ignored.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::base::key::{FORK_INIT, SLRU_PAGES_PER_SEGMENT};
use crate::base::{BlockNumber, Kind, Lsn, RelNode, RelTag, SlruKind};
use crate::shard::reader::RequestLsn;

/// Bytes of a PostgreSQL page.
pub const PAGE_BYTES: usize = 8192;

/// Bytes of a reply to GetPage beside the page, at most: `CopyData`'s type and length, tag, echo of
/// header and body.
pub const REPLY_OVERHEAD_BYTES_MAX: usize = 5 + 1 + 24 + 17;

const TAG_EXISTS: u8 = 0;
const TAG_NBLOCKS: u8 = 1;
const TAG_GET_PAGE: u8 = 2;
const TAG_DB_SIZE: u8 = 3;
const TAG_SLRU_SEGMENT: u8 = 4;
const TAG_REPLY_EXISTS: u8 = 100;
const TAG_REPLY_NBLOCKS: u8 = 101;
const TAG_REPLY_GET_PAGE: u8 = 102;
const TAG_REPLY_ERROR: u8 = 103;
const TAG_REPLY_DB_SIZE: u8 = 104;
const TAG_REPLY_SLRU_SEGMENT: u8 = 105;

/// Version of the messages, chosen by the command that opens the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// `pagestream_v2`: replies do not say which request they answer.
    V2,
    /// `pagestream_v3`: requests are numbered, replies echo them.
    V3,
}

/// Number and LSNs of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The client's number for the request; 0 in version 2.
    pub id: u64,
    /// The version wanted.
    pub lsn: RequestLsn,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Query {
    /// Does the fork exist?
    Exists {
        /// The fork.
        rel: RelTag,
    },
    /// Size of a fork in blocks.
    Nblocks {
        /// The fork.
        rel: RelTag,
    },
    /// One page.
    GetPage {
        /// The fork.
        rel: RelTag,
        /// The block.
        block: BlockNumber,
    },
    /// Size of a database in bytes.
    DbSize {
        /// OID of the database.
        db: u32,
    },
    /// A whole SLRU segment.
    GetSlruSegment {
        /// Which SLRU.
        kind: SlruKind,
        /// Number of the segment.
        segment: u32,
    },
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Number and LSNs.
    pub header: Header,
    /// What is asked for.
    pub query: Query,
}

/// What a reply says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To [`Query::Exists`].
    Exists(bool),
    /// To [`Query::Nblocks`].
    Nblocks(BlockNumber),
    /// To [`Query::GetPage`]: 8,192 bytes.
    GetPage(Bytes),
    /// To any request: why it failed. Holds no NUL character.
    Error(String),
    /// To [`Query::DbSize`], in bytes.
    DbSize(i64),
    /// To [`Query::GetSlruSegment`]: a multiple of 8,192 bytes, at most 32 pages.
    GetSlruSegment(Bytes),
}

/// A reply as a client reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Echo of the request's number and LSNs; `None` in version 2.
    pub header: Option<Header>,
    /// Echo of the request's body; `None` in version 2 and for an error.
    pub query: Option<Query>,
    /// The answer.
    pub answer: Answer,
}

/// Why some bytes are no message of the page service.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// The message ends too early.
    #[error("message of {length} bytes ends within its {field}")]
    Short {
        /// Length of the message in bytes.
        length: usize,
        /// The field that is not all there.
        field: &'static str,
    },
    /// Bytes after the end.
    #[error("{excess} bytes after the end of the message with tag {tag}")]
    Long {
        /// Tag of the message.
        tag: u8,
        /// Number of bytes too many.
        excess: usize,
    },
    /// A tag that does not exist.
    #[error("unknown message tag {tag}")]
    Tag {
        /// The tag.
        tag: u8,
    },
    /// A field with a value that it cannot have.
    #[error("{field} cannot be {value}")]
    Field {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// An error text that is not UTF-8 closed by one NUL byte.
    #[error("the error text is not UTF-8 closed by a NUL byte")]
    Text,
    /// A reply that belongs to another request.
    #[error("the reply does not belong to the request: {field} differs")]
    Mismatch {
        /// What differs.
        field: &'static str,
    },
}

impl ProtocolError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// A request that cannot be understood, and what could be read of its header.
///
/// With a header, the error can be answered and the stream goes on: framing is libpq's and still
/// intact. Without one a version-3 reply cannot be formed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed page request: {problem}")]
pub struct RequestError {
    /// Number and LSNs, where they were all there.
    pub header: Option<Header>,
    /// What is wrong.
    pub problem: ProtocolError,
}

/// Reads the fields of one message.
struct Reader<'a> {
    rest: &'a [u8],
    length: usize,
}

impl<'a> Reader<'a> {
    fn new(message: &'a [u8]) -> Self {
        Reader { rest: message, length: message.len() }
    }

    fn short(&self, field: &'static str) -> ProtocolError {
        ProtocolError::Short { length: self.length, field }
    }

    fn u8(&mut self, field: &'static str) -> Result<u8, ProtocolError> {
        self.rest.try_get_u8().map_err(|_| self.short(field))
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, ProtocolError> {
        self.rest.try_get_u32().map_err(|_| self.short(field))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, ProtocolError> {
        self.rest.try_get_u64().map_err(|_| self.short(field))
    }

    fn header(&mut self, version: Version) -> Result<Header, ProtocolError> {
        let id = match version {
            Version::V2 => 0,
            Version::V3 => self.u64("request id")?,
        };
        let request = Lsn(self.u64("request LSN")?);
        let not_modified_since = Lsn(self.u64("not-modified-since LSN")?);
        Ok(Header { id, lsn: RequestLsn { request, not_modified_since } })
    }

    fn rel(&mut self) -> Result<RelTag, ProtocolError> {
        let spc = self.u32("tablespace")?;
        let db = self.u32("database")?;
        let rel = self.u32("relation")?;
        let fork = self.u8("fork")?;
        if rel == 0 {
            return Err(ProtocolError::Field { field: "relation", value: 0 });
        }
        if fork > FORK_INIT {
            return Err(ProtocolError::Field { field: "fork", value: u64::from(fork) });
        }
        Ok(RelNode { spc, db, rel }.fork(fork))
    }

    fn query(&mut self, tag: u8) -> Result<Query, ProtocolError> {
        Ok(match tag {
            TAG_EXISTS => Query::Exists { rel: self.rel()? },
            TAG_NBLOCKS => Query::Nblocks { rel: self.rel()? },
            TAG_GET_PAGE => Query::GetPage { rel: self.rel()?, block: self.u32("block")? },
            TAG_DB_SIZE => Query::DbSize { db: self.u32("database")? },
            TAG_SLRU_SEGMENT => {
                let number = u32::from(self.u8("SLRU kind")?);
                let Some(kind) = SlruKind::from_number(number) else {
                    let value = u64::from(number);
                    return Err(ProtocolError::Field { field: "SLRU kind", value });
                };
                Query::GetSlruSegment { kind, segment: self.u32("segment")? }
            }
            tag => return Err(ProtocolError::Tag { tag }),
        })
    }

    fn end(&self, tag: u8) -> Result<(), ProtocolError> {
        match self.rest.len() {
            0 => Ok(()),
            excess => Err(ProtocolError::Long { tag, excess }),
        }
    }
}

fn put_header(version: Version, header: &Header, out: &mut BytesMut) {
    if version == Version::V3 {
        out.put_u64(header.id);
    }
    out.put_u64(header.lsn.request.0);
    out.put_u64(header.lsn.not_modified_since.0);
}

fn put_query(query: &Query, out: &mut BytesMut) {
    let put_rel = |rel: &RelTag, out: &mut BytesMut| {
        out.put_u32(rel.node.spc);
        out.put_u32(rel.node.db);
        out.put_u32(rel.node.rel);
        out.put_u8(rel.fork);
    };
    match query {
        Query::Exists { rel } | Query::Nblocks { rel } => put_rel(rel, out),
        Query::GetPage { rel, block } => {
            put_rel(rel, out);
            out.put_u32(*block);
        }
        Query::DbSize { db } => out.put_u32(*db),
        Query::GetSlruSegment { kind, segment } => {
            out.put_u8(*kind as u8);
            out.put_u32(*segment);
        }
    }
}

fn query_tag(query: &Query) -> u8 {
    match query {
        Query::Exists { .. } => TAG_EXISTS,
        Query::Nblocks { .. } => TAG_NBLOCKS,
        Query::GetPage { .. } => TAG_GET_PAGE,
        Query::DbSize { .. } => TAG_DB_SIZE,
        Query::GetSlruSegment { .. } => TAG_SLRU_SEGMENT,
    }
}

/// Can `answer` be the answer to `query`?
fn fits(query: &Query, answer: &Answer) -> bool {
    match answer {
        Answer::Exists(_) => matches!(query, Query::Exists { .. }),
        Answer::Nblocks(_) => matches!(query, Query::Nblocks { .. }),
        Answer::GetPage(_) => matches!(query, Query::GetPage { .. }),
        Answer::DbSize(_) => matches!(query, Query::DbSize { .. }),
        Answer::GetSlruSegment(_) => matches!(query, Query::GetSlruSegment { .. }),
        Answer::Error(_) => true,
    }
}

/// Appends a request to `out`. In version 2 the id is not sent.
pub fn encode_request(version: Version, request: &Request, out: &mut BytesMut) {
    out.put_u8(query_tag(&request.query));
    put_header(version, &request.header, out);
    put_query(&request.query, out);
}

/// Reads a request: the payload of one `CopyData`.
///
/// # Errors
/// The message is not well-formed; [`RequestError::header`] says whether it can be answered.
pub fn decode_request(version: Version, message: &[u8]) -> Result<Request, RequestError> {
    let mut reader = Reader::new(message);
    let no_header = |problem| RequestError { header: None, problem };
    let tag = reader.u8("tag").map_err(no_header)?;
    let header = reader.header(version).map_err(no_header)?;
    let with_header = |problem| RequestError { header: Some(header), problem };
    let query = reader.query(tag).map_err(with_header)?;
    reader.end(tag).map_err(with_header)?;
    Ok(Request { header, query })
}

/// Appends the reply to `request` to `out`.
///
/// # Panics
/// The answer is of another kind than the query, or its pages have not the length of pages: bugs
/// of the caller.
pub fn encode_response(version: Version, request: &Request, answer: &Answer, out: &mut BytesMut) {
    if let Answer::Error(text) = answer {
        return encode_error(version, &request.header, text, out);
    }
    assert!(fits(&request.query, answer), "the answer is of the query's kind");
    out.put_u8(match answer {
        Answer::Exists(_) => TAG_REPLY_EXISTS,
        Answer::Nblocks(_) => TAG_REPLY_NBLOCKS,
        Answer::GetPage(_) => TAG_REPLY_GET_PAGE,
        Answer::Error(_) => TAG_REPLY_ERROR,
        Answer::DbSize(_) => TAG_REPLY_DB_SIZE,
        Answer::GetSlruSegment(_) => TAG_REPLY_SLRU_SEGMENT,
    });
    put_echo(version, request, out);
    match answer {
        Answer::Exists(exists) => out.put_u8(u8::from(*exists)),
        Answer::Nblocks(blocks) => out.put_u32(*blocks),
        Answer::GetPage(page) => {
            assert_eq!(page.len(), PAGE_BYTES, "a page has the length of a page");
            out.put_slice(page);
        }
        Answer::Error(_) => {}
        Answer::DbSize(bytes) => out.put_i64(*bytes),
        Answer::GetSlruSegment(pages) => {
            let blocks = pages.len() / PAGE_BYTES;
            assert_eq!(pages.len() % PAGE_BYTES, 0, "a segment is whole pages");
            assert!(blocks <= SLRU_PAGES_PER_SEGMENT as usize, "a segment has at most 32 pages");
            out.put_u32(blocks as u32);
            out.put_slice(pages);
        }
    }
}

/// Appends the reply to `request`, which is for a page, to `out`, but for the page: that ends it.
pub fn encode_page_head(version: Version, request: &Request, out: &mut BytesMut) {
    out.put_u8(TAG_REPLY_GET_PAGE);
    put_echo(version, request, out);
}

fn put_echo(version: Version, request: &Request, out: &mut BytesMut) {
    if version == Version::V3 {
        put_header(version, &request.header, out);
        put_query(&request.query, out);
    }
}

/// Appends an error reply to `out`, for a request of which only the header is known. NUL
/// characters in the text, which would end it early, are left out.
pub fn encode_error(version: Version, header: &Header, text: &str, out: &mut BytesMut) {
    out.put_u8(TAG_REPLY_ERROR);
    if version == Version::V3 {
        put_header(version, header, out);
    }
    for part in text.split('\0') {
        out.put_slice(part.as_bytes());
    }
    out.put_u8(0);
}

/// Reads a reply: the payload of one `CopyData`. Page images share the message's memory.
///
/// # Errors
/// The message is not well-formed.
pub fn decode_response(version: Version, message: &Bytes) -> Result<Response, ProtocolError> {
    let mut reader = Reader::new(message);
    let tag = reader.u8("tag")?;
    let header = match version {
        Version::V2 => None,
        Version::V3 => Some(reader.header(version)?),
    };
    if tag == TAG_REPLY_ERROR {
        let (last, text) = reader.rest.split_last().ok_or(ProtocolError::Text)?;
        let text = std::str::from_utf8(text).map_err(|_| ProtocolError::Text)?;
        if *last != 0 || text.contains('\0') {
            return Err(ProtocolError::Text);
        }
        return Ok(Response { header, query: None, answer: Answer::Error(text.to_owned()) });
    }
    let query_tag = match tag {
        TAG_REPLY_EXISTS => TAG_EXISTS,
        TAG_REPLY_NBLOCKS => TAG_NBLOCKS,
        TAG_REPLY_GET_PAGE => TAG_GET_PAGE,
        TAG_REPLY_DB_SIZE => TAG_DB_SIZE,
        TAG_REPLY_SLRU_SEGMENT => TAG_SLRU_SEGMENT,
        tag => return Err(ProtocolError::Tag { tag }),
    };
    let query = match version {
        Version::V2 => None,
        Version::V3 => Some(reader.query(query_tag)?),
    };
    let answer = decode_answer(tag, &mut reader, message)?;
    reader.end(tag)?;
    Ok(Response { header, query, answer })
}

fn decode_answer(
    tag: u8,
    reader: &mut Reader<'_>,
    message: &Bytes,
) -> Result<Answer, ProtocolError> {
    let pages = |reader: &mut Reader<'_>, length: usize| {
        let bytes = reader.rest.get(..length).ok_or_else(|| reader.short("pages"))?;
        reader.rest.advance(length);
        Ok(message.slice_ref(bytes))
    };
    Ok(match tag {
        TAG_REPLY_EXISTS => match reader.u8("existence")? {
            0 => Answer::Exists(false),
            1 => Answer::Exists(true),
            other => {
                let value = u64::from(other);
                return Err(ProtocolError::Field { field: "existence", value });
            }
        },
        TAG_REPLY_NBLOCKS => Answer::Nblocks(reader.u32("number of blocks")?),
        TAG_REPLY_GET_PAGE => Answer::GetPage(pages(reader, PAGE_BYTES)?),
        TAG_REPLY_DB_SIZE => Answer::DbSize(reader.u64("database size")? as i64),
        TAG_REPLY_SLRU_SEGMENT => {
            let blocks = reader.u32("number of blocks")?;
            if blocks > SLRU_PAGES_PER_SEGMENT {
                let value = u64::from(blocks);
                return Err(ProtocolError::Field { field: "number of blocks", value });
            }
            Answer::GetSlruSegment(pages(reader, blocks as usize * PAGE_BYTES)?)
        }
        tag => return Err(ProtocolError::Tag { tag }),
    })
}

impl Response {
    /// The answer, after a check that it belongs to `request`: in version 3 by the echo, in
    /// version 2 by its kind.
    ///
    /// # Errors
    /// [`ProtocolError::Mismatch`]; the connection is then useless.
    pub fn answer_to(self, request: &Request) -> Result<Answer, ProtocolError> {
        if self.header.is_some_and(|header| header != request.header) {
            return Err(ProtocolError::Mismatch { field: "request id or LSN" });
        }
        if self.query.is_some_and(|query| query != request.query) {
            return Err(ProtocolError::Mismatch { field: "request body" });
        }
        if !fits(&request.query, &self.answer) {
            return Err(ProtocolError::Mismatch { field: "kind" });
        }
        Ok(self.answer)
    }
}

#[cfg(test)]
mod tests;
