//! Whole loads: how much of them native redo does alone, and its CPU time for a record, with the
//! pages in hand, against PostgreSQL's own recovery of the same WAL.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures_lite::future::block_on;
use nix::sys::resource::UsageWho;
use pgstrata::base::{BlockNumber, Lsn, RelTag};
use pgstrata::cli::pg::PgCluster;
use pgstrata::cli::tpcc;
use pgstrata::cli::verify_files::scan;
use pgstrata::redo::child::ChildRedo;
use pgstrata::redo::native::run::NativeRedo;
use pgstrata::redo::{Redo, RedoRequest, RedoSettings};
use pgstrata::wal::page::WalLayout;
use pgstrata::wal::record::Record;
use pgstrata::wal::stream::{Event, WalStream};

use super::child_settings;
use crate::common::recorded::{Recorded, SEGMENT};
use crate::common::{Result, Rounds, Scratch, cpu_time, sized};

const REDO: RedoSettings = RedoSettings { hint_bits_logged: false };

/// What WAL does to pages.
#[derive(Default)]
struct Chains {
    requests: Vec<RedoRequest>,
    /// Records in the WAL.
    records: u64,
    /// Of these, records that change pages.
    page_records: u64,
}

/// For each page all records that name it, and the page of the backup unless the first of them
/// makes it anew.
fn chains(recorded: &Recorded) -> Result<Chains> {
    let files = scan(&recorded.backup.join("data"))?;
    let mut pages: BTreeMap<(RelTag, BlockNumber), RedoRequest> = BTreeMap::new();
    let mut chains = Chains::default();
    let layout = WalLayout { segment_bytes: SEGMENT, system_id: None };
    let mut stream = WalStream::new(recorded.start()?, layout)?;
    let mut wal = recorded.wal()?;
    while let Event::Record(found) = stream.next(&mut wal)? {
        let record = Record::parse(&found.bytes)?;
        chains.records += 1;
        chains.page_records += u64::from(!record.blocks.is_empty());
        for named in &record.blocks {
            let (rel, block) = (named.rel, named.block);
            let page = pages.entry((rel, block)).or_insert_with(|| RedoRequest {
                rel,
                block,
                base: None,
                records: Vec::new(),
            });
            if page.records.is_empty() && !named.replaces_page() {
                let file = files.forks.get(&rel).map(|fork| fork.page(block)).transpose()?;
                page.base = Some(file.flatten().unwrap_or_else(|| vec![0; 8192]).into());
            }
            page.records.push((found.end, found.bytes.clone()));
        }
    }
    if wal.has_remaining() {
        return Err("not all of the WAL was read".into());
    }
    chains.requests = pages.into_values().collect();
    Ok(chains)
}

/// All pages once, as the node rebuilds them; prints what went to the process.
fn coverage(scratch: &Path, chains: &Chains) -> Result<()> {
    let redo = NativeRedo::new(ChildRedo::new(child_settings(scratch)?), REDO);
    for request in &chains.requests {
        block_on(redo.redo(request.clone()))?;
    }
    let counters = redo.counters();
    let share = |part: u64, rest: u64| 100.0 * part as f64 / (part + rest).max(1) as f64;
    let (native, child) = (counters.native_records(), counters.child_records());
    let pages = (counters.pages_native.get(), counters.pages_child.get());
    println!(
        "  without a process: {:.3} % of {} records (each once for every page that it changes), \
         {:.3} % of {} pages rebuilt; {} records did not fit",
        share(native, child),
        native + child,
        share(pages.0, pages.1),
        pages.0 + pages.1,
        counters.misfits.get()
    );
    block_on(redo.inner().shutdown());
    Ok(())
}

