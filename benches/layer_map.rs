//! Search and change of a layer map of 100,000 layers, against a search from end to end.
//!
//! Besides times it counts what a search looks at: counts depend on the layers alone, not on the
//! machine. See `docs/benchmarks.md`.

#![allow(clippy::disallowed_methods, reason = "what the benchmarks share touches files")]

mod common;

use std::collections::BTreeSet;
use std::hint::black_box;
use std::rc::Rc;

use common::{Result, Rounds, sized};
use nix::sys::resource::UsageWho;
use pgstrata::base::{Key, Lsn, RelNode};
use pgstrata::shard::layer_map::{LayerMap, LayerSpan, Steps};

/// Key ranges of one LSN step, and steps; every tenth step is of images.
const RANGES: u64 = 1_000;
const STEPS: u64 = 100;
const IMAGE_EVERY: u64 = 10;
/// Blocks of a key range: 128 MiB.
const RANGE_BLOCKS: u64 = 16_384;
/// Blocks of a relation: ten ranges.
const REL_BLOCKS: u64 = 10 * RANGE_BLOCKS;
const ALL_BLOCKS: u64 = RANGES * RANGE_BLOCKS;
/// LSNs of one step.
const STEP_LSNS: u64 = 1 << 30;
/// Delta layers of all keys, above everything.
const L0_LAYERS: u64 = 10;
/// Delta layers of a tenth of the keys each, below everything, in ten steps.
const WIDE_LAYERS: u64 = 100;

/// The multiplier and increment of a linear congruential generator (Knuth, MMIX).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// The `n`-th block of a database.
fn key(n: u64) -> Key {
    let rel = RelNode { spc: 1663, db: 5, rel: 16_384 + (n / REL_BLOCKS) as u32 };
    Key::rel_block(rel.fork(0), (n % REL_BLOCKS) as u32)
}

fn span(blocks: std::ops::Range<u64>, lsns: std::ops::Range<u64>, is_image: bool) -> LayerSpan {
    LayerSpan {
        keys: key(blocks.start)..key(blocks.end),
        lsns: Lsn(lsns.start)..Lsn(lsns.end),
        is_image,
    }
}

/// First LSN of a step.
fn lsn(step: u64) -> u64 {
    (step + 1) * STEP_LSNS
}

/// The wide layers, the steps, the L0 layers; the oldest first. With `shift` the ranges of each
/// step begin at other keys.
fn layers(shift: bool) -> Vec<LayerSpan> {
    let mut random = Random(1);
    let mut spans = Vec::new();
    let tenth = ALL_BLOCKS / 10;
    for n in 0..WIDE_LAYERS {
        let (step, part) = (n / 10, n % 10);
        let at = lsn(0) + step * STEP_LSNS;
        spans.push(span(part * tenth..(part + 1) * tenth, at..at + STEP_LSNS, false));
    }
    let first = WIDE_LAYERS / 10;
    for step in first..first + STEPS {
        let mut cuts = vec![0];
        for n in 1..RANGES {
            let by = if shift { random.below(RANGE_BLOCKS) } else { 0 };
            cuts.push(n * RANGE_BLOCKS + by);
        }
        cuts.push(ALL_BLOCKS);
        let is_image = step % IMAGE_EVERY == IMAGE_EVERY - 1;
        let lsns = lsn(step)..lsn(step) + if is_image { 1 } else { STEP_LSNS };
        spans.extend(cuts.windows(2).map(|cut| span(cut[0]..cut[1], lsns.clone(), is_image)));
    }
    for n in 0..L0_LAYERS {
        let at = lsn(first + STEPS + n);
        let (keys, lsns) = (Key::MIN..Key::MAX, Lsn(at)..Lsn(at + STEP_LSNS));
        spans.push(LayerSpan { keys, lsns, is_image: false });
    }
    spans
}

type Layer = Rc<u64>;

/// Two lists, newest first, searched from end to end.
struct BruteForce {
    deltas: Vec<(LayerSpan, Layer)>,
    images: Vec<(LayerSpan, Layer)>,
}

impl BruteForce {
    fn new(mut layers: Vec<(LayerSpan, Layer)>) -> BruteForce {
        layers.sort_by(|(a, _), (b, _)| a.cmp(b));
        let (images, deltas) = layers.into_iter().partition(|(span, _)| span.is_image);
        BruteForce { deltas, images }
    }

    fn search(&self, key: Key, below: Lsn) -> Vec<Layer> {
        let usable = |span: &LayerSpan| span.lsns.start < below && span.keys.contains(&key);
        let image = self.images.iter().find(|(span, _)| usable(span));
        let floor = image.map_or(Lsn(0), |(span, _)| span.lsns.end);
        let deltas = self.deltas.iter().filter(|(span, _)| span.lsns.end > floor && usable(span));
        deltas.chain(image).map(|(_, layer)| layer.clone()).collect()
    }
}

/// Nanoseconds of CPU time for each of `count` calls: this is one thread, and the machine may be
/// shared.
fn per_call(count: usize, mut call: impl FnMut()) -> Result<f64> {
    let before = common::cpu_time(UsageWho::RUSAGE_SELF)?;
    (0..count).for_each(|_| call());
    let taken = common::cpu_time(UsageWho::RUSAGE_SELF)?.saturating_sub(before);
    Ok(taken.as_nanos() as f64 / count as f64)
}

