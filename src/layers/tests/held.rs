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
