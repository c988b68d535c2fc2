//! Whole loads: how much of them native redo does alone, and its CPU time for a record, with the
//! pages in hand, against PostgreSQL's own recovery of the same WAL.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use futures_lite::future::block_on;
use nix::sys::resource::UsageWho;
use pgstrata::base::page::{PAGE_SIZE, Page};
use pgstrata::base::{BlockNumber, Lsn, RelTag};
use pgstrata::cli::pg::PgCluster;
use pgstrata::cli::tpcc;
use pgstrata::cli::verify_files::scan;
use pgstrata::redo::child::ChildRedo;
use pgstrata::redo::native::apply_bytes;
use pgstrata::redo::native::run::NativeRedo;
use pgstrata::redo::record::check;
use pgstrata::redo::{Redo, RedoRequest, RedoSettings};
use pgstrata::wal::page::WalLayout;
use pgstrata::wal::record::Record;
use pgstrata::wal::stream::{Event, WalStream};

use super::child_settings;
use crate::common::recorded::{Recorded, SEGMENT};
use crate::common::{Result, Rounds, Scratch, cpu_time, sized};

const REDO: RedoSettings = RedoSettings { hint_bits_logged: false };

/// A record, and one of the pages that it changes.
struct Step {
    /// The page's request.
    at: usize,
    target: (RelTag, BlockNumber),
    lsn: Lsn,
    record: Bytes,
}

/// What WAL does to pages.
#[derive(Default)]
struct Chains {
    /// A page each.
    requests: Vec<RedoRequest>,
    /// The same in the order of the WAL.
    steps: Vec<Step>,
    /// Records in the WAL.
    records: u64,
    /// Of these, records that change pages.
    page_records: u64,
}

/// For each page all records that name it, and the page of the backup unless the first of them
/// makes it anew.
fn chains(recorded: &Recorded) -> Result<Chains> {
    let files = scan(&recorded.backup.join("data"))?;
    let mut pages: BTreeMap<(RelTag, BlockNumber), usize> = BTreeMap::new();
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
            let at = *pages.entry((rel, block)).or_insert_with(|| {
                let records = Vec::new();
                chains.requests.push(RedoRequest { rel, block, base: None, records });
                chains.requests.len() - 1
            });
            let page = &mut chains.requests[at];
            let record = found.bytes.clone();
            chains.steps.push(Step { at, target: (rel, block), lsn: found.end, record });
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

/// Seconds to rebuild all pages, checksums included. As in the node, what is needed for a page has
/// just come to memory when its turn is there: base and records are copied before, untimed, a few
/// pages at a time, so that they fit the core's caches.
fn native_seconds(chains: &Chains) -> Result<f64> {
    let redo = NativeRedo::new(super::Nobody, REDO);
    // What the process is needed for is no work of native redo.
    let is_native = |request: &&RedoRequest| block_on(redo.redo((*request).clone())).is_ok();
    let requests: Vec<&RedoRequest> = chains.requests.iter().filter(is_native).collect();
    let (mut took, mut passes) = (Duration::ZERO, 0);
    while took < Duration::from_millis(500) {
        for some in requests.chunks(8) {
            let some: Vec<RedoRequest> = some.iter().map(|request| copied(request)).collect();
            let begin = Instant::now();
            for request in some {
                std::hint::black_box::<Bytes>(block_on(redo.redo(request))?);
            }
            took += begin.elapsed();
        }
        passes += 1;
    }
    Ok(took.as_secs_f64() / f64::from(passes))
}

/// The same bytes at other places.
fn copied(request: &RedoRequest) -> RedoRequest {
    let records: Vec<u8> =
        request.records.iter().flat_map(|(_, record)| record.iter().copied()).collect();
    let mut records = Bytes::from(records);
    RedoRequest {
        base: request.base.as_deref().map(Bytes::copy_from_slice),
        records: request
            .records
            .iter()
            .map(|(lsn, record)| (*lsn, records.split_to(record.len())))
            .collect(),
        ..*request
    }
}

/// CPU seconds to apply the same records in the order of the WAL, each to its page in memory, as
/// recovery does.
fn in_order_seconds(chains: &Chains) -> Result<f64> {
    let start = |request: &RedoRequest| -> Result<Box<Page>> {
        let page = request.base.as_ref().map_or_else(|| vec![0; PAGE_SIZE], |base| base.to_vec());
        Ok(page.try_into().map_err(|_| "a page of another size")?)
    };
    let redo = NativeRedo::new(super::Nobody, REDO);
    let rebuilt = |request: &RedoRequest| block_on(redo.redo(request.clone())).ok();
    let wanted: Vec<Option<Bytes>> = chains.requests.iter().map(rebuilt).collect();
    // What the process is needed for is no work of native redo.
    let is_native = |step: &&Step| wanted[step.at].is_some();
    let steps: Vec<&Step> = chains.steps.iter().filter(is_native).collect();
    let (mut took, mut passes) = (Duration::ZERO, 0);
    while took < Duration::from_millis(500) {
        let mut pages = chains.requests.iter().map(start).collect::<Result<Vec<_>>>()?;
        let before = cpu_time(UsageWho::RUSAGE_THREAD)?;
        for Step { at, target, lsn, record } in steps.iter().copied() {
            check(*lsn, target.0, target.1, record)?;
            apply_bytes(&mut pages[*at], record, *target, *lsn, &REDO)?;
        }
        took += cpu_time(UsageWho::RUSAGE_THREAD)?.saturating_sub(before);
        passes += 1;
        for (page, wanted) in pages.iter().zip(&wanted) {
            if wanted.as_ref().is_some_and(|wanted| wanted[..] != page[..]) {
                return Err("the order of the WAL makes another page".into());
            }
        }
    }
    Ok(took.as_secs_f64() / f64::from(passes))
}

fn compare(
    name: &str,
    full_page_writes: bool,
    prepare: impl FnOnce(&PgCluster) -> Result<()>,
    load: impl FnOnce(&PgCluster, &Path) -> Result<()>,
) -> Result<()> {
    let scratch = Scratch::new("redo-load")?;
    let root = &scratch;
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
    let [mut theirs, mut alone] = std::array::from_fn(|_| Rounds::default());
    let mut ours = [(); 2].map(|()| std::array::from_fn::<_, 3, _>(|_| Rounds::default()));
    for _ in 0..sized(1, 3) {
        let all = recorded.recover(root)?.cpu.as_secs_f64();
        let nothing = recorded.recover_nothing(root)?.as_secs_f64();
        let per_record = |seconds: f64, records: u64| seconds * 1e6 / records.max(1) as f64;
        let their = [all, all - nothing].map(|seconds| per_record(seconds, chains.records));
        theirs.add(their[0]);
        alone.add(their[1]);
        let native = [in_order_seconds(&chains)?, native_seconds(&chains)?];
        for (rounds, seconds) in ours.iter_mut().zip(native) {
            let our = per_record(seconds, chains.page_records);
            for (rounds, value) in rounds.iter_mut().zip([our, their[0] / our, their[1] / our]) {
                rounds.add(value);
            }
        }
    }
    println!(
        "  CPU for a record, us: PostgreSQL's recovery {}, without start and end of the server {}",
        theirs.text(2),
        alone.text(2)
    );
    for (name, [our, ratio, net]) in ["in the WAL's order", "page after page"].iter().zip(&ours) {
        println!(
            "  native, {name:18} {} us for a record that changes pages; recovery / native {} x, \
             without start and end {} x",
            our.text(2),
            ratio.text(1),
            net.text(1)
        );
    }
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
