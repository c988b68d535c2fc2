//! Appends to a new layer file and publishes it; shared by delta and image layers.
//!
//! 1. `create`: a temporary file, `<16 hex digits>.tmp`, in the directory of the layer.
//! 2. `append`: bytes gather in an aligned buffer of 1 MiB; a full one is written. The first
//!    4,096 bytes of the file stay free for the header.
//! 3. `finish`: the regions, zeros, the footer, the header; sync; close; rename to the layer's
//!    name; sync of the directory.
//!
//! A crash before the rename is durable leaves at most a temporary file, which the owner of the
//! directory removes at start. After it, the file is whole.

use std::path::{Path, PathBuf};

use crate::base::checksum::crc32c;
use crate::io::durable::{TEMP_SUFFIX, publish};
use crate::io::{ALIGNMENT, File, Io, IoError};
use crate::layers::format::{Description, Footer, HEADER_BYTES, Packer, frame_crc};
use crate::layers::{LayerDesc, LayerError, LayerName, LayerOwner};
use crate::limits::LAYER_WRITE_BYTES;

/// Percentage that lz4 must save of an index to be worth it.
const INDEX_SAVING_PERCENT: usize = 10;

/// A layer file that is being written.
pub(super) struct LayerFileWriter<I: Io> {
    io: I,
    dir: PathBuf,
    temp: PathBuf,
    owner: LayerOwner,
    file: I::File,
    buffer: <I::File as File>::WriteBuf,
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
    pub(super) async fn create(io: &I, dir: &Path, owner: LayerOwner) -> Result<Self, IoError> {
        let temp = dir.join(format!("{:016x}{TEMP_SUFFIX}", io.random_u64()));
        let file = io.create(&temp).await?;
        let buffer = file.alloc(LAYER_WRITE_BYTES);
        let (io, dir, offset) = (io.clone(), dir.to_owned(), HEADER_BYTES as u64);
        Ok(LayerFileWriter { io, dir, temp, owner, file, buffer, used: 0, offset })
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
            free.iter_mut().zip(now).for_each(|(to, from)| *to = *from);
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
        // The buffer comes zeroed, starts at an aligned offset and ends at one.
        self.used = self.used.next_multiple_of(ALIGNMENT);
        if self.used == LAYER_WRITE_BYTES {
            self.write_buffer().await?;
        }
        Ok(())
    }

    /// Writes a full buffer.
    async fn write_buffer(&mut self) -> Result<(), IoError> {
        let next = self.file.alloc(LAYER_WRITE_BYTES);
        let full = std::mem::replace(&mut self.buffer, next);
        let offset = self.offset;
        self.offset += LAYER_WRITE_BYTES as u64;
        self.used = 0;
        self.file.write_at(offset, full).await?;
        self.io.yield_if_needed().await;
        Ok(())
    }

    /// Writes what the buffer holds, a multiple of the alignment.
    async fn write_rest(&mut self) -> Result<(), IoError> {
        if self.used == 0 {
            return Ok(());
        }
        let mut rest = self.file.alloc(self.used);
        rest.copy_from_slice(self.buffer.get(..self.used).unwrap_or_default());
        let offset = self.offset;
        self.offset += self.used as u64;
        self.used = 0;
        self.file.write_at(offset, rest).await
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
        self.file.write_at(0, first).await?;
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
        let closed = file.close().await;
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
    pub(super) async fn abort(self) {
        let LayerFileWriter { io, temp, file, .. } = self;
        let _ = file.close().await;
        let _ = io.remove(&temp).await;
    }
}
