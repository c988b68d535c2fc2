//! Space of removed files, kept for new ones.
//!
//! A file system that is mounted with `discard` tells the device about every block that it frees,
//! and the device does nothing else meanwhile: 16 MiB can hold up every read for 20 ms. So large
//! files are not removed but put into a directory of their own, from where the next journal segment
//! or layer file takes them, with their blocks. What is too much is given back a little at a time,
//! by a thread that looks for it now and then.
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

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fs::{self, DirBuilder, Metadata, OpenOptions};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use nix::fcntl::{AT_FDCWD, FallocateFlags, RenameFlags, fallocate, renameat2};

use crate::limits::{
    SPARE_BACKLOG_BYTES, SPARE_BYTES_MIN, SPARE_LONGER_SHARE, SPARE_LOOK_MS, SPARE_TRIM_BYTES,
    SPARE_TRIM_PAUSE_MS,
};

const CLAIMED: &str = "claimed";
const TRIM: &str = "trim";

/// A directory of files whose space is kept.
#[derive(Clone)]
pub struct Spares {
    dir: PathBuf,
    bytes_max: u64,
    /// Renames without replacing anything.
    rename_new: fn(&Path, &Path) -> Result<()>,
}

struct Spare {
    path: PathBuf,
    bytes: u64,
}

impl Spares {
    /// Keeps up to `bytes_max` bytes of files in `dir`, for files of the same file system.
    pub fn new(dir: &Path, bytes_max: u64) -> Spares {
        Spares { dir: dir.to_owned(), bytes_max, rename_new }
    }

    /// As on a file system that cannot rename without replacing.
    #[cfg(test)]
    pub(super) fn without_rename_new(self) -> Spares {
        Spares { rename_new: |_, _| Err(nix::errno::Errno::EINVAL.into()), ..self }
    }

