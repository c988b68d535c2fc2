//! Many tenants on one node: what an idle one costs.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use bytes::Bytes;
use common::*;
use glommio::{LocalExecutorBuilder, Placement};
use pgstrata::base::{Key, Lsn, RelNode, RelTag, TenantId, TenantShardId, TimelineId, Value};
use pgstrata::cli::demo_node::DemoNode;
use pgstrata::cli::page_client::PageClient;
use pgstrata::io::uring::UringIo;
use pgstrata::io::{Io, durable};
use pgstrata::layers::{ImageWriter, LayerOwner};
use pgstrata::server::page_protocol::{Answer, Query};
use pgstrata::shard::control::TimelineState;
use pgstrata::shard::index::{
    BranchPoint, ClusterIdentity, INDEX_FILE, INDEX_VERSION, IndexLayer, TimelineIndex,
};
use pgstrata::wal::checkpoint::CHECKPOINT_BYTES;

const TENANTS: u32 = 2_000;
/// What an idle tenant may cost, in bytes of memory.
const IDLE_BYTES_MAX: u64 = 16 * 1024;
const START: Lsn = Lsn(0x100_0000);
const ROOT: TimelineId = TimelineId([1; 16]);
const BRANCH: TimelineId = TimelineId([2; 16]);

fn rel() -> RelTag {
    RelNode { spc: 1663, db: 5, rel: 16384 }.fork(0)
}

fn tenant(number: u32) -> TenantShardId {
    let mut id = [7; 16];
    id[..4].copy_from_slice(&number.to_be_bytes());
    TenantShardId::unsharded(TenantId(id))
}

fn page(number: u32) -> Bytes {
    let mut page = vec![0; 8192];
    page[100..104].copy_from_slice(&number.to_be_bytes());
    page.into()
}

fn index(owner: LayerOwner, ancestor: Option<BranchPoint>) -> TimelineIndex {
    TimelineIndex {
        version: INDEX_VERSION,
        tenant: owner.shard,
        timeline: owner.timeline,
        cluster: ClusterIdentity {
            system_id: 7,
            tli: 1,
            wal_segment_bytes: 16 << 20,
            data_checksums: false,
            hint_bits_logged: false,
        },
        source: None,
        ancestor,
        archived: false,
        start_lsn: START,
        gc_cutoff_lsn: START,
        disk_consistent_lsn: START,
        layers: Vec::new(),
    }
}

/// A tenant with a timeline of one page and a branch of it, as they are left on disk.
async fn make_tenant(io: &UringIo, tenants: &Path, number: u32) {
    let owner = LayerOwner { shard: tenant(number), timeline: ROOT };
    let mut dir = tenants.join(owner.shard.to_string());
    io.create_dir(&dir).await.unwrap();
    dir.push("timelines");
    io.create_dir(&dir).await.unwrap();
    let (root, branch) = (dir.join(ROOT.to_string()), dir.join(BRANCH.to_string()));
    io.create_dir(&root).await.unwrap();
    io.create_dir(&branch).await.unwrap();
    let mut writer = ImageWriter::create(io, &root, owner, START, 0).await.unwrap();
    let image = |bytes: &[u8]| Value::Image(Bytes::copy_from_slice(bytes));
    let values = [
        (Key::rel_block(rel(), 0), Value::Image(page(number))),
        (Key::rel_size(rel()), image(&1u32.to_le_bytes())),
        (Key::CHECKPOINT, image(&[0; CHECKPOINT_BYTES])),
        (Key::rel_dir(rel()), image(b"r")),
    ];
    for (key, value) in values {
        writer.add(key, &value).await.unwrap();
    }
    let layer = writer.finish(Key::MIN..Key::MAX).await.unwrap();
    let layers = vec![IndexLayer { name: layer.name.to_string(), len: layer.file_bytes }];
    let whole = TimelineIndex { layers, ..index(owner, None) };
    durable::write_file_atomic(io, &root.join(INDEX_FILE), &whole.encode()).await.unwrap();
    let owner = LayerOwner { timeline: BRANCH, ..owner };
    let point = BranchPoint { timeline: ROOT, lsn: START };
    let whole = index(owner, Some(point)).encode();
    durable::write_file_atomic(io, &branch.join(INDEX_FILE), &whole).await.unwrap();
}

fn make_tenants(data: PathBuf) {
    let executor = LocalExecutorBuilder::new(Placement::Unbound).spawn(move || async move {
        let io = UringIo::new(None);
        let tenants = data.join("tenants");
        for dir in [&data, &tenants] {
            io.create_dir(dir).await.unwrap();
        }
        let work = async {
            for number in 0..TENANTS {
                make_tenant(&io, &tenants, number).await;
            }
        };
        // Timers move an executor that slept over a wake-up.
        let beat = async {
            loop {
                glommio::timer::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        let (work, beat) = (std::pin::pin!(work), std::pin::pin!(beat));
        futures_util::future::select(work, beat).await;
    });
    executor.unwrap().join().unwrap();
}

/// Resident memory of the node, in bytes.
fn memory(node: &DemoNode) -> u64 {
    let path = format!("/proc/{}/status", node.pid().unwrap());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    let number: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    number * 1024
}

fn processes(node: &DemoNode) -> usize {
    let pid = node.pid().unwrap().to_string();
    let output = Command::new("ps").args(["--ppid", &pid, "-o", "pid="]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).lines().count()
}

fn read(node: &DemoNode, number: u32, timeline: TimelineId) {
    let (address, tenant) = (node.page_address(), tenant(number).tenant);
    let mut client = PageClient::connect(&address, tenant, timeline, START).unwrap();
    let answer = client.ask(Query::GetPage { rel: rel(), block: 0 }).unwrap();
    assert_eq!(answer, Answer::GetPage(page(number)), "tenant {number}");
}

#[test]
fn two_thousand_idle_tenants_cost_next_to_nothing() {
    let root = Root::new("tenants");
    let mut node = root.node(&["log_filter=warn"]);
    node.admin().unwrap().status().unwrap();
    let empty = memory(&node);
    node.stop().unwrap();
    std::fs::remove_dir_all(node.data_dir()).unwrap();
    make_tenants(node.data_dir());
    node.start_again().unwrap();
    let started = memory(&node);
    let each = started.saturating_sub(empty) / u64::from(TENANTS);
    println!("{TENANTS} idle tenants: {each} bytes each ({empty} bytes without, {started} with)");
    assert!(each <= IDLE_BYTES_MAX, "an idle tenant costs {each} bytes");
    let client = node.admin().unwrap();
    let tenants = client.tenants().unwrap();
    assert_eq!(tenants.len(), TENANTS as usize);
    assert!(tenants.iter().all(|tenant| tenant.timeline_count == 2));
    let idle = |state: TimelineState| state == TimelineState::Idle;
    assert!(client.timelines().unwrap().iter().all(|info| idle(info.state)));
    assert_eq!(processes(&node), 0);

    // The first use opens a timeline, and for a branch its ancestor.
    let before = memory(&node);
    for number in 0..200 {
        read(&node, number * 10, BRANCH);
    }
    let used = memory(&node).saturating_sub(before) / 200;
    println!("a tenant of which two timelines are open costs {used} bytes");
    read(&node, 5, ROOT);
    let infos = client.timelines().unwrap();
    assert_eq!(infos.iter().filter(|info| !idle(info.state)).count(), 401);
    node.stop().unwrap();
}
