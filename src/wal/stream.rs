//! Takes WAL apart into records.
//!
//! A [`WalStream`] is told where it starts and is then given the bytes of the WAL from there on,
//! in pieces of any size. It checks page headers and records and gives whole records:
//!
//! 1. At a page boundary it collects and checks the page header. Before the first record it
//!    passes over the rest of a record that began earlier (`XLP_FIRST_IS_CONTRECORD`).
//! 2. It collects a record, over as many pages as it takes, checks header, chain
//!    (`xl_prev`), continuation lengths and checksum, and passes over the padding to 8 bytes.
//! 3. After `XLOG_SWITCH` it passes over the rest of the segment.
//!
//! A record is given out only when all bytes before its end LSN are there, padding included, so
//! that no end LSN lies past what was received. The end LSN is PostgreSQL's `EndRecPtr`: the
//! aligned end of the record; the page boundary if the record fills its page; the end of the
//! segment for `XLOG_SWITCH`.
//!
//! Memory grows only with the bytes received, whatever a length field says. WAL that ends in
//! zeros (a segment file that is not full) gives [`Event::EndOfWal`]; anything else that does not
//! fit is an error, after which the stream gives only that error.

use bytes::{Buf, Bytes, BytesMut};

use super::page::{LONG_HEADER, PageError, PageHeader, WalLayout};
use super::record::{self, RecordError, RecordHeader, rmgr_id};
use super::rmgr::xlog::{XLOG_OVERWRITE_CONTRECORD, XLOG_SWITCH};
use crate::base::lsn::WAL_PAGE_SIZE;
use crate::base::{Kind, Lsn};
use crate::limits::WAL_RECORD_RESERVE_BYTES;

/// A record and where it stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamRecord {
    /// Position of its first byte (`ReadRecPtr`).
    pub start: Lsn,
    /// Position after it (`EndRecPtr`): the LSN of its changes.
    pub end: Lsn,
    /// The whole record, `xl_tot_len` bytes, checksum verified.
    pub bytes: Bytes,
}

/// Bytes that a stream takes from the front of. A record that lies whole in [`Bytes`] is given out
/// as a part of them, without a copy.
pub trait Input: Buf {
    /// The first `len` bytes, which are there; they are taken.
    fn share(&mut self, len: usize) -> Bytes;
}

impl Input for Bytes {
    fn share(&mut self, len: usize) -> Bytes {
        self.split_to(len)
    }
}

impl Input for &[u8] {
    fn share(&mut self, len: usize) -> Bytes {
        self.copy_to_bytes(len)
    }
}

/// What [`WalStream::next`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A record.
    Record(StreamRecord),
    /// The input is used up.
    NeedInput,
    /// Where a record or a page should begin there are zeros. The stream went back to where the
    /// next record begins, which is [`WalStream::position`] again, and goes on from there if it
    /// is given the bytes anew.
    EndOfWal,
}

/// Why the WAL cannot be read on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StreamError {
    /// The start position cannot be that of a record.
    #[error("WAL cannot be read from {lsn}: records start at multiples of 8, not in page headers")]
    Start {
        /// The position.
        lsn: Lsn,
    },
    /// The segment size is impossible.
    #[error("{bytes} bytes is no WAL segment size; it is a power of two from 1 MiB to 1 GiB")]
    SegmentSize {
        /// The size.
        bytes: u64,
    },
    /// A page header is bad.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The PostgreSQL timeline goes back.
    #[error("the WAL page at {page} is of timeline {found}, after one of timeline {before}")]
    Timeline {
        /// The page.
        page: Lsn,
        /// Its timeline.
        found: u32,
        /// The highest timeline before.
        before: u32,
    },
    /// A record is bad.
    #[error("the WAL record at {lsn} is damaged: {error}")]
    Record {
        /// Start of the record.
        lsn: Lsn,
        /// What is wrong.
        error: RecordError,
    },
    /// A record does not follow the one before.
    #[error("the WAL record at {lsn} follows one at {found}, but the one before is at {expected}")]
    Previous {
        /// Start of the record.
        lsn: Lsn,
        /// Its `xl_prev`.
        found: Lsn,
        /// Start of the record before; the record itself where the one before is not known.
        expected: Lsn,
    },
    /// The page where a record should go on says something else.
    #[error(
        "the WAL record at {lsn} has {missing} bytes left at {page}, but the page says {rem_len}"
    )]
    Continuation {
        /// Start of the record.
        lsn: Lsn,
        /// The page where it should go on.
        page: Lsn,
        /// Bytes that the record still lacks.
        missing: u64,
        /// What the page header says; 0 if it says that no record goes on.
        rem_len: u32,
    },
    /// A page starts with the rest of a record although none is open.
    #[error("the WAL page at {page} starts with the rest of a record, but none was begun")]
    Orphan {
        /// The page.
        page: Lsn,
    },
    /// `XLOG_OVERWRITE_CONTRECORD` names another record than the one given up.
    #[error(
        "the WAL record at {lsn} takes the place of one at {found}, but that was at {expected}"
    )]
    Overwrite {
        /// Start of the record.
        lsn: Lsn,
        /// The record that it names.
        found: Lsn,
        /// The record that was given up.
        expected: Lsn,
    },
}

