//! Where a server starts that was never shut down: the WAL that makes PostgreSQL 15 believe that
//! it was, at any LSN.
//!
//! A server whose `pg_control` says "shut down" reads one checkpoint record, at the LSN that
//! `pg_control` names, and replays nothing. So a directory with the data as of an LSN starts
//! there, given
//! 1. a record `XLOG_CHECKPOINT_SHUTDOWN` at that LSN, whose redo LSN is its own position;
//! 2. the segment file that holds it, or the two that do, with valid page headers at the start of
//!    the file and before the record;
//! 3. `pg_control` to match ([`super::control_file::at_start_point`]).
//!
//! The server writes its own WAL just behind the record: it continues the WAL that the data comes
//! from, and whoever followed that can follow this.
//!
//! What lies before the record in its segment is zeros here; [`StartPoint::pages`] can be laid
//! over the real WAL where that is at hand. The record's page says that it begins with the rest
//! of an older record (`XLP_FIRST_IS_CONTRECORD`) that ends where the new one begins: so tools
//! that look for the first record of the page find the right place.
//!
//! Formats: [`super::page`], [`super::record`], [`super::checkpoint`].

use bytes::{BufMut, BytesMut};

use super::checkpoint::{CHECKPOINT_BYTES, Checkpoint};
use super::page::{
    FIRST_IS_CONTRECORD, IS_LONG, LONG_HEADER, MAGIC, PageHeader, SHORT_HEADER, WalLayout,
};
use super::record::{HEADER, checksum, rmgr_id};
use super::rmgr::xlog::XLOG_CHECKPOINT_SHUTDOWN;
use crate::base::Lsn;
use crate::base::lsn::WAL_PAGE_SIZE;
use crate::base::wal_record::WAL_RECORD_CRC_AT;

/// `XLR_BLOCK_ID_DATA_SHORT`: the header of main data of up to 255 bytes.
const SHORT_DATA: u8 = 255;
/// Length of the record in bytes, before alignment.
pub(super) const RECORD_BYTES: usize = HEADER + 2 + CHECKPOINT_BYTES;

/// A place in WAL where a server can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StartPoint {
    lsn: Lsn,
    system_id: u64,
    timeline: u32,
    segment_bytes: u64,
    checkpoint: Checkpoint,
    previous: Lsn,
}

/// A page of WAL and its address.
pub type WalPage = (Lsn, [u8; WAL_PAGE_SIZE as usize]);

/// What identifies the cluster's WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalIdentity {
    /// System identifier of the cluster.
    pub system_id: u64,
    /// PostgreSQL's timeline.
    pub timeline: u32,
    /// `wal_segment_size` in bytes.
    pub segment_bytes: u64,
}

impl StartPoint {
    /// The place at `lsn`, or just behind the page header if `lsn` is at the start of a page.
    /// `previous` is the start of the record before it; 0 if that is not known: the server does
    /// not mind, others who read WAL on from before will. `None` for an LSN that is not a multiple
    /// of 8, lies in a page header or the very first segment, or at the end of the address space.
    pub fn new(
        lsn: Lsn,
        identity: WalIdentity,
        checkpoint: &Checkpoint,
        previous: Lsn,
    ) -> Option<StartPoint> {
        let WalIdentity { system_id, timeline, segment_bytes } = identity;
        let layout = WalLayout { segment_bytes, system_id: None };
        let page = Lsn(lsn.0 - lsn.page_offset());
        let lsn = layout.skip_page_header(lsn)?;
        let aligned = lsn.align() == lsn && lsn.page_offset() >= layout.header_len(page) as u64;
        let fits = lsn.checked_add(2 * segment_bytes).is_some();
        let usable = WalLayout::valid_segment_bytes(segment_bytes) && lsn.0 >= segment_bytes;
        (aligned && fits && usable && previous < lsn).then_some(StartPoint {
            lsn,
            system_id,
            timeline,
            segment_bytes,
            previous,
            checkpoint: Checkpoint {
                redo: lsn,
                timeline,
                previous_timeline: timeline,
                // Commit times are not kept.
                commit_ts_xids: (0, 0),
                // Nothing runs after a shutdown.
                oldest_active_xid: 0,
                ..*checkpoint
            },
        })
    }

    /// Where the checkpoint record stands.
    pub fn lsn(&self) -> Lsn {
        self.lsn
    }

    /// What it says.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Length of a segment file in bytes.
    pub fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    /// Start of the first segment that is needed.
    pub fn first_segment(&self) -> Lsn {
        Lsn(self.lsn.0 - self.lsn.segment_offset(self.segment_bytes))
    }

