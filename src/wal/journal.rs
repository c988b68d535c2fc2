//! The journal: raw WAL on disk, synced before it is acknowledged.
//!
//! One directory per timeline holds segment files of [`JOURNAL_SEGMENT_BYTES`], named as
//! PostgreSQL names its own (timeline, log and segment number, 8 hexadecimal digits each), each byte at the offset where
//! PostgreSQL has it. A segment is preallocated with zeros, so "no record" and "end of WAL" look
//! the same here as there, and PostgreSQL's own tools read the directory. The WAL's record
//! checksums and back links guard the content; nothing is added to it.
//!
//! Algorithm:
//! 1. [`Journal::append`] takes bytes at the end of the journal, as they are, without a copy.
//! 2. [`Journal::flush`] writes everything that waits, whole blocks with zeros after the end,
//!    syncs each file it touched, and only then moves `synced_lsn`, the end of what is synced. All
//!    that arrived while a flush was under way goes with the next one: group commit.
//! 3. The block that holds the end is written again by the next flush. Its old bytes are written
//!    with the same content, so a torn write cannot damage them.
//!
//! A crash at any step leaves: every byte below `synced_lsn`, and above it any mixture of new
//! bytes and zeros, which the record checksums tell apart.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use bytes::Bytes;

use crate::base::{Kind, Lsn};
use crate::io::{ALIGNMENT, File, Io, IoCause, IoError, align_down, align_up};
use crate::limits::{JOURNAL_BUFFER_BYTES_MAX, JOURNAL_SEGMENT_BYTES, JOURNAL_WRITE_BYTES_MAX};

/// Why the journal cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Bytes that do not begin where the journal ends.
    #[error("WAL at {got} does not continue the journal, which ends at {expected}")]
    Gap {
        /// End of the journal.
        expected: Lsn,
        /// Start of the bytes.
        got: Lsn,
    },
    /// An earlier write or sync failed. What is on disk is unknown, so nothing may be
    /// acknowledged any more; the timeline must be opened anew.
    #[error("the journal failed earlier and takes no more WAL: {0}")]
    Failed(IoError),
    /// No room for what waits. Nothing is lost, nothing is acknowledged, and a later flush may
    /// succeed.
    #[error("{0}; free some, and WAL is taken in again by itself")]
    NoSpace(IoError),
    /// The device or file system.
    #[error(transparent)]
    Io(#[from] IoError),
}

/// Why bytes did not get to the disk.
enum WriteError {
    /// No room, before anything was synced: the same bytes may be written again.
    NoSpace(IoError),
    /// What is on disk is unknown.
    Failed(IoError),
}

impl From<IoError> for WriteError {
    fn from(error: IoError) -> Self {
        match error.cause {
            IoCause::NoSpace => WriteError::NoSpace(error),
            _ => WriteError::Failed(error),
        }
    }
}

impl JournalError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            JournalError::Gap { .. } | JournalError::NoSpace(_) => Kind::Retry,
            JournalError::Failed(_) => Kind::Corrupt,
            JournalError::Io(error) => error.kind(),
        }
    }
}

/// Counters of a journal.
#[derive(Clone, Copy, Debug, Default)]
pub struct JournalCounters {
    /// Syncs done.
    pub syncs: u64,
    /// Bytes written, padding and rewritten blocks included.
    pub bytes_written: u64,
}

/// The journal of one timeline. Contract: `append` from one task; `flush` from one task (they may
/// be different ones); `read` from anywhere below `synced_lsn`.
pub struct Journal<I: Io> {
    io: I,
    dir: PathBuf,
    /// PostgreSQL's timeline number, for file names.
    tli: u32,
    state: RefCell<State>,
    current: RefCell<Option<(u64, I::File)>>,
}

struct State {
    tail: Tail,
    synced: Lsn,
    failed: Option<IoError>,
    counters: JournalCounters,
}

/// Everything from the last block on that is not complete and synced.
#[derive(Default)]
struct Tail {
    /// Position of the first byte, a multiple of [`ALIGNMENT`].
    start: Lsn,
    /// One after the other.
    pieces: VecDeque<Bytes>,
    /// Of all pieces.
    len: usize,
}

