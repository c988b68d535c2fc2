//! GetPage per second of one core, against an echo server with replies of the same size.
//!
//! Server on CPU 0, client on CPU 1. The echo server is this program again: one glommio executor
//! that answers every request by 8,213 bytes. Then the latency of single requests of one tenant,
//! while another one floods the same core and while none does. See `docs/benchmarks.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    clippy::too_many_lines,
    reason = "a benchmark drives other programs and measures time"
)]

mod common;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bytes::{BufMut, BytesMut};
use common::node::{self, Node, PATIENCE, Process, SERVER_CPU, counter, spawn};
use common::{Result, Rounds, Scratch, process_cpu, sized};
use futures_util::{AsyncReadExt, AsyncWriteExt};
use glommio::{LocalExecutorBuilder, Placement};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pgstrata::base::{Lsn, RelNode, TenantId, TenantShardId, TimelineId};
use pgstrata::cli::admin_client::AdminClient;
use pgstrata::cli::attach::wait_until_active;
use pgstrata::cli::pg::PgCluster;
use pgstrata::server::page_protocol::{Header, Query, Request, Version, encode_request};
use pgstrata::shard::control::TimelineSource;
use pgstrata::shard::reader::RequestLsn;

const ECHO: &str = "--echo-server";
const FLOOD: &str = "--flood";
/// A `CopyData` message with a request of version 2.
const REQUEST_BYTES: usize = 39;
/// What the echo server answers.
const ECHO_BYTES: usize = 8_213;
/// What the node answers: `CopyData` header, tag, page.
const PAGE_BYTES: usize = 5 + 1 + 8192;
const TENANT: TenantId = TenantId([1; 16]);
const QUIET_TENANT: TenantId = TenantId([3; 16]);
const TIMELINE: TimelineId = TimelineId([2; 16]);
/// Connections of the flood, and requests under way on each.
const FLOOD_SHAPE: (usize, usize) = (64, 64);
/// Pause between two requests of the tenant that does not flood.
const QUIET_PAUSE: Duration = Duration::from_millis(1);
/// Connections, and requests under way on each.
const SHAPES: [(usize, usize); 4] = [(1, 1), (16, 1), (1, 16), (16, 16)];
/// Blocks that are asked for over and over.
const BLOCKS: u32 = 256;
/// Updates of each of those blocks after the base backup.
const UPDATES: u32 = 10;

/// The echo server: prints its port and serves until it is killed.
fn echo_server() -> Result<()> {
    let builder = LocalExecutorBuilder::new(Placement::Fixed(SERVER_CPU));
    let executor = builder.spawn(|| async {
        let listener = glommio::net::TcpListener::bind("127.0.0.1:0").map_err(text)?;
        println!("{}", listener.local_addr().map_err(text)?.port());
        loop {
            let stream = listener.accept().await.map_err(text)?;
            glommio::spawn_local(async move {
                // It ends with the connection.
                let _ = echo(stream).await;
            })
            .detach();
        }
        #[allow(unreachable_code, reason = "it gives the block its type")]
        Result::Ok(())
    });
    executor.map_err(|error| error.to_string())?.join().map_err(|error| error.to_string())?
}

/// glommio's errors cannot go from thread to thread.
fn text(error: glommio::GlommioError<()>) -> String {
    error.to_string()
}

async fn echo(mut stream: glommio::net::TcpStream) -> Result<()> {
    stream.set_nodelay(true).map_err(text)?;
    let mut answers = vec![7; 64 * ECHO_BYTES];
    answers.chunks_mut(ECHO_BYTES).for_each(|answer| answer[0] = b'd');
    let mut buffer = vec![0; 32 * 1024];
    let mut have = 0;
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        have += count;
        let whole = have / REQUEST_BYTES;
        have %= REQUEST_BYTES;
        stream.write_all(&answers[..whole.min(64) * ECHO_BYTES]).await?;
    }
}

/// A server process.
struct Server {
    process: Process,
    address: String,
    reply_bytes: usize,
}