    /// Start and file name of each segment that is needed.
    pub fn segments(&self) -> Vec<(Lsn, String)> {
        let first = self.first_segment();
        let last = self.pages().last().map_or(first, |(page, _)| *page);
        let count = last.bytes_since(first) / self.segment_bytes + 1;
        let start = |nth: u64| Lsn(first.0 + nth * self.segment_bytes);
        (0..count).map(|nth| (start(nth), self.segment_name(start(nth)))).collect()
    }

    fn segment_name(&self, start: Lsn) -> String {
        let number = start.segment_number(self.segment_bytes);
        let per_log = (1 << 32) / self.segment_bytes;
        format!("{:08X}{:08X}{:08X}", self.timeline, number / per_log, number % per_log)
    }

    /// All pages that are not zeros, by address: the first one of the segment, those with the
    /// record.
    pub fn pages(&self) -> Vec<WalPage> {
        let record = self.record();
        let page = Lsn(self.lsn.0 - self.lsn.page_offset());
        let leftover = self.lsn.page_offset() as usize - self.header_len(page);
        let mut pages = Vec::new();
        if page != self.first_segment() {
            pages.push((self.first_segment(), self.empty_page(self.first_segment(), 0)));
        }
        pages.push((page, self.empty_page(page, leftover)));
        let mut at = self.lsn.page_offset() as usize;
        let mut rest: &[u8] = &record;
        while let Some((address, current)) = pages.last_mut() {
            let room = current.get_mut(at..).unwrap_or_default();
            let (now, later) = rest.split_at(rest.len().min(room.len()));
            room.iter_mut().zip(now).for_each(|(byte, new)| *byte = *new);
            rest = later;
            if rest.is_empty() {
                break;
            }
            let next = Lsn(address.0 + WAL_PAGE_SIZE);
            at = self.header_len(next);
            pages.push((next, self.empty_page(next, rest.len())));
        }
        pages
    }

    fn header_len(&self, page: Lsn) -> usize {
        WalLayout { segment_bytes: self.segment_bytes, system_id: None }.header_len(page)
    }

    /// A page with its header; `leftover` bytes of an older record follow.
    fn empty_page(&self, page: Lsn, leftover: usize) -> [u8; WAL_PAGE_SIZE as usize] {
        let long = self.header_len(page) == LONG_HEADER;
        let mut head = BytesMut::with_capacity(LONG_HEADER);
        head.put_u16_le(MAGIC);
        let contrecord = if leftover > 0 { FIRST_IS_CONTRECORD } else { 0 };
        head.put_u16_le(contrecord | if long { IS_LONG } else { 0 });
        head.put_u32_le(self.timeline);
        head.put_u64_le(page.0);
        head.put_u32_le(leftover as u32);
        head.put_u32_le(0);
        debug_assert_eq!(head.len(), SHORT_HEADER);
        if long {
            head.put_u64_le(self.system_id);
            head.put_u32_le(self.segment_bytes as u32);
            head.put_u32_le(WAL_PAGE_SIZE as u32);
        }
        let mut out = [0; WAL_PAGE_SIZE as usize];
        out.iter_mut().zip(head).for_each(|(byte, new)| *byte = new);
        out
    }

    /// The page header's fields of real WAL, where its first page is `bytes`; `None` where that
    /// is no page of this cluster's WAL at `page`.
    pub fn check_page(&self, bytes: &[u8], page: Lsn) -> Option<PageHeader> {
        let layout =
            WalLayout { segment_bytes: self.segment_bytes, system_id: Some(self.system_id) };
        PageHeader::parse(bytes, page, &layout).ok()
    }

