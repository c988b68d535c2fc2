//! Cursors and merges against a sort of everything.

use proptest::prelude::*;

use super::*;
use crate::base::{TenantId, TenantShardId, TimelineId};
use crate::layers::{DeltaWriter, ImageWriter};
use crate::sim::{SimIo, SimOptions, SimWorld};

const OWNER: LayerOwner = LayerOwner {
    shard: TenantShardId { tenant: TenantId([1; 16]), number: 0, count: 0 },
    timeline: TimelineId([2; 16]),
};

fn key(n: u32) -> Key {
    Key { field6: n % 50, field4: n / 50, field3: 5, field2: 1663, ..Key::MIN }
}

fn value(seed: u64) -> Value {
    let len = match seed % 13 {
        0 => 9_000,
        1 => 40_000,
        other => other as usize * 30,
    };
    let bytes =
        (0..len).map(|at| (seed.wrapping_mul(31).wrapping_add(at as u64 * seed) >> 3) as u8);
    Value::WalRecord { will_init: seed.is_multiple_of(5), record: bytes.collect() }
}

async fn write_delta(io: &SimIo, dir: &Path, values: &[MergeEntry]) -> Option<LayerName> {
    let (first, last) = (values.first()?, values.last()?);
    let lsns = || values.iter().map(|(_, lsn, _)| *lsn);
    let range = lsns().min()?..Lsn(lsns().max()?.0 + 1);
    let mut writer = DeltaWriter::create(io, dir, OWNER, range, 0).await.unwrap();
    for (key, lsn, value) in values {
        writer.add(*key, *lsn, value).await.unwrap();
    }
    Some(writer.finish(first.0..last.0.next()).await.unwrap().name)
}

/// Layers with neighbouring LSN ranges over different parts of the keys.
fn layers_from(seeds: &[(u32, u64)], layer_count: u64) -> Vec<Vec<MergeEntry>> {
    let mut layers = vec![Vec::new(); layer_count as usize];
    for (place, &(k, seed)) in seeds.iter().enumerate() {
        let lsn = 1 + place as u64 * layer_count / seeds.len() as u64 * 1_000 + seed % 1_000;
        layers[((lsn - 1) / 1_000) as usize].push((key(k), Lsn(lsn), value(seed)));
    }
    for layer in &mut layers {
        layer.sort_by_key(|(key, lsn, _)| (*key, *lsn));
    }
    layers
}

async fn all(merge: &mut DeltaMerge<SimIo>) -> Vec<MergeEntry> {
    let mut found = Vec::new();
    while let Some(entry) = merge.next().await.unwrap() {
        found.push(entry);
    }
    found
}

fn inputs(names: &[LayerName]) -> Vec<InputLayer> {
    let input = |name: &LayerName| InputLayer {
        dir: Path::new("d").into(),
        owner: OWNER,
        name: name.clone(),
        below: Lsn::MAX,
    };
    names.iter().map(input).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_merge_gives_every_value_in_order(
        seeds in prop::collection::vec((0u32..120, 0u64..5_000), 1..250),
        layer_count in 1u64..6,
        range in (0u32..120, 0u32..130),
    ) {
        let layers = layers_from(&seeds, layer_count);
        let mut expected: Vec<MergeEntry> = layers.concat();
        expected.sort_by_key(|(key, lsn, _)| (*key, *lsn));
        let part = key(range.0)..key(range.1.max(range.0));
        let in_part = |(key, _, _): &&MergeEntry| part.contains(key);
        let expected_part: Vec<MergeEntry> = expected.iter().filter(in_part).cloned().collect();
        let mut world = SimWorld::new(seeds.len() as u64, SimOptions::default());
        let found = world.run(move |io| async move {
            let dir = Path::new("d");
            io.create_dir(dir).await.unwrap();
            let mut names = Vec::new();
            for layer in &layers {
                names.extend(write_delta(&io, dir, layer).await);
            }
            let whole = Key::MIN..Key::MAX;
            let mut merge = DeltaMerge::new(&io, inputs(&names), whole);
            let everything = all(&mut merge).await;
            merge.close().await;
            let mut merge = DeltaMerge::new(&io, inputs(&names), part);
            let part = all(&mut merge).await;
            merge.close().await;
            (everything, part)
        }).unwrap();
        prop_assert!(found.0 == expected, "the whole differs");
        prop_assert!(found.1 == expected_part, "the part differs");
    }

    #[test]
    fn an_image_cursor_gives_every_value_of_its_range(
        seeds in prop::collection::btree_map(0u32..150, 0u64..40, 0..120),
        range in (0u32..150, 0u32..160),
    ) {
        let content = |seed: u64| match seed {
            0..10 => Value::ZeroPage,
            10..15 => Value::Image(Bytes::new()),
            15..25 => Value::Image(vec![seed as u8; 100].into()),
            _ => Value::Image((0..8192u64).map(|n| ((n * n * seed) >> 5) as u8).collect()),
        };
        let mut values: Vec<(Key, Value)> =
            seeds.iter().map(|(k, seed)| (key(*k), content(*seed))).collect();
        values.sort_by_key(|(key, _)| *key);
        let part = key(range.0)..key(range.1.max(range.0));
        let expected: Vec<_> =
            values.iter().filter(|(key, _)| part.contains(key)).cloned().collect();
        let mut world = SimWorld::new(1, SimOptions::default());
        let found = world.run(move |io| async move {
            let dir = Path::new("d");
            io.create_dir(dir).await.unwrap();
            let mut writer = ImageWriter::create(&io, dir, OWNER, Lsn(7), 0).await.unwrap();
            for (key, value) in &values {
                writer.add(*key, value).await.unwrap();
            }
            let name = writer.finish(Key::MIN..Key::MAX).await.unwrap().name;
            let mut cursor = ImageCursor::open(&io, &inputs(&[name])[0], part).await.unwrap();
            let mut found = Vec::new();
            while let Some(key) = cursor.head().await.unwrap() {
                let (taken, value) = cursor.take().unwrap();
                assert_eq!(taken, key);
                found.push((key, value));
            }
            cursor.close().await.unwrap();
            found
        }).unwrap();
        prop_assert!(found == expected);
    }
}

#[test]
fn values_at_one_lsn_keep_their_order() {
    let mut world = SimWorld::new(3, SimOptions::default());
    world
        .run(|io| async move {
            let dir = Path::new("d");
            io.create_dir(dir).await.unwrap();
            let twice = [(key(1), Lsn(20), value(8)), (key(1), Lsn(20), value(3))];
            let older = [(key(1), Lsn(10), value(4)), (key(2), Lsn(12), value(6))];
            let mut names = Vec::new();
            for layer in [&twice, &older] {
                names.extend(write_delta(&io, dir, layer).await);
            }
            let mut merge = DeltaMerge::new(&io, inputs(&names), Key::MIN..Key::MAX);
            let found = all(&mut merge).await;
            merge.close().await;
            let [first, second] = twice;
            let [before, other] = older;
            assert_eq!(found, [before, first, second, other]);
        })
        .unwrap();
}
