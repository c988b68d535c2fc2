//! How much of a load native redo does alone.

use std::fmt::{Display, Formatter};

/// Counts of one load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Name of the load.
    pub load: String,
    /// Records that change pages.
    pub records: u64,
    /// Of these, records that a page's rebuild never sends to a process.
    pub records_native: u64,
    /// Versions of pages: what a record makes of each page that it names.
    pub versions: u64,
    /// Of these, versions that are rebuilt, from the page's last base on, without a process.
    pub versions_native: u64,
    /// Pages that the load changed.
    pub pages: u64,
    /// Of these, pages whose last version is rebuilt without a process.
    pub pages_native: u64,
}

impl Coverage {
    /// Adds another load's.
    pub fn add(&mut self, other: &Coverage) {
        self.records += other.records;
        self.records_native += other.records_native;
        self.versions += other.versions;
        self.versions_native += other.versions_native;
        self.pages += other.pages;
        self.pages_native += other.pages_native;
    }
}

impl Display for Coverage {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let share = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
        write!(
            f,
            "{}: without a process {:.3} % of {} records that change pages, {:.3} % of {} page \
             versions rebuilt, the last of {:.3} % of {} pages",
            self.load,
            share(self.records_native, self.records),
            self.records,
            share(self.versions_native, self.versions),
            self.versions,
            share(self.pages_native, self.pages),
            self.pages,
        )
    }
}
