//! Databases (`src/include/commands/dbcommands_xlog.h`; redo: `dbase_redo`).

use crate::wal::bytes::Reader;
use crate::wal::change::Change;
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_DBASE_CREATE_FILE_COPY`: u32 database, u32 tablespace, u32 source database, u32 source
/// tablespace.
pub const XLOG_DBASE_CREATE_FILE_COPY: u8 = 0x00;
/// `XLOG_DBASE_CREATE_WAL_LOG`: u32 database, u32 tablespace.
pub const XLOG_DBASE_CREATE_WAL_LOG: u8 = 0x10;
/// `XLOG_DBASE_DROP`: u32 database, i32 count, u32 tablespaces.
pub const XLOG_DBASE_DROP: u8 = 0x20;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let mut body = Reader::new(at.record.main_data);
    let change = match at.record.header.operation() {
        XLOG_DBASE_CREATE_FILE_COPY => file_copy(&mut body),
        XLOG_DBASE_CREATE_WAL_LOG => wal_log(&mut body),
        XLOG_DBASE_DROP => drop_database(&mut body),
        _ => return Err(at.unknown()),
    };
    at.push(change.ok_or_else(|| at.malformed("it is cut"))?);
    at.blocks(|_| false);
    Ok(())
}

fn file_copy(body: &mut Reader<'_>) -> Option<Change> {
    let (db, spc) = (body.u32()?, body.u32()?);
    let (source_db, source_spc) = (body.u32()?, body.u32()?);
    Some(Change::DatabaseCopy { source: (source_spc, source_db), target: (spc, db) })
}

fn wal_log(body: &mut Reader<'_>) -> Option<Change> {
    let (db, spc) = (body.u32()?, body.u32()?);
    Some(Change::DatabaseCreate { spc, db })
}

fn drop_database(body: &mut Reader<'_>) -> Option<Change> {
    let (db, count) = (body.u32()?, body.i32()?);
    let mut entries = body.entries(count, 4)?;
    let mut spcs = Vec::with_capacity(entries.len() / 4);
    while !entries.is_empty() {
        spcs.push(entries.u32()?);
    }
    Some(Change::DatabaseDrop { db, spcs })
}
