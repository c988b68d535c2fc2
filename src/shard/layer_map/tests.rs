//! The map against a list that is searched from end to end.

use std::ops::Range;

use proptest::prelude::*;

use super::*;

fn key(n: u32) -> Key {
    Key { field6: n, ..Key::MIN }
}

fn span(keys: Range<u32>, lsns: Range<u64>, is_image: bool) -> LayerSpan {
    LayerSpan {
        keys: key(keys.start)..key(keys.end),
        lsns: Lsn(lsns.start)..Lsn(lsns.end),
        is_image,
    }
}

fn l0(lsns: Range<u64>) -> LayerSpan {
    LayerSpan { keys: Key::MIN..Key::MAX, lsns: Lsn(lsns.start)..Lsn(lsns.end), is_image: false }
}

/// The brute-force twin.
#[derive(Default)]
struct Twin(Vec<(LayerSpan, u32)>);

impl Twin {
    fn insert(&mut self, span: LayerSpan, layer: u32) -> Option<u32> {
        let old = self.remove(&span);
        self.0.push((span, layer));
        old
    }

    fn remove(&mut self, span: &LayerSpan) -> Option<u32> {
        let at = self.0.iter().position(|(other, _)| other == span)?;
        Some(self.0.swap_remove(at).1)
    }

    /// Newest first: later end, then later start, then lower keys.
    fn sorted<'a>(found: impl Iterator<Item = &'a (LayerSpan, u32)>) -> Vec<&'a (LayerSpan, u32)> {
        let mut found: Vec<_> = found.collect();
        found.sort_by(|(a, _), (b, _)| {
            (b.lsns.end, b.lsns.start)
                .cmp(&(a.lsns.end, a.lsns.start))
                .then((a.keys.start, a.keys.end).cmp(&(b.keys.start, b.keys.end)))
        });
        found
    }

    fn search(&self, key: Key, below: Lsn) -> Vec<u32> {
        let usable = self.0.iter().filter(|(s, _)| s.keys.contains(&key) && s.lsns.start < below);
        let (images, deltas): (Vec<_>, Vec<_>) = usable.partition(|(s, _)| s.is_image);
        let image = Self::sorted(images.into_iter()).first().copied();
        let deltas = deltas.into_iter().filter(|(s, _)| match image {
            Some((image, _)) => s.lsns.end.0 > image.lsns.start.0 + 1,
            None => true,
        });
        Self::sorted(deltas).into_iter().chain(image).map(|(_, layer)| *layer).collect()
    }

    fn image_lsn(&self, key: Key, below: Lsn) -> Option<Lsn> {
        let images = self.0.iter().filter(|(s, _)| s.is_image && s.keys.contains(&key));
        images.map(|(s, _)| s.lsns.start).filter(|lsn| *lsn < below).max()
    }

    fn search_range(&self, keys: &KeyRange, below: Lsn) -> Vec<u32> {
        let shares = |s: &LayerSpan| {
            keys.start.max(s.keys.start) < keys.end.min(s.keys.end) && s.lsns.start < below
        };
        let mut found: Vec<u32> =
            self.0.iter().filter(|(s, _)| shares(s)).map(|(_, layer)| *layer).collect();
        found.sort_unstable();
        found
    }

    fn all(&self) -> Vec<u32> {
        let (images, deltas): (Vec<_>, Vec<_>) = self.0.iter().partition(|(s, _)| s.is_image);
        let sorted = Self::sorted(deltas.into_iter()).into_iter();
        sorted.chain(Self::sorted(images.into_iter())).map(|(_, layer)| *layer).collect()
    }

    fn overlap(&self) -> bool {
        let deltas: Vec<_> = self.0.iter().map(|(s, _)| s).filter(|s| !s.is_image).collect();
        let meet = |a: &LayerSpan, b: &LayerSpan| {
            a.keys.start.max(b.keys.start) < a.keys.end.min(b.keys.end)
                && a.lsns.start.max(b.lsns.start) < a.lsns.end.min(b.lsns.end)
        };
        deltas.iter().enumerate().any(|(n, a)| deltas.iter().skip(n + 1).any(|b| meet(a, b)))
    }
}

/// The keys of the random tests, in order: both ends of the key space, and keys that differ in
/// all kinds of fields.
const KEYS: [Key; 10] = [
    Key::MIN,
    Key { field6: 1, ..Key::MIN },
    Key { field6: 2, ..Key::MIN },
    Key { field2: 1663, field3: 5, field4: 16384, field5: 0, field6: 0, ..Key::MIN },
    Key { field2: 1663, field3: 5, field4: 16384, field5: 0, field6: 7, ..Key::MIN },
    Key { field2: 1663, field3: 5, field4: 16384, field5: 1, field6: 0, ..Key::MIN },
    Key { field2: 1663, field3: 5, field4: 16385, field5: 0, field6: 0, ..Key::MIN },
    Key { field1: 1, ..Key::MIN },
    Key { field1: 0x65, field6: u32::MAX, ..Key::MIN },
    Key::MAX,
];
const LSN_END: u64 = 12;
/// The tree without layers.
const EMPTY: TreeSize = TreeSize { depth: 1, list_entries: 0 };

