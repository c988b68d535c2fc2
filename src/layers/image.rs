//! Image layers: every key of a key range at one LSN.
//!
//! Writing: values come in key order; each is packed on its own and appended, a page that does
//! not shrink by a quarter as two whole device blocks. Reading a key: the index, all in
//! memory, gives the place; one read brings the value.
//!
//! The index is held whole: a layer of 128 MiB has at least 16,384 pages, 24 bytes each in memory.
//! A page of zeros is stored as [`Value::ZeroPage`] however it was given.
//!
//! Form and reasons: [`crate::layers::format`] and [`crate::layers::index`].

use std::path::Path;
use std::rc::Rc;

use crate::base::page::PAGE_SIZE;
use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::io::{ALIGNMENT, Io};
use crate::layers::file::{LayerFile, Regions};
use crate::layers::format::{Codec, HEADER_BYTES, Packed, is_zero};
use crate::layers::index::{BlobRef, Form, ImageIndex};
use crate::layers::packer::Packer;
use crate::layers::writer::{LayerFileWriter, Parts};
use crate::layers::{
    Answer, BlockCache, LayerDesc, LayerError, LayerName, LayerOwner, Lookup, Newest, Values,
    keep_newest,
};
use crate::limits::{LAYER_BLOCK_BYTES_MAX, LAYER_IMAGE_VALUES_MAX};

/// Percentage that packing must save of a value to be worth it.
const VALUE_SAVING_PERCENT: usize = 25;

/// Writes an image layer. Memory in use: the write buffer and the index.
pub struct ImageWriter<I: Io> {
    out: LayerFileWriter<I>,
    lsn: Lsn,
    packer: Packer,
    index: ImageIndex,
    first: Option<Key>,
    last: Option<Key>,
}

impl<I: Io> ImageWriter<I> {
    /// Starts a temporary file in `dir` for the state at `lsn`. It ends with
    /// [`ImageWriter::finish`] or [`ImageWriter::abort`], after an error of `add` too.
    /// The file gets space for `least` bytes at once, which it should come to have.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn create(
        io: &I,
        dir: &Path,
        owner: LayerOwner,
        lsn: Lsn,
        least: u64,
    ) -> Result<Self, LayerError> {
        Ok(ImageWriter {
            out: LayerFileWriter::create(io, dir, owner, least).await?,
            lsn,
            packer: Packer::default(),
            index: ImageIndex::default(),
            first: None,
            last: None,
        })
    }

    /// Packs with zstd what is added from now on: smaller than lz4, and slower to write and read.
    pub fn pack_tightly(mut self) -> Self {
        self.packer = Packer::tight();
        self
    }

    /// Adds the content of a key: [`Value::Image`] or [`Value::ZeroPage`]. Keys ascend.
    ///
    /// # Errors
    /// [`LayerError::Disorder`], [`LayerError::Misplaced`], [`LayerError::TooLarge`],
    /// [`LayerError::Io`].
    pub async fn add(&mut self, key: Key, value: &Value) -> Result<(), LayerError> {
        let lsn = self.lsn;
        let file = || self.out.path().to_owned();
        if let Some(previous_key) = self.last
            && key <= previous_key
        {
            let file = file();
            return Err(LayerError::Disorder { file, key, lsn, previous_key, previous_lsn: lsn });
        }
        let too_large =
            |what, limit: usize| LayerError::TooLarge { file: file(), what, limit: limit as u64 };
        if self.index.len() >= LAYER_IMAGE_VALUES_MAX {
            return Err(too_large("values", LAYER_IMAGE_VALUES_MAX));
        }
        let (form, packed) = match value {
            Value::ZeroPage => (Form::Zero, BlobRef::ZERO),
            Value::Image(bytes) if bytes.len() == PAGE_SIZE && is_zero(bytes) => {
                (Form::Zero, BlobRef::ZERO)
            }
            Value::Image(bytes) if bytes.len() > LAYER_BLOCK_BYTES_MAX => {
                return Err(too_large("bytes in one value", LAYER_BLOCK_BYTES_MAX));
            }
            Value::Image(bytes) => {
                let (packed, stored) = match bytes.len() {
                    PAGE_SIZE => self.packer.pack_page(bytes, VALUE_SAVING_PERCENT),
                    _ => self.packer.pack(bytes, VALUE_SAVING_PERCENT),
                };
                let form = form_of(packed.codec, stored.len());
                if form == Form::Aligned {
                    self.out.pad().await?;
                }
                self.out.append(stored).await?;
                (form, packed)
            }
            Value::WalRecord { .. } | Value::Small(_) => {
                let what = "only whole contents belong into an image layer";
                return Err(LayerError::Misplaced { file: file(), key, lsn, what });
            }
        };
        let offset = self.out.position() - u64::from(packed.stored_bytes);
        self.index.push(key, BlobRef { offset, form, packed });
        self.first.get_or_insert(key);
        self.last = Some(key);
        Ok(())
    }

    /// Bytes that the file has so far without the index; tells the caller when to cut.
    pub fn file_bytes(&self) -> u64 {
        self.out.position()
    }

    /// Number of values so far; bounded by [`LAYER_IMAGE_VALUES_MAX`].
    pub fn value_count(&self) -> usize {
        self.index.len()
    }

    /// Ends the file and publishes it: when this returns, it is durable under its name. `keys` is
    /// the range of which the layer has every key; it contains all that were added. A layer
    /// without values says that no key of the range exists.
    ///
    /// # Errors
    /// [`LayerError::Misplaced`], [`LayerError::Io`]. The temporary file is removed. If only the
    /// last step failed, the sync of the directory, the file may be there.
    pub async fn finish(self, keys: KeyRange) -> Result<LayerDesc, LayerError> {
        let outside = [self.first, self.last].into_iter().flatten().find(|k| !keys.contains(k));
        if let Some(key) = outside {
            let (file, lsn) = (self.out.path().to_owned(), self.lsn);
            self.out.abort().await;
            let what = "the key is outside the range of the layer";
            return Err(LayerError::Misplaced { file, key, lsn, what });
        }
        let value_count = self.index.len() as u64;
        let parts = Parts {
            name: LayerName::Image { keys, lsn: self.lsn },
            index: self.index.encode(),
            filter: Vec::new(),
            value_count,
            key_count: value_count,
        };
        self.out.finish(parts).await
    }

    /// Closes and removes the temporary file.
    pub async fn abort(self) {
        self.out.abort().await;
    }
}

