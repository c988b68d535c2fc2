//! What is known of the syncs of directories: whether one that succeeded proves anything.
//!
//! A sync reports what could not be written once, to one of those who ask, and the operating system
//! forgets it: the next sync of that directory succeeds, and the changes are lost all the same. So
//! where two tasks change one directory, the failed sync of one says that the other's change may
//! be lost, too. A task notes what is known of the directory before it changes it ([`DirChange`]),
//! and its sync counts only if no other one has failed since, or is under way that may have been
//! told of the failure instead.

#![allow(
    clippy::disallowed_types,
    reason = "a directory's layers are written by one executor, its index by another"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{IoCause, IoError};

/// A change of a directory that is about to be made, to be given to
/// [`Io::sync_dir`](super::Io::sync_dir) afterwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirChange {
    dir: PathBuf,
    /// Failed syncs of the directory before the change.
    failed: u64,
}

impl DirChange {
    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// A sync that is under way, by the order in which they began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SyncNumber(u64);

/// The syncs of directories of a process.
#[derive(Debug)]
pub(crate) struct DirSyncs {
    next: u64,
    under_way: BTreeMap<SyncNumber, PathBuf>,
    /// How many syncs of a directory have failed, for those where any has.
    failed: BTreeMap<PathBuf, u64>,
}

impl DirSyncs {
    pub const fn new() -> DirSyncs {
        DirSyncs { next: 0, under_way: BTreeMap::new(), failed: BTreeMap::new() }
    }

    fn failed(&self, dir: &Path) -> u64 {
        self.failed.get(dir).copied().unwrap_or(0)
    }

    /// Entries of `dir` are about to change.
    pub fn change(&self, dir: &Path) -> DirChange {
        DirChange { dir: dir.to_owned(), failed: self.failed(dir) }
    }

    /// A sync of `dir` begins.
    pub fn begin(&mut self, dir: &Path) -> SyncNumber {
        let number = SyncNumber(self.next);
        self.next += 1;
        self.under_way.insert(number, dir.to_owned());
        number
    }

    /// It has ended; returns the number that the next one will have.
    pub fn end(&mut self, number: SyncNumber, failed: bool) -> SyncNumber {
        if let Some(dir) = self.under_way.remove(&number)
            && failed
        {
            *self.failed.entry(dir).or_default() += 1;
        }
        SyncNumber(self.next)
    }

    /// No sync of the change's directory is under way any more that began before `end`: what those
    /// have been told is known.
    pub fn is_settled(&self, change: &DirChange, end: SyncNumber) -> bool {
        !self.under_way.range(..end).any(|(_, dir)| *dir == change.dir)
    }

    /// What a sync that succeeded proves: that the change is durable, or nothing.
    pub fn proof(&self, change: &DirChange) -> Result<(), IoError> {
        if self.failed(&change.dir) == change.failed {
            return Ok(());
        }
        let cause = "another sync of it failed, so changes may be lost".to_owned();
        let path = change.dir.clone();
        Err(IoError { operation: "sync directory", path, cause: IoCause::Other(cause) })
    }
}

/// Those of this process.
static DIR_SYNCS: Mutex<DirSyncs> = Mutex::new(DirSyncs::new());

/// The syncs of directories of this process. Not to be held while anything is waited for.
pub(super) fn dir_syncs() -> MutexGuard<'static, DirSyncs> {
    // Nothing panics while it is held.
    DIR_SYNCS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A sync of this process that is under way. One that is given up has perhaps failed.
pub(super) struct Syncing(SyncNumber);

impl Syncing {
    pub fn begin(dir: &Path) -> Syncing {
        Syncing(dir_syncs().begin(dir))
    }

    /// See [`DirSyncs::end`].
    pub fn end(self, failed: bool) -> SyncNumber {
        let number = self.0;
        std::mem::forget(self);
        dir_syncs().end(number, failed)
    }
}

impl Drop for Syncing {
    fn drop(&mut self) {
        dir_syncs().end(self.0, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "data/a";
    const B: &str = "data/b";

    #[test]
    fn a_sync_proves_nothing_where_another_one_has_failed_since() {
        let mut syncs = DirSyncs::new();
        let (one, other) = (syncs.change(Path::new(A)), syncs.change(Path::new(A)));
        let elsewhere = syncs.change(Path::new(B));
        let number = syncs.begin(one.dir());
        syncs.end(number, true);
        assert!(syncs.proof(&one).is_err() && syncs.proof(&other).is_err());
        // Other directories have nothing to do with it, nor has what is changed from now on.
        assert_eq!(syncs.proof(&elsewhere), Ok(()));
        let again = syncs.change(Path::new(A));
        let number = syncs.begin(again.dir());
        syncs.end(number, false);
        assert!(syncs.proof(&again).is_ok() && syncs.proof(&other).is_err());
    }

    #[test]
    fn a_sync_waits_for_those_that_may_have_been_told_of_its_failure() {
        let mut syncs = DirSyncs::new();
        let change = syncs.change(Path::new(A));
        let first = syncs.begin(Path::new(A));
        let elsewhere = syncs.begin(Path::new(B));
        let own = syncs.begin(change.dir());
        let end = syncs.end(own, false);
        assert!(!syncs.is_settled(&change, end));
        // One that began later could not be told of what came before.
        let later = syncs.begin(Path::new(A));
        syncs.end(first, true);
        assert!(syncs.is_settled(&change, end) && syncs.proof(&change).is_err());
        syncs.end(later, false);
        syncs.end(elsewhere, false);
        assert!(syncs.under_way.is_empty());
    }
}
