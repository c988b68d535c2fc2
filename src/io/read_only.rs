//! Reading a node's files without being the node: for `pgstrata check` and `pgstrata layer dump`.
//!
//! [`ReadOnlyIo`] is a third implementation of [`super::Io`]. It opens files for reading only, by
//! plain blocking calls on the calling thread, past the page cache where the file system lets it,
//! so that what is checked is what stands on the device. Every call that would change something
//! fails: what runs on this door cannot hurt a node that works on the same directory, not even by
//! a mistake. (The ring's door opens files for writing too, and leaves a probe file for a moment.)
//!
//! Reads are sequential for the most part, so a file reads ahead [`READ_AHEAD_BYTES`] at a time.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "this is a door to the file system"
)]

use std::cell::RefCell;
use std::fs;
use std::future::Future;
use std::io::ErrorKind;
use std::ops::Deref;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::blocking::list_directory;
use super::{
    ALIGNMENT, DirChange, DirEntry, DirSyncs, File, Instant, Io, IoCause, IoError, TaskClass,
};
use crate::limits::READ_AHEAD_BYTES;

/// Past the page cache, and without waiting for whoever would write into a pipe of that name.
const DIRECT: i32 = nix::libc::O_DIRECT | nix::libc::O_NONBLOCK;

/// Access for one thread; drive its futures with any executor, they never wait.
#[derive(Clone)]
pub struct ReadOnlyIo {
    started: std::time::Instant,
}

impl Default for ReadOnlyIo {
    fn default() -> Self {
        ReadOnlyIo { started: std::time::Instant::now() }
    }
}

fn failed(operation: &'static str, path: &Path, error: &std::io::Error) -> IoError {
    let cause = match error.kind() {
        ErrorKind::NotFound => IoCause::NotFound,
        _ => IoCause::Other(error.to_string()),
    };
    IoError { operation, path: path.to_owned(), cause }
}

fn refused(operation: &'static str, path: &Path) -> IoError {
    let cause = IoCause::Other("this program only reads here".to_owned());
    IoError { operation, path: path.to_owned(), cause }
}

impl Io for ReadOnlyIo {
    type File = ReadOnlyFile;

    async fn create(&self, path: &Path) -> Result<ReadOnlyFile, IoError> {
        Err(refused("create", path))
    }

    async fn create_scratch(&self, path: &Path, _: u64) -> Result<ReadOnlyFile, IoError> {
        Err(refused("create", path))
    }

    async fn open(&self, path: &Path) -> Result<ReadOnlyFile, IoError> {
        let mut options = fs::OpenOptions::new();
        let direct = options.read(true).custom_flags(DIRECT).open(path);
        let file = match direct {
            // Not every file system knows direct reads.
            Err(error) if error.kind() == ErrorKind::InvalidInput => fs::File::open(path),
            other => other,
        };
        let file = file.map_err(|error| failed("open", path, &error))?;
        Ok(ReadOnlyFile { file, path: path.to_owned(), ahead: RefCell::default() })
    }

    async fn rename(&self, source: &Path, _: &Path) -> Result<(), IoError> {
        Err(refused("rename", source))
    }

    async fn remove(&self, path: &Path) -> Result<(), IoError> {
        Err(refused("remove", path))
    }

    async fn create_dir(&self, path: &Path) -> Result<(), IoError> {
        Err(refused("create directory", path))
    }

    async fn remove_dir_all(&self, path: &Path) -> Result<(), IoError> {
        Err(refused("remove directory", path))
    }

    async fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, IoError> {
        list_directory(dir).map_err(|error| failed("list", dir, &error))
    }

    fn dir_change(&self, dir: &Path) -> DirChange {
        DirSyncs::new().change(dir)
    }

    async fn sync_dir(&self, change: &DirChange) -> Result<(), IoError> {
        Err(refused("sync directory", change.dir()))
    }

    fn now(&self) -> Instant {
        self.started.elapsed()
    }

    fn unix_time_us(&self) -> i64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |time| time.as_micros() as i64)
    }

    fn random_u64(&self) -> u64 {
        fastrand::u64(..)
    }

    async fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    async fn yield_if_needed(&self) {}

    /// A bug of the caller: there is no executor whose task could run later.
    fn spawn(&self, _: TaskClass, _: impl Future<Output = ()> + 'static) {
        panic!("nothing is spawned where files are only read");
    }
}

/// A piece of memory that begins at a multiple of [`ALIGNMENT`].
pub struct AlignedBytes {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    fn zeroed(len: usize) -> AlignedBytes {
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT);
        AlignedBytes { bytes, start, len }
    }

    fn rest_mut(&mut self, from: usize) -> &mut [u8] {
        self.bytes.get_mut(self.start + from..self.start + self.len).unwrap_or_default()
    }
}

impl Deref for AlignedBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

