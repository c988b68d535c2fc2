//! glommio implementation of [`super::Io`]: io_uring and `O_DIRECT`.
//!
//! Data goes through the ring. Operations on directories (list, create) are plain system calls:
//! they are rare, short, and io_uring has no call for some of them. What is removed may be large,
//! and goes on a thread of its own, mostly to the [`Spares`].

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use glommio::io::{Directory, DmaBuffer, DmaFile, OpenOptions, ReadResult};
use glommio::{Latency, Shares, TaskQueueHandle};

use super::blocking::list_directory;
use super::dir_syncs::{Syncing, dir_syncs};
use super::direct::{file_len, open_direct};
use super::spares::Spares;
use super::{
    ALIGNMENT, DirChange, DirEntry, File, Instant, Io, IoCause, IoError, TaskClass, align_up,
    allocated,
};
use crate::limits::{
    DEVICE_IO_BYTES_MAX, DIR_SYNC_POLL_MS, SPARE_LONGER_SHARE, SPARE_TRIM_BYTES,
    SPARE_TRIM_PAUSE_MS, WORK_SLICE_US,
};

/// One glommio executor's access to the world. Made on the executor; cheap to clone.
#[derive(Clone)]
pub struct UringIo {
    queues: Rc<Queues>,
}

struct Queues {
    serve: TaskQueueHandle,
    ingest: TaskQueueHandle,
    background: TaskQueueHandle,
    /// glommio knows whether the device can be polled for completions.
    probed: Cell<bool>,
    spares: Option<Arc<Spares>>,
    started: std::time::Instant,
    random: RefCell<fastrand::Rng>,
}

impl UringIo {
    /// Access for the executor that runs the caller; creates its task queues, so call it once.
    /// Without `spares`, removed files are just removed.
    pub fn new(spares: Option<Arc<Spares>>) -> Self {
        let executor = glommio::executor();
        // What glommio calls latency is how soon a queue is interrupted when it runs, and whether
        // completions of its I/O interrupt whoever runs. Requests are so short, and so many, that
        // both would cost more than they take themselves.
        let slice = Latency::Matters(Duration::from_micros(WORK_SLICE_US));
        let queue = |shares, latency, name| {
            executor.create_task_queue(Shares::Static(shares), latency, name)
        };
        UringIo {
            queues: Rc::new(Queues {
                serve: queue(1000, Latency::NotImportant, "serve"),
                ingest: queue(500, slice, "ingest"),
                background: queue(100, slice, "background"),
                probed: Cell::new(false),
                spares,
                #[allow(clippy::disallowed_methods, reason = "this is the door to the clock")]
                started: std::time::Instant::now(),
                #[allow(clippy::disallowed_methods, reason = "this is the door to randomness")]
                random: RefCell::new(fastrand::Rng::new()),
            }),
        }
    }
}

impl UringIo {
    /// Lets glommio find out whether the device of `path` can be polled for completions.
    ///
    /// glommio 0.9 finds out by reading from the first file that it opens on a device. If that
    /// file is empty the read succeeds without touching the device, glommio takes that for a
    /// yes, and every later read fails with `EOPNOTSUPP` where the answer is no. So the first
    /// file is one with content, made for the purpose.
    #[allow(clippy::disallowed_methods, reason = "this is the door to the file system")]
    async fn probe_device(&self, path: &Path) -> Result<(), IoError> {
        if self.queues.probed.get() {
            return Ok(());
        }
        let name = format!("probe-{:016x}.tmp", self.random_u64());
        let probe = path.parent().unwrap_or(Path::new(".")).join(name);
        let fail = |error: io::Error| os_error("probe", &probe, &error);
        if let Err(error) = std::fs::write(&probe, [0; ALIGNMENT]) {
            // It may be there, without its content.
            let _ = std::fs::remove_file(&probe);
            return Err(fail(error));
        }
        let opened = open_direct(OpenOptions::new().read(true).write(true), &probe).await;
        let removed = std::fs::remove_file(&probe).map_err(fail);
        let file = opened.map_err(fail)?;
        file.close().await.map_err(|error| ring_error("probe", &probe, error))?;
        // Only now: whoever opens a file meanwhile must probe for himself.
        self.queues.probed.set(true);
        removed
    }

