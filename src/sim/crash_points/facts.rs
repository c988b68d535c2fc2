//! What the script has been promised, and what it has asked for.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use crate::base::{Lsn, TimelineId, Timestamp};
use crate::sim::engine::{Outside, START, TIMELINE};

/// Relations of the small primary, and blocks of each.
const RELATIONS: u64 = 2;
const BLOCKS: u64 = 5;

/// Connection string of the root.
pub(super) const ROOT_SOURCE: &str = "host=primary user=u";

/// Whether something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    /// Being made: there or not after a crash.
    Coming,
    There,
    /// Being deleted: there or not after a crash.
    Going,
    Gone,
}

/// A fact that a crash may leave either way while it is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fact {
    No,
    Open,
    Yes,
}

impl Fact {
    pub(super) fn agrees(self, found: bool) -> bool {
        match self {
            Fact::No => !found,
            Fact::Open => true,
            Fact::Yes => found,
        }
    }
}

/// A timeline of the script.
#[derive(Clone, Debug)]
pub(super) struct Known {
    pub(super) id: TimelineId,
    /// Where it branches off; the start for the root.
    pub(super) branch_lsn: Lsn,
    /// Connection string of its source.
    pub(super) source: Option<String>,
    pub(super) presence: Presence,
    pub(super) archived: Fact,
    pub(super) detached: Fact,
}

/// What was acknowledged or asked for at one moment.
#[derive(Clone, Debug)]
pub(super) struct Facts {
    pub(super) timelines: Vec<Known>,
    /// Flushed positions that were reported, by the source's connection string.
    pub(super) flushed: BTreeMap<String, Lsn>,
    /// Leases on the root that were granted.
    pub(super) leases: Vec<(Lsn, Timestamp)>,
    /// The cut-off of the last collection that was acknowledged, and the highest asked for.
    pub(super) cutoff: (Lsn, Lsn),
    /// End of the primary's WAL.
    pub(super) end_of_wal: Lsn,
}

/// The facts as they grow.
pub(super) struct Story {
    pub(super) outside: Rc<Outside>,
    facts: RefCell<Facts>,
}

impl Story {
    pub(super) fn new(seed: u64) -> Rc<Story> {
        let outside = Outside::new(seed);
        outside.primary.borrow_mut().narrow(RELATIONS, BLOCKS);
        outside.quiet.set(true);
        outside.compaction.set(Some((2, 50)));
        outside.layer_bytes.set(Some((1 << 20, 16 * 1024)));
        let root = Known {
            id: TIMELINE,
            branch_lsn: START,
            source: Some(ROOT_SOURCE.to_owned()),
            presence: Presence::There,
            archived: Fact::No,
            detached: Fact::Yes,
        };
        let facts = Facts {
            timelines: vec![root],
            flushed: BTreeMap::new(),
            leases: Vec::new(),
            cutoff: (START, START),
            end_of_wal: START,
        };
        Rc::new(Story { outside, facts: RefCell::new(facts) })
    }

    /// The facts at this moment.
    pub(super) fn facts(&self) -> Facts {
        let mut facts = self.facts.borrow().clone();
        facts.flushed.clone_from(&self.outside.flushed.borrow());
        facts.end_of_wal = self.outside.primary.borrow().end();
        facts
    }

    /// A timeline that is about to be made.
    pub(super) fn coming(&self, id: TimelineId, branch_lsn: Lsn, source: Option<String>) {
        let (presence, archived, detached) = (Presence::Coming, Fact::No, Fact::No);
        let known = Known { id, branch_lsn, source, presence, archived, detached };
        self.facts.borrow_mut().timelines.push(known);
    }

    pub(super) fn change(&self, id: TimelineId, change: impl FnOnce(&mut Known)) {
        let mut facts = self.facts.borrow_mut();
        if let Some(known) = facts.timelines.iter_mut().find(|known| known.id == id) {
            change(known);
        }
    }

    pub(super) fn leased(&self, lsn: Lsn, until: Timestamp) {
        self.facts.borrow_mut().leases.push((lsn, until));
    }

    pub(super) fn collecting(&self, target: Lsn) {
        let mut facts = self.facts.borrow_mut();
        facts.cutoff.1 = target.max(facts.cutoff.1);
    }

    pub(super) fn collected(&self, cutoff: Lsn) {
        self.facts.borrow_mut().cutoff.0 = cutoff;
    }
}
