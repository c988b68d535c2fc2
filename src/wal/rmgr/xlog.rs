//! The log itself (`src/include/catalog/pg_control.h`, `xlog_internal.h`; redo: `xlog_redo`).

use bytes::Bytes;

use crate::wal::bytes::Reader;
use crate::wal::change::{Change, CheckpointChange, Parameters};
use crate::wal::checkpoint::CHECKPOINT_BYTES;
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_CHECKPOINT_SHUTDOWN`: a `CheckPoint` struct.
pub const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
/// `XLOG_CHECKPOINT_ONLINE`: a `CheckPoint` struct.
pub const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
/// `XLOG_NOOP`.
pub const XLOG_NOOP: u8 = 0x20;
/// `XLOG_NEXTOID`: u32.
pub const XLOG_NEXTOID: u8 = 0x30;
/// `XLOG_SWITCH`: the rest of the segment is unused.
pub const XLOG_SWITCH: u8 = 0x40;
/// `XLOG_BACKUP_END`: u64 start of the backup.
pub const XLOG_BACKUP_END: u8 = 0x50;
/// `XLOG_PARAMETER_CHANGE`: six i32 (`max_connections`, `max_worker_processes`,
/// `max_wal_senders`, `max_prepared_transactions`, `max_locks_per_transaction`, `wal_level`),
/// bool `wal_log_hints`, bool `track_commit_timestamp`.
pub const XLOG_PARAMETER_CHANGE: u8 = 0x60;
/// `XLOG_RESTORE_POINT`.
pub const XLOG_RESTORE_POINT: u8 = 0x70;
/// `XLOG_FPW_CHANGE`: bool.
pub const XLOG_FPW_CHANGE: u8 = 0x80;
/// `XLOG_END_OF_RECOVERY`: i64 time, u32 new timeline, u32 old timeline.
pub const XLOG_END_OF_RECOVERY: u8 = 0x90;
/// `XLOG_FPI_FOR_HINT`: page images, because of hint bits.
pub const XLOG_FPI_FOR_HINT: u8 = 0xA0;
/// `XLOG_FPI`: page images.
pub const XLOG_FPI: u8 = 0xB0;
/// `XLOG_OVERWRITE_CONTRECORD`: u64 start of the record given up, i64 time.
pub const XLOG_OVERWRITE_CONTRECORD: u8 = 0xD0;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let operation = at.record.header.operation();
    let mut body = Reader::new(at.record.main_data);
    match operation {
        XLOG_FPI | XLOG_FPI_FOR_HINT => return images(at, operation),
        XLOG_CHECKPOINT_SHUTDOWN | XLOG_CHECKPOINT_ONLINE => {
            let body = body.take(CHECKPOINT_BYTES).ok_or_else(|| at.malformed("it is cut"))?;
            let body = Bytes::copy_from_slice(body);
            let shutdown = operation == XLOG_CHECKPOINT_SHUTDOWN;
            at.push(Change::Checkpoint(CheckpointChange::Record { body, shutdown }));
        }
        XLOG_NEXTOID => {
            let oid = body.u32().ok_or_else(|| at.malformed("it is cut"))?;
            at.push(Change::Checkpoint(CheckpointChange::NextOid(oid)));
        }
        XLOG_FPW_CHANGE => {
            let on = body.u8().ok_or_else(|| at.malformed("it is cut"))?;
            at.push(Change::Checkpoint(CheckpointChange::FullPageWrites(on != 0)));
        }
        XLOG_PARAMETER_CHANGE => {
            let parameters = parameters(&mut body).ok_or_else(|| at.malformed("it is cut"))?;
            at.push(Change::Parameters(parameters));
        }
        XLOG_NOOP
        | XLOG_SWITCH
        | XLOG_BACKUP_END
        | XLOG_RESTORE_POINT
        | XLOG_END_OF_RECOVERY
        | XLOG_OVERWRITE_CONTRECORD => {}
        // Redo passes over operations that it does not know.
        _ => {}
    }
    at.blocks(|_| false);
    Ok(())
}

/// Page images: the value is the page itself. A hint-bit record without an image (written while
/// `full_page_writes` is off) changes nothing.
fn images(at: &mut Decoding<'_, '_>, operation: u8) -> Result<(), DecodeError> {
    let record = at.record;
    for block in &record.blocks {
        if block.image.is_some() || operation == XLOG_FPI {
            at.image_block(block)?;
        }
    }
    Ok(())
}

fn parameters(body: &mut Reader<'_>) -> Option<Parameters> {
    Some(Parameters {
        max_connections: body.i32()?,
        max_worker_processes: body.i32()?,
        max_wal_senders: body.i32()?,
        max_prepared_xacts: body.i32()?,
        max_locks_per_xact: body.i32()?,
        wal_level: body.i32()?,
        wal_log_hints: body.u8()? != 0,
        track_commit_timestamp: body.u8()? != 0,
    })
}
