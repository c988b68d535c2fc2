//! [`Io`] and [`File`] over the simulated disk.
//!
//! An operation is submitted, takes simulated time, and is complete. Where between the two its
//! effect takes place is drawn from the seed; that is also what decides what a task that is
//! dropped in the middle leaves behind.

use std::cell::Cell;
use std::future::Future;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use super::disk::{Disk, Inode};
use super::executor::{Shared, Sleep, State};
use super::random::Stream;
use crate::io::{
    ALIGNMENT, DirChange, DirEntry, File, Instant, Io, IoCause, IoError, TaskClass, allocated,
};
use crate::limits::DEVICE_IO_BYTES_MAX;

/// Wall clock at the start of every simulation: 2026-01-01 00:00 UTC, in microseconds.
const UNIX_TIME_US_START: i64 = 1_767_225_600_000_000;

/// Access of simulated tasks to their machine.
#[derive(Clone)]
pub struct SimIo {
    pub(super) shared: Rc<Shared>,
    /// Operations take so many times as long.
    pub(super) slowness: u32,
}

fn injected(what: &str) -> IoCause {
    IoCause::Other(format!("simulated {what} error"))
}

impl SimIo {
    /// Switches faults on or off, for the part of a test in which everything must succeed.
    pub fn set_faults(&self, enabled: bool) {
        self.shared.state.borrow_mut().faults_enabled = enabled;
    }

    /// Changes the size of the disk.
    pub fn set_capacity(&self, capacity_bytes: Option<u64>) {
        self.shared.state.borrow_mut().disk.set_capacity(capacity_bytes);
    }

    /// True if the disk has a size.
    pub fn is_small(&self) -> bool {
        self.shared.state.borrow().options.capacity_bytes.is_some()
    }

    /// Bytes that the files take.
    pub fn used_bytes(&self) -> u64 {
        self.shared.state.borrow_mut().disk.used_bytes()
    }

    /// The same machine through a slower device: files that are opened by this take `factor`
    /// times as long for everything.
    pub fn slowed(&self, factor: u32) -> SimIo {
        SimIo { slowness: factor, ..self.clone() }
    }

    fn sleep_until(&self, until: Duration) -> Sleep {
        Sleep::new(Rc::clone(&self.shared), until)
    }

    /// The time an operation takes.
    async fn delay(&self, operation: &'static str, path: &Path) {
        self.shared.note_wait(|| format!("{operation} {}", path.display()));
        let until = {
            let mut state = self.shared.state.borrow_mut();
            let (low, high) = (state.options.latency_us_min, state.options.latency_us_max);
            let slow = state.options.slow_per_million;
            let mut latency_us = state.streams.latency.between(low, high);
            if state.streams.latency.chance(slow) {
                latency_us *= 100;
            }
            state.trace.fold_bytes(operation.as_bytes());
            state.trace.fold_bytes(path.as_os_str().as_encoded_bytes());
            state.now + Duration::from_micros(latency_us) * self.slowness
        };
        self.sleep_until(until).await;
    }

    fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.shared.state.borrow_mut())
    }

    /// Draws whether a fault of this chance strikes.
    fn fault(&self, per_million: impl FnOnce(&State) -> u32) -> bool {
        self.state(|state| {
            let chance = if state.faults_enabled { per_million(state) } else { 0 };
            let strikes = state.streams.faults.chance(chance);
            state.trace.fold(u64::from(strikes));
            strikes
        })
    }

    async fn metadata<T>(
        &self,
        operation: &'static str,
        path: &Path,
        effect: impl FnOnce(&mut Disk) -> Result<T, IoCause>,
    ) -> Result<T, IoError> {
        let effect = |state: &mut State| {
            if state.disk.would_change(operation, path) {
                state.note_change(operation, path);
            }
            effect(&mut state.disk)
        };
        let result = if self.fault(|state| state.options.metadata_error_per_million) {
            self.delay(operation, path).await;
            Err(injected("metadata"))
        } else if self.state(|state| state.streams.faults.coin()) {
            let result = self.state(effect);
            self.delay(operation, path).await;
            result
        } else {
            self.delay(operation, path).await;
            self.state(effect)
        };
        self.state(|state| state.trace.fold(u64::from(result.is_ok())));
        result.map_err(|cause| IoError { operation, path: path.to_owned(), cause })
    }

    fn handle(&self, path: &Path, inode: Inode) -> SimFile {
        SimFile {
            io: self.clone(),
            path: path.to_owned(),
            inode,
            closed: Cell::new(false),
            has_failed: Cell::new(true),
            sync_failed: Cell::new(false),
        }
    }
}

impl Io for SimIo {
    type File = SimFile;

