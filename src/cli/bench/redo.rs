//! `pgstrata bench redo`: how fast a page is rebuilt from heap inserts, one request after the
//! other, in this process or by a wal-redo process of stock PostgreSQL.
//!
//! `make bench` measures the same against bare pipes (`docs/benchmarks.md`); this is for a look at
//! one machine. Both engines must make the same page of the same records.

use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_lite::future::block_on;
use futures_util::future::LocalBoxFuture;

use super::report::Tally;
use crate::base::page::{PAGE_SIZE, page_lsn};
use crate::base::wal_record::{WAL_RECORD_CRC_AT, wal_record_crc};
use crate::base::{Lsn, RelNode};
use crate::cli::admin_client::CommandError;
use crate::cli::pg::bin_dir;
use crate::cli::scratch::Scratch;
use crate::cli::service::find_library;
use crate::redo::child::{ChildRedo, ChildSettings};
use crate::redo::native::run::NativeRedo;
use crate::redo::{Redo, RedoError, RedoRequest, RedoSettings};

/// What applies the records.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    /// This program.
    Native,
    /// A wal-redo process.
    Child,
}

/// `pgstrata bench redo`.
#[derive(clap::Args, Debug)]
pub struct RedoArgs {
    /// What applies the records.
    #[arg(long, value_enum, default_value = "native")]
    engine: Engine,
    /// Records that make a page: 1 to 150.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=150))]
    records: u16,
    /// Seconds.
    #[arg(short = 'T', long, default_value_t = 5.0)]
    time: f64,
    /// The wal-redo library; as a rule it is found beside this program.
    #[arg(long, value_name = "FILE")]
    library: Option<std::path::PathBuf>,
    /// Print the figures as JSON.
    #[arg(long)]
    json: bool,
}

const SETTINGS: RedoSettings = RedoSettings { hint_bits_logged: false };
const REL: RelNode = RelNode { spc: 1663, db: 5, rel: 16384 };
const TUPLE_BYTES: u16 = 20;

/// Stands where a process would: native redo needs none for these records.
struct NoProcess;

impl Redo for NoProcess {
    fn redo(&self, _: RedoRequest) -> LocalBoxFuture<'_, Result<Bytes, RedoError>> {
        let problem = "native redo does not know these records".to_owned();
        Box::pin(async { Err(RedoError::Child { problem }) })
    }
}

/// Runs it and prints the figures.
///
/// # Errors
/// Redo fails, or makes another page than the records say.
pub fn run(args: &RedoArgs) -> Result<(), CommandError> {
    if !(args.time > 0.0 && args.time < 1e7) {
        return Err("--time: a number above 0".into());
    }
    let time = Duration::from_secs_f64(args.time);
    let request = request(args.records);
    let (tally, took) = match args.engine {
        Engine::Native => measure(&NativeRedo::new(NoProcess, SETTINGS), &request, time)?,
        Engine::Child => with_process(args, &request, time)?,
    };
    let summary = tally.summary(took);
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&summary)?),
        false => println!("{} records to a page\n{summary}", args.records),
    }
    Ok(())
}

fn with_process(
    args: &RedoArgs,
    request: &RedoRequest,
    time: Duration,
) -> Result<(Tally, Duration), CommandError> {
    let root = Scratch::new("bench")?;
    let child = ChildRedo::new(ChildSettings {
        tenant: "bench".to_owned(),
        postgres_bin: bin_dir().join("postgres"),
        walredo_so: std::path::absolute(find_library(&args.library.clone().unwrap_or_default())?)?,
        scratch_dir: root.to_owned(),
        cpu: None,
        redo: SETTINGS,
        timeout: Duration::from_secs(60),
    });
    let child = Rc::new(child);
    let result = measure(&*child, request, time);
    block_on(child.shutdown());
    result
}

fn measure(
    redo: &impl Redo,
    request: &RedoRequest,
    time: Duration,
) -> Result<(Tally, Duration), CommandError> {
    let mut tally = Tally::default();
    let last = request.records.last().map_or(Lsn::INVALID, |(lsn, _)| *lsn);
    // The first one starts what there is to start.
    let first = block_on(redo.redo(request.clone()))?;
    if first.len() != PAGE_SIZE || page_lsn(&first) != last {
        return Err(format!("redo made a page of {}, not of {last}", page_lsn(&first)).into());
    }
    let begin = Instant::now();
    while begin.elapsed() < time {
        let start = Instant::now();
        let page = block_on(redo.redo(request.clone()))?;
        tally.done(start.elapsed());
        if page != first {
            return Err("the same records made another page".into());
        }
    }
    Ok((tally, begin.elapsed()))
}

/// Heap inserts into a new page.
fn request(records: u16) -> RedoRequest {
    let records = (1..=records).map(|line| (Lsn(0x1000 + 8 * u64::from(line)), insert(line)));
    RedoRequest { rel: REL.fork(0), block: 0, base: None, records: records.collect() }
}

/// A WAL record of the heap: tuple number `line` of block 0. The first one initialises the page.
/// Layout: `XLogRecord`, block header and relation, short header of main data, `xl_heap_header`
/// and tuple, `xl_heap_insert`.
fn insert(line: u16) -> Bytes {
    let first = line == 1;
    let mut body = vec![0, if first { 0x60 } else { 0x20 }];
    body.extend((5 + 1 + TUPLE_BYTES).to_le_bytes());
    for number in [REL.spc, REL.db, REL.rel, 0] {
        body.extend(number.to_le_bytes());
    }
    body.extend([255, 3]);
    body.extend([1, 0, 0, 8, 24, 0]);
    body.extend((0..TUPLE_BYTES).map(|byte| byte as u8));
    body.extend(line.to_le_bytes());
    body.push(0);
    let mut record = (24 + body.len() as u32).to_le_bytes().to_vec();
    record.extend([0; 12]);
    record.extend([if first { 0x80 } else { 0 }, 10, 0, 0, 0, 0, 0, 0]);
    record.extend(body);
    let crc = wal_record_crc(&record).unwrap_or(0).to_le_bytes();
    record.iter_mut().skip(WAL_RECORD_CRC_AT).zip(crc).for_each(|(byte, new)| *byte = new);
    record.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_rebuilt_natively() {
        let native = NativeRedo::new(NoProcess, SETTINGS);
        for records in [1, 150] {
            let (tally, _) =
                measure(&native, &request(records), Duration::from_millis(20)).unwrap();
            assert!(tally.answered() > 0);
        }
    }
}
