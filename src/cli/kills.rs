//! Kills of the node in the middle of a load, for `pgstrata demo --kill`, and what must hold at
//! each of them.
//!
//! The moments are drawn over the time of the load, so that they fall into every phase of the
//! node's work. While the node is dead:
//! 1. The primary's slot is looked at: up to there the node has acknowledged WAL. Every byte of
//!    the journal's files from the last checkpoint up to there must be what the primary's own WAL
//!    has.
//! 2. Every file of the node is checked, as `pgstrata check` does; nothing may be damaged.
//!
//! When it has come back, its journal must not end before what it had acknowledged.

use std::fmt;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use fastrand::Rng;
use futures_lite::future::block_on;

use super::admin_client::CommandError;
use super::demo_node::DemoNode;
use super::pg::PgCluster;
use crate::base::{Lsn, TenantShardId, TimelineId};
use crate::io::read_only::ReadOnlyIo;
use crate::limits::JOURNAL_SEGMENT_BYTES;
use crate::shard::check::check;
use crate::shard::check::report::{FileKind, FileReport};
use crate::wal::journal::parse_segment_name;

/// Which timeline of the node follows the primary, and its slot there.
#[derive(Clone, Copy)]
pub(super) struct Followed {
    pub(super) tenant: TenantShardId,
    pub(super) timeline: TimelineId,
    pub(super) slot: &'static str,
}

/// Counters of the node that are added up over its lives.
const WORK: [&str; 3] = ["checkpoints", "compactions", "compaction_failures"];
/// What the node logs when a garbage collection has removed layers.
const COLLECTED: &str = "history begins at";

/// Kills that are still to come, and what those before have shown.
pub(super) struct Kills {
    followed: Followed,
    wanted: u32,
    done: u32,
    next: Instant,
    end: Instant,
    rng: Rng,
    /// Kills in the middle of writing a layer or another file.
    while_writing: u32,
    bytes_compared: u64,
    files_checked: u64,
    work: [u64; WORK.len()],
    /// Garbage collections that removed layers.
    collections: usize,
}

impl Kills {
    /// `wanted` kills within `time` from now on.
    pub(super) fn new(followed: Followed, wanted: u32, time: Duration, seed: u64) -> Kills {
        let begin = Instant::now();
        let mut kills = Kills {
            followed,
            wanted,
            done: 0,
            next: begin,
            end: begin + time,
            rng: Rng::with_seed(seed),
            while_writing: 0,
            bytes_compared: 0,
            files_checked: 0,
            work: [0; WORK.len()],
            collections: 0,
        };
        kills.draw_next();
        kills
    }

    /// The mean pause uses up the time that is left; each is from nothing to twice the mean.
    fn draw_next(&mut self) {
        let left = self.end.saturating_duration_since(Instant::now());
        let mean = left / (self.wanted.saturating_sub(self.done) + 1);
        self.next = Instant::now() + mean.mul_f64(2.0 * self.rng.f64());
    }

    /// Kills that are still to come.
    pub(super) fn missing(&self) -> u32 {
        self.wanted.saturating_sub(self.done)
    }

    /// Kills the node if it is time, checks what must hold, and starts it again.
    pub(super) fn tick(
        &mut self,
        primary: &PgCluster,
        node: &mut DemoNode,
    ) -> Result<(), CommandError> {
        if self.missing() == 0 || Instant::now() < self.next {
            return Ok(());
        }
        self.done += 1;
        let Followed { tenant, timeline, slot } = self.followed;
        let checkpoint = node.admin()?.timeline(tenant, timeline)?.disk_consistent_lsn;
        self.add_work(&node.admin()?.metrics()?);
        node.kill()?;
        let sql =
            format!("SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '{slot}'");
        let promised = primary.lsn(&sql)?;
        let dir = node.data_dir();
        let journal = dir.join(format!("tenants/{tenant}/timelines/{timeline}/wal"));
        let wal = primary.data().join("pg_wal");
        let compared = compare_journal(&journal, &wal, checkpoint, promised)?;
        let leftovers = self.check_files(&dir)?;
        node.start_again()?;
        let info = node.admin()?.timeline(tenant, timeline)?;
        println!(
            "    kill {}: acknowledged up to {promised}, the node came back with {}; {} KiB of \
             WAL since its checkpoint are the primary's; {leftovers} files were being written",
            self.done,
            info.journal_lsn,
            compared.bytes / 1024
        );
        let durable = match compared.reaches_end {
            true => info.journal_lsn,
            // A checkpoint has taken the segments over.
            false => info.journal_lsn.min(info.disk_consistent_lsn),
        };
        if durable < promised {
            let text = format!(
                "the node acknowledged WAL up to {promised} and has it up to {durable} only"
            );
            return Err(text.into());
        }
        self.bytes_compared += compared.bytes;
        self.while_writing += u32::from(leftovers > 0);
        self.draw_next();
        Ok(())
    }