    /// The record, without padding.
    pub fn record(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(RECORD_BYTES);
        out.put_u32_le(RECORD_BYTES as u32);
        // No transaction wrote it.
        out.put_u32_le(0);
        out.put_u64_le(self.previous.0);
        out.put_u8(XLOG_CHECKPOINT_SHUTDOWN);
        out.put_u8(rmgr_id::XLOG);
        // Padding, and the checksum, which is set below.
        out.put_bytes(0, 6);
        out.put_u8(SHORT_DATA);
        out.put_u8(CHECKPOINT_BYTES as u8);
        out.put_slice(&self.checkpoint.encode());
        let crc = checksum(&out).to_le_bytes();
        let field = out.iter_mut().skip(WAL_RECORD_CRC_AT);
        field.zip(crc).for_each(|(byte, new)| *byte = new);
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wal::record::Record;
    use crate::wal::stream::{Event, WalStream};

    const SEGMENT: u64 = 1 << 24;

    fn identity() -> WalIdentity {
        WalIdentity { system_id: 77, timeline: 1, segment_bytes: SEGMENT }
    }

    fn checkpoint() -> Checkpoint {
        Checkpoint {
            next_xid: 1024,
            next_oid: 24_576,
            next_multi: 5,
            commit_ts_xids: (3, 4),
            oldest_active_xid: 700,
            timeline: 9,
            ..Checkpoint::default()
        }
    }

    fn point(lsn: u64, previous: u64) -> StartPoint {
        StartPoint::new(Lsn(lsn), identity(), &checkpoint(), Lsn(previous)).unwrap()
    }

    /// All bytes of the segments.
    fn bytes(point: &StartPoint) -> Vec<u8> {
        let segments = point.segments();
        let mut all = vec![0; segments.len() * SEGMENT as usize];
        for (page, content) in point.pages() {
            let at = page.bytes_since(point.first_segment()) as usize;
            all[at..at + content.len()].copy_from_slice(&content);
        }
        all
    }

    fn is_readable(point: &StartPoint) {
        let all = bytes(point);
        let layout = WalLayout { segment_bytes: SEGMENT, system_id: Some(77) };
        let begin = Lsn(point.lsn().0 - point.lsn().page_offset());
        // From the start of its page, as tools look for it, and from the record itself.
        for from in [begin, point.lsn()] {
            let mut wal = WalStream::new(from, layout).unwrap();
            let at = from.bytes_since(point.first_segment()) as usize;
            let mut input = bytes::Bytes::copy_from_slice(&all[at..]);
            let Event::Record(record) = wal.next(&mut input).unwrap() else { panic!("{from}") };
            assert_eq!(record.start, point.lsn());
            let parsed = Record::parse(&record.bytes).unwrap();
            assert_eq!(parsed.header.prev, point.previous);
            assert_eq!(Checkpoint::parse(parsed.main_data), Some(*point.checkpoint()));
            assert!(matches!(wal.next(&mut input), Ok(Event::EndOfWal)));
        }
        assert!(point.check_page(&all, point.first_segment()).is_some());
    }

    #[test]
    fn the_record_is_where_it_should_be() {
        let start = point(0x0500_3028, 0x0500_2FF0);
        assert_eq!((start.lsn(), start.first_segment()), (Lsn(0x0500_3028), Lsn(0x0500_0000)));
        assert_eq!(start.segments(), [(Lsn(0x0500_0000), "000000010000000000000005".to_owned())]);
        let told = start.checkpoint();
        assert_eq!((told.redo, told.timeline, told.previous_timeline), (start.lsn(), 1, 1));
        assert_eq!((told.commit_ts_xids, told.oldest_active_xid), ((0, 0), 0));
        assert_eq!((told.next_xid, told.next_multi), (1024, 5));
        is_readable(&start);
        // At the start of a page or segment it stands behind the header.
        assert_eq!(point(0x0500_2000, 0).lsn(), Lsn(0x0500_2018));
        assert_eq!(point(0x0500_0000, 0).lsn(), Lsn(0x0500_0028));
        assert_eq!(point(0x0500_0000, 0).pages().len(), 1);
        // Over the end of a page, and of a segment.
        for (lsn, pages, segments) in [(0x0500_3FF0, 3, 1), (0x05FF_FFD0, 3, 2)] {
            let start = point(lsn, lsn - 8);
            assert_eq!((start.pages().len(), start.segments().len()), (pages, segments));
            is_readable(&start);
        }
    }

    #[test]
    fn impossible_places_are_refused() {
        for lsn in [0, 0x100, 0xFF_FFF8, 0x0500_3001, 0x0500_0010, 0x0500_2008, u64::MAX - 7] {
            assert_eq!(
                StartPoint::new(Lsn(lsn), identity(), &checkpoint(), Lsn(0)),
                None,
                "{lsn:X}"
            );
        }
        let behind = StartPoint::new(Lsn(0x0500_3028), identity(), &checkpoint(), Lsn(0x0500_3028));
        assert_eq!(behind, None, "a record does not come before itself");
        let odd = WalIdentity { segment_bytes: 3 << 20, ..identity() };
        assert_eq!(StartPoint::new(Lsn(0x0500_3028), odd, &checkpoint(), Lsn(0)), None);
    }

    #[test]
    fn written_form_is_golden() {
        let record = point(0x0500_3028, 0x0500_2FF0).record();
        assert_eq!(record.len(), 114);
        assert_eq!(hex::encode(&record[..26]), GOLDEN);
        assert!(crate::wal::record::check_crc(&record).is_ok());
    }

    const GOLDEN: &str = "7200000000000000f02f00050000000000000000ec20ad7eff58";

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn every_place_is_readable(lsn in 0x0200_0000u64..0x0A00_0000) {
            let lsn = Lsn(lsn).align();
            let start = StartPoint::new(lsn, identity(), &checkpoint(), Lsn(lsn.0 - 64));
            let header = if lsn.0 % SEGMENT < 8192 { 40 } else { 24 };
            let inside = (1..header).contains(&lsn.page_offset());
            prop_assert_eq!(start.is_none(), inside);
            if let Some(start) = start {
                is_readable(&start);
            }
        }
    }
}
