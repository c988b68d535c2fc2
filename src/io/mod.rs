//! The only door to disk, clock, randomness and tasks.
//!
//! Everything that has an effect goes through [`Io`] and [`File`], which have three
//! implementations:
//!
//! 1. [`uring`]: glommio, io_uring and `O_DIRECT`; what runs in production;
//! 2. [`read_only`]: what looks at a node's files from outside, and cannot change them;
//! 3. `sim`: a seeded simulator that keeps live and durable state apart, so that a missing sync
//!    is found at the first seeds instead of at the first power loss.
//!
//! Types that perform I/O carry one type parameter, always named `I`. Pure modules never do; a
//! glance at a signature tells whether a function can touch the world.
//!
//! Rules of both implementations, held by one conformance suite (`io/conformance.rs`):
//!
//! - Offsets and lengths of reads and writes are multiples of [`ALIGNMENT`]; anything else is a
//!   bug of the caller and panics.
//! - A read that reaches past the end of the file returns what there is.
//! - Completion of a write promises nothing about durability. [`File::sync`] makes the file's
//!   content and length durable, [`Io::sync_dir`] its directory entries (create, rename, remove);
//!   [`Io::dir_change`] comes before these.
//! - A failed sync is final for the file: the caller must not sync again and go on.
//! - A file must be closed; dropping it open is a bug that the simulator reports.

use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::base::Kind;

pub use self::dir_syncs::DirChange;
pub(crate) use self::dir_syncs::DirSyncs;

mod blocking;
#[cfg(test)]
mod conformance;
mod dir_syncs;
mod direct;
pub mod durable;
pub mod foreign;
pub mod read_only;
pub mod spares;
pub mod uring;

/// Offsets and lengths of direct I/O are multiples of this many bytes.
pub const ALIGNMENT: usize = 4096;

/// `offset` rounded down to [`ALIGNMENT`].
pub fn align_down(offset: u64) -> u64 {
    offset - offset % ALIGNMENT as u64
}

/// `offset` rounded up to [`ALIGNMENT`].
pub fn align_up(offset: u64) -> u64 {
    offset.div_ceil(ALIGNMENT as u64) * ALIGNMENT as u64
}

/// Why an I/O call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation} {}: {cause}", path.display())]
pub struct IoError {
    /// The call: `open`, `read`, `sync`, …
    pub operation: &'static str,
    /// The file or directory.
    pub path: PathBuf,
    /// What went wrong.
    pub cause: IoCause,
}

/// What went wrong in an I/O call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IoCause {
    /// No such file or directory.
    #[error("not found")]
    NotFound,
    /// The target exists already.
    #[error("exists already")]
    Exists,
    /// The file system is full.
    #[error("no space left on the device")]
    NoSpace,
    /// Anything else; the text is the operating system's.
    #[error("{0}")]
    Other(String),
}

impl IoError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self.cause {
            IoCause::NotFound | IoCause::Exists => Kind::Invalid,
            IoCause::NoSpace => Kind::Retry,
            IoCause::Other(_) => Kind::Corrupt,
        }
    }
}

/// How urgent a task is on its executor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TaskClass {
    /// Page requests and connections.
    Serve,
    /// Taking in WAL.
    Ingest,
    /// Everything that may wait.
    Background,
}

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirEntry {
    /// Name within the directory.
    pub name: String,
    /// True for a directory.
    pub is_dir: bool,
    /// Length in bytes; 0 for a directory.
    pub len: u64,
}

/// A point in time of [`Io::now`]: time since an arbitrary start that never runs backwards.
pub type Instant = Duration;

/// A new file with space for `len` bytes; after an error it is removed.
pub(crate) async fn allocated<I: Io>(
    io: &I,
    file: I::File,
    path: &Path,
    len: u64,
) -> Result<I::File, IoError> {
    if let Err(error) = file.allocate(len).await {
        // The first error is the one that counts.
        let _ = file.close().await;
        let _ = io.remove(path).await;
        return Err(error);
    }
    Ok(file)
}