    /// Does something with the spares, on a thread that may block.
    async fn with_spares<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Spares) -> io::Result<T> + Send + 'static,
    ) -> Option<io::Result<T>> {
        let spares = self.queues.spares.clone()?;
        Some(glommio::executor().spawn_blocking(move || work(&spares)).await)
    }

    /// Where there is no space, spares give theirs; a later attempt has it.
    async fn noted<T>(&self, result: Result<T, IoError>) -> Result<T, IoError> {
        if let Err(IoError { cause: IoCause::NoSpace, .. }) = &result {
            self.make_room().await;
        }
        result
    }

    /// Opens the file that `take` puts there, or creates it. After an error there is no new file.
    #[allow(clippy::disallowed_methods, reason = "this is the door to the file system")]
    async fn reuse_or_create(
        &self,
        path: &Path,
        take: impl FnOnce(&Spares, &Path) -> io::Result<bool> + Send + 'static,
    ) -> Result<(UringFile, bool), IoError> {
        let target = path.to_owned();
        match self.with_spares(move |spares| take(spares, &target)).await {
            Some(Ok(true)) => {}
            Some(Err(error)) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(os_error("create", path, &error));
            }
            // Without spares everything goes on.
            Some(Ok(false) | Err(_)) | None => return Ok((self.create(path).await?, false)),
        }
        let error = match self.open(path).await {
            Ok(file) => return Ok((file, true)),
            Err(error) => error,
        };
        // Not back to the spares: whoever takes it next would fare the same.
        tracing::warn!("space of a removed file cannot be used again: {error}");
        let doomed = path.to_owned();
        let removed = glommio::executor().spawn_blocking(move || std::fs::remove_file(doomed));
        removed.await.map_err(|_| error)?;
        Ok((self.create(path).await?, false))
    }

    fn queue(&self, class: TaskClass) -> TaskQueueHandle {
        match class {
            TaskClass::Serve => self.queues.serve,
            TaskClass::Ingest => self.queues.ingest,
            TaskClass::Background => self.queues.background,
        }
    }
}

/// An open file.
pub struct UringFile {
    io: UringIo,
    file: DmaFile,
    path: PathBuf,
}

/// Bytes that were read.
pub enum UringRead {
    /// One device read, as the ring left it.
    One(ReadResult),
    /// Several, put together.
    Many(Vec<u8>),
}

impl Deref for UringRead {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            UringRead::One(result) => result,
            UringRead::Many(bytes) => bytes,
        }
    }
}

/// Aligned memory to write from.
pub struct UringBuf(DmaBuffer);

impl Deref for UringBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl DerefMut for UringBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_bytes_mut()
    }
}

fn os_cause(error: &io::Error) -> IoCause {
    match error.kind() {
        io::ErrorKind::NotFound => IoCause::NotFound,
        io::ErrorKind::AlreadyExists => IoCause::Exists,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => IoCause::NoSpace,
        _ => IoCause::Other(error.to_string()),
    }
}

fn os_error(operation: &'static str, path: &Path, error: &io::Error) -> IoError {
    IoError { operation, path: path.to_owned(), cause: os_cause(error) }
}

fn ring_error(operation: &'static str, path: &Path, error: glommio::GlommioError<()>) -> IoError {
    os_error(operation, path, &io::Error::from(error))
}

#[allow(clippy::disallowed_methods, reason = "this is the door to the file system")]
impl Io for UringIo {
    type File = UringFile;

    async fn create(&self, path: &Path) -> Result<UringFile, IoError> {
        self.noted(self.probe_device(path).await).await?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = open_direct(&options, path).await;
        let file = self.noted(file.map_err(|error| os_error("create", path, &error))).await?;
        Ok(UringFile { io: self.clone(), file, path: path.to_owned() })
    }

    async fn create_zeroed(&self, path: &Path, len: u64) -> Result<UringFile, IoError> {
        let take = move |spares: &Spares, target: &Path| spares.take_zeroed(len, target);
        let (file, reused) = self.reuse_or_create(path, take).await?;
        if reused { Ok(file) } else { allocated(self, file, path, len).await }
    }

    async fn create_scratch(&self, path: &Path, least: u64) -> Result<UringFile, IoError> {
        let take = move |spares: &Spares, target: &Path| spares.take(least, target);
        Ok(self.reuse_or_create(path, take).await?.0)
    }

