//! Pages as they are now: changed by the records so far, or as the copied data directory has them,
//! and what WAL does to pages without naming them.
//!
//! - Visibility-map bits of changed heap pages are cleared.
//! - A relation that is cut has zeros there when it grows again; its visibility map loses bits.
//! - A database that is copied file by file begins with the pages of its template.

use std::collections::HashMap;

use bytes::Bytes;

use super::{Compare, Current};
use crate::base::key::{FORK_MAIN, FORK_VM};
use crate::base::page::{PAGE_SIZE, Page, page_is_new};
use crate::base::{BlockNumber, RelNode, RelTag, SmallRecord};
use crate::cli::admin_client::CommandError;
use crate::redo::small::{self, heap_block_to_map_block, heap_block_to_map_byte};
use crate::wal::change::Change;
use crate::wal::decode::decode;
use crate::wal::stream::StreamRecord;

/// Tablespace and database.
type Database = (u32, u32);

/// Where the copied data directory says nothing any more, or says it under another name.
#[derive(Debug, Default)]
pub(super) struct Implied {
    /// From this block on a fork had been cut off.
    cuts: HashMap<RelTag, BlockNumber>,
    /// The database whose files one was copied from.
    copies: HashMap<Database, Database>,
}

fn in_database(rel: RelTag, (spc, db): Database) -> RelTag {
    RelNode { spc, db, ..rel.node }.fork(rel.fork)
}

impl Compare<'_> {
    /// The page of a block as it is now; zeros if nobody knows it.
    pub(super) fn current(&self, rel: RelTag, block: BlockNumber) -> Result<Bytes, CommandError> {
        if let Some(current) = self.pages.get(&(rel, block)) {
            return Ok(current.page.clone());
        }
        let cut = self.implied.cuts.get(&rel).is_some_and(|cut| block >= *cut);
        let copy = self.implied.copies.get(&(rel.node.spc, rel.node.db));
        let source = copy.map_or(rel, |source| in_database(rel, *source));
        let page = match self.base.forks.get(&source) {
            Some(files) if !cut => files.page(block)?,
            _ => None,
        };
        Ok(Bytes::from(page.unwrap_or_else(|| vec![0; PAGE_SIZE])))
    }

    /// Carries out what a record changes without naming the block.
    pub(super) fn imply(&mut self, found: &StreamRecord) -> Result<(), CommandError> {
        for change in decode(&found.bytes, found.start, found.end)? {
            match change {
                Change::VmClear { node, flags, heap_blocks } => {
                    for heap_block in heap_blocks.into_iter().flatten() {
                        let heap_blocks = [Some(heap_block), None];
                        let clear = SmallRecord::VmClear { flags, heap_blocks };
                        self.small(node.fork(FORK_VM), heap_block_to_map_block(heap_block), clear)?;
                    }
                }
                Change::RelTruncate { node, blocks, main, vm, .. } => {
                    if main {
                        self.cut(node.fork(FORK_MAIN), blocks);
                    }
                    if vm {
                        self.cut_map(node.fork(FORK_VM), blocks)?;
                    }
                }
                Change::DatabaseCopy { source, target } => self.copy_database(source, target),
                _ => {}
            }
        }
        Ok(())
    }

    fn cut(&mut self, rel: RelTag, blocks: BlockNumber) {
        self.pages.retain(|(other, block), _| *other != rel || *block < blocks);
        let cut = self.implied.cuts.entry(rel).or_insert(blocks);
        *cut = blocks.min(*cut);
    }

    /// `visibilitymap_prepare_truncate`: the page that keeps some bits loses the others.
    fn cut_map(&mut self, rel: RelTag, heap_blocks: BlockNumber) -> Result<(), CommandError> {
        let block = heap_block_to_map_block(heap_blocks);
        let (map_byte, blocks_kept) = heap_block_to_map_byte(heap_blocks);
        if map_byte == 0 && blocks_kept == 0 {
            self.cut(rel, block);
            return Ok(());
        }
        self.small(rel, block, SmallRecord::VmTruncate { map_byte, blocks_kept })?;
        self.cut(rel, block + 1);
        Ok(())
    }

    /// Applies one of our own records. A page of zeros stays one: PostgreSQL initialises it in
    /// memory only.
    fn small(
        &mut self,
        rel: RelTag,
        block: BlockNumber,
        record: SmallRecord,
    ) -> Result<(), CommandError> {
        let before = self.current(rel, block)?;
        if page_is_new(&before) {
            return Ok(());
        }
        let mut page: Box<Page> = before[..].try_into().map(Box::new)?;
        small::apply(&mut page, &record);
        let page: Box<[u8]> = page;
        let (child, load) = self
            .pages
            .get(&(rel, block))
            .map_or((false, self.loads.len()), |current| (current.child, current.load));
        self.pages.insert((rel, block), Current { page: Bytes::from(page), child, load });
        Ok(())
    }

    fn copy_database(&mut self, source: Database, target: Database) {
        let copied =
            self.pages.iter().filter(|((rel, _), _)| (rel.node.spc, rel.node.db) == source);
        let copied: Vec<_> = copied
            .map(|((rel, block), current)| ((in_database(*rel, target), *block), current.clone()))
            .collect();
        self.pages.extend(copied);
        let cuts: Vec<_> = self.implied.cuts.iter().map(|(rel, cut)| (*rel, *cut)).collect();
        for (rel, cut) in cuts {
            if (rel.node.spc, rel.node.db) == source {
                self.implied.cuts.insert(in_database(rel, target), cut);
            }
        }
        let origin = self.implied.copies.get(&source).copied().unwrap_or(source);
        self.implied.copies.insert(target, origin);
    }
}
