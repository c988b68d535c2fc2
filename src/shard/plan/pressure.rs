//! Back-pressure: how fast a timeline may take in WAL. Pure.
//!
//! Three things can run behind: the checkpoint (frozen layers wait for it), compaction (L0 layers
//! wait for it), and both on a core of many timelines (memory). Each has a curve that begins at
//! "no limit" and falls by halves, the steeper the less room there is; the lowest of them holds.
//! That of compaction goes by how far a read has to descend: by the number of L0 layers, or by the
//! records that a page has in them, which in a small database are many in each. What compaction
//! gets done is measured, so that reads find the same depth however fast or slow it is. So the rate
//! settles where as much is taken in as can be written, whatever the device is able to do, and
//! nobody has to know that figure. Where compaction rests until there are more L0 layers, their
//! depth slows nothing: WAL is just what it waits for.
//!
//! All measures are continuous: a layer counts by its fill while it is open, as one when it is
//! frozen, and still as one when it is an L0 layer. So closing a layer or writing one does not
//! make the rate jump; only work that is done (a merge, a layer that is on disk) raises it.
//!
//! At the end of its curve the rate is one layer in [`INGEST_SLOWEST_LAYER_S`] seconds. What is
//! bounded for good is bounded apart from this: L0 layers by [`may_add_l0`], memory by
//! [`must_stop`]; with the rates here neither is felt.
//!
//! Where L0 layers cannot be merged (one is damaged, say) waiting for room would last for ever.
//! WAL is taken in at [`INGEST_STUCK_BYTES_PER_S`] at least then, and the number of L0 layers is
//! not bounded any more: an operator must look, and is told. Where compaction is switched off,
//! the number of L0 layers plays no part.

use std::time::Duration;

use crate::io::Instant;
use crate::limits::{
    FROZEN_LAYERS_MAX, INGEST_DEPTH_MILLI_FREE, INGEST_DEPTH_MILLI_FULL, INGEST_DEPTH_MILLI_HALF,
    INGEST_EVEN_LAYERS, INGEST_EVEN_RECORDS, INGEST_FAST_BYTES_PER_S, INGEST_FROZEN_MILLI_FREE,
    INGEST_MEMORY_PERCENT_FREE, INGEST_PAUSE_MS, INGEST_SLOWEST_LAYER_S, INGEST_STUCK_BYTES_PER_S,
    L0_LAYERS_MAX, MEMORY_OVERDRAFT_PERCENT,
};

/// How compaction gets on with L0 layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Merging {
    /// Their number goes down again.
    Works,
    /// There are too few of them to be merged.
    Waits,
    /// Merges fail again and again.
    Fails,
    /// There is no compaction.
    Off,
}

impl Merging {
    /// With so many L0 layers, where they are merged at a threshold; `is_idle`: nothing is being
    /// done, or to be done again.
    pub fn of(l0_count: usize, threshold: usize, is_stuck: bool, is_idle: bool) -> Merging {
        if threshold > L0_LAYERS_MAX {
            Merging::Off
        } else if is_stuck {
            Merging::Fails
        } else if is_idle && l0_count < threshold {
            Merging::Waits
        } else {
            Merging::Works
        }
    }
}

/// What waits to be written or merged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// L0 layers.
    pub l0_count: usize,
    /// Values that one of them has of each key that is in it, in thousandths.
    pub layer_records_milli: u64,
    /// Layers in memory that take no more values and are not in files yet.
    pub frozen_count: usize,
    /// The open layer, in thousandths of the size at which it is frozen; 1000 at most.
    pub open_milli: u64,
    /// Memory of all open and frozen layers of the core, in percent of its budget.
    pub memory_percent: u64,
    /// Size at which a layer is frozen, in bytes.
    pub layer_bytes: u64,
    /// How compaction gets on.
    pub merging: Merging,
    /// Bytes of WAL per second that it works off, if known.
    pub merge_bytes_per_s: Option<u64>,
}

impl Load {
    /// Layers in memory, in thousandths.
    fn waiting_milli(&self) -> u64 {
        (self.frozen_count as u64).saturating_mul(1000).saturating_add(self.open_milli.min(1000))
    }
}

/// A curve from `free` (and below: no limit) to `full` (and above: the lowest rate), in whatever
/// unit `at` has. Piecewise linear between halves.
fn curve(at: u64, free: u64, full: u64, layer_bytes: u64) -> Option<u64> {
    let over = at.min(full).checked_sub(free).filter(|over| *over > 0)?;
    let slowest = (layer_bytes / INGEST_SLOWEST_LAYER_S).clamp(1, INGEST_FAST_BYTES_PER_S);
    let halves = u64::from(INGEST_FAST_BYTES_PER_S.ilog2() - slowest.ilog2());
    let milli = over.saturating_mul(halves * 1000) / full.saturating_sub(free).max(1);
    Some(halved(milli).max(slowest))
}