    /// Checks every file of the node, which does not run; the number of those that it was
    /// writing.
    fn check_files(&mut self, dir: &Path) -> Result<u64, CommandError> {
        let mut damage = Vec::new();
        let mut report = |file: &FileReport| {
            let findings = file.findings.iter().filter(|_| file.is_damaged());
            damage.extend(findings.map(|found| format!("{}: {}", file.path.display(), found.text)));
        };
        let summary = block_on(check(&ReadOnlyIo::default(), dir, &mut report))?;
        if !damage.is_empty() {
            return Err(format!("damaged after a kill:\n{}", damage.join("\n")).into());
        }
        self.files_checked += summary.total().files;
        Ok(summary.files.get(&FileKind::Leftover).map_or(0, |total| total.files))
    }

    /// To be called at the end: adds what the node did in its last life.
    pub(super) fn finish(&mut self, node: &DemoNode) -> Result<(), CommandError> {
        self.add_work(&node.admin()?.metrics()?);
        let log = fs::read_to_string(node.log_path())?;
        self.collections = log.lines().filter(|line| line.contains(COLLECTED)).count();
        Ok(())
    }

    /// Adds the counters of a life of the node that ends.
    fn add_work(&mut self, metrics: &str) {
        for line in metrics.lines() {
            let Some((name, number)) = line.rsplit_once(' ') else { continue };
            for (counter, sum) in WORK.iter().zip(&mut self.work) {
                if name.starts_with(&format!("pgstrata_{counter}_total{{")) {
                    *sum += number.parse::<u64>().unwrap_or(0);
                }
            }
        }
    }
}

impl fmt::Display for Kills {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Kills { done, while_writing, bytes_compared, files_checked, .. } = self;
        write!(
            f,
            "{done} kills, {while_writing} of them while a file was being written; {} MiB of \
             journal compared, {files_checked} files checked; the node's work in all its lives:",
            bytes_compared / (1024 * 1024)
        )?;
        WORK.iter().zip(self.work).try_for_each(|(name, sum)| write!(f, " {name} {sum},"))?;
        write!(f, " garbage collections {}", self.collections)
    }
}

/// What became of a comparison of the journal with the primary's WAL.
#[derive(Debug, PartialEq, Eq)]
struct Compared {
    /// Bytes that are equal.
    bytes: u64,
    /// The journal has the last byte that was asked for.
    reaches_end: bool,
}

/// Compares `from..to` of the journal, as far as it has files, with the primary's WAL.
fn compare_journal(
    journal: &Path,
    wal: &Path,
    from: Lsn,
    to: Lsn,
) -> Result<Compared, CommandError> {
    let mut compared = Compared { bytes: 0, reaches_end: to <= from };
    for entry in fs::read_dir(journal)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some((_, number)) = parse_segment_name(&name) else { continue };
        let start = number * JOURNAL_SEGMENT_BYTES;
        let first = from.0.max(start);
        let end = to.0.min(start + JOURNAL_SEGMENT_BYTES);
        if first >= end {
            continue;
        }
        let (ours, theirs) = (fs::read(entry.path())?, fs::read(wal.join(&name))?);
        let range = (first - start) as usize..(end - start) as usize;
        let (ours, theirs) = (ours.get(range.clone()), theirs.get(range));
        if ours.is_none() || ours != theirs {
            let (first, end) = (Lsn(first), Lsn(end));
            return Err(
                format!("the journal differs from the primary's WAL in {first}..{end}").into()
            );
        }
        compared.bytes += end - first;
        compared.reaches_end |= end == to.0;
    }
    Ok(compared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_journal_that_lacks_or_changes_a_byte_is_found_out() {
        let root = std::env::temp_dir().join(format!("pgstrata-kills-{}", std::process::id()));
        let (journal, wal) = (root.join("journal"), root.join("wal"));
        for dir in [&journal, &wal] {
            fs::create_dir_all(dir).unwrap();
        }
        let name = "000000010000000000000002";
        let at = |offset: u64| Lsn(2 * JOURNAL_SEGMENT_BYTES + offset);
        let mut bytes: Vec<u8> = (0..40_000u32).map(|n| n as u8).collect();
        fs::write(wal.join(name), &bytes).unwrap();
        fs::write(journal.join(name), &bytes).unwrap();
        let compare = |from, to| compare_journal(&journal, &wal, at(from), at(to));
        let whole = Compared { bytes: 39_900, reaches_end: true };
        assert_eq!(compare(100, 40_000).unwrap(), whole);
        assert!(compare(100, 40_001).is_err(), "a byte is missing");
        let next = compare(100, JOURNAL_SEGMENT_BYTES + 1);
        assert!(next.is_err(), "the rest of the segment is missing");
        fs::remove_file(journal.join(name)).unwrap();
        assert_eq!(compare(100, 200).unwrap(), Compared { bytes: 0, reaches_end: false });
        bytes[150] ^= 1;
        fs::write(journal.join(name), &bytes).unwrap();
        assert!(compare(100, 200).is_err(), "a byte differs");
        assert!(compare(151, 200).is_ok());
        fs::remove_dir_all(&root).unwrap();
    }
}
