//! Which layers a read must look at.
//!
//! Kinds: an *L0* layer is a delta layer of all keys, as checkpoints write them; other delta
//! layers (L1) have a range of keys; an image layer has every key of a range at one LSN.
//!
//! Invariants of the layers: for any key, the delta layers that cover it have disjoint LSN
//! ranges, so newest first is one total order; an image layer at LSN `i` holds every version at or
//! below `i`. A delta layer may begin below the image that a read ends at; the read must not take
//! its versions at or below `i`, which are in the image. While a compaction publishes piece by piece, a delta layer and what replaces it may
//! both be here: the map finds both and is slower by the overlap, not wrong. Who wants to know
//! asks [`LayerMap::overlapping_deltas`].
//!
//! Structure: each layer is kept once; a tree over the keys (module `cover`) finds the layers of
//! one key, two ordered maps find a layer by its span and the layers that begin within a key
//! range. With n layers, a answers and s lists per layer (s is O(log n), and 1 to 3 where layers
//! share their key ranges):
//!
//! - `search`: O(log² n + a log a), one descent each for images and deltas;
//! - `search_range`: O(log² n + r), r being the layers of the key range at any LSN;
//! - `insert`, `remove`: O(s log n) on average, plus, where the first layer comes that begins or
//!   ends at some key, or the last one goes, the layers of a few nodes around that key.
//!
//! A plain table of key slabs would be simpler, but compaction cuts at other keys each time: with
//! 100 times 1,000 ranges each layer would stand in 100 slabs, ten million entries. Here it is
//! in the order of ten lists. A persistent map per LSN would have to be rebuilt when layers change
//! below the newest, which is what compaction does.

mod cover;
mod totals;

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use cover::{Cover, Place};

pub use cover::{LayerId, Steps};
pub use totals::{Totals, recount};

use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::layers::LayerName;

/// What a layer covers. Ordered as layers are read: deltas before images, each newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerSpan {
    /// Keys.
    pub keys: KeyRange,
    /// Half-open LSN range of a delta layer; for an image layer `lsn..lsn + 1`.
    pub lsns: LsnRange,
    /// An image layer: every key of the range, as of its LSN.
    pub is_image: bool,
}

impl From<&LayerName> for LayerSpan {
    fn from(name: &LayerName) -> Self {
        LayerSpan { keys: name.keys().clone(), lsns: name.lsns(), is_image: name.is_image() }
    }
}

impl LayerSpan {
    /// A delta layer of all keys.
    pub fn is_l0(&self) -> bool {
        !self.is_image && self.keys == (Key::MIN..Key::MAX)
    }

    fn place(&self, id: LayerId) -> Place<'_> {
        Place { keys: &self.keys, lsns: &self.lsns, is_image: self.is_image, id }
    }
}

impl Ord for LayerSpan {
    fn cmp(&self, other: &Self) -> Ordering {
        let rank = |span: &LayerSpan| {
            let LayerSpan { keys, lsns, is_image } = span;
            (*is_image, Reverse(lsns.end), Reverse(lsns.start), keys.start, keys.end)
        };
        rank(self).cmp(&rank(other))
    }
}

impl PartialOrd for LayerSpan {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The layers of a timeline; `L` is whatever stands for an open layer.
pub struct LayerMap<L> {
    /// The layers by number; `None` where the number is free.
    slots: Vec<Option<(LayerSpan, L)>>,
    free: Vec<LayerId>,
    by_span: BTreeMap<LayerSpan, LayerId>,
    by_first_key: BTreeSet<(Key, LayerId)>,
    cover: Cover,
    l0_count: usize,
    /// Size of a layer in bytes.
    weigh: fn(&L) -> u64,
    totals: Totals,
}

impl<L> Default for LayerMap<L> {
    fn default() -> Self {
        LayerMap {
            slots: Vec::new(),
            free: Vec::new(),
            by_span: BTreeMap::new(),
            by_first_key: BTreeSet::new(),
            cover: Cover::default(),
            l0_count: 0,
            weigh: |_| 0,
            totals: Totals::default(),
        }
    }
}

impl<L> LayerMap<L> {
    /// A map that keeps [`Self::totals`] of layers with these sizes in bytes.
    pub fn weighing(weigh: fn(&L) -> u64) -> Self {
        LayerMap { weigh, ..LayerMap::default() }
    }

