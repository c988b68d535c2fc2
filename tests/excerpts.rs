//! What is stored of WAL records that change several pages, on WAL that a real PostgreSQL 15 wrote:
//! how much smaller delta layers get, and that the judge of excerpts is not blind. That every page
//! version is equal stands in `tests/native_redo.rs`.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_lite::future::block_on;
use pgstrata::base::{BlockNumber, Key, Lsn, RelTag, TenantId, TenantShardId, TimelineId, Value};
use pgstrata::cli::pg::{PgCluster, StopMode, bin_dir, control_data};
use pgstrata::cli::redo_compare::{Compare, read_wal};
use pgstrata::cli::verify_files::scan;
use pgstrata::cli::workload;
use pgstrata::io::Io;
use pgstrata::layers::{DeltaWriter, FrozenLayer, LayerOwner, OpenLayer};
use pgstrata::redo::RedoSettings;
use pgstrata::redo::child::{ChildRedo, ChildSettings};
use pgstrata::redo::excerpt::{excerpt, stored_form};
use pgstrata::sim::{SimIo, SimOptions, SimWorld};
use pgstrata::wal::change::{BlockValue, Change};
use pgstrata::wal::decode::{decode, page_in_record};
use pgstrata::wal::record::{BlockRef, Record};

mod common;

use common::{Root, copy};

const SEGMENT_BYTES: u64 = 16 << 20;

/// Runs a load on a fresh primary; gives it, stopped, and where the load's WAL begins.
fn primary(
    root: &Root,
    settings: &[&str],
    prepare: impl FnOnce(&PgCluster),
    load: impl FnOnce(&PgCluster),
) -> (PgCluster, Lsn) {
    let mut all: Vec<String> = settings.iter().map(|text| (*text).to_owned()).collect();
    all.extend(["wal_keep_size = 10GB", "autovacuum = off", "fsync = off"].map(str::to_owned));
    let mut cluster = PgCluster::init(&root.join("primary"), false, &all).unwrap();
    cluster.start().unwrap();
    prepare(&cluster);
    cluster.psql("postgres", "CHECKPOINT").unwrap();
    let from = control_data(cluster.data(), "Latest checkpoint's REDO location").unwrap();
    load(&cluster);
    cluster.stop(StopMode::Fast).unwrap();
    (cluster, from.parse().unwrap())
}

/// All page changes of the WAL, as a timeline has them in memory. Sizes and metadata are left out:
/// they are the same in any form.
fn ingest(wal: &Path, from: Lsn) -> std::sync::Arc<FrozenLayer> {
    let mut open = OpenLayer::new(from, SEGMENT_BYTES);
    let end = read_wal(wal, from, |found| {
        for change in decode(&found.bytes, found.start, found.end)? {
            let Change::Block(change) = change else { continue };
            let value = match change.value {
                BlockValue::Page(page) => Value::Image(page),
                BlockValue::PageInRecord => {
                    Value::Image(page_in_record(&found.bytes, found.end).unwrap())
                }
                BlockValue::Record { will_init } => {
                    Value::WalRecord { will_init, record: found.bytes.clone() }
                }
            };
            open.put(Key::rel_block(change.rel, change.block), found.end, value);
        }
        Ok(true)
    })
    .unwrap();
    open.freeze(Lsn(end.0 + 1))
}

fn owner() -> LayerOwner {
    let shard = TenantShardId::unsharded(TenantId([1; 16]));
    LayerOwner { shard, timeline: TimelineId([2; 16]) }
}

/// Bytes of the file that a merge writes of these values.
async fn merged(io: &SimIo, dir: &Path, frozen: &FrozenLayer, short: bool) -> u64 {
    let writer = DeltaWriter::create(io, dir, owner(), frozen.lsns().clone(), 0).await.unwrap();
    let mut writer = writer.pack_tightly();
    for (key, lsn, value) in frozen.entries() {
        let value = if short { stored_form(key, value) } else { value };
        writer.add(key, lsn, &value).await.unwrap();
    }
    writer.finish(Key::MIN..Key::MAX).await.unwrap().file_bytes
}

