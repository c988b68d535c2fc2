//! The plan against a model of what its actions do.

use proptest::prelude::*;

use super::*;

/// Pages of the model's database; page `n` has key `n`.
fn key(n: u32) -> Key {
    Key { field6: n, field4: 16384, field3: 5, field2: 1663, ..Key::MIN }
}

fn span(keys: KeyRange, lsns: std::ops::Range<u64>, is_image: bool) -> LayerSpan {
    LayerSpan { keys, lsns: Lsn(lsns.start)..Lsn(lsns.end), is_image }
}

fn layer(keys: KeyRange, lsns: std::ops::Range<u64>, is_image: bool, bytes: u64) -> PlanLayer {
    PlanLayer { span: span(keys, lsns, is_image), bytes, inherited: false }
}

/// A timeline whose pages are updated at random, and what was written for it.
struct Model {
    layers: Vec<PlanLayer>,
    config: PlanConfig,
    pages: u32,
    page_bytes: u64,
    lsn: u64,
    l0_bytes: u64,
    l1_bytes: u64,
    image_bytes: u64,
    actions: u64,
    l0_max: usize,
    depth_max: u64,
    /// Bytes of one record.
    record_bytes: f64,
    /// How often a read took blocks of so many layers, and applied so many records.
    layers_read: Vec<f64>,
    records_read: Vec<f64>,
    /// Merges find nothing of some keys.
    holes: bool,
    seed: u64,
}

/// The number below which so much of a distribution lies.
fn quantile(distribution: &[f64], share: f64) -> usize {
    let wanted = distribution.iter().sum::<f64>() * share;
    let mut seen = 0.0;
    distribution
        .iter()
        .position(|weight| {
            seen += weight;
            seen >= wanted
        })
        .unwrap_or(distribution.len())
}

/// Adds the distribution of the number of layers that a page's read takes blocks of, and that of
/// the records, when the layers have so many records of each page on average.
/// `records` are those of a page in files, by layer; `in_memory` those of L0 layers, which are in
/// memory still.
fn note_read(
    layers_read: &mut Vec<f64>,
    records_read: &mut Vec<f64>,
    records: &[f64],
    in_memory: f64,
) {
    // The image is always read.
    let mut layers = vec![0.0, 1.0];
    for mean in records {
        let has = 1.0 - (-mean).exp();
        layers.push(0.0);
        for count in (0..layers.len()).rev() {
            let one_less = if count > 0 { layers[count - 1] } else { 0.0 };
            layers[count] = layers[count] * (1.0 - has) + one_less * has;
        }
    }
    let mean: f64 = records.iter().sum::<f64>() + in_memory;
    let mut probability = (-mean).exp();
    let records = (1..200).map(|count| {
        let this = probability;
        probability *= mean / f64::from(count);
        this
    });
    let add = |to: &mut Vec<f64>, from: Vec<f64>| {
        to.resize(to.len().max(from.len()), 0.0);
        to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
    };
    add(layers_read, layers);
    add(records_read, records.collect());
}

impl Model {
    fn new(pages: u32, page_bytes: u64, config: PlanConfig) -> Model {
        let mut model = Model {
            layers: Vec::new(),
            config,
            pages,
            page_bytes,
            lsn: 100,
            l0_bytes: 0,
            l1_bytes: 0,
            image_bytes: 0,
            actions: 0,
            l0_max: 0,
            depth_max: 0,
            record_bytes: 24.0,
            layers_read: Vec::new(),
            records_read: Vec::new(),
            holes: false,
            seed: 1,
        };
        model.images(Key::MIN..Key::MAX, 100);
        model.image_bytes = 0;
        model
    }

    fn page_of(&self, key: Key) -> u32 {
        match key {
            Key::MIN => 0,
            Key::MAX => self.pages,
            key => key.field6.min(self.pages),
        }
    }

    fn share(&self, keys: &KeyRange) -> u64 {
        u64::from(self.page_of(keys.end) - self.page_of(keys.start))
    }

