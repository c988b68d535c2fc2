//! The oracle: what a stock stand-by's files hold at an LSN.
//!
//! 1. Before the base backup, a slot on the primary keeps all WAL from then on. The stand-by
//!    starts from a copy of the *same* backup as the node, because hint bits are not in the WAL
//!    and so two backups of a busy cluster may differ for good reason.
//! 2. [`mark`] runs `CHECKPOINT` on the primary. The checkpoint's record begins at R and ends at
//!    X; both are read from the server (`pg_control_checkpoint`, `pg_waldump`), none is guessed.
//! 3. [`replay`] runs the stand-by with `recovery_target_lsn = R`, inclusive, target action
//!    `shutdown`. PostgreSQL stops after the first record that starts at or after the target, so
//!    it stops exactly at X. `hot_standby = off`: no session can set hint bits.
//! 4. The last record replayed is a checkpoint, so the restart point that the server makes as
//!    it shuts down writes every dirty buffer and SLRU page to the files, and leaves
//!    "Minimum recovery ending location" = X in `pg_control`. [`replay`] insists on that value
//!    and on the state "shut down in recovery": a restart point that was skipped would show.
//! 5. From then on the files are GetPage@X.
//!
//! The primary runs on; the LSN may be in the middle of a load.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that drives other programs: no data path, nothing to simulate"
)]

use std::fs;
use std::path::Path;

use super::pg::{PgCluster, PgError, command, control_data, give_to_servers, run};
use crate::base::Lsn;
use crate::base::lsn::WAL_PAGE_SIZE;
use crate::limits::ORACLE_REPLAY_TIMEOUT;

/// The slot that keeps WAL on the primary for the stand-by.
const SLOT: &str = "pgstrata_oracle";

/// A position at which node and stand-by can be compared: a checkpoint's WAL record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Start of the record.
    pub record: Lsn,
    /// End of the record: the LSN to read at.
    pub end: Lsn,
}

/// Has the primary keep its WAL from now on.
pub fn keep_wal(primary: &PgCluster) -> Result<(), PgError> {
    let sql = format!("SELECT pg_create_physical_replication_slot('{SLOT}', true)");
    primary.psql("postgres", &sql).map(drop)
}

/// Lets the primary remove WAL again.
pub fn release_wal(primary: &PgCluster) -> Result<(), PgError> {
    primary.psql("postgres", &format!("SELECT pg_drop_replication_slot('{SLOT}')")).map(drop)
}

/// Has the primary write a checkpoint, and says where its record is.
pub fn mark(primary: &PgCluster) -> Result<Mark, PgError> {
    primary.psql("postgres", "CHECKPOINT")?;
    let record = primary.lsn("SELECT checkpoint_lsn FROM pg_control_checkpoint()")?;
    // The record after it begins where it ends; the switch makes sure that there is one.
    primary.psql("postgres", "SELECT pg_switch_wal()")?;
    let file = primary.value("postgres", &format!("SELECT pg_walfile_name('{record}')"))?;
    let mut dump = command("pg_waldump");
    dump.args(["-s", &record.to_string(), "-n", "2"]);
    // Without a file's name the program takes the segment size from any file in the directory,
    // which may be one made in advance that is still empty.
    dump.arg("-p").arg(primary.data().join("pg_wal")).arg(file);
    let text = run(dump)?;
    let starts = wal_starts(&text);
    let bad = || PgError::Answer { what: "pg_waldump".into(), answer: text.clone() };
    match starts.as_slice() {
        [first, next] if *first == record => Ok(Mark { record, end: strip_page_header(*next) }),
        _ => Err(bad()),
    }
}

/// `EndRecPtr` of a record whose successor starts at `next`: when the record ends exactly at a
/// page's end, its successor starts behind the page header, but `EndRecPtr` is the page's start.
fn strip_page_header(next: Lsn) -> Lsn {
    let header = if next.segment_offset(16 << 20) < WAL_PAGE_SIZE { 40 } else { 24 };
    if next.page_offset() == header { Lsn(next.0 - header) } else { next }
}

/// Start positions of the records in the output of `pg_waldump`.
fn wal_starts(text: &str) -> Vec<Lsn> {
    text.lines()
        .filter_map(|line| line.split_once("lsn: "))
        .filter_map(|(_, rest)| rest.split(',').next()?.parse().ok())
        .collect()
}

/// Prepares `dir/data`, a base backup, to be replayed from the files of `primary`.
pub fn prepare(dir: &Path, primary: &PgCluster, settings: &[String]) -> Result<PgCluster, PgError> {
    let standby = PgCluster::at(dir)?;
    let signal = standby.data().join("recovery.signal");
    fs::write(&signal, b"").map_err(PgError::os(signal.display().to_string()))?;
    give_to_servers(&signal)?;
    let restore = format!("restore_command = 'cp {}/pg_wal/%f \"%p\"'", primary.data().display());
    let fixed = [
        restore.as_str(),
        "hot_standby = off",
        "recovery_target_timeline = current",
        "recovery_target_inclusive = on",
        "recovery_target_action = shutdown",
        "archive_mode = off",
    ];
    standby.configure(fixed)?;
    standby.configure(settings.iter().map(String::as_str))?;
    Ok(standby)
}

/// Replays up to the mark and leaves the stand-by shut down with everything in its files.
pub fn replay(standby: &mut PgCluster, mark: Mark) -> Result<(), PgError> {
    standby.configure([format!("recovery_target_lsn = '{}'", mark.record).as_str()])?;
    standby.spawn()?;
    let status = standby.wait_exit(ORACLE_REPLAY_TIMEOUT)?;
    let state = control_data(standby.data(), "Database cluster state")?;
    let end = control_data(standby.data(), "Minimum recovery ending location")?;
    let checkpoint = control_data(standby.data(), "Latest checkpoint location")?;
    if state == "shut down in recovery"
        && end == mark.end.to_string()
        && checkpoint == mark.record.to_string()
    {
        return Ok(());
    }
    Err(PgError::Failed {
        program: format!("replay to {} (record {})", mark.end, mark.record),
        status: format!("{status}, state '{state}', ended at {end}, checkpoint {checkpoint}"),
        stderr: standby.log_tail(),
    })
}

#[cfg(test)]
#[path = "oracle_tests.rs"]
mod tests;
