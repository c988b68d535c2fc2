//! What is fuzzed: every decoder of bytes that come from a disk, a network or another process.
//!
//! The same functions are run by the targets in `fuzz/` (`cargo fuzz`) and, over the kept corpus
//! in `test_data/fuzz/` and mutations of it, by `tests/fuzz_corpus.rs` in every CI run. Each takes
//! any bytes; it must not panic, must not take memory out of proportion, and what it accepts must
//! read back as it was.

use bytes::{Bytes, BytesMut};

use crate::base::Lsn;
use crate::layers::fuzzing;
use crate::redo::protocol::decode_reply;
use crate::server::page_protocol::{Version, decode_request, decode_response, encode_request};
use crate::server::pq::{decode_message, decode_startup};
use crate::wal::decode::decode;
use crate::wal::page::WalLayout;
use crate::wal::record::Record;
use crate::wal::stream::{Event, WalStream};

/// A fuzzed function.
pub type Run = fn(&[u8]);

/// All of them by name.
pub const TARGETS: [(&str, Run); 8] = [
    ("layer_frame", fuzzing::frame),
    ("layer_index", fuzzing::index),
    ("delta_block", fuzzing::delta_block),
    ("packed_block", fuzzing::packed_block),
    ("wal_stream", wal_stream),
    ("wal_record", wal_record),
    ("page_protocol", page_protocol),
    ("redo_reply", redo_reply),
];

/// Segment size of the WAL that is fuzzed, in bytes.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// WAL as it stands in a journal: u64 LSN of the first byte, u8 size of the pieces, then the
/// bytes.
fn wal_stream(input: &[u8]) {
    let Some((start, rest)) = input.split_first_chunk() else { return };
    let Some((piece, wal)) = rest.split_first() else { return };
    let layout = WalLayout { segment_bytes: SEGMENT_BYTES, system_id: None };
    let Ok(mut stream) = WalStream::new(Lsn(u64::from_le_bytes(*start)), layout) else { return };
    for mut part in wal.chunks(1 + usize::from(*piece) * 16) {
        loop {
            let boundary = stream.boundary();
            match stream.next(&mut part) {
                Ok(Event::Record(record)) => {
                    assert!(boundary <= record.start && record.start < record.end);
                    assert_eq!(stream.boundary(), record.end);
                    let _ = decode(&record.bytes, record.start, record.end);
                }
                Ok(Event::NeedInput) => break,
                Ok(Event::EndOfWal) => return assert_eq!(stream.position(), stream.boundary()),
                Err(error) => return assert_eq!(stream.next(&mut part), Err(error)),
            }
        }
    }
}

/// A record whose checksum nobody looked at. Its length field is put right, so that mutations of
/// other fields get further.
fn wal_record(input: &[u8]) {
    let mut bytes = input.to_vec();
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if let Some(field) = bytes.first_chunk_mut() {
        *field = len.to_le_bytes();
    }
    let bytes = Bytes::from(bytes);
    let _ = decode(&bytes, Lsn(0x100_0028), Lsn(0x100_0100));
    if let Ok(record) = Record::parse(&bytes) {
        for image in record.blocks.iter().filter_map(|block| block.image.as_ref()) {
            let _ = image.restore();
        }
    }
}

/// What a client sends, and what a node answers.
fn page_protocol(input: &[u8]) {
    for version in [Version::V2, Version::V3] {
        if let Ok(request) = decode_request(version, input) {
            let mut written = BytesMut::new();
            encode_request(version, &request, &mut written);
            assert_eq!(&written[..], input);
        }
        if let Ok(response) = decode_response(version, &Bytes::copy_from_slice(input)) {
            drop(response);
        }
    }
    let mut buffer = BytesMut::from(input);
    while let Ok(Some(_)) = decode_startup(&mut buffer) {}
    let mut buffer = BytesMut::from(input);
    while let Ok(Some(_)) = decode_message(&mut buffer) {}
}

/// What a wal-redo process answers.
fn redo_reply(input: &[u8]) {
    let mut buffer = BytesMut::from(input);
    while let Ok(Some(_)) = decode_reply(&mut buffer) {}
}

/// Runs a target by its name. A name that there is none of is a bug of the caller and panics.
pub fn run(target: &str, input: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, run) = found.expect("a target of this name");
    run(input);
}
