//! Reads a data directory of PostgreSQL 15 into the key space.
//!
//! 1. [`DataDir::scan`] lists the files (of a directory: a staged or plain base backup, or a
//!    cluster that was shut down; or of `base.tar` and `OID.tar`, which are indexed in place),
//!    says what each is by its path, and checks versions, `pg_control` and `backup_label`.
//! 2. [`DataDir::values`] hands out every key with its value, in key order, reading a few blocks
//!    at a time.
//!
//! What PostgreSQL would not use after recovery is left out: temporary files, caches, the forks
//! of an unlogged relation other than its template, segments behind one that is not full, and
//! the broken-off last block of a file that was copied while it grew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use crate::base::key::FORK_INIT;
use crate::base::page::PAGE_SIZE;
use crate::base::{Kind, Lsn, RelTag, SlruKind};
use crate::io::IoError;
use crate::io::foreign::{self, ForeignFile, ForeignKind};
use crate::limits::IMPORT_SMALL_FILE_BYTES_MAX;
use crate::wal::backup_label::BackupLabel;
use crate::wal::control_file::{ControlFile, DbState, SEGMENT_BLOCKS};

use super::base_backup::archive_tablespace;
use super::error::SourceError;
use super::tar_stream::{TarEvent, TarReader};

mod names;
mod values;

use names::{FileKind, classify, worth_listing};
pub use values::Values;

/// Why a data directory cannot be imported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DataDirError {
    /// A file cannot be read.
    #[error(transparent)]
    Io(#[from] IoError),
    /// A tar archive is damaged.
    #[error(transparent)]
    Archive(#[from] SourceError),
    /// The directory is not what is needed.
    #[error("cannot import {}: {detail}", path.display())]
    Unusable {
        /// The directory.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// A file's content is wrong.
    #[error("cannot import {}: {detail}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
}

impl DataDirError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            DataDirError::Io(error) => error.kind(),
            DataDirError::Archive(error) => error.kind(),
            DataDirError::Unusable { .. } => Kind::Invalid,
            DataDirError::Damaged { .. } => Kind::Corrupt,
        }
    }
}

/// Where a file's bytes lie: in a file of its own, or within an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRef {
    /// The file on disk.
    pub path: Arc<Path>,
    /// Offset of the first byte in it.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl FileRef {
    /// Reads up to `len` bytes at `at`; fewer at the end. Bytes that vanished since the scan are
    /// an error.
    pub fn read(&self, at: u64, len: usize) -> Result<Bytes, DataDirError> {
        let len = usize::try_from(self.len.saturating_sub(at)).unwrap_or(len).min(len);
        let mut buf = vec![0; len];
        let file = ForeignFile::open(&self.path)?;
        if file.read_at(self.offset.saturating_add(at), &mut buf)? < len {
            return Err(self.damaged("it became shorter during the import; is its server running?"));
        }
        Ok(Bytes::from(buf))
    }

    fn read_small(&self) -> Result<Bytes, DataDirError> {
        if self.len > IMPORT_SMALL_FILE_BYTES_MAX {
            return Err(self.damaged("it is far larger than such a file can be"));
        }
        self.read(0, usize::try_from(self.len).unwrap_or(0))
    }

    fn damaged(&self, detail: impl Into<String>) -> DataDirError {
        DataDirError::Damaged { path: self.path.to_path_buf(), detail: detail.into() }
    }
}

/// A data directory that was looked through.
#[derive(Debug, Clone)]
pub struct DataDir {
    /// `pg_control`, whole.
    pub control_bytes: Bytes,
    /// What it says.
    pub cluster: ControlFile,
    /// The text of `backup_label`; `None` for a cluster that was shut down.
    pub backup_label: Option<String>,
    /// WAL is needed from here on. Without a `backup_label` the data is consistent here: it is
    /// the position of the shutdown checkpoint's record.
    pub start_lsn: Lsn,
    /// PostgreSQL's timeline at `start_lsn`.
    pub timeline: u32,
    /// Segments of `pg_wal`, by name.
    pub wal: BTreeMap<String, FileRef>,
    entries: Entries,
}

/// Everything that is kept, each map in key order.
#[derive(Debug, Clone, Default)]
struct Entries {
    relmaps: BTreeMap<(u32, u32), FileRef>,
    /// Segments of each fork, from 0 on.
    relations: BTreeMap<RelTag, BTreeMap<u32, FileRef>>,
    slrus: BTreeMap<(SlruKind, u32), FileRef>,
    two_phase: BTreeMap<u32, FileRef>,
    databases: BTreeMap<(u32, u32), FileRef>,
}

