//! Space of removed files, kept for new ones.
//!
//! A file system that is mounted with `discard` tells the device about every block that it frees,
//! and the device does nothing else meanwhile: 16 MiB can hold up every read for 20 ms. So large
//! files are not removed but put into a directory of their own, from where the next journal segment
//! or layer file takes them, with their blocks. What is too much is given back a little at a time.
//!
//! The directory is the only state, so that executors need not talk to each other: whoever
//! succeeds in renaming a file has it. Names:
//!
//! - `<16 hex digits>`: anybody's;
//! - `….claimed`: being made ready for its next use; at start, anybody's again;
//! - `….trim`: being given back to the file system.
//!
//! Everything here blocks, and is called on threads that may.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is the door to the disk"
)]

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};

use crate::limits::{SPARE_BYTES_MIN, SPARE_TRIM_BYTES};

const CLAIMED: &str = "claimed";
const TRIM: &str = "trim";

/// A directory of files whose space is kept.
pub struct Spares {
    dir: PathBuf,
    bytes_max: u64,
}

struct Spare {
    path: PathBuf,
    bytes: u64,
}

impl Spares {
    /// Keeps up to `bytes_max` bytes of files in `dir`, for files of the same file system.
    pub fn new(dir: &Path, bytes_max: u64) -> Spares {
        Spares { dir: dir.to_owned(), bytes_max }
    }

