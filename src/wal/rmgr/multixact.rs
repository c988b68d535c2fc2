//! Multixacts (`src/include/access/multixact.h`; redo: `multixact_redo`, `RecordNewMultiXact`).

use crate::base::slru::{members_page, members_segment, offsets_page};
use crate::base::xid::{later_xid, multi_after, multi_before};
use crate::base::{SlruKind, SmallRecord, Value};
use crate::wal::bytes::Reader;
use crate::wal::change::{Change, CheckpointChange};
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_MULTIXACT_ZERO_OFF_PAGE`: i32 page.
pub const XLOG_MULTIXACT_ZERO_OFF_PAGE: u8 = 0x00;
/// `XLOG_MULTIXACT_ZERO_MEM_PAGE`: i32 page.
pub const XLOG_MULTIXACT_ZERO_MEM_PAGE: u8 = 0x10;
/// `XLOG_MULTIXACT_CREATE_ID`: u32 multixact, u32 offset, i32 count, (u32 transaction, u32
/// status) …
pub const XLOG_MULTIXACT_CREATE_ID: u8 = 0x20;
/// `XLOG_MULTIXACT_TRUNCATE_ID`: u32 database, u32 first and u32 end multixact, u32 first and u32
/// end member.
pub const XLOG_MULTIXACT_TRUNCATE_ID: u8 = 0x30;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let mut body = Reader::new(at.record.main_data);
    let done = match at.record.header.operation() {
        XLOG_MULTIXACT_ZERO_OFF_PAGE => zero(at, SlruKind::MultiXactOffsets, &mut body),
        XLOG_MULTIXACT_ZERO_MEM_PAGE => zero(at, SlruKind::MultiXactMembers, &mut body),
        XLOG_MULTIXACT_CREATE_ID => create(at, &mut body),
        XLOG_MULTIXACT_TRUNCATE_ID => truncate(at, &mut body),
        _ => return Err(at.unknown()),
    };
    done.ok_or_else(|| at.malformed("it is cut"))?;
    at.blocks(|_| false);
    Ok(())
}

fn zero(at: &mut Decoding<'_, '_>, kind: SlruKind, body: &mut Reader<'_>) -> Option<()> {
    let page = body.u32()?;
    at.push(Change::Slru { kind, page, value: Value::ZeroPage });
    Some(())
}

/// A new multixact: its offset, the offset after its members (where the next multixact starts),
/// and its members.
fn create(at: &mut Decoding<'_, '_>, body: &mut Reader<'_>) -> Option<()> {
    let (multi, first, count) = (body.u32()?, body.u32()?, body.i32()?);
    let mut members = body.entries(count, 8)?;
    let end = first.wrapping_add(u32::try_from(count).ok()?);

    push_offsets(at, multi, first, end);
    let mut offset = first;
    let mut group = Vec::new();
    let mut group_start = first;
    let mut last_xid = at.record.header.xid;
    while !members.is_empty() {
        let (xid, status) = (members.u32()?, members.u32()?);
        last_xid = later_xid(last_xid, xid);
        if members_page(offset) != members_page(group_start) {
            push_members(at, group_start, std::mem::take(&mut group));
            group_start = offset;
        }
        group.push((xid, status));
        offset = offset.wrapping_add(1);
    }
    push_members(at, group_start, group);
    let (next_multi, next_offset) = (multi.wrapping_add(1), end);
    at.push(Change::Checkpoint(CheckpointChange::MultiXact { next_multi, next_offset }));
    at.xid_seen(last_xid);
    Some(())
}

fn push_offsets(at: &mut Decoding<'_, '_>, multi: u32, offset: u32, end: u32) {
    let next = multi_after(multi);
    // Offset 0 means "not set", so no multixact starts there.
    let end = end.max(1);
    let same_page = offsets_page(next) == offsets_page(multi);
    let mut push = |multi, offset, next_offset| {
        let small = SmallRecord::MultiXactOffset { multi, offset, next_offset };
        let (kind, page) = (SlruKind::MultiXactOffsets, offsets_page(multi));
        at.push(Change::Slru { kind, page, value: Value::Small(small) });
    };
    push(multi, offset, same_page.then_some(end));
    if !same_page {
        push(next, end, None);
    }
}

fn push_members(at: &mut Decoding<'_, '_>, first_offset: u32, members: Vec<(u32, u32)>) {
    if members.is_empty() {
        return;
    }
    let (kind, page) = (SlruKind::MultiXactMembers, members_page(first_offset));
    let value = Value::Small(SmallRecord::MultiXactMembers { first_offset, members });
    at.push(Change::Slru { kind, page, value });
}

fn truncate(at: &mut Decoding<'_, '_>, body: &mut Reader<'_>) -> Option<()> {
    let db = body.u32()?;
    let (_first_multi, end_multi) = (body.u32()?, body.u32()?);
    let (first_member, end_member) = (body.u32()?, body.u32()?);
    at.push(Change::Checkpoint(CheckpointChange::OldestMulti { multi: end_multi, db }));
    at.push(Change::MembersTruncate {
        first_segment: members_segment(first_member),
        end_segment: members_segment(end_member),
    });
    at.push(Change::SlruTruncate {
        kind: SlruKind::MultiXactOffsets,
        cutoff_page: offsets_page(multi_before(end_multi)),
    });
    Some(())
}
