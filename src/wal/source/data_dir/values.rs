//! Every key of a data directory with its value, in key order.

use std::collections::VecDeque;

use bytes::Bytes;

use super::{DataDir, DataDirError, FileRef, blocks, file_blocks};
use crate::base::checksum::crc32c;
use crate::base::page::PAGE_SIZE;
use crate::base::{Key, RelTag, SlruKind, Value};
use crate::limits::IMPORT_READ_BYTES;
use crate::wal::checkpoint::CHECKPOINT_BYTES;
use crate::wal::control_file::{CHECKPOINT_AT, SEGMENT_BLOCKS};

/// Length of a relation map file in bytes (`sizeof(RelMapFile)`).
const RELMAP_BYTES: u64 = 512;

/// What is still to be handed out; one task stands for a file or a small value.
enum Task<'a> {
    RelMap(u32, u32, &'a FileRef),
    RelSegment(RelTag, u32, &'a FileRef),
    SlruSegment(SlruKind, u32, &'a FileRef),
    TwoPhase(u32, &'a FileRef),
    Database(u32, u32, &'a FileRef),
    Ready(Key, Value),
}

/// Pages of the file that is being read.
struct Pages<'a> {
    file: &'a FileRef,
    /// The key of block 0 of the file; `field6` counts up from there.
    first: Key,
    next: u32,
    blocks: u32,
    chunk: Bytes,
}

/// The iterator. Holds at most [`IMPORT_READ_BYTES`] of data and one task per file.
pub struct Values<'a> {
    tasks: Box<dyn Iterator<Item = Task<'a>> + 'a>,
    pages: Option<Pages<'a>>,
    bytes_done: u64,
    failed: bool,
}

fn u32_value(number: u32) -> Value {
    Value::Image(Bytes::copy_from_slice(&number.to_le_bytes()))
}

/// Tasks of the relation maps and relations, merged by tablespace and database.
fn relation_tasks(dir: &DataDir) -> impl Iterator<Item = Task<'_>> {
    let entries = &dir.entries;
    let mut maps = entries.relmaps.iter().peekable();
    let mut relations = entries.relations.iter().peekable();
    let mut segments: VecDeque<Task<'_>> = VecDeque::new();
    std::iter::from_fn(move || {
        if let Some(task) = segments.pop_front() {
            return Some(task);
        }
        let map_first = match (maps.peek(), relations.peek()) {
            (Some((at, _)), Some((tag, _))) => **at <= (tag.node.spc, tag.node.db),
            (map, _) => map.is_some(),
        };
        if map_first {
            return maps.next().map(|((spc, db), file)| Task::RelMap(*spc, *db, file));
        }
        let (tag, files) = relations.next()?;
        segments.extend(files.iter().map(|(number, file)| Task::RelSegment(*tag, *number, file)));
        segments.push_back(Task::Ready(Key::rel_size(*tag), u32_value(blocks(files))));
        segments.pop_front()
    })
}

fn slru_tasks(dir: &DataDir) -> impl Iterator<Item = Task<'_>> {
    let marker = || Value::Image(Bytes::from_static(b"s"));
    SlruKind::ALL.into_iter().flat_map(move |kind| {
        let of_kind = move || dir.entries.slrus.iter().filter(move |((k, _), _)| *k == kind);
        let dirs = of_kind().map(move |((_, n), _)| Task::Ready(Key::slru_dir(kind, *n), marker()));
        let pages = of_kind().flat_map(move |((_, number), file)| {
            let size = u32_value(file_blocks(file));
            [
                Task::SlruSegment(kind, *number, file),
                Task::Ready(Key::slru_size(kind, *number), size),
            ]
        });
        dirs.chain(pages)
    })
}

impl<'a> Values<'a> {
    pub(super) fn new(dir: &'a DataDir) -> Self {
        let entries = &dir.entries;
        let two_phase = entries.two_phase.iter().map(|(xid, file)| Task::TwoPhase(*xid, file));
        let checkpoint = dir.control_bytes.slice(CHECKPOINT_AT..CHECKPOINT_AT + CHECKPOINT_BYTES);
        let control = [
            Task::Ready(Key::CONTROL_FILE, Value::Image(dir.control_bytes.clone())),
            Task::Ready(Key::CHECKPOINT, Value::Image(checkpoint)),
        ];
        let databases =
            entries.databases.iter().map(|((spc, db), file)| Task::Database(*spc, *db, file));
        let dirs = entries
            .relations
            .keys()
            .map(|tag| Task::Ready(Key::rel_dir(*tag), Value::Image(Bytes::from_static(b"r"))));
        let tasks = relation_tasks(dir)
            .chain(slru_tasks(dir))
            .chain(two_phase)
            .chain(control)
            .chain(databases)
            .chain(dirs);
        Values { tasks: Box::new(tasks), pages: None, bytes_done: 0, failed: false }
    }

