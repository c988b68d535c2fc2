//! What an index must obey, as far as it can be seen from the index alone. Pure.
//!
//! 1. Every name is that of a layer, and stands there once.
//! 2. Layers hold nothing above `disk_consistent_lsn`.
//! 3. For any key, the delta layers that cover it have disjoint LSN ranges: reads rely on one
//!    total order. Found by a sweep over LSNs with the key ranges of the layers that are open at
//!    the moment, n log n for n layers.
//! 4. The image layers at or below the first readable LSN together cover all keys: every read
//!    finds a base, or the word that there is none.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::layers::LayerName;
use crate::limits::CHECK_PROBLEMS_MAX;
use crate::shard::index::TimelineIndex;

/// What contradicts the rules, in words; at most [`CHECK_PROBLEMS_MAX`] of them.
pub fn problems(index: &TimelineIndex) -> Vec<String> {
    let mut problems = Vec::new();
    let mut deltas = Vec::new();
    let mut images = Vec::new();
    let mut seen = BTreeSet::new();
    let last = index.disk_consistent_lsn;
    for layer in &index.layers {
        if !seen.insert(&layer.name) {
            problems.push(format!("it names layer {} twice", layer.name));
            continue;
        }
        let name: LayerName = match layer.name.parse() {
            Ok(name) => name,
            Err(error) => {
                problems.push(format!("it names a layer that is none: {error}"));
                continue;
            }
        };
        // Images may: those of a copied database are made before the record's checkpoint comes.
        if !name.is_image() && name.lsns().end.0.saturating_sub(1) > last.0 {
            problems.push(format!(
                "layer {name} reaches beyond disk_consistent_lsn {last}: its values would be \
                 taken in a second time from the journal"
            ));
        }
        match name {
            LayerName::Delta { keys, lsns } => deltas.push((keys, lsns)),
            LayerName::Image { keys, lsn } => images.push((keys, lsn)),
        }
    }
    problems.extend(overlaps(deltas));
    // A branch has what is missing here in its ancestor.
    if index.ancestor.is_none() {
        problems.extend(gaps(images, index.start_lsn.max(index.gc_cutoff_lsn)));
    }
    problems.truncate(CHECK_PROBLEMS_MAX);
    problems
}

/// Delta layers that cover the same key at the same LSN.
fn overlaps(mut deltas: Vec<(KeyRange, LsnRange)>) -> Vec<String> {
    deltas.sort_by_key(|(keys, lsns)| (lsns.start, keys.start));
    let mut problems = Vec::new();
    // Key ranges of the layers that are open at the LSN of the sweep; disjoint.
    let mut open: BTreeMap<Key, (Key, LsnRange)> = BTreeMap::new();
    let mut ends: BTreeSet<(Lsn, Key)> = BTreeSet::new();
    for (keys, lsns) in deltas {
        while let Some(&(end, key)) = ends.first()
            && end <= lsns.start
        {
            ends.remove(&(end, key));
            open.remove(&key);
        }
        let before =
            open.range(..=keys.start).next_back().filter(|(_, (end, _))| *end > keys.start);
        let after = || open.range(keys.start..).next().filter(|(start, _)| **start < keys.end);
        if let Some((start, (end, other))) = before.or_else(after) {
            let one = LayerName::Delta { keys: keys.clone(), lsns: lsns.clone() };
            let two = LayerName::Delta { keys: *start..*end, lsns: other.clone() };
            problems.push(format!("layers {two} and {one} cover the same keys at the same LSNs"));
            // The sweep goes on without it: what is open stays disjoint.
            continue;
        }
        ends.insert((lsns.end, keys.start));
        open.insert(keys.start, (keys.end, lsns));
    }
    problems
}

