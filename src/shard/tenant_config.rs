//! Settings of one tenant over those of the node.
//!
//! Kept in the file `config` of the tenant's directory: JSON in the checksummed container of
//! `io::durable`. A setting that is not given follows the node's.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

use super::reader::PageQuota;
use super::timeline::TimelineConfig;
use crate::base::Kind;
use crate::config::{
    CHECKPOINT_TIMEOUT_S, CHECKPOINT_TIMEOUT_TEXT, COMPACTION_THRESHOLD, COMPACTION_THRESHOLD_TEXT,
    IMAGE_PERCENT, IMAGE_PERCENT_TEXT, LAYER_TARGET_BYTES, LAYER_TARGET_TEXT,
};

/// File name within the tenant's directory.
pub const CONFIG_FILE: &str = "config";

/// Version of the file's content.
const CONFIG_VERSION: u32 = 1;

/// Settings of a tenant; what is `None` follows the node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TenantConfig {
    /// See [`TimelineConfig::checkpoint_distance_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_distance_bytes: Option<u64>,
    /// See [`TimelineConfig::checkpoint_timeout_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint_timeout_s: Option<u64>,
    /// See [`TimelineConfig::wait_lsn_timeout_ms`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wait_lsn_timeout_ms: Option<u64>,
    /// See [`TimelineConfig::image_layer_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_layer_bytes: Option<u64>,
    /// See [`TimelineConfig::compaction_threshold`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compaction_threshold: Option<u64>,
    /// See [`TimelineConfig::compaction_target_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compaction_target_bytes: Option<u64>,
    /// See [`TimelineConfig::compaction_image_percent`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compaction_image_percent: Option<u64>,
    /// See [`TimelineConfig::gc_horizon_bytes`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gc_horizon_bytes: Option<u64>,
    /// See [`TimelineConfig::pitr_interval_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pitr_interval_s: Option<u64>,
    /// See [`TimelineConfig::gc_period_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gc_period_s: Option<u64>,
    /// See [`PageQuota::requests_per_s`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_requests_per_s: Option<u64>,
    /// See [`PageQuota::bytes_in_flight`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page_bytes_in_flight: Option<u64>,
}

/// Why settings of a tenant cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TenantConfigError {
    /// Not the JSON that we write.
    #[error("the tenant's settings are malformed: {0}")]
    Malformed(String),
    /// Written by another version of the program.
    #[error(
        "the tenant's settings have version {found}, this program reads version {CONFIG_VERSION}"
    )]
    Version {
        /// The version found.
        found: u32,
    },
    /// A value that cannot be.
    #[error("setting {key}: {problem}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
}

impl TenantConfigError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            TenantConfigError::Malformed(_) => Kind::Corrupt,
            TenantConfigError::Version { .. } | TenantConfigError::Value { .. } => Kind::Invalid,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    config: TenantConfig,
}

impl TenantConfig {
    /// Refuses what the node's own settings would not take either.
    pub fn check(&self) -> Result<(), TenantConfigError> {
        let fail = |key, problem| Err(TenantConfigError::Value { key, problem });
        if self.checkpoint_distance_bytes.is_some_and(|bytes| bytes < 64 * 1024) {
            return fail("checkpoint_distance_bytes", "must be at least 65536");
        }
        let outside = |value: Option<u64>, range: RangeInclusive<u64>| {
            value.is_some_and(|value| !range.contains(&value))
        };
        if outside(self.checkpoint_timeout_s, CHECKPOINT_TIMEOUT_S) {
            return fail("checkpoint_timeout_s", CHECKPOINT_TIMEOUT_TEXT);
        }
        if outside(self.image_layer_bytes, LAYER_TARGET_BYTES) {
            return fail("image_layer_bytes", LAYER_TARGET_TEXT);
        }
        if outside(self.compaction_threshold, COMPACTION_THRESHOLD) {
            return fail("compaction_threshold", COMPACTION_THRESHOLD_TEXT);
        }
        if outside(self.compaction_target_bytes, LAYER_TARGET_BYTES) {
            return fail("compaction_target_bytes", LAYER_TARGET_TEXT);
        }
        if outside(self.compaction_image_percent, IMAGE_PERCENT) {
            return fail("compaction_image_percent", IMAGE_PERCENT_TEXT);
        }
        Ok(())
    }

    /// The node's settings with these over them.
    pub fn over(&self, node: TimelineConfig) -> TimelineConfig {
        TimelineConfig {
            checkpoint_distance_bytes: self
                .checkpoint_distance_bytes
                .unwrap_or(node.checkpoint_distance_bytes),
            checkpoint_timeout_s: self.checkpoint_timeout_s.unwrap_or(node.checkpoint_timeout_s),
            wait_lsn_timeout_ms: self.wait_lsn_timeout_ms.unwrap_or(node.wait_lsn_timeout_ms),
            image_layer_bytes: self.image_layer_bytes.unwrap_or(node.image_layer_bytes),
            compaction_threshold: self
                .compaction_threshold
                .and_then(|count| usize::try_from(count).ok())
                .unwrap_or(node.compaction_threshold),
            compaction_target_bytes: self
                .compaction_target_bytes
                .unwrap_or(node.compaction_target_bytes),
            compaction_image_percent: self
                .compaction_image_percent
                .unwrap_or(node.compaction_image_percent),
            gc_horizon_bytes: self.gc_horizon_bytes.unwrap_or(node.gc_horizon_bytes),
            pitr_interval_s: self.pitr_interval_s.unwrap_or(node.pitr_interval_s),
            gc_period_s: self.gc_period_s.unwrap_or(node.gc_period_s),
            page_quota: PageQuota {
                requests_per_s: self.page_requests_per_s.unwrap_or(node.page_quota.requests_per_s),
                bytes_in_flight: self
                    .page_bytes_in_flight
                    .unwrap_or(node.page_quota.bytes_in_flight),
            },
            ..node
        }
    }

