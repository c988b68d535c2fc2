//! Carrying out the changes of one WAL record: from [`Change`] to keys and values.
//!
//! Synchronous and without I/O. Whatever a change needs to know about the timeline (sizes of the
//! forks it touches, members of a database) must have been loaded into [`Sizes`] before:
//! [`touched_forks`] says which. Where PostgreSQL's redo decides by the state of its files, the
//! same decision is made here by the sizes.

use bytes::Bytes;

use super::sizes::Sizes;
use crate::base::key::{FORK_FSM, FORK_MAIN, FORK_VM, SLRU_PAGES_PER_SEGMENT};
use crate::base::slru;
use crate::base::{BlockNumber, Key, Lsn, RelNode, RelTag, SlruKind, SmallRecord, Value};
use crate::limits::REL_GAP_BLOCKS_MAX;
use crate::redo::small::{heap_block_to_map_block, heap_block_to_map_byte, initialised_page};
use crate::wal::change::{BlockChange, BlockValue, Change};
use crate::wal::record::{BlockRef, Record};

/// Value of a directory entry that exists.
pub const EXISTS: Bytes = Bytes::from_static(b"r");
const REMOVED: Bytes = Bytes::new();
const FORKS: [u8; 4] = [0, 1, 2, 3];

/// Where values go: the open layer, or a collector in tests.
pub trait Sink {
    /// Stores one value. For one key, LSNs never fall.
    fn put(&mut self, key: Key, lsn: Lsn, value: Value);
    /// Stores the record that is being carried out, which ends at `lsn`.
    fn put_record(&mut self, key: Key, lsn: Lsn, will_init: bool);
    /// Stores the page that [`page_in_record`](crate::wal::decode::page_in_record) makes of it.
    fn put_page(&mut self, key: Key, lsn: Lsn);
}

/// Why a change cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// The timeline's checkpoint struct was not read before its first record.
    #[error("the timeline is not loaded")]
    NotLoaded,
    /// A record that would create an absurd number of empty blocks.
    #[error("the record at {lsn} extends {rel} from {from} to {to} blocks at once")]
    Gap {
        /// LSN after the record.
        lsn: Lsn,
        /// The fork.
        rel: RelTag,
        /// Its size.
        from: BlockNumber,
        /// The block that the record wants.
        to: BlockNumber,
    },
}

/// Carries out changes at one LSN.
pub struct Apply<'a, S: Sink> {
    /// Where values go.
    pub sink: &'a mut S,
    /// Sizes, kept up to date.
    pub sizes: &'a mut Sizes,
    /// LSN after the record.
    pub lsn: Lsn,
    /// Counts changes of blocks that do not exist, which PostgreSQL skips too.
    pub skipped: u64,
}

/// Calls `visit` with each fork whose size a change needs, or may need.
pub fn touched_forks(change: &Change, mut visit: impl FnMut(RelTag)) {
    match change {
        Change::Block(block) => visit(block.rel),
        Change::VmClear { node, .. } => visit(node.fork(FORK_VM)),
        Change::RelCreate(rel) => visit(*rel),
        Change::RelTruncate { node, .. } => {
            [FORK_MAIN, FORK_FSM, FORK_VM].into_iter().for_each(|fork| visit(node.fork(fork)));
        }
        Change::RelDrop(nodes) => {
            let forks = nodes.iter().flat_map(|node| FORKS.map(|fork| node.fork(fork)));
            forks.for_each(visit);
        }
        _ => {}
    }
}