/// The fastest rate after so many thousandths of halves.
fn halved(milli: u64) -> u64 {
    let upper = INGEST_FAST_BYTES_PER_S >> (milli / 1000).min(63);
    upper - upper / 2 * (milli % 1000) / 1000
}

/// How far reads must descend: 1000 where WAL is to come in as fast as compaction works it off.
fn depth_milli(load: &Load) -> u64 {
    let layers = (load.l0_count as u64).saturating_mul(1000).saturating_add(load.waiting_milli());
    // One layer must be possible beside that which is being filled, whatever they hold.
    let most = INGEST_EVEN_RECORDS * 1000 * 3 / 5;
    let records = load.layer_records_milli.min(most);
    let by_records = layers.saturating_mul(records) / (INGEST_EVEN_RECORDS * 1000);
    by_records.max(layers / INGEST_EVEN_LAYERS)
}

/// The curve of the depth: down to what compaction works off, and from there on by halves.
fn depth_curve(load: &Load) -> Option<u64> {
    let (depth, free) = (depth_milli(load), INGEST_DEPTH_MILLI_FREE);
    let Some(capacity) = load.merge_bytes_per_s else {
        return curve(depth, free, INGEST_DEPTH_MILLI_FULL, load.layer_bytes);
    };
    let over = depth.checked_sub(free).filter(|over| *over > 0)?;
    let slowest = (load.layer_bytes / INGEST_SLOWEST_LAYER_S).clamp(1, INGEST_FAST_BYTES_PER_S);
    let capacity = capacity.clamp(1, INGEST_FAST_BYTES_PER_S);
    let halves = u64::from(INGEST_FAST_BYTES_PER_S.ilog2() - capacity.ilog2());
    let above = over.min(1000 - free) * halves * 1000 / (1000 - free);
    let below = depth.saturating_sub(1000).saturating_mul(1000) / INGEST_DEPTH_MILLI_HALF;
    Some(halved(above.saturating_add(below)).max(slowest))
}

/// Bytes of WAL per second that may be taken in; `None`: as many as come.
pub fn limit(load: &Load) -> Option<u64> {
    let waiting = load.waiting_milli();
    let layers_max = FROZEN_LAYERS_MAX as u64 + 1;
    let frozen = curve(waiting, INGEST_FROZEN_MILLI_FREE, layers_max * 1000, load.layer_bytes);
    let memory = curve(
        load.memory_percent,
        INGEST_MEMORY_PERCENT_FREE,
        MEMORY_OVERDRAFT_PERCENT,
        load.layer_bytes,
    );
    let l0 = depth_curve(load);
    let l0 = match load.merging {
        Merging::Works => l0,
        Merging::Fails => l0.map(|rate| rate.max(INGEST_STUCK_BYTES_PER_S)),
        Merging::Waits | Merging::Off => None,
    };
    [frozen, memory, l0].into_iter().flatten().min()
}

/// True if a frozen layer may become an L0 layer now.
pub fn may_add_l0(l0_count: usize, merging: Merging) -> bool {
    l0_count < L0_LAYERS_MAX || matches!(merging, Merging::Fails | Merging::Off)
}

/// True if nothing at all may be taken in: memory would grow without bound.
pub fn must_stop(load: &Load) -> bool {
    let no_place = load.frozen_count >= FROZEN_LAYERS_MAX && load.open_milli >= 1000;
    no_place || load.memory_percent > MEMORY_OVERDRAFT_PERCENT
}

/// Keeps to a limit: what was taken in is a debt that time pays off. Nothing is saved up.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    debt_bytes: u64,
    at: Instant,
}

impl Pace {
    /// Begins at `now`, without debt.
    pub fn new(now: Instant) -> Pace {
        Pace { debt_bytes: 0, at: now }
    }

    /// So many bytes were taken in.
    pub fn took(&mut self, bytes: u64) {
        self.debt_bytes = self.debt_bytes.saturating_add(bytes);
    }

