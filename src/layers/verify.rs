//! Checking a whole layer file, for operators and for tests.

use std::path::Path;
use std::rc::Rc;

use crate::io::Io;
use crate::layers::{BlockCache, FileLayer, LayerDesc, LayerError, LayerName, LayerOwner};

/// What a verified file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Whose data it is.
    pub owner: LayerOwner,
    /// Name, length, counts and checksum.
    pub desc: LayerDesc,
}

/// Reads a whole layer file and checks every checksum and every rule of the format: name, footer
/// and header agree; index, blocks and filter agree; values are well-formed, in order, and within
/// the ranges of the name; every byte that belongs to nothing is zero. There is no byte of the
/// file that could change without an error here.
///
/// # Errors
/// The first thing that is wrong.
pub async fn verify<I: Io>(io: &I, path: &Path) -> Result<Verified, LayerError> {
    let text = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    let name: LayerName = text.parse()?;
    let dir = path.parent().unwrap_or(Path::new(""));
    let cache = Rc::new(BlockCache::new(0));
    let layer = FileLayer::open_any(io, dir, &name, None, cache).await?;
    let checked = match layer.file().check_frame().await {
        Ok(()) => match &layer {
            FileLayer::Delta(delta) => delta.check(io).await,
            FileLayer::Image(image) => image.check(io).await,
        },
        Err(error) => Err(error),
    };
    let verified = Verified { owner: layer.file().footer().description.owner, desc: layer.desc() };
    let closed = layer.close().await;
    checked.and(closed).map(|()| verified)
}