impl<S: Sink> Apply<'_, S> {
    /// Carries out a record that does no more than change its blocks, if all of them are there. It
    /// does what the [`Change`]s of the record do, on a shorter way. False if not all are there;
    /// then nothing was done.
    pub fn plain(&mut self, record: &Record<'_>) -> bool {
        let is_there = |block: &BlockRef<'_>| block.block < self.sizes.blocks(block.rel);
        if !record.blocks.iter().all(is_there) {
            return false;
        }
        for block in &record.blocks {
            let key = Key::rel_block(block.rel, block.block);
            self.sink.put_record(key, self.lsn, block.replaces_page());
        }
        true
    }

    /// Carries out one change. Changes of whole databases, of settings and of the checkpoint are
    /// not for here: ingest turns them into others, or keeps the state they need.
    pub fn change(&mut self, change: Change) -> Result<(), ApplyError> {
        match change {
            Change::Block(block) => self.block(block),
            Change::VmClear { node, flags, heap_blocks } => self.vm_clear(node, flags, heap_blocks),
            Change::RelCreate(rel) => {
                self.ensure_fork(rel);
                Ok(())
            }
            Change::RelTruncate { node, blocks, main, vm, fsm } => {
                self.truncate(node, blocks, [main, vm, fsm]);
                Ok(())
            }
            Change::RelDrop(nodes) => {
                for node in nodes {
                    FORKS.into_iter().for_each(|fork| self.drop_fork(node.fork(fork)));
                }
                Ok(())
            }
            Change::DatabaseCreate { spc, db } => {
                self.put(Key::database(spc, db), Value::Image(EXISTS));
                Ok(())
            }
            Change::RelMap { spc, db, content } => {
                self.put(Key::relmap(spc, db), Value::Image(content));
                Ok(())
            }
            Change::Slru { kind, page, value } => {
                self.slru(kind, page, value);
                Ok(())
            }
            Change::SlruTruncate { kind, cutoff_page } => {
                for segment in self.sizes.slru_segments(kind) {
                    if slru::segment_precedes(kind, segment, cutoff_page) {
                        self.drop_slru_segment(kind, segment);
                    }
                }
                Ok(())
            }
            Change::MembersTruncate { first_segment, end_segment } => {
                self.members_truncate(first_segment, end_segment);
                Ok(())
            }
            Change::TwoPhasePrepare { xid, state } => {
                self.put(Key::two_phase(xid), Value::Image(state));
                Ok(())
            }
            Change::TwoPhaseFinish { xid } => {
                self.put(Key::two_phase(xid), Value::Image(REMOVED));
                Ok(())
            }
            Change::ReplicationOrigin { id, remote_lsn, backward } => {
                self.origin(id, remote_lsn, backward);
                Ok(())
            }
            Change::Parameters(_)
            | Change::DatabaseCopy { .. }
            | Change::DatabaseDrop { .. }
            | Change::Checkpoint(_) => {
                unreachable!("ingest carries these out itself")
            }
        }
    }

    fn put(&mut self, key: Key, value: Value) {
        self.sink.put(key, self.lsn, value);
    }

    /// Sets a fork's size and remembers since when it holds.
    pub fn set_size(&mut self, rel: RelTag, blocks: BlockNumber) {
        let bytes = Bytes::copy_from_slice(&blocks.to_le_bytes());
        self.put(Key::rel_size(rel), Value::Image(bytes));
        self.sizes.set_rel(rel, Some(blocks), self.lsn);
    }

    /// Creates the fork, empty, if it does not exist. PostgreSQL's redo does so for every fork
    /// that a record names (`XLogReadBufferExtended` calls `smgrcreate`).
    /// Returns its size.
    pub fn ensure_fork(&mut self, rel: RelTag) -> BlockNumber {
        if let Some(blocks) = self.sizes.rel(rel).and_then(|size| size.blocks) {
            return blocks;
        }
        self.put(Key::rel_dir(rel), Value::Image(EXISTS));
        self.set_size(rel, 0);
        0
    }

    /// Removes a fork, if it exists.
    pub fn drop_fork(&mut self, rel: RelTag) {
        if self.sizes.exists(rel) {
            self.put(Key::rel_dir(rel), Value::Image(REMOVED));
            self.put(Key::rel_size(rel), Value::Image(REMOVED));
            self.sizes.set_rel(rel, None, self.lsn);
        }
    }

    fn block(&mut self, change: BlockChange) -> Result<(), ApplyError> {
        let BlockChange { rel, block, mut value, extends } = change;
        let blocks = self.ensure_fork(rel);
        if block >= blocks {
            if !extends {
                self.skipped += 1;
                return Ok(());
            }
            self.extend(rel, blocks, block, &Value::ZeroPage)?;
            // The page starts from zeros, whatever was in its place before a truncation.
            if let BlockValue::Record { will_init } = &mut value {
                *will_init = true;
            }
            self.set_size(rel, block + 1);
        }
        let key = Key::rel_block(rel, block);
        match value {
            BlockValue::Record { will_init } => self.sink.put_record(key, self.lsn, will_init),
            BlockValue::Page(page) => self.put(key, Value::Image(page)),
            BlockValue::PageInRecord => self.sink.put_page(key, self.lsn),
        }
        Ok(())
    }

    /// `replorigin_advance`: only some records may move a position backwards.
    fn origin(&mut self, id: u16, remote_lsn: Option<Lsn>, backward: bool) {
        let known = self.sizes.origin(id);
        if !backward && remote_lsn.is_some() && known >= remote_lsn {
            return;
        }
        self.sizes.set_origin(id, remote_lsn);
        let value = remote_lsn.map_or(REMOVED, |lsn| Bytes::copy_from_slice(&lsn.0.to_le_bytes()));
        self.put(Key::replication_origin(id), Value::Image(value));
    }

    /// Fills blocks `from..to` with `filler`.
    fn extend(
        &mut self,
        rel: RelTag,
        from: BlockNumber,
        to: BlockNumber,
        filler: &Value,
    ) -> Result<(), ApplyError> {
        if to == BlockNumber::MAX || to.saturating_sub(from) > REL_GAP_BLOCKS_MAX {
            return Err(ApplyError::Gap { lsn: self.lsn, rel, from, to });
        }
        for block in from..to {
            self.put(Key::rel_block(rel, block), filler.clone());
        }
        Ok(())
    }

    /// `visibilitymap_pin` and `visibilitymap_clear` in redo: the map is extended by initialised
    /// pages where it is too short, and the bits of the heap blocks are cleared.
    fn vm_clear(
        &mut self,
        node: RelNode,
        flags: u8,
        heap_blocks: [Option<BlockNumber>; 2],
    ) -> Result<(), ApplyError> {
        let rel = node.fork(FORK_VM);
        let map_block = |slot: usize| heap_blocks[slot].map(heap_block_to_map_block);
        let groups = match (map_block(0), map_block(1)) {
            (Some(first), Some(second)) if first != second => {
                vec![(first, [heap_blocks[0], None]), (second, [heap_blocks[1], None])]
            }
            (Some(block), _) | (None, Some(block)) => vec![(block, heap_blocks)],
            (None, None) => Vec::new(),
        };
        for (block, heap_blocks) in groups {
            let blocks = self.ensure_fork(rel);
            if block < blocks {
                let clear = SmallRecord::VmClear { flags, heap_blocks };
                self.put(Key::rel_block(rel, block), Value::Small(clear));
            } else {
                let empty = Value::Image(Bytes::copy_from_slice(&initialised_page()[..]));
                self.extend(rel, blocks, block + 1, &empty)?;
                self.set_size(rel, block + 1);
            }
        }
        Ok(())
    }

    /// `smgr_redo` of `XLOG_SMGR_TRUNCATE`.
    fn truncate(&mut self, node: RelNode, blocks: BlockNumber, [main, vm, fsm]: [bool; 3]) {
        self.ensure_fork(node.fork(FORK_MAIN));
        if main && self.sizes.blocks(node.fork(FORK_MAIN)) > blocks {
            self.set_size(node.fork(FORK_MAIN), blocks);
        }
        if fsm && self.sizes.exists(node.fork(FORK_FSM)) {
            self.truncate_fsm(node.fork(FORK_FSM), blocks);
        }
        if vm && self.sizes.exists(node.fork(FORK_VM)) {
            self.truncate_vm(node.fork(FORK_VM), blocks);
        }
    }

    /// `visibilitymap_prepare_truncate`: the page that keeps some bits loses the others.
    fn truncate_vm(&mut self, rel: RelTag, heap_blocks: BlockNumber) {
        let block = heap_block_to_map_block(heap_blocks);
        let (map_byte, blocks_kept) = heap_block_to_map_byte(heap_blocks);
        let mut keep = block;
        if map_byte != 0 || blocks_kept != 0 {
            if block >= self.sizes.blocks(rel) {
                return;
            }
            let cut = SmallRecord::VmTruncate { map_byte, blocks_kept };
            self.put(Key::rel_block(rel, block), Value::Small(cut));
            keep += 1;
        }
        if self.sizes.blocks(rel) > keep {
            self.set_size(rel, keep);
        }
    }

    /// `FreeSpaceMapPrepareTruncateRel`, with one simplification: the page that keeps some
    /// entries is emptied. The free space map is a hint that is not WAL-logged.
    fn truncate_fsm(&mut self, rel: RelTag, heap_blocks: BlockNumber) {
        let (page, slot) = fsm_leaf(heap_blocks);
        let mut keep = page;
        if slot > 0 {
            if page >= self.sizes.blocks(rel) {
                return;
            }
            self.put(Key::rel_block(rel, page), Value::ZeroPage);
            keep += 1;
        }
        if self.sizes.blocks(rel) > keep {
            self.set_size(rel, keep);
        }
    }

    /// A zero page, or a change, of an SLRU. Redo reads a page that was never written as zeros
    /// (`SlruPhysicalReadPage` in recovery), so a change extends the segment like a zero page.
    /// The zeros are stored just below the record's LSN: one key has one value per LSN.
    fn slru(&mut self, kind: SlruKind, page: u32, value: Value) {
        let (segment, block) = (page / SLRU_PAGES_PER_SEGMENT, page % SLRU_PAGES_PER_SEGMENT);
        let blocks = self.sizes.slru(kind, segment);
        if blocks.is_none() {
            self.put(Key::slru_dir(kind, segment), Value::Image(EXISTS));
        }
        let before = Lsn(self.lsn.0 - 1);
        for gap in blocks.unwrap_or(0)..block + 1 {
            if gap < block || !value.is_base() {
                self.sink.put(Key::slru_block(kind, segment, gap), before, Value::ZeroPage);
            }
        }
        if blocks.is_none_or(|blocks| blocks <= block) {
            let size = Bytes::copy_from_slice(&(block + 1).to_le_bytes());
            self.put(Key::slru_size(kind, segment), Value::Image(size));
            self.sizes.set_slru(kind, segment, Some(block + 1));
        }
        self.put(Key::slru_block(kind, segment, block), value);
    }

    fn drop_slru_segment(&mut self, kind: SlruKind, segment: u32) {
        self.put(Key::slru_dir(kind, segment), Value::Image(REMOVED));
        self.put(Key::slru_size(kind, segment), Value::Image(REMOVED));
        self.sizes.set_slru(kind, segment, None);
    }

    fn members_truncate(&mut self, first: u32, end: u32) {
        let kind = SlruKind::MultiXactMembers;
        for segment in self.sizes.slru_segments(kind) {
            if slru::members_segment_removed(segment, first, end) {
                self.drop_slru_segment(kind, segment);
            }
        }
    }
}

