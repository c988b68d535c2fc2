//! `pg_control` of PostgreSQL 15 (`src/include/catalog/pg_control.h`, `ControlFileData`).
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | system identifier |
//! | 8, 12 | 4 + 4 | version of the file (1300), version of the catalogs (202209061) |
//! | 16 | 4 | state |
//! | 24 | 8 | when it was written, seconds since 1970 |
//! | 32 | 8 | LSN of the last checkpoint record |
//! | 40 | 88 | copy of its `CheckPoint` |
//! | 128 | 8 | next LSN for pages of unlogged relations |
//! | 136, 144 | 8 + 4 | minimum recovery point and its timeline |
//! | 152, 160, 168 | 8 + 8 + 1 | backup start, backup end, backup end required |
//! | 172 | 4 | `wal_level` |
//! | 176 | 1 | `wal_log_hints` |
//! | 180–199 | 5 × 4 | `max_connections`, `max_worker_processes`, `max_wal_senders`, `max_prepared_transactions`, `max_locks_per_transaction` |
//! | 200 | 1 | `track_commit_timestamp` |
//! | 216, 220, 224, 228 | 4 each | page size, blocks per relation segment, WAL page size, WAL segment size |
//! | 252 | 4 | version of data checksums, 0 if off |
//! | 288 | 4 | CRC-32C of the bytes before |

use bytes::{Bytes, BytesMut};

use super::change::Parameters;
use super::checkpoint::{CHECKPOINT_BYTES, Checkpoint};
use super::page::WalLayout;
use super::start_point::{RECORD_BYTES, StartPoint};
use crate::base::checksum::crc32c;
use crate::base::lsn::WAL_PAGE_SIZE;
use crate::base::page::PAGE_SIZE;
use crate::base::{Kind, Lsn};

/// Blocks of a relation segment, 1 GiB (`RELSEG_SIZE`).
pub const SEGMENT_BLOCKS: u32 = 131_072;
/// Offset of the CRC.
pub const CRC_AT: usize = 288;
/// Offset of the copy of the `CheckPoint` struct.
pub const CHECKPOINT_AT: usize = 40;
/// Length of the file (`PG_CONTROL_FILE_SIZE`).
pub const FILE_BYTES: usize = 8192;
/// `DB_SHUTDOWNED`.
const SHUT_DOWN: u32 = 1;
/// Offset of the counter for pages of unlogged relations.
const UNLOGGED_LSN_AT: usize = 128;
/// Where it begins (`FirstNormalUnloggedLSN`).
const FIRST_UNLOGGED_LSN: u64 = 1000;
const VERSION: u32 = 1300;
const CATALOG_VERSION: u32 = 202_209_061;

/// What the file says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ControlFile {
    /// System identifier of the cluster.
    pub system_id: u64,
    /// State of the server (`DBState`).
    pub state: DbState,
    /// LSN of the last checkpoint record.
    pub checkpoint_lsn: Lsn,
    /// Copy of that checkpoint.
    pub checkpoint: Checkpoint,
    /// Recovery must reach this LSN before the files are consistent; 0 if none.
    pub min_recovery_point: Lsn,
    /// Timeline of that point.
    pub min_recovery_timeline: u32,
    /// Settings of the source.
    pub parameters: Parameters,
    /// Version of data checksums; 0 if off.
    pub data_checksum_version: u32,
    /// `wal_segment_size` in bytes.
    pub wal_segment_bytes: u64,
}

/// State of a server (`DBState`).
#[allow(missing_docs, reason = "the names are those of PostgreSQL")]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DbState {
    Startup,
    ShutDown,
    ShutDownInRecovery,
    ShuttingDown,
    InCrashRecovery,
    InArchiveRecovery,
    InProduction,
}

impl DbState {
    fn from_number(number: u32) -> Option<DbState> {
        use DbState::*;
        let all = [
            Startup,
            ShutDown,
            ShutDownInRecovery,
            ShuttingDown,
            InCrashRecovery,
            InArchiveRecovery,
            InProduction,
        ];
        all.get(number as usize).copied()
    }

    /// The server was stopped in an orderly way.
    pub fn is_shut_down(self) -> bool {
        matches!(self, DbState::ShutDown | DbState::ShutDownInRecovery)
    }
}

