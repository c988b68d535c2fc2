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

use bytes::{Buf, Bytes};

use super::page::{LONG_HEADER, PageError, PageHeader, WalLayout};
use super::record::{self, RecordHeader, rmgr_id};
use super::rmgr::xlog::{XLOG_OVERWRITE_CONTRECORD, XLOG_SWITCH};
use crate::base::Lsn;
use crate::base::lsn::WAL_PAGE_SIZE;
use crate::limits::WAL_RECORD_RESERVE_BYTES;

pub use error::StreamError;

/// A record and where it stands; its bytes are `Bytes` or a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamRecord<B = Bytes> {
    /// Position of its first byte (`ReadRecPtr`).
    pub start: Lsn,
    /// Position after it (`EndRecPtr`): the LSN of its changes.
    pub end: Lsn,
    /// The whole record, `xl_tot_len` bytes, checksum verified.
    pub bytes: B,
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

/// What [`WalStream::next`] and [`WalStream::next_slice`] found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event<B = Bytes> {
    /// A record.
    Record(StreamRecord<B>),
    /// The input is used up.
    NeedInput,
    /// Where a record or a page should begin there are zeros. The stream went back to where the
    /// next record begins, which is [`WalStream::position`] again, and goes on from there if it
    /// is given the bytes anew.
    EndOfWal,
}