/// Page of the free space map that holds the entry of a heap block, and the entry's place in it
/// (`fsm_get_location`, `fsm_logical_to_physical` in `freespace.c`).
fn fsm_leaf(heap_block: BlockNumber) -> (BlockNumber, u32) {
    /// `SlotsPerFSMPage` for 8 KiB pages.
    const SLOTS: u32 = 4069;
    /// `FSM_TREE_DEPTH`.
    const DEPTH: u32 = 3;
    let leaf = heap_block / SLOTS;
    let pages: u32 = (0..DEPTH).map(|level| leaf / SLOTS.pow(level) + 1).sum();
    (pages - 1, heap_block % SLOTS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::change::CheckpointChange;
    use crate::wal::decode::{decode_into, decode_or_take};
    use crate::wal::record::rmgr_id;

    #[derive(Default, PartialEq, Debug)]
    struct Collected(Vec<(Key, Lsn, Option<Value>, bool)>);

    impl Sink for Collected {
        fn put(&mut self, key: Key, lsn: Lsn, value: Value) {
            self.0.push((key, lsn, Some(value), false));
        }

        fn put_record(&mut self, key: Key, lsn: Lsn, will_init: bool) {
            self.0.push((key, lsn, None, will_init));
        }

        fn put_page(&mut self, key: Key, lsn: Lsn) {
            self.0.push((key, lsn, None, true));
        }
    }

    fn rel(number: u32) -> RelTag {
        RelNode { spc: 1663, db: 5, rel: number }.fork(FORK_MAIN)
    }

    fn sizes() -> Sizes {
        let mut sizes = Sizes::default();
        sizes.loaded(rel(1), Some(10), Lsn(1));
        sizes.loaded(rel(2), None, Lsn(1));
        sizes.loaded(RelTag { fork: FORK_VM, ..rel(1) }, Some(1), Lsn(1));
        sizes
    }

    /// A record of these blocks, with flags in every place of the main data where they may stand.
    fn record(rmgr: u8, info: u8, blocks: &[(u32, u32, u8)], flags: u8) -> Vec<u8> {
        let mut bytes = vec![0; 24];
        bytes[4..8].copy_from_slice(&700u32.to_le_bytes());
        (bytes[16], bytes[17]) = (info, rmgr);
        for (id, (number, block, block_flags)) in blocks.iter().enumerate() {
            bytes.extend_from_slice(&[id as u8, *block_flags, 0, 0]);
            for field in [1663, 5, *number, *block] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
        }
        bytes.extend_from_slice(&[255, 16]);
        bytes.extend_from_slice(&[flags; 16]);
        let len = bytes.len() as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes
    }

    /// Whatever goes the short way leaves the same behind as by its changes, and nothing goes it
    /// that touches what is not there.
    #[test]
    fn the_short_way_does_what_the_changes_do() {
        const WILL_INIT: u8 = 0x40;
        let (start, end) = (Lsn(0x1000), Lsn(0x1100));
        let (mut taken, mut left) = (0, 0);
        for rmgr in [rmgr_id::HEAP, rmgr_id::HEAP2, rmgr_id::BTREE, rmgr_id::GIN, rmgr_id::XACT] {
            for (case, info) in
                (0..=0x70u8).step_by(0x10).flat_map(|i| (0..24u32).map(move |c| (c, i)))
            {
                let flags = [0, 1, 2, 4][case as usize % 4];
                let first = (1, [3, 9, 10][case as usize / 4 % 3], 0);
                let second = (1 + case / 12, 4, WILL_INIT * (case % 2) as u8);
                let bytes = record(rmgr, info, &[first, second], flags);
                let mut short = (Collected::default(), sizes(), Vec::new(), false);
                let decoded = decode_or_take(&bytes, start, end, &mut short.2, |record| {
                    let (sink, sizes) = (&mut short.0, &mut short.1);
                    short.3 = Apply { sink, sizes, lsn: end, skipped: 0 }.plain(record);
                    short.3
                });
                let (mut sink, mut sizes, mut changes) =
                    (Collected::default(), sizes(), Vec::new());
                assert_eq!(decode_into(&bytes, start, end, &mut changes), decoded);
                if !short.3 {
                    assert_eq!((short.0, short.2), (Collected::default(), changes));
                    left += 1;
                    continue;
                }
                let mut apply = Apply { sink: &mut sink, sizes: &mut sizes, lsn: end, skipped: 0 };
                for change in changes {
                    if !matches!(change, Change::Checkpoint(CheckpointChange::Xid(_))) {
                        apply.change(change).unwrap();
                    }
                }
                assert_eq!((apply.skipped, &sink), (0, &short.0), "{rmgr} {info:02X} {case}");
                assert!(short.2.is_empty());
                taken += 1;
            }
        }
        assert!(taken > 100 && left > 100, "{taken} {left}");
    }
}