/// What searches look at, and that both find the same.
fn count_steps(map: &LayerMap<Layer>, brute: &BruteForce, newest: bool) -> Result<()> {
    let mut random = Random(2);
    let (mut sum, mut most, mut found, mut most_found) = (Steps::default(), Steps::default(), 0, 0);
    let count = 20_000;
    for n in 0..count {
        let (key, below) = (key(random.below(ALL_BLOCKS)), place(&mut random, newest));
        let mut steps = Steps::default();
        let layers = map.search_counted(key, below, &mut steps);
        if n % 100 == 0 && layers != brute.search(key, below) {
            return Err(format!("{key:?} below {below}: the searches differ").into());
        }
        found += layers.len();
        most_found = most_found.max(layers.len());
        let add = |sum: &mut u64, most: &mut u64, one: u64| {
            *sum += one;
            *most = (*most).max(one);
        };
        add(&mut sum.nodes, &mut most.nodes, steps.nodes);
        add(&mut sum.lists, &mut most.lists, steps.lists);
        add(&mut sum.layers, &mut most.layers, steps.layers);
    }
    let mean = |sum: u64| sum as f64 / f64::from(count);
    println!(
        "  steps of a search at {}: mean and most of {:.1}, {} nodes; {:.1}, {} lists; {:.1}, {} \
         layers looked at; {:.1}, {most_found} found",
        if newest { "the newest LSN" } else { "any LSN" },
        mean(sum.nodes),
        most.nodes,
        mean(sum.lists),
        most.lists,
        mean(sum.layers),
        most.layers,
        mean(found as u64),
    );
    Ok(())
}

/// Where a search begins.
fn place(random: &mut Random, newest: bool) -> Lsn {
    if newest { Lsn::MAX } else { Lsn(random.below(STEPS * 1_000) * (STEP_LSNS / 1_000)) }
}

fn searches(map: &LayerMap<Layer>, brute: &BruteForce, newest: bool) -> Result<()> {
    let [mut ours, mut theirs, mut ratio] = std::array::from_fn(|_| Rounds::default());
    for round in 0..sized(3, 9) {
        let mut random = Random(round);
        let one = per_call(sized(100, 500), || {
            let (key, below) = (key(random.below(ALL_BLOCKS)), place(&mut random, newest));
            black_box(brute.search(key, below));
        })?;
        let mut random = Random(round);
        let other = per_call(sized(20_000, 200_000), || {
            let (key, below) = (key(random.below(ALL_BLOCKS)), place(&mut random, newest));
            black_box(map.search(key, below));
        })?;
        theirs.add(one);
        ours.add(other);
        ratio.add(one / other);
    }
    println!(
        "  search at {}: {} ns; end to end {} ns; ratio {}",
        if newest { "the newest LSN" } else { "any LSN" },
        ours.text(0),
        theirs.text(0),
        ratio.text(0)
    );
    Ok(())
}

/// Takes layers out from anywhere and puts them back.
fn changes(map: &mut LayerMap<Layer>, spans: &[LayerSpan]) -> Result<()> {
    let [mut removes, mut inserts] = std::array::from_fn(|_| Rounds::default());
    let count = sized(2_000, 20_000);
    for round in 0..sized(3, 9) {
        let mut random = Random(100 + round);
        let places = std::iter::from_fn(|| Some(random.below(spans.len() as u64) as usize));
        let chosen: BTreeSet<usize> = places.take(count).collect();
        let mut removed = Vec::with_capacity(chosen.len());
        let mut places = chosen.iter();
        removes.add(per_call(chosen.len(), || {
            removed.extend(places.next().and_then(|at| map.remove(&spans[*at])));
        })?);
        let mut back = chosen.iter().map(|at| spans[*at].clone()).zip(removed);
        inserts.add(per_call(chosen.len(), || {
            if let Some((span, layer)) = back.next() {
                map.insert(span, layer);
            }
        })?);
    }
    if map.len() != spans.len() {
        return Err("layers were lost".into());
    }
    println!("  remove: {} ns; insert: {} ns", removes.text(0), inserts.text(0));
    Ok(())
}

fn shape(name: &str, shift: bool) -> Result<()> {
    let spans = layers(shift);
    let layers: Vec<_> = spans.iter().cloned().zip((0..).map(Rc::new)).collect();
    let brute = BruteForce::new(layers.clone());
    let mut map = LayerMap::default();
    let mut layers = layers.into_iter();
    let filled = per_call(spans.len(), || {
        if let Some((span, layer)) = layers.next() {
            map.insert(span, layer);
        }
    })?;
    let size = map.check_invariants()?;
    println!(
        "{name}: {} layers, filled in LSN order in {filled:.0} ns each; depth {}, {:.2} list \
         entries per layer",
        map.len(),
        size.depth,
        size.list_entries as f64 / map.len() as f64
    );
    for newest in [true, false] {
        count_steps(&map, &brute, newest)?;
        searches(&map, &brute, newest)?;
    }
    changes(&mut map, &spans)
}

fn benchmark() -> Result<()> {
    println!("layer_map: CPU time, median (min..max) of the rounds; ratios within a round");
    shape("the same key ranges at each LSN step", false)?;
    shape("other key ranges at each LSN step", true)
}

fn main() -> std::process::ExitCode {
    common::main(benchmark)
}
