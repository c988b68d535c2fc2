//! The start of a connection: TLS, if it is wanted and set up, and the start-up packet.

use std::pin::pin;
use std::time::Duration;

use futures_util::future::{Either, select};

use super::{Conn, Fault};
use crate::limits::CONNECTION_STARTUP_MS_MAX;
use crate::server::pq::{self, SqlState, Startup};
use crate::server::socket::Stream;
use crate::shard::reader::PageBackend;

impl<S, B> Conn<'_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    /// Who sends its start-up packet byte by byte is never idle, and has no more time for it.
    pub(super) async fn start_up_in_time(&mut self) -> Result<bool, Fault> {
        let deadline = (self.service.sleep)(Duration::from_millis(CONNECTION_STARTUP_MS_MAX));
        let start_up = pin!(self.start_up());
        match select(start_up, deadline).await {
            Either::Left((started, _)) => started,
            Either::Right(_) => {
                let text = "the connection did not start up in time".to_owned();
                Err(Fault::Fatal(SqlState::PROTOCOL_VIOLATION, text))
            }
        }
    }

    /// False when the connection is over.
    async fn start_up(&mut self) -> Result<bool, Fault> {
        loop {
            match pq::decode_startup(&mut self.session.unread)? {
                None => {
                    self.flush().await?;
                    if !self.read().await? {
                        return Ok(false);
                    }
                }
                Some(Startup::Ssl) if self.stream.can_encrypt() => self.encrypt().await?,
                Some(Startup::Ssl | Startup::GssEncryption) => {
                    pq::put_no_encryption(&mut self.session.unwritten);
                }
                Some(Startup::Cancel) => return Ok(false),
                Some(Startup::Session { parameters, negotiate }) => {
                    let out = &mut self.session.unwritten;
                    if negotiate {
                        pq::put_negotiate_version(out, &parameters);
                    }
                    pq::put_welcome(out);
                    self.session.started = true;
                    return Ok(true);
                }
            }
        }
    }

    /// Bytes that came with the request for TLS were not encrypted, and must not pass for it.
    async fn encrypt(&mut self) -> Result<(), Fault> {
        if !self.session.unread.is_empty() {
            let text = "received unencrypted data after the request for TLS".to_owned();
            return Err(Fault::Fatal(SqlState::PROTOCOL_VIOLATION, text));
        }
        pq::put_encryption(&mut self.session.unwritten);
        self.flush().await?;
        self.stream.encrypt().map_err(Fault::Io)
    }
}
