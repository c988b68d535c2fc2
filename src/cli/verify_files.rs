//! The relation forks and SLRU segments of a data directory that no server uses.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that reads another program's files: no data path"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::base::key::{FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM};
use crate::base::page::PAGE_SIZE;
use crate::base::{RelNode, RelTag, SlruKind};
use crate::cli::pg::PgError;

/// Bytes of a full segment file of a relation (`RELSEG_SIZE` blocks).
const SEGMENT_BYTES: u64 = 1 << 30;
/// `DEFAULTTABLESPACE_OID`.
const PG_DEFAULT: u32 = 1663;
/// `GLOBALTABLESPACE_OID`.
const PG_GLOBAL: u32 = 1664;

/// One fork: its segment files in order.
#[derive(Clone, Debug, Default)]
pub struct ForkFiles {
    /// Paths of segments 0, 1, …
    pub segments: Vec<PathBuf>,
    /// Size in blocks.
    pub blocks: u32,
}

impl ForkFiles {
    /// Calls `page` with number and bytes of every block.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn pages(&self, mut page: impl FnMut(u32, &[u8])) -> Result<(), PgError> {
        let mut number = 0;
        for path in &self.segments {
            let what = || PgError::os(path.display().to_string());
            let mut file = fs::File::open(path).map_err(what())?;
            let mut buffer = vec![0; 64 * PAGE_SIZE];
            loop {
                let filled = fill(&mut file, &mut buffer).map_err(what())?;
                for bytes in buffer.get(..filled).unwrap_or_default().chunks_exact(PAGE_SIZE) {
                    if number < self.blocks {
                        page(number, bytes);
                        number += 1;
                    }
                }
                if filled < buffer.len() {
                    break;
                }
            }
        }
        Ok(())
    }

    /// Reads one block; `None` past the end.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn page(&self, block: u32) -> Result<Option<Vec<u8>>, PgError> {
        if block >= self.blocks {
            return Ok(None);
        }
        let offset = u64::from(block) * PAGE_SIZE as u64;
        let index = usize::try_from(offset / SEGMENT_BYTES).unwrap_or(usize::MAX);
        let Some(path) = self.segments.get(index) else { return Ok(None) };
        let what = || PgError::os(path.display().to_string());
        let mut file = fs::File::open(path).map_err(what())?;
        file.seek(SeekFrom::Start(offset % SEGMENT_BYTES)).map_err(what())?;
        let mut page = vec![0; PAGE_SIZE];
        file.read_exact(&mut page).map_err(what())?;
        Ok(Some(page))
    }
}

fn fill(file: &mut fs::File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..)
        && !rest.is_empty()
    {
        match file.read(rest)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// What a data directory holds.
#[derive(Clone, Debug, Default)]
pub struct DataDirectory {
    /// All relation forks, free space maps included; the main forks of unlogged relations (those
    /// that have an init fork) left out, as no WAL says what they hold.
    pub forks: BTreeMap<RelTag, ForkFiles>,
    /// Tablespace and database of every database directory.
    pub databases: BTreeSet<(u32, u32)>,
    /// SLRU segments with their bytes.
    pub slru: BTreeMap<(SlruKind, u32), Vec<u8>>,
}

/// Reads the lists of a data directory.
///
/// # Errors
/// When a directory or file cannot be read, or a file has a broken length.
pub fn scan(data: &Path) -> Result<DataDirectory, PgError> {
    let mut found = DataDirectory::default();
    scan_relations(&data.join("global"), PG_GLOBAL, 0, &mut found)?;
    scan_databases(&data.join("base"), PG_DEFAULT, &mut found)?;
    for (name, path) in entries(&data.join("pg_tblspc"))? {
        let Ok(spc) = name.parse::<u32>() else { continue };
        for (version, path) in entries(&path)? {
            if version.starts_with("PG_15_") {
                scan_databases(&path, spc, &mut found)?;
            }
        }
    }
    let unlogged: BTreeSet<RelNode> =
        found.forks.keys().filter(|tag| tag.fork == FORK_INIT).map(|tag| tag.node).collect();
    found.forks.retain(|tag, _| tag.fork == FORK_INIT || !unlogged.contains(&tag.node));
    for kind in SlruKind::ALL {
        for (name, path) in entries(&data.join(kind.directory()))? {
            let Ok(segment) = u32::from_str_radix(&name, 16) else { continue };
            let bytes = fs::read(&path).map_err(PgError::os(path.display().to_string()))?;
            found.slru.insert((kind, segment), bytes);
        }
    }
    Ok(found)
}

/// Entries of a directory, sorted by name; none when it does not exist.
fn entries(dir: &Path) -> Result<BTreeMap<String, PathBuf>, PgError> {
    let what = || PgError::os(dir.display().to_string());
    let list = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        other => other.map_err(what())?,
    };
    list.map(|entry| {
        let entry = entry.map_err(what())?;
        Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
    })
    .collect()
}

