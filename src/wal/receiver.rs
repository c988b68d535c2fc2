//! Streaming WAL from a primary.
//!
//! 1. [`connect`] opens the socket (TCP or unix) and logs in.
//! 2. [`PrimaryStream`] is the [`WalSource`] over that connection; it checks that each chunk of
//!    WAL starts where the one before it ended.
//! 3. The caller reports positions ([`WalSource::send_status`]), watches for silence and
//!    reconnects, with [`super::source::pace`].

use std::net::ToSocketAddrs;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, Bytes};
use futures_util::{AsyncRead, AsyncWrite};
use glommio::net::{TcpStream, UnixStream};

use crate::base::{Kind, Lsn};
use crate::wal::source::SourceError;
use crate::wal::source::connection::{Connection, CopyStep, SlotName};
use crate::wal::source::conninfo::{ConnInfo, Host};

const DURING: &str = "streaming WAL";

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

/// Microseconds from 1970-01-01 to 2000-01-01, PostgreSQL's epoch.
const POSTGRES_EPOCH_US: i64 = 946_684_800_000_000;

/// Reads one message of the stream (PostgreSQL documentation, "Streaming Replication Protocol").
///
/// | byte | then, big-endian |
/// |---|---|
/// | `w` | u64 start, u64 end of WAL, i64 clock, WAL |
/// | `k` | u64 end of WAL, i64 clock, u8 reply requested |
pub fn decode_message(mut message: Bytes) -> Result<WalMessage, SourceError> {
    let cut = || SourceError::protocol(DURING, "a message that is too short");
    match message.try_get_u8().map_err(|_| cut())? {
        b'w' => {
            let start = Lsn(message.try_get_u64().map_err(|_| cut())?);
            let end_of_wal = Lsn(message.try_get_u64().map_err(|_| cut())?);
            message.try_get_i64().map_err(|_| cut())?;
            if start.checked_add(message.len() as u64).is_none() {
                return Err(SourceError::protocol(DURING, format!("WAL at {start}")));
            }
            Ok(WalMessage::Data { start, end_of_wal, bytes: message })
        }
        b'k' => {
            let end_of_wal = Lsn(message.try_get_u64().map_err(|_| cut())?);
            message.try_get_i64().map_err(|_| cut())?;
            let reply_requested = message.try_get_u8().map_err(|_| cut())? != 0;
            if !message.is_empty() {
                return Err(SourceError::protocol(DURING, "a keep-alive that is too long"));
            }
            Ok(WalMessage::KeepAlive { end_of_wal, reply_requested })
        }
        other => {
            Err(SourceError::protocol(DURING, format!("a message of unknown type {other:#04x}")))
        }
    }
}

/// Writes a standby status update: `r`, then big-endian u64 write, u64 flush, u64 apply, i64
/// clock (microseconds since 2000-01-01 UTC), u8 reply requested.
pub fn encode_status(status: &StandbyStatus) -> [u8; 34] {
    let mut out = [0; 34];
    let mut buf = &mut out[..];
    buf.put_u8(b'r');
    buf.put_u64(status.write.0);
    buf.put_u64(status.flush.0);
    buf.put_u64(status.apply.0);
    buf.put_i64(status.unix_time_us.saturating_sub(POSTGRES_EPOCH_US));
    buf.put_u8(u8::from(status.reply_requested));
    out
}

/// A stream over TCP or a unix socket.
#[derive(Debug)]
pub enum NetStream {
    /// TCP.
    Tcp(TcpStream),
    /// A unix socket.
    Unix(UnixStream),
}

impl AsyncRead for NetStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            NetStream::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            NetStream::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for NetStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        match self.get_mut() {
            NetStream::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            NetStream::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            NetStream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            NetStream::Unix(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        match self.get_mut() {
            NetStream::Tcp(stream) => Pin::new(stream).poll_close(cx),
            NetStream::Unix(stream) => Pin::new(stream).poll_close(cx),
        }
    }
}

/// Connects and logs in, within `info.connect_timeout`.
pub async fn connect(info: &ConnInfo) -> Result<Connection<NetStream>, SourceError> {
    let timed_out =
        || SourceError::TimedOut { address: info.address(), after: info.connect_timeout };
    let attempt = async {
        let stream = open(info).await?;
        Connection::start(stream, info).await
    };
    // The timer's own error type cannot carry ours, so the result travels inside.
    match glommio::timer::timeout(info.connect_timeout, async { Ok(attempt.await) }).await {
        Ok(result) => result,
        Err(_) => Err(timed_out()),
    }
}

