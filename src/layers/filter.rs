//! The filter of a delta layer: tells of most absent keys that they are absent, without a read.
//!
//! A blocked Bloom filter: the key's hash picks one block of 64 bytes (a cache line) and seven of
//! its 512 bits. With 10 bits per distinct key about one absent key in a hundred passes. A key
//! that was put in always passes.
//!
//! Form of the filter region: the blocks, one after the other; bit `n` of a block is bit `n % 8`
//! of its byte `n / 8`. The hash is part of the format: with the key's 18 bytes read as two
//! little-endian u64 `a`, `b` and one u16 `c`, and `mix` the finalizer of SplitMix64,
//! `h = mix(mix(mix(a) ^ b) ^ c)`. The block is `(h >> 32) * blocks >> 32`; the bits are the seven
//! lowest groups of 9 bits of `mix(h)`.

use crate::base::Key;
use crate::layers::format::Fields;

const BITS_PER_KEY: usize = 10;
const BLOCK_BYTES: usize = 64;
const PROBES: u32 = 7;

/// The finalizer of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
/// Generators, 2014).
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ (value >> 31)
}

/// The hash of a key.
pub(super) fn hash(key: Key) -> u64 {
    let bytes = key.to_bytes();
    let mut fields = Fields(&bytes);
    let (a, b) = (fields.u64().unwrap_or(0), fields.u64().unwrap_or(0));
    let c = fields.array().map_or(0, u16::from_le_bytes);
    mix(mix(mix(a) ^ b) ^ u64::from(c))
}

/// Byte and bit of each probe within the block.
fn probes(hash: u64) -> impl Iterator<Item = (usize, u8)> {
    let bits = mix(hash);
    (0..PROBES).map(move |n| {
        let bit = (bits >> (9 * n)) & 511;
        ((bit / 8) as usize, 1 << (bit % 8))
    })
}

/// Start of the block for a hash.
fn block_start(hash: u64, filter_bytes: usize) -> usize {
    let blocks = (filter_bytes / BLOCK_BYTES) as u64;
    (((hash >> 32) * blocks) >> 32) as usize * BLOCK_BYTES
}

/// Makes a filter region of the hashes of all distinct keys.
pub(super) fn build(hashes: &[u64]) -> Vec<u8> {
    let blocks = (hashes.len() * BITS_PER_KEY).div_ceil(8 * BLOCK_BYTES).max(1);
    let mut filter = vec![0; blocks * BLOCK_BYTES];
    for hash in hashes {
        let start = block_start(*hash, filter.len());
        for (byte, bit) in probes(*hash) {
            filter[start + byte] |= bit;
        }
    }
    filter
}

/// False only if the key was not put in. A filter of no bytes says nothing about any key.
pub(super) fn may_contain(filter: &[u8], key: Key) -> bool {
    let hash = hash(key);
    let start = block_start(hash, filter.len());
    match filter.get(start..start + BLOCK_BYTES) {
        Some(block) => {
            probes(hash).all(|(byte, bit)| block.get(byte).is_some_and(|bits| bits & bit != 0))
        }
        None => true,
    }
}

/// True for a length that a filter region may have.
pub(super) fn is_valid_len(len: usize) -> bool {
    len > 0 && len.is_multiple_of(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Key {
        Key { field1: 0, field2: 1663, field3: 5, field4: 16384 + n % 7, field5: 0, field6: n }
    }

    #[test]
    fn present_keys_pass_and_few_absent_ones_do() {
        for count in [1u32, 7, 100, 20_000] {
            let hashes: Vec<u64> = (0..count).map(|n| hash(key(n))).collect();
            let filter = build(&hashes);
            assert!(is_valid_len(filter.len()));
            assert!((0..count).all(|n| may_contain(&filter, key(n))));
            let absent = count..count + 20_000;
            let wrong = absent.filter(|n| may_contain(&filter, key(*n))).count();
            assert!(wrong < 500, "{wrong} of 20000 absent keys passed with {count} keys");
        }
    }

    #[test]
    fn the_hash_is_that_of_format_version_1() {
        assert_eq!(hash(Key::MIN), 0);
        assert_eq!(hash(key(1)), 0x21A1C5E71179E51D);
        assert_eq!(hash(Key::MAX), 0xBD32FED2271A3F00);
    }
}
