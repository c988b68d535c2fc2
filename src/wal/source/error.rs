//! What can go wrong between us and a WAL source.

use std::fmt;
use std::time::Duration;

use crate::base::{Kind, Lsn};
use crate::io::IoError;

/// An `ErrorResponse` of a PostgreSQL server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`.
    pub severity: String,
    /// SQLSTATE, five characters.
    pub code: String,
    /// The primary message.
    pub message: String,
    /// More about it; empty when the server sent none.
    pub detail: String,
    /// What to do about it; empty when the server sent none.
    pub hint: String,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} (SQLSTATE {})", self.severity, self.message, self.code)?;
        if !self.detail.is_empty() {
            write!(f, "; detail: {}", self.detail)?;
        }
        if !self.hint.is_empty() {
            write!(f, "; hint: {}", self.hint)?;
        }
        Ok(())
    }
}

impl ServerError {
    /// What a caller can do about it, by the class of the SQLSTATE.
    pub fn kind(&self) -> Kind {
        let code = self.code.as_str();
        let starting = ["08", "40", "53", "57"].iter().any(|class| code.starts_with(class));
        // 55006: the slot is in use, as after a connection that broke without notice.
        if starting || code == "55006" { Kind::Retry } else { Kind::Invalid }
    }
}

/// Why a WAL source does not deliver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SourceError {
    /// No connection.
    #[error("cannot connect to {address}: {cause}")]
    Connect {
        /// Host and port, or the socket file.
        address: String,
        /// The operating system's text.
        cause: String,
    },
    /// No answer in time.
    #[error("no answer from {address} within {} s", after.as_secs_f32())]
    TimedOut {
        /// Host and port, or the socket file.
        address: String,
        /// How long we waited.
        after: Duration,
    },
    /// The connection broke.
    #[error("the connection to the WAL source broke while {during}: {cause}")]
    Broken {
        /// What was under way.
        during: &'static str,
        /// The operating system's text.
        cause: String,
    },
    /// The server closed the connection without saying why.
    #[error("the WAL source closed the connection while {during}")]
    Closed {
        /// What was under way.
        during: &'static str,
    },
    /// The server answered with an error.
    #[error("the WAL source says while {during}: {error}")]
    Server {
        /// What was under way.
        during: &'static str,
        /// What the server said.
        error: Box<ServerError>,
    },
    /// The server sent what the protocol does not allow.
    #[error("the WAL source broke the protocol while {during}: {detail}")]
    Protocol {
        /// What was under way.
        during: &'static str,
        /// What was wrong.
        detail: String,
    },
    /// We cannot log in.
    #[error("cannot log in to the WAL source: {detail}")]
    Authentication {
        /// What was wrong and what to do.
        detail: String,
    },
    /// A server of another major version.
    #[error("the WAL source is PostgreSQL {version}; this node takes in PostgreSQL 15 only")]
    Version {
        /// What the server reports as `server_version`.
        version: String,
    },
    /// The caller asked for what does not exist or is not possible now.
    #[error("{what}")]
    Invalid {
        /// What it was and what to do.
        what: String,
    },
    /// The source stands on another timeline, or before the position we need.
    #[error("cannot stream from {from} on timeline {timeline}: {detail}")]
    Position {
        /// Where streaming was to start.
        from: Lsn,
        /// On which timeline of PostgreSQL.
        timeline: u32,
        /// Why that is not possible.
        detail: String,
    },
    /// The archive of a base backup is damaged.
    #[error("archive {archive} of the base backup is damaged: {detail}")]
    Archive {
        /// Name of the archive.
        archive: String,
        /// What was wrong.
        detail: String,
    },
    /// Writing the backup to disk failed.
    #[error(transparent)]
    Io(#[from] IoError),
}

impl SourceError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            SourceError::Connect { .. }
            | SourceError::TimedOut { .. }
            | SourceError::Broken { .. }
            | SourceError::Closed { .. } => Kind::Retry,
            SourceError::Server { error, .. } => error.kind(),
            SourceError::Authentication { .. }
            | SourceError::Version { .. }
            | SourceError::Invalid { .. }
            | SourceError::Position { .. } => Kind::Invalid,
            SourceError::Protocol { .. } | SourceError::Archive { .. } => Kind::Corrupt,
            SourceError::Io(error) => error.kind(),
        }
    }

    /// The source has removed WAL that it was asked for (58P01, `undefined_file`).
    pub fn is_removed_wal(&self) -> bool {
        matches!(self, SourceError::Server { error, .. } if error.code == "58P01")
    }

    pub(crate) fn protocol(during: &'static str, detail: impl Into<String>) -> SourceError {
        SourceError::Protocol { during, detail: detail.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_follow_the_sqlstate() {
        let kind = |code: &str| ServerError { code: code.to_owned(), ..Default::default() }.kind();
        // The server is starting up, shutting down, full; the slot is still held.
        for code in ["57P03", "57P01", "53300", "55006", "08006"] {
            assert_eq!(kind(code), Kind::Retry, "{code}");
        }
        // Wrong password, WAL removed, no such slot, no text at all.
        for code in ["28P01", "28000", "58P01", "42704", ""] {
            assert_eq!(kind(code), Kind::Invalid, "{code}");
        }
    }

    #[test]
    fn text_holds_detail_and_hint() {
        let error = ServerError {
            severity: "FATAL".into(),
            code: "28P01".into(),
            message: "no".into(),
            detail: "because".into(),
            hint: "try".into(),
        };
        assert_eq!(error.to_string(), "FATAL: no (SQLSTATE 28P01); detail: because; hint: try");
    }
}