    async fn create(&self, path: &Path) -> Result<SimFile, IoError> {
        let io = self.clone();
        let file =
            self.metadata("create", path, |disk| Ok(io.handle(path, disk.create(path)?))).await?;
        file.has_failed.set(false);
        Ok(file)
    }

    async fn create_zeroed(&self, path: &Path, len: u64) -> Result<SimFile, IoError> {
        let io = self.clone();
        let seed = self.state(|state| state.streams.zeroed.next_u64());
        let create = |disk: &mut Disk| {
            let mut noise = Stream::new(seed, "zeroed");
            let reused = disk.reuse_zeroed(path, len, &mut noise)?;
            let inode = reused.map_or_else(|| disk.create(path), Ok)?;
            Ok((io.handle(path, inode), reused.is_some()))
        };
        let (file, is_reused) = self.metadata("create", path, create).await?;
        file.has_failed.set(false);
        if is_reused { Ok(file) } else { allocated(self, file, path, len).await }
    }

    async fn create_scratch(&self, path: &Path, least: u64) -> Result<SimFile, IoError> {
        let io = self.clone();
        let seed = self.state(|state| state.streams.faults.next_u64());
        let create = |disk: &mut Disk| {
            let mut noise = Stream::new(seed, "scratch");
            Ok(io.handle(path, disk.create_scratch(path, least, &mut noise)?))
        };
        let file = self.metadata("create", path, create).await?;
        file.has_failed.set(false);
        Ok(file)
    }

    async fn open(&self, path: &Path) -> Result<SimFile, IoError> {
        let io = self.clone();
        let file =
            self.metadata("open", path, |disk| Ok(io.handle(path, disk.open(path)?))).await?;
        file.has_failed.set(false);
        Ok(file)
    }

    async fn rename(&self, source: &Path, target: &Path) -> Result<(), IoError> {
        self.metadata("rename", source, |disk| disk.rename(source, target)).await
    }

    async fn remove(&self, path: &Path) -> Result<(), IoError> {
        self.metadata("remove", path, |disk| disk.remove(path)).await
    }

    async fn create_dir(&self, path: &Path) -> Result<(), IoError> {
        self.metadata("create directory", path, |disk| disk.create_dir(path)).await
    }

    async fn remove_dir_all(&self, path: &Path) -> Result<(), IoError> {
        self.metadata("remove directory", path, |disk| disk.remove_dir_all(path)).await
    }

    async fn list(&self, dir: &Path) -> Result<Vec<DirEntry>, IoError> {
        self.metadata("list", dir, |disk| disk.list(dir)).await
    }

    fn dir_change(&self, dir: &Path) -> DirChange {
        self.state(|state| state.dir_syncs.change(dir))
    }

    async fn sync_dir(&self, change: &DirChange) -> Result<(), IoError> {
        let (operation, dir) = ("sync directory", change.dir());
        let error = |cause| IoError { operation, path: dir.to_owned(), cause };
        let (inode, seq) = self.state(|state| state.disk.begin_sync_dir(dir)).map_err(error)?;
        let number = self.state(|state| state.dir_syncs.begin(dir));
        self.delay(operation, dir).await;
        let failed = self.fault(|state| state.options.sync_error_per_million);
        self.state(|state| {
            state.dir_syncs.end(number, failed);
            if failed {
                state.failed_dir_syncs.insert(inode, seq);
                return Err(error(injected("sync")));
            }
            state.note_change(operation, dir);
            // What could not be written is forgotten until the directory is changed again.
            let forgotten = state.failed_dir_syncs.get(&inode);
            let knows = forgotten.is_none_or(|seq| state.disk.has_changed(inode, *seq));
            if knows && !state.options.ignore_dir_sync && !state.options.ignores_sync_of(dir) {
                state.failed_dir_syncs.remove(&inode);
                state.disk.sync_dir(inode, seq);
            }
            match state.options.ignore_other_dir_syncs {
                true => Ok(()),
                false => state.dir_syncs.proof(change),
            }
        })
    }

    fn now(&self) -> Instant {
        self.state(|state| state.now)
    }

    fn unix_time_us(&self) -> i64 {
        self.state(|state| UNIX_TIME_US_START + state.now.as_micros() as i64)
    }

    fn random_u64(&self) -> u64 {
        self.state(|state| state.streams.product.next_u64())
    }

    async fn sleep(&self, duration: Duration) {
        self.shared.note_wait(|| format!("sleep of {duration:?}"));
        let until = self.state(|state| state.now.saturating_add(duration));
        self.sleep_until(until).await;
    }

    async fn yield_if_needed(&self) {
        let yields = self.state(|state| {
            let chance = state.options.yield_per_million;
            state.streams.yields.chance(chance)
        });
        if yields {
            futures_lite::future::yield_now().await;
        }
    }

