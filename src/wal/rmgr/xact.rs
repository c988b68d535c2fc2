//! Transactions (`src/include/access/xact.h`; redo: `xact_redo`).
//!
//! Body of a commit or abort record: i64 time; if `xl_info & 0x80` u32 flags, then by flag:
//!
//! | flag | what follows |
//! |---|---|
//! | 0 | u32 database, u32 tablespace |
//! | 1 | i32 count, u32 subtransactions |
//! | 2 | i32 count, removed relations of 12 bytes |
//! | 8 | i32 count, removed statistics of 12 bytes |
//! | 3 | i32 count, invalidations of 16 bytes (commit only) |
//! | 4 | u32 prepared transaction |
//! | 7 | its name, ended by a zero byte (only with flag 4) |
//! | 5 | u64 LSN and i64 time at the replication origin |

use bytes::Bytes;

use crate::base::slru::clog_page;
use crate::base::xid::later_xid;
use crate::base::{Lsn, RelNode, SlruKind, SmallRecord, Value};
use crate::wal::bytes::Reader;
use crate::wal::change::Change;
use crate::wal::decode::{DecodeError, Decoding};
use crate::wal::rmgr::{replorigin, smgr};

const OPERATION_MASK: u8 = 0x70;
const COMMIT: u8 = 0x00;
const PREPARE: u8 = 0x10;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
const ASSIGNMENT: u8 = 0x50;
const INVALIDATIONS: u8 = 0x60;
/// `XLOG_XACT_HAS_INFO`.
const HAS_INFO: u8 = 0x80;

const HAS_DBINFO: u32 = 1 << 0;
const HAS_SUBXACTS: u32 = 1 << 1;
const HAS_RELFILENODES: u32 = 1 << 2;
const HAS_INVALS: u32 = 1 << 3;
const HAS_TWOPHASE: u32 = 1 << 4;
const HAS_ORIGIN: u32 = 1 << 5;
const HAS_GID: u32 = 1 << 7;
const HAS_DROPPED_STATS: u32 = 1 << 8;

/// Length of a `SharedInvalidationMessage` in bytes.
const INVALIDATION_BYTES: usize = 16;
/// Length of an `xl_xact_stats_item` in bytes.
const STATS_ITEM_BYTES: usize = 12;
/// Length of a `RelFileNode` in bytes.
const REL_NODE_BYTES: usize = 12;

/// `TRANSACTION_STATUS_COMMITTED`.
const STATUS_COMMITTED: u8 = 1;
/// `TRANSACTION_STATUS_ABORTED`.
const STATUS_ABORTED: u8 = 2;

/// Longest name of a prepared transaction with its zero byte (`GIDSIZE`).
const GID_BYTES_MAX: usize = 200;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let mut body = Reader::new(at.record.main_data);
    let cut = at.malformed("it is cut");
    match at.record.header.info & OPERATION_MASK {
        COMMIT | ABORT | COMMIT_PREPARED | ABORT_PREPARED => finish(at, &mut body)?,
        PREPARE => prepare(at, &mut body).ok_or(cut)?,
        ASSIGNMENT => assignment(at, &mut body).ok_or(cut)?,
        INVALIDATIONS => {}
        _ => return Err(at.unknown()),
    }
    at.blocks(|_| false);
    Ok(())
}

/// A commit or abort record taken apart, as far as it matters here.
struct Finish<'a> {
    time: i64,
    subxacts: Reader<'a>,
    relations: Reader<'a>,
    twophase_xid: Option<u32>,
    origin_lsn: Option<Lsn>,
}

fn parse_finish<'a>(body: &mut Reader<'a>, has_info: bool, commit: bool) -> Option<Finish<'a>> {
    let time = body.i64()?;
    let flags = if has_info { body.u32()? } else { 0 };
    let has = |flag| flags & flag != 0;
    if has(HAS_DBINFO) {
        body.skip(8)?;
    }
    let mut array = |flag, entry_len| match has(flag) {
        true => {
            let count = body.i32()?;
            body.entries(count, entry_len)
        }
        false => Some(Reader::new(&[])),
    };
    let subxacts = array(HAS_SUBXACTS, 4)?;
    let relations = array(HAS_RELFILENODES, REL_NODE_BYTES)?;
    array(HAS_DROPPED_STATS, STATS_ITEM_BYTES)?;
    if commit {
        array(HAS_INVALS, INVALIDATION_BYTES)?;
    }
    let mut twophase_xid = None;
    if has(HAS_TWOPHASE) {
        twophase_xid = Some(body.u32()?);
        if has(HAS_GID) {
            skip_name(body)?;
        }
    }
    let origin_lsn = if has(HAS_ORIGIN) { Some(Lsn(body.u64()?)) } else { None };
    Some(Finish { time, subxacts, relations, twophase_xid, origin_lsn })
}

