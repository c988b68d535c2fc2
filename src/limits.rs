//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES % crate::io::ALIGNMENT as u64 == 0);

// Layer files.

/// Raw bytes that a data block of a delta layer is filled to; only a single larger value exceeds it.
pub const LAYER_BLOCK_BYTES_TARGET: usize = 16 * 1024;
/// Largest raw size of a data block: one block around the largest value.
pub const LAYER_BLOCK_BYTES_MAX: usize = WAL_RECORD_BYTES_MAX + 256;
/// Size of the writes that a layer file is made with.
pub const LAYER_WRITE_BYTES: usize = 1024 * 1024;
/// Largest single read of a layer file; more is read in several.
pub const LAYER_READ_BYTES_MAX: usize = 1024 * 1024;
/// What is read at the end of a layer file when it is opened: footer, and mostly index and filter.
pub const LAYER_OPEN_READ_BYTES: usize = 64 * 1024;
/// Data blocks of one delta layer.
pub const LAYER_DELTA_BLOCKS_MAX: usize = 1 << 20;
/// Distinct keys of one delta layer.
pub const LAYER_DELTA_KEYS_MAX: usize = 1 << 23;
/// Values of one image layer.
pub const LAYER_IMAGE_VALUES_MAX: usize = 1 << 20;
/// Raw size of the index of a layer file.
pub const LAYER_INDEX_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Size of the filter of a layer file.
pub const LAYER_FILTER_BYTES_MAX: usize = 16 * 1024 * 1024;

const _: () = assert!(LAYER_BLOCK_BYTES_MAX < u32::MAX as usize);
const _: () = assert!(LAYER_WRITE_BYTES.is_multiple_of(crate::io::ALIGNMENT));
const _: () = assert!(LAYER_READ_BYTES_MAX.is_multiple_of(crate::io::ALIGNMENT));
const _: () = assert!(LAYER_OPEN_READ_BYTES <= LAYER_READ_BYTES_MAX);
