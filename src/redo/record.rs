//! Checks that bytes are a WAL record that may be replayed, before they are sent to PostgreSQL.
//!
//! Redo trusts what it is given: a damaged record makes it crash, or worse, makes a wrong page.
//! So length and checksum are looked at each time, and only resource managers whose redo touches
//! nothing but pages are let through. Header: `src/include/access/xlogrecord.h`, `XLogRecord`:
//! u32 `xl_tot_len`, u32 `xl_xid`, u64 `xl_prev`, u8 `xl_info`, u8 `xl_rmid`, two bytes of
//! padding, u32 `xl_crc`; 24 bytes. The CRC-32C covers what follows the header, then the header
//! up to `xl_crc`.

use crate::base::wal_record::{
    WAL_RECORD_CRC_AT, WAL_RECORD_HEADER_BYTES as RECORD_HEADER_SIZE, wal_record_crc,
};
use crate::base::{BlockNumber, Lsn, RelTag};
use crate::limits::REDO_RECORD_BYTES_MAX;

use super::RedoError;

const RM_XLOG: u8 = 0;
const XLOG_FPI_FOR_HINT: u8 = 0xA0;
const XLOG_FPI: u8 = 0xB0;

/// What is wrong with a record, if anything is.
fn problem(record: &[u8]) -> Option<String> {
    let Some(header) = record.first_chunk::<RECORD_HEADER_SIZE>() else {
        return Some(format!("it has only {} bytes", record.len()));
    };
    let u32_at = |at: usize| -> u32 {
        header.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    };
    if u32_at(0) as usize != record.len() {
        return Some(format!("it has {} bytes, its header says {}", record.len(), u32_at(0)));
    }
    if record.len() > REDO_RECORD_BYTES_MAX {
        return Some(format!("it has {} bytes, too many for redo", record.len()));
    }
    let (found, stored) = (wal_record_crc(record), u32_at(WAL_RECORD_CRC_AT));
    if found != Some(stored) {
        return Some(format!("its checksum is {stored:08X}, its bytes say {found:08X?}"));
    }
    let (info, rmid) = (header[16] & 0xF0, header[17]);
    let allowed = match rmid {
        RM_XLOG => info == XLOG_FPI || info == XLOG_FPI_FOR_HINT,
        // Heap2, Heap, Btree, Hash, Gin, Gist, Sequence, SPGist, BRIN; Generic
        9..=17 | 20 => true,
        _ => false,
    };
    (!allowed).then(|| format!("resource manager {rmid} with info {info:02X} is not for page redo"))
}

/// Ok if `record` is a whole, undamaged record of an allowed resource manager.
pub fn check(lsn: Lsn, rel: RelTag, block: BlockNumber, record: &[u8]) -> Result<(), RedoError> {
    match problem(record) {
        None => Ok(()),
        Some(problem) => Err(RedoError::BadRecord { lsn, rel, block, problem }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::base::RelNode;

    /// A record with a right header.
    pub(crate) fn record(rmid: u8, info: u8, body: &[u8]) -> Vec<u8> {
        let mut record = vec![0; RECORD_HEADER_SIZE];
        record.extend_from_slice(body);
        let len = record.len() as u32;
        record[0..4].copy_from_slice(&len.to_le_bytes());
        record[16] = info;
        record[17] = rmid;
        let crc = wal_record_crc(&record).unwrap();
        record[20..24].copy_from_slice(&crc.to_le_bytes());
        record
    }

    fn ok(record: &[u8]) -> bool {
        check(Lsn(8), RelNode { spc: 1, db: 2, rel: 3 }.fork(0), 0, record).is_ok()
    }

    #[test]
    fn every_bit_and_every_length_is_guarded() {
        let good = record(10, 0x80, b"some data");
        assert!(ok(&good));
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                assert!(!ok(&bad), "byte {at} bit {bit}");
            }
            assert!(!ok(&good[..at]));
        }
    }

    #[test]
    fn resource_managers() {
        for rmid in 0..=255 {
            let allowed = matches!(rmid, 9..=17 | 20);
            assert_eq!(ok(&record(rmid, 0, b"")), allowed, "{rmid}");
        }
        assert!(ok(&record(0, 0xB0, b"")) && ok(&record(0, 0xA1, b"")));
        assert!(!ok(&record(0, 0x10, b"")));
    }
}
