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
        assert_eq!(held(&layer, key, &lsns), Some(twin_collect(&entries, key, &lsns)));
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
fn a_page_whose_blocks_were_read_is_held() {
    simulate(|io| async move {
        let entries = sample_entries();
        let delta = write_delta(&io, &entries, Lsn(90)..Lsn(200)).await.unwrap();
        let image = write_image(&io, &sample_image(), image_keys(), Lsn(115)).await.unwrap();
        let lsns = Lsn(0)..Lsn::MAX;
        for name in [&delta.name, &image.name] {
            for key in (0..IMAGE_KEYS_END).map(key) {
                let layer = open(&io, name).await.unwrap();
                let blocks = layer.blocks_of(&[key]);
                assert!(!layer.needs_blocks(key, &lsns) || !blocks.is_empty(), "{name} {key}");
                for block in blocks {
                    layer.warm_up(block).await.unwrap();
                }
                assert!(held(&layer, key, &lsns).is_some(), "{name} {key}");
                layer.close().await.unwrap();
            }
        }
    });
}
