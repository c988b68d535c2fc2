//! Hand-made WAL: every way in which pages and records are cut, and every way in which they can
//! be wrong. WAL of a real server is read in `tests/wal_real.rs`.

use proptest::prelude::*;

use super::*;
use crate::wal::page::{
    FIRST_IS_CONTRECORD, FIRST_IS_OVERWRITE_CONTRECORD, IS_LONG, MAGIC, SHORT_HEADER,
};
use crate::wal::record::RecordError;

const SEGMENT: u64 = 1 << 20;
const SYSTEM: u64 = 77;
const LAYOUT: WalLayout = WalLayout { segment_bytes: SEGMENT, system_id: Some(SYSTEM) };
const PAGE: u64 = WAL_PAGE_SIZE;

/// WAL that grows; every field can be made wrong.
struct Wal {
    start: Lsn,
    bytes: Vec<u8>,
    previous: Lsn,
    timeline: u32,
    records: Vec<StreamRecord>,
}

impl Wal {
    fn at(start: u64) -> Wal {
        let (bytes, records) = (Vec::new(), Vec::new());
        Wal { start: Lsn(start), bytes, previous: Lsn(8), timeline: 1, records }
    }

    fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.bytes.len() as u64)
    }

    fn header(&mut self, flags: u16, rem_len: u32) {
        let page = self.end();
        assert_eq!(page.page_offset(), 0);
        let is_long = page.segment_offset(SEGMENT) == 0;
        let info = flags | if is_long { IS_LONG } else { 0 };
        self.bytes.extend_from_slice(&MAGIC.to_le_bytes());
        self.bytes.extend_from_slice(&info.to_le_bytes());
        self.bytes.extend_from_slice(&self.timeline.to_le_bytes());
        self.bytes.extend_from_slice(&page.0.to_le_bytes());
        self.bytes.extend_from_slice(&rem_len.to_le_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        if is_long {
            self.bytes.extend_from_slice(&SYSTEM.to_le_bytes());
            self.bytes.extend_from_slice(&(SEGMENT as u32).to_le_bytes());
            self.bytes.extend_from_slice(&(PAGE as u32).to_le_bytes());
        }
    }

    /// A record of `len` bytes, 24 at least, that follows the last one.
    fn make(&self, info: u8, main: &[u8]) -> Vec<u8> {
        let mut record = vec![0; record::HEADER];
        if !main.is_empty() {
            record.push(254);
            record.extend_from_slice(&(main.len() as u32).to_le_bytes());
            record.extend_from_slice(main);
        }
        let len = record.len() as u32;
        record[..4].copy_from_slice(&len.to_le_bytes());
        record[4..8].copy_from_slice(&9u32.to_le_bytes());
        record[8..16].copy_from_slice(&self.previous.0.to_le_bytes());
        record[16] = info;
        seal(&mut record);
        record
    }

    /// Writes bytes of a record, with page headers where they are due. `total` is its length
    /// without padding.
    fn write(&mut self, record: &[u8]) {
        let total = record.len();
        let mut padded = record.to_vec();
        padded.resize(total.next_multiple_of(8), 0);
        let mut done = 0;
        while done < padded.len() {
            if self.end().page_offset() == 0 {
                let flags = if done > 0 { FIRST_IS_CONTRECORD } else { 0 };
                self.header(flags, if done > 0 { (total - done) as u32 } else { 0 });
            }
            let room = (PAGE - self.end().page_offset()) as usize;
            let part = room.min(padded.len() - done);
            self.bytes.extend_from_slice(&padded[done..done + part]);
            done += part;
        }
    }

    fn put(&mut self, info: u8, main: &[u8]) {
        if self.end().page_offset() == 0 {
            self.header(0, 0);
        }
        let (start, record) = (self.end(), self.make(info, main));
        self.write(&record);
        let (end, bytes) = (self.end(), Bytes::from(record));
        self.records.push(StreamRecord { start, end, bytes });
        self.previous = start;
    }

    /// A record after which `left` bytes of the page are free.
    fn put_until(&mut self, left: u64) {
        if self.end().page_offset() == 0 {
            self.header(0, 0);
        }
        let room = PAGE - self.end().page_offset();
        assert!(room > left + 40);
        self.put(0x20, &vec![3; (room - left) as usize - record::HEADER - 5]);
        assert_eq!(PAGE - self.end().page_offset(), if left == 0 { PAGE } else { left });
    }
}

