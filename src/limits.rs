//! Every bound of the program, with the relations between them.

/// Largest WAL record that PostgreSQL 15 can write, in bytes (`MaxAllocSize`, 1 GiB - 1).
pub const WAL_RECORD_BYTES_MAX: usize = 0x3fff_ffff;

/// Size of a journal segment in bytes.
pub const JOURNAL_SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

const _: () = assert!(JOURNAL_SEGMENT_BYTES.is_multiple_of(crate::io::ALIGNMENT as u64));

/// The journal takes this much WAL into memory before its source has to wait, in bytes.
pub const JOURNAL_BUFFER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Largest single write of the journal, in bytes.
pub const JOURNAL_WRITE_BYTES_MAX: usize = 1024 * 1024;
const _: () = assert!(JOURNAL_WRITE_BYTES_MAX.is_multiple_of(crate::io::ALIGNMENT));

/// How far a journal is synced is noted at most this long after it is so, in milliseconds, while
/// WAL comes in.
pub const JOURNAL_MARK_INTERVAL_MS: u64 = 1000;
/// And when so many bytes of WAL have been synced since the last note.
pub const JOURNAL_MARK_BYTES: u64 = JOURNAL_SEGMENT_BYTES;
/// A journal that ends before the place up to which it was synced is read so many times before
/// that is believed: a read may be wrong once.
pub const JOURNAL_END_LOOKS: usize = 4;

/// Ingest reads the journal back in pieces of this many bytes at start.
pub const JOURNAL_REPLAY_BYTES: usize = 1024 * 1024;

/// Relation sizes that one timeline keeps in memory.
pub const REL_SIZE_CACHE_ENTRIES_MAX: usize = 64 * 1024;
/// Forks of a timeline of which it is remembered what size a read has found.
pub const FOUND_SIZES: usize = 64;
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
/// Tasks that take in WAL, or may wait, let others have their turn after this time, in
/// microseconds.
pub const WORK_SLICE_US: u64 = 100;

/// CPUs that one node uses at most.
pub const CORES_MAX: usize = 256;
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

/// Largest `backup_manifest` that is read, in bytes.
pub const BACKUP_MANIFEST_BYTES_MAX: u64 = 256 * 1024 * 1024;
// Layer files.

/// Raw bytes that a data block of a delta layer is filled to; only a single larger value exceeds it.
pub const LAYER_BLOCK_BYTES_TARGET: usize = 16 * 1024;
/// Largest raw size of a data block: one block around the largest value.
pub const LAYER_BLOCK_BYTES_MAX: usize = WAL_RECORD_BYTES_MAX + 256;
/// Size of the writes that a layer file is made with.
/// Reads that come in meanwhile wait for one of them, so they are small; several at once reach the
/// device's rate.
pub const LAYER_WRITE_BYTES: usize = 256 * 1024;
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
// WAL decoding.

/// Bytes reserved for a WAL record on the word of its length field alone; a longer record takes
/// memory only as its bytes come in.
pub const WAL_RECORD_RESERVE_BYTES: usize = 64 * 1024;
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
pub const CONNECTIONS_PER_CORE_MAX: usize = 20_000;

/// A connection that has not finished its start-up by then is closed.
pub const CONNECTION_STARTUP_MS_MAX: u64 = 60_000;

/// A connection on which nothing comes in for so long is closed.
pub const CONNECTION_IDLE_MS_MAX: u64 = 600_000;

/// A client that takes no byte of its replies for so long is cut off; sooner in unit tests, which
/// wait for it.
pub const CONNECTION_WRITE_MS_MAX: u64 = if cfg!(test) { 3_000 } else { 60_000 };

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

/// Executors that only serve requests look so often at what has come in, in microseconds. A look
/// is two system calls and a timer, and what was there at the last one is worked off by then,
/// mostly.
pub const PREEMPT_INTERVAL_US: u64 = 500;

/// Length of a turn of a serving executor, for the kernel's scheduler.
pub const SERVE_SLICE_US: u64 = 100;

/// How long connections get to end at shutdown.
pub const CONNECTION_DRAIN_MS_MAX: u64 = 5_000;

/// How long the admin API waits for a core's answer.
pub const CONTROL_REPLY_MS_MAX: u64 = 30_000;

/// For so long a node that starts looks whether somebody else listens at its address, in
/// milliseconds.
pub const LISTEN_PROBE_MS_MAX: u64 = 1000;