impl Tail {
    fn end(&self) -> Lsn {
        Lsn(self.start.0 + self.len as u64)
    }

    fn push(&mut self, bytes: Bytes) {
        self.len += bytes.len();
        self.pieces.push_back(bytes);
    }

    /// Lets go of what is before `start`.
    fn drop_before(&mut self, start: Lsn) {
        while self.start < start {
            let Some(mut first) = self.pieces.pop_front() else { break };
            let done = first.len().min(start.bytes_since(self.start) as usize);
            let rest = first.split_off(done);
            self.start = Lsn(self.start.0 + done as u64);
            self.len -= done;
            if !rest.is_empty() {
                // Less than a block of it is kept, and it may keep much memory.
                let rest = match rest.len() < ALIGNMENT {
                    true => Bytes::copy_from_slice(&rest),
                    false => rest,
                };
                self.pieces.push_front(rest);
            }
        }
    }

    /// Fills `target` with the bytes from `from` on, and zeros where there are no more.
    fn copy_to(&self, from: Lsn, target: &mut [u8]) {
        let mut skip = from.bytes_since(self.start) as usize;
        let mut rest = target;
        for piece in &self.pieces {
            let bytes = piece.get(skip..).unwrap_or_default();
            skip = skip.saturating_sub(piece.len());
            let len = bytes.len().min(rest.len());
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(bytes.get(..len).unwrap_or_default());
            rest = later;
            if rest.is_empty() {
                return;
            }
        }
        rest.fill(0);
    }
}

impl<I: Io> Journal<I> {
    /// Opens the journal at `end`, the start of a segment for a new journal. To go on with one
    /// that has content, read it and then [`Journal::resume`].
    pub async fn open(io: I, dir: &Path, tli: u32, end: Lsn) -> Result<Self, JournalError> {
        // Syncing files in a directory says nothing about the directory's own name.
        let change = io.dir_change(dir.parent().unwrap_or(Path::new(".")));
        io.create_dir(dir).await?;
        io.sync_dir(&change).await?;
        Ok(Journal {
            io,
            dir: dir.to_owned(),
            tli,
            state: RefCell::new(State {
                tail: Tail { start: end, ..Tail::default() },
                synced: end,
                failed: None,
                counters: JournalCounters::default(),
            }),
            current: RefCell::new(None),
        })
    }

