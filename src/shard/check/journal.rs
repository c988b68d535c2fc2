//! The journal of a timeline: where it ends, why, and whether it should go on.
//!
//! WAL is followed from `disk_consistent_lsn` on as a start of the node would follow it, with every
//! page header, checksum and back link, up to what is no record. That alone does not tell damage:
//! every journal ends somewhere, and after a power loss it may end in a torn record, which is
//! right to be dropped because it was never acknowledged. So the rest of the journal is searched:
//! a whole record behind the end (its `xl_prev` lies between the end and itself, its checksum is
//! right) says that WAL was lost in between.
//!
//! Where the mark says that more was synced ([`crate::shard::journal_mark`]), no such search is
//! needed.
//!
//! A running node appends meanwhile. If the WAL, looked at once more, goes on beyond the record
//! that was found behind its end, nothing is lost.

use std::path::Path;
use std::time::Duration;

use super::report::{FileKind, FileReport};
use crate::base::Lsn;
use crate::io::{DirEntry, Io, IoCause, IoError};
use crate::layers::LayerName;
use crate::limits::{CHECK_LOOK_PAUSE_MS, JOURNAL_REPLAY_BYTES, JOURNAL_SEGMENT_BYTES};
use crate::shard::index::TimelineIndex;
use crate::shard::journal_mark;
use crate::shard::load::JOURNAL_DIR;
use crate::shard::timeline::wal_layout;
use crate::wal::journal::{parse_segment_name, read_segment, segment_name};
use crate::wal::journal_aside::parse_aside_name;
use crate::wal::page::WalLayout;
use crate::wal::record;
use crate::wal::stream::{Event, StreamError, WalStream};

/// What was found of a journal.
pub(super) struct Journal {
    /// Its files.
    pub(super) files: Vec<FileReport>,
    /// Whole records from `disk_consistent_lsn` on.
    pub(super) records: u64,
    /// Another look may find it otherwise: something was missing or damaged.
    pub(super) is_damaged: bool,
}

/// How far the WAL goes.
struct Walk {
    records: u64,
    end: Lsn,
    /// What stands at the end; `None` for zeros, or nothing.
    error: Option<StreamError>,
}

/// What is needed to read one journal.
struct Reader<'a, I: Io> {
    io: &'a I,
    dir: &'a Path,
    tli: u32,
    layout: WalLayout,
}

/// What the search for records passes over at once.
const ZEROS: [u8; 512] = [0; 512];

/// A segment file.
struct Segment {
    number: u64,
    entry: DirEntry,
}

impl Segment {
    fn start(&self) -> Lsn {
        Lsn(self.number.saturating_mul(JOURNAL_SEGMENT_BYTES))
    }

    /// LSN just after the last byte that the file has.
    fn end(&self) -> Lsn {
        Lsn(self.start().0.saturating_add(self.entry.len.min(JOURNAL_SEGMENT_BYTES)))
    }
}

/// Checks the journal of the timeline in `timeline_dir`.
///
/// # Errors
/// [`IoError`] of the first call that failed.
pub(super) async fn check<I: Io>(
    io: &I,
    timeline_dir: &Path,
    index: &TimelineIndex,
) -> Result<Journal, IoError> {
    let dir = timeline_dir.join(JOURNAL_DIR);
    let (layout, tli) = (wal_layout(&index.cluster), index.cluster.tli);
    let reader = Reader { io, dir: &dir, tli, layout };
    let from = index.disk_consistent_lsn;
    let mut files = Vec::new();
    let segments = reader.segments(from, &mut files).await?;
    // Before the journal: what it says holds for all that is read later. If the file is damaged,
    // that is said elsewhere.
    let mark = journal_mark::read(io, timeline_dir, index.timeline).await.unwrap_or_default();
    let (walk, later) = reader.follow(from, &segments).await?;
    let mut problems = Vec::new();
    if walk.end < mark {
        problems.push((walk.end, damaged_text(&walk, mark)));
    } else if let Some(later) = later {
        problems.push((walk.end, lost_text(&walk, later)));
    }
    if index.source.is_none() && walk.end < index.start_lsn {
        let text = format!(
            "the WAL ends at {}, but the base backup is consistent only from {} on, and there is \
             no primary to get the rest from; import it again",
            walk.end, index.start_lsn
        );
        problems.push((walk.end, text));
    }
    problems.extend(missing_start(index, &segments));
    for segment in &segments {
        files.push(reader.report(segment, &walk, from, &mut problems).await?);
    }
    // What belongs to no file that is there belongs to one that is missing.
    for (at, text) in problems {
        let name = segment_name(tli, at.segment_number(JOURNAL_SEGMENT_BYTES));
        files.push(FileReport::new(dir.join(name), FileKind::JournalSegment, 0).damage(text));
    }
    let is_damaged = files.iter().any(FileReport::is_damaged);
    Ok(Journal { files, records: walk.records, is_damaged })
}

