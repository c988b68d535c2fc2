//! Streaming WAL from a primary.

use bytes::Bytes;

use crate::base::Lsn;
use crate::wal::source::SourceError;

/// What a WAL source has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WalMessage {
    /// WAL bytes. They continue where the last ones ended; the first start at the position that
    /// was asked for. Chunks end anywhere, also within a record.
    Data {
        /// Position of the first byte.
        start: Lsn,
        /// End of WAL on the source, when it sent this.
        end_of_wal: Lsn,
        /// The WAL.
        bytes: Bytes,
    },
    /// A sign of life.
    KeepAlive {
        /// End of WAL on the source (as far as it has sent it).
        end_of_wal: Lsn,
        /// The source wants a status at once; it may end the connection if none comes.
        reply_requested: bool,
    },
    /// The stream is over; nothing follows.
    End(EndOfStream),
}

/// Why a stream ended in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndOfStream {
    /// The primary was shut down after it had sent everything. It may come back.
    Shutdown,
    /// The source's timeline ended: a standby was promoted.
    TimelineSwitch {
        /// The timeline that follows.
        next_timeline: u32,
        /// Where it starts; the WAL before is common to both.
        at: Lsn,
    },
}

/// How far we are. Each of them is the end of what it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StandbyStatus {
    /// Received.
    pub write: Lsn,
    /// Durable. The source may drop WAL before it, and commits that wait for a synchronous
    /// standby return.
    pub flush: Lsn,
    /// Readable.
    pub apply: Lsn,
    /// Our clock, microseconds since 1970-01-01 UTC.
    pub unix_time_us: i64,
    /// The source is to answer with a keep-alive at once.
    pub reply_requested: bool,
}

/// Where WAL comes from.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait WalSource {
    /// Starts streaming at `from`, which may lie within a record. Once per source.
    async fn start(&mut self, from: Lsn) -> Result<(), SourceError>;
    /// The next message. Dropping the returned future loses nothing: what was read of a message
    /// is kept, so this may stand in a `select` with a timer.
    async fn next(&mut self) -> Result<WalMessage, SourceError>;
    /// Reports positions. Returns when the report is on its way, not when it has arrived.
    async fn send_status(&mut self, status: StandbyStatus) -> Result<(), SourceError>;
}
