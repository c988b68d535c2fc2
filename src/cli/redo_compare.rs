//! Native redo against the wal-redo child, record by record.
//!
//! For every block of every record, in WAL order: the page as native redo left it so far is given
//! to native redo and to the child, with the one record; both must make the same 8,192 bytes of
//! it. As the page before was equal, by induction every version of every page is compared, and a
//! difference is found at the record that makes it. The child also compares with the images in
//! the WAL, where `wal_consistency_checking` put some. Native redo goes ahead; the child's answers
//! are taken in with up to [`REDO_COMPARE_DEPTH`] under way.
//!
//! Of a record that changes several blocks, both are given the excerpt too that is stored for the
//! block, and must make the same page of it again ([`super::redo_excerpts`]).
//!
//! Where native redo refuses, the child's page is taken. A page that no record makes anew, by
//! initialisation or image, is read from a copy of the data directory from before the WAL.

#![allow(
    clippy::disallowed_methods,
    reason = "a command-line tool that reads another program's files: no data path"
)]

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::{FutureExt, future};

use super::admin_client::CommandError;
use super::redo_excerpts::{Excerpt, ExcerptReport, Whole};
use super::verify::{describe, differences};
use super::verify_files::DataDirectory;
use crate::base::page::Page;
use crate::base::{BlockNumber, Lsn, RelTag};
use crate::limits::{REDO_COMPARE_DEPTH, VERIFY_DETAILS_MAX};
use crate::redo::excerpt::excerpt;
use crate::redo::native::{Applied, NotNative, apply, apply_bytes};
use crate::redo::{Redo, RedoError, RedoRequest, RedoSettings};
use crate::wal::page::WalLayout;
use crate::wal::record::{BlockRef, Record, rmgr_id};
use crate::wal::stream::{Event, StreamRecord, WalStream};

pub mod coverage;
mod implied;

use coverage::Coverage;
use implied::Implied;

const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
const READ_BYTES: usize = 1024 * 1024;

/// Name of the load of pgbench.
pub const PGBENCH: &str = "pgbench";
/// Name of the load like TPC-C.
pub const LIKE_TPCC: &str = "like TPC-C";

/// What became of the blocks of one kind of record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// Page changes: a record counts once for each of its blocks.
    pub changes: u64,
    /// Of these, applied natively.
    pub native: u64,
    /// Of these, where there was nothing to do, because the page was new or had seen the record.
    pub skipped: u64,
    /// Of a supported kind, but refused.
    pub misfits: u64,
    /// Not equal to the child's page, or refused by the child.
    pub different: u64,
}

/// Outcome of a comparison.
#[derive(Clone, Debug, Default)]
pub struct CompareReport {
    /// Records read.
    pub records: u64,
    /// By resource manager and operation.
    pub kinds: BTreeMap<(u8, u8), Sums>,
    /// Records of several blocks, and what is stored of them.
    pub excerpts: ExcerptReport,
    /// By load, in their order.
    pub loads: Vec<Coverage>,
    /// The first differences and misfits, described.
    pub details: Vec<String>,
}

impl CompareReport {
    /// Sums over all kinds.
    pub fn total(&self) -> Sums {
        self.kinds.values().fold(Sums::default(), |sum, kind| Sums {
            changes: sum.changes + kind.changes,
            native: sum.native + kind.native,
            skipped: sum.skipped + kind.skipped,
            misfits: sum.misfits + kind.misfits,
            different: sum.different + kind.different,
        })
    }

    /// True when every page was equal, and none was refused that should fit.
    pub fn is_equal(&self) -> bool {
        let total = self.total();
        total.different == 0 && total.misfits == 0
    }

    /// Records that change pages, of all loads: these were compared.
    pub fn compared(&self) -> u64 {
        self.loads.iter().map(|load| load.records).sum()
    }

    /// Whether the comparison shows what it is to show: all is equal, at least `at_least` records
    /// that change pages were compared, and of the loads that are promised to need hardly a
    /// process, each round did.
    ///
    /// # Errors
    /// What it does not show.
    pub fn judge(&self, at_least: u64) -> Result<(), String> {
        if !self.is_equal() {
            return Err("native redo differs from PostgreSQL".to_owned());
        }
        let compared = self.compared();
        if compared < at_least {
            return Err(format!(
                "{compared} records that change pages were compared, not {at_least} as asked for"
            ));
        }
        let is_promised = |load: &&Coverage| [PGBENCH, LIKE_TPCC].contains(&load.load.as_str());
        match self.loads.iter().filter(is_promised).find(|load| !load.is_enough()) {
            Some(load) => Err(format!("too much needs a wal-redo process: {load}")),
            None => Ok(()),
        }
    }