impl Walk {
    /// Why it ends.
    fn cause(&self) -> String {
        match &self.error {
            Some(error) => error.to_string(),
            None => "there are zeros, or nothing".to_owned(),
        }
    }
}

/// End of the last whole record of the journal of the timeline in `timeline_dir`.
///
/// # Errors
/// [`IoError`] of the first call that failed.
pub(super) async fn end<I: Io>(
    io: &I,
    timeline_dir: &Path,
    index: &TimelineIndex,
) -> Result<Lsn, IoError> {
    let dir = timeline_dir.join(JOURNAL_DIR);
    let (layout, tli) = (wal_layout(&index.cluster), index.cluster.tli);
    let reader = Reader { io, dir: &dir, tli, layout };
    Ok(reader.walk(index.disk_consistent_lsn, None).await?.end)
}

fn damaged_text(walk: &Walk, mark: Lsn) -> String {
    let (end, cause) = (walk.end, walk.cause());
    format!(
        "the WAL breaks off at {end} ({cause}), but it was synced, and perhaps acknowledged, up to \
         {mark}. The next start of the node keeps what is left behind {end} and asks the source \
         for the WAL again; if the source has it no more, it is lost"
    )
}

fn lost_text(walk: &Walk, later: Lsn) -> String {
    let (end, cause) = (walk.end, walk.cause());
    format!(
        "the WAL breaks off at {end} ({cause}), but a whole record stands behind it, at {later}. If \
         the power failed since the node last ran, that record was never acknowledged and the node \
         gets it again from its source; otherwise WAL from {end} on is lost"
    )
}

/// The segment where the WAL begins must be there once a checkpoint was made from it.
fn missing_start(index: &TimelineIndex, segments: &[Segment]) -> Option<(Lsn, String)> {
    let from = index.disk_consistent_lsn;
    let is_delta = |name: &str| name.parse().is_ok_and(|name: LayerName| name.is_delta());
    let has_deltas = index.layers.iter().any(|layer| is_delta(&layer.name));
    let is_there = segments.iter().any(|one| (one.start()..=one.end()).contains(&from));
    let needed = has_deltas && from.segment_offset(JOURNAL_SEGMENT_BYTES) != 0;
    (needed && !is_there).then(|| {
        let text = format!(
            "the segment that holds {from}, where the journal begins, is missing or cut off: what \
             was written after {from} is lost"
        );
        (from, text)
    })
}

