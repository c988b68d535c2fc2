//! The key space: everything that a timeline stores, in one ordered space of 18-byte keys.
//!
//! A key is written big-endian, so that byte order is key order: `field1` u8, `field2` u32,
//! `field3` u32, `field4` u32, `field5` u8, `field6` u32.
//!
//! | field1 | field2 | field3 | field4 | field5 | field6 | holds |
//! |---|---|---|---|---|---|---|
//! | `00` | tablespace | database | 0 | 0 | 0 | relation map file |
//! | `00` | tablespace | database | relation | fork | block | a relation's page |
//! | `00` | tablespace | database | relation | fork | `FFFFFFFF` | a fork's size in blocks, u32 LE |
//! | `01` | SLRU kind | 0 | segment | 0 | 0 | SLRU directory: the segment exists |
//! | `01` | SLRU kind | 1 | segment | 0 | block | an SLRU page |
//! | `01` | SLRU kind | 1 | segment | 0 | `FFFFFFFF` | a segment's size in blocks, u32 LE |
//! | `02` | 0 | 0 | 0 | 0 | xid | state of a prepared transaction |
//! | `03` | 0 | 0 | 0 | 0 | 0 | `pg_control` as it was imported |
//! | `03` | 0 | 0 | 0 | 0 | 1 | the tracked `CheckPoint` struct |
//! | `63` | 0 | 0 | 0 | 0 | origin id | replication origin: remote LSN, u64 LE |
//! | `64` | tablespace | database | 0 | 0 | 0 | database directory: the database exists |
//! | `65` | tablespace | database | relation | fork | 1 | relation directory: the fork exists |
//!
//! Directories have one key per entry, so that creating one relation among 100,000 writes one
//! small value. In the directories, the prepared transactions and the replication origins, an
//! empty value means "removed".

use std::fmt;
use std::hash::{Hash, Hasher};

/// Number of a block within a relation fork or SLRU segment.
pub type BlockNumber = u32;

/// The main fork of a relation (`MAIN_FORKNUM`).
pub const FORK_MAIN: u8 = 0;
/// The free space map (`FSM_FORKNUM`).
pub const FORK_FSM: u8 = 1;
/// The visibility map (`VISIBILITYMAP_FORKNUM`).
pub const FORK_VM: u8 = 2;
/// The template of an unlogged relation (`INIT_FORKNUM`).
pub const FORK_INIT: u8 = 3;

/// Length of a written key in bytes.
pub const KEY_SIZE: usize = 18;

/// `field6` of the keys that hold a size.
const SIZE_FIELD6: u32 = u32::MAX;

const RELATION: u8 = 0x00;
const SLRU: u8 = 0x01;
const TWO_PHASE: u8 = 0x02;
const CONTROL: u8 = 0x03;
const ORIGIN: u8 = 0x63;
const DATABASE_DIR: u8 = 0x64;
const RELATION_DIR: u8 = 0x65;

/// A relation without its fork (`RelFileNode`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelNode {
    /// OID of the tablespace; 1663 is `pg_default`, 1664 `pg_global`.
    pub spc: u32,
    /// OID of the database; 0 for shared relations.
    pub db: u32,
    /// The relation's file number.
    pub rel: u32,
}

impl RelNode {
    /// One fork of the relation.
    pub fn fork(self, fork: u8) -> RelTag {
        RelTag { node: self, fork }
    }
}

/// A fork of a relation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RelTag {
    /// The relation.
    pub node: RelNode,
    /// The fork: [`FORK_MAIN`], [`FORK_FSM`], [`FORK_VM`] or [`FORK_INIT`].
    pub fork: u8,
}

impl fmt::Display for RelTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.node.spc, self.node.db, self.node.rel)?;
        match self.fork {
            FORK_MAIN => Ok(()),
            FORK_FSM => f.write_str("_fsm"),
            FORK_VM => f.write_str("_vm"),
            FORK_INIT => f.write_str("_init"),
            other => write!(f, "_fork{other}"),
        }
    }
}

/// Blocks per SLRU segment (`SLRU_PAGES_PER_SEGMENT`).
pub const SLRU_PAGES_PER_SEGMENT: u32 = 32;