    async fn open(&self, path: &Path) -> Result<UringFile, IoError> {
        self.noted(self.probe_device(path).await).await?;
        let file = open_direct(OpenOptions::new().read(true).write(true), path).await;
        let file = file.map_err(|error| os_error("open", path, &error))?;
        Ok(UringFile { io: self.clone(), file, path: path.to_owned() })
    }

    async fn rename(&self, source: &Path, target: &Path) -> Result<(), IoError> {
        let renamed = std::fs::rename(source, target);
        self.noted(renamed.map_err(|error| os_error("rename", source, &error))).await
    }

    async fn remove(&self, path: &Path) -> Result<(), IoError> {
        // Giving back the blocks of a large file takes the kernel tens of milliseconds.
        let owned = path.to_owned();
        let kept = self.queues.spares.clone();
        let removed = glommio::executor().spawn_blocking(move || match kept {
            Some(spares) => spares.remove(&owned),
            None => std::fs::remove_file(owned),
        });
        removed.await.map_err(|error| os_error("remove", path, &error))
    }

    async fn create_dir(&self, path: &Path) -> Result<(), IoError> {
        // Nobody else may read what lies there: a base backup has passwords in it. It may be
        // something else than a directory that stands there already.
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !path.is_dir() => {
                self.noted(Err(os_error("create directory", path, &error))).await
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    async fn remove_dir_all(&self, path: &Path) -> Result<(), IoError> {
        let owned = path.to_owned();
        let kept = self.queues.spares.clone();
        let removed = glommio::executor().spawn_blocking(move || match kept {
            Some(spares) => spares.remove_dir_all(&owned),
            None => std::fs::remove_dir_all(owned),
        });
        match removed.await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(os_error("remove directory", path, &error))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    async fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, IoError> {
        list_directory(dir).map_err(|error| os_error("list", dir, &error))
    }

    fn dir_change(&self, dir: &Path) -> DirChange {
        dir_syncs().change(dir)
    }

    async fn sync_dir(&self, change: &DirChange) -> Result<(), IoError> {
        let fail = |error| ring_error("sync directory", change.dir(), error);
        let handle = Directory::open(change.dir()).await.map_err(fail)?;
        let syncing = Syncing::begin(change.dir());
        let synced = handle.sync().await;
        let end = syncing.end(synced.is_err());
        handle.close().await.map_err(fail)?;
        synced.map_err(fail)?;
        while !dir_syncs().is_settled(change, end) {
            glommio::timer::sleep(Duration::from_millis(DIR_SYNC_POLL_MS)).await;
        }
        dir_syncs().proof(change)
    }

    async fn make_room(&self) {
        if let Some(Err(problem)) = self.with_spares(Spares::remove_all).await {
            tracing::warn!("space of removed files is not given back: {problem}");
        }
    }

    fn now(&self) -> Instant {
        self.queues.started.elapsed()
    }

    fn unix_time_us(&self) -> i64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |time| time.as_micros() as i64)
    }

    fn random_u64(&self) -> u64 {
        self.queues.random.borrow_mut().u64(..)
    }

    async fn sleep(&self, duration: Duration) {
        glommio::timer::sleep(duration).await;
    }

    async fn yield_if_needed(&self) {
        glommio::yield_if_needed().await;
    }

    fn spawn(&self, class: TaskClass, task: impl Future<Output = ()> + 'static) {
        // The queues live as long as the executor, so this fails only outside of it, which no
        // caller is.
        if let Ok(spawned) = glommio::spawn_local_into(task, self.queue(class)) {
            spawned.detach();
        }
    }
}

impl UringFile {
    fn check(&self, offset: u64, len: usize) {
        assert_eq!(offset % ALIGNMENT as u64, 0, "unaligned offset in {}", self.path.display());
        assert_eq!(len % ALIGNMENT, 0, "unaligned length in {}", self.path.display());
    }

    fn error(&self, operation: &'static str, error: glommio::GlommioError<()>) -> IoError {
        ring_error(operation, &self.path, error)
    }
}

impl File for UringFile {
    type ReadBuf = UringRead;
    type WriteBuf = UringBuf;

    fn alloc(&self, len: usize) -> UringBuf {
        let mut buf = self.alloc_to_fill(len);
        buf.fill(0);
        buf
    }

