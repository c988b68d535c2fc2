//! What the readers of delta and image layers share: opening, reading pieces, the cache.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use bytes::Bytes;

use crate::base::checksum::crc32c;
use crate::base::{Key, KeyRange, Lsn, LsnRange};
use crate::io::{ALIGNMENT, File, Io, align_down, align_up};
use crate::layers::block_cache::LayerNumber;
use crate::layers::format::{
    Description, FILE_BYTES_MIN, Footer, FrameError, HEADER_BYTES, Packed, VERSION, damage,
    frame_crc, is_zero,
};
use crate::layers::index::Expected;
use crate::layers::packer::unpack;
use crate::layers::{
    Answer, BlockCache, Damage, DeltaLayer, ImageLayer, LayerDesc, LayerError, LayerName,
    LayerOwner, Newest, Values,
};
use crate::limits::{LAYER_OPEN_READ_BYTES, LAYER_READ_BYTES_MAX};

/// An open file with its footer.
pub(super) struct LayerFile<I: Io> {
    file: I::File,
    path: PathBuf,
    footer: Footer,
    footer_crc: u32,
    cache: Rc<BlockCache>,
    number: LayerNumber,
}

/// Index and filter as they were read.
pub(super) struct Regions {
    pub(super) index: Bytes,
    pub(super) filter: Bytes,
}

/// Bytes that were read, somewhere in the middle of a larger aligned read.
struct Piece<B> {
    buf: B,
    start: usize,
    len: usize,
}

impl<B: std::ops::Deref<Target = [u8]>> Piece<B> {
    fn bytes(&self) -> Option<&[u8]> {
        self.buf.get(self.start..self.start.checked_add(self.len)?)
    }
}

fn frame_error(path: &Path, offset: u64) -> impl Fn(FrameError) -> LayerError {
    move |error| match error {
        FrameError::Version(version) => {
            LayerError::Version { file: path.to_owned(), version, supported: VERSION }
        }
        FrameError::Damaged(what) => damaged(path, damage(offset)(what)),
    }
}

fn damaged(path: &Path, damage: Damage) -> LayerError {
    LayerError::Damaged { file: path.to_owned(), damage }
}

async fn read_piece<F: File>(
    file: &F,
    offset: u64,
    len: usize,
) -> Result<Piece<F::ReadBuf>, LayerError> {
    let first = align_down(offset);
    let enclosing = align_up(offset.saturating_add(len as u64)) - first;
    let buf = file.read_at(first, enclosing as usize).await?;
    Ok(Piece { buf, start: (offset - first) as usize, len })
}

impl<I: Io> LayerFile<I> {
    /// Opens the file and reads footer, index and filter: one read, or two if index and filter
    /// do not fit into its last 64 KiB. `owner` is checked if it is given.
    pub(super) async fn open(
        io: &I,
        dir: &Path,
        name: &LayerName,
        owner: Option<LayerOwner>,
        cache: Rc<BlockCache>,
    ) -> Result<(Self, Regions), LayerError> {
        let path = dir.join(name.to_string());
        let file = io.open(&path).await?;
        match load(&file, &path, name, owner).await {
            Ok((footer, footer_crc, regions)) => {
                let number = cache.next_layer();
                Ok((LayerFile { file, path, footer, footer_crc, cache, number }, regions))
            }
            Err(error) => {
                let _ = file.close().await;
                Err(error)
            }
        }
    }

    pub(super) fn footer(&self) -> &Footer {
        &self.footer
    }

    pub(super) fn name(&self) -> &LayerName {
        &self.footer.description.name
    }

    pub(super) fn desc(&self) -> LayerDesc {
        LayerDesc {
            name: self.name().clone(),
            file_bytes: self.footer.file_bytes,
            value_count: self.footer.value_count,
            footer_crc: self.footer_crc,
        }
    }