/// The "simple LRU" logs that a timeline keeps. The numbers are those of the page service.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub enum SlruKind {
    /// `pg_xact`: commit status of transactions.
    Clog = 0,
    /// `pg_multixact/members`.
    MultiXactMembers = 1,
    /// `pg_multixact/offsets`.
    MultiXactOffsets = 2,
}

impl SlruKind {
    /// All kinds, in key order.
    pub const ALL: [SlruKind; 3] =
        [SlruKind::Clog, SlruKind::MultiXactMembers, SlruKind::MultiXactOffsets];

    /// The kind with this number.
    pub fn from_number(number: u32) -> Option<SlruKind> {
        SlruKind::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    /// Directory of its segment files, relative to the data directory.
    pub fn directory(self) -> &'static str {
        match self {
            SlruKind::Clog => "pg_xact",
            SlruKind::MultiXactMembers => "pg_multixact/members",
            SlruKind::MultiXactOffsets => "pg_multixact/offsets",
        }
    }
}

/// One key. Fields and order: see the module's table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "the fields have no meaning of their own, see the table")]
pub struct Key {
    pub field1: u8,
    pub field2: u32,
    pub field3: u32,
    pub field4: u32,
    pub field5: u8,
    pub field6: u32,
}

/// Three writes instead of six: ingest hashes the key of every value.
impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        state.write_u64(pair(self.field4, self.field6));
        state.write_u64(pair(self.field2, self.field3));
        state.write_u64(pair(u32::from(self.field1), u32::from(self.field5)));
    }
}

/// A half-open range of keys.
pub type KeyRange = std::ops::Range<Key>;

/// What a key names, for those who must tell keys apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KeyKind {
    /// A page of a relation fork.
    RelBlock(RelTag, BlockNumber),
    /// A page of an SLRU: kind, segment number, block within the segment.
    SlruBlock(SlruKind, u32, BlockNumber),
    /// Anything else: a small value that is replaced whole.
    Metadata,
}

impl Key {
    /// The lowest key.
    pub const MIN: Key = Key { field1: 0, field2: 0, field3: 0, field4: 0, field5: 0, field6: 0 };
    /// Past every key that is in use.
    pub const MAX: Key = Key {
        field1: u8::MAX,
        field2: u32::MAX,
        field3: u32::MAX,
        field4: u32::MAX,
        field5: u8::MAX,
        field6: u32::MAX,
    };

    const fn new(
        field1: u8,
        field2: u32,
        field3: u32,
        field4: u32,
        field5: u8,
        field6: u32,
    ) -> Key {
        Key { field1, field2, field3, field4, field5, field6 }
    }

    /// A page of a relation fork.
    pub fn rel_block(rel: RelTag, block: BlockNumber) -> Key {
        Key::new(RELATION, rel.node.spc, rel.node.db, rel.node.rel, rel.fork, block)
    }

    /// A page or the size of a relation fork, or a relation map. These keys come before all others.
    pub fn is_of_relation(self) -> bool {
        self.field1 == RELATION
    }

    /// The size of a relation fork.
    pub fn rel_size(rel: RelTag) -> Key {
        Key::rel_block(rel, SIZE_FIELD6)
    }

    /// The directory entry of a relation fork.
    pub fn rel_dir(rel: RelTag) -> Key {
        Key::new(RELATION_DIR, rel.node.spc, rel.node.db, rel.node.rel, rel.fork, 1)
    }

    /// The fork that a directory key stands for.
    pub fn as_rel_dir(self) -> Option<RelTag> {
        (self.field1 == RELATION_DIR).then_some(RelTag {
            node: RelNode { spc: self.field2, db: self.field3, rel: self.field4 },
            fork: self.field5,
        })
    }

    /// Directory entries of all relation forks of one database in one tablespace.
    pub fn rel_dir_range(spc: u32, db: u32) -> KeyRange {
        let start = Key::new(RELATION_DIR, spc, db, 0, 0, 0);
        start..Key { field4: u32::MAX, field5: u8::MAX, field6: u32::MAX, ..start }
    }

