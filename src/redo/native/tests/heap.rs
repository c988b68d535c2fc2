//! Heap records.

use super::*;

const HEAP: u8 = rmgr_id::HEAP;
const HEAP2: u8 = rmgr_id::HEAP2;

/// Logged header (infomask2 2, infomask 0x0902, hoff 24) and what follows a tuple's header.
fn tuple(data: &[u8]) -> Vec<u8> {
    [&[2, 0, 2, 9, 24, 0][..], data].concat()
}

pub(super) fn insert(number: u16, flags: u8) -> Make {
    let main = [u16s(&[number]), vec![flags]].concat();
    make(HEAP, 0, &main).block(0, 7, &tuple(&[number as u8; 10]))
}

/// A page with two tuples of 10 bytes of data.
pub(super) fn page() -> Page {
    let mut page = [0xAA; PAGE_SIZE];
    let first = insert(1, 0);
    let data = first.blocks[0].3.clone();
    make(HEAP, 0x80, &first.main).fresh(0, 7, &data).changes(&mut page, 10);
    insert(2, 0).changes(&mut page, 20);
    page
}

fn field(page: &Page, number: usize, at: usize) -> u32 {
    let found = line(page, number).unwrap();
    super::super::page::u32_at(page, found.offset + at).unwrap()
}

fn mask(page: &Page, number: usize) -> (u16, u16) {
    let found = line(page, number).unwrap();
    let at = |at| super::super::page::u16_at(page, found.offset + at).unwrap();
    (at(18), at(20))
}

#[test]
fn inserted_tuples() {
    let page = page();
    let mut expected = [0; PAGE_SIZE];
    init(&mut expected, 0).unwrap();
    set_page_lsn(&mut expected[..], Lsn(20));
    expected[12..16].copy_from_slice(&u16s(&[32, 8112]));
    expected[24..32]
        .copy_from_slice(&u32s(&[8152 | 1 << 15 | 34 << 17, 8112 | 1 << 15 | 34 << 17]));
    for (at, number) in [(8152, 1), (8112, 2u8)] {
        expected[at..at + 4].copy_from_slice(&XID.to_le_bytes());
        expected[at + 12..at + 18].copy_from_slice(&[0, 0, 7, 0, number, 0]);
        expected[at + 18..at + 23].copy_from_slice(&[2, 0, 2, 9, 24]);
        expected[at + 24..at + 34].fill(number);
    }
    assert_eq!(page, expected);
    for number in [0, 1, 2, 4, 300, u16::MAX] {
        insert(number, 0).misfits(&page);
    }
    insert(3, 0).changes(&mut page.clone(), 30);
    make(HEAP, 0, &[3, 0]).block(0, 7, &tuple(b"x")).misfits(&page);
    make(HEAP, 0, &[3, 0, 0]).block(0, 7, &[1, 2, 3]).misfits(&page);
    make(HEAP, 0, &[3, 0, 0]).block(0, 7, &tuple(&[0; 8080])).misfits(&page);
    make(HEAP, 0, &[3, 0, 0]).block(1, 7, &tuple(b"x")).misfits(&page);
}

