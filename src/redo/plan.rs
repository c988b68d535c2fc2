//! From a base and the values after it to a page.
//!
//! [`plan`] cuts the values into runs, in LSN order: images and small records are applied here,
//! a row of WAL records goes to the redo service in one request.

use bytes::Bytes;

use super::small::apply;
use super::{Redo, RedoError, RedoRequest};
use crate::base::page::{PAGE_SIZE, Page};
use crate::base::{BlockNumber, Key, KeyKind, Lsn, RelNode, RelTag, SmallRecord, Value};

/// Values that are applied in the same place.
#[derive(Debug, PartialEq, Eq)]
pub enum Run {
    /// The page is this from here on; `None` is zeros.
    Replace(Option<Bytes>),
    /// Small records, applied here.
    Small(Vec<SmallRecord>),
    /// WAL records, applied by the redo service. `needs_base`: the first does not initialise the
    /// page.
    Wal {
        /// Whether the page before is needed.
        needs_base: bool,
        /// LSN after the record, and the record.
        records: Vec<(Lsn, Bytes)>,
    },
}

/// Cuts ascending values into runs. What a later image makes superfluous is left out.
pub fn plan(values: Vec<(Lsn, Value)>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (lsn, value) in values {
        if value.is_base() {
            runs.clear();
        }
        match (value, runs.last_mut()) {
            (Value::Image(page), _) => runs.push(Run::Replace(Some(page))),
            (Value::ZeroPage, _) => runs.push(Run::Replace(None)),
            (Value::Small(record), Some(Run::Small(records))) => records.push(record),
            (Value::Small(record), _) => runs.push(Run::Small(vec![record])),
            (Value::WalRecord { record, .. }, Some(Run::Wal { records, .. })) => {
                records.push((lsn, record));
            }
            (Value::WalRecord { will_init, record }, _) => {
                runs.push(Run::Wal { needs_base: !will_init, records: vec![(lsn, record)] });
            }
        }
    }
    runs
}

/// The page under `key` after `values`, which ascend, on top of `base`. Without a base the first
/// value must be one.
///
/// # Errors
/// Those of the redo service; [`RedoError::NoRecords`] when there is nothing to make a page of.
pub async fn rebuild(
    redo: &dyn Redo,
    key: Key,
    base: Option<Bytes>,
    values: Vec<(Lsn, Value)>,
) -> Result<Bytes, RedoError> {
    let (rel, block) = name(key);
    let mut page = base;
    for run in plan(values) {
        page = Some(match run {
            Run::Replace(image) => image.unwrap_or_else(zeros),
            Run::Small(records) => apply_small(page, &records),
            Run::Wal { needs_base, records } => {
                let base = if needs_base { Some(page.unwrap_or_else(zeros)) } else { None };
                redo.redo(RedoRequest { rel, block, base, records }).await?
            }
        });
    }
    page.ok_or(RedoError::NoRecords { rel, block })
}

fn zeros() -> Bytes {
    static ZEROS: Page = [0; PAGE_SIZE];
    Bytes::from_static(&ZEROS)
}

fn apply_small(base: Option<Bytes>, records: &[SmallRecord]) -> Bytes {
    let mut page: Box<Page> = Box::new([0; PAGE_SIZE]);
    if let Some(base) = base.filter(|base| base.len() == PAGE_SIZE) {
        page.copy_from_slice(&base);
    }
    records.iter().for_each(|record| apply(&mut page, record));
    let page: Box<[u8]> = page;
    Bytes::from(page)
}

/// How the redo service calls the block. SLRU pages have no WAL records, so their name is for
/// errors only.
pub fn name(key: Key) -> (RelTag, BlockNumber) {
    match key.kind() {
        KeyKind::RelBlock(rel, block) => (rel, block),
        KeyKind::SlruBlock(..) | KeyKind::Metadata => {
            let node = RelNode { spc: key.field2, db: key.field3, rel: key.field4 };
            (RelTag { node, fork: key.field5 }, key.field6)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wal(lsn: u64, will_init: bool) -> (Lsn, Value) {
        (Lsn(lsn), Value::WalRecord { will_init, record: Bytes::from(vec![lsn as u8]) })
    }

    fn small(lsn: u64) -> (Lsn, Value) {
        let clear = SmallRecord::VmClear { flags: 1, heap_blocks: [Some(lsn as u32), None] };
        (Lsn(lsn), Value::Small(clear))
    }

    fn records(lsns: &[u64]) -> Vec<(Lsn, Bytes)> {
        lsns.iter().map(|lsn| (Lsn(*lsn), Bytes::from(vec![*lsn as u8]))).collect()
    }

    #[test]
    fn neighbours_of_a_kind_make_one_run() {
        let runs = plan(vec![wal(1, false), wal(2, false), small(3), small(4), wal(5, false)]);
        assert_eq!(runs.len(), 3);
        assert_eq!(runs[0], Run::Wal { needs_base: true, records: records(&[1, 2]) });
        assert!(matches!(&runs[1], Run::Small(records) if records.len() == 2));
        assert_eq!(runs[2], Run::Wal { needs_base: true, records: records(&[5]) });
    }

    #[test]
    fn a_base_in_the_middle_makes_everything_before_it_superfluous() {
        let runs = plan(vec![wal(1, false), small(2), wal(3, true), wal(4, false)]);
        assert_eq!(runs, [Run::Wal { needs_base: false, records: records(&[3, 4]) }]);
        let runs = plan(vec![wal(1, true), (Lsn(2), Value::ZeroPage), small(3)]);
        assert_eq!(runs[0], Run::Replace(None));
        assert_eq!(runs.len(), 2);
    }
}