    /// Image layers over `keys`, cut at the target size.
    fn images(&mut self, keys: KeyRange, lsn: u64) {
        let per_layer = (self.config.target_bytes / self.page_bytes).max(1) as u32;
        let mut start = keys.start;
        while start < keys.end {
            let next = self.page_of(start) + per_layer;
            let end = if next >= self.page_of(keys.end) { keys.end } else { key(next) };
            let bytes = self.share(&(start..end)) * self.page_bytes;
            self.layers.push(layer(start..end, lsn..lsn + 1, true, bytes));
            self.image_bytes += bytes;
            start = end;
        }
    }

    fn l0(&mut self, bytes: u64) {
        let end = self.lsn + 1_000;
        self.layers.push(layer(Key::MIN..Key::MAX, self.lsn + 1..end + 1, false, bytes));
        self.lsn = end;
        self.l0_bytes += bytes;
        self.l0_max = self.l0_max.max(self.layers.iter().filter(|l| l.is_l0()).count());
    }

    /// Notes what reads of some pages, evenly spread, find now.
    fn read(&mut self) {
        let columns = columns(&self.layers, &self.config);
        let pages = f64::from(self.pages);
        for column in columns.iter().step_by(1 + columns.len() / 8) {
            // Records of a page in each layer.
            let per_page = |bytes: u64, pages: f64| bytes as f64 / self.record_bytes / pages;
            let share = self.share(&column.keys) as f64;
            let stack = column.stack.iter().map(|(_, bytes)| per_page(*bytes, share));
            let l0 = self.layers.iter().filter(|layer| layer.is_l0());
            let l0: f64 = l0.map(|layer| per_page(layer.bytes, pages)).sum();
            let records: Vec<f64> = stack.collect();
            note_read(&mut self.layers_read, &mut self.records_read, &records, l0);
        }
    }

    fn merge(&mut self, inputs: &[usize], lsns: &LsnRange) {
        let keys = |at: &usize| self.layers[*at].span.keys.clone();
        let start = inputs.iter().map(|at| keys(at).start.max(key(0))).min().unwrap();
        let end = inputs.iter().map(|at| keys(at).end.min(key(self.pages))).max().unwrap();
        let bytes: u64 = inputs.iter().map(|at| self.layers[*at].bytes).sum();
        self.l1_bytes += bytes;
        let images = self.layers.iter().filter(|l| l.span.is_image);
        let starts = images.map(|l| l.span.keys.start.max(key(0)).field6);
        let starts: std::collections::BTreeSet<u32> = starts.collect();
        let bars = bars(&self.layers, inputs, lsns);
        let bars: Vec<u32> = bars.into_iter().map(|bar| bar.max(key(0)).field6).collect();
        let cover = Cover::new(&self.layers, inputs.iter().copied()).0.into_iter();
        let clamp = |at: Key| at.clamp(key(0), key(self.pages)).field6;
        let cover: Vec<std::ops::Range<u32>> =
            cover.map(|keys| clamp(keys.start)..clamp(keys.end)).collect();
        let input_spans: Vec<LayerSpan> =
            inputs.iter().map(|at| self.layers[*at].span.clone()).collect();
        let keep = |at: usize, l: PlanLayer| (!inputs.contains(&at)).then_some(l);
        let old = std::mem::take(&mut self.layers);
        self.layers = old.into_iter().enumerate().filter_map(|(at, l)| keep(at, l)).collect();
        // Cut as the job does: at the target size, where an image begins, and before others.
        let pages = u64::from(end.field6 - start.field6);
        let bytes_of = |from: u32, to: u32| bytes * u64::from(to - from) / pages;
        let at_target = (pages * self.config.target_bytes / bytes.max(1)).max(1);
        let mut from = start.field6;
        while let Some(first) = cover.iter().find(|keys| keys.end > from) {
            from = from.max(first.start);
            let full = (u64::from(from) + at_target).min(u64::from(end.field6)) as u32;
            let bar = bars.iter().find(|bar| **bar > from).copied().unwrap_or(full);
            let full = full.min(bar);
            let least = self.config.target_bytes / 8;
            let cut = starts.range(from + 1..full.max(from + 1));
            let cut = cut.copied().find(|cut| bytes_of(from, *cut) >= least).unwrap_or(full);
            let within = cover.iter().rfind(|keys| keys.start < cut);
            let last = within.map_or(cut, |keys| keys.end.min(cut));
            let lsns = lsns.start.0..lsns.end.0;
            self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            // Nothing changed there.
            let is_hole = self.holes && self.seed >> 62 == 0;
            if !is_hole {
                let made = layer(key(from)..key(last), lsns, false, bytes_of(from, last));
                assert!(!input_spans.contains(&made.span), "{:?} is an input's name", made.span);
                self.layers.push(made);
            }
            from = cut;
        }
    }