    /// Makes the directory ready for a new process: creates it, and frees what an earlier process
    /// had claimed.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn prepare(&self) -> Result<()> {
        self.create_dir()?;
        for claimed in self.list(Some(CLAIMED))? {
            fs::rename(&claimed.path, claimed.path.with_extension(""))?;
        }
        Ok(())
    }

    fn create_dir(&self) -> Result<()> {
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
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

    /// Bytes of all files there now; 0 if the directory cannot be read.
    pub fn kept_bytes(&self) -> u64 {
        let kinds = [None, Some(CLAIMED), Some(TRIM)];
        kinds.into_iter().map(|kind| self.list(kind).map_or(0, |spares| bytes(&spares))).sum()
    }

    /// Removes the file at `path`, which nobody has open; its space may be kept.
    ///
    /// # Errors
    /// As for removing a file.
    pub fn remove(&self, path: &Path) -> Result<()> {
        // One after the other that is too much does not matter: it is given back later.
        let mut room = u64::MAX;
        self.put_away(path, &fs::symlink_metadata(path)?, &mut room)
    }

    /// Removes a directory with everything in it, as [`Spares::remove`] does files.
    ///
    /// # Errors
    /// As for removing a directory.
    pub fn remove_dir_all(&self, dir: &Path) -> Result<()> {
        // What a link leads to may be anybody's.
        if fs::symlink_metadata(dir)?.is_symlink() {
            return fs::remove_file(dir);
        }
        // It may be large, and those who look for a spare read the names of all of them.
        let kept = self.list(None).map_or(0, |spares| bytes(&spares));
        self.remove_tree(dir, &mut self.bytes_max.saturating_sub(kept))
    }

    fn remove_tree(&self, dir: &Path, room: &mut u64) -> Result<()> {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            // Somebody else may be removing it, too.
            ignore_missing(fs::symlink_metadata(&path).and_then(
                |metadata| match metadata.is_dir() {
                    true => self.remove_tree(&path, room),
                    false => self.put_away(&path, &metadata, room),
                },
            ))?;
        }
        fs::remove_dir(dir)
    }

    /// Removes a file; as long as there is room, its space is kept.
    fn put_away(&self, path: &Path, metadata: &Metadata, room: &mut u64) -> Result<()> {
        let len = metadata.len();
        if metadata.is_file() && len >= SPARE_BYTES_MIN {
            let spare = self.dir.join(format!("{:016x}", fastrand::u64(..)));
            let extension = if *room >= len { "" } else { TRIM };
            if fs::rename(path, spare.with_extension(extension)).is_ok() {
                *room = room.saturating_sub(len);
                return Ok(());
            }
            // Another file system, or somebody has removed the directory of spares.
        }
        fs::remove_file(path)
    }

    /// Puts a file of `len` zeros, whose blocks are there, at `target`. False if there is none.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]: of `target`. All others say something of the spares only, and
    /// nothing is at `target`.
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
            return match (self.rename_new)(&claimed, target) {
                Ok(()) => Ok(true),
                Err(error) => {
                    // The first error is the one that counts.
                    let _ = fs::rename(&claimed, &spare.path);
                    Err(error)
                }
            };
        }
        Ok(false)
    }

    /// Puts a file with anything in it at `target`, for one that will have at least `least` bytes.
    /// False if there is none of such a size.
    ///
    /// # Errors
    /// As for [`Spares::take_zeroed`].
    pub fn take(&self, least: u64, target: &Path) -> Result<bool> {
        // The tail of a longer one has to be given back, for which somebody waits.
        let most = least.saturating_add(least / SPARE_LONGER_SHARE);
        for spare in self.list(None)?.into_iter().rev().filter(|spare| spare.bytes <= most) {
            match (self.rename_new)(&spare.path, target) {
                Ok(()) => return Ok(true),
                // Somebody else has it.
                Err(error) if error.kind() == ErrorKind::NotFound && !spare.path.exists() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Starts a thread that gives back what is too much. There shall be one for a directory: each
    /// adds to what the device has to do.
    ///
    /// # Errors
    /// The operating system starts no thread.
    pub fn start_trimming(&self) -> Result<Trimming> {
        let (stop, stopped) = sync_channel::<Infallible>(1);
        let spares = self.clone();
        let wait = move |pause| stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout);
        let work = move || {
            let mut is_well = true;
            loop {
                let trimmed = spares.create_dir().and_then(|()| spares.trim(&wait));
                if let Err(error) = &trimmed
                    && is_well
                {
                    tracing::warn!("space of removed files is not given back: {error}");
                }
                is_well = trimmed.is_ok();
                if !wait(Duration::from_millis(SPARE_LOOK_MS)) {
                    return;
                }
            }
        };
        thread::Builder::new().name("spares".to_owned()).spawn(work)?;
        Ok(Trimming { _stop: stop })
    }

    /// Gives back what is too much, a little at a time, with pauses for which `wait` waits; ends
    /// early if that says false.
    fn trim(&self, wait: impl Fn(Duration) -> bool) -> Result<()> {
        while let Some((spare, pause)) = self.next_to_trim()? {
            let mut rest = spare.bytes;
            while rest > 0 {
                rest = rest.saturating_sub(SPARE_TRIM_BYTES);
                match if rest > 0 { cut(&spare.path, rest) } else { fs::remove_file(&spare.path) } {
                    // The disk was full, and all was given back.
                    Err(error) if error.kind() == ErrorKind::NotFound => break,
                    cut => cut?,
                }
                if !wait(pause) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// A file to be given back, and the pauses while that is done: shorter where there is so much
    /// that more might come than goes.
    fn next_to_trim(&self) -> Result<Option<(Spare, Duration)>> {
        let (mut trims, mut spares) = (self.list(Some(TRIM))?, self.list(None)?);
        let excess = bytes(&spares).saturating_sub(self.bytes_max);
        let backlog = bytes(&trims).saturating_add(excess);
        let pause = Duration::from_millis(SPARE_TRIM_PAUSE_MS);
        let pause = pause / (1 + backlog / SPARE_BACKLOG_BYTES).min(4) as u32;
        if trims.is_empty() && excess > 0 {
            // The longest fits the fewest new files.
            let Some(Spare { path, bytes }) = spares.pop() else { return Ok(None) };
            let trim = path.with_extension(TRIM);
            ignore_missing(fs::rename(&path, &trim))?;
            trims.push(Spare { path: trim, bytes });
        }
        Ok(trims.pop().map(|spare| (spare, pause)))
    }

    /// Gives everything back, because the file system is full.
    ///
    /// # Errors
    /// Those of the file system; what could be given back was.
    pub fn remove_all(&self) -> Result<()> {
        let mut result = Ok(());
        for spare in self.list(Some(TRIM))?.into_iter().chain(self.list(None)?) {
            result = result.and(ignore_missing(fs::remove_file(&spare.path)));
        }
        result
    }
}

/// The thread that [`Spares::start_trimming`] starts; it ends when this is dropped.
pub struct Trimming {
    _stop: SyncSender<Infallible>,
}

fn bytes(spares: &[Spare]) -> u64 {
    spares.iter().map(|spare| spare.bytes).sum()
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
    use std::cell::Cell;

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

        fn spare_count(&self) -> usize {
            fs::read_dir(self.0.join("spare")).map_or(0, |entries| entries.count())
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

    /// Counts the steps of a whole trimming.
    fn trim(spares: &Spares) -> u64 {
        let steps = Cell::new(0);
        let count = |_| {
            steps.set(steps.get() + 1);
            steps.get() < 100
        };
        spares.trim(count).unwrap();
        steps.get()
    }

    #[test]
    fn a_removed_file_comes_back_as_zeros_or_as_it_is() {
        let place = Place::new("back");
        let spares = place.spares(100 * MIB);
        let target = place.0.join("target");
        assert!(!spares.take_zeroed(4 * MIB, &target).unwrap());
        for len in [4 * MIB, 3 * MIB, 1000] {
            spares.remove(&place.file("a", len)).unwrap();
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
        assert!(!spares.take(5 * MIB / 2, &target).unwrap(), "too long");
        assert!(spares.take(9 * MIB, &target).unwrap());
        assert_eq!(fs::read(&target).unwrap(), vec![0xA5; 3 * MIB as usize]);
        assert_eq!(sizes(&spares), [0u64; 0]);
        assert_eq!(spares.remove(&place.0.join("no")).unwrap_err().kind(), ErrorKind::NotFound);
    }

    #[test]
    fn what_cannot_be_renamed_stays_where_it_is() {
        let place = Place::new("rename");
        let spares = place.spares(100 * MIB).without_rename_new();
        let (target, spare) = (place.0.join("target"), place.file("spare/00", 2 * MIB));
        assert_eq!(spares.take(2 * MIB, &target).unwrap_err().kind(), ErrorKind::InvalidInput);
        let zeroed = spares.take_zeroed(2 * MIB, &target);
        assert_eq!(zeroed.unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(!target.exists() && spare.exists());
        assert_eq!((place.spare_count(), spares.kept_bytes()), (1, 2 * MIB));
    }

    #[test]
    fn what_is_too_much_goes_bit_by_bit() {
        let place = Place::new("trim");
        let spares = place.spares(7 * MIB);
        assert_eq!(trim(&spares), 0);
        let inner = place.0.join("tree/inner");
        fs::create_dir_all(&inner).unwrap();
        for name in ["tree/a", "tree/inner/b", "tree/c"] {
            place.file(name, 3 * MIB);
        }
        std::os::unix::fs::symlink(place.0.join("away"), place.0.join("tree/inner/link")).unwrap();
        spares.remove_dir_all(&place.0.join("tree")).unwrap();
        assert!(!place.0.join("tree").exists());
        // Nobody is to look through those for which there is no room.
        assert_eq!(sizes(&spares), [3 * MIB, 3 * MIB]);
        assert_eq!(spares.kept_bytes(), 9 * MIB, "with what is being given back");
        assert_eq!(trim(&spares), 3);
        // Those that come one by one may take the place of a longer one.
        spares.remove(&place.file("d", 2 * MIB)).unwrap();
        assert_eq!(sizes(&spares), [2 * MIB, 3 * MIB, 3 * MIB]);
        assert_eq!(trim(&spares), 3);
        assert_eq!(sizes(&spares), [2 * MIB, 3 * MIB]);
        spares.remove_all().unwrap();
        assert_eq!(place.spare_count(), 0);
    }

    #[test]
    fn a_thread_gives_back_what_is_too_much() {
        let place = Place::new("thread");
        place.spares(0);
        place.file("spare/01.trim", 2 * MIB);
        place.file("spare/02", MIB + 5000);
        let until = |is_so: &dyn Fn() -> bool| {
            let waited = (0..1000).find(|_| {
                thread::sleep(Duration::from_millis(10));
                is_so()
            });
            assert!(waited.is_some(), "{} spares", place.spare_count());
        };
        // What an earlier process has left goes without anything being removed.
        let trimming = place.spares(0).start_trimming().unwrap();
        until(&|| place.spare_count() == 0);
        // A directory that is removed comes again.
        fs::remove_dir(place.0.join("spare")).unwrap();
        until(&|| place.0.join("spare").is_dir());
        drop(trimming);
    }

    #[test]
    fn all_may_be_given_back_while_some_is() {
        let place = Place::new("all");
        let spares = place.spares(0);
        for number in 0..3 {
            place.file(&format!("spare/{number:02}"), 4 * MIB);
        }
        let steps = Cell::new(0);
        let full = |_| {
            steps.set(steps.get() + 1);
            if steps.get() == 2 {
                spares.remove_all().unwrap();
            }
            true
        };
        spares.trim(full).unwrap();
        assert_eq!((steps.get(), place.spare_count()), (2, 0));
    }

    #[test]
    fn without_the_directory_files_are_just_removed() {
        let place = Place::new("without");
        let spares = place.spares(100 * MIB);
        fs::remove_dir(place.0.join("spare")).unwrap();
        let path = place.file("a", 2 * MIB);
        spares.remove(&path).unwrap();
        assert!(!path.exists());
        fs::create_dir(place.0.join("tree")).unwrap();
        place.file("tree/a", 2 * MIB);
        spares.remove_dir_all(&place.0.join("tree")).unwrap();
        assert!(!place.0.join("tree").exists());
    }

    #[test]
    fn a_link_is_not_followed() {
        let place = Place::new("link");
        let spares = place.spares(100 * MIB);
        fs::create_dir(place.0.join("else")).unwrap();
        let file = place.file("else/a", 2 * MIB);
        let link = place.0.join("link");
        std::os::unix::fs::symlink(place.0.join("else"), &link).unwrap();
        spares.remove_dir_all(&link).unwrap();
        assert!(file.exists() && fs::symlink_metadata(&link).is_err());
    }

    #[test]
    fn several_may_remove_a_directory() {
        let place = Place::new("several");
        let spares = place.spares(100 * MIB);
        let tree = place.0.join("tree");
        for _ in 0..20 {
            for name in ["a", "b", "c"] {
                fs::create_dir_all(tree.join(name)).unwrap();
                for number in 0..20 {
                    fs::write(tree.join(name).join(number.to_string()), "").unwrap();
                }
            }
            thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| ignore_missing(spares.remove_dir_all(&tree)).unwrap());
                }
            });
            assert!(!tree.exists());
        }
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
