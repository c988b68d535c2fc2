//! From a record that was taken apart back to bytes: [`Record::parse`] the other way.
//!
//! The form is that of `XLogRecordAssemble` (`src/backend/access/transam/xloginsert.c`): block
//! references by number, origin, top-level transaction, main data; no header for what is not
//! there. So a record of PostgreSQL that was not changed comes out as it was, byte for byte, and
//! one that was changed is one that PostgreSQL could have written: length and checksum are its
//! own. The byte tables are those of [`super::record`].

use super::image::ImageHeader;
use super::record::{
    BlockRef, HAS_DATA, HAS_IMAGE, HEADER, MAIN_DATA_LONG, MAIN_DATA_SHORT, ORIGIN, Record,
    SAME_REL, TOPLEVEL_XID, WILL_INIT, check_len,
};
use crate::base::RelNode;
use crate::base::wal_record::{WAL_RECORD_CRC_AT, wal_record_crc};

impl Record<'_> {
    /// The bytes of the record. Length and checksum are computed; those of the header do not
    /// count. `None` if something is longer than the form has room for.
    pub fn encode(&self) -> Option<Vec<u8>> {
        let behind: usize = self.blocks.iter().map(block_bytes).sum();
        let mut out = Vec::with_capacity(HEADER + 32 * self.blocks.len() + behind + 64);
        out.resize(HEADER, 0);
        let mut previous = None;
        for block in &self.blocks {
            encode_block(block, previous, &mut out)?;
            previous = Some(block.rel.node);
        }
        if self.origin != 0 {
            out.push(ORIGIN);
            out.extend_from_slice(&self.origin.to_le_bytes());
        }
        if self.toplevel_xid != 0 {
            out.push(TOPLEVEL_XID);
            out.extend_from_slice(&self.toplevel_xid.to_le_bytes());
        }
        match u8::try_from(self.main_data.len()) {
            Ok(0) => {}
            Ok(len) => out.extend_from_slice(&[MAIN_DATA_SHORT, len]),
            Err(_) => {
                out.push(MAIN_DATA_LONG);
                let len = u32::try_from(self.main_data.len()).ok()?;
                out.extend_from_slice(&len.to_le_bytes());
            }
        }
        for block in &self.blocks {
            if let Some(image) = &block.image {
                out.extend_from_slice(image.parts().1);
            }
            out.extend_from_slice(block.data);
        }
        out.extend_from_slice(self.main_data);
        self.encode_header(&mut out)?;
        Some(out)
    }

    /// Fills in the header, the last thing to be known.
    fn encode_header(&self, out: &mut [u8]) -> Option<()> {
        let len = u32::try_from(out.len()).ok().filter(|len| check_len(*len).is_ok())?;
        let header = &self.header;
        let fields = [
            &len.to_le_bytes()[..],
            &header.xid.to_le_bytes(),
            &header.prev.0.to_le_bytes(),
            &[header.info, header.rmgr],
        ];
        let mut at = 0;
        for field in fields {
            out.get_mut(at..at + field.len())?.copy_from_slice(field);
            at += field.len();
        }
        let crc = wal_record_crc(out)?.to_le_bytes();
        out.get_mut(WAL_RECORD_CRC_AT..HEADER)?.copy_from_slice(&crc);
        Some(())
    }
}

/// Bytes that a block has behind the headers.
fn block_bytes(block: &BlockRef<'_>) -> usize {
    block.data.len() + block.image.as_ref().map_or(0, |image| image.parts().1.len())
}

