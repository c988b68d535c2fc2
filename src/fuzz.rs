//! What is fuzzed: every decoder of bytes that come from a disk, a network or another process.
//!
//! The same functions are run by the targets in `fuzz/` (`cargo fuzz`) and, over the kept corpus
//! in `test_data/fuzz/` and mutations of it, by `tests/fuzz_corpus.rs` in every CI run. Each takes
//! any bytes; it must not panic, must not take memory out of proportion, and what it accepts must
//! read back as it was.

use bytes::{Bytes, BytesMut};

use crate::base::page::{PAGE_SIZE, Page, page_lsn};
use crate::base::wal_record::WAL_RECORD_CRC_AT;
use crate::base::{Lsn, RelNode, RelTag, SmallRecord, Value};
use crate::layers::fuzzing;
use crate::limits::REDO_RECORD_BYTES_MAX;
use crate::redo::RedoSettings;
use crate::redo::excerpt::excerpt;
use crate::redo::failed::Failed;
use crate::redo::native::{Applied, NotNative, apply, apply_bytes, is_foreign};
use crate::redo::protocol::{
    decode_reply, decode_request as decode_redo_request, encode_request as encode_redo_request,
};
use crate::redo::small::{self, initialised_page};
use crate::server::page_protocol::{Version, decode_request, decode_response, encode_request};
use crate::server::pq::{decode_message, decode_startup};
use crate::wal::decode::decode;
use crate::wal::page::WalLayout;
use crate::wal::record::{BlockRef, Record, check_crc, checksum};
use crate::wal::stream::{Event, WalStream};

/// A fuzzed function.
pub type Run = fn(&[u8]);

/// All of them by name.
pub const TARGETS: [(&str, Run); 11] = [
    ("layer_frame", fuzzing::frame),
    ("layer_index", fuzzing::index),
    ("delta_block", fuzzing::delta_block),
    ("image_block", fuzzing::image_block),
    ("journal_segment", journal_segment),
    ("wal_record", wal_record),
    ("native_redo", native_redo),
    ("page_protocol", page_protocol),
    ("redo_reply", redo_reply),
    ("redo_request", redo_request),
    ("small_redo", small_redo),
];

/// Segment size of the WAL that is fuzzed, in bytes.
const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;