/// For so long a question about the keyspace waits for WAL, in milliseconds.
pub const KEYSPACE_WAIT_MS_MAX: u64 = 10_000;
const _: () = assert!(KEYSPACE_WAIT_MS_MAX < CONTROL_REPLY_MS_MAX);

/// Largest body of an admin request, in bytes.
pub const ADMIN_BODY_BYTES_MAX: usize = 64 * 1024;

const _: () = assert!(STARTUP_PACKET_BYTES_MAX <= CLIENT_MESSAGE_BYTES_MAX);

/// Largest password file that is read, in bytes.
pub const PASSFILE_BYTES_MAX: u64 = 1024 * 1024;
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

/// An import looks this often whether it is to end early.
pub const IMPORT_CANCEL_POLL_MS: u64 = 50;

/// An executor that has not run its first task after this time, in milliseconds, is replaced.
pub const EXECUTOR_START_MS_MAX: u64 = 2_000;
/// Executors that are made for one place before the node gives up.
pub const EXECUTOR_STARTS_MAX: usize = 5;

/// A node that is done waits so long for clients of its admin API.
pub const ADMIN_STOP_MAX: std::time::Duration = std::time::Duration::from_secs(5);
/// A node that may have fewer files open warns of it.
pub const OPEN_FILES_FEW: u64 = 1024;
/// Layer files that a core keeps open, each with a descriptor.
pub const LAYER_READERS_MAX: usize = 4096;
/// The same, where the process may have few files open.
pub const LAYER_READERS_MIN: usize = 16;
/// Memory of the indexes and filters of the layer files that a core keeps open, in bytes.
pub const LAYER_READERS_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Of the open layer files, so many eighths stay when there are too many.
pub const LAYER_READERS_KEPT_OF_8: usize = 7;
const _: () = assert!(LAYER_READERS_KEPT_OF_8 < 8);

/// Findings of damage that a timeline keeps for the admin API.
pub const DAMAGE_REPORTS_MAX: usize = 100;
/// Pause before a journal that found no room tries again, in milliseconds.
pub const NO_SPACE_RETRY_MS: u64 = 500;
/// Ingest waits when open and frozen layers take so much of their budget.
pub const MEMORY_OVERDRAFT_PERCENT: u64 = 200;
const _: () = assert!(MEMORY_OVERDRAFT_PERCENT > 100);
// Check.

/// Bytes that `pgstrata check` reads at once where it reads on.
pub const READ_AHEAD_BYTES: usize = 1024 * 1024;
const _: () = assert!(READ_AHEAD_BYTES.is_multiple_of(crate::io::ALIGNMENT));
/// Times that `pgstrata check` looks at something before it calls it damaged: a running node may
/// be changing it.
pub const CHECK_LOOKS: usize = 3;
/// Pause between two such looks, in milliseconds.
pub const CHECK_LOOK_PAUSE_MS: u64 = 30;
/// Times that `pgstrata check` goes through a timeline for layers that are new since it began.
pub const CHECK_ROUNDS_MAX: usize = 5;
/// Contradictions of one timeline's index that `pgstrata check` names.
pub const CHECK_PROBLEMS_MAX: usize = 100;
// Native redo.

/// WAL records that one redo request applies natively before other tasks of the core get their
/// turn.
pub const REDO_NATIVE_SLICE_RECORDS: usize = 256;
/// So many in a thousand of the records that change pages need no wal-redo process, at least, of
/// pgbench and of a load like TPC-C.
pub const REDO_NATIVE_RECORDS_PERMILLE: u64 = 995;
/// So many in a thousand of the pages that are rebuilt need none.
pub const REDO_NATIVE_PAGES_PERMILLE: u64 = 980;
/// Redo requests that `pgstrata redo compare` has under way.
pub const REDO_COMPARE_DEPTH: usize = 2 * REDO_BATCH_REQUESTS;
// Compaction: a file of its own.

mod compaction;

pub use compaction::*;

// Branches.

/// Values that wait for their image layer while a branch is detached from its ancestor, or a
/// database is copied.
pub const IMAGE_QUEUE_VALUES: usize = 64;
/// Pages that are rebuilt at once for it.
pub const IMAGE_READS_CONCURRENT: usize = 8;
// History: garbage collection, leases, commit times.

