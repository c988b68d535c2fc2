//! Hand-made pages and records: what each kind of record does, and that nothing panics. That the
//! pages equal PostgreSQL's is proved on real WAL (`tests/native_redo.rs`).

use bytes::Bytes;
use proptest::prelude::*;

use super::page::{Add, HAS_FREE_LINES, Line, LineState, bounds, init, item, line, lines};
use super::*;
use crate::base::RelNode;
use crate::base::page::PAGE_SIZE;
use crate::base::wal_record::wal_record_crc;

mod btree;
mod heap;
mod pages;
mod run;

const REL: RelTag = RelTag { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: 0 };
const XID: u32 = 700;
const HINTS_OFF: RedoSettings = RedoSettings { hint_bits_logged: false };

/// A record in the making.
#[derive(Clone)]
struct Make {
    rmgr: u8,
    info: u8,
    blocks: Vec<(u8, u32, bool, Vec<u8>)>,
    main: Vec<u8>,
}

fn make(rmgr: u8, info: u8, main: &[u8]) -> Make {
    Make { rmgr, info, blocks: Vec::new(), main: main.to_vec() }
}

impl Make {
    /// A block that is changed.
    fn block(mut self, id: u8, block: u32, data: &[u8]) -> Make {
        self.blocks.push((id, block, false, data.to_vec()));
        self
    }

    /// A block that is made anew.
    fn fresh(mut self, id: u8, block: u32, data: &[u8]) -> Make {
        self.blocks.push((id, block, true, data.to_vec()));
        self
    }

    fn bytes(&self) -> Bytes {
        let mut bytes = vec![0; 24];
        for (id, block, fresh, data) in &self.blocks {
            let flags = if *fresh { 0x40 } else { 0 } | if data.is_empty() { 0 } else { 0x20 };
            bytes.extend_from_slice(&[*id, flags]);
            bytes.extend_from_slice(&(data.len() as u16).to_le_bytes());
            for number in [1663, 5, 16384, *block] {
                bytes.extend_from_slice(&number.to_le_bytes());
            }
        }
        bytes.extend_from_slice(&[255, self.main.len() as u8]);
        for (_, _, _, data) in &self.blocks {
            bytes.extend_from_slice(data);
        }
        bytes.extend_from_slice(&self.main);
        let len = bytes.len() as u32;
        bytes[0..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..8].copy_from_slice(&XID.to_le_bytes());
        (bytes[16], bytes[17]) = (self.info, self.rmgr);
        let crc = wal_record_crc(&bytes).unwrap();
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        bytes.into()
    }

    /// Applies the record to the page of block 7.
    fn apply(&self, page: &mut Page, lsn: u64) -> Result<Applied, NotNative> {
        apply_bytes(page, &self.bytes(), (REL, 7), Lsn(lsn), &HINTS_OFF)
    }

    fn changes(&self, page: &mut Page, lsn: u64) {
        assert_eq!(self.apply(page, lsn), Ok(Applied::Changed));
        assert_eq!(page_lsn(&page[..]), Lsn(lsn));
    }

    fn misfits(&self, page: &Page) {
        let result = self.apply(&mut page.clone(), u64::MAX);
        assert!(matches!(result, Err(NotNative::Misfit(_))), "{result:?}");
    }
}