#[test]
fn several_inserted_tuples() {
    let logged = |data: &[u8]| [&(data.len() as u16 + 1).to_le_bytes(), &tuple(data)[..]].concat();
    // The second tuple begins at an odd place, so a byte of padding stands before it.
    let data = [logged(b"abc"), vec![0xFF], logged(b"defgh")].concat();
    assert_eq!(logged(b"abc").len() % 2, 1);
    let mut page = [0; PAGE_SIZE];
    let fresh = make(HEAP2, 0xD0, &[0x20, 0, 2, 0]).fresh(0, 7, &data);
    fresh.changes(&mut page, 10);
    let tuples = items(&page);
    assert_eq!((&tuples[0][24..], &tuples[1][24..]), (&b"abc"[..], &b"defgh"[..]));
    assert_eq!(page[10] & 4, 4, "all tuples are frozen, hence visible");
    let more = [&[1, 0, 2, 0][..], &u16s(&[3, 4])].concat();
    make(HEAP2, 0x50, &more).block(0, 7, &data).changes(&mut page, 20);
    assert_eq!((items(&page).len(), page[10] & 4), (4, 0));
    make(HEAP2, 0x50, &more).block(0, 7, &data).misfits(&page);
    let gap = [&[1, 0, 2, 0][..], &u16s(&[5, 7])].concat();
    make(HEAP2, 0x50, &gap).block(0, 7, &data).misfits(&page);
    let cut = [&[1, 0, 2, 0][..], &u16s(&[5])].concat();
    make(HEAP2, 0x50, &cut).block(0, 7, &data).misfits(&page);
    let next = [&[1, 0, 2, 0][..], &u16s(&[5, 6])].concat();
    make(HEAP2, 0x50, &next).block(0, 7, &data[..data.len() - 1]).misfits(&page);
    make(HEAP2, 0x50, &next).block(0, 7, &[&data[..], b"x"].concat()).misfits(&page);
}

#[test]
fn deleted_tuples() {
    let delete = |number: u16, infobits: u8, flags: u8| {
        let main = [u32s(&[XID + 1]), u16s(&[number]), vec![infobits, flags]].concat();
        make(HEAP, 0x10, &main).block(0, 7, b"")
    };
    let mut page = page();
    page[10] |= 4;
    delete(2, 0x10, 1).changes(&mut page, 30);
    assert_eq!(field(&page, 2, 4), XID + 1);
    assert_eq!(mask(&page, 2), (2 | 0x2000, 0x0102), "xmax counts, and the key is gone");
    assert_eq!(field(&page, 2, 12), 7 << 16);
    assert_eq!((page[10] & 4, &page[20..24]), (0, &XID.to_le_bytes()[..]));
    delete(1, 0, 8 | 16).changes(&mut page, 40);
    assert_eq!((field(&page, 1, 0), field(&page, 1, 12)), (0, u32::MAX), "moved, super-deleted");
    for number in [0, 3, u16::MAX] {
        delete(number, 0, 0).misfits(&page);
    }
    make(HEAP, 0x10, &[0; 7]).block(0, 7, b"").misfits(&page);
}

fn update(info: u8, old: u16, new: u16, flags: u8) -> Make {
    let main =
        [u32s(&[XID + 2]), u16s(&[old]), vec![0x10, flags], u32s(&[0]), u16s(&[new])].concat();
    make(HEAP, info, &main)
}

#[test]
fn updated_tuples() {
    let mut page = page();
    // Three bytes of the old tuple's begin, two of its end, "mid" between.
    let data = [u16s(&[3, 2]), tuple(b"mid")].concat();
    update(0x40, 2, 3, 0x60).block(0, 7, &data).changes(&mut page, 30);
    assert_eq!(items(&page)[2][24..], [2, 2, 2, b'm', b'i', b'd', 2, 2]);
    assert_eq!(mask(&page, 2).0, 2 | 0x2000 | 0x4000);
    assert_eq!((field(&page, 2, 12), field(&page, 3, 12)), (7 << 16, 7 << 16));
    let other = update(0x20, 1, 9, 0).block(0, 8, &tuple(b"new")).block(1, 7, b"");
    other.changes(&mut page, 40);
    assert_eq!((field(&page, 1, 12), mask(&page, 1).0), (8 << 16, 2 | 0x2000));
    let new = update(0x20, 9, 4, 2).block(0, 7, &tuple(b"new")).block(1, 8, b"");
    new.changes(&mut page, 50);
    assert_eq!(items(&page)[3][24..], *b"new");

    update(0x20, 9, 5, 0x20).block(0, 7, &data).block(1, 8, b"").misfits(&page);
    update(0x20, 1, 5, 0).block(0, 7, &tuple(b"n")).block(1, 7, b"").misfits(&page);
    update(0x20, 1, 5, 0).block(0, 8, &tuple(b"n")).block(2, 7, b"").misfits(&page);
    update(0x20, 1, 5, 0).block(1, 7, b"").misfits(&page);
    for (prefix, suffix) in [(11, 0), (0, 40), (u16::MAX, 0), (0, u16::MAX)] {
        let data = [u16s(&[prefix, suffix]), tuple(b"mid")].concat();
        update(0x40, 2, 5, 0x60).block(0, 7, &data).misfits(&page);
    }
    let short_header = [u16s(&[3, 2]), vec![2, 0, 2, 9, 22, 0]].concat();
    update(0x40, 2, 5, 0x60).block(0, 7, &short_header).misfits(&page);
    let cut = [u16s(&[3, 2]), vec![2, 0, 2, 9, 24]].concat();
    update(0x40, 2, 5, 0x60).block(0, 7, &cut).misfits(&page);
    for (old, new) in [(0, 5), (6, 5), (1, 0), (1, 1), (1, 7)] {
        update(0x20, old, new, 0).block(0, 7, &tuple(b"new")).misfits(&page);
    }
}