/// Samples of commit times that a timeline keeps, of 16 bytes each.
pub const COMMIT_TIMES_MAX: usize = 65_536;
/// Commits within this time share a sample, in microseconds.
pub const COMMIT_TIMES_WIDTH_US: i64 = 1_000_000;
/// When there are too many samples, those of an age share one for so much of it: 1/14,000, which
/// is 43 s after a week. 65,536 samples reach for 7 days at a commit every second.
pub const COMMIT_TIMES_SHARE_OF_AGE: i64 = 14_000;
/// A primary whose clock is so far ahead of the node's is told of in the log, in seconds: commits
/// of the future hold up garbage collection by time.
pub const COMMIT_TIME_AHEAD_S_MAX: u64 = 3600;
/// Leases of one timeline.
pub const LEASES_MAX: usize = 1024;
/// Time that a lease is given when none is asked for, in seconds.
pub const LEASE_S_DEFAULT: u64 = 600;
/// Longest time that a lease is given, in seconds; it can be renewed.
pub const LEASE_S_MAX: u64 = 30 * 24 * 3600;
/// Pause between two looks at whether reads of removed layers have ended, in milliseconds.
pub const GC_READERS_POLL_MS: u64 = 20;
/// Looks before the files are left to the next collection.
pub const GC_READERS_POLLS: u32 = 50;
/// Removed layers that a reply names.
pub const GC_NAMES_MAX: usize = 1000;

/// Where garbage collection is switched off, its setting is looked at again so often.
pub const GC_SETTING_LOOK_MS: u64 = 60_000;
// Raw WAL in memory.

/// A piece of WAL that is shorter is copied, in bytes: whoever sent it may hold much more memory.
pub const RAW_WAL_SMALL_BYTES: usize = 16 * 1024;
/// Memory that is taken for such pieces at once, in bytes.
pub const RAW_WAL_CHUNK_BYTES: usize = 64 * 1024;
const _: () = assert!(RAW_WAL_SMALL_BYTES <= RAW_WAL_CHUNK_BYTES);
/// Records that ingest takes in before other tasks get their turn.
pub const INGEST_SLICE_RECORDS: usize = 32;
/// Pages of a core of which it remembers that they were asked for last.
pub const RECENT_PAGES: usize = 16 * 1024;
/// New layers are read at these pages for so long at most before they are used.
pub const LAYER_WARM_UP_MAX: std::time::Duration = std::time::Duration::from_millis(600);
/// And for one part in so many of the time that it took to make them,
pub const LAYER_WARM_UP_SHARE: u32 = 2;
/// but for so long where that is less.
pub const LAYER_WARM_UP_MIN: std::time::Duration = std::time::Duration::from_millis(5);
/// Pages that are read at once for that.
pub const LAYER_WARM_UP_CONCURRENT: usize = 4;
/// From this offset on, a layer file is given space ahead of its writes, so much at a time, in
/// bytes: an eighth of what is there already, and not more than its end takes back at once.
pub const LAYER_SPACE_BYTES: u64 = SPARE_TRIM_BYTES;
/// See [`LAYER_SPACE_BYTES`].
pub const LAYER_SPACE_FROM: u64 = 8 * LAYER_SPACE_BYTES;
/// Writes of one layer file that the device has at once, of [`LAYER_WRITE_BYTES`] at most.
pub const LAYER_WRITES_MAX: usize = 5;
// Idle timelines.

/// Within the time after which an unused timeline is closed, it is looked at so often.
pub const IDLE_LOOKS: u64 = 4;
/// Pause between two looks at whether the tasks of a timeline that is being closed have ended, in
/// milliseconds.
pub const CLOSING_POLL_MS: u64 = 1;
/// Pause between two looks at whether the other syncs of a directory have ended, in milliseconds.
pub const DIR_SYNC_POLL_MS: u64 = 1;
/// Within this time each timeline that is closed and has history is opened once and collected, in
/// milliseconds.
pub const CLOSED_GC_PERIOD_MS: u64 = 24 * 3600 * 1000;
// Back-pressure.

