//! The open layer: what came in since the last checkpoint, in memory.
//!
//! Values stand one after the other as they came. Each points to the one before it of the same
//! key, and a table has the newest of every key, so that taking in a value is one look-up and one
//! append, and a read walks from the newest to the oldest. Keys of relations, nearly all, are in a
//! hash table, and are sorted when the layer is written; the others are few and are asked for by
//! range.
//!
//! Nothing here is on disk; the journal covers it. When it is large enough the owner
//! [freezes](OpenLayer::freeze) it, and a background executor writes it out.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use foldhash::fast::RandomState;

use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::layers::frozen::FrozenLayer;
use crate::layers::{Lookup, Newest, keep_newest};

/// Memory that one key takes beside its versions: its place in a table that is half full.
const KEY_OVERHEAD_BYTES: usize = 2 * (size_of::<Key>() + size_of::<u32>());

/// "There is no older version."
const NONE: u32 = u32::MAX;

/// One version.
#[derive(Debug)]
struct Version {
    lsn: Lsn,
    value: Value,
    /// Place of the version before, of the same key.
    previous: u32,
}

/// Versions by key, in LSN order; several at one LSN stand in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Versions {
    versions: Vec<Version>,
    /// Places of the newest versions of relation keys; its order must not matter to anybody.
    relations: HashMap<Key, u32, RandomState>,
    /// The same of all other keys.
    others: BTreeMap<Key, u32>,
    memory_bytes: usize,
    /// Highest LSN of all.
    last: Option<Lsn>,
}

impl Versions {
    fn put(&mut self, key: Key, lsn: Lsn, value: Value) {
        self.memory_bytes += size_of::<Version>() + value.encoded_len();
        self.last = self.last.max(Some(lsn));
        let place = u32::try_from(self.versions.len()).unwrap_or(NONE);
        assert!(place != NONE, "an open layer of 2^32 values does not fit into any memory");
        let older = match key.is_of_relation() {
            true => self.relations.insert(key, place),
            false => self.others.insert(key, place),
        };
        match older.and_then(|older| self.versions.get(older as usize)) {
            None => self.memory_bytes += KEY_OVERHEAD_BYTES,
            Some(Version { lsn: last, .. }) => {
                assert!(*last <= lsn, "{key:?}: a value at {lsn} came after one at {last}");
            }
        }
        self.versions.push(Version { lsn, value, previous: older.unwrap_or(NONE) });
    }

    /// Versions from this place on, newest first.
    fn chain(&self, place: u32) -> impl Iterator<Item = &Version> {
        let newest = self.versions.get(place as usize);
        std::iter::successors(newest, |version| self.versions.get(version.previous as usize))
    }

    pub(super) fn collect(&self, key: Key, lsns: &LsnRange, out: &mut Vec<(Lsn, Value)>) -> Lookup {
        let place = match key.is_of_relation() {
            true => self.relations.get(&key),
            false => self.others.get(&key),
        };
        for version in place.into_iter().flat_map(|place| self.chain(*place)) {
            if version.lsn < lsns.start {
                break;
            }
            if version.lsn < lsns.end {
                out.push((version.lsn, version.value.clone()));
                if version.value.is_base() {
                    return Lookup::Complete;
                }
            }
        }
        Lookup::Continue
    }

    pub(super) fn scan(&self, keys: &KeyRange, below: Lsn, out: &mut Newest) {
        if keys.start >= keys.end {
            return;
        }
        let mut keep = |key: Key, place: u32| {
            let newest = self.chain(place).find(|version| version.lsn < below);
            if let Some(Version { lsn, value, .. }) = newest {
                keep_newest(out, key, *lsn, value);
            }
        };
        if keys.start.is_of_relation() {
            let wanted = self.relations.iter().filter(|(key, _)| keys.contains(key));
            wanted.for_each(|(key, place)| keep(*key, *place));
        }
        self.others.range(keys.clone()).for_each(|(key, place)| keep(*key, *place));
    }

    /// All versions in order of key, then as they came.
    pub(super) fn entries(&self) -> impl Iterator<Item = (Key, Lsn, &Value)> {
        let mut keys: Vec<(Key, u32)> = self.relations.iter().map(|(k, p)| (*k, *p)).collect();
        keys.sort_unstable();
        keys.extend(self.others.iter().map(|(key, place)| (*key, *place)));
        keys.into_iter().flat_map(|(key, place)| {
            let mut versions: Vec<_> = self.chain(place).collect();
            versions.reverse();
            versions.into_iter().map(move |version| (key, version.lsn, &version.value))
        })
    }

    pub(super) fn value_count(&self) -> u64 {
        self.versions.len() as u64
    }

    pub(super) fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }
}

/// The layer that takes in new values.
#[derive(Debug)]
pub struct OpenLayer {
    start: Lsn,
    versions: Versions,
}

impl OpenLayer {
    /// An empty layer for values with `lsn >= start`.
    pub fn new(start: Lsn) -> OpenLayer {
        OpenLayer { start, versions: Versions::default() }
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
        self.versions.put(key, lsn, value);
    }

    /// Appends the values of `key` within `lsns` to `out`, newest first, up to and including the
    /// first base.
    pub fn collect(&self, key: Key, lsns: &LsnRange, out: &mut Vec<(Lsn, Value)>) -> Lookup {
        self.versions.collect(key, lsns, out)
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
        self.versions.memory_bytes
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
