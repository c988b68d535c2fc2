//! The node's commands, which clients send as query text.
//!
//! | command | answer |
//! |---|---|
//! | `pagestream_v2 TENANT TIMELINE`, `pagestream_v3 …` | COPY in both directions: page requests and replies |
//! | `lease lsn TENANT TIMELINE LSN` | one row, one column `valid_until`; [`Command::Lease`] |
//! | `basebackup TENANT TIMELINE [LSN] [--gzip]`, `fullbackup …` | a data directory, in COPY; [`Command::Backup`] |
//! | `set …` | none; it is accepted and changes nothing |

use super::SqlState;
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::server::page_protocol::Version;
use crate::shard::base_backup::{BackupKind, BackupRequest};

/// Name of the column of a lease's answer.
pub const LEASE_COLUMN: &str = "valid_until";

/// A command of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// `pagestream_v2 TENANT TIMELINE`, `pagestream_v3 TENANT TIMELINE`.
    PageStream {
        /// Which messages.
        version: Version,
        /// The tenant shard.
        tenant: TenantShardId,
        /// The timeline.
        timeline: TimelineId,
    },
    /// `lease lsn TENANT TIMELINE LSN`: the LSN stays readable for some minutes. The answer is one
    /// row with the time until which it does, in milliseconds since 1970-01-01 UTC; to be sent
    /// again well before that. NULL, with a warning that says why, means that there will never be
    /// a lease on this LSN here: its history is gone, or another timeline's. An error means that
    /// there is none now, and that it is worth while to ask again.
    Lease {
        /// The tenant shard.
        tenant: TenantShardId,
        /// The timeline.
        timeline: TimelineId,
        /// What is to stay readable.
        lsn: Lsn,
    },
    /// `basebackup TENANT TIMELINE [LSN] [--gzip] [--replica]`, `fullbackup TENANT TIMELINE [LSN
    /// [PREVIOUS]] [--gzip]`: a data directory as of an LSN, as a tar archive in COPY from the
    /// server, for a compute that reads pages from the node, or for a server that stands alone.
    /// `latest` in place of an LSN, or none, is the end of the WAL that the node has. `--replica`
    /// changes nothing: a backup for a replica is like any other here.
    Backup {
        /// The tenant shard.
        tenant: TenantShardId,
        /// The timeline.
        timeline: TimelineId,
        /// What is to be in it.
        request: BackupRequest,
        /// The archive is packed by gzip.
        gzip: bool,
    },
    /// `set …`: accepted for drivers that send it at once; changes nothing.
    Set,
    /// No command at all.
    Empty,
}

/// Why a query text is no command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommandError {
    /// No such command.
    #[error(
        "unknown command '{word}'; this server knows pagestream_v2, pagestream_v3, basebackup, fullbackup, lease lsn and set"
    )]
    Unknown {
        /// Its first word, cut to a sensible length.
        word: String,
    },
    /// A command that other page services have and this one does not.
    #[error("{command} is not supported yet")]
    NotSupported {
        /// The command.
        command: &'static str,
    },
    /// Wrong arguments.
    #[error("{command}: {problem}; write: {command} {arguments}")]
    Arguments {
        /// The command.
        command: &'static str,
        /// The arguments that it takes.
        arguments: &'static str,
        /// What is wrong.
        problem: String,
    },
}

impl CommandError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        Kind::Invalid
    }

    /// SQLSTATE for the client.
    pub fn sql_state(&self) -> SqlState {
        match self {
            CommandError::NotSupported { .. } => SqlState::NOT_SUPPORTED,
            CommandError::Unknown { .. } | CommandError::Arguments { .. } => SqlState::SYNTAX_ERROR,
        }
    }
}

/// Reads a command. Its first word may be in any case; a closing semicolon is allowed.
///
/// # Errors
/// No command, or wrong arguments.
pub fn parse_command(text: &str) -> Result<Command, CommandError> {
    let text = text.trim().trim_end_matches(';');
    let mut words = text.split_whitespace();
    let Some(word) = words.next() else { return Ok(Command::Empty) };
    let not_supported = |command| Err(CommandError::NotSupported { command });
    match word.to_ascii_lowercase().as_str() {
        "pagestream_v2" => page_stream("pagestream_v2", Version::V2, words),
        "pagestream_v3" => page_stream("pagestream_v3", Version::V3, words),
        "lease" => lease(words),
        "set" => Ok(Command::Set),
        "basebackup" => backup("basebackup", BackupKind::Base, words),
        "fullbackup" => backup("fullbackup", BackupKind::Full, words),
        "pagestream" => not_supported("pagestream (version 1)"),
        _ => Err(CommandError::Unknown { word: word.chars().take(40).collect() }),
    }
}

