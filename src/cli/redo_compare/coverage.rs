//! How much of a load native redo does alone.

use std::fmt::{Display, Formatter};

use crate::limits::{REDO_NATIVE_PAGES_PERMILLE, REDO_NATIVE_RECORDS_PERMILLE};

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
    /// True if native redo does as much of the load alone as is promised for pgbench and for loads
    /// like TPC-C. A load without records shows nothing.
    pub fn is_enough(&self) -> bool {
        let has = |part: u64, whole: u64, least: u64| {
            part.saturating_mul(1000) >= whole.saturating_mul(least)
        };
        self.records > 0
            && has(self.records_native, self.records, REDO_NATIVE_RECORDS_PERMILLE)
            && has(self.versions_native, self.versions, REDO_NATIVE_PAGES_PERMILLE)
            && has(self.pages_native, self.pages, REDO_NATIVE_PAGES_PERMILLE)
    }

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::redo_compare::{CompareReport, LIKE_TPCC, PGBENCH, Sums};

    fn load(name: &str, native: [u64; 3]) -> Coverage {
        let [records_native, versions_native, pages_native] = native;
        let load = name.to_owned();
        let (records, versions, pages) = (1000, 1000, 1000);
        Coverage { load, records, records_native, versions, versions_native, pages, pages_native }
    }

    #[test]
    fn each_round_of_the_promised_loads_counts() {
        let judged = |loads: &[Coverage], at_least| {
            let report = CompareReport { loads: loads.to_vec(), ..CompareReport::default() };
            report.judge(at_least)
        };
        let well = [load(PGBENCH, [995, 980, 980]), load("mixed", [0; 3])];
        assert_eq!(judged(&well, 2000), Ok(()));
        assert!(judged(&well, 2001).unwrap_err().contains("2000 records"));
        for native in [[994, 1000, 1000], [1000, 979, 1000], [1000, 1000, 979]] {
            let second = load(LIKE_TPCC, native);
            let loads = [load(LIKE_TPCC, [1000; 3]), second.clone(), well[0].clone()];
            let error = judged(&loads, 0).unwrap_err();
            assert!(error.contains(&second.to_string()), "{error}");
        }
        let nothing = Coverage { load: PGBENCH.to_owned(), ..Coverage::default() };
        assert!(judged(&[nothing], 0).is_err());
        let mut unequal = CompareReport::default();
        unequal.kinds.insert((10, 0), Sums { different: 1, ..Sums::default() });
        assert!(unequal.judge(0).is_err());
    }
}
