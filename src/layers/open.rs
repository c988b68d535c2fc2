//! The open layer: what came in since the last checkpoint, in memory.
//!
//! Versions stand one after the other as they came. Each points to the one before it of the same
//! key, and a table has the newest of every key, so that taking in a value is one look-up and one
//! append, and a read walks from the newest to the oldest. Keys of relations, nearly all, are in a
//! table without order ([`Places`]), and are sorted when the layer is written; the others are few
//! and are asked for by range.
//!
//! A WAL record is not copied: its version says where in the WAL it begins, and the layer holds the
//! WAL itself, as it came in ([`RawWal`]). A record that several pages share is there once. Nor is a
//! page image that is all of a record: its version says the same, and how to make the page.
//!
//! Nothing here is on disk; the journal covers it. When it is large enough the owner
//! [freezes](OpenLayer::freeze) it, and a background executor writes it out.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use crate::base::raw_wal::RawWal;
use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::layers::frozen::FrozenLayer;
use crate::layers::places::Places;
use crate::layers::rows::Rows;
use crate::layers::{Lookup, Newest, Values, keep_newest};

/// Memory that a key takes in the ordered table.
const KEY_BYTES: usize = 2 * (size_of::<Key>() + size_of::<u32>());

/// "There is no older version."
const NONE: u32 = u32::MAX;

/// Makes the page of a WAL record that carries one, from its bytes and the LSN of its change.
pub type PageOf = fn(record: &[u8], lsn: Lsn) -> Option<Bytes>;

/// Where the content of a version is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// A WAL record; the place is the LSN where it begins.
    Record,
    /// A WAL record that initialises the page.
    InitRecord,
    /// The page that a WAL record carries; the place is the LSN where the record begins.
    Page,
    /// One of the values; the place is its number.
    Value,
}

/// One version.
#[derive(Debug)]
struct Version {
    lsn: Lsn,
    place: u64,
    /// Number of the version before, of the same key.
    previous: u32,
    content: Content,
}

/// Versions by key, in LSN order; several at one LSN stand in the order in which they came.
#[derive(Debug)]
pub(super) struct Versions {
    versions: Rows<Version>,
    /// What is no WAL record.
    values: Rows<Value>,
    wal: RawWal,
    /// For [`Content::Page`].
    page_of: Option<PageOf>,
    /// End of the last record that a version points to.
    wal_used: Lsn,
    /// Numbers of the newest versions of relation keys.
    relations: Places,
    /// The same of all other keys.
    others: BTreeMap<Key, u32>,
    /// Number of keys.
    keys: u64,
    /// Memory of `values` and `others`.
    memory_bytes: usize,
    /// Highest LSN of all.
    last: Option<Lsn>,
}

impl Versions {
    fn new(wal: RawWal) -> Versions {
        Versions {
            versions: Rows::default(),
            values: Rows::default(),
            wal,
            page_of: None,
            wal_used: Lsn::INVALID,
            relations: Places::default(),
            others: BTreeMap::new(),
            keys: 0,
            memory_bytes: 0,
            last: None,
        }
    }

    fn put(&mut self, key: Key, lsn: Lsn, content: Content, place: u64) {
        let number = u32::try_from(self.versions.len()).unwrap_or(NONE);
        assert!(number != NONE, "an open layer of 2^32 values does not fit into any memory");
        let older = match key.is_of_relation() {
            true => self.relations.replace(key, number),
            false => {
                let older = self.others.insert(key, number);
                self.memory_bytes += if older.is_none() { KEY_BYTES } else { 0 };
                older
            }
        };
        // What is above all others need not be compared with the one before.
        if self.last.is_some_and(|last| lsn < last)
            && let Some(Version { lsn: last, .. }) =
                older.and_then(|older| self.versions.get(older as usize))
        {
            assert!(*last <= lsn, "{key:?}: a value at {lsn} came after one at {last}");
        }
        self.last = self.last.max(Some(lsn));
        let previous = older.unwrap_or(NONE);
        self.keys += u64::from(previous == NONE);
        self.versions.push(Version { lsn, place, previous, content });
    }

    fn put_value(&mut self, key: Key, lsn: Lsn, value: Value) {
        self.memory_bytes += size_of::<Value>() + value.encoded_len();
        self.put(key, lsn, Content::Value, self.values.len() as u64);
        self.values.push(value);
    }

    fn put_of_wal(&mut self, key: Key, lsn: Lsn, start: Lsn, content: Content) {
        if self.wal_used < lsn {
            assert!(self.wal.holds(start, lsn), "the WAL of the record at {start} is not held");
            self.wal_used = lsn;
        }
        self.put(key, lsn, content, start.0);
    }