    /// Directory entries of all relation forks.
    pub fn rel_dir_all() -> KeyRange {
        Key::new(RELATION_DIR, 0, 0, 0, 0, 0)..Key::new(RELATION_DIR + 1, 0, 0, 0, 0, 0)
    }

    /// The directory entry of a database.
    pub fn database(spc: u32, db: u32) -> Key {
        Key::new(DATABASE_DIR, spc, db, 0, 0, 0)
    }

    /// Directory entries of all databases.
    pub fn database_all() -> KeyRange {
        Key::new(DATABASE_DIR, 0, 0, 0, 0, 0)..Key::new(DATABASE_DIR + 1, 0, 0, 0, 0, 0)
    }

    /// Tablespace and database that a directory key stands for.
    pub fn as_database(self) -> Option<(u32, u32)> {
        (self.field1 == DATABASE_DIR).then_some((self.field2, self.field3))
    }

    /// The relation map file of a database; `global/` is tablespace 1664, database 0.
    pub fn relmap(spc: u32, db: u32) -> Key {
        Key::new(RELATION, spc, db, 0, 0, 0)
    }

    /// The directory entry of an SLRU segment.
    pub fn slru_dir(kind: SlruKind, segment: u32) -> Key {
        Key::new(SLRU, kind as u32, 0, segment, 0, 0)
    }

    /// Directory entries of all segments of an SLRU.
    pub fn slru_dir_range(kind: SlruKind) -> KeyRange {
        Key::slru_dir(kind, 0)..Key::new(SLRU, kind as u32, 1, 0, 0, 0)
    }

    /// The SLRU segment that a directory key stands for.
    pub fn as_slru_dir(self) -> Option<(SlruKind, u32)> {
        let kind = SlruKind::from_number(self.field2)?;
        (self.field1 == SLRU && self.field3 == 0).then_some((kind, self.field4))
    }

    /// A page of an SLRU; `block` is within the segment.
    pub fn slru_block(kind: SlruKind, segment: u32, block: BlockNumber) -> Key {
        Key::new(SLRU, kind as u32, 1, segment, 0, block)
    }

    /// The size of an SLRU segment.
    pub fn slru_size(kind: SlruKind, segment: u32) -> Key {
        Key::slru_block(kind, segment, SIZE_FIELD6)
    }

    /// State of a prepared transaction.
    pub fn two_phase(xid: u32) -> Key {
        Key::new(TWO_PHASE, 0, 0, 0, 0, xid)
    }

    /// All prepared transactions.
    pub fn two_phase_all() -> KeyRange {
        Key::two_phase(0)..Key::new(TWO_PHASE + 1, 0, 0, 0, 0, 0)
    }

    /// `pg_control` as it was imported.
    pub const CONTROL_FILE: Key = Key::new(CONTROL, 0, 0, 0, 0, 0);
    /// The tracked `CheckPoint` struct.
    pub const CHECKPOINT: Key = Key::new(CONTROL, 0, 0, 0, 0, 1);

    /// Progress of a replication origin.
    pub fn replication_origin(id: u16) -> Key {
        Key::new(ORIGIN, 0, 0, 0, 0, u32::from(id))
    }

    /// All replication origins.
    pub fn replication_origin_all() -> KeyRange {
        Key::new(ORIGIN, 0, 0, 0, 0, 0)..Key::new(ORIGIN + 1, 0, 0, 0, 0, 0)
    }

    /// What the key names.
    pub fn kind(self) -> KeyKind {
        let node = RelNode { spc: self.field2, db: self.field3, rel: self.field4 };
        match self.field1 {
            _ if self.field6 == SIZE_FIELD6 => KeyKind::Metadata,
            RELATION if self.field4 != 0 => {
                KeyKind::RelBlock(RelTag { node, fork: self.field5 }, self.field6)
            }
            SLRU if self.field3 == 1 => match SlruKind::from_number(self.field2) {
                Some(kind) => KeyKind::SlruBlock(kind, self.field4, self.field6),
                None => KeyKind::Metadata,
            },
            _ => KeyKind::Metadata,
        }
    }

