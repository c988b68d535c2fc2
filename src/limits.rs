//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES % crate::io::ALIGNMENT as u64 == 0);

// WAL source: connection, base backup, imported files.

/// Largest message that a WAL source may send, in bytes. PostgreSQL sends WAL in messages of up
/// to 128 KiB (`MAX_SEND_SIZE`) and backups in messages of 32 KiB.
pub const SOURCE_MESSAGE_BYTES_MAX: usize = 1024 * 1024;
/// Bytes asked for in one read from a WAL source.
pub const SOURCE_READ_BYTES: usize = 128 * 1024;
/// Rows that one query to a WAL source may return.
pub const SOURCE_ROWS_MAX: usize = 10_000;
/// Time to wait for a connection and for logging in, unless `connect_timeout` says otherwise.
pub const SOURCE_CONNECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
/// First wait before reconnecting to a WAL source.
pub const SOURCE_BACKOFF_MIN: std::time::Duration = std::time::Duration::from_millis(100);
/// Longest wait before reconnecting to a WAL source.
pub const SOURCE_BACKOFF_MAX: std::time::Duration = std::time::Duration::from_secs(10);
/// After this much silence a WAL source is asked for a reply.
pub const SOURCE_ASK_AFTER: std::time::Duration = std::time::Duration::from_secs(30);
/// After this much silence a WAL source counts as dead (`wal_receiver_timeout`).
pub const SOURCE_SILENCE_MAX: std::time::Duration = std::time::Duration::from_secs(60);
/// Longest connection string, in bytes.
pub const CONNINFO_BYTES_MAX: usize = 64 * 1024;
/// Longest path within a base backup, in bytes.
pub const BACKUP_PATH_BYTES_MAX: usize = 4096;
/// Largest small file of an imported data directory that is read whole, in bytes
/// (`backup_label`, `PG_VERSION`, `pg_twophase/*`).
pub const IMPORT_SMALL_FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Bytes read at once from an imported data file.
pub const IMPORT_READ_BYTES: usize = 256 * 1024;

const _: () = assert!(SOURCE_ASK_AFTER.as_millis() < SOURCE_SILENCE_MAX.as_millis());
const _: () = assert!(IMPORT_READ_BYTES.is_multiple_of(crate::base::page::PAGE_SIZE));
