//! What compaction shall do next, from the layers that there are. Pure.
//!
//! Layers of a timeline, from the newest:
//!
//! | level | what it is |
//! |---|---|
//! | L0 | delta layers over all keys, as checkpoints write them |
//! | L1 | delta layers of a key range; one merge gives a row of them that share an LSN range |
//! | image | every key of a range at one LSN |
//!
//! A **column** is a key range whose newest image layer is the same everywhere in it; L1 layers
//! above that image are stacked on the column. A branch sees its ancestors' layers up to the branch
//! point: they are what its first images are made from, and nothing else happens to them. The
//! rules, in order:
//!
//! 1. [`Action::MergeL0`]: enough L0 layers become L1 layers: so many of them, or as many as hold
//!    some records of each page together. The newest rows of L1 layers are taken along where they
//!    are small beside what is merged, or where otherwise there would be too many rows, but not if
//!    images are due anyway or have made most of a row unnecessary. So what comes in is cut by keys
//!    and levelled in one go.
//! 2. [`Action::MakeImages`]: the layers stacked on a column have grown to a given part of the
//!    column's image, so a new image costs at most the inverse of that part for each byte that
//!    was merged. Half of it is enough where rule 3 would apply but finds nothing. Before rule 1,
//!    where it is overdue and there are few L0 layers.
//! 3. [`Action::MergeL1`]: a read has to descend too far, but images would cost too much: stacked
//!    layers become fewer. Layers of similar size are merged. This is for loads that leave the
//!    rows in pieces, and for rows too large for rule 1.
//!
//! How far a read descends is counted by the share of pages that a layer has records of: a
//! hundred layers with one page in a hundred each count as one. So neither the number of images
//! nor that of merges depends on the size of the database.
//!
//! Invariants that every action keeps, if they held before: for any key the delta layers that
//! cover it have disjoint LSN ranges; every key is covered by an image as old as the oldest that
//! covered it before. A delta layer may reach below an image: merges concern whole layers, and
//! columns get their images at different times. The layers of a row have gaps between them, where
//! there was nothing to write, and others may lie there: a merge cuts its result at [`bars`].

use std::collections::{BTreeMap, BTreeSet};

use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::limits::{
    COMPACT_CHAIN_LAYERS_MILLI, COMPACT_CHAIN_MAX, COMPACT_CHAIN_MIN, COMPACT_CHAIN_TIGHT,
    COMPACT_DEPTH_MAX, COMPACT_IMAGE_OVERDUE_PERCENT, COMPACT_L0_RECORDS_MILLI,
    COMPACT_L1_INPUT_BYTES_MAX, COMPACT_LEVELS_MAX, COMPACT_ROW_FACTOR, COMPACT_ROWS_MAX,
    COMPACT_SPARSE_FACTOR, L0_LAYERS_URGENT,
};
use crate::shard::layer_map::LayerSpan;

/// A layer as the plan sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanLayer {
    /// Keys, LSNs, kind.
    pub span: LayerSpan,
    /// Length of its file in bytes.
    pub bytes: u64,
    /// It is an ancestor's, up to the branch point: it is read, and never replaced.
    pub inherited: bool,
}

impl PlanLayer {
    /// True for a delta layer over all keys.
    pub fn is_l0(&self) -> bool {
        self.span.is_l0() && !self.inherited
    }

    fn is_l1(&self) -> bool {
        !self.span.is_image && !self.is_l0() && !self.inherited
    }

    fn is_inherited_delta(&self) -> bool {
        !self.span.is_image && self.inherited
    }
}

/// What the plan goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanConfig {
    /// L0 layers are merged when there are so many, or fewer that reads go deep into; with
    /// `usize::MAX` never.
    pub l0_threshold: usize,
    /// Layers are cut at this size, in bytes.
    pub target_bytes: u64,
    /// A column gets a new image when the layers stacked on it have this part of the bytes of its
    /// image, in percent.
    pub image_percent: u64,
    /// A merge of L0 layers takes at most so many bytes, unless it is of a single larger layer.
    pub merge_bytes_max: u64,
    /// First LSN at which pages can be rebuilt.
    pub start_lsn: Lsn,
    /// Values that an L0 layer has of each key that is in it, in thousandths.
    pub layer_records_milli: u64,
}

