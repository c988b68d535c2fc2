//! Native redo on WAL that a real PostgreSQL 15 wrote: every page version equals the wal-redo
//! child's byte for byte, also from what is stored of records of several blocks (`pgstrata redo
//! compare`), and damaged records and pages do no harm.

#![allow(clippy::disallowed_methods, reason = "a test that runs programs")]

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use pgstrata::base::page::{PAGE_SIZE, Page};
use pgstrata::base::{Lsn, RelTag};
use pgstrata::cli::pg::{PgCluster, StopMode, control_data};
use pgstrata::cli::redo_compare::read_wal;
use pgstrata::cli::workload;
use pgstrata::fuzz::native_redo_seed;
use pgstrata::redo::failed::{self, Failed, Kept};
use pgstrata::redo::native::apply;
use pgstrata::redo::protocol::encode_request;
use pgstrata::redo::{RedoRequest, RedoSettings};
use pgstrata::wal::record::{BlockRef, Record};

mod common;

use common::Root;

/// A table of the comparison, by kind.
type Table<const N: usize> = HashMap<String, [u64; N]>;

/// Lines of a name and `N` numbers.
fn table<'a, const N: usize>(lines: impl Iterator<Item = &'a str>) -> Table<N> {
    let row = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.len().checked_sub(N).filter(|at| *at > 0)?;
        let numbers: Vec<u64> = words[at..].iter().filter_map(|word| word.parse().ok()).collect();
        Some((words[..at].join(" "), <[u64; N]>::try_from(numbers).ok()?))
    };
    lines.filter_map(row).collect()
}

/// Outcome of a comparison.
struct Compared {
    /// By kind: changes, native, skipped, misfits, different.
    kinds: Table<5>,
    /// Of records of several blocks, by kind: changes, excerpts, bytes, bytes stored.
    excerpts: Table<4>,
    /// Records in the WAL.
    records: u64,
    /// The lines about coverage: load, and shares of records, page versions and pages in percent.
    loads: Vec<(String, [f64; 3])>,
    /// Pages of stock recovery that were compared.
    recovered: u64,
}

/// Runs the comparison. Stock recovery must have been asked at the end of each load.
fn compare(args: &[&str]) -> Compared {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
    let output = command.args(["redo", "compare"]).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    println!("{args:?}\n{text}");
    assert!(output.status.success(), "{args:?} failed\n{text}\n{errors}");
    let is_second = |line: &&str| line.starts_with("of several blocks");
    let kinds: Table<5> = table(text.lines().take_while(|line| !is_second(line)));
    let excerpts: Table<4> = table(text.lines().skip_while(|line| !is_second(line)));
    let [changes, native, _, misfits, different] = kinds["all"];
    assert!(native <= changes && misfits == 0 && different == 0);
    let [changes, shortened, whole, stored] = excerpts["all"];
    assert!(0 < shortened && shortened < changes && stored < whole, "{:?}", excerpts["all"]);
    let numbers = |line: &str| -> Vec<f64> {
        line.split([' ', ';', ',']).filter_map(|word| word.parse().ok()).collect()
    };
    let load = |line: &str| -> Option<(String, [f64; 3])> {
        let (name, rest) = line.split_once(": without a process ")?;
        let shares: Vec<f64> = numbers(rest).into_iter().step_by(2).collect();
        Some((name.to_owned(), shares.try_into().ok()?))
    };
    let loads: Vec<_> = text.lines().filter_map(load).collect();
    let recoveries: Vec<f64> = text
        .lines()
        .filter_map(|line| line.strip_prefix("stock recovery to "))
        .map(|line| numbers(line.split_once("): ").unwrap().1)[0])
        .collect();
    assert!(!recoveries.is_empty() && recoveries.iter().all(|pages| *pages > 100.0), "{text}");
    let records = text.lines().find_map(|line| line.strip_suffix(" records")).unwrap();
    let recovered = recoveries.iter().sum::<f64>() as u64;
    Compared { kinds, excerpts, records: records.parse().unwrap(), loads, recovered }
}

/// What the product promises: at least 99.5 % of records, 98 % of pages rebuilt, in each round.
fn covers(compared: &Compared, load: &str, rounds: usize) {
    let of = |one: &&(String, [f64; 3])| one.0 == load;
    assert_eq!(compared.loads.iter().filter(of).count(), rounds, "{load}");
    for (_, [records, versions, pages]) in compared.loads.iter().filter(of) {
        assert!(*records >= 99.5 && *versions >= 98.0 && *pages >= 98.0, "{:?}", compared.loads);
    }
}