#[derive(Clone, Debug)]
enum Op {
    Insert(LayerSpan),
    /// The layer at this place, modulo their number.
    Remove(usize),
    RemoveSpan(LayerSpan),
    Replace(Vec<usize>, Vec<LayerSpan>),
}

fn any_keys() -> impl Strategy<Value = KeyRange> {
    let narrow = (0..KEYS.len() - 1, 1..KEYS.len())
        .prop_map(|(start, len)| KEYS[start]..KEYS[(start + len).min(KEYS.len() - 1)]);
    prop_oneof![5 => narrow, 1 => Just(Key::MIN..Key::MAX)]
}

fn any_span() -> impl Strategy<Value = LayerSpan> {
    let lsns = (0..LSN_END, 1..LSN_END)
        .prop_map(|(start, len)| Lsn(start)..Lsn((start + len).min(LSN_END)));
    (any_keys(), lsns, 0..3).prop_map(|(keys, lsns, kind)| match kind {
        0 => LayerSpan { keys, lsns: lsns.start..Lsn(lsns.start.0 + 1), is_image: true },
        _ => LayerSpan { keys, lsns, is_image: false },
    })
}

fn any_op() -> impl Strategy<Value = Op> {
    let replace =
        (prop::collection::vec(0..100usize, 0..4), prop::collection::vec(any_span(), 0..4));
    prop_oneof![
        6 => any_span().prop_map(Op::Insert),
        4 => (0..100usize).prop_map(Op::Remove),
        1 => any_span().prop_map(Op::RemoveSpan),
        2 => replace.prop_map(|(removed, added)| Op::Replace(removed, added)),
    ]
}

fn apply(map: &mut LayerMap<u32>, twin: &mut Twin, op: Op, number: u32) {
    let nth = |twin: &Twin, at: usize| match twin.0.len() {
        0 => None,
        len => Some(twin.0[at % len].0.clone()),
    };
    match op {
        Op::Insert(span) => {
            assert_eq!(map.contains(&span), twin.0.iter().any(|(other, _)| *other == span));
            assert_eq!(map.insert(span.clone(), number), twin.insert(span.clone(), number));
            assert!(map.contains(&span));
        }
        Op::Remove(at) => {
            if let Some(span) = nth(twin, at) {
                let removed = map.remove(&span);
                assert!(removed.is_some());
                assert_eq!(removed, twin.remove(&span));
                assert!(!map.contains(&span));
            }
        }
        Op::RemoveSpan(span) => assert_eq!(map.remove(&span), twin.remove(&span)),
        Op::Replace(removed, added) => {
            let removed: Vec<_> = removed.into_iter().filter_map(|at| nth(twin, at)).collect();
            let added: Vec<_> = added.into_iter().zip(number..).collect();
            let mut gone: Vec<u32> = removed.iter().filter_map(|span| twin.remove(span)).collect();
            for (span, layer) in &added {
                gone.extend(twin.insert(span.clone(), *layer));
            }
            assert_eq!(map.replace(&removed, added), gone);
        }
    }
}

fn compare_parts(map: &LayerMap<u32>, twin: &Twin) {
    map.check_invariants().unwrap();
    assert_eq!(map.len(), twin.0.len());
    assert_eq!(map.is_empty(), twin.0.is_empty());
    let l0 = twin.0.iter().filter(|(s, _)| !s.is_image && s.keys == (Key::MIN..Key::MAX)).count();
    assert_eq!(map.l0_count(), l0);
    assert_eq!(map.iter().map(|(_, layer)| *layer).collect::<Vec<_>>(), twin.all());
    assert_eq!(map.overlapping_deltas().is_some(), twin.overlap());
}

fn compare_range(map: &LayerMap<u32>, twin: &Twin, keys: &KeyRange, below: Lsn) {
    let mut found = map.search_range(keys, below);
    found.sort_unstable();
    assert_eq!(found, twin.search_range(keys, below), "{keys:?} below {below}");
}

