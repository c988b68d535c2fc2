//! Checking a whole layer file (being filled in; the signature stands).

use std::path::Path;

use crate::io::Io;
use crate::layers::{LayerDesc, LayerError, LayerOwner};

/// What a verified file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Whose data it is.
    pub owner: LayerOwner,
    /// Name, length and counts.
    pub desc: LayerDesc,
}

/// Reads a whole layer file and checks every checksum and rule of the format.
pub async fn verify<I: Io>(_io: &I, _path: &Path) -> Result<Verified, LayerError> {
    unimplemented!()
}
