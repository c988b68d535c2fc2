//! How far back a timeline can be read, and what was when.
//!
//! Three numbers bound the history from below:
//!
//! - `start_lsn`: nothing was ever there before it;
//! - the *cut-off*: reads before it are refused, unless a lease holds their LSN. It is in the
//!   index, so it is durable before anything that only earlier reads need is removed;
//! - the *planned* cut-off, at or after it: what a collection under way is going to publish. New
//!   leases and branches before it are refused from the moment at which the plan is made.
//!
//! A read checks the cut-off when it begins, and again when it ends: a collection that overtook it
//! may have taken layers that it had yet to look at. Layers that it has found stay readable until
//! it drops them (`gc`).

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde::{Deserialize, Serialize};

use super::leases::{LEASES_FILE, Lease, LeaseError, Leases};
use super::reader::ReadError;
use super::stored::StoredLayer;
use super::timeline::{Signal, Timeline};
use super::timestamps::{AtTime, COMMIT_TIMES_FILE, CommitTimes};
use super::turn::Turn;
use crate::base::{Lsn, SmallRecord, Timestamp, Value};
use crate::io::{Io, IoCause, IoError, durable};
use crate::wal::change::Change;

/// Files of a timeline's directory that are neither index nor layer and belong there.
pub const HISTORY_FILES: [&str; 2] = [COMMIT_TIMES_FILE, LEASES_FILE];

/// What a timeline knows of its history.
pub(super) struct History<I: Io> {
    pub(super) times: RefCell<CommitTimes>,
    /// [`CommitTimes::mark`] of what is in the file.
    times_written: Cell<Option<(usize, Lsn, Lsn)>>,
    pub(super) leases: RefCell<Leases>,
    /// Counts changes of `leases`.
    pub(super) leases_version: Cell<u64>,
    /// The version that is in the file.
    pub(super) leases_written: Cell<u64>,
    /// Why leases are unknown, if they are.
    pub(super) leases_problem: RefCell<Option<String>>,
    pub(super) lease_turn: Turn,
    /// See the module's text.
    pub(super) cutoff: Cell<Lsn>,
    pub(super) planned_cutoff: Cell<Lsn>,
    pub(super) gc_turn: Turn,
    /// Ends the pause between collections.
    pub(super) gc_signal: Signal,
    /// Layers that no index names any more, and whose files are still there.
    pub(super) doomed: RefCell<Vec<Rc<StoredLayer<I>>>>,
}

impl<I: Io> History<I> {
    /// The history of a timeline whose index says this cut-off; files are read by
    /// [`Timeline::load_history`].
    pub(super) fn new(cutoff: Lsn) -> Self {
        History {
            times: RefCell::default(),
            times_written: Cell::new(None),
            leases: RefCell::default(),
            leases_version: Cell::new(0),
            leases_written: Cell::new(0),
            leases_problem: RefCell::default(),
            lease_turn: Turn::default(),
            cutoff: Cell::new(cutoff),
            planned_cutoff: Cell::new(cutoff),
            gc_turn: Turn::default(),
            gc_signal: Signal::new(),
            doomed: RefCell::default(),
        }
    }

    /// `leases` was changed.
    pub(super) fn leases_changed(&self) {
        self.leases_version.set(self.leases_version.get() + 1);
    }

    /// The file of leases says something else than `leases`.
    pub(super) fn leases_are_unwritten(&self) -> bool {
        self.leases_version.get() != self.leases_written.get()
    }

    /// Learns commit times from the changes of a record. Called when the record is carried out,
    /// in the same synchronous step.
    pub(super) fn note_commits(&self, lsn: Lsn, changes: &[Change]) {
        let time = changes.iter().find_map(|change| match change {
            Change::Slru {
                value: Value::Small(SmallRecord::ClogSet { timestamp, .. }), ..
            } => Some(*timestamp),
            _ => None,
        });
        if let Some(time) = time {
            self.times.borrow_mut().note(lsn, Timestamp::from_postgres(time));
        }
    }
}

/// How a time relates to what a timeline holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeKind {
    /// `lsn` is the last known LSN with nothing committed after the time.
    Present,
    /// The same, and nothing was committed after the time at all.
    Future,
    /// All that can be read includes later commits; there is no `lsn`.
    Past,
    /// No commit is known yet; there is no `lsn`.
    Nodata,
}

/// Answer to the question for the LSN of a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LsnByTimestamp {
    /// A readable LSN; its state includes no commit after the time.
    pub lsn: Option<Lsn>,
    /// What the time is.
    pub kind: TimeKind,
}

