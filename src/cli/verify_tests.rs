//! The procedure on real clusters: two stand-bys with different settings, stopped at the same
//! LSN, must have equal files; and the comparison must find what is planted.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;

use bytes::BytesMut;

use super::*;
use crate::base::{Lsn, TenantId, TimelineId};
use crate::cli::oracle;
use crate::cli::pg::{PgCluster, StopMode};
use crate::cli::scratch::Scratch;
use crate::cli::verify_files::scan;
use crate::cli::workload;
use crate::server::page_protocol::{Version, decode_request, encode_response};

/// Serves a data directory as if it were a node. `spoil` may change pages.
fn serve(
    data: DataDirectory,
    spoil: impl Fn(RelTag, u32, &mut Vec<u8>) + Send + 'static,
) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_nodelay(true).unwrap();
        let message = |stream: &mut TcpStream| -> Option<Vec<u8>> {
            let mut head = [0; 5];
            stream.read_exact(&mut head).ok()?;
            let length = u32::from_be_bytes(head[1..].try_into().unwrap());
            let mut body = vec![0; length as usize - 4];
            stream.read_exact(&mut body).unwrap();
            Some(body)
        };
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut body = vec![0; u32::from_be_bytes(length) as usize - 4];
        stream.read_exact(&mut body).unwrap();
        stream.write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05I").unwrap();
        assert!(message(&mut stream).unwrap().starts_with(b"pagestream_v3 "));
        stream.write_all(b"W\0\0\0\x07\0\0\0").unwrap();
        while let Some(body) = message(&mut stream) {
            let request = decode_request(Version::V3, &body).unwrap();
            let mut reply = BytesMut::new();
            let answer = toy_answer(&data, &request.query, &spoil);
            encode_response(Version::V3, &request, &answer, &mut reply);
            let mut framed = vec![b'd'];
            framed.extend((reply.len() as u32 + 4).to_be_bytes());
            framed.extend(reply);
            if stream.write_all(&framed).is_err() {
                return;
            }
        }
    });
    address
}

fn toy_answer(
    data: &DataDirectory,
    query: &Query,
    spoil: &impl Fn(RelTag, u32, &mut Vec<u8>),
) -> Answer {
    match query {
        Query::Exists { rel } => Answer::Exists(data.forks.contains_key(rel)),
        Query::Nblocks { rel } => Answer::Nblocks(data.forks.get(rel).map_or(0, |f| f.blocks)),
        Query::GetPage { rel, block } => {
            let page = data.forks.get(rel).and_then(|fork| fork.page(*block).unwrap());
            let mut page = page.unwrap_or(vec![0; PAGE_SIZE]);
            spoil(*rel, *block, &mut page);
            Answer::GetPage(page.into())
        }
        Query::GetSlruSegment { kind, segment } => {
            let mut bytes = data.slru.get(&(*kind, *segment)).cloned().unwrap_or_default();
            bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
            Answer::GetSlruSegment(bytes.into())
        }
        Query::DbSize { .. } => Answer::DbSize(0),
    }
}

fn compare(
    oracle: &DataDirectory,
    node: &DataDirectory,
    checksums: bool,
    spoil: impl Fn(RelTag, u32, &mut Vec<u8>) + Send + 'static,
) -> Report {
    let address = serve(node.clone(), spoil);
    let (tenant, timeline) = (TenantId([1; 16]), TimelineId([2; 16]));
    let mut client = PageClient::connect(&address, tenant, timeline, Lsn(8)).unwrap();
    let absent: Vec<RelTag> = node.forks.keys().copied().collect();
    verify(&mut client, oracle, checksums, &absent).unwrap()
}

fn copy_dir(source: &Path, target: &Path) {
    let status = Command::new("cp").arg("-a").arg(source).arg(target).status().unwrap();
    assert!(status.success());
}