#[test]
fn locks_confirmations_and_overwritten_tuples() {
    let main = |number: u16, bits: u8| [u32s(&[99]), u16s(&[number]), vec![bits, 0]].concat();
    let mut page = page();
    let hot = update(0x40, 1, 3, 0).block(0, 7, &tuple(b"x"));
    hot.changes(&mut page, 30);
    make(HEAP, 0x60, &main(1, 0x02)).block(0, 7, b"").changes(&mut page, 40);
    assert_eq!((field(&page, 1, 4), mask(&page, 1)), (99, (2, 0x0182)));
    assert_eq!(super::super::page::u16_at(&page, line(&page, 1).unwrap().offset + 16), Ok(1));
    make(HEAP2, 0x60, &main(2, 0x0D)).block(0, 7, b"").changes(&mut page, 50);
    assert_eq!((field(&page, 2, 4), mask(&page, 2)), (99, (2, 0x1152)));
    make(HEAP, 0x50, &u16s(&[2])).block(0, 7, b"").changes(&mut page, 60);
    make(HEAP, 0x70, &u16s(&[2])).block(0, 7, b"0123456789").changes(&mut page, 70);
    assert_eq!(items(&page)[1][24..], *b"0123456789");
    make(HEAP, 0x70, &u16s(&[2])).block(0, 7, b"012345678").misfits(&page);
    for number in [0, 4, u16::MAX] {
        make(HEAP, 0x60, &main(number, 0)).block(0, 7, b"").misfits(&page);
        make(HEAP2, 0x60, &main(number, 0)).block(0, 7, b"").misfits(&page);
        make(HEAP, 0x50, &u16s(&[number])).block(0, 7, b"").misfits(&page);
        make(HEAP, 0x70, &u16s(&[number])).block(0, 7, b"0123456789").misfits(&page);
    }
}

