//! The LSN milestones of a timeline, and waiting for them.
//!
//! ```text
//! received >= last_record >= disk_consistent >= remote_consistent
//! received >= journal     >= disk_consistent
//! ```
//!
//! All of them only grow. The one setter, [`Lsns::advance`], asserts both rules.

use std::cell::RefCell;
use std::collections::BTreeMap;

use futures_channel::oneshot;

use crate::base::Lsn;

/// The milestones; see the module's picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lsns {
    /// End of the WAL bytes taken in.
    pub received: Lsn,
    /// End of the last record ingested: readable up to here.
    pub last_record: Lsn,
    /// End of the raw WAL on disk, synced.
    pub journal: Lsn,
    /// Everything up to here is in synced layer files.
    pub disk_consistent: Lsn,
    /// Everything up to here is in object storage.
    pub remote_consistent: Lsn,
}

/// News about one milestone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advance {
    /// Bytes came in.
    Received(Lsn),
    /// A record was ingested.
    LastRecord(Lsn),
    /// The journal was synced.
    Journal(Lsn),
    /// A checkpoint ended.
    DiskConsistent(Lsn),
}

impl Lsns {
    /// All milestones at one point: an import, or a start.
    pub fn at(lsn: Lsn) -> Self {
        Lsns {
            received: lsn,
            last_record: lsn,
            journal: lsn,
            disk_consistent: lsn,
            remote_consistent: Lsn::INVALID,
        }
    }

    /// Moves one milestone. The journal may hold bytes of a record that is not whole, so neither
    /// of `journal` and `last_record` bounds the other.
    pub fn advance(&mut self, news: Advance) {
        let before = *self;
        match news {
            Advance::Received(lsn) => self.received = lsn,
            Advance::LastRecord(lsn) => self.last_record = lsn,
            Advance::Journal(lsn) => self.journal = lsn,
            Advance::DiskConsistent(lsn) => self.disk_consistent = lsn,
        }
        assert!(self.received >= before.received, "{news:?} on {before:?}");
        assert!(self.last_record >= before.last_record, "{news:?} on {before:?}");
        assert!(self.journal >= before.journal, "{news:?} on {before:?}");
        assert!(self.disk_consistent >= before.disk_consistent, "{news:?} on {before:?}");
        assert!(self.received >= self.last_record, "{news:?} on {before:?}");
        assert!(self.received >= self.journal, "{news:?} on {before:?}");
        assert!(self.last_record >= self.disk_consistent, "{news:?} on {before:?}");
        assert!(self.journal >= self.disk_consistent, "{news:?} on {before:?}");
    }
}

/// Tasks that wait until a milestone reaches an LSN.
#[derive(Default)]
pub struct LsnWaiters {
    waiting: RefCell<BTreeMap<(Lsn, u64), oneshot::Sender<()>>>,
    next: std::cell::Cell<u64>,
}

impl LsnWaiters {
    /// A receiver that is told when the milestone reaches `lsn`; cancelled at [`Self::fail_all`].
    pub fn register(&self, lsn: Lsn) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        let number = self.next.get();
        self.next.set(number + 1);
        let mut waiting = self.waiting.borrow_mut();
        // Those who gave up are dropped here, so that time-outs leave nothing behind.
        if number.is_multiple_of(64) {
            waiting.retain(|_, sender| !sender.is_canceled());
        }
        waiting.insert((lsn, number), sender);
        receiver
    }

    /// Wakes all who wait for `lsn` or less.
    pub fn wake(&self, lsn: Lsn) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.first_key_value().is_none_or(|((first, _), _)| *first > lsn) {
            return;
        }
        let later = waiting.split_off(&(Lsn(lsn.0.saturating_add(1)), 0));
        for sender in std::mem::replace(&mut *waiting, later).into_values() {
            // A receiver that gave up needs no news.
            let _ = sender.send(());
        }
    }

    /// Sends everybody away: the milestone will not move any more.
    pub fn fail_all(&self) {
        self.waiting.borrow_mut().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milestones_move_in_order() {
        let mut lsns = Lsns::at(Lsn(100));
        lsns.advance(Advance::Received(Lsn(200)));
        lsns.advance(Advance::LastRecord(Lsn(180)));
        lsns.advance(Advance::Journal(Lsn(200)));
        lsns.advance(Advance::DiskConsistent(Lsn(150)));
        assert_eq!((lsns.last_record, lsns.disk_consistent), (Lsn(180), Lsn(150)));
    }

    #[test]
    #[should_panic(expected = "DiskConsistent")]
    fn nothing_is_durable_before_its_journal() {
        let mut lsns = Lsns::at(Lsn(100));
        lsns.advance(Advance::Received(Lsn(200)));
        lsns.advance(Advance::LastRecord(Lsn(200)));
        lsns.advance(Advance::DiskConsistent(Lsn(150)));
    }

    #[test]
    fn waiters_wake_at_their_lsn_and_not_before() {
        let waiters = LsnWaiters::default();
        let mut early = waiters.register(Lsn(10));
        let mut late = waiters.register(Lsn(11));
        waiters.wake(Lsn(9));
        assert_eq!(early.try_recv(), Ok(None));
        waiters.wake(Lsn(10));
        assert_eq!(early.try_recv(), Ok(Some(())));
        assert_eq!(late.try_recv(), Ok(None));
        waiters.fail_all();
        assert!(late.try_recv().is_err());
    }
}