fn start_echo(client_cpu: usize) -> Result<Server> {
    let mut command = Command::new(std::env::current_exe()?);
    let mut process = spawn(command.arg(ECHO).stdout(Stdio::piped()), client_cpu)?;
    let mut line = String::new();
    BufReader::new(process.0.stdout.take().ok_or("stdout")?).read_line(&mut line)?;
    let address = format!("127.0.0.1:{}", line.trim());
    Ok(Server { process, address, reply_bytes: ECHO_BYTES })
}

fn start_node(
    dir: &Path,
    client_cpu: usize,
    page_cache_bytes: usize,
) -> Result<(Server, AdminClient)> {
    let setting = format!("page_cache_bytes={page_cache_bytes}");
    let Node { process, address, admin } = node::start(dir, client_cpu, &[&setting])?;
    Ok((Server { process, address, reply_bytes: PAGE_BYTES }, admin))
}

/// Requests of `BLOCKS` blocks of `rel` at `lsn`, in a row.
fn requests(rel: RelNode, lsn: Lsn) -> Vec<u8> {
    let mut all = BytesMut::new();
    for block in 0..BLOCKS {
        let lsn = RequestLsn { request: lsn, not_modified_since: lsn };
        // Neighbours in time are no neighbours in the file.
        let block = block * 97 % BLOCKS;
        let query = Query::GetPage { rel: rel.fork(0), block };
        let mut message = BytesMut::new();
        encode_request(
            Version::V2,
            &Request { header: Header { id: 0, lsn }, query },
            &mut message,
        );
        all.put_u8(b'd');
        all.put_u32(message.len() as u32 + 4);
        all.put_slice(&message);
    }
    assert_eq!(all.len(), BLOCKS as usize * REQUEST_BYTES);
    all.to_vec()
}

/// A connection in the middle of its work.
struct Client {
    stream: TcpStream,
    /// The next request.
    next: usize,
    under_way: usize,
    /// Bytes of the current reply that are here.
    partial: usize,
}

impl Client {
    fn connect(server: &Server, number: usize) -> Result<Client> {
        let tenant = (server.reply_bytes == PAGE_BYTES).then_some(TENANT);
        Client::open(&server.address, tenant, number)
    }

    /// A page stream of a tenant, or a connection to the echo server.
    fn open(address: &str, tenant: Option<TenantId>, number: usize) -> Result<Client> {
        let mut stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        if let Some(tenant) = tenant {
            let mut out = BytesMut::new();
            let start_up = b"user\0benchmark\0\0";
            out.put_u32(start_up.len() as u32 + 8);
            out.put_u32(3 << 16);
            out.put_slice(start_up);
            let command = format!("pagestream_v2 {tenant} {TIMELINE}\0");
            out.put_u8(b'Q');
            out.put_u32(command.len() as u32 + 4);
            out.put_slice(command.as_bytes());
            stream.write_all(&out)?;
            loop {
                let mut head = [0; 5];
                stream.read_exact(&mut head)?;
                let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
                let mut body = vec![0; len - 4];
                stream.read_exact(&mut body)?;
                match head[0] {
                    b'W' => break,
                    b'E' => return Err(String::from_utf8_lossy(&body).into_owned().into()),
                    _ => {}
                }
            }
        }
        stream.set_nonblocking(true)?;
        // Connections do not march in step.
        Ok(Client { stream, next: number * 31, under_way: 0, partial: 0 })
    }

    fn send(&mut self, requests: &[u8], count: usize) -> Result<()> {
        let mut out = Vec::with_capacity(count * REQUEST_BYTES);
        for _ in 0..count {
            let at = self.next % (requests.len() / REQUEST_BYTES) * REQUEST_BYTES;
            out.extend_from_slice(&requests[at..at + REQUEST_BYTES]);
            self.next += 1;
        }
        self.under_way += count;
        Ok(self.stream.write_all(&out)?)
    }

