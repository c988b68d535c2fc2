//! Appends to a new layer file and publishes it; shared by delta and image layers.
//!
//! 1. `create`: a temporary file, `<16 hex digits>.tmp`, in the directory of the layer. It may have
//!    been another file before, whose space it uses, and have anything in it.
//! 2. `append`: bytes gather in an aligned buffer of 256 KiB; a full one is given to the device, and
//!    while that writes it, the next one fills. The first 4,096 bytes of the file stay free for the
//!    header.
//! 3. `finish`: the regions, zeros, the footer, the header; all writes come to their end; what is
//!    left of another file is cut off; sync; close; rename to the layer's name; sync of the directory.
//!
//! A crash before the rename is durable leaves at most a temporary file, which the owner of the
//! directory removes at start. After it, the file is whole.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::task::Poll;

use futures_util::future::LocalBoxFuture;
use futures_util::poll;

use crate::base::checksum::crc32c;
use crate::io::durable::{TEMP_SUFFIX, publish};
use crate::io::{ALIGNMENT, File, Io, IoError, align_up};
use crate::layers::format::{Description, Footer, HEADER_BYTES, frame_crc};
use crate::layers::packer::Packer;
use crate::layers::{LayerDesc, LayerError, LayerName, LayerOwner};
use crate::limits::{LAYER_SPACE_BYTES, LAYER_SPACE_FROM, LAYER_WRITE_BYTES, LAYER_WRITES_MAX};

/// Percentage that lz4 must save of an index to be worth it.
const INDEX_SAVING_PERCENT: usize = 10;

/// A layer file that is being written.
pub(super) struct LayerFileWriter<I: Io> {
    io: I,
    dir: PathBuf,
    temp: PathBuf,
    owner: LayerOwner,
    file: Rc<I::File>,
    /// Writes that the device has, oldest first.
    under_way: VecDeque<LocalBoxFuture<'static, Result<(), IoError>>>,
    buffer: <I::File as File>::WriteBuf,
    /// The file has space up to here. What a write adds to a file keeps all others waiting.
    space: u64,
    /// Bytes of the buffer in use.
    used: usize,
    /// Offset in the file where the buffer belongs.
    offset: u64,
}

/// The regions and counts with which a file is finished.
pub(super) struct Parts {
    pub(super) name: LayerName,
    pub(super) index: Vec<u8>,
    pub(super) filter: Vec<u8>,
    pub(super) value_count: u64,
    pub(super) key_count: u64,
}

impl<I: Io> LayerFileWriter<I> {
    /// Starts a file of hardly less than `least` bytes.
    pub(super) async fn create(
        io: &I,
        dir: &Path,
        owner: LayerOwner,
        least: u64,
    ) -> Result<Self, IoError> {
        let temp = dir.join(format!("{:016x}{TEMP_SUFFIX}", io.random_u64()));
        let file = io.create_scratch(&temp, least).await?;
        // That of a removed file may be long enough.
        let space = file.len().await.unwrap_or(0);
        let buffer = file.alloc_to_fill(LAYER_WRITE_BYTES);
        let (io, dir, offset) = (io.clone(), dir.to_owned(), HEADER_BYTES as u64);
        let mut writer = LayerFileWriter {
            io,
            dir,
            temp,
            owner,
            file: Rc::new(file),
            under_way: VecDeque::new(),
            buffer,
            space,
            used: 0,
            offset,
        };
        match writer.make_space(least).await {
            Ok(()) => Ok(writer),
            Err(error) => {
                writer.abort().await;
                Err(error)
            }
        }
    }

    /// Has the file get space for `len` bytes, if it is shorter.
    async fn make_space(&mut self, len: u64) -> Result<(), IoError> {
        if self.space < len {
            self.file.allocate(align_up(len)).await?;
            self.space = align_up(len);
        }
        Ok(())
    }

    /// The temporary file, for errors.
    pub(super) fn path(&self) -> &Path {
        &self.temp
    }

