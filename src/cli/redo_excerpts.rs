//! Excerpts in a comparison of redo: are they records like any other, what they save, and whether
//! native redo makes the same page of them ([`crate::redo::excerpt`]).

use std::collections::BTreeMap;
use std::fmt::Write as _;

use bytes::Bytes;

use super::redo_compare::manager_name;
use crate::base::page::Page;
use crate::base::{BlockNumber, Lsn, RelTag};
use crate::redo::native::{Applied, NotNative, apply, apply_bytes};
use crate::redo::{RedoSettings, record as fit};
use crate::wal::change::Change;
use crate::wal::decode::decode;
use crate::wal::record::{BlockRef, Record};
use crate::wal::stream::StreamRecord;

/// What makes the record that is stored for one block; `None` for the whole one. As
/// [`crate::redo::excerpt::excerpt`], or one with a mistake, for tests.
pub type Excerpt<'a> = Box<dyn Fn(&[u8], RelTag, BlockNumber) -> Option<Bytes> + 'a>;

/// Records of several blocks of one kind. A record counts once for each of its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExcerptSums {
    /// Page changes.
    pub changes: u64,
    /// Of these, those with an excerpt.
    pub shortened: u64,
    /// Bytes of the whole records.
    pub whole_bytes: u64,
    /// Bytes of what is stored instead: excerpts, and whole records where there are none.
    pub stored_bytes: u64,
}

/// By resource manager and operation.
#[derive(Clone, Debug, Default)]
pub struct ExcerptReport(pub BTreeMap<(u8, u8), ExcerptSums>);

impl ExcerptReport {
    /// Notes one block of a record.
    pub fn count(&mut self, kind: (u8, u8), whole: &Bytes, short: Option<&Bytes>) {
        let sums = self.0.entry(kind).or_default();
        sums.changes += 1;
        sums.shortened += u64::from(short.is_some());
        sums.whole_bytes += whole.len() as u64;
        sums.stored_bytes += short.unwrap_or(whole).len() as u64;
    }

    /// Sums over all kinds.
    pub fn total(&self) -> ExcerptSums {
        self.0.values().fold(ExcerptSums::default(), |sum, kind| ExcerptSums {
            changes: sum.changes + kind.changes,
            shortened: sum.shortened + kind.shortened,
            whole_bytes: sum.whole_bytes + kind.whole_bytes,
            stored_bytes: sum.stored_bytes + kind.stored_bytes,
        })
    }

    /// The table that a human reads.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let [a, b, c, d] = ["changes", "excerpts", "bytes", "stored"];
        let _ = writeln!(out, "{:<24}{a:>10}{b:>10}{c:>12}{d:>12}", "of several blocks");
        let mut line = |name: &str, sums: &ExcerptSums| {
            let ExcerptSums { changes, shortened, whole_bytes, stored_bytes } = sums;
            let _ = writeln!(
                out,
                "{name:<24}{changes:>10}{shortened:>10}{whole_bytes:>12}{stored_bytes:>12}"
            );
        };
        for ((rmgr, operation), sums) in &self.0 {
            line(&format!("{} {operation:02X}", manager_name(*rmgr)), sums);
        }
        line("all", &self.total());
        out
    }
}

/// The block of a record that was applied natively to a page.
pub(super) struct Whole<'a> {
    /// The record.
    pub(super) found: &'a StreamRecord,
    /// The block.
    pub(super) block: &'a BlockRef<'a>,
    /// The page before.
    pub(super) before: &'a Page,
    /// The page after, if native redo made it.
    pub(super) after: &'a Page,
    /// What native redo said.
    pub(super) done: Result<Applied, NotNative>,
}

impl Whole<'_> {
    /// Ok if `short` is a sound record of which native redo makes the same; else what differs.
    pub(super) fn check(&self, short: &Bytes, settings: &RedoSettings) -> Result<(), String> {
        let (rel, number) = (self.block.rel, self.block.block);
        let (start, lsn) = (self.found.start, self.found.end);
        fit::check(lsn, rel, number, short).map_err(|error| error.to_string())?;
        let record = Record::parse(short).map_err(|error| error.to_string())?;
        let block = record.blocks.iter().find(|block| block.rel == rel && block.block == number);
        let block = block.ok_or("its excerpt does not name the block")?;
        if self.changes(&self.found.bytes, start, lsn)? != self.changes(short, start, lsn)? {
            return Err("its excerpt decodes to another change".to_owned());
        }
        let mut page = Box::new(*self.before);
        let done = apply(&mut page, &record, block, lsn, settings);
        if done != self.done || done.is_ok() && *page != *self.after {
            return Err(format!("native redo of its excerpt differs: {done:?}"));
        }
        let (mut whole, mut page) = (Box::new(*self.before), Box::new(*self.before));
        let target = (rel, number);
        let wanted = apply_bytes(&mut whole, &self.found.bytes, target, lsn, settings);
        let done = apply_bytes(&mut page, short, target, lsn, settings);
        match done == wanted && (done.is_err() || page == whole) {
            true => Ok(()),
            false => Err(format!("native redo of its excerpt differs: {done:?}, bytes")),
        }
    }

    /// What a record changes, blocks other than this one apart.
    fn changes(&self, record: &Bytes, start: Lsn, end: Lsn) -> Result<Vec<Change>, String> {
        let mut changes = decode(record, start, end).map_err(|error| error.to_string())?;
        changes.retain(|change| match change {
            Change::Block(other) => other.rel == self.block.rel && other.block == self.block.block,
            _ => true,
        });
        Ok(changes)
    }
}
