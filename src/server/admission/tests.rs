//! Two tenants on one core, over sockets, server and clients on one executor. Waiting is counted in
//! pages that others got meanwhile, which no machine makes longer.

use std::net::SocketAddr;

use bytes::{Bytes, BytesMut};
use futures_util::{AsyncReadExt, AsyncWriteExt, FutureExt};
use glommio::net::{TcpListener, TcpStream};
use glommio::{LocalExecutorBuilder, Placement};
use postgres_protocol::message::frontend;

use super::*;
use crate::base::{BlockNumber, Lsn, RelNode, RelTag, SlruKind, TenantId, TimelineId, Timestamp};
use crate::limits::FAIR_TICK_PAGES;
use crate::server::counters::Counters;
use crate::server::fair::Class;
use crate::server::page_protocol::{Header, PAGE_BYTES, Query, Request, Version, encode_request};
use crate::server::page_service::{Service, Session, serve};
use crate::server::pq;
use crate::server::socket::Socket;
use crate::shard::base_backup::{BackupError, BackupRequest, BackupSink};
use crate::shard::leases::LeaseError;
use crate::shard::reader::{PageBackend, PageQuota, ReadError, RequestLsn, TimelineReader};

const FLOOD_CONNECTIONS: usize = 64;
const FLOOD_DEPTH: usize = 64;
/// A reply of version 2.
const REPLY_BYTES: usize = 5 + 1 + PAGE_BYTES;

fn tenant(n: u8) -> TenantShardId {
    TenantShardId::unsharded(TenantId([n; 16]))
}

/// All timelines; counts the pages that it gives.
#[derive(Default)]
struct Pages {
    served: Cell<u64>,
    quota: Cell<PageQuota>,
    /// Pages can be told at once.
    holds: Cell<bool>,
}

impl Pages {
    fn page(&self) -> Bytes {
        static PAGE: [u8; PAGE_BYTES] = [5; PAGE_BYTES];
        self.served.set(self.served.get() + 1);
        Bytes::from_static(&PAGE)
    }
}

struct Backend(Rc<Pages>);

impl PageBackend for Backend {
    type Timeline = Pages;
    async fn timeline(&self, _: TenantShardId, _: TimelineId) -> Result<Rc<Pages>, ReadError> {
        Ok(self.0.clone())
    }
}

fn no<T>() -> Result<T, ReadError> {
    Err(ReadError::BadRequest("not here".to_owned()))
}

impl TimelineReader for Pages {
    async fn get_page(&self, _: RelTag, _: BlockNumber, _: RequestLsn) -> Result<Bytes, ReadError> {
        Ok(self.page())
    }
    fn held_page(&self, _: RelTag, _: BlockNumber, _: RequestLsn) -> Option<Bytes> {
        self.holds.get().then(|| self.page())
    }
    fn quota(&self) -> PageQuota {
        self.quota.get()
    }
    async fn rel_exists(&self, _: RelTag, _: RequestLsn) -> Result<bool, ReadError> {
        no()
    }
    async fn rel_size(&self, _: RelTag, _: RequestLsn) -> Result<u32, ReadError> {
        no()
    }
    async fn db_size(&self, _: u32, _: RequestLsn) -> Result<i64, ReadError> {
        no()
    }
    async fn slru_segment(&self, _: SlruKind, _: u32, _: RequestLsn) -> Result<Bytes, ReadError> {
        no()
    }
    async fn lease_lsn(&self, lsn: Lsn) -> Result<Timestamp, LeaseError> {
        Err(LeaseError::BelowStart { lsn, start: lsn })
    }
    async fn backup<S: BackupSink>(&self, _: BackupRequest, _: &mut S) -> Result<Lsn, BackupError> {
        Ok(no()?)
    }
}

fn now() -> Duration {
    static START: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    START.get_or_init(std::time::Instant::now).elapsed()
}

fn sleep(time: Duration) -> LocalBoxFuture<'static, ()> {
    glommio::timer::sleep(time).boxed_local()
}

/// A page service on this executor; returns its address and what stops it.
fn start(pages: &Rc<Pages>) -> (SocketAddr, Rc<Service<Backend>>, Sender<()>) {
    let (stopper, stop) = async_channel::bounded(1);
    let admission = Admission::start(now, sleep, stop.clone());
    let service = Rc::new(Service {
        backend: Rc::new(Backend(pages.clone())),
        core: 0,
        cores: 1,
        counters: Counters::default(),
        admission,
        buffers: Default::default(),
        tls: None,
        stop,
        now,
        sleep,
    });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let accepting = service.clone();
    glommio::spawn_local(async move {
        while let Ok(stream) = listener.accept().await {
            let service = accepting.clone();
            glommio::spawn_local(async move {
                stream.set_nodelay(true).unwrap();
                let mut stream = Socket::new(stream, None, None);
                serve(&mut stream, Session::default(), &service).await;
            })
            .detach();
        }
    })
    .detach();
    (address, service, stopper)
}

async fn connect(address: SocketAddr, tenant: TenantShardId) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut out = BytesMut::new();
    frontend::startup_message([("user", "u")], &mut out).unwrap();
    frontend::query(&format!("pagestream_v2 {tenant} {}", "ab".repeat(16)), &mut out).unwrap();
    stream.write_all(&out).await.unwrap();
    loop {
        let mut head = [0; 5];
        stream.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize - 4;
        stream.read_exact(&mut vec![0; length]).await.unwrap();
        assert_ne!(head[0], b'E');
        if head[0] == b'W' {
            return stream;
        }
    }
}