fn seal(record: &mut [u8]) {
    let crc = record::checksum(record);
    record[20..24].copy_from_slice(&crc.to_le_bytes());
}

/// All records, and how it ended: at zeros (`true`), at the end of the input, or with an error.
type Read = (Vec<StreamRecord>, Result<bool, StreamError>);

fn read_pieces(mut stream: WalStream, bytes: &[u8], piece: usize) -> Read {
    let mut records = Vec::new();
    for mut input in bytes.chunks(piece) {
        loop {
            match stream.next(&mut input) {
                Ok(Event::Record(record)) => records.push(record),
                Ok(Event::NeedInput) => break,
                Ok(Event::EndOfWal) => return (records, Ok(true)),
                Err(error) => {
                    assert_eq!(stream.next(&mut &[1; 100][..]), Err(error.clone()));
                    return (records, Err(error));
                }
            }
        }
    }
    (records, Ok(false))
}

/// Reads in one piece and in small ones; all must agree.
fn read(wal: &Wal, start: Lsn) -> Read {
    let bytes = &wal.bytes[start.bytes_since(wal.start) as usize..];
    let open = || WalStream::new(start, LAYOUT).unwrap();
    let whole = read_pieces(open(), bytes, bytes.len());
    for piece in [1, 7, 24, 8191, 8193] {
        assert_eq!(read_pieces(open(), bytes, piece), whole, "in pieces of {piece}");
    }
    whole
}

fn error_of(wal: &Wal) -> StreamError {
    read(wal, wal.start).1.unwrap_err()
}

#[test]
fn records_are_found_wherever_they_are_cut() {
    for left in (0..=40).step_by(8) {
        // At the end of a page, and of a segment, which has the long header behind it.
        for start in [4 * PAGE, SEGMENT - PAGE] {
            let mut wal = Wal::at(start);
            wal.put(0x20, b"first");
            wal.put_until(left);
            // The header is cut after `left` bytes, the body goes over three pages.
            wal.put(0x20, &vec![5; 20_000]);
            wal.put(0x20, &[]);
            let (records, end) = read(&wal, wal.start);
            assert_eq!((&records, end), (&wal.records, Ok(false)), "{left} bytes left");
            let cut = &wal.records[2];
            let expected = if left == 0 { PAGE + SHORT_HEADER as u64 } else { PAGE - left };
            let long = left == 0 && (start + PAGE).is_multiple_of(SEGMENT);
            let expected = expected + if long { 16 } else { 0 };
            assert_eq!(cut.start, Lsn(start + expected));
        }
    }
}

#[test]
fn a_record_that_fills_its_page_ends_at_the_boundary() {
    let mut wal = Wal::at(2 * PAGE);
    wal.put_until(0);
    assert_eq!(wal.records[0].end, Lsn(3 * PAGE));
    let (records, end) = read(&wal, wal.start);
    assert_eq!((records, end), (wal.records.clone(), Ok(false)));
    // Padding that the end of the page cuts off from its record: there is none, since pages and
    // headers are multiples of 8; a record of odd length is given out with its padding only.
    let mut wal = Wal::at(2 * PAGE);
    wal.put(0x20, b"odd");
    let all = wal.bytes.len();
    let short = read_pieces(WalStream::new(wal.start, LAYOUT).unwrap(), &wal.bytes[..all - 1], all);
    assert_eq!(short, (Vec::new(), Ok(false)));
}

