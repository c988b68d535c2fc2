//! Checksum of a WAL record (`XLogRecord`, `src/include/access/xlogrecord.h`).

use super::checksum::{crc32c, crc32c_append};

/// Length of the record header in bytes (`SizeOfXLogRecord`).
pub const WAL_RECORD_HEADER_BYTES: usize = 24;
/// Offset of `xl_crc` in it, the last field.
pub const WAL_RECORD_CRC_AT: usize = 20;

/// CRC-32C of a record as PostgreSQL computes it: what follows the header, then the header up to
/// the checksum. `None` if it is shorter than its header.
pub fn wal_record_crc(record: &[u8]) -> Option<u32> {
    let body = record.get(WAL_RECORD_HEADER_BYTES..)?;
    Some(crc32c_append(crc32c(body), record.get(..WAL_RECORD_CRC_AT)?))
}