/// Why bytes are no `pg_control` that can be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlFileError {
    /// Too short.
    #[error("pg_control has {len} bytes, at least 292 are needed: the file is cut")]
    Short {
        /// Its length.
        len: usize,
    },
    /// Another PostgreSQL.
    #[error(
        "pg_control was made by {made_by} (file version {version}, catalog version {catalog}), need PostgreSQL 15"
    )]
    Version {
        /// Name of the version, where it is known.
        made_by: &'static str,
        /// `pg_control_version`.
        version: u32,
        /// `catalog_version_no`.
        catalog: u32,
    },
    /// The checksum does not fit.
    #[error("pg_control is damaged: its checksum is {found:08X}, it says {expected:08X}")]
    Crc {
        /// Checksum of the bytes.
        found: u32,
        /// What the file says.
        expected: u32,
    },
    /// A field has a value that it cannot have.
    #[error("pg_control says that {field} is {value}, which cannot be used")]
    Field {
        /// The field.
        field: &'static str,
        /// What stands there.
        value: u64,
    },
}

impl ControlFileError {
    /// What a caller can do.
    pub fn kind(&self) -> Kind {
        match self {
            ControlFileError::Version { .. } | ControlFileError::Field { .. } => Kind::Invalid,
            ControlFileError::Short { .. } | ControlFileError::Crc { .. } => Kind::Corrupt,
        }
    }
}

impl ControlFile {
    /// Reads and checks the file.
    pub fn parse(file: &[u8]) -> Result<ControlFile, ControlFileError> {
        let short = ControlFileError::Short { len: file.len() };
        if file.len() < CRC_AT + 4 {
            return Err(short);
        }
        let number = |at| u32_at(file, at);
        let (version, catalog) = (number(8), number(12));
        if version != VERSION || catalog != CATALOG_VERSION {
            let made_by = version_name(version, catalog);
            return Err(ControlFileError::Version { made_by, version, catalog });
        }
        let expected = number(CRC_AT);
        let found = crc32c(file.get(..CRC_AT).unwrap_or_default());
        if found != expected {
            return Err(ControlFileError::Crc { found, expected });
        }
        let field = |field, value: u32| ControlFileError::Field { field, value: value.into() };
        let segment = number(228);
        if !WalLayout::valid_segment_bytes(u64::from(segment)) {
            return Err(field("the WAL segment size", segment));
        }
        if u64::from(number(224)) != WAL_PAGE_SIZE {
            return Err(field("the WAL page size", number(224)));
        }
        if number(216) as usize != PAGE_SIZE {
            return Err(field("the page size", number(216)));
        }
        if number(220) != SEGMENT_BLOCKS {
            return Err(field("the number of blocks of a relation segment", number(220)));
        }
        let state = DbState::from_number(number(16));
        let checkpoint = Checkpoint::parse(file.get(CHECKPOINT_AT..).unwrap_or_default());
        Ok(ControlFile {
            system_id: u64_at(file, 0),
            state: state.ok_or_else(|| field("the state", number(16)))?,
            checkpoint_lsn: Lsn(u64_at(file, 32)),
            checkpoint: checkpoint.ok_or(short)?,
            min_recovery_point: Lsn(u64_at(file, 136)),
            min_recovery_timeline: number(144),
            parameters: parameters(file),
            data_checksum_version: number(252),
            wal_segment_bytes: u64::from(segment),
        })
    }

    /// The LSN at which the files of a server that was shut down stand. A primary's last record is
    /// its shutdown's checkpoint, which changes no page. A stand-by's shutdown writes all pages if
    /// a checkpoint came since the last restart point, and else none (`CreateRestartPoint`); both
    /// move `minRecoveryPoint`, so `None`, not known, where it lies behind the end of the
    /// checkpoint. `None` also for a server that was not shut down.
    pub fn stands_at(&self) -> Option<Lsn> {
        match self.state {
            DbState::ShutDown => Some(self.checkpoint_lsn),
            DbState::ShutDownInRecovery => {
                let end = self.checkpoint_end()?;
                (self.min_recovery_point == end).then_some(end)
            }
            _ => None,
        }
    }

    /// End of the last checkpoint's record, as of any record: what follows it is aligned.
    fn checkpoint_end(&self) -> Option<Lsn> {
        let layout = WalLayout { segment_bytes: self.wal_segment_bytes, system_id: None };
        let start = self.checkpoint_lsn;
        let next_page = Lsn(start.0 - start.page_offset()).checked_add(WAL_PAGE_SIZE)?;
        let end = start.checked_add(RECORD_BYTES as u64)?.align();
        let header = if end > next_page { layout.header_len(next_page) } else { 0 };
        end.checked_add(header as u64)
    }
}

fn parameters(file: &[u8]) -> Parameters {
    let number = |at| u32_at(file, at) as i32;
    Parameters {
        wal_level: number(172),
        wal_log_hints: number(176) & 0xFF != 0,
        max_connections: number(180),
        max_worker_processes: number(184),
        max_wal_senders: number(188),
        max_prepared_xacts: number(192),
        max_locks_per_xact: number(196),
        track_commit_timestamp: number(200) & 0xFF != 0,
    }
}

