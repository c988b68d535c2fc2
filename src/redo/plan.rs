//! From an old page and what happened to it since, to the new page.
//!
//! [`plan`] forgets everything before the last value that needs no older content and cuts the
//! rest into steps; [`rebuild`] carries them out. Runs of WAL records go to PostgreSQL in one
//! request each, everything else is done here.

use bytes::{Bytes, BytesMut};

use super::{Redo, RedoError, RedoRequest, small};
use crate::base::key::SLRU_PAGES_PER_SEGMENT;
use crate::base::page::PAGE_SIZE;
use crate::base::{Key, KeyKind, Lsn, RelNode, RelTag, SmallRecord, Value};

/// One step on the way to the page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// The page is this.
    Image(Bytes),
    /// The page is zeros.
    Zero,
    /// WAL records, for PostgreSQL; the first of them needs no page if `init`.
    Records {
        /// No older content is needed.
        init: bool,
        /// LSN after each record, and the record.
        records: Vec<(Lsn, Bytes)>,
    },
    /// A small record.
    Small(SmallRecord),
}

/// Cuts `values`, in ascending order, into steps.
pub fn plan(values: Vec<(Lsn, Value)>) -> Vec<Step> {
    let first = values.iter().rposition(|(_, value)| value.is_base()).unwrap_or(0);
    let mut steps = Vec::new();
    for (lsn, value) in values.into_iter().skip(first) {
        match value {
            Value::Image(page) => steps.push(Step::Image(page)),
            Value::ZeroPage => steps.push(Step::Zero),
            Value::Small(small) => steps.push(Step::Small(small)),
            Value::WalRecord { will_init, record } => match steps.last_mut() {
                Some(Step::Records { records, .. }) => records.push((lsn, record)),
                _ => steps.push(Step::Records { init: will_init, records: vec![(lsn, record)] }),
            },
        }
    }
    steps
}

/// Names of the block in errors, and its number within the fork or SLRU.
fn place(key: Key) -> (RelTag, u32) {
    let node = RelNode { spc: key.field2, db: key.field3, rel: key.field4 };
    (RelTag { node, fork: key.field5 }, key.field6)
}

/// The content of `key` after `values` (ascending by LSN) on top of `base`.
///
/// # Errors
/// [`RedoError::NoRecords`] if there is neither a base nor a value; [`RedoError::Refused`] for a
/// value that cannot be applied; what [`Redo::redo`] returns.
pub async fn rebuild(
    redo: &dyn Redo,
    key: Key,
    base: Option<Bytes>,
    values: Vec<(Lsn, Value)>,
) -> Result<Bytes, RedoError> {
    let (rel, block) = place(key);
    let refused = |message: String| RedoError::Refused { rel, block, message };
    let mut page = base;
    for step in plan(values) {
        page = Some(match step {
            Step::Image(image) => image,
            Step::Zero => Bytes::from_static(&[0; PAGE_SIZE]),
            Step::Small(record) => {
                let Some(old) = page else {
                    return Err(refused(format!("there is no page to apply {record:?} to")));
                };
                let number = match key.kind() {
                    KeyKind::RelBlock(_, block) => block,
                    KeyKind::SlruBlock(_, segment, block) => {
                        segment.saturating_mul(SLRU_PAGES_PER_SEGMENT).saturating_add(block)
                    }
                    KeyKind::Metadata => {
                        return Err(refused(format!("{record:?} is stored under no page")));
                    }
                };
                let mut new = BytesMut::from(old);
                small::apply(&record, number, &mut new)
                    .map_err(|error| refused(error.to_string()))?;
                new.freeze()
            }
            Step::Records { init, records } => {
                let KeyKind::RelBlock(rel, block) = key.kind() else {
                    return Err(refused("a WAL record is stored under no relation's page".into()));
                };
                let base = if init { None } else { page };
                redo.redo(RedoRequest { rel, block, base, records }).await?
            }
        });
    }
    page.ok_or(RedoError::NoRecords { rel, block })
}

#[cfg(test)]
mod tests {
    use futures_util::future::LocalBoxFuture;
    use futures_util::{FutureExt, future};

    use super::*;
    use crate::base::SlruKind;

    /// Answers a page whose first bytes say what it was asked.
    struct Recorder;

    impl Redo for Recorder {
        fn redo(&self, request: RedoRequest) -> LocalBoxFuture<'_, Result<Bytes, RedoError>> {
            let mut page = request.base.map_or(vec![0; PAGE_SIZE], Vec::from);
            for (lsn, _) in &request.records {
                page[0] = page[0].wrapping_mul(31).wrapping_add(lsn.0 as u8);
            }
            page[1] += 1;
            future::ready(Ok(page.into())).boxed_local()
        }
    }

    fn wal(will_init: bool) -> Value {
        Value::WalRecord { will_init, record: Bytes::from_static(b"r") }
    }

    fn clear() -> Value {
        Value::Small(SmallRecord::VmClear { flags: 3, heap_blocks: [Some(0), None] })
    }

    fn vm_key() -> Key {
        Key::rel_block(RelNode { spc: 1663, db: 5, rel: 16384 }.fork(2), 0)
    }

    fn run(key: Key, base: Option<Bytes>, values: Vec<Value>) -> Result<Bytes, RedoError> {
        let values = (1..).map(Lsn).zip(values).collect();
        futures_lite::future::block_on(rebuild(&Recorder, key, base, values))
    }

    #[test]
    fn runs_and_bases() {
        let values = [wal(false), clear(), wal(true), wal(false), clear(), wal(false)];
        let steps = plan((1..).map(Lsn).zip(values).collect());
        let record = |lsn| (Lsn(lsn), Bytes::from_static(b"r"));
        let Value::Small(small) = clear() else { unreachable!() };
        let expected = [
            Step::Records { init: true, records: vec![record(3), record(4)] },
            Step::Small(small),
            Step::Records { init: false, records: vec![record(6)] },
        ];
        assert_eq!(steps, expected);
        assert_eq!(plan(Vec::new()), []);
    }

    #[test]
    fn steps_build_on_each_other() {
        let base = Bytes::from(vec![0xFF; PAGE_SIZE]);
        assert_eq!(run(vm_key(), Some(base.clone()), vec![]), Ok(base.clone()));
        assert!(matches!(run(vm_key(), None, vec![]), Err(RedoError::NoRecords { .. })));
        let page = run(vm_key(), None, vec![Value::Image(base), clear()]).unwrap();
        assert_eq!((page[24], page[25]), (0xFC, 0xFF));
        let page = run(vm_key(), None, vec![Value::ZeroPage, wal(false), clear(), wal(false)]);
        assert_eq!(page.unwrap()[..2], [(2 * 31) + 4, 2]);
        assert!(run(vm_key(), None, vec![clear()]).is_err());
    }

    #[test]
    fn slru_pages() {
        let key = Key::slru_block(SlruKind::Clog, 1, 2);
        let set =
            |xid| Value::Small(SmallRecord::ClogSet { status: 1, timestamp: 0, xids: vec![xid] });
        let page = run(key, None, vec![Value::ZeroPage, set(34 * 32_768)]).unwrap();
        assert_eq!(page[0], 1);
        assert!(run(key, None, vec![Value::ZeroPage, set(2 * 32_768)]).is_err());
        assert!(run(key, None, vec![Value::ZeroPage, wal(false)]).is_err());
    }
}