/// Two stand-bys of one backup, replayed with different buffers, one of them in two legs with a
/// stop between (so that records before its restart point are replayed twice).
fn two_standbys_agree(name: &str, checksums: bool, settings: &[&str]) {
    let temp = Scratch::new(name).unwrap();
    let settings: Vec<String> = settings.iter().map(|s| (*s).to_owned()).collect();
    let mut primary = PgCluster::init(&temp.join("primary"), checksums, &settings).unwrap();
    primary.start().unwrap();
    oracle::keep_wal(&primary).unwrap();
    primary.base_backup(&temp.join("a")).unwrap();
    copy_dir(&temp.join("a"), &temp.join("b"));
    let small = ["shared_buffers = 1MB".to_owned()];
    let mut a = oracle::prepare(&temp.join("a"), &primary, &[]).unwrap();
    let mut b = oracle::prepare(&temp.join("b"), &primary, &small).unwrap();

    primary.pgbench_init("postgres", 1).unwrap();
    primary.pgbench("postgres", &["-c", "4", "-t", "300"], |_| {}).unwrap();
    let first = oracle::mark(&primary).unwrap();
    workload::mixed(&primary, 1, &|_| {}).unwrap();
    let last = oracle::mark(&primary).unwrap();
    workload::finish_two_phase(&primary).unwrap();
    oracle::replay(&mut b, first).unwrap();
    let early = scan(b.data()).unwrap();
    oracle::replay(&mut a, last).unwrap();
    oracle::replay(&mut b, last).unwrap();
    primary.stop(StopMode::Fast).unwrap();

    let (a, b) = (scan(a.data()).unwrap(), scan(b.data()).unwrap());
    let report = compare(&a, &b, checksums, |_, _, _| {});
    println!("{name} at {}:\n{}", last.end, report.table());
    assert!(report.is_equal());
    assert!(report.forks[&FORK_MAIN].blocks > 5_000 && report.forks[&FORK_VM].blocks > 20);
    assert!(report.forks[&FORK_INIT].blocks > 0 && report.slru.relations >= 3);
    assert!(early.forks.len() < a.forks.len(), "the first mark was not before the workload");
    planted_differences_are_found(&a, &b, checksums);
}

fn planted_differences_are_found(a: &DataDirectory, b: &DataDirectory, checksums: bool) {
    // A few relations are enough here, and keep the test short.
    let few = |all: &DataDirectory| {
        let mut some = all.clone();
        some.forks.retain(|tag, _| tag.node.rel > 16_000 && tag.node.rel < 16_500);
        some
    };
    let (a, b) = (&few(a), &few(b));
    let (victim, _) = a
        .forks
        .iter()
        .find(|(t, f)| t.fork == FORK_MAIN && f.blocks > 3 && t.node.rel > 16000)
        .unwrap();
    let victim = *victim;
    for offset in [0, 11, 4000, PAGE_SIZE - 1] {
        let report = compare(a, b, checksums, move |rel, block, page| {
            if rel == victim && block == 2 {
                page[offset] ^= 1;
            }
        });
        assert!(!report.is_equal());
        assert_eq!(report.bad_forks[&victim].different, 1, "byte {offset}");
    }
    let report = compare(a, b, checksums, move |rel, block, page| {
        if rel == victim && block == 2 {
            page[8] ^= 1;
        }
    });
    assert_eq!(report.is_equal(), checksums, "pd_checksum is compared unless checksums are on");

    let mut shorter = b.clone();
    shorter.forks.get_mut(&victim).unwrap().blocks -= 1;
    assert!(!compare(a, &shorter, checksums, |_, _, _| {}).is_equal());
    assert!(!compare(&shorter, a, checksums, |_, _, _| {}).is_equal());

    let mut missing = b.clone();
    missing.forks.remove(&victim);
    assert!(!compare(a, &missing, checksums, |_, _, _| {}).is_equal());
    assert_eq!(compare(&missing, a, checksums, |_, _, _| {}).absent.different, 1);

    let mut slru = b.clone();
    slru.slru.values_mut().next().unwrap()[700] ^= 4;
    assert_eq!(compare(a, &slru, checksums, |_, _, _| {}).slru.different, 1);
}

#[test]
fn stand_bys_agree_plain() {
    two_standbys_agree("plain", false, &[]);
}

#[test]
fn stand_bys_agree_with_checksums_lz4_and_no_full_page_writes() {
    let settings = ["full_page_writes = off", "wal_compression = lz4", "wal_log_hints = on"];
    two_standbys_agree("checksums", true, &settings);
}

#[test]
fn differing_bytes_are_described() {
    let mut oracle = vec![0u8; PAGE_SIZE];
    oracle[12..14].copy_from_slice(&28u16.to_le_bytes());
    oracle[24..28].copy_from_slice(&(8000u32 | 1 << 15 | 100 << 17).to_le_bytes());
    let mut ours = oracle.clone();
    ours[8001] = 7;
    ours[8002] = 7;
    ours[9] = 1;
    assert_eq!(differences(&ours, &oracle, true), vec![8001..8003]);
    let ranges = differences(&ours, &oracle, false);
    assert_eq!(ranges, vec![9..10, 8001..8003]);
    assert!(describe(&ours, &oracle, &ranges).contains("8001..8003 (0707 / 0000) in item 1"));
}

#[test]
fn an_empty_directory_has_nothing() {
    let temp = Scratch::new("empty").unwrap();
    let found = scan(&temp).unwrap();
    assert!(found.forks.is_empty() && found.slru.is_empty());
}
