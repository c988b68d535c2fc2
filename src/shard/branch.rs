//! Branches: a timeline that begins in the history of another, its ancestor.
//!
//! A branch is an index that names ancestor and LSN: nothing is copied. A read looks in the
//! branch's own layers first; where they have no base for the key, it goes on in the ancestor,
//! below the branch point, and so on down to the timeline that was imported. What the ancestor
//! takes in later is above the branch point and is never seen.
//!
//! Invariants:
//! 1. A branch point is not below the ancestor's own branch point: a branch made there hangs on
//!    the older timeline, which has the same content there. So a timeline needs no more of its
//!    ancestor than what is at its own branch point, and can be detached from it.
//! 2. Everything that a branch has of its own is above its branch point. Only the image layers
//!    that a detaching writes stand at the branch point, and they take the ancestor's place in
//!    the same step.
//! 3. The ancestor lives as long as the branch: a branch holds it, and it cannot be deleted.

use std::rc::Rc;

use super::gate::GateGuard;
use super::index::BranchPoint;
use super::reader::ReadError;
use super::timeline::{Mutable, Timeline, wal_layout};
use crate::base::{Lsn, TimelineId};
use crate::io::Io;
use crate::wal::stream::WalStream;

/// Where a branch goes on when its own layers have nothing.
pub struct Ancestor<I: Io> {
    /// The older timeline.
    pub timeline: Rc<Timeline<I>>,
    /// Its changes at this LSN and below are the branch's too.
    pub lsn: Lsn,
}

impl<I: Io> Clone for Ancestor<I> {
    fn clone(&self) -> Self {
        Ancestor { timeline: self.timeline.clone(), lsn: self.lsn }
    }
}

impl<I: Io> Ancestor<I> {
    /// The form that the index keeps.
    pub fn point(&self) -> BranchPoint {
        BranchPoint { timeline: self.timeline.id, lsn: self.lsn }
    }
}

/// Where a read goes on, taken in the same step as the layers that it has looked at: a detaching
/// that ends meanwhile changes nothing for it, and the ancestor waits for it before it goes away.
pub(super) struct Older<I: Io> {
    pub(super) timeline: Rc<Timeline<I>>,
    pub(super) lsn: Lsn,
    pub(super) _read: Option<GateGuard>,
}

impl<I: Io> Older<I> {
    pub(super) fn of(mutable: &Mutable<I>) -> Option<Self> {
        let Ancestor { timeline, lsn } = mutable.ancestor.clone()?;
        let read = timeline.gate.enter();
        Some(Older { timeline, lsn, _read: read })
    }
}

#[cfg(test)]
thread_local! {
    /// Plants a bug that the tests must find: a branch sees what its ancestor took in after the
    /// branch point.
    pub(crate) static CANARY_NO_BRANCH_POINT: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
}

/// The upper end of a read, when it goes on in an ancestor.
pub(super) fn below_branch_point(below: Lsn, point: Lsn) -> Lsn {
    #[cfg(test)]
    if CANARY_NO_BRANCH_POINT.get() {
        return below;
    }
    below.min(Lsn(point.0 + 1))
}

/// Why no branch can be made at an LSN.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BranchPointError {
    /// The history does not reach back so far.
    #[error(
        "timeline {timeline} cannot be branched at {lsn}: its history begins at {start}; choose an \
         LSN from there on"
    )]
    BelowHistory {
        /// The ancestor.
        timeline: TimelineId,
        /// The LSN asked for.
        lsn: Lsn,
        /// The first one that would do.
        start: Lsn,
    },
    /// The WAL has not come in yet.
    #[error(
        "timeline {timeline} cannot be branched at {lsn}: it has WAL up to {last_record_lsn} only"
    )]
    NotYet {
        /// The ancestor.
        timeline: TimelineId,
        /// The LSN asked for.
        lsn: Lsn,
        /// The last one that would do.
        last_record_lsn: Lsn,
    },
    /// History before it was collected.
    #[error("timeline {timeline} cannot be branched at {lsn}: {why}")]
    Collected {
        /// The ancestor.
        timeline: TimelineId,
        /// The LSN asked for.
        lsn: Lsn,
        /// The rule that says so.
        why: String,
    },
}

