//! Bytes of a timeline's layers, kept as layers come and go.
//!
//! For every key one image layer is the newest that has it. The layers that are this for some key
//! are the *current copy*: one copy of everything, as of their LSNs. All else is history: delta
//! layers, and images that newer ones cover wholly.
//!
//! Structure: the key space is cut into pieces, each with the layer that is newest there; a layer
//! is current while it has a piece. A new image takes pieces, or parts of them, from older ones:
//! O(log n) for each piece that it touches. An image that goes gives its pieces to the newest of
//! the others, which the caller names.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use super::LayerSpan;
use super::cover::LayerId;
use crate::base::{Key, KeyRange, Lsn};

/// Newer images have higher ranks; of those at one LSN, the one that reads prefer.
type Rank = (Lsn, Reverse<Key>, Reverse<Key>);

fn rank(span: &LayerSpan) -> Rank {
    (span.lsns.start, Reverse(span.keys.start), Reverse(span.keys.end))
}

struct Image {
    rank: Rank,
    bytes: u64,
    /// Pieces of the key space in which it is the newest.
    pieces: usize,
}

/// See the module's text.
#[derive(Default)]
pub struct Totals {
    layer_bytes: u64,
    current_bytes: u64,
    images: BTreeMap<LayerId, Image>,
    /// By first key: end of the piece, and the newest image in it. Disjoint.
    pieces: BTreeMap<Key, (Key, LayerId)>,
}

impl Totals {
    /// Bytes of all layers.
    pub fn layer_bytes(&self) -> u64 {
        self.layer_bytes
    }

    /// Bytes of all layers but those of the current copy.
    pub fn history_bytes(&self) -> u64 {
        self.layer_bytes.saturating_sub(self.current_bytes)
    }

    /// A layer has come. One of no bytes does not count.
    pub fn add(&mut self, span: &LayerSpan, id: LayerId, bytes: u64) {
        self.layer_bytes += bytes;
        if span.is_image && bytes > 0 {
            self.images.insert(id, Image { rank: rank(span), bytes, pieces: 0 });
            self.offer(&span.keys, id);
        }
    }

    /// A layer has gone; `others` are the images that share keys with it, or more.
    pub fn remove<'a>(
        &mut self,
        span: &LayerSpan,
        id: LayerId,
        bytes: u64,
        others: impl Iterator<Item = (LayerId, &'a LayerSpan)> + Clone,
    ) {
        self.layer_bytes -= bytes;
        let mine: Vec<KeyRange> = match span.is_image {
            true => self.within(&span.keys).filter(|(_, owner)| *owner == id),
            false => return,
        }
        .map(|(keys, _)| keys)
        .collect();
        for keys in &mine {
            self.take(keys.start);
        }
        self.images.remove(&id);
        for keys in mine {
            for (other, span) in others.clone().filter(|(_, span)| span.is_image) {
                let shared = keys.start.max(span.keys.start)..keys.end.min(span.keys.end);
                if shared.start < shared.end {
                    self.offer(&shared, other);
                }
            }
        }
    }

    /// Pieces that share keys with `keys`, in key order.
    fn within(&self, keys: &KeyRange) -> impl Iterator<Item = (KeyRange, LayerId)> {
        let before = self.pieces.range(..keys.start).next_back();
        let before = before.filter(|(_, (end, _))| *end > keys.start);
        let after = self.pieces.range(keys.start..keys.end);
        before.into_iter().chain(after).map(|(start, (end, id))| (*start..*end, *id))
    }

    /// Makes `id` the newest wherever in `keys` there is nothing newer.
    fn offer(&mut self, keys: &KeyRange, id: LayerId) {
        let Some(rank) = self.images.get(&id).map(|image| image.rank) else { return };
        let met: Vec<(KeyRange, LayerId)> = self.within(keys).collect();
        // Where the next piece of ours begins.
        let mut at = keys.start;
        for (piece, owner) in met {
            if self.images.get(&owner).is_some_and(|other| other.rank >= rank) {
                self.put(at..piece.start, id);
                at = piece.end;
                continue;
            }
            self.take(piece.start);
            self.put(piece.start..keys.start, owner);
            self.put(keys.end..piece.end, owner);
        }
        self.put(at..keys.end, id);
    }

