//! Against a real PostgreSQL.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, OnceLock};

use bytes::Bytes;
use futures_lite::future::block_on;
use futures_util::FutureExt;
use futures_util::future::join_all;
use futures_util::poll;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;
use crate::redo::child::ChildRedo;
use crate::redo::child::tests::{ask, children, heap_page, insert, inserts, lock, settings};
use crate::redo::failed::Failed;
use crate::redo::histogram::HistogramCounts;
use crate::redo::{Redo, RedoRequest, RedoSettings, protocol};

mod fakes;

const PLAIN: RedoSettings = RedoSettings { hint_bits_logged: false };

fn pool_settings(processes_max: usize, spares: usize) -> PoolSettings {
    let child = settings(false);
    PoolSettings {
        postgres_bin: child.postgres_bin,
        walredo_so: child.walredo_so,
        scratch_dir: child.scratch_dir,
        cpu: None,
        timeout: Duration::from_secs(30),
        processes_max,
        spares,
        idle: Duration::from_secs(60),
        slice: Duration::from_millis(100),
        failed_dir: None,
        sandbox_optional: false,
    }
}

fn tenant(pool: &Pool, number: usize) -> ChildRedo {
    ChildRedo::in_pool(pool, format!("tenant-{number}"), PLAIN)
}

fn number(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::SeqCst)
}

fn until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The first insert into a page, with a value that tells the tenant.
fn first(value: u32) -> RedoRequest {
    ask(0, value, None, vec![(0x1008, insert(value, 1, true, value))])
}

/// 200 tenants, 4 processes: nobody is forgotten, nobody gets another's page, the bound holds.
#[test]
fn two_hundred_tenants_share_few_processes() {
    const TENANTS: u32 = 200;
    const PROCESSES: usize = 4;
    let _lock = lock();
    let pool = Pool::new(pool_settings(PROCESSES, 1));
    let tenants: Vec<_> = (0..TENANTS).map(|n| tenant(&pool, n as usize)).collect();
    let begin = Instant::now();
    let ended = Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let ended = ended.clone();
        move || {
            let mut most = 0;
            while !ended.load(Ordering::SeqCst) {
                most = most.max(children().len());
                std::thread::sleep(Duration::from_millis(20));
            }
            most
        }
    });
    let requests = tenants
        .iter()
        .zip(0..)
        .flat_map(|(redo, n)| (0..3).map(move |_| async move { (n, redo.redo(first(n)).await) }));
    let pages = block_on(join_all(requests));
    assert_eq!(pages.len() as u32, 3 * TENANTS);
    for (tenant, page) in pages {
        assert_eq!(heap_page(&page.unwrap()), (1, tenant));
    }
    ended.store(true, Ordering::SeqCst);
    let seen = watch.join().unwrap();
    let counters = pool.counters();
    let mut launches = HistogramCounts::default();
    counters.launch_micros.add_to(&mut launches);
    assert!(launches.counts.iter().sum::<u64>() <= number(&counters.started));
    println!(
        "{} processes for {TENANTS} tenants, {} at once, {:?}, {:?}",
        number(&counters.started),
        number(&counters.alive_max),
        begin.elapsed(),
        Duration::from_micros(launches.sum) / number(&counters.started) as u32,
    );
    assert!((1..=PROCESSES).contains(&seen), "{seen} processes");
    assert!(number(&counters.alive_max) <= PROCESSES as u64);
    assert_eq!(number(&counters.requests), u64::from(3 * TENANTS));
    // A process serves one tenant for its whole life.
    assert!(number(&counters.started) >= u64::from(TENANTS));
    assert_eq!(number(&counters.failures), 0);
    assert!(block_on(pool.shutdown()));
    assert!(!block_on(pool.shutdown()));
    assert_eq!((children(), number(&counters.alive)), (vec![], 0));
    let answers = block_on(join_all(tenants.iter().map(|redo| redo.redo(first(1)))));
    assert!(answers.iter().all(|answer| *answer == Err(RedoError::Shutdown)));
    assert_eq!(children(), Vec::<u32>::new());
}