    /// The key just after this one; [`Key::MAX`] is its own successor.
    pub fn next(self) -> Key {
        let mut bytes = self.to_bytes();
        for byte in bytes.iter_mut().rev() {
            let (value, overflow) = byte.overflowing_add(1);
            *byte = value;
            if !overflow {
                return Key::from_bytes(&bytes);
            }
        }
        Key::MAX
    }

    /// The written form.
    pub fn to_bytes(self) -> [u8; KEY_SIZE] {
        let mut out = [0; KEY_SIZE];
        out[0] = self.field1;
        out[1..5].copy_from_slice(&self.field2.to_be_bytes());
        out[5..9].copy_from_slice(&self.field3.to_be_bytes());
        out[9..13].copy_from_slice(&self.field4.to_be_bytes());
        out[13] = self.field5;
        out[14..18].copy_from_slice(&self.field6.to_be_bytes());
        out
    }

    /// Reads the written form. Every byte string of the right length is a key.
    pub fn from_bytes(bytes: &[u8; KEY_SIZE]) -> Key {
        let u32_at = |at: usize| {
            u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Key::new(bytes[0], u32_at(1), u32_at(5), u32_at(9), bytes[13], u32_at(14))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode_upper(self.to_bytes()))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind() {
            KeyKind::RelBlock(rel, block) => write!(f, "{rel} block {block}"),
            KeyKind::SlruBlock(kind, segment, block) => {
                write!(f, "{}/{segment:04X} block {block}", kind.directory())
            }
            KeyKind::Metadata => fmt::Display::fmt(self, f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REL: RelTag = RelTag { node: RelNode { spc: 1663, db: 5, rel: 16384 }, fork: FORK_VM };

    #[test]
    fn written_order_is_key_order() {
        let keys = [
            Key::relmap(1663, 5),
            Key::rel_block(REL.node.fork(FORK_MAIN), 7),
            Key::rel_block(REL, 0),
            Key::rel_block(REL, 1),
            Key::rel_size(REL),
            Key::slru_dir(SlruKind::Clog, 9),
            Key::slru_block(SlruKind::Clog, 0, 3),
            Key::slru_size(SlruKind::Clog, 0),
            Key::two_phase(1),
            Key::CONTROL_FILE,
            Key::CHECKPOINT,
            Key::replication_origin(1),
            Key::database(1663, 5),
            Key::rel_dir(REL),
        ];
        for pair in keys.windows(2) {
            assert!(pair[0] < pair[1], "{:?} is not before {:?}", pair[0], pair[1]);
            assert!(pair[0].to_bytes() < pair[1].to_bytes());
        }
        for key in keys {
            assert_eq!(Key::from_bytes(&key.to_bytes()), key);
            assert!(key < key.next());
        }
        assert_eq!(Key::MAX.next(), Key::MAX);
    }

    #[test]
    fn kinds_and_directories_read_back() {
        assert_eq!(Key::rel_block(REL, 3).kind(), KeyKind::RelBlock(REL, 3));
        assert_eq!(Key::rel_size(REL).kind(), KeyKind::Metadata);
        assert_eq!(Key::relmap(1663, 5).kind(), KeyKind::Metadata);
        let slru = Key::slru_block(SlruKind::MultiXactOffsets, 2, 3);
        assert_eq!(slru.kind(), KeyKind::SlruBlock(SlruKind::MultiXactOffsets, 2, 3));
        assert_eq!(Key::rel_dir(REL).as_rel_dir(), Some(REL));
        assert!(Key::rel_dir_range(1663, 5).contains(&Key::rel_dir(REL)));
        assert!(!Key::rel_dir_range(1663, 6).contains(&Key::rel_dir(REL)));
        assert_eq!(Key::database(1663, 5).as_database(), Some((1663, 5)));
        let dir = Key::slru_dir(SlruKind::MultiXactMembers, 77);
        assert_eq!(dir.as_slru_dir(), Some((SlruKind::MultiXactMembers, 77)));
        assert!(Key::slru_dir_range(SlruKind::MultiXactMembers).contains(&dir));
    }
}