    fn put(&mut self, keys: KeyRange, id: LayerId) {
        if keys.start >= keys.end {
            return;
        }
        self.pieces.insert(keys.start, (keys.end, id));
        if let Some(image) = self.images.get_mut(&id) {
            image.pieces += 1;
            self.current_bytes += if image.pieces == 1 { image.bytes } else { 0 };
        }
    }

    fn take(&mut self, start: Key) {
        let Some((_, id)) = self.pieces.remove(&start) else { return };
        if let Some(image) = self.images.get_mut(&id) {
            image.pieces -= 1;
            self.current_bytes -= if image.pieces == 0 { image.bytes } else { 0 };
        }
    }
}

/// [`Totals::layer_bytes`] and [`Totals::history_bytes`], counted anew. For tests. O(n²).
pub fn recount<'a>(layers: impl Iterator<Item = (&'a LayerSpan, u64)>) -> (u64, u64) {
    let layers: Vec<(&LayerSpan, u64)> = layers.collect();
    let images: Vec<_> =
        layers.iter().filter(|(span, bytes)| span.is_image && *bytes > 0).collect();
    let starts: BTreeSet<Key> =
        images.iter().flat_map(|(span, _)| [span.keys.start, span.keys.end]).collect();
    // No image begins or ends between two neighbouring keys of these.
    let newest = |key: Key| {
        let here = images.iter().filter(|(span, _)| span.keys.contains(&key));
        here.max_by_key(|(span, _)| rank(span)).map(|(span, bytes)| (rank(span), *bytes))
    };
    let current: BTreeMap<Rank, u64> = starts.into_iter().filter_map(newest).collect();
    let all = layers.iter().map(|(_, bytes)| bytes).sum::<u64>();
    (all, all - current.values().sum::<u64>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn span(is_image: bool, (start, len): (u32, u32), lsn: u64) -> LayerSpan {
        let key = |n: u32| Key { field6: n, ..Key::MIN };
        LayerSpan { keys: key(start)..key(start + len), lsns: Lsn(lsn)..Lsn(lsn + 1), is_image }
    }

    #[test]
    fn an_image_is_history_when_newer_ones_cover_it_wholly() {
        let mut totals = Totals::default();
        totals.add(&span(true, (0, 10), 1), 1, 100);
        totals.add(&span(false, (0, 10), 2), 2, 7);
        totals.add(&span(true, (0, 5), 3), 3, 40);
        assert_eq!((totals.layer_bytes(), totals.history_bytes()), (147, 7));
        totals.add(&span(true, (5, 5), 4), 4, 50);
        assert_eq!((totals.layer_bytes(), totals.history_bytes()), (197, 107));
        // A late one that is older changes nothing.
        totals.add(&span(true, (2, 5), 2), 5, 1000);
        assert_eq!((totals.layer_bytes(), totals.history_bytes()), (1197, 1107));
        let others = [(1, span(true, (0, 10), 1)), (5, span(true, (2, 5), 2))];
        let others = || others.iter().map(|(id, span)| (*id, span));
        totals.remove(&span(true, (0, 5), 3), 3, 40, others());
        assert_eq!((totals.layer_bytes(), totals.history_bytes()), (1157, 7));
    }

    proptest! {
        #[test]
        fn totals_agree_with_a_recount(
            steps in prop::collection::vec(
                (any::<bool>(), 0u32..3, 0u32..30, 1u32..12, 0u64..12, 1u64..1000), 1..60,
            ),
        ) {
            let mut totals = Totals::default();
            let mut layers: BTreeMap<LayerId, (LayerSpan, u64)> = BTreeMap::new();
            for (number, (removes, kind, start, len, lsn, bytes)) in (0..).zip(steps) {
                let span = span(kind > 0, (start, len), lsn);
                if removes && !layers.is_empty() {
                    let at = bytes as usize % layers.len();
                    let id = *layers.keys().nth(at).unwrap();
                    let (span, bytes) = layers.remove(&id).unwrap();
                    let others = layers.iter().map(|(id, (span, _))| (*id, span));
                    totals.remove(&span, id, bytes, others);
                } else if layers.values().all(|(other, _)| *other != span) {
                    totals.add(&span, number, bytes);
                    layers.insert(number, (span, bytes));
                }
                let expected = recount(layers.values().map(|(span, bytes)| (span, *bytes)));
                prop_assert_eq!((totals.layer_bytes(), totals.history_bytes()), expected);
            }
        }
    }
}