impl<I: Io> Timeline<I> {
    /// Whether a branch at `lsn` would find all it needs. This is the one place that decides it;
    /// whatever removes history must keep what [`Timeline::branch_points`] names and raise the
    /// lower bound here.
    pub(super) fn check_branch_point(&self, lsn: Lsn) -> Result<(), BranchPointError> {
        let (timeline, start, last_record_lsn) =
            (self.id, self.start_lsn(), self.lsns().last_record);
        if lsn < start {
            return Err(BranchPointError::BelowHistory { timeline, lsn, start });
        }
        if lsn > last_record_lsn {
            return Err(BranchPointError::NotYet { timeline, lsn, last_record_lsn });
        }
        // History before this timeline's own branch point is its ancestor's, and so is the branch.
        match self.ancestor().filter(|ancestor| lsn < ancestor.lsn) {
            Some(ancestor) => ancestor.timeline.check_branch_point(lsn),
            None => self.check_holdable(lsn).map_err(|error| BranchPointError::Collected {
                timeline,
                lsn,
                why: error.to_string(),
            }),
        }
    }

    /// First readable LSN: that of the youngest history, where several timelines make it up.
    pub fn start_lsn(&self) -> Lsn {
        let mut start = self.mutable.borrow().start_lsn;
        let mut next = self.ancestor();
        while let Some(older) = next {
            start = start.max(older.timeline.mutable.borrow().start_lsn);
            next = older.timeline.ancestor();
        }
        start
    }

    /// Begins a read of a client.
    pub(super) fn enter(&self) -> Result<GateGuard, ReadError> {
        if self.archived.get() {
            return Err(ReadError::Archived { timeline: self.id });
        }
        self.gate.enter().ok_or_else(|| self.gone())
    }

    /// Why nothing will come any more.
    pub(super) fn gone(&self) -> ReadError {
        if self.archived.get() {
            ReadError::Archived { timeline: self.id }
        } else if self.deleting.get() {
            ReadError::TimelineNotFound(self.tenant, self.id)
        } else {
            ReadError::Shutdown
        }
    }

    /// To be asked when a read at `lsn` has ended: history may have been cut off meanwhile, and
    /// then what was found is worth nothing.
    pub(super) fn still_readable(&self, lsn: Lsn) -> Result<(), ReadError> {
        let start = self.start_lsn();
        if lsn < start { Err(ReadError::BelowStart { request: lsn, start }) } else { Ok(()) }
    }

    /// The ancestor, and where the branch leaves it.
    pub fn ancestor(&self) -> Option<Ancestor<I>> {
        self.mutable.borrow().ancestor.clone()
    }

    /// LSNs at which branches of this timeline read it, ascending. History must stay readable at
    /// each of them. A branch that cannot be read, so that its branch point is not known, counts
    /// as one at [`Lsn::INVALID`]: nothing may be removed.
    pub fn branch_points(&self) -> Vec<Lsn> {
        let mut points: Vec<Lsn> = self.mutable.borrow().branches.values().copied().collect();
        points.sort_unstable();
        points
    }

    /// Remembers a branch, or forgets it.
    pub(super) fn set_branch(&self, id: TimelineId, point: Option<Lsn>) {
        let mut mutable = self.mutable.borrow_mut();
        match point {
            Some(lsn) => mutable.branches.insert(id, lsn),
            None => mutable.branches.remove(&id),
        };
    }

    /// `lsn`, or the next lower position where a record may begin: positions within the padding
    /// or a page header have the content of the position before them.
    pub(super) fn record_position(&self, lsn: Lsn) -> Lsn {
        let aligned = Lsn(lsn.0 - lsn.0 % 8);
        match WalStream::new(aligned, wal_layout(&self.cluster)) {
            Ok(_) => aligned,
            Err(_) => Lsn(aligned.0 - aligned.page_offset()),
        }
    }
}
