//! Settings of a node: one TOML file, and `key=value` overrides from the command line.
//!
//! Names carry their units. An unknown key is an error that names the nearest known one.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::base::Kind;

/// All settings. Every one has a default but `data_dir`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address of the page service.
    pub listen_pg_addr: SocketAddr,
    /// Address of the admin API.
    pub listen_http_addr: SocketAddr,
    /// Directory of all data.
    pub data_dir: PathBuf,
    /// CPU numbers, one core of the node each; empty for all CPUs that the process may use.
    pub cores: Vec<usize>,
    /// WAL between two checkpoints, in bytes.
    pub checkpoint_distance_bytes: u64,
    /// Longest time between two checkpoints, in seconds.
    pub checkpoint_timeout_s: u64,
    /// How long a read waits for WAL, in milliseconds.
    pub wait_lsn_timeout_ms: u64,
    /// Directory of PostgreSQL's programs.
    pub pg_bin_dir: PathBuf,
    /// The wal-redo library; empty for `neon_walredo.so` next to the program, and where that does
    /// not exist `target/walredo/neon_walredo.so`.
    pub walredo_library: PathBuf,
    /// Size of an image layer, in bytes.
    pub image_layer_bytes: u64,
    /// Longest time for one redo, in milliseconds.
    pub redo_timeout_ms: u64,
    /// What to log (`tracing_subscriber::EnvFilter`).
    pub log: String,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen_pg_addr: SocketAddr::from(([127, 0, 0, 1], 6400)),
            listen_http_addr: SocketAddr::from(([127, 0, 0, 1], 9898)),
            data_dir: PathBuf::new(),
            cores: Vec::new(),
            checkpoint_distance_bytes: 64 * 1024 * 1024,
            checkpoint_timeout_s: 600,
            wait_lsn_timeout_ms: 300_000,
            pg_bin_dir: PathBuf::from("/usr/lib/postgresql/15/bin"),
            walredo_library: PathBuf::new(),
            image_layer_bytes: 128 * 1024 * 1024,
            redo_timeout_ms: 60_000,
            log: "info".to_owned(),
        }
    }
}

/// Why settings are not usable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The text is no TOML, or a value has the wrong type.
    #[error("{place}: {problem}")]
    Syntax {
        /// The file, or the override.
        place: String,
        /// The parser's words.
        problem: String,
    },
    /// No such setting.
    #[error("{place}: unknown setting '{key}'; did you mean '{nearest}'?")]
    UnknownKey {
        /// The file, or the override.
        place: String,
        /// The key that was given.
        key: String,
        /// The known key that is nearest to it.
        nearest: String,
    },
    /// A value that cannot work.
    #[error("setting {key}: {problem}")]
    Value {
        /// The setting.
        key: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl ConfigError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }
}

/// Settings from the text of a file (and its name, for messages) and overrides, which win.
///
/// # Errors
/// See [`ConfigError`].
pub fn load(file: Option<(&str, &str)>, overrides: &[String]) -> Result<Config, ConfigError> {
    let mut table = toml::Table::new();
    if let Some((name, text)) = file {
        table = parse(name, text)?;
    }
    for text in overrides {
        let (key, value) = text.split_once('=').ok_or_else(|| ConfigError::Syntax {
            place: format!("-c {text}"),
            problem: "write -c key=value".to_owned(),
        })?;
        let (key, value) = (key.trim(), value.trim());
        let place = format!("-c {text}");
        // Quotes around texts may be left out.
        let quoted = || format!("{key} = {}", toml::Value::String(value.to_owned()));
        let plain = format!("{key} = {value}").parse::<toml::Table>();
        let one = plain.or_else(|_| quoted().parse()).map_err(|error| ConfigError::Syntax {
            place: place.clone(),
            problem: error.message().to_owned(),
        })?;
        check_keys(&place, &one)?;
        table.extend(one);
    }
    let config: Config = table.try_into().map_err(|error: toml::de::Error| {
        ConfigError::Syntax { place: "settings".to_owned(), problem: error.message().to_owned() }
    })?;
    validate(&config)?;
    Ok(config)
}

fn parse(name: &str, text: &str) -> Result<toml::Table, ConfigError> {
    let table = text.parse().map_err(|error: toml::de::Error| ConfigError::Syntax {
        place: name.to_owned(),
        problem: error.to_string(),
    })?;
    check_keys(name, &table)?;
    Ok(table)
}

fn check_keys(place: &str, table: &toml::Table) -> Result<(), ConfigError> {
    let known = toml::Table::try_from(Config::default()).unwrap_or_default();
    let Some(key) = table.keys().find(|key| !known.contains_key(*key)) else { return Ok(()) };
    let nearest = known.keys().min_by_key(|candidate| distance(key, candidate));
    Err(ConfigError::UnknownKey {
        place: place.to_owned(),
        key: key.clone(),
        nearest: nearest.cloned().unwrap_or_default(),
    })
}

/// Levenshtein distance.
fn distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, a) in left.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((b, pair), last) in right.iter().zip(row.windows(2)).zip(0..) {
            let [diagonal, above] = pair else { continue };
            let beside: usize = next.get(last).copied().unwrap_or(usize::MAX - 1);
            next.push((diagonal + usize::from(a != *b)).min(above + 1).min(beside + 1));
        }
        row = next;
    }
    row.last().copied().unwrap_or(0)
}

fn validate(config: &Config) -> Result<(), ConfigError> {
    let bad = |key, problem: &str| Err(ConfigError::Value { key, problem: problem.to_owned() });
    if config.data_dir.as_os_str().is_empty() {
        return bad("data_dir", "it must be set: the directory of all data");
    }
    let mut cores = config.cores.clone();
    cores.sort_unstable();
    cores.dedup();
    if cores.len() != config.cores.len() {
        return bad("cores", "a CPU is named twice");
    }
    for (key, value) in [
        ("checkpoint_distance_bytes", config.checkpoint_distance_bytes),
        ("checkpoint_timeout_s", config.checkpoint_timeout_s),
        ("wait_lsn_timeout_ms", config.wait_lsn_timeout_ms),
        ("image_layer_bytes", config.image_layer_bytes),
        ("redo_timeout_ms", config.redo_timeout_ms),
    ] {
        if value == 0 {
            return bad(key, "it must be more than 0");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overrides_win_and_defaults_fill() {
        let file = ("f.toml", "data_dir = '/d'\ncores = [0, 1]\nredo_timeout_ms = 5");
        let overrides = ["redo_timeout_ms=7".to_owned(), "listen_pg_addr=127.0.0.1:0".to_owned()];
        let config = load(Some(file), &overrides).unwrap();
        assert_eq!((config.redo_timeout_ms, config.cores.len()), (7, 2));
        assert_eq!(config.listen_pg_addr.port(), 0);
        assert_eq!(config.wait_lsn_timeout_ms, 300_000);
    }

    #[test]
    fn mistakes_are_named() {
        let fails = |text: &str, message: &str| {
            let error = load(None, &[text.to_owned()]).unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        };
        fails("checkpoint_distance=1", "did you mean 'checkpoint_distance_bytes'?");
        fails("listen_pg_adr=x", "did you mean 'listen_pg_addr'?");
        fails("cores", "write -c key=value");
        fails("redo_timeout_ms=soon", "invalid type");
        fails("redo_timeout_ms=1", "setting data_dir: it must be set");
        let twice = load(Some(("f", "data_dir='/d'\ncores=[1,1]")), &[]).unwrap_err();
        assert!(twice.to_string().contains("named twice"));
    }
}
