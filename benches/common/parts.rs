//! What taking in WAL costs, part by part: each part alone over the same WAL, on one thread, in
//! its CPU time, without I/O.

use bytes::Bytes;
use nix::sys::resource::UsageWho;
use pgstrata::base::lsn::Lsn;
use pgstrata::base::{Key, Value};
use pgstrata::layers::OpenLayer;
use pgstrata::shard::apply::{Apply, Sink, touched_forks};
use pgstrata::shard::sizes::Sizes;
use pgstrata::wal::change::Change;
use pgstrata::wal::decode::{decode_into, decode_or_take, page_in_record};
use pgstrata::wal::page::WalLayout;
use pgstrata::wal::stream::{Event, StreamRecord, WalStream};

use super::recorded::SEGMENT;
use super::{MB, Result, cpu_time, sized};

const CHUNK: usize = 128 * 1024;

struct OpenSink<'a> {
    open: &'a mut OpenLayer,
    start: Lsn,
}

impl Sink for OpenSink<'_> {
    fn put(&mut self, key: Key, lsn: Lsn, value: Value) {
        self.open.put(key, lsn, value);
    }

    fn put_record(&mut self, key: Key, lsn: Lsn, will_init: bool) {
        self.open.put_record(key, lsn, self.start, will_init);
    }

    fn put_page(&mut self, key: Key, lsn: Lsn) {
        self.open.put_page(key, lsn, self.start, page_in_record);
    }
}

/// Cuts the WAL into records; `hold` gets the pieces first.
fn records<S>(
    from: Lsn,
    wal: &Bytes,
    state: &mut S,
    hold: impl Fn(&mut S, Lsn, Bytes),
    mut each: impl FnMut(&mut S, &StreamRecord<&[u8]>) -> Result<()>,
) -> Result<()> {
    let layout = WalLayout { segment_bytes: SEGMENT, system_id: None };
    let mut stream = WalStream::new(from, layout)?;
    let mut at = 0;
    while at < wal.len() {
        let piece = wal.slice(at..wal.len().min(at + CHUNK));
        hold(state, Lsn(from.0 + at as u64), piece.clone());
        at += piece.len();
        let mut rest = &piece[..];
        while let Event::Record(record) = stream.next_slice(&mut rest)? {
            each(state, &record)?;
        }
    }
    Ok(())
}

fn ingest(from: Lsn, wal: &Bytes) -> Result<u64> {
    let mut changes = Vec::new();
    let mut sizes = Sizes::default();
    let mut open = OpenLayer::new(Lsn(from.0 + 1), SEGMENT);
    let hold = |open: &mut OpenLayer, start, piece| {
        open.hold_wal(start, piece, from);
    };
    records(from, wal, &mut open, hold, |open, record| {
        changes.clear();
        let (start, end) = (record.start, record.end);
        decode_or_take(record.bytes, start, end, &mut changes, |plain| {
            let mut sink = OpenSink { open, start };
            Apply { sink: &mut sink, sizes: &mut sizes, lsn: end, skipped: 0 }.plain(plain)
        })?;
        for change in &changes {
            touched_forks(change, |rel| sizes.loaded(rel, None, from));
        }
        let mut sink = OpenSink { open, start: record.start };
        let mut apply = Apply { sink: &mut sink, sizes: &mut sizes, lsn: record.end, skipped: 0 };
        for change in changes.drain(..) {
            // What ingest does itself, and not by way of `Apply`.
            let others = matches!(
                change,
                Change::Checkpoint(_)
                    | Change::Parameters(_)
                    | Change::DatabaseCopy { .. }
                    | Change::DatabaseDrop { .. }
            );
            if !others {
                apply.change(change)?;
            }
        }
        Ok(())
    })?;
    Ok(open.value_count())
}

/// Best of some rounds: CPU seconds of `part`.
fn cost(part: impl Fn() -> Result<u64>) -> Result<(f64, u64)> {
    let mut best = f64::INFINITY;
    let mut count = 0;
    for _ in 0..sized(1, 5) {
        let before = cpu_time(UsageWho::RUSAGE_THREAD)?;
        count = std::hint::black_box(part()?);
        best = best.min(cpu_time(UsageWho::RUSAGE_THREAD)?.saturating_sub(before).as_secs_f64());
    }
    Ok((best, count))
}

/// Prints the parts.
pub fn print(from: Lsn, wal: &Bytes) -> Result<()> {
    let none = |_: &mut u64, _: Lsn, _: Bytes| ();
    let checksum = || Ok(wal.chunks(8192).map(|page| u64::from(crc32c::crc32c(page))).sum());
    let copied = || {
        let mut target = vec![0u8; 1 << 20];
        wal.chunks(target.len()).for_each(|part| target[..part.len()].copy_from_slice(part));
        Ok(u64::from(target[0]))
    };
    let framed = || {
        let mut count = 0u64;
        records(from, wal, &mut count, none, |count, _| {
            *count += 1;
            Ok(())
        })?;
        Ok(count)
    };
    let decoded = || {
        let (mut count, mut changes) = (0u64, Vec::new());
        records(from, wal, &mut count, none, |count, record| {
            changes.clear();
            decode_into(record.bytes, record.start, record.end, &mut changes)?;
            *count += changes.len() as u64;
            Ok(())
        })?;
        Ok(count)
    };
    let parts = [
        ("checksum alone", cost(checksum)?),
        ("one copy alone", cost(copied)?),
        ("records cut and checked", cost(framed)?),
        ("and decoded", cost(decoded)?),
        ("and put into an open layer", cost(|| ingest(from, wal))?),
    ];
    let megabytes = wal.len() as f64 / MB;
    for (name, (seconds, count)) in parts {
        println!(
            "  part: {name:<27} {:>6.2} ms per MB, {:>7.1} MB/CPU-s, {count}",
            seconds * 1e3 / megabytes,
            megabytes / seconds
        );
    }
    Ok(())
}
