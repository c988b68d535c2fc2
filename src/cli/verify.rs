//! `pgstrata verify`: every block of every relation fork of a data directory against the node.
//!
//! 1. For each fork: Exists, Nblocks, then GetPage of every block, pipelined. Pages are compared
//!    byte for byte; `pd_checksum` is left out where the data directory has checksums (it is set
//!    when a page is written to disk and depends on nothing else). A block past the node's end of
//!    the fork counts as different even if both are zeros: the sizes differ.
//! 2. Free space maps are read and reported, not judged: PostgreSQL does not log them.
//! 3. SLRU segments: the shorter side counts as zeros up to the longer one's end, because
//!    trailing pages are made on demand.
//! 4. The reverse: forks in `absent` (candidates that the caller knows of) that the data
//!    directory lacks must not exist on the node.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::page_client::{ClientError, PageClient};
use super::pg::PgError;
use super::verify_files::DataDirectory;
use crate::base::key::{FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM};
use crate::base::page::{PAGE_SIZE, PD_CHECKSUM, page_lsn};
use crate::base::{Kind, RelTag};
use crate::limits::VERIFY_DETAILS_MAX;
use crate::server::page_protocol::{Answer, Query};

/// Why the comparison could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The node could not be asked.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The data directory could not be read.
    #[error(transparent)]
    Files(#[from] PgError),
}

impl VerifyError {
    /// What a caller can do about it.
    pub fn kind(&self) -> Kind {
        match self {
            VerifyError::Client(error) => error.kind(),
            VerifyError::Files(error) => error.kind(),
        }
    }
}

/// Sums of one kind of fork.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Relation forks.
    pub relations: u64,
    /// Blocks on the longer side.
    pub blocks: u64,
    /// Blocks that are equal.
    pub equal: u64,
    /// Blocks that differ, are missing on one side, or could not be read.
    pub different: u64,
}

/// Outcome of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// By fork number.
    pub forks: BTreeMap<u8, Sums>,
    /// Forks with at least one difference, free space maps left out.
    pub bad_forks: BTreeMap<RelTag, Sums>,
    /// SLRU segments; `relations` counts segments.
    pub slru: Sums,
    /// Forks asked for that must not exist, and how many the node has all the same.
    pub absent: Sums,
    /// The first differences, described.
    pub details: Vec<String>,
}

impl Report {
    /// True when nothing that is judged differs.
    pub fn is_equal(&self) -> bool {
        let judged = self.forks.iter().filter(|(fork, _)| **fork != FORK_FSM);
        self.bad_forks.is_empty()
            && judged.map(|(_, sums)| sums.different).sum::<u64>() == 0
            && self.slru.different == 0
            && self.absent.different == 0
    }

    fn detail(&mut self, text: impl FnOnce() -> String) {
        if self.details.len() < VERIFY_DETAILS_MAX {
            self.details.push(text());
        }
    }

    /// The table that a human reads.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let mut line = |name: &str, sums: &Sums| {
            let Sums { relations, blocks, equal, different } = sums;
            let _ =
                writeln!(out, "{name:<28}{relations:>10}{blocks:>12}{equal:>12}{different:>12}");
        };
        let mut total = Sums::default();
        for (fork, sums) in &self.forks {
            if *fork != FORK_FSM {
                line(fork_name(*fork), sums);
                total.relations += sums.relations;
                total.blocks += sums.blocks;
                total.equal += sums.equal;
                total.different += sums.different;
            }
        }
        line("sum of relation forks", &total);
        line("SLRU segments", &self.slru);
        line("must not exist", &self.absent);
        if let Some(sums) = self.forks.get(&FORK_FSM) {
            line("free space maps (not judged)", sums);
        }
        let columns = ["relations", "blocks", "equal", "different"];
        let [a, b, c, d] = columns;
        let mut text = format!("{:<28}{a:>10}{b:>12}{c:>12}{d:>12}\n{out}", "");
        for (tag, sums) in self.bad_forks.iter().take(VERIFY_DETAILS_MAX) {
            let _ = writeln!(text, "  {tag}: {} of {} blocks differ", sums.different, sums.blocks);
        }
        for detail in &self.details {
            let _ = writeln!(text, "  {detail}");
        }
        text
    }
}

