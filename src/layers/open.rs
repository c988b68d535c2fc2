//! The open layer: what came in since the last checkpoint, in memory.
//!
//! Keys are ordered, and each has its versions in the order in which they came, which is LSN
//! order. Nothing here is on disk; the journal covers it. When it is large enough the owner
//! [freezes](OpenLayer::freeze) it, and a background executor writes it out.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::layers::frozen::FrozenLayer;
use crate::layers::{Lookup, Newest, keep_newest};

/// Memory that one version takes beside its bytes.
const VERSION_OVERHEAD_BYTES: usize = size_of::<(Lsn, Value)>();
/// Memory that one key takes beside its versions: key, vector and its share of the tree.
const KEY_OVERHEAD_BYTES: usize = 2 * (size_of::<Key>() + size_of::<Vec<(Lsn, Value)>>());

/// Versions by key, in LSN order; several at one LSN stand in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Versions {
    map: BTreeMap<Key, Vec<(Lsn, Value)>>,
    value_count: u64,
    memory_bytes: usize,
    /// Highest LSN of all.
    last: Option<Lsn>,
}

impl Versions {
    fn put(&mut self, key: Key, lsn: Lsn, value: Value) {
        self.memory_bytes += VERSION_OVERHEAD_BYTES + value.encoded_len();
        self.value_count += 1;
        self.last = self.last.max(Some(lsn));
        let versions = self.map.entry(key).or_insert_with(|| {
            self.memory_bytes += KEY_OVERHEAD_BYTES;
            Vec::with_capacity(1)
        });
        if let Some((last, _)) = versions.last() {
            assert!(*last <= lsn, "{key:?}: a value at {lsn} came after one at {last}");
        }
        versions.push((lsn, value));
    }

    pub(super) fn collect(&self, key: Key, lsns: &LsnRange, out: &mut Vec<(Lsn, Value)>) -> Lookup {
        let versions = self.map.get(&key).map(Vec::as_slice).unwrap_or_default();
        for (lsn, value) in versions.iter().rev() {
            if *lsn < lsns.start {
                break;
            }
            if *lsn < lsns.end {
                out.push((*lsn, value.clone()));
                if value.is_base() {
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
        for (key, versions) in self.map.range(keys.clone()) {
            let newest = versions.iter().rev().find(|(lsn, _)| *lsn < below);
            if let Some((lsn, value)) = newest {
                keep_newest(out, *key, *lsn, value);
            }
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (Key, Lsn, &Value)> {
        self.map
            .iter()
            .flat_map(|(key, versions)| versions.iter().map(|(lsn, value)| (*key, *lsn, value)))
    }

    pub(super) fn value_count(&self) -> u64 {
        self.value_count
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
        self.versions.value_count == 0
    }

    /// Number of values.
    pub fn value_count(&self) -> u64 {
        self.versions.value_count
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
