//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES % crate::io::ALIGNMENT as u64 == 0);

// Connections and the page service.

/// Largest start-up packet in bytes (`MAX_STARTUP_PACKET_LENGTH`).
pub const STARTUP_PACKET_BYTES_MAX: usize = 10_000;

/// Largest later message of a client in bytes, its type byte apart. Requests are short; so are
/// commands.
pub const CLIENT_MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// Bytes that one read from a connection asks for. A whole message always fits into the buffer.
pub const CONNECTION_READ_BYTES: usize = 32 * 1024;

/// Replies of one connection that may stand in memory before they are written.
pub const CONNECTION_REPLY_BYTES_MAX: usize = 512 * 1024;

/// Page requests of one connection that are under way at once.
pub const PAGE_REQUESTS_CONCURRENT_MAX: usize = 32;

/// Prepared statements and portals that one connection may hold, each.
pub const CONNECTION_STATEMENTS_MAX: usize = 64;

/// Connections that one core serves at once.
pub const CONNECTIONS_PER_CORE_MAX: usize = 10_000;

/// A connection that has not finished its start-up by then is closed.
pub const CONNECTION_STARTUP_MS_MAX: u64 = 60_000;

/// A connection on which nothing comes in for so long is closed.
pub const CONNECTION_IDLE_MS_MAX: u64 = 600_000;

/// A client that takes no byte of its replies for so long is cut off.
pub const CONNECTION_WRITE_MS_MAX: u64 = 60_000;

/// Times that a connection may be handed on without serving a command. Owners do not change while
/// the node runs, so one is the most that is ever needed.
pub const CONNECTION_HOPS_MAX: u32 = 4;

/// Messages that wait in the inbox of one core.
pub const CORE_INBOX_MESSAGES_MAX: usize = 1024;

/// Jobs that wait for the background executor of one core.
pub const BACKGROUND_JOBS_MAX: usize = 256;

/// The control thread looks at every executor's progress so often. Where it finds none, it sends
/// a wake-up.
pub const HEARTBEAT_INTERVAL_MS: u64 = 5;

/// Wake-ups that an executor gets without answering one. glommio panics at 32,767.
pub const HEARTBEATS_UNANSWERED_MAX: u64 = 16_000;

/// Executors check so often whether a task has run for its slice.
pub const PREEMPT_INTERVAL_US: u64 = 250;

/// How long connections get to end at shutdown.
pub const CONNECTION_DRAIN_MS_MAX: u64 = 5_000;

/// How long the admin API waits for a core's answer.
pub const CONTROL_REPLY_MS_MAX: u64 = 30_000;

/// Largest body of an admin request, in bytes.
pub const ADMIN_BODY_BYTES_MAX: usize = 64 * 1024;

const _: () = assert!(STARTUP_PACKET_BYTES_MAX <= CLIENT_MESSAGE_BYTES_MAX);
