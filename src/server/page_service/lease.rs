//! The command `lease lsn`.

use bytes::BytesMut;

use super::{Conn, Fault, Wanted, shutdown};
use crate::base::{Kind, Lsn};
use crate::server::counters::count;
use crate::server::pq::command::LEASE_COLUMN;
use crate::server::pq::{self, Command, SqlState};
use crate::server::socket::Stream;
use crate::shard::reader::{PageBackend, TimelineReader};

impl<S, B> Conn<'_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    /// Takes or prolongs a lease; see [`Command::Lease`].
    pub(super) async fn lease(&mut self, wanted: Wanted, lsn: Lsn) -> Result<(), Fault> {
        let Some(timeline) = self.find(&wanted).await? else { return Ok(()) };
        count(&self.service.counters.other_requests);
        let valid_until = match timeline.lease_lsn(lsn).await {
            Ok(end) => Some(end.0.div_euclid(1000).to_string()),
            Err(error) if error.kind() == Kind::Shutdown => return Err(shutdown()),
            Err(error) if error.kind() == Kind::Invalid => {
                count(&self.service.counters.request_errors);
                pq::put_warning(&mut self.session.unwritten, &error.to_string());
                None
            }
            Err(error) => {
                count(&self.service.counters.request_errors);
                let state = match error.kind() {
                    Kind::Retry => SqlState::NOT_READY,
                    _ => SqlState::INTERNAL,
                };
                self.end_with_error(&wanted, state, &error.to_string());
                return Ok(());
            }
        };
        let out = &mut self.session.unwritten;
        if wanted.simple {
            pq::put_row_description(out, LEASE_COLUMN);
        }
        pq::put_data_row(out, valid_until.as_deref());
        pq::put_command_complete(out, "SELECT 1");
        if wanted.simple {
            self.ready_after_command();
        }
        Ok(())
    }
}

/// What a client that asks is told of the rows of a command.
pub(super) fn describe(out: &mut BytesMut, command: &str) {
    match pq::parse_command(command) {
        Ok(Command::Lease { .. }) => pq::put_row_description(out, LEASE_COLUMN),
        _ => pq::put_empty(out, b'n'),
    }
}