/// Where the bytes of a record are.
enum Place {
    /// In the input, `len` bytes; so much of the input was left where it begins.
    Input { left: usize, len: usize },
    /// In `WalStream::record`.
    Collected,
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
    /// The rest of a segment after `XLOG_SWITCH`, which was collected and is given out behind it.
    Switched,
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
    /// Bytes of the record that is being collected, without padding, or of the last one that was.
    record: Vec<u8>,
    /// The record was given out.
    is_given: bool,
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
            record: Vec::new(),
            is_given: false,
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
        let whole = input.chunk();
        let mut rest = whole;
        let found = self.step(&mut rest)?;
        let (before, used) = (whole.len(), whole.len() - rest.len());
        Ok(match found {
            Event::Record(StreamRecord { start, end, bytes: Place::Input { left, len } }) => {
                let skipped = before.saturating_sub(left);
                input.advance(skipped);
                let bytes = input.share(len);
                input.advance(used.saturating_sub(skipped + len));
                Event::Record(StreamRecord { start, end, bytes })
            }
            Event::Record(StreamRecord { start, end, bytes: Place::Collected }) => {
                input.advance(used);
                let bytes = match self.record.len() <= WAL_RECORD_RESERVE_BYTES {
                    true => Bytes::copy_from_slice(&self.record),
                    false => Bytes::from(std::mem::take(&mut self.record)),
                };
                Event::Record(StreamRecord { start, end, bytes })
            }
            Event::NeedInput => {
                input.advance(used);
                Event::NeedInput
            }
            Event::EndOfWal => Event::EndOfWal,
        })
    }

    /// As [`WalStream::next`], but nothing is kept of the record, nor copied unless it lies on
    /// several pages or in several inputs.
    pub fn next_slice<'a, 'i: 'a>(
        &'a mut self,
        input: &mut &'i [u8],
    ) -> Result<Event<&'a [u8]>, StreamError> {
        let whole = *input;
        Ok(match self.step(input)? {
            Event::Record(StreamRecord { start, end, bytes }) => {
                let bytes = match bytes {
                    Place::Input { left, len } => {
                        let at = whole.len().saturating_sub(left);
                        whole.get(at..).and_then(|rest| rest.get(..len)).unwrap_or_default()
                    }
                    Place::Collected => &self.record,
                };
                Event::Record(StreamRecord { start, end, bytes })
            }
            Event::NeedInput => Event::NeedInput,
            Event::EndOfWal => Event::EndOfWal,
        })
    }

    fn step(&mut self, input: &mut &[u8]) -> Result<Event<Place>, StreamError> {
        self.forget_given();
        match self.advance(input) {
            Ok(event) => Ok(event),
            Err(error) => {
                self.state = State::Failed(error.clone());
                Err(error)
            }
        }
    }

    /// The memory of a record that was given out is for the next one, unless it is a large one's.
    fn forget_given(&mut self) {
        if std::mem::take(&mut self.is_given) {
            self.record.clear();
            if self.record.capacity() > 2 * WAL_RECORD_RESERVE_BYTES {
                self.record = Vec::new();
            }
        }
    }

    fn advance(&mut self, input: &mut &[u8]) -> Result<Event<Place>, StreamError> {
        loop {
            let at_header = self.position.page_offset() == 0 || !self.page_header.is_empty();
            let event = match &self.state {
                State::Failed(error) => return Err(error.clone()),
                State::Switched => self.pass_segment(input),
                _ if input.is_empty() => return Ok(Event::NeedInput),
                _ if at_header => self.take_page_header(input)?,
                &State::Leftover { bytes } => {
                    self.pass_leftover(bytes, input);
                    None
                }
                State::Record => self.take_record(input)?,
            };
            if let Some(event) = event {
                return Ok(event);
            }
        }
    }

    /// Moves over `max` bytes of input at most, not over the end of the page; `collect` gets them.
    fn take(&mut self, max: u64, input: &mut &[u8], mut collect: impl FnMut(&[u8])) -> u64 {
        let in_page = WAL_PAGE_SIZE - self.position.page_offset();
        let len = (max.min(in_page) as usize).min(input.len());
        let (taken, rest) = input.split_at_checked(len).unwrap_or((input, &[]));
        collect(taken);
        *input = rest;
        self.position = Lsn(self.position.0.saturating_add(len as u64));
        len as u64
    }

    /// Goes back to where the next record begins.
    fn end_of_wal(&mut self) -> Event<Place> {
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

    fn take_page_header(&mut self, input: &mut &[u8]) -> Result<Option<Event<Place>>, StreamError> {
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

    fn pass_leftover(&mut self, bytes: u64, input: &mut &[u8]) {
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

    fn take_record(&mut self, input: &mut &[u8]) -> Result<Option<Event<Place>>, StreamError> {
        if self.taken == 0 {
            self.start = self.position;
            let left = input.len();
            if let Some(record) = self.take_whole_record(input) {
                let header = self.check_header(record)?;
                return self.finish_record(
                    &header,
                    record,
                    Place::Input { left, len: record.len() },
                );
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
        let result = self.go_on(had_header, &record);
        self.record = record;
        result
    }

    /// More of a record was collected.
    fn go_on(
        &mut self,
        had_header: bool,
        record: &[u8],
    ) -> Result<Option<Event<Place>>, StreamError> {
        if !had_header && record.len() >= record::HEADER {
            self.check_header(record)?;
        }
        if self.taken < self.target {
            return Ok(None);
        }
        let header = self.parse_header(record)?;
        self.finish_record(&header, record, Place::Collected)
    }

    /// The record that begins here, if it lies on this page and in the input with its padding, and
    /// its length is possible. It is not checked otherwise.
    fn take_whole_record<'a>(&mut self, input: &mut &'a [u8]) -> Option<&'a [u8]> {
        let len = u32::from_le_bytes(*input.first_chunk()?);
        record::check_len(len).ok()?;
        let padded = Lsn(u64::from(len)).align().0;
        if padded > WAL_PAGE_SIZE - self.position.page_offset() {
            return None;
        }
        let (taken, rest) = input.split_at_checked(padded as usize)?;
        *input = rest;
        self.position = Lsn(self.position.0.saturating_add(padded));
        taken.get(..len as usize)
    }

    /// The length field is there.
    fn begin_record(&mut self) -> Result<Option<Event<Place>>, StreamError> {
        let len = record_len(&self.record) as u32;
        if len == 0 {
            return Ok(Some(self.end_of_wal()));
        }
        record::check_len(len).map_err(|error| StreamError::Record { lsn: self.start, error })?;
        self.target = Lsn(u64::from(len)).align().0;
        // Most records fit, and the memory is that of the one before.
        self.record.reserve(WAL_RECORD_RESERVE_BYTES);
        Ok(None)
    }

    fn parse_header(&self, record: &[u8]) -> Result<RecordHeader, StreamError> {
        RecordHeader::parse(record).map_err(|error| StreamError::Record { lsn: self.start, error })
    }

    fn check_header(&self, record: &[u8]) -> Result<RecordHeader, StreamError> {
        let lsn = self.start;
        let header = self.parse_header(record)?;
        let expected = self.previous.unwrap_or(lsn);
        let fits = match self.previous {
            Some(previous) => header.prev == previous,
            None => header.prev < lsn,
        };
        match fits {
            true => Ok(header),
            false => Err(StreamError::Previous { lsn, found: header.prev, expected }),
        }
    }

    fn finish_record(
        &mut self,
        header: &RecordHeader,
        record: &[u8],
        place: Place,
    ) -> Result<Option<Event<Place>>, StreamError> {
        let damaged = |error| StreamError::Record { lsn: self.start, error };
        header.check_crc(record).map_err(damaged)?;
        if header.rmgr == rmgr_id::XLOG && header.operation() == XLOG_OVERWRITE_CONTRECORD {
            self.check_overwrite(record)?;
        }
        self.overwritten = None;
        if header.rmgr == rmgr_id::XLOG && header.operation() == XLOG_SWITCH {
            if let Place::Input { .. } = place {
                self.record.extend_from_slice(record);
            }
            (self.target, self.taken) = (0, 0);
            self.state = State::Switched;
            return Ok(None);
        }
        Ok(Some(self.emit(place)))
    }

    fn emit(&mut self, bytes: Place) -> Event<Place> {
        (self.target, self.taken) = (0, 0);
        self.is_given = matches!(bytes, Place::Collected);
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
    fn pass_segment(&mut self, input: &mut &[u8]) -> Option<Event<Place>> {
        let offset = self.position.segment_offset(self.layout.segment_bytes);
        if offset != 0 {
            if input.is_empty() {
                return Some(Event::NeedInput);
            }
            self.take(self.layout.segment_bytes - offset, input, |_| ());
            return None;
        }
        self.state = State::Record;
        Some(self.emit(Place::Collected))
    }
}

/// `xl_tot_len` of a record of which the beginning is there, else 0.
fn record_len(record: &[u8]) -> u64 {
    let len = record.first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk));
    u64::from(len)
}

mod error;
#[cfg(test)]
mod tests;