    /// Reads what is there; returns how many replies became whole.
    fn receive(&mut self, buffer: &mut [u8], reply_bytes: usize) -> Result<usize> {
        let count = match self.stream.read(buffer) {
            Ok(0) => return Err("the server closed the connection".into()),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) => return Err(error.into()),
        };
        let first = if self.partial == 0 { 0 } else { reply_bytes - self.partial };
        for at in (first..count).step_by(reply_bytes) {
            let head = &buffer[at..count.min(at + 6)];
            // A page's tag; anything else, an error say, has another length besides.
            let page = reply_bytes != PAGE_BYTES || head.get(5).is_none_or(|tag| *tag == 102);
            if head[0] != b'd' || !page {
                let text = &buffer[at..count.min(at + 200)];
                return Err(format!("no page: {}", String::from_utf8_lossy(text)).into());
            }
        }
        let done = (self.partial + count) / reply_bytes;
        self.partial = (self.partial + count) % reply_bytes;
        self.under_way -= done;
        Ok(done)
    }
}

/// Keeps `depth` requests under way on each connection for `time`; returns replies per second.
fn drive(
    clients: &mut [Client],
    requests: &[u8],
    reply_bytes: usize,
    depth: usize,
    time: Duration,
) -> Result<(u64, Duration)> {
    let mut buffer = vec![0; 256 * 1024];
    let begin = Instant::now();
    let mut end = None;
    let mut replies = 0;
    for client in clients.iter_mut() {
        client.send(requests, depth)?;
    }
    while clients.iter().any(|client| client.under_way > 0) {
        let mut fds: Vec<PollFd<'_>> = clients
            .iter()
            .map(|client| PollFd::new(client.stream.as_fd(), PollFlags::POLLIN))
            .collect();
        if poll(&mut fds, PollTimeout::from(60_000u16))? == 0 {
            return Err("no reply within a minute".into());
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (client, _) in clients.iter_mut().zip(ready).filter(|(_, ready)| *ready) {
            let done = client.receive(&mut buffer, reply_bytes)?;
            if end.is_none() {
                replies += done as u64;
                if done > 0 {
                    client.send(requests, done)?;
                }
            }
        }
        if end.is_none() && begin.elapsed() >= time {
            end = Some(begin.elapsed());
        }
    }
    Ok((replies, end.unwrap_or(time)))
}

/// Pages per second and CPU-seconds of the server per million pages.
fn measure(
    server: &Server,
    requests: &[u8],
    (connections, depth): (usize, usize),
    time: Duration,
) -> Result<(f64, f64)> {
    let mut clients = (0..connections)
        .map(|number| Client::connect(server, number))
        .collect::<Result<Vec<_>>>()?;
    drive(&mut clients, requests, server.reply_bytes, depth, time / 5)?;
    let before = process_cpu(server.process.0.id())?;
    let (replies, wall) = drive(&mut clients, requests, server.reply_bytes, depth, time)?;
    let cpu = process_cpu(server.process.0.id())?.saturating_sub(before);
    let pages = replies as f64;
    Ok((pages / wall.as_secs_f64(), cpu.as_secs_f64() / pages * 1e6))
}

/// A cluster whose `pgbench_accounts` was updated after its base backup.
struct Loaded {
    images: Vec<u8>,
    records: Vec<u8>,
    /// Images of the tenant that does not flood.
    quiet: Vec<u8>,
}

fn load(primary: &PgCluster, admin: &AdminClient) -> Result<Loaded> {
    let [tenant, quiet] = [TENANT, QUIET_TENANT].map(TenantShardId::unsharded);
    let source = TimelineSource::Primary { conninfo: primary.conninfo(), slot: None };
    admin.create_timeline(tenant, TIMELINE, &source)?;
    let imported = wait_until_active(admin, tenant, TIMELINE, |_| ())?;
    admin.create_timeline(quiet, TIMELINE, &source)?;
    let quiet = wait_until_active(admin, quiet, TIMELINE, |_| ())?;
    for _ in 0..UPDATES {
        // The first row of each page; there is room for its versions.
        primary.psql(
            "postgres",
            "UPDATE pgbench_accounts SET abalance = abalance + 1 \
             WHERE aid IN (SELECT min(aid) FROM pgbench_accounts GROUP BY (ctid::text::point)[0])",
        )?;
    }
    let lsn = node::catch_up(admin, primary, (tenant, TIMELINE))?;
    let path = primary.value("postgres", "SELECT pg_relation_filepath('pgbench_accounts')")?;
    let mut numbers = path.split('/').skip(1).map(str::parse::<u32>);
    let (Some(Ok(db)), Some(Ok(rel))) = (numbers.next(), numbers.next()) else {
        return Err(format!("relation file '{path}'").into());
    };
    let node = RelNode { spc: 1663, db, rel };
    Ok(Loaded {
        images: requests(node, imported.start_lsn),
        records: requests(node, lsn),
        quiet: requests(node, quiet.start_lsn),
    })
}

/// The flood, a process of its own: requests come by standard input; it goes on until it is killed.
fn flood() -> Result<()> {
    let address = std::env::args().nth(2).ok_or("the address is missing")?;
    let mut requests = Vec::new();
    std::io::stdin().read_to_end(&mut requests)?;
    let (connections, depth) = FLOOD_SHAPE;
    let mut clients = (0..connections)
        .map(|number| Client::open(&address, Some(TENANT), number))
        .collect::<Result<Vec<_>>>()?;
    println!("ready");
    loop {
        drive(&mut clients, &requests, PAGE_BYTES, depth, Duration::from_secs(3600))?;
    }
}

/// Starts the flood, on the client's CPU and at low priority: its work on replies must not hold up
/// the other client, which is measured.
fn start_flood(node: &Server, requests: &[u8]) -> Result<Process> {
    let mut command = Command::new("nice");
    command.args(["-n", "19"]).arg(std::env::current_exe()?).args([FLOOD, &node.address]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    child.stdin.take().ok_or("stdin")?.write_all(requests)?;
    let mut output = BufReader::new(child.stdout.take().ok_or("stdout")?);
    let flood = Process(child);
    let mut line = String::new();
    output.read_line(&mut line)?;
    match line.trim() {
        "ready" => Ok(flood),
        _ => Err("the flood does not start".into()),
    }
}

/// Median and 99th percentile of the time from a request to its reply, in microseconds.
fn latencies(node: &Server, requests: &[u8], time: Duration) -> Result<[f64; 2]> {
    let mut client = Client::open(&node.address, Some(QUIET_TENANT), 0)?;
    client.stream.set_nonblocking(false)?;
    let mut buffer = vec![0; 2 * PAGE_BYTES];
    let mut all = Vec::new();
    let begin = Instant::now();
    while begin.elapsed() < time {
        std::thread::sleep(QUIET_PAUSE);
        let start = Instant::now();
        client.send(requests, 1)?;
        while client.under_way > 0 {
            client.receive(&mut buffer, PAGE_BYTES)?;
        }
        all.push(start.elapsed().as_secs_f64() * 1e6);
    }
    all.sort_by(f64::total_cmp);
    let at = |percent: usize| all.get(all.len() * percent / 100).copied().unwrap_or(f64::NAN);
    Ok([at(50), at(99)])
}

/// What a flood does to another tenant of the same core.
fn fairness(node: &Server, admin: &AdminClient, loaded: &Loaded) -> Result<()> {
    let time = Duration::from_millis(sized(500, 4000));
    let mut rounds: [Rounds; 6] = Default::default();
    let (mut pages, mut seconds) = (0.0, 0.0);
    for _ in 0..sized(2, 5) {
        let alone = latencies(node, &loaded.quiet, time)?;
        let flood = start_flood(node, &loaded.images)?;
        std::thread::sleep(time / 5);
        let (before, begin) = (counter(admin, "pgstrata_get_page_requests")?, Instant::now());
        let flooded = latencies(node, &loaded.quiet, time)?;
        pages += counter(admin, "pgstrata_get_page_requests")? - before;
        seconds += begin.elapsed().as_secs_f64();
        drop(flood);
        let ratios = [flooded[0] / alone[0], flooded[1] / alone[1]];
        let values = [alone[0], alone[1], flooded[0], flooded[1], ratios[0], ratios[1]];
        rounds.iter_mut().zip(values).for_each(|(round, value)| round.add(value));
    }
    let (connections, depth) = FLOOD_SHAPE;
    println!(
        "single requests of one tenant; another floods by {connections} connections x {depth}:"
    );
    let [p50, p99, flooded_p50, flooded_p99, p50_ratio, p99_ratio] = rounds;
    println!("  alone    p50 {} us, p99 {} us", p50.text(0), p99.text(0));
    println!("  flooded  p50 {} us, p99 {} us", flooded_p50.text(0), flooded_p99.text(0));
    println!("  ratios   p50 {}, p99 {}", p50_ratio.text(2), p99_ratio.text(2));
    println!("  the flood gets {:.0} pages/s", pages / seconds);
    Ok(())
}

fn benchmark() -> Result<()> {
    let client_cpu = common::client_cpu();
    println!(
        "getpage: server on CPU {SERVER_CPU}, client on CPU {client_cpu}; \
         median (min..max) of the rounds; ratios to the echo server of the same round"
    );
    let scratch = Scratch::new("getpage")?;
    let settings = ["full_page_writes = off"];
    let primary = node::primary(&scratch.join("primary"), &settings, 1)?;
    // Room on every page for the versions to come.
    primary.psql("postgres", "ALTER TABLE pgbench_accounts SET (fillfactor = 75)")?;
    primary.psql("postgres", "VACUUM FULL pgbench_accounts")?;
    primary.psql("postgres", "VACUUM pgbench_accounts")?;
    let dir = |name| scratch.join(name);
    let (node, admin) = start_node(&dir("node"), client_cpu, 32 << 20)?;
    let loaded = load(&primary, &admin)?;
    admin.checkpoint(TenantShardId::unsharded(TENANT), TIMELINE)?;
    // Each page is rebuilt anew for each request, from records in the open layer: in a file they
    // would be merged, and the pages get images.
    let (forgetful, forgetful_admin) = start_node(&dir("forgetful"), client_cpu, 0)?;
    let anew = load(&primary, &forgetful_admin)?;
    // What was updated for that node must not be in the other one's way.
    node::catch_up(&admin, &primary, (TenantShardId::unsharded(TENANT), TIMELINE))?;
    admin.checkpoint(TenantShardId::unsharded(TENANT), TIMELINE)?;
    let echo = start_echo(client_cpu)?;
    let time = Duration::from_millis(sized(100, 1000));
    let kinds: [(&str, &Server, &[u8]); 4] = [
        ("echo server", &echo, &loaded.images),
        ("node, page images", &node, &loaded.images),
        ("node, rebuilt and kept", &node, &loaded.records),
        ("node, image + records", &forgetful, &anew.records),
    ];
    for shape in SHAPES.into_iter().filter(|(a, b)| common::wanted(&format!("{a}x{b}"))) {
        println!("{} connections, {} requests under way on each:", shape.0, shape.1);
        let mut all: [[Rounds; 4]; 4] = Default::default();
        let redo = || -> Result<[f64; 2]> {
            let of = |name| counter(&forgetful_admin, name);
            Ok([of("pgstrata_redo_requests")?, of("pgstrata_redo_records")?])
        };
        let before = redo()?;
        for _ in 0..sized(2, 5) {
            let mut base = None;
            for ((_, server, requests), rounds) in kinds.iter().zip(&mut all) {
                let (rate, cpu) = measure(server, requests, shape, time)?;
                let (base_rate, base_cpu) = *base.get_or_insert((rate, cpu));
                for (round, value) in
                    rounds.iter_mut().zip([rate, rate / base_rate, cpu, cpu / base_cpu])
                {
                    round.add(value);
                }
            }
        }
        for ((name, ..), [rate, rate_ratio, cpu, cpu_ratio]) in kinds.iter().zip(&all) {
            println!(
                "  {name:<22} {} pages/s, ratio {}; {} CPU-s per million, ratio {}",
                rate.text(0),
                rate_ratio.text(3),
                cpu.text(1),
                cpu_ratio.text(2)
            );
        }
        let after = redo()?;
        let [redone, applied] = [after[0] - before[0], after[1] - before[1]];
        println!("  records per page that went through redo: {:.1}", applied / redone);
    }
    if common::wanted("fairness") {
        fairness(&node, &admin, &loaded)?;
    }
    drop((node, forgetful, echo));
    Ok(())
}

fn main() -> std::process::ExitCode {
    if std::env::args().nth(1).is_some_and(|mode| mode == ECHO) {
        return common::main(echo_server);
    }
    if std::env::args().nth(1).is_some_and(|mode| mode == FLOOD) {
        return common::main(flood);
    }
    common::main(benchmark)
}
