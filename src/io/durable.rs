//! Writing files so that they are whole or absent: temporary file, sync, rename, sync of the
//! directory. This is the only place where that order stands.
//!
//! Small files (indexes, configuration) are kept in a container, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic `PGSTRFIL` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | CRC-32C of the body |
//! | 16 | 8 | length of the body in bytes |
//! | 24 | 4 | CRC-32C of bytes 0..24 |
//! | 28 | … | body, then zeros up to a multiple of 4,096 |
//!
//! Checksum and length stand before the body, so that the end of the padding needs no search.

use std::path::{Path, PathBuf};

use super::{ALIGNMENT, File, Io, IoCause, IoError, align_up};
use crate::base::Kind;
use crate::base::checksum::crc32c;
use crate::limits::{DEVICE_IO_BYTES_MAX, SMALL_FILE_BYTES_MAX};

/// Ends the name of a file that is being written.
pub const TEMP_SUFFIX: &str = ".tmp";

const MAGIC: &[u8; 8] = b"PGSTRFIL";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 28;
/// Smallest unit that a device writes whole or not at all, in bytes.
const SECTOR_BYTES: usize = 512;
/// Longest body for [`write_file_in_place`], in bytes.
pub const IN_PLACE_BODY_BYTES_MAX: usize = SECTOR_BYTES - HEADER_BYTES;

/// Why a small file cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurableError {
    /// The file system.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The content is damaged.
    #[error("{} is damaged: {problem}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
}

impl DurableError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            DurableError::Io(error) => error.kind(),
            DurableError::Damaged { .. } => Kind::Corrupt,
        }
    }
}

/// The name under which `path` is written before it is whole.
pub fn temp_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(TEMP_SUFFIX);
    PathBuf::from(name)
}

/// Gives a file that is written and synced its final name, durably.
pub async fn publish<I: Io>(io: &I, temp: &Path, target: &Path) -> Result<(), IoError> {
    // A bare name has the empty path as its parent.
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
    let change = io.dir_change(parent.unwrap_or(Path::new(".")));
    io.rename(temp, target).await?;
    io.sync_dir(&change).await
}

/// Removes a file that need not be there.
pub(crate) async fn remove_if_there<I: Io>(io: &I, path: &Path) -> Result<(), IoError> {
    match io.remove(path).await {
        Err(error) if error.cause != IoCause::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Replaces or creates a small file. After a crash it is there as it was before, or as it is now.
pub async fn write_file_atomic<I: Io>(io: &I, path: &Path, body: &[u8]) -> Result<(), IoError> {
    let temp = temp_path(path);
    remove_if_there(io, &temp).await?;
    let file = io.create(&temp).await?;
    let written = write_container(&file, body).await;
    file.close().await?;
    if let Err(error) = written {
        // The first error is the one that counts.
        let _ = io.remove(&temp).await;
        return Err(error);
    }
    publish(io, &temp, path).await
}

/// Overwrites a small file where it stands, or creates it. Much cheaper than
/// [`write_file_atomic`] if it is there already; for what is written often. It is durable when this
/// returns. A power loss leaves the old content or the new one, because all that changes lies in
/// the first sector, of which a device writes all or nothing.
///
/// Calls for one file must not overlap. The body is at most [`IN_PLACE_BODY_BYTES_MAX`] long and of
/// the same length each time; anything else is a bug of the caller and panics.
///
/// # Errors
/// [`IoError`] of the first call that failed; the next call opens the file anew.
pub async fn write_file_in_place<I: Io>(io: &I, path: &Path, body: &[u8]) -> Result<(), IoError> {
    assert!(body.len() <= IN_PLACE_BODY_BYTES_MAX, "the content would lie in several sectors");
    let file = match io.open(path).await {
        Ok(file) => file,
        Err(error) if error.cause == IoCause::NotFound => {
            return write_file_atomic(io, path, body).await;
        }
        Err(error) => return Err(error),
    };
    let written = write_container(&file, body).await;
    file.close().await?;
    written
}

async fn write_container<F: File>(file: &F, body: &[u8]) -> Result<(), IoError> {
    let bytes = encode(body);
    for (index, chunk) in bytes.chunks(DEVICE_IO_BYTES_MAX).enumerate() {
        let mut buf = file.alloc(chunk.len());
        buf.copy_from_slice(chunk);
        file.write_at((index * DEVICE_IO_BYTES_MAX) as u64, buf).await?;
    }
    file.sync().await
}

/// The body of a small file.
pub async fn read_file<I: Io>(io: &I, path: &Path) -> Result<Vec<u8>, DurableError> {
    let file = io.open(path).await?;
    let read = async {
        let len = file.len().await?;
        let damaged = |problem| DurableError::Damaged { path: path.to_owned(), problem };
        if len > SMALL_FILE_BYTES_MAX {
            return Err(damaged("it is larger than any file of its kind"));
        }
        if len % ALIGNMENT as u64 != 0 {
            return Err(damaged("its length is no multiple of 4096"));
        }
        let bytes = file.read_at(0, len as usize).await?;
        decode(&bytes).map_err(damaged)
    };
    let result = read.await;
    file.close().await?;
    result
}

/// Length of the file of a small file whose body has this length, in bytes.
pub fn file_bytes(body: usize) -> u64 {
    align_up(HEADER_BYTES.saturating_add(body) as u64)
}

/// True if a file that begins with these bytes is a container.
pub fn is_container(begin: &[u8]) -> bool {
    begin.starts_with(MAGIC)
}

fn encode(body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len() + ALIGNMENT);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&crc32c(body).to_le_bytes());
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    let header_crc = crc32c(&bytes);
    bytes.extend_from_slice(&header_crc.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().div_ceil(ALIGNMENT) * ALIGNMENT, 0);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    let header = bytes.first_chunk::<HEADER_BYTES>().ok_or("it is shorter than its header")?;
    let u32_at = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    if header[..8] != MAGIC[..] {
        return Err("it does not begin with its magic number");
    }
    if crc32c(&header[..24]) != u32_at(24) {
        return Err("the checksum of its header is wrong");
    }
    if u32_at(8) != VERSION {
        return Err("it was written by another version of the program");
    }
    let len = u64::from(u32_at(16)) | u64::from(u32_at(20)) << 32;
    let len = usize::try_from(len).map_err(|_| "its length field is absurd")?;
    let rest = &bytes[HEADER_BYTES..];
    let (body, padding) = rest.split_at_checked(len).ok_or("it is cut off")?;
    if crc32c(body) != u32_at(12) {
        return Err("the checksum of its content is wrong");
    }
    if padding.len() >= ALIGNMENT || padding.iter().any(|byte| *byte != 0) {
        return Err("its padding is wrong");
    }
    Ok(body.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_changed_byte_is_detected() {
        let bytes = encode(b"what a timeline consists of");
        assert_eq!(bytes.len(), ALIGNMENT);
        assert_eq!(decode(&bytes).unwrap(), b"what a timeline consists of");
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert!(decode(&changed).is_err(), "a changed byte {at} was taken");
        }
        for len in [0, 27, 28, 40] {
            assert!(decode(&bytes[..len]).is_err());
        }
        assert_eq!(decode(&encode(&[7; 9000])).unwrap(), [7; 9000]);
    }
}
