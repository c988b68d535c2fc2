//! Hand-made records. That the pages are equal is proved on real WAL (`tests/native_redo.rs`).

use std::rc::Rc;
use std::sync::MutexGuard;

use futures_lite::future::block_on;

use super::*;
use crate::base::page::{PAGE_SIZE, Page, page_lsn};
use crate::base::{Lsn, RelNode};
use crate::redo::child::ChildRedo;
use crate::redo::child::tests::{insert, lock, settings};
use crate::redo::native::apply_bytes;
use crate::redo::record::tests::record;
use crate::redo::{Redo, RedoError, RedoRequest, RedoSettings};
use crate::sim::wal::{BlockName, Body};

const REL: RelTag = RelTag { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: 0 };
const NEW: u32 = 8;
const OLD: u32 = 7;
const PAGE: Page = [5; PAGE_SIZE];

fn name(block: u32) -> BlockName {
    BlockName { node: [1663, 5, 16384], fork: 0, block }
}

fn short(whole: &[u8], block: u32) -> Option<Bytes> {
    excerpt(whole, REL, block)
}

/// An update of tuple 1 of [`OLD`], whose new version is the third tuple of [`NEW`], or the first if
/// that page is made anew.
fn update(init: bool, new: &[u8]) -> Vec<u8> {
    let mut main = vec![0; 14];
    (main[0], main[4], main[12]) = (77, 1, if init { 1 } else { 3 });
    let body = Body::default().block(0, name(NEW), init, new).block(1, name(OLD), false, b"");
    let whole = record(10, if init { 0xA0 } else { 0x20 }, &body.finish(&main));
    with(&whole, |record| record.header.xid = 700).into()
}

/// A tuple as an update has it: infomask2, infomask, hoff, a byte of padding, the data.
fn tuple(len: usize) -> Vec<u8> {
    let mut data = vec![1, 0, 0, 8, 24, 0];
    data.resize(6 + len, 0xAB);
    data
}

/// The blocks of a record, without their relation: number, made anew, image, data.
fn blocks(record: &[u8]) -> Vec<(u32, bool, bool, usize)> {
    let record = Record::parse(record).unwrap();
    let each = |found: &BlockRef<'_>| {
        (found.block, found.will_init, found.image.is_some(), found.data.len())
    };
    record.blocks.iter().map(each).collect()
}

#[test]
fn other_blocks_lose_images_and_data() {
    let body = Body::default().block(0, name(NEW), false, &[1; 300]).image(1, name(OLD), &PAGE);
    let whole = record(10, 0x20, &body.block(2, name(9), false, &[2; 9]).finish(&[3; 14]));
    let new = short(&whole, NEW).unwrap();
    assert_eq!(
        blocks(&new),
        [(NEW, false, false, 300), (OLD, false, false, 0), (9, false, false, 0)]
    );
    let old = short(&whole, OLD).unwrap();
    assert_eq!(blocks(&old), [(NEW, false, false, 0), (OLD, false, true, 0), (9, false, false, 0)]);
    for made in [&new, &old] {
        check_crc(made).unwrap();
        let (made, whole) = (Record::parse(made).unwrap(), Record::parse(&whole).unwrap());
        assert_eq!(made.main_data, whole.main_data);
        assert_eq!((made.header.info, made.header.rmgr), (0x20, 10));
    }
    assert_eq!(new.len(), whole.len() - 8192 - 5 - 9 - 2 * 12, "two relations are the same");
    assert_eq!(short(&new, NEW), None, "there is nothing more to leave out");
    assert_eq!(short(&new, OLD).unwrap().len(), new.len() - 300);
    assert_eq!(short(&whole, 10), None, "a block that the record does not name");
    assert_eq!(excerpt(&whole, RelTag { fork: 1, ..REL }, NEW), None, "or of another fork");
}

#[test]
fn initialised_blocks_keep_their_data() {
    let body = Body::default().block(0, name(NEW), true, &[1; 300]).image(1, name(OLD), &PAGE);
    let whole = record(10, 0xA0, &body.finish(&[3; 14]));
    assert_eq!(
        blocks(&short(&whole, NEW).unwrap()),
        [(NEW, true, false, 300), (OLD, false, false, 0)]
    );
    let update = update(true, &[1; 300]);
    assert_eq!(blocks(&update), [(NEW, true, false, 300), (OLD, false, false, 0)]);
    for block in [NEW, OLD] {
        let made = short(&update, block);
        let same = made.is_none_or(|made| blocks(&made) == blocks(&update));
        assert!(same, "redo of the old page makes the new one too");
    }
}

