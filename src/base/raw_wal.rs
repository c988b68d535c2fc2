//! Raw WAL in memory: pieces as they came in, out of which records are read when they are wanted.
//!
//! A record is a run of bytes of the WAL with the page headers in between left out. One that lies
//! on one page and in one piece is given out as a part of that piece, without a copy; any other is
//! put together anew each time.

use bytes::{Bytes, BytesMut};

use super::Lsn;
use super::lsn::WAL_PAGE_SIZE;
use crate::limits::{RAW_WAL_CHUNK_BYTES, RAW_WAL_SMALL_BYTES};

/// Length of the header of a WAL page, in bytes (`SizeOfXLogShortPHD`).
pub const SHORT_HEADER: usize = 24;
/// Length of the header of the first page of a WAL segment, in bytes (`SizeOfXLogLongPHD`).
pub const LONG_HEADER: usize = 40;

/// Memory that a piece takes beside its bytes.
const PIECE_OVERHEAD_BYTES: usize = size_of::<Piece>();

/// Length of the header of the WAL page that begins at `page`, in bytes.
pub fn page_header_len(page: Lsn, segment_bytes: u64) -> usize {
    if page.segment_offset(segment_bytes) == 0 { LONG_HEADER } else { SHORT_HEADER }
}

#[derive(Debug)]
struct Piece {
    start: Lsn,
    bytes: Bytes,
}

impl Piece {
    fn end(&self) -> Lsn {
        Lsn(self.start.0.saturating_add(self.bytes.len() as u64))
    }
}

/// See the module's text.
#[derive(Debug)]
pub struct RawWal {
    segment_bytes: u64,
    /// By position; none overlaps another.
    pieces: Vec<Piece>,
    /// Where small pieces are gathered: whoever sent them may hold much more memory than they take.
    chunk: BytesMut,
    memory_bytes: usize,
}

impl RawWal {
    /// No WAL yet. `segment_bytes` is the source's `wal_segment_size`; it tells which page headers
    /// are long.
    pub fn new(segment_bytes: u64) -> RawWal {
        RawWal { segment_bytes, pieces: Vec::new(), chunk: BytesMut::new(), memory_bytes: 0 }
    }

    /// Adds the WAL from `start` on. What was held from there on is given up. Gives the same bytes
    /// in the memory in which they are held.
    pub fn push(&mut self, start: Lsn, bytes: Bytes) -> Bytes {
        self.truncate(start);
        if bytes.is_empty() {
            return bytes;
        }
        let bytes = if bytes.len() < RAW_WAL_SMALL_BYTES {
            if self.chunk.capacity() - self.chunk.len() < bytes.len() {
                self.chunk = BytesMut::with_capacity(RAW_WAL_CHUNK_BYTES);
            }
            self.chunk.extend_from_slice(&bytes);
            self.chunk.split().freeze()
        } else {
            bytes
        };
        self.memory_bytes += bytes.len() + PIECE_OVERHEAD_BYTES;
        self.pieces.push(Piece { start, bytes: bytes.clone() });
        bytes
    }

    /// Gives up everything from `end` on.
    fn truncate(&mut self, end: Lsn) {
        while self.pieces.last().is_some_and(|last| last.start >= end) {
            self.pop();
        }
        if let Some(last) = self.pieces.last_mut().filter(|last| last.end() > end) {
            let kept = end.bytes_since(last.start) as usize;
            self.memory_bytes -= last.bytes.len().saturating_sub(kept);
            last.bytes.truncate(kept);
        }
    }

    fn pop(&mut self) {
        if let Some(piece) = self.pieces.pop() {
            self.memory_bytes -= piece.bytes.len() + PIECE_OVERHEAD_BYTES;
        }
    }

    /// Gives up the newest pieces as long as they lie wholly within `unused`.
    pub fn forget_newest(&mut self, unused: &std::ops::Range<Lsn>) {
        let lies_within = |piece: &Piece| unused.start <= piece.start && piece.end() <= unused.end;
        while self.pieces.last().is_some_and(lies_within) {
            self.pop();
        }
    }

    /// The same WAL from the piece on that holds the byte at `from`.
    pub fn tail(&self, from: Lsn) -> RawWal {
        let mut tail = RawWal::new(self.segment_bytes);
        for piece in self.pieces.iter().filter(|piece| piece.end() > from) {
            tail.memory_bytes += piece.bytes.len() + PIECE_OVERHEAD_BYTES;
            tail.pieces.push(Piece { start: piece.start, bytes: piece.bytes.clone() });
        }
        tail
    }

    /// Where the oldest piece begins; the highest LSN if there is none.
    pub fn start(&self) -> Lsn {
        self.pieces.first().map_or(Lsn::MAX, |piece| piece.start)
    }

    /// Memory in use, in bytes.
    pub fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// True when the bytes of `range` are there; may be false although they are, in several
    /// pieces that do not follow each other directly.
    pub fn holds(&self, start: Lsn, end: Lsn) -> bool {
        let mut end = end;
        for piece in self.pieces.iter().rev() {
            if piece.start <= start {
                return piece.end() >= end;
            }
            if piece.start < end {
                if piece.end() < end {
                    return false;
                }
                end = piece.start;
            }
        }
        start >= end
    }

