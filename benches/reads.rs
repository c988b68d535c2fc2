//! Pages that the node has to look for: on the device, under many layers, in a row while somebody
//! writes. Server on CPU 0, client (`pgstrata bench getpage`) on CPU 1. See `docs/benchmarks.md`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "a benchmark drives other programs and measures time"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::node::{self, Node, Process, SERVER_CPU, counter, spawn};
use common::{Result, Rounds, Scratch, sized, wanted};
use pgstrata::base::{TenantId, TenantShardId, TimelineId};
use pgstrata::cli::attach::wait_until_active;
use pgstrata::cli::pg::PgCluster;
use pgstrata::shard::control::TimelineSource;
use serde_json::Value as Json;

const TIMELINE: TimelineId = TimelineId([2; 16]);
/// Requests under way on one connection.
const DEPTH: &str = "32";
/// Connections, and requests under way on each: as many in all.
const SHAPES: [[&str; 2]; 3] = [["1", DEPTH], ["4", "8"], ["32", "1"]];
/// Settings of the last part: without rebuilt pages; and with as many layers as can be set.
const DEEP: [&str; 3] =
    ["page_cache_bytes=0", "compaction_threshold=8", "compaction_image_percent=1000"];
/// Checkpoints that each change every page, in the last part.
const LAYERS: u32 = 20;

fn tenant(number: u8) -> TenantShardId {
    TenantShardId::unsharded(TenantId([number; 16]))
}

fn seconds() -> u32 {
    sized(1, 4)
}

/// `SPC/DB/REL` of a table.
fn relation(primary: &PgCluster, table: &str) -> Result<String> {
    let path = primary.value("postgres", &format!("SELECT pg_relation_filepath('{table}')"))?;
    Ok(path.replacen("base", "1663", 1))
}

/// What `pgstrata bench getpage` prints of one run on the client's CPU.
fn read(node: &Node, tenant: TenantShardId, rel: &str, args: &[&str]) -> Result<Json> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    command.args(["bench", "getpage", "--json", "--address", &node.address, "--relation", rel]);
    command.args(["--tenants", &format!("{}/{TIMELINE}", tenant.tenant)]);
    let output = command.args(args).args(["-T", &seconds().to_string()]).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn number(json: &Json, names: &[&str]) -> Result<f64> {
    let mut at = json;
    for name in names {
        at = match name.parse::<usize>() {
            Ok(place) => &at[place],
            Err(_) => &at[*name],
        };
    }
    at.as_f64().ok_or_else(|| format!("no {names:?} in {json}").into())
}

/// A timeline that follows the primary.
fn attach(node: &Node, primary: &PgCluster, tenant: TenantShardId) -> Result<()> {
    let source = TimelineSource::Primary { conninfo: primary.conninfo(), slot: None };
    node.admin.create_timeline(tenant, TIMELINE, &source)?;
    wait_until_active(&node.admin, tenant, TIMELINE, |_| ())?;
    Ok(())
}

/// Waits until all that the primary has done is there.
fn catch_up(node: &Node, primary: &PgCluster, tenant: TenantShardId) -> Result<()> {
    node::catch_up(&node.admin, primary, (tenant, TIMELINE))?;
    Ok(())
}

/// The largest file below a directory.
fn largest_file(dir: &Path) -> Result<PathBuf> {
    let (mut todo, mut largest) = (vec![dir.to_owned()], (0, PathBuf::new()));
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(dir)? {
            let (path, data) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            match data.is_dir() {
                true => todo.push(path),
                false => largest = largest.max((data.len(), path)),
            }
        }
    }
    Ok(largest.1)
}

/// Random reads of 8 KiB, 32 at once, on the server's CPU; reads per second.
fn fio(file: &Path, client_cpu: usize) -> Result<f64> {
    let mut command = Command::new("fio");
    command.args(["--name=reads", "--rw=randread", "--bs=8k", "--direct=1", "--readonly"]);
    command.args(["--ioengine=io_uring", "--iodepth=32", "--time_based", "--output-format=json"]);
    command.arg(format!("--filename={}", file.display()));
    command.arg(format!("--runtime={}", seconds()));
    let mut process = spawn(command.stdout(Stdio::piped()), client_cpu)?;
    let output = process.0.stdout.take().ok_or("stdout")?;
    let json: Json = serde_json::from_reader(output)?;
    number(&json, &["jobs", "0", "read", "iops"])
}

/// Pages that are images in a layer and not in the cache, against fio on the layer's file.
fn uncached(dir: &Path, primary: &PgCluster, node: &Node, client_cpu: usize) -> Result<()> {
    let (tenant, rel) = (tenant(1), relation(primary, "noise")?);
    let file = largest_file(&dir.join("node/data/tenants"))?;
    let mut device = Rounds::default();
    let [mut ours, mut ratios, mut reads] = <[[Rounds; SHAPES.len()]; 3]>::default();
    for _ in 0..sized(1, 5) {
        for (n, [clients, depth]) in SHAPES.iter().enumerate() {
            let theirs = fio(&file, client_cpu)?;
            let before = counter(&node.admin, "pgstrata_block_cache_misses")?;
            let args = ["--clients", clients, "--depth", depth];
            let figures = read(node, tenant, &rel, &args)?;
            let missed = counter(&node.admin, "pgstrata_block_cache_misses")? - before;
            let pages = number(&figures, &["pages_per_second"])?;
            device.add(theirs);
            ours[n].add(pages);
            ratios[n].add(pages / theirs);
            reads[n].add(missed / number(&figures, &["pages"])?);
        }
    }
    println!("uncached page images, {DEPTH} requests under way:");
    println!("  fio, random reads of 8 KiB: {} per second", device.text(0));
    for (n, [clients, depth]) in SHAPES.iter().enumerate() {
        let [ours, ratio, reads] = [ours[n].text(0), ratios[n].text(3), reads[n].text(2)];
        println!(
            "  {clients:>2} connections x {depth:>2}: {ours} per second, ratio {ratio}; \
             blocks read for a page {reads}"
        );
    }
    Ok(())
}

