//! Adding, removing and moving items, hole included.

use super::super::compact::*;
use super::super::page::*;
use super::*;

/// A page whose items are `len` bytes each, filled with their number.
fn page_of(lens: &[usize]) -> Page {
    let mut page = [0; PAGE_SIZE];
    init(&mut page, 16).unwrap();
    for (index, len) in lens.iter().enumerate() {
        add_item(&mut page, &vec![index as u8 + 1; *len], index + 1, Add::Shift).unwrap();
    }
    page
}

fn firsts(page: &Page) -> Vec<u8> {
    items(page).iter().map(|item| item.first().copied().unwrap_or_default()).collect()
}

#[test]
fn items_are_put_before_others() {
    let mut page = page_of(&[8, 8, 8]);
    add_item(&mut page, &[9; 20], 2, Add::Shift).unwrap();
    assert_eq!(firsts(&page), [1, 9, 2, 3]);
    let end = bounds(&page).unwrap();
    assert_eq!((end.lower, end.upper), (40, 8176 - 3 * 8 - 24));
    assert!(add_item(&mut page, &[9], 6, Add::Shift).is_err());
    assert!(add_item(&mut page, &[9], 0, Add::Shift).is_err());
    assert!(add_item(&mut page, &[9], 2, Add::Overwrite).is_err());
    let room = end.upper - end.lower - 4;
    assert!(add_item(&mut page.clone(), &vec![9; room / 8 * 8 + 1], 5, Add::Shift).is_err());
    add_item(&mut page, &vec![9; room / 8 * 8], 5, Add::Shift).unwrap();
}

#[test]
fn few_deleted_items_leave_a_trace_and_many_another() {
    let old = page_of(&[8, 16, 24, 32]);
    let mut page = old;
    index_multi_delete(&mut page, &u16s(&[2, 4])).unwrap();
    assert_eq!(firsts(&page), [1, 3]);
    assert_eq!(bounds(&page).unwrap().upper, 8176 - 8 - 24);
    assert_eq!(page[32..40], old[32..40], "the line pointers behind are as they were");
    let mut page = old;
    index_multi_delete(&mut page, &u16s(&[1, 2, 4])).unwrap();
    assert_eq!(firsts(&page), [3]);
    assert_eq!(page[28..40], old[28..40], "the line pointers behind are as they were");
    let mut page = old;
    index_multi_delete(&mut page, &u16s(&[1, 2, 3, 4])).unwrap();
    assert_eq!((lines(&page), bounds(&page).unwrap().upper), (Ok(0), 8176));
    for wrong in [&[0][..], &[5], &[2, 2, 3], &[3, 2, 1], &[1, 2, 5], &[0, 1, 2]] {
        assert!(index_multi_delete(&mut old.clone(), &u16s(wrong)).is_err(), "{wrong:?}");
    }
}

#[test]
fn items_out_of_order_are_compacted_too() {
    let mut page = page_of(&[]);
    for (number, len) in [(1, 8), (1, 16), (2, 24), (1, 32), (4, 40)] {
        add_item(&mut page, &vec![len as u8; len], number, Add::Shift).unwrap();
    }
    assert_eq!(firsts(&page), [32, 16, 24, 40, 8]);
    index_multi_delete(&mut page, &u16s(&[2, 4])).unwrap();
    assert_eq!(firsts(&page), [32, 24, 8]);
    let mut page = page_of(&[8, 16, 24, 32, 40, 48]);
    let last = line(&page, 6).unwrap();
    let first = line(&page, 1).unwrap();
    set_line(&mut page, 1, last).unwrap();
    set_line(&mut page, 6, first).unwrap();
    index_multi_delete(&mut page, &u16s(&[2, 3, 4])).unwrap();
    assert_eq!(firsts(&page), [6, 5, 1]);
    assert_eq!(line(&page, 1).unwrap().offset, 8176 - 48);
}

