//! What the files of a data directory are, by their paths. Pure.
//!
//! PostgreSQL: `storage/file/reinit.c` and `storage/file/fd.c` (relation and temporary names),
//! `common/relpath.c` (directories), `access/transam/slru.c` (segments).

use crate::base::key::{FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM};
use crate::base::{RelNode, RelTag, SlruKind};

/// OID of the tablespace `pg_default`.
const SPC_DEFAULT: u32 = 1663;
/// OID of the tablespace `pg_global`.
const SPC_GLOBAL: u32 = 1664;

/// What a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    /// Segment `n` (1 GiB each) of a relation fork.
    Relation(RelTag, u32),
    /// The relation map of a database.
    RelMap { spc: u32, db: u32 },
    /// `PG_VERSION` of a database.
    DatabaseVersion { spc: u32, db: u32 },
    /// A segment of an SLRU.
    Slru(SlruKind, u32),
    /// State of a prepared transaction.
    TwoPhase(u32),
    /// `pg_control`.
    Control,
    /// `backup_label`.
    BackupLabel,
    /// `PG_VERSION` of the cluster.
    Version,
    /// A segment of WAL: timeline and number are in the name.
    Wal,
    /// Nothing that is kept.
    Ignored,
}

/// A decimal number as PostgreSQL writes OIDs: no sign, no leading zero, not 0.
fn oid(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && !text.starts_with('0');
    plain.then(|| text.parse().ok()).flatten()
}

/// An upper-case hexadecimal number.
fn hex(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
    plain.then(|| u32::from_str_radix(text, 16).ok()).flatten()
}

/// `REL[_fork][.SEG]`; temporary relations (`tBACKEND_REL`) are none.
fn relation(spc: u32, db: u32, name: &str) -> Option<FileKind> {
    let (stem, segment) = match name.split_once('.') {
        Some((stem, segment)) => (stem, oid(segment)?),
        None => (name, 0),
    };
    let (rel, fork) = match stem.split_once('_') {
        None => (stem, FORK_MAIN),
        Some((rel, "fsm")) => (rel, FORK_FSM),
        Some((rel, "vm")) => (rel, FORK_VM),
        Some((rel, "init")) => (rel, FORK_INIT),
        Some(_) => return None,
    };
    let tag = RelNode { spc, db, rel: oid(rel)? }.fork(fork);
    Some(FileKind::Relation(tag, segment))
}

/// A file in the directory of a database, or in `global`.
fn database_file(spc: u32, db: u32, name: &str) -> FileKind {
    match name {
        "pg_filenode.map" => FileKind::RelMap { spc, db },
        "PG_VERSION" if db != 0 => FileKind::DatabaseVersion { spc, db },
        _ => relation(spc, db, name).unwrap_or(FileKind::Ignored),
    }
}

fn slru(kind: SlruKind, name: &str) -> FileKind {
    match hex(name) {
        Some(segment) if (4..=6).contains(&name.len()) => FileKind::Slru(kind, segment),
        _ => FileKind::Ignored,
    }
}

/// True for the directory of a tablespace that belongs to PostgreSQL 15.
fn version_directory(name: &str) -> bool {
    name.strip_prefix("PG_15_").is_some_and(|catalog| oid(catalog).is_some())
}