    fn is_base(&self, version: &Version) -> bool {
        match version.content {
            Content::Record => false,
            Content::InitRecord | Content::Page => true,
            Content::Value => {
                self.values.get(version.place as usize).is_some_and(|value| value.is_base())
            }
        }
    }

    fn value(&self, version: &Version) -> Value {
        let record = || {
            let record = self.wal.record(Lsn(version.place));
            record.expect("the WAL of a record was held when its version came")
        };
        match version.content {
            Content::Record => Value::WalRecord { will_init: false, record: record() },
            Content::InitRecord => Value::WalRecord { will_init: true, record: record() },
            Content::Page => {
                let page = self.page_of.and_then(|page_of| page_of(&record(), version.lsn));
                Value::Image(page.expect("whoever put the record knew that it carries a page"))
            }
            Content::Value => {
                let value = self.values.get(version.place as usize);
                value.expect("a value comes together with its version").clone()
            }
        }
    }

    /// Versions from this place on, newest first.
    fn chain(&self, place: u32) -> impl Iterator<Item = &Version> {
        let newest = self.versions.get(place as usize);
        std::iter::successors(newest, |version| self.versions.get(version.previous as usize))
    }

    /// Number of the newest version.
    fn place(&self, key: Key) -> Option<u32> {
        match key.is_of_relation() {
            true => self.relations.get(key),
            false => self.others.get(&key).copied(),
        }
    }