/// WAL as it stands in a journal: u64 LSN of the first byte, u8 size of the pieces, then the
/// bytes.
fn journal_segment(input: &[u8]) {
    let Some((start, rest)) = input.split_first_chunk() else { return };
    let Some((piece, wal)) = rest.split_first() else { return };
    let layout = WalLayout { segment_bytes: SEGMENT_BYTES, system_id: None };
    let new_stream = || WalStream::new(Lsn(u64::from_le_bytes(*start)), layout);
    // One gives its records away, the other lends them.
    let (Ok(mut stream), Ok(mut lending)) = (new_stream(), new_stream()) else { return };
    for mut part in wal.chunks(1 + usize::from(*piece) * 16) {
        let mut lent_part = part;
        loop {
            let boundary = stream.boundary();
            let event = stream.next(&mut part);
            match (&event, lending.next_slice(&mut lent_part)) {
                (Ok(Event::Record(record)), Ok(Event::Record(lent))) => {
                    assert_eq!((record.start, record.end), (lent.start, lent.end));
                    assert_eq!(record.bytes, lent.bytes);
                }
                (Ok(Event::NeedInput), Ok(Event::NeedInput)) => {}
                (Ok(Event::EndOfWal), Ok(Event::EndOfWal)) => {}
                (Err(error), Err(other)) => assert_eq!(*error, other),
                (event, other) => panic!("{event:?}, but {other:?}"),
            }
            match event {
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
        excerpts(&record, bytes.to_vec());
    }
}

/// What is stored of a record that changes several blocks, once its checksum is right: a sound
/// record that has the same for the block, and of which nothing more can be left out.
fn excerpts(record: &Record<'_>, mut bytes: Vec<u8>) {
    let crc = checksum(&bytes).to_le_bytes();
    if let Some(field) = bytes.get_mut(WAL_RECORD_CRC_AT..WAL_RECORD_CRC_AT + crc.len()) {
        field.copy_from_slice(&crc);
    }
    for block in &record.blocks {
        let Some(short) = excerpt(&bytes, block.rel, block.block) else { continue };
        assert!(short.len() < bytes.len() && check_crc(&short).is_ok());
        let again = Record::parse(&short).expect("an excerpt is a record");
        assert_eq!(again.block(block.id), Some(block));
        assert_eq!(again.main_data, record.main_data);
        assert_eq!(excerpt(&short, block.rel, block.block), None);
    }
}

/// A record and a page that it is applied to: u8 1 where hint bits are logged, u64 position after
/// the record, u16 length of the record, the record, u16 length of the front of the page, then the
/// front and the end of the page; zeros stand between them. The record's length field is put
/// right.
///
/// Both ways into native redo must come to the same, and a second turn must change nothing, for
/// that is what a restart does.
fn native_redo(input: &[u8]) {
    let Some((record, lsn, page, settings)) = split_redo(input) else { return };
    let Ok(parsed) = Record::parse(&record) else {
        // Whatever the first way refuses, the second must get over.
        let target = first_target(&record);
        let _ = is_foreign(&record, target);
        let _ = apply_bytes(&mut page.clone(), &record, target, lsn, &settings);
        return;
    };
    for block in &parsed.blocks {
        let mut after = page.clone();
        let done = apply(&mut after, &parsed, block, lsn, &settings);
        let named = |other: &&BlockRef| (other.rel, other.block) == (block.rel, block.block);
        if parsed.blocks.iter().filter(named).count() == 1 {
            let target = (block.rel, block.block);
            let _ = is_foreign(&record, target);
            let mut other = page.clone();
            match apply_bytes(&mut other, &record, target, lsn, &settings) {
                Ok(applied) => assert!(done == Ok(applied) && other == after),
                Err(NotNative::Unsupported { .. }) => {
                    assert!(done.is_err() || block.image.is_some());
                }
                Err(NotNative::Misfit(_)) => assert!(done.is_err()),
            }
        }
        match done {
            Ok(Applied::Skipped) => assert!(after == page),
            Ok(Applied::Changed) => {
                let once = after.clone();
                assert!(apply(&mut after, &parsed, block, lsn, &settings).is_ok());
                assert!(after == once);
            }
            Err(_) => {}
        }
    }
}

/// The parts of an input of [`native_redo`].
fn split_redo(input: &[u8]) -> Option<(Bytes, Lsn, Box<Page>, RedoSettings)> {
    let (hints, rest) = input.split_first()?;
    let (lsn, rest) = rest.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let (record, rest) = rest.split_at_checked(u16::from_le_bytes(*len).into())?;
    let (len, rest) = rest.split_first_chunk()?;
    let (front, end) = rest.split_at_checked(u16::from_le_bytes(*len).into())?;
    let hole = PAGE_SIZE.checked_sub(rest.len())?;
    let page = [front, &vec![0; hole], end].concat().into_boxed_slice();
    let mut record = record.to_vec();
    let len = u32::try_from(record.len()).ok()?;
    *record.first_chunk_mut()? = len.to_le_bytes();
    let settings = RedoSettings { hint_bits_logged: *hints == 1 };
    Some((record.into(), Lsn(u64::from_le_bytes(*lsn)), page.try_into().ok()?, settings))
}

/// The first block of a record that has no image there.
fn first_target(record: &[u8]) -> (RelTag, u32) {
    let at = |offset: usize| {
        let bytes = record.get(offset..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let fork = record.get(25).map_or(0, |flags| flags & 3);
    (RelNode { spc: at(28), db: at(32), rel: at(36) }.fork(fork), at(40))
}

/// An input for the target `native_redo`.
#[doc(hidden)]
pub fn native_redo_seed(record: &[u8], lsn: Lsn, page: &Page, hints: bool) -> Option<Vec<u8>> {
    // What lies in the hole is lost, and no matter.
    let field = |at: usize| page.get(at..).and_then(|rest| rest.first_chunk());
    let place = |at: usize| field(at).map(|bytes| usize::from(u16::from_le_bytes(*bytes)));
    let (lower, upper) = (place(12)?, place(14)?);
    let (front, end) = match lower <= upper && upper > 0 {
        true => (page.get(..lower)?, page.get(upper..)?),
        false => (&page[..], &[][..]),
    };
    let front = if page.iter().all(|byte| *byte == 0) { &[][..] } else { front };
    let mut seed = vec![u8::from(hints)];
    seed.extend_from_slice(&lsn.0.to_le_bytes());
    seed.extend_from_slice(&u16::try_from(record.len()).ok()?.to_le_bytes());
    seed.extend_from_slice(record);
    seed.extend_from_slice(&u16::try_from(front.len()).ok()?.to_le_bytes());
    seed.extend_from_slice(front);
    seed.extend_from_slice(end);
    Some(seed)
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
    let mut rest = input;
    while let Ok(Some((_, len))) = decode_reply(rest) {
        rest = rest.get(len..).expect("a reply is within the input");
    }
}

/// The messages of a request of redo, or a file with an input of failed redo, whose checksum is put
/// right. What is read of them is what stands there.
fn redo_request(input: &[u8]) {
    const CRC: std::ops::Range<usize> = 8..12;
    let mut file = input.to_vec();
    if let Some(rest) = input.get(CRC.end..)
        && let Some(field) = file.get_mut(CRC)
    {
        field.copy_from_slice(&crc32c::crc32c(rest).to_le_bytes());
    }
    let frames = match Failed::decode(&file.into()) {
        Ok(kept) => kept.frames,
        Err(_) => Bytes::copy_from_slice(input),
    };
    let Ok(request) = decode_redo_request(&frames) else { return };
    let mut written = Vec::new();
    match encode_redo_request(&request, &mut written) {
        Ok(()) => assert_eq!(written, frames),
        // Only of this.
        Err(error) => assert!(frames.len() > REDO_RECORD_BYTES_MAX, "{error}"),
    }
}

/// A small record, as layers keep it, and a page that it is applied to: u8 0 for a new page, 1 for
/// one that has a header and nothing else, any other fills it; then the record. A second turn must
/// change nothing.
fn small_redo(input: &[u8]) {
    let Some((fill, value)) = input.split_first() else { return };
    let Ok(Value::Small(record)) = Value::decode(&Bytes::copy_from_slice(value)) else { return };
    let mut page = match fill {
        1 => initialised_page(),
        fill => Box::new([*fill; PAGE_SIZE]),
    };
    let before = page.clone();
    small::apply(&mut page, &record);
    let once = page.clone();
    small::apply(&mut page, &record);
    assert!(page == once, "{record:?}");
    if let SmallRecord::VmClear { .. } | SmallRecord::VmTruncate { .. } = record {
        assert_eq!(page_lsn(&page[..]), page_lsn(&before[..]), "{record:?}");
    }
}

/// Runs a target by its name. A name that there is none of is a bug of the caller and panics.
pub fn run(target: &str, input: &[u8]) {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, run) = found.expect("a target of this name");
    run(input);
}