async fn open(info: &ConnInfo) -> Result<NetStream, SourceError> {
    let failed = |cause: String| SourceError::Connect { address: info.address(), cause };
    match (&info.host, info.socket_path()) {
        (Host::Unix(_), Some(path)) => {
            let stream = UnixStream::connect(path).await;
            Ok(NetStream::Unix(stream.map_err(|error| failed(error.to_string()))?))
        }
        (Host::Unix(path), None) => Err(failed(format!("no socket in {}", path.display()))),
        (Host::Tcp(host), _) => {
            // Looking a name up blocks, so it happens on glommio's helper thread.
            let target = (host.clone(), info.port);
            let found = glommio::executor()
                .spawn_blocking(move || target.to_socket_addrs().map(Vec::from_iter))
                .await
                .map_err(|error| failed(error.to_string()))?;
            let mut last = failed("the name has no address".to_owned());
            for address in found {
                match TcpStream::connect(address).await {
                    Ok(stream) => {
                        stream.set_nodelay(true).map_err(|error| failed(error.to_string()))?;
                        return Ok(NetStream::Tcp(stream));
                    }
                    Err(error) => last = failed(format!("{address}: {error}")),
                }
            }
            Err(last)
        }
    }
}

/// WAL from a PostgreSQL primary (`START_REPLICATION PHYSICAL`).
pub struct PrimaryStream<S> {
    connection: Connection<S>,
    slot: Option<SlotName>,
    timeline: u32,
    /// Where the next bytes must start; `None` before the start and after the end.
    expected: Option<Lsn>,
    /// The server has ended its side; only the result sets are still to be read.
    ending: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> PrimaryStream<S> {
    /// A stream over a connection that is logged in. `timeline` is PostgreSQL's timeline that
    /// holds the position to start from. Without a slot, the primary may drop WAL that we still
    /// need.
    pub fn new(connection: Connection<S>, slot: Option<SlotName>, timeline: u32) -> Self {
        PrimaryStream { connection, slot, timeline, expected: None, ending: false }
    }

    /// The rest of an end: our own CopyDone, then the next timeline, if there is one.
    async fn end(&mut self) -> Result<WalMessage, SourceError> {
        self.connection.flush(DURING).await?;
        let set = self.connection.result_set(DURING).await?.unwrap_or_default();
        if set.rows.is_empty() {
            return Ok(WalMessage::End(EndOfStream::Shutdown));
        }
        Ok(WalMessage::End(EndOfStream::TimelineSwitch {
            next_timeline: set.parsed(0, DURING)?,
            at: set.parsed(1, DURING)?,
        }))
    }

    fn accept(&mut self, message: WalMessage) -> Result<WalMessage, SourceError> {
        if let WalMessage::Data { start, bytes, .. } = &message {
            if self.expected != Some(*start) {
                let expected = self.expected.unwrap_or_default();
                let detail = format!("WAL from {start} where {expected} was to follow");
                return Err(SourceError::protocol(DURING, detail));
            }
            self.expected = start.checked_add(bytes.len() as u64);
        }
        Ok(message)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> WalSource for PrimaryStream<S> {
    async fn start(&mut self, from: Lsn) -> Result<(), SourceError> {
        if self.expected.is_some() || self.ending {
            return Err(SourceError::Invalid { what: "the WAL stream was started before".into() });
        }
        let slot = match &self.slot {
            Some(slot) => format!("SLOT \"{slot}\" "),
            None => String::new(),
        };
        let timeline = self.timeline;
        let command = format!("START_REPLICATION {slot}PHYSICAL {from} TIMELINE {timeline}");
        self.connection.queue_query(&command)?;
        self.connection.flush(DURING).await?;
        match self.connection.copy_begin(DURING).await {
            Ok(()) => {
                self.expected = Some(from);
                Ok(())
            }
            Err(SourceError::Server { error, .. }) if error.kind() == Kind::Invalid => {
                Err(SourceError::Position { from, timeline, detail: error.to_string() })
            }
            Err(error) => Err(error),
        }
    }

    async fn next(&mut self) -> Result<WalMessage, SourceError> {
        if self.ending {
            return self.end().await;
        }
        if self.expected.is_none() {
            return Err(SourceError::Invalid { what: "the WAL stream is not running".into() });
        }
        match self.connection.copy_step(DURING).await? {
            CopyStep::Data(message) => {
                let message = decode_message(message)?;
                self.accept(message)
            }
            CopyStep::Done => {
                self.connection.queue_copy_done();
                self.ending = true;
                self.end().await
            }
            CopyStep::Complete => {
                self.expected = None;
                Ok(WalMessage::End(EndOfStream::Shutdown))
            }
        }
    }

    async fn send_status(&mut self, status: StandbyStatus) -> Result<(), SourceError> {
        if self.expected.is_none() || self.ending {
            return Ok(());
        }
        self.connection.queue_copy_data(&encode_status(&status))?;
        self.connection.flush(DURING).await
    }
}

#[cfg(test)]
#[path = "receiver_tests.rs"]
mod tests;
