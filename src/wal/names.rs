//! Names of resource managers and of their operations, for people who read dumps: those that
//! `pg_waldump` of PostgreSQL 15 prints. Pure.
//!
//! Sources: `src/include/access/rmgrlist.h` and, for the operations, the `*_identify` functions in
//! `src/backend/access/rmgrdesc/`.

use super::record::{RecordHeader, rmgr_id};

/// Bit of `xl_info` that says "the page is made anew", where an operation has one.
const INIT_PAGE: u8 = 0x80;

/// Operations of one resource manager, by the upper half of `xl_info`.
type Operations = &'static [(u8, &'static str)];

/// The resource managers in the order of their numbers: name, operations, and whether the bit
/// [`INIT_PAGE`] is apart from the operation.
const RMGRS: [(&str, Operations, bool); 22] = [
    (
        "XLOG",
        &[
            (0x00, "CHECKPOINT_SHUTDOWN"),
            (0x10, "CHECKPOINT_ONLINE"),
            (0x20, "NOOP"),
            (0x30, "NEXTOID"),
            (0x40, "SWITCH"),
            (0x50, "BACKUP_END"),
            (0x60, "PARAMETER_CHANGE"),
            (0x70, "RESTORE_POINT"),
            (0x80, "FPW_CHANGE"),
            (0x90, "END_OF_RECOVERY"),
            (0xA0, "FPI_FOR_HINT"),
            (0xB0, "FPI"),
            (0xD0, "OVERWRITE_CONTRECORD"),
        ],
        false,
    ),
    (
        "Transaction",
        &[
            (0x00, "COMMIT"),
            (0x10, "PREPARE"),
            (0x20, "ABORT"),
            (0x30, "COMMIT_PREPARED"),
            (0x40, "ABORT_PREPARED"),
            (0x50, "ASSIGNMENT"),
            (0x60, "INVALIDATION"),
        ],
        false,
    ),
    ("Storage", &[(0x10, "CREATE"), (0x20, "TRUNCATE")], false),
    ("CLOG", &[(0x00, "ZEROPAGE"), (0x10, "TRUNCATE")], false),
    ("Database", &[(0x00, "CREATE_FILE_COPY"), (0x10, "CREATE_WAL_LOG"), (0x20, "DROP")], false),
    ("Tablespace", &[(0x00, "CREATE"), (0x10, "DROP")], false),
    (
        "MultiXact",
        &[
            (0x00, "ZERO_OFF_PAGE"),
            (0x10, "ZERO_MEM_PAGE"),
            (0x20, "CREATE_ID"),
            (0x30, "TRUNCATE_ID"),
        ],
        false,
    ),
    ("RelMap", &[(0x00, "UPDATE")], false),
    ("Standby", &[(0x00, "LOCK"), (0x10, "RUNNING_XACTS"), (0x20, "INVALIDATIONS")], false),
    (
        "Heap2",
        &[
            (0x00, "REWRITE"),
            (0x10, "PRUNE"),
            (0x20, "VACUUM"),
            (0x30, "FREEZE_PAGE"),
            (0x40, "VISIBLE"),
            (0x50, "MULTI_INSERT"),
            (0x60, "LOCK_UPDATED"),
            (0x70, "NEW_CID"),
        ],
        true,
    ),
    (
        "Heap",
        &[
            (0x00, "INSERT"),
            (0x10, "DELETE"),
            (0x20, "UPDATE"),
            (0x30, "TRUNCATE"),
            (0x40, "HOT_UPDATE"),
            (0x50, "HEAP_CONFIRM"),
            (0x60, "LOCK"),
            (0x70, "INPLACE"),
        ],
        true,
    ),
    (
        "Btree",
        &[
            (0x00, "INSERT_LEAF"),
            (0x10, "INSERT_UPPER"),
            (0x20, "INSERT_META"),
            (0x30, "SPLIT_L"),
            (0x40, "SPLIT_R"),
            (0x50, "INSERT_POST"),
            (0x60, "DEDUP"),
            (0x70, "DELETE"),
            (0x80, "UNLINK_PAGE"),
            (0x90, "UNLINK_PAGE_META"),
            (0xA0, "NEWROOT"),
            (0xB0, "MARK_PAGE_HALFDEAD"),
            (0xC0, "VACUUM"),
            (0xD0, "REUSE_PAGE"),
            (0xE0, "META_CLEANUP"),
        ],
        false,
    ),
    (
        "Hash",
        &[
            (0x00, "INIT_META_PAGE"),
            (0x10, "INIT_BITMAP_PAGE"),
            (0x20, "INSERT"),
            (0x30, "ADD_OVFL_PAGE"),
            (0x40, "SPLIT_ALLOCATE_PAGE"),
            (0x50, "SPLIT_PAGE"),
            (0x60, "SPLIT_COMPLETE"),
            (0x70, "MOVE_PAGE_CONTENTS"),
            (0x80, "SQUEEZE_PAGE"),
            (0x90, "DELETE"),
            (0xA0, "SPLIT_CLEANUP"),
            (0xB0, "UPDATE_META_PAGE"),
            (0xC0, "VACUUM_ONE_PAGE"),
        ],
        false,
    ),
    (
        "Gin",
        &[
            (0x10, "CREATE_PTREE"),
            (0x20, "INSERT"),
            (0x30, "SPLIT"),
            (0x40, "VACUUM_PAGE"),
            (0x50, "DELETE_PAGE"),
            (0x60, "UPDATE_META_PAGE"),
            (0x70, "INSERT_LISTPAGE"),
            (0x80, "DELETE_LISTPAGE"),
            (0x90, "VACUUM_DATA_LEAF_PAGE"),
        ],
        false,
    ),
    (
        "Gist",
        &[
            (0x00, "PAGE_UPDATE"),
            (0x10, "DELETE"),
            (0x20, "PAGE_REUSE"),
            (0x30, "PAGE_SPLIT"),
            (0x60, "PAGE_DELETE"),
            (0x70, "ASSIGN_LSN"),
        ],
        false,
    ),
    ("Sequence", &[(0x00, "LOG")], false),
    (
        "SPGist",
        &[
            (0x10, "ADD_LEAF"),
            (0x20, "MOVE_LEAFS"),
            (0x30, "ADD_NODE"),
            (0x40, "SPLIT_TUPLE"),
            (0x50, "PICKSPLIT"),
            (0x60, "VACUUM_LEAF"),
            (0x70, "VACUUM_ROOT"),
            (0x80, "VACUUM_REDIRECT"),
        ],
        false,
    ),
    (
        "BRIN",
        &[
            (0x00, "CREATE_INDEX"),
            (0x10, "INSERT"),
            (0x20, "UPDATE"),
            (0x30, "SAMEPAGE_UPDATE"),
            (0x40, "REVMAP_EXTEND"),
            (0x50, "DESUMMARIZE"),
        ],
        true,
    ),
    ("CommitTs", &[(0x00, "ZEROPAGE"), (0x10, "TRUNCATE")], false),
    ("ReplicationOrigin", &[(0x00, "SET"), (0x10, "DROP")], false),
    ("Generic", &[(0x00, "Generic")], false),
    ("LogicalMessage", &[(0x00, "MESSAGE")], false),
];