    /// What an index must agree with.
    pub(super) fn expected(&self) -> Expected<'_> {
        Expected {
            keys: self.name().keys(),
            lsns: self.name().lsns(),
            data_end: self.footer.data_end,
            value_count: self.footer.value_count,
        }
    }

    /// An error about this file.
    pub(super) fn damaged(&self, offset: u64, what: &'static str) -> LayerError {
        damaged(&self.path, Damage { offset, what })
    }

    /// Reads and unpacks a piece, past the cache.
    pub(super) async fn read(&self, offset: u64, packed: &Packed) -> Result<Bytes, LayerError> {
        let len = packed.stored_bytes as usize;
        let unpacked = if len == 0 {
            unpack(packed, &[])
        } else if len <= LAYER_READ_BYTES_MAX - 2 * ALIGNMENT {
            let piece = read_piece(&self.file, offset, len).await?;
            piece.bytes().ok_or("the file ends within a block").and_then(|b| unpack(packed, b))
        } else {
            unpack(packed, &self.read_large(offset, len).await?)
        };
        unpacked.map_err(|what| self.damaged(offset, what))
    }

    /// Reads and unpacks neighbouring pieces with one read, past the cache. They ascend, and all
    /// but a single one are together at most [`LAYER_READ_BYTES_MAX`] long, gaps included.
    pub(super) async fn read_run(
        &self,
        places: &[(u64, Packed)],
    ) -> Result<Vec<Bytes>, LayerError> {
        let (first, last) = match places {
            [] => return Ok(Vec::new()),
            [(offset, packed)] => return Ok(vec![self.read(*offset, packed).await?]),
            [(first, _), .., (last, packed)] => {
                (*first, last.saturating_add(u64::from(packed.stored_bytes)))
            }
        };
        let len = last.saturating_sub(first) as usize;
        if len > LAYER_READ_BYTES_MAX - 2 * ALIGNMENT {
            return Err(self.damaged(first, "neighbouring blocks are too far apart"));
        }
        let piece = read_piece(&self.file, first, len).await?;
        let bytes = piece.bytes().unwrap_or_default();
        let unpack_one = |(offset, packed): &(u64, Packed)| {
            let start = offset.saturating_sub(first) as usize;
            let stored = bytes.get(start..start.saturating_add(packed.stored_bytes as usize));
            let stored = stored.ok_or("the file ends within a block");
            let unpacked = stored.and_then(|stored| unpack(packed, stored));
            unpacked.map_err(|what| self.damaged(*offset, what))
        };
        places.iter().map(unpack_one).collect()
    }

    /// Reads in several steps, for what is larger than a read should be.
    async fn read_large(&self, offset: u64, len: usize) -> Result<Vec<u8>, LayerError> {
        let (end, mut at) = (offset.saturating_add(len as u64), offset);
        let mut whole = Vec::with_capacity(len);
        while at < end {
            let next = align_down(at.saturating_add(LAYER_READ_BYTES_MAX as u64)).min(end);
            let piece = read_piece(&self.file, at, (next - at) as usize).await?;
            let bytes = piece.bytes();
            whole.extend_from_slice(
                bytes.ok_or_else(|| self.damaged(at, "the file ends within a block"))?,
            );
            at = next;
        }
        Ok(whole)
    }

    /// A verified, unpacked piece, from the cache or the file. `number` is unique in the layer.
    pub(super) async fn block(
        &self,
        number: u32,
        offset: u64,
        packed: &Packed,
    ) -> Result<Bytes, LayerError> {
        if let Some(block) = self.cache.get(self.number, number) {
            return Ok(block);
        }
        let block = self.read(offset, packed).await?;
        self.cache.insert(self.number, number, block.clone());
        Ok(block)
    }

    /// The same, if it is in the cache.
    pub(super) fn held_block(&self, number: u32) -> Option<Bytes> {
        self.cache.held(self.number, number)
    }

    /// Checks that `start..end` of the file holds zeros; for the gaps of less than two blocks
    /// that alignment makes.
    pub(super) async fn check_zeros(&self, start: u64, end: u64) -> Result<(), LayerError> {
        if start >= end {
            return Ok(());
        }
        let piece = read_piece(&self.file, start, end.saturating_sub(start) as usize).await?;
        match piece.bytes() {
            Some(bytes) if is_zero(bytes) => Ok(()),
            _ => Err(self.damaged(start, "bytes that belong to nothing are not zero")),
        }
    }

    /// Checks the header against the footer, and the gap before the footer.
    pub(super) async fn check_frame(&self) -> Result<(), LayerError> {
        let piece = read_piece(&self.file, 0, HEADER_BYTES).await?;
        let header = piece.bytes().unwrap_or_default();
        let description = Description::decode_header(header).map_err(frame_error(&self.path, 0))?;
        let crc = header.last_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        if description != self.footer.description || crc != Some(self.footer.header_crc) {
            return Err(self.damaged(0, "header and footer differ"));
        }
        let end = self.footer.file_bytes - HEADER_BYTES as u64;
        let used = self.footer.regions_end();
        if align_up(used) != end {
            return Err(self.damaged(used, "there is a gap before the footer"));
        }
        self.check_zeros(used, end).await
    }

    pub(super) async fn close(self) -> Result<(), LayerError> {
        self.cache.forget(self.number);
        Ok(self.file.close().await?)
    }
}