/// What a scan collects.
#[derive(Default)]
struct Scan {
    entries: Entries,
    wal: BTreeMap<String, FileRef>,
    control: Option<FileRef>,
    label: Option<FileRef>,
    version: Option<FileRef>,
}

impl DataDir {
    /// Looks through a data directory, or a directory with the archives of `pg_basebackup -Ft`.
    /// Lists directories and reads archive headers, but no relation.
    pub fn scan(path: &Path) -> Result<DataDir, DataDirError> {
        let unusable = |detail: &str| DataDirError::Unusable {
            path: path.to_owned(),
            detail: detail.to_owned(),
        };
        let mut scan = Scan::default();
        let entries = foreign::list(path)?;
        let has = |name: &str| entries.iter().any(|entry| entry.name == name);
        if has("PG_VERSION") {
            scan.directories(path)?;
        } else if has("base.tar") {
            for entry in entries.iter().filter(|entry| entry.name.ends_with(".tar")) {
                scan.archive(path, &entry.name)?;
            }
        } else if entries.iter().any(|entry| entry.name.starts_with("base.tar.")) {
            return Err(unusable(
                "its archives are compressed; unpack them first (gunzip *.tar.gz, or lz4 -d, \
                 zstd -d)",
            ));
        } else {
            return Err(unusable("there is neither PG_VERSION nor base.tar in it"));
        }
        let version = scan.version.as_ref().ok_or_else(|| unusable("it lacks PG_VERSION"))?;
        let version = version.read_small()?;
        if version.trim_ascii() != b"15" {
            let version = String::from_utf8_lossy(version.trim_ascii()).into_owned();
            let detail = format!("it is of PostgreSQL {version}; only 15 can be imported");
            return Err(unusable(&detail));
        }
        scan.finish(path)
    }

    /// Bytes that [`Values`] will read.
    pub fn total_bytes(&self) -> u64 {
        let relations = self.entries.relations.values().flat_map(BTreeMap::values);
        relations.chain(self.entries.slrus.values()).map(|file| file.len).sum()
    }

    /// Forks of relations, with their sizes in blocks.
    pub fn relations(&self) -> impl Iterator<Item = (RelTag, u32)> + '_ {
        self.entries.relations.iter().map(|(tag, segments)| (*tag, blocks(segments)))
    }

    /// Every key and its value, in key order.
    pub fn values(&self) -> Values<'_> {
        Values::new(self)
    }
}

/// Size of a fork in blocks, as `mdnblocks` counts it. Segments are full up to the last.
fn blocks(segments: &BTreeMap<u32, FileRef>) -> u32 {
    segments.values().fold(0, |sum, file| sum.saturating_add(file_blocks(file)))
}

/// Whole blocks of a file.
fn file_blocks(file: &FileRef) -> u32 {
    u32::try_from(file.len / PAGE_SIZE as u64).unwrap_or(u32::MAX)
}

impl Scan {
    fn directories(&mut self, root: &Path) -> Result<(), DataDirError> {
        let mut pending = vec![String::new()];
        while let Some(dir) = pending.pop() {
            for entry in foreign::list(&root.join(&dir))? {
                let path = match dir.is_empty() {
                    true => entry.name.clone(),
                    false => format!("{dir}/{}", entry.name),
                };
                match entry.kind {
                    ForeignKind::Directory if worth_listing(&path) => pending.push(path),
                    ForeignKind::File => {
                        let place: Arc<Path> = root.join(&path).into();
                        self.add(&path, FileRef { path: place, offset: 0, len: entry.len })?;
                    }
                    ForeignKind::Other if dir == "pg_tblspc" => {
                        return Err(DataDirError::Unusable {
                            path: root.join(&path),
                            detail: "the tablespace's directory is missing".to_owned(),
                        });
                    }
                    ForeignKind::Directory | ForeignKind::Other => {}
                }
            }
        }
        Ok(())
    }

