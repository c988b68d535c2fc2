//! Which layers a read must look at.
//!
//! Invariants: for any key, the delta layers that cover it have disjoint LSN ranges, so newest
//! first is one total order; an image layer at LSN `i` holds every version at or below `i`. A
//! delta layer may begin below the image that a read ends at; the read must not take its versions
//! at or below `i`, which are in the image.

use super::plan::compaction::is_l0;
use crate::base::{Key, KeyRange, Lsn, LsnRange};

/// What a layer covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpan {
    /// Keys.
    pub keys: KeyRange,
    /// Half-open LSN range of a delta layer; for an image layer `lsn..lsn + 1`.
    pub lsns: LsnRange,
    /// An image layer: every key of the range, as of its LSN.
    pub is_image: bool,
}

impl LayerSpan {
    fn covers(&self, key: Key) -> bool {
        self.keys.contains(&key)
    }
}

/// The layers of a timeline; `L` is whatever stands for an open layer.
pub struct LayerMap<L> {
    /// By falling end of the LSN range.
    deltas: Vec<(LayerSpan, L)>,
    /// By falling LSN.
    images: Vec<(LayerSpan, L)>,
}

impl<L> Default for LayerMap<L> {
    fn default() -> Self {
        LayerMap { deltas: Vec::new(), images: Vec::new() }
    }
}

impl<L: Clone> LayerMap<L> {
    /// Adds a layer.
    pub fn insert(&mut self, span: LayerSpan, layer: L) {
        assert!(span.keys.start < span.keys.end, "a layer without keys: {span:?}");
        assert!(span.lsns.start < span.lsns.end, "a layer without LSNs: {span:?}");
        let list = if span.is_image { &mut self.images } else { &mut self.deltas };
        let at = list.partition_point(|(other, _)| other.lsns.end >= span.lsns.end);
        list.insert(at, (span, layer));
    }

    /// Layers that may hold versions of `key` with LSNs below `below`, newest first: the deltas
    /// after the newest usable image, then that image.
    pub fn search(&self, key: Key, below: Lsn) -> Vec<L> {
        let image =
            self.images.iter().find(|(span, _)| span.lsns.start < below && span.covers(key));
        let floor = image.map_or(Lsn(0), |(span, _)| span.lsns.end);
        let deltas = self.deltas.iter().filter(|(span, _)| {
            span.lsns.start < below && span.lsns.end > floor && span.covers(key)
        });
        deltas.chain(image).map(|(_, layer)| layer.clone()).collect()
    }

    /// Layers that may hold keys of `keys` with LSNs below `below`. No order is promised.
    pub fn search_range(&self, keys: &KeyRange, below: Lsn) -> Vec<L> {
        let wanted = |(span, _): &&(LayerSpan, L)| {
            span.lsns.start < below && span.keys.start < keys.end && keys.start < span.keys.end
        };
        let found = self.deltas.iter().filter(wanted).chain(self.images.iter().filter(wanted));
        found.map(|(_, layer)| layer.clone()).collect()
    }

    /// Takes layers out and puts others in, in one step. A layer is known by what it covers.
    pub fn replace(&mut self, removed: &[LayerSpan], added: Vec<(LayerSpan, L)>) {
        for list in [&mut self.deltas, &mut self.images] {
            list.retain(|(span, _)| !removed.contains(span));
        }
        for (span, layer) in added {
            self.insert(span, layer);
        }
    }

    /// Number of delta layers over all keys.
    pub fn l0_count(&self) -> usize {
        self.deltas.iter().filter(|(span, _)| is_l0(span)).count()
    }

    /// All layers, deltas first, newest first.
    pub fn iter(&self) -> impl Iterator<Item = &(LayerSpan, L)> {
        self.deltas.iter().chain(&self.images)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Key {
        Key { field6: n, ..Key::MIN }
    }

    fn span(keys: std::ops::Range<u32>, lsns: std::ops::Range<u64>, is_image: bool) -> LayerSpan {
        LayerSpan {
            keys: key(keys.start)..key(keys.end),
            lsns: Lsn(lsns.start)..Lsn(lsns.end),
            is_image,
        }
    }

    #[test]
    fn reads_stop_at_the_newest_image() {
        let mut map = LayerMap::default();
        map.insert(span(0..100, 10..11, true), "image 10");
        map.insert(span(0..100, 11..20, false), "delta 11-20");
        map.insert(span(0..100, 30..40, false), "delta 30-40");
        map.insert(span(0..100, 20..30, false), "delta 20-30");
        map.insert(span(0..50, 29..30, true), "image 29");
        assert_eq!(map.search(key(7), Lsn(100)), ["delta 30-40", "image 29"]);
        assert_eq!(
            map.search(key(70), Lsn(100)),
            ["delta 30-40", "delta 20-30", "delta 11-20", "image 10"]
        );
        assert_eq!(map.search(key(7), Lsn(29)), ["delta 20-30", "delta 11-20", "image 10"]);
        assert_eq!(map.search(key(7), Lsn(30)), ["image 29"]);
        assert_eq!(map.search(key(7), Lsn(11)), ["image 10"]);
        assert!(map.search(key(7), Lsn(10)).is_empty());
        assert!(map.search(key(100), Lsn(100)).is_empty());
        assert_eq!(map.search_range(&(key(60)..key(61)), Lsn(12)).len(), 2);
    }
}
