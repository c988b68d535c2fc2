//! Full-page images in WAL records: hole, compression (`XLogRecordBlockImageHeader`).
//!
//! A page is stored without the run of zeros in its middle (the hole), and perhaps compressed
//! after that (`wal_compression`: pglz, lz4 or zstd).

use super::pglz;
use crate::base::Kind;
use crate::base::page::{PAGE_SIZE, Page};

const HAS_HOLE: u8 = 0x01;
const APPLY: u8 = 0x02;
const PGLZ: u8 = 0x04;
const LZ4: u8 = 0x08;
const ZSTD: u8 = 0x10;

/// How an image is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ImageHeader {
    /// Bytes stored.
    pub(crate) len: u16,
    /// Where the hole begins in the page.
    pub(crate) hole_offset: u16,
    /// Length of the hole, 0 if there is none.
    pub(crate) hole_len: u16,
    /// `BKPIMAGE_*` flags.
    pub(crate) info: u8,
}

impl ImageHeader {
    /// The bytes are compressed.
    pub(crate) fn compressed(&self) -> bool {
        self.info & (PGLZ | LZ4 | ZSTD) != 0
    }

    /// Zeros were left out.
    pub(crate) fn has_hole(&self) -> bool {
        self.info & HAS_HOLE != 0
    }

    /// Checks that the fields fit together.
    pub(crate) fn check(&self) -> Result<(), &'static str> {
        let (len, hole_len) = (usize::from(self.len), usize::from(self.hole_len));
        if self.has_hole() {
            if self.hole_offset == 0 || hole_len == 0 || len == PAGE_SIZE {
                return Err("an image with a hole says that it has none");
            }
        } else if self.hole_offset != 0 || hole_len != 0 {
            return Err("an image without a hole has a place for it");
        }
        if usize::from(self.hole_offset) + hole_len > PAGE_SIZE {
            return Err("the hole of an image exceeds the page");
        }
        let full = PAGE_SIZE.saturating_sub(hole_len);
        match self.compressed() {
            true if len >= PAGE_SIZE => Err("a compressed image is no shorter than a page"),
            false if len != full => Err("an image has the wrong length"),
            _ => Ok(()),
        }
    }
}

/// A full-page image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockImage<'a> {
    header: ImageHeader,
    bytes: &'a [u8],
}

/// Why an image cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a page image of {len} bytes compressed with {method} does not give {expected} bytes")]
pub struct ImageError {
    /// Name of the compression method.
    pub method: &'static str,
    /// Bytes stored.
    pub len: usize,
    /// Bytes expected: the page without its hole.
    pub expected: usize,
}

impl ImageError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        Kind::Corrupt
    }
}

impl<'a> BlockImage<'a> {
    /// An image whose bytes come later.
    pub(crate) fn new(header: ImageHeader) -> Self {
        BlockImage { header, bytes: &[] }
    }

    /// A page of zeros in the smallest form: one byte, and a hole behind it. To be applied.
    pub(crate) fn blank() -> BlockImage<'static> {
        let hole_len = PAGE_SIZE as u16 - 1;
        let header = ImageHeader { len: 1, hole_offset: 1, hole_len, info: HAS_HOLE | APPLY };
        BlockImage { header, bytes: &[0] }
    }

    /// Header and bytes, as they stand in a record.
    pub(super) fn parts(&self) -> (&ImageHeader, &'a [u8]) {
        (&self.header, self.bytes)
    }

    /// The bytes that the header described.
    pub(crate) fn set_bytes(&mut self, bytes: &'a [u8]) {
        self.bytes = bytes;
    }

    /// Redo restores this image; otherwise it only serves comparison.
    pub fn apply(&self) -> bool {
        self.header.info & APPLY != 0
    }

    /// The image is not compressed and has the bytes that it should have: it can be restored.
    pub(crate) fn is_whole(&self) -> bool {
        let hole_offset = usize::from(self.header.hole_offset);
        !self.header.compressed()
            && hole_offset <= self.bytes.len()
            && self.bytes.len() + usize::from(self.header.hole_len) == PAGE_SIZE
    }

    /// The page, with the hole filled with zeros. Its LSN is what it was before the record.
    pub fn restore(&self) -> Result<Box<Page>, ImageError> {
        let mut page = Box::new([0u8; PAGE_SIZE]);
        self.restore_into(&mut page)?;
        Ok(page)
    }

    /// As [`BlockImage::restore`], in memory of its own that is written once.
    pub(crate) fn restore_bytes(&self) -> Result<Vec<u8>, ImageError> {
        if self.header.compressed() {
            return Ok(self.restore()?.to_vec());
        }
        let hole_offset = usize::from(self.header.hole_offset);
        let hole_end = hole_offset + usize::from(self.header.hole_len);
        let mut page = Vec::with_capacity(PAGE_SIZE);
        if let Some((head, tail)) = self.bytes.split_at_checked(hole_offset) {
            page.extend_from_slice(head);
            page.resize(hole_end, 0);
            page.extend_from_slice(tail);
        }
        if page.len() != PAGE_SIZE {
            let (len, expected) = (self.bytes.len(), PAGE_SIZE.saturating_sub(hole_end));
            return Err(ImageError { method: "nothing", len, expected });
        }
        Ok(page)
    }

    /// As [`BlockImage::restore`], over a page that is there. After an error the page is of no
    /// use.
    pub fn restore_into(&self, page: &mut Page) -> Result<(), ImageError> {
        let full = PAGE_SIZE.saturating_sub(usize::from(self.header.hole_len));
        let fail = |method| ImageError { method, len: self.bytes.len(), expected: full };
        if !self.header.compressed() {
            return self.spread(self.bytes, page).ok_or_else(|| fail("nothing"));
        }
        let mut buffer = [0u8; PAGE_SIZE];
        let packed = buffer.get_mut(..full).ok_or_else(|| fail("nothing"))?;
        let (method, len) = self.decompress(packed);
        if len != Some(full) {
            return Err(fail(method));
        }
        self.spread(packed, page).ok_or_else(|| fail(method))
    }

    /// Puts what is before and behind the hole in its place, and zeros between.
    fn spread(&self, packed: &[u8], page: &mut Page) -> Option<()> {
        let hole_offset = usize::from(self.header.hole_offset);
        let hole_end = hole_offset + usize::from(self.header.hole_len);
        let (head, tail) = packed.split_at_checked(hole_offset)?;
        page.get_mut(..hole_offset)?.copy_from_slice(head);
        page.get_mut(hole_offset..hole_end)?.fill(0);
        let target = page.get_mut(hole_end..)?;
        (target.len() == tail.len()).then(|| target.copy_from_slice(tail))
    }

    /// Decompresses into `target`; gives the method and how many bytes came out.
    fn decompress(&self, target: &mut [u8]) -> (&'static str, Option<usize>) {
        if self.header.info & PGLZ != 0 {
            ("pglz", pglz::decompress(self.bytes, target).ok().map(|()| target.len()))
        } else if self.header.info & LZ4 != 0 {
            ("lz4", lz4_flex::block::decompress_into(self.bytes, target).ok())
        } else {
            ("zstd", zstd::bulk::decompress_to_buffer(self.bytes, target).ok())
        }
    }
}
