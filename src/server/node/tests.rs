use std::io::{Read, Write};
use std::net::TcpStream;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use futures_util::{AsyncRead, AsyncWrite};
use postgres_protocol::message::frontend;

use super::*;
use crate::base::{Lsn, RelNode, TenantId, TenantShardId};
use crate::limits::CONNECTION_WRITE_MS_MAX;
use crate::server::page_protocol::*;
use crate::server::page_service::{Session, serve};
use crate::server::router;
use crate::server::socket::Stream;
use crate::shard::reader::RequestLsn;

mod fake;

use fake::{Fake, WAITING, WAKING};

fn tenant_of(core: usize) -> TenantShardId {
    let shards = (0..).map(|n| TenantShardId::unsharded(TenantId([n; 16])));
    shards.into_iter().find(|shard| router::owner(shard, 2) == core).unwrap()
}

struct Client(TcpStream);

impl Client {
    fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut client = Client(stream);
        client.send(|out| frontend::startup_message([("user", "u")], out).unwrap());
        assert_eq!(client.until(b'Z').last().unwrap().0, b'Z');
        client
    }
    fn send(&mut self, put: impl FnOnce(&mut BytesMut)) {
        let mut out = BytesMut::new();
        put(&mut out);
        self.0.write_all(&out).unwrap();
    }
    fn message(&mut self) -> (u8, Vec<u8>) {
        let mut head = [0; 5];
        self.0.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4;
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        (head[0], body)
    }
    fn until(&mut self, tag: u8) -> Vec<(u8, Vec<u8>)> {
        let mut all = Vec::new();
        while all.last().is_none_or(|(last, _): &(u8, _)| *last != tag) {
            all.push(self.message());
        }
        all
    }
    fn open(&mut self, version: u8, tenant: TenantShardId) {
        let text = format!("pagestream_v{version} {tenant} {}", "ab".repeat(16));
        self.send(|out| frontend::query(&text, out).unwrap());
        assert_eq!(self.message().0, b'W');
    }
}

fn get_page(id: u64, block: u32) -> Request {
    let lsn = RequestLsn { request: Lsn::MAX, not_modified_since: Lsn(8) };
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(0);
    Request { header: Header { id, lsn }, query: Query::GetPage { rel, block } }
}

fn ask(client: &mut Client, version: Version, requests: &[Request]) {
    client.send(|out| {
        for request in requests {
            crate::server::pq::put_message(out, b'd', |out| encode_request(version, request, out));
        }
    });
}

