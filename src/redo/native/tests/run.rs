//! Chains: what goes to the other service, with which page, and how it is counted.

use std::cell::RefCell;
use std::time::Instant;

use futures_lite::future::block_on;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use super::super::run::NativeRedo;
use super::*;
use crate::redo::captured::captured;
use crate::redo::{Redo, RedoError, RedoRequest};

/// Stands for the child: notes requests, and answers with the page but for one byte per record.
#[derive(Default)]
struct Noting(RefCell<Vec<RedoRequest>>);

const MARK: usize = 1000;

impl Redo for Noting {
    fn redo(&self, request: RedoRequest) -> LocalBoxFuture<'_, Result<Bytes, RedoError>> {
        let mut page = request.base.as_ref().map_or(vec![0; PAGE_SIZE], |base| base.to_vec());
        page[MARK] += request.records.len() as u8;
        self.0.borrow_mut().push(request);
        async move { Ok(Bytes::from(page)) }.boxed_local()
    }
}

fn redo() -> NativeRedo<Noting> {
    NativeRedo::new(Noting::default(), HINTS_OFF)
}

fn rebuild(
    redo: &NativeRedo<Noting>,
    base: Option<&Page>,
    records: &[Bytes],
) -> Result<Page, RedoError> {
    let records = records.iter().zip(1u64..).map(|(bytes, at)| (Lsn(1000 * at), bytes.clone()));
    let base = base.map(|base| Bytes::copy_from_slice(base));
    let request = RedoRequest { rel: REL, block: 7, base, records: records.collect() };
    block_on(redo.redo(request)).map(|page| page[..].try_into().unwrap())
}

fn foreign() -> Bytes {
    make(rmgr_id::GIN, 0x20, b"").block(0, 7, b"x").bytes()
}

fn insert(number: u16) -> Bytes {
    heap::insert(number, 0).bytes()
}

#[test]
fn a_native_chain_never_reaches_the_child() {
    let redo = redo();
    let page = rebuild(&redo, Some(&heap::page()), &[insert(3), insert(4)]).unwrap();
    assert_eq!((items(&page).len(), page_lsn(&page[..])), (4, Lsn(2000)));
    let many: Vec<Bytes> = (3..133).map(insert).collect();
    let page = rebuild(&redo, Some(&heap::page()), &many).unwrap();
    assert_eq!(items(&page).len(), 132);
    assert!(redo.inner().0.borrow().is_empty());
    assert_eq!(redo.counters().pages_native.get(), 2);
    assert_eq!(redo.counters().native_records(), 132);
    assert_eq!(rebuild(&redo, None, &[]), Err(RedoError::NoRecords { rel: REL, block: 7 }));
}

#[test]
fn only_foreign_runs_go_to_the_child() {
    let redo = redo();
    let chain = [insert(3), foreign(), foreign(), insert(4), foreign()];
    let page = rebuild(&redo, Some(&heap::page()), &chain).unwrap();
    assert_eq!((items(&page).len(), page[MARK]), (4, 3));
    let requests = redo.inner().0.borrow();
    let lsns = |index: usize| -> Vec<u64> {
        requests[index].records.iter().map(|(lsn, _)| lsn.0).collect()
    };
    assert_eq!((lsns(0), lsns(1)), (vec![2000, 3000], vec![5000]));
    let base = requests[0].base.as_ref().unwrap();
    assert_eq!(page_lsn(base), Lsn(1000), "the page with what came before");
    let counters = redo.counters();
    assert_eq!((counters.native_records(), counters.child_records()), (2, 3));
    assert_eq!((counters.pages_native.get(), counters.pages_child.get()), (0, 1));
    assert_eq!(
        counters
            .types()
            .filter(|((manager, _), ..)| *manager == rmgr_id::GIN)
            .map(|(_, _, child)| child)
            .sum::<u64>(),
        3
    );
    assert_eq!(counters.misfits.get(), 0);
}

#[test]
fn a_first_foreign_record_gets_no_base_where_there_is_none() {
    let redo = redo();
    rebuild(&redo, None, &[foreign()]).unwrap();
    assert!(redo.inner().0.borrow()[0].base.is_none());
}

#[test]
fn a_misfit_gets_the_page_as_it_was_before_it() {
    let redo = redo();
    // Two tuples are to be added, the second of which does not fit: half a change.
    let data = [&[1, 0, 2, 0, 2, 9, 24][..], &[0], &[9, 0, 2, 0, 2, 9, 24]].concat();
    let main = [&[0, 0, 2, 0][..], &u16s(&[4, 9])].concat();
    let half = make(rmgr_id::HEAP2, 0x50, &main).block(0, 7, &data);
    let before = rebuild(&redo, Some(&heap::page()), &[insert(3)]).unwrap();
    half.misfits(&before);
    let page = rebuild(&redo, Some(&heap::page()), &[insert(3), half.bytes(), insert(4)]).unwrap();
    assert_eq!((items(&page).len(), page[MARK]), (4, 1));
    let requests = redo.inner().0.borrow();
    assert_eq!(requests.len(), 1);
    assert_eq!(requests[0].base.as_deref(), Some(&before[..]));
    assert_eq!(redo.counters().misfits.get(), 1);
}

#[test]
fn misfits_are_all_counted_and_said_once_in_a_while() {
    let begin = Instant::now();
    // Line pointer 9 of a page with two.
    let misfit = heap::insert(9, 0).bytes();
    let several = [redo(), redo()];
    let text = captured(|| {
        for redo in several.iter().cycle().take(1000) {
            rebuild(redo, Some(&heap::page()), std::slice::from_ref(&misfit)).unwrap();
        }
    });
    let counted: u64 = several.iter().map(|redo| redo.counters().misfits.get()).sum();
    assert_eq!(counted, 1000);
    let said = text.matches("left to the wal-redo process").count() as u64;
    assert!((1..=1 + begin.elapsed().as_secs()).contains(&said), "{said} lines: {text}");
}

#[test]
fn damaged_records_are_errors() {
    let redo = redo();
    let mut bad = insert(3).to_vec();
    bad[40] ^= 1;
    let result = rebuild(&redo, Some(&heap::page()), &[bad.into()]);
    assert!(matches!(result, Err(RedoError::BadRecord { .. })), "{result:?}");
    assert!(redo.inner().0.borrow().is_empty());
    let request = RedoRequest {
        rel: REL,
        block: 7,
        base: Some(Bytes::from_static(b"short")),
        records: vec![(Lsn(1), insert(3))],
    };
    assert!(matches!(block_on(redo.redo(request)), Err(RedoError::Refused { .. })));
}
