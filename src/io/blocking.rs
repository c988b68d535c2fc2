//! What both implementations on a real file system do by plain blocking calls.

#![allow(clippy::disallowed_methods, reason = "this is the door to the disk")]

use std::io::{ErrorKind, Result};
use std::path::Path;

use super::DirEntry;

/// The entries of a directory, by name; one that is removed meanwhile is left out.
pub(super) fn list_directory(dir: &Path) -> Result<Vec<DirEntry>> {
    let mut entries = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = match entry.metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        entries.push(DirEntry {
            name: entry.file_name().to_string_lossy().into_owned(),
            is_dir: metadata.is_dir(),
            len: if metadata.is_dir() { 0 } else { metadata.len() },
        });
    }
    entries.sort();
    Ok(entries)
}
