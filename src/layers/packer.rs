//! Packing of the pieces of layer files, and unpacking with every check.

use std::cell::RefCell;

use bytes::Bytes;

#[cfg(test)]
use super::format::planted;
use super::format::{Codec, Packed};
use crate::base::checksum::crc32c;

/// Level of zstd: the lowest ordinary one. Higher ones save 5 % more at most of blocks as small as
/// these.
const ZSTD_LEVEL: i32 = 1;

/// Packs pieces, with one buffer for all of them.
#[derive(Default)]
pub(super) struct Packer {
    buffer: Vec<u8>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Packer {
    /// A packer that uses zstd instead of lz4: smaller, slower.
    pub(super) fn tight() -> Packer {
        // Without memory for its tables, lz4 does.
        Packer { buffer: Vec::new(), zstd: zstd::bulk::Compressor::new(ZSTD_LEVEL).ok() }
    }

    /// Packs `raw` into the buffer; `None` if it does not fit.
    fn compress(&mut self, raw: &[u8]) -> Option<(Codec, usize)> {
        let bound = lz4_flex::block::get_maximum_output_size(raw.len());
        let bound = bound.max(zstd::zstd_safe::compress_bound(raw.len()));
        if self.buffer.len() < bound {
            self.buffer.resize(bound, 0);
        }
        if let Some(zstd) = &mut self.zstd
            && let Ok(len) = zstd.compress_to_buffer(raw, &mut self.buffer[..])
        {
            return Some((Codec::Zstd, len));
        }
        let len = lz4_flex::block::compress_into(raw, &mut self.buffer).ok()?;
        Some((Codec::Lz4, len))
    }

    /// Packs a page as [`Packer::pack`] does, but does not try it where it would be in vain.
    pub(super) fn pack_page<'a>(
        &'a mut self,
        page: &'a [u8],
        saving_percent: usize,
    ) -> (Packed, &'a [u8]) {
        match looks_random(page) {
            true => (packed(Codec::Raw, page, page.len()), page),
            false => self.pack(page, saving_percent),
        }
    }

    /// Packs `raw` if that saves at least `saving_percent` of it. Returns the bytes to
    /// store. `raw` is at most [`crate::limits::LAYER_BLOCK_BYTES_MAX`] long.
    pub(super) fn pack<'a>(
        &'a mut self,
        raw: &'a [u8],
        saving_percent: usize,
    ) -> (Packed, &'a [u8]) {
        let limit = raw.len() - raw.len() * saving_percent / 100;
        let smaller = self
            .compress(raw)
            .filter(|(_, len)| *len <= limit && *len < raw.len())
            .and_then(|(codec, len)| Some((codec, self.buffer.get(..len)?)));
        let (codec, stored) = smaller.unwrap_or((Codec::Raw, raw));
        (packed(codec, stored, raw.len()), stored)
    }
}

fn packed(codec: Codec, stored: &[u8], raw_bytes: usize) -> Packed {
    let length = |bytes: usize| u32::try_from(bytes).expect("blocks are below 4 GiB");
    let (stored_bytes, crc) = (length(stored.len()), crc32c(stored));
    Packed { stored_bytes, raw_bytes: length(raw_bytes), crc, codec }
}

/// One of so many bytes is looked at: a prime, so that no array of numbers has always the same
/// byte of them looked at.
const SAMPLE_STEP: usize = 17;

/// True if the bytes are spread so evenly over all values that no codec makes them smaller, as in
/// pages of what is compressed already. lz4 takes 2 us of a core to find that out.
///
/// Collisions are counted as in an estimate of Renyi's entropy of order 2: of `n` bytes that are
/// random, each value is there `c` times with a sum of all `c * c` of `n + n * n / 256`. Half again
/// as much counts as random, which is an entropy of 7.2 bits or more for the 482 of a page.
fn looks_random(bytes: &[u8]) -> bool {
    let mut counts = [0u32; 256];
    let sample = bytes.iter().step_by(SAMPLE_STEP);
    let n = sample.len() as u32;
    sample.for_each(|byte| counts[usize::from(*byte)] += 1);
    let squares: u32 = counts.iter().map(|count| count * count).sum();
    n >= 256 && 2 * squares < 3 * (n + n * n / 256)
}

