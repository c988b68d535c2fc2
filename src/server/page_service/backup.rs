//! The commands `basebackup` and `fullbackup`: an archive in COPY, from the server to the client.
//!
//! The archive is made while it is sent: what the client has not taken yet stops the reads that
//! the rest needs, and a client that takes nothing is cut off like any other. COPY begins with the
//! first bytes of the archive, so that a command that cannot be served is answered by an error
//! alone; one that fails later ends COPY with an error, and the archive lacks its end.

use std::io::{Error, Write};

use bytes::{BufMut, BytesMut};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::{Conn, Fault, Wanted, shutdown};
use crate::base::Kind;
use crate::limits::BACKUP_MESSAGE_BYTES;
use crate::server::counters::count;
use crate::server::pq::{self, SqlState};
use crate::server::socket::Stream;
use crate::shard::base_backup::{BackupError, BackupRequest, BackupSink, SinkClosed};
use crate::shard::reader::{PageBackend, ReadError, TimelineReader};

/// The way of an archive to the client.
struct Copy<'c, 'a, S, B> {
    connection: &'c mut Conn<'a, S, B>,
    packer: Packer,
    begun: bool,
    /// Why the client gets no more.
    fault: Option<Fault>,
}

/// Bytes for the client, packed if that was asked for.
enum Packer {
    Plain(Vec<u8>),
    Gzip(GzEncoder<Vec<u8>>),
}

impl Packer {
    fn new(gzip: bool) -> Packer {
        let room = Vec::with_capacity(BACKUP_MESSAGE_BYTES);
        match gzip {
            false => Packer::Plain(room),
            true => Packer::Gzip(GzEncoder::new(room, Compression::fast())),
        }
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), Error> {
        match self {
            Packer::Plain(out) => {
                out.extend_from_slice(bytes);
                Ok(())
            }
            Packer::Gzip(encoder) => encoder.write_all(bytes),
        }
    }

    /// What is ready to be sent.
    fn ready(&mut self) -> &mut Vec<u8> {
        match self {
            Packer::Plain(out) => out,
            Packer::Gzip(encoder) => encoder.get_mut(),
        }
    }

    /// Makes everything ready; nothing may be added any more.
    fn finish(&mut self) -> Result<(), Error> {
        match self {
            Packer::Plain(_) => Ok(()),
            Packer::Gzip(encoder) => encoder.try_finish(),
        }
    }
}

impl<S, B> Copy<'_, '_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    fn begin(&mut self) {
        if !self.begun {
            self.begun = true;
            pq::put_copy_out(&mut self.connection.session.unwritten);
        }
    }

    /// Sends what is ready.
    async fn send(&mut self) -> Result<(), Fault> {
        self.begin();
        let out = &mut self.connection.session.unwritten;
        let ready = self.packer.ready();
        put_pieces(out, ready);
        ready.clear();
        self.connection.flush().await
    }

    async fn add(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if self.connection.service.stop.is_closed() {
            return Err(shutdown());
        }
        self.packer.add(bytes).map_err(Fault::Io)?;
        match self.packer.ready().len() >= BACKUP_MESSAGE_BYTES {
            true => self.send().await,
            false => Ok(()),
        }
    }

    /// The last bytes, and the end of COPY.
    async fn end(&mut self) -> Result<(), Fault> {
        self.packer.finish().map_err(Fault::Io)?;
        self.send().await?;
        pq::put_empty(&mut self.connection.session.unwritten, b'c');
        Ok(())
    }
}

/// Messages of a bounded length.
fn put_pieces(out: &mut BytesMut, bytes: &[u8]) {
    for piece in bytes.chunks(BACKUP_MESSAGE_BYTES) {
        pq::put_message(out, b'd', |out| out.put_slice(piece));
    }
}

impl<S, B> BackupSink for Copy<'_, '_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    async fn write(&mut self, bytes: &[u8]) -> Result<(), SinkClosed> {
        match self.add(bytes).await {
            Ok(()) => Ok(()),
            Err(fault) => {
                self.fault = Some(fault);
                Err(SinkClosed)
            }
        }
    }
}

impl<S, B> Conn<'_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    /// Sends a backup; see [`pq::Command::Backup`].
    pub(super) async fn backup(
        &mut self,
        wanted: Wanted,
        request: BackupRequest,
        gzip: bool,
    ) -> Result<(), Fault> {
        let Some(timeline) = self.find(&wanted).await? else { return Ok(()) };
        count(&self.service.counters.other_requests);
        let packer = Packer::new(gzip);
        let mut copy = Copy { connection: self, packer, begun: false, fault: None };
        let result = timeline.backup(request, &mut copy).await;
        let error = match (result, copy.fault.take()) {
            (_, Some(fault)) => return Err(fault),
            (Ok(_), None) => {
                copy.end().await?;
                pq::put_command_complete(&mut self.session.unwritten, "SELECT 1");
                if wanted.simple {
                    self.ready_after_command();
                }
                return Ok(());
            }
            (Err(error), None) if error.kind() == Kind::Shutdown => return Err(shutdown()),
            (Err(error), None) => error,
        };
        count(&self.service.counters.request_errors);
        self.end_with_error(&wanted, sql_state(&error), &error.to_string());
        Ok(())
    }
}

/// What a client can do about it.
fn sql_state(error: &BackupError) -> SqlState {
    match error {
        BackupError::Read(ReadError::TenantNotFound(_) | ReadError::TimelineNotFound(..)) => {
            SqlState::UNDEFINED_OBJECT
        }
        _ => match error.kind() {
            Kind::Invalid => SqlState::INVALID_PARAMETER,
            Kind::Retry => SqlState::NOT_READY,
            Kind::Corrupt => SqlState::DATA_CORRUPTED,
            _ => SqlState::INTERNAL,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn packed_bytes_come_out_as_they_went_in() {
        let bytes: Vec<u8> = (0..300_000u32).map(|n| (n % 251) as u8).collect();
        for gzip in [false, true] {
            let mut packer = Packer::new(gzip);
            let mut out = BytesMut::new();
            for piece in bytes.chunks(8192) {
                packer.add(piece).unwrap();
                put_pieces(&mut out, packer.ready());
                packer.ready().clear();
            }
            packer.finish().unwrap();
            put_pieces(&mut out, packer.ready());
            let mut sent = Vec::new();
            while !out.is_empty() {
                let Some(pq::Message::CopyData(data)) = pq::decode_message(&mut out).unwrap()
                else {
                    panic!("no COPY data");
                };
                assert!(data.len() <= BACKUP_MESSAGE_BYTES);
                sent.extend_from_slice(&data);
            }
            if gzip {
                assert!(sent.len() < bytes.len() / 10, "{}", sent.len());
                let mut plain = Vec::new();
                flate2::read::GzDecoder::new(&sent[..]).read_to_end(&mut plain).unwrap();
                sent = plain;
            }
            assert!(sent == bytes);
        }
    }
}