    /// The record that begins at `start`, `xl_tot_len` bytes; `None` if not all of it is there.
    pub fn record(&self, start: Lsn) -> Option<Bytes> {
        let after = self.pieces.partition_point(|piece| piece.start <= start);
        let number = after.checked_sub(1)?;
        let piece = self.pieces.get(number)?;
        let at = start.bytes_since(piece.start) as usize;
        let head: Option<&[u8; 4]> = piece.bytes.get(at..).and_then(|rest| rest.first_chunk());
        if let Some(head) = head {
            let len = u32::from_le_bytes(*head) as usize;
            let end = at.saturating_add(len);
            if len as u64 <= WAL_PAGE_SIZE - start.page_offset() && end <= piece.bytes.len() {
                return Some(piece.bytes.slice(at..end));
            }
        }
        let mut head = Vec::with_capacity(4);
        self.gather(number, start, 4, &mut head)?;
        let len = u32::from_le_bytes(*head.first_chunk()?) as usize;
        // Memory for what the record says only as far as there is WAL to fill it.
        let held = self.memory_bytes.min(len);
        let mut record = Vec::with_capacity(held);
        self.gather(number, start, len, &mut record)?;
        Some(Bytes::from(record))
    }

    /// Appends `len` bytes of the WAL from `at` on, page headers left out, to `out`. `number` is
    /// that of the piece with the first one.
    fn gather(&self, mut number: usize, mut at: Lsn, len: usize, out: &mut Vec<u8>) -> Option<()> {
        let wanted = out.len().checked_add(len)?;
        while out.len() < wanted {
            if at.page_offset() == 0 {
                at = at.checked_add(page_header_len(at, self.segment_bytes) as u64)?;
            }
            let mut piece = self.pieces.get(number)?;
            while piece.end() <= at {
                number += 1;
                piece = self.pieces.get(number)?;
            }
            if piece.start > at {
                return None;
            }
            let in_page = (WAL_PAGE_SIZE - at.page_offset()) as usize;
            let rest = piece.bytes.get(at.bytes_since(piece.start) as usize..)?;
            let part = rest.get(..in_page.min(wanted - out.len()).min(rest.len()))?;
            out.extend_from_slice(part);
            at = at.checked_add(part.len() as u64)?;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 1 << 20;

    /// WAL from `start` on in which every byte tells its place, with records of these lengths, and
    /// where each begins.
    fn wal(start: u64, lens: &[usize]) -> (Vec<u8>, Vec<(Lsn, Vec<u8>)>) {
        let (mut bytes, mut records, mut salt) = (Vec::new(), Vec::new(), 0u8);
        let here = |bytes: &Vec<u8>| Lsn(start + bytes.len() as u64);
        for len in lens {
            let mut record = vec![0; *len];
            record[..4].copy_from_slice(&(*len as u32).to_le_bytes());
            for byte in &mut record[4..] {
                salt = salt.wrapping_mul(31).wrapping_add(7);
                *byte = salt;
            }
            let mut begin = None;
            for byte in &record {
                if here(&bytes).page_offset() == 0 {
                    let header = page_header_len(here(&bytes), SEGMENT);
                    bytes.resize(bytes.len() + header, 0xEE);
                }
                begin.get_or_insert(here(&bytes));
                bytes.push(*byte);
            }
            records.push((begin.unwrap(), record));
            while !here(&bytes).0.is_multiple_of(8) {
                bytes.push(0);
            }
        }
        (bytes, records)
    }

    #[test]
    fn records_come_out_whole_however_the_wal_is_cut() {
        let lens = [24, 100, 8168, 30, 20_000, 8_000, 600, 25, 31];
        let start = SEGMENT - 8192 + 24;
        let (bytes, records) = wal(start, &lens);
        for step in [1, 3, 8, 100, 4096, 9000, 70_000] {
            let mut raw = RawWal::new(SEGMENT);
            let mut at = start;
            for part in bytes.chunks(step) {
                raw.push(Lsn(at), Bytes::copy_from_slice(part));
                at += part.len() as u64;
            }
            for (begin, record) in &records {
                assert_eq!(raw.record(*begin).as_deref(), Some(&record[..]), "{step} {begin}");
            }
            assert!(raw.holds(Lsn(start), Lsn(at)), "{step}");
            assert!(!raw.holds(Lsn(start), Lsn(at + 1)) && !raw.holds(Lsn(start - 1), Lsn(at)));
            // The last record but one, and what follows it, out of the tail.
            let (begin, record) = &records[records.len() - 2];
            let tail = raw.tail(*begin);
            assert_eq!(tail.record(*begin).as_deref(), Some(&record[..]));
            assert!(tail.memory_bytes() <= raw.memory_bytes());
        }
    }

    #[test]
    fn what_is_pushed_again_replaces_what_was_there() {
        let (bytes, records) = wal(8192 * 3 + 24, &[64, 64, 64]);
        let start = records[0].0;
        let mut raw = RawWal::new(SEGMENT);
        raw.push(start, Bytes::copy_from_slice(&bytes[..100]));
        raw.push(Lsn(start.0 + 100), Bytes::from_static(&[9; 50]));
        assert_eq!(raw.record(records[2].0), None);
        raw.push(records[1].0, Bytes::copy_from_slice(&bytes[64..]));
        for (begin, record) in &records {
            assert_eq!(raw.record(*begin).as_deref(), Some(&record[..]));
        }
        assert_eq!(raw.record(Lsn(start.0 - 8)), None);
        let end = Lsn(start.0 + bytes.len() as u64);
        raw.forget_newest(&(records[1].0..end));
        assert_eq!(raw.record(records[1].0), None);
        raw.forget_newest(&(start..end));
        assert_eq!((raw.record(start), raw.memory_bytes()), (None, 0));
    }
}
