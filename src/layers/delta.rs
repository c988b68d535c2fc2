//! Delta layers: all versions of a key range within an LSN range.
//!
//! Writing: values come in order of key, then LSN, and gather in a block; a block of 16 KiB is
//! packed, appended, and entered in the index. Index, filter and footer follow at the end.
//!
//! Reading a key:
//! 1. the filter tells most absent keys, without a read;
//! 2. the index, all in memory, gives the last block that can hold a version below the wanted end;
//! 3. that block is read (or found in the cache), its values of the key go to the caller, newest
//!    first;
//! 4. if the block begins with this key, older versions may be in the block before: go on there
//!    until a base was found.
//!
//! Form and reasons: [`crate::layers::format`] and [`crate::layers::index`].

use std::path::Path;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};

use crate::base::{Key, KeyRange, Lsn, LsnRange, Value};
use crate::io::Io;
use crate::layers::file::{LayerFile, Regions};
use crate::layers::format::{BlockEntries, ENTRY_OVERHEAD_BYTES, Packed, encode_entry};
use crate::layers::index::{self, BlockRef};
use crate::layers::packer::Packer;
use crate::layers::writer::{LayerFileWriter, Parts};
use crate::layers::{
    Answer, BlockCache, LayerDesc, LayerError, LayerName, LayerOwner, Lookup, Newest, Values,
    filter, keep_newest,
};
use crate::limits::{
    LAYER_BLOCK_BYTES_MAX, LAYER_BLOCK_BYTES_TARGET, LAYER_DELTA_BLOCKS_MAX, LAYER_DELTA_KEYS_MAX,
};

/// Percentage that packing must save of a data block to be worth it.
const BLOCK_SAVING_PERCENT: usize = 10;

/// Writes a delta layer. Memory in use: two blocks, the write buffer, the index, and 8 bytes for
/// each distinct key.
pub struct DeltaWriter<I: Io> {
    out: LayerFileWriter<I>,
    lsns: LsnRange,
    packer: Packer,
    block: BytesMut,
    /// First key and LSN of the block, and number of its values.
    block_first: Option<(Key, Lsn)>,
    block_values: u32,
    index: Vec<BlockRef>,
    hashes: Vec<u64>,
    first_key: Option<Key>,
    last: Option<(Key, Lsn)>,
    value_count: u64,
}