/// Ingest is not slowed for the checkpoint while so many thousandths of layers are in memory,
/// open or frozen: one may be written while the next fills.
pub const INGEST_FROZEN_MILLI_FREE: u64 = 1500;
/// L0 layers, with those in memory, of which WAL is taken in as fast as compaction works it off.
pub const INGEST_EVEN_LAYERS: u64 = 4;
/// The same of the records that they hold of each page.
pub const INGEST_EVEN_RECORDS: u64 = 10;
/// Ingest is not slowed for the depth of reads up to so many thousandths of the lower of the two.
pub const INGEST_DEPTH_MILLI_FREE: u64 = 550;
/// Where the rate falls to the half each time that so much comes to it.
pub const INGEST_DEPTH_MILLI_HALF: u64 = 150;
/// Where the rate is lowest as long as it is not known how fast compaction is.
pub const INGEST_DEPTH_MILLI_FULL: u64 = 2500;
/// Ingest is not slowed for memory while open and frozen layers take so much of their budget.
pub const INGEST_MEMORY_PERCENT_FREE: u64 = 120;
/// The rate at which slowing begins, in bytes per second: more than a core can decode.
pub const INGEST_FAST_BYTES_PER_S: u64 = 1 << 30;
/// The rate at which it ends: a layer in so many seconds.
pub const INGEST_SLOWEST_LAYER_S: u64 = 256;
/// WAL is taken in at this rate at least when L0 layers cannot be merged, in bytes per second.
pub const INGEST_STUCK_BYTES_PER_S: u64 = 1 << 20;
/// Merges of L0 layers that fail one after the other before they count as stuck.
pub const L0_MERGE_FAILURES_MAX: u32 = 3;
/// Layers of one read that are read at once, once it is known that one is not enough; all but one
/// of them may turn out not to be needed.
pub const READ_LAYERS_CONCURRENT_MAX: usize = 4;

const _: () = assert!(INGEST_FROZEN_MILLI_FREE < FROZEN_LAYERS_MAX as u64 * 1000);
const _: () = assert!(INGEST_EVEN_LAYERS < L0_LAYERS_URGENT as u64);
const _: () = assert!(INGEST_MEMORY_PERCENT_FREE < MEMORY_OVERDRAFT_PERCENT);
// Read depth.

/// Numbers of layers that a read may take blocks of and that are counted one by one.
pub const READ_LAYERS_COUNTED: usize = 32;
/// Numbers of records that a read may apply and that are counted one by one.
pub const READ_RECORDS_COUNTED: usize = 256;
// Wal-redo processes.

/// Wal-redo processes of one core at the same time, spares included.
pub const REDO_PROCESSES_MAX: usize = 8;
/// Of these, started but bound to no tenant yet.
pub const REDO_SPARES: usize = 1;
/// A process without a request for so long is ended.
pub const REDO_IDLE: std::time::Duration = std::time::Duration::from_secs(60);
/// A process that others wait for is given up after this time, however many requests come in.
pub const REDO_SLICE: std::time::Duration = std::time::Duration::from_millis(500);
/// Tenants of one core, jobs in the background included, that redo can serve.
pub const REDO_SEATS_MAX: usize = 64 * 1024;
/// A process that was busy for so long is replaced: the kernel ends it after an hour of CPU time.
pub const REDO_PROCESS_BUSY_MAX: std::time::Duration = std::time::Duration::from_secs(1800);
/// Inputs of failed redo that a node keeps.
pub const REDO_FAILED_FILES_MAX: usize = 64;
/// Largest input of failed redo that is kept, in bytes.
pub const REDO_FAILED_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Bytes that are read from a process in one go.
pub const REDO_INPUT_BYTES: usize = 64 * 1024;
/// Size of the pipe for its replies, in bytes.
pub const REDO_PIPE_BYTES: i32 = 128 * 1024;
/// An executor waits so long for an answer that it expects at once; then a thread goes on. Until
/// then the CPU is the process's, which would compete for it anyway.
pub const REDO_INLINE_WAIT: std::time::Duration = std::time::Duration::from_micros(50);
/// Requests that an executor sends to a process in one go: their answers come within that time.
pub const REDO_INLINE_REQUESTS: usize = 4;
/// Records in those.
pub const REDO_INLINE_RECORDS: usize = 32;
/// Bytes of those: they fit into a pipe.
pub const REDO_INLINE_BYTES: usize = 32 * 1024;
/// While its tenant asks again within this time, a process keeps it until the end of its slice.
pub const REDO_QUIET: std::time::Duration = std::time::Duration::from_millis(1);

const _: () = assert!(REDO_SPARES < REDO_PROCESSES_MAX);
const _: () = assert!(REDO_FAILED_BYTES_MAX > REDO_RECORD_BYTES_MAX);
// Base backups.

/// Pages of a relation that one backup reads at the same time.
pub const BACKUP_PAGES_CONCURRENT: usize = 32;
/// Bytes that a backup hands on, or reads of a journal, at once.
pub const BACKUP_PIECE_BYTES: usize = 64 * 1024;
/// Bytes of an archive in one message.
pub const BACKUP_MESSAGE_BYTES: usize = 64 * 1024;
/// A backup prolongs its lease so often.
pub const BACKUP_LEASE_RENEW: std::time::Duration = std::time::Duration::from_secs(120);
/// So far back in the journal the record before a backup's LSN is looked for, step by step: most
/// records are short, and the longest may be as long as this.
pub const BACKUP_LOOK_BACK_BYTES: [u64; 3] = [64 * 1024, 1024 * 1024, 16 * 1024 * 1024];