/// Something to do. Layers are named by their place in the list that was planned for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Merges L0 layers into L1 layers.
    MergeL0 {
        /// The oldest ones.
        inputs: Vec<usize>,
        /// LSN range of the result.
        lsns: LsnRange,
        /// A page with more records than this gets an image behind them: the more rows are left
        /// below, the fewer.
        chain_max: usize,
    },
    /// Makes new image layers of a column.
    MakeImages {
        /// The column.
        keys: KeyRange,
        /// LSN of the images.
        lsn: Lsn,
        /// The image layer below, perhaps an ancestor's.
        base: usize,
        /// The L1 layers between, and an ancestor's delta layers.
        deltas: Vec<usize>,
    },
    /// Merges L1 layers into fewer.
    MergeL1 {
        /// The layers.
        inputs: Vec<usize>,
        /// LSN range of the result.
        lsns: LsnRange,
        /// As in a merge of L0; another row is left below, mostly.
        chain_max: usize,
    },
}

/// A key range, the image layer below it and the L1 layers between that and L0.
#[derive(Clone)]
struct Column {
    keys: KeyRange,
    image: usize,
    lsn: Lsn,
    image_bytes: u64,
    /// L1 layers, newest first, with the bytes that this column has of each.
    stack: Vec<(usize, u64)>,
    /// Delta layers of ancestors, above the image, which is an ancestor's then.
    inherited: Vec<usize>,
}

fn overlap(a: &KeyRange, b: &KeyRange) -> bool {
    a.start < b.end && b.start < a.end
}

/// What shall be done, the most urgent first. Only the first may be carried out: the others were
/// planned for the layers as they are now. Ends by itself: without new layers, carrying out one
/// action after the other leads to an empty plan.
pub fn plan(layers: &[PlanLayer], config: &PlanConfig) -> Vec<Action> {
    let columns = columns(layers, config);
    let percent = config.image_percent;
    let images = columns.iter().filter_map(|column| make_images(layers, column, config, percent));
    let images: Vec<(u64, Action)> = images.collect();
    let overdue = percent.saturating_mul(COMPACT_IMAGE_OVERDUE_PERCENT) / 100;
    let is_overdue = images.iter().any(|(percent, _)| *percent >= overdue);
    let l0_count = layers.iter().filter(|layer| layer.is_l0()).count();
    let mut actions: Vec<Action> = most_urgent(images.into_iter()).collect();
    if let Some(merge) = merge_l0(layers, &columns, config) {
        // A source that is faster than compaction keeps rule 1 busy for ever.
        let images_first = is_overdue && l0_count < L0_LAYERS_URGENT;
        actions.insert(if images_first { actions.len() } else { 0 }, merge);
    }
    if !actions.is_empty() {
        return actions;
    }
    let deep = || columns.iter().filter(|column| column.is_deep());
    actions.extend(deep().find_map(|column| merge_l1(layers, column, config)));
    if actions.is_empty() {
        // Where no few layers can be merged, images cost least.
        let images = deep().filter_map(|column| make_images(layers, column, config, percent / 2));
        actions.extend(most_urgent(images));
    }
    actions
}

/// The actions for which the most bytes are stacked, for each byte of an image, come first.
fn most_urgent(images: impl Iterator<Item = (u64, Action)>) -> impl Iterator<Item = Action> {
    let mut images: Vec<(u64, Action)> = images.collect();
    images.sort_by_key(|(percent, _)| std::cmp::Reverse(*percent));
    images.into_iter().map(|(_, action)| action)
}

/// LSN range from the first to the last of some layers.
fn hull(layers: &[PlanLayer], chosen: &[usize]) -> Option<LsnRange> {
    let lsns = || chosen.iter().filter_map(|at| layers.get(*at)).map(|layer| &layer.span.lsns);
    Some(lsns().map(|range| range.start).min()?..lsns().map(|range| range.end).max()?)
}