    fn alloc_to_fill(&self, len: usize) -> UringBuf {
        self.check(0, len);
        assert!(len > 0, "a buffer of no bytes");
        UringBuf(self.file.alloc_dma_buffer(len))
    }

    async fn read_at(&self, offset: u64, len: usize) -> Result<UringRead, IoError> {
        self.check(offset, len);
        if len <= DEVICE_IO_BYTES_MAX {
            let read = self.file.read_at_aligned(offset, len).await;
            return Ok(UringRead::One(read.map_err(|error| self.error("read", error))?));
        }
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let part = DEVICE_IO_BYTES_MAX.min(len - bytes.len());
            let read = self.file.read_at_aligned(offset + bytes.len() as u64, part).await;
            let read = read.map_err(|error| self.error("read", error))?;
            bytes.extend_from_slice(&read);
            if read.len() < part {
                break;
            }
        }
        Ok(UringRead::Many(bytes))
    }

    async fn write_at(&self, offset: u64, buf: UringBuf) -> Result<(), IoError> {
        let len = buf.len();
        self.check(offset, len);
        assert!(len <= DEVICE_IO_BYTES_MAX, "a write of {len} bytes at once");
        let written = self.file.write_at(buf.0, offset).await;
        let written = match written.map_err(|error| self.error("write", error)) {
            Ok(written) if written < len => {
                let cause = IoCause::NoSpace;
                Err(IoError { operation: "write", path: self.path.clone(), cause })
            }
            written => written.map(|_| ()),
        };
        self.io.noted(written).await
    }

    async fn allocate(&self, len: u64) -> Result<(), IoError> {
        let allocated = self.file.pre_allocate(len, false).await;
        self.io.noted(allocated.map_err(|error| self.error("allocate", error))).await
    }

    async fn set_len(&self, len: u64) -> Result<(), IoError> {
        self.check(len, 0);
        let mut now = self.len().await?;
        // The device is told about freed blocks; see `Spares`.
        let share = now.saturating_sub(len) / SPARE_LONGER_SHARE;
        let step = align_up(share).max(SPARE_TRIM_BYTES);
        while now > len.saturating_add(step) {
            now -= step;
            let cut = self.file.truncate(now).await;
            cut.map_err(|error| self.error("set length of", error))?;
            self.sync().await?;
            self.io.sleep(Duration::from_millis(SPARE_TRIM_PAUSE_MS)).await;
        }
        let set = self.file.truncate(len).await;
        self.io.noted(set.map_err(|error| self.error("set length of", error))).await
    }

    async fn sync(&self) -> Result<(), IoError> {
        let synced = self.file.fdatasync().await;
        self.io.noted(synced.map_err(|error| self.error("sync", error))).await
    }

    async fn len(&self) -> Result<u64, IoError> {
        file_len(&self.file).map_err(|error| os_error("size of", &self.path, &error))
    }

