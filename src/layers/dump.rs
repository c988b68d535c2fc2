//! Looking into a layer file, piece by piece: for `pgstrata layer dump`.
//!
//! Reading goes the way of every reader, footer, index, piece, each under the checksum that the
//! step before delivered. A piece is a data block of a delta layer or one value of an image layer.
//! One that is damaged hides nothing but itself.

use std::path::Path;
use std::rc::Rc;

use crate::base::{Key, Lsn, Value};
use crate::io::Io;
use crate::layers::format::{BlockEntries, Footer, Packed};
use crate::layers::index::{BlobRef, Form};
use crate::layers::{BlockCache, FileLayer, LayerError, LayerName};

/// A piece of a layer's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// First key.
    pub key: Key,
    /// LSN of the first value.
    pub lsn: Lsn,
    /// Number of values.
    pub value_count: u32,
    /// Lengths, codec and checksum; `None` for a page of zeros, which takes no place.
    pub packed: Option<Packed>,
}

/// An open layer file.
pub struct Inspector<I: Io> {
    layer: FileLayer<I>,
}

impl<I: Io> Inspector<I> {
    /// Opens a layer file, of whatever owner. Its name must be that of a layer.
    ///
    /// # Errors
    /// [`LayerError::Name`], [`LayerError::Damaged`], [`LayerError::Version`],
    /// [`LayerError::Mismatch`], [`LayerError::Io`].
    pub async fn open(io: &I, path: &Path) -> Result<Self, LayerError> {
        let text = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let name: LayerName = text.parse()?;
        let dir = path.parent().unwrap_or(Path::new(""));
        let cache = Rc::new(BlockCache::new(0));
        Ok(Inspector { layer: FileLayer::open_any(io, dir, &name, None, cache).await? })
    }

    /// The footer.
    pub fn footer(&self) -> &Footer {
        self.layer.file().footer()
    }

    /// Compares the header with the footer.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn check_header(&self) -> Result<(), LayerError> {
        self.layer.file().check_frame().await
    }

    /// All pieces, in order of keys.
    pub fn pieces(&self) -> Vec<Piece> {
        match &self.layer {
            FileLayer::Delta(layer) => layer
                .index()
                .iter()
                .map(|block| Piece {
                    offset: block.offset,
                    key: block.key,
                    lsn: block.lsn,
                    value_count: block.value_count,
                    packed: Some(block.packed),
                })
                .collect(),
            FileLayer::Image(layer) => {
                let lsn = self.layer.name().lsns().start;
                let piece = |(key, _, blob): (Key, u32, BlobRef)| Piece {
                    offset: blob.offset,
                    key,
                    lsn,
                    value_count: 1,
                    packed: (blob.form != Form::Zero).then_some(blob.packed),
                };
                layer.index().range(&(Key::MIN..Key::MAX)).map(piece).collect()
            }
        }
    }

    /// The values of a piece.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn values(&self, piece: &Piece) -> Result<Vec<(Key, Lsn, Value)>, LayerError> {
        let Some(packed) = &piece.packed else {
            return Ok(vec![(piece.key, piece.lsn, Value::ZeroPage)]);
        };
        let block = self.layer.file().read(piece.offset, packed).await?;
        if let FileLayer::Image(_) = &self.layer {
            return Ok(vec![(piece.key, piece.lsn, Value::Image(block))]);
        }
        let mut entries = BlockEntries::new(&block);
        let mut values = Vec::new();
        while let Some(entry) = entries.next() {
            let value = entry.and_then(|entry| Ok((entry.key, entry.lsn, entries.value(&entry)?)));
            values.push(value.map_err(|what| self.layer.file().damaged(piece.offset, what))?);
        }
        Ok(values)
    }

    /// Closes the file.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn close(self) -> Result<(), LayerError> {
        self.layer.close().await
    }
}
