//! Files that are not ours: backups and data directories that PostgreSQL wrote, and the staging
//! directory where a backup lies until it is imported.
//!
//! They are read and written through the page cache by plain blocking calls, because they need
//! neither direct I/O nor durability: an import that a crash interrupts starts over. Each call
//! moves a bounded amount of data; callers run on the background executor and yield between
//! calls. Nothing of a timeline is ever stored through this door.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the door to foreign files"
)]

use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::{IoCause, IoError};

/// What stands behind a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignKind {
    /// A regular file.
    File,
    /// A directory, or a link to one.
    Directory,
    /// Anything else, also a link to nowhere.
    Other,
}

/// One entry of a directory; links are followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignEntry {
    /// Name within the directory.
    pub name: String,
    /// What it is.
    pub kind: ForeignKind,
    /// Length of a file in bytes.
    pub len: u64,
}

/// An open file.
#[derive(Debug)]
pub struct ForeignFile {
    file: fs::File,
    path: PathBuf,
}

fn failed(operation: &'static str, path: &Path, error: &std::io::Error) -> IoError {
    let cause = match error.kind() {
        ErrorKind::NotFound => IoCause::NotFound,
        ErrorKind::AlreadyExists => IoCause::Exists,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => IoCause::NoSpace,
        _ => IoCause::Other(error.to_string()),
    };
    IoError { operation, path: path.to_owned(), cause }
}

impl ForeignFile {
    /// Opens a file for reading.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        let file = fs::File::open(path).map_err(|error| failed("open", path, &error))?;
        Ok(ForeignFile { file, path: path.to_owned() })
    }

    /// Creates a file for writing; an existing one is an error.
    pub fn create(path: &Path) -> Result<Self, IoError> {
        let file = fs::File::create_new(path).map_err(|error| failed("create", path, &error))?;
        Ok(ForeignFile { file, path: path.to_owned() })
    }

    /// Length in bytes.
    pub fn len(&self) -> Result<u64, IoError> {
        let metadata = self.file.metadata();
        Ok(metadata.map_err(|error| failed("stat", &self.path, &error))?.len())
    }

    /// True for a file of length zero.
    pub fn is_empty(&self) -> Result<bool, IoError> {
        Ok(self.len()? == 0)
    }

    /// Reads at `offset` until `buf` is full or the file ends; returns the bytes read.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize, IoError> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(failed("read", &self.path, &error)),
            }
        }
        Ok(done)
    }

    /// Appends bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        self.file.write_all(bytes).map_err(|error| failed("write", &self.path, &error))
    }
}

/// Entries of a directory, sorted by name. Names that are no UTF-8 are none of PostgreSQL's and
/// are left out.
pub fn list(dir: &Path) -> Result<Vec<ForeignEntry>, IoError> {
    let error = |error: std::io::Error| failed("list", dir, &error);
    let mut entries = Vec::new();
    for entry in fs::read_dir(dir).map_err(error)? {
        let entry = entry.map_err(error)?;
        let Some(name) = entry.file_name().to_str().map(str::to_owned) else { continue };
        let (kind, len) = match fs::metadata(entry.path()) {
            Ok(metadata) if metadata.is_file() => (ForeignKind::File, metadata.len()),
            Ok(metadata) if metadata.is_dir() => (ForeignKind::Directory, 0),
            _ => (ForeignKind::Other, 0),
        };
        entries.push(ForeignEntry { name, kind, len });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(entries)
}

/// Creates a directory and its parents.
pub fn create_dir_all(dir: &Path) -> Result<(), IoError> {
    fs::create_dir_all(dir).map_err(|error| failed("create directory", dir, &error))
}

/// Removes a directory and everything in it; one that does not exist is no error.
pub fn remove_dir_all(dir: &Path) -> Result<(), IoError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", dir, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_written_read_and_listed() {
        let dir = std::env::temp_dir().join(format!("pgstrata-foreign-{}", std::process::id()));
        remove_dir_all(&dir).unwrap();
        create_dir_all(&dir.join("b")).unwrap();
        let mut file = ForeignFile::create(&dir.join("a")).unwrap();
        file.append(b"hello ").unwrap();
        file.append(b"world").unwrap();
        let exists = ForeignFile::create(&dir.join("a")).unwrap_err();
        assert_eq!(exists.cause, IoCause::Exists);
        let file = ForeignFile::open(&dir.join("a")).unwrap();
        let mut buf = [0; 8];
        assert_eq!(file.read_at(6, &mut buf).unwrap(), 5);
        assert_eq!((&buf[..5], file.len().unwrap()), (&b"world"[..], 11));
        let names: Vec<_> = list(&dir).unwrap().into_iter().map(|e| (e.name, e.kind)).collect();
        let expected = [("a", ForeignKind::File), ("b", ForeignKind::Directory)];
        assert_eq!(names, expected.map(|(name, kind)| (name.to_owned(), kind)));
        remove_dir_all(&dir).unwrap();
        assert_eq!(list(&dir).unwrap_err().cause, IoCause::NotFound);
        remove_dir_all(&dir).unwrap();
    }
}