fn scan_databases(dir: &Path, spc: u32, found: &mut DataDirectory) -> Result<(), PgError> {
    for (name, path) in entries(dir)? {
        if let Ok(db) = name.parse() {
            found.databases.insert((spc, db));
            scan_relations(&path, spc, db, found)?;
        }
    }
    Ok(())
}

fn scan_relations(dir: &Path, spc: u32, db: u32, found: &mut DataDirectory) -> Result<(), PgError> {
    let mut segments: BTreeMap<RelTag, BTreeMap<u32, (PathBuf, u64)>> = BTreeMap::new();
    for (name, path) in entries(dir)? {
        let Some((rel, fork, segment)) = parse_name(&name) else { continue };
        let tag = RelNode { spc, db, rel }.fork(fork);
        let bytes = fs::metadata(&path).map_err(PgError::os(path.display().to_string()))?.len();
        segments.entry(tag).or_default().insert(segment, (path, bytes));
    }
    for (tag, files) in segments {
        let mut fork = ForkFiles::default();
        for (expected, (segment, (path, bytes))) in (0..).zip(files) {
            // As PostgreSQL does, a fork ends at its first segment that is not full.
            if segment != expected {
                break;
            }
            let blocks = u32::try_from(bytes / PAGE_SIZE as u64).unwrap_or(u32::MAX);
            fork.blocks = fork.blocks.saturating_add(blocks);
            fork.segments.push(path);
            if bytes < SEGMENT_BYTES {
                break;
            }
        }
        found.forks.insert(tag, fork);
    }
    Ok(())
}

/// Relation, fork and segment of a file name such as `16384_vm.1`; `None` for other files.
pub fn parse_name(name: &str) -> Option<(u32, u8, u32)> {
    let number = |text: &str| {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        digits.then(|| text.parse::<u32>().ok()).flatten()
    };
    let (name, segment) = match name.split_once('.') {
        None => (name, 0),
        Some((name, segment)) => (name, number(segment)?),
    };
    let (rel, fork) = match name.split_once('_') {
        None => (name, FORK_MAIN),
        Some((rel, "fsm")) => (rel, FORK_FSM),
        Some((rel, "vm")) => (rel, FORK_VM),
        Some((rel, "init")) => (rel, FORK_INIT),
        Some(_) => return None,
    };
    Some((number(rel)?, fork, segment))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_relation_files() {
        assert_eq!(parse_name("16384"), Some((16384, FORK_MAIN, 0)));
        assert_eq!(parse_name("16384.3"), Some((16384, FORK_MAIN, 3)));
        assert_eq!(parse_name("16384_vm.1"), Some((16384, FORK_VM, 1)));
        assert_eq!(parse_name("5_init"), Some((5, FORK_INIT, 0)));
        for other in ["t3_16384", "PG_VERSION", "pg_filenode.map", "pg_internal.init", "1_", "_vm"]
        {
            assert_eq!(parse_name(other), None, "{other}");
        }
    }
}
