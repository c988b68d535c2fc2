//! Inputs of failed redo, kept on disk for `pgstrata redo replay`.
//!
//! One file for each input, named by its content: an input that fails again makes no second file.
//! There are at most [`REDO_FAILED_FILES_MAX`] of at most [`REDO_FAILED_BYTES_MAX`] bytes; the
//! oldest goes. They hold a tenant's data, so only their owner can read them.
//!
//! | offset | size | what, numbers little-endian |
//! |---|---|---|
//! | 0 | 8 | `PGSREDO1` |
//! | 8 | 4 | CRC-32C of everything behind it |
//! | 12 | 1 | 1 if hint bits are logged, else 0 |
//! | 13 | 2 | length of the tenant's name |
//! | 15 | 2 | length of the problem's text |
//! | 17 | | name, text |
//! | | | the request, as the process got it ([`super::protocol`]), to the end |

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "written by the threads that drive processes, read by a command-line tool"
)]

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use bytes::{Buf, BufMut, Bytes};

use super::RedoSettings;
use crate::limits::{REDO_FAILED_BYTES_MAX, REDO_FAILED_FILES_MAX, REDO_TEXT_BYTES_MAX};

const MAGIC: &[u8; 8] = b"PGSREDO1";
const SUFFIX: &str = "redo";

/// A request that could not be answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failed {
    /// Whose it was.
    pub tenant: String,
    /// What redo knew of the cluster.
    pub redo: RedoSettings,
    /// What happened.
    pub problem: String,
    /// The messages of the request.
    pub frames: Bytes,
}

/// Why bytes are no kept input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an input of a failed redo: {problem}")]
pub struct FailedError {
    /// What is wrong with it.
    pub problem: &'static str,
}

fn cut(text: &str) -> &[u8] {
    text.as_bytes().get(..text.len().min(REDO_TEXT_BYTES_MAX)).unwrap_or_default()
}

impl Failed {
    /// The file.
    pub fn encode(&self) -> Vec<u8> {
        let (tenant, problem) = (cut(&self.tenant), cut(&self.problem));
        let mut body = Vec::with_capacity(self.frames.len() + tenant.len() + problem.len() + 5);
        body.put_u8(u8::from(self.redo.hint_bits_logged));
        // Cut to far less than 64 KiB.
        body.put_u16_le(tenant.len() as u16);
        body.put_u16_le(problem.len() as u16);
        body.put_slice(tenant);
        body.put_slice(problem);
        body.put_slice(&self.frames);
        let mut out = MAGIC.to_vec();
        out.put_u32_le(crc32c::crc32c(&body));
        out.extend(body);
        out
    }

    /// From a file.
    pub fn decode(file: &Bytes) -> Result<Failed, FailedError> {
        let fail = |problem| FailedError { problem };
        let mut rest = file.clone();
        if !rest.starts_with(MAGIC) {
            return Err(fail("it does not begin with PGSREDO1"));
        }
        rest.advance(MAGIC.len());
        let short = |_| fail("it is cut off");
        let crc = rest.try_get_u32_le().map_err(short)?;
        if crc32c::crc32c(&rest) != crc {
            return Err(fail("its checksum is wrong"));
        }
        let hints = rest.try_get_u8().map_err(short)?;
        let tenant = usize::from(rest.try_get_u16_le().map_err(short)?);
        let problem = usize::from(rest.try_get_u16_le().map_err(short)?);
        if hints > 1 || tenant + problem > rest.len() {
            return Err(fail("its header is wrong"));
        }
        let text = |bytes: Bytes| String::from_utf8_lossy(&bytes).into_owned();
        let tenant = text(rest.split_to(tenant));
        let problem = text(rest.split_to(problem));
        let redo = RedoSettings { hint_bits_logged: hints == 1 };
        Ok(Failed { tenant, redo, problem, frames: rest })
    }
}

/// What became of an input.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kept {
    /// It is in this new file.
    New(PathBuf),
    /// It was there already.
    Known,
    /// It has so many bytes, more than [`REDO_FAILED_BYTES_MAX`], and is not kept.
    TooLarge(usize),
}

/// Writes a file in `dir`, which is made if need be. Not synced: it is for people.
///
/// # Errors
/// Those of the file system; nothing is left of the file then.
pub fn keep(dir: &Path, input: &Failed) -> std::io::Result<Kept> {
    if input.frames.len() > REDO_FAILED_BYTES_MAX {
        return Ok(Kept::TooLarge(input.frames.len()));
    }
    let sum = (crc32c::crc32c(input.tenant.as_bytes()), crc32c::crc32c(&input.frames));
    let path = dir.join(format!("{:08x}{:08x}-{:x}.{SUFFIX}", sum.0, sum.1, input.frames.len()));
    DirBuilder::new().mode(0o700).recursive(true).create(dir)?;
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::AlreadyExists => return Ok(Kept::Known),
        Err(error) => return Err(error),
    };
    if let Err(error) = file.write_all(&input.encode()) {
        let _ = fs::remove_file(&path);
        return Err(error);
    }
    remove_oldest(dir)?;
    Ok(Kept::New(path))
}

fn remove_oldest(dir: &Path) -> std::io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.path().extension().is_some_and(|suffix| suffix == SUFFIX) {
            files.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    files.sort();
    let surplus = files.len().saturating_sub(REDO_FAILED_FILES_MAX);
    for (_, path) in files.into_iter().take(surplus) {
        match fs::remove_file(&path) {
            // Another thread was quicker.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn input() -> Failed {
        Failed {
            tenant: "ab".into(),
            redo: RedoSettings { hint_bits_logged: true },
            problem: "no".into(),
            frames: Bytes::from_static(b"G\0\0\0\0"),
        }
    }

    #[test]
    fn golden_and_damaged() {
        let golden = [&b"PGSREDO1"[..], b"\x7b\x3f\xeb\xac", b"\x01\x02\0\x02\0abnoG\0\0\0\0"];
        let golden = golden.concat();
        assert_eq!(input().encode(), golden);
        let bytes = Bytes::from(golden.clone());
        assert_eq!(Failed::decode(&bytes).unwrap(), input());
        for at in 0..golden.len() {
            assert!(Failed::decode(&bytes.slice(..at)).is_err(), "{at}");
            for bit in 0..8 {
                let mut bad = golden.clone();
                bad[at] ^= 1 << bit;
                assert!(Failed::decode(&bad.into()).is_err(), "{at} {bit}");
            }
        }
    }

    #[test]
    fn so_many_and_no_more() {
        let dir = std::env::temp_dir().join(format!("pgstrata-failed-{}", std::process::id()));
        let mut input = input();
        assert!(matches!(keep(&dir, &input).unwrap(), Kept::New(_)));
        assert_eq!(keep(&dir, &input).unwrap(), Kept::Known);
        let mut last = None;
        for n in 0..REDO_FAILED_FILES_MAX + 5 {
            input.frames = Bytes::from(vec![n as u8; 9]);
            last = Some(keep(&dir, &input).unwrap());
        }
        assert_eq!(fs::read_dir(&dir).unwrap().count(), REDO_FAILED_FILES_MAX);
        let Some(Kept::New(last)) = last else { panic!("{last:?}") };
        let bytes = fs::read(last).unwrap();
        assert_eq!(Failed::decode(&bytes.into()).unwrap(), input);
        input.frames = Bytes::from(vec![0; REDO_FAILED_BYTES_MAX + 1]);
        assert_eq!(keep(&dir, &input).unwrap(), Kept::TooLarge(REDO_FAILED_BYTES_MAX + 1));
        fs::remove_dir_all(&dir).unwrap();
    }
}