/// Bytes of the delta layer, without and with excerpts: as a checkpoint writes it, as a merge does.
fn layer_bytes(frozen: std::sync::Arc<FrozenLayer>) -> [u64; 4] {
    let options = SimOptions { steps_max: u64::MAX, ..SimOptions::default() };
    let mut world = SimWorld::new(7, options);
    let written = world.run(move |io| async move {
        let mut bytes = Vec::new();
        for (dir, short) in [("whole", false), ("short", true)] {
            let dir = Path::new(dir);
            io.create_dir(dir).await.unwrap();
            let form = |key, value| if short { stored_form(key, value) } else { value };
            bytes.push(frozen.write(&io, dir, owner(), form).await.unwrap().file_bytes);
        }
        for (dir, short) in [("whole-merged", false), ("short-merged", true)] {
            let dir = Path::new(dir);
            io.create_dir(dir).await.unwrap();
            bytes.push(merged(&io, dir, &frozen, short).await);
        }
        bytes
    });
    written.unwrap_or_else(|error| panic!("{error}")).try_into().unwrap()
}

/// Runs a load and prints what its delta layer takes; gives the part that excerpts save of it, in
/// percent: as a checkpoint writes it, as a merge does.
fn saved(
    name: &str,
    settings: &[&str],
    prepare: impl FnOnce(&PgCluster),
    load: impl FnOnce(&PgCluster),
) -> [f64; 2] {
    let root = Root::new(&format!("excerpts-{name}"));
    let (cluster, from) = primary(&root, settings, prepare, load);
    let frozen = ingest(&cluster.data().join("pg_wal"), from);
    let (mut whole, mut short) = (0, 0);
    for (key, _, value) in frozen.entries() {
        whole += value.encoded_len();
        short += stored_form(key, value).encoded_len();
    }
    let wal = frozen.lsns().end.bytes_since(frozen.lsns().start);
    let [lz4, lz4_short, zstd, zstd_short] = layer_bytes(frozen);
    let percent = |whole: u64, short: u64| 100.0 * (1.0 - short as f64 / whole as f64);
    let parts = [percent(lz4, lz4_short), percent(zstd, zstd_short)];
    println!(
        "{name}: WAL {wal}; values {whole} -> {short}; lz4 {lz4} -> {lz4_short} ({:.1} %); \
         zstd {zstd} -> {zstd_short} ({:.1} %)",
        parts[0], parts[1]
    );
    assert!(lz4_short <= lz4 && zstd_short <= zstd, "excerpts take more room");
    parts
}

const INSERTS: &str = "
CREATE TABLE r (a int, b text, c int);
CREATE INDEX r_a ON r (a); CREATE INDEX r_b ON r (b); CREATE INDEX r_c ON r (c);
INSERT INTO r SELECT hashint4(i), md5(i::text), hashint4(-i) FROM generate_series(1, 20000) i;
";

fn inserts(cluster: &PgCluster) {
    let more = "INSERT INTO r SELECT hashint4(i), md5(i::text), hashint4(-i)
        FROM generate_series(20001, 100000) i";
    cluster.psql("postgres", more).unwrap();
}

fn tpcb(cluster: &PgCluster) {
    cluster.pgbench("postgres", &["-c", "4", "-j", "1", "-t", "15000"], |_| {}).unwrap();
}

#[test]
fn delta_layers_of_random_inserts_are_smaller() {
    let prepare = |cluster: &PgCluster| drop(cluster.psql("postgres", INSERTS).unwrap());
    for (name, setting) in [("inserts-off", "full_page_writes = off"), ("inserts-on", "")] {
        let parts = saved(name, &[setting], prepare, inserts);
        assert!(parts.iter().all(|part| *part > 10.0), "{name}: {parts:?}");
    }
}

