//! B-tree records and posting lists.

use super::super::btree_posting::{Made, Pending, swap, without};
use super::super::page::{add_item, put_u32};
use super::*;

const BTREE: u8 = rmgr_id::BTREE;

/// An index tuple of 16 bytes: heap position (block, 1), eight bytes of key.
fn tuple(block: u16, key: u8) -> Vec<u8> {
    [&u16s(&[0, block, 1, 16])[..], &[key; 8]].concat()
}

/// A posting list tuple with these heap blocks.
fn posting(key: u8, blocks: &[u16]) -> Vec<u8> {
    let size = (16 + 6 * blocks.len()).next_multiple_of(8);
    let head = u16s(&[0, 16, 0x2000 | blocks.len() as u16, 0x2000 | size as u16]);
    let list = blocks.iter().flat_map(|block| u16s(&[0, *block, 1]));
    let mut bytes = [&head[..], &[key; 8]].concat();
    bytes.extend(list);
    bytes.resize(size, 0);
    bytes
}

/// A leaf with a right sibling and these items, the first of which is the high key.
fn leaf(found: &[Vec<u8>]) -> Page {
    let mut page = [0; PAGE_SIZE];
    init(&mut page, 16).unwrap();
    put_u32(&mut page, 8180, 99).unwrap();
    put_u32(&mut page, 8188, 1).unwrap();
    for (index, item) in found.iter().enumerate() {
        add_item(&mut page, item, index + 1, Add::Shift).unwrap();
    }
    page
}

fn opaque(page: &Page) -> (u32, u32, u32, u16) {
    let at = |at| super::super::page::u32_at(page, at).unwrap();
    (at(8176), at(8180), at(8184), at(8188) as u16)
}

#[test]
fn posting_lists_are_split_and_thinned() {
    let (mut old, mut new) = (posting(5, &[10, 20, 30, 40]), tuple(25, 5));
    swap(&mut old, &mut new, 2).unwrap();
    assert_eq!((old.clone(), new), (posting(5, &[10, 20, 25, 30]), tuple(40, 5)));
    for at in [0, 4, 5] {
        assert!(swap(&mut old.clone(), &mut tuple(1, 5), at).is_err());
    }
    assert!(swap(&mut tuple(1, 5), &mut tuple(2, 5), 1).is_err());
    let mut long = old.clone();
    long[4] = 99;
    assert!(swap(&mut long, &mut tuple(1, 5), 1).is_err());

    let mut made = Made::new();
    without(&old, &u16s(&[0, 2]), &mut made).unwrap();
    assert_eq!(made.tuple(), posting(5, &[20, 30]));
    without(&old, &u16s(&[0, 1, 2]), &mut made).unwrap();
    assert_eq!(made.tuple(), tuple(30, 5), "one is left: an ordinary tuple");
    for gone in [&[0, 1, 2, 3][..], &[4], &[2, 1], &[0, 0]] {
        assert!(without(&old, &u16s(gone), &mut made).is_err(), "{gone:?}");
    }
}

#[test]
fn tuples_are_merged() {
    let (first, second, third) = (tuple(1, 5), posting(5, &[2, 3]), tuple(4, 5));
    let mut pending = Pending::new(&first, 2).unwrap();
    assert_eq!(pending.finish().unwrap(), first);
    pending.add(&second).unwrap();
    pending.add(&third).unwrap();
    assert_eq!(pending.finish().unwrap(), posting(5, &[1, 2, 3, 4]));
    pending.restart(&second, 3).unwrap();
    pending.add(&first).unwrap();
    assert_eq!(pending.finish().unwrap(), posting(5, &[2, 3, 1]));
    let long = posting(5, &[7; 440]);
    pending.restart(&long, 4).unwrap();
    (0..8).for_each(|_| pending.add(&first).unwrap());
    assert!(pending.add(&first).is_err(), "longer than a third of a page");
}

#[test]
fn inserted_tuples() {
    let mut page = leaf(&[tuple(0, 9), tuple(1, 1), tuple(3, 3)]);
    make(BTREE, 0, &u16s(&[3])).block(0, 7, &tuple(2, 2)).changes(&mut page, 10);
    assert_eq!(items(&page), [tuple(0, 9), tuple(1, 1), tuple(2, 2), tuple(3, 3)]);
    for number in [0, 6, u16::MAX] {
        make(BTREE, 0, &u16s(&[number])).block(0, 7, &tuple(2, 2)).misfits(&page);
    }
    make(BTREE, 0, &[1]).block(0, 7, &tuple(2, 2)).misfits(&page);

    let mut page = leaf(&[tuple(0, 9), posting(5, &[10, 20, 30])]);
    let data = [u16s(&[1]), tuple(15, 5)].concat();
    make(BTREE, 0x50, &u16s(&[3])).block(0, 7, &data).changes(&mut page, 10);
    assert_eq!(items(&page), [tuple(0, 9), posting(5, &[10, 15, 20]), tuple(30, 5)]);
    for (number, entry) in [(0, 1), (1, 1), (2, 1), (3, 0), (3, 3), (9, 1)] {
        let data = [u16s(&[entry]), tuple(15, 5)].concat();
        make(BTREE, 0x50, &u16s(&[number])).block(0, 7, &data).misfits(&page);
    }
    let longer = [u16s(&[1]), tuple(15, 5), vec![0]].concat();
    make(BTREE, 0x50, &u16s(&[3])).block(0, 7, &longer).misfits(&page);
}

