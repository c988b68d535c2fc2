//! Stock recovery as the third judge of `pgstrata redo compare`.
//!
//! A stock server recovers the copied data directory from the primary's WAL, up to the checkpoint
//! that ended a load ([`super::oracle`] says how the files come to hold that position), and every
//! page that a record has changed must equal its files, all bytes but the checksum, which is made
//! when a page is written. Where the WAL has images to compare with
//! (`wal_consistency_checking`), the server compares each of its page versions with them on the
//! way, and gives up at the first that differs.
//!
//! Free space maps are left out: most of their changes are not in the WAL. Pages of relations that
//! are gone, or cut off, have no file.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::fmt::Write as _;
use std::path::Path;

use super::admin_client::CommandError;
use super::oracle::{self, Mark};
use super::pg::{PgCluster, make_dir};
use super::redo_compare::Compare;
use super::verify::{describe, differences};
use super::verify_files::scan;
use crate::base::key::FORK_FSM;
use crate::limits::VERIFY_DETAILS_MAX;

/// The end of a load.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Name of the load.
    pub load: String,
    /// The checkpoint after it.
    pub mark: Mark,
}

/// A stock server that recovers the copy of a data directory, from stop to stop.
#[derive(Debug)]
pub struct Recovery {
    standby: PgCluster,
}

/// What a comparison with its files found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Pages compared.
    pub pages: u64,
    /// Pages of free space maps, and pages that have no file any more.
    pub left_out: u64,
    /// Pages that differ.
    pub different: u64,
    /// The first of them, described.
    pub details: String,
}

impl Recovery {
    /// Copies `base`, the data directory from before the WAL, to `dir`.
    ///
    /// # Errors
    /// When that cannot be done.
    pub fn new(dir: &Path, base: &Path, primary: &PgCluster) -> Result<Recovery, CommandError> {
        make_dir(dir)?;
        let mut copy = std::process::Command::new("cp");
        if !copy.arg("-a").arg(base).arg(dir.join("data")).status()?.success() {
            return Err("the data directory could not be copied".into());
        }
        // What was replayed is not kept a second time.
        let settings = ["shared_buffers = 256MB", "wal_keep_size = 0"].map(str::to_owned);
        Ok(Recovery { standby: oracle::prepare(dir, primary, &settings)? })
    }

    /// Recovers up to `mark`, and compares.
    ///
    /// # Errors
    /// When recovery fails, or does not end there, or files cannot be read; a difference is none.
    pub fn compare(&mut self, mark: Mark, ours: &Compare<'_>) -> Result<Outcome, CommandError> {
        oracle::replay(&mut self.standby, mark)?;
        let files = scan(self.standby.data())?;
        let all = ours.pages().count() as u64;
        let mut outcome = Outcome::default();
        for (rel, fork) in files.forks.iter().filter(|(rel, _)| rel.fork != FORK_FSM) {
            fork.pages(|block, theirs| {
                let Some(page) = ours.page(*rel, block) else { return };
                outcome.pages += 1;
                let ranges = differences(page, theirs, true);
                if ranges.is_empty() {
                    return;
                }
                outcome.different += 1;
                if outcome.different <= VERIFY_DETAILS_MAX as u64 {
                    let text = describe(page, theirs, &ranges);
                    let _ = writeln!(outcome.details, "  {rel} block {block}: {text}");
                }
            })?;
        }
        outcome.left_out = all.saturating_sub(outcome.pages);
        Ok(outcome)
    }
}
