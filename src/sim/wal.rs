//! Writes WAL as PostgreSQL 15 does, for the simulated primary: records chained by `xl_prev`,
//! with checksums, cut at pages and segments by page headers.
//!
//! Formats: `access/xlogrecord.h`, `access/xlog_internal.h`.

use crate::base::Lsn;
use crate::base::checksum::{crc32c, crc32c_append};
use crate::base::lsn::WAL_PAGE_SIZE;

const PAGE_MAGIC: u16 = 0xD110;
const FIRST_IS_CONTRECORD: u16 = 1;
const LONG_HEADER_FLAG: u16 = 2;
const SHORT_HEADER_BYTES: usize = 24;
const LONG_HEADER_BYTES: usize = 40;
const RECORD_HEADER_BYTES: usize = 24;

/// A growing WAL.
pub struct WalWriter {
    start: Lsn,
    bytes: Vec<u8>,
    previous: Lsn,
    segment_bytes: u64,
    system_id: u64,
}

impl WalWriter {
    /// A WAL that begins at `start`, a page boundary; `start` comes just before the first page
    /// header.
    pub fn new(start: Lsn, segment_bytes: u64, system_id: u64) -> Self {
        assert_eq!(start.page_offset(), 0, "the simulated WAL begins at a page");
        WalWriter { start, bytes: Vec::new(), previous: Lsn::INVALID, segment_bytes, system_id }
    }

    /// Position of the next byte.
    pub fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    /// The bytes from `from` on, at most `len`; empty at the end.
    pub fn read(&self, from: Lsn, len: usize) -> &[u8] {
        let at = (from.bytes_since(self.start) as usize).min(self.bytes.len());
        let end = (at + len).min(self.bytes.len());
        &self.bytes[at..end]
    }

    /// The record of `len` bytes that starts at `start`, without the page headers within it.
    pub fn record(&self, start: Lsn, len: usize) -> Vec<u8> {
        let mut record = Vec::with_capacity(len);
        let mut at = start;
        while record.len() < len {
            if at.page_offset() == 0 {
                let long = at.segment_offset(self.segment_bytes) == 0;
                at.0 += if long { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES } as u64;
            }
            let in_page = (WAL_PAGE_SIZE - at.page_offset()) as usize;
            let part = self.read(at, in_page.min(len - record.len()));
            record.extend_from_slice(part);
            at.0 += part.len() as u64;
        }
        record
    }

    /// Appends a record: `body` is everything behind the record header. Returns where it starts
    /// and the LSN of its changes (`EndRecPtr`).
    pub fn append(&mut self, xid: u32, info: u8, rmgr: u8, body: &[u8]) -> (Lsn, Lsn) {
        if self.end().page_offset() == 0 {
            self.page_header(0);
        }
        let start = self.end();
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + body.len());
        record.extend_from_slice(&((RECORD_HEADER_BYTES + body.len()) as u32).to_le_bytes());
        record.extend_from_slice(&xid.to_le_bytes());
        record.extend_from_slice(&self.previous.0.to_le_bytes());
        record.extend_from_slice(&[info, rmgr, 0, 0]);
        let crc = crc32c_append(crc32c(body), &record);
        record.extend_from_slice(&crc.to_le_bytes());
        record.extend_from_slice(body);
        record.resize(record.len().div_ceil(8) * 8, 0);
        let unpadded = RECORD_HEADER_BYTES + body.len();
        self.write(&record, unpadded);
        self.previous = start;
        (start, self.end())
    }

    fn write(&mut self, record: &[u8], unpadded: usize) {
        let mut done = 0;
        while done < record.len() {
            if self.end().page_offset() == 0 {
                self.page_header(unpadded.saturating_sub(done) as u32);
            }
            let room = (WAL_PAGE_SIZE - self.end().page_offset()) as usize;
            let part = room.min(record.len() - done);
            self.bytes.extend_from_slice(&record[done..done + part]);
            done += part;
        }
    }

    fn page_header(&mut self, remaining: u32) {
        let page = self.end();
        let long = page.segment_offset(self.segment_bytes) == 0;
        let mut info = if long { LONG_HEADER_FLAG } else { 0 };
        if remaining > 0 {
            info |= FIRST_IS_CONTRECORD;
        }
        let mut header = Vec::with_capacity(LONG_HEADER_BYTES);
        header.extend_from_slice(&PAGE_MAGIC.to_le_bytes());
        header.extend_from_slice(&info.to_le_bytes());
        header.extend_from_slice(&1u32.to_le_bytes());
        header.extend_from_slice(&page.0.to_le_bytes());
        header.extend_from_slice(&remaining.to_le_bytes());
        header.resize(SHORT_HEADER_BYTES, 0);
        if long {
            header.extend_from_slice(&self.system_id.to_le_bytes());
            header.extend_from_slice(&(self.segment_bytes as u32).to_le_bytes());
            header.extend_from_slice(&(WAL_PAGE_SIZE as u32).to_le_bytes());
        }
        self.bytes.extend_from_slice(&header);
    }
}