fn skip_name(body: &mut Reader<'_>) -> Option<()> {
    for _ in 0..GID_BYTES_MAX {
        if body.u8()? == 0 {
            return Some(());
        }
    }
    None
}

fn finish(at: &mut Decoding<'_, '_>, body: &mut Reader<'_>) -> Result<(), DecodeError> {
    let info = at.record.header.info;
    let operation = info & OPERATION_MASK;
    let commit = matches!(operation, COMMIT | COMMIT_PREPARED);
    let prepared = matches!(operation, COMMIT_PREPARED | ABORT_PREPARED);
    let parsed = parse_finish(body, info & HAS_INFO != 0, commit)
        .ok_or_else(|| at.malformed("it is cut"))?;
    let xid = match (prepared, parsed.twophase_xid) {
        (false, _) => at.record.header.xid,
        (true, Some(xid)) => xid,
        (true, None) => return Err(at.malformed("it does not name the prepared transaction")),
    };
    if xid == 0 {
        return Err(at.malformed("it ends no transaction"));
    }
    let xids = std::iter::once(xid).chain(u32s(parsed.subxacts)).collect::<Vec<_>>();
    at.xid_seen(xids.iter().copied().fold(xid, later_xid));
    let status = if commit { STATUS_COMMITTED } else { STATUS_ABORTED };
    set_status(at, status, parsed.time, xids);
    if let Some(remote_lsn) = parsed.origin_lsn {
        replorigin::advance(at, at.record.origin, remote_lsn, false);
    }
    let relations = rel_nodes(parsed.relations);
    if !relations.is_empty() {
        at.push(Change::RelDrop(relations));
    }
    if prepared {
        at.push(Change::TwoPhaseFinish { xid });
    }
    Ok(())
}

/// The status of transactions, one change for each page of `pg_xact`.
fn set_status(at: &mut Decoding<'_, '_>, status: u8, timestamp: i64, mut xids: Vec<u32>) {
    // Subtransactions come sorted as numbers wrap; sorted plainly, each page is one run.
    xids.sort_unstable_by_key(|xid| clog_page(*xid));
    let page_of = |xid: Option<&u32>| xid.map(|xid| clog_page(*xid));
    if let Some(page) = page_of(xids.first()).filter(|page| page_of(xids.last()) == Some(*page)) {
        let value = Value::Small(SmallRecord::ClogSet { status, timestamp, xids });
        return at.push(Change::Slru { kind: SlruKind::Clog, page, value });
    }
    for page in xids.chunk_by(|a, b| clog_page(*a) == clog_page(*b)) {
        let Some(first) = page.first() else { continue };
        let small = SmallRecord::ClogSet { status, timestamp, xids: page.to_vec() };
        let (kind, page) = (SlruKind::Clog, clog_page(*first));
        at.push(Change::Slru { kind, page, value: Value::Small(small) });
    }
}

fn u32s(mut entries: Reader<'_>) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || entries.u32())
}

fn rel_nodes(mut entries: Reader<'_>) -> Vec<RelNode> {
    std::iter::from_fn(move || smgr::rel_node(&mut entries)).collect()
}

/// `xl_xact_prepare`, which is also how the state file begins: u32 magic, u32 length, u32
/// transaction, u32 database, i64 time, u32 owner, i32 subtransactions, 20 bytes of other counts,
/// bool, padding, u16 length of the name, u64 LSN and i64 time at the origin; then the name and
/// the subtransactions, each aligned to 8 bytes.
fn prepare(at: &mut Decoding<'_, '_>, body: &mut Reader<'_>) -> Option<()> {
    body.skip(8)?;
    let xid = body.u32()?;
    body.skip(16)?;
    let subxact_count = body.i32()?;
    body.skip(22)?;
    let name_len = usize::from(body.u16()?);
    let origin_lsn = Lsn(body.u64()?);
    body.skip(8)?;
    body.skip(name_len.next_multiple_of(8))?;
    let subxacts = body.entries(subxact_count, 4)?;
    let last_xid = u32s(subxacts).fold(xid, later_xid);
    at.xid_seen(last_xid);
    let state = Bytes::copy_from_slice(at.record.main_data);
    at.push(Change::TwoPhasePrepare { xid, state });
    replorigin::advance(at, at.record.origin, origin_lsn, false);
    Some(())
}

/// `xl_xact_assignment`: u32 top-level transaction, i32 count, u32 subtransactions.
fn assignment(at: &mut Decoding<'_, '_>, body: &mut Reader<'_>) -> Option<()> {
    let (top, count) = (body.u32()?, body.i32()?);
    let subxacts = body.entries(count, 4)?;
    let last_xid = u32s(subxacts).fold(top, later_xid);
    at.xid_seen(last_xid);
    Some(())
}