    fn carry_out(&mut self, action: &Action) {
        self.actions += 1;
        let before = self.layers.len();
        let kept = match action {
            Action::MergeL0 { inputs, lsns, .. } | Action::MergeL1 { inputs, lsns, .. } => {
                self.merge(inputs, lsns);
                before - inputs.len()
            }
            Action::MakeImages { keys, lsn, .. } => {
                self.images(keys.clone(), lsn.0);
                before
            }
        };
        self.check(kept);
    }

    /// Carries out what is planned until nothing is.
    fn settle(&mut self) {
        self.read();
        for _ in 0..10_000 {
            let actions = plan(&self.layers, &self.config);
            let Some(action) = actions.first() else {
                let columns = columns(&self.layers, &self.config);
                let depth = columns.iter().map(Column::depth_milli).max();
                self.depth_max = self.depth_max.max(depth.unwrap_or(0));
                self.read();
                return;
            };
            let action = action.clone();
            self.carry_out(&action);
        }
        panic!("the plan does not come to an end");
    }

    /// The invariants of the module's text, which held before: the first `kept` layers are not new.
    fn check(&self, kept: usize) {
        for (at, a) in self.layers.iter().enumerate().skip(kept) {
            for b in self.layers.iter().take(at) {
                let lsns =
                    a.span.lsns.start < b.span.lsns.end && b.span.lsns.start < a.span.lsns.end;
                if !overlap(&a.span.keys, &b.span.keys) || !lsns {
                    continue;
                }
                let allowed = a.span.is_image != b.span.is_image;
                assert!(allowed, "{a:?} and {b:?} hold the same");
            }
        }
        let mut free = BTreeMap::from([(Key::MIN, Key::MAX)]);
        for image in self.layers.iter().filter(|l| l.span.is_image && l.span.lsns.start == Lsn(100))
        {
            take(&mut free, &image.span.keys);
        }
        assert!(free.is_empty(), "keys without an image: {free:?}");
    }

    /// Bytes written in layers for each byte that came in, in percent.
    fn amplification(&self) -> u64 {
        (self.l0_bytes + self.l1_bytes + self.image_bytes) * 100 / self.l0_bytes
    }
}

