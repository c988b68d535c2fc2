//! Content of one simulated file: what reads see, and what a power loss leaves.
//!
//! `live` is what reads see. `durable` is what is certainly on the medium. Between them stands
//! the list of changes that are not synced, in order. [`FileData::sync`] moves the head of that
//! list to `durable`; [`FileData::crash`] keeps or loses each of its 512-byte sectors, and each
//! change of length, by itself.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::random::Stream;
use crate::io::{ALIGNMENT, align_up};

/// What a device writes whole or not at all, in bytes.
pub const SECTOR_BYTES: usize = 512;

type Block = Rc<[u8; ALIGNMENT]>;

/// Number of a change of file content; grows by one with each.
pub type ChangeSeq = u64;

#[derive(Clone)]
struct Change {
    seq: ChangeSeq,
    offset: u64,
    data: Rc<[u8]>,
    /// Length of the file after the change, where the change made it longer.
    grown_to: Option<u64>,
    /// The same, where it made it shorter.
    cut_to: Option<u64>,
}

#[derive(Clone, Default)]
struct Content {
    blocks: BTreeMap<u64, Block>,
    len: u64,
}

impl Content {
    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut position = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let within = (position % ALIGNMENT as u64) as usize;
            let count = rest.len().min(ALIGNMENT - within);
            let block = self
                .blocks
                .entry(position / ALIGNMENT as u64)
                .or_insert_with(|| Rc::new([0; ALIGNMENT]));
            Rc::make_mut(block)[within..within + count].copy_from_slice(&rest[..count]);
            rest = &rest[count..];
            position += count as u64;
        }
    }

    fn read(&self, offset: u64, len: usize) -> Box<[u8]> {
        let available = self.len.saturating_sub(offset).min(len as u64) as usize;
        let mut bytes = vec![0; available];
        for (index, chunk) in bytes.chunks_mut(ALIGNMENT).enumerate() {
            if let Some(block) = self.blocks.get(&(offset / ALIGNMENT as u64 + index as u64)) {
                chunk.copy_from_slice(&block[..chunk.len()]);
            }
        }
        bytes.into_boxed_slice()
    }

    fn flip_bit(&mut self, byte: u64, bit: u32) {
        if let Some(block) = self.blocks.get_mut(&(byte / ALIGNMENT as u64)) {
            Rc::make_mut(block)[(byte % ALIGNMENT as u64) as usize] ^= 1 << bit;
        }
    }

    /// Ends at `len`, a multiple of [`ALIGNMENT`], if it is longer.
    fn cut(&mut self, len: u64) {
        self.len = self.len.min(len);
        self.trim();
    }

    /// Forgets what lies past the length, so that a file that grows again reads zeros there.
    fn trim(&mut self) {
        self.blocks.split_off(&(align_up(self.len) / ALIGNMENT as u64));
    }
}

/// What a power loss leaves of content that is not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Each sector and each growth by itself, with this chance per million.
    Sectors(u32),
    /// A run of sectors from either end of each write; each growth or not.
    Runs,
    /// Each write and each growth whole or not at all.
    Writes,
}

/// One file.
#[derive(Clone, Default)]
pub struct FileData {
    live: Content,
    durable: Content,
    unsynced: Vec<Change>,
    next_seq: ChangeSeq,
    /// Blocks below this length have space, written or not.
    reserved_len: u64,
    /// Ranges of writes that are under way.
    writing: Vec<(u64, u64)>,
}

impl FileData {
    /// Length that callers see, in bytes.
    #[allow(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
    pub fn len(&self) -> u64 {
        self.live.len
    }

    /// Space the file takes, in bytes.
    pub fn used_bytes(&self) -> u64 {
        let reserved = align_up(self.reserved_len) / ALIGNMENT as u64;
        (reserved + self.live.blocks.range(reserved..).count() as u64) * ALIGNMENT as u64
    }

    /// Space that a write of this range would take in addition, in bytes.
    pub fn needed_bytes(&self, offset: u64, len: u64) -> u64 {
        let reserved = align_up(self.reserved_len) / ALIGNMENT as u64;
        let first = (offset / ALIGNMENT as u64).max(reserved);
        let end = (offset + len).div_ceil(ALIGNMENT as u64).max(first);
        let present = self.live.blocks.range(first..end).count() as u64;
        (end - first - present) * ALIGNMENT as u64
    }

    /// Notes that a write begins.
    ///
    /// # Panics
    /// Where it overlaps one under way: callers may not do that.
    pub fn begin_write(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        if let Some((other, other_end)) =
            self.writing.iter().find(|(start, stop)| offset < *stop && *start < end)
        {
            panic!("write of {offset}..{end} while {other}..{other_end} is being written");
        }
        self.writing.push((offset, end));
    }

    /// Notes that a write is over.
    pub fn end_write(&mut self, offset: u64, len: u64) {
        self.writing.retain(|range| *range != (offset, offset + len));
    }