fn merge_l0(layers: &[PlanLayer], columns: &[Column], config: &PlanConfig) -> Option<Action> {
    let l0 = |(at, layer): (usize, &PlanLayer)| layer.is_l0().then_some((at, layer.bytes));
    let mut found: Vec<(usize, u64)> = layers.iter().enumerate().filter_map(l0).collect();
    let image_bytes = image_bytes(columns);
    let bytes: u64 = found.iter().map(|(_, bytes)| bytes).sum();
    let is_full = image_bytes > 0 && records_milli(bytes, image_bytes) >= COMPACT_L0_RECORDS_MILLI;
    let is_off = config.l0_threshold == usize::MAX;
    if is_off || found.len() < config.l0_threshold.max(1) && !is_full {
        return None;
    }
    found.sort_by_key(|(at, _)| layers.get(*at).map(|layer| layer.span.lsns.start));
    let mut inputs = Vec::new();
    let mut total = 0u64;
    for (at, bytes) in found {
        total = total.saturating_add(bytes);
        let full = total > config.merge_bytes_max || inputs.len() == COMPACT_LEVELS_MAX;
        if full && !inputs.is_empty() {
            break;
        }
        inputs.push(at);
    }
    while !is_mergeable(layers, &inputs) {
        inputs.pop();
    }
    let mut whole = inputs.clone();
    take_rows(layers, columns, config, &mut whole);
    if whole.len() > inputs.len() && is_mergeable(layers, &whole) {
        inputs = whole;
    }
    let lsns = hull(layers, &inputs)?;
    // Rows are taken whole.
    let left = rows(layers, columns);
    let left = left.iter().filter(|row| row.members.first().is_some_and(|at| !inputs.contains(at)));
    let left: u64 = left.map(|row| weight_milli(row.live_bytes, image_bytes)).sum();
    let parts = 1 + usize::try_from((left + 500) / 1000).unwrap_or(COMPACT_LEVELS_MAX);
    let chain_max = (chain_total(config) / parts).max(COMPACT_CHAIN_MIN);
    Some(Action::MergeL0 { inputs, lsns, chain_max })
}

/// Records of a page that all rows together may have. What L0 layers and memory have comes to it:
/// a few layers, whatever the size of the database, but many records only in a small one.
fn chain_total(config: &PlanConfig) -> usize {
    let newer = config.layer_records_milli.saturating_mul(COMPACT_CHAIN_LAYERS_MILLI) / 1_000_000;
    let newer = usize::try_from(newer).unwrap_or(COMPACT_CHAIN_MAX);
    COMPACT_CHAIN_MAX.saturating_sub(newer).max(COMPACT_CHAIN_TIGHT)
}

fn image_bytes(columns: &[Column]) -> u64 {
    columns.iter().map(|column| column.image_bytes).fold(0, u64::saturating_add)
}

/// L1 layers that share LSNs, whatever their keys: mostly those that one merge has made.
#[derive(Default)]
struct Row {
    members: Vec<usize>,
    bytes: u64,
    /// Of that, what no image has made unnecessary.
    live_bytes: u64,
    start: Lsn,
}

/// All L1 layers in rows, newest first.
fn rows(layers: &[PlanLayer], columns: &[Column]) -> Vec<Row> {
    let mut live: BTreeMap<usize, u64> = BTreeMap::new();
    for (at, bytes) in columns.iter().flat_map(|column| &column.stack) {
        let total = live.entry(*at).or_default();
        *total = total.saturating_add(*bytes);
    }
    let mut l1: Vec<(usize, &PlanLayer)> =
        layers.iter().enumerate().filter(|(_, layer)| layer.is_l1()).collect();
    l1.sort_by_key(|(_, layer)| std::cmp::Reverse(layer.span.lsns.end));
    let mut rows: Vec<Row> = Vec::new();
    for (at, layer) in l1 {
        let lsns = &layer.span.lsns;
        if rows.last().is_none_or(|row| lsns.end <= row.start) {
            rows.push(Row { start: lsns.start, ..Row::default() });
        }
        let Some(row) = rows.last_mut() else { continue };
        row.members.push(at);
        row.bytes = row.bytes.saturating_add(layer.bytes);
        // A branch may have no images of its own: its ancestor has them.
        let unless_imaged = if columns.is_empty() { layer.bytes } else { 0 };
        let live_bytes = live.get(&at).copied().unwrap_or(unless_imaged);
        row.live_bytes = row.live_bytes.saturating_add(live_bytes);
        row.start = row.start.min(lsns.start);
    }
    rows
}