#[test]
fn the_rest_of_an_earlier_record_is_passed_over() {
    let short = PAGE - SHORT_HEADER as u64;
    for rem_len in [1, 7, 8, 100, short - 3, short, short + 1, 2 * short, 2 * short + 99] {
        let mut wal = Wal::at(5 * PAGE);
        let mut left = rem_len;
        while left > 0 {
            wal.header(FIRST_IS_CONTRECORD, left as u32);
            let part = left.min(short);
            wal.bytes.extend(std::iter::repeat_n(0xEE, part as usize));
            left -= part;
        }
        let padded = wal.bytes.len().next_multiple_of(8);
        wal.bytes.resize(padded, 0);
        wal.put(0x20, b"the first whole record");
        wal.put(0x20, &vec![6; 9000]);
        let (records, end) = read(&wal, wal.start);
        assert_eq!((records, end), (wal.records.clone(), Ok(false)), "{rem_len} bytes left over");
        // Until the first record begins, there is nowhere to start again but the start.
        let mut stream = WalStream::new(wal.start, LAYOUT).unwrap();
        let begin = wal.records[0].start.bytes_since(wal.start) as usize;
        assert_eq!(stream.next(&mut &wal.bytes[..begin]), Ok(Event::NeedInput));
        assert!(stream.boundary() <= wal.records[0].start);
    }
}

/// A record that was given up at a page boundary, and what took its place.
fn overwritten(named: impl Fn(Lsn) -> Lsn) -> (Wal, usize) {
    let mut wal = Wal::at(6 * PAGE);
    wal.put(0x20, b"before");
    wal.put_until(64);
    let lost = wal.end();
    let record = wal.make(0x20, &[4; 500]);
    wal.bytes.extend_from_slice(&record[..64]);
    wal.header(FIRST_IS_OVERWRITE_CONTRECORD, 0);
    let mut main = named(lost).0.to_le_bytes().to_vec();
    main.extend_from_slice(&[0; 8]);
    // Two bytes of header before the main data, as PostgreSQL writes short ones.
    let start = wal.end();
    let mut record = vec![0; record::HEADER];
    record.extend_from_slice(&[255, main.len() as u8]);
    record.extend_from_slice(&main);
    let len = record.len() as u32;
    record[..4].copy_from_slice(&len.to_le_bytes());
    record[8..16].copy_from_slice(&wal.previous.0.to_le_bytes());
    record[16] = XLOG_OVERWRITE_CONTRECORD;
    seal(&mut record);
    wal.write(&record);
    let (end, bytes) = (wal.end(), record.into());
    wal.records.push(StreamRecord { start, end, bytes });
    wal.previous = start;
    wal.put(0x20, b"after");
    (wal, 7 * PAGE as usize)
}

#[test]
fn a_record_that_was_given_up_is_passed_over() {
    let (wal, page) = overwritten(|lost| lost);
    let (records, end) = read(&wal, wal.start);
    assert_eq!((records, end), (wal.records.clone(), Ok(false)));
    // Reading may also begin at the page that says so.
    let (records, end) = read(&wal, Lsn(page as u64));
    assert_eq!((&records[..], end), (&wal.records[2..], Ok(false)));
    // It must name the record that was begun there.
    let (wal, _) = overwritten(|lost| Lsn(lost.0 + 8));
    let StreamError::Overwrite { found, expected, .. } = error_of(&wal) else { panic!() };
    assert_eq!(found, Lsn(expected.0 + 8));
}

#[test]
fn zeros_are_the_end_and_more_may_come() {
    for left in [0, 8, 40] {
        let mut wal = Wal::at(3 * PAGE);
        wal.put(0x20, b"one");
        wal.put_until(left);
        let end = wal.end();
        let known = wal.bytes.len();
        wal.put(0x20, &[1; 300]);
        let mut stream = WalStream::new(wal.start, LAYOUT).unwrap();
        let mut ended = wal.bytes[..known].to_vec();
        ended.resize(known + 20_000, 0);
        let mut input = &ended[..];
        for record in &wal.records[..2] {
            assert_eq!(stream.next(&mut input), Ok(Event::Record(record.clone())));
        }
        // Again and again, until something is there.
        for _ in 0..3 {
            let mut input = &ended[known..];
            assert_eq!(stream.next(&mut input), Ok(Event::EndOfWal));
            assert_eq!((stream.position(), stream.boundary()), (end, end));
        }
        let mut input = &wal.bytes[known..];
        assert_eq!(stream.next(&mut input), Ok(Event::Record(wal.records[2].clone())));
    }
    // A page of zeros in the middle of a record: the record was not written to its end.
    let mut wal = Wal::at(3 * PAGE);
    wal.put(0x20, b"one");
    let known = wal.bytes.len();
    wal.put(0x20, &vec![2; 9000]);
    let mut bytes = wal.bytes.clone();
    bytes[PAGE as usize..].fill(0);
    let mut stream = WalStream::new(wal.start, LAYOUT).unwrap();
    let mut input = &bytes[..];
    assert!(matches!(stream.next(&mut input), Ok(Event::Record(_))));
    assert_eq!(stream.next(&mut input), Ok(Event::EndOfWal));
    assert_eq!(stream.position(), Lsn(wal.start.0 + known as u64));
    let mut input = &wal.bytes[known..];
    assert_eq!(stream.next(&mut input), Ok(Event::Record(wal.records[1].clone())));
}