#[test]
fn splits() {
    let split = |rmgr: u8, info: u8| {
        let body = Body::default()
            .block(0, name(7), false, &[1; 40])
            .block(1, name(8), true, &[2; 4000])
            .block(2, name(9), false, &[3; 30]);
        record(rmgr, info, &body.finish(&[4; 10]))
    };
    let data_of = |whole: &[u8], block: u32| -> Vec<usize> {
        blocks(&short(whole, block).unwrap()).iter().map(|(_, _, _, data)| *data).collect()
    };
    for info in [0x30, 0x40] {
        let btree = split(rmgr_id::BTREE, info);
        assert_eq!(data_of(&btree, 7), [40, 0, 0]);
        assert_eq!(data_of(&btree, 8), [0, 4000, 0]);
        assert_eq!(data_of(&btree, 9), [0, 0, 30]);
    }
    let gist = split(rmgr_id::GIST, 0x30);
    assert_eq!(data_of(&gist, 7), [40, 4, 0]);
    let again = short(&gist, 7).unwrap();
    assert_eq!(Record::parse(&again).unwrap().blocks[1].data, [0; 4]);
    assert_eq!(data_of(&gist, 8), [0, 4000, 0]);
    let root = split(rmgr_id::BTREE, 0xA0);
    assert_eq!(data_of(&root, 9), [0, 4000, 30], "a new root, say, keeps what it initialises");
}

#[test]
fn what_is_not_known_stays_whole() {
    for (rmgr, info) in [
        (rmgr_id::XLOG, 0xB0),
        (rmgr_id::HEAP, 0x00),
        (rmgr_id::HEAP, 0x40),
        (rmgr_id::HEAP2, 0x50),
        (rmgr_id::BTREE, 0x00),
        (rmgr_id::BTREE, 0xF0),
        (rmgr_id::GIN, 0x80),
        (rmgr_id::GIN, 0x40),
        (rmgr_id::HASH, 0x50),
        (rmgr_id::SEQ, 0x00),
        (rmgr_id::CUSTOM_MIN, 0x20),
    ] {
        let body = Body::default().block(0, name(7), false, &[1; 90]).image(1, name(8), &PAGE);
        let whole = record(rmgr, info, &body.finish(&[3; 14]));
        assert_eq!((short(&whole, 7), short(&whole, 8)), (None, None), "{rmgr} {info:02X}");
    }
    // Initialised, and with an image to be applied: PostgreSQL writes no such record.
    let body = Body::default().block(0, name(7), false, &[1; 90]).image(1, name(8), &PAGE);
    let mut body = body.finish(&[3; 14]);
    body[21] |= 0x40;
    let odd = record(10, 0x20, &body);
    assert_eq!(blocks(&odd)[1], (8, true, true, 0));
    assert_eq!(short(&odd, 7), None);
    let twice = Body::default().block(0, name(7), false, &[1; 90]).block(1, name(7), false, b"x");
    assert_eq!(short(&record(10, 0x20, &twice.finish(b"")), 7), None);
}

#[test]
fn damage_gets_no_good_checksum() {
    let whole = update(false, &tuple(50));
    assert!(short(&whole, OLD).is_some());
    for at in 0..whole.len() {
        for bit in 0..8 {
            let mut bad = whole.clone();
            bad[at] ^= 1 << bit;
            assert_eq!(short(&bad, OLD), None, "byte {at} bit {bit}");
        }
        assert_eq!(short(&whole[..at], OLD), None);
    }
}

#[test]
fn only_records_of_relations_change_their_form() {
    let whole = Bytes::from(update(false, &tuple(50)));
    let value = |record: &Bytes| Value::WalRecord { will_init: true, record: record.clone() };
    let made = stored_form(Key::rel_block(REL, OLD), value(&whole));
    assert_eq!(made, value(&short(&whole, OLD).unwrap()));
    for key in [Key::rel_block(REL, NEW), Key::rel_block(REL, 9), Key::rel_size(REL)] {
        assert_eq!(stored_form(key, value(&whole)), value(&whole));
    }
    let page = Value::Image(whole);
    assert_eq!(stored_form(Key::rel_block(REL, OLD), page.clone()), page);
}

/// Changes a record and gives it a right length and checksum again.
fn with<'a>(whole: &'a [u8], change: impl FnOnce(&mut Record<'a>)) -> Bytes {
    let mut record = Record::parse(whole).unwrap();
    change(&mut record);
    record.encode().unwrap().into()
}

/// Native redo and the wal-redo process, one record on one page.
struct Both {
    process: Rc<ChildRedo>,
    /// Other tests count the processes of the whole program.
    _alone: MutexGuard<'static, ()>,
}

impl Drop for Both {
    fn drop(&mut self) {
        block_on(self.process.shutdown());
    }
}

impl Both {
    fn new() -> Both {
        let _alone = lock();
        Both { process: Rc::new(ChildRedo::new(settings(false))), _alone }
    }

