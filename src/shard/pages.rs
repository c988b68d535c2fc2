//! Recently rebuilt pages of a core: the next read of the same page begins there instead of at a
//! base that lies far back.
//!
//! A page is kept with the LSNs for which it is right: from that of its newest change to that of
//! the read that rebuilt it. History does not change, so it stays right; a read between the two
//! has its answer, a later one needs only what has come since. There is one entry for each page,
//! that of the newest read.
//!
//! The budget bounds what is held. Pages go in the order in which they came, but one that was used
//! meanwhile goes round once more. Nothing is forgotten when a timeline is closed: its number is
//! never used again, and its pages go with time.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use foldhash::fast::RandomState;

use crate::base::page::PAGE_SIZE;
use crate::base::{Key, Lsn};

/// Memory that a page takes beside its bytes.
const ENTRY_OVERHEAD_BYTES: usize = 192;

/// 8,192 zeros.
pub(super) fn zero_page() -> Bytes {
    static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    Bytes::from_static(&ZEROS)
}

/// Number of an open timeline within its core; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TimelineNumber(u64);

type Name = (TimelineNumber, Key);

/// A page, and the LSNs between which it is the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuiltPage {
    /// LSN of its newest change.
    pub from: Lsn,
    /// Nothing changed it up to here, inclusive.
    pub until: Lsn,
    /// Its bytes.
    pub page: Bytes,
}

#[derive(Debug)]
struct Entry {
    rebuilt: RebuiltPage,
    is_used: bool,
}

#[derive(Debug, Default)]
struct State {
    entries: HashMap<Name, Entry, RandomState>,
    /// All names, in the order in which they go.
    order: VecDeque<Name>,
    held_bytes: usize,
}

/// See the module's text.
#[derive(Debug)]
pub struct PageCache {
    budget_bytes: usize,
    timelines: Cell<u64>,
    state: RefCell<State>,
}

fn cost(rebuilt: &RebuiltPage) -> usize {
    rebuilt.page.len() + ENTRY_OVERHEAD_BYTES
}

impl PageCache {
    /// A cache that holds up to `budget_bytes`. With 0 it holds nothing.
    pub fn new(budget_bytes: usize) -> PageCache {
        PageCache { budget_bytes, timelines: Cell::new(0), state: RefCell::default() }
    }

    /// A number for a timeline that is being opened.
    pub fn next_timeline(&self) -> TimelineNumber {
        let number = self.timelines.get();
        self.timelines.set(number + 1);
        TimelineNumber(number)
    }

    /// The page that a read at `lsn` can begin with, if there is one.
    pub fn get(&self, timeline: TimelineNumber, key: Key, lsn: Lsn) -> Option<RebuiltPage> {
        let state = &mut *self.state.borrow_mut();
        let entry = state.entries.get_mut(&(timeline, key))?;
        if lsn < entry.rebuilt.from {
            return None;
        }
        entry.is_used = true;
        Some(entry.rebuilt.clone())
    }

    /// Takes in a page, unless a newer one is there.
    pub fn put(&self, timeline: TimelineNumber, key: Key, rebuilt: RebuiltPage) {
        let (state, name) = (&mut *self.state.borrow_mut(), (timeline, key));
        let cost_of_new = cost(&rebuilt);
        if cost_of_new > self.budget_bytes {
            return;
        }
        match state.entries.get_mut(&name) {
            Some(entry) if entry.rebuilt.until >= rebuilt.until => return,
            Some(entry) => {
                state.held_bytes = state.held_bytes - cost(&entry.rebuilt) + cost_of_new;
                entry.rebuilt = rebuilt;
            }
            None => {
                state.held_bytes += cost_of_new;
                state.order.push_back(name);
                state.entries.insert(name, Entry { rebuilt, is_used: false });
            }
        }
        while state.held_bytes > self.budget_bytes {
            state.evict();
        }
    }

    /// Memory held, in bytes, with overhead.
    pub fn held_bytes(&self) -> usize {
        self.state.borrow().held_bytes
    }
}

impl State {
    /// Drops a page, or has it go round. Called while over budget, so that there is one.
    fn evict(&mut self) {
        let name = self.order.pop_front().expect("a cache over its budget holds a page");
        let entry = self.entries.get_mut(&name).expect("a page in order is held");
        if std::mem::take(&mut entry.is_used) {
            self.order.push_back(name);
            return;
        }
        self.held_bytes -= cost(&entry.rebuilt);
        self.entries.remove(&name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(block: u32) -> Key {
        Key { field1: 0, field2: 1663, field3: 5, field4: 16384, field5: 0, field6: block }
    }

    fn rebuilt(from: u64, until: u64) -> RebuiltPage {
        let page = Bytes::from(vec![from as u8; 8192]);
        RebuiltPage { from: Lsn(from), until: Lsn(until), page }
    }

    #[test]
    fn the_newest_page_is_kept_and_serves_reads_from_its_change_on() {
        let cache = PageCache::new(1 << 20);
        let (one, two) = (cache.next_timeline(), cache.next_timeline());
        cache.put(one, key(1), rebuilt(10, 20));
        assert_eq!(cache.get(one, key(1), Lsn(9)), None);
        for lsn in [10, 20, 21, 99] {
            assert_eq!(cache.get(one, key(1), Lsn(lsn)), Some(rebuilt(10, 20)));
        }
        assert_eq!(
            (cache.get(one, key(2), Lsn(15)), cache.get(two, key(1), Lsn(15))),
            (None, None)
        );
        cache.put(one, key(1), rebuilt(5, 8));
        assert_eq!(cache.get(one, key(1), Lsn(30)), Some(rebuilt(10, 20)));
        cache.put(one, key(1), rebuilt(25, 30));
        assert_eq!(cache.get(one, key(1), Lsn(30)), Some(rebuilt(25, 30)));
        assert_eq!(cache.held_bytes(), 8192 + ENTRY_OVERHEAD_BYTES);
    }

    #[test]
    fn what_is_used_stays_and_the_budget_holds() {
        let cache = PageCache::new(10 * (8192 + ENTRY_OVERHEAD_BYTES));
        let timeline = cache.next_timeline();
        for block in 0..1000 {
            cache.put(timeline, key(block), rebuilt(1, 1));
            assert!(cache.get(timeline, key(0), Lsn(1)).is_some(), "{block}");
            let state = cache.state.borrow();
            assert!(state.entries.len() <= 10 && state.entries.len() == state.order.len());
            let held: usize = state.entries.values().map(|entry| cost(&entry.rebuilt)).sum();
            assert_eq!(held, state.held_bytes);
        }
        assert_eq!(cache.state.borrow().entries.len(), 10);
        let nothing = PageCache::new(0);
        nothing.put(timeline, key(0), rebuilt(1, 1));
        assert_eq!((nothing.get(timeline, key(0), Lsn(1)), nothing.held_bytes()), (None, 0));
    }
}
