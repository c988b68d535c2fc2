//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES % crate::io::ALIGNMENT as u64 == 0);

// Proof tooling (cli).

/// Time that a stock PostgreSQL server may take to start.
pub const PG_START_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(60);

/// Time that a stock PostgreSQL server may take to stop.
pub const PG_STOP_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(120);

/// Time that a stand-by may take to replay WAL up to the LSN of a comparison.
pub const ORACLE_REPLAY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(1800);

/// Pause between two looks at a child process.
pub const PG_POLL: std::time::Duration = std::time::Duration::from_millis(50);

/// Requests that `pgstrata verify` keeps in flight on its connection.
pub const VERIFY_PIPELINE_DEPTH: usize = 64;

/// Time that the page client waits for bytes from the node.
pub const PAGE_CLIENT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(120);

/// Longest message that the page client takes from a node, in bytes.
pub const PAGE_CLIENT_MESSAGE_BYTES_MAX: usize = 1024 * 1024;

/// Differences that `pgstrata verify` describes one by one.
pub const VERIFY_DETAILS_MAX: usize = 20;