    /// Bytes of relation and SLRU files read so far; [`DataDir::total_bytes`] at the end, but for
    /// broken-off last blocks.
    pub fn bytes_done(&self) -> u64 {
        self.bytes_done
    }

    fn begin(&mut self, task: Task<'a>) -> Result<Option<(Key, Value)>, DataDirError> {
        let (file, first) = match task {
            Task::Ready(key, value) => return Ok(Some((key, value))),
            Task::RelMap(spc, db, file) => {
                if file.len != RELMAP_BYTES {
                    let detail =
                        format!("pg_filenode.map of {spc}/{db} is {} bytes long", file.len);
                    return Err(file.damaged(detail));
                }
                return Ok(Some((Key::relmap(spc, db), Value::Image(file.read_small()?))));
            }
            Task::TwoPhase(xid, file) => {
                let state = two_phase_state(xid, file)?;
                return Ok(Some((Key::two_phase(xid), Value::Image(state))));
            }
            Task::Database(spc, db, file) => {
                let content = file.read_small()?;
                if content.trim_ascii() != b"15" {
                    return Err(file.damaged(format!("PG_VERSION of {spc}/{db} is not 15")));
                }
                return Ok(Some((Key::database(spc, db), Value::Image(content))));
            }
            Task::RelSegment(tag, number, file) => {
                let block = number.checked_mul(SEGMENT_BLOCKS);
                let block = block.ok_or_else(|| file.damaged("its segment number is too high"))?;
                (file, Key::rel_block(tag, block))
            }
            Task::SlruSegment(kind, number, file) => (file, Key::slru_block(kind, number, 0)),
        };
        let blocks = file_blocks(file);
        self.pages = Some(Pages { file, first, next: 0, blocks, chunk: Bytes::new() });
        Ok(None)
    }

    fn step(&mut self) -> Result<Option<(Key, Value)>, DataDirError> {
        loop {
            if let Some(pages) = self.pages.as_mut() {
                if let Some((key, value, read)) = pages.next_page()? {
                    self.bytes_done = self.bytes_done.saturating_add(read);
                    return Ok(Some((key, value)));
                }
                self.pages = None;
            }
            let Some(task) = self.tasks.next() else { return Ok(None) };
            if let Some(value) = self.begin(task)? {
                return Ok(Some(value));
            }
        }
    }
}

impl Pages<'_> {
    fn next_page(&mut self) -> Result<Option<(Key, Value, u64)>, DataDirError> {
        if self.next >= self.blocks {
            return Ok(None);
        }
        if self.chunk.is_empty() {
            let at = u64::from(self.next) * PAGE_SIZE as u64;
            self.chunk = self.file.read(at, IMPORT_READ_BYTES)?;
        }
        if self.chunk.len() < PAGE_SIZE {
            return Err(self.file.damaged("a block was cut off during the import"));
        }
        let page = self.chunk.split_to(PAGE_SIZE);
        let field6 = self.first.field6.saturating_add(self.next);
        let key = Key { field6, ..self.first };
        self.next = self.next.saturating_add(1);
        if self.chunk.len() < PAGE_SIZE {
            // The broken-off block after the last whole one.
            self.chunk = Bytes::new();
        }
        let value = match page.iter().all(|byte| *byte == 0) {
            true => Value::ZeroPage,
            false => Value::Image(page),
        };
        Ok(Some((key, value, PAGE_SIZE as u64)))
    }
}

/// State of a prepared transaction without the CRC-32C at its end, which is checked.
fn two_phase_state(xid: u32, file: &FileRef) -> Result<Bytes, DataDirError> {
    let content = file.read_small()?;
    match content.split_last_chunk::<4>() {
        Some((state, crc)) if crc32c(state) == u32::from_le_bytes(*crc) => {
            Ok(content.slice(..state.len()))
        }
        _ => Err(file.damaged(format!("pg_twophase/{xid:08X} has a wrong checksum"))),
    }
}

impl Iterator for Values<'_> {
    type Item = Result<(Key, Value), DataDirError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let result = self.step().transpose();
        self.failed = matches!(result, Some(Err(_)));
        result
    }
}