impl<I: Io> Reader<'_, I> {
    /// The segments that the node reads, in order. All other entries are reported right away.
    async fn segments(
        &self,
        from: Lsn,
        files: &mut Vec<FileReport>,
    ) -> Result<Vec<Segment>, IoError> {
        let entries = match self.io.list(self.dir).await {
            // It is made when the timeline is opened for the first time.
            Err(error) if error.cause == IoCause::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let first = from.segment_number(JOURNAL_SEGMENT_BYTES);
        let mut segments = Vec::new();
        for entry in entries {
            let path = self.dir.join(&entry.name);
            match parse_segment_name(&entry.name) {
                Some((tli, number)) if tli == self.tli && !entry.is_dir => {
                    if number >= first {
                        segments.push(Segment { number, entry });
                        continue;
                    }
                    let note = "everything in it is in layers; the next checkpoint removes it";
                    files.push(FileReport::new(path, FileKind::Leftover, entry.len).note(note));
                }
                _ => {
                    if let Some(lsn) = parse_aside_name(&entry.name) {
                        let note = format!(
                            "the journal was damaged at {lsn}, and this is what it had; nobody \
                             needs it once the timeline has passed that WAL"
                        );
                        files.push(FileReport::new(path, FileKind::Leftover, entry.len).note(note));
                        continue;
                    }
                    let note = format!("it is no segment of PostgreSQL's timeline {}", self.tli);
                    files.push(FileReport::new(path, FileKind::Unknown, entry.len).note(note));
                }
            }
        }
        Ok(segments)
    }

    /// Follows the WAL to its end. Also gives a record behind the end, if there is one: then WAL
    /// is missing in between.
    async fn follow(
        &self,
        from: Lsn,
        segments: &[Segment],
    ) -> Result<(Walk, Option<Lsn>), IoError> {
        let mut walk = self.walk(from, None).await?;
        let mut later = self.later(walk.end, segments).await?;
        if let Some(found) = later {
            self.io.sleep(Duration::from_millis(CHECK_LOOK_PAUSE_MS)).await;
            let more = self.walk(walk.end, walk.error.take()).await?;
            let records = walk.records.saturating_add(more.records);
            walk = Walk { records, ..more };
            later = match walk.end > found {
                // The node has just written it; nothing is missing up to there.
                true => None,
                false => self.later(walk.end, segments).await?,
            };
        }
        Ok((walk, later))
    }

    /// Reads records from `from` on. A place where no record can begin is where it ends at once.
    async fn walk(&self, from: Lsn, known: Option<StreamError>) -> Result<Walk, IoError> {
        let mut stream = match WalStream::new(from, self.layout) {
            Ok(stream) => stream,
            Err(error) => return Ok(Walk { records: 0, end: from, error: known.or(Some(error)) }),
        };
        let (mut at, mut records) = (from, 0u64);
        let error = 'end: loop {
            let bytes = read_segment(self.io, self.dir, self.tli, at, JOURNAL_REPLAY_BYTES).await?;
            at = Lsn(at.0.saturating_add(bytes.len() as u64));
            let mut input = &bytes[..];
            loop {
                match stream.next(&mut input) {
                    Ok(Event::Record(_)) => records += 1,
                    Ok(Event::NeedInput) if !bytes.is_empty() => break,
                    Ok(Event::NeedInput | Event::EndOfWal) => break 'end None,
                    Err(error) => break 'end Some(error),
                }
            }
        };
        Ok(Walk { records, end: stream.boundary(), error })
    }

    /// The first whole record at or behind `end` that follows another one at or behind `end`.
    async fn later(&self, end: Lsn, segments: &[Segment]) -> Result<Option<Lsn>, IoError> {
        for segment in segments.iter().filter(|segment| segment.end() > end) {
            let mut at = segment.start().max(end);
            loop {
                let bytes =
                    read_segment(self.io, self.dir, self.tli, at, JOURNAL_REPLAY_BYTES).await?;
                for candidate in candidates(&bytes, at, end) {
                    if self.is_record(candidate).await? {
                        return Ok(Some(candidate));
                    }
                }
                at = Lsn(at.0.saturating_add(bytes.len() as u64));
                if bytes.is_empty() || at >= segment.end() {
                    break;
                }
            }
        }
        Ok(None)
    }

    /// A whole record with the right checksum begins at `start`.
    async fn is_record(&self, start: Lsn) -> Result<bool, IoError> {
        let Ok(mut stream) = WalStream::new(start, self.layout) else { return Ok(false) };
        let mut at = start;
        loop {
            let bytes = read_segment(self.io, self.dir, self.tli, at, JOURNAL_REPLAY_BYTES).await?;
            at = Lsn(at.0.saturating_add(bytes.len() as u64));
            match stream.next(&mut &bytes[..]) {
                Ok(Event::Record(_)) => return Ok(true),
                Ok(Event::NeedInput) if !bytes.is_empty() => {}
                Ok(Event::NeedInput | Event::EndOfWal) | Err(_) => return Ok(false),
            }
        }
    }

    /// The line of one segment; takes those of the problems that lie in it.
    async fn report(
        &self,
        segment: &Segment,
        walk: &Walk,
        from: Lsn,
        problems: &mut Vec<(Lsn, String)>,
    ) -> Result<FileReport, IoError> {
        let path = self.dir.join(&segment.entry.name);
        let (start, len) = (segment.start(), segment.entry.len);
        let mut report = FileReport::new(path, FileKind::JournalSegment, len);
        let whole = start..Lsn(start.0.saturating_add(JOURNAL_SEGMENT_BYTES));
        let is_mine = |(at, _): &mut (Lsn, String)| whole.contains(at);
        for (_, text) in problems.extract_if(.., is_mine) {
            report = report.damage(text);
        }
        if len > JOURNAL_SEGMENT_BYTES {
            report =
                report.damage(format!("it has {len} bytes, a segment has {JOURNAL_SEGMENT_BYTES}"));
        } else if len < JOURNAL_SEGMENT_BYTES {
            // A segment gets its length before it gets a byte of WAL.
            report = match self.is_zero(segment).await? {
                true => report.note("it was just begun: nothing is in it"),
                false => report.damage(format!(
                    "it is cut off: it has {len} bytes, a segment has {JOURNAL_SEGMENT_BYTES}"
                )),
            };
        }
        let ends_here = whole.contains(&walk.end);
        Ok(match (&walk.error, ends_here) {
            (_, false) if whole.end <= walk.end => report.content("full of WAL"),
            (_, false) => report.content("behind the end of the WAL"),
            (None, true) => report.content(format!("the WAL from {from} on ends at {}", walk.end)),
            (Some(error), true) => {
                let text = format!("the WAL from {from} on ends at {}: {error}", walk.end);
                let is_cut = self.ends_within(segment, walk.end).await?;
                match report.is_damaged() || is_cut {
                    true => report.content(text),
                    false => report.note(format!(
                        "{text}. Nothing whole follows: this is what a write leaves that a crash \
                         cut short"
                    )),
                }
            }
        })
    }

    /// Of the record that begins at `start` the end is missing: zeros follow before it is over.
    /// So ends every journal whose source was cut off while it sent a record.
    async fn ends_within(&self, segment: &Segment, start: Lsn) -> Result<bool, IoError> {
        let (mut at, mut used, mut len) = (start, start, 0);
        while at < segment.end() {
            let bytes = read_segment(self.io, self.dir, self.tli, at, JOURNAL_REPLAY_BYTES).await?;
            if at == start {
                len = bytes.first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk));
            }
            if let Some(last) = bytes.iter().rposition(|byte| *byte != 0) {
                used = Lsn(at.0.saturating_add(last as u64).saturating_add(1));
            }
            if bytes.is_empty() {
                break;
            }
            at = Lsn(at.0.saturating_add(bytes.len() as u64));
        }
        Ok(used.bytes_since(start) < u64::from(len))
    }

    /// All bytes that a file has are zeros.
    async fn is_zero(&self, segment: &Segment) -> Result<bool, IoError> {
        let mut at = segment.start();
        while at < segment.end() {
            let bytes = read_segment(self.io, self.dir, self.tli, at, JOURNAL_REPLAY_BYTES).await?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            if bytes.is_empty() {
                break;
            }
            at = Lsn(at.0.saturating_add(bytes.len() as u64));
        }
        Ok(true)
    }
}