fn check_answers(client: &mut Client, version: Version, core: usize, requests: &[Request]) {
    for request in requests {
        let (tag, body) = client.message();
        assert_eq!(tag, b'd');
        let answer = decode_response(version, &body.into()).unwrap().answer_to(request).unwrap();
        match (answer, request.query) {
            (Answer::Error(text), Query::GetPage { block: 13, .. }) => {
                assert!(text.contains("thirteen"));
            }
            (Answer::GetPage(page), Query::GetPage { block, .. }) => {
                assert_eq!(page[..4], block.to_be_bytes());
                assert_eq!(page[100], core as u8, "served by another core");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Sends all at once and checks all answers.
fn pipeline(client: &mut Client, version: Version, core: usize) {
    let requests: Vec<Request> = (0..100).map(|n| get_page(u64::from(n), n)).collect();
    ask(client, version, &requests);
    check_answers(client, version, core, &requests);
}

/// A request is begun while one before it waits, and answered behind it; and all of them although
/// the client sends no more, or takes its leave.
fn overtaking(address: SocketAddr, core: usize) {
    let mut client = Client::connect(address);
    client.open(3, tenant_of(core));
    let numbered = |(id, block): (u64, &u32)| get_page(id, *block);
    let requests: Vec<Request> = (0..).zip(&[WAITING, WAKING, 13, 2, 4, 3]).map(numbered).collect();
    ask(&mut client, Version::V3, &requests[..1]);
    std::thread::sleep(Duration::from_millis(50));
    ask(&mut client, Version::V3, &requests[1..]);
    client.0.shutdown(std::net::Shutdown::Write).unwrap();
    check_answers(&mut client, Version::V3, core, &requests);
    assert_eq!(client.0.read(&mut [0]).unwrap(), 0);
    let mut client = Client::connect(address);
    client.open(3, tenant_of(core));
    let refused = get_page(1, 13);
    client.send(|out| {
        crate::server::pq::put_message(out, b'd', |o| encode_request(Version::V3, &refused, o));
        frontend::terminate(out);
    });
    check_answers(&mut client, Version::V3, core, &[refused]);
    assert_eq!(client.0.read(&mut [0]).unwrap(), 0);
}

fn talk(address: SocketAddr) {
    for core in [0, 1] {
        let mut client = Client::connect(address);
        client.open(3, tenant_of(core));
        pipeline(&mut client, Version::V3, core);
        // The stream ends with an error, and another tenant can be asked for.
        client.send(frontend::copy_done);
        assert_eq!(client.until(b'Z')[0].0, b'E');
        client.open(2, tenant_of(1 - core));
        pipeline(&mut client, Version::V2, 1 - core);
        // A bad tag is answered, and the stream goes on.
        client.send(|out| crate::server::pq::put_message(out, b'd', |o| o.extend([9; 17])));
        assert_eq!(client.message().1[0], 103);
        pipeline(&mut client, Version::V2, 1 - core);
        overtaking(address, core);
        let mut lost = Client::connect(address);
        let query = format!("pagestream_v3 {} {}", "ff".repeat(16), "ab".repeat(16));
        lost.send(|out| frontend::query(&query, out).unwrap());
        let replies = lost.until(b'Z');
        assert!(String::from_utf8_lossy(&replies[0].1).contains("is not on this node"));
    }
    leases(address);
    backups(address);
    hostile(address);
    let mut client = Client::connect(address);
    client.open(3, tenant_of(0));
    pipeline(&mut client, Version::V3, 0);
}

/// Leases are given on either core, by simple and extended query, and page streams opened after.
/// The archive of a COPY from the server.
fn copied(all: &[(u8, Vec<u8>)]) -> Vec<u8> {
    all.iter().filter(|(tag, _)| *tag == b'd').flat_map(|(_, body)| body.clone()).collect()
}

fn backups(address: SocketAddr) {
    let archive: Vec<u8> = (0..40u8).flat_map(|n| [n; 10_000]).collect();
    let text = |body: &[u8]| String::from_utf8_lossy(body).into_owned();
    let tags = |all: &[(u8, Vec<u8>)]| {
        let mut tags = all.iter().map(|(tag, _)| char::from(*tag)).collect::<Vec<_>>();
        tags.dedup();
        tags.into_iter().collect::<String>()
    };
    for core in [0, 1] {
        let mut client = Client::connect(address);
        let timeline = "ab".repeat(16);
        let backup =
            |command: &str, rest: &str| format!("{command} {} {timeline} {rest}", tenant_of(core));
        client.send(|out| frontend::query(&backup("fullbackup", ""), out).unwrap());
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "HdcCZ");
        assert_eq!(all[0].1, [0, 0, 0], "binary bytes in no columns, as pg_basebackup gets them");
        assert!(copied(&all) == archive);
        assert!(all.iter().all(|(_, body)| body.len() <= 64 * 1024));
        // What cannot be served is answered by an error alone.
        client.send(|out| frontend::query(&backup("basebackup", "0/1"), out).unwrap());
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "EZ");
        let error = text(&all[0].1);
        assert!(error.contains("22023") && error.contains("history of this timeline"), "{error}");
        // What fails later ends COPY without its end.
        client.send(|out| frontend::query(&backup("basebackup", "0/2"), out).unwrap());
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "HdEZ");
        assert!(copied(&all).len() < archive.len());
        // The very messages of a driver's copy_out, as pagebench sends them.
        client.send(|out| {
            frontend::parse("s0", &backup("basebackup", "0/3 --gzip"), [], out).unwrap();
            frontend::describe(b'S', "s0", out).unwrap();
            frontend::sync(out);
        });
        assert_eq!(tags(&client.until(b'Z')), "1tnZ");
        let execute = |out: &mut BytesMut| {
            let none = || std::iter::empty::<i16>();
            let put = |(), _: &mut BytesMut| unreachable!();
            frontend::bind("", "s0", none(), std::iter::empty::<()>(), put, none(), out)
                .unwrap_or_else(|_| panic!("bind"));
            frontend::execute("", 0, out).unwrap();
            frontend::sync(out);
        };
        client.send(execute);
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "2HdcCZ");
        let packed = copied(&all);
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut plain).unwrap();
        assert!(plain == archive && packed.len() < archive.len() / 10);
        // After an error, everything up to the sync is passed over, and the connection goes on.
        client.send(|out| {
            frontend::parse("s0", &backup("basebackup", "0/2"), [], out).unwrap();
            execute(out);
        });
        assert_eq!(tags(&client.until(b'Z')), "12HdEZ");
        client.send(|out| frontend::query(&backup("fullbackup", "0/9 0/8"), out).unwrap());
        assert!(copied(&client.until(b'Z')) == archive);
    }
}

