//! The node's commands, which clients send as query text.
//!
//! | command | answer |
//! |---|---|
//! | `pagestream_v2 TENANT TIMELINE`, `pagestream_v3 …` | COPY in both directions: page requests and replies |
//! | `lease lsn TENANT TIMELINE LSN` | one row, one column `valid_until`; [`Command::Lease`] |
//! | `set …` | none; it is accepted and changes nothing |

use super::SqlState;
use crate::base::{Kind, Lsn, TenantShardId, TimelineId};
use crate::server::page_protocol::Version;

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
        "unknown command '{word}'; this server knows pagestream_v2, pagestream_v3, lease lsn and set"
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
        "basebackup" => not_supported("basebackup"),
        "fullbackup" => not_supported("fullbackup"),
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