    #[track_caller]
    fn spawn(&self, class: TaskClass, task: impl Future<Output = ()> + 'static) {
        self.shared.add_task(class, Location::caller(), task);
    }
}

/// An open simulated file.
pub struct SimFile {
    io: SimIo,
    path: PathBuf,
    inode: Inode,
    closed: Cell<bool>,
    /// A file of which an operation has failed may be dropped without being closed.
    has_failed: Cell<bool>,
    sync_failed: Cell<bool>,
}

/// Marks a write as under way for as long as it is.
struct Writing<'a> {
    file: &'a SimFile,
    offset: u64,
    len: u64,
}

impl<'a> Writing<'a> {
    fn begin(file: &'a SimFile, offset: u64, len: u64) -> Writing<'a> {
        file.io.state(|state| state.disk.file(file.inode).begin_write(offset, len));
        Writing { file, offset, len }
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        if let Ok(mut state) = self.file.io.shared.state.try_borrow_mut() {
            state.disk.file(self.file.inode).end_write(self.offset, self.len);
        }
    }
}

impl SimFile {
    fn fail(&self, operation: &'static str, cause: IoCause) -> IoError {
        self.has_failed.set(true);
        self.io.state(|state| state.trace.fold_bytes(operation.as_bytes()));
        IoError { operation, path: self.path.clone(), cause }
    }

    /// Part of a write that takes place before its time, as `start..end` within the buffer.
    fn early_part(&self, len: usize) -> (usize, usize) {
        self.io.state(|state| {
            let stream = &mut state.streams.faults;
            let sectors = (len / super::file_data::SECTOR_BYTES) as u64;
            let cut = stream.below(sectors + 1) as usize * super::file_data::SECTOR_BYTES;
            match stream.below(4) {
                0 => (0, 0),
                1 => (0, len),
                2 => (0, cut),
                _ => (cut, len),
            }
        })
    }

    /// A wrong place of this or another file, and the bytes from there to the file's end.
    fn wrong_place(&self, state: &mut State) -> Option<(Inode, u64, usize)> {
        let files = state.disk.files();
        let other = files.get(state.streams.faults.below(files.len() as u64) as usize);
        let inode = match other {
            Some(other) if state.streams.faults.coin() => *other,
            _ => self.inode,
        };
        let blocks = state.disk.file(inode).len() / ALIGNMENT as u64;
        if blocks == 0 {
            return None;
        }
        let offset = state.streams.faults.below(blocks) * ALIGNMENT as u64;
        Some((inode, offset, (blocks * ALIGNMENT as u64 - offset) as usize))
    }

    /// Writes to a wrong place, within the length of the file there.
    fn misdirect(&self, data: &[u8]) {
        self.io.state(|state| {
            if let Some((inode, offset, room)) = self.wrong_place(state) {
                let data = data.get(..room).unwrap_or(data);
                state.disk.file(inode).write(offset, data);
            }
        });
    }

    /// What stands in a wrong place, as if it had been read from the right one.
    fn read_elsewhere(&self, state: &mut State, bytes: &mut [u8]) {
        if let Some((inode, offset, _)) = self.wrong_place(state) {
            let found = state.disk.file(inode).read(offset, bytes.len());
            bytes.fill(0);
            bytes.iter_mut().zip(found.iter()).for_each(|(to, from)| *to = *from);
        }
    }
}

fn assert_aligned(operation: &str, offset: u64, len: usize) {
    assert!(
        offset.is_multiple_of(ALIGNMENT as u64) && len.is_multiple_of(ALIGNMENT),
        "{operation} of {len} bytes at {offset} is not aligned to {ALIGNMENT}"
    );
}

impl File for SimFile {
    type ReadBuf = Box<[u8]>;
    type WriteBuf = Box<[u8]>;

    fn alloc_to_fill(&self, len: usize) -> Box<[u8]> {
        // Whoever counts on zeros is found out.
        let mut buf = self.alloc(len);
        buf.fill(0xA5);
        buf
    }

    fn alloc(&self, len: usize) -> Box<[u8]> {
        assert_aligned("alloc", 0, len);
        assert!(len > 0, "a buffer of no bytes");
        vec![0; len].into_boxed_slice()
    }