const _: () = assert!(BACKUP_LEASE_RENEW.as_secs() * 2 < LEASE_S_DEFAULT);
// Load generators.

/// Connections of one load generator.
pub const BENCH_CLIENTS_MAX: usize = 100_000;
/// Requests in flight on one of its connections: so many fit into a socket's buffer, so that a
/// client that only sends never blocks a server that only answers.
pub const BENCH_DEPTH_MAX: usize = 1024;
/// At its end it waits so long for replies.
pub const BENCH_DRAIN: std::time::Duration = std::time::Duration::from_secs(10);
/// Pause between two looks at a node's milestones.
pub const BENCH_LOOK: std::time::Duration = std::time::Duration::from_millis(100);

// Front end.

/// What clients can bring about is in the log once in so long.
pub const LOG_AGAIN_AFTER: std::time::Duration = std::time::Duration::from_secs(1);
/// Pause between two looks of the admin API at a timeline that it waits for, in milliseconds.
pub const ADMIN_LOOK_MS: u64 = 20;
/// Buffers for replies that a core keeps for the next connection that has something to say.
pub const REPLY_BUFFERS_SPARE_MAX: usize = 16;

// Fairness between the tenants of a core.

/// Pages that each tenant may have between two looks at all sockets before it has to stand in
/// line, and that are admitted from the line between two such looks.
pub const FAIR_TICK_PAGES: u64 = PAGE_REQUESTS_CONCURRENT_MAX as u64;
/// So long after one look at all sockets there has been another one, whoever asked for it.
pub const FAIR_TICK_MAX: std::time::Duration =
    std::time::Duration::from_micros(2 * PREEMPT_INTERVAL_US);
/// The timer that makes an executor look at all sockets. glommio does not wait for one that has run
/// out before it is first asked.
pub const FAIR_TICK_PAUSE: std::time::Duration = std::time::Duration::from_micros(10);
/// Pages of one turn of a tenant.
pub const FAIR_QUANTUM_PAGES: u64 = 16;
/// So many requests that came together are such that somebody waits for; more are read-ahead.
pub const FAIR_FOREGROUND_REQUESTS_MAX: usize = 4;
/// Pages that somebody waits for which go before a batch of read-ahead has its turn.
pub const FAIR_FOREGROUND_PAGES: u64 = 8 * FAIR_QUANTUM_PAGES;
/// A tenant has the core for itself when no other one has sent a request for so long.
pub const FAIR_ALONE_AFTER: std::time::Duration = std::time::Duration::from_secs(1);
/// Tenants that are kept in mind though they want nothing.
pub const FAIR_TENANTS_KEPT: usize = 256;
/// A tenant that was quiet may send so much of its requests per second at once.
pub const QUOTA_BURST: std::time::Duration = std::time::Duration::from_millis(100);
/// Requests per second of a tenant on one core, unless its settings say otherwise.
pub const QUOTA_REQUESTS_PER_S: u64 = 500_000;
/// Bytes of pages of a tenant that one core works on at once, unless its settings say otherwise.
pub const QUOTA_BYTES_IN_FLIGHT: u64 = 16 * 1024 * 1024;

const _: () = assert!(FAIR_TICK_PAGES >= FAIR_QUANTUM_PAGES);
const _: () = assert!(QUOTA_BYTES_IN_FLIGHT >= FAIR_TICK_PAGES * 8192);

// Space of removed files.

/// Smaller files are removed at once.
pub const SPARE_BYTES_MIN: u64 = 1024 * 1024;
/// So much is given back to the file system at a time.
pub const SPARE_TRIM_BYTES: u64 = 1024 * 1024;
/// Pause after that.
pub const SPARE_TRIM_PAUSE_MS: u64 = 20;
/// Where so much more is to be given back, pauses are half as long; down to a quarter.
pub const SPARE_BACKLOG_BYTES: u64 = 16 * 1024 * 1024 * 1024;
/// Pause between two looks at whether something is to be given back.
pub const SPARE_LOOK_MS: u64 = 2000;
/// A file is begun in the space of one that is longer than it needs by this share at most; the end
/// of a file is given back in no more steps than this, because somebody waits for it.
pub const SPARE_LONGER_SHARE: u64 = 16;

const _: () = assert!(SPARE_TRIM_BYTES.is_multiple_of(crate::io::ALIGNMENT as u64));