    /// The table that a human reads.
    pub fn table(&self) -> String {
        let mut out = String::new();
        let columns = ["changes", "native", "skipped", "misfits", "different"];
        let [a, b, c, d, e] = columns;
        let _ = writeln!(out, "{:<24}{a:>10}{b:>10}{c:>10}{d:>10}{e:>10}", "");
        let mut line = |name: &str, sums: &Sums| {
            let Sums { changes, native, skipped, misfits, different } = sums;
            let _ = writeln!(
                out,
                "{name:<24}{changes:>10}{native:>10}{skipped:>10}{misfits:>10}{different:>10}"
            );
        };
        for ((rmgr, operation), sums) in &self.kinds {
            line(&format!("{} {operation:02X}", manager_name(*rmgr)), sums);
        }
        line("all", &self.total());
        let _ = writeln!(out, "{} records", self.records);
        let _ = writeln!(out, "{} records that change pages were compared", self.compared());
        for load in &self.loads {
            let _ = writeln!(out, "{load}");
        }
        out.push_str(&self.excerpts.table());
        for detail in &self.details {
            let _ = writeln!(out, "  {detail}");
        }
        out
    }

    fn differs(&mut self, kind: (u8, u8), text: impl FnOnce() -> String) {
        self.kinds.entry(kind).or_default().different += 1;
        self.detail(|| format!("{} {:02X}: {}", manager_name(kind.0), kind.1, text()));
    }

    fn detail(&mut self, text: impl FnOnce() -> String) {
        if self.details.len() < VERIFY_DETAILS_MAX {
            self.details.push(text());
        }
    }
}

/// PostgreSQL's name of a resource manager.
pub(super) fn manager_name(rmgr: u8) -> String {
    let name = match rmgr {
        rmgr_id::XLOG => "XLOG",
        rmgr_id::HEAP2 => "Heap2",
        rmgr_id::HEAP => "Heap",
        rmgr_id::BTREE => "Btree",
        rmgr_id::HASH => "Hash",
        rmgr_id::GIN => "Gin",
        rmgr_id::GIST => "Gist",
        rmgr_id::SEQ => "Sequence",
        rmgr_id::SPGIST => "SPGist",
        rmgr_id::BRIN => "BRIN",
        rmgr_id::GENERIC => "Generic",
        _ => return format!("manager {rmgr}"),
    };
    name.to_owned()
}

/// A page in its present version.
#[derive(Clone)]
struct Current {
    page: Bytes,
    /// It was made with the child's help since its last base.
    child: bool,
    /// The load that changed it last, counted from 0.
    load: usize,
}

/// What the child is to make of a record, and of its excerpt if there is one.
struct Question {
    kind: (u8, u8),
    whole: RedoRequest,
    short: Option<RedoRequest>,
}

impl Question {
    /// The child's answers.
    async fn answers(self, child: &dyn Redo) -> Answers {
        let short = async {
            match self.short {
                Some(short) => Some(child.redo(short).await),
                None => None,
            }
        };
        future::join(child.redo(self.whole), short).await
    }
}

type Answers = (Result<Bytes, RedoError>, Option<Result<Bytes, RedoError>>);

/// A page that native redo made, and the child's answers.
struct Answer {
    rel: RelTag,
    block: BlockNumber,
    lsn: Lsn,
    kind: (u8, u8),
    ours: Bytes,
    theirs: Answers,
}

/// A comparison under way.
pub struct Compare<'a> {
    child: &'a dyn Redo,
    settings: RedoSettings,
    base: &'a DataDirectory,
    pages: HashMap<(RelTag, BlockNumber), Current>,
    implied: Implied,
    /// Loads that have ended.
    loads: Vec<Coverage>,
    load: Coverage,
    under_way: FuturesUnordered<LocalBoxFuture<'a, Answer>>,
    excerpt: Excerpt<'a>,
    report: CompareReport,
}

impl<'a> Compare<'a> {
    /// `base` is the data directory from before the first record.
    pub fn new(child: &'a dyn Redo, settings: RedoSettings, base: &'a DataDirectory) -> Self {
        Compare {
            child,
            settings,
            base,
            pages: HashMap::new(),
            implied: Implied::default(),
            loads: Vec::new(),
            load: Coverage::default(),
            under_way: FuturesUnordered::new(),
            excerpt: Box::new(excerpt),
            report: CompareReport::default(),
        }
    }

