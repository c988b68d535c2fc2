//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES % crate::io::ALIGNMENT as u64 == 0);

// Redo.

/// Largest WAL record that is given to redo, in bytes; the wal-redo process has the same bound.
pub const REDO_RECORD_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Longest text in a reply of the wal-redo process, in bytes.
pub const REDO_TEXT_BYTES_MAX: usize = 4096;
/// Redo requests of one tenant on one core that wait for the process's thread.
pub const REDO_QUEUE_REQUESTS: usize = 128;
/// Redo requests that are written to the process in one go.
pub const REDO_BATCH_REQUESTS: usize = 64;
/// Bytes of requests that are written to the process in one go; one request may be larger.
pub const REDO_BATCH_BYTES: usize = 4 * 1024 * 1024;
/// Time until a started wal-redo process must answer its first ping.
pub const REDO_START_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);
/// Longest wait in one poll of the process's pipes; bounds how long a shutdown goes unnoticed.
pub const REDO_POLL: std::time::Duration = std::time::Duration::from_millis(20);
