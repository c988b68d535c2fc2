//! The index of a timeline: one small file that says what the timeline consists of.
//!
//! It names every layer, so the set of layers and `disk_consistent_lsn` change together, by one
//! atomic replacement. A layer file that it does not name does not exist; such files are left
//! over from a crash and are removed at start. The body is JSON inside the checksummed container
//! of `io::durable`.

use serde::{Deserialize, Serialize};

use crate::base::{Lsn, TenantShardId, TimelineId};

/// Version of the index's content.
pub const INDEX_VERSION: u32 = 2;

/// File name within the timeline's directory.
pub const INDEX_FILE: &str = "index";

/// What the index is renamed to when the timeline is deleted: from then on the timeline does not
/// exist, and whoever finds the directory removes it.
pub const DELETED_FILE: &str = "deleted";

/// Where a branch leaves the timeline that it was made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BranchPoint {
    /// The ancestor, of the same tenant.
    pub timeline: TimelineId,
    /// The ancestor's changes at this LSN and below belong to the branch, later ones do not.
    pub lsn: Lsn,
}

/// Where the timeline's WAL comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WalSourceConfig {
    /// libpq connection string.
    pub conninfo: String,
    /// Physical replication slot.
    pub slot: Option<String>,
}

/// A layer as the index names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexLayer {
    /// File name; it says key range and LSN range.
    pub name: String,
    /// File length in bytes.
    pub len: u64,
}

/// The cluster that the timeline was imported from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterIdentity {
    /// `system_identifier` of `pg_control`.
    pub system_id: u64,
    /// PostgreSQL's timeline number.
    pub tli: u32,
    /// WAL segment size in bytes.
    pub wal_segment_bytes: u64,
    /// The cluster has data checksums.
    pub data_checksums: bool,
    /// The cluster has `wal_log_hints = on` or data checksums.
    pub hint_bits_logged: bool,
}

/// The index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimelineIndex {
    /// [`INDEX_VERSION`].
    pub version: u32,
    /// The tenant shard.
    pub tenant: TenantShardId,
    /// The timeline.
    pub timeline: TimelineId,
    /// The cluster that it comes from.
    pub cluster: ClusterIdentity,
    /// WAL source, if there is one.
    pub source: Option<WalSourceConfig>,
    /// The ancestor of a branch. It has everything up to the branch point; `layers` and journal
    /// have what follows.
    pub ancestor: Option<BranchPoint>,
    /// Takes in no WAL and is not read, but by its branches.
    pub archived: bool,
    /// First readable LSN: the end of the base backup.
    pub start_lsn: Lsn,
    /// Everything up to here is in `layers`; the journal has what follows.
    pub disk_consistent_lsn: Lsn,
    /// Reads before this LSN are refused, unless a lease holds it; `start_lsn` at first.
    #[serde(default)]
    pub gc_cutoff_lsn: Lsn,
    /// All layers.
    pub layers: Vec<IndexLayer>,
}

/// Why an index cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// Not the JSON that we write.
    #[error("the timeline index is malformed: {0}")]
    Malformed(String),
    /// Written by another version of the program.
    #[error("the timeline index has version {found}, this program reads version {INDEX_VERSION}")]
    Version {
        /// The version found.
        found: u32,
    },
}

impl TimelineIndex {
    /// The written form.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("plain fields always have a JSON form")
    }

    /// Reads the written form.
    pub fn decode(bytes: &[u8]) -> Result<TimelineIndex, IndexError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let malformed = |error: serde_json::Error| IndexError::Malformed(error.to_string());
        let version: Version = serde_json::from_slice(bytes).map_err(malformed)?;
        if version.version != INDEX_VERSION {
            return Err(IndexError::Version { found: version.version });
        }
        let mut index: TimelineIndex = serde_json::from_slice(bytes).map_err(malformed)?;
        index.gc_cutoff_lsn = index.gc_cutoff_lsn.max(index.start_lsn);
        Ok(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::TenantId;

    #[test]
    fn round_trip_and_versions() {
        let index = TimelineIndex {
            version: INDEX_VERSION,
            tenant: TenantShardId::unsharded(TenantId([1; 16])),
            timeline: TimelineId([2; 16]),
            cluster: ClusterIdentity {
                system_id: u64::MAX,
                tli: 1,
                wal_segment_bytes: 1 << 24,
                data_checksums: true,
                hint_bits_logged: true,
            },
            source: Some(WalSourceConfig { conninfo: "host=x".into(), slot: None }),
            ancestor: Some(BranchPoint { timeline: TimelineId([3; 16]), lsn: Lsn(0x2800) }),
            archived: true,
            start_lsn: Lsn(0x2000),
            disk_consistent_lsn: Lsn(0x3000),
            gc_cutoff_lsn: Lsn(0x2800),
            layers: vec![IndexLayer { name: "a".into(), len: 4096 }],
        };
        assert_eq!(TimelineIndex::decode(&index.encode()), Ok(index.clone()));
        let other = TimelineIndex { version: 3, ..index };
        assert_eq!(TimelineIndex::decode(&other.encode()), Err(IndexError::Version { found: 3 }));
        assert!(matches!(TimelineIndex::decode(b"{"), Err(IndexError::Malformed(_))));
    }
}
