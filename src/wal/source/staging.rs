//! Unpacks a base backup into a directory of plain files.
//!
//! The archive of the data directory goes to the root, the archive of a tablespace to
//! `pg_tblspc/OID/`, where PostgreSQL would have a symbolic link. The result looks like the
//! directory that `pg_basebackup` makes, and [`super::data_dir`] reads it. Nothing is synced: a
//! backup that a crash interrupts is taken again.

use std::path::{Path, PathBuf};

use super::base_backup::BackupEvent;
use super::error::SourceError;
use super::tar_stream::{TarEvent, TarReader};
use crate::io::foreign::{self, ForeignFile};

/// A staging directory that is being filled.
#[derive(Debug)]
pub struct Staging {
    root: PathBuf,
    /// Where the current archive goes, and its reader.
    archive: Option<(PathBuf, TarReader)>,
    file: Option<ForeignFile>,
    bytes_written: u64,
}

impl Staging {
    /// Empties and creates the directory `root`, which must be the node's own.
    pub fn create(root: &Path) -> Result<Self, SourceError> {
        foreign::remove_dir_all(root)?;
        foreign::create_dir_all(root)?;
        Ok(Staging { root: root.to_owned(), archive: None, file: None, bytes_written: 0 })
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Bytes of file content written so far.
    pub fn bytes_written(&self) -> u64 {
        self.bytes_written
    }

    /// Takes in one event of the backup: at most one message of data is written.
    pub fn apply(&mut self, event: &BackupEvent) -> Result<(), SourceError> {
        match event {
            BackupEvent::Archive { tablespace, name } => {
                self.end_archive()?;
                let target = match tablespace {
                    None => self.root.clone(),
                    Some(oid) => self.root.join("pg_tblspc").join(oid.to_string()),
                };
                foreign::create_dir_all(&target)?;
                self.archive = Some((target, TarReader::new(name)));
                Ok(())
            }
            BackupEvent::Data(bytes) => self.unpack(bytes),
            BackupEvent::Progress(_) => Ok(()),
            BackupEvent::End(_) => self.end_archive(),
        }
    }

    fn unpack(&mut self, bytes: &[u8]) -> Result<(), SourceError> {
        let Some((target, reader)) = self.archive.as_mut() else {
            return Err(SourceError::protocol("unpacking a backup", "data before an archive"));
        };
        reader.push(bytes);
        while let Some(event) = reader.next_event()? {
            match event {
                TarEvent::Directory { path } => foreign::create_dir_all(&target.join(path))?,
                TarEvent::File { path, .. } => {
                    let path = target.join(path);
                    if let Some(parent) = path.parent() {
                        foreign::create_dir_all(parent)?;
                    }
                    self.file = Some(ForeignFile::create(&path)?);
                }
                TarEvent::Data(data) => {
                    if let Some(file) = self.file.as_mut() {
                        file.append(&data)?;
                        self.bytes_written = self.bytes_written.saturating_add(data.len() as u64);
                    }
                }
                TarEvent::FileEnd => self.file = None,
                TarEvent::Other { .. } => {}
            }
        }
        Ok(())
    }

    fn end_archive(&mut self) -> Result<(), SourceError> {
        match self.archive.take() {
            Some((_, reader)) => reader.finish(),
            None => Ok(()),
        }
    }
}
