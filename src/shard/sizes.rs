//! What ingest must know of the timeline as of the last ingested record: sizes of relation forks
//! and SLRU segments, positions of replication origins.
//!
//! Ingest needs the size of every fork that a record touches: to extend it, to fill gaps, and to
//! skip changes of blocks that do not exist, as PostgreSQL does. Sizes are read from the layers
//! once and kept here; the cache also answers reads, because a size that has not changed since
//! LSN `since` is the size at every later LSN too.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};

use foldhash::fast::RandomState;

use crate::base::{BlockNumber, Lsn, RelTag, SlruKind};
use crate::limits::{FOUND_SIZES, REL_SIZE_CACHE_ENTRIES_MAX};

/// The newest size of a fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RelSize {
    /// Blocks; `None` when the fork does not exist.
    pub blocks: Option<BlockNumber>,
    /// The size is valid from this LSN to the last ingested record.
    pub since: Lsn,
}

/// Forks that are found without a search: a record touches few, and the next ones the same.
const RECENT: usize = 32;

/// See the module's text.
#[derive(Default)]
pub struct Sizes {
    rels: HashMap<RelTag, RelSize, RandomState>,
    /// Some of `rels`, each at the place that [`Sizes::recent`] tells.
    recent: [Cell<Option<(RelTag, RelSize)>>; RECENT],
    slru: BTreeMap<(SlruKind, u32), BlockNumber>,
    origins: BTreeMap<u16, Lsn>,
    growth: i64,
}

impl Sizes {
    /// The fork's newest size, if it is known.
    pub fn rel(&self, rel: RelTag) -> Option<RelSize> {
        let recent = self.recent(rel);
        if let Some((_, size)) = recent.get().filter(|(known, _)| *known == rel) {
            return Some(size);
        }
        let size = *self.rels.get(&rel)?;
        recent.set(Some((rel, size)));
        Some(size)
    }

    fn recent(&self, rel: RelTag) -> &Cell<Option<(RelTag, RelSize)>> {
        let place = rel.node.rel.wrapping_add(u32::from(rel.fork) << 2) as usize % RECENT;
        &self.recent[place]
    }

    /// Size in blocks of a fork that was loaded before; 0 for one that does not exist.
    pub fn blocks(&self, rel: RelTag) -> BlockNumber {
        self.rel(rel).and_then(|size| size.blocks).unwrap_or(0)
    }

    /// True for an existing fork that was loaded before.
    pub fn exists(&self, rel: RelTag) -> bool {
        self.rel(rel).is_some_and(|size| size.blocks.is_some())
    }

    /// Remembers a fork's newest size. The size before must be known, or the fork be new.
    pub fn set_rel(&mut self, rel: RelTag, blocks: Option<BlockNumber>, since: Lsn) {
        let size = RelSize { blocks, since };
        let before = self.rels.insert(rel, size);
        self.recent(rel).set(Some((rel, size)));
        let in_blocks = |size: Option<BlockNumber>| i64::from(size.unwrap_or(0));
        self.growth += in_blocks(blocks) - in_blocks(before.and_then(|size| size.blocks));
    }

    /// Blocks by which all relations together have grown through [`Sizes::set_rel`].
    pub fn growth(&self) -> i64 {
        self.growth
    }

    /// Remembers what was read from the layers, unless ingest knows better by now.
    pub fn loaded(&mut self, rel: RelTag, blocks: Option<BlockNumber>, since: Lsn) {
        self.rels.entry(rel).or_insert(RelSize { blocks, since });
    }

    /// Forgets everything about relations when there is too much of it. Only between records:
    /// within one record, sizes that were loaded must stay.
    pub fn trim(&mut self) {
        if self.rels.len() > REL_SIZE_CACHE_ENTRIES_MAX {
            self.rels.clear();
            self.recent = Default::default();
        }
    }

    /// Size of an SLRU segment in blocks, `None` when it does not exist.
    pub fn slru(&self, kind: SlruKind, segment: u32) -> Option<BlockNumber> {
        self.slru.get(&(kind, segment)).copied()
    }

    /// Existing segments of an SLRU.
    pub fn slru_segments(&self, kind: SlruKind) -> Vec<u32> {
        self.slru.range((kind, 0)..=(kind, u32::MAX)).map(|((_, segment), _)| *segment).collect()
    }

    /// Remembers the size of an SLRU segment; `None` removes it.
    pub fn set_slru(&mut self, kind: SlruKind, segment: u32, blocks: Option<BlockNumber>) {
        match blocks {
            Some(blocks) => self.slru.insert((kind, segment), blocks),
            None => self.slru.remove(&(kind, segment)),
        };
    }

    /// How far a replication origin is known to be replayed.
    pub fn origin(&self, id: u16) -> Option<Lsn> {
        self.origins.get(&id).copied()
    }