#[test]
fn split_pages() {
    let old =
        leaf(&[tuple(0, 9), tuple(1, 1), posting(2, &[20, 22, 24]), tuple(3, 3), tuple(4, 4)]);
    // Item 4 and what follows goes right; the new one (offset 4) stays and splits item 3.
    let main = |number: u16, entry: u16| [u32s(&[0]), u16s(&[4, number, entry])].concat();
    let data = [tuple(21, 2), tuple(0, 3)].concat();
    let mut page = old;
    let split = |info, main: &[u8]| make(BTREE, info, main).block(0, 7, &data).fresh(1, 50, b"x");
    split(0x30, &main(4, 1)).changes(&mut page, 20);
    let expected = [tuple(0, 3), tuple(1, 1), posting(2, &[20, 21, 22]), tuple(24, 2)];
    assert_eq!(items(&page), expected);
    assert_eq!(opaque(&page), (0, 50, 0, 0x81));
    let mut page = old;
    split(0x30, &main(2, 0)).changes(&mut page, 20);
    assert_eq!(items(&page), [&[tuple(0, 3), tuple(21, 2)], &items(&old)[1..3]].concat());
    let mut page = old;
    make(BTREE, 0x40, &main(5, 0))
        .block(0, 7, &tuple(0, 3))
        .fresh(1, 50, b"x")
        .changes(&mut page, 20);
    assert_eq!(items(&page), [&[tuple(0, 3)], &items(&old)[1..3]].concat());
    for main in [main(0, 1), main(3, 1), main(4, 9), main(9, 1)] {
        split(0x30, &main).misfits(&old);
    }
    make(BTREE, 0x30, &main(4, 1)).block(0, 7, &data).misfits(&old);
    make(BTREE, 0x30, &main(4, 1)).block(0, 7, &tuple(0, 3)).fresh(1, 50, b"x").misfits(&old);
    let far = [u32s(&[0]), u16s(&[60000, 4, 0])].concat();
    split(0x30, &far).misfits(&old);

    let mut right = [1; PAGE_SIZE];
    let data = [tuple(4, 4), tuple(3, 3), tuple(0, 9)].concat();
    let split = make(BTREE, 0x30, &main(4, 1)).block(0, 50, b"x").fresh(1, 7, &data);
    split.clone().block(2, 60, b"").changes(&mut right, 20);
    assert_eq!(items(&right), [tuple(0, 9), tuple(3, 3), tuple(4, 4)]);
    assert_eq!(opaque(&right), (50, 60, 0, 1));
    let mut bad = split.clone();
    bad.blocks[1].3[6] = 0;
    bad.misfits(&right);
    bad.blocks[1].3[6] = 200;
    bad.misfits(&right);
    let many = [&u16s(&[0, 0, 0, 8])[..]].concat().repeat(500);
    make(BTREE, 0x30, &main(4, 1)).block(0, 50, b"x").fresh(1, 7, &many).misfits(&right);

    let mut sibling = leaf(&[]);
    let link = make(BTREE, 0x30, &main(4, 1)).block(0, 50, b"x").fresh(1, 51, b"x");
    link.block(2, 7, b"").changes(&mut sibling, 30);
    assert_eq!(opaque(&sibling), (51, 99, 0, 1));
}

#[test]
fn deduplicated_pages() {
    let old = leaf(&[tuple(0, 9), tuple(1, 1), tuple(2, 2), tuple(3, 2), tuple(4, 2), tuple(5, 3)]);
    let mut page = old;
    page[8188] |= 0x40;
    let dedup = |count: u16, data: &[u8]| make(BTREE, 0x60, &u16s(&[count])).block(0, 7, data);
    dedup(1, &u16s(&[3, 3])).changes(&mut page, 10);
    assert_eq!(items(&page), [tuple(0, 9), tuple(1, 1), posting(2, &[2, 3, 4]), tuple(5, 3)]);
    assert_eq!(opaque(&page).3, 1, "no garbage any more");
    dedup(2, &u16s(&[3, 3])).misfits(&old);
    let mut page = old;
    dedup(0, b"").changes(&mut page, 10);
    assert_eq!(items(&page), items(&old));
    dedup(1, &u16s(&[1, 2])).misfits(&leaf(&[tuple(0, 9)]));
}

