//! One suite that every implementation of [`Io`] has to pass, so that what the simulator proves
//! holds on the ring as well.

use std::cell::Cell;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::join_all;

use super::dir_syncs::Syncing;
use super::durable::{self, DurableError};
use super::spares::Spares;
use super::uring::UringIo;
use super::{ALIGNMENT, File, Io, IoCause, IoError, TaskClass};
use crate::limits::DEVICE_IO_BYTES_MAX;

const BLOCK: u64 = ALIGNMENT as u64;

fn cause<T>(result: Result<T, IoError>) -> IoCause {
    match result {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error.cause,
    }
}

async fn panics<T>(what: &str, future: impl Future<Output = T>) {
    assert!(AssertUnwindSafe(future).catch_unwind().await.is_err(), "{what} did not panic");
}

async fn write<F: File>(file: &F, offset: u64, len: usize, byte: u8) {
    let mut buf = file.alloc(len);
    buf.fill(byte);
    file.write_at(offset, buf).await.unwrap();
}

async fn names<I: Io>(io: &I, dir: &Path) -> Vec<String> {
    io.list(dir).await.unwrap().into_iter().map(|entry| entry.name).collect()
}

async fn reads_and_writes<I: Io>(io: &I, dir: &Path) {
    let path = dir.join("data");
    let file = io.create(&path).await.unwrap();
    assert_eq!(cause(io.create(&path).await), IoCause::Exists);
    assert_eq!(file.len().await.unwrap(), 0);
    assert!(file.read_at(0, ALIGNMENT).await.unwrap().is_empty());

    // Memory that was used before must come back zeroed.
    for _ in 0..8 {
        let mut buf = file.alloc(3 * ALIGNMENT);
        assert_eq!(buf.len(), 3 * ALIGNMENT);
        assert!(buf.iter().all(|byte| *byte == 0), "alloc is not zeroed");
        buf.fill(0xee);
    }

    // A write past the end extends the file; the hole reads as zeros.
    write(&file, 4 * BLOCK, ALIGNMENT, 7).await;
    assert_eq!(file.len().await.unwrap(), 5 * BLOCK);
    let read = file.read_at(0, 5 * ALIGNMENT).await.unwrap();
    assert!(read[..4 * ALIGNMENT].iter().all(|byte| *byte == 0));
    assert!(read[4 * ALIGNMENT..].iter().all(|byte| *byte == 7));
    drop(read);

    // Short at the end of the file, empty behind it.
    assert_eq!(file.read_at(3 * BLOCK, 8 * ALIGNMENT).await.unwrap().len(), 2 * ALIGNMENT);
    assert!(file.read_at(5 * BLOCK, ALIGNMENT).await.unwrap().is_empty());
    assert!(file.read_at(50 * BLOCK, ALIGNMENT).await.unwrap().is_empty());

    // Overwriting a part leaves the rest.
    write(&file, 0, 3 * ALIGNMENT, 1).await;
    write(&file, BLOCK, ALIGNMENT, 2).await;
    let read = file.read_at(0, 3 * ALIGNMENT).await.unwrap();
    let firsts: Vec<u8> = read.chunks(ALIGNMENT).map(|block| block[0]).collect();
    assert_eq!(firsts, [1, 2, 1]);
    drop(read);
    file.sync().await.unwrap();
    file.close().await.unwrap();

    let file = io.open(&path).await.unwrap();
    assert_eq!(file.read_at(BLOCK, ALIGNMENT).await.unwrap()[0], 2);
    panics("an unaligned offset", file.read_at(100, ALIGNMENT)).await;
    panics("an unaligned length", file.read_at(0, 100)).await;
    panics("an unaligned write", async { file.write_at(512, file.alloc(ALIGNMENT)).await }).await;
    panics("an unaligned buffer", async { file.alloc(100) }).await;
    let too_long = DEVICE_IO_BYTES_MAX + ALIGNMENT;
    panics("too long a write", async { file.write_at(0, file.alloc(too_long)).await }).await;
    file.close().await.unwrap();
}