    /// Bytes of all layers; 0 where they are not weighed.
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// The same, counted anew; for tests.
    pub fn recount(&self) -> (u64, u64) {
        recount(self.iter().map(|(span, layer)| (span, (self.weigh)(layer))))
    }

    /// Adds a layer. There is one layer per span: returns the one that was there before.
    ///
    /// # Panics
    ///
    /// When the span has no keys or no LSNs, or has several LSNs and is that of an image.
    pub fn insert(&mut self, span: LayerSpan, layer: L) -> Option<L> {
        assert!(span.keys.start < span.keys.end, "a layer without keys: {span:?}");
        assert!(span.lsns.start < span.lsns.end, "a layer without LSNs: {span:?}");
        let one_lsn = span.lsns.start.checked_add(1) == Some(span.lsns.end);
        assert!(one_lsn || !span.is_image, "an image at several LSNs: {span:?}");
        if self.by_span.contains_key(&span) {
            let before = self.remove(&span);
            self.insert(span, layer);
            return before;
        }
        let id = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            LayerId::try_from(self.slots.len() - 1).expect("fewer than 2^32 layers")
        });
        self.by_span.insert(span.clone(), id);
        self.by_first_key.insert((span.keys.start, id));
        self.cover.insert(&span.place(id));
        self.l0_count += usize::from(span.is_l0());
        self.totals.add(&span, id, (self.weigh)(&layer));
        *self.slot_mut(id) = Some((span, layer));
        None
    }

    /// Takes out the layer with exactly this span.
    pub fn remove(&mut self, span: &LayerSpan) -> Option<L> {
        let id = self.by_span.remove(span)?;
        self.by_first_key.remove(&(span.keys.start, id));
        self.cover.remove(&span.place(id));
        self.l0_count -= usize::from(span.is_l0());
        self.free.push(id);
        let (_, layer) = self.slot_mut(id).take()?;
        let bytes = (self.weigh)(&layer);
        let sharing: Vec<(LayerId, LayerSpan)> = match span.is_image && bytes > 0 {
            true => self.sharing(&span.keys).map(|id| (id, self.layer(id).0.clone())).collect(),
            false => Vec::new(),
        };
        let others = sharing.iter().map(|(id, span)| (*id, span));
        self.totals.remove(span, id, bytes, others);
        Some(layer)
    }

    /// Layers that share keys with `keys`.
    fn sharing(&self, keys: &KeyRange) -> impl Iterator<Item = LayerId> {
        let first = self.cover.all(keys.start, Lsn::MAX);
        let after = Bound::Excluded((keys.start, LayerId::MAX));
        let begin_within = self.by_first_key.range((after, Bound::Excluded((keys.end, 0))));
        first.chain(begin_within.map(|(_, id)| *id))
    }

    /// Takes out the layers with the spans `removed`, then adds `added`; no reader sees a state in
    /// between. Returns the layers that are no longer in the map: those of `removed` that were
    /// there, in that order, then those whose spans `added` has taken.
    pub fn replace(&mut self, removed: &[LayerSpan], added: Vec<(LayerSpan, L)>) -> Vec<L> {
        let mut gone: Vec<L> = removed.iter().filter_map(|span| self.remove(span)).collect();
        gone.extend(added.into_iter().filter_map(|(span, layer)| self.insert(span, layer)));
        gone
    }

    /// True when a layer with exactly this span is there.
    pub fn contains(&self, span: &LayerSpan) -> bool {
        self.by_span.contains_key(span)
    }

    /// Number of layers.
    pub fn len(&self) -> usize {
        self.by_span.len()
    }

    /// True without layers.
    pub fn is_empty(&self) -> bool {
        self.by_span.is_empty()
    }

    /// Number of L0 layers: delta layers of all keys.
    pub fn l0_count(&self) -> usize {
        self.l0_count
    }

    /// All layers, deltas first, newest first.
    pub fn iter(&self) -> impl Iterator<Item = (&LayerSpan, &L)> {
        self.by_span.values().map(|id| self.layer(*id))
    }

    fn slot_mut(&mut self, id: LayerId) -> &mut Option<(LayerSpan, L)> {
        &mut self.slots[id as usize]
    }

    fn layer(&self, id: LayerId) -> (&LayerSpan, &L) {
        let (span, layer) = self.slots[id as usize].as_ref().expect("a number has a layer");
        (span, layer)
    }
}

