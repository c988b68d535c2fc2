//! The `CheckPoint` struct of PostgreSQL 15 (`src/include/catalog/pg_control.h`) and how WAL
//! moves it on. 88 bytes, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | redo LSN |
//! | 8, 12 | 4 + 4 | timeline, previous timeline |
//! | 16 | 1 | full-page writes; 7 bytes padding |
//! | 24 | 8 | next transaction with epoch |
//! | 32 | 4 | next OID |
//! | 36, 40 | 4 + 4 | next multixact, next member offset |
//! | 44, 48 | 4 + 4 | oldest transaction, its database |
//! | 52, 56 | 4 + 4 | oldest multixact, its database; 4 bytes padding |
//! | 64 | 8 | time, seconds since 1970 |
//! | 72, 76 | 4 + 4 | oldest, newest transaction with a commit timestamp |
//! | 80 | 4 | oldest running transaction; 4 bytes padding |
//!
//! The tracked struct lets a server start at any LSN. So that not every transaction writes a new
//! value, the next transaction is kept rounded up to a multiple of [`XID_STEP`]: a few unused
//! numbers do no harm, numbers given out twice would.

use bytes::{BufMut, Bytes, BytesMut};

use super::bytes::Reader;
use super::change::CheckpointChange;
use crate::base::Lsn;
use crate::base::xid::{FIRST_NORMAL_XID, precedes, xid_precedes};

/// Length of the struct in bytes.
pub const CHECKPOINT_BYTES: usize = 88;
/// The next transaction is kept rounded up to a multiple of this.
pub const XID_STEP: u64 = 1024;

/// The struct. See the module's table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Checkpoint {
    /// Where replay begins.
    pub redo: Lsn,
    /// PostgreSQL timeline.
    pub timeline: u32,
    /// The timeline before.
    pub previous_timeline: u32,
    /// `full_page_writes`.
    pub full_page_writes: bool,
    /// Next transaction, epoch in the high half.
    pub next_xid: u64,
    /// Next OID.
    pub next_oid: u32,
    /// Next multixact.
    pub next_multi: u32,
    /// Next multixact member offset.
    pub next_multi_offset: u32,
    /// Oldest transaction whose status is kept.
    pub oldest_xid: u32,
    /// Database that holds it back.
    pub oldest_xid_db: u32,
    /// Oldest multixact that is kept.
    pub oldest_multi: u32,
    /// Database that holds it back.
    pub oldest_multi_db: u32,
    /// Time of the checkpoint, seconds since 1970-01-01 UTC.
    pub time: i64,
    /// Oldest and newest transaction with a commit timestamp.
    pub commit_ts_xids: (u32, u32),
    /// Oldest running transaction; 0 when none was known to run but prepared ones.
    pub oldest_active_xid: u32,
}

impl Checkpoint {
    /// Reads the struct from the first 88 bytes; `None` if there are fewer.
    pub fn parse(bytes: &[u8]) -> Option<Checkpoint> {
        let mut body = Reader::new(bytes.get(..CHECKPOINT_BYTES)?);
        let redo = Lsn(body.u64()?);
        let (timeline, previous_timeline) = (body.u32()?, body.u32()?);
        let full_page_writes = body.u8()? != 0;
        body.skip(7)?;
        let (next_xid, next_oid) = (body.u64()?, body.u32()?);
        let (next_multi, next_multi_offset) = (body.u32()?, body.u32()?);
        let (oldest_xid, oldest_xid_db) = (body.u32()?, body.u32()?);
        let (oldest_multi, oldest_multi_db) = (body.u32()?, body.u32()?);
        body.skip(4)?;
        Some(Checkpoint {
            redo,
            timeline,
            previous_timeline,
            full_page_writes,
            next_xid,
            next_oid,
            next_multi,
            next_multi_offset,
            oldest_xid,
            oldest_xid_db,
            oldest_multi,
            oldest_multi_db,
            time: body.i64()?,
            commit_ts_xids: (body.u32()?, body.u32()?),
            oldest_active_xid: body.u32()?,
        })
    }