    /// Compares with other excerpts, ones with mistakes.
    pub fn with_excerpt(mut self, excerpt: Excerpt<'a>) -> Self {
        self.excerpt = excerpt;
        self
    }

    /// Takes the next record.
    ///
    /// # Errors
    /// When the record cannot be read, or the base, or the child cannot stand in; a difference is
    /// no error.
    pub async fn record(&mut self, found: &StreamRecord) -> Result<(), CommandError> {
        self.report.records += 1;
        let record = Record::parse(&found.bytes)?;
        self.imply(found)?;
        if record.blocks.is_empty() {
            return Ok(());
        }
        let mut all_native = true;
        for block in &record.blocks {
            all_native &= self.block(&record, block, found).await?;
        }
        self.load.records += 1;
        self.load.records_native += u64::from(all_native);
        Ok(())
    }

    /// The load whose records came last is over.
    pub fn end_load(&mut self, name: &str) {
        let mut load = Coverage { load: name.to_owned(), ..std::mem::take(&mut self.load) };
        let number = self.loads.len();
        for current in self.pages.values().filter(|current| current.load == number) {
            load.pages += 1;
            load.pages_native += u64::from(!current.child);
        }
        self.loads.push(load);
    }

    /// Every page that a record has changed, as it is now.
    pub fn pages(&self) -> impl Iterator<Item = (RelTag, BlockNumber, &Bytes)> + '_ {
        self.pages.iter().map(|((rel, block), current)| (*rel, *block, &current.page))
    }

    /// One of those.
    pub fn page(&self, rel: RelTag, block: BlockNumber) -> Option<&Bytes> {
        self.pages.get(&(rel, block)).map(|current| &current.page)
    }

    /// Waits for the child's last answers.
    pub async fn finish(mut self) -> CompareReport {
        while let Some(answer) = self.under_way.next().await {
            self.judge(&answer);
        }
        if self.load.records > 0 {
            self.end_load("the rest");
        }
        self.report.loads = self.loads;
        self.report
    }

    /// One block of a record; true if it was applied natively.
    async fn block(
        &mut self,
        record: &Record<'_>,
        block: &BlockRef<'_>,
        found: &StreamRecord,
    ) -> Result<bool, CommandError> {
        let (rel, number, lsn) = (block.rel, block.block, found.end);
        let kind = (record.header.rmgr, record.header.operation());
        let before = self.current(rel, number)?;
        let mut page: Box<Page> = before[..].try_into().map(Box::new)?;
        let done = apply(&mut page, record, block, lsn, &self.settings);
        // The way that chains take finds its data in the record by itself.
        let mut other: Box<Page> = before[..].try_into().map(Box::new)?;
        let target = (rel, number);
        let same = match apply_bytes(&mut other, &found.bytes, target, lsn, &self.settings) {
            Ok(_) => done.is_ok() && other == page,
            Err(NotNative::Unsupported { .. }) => done.is_err() || block.image.is_some(),
            Err(NotNative::Misfit(_)) => done.is_err(),
        };
        if !same {
            self.report.differs(kind, || format!("{rel} block {number} at {lsn}: two ways differ"));
        }
        // Blocks of XLOG are stored as pages.
        let short = match record.blocks.len() {
            2.. if kind.0 != rmgr_id::XLOG => {
                let page_before: &Page = (&before[..]).try_into()?;
                let whole = Whole { found, block, before: page_before, after: &page, done };
                self.excerpt(kind, &whole)
            }
            _ => None,
        };
        let base = (!block.will_init).then_some(before);
        let request = |record: Bytes| {
            let records = vec![(lsn, record)];
            RedoRequest { rel, block: number, base: base.clone(), records }
        };
        let question =
            Question { kind, short: short.map(request), whole: request(found.bytes.clone()) };
        let ours = Bytes::from(page as Box<[u8]>);
        let sums = self.report.kinds.entry(kind).or_default();
        sums.changes += 1;
        let (after, native) = match done {
            Ok(applied) => {
                sums.native += 1;
                sums.skipped += u64::from(applied == Applied::Skipped);
                self.ask(question, ours.clone()).await;
                (ours, true)
            }
            Err(why) => {
                if let NotNative::Misfit(what) = why {
                    sums.misfits += 1;
                    self.report.detail(|| format!("{rel} block {number} at {lsn}: {what}"));
                }
                let (whole, short) = question.answers(self.child).await;
                let whole = whole?;
                if let Some(problem) = problem(&whole, short.as_ref()) {
                    let place = format!("{rel} block {number} at {lsn}");
                    self.report.differs(kind, || format!("{place}: of its excerpt, {problem}"));
                }
                (whole, false)
            }
        };
        let old = self.pages.get(&(rel, number)).is_some_and(|current| current.child);
        let child = !native || old && !block.replaces_page();
        self.load.versions += 1;
        self.load.versions_native += u64::from(!child);
        let load = self.loads.len();
        self.pages.insert((rel, number), Current { page: after, child, load });
        Ok(native)
    }

    /// The excerpt of a record for a block, if there is one. It is counted, and checked without
    /// the child.
    fn excerpt(&mut self, kind: (u8, u8), whole: &Whole<'_>) -> Option<Bytes> {
        let (rel, number) = (whole.block.rel, whole.block.block);
        let short = (self.excerpt)(&whole.found.bytes, rel, number);
        self.report.excerpts.count(kind, &whole.found.bytes, short.as_ref());
        let short = short?;
        if let Err(problem) = whole.check(&short, &self.settings) {
            let lsn = whole.found.end;
            self.report.differs(kind, || format!("{rel} block {number} at {lsn}: {problem}"));
        }
        Some(short)
    }

    /// Has the child apply a record too.
    async fn ask(&mut self, question: Question, ours: Bytes) {
        let child = self.child;
        let answer = async move {
            let (kind, rel, block) = (question.kind, question.whole.rel, question.whole.block);
            let lsn = question.whole.records.first().map_or(Lsn::INVALID, |(lsn, _)| *lsn);
            let theirs = question.answers(child).await;
            Answer { rel, block, lsn, kind, ours, theirs }
        };
        self.under_way.push(answer.boxed_local());
        if self.under_way.len() < REDO_COMPARE_DEPTH {
            return;
        }
        // Half of the answers, so that the child always has the other half to work on.
        while self.under_way.len() > REDO_COMPARE_DEPTH / 2
            && let Some(answer) = self.under_way.next().await
        {
            self.judge(&answer);
        }
        // What is ready.
        while let Some(Some(answer)) = self.under_way.next().now_or_never() {
            self.judge(&answer);
        }
        future::ready(()).await;
    }

    fn judge(&mut self, answer: &Answer) {
        let Answer { rel, block, lsn, kind, ours, theirs: (whole, short) } = answer;
        if let Some(problem) = problem(ours, Some(whole)) {
            self.report.differs(*kind, || format!("{rel} block {block} at {lsn}: {problem}"));
        }
        if let Some(problem) = problem(ours, short.as_ref()) {
            let place = format!("{rel} block {block} at {lsn}");
            self.report.differs(*kind, || format!("{place}: of its excerpt, {problem}"));
        }
    }
}