    /// Writes; durable only after a sync.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        self.live.write(offset, data);
        let end = offset + data.len() as u64;
        let grown_to = (end > self.live.len).then_some(end);
        self.live.len = self.live.len.max(end);
        self.push_change(offset, data.into(), grown_to);
    }

    /// Reserves space and makes the file at least `len` bytes long.
    pub fn allocate(&mut self, len: u64) {
        self.reserved_len = self.reserved_len.max(len);
        if len > self.live.len {
            self.live.len = len;
            self.push_change(0, Rc::new([]), Some(len));
        }
    }

    /// Makes the file `len` bytes long, a multiple of [`ALIGNMENT`].
    pub fn set_len(&mut self, len: u64) {
        if len >= self.live.len {
            let reserved_len = self.reserved_len;
            self.allocate(len);
            self.reserved_len = reserved_len;
            return;
        }
        self.live.cut(len);
        self.reserved_len = self.reserved_len.min(len);
        self.next_seq += 1;
        let (seq, offset, data) = (self.next_seq, 0, Rc::new([]));
        self.unsynced.push(Change { seq, offset, data, grown_to: None, cut_to: Some(len) });
    }

    /// A file with anything in it, on the medium too.
    pub fn scratch(blocks: u64, noise: &mut Stream) -> FileData {
        let mut file = FileData::default();
        for _ in 0..blocks.min(4) {
            let sector = [noise.next_u64() as u8; SECTOR_BYTES];
            file.write(noise.below(blocks) * ALIGNMENT as u64, &sector);
        }
        file.allocate(blocks * ALIGNMENT as u64);
        file.reserved_len = 0;
        file.sync(file.latest_change());
        file
    }

    fn push_change(&mut self, offset: u64, data: Rc<[u8]>, grown_to: Option<u64>) {
        self.next_seq += 1;
        let change = Change { seq: self.next_seq, offset, data, grown_to, cut_to: None };
        self.unsynced.push(change);
    }

    /// Reads up to `len` bytes; `offset` is a multiple of [`ALIGNMENT`].
    pub fn read(&self, offset: u64, len: usize) -> Box<[u8]> {
        self.live.read(offset, len)
    }

    /// Turns a bit on the medium.
    pub fn flip_bit(&mut self, byte: u64, bit: u32) {
        self.live.flip_bit(byte, bit);
        self.durable.flip_bit(byte, bit);
    }

    /// Number of the latest change: what a sync that starts now will cover.
    pub fn latest_change(&self) -> ChangeSeq {
        self.next_seq
    }

    /// Makes all changes up to `seq` durable.
    pub fn sync(&mut self, seq: ChangeSeq) {
        let covered = self.unsynced.partition_point(|change| change.seq <= seq);
        for change in self.unsynced.drain(..covered) {
            self.durable.write(change.offset, &change.data);
            if let Some(len) = change.grown_to {
                self.durable.len = self.durable.len.max(len);
            }
            if let Some(len) = change.cut_to {
                self.durable.cut(len);
            }
        }
    }

    /// Power loss: of what is not synced stays what `keep` says.
    pub fn crash(&mut self, stream: &mut Stream, keep: Keep) {
        for change in std::mem::take(&mut self.unsynced) {
            if let Some(len) = change.grown_to.or(change.cut_to)
                && match keep {
                    Keep::Sectors(chance) => stream.chance(chance),
                    Keep::Runs | Keep::Writes => stream.coin(),
                }
            {
                match change.cut_to {
                    Some(_) => self.durable.cut(len),
                    None => self.durable.len = self.durable.len.max(len),
                }
            }
            let sectors = change.data.len().div_ceil(SECTOR_BYTES);
            let run = kept_run(sectors, keep, stream);
            for (index, sector) in change.data.chunks(SECTOR_BYTES).enumerate() {
                let kept = match keep {
                    Keep::Sectors(chance) => stream.chance(chance),
                    Keep::Runs | Keep::Writes => run.contains(&index),
                };
                if kept {
                    self.durable.write(change.offset + (index * SECTOR_BYTES) as u64, sector);
                }
            }
        }
        self.durable.trim();
        self.live = self.durable.clone();
        self.reserved_len = self.reserved_len.min(self.durable.len);
        self.writing.clear();
    }

    /// The process has died: what was under way is over.
    pub fn kill(&mut self) {
        self.writing.clear();
    }
}

/// The sectors of one write that stay, where they stay as a run.
fn kept_run(sectors: usize, keep: Keep, stream: &mut Stream) -> std::ops::Range<usize> {
    match keep {
        Keep::Sectors(_) => 0..0,
        Keep::Writes if stream.coin() => 0..sectors,
        Keep::Writes => 0..0,
        Keep::Runs => {
            let cut = stream.below(sectors as u64 + 1) as usize;
            if stream.coin() { 0..cut } else { cut..sectors }
        }
    }
}
