//! Against a real PostgreSQL: the library is built, records are made by hand.

use std::path::Path;
use std::process::Command;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::Instant;

use futures_lite::future::block_on;
use futures_util::future::join_all;
use futures_util::poll;
use nix::unistd::Pid;

use super::*;
use crate::base::page::{PAGE_SIZE, page_lsn};
use crate::base::{Lsn, RelNode};
use crate::redo::native::run::NativeRedo;
use crate::redo::record::tests::record;

const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };

/// Builds `neon_walredo.so` once, with its objects outside the source tree.
pub(in crate::redo) fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let target = root.join("target/walredo");
        std::fs::create_dir_all(&target).unwrap();
        let made = Command::new("make")
            .arg("-C")
            .arg(&target)
            .arg("-f")
            .arg(root.join("pgxn/neon_walredo/Makefile"))
            .output()
            .unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        target.join("neon_walredo.so")
    })
}

pub(in crate::redo) fn settings(hint_bits_logged: bool) -> ChildSettings {
    let output = Command::new("pg_config").arg("--bindir").output().unwrap();
    let bin = String::from_utf8(output.stdout).unwrap();
    ChildSettings {
        tenant: "test".into(),
        postgres_bin: Path::new(bin.trim()).join("postgres"),
        walredo_so: library().to_owned(),
        scratch_dir: std::env::temp_dir(),
        cpu: None,
        redo: RedoSettings { hint_bits_logged },
        timeout: Duration::from_secs(10),
    }
}

fn block_ref(id: u8, flags: u8, image: bool, data_len: usize, block: u32) -> Vec<u8> {
    let mut out = vec![id, flags];
    out.extend((data_len as u16).to_le_bytes());
    if image {
        out.extend(8192u16.to_le_bytes());
        out.extend([0, 0, 2]);
    }
    for number in [REL.spc, REL.db, REL.rel, block] {
        out.extend(number.to_le_bytes());
    }
    out
}

fn full_page(block: u32, image: &[u8]) -> Bytes {
    let body = [&block_ref(0, 0x10, true, 0, block)[..], image].concat();
    record(0, 0xB0, &body).into()
}

/// A heap insert of a tuple with `value`; as line pointer 1 it initialises the page.
pub(in crate::redo) fn insert(block: u32, line: u16, init: bool, value: u32) -> Bytes {
    let mut data = vec![1, 0, 0, 8, 24, 0];
    data.extend(value.to_le_bytes());
    let flags = if init { 0x60 } else { 0x20 };
    let mut body = block_ref(0, flags, false, data.len(), block);
    body.extend([255, 3]);
    body.extend(data);
    body.extend(line.to_le_bytes());
    body.push(0);
    record(10, if init { 0x80 } else { 0 }, &body).into()
}

/// `XLOG_HEAP2_VISIBLE`: block 0 is the map, block 1 the heap page.
fn visible(block: u32) -> Bytes {
    let mut body = block_ref(0, 2, false, 0, 0);
    body.extend(block_ref(1, 0, false, 0, block));
    body.extend([255, 5, 0, 0, 0, 0, 1]);
    record(9, 0x40, &body).into()
}

pub(crate) fn ask(
    fork: u8,
    block: u32,
    base: Option<Bytes>,
    records: Vec<(u64, Bytes)>,
) -> RedoRequest {
    let records = records.into_iter().map(|(lsn, record)| (Lsn(lsn), record)).collect();
    RedoRequest { rel: REL.fork(fork), block, base, records }
}

pub(crate) fn inserts(block: u32, count: u16) -> Vec<(u64, Bytes)> {
    (1..=count)
        .map(|n| (0x1000 + 8 * u64::from(n), insert(block, n, n == 1, 0xABCD_0000 | u32::from(n))))
        .collect()
}

/// Line pointers and the value of the last tuple.
pub(in crate::redo) fn heap_page(page: &[u8]) -> (usize, u32) {
    let lower = u16::from_le_bytes([page[12], page[13]]) as usize;
    let upper = u16::from_le_bytes([page[14], page[15]]) as usize;
    let value = page[upper + 24..upper + 28].try_into().unwrap();
    ((lower - 24) / 4, u32::from_le_bytes(value))
}