/// A file that is open for reading.
pub struct ReadOnlyFile {
    file: fs::File,
    path: PathBuf,
    /// What was read last, and from which offset.
    ahead: RefCell<Option<(u64, AlignedBytes)>>,
}

impl ReadOnlyFile {
    /// Reads until `len` bytes are there or the file ends.
    fn read(&self, offset: u64, len: usize) -> Result<AlignedBytes, IoError> {
        let mut read = AlignedBytes::zeroed(len);
        let mut done = 0;
        while done < len {
            match self.file.read_at(read.rest_mut(done), offset.saturating_add(done as u64)) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(failed("read", &self.path, &error)),
            }
            // A direct read stops short of a block's end only where the file ends.
            if done % ALIGNMENT != 0 {
                break;
            }
        }
        read.len = done;
        Ok(read)
    }

    /// The bytes out of what was read last.
    fn read_before(&self, offset: u64, len: usize) -> Option<Vec<u8>> {
        let ahead = self.ahead.borrow();
        let (start, bytes) = ahead.as_ref()?;
        let from = usize::try_from(offset.checked_sub(*start)?).ok()?;
        bytes.get(from..from.checked_add(len)?).map(<[u8]>::to_vec)
    }
}

impl File for ReadOnlyFile {
    type ReadBuf = Vec<u8>;
    type WriteBuf = Vec<u8>;

    fn alloc(&self, len: usize) -> Vec<u8> {
        vec![0; len]
    }

    async fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
        assert_eq!(offset % ALIGNMENT as u64, 0, "unaligned offset in {}", self.path.display());
        assert_eq!(len % ALIGNMENT, 0, "unaligned length in {}", self.path.display());
        if let Some(bytes) = self.read_before(offset, len) {
            return Ok(bytes);
        }
        let read = self.read(offset, len.max(READ_AHEAD_BYTES))?;
        let bytes = read.get(..len.min(read.len)).unwrap_or_default().to_vec();
        *self.ahead.borrow_mut() = Some((offset, read));
        Ok(bytes)
    }

    async fn write_at(&self, _: u64, _: Vec<u8>) -> Result<(), IoError> {
        Err(refused("write", &self.path))
    }

    async fn allocate(&self, _: u64) -> Result<(), IoError> {
        Err(refused("allocate", &self.path))
    }

    async fn set_len(&self, _: u64) -> Result<(), IoError> {
        Err(refused("set length of", &self.path))
    }

    async fn sync(&self) -> Result<(), IoError> {
        Err(refused("sync", &self.path))
    }

    async fn len(&self) -> Result<u64, IoError> {
        let metadata = self.file.metadata();
        Ok(metadata.map_err(|error| failed("size of", &self.path, &error))?.len())
    }

    async fn close(self) -> Result<(), IoError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_lite::future::block_on;

    #[test]
    fn it_reads_what_there_is_and_changes_nothing() {
        let dir = std::env::temp_dir().join(format!("pgstrata-read-only-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("a");
        let content: Vec<u8> = (0..3 * READ_AHEAD_BYTES + 777).map(|n| (n % 251) as u8).collect();
        fs::write(&path, &content).unwrap();
        let io = ReadOnlyIo::default();
        block_on(async {
            let file = io.open(&path).await.unwrap();
            assert_eq!(file.len().await.unwrap(), content.len() as u64);
            // Forwards, backwards, across the end, behind it.
            for (offset, len) in [(0, 4096), (8192, 8192), (4096, READ_AHEAD_BYTES * 2), (0, 4096)]
                .into_iter()
                .chain([(3 * READ_AHEAD_BYTES, 8192), (4 * READ_AHEAD_BYTES, 4096)])
            {
                let read = file.read_at(offset as u64, len).await.unwrap();
                let end = content.len().min(offset + len);
                assert!(read == content.get(offset..end).unwrap_or_default(), "{offset} {len}");
            }
            assert!(file.write_at(0, file.alloc(4096)).await.is_err());
            assert!(file.allocate(1 << 20).await.is_err() && file.sync().await.is_err());
            file.close().await.unwrap();
            assert!(io.create(&dir.join("b")).await.is_err());
            assert!(io.remove(&path).await.is_err());
            assert!(io.rename(&path, &dir.join("b")).await.is_err());
            assert!(io.create_dir(&dir.join("c")).await.is_err());
            assert!(io.remove_dir_all(&dir).await.is_err());
            let names: Vec<_> = io.list(&dir).await.unwrap().into_iter().map(|e| e.name).collect();
            assert_eq!(names, ["a"]);
            let missing = io.open(&dir.join("b")).await.err().unwrap();
            assert_eq!(missing.cause, IoCause::NotFound);
        });
        assert!(fs::read(&path).unwrap() == content);
        fs::remove_dir_all(&dir).unwrap();
    }
}