fn fork_name(fork: u8) -> &'static str {
    match fork {
        FORK_MAIN => "main",
        FORK_FSM => "free space map",
        FORK_VM => "visibility map",
        FORK_INIT => "init",
        _ => "other",
    }
}

/// Byte ranges in which two pages differ, `pd_checksum` left out where asked for.
pub(super) fn differences(
    ours: &[u8],
    oracle: &[u8],
    ignore_checksum: bool,
) -> Vec<std::ops::Range<usize>> {
    let mut ranges: Vec<std::ops::Range<usize>> = Vec::new();
    for offset in 0..ours.len().max(oracle.len()) {
        if ours.get(offset) == oracle.get(offset)
            || ignore_checksum && PD_CHECKSUM.contains(&offset)
        {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.end == offset => last.end += 1,
            _ => ranges.push(offset..offset + 1),
        }
    }
    ranges
}

/// Says how two pages differ: page LSNs, byte ranges, the line pointers of the first range.
pub(super) fn describe(ours: &[u8], oracle: &[u8], ranges: &[std::ops::Range<usize>]) -> String {
    let mut text = format!("LSN {} here, {} in the file; bytes", page_lsn(ours), page_lsn(oracle));
    for range in ranges.iter().take(6) {
        let hex = |page: &[u8]| {
            let end = range.end.min(range.start + 8);
            hex::encode(page.get(range.start..end).unwrap_or_default())
        };
        let _ = write!(text, " {}..{} ({} / {})", range.start, range.end, hex(ours), hex(oracle));
        if let Some(item) = item_at(oracle, range.start) {
            let _ = write!(text, " in item {item}");
        }
    }
    if ranges.len() > 6 {
        let _ = write!(text, " and {} ranges more", ranges.len() - 6);
    }
    text
}

/// Number of the line pointer whose item holds byte `offset` of a page (`ItemIdData`).
fn item_at(page: &[u8], offset: usize) -> Option<usize> {
    let lower = page.get(12..14).map(|b| usize::from(u16::from_le_bytes([b[0], b[1]])))?;
    let pointers = page.get(24..lower.min(PAGE_SIZE))?;
    let holds = |pointer: &[u8]| {
        let bits = u32::from_le_bytes(pointer.try_into().unwrap_or_default());
        let start = (bits & 0x7fff) as usize;
        let length = (bits >> 17) as usize;
        start <= offset && offset < start + length
    };
    pointers.chunks_exact(4).position(holds).map(|index| index + 1)
}

/// Compares everything. `absent`: forks that may have existed; those that `oracle` lacks must
/// not exist on the node.
///
/// # Errors
/// When the node or the files cannot be read; a difference is no error but part of the report.
pub fn verify(
    client: &mut PageClient,
    oracle: &DataDirectory,
    ignore_checksum: bool,
    absent: &[RelTag],
) -> Result<Report, VerifyError> {
    let mut report = Report::default();
    for tag in oracle.forks.keys() {
        let sums = verify_fork(client, oracle, *tag, ignore_checksum, &mut report)?;
        let of_kind = report.forks.entry(tag.fork).or_default();
        of_kind.relations += 1;
        of_kind.blocks += sums.blocks;
        of_kind.equal += sums.equal;
        of_kind.different += sums.different;
        if sums.different > 0 && tag.fork != FORK_FSM {
            report.bad_forks.insert(*tag, sums);
        }
    }
    verify_slru(client, oracle, &mut report)?;
    verify_absent(client, oracle, absent, &mut report)?;
    Ok(report)
}