    async fn close(self) -> Result<(), IoError> {
        let path = self.path;
        self.file.close().await.map_err(|error| ring_error("close", &path, error))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Runs `story` with an empty directory and spares in `spare`.
    fn with_spares_in<F: Future<Output = ()>>(
        name: &str,
        spare: impl FnOnce(&Path) -> PathBuf,
        story: impl FnOnce(UringIo, PathBuf, PathBuf) -> F + Send + 'static,
    ) {
        let binary = std::env::current_exe().unwrap();
        let dir = binary.with_file_name(format!("uring-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let spare = spare(&dir);
        let (of_story, of_spares) = (dir.clone(), spare.clone());
        let run = std::thread::spawn(move || {
            let executor = glommio::LocalExecutorBuilder::default().io_memory(1 << 20).make();
            executor.unwrap().run(async move {
                let spares = Spares::new(&of_spares, 1 << 30);
                spares.prepare().unwrap();
                story(UringIo::new(Some(Arc::new(spares))), of_story, of_spares).await;
            });
        });
        let result = run.join();
        fs::remove_dir_all(&dir).unwrap();
        let _ = fs::remove_dir_all(&spare);
        result.unwrap();
    }

    fn count(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    async fn creates_and_removes(io: &UringIo, dir: &Path) {
        let path = dir.join("file");
        let file = io.create_zeroed(&path, 2 * MIB).await.unwrap();
        assert_eq!(file.len().await.unwrap(), 2 * MIB);
        file.close().await.unwrap();
        io.remove(&path).await.unwrap();
        let file = io.create_scratch(&path, 2 * MIB).await.unwrap();
        file.allocate(2 * MIB).await.unwrap();
        file.close().await.unwrap();
        io.remove(&path).await.unwrap();
        assert_eq!(io.remove(&path).await.unwrap_err().cause, IoCause::NotFound);
        assert!(!path.exists());
    }

    #[test]
    fn the_directory_of_spares_may_go_away() {
        let story = |io: UringIo, dir: PathBuf, spare: PathBuf| async move {
            fs::remove_dir(&spare).unwrap();
            creates_and_removes(&io, &dir).await;
            fs::write(&spare, "a file").unwrap();
            creates_and_removes(&io, &dir).await;
            fs::remove_file(&spare).unwrap();
        };
        with_spares_in("gone", |dir| dir.join("spare"), story);
    }

    #[test]
    fn spares_may_be_on_another_file_system() {
        let other =
            |_: &Path| PathBuf::from(format!("/dev/shm/pgstrata-spares-{}", std::process::id()));
        let story = |io: UringIo, dir: PathBuf, spare: PathBuf| async move {
            fs::write(spare.join("00"), vec![1; 2 * MIB as usize]).unwrap();
            creates_and_removes(&io, &dir).await;
            assert_eq!(count(&spare), 1);
        };
        with_spares_in("other", other, story);
    }

    #[test]
    fn a_spare_that_cannot_be_opened_is_no_obstacle() {
        let story = |io: UringIo, dir: PathBuf, spare: PathBuf| async move {
            fs::write(spare.join("00"), vec![1; 2 * MIB as usize]).unwrap();
            let path = dir.join("file");
            // Nobody can open a socket's name.
            let take = |_: &Spares, target: &Path| {
                std::os::unix::net::UnixListener::bind(target).map(|_| true)
            };
            let (file, reused) = io.reuse_or_create(&path, take).await.unwrap();
            assert!(!reused && fs::symlink_metadata(&path).unwrap().is_file());
            assert_eq!(file.len().await.unwrap(), 0);
            file.allocate(MIB).await.unwrap();
            file.close().await.unwrap();
            assert_eq!((count(&dir), count(&spare)), (2, 1));
            fs::remove_file(&path).unwrap();
            creates_and_removes(&io, &dir).await;
        };
        with_spares_in("unopened", |dir| dir.join("spare"), story);
    }

    #[test]
    fn spares_may_be_where_nothing_can_be_renamed_without_replacing() {
        let story = |_: UringIo, dir: PathBuf, spare: PathBuf| async move {
            fs::write(spare.join("00"), vec![1; 2 * MIB as usize]).unwrap();
            let spares = Spares::new(&spare, 1 << 30).without_rename_new();
            creates_and_removes(&UringIo::new(Some(Arc::new(spares))), &dir).await;
        };
        with_spares_in("rename", |dir| dir.join("spare"), story);
    }

    #[test]
    fn spares_give_their_space_to_a_full_disk() {
        let story = |io: UringIo, dir: PathBuf, spare: PathBuf| async move {
            creates_and_removes(&io, &dir).await;
            assert_eq!(count(&spare), 1);
            for (cause, left) in [(IoCause::NotFound, 1), (IoCause::NoSpace, 0)] {
                let error = IoError { operation: "write", path: dir.clone(), cause };
                assert_eq!(io.noted::<()>(Err(error.clone())).await, Err(error));
                assert_eq!(count(&spare), left);
            }
        };
        with_spares_in("full", |dir| dir.join("spare"), story);
    }

    #[test]
    fn a_long_end_is_given_back_soon() {
        let story = |io: UringIo, dir: PathBuf, spare: PathBuf| async move {
            fs::write(spare.join("00"), vec![1; 64 * MIB as usize]).unwrap();
            let file = io.create_scratch(&dir.join("file"), 64 * MIB).await.unwrap();
            let before = io.now();
            file.set_len(ALIGNMENT as u64).await.unwrap();
            let pauses = (io.now() - before).as_millis() as u64 / SPARE_TRIM_PAUSE_MS;
            assert!((15..50).contains(&pauses), "{pauses}");
            assert_eq!(file.len().await.unwrap(), ALIGNMENT as u64);
            file.close().await.unwrap();
        };
        with_spares_in("end", |dir| dir.join("spare"), story);
    }
}
