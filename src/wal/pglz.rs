//! Decompression of PostgreSQL's own LZ format (`src/common/pg_lzcompress.c`).
//!
//! The stream is groups of one control byte and eight items, lowest bit first. Bit 0: one
//! literal byte. Bit 1: a copy of two or three bytes, `llll` and the distance: the high half of
//! the first byte and the whole second byte make the distance (1 to 4095), the low half of the
//! first byte plus 3 the length; a length of 18 is followed by a byte that is added to it. Source
//! and target of a copy may overlap, which repeats bytes.

/// The bytes are no such stream, or not of the expected length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed;

/// Fills `target` exactly from the whole of `source`.
pub(crate) fn decompress(source: &[u8], target: &mut [u8]) -> Result<(), Malformed> {
    let mut source = source.iter().copied();
    let mut done = 0;
    while done < target.len() {
        let Some(mut control) = source.next() else { return Err(Malformed) };
        for _ in 0..8 {
            if done == target.len() {
                break;
            }
            let first = source.next().ok_or(Malformed)?;
            if control & 1 == 0 {
                *target.get_mut(done).ok_or(Malformed)? = first;
                done += 1;
            } else {
                let second = source.next().ok_or(Malformed)?;
                let distance = usize::from(first & 0xF0) << 4 | usize::from(second);
                let mut len = usize::from(first & 0x0F) + 3;
                if len == 18 {
                    len += usize::from(source.next().ok_or(Malformed)?);
                }
                done = copy_back(target, done, distance, len)?;
            }
            control >>= 1;
        }
    }
    if source.next().is_none() { Ok(()) } else { Err(Malformed) }
}

/// Repeats `len` bytes that end `distance` before `at`, cut at the end of the target; gives the
/// new end.
fn copy_back(
    target: &mut [u8],
    at: usize,
    distance: usize,
    len: usize,
) -> Result<usize, Malformed> {
    if distance == 0 || distance > at {
        return Err(Malformed);
    }
    let end = (at + len).min(target.len());
    // Byte by byte, because the source may overlap the target.
    for position in at..end {
        let byte = *target.get(position - distance).ok_or(Malformed)?;
        *target.get_mut(position).ok_or(Malformed)? = byte;
    }
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn literals_copies_and_long_copies() {
        let mut out = [0; 5];
        assert_eq!(decompress(b"\x00hello", &mut out), Ok(()));
        assert_eq!(&out, b"hello");
        // "ab", then 4 bytes from 2 back.
        let mut out = [0; 6];
        assert_eq!(decompress(&[0b100, b'a', b'b', 0x01, 2], &mut out), Ok(()));
        assert_eq!(&out, b"ababab");
        // One byte repeated 18 + 7 times.
        let mut out = [0; 26];
        assert_eq!(decompress(&[0b10, b'x', 0x0F, 1, 7], &mut out), Ok(()));
        assert_eq!(out, [b'x'; 26]);
    }

    #[test]
    fn bad_streams_are_refused() {
        let mut out = [0; 6];
        for bad in [
            &[][..],
            &[0],
            &[0b1, 0x01, 1],
            &[0b10, b'a', 0x01, 0],
            &[0b10, b'a', 0x01, 2],
            &[0b10, b'a', 0x01],
            &[0b10, b'a', 0x0F, 1],
            &[0, b'a', b'b', b'c', b'd', b'e', b'f', b'g'],
        ] {
            assert_eq!(decompress(bad, &mut out), Err(Malformed), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn no_input_panics(source in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut out = [0; 100];
            let _ = decompress(&source, &mut out);
        }
    }
}