/// Reads arguments one after the other.
struct Arguments<W> {
    command: &'static str,
    arguments: &'static str,
    words: W,
}

impl<'a, W: Iterator<Item = &'a str>> Arguments<W> {
    fn fail(&self, problem: String) -> CommandError {
        CommandError::Arguments { command: self.command, arguments: self.arguments, problem }
    }

    fn next<T: std::str::FromStr<Err: std::fmt::Display>>(
        &mut self,
        what: &str,
    ) -> Result<T, CommandError> {
        let word = self.words.next().ok_or_else(|| self.fail(format!("the {what} is missing")))?;
        word.parse().map_err(|error: T::Err| self.fail(error.to_string()))
    }

    /// An argument that may be missing, or be a word that stands for that.
    fn optional<T: std::str::FromStr<Err: std::fmt::Display>>(
        &mut self,
        what: &str,
        missing: impl Fn(&str) -> bool,
    ) -> Result<Option<T>, CommandError> {
        let Some(word) = self.words.next().filter(|word| !missing(word)) else { return Ok(None) };
        let wrong = |error: T::Err| self.fail(format!("the {what}: {error}"));
        word.parse().map(Some).map_err(wrong)
    }

    fn end(mut self) -> Result<(), CommandError> {
        match self.words.next() {
            None => Ok(()),
            Some(_) => Err(self.fail("too many arguments".to_owned())),
        }
    }
}

fn page_stream<'a>(
    command: &'static str,
    version: Version,
    words: impl Iterator<Item = &'a str>,
) -> Result<Command, CommandError> {
    let mut arguments = Arguments { command, arguments: "TENANT TIMELINE", words };
    let (tenant, timeline) = (arguments.next("tenant")?, arguments.next("timeline")?);
    arguments.end()?;
    Ok(Command::PageStream { version, tenant, timeline })
}

fn backup<'a>(
    command: &'static str,
    kind: BackupKind,
    words: impl Iterator<Item = &'a str>,
) -> Result<Command, CommandError> {
    let full = kind == BackupKind::Full;
    let (arguments, flags): (_, &[&str]) = match full {
        false => ("TENANT TIMELINE [LSN] [--gzip] [--replica]", &["--gzip", "--replica"]),
        true => ("TENANT TIMELINE [LSN [PREVIOUS_LSN]] [--gzip]", &["--gzip"]),
    };
    let (options, words): (Vec<&str>, Vec<&str>) = words.partition(|word| word.starts_with("--"));
    let mut arguments = Arguments { command, arguments, words: words.into_iter() };
    for (nth, option) in options.iter().enumerate() {
        if !flags.contains(option) {
            return Err(arguments.fail(format!("unknown option {option}")));
        }
        if options.iter().take(nth).any(|before| before == option) {
            return Err(arguments.fail(format!("{option} is there twice")));
        }
    }
    let (tenant, timeline) = (arguments.next("tenant")?, arguments.next("timeline")?);
    let latest = |word: &str| word.eq_ignore_ascii_case("latest");
    let lsn = arguments.optional("LSN", latest)?;
    let previous = if full { arguments.optional("LSN", |_| false)? } else { None };
    arguments.end()?;
    let request = BackupRequest { kind, lsn, previous };
    Ok(Command::Backup { tenant, timeline, request, gzip: options.contains(&"--gzip") })
}

fn lease<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Command, CommandError> {
    let what = words.next();
    let mut arguments = Arguments { command: "lease lsn", arguments: "TENANT TIMELINE LSN", words };
    if !what.is_some_and(|word| word.eq_ignore_ascii_case("lsn")) {
        return Err(arguments.fail("only an LSN can be leased".to_owned()));
    }
    let (tenant, timeline) = (arguments.next("tenant")?, arguments.next("timeline")?);
    let lsn = arguments.next("LSN")?;
    arguments.end()?;
    Ok(Command::Lease { tenant, timeline, lsn })
}