/// What can be asked of a timeline's history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HistoryRequest {
    /// The LSN of a time.
    LsnByTimestamp(Timestamp),
    /// The time of an LSN.
    TimestampOfLsn(Lsn),
    /// A lease on an LSN, for so many seconds.
    Lease(Lsn, Option<u64>),
    /// The leases that last.
    Leases,
    /// A collection, now.
    Gc(super::gc::GcRequest),
    /// The pages of relations at an LSN, or at the newest.
    Keyspace(Option<Lsn>),
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum HistoryReply {
    /// The LSN of a time.
    LsnByTimestamp(LsnByTimestamp),
    /// When the last known commit at or before the LSN was; `None` when none is known.
    TimestampOfLsn {
        /// The time.
        timestamp: Option<Timestamp>,
    },
    /// The lease as it is now.
    Lease(Lease),
    /// How far history goes, and the leases that last.
    Leases {
        /// Reads before this LSN are refused, unless a lease holds it.
        gc_cutoff_lsn: Lsn,
        /// By LSN.
        leases: Vec<Lease>,
    },
    /// What a collection did.
    Gc(super::gc::GcReport),
    /// Pages of relations.
    Keyspace {
        /// First key and end (exclusive) of each range, in 36 hexadecimal digits.
        keys: Vec<(String, String)>,
        /// Ranges in which few keys are in use: none are told of.
        sparse_keys: Vec<(String, String)>,
        /// The LSN.
        at_lsn: Lsn,
    },
}

impl<I: Io> Timeline<I> {
    /// The wall clock.
    pub(super) fn wall_clock(&self) -> Timestamp {
        Timestamp(self.context.io.unix_time_us())
    }

    /// The lowest LSN of which all history is readable.
    pub fn gc_cutoff(&self) -> Lsn {
        self.history.cutoff.get()
    }

    /// May a read at `lsn` be answered?
    ///
    /// # Errors
    /// [`ReadError::GarbageCollected`].
    pub(super) fn check_retained(&self, lsn: Lsn) -> Result<(), ReadError> {
        let cutoff = self.history.cutoff.get();
        if lsn < cutoff && !self.history.leases.borrow().covers(lsn, self.wall_clock()) {
            return Err(ReadError::GarbageCollected { request: lsn, cutoff });
        }
        // A branch holds its branch point, and nothing of its ancestor before that.
        match self.ancestor().filter(|ancestor| lsn < ancestor.lsn) {
            Some(ancestor) => ancestor.timeline.check_retained(lsn),
            None => Ok(()),
        }
    }

    /// The result of a read at `lsn` that began when that was allowed, if it still is: otherwise
    /// the read may have missed layers, whatever it found.
    pub(super) fn still_retained<T>(
        &self,
        lsn: Lsn,
        result: Result<T, ReadError>,
    ) -> Result<T, ReadError> {
        #[cfg(test)]
        if super::gc::planted::NO_SECOND_LOOK.get() {
            return result;
        }
        self.check_retained(lsn)?;
        result
    }

    /// May something that holds history, such as a branch, begin at `lsn`? To be asked in the
    /// synchronous step in which the holder becomes visible to collections.
    ///
    /// # Errors
    /// [`ReadError::BelowStart`], [`ReadError::GarbageCollected`].
    pub fn check_holdable(&self, lsn: Lsn) -> Result<(), ReadError> {
        let start = self.start_lsn();
        if lsn < start {
            return Err(ReadError::BelowStart { request: lsn, start });
        }
        if let Some(ancestor) = self.ancestor().filter(|ancestor| lsn < ancestor.lsn) {
            return Err(ReadError::BadLsn(format!(
                "{lsn} is before the branch point {} of this timeline: it is timeline {} that must \
                 hold it",
                ancestor.lsn, ancestor.timeline.id
            )));
        }
        let cutoff = self.history.planned_cutoff.get();
        if lsn >= cutoff || self.history.leases.borrow().covers(lsn, self.wall_clock()) {
            return Ok(());
        }
        Err(ReadError::GarbageCollected { request: lsn, cutoff })
    }

    /// The last readable LSN whose state includes no commit after `time`; exactness: see
    /// [`super::timestamps`].
    pub fn lsn_by_timestamp(&self, time: Timestamp) -> LsnByTimestamp {
        let floor = self.readable_floor();
        let (lsn, kind) = match self.at_time(time) {
            AtTime::Present(lsn) if lsn >= floor => (Some(lsn), TimeKind::Present),
            // Nothing was committed later, so this is true of every LSN.
            AtTime::Future(lsn) => (Some(lsn.max(floor)), TimeKind::Future),
            AtTime::Present(_) | AtTime::Past => (None, TimeKind::Past),
            AtTime::NoData => (None, TimeKind::Nodata),
        };
        LsnByTimestamp { lsn, kind }
    }

    /// The lowest LSN of which all later history is readable, in ancestors too.
    fn readable_floor(&self) -> Lsn {
        let own = self.history.cutoff.get().max(self.start_lsn());
        match self.ancestor() {
            Some(older) if own < older.lsn => {
                own.max(older.lsn.min(older.timeline.readable_floor()))
            }
            _ => own,
        }
    }