/// One executor's access to the world. Paths are absolute or relative to the working directory,
/// as for the operating system.
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait Io: Clone + 'static {
    /// An open file.
    type File: File;

    /// Creates a file for writing and reading; an existing one is an error ([`IoCause::Exists`]).
    async fn create(&self, path: &Path) -> Result<Self::File, IoError>;
    /// Creates a file of `len` zeros with space for them, as [`Io::create`] and [`File::allocate`].
    /// After an error there is no file, as far as the file system lets us.
    async fn create_zeroed(&self, path: &Path, len: u64) -> Result<Self::File, IoError> {
        allocated(self, self.create(path).await?, path, len).await
    }
    /// Creates a file for a caller who writes all of it, hardly less than `least` bytes: until
    /// [`File::set_len`], its length, and its content where nothing was written, are anything.
    /// Where it is longer than it shall be, [`File::set_len`] may take a while.
    async fn create_scratch(&self, path: &Path, least: u64) -> Result<Self::File, IoError>;
    /// Opens a file for reading and writing.
    async fn open(&self, path: &Path) -> Result<Self::File, IoError>;
    /// Renames a file or directory; an existing target file is replaced.
    async fn rename(&self, source: &Path, target: &Path) -> Result<(), IoError>;
    /// Removes a file, which nobody has open: its space may be used again at once.
    async fn remove(&self, path: &Path) -> Result<(), IoError>;
    /// Creates a directory; parents must exist, an existing directory is no error.
    async fn create_dir(&self, path: &Path) -> Result<(), IoError>;
    /// Removes a directory and everything in it; one that does not exist is no error.
    async fn remove_dir_all(&self, path: &Path) -> Result<(), IoError>;
    /// Entries of a directory, sorted by name.
    async fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, IoError>;
    /// Entries of a directory are about to change: for the sync behind that.
    fn dir_change(&self, dir: &Path) -> DirChange;
    /// Makes the entries of a directory durable. An error, too, if another sync of it has failed
    /// since the change began: what that one left, this one knows nothing of.
    async fn sync_dir(&self, change: &DirChange) -> Result<(), IoError>;
    /// Gives back space that is kept for speed only: somebody who writes by other means has found
    /// the file system full. Those who write by this one need not ask.
    async fn make_room(&self) {}

    /// Monotonic clock.
    fn now(&self) -> Instant;
    /// Wall clock, microseconds since 1970-01-01 UTC.
    fn unix_time_us(&self) -> i64;
    /// A random number.
    fn random_u64(&self) -> u64;
    /// Waits.
    async fn sleep(&self, duration: Duration);
    /// Lets other tasks run when this one has used up its slice.
    async fn yield_if_needed(&self);
    /// Starts a task. It runs until it ends or the executor does.
    fn spawn(&self, class: TaskClass, task: impl Future<Output = ()> + 'static);
}

/// An open file. Several reads, and writes to different ranges, may be under way at once;
/// overlapping writes may not.
#[allow(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
#[allow(async_fn_in_trait, reason = "executors are single-threaded: no Send bound is wanted")]
pub trait File: 'static {
    /// What a read returns.
    type ReadBuf: Deref<Target = [u8]> + 'static;
    /// What a write takes: aligned memory.
    type WriteBuf: DerefMut<Target = [u8]> + 'static;

    /// A zeroed buffer of `len` bytes, a multiple of [`ALIGNMENT`] and not 0.
    fn alloc(&self, len: usize) -> Self::WriteBuf;
    /// As [`File::alloc`], but with anything in it: for callers that fill all of it.
    fn alloc_to_fill(&self, len: usize) -> Self::WriteBuf {
        self.alloc(len)
    }
    /// Reads up to `len` bytes at `offset`; shorter at the end of the file.
    async fn read_at(&self, offset: u64, len: usize) -> Result<Self::ReadBuf, IoError>;
    /// Writes the whole buffer at `offset`, extending the file as needed. The buffer is at most
    /// [`crate::limits::DEVICE_IO_BYTES_MAX`] long; a longer one is a bug of the caller and panics.
    async fn write_at(&self, offset: u64, buf: Self::WriteBuf) -> Result<(), IoError>;
    /// Reserves space up to `len` bytes and makes that the file's length if it is shorter; the
    /// new bytes are zeros. A hint for speed with one promise: a later write below `len` needs no
    /// new space.
    async fn allocate(&self, len: u64) -> Result<(), IoError>;
    /// Makes the file `len` bytes long, a multiple of [`ALIGNMENT`]: forgets what lies behind, or
    /// adds zeros.
    async fn set_len(&self, len: u64) -> Result<(), IoError>;
    /// Makes content and length durable. An error is final.
    async fn sync(&self) -> Result<(), IoError>;
    /// Length in bytes.
    async fn len(&self) -> Result<u64, IoError>;
    /// Closes the file. Not a sync.
    async fn close(self) -> Result<(), IoError>;
}