pub(in crate::redo) fn process_alive(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

/// Held by tests that count the processes of the whole program.
pub(in crate::redo) fn lock() -> std::sync::MutexGuard<'static, ()> {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    LOCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The processes of ours whose command line asks for redo with this parent.
pub(in crate::redo) fn children() -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let text = |name: &str| std::fs::read(entry.path().join(name)).unwrap_or_default();
        let parent = format!("PPid:\t{}\n", std::process::id());
        let status = String::from_utf8_lossy(&text("status")).into_owned();
        if status.contains(&parent) && text("cmdline").windows(10).any(|w| w == b"--wal-redo") {
            found.push(pid);
        }
    }
    found
}

/// One test, because it counts the processes of the whole program.
#[test]
fn redo_in_postgres() {
    let _lock = lock();
    let redo = ChildRedo::new(settings(false));
    block_on(async {
        pings(&redo).await;
        pages(&redo).await;
        errors(&redo).await;
        images_to_compare_with(&redo).await;
        pipelined(&redo).await;
        killed(&redo).await;
        hint_bits(&redo).await;
        let pids = children();
        assert_eq!(pids.len(), 1);
        assert!(redo.shutdown().await);
        assert!(!redo.shutdown().await);
        assert!(!process_alive(pids[0]));
        let after = redo.redo(ask(0, 7, None, inserts(7, 1))).await;
        assert_eq!(after, Err(RedoError::Shutdown));
    });
    block_on(by_turns(ChildRedo::new(settings(false))));
    dropped();
    nothing_to_run();
}

/// As [`insert`], with the image of the page afterwards that `wal_consistency_checking` adds.
fn insert_with_image(block: u32, line: u16, value: u32, image: &[u8]) -> Bytes {
    let mut data = vec![1, 0, 0, 8, 24, 0];
    data.extend(value.to_le_bytes());
    let init = line == 1;
    let mut body = vec![0, if init { 0x70 } else { 0x30 }];
    body.extend((data.len() as u16).to_le_bytes());
    // Length of the image, no hole, not to be applied.
    body.extend([0, 0x20, 0, 0, 0]);
    for number in [REL.spc, REL.db, REL.rel, block] {
        body.extend(number.to_le_bytes());
    }
    body.extend([255, 3]);
    body.extend(image);
    body.extend(data);
    body.extend(line.to_le_bytes());
    body.push(0);
    record(10, if init { 0x82 } else { 0x02 }, &body).into()
}

/// Runs of records that native redo applies and runs that it leaves to the process take turns in
/// one chain, each on top of the other's page: the page is that of the process alone.
async fn by_turns(redo: ChildRedo) {
    let plain = inserts(9, 7);
    let mut mixed = plain.clone();
    // Those with an image to compare with are the process's; it finds out if the page differs.
    for line in [1, 2, 4, 7u16] {
        let at = usize::from(line);
        let before = plain[..at].to_vec();
        let image = redo.redo(ask(0, 9, None, before)).await.unwrap();
        let value = 0xABCD_0000 | u32::from(line);
        mixed[at - 1].1 = insert_with_image(9, line, value, &image);
    }
    let alone = redo.redo(ask(0, 9, None, plain)).await.unwrap();
    let pid = redo.status().unwrap().pid;
    let both = NativeRedo::new(redo, RedoSettings { hint_bits_logged: false });
    let page = both.redo(ask(0, 9, None, mixed)).await.unwrap();
    assert_eq!(page, alone);
    assert_eq!(heap_page(&page), (7, 0xABCD_0007));
    let counters = both.counters();
    assert_eq!((counters.native_records(), counters.child_records()), (3, 4));
    assert_eq!((counters.pages_native.get(), counters.pages_child.get()), (0, 1));
    // A record of another block changes nothing, natively too.
    let wrong = both.redo(ask(0, 8, None, inserts(9, 3))).await.unwrap();
    assert_eq!(wrong, vec![0; PAGE_SIZE]);
    assert_eq!(counters.pages_native.get(), 1);
    assert_eq!(both.inner().status().unwrap().pid, pid);
    both.inner().shutdown().await;
}