fn encode_block(block: &BlockRef<'_>, previous: Option<RelNode>, out: &mut Vec<u8>) -> Option<()> {
    let node = block.rel.node;
    let flag = |set: bool, flag: u8| if set { flag } else { 0 };
    let same_rel = previous == Some(node);
    let flags = block.rel.fork
        | flag(block.image.is_some(), HAS_IMAGE)
        | flag(!block.data.is_empty(), HAS_DATA)
        | flag(block.will_init, WILL_INIT)
        | flag(same_rel, SAME_REL);
    out.extend_from_slice(&[block.id, flags]);
    out.extend_from_slice(&u16::try_from(block.data.len()).ok()?.to_le_bytes());
    if let Some(image) = &block.image {
        encode_image(image.parts().0, out);
    }
    if !same_rel {
        for number in [node.spc, node.db, node.rel] {
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
    out.extend_from_slice(&block.block.to_le_bytes());
    Some(())
}

fn encode_image(header: &ImageHeader, out: &mut Vec<u8>) {
    out.extend_from_slice(&header.len.to_le_bytes());
    out.extend_from_slice(&header.hole_offset.to_le_bytes());
    out.push(header.info);
    if header.compressed() && header.has_hole() {
        out.extend_from_slice(&header.hole_len.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::base::page::PAGE_SIZE;
    use crate::base::wal_record::WAL_RECORD_HEADER_BYTES;
    use crate::sim::wal::{BlockName, Body};
    use crate::wal::image::BlockImage;
    use crate::wal::record::check_crc;

    fn framed(body: &[u8], xid: u32, info: u8, rmgr: u8) -> Vec<u8> {
        let mut bytes = vec![0; WAL_RECORD_HEADER_BYTES];
        bytes.extend_from_slice(body);
        let len = bytes.len() as u32;
        bytes[0..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..8].copy_from_slice(&xid.to_le_bytes());
        bytes[8..16].copy_from_slice(&0x0123_4567_89AB_CDE8u64.to_le_bytes());
        (bytes[16], bytes[17]) = (info, rmgr);
        let crc = wal_record_crc(&bytes).unwrap();
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn name(rel: u32, fork: u8, block: u32) -> BlockName {
        BlockName { node: [1663, 5, rel], fork, block }
    }

    proptest! {
        #[test]
        fn a_record_comes_out_as_it_was(
            blocks in prop::collection::vec(
                (0u32..1000, 0u8..4, any::<bool>(), 0usize..300, any::<bool>()), 0..9),
            main in 0usize..600, xid: u32, info: u8,
        ) {
            let page = [7; PAGE_SIZE];
            let mut body = Body::default();
            // Each of another relation: the simulator does not write "the same as before".
            for (id, (block, fork, init, len, image)) in blocks.into_iter().enumerate() {
                let name = name(100 + id as u32, fork, block);
                body = match image {
                    true => body.image(3 * id as u8, name, &page),
                    false => body.block(3 * id as u8, name, init, &vec![id as u8; len]),
                };
            }
            let bytes = framed(&body.finish(&vec![9; main]), xid, info, 10);
            prop_assert_eq!(Record::parse(&bytes).unwrap().encode().unwrap(), bytes);
        }

        #[test]
        fn what_is_changed_is_a_record_of_its_own(
            lens in prop::collection::vec(0usize..100, 2..7), gone: usize, origin: u16, top: u32,
        ) {
            let mut body = Body::default();
            for (id, len) in lens.iter().enumerate() {
                body = body.block(id as u8, name(100, 0, id as u32), false, &vec![id as u8; *len]);
            }
            let bytes = framed(&body.finish(b"main"), 700, 0x20, 10);
            let mut record = Record::parse(&bytes).unwrap();
            let gone = gone % lens.len();
            record.blocks[gone].data = &[];
            record.blocks[gone].image = Some(BlockImage::blank());
            (record.origin, record.toplevel_xid) = (origin, top);
            let short = Bytes::from(record.encode().unwrap());
            check_crc(&short).unwrap();
            let again = Record::parse(&short).unwrap();
            prop_assert!(again.blocks[gone].image.unwrap().restore().unwrap().iter().all(|b| *b == 0));
            prop_assert_eq!(again.header.tot_len as usize, short.len());
            prop_assert_eq!((again.header.xid, again.header.prev), (700, record.header.prev));
            prop_assert_eq!(&again.blocks[..], &record.blocks[..]);
            prop_assert_eq!(again.main_data, record.main_data);
            prop_assert_eq!((again.origin, again.toplevel_xid), (origin, top));
        }
    }

    #[test]
    fn too_long_data_is_refused() {
        let bytes =
            framed(&Body::default().block(0, name(1, 0, 2), false, b"x").finish(b""), 1, 0, 10);
        let mut record = Record::parse(&bytes).unwrap();
        let long = vec![1; 65_536];
        record.blocks[0].data = &long;
        assert_eq!(record.encode(), None);
        record.blocks[0].data = &long[1..];
        assert!(record.encode().is_some());
    }
}