    /// Makes the directory ready for a new process: creates it, and frees what an earlier process
    /// had claimed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn prepare(&self) -> Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            Ok(()) | Err(_) => {}
        }
        for claimed in self.list(Some(CLAIMED))? {
            fs::rename(&claimed.path, claimed.path.with_extension(""))?;
        }
        Ok(())
    }

    /// The files with this extension, by length.
    fn list(&self, extension: Option<&str>) -> Result<Vec<Spare>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension() != extension.map(OsStr::new) {
                continue;
            }
            // Somebody may have taken it meanwhile.
            let Ok(metadata) = fs::symlink_metadata(&path) else { continue };
            if metadata.is_file() {
                found.push(Spare { path, bytes: metadata.len() });
            }
        }
        found.sort_by(|a, b| (a.bytes, &a.path).cmp(&(b.bytes, &b.path)));
        Ok(found)
    }

    /// Removes the file at `path`, which nobody has open; its space may be kept. True if more is
    /// kept than shall be, and [`Spares::trim`] has something to do.
    ///
    /// # Errors
    /// As for removing a file.
    pub fn remove(&self, path: &Path) -> Result<bool> {
        let metadata = fs::symlink_metadata(path)?;
        if !metadata.is_file() || metadata.len() < SPARE_BYTES_MIN {
            return fs::remove_file(path).map(|()| false);
        }
        let spare = self.dir.join(format!("{:016x}", fastrand::u64(..)));
        match fs::rename(path, &spare) {
            Ok(()) => Ok(self.excess()? > 0),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(error),
            // Another file system.
            Err(_) => fs::remove_file(path).map(|()| false),
        }
    }

    /// Removes a directory with everything in it, as [`Spares::remove`] does files.
    ///
    /// # Errors
    /// As for removing a directory.
    pub fn remove_dir_all(&self, dir: &Path) -> Result<bool> {
        let mut more = false;
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            more |= match entry.file_type()?.is_dir() {
                true => self.remove_dir_all(&entry.path())?,
                false => self.remove(&entry.path())?,
            };
        }
        fs::remove_dir(dir)?;
        Ok(more)
    }

    /// Bytes that are kept beyond what shall be.
    fn excess(&self) -> Result<u64> {
        let kept: u64 = self.list(None)?.iter().map(|spare| spare.bytes).sum();
        Ok(kept.saturating_sub(self.bytes_max))
    }

    /// Puts a file of `len` zeros, whose blocks are there, at `target`. False if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; others of the file system.
    pub fn take_zeroed(&self, len: u64, target: &Path) -> Result<bool> {
        for spare in self.list(None)?.into_iter().filter(|spare| spare.bytes == len) {
            let claimed = spare.path.with_extension(CLAIMED);
            if fs::rename(&spare.path, &claimed).is_err() {
                continue;
            }
            // The zeros must be there before the name is: a power loss may keep the name alone.
            if zero(&claimed, len).is_err() {
                fs::rename(&claimed, spare.path.with_extension(TRIM))?;
                return Ok(false);
            }
            return match rename_new(&claimed, target) {
                Ok(()) => Ok(true),
                Err(error) => {
                    fs::rename(&claimed, &spare.path)?;
                    Err(error)
                }
            };
        }
        Ok(false)
    }

    /// Puts a file with anything in it at `target`, for one that will have about `about` bytes.
    /// False if there is none of such a size.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; others of the file system.
    pub fn take(&self, about: u64, target: &Path) -> Result<bool> {
        // The tail of a longer one has to be given back.
        let most = about.saturating_add(about / 4);
        for spare in self.list(None)?.into_iter().rev().filter(|spare| spare.bytes <= most) {
            match rename_new(&spare.path, target) {
                Ok(()) => return Ok(true),
                // Somebody else has it.
                Err(error) if error.kind() == ErrorKind::NotFound && !spare.path.exists() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Gives a little of what is too much back. True if there is more to do, after a pause.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn trim(&self) -> Result<bool> {
        if let Some(spare) = self.list(Some(TRIM))?.into_iter().next() {
            match spare.bytes.checked_sub(SPARE_TRIM_BYTES) {
                Some(rest) if rest > 0 => cut(&spare.path, rest)?,
                _ => ignore_missing(fs::remove_file(&spare.path))?,
            }
            return Ok(true);
        }
        let excess = self.excess()?;
        if excess == 0 {
            return Ok(false);
        }
        let spares = self.list(None)?;
        let fitting = spares.iter().find(|spare| spare.bytes >= excess).or(spares.last());
        if let Some(spare) = fitting {
            ignore_missing(fs::rename(&spare.path, spare.path.with_extension(TRIM)))?;
        }
        Ok(true)
    }

    /// Gives everything back, because the file system is full.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_all(&self) -> Result<()> {
        for spare in self.list(Some(TRIM))?.into_iter().chain(self.list(None)?) {
            ignore_missing(fs::remove_file(&spare.path))?;
        }
        Ok(())
    }
}

fn ignore_missing(result: Result<()>) -> Result<()> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Renames without replacing anything.
fn rename_new(source: &Path, target: &Path) -> Result<()> {
    let flags = RenameFlags::RENAME_NOREPLACE;
    renameat2(AT_FDCWD, source, AT_FDCWD, target, flags).map_err(Error::from)
}

/// Makes the bytes of a file zeros, durably, without giving up its blocks or writing them.
fn zero(path: &Path, len: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    let len = i64::try_from(len).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
    fallocate(&file, FallocateFlags::FALLOC_FL_ZERO_RANGE, 0, len)?;
    file.sync_data()
}

/// Cuts a file off. It is synced, so that not many cuts reach the device at once.
fn cut(path: &Path, len: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(len)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let binary = std::env::current_exe().unwrap();
            let dir = binary.with_file_name(format!("spares-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Place(dir)
        }

        fn spares(&self, bytes_max: u64) -> Spares {
            let spares = Spares::new(&self.0.join("spare"), bytes_max);
            spares.prepare().unwrap();
            spares
        }

        fn file(&self, name: &str, len: u64) -> PathBuf {
            let path = self.0.join(name);
            fs::write(&path, vec![0xA5; len as usize]).unwrap();
            path
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn sizes(spares: &Spares) -> Vec<u64> {
        spares.list(None).unwrap().iter().map(|spare| spare.bytes).collect()
    }

    #[test]
    fn a_removed_file_comes_back_as_zeros_or_as_it_is() {
        let place = Place::new("back");
        let spares = place.spares(100 * MIB);
        let target = place.0.join("target");
        assert!(!spares.take_zeroed(4 * MIB, &target).unwrap());
        for len in [4 * MIB, 3 * MIB, 1000] {
            assert!(!spares.remove(&place.file("a", len)).unwrap());
        }
        // Small ones are just removed.
        assert_eq!(sizes(&spares), [3 * MIB, 4 * MIB]);
        assert!(!spares.take_zeroed(5 * MIB, &target).unwrap(), "only what has the length");
        assert!(spares.take_zeroed(4 * MIB, &target).unwrap());
        let zeros = fs::read(&target).unwrap();
        assert!(zeros.len() as u64 == 4 * MIB && zeros.iter().all(|byte| *byte == 0));
        // Nothing is replaced.
        let error = spares.take(3 * MIB, &target).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        fs::remove_file(&target).unwrap();
        assert!(!spares.take(2 * MIB, &target).unwrap(), "too long");
        assert!(spares.take(9 * MIB, &target).unwrap());
        assert_eq!(fs::read(&target).unwrap(), vec![0xA5; 3 * MIB as usize]);
        assert_eq!(sizes(&spares), [0u64; 0]);
        assert_eq!(spares.remove(&place.0.join("no")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_is_too_much_goes_bit_by_bit() {
        let place = Place::new("trim");
        let spares = place.spares(5 * MIB);
        assert!(!spares.trim().unwrap());
        let inner = place.0.join("tree/inner");
        fs::create_dir_all(&inner).unwrap();
        for name in ["tree/a", "tree/inner/b", "tree/c"] {
            place.file(name, 3 * MIB);
        }
        assert!(spares.remove_dir_all(&place.0.join("tree")).unwrap());
        assert!(!place.0.join("tree").exists());
        assert_eq!(sizes(&spares).len(), 3);
        let mut steps = 0;
        while spares.trim().unwrap() {
            steps += 1;
            assert!(steps < 100);
        }
        assert!(steps > 2 * 3 * MIB / SPARE_TRIM_BYTES, "{steps}");
        assert_eq!(sizes(&spares), [3 * MIB]);
        spares.remove_all().unwrap();
        assert_eq!(fs::read_dir(place.0.join("spare")).unwrap().count(), 0);
    }

    #[test]
    fn what_a_dead_process_has_claimed_is_free_again() {
        let place = Place::new("claimed");
        let spares = place.spares(5 * MIB);
        let claimed = place.file("spare/00.claimed", MIB);
        assert!(!spares.take(MIB, &place.0.join("target")).unwrap());
        drop(spares);
        let spares = place.spares(5 * MIB);
        assert!(!claimed.exists());
        assert!(spares.take(MIB, &place.0.join("target")).unwrap());
    }
}
