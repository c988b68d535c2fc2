//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES % crate::io::ALIGNMENT as u64 == 0);

/// The journal takes this much WAL into memory before its source has to wait, in bytes.
pub const JOURNAL_BUFFER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Largest single write of the journal, in bytes.
pub const JOURNAL_WRITE_BYTES_MAX: usize = 1024 * 1024;
const _: () = assert!(JOURNAL_WRITE_BYTES_MAX % crate::io::ALIGNMENT == 0);

/// Ingest reads the journal back in pieces of this many bytes at start.
pub const JOURNAL_REPLAY_BYTES: usize = 1024 * 1024;

/// Jobs that may wait for a background executor.
pub const BACKGROUND_JOBS_MAX: usize = 1024;

/// Relation sizes that one timeline keeps in memory.
pub const REL_SIZE_CACHE_ENTRIES_MAX: usize = 64 * 1024;
/// A single WAL record may leave at most this many blocks of a fork empty before the one that it
/// writes. PostgreSQL extends relations block by block; gaps come from crashes only.
pub const REL_GAP_BLOCKS_MAX: u32 = 1024 * 1024;

/// Frozen layers of one timeline that may wait for their checkpoint before ingest has to.
pub const FROZEN_LAYERS_MAX: usize = 3;
/// A layer is closed when it covers this many times `checkpoint_distance_bytes` of WAL, however
/// little of it is kept.
pub const LSN_DISTANCE_FACTOR: u64 = 4;
/// Pause before a failed checkpoint is tried again, in milliseconds.
pub const CHECKPOINT_RETRY_MS: u64 = 1000;

/// A WAL source hears from us at least this often, in milliseconds.
pub const STATUS_INTERVAL_MS: u64 = 1000;
/// Ingest looks again this often while it waits for a checkpoint, in milliseconds.
pub const INGEST_PAUSE_MS: u64 = 5;

/// At shutdown, WAL receivers have this long to end by themselves, in milliseconds.
pub const STOP_WAIT_MS: u64 = 10_000;
/// Pause between two looks at whether they have ended, in milliseconds.
pub const STOP_POLL_MS: u64 = 2;

/// Largest single read or write that is given to the device, in bytes.
pub const DEVICE_IO_BYTES_MAX: usize = 1024 * 1024;
const _: () = assert!(JOURNAL_WRITE_BYTES_MAX <= DEVICE_IO_BYTES_MAX);
/// Largest file that is read and written whole (timeline indexes), in bytes.
pub const SMALL_FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Tasks that serve requests and take in WAL get their turn within this time, in microseconds.
pub const SERVE_LATENCY_US: u64 = 500;

/// CPUs that one node uses at most.
pub const CORES_MAX: usize = 256;
