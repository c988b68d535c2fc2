//! Bounds of compaction.

use super::*;

/// L0 layers that a timeline may have; ingest waits rather than let there be more.
pub const L0_LAYERS_MAX: usize = 10;
/// An image job ends early, with what it has, when there are so many L0 layers.
pub const L0_LAYERS_URGENT: usize = 8;
/// Input of one merge of L0 layers, in bytes; one larger layer is taken alone.
pub const COMPACT_L0_INPUT_BYTES_MAX: u64 = 1024 * 1024 * 1024;
/// Input of one merge of L1 layers, in bytes.
pub const COMPACT_L1_INPUT_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// Levels of L1 layers that one merge takes: it reads as many files at once.
pub const COMPACT_LEVELS_MAX: usize = 16;
/// L0 layers are merged though they are few when together they hold so many records of each page,
/// in thousandths, by their bytes; these are 64 for a record and 4 KiB for a page, which is three
/// times too few of the first with small pages.
pub const COMPACT_L0_RECORDS_MILLI: u64 = 1200;
/// Rows of L1 layers, counted as in `COMPACT_DEPTH_MAX`, that a merge of L0 layers leaves.
pub const COMPACT_ROWS_MAX: u64 = 3;
/// A merge of L0 layers takes the next row of L1 layers along if it is at most so many times as
/// large as all that is merged already.
pub const COMPACT_ROW_FACTOR: u64 = 1;
/// Images come before merges of L0 layers where the deltas have grown to so many percent of what
/// they are due at.
pub const COMPACT_IMAGE_OVERDUE_PERCENT: u64 = 150;
/// L1 layers that a key may lie in, counted by the share of their keys that they hold, before
/// images are made or layers are merged.
pub const COMPACT_DEPTH_MAX: u64 = 3;
/// A page with more records than this behind its newest base gets an image when it is merged, and
/// with fewer where other rows are left below: these are shared by all rows.
pub const COMPACT_CHAIN_MAX: usize = 72;
/// Less, down to this, by the records that so many L0 layers have of a page, in thousandths of a
/// layer.
pub const COMPACT_CHAIN_TIGHT: usize = 8;
/// See `COMPACT_CHAIN_TIGHT`.
pub const COMPACT_CHAIN_LAYERS_MILLI: u64 = 16_000;
/// A page with no more than this never gets one.
pub const COMPACT_CHAIN_MIN: usize = 4;
/// Within a longer row of records of one page, an image follows on so many bytes of records.
pub const COMPACT_HISTORY_IMAGE_BYTES: usize = 32 * 1024;
/// Stored bytes of a delta layer that hold one record of every page of a range count as one
/// level: an image of 4 KiB for each, a record of 64 bytes.
pub const COMPACT_SPARSE_FACTOR: u64 = 64;
/// Image layers that one job makes before others have their turn.
pub const COMPACT_IMAGE_PIECES_MAX: usize = 8;
/// Values of one image layer that compaction makes: its index is held in memory meanwhile.
pub const COMPACT_IMAGE_VALUES_MAX: usize = 1 << 18;
/// Neighbouring blocks of one layer that a merge reads at once, in bytes.
pub const COMPACT_READ_BYTES: usize = 128 * 1024;
/// Pages that a job has rebuilt at the same time.
pub const COMPACT_REDO_CONCURRENT_MAX: usize = 16;
/// Pages that a job could not rebuild that it names in the log.
pub const COMPACT_FAILURES_LOGGED: u64 = 10;
/// Values that wait for the pages before them, in bytes.
pub const COMPACT_WINDOW_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Values of one page that are gathered before they are worked off, in bytes.
pub const COMPACT_GROUP_BYTES_MAX: usize = 1024 * 1024;
/// Layer files that a job keeps open to read single pages.
pub const COMPACT_POINT_READERS_MAX: usize = 16;
/// Memory for blocks of those, in bytes.
pub const COMPACT_POINT_CACHE_BYTES: usize = 4 * 1024 * 1024;
/// Distinct keys of one layer that a merge writes: its filter takes 8 bytes each until the end.
pub const COMPACT_KEYS_MAX: u64 = 1 << 20;
/// First pause after a compaction that failed, in milliseconds; it doubles up to the longest.
pub const COMPACT_RETRY_MS_MIN: u64 = 500;
/// Longest pause after a compaction that failed, in milliseconds.
pub const COMPACT_RETRY_MS_MAX: u64 = 60_000;
/// Pause between two looks at whether the last reader of a removed layer is gone.
pub const COMPACT_REMOVE_POLL_MS: u64 = 100;

const _: () = assert!(L0_LAYERS_URGENT < L0_LAYERS_MAX);
const _: () = assert!(COMPACT_IMAGE_VALUES_MAX < LAYER_IMAGE_VALUES_MAX);
const _: () = assert!(COMPACT_KEYS_MAX <= LAYER_DELTA_KEYS_MAX as u64);
// Memory of a merge: two pieces (packed, unpacked twice as large) for each level.
const _: () = assert!(COMPACT_LEVELS_MAX * 3 * COMPACT_READ_BYTES <= 8 * 1024 * 1024);