    pub(super) fn collect(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Lookup {
        for version in self.place(key).into_iter().flat_map(|place| self.chain(place)) {
            if version.lsn < lsns.start {
                break;
            }
            if version.lsn < lsns.end {
                out.push((version.lsn, self.value(version)));
                if self.is_base(version) {
                    return Lookup::Complete;
                }
            }
        }
        Lookup::Continue
    }

    pub(super) fn newest(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Lookup> {
        let Some(version) = self.place(key).and_then(|place| {
            let within = |version: &&Version| version.lsn < lsns.end;
            self.chain(place).find(within).filter(|version| version.lsn >= lsns.start)
        }) else {
            return Some(Lookup::Continue);
        };
        if !self.is_base(version) {
            return None;
        }
        out.push((version.lsn, self.value(version)));
        Some(Lookup::Complete)
    }

    pub(super) fn scan(&self, keys: &KeyRange, below: Lsn, out: &mut Newest) {
        if keys.start >= keys.end {
            return;
        }
        let mut keep = |key: Key, place: u32| {
            let newest = self.chain(place).find(|version| version.lsn < below);
            if let Some(version) = newest {
                keep_newest(out, key, version.lsn, &self.value(version));
            }
        };
        if keys.start.is_of_relation() {
            let wanted = self.relations.iter().filter(|(key, _)| keys.contains(key));
            wanted.for_each(|(key, place)| keep(key, place));
        }
        self.others.range(keys.clone()).for_each(|(key, place)| keep(*key, *place));
    }

    /// All versions in order of key, then as they came.
    pub(super) fn entries(&self) -> impl Iterator<Item = (Key, Lsn, Value)> {
        let others = self.others.iter().map(|(key, place)| (*key, *place));
        self.relations.sorted().chain(others).flat_map(move |(key, place)| {
            let mut versions: Vec<_> = self.chain(place).collect();
            versions.reverse();
            versions.into_iter().map(move |version| (key, version.lsn, self.value(version)))
        })
    }

    pub(super) fn value_count(&self) -> u64 {
        self.versions.len() as u64
    }

    pub(super) fn key_count(&self) -> u64 {
        self.keys
    }

    pub(super) fn memory_bytes(&self) -> usize {
        // WAL counts as far as records were put in: what waits behind them is soon another layer's.
        let used = self.wal_used.bytes_since(self.wal.start()) as usize;
        self.memory_bytes
            + self.versions.len() * size_of::<Version>()
            + self.relations.memory_bytes()
            + self.wal.memory_bytes().min(used)
    }
}

/// The layer that takes in new values.
#[derive(Debug)]
pub struct OpenLayer {
    start: Lsn,
    versions: Versions,
}

impl OpenLayer {
    /// An empty layer for values with `lsn >= start`, from WAL with this `wal_segment_size`.
    pub fn new(start: Lsn, segment_bytes: u64) -> OpenLayer {
        OpenLayer { start, versions: Versions::new(RawWal::new(segment_bytes)) }
    }

    /// The layer that follows this one: an empty one from `end` on. It holds the WAL from there
    /// on, which may be the first part of a record.
    pub fn successor(&self, end: Lsn) -> OpenLayer {
        let wal = self.versions.wal.tail(Lsn(end.0.saturating_sub(1)));
        OpenLayer { start: end, versions: Versions::new(wal) }
    }

    /// Holds the WAL from `start` on, for the records that begin or end in it. It is let go of
    /// soon unless [`OpenLayer::put_record`] refers to it. Every record before `boundary` has been
    /// put in. Gives the bytes as they are held.
    pub fn hold_wal(&mut self, start: Lsn, wal: Bytes, boundary: Lsn) -> Bytes {
        self.versions.wal.forget_newest(&(self.versions.wal_used..boundary));
        self.versions.wal.push(start, wal)
    }

    /// First LSN that belongs here.
    pub fn start(&self) -> Lsn {
        self.start
    }

    /// Adds a version of `key`.
    ///
    /// # Panics
    /// If `lsn` is below the start of the layer or below that of an earlier value of the same key.
    /// Either would lose a version without a trace.
    pub fn put(&mut self, key: Key, lsn: Lsn, value: Value) {
        assert!(lsn >= self.start, "a value at {lsn} is below the open layer's {}", self.start);
        self.versions.put_value(key, lsn, value);
    }

    /// Adds the WAL record `start..lsn` as a version of `key`; `will_init` as in
    /// [`Value::WalRecord`]. The record's checksum was checked.
    ///
    /// # Panics
    /// As [`OpenLayer::put`], and if its WAL was not given to [`OpenLayer::hold_wal`].
    pub fn put_record(&mut self, key: Key, lsn: Lsn, start: Lsn, will_init: bool) {
        assert!(lsn >= self.start, "a value at {lsn} is below the open layer's {}", self.start);
        let content = if will_init { Content::InitRecord } else { Content::Record };
        self.versions.put_of_wal(key, lsn, start, content);
    }

    /// Adds the page that `page_of` makes of the WAL record `start..lsn` as a version of `key`. It
    /// is made each time it is asked for, always by the function that came last.
    ///
    /// # Panics
    /// As [`OpenLayer::put_record`]; reads panic if `page_of` gives no page.
    pub fn put_page(&mut self, key: Key, lsn: Lsn, start: Lsn, page_of: PageOf) {
        assert!(lsn >= self.start, "a value at {lsn} is below the open layer's {}", self.start);
        self.versions.page_of = Some(page_of);
        self.versions.put_of_wal(key, lsn, start, Content::Page);
    }

    /// Appends the values of `key` within `lsns` to `out`, newest first, up to and including the
    /// first base.
    pub fn collect(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Lookup {
        self.versions.collect(key, lsns, out)
    }

    /// Appends the newest value of `key` within `lsns` to `out` if that is a base; `None` if it is
    /// not.
    pub fn newest(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Lookup> {
        self.versions.newest(key, lsns, out)
    }

    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    pub fn scan(&self, keys: &KeyRange, below: Lsn, out: &mut Newest) {
        self.versions.scan(keys, below, out);
    }

    /// True without values.
    pub fn is_empty(&self) -> bool {
        self.versions.versions.is_empty()
    }

    /// Number of values.
    pub fn value_count(&self) -> u64 {
        self.versions.value_count()
    }

    /// Estimate of the memory in use, in bytes: values with their overhead.
    pub fn memory_bytes(&self) -> usize {
        self.versions.memory_bytes()
    }

    /// Closes the layer at `end`, which is above every LSN in it, for writing out elsewhere.
    ///
    /// # Panics
    /// If a value is at or above `end`, or the range would be empty.
    pub fn freeze(self, end: Lsn) -> Arc<FrozenLayer> {
        assert!(self.start < end, "a frozen layer {}..{end} would be empty", self.start);
        if let Some(last) = self.versions.last {
            assert!(last < end, "a value at {last} is not below the layer's end {end}");
        }
        Arc::new(FrozenLayer::new(self.start..end, self.versions))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 1 << 24;

    fn key(block: u32) -> Key {
        Key { field1: 0, field2: 1663, field3: 5, field4: 16384, field5: 0, field6: block }
    }

    /// Three records of 8,000 bytes, one after the other, over two WAL pages; where each begins
    /// and ends, and the WAL.
    fn three_records() -> (Vec<(Lsn, Lsn, Bytes)>, Vec<u8>) {
        let (first, mut wal, mut records) = (Lsn(5 * 8192 + 24), Vec::new(), Vec::new());
        for salt in 1..=3u8 {
            let mut record = vec![salt; 8000];
            record[..4].copy_from_slice(&8000u32.to_le_bytes());
            let start = Lsn(first.0 + wal.len() as u64);
            for byte in &record {
                if (first.0 + wal.len() as u64).is_multiple_of(8192) {
                    wal.extend_from_slice(&[0xEE; 24]);
                }
                wal.push(*byte);
            }
            records.push((start, Lsn(first.0 + wal.len() as u64), Bytes::from(record)));
        }
        (records, wal)
    }

    #[test]
    fn records_are_read_out_of_the_wal_that_is_held() {
        let (records, wal) = three_records();
        let from = records[0].0;
        for cut in [1, 7_000, 17_000, wal.len() - 1] {
            let mut layer = OpenLayer::new(Lsn(from.0 + 1), SEGMENT);
            layer.hold_wal(from, Bytes::copy_from_slice(&wal[..cut]), from);
            let rest = Bytes::copy_from_slice(&wal[cut..]);
            layer.hold_wal(Lsn(from.0 + cut as u64), rest, from);
            for (n, (start, end, _)) in records.iter().enumerate() {
                layer.put_record(key(7), *end, *start, n == 1);
                layer.put_record(key(8), *end, *start, false);
            }
            assert!(layer.memory_bytes() >= wal.len());
            let record = |n: usize, will_init| {
                (records[n].1, Value::WalRecord { will_init, record: records[n].2.clone() })
            };
            let all = Lsn(0)..Lsn::MAX;
            let mut found = Vec::new();
            assert_eq!(layer.collect(key(7), &all, &mut found), Lookup::Complete);
            assert_eq!(found, [record(2, false), record(1, true)], "{cut}");
            let frozen = layer.freeze(Lsn(records[2].1.0 + 1));
            let values: Vec<_> = frozen.entries().map(|(_, lsn, value)| (lsn, value)).collect();
            let same = [false, true, false].into_iter().enumerate().map(|(n, i)| record(n, i));
            let same = same.chain((0..3).map(|n| record(n, false)));
            assert_eq!(values, same.collect::<Vec<_>>(), "{cut}");
        }
    }

    #[test]
    fn a_page_is_made_of_the_record_that_carries_it() {
        fn page_of(record: &[u8], lsn: Lsn) -> Option<Bytes> {
            let mut page = record.get(4..12)?.to_vec();
            page.extend_from_slice(&lsn.0.to_le_bytes());
            Some(page.into())
        }
        let (records, wal) = three_records();
        let from = records[0].0;
        let mut layer = OpenLayer::new(Lsn(from.0 + 1), SEGMENT);
        layer.hold_wal(from, Bytes::from(wal), from);
        let before = layer.memory_bytes();
        for (start, end, _) in &records {
            layer.put_page(key(7), *end, *start, page_of);
        }
        assert!(layer.memory_bytes() >= before + 3 * 8000);
        let page = |n: usize| {
            let (_, end, record) = &records[n];
            (*end, Value::Image(page_of(record, *end).unwrap()))
        };
        let mut found = Vec::new();
        assert_eq!(layer.collect(key(7), &(Lsn(0)..Lsn::MAX), &mut found), Lookup::Complete);
        assert_eq!(found, [page(2)]);
        let frozen = layer.freeze(Lsn(records[2].1.0 + 1));
        let values: Vec<_> = frozen.entries().map(|(_, lsn, value)| (lsn, value)).collect();
        assert_eq!(values, [page(0), page(1), page(2)]);
    }

    #[test]
    fn the_next_layer_has_the_begin_of_the_record_that_is_under_way() {
        let (records, wal) = three_records();
        let from = records[0].0;
        let mut layer = OpenLayer::new(Lsn(from.0 + 1), SEGMENT);
        // All of the first record, and a part of the second.
        layer.hold_wal(from, Bytes::copy_from_slice(&wal[..9_000]), from);
        layer.put_record(key(1), records[0].1, from, true);
        let mut next = layer.successor(Lsn(records[0].1.0 + 1));
        drop(layer);
        let place = Lsn(from.0 + 9_000);
        next.hold_wal(place, Bytes::copy_from_slice(&wal[9_000..]), records[0].1);
        next.put_record(key(1), records[1].1, records[1].0, false);
        let mut found = Vec::new();
        next.collect(key(1), &(Lsn(0)..Lsn::MAX), &mut found);
        let record = records[1].2.clone();
        assert_eq!(found, [(records[1].1, Value::WalRecord { will_init: false, record })]);
    }

    #[test]
    fn wal_that_nothing_refers_to_is_let_go_of() {
        let mut layer = OpenLayer::new(Lsn(8192), SEGMENT);
        let piece = Bytes::from(vec![0; 20_000]);
        let empty = layer.memory_bytes();
        for n in 0..50u64 {
            let start = Lsn(8192 + n * 20_000);
            layer.hold_wal(start, piece.clone(), start);
        }
        assert!(layer.memory_bytes() < empty + 3 * piece.len());
    }

    #[test]
    #[should_panic(expected = "is not held")]
    fn a_record_without_its_wal_is_refused() {
        let mut layer = OpenLayer::new(Lsn(8192), SEGMENT);
        layer.hold_wal(Lsn(8192), Bytes::from(vec![0; 100]), Lsn(8192));
        layer.put_record(key(1), Lsn(8300), Lsn(8240), false);
    }
}