impl<I: Io> DeltaWriter<I> {
    /// Starts a temporary file in `dir` for values with an LSN within `lsns`. It ends with
    /// [`DeltaWriter::finish`] or [`DeltaWriter::abort`], after an error of `add` too.
    /// The file gets space for `least` bytes at once, which it should come to have.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn create(
        io: &I,
        dir: &Path,
        owner: LayerOwner,
        lsns: LsnRange,
        least: u64,
    ) -> Result<Self, LayerError> {
        Ok(DeltaWriter {
            out: LayerFileWriter::create(io, dir, owner, least).await?,
            lsns,
            packer: Packer::default(),
            block: BytesMut::with_capacity(2 * LAYER_BLOCK_BYTES_TARGET),
            block_first: None,
            block_values: 0,
            index: Vec::new(),
            hashes: Vec::new(),
            first_key: None,
            last: None,
            value_count: 0,
        })
    }

    /// Packs with zstd what is added from now on: smaller than lz4, and slower to write and read.
    pub fn pack_tightly(mut self) -> Self {
        self.packer = Packer::tight();
        self
    }

    /// Adds a value. Keys ascend; LSNs of one key do not descend.
    ///
    /// # Errors
    /// [`LayerError::Disorder`], [`LayerError::Misplaced`], [`LayerError::TooLarge`],
    /// [`LayerError::Io`].
    pub async fn add(&mut self, key: Key, lsn: Lsn, value: &Value) -> Result<(), LayerError> {
        let file = || self.out.path().to_owned();
        if let Some((previous_key, previous_lsn)) = self.last
            && (key, lsn) < (previous_key, previous_lsn)
        {
            return Err(LayerError::Disorder {
                file: file(),
                key,
                lsn,
                previous_key,
                previous_lsn,
            });
        }
        if !self.lsns.contains(&lsn) {
            let what = "the LSN is outside the range of the layer";
            return Err(LayerError::Misplaced { file: file(), key, lsn, what });
        }
        let entry_bytes = value.encoded_len().saturating_add(ENTRY_OVERHEAD_BYTES);
        let too_large =
            |what, limit: usize| LayerError::TooLarge { file: file(), what, limit: limit as u64 };
        if entry_bytes > LAYER_BLOCK_BYTES_MAX {
            return Err(too_large("bytes in one value", LAYER_BLOCK_BYTES_MAX));
        }
        let new_key = self.last.is_none_or(|(previous, _)| previous != key);
        if new_key && self.hashes.len() >= LAYER_DELTA_KEYS_MAX {
            return Err(too_large("keys", LAYER_DELTA_KEYS_MAX));
        }
        if self.block.len() + entry_bytes > LAYER_BLOCK_BYTES_TARGET {
            self.end_block().await?;
        }
        if new_key {
            self.hashes.push(filter::hash(key));
            self.first_key.get_or_insert(key);
        }
        let previous = self.block_first.and(self.last).map(|(previous, _)| previous);
        encode_entry(&mut self.block, previous, key, lsn, value);
        self.block_first.get_or_insert((key, lsn));
        self.block_values += 1;
        self.last = Some((key, lsn));
        self.value_count += 1;
        Ok(())
    }

    async fn end_block(&mut self) -> Result<(), LayerError> {
        let Some((key, lsn)) = self.block_first.take() else {
            return Ok(());
        };
        if self.index.len() >= LAYER_DELTA_BLOCKS_MAX {
            return Err(LayerError::TooLarge {
                file: self.out.path().to_owned(),
                what: "blocks",
                limit: LAYER_DELTA_BLOCKS_MAX as u64,
            });
        }
        let offset = self.out.position();
        let (packed, stored) = self.packer.pack(&self.block, BLOCK_SAVING_PERCENT);
        self.out.append(stored).await?;
        let value_count = std::mem::take(&mut self.block_values);
        self.index.push(BlockRef { key, lsn, offset, value_count, packed });
        self.block.clear();
        Ok(())
    }

    /// Bytes that the file has so far without index and filter; tells the caller when to cut.
    pub fn file_bytes(&self) -> u64 {
        self.out.position()
    }

    /// Ends the file and publishes it: when this returns, it is durable under its name. `keys` is
    /// the range that the layer stands for; it contains every key that was added.
    ///
    /// # Errors
    /// [`LayerError::Empty`], [`LayerError::Misplaced`], [`LayerError::Io`]. The temporary file is
    /// removed. If only the last step failed, the sync of the directory, the file may be there.
    pub async fn finish(mut self, keys: KeyRange) -> Result<LayerDesc, LayerError> {
        if let Err(error) = self.finish_blocks(&keys).await {
            self.abort().await;
            return Err(error);
        }
        let parts = Parts {
            name: LayerName::Delta { keys, lsns: self.lsns },
            index: index::encode_delta(&self.index),
            filter: filter::build(&self.hashes),
            value_count: self.value_count,
            key_count: self.hashes.len() as u64,
        };
        self.out.finish(parts).await
    }

    async fn finish_blocks(&mut self, keys: &KeyRange) -> Result<(), LayerError> {
        self.end_block().await?;
        let file = || self.out.path().to_owned();
        let (Some(first), Some((last, lsn))) = (self.first_key, self.last) else {
            return Err(LayerError::Empty { file: file() });
        };
        for key in [first, last] {
            if !keys.contains(&key) {
                let what = "the key is outside the range of the layer";
                return Err(LayerError::Misplaced { file: file(), key, lsn, what });
            }
        }
        Ok(())
    }

    /// Closes and removes the temporary file.
    pub async fn abort(self) {
        self.out.abort().await;
    }
}

/// An open delta layer.
pub struct DeltaLayer<I: Io> {
    file: LayerFile<I>,
    index: Vec<BlockRef>,
    filter: Bytes,
}