async fn large_and_odd_lengths<I: Io>(io: &I, dir: &Path) {
    let file = io.create(&dir.join("large")).await.unwrap();
    file.allocate(3 * DEVICE_IO_BYTES_MAX as u64).await.unwrap();
    assert_eq!(file.len().await.unwrap(), 3 * DEVICE_IO_BYTES_MAX as u64);
    file.allocate(BLOCK).await.unwrap();
    assert_eq!(file.len().await.unwrap(), 3 * DEVICE_IO_BYTES_MAX as u64, "it never shrinks");
    assert!(file.read_at(0, ALIGNMENT).await.unwrap().iter().all(|byte| *byte == 0));
    for part in 0..3u8 {
        write(&file, u64::from(part) * DEVICE_IO_BYTES_MAX as u64, DEVICE_IO_BYTES_MAX, part + 1)
            .await;
    }
    // Longer than one device read, and past the end.
    let read = file.read_at(BLOCK, 4 * DEVICE_IO_BYTES_MAX).await.unwrap();
    assert_eq!(read.len(), 3 * DEVICE_IO_BYTES_MAX - ALIGNMENT);
    for part in 0..3u8 {
        let at = (usize::from(part) + 1) * DEVICE_IO_BYTES_MAX - 2 * ALIGNMENT;
        assert_eq!(read[at], part + 1);
    }
    drop(read);
    file.close().await.unwrap();

    // A length that is no multiple of the alignment: reads end where the file does.
    let file = io.create(&dir.join("odd")).await.unwrap();
    file.allocate(BLOCK + 1000).await.unwrap();
    assert_eq!(file.len().await.unwrap(), BLOCK + 1000);
    assert_eq!(file.read_at(0, 4 * ALIGNMENT).await.unwrap().len(), ALIGNMENT + 1000);
    assert_eq!(file.read_at(BLOCK, ALIGNMENT).await.unwrap().len(), 1000);
    assert!(file.read_at(2 * BLOCK, ALIGNMENT).await.unwrap().is_empty());
    file.close().await.unwrap();
}

async fn at_once<I: Io>(io: &I, dir: &Path) {
    let file = io.create(&dir.join("at-once")).await.unwrap();
    join_all((0..32u8).map(|block| write(&file, u64::from(block) * BLOCK, ALIGNMENT, block))).await;
    let reads = join_all((0..32u64).map(|block| file.read_at(block * BLOCK, ALIGNMENT))).await;
    for (block, read) in reads.into_iter().enumerate() {
        assert!(read.unwrap().iter().all(|byte| usize::from(*byte) == block));
    }
    file.sync().await.unwrap();
    file.close().await.unwrap();
}

async fn space_is_used_again<I: Io>(io: &I, dir: &Path) {
    const LEN: u64 = 2 * DEVICE_IO_BYTES_MAX as u64;
    let path = dir.join("again");
    let all = |bytes: &[u8], byte: u8| bytes.iter().all(|other| *other == byte);
    for round in 0..4u8 {
        let file = io.create_zeroed(&path, LEN).await.unwrap();
        assert_eq!(cause(io.create_zeroed(&path, LEN).await), IoCause::Exists);
        assert_eq!(cause(io.create_scratch(&path, LEN).await), IoCause::Exists);
        let read = file.read_at(0, 2 * LEN as usize).await.unwrap();
        assert!(read.len() as u64 == LEN && all(&read, 0), "{round}");
        drop(read);
        write(&file, 0, DEVICE_IO_BYTES_MAX, 7).await;
        file.close().await.unwrap();
        io.remove(&path).await.unwrap();

        let file = io.create_scratch(&path, LEN).await.unwrap();
        write(&file, 0, DEVICE_IO_BYTES_MAX, 8).await;
        file.set_len(LEN / 2).await.unwrap();
        assert_eq!(file.len().await.unwrap(), LEN / 2);
        let read = file.read_at(0, LEN as usize).await.unwrap();
        assert!(read.len() as u64 == LEN / 2 && all(&read, 8), "{round}");
        drop(read);
        file.set_len(LEN).await.unwrap();
        let read = file.read_at(LEN / 2, LEN as usize).await.unwrap();
        assert!(read.len() as u64 == LEN / 2 && all(&read, 0), "{round}");
        drop(read);
        panics("an unaligned length", file.set_len(100)).await;
        write(&file, LEN / 2, DEVICE_IO_BYTES_MAX, 9).await;
        file.close().await.unwrap();
        io.remove(&path).await.unwrap();
    }
}

