//! What a check says: a line for each file, and the sums.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// The index of a timeline.
    Index,
    /// A delta layer that an index names.
    DeltaLayer,
    /// An image layer that an index names.
    ImageLayer,
    /// A segment of a journal.
    JournalSegment,
    /// Another small file in the checksummed container.
    SmallFile,
    /// Something that the node does not need: it removes it by itself.
    Leftover,
    /// Something that is not the node's.
    Unknown,
}

impl FileKind {
    /// The kind in words, singular and plural.
    pub fn words(self) -> [&'static str; 2] {
        match self {
            FileKind::Index => ["index", "indexes"],
            FileKind::DeltaLayer => ["delta layer", "delta layers"],
            FileKind::ImageLayer => ["image layer", "image layers"],
            FileKind::JournalSegment => ["journal segment", "journal segments"],
            FileKind::SmallFile => ["small file", "small files"],
            FileKind::Leftover => ["leftover", "leftovers"],
            FileKind::Unknown => ["unknown file", "unknown files"],
        }
    }
}

/// How bad something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Worth knowing; nothing is lost.
    Note,
    /// Data is lost or cannot be trusted.
    Damage,
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is, where, and what to do.
    pub text: String,
}

/// What was found of one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileReport {
    /// The file, or for what is missing, where it should be.
    pub path: PathBuf,
    /// What it is.
    pub kind: FileKind,
    /// Its length in bytes.
    pub bytes: u64,
    /// What it holds, in words.
    pub content: String,
    /// What is wrong or remarkable; empty for a file that is as it should be.
    pub findings: Vec<Finding>,
}

impl FileReport {
    /// A file without findings.
    pub fn new(path: PathBuf, kind: FileKind, bytes: u64) -> FileReport {
        FileReport { path, kind, bytes, content: String::new(), findings: Vec::new() }
    }

    /// With words about its content.
    pub fn content(mut self, text: impl Into<String>) -> FileReport {
        self.content = text.into();
        self
    }

    /// With a note.
    pub fn note(mut self, text: impl Into<String>) -> FileReport {
        self.findings.push(Finding { severity: Severity::Note, text: text.into() });
        self
    }

    /// With damage.
    pub fn damage(mut self, text: impl Into<String>) -> FileReport {
        self.findings.push(Finding { severity: Severity::Damage, text: text.into() });
        self
    }

    /// True if any finding is damage.
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|finding| finding.severity == Severity::Damage)
    }
}

/// Number and length of files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Total {
    /// Files.
    pub files: u64,
    /// Their length in bytes.
    pub bytes: u64,
}

/// The sums of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Tenant shards.
    pub tenants: u64,
    /// Timelines.
    pub timelines: u64,
    /// Files by kind.
    pub files: BTreeMap<FileKind, Total>,
    /// Values in all layers.
    pub values: u64,
    /// Records in all journals.
    pub records: u64,
    /// Damaged files.
    pub damaged_files: u64,
    /// Notes.
    pub notes: u64,
}

impl Summary {
    /// Adds a file.
    pub fn add(&mut self, report: &FileReport) {
        let total = self.files.entry(report.kind).or_default();
        total.files += 1;
        total.bytes += report.bytes;
        self.damaged_files += u64::from(report.is_damaged());
        let notes = report.findings.iter().filter(|one| one.severity == Severity::Note);
        self.notes += notes.count() as u64;
    }

    /// All files.
    pub fn total(&self) -> Total {
        let sum = |sum: Total, one: &Total| Total {
            files: sum.files + one.files,
            bytes: sum.bytes + one.bytes,
        };
        self.files.values().fold(Total::default(), sum)
    }
}
