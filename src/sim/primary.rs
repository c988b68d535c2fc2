//! The simulated primary: makes WAL of many kinds from a seed and knows what every page must
//! look like at every LSN.
//!
//! Its idea of redo is [`mix`]: a page after a record is a hash of the page before, of what the
//! record has for it, and of the record's LSN. So a record that is missing, doubled, out of order
//! or applied to the wrong base changes the page, and the oracle needs no PostgreSQL.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::wal::{BlockName, Body, WalWriter};
use crate::base::checksum::{crc32c, crc32c_append};
use crate::base::page::{PAGE_SIZE, set_page_lsn};
use crate::base::{Lsn, RelNode, RelTag, Timestamp};
use crate::wal::record::{BlockRef, Record};

const RMGR_XLOG: u8 = 0;
const RMGR_XACT: u8 = 1;
const RMGR_SMGR: u8 = 2;
const RMGR_DBASE: u8 = 4;
const RMGR_HEAP: u8 = 10;
const XLOG_FPI: u8 = 0xB0;
const XACT_COMMIT: u8 = 0x00;
const SMGR_TRUNCATE: u8 = 0x20;
const DBASE_CREATE_FILE_COPY: u8 = 0x00;
const HEAP_INSERT: u8 = 0x00;
const HEAP_UPDATE: u8 = 0x20;
const HEAP_INIT_PAGE: u8 = 0x80;
/// Relations and blocks of each, unless a test wants fewer.
const RELATIONS: u64 = 4;
const BLOCKS: u64 = 24;
/// The database that there is from the beginning, and how many its copies may be.
const DATABASE: u32 = 5;
const COPIES: u32 = 2;

/// The page of block `target` after applying `record`, which ends at `lsn`. As in PostgreSQL, redo
/// looks at all of the record but the data of other blocks; what is initialised, at that too.
pub fn mix(page: Option<&[u8]>, lsn: Lsn, record: &[u8], (rel, number): (RelTag, u32)) -> Vec<u8> {
    let record = Record::parse(record).expect("a record of the simulated primary");
    let header = &record.header;
    let mut seen = Vec::new();
    seen.extend_from_slice(&header.xid.to_le_bytes());
    seen.extend_from_slice(&header.prev.0.to_le_bytes());
    seen.extend_from_slice(&[header.info, header.rmgr]);
    for block in &record.blocks {
        let BlockRef { id, rel: RelTag { node, fork }, block: place, will_init, .. } = *block;
        for field in [node.spc, node.db, node.rel, place] {
            seen.extend_from_slice(&field.to_le_bytes());
        }
        seen.extend_from_slice(&[id, fork, u8::from(will_init)]);
        if will_init || block.rel == rel && place == number {
            seen.extend_from_slice(block.data);
        }
    }
    seen.extend_from_slice(record.main_data);
    let before = page.map_or(0, crc32c);
    let hash = crc32c_append(crc32c_append(before, &seen), &lsn.0.to_le_bytes());
    let mut out = vec![0; PAGE_SIZE];
    // Not by checksums of checksums: in the checksum of the page these cancel out.
    let mut content = fastrand::Rng::with_seed(hash.into());
    content.fill(out.get_mut(..256).unwrap_or_default());
    set_page_lsn(&mut out, lsn);
    out
}

/// Versions of one fork: sizes and pages by LSN.
#[derive(Default)]
struct Fork {
    sizes: BTreeMap<Lsn, u32>,
    pages: BTreeMap<(u32, Lsn), Bytes>,
}

/// See the module's text.
pub struct Primary {
    wal: WalWriter,
    forks: BTreeMap<RelTag, Fork>,
    /// Ends of the records, ascending.
    ends: Vec<Lsn>,
    /// Commits by ascending LSN.
    commits: Vec<(Lsn, Timestamp)>,
    rng: fastrand::Rng,
    relations: u64,
    blocks: u64,
    bases: bool,
    /// Databases, the first one first.
    databases: Vec<u32>,
}

impl Primary {
    /// A primary whose WAL begins at `start`, a page boundary.
    pub fn new(seed: u64, start: Lsn, segment_bytes: u64, system_id: u64) -> Self {
        Primary {
            wal: WalWriter::new(start, segment_bytes, system_id),
            forks: BTreeMap::new(),
            ends: Vec::new(),
            commits: Vec::new(),
            rng: fastrand::Rng::with_seed(seed),
            relations: RELATIONS,
            blocks: BLOCKS,
            bases: true,
            databases: vec![DATABASE],
        }
    }

    /// From now on, only so many relations change, and they grow to about so many blocks each.
    pub fn narrow(&mut self, relations: u64, blocks: u64) {
        (self.relations, self.blocks) = (relations, blocks);
    }

    /// From now on, records only change pages that are there.
    pub fn without_bases(&mut self) {
        self.bases = false;
    }

