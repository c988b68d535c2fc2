//! The node's settings: one TOML file, and `-c key=value` on the command line over it.
//!
//! Every key has its unit in its name. An unknown key is an error that names the nearest known
//! one: a misspelt setting must not be ignored in silence.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::limits::{CORES_MAX, L0_LAYERS_URGENT, QUOTA_BYTES_IN_FLIGHT, QUOTA_REQUESTS_PER_S};

/// What `checkpoint_timeout_s` may be: the executor's timers end the process where the sum of time
/// and pause has no representation.
pub const CHECKPOINT_TIMEOUT_S: RangeInclusive<u64> = 1..=10 * 365 * 24 * 3600;
/// The same in words.
pub const CHECKPOINT_TIMEOUT_TEXT: &str = "must be from 1 to 315360000 (10 years)";
/// What `image_layer_bytes` and `compaction_target_bytes` may be, in bytes.
pub const LAYER_TARGET_BYTES: RangeInclusive<u64> = 1024 * 1024..=1 << 30;
/// The same in words.
pub const LAYER_TARGET_TEXT: &str = "must be from 1048576 (1 MiB) to 1073741824 (1 GiB)";
/// What `compaction_threshold` may be, in layers.
pub const COMPACTION_THRESHOLD: RangeInclusive<u64> = 1..=L0_LAYERS_URGENT as u64;
/// The same in words.
pub const COMPACTION_THRESHOLD_TEXT: &str = "must be from 1 to 8";
const _: () = assert!(L0_LAYERS_URGENT == 8);
/// What `compaction_image_percent` may be.
pub const IMAGE_PERCENT: RangeInclusive<u64> = 5..=1000;
/// The same in words.
pub const IMAGE_PERCENT_TEXT: &str = "must be from 5 to 1000";