/// A comparison of less than was asked for is a failure, however equal it is.
#[test]
fn a_comparison_that_is_too_small_fails() {
    let compared = |at_least: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
        let load = ["--workload", "pgbench", "--scale", "1", "--transactions", "20"];
        command.args(["redo", "compare"]).args(load).args(["--at-least", at_least]);
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let (well, text) = compared("1000");
    assert!(well && text.contains(" records that change pages were compared\n"), "{text}");
    let (well, text) = compared("1000000000");
    assert!(!well && text.contains("not 1000000000 as asked for"), "{text}");
}

#[test]
fn pgbench_never_needs_the_child() {
    let compared = compare(&["--workload", "pgbench", "--scale", "5", "--transactions", "5000"]);
    let [changes, native, ..] = compared.kinds["all"];
    assert!(changes > 150_000, "{changes}");
    assert_eq!(changes, native);
    covers(&compared, "pgbench", 1);
}

#[test]
fn warehouses_hardly_need_the_child() {
    let args = ["--workload", "tpcc", "--warehouses", "2", "--orders", "600", "--rounds", "2"];
    let compared = compare(&args);
    let [changes, ..] = compared.kinds["all"];
    assert!(changes > 150_000, "{changes}");
    covers(&compared, "like TPC-C", 2);
}

/// Every kind of record that is applied natively, PostgreSQL's own images as a third judge.
#[test]
fn every_kind_is_equal() {
    let compared = compare(&["--workload", "mixed", "--set", "wal_consistency_checking=all"]);
    let Compared { kinds, records, recovered, .. } = compared;
    let [changes, native, ..] = kinds["all"];
    assert!(changes > 500_000 && native > 300_000, "{changes} {native}");
    assert!(records > 250_000 && recovered > 5_000, "{records} {recovered}");
    for kind in [
        "XLOG B0",
        "Heap2 10",
        "Heap2 20",
        "Heap2 30",
        "Heap2 40",
        "Heap2 50",
        "Heap2 60",
        "Heap2 D0",
        "Heap 00",
        "Heap 10",
        "Heap 20",
        "Heap 40",
        "Heap 50",
        "Heap 60",
        "Heap 70",
        "Heap 80",
        "Heap A0",
        "Btree 00",
        "Btree 10",
        "Btree 20",
        "Btree 30",
        "Btree 40",
        "Btree 50",
        "Btree 60",
        "Btree 70",
        "Btree 80",
        "Btree 90",
        "Btree A0",
        "Btree B0",
        "Btree C0",
        "Btree E0",
        "Sequence 00",
        "Generic 00",
        "BRIN 00",
        "BRIN 10",
        "BRIN 20",
        "BRIN 30",
        "BRIN 40",
        "BRIN 50",
        "BRIN 90",
        "BRIN A0",
    ] {
        let [changes, native, ..] = kinds.get(kind).copied().unwrap_or_default();
        assert!(changes > 0, "the load has no record of kind {kind}");
        assert_eq!(changes, native, "{kind}");
    }
}

/// Without images, from the pages of the data directory on; page LSNs where hints are logged.
#[test]
fn without_images_with_checksums() {
    let args = ["--workload", "mixed", "--data-checksums", "--set", "full_page_writes=off"];
    let compared = compare(&args);
    let [changes, ..] = compared.kinds["all"];
    assert!(changes > 500_000 && compared.records > 250_000, "{changes} {}", compared.records);
    shortened(&compared.excerpts, &SHORTENED);
}

/// Kinds of records of several blocks of which excerpts must have been made.
const SHORTENED: [&str; 13] = [
    "Heap 20",
    "Btree 10",
    "Btree 30",
    "Btree 40",
    "BRIN 20",
    "Generic 00",
    "Gin 20",
    "Gin 30",
    "Gin 60",
    "Gist 30",
    "Hash 20",
    "Hash 30",
    "Hash 80",
];

/// What is stored of records of several blocks gives the same pages: with many images, with hints
/// logged; by a workload of another size, which scales by more than its number of rows.
#[test]
fn excerpts_with_images() {
    let load = ["--workload", "mixed", "--size", "2"];
    let hints = ["--set", "wal_log_hints=on", "--set", "max_wal_size=32MB"];
    let compared = compare(&[load, hints].concat());
    shortened(&compared.excerpts, &SHORTENED);
    shortened(&compared.excerpts, &["Heap2 40", "Btree 80"]);
}