/// The file with other parameters, as `XLOG_PARAMETER_CHANGE` asks for, and a new checksum; a
/// file too short for them is given back as it is.
pub fn with_parameters(file: &[u8], new: &Parameters) -> Bytes {
    let mut out = BytesMut::from(file);
    let numbers = [
        (172, new.wal_level),
        (180, new.max_connections),
        (184, new.max_worker_processes),
        (188, new.max_wal_senders),
        (192, new.max_prepared_xacts),
        (196, new.max_locks_per_xact),
    ];
    for (at, value) in numbers {
        put(&mut out, at, &value.to_le_bytes());
    }
    put(&mut out, 176, &[u8::from(new.wal_log_hints)]);
    put(&mut out, 200, &[u8::from(new.track_commit_timestamp)]);
    seal(&mut out);
    out.freeze()
}

/// The file with another copy of the `CheckPoint` struct and a new checksum; a file too short for
/// it is given back as it is.
pub fn with_checkpoint(file: &[u8], checkpoint_lsn: Lsn, checkpoint: &Checkpoint) -> Bytes {
    let mut out = BytesMut::from(file);
    put(&mut out, 32, &checkpoint_lsn.0.to_le_bytes());
    put(&mut out, CHECKPOINT_AT, &checkpoint.encode());
    seal(&mut out);
    out.freeze()
}

/// The file of a server that was shut down by the checkpoint `start`, whatever it says of state and
/// recovery now. Commit times are not kept, so they are off. `checksums`: the pages have valid
/// checksums, if the cluster has them at all.
pub fn at_start_point(file: &[u8], start: &StartPoint, checksums: bool) -> Bytes {
    let mut out = BytesMut::from(file);
    out.resize(file.len().max(FILE_BYTES), 0);
    put(&mut out, 16, &SHUT_DOWN.to_le_bytes());
    put(&mut out, 24, &start.checkpoint().time.to_le_bytes());
    put(&mut out, UNLOGGED_LSN_AT, &FIRST_UNLOGGED_LSN.to_le_bytes());
    put(&mut out, 136, &[0; 33]);
    put(&mut out, 200, &[0]);
    if !checksums {
        put(&mut out, 252, &[0; 4]);
    }
    with_checkpoint(&out, start.lsn(), start.checkpoint())
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    if file.len() < CRC_AT + 4 {
        return;
    }
    if let Some(target) = file.get_mut(at..at + bytes.len()) {
        target.copy_from_slice(bytes);
    }
}

/// Sets the checksum.
pub fn seal(file: &mut [u8]) {
    let crc = crc32c(file.get(..CRC_AT).unwrap_or_default());
    put(file, CRC_AT, &crc.to_le_bytes());
}

fn version_name(version: u32, catalog: u32) -> &'static str {
    match (version, catalog) {
        (1300, 202_007_201) => "PostgreSQL 13",
        (1300, 202_107_181) => "PostgreSQL 14",
        (1300, 202_307_071) => "PostgreSQL 16",
        (1300, 202_406_281) => "PostgreSQL 17",
        (1800, _) => "PostgreSQL 18",
        (0..1300, _) => "PostgreSQL 12 or older",
        _ => "an unknown PostgreSQL",
    }
}

