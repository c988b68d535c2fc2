//! Layer files in which one byte is another.

use super::*;

/// Turns every byte in turn; reads must be right or refused, and `verify` must see it.
async fn mutate_every_byte(io: &SimIo, desc: &LayerDesc) {
    let path = path_of(desc);
    let good = contents(io, &path).await;
    let layer = open(io, &desc.name).await.unwrap();
    let right = answers(&layer).await;
    layer.close().await.unwrap();
    for at in 0..good.len() {
        // The long zero tails of header and footer are sampled.
        let tail = |start: usize| (start + 200..start + 4088).contains(&at) && at % 61 != 0;
        if tail(0) || tail(good.len() - 4096) {
            continue;
        }
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        replace(io, &path, &bad).await;
        assert!(verify(io, &path).await.is_err(), "byte {at} was changed unnoticed");
        if let Ok(layer) = open(io, &desc.name).await {
            for (answer, right) in answers(&layer).await.iter().zip(&right) {
                assert!(answer.is_err() || answer == right, "byte {at}: a wrong value was read");
            }
            layer.close().await.unwrap();
        }
    }
    for len in (0..good.len()).step_by(512) {
        replace(io, &path, &good[..len]).await;
        assert!(open(io, &desc.name).await.is_err(), "a file cut to {len} bytes was opened");
    }
    replace(io, &path, &good).await;
    verify(io, &path).await.unwrap();
}

#[test]
fn every_changed_byte_of_a_delta_file_is_found() {
    simulate(|io| async move {
        let mut entries = sample_entries();
        entries.retain(|(_, _, value)| value.encoded_len() < 10_000);
        let desc = write_delta(&io, &entries, Lsn(90)..Lsn(200)).await.unwrap();
        mutate_every_byte(&io, &desc).await;
    });
}

#[test]
fn every_changed_byte_of_an_image_file_is_found() {
    simulate(|io| async move {
        let mut values = sample_image();
        values.remove(&key(3));
        let desc = write_image(&io, &values, image_keys(), Lsn(115)).await.unwrap();
        mutate_every_byte(&io, &desc).await;
    });
}

/// What a layer says, whose file is removed then.
async fn answers_of_removed(
    io: &SimIo,
    desc: &LayerDesc,
) -> Vec<Result<(Values, Lookup), LayerError>> {
    let layer = open(io, &desc.name).await.unwrap();
    let answers = answers(&layer).await;
    layer.close().await.unwrap();
    io.remove(&path_of(desc)).await.unwrap();
    answers
}

/// A layer that is packed tightly says the same as another.
async fn is_tight_and_says(
    io: &SimIo,
    tight: &LayerDesc,
    right: &[Result<(Values, Lookup), LayerError>],
) {
    let layer = open(io, &tight.name).await.unwrap();
    let is_tight = match &layer {
        FileLayer::Delta(delta) => {
            delta.index().iter().any(|block| block.packed.codec == Codec::Zstd)
        }
        FileLayer::Image(image) => {
            image.index().blobs().iter().any(|blob| blob.packed.codec == Codec::Zstd)
        }
    };
    assert!(is_tight);
    assert_eq!(answers(&layer).await, right);
    layer.close().await.unwrap();
    mutate_every_byte(io, tight).await;
}

#[test]
fn a_tightly_packed_delta_layer_is_like_another_and_every_changed_byte_is_found() {
    simulate(|io| async move {
        let mut entries = sample_entries();
        entries.retain(|(_, _, value)| value.encoded_len() < 10_000);
        let lsns = Lsn(90)..Lsn(200);
        let desc = write_delta(&io, &entries, lsns.clone()).await.unwrap();
        let right = answers_of_removed(&io, &desc).await;
        let writer = DeltaWriter::create(&io, dir(), owner(), lsns, 0).await.unwrap();
        let mut writer = writer.pack_tightly();
        for (key, lsn, value) in &entries {
            writer.add(*key, *lsn, value).await.unwrap();
        }
        let tight = writer.finish(Key::MIN..Key::MAX).await.unwrap();
        assert_eq!(tight.name, desc.name);
        is_tight_and_says(&io, &tight, &right).await;
    });
}

#[test]
fn a_tightly_packed_image_layer_is_like_another_and_every_changed_byte_is_found() {
    simulate(|io| async move {
        let mut values = sample_image();
        values.remove(&key(3));
        let desc = write_image(&io, &values, image_keys(), Lsn(115)).await.unwrap();
        let right = answers_of_removed(&io, &desc).await;
        let writer = ImageWriter::create(&io, dir(), owner(), Lsn(115), 0).await.unwrap();
        let mut writer = writer.pack_tightly();
        for (key, value) in &values {
            writer.add(*key, value).await.unwrap();
        }
        let tight = writer.finish(image_keys()).await.unwrap();
        is_tight_and_says(&io, &tight, &right).await;
    });
}