    /// Remembers the position of a replication origin; `None` removes it.
    pub fn set_origin(&mut self, id: u16, remote_lsn: Option<Lsn>) {
        match remote_lsn {
            Some(lsn) => self.origins.insert(id, lsn),
            None => self.origins.remove(&id),
        };
    }
}

/// What a read has found of a fork: its size at any LSN from `from` to `until`.
#[derive(Clone, Copy, Debug)]
struct Found {
    rel: RelTag,
    from: Lsn,
    until: Lsn,
    /// `None` where the fork does not exist.
    blocks: Option<BlockNumber>,
}

/// Sizes that reads have found, some forks' last ones. History does not change, so nothing has to
/// be forgotten.
pub struct FoundSizes([Cell<Option<Found>>; FOUND_SIZES]);

impl Default for FoundSizes {
    fn default() -> Self {
        FoundSizes([const { Cell::new(None) }; FOUND_SIZES])
    }
}

impl FoundSizes {
    fn place(&self, rel: RelTag) -> Option<&Cell<Option<Found>>> {
        let number = rel.node.rel.wrapping_add(u32::from(rel.fork) << 3);
        self.0.get(number as usize % FOUND_SIZES)
    }

    /// The fork's size in blocks at `lsn`, if it is known; `Some(None)`: it does not exist.
    pub fn get(&self, rel: RelTag, lsn: Lsn) -> Option<Option<BlockNumber>> {
        let found = self.place(rel)?.get()?;
        let fits = found.rel == rel && (found.from..=found.until).contains(&lsn);
        fits.then_some(found.blocks)
    }

    /// The size at `lsn`, which has not changed since `from`.
    pub fn put(&self, rel: RelTag, (from, lsn): (Lsn, Lsn), blocks: Option<BlockNumber>) {
        let Some(place) = self.place(rel) else { return };
        let same = place.get().filter(|found| found.rel == rel && found.from == from);
        let until = same.map_or(lsn, |found| found.until.max(lsn));
        place.set(Some(Found { rel, from, until, blocks }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::RelNode;

    #[test]
    fn a_size_is_known_for_the_lsns_between_which_it_was_found() {
        let found = FoundSizes::default();
        let rel = |rel| RelNode { spc: 1663, db: 5, rel }.fork(0);
        let lsns = || (8..34).map(Lsn);
        let known = |rel| lsns().filter_map(|lsn| found.get(rel, lsn)).collect::<Vec<_>>();
        found.put(rel(1), (Lsn(10), Lsn(12)), Some(7));
        found.put(rel(2), (Lsn(9), Lsn(9)), None);
        assert_eq!((known(rel(1)), known(rel(2))), (vec![Some(7); 3], vec![None]));
        assert_eq!(found.get(rel(1), Lsn(10)).and(found.get(rel(1), Lsn(12))), Some(Some(7)));
        // Later and earlier than before.
        found.put(rel(1), (Lsn(10), Lsn(15)), Some(7));
        found.put(rel(1), (Lsn(10), Lsn(11)), Some(7));
        assert_eq!(known(rel(1)), [Some(7); 6]);
        // Another size, and a fork at the same place.
        found.put(rel(1), (Lsn(20), Lsn(21)), Some(8));
        assert_eq!(known(rel(1)), [Some(8); 2]);
        found.put(rel(1 + FOUND_SIZES as u32), (Lsn(20), Lsn(21)), Some(9));
        assert_eq!((known(rel(1)), known(rel(1).node.fork(1))), (vec![], vec![]));
    }

    #[test]
    fn sizes_are_those_of_the_table_however_they_are_found() {
        let mut sizes = Sizes::default();
        let mut twin: BTreeMap<RelTag, RelSize> = BTreeMap::new();
        let mut random = 1u64;
        for n in 0..50_000u64 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bits = (random >> 33) as u32;
            let node = RelNode { spc: 1663, db: bits >> 8 & 1, rel: bits >> 4 & 15 };
            let rel = node.fork((bits >> 9 & 3) as u8);
            let size = RelSize { blocks: (bits & 15 > 1).then_some(bits >> 12), since: Lsn(n) };
            match bits % 5 {
                0 => {
                    sizes.set_rel(rel, size.blocks, size.since);
                    twin.insert(rel, size);
                }
                1 => {
                    sizes.loaded(rel, size.blocks, size.since);
                    twin.entry(rel).or_insert(size);
                }
                _ => assert_eq!(sizes.rel(rel), twin.get(&rel).copied()),
            }
        }
        for rel in 0..=REL_SIZE_CACHE_ENTRIES_MAX as u32 {
            sizes.set_rel(RelNode { spc: 1, db: 1, rel }.fork(0), Some(rel), Lsn(1));
        }
        sizes.trim();
        assert!(twin.keys().all(|rel| sizes.rel(*rel).is_none()));
        assert_eq!(sizes.rel(RelNode { spc: 1, db: 1, rel: 7 }.fork(0)), None);
    }
}