/// A raw page takes whole device blocks; smaller things are packed.
fn form_of(codec: Codec, stored_bytes: usize) -> Form {
    match codec {
        Codec::Lz4 => Form::Lz4,
        Codec::Zstd => Form::Zstd,
        Codec::Raw if stored_bytes > 0 && stored_bytes.is_multiple_of(ALIGNMENT) => Form::Aligned,
        Codec::Raw => Form::Raw,
    }
}

/// An open image layer.
pub struct ImageLayer<I: Io> {
    file: LayerFile<I>,
    index: ImageIndex,
}

impl<I: Io> ImageLayer<I> {
    /// Opens `dir/name`, checks that it is the layer of this owner, loads the index.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Version`], [`LayerError::Mismatch`],
    /// [`LayerError::Io`].
    pub async fn open(
        io: &I,
        dir: &Path,
        name: &LayerName,
        owner: LayerOwner,
        cache: Rc<BlockCache>,
    ) -> Result<Self, LayerError> {
        let (file, regions) = LayerFile::open(io, dir, name, Some(owner), cache).await?;
        ImageLayer::from_parts(file, regions).await
    }

    pub(super) async fn from_parts(
        file: LayerFile<I>,
        regions: Regions,
    ) -> Result<Self, LayerError> {
        let footer = file.footer();
        let index = if !file.name().is_image() {
            Err("not an image layer")
        } else if !regions.filter.is_empty() || footer.key_count != footer.value_count {
            Err("the footer is not that of an image layer")
        } else {
            ImageIndex::decode(&regions.index, &file.expected())
        };
        match index {
            Ok(index) => Ok(ImageLayer { file, index }),
            Err(what) => {
                let error = file.damaged(footer.data_end, what);
                let _ = file.close().await;
                Err(error)
            }
        }
    }