fn verify_fork(
    client: &mut PageClient,
    oracle: &DataDirectory,
    rel: RelTag,
    ignore_checksum: bool,
    report: &mut Report,
) -> Result<Sums, VerifyError> {
    let judged = rel.fork != FORK_FSM;
    let Some(files) = oracle.forks.get(&rel) else { return Ok(Sums::default()) };
    let mut sums = Sums { relations: 1, ..Sums::default() };
    let exists = client.ask(Query::Exists { rel })?;
    let size = client.ask(Query::Nblocks { rel })?;
    let blocks = match size {
        Answer::Nblocks(blocks) => blocks,
        _ => 0,
    };
    if exists != Answer::Exists(true) || size != Answer::Nblocks(files.blocks) {
        // A missing or a wrongly sized fork is a difference even when it has no block.
        sums.different += 1;
        if judged {
            let (exists, size) = (said(&exists), said(&size));
            let text = format!("{rel}: {exists}, {size}; the file has {} blocks", files.blocks);
            report.detail(|| text);
        }
    }
    sums.blocks = u64::from(blocks.max(files.blocks));
    sums.different += u64::from(blocks.saturating_sub(files.blocks));
    let mut problem = None;
    client.ask_all(
        (0..files.blocks).map(|block| Query::GetPage { rel, block }),
        |query, answer| {
            let Query::GetPage { block, .. } = query else { return };
            let expected = match files.page(block) {
                Ok(page) => page.unwrap_or_default(),
                Err(error) => {
                    problem = Some(error);
                    return;
                }
            };
            match answer {
                Answer::GetPage(page) if block < blocks => {
                    let ranges = differences(&page, &expected, ignore_checksum);
                    if ranges.is_empty() {
                        sums.equal += 1;
                        return;
                    }
                    sums.different += 1;
                    if judged {
                        report.detail(|| {
                            format!("{rel} block {block}: {}", describe(&page, &expected, &ranges))
                        });
                    }
                }
                Answer::Error(text) => {
                    sums.different += 1;
                    if judged {
                        report.detail(|| format!("{rel} block {block}: {text}"));
                    }
                }
                _ => sums.different += 1,
            }
        },
    )?;
    problem.map_or(Ok(sums), |error| Err(error.into()))
}

/// An answer in a report.
fn said(answer: &Answer) -> String {
    match answer {
        Answer::Error(text) => text.clone(),
        Answer::Exists(true) => "it exists".to_owned(),
        Answer::Exists(false) => "it does not exist".to_owned(),
        Answer::Nblocks(blocks) => format!("{blocks} blocks"),
        _ => "an answer to another question".to_owned(),
    }
}

fn verify_slru(
    client: &mut PageClient,
    oracle: &DataDirectory,
    report: &mut Report,
) -> Result<(), VerifyError> {
    for ((kind, segment), bytes) in &oracle.slru {
        report.slru.relations += 1;
        let answer = client.ask(Query::GetSlruSegment { kind: *kind, segment: *segment })?;
        let ours = match answer {
            Answer::GetSlruSegment(ours) => ours,
            other => {
                let text = format!("{} {segment:04X}: {}", kind.directory(), said(&other));
                report.slru.different += 1;
                report.detail(|| text);
                continue;
            }
        };
        let pages = ours.len().max(bytes.len()).div_ceil(PAGE_SIZE);
        let padded = |side: &[u8], page: usize| {
            let start = (page * PAGE_SIZE).min(side.len());
            let end = (start + PAGE_SIZE).min(side.len());
            let mut bytes = side.get(start..end).unwrap_or_default().to_vec();
            bytes.resize(PAGE_SIZE, 0);
            bytes
        };
        for page in 0..pages {
            report.slru.blocks += 1;
            let (here, there) = (padded(&ours, page), padded(bytes, page));
            let ranges = differences(&here, &there, false);
            if ranges.is_empty() {
                report.slru.equal += 1;
                continue;
            }
            report.slru.different += 1;
            report.detail(|| {
                let text = describe(&here, &there, &ranges);
                format!("{} {segment:04X} page {page}: {text}", kind.directory())
            });
        }
    }
    Ok(())
}

fn verify_absent(
    client: &mut PageClient,
    oracle: &DataDirectory,
    absent: &[RelTag],
    report: &mut Report,
) -> Result<(), VerifyError> {
    let unlogged = |tag: &RelTag| oracle.forks.contains_key(&tag.node.fork(FORK_INIT));
    let gone: Vec<RelTag> = absent
        .iter()
        .filter(|tag| !oracle.forks.contains_key(tag) && !unlogged(tag) && tag.fork != FORK_FSM)
        .copied()
        .collect();
    client.ask_all(gone.iter().map(|rel| Query::Exists { rel: *rel }), |query, answer| {
        report.absent.relations += 1;
        if answer == Answer::Exists(false) {
            report.absent.equal += 1;
            return;
        }
        report.absent.different += 1;
        report.detail(|| format!("{query:?} must not exist: {}", said(&answer)));
    })?;
    Ok(())
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
