//! `pg_xact` (`src/include/access/clog.h`; redo: `clog_redo`).

use crate::base::{SlruKind, Value};
use crate::wal::bytes::Reader;
use crate::wal::change::{Change, CheckpointChange};
use crate::wal::decode::{DecodeError, Decoding};

/// `CLOG_ZEROPAGE`: i32 page.
pub const CLOG_ZEROPAGE: u8 = 0x00;
/// `CLOG_TRUNCATE`: i32 page, u32 oldest transaction, u32 its database.
pub const CLOG_TRUNCATE: u8 = 0x10;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let kind = SlruKind::Clog;
    let mut body = Reader::new(at.record.main_data);
    match at.record.header.operation() {
        CLOG_ZEROPAGE => {
            let page = body.u32().ok_or_else(|| at.malformed("it is cut"))?;
            at.push(Change::Slru { kind, page, value: Value::ZeroPage });
        }
        CLOG_TRUNCATE => {
            let fields = (|| Some((body.u32()?, body.u32()?, body.u32()?)))();
            let (cutoff_page, xid, db) = fields.ok_or_else(|| at.malformed("it is cut"))?;
            at.push(Change::Checkpoint(CheckpointChange::OldestXid { xid, db }));
            at.push(Change::SlruTruncate { kind, cutoff_page });
        }
        _ => return Err(at.unknown()),
    }
    at.blocks(|_| false);
    Ok(())
}