/// Says what the file at this path, relative to the data directory, is.
pub(super) fn classify(path: &str) -> FileKind {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["PG_VERSION"] => FileKind::Version,
        ["backup_label"] => FileKind::BackupLabel,
        ["global", "pg_control"] => FileKind::Control,
        ["global", name] => database_file(SPC_GLOBAL, 0, name),
        ["base", db, name] => match oid(db) {
            Some(db) => database_file(SPC_DEFAULT, db, name),
            None => FileKind::Ignored,
        },
        ["pg_tblspc", spc, version, db, name] if version_directory(version) => {
            match (oid(spc), oid(db)) {
                (Some(spc), Some(db)) => database_file(spc, db, name),
                _ => FileKind::Ignored,
            }
        }
        ["pg_xact", name] => slru(SlruKind::Clog, name),
        ["pg_multixact", "members", name] => slru(SlruKind::MultiXactMembers, name),
        ["pg_multixact", "offsets", name] => slru(SlruKind::MultiXactOffsets, name),
        ["pg_twophase", name] if name.len() == 8 => {
            hex(name).map_or(FileKind::Ignored, FileKind::TwoPhase)
        }
        ["pg_wal", name] if name.len() == 24 && name.bytes().all(|b| b.is_ascii_hexdigit()) => {
            FileKind::Wal
        }
        _ => FileKind::Ignored,
    }
}

/// True for a directory that may hold, at any depth, a file that is kept.
pub(super) fn worth_listing(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    match parts.as_slice() {
        ["" | "base" | "global" | "pg_tblspc" | "pg_xact" | "pg_multixact" | "pg_twophase"]
        | ["pg_wal"]
        | ["pg_multixact", "members" | "offsets"] => true,
        ["base", db] => oid(db).is_some(),
        ["pg_tblspc", spc] => oid(spc).is_some(),
        ["pg_tblspc", _, version] => version_directory(version),
        ["pg_tblspc", _, _, db] => oid(db).is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let rel = |spc, db, rel, fork, segment| {
            FileKind::Relation(RelNode { spc, db, rel }.fork(fork), segment)
        };
        for (path, kind) in [
            ("base/5/1259", rel(1663, 5, 1259, 0, 0)),
            ("base/5/1259_fsm", rel(1663, 5, 1259, 1, 0)),
            ("base/5/1259_vm.2", rel(1663, 5, 1259, 2, 2)),
            ("base/5/16390_init", rel(1663, 5, 16390, 3, 0)),
            ("global/1262.11", rel(1664, 0, 1262, 0, 11)),
            ("pg_tblspc/16400/PG_15_202209061/5/16401", rel(16400, 5, 16401, 0, 0)),
            ("base/5/pg_filenode.map", FileKind::RelMap { spc: 1663, db: 5 }),
            ("global/pg_filenode.map", FileKind::RelMap { spc: 1664, db: 0 }),
            ("base/5/PG_VERSION", FileKind::DatabaseVersion { spc: 1663, db: 5 }),
            ("pg_xact/00AF", FileKind::Slru(SlruKind::Clog, 0xAF)),
            ("pg_multixact/members/14078", FileKind::Slru(SlruKind::MultiXactMembers, 0x14078)),
            ("pg_multixact/offsets/0000", FileKind::Slru(SlruKind::MultiXactOffsets, 0)),
            ("pg_twophase/000002F1", FileKind::TwoPhase(0x2f1)),
            ("global/pg_control", FileKind::Control),
            ("backup_label", FileKind::BackupLabel),
            ("PG_VERSION", FileKind::Version),
            ("pg_wal/000000010000000000000002", FileKind::Wal),
        ] {
            assert_eq!(classify(path), kind, "{path}");
        }
        for path in [
            "base/5/t3_16390",
            "base/5/t3_16390_fsm",
            "base/5/pg_internal.init",
            "base/pgsql_tmp/x",
            "base/5/0123",
            "base/5/0",
            "base/5/4294967296",
            "base/5/12_x",
            "base/5/12.",
            "base/5/12.0",
            "base/5/12.01",
            "base/5/+1",
            "base/x/12",
            "global/PG_VERSION",
            "pg_xact/00",
            "pg_xact/00af",
            "pg_xact/0000000",
            "pg_tblspc/16400/PG_14_1/5/1",
            "pg_twophase/1",
            "pg_wal/00000002.history",
            "pg_wal/archive_status/000000010000000000000002",
            "postgresql.conf",
            "",
            "base/5/pgsql_tmp1.2",
        ] {
            assert_eq!(classify(path), FileKind::Ignored, "{path}");
        }
    }
}