    fn native(block: u32, base: &Bytes, record: &Bytes) -> Option<Bytes> {
        const SETTINGS: RedoSettings = RedoSettings { hint_bits_logged: false };
        let mut page: Page = base[..].try_into().unwrap();
        apply_bytes(&mut page, record, (REL, block), Lsn(0x9000), &SETTINGS).ok()?;
        Some(Bytes::copy_from_slice(&page))
    }

    fn child(&self, block: u32, base: &Bytes, record: &Bytes) -> Result<Bytes, RedoError> {
        let records = vec![(Lsn(0x9000), record.clone())];
        block_on(self.process.redo(RedoRequest {
            rel: REL,
            block,
            base: Some(base.clone()),
            records,
        }))
    }
}

/// A page with two tuples.
fn page(block: u32) -> Bytes {
    let mut page = [0; PAGE_SIZE];
    for line in 1..=2 {
        let record = insert(block, line, line == 1, 0xABCD_0000);
        let lsn = Lsn(0x1000 + u64::from(line));
        let settings = RedoSettings { hint_bits_logged: false };
        apply_bytes(&mut page, &record, (REL, block), lsn, &settings).unwrap();
    }
    Bytes::copy_from_slice(&page)
}

/// Both ways, whole and short; then what each planted mistake comes to.
#[test]
fn updates_are_equal_and_mistakes_are_not() {
    let both = Both::new();
    let whole = Bytes::from(update(false, &tuple(50)));
    for block in [NEW, OLD] {
        let base = page(block);
        let wanted = both.child(block, &base, &whole).unwrap();
        assert_eq!(page_lsn(&wanted), Lsn(0x9000));
        assert_eq!(Both::native(block, &base, &whole), Some(wanted.clone()));
        let short = short(&whole, block).unwrap_or_else(|| whole.clone());
        assert!(block == NEW || short.len() < whole.len());
        assert_eq!(both.child(block, &base, &short).unwrap(), wanted);
        assert_eq!(Both::native(block, &base, &short), Some(wanted.clone()));
    }
    // The wanted block's own data.
    let wrong = with(&whole, |record| record.blocks[0].data = &[]);
    let base = page(NEW);
    assert_ne!(Both::native(NEW, &base, &wrong), both.child(NEW, &base, &whole).ok());
    assert_ne!(both.child(NEW, &base, &wrong).ok(), both.child(NEW, &base, &whole).ok());
    // The number of the other block: the old version points to it.
    let wrong = with(&whole, |record| record.blocks[0].block += 1);
    let base = page(OLD);
    assert_ne!(Both::native(OLD, &base, &wrong), both.child(OLD, &base, &whole).ok());
    assert_ne!(both.child(OLD, &base, &wrong).ok(), both.child(OLD, &base, &whole).ok());
}

/// Why pages that a record initialises keep their data: PostgreSQL makes them for every page.
#[test]
fn an_initialised_page_needs_its_data() {
    let both = Both::new();
    let whole = Bytes::from(update(true, &tuple(50)));
    let base = page(OLD);
    let wanted = both.child(OLD, &base, &whole).unwrap();
    assert_eq!(Both::native(OLD, &base, &whole), Some(wanted.clone()));
    let wrong = with(&whole, |record| record.blocks[0].data = &[]);
    assert_eq!(Both::native(OLD, &base, &wrong), Some(wanted), "native redo does not look at it");
    assert!(both.child(OLD, &base, &wrong).is_err());
    // A crash of one process is not the end.
    both.child(OLD, &base, &whole).unwrap();
}

/// PostgreSQL insists on the images of a GIN split, but not on what is in them.
#[test]
fn a_gin_split_has_blank_images() {
    let both = Both::new();
    let pages = [page(1), page(2), page(3)];
    let mut body = Body::default();
    for (id, page) in pages.iter().enumerate() {
        body = body.image(id as u8, name(id as u32), page);
    }
    // A split of the root, which is a leaf (`ginxlogSplit`).
    let mut main = [0; 28];
    main[24] = 0x02 | 0x04;
    let whole = Bytes::from(record(rmgr_id::GIN, 0x30, &body.finish(&main)));
    for (block, before) in (0..).zip(&pages) {
        let wanted = both.child(block, before, &whole).unwrap();
        assert_eq!(wanted[8..], before[8..], "the image, with the LSN of the record");
        let made = short(&whole, block).unwrap();
        assert!(made.len() < 8192 + 200, "{}", made.len());
        assert_eq!(both.child(block, before, &made).unwrap(), wanted);
        assert_eq!(Both::native(block, before, &made), Some(wanted));
        let other = usize::from(block == 0);
        let wrong = with(&made, |record| record.blocks[other].image = None);
        assert!(matches!(both.child(block, before, &wrong), Err(RedoError::Refused { .. })));
        let wrong = with(&made, |record| record.blocks[block as usize].image = None);
        assert!(both.child(block, before, &wrong).is_err());
    }
}
