//! The judge inside the WAL: with `wal_consistency_checking = all`, every record carries the
//! image that each of its pages has after it.
//!
//! To rebuild a page, the wal-redo child applies its records one after the other and compares the
//! page with the image after each of them, masked as PostgreSQL masks (`check_consistency` in
//! `pgxn/neon_walredo/pages.c`); a difference comes back as an error. A page is rebuilt from its
//! newest base, so it is asked for just before each of its bases and at the end: then every
//! record is applied, and every image compared, once. Of those last pages it is counted here how
//! many equal their image byte for byte.

use std::collections::BTreeMap;
use std::path::Path;

use super::admin_client::CommandError;
use super::page_client::PageClient;
use super::redo_compare::read_wal;
use crate::base::checksum::{crc32c, crc32c_append};
use crate::base::{Lsn, RelTag};
use crate::limits::{VERIFY_DETAILS_MAX, VERIFY_PIPELINE_DEPTH};
use crate::server::page_protocol::{Answer, Query};
use crate::wal::record::Record;

/// A row of records of one page, from a base to before the next.
#[derive(Clone, Copy)]
struct Chain {
    rel: RelTag,
    block: u32,
    /// LSN of its last record.
    lsn: Lsn,
    /// Images in its records.
    images: u64,
    /// Checksum of the last record's image without page LSN and page checksum, if it has one.
    crc: Option<u32>,
}

/// Outcome of a comparison.
#[derive(Clone, Debug, Default)]
pub struct ImageReport {
    /// Records looked at.
    pub records: u64,
    /// Images found.
    pub images: u64,
    /// Images that the rebuilt page was equal to, masked.
    pub equal: u64,
    /// Pages that were asked for and whose last record has an image.
    pub pages: u64,
    /// Pages of these that equal it byte for byte, page LSN and checksum apart.
    pub pages_unmasked: u64,
    /// The first differences.
    pub details: Vec<String>,
}

/// Has the node's pages compared with all images in the records that end within `from..=to`. `wal`
/// is a directory of segment files of 16 MiB on timeline 1.
pub fn verify_images(
    client: &mut PageClient,
    wal: &Path,
    from: Lsn,
    to: Lsn,
) -> Result<ImageReport, CommandError> {
    let mut report = ImageReport::default();
    let chains = collect(wal, from, to, &mut report)?;
    report.images = chains.iter().map(|chain| chain.images).sum();
    let mut unsent = chains.iter();
    let mut queue = |client: &mut PageClient| {
        if let Some(chain) = unsent.next() {
            client.set_lsn(chain.lsn);
            client.queue(Query::GetPage { rel: chain.rel, block: chain.block });
        }
    };
    (0..VERIFY_PIPELINE_DEPTH).for_each(|_| queue(client));
    for chain in &chains {
        let problem = match client.receive()? {
            Answer::GetPage(page) => {
                report.equal += chain.images;
                report.pages += u64::from(chain.crc.is_some());
                report.pages_unmasked += u64::from(chain.crc == Some(bare_crc(&page)));
                None
            }
            Answer::Error(text) => Some(text),
            other => Some(format!("unexpected answer {other:?}")),
        };
        if let Some(text) = problem
            && report.details.len() < VERIFY_DETAILS_MAX
        {
            let Chain { lsn, rel, block, .. } = chain;
            report.details.push(format!("{rel} block {block} at {lsn}: {text}"));
        }
        queue(client);
    }
    Ok(report)
}

/// CRC of a page without `pd_lsn` and `pd_checksum`.
fn bare_crc(page: &[u8]) -> u32 {
    crc32c_append(crc32c(&[]), page.get(10..).unwrap_or_default())
}

fn collect(
    wal: &Path,
    from: Lsn,
    to: Lsn,
    report: &mut ImageReport,
) -> Result<Vec<Chain>, CommandError> {
    let mut chains = Chains::default();
    let end = read_wal(wal, from, |record| {
        if record.end > to {
            return Ok(false);
        }
        report.records += 1;
        chains.add(&record.bytes, record.end)?;
        Ok(record.end < to)
    })?;
    if end < to {
        return Err(format!("the WAL ends at {end}, before {to}").into());
    }
    Ok(chains.finish())
}

/// Chains that are complete, and those that may still grow.
#[derive(Default)]
struct Chains {
    done: Vec<Chain>,
    growing: BTreeMap<(RelTag, u32), Chain>,
}

impl Chains {
    fn add(&mut self, record: &bytes::Bytes, lsn: Lsn) -> Result<(), CommandError> {
        let record = Record::parse(record)?;
        for block in &record.blocks {
            let (rel, number) = (block.rel, block.block);
            let new = Chain { rel, block: number, lsn, images: 0, crc: None };
            if block.replaces_page() {
                self.done.extend(self.growing.insert((rel, number), new));
            } else {
                let chain = self.growing.entry((rel, number)).or_insert(new);
                (chain.lsn, chain.crc) = (lsn, None);
            }
        }
        for (rel, block, image) in record.consistency_images() {
            if let Some(chain) = self.growing.get_mut(&(rel, block)) {
                chain.images += 1;
                chain.crc = Some(bare_crc(&image?[..]));
            }
        }
        Ok(())
    }

    /// All chains with images, in WAL order.
    fn finish(mut self) -> Vec<Chain> {
        self.done.extend(self.growing.into_values());
        self.done.retain(|chain| chain.images > 0);
        self.done.sort_by_key(|chain| chain.lsn);
        self.done
    }
}