    /// Indexes one archive: reads its headers and passes over the data.
    fn archive(&mut self, root: &Path, name: &str) -> Result<(), DataDirError> {
        let prefix = match name {
            "pg_wal.tar" => "pg_wal/".to_owned(),
            _ => match archive_tablespace(name) {
                Ok(None) => String::new(),
                Ok(Some(oid)) => format!("pg_tblspc/{oid}/"),
                // Some other archive that lies there.
                Err(_) => return Ok(()),
            },
        };
        let place: Arc<Path> = root.join(name).into();
        let file = ForeignFile::open(&place)?;
        let len = file.len()?;
        let mut reader = TarReader::new(name);
        let mut buf = [0; 512];
        while !reader.finished() {
            let read = file.read_at(reader.offset(), &mut buf)?;
            reader.push(buf.get(..read).unwrap_or_default());
            if read < buf.len() {
                reader.finish()?;
            }
            while let Some(event) = reader.next_event()? {
                if let TarEvent::File { path, len: file_len } = event {
                    let offset = reader.offset();
                    if offset.checked_add(file_len).is_none_or(|end| end > len) {
                        reader.finish()?;
                    }
                    let file = FileRef { path: place.clone(), offset, len: file_len };
                    self.add(&format!("{prefix}{path}"), file)?;
                    reader.skip_file();
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &str, file: FileRef) -> Result<(), DataDirError> {
        let entries = &mut self.entries;
        let duplicate = match classify(path) {
            FileKind::Relation(tag, segment) => {
                let segments = entries.relations.entry(tag).or_default();
                segments.insert(segment, file.clone()).is_some()
            }
            FileKind::RelMap { spc, db } => {
                entries.relmaps.insert((spc, db), file.clone()).is_some()
            }
            FileKind::DatabaseVersion { spc, db } => {
                entries.databases.insert((spc, db), file.clone()).is_some()
            }
            FileKind::Slru(kind, segment) => {
                entries.slrus.insert((kind, segment), file.clone()).is_some()
            }
            FileKind::TwoPhase(xid) => entries.two_phase.insert(xid, file.clone()).is_some(),
            FileKind::Control => self.control.replace(file.clone()).is_some(),
            FileKind::BackupLabel => self.label.replace(file.clone()).is_some(),
            FileKind::Version => self.version.replace(file.clone()).is_some(),
            FileKind::Wal => {
                let name = path.rsplit('/').next().unwrap_or(path);
                self.wal.insert(name.to_owned(), file.clone()).is_some()
            }
            FileKind::Ignored => false,
        };
        match duplicate {
            true => Err(file.damaged(format!("'{path}' is there twice"))),
            false => Ok(()),
        }
    }

    fn finish(mut self, path: &Path) -> Result<DataDir, DataDirError> {
        let unusable = |detail: &str| DataDirError::Unusable {
            path: path.to_owned(),
            detail: detail.to_owned(),
        };
        let control = self.control.take().ok_or_else(|| unusable("it lacks global/pg_control"))?;
        let control_bytes = control.read_small()?;
        let cluster = ControlFile::parse(&control_bytes).map_err(|error| match error.kind() {
            Kind::Invalid => unusable(&error.to_string()),
            _ => control.damaged(error.to_string()),
        })?;
        let label = self.label.as_ref().map(FileRef::read_small).transpose()?;
        let label = label.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (start_lsn, timeline) = match (&label, &self.label) {
            (Some(text), Some(file)) => {
                let label = BackupLabel::parse(text);
                let label = label.map_err(|error| file.damaged(error.to_string()))?;
                (label.start_lsn, label.timeline)
            }
            _ if cluster.state == DbState::ShutDown => {
                (cluster.checkpoint.redo, cluster.checkpoint.timeline)
            }
            _ => {
                return Err(unusable(
                    "it is neither a base backup (backup_label is missing) nor a cluster that was \
                     shut down cleanly; stop its server with pg_ctl stop -m fast, or take a \
                     backup with pg_basebackup",
                ));
            }
        };
        self.entries.prune();
        self.entries.check()?;
        let (wal, entries, backup_label) = (self.wal, self.entries, label);
        Ok(DataDir { control_bytes, cluster, backup_label, start_lsn, timeline, wal, entries })
    }
}

impl Entries {
    /// Leaves out what recovery would not look at.
    fn prune(&mut self) {
        // Recovery resets an unlogged relation to its template (`ResetUnloggedRelations`).
        let forks = self.relations.keys();
        let unlogged: std::collections::BTreeSet<_> =
            forks.filter(|tag| tag.fork == FORK_INIT).map(|tag| tag.node).collect();
        self.relations.retain(|tag, _| tag.fork == FORK_INIT || !unlogged.contains(&tag.node));
        for segments in self.relations.values_mut() {
            let mut next = 0;
            let mut open = true;
            segments.retain(|number, file| {
                let keep = open && *number == next;
                open = keep && file_blocks(file) >= SEGMENT_BLOCKS;
                next = next.saturating_add(1);
                keep
            });
        }
        // Without its first segment a fork does not exist.
        self.relations.retain(|_, segments| !segments.is_empty());
    }

    /// Sizes that no PostgreSQL makes.
    fn check(&self) -> Result<(), DataDirError> {
        for (tag, segments) in &self.relations {
            for file in segments.values() {
                if file_blocks(file) > SEGMENT_BLOCKS || blocks(segments) == u32::MAX {
                    return Err(file.damaged(format!("relation {tag} is too large")));
                }
            }
        }
        for ((kind, segment), file) in &self.slrus {
            if file_blocks(file) > crate::base::key::SLRU_PAGES_PER_SEGMENT {
                let name = format!("{}/{segment:04X}", kind.directory());
                return Err(file.damaged(format!("{name} is longer than a segment")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::RelNode;

    const FULL: u64 = 1 << 30;

    fn scan(files: &[(&str, u64)]) -> Scan {
        let mut scan = Scan::default();
        for (path, len) in files {
            let file = FileRef { path: Path::new(path).into(), offset: 0, len: *len };
            scan.add(path, file).unwrap();
        }
        scan.entries.prune();
        scan
    }

    fn sizes(files: &[(&str, u64)]) -> Vec<(String, u32)> {
        let entries = scan(files).entries;
        entries.check().unwrap();
        entries.relations.iter().map(|(tag, files)| (tag.to_string(), blocks(files))).collect()
    }

    #[test]
    fn segments_count_as_in_mdnblocks() {
        let one = |blocks| vec![("1663/1/9".to_owned(), blocks)];
        assert_eq!(sizes(&[("base/1/9", 8192 * 3 + 100)]), one(3));
        assert_eq!(sizes(&[("base/1/9", FULL), ("base/1/9.1", 8192)]), one(131_073));
        assert_eq!(sizes(&[("base/1/9", FULL), ("base/1/9.1", 0)]), one(131_072));
        // What lies behind a segment that is not full, or behind a gap, is not part of the fork.
        assert_eq!(sizes(&[("base/1/9", FULL - 1), ("base/1/9.1", 8192)]), one(131_071));
        assert_eq!(sizes(&[("base/1/9", FULL), ("base/1/9.2", 8192)]), one(131_072));
        assert_eq!(sizes(&[("base/1/9.1", 8192)]), []);
    }

    #[test]
    fn unlogged_relations_keep_their_template_only() {
        let files =
            [("base/1/9", 1), ("base/1/9_fsm", 1), ("base/1/9_init", 8192), ("base/1/8", 0)];
        let expected = [("1663/1/8".to_owned(), 0), ("1663/1/9_init".to_owned(), 1)];
        assert_eq!(sizes(&files), expected);
    }

    #[test]
    fn impossible_files_are_refused() {
        assert!(scan(&[("base/1/9", FULL + 8192)]).entries.check().is_err());
        assert!(scan(&[("pg_xact/0000", 33 * 8192)]).entries.check().is_err());
        let mut twice = scan(&[("base/1/9", 8192)]);
        let file = FileRef { path: Path::new("x").into(), offset: 0, len: 1 };
        assert!(twice.add("base/1/9", file).is_err());
        let tag = RelNode { spc: 1663, db: 1, rel: 9 }.fork(0);
        assert!(twice.entries.relations.contains_key(&tag));
    }

    #[test]
    fn directories_that_are_no_clusters_are_refused_with_a_reason() {
        let root = std::env::temp_dir().join(format!("pgstrata-scan-{}", std::process::id()));
        let refused = |file: &str, content: &[u8], part: &str| {
            foreign::remove_dir_all(&root).unwrap();
            foreign::create_dir_all(&root).unwrap();
            ForeignFile::create(&root.join(file)).unwrap().append(content).unwrap();
            let error = DataDir::scan(&root).unwrap_err();
            assert!(error.to_string().contains(part), "{file}: {error}");
        };
        refused("base.tar.gz", b"", "gunzip");
        refused("other", b"", "neither PG_VERSION nor base.tar");
        refused("PG_VERSION", b"16\n", "only 15");
        refused("PG_VERSION", b"15\n", "lacks global/pg_control");
        refused("base.tar", b"", "ends early");
        refused("base.tar", &[1; 1024], "checksum is wrong");
        foreign::remove_dir_all(&root).unwrap();
        assert!(matches!(DataDir::scan(&root), Err(DataDirError::Io(_))));
    }
}