fn u16s(numbers: &[u16]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn u32s(numbers: &[u32]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

fn items(page: &Page) -> Vec<Vec<u8>> {
    let each = |number| item(page, line(page, number).unwrap(), 0);
    (1..=lines(page).unwrap()).map(|number| each(number).unwrap_or_default().to_vec()).collect()
}

/// An image of a page that is to be applied, without hole or compression, in an `XLOG_FPI`.
fn image_record(page: &Page) -> Bytes {
    let mut bytes = vec![0; 24];
    bytes.extend_from_slice(&[0, 0x10, 0, 0, 0, 32, 0, 0, 0x02]);
    for number in [1663, 5, 16384, 7u32] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(page);
    let len = bytes.len() as u32;
    bytes[0..4].copy_from_slice(&len.to_le_bytes());
    (bytes[16], bytes[17]) = (XLOG_FPI, rmgr_id::XLOG);
    bytes.into()
}

#[test]
fn an_image_is_the_page_but_for_its_lsn() {
    let mut image = [0; PAGE_SIZE];
    init(&mut image, 8).unwrap();
    image[5000..5010].fill(3);
    image[8] = 9;
    let mut page = [0xEE; PAGE_SIZE];
    let record = image_record(&image);
    let done = apply_bytes(&mut page, &record, (REL, 7), Lsn(0x1_0000_0050), &HINTS_OFF);
    assert_eq!(done, Ok(Applied::Changed));
    set_page_lsn(&mut image[..], Lsn(0x1_0000_0050));
    assert_eq!(page, image);
    let empty = image_record(&[0; PAGE_SIZE]);
    let done = apply_bytes(&mut page, &empty, (REL, 7), Lsn(80), &HINTS_OFF);
    assert_eq!((done, page), (Ok(Applied::Changed), [0; PAGE_SIZE]), "a new page has no LSN");
}

#[test]
fn common_rules() {
    let insert = heap::insert(1, 0);
    let mut new = [0; PAGE_SIZE];
    assert_eq!(insert.apply(&mut new, 90), Ok(Applied::Skipped), "a new page is left alone");
    assert_eq!(new, [0; PAGE_SIZE]);
    let mut page = heap::page();
    set_page_lsn(&mut page[..], Lsn(100));
    let before = page;
    assert_eq!(heap::insert(3, 0).apply(&mut page, 100), Ok(Applied::Skipped));
    assert_eq!(page, before, "the page has seen the record");
    heap::insert(3, 0).changes(&mut page, 101);
    let other = heap::insert(3, 0).bytes();
    let done = apply_bytes(&mut page, &other, (REL, 8), Lsn(300), &HINTS_OFF);
    assert_eq!(done, Ok(Applied::Skipped), "another block");
    // Marks that contradict the kind of record.
    let mut marked = heap::insert(1, 0);
    marked.blocks[0].2 = true;
    marked.misfits(&page);
    let mut unmarked = heap::insert(1, 0);
    unmarked.info |= 0x80;
    unmarked.misfits(&page);
    let twice = heap::insert(4, 0).block(1, 7, b"x");
    twice.misfits(&page);
}

#[test]
fn foreign_kinds_are_refused_before_the_page_is_touched() {
    for rmgr in [rmgr_id::HASH, rmgr_id::GIN, rmgr_id::GIST, rmgr_id::SPGIST, rmgr_id::XACT, 130] {
        let record = make(rmgr, 0x30, b"main").block(0, 7, b"data").bytes();
        let (mut page, before) = (heap::page(), heap::page());
        let done = apply_bytes(&mut page, &record, (REL, 7), Lsn(900), &HINTS_OFF);
        assert_eq!(done, Err(NotNative::Unsupported { rmid: rmgr, info: 0x30 }));
        assert_eq!(page, before);
        assert!(is_foreign(&record, (REL, 7)));
    }
}

#[test]
fn sequences_and_generic_records() {
    let tuple = [5; 41];
    let main = [&[0; 12][..], &tuple].concat();
    let mut page = [7; PAGE_SIZE];
    make(rmgr_id::SEQ, 0, &main).fresh(0, 7, b"").changes(&mut page, 400);
    assert_eq!(items(&page), [tuple]);
    assert_eq!(page[PAGE_SIZE - 8..], [0x17, 0x17, 0, 0, 0, 0, 0, 0]);
    make(rmgr_id::SEQ, 0, b"short").fresh(0, 7, b"").misfits(&page);
    make(rmgr_id::SEQ, 0x10, &main).fresh(0, 7, b"").misfits(&page);

    let delta = [u16s(&[8140, 3]), vec![1, 2, 3], u16s(&[100, 1]), vec![9]].concat();
    page[100..300].fill(8);
    make(rmgr_id::GENERIC, 0, b"").block(0, 7, &delta).changes(&mut page, 500);
    assert_eq!(page[8140..8143], [1, 2, 3]);
    assert!(page[100..300].iter().all(|byte| *byte == 0), "the hole is zeros");
    for cut in 1..4 {
        make(rmgr_id::GENERIC, 0, b"").block(0, 7, &delta[..cut]).misfits(&page);
    }
    let beyond = [u16s(&[8190, 3]), vec![1, 2, 3]].concat();
    make(rmgr_id::GENERIC, 0, b"").block(0, 7, &beyond).misfits(&page);
    let header = [u16s(&[12, 2]), u16s(&[8000])].concat();
    make(rmgr_id::GENERIC, 0, b"").block(0, 7, &header).changes(&mut page.clone(), 600);
    let header = [u16s(&[12, 2]), u16s(&[9000])].concat();
    make(rmgr_id::GENERIC, 0, b"").block(0, 7, &header).misfits(&page);
}

#[test]
fn brin() {
    const BRIN: u8 = rmgr_id::BRIN;
    let mut meta = [1; PAGE_SIZE];
    let create = [u32s(&[128]), u16s(&[1])].concat();
    make(BRIN, 0, &create).fresh(0, 7, b"").changes(&mut meta, 10);
    assert_eq!(meta[24..40], u32s(&[0xA810_9CFA, 1, 128, 0])[..]);
    assert_eq!(meta[PAGE_SIZE - 2..], [0x91, 0xF0]);
    make(BRIN, 0x40, &u32s(&[3])).block(0, 7, b"").fresh(1, 8, b"").changes(&mut meta, 20);
    assert_eq!(meta[36..40], [3, 0, 0, 0]);

    let mut page = [1; PAGE_SIZE];
    let insert = [u32s(&[256, 128]), u16s(&[1])].concat();
    make(BRIN, 0x90, &insert).fresh(0, 7, &[6; 20]).block(1, 8, b"").changes(&mut page, 30);
    assert_eq!(items(&page), [[6; 20]]);
    make(BRIN, 0x30, &u16s(&[1])).block(0, 7, &[7; 40]).changes(&mut page, 40);
    assert_eq!(items(&page), [[7; 40]]);
    make(BRIN, 0x30, &u16s(&[2])).block(0, 7, &[7; 40]).misfits(&page);
    make(BRIN, 0x30, &u16s(&[1])).block(0, 7, &[7; 8200]).misfits(&page);
    let update = [u16s(&[1, 0]), insert.clone()].concat();
    let update = make(BRIN, 0x20, &update).block(0, 8, b"t").block(1, 9, b"").block(2, 7, b"");
    update.changes(&mut page, 50);
    assert_eq!(items(&page).len(), 0, "the last line pointer goes with its item");

    let mut map = [0; PAGE_SIZE];
    make(BRIN, 0x40, &u32s(&[7])).block(0, 8, b"").fresh(1, 7, b"").changes(&mut map, 10);
    make(BRIN, 0x10, &insert).block(0, 0x0102_0304, b"t").block(1, 7, b"").changes(&mut map, 20);
    assert_eq!(map[24 + 12..24 + 18], [2, 1, 4, 3, 1, 0]);
    let forget = [u32s(&[128, 256]), u16s(&[1])].concat();
    make(BRIN, 0x50, &forget).block(0, 7, b"").changes(&mut map, 30);
    assert_eq!(map[24 + 12..24 + 18], [255, 255, 255, 255, 0, 0]);
    let no_pages = [u32s(&[0, 256]), u16s(&[1])].concat();
    make(BRIN, 0x50, &no_pages).block(0, 7, b"").misfits(&map);
    make(BRIN, 0x60, b"").block(0, 7, b"").misfits(&map);
    make(BRIN, 0x30, &u16s(&[1])).block(1, 7, b"").misfits(&map);
}

/// Both ways to look at a record agree, and lead to the same page.
#[test]
fn plain_records_are_seen_as_taken_apart_ones() {
    let record = heap::insert(3, 1).block(1, 70, b"other").block(4, 80, b"");
    let bytes = record.bytes();
    let whole = Record::parse(&bytes).unwrap();
    let Found::View(lean) = view::find(&bytes, REL, 7) else { panic!("not found") };
    let full = View::of(&whole, &whole.blocks[0]);
    assert_eq!((lean.data, lean.main, lean.id), (full.data, full.main, full.id));
    assert_eq!((lean.rmgr, lean.info, lean.xid), (full.rmgr, full.info, full.xid));
    assert_eq!((lean.number, lean.will_init), (full.number, full.will_init));
    for id in 0..10 {
        assert_eq!(lean.other_block(id), full.other_block(id));
    }
    assert_eq!((lean.other_block(1), lean.other_block(4)), (Some(70), Some(80)));
    assert!(matches!(view::find(&bytes, REL, 8), Found::Absent));
    for cut in 0..bytes.len() {
        assert!(matches!(view::find(&bytes[..cut], REL, 7), Found::Other), "{cut}");
    }
    let image = image_record(&[0; PAGE_SIZE]);
    assert!(matches!(view::find(&image, REL, 7), Found::Other));
    assert!(!is_foreign(&image, (REL, 7)));
    let mut for_comparison = image.to_vec();
    for_comparison[24 + 8] = 0;
    let for_comparison = Bytes::from(for_comparison);
    assert!(is_foreign(&for_comparison, (REL, 7)), "the child compares");
    let done = apply_bytes(&mut heap::page(), &for_comparison, (REL, 7), Lsn(99), &HINTS_OFF);
    assert!(matches!(done, Err(NotNative::Unsupported { .. })));
}

fn any_page() -> impl Strategy<Value = Box<Page>> {
    let line = (24u16..8192, 0u32..4, 0u32..300);
    let lines = proptest::collection::vec(line, 0..40);
    (lines, any::<u16>(), any::<bool>(), any::<[u8; 32]>()).prop_map(
        |(found, upper, sane, fill)| {
            let mut page = Box::new([0; PAGE_SIZE]);
            for (at, byte) in page.iter_mut().enumerate() {
                *byte = fill[at % 32].wrapping_mul((at / 32) as u8);
            }
            let lower = 24 + 4 * found.len() as u16;
            let upper = if sane { lower + upper % (8176 - lower) } else { upper };
            let header = [lower, if sane { upper & !7 } else { upper }, 8176, 8196];
            page[12..20].copy_from_slice(&u16s(&header));
            page[0..8].fill(0);
            for (index, (offset, state, len)) in found.into_iter().enumerate() {
                let offset = if sane { offset & !7 } else { offset };
                let word = u32::from(offset) | state << 15 | len << 17;
                page[24 + 4 * index..28 + 4 * index].copy_from_slice(&word.to_le_bytes());
            }
            page
        },
    )
}

/// Small numbers mostly, as offsets and counts are.
fn any_data() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => 0u8..4, 2 => 4u8..64, 1 => any::<u8>()];
    proptest::collection::vec(byte, 0..90)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn no_input_panics(
        mut page in any_page(),
        rmgr in prop_oneof![Just(9u8), Just(10), Just(11), Just(15), Just(17), Just(20), 0u8..22],
        info in 0u8..16,
        main in any_data(),
        blocks in proptest::collection::vec((any_data(), any::<bool>()), 1..5),
        target in 0usize..5,
    ) {
        let target = target % blocks.len();
        let mut record = make(rmgr, info << 4, &main);
        for (id, (data, fresh)) in blocks.into_iter().enumerate() {
            let block = if id == target { 7 } else { id as u32 };
            record.blocks.push((id as u8, block, fresh, data));
        }
        let _ = record.apply(&mut page, 5000);
    }
}
