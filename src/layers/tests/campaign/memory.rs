//! Files in memory for the campaign of damage.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use crate::io::{
    ALIGNMENT, DirChange, DirEntry, DirSyncs, File, Instant, Io, IoCause, IoError, TaskClass,
};

type Content = Rc<RefCell<Vec<u8>>>;
type Reads = Rc<RefCell<Vec<Range<u64>>>>;

/// Files in memory, without faults, time or tasks: as fast as it gets.
#[derive(Clone, Default)]
pub(super) struct MemoryIo {
    files: Rc<RefCell<BTreeMap<PathBuf, Content>>>,
    reads: Reads,
    /// Gives every temporary file another name.
    names: Rc<Cell<u64>>,
}

impl MemoryIo {
    /// Puts a file in place of whatever was there.
    pub(super) fn put(&self, path: &Path, bytes: Vec<u8>) {
        *self.files.borrow_mut().entry(path.to_owned()).or_default().borrow_mut() = bytes;
    }

    /// A copy of a file that is there.
    pub(super) fn get(&self, path: &Path) -> Vec<u8> {
        self.files.borrow()[path].borrow().clone()
    }

    /// What was read since this was asked last.
    pub(super) fn take_reads(&self) -> Vec<Range<u64>> {
        self.reads.take()
    }
}

pub(super) struct MemoryFile(Content, Reads);

fn missing(path: &Path) -> IoError {
    IoError { operation: "open", path: path.to_owned(), cause: IoCause::NotFound }
}

impl Io for MemoryIo {
    type File = MemoryFile;
    async fn create(&self, path: &Path) -> Result<MemoryFile, IoError> {
        let file = Content::default();
        self.files.borrow_mut().insert(path.to_owned(), file.clone());
        Ok(MemoryFile(file, self.reads.clone()))
    }
    async fn create_scratch(&self, path: &Path, _: u64) -> Result<MemoryFile, IoError> {
        self.create(path).await
    }
    async fn open(&self, path: &Path) -> Result<MemoryFile, IoError> {
        let file = self.files.borrow().get(path).cloned().ok_or_else(|| missing(path))?;
        Ok(MemoryFile(file, self.reads.clone()))
    }
    async fn rename(&self, source: &Path, target: &Path) -> Result<(), IoError> {
        let file = self.files.borrow_mut().remove(source).ok_or_else(|| missing(source))?;
        self.files.borrow_mut().insert(target.to_owned(), file);
        Ok(())
    }
    async fn remove(&self, path: &Path) -> Result<(), IoError> {
        self.files.borrow_mut().remove(path).map(|_| ()).ok_or_else(|| missing(path))
    }
    async fn create_dir(&self, _: &Path) -> Result<(), IoError> {
        Ok(())
    }
    async fn remove_dir_all(&self, _: &Path) -> Result<(), IoError> {
        Ok(())
    }
    async fn list(&self, _: &Path) -> Result<Vec<DirEntry>, IoError> {
        Ok(Vec::new())
    }
    fn dir_change(&self, dir: &Path) -> DirChange {
        DirSyncs::new().change(dir)
    }
    async fn sync_dir(&self, _: &DirChange) -> Result<(), IoError> {
        Ok(())
    }
    fn now(&self) -> Instant {
        Instant::ZERO
    }
    fn unix_time_us(&self) -> i64 {
        0
    }
    fn random_u64(&self) -> u64 {
        self.names.replace(self.names.get() + 1)
    }
    async fn sleep(&self, _: Duration) {}
    async fn yield_if_needed(&self) {}
    fn spawn(&self, _: TaskClass, _: impl Future<Output = ()> + 'static) {
        panic!("layers start no tasks");
    }
}

impl File for MemoryFile {
    type ReadBuf = Vec<u8>;
    type WriteBuf = Vec<u8>;
    fn alloc(&self, len: usize) -> Vec<u8> {
        vec![0; len]
    }
    async fn read_at(&self, offset: u64, len: usize) -> Result<Vec<u8>, IoError> {
        assert!(offset.is_multiple_of(ALIGNMENT as u64) && len.is_multiple_of(ALIGNMENT));
        self.1.borrow_mut().push(offset..offset + len as u64);
        let bytes = self.0.borrow();
        let start = bytes.len().min(offset as usize);
        Ok(bytes[start..bytes.len().min(start + len)].to_vec())
    }
    async fn write_at(&self, offset: u64, buf: Vec<u8>) -> Result<(), IoError> {
        let mut bytes = self.0.borrow_mut();
        let end = offset as usize + buf.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[offset as usize..end].copy_from_slice(&buf);
        Ok(())
    }
    async fn allocate(&self, _: u64) -> Result<(), IoError> {
        Ok(())
    }
    async fn set_len(&self, len: u64) -> Result<(), IoError> {
        self.0.borrow_mut().resize(len as usize, 0);
        Ok(())
    }
    async fn sync(&self) -> Result<(), IoError> {
        Ok(())
    }
    async fn len(&self) -> Result<u64, IoError> {
        Ok(self.0.borrow().len() as u64)
    }
    async fn close(self) -> Result<(), IoError> {
        Ok(())
    }
}