async fn directories<I: Io>(io: &I, dir: &Path) {
    let sub = dir.join("sub");
    assert_eq!(cause(io.list(&sub).await), IoCause::NotFound);
    assert_eq!(cause(io.create(&sub.join("x")).await), IoCause::NotFound);
    assert_eq!(cause(io.create_dir(&sub.join("deep")).await), IoCause::NotFound);
    io.create_dir(&sub).await.unwrap();
    io.create_dir(&sub).await.unwrap();
    for name in ["c", "a", "b"] {
        let file = io.create(&sub.join(name)).await.unwrap();
        write(&file, 0, ALIGNMENT, name.as_bytes()[0]).await;
        file.sync().await.unwrap();
        file.close().await.unwrap();
    }
    io.create_dir(&sub.join("d")).await.unwrap();
    io.sync_dir(&io.dir_change(&sub)).await.unwrap();
    let entries = io.list(&sub).await.unwrap();
    let seen: Vec<_> =
        entries.iter().map(|entry| (entry.name.as_str(), entry.is_dir, entry.len)).collect();
    assert_eq!(
        seen,
        [("a", false, BLOCK), ("b", false, BLOCK), ("c", false, BLOCK), ("d", true, 0)]
    );
    assert_eq!(cause(io.create_dir(&sub.join("a")).await), IoCause::Exists);

    // A rename replaces its target; one who has that open goes on reading what it was.
    let replaced = io.open(&sub.join("b")).await.unwrap();
    io.rename(&sub.join("a"), &sub.join("b")).await.unwrap();
    assert_eq!(names(io, &sub).await, ["b", "c", "d"]);
    assert_eq!(replaced.read_at(0, ALIGNMENT).await.unwrap()[0], b'b');
    replaced.close().await.unwrap();
    let file = io.open(&sub.join("b")).await.unwrap();
    assert_eq!(file.read_at(0, ALIGNMENT).await.unwrap()[0], b'a');
    file.close().await.unwrap();
    assert_eq!(cause(io.rename(&sub.join("a"), &sub.join("x")).await), IoCause::NotFound);
    assert!(io.rename(&sub.join("b"), &sub.join("d")).await.is_err(), "a file over a directory");
    io.rename(&sub.join("c"), &sub.join("d/c")).await.unwrap();
    assert_eq!(names(io, &sub.join("d")).await, ["c"]);

    io.remove(&sub.join("b")).await.unwrap();
    assert_eq!(cause(io.remove(&sub.join("b")).await), IoCause::NotFound);
    assert_eq!(cause(io.open(&sub.join("b")).await), IoCause::NotFound);
    assert!(io.remove(&sub.join("d")).await.is_err(), "a directory is not removed as a file");
    assert!(io.list(&sub.join("d/c")).await.is_err(), "a file has no entries");
    assert_eq!(cause(io.sync_dir(&io.dir_change(&dir.join("none"))).await), IoCause::NotFound);
    io.remove_dir_all(&sub).await.unwrap();
    io.remove_dir_all(&sub).await.unwrap();
    assert_eq!(cause(io.list(&sub).await), IoCause::NotFound);
}

async fn small_files<I: Io>(io: &I, dir: &Path) {
    let path = dir.join("small");
    let missing = durable::read_file(io, &path).await;
    assert!(matches!(missing, Err(DurableError::Io(error)) if error.cause == IoCause::NotFound));
    let long: Vec<u8> = (0..DEVICE_IO_BYTES_MAX + 5000).map(|at| at as u8).collect();
    for body in [&b"one"[..], &[], &long, b"two"] {
        durable::write_file_atomic(io, &path, body).await.unwrap();
        assert_eq!(durable::read_file(io, &path).await.unwrap(), body);
        assert!(!names(io, dir).await.iter().any(|name| name.ends_with(durable::TEMP_SUFFIX)));
    }
    // What an earlier process left half written does not stand in the way.
    io.create(&durable::temp_path(&path)).await.unwrap().close().await.unwrap();
    durable::write_file_atomic(io, &path, b"three").await.unwrap();

    let file = io.open(&path).await.unwrap();
    let good = file.read_at(0, ALIGNMENT).await.unwrap().to_vec();
    for at in [0, 9, 13, 20, 25, 30, 100] {
        let mut buf = file.alloc(ALIGNMENT);
        buf.copy_from_slice(&good);
        buf[at] ^= 1;
        file.write_at(0, buf).await.unwrap();
        let read = durable::read_file(io, &path).await;
        assert!(matches!(read, Err(DurableError::Damaged { .. })), "byte {at}: {read:?}");
    }
    file.close().await.unwrap();
}