/// What a record is, as `pg_waldump` names it: resource manager, space, operation.
pub fn record_name(header: &RecordHeader) -> String {
    let Some((name, operations, has_init)) = RMGRS.get(usize::from(header.rmgr)) else {
        return format!("custom{:03} {:02X}", header.rmgr, header.operation());
    };
    let info = header.operation();
    // Commit and abort records use the highest bit for "there is more information".
    let masked = *has_init || header.rmgr == rmgr_id::XACT;
    let number = if masked { info & !INIT_PAGE } else { info };
    let Some((_, operation)) = operations.iter().find(|(one, _)| *one == number) else {
        return format!("{name} UNKNOWN({info:02X})");
    };
    match *has_init && info & INIT_PAGE != 0 {
        true => format!("{name} {operation}+INIT"),
        false => format!("{name} {operation}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Lsn;

    #[test]
    fn names_are_those_of_pg_waldump() {
        let name = |rmgr, info| {
            let prev = Lsn::INVALID;
            record_name(&RecordHeader { tot_len: 24, xid: 0, prev, info, rmgr, crc: 0 })
        };
        assert_eq!(name(rmgr_id::HEAP, 0x80), "Heap INSERT+INIT");
        assert_eq!(name(rmgr_id::HEAP, 0x42), "Heap HOT_UPDATE");
        assert_eq!(name(rmgr_id::HEAP2, 0xD0), "Heap2 MULTI_INSERT+INIT");
        assert_eq!(name(rmgr_id::XACT, 0x80), "Transaction COMMIT");
        assert_eq!(name(rmgr_id::BTREE, 0x80), "Btree UNLINK_PAGE");
        assert_eq!(name(rmgr_id::XLOG, 0xC0), "XLOG UNKNOWN(C0)");
        assert_eq!(name(rmgr_id::LOGICALMSG, 0), "LogicalMessage MESSAGE");
        assert_eq!(name(200, 0x10), "custom200 10");
    }
}
