//! A base backup over the replication protocol (`BASE_BACKUP`, PostgreSQL 15 form).
//!
//! The server answers with: a result set with the start position, a result set with the
//! tablespaces, one copy with everything, a result set with the end position. Each message of the
//! copy starts with a byte (PostgreSQL documentation, "Streaming Replication Protocol"):
//!
//! | byte | then |
//! |---|---|
//! | `n` | a new archive: name, zero, path of the tablespace (empty for the main one), zero |
//! | `m` | the manifest starts; not asked for |
//! | `d` | bytes of the archive |
//! | `p` | progress: bytes so far, i64 big-endian |
//!
//! The backup holds no WAL: that is streamed from [`BackupPosition::lsn`] of its start. The data
//! is consistent from the position of its end on.

use bytes::{Buf, Bytes};
use futures_util::{AsyncRead, AsyncWrite};

use super::connection::{Connection, CopyStep, ResultSet};
use super::error::SourceError;
use crate::base::Lsn;

const DURING: &str = "taking a base backup";

// Checkpoint: at once, the user waits. No WAL: it is streamed. No wait for archiving, therefore.
// The tablespace map instead of symbolic links: the archive then holds files and directories only.
const COMMAND: &str = "BASE_BACKUP (LABEL 'pgstrata', PROGRESS true, CHECKPOINT 'fast', \
                       WAL false, WAIT false, TABLESPACE_MAP true, MANIFEST 'no')";

/// Where a backup starts or ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackupPosition {
    /// The position.
    pub lsn: Lsn,
    /// PostgreSQL's timeline.
    pub timeline: u32,
}

/// A tablespace of the backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tablespace {
    /// OID; `None` for the data directory itself.
    pub oid: Option<u32>,
    /// Path on the server; empty for the data directory.
    pub location: String,
    /// Size in KiB, as the server estimates it.
    pub size_kib: u64,
}

/// What a backup consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupEvent {
    /// A tar archive starts.
    Archive {
        /// The tablespace; `None` for the data directory itself.
        tablespace: Option<u32>,
        /// The archive's name.
        name: String,
    },
    /// Bytes of the archive.
    Data(Bytes),
    /// Bytes that the server has sent so far, over all archives.
    Progress(u64),
    /// Everything was sent. WAL up to this position is needed to make the data consistent.
    End(BackupPosition),
}

/// A base backup that is under way. When dropped before its end, the connection is useless.
pub struct BaseBackup<'c, S> {
    connection: &'c mut Connection<S>,
    /// Where WAL must be streamed from.
    pub start: BackupPosition,
    /// The tablespaces; the data directory itself is among them.
    pub tablespaces: Vec<Tablespace>,
}

impl<'c, S: AsyncRead + AsyncWrite + Unpin> BaseBackup<'c, S> {
    /// Starts a backup. The server first makes a checkpoint, which can take minutes.
    pub async fn start(connection: &'c mut Connection<S>) -> Result<Self, SourceError> {
        connection.queue_query(COMMAND)?;
        connection.flush(DURING).await?;
        let start = position(&one_set(connection).await?)?;
        let tablespaces = tablespaces(&one_set(connection).await?)?;
        connection.copy_begin(DURING).await?;
        Ok(BaseBackup { connection, start, tablespaces })
    }

    /// Size of the whole in KiB, as the server estimates it.
    pub fn size_kib(&self) -> u64 {
        self.tablespaces.iter().fold(0, |sum, space| sum.saturating_add(space.size_kib))
    }

    /// The next event; nothing follows [`BackupEvent::End`].
    pub async fn next(&mut self) -> Result<BackupEvent, SourceError> {
        match self.connection.copy_step(DURING).await? {
            CopyStep::Data(message) => decode(message),
            CopyStep::Done => {
                let end = position(&one_set(self.connection).await?)?;
                // The tag of the whole command, and ReadyForQuery.
                self.connection.result_sets(DURING).await?;
                Ok(BackupEvent::End(end))
            }
            CopyStep::Complete => Err(malformed("the copy ended without CopyDone")),
        }
    }
}

async fn one_set<S: AsyncRead + AsyncWrite + Unpin>(
    connection: &mut Connection<S>,
) -> Result<ResultSet, SourceError> {
    let set = connection.result_set(DURING).await?;
    set.ok_or_else(|| malformed("a result set is missing"))
}