/// Single pages under many layers of records, against the same as images.
fn deep(primary: &PgCluster, node: &Node) -> Result<()> {
    let (shallow, deep) = (tenant(2), tenant(3));
    let rel = relation(primary, "pgbench_accounts")?;
    attach(node, primary, deep)?;
    for round in 0..LAYERS {
        let update = format!(
            "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid % {LAYERS} = {round}"
        );
        primary.psql("postgres", &update)?;
        catch_up(node, primary, deep)?;
        node.admin.checkpoint(deep, TIMELINE)?;
    }
    // As it is now: images only.
    attach(node, primary, shallow)?;
    let [mut images, mut layers, mut ratio] = <[Rounds; 3]>::default();
    let read_layers = || -> Result<[f64; 2]> {
        let of = |name| counter(&node.admin, name);
        Ok([of("pgstrata_read_layers_sum")?, of("pgstrata_read_layers_count")?])
    };
    let mut depth = Rounds::default();
    for _ in 0..sized(1, 5) {
        let one = number(&read(node, shallow, &rel, &[])?, &["latency_p50_ms"])? * 1e3;
        let before = read_layers()?;
        let many = number(&read(node, deep, &rel, &[])?, &["latency_p50_ms"])? * 1e3;
        let after = read_layers()?;
        images.add(one);
        layers.add(many);
        ratio.add(many / one);
        depth.add((after[0] - before[0]) / (after[1] - before[1]));
    }
    println!("single pages, after {LAYERS} checkpoints that each changed them:");
    println!("  imported as images: p50 {} us", images.text(0));
    println!(
        "  changed:            p50 {} us, {} layers read for a page",
        layers.text(0),
        depth.text(2)
    );
    println!("  ratio {}", ratio.text(2));
    Ok(())
}

/// The load of another client on the primary, whose WAL the node takes in.
fn writer(primary: &PgCluster) -> Result<Process> {
    let mut command = primary.client("pgbench", "postgres");
    command.args(["--no-vacuum", "--client=4", "--time=3600"]);
    Ok(Process(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?))
}

/// Pages one after the other, alone and while WAL comes in.
fn scan(primary: &PgCluster, node: &Node) -> Result<()> {
    let (tenant, rel) = (tenant(1), relation(primary, "noise")?);
    let args = ["--depth", DEPTH, "--key-distribution", "sequential"];
    let [mut quiet, mut beside, mut ratio, mut wal] = <[Rounds; 4]>::default();
    for _ in 0..sized(1, 5) {
        let alone = number(&read(node, tenant, &rel, &args)?, &["pages_per_second"])?;
        let load = writer(primary)?;
        std::thread::sleep(Duration::from_millis(500));
        let before = counter(&node.admin, "pgstrata_wal_bytes_received")?;
        let busy = number(&read(node, tenant, &rel, &args)?, &["pages_per_second"])?;
        let received = counter(&node.admin, "pgstrata_wal_bytes_received")? - before;
        drop(load);
        catch_up(node, primary, tenant)?;
        quiet.add(alone);
        beside.add(busy);
        ratio.add(busy / alone);
        wal.add(received / 1e6 / f64::from(seconds()));
    }
    println!("a scan, {DEPTH} requests under way:");
    println!("  alone:           {} pages/s", quiet.text(0));
    println!("  beside a writer: {} pages/s, {} MB/s of WAL", beside.text(0), wal.text(1));
    println!("  ratio {}", ratio.text(3));
    Ok(())
}

fn benchmark() -> Result<()> {
    let client_cpu = common::client_cpu();
    println!(
        "reads: server on CPU {SERVER_CPU}, client on CPU {client_cpu}; \
         median (min..max) of the rounds"
    );
    let scratch = Scratch::new("reads")?;
    // The server has its CPU for itself.
    common::pin(client_cpu)?;
    let primary = node::primary(&scratch.join("primary"), &[], 2)?;
    // Pages that do not pack, so that the device has to read 8 KiB of each.
    let noise = format!(
        "CREATE TABLE noise AS SELECT i, (SELECT string_agg(decode(md5(i || ' ' || j), 'hex'), '') \
         FROM generate_series(1, 60) j) FROM generate_series(1, {}) i",
        sized(8_000, 200_000)
    );
    primary.psql("postgres", &noise)?;
    // Reads set hint bits, which would be changes.
    primary.psql("postgres", "VACUUM FREEZE")?;
    primary.psql("postgres", "CHECKPOINT")?;
    let small = ["block_cache_bytes=1048576", "page_cache_bytes=0"];
    let node = node::start(&scratch.join("node"), client_cpu, &small)?;
    attach(&node, &primary, tenant(1))?;
    catch_up(&node, &primary, tenant(1))?;
    if wanted("uncached") {
        uncached(&scratch, &primary, &node, client_cpu)?;
    }
    if wanted("scan") {
        scan(&primary, &node)?;
    }
    if wanted("deep") {
        for (dir, settings) in [("default", &DEEP[..1]), ("deep", &DEEP[..])] {
            println!("settings {}:", settings.join(" "));
            let node = node::start(&scratch.join(dir), client_cpu, settings)?;
            deep(&primary, &node)?;
        }
    }
    Ok(())
}

fn main() -> std::process::ExitCode {
    common::main(benchmark)
}