fn leases(address: SocketAddr) {
    let text = |body: &[u8]| String::from_utf8_lossy(body).into_owned();
    let tags =
        |all: &[(u8, Vec<u8>)]| all.iter().map(|(tag, _)| char::from(*tag)).collect::<String>();
    for core in [0, 1] {
        let mut client = Client::connect(address);
        let lease = |lsn: &str| format!("lease lsn {} {} {lsn}", tenant_of(core), "ab".repeat(16));
        client.send(|out| frontend::query(&lease("0/3"), out).unwrap());
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "TDCZ");
        assert!(text(&all[0].1).contains("valid_until"));
        assert_eq!(&all[1].1, b"\0\x01\0\0\0\x071234567");
        // Refused for good, and for now.
        client.send(|out| frontend::query(&lease("0/1"), out).unwrap());
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "NTDCZ");
        assert!(text(&all[0].1).contains("history of this timeline begins at"));
        assert_eq!(&all[2].1, b"\0\x01\xff\xff\xff\xff");
        client.send(|out| frontend::query(&lease("0/2"), out).unwrap());
        let all = client.until(b'Z');
        assert_eq!(tags(&all), "EZ");
        assert!(text(&all[0].1).contains("57P03"), "{}", text(&all[0].1));
        client.send(|out| {
            frontend::parse("s", &lease("0/3"), [], out).unwrap();
            frontend::describe(b'S', "s", out).unwrap();
            let none = || std::iter::empty::<i16>();
            let put = |(), _: &mut BytesMut| unreachable!();
            frontend::bind("p", "s", none(), std::iter::empty::<()>(), put, none(), out)
                .unwrap_or_else(|_| panic!("bind"));
            frontend::describe(b'P', "p", out).unwrap();
            frontend::execute("p", 0, out).unwrap();
            frontend::sync(out);
        });
        assert_eq!(tags(&client.until(b'Z')), "1tT2TDCZ");
        // After an error, everything up to the sync is passed over.
        client.send(|out| {
            frontend::parse("", &lease("0/2"), [], out).unwrap();
            let none = || std::iter::empty::<i16>();
            let put = |(), _: &mut BytesMut| unreachable!();
            frontend::bind("", "", none(), std::iter::empty::<()>(), put, none(), out)
                .unwrap_or_else(|_| panic!("bind"));
            frontend::execute("", 0, out).unwrap();
            frontend::execute("", 0, out).unwrap();
            frontend::sync(out);
        });
        assert_eq!(tags(&client.until(b'Z')), "12EZ");
        let lost = format!("lease lsn {} {} 0/3", "ff".repeat(16), "ab".repeat(16));
        client.send(|out| frontend::query(&lost, out).unwrap());
        let all = client.until(b'Z');
        assert!(tags(&all) == "EZ" && text(&all[0].1).contains("is not on this node"));
        client.open(3, tenant_of(core));
        pipeline(&mut client, Version::V3, core);
    }
}

