//! Against a real PostgreSQL, and against a script that behaves badly.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use futures_lite::future::block_on;
use futures_util::future::join_all;
use futures_util::poll;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;
use crate::redo::captured::captured;
use crate::redo::child::tests::{ask, children, heap_page, insert, inserts, lock, settings};
use crate::redo::child::{ChildRedo, ChildSettings};
use crate::redo::{Redo, RedoError, RedoRequest, protocol};

/// The first insert into a page.
fn first(block: u32) -> RedoRequest {
    ask(0, block, None, vec![(0x1008, insert(block, 1, true, block))])
}

fn inline(redo: &ChildRedo) -> u64 {
    redo.counters().inline.load(Ordering::SeqCst)
}

fn failures(redo: &ChildRedo) -> u64 {
    redo.counters().failures.load(Ordering::SeqCst)
}

fn pid(redo: &ChildRedo) -> Pid {
    Pid::from_raw(redo.status().unwrap().pid as i32)
}

/// Waits until the worker has nothing to do.
fn until_lent(redo: &ChildRedo) {
    let begin = Instant::now();
    while !redo.seat.lends() {
        assert!(begin.elapsed() < Duration::from_secs(60), "the process is not lent");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A process that is up, and lent.
fn started(settings: ChildSettings) -> ChildRedo {
    let redo = ChildRedo::new(settings);
    block_on(redo.redo(first(1))).unwrap();
    until_lent(&redo);
    redo
}

/// Polls so often that the request is with the process, which does not answer.
async fn send<F: Future + Unpin>(redo: &ChildRedo, request: &mut F) {
    assert!(poll!(&mut *request).is_pending());
    assert!(poll!(&mut *request).is_pending());
    assert!(redo.near.jobs.borrow().is_empty());
}

#[test]
fn short_requests_need_no_thread_and_others_have_one() {
    let _lock = lock();
    let redo = started(settings(false));
    let pid = pid(&redo);
    // A machine that is busy may be slow at times.
    for n in 0..200 {
        let page = block_on(redo.redo(first(n))).unwrap();
        assert_eq!(heap_page(&page), (1, n));
    }
    block_on(redo.ping()).unwrap();
    until_lent(&redo);
    let alone = inline(&redo);
    assert!((1..=201).contains(&alone), "{alone} of 201");
    let requests = (0..300u16).map(|n| {
        let records = if n % 7 == 0 { 100 } else { n % 9 + 1 };
        redo.redo(ask(0, u32::from(n), None, inserts(u32::from(n), records)))
    });
    for (n, page) in block_on(join_all(requests)).into_iter().enumerate() {
        let records = if n % 7 == 0 { 100 } else { n % 9 + 1 };
        assert_eq!(heap_page(&page.unwrap()).0, records, "{n}");
    }
    let counters = redo.counters();
    assert_eq!(counters.requests.load(Ordering::SeqCst), 502);
    assert_eq!((failures(&redo), counters.errors.load(Ordering::SeqCst)), (0, 0));
    assert_eq!(self::pid(&redo), pid);
    assert!(block_on(redo.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}

#[test]
fn many_go_in_one_write_and_what_is_too_much_does_not() {
    let near = Near::default();
    let job = |records: u64, bytes: usize| {
        let (answer, reply) = futures_channel::oneshot::channel();
        let rel = crate::base::RelNode { spc: 1, db: 2, rel: 3 }.fork(0);
        let frames = vec![bytes as u8; bytes].into();
        (Job { frames, records, rel, block: 0, answer, failures: 0 }, reply)
    };
    let mut replies = Vec::new();
    let mut put = |records, bytes| {
        let (job, reply) = job(records, bytes);
        near.jobs.borrow_mut().push_back(job);
        replies.push(reply);
    };
    (0..10).for_each(|_| put(2, 100));
    put(20, 100);
    put(20, 100);
    put(1, REDO_INLINE_BYTES - 50);
    put(1, 100);
    // Its caller has gone.
    drop(replies.remove(3));
    let sizes: Vec<_> = std::iter::from_fn(|| near.batch())
        .map(|sent| (sent.jobs.len(), sent.frames.len()))
        .collect();
    let long = REDO_INLINE_BYTES - 50;
    let expected = [(4, 400), (4, 400), (2, 200), (1, 100), (1, long), (1, 100)];
    assert_eq!(sizes, expected);
}

#[test]
fn so_many_and_no_more_are_on_the_short_way() {
    let _lock = lock();
    let redo = started(settings(false));
    let bound = REDO_QUEUE_REQUESTS;
    block_on(async {
        let mut requests: Vec<_> = (0..bound as u32).map(|n| redo.redo(first(n))).collect();
        for (request, n) in requests.iter_mut().zip(1..) {
            assert!(poll!(request).is_pending());
            assert_eq!(redo.near.jobs.borrow().len(), n);
        }
        // One more is on the long way, and may be answered already.
        let mut far = redo.redo(first(7));
        let answer = poll!(&mut far);
        assert_eq!(redo.near.jobs.borrow().len(), bound);
        let page = if let Poll::Ready(page) = answer { page } else { far.await };
        assert_eq!(heap_page(&page.unwrap()), (1, 7));
        for (page, n) in join_all(requests).await.into_iter().zip(0..) {
            assert_eq!(heap_page(&page.unwrap()), (1, n));
        }
    });
    assert!(redo.near.jobs.borrow().is_empty());
    assert_eq!(redo.counters().requests.load(Ordering::SeqCst), bound as u64 + 2);
    assert!(block_on(redo.shutdown()));
}

#[test]
fn a_process_that_hangs_or_dies_is_left_to_the_worker() {
    let _lock = lock();
    let redo = started(ChildSettings { timeout: Duration::from_secs(5), ..settings(false) });
    let hung = pid(&redo);
    kill(hung, Signal::SIGSTOP).unwrap();
    block_on(async {
        let mut waiting = redo.redo(first(5));
        let begin = Instant::now();
        send(&redo, &mut waiting).await;
        assert!(begin.elapsed() < Duration::from_secs(3), "it blocks its thread");
        let (one, two) = futures_util::join!(waiting, redo.redo(first(6)));
        assert_eq!((heap_page(&one.unwrap()), heap_page(&two.unwrap())), ((1, 5), (1, 6)));
    });
    assert!(!Path::new(&format!("/proc/{hung}")).exists());
    assert_eq!(failures(&redo), 1);
    for n in 2..5 {
        until_lent(&redo);
        kill(pid(&redo), Signal::SIGKILL).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let pages = block_on(join_all([7, 8].map(|block| redo.redo(first(block)))));
        let pages: Vec<_> = pages.into_iter().map(|page| heap_page(&page.unwrap())).collect();
        assert_eq!(pages, [(1, 7), (1, 8)]);
        assert_eq!(failures(&redo), n);
    }
    // Line pointer 5 of an empty page, and others around it in the same write.
    until_lent(&redo);
    let base = Some(block_on(redo.redo(first(9))).unwrap());
    until_lent(&redo);
    let refused = ask(0, 9, base, vec![(0x3000, insert(9, 5, false, 1))]);
    let answers = block_on(join_all([first(2), refused, first(3)].map(|r| redo.redo(r))));
    assert_eq!(heap_page(answers[0].as_ref().unwrap()), (1, 2));
    assert!(matches!(&answers[1], Err(RedoError::Refused { .. })), "{answers:?}");
    assert_eq!(heap_page(answers[2].as_ref().unwrap()), (1, 3));
    assert_eq!(failures(&redo), 4);
    assert!(block_on(redo.shutdown()));
    assert_eq!(children(), Vec::<u32>::new());
}

#[test]
fn callers_may_go_away_at_any_time() {
    let _lock = lock();
    let redo = started(settings(false));
    let pid = pid(&redo);
    block_on(async {
        for round in 0..20 {
            let mut requests: Vec<_> = (0..12).map(|n| redo.redo(first(n))).collect();
            for request in &mut requests {
                let _ = poll!(request);
            }
            // Those that are left see to themselves.
            let kept = requests.split_off(round % 12);
            drop(requests);
            for (page, n) in join_all(kept).await.into_iter().zip(round as u32 % 12..) {
                assert_eq!(heap_page(&page.unwrap()), (1, n));
            }
        }
        until_lent(&redo);
        // Now with the request at the process.
        kill(pid, Signal::SIGSTOP).unwrap();
        let mut waiting = redo.redo(first(5));
        send(&redo, &mut waiting).await;
        drop(waiting);
        let mut next = redo.redo(first(6));
        assert!(poll!(&mut next).is_pending());
        kill(pid, Signal::SIGCONT).unwrap();
        assert_eq!(heap_page(&next.await.unwrap()), (1, 6));
    });
    // None of those that were given up is kept for ever.
    until_lent(&redo);
    for _ in 0..3 * REDO_QUEUE_REQUESTS {
        block_on(async { drop(poll!(&mut redo.redo(first(1)))) });
    }
    assert!(redo.near.jobs.borrow().len() <= REDO_QUEUE_REQUESTS);
    assert_eq!(heap_page(&block_on(redo.redo(first(4))).unwrap()), (1, 4));
    assert_eq!((self::pid(&redo), failures(&redo)), (pid, 0));
    assert!(block_on(redo.shutdown()));
}

#[test]
fn the_end_comes_with_requests_under_way() {
    let _lock = lock();
    for is_sent in [true, false] {
        let redo = started(settings(false));
        kill(pid(&redo), Signal::SIGSTOP).unwrap();
        block_on(async {
            let mut near: Vec<_> = (0..3).map(|n| redo.redo(first(n))).collect();
            for request in &mut near {
                assert!(poll!(request).is_pending());
            }
            if is_sent {
                send_first(&redo, &mut near[0]).await;
            }
            assert!(redo.shutdown().await);
            assert!(!redo.shutdown().await);
            let answers = join_all(near).await;
            assert!(answers.iter().all(|a| *a == Err(RedoError::Shutdown)), "{answers:?}");
            assert_eq!(redo.redo(first(1)).await, Err(RedoError::Shutdown));
        });
        assert_eq!(children(), Vec::<u32>::new());
        assert_eq!(redo.counters().alive.load(Ordering::SeqCst), 0);
    }
}

/// After the first poll: it takes the others along.
async fn send_first<F: Future + Unpin>(redo: &ChildRedo, request: &mut F) {
    assert!(poll!(&mut *request).is_pending());
    assert!(redo.near.jobs.borrow().is_empty());
}

/// A directory of scripts that stand for `postgres`.
struct Fakes(PathBuf);

impl Drop for Fakes {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Answers with a page of zeros.
const ZEROS: &str = "printf '\\000\\000\\040\\000\\000'; head -c 8192 /dev/zero";

/// Reads a request like [`first`].
fn take_first() -> String {
    let mut frames = Vec::new();
    protocol::encode_request(&first(1), &mut frames).unwrap();
    format!("head -c {} >/dev/null", frames.len())
}

impl Fakes {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("pgstrata-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
        Fakes(dir)
    }

    /// It starts as ours does, answers one request, and a while later does `then`.
    fn that_does(&self, name: &str, then: &str) -> ChildSettings {
        let pong = "walredo 2 postgres 150000 sandbox seccomp hint-bits off";
        let script = format!(
            "#!/bin/sh\npong() {{ head -c $1 >/dev/null; printf '\\000\\000\\000\\0{:o}\\002{pong}'; }}\n\
             pong 5\npong 6\n{}\n{ZEROS}\nsleep 0.2\n{then}\ncat >/dev/null\n",
            pong.len(),
            take_first(),
        );
        let fake = self.0.join(name);
        std::fs::write(&fake, script).unwrap();
        std::fs::set_permissions(&fake, PermissionsExt::from_mode(0o755)).unwrap();
        let mut settings = settings(false);
        (settings.postgres_bin, settings.walredo_so) = (fake, "".into());
        settings
    }
}

/// What comes of itself is no answer: the process is replaced, and the request tried again.
#[test]
fn nonsense_is_found_out() {
    let _lock = lock();
    let fakes = Fakes::new("nonsense");
    let nonsense = [
        // A status that there is none of, text instead of a page, and two pages for one request.
        "printf '\\000\\000\\000\\002\\007no'".to_owned(),
        "printf '\\000\\000\\000\\002\\002up'".to_owned(),
        format!("{ZEROS}; {ZEROS}"),
    ];
    for (n, nonsense) in nonsense.iter().enumerate() {
        let redo = started(fakes.that_does(&n.to_string(), nonsense));
        let pid = pid(&redo);
        std::thread::sleep(Duration::from_secs(2));
        if n == 2 {
            // The first of the pages is taken for the answer; the other is one too many.
            assert_eq!(block_on(redo.redo(first(1))).unwrap(), vec![0; 8192]);
            until_lent(&redo);
        }
        assert_eq!(block_on(redo.redo(first(1))).unwrap(), vec![0; 8192]);
        assert_ne!(self::pid(&redo), pid, "{n}");
        assert_eq!(failures(&redo), 1, "{n}");
        assert!(block_on(redo.shutdown()));
    }
    assert_eq!(children(), Vec::<u32>::new());
}

/// What a process says is told with the page that it was asked for, on the short way too.
#[test]
fn complaints_are_those_of_the_page_that_was_asked_for() {
    let _lock = lock();
    let fakes = Fakes::new("complaints");
    let complains = format!("echo ouch >&2\n{}\n{ZEROS}", take_first());
    let redo = started(fakes.that_does("complains", &complains));
    std::thread::sleep(Duration::from_secs(2));
    let mut page = None;
    // On the thread of the caller, thus on the short way.
    let text = captured(|| page = Some(block_on(redo.redo(first(9)))));
    assert_eq!(page, Some(Ok(vec![0; 8192].into())));
    let told = text.lines().find(|line| line.contains("wal-redo: ouch"));
    assert!(told.is_some_and(|line| line.contains("block=9")), "{text}");
    assert!(block_on(redo.shutdown()));
}