fn compare_searches(map: &LayerMap<u32>, twin: &Twin) {
    let lsns = || (0..=LSN_END + 1).map(Lsn).chain([Lsn::MAX]);
    for start in KEYS {
        for below in lsns() {
            for key in [start, start.next()] {
                let expected = twin.search(key, below);
                assert_eq!(map.search(key, below), expected, "{key:?} below {below}");
                assert_eq!(map.image_lsn(key, below), twin.image_lsn(key, below), "{key:?}");
            }
            for end in KEYS {
                compare_range(map, twin, &(start..end), below);
            }
            compare_range(map, twin, &(start.next()..Key::MAX), below);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn equals_its_twin(ops in prop::collection::vec(any_op(), 0..60)) {
        let (mut map, mut twin) = (LayerMap::default(), Twin::default());
        let half = ops.len() / 2;
        for (n, op) in ops.into_iter().enumerate() {
            apply(&mut map, &mut twin, op, 10 * n as u32);
            compare_parts(&map, &twin);
            if n == half {
                compare_searches(&map, &twin);
            }
        }
        compare_searches(&map, &twin);
        for (span, _) in std::mem::take(&mut twin.0) {
            prop_assert!(map.remove(&span).is_some());
            map.check_invariants().unwrap();
        }
        prop_assert!(map.is_empty());
        prop_assert_eq!(map.check_invariants(), Ok(EMPTY));
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

#[test]
fn ends_are_exclusive_and_starts_inclusive() {
    let mut map = LayerMap::default();
    map.insert(l0(20..30), "L0");
    map.insert(span(10..20, 10..20, false), "L1");
    map.insert(span(10..20, 19..20, true), "image at the delta's last LSN");
    map.insert(span(20..30, 20..21, true), "image at the first LSN of L0");
    assert_eq!(map.search(key(10), Lsn(21)), ["L0", "image at the delta's last LSN"]);
    assert_eq!(map.search(key(10), Lsn(20)), ["image at the delta's last LSN"]);
    assert_eq!(map.search(key(19), Lsn(19)), ["L1"]);
    assert_eq!(map.search(key(9), Lsn(30)), ["L0"]);
    assert_eq!(map.search(key(20), Lsn(30)), ["L0", "image at the first LSN of L0"]);
    assert!(map.search(key(20), Lsn(20)).is_empty());
    assert_eq!(map.search(Key::MIN, Lsn::MAX), ["L0"]);
    assert!(map.search(Key::MAX, Lsn::MAX).is_empty());
    assert!(map.search_range(&(key(5)..key(5)), Lsn::MAX).is_empty());
    assert!(map.search_range(&(Key { field6: 9, ..key(0) }..key(5)), Lsn::MAX).is_empty());
    assert_eq!(map.search_range(&(key(19)..key(20)), Lsn(20)).len(), 2);
    assert_eq!(map.search_range(&(key(20)..key(21)), Lsn(20)).len(), 0);
    assert_eq!(map.l0_count(), 1);
    assert!(map.overlapping_deltas().is_none());
}

/// A compaction publishes its first output, and takes its inputs out with the last one.
#[test]
fn inputs_and_outputs_of_a_compaction_may_be_present_together() {
    let mut map = LayerMap::default();
    for n in 1..=4 {
        map.insert(l0(10 * n..10 * n + 10), format!("L0 {n}"));
    }
    map.insert(span(0..100, 10..50, false), "L1 low".to_owned());
    map.check_invariants().unwrap();
    assert!(map.overlapping_deltas().is_some());
    // Newest end first; an input with the end of the output comes before it.
    assert_eq!(map.search(key(7), Lsn(25)), ["L1 low", "L0 2", "L0 1"]);
    assert_eq!(map.search(key(7), Lsn(50))[..2], ["L0 4", "L1 low"]);
    assert_eq!(map.search(key(100), Lsn(25)), ["L0 2", "L0 1"]);
    let inputs: Vec<_> = (1..=4).map(|n| l0(10 * n..10 * n + 10)).collect();
    let rest = LayerSpan { keys: key(100)..Key::MAX, lsns: Lsn(10)..Lsn(50), is_image: false };
    let gone = map.replace(&inputs, vec![(rest.clone(), "L1 high".to_owned())]);
    assert_eq!(gone, ["L0 1", "L0 2", "L0 3", "L0 4"]);
    assert_eq!((map.len(), map.l0_count()), (2, 0));
    assert_eq!(map.search(key(7), Lsn(25)), ["L1 low"]);
    assert_eq!(map.search(key(100), Lsn(25)), ["L1 high"]);
    assert!(map.overlapping_deltas().is_none());
    // A compaction that is done again after a crash finds its inputs gone, its output present.
    assert_eq!(map.replace(&inputs, vec![(rest, "L1 high again".to_owned())]), ["L1 high"]);
    assert_eq!(map.search(key(100), Lsn(25)), ["L1 high again"]);
    map.check_invariants().unwrap();
}

#[test]
#[should_panic(expected = "an image at several LSNs")]
fn an_image_has_one_lsn() {
    LayerMap::default().insert(span(0..1, 5..7, true), ());
}

/// `ranges` key ranges by `steps` LSN steps; every fifth step is of images, others of deltas.
/// `cut(step, n)` is the first key of the n-th range.
fn grid(ranges: u32, steps: u64, cut: impl Fn(u64, u32) -> u32) -> Vec<LayerSpan> {
    let mut spans = Vec::new();
    for step in 1..=steps {
        for n in 0..ranges {
            let keys = cut(step, n)..cut(step, n + 1);
            let is_image = step % 5 == 0;
            let lsns =
                if is_image { 100 * step..100 * step + 1 } else { 100 * step..100 * step + 100 };
            spans.push(span(keys, lsns, is_image));
        }
    }
    spans
}

fn pseudo_random(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed;
    move |below| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    }
}

/// Fills a map in a mixed order, compares samples with the twin, and returns the highest count
/// of each step.
fn fill_and_search(mut spans: Vec<LayerSpan>, key_end: u32) -> (LayerMap<u32>, Twin, Steps) {
    let mut random = pseudo_random(7);
    for n in (1..spans.len()).rev() {
        spans.swap(n, random(n as u64 + 1) as usize);
    }
    let (mut map, mut twin) = (LayerMap::default(), Twin::default());
    for (span, number) in spans.into_iter().zip(0..) {
        map.insert(span.clone(), number);
        twin.0.push((span, number));
    }
    map.check_invariants().unwrap();
    let mut highest = Steps::default();
    for _ in 0..300 {
        let (key, below) = (key(random(u64::from(key_end)) as u32), Lsn(random(2_600)));
        let mut steps = Steps::default();
        let found = map.search_counted(key, below, &mut steps);
        assert_eq!(found, twin.search(key, below));
        assert!(steps.layers as usize <= found.len() + steps.lists as usize);
        highest.nodes = highest.nodes.max(steps.nodes);
        highest.lists = highest.lists.max(steps.lists);
        highest.layers = highest.layers.max(steps.layers);
    }
    (map, twin, highest)
}

#[test]
fn a_search_among_many_layers_takes_few_steps() {
    // The same 200 key ranges at each of 25 steps.
    let (map, _, steps) = fill_and_search(grid(200, 25, |_, n| 1_000 * n), 200_000);
    let TreeSize { depth, list_entries: entries } = map.check_invariants().unwrap();
    assert!(depth <= 24, "depth {depth}");
    assert!(entries < 3 * map.len(), "{entries} list entries");
    assert!(steps.nodes <= 48 && steps.layers <= 20, "{steps:?}");

    // Other key ranges at each step.
    let cut = |step: u64, n: u32| match n {
        0 => 0,
        200 => 200_000,
        n => 1_000 * n + (step as u32 * 379) % 997,
    };
    let (map, mut twin, steps) = fill_and_search(grid(200, 25, cut), 200_000);
    let TreeSize { depth, list_entries: entries } = map.check_invariants().unwrap();
    assert!(depth <= 36, "depth {depth}");
    assert!(entries < 16 * map.len(), "{entries} list entries");
    assert!(steps.nodes <= 72 && steps.layers <= 30, "{steps:?}");

    // And most of them go again.
    let mut map = map;
    while twin.0.len() > 400 {
        let (span, number) = twin.0.swap_remove(twin.0.len() / 2);
        assert_eq!(map.remove(&span), Some(number));
    }
    map.check_invariants().unwrap();
    let mut random = pseudo_random(8);
    for _ in 0..300 {
        let (key, below) = (key(random(200_000) as u32), Lsn(random(2_600)));
        assert_eq!(map.search(key, below), twin.search(key, below));
        compare_range(&map, &twin, &(key..Key { field6: key.field6 + 5_000, ..key }), below);
    }
}

/// Boundaries come in rising order as a relation grows: the tree must not become a list.
#[test]
fn rising_keys_keep_the_tree_shallow() {
    let mut map = LayerMap::default();
    for n in 0..20_000 {
        map.insert(span(8 * n..8 * n + 8, 1..100, false), n);
    }
    let TreeSize { depth, list_entries: entries } = map.check_invariants().unwrap();
    assert!(depth <= 45, "depth {depth}");
    assert_eq!(entries, 20_000);
    assert!(map.overlapping_deltas().is_none());
    for n in 0..20_000 {
        assert_eq!(map.remove(&span(8 * n..8 * n + 8, 1..100, false)), Some(n));
    }
    assert_eq!(map.check_invariants(), Ok(EMPTY));
}