thread_local! {
    /// Working memory of zstd, 160 KiB: to make it anew takes longer than to unpack a page. It
    /// keeps nothing from one block to the next.
    static UNPACKER: RefCell<Option<zstd::bulk::Decompressor<'static>>> =
        const { RefCell::new(None) };
}

/// Checks and unpacks what [`Packer::pack`] made. Errors say what is wrong.
pub(super) fn unpack(packed: &Packed, stored: &[u8]) -> Result<Bytes, &'static str> {
    let crc = crc32c(stored);
    #[cfg(test)]
    let crc = if planted::BLOCKS_UNCHECKED.get() { packed.crc } else { crc };
    if stored.len() != packed.stored_bytes as usize || crc != packed.crc {
        return Err("wrong checksum of a block");
    }
    let raw_bytes = packed.raw_bytes as usize;
    match packed.codec {
        Codec::Raw if stored.len() == raw_bytes => Ok(Bytes::copy_from_slice(stored)),
        Codec::Raw => Err("a raw block has two different lengths"),
        Codec::Zstd => {
            let mut raw = vec![0; raw_bytes];
            let len = UNPACKER.with_borrow_mut(|unpacker| {
                let unpacker = match unpacker {
                    Some(unpacker) => unpacker,
                    None => unpacker.insert(zstd::bulk::Decompressor::new().ok()?),
                };
                unpacker.decompress_to_buffer(stored, &mut raw[..]).ok()
            });
            match len == Some(raw_bytes) {
                true => Ok(Bytes::from(raw)),
                false => Err("a block cannot be decompressed"),
            }
        }
        Codec::Lz4 => {
            let mut raw = vec![0; raw_bytes];
            match lz4_flex::block::decompress_into(stored, &mut raw) {
                Ok(len) if len == raw_bytes => Ok(Bytes::from(raw)),
                _ => Err("a block cannot be decompressed"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: impl FnMut(usize) -> u8) -> Vec<u8> {
        (0..8192).map(byte).collect()
    }

    /// A page is kept as it is without trying only if trying would not have made it smaller.
    #[test]
    fn only_what_does_not_shrink_is_taken_for_random() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..100 {
            let random = page(|_| rng.u8(..));
            assert!(looks_random(&random));
            assert_eq!(Packer::default().pack(&random, 25).0.codec, Codec::Raw);
        }
        let mut shrinks = vec![
            page(|_| 0),
            page(|at| if at < 2048 { 0 } else { rng.u8(..) }),
            page(|at| if at % 4 == 0 { 0 } else { rng.u8(..) }),
            page(|at| (at / 4).to_le_bytes()[at % 4]),
            page(|at| (at as u16 / 16).to_be_bytes()[at % 2]),
        ];
        shrinks.push(page(|_| b"0123456789abcdef"[usize::from(rng.u8(..16))]));
        let text = include_bytes!("packer.rs");
        shrinks.push(text[..8192.min(text.len())].to_vec());
        for (number, page) in shrinks.iter().enumerate() {
            assert!(!looks_random(page), "{number}");
        }
        assert!(!looks_random(&[]) && !looks_random(&[1; 100]));
    }

    #[test]
    fn a_page_that_is_kept_as_it_is_reads_back() {
        let mut rng = fastrand::Rng::with_seed(2);
        let random = page(|_| rng.u8(..));
        let mut packer = Packer::default();
        let (packed, stored) = packer.pack_page(&random, 25);
        assert_eq!((packed.codec, packed.stored_bytes), (Codec::Raw, 8192));
        assert_eq!(unpack(&packed, stored).as_deref(), Ok(&random[..]));
        assert!(unpack(&packed, &stored[1..]).is_err());
    }
}