async fn images_to_compare_with(redo: &ChildRedo) {
    let plain = vec![(0x1008, insert(9, 1, true, 77))];
    let right = redo.redo(ask(0, 9, None, plain)).await.unwrap();
    let checked = vec![(0x1008, insert_with_image(9, 1, 77, &right))];
    let page = redo.redo(ask(0, 9, None, checked)).await.unwrap();
    assert_eq!(page, right);
    // The page LSN is masked; the tuple's bytes are not.
    for (at, is_seen) in [(0, false), (PAGE_SIZE - 6, true)] {
        let mut image = right.to_vec();
        image[at] ^= 1;
        let wrong = vec![(0x1008, insert_with_image(9, 1, 77, &image))];
        let answer = redo.redo(ask(0, 9, None, wrong)).await;
        match answer {
            Err(RedoError::Refused { message, .. }) if is_seen => {
                assert!(message.contains("inconsistent page"), "{message}");
            }
            Ok(_) if !is_seen => {}
            other => panic!("byte {at}: {other:?}"),
        }
    }
}

/// A ping goes there and back, alone and among pages, and answers come to who asked.
async fn pings(redo: &ChildRedo) {
    let text = redo.ping().await.unwrap();
    assert!(text.starts_with(protocol::PONG_PREFIX) && text.ends_with("hint-bits off"), "{text}");
    assert!(text.contains(" sandbox seccomp"), "{text}");
    let page = redo.redo(ask(0, 9, None, inserts(9, 3)));
    let (before, page, after) = futures_util::join!(redo.ping(), page, redo.ping());
    assert_eq!((before.unwrap(), after.unwrap()), (text.clone(), text));
    assert_eq!(heap_page(&page.unwrap()).0, 3);
    assert_eq!(redo.status().unwrap().requests, 4);
}

async fn pages(redo: &ChildRedo) {
    let mut image = vec![0x5A; PAGE_SIZE];
    image[..24].copy_from_slice(
        &[[0; 12].as_slice(), &[24, 0, 0, 0x20, 0, 0x20, 4, 0x20, 0, 0, 0, 0]].concat(),
    );
    let page = redo.redo(ask(0, 7, None, vec![(0x2000, full_page(7, &image))])).await.unwrap();
    assert_eq!(page_lsn(&page), Lsn(0x2000));
    assert_eq!(page[8..], image[8..]);

    let page = redo.redo(ask(0, 9, None, inserts(9, 100))).await.unwrap();
    assert_eq!(heap_page(&page), (100, 0xABCD_0064));
    assert_eq!(page_lsn(&page), Lsn(0x1000 + 800));
    // the first half as a base, the second as records, gives the same
    let base = redo.redo(ask(0, 9, None, inserts(9, 50))).await.unwrap();
    let rest = inserts(9, 100).split_off(50);
    assert_eq!(redo.redo(ask(0, 9, Some(base), rest)).await.unwrap(), page);
    // records of another block, fork or relation leave zeros
    for (fork, block) in [(0, 8), (1, 9)] {
        let page = redo.redo(ask(fork, block, None, inserts(9, 3))).await.unwrap();
        assert_eq!(page, vec![0; PAGE_SIZE]);
    }
    assert_eq!(redo.counters().started.load(Ordering::Relaxed), 1);
    assert!(redo.counters().failures.load(Ordering::Relaxed) == 0);
}

async fn errors(redo: &ChildRedo) {
    let none = redo.redo(ask(0, 1, None, vec![])).await;
    assert!(matches!(none, Err(RedoError::NoRecords { .. })));
    let mut damaged = insert(1, 1, true, 1).to_vec();
    damaged[30] ^= 1;
    for bad in [damaged, record(2, 0x20, b"truncate")] {
        let answer = redo.redo(ask(0, 1, None, vec![(8, bad.into())])).await;
        assert!(matches!(answer, Err(RedoError::BadRecord { .. })), "{answer:?}");
    }
    // line pointer 5 of an empty page: PANIC in heap_xlog_insert; the requests around it work
    let base = Some(redo.redo(ask(0, 9, None, inserts(9, 1))).await.unwrap());
    let requests = [
        ask(0, 9, None, inserts(9, 2)),
        ask(0, 9, base, vec![(0x3000, insert(9, 5, false, 1))]),
        ask(0, 9, None, inserts(9, 3)),
    ];
    let answers = join_all(requests.map(|request| redo.redo(request))).await;
    assert_eq!(heap_page(answers[0].as_ref().unwrap()).0, 2);
    assert_eq!(heap_page(answers[2].as_ref().unwrap()).0, 3);
    let Err(RedoError::Refused { message, .. }) = &answers[1] else { panic!("{answers:?}") };
    assert!(message.contains("invalid max offset number"), "{message}");
    assert_eq!(redo.counters().failures.load(Ordering::Relaxed), 0);
}