async fn load<F: File>(
    file: &F,
    path: &Path,
    name: &LayerName,
    owner: Option<LayerOwner>,
) -> Result<(Footer, u32, Regions), LayerError> {
    let file_bytes = file.len().await?;
    let wrong = |offset, what| damaged(path, Damage { offset, what });
    if file_bytes < FILE_BYTES_MIN || !file_bytes.is_multiple_of(ALIGNMENT as u64) {
        return Err(wrong(file_bytes, "the file has a length that no layer file has"));
    }
    let tail_start = file_bytes - file_bytes.min(LAYER_OPEN_READ_BYTES as u64);
    let tail = file.read_at(tail_start, (file_bytes - tail_start) as usize).await?;
    let footer_at = file_bytes - HEADER_BYTES as u64;
    let frame = tail.last_chunk().ok_or_else(|| wrong(footer_at, "the footer cannot be read"))?;
    let footer = Footer::decode(frame, file_bytes).map_err(frame_error(path, footer_at))?;
    let mismatch = |what| LayerError::Mismatch { file: path.to_owned(), what };
    if owner.is_some_and(|owner| owner != footer.description.owner) {
        return Err(mismatch("owner"));
    }
    if *name != footer.description.name {
        return Err(mismatch("name"));
    }
    let (start, end) = (footer.data_end, footer.regions_end());
    let regions = if start >= tail_start {
        let range = (start - tail_start) as usize..(end - tail_start) as usize;
        split(&footer, tail.get(range).unwrap_or_default())
    } else {
        let piece = read_piece(file, start, (end - start) as usize).await?;
        split(&footer, piece.bytes().unwrap_or_default())
    };
    let regions = regions.map_err(|what| wrong(start, what))?;
    Ok((footer, frame_crc(frame), regions))
}

/// Checks and unpacks index and filter, which stand in `bytes` one after the other.
fn split(footer: &Footer, bytes: &[u8]) -> Result<Regions, &'static str> {
    let parts = bytes.split_at_checked(footer.index.stored_bytes as usize);
    let (index, filter) = parts.ok_or("the file ends within the index")?;
    let index = unpack(&footer.index, index).map_err(|_| "the index is damaged")?;
    if filter.len() != footer.filter_bytes as usize || crc32c(filter) != footer.filter_crc {
        return Err("the filter is damaged");
    }
    Ok(Regions { index, filter: Bytes::copy_from_slice(filter) })
}