/// Adds the rows to `inputs`, which are L0 layers, that shall be merged with them.
fn take_rows(
    layers: &[PlanLayer],
    columns: &[Column],
    config: &PlanConfig,
    inputs: &mut Vec<usize>,
) {
    let image_bytes = image_bytes(columns);
    let rows = rows(layers, columns);
    let mut total: u64 =
        inputs.iter().filter_map(|at| layers.get(*at)).map(|layer| layer.bytes).sum();
    let live = rows.iter().map(|row| row.live_bytes).fold(total, u64::saturating_add);
    let percent = live.saturating_mul(100).checked_div(image_bytes);
    if percent.is_some_and(|percent| percent >= config.image_percent) {
        return;
    }
    let weight = |row: &Row| weight_milli(row.live_bytes, image_bytes);
    let mut left: u64 = rows.iter().map(weight).sum();
    for row in rows {
        let is_live = row.live_bytes.saturating_mul(2) >= row.bytes;
        let too_many = left.saturating_add(1000) > COMPACT_ROWS_MAX * 1000;
        let is_small = row.bytes <= total.saturating_mul(COMPACT_ROW_FACTOR);
        total = total.saturating_add(row.bytes);
        if !is_live || !(too_many || is_small) || total > config.merge_bytes_max {
            return;
        }
        let before = inputs.len();
        left = left.saturating_sub(weight(&row));
        inputs.extend(row.members);
        if levels(layers, inputs) > COMPACT_LEVELS_MAX {
            inputs.truncate(before);
            return;
        }
    }
}

/// The share of pages of which a delta layer has records, in thousandths, from its bytes and
/// those of all the pages' images.
fn weight_milli(bytes: u64, image_bytes: u64) -> u64 {
    // A layer with half a record of each page counts as one.
    records_milli(bytes, image_bytes).saturating_mul(2).min(1000)
}

/// Records that a delta layer has of each page on average, in thousandths, estimated from its
/// bytes and those of all the pages' images.
fn records_milli(bytes: u64, image_bytes: u64) -> u64 {
    let full = u128::from(image_bytes / COMPACT_SPARSE_FACTOR).max(1);
    u64::try_from(u128::from(bytes) * 500 / full).unwrap_or(u64::MAX)
}

/// The keys of some layers as disjoint ranges, in order.
struct Cover(Vec<KeyRange>);

impl Cover {
    fn new(layers: &[PlanLayer], chosen: impl IntoIterator<Item = usize>) -> Cover {
        let keys = |at: usize| layers.get(at).map(|layer| layer.span.keys.clone());
        let mut ranges: Vec<KeyRange> = chosen.into_iter().filter_map(keys).collect();
        ranges.sort_by_key(|range| range.start);
        ranges.dedup_by(|next, range| {
            let joins = next.start <= range.end;
            if joins {
                range.end = range.end.max(next.end);
            }
            joins
        });
        Cover(ranges)
    }

    fn touches(&self, keys: &KeyRange) -> bool {
        let at = self.0.partition_point(|range| range.end <= keys.start);
        self.0.get(at).is_some_and(|range| range.start < keys.end)
    }
}

/// True if one layer per key may take the place of these: no other delta layer that covers one
/// of their keys lies within their LSN range.
fn is_mergeable(layers: &[PlanLayer], inputs: &[usize]) -> bool {
    let Some(lsns) = hull(layers, inputs) else { return true };
    let cover = Cover::new(layers, inputs.iter().copied());
    layers.iter().enumerate().all(|(at, other)| {
        let span = &other.span;
        let within = span.lsns.start < lsns.end && span.lsns.end > lsns.start;
        !within || span.is_image || !cover.touches(&span.keys) || inputs.contains(&at)
    })
}

/// Keys that no layer of the result of a merge may reach over: there others lie within its LSN
/// range, where the inputs have nothing. Ascending.
pub fn bars(layers: &[PlanLayer], inputs: &[usize], lsns: &LsnRange) -> Vec<Key> {
    let others = layers.iter().enumerate().filter(|(at, layer)| {
        let span = &layer.span;
        let within = span.lsns.start < lsns.end && span.lsns.end > lsns.start;
        within && !span.is_image && !inputs.contains(at)
    });
    let bars: BTreeSet<Key> = others.map(|(_, layer)| layer.span.keys.start).collect();
    bars.into_iter().collect()
}