fn config(l0_threshold: usize, target_bytes: u64, image_percent: u64) -> PlanConfig {
    let (merge_bytes_max, start_lsn) = (1 << 30, Lsn(0));
    let layer_records_milli = 0;
    PlanConfig {
        l0_threshold,
        target_bytes,
        image_percent,
        merge_bytes_max,
        start_lsn,
        layer_records_milli,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn invariants_hold_and_the_plan_ends(
        pages in 1u32..3_000,
        l0_threshold in 1usize..5,
        target in 20u64..1_000,
        percent in 5u64..300,
        merge_bytes_max in 1u64..20_000_000,
        holes: bool,
        steps in prop::collection::vec((1u64..400, 0u8..4), 1..40),
    ) {
        let config =
            PlanConfig { merge_bytes_max, ..config(l0_threshold, target * 1_000, percent) };
        let mut model = Model::new(pages, 4_000, config);
        model.holes = holes;
        for (kilobytes, patience) in steps {
            model.l0(kilobytes * 1_000);
            if patience > 0 {
                model.settle();
            }
        }
        model.settle();
        let l0_left = model.layers.iter().filter(|layer| layer.is_l0()).count();
        prop_assert!(l0_left < l0_threshold);
        prop_assert!(plan(&model.layers, &model.config).is_empty());
    }
}

/// Random updates of a database of `pages` pages, for so many checkpoints. Pages take 800 bytes
/// and records 24, as those of pgbench do when zstd has packed them.
fn steady(pages: u32, rounds: u64) -> Model {
    let mut model = Model::new(pages, 800, config(3, 128_000_000, 50));
    for _ in 0..rounds {
        model.l0(19_200_000);
        model.settle();
    }
    model
}

#[test]
fn write_amplification_does_not_grow_with_the_database() {
    // A checkpoint has 3 records of each page in the smallest and 3/16 in the largest: how the curve
    // bends, docs/compaction.md says.
    let curve: Vec<(u32, Model)> = [1u32, 2, 4, 8, 16]
        .into_iter()
        .map(|factor| {
            let pages = factor * 266_000;
            let model = steady(pages, u64::from(factor) * 32);
            println!(
                "{} MB: L1 {} %, images {} %, all {} %, depth {}/1000, {} layers, L0 {}, p99 of \
                 layers read {}, of records {}",
                u64::from(pages) * 8 / 10_000,
                model.l1_bytes * 100 / model.l0_bytes,
                model.image_bytes * 100 / model.l0_bytes,
                model.amplification(),
                model.depth_max,
                model.layers.len(),
                model.l0_max,
                quantile(&model.layers_read, 0.99),
                quantile(&model.records_read, 0.99),
            );
            (factor, model)
        })
        .collect();
    for (factor, model) in curve {
        // Beyond that, three L0 layers together have less than a record of each page.
        let amplification_max = if factor <= 8 { 500 } else { 580 };
        let layers_max = if factor == 1 { 3 } else { 4 };
        let amplification = model.amplification();
        assert!(amplification <= amplification_max, "{factor} times: {amplification} %");
        let (layers, records) =
            (quantile(&model.layers_read, 0.99), quantile(&model.records_read, 0.99));
        assert!(layers <= layers_max && records <= 32, "{factor} times: {layers}, {records}");
        assert!(model.depth_max <= COMPACT_DEPTH_MAX * 1000, "{factor} times: too deep");
        assert!(model.l0_max <= model.config.l0_threshold, "{factor} times: {} L0", model.l0_max);
    }
}

/// A merge of L0 layers that leaves no rows.
fn merge_l0(inputs: Vec<usize>, lsns: LsnRange) -> Action {
    Action::MergeL0 { inputs, lsns, chain_max: COMPACT_CHAIN_MAX }
}

#[test]
fn l0_layers_are_merged_from_the_oldest_on() {
    let whole = Key::MIN..Key::MAX;
    let layers = [
        layer(whole.clone(), 100..101, true, 1_000_000),
        layer(whole.clone(), 301..401, false, 1_000),
        layer(whole.clone(), 101..201, false, 1_000),
        layer(whole, 201..301, false, 1_000),
    ];
    assert_eq!(
        plan(&layers, &config(3, 1_000_000, 50)),
        [merge_l0(vec![2, 3, 1], Lsn(101)..Lsn(401))]
    );
    assert!(plan(&layers, &config(4, 1_000_000, 50)).is_empty());
}

#[test]
fn images_are_made_where_deltas_are_stacked_and_nowhere_else() {
    let layers = [
        layer(Key::MIN..key(100), 100..101, true, 400_000),
        layer(key(100)..Key::MAX, 100..101, true, 400_000),
        layer(key(0)..key(100), 101..201, false, 150_000),
        layer(key(0)..key(100), 201..301, false, 150_000),
        layer(Key::MIN..Key::MAX, 301..401, false, 10),
    ];
    let images =
        Action::MakeImages { keys: Key::MIN..key(100), lsn: Lsn(300), base: 0, deltas: vec![3, 2] };
    assert_eq!(plan(&layers, &config(4, 1_000_000, 50)), [images]);
    assert!(plan(&layers, &config(4, 1_000_000, 90)).is_empty());
    let early = PlanConfig { start_lsn: Lsn(301), ..config(4, 1_000_000, 50) };
    assert!(plan(&layers, &early).is_empty(), "pages cannot be rebuilt before the start");
}

#[test]
fn a_branch_makes_images_from_what_it_inherits_and_merges_its_own() {
    let whole = Key::MIN..Key::MAX;
    let inherited = |layer| PlanLayer { inherited: true, ..layer };
    let layers = [
        inherited(layer(whole.clone(), 100..101, true, 400_000)),
        inherited(layer(whole.clone(), 60..90, false, 10)),
        inherited(layer(key(0)..key(9), 90..150, false, 200_000)),
        inherited(layer(whole.clone(), 150..201, false, 200_000)),
        layer(key(0)..key(9), 201..301, false, 300_000),
        layer(whole.clone(), 301..401, false, 10),
        layer(whole.clone(), 401..501, false, 10),
    ];
    let images = Action::MakeImages { keys: whole, lsn: Lsn(300), base: 0, deltas: vec![4, 2, 3] };
    assert_eq!(plan(&layers, &config(3, 1_000_000, 50)), std::slice::from_ref(&images));
    let merge = Action::MergeL0 {
        inputs: vec![5, 6],
        lsns: Lsn(301)..Lsn(501),
        chain_max: COMPACT_CHAIN_MAX / 2,
    };
    assert_eq!(plan(&layers, &config(2, 1_000_000, 50)), [images, merge]);
    // Without own layers above them nothing is stacked, however much the ancestor has.
    assert!(plan(&layers[..4], &config(1, 1_000_000, 1)).is_empty());
}

#[test]
fn small_rows_are_merged_along_and_large_ones_are_not() {
    let whole = Key::MIN..Key::MAX;
    let image = layer(whole.clone(), 100..101, true, 100_000_000);
    let l0 = |from: u64| layer(whole.clone(), from..from + 100, false, 400_000);
    let row = |from: u64, bytes| layer(key(0)..key(100), from..from + 100, false, bytes);
    let inputs = |layers: &[PlanLayer]| match plan(layers, &config(2, 1_000_000, 50)).first() {
        Some(Action::MergeL0 { inputs, lsns, chain_max }) => {
            (inputs.clone(), lsns.clone(), *chain_max)
        }
        other => panic!("{other:?}"),
    };
    let layers = [image.clone(), row(101, 9_000_000), row(201, 500_000), l0(301), l0(401)];
    assert_eq!(inputs(&layers), (vec![3, 4, 2], Lsn(201)..Lsn(501), COMPACT_CHAIN_MAX / 2));
    // Three rows and a new one are too many; the oldest is too large.
    let [a, b, c] = [row(101, 30_000_000), row(201, 4_000_000), row(301, 4_000_000)];
    let layers = [image.clone(), a, b, c, l0(401), l0(501)];
    assert_eq!(inputs(&layers), (vec![4, 5, 3, 2], Lsn(201)..Lsn(601), COMPACT_CHAIN_MAX / 2));
    // An image has made the row unnecessary.
    let newer = layer(whole.clone(), 290..291, true, 90_000_000);
    let layers = [image, newer, row(101, 9_000_000), row(201, 500_000), l0(301), l0(401)];
    assert_eq!(inputs(&layers), (vec![4, 5], Lsn(301)..Lsn(501), COMPACT_CHAIN_MAX));
}

#[test]
fn rows_may_have_the_fewer_records_the_more_are_in_newer_layers() {
    let total = |layer_records_milli| {
        chain_total(&PlanConfig { layer_records_milli, ..config(3, 1_000_000, 50) })
    };
    assert_eq!([0, 400, 1_000, 2_500].map(total), [72, 66, 56, 32]);
    assert_eq!([5_000, 50_000, u64::MAX].map(total), [8, 8, 8]);
}

#[test]
fn full_layers_are_merged_though_they_are_few() {
    let whole = Key::MIN..Key::MAX;
    let layers = |bytes| {
        [
            layer(whole.clone(), 100..101, true, 1_000_000),
            layer(whole.clone(), 101..201, false, bytes),
            layer(whole.clone(), 201..301, false, bytes),
        ]
    };
    let merge = merge_l0(vec![1, 2], Lsn(101)..Lsn(301));
    assert_eq!(plan(&layers(20_000), &config(6, 1_000_000, 50)), [merge]);
    assert!(plan(&layers(2_000), &config(6, 1_000_000, 50)).is_empty());
}

#[test]
fn images_that_are_overdue_come_before_merges_unless_those_are_urgent() {
    let whole = Key::MIN..Key::MAX;
    let with_l0 = |count: u64| {
        let mut layers = vec![
            layer(whole.clone(), 100..101, true, 1_000_000),
            layer(key(0)..key(100), 101..201, false, 800_000),
        ];
        let l0 = (0..count).map(|n| 201 + 100 * n);
        layers.extend(l0.map(|from| layer(whole.clone(), from..from + 100, false, 1_000)));
        layers
    };
    let first = |count| plan(&with_l0(count), &config(3, 1_000_000, 50)).into_iter().next();
    assert!(matches!(first(3), Some(Action::MakeImages { .. })));
    assert!(matches!(first(L0_LAYERS_URGENT as u64), Some(Action::MergeL0 { .. })));
}

#[test]
fn an_image_in_the_middle_does_not_hold_up_a_merge() {
    let whole = Key::MIN..Key::MAX;
    let layers = [
        layer(whole.clone(), 100..101, true, 1_000_000),
        layer(whole.clone(), 101..201, false, 1_000),
        layer(key(5)..key(7), 200..201, true, 1_000),
        layer(whole.clone(), 201..301, false, 1_000),
        layer(whole, 301..401, false, 1_000),
    ];
    assert_eq!(
        plan(&layers, &config(3, 1_000_000, 50)),
        [merge_l0(vec![1, 3, 4], Lsn(101)..Lsn(401))]
    );
}

#[test]
fn what_lies_between_the_keys_of_a_merge_bars_its_result() {
    let delta =
        |keys: std::ops::Range<u32>, lsns| layer(key(keys.start)..key(keys.end), lsns, false, 1);
    let layers = [
        layer(Key::MIN..Key::MAX, 100..101, true, 1),
        delta(1..14, 200..300),
        delta(14..21, 200..300),
        delta(21..24, 200..300),
        delta(4..10, 300..400),
        delta(24..30, 300..400),
        delta(10..12, 150..200),
        delta(12..13, 400..500),
        layer(key(15)..key(16), 250..251, true, 1),
    ];
    let inputs = [1, 3, 4, 5];
    assert!(is_mergeable(&layers, &inputs));
    let lsns = hull(&layers, &inputs).unwrap();
    assert_eq!(bars(&layers, &inputs, &lsns), [key(14)]);
    assert_eq!(bars(&layers, &[1, 2, 3, 4, 5], &lsns), []);
}

/// A layer that covers all LSNs of a merge shares no keys with the others: its file would be
/// written anew under its own name.
#[test]
fn no_merge_writes_what_it_reads() {
    let size = 1_000_000u64;
    let delta = |keys: std::ops::Range<u32>, lsns, share| {
        layer(key(keys.start)..key(keys.end), lsns, false, size * share)
    };
    let layers = [
        layer(Key::MIN..Key::MAX, 100..101, true, 64 * size),
        delta(1..10, 200..400, 1),
        delta(25..30, 200..300, 1),
        delta(12..14, 150..300, 5),
        delta(1..30, 101..150, 1),
    ];
    for action in plan(&layers, &config(3, 128 * size, 1_000)) {
        if let Action::MergeL1 { inputs, lsns, .. } = action {
            assert!(inputs.iter().all(|at| layers[*at].span.lsns != lsns), "{inputs:?}");
        }
    }
    // The second is all that is left then.
    assert!(without_done(&layers, vec![1, 2]).is_empty());
    assert_eq!(without_done(&layers, vec![1, 2, 3]), [1, 2, 3]);
}