#[test]
fn pruned_and_vacuumed_pages() {
    let mut page = page();
    (3..=5).for_each(|number| insert(number, 0).changes(&mut page, 20 + u64::from(number)));
    let old = page;
    let prune = |redirected: u16, dead: u16, numbers: &[u16]| {
        let main = [u32s(&[XID]), u16s(&[redirected, dead])].concat();
        make(HEAP2, 0x10, &main).block(0, 7, &u16s(numbers))
    };
    prune(1, 1, &[1, 3, 2, 5]).changes(&mut page, 100);
    let state = |number| line(&page, number).unwrap();
    assert_eq!(state(1), Line { offset: 3, state: LineState::Redirect, len: 0 });
    assert_eq!(state(2), Line::DEAD);
    assert_eq!((state(3).offset, state(4).offset), (8152, 8112));
    let end = bounds(&page).unwrap();
    assert_eq!((end.lower, end.upper), (40, 8112), "the last line pointer is gone");
    assert_eq!(page[10] & 1, 0);
    assert_eq!(page[8152..], old[8072..8112], "tuple 3 has moved");
    assert_eq!(page[7992..8112], old[7992..8112], "what moved away is still there");
    make(HEAP2, 0x20, &u16s(&[1])).block(0, 7, &u16s(&[2])).changes(&mut page, 110);
    assert_eq!((line(&page, 2).unwrap(), page[10] & HAS_FREE_LINES as u8), (Line::UNUSED, 1));
    let all = make(HEAP2, 0x20, &u16s(&[3])).block(0, 7, &u16s(&[1, 3, 4]));
    all.changes(&mut page, 120);
    assert_eq!((lines(&page), page[10] & 1), (Ok(1), 1), "one line pointer stays");
    for numbers in [&[0][..], &[9], &[u16::MAX], &[1, 9]] {
        prune(0, 0, numbers).misfits(&old);
        prune(0, 1, numbers).misfits(&old);
        if numbers != [1, 9] {
            // Where a redirection leads nobody checks.
            prune(1, 0, numbers).misfits(&old);
        }
        let vacuum = make(HEAP2, 0x20, &u16s(&[2])).block(0, 7, &u16s(numbers));
        vacuum.misfits(&old);
    }
}

#[test]
fn frozen_tuples() {
    let mut page = page();
    let entry = |number: u16, flags: u8| {
        let masks = u16s(&[number, 0x0002, 0x0B02]);
        [u32s(&[0]), masks, vec![flags, 0]].concat()
    };
    let freeze = |count: u16, data: &[u8]| {
        make(HEAP2, 0x30, &[u32s(&[XID]), u16s(&[count])].concat()).block(0, 7, data)
    };
    freeze(2, &[entry(1, 2), entry(2, 4)].concat()).changes(&mut page, 30);
    assert_eq!((mask(&page, 1), field(&page, 1, 8)), ((2, 0x0B02), 2));
    assert_eq!((mask(&page, 2), field(&page, 2, 8)), ((2, 0x0B02), 0));
    freeze(2, &entry(1, 0)).misfits(&page);
    freeze(1, &entry(3, 0)).misfits(&page);
    freeze(1, &entry(0, 0)).misfits(&page);
}

#[test]
fn visibility() {
    let main = [u32s(&[XID]), vec![3]].concat();
    let record = make(HEAP2, 0x40, &main).block(0, 3, b"").block(1, 7, b"");
    let mut heap = page();
    assert_eq!(record.apply(&mut heap, 90), Ok(Applied::Changed));
    assert_eq!((heap[10], page_lsn(&heap[..])), (4, Lsn(20)), "no hint bits in the WAL, no LSN");
    let logged = RedoSettings { hint_bits_logged: true };
    apply_bytes(&mut heap, &record.bytes(), (REL, 7), Lsn(90), &logged).unwrap();
    assert_eq!(page_lsn(&heap[..]), Lsn(90));

    let map = |heap_block: u32| make(HEAP2, 0x40, &main).block(0, 7, b"").block(1, heap_block, b"");
    let mut page = [0; PAGE_SIZE];
    map(7 * 32672 + 6).changes(&mut page, 40);
    let mut expected = [0; PAGE_SIZE];
    init(&mut expected, 0).unwrap();
    expected[25] = 0b0011_0000;
    set_page_lsn(&mut expected[..], Lsn(40));
    assert_eq!(page, expected);
    assert_eq!(map(7 * 32672 + 6).apply(&mut page, 50), Ok(Applied::Changed));
    assert_eq!(page, expected, "the bits are set already");
    assert_eq!(map(7 * 32672 + 7).apply(&mut page, 40), Ok(Applied::Skipped));
    map(6).misfits(&page);
    make(HEAP2, 0x40, &main).block(0, 7, b"").misfits(&page);
    make(HEAP2, 0x40, &main[..4]).block(0, 7, b"").block(1, 7, b"").misfits(&page);
}