    async fn read_at(&self, offset: u64, len: usize) -> Result<Box<[u8]>, IoError> {
        assert_aligned("read", offset, len);
        self.io.delay("read", &self.path).await;
        if self.io.fault(|state| state.options.read_error_per_million) {
            return Err(self.fail("read", injected("read")));
        }
        let flip = self.io.fault(|state| state.options.bit_flip_per_million);
        let elsewhere = self.io.fault(|state| state.options.misdirected_read_per_million);
        Ok(self.io.state(|state| {
            let mut bytes = state.disk.file(self.inode).read(offset, len);
            let was_wrong = state.misread.remove(&self.inode);
            if flip && !bytes.is_empty() && (state.options.bit_flips_stay || !was_wrong) {
                let byte = state.streams.faults.below(bytes.len() as u64);
                let bit = state.streams.faults.below(8) as u32;
                bytes[byte as usize] ^= 1 << bit;
                if !state.options.bit_flips_stay {
                    state.misread.insert(self.inode);
                } else if state.streams.faults.coin() {
                    state.disk.file(self.inode).flip_bit(offset + byte, bit);
                }
            }
            if elsewhere && !was_wrong {
                state.misread.insert(self.inode);
                self.read_elsewhere(state, &mut bytes);
            }
            state.trace.fold(offset);
            state.trace.fold_bytes(&bytes);
            bytes
        }))
    }

    async fn write_at(&self, offset: u64, buf: Box<[u8]>) -> Result<(), IoError> {
        assert_aligned("write", offset, buf.len());
        assert!(buf.len() <= DEVICE_IO_BYTES_MAX, "a write of {} bytes at once", buf.len());
        if buf.is_empty() {
            return Ok(());
        }
        let len = buf.len() as u64;
        let space = self.io.state(|state| {
            state.trace.fold(offset);
            state.trace.fold_bytes(&buf);
            state.disk.check_space(self.inode, offset, len)
        });
        if let Err(cause) = space {
            self.io.delay("write", &self.path).await;
            return Err(self.fail("write", cause));
        }
        let writing = Writing::begin(self, offset, len);
        if self.io.fault(|state| state.options.misdirected_write_per_million) {
            self.io.delay("write", &self.path).await;
            self.misdirect(&buf);
            return Ok(());
        }
        let (start, end) = self.early_part(buf.len());
        let write_part = |from: usize, to: usize| {
            if from == to {
                return;
            }
            self.io.state(|state| {
                state.note_change("write", &self.path);
                state.disk.file(self.inode).write(offset + from as u64, &buf[from..to]);
            });
        };
        write_part(start, end);
        self.io.delay("write", &self.path).await;
        if self.io.fault(|state| state.options.write_error_per_million) {
            return Err(self.fail("write", injected("write")));
        }
        write_part(0, start);
        write_part(end, buf.len());
        drop(writing);
        Ok(())
    }

    async fn allocate(&self, len: u64) -> Result<(), IoError> {
        let space = self.io.state(|state| {
            state.trace.fold(len);
            state.disk.check_space(self.inode, 0, len)
        });
        self.io.delay("allocate", &self.path).await;
        space.map_err(|cause| self.fail("allocate", cause))?;
        self.io.state(|state| {
            state.note_change("allocate", &self.path);
            state.disk.file(self.inode).allocate(len);
        });
        Ok(())
    }

    async fn set_len(&self, len: u64) -> Result<(), IoError> {
        assert_aligned("set length of", len, 0);
        self.io.delay("set length of", &self.path).await;
        self.io.state(|state| {
            state.trace.fold(len);
            if state.disk.file(self.inode).len() != len {
                state.note_change("set length of", &self.path);
            }
            state.disk.file(self.inode).set_len(len);
        });
        Ok(())
    }

    async fn sync(&self) -> Result<(), IoError> {
        if self.sync_failed.get() {
            let path = self.path.display();
            let text = format!("{path}: synced again after a sync had failed");
            self.io.state(|state| state.violations.push(text));
        }
        let seq = self.io.state(|state| state.disk.file(self.inode).latest_change());
        self.io.delay("sync", &self.path).await;
        if self.sync_failed.get() || self.io.fault(|state| state.options.sync_error_per_million) {
            self.sync_failed.set(true);
            return Err(self.fail("sync", injected("sync")));
        }
        self.io.state(|state| {
            state.note_change("sync", &self.path);
            if !state.options.ignore_file_sync && !state.options.ignores_sync_of(&self.path) {
                state.disk.sync_file(self.inode, seq);
            }
        });
        Ok(())
    }

    async fn len(&self) -> Result<u64, IoError> {
        self.io.delay("len", &self.path).await;
        Ok(self.io.state(|state| state.disk.file(self.inode).len()))
    }

    async fn close(self) -> Result<(), IoError> {
        self.closed.set(true);
        self.io.delay("close", &self.path).await;
        Ok(())
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let Ok(mut state) = self.io.shared.state.try_borrow_mut() else { return };
        state.disk.close(self.inode);
        let excused = self.closed.get() || self.has_failed.get() || state.stopping;
        if !excused && !std::thread::panicking() {
            let step = state.step;
            let text = format!("{}: dropped without close at step {step}", self.path.display());
            state.violations.push(text);
        }
    }
}
