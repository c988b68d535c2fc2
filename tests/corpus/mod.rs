//! Makes the corpus of the fuzz targets out of real layers, real WAL and messages of our own:
//! `RECORD_FUZZ_CORPUS=1 cargo test --test check`. What
//! is there stays.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use pgstrata::base::checksum::crc32c;
use pgstrata::base::{Lsn, RelNode, SlruKind};
use pgstrata::layers::fuzzing;
use pgstrata::server::page_protocol::{
    Answer, Header, Query, Request, Version, encode_request, encode_response,
};
use pgstrata::shard::reader::RequestLsn;
use pgstrata::wal::journal::parse_segment_name;
use pgstrata::wal::names::record_name;
use pgstrata::wal::page::WalLayout;
use pgstrata::wal::record::RecordHeader;
use pgstrata::wal::stream::{Event, WalStream};

/// Most bytes of one kind of seeds, and of one seed.
const TARGET_BYTES_MAX: usize = 100_000;
const SEED_BYTES_MAX: usize = 40_000;
/// Most seeds of one kind.
const SEEDS_MAX: usize = 60;

#[derive(Default)]
struct Corpus(BTreeMap<&'static str, Vec<Vec<u8>>>);

impl Corpus {
    fn add(&mut self, target: &'static str, seed: Vec<u8>) {
        let seeds = self.0.entry(target).or_default();
        let total: usize = seeds.iter().map(Vec::len).sum();
        let few = seeds.len() < SEEDS_MAX;
        if few && seed.len() <= SEED_BYTES_MAX && total + seed.len() <= TARGET_BYTES_MAX {
            seeds.push(seed);
        }
    }

    fn write(&self) {
        for (target, seeds) in &self.0 {
            let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("test_data/fuzz").join(target);
            std::fs::create_dir_all(&root).unwrap();
            for (number, seed) in seeds.iter().enumerate() {
                // Not of the whole seed: what ends with its own checksum all has the same one.
                let sum = crc32c(&seed[..seed.len() / 2]);
                std::fs::write(root.join(format!("{number:03}-{sum:08x}")), seed).unwrap();
            }
        }
    }
}

pub fn record(layers: &[PathBuf], journal: &[PathBuf]) {
    let mut corpus = Corpus::default();
    for layer in layers {
        for (target, seed) in fuzzing::seeds(&std::fs::read(layer).unwrap()) {
            corpus.add(target, seed);
        }
    }
    let mut records = BTreeMap::new();
    for segment in journal {
        let bytes = std::fs::read(segment).unwrap();
        let name = segment.file_name().unwrap().to_str().unwrap();
        let start = Lsn(parse_segment_name(name).unwrap().1 << 24);
        wal(&mut corpus, start, &bytes, &mut records);
    }
    for record in records.into_values() {
        corpus.add("wal_record", record.to_vec());
    }
    messages(&mut corpus);
    for payload in
        [vec![7; 8192], b"walredo 2 postgres 150000 sandbox seccomp hint-bits on".to_vec()]
    {
        let mut reply = (payload.len() as u32).to_be_bytes().to_vec();
        reply.push(if payload.len() == 8192 { 0 } else { 2 });
        reply.extend_from_slice(&payload);
        corpus.add("redo_reply", [&b"\0\0\0\x02\x01no"[..], &reply].concat());
        corpus.add("redo_reply", reply);
    }
    corpus.write();
}

/// Some pages, and the smallest record of each kind.
fn wal(corpus: &mut Corpus, start: Lsn, bytes: &[u8], records: &mut BTreeMap<String, Bytes>) {
    let layout = WalLayout { segment_bytes: 1 << 24, system_id: None };
    let first = bytes.chunks(8192).position(|page| page[0] != 0).unwrap_or(0) * 8192;
    for (page, piece) in [(first, 255), (first + 8192 * 40, 3)] {
        let Some(pages) = bytes.get(page..page + 3 * 8192) else { continue };
        let at = Lsn(start.0 + page as u64);
        let seed = [&at.0.to_le_bytes()[..], &[piece], pages].concat();
        corpus.add("journal_segment", seed);
    }
    let mut stream = WalStream::new(Lsn(start.0 + first as u64), layout).unwrap();
    let mut input = &bytes[first..];
    while let Ok(Event::Record(record)) = stream.next(&mut input) {
        let header = RecordHeader::parse(&record.bytes).unwrap();
        let kept = records.entry(record_name(&header)).or_insert_with(|| record.bytes.clone());
        if record.bytes.len() < kept.len() {
            *kept = record.bytes.clone();
        }
        // Images have a form of their own.
        if record.bytes.len() > 500 {
            let kept = records.entry(format!("{} large", record_name(&header)));
            kept.or_insert(record.bytes);
        }
    }
}

fn messages(corpus: &mut Corpus) {
    let rel = RelNode { spc: 1663, db: 5, rel: 16384 }.fork(1);
    let lsn = RequestLsn { request: Lsn::MAX, not_modified_since: Lsn(0x16B_3748) };
    let pairs = [
        (Query::Exists { rel }, Answer::Exists(true)),
        (Query::Nblocks { rel }, Answer::Nblocks(77)),
        (Query::GetPage { rel, block: 7 }, Answer::GetPage(vec![3; 8192].into())),
        (Query::DbSize { db: 5 }, Answer::DbSize(1 << 33)),
        (
            Query::GetSlruSegment { kind: SlruKind::Clog, segment: 3 },
            Answer::GetSlruSegment(vec![1; 16384].into()),
        ),
        (Query::Nblocks { rel }, Answer::Error("no such relation".into())),
    ];
    for (query, answer) in pairs {
        for (version, id) in [(Version::V2, 0), (Version::V3, 9)] {
            let request = Request { header: Header { id, lsn }, query };
            let mut bytes = BytesMut::new();
            encode_request(version, &request, &mut bytes);
            corpus.add("page_protocol", bytes.to_vec());
            let mut bytes = BytesMut::new();
            encode_response(version, &request, &answer, &mut bytes);
            corpus.add("page_protocol", bytes.to_vec());
        }
    }
    let session = b"\0\0\0\x21\0\x03\0\0user\0u\0database\0d\0\0".to_vec();
    let length = (session.len() as u32).to_be_bytes();
    corpus.add("page_protocol", [&length[..], &session[4..]].concat());
    let query = b"Q\0\0\0\x0fpagestream\0P\0\0\0\x08s\0\0\0S\0\0\0\x04X\0\0\0\x04";
    corpus.add("page_protocol", query.to_vec());
}