    /// Memory that the index takes, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.index.memory_bytes()
    }

    pub(super) fn file(&self) -> &LayerFile<I> {
        &self.file
    }

    pub(super) fn index(&self) -> &ImageIndex {
        &self.index
    }

    /// Name of the layer.
    pub fn name(&self) -> &LayerName {
        self.file.name()
    }

    /// Name, length, counts, checksum.
    pub fn desc(&self) -> LayerDesc {
        self.file.desc()
    }

    /// The next keys of a range, each with the place of its content, `None` for a page of zeros:
    /// one, or up to `count` as long as they lie within `bytes_max` of the file.
    pub(super) fn places(
        &self,
        keys: &KeyRange,
        count: usize,
        bytes_max: usize,
    ) -> Vec<(Key, Option<(u64, Packed)>)> {
        let mut start = None;
        let near = self.index.range(keys).take(count).take_while(|(_, _, blob)| {
            if blob.form == Form::Zero {
                return true;
            }
            let is_first = start.is_none();
            let start = *start.get_or_insert(blob.offset);
            is_first || blob.end().saturating_sub(start) <= bytes_max as u64
        });
        let place = |blob: BlobRef| (blob.form != Form::Zero).then_some((blob.offset, blob.packed));
        near.map(|(key, _, blob)| (key, place(blob))).collect()
    }

    async fn value(&self, number: u32, blob: &BlobRef) -> Result<Value, LayerError> {
        if blob.form == Form::Zero {
            return Ok(Value::ZeroPage);
        }
        Ok(Value::Image(self.file.block(number, blob.offset, &blob.packed).await?))
    }

    /// If the layer's LSN is within `lsns`: appends the value of `key` to `out` and says
    /// [`Lookup::Complete`], or says [`Lookup::Absent`] if the key did not exist. Outside its key
    /// range and outside `lsns` it says [`Lookup::Continue`].
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn collect(
        &self,
        key: Key,
        lsns: &LsnRange,
        out: &mut Values,
    ) -> Result<Answer, LayerError> {
        let (number, blob) = match self.place(key, lsns) {
            Ok(place) => place,
            Err(answer) => return Ok(answer),
        };
        out.push((self.name().lsns().start, self.value(number, &blob).await?));
        Ok(Answer { lookup: Lookup::Complete, is_read: blob.form != Form::Zero })
    }

    /// Number and place of the content of `key`, or what there is to say without it.
    fn place(&self, key: Key, lsns: &LsnRange) -> Result<(u32, BlobRef), Answer> {
        if !self.name().keys().contains(&key) || !lsns.contains(&self.name().lsns().start) {
            return Err(Answer::NOTHING);
        }
        self.index.find(key).ok_or(Answer { lookup: Lookup::Absent, is_read: false })
    }

    /// See [`crate::layers::FileLayer::held`].
    pub(super) fn held(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Answer> {
        let (number, blob) = match self.place(key, lsns) {
            Ok(place) => place,
            Err(answer) => return Some(answer),
        };
        let is_read = blob.form != Form::Zero;
        let value = match is_read {
            true => Value::Image(self.file.held_block(number)?),
            false => Value::ZeroPage,
        };
        out.push((self.name().lsns().start, value));
        Some(Answer { lookup: Lookup::Complete, is_read })
    }

    /// For every key of the range, its value if the layer's LSN is below `below`, unless `out` has
    /// a newer.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn scan(
        &self,
        keys: &KeyRange,
        below: Lsn,
        out: &mut Newest,
    ) -> Result<(), LayerError> {
        let lsn = self.name().lsns().start;
        if lsn >= below {
            return Ok(());
        }
        for (key, number, blob) in self.index.range(keys) {
            if out.get(&key).is_none_or(|(other, _)| *other < lsn) {
                keep_newest(out, key, lsn, &self.value(number, &blob).await?);
            }
        }
        Ok(())
    }

    /// Reads everything and checks what opening did not.
    pub(super) async fn check(&self, io: &I) -> Result<(), LayerError> {
        let mut end = HEADER_BYTES as u64;
        for blob in self.index.blobs() {
            if blob.form == Form::Zero {
                continue;
            }
            self.file.check_zeros(end, blob.offset).await?;
            let content = self.file.read(blob.offset, &blob.packed).await?;
            let form = form_of(blob.packed.codec, blob.packed.stored_bytes as usize);
            let hidden_zeros = content.len() == PAGE_SIZE && is_zero(&content);
            if form != blob.form || hidden_zeros {
                let what = "a value has another form than the format gives it";
                return Err(self.file.damaged(blob.offset, what));
            }
            end = blob.end();
            io.yield_if_needed().await;
        }
        Ok(())
    }

    /// Closes the file and drops its values from the cache.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn close(self) -> Result<(), LayerError> {
        self.file.close().await
    }
}