fn malformed(detail: impl Into<String>) -> SourceError {
    SourceError::protocol(DURING, detail)
}

fn position(set: &ResultSet) -> Result<BackupPosition, SourceError> {
    Ok(BackupPosition { lsn: set.parsed(0, DURING)?, timeline: set.parsed(1, DURING)? })
}

fn tablespaces(set: &ResultSet) -> Result<Vec<Tablespace>, SourceError> {
    let read = |row: &Vec<Option<String>>| {
        let column = |at: usize| row.get(at).cloned().flatten();
        let oid = match column(0) {
            None => None,
            Some(text) => Some(text.parse().ok()?),
        };
        let size_kib = column(2).map_or(Some(0), |text| text.parse().ok())?;
        Some(Tablespace { oid, location: column(1).unwrap_or_default(), size_kib })
    };
    let all: Option<Vec<Tablespace>> = set.rows.iter().map(read).collect();
    all.ok_or_else(|| malformed("a tablespace has a malformed OID or size"))
}

/// Reads one message of the copy.
fn decode(mut message: Bytes) -> Result<BackupEvent, SourceError> {
    if message.is_empty() {
        return Err(malformed("an empty message"));
    }
    match message.get_u8() {
        b'd' => Ok(BackupEvent::Data(message)),
        b'p' => match message.first_chunk::<8>() {
            Some(count) if message.len() == 8 => {
                Ok(BackupEvent::Progress(u64::from_be_bytes(*count)))
            }
            _ => Err(malformed("a progress message of the wrong length")),
        },
        b'n' => {
            let mut parts = message.split(|byte| *byte == 0);
            let name = parts.next().and_then(|name| std::str::from_utf8(name).ok());
            // The tablespace's path, and nothing after its zero byte.
            let (path, end) = (parts.next(), parts.next());
            let name = match (name, path, end) {
                (Some(name), Some(_), Some([])) if parts.next().is_none() => name.to_owned(),
                _ => return Err(malformed("a malformed start of an archive")),
            };
            Ok(BackupEvent::Archive { tablespace: archive_tablespace(&name)?, name })
        }
        b'm' => Err(malformed("a manifest that was not asked for")),
        other => Err(malformed(format!("a message of unknown type {other:#04x}"))),
    }
}

/// The tablespace whose archive has this name: `base.tar`, or `OID.tar`.
pub(super) fn archive_tablespace(name: &str) -> Result<Option<u32>, SourceError> {
    let stem = name.strip_suffix(".tar").unwrap_or_default();
    match (stem, stem.parse::<u32>()) {
        ("base", _) => Ok(None),
        (_, Ok(oid)) if oid.to_string() == stem => Ok(Some(oid)),
        _ => Err(malformed(format!("an archive named '{}'", name.escape_debug()))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn decoded(message: &[u8]) -> Result<BackupEvent, SourceError> {
        decode(Bytes::copy_from_slice(message))
    }

    #[test]
    fn golden_messages() {
        let archive =
            |tablespace, name: &str| BackupEvent::Archive { tablespace, name: name.into() };
        assert_eq!(decoded(b"nbase.tar\0\0"), Ok(archive(None, "base.tar")));
        assert_eq!(decoded(b"n16400.tar\0/mnt/x\0"), Ok(archive(Some(16400), "16400.tar")));
        assert_eq!(decoded(b"dxyz"), Ok(BackupEvent::Data(Bytes::from_static(b"xyz"))));
        assert_eq!(decoded(b"p\0\0\0\0\0\x01\0\x02"), Ok(BackupEvent::Progress(65538)));
    }

    #[test]
    fn malformed_messages_are_refused() {
        for bad in [
            &b""[..],
            b"m",
            b"x",
            b"p",
            b"p1234567",
            b"p123456789",
            b"n",
            b"nbase.tar",
            b"nbase.tar\0",
            b"nbase.tar\0\0x",
            b"nbase.tar\0\0\0",
            b"n../x.tar\0\0",
            b"n007.tar\0\0",
            b"n\xff.tar\0\0",
        ] {
            assert!(decoded(bad).is_err(), "{bad:?} was taken");
        }
    }

    proptest! {
        #[test]
        fn any_message_is_judged(message in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = decoded(&message);
        }
    }
}