    /// [`CommitTimes::at_time`], of this timeline and the ancestors that it goes on in.
    fn at_time(&self, time: Timestamp) -> AtTime {
        let own = self.history.times.borrow().at_time(time);
        let Some(older) = self.ancestor().filter(|_| own == AtTime::Past) else { return own };
        match older.timeline.at_time(time) {
            // The branch has later commits, or has its branch point from some.
            AtTime::Present(lsn) | AtTime::Future(lsn) => AtTime::Present(lsn.min(older.lsn)),
            AtTime::Past | AtTime::NoData => AtTime::Past,
        }
    }

    /// [`CommitTimes::of_lsn`], of this timeline and the ancestors that it goes on in.
    fn time_of(&self, lsn: Lsn) -> Option<Timestamp> {
        let own = self.history.times.borrow().of_lsn(lsn);
        let has_own = |point: Lsn| own.is_some_and(|(from, _)| from > point);
        match self.ancestor().filter(|older| !has_own(older.lsn)) {
            // Collection may have taken what the ancestor knew.
            Some(older) => {
                let time = older.timeline.time_of(lsn.min(older.lsn));
                time.or(own.map(|(_, time)| time))
            }
            None => Some(own?.1),
        }
    }

    /// The file of commit times that a branch at `lsn` begins with, if there is anything in it.
    pub(super) fn commit_times_of_branch(&self, lsn: Lsn) -> Option<Vec<u8>> {
        Some(self.history.times.borrow().of_branch(lsn)?.encode(lsn))
    }

    /// When the last known commit at or before `lsn` was; exactness: see [`super::timestamps`].
    ///
    /// # Errors
    /// [`ReadError::BelowStart`], [`ReadError::BadLsn`] for one that has not come yet.
    pub fn timestamp_of_lsn(&self, lsn: Lsn) -> Result<Option<Timestamp>, ReadError> {
        let start = self.start_lsn();
        if lsn < start {
            return Err(ReadError::BelowStart { request: lsn, start });
        }
        if lsn > self.lsns().last_record {
            return Err(self.still_to_come(lsn));
        }
        Ok(self.time_of(lsn))
    }

    pub(super) fn still_to_come(&self, lsn: Lsn) -> ReadError {
        let last = self.lsns().last_record;
        ReadError::BadLsn(format!("{lsn} has not come yet; the timeline is at {last}"))
    }

    /// Writes commit times up to `lsn` to their file, unless they are there. Part of a checkpoint,
    /// before the index.
    pub(super) async fn write_commit_times(&self, lsn: Lsn) -> Result<(), IoError> {
        let (mark, body) = {
            let times = self.history.times.borrow();
            let mark = times.mark(lsn);
            if times.is_empty() || self.history.times_written.get() == Some(mark) {
                return Ok(());
            }
            (mark, times.encode(lsn))
        };
        let path = self.context.dir.join(COMMIT_TIMES_FILE);
        durable::write_file_atomic(&self.context.io, &path, &body).await?;
        self.history.times_written.set(Some(mark));
        Ok(())
    }

    /// Reads commit times and leases; once, before the journal is replayed. Pages do not depend
    /// on them, so a damaged file stops what needs it and nothing else.
    pub(super) async fn load_history(&self) {
        let through = self.lsns().disk_consistent;
        match self.read_history_file(COMMIT_TIMES_FILE).await {
            Ok(None) => {}
            Ok(Some(bytes)) => match CommitTimes::decode(&bytes) {
                Ok(mut times) => {
                    times.truncate(through);
                    *self.history.times.borrow_mut() = times;
                }
                Err(error) => self.commit_times_lost(&error.to_string()),
            },
            Err(problem) => self.commit_times_lost(&problem),
        }
        let leases = match self.read_history_file(LEASES_FILE).await {
            Ok(None) => Ok(Leases::default()),
            Ok(Some(bytes)) => {
                Leases::decode(&bytes).map_err(|error: LeaseError| error.to_string())
            }
            Err(problem) => Err(problem),
        };
        match leases {
            Ok(leases) => *self.history.leases.borrow_mut() = leases,
            Err(problem) => {
                tracing::error!(tenant = %self.tenant, timeline = %self.id, "leases are unknown, nothing is collected: {problem}");
                *self.history.leases_problem.borrow_mut() = Some(problem);
            }
        }
    }

    /// Without old commit times, collection by time waits until enough new ones are old.
    fn commit_times_lost(&self, problem: &str) {
        tracing::error!(tenant = %self.tenant, timeline = %self.id, "commit times before this start are lost: {problem}");
    }

    async fn read_history_file(&self, name: &str) -> Result<Option<Vec<u8>>, String> {
        match durable::read_file(&self.context.io, &self.context.dir.join(name)).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(durable::DurableError::Io(error)) if error.cause == IoCause::NotFound => Ok(None),
            Err(error) => Err(error.to_string()),
        }
    }
}