/// An open layer file of either kind.
pub enum FileLayer<I: Io> {
    /// A delta layer.
    Delta(DeltaLayer<I>),
    /// An image layer.
    Image(ImageLayer<I>),
}

impl<I: Io> FileLayer<I> {
    /// Opens `dir/name`, checks that it is the layer of this owner, loads its index.
    ///
    /// # Errors
    /// As [`DeltaLayer::open`].
    pub async fn open(
        io: &I,
        dir: &Path,
        name: &LayerName,
        owner: LayerOwner,
        cache: Rc<BlockCache>,
    ) -> Result<Self, LayerError> {
        FileLayer::open_any(io, dir, name, Some(owner), cache).await
    }

    /// Opens a layer of any owner, or of a given one.
    pub(super) async fn open_any(
        io: &I,
        dir: &Path,
        name: &LayerName,
        owner: Option<LayerOwner>,
        cache: Rc<BlockCache>,
    ) -> Result<Self, LayerError> {
        let (file, regions) = LayerFile::open(io, dir, name, owner, cache).await?;
        Ok(match name {
            LayerName::Delta { .. } => {
                FileLayer::Delta(DeltaLayer::from_parts(file, regions).await?)
            }
            LayerName::Image { .. } => {
                FileLayer::Image(ImageLayer::from_parts(file, regions).await?)
            }
        })
    }

    /// Appends the values of `key` within `lsns` to `out`, newest first, up to and including the
    /// first base.
    ///
    /// # Errors
    /// As [`DeltaLayer::collect`].
    pub async fn collect(
        &self,
        key: Key,
        lsns: &LsnRange,
        out: &mut Values,
    ) -> Result<Answer, LayerError> {
        match self {
            FileLayer::Delta(layer) => layer.collect(key, lsns, out).await,
            FileLayer::Image(layer) => layer.collect(key, lsns, out).await,
        }
    }

    /// [`FileLayer::collect`], if all that it needs is in memory. Otherwise, and after any error,
    /// `None`; `out` may have got some of the values then.
    pub fn held(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Answer> {
        match self {
            FileLayer::Delta(layer) => layer.held(key, lsns, out),
            FileLayer::Image(layer) => layer.held(key, lsns, out),
        }
    }

    /// Number of the data block that [`FileLayer::collect`] reads for `key` at any LSN, if it is one
    /// block, in which other keys may lie, too. `None` where it reads none, or perhaps several.
    pub fn block_of(&self, key: Key) -> Option<usize> {
        match self {
            FileLayer::Delta(layer) => layer.block_of(key),
            FileLayer::Image(_) => None,
        }
    }

    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    ///
    /// # Errors
    /// As [`DeltaLayer::scan`].
    pub async fn scan(
        &self,
        keys: &KeyRange,
        below: Lsn,
        out: &mut Newest,
    ) -> Result<(), LayerError> {
        match self {
            FileLayer::Delta(layer) => layer.scan(keys, below, out).await,
            FileLayer::Image(layer) => layer.scan(keys, below, out).await,
        }
    }

    /// Memory that its index and filter take, in bytes.
    pub fn memory_bytes(&self) -> usize {
        match self {
            FileLayer::Delta(layer) => layer.memory_bytes(),
            FileLayer::Image(layer) => layer.memory_bytes(),
        }
    }

    /// Name of the layer.
    pub fn name(&self) -> &LayerName {
        self.file().name()
    }

    /// Name, length, counts, checksum.
    pub fn desc(&self) -> LayerDesc {
        self.file().desc()
    }

    pub(super) fn file(&self) -> &LayerFile<I> {
        match self {
            FileLayer::Delta(layer) => layer.file(),
            FileLayer::Image(layer) => layer.file(),
        }
    }

    /// Closes the file and drops its blocks from the cache.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn close(self) -> Result<(), LayerError> {
        match self {
            FileLayer::Delta(layer) => layer.close().await,
            FileLayer::Image(layer) => layer.close().await,
        }
    }
}