#[test]
fn delta_layers_of_pgbench_are_smaller() {
    let prepare = |cluster: &PgCluster| cluster.pgbench_init("postgres", 5).unwrap();
    for (name, setting) in [("tpcb-off", "full_page_writes = off"), ("tpcb-on", "")] {
        let parts = saved(name, &[setting], prepare, tpcb);
        assert!(parts.iter().all(|part| *part > 0.2), "{name}: {parts:?}");
    }
}

/// A mistake in the place of an excerpt: the wanted block's own data are left out. `None` if there
/// are none.
fn mistake(bytes: &[u8], rel: RelTag, block: BlockNumber) -> Option<Bytes> {
    let mut record = Record::parse(bytes).ok()?;
    let wanted = |found: &&mut BlockRef<'_>| found.rel == rel && found.block == block;
    let found = record.blocks.iter_mut().find(wanted).filter(|found| !found.data.is_empty())?;
    found.data = &[];
    Some(record.encode()?.into())
}

/// Every mistake is found out, in every kind of record in which one was made.
#[test]
fn the_judge_sees_mistakes() {
    let root = Root::new("excerpts-judge");
    let settings = ["wal_keep_size = 10GB".to_owned(), "autovacuum = off".to_owned()];
    let mut cluster = PgCluster::init(&root.join("primary"), false, &settings).unwrap();
    copy(cluster.data(), &root.join("base/data"));
    let from: Lsn =
        control_data(cluster.data(), "Latest checkpoint's REDO location").unwrap().parse().unwrap();
    cluster.start().unwrap();
    workload::rare(&cluster).unwrap();
    cluster.stop(StopMode::Fast).unwrap();

    let redo = RedoSettings { hint_bits_logged: false };
    let scratch = root.join("redo");
    std::fs::create_dir_all(&scratch).unwrap();
    let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/walredo/neon_walredo.so");
    let child = ChildRedo::new(ChildSettings {
        tenant: "judge".to_owned(),
        postgres_bin: bin_dir().join("postgres"),
        walredo_so: library,
        scratch_dir: scratch,
        cpu: None,
        redo,
        timeout: Duration::from_secs(60),
    });
    let base = scan(&root.join("base/data")).unwrap();
    // By kind: excerpts asked for, mistakes made.
    let made: RefCell<BTreeMap<(u8, u8), (u64, u64)>> = RefCell::new(BTreeMap::new());
    let judged = |bytes: &[u8], rel: RelTag, block: BlockNumber| {
        let right = excerpt(bytes, rel, block)?;
        let mut made = made.borrow_mut();
        let (asked, mistakes) = made.entry((bytes[17], bytes[16] & 0xF0)).or_default();
        *asked += 1;
        // One of a kind: most of them end the process, and whatever it was about to do is tried anew.
        if *mistakes > 0 {
            return Some(right);
        }
        let wrong = mistake(bytes, rel, block);
        *mistakes += u64::from(wrong.is_some());
        Some(wrong.unwrap_or(right))
    };
    let mut compare = Compare::new(&child, redo, &base).with_excerpt(Box::new(judged));
    read_wal(&cluster.data().join("pg_wal"), from, |record| {
        block_on(compare.record(&record))?;
        Ok(true)
    })
    .unwrap();
    let report = block_on(compare.finish());
    block_on(child.shutdown());
    print!("{}", report.table());
    let mut mistakes = 0;
    for (kind, (asked, wrong)) in made.borrow().iter() {
        println!("{kind:?}: {asked} excerpts, {wrong} mistakes");
        assert!(report.kinds[kind].different >= *wrong, "{kind:?}: mistakes pass for excerpts");
        mistakes += wrong;
    }
    assert!(mistakes >= 4, "{:?}", made.borrow());
    let clean = |kind: &(u8, u8)| !made.borrow().contains_key(kind);
    let others = report.kinds.iter().filter(|(kind, _)| clean(kind));
    assert!(others.into_iter().all(|(_, sums)| sums.different == 0), "others have differences");
}
