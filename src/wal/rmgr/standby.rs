//! Hot standby (`src/include/storage/standbydefs.h`; redo: `standby_redo`).

use crate::base::xid::{FIRST_NORMAL_XID, xid_before};
use crate::wal::bytes::Reader;
use crate::wal::change::{Change, CheckpointChange};
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_STANDBY_LOCK`: nothing of it is stored.
pub const XLOG_STANDBY_LOCK: u8 = 0x00;
/// `XLOG_RUNNING_XACTS`: i32 and i32 counts, bool, 3 bytes padding, u32 next transaction, u32
/// oldest running transaction, u32 latest completed transaction, the running ones.
pub const XLOG_RUNNING_XACTS: u8 = 0x10;
/// `XLOG_INVALIDATIONS`: nothing of it is stored.
pub const XLOG_INVALIDATIONS: u8 = 0x20;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    match at.record.header.operation() {
        XLOG_RUNNING_XACTS => {
            let mut body = Reader::new(at.record.main_data);
            let fields = (|| {
                body.skip(12)?;
                Some((body.u32()?, body.u32()?))
            })();
            let (next, oldest) = fields.ok_or_else(|| at.malformed("it is cut"))?;
            if next >= FIRST_NORMAL_XID {
                at.xid_seen(xid_before(next));
            }
            at.push(Change::Checkpoint(CheckpointChange::OldestActiveXid(oldest)));
        }
        XLOG_STANDBY_LOCK | XLOG_INVALIDATIONS => {}
        _ => return Err(at.unknown()),
    }
    at.blocks(|_| false);
    Ok(())
}