    /// The written form, padding zero.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(CHECKPOINT_BYTES);
        out.put_u64_le(self.redo.0);
        out.put_u32_le(self.timeline);
        out.put_u32_le(self.previous_timeline);
        out.put_u64_le(u64::from(self.full_page_writes));
        out.put_u64_le(self.next_xid);
        out.put_u32_le(self.next_oid);
        out.put_u32_le(self.next_multi);
        out.put_u32_le(self.next_multi_offset);
        out.put_u32_le(self.oldest_xid);
        out.put_u32_le(self.oldest_xid_db);
        out.put_u32_le(self.oldest_multi);
        out.put_u32_le(self.oldest_multi_db);
        out.put_u32_le(0);
        out.put_i64_le(self.time);
        out.put_u32_le(self.commit_ts_xids.0);
        out.put_u32_le(self.commit_ts_xids.1);
        out.put_u32_le(self.oldest_active_xid);
        out.put_u32_le(0);
        out.freeze()
    }

    /// Takes news in; true if anything changed, so that a new value must be written.
    pub fn apply(&mut self, change: &CheckpointChange) -> bool {
        if let CheckpointChange::Xid(xid) = change {
            // Nearly every record brings one; few of them are news.
            let before = self.next_xid;
            self.advance_xid(*xid);
            return self.next_xid != before;
        }
        let before = *self;
        match change {
            CheckpointChange::Xid(_) => {}
            CheckpointChange::NextOid(oid) => self.next_oid = *oid,
            CheckpointChange::MultiXact { next_multi, next_offset } => {
                self.advance_multi(*next_multi, *next_offset);
            }
            CheckpointChange::OldestXid { xid, db } => self.advance_oldest_xid(*xid, *db),
            CheckpointChange::OldestMulti { multi, db } => self.advance_oldest_multi(*multi, *db),
            CheckpointChange::OldestActiveXid(xid) => self.oldest_active_xid = *xid,
            CheckpointChange::FullPageWrites(on) => self.full_page_writes = *on,
            CheckpointChange::Record { body, shutdown } => {
                if let Some(record) = Checkpoint::parse(body) {
                    self.merge(&record, *shutdown);
                }
            }
        }
        *self != before
    }

    /// `nextXid` lies after this transaction already, or it is none.
    pub fn is_past(&self, xid: u32) -> bool {
        let ahead = xid.wrapping_sub(self.next_xid as u32);
        xid < FIRST_NORMAL_XID || (ahead as i32) < 0
    }

    /// `nextXid` lies after this transaction (`AdvanceNextFullTransactionIdPastXid`); rounded up.
    fn advance_xid(&mut self, xid: u32) {
        if self.is_past(xid) {
            return;
        }
        let ahead = xid.wrapping_sub(self.next_xid as u32);
        let exact = past_special(self.next_xid.saturating_add(u64::from(ahead) + 1));
        let rounded = exact.checked_next_multiple_of(XID_STEP).unwrap_or(exact);
        // Rounding up must not enter the next epoch: its first pg_xact page comes into being only
        // when a transaction of it does. Within an epoch no page begins between two multiples.
        self.next_xid = if rounded as u32 == 0 { exact } else { rounded };
    }

    fn advance_multi(&mut self, next_multi: u32, next_offset: u32) {
        if precedes(self.next_multi, next_multi) {
            self.next_multi = next_multi;
        }
        if precedes(self.next_multi_offset, next_offset) {
            self.next_multi_offset = next_offset;
        }
    }

    fn advance_oldest_xid(&mut self, xid: u32, db: u32) {
        if xid_precedes(self.oldest_xid, xid) {
            (self.oldest_xid, self.oldest_xid_db) = (xid, db);
        }
    }

    fn advance_oldest_multi(&mut self, multi: u32, db: u32) {
        if precedes(self.oldest_multi, multi) {
            (self.oldest_multi, self.oldest_multi_db) = (multi, db);
        }
    }

    /// A checkpoint record (`xlog_redo`). After a shutdown the counters of the record hold
    /// exactly; those of an online checkpoint were true when it began, so they only raise ours,
    /// and its OID is not taken at all.
    fn merge(&mut self, record: &Checkpoint, shutdown: bool) {
        self.redo = record.redo;
        self.timeline = record.timeline;
        self.previous_timeline = record.previous_timeline;
        self.full_page_writes = record.full_page_writes;
        self.time = record.time;
        self.commit_ts_xids = record.commit_ts_xids;
        self.advance_oldest_multi(record.oldest_multi, record.oldest_multi_db);
        if shutdown {
            self.next_xid = record.next_xid;
            self.next_oid = record.next_oid;
            self.next_multi = record.next_multi;
            self.next_multi_offset = record.next_multi_offset;
            (self.oldest_xid, self.oldest_xid_db) = (record.oldest_xid, record.oldest_xid_db);
            self.oldest_active_xid = record.oldest_active_xid;
            return;
        }
        self.next_xid = self.next_xid.max(record.next_xid);
        self.advance_multi(record.next_multi, record.next_multi_offset);
        self.advance_oldest_xid(record.oldest_xid, record.oldest_xid_db);
        if xid_precedes(self.oldest_active_xid, record.oldest_active_xid) {
            self.oldest_active_xid = record.oldest_active_xid;
        }
    }
}