/// What is wrong with an answer of the child.
fn problem(ours: &Bytes, theirs: Option<&Result<Bytes, RedoError>>) -> Option<String> {
    match theirs? {
        Ok(theirs) if theirs == ours => None,
        Ok(theirs) => Some(describe(ours, theirs, &differences(ours, theirs, false))),
        Err(error) => Some(error.to_string()),
    }
}

/// Gives all records from `from` on, which begins a record, to `each`, until it says false or the
/// WAL ends; gives the position after the last one. `wal` is a directory of segment files of 16
/// MiB on timeline 1.
pub fn read_wal(
    wal: &Path,
    from: Lsn,
    mut each: impl FnMut(StreamRecord) -> Result<bool, CommandError>,
) -> Result<Lsn, CommandError> {
    let layout = WalLayout { segment_bytes: SEGMENT_BYTES, system_id: None };
    let mut stream = WalStream::new(from, layout)?;
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let at = stream.position();
        let number = at.segment_number(SEGMENT_BYTES);
        let path = wal.join(format!("00000001{:08X}{:08X}", number / 256, number % 256));
        let Ok(mut file) = File::open(&path) else { return Ok(stream.boundary()) };
        file.seek(SeekFrom::Start(at.segment_offset(SEGMENT_BYTES)))?;
        let got = file.read(&mut buffer)?;
        let mut input = buffer.get(..got).unwrap_or_default();
        loop {
            match stream.next(&mut input)? {
                Event::Record(record) => {
                    if !each(record)? {
                        return Ok(stream.boundary());
                    }
                }
                Event::NeedInput if got > 0 => break,
                Event::NeedInput | Event::EndOfWal => return Ok(stream.boundary()),
            }
        }
    }
}