    /// End of the WAL.
    pub fn end(&self) -> Lsn {
        self.wal.end()
    }

    /// WAL bytes from `from` on.
    pub fn read(&self, from: Lsn, len: usize) -> &[u8] {
        self.wal.read(from, len)
    }

    /// Ends of all records, ascending.
    pub fn record_ends(&self) -> &[Lsn] {
        &self.ends
    }

    /// All commits, by ascending LSN.
    pub fn commits(&self) -> &[(Lsn, Timestamp)] {
        &self.commits
    }

    /// Adds the record of a commit.
    pub fn commit(&mut self, time: Timestamp) {
        let xid = 1000 + self.ends.len() as u32 / 5;
        let main = time.to_postgres().to_le_bytes();
        let body = Body::default().finish(&main);
        let (_, end) = self.wal.append(xid, XACT_COMMIT, RMGR_XACT, &body);
        self.commits.push((end, time));
        self.ends.push(end);
    }

    /// All forks that ever were.
    pub fn forks(&self) -> Vec<RelTag> {
        self.forks.keys().copied().collect()
    }

    /// Size of a fork at an LSN.
    pub fn size_at(&self, rel: RelTag, lsn: Lsn) -> u32 {
        let sizes = self.forks.get(&rel).map(|fork| fork.sizes.range(..=lsn).next_back());
        sizes.flatten().map_or(0, |(_, size)| *size)
    }

    /// A page at an LSN, as the page service must give it: zeros past the end.
    pub fn page_at(&self, rel: RelTag, block: u32, lsn: Lsn) -> Bytes {
        let zeros = Bytes::from_static(&[0; PAGE_SIZE]);
        if block >= self.size_at(rel, lsn) {
            return zeros;
        }
        let version = self
            .forks
            .get(&rel)
            .and_then(|fork| fork.pages.range((block, Lsn(0))..=(block, lsn)).next_back());
        version.map_or(zeros, |(_, page)| page.clone())
    }

    /// Adds one record of a random kind.
    pub fn step(&mut self) {
        let db = match self.databases[..] {
            [only] => only,
            _ => self.databases[self.rng.usize(..self.databases.len())],
        };
        let rel = RelNode { spc: 1663, db, rel: 16384 + self.rng.u64(..self.relations) as u32 };
        let rel = rel.fork(0);
        let size = self.size_at(rel, Lsn::MAX);
        let xid = 1000 + self.ends.len() as u32 / 5;
        match self.rng.u8(..20) {
            _ if !self.bases && size >= 2 => self.update(rel, size, xid),
            0 => self.truncate(rel, size),
            1..4 => self.image(rel, size),
            4..8 if size >= 2 => self.update(rel, size, xid),
            _ => self.insert(rel, size, xid),
        }
    }

    fn pick_block(&mut self, size: u32) -> u32 {
        // Mostly blocks that exist, often the next one, sometimes a gap.
        match self.rng.u8(..10) {
            0 if u64::from(size) < self.blocks => size + self.rng.u32(..3),
            1..4 if u64::from(size) < self.blocks => size,
            _ if size > 0 => self.rng.u32(..size),
            _ => 0,
        }
    }

    fn image(&mut self, rel: RelTag, size: u32) {
        let block = self.pick_block(size);
        let mut page: Vec<u8> = vec![0; PAGE_SIZE];
        page[8..512].fill_with(|| self.rng.u8(1..));
        let body = Body::default().image(0, name(rel, block), &page).finish(&[]);
        let (_, end) = self.wal.append(0, XLOG_FPI, RMGR_XLOG, &body);
        set_page_lsn(&mut page, end);
        self.put(rel, block, end, page.into());
        self.ends.push(end);
    }

    fn insert(&mut self, rel: RelTag, size: u32, xid: u32) {
        let block = self.pick_block(size);
        let init = block >= size || self.rng.u8(..8) == 0;
        let data = self.data();
        let main = [1, 0, 0];
        let body = Body::default().block(0, name(rel, block), init, &data).finish(&main);
        let info = if init { HEAP_INSERT | HEAP_INIT_PAGE } else { HEAP_INSERT };
        self.append_to(xid, info, &body, &[(rel, block, init)]);
    }

    /// An update that moves a row from one block to another: two pages, one record.
    fn update(&mut self, rel: RelTag, size: u32, xid: u32) {
        let (new, old) = (self.rng.u32(..size), self.rng.u32(..size));
        let data = self.data();
        let mut body = Body::default().block(0, name(rel, new), false, &data);
        let mut touched = vec![(rel, new, false)];
        if old != new {
            body = body.block(1, name(rel, old), false, &[]);
            touched.push((rel, old, false));
        }
        let body = body.finish(&[0; 14]);
        self.append_to(xid, HEAP_UPDATE, &body, &touched);
    }

