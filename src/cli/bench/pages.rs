//! The pages that a benchmark asks for: relations that are named, or found by asking for sizes,
//! and what a page must look like.

use std::str::FromStr;

use crate::base::key::{FORK_FSM, FORK_INIT, FORK_MAIN, FORK_VM};
use crate::base::page::{PAGE_SIZE, page_is_new, page_lsn};
use crate::base::{BlockNumber, Lsn, RelNode, RelTag, TenantId, TimelineId};
use crate::cli::admin_client::CommandError;
use crate::cli::page_client::PageClient;
use crate::server::page_protocol::{Answer, Query};

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The tenant.
    pub tenant: TenantId,
    /// Its timeline.
    pub timeline: TimelineId,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let (tenant, timeline) =
            text.split_once('/').ok_or_else(|| format!("'{text}': write TENANT/TIMELINE"))?;
        Ok(Target {
            tenant: tenant.parse::<TenantId>().map_err(|error| error.to_string())?,
            timeline: timeline.parse::<TimelineId>().map_err(|error| error.to_string())?,
        })
    }
}

/// A fork as it is written: `TABLESPACE/DATABASE/RELATION`, with `_fsm`, `_vm` or `_init` behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork(pub RelTag);

impl FromStr for Fork {
    type Err = String;

    fn from_str(text: &str) -> Result<Fork, String> {
        let wrong =
            || format!("'{text}': write TABLESPACE/DATABASE/RELATION, such as 1663/5/16384");
        let (path, fork) = match text.split_once('_') {
            None => (text, FORK_MAIN),
            Some((path, "fsm")) => (path, FORK_FSM),
            Some((path, "vm")) => (path, FORK_VM),
            Some((path, "init")) => (path, FORK_INIT),
            Some(_) => return Err(wrong()),
        };
        let mut numbers = path.split('/').map(|number| number.parse::<u32>().map_err(|_| wrong()));
        let mut next = || numbers.next().ok_or_else(wrong)?;
        let node = RelNode { spc: next()?, db: next()?, rel: next()? };
        match numbers.next() {
            None => Ok(Fork(node.fork(fork))),
            Some(_) => Err(wrong()),
        }
    }
}

/// Pages of several forks, numbered through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSpace {
    /// Each fork, and the number after its last page.
    forks: Vec<(RelTag, u64)>,
}

impl PageSpace {
    /// Adds a fork of so many blocks.
    pub fn add(&mut self, rel: RelTag, blocks: BlockNumber) {
        if blocks > 0 {
            self.forks.push((rel, self.len() + u64::from(blocks)));
        }
    }

    /// Number of pages.
    pub fn len(&self) -> u64 {
        self.forks.last().map_or(0, |(_, end)| *end)
    }

    /// There are none.
    pub fn is_empty(&self) -> bool {
        self.forks.is_empty()
    }

    /// Number of forks.
    pub fn forks(&self) -> usize {
        self.forks.len()
    }

    /// The request for a page by its number; `None` past the end.
    pub fn query(&self, number: u64) -> Option<Query> {
        let at = self.forks.partition_point(|(_, end)| *end <= number);
        let start = at.checked_sub(1).and_then(|before| self.forks.get(before));
        let start = start.map_or(0, |(_, end)| *end);
        let (rel, _) = self.forks.get(at)?;
        Some(Query::GetPage { rel: *rel, block: u32::try_from(number - start).ok()? })
    }
}

/// The pages of the named forks, as many as the server says they have.
///
/// # Errors
/// The server cannot be asked.
pub fn named(client: &mut PageClient, forks: &[Fork]) -> Result<PageSpace, CommandError> {
    sizes(client, forks.iter().map(|fork| fork.0))
}

/// The main forks of the relations of a database in `pg_default` whose numbers are at most
/// `highest`: every number is asked for its size. Needs nothing but the page service.
///
/// # Errors
/// The server cannot be asked.
pub fn found(client: &mut PageClient, db: u32, highest: u32) -> Result<PageSpace, CommandError> {
    let node = |rel| RelNode { spc: 1663, db, rel }.fork(FORK_MAIN);
    sizes(client, (1..=highest).map(node))
}

