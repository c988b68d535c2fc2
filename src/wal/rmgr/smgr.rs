//! Relation files (`src/include/catalog/storage_xlog.h`; redo: `smgr_redo`).

use crate::base::RelNode;
use crate::base::key::FORK_MAIN;
use crate::wal::bytes::Reader;
use crate::wal::change::Change;
use crate::wal::decode::{DecodeError, Decoding};

/// `XLOG_SMGR_CREATE`: relation (u32 tablespace, database, file number), i32 fork.
pub const XLOG_SMGR_CREATE: u8 = 0x10;
/// `XLOG_SMGR_TRUNCATE`: u32 blocks, relation, i32 flags.
pub const XLOG_SMGR_TRUNCATE: u8 = 0x20;

/// `SMGR_TRUNCATE_HEAP`: the main fork is cut.
pub const SMGR_TRUNCATE_HEAP: u32 = 0x0001;
/// `SMGR_TRUNCATE_VM`: the visibility map is cut.
pub const SMGR_TRUNCATE_VM: u32 = 0x0002;
/// `SMGR_TRUNCATE_FSM`: the free space map is cut.
pub const SMGR_TRUNCATE_FSM: u32 = 0x0004;

pub(crate) fn decode(at: &mut Decoding<'_, '_>) -> Result<(), DecodeError> {
    let mut body = Reader::new(at.record.main_data);
    let cut = at.malformed("it is cut");
    match at.record.header.operation() {
        XLOG_SMGR_CREATE => {
            let fields = (|| Some((rel_node(&mut body)?, body.u32()?)))();
            let (node, fork) = fields.ok_or(cut)?;
            match u8::try_from(fork) {
                Ok(fork) if fork <= 3 => at.push(Change::RelCreate(node.fork(fork))),
                _ => return Err(at.malformed("there is no such fork")),
            }
        }
        XLOG_SMGR_TRUNCATE => {
            let fields = (|| Some((body.u32()?, rel_node(&mut body)?, body.u32()?)))();
            let (blocks, node, flags) = fields.ok_or(cut)?;
            // Redo creates the relation if a later record removed it.
            at.push(Change::RelCreate(node.fork(FORK_MAIN)));
            at.push(Change::RelTruncate {
                node,
                blocks,
                main: flags & SMGR_TRUNCATE_HEAP != 0,
                vm: flags & SMGR_TRUNCATE_VM != 0,
                fsm: flags & SMGR_TRUNCATE_FSM != 0,
            });
        }
        _ => return Err(at.unknown()),
    }
    at.blocks(|_| false);
    Ok(())
}

/// Reads a `RelFileNode`.
pub(crate) fn rel_node(body: &mut Reader<'_>) -> Option<RelNode> {
    Some(RelNode { spc: body.u32()?, db: body.u32()?, rel: body.u32()? })
}