impl StreamError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        match self {
            StreamError::Start { .. } | StreamError::SegmentSize { .. } => Kind::Invalid,
            StreamError::Page(error) => error.kind(),
            _ => Kind::Corrupt,
        }
    }
}

/// What the next bytes are.
#[derive(Debug)]
enum State {
    /// A record, or the padding behind it.
    Record,
    /// The rest of a record that began before the start.
    Leftover {
        /// Bytes left, padding included.
        bytes: u64,
    },
    /// The rest of a segment after `XLOG_SWITCH`, which is given out behind it.
    Switched(Bytes),
    /// Nothing: WAL is bad.
    Failed(StreamError),
}

/// See the module's description.
#[derive(Debug)]
pub struct WalStream {
    layout: WalLayout,
    state: State,
    /// LSN of the next byte of input.
    position: Lsn,
    /// Where the next record begins; where reading can start again.
    boundary: Lsn,
    /// Start of the last record, if known.
    previous: Option<Lsn>,
    /// Highest timeline seen in page headers.
    timeline: u32,
    /// Bytes of the page header that is being collected.
    page_header: Vec<u8>,
    /// Start of the record that is being collected.
    start: Lsn,
    /// Bytes of the record that is being collected, without padding. Its memory is used again
    /// where the record was let go of.
    record: BytesMut,
    /// Length of the record with padding, once it is known, else 0.
    target: u64,
    /// Bytes taken of `target`.
    taken: u64,
    /// The record that was given up at the last page boundary.
    overwritten: Option<Lsn>,
}

impl WalStream {
    /// A stream from `start`: where a record begins, or a page boundary.
    pub fn new(start: Lsn, layout: WalLayout) -> Result<WalStream, StreamError> {
        if !WalLayout::valid_segment_bytes(layout.segment_bytes) {
            return Err(StreamError::SegmentSize { bytes: layout.segment_bytes });
        }
        let page = Lsn(start.0 - start.page_offset());
        let in_header = start != page && start.page_offset() < layout.header_len(page) as u64;
        if start.align() != start || in_header {
            return Err(StreamError::Start { lsn: start });
        }
        Ok(WalStream {
            layout,
            // At a page boundary the header tells whether there is anything left over.
            state: match start == page {
                true => State::Leftover { bytes: 0 },
                false => State::Record,
            },
            position: start,
            boundary: start,
            previous: None,
            timeline: 0,
            page_header: Vec::with_capacity(LONG_HEADER),
            start,
            record: BytesMut::new(),
            target: 0,
            taken: 0,
            overwritten: None,
        })
    }

    /// Also checks that the first record follows the one at `previous`.
    pub fn with_previous(mut self, previous: Lsn) -> WalStream {
        self.previous = Some(previous);
        self
    }

    /// LSN of the next byte of input.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// End of the last record given out, or the start: from here reading can start again.
    pub fn boundary(&self) -> Lsn {
        self.boundary
    }

    /// Start of the last record given out, if known: the `xl_prev` of the next one.
    pub fn previous(&self) -> Option<Lsn> {
        self.previous
    }

    /// Highest PostgreSQL timeline that a page header named; 0 before the first page header.
    pub fn timeline(&self) -> u32 {
        self.timeline
    }

    /// Takes bytes from the front of `input`, which continues the WAL at
    /// [`WalStream::position`], up to the end of the next record or of the input.
    #[allow(clippy::should_implement_trait, reason = "it is no iterator: it takes input")]
    pub fn next(&mut self, input: &mut impl Input) -> Result<Event, StreamError> {
        match self.advance(input) {
            Ok(event) => Ok(event),
            Err(error) => {
                self.state = State::Failed(error.clone());
                Err(error)
            }
        }
    }

    fn advance(&mut self, input: &mut impl Input) -> Result<Event, StreamError> {
        loop {
            if let State::Failed(error) = &self.state {
                return Err(error.clone());
            }
            if matches!(self.state, State::Switched(_)) {
                if let Some(event) = self.pass_segment(input) {
                    return Ok(event);
                }
                continue;
            }
            if !input.has_remaining() {
                return Ok(Event::NeedInput);
            }
            let at_header = self.position.page_offset() == 0 || !self.page_header.is_empty();
            let event = match (at_header, &self.state) {
                (true, _) => self.take_page_header(input)?,
                (false, State::Leftover { bytes }) => {
                    self.pass_leftover(*bytes, input);
                    None
                }
                (false, _) => self.take_record(input)?,
            };
            if let Some(event) = event {
                return Ok(event);
            }
        }
    }