/// The number at an offset that the caller knows to be in the file; 0 otherwise.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let chunk = bytes.get(at..).and_then(|rest| rest.first_chunk());
    chunk.map_or(0, |chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

const _: () = assert!(CHECKPOINT_AT + CHECKPOINT_BYTES == 128);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wal::start_point::WalIdentity;

    /// A file as PostgreSQL 15 writes it, with the fields that are looked at.
    fn sample() -> Vec<u8> {
        let mut file = vec![0; 8192];
        put(&mut file, 0, &77u64.to_le_bytes());
        for (at, value) in [
            (8, VERSION),
            (12, CATALOG_VERSION),
            (16, 1),
            (32, 0x0100_0028),
            (172, 1),
            (180, 100),
            (216, 8192),
            (220, SEGMENT_BLOCKS),
            (224, 8192),
            (228, 1 << 24),
            (252, 1),
        ] {
            put(&mut file, at, &value.to_le_bytes());
        }
        file[176] = 1;
        let checkpoint = Checkpoint { redo: Lsn(7), next_xid: 735, ..Checkpoint::default() };
        put(&mut file, CHECKPOINT_AT, &checkpoint.encode());
        seal(&mut file);
        file
    }

    #[test]
    fn fields_are_found() {
        let control = ControlFile::parse(&sample()).unwrap();
        assert_eq!((control.system_id, control.checkpoint_lsn), (77, Lsn(0x0100_0028)));
        assert_eq!((control.checkpoint.redo, control.checkpoint.next_xid), (Lsn(7), 735));
        assert!(control.state.is_shut_down() && control.parameters.wal_log_hints);
        assert_eq!((control.wal_segment_bytes, control.data_checksum_version), (1 << 24, 1));
    }

    #[test]
    fn every_flipped_byte_is_found() {
        let file = sample();
        for at in 0..CRC_AT + 4 {
            let mut bad = file.clone();
            bad[at] ^= 0x10;
            assert!(ControlFile::parse(&bad).is_err(), "byte {at}");
        }
        for len in [0, 8, 291] {
            let error = ControlFile::parse(&file[..len]).unwrap_err();
            assert_eq!(error, ControlFileError::Short { len });
        }
    }

    #[test]
    fn other_versions_are_named() {
        let mut file = sample();
        put(&mut file, 12, &202_307_071u32.to_le_bytes());
        let text = ControlFile::parse(&file).unwrap_err().to_string();
        assert!(text.contains("made by PostgreSQL 16") && text.contains("need PostgreSQL 15"));
    }

    #[test]
    fn changed_files_are_sealed_again() {
        let old = ControlFile::parse(&sample()).unwrap();
        let new = Parameters { max_connections: 55, wal_log_hints: false, ..old.parameters };
        let file = with_parameters(&sample(), &new);
        assert_eq!(ControlFile::parse(&file).unwrap(), ControlFile { parameters: new, ..old });
        let checkpoint = Checkpoint { next_oid: 9, ..old.checkpoint };
        let file = with_checkpoint(&file, Lsn(5), &checkpoint);
        let read = ControlFile::parse(&file).unwrap();
        assert_eq!((read.checkpoint, read.checkpoint_lsn), (checkpoint, Lsn(5)));
        assert_eq!(with_parameters(b"short", &new), &b"short"[..]);
    }

    /// The record of a checkpoint is 120 bytes long, and a page header more over a page's end.
    #[test]
    fn where_a_cluster_stands() {
        let at = |state: u32, checkpoint: u64, recovered: u64| {
            let mut file = sample();
            put(&mut file, 16, &state.to_le_bytes());
            put(&mut file, 32, &checkpoint.to_le_bytes());
            put(&mut file, 136, &recovered.to_le_bytes());
            seal(&mut file);
            ControlFile::parse(&file).unwrap().stands_at()
        };
        assert_eq!(at(1, 0x0800_0060, 0), Some(Lsn(0x0800_0060)));
        assert_eq!(at(6, 0x0800_0060, 0), None, "in production");
        assert_eq!(at(2, 0x0800_0060, 0x0800_00D8), Some(Lsn(0x0800_00D8)));
        assert_eq!(at(2, 0x0800_0060, 0x0800_0110), None, "replayed more");
        assert_eq!(at(2, 0x0800_1F88, 0x0800_2000), Some(Lsn(0x0800_2000)), "up to the page's end");
        assert_eq!(at(2, 0x0800_1FC0, 0x0800_2050), Some(Lsn(0x0800_2050)), "on the next page");
        assert_eq!(at(2, 0x08FF_FFC0, 0x0900_0060), Some(Lsn(0x0900_0060)), "in the next segment");
    }

    #[test]
    fn a_start_point_is_a_clean_shutdown() {
        let mut file = sample();
        put(&mut file, 16, &6u32.to_le_bytes());
        put(&mut file, 136, &[0xFF; 33]);
        put(&mut file, 200, &[1]);
        seal(&mut file);
        let old = ControlFile::parse(&file).unwrap();
        assert_eq!(old.state, DbState::InProduction);
        let identity = WalIdentity { system_id: 77, timeline: 1, segment_bytes: 1 << 24 };
        let start = StartPoint::new(Lsn(0x0500_3028), identity, &old.checkpoint, Lsn(0)).unwrap();
        // Files are shorter in tests than on disk.
        let new = at_start_point(&file[..292], &start, true);
        assert_eq!(new.len(), FILE_BYTES);
        let read = ControlFile::parse(&new).unwrap();
        assert_eq!((read.state, read.checkpoint_lsn), (DbState::ShutDown, start.lsn()));
        assert_eq!((read.checkpoint, read.min_recovery_point), (*start.checkpoint(), Lsn(0)));
        assert_eq!(read.min_recovery_timeline, 0);
        assert!(!read.parameters.track_commit_timestamp && read.parameters.wal_log_hints);
        assert_eq!((u64_at(&new, 128), read.data_checksum_version), (1000, 1));
        assert_eq!(new[152..169], [0; 17]);
        let without = at_start_point(&file, &start, false);
        assert_eq!(ControlFile::parse(&without).unwrap().data_checksum_version, 0);
    }
}