impl<I: Io> DeltaLayer<I> {
    /// Opens `dir/name`, checks that it is the layer of this owner, loads index and filter.
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
        DeltaLayer::from_parts(file, regions).await
    }

    pub(super) async fn from_parts(
        file: LayerFile<I>,
        regions: Regions,
    ) -> Result<Self, LayerError> {
        let index = if !file.name().is_delta() {
            Err("not a delta layer")
        } else if !filter::is_valid_len(regions.filter.len()) {
            Err("the filter has an impossible length")
        } else {
            index::decode_delta(&regions.index, &file.expected())
        };
        match index {
            Ok(index) => Ok(DeltaLayer { file, index, filter: regions.filter }),
            Err(what) => {
                let error = file.damaged(file.footer().data_end, what);
                let _ = file.close().await;
                Err(error)
            }
        }
    }

    pub(super) fn file(&self) -> &LayerFile<I> {
        &self.file
    }

    /// Memory that index and filter take, in bytes.
    pub(super) fn memory_bytes(&self) -> usize {
        size_of::<Self>() + self.index.len() * size_of::<BlockRef>() + self.filter.len()
    }

    pub(super) fn index(&self) -> &[BlockRef] {
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

    /// The first block that may have values of keys from `key` on.
    pub(super) fn first_block(&self, key: Key) -> usize {
        self.index.partition_point(|block| block.key < key).saturating_sub(1)
    }

    /// Places of neighbouring blocks from number `first` on that have keys below `end`: one, or
    /// more as long as they take at most `bytes_max` in the file.
    pub(super) fn places(&self, first: usize, end: Key, bytes_max: usize) -> Vec<(u64, Packed)> {
        let mut total = 0usize;
        let places = self.index.iter().skip(first).take_while(|place| place.key < end);
        let fitting = places.take_while(|place| {
            let is_first = total == 0;
            total = total.saturating_add(place.packed.stored_bytes as usize);
            is_first || total <= bytes_max
        });
        fitting.map(|place| (place.offset, place.packed)).collect()
    }

    async fn block(&self, number: usize, block: &BlockRef) -> Result<Bytes, LayerError> {
        let number = u32::try_from(number).expect("an index has less than 2^32 entries");
        self.file.block(number, block.offset, &block.packed).await
    }

    /// See [`crate::layers::FileLayer::block_of`].
    pub(super) fn block_of(&self, key: Key) -> Option<usize> {
        if !filter::may_contain(&self.filter, key) {
            return None;
        }
        let number = self.index.partition_point(|block| block.key <= key).checked_sub(1)?;
        // One that begins with the key may follow on others that have it.
        self.index.get(number).is_some_and(|block| block.key < key).then_some(number)
    }

    /// Appends the values of `key` within `lsns` to `out`, newest first, up to and including the
    /// first base. Never [`Lookup::Absent`]. After an error, `out` may have got some of them.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn collect(
        &self,
        key: Key,
        lsns: &LsnRange,
        out: &mut Values,
    ) -> Result<Answer, LayerError> {
        if !self.name().keys().contains(&key) || !filter::may_contain(&self.filter, key) {
            return Ok(Answer::NOTHING);
        }
        let after = self.index.partition_point(|block| (block.key, block.lsn) < (key, lsns.end));
        for (number, place) in self.index.iter().enumerate().take(after).rev() {
            let block = self.block(number, place).await?;
            let found = collect_in_block(&block, key, lsns, out);
            match found.map_err(|what| self.file.damaged(place.offset, what))? {
                Lookup::Continue => {}
                done => return Ok(Answer { lookup: done, is_read: true }),
            }
            // The block before can only have more if this one begins within the wanted range.
            if place.key != key || place.lsn < lsns.start {
                break;
            }
        }
        Ok(Answer { lookup: Lookup::Continue, is_read: after > 0 })
    }

    /// See [`crate::layers::FileLayer::held`].
    pub(super) fn held(&self, key: Key, lsns: &LsnRange, out: &mut Values) -> Option<Answer> {
        if !self.name().keys().contains(&key) || !filter::may_contain(&self.filter, key) {
            return Some(Answer::NOTHING);
        }
        let after = self.index.partition_point(|block| (block.key, block.lsn) < (key, lsns.end));
        for (number, place) in self.index.iter().enumerate().take(after).rev() {
            let block = self.file.held_block(u32::try_from(number).ok()?)?;
            let lookup = collect_in_block(&block, key, lsns, out).ok()?;
            if lookup != Lookup::Continue {
                return Some(Answer { lookup, is_read: true });
            }
            if place.key != key || place.lsn < lsns.start {
                break;
            }
        }
        Some(Answer { lookup: Lookup::Continue, is_read: after > 0 })
    }

    /// For every key of the range, its newest value with `lsn < below`, unless `out` has a newer.
    ///
    /// # Errors
    /// [`LayerError::Damaged`], [`LayerError::Io`].
    pub async fn scan(
        &self,
        keys: &KeyRange,
        below: Lsn,
        out: &mut Newest,
    ) -> Result<(), LayerError> {
        let first = self.index.partition_point(|block| block.key < keys.start).saturating_sub(1);
        for (number, place) in self.index.iter().enumerate().skip(first) {
            if place.key >= keys.end {
                break;
            }
            let block = self.block(number, place).await?;
            scan_block(&block, keys, below, out)
                .map_err(|what| self.file.damaged(place.offset, what))?;
        }
        Ok(())
    }

    /// Reads everything and checks what opening did not.
    pub(super) async fn check(&self, io: &I) -> Result<(), LayerError> {
        let mut last = None;
        let mut key_count = 0;
        for place in &self.index {
            let block = self.file.read(place.offset, &place.packed).await?;
            self.check_block(place, &block, &mut last, &mut key_count)
                .map_err(|what| self.file.damaged(place.offset, what))?;
            io.yield_if_needed().await;
        }
        if key_count != self.file.footer().key_count {
            return Err(self.file.damaged(self.file.footer().data_end, "wrong number of keys"));
        }
        Ok(())
    }

    fn check_block(
        &self,
        place: &BlockRef,
        block: &Bytes,
        last: &mut Option<(Key, Lsn)>,
        key_count: &mut u64,
    ) -> Result<(), &'static str> {
        let mut entries = BlockEntries::new(block);
        let mut value_count = 0;
        let name = self.name();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let at = (entry.key, entry.lsn);
            if value_count == 0 && at != (place.key, place.lsn) {
                return Err("a block does not begin where the index says");
            }
            if last.is_some_and(|last| at < last) {
                return Err("values are out of order");
            }
            if !name.keys().contains(&entry.key) || !name.lsns().contains(&entry.lsn) {
                return Err("a value is outside the ranges of the layer");
            }
            if last.is_none_or(|(key, _)| key != entry.key) {
                *key_count += 1;
                if !filter::may_contain(&self.filter, entry.key) {
                    return Err("the filter denies a key that is there");
                }
            }
            entries.value(&entry)?;
            *last = Some(at);
            value_count += 1;
        }
        match value_count == place.value_count {
            true => Ok(()),
            false => Err("a block has another number of values than the index says"),
        }
    }

    /// Closes the file and drops its blocks from the cache.
    ///
    /// # Errors
    /// [`LayerError::Io`].
    pub async fn close(self) -> Result<(), LayerError> {
        self.file.close().await
    }
}

