//! Entries for fuzzing the forms of layer files. Each takes any bytes and must not panic; what is
//! accepted must read back as it was, so that nothing of a file is ignored.

use bytes::{Bytes, BytesMut};

use crate::base::checksum::crc32c;
use crate::base::{Key, Lsn};
use crate::layers::format::{
    BlockEntries, Codec, Description, Fields, Footer, HEADER_BYTES, Packed,
};
use crate::layers::index::{Expected, ImageIndex, decode_delta, encode_delta};
use crate::layers::packer::unpack;
use crate::limits::LAYER_BLOCK_BYTES_MAX;

/// A header, and a footer of a file of any length.
pub fn frame(input: &[u8]) {
    if let Ok(description) = Description::decode_header(input) {
        assert_eq!(description.encode_header(), input);
    }
    let length = input.get(104..).and_then(|rest| rest.first_chunk());
    let file_bytes = length.map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if let Ok(footer) = Footer::decode(input, file_bytes) {
        assert_eq!(footer.encode(), input);
    }
}

/// An index: u8 kind (even: delta, odd: image), u64 end of the data, u64 number of values, then
/// the unpacked index.
pub fn index(input: &[u8]) {
    let mut fields = Fields(input);
    let (Some(kind), Some(data_end), Some(value_count)) = (fields.u8(), fields.u64(), fields.u64())
    else {
        return;
    };
    let (keys, lsns) = (Key::MIN..Key::MAX, Lsn(0)..Lsn::MAX);
    let expected = Expected { keys: &keys, lsns, data_end, value_count };
    if kind.is_multiple_of(2) {
        if let Ok(index) = decode_delta(fields.0, &expected) {
            assert_eq!(encode_delta(&index), fields.0);
        }
    } else if let Ok(index) = ImageIndex::decode(fields.0, &expected) {
        assert_eq!(index.encode(), fields.0);
        for (key, number, blob) in index.range(&keys) {
            assert_eq!(index.find(key), Some((number, blob)));
        }
    }
}

/// An unpacked block of a delta layer.
pub fn delta_block(input: &[u8]) {
    let block = Bytes::copy_from_slice(input);
    let mut entries = BlockEntries::new(&block);
    while let Some(entry) = entries.next() {
        let Ok(entry) = entry else { return };
        let Ok(value) = entries.value(&entry) else { continue };
        let mut written = BytesMut::new();
        value.encode(&mut written);
        assert_eq!(written.len(), value.encoded_len());
        let read = crate::base::Value::decode(&written.freeze());
        assert_eq!(read.as_ref(), Ok(&value));
    }
}

/// A page of an image layer as it is stored, or a block of a delta layer: u8 codec, u32 length
/// unpacked, then the bytes as stored.
pub fn image_block(input: &[u8]) {
    let mut fields = Fields(input);
    let (Some(codec), Some(raw_bytes)) = (fields.u8(), fields.u32()) else { return };
    let (Some(codec), Ok(stored_bytes)) =
        (Codec::from_number(codec), u32::try_from(fields.0.len()))
    else {
        return;
    };
    // Indexes refuse larger ones.
    if raw_bytes as usize > LAYER_BLOCK_BYTES_MAX {
        return;
    }
    let packed = Packed { stored_bytes, raw_bytes, crc: crc32c(fields.0), codec };
    if let Ok(raw) = unpack(&packed, fields.0) {
        assert_eq!(raw.len(), raw_bytes as usize);
    }
}

/// Inputs for the other functions out of a layer file that is sound: target and bytes.
pub fn seeds(file: &[u8]) -> Vec<(&'static str, Vec<u8>)> {
    let mut seeds = Vec::new();
    let (Some(header), Some(frame)) = (file.get(..HEADER_BYTES), file.last_chunk::<HEADER_BYTES>())
    else {
        return seeds;
    };
    let Ok(footer) = Footer::decode(frame, file.len() as u64) else { return seeds };
    seeds.push(("layer_frame", header.to_vec()));
    seeds.push(("layer_frame", frame.to_vec()));
    let place = |offset: u64, packed: &Packed| {
        let start = usize::try_from(offset).ok()?;
        file.get(start..start.checked_add(packed.stored_bytes as usize)?)
    };
    let Some(stored) = place(footer.data_end, &footer.index) else { return seeds };
    let Ok(index) = unpack(&footer.index, stored) else { return seeds };
    let name = &footer.description.name;
    let mut seed = vec![u8::from(name.is_image())];
    seed.extend_from_slice(&footer.data_end.to_le_bytes());
    seed.extend_from_slice(&footer.value_count.to_le_bytes());
    seed.extend_from_slice(&index);
    seeds.push(("layer_index", seed));
    let (keys, lsns) = (name.keys(), name.lsns());
    let (data_end, value_count) = (footer.data_end, footer.value_count);
    let expected = Expected { keys, lsns, data_end, value_count };
    let pieces: Vec<(u64, Packed)> = match name.is_image() {
        true => ImageIndex::decode(&index, &expected)
            .map(|index| index.blobs().iter().map(|blob| (blob.offset, blob.packed)).collect()),
        false => decode_delta(&index, &expected)
            .map(|blocks| blocks.iter().map(|block| (block.offset, block.packed)).collect()),
    }
    .unwrap_or_default();
    for (offset, packed) in pieces {
        let Some(stored) = place(offset, &packed) else { continue };
        let mut seed = vec![packed.codec as u8];
        seed.extend_from_slice(&packed.raw_bytes.to_le_bytes());
        seed.extend_from_slice(stored);
        seeds.push(("image_block", seed));
        if !name.is_image()
            && let Ok(block) = unpack(&packed, stored)
        {
            seeds.push(("delta_block", block.to_vec()));
        }
    }
    seeds
}