    /// How long to wait before asking again, if no more may be taken in yet; a few milliseconds,
    /// for the limit changes all the time.
    pub fn pause(&mut self, now: Instant, limit: Option<u64>) -> Option<Duration> {
        let elapsed = now.saturating_sub(self.at);
        self.at = now;
        let Some(rate) = limit else {
            self.debt_bytes = 0;
            return None;
        };
        let paid = elapsed.as_nanos().saturating_mul(u128::from(rate)) / 1_000_000_000;
        self.debt_bytes = self.debt_bytes.saturating_sub(u64::try_from(paid).unwrap_or(u64::MAX));
        if self.debt_bytes == 0 {
            return None;
        }
        let left_us = u128::from(self.debt_bytes) * 1_000_000 / u128::from(rate.max(1));
        let most_us = u128::from(INGEST_PAUSE_MS) * 1000;
        // At least a microsecond, so that some of the debt is paid.
        Some(Duration::from_micros(left_us.clamp(1, most_us) as u64))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    const IDLE: Load = Load {
        l0_count: 0,
        layer_records_milli: 0,
        frozen_count: 0,
        open_milli: 0,
        memory_percent: 0,
        layer_bytes: 256 * MIB,
        merging: Merging::Works,
        merge_bytes_per_s: None,
    };

    fn mib_per_s(load: &Load) -> Option<u64> {
        limit(load).map(|rate| rate / MIB)
    }

    #[test]
    fn the_rate_falls_with_frozen_layers() {
        let at = |frozen_count, open_milli| Load { frozen_count, open_milli, ..IDLE };
        assert_eq!(limit(&at(0, 1000)), None);
        assert_eq!(limit(&at(1, 500)), None);
        assert_eq!(mib_per_s(&at(1, 750)), Some(512));
        assert_eq!(mib_per_s(&at(2, 0)), Some(256));
        assert_eq!(mib_per_s(&at(2, 500)), Some(64));
        assert_eq!(mib_per_s(&at(3, 0)), Some(16));
        assert_eq!(mib_per_s(&at(3, 500)), Some(4));
        assert_eq!(mib_per_s(&at(3, 1000)), Some(1));
        assert_eq!(mib_per_s(&at(30, 1000)), Some(1));
    }

    #[test]
    fn the_rate_falls_with_the_depth_of_reads() {
        let at = |l0_count, layer_records_milli| Load { l0_count, layer_records_milli, ..IDLE };
        // By layers, by records.
        assert_eq!(limit(&at(2, 0)), None);
        assert_eq!(mib_per_s(&at(4, 0)), Some(216));
        assert_eq!(limit(&at(2, 2_500)), None);
        assert_eq!(limit(&at(2, 5_000)), limit(&at(4, 0)));
        assert_eq!(
            limit(&at(1, 1 << 60)).map(|rate| rate > INGEST_FAST_BYTES_PER_S / 2),
            Some(true)
        );
        for merging in [Merging::Waits, Merging::Off] {
            assert_eq!(limit(&Load { merging, ..at(9, 100_000) }), None);
        }
        let waiting = Load { open_milli: 1000, ..at(2, 4_000) };
        assert_eq!(limit(&waiting), limit(&at(3, 4_000)));
    }

    #[test]
    fn where_compaction_is_known_its_rate_is_that_of_a_certain_depth() {
        for speed in [8 * MIB, 64 * MIB, 512 * MIB] {
            let at = |l0_count, layer_records_milli| {
                let merge_bytes_per_s = Some(speed);
                Load { l0_count, layer_records_milli, merge_bytes_per_s, ..IDLE }
            };
            assert_eq!(limit(&at(2, 0)), None);
            assert_eq!(limit(&at(4, 0)), Some(speed));
            assert_eq!(limit(&at(2, 5_000)), Some(speed));
            assert!(limit(&at(3, 0)) > Some(speed));
            assert!(limit(&at(4, 4_000)) < Some(speed / 2));
            assert_eq!(limit(&at(100, 0)), Some(MIB));
        }
    }

    #[test]
    fn where_merges_fail_ingest_goes_on_slowly() {
        let at = |l0_count, merging| Load { l0_count, merging, ..IDLE };
        assert_eq!(limit(&at(1000, Merging::Fails)), Some(INGEST_STUCK_BYTES_PER_S));
        assert_eq!(limit(&at(1000, Merging::Off)), None);
        assert!(may_add_l0(1000, Merging::Fails) && may_add_l0(1000, Merging::Off));
        assert!(may_add_l0(9, Merging::Works) && !may_add_l0(10, Merging::Works));
        // Small layers do not make it slower than that.
        let small = Load { layer_bytes: 1000, ..at(1000, Merging::Fails) };
        assert_eq!(limit(&small), Some(INGEST_STUCK_BYTES_PER_S));
    }

    #[test]
    fn wal_that_compaction_waits_for_is_not_slowed_for_the_depth_of_reads() {
        // Small layers of a small database: slow merges, many records of each page.
        let load = |merging| Load {
            l0_count: 2,
            layer_records_milli: 6_000,
            open_milli: 900,
            layer_bytes: 4 * MIB,
            merging,
            merge_bytes_per_s: Some(MIB),
            ..IDLE
        };
        let busy = Merging::of(2, 3, false, false);
        assert!(limit(&load(busy)) < Some(MIB / 4), "{:?}", limit(&load(busy)));
        let waits = Merging::of(2, 3, false, true);
        assert_eq!(limit(&load(waits)), None);
        // What is written too slowly slows it all the same.
        assert!(limit(&Load { frozen_count: 2, ..load(waits) }).is_some());
        // The third one is merged.
        assert_eq!(Merging::of(3, 3, false, true), Merging::Works);
        assert_eq!(Merging::of(2, 3, true, true), Merging::Fails);
        assert_eq!(Merging::of(2, L0_LAYERS_MAX + 1, true, true), Merging::Off);
        assert!(may_add_l0(2, waits));
    }

    #[test]
    fn it_stops_for_memory_alone() {
        let full = Load { frozen_count: FROZEN_LAYERS_MAX, open_milli: 1000, ..IDLE };
        assert!(must_stop(&full) && !must_stop(&Load { open_milli: 999, ..full }));
        assert!(!must_stop(&Load { l0_count: 1000, ..IDLE }));
        assert!(must_stop(&Load { memory_percent: 201, ..IDLE }));
        assert_eq!(mib_per_s(&Load { memory_percent: 200, ..IDLE }), Some(1));
        assert_eq!(limit(&Load { memory_percent: 120, ..IDLE }), None);
    }

    #[test]
    fn a_pace_is_kept_and_nothing_is_saved_up() {
        let mut now = Duration::from_secs(100);
        let mut pace = Pace::new(now);
        now += Duration::from_secs(50);
        let mut taken = 0;
        let begin = now;
        while now < begin + Duration::from_secs(10) {
            match pace.pause(now, Some(MIB)) {
                Some(pause) => now += pause,
                None => {
                    pace.took(100_000);
                    taken += 100_000;
                }
            }
        }
        let expected = 10 * MIB;
        assert!((expected..expected + 100_001).contains(&taken), "{taken}");
        pace.took(1 << 40);
        assert!(pace.pause(now, Some(1)).is_some());
        assert_eq!(pace.pause(now, None), None);
        assert_eq!(pace.pause(now, Some(1)), None);
    }

    fn any_load() -> impl Strategy<Value = Load> {
        let merging = prop::sample::select(vec![
            Merging::Works,
            Merging::Waits,
            Merging::Fails,
            Merging::Off,
        ]);
        let layers = (0usize..20, 0u64..=10_000, 0usize..6, 0u64..=1000);
        let merging = (merging, prop::option::of(any::<u64>()));
        (layers, 0u64..260, 0u64..u64::MAX, 0u32..64, merging).prop_map(
            |(
                (l0_count, layer_records_milli, frozen_count, open_milli),
                memory_percent,
                bytes,
                shift,
                (merging, speed),
            )| {
                Load {
                    l0_count,
                    layer_records_milli,
                    frozen_count,
                    open_milli,
                    memory_percent,
                    layer_bytes: bytes >> shift,
                    merging,
                    merge_bytes_per_s: speed.map(|speed| speed >> shift),
                }
            },
        )
    }

    fn rate(load: &Load) -> u64 {
        limit(load).unwrap_or(u64::MAX)
    }

    proptest! {
        #[test]
        fn more_load_never_means_a_higher_rate(load in any_load()) {
            let more = [
                Load { l0_count: load.l0_count + 1, ..load },
                Load { layer_records_milli: load.layer_records_milli + 1, ..load },
                Load { frozen_count: load.frozen_count + 1, ..load },
                Load { open_milli: (load.open_milli + 1).min(1000), ..load },
                Load { memory_percent: load.memory_percent + 1, ..load },
            ];
            for more in more {
                prop_assert!(rate(&more) <= rate(&load), "{more:?}");
                prop_assert!(rate(&more) > 0);
                prop_assert!(must_stop(&more) || !must_stop(&load));
            }
        }

        #[test]
        fn the_rate_never_jumps_down(load in any_load(), step in 0u64..1000) {
            // From one thousandth of a layer to the next by a tenth at most, and closing or
            // writing a layer does not change it.
            let before = Load { open_milli: step, ..load };
            let after = Load { open_milli: step + 1, ..load };
            let floor = rate(&before).min(INGEST_FAST_BYTES_PER_S) / 10 * 9;
            prop_assert!(rate(&after) >= floor, "{} {}", rate(&before), rate(&after));
            let open = Load { open_milli: 1000, ..load };
            let frozen = Load { open_milli: 0, frozen_count: load.frozen_count + 1, ..load };
            prop_assert_eq!(rate(&open), rate(&frozen));
            if load.frozen_count > 0 {
                let (l0_count, frozen_count) = (load.l0_count + 1, load.frozen_count - 1);
                let written = Load { l0_count, frozen_count, ..load };
                prop_assert!(rate(&written) >= rate(&load));
            }
        }
    }
}