    /// Length of the file so far, in bytes.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.used as u64
    }

    /// Adds bytes at the end. After an error the file must be aborted.
    pub(super) async fn append(&mut self, mut bytes: &[u8]) -> Result<(), IoError> {
        while !bytes.is_empty() {
            let free = self.buffer.get_mut(self.used..).unwrap_or_default();
            let len = free.len().min(bytes.len());
            let (now, later) = bytes.split_at(len);
            free.get_mut(..len).unwrap_or_default().copy_from_slice(now);
            self.used += len;
            bytes = later;
            if self.used == LAYER_WRITE_BYTES {
                self.write_buffer().await?;
            }
        }
        Ok(())
    }

    /// Adds zeros up to a multiple of the alignment.
    pub(super) async fn pad(&mut self) -> Result<(), IoError> {
        // The buffer starts at an aligned offset and ends at one.
        let padded = self.used.next_multiple_of(ALIGNMENT);
        self.buffer.get_mut(self.used..padded).unwrap_or_default().fill(0);
        self.used = padded;
        if self.used == LAYER_WRITE_BYTES {
            self.write_buffer().await?;
        }
        Ok(())
    }

    /// Gives a buffer to the device, when that has not too many already. Its errors come later.
    async fn write(
        &mut self,
        offset: u64,
        buf: <I::File as File>::WriteBuf,
    ) -> Result<(), IoError> {
        while self.under_way.len() >= LAYER_WRITES_MAX {
            self.end_oldest_write().await?;
        }
        let file = self.file.clone();
        let mut write: LocalBoxFuture<'static, _> =
            Box::pin(async move { file.write_at(offset, buf).await });
        // Nothing is under way before it was polled once.
        match poll!(&mut write) {
            Poll::Ready(result) => result,
            Poll::Pending => {
                self.under_way.push_back(write);
                Ok(())
            }
        }
    }

    async fn end_oldest_write(&mut self) -> Result<(), IoError> {
        match self.under_way.pop_front() {
            Some(write) => write.await,
            None => Ok(()),
        }
    }

    /// Waits for all writes; gives the first error.
    async fn end_writes(&mut self) -> Result<(), IoError> {
        let mut result = Ok(());
        while !self.under_way.is_empty() {
            let ended = self.end_oldest_write().await;
            result = result.and(ended);
        }
        result
    }

    /// Writes a full buffer.
    async fn write_buffer(&mut self) -> Result<(), IoError> {
        let next = self.file.alloc_to_fill(LAYER_WRITE_BYTES);
        let full = std::mem::replace(&mut self.buffer, next);
        let offset = self.offset;
        self.offset += LAYER_WRITE_BYTES as u64;
        self.used = 0;
        if self.space < self.offset && offset >= LAYER_SPACE_FROM {
            self.make_space(offset + LAYER_SPACE_BYTES).await?;
        }
        self.write(offset, full).await?;
        self.io.yield_if_needed().await;
        Ok(())
    }

    /// Writes what the buffer holds, a multiple of the alignment.
    async fn write_rest(&mut self) -> Result<(), IoError> {
        if self.used == 0 {
            return Ok(());
        }
        let len = align_up(self.used as u64) as usize;
        let mut rest = self.file.alloc_to_fill(len);
        rest.copy_from_slice(self.buffer.get(..len).unwrap_or_default());
        let offset = self.offset;
        self.offset += len as u64;
        self.used = 0;
        self.write(offset, rest).await
    }

    async fn write_end(&mut self, parts: &Parts) -> Result<LayerDesc, LayerError> {
        let description = Description { owner: self.owner, name: parts.name.clone() };
        let data_end = self.position();
        let mut packer = Packer::default();
        let (index, stored) = packer.pack(&parts.index, INDEX_SAVING_PERCENT);
        self.append(stored).await?;
        self.append(&parts.filter).await?;
        self.pad().await?;
        let header = description.encode_header();
        let footer = Footer {
            description,
            file_bytes: self.position() + HEADER_BYTES as u64,
            data_end,
            index,
            filter_bytes: u32::try_from(parts.filter.len()).expect("a filter is below 4 GiB"),
            filter_crc: crc32c(&parts.filter),
            value_count: parts.value_count,
            key_count: parts.key_count,
            header_crc: frame_crc(&header),
        };
        let frame = footer.encode();
        let read_back = Footer::decode(&frame, footer.file_bytes);
        assert_eq!(read_back.as_ref(), Ok(&footer), "a footer must read back before it is written");
        self.append(&frame).await?;
        self.write_rest().await?;
        let mut first = self.file.alloc(HEADER_BYTES);
        first.copy_from_slice(&header);
        self.write(0, first).await?;
        self.end_writes().await?;
        self.file.set_len(footer.file_bytes).await?;
        Ok(LayerDesc {
            name: parts.name.clone(),
            file_bytes: footer.file_bytes,
            value_count: footer.value_count,
            footer_crc: frame_crc(&frame),
        })
    }

    /// Writes the end of the file and publishes it. After an error nothing is left behind, as far
    /// as the file system lets us.
    pub(super) async fn finish(mut self, parts: Parts) -> Result<LayerDesc, LayerError> {
        let desc = match self.write_end(&parts).await {
            Ok(desc) => desc,
            Err(error) => {
                self.abort().await;
                return Err(error);
            }
        };
        let LayerFileWriter { io, dir, temp, file, .. } = self;
        let synced = file.sync().await;
        let closed = close::<I>(file).await;
        let target = dir.join(desc.name.to_string());
        let published = match synced.and(closed) {
            Ok(()) => publish(&io, &temp, &target).await,
            Err(error) => Err(error),
        };
        if let Err(error) = published {
            let _ = io.remove(&temp).await;
            return Err(error.into());
        }
        Ok(desc)
    }

    /// Closes and removes the temporary file. Errors are left to the cleaning at start.
    pub(super) async fn abort(mut self) {
        let _ = self.end_writes().await;
        let LayerFileWriter { io, temp, file, .. } = self;
        let _ = close::<I>(file).await;
        let _ = io.remove(&temp).await;
    }
}

/// Closes the file, of which no write is under way.
async fn close<I: Io>(file: Rc<I::File>) -> Result<(), IoError> {
    Rc::into_inner(file).expect("only writes share the file, and they have ended").close().await
}