/// Keys that no image layer at or below `readable_from` covers.
fn gaps(images: Vec<(KeyRange, Lsn)>, readable_from: Lsn) -> Vec<String> {
    let mut ranges: Vec<KeyRange> =
        images.into_iter().filter(|(_, lsn)| *lsn <= readable_from).map(|(keys, _)| keys).collect();
    ranges.sort_by_key(|keys| keys.start);
    ranges.push(Key::MAX..Key::MAX);
    let (mut problems, mut covered) = (Vec::new(), Key::MIN);
    for keys in ranges {
        if keys.start > covered {
            problems.push(format!(
                "no image layer at or below {readable_from}, the first readable LSN, covers the \
                 keys {covered} to {}",
                keys.start
            ));
        }
        covered = covered.max(keys.end);
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{TenantId, TenantShardId, TimelineId};
    use crate::shard::index::{ClusterIdentity, INDEX_VERSION, IndexLayer};
    use proptest::prelude::*;

    fn key(n: u32) -> Key {
        Key { field6: n, ..Key::MIN }
    }

    fn delta(keys: std::ops::Range<u32>, lsns: std::ops::Range<u64>) -> LayerName {
        let lsns = Lsn(lsns.start)..Lsn(lsns.end);
        LayerName::Delta { keys: key(keys.start)..key(keys.end), lsns }
    }

    fn all_keys(lsn: u64) -> LayerName {
        LayerName::Image { keys: Key::MIN..Key::MAX, lsn: Lsn(lsn) }
    }

    fn index(names: &[LayerName]) -> TimelineIndex {
        TimelineIndex {
            version: INDEX_VERSION,
            tenant: TenantShardId::unsharded(TenantId([1; 16])),
            timeline: TimelineId([2; 16]),
            cluster: ClusterIdentity {
                system_id: 7,
                tli: 1,
                wal_segment_bytes: 1 << 24,
                data_checksums: false,
                hint_bits_logged: false,
            },
            source: None,
            start_lsn: Lsn(100),
            ancestor: None,
            gc_cutoff_lsn: Lsn(100),
            archived: false,
            disk_consistent_lsn: Lsn(199),
            layers: names
                .iter()
                .map(|name| IndexLayer { name: name.to_string(), len: 4096 })
                .collect(),
        }
    }

    #[test]
    fn a_right_index_has_no_problems() {
        let names = [
            all_keys(100),
            delta(0..50, 101..150),
            delta(50..90, 101..120),
            delta(50..90, 120..150),
            delta(0..90, 150..200),
            LayerName::Image { keys: key(3)..key(9), lsn: Lsn(199) },
            LayerName::Image { keys: key(10)..key(19), lsn: Lsn(230) },
        ];
        assert_eq!(problems(&index(&names)), [""; 0]);
    }

    #[test]
    fn each_broken_rule_is_named() {
        let found = |names: &[LayerName]| problems(&index(names));
        let one = |names: &[LayerName], part: &str| {
            let found = found(names);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(part), "'{part}' is not in {found:?}");
        };
        one(&[all_keys(100), all_keys(100)], "twice");
        one(&[all_keys(100), delta(0..9, 101..201)], "beyond disk_consistent_lsn");
        one(&[all_keys(100), delta(0..9, 101..150), delta(8..20, 149..160)], "same keys");
        one(&[all_keys(100), delta(8..20, 101..150), delta(0..9, 149..160)], "same keys");
        one(&[all_keys(101)], "no image layer");
        let part = |from: Key, to: Key| LayerName::Image { keys: from..to, lsn: Lsn(100) };
        one(&[part(Key::MIN, key(5)), part(key(6), Key::MAX)], "no image layer");
        one(&[part(Key::MIN, key(5))], "no image layer");
        assert_eq!(found(&[part(Key::MIN, key(5)), part(key(5), Key::MAX)]), [""; 0]);
        assert_eq!(found(&[]).len(), 1);
        let mut wrong = index(&[all_keys(100)]);
        wrong.layers.push(IndexLayer { name: "rubbish".into(), len: 4096 });
        assert!(problems(&wrong)[0].contains("'rubbish'"));
    }

    proptest! {
        /// The sweep finds something exactly where a look at all pairs does.
        #[test]
        fn overlaps_agree_with_all_pairs(
            layers in prop::collection::vec((0u32..20, 1u32..8, 0u64..20, 1u64..8), 0..12),
        ) {
            let deltas: Vec<(KeyRange, LsnRange)> = layers
                .iter()
                .map(|(k, kn, l, ln)| (key(*k)..key(k + kn), Lsn(*l)..Lsn(l + ln)))
                .collect();
            let crosses = |a: &(KeyRange, LsnRange), b: &(KeyRange, LsnRange)| {
                a.0.start < b.0.end && b.0.start < a.0.end
                    && a.1.start < b.1.end && b.1.start < a.1.end
            };
            let expected = (0..deltas.len())
                .any(|i| (0..i).any(|j| crosses(&deltas[i], &deltas[j])));
            prop_assert_eq!(!overlaps(deltas).is_empty(), expected);
        }
    }
}