    /// Moves over `max` bytes of input at most, not over the end of the page; `collect` gets them.
    fn take(&mut self, max: u64, input: &mut impl Input, mut collect: impl FnMut(&[u8])) -> u64 {
        let in_page = WAL_PAGE_SIZE - self.position.page_offset();
        let len = (max.min(in_page) as usize).min(input.chunk().len());
        collect(input.chunk().get(..len).unwrap_or_default());
        input.advance(len);
        self.position = Lsn(self.position.0.saturating_add(len as u64));
        len as u64
    }

    /// Goes back to where the next record begins.
    fn end_of_wal(&mut self) -> Event {
        self.page_header.clear();
        self.reset_record();
        if matches!(self.state, State::Leftover { .. }) {
            self.state = State::Leftover { bytes: 0 };
        }
        self.position = self.boundary;
        Event::EndOfWal
    }

    fn reset_record(&mut self) {
        self.record.clear();
        self.target = 0;
        self.taken = 0;
    }

    fn take_page_header(&mut self, input: &mut impl Input) -> Result<Option<Event>, StreamError> {
        let page = Lsn(self.position.0 - self.page_header.len() as u64);
        let missing = (self.layout.header_len(page) - self.page_header.len()) as u64;
        let mut collected = std::mem::take(&mut self.page_header);
        let taken = self.take(missing, input, |bytes| collected.extend_from_slice(bytes));
        self.page_header = collected;
        if taken < missing {
            return Ok(None);
        }
        let header = match PageHeader::parse(&self.page_header, page, &self.layout) {
            Ok(header) => header,
            Err(PageError::Zero { .. }) => return Ok(Some(self.end_of_wal())),
            Err(error) => return Err(error.into()),
        };
        self.page_header.clear();
        if header.timeline < self.timeline {
            let (found, before) = (header.timeline, self.timeline);
            return Err(StreamError::Timeline { page, found, before });
        }
        self.timeline = header.timeline;
        match self.state {
            State::Leftover { .. } => self.enter_leftover(&header),
            _ => self.continue_record(page, &header)?,
        }
        Ok(None)
    }

    /// A page header before the first record.
    fn enter_leftover(&mut self, header: &PageHeader) {
        let open = header.is_contrecord() && !header.is_overwrite_contrecord();
        let bytes = match open {
            true => Lsn(u64::from(header.rem_len)).align().0,
            false => 0,
        };
        self.pass_to_record(bytes);
    }

    /// `bytes` are left before the first record.
    fn pass_to_record(&mut self, bytes: u64) {
        self.state = match bytes {
            0 => State::Record,
            bytes => State::Leftover { bytes },
        };
    }

    fn pass_leftover(&mut self, bytes: u64, input: &mut impl Input) {
        let taken = self.take(bytes, input, |_| ());
        // Where the page ends with bytes left over, the next page header says again how many.
        self.pass_to_record(bytes.saturating_sub(taken));
        if matches!(self.state, State::Record) {
            self.boundary = self.position;
        }
    }

    /// A page header inside of a record, or between two.
    fn continue_record(&mut self, page: Lsn, header: &PageHeader) -> Result<(), StreamError> {
        let missing = self.target.saturating_sub(self.taken);
        let in_record = self.taken > 0;
        if in_record && header.is_overwrite_contrecord() {
            self.overwritten = Some(self.start);
            self.reset_record();
            self.boundary = page;
            return Ok(());
        }
        if !in_record {
            return match header.is_contrecord() {
                true => Err(StreamError::Orphan { page }),
                false => Ok(()),
            };
        }
        // The length of a record counts without its padding.
        let left = record_len(&self.record).saturating_sub(self.record.len() as u64);
        let rem_len = if header.is_contrecord() { header.rem_len } else { 0 };
        if left == 0 || u64::from(rem_len) != left {
            return Err(StreamError::Continuation { lsn: self.start, page, missing, rem_len });
        }
        Ok(())
    }

    fn take_record(&mut self, input: &mut impl Input) -> Result<Option<Event>, StreamError> {
        if self.taken == 0 {
            self.start = self.position;
            if let Some(record) = self.take_whole_record(input) {
                self.check_header(&record)?;
                return self.finish_record(record);
            }
        }
        let mut record = std::mem::take(&mut self.record);
        if self.target == 0 {
            self.taken += self.take(4 - self.taken, input, |bytes| record.extend_from_slice(bytes));
            self.record = record;
            return if self.taken < 4 { Ok(None) } else { self.begin_record() };
        }
        let had_header = record.len() >= record::HEADER;
        self.taken += self.take(self.target - self.taken, input, |bytes| {
            // The padding at the end is not part of the record.
            let data_left = record_len(&record) as usize - record.len();
            record.extend_from_slice(bytes.get(..data_left).unwrap_or(bytes));
        });
        self.record = record;
        if !had_header && self.record.len() >= record::HEADER {
            self.check_header(&self.record)?;
        }
        if self.taken < self.target {
            return Ok(None);
        }
        let record = match self.record.len() <= WAL_RECORD_RESERVE_BYTES {
            true => self.record.split(),
            // The memory of a large one is not kept.
            false => std::mem::take(&mut self.record),
        };
        self.finish_record(record.freeze())
    }