/// Appends the values of a key in one block, newest first, up to a base.
fn collect_in_block(
    block: &Bytes,
    key: Key,
    lsns: &LsnRange,
    out: &mut Values,
) -> Result<Lookup, &'static str> {
    let mut entries = BlockEntries::new(block);
    let mut found = Vec::new();
    for entry in entries.by_ref() {
        let entry = entry?;
        if (entry.key, entry.lsn) >= (key, lsns.end) {
            break;
        }
        if entry.key == key && entry.lsn >= lsns.start {
            found.push(entry);
        }
    }
    for entry in found.iter().rev() {
        let value = entries.value(entry)?;
        let is_base = value.is_base();
        out.push((entry.lsn, value));
        if is_base {
            return Ok(Lookup::Complete);
        }
    }
    Ok(Lookup::Continue)
}

fn scan_block(
    block: &Bytes,
    keys: &KeyRange,
    below: Lsn,
    out: &mut Newest,
) -> Result<(), &'static str> {
    let mut entries = BlockEntries::new(block);
    while let Some(entry) = entries.next() {
        let entry = entry?;
        if entry.key >= keys.end {
            break;
        }
        if entry.key >= keys.start && entry.lsn < below {
            keep_newest(out, entry.key, entry.lsn, &entries.value(&entry)?);
        }
    }
    Ok(())
}