/// CPU seconds to apply all records to the pages, checksums included. The kernel may count a
/// thread's time in ticks of 10 ms, so this goes on for many of them.
fn native_seconds(chains: &Chains) -> Result<f64> {
    const LONG_ENOUGH: Duration = Duration::from_millis(500);
    let redo = NativeRedo::new(super::Nobody, REDO);
    let mut requests: Vec<RedoRequest> = chains.requests.clone();
    let begin = Instant::now();
    // What the process is needed for is no work of native redo.
    requests.retain(|request| block_on(redo.redo(request.clone())).is_ok());
    let once = begin.elapsed().max(Duration::from_micros(1));
    let passes = LONG_ENOUGH.div_duration_f64(once).ceil().clamp(1.0, 1000.0) as usize;
    let work = vec![requests; passes];
    let before = cpu_time(UsageWho::RUSAGE_THREAD)?;
    for request in work.into_iter().flatten() {
        std::hint::black_box::<Bytes>(block_on(redo.redo(request))?);
    }
    let took = cpu_time(UsageWho::RUSAGE_THREAD)?.saturating_sub(before);
    Ok(took.as_secs_f64() / passes as f64)
}

fn compare(
    name: &str,
    full_page_writes: bool,
    prepare: impl FnOnce(&PgCluster) -> Result<()>,
    load: impl FnOnce(&PgCluster, &Path) -> Result<()>,
) -> Result<()> {
    let scratch = Scratch::new("redo-load")?;
    let root = scratch.path();
    let recorded = Recorded::make(root, full_page_writes, prepare, |primary| load(primary, root))?;
    let chains = chains(&recorded)?;
    let wal: Lsn = Lsn(recorded.mark.end.0 - recorded.start()?.0);
    let on = if full_page_writes { "on" } else { "off" };
    println!(
        "{name}, full_page_writes = {on}: {:.1} MB of WAL, {} records, {} of them change {} pages",
        wal.0 as f64 / 1e6,
        chains.records,
        chains.page_records,
        chains.requests.len()
    );
    coverage(root, &chains)?;
    let [mut theirs, mut ours, mut ratio, mut net] = std::array::from_fn(|_| Rounds::default());
    for _ in 0..sized(1, 3) {
        let all = recorded.recover(root)?.cpu.as_secs_f64();
        let nothing = recorded.recover_nothing(root)?.as_secs_f64();
        let native = native_seconds(&chains)?;
        let per_record = |seconds: f64, records: u64| seconds * 1e6 / records.max(1) as f64;
        let (their, our) =
            (per_record(all, chains.records), per_record(native, chains.page_records));
        theirs.add(their);
        ours.add(our);
        ratio.add(their / our);
        net.add(per_record(all - nothing, chains.records) / our);
    }
    println!("  PostgreSQL's recovery: {} us of CPU for a record", theirs.text(2));
    println!("  native, page in hand:  {} us of CPU for a record that changes pages", ours.text(2));
    println!(
        "  recovery / native:     {} x; without start and end of the server {} x",
        ratio.text(1),
        net.text(1)
    );
    Ok(())
}

/// Runs and prints everything.
pub fn run() -> Result<()> {
    let transactions = sized("50", "5000");
    for full_page_writes in sized(&[true][..], &[true, false]).iter().copied() {
        compare(
            "pgbench",
            full_page_writes,
            |primary| Ok(primary.pgbench_init("postgres", sized(1, 10))?),
            |primary, _| {
                let args = ["-n", "-c", "4", "-j", "1", "-t", transactions];
                primary.pgbench("postgres", &args, |_| ())?;
                Ok(primary.psql("postgres", "VACUUM").map(drop)?)
            },
        )?;
        compare(
            "like TPC-C",
            full_page_writes,
            |primary| Ok(tpcc::init(primary, sized(1, 4))?),
            |primary, root| {
                tpcc::run(primary, &root.join("tpcc"), sized(1, 4), sized(20, 1500))?;
                Ok(primary.psql(tpcc::DATABASE, "VACUUM").map(drop)?)
            },
        )?;
    }
    Ok(())
}