/// WAL over several pages, of which one byte is changed or a record made wrong.
fn sample() -> Wal {
    let mut wal = Wal::at(SEGMENT - 2 * PAGE);
    for len in [0, 100, 5000, 9000, 50, 8000] {
        wal.put(0x20, &vec![len as u8; len]);
    }
    wal
}

#[test]
fn each_wrong_page_header_is_named() {
    let page = SEGMENT - PAGE;
    let change = |at: u64, bytes: &[u8]| {
        let mut wal = sample();
        let at = (at - wal.start.0) as usize;
        wal.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        error_of(&wal)
    };
    let lsn = Lsn(page);
    assert_eq!(change(page, &[1, 1]), PageError::Magic { page: lsn, magic: 0x0101 }.into());
    assert!(matches!(change(page + 2, &[0x11, 0]), StreamError::Page(PageError::Info { .. })));
    assert_eq!(
        change(page + 8, &(page + 8192).to_le_bytes()),
        PageError::Address { page: lsn, found: Lsn(page + 8192) }.into()
    );
    let long = Lsn(SEGMENT);
    assert_eq!(
        change(SEGMENT + 24, &78u64.to_le_bytes()),
        PageError::SystemId { page: long, found: 78, expected: SYSTEM }.into()
    );
    assert!(matches!(
        change(SEGMENT + 32, &[0, 0, 0x20, 0]),
        StreamError::Page(PageError::Geometry { .. })
    ));
    // A timeline may go up, and then not down again.
    let timeline = change(SEGMENT - PAGE + 4, &[3, 0, 0, 0]);
    assert_eq!(timeline, StreamError::Timeline { page: long, found: 1, before: 3 });
    let timeline = change(SEGMENT + 4, &[0, 0, 0, 0]);
    assert_eq!(timeline, StreamError::Timeline { page: long, found: 0, before: 1 });
    // The rest of a record must be as long as it has to be.
    for wrong in [0u32, 1, 70_000] {
        let error = change(page + 16, &wrong.to_le_bytes());
        assert!(matches!(error, StreamError::Continuation { .. }), "{error}");
    }
    let error = change(page + 2, &[0, 0]);
    assert!(matches!(error, StreamError::Continuation { rem_len: 0, .. }), "{error}");
}

#[test]
fn a_rest_without_a_beginning_is_refused() {
    let mut wal = Wal::at(3 * PAGE);
    wal.put_until(0);
    wal.header(FIRST_IS_CONTRECORD, 8);
    assert_eq!(error_of(&wal), StreamError::Orphan { page: Lsn(4 * PAGE) });
}