    /// The record that begins here, if it lies on this page and in the input with its padding, and
    /// its length is possible. It is not checked otherwise.
    fn take_whole_record(&mut self, input: &mut impl Input) -> Option<Bytes> {
        let rest = input.chunk();
        let len = u32::from_le_bytes(*rest.first_chunk()?);
        record::check_len(len).ok()?;
        let padded = Lsn(u64::from(len)).align().0;
        let in_page = WAL_PAGE_SIZE - self.position.page_offset();
        if padded > in_page || padded > rest.len() as u64 {
            return None;
        }
        let record = input.share(len as usize);
        input.advance(padded as usize - len as usize);
        self.position = Lsn(self.position.0.saturating_add(padded));
        Some(record)
    }

    /// The length field is there.
    fn begin_record(&mut self) -> Result<Option<Event>, StreamError> {
        let len = record_len(&self.record) as u32;
        if len == 0 {
            return Ok(Some(self.end_of_wal()));
        }
        record::check_len(len).map_err(|error| StreamError::Record { lsn: self.start, error })?;
        self.target = Lsn(u64::from(len)).align().0;
        // Most records fit. The memory is that of the one before, unless somebody kept it.
        self.record.reserve(WAL_RECORD_RESERVE_BYTES);
        Ok(None)
    }

    fn check_header(&self, record: &[u8]) -> Result<(), StreamError> {
        let lsn = self.start;
        let header =
            RecordHeader::parse(record).map_err(|error| StreamError::Record { lsn, error })?;
        let expected = self.previous.unwrap_or(lsn);
        let fits = match self.previous {
            Some(previous) => header.prev == previous,
            None => header.prev < lsn,
        };
        match fits {
            true => Ok(()),
            false => Err(StreamError::Previous { lsn, found: header.prev, expected }),
        }
    }

    fn finish_record(&mut self, record: Bytes) -> Result<Option<Event>, StreamError> {
        let lsn = self.start;
        let damaged = |error| StreamError::Record { lsn, error };
        record::check_crc(&record).map_err(damaged)?;
        let header = RecordHeader::parse(&record).map_err(damaged)?;
        if header.rmgr == rmgr_id::XLOG && header.operation() == XLOG_OVERWRITE_CONTRECORD {
            self.check_overwrite(&record)?;
        }
        self.overwritten = None;
        if header.rmgr == rmgr_id::XLOG && header.operation() == XLOG_SWITCH {
            self.reset_record();
            self.state = State::Switched(record);
            return Ok(None);
        }
        Ok(Some(self.emit(record)))
    }

    fn emit(&mut self, bytes: Bytes) -> Event {
        self.reset_record();
        self.previous = Some(self.start);
        self.boundary = self.position;
        Event::Record(StreamRecord { start: self.start, end: self.position, bytes })
    }

    /// `XLOG_OVERWRITE_CONTRECORD` names the record that was given up just before it.
    fn check_overwrite(&self, record: &[u8]) -> Result<(), StreamError> {
        // Main data of a record without block references: two bytes of header, then the data.
        let named = record.get(record::HEADER + 2..).and_then(|data| data.first_chunk());
        let found = Lsn(named.map_or(0, |chunk| u64::from_le_bytes(*chunk)));
        match self.overwritten {
            Some(expected) if found != expected => {
                Err(StreamError::Overwrite { lsn: self.start, found, expected })
            }
            _ => Ok(()),
        }
    }

    /// Passes over the rest of a segment; gives the switch record at its end.
    fn pass_segment(&mut self, input: &mut impl Input) -> Option<Event> {
        let offset = self.position.segment_offset(self.layout.segment_bytes);
        if offset != 0 {
            if !input.has_remaining() {
                return Some(Event::NeedInput);
            }
            self.take(self.layout.segment_bytes - offset, input, |_| ());
            return None;
        }
        match std::mem::replace(&mut self.state, State::Record) {
            State::Switched(record) => Some(self.emit(record)),
            _ => None,
        }
    }
}

/// `xl_tot_len` of a record of which the beginning is there, else 0.
fn record_len(record: &[u8]) -> u64 {
    let len = record.first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk));
    u64::from(len)
}

#[cfg(test)]
mod tests;