#[test]
fn deleted_items() {
    let old = leaf(&[tuple(0, 9), tuple(1, 1), posting(2, &[20, 22, 24]), tuple(3, 3)]);
    let vacuum = |deleted: u16, updated: u16, data: &[u8]| {
        make(BTREE, 0xC0, &u16s(&[deleted, updated])).block(0, 7, data)
    };
    let mut page = old;
    vacuum(1, 1, &u16s(&[2, 3, 2, 0, 2])).changes(&mut page, 10);
    assert_eq!(items(&page), [tuple(0, 9), tuple(22, 2), tuple(3, 3)]);
    let mut page = old;
    let delete = [u32s(&[XID]), u16s(&[0, 1])].concat();
    make(BTREE, 0x70, &delete).block(0, 7, &u16s(&[3, 1, 1])).changes(&mut page, 10);
    assert_eq!(items(&page)[2], posting(2, &[20, 24]));
    for (deleted, updated, data) in [
        (1, 0, &[5][..]),
        (1, 0, &[0]),
        (2, 0, &[2]),
        (0, 1, &[2, 1, 0]),
        (0, 1, &[3, 3, 0, 1, 2]),
        (0, 1, &[3, 9, 0]),
        (0, 1, &[3]),
        (0, 1, &[9, 1, 0]),
        (u16::MAX, u16::MAX, &[3]),
    ] {
        vacuum(deleted, updated, &u16s(data)).misfits(&old);
    }
}

#[test]
fn deleted_pages_roots_and_the_meta_page() {
    let main = [u16s(&[2, 0]), u32s(&[7, 30, 40, 50])].concat();
    let half_dead = make(BTREE, 0xB0, &main);
    let mut page = [1; PAGE_SIZE];
    half_dead.clone().fresh(0, 7, b"").block(1, 8, b"").changes(&mut page, 10);
    assert_eq!(opaque(&page), (30, 40, 0, 0x11));
    assert_eq!(items(&page), [u16s(&[0, 50, 0, 0x2008])]);
    let mut parent = leaf(&[tuple(0, 9), tuple(10, 1), tuple(20, 2), tuple(30, 3)]);
    let in_parent = half_dead.fresh(0, 8, b"").block(1, 7, b"");
    in_parent.changes(&mut parent, 10);
    assert_eq!(items(&parent), [tuple(0, 9), tuple(20, 1), tuple(30, 3)]);
    in_parent.misfits(&leaf(&[tuple(0, 9), tuple(10, 1)]));

    let main = [u32s(&[30, 40, 0, 0, 77, 0, 31, 41, 51])].concat();
    let unlink = |info| make(BTREE, info, &main);
    unlink(0x80).fresh(0, 7, b"").changes(&mut page, 20);
    assert_eq!(opaque(&page), (30, 40, 0, 0x105));
    assert_eq!((page[12..16].to_vec(), page[24]), (u16s(&[32, 8176]), 77));
    let mut sibling = leaf(&[]);
    unlink(0x80).fresh(0, 8, b"").block(1, 7, b"").changes(&mut sibling, 20);
    unlink(0x80).fresh(0, 8, b"").block(2, 7, b"").changes(&mut sibling, 30);
    assert_eq!(opaque(&sibling), (30, 40, 0, 1));
    unlink(0x80).fresh(0, 8, b"").fresh(3, 7, b"").changes(&mut page, 40);
    assert_eq!((opaque(&page), &items(&page)[0][2..4]), ((31, 41, 0, 0x11), &[51, 0][..]));
    unlink(0x80).fresh(0, 8, b"").fresh(4, 7, b"").misfits(&page);

    let meta = [u32s(&[4, 1, 2, 3, 5, 6]), vec![1, 0, 0, 0]].concat();
    make(BTREE, 0xE0, b"").fresh(0, 7, &meta).changes(&mut page, 50);
    assert_eq!(page[24..52], u32s(&[0x53162, 4, 1, 2, 3, 5, 6])[..]);
    assert_eq!(page[56..64], (-1.0f64).to_le_bytes());
    assert_eq!((page[64], page[12], opaque(&page)), (1, 72, (0, 0, 0, 8)));
    make(BTREE, 0xE0, b"").fresh(0, 7, &meta[..24]).misfits(&page);

    let root = make(BTREE, 0xA0, &u32s(&[7, 1])).fresh(0, 7, &[tuple(2, 2), tuple(1, 1)].concat());
    root.changes(&mut page, 60);
    assert_eq!((items(&page), opaque(&page)), (vec![tuple(1, 1), tuple(2, 2)], (0, 0, 1, 2)));
    let mut child = leaf(&[]);
    child[8188] |= 0x80;
    let root = make(BTREE, 0xA0, &u32s(&[8, 1])).fresh(0, 8, b"").block(1, 7, b"");
    root.changes(&mut child, 60);
    assert_eq!(opaque(&child).3, 1);
    make(BTREE, 0xF0, b"").block(0, 7, b"").misfits(&child);
    make(BTREE, 0xD0, b"").block(0, 7, b"").misfits(&child);
}