impl<L> LayerMap<L> {
    /// The newest image layer that covers `key` with an LSN below `below`, and its end.
    fn newest_image(&self, key: Key, below: Lsn, steps: &mut Steps) -> Option<(Lsn, LayerId)> {
        let mut image: Option<(Lsn, LayerId)> = None;
        self.cover.images(key, below, steps, |end, id| {
            let is_newer = image.is_none_or(|(other_end, other)| match end.cmp(&other_end) {
                Ordering::Equal => self.layer(id).0 < self.layer(other).0,
                order => order.is_gt(),
            });
            if is_newer {
                image = Some((end, id));
            }
        });
        image
    }

    /// [`LayerMap::search`] by number, into `found`, which is cleared first; the layers are
    /// [`LayerMap::found`] by their numbers as long as the map does not change.
    pub fn search_into(&self, key: Key, below: Lsn, steps: &mut Steps, found: &mut Vec<LayerId>) {
        found.clear();
        let image = self.newest_image(key, below, steps);
        let floor = image.map_or(Lsn(0), |(end, _)| end);
        self.cover.deltas(key, (floor, below), steps, found);
        if found.len() > 1 {
            found.sort_unstable_by(|a, b| self.layer(*a).0.cmp(self.layer(*b).0));
        }
        found.extend(image.map(|(_, id)| id));
    }

    /// A layer that [`LayerMap::search_into`] has just found.
    pub fn found(&self, id: LayerId) -> (&LayerSpan, &L) {
        self.layer(id)
    }

    /// LSN of the newest image layer that covers `key` with an LSN below `below`.
    pub fn image_lsn(&self, key: Key, below: Lsn) -> Option<Lsn> {
        let (_, id) = self.newest_image(key, below, &mut Steps::default())?;
        Some(self.layer(id).0.lsns.start)
    }
}

impl<L: Clone> LayerMap<L> {
    /// Layers that may hold versions of `key` with LSNs below `below`, newest first: the deltas
    /// after the newest usable image, then that image.
    pub fn search(&self, key: Key, below: Lsn) -> Vec<L> {
        self.search_counted(key, below, &mut Steps::default())
    }

    /// [`Self::search`], which adds what it looked at to `steps`.
    pub fn search_counted(&self, key: Key, below: Lsn, steps: &mut Steps) -> Vec<L> {
        let mut ids = Vec::new();
        self.search_into(key, below, steps, &mut ids);
        ids.into_iter().map(|id| self.layer(id).1.clone()).collect()
    }

    /// Layers that may hold keys of `keys` with LSNs below `below`; none where `keys` is empty. No
    /// order is promised.
    pub fn search_range(&self, keys: &KeyRange, below: Lsn) -> Vec<L> {
        if keys.start >= keys.end {
            return Vec::new();
        }
        // A layer that shares keys with the range has its first key, or begins after it.
        let first = self.cover.all(keys.start, below).map(|id| self.layer(id).1);
        let after = Bound::Excluded((keys.start, LayerId::MAX));
        let begin_within = self.by_first_key.range((after, Bound::Excluded((keys.end, 0))));
        let begin_within = begin_within.map(|(_, id)| self.layer(*id));
        let later = begin_within.filter(|(span, _)| span.lsns.start < below);
        first.chain(later.map(|(_, layer)| layer)).cloned().collect()
    }
}