fn shortened(excerpts: &Table<4>, kinds: &[&str]) {
    for kind in kinds {
        let [changes, shortened, whole, stored] = excerpts.get(*kind).copied().unwrap_or_default();
        assert!(shortened > 0 && stored < whole, "{kind}: {changes} changes, {shortened} excerpts");
    }
}

#[test]
fn compressed_images() {
    for method in ["pglz", "lz4", "zstd"] {
        let setting = format!("wal_compression={method}");
        let args = ["--workload", "pgbench", "--scale", "1", "--transactions", "300"];
        let hints = ["--set", "wal_log_hints=on", "--set", &setting];
        let kinds = compare(&[&args[..], &hints].concat()).kinds;
        assert!(kinds["XLOG A0"][0] > 0, "no image for a hint");
    }
}

/// A page of a table that begins empty, and the records that fill it.
fn heap_page_of(cluster: &PgCluster, from: Lsn, filenode: u32) -> RedoRequest {
    let mut request: Option<RedoRequest> = None;
    read_wal(&cluster.data().join("pg_wal"), from, |found| {
        let record = Record::parse(&found.bytes)?;
        let wanted = |block: &&BlockRef<'_>| {
            (block.rel.node.rel, block.rel.fork, block.block) == (filenode, 0, 0)
        };
        if let Some(block) = record.blocks.iter().find(wanted) {
            let (rel, block) = (block.rel, block.block);
            let request = request.get_or_insert_with(|| RedoRequest {
                rel,
                block,
                base: None,
                records: Vec::new(),
            });
            request.records.push((found.end, found.bytes));
        }
        Ok(true)
    })
    .unwrap();
    request.unwrap()
}

/// `pgstrata redo replay` on what a node keeps: one that works when it is tried again, one that
/// PostgreSQL refuses again, and a damaged file.
#[test]
fn kept_inputs_are_replayed() {
    let root = Root::new("replay");
    let mut cluster = PgCluster::init(&root.join("primary"), false, &[]).unwrap();
    let from: Lsn =
        control_data(cluster.data(), "Latest checkpoint's REDO location").unwrap().parse().unwrap();
    cluster.start().unwrap();
    let rows = "CREATE TABLE filled (id int);
        INSERT INTO filled VALUES (1); INSERT INTO filled VALUES (2); INSERT INTO filled VALUES (3);";
    cluster.psql("postgres", rows).unwrap();
    let filenode = cluster.value("postgres", "SELECT pg_relation_filenode('filled')").unwrap();
    cluster.stop(StopMode::Fast).unwrap();
    let whole = heap_page_of(&cluster, from, filenode.parse().unwrap());
    assert!(whole.records.len() >= 3, "{whole:?}");
    // Without the second of its records the third has no place on the page.
    let mut gap = whole.clone();
    gap.records.remove(1);
    let dir = root.join("kept");
    let keep = |request: &RedoRequest| {
        let mut frames = Vec::new();
        encode_request(request, &mut frames).unwrap();
        let redo = RedoSettings { hint_bits_logged: false };
        let problem = "no answer within 10s".to_owned();
        let input = Failed { tenant: "some".into(), redo, problem, frames: frames.into() };
        let Kept::New(path) = failed::keep(&dir, &input).unwrap() else { panic!("not kept") };
        path
    };
    let replay = |file: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pgstrata"));
        let output = command.args(["redo", "replay"]).arg(file).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (output.status.success(), text)
    };
    let (well, text) = replay(&keep(&whole));
    assert!(well && text.contains("tenant some") && text.contains("no answer within"), "{text}");
    let pages: Vec<_> =
        text.lines().filter_map(|line| Some(line.split_once(": page at ")?.1)).collect();
    assert!(pages.len() == 2 && pages[0] == pages[1], "{text}");
    let file = keep(&gap);
    let (well, text) = replay(&file);
    assert!(!well && text.contains("invalid max offset number"), "{text}");
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (well, text) = replay(&file);
    assert!(!well && text.contains("its checksum is wrong"), "{text}");
}

/// Small numbers from a fixed start.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % end.max(1)
    }

    /// Changes a byte, mostly by a little.
    fn damage(&mut self, bytes: &mut [u8]) {
        let at = self.below(bytes.len());
        let how = self.below(4);
        if let Some(byte) = bytes.get_mut(at) {
            *byte = match how {
                0 => byte.wrapping_add(1),
                1 => byte.wrapping_sub(1),
                2 => *byte ^ 1 << (at % 8),
                _ => 0xFF,
            };
        }
    }
}