/// 2,000 connections that send garbage at each stage, or half a message, and go away.
fn hostile(address: SocketAddr) {
    fastrand::seed(7);
    for round in 0..2000_usize {
        let mut stream = TcpStream::connect(address).unwrap();
        let mut out = BytesMut::new();
        if round % 4 > 0 {
            frontend::startup_message([("user", "u")], &mut out).unwrap();
        }
        if round % 4 > 1 {
            let text = format!("pagestream_v3 {} {}", tenant_of(round / 4 % 2), "ab".repeat(16));
            frontend::query(&text, &mut out).unwrap();
        }
        if round % 4 > 2 {
            let request = get_page(1, 1);
            let put = |o: &mut BytesMut| encode_request(Version::V3, &request, o);
            crate::server::pq::put_message(&mut out, b'd', put);
        }
        if round % 3 == 0 {
            out.truncate(fastrand::usize(0..=out.len()));
        } else {
            out.extend((0..fastrand::usize(0..200)).map(|_| fastrand::u8(..)));
        }
        // The node may have closed the connection in the meantime.
        let _ = stream.write_all(&out);
    }
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn two_cores_serve_move_and_survive_garbage() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = Config {
            listen_pg_addr: "127.0.0.1:0".parse().unwrap(),
            cores: vec![0, 1],
            ..Config::default()
        };
        let node = Node::start::<Fake>(Arc::new(config)).await.unwrap();
        let address = node.address();
        let before = open_fds();
        tokio::task::spawn_blocking(move || talk(address)).await.unwrap();
        let (mut accepted, mut moved, mut open) = (0, 0, 1);
        for _ in 0..200 {
            (accepted, moved, open) = (0, 0, 0);
            for core in 0..2 {
                let (reply, metrics) = oneshot::channel();
                node.mesh().send(core, Message::Control(Control::Metrics(reply))).unwrap();
                let metrics = metrics.await.unwrap();
                accepted += metrics.connections_accepted;
                moved += metrics.connections_moved;
                open += metrics.connections_open;
            }
            if open == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(open, 0, "connections are left over");
        assert!(accepted >= 2005 && moved >= 2, "{accepted} accepted, {moved} moved");
        // Other tests of this process open files of their own.
        assert!(open_fds() < before + 50, "{before} descriptors before, {} after", open_fds());
        let stopped = tokio::task::spawn_blocking(move || {
            let mut client = Client::connect(address);
            client.open(3, tenant_of(1));
            client
        });
        let mut client = stopped.await.unwrap();
        node.stop().await.unwrap();
        let (tag, body) = client.message();
        assert!(tag == b'E' && String::from_utf8_lossy(&body).contains("57P01"));
    });
}

async fn metrics_of(node: &Node, core: usize) -> CoreMetrics {
    let (reply, metrics) = oneshot::channel();
    node.mesh().send(core, Message::Control(Control::Metrics(reply))).unwrap();
    metrics.await.unwrap()
}