async fn pipelined(redo: &ChildRedo) {
    let base = Bytes::from(vec![0x11; PAGE_SIZE]);
    let requests = (0..200u16).map(|n| {
        let base = (n % 2 == 0).then(|| base.clone());
        redo.redo(ask(0, u32::from(n), base, inserts(u32::from(n), n % 50 + 1)))
    });
    for (n, page) in join_all(requests).await.into_iter().enumerate() {
        assert_eq!(heap_page(&page.unwrap()).0, n % 50 + 1, "{n}");
    }
    // a request that is given up leaves the others alone
    let mut given_up = redo.redo(ask(0, 1, None, inserts(1, 1)));
    assert!(poll!(&mut given_up).is_pending());
    drop(given_up);
    assert!(redo.redo(ask(0, 1, None, inserts(1, 1))).await.is_ok());
}

async fn killed(redo: &ChildRedo) {
    let before = redo.counters().started.load(Ordering::Relaxed);
    let work: Vec<_> = (0..100).map(|n| redo.redo(ask(0, n, None, inserts(n, 60)))).collect();
    let mut work = join_all(work);
    assert!(poll!(&mut work).is_pending());
    let pids = children();
    assert_eq!(pids.len(), 1);
    nix::sys::signal::kill(Pid::from_raw(pids[0] as i32), nix::sys::signal::SIGKILL).unwrap();
    for page in work.await {
        assert_eq!(heap_page(&page.unwrap()).0, 60);
    }
    assert!(redo.redo(ask(0, 1, None, inserts(1, 1))).await.is_ok());
    assert_eq!(redo.counters().started.load(Ordering::Relaxed), before + 1);
}

/// The page LSN of the heap page moves only where hint bits are logged; the map's always.
async fn hint_bits(redo: &ChildRedo) {
    let with_hints = ChildRedo::new(settings(true));
    let mut records = inserts(9, 1);
    records.push((0x9000, visible(9)));
    for (redo, lsn) in [(redo, Lsn(0x1008)), (&with_hints, Lsn(0x9000))] {
        let page = redo.redo(ask(0, 9, None, records.clone())).await.unwrap();
        assert_eq!((page_lsn(&page), page[10]), (lsn, 4), "PD_ALL_VISIBLE is set");
        let map = redo.redo(ask(2, 0, None, vec![(0x9000, visible(9))])).await.unwrap();
        assert_eq!((page_lsn(&map), map[24 + 2]), (Lsn(0x9000), 0b100));
    }
    with_hints.shutdown().await;
}

/// Dropping the value ends the process without a shutdown.
fn dropped() {
    let redo = Rc::new(ChildRedo::new(settings(false)));
    block_on(redo.redo(ask(0, 9, None, inserts(9, 1)))).unwrap();
    assert_eq!(children().len(), 1);
    drop(redo);
    let deadline = Instant::now() + Duration::from_secs(60);
    while !children().is_empty() {
        assert!(Instant::now() < deadline, "the process lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Without a library, or with a wrong binary, the request fails with a clear error.
fn nothing_to_run() {
    for (bin, so) in [("/no/postgres", library()), ("/bin/true", Path::new("/no/so"))] {
        let mut settings = settings(false);
        settings.postgres_bin = bin.into();
        settings.walredo_so = so.to_owned();
        let redo = ChildRedo::new(settings);
        let answer = block_on(redo.redo(ask(0, 9, None, inserts(9, 1))));
        assert!(matches!(answer, Err(RedoError::Child { .. })), "{answer:?}");
        block_on(redo.shutdown());
    }
}
