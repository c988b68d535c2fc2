//! What is said without waiting.

use super::*;

#[test]
fn a_block_that_is_not_in_the_cache_is_not_held() {
    simulate(|io| async move {
        let entries = sample_entries();
        let desc = write_delta(&io, &entries, Lsn(90)..Lsn(200)).await.unwrap();
        let layer = open(&io, &desc.name).await.unwrap();
        let (key, lsn, _) = entries[0].clone();
        let lsns = lsn..Lsn(lsn.0 + 1);
        assert_eq!(held(&layer, key, &lsns), None);
        layer.collect(key, &lsns, &mut Vec::new()).await.unwrap();
        let found = held(&layer, key, &lsns).map(|(values, answer)| (values, answer.lookup));
        assert_eq!(found, Some(twin_collect(&entries, key, &lsns)));
        layer.close().await.unwrap();
        let values = sample_image();
        let desc = write_image(&io, &values, image_keys(), Lsn(115)).await.unwrap();
        let layer = open(&io, &desc.name).await.unwrap();
        let lsns = Lsn(0)..Lsn(200);
        let is_zero = |value: &Value| *value == Value::ZeroPage;
        let (key, _) = values.iter().find(|(_, value)| !is_zero(value)).unwrap();
        assert_eq!(held(&layer, *key, &lsns), None);
        layer.collect(*key, &lsns, &mut Vec::new()).await.unwrap();
        assert!(held(&layer, *key, &lsns).is_some());
        layer.close().await.unwrap();
    });
}

#[test]
fn one_read_of_a_shared_block_serves_all_its_keys() {
    simulate(|io| async move {
        // Some keys share a block, some lie in two, every third is not there.
        let keys = (0..36).filter(|n| n % 3 != 0);
        let versions = keys.flat_map(|n| (0..3).map(move |version| (n, version)));
        let entries = versions.map(|(n, version)| {
            let number = u64::from(n) * 3 + version;
            (key(n), Lsn(100 + version), record(number, version == 0, 1000))
        });
        let desc = write_delta(&io, &entries.collect(), Lsn(90)..Lsn(200)).await.unwrap();
        let lsns = Lsn(0)..Lsn::MAX;
        let (mut shared, mut apart, mut missing) = (0, 0, 0);
        for n in 0..35 {
            let layer = open(&io, &desc.name).await.unwrap();
            layer.collect(key(n), &lsns, &mut Vec::new()).await.unwrap();
            let block = layer.block_of(key(n));
            let others: Vec<u32> =
                (0..36).filter(|m| block.is_some() && layer.block_of(key(*m)) == block).collect();
            for other in &others {
                assert!(held(&layer, key(*other), &lsns).is_some(), "{n} {other}");
            }
            shared += u32::from(others.len() > 1);
            missing += u32::from(block.is_none() && n % 3 == 0);
            apart += u32::from(block.is_none() && n % 3 != 0);
            layer.close().await.unwrap();
        }
        assert!(shared > 10 && apart > 0 && missing > 0, "{shared} {apart} {missing}");
    });
}