/// Size of the tree over the keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TreeSize {
    /// Nodes on the longest path from the root to a leaf.
    pub depth: usize,
    /// Entries in the lists of all nodes.
    pub list_entries: usize,
}

impl<L> LayerMap<L> {
    /// Two delta layers that share keys and LSNs, if there are any. O(n log n). Between
    /// compactions there are none.
    pub fn overlapping_deltas(&self) -> Option<(&LayerSpan, &LayerSpan)> {
        let deltas = || self.by_span.keys().filter(|span| !span.is_image);
        let ends = deltas().map(|span| (span.keys.end, false, span));
        // At the same key, layers end before others begin.
        let mut events: Vec<_> = ends.chain(deltas().map(|s| (s.keys.start, true, s))).collect();
        events.sort();
        let mut active: BTreeMap<Lsn, &LayerSpan> = BTreeMap::new();
        for (_, begins, span) in events {
            if !begins {
                active.remove(&span.lsns.start);
                continue;
            }
            if let Some((_, other)) = active.range(..span.lsns.end).next_back()
                && other.lsns.end > span.lsns.start
            {
                return Some((other, span));
            }
            active.insert(span.lsns.start, span);
        }
        None
    }

    /// Compares the map's parts with each other, for tests and the simulator; what is wrong where
    /// they do not fit, the tree's size where they do. Layers may overlap. O(n log² n).
    pub fn check_invariants(&self) -> Result<TreeSize, String> {
        let mut boundaries: BTreeMap<Key, u32> = BTreeMap::new();
        let mut l0_count = 0;
        for (span, id) in &self.by_span {
            let slot = self.slots.get(*id as usize).and_then(Option::as_ref);
            if slot.is_none_or(|(stored, _)| stored != span) {
                return Err(format!("{span:?} has the number {id}, which is another layer's"));
            }
            if !self.by_first_key.contains(&(span.keys.start, *id)) {
                return Err(format!("{span:?} is not found by its first key"));
            }
            l0_count += usize::from(span.is_l0());
            for key in [span.keys.start, span.keys.end] {
                *boundaries.entry(key).or_default() += 1;
            }
        }
        // Those two are never boundaries within the tree.
        boundaries.remove(&Key::MIN);
        boundaries.remove(&Key::MAX);
        let len = self.len();
        let lens = [self.by_first_key.len(), self.slots.iter().flatten().count()];
        if lens != [len; 2] || self.free.len() + len != self.slots.len() {
            return Err(format!("{len} layers by span, {lens:?} by first key and number"));
        }
        if l0_count != self.l0_count {
            return Err(format!("{l0_count} L0 layers, counted as {}", self.l0_count));
        }
        let totals = (self.totals.layer_bytes(), self.totals.history_bytes());
        if totals != self.recount() {
            return Err(format!("{totals:?} bytes, counted anew {:?}", self.recount()));
        }
        let place_of = |id: LayerId| {
            let (span, _) = self.slots.get(id as usize)?.as_ref()?;
            Some(span.place(id))
        };
        let census = self.cover.census(&place_of)?;
        if census.boundaries != boundaries {
            return Err("the tree's forks are not where layers begin and end".to_owned());
        }
        for (span, id) in &self.by_span {
            let (found, expected) =
                (census.lists.get(id).copied(), self.cover.list_count(&span.keys));
            if found != Some(expected) {
                return Err(format!("{span:?} is in {found:?} lists instead of {expected}"));
            }
        }
        Ok(TreeSize { depth: census.depth, list_entries: census.lists.values().sum() })
    }
}

#[cfg(test)]
mod tests;
