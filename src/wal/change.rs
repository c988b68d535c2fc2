//! What one WAL record changes, in the terms of the key space.
//!
//! Decoding (`wal/decode.rs`, pure) turns a record into a list of [`Change`]s; ingest
//! (`shard/ingest.rs`) carries them out in order, all at the LSN just after the record. Changes
//! say *what* the record means; whatever needs the timeline's state (is the relation that long?
//! does it exist?) is ingest's to find out.

use bytes::Bytes;

use crate::base::{BlockNumber, Lsn, RelNode, RelTag, SlruKind, Value};

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A block reference of the record.
    Block(BlockChange),
    /// Clears visibility-map bits of heap blocks (`visibilitymap_clear` in redo). Redo extends
    /// the map where it is too short.
    VmClear {
        /// The heap relation.
        node: RelNode,
        /// Bits to clear: 1 all-visible, 2 all-frozen.
        flags: u8,
        /// The heap blocks.
        heap_blocks: [Option<BlockNumber>; 2],
    },
    /// Creates an empty relation fork, if it does not exist.
    RelCreate(RelTag),
    /// Cuts a relation (`XLOG_SMGR_TRUNCATE`).
    RelTruncate {
        /// The relation.
        node: RelNode,
        /// Size of the main fork afterwards, in blocks.
        blocks: BlockNumber,
        /// The main fork is cut.
        main: bool,
        /// The visibility map is cut accordingly.
        vm: bool,
        /// The free space map is cut accordingly.
        fsm: bool,
    },
    /// Removes relations with all their forks.
    RelDrop(Vec<RelNode>),
    /// A database directory comes into being, empty (`XLOG_DBASE_CREATE_WAL_LOG`).
    DatabaseCreate {
        /// Tablespace.
        spc: u32,
        /// Database.
        db: u32,
    },
    /// A database is copied file by file (`XLOG_DBASE_CREATE_FILE_COPY`).
    DatabaseCopy {
        /// Tablespace and database that are copied.
        source: (u32, u32),
        /// Tablespace and database that come into being.
        target: (u32, u32),
    },
    /// A database is removed from these tablespaces.
    DatabaseDrop {
        /// Database.
        db: u32,
        /// Tablespaces.
        spcs: Vec<u32>,
    },
    /// A new relation map file.
    RelMap {
        /// Tablespace.
        spc: u32,
        /// Database.
        db: u32,
        /// The whole file.
        content: Bytes,
    },
    /// A zero page, or a change, of an SLRU. One record makes at most one such change to a page.
    ///
    /// A change of a page that does not exist creates it, zeroed, first: older minor releases
    /// log the zeroing of the next `pg_multixact/offsets` page only after the record that
    /// sets its first entry.
    Slru {
        /// Which one.
        kind: SlruKind,
        /// Page number, counted over all segments.
        page: u32,
        /// [`Value::ZeroPage`] or [`Value::Small`].
        value: Value,
    },
    /// Removes SLRU segments that lie wholly before `cutoff_page` (`SimpleLruTruncate`).
    SlruTruncate {
        /// Which one.
        kind: SlruKind,
        /// First page that is kept.
        cutoff_page: u32,
    },
    /// Removes multixact member segments `first..end`, around the end of the number range if
    /// `end < first` (`PerformMembersTruncation`).
    MembersTruncate {
        /// First segment to go.
        first_segment: u32,
        /// First segment that stays.
        end_segment: u32,
    },
    /// A transaction is prepared for two-phase commit.
    TwoPhasePrepare {
        /// The transaction.
        xid: u32,
        /// Contents of its `pg_twophase` file without the trailing CRC.
        state: Bytes,
    },
    /// A prepared transaction is gone.
    TwoPhaseFinish {
        /// The transaction.
        xid: u32,
    },
    /// Progress of a replication origin; `None` removes it.
    ReplicationOrigin {
        /// The origin.
        id: u16,
        /// How far the remote side was replayed.
        remote_lsn: Option<Lsn>,
        /// The new position holds even if it is lower than the known one; otherwise the higher
        /// of both holds (`replorigin_advance`).
        backward: bool,
    },
    /// Settings of the source that `pg_control` records (`XLOG_PARAMETER_CHANGE`); see
    /// [`super::control_file::with_parameters`].
    Parameters(Parameters),
    /// News for the tracked `CheckPoint` struct.
    Checkpoint(CheckpointChange),
}

/// A block reference with what redo needs.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockChange {
    /// The relation fork.
    pub rel: RelTag,
    /// The block.
    pub block: BlockNumber,
    /// A page image, or the record.
    pub value: BlockValue,
    /// Redo creates the block where the fork is shorter (the record initialises it, carries an
    /// image that is applied, or reads it with `RBM_ZERO_ON_ERROR`). Otherwise PostgreSQL skips
    /// the change of a block that does not exist, and so do we.
    pub extends: bool,
}

/// What is kept of a block after a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BlockValue {
    /// The record itself, as [`Value::WalRecord`].
    Record {
        /// The record does not need the older content.
        will_init: bool,
    },
    /// A page image.
    Page(Bytes),
    /// The image of the only block of the record, made when it is asked for
    /// ([`super::decode::page_in_record`], which succeeds).
    PageInRecord,
}

/// The settings that `pg_control` records (`xl_parameter_change`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Parameters {
    /// `max_connections`.
    pub max_connections: i32,
    /// `max_worker_processes`.
    pub max_worker_processes: i32,
    /// `max_wal_senders`.
    pub max_wal_senders: i32,
    /// `max_prepared_transactions`.
    pub max_prepared_xacts: i32,
    /// `max_locks_per_transaction`.
    pub max_locks_per_xact: i32,
    /// `wal_level`: 0 minimal, 1 replica, 2 logical.
    pub wal_level: i32,
    /// `wal_log_hints`: redo of visibility records then sets the heap page's LSN.
    pub wal_log_hints: bool,
    /// `track_commit_timestamp`.
    pub track_commit_timestamp: bool,
}

/// News for the tracked `CheckPoint` struct.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CheckpointChange {
    /// `nextXid` lies after this transaction.
    Xid(u32),
    /// `nextOid` is this.
    NextOid(u32),
    /// `nextMulti` and `nextMultiOffset` are at least these.
    MultiXact {
        /// `nextMulti`.
        next_multi: u32,
        /// `nextMultiOffset`.
        next_offset: u32,
    },
    /// `oldestXid` and its database.
    OldestXid {
        /// `oldestXid`.
        xid: u32,
        /// `oldestXidDB`.
        db: u32,
    },
    /// `oldestMulti` and its database.
    OldestMulti {
        /// `oldestMulti`.
        multi: u32,
        /// `oldestMultiDB`.
        db: u32,
    },
    /// `oldestActiveXid` (`XLOG_RUNNING_XACTS`).
    OldestActiveXid(u32),
    /// `fullPageWrites`.
    FullPageWrites(bool),
    /// A checkpoint record of the source.
    Record {
        /// The `CheckPoint` struct, 88 bytes in PostgreSQL 15.
        body: Bytes,
        /// A shutdown checkpoint.
        shutdown: bool,
    },
}