/// A process without work ends; the spare is there for the next, and is bound to nobody before.
#[test]
fn idle_processes_end_and_spares_wait() {
    let _lock = lock();
    let pool = Pool::new(PoolSettings { idle: Duration::from_secs(3), ..pool_settings(3, 1) });
    let (one, two) = (tenant(&pool, 1), tenant(&pool, 2));
    assert_eq!(children(), Vec::<u32>::new(), "nobody has asked yet");
    block_on(one.redo(first(1))).unwrap();
    until("the process of the first ends", || one.status().is_none());
    until("there is a spare, and nothing else", || {
        number(&pool.counters().alive) == 1 && pool.shared.spares.take.len() == 1
    });
    let spare = children();
    block_on(two.redo(first(2))).unwrap();
    let status = two.status().unwrap();
    assert_eq!((spare, status.requests), (vec![status.pid], 1));
    assert_eq!(status.tenant, "tenant-2");
    assert!(status.last_redo_ms_ago.is_some_and(|ago| ago <= status.age_ms));
    // A tenant that leaves takes its process with it, and leaves the pool alone.
    assert!(block_on(two.shutdown()));
    assert!(!block_on(two.shutdown()));
    assert!(!Path::new(&format!("/proc/{}", status.pid)).exists());
    assert_eq!(block_on(two.redo(first(2))), Err(RedoError::Shutdown));
    block_on(one.redo(first(1))).unwrap();
    assert!(block_on(pool.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}

/// From the first answer on a spare is ready for the next tenant, while others keep theirs, as far
/// as the bound allows.
#[test]
fn every_tenant_after_the_first_finds_a_spare() {
    let _lock = lock();
    let pool = Pool::new(pool_settings(3, 1));
    let tenants: Vec<_> = (1..=3).map(|n| tenant(&pool, n)).collect();
    block_on(tenants[0].redo(first(1))).unwrap();
    let mut bound = vec![tenants[0].status().unwrap().pid];
    for n in [2, 3] {
        until("there is a spare, and a worker that is free", || {
            pool.shared.spares.take.len() == 1 && pool.shared.free.load(Ordering::SeqCst) == 1
        });
        assert_eq!(number(&pool.counters().alive), u64::from(n));
        let spare: Vec<_> = children().into_iter().filter(|pid| !bound.contains(pid)).collect();
        let redo = &tenants[n as usize - 1];
        assert_eq!(heap_page(&block_on(redo.redo(first(n))).unwrap()), (1, n));
        bound.push(redo.status().unwrap().pid);
        assert_eq!(spare, bound[n as usize - 1..]);
    }
    // No room for another, until somebody leaves.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!((pool.shared.spares.take.len(), number(&pool.counters().started)), (0, 3));
    assert!(block_on(tenants[0].shutdown()));
    until("there is a spare again", || pool.shared.spares.take.len() == 1);
    assert_eq!(number(&pool.counters().alive_max), 3);
    assert!(block_on(pool.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}

/// A process that hangs is ended, its request is answered by a fresh one; the input is kept. A
/// request that PostgreSQL refuses is kept as well, and can be taken apart again.
#[test]
fn hung_processes_are_replaced_and_inputs_kept() {
    let _lock = lock();
    let failed = std::env::temp_dir().join(format!("pgstrata-pool-{}", std::process::id()));
    let timeout = Duration::from_secs(4);
    let failed_dir = Some(failed.clone());
    let pool = Pool::new(PoolSettings { timeout, failed_dir, ..pool_settings(2, 0) });
    let redo = tenant(&pool, 1);
    let page = block_on(redo.redo(first(1))).unwrap();
    let hung = redo.status().unwrap().pid;
    kill(Pid::from_raw(hung as i32), Signal::SIGSTOP).unwrap();
    let request = ask(0, 9, None, inserts(9, 3));
    assert_eq!(heap_page(&block_on(redo.redo(request.clone())).unwrap()).0, 3);
    assert_ne!(redo.status().unwrap().pid, hung);
    assert!(!Path::new(&format!("/proc/{hung}")).exists());
    assert_eq!(number(&pool.counters().failures), 1);
    let kept = |problem: &str| -> RedoRequest {
        let files = std::fs::read_dir(&failed).unwrap().map(|file| file.unwrap().path());
        let inputs =
            files.map(|file| Failed::decode(&std::fs::read(file).unwrap().into()).unwrap());
        let mut inputs = inputs.filter(|input| input.problem.contains(problem));
        let input = inputs.next().expect(problem);
        assert_eq!((input.tenant.as_str(), input.redo), ("tenant-1", PLAIN));
        protocol::decode_request(&input.frames).unwrap()
    };
    let again = kept("no answer within");
    assert_eq!((again.block, again.records), (9, request.records));
    // Line pointer 5 of a page with one.
    let refused = ask(0, 1, Some(page.clone()), vec![(0x3000, insert(1, 5, false, 1))]);
    let answer = block_on(redo.redo(refused));
    assert!(matches!(answer, Err(RedoError::Refused { .. })), "{answer:?}");
    assert_eq!(kept("invalid max offset").base, Some(page));
    // One that hangs does not hold up the end.
    block_on(redo.redo(first(1))).unwrap();
    let pid = Pid::from_raw(redo.status().unwrap().pid as i32);
    kill(pid, Signal::SIGSTOP).unwrap();
    block_on(async {
        let mut waiting = redo.redo(first(1));
        assert!(poll!(&mut waiting).is_pending());
        assert!(pool.shutdown().await);
        assert_eq!(waiting.await, Err(RedoError::Shutdown));
    });
    assert_eq!(children(), Vec::<u32>::new());
    std::fs::remove_dir_all(&failed).unwrap();
}

/// Text that the program has logged.
fn logged() -> &'static Mutex<Vec<u8>> {
    static TEXT: OnceLock<Mutex<Vec<u8>>> = OnceLock::new();
    TEXT.get_or_init(Mutex::default)
}

struct ToText;

impl Write for ToText {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        logged().lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the program logs meanwhile, in all of its threads.
fn logged_by(run: impl FnOnce()) -> String {
    let level = tracing::Level::WARN;
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(|| ToText)
        .try_init();
    let before = logged().lock().unwrap().len();
    run();
    String::from_utf8(logged().lock().unwrap()[before..].to_vec()).unwrap()
}

/// What a process says on stderr is logged with the tenant and the page; one that is not in a
/// sandbox is not used.
#[test]
fn complaints_are_logged_and_a_process_without_a_sandbox_is_refused() {
    let _lock = lock();
    let dir = std::env::temp_dir().join(format!("pgstrata-fake-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let fake = dir.join("postgres");
    let pong = "walredo 2 postgres 150000 sandbox none hint-bits off";
    let script = format!(
        "#!/bin/sh\necho 'something is amiss' >&2\nprintf '\\000\\000\\000\\0{:o}\\002{pong}'\ncat >&2\n",
        pong.len()
    );
    std::fs::write(&fake, script).unwrap();
    std::fs::set_permissions(&fake, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut settings = pool_settings(1, 0);
    (settings.postgres_bin, settings.walredo_so) = (fake, "".into());
    let pool = Pool::new(settings);
    let text = logged_by(|| {
        let answer = block_on(tenant(&pool, 77).redo(first(1)));
        let Err(RedoError::Child { problem }) = answer else { panic!("{answer:?}") };
        assert!(problem.contains("not in a sandbox"), "{problem}");
    });
    let line = text.lines().find(|line| line.contains("something is amiss")).expect(&text);
    assert!(line.contains("tenant-77") && line.contains("block=1"), "{line}");
    assert!(block_on(pool.shutdown()));
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A seat in the middle of a row of others that never stop asking has its turn.
#[test]
fn a_busy_tenant_does_not_starve_others() {
    let _lock = lock();
    let pool = Pool::new(pool_settings(1, 0));
    let (busy, quiet) = (tenant(&pool, 1), tenant(&pool, 2));
    let ended = std::cell::Cell::new(false);
    block_on(async {
        let asking = async {
            let mut answered = 0;
            while !ended.get() {
                let pages = join_all((0..8).map(|_| busy.redo(first(1)))).await;
                answered +=
                    pages.into_iter().map(|page| heap_page(&page.unwrap()).0).sum::<usize>();
            }
            answered
        };
        let other = async {
            busy.redo(first(1)).await.unwrap();
            let page: Bytes = quiet.redo(first(2)).await.unwrap();
            ended.set(true);
            heap_page(&page)
        };
        let (answered, page) = futures_util::future::join(asking, other).await;
        assert!(answered >= 8 && page == (1, 2), "{answered}");
    });
    assert!(block_on(pool.shutdown()));
}

/// Callers go away while their requests wait for a start, for a process, or for an answer; others
/// are served, and the processes sit where the pool's core is.
#[test]
fn requests_that_are_given_up_leave_the_pool_sound() {
    let _lock = lock();
    let pool = Pool::new(PoolSettings { cpu: Some(0), ..pool_settings(2, 1) });
    let tenants: Vec<_> = (0..12).map(|n| tenant(&pool, n)).collect();
    block_on(async {
        for round in 0..3u32 {
            let mut given_up = Vec::new();
            let mut kept = Vec::new();
            for (redo, n) in tenants.iter().zip(0..) {
                given_up.push(redo.redo(first(100 + n)));
                kept.push(redo.redo(first(n)));
                given_up.push(redo.redo(first(200 + n)));
            }
            // They are sent; hardly ever is one answered that soon.
            for request in &mut given_up {
                let _ = poll!(request);
            }
            let mut pings: Vec<_> = tenants.iter().map(|redo| Box::pin(redo.ping())).collect();
            pings.iter_mut().for_each(|ping| drop(ping.as_mut().now_or_never()));
            if round == 1 {
                // Now some of them have been sent.
                kept.push(tenants[0].redo(first(0)));
                assert!(tenants[1].redo(first(7)).await.is_ok());
            }
            drop((given_up, pings));
            for (page, n) in join_all(kept).await.into_iter().zip((0..12).chain([0])) {
                assert_eq!(heap_page(&page.unwrap()), (1, n));
            }
        }
        let status = tenants.iter().find_map(ChildRedo::status).unwrap();
        let path = format!("/proc/{}/status", status.pid);
        let text = std::fs::read_to_string(path).unwrap();
        assert!(text.contains("\nCpus_allowed_list:\t0\n"), "{text}");
    });
    let counters = pool.counters();
    assert_eq!((number(&counters.failures), number(&counters.errors)), (0, 0));
    assert!(number(&counters.alive_max) <= 2);
    assert!(block_on(pool.shutdown()));
    assert!(!block_on(pool.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}

/// Who waits for the end may go away: it comes, and others may wait for it.
#[test]
fn an_end_that_nobody_waits_for_comes_all_the_same() {
    let _lock = lock();
    let pool = Pool::new(pool_settings(3, 1));
    let redo = tenant(&pool, 1);
    block_on(redo.redo(first(1))).unwrap();
    block_on(async {
        let mut end = Box::pin(pool.shutdown());
        let _ = poll!(&mut end);
    });
    let later = std::thread::spawn({
        let pool = pool.clone();
        move || (block_on(pool.shutdown()), block_on(pool.shutdown()))
    });
    until("the later calls end", || later.is_finished());
    assert_eq!(later.join().unwrap(), (false, false));
    assert_eq!((children(), number(&pool.counters().alive)), (vec![], 0));
    assert_eq!(block_on(redo.redo(first(1))), Err(RedoError::Shutdown));
}

/// Where the system gives no more threads, those that are there do all the work; without any, the
/// request fails, and the next one is tried anew.
#[test]
fn requests_wait_for_living_workers_where_threads_are_short() {
    let _lock = lock();
    let pool = Pool::new(pool_settings(2, 0));
    let (one, two) = (tenant(&pool, 1), tenant(&pool, 2));
    let no_threads = |short| pool.shared.no_threads.store(short, Ordering::SeqCst);
    no_threads(true);
    for _ in 0..2 {
        let answer = block_on(one.redo(first(1)));
        let Err(RedoError::Child { problem }) = answer else { panic!("{answer:?}") };
        assert!(problem.contains("no thread"), "{problem}");
    }
    no_threads(false);
    assert_eq!(heap_page(&block_on(one.redo(first(1))).unwrap()), (1, 1));
    no_threads(true);
    for n in [2, 1, 2] {
        let redo = if n == 1 { &one } else { &two };
        assert_eq!(heap_page(&block_on(redo.redo(first(n))).unwrap()), (1, n));
    }
    assert_eq!(pool.shared.workers.load(Ordering::SeqCst), 1);
    assert!(block_on(pool.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}
