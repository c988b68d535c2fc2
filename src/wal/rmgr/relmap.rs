//! Relation maps (`src/include/utils/relmapper.h`; redo: `relmap_redo`).

use bytes::Bytes;

use crate::wal::bytes::Reader;
use crate::wal::change::Change;
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_RELMAP_UPDATE`: u32 database (0 for the shared map), u32 tablespace, i32 length, file.
pub const XLOG_RELMAP_UPDATE: u8 = 0x00;
/// Length of a relation map file in bytes (`RelMapFile`).
pub const RELMAP_FILE_BYTES: usize = 512;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    if at.record.header.operation() != XLOG_RELMAP_UPDATE {
        return Err(at.unknown());
    }
    let mut body = Reader::new(at.record.main_data);
    let fields = (|| Some((body.u32()?, body.u32()?, body.i32()?)))();
    let (db, spc, len) = fields.ok_or_else(|| at.malformed("it is cut"))?;
    let content = body.entries(len, 1).and_then(|mut file| file.take(RELMAP_FILE_BYTES));
    match content {
        Some(content) if len as usize == RELMAP_FILE_BYTES => {
            let content = Bytes::copy_from_slice(content);
            at.push(Change::RelMap { spc, db, content });
        }
        _ => return Err(at.malformed("the relation map does not have 512 bytes")),
    }
    at.blocks(|_| false);
    Ok(())
}