fn sizes(
    client: &mut PageClient,
    forks: impl Iterator<Item = RelTag>,
) -> Result<PageSpace, CommandError> {
    let mut space = PageSpace::default();
    let mut failed = None;
    client.ask_all(forks.map(|rel| Query::Nblocks { rel }), |query, answer| {
        match (query, answer) {
            (Query::Nblocks { rel }, Answer::Nblocks(blocks)) => space.add(rel, blocks),
            (_, Answer::Error(text)) => failed = Some(text),
            _ => {}
        }
    })?;
    match failed {
        Some(text) if space.is_empty() => Err(format!("sizes of relations: {text}").into()),
        _ => Ok(space),
    }
}

/// What is wrong with a page that was read at `lsn`; `None` if nothing is. Zeros are a page too.
pub fn problem_of(page: &[u8], lsn: Option<Lsn>) -> Option<String> {
    if page.len() != PAGE_SIZE {
        return Some(format!("the page has {} bytes", page.len()));
    }
    if page_is_new(page) {
        let zeros = page.iter().all(|byte| *byte == 0);
        return (!zeros).then(|| "a page without a header is not zero".to_owned());
    }
    let field = |at: usize| match page.get(at..at + 2) {
        Some(&[low, high]) => u16::from_le_bytes([low, high]),
        _ => 0,
    };
    let (lower, upper, special, version) = (field(12), field(14), field(16), field(18));
    let bounds = (24..=upper).contains(&lower) && upper <= special && special <= 8192;
    if !bounds || version != 0x2004 {
        return Some(format!(
            "the page header is broken: lower {lower}, upper {upper}, special {special}, version \
             {version:04X}"
        ));
    }
    let newer = lsn.filter(|lsn| page_lsn(page) > *lsn);
    newer.map(|lsn| format!("the page is of {}, it was asked for at {lsn}", page_lsn(page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::page::set_page_lsn;

    #[test]
    fn names_are_understood() {
        let Fork(rel) = "1663/5/1259_vm".parse().unwrap();
        assert_eq!(rel.to_string(), "1663/5/1259_vm");
        for wrong in ["", "1663/5", "1663/5/1/2", "1663/5/x", "1663/5/1_x"] {
            assert!(wrong.parse::<Fork>().is_err(), "{wrong}");
        }
        let target = format!("{}/{}", "11".repeat(16), "22".repeat(16));
        let target: Target = target.parse().unwrap();
        assert_eq!((target.tenant, target.timeline.0), (TenantId([0x11; 16]), [0x22; 16]));
        assert!("11".repeat(16).parse::<Target>().is_err());
    }

    #[test]
    fn every_page_has_one_number() {
        let rel = |rel| RelNode { spc: 1663, db: 5, rel }.fork(0);
        let mut space = PageSpace::default();
        assert!(space.is_empty() && space.query(0).is_none());
        [(1, 3), (2, 0), (3, 2)].into_iter().for_each(|(n, blocks)| space.add(rel(n), blocks));
        assert_eq!((space.len(), space.forks()), (5, 2));
        let found: Vec<_> = (0..5).map(|number| space.query(number).unwrap()).collect();
        let page = |n, block| Query::GetPage { rel: rel(n), block };
        assert_eq!(found, [page(1, 0), page(1, 1), page(1, 2), page(3, 0), page(3, 1)]);
        assert_eq!(space.query(5), None);
    }

    #[test]
    fn broken_pages_are_told_apart() {
        let mut page = vec![0; PAGE_SIZE];
        assert_eq!(problem_of(&page, None), None);
        page[8000] = 1;
        assert!(problem_of(&page, None).unwrap().contains("not zero"));
        page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
        set_page_lsn(&mut page, Lsn(100));
        assert_eq!(problem_of(&page, Some(Lsn(100))), None);
        assert!(problem_of(&page, Some(Lsn(99))).unwrap().contains("asked for at"));
        for (at, byte) in [(12, 3), (15, 33), (17, 33), (18, 5), (19, 31)] {
            let mut bad = page.clone();
            bad[at] = byte;
            assert!(problem_of(&bad, None).unwrap().contains("broken"), "{at}");
        }
        assert!(problem_of(&page[1..], None).is_some());
    }
}