/// PostgreSQL moves items within the page if their places descend: what they share is lost then.
/// Else it takes them out of a copy.
#[test]
fn overlapping_items_are_refused_unless_they_are_copied() {
    let old = page_of(&[8, 16, 24, 32, 40]);
    let mut page = old;
    let second = line(&page, 2).unwrap();
    set_line(&mut page, 3, Line { offset: second.offset - 8, ..second }).unwrap();
    assert!(index_multi_delete(&mut page.clone(), &u16s(&[1, 4, 5])).is_err());
    assert!(repair_fragmentation(&mut page).is_err());

    let mut page = old;
    set_line(&mut page, 5, second).unwrap();
    index_multi_delete(&mut page, &u16s(&[1, 3, 4])).unwrap();
    assert_eq!(items(&page), [vec![2; 16], vec![2; 16]]);
    assert_eq!(bounds(&page).unwrap().upper, 8176 - 2 * 16);
    let whole = Line { offset: bounds(&old).unwrap().upper, len: 112, ..second };
    let mut page = old;
    (1..=5).for_each(|number| set_line(&mut page, number, whole).unwrap());
    for lower in [24 + 4 * 5, 8176 - 5 * 112 + 8] {
        page[12..14].copy_from_slice(&u16s(&[lower]));
        assert_eq!(repair_fragmentation(&mut page.clone()).is_ok(), lower == 44, "{lower}");
    }
}

/// What is left may be larger than the space between the old line pointers and the special space,
/// where items overlap, though not than that behind the line pointers that are left.
#[test]
fn the_space_is_that_before_line_pointers_went() {
    let mut page = page_of(&[8; 20]);
    let whole = Line { offset: 4096, len: 808, ..line(&page, 1).unwrap() };
    page[14..16].copy_from_slice(&u16s(&[4096]));
    (1..=10).for_each(|number| set_line(&mut page, number, whole).unwrap());
    let gone: Vec<u16> = (11..=20).collect();
    assert!(index_multi_delete(&mut page.clone(), &u16s(&gone)).is_err());
    set_line(&mut page, 1, Line { len: 800, ..whole }).unwrap();
    index_multi_delete(&mut page, &u16s(&gone)).unwrap();
}

/// What stands there may look like a line pointer that leads anywhere.
#[test]
fn a_part_of_a_line_pointer_is_none() {
    let mut page = page_of(&[8, 16, 24]);
    let (first, third) = (line(&page, 1).unwrap(), line(&page, 3).unwrap());
    set_line(&mut page, 1, third).unwrap();
    set_line(&mut page, 3, first).unwrap();
    page[12..14].copy_from_slice(&u16s(&[24 + 4 * 3 + 2]));
    page[36..40].copy_from_slice(&[8, 0x80, 16, 0]);
    repair_fragmentation(&mut page).unwrap();
    assert_eq!(items(&page), [vec![3; 24], vec![2; 16], vec![1; 8]]);
    assert_eq!(page[36..40], [8, 0x80, 16, 0]);
}

#[test]
fn items_are_replaced_in_their_place() {
    let old = page_of(&[8, 16, 24]);
    let mut page = old;
    index_overwrite(&mut page, 2, &[7; 40]).unwrap();
    assert_eq!(items(&page), [vec![1; 8], vec![7; 40], vec![3; 24]]);
    index_overwrite(&mut page, 2, &[6; 3]).unwrap();
    assert_eq!(items(&page), [vec![1; 8], vec![6; 3], vec![3; 24]]);
    assert_eq!(bounds(&page).unwrap().upper, 8176 - 8 - 8 - 24);
    index_overwrite(&mut page, 2, &[5; 8]).unwrap();
    for (number, len) in [(0, 8), (4, 8), (1, 8192)] {
        assert!(index_overwrite(&mut old.clone(), number, &vec![1; len]).is_err());
    }
}

#[test]
fn wrong_boundaries_are_refused() {
    let page = page_of(&[8, 16]);
    for (lower, upper, special) in
        [(20, 8000, 8176), (9000, 8000, 8176), (32, 8180, 8176), (32, 8000, 9000), (32, 8000, 8171)]
    {
        let mut page = page;
        page[12..18].copy_from_slice(&u16s(&[lower, upper, special]));
        assert!(index_delete(&mut page, 1).is_err());
        assert!(repair_fragmentation(&mut page).is_err());
        assert!(empty_like(&page).is_err());
    }
    let mut page = page;
    page[12..14].copy_from_slice(&u16s(&[24 + 4 * 500]));
    assert!(repair_fragmentation(&mut page.clone()).is_err(), "too many line pointers");
    assert!(index_multi_delete(&mut page, &u16s(&[1, 2, 3])).is_err());
}