#[test]
fn each_wrong_record_is_named() {
    let wrong = |change: fn(&mut Vec<u8>)| {
        let mut wal = Wal::at(3 * PAGE);
        wal.put(0x20, b"right");
        let (start, mut record) = (wal.end(), wal.make(0x20, &[8; 40]));
        change(&mut record);
        wal.write(&record);
        wal.put(0x20, b"behind it");
        let (records, end) = read(&wal, wal.start);
        assert_eq!(records, wal.records[..1]);
        (start, wal.records[0].start, end.unwrap_err())
    };
    let (lsn, before, error) = wrong(|record| {
        record[8..16].copy_from_slice(&0x10u64.to_le_bytes());
        seal(record);
    });
    assert_eq!(error, StreamError::Previous { lsn, found: Lsn(0x10), expected: before });
    let crc = |error| matches!(error, StreamError::Record { error: RecordError::Crc { .. }, .. });
    assert!(crc(wrong(|record| record[30] ^= 1).2));
    assert!(crc(wrong(|record| record[21] ^= 1).2));
    assert!(crc(wrong(|record| record[4] ^= 1).2));
    let (lsn, _, error) = wrong(|record| record[..4].copy_from_slice(&23u32.to_le_bytes()));
    assert_eq!(error, StreamError::Record { lsn, error: RecordError::Length { len: 23 } });
    let (_, _, error) = wrong(|record| record[..4].copy_from_slice(&u32::MAX.to_le_bytes()));
    assert!(matches!(error, StreamError::Record { error: RecordError::Length { .. }, .. }));
    let (lsn, _, error) = wrong(|record| {
        record[17] = 50;
        seal(record);
    });
    assert_eq!(error, StreamError::Record { lsn, error: RecordError::Rmgr { rmgr: 50 } });
}

#[test]
fn the_first_record_follows_an_earlier_one() {
    let mut wal = Wal::at(3 * PAGE);
    wal.previous = Lsn(3 * PAGE + SHORT_HEADER as u64);
    wal.put(0x20, b"its own predecessor");
    assert!(matches!(error_of(&wal), StreamError::Previous { .. }));
    let mut wal = Wal::at(3 * PAGE);
    wal.put(0x20, b"first");
    for (previous, fits) in [(8, true), (16, false)] {
        let stream = WalStream::new(wal.start, LAYOUT).unwrap().with_previous(Lsn(previous));
        let (_, end) = read_pieces(stream, &wal.bytes, 100);
        assert_eq!(end.is_ok(), fits);
    }
}

#[test]
fn a_switch_passes_the_rest_of_the_segment() {
    let mut wal = Wal::at(SEGMENT - 2 * PAGE);
    wal.put(0x20, b"one");
    wal.put(XLOG_SWITCH, &[]);
    wal.bytes.resize(2 * PAGE as usize, 0);
    wal.records[1].end = Lsn(SEGMENT);
    wal.put(0x20, b"in the next segment");
    let (records, end) = read(&wal, wal.start);
    assert_eq!((records, end), (wal.records.clone(), Ok(false)));
}

#[test]
fn impossible_starts_are_refused() {
    for start in [4 * PAGE + 8, 4 * PAGE + 23, 4 * PAGE + 25, SEGMENT + 24] {
        let refused = WalStream::new(Lsn(start), LAYOUT).map(|_| ());
        assert_eq!(refused, Err(StreamError::Start { lsn: Lsn(start) }));
    }
    assert!(WalStream::new(Lsn(4 * PAGE + 24), LAYOUT).is_ok());
    assert!(WalStream::new(Lsn(SEGMENT + 40), LAYOUT).is_ok());
    let layout = WalLayout { segment_bytes: 1000, system_id: None };
    let refused = WalStream::new(Lsn(0), layout).map(|_| ());
    assert_eq!(refused, Err(StreamError::SegmentSize { bytes: 1000 }));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    /// Records of any length are found in pieces of any size. With a byte changed, what is given
    /// out are records that were written, in order, and no others.
    #[test]
    fn only_written_records_come_out(
        lengths in prop::collection::vec(0usize..12_000, 1..12),
        first_page in 0u64..200,
        piece in 1usize..10_000,
        change in (any::<prop::sample::Index>(), 1u8..),
    ) {
        let mut wal = Wal::at(SEGMENT - 100 * PAGE + first_page * PAGE);
        for len in lengths {
            wal.put(0x20, &vec![len as u8; len]);
        }
        let open = || WalStream::new(wal.start, LAYOUT).unwrap();
        let right = read_pieces(open(), &wal.bytes, piece);
        prop_assert_eq!(right, (wal.records.clone(), Ok(false)));
        let mut bytes = wal.bytes.clone();
        bytes[change.0.index(wal.bytes.len())] ^= change.1;
        let (records, _) = read_pieces(open(), &bytes, piece);
        prop_assert!(wal.records.starts_with(&records));
    }
}