/// Builds the part of a record behind its header: block references, then main data.
#[derive(Default)]
pub struct Body {
    headers: Vec<u8>,
    data: Vec<u8>,
}

/// A block as a record names it: tablespace, database, relation, fork, block.
#[derive(Clone, Copy, Debug)]
pub struct BlockName {
    /// Tablespace, database, relation number.
    pub node: [u32; 3],
    /// Fork number.
    pub fork: u8,
    /// Block number.
    pub block: u32,
}

impl Body {
    const HAS_IMAGE: u8 = 0x10;
    const HAS_DATA: u8 = 0x20;
    const WILL_INIT: u8 = 0x40;
    const IMAGE_APPLY: u8 = 0x02;
    const MAIN_DATA_SHORT: u8 = 255;
    const MAIN_DATA_LONG: u8 = 254;

    /// Adds a block reference with data of its own.
    pub fn block(mut self, id: u8, name: BlockName, will_init: bool, data: &[u8]) -> Self {
        let mut flags = name.fork;
        if will_init {
            flags |= Self::WILL_INIT;
        }
        if !data.is_empty() {
            flags |= Self::HAS_DATA;
        }
        self.headers.extend_from_slice(&[id, flags]);
        self.headers.extend_from_slice(&(data.len() as u16).to_le_bytes());
        self.name(name);
        self.data.extend_from_slice(data);
        self
    }

    /// Adds a block reference with a full image of the page, without a hole, to be applied.
    pub fn image(mut self, id: u8, name: BlockName, page: &[u8]) -> Self {
        self.headers.extend_from_slice(&[id, name.fork | Self::HAS_IMAGE, 0, 0]);
        self.headers.extend_from_slice(&(page.len() as u16).to_le_bytes());
        self.headers.extend_from_slice(&0u16.to_le_bytes());
        self.headers.push(Self::IMAGE_APPLY);
        self.name(name);
        self.data.extend_from_slice(page);
        self
    }

    fn name(&mut self, name: BlockName) {
        for number in name.node {
            self.headers.extend_from_slice(&number.to_le_bytes());
        }
        self.headers.extend_from_slice(&name.block.to_le_bytes());
    }

    /// Adds the main data and gives the bytes.
    pub fn finish(mut self, main: &[u8]) -> Vec<u8> {
        match u8::try_from(main.len()) {
            Ok(0) => {}
            Ok(len) => self.headers.extend_from_slice(&[Self::MAIN_DATA_SHORT, len]),
            Err(_) => {
                self.headers.push(Self::MAIN_DATA_LONG);
                self.headers.extend_from_slice(&(main.len() as u32).to_le_bytes());
            }
        }
        self.headers.extend_from_slice(&self.data);
        self.headers.extend_from_slice(main);
        self.headers
    }
}