    /// Goes on at `end` after a replay of `from..end`: what lies before `end` is made durable
    /// (a killed process may have written it without a sync), what lies after is forgotten.
    pub async fn resume(&self, from: Lsn, end: Lsn) -> Result<(), JournalError> {
        let change = self.io.dir_change(&self.dir);
        let numbers =
            from.segment_number(JOURNAL_SEGMENT_BYTES)..=end.segment_number(JOURNAL_SEGMENT_BYTES);
        for number in numbers {
            match self.io.open(&self.segment_path(number)).await {
                Ok(file) => {
                    let synced = file.sync().await;
                    file.close().await?;
                    synced?;
                }
                // The segment that begins at `end` need not exist yet.
                Err(error) if error.cause == IoCause::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.io.sync_dir(&change).await?;
        let start = Lsn(align_down(end.0));
        let wanted = end.bytes_since(start) as usize;
        let block = self.read_surely(start, wanted).await?;
        let mut state = self.state.borrow_mut();
        // A journal that was cut keeps zeros for what is missing; the WAL is streamed again.
        let mut block = block.to_vec();
        block.resize(wanted, 0);
        state.tail = Tail { start, ..Tail::default() };
        state.tail.push(Bytes::from(block));
        state.synced = end;
        Ok(())
    }

    /// Reads until two reads in a row agree. What a read got wrong would be written back otherwise,
    /// over acknowledged WAL that is whole on the medium.
    async fn read_surely(&self, start: Lsn, len: usize) -> Result<Bytes, JournalError> {
        if len == 0 {
            return Ok(Bytes::new());
        }
        let mut bytes = self.read(start, len).await?;
        #[cfg(test)]
        if planted::READS_BELIEVED.get() {
            return Ok(bytes);
        }
        loop {
            let again = self.read(start, len).await?;
            if again == bytes {
                return Ok(bytes);
            }
            tracing::warn!("two reads of the journal at {start} in {} differ", self.dir.display());
            bytes = again;
        }
    }

    /// Counters since the journal was opened.
    pub fn counters(&self) -> JournalCounters {
        self.state.borrow().counters
    }

    /// True when so much waits for a flush that the source should wait too.
    pub fn is_full(&self) -> bool {
        self.state.borrow().tail.len >= JOURNAL_BUFFER_BYTES_MAX
    }

    /// True after a write or sync that failed: nothing will be taken in or flushed any more.
    pub fn has_failed(&self) -> bool {
        self.state.borrow().failed.is_some()
    }

    /// Takes bytes that begin where the last ended. They are in memory only.
    pub fn append(&self, start: Lsn, bytes: Bytes) -> Result<(), JournalError> {
        let mut state = self.state.borrow_mut();
        if let Some(error) = &state.failed {
            return Err(JournalError::Failed(error.clone()));
        }
        if start != state.tail.end() {
            return Err(JournalError::Gap { expected: state.tail.end(), got: start });
        }
        state.tail.push(bytes);
        Ok(())
    }

    /// Writes and syncs all that was appended before the call; returns the new `synced_lsn`.
    /// After an error nothing is acknowledged, and every later call fails, unless there was just
    /// no room ([`JournalError::NoSpace`]). A sync that failed is never tried again: the kernel
    /// may have dropped what it could not write, and report success the next time.
    pub async fn flush(&self) -> Result<Lsn, JournalError> {
        let (start, end) = {
            let state = self.state.borrow();
            if let Some(error) = &state.failed {
                return Err(JournalError::Failed(error.clone()));
            }
            if state.tail.end() == state.synced {
                return Ok(state.synced);
            }
            (state.tail.start, state.tail.end())
        };
        let written = self.write_range(start, end).await;
        let mut state = self.state.borrow_mut();
        match written {
            Ok(bytes_written) => {
                state.counters.syncs += 1;
                state.counters.bytes_written += bytes_written;
                state.synced = end;
                state.tail.drop_before(Lsn(align_down(end.0)));
                Ok(end)
            }
            Err(WriteError::NoSpace(error)) => Err(JournalError::NoSpace(error)),
            Err(WriteError::Failed(error)) => {
                state.failed = Some(error.clone());
                Err(error.into())
            }
        }
    }

    /// Writes and syncs `start..end` of the tail. Only a flush shortens the tail, and there is one
    /// at a time, so that the bytes stay while it waits.
    async fn write_range(&self, start: Lsn, end: Lsn) -> Result<u64, WriteError> {
        let mut at = start;
        let mut written = 0;
        while at < end {
            let offset = at.segment_offset(JOURNAL_SEGMENT_BYTES);
            let part = (JOURNAL_SEGMENT_BYTES - offset).min(end.bytes_since(at));
            let part = at..Lsn(at.0 + part);
            let file = self.take_segment(at.segment_number(JOURNAL_SEGMENT_BYTES)).await?;
            at = part.end;
            let result = self.write_part(&file, offset, part.clone()).await;
            let number = part.start.segment_number(JOURNAL_SEGMENT_BYTES);
            *self.current.borrow_mut() = Some((number, file));
            written += result?;
        }
        Ok(written)
    }

    /// Writes a part of the tail at `offset` of its segment and syncs; returns the bytes written.
    async fn write_part(
        &self,
        file: &I::File,
        mut offset: u64,
        part: std::ops::Range<Lsn>,
    ) -> Result<u64, WriteError> {
        let (mut at, mut written) = (part.start, 0);
        while at < part.end {
            let len = (part.end.bytes_since(at) as usize).min(JOURNAL_WRITE_BYTES_MAX);
            let mut buf = file.alloc_to_fill(align_up(len as u64) as usize);
            let (data, padding) = buf.split_at_mut(len);
            self.state.borrow().tail.copy_to(at, data);
            padding.fill(0);
            let len_written = buf.len() as u64;
            file.write_at(offset, buf).await?;
            written += len_written;
            offset += len_written;
            at = Lsn(at.0 + len as u64);
        }
        let synced = file.sync().await;
        #[cfg(test)]
        let synced = if planted::SYNC_ERRORS_IGNORED.get() { Ok(()) } else { synced };
        synced.map_err(WriteError::Failed)?;
        Ok(written)
    }

    /// The open file of a segment, created if need be. A new file's name and length are durable
    /// before the first byte is written to it.
    async fn take_segment(&self, number: u64) -> Result<I::File, WriteError> {
        let open = self.current.borrow_mut().take();
        if let Some((open_number, file)) = open {
            if open_number == number {
                return Ok(file);
            }
            file.close().await?;
        }
        let path = self.segment_path(number);
        match self.io.open(&path).await {
            Ok(file) => Ok(file),
            Err(error) if error.cause == IoCause::NotFound => {
                let change = self.io.dir_change(&self.dir);
                let file = self.io.create_zeroed(&path, JOURNAL_SEGMENT_BYTES).await?;
                let prepared = async {
                    file.sync().await?;
                    self.io.sync_dir(&change).await
                };
                match prepared.await {
                    Ok(()) => Ok(file),
                    Err(error) => {
                        // The first error is the one that counts.
                        let _ = file.close().await;
                        // Left there, it would be taken for one that was prepared.
                        self.io.remove(&path).await.map_err(WriteError::Failed)?;
                        Err(error.into())
                    }
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Up to `len` bytes from `start` on, within one segment; fewer where the file is shorter,
    /// none where it is missing. What is above `synced_lsn` may be zeros or rubbish.
    pub async fn read(&self, start: Lsn, len: usize) -> Result<Bytes, JournalError> {
        Ok(read_segment(&self.io, &self.dir, self.tli, start, len).await?)
    }

    /// Removes segments that lie wholly before `lsn`; returns how many.
    pub async fn remove_before(&self, lsn: Lsn) -> Result<usize, JournalError> {
        let first = lsn.segment_number(JOURNAL_SEGMENT_BYTES);
        // A flush that ended where a segment does has left that open.
        let is_over = |(number, _): &mut (u64, I::File)| *number < first;
        let over = self.current.borrow_mut().take_if(is_over);
        if let Some((_, file)) = over {
            file.close().await?;
        }
        let keep = self.segment_name(first);
        let change = self.io.dir_change(&self.dir);
        let mut removed = 0;
        for entry in self.io.list(&self.dir).await? {
            if entry.name.len() == keep.len() && entry.name < keep {
                self.io.remove(&self.dir.join(&entry.name)).await?;
                removed += 1;
            }
        }
        if removed > 0 {
            self.io.sync_dir(&change).await?;
        }
        Ok(removed)
    }

    /// Closes the open file. Not a flush.
    pub async fn close(&self) -> Result<(), JournalError> {
        let open = self.current.borrow_mut().take();
        if let Some((_, file)) = open {
            file.close().await?;
        }
        Ok(())
    }

    fn segment_path(&self, number: u64) -> PathBuf {
        self.dir.join(self.segment_name(number))
    }

    /// The name of a segment.
    pub fn segment_name(&self, number: u64) -> String {
        segment_name(self.tli, number)
    }
}

/// Bugs that the simulator must find.
#[cfg(test)]
pub(crate) mod planted {
    use std::cell::Cell;

    thread_local! {
        /// What one read says is believed: where the journal ends, and what its last block has.
        pub(crate) static READS_BELIEVED: Cell<bool> = const { Cell::new(false) };
        /// A sync that failed counts as one that succeeded.
        pub(crate) static SYNC_ERRORS_IGNORED: Cell<bool> = const { Cell::new(false) };
    }
}

/// Segments per log number: a log is 4 GiB of WAL.
const SEGMENTS_PER_LOG: u64 = (1 << 32) / JOURNAL_SEGMENT_BYTES;

/// PostgreSQL's `XLogFileName` for segments of 16 MiB.
pub fn segment_name(tli: u32, number: u64) -> String {
    format!("{tli:08X}{:08X}{:08X}", number / SEGMENTS_PER_LOG, number % SEGMENTS_PER_LOG)
}

/// PostgreSQL's timeline and the number of the segment with this name; `None` if it is no name
/// of a segment of 16 MiB.
pub fn parse_segment_name(name: &str) -> Option<(u32, u64)> {
    let number = |at: usize| u32::from_str_radix(name.get(at..at + 8)?, 16).ok();
    let (tli, log, segment) = (number(0)?, u64::from(number(8)?), u64::from(number(16)?));
    let number = log * SEGMENTS_PER_LOG + segment;
    // Only the exact printed form is a name.
    (segment_name(tli, number) == name).then_some((tli, number))
}

/// Up to `len` bytes from `start` on out of the journal in `dir`, within one segment; fewer where
/// the file is shorter, none where it is missing.
pub async fn read_segment<I: Io>(
    io: &I,
    dir: &Path,
    tli: u32,
    start: Lsn,
    len: usize,
) -> Result<Bytes, IoError> {
    let offset = start.segment_offset(JOURNAL_SEGMENT_BYTES);
    let len = (len as u64).min(JOURNAL_SEGMENT_BYTES - offset);
    let path = dir.join(segment_name(tli, start.segment_number(JOURNAL_SEGMENT_BYTES)));
    let file = match io.open(&path).await {
        Ok(file) => file,
        Err(error) if error.cause == IoCause::NotFound => return Ok(Bytes::new()),
        Err(error) => return Err(error),
    };
    let from = align_down(offset);
    let result = file.read_at(from, (align_up(offset + len) - from) as usize).await;
    file.close().await?;
    let block = result?;
    let skip = (offset - from) as usize;
    let end = block.len().min(skip + len as usize);
    Ok(Bytes::copy_from_slice(block.get(skip..end).unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::{SimOptions, SimWorld};

    /// Its space may be another file's at once.
    #[test]
    fn a_segment_is_closed_before_it_is_removed() {
        let mut world = SimWorld::new(1, SimOptions::default());
        let run = world.run(|io| async move {
            let dir = Path::new("/wal");
            io.create_dir(dir).await.unwrap();
            let start = Lsn(JOURNAL_SEGMENT_BYTES);
            let journal = Journal::open(io, dir, 1, start).await.unwrap();
            let whole = Bytes::from(vec![7; JOURNAL_SEGMENT_BYTES as usize]);
            journal.append(start, whole).unwrap();
            let end = journal.flush().await.unwrap();
            assert_eq!(end, Lsn(2 * JOURNAL_SEGMENT_BYTES));
            assert_eq!(journal.remove_before(Lsn(end.0 - 1)).await.unwrap(), 0);
            assert!(journal.current.borrow().is_some());
            assert_eq!(journal.remove_before(end).await.unwrap(), 1);
            assert!(journal.current.borrow().is_none());
            journal.close().await.unwrap();
        });
        assert_eq!(run, Ok(()), "{world}");
    }

    /// A tail gives the bytes that were put in, from any place on, and zeros behind them, before
    /// and after parts of it were let go of.
    #[test]
    fn a_tail_is_its_bytes() {
        let all: Vec<u8> = (0..30_000u32).map(|n| (n % 251) as u8).collect();
        for step in [1, 100, 4096, 5000, 30_000] {
            let mut tail = Tail { start: Lsn(8192), ..Tail::default() };
            for piece in all.chunks(step) {
                tail.push(Bytes::copy_from_slice(piece));
            }
            for kept in [0, 4096, 12_288, 28_672] {
                tail.drop_before(Lsn(8192 + kept as u64));
                assert_eq!((tail.start, tail.end()), (Lsn(8192 + kept as u64), Lsn(38_192)));
                for from in [kept, kept + 4096.min(all.len() - kept)] {
                    let mut target = vec![0xA5; 9000];
                    tail.copy_to(Lsn(8192 + from as u64), &mut target);
                    let mut expected = all[from.min(all.len())..].to_vec();
                    expected.resize(9000.max(expected.len()), 0);
                    assert_eq!(target, expected[..9000], "{step} {kept} {from}");
                }
            }
        }
    }
}