/// Places in `bytes`, which begin at `at`, where something looks like the header of a record that
/// follows another one at or behind `end`. A header that the end of the bytes cuts is missed; the
/// next record is not.
fn candidates(bytes: &[u8], at: Lsn, end: Lsn) -> Vec<Lsn> {
    let mut found = Vec::new();
    let skip = (at.align().0 - at.0) as usize;
    let mut start = Lsn(at.0.saturating_add(skip as u64));
    let mut rest = bytes.get(skip..).unwrap_or_default();
    while !rest.is_empty() {
        // Most of the rest of a journal is zeros.
        if rest.starts_with(&ZEROS) {
            rest = rest.get(ZEROS.len()..).unwrap_or_default();
            start.0 = start.0.saturating_add(ZEROS.len() as u64);
            continue;
        }
        let prev = rest.get(8..).and_then(|rest| rest.first_chunk());
        let prev = Lsn(prev.map_or(0, |chunk| u64::from_le_bytes(*chunk)));
        let len = rest.first_chunk().map_or(0, |chunk| u32::from_le_bytes(*chunk));
        if end <= prev && prev < start && len as usize >= record::HEADER {
            found.push(start);
        }
        rest = rest.get(8..).unwrap_or_default();
        start.0 = start.0.saturating_add(8);
    }
    found
}
