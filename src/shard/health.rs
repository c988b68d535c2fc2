//! What is wrong with a timeline that goes on working: for its operator.

use std::collections::{BTreeMap, BTreeSet};

use crate::base::Seldom;
use crate::limits::DAMAGE_REPORTS_MAX;

/// What may make ingest wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The journal finds no room.
    Journal,
    /// Checkpoints fail: ingest waits once too many layers do.
    Checkpoint,
    /// L0 layers cannot be merged: ingest is slow.
    Compaction,
}

/// See the module's text. Nothing here is kept over a restart: what is damaged is found again by
/// the next read, and by `pgstrata check`.
#[derive(Debug, Default)]
pub struct Health {
    waiting: BTreeMap<Part, String>,
    damaged: BTreeSet<String>,
    /// Damage that reads found was told of. A client may repeat one as fast as it likes.
    pub damage_told: Seldom,
    /// So were reads that failed otherwise: they do not keep damage out of the log.
    pub failures_told: Seldom,
}

impl Health {
    /// A part does not get on, for this reason; it tries again by itself. True if that is news.
    pub fn pause(&mut self, part: Part, reason: String) -> bool {
        self.waiting.insert(part, reason).is_none()
    }

    /// The part gets on. True if that is news.
    pub fn resume(&mut self, part: Part) -> bool {
        self.waiting.remove(&part).is_some()
    }

    /// Why ingest waits, or soon will.
    pub fn paused(&self) -> Option<&str> {
        self.waiting.values().next().map(String::as_str)
    }

    /// A read found damage. The first few findings are kept.
    pub fn damage(&mut self, what: String) {
        if self.damaged.len() < DAMAGE_REPORTS_MAX {
            self.damaged.insert(what);
        }
    }

    /// What reads found damaged.
    pub fn damaged(&self) -> impl Iterator<Item = &String> {
        self.damaged.iter()
    }
}
