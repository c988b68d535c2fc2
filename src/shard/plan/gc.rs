//! Garbage collection as a plan: how far history goes, and which layers nobody can need.
//!
//! # The rule
//!
//! Reads are allowed at the *read points* `R`: every LSN from the cut-off on, and each retained
//! LSN before it (branch points of children, leases). A read of key `k` at `r` looks at the newest
//! image layer that covers `k` with an LSN `<= r`, call it `i`, and at the delta layers `s..e` that
//! cover `k` with `s <= r` and `i < e - 1` (`layer_map`).
//!
//! A layer with the keys `K` and the LSNs `s..e` goes if and only if
//!
//! 1. it begins before the cut-off, `s < cutoff`; and
//! 2. with `r0` the smallest read point `>= s`, every key of `K` is covered by another image
//!    layer whose LSN `j` obeys `low <= j <= r0`, where `low` is `e - 1` for a delta layer and
//!    `e` for an image layer (its LSN plus one).
//!
//! # Why it is right
//!
//! *No read needs a layer that goes.* Let a layer `L` go, and let a read `(k, r)` with `k` in `K`
//! and `r` in `R` look at it. Then `s <= r`, so `r0 <= r`, and 2 gives an image of `k` at `j` with
//! `low <= j <= r0 <= r`. If `L` is a delta, the newest image is at `i >= j >= e - 1`, and the read
//! does not look at `L`. If `L` is an image, `j > s`, so `L` is not the newest image, and the read
//! does not look at it either. So a layer that goes is in no read's answer: each read finds the
//! same newest image and the same deltas as before, because those do not go.
//!
//! *All of them may go at once.* The layers that a read looks at do not go, whatever else does:
//! the paragraph above speaks of the layers before any went, and it covers the newest image too.
//!
//! *A delta that starts before an image's LSN and ends after it* stays for as long as a read point
//! lies at its start or later and before an image at or past its end: `low` is its last LSN.
//!
//! *Nothing stays that could go*, before the cut-off: if 2 fails for a key `k`, the read `(k, r0)`
//! looks at the layer. A layer that begins at or after the cut-off is left alone; there the read
//! points are dense, so at most oddities of one LSN could go.
//!
//! # The cut-off
//!
//! The lower of two candidates, so that both promises hold: the space horizon (so many bytes of
//! WAL before the newest record) and the time horizon (the last commit that is older than the PITR
//! interval). It never moves back, and it does not pass `disk_consistent_lsn`: after a crash,
//! everything from there on is ingested again.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::{Key, KeyRange, Lsn};
use crate::shard::layer_map::LayerSpan;

/// What the cut-off depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Horizons {
    /// The cut-off as it is.
    pub current: Lsn,
    /// End of the last ingested record.
    pub last_record: Lsn,
    /// Everything up to here is in synced layer files.
    pub disk_consistent: Lsn,
    /// So many bytes of WAL before `last_record` stay readable.
    pub horizon_bytes: u64,
    /// The time horizon.
    pub time: TimeHorizon,
}

/// Where the PITR interval ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeHorizon {
    /// No interval is kept: the space horizon decides alone.
    Off,
    /// Nothing is known to be older than the interval: the cut-off stays where it is.
    Unknown,
    /// The last commit that is older than the interval.
    At(Lsn),
}

/// The new cut-off: LSNs before it are not readable any more, unless they are retained.
pub fn cutoff(horizons: &Horizons) -> Lsn {
    let space = Lsn(horizons.last_record.0.saturating_sub(horizons.horizon_bytes));
    let time = match horizons.time {
        TimeHorizon::Off => Lsn::MAX,
        TimeHorizon::Unknown => horizons.current,
        TimeHorizon::At(lsn) => lsn,
    };
    space.min(time).min(horizons.disk_consistent).max(horizons.current)
}

/// For every key, the newest image layer that has been entered.
struct Skyline {
    /// From this key up to the next entry; `None` where there is no image.
    steps: BTreeMap<Key, Option<Lsn>>,
}

impl Skyline {
    fn new() -> Self {
        Skyline { steps: BTreeMap::from([(Key::MIN, None)]) }
    }

    fn at(&self, key: Key) -> Option<Lsn> {
        self.steps.range(..=key).next_back().and_then(|(_, lsn)| *lsn)
    }

    /// Enters an image layer that is not older than those entered before.
    fn enter(&mut self, keys: &KeyRange, lsn: Lsn) {
        let after = self.at(keys.end);
        let covered: Vec<Key> = self.steps.range(keys.clone()).map(|(key, _)| *key).collect();
        for key in covered {
            self.steps.remove(&key);
        }
        self.steps.insert(keys.start, Some(lsn));
        self.steps.entry(keys.end).or_insert(after);
    }

    /// True when every key of the range has an image at `low` or later.
    fn covers(&self, keys: &KeyRange, low: Lsn) -> bool {
        let first = std::iter::once(self.at(keys.start));
        let rest = self.steps.range(keys.clone()).map(|(_, lsn)| *lsn);
        first.chain(rest).all(|lsn| lsn >= Some(low))
    }
}

/// The layers that may go, by their places in `layers`, ascending. The rule and its proof stand in
/// the module's text.
///
/// Costs `O((n + m) log n)` for `n` layers, where `m` counts pairs of a layer and a piece of the
/// key space within its range that one image layer is the newest of.
pub fn removable(layers: &[LayerSpan], cutoff: Lsn, retained: &BTreeSet<Lsn>) -> Vec<usize> {
    let mut images: Vec<&LayerSpan> = layers.iter().filter(|span| span.is_image).collect();
    images.sort_by_key(|span| span.lsns.start);
    let mut images = images.into_iter().peekable();
    let first_read_point = |start: Lsn| {
        let retained = retained.range(start..).next().copied();
        retained.map_or(cutoff, |lsn| lsn.min(cutoff))
    };
    let old = layers.iter().enumerate().filter(|(_, span)| span.lsns.start < cutoff);
    let mut candidates: Vec<(Lsn, usize, &LayerSpan)> =
        old.map(|(place, span)| (first_read_point(span.lsns.start), place, span)).collect();
    candidates.sort_by_key(|(read_point, place, _)| (*read_point, *place));
    let mut skyline = Skyline::new();
    let mut found = Vec::new();
    for (read_point, place, span) in candidates {
        #[cfg(test)]
        let read_point = Lsn(read_point.0 + planted::LATE_READ_POINT.get());
        while let Some(image) = images.next_if(|image| image.lsns.start <= read_point) {
            skyline.enter(&image.keys, image.lsns.start);
        }
        let low = if span.is_image { span.lsns.end } else { Lsn(span.lsns.end.0 - 1) };
        if skyline.covers(&span.keys, low) {
            found.push(place);
        }
    }
    found.sort_unstable();
    found
}

/// Bugs that tests must find.
#[cfg(test)]
pub(crate) mod planted {
    use std::cell::Cell;

    thread_local! {
        /// Images so many bytes past a read point count as if they served it.
        pub(crate) static LATE_READ_POINT: Cell<u64> = const { Cell::new(0) };
    }
}

#[cfg(test)]
mod tests;
