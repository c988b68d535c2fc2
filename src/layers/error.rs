//! How work with layer files fails.

use std::path::PathBuf;

use crate::base::{Key, Kind, Lsn};
use crate::io::IoError;
use crate::layers::name::LayerNameError;

/// What is wrong with the bytes of a layer file, and where. Pure code returns it; the reader adds
/// the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} (offset {offset})")]
pub struct Damage {
    /// Offset in bytes of the damaged structure from the start of the file.
    pub offset: u64,
    /// What is wrong.
    pub what: &'static str,
}

/// Why work with a layer failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayerError {
    /// The operating system refused.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The name is not that of a layer file.
    #[error(transparent)]
    Name(#[from] LayerNameError),
    /// The file is damaged.
    #[error("layer file {} is damaged: {damage}; restore it from the remote copy", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where and what.
        damage: Damage,
    },
    /// The file was written by another version of the program.
    #[error(
        "layer file {} has format version {version}, this program reads version {supported}",
        file.display()
    )]
    Version {
        /// The file.
        file: PathBuf,
        /// Version in the file.
        version: u32,
        /// Version that is understood.
        supported: u32,
    },
    /// The file is whole but is not the one that was asked for.
    #[error("layer file {} is another one than expected: its {what} differs", file.display())]
    Mismatch {
        /// The file.
        file: PathBuf,
        /// What differs: `owner`, `name`, `kind`.
        what: &'static str,
    },
    /// A value was added out of order. A bug of the caller.
    #[error("values of {} are out of order: {key} at {lsn} is not after {previous_key} at {previous_lsn}", file.display())]
    Disorder {
        /// The file being written.
        file: PathBuf,
        /// The refused key.
        key: Key,
        /// Its LSN.
        lsn: Lsn,
        /// The key before.
        previous_key: Key,
        /// Its LSN.
        previous_lsn: Lsn,
    },
    /// A value does not belong into the layer: key or LSN outside its ranges, or no base in an
    /// image layer. A bug of the caller.
    #[error("{key} at {lsn} does not belong into {}: {what}", file.display())]
    Misplaced {
        /// The file being written.
        file: PathBuf,
        /// The refused key.
        key: Key,
        /// Its LSN.
        lsn: Lsn,
        /// Which rule it breaks.
        what: &'static str,
    },
    /// More than a layer file may hold; the caller must cut layers earlier.
    #[error("layer file {} would hold more than {limit} {what}", file.display())]
    TooLarge {
        /// The file being written.
        file: PathBuf,
        /// What there is too much of.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
    /// A delta layer without values.
    #[error("layer file {} would be empty", file.display())]
    Empty {
        /// The file being written.
        file: PathBuf,
    },
}

impl LayerError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            LayerError::Io(error) => error.kind(),
            LayerError::Damaged { .. }
            | LayerError::Version { .. }
            | LayerError::Mismatch { .. } => Kind::Corrupt,
            LayerError::Name(_)
            | LayerError::Disorder { .. }
            | LayerError::Misplaced { .. }
            | LayerError::TooLarge { .. }
            | LayerError::Empty { .. } => Kind::Invalid,
        }
    }
}
