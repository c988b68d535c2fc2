//! Replication origins (`src/include/replication/origin.h`; redo: `replorigin_redo`).

use crate::base::Lsn;
use crate::wal::bytes::Reader;
use crate::wal::change::Change;
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_REPLORIGIN_SET`: u64 remote LSN, u16 origin, bool also backward.
pub const XLOG_REPLORIGIN_SET: u8 = 0x00;
/// `XLOG_REPLORIGIN_DROP`: u16 origin.
pub const XLOG_REPLORIGIN_DROP: u8 = 0x10;

/// Not an origin whose progress is kept (`InvalidRepOriginId`).
const NONE: u16 = 0;
/// "Do not replicate" (`DoNotReplicateId`); it has no progress either.
const DO_NOT_REPLICATE: u16 = u16::MAX;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let mut body = Reader::new(at.record.main_data);
    let cut = at.malformed("it is cut");
    match at.record.header.operation() {
        XLOG_REPLORIGIN_SET => {
            let fields = (|| Some((body.u64()?, body.u16()?, body.u8()?)))();
            let (remote_lsn, id, backward) = fields.ok_or(cut)?;
            advance(at, id, Lsn(remote_lsn), backward != 0);
        }
        XLOG_REPLORIGIN_DROP => {
            let id = body.u16().ok_or(cut)?;
            at.push(Change::ReplicationOrigin { id, remote_lsn: None, backward: true });
        }
        _ => return Err(at.unknown()),
    }
    at.blocks(|_| false);
    Ok(())
}

/// Progress of an origin (`replorigin_advance`).
pub(crate) fn advance(at: &mut Decoding<'_, '_>, id: u16, remote_lsn: Lsn, backward: bool) {
    if id != NONE && id != DO_NOT_REPLICATE {
        at.push(Change::ReplicationOrigin { id, remote_lsn: Some(remote_lsn), backward });
    }
}