/// The smallest records and pages of each kind, for the corpus of the fuzz target `native_redo`:
/// `RECORD_FUZZ_CORPUS=1 cargo test --test native_redo damage`.
#[derive(Default)]
struct Seeds(BTreeMap<(u8, u8, bool), Vec<Vec<u8>>>);

impl Seeds {
    const OF_A_KIND: usize = 3;

    fn add(&mut self, record: &Record, bytes: &[u8], lsn: Lsn, page: &Page) {
        let Some(seed) = native_redo_seed(bytes, lsn, page, true) else { return };
        let image = record.blocks.iter().any(|block| block.image.is_some());
        let kind = (record.header.rmgr, record.header.operation(), image);
        let kept = self.0.entry(kind).or_default();
        if kept.len() < Seeds::OF_A_KIND || kept.last().is_some_and(|last| seed.len() < last.len())
        {
            kept.push(seed);
            kept.sort_by_key(Vec::len);
            kept.truncate(Seeds::OF_A_KIND);
        }
    }

    fn write(&self) {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("test_data/fuzz/native_redo");
        std::fs::create_dir_all(&root).unwrap();
        for ((rmgr, operation, image), seeds) in &self.0 {
            for (number, seed) in seeds.iter().enumerate() {
                let image = if *image { "-image" } else { "" };
                let name = format!("{rmgr:02}-{operation:02x}{image}-{number}");
                std::fs::write(root.join(name), seed).unwrap();
            }
        }
    }
}

/// Damaged records and pages: whatever comes of it, it comes soon, and nothing panics.
#[test]
fn damage_does_no_harm() {
    const HINTS: RedoSettings = RedoSettings { hint_bits_logged: true };
    let root = Root::new("native-damage");
    let settings = ["wal_keep_size = 10GB".to_owned(), "autovacuum = off".to_owned()];
    let mut cluster = PgCluster::init(&root.join("primary"), false, &settings).unwrap();
    let from: Lsn =
        control_data(cluster.data(), "Latest checkpoint's REDO location").unwrap().parse().unwrap();
    cluster.start().unwrap();
    workload::rare(&cluster).unwrap();
    cluster.stop(StopMode::Fast).unwrap();
    let mut pages: HashMap<(RelTag, u32), Box<Page>> = HashMap::new();
    let (mut dice, mut tried, mut refused, mut longest) = (Dice(7), 0u64, 0u64, Duration::ZERO);
    let mut seen = 0u64;
    let mut try_one = |page: &mut Page, bytes: Vec<u8>, block: u8, lsn: Lsn| {
        let Ok(record) = Record::parse(&bytes) else { return };
        let Some(block) = record.block(block) else { return };
        let begin = Instant::now();
        refused += u64::from(apply(page, &record, block, lsn, &HINTS).is_err());
        longest = longest.max(begin.elapsed());
        tried += 1;
    };
    let mut seeds = Seeds::default();
    read_wal(&cluster.data().join("pg_wal"), from, |found| {
        let record = Record::parse(&found.bytes)?;
        seen += 1;
        for block in &record.blocks {
            let page =
                pages.entry((block.rel, block.block)).or_insert_with(|| Box::new([0; PAGE_SIZE]));
            seeds.add(&record, &found.bytes, found.end, page);
            // Common kinds now and then, rare ones always.
            let common = matches!(record.header.rmgr, 10 | 20) || record.header.info < 0x10;
            for _ in 0..if common && !seen.is_multiple_of(200) { 0 } else { 12 } {
                let mut bytes = found.bytes.to_vec();
                (0..=dice.below(3)).for_each(|_| dice.damage(&mut bytes[24..]));
                try_one(&mut page.clone(), bytes, block.id, found.end);
                let mut bad = page.clone();
                // The header and the line pointers, where damage has an effect.
                (0..=dice.below(3)).for_each(|_| dice.damage(&mut bad[8..200]));
                try_one(&mut bad, found.bytes.to_vec(), block.id, found.end);
            }
            apply(page, &record, block, found.end, &HINTS)?;
        }
        Ok(true)
    })
    .unwrap();
    if std::env::var_os("RECORD_FUZZ_CORPUS").is_some() {
        seeds.write();
    }
    println!("{seen} records; {tried} damaged, {refused} refused, the longest took {longest:?}");
    assert!(tried > 100_000 && refused > tried / 20, "{tried} {refused}");
    assert!(longest < Duration::from_secs(1), "{longest:?}");
}