/// All settings with their defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Directory that holds everything. Must exist or have an existing parent.
    pub data_dir: PathBuf,
    /// Address of the page service.
    pub listen_pg_addr: SocketAddr,
    /// Address of the admin API.
    pub listen_http_addr: SocketAddr,
    /// PEM file with the certificate of the page service, and those between it and an authority;
    /// empty: no TLS.
    pub tls_cert_file: PathBuf,
    /// PEM file with the certificate's private key.
    pub tls_key_file: PathBuf,
    /// CPUs to run on, one pair of executors each; empty: all that this process may use.
    pub cores: Vec<usize>,
    /// A timeline's values in memory are written to a layer file when they take so much memory.
    pub checkpoint_distance_bytes: u64,
    /// The same, when they are so old.
    pub checkpoint_timeout_s: u64,
    /// Memory of each core for values that are not in layer files yet, of all its timelines. When
    /// there is more, the timeline with the most writes a layer file.
    pub memory_budget_bytes: u64,
    /// A read waits so long for WAL that has not arrived.
    pub wait_lsn_timeout_ms: u64,
    /// An import cuts image layers at about this size.
    pub image_layer_bytes: u64,
    /// Layers over all keys, as checkpoints write them, are merged when there are so many.
    pub compaction_threshold: u64,
    /// Compaction cuts layers at about this size.
    pub compaction_target_bytes: u64,
    /// A key range gets new images when the deltas on it have grown to so many percent of the
    /// images' size: more means fewer bytes written and longer reads.
    pub compaction_image_percent: u64,
    /// So many bytes of WAL before the newest record stay readable.
    pub gc_horizon_bytes: u64,
    /// What was committed within this time stays readable; 0: `gc_horizon_bytes` decides alone.
    pub pitr_interval_s: u64,
    /// Pause between two garbage collections of a timeline; 0: only by command.
    pub gc_period_s: u64,
    /// A timeline that takes in no WAL and is not read is closed after so long, and opened again
    /// when it is next asked for; 0: it stays open.
    pub timeline_idle_s: u64,
    /// Page requests per second of one tenant that one core takes; 0: any number. Tenants may have
    /// settings of their own.
    pub page_requests_per_s: u64,
    /// Bytes of pages of one tenant that one core works on at once. Tenants may have settings of
    /// their own.
    pub page_bytes_in_flight: u64,
    /// Space of removed files that is kept for new ones, of the whole node: freeing space can hold
    /// up the device.
    pub spare_bytes: u64,
    /// Memory of each core for verified blocks of layer files.
    pub block_cache_bytes: u64,
    /// Memory of each core for recently rebuilt pages.
    pub page_cache_bytes: u64,
    /// The `postgres` program of PostgreSQL 15 that applies WAL records.
    pub postgres_bin: PathBuf,
    /// The library that makes it do so; empty: `neon_walredo.so` beside this program, or in
    /// `walredo/` beside the directory of this program.
    pub walredo_library: PathBuf,
    /// A page must be rebuilt within this time.
    pub redo_timeout_ms: u64,
    /// Processes that apply WAL records may run on a kernel that cannot confine them. Only for a
    /// developer's own WAL: a hostile record can take such a process over.
    pub redo_sandbox_optional: bool,
    /// What is logged, in `tracing`'s filter language.
    pub log_filter: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            data_dir: PathBuf::from("pgstrata-data"),
            listen_pg_addr: SocketAddr::from(([127, 0, 0, 1], 6400)),
            listen_http_addr: SocketAddr::from(([127, 0, 0, 1], 9898)),
            tls_cert_file: PathBuf::new(),
            tls_key_file: PathBuf::new(),
            cores: Vec::new(),
            checkpoint_distance_bytes: 64 * 1024 * 1024,
            checkpoint_timeout_s: 600,
            memory_budget_bytes: 512 * 1024 * 1024,
            wait_lsn_timeout_ms: 300_000,
            image_layer_bytes: 128 * 1024 * 1024,
            compaction_threshold: 3,
            compaction_target_bytes: 128 * 1024 * 1024,
            compaction_image_percent: 50,
            gc_horizon_bytes: 64 * 1024 * 1024,
            pitr_interval_s: 7 * 24 * 3600,
            gc_period_s: 3600,
            timeline_idle_s: 300,
            page_requests_per_s: QUOTA_REQUESTS_PER_S,
            page_bytes_in_flight: QUOTA_BYTES_IN_FLIGHT,
            spare_bytes: 1024 * 1024 * 1024,
            block_cache_bytes: 64 * 1024 * 1024,
            page_cache_bytes: 32 * 1024 * 1024,
            postgres_bin: PathBuf::from("/usr/lib/postgresql/15/bin/postgres"),
            walredo_library: PathBuf::new(),
            redo_timeout_ms: 60_000,
            redo_sandbox_optional: false,
            log_filter: "info".to_owned(),
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {}: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// Not TOML, or a value of the wrong type.
    #[error("{origin}: {problem}")]
    Syntax {
        /// File or option.
        origin: String,
        /// What is wrong.
        problem: String,
    },
    /// No such key.
    #[error("{origin}: there is no setting '{key}'; did you mean '{nearest}'?")]
    UnknownKey {
        /// File or option.
        origin: String,
        /// The key.
        key: String,
        /// The most similar one.
        nearest: String,
    },
    /// A value that cannot be.
    #[error("setting {key}: {problem}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
}