/// The number, past the special ones at the start of an epoch.
fn past_special(full_xid: u64) -> u64 {
    match full_xid as u32 {
        low if low < FIRST_NORMAL_XID => full_xid.saturating_add(u64::from(FIRST_NORMAL_XID - low)),
        _ => full_xid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Checkpoint {
        Checkpoint {
            redo: Lsn(0x0102_0304_0506_0708),
            timeline: 1,
            previous_timeline: 2,
            full_page_writes: true,
            next_xid: 0x0000_0003_0000_0800,
            next_oid: 24_576,
            next_multi: 5,
            next_multi_offset: 9,
            oldest_xid: 717,
            oldest_xid_db: 1,
            oldest_multi: 3,
            oldest_multi_db: 4,
            time: -6,
            commit_ts_xids: (7, 8),
            oldest_active_xid: 2_000,
        }
    }

    #[test]
    fn written_form_is_golden() {
        let bytes = sample().encode();
        let golden = "0807060504030201010000000200000001000000000000000008000003000000\
                      006000000500000009000000cd02000001000000030000000400000000000000\
                      faffffffffffffff0700000008000000d007000000000000";
        assert_eq!(hex::encode(&bytes), golden);
        assert_eq!(Checkpoint::parse(&bytes), Some(sample()));
        assert_eq!(Checkpoint::parse(&bytes[..87]), None);
    }

    #[test]
    fn next_xid_moves_in_steps_and_over_the_wrap() {
        let mut tracked = sample();
        for old in [0, 2, 0x7FF, 700, 0x8000_0800] {
            assert!(!tracked.apply(&CheckpointChange::Xid(old)), "{old:X} moved it");
        }
        assert!(tracked.apply(&CheckpointChange::Xid(0x800)));
        assert_eq!(tracked.next_xid, 0x3_0000_0C00);
        assert!(!tracked.apply(&CheckpointChange::Xid(0xBFF)));
        assert!(tracked.apply(&CheckpointChange::Xid(0xC00)));
        tracked.next_xid = 0x3_FFFF_FC00;
        tracked.apply(&CheckpointChange::Xid(0xFFFF_FFF0));
        assert_eq!(tracked.next_xid, 0x3_FFFF_FFF1, "no rounding into the next epoch");
        tracked.apply(&CheckpointChange::Xid(0xFFFF_FFFF));
        assert_eq!(tracked.next_xid, 0x4_0000_0400);
        assert!(!tracked.apply(&CheckpointChange::Xid(0xFFFF_FFFF)));
    }

    #[test]
    fn counters_go_forward_around_the_circle() {
        let mut tracked = sample();
        let multi =
            |next_multi, next_offset| CheckpointChange::MultiXact { next_multi, next_offset };
        assert!(!tracked.apply(&multi(4, 9)));
        assert!(tracked.apply(&multi(6, 12)));
        assert_eq!((tracked.next_multi, tracked.next_multi_offset), (6, 12));
        (tracked.next_multi, tracked.next_multi_offset) = (u32::MAX, u32::MAX);
        tracked.apply(&multi(0, 3));
        assert_eq!((tracked.next_multi, tracked.next_multi_offset), (0, 3));
        assert!(!tracked.apply(&CheckpointChange::OldestXid { xid: 700, db: 9 }));
        assert!(tracked.apply(&CheckpointChange::OldestXid { xid: 800, db: 9 }));
        assert!(!tracked.apply(&CheckpointChange::OldestMulti { multi: 3, db: 9 }));
        assert!(tracked.apply(&CheckpointChange::NextOid(16_384)), "the OID may wrap around");
    }

    #[test]
    fn shutdown_is_exact_and_online_is_a_minimum() {
        let record = Checkpoint {
            next_xid: 0x3_0000_0700,
            next_oid: 1,
            oldest_active_xid: 0,
            next_multi: 2,
            ..sample()
        };
        let body = record.encode();
        let mut online = sample();
        online.apply(&CheckpointChange::Record { body: body.clone(), shutdown: false });
        assert_eq!(online, sample());
        let mut down = sample();
        assert!(down.apply(&CheckpointChange::Record { body, shutdown: true }));
        assert_eq!(down, record);
    }
}