    fn truncate(&mut self, rel: RelTag, size: u32) {
        let blocks = self.rng.u32(..=size);
        let mut main = Vec::new();
        for number in [blocks, rel.node.spc, rel.node.db, rel.node.rel, 1] {
            main.extend_from_slice(&number.to_le_bytes());
        }
        let body = Body::default().finish(&main);
        let (_, end) = self.wal.append(0, SMGR_TRUNCATE | 0x01, RMGR_SMGR, &body);
        self.forks.entry(rel).or_default().sizes.insert(end, blocks);
        self.ends.push(end);
    }

    /// Adds the record of a database that is copied file by file, perhaps in the place of one.
    pub fn copy_database(&mut self) {
        let copy = DATABASE + 1 + self.rng.u32(..COPIES);
        let main: Vec<u8> =
            [copy, 1663, DATABASE, 1663].iter().flat_map(|number| number.to_le_bytes()).collect();
        let body = Body::default().finish(&main);
        let (_, end) = self.wal.append(0, DBASE_CREATE_FILE_COPY, RMGR_DBASE, &body);
        let of = |db: u32| self.forks().into_iter().filter(move |rel| rel.node.db == db);
        let (sources, targets): (Vec<RelTag>, Vec<RelTag>) =
            (of(DATABASE).collect(), of(copy).collect());
        for target in targets {
            self.forks.entry(target).or_default().sizes.insert(end, 0);
        }
        for source in sources {
            let blocks = self.size_at(source, end);
            let pages: Vec<Bytes> =
                (0..blocks).map(|block| self.page_at(source, block, end)).collect();
            let target = RelTag { node: RelNode { db: copy, ..source.node }, ..source };
            let fork = self.forks.entry(target).or_default();
            fork.sizes.insert(end, blocks);
            let versions = pages.into_iter().enumerate();
            fork.pages.extend(versions.map(|(block, page)| ((block as u32, end), page)));
        }
        if !self.databases.contains(&copy) {
            self.databases.push(copy);
        }
        self.ends.push(end);
    }

    fn data(&mut self) -> Vec<u8> {
        let len = if self.rng.u8(..20) == 0 { 9000 } else { self.rng.usize(8..200) };
        (0..len).map(|_| self.rng.u8(..)).collect()
    }

    fn append_to(&mut self, xid: u32, info: u8, body: &[u8], touched: &[(RelTag, u32, bool)]) {
        let (start, end) = self.wal.append(xid, info, RMGR_HEAP, body);
        let record = self.record_bytes(start, body.len());
        for &(rel, block, init) in touched {
            let before = (!init).then(|| self.page_at(rel, block, Lsn(end.0 - 1)));
            let page = mix(before.as_deref(), end, &record, (rel, block));
            self.put(rel, block, end, page.into());
        }
        self.ends.push(end);
    }

    /// The record that starts at `start`, without the page headers in between.
    fn record_bytes(&self, start: Lsn, body_bytes: usize) -> Vec<u8> {
        self.wal.record(start, 24 + body_bytes)
    }

    fn put(&mut self, rel: RelTag, block: u32, lsn: Lsn, page: Bytes) {
        let size = self.size_at(rel, Lsn::MAX);
        let fork = self.forks.entry(rel).or_default();
        if block >= size {
            for gap in size..block {
                fork.pages.insert((gap, lsn), Bytes::from_static(&[0; PAGE_SIZE]));
            }
            fork.sizes.insert(lsn, block + 1);
        }
        fork.pages.insert((block, lsn), page);
    }
}

fn name(rel: RelTag, block: u32) -> BlockName {
    BlockName { node: [rel.node.spc, rel.node.db, rel.node.rel], fork: rel.fork, block }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page shows every record that it was made of.
    #[test]
    fn a_record_that_is_missing_shows_in_all_later_pages() {
        let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(0);
        let mut wal = WalWriter::new(Lsn(1 << 24), 1 << 24, 1);
        let mut records = Vec::new();
        for data in 0..6u8 {
            let body = Body::default().block(0, name(rel, 0), false, &[data]).finish(&[1, 0, 0]);
            let (start, end) = wal.append(1000, HEAP_INSERT, RMGR_HEAP, &body);
            records.push((end, wal.record(start, 24 + body.len())));
        }
        let page = |missing: Option<usize>| {
            let base = Some(vec![7; PAGE_SIZE]);
            let taken = records.iter().enumerate().filter(|(at, _)| Some(*at) != missing);
            taken.fold(base, |page, (_, (lsn, record))| {
                Some(mix(page.as_deref(), *lsn, record, (rel, 0)))
            })
        };
        for missing in 0..records.len() {
            assert_ne!(page(Some(missing)), page(None), "record {missing}");
        }
    }
}