impl Config {
    /// Reads `file`, if one is given, and the `key=value` pairs over it.
    pub fn load(file: Option<&Path>, overrides: &[String]) -> Result<Config, ConfigError> {
        let mut table = toml::Table::new();
        if let Some(path) = file {
            #[allow(clippy::disallowed_methods, reason = "before there is any executor")]
            let text = std::fs::read_to_string(path)
                .map_err(|cause| ConfigError::Unreadable { path: path.to_owned(), cause })?;
            merge(&mut table, &text, &path.display().to_string())?;
        }
        for pair in overrides {
            let origin = format!("-c {pair}");
            let Some((key, value)) = pair.split_once('=') else {
                let problem = "write key=value".to_owned();
                return Err(ConfigError::Syntax { origin, problem });
            };
            // A value that is no TOML by itself is a text: -c data_dir=/srv/pgstrata.
            let as_written = format!("{} = {}", key.trim(), value.trim());
            let text = match as_written.parse::<toml::Table>() {
                Ok(_) => as_written,
                Err(_) => format!("{} = {}", key.trim(), toml::Value::from(value.trim())),
            };
            merge(&mut table, &text, &origin)?;
        }
        let config: Config = table.try_into().map_err(|error| ConfigError::Syntax {
            origin: "configuration".to_owned(),
            problem: error.to_string(),
        })?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let fail =
            |key, problem: &str| Err(ConfigError::Value { key, problem: problem.to_owned() });
        if self.cores.len() > CORES_MAX {
            return fail("cores", "more CPUs than this program uses");
        }
        if self.tls_cert_file.as_os_str().is_empty() != self.tls_key_file.as_os_str().is_empty() {
            return fail("tls_cert_file", "goes with tls_key_file: set both or neither");
        }
        let mut sorted = self.cores.clone();
        sorted.sort_unstable();
        if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
            return fail("cores", "a CPU is named twice");
        }
        if self.memory_budget_bytes < 1024 * 1024 {
            return fail("memory_budget_bytes", "must be at least 1048576");
        }
        if self.checkpoint_distance_bytes < 64 * 1024 {
            return fail("checkpoint_distance_bytes", "must be at least 65536");
        }
        if !CHECKPOINT_TIMEOUT_S.contains(&self.checkpoint_timeout_s) {
            return fail("checkpoint_timeout_s", CHECKPOINT_TIMEOUT_TEXT);
        }
        if !LAYER_TARGET_BYTES.contains(&self.image_layer_bytes) {
            return fail("image_layer_bytes", LAYER_TARGET_TEXT);
        }
        if !COMPACTION_THRESHOLD.contains(&self.compaction_threshold) {
            return fail("compaction_threshold", COMPACTION_THRESHOLD_TEXT);
        }
        if !LAYER_TARGET_BYTES.contains(&self.compaction_target_bytes) {
            return fail("compaction_target_bytes", LAYER_TARGET_TEXT);
        }
        if !IMAGE_PERCENT.contains(&self.compaction_image_percent) {
            return fail("compaction_image_percent", IMAGE_PERCENT_TEXT);
        }
        if self.redo_timeout_ms == 0 {
            return fail("redo_timeout_ms", "must be at least 1");
        }
        Ok(())
    }
}

fn merge(table: &mut toml::Table, text: &str, origin: &str) -> Result<(), ConfigError> {
    let parsed: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        ConfigError::Syntax { origin: origin.to_owned(), problem: error.to_string() }
    })?;
    let known = toml::Table::try_from(Config::default()).unwrap_or_default();
    for (key, value) in parsed {
        if !known.contains_key(&key) {
            let nearest = known.keys().min_by_key(|other| distance(&key, other));
            return Err(ConfigError::UnknownKey {
                origin: origin.to_owned(),
                nearest: nearest.cloned().unwrap_or_default(),
                key,
            });
        }
        table.insert(key, value);
    }
    Ok(())
}

/// Edit distance of two short words (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let substitute = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(overrides: &[&str]) -> Result<Config, ConfigError> {
        let owned: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        Config::load(None, &owned)
    }

    #[test]
    fn overrides_are_typed_and_paths_need_no_quotes() {
        let config =
            load(&["data_dir=/srv/x", "cores=[0, 1]", "listen_pg_addr=127.0.0.1:0"]).unwrap();
        assert_eq!(config.data_dir, Path::new("/srv/x"));
        assert_eq!(config.cores, [0, 1]);
        assert_eq!(config.listen_pg_addr.port(), 0);
        assert_eq!(load(&[]).unwrap(), Config::default());
    }

    #[test]
    fn mistakes_are_named() {
        let text = |overrides: &[&str]| load(overrides).unwrap_err().to_string();
        assert!(text(&["chekpoint_timeout_s=3"]).contains("did you mean 'checkpoint_timeout_s'?"));
        assert!(text(&["checkpoint_timeout_s=0"]).contains("from 1 to 315360000"));
        let most = format!("checkpoint_timeout_s={}", i64::MAX);
        assert!(text(&[&most]).contains("from 1 to 315360000"));
        assert!(text(&["cores=[1, 1]"]).contains("twice"));
        assert!(text(&["tls_key_file=/k"]).contains("both or neither"));
        assert!(text(&["cores"]).contains("key=value"));
        assert!(text(&["listen_pg_addr=here"]).contains("listen_pg_addr"));
        assert!(text(&["checkpoint_timeout_s=soon"]).contains("checkpoint_timeout_s"));
    }
}