async fn tasks_and_time<I: Io>(io: &I) {
    let before = io.now();
    io.sleep(Duration::from_millis(3)).await;
    assert!(io.now() >= before + Duration::from_millis(3));
    assert!(io.unix_time_us() > 1_700_000_000_000_000);
    assert_ne!(io.random_u64(), io.random_u64());

    let (sender, receiver) = async_channel::bounded(1);
    for class in [TaskClass::Serve, TaskClass::Ingest, TaskClass::Background] {
        let (sender, io) = (sender.clone(), io.clone());
        io.clone().spawn(class, async move {
            for number in 0..10u32 {
                io.yield_if_needed().await;
                sender.send(number).await.unwrap();
            }
        });
    }
    drop(sender);
    let mut sum = 0;
    while let Ok(number) = receiver.recv().await {
        sum += number;
    }
    assert_eq!(sum, 3 * 45);

    let (sender, receiver) = futures_channel::oneshot::channel();
    let later = io.clone();
    io.spawn(TaskClass::Background, async move {
        later.sleep(Duration::from_millis(1)).await;
        sender.send(5).unwrap();
    });
    assert_eq!(receiver.await, Ok(5));
}

/// Everything; `dir` exists and is empty.
pub async fn suite<I: Io>(io: I, dir: PathBuf) {
    reads_and_writes(&io, &dir).await;
    large_and_odd_lengths(&io, &dir).await;
    at_once(&io, &dir).await;
    space_is_used_again(&io, &dir).await;
    directories(&io, &dir).await;
    small_files(&io, &dir).await;
    tasks_and_time(&io).await;
}

#[test]
fn the_ring_conforms() {
    // Beside the test binary, which stands on a real disk more often than the temporary
    // directory does: O_DIRECT needs one.
    let binary = std::env::current_exe().unwrap();
    let dir = binary.with_file_name(format!("conformance-{}", std::process::id()));
    for sub in ["with", "without"] {
        std::fs::create_dir_all(dir.join(sub)).unwrap();
    }
    let inner = dir.clone();
    let run = std::thread::spawn(move || {
        let executor = glommio::LocalExecutorBuilder::default().io_memory(1 << 20).make().unwrap();
        executor.run(async move {
            // Once with, and once without.
            let spares = Spares::new(&inner.join("spare"), 1 << 30);
            spares.prepare().unwrap();
            suite(UringIo::new(Some(Arc::new(spares))), inner.join("with")).await;
            let io = UringIo::new(None);
            suite(io.clone(), inner.join("without")).await;
            syncs_beside_others(io, inner.join("with")).await;
        });
    });
    let result = run.join();
    std::fs::remove_dir_all(&dir).unwrap();
    result.unwrap();
}

/// What the simulator does not have: syncs of other executors, which it must wait for.
async fn syncs_beside_others(io: UringIo, dir: PathBuf) {
    let change = io.dir_change(&dir);
    drop(Syncing::begin(&dir));
    assert!(io.sync_dir(&change).await.is_err(), "one that was given up may have failed");
    let (change, elsewhere) = (io.dir_change(&dir), Syncing::begin(&dir.join("elsewhere")));
    for fails in [false, true] {
        let (other, ended) = (Syncing::begin(&dir), Rc::new(Cell::new(false)));
        let (theirs, later) = (ended.clone(), io.clone());
        io.spawn(TaskClass::Background, async move {
            later.sleep(Duration::from_millis(20)).await;
            theirs.set(true);
            other.end(fails);
        });
        assert_eq!(io.sync_dir(&change).await.is_err(), fails);
        assert!(ended.get(), "it was not waited for");
    }
    elsewhere.end(false);
    io.sync_dir(&io.dir_change(&dir)).await.unwrap();
}

#[test]
fn the_simulator_conforms() {
    for seed in 0..20 {
        let mut world = crate::sim::SimWorld::new(seed, crate::sim::SimOptions::varied(seed));
        let run = world.run(|io| async move {
            let dir = PathBuf::from("/conformance");
            io.create_dir(&dir).await.unwrap();
            suite(io, dir).await;
        });
        assert_eq!(run, Ok(()), "{world}");
    }
}