/// Sends requests and reads their replies.
async fn get_pages(stream: &mut TcpStream, count: usize, replies: &mut Vec<u8>) {
    let lsn = RequestLsn { request: Lsn::MAX, not_modified_since: Lsn(8) };
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(0);
    let mut out = BytesMut::new();
    for block in 0..count {
        let query = Query::GetPage { rel, block: block as u32 };
        let request = Request { header: Header { id: 0, lsn }, query };
        pq::put_message(&mut out, b'd', |out| encode_request(Version::V2, &request, out));
    }
    stream.write_all(&out).await.unwrap();
    replies.resize(count * REPLY_BYTES, 0);
    stream.read_exact(replies).await.unwrap();
    assert!(replies.chunks(REPLY_BYTES).all(|one| one[0] == b'd' && one[5] == 102));
}

/// Pages that the flood got while each of some single requests of `quiet` was under way, sorted;
/// and whether all of the flood's connections went on.
async fn pages_waited(flood: TenantShardId, quiet: TenantShardId, holds: bool) -> (Vec<u64>, bool) {
    let pages = Rc::new(Pages { holds: holds.into(), ..Pages::default() });
    let (address, service, stopper) = start(&pages);
    let rounds = Rc::new(RefCell::new(vec![0; FLOOD_CONNECTIONS]));
    let over = Rc::new(Cell::new(false));
    let mut floods = Vec::new();
    for number in 0..FLOOD_CONNECTIONS {
        let mut stream = connect(address, flood).await;
        let (rounds, over) = (rounds.clone(), over.clone());
        floods.push(glommio::spawn_local(async move {
            let mut replies = Vec::new();
            while !over.get() {
                get_pages(&mut stream, FLOOD_DEPTH, &mut replies).await;
                rounds.borrow_mut()[number] += 1;
            }
        }));
    }
    let mut stream = connect(address, quiet).await;
    let (mut waited, mut replies) = (Vec::new(), Vec::new());
    for _ in 0..100 {
        sleep(Duration::from_millis(3)).await;
        let before = pages.served.get();
        get_pages(&mut stream, 1, &mut replies).await;
        waited.push(pages.served.get() - before - 1);
    }
    let all_go_on = rounds.borrow().iter().all(|rounds| *rounds > 0);
    over.set(true);
    for flood in floods {
        flood.await;
    }
    let counts = service.admission.counts();
    assert_eq!((counts.waiting, counts.in_flight, counts.over_quota), (0, 0, 0));
    assert_eq!(counts.delayed > 0, flood != quiet, "{counts:?}");
    stopper.close();
    waited.sort_unstable();
    (waited, all_go_on)
}

fn on_an_executor<T, F>(work: impl FnOnce() -> F + Send + 'static) -> T
where
    T: Send + 'static,
    F: Future<Output = T> + 'static,
{
    LocalExecutorBuilder::new(Placement::Unbound).spawn(work).unwrap().join().unwrap()
}

#[test]
fn a_flood_of_one_tenant_holds_up_another_for_some_ticks_only() {
    flood(false);
}

#[test]
fn nor_does_a_flood_of_pages_that_are_told_at_once() {
    flood(true);
}

fn flood(holds: bool) {
    let ((fair, all_go_on), (unfair, _)) = on_an_executor(move || async move {
        let fair = pages_waited(tenant(1), tenant(2), holds).await;
        (fair, pages_waited(tenant(1), tenant(1), holds).await)
    });
    assert!(all_go_on, "the flood starves");
    // On the way to the server, in line, and on the way back: the first and the last are the
    // client's, which is a task of the same executor.
    let (median, high) = (fair[50], fair[95]);
    assert!(median <= 4 * FAIR_TICK_PAGES && high <= 16 * FAIR_TICK_PAGES, "{fair:?}");
    // The same within one tenant: what the test would see if nobody were fair.
    assert!(unfair[50] > 4 * median, "{unfair:?} against {fair:?}");
}

#[test]
fn quotas_slow_their_tenant_and_nobody_else() {
    let (spent, counts) = on_an_executor(|| async {
        let pages = Rc::new(Pages::default());
        pages.quota.set(PageQuota { requests_per_s: 1000, ..PageQuota::default() });
        let (address, service, stopper) = start(&pages);
        let mut stream = connect(address, tenant(1)).await;
        let mut replies = Vec::new();
        let begin = now();
        for _ in 0..30 {
            get_pages(&mut stream, 10, &mut replies).await;
        }
        let spent = now() - begin;
        let counts = service.admission.counts();
        stopper.close();
        (spent, counts)
    });
    // 300 requests, of which the bucket had 100 at the beginning.
    assert!(spent >= Duration::from_millis(180), "{spent:?}");
    assert!(counts.over_quota >= 20 && counts.delayed == counts.over_quota, "{counts:?}");
}

#[test]
fn who_goes_away_leaves_the_line() {
    let (delayed, counts) = on_an_executor(|| async {
        let admission = Rc::new(Admission::default());
        let quota = PageQuota { requests_per_s: 0, bytes_in_flight: 2 * PAGE_BYTES as u64 };
        let ask = Ask { tenant: tenant(1), quota, class: Class::Foreground, pages: 2 };
        let first = admission.try_admit(&ask, now()).unwrap();
        assert!(admission.try_admit(&ask, now()).is_none());
        drop(admission.stand_in_line(&ask, now()));
        let second = admission.stand_in_line(&ask, now());
        let (stopper, stop) = async_channel::bounded(1);
        let pump = glommio::spawn_local(admission.clone().pump(now, sleep, stop));
        drop(first);
        let permit = second.await.unwrap();
        let counts = admission.counts();
        drop(permit);
        stopper.close();
        pump.await;
        (counts, admission.counts())
    });
    assert_eq!((delayed.waiting, delayed.in_flight, delayed.delayed), (0, 2, 4));
    assert_eq!((counts.waiting, counts.in_flight), (0, 0));
}
