//! What `pg_control` and `backup_label` say about an imported cluster. Pure.
//!
//! Offsets of `ControlFileData` (`catalog/pg_control.h`, PostgreSQL 15, little-endian):
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | system identifier |
//! | 8 | 4 | version of the format, 1300 |
//! | 16 | 4 | state; 1 is "shut down" |
//! | 40 | 88 | copy of the last checkpoint: redo position u64, timeline u32, … |
//! | 176 | 1 | `wal_log_hints` |
//! | 216 | 4 | block size |
//! | 220 | 4 | blocks per relation segment |
//! | 224 | 4 | WAL block size |
//! | 228 | 4 | bytes per WAL segment |
//! | 252 | 4 | version of page checksums; 0 when they are off |
//! | 288 | 4 | CRC-32C of what stands before |

use std::ops::Range;

use crate::base::Lsn;
use crate::base::checksum::crc32c;

/// Version of the format in PostgreSQL 15 (`PG_CONTROL_VERSION`).
const CONTROL_VERSION: u32 = 1300;
/// State of a cluster that was shut down cleanly (`DB_SHUTDOWNED`).
const STATE_SHUT_DOWN: u32 = 1;
const CRC_OFFSET: usize = 288;
/// Where the copy of the last checkpoint stands.
pub(super) const CHECKPOINT_COPY: Range<usize> = 40..128;
/// Blocks per relation segment, 1 GiB (`RELSEG_SIZE`).
pub(super) const SEGMENT_BLOCKS: u32 = 131_072;

/// What a cluster says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterInfo {
    /// Number that all copies of one cluster share.
    pub system_id: u64,
    /// Bytes per WAL segment.
    pub wal_segment_bytes: u32,
    /// Version of page checksums; 0 when they are off.
    pub data_checksum_version: u32,
    /// Hint-bit changes are logged as full pages.
    pub wal_log_hints: bool,
    /// The cluster was shut down cleanly.
    pub shut_down: bool,
    /// Redo position of the last checkpoint, and its timeline.
    pub checkpoint: (Lsn, u32),
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// Reads `pg_control`; the error says what is wrong with it.
pub(super) fn read_control(bytes: &[u8]) -> Result<ClusterInfo, &'static str> {
    const CUT: &str = "it is too short";
    let covered = bytes.get(..CRC_OFFSET).ok_or(CUT)?;
    if u32_at(bytes, 8).ok_or(CUT)? != CONTROL_VERSION {
        return Err("its format is not that of PostgreSQL 15");
    }
    if u32_at(bytes, CRC_OFFSET).ok_or(CUT)? != crc32c(covered) {
        return Err("its checksum is wrong");
    }
    let number = |offset| u32_at(covered, offset).ok_or(CUT);
    if (number(216)?, number(220)?, number(224)?) != (8192, SEGMENT_BLOCKS, 8192) {
        return Err("the cluster was built with a block or segment size other than the default");
    }
    let wal_segment_bytes = number(228)?;
    if !wal_segment_bytes.is_power_of_two() || !(1 << 20..=1 << 30).contains(&wal_segment_bytes) {
        return Err("its WAL segment size is impossible");
    }
    Ok(ClusterInfo {
        system_id: u64_at(covered, 0).ok_or(CUT)?,
        wal_segment_bytes,
        data_checksum_version: number(252)?,
        wal_log_hints: covered.get(176).is_some_and(|byte| *byte != 0),
        shut_down: number(16)? == STATE_SHUT_DOWN,
        checkpoint: (Lsn(u64_at(covered, CHECKPOINT_COPY.start).ok_or(CUT)?), number(48)?),
    })
}

/// Start position and timeline of a backup, out of `backup_label`.
pub(super) fn read_backup_label(text: &str) -> Option<(Lsn, u32)> {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let start = value("START WAL LOCATION: ")?.split_whitespace().next()?.parse().ok()?;
    let timeline = value("START TIMELINE: ")?.trim().parse().ok()?;
    Some((start, timeline))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backup_labels() {
        let text = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\n\
                    CHECKPOINT LOCATION: 0/2000060\nBACKUP METHOD: streamed\n\
                    BACKUP FROM: primary\nSTART TIME: x\nLABEL: pgstrata\nSTART TIMELINE: 3\n";
        assert_eq!(read_backup_label(text), Some((Lsn(0x200_0028), 3)));
        for cut in [
            "",
            "START WAL LOCATION: 0/2000028",
            "START TIMELINE: 1",
            "START WAL LOCATION: x\nSTART TIMELINE: 1",
        ] {
            assert_eq!(read_backup_label(cut), None, "{cut:?}");
        }
    }

    #[test]
    fn every_changed_byte_of_pg_control_is_noticed() {
        let mut good = vec![0u8; 8192];
        good[8..12].copy_from_slice(&1300u32.to_le_bytes());
        for (offset, value) in
            [(16, 1), (48, 1), (216, 8192), (220, SEGMENT_BLOCKS), (224, 8192), (228, 1 << 24)]
        {
            good[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        good[40..48].copy_from_slice(&0x1234_5678u64.to_le_bytes());
        let crc = crc32c(&good[..288]);
        good[288..292].copy_from_slice(&crc.to_le_bytes());
        let info = read_control(&good).unwrap();
        assert_eq!(info.checkpoint, (Lsn(0x1234_5678), 1));
        assert!(info.shut_down && !info.wal_log_hints);
        for at in 0..292 {
            let mut changed = good.clone();
            changed[at] ^= 1;
            assert!(read_control(&changed).is_err(), "byte {at} was changed unnoticed");
            assert!(read_control(&good[..at]).is_err(), "{at} bytes were taken");
        }
    }
}