/// Cuts the key space by the newest image layers, and stacks the L1 layers on the columns.
fn columns(layers: &[PlanLayer], config: &PlanConfig) -> Vec<Column> {
    let mut images: Vec<usize> = Vec::new();
    images.extend(layers.iter().enumerate().filter(|(_, l)| l.span.is_image).map(|(at, _)| at));
    let lsn_of = |at: &usize| layers.get(*at).map_or(Lsn(0), |layer| layer.span.lsns.start);
    images.sort_by_key(|at| std::cmp::Reverse(lsn_of(at)));
    // Key ranges without an image so far, by their start.
    let mut free: BTreeMap<Key, Key> = BTreeMap::from([(Key::MIN, Key::MAX)]);
    let mut columns = Vec::new();
    for image in images {
        let Some(layer) = layers.get(image) else { continue };
        let pieces = take(&mut free, &layer.span.keys);
        let share = layer.bytes / (pieces.len() as u64).max(1);
        let image_bytes = share.max(config.target_bytes / 16).max(1);
        let lsn = layer.span.lsns.start;
        let (stack, inherited) = (Vec::new(), Vec::new());
        let column = Column { keys: Key::MIN..Key::MIN, image, lsn, image_bytes, stack, inherited };
        let of_keys = |keys| Column { keys, ..column.clone() };
        columns.extend(pieces.into_iter().map(of_keys));
    }
    columns.sort_by_key(|column| column.keys.start);
    let mut l1: Vec<usize> = Vec::new();
    l1.extend(layers.iter().enumerate().filter(|(_, l)| l.is_l1()).map(|(at, _)| at));
    l1.sort_by_key(|at| std::cmp::Reverse(layers.get(*at).map(|layer| layer.span.lsns.end)));
    for at in l1 {
        let Some(layer) = layers.get(at) else { continue };
        stack(&mut columns, at, layer);
    }
    for (at, layer) in layers.iter().enumerate().filter(|(_, l)| l.is_inherited_delta()) {
        let LayerSpan { keys, lsns, .. } = &layer.span;
        touched(&mut columns, keys)
            .iter_mut()
            .filter(|column| lsns.end.0 > column.lsn.0.saturating_add(1))
            .for_each(|column| column.inherited.push(at));
    }
    columns
}

/// Takes what is still free of `keys`.
fn take(free: &mut BTreeMap<Key, Key>, keys: &KeyRange) -> Vec<KeyRange> {
    let from = free.range(..=keys.start).next_back().map_or(keys.start, |(start, _)| *start);
    let touched: Vec<KeyRange> = free
        .range(from..keys.end)
        .map(|(start, end)| *start..*end)
        .filter(|gap| overlap(gap, keys))
        .collect();
    for gap in &touched {
        free.remove(&gap.start);
        if gap.start < keys.start {
            free.insert(gap.start, keys.start);
        }
        if keys.end < gap.end {
            free.insert(keys.end, gap.end);
        }
    }
    touched.iter().map(|gap| gap.start.max(keys.start)..gap.end.min(keys.end)).collect()
}

/// The columns that have some of these keys.
fn touched<'a>(columns: &'a mut [Column], keys: &KeyRange) -> &'a mut [Column] {
    let first = columns.partition_point(|column| column.keys.end <= keys.start);
    let columns = columns.get_mut(first..).unwrap_or_default();
    let count = columns.partition_point(|column| column.keys.start < keys.end);
    columns.get_mut(..count).unwrap_or_default()
}

/// Shares the bytes of an L1 layer out among the columns that it covers.
fn stack(columns: &mut [Column], at: usize, layer: &PlanLayer) {
    let columns = touched(columns, &layer.span.keys);
    let total: u128 = columns.iter().map(|column| u128::from(column.image_bytes)).sum();
    for column in columns {
        let lsns = &layer.span.lsns;
        let above = lsns.end.0.saturating_sub(lsns.start.0.max(column.lsn.0.saturating_add(1)));
        if above > 0 {
            let whole = lsns.end.0.saturating_sub(lsns.start.0).max(1);
            let share = u128::from(layer.bytes) * u128::from(column.image_bytes) / total.max(1);
            let share = share * u128::from(above) / u128::from(whole);
            column.stack.push((at, u64::try_from(share).unwrap_or(u64::MAX)));
        }
    }
}

impl Column {
    fn stacked_bytes(&self) -> u64 {
        self.stack.iter().map(|(_, bytes)| bytes).sum()
    }

    /// Layers that a read has to look into, in thousandths: a layer counts by the share of the
    /// column's pages that it has records of.
    fn depth_milli(&self) -> u64 {
        self.stack.iter().map(|(_, bytes)| weight_milli(*bytes, self.image_bytes)).sum()
    }

    fn is_deep(&self) -> bool {
        self.depth_milli() > COMPACT_DEPTH_MAX * 1000
    }
}