/// Who takes nothing of his replies is not read from any more, and cut off at last; who takes
/// them slowly is served.
#[test]
fn slow_readers_are_held_back_and_dropped_when_they_stop() {
    // More than the kernel takes for a connection that is not read from.
    const REQUESTS: u32 = 600_000;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let config = Config {
            listen_pg_addr: "127.0.0.1:0".parse().unwrap(),
            cores: vec![0, 1],
            ..Config::default()
        };
        let node = Node::start::<Fake>(Arc::new(config)).await.unwrap();
        let address = node.address();
        let ask = |core| {
            tokio::task::spawn_blocking(move || {
                let mut client = Client::connect(address);
                client.open(3, tenant_of(core));
                let mut out = BytesMut::new();
                for n in 0..REQUESTS {
                    let request = get_page(1, 100 + n);
                    let put = |o: &mut BytesMut| encode_request(Version::V3, &request, o);
                    crate::server::pq::put_message(&mut out, b'd', put);
                }
                let stream = client.0.try_clone().unwrap();
                // The node stops reading long before it has everything.
                let writer = std::thread::Builder::new();
                let writer = writer.spawn(move || (&stream).write_all(&out).is_ok()).unwrap();
                (client, writer)
            })
        };
        let (_stuck, stuck_writer) = ask(0).await.unwrap();
        let (mut slow, slow_writer) = ask(1).await.unwrap();
        // Three times as long as a client may take nothing: the kernel finds room for some more
        // after it has said that there is none, so the time begins twice.
        let reader = tokio::task::spawn_blocking(move || {
            let mut piece = vec![0; 1 << 20];
            for _ in 0..24 {
                slow.0.read_exact(&mut piece).unwrap();
                std::thread::sleep(Duration::from_millis(CONNECTION_WRITE_MS_MAX / 8));
            }
            slow
        });
        let slow = reader.await.unwrap();
        let (stuck, served) = (metrics_of(&node, 0).await, metrics_of(&node, 1).await);
        assert_eq!((stuck.connections_open, served.connections_open), (0, 1));
        let answered = stuck.get_page_requests;
        assert!((1..u64::from(REQUESTS) / 20).contains(&answered), "{answered} answered");
        assert!(!stuck_writer.join().unwrap(), "everything was taken from who takes nothing");
        // For the writer too, which has a descriptor of its own.
        slow.0.shutdown(std::net::Shutdown::Both).unwrap();
        slow_writer.join().unwrap();
        node.stop().await.unwrap();
    });
}

/// An executor that never gets to its first task, as glommio may leave one, is replaced; should
/// it wake after all, it finds the claim taken.
#[test]
fn an_executor_that_falls_asleep_at_once_is_replaced() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let claims = std::cell::RefCell::new(Vec::new());
    let handle = runtime.block_on(started_executor(|claim| {
        let asleep = claims.borrow().is_empty();
        claims.borrow_mut().push(claim.clone());
        builder("test", 0, 0, 128 << 10).spawn(move || async move {
            if !asleep {
                assert!(claim.take());
            }
        })
    }));
    handle.unwrap().join().unwrap();
    let claims = claims.into_inner();
    assert_eq!(claims.len(), 2);
    assert!(!claims[0].take(), "the sleeper must find its place taken");
}

/// A client that sends nothing and keeps what it gets.
struct Silent(Vec<u8>);

impl AsyncRead for Silent {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        Poll::Pending
    }
}

impl Stream for Silent {}

impl AsyncWrite for Silent {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        self.0.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[test]
fn who_does_not_start_up_is_sent_away() {
    let (_stopper, stop) = async_channel::bounded(1);
    let service = Service {
        backend: Rc::new(Fake(0)),
        core: 0,
        cores: 1,
        counters: Counters::default(),
        admission: Rc::default(),
        buffers: Buffers::default(),
        tls: None,
        stop,
        now: monotonic,
        sleep: |_| std::future::ready(()).boxed_local(),
    };
    let mut client = Silent(Vec::new());
    futures_lite::future::block_on(serve(&mut client, Session::default(), &service));
    assert!(String::from_utf8_lossy(&client.0).contains("did not start up in time"));
}

const PANICKING_THREAD: &str = "PGSTRATA_TEST_PANIC_IN";

/// In a process of its own, which is this test again.
#[test]
fn a_panic_of_an_executor_ends_the_process() {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    if let Ok(name) = std::env::var(PANICKING_THREAD) {
        abort_with_executors();
        let thread = std::thread::Builder::new().name(name);
        assert!(thread.spawn(|| panic!("on purpose")).unwrap().join().is_err());
        return;
    }
    let ended = |name: &str| {
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "server::node::tests::a_panic_of_an_executor_ends_the_process"]);
        again.env(PANICKING_THREAD, name).stdout(Stdio::null()).stderr(Stdio::null());
        again.status().unwrap()
    };
    for name in ["serve-0-1", "background-3-8"] {
        assert_eq!(ended(name).signal(), Some(nix::libc::SIGABRT), "{name}");
    }
    assert!(ended("wal-redo").success());
}