    /// Every setting with the value that is in force.
    pub fn effective(config: TimelineConfig) -> TenantConfig {
        TenantConfig {
            checkpoint_distance_bytes: Some(config.checkpoint_distance_bytes),
            checkpoint_timeout_s: Some(config.checkpoint_timeout_s),
            wait_lsn_timeout_ms: Some(config.wait_lsn_timeout_ms),
            image_layer_bytes: Some(config.image_layer_bytes),
            compaction_threshold: Some(config.compaction_threshold as u64),
            compaction_target_bytes: Some(config.compaction_target_bytes),
            compaction_image_percent: Some(config.compaction_image_percent),
            gc_horizon_bytes: Some(config.gc_horizon_bytes),
            pitr_interval_s: Some(config.pitr_interval_s),
            gc_period_s: Some(config.gc_period_s),
            page_requests_per_s: Some(config.page_quota.requests_per_s),
            page_bytes_in_flight: Some(config.page_quota.bytes_in_flight),
        }
    }

    /// The written form.
    pub fn encode(&self) -> Vec<u8> {
        let stored = Stored { version: CONFIG_VERSION, config: *self };
        serde_json::to_vec_pretty(&stored).expect("plain fields always have a JSON form")
    }

    /// Reads the written form.
    pub fn decode(bytes: &[u8]) -> Result<TenantConfig, TenantConfigError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let malformed = |error: serde_json::Error| TenantConfigError::Malformed(error.to_string());
        let version: Version = serde_json::from_slice(bytes).map_err(malformed)?;
        if version.version != CONFIG_VERSION {
            return Err(TenantConfigError::Version { found: version.version });
        }
        let stored: Stored = serde_json::from_slice(bytes).map_err(malformed)?;
        stored.config.check()?;
        Ok(stored.config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: TimelineConfig = TimelineConfig {
        checkpoint_distance_bytes: 1 << 20,
        checkpoint_timeout_s: 600,
        wait_lsn_timeout_ms: 1000,
        image_layer_bytes: 1 << 20,
        compaction_threshold: 4,
        compaction_target_bytes: 1 << 20,
        compaction_image_percent: 100,
        gc_horizon_bytes: 1,
        pitr_interval_s: 2,
        gc_period_s: 3,
        timeline_idle_ms: 4,
        page_quota: PageQuota { requests_per_s: 5, bytes_in_flight: 6 },
    };

    #[test]
    fn what_is_given_wins_and_the_rest_follows_the_node() {
        let config = TenantConfig { checkpoint_timeout_s: Some(5), ..TenantConfig::default() };
        assert_eq!(config.over(NODE), TimelineConfig { checkpoint_timeout_s: 5, ..NODE });
        assert_eq!(TenantConfig::effective(NODE).over(config.over(NODE)), NODE);
        let layers = TenantConfig {
            image_layer_bytes: Some(1 << 21),
            compaction_threshold: Some(7),
            compaction_target_bytes: Some(1 << 22),
            compaction_image_percent: Some(30),
            ..TenantConfig::default()
        };
        let expected = TimelineConfig {
            image_layer_bytes: 1 << 21,
            compaction_threshold: 7,
            compaction_target_bytes: 1 << 22,
            compaction_image_percent: 30,
            ..NODE
        };
        assert_eq!(layers.over(NODE), expected);
        assert_eq!(layers.check(), Ok(()));
        let quota = TenantConfig { page_requests_per_s: Some(0), ..config }.over(NODE).page_quota;
        assert_eq!(quota, PageQuota { requests_per_s: 0, ..NODE.page_quota });
        assert_eq!(TenantConfig::decode(&config.encode()), Ok(config));
    }

    #[test]
    fn mistakes_are_refused() {
        let text = |json: &str| {
            serde_json::from_str::<TenantConfig>(json).map_err(|error| error.to_string())
        };
        assert!(text(r#"{"chekpoint_timeout_s": 5}"#).unwrap_err().contains("chekpoint_timeout_s"));
        let zero = TenantConfig { checkpoint_timeout_s: Some(0), ..TenantConfig::default() };
        assert!(matches!(zero.check(), Err(TenantConfigError::Value { .. })));
        assert!(TenantConfig::decode(&zero.encode()).is_err());
        let small = TenantConfig { image_layer_bytes: Some(1 << 19), ..TenantConfig::default() };
        let many = TenantConfig { compaction_threshold: Some(9), ..TenantConfig::default() };
        let large =
            TenantConfig { compaction_target_bytes: Some(1 << 31), ..TenantConfig::default() };
        let none = TenantConfig { compaction_image_percent: Some(0), ..TenantConfig::default() };
        for (wrong, key) in [
            (small, "image_layer_bytes"),
            (many, "compaction_threshold"),
            (large, "compaction_target_bytes"),
            (none, "compaction_image_percent"),
        ] {
            let error = wrong.check().unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
        }
        let newer = br#"{"version": 2, "config": {"new": 1}}"#;
        assert_eq!(TenantConfig::decode(newer), Err(TenantConfigError::Version { found: 2 }));
    }
}