fn make_images(
    layers: &[PlanLayer],
    column: &Column,
    config: &PlanConfig,
    percent_min: u64,
) -> Option<(u64, Action)> {
    let percent = column.stacked_bytes().saturating_mul(100) / column.image_bytes;
    if column.stack.is_empty() || percent < percent_min {
        return None;
    }
    let mut deltas: Vec<usize> = column.stack.iter().map(|(at, _)| *at).collect();
    let lsn = Lsn(hull(layers, &deltas)?.end.0.checked_sub(1)?);
    deltas.extend(&column.inherited);
    // Nothing else of these keys may lie at or below the images' LSN and above the image below.
    let hidden = layers.iter().enumerate().any(|(at, layer)| {
        let LayerSpan { keys, lsns, is_image } = &layer.span;
        let between = lsns.start <= lsn && lsns.end.0 > column.lsn.0.saturating_add(1);
        !is_image && between && overlap(keys, &column.keys) && !deltas.contains(&at)
    });
    if hidden || lsn < config.start_lsn {
        return None;
    }
    let keys = column.keys.clone();
    Some((percent, Action::MakeImages { keys, lsn, base: column.image, deltas }))
}

fn merge_l1(layers: &[PlanLayer], column: &Column, config: &PlanConfig) -> Option<Action> {
    // The newest layers, as long as the next is not much larger than those before it together.
    let mut inputs: Vec<usize> = Vec::new();
    let mut total = 0u64;
    for &(at, bytes) in &column.stack {
        if inputs.len() >= 2 && bytes > total.saturating_mul(2) {
            break;
        }
        inputs.push(at);
        total = total.saturating_add(bytes);
        if inputs.len() == COMPACT_LEVELS_MAX {
            break;
        }
    }
    while inputs.len() >= 2 {
        // Layers that come along because they share keys must not be what most of the work is for.
        let limit = bytes(layers, &inputs).saturating_mul(2).min(COMPACT_L1_INPUT_BYTES_MAX);
        let whole = closed(layers, &inputs, limit);
        let whole = whole.map(|whole| without_done(layers, whole));
        let fits = |whole: &Vec<usize>| (2..=COMPACT_LEVELS_MAX).contains(&levels(layers, whole));
        if let Some(whole) = whole.filter(fits).filter(|whole| is_mergeable(layers, whole)) {
            let lsns = hull(layers, &whole)?;
            let chain_max = (chain_total(config) / 2).max(COMPACT_CHAIN_MIN);
            return Some(Action::MergeL1 { inputs: whole, lsns, chain_max });
        }
        inputs.pop();
    }
    None
}

/// Leaves out those that have the LSN range of the result already: none of the others has keys of
/// theirs, and what is written of them could get the very name that they have.
fn without_done(layers: &[PlanLayer], mut inputs: Vec<usize>) -> Vec<usize> {
    while let Some(lsns) = hull(layers, &inputs) {
        let before = inputs.len();
        inputs.retain(|at| layers.get(*at).is_some_and(|layer| layer.span.lsns != lsns));
        if inputs.len() == before {
            break;
        }
    }
    inputs
}

fn bytes(layers: &[PlanLayer], chosen: &[usize]) -> u64 {
    let bytes = chosen.iter().filter_map(|at| layers.get(*at)).map(|layer| layer.bytes);
    bytes.fold(0, u64::saturating_add)
}

/// Number of different LSN ranges.
fn levels(layers: &[PlanLayer], inputs: &[usize]) -> usize {
    let mut ranges: Vec<(Lsn, Lsn)> = inputs
        .iter()
        .filter_map(|at| layers.get(*at))
        .map(|layer| (layer.span.lsns.start, layer.span.lsns.end))
        .collect();
    ranges.sort_unstable();
    ranges.dedup();
    ranges.len()
}

/// Some layers, and every L1 layer that shares keys with one of them within their LSN range, and
/// so on; none if these have more than `bytes_max` together.
fn closed(layers: &[PlanLayer], inputs: &[usize], bytes_max: u64) -> Option<Vec<usize>> {
    let mut whole = inputs.to_vec();
    while bytes(layers, &whole) <= bytes_max {
        let lsns = hull(layers, &whole)?;
        let cover = Cover::new(layers, whole.iter().copied());
        let known: BTreeSet<usize> = whole.iter().copied().collect();
        let comes_along = |(at, layer): (usize, &PlanLayer)| {
            let span = &layer.span;
            let within = span.lsns.start < lsns.end && span.lsns.end > lsns.start;
            let shares = layer.is_l1() && within && cover.touches(&span.keys);
            (shares && !known.contains(&at)).then_some(at)
        };
        let more: Vec<usize> = layers.iter().enumerate().filter_map(comes_along).collect();
        if more.is_empty() {
            return Some(whole);
        }
        whole.extend(more);
    }
    None
}

#[cfg(test)]
mod tests;
