//! Memory of a core's open and frozen layers, over all of its timelines. Pure.
//!
//! Every timeline has a [`Share`] and keeps it up to date. When all shares together exceed the
//! budget, the largest open layer is asked to become a file; and the next largest, until what
//! nobody has asked for yet fits. Above the budget ingest slows, whoever it is for, and far above it
//! stops ([`super::plan::pressure`]): files cannot be made as fast as WAL comes in.
//!
//! What the budget has left is for [`Resident`] layers: those that are in L0 files already, but
//! were not merged yet. Reads find there what they would have to read files for. They are the
//! first to go, the oldest before the others, and are no reason for anything to slow.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use crate::layers::FrozenLayer;

#[cfg(test)]
thread_local! {
    /// For tests that want L0 layers to be read from their files.
    pub(crate) static NO_RESIDENTS: Cell<bool> = const { Cell::new(false) };
}

/// See the module's text.
#[derive(Debug)]
pub struct MemoryBudget {
    limit_bytes: u64,
    open_bytes: Cell<u64>,
    frozen_bytes: Cell<u64>,
    shares: RefCell<Vec<Weak<Account>>>,
    resident_bytes: Cell<u64>,
    /// Oldest first.
    residents: RefCell<VecDeque<Weak<Resident>>>,
}

/// A layer that has become a file, in memory too as long as there is room.
#[derive(Debug)]
pub struct Resident {
    budget: Rc<MemoryBudget>,
    bytes: u64,
    layer: RefCell<Option<Arc<FrozenLayer>>>,
}

#[derive(Debug)]
struct Account {
    open: Cell<u64>,
    frozen: Cell<u64>,
    /// The open layer is to be frozen; wakes the task that does it.
    asked: Cell<bool>,
    wake: async_channel::Sender<()>,
}

/// One timeline's part.
#[derive(Debug)]
pub struct Share {
    budget: Rc<MemoryBudget>,
    account: Rc<Account>,
}

impl MemoryBudget {
    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: u64) -> Rc<MemoryBudget> {
        Rc::new(MemoryBudget {
            limit_bytes,
            open_bytes: Cell::new(0),
            frozen_bytes: Cell::new(0),
            shares: RefCell::default(),
            resident_bytes: Cell::new(0),
            residents: RefCell::default(),
        })
    }

    /// Keeps a layer as long as there is room; [`MemoryBudget::evict`] follows.
    pub fn keep(self: &Rc<Self>, layer: Arc<FrozenLayer>) -> Rc<Resident> {
        let bytes = layer.memory_bytes() as u64;
        self.resident_bytes.set(self.resident_bytes.get() + bytes);
        let layer = RefCell::new(Some(layer));
        let resident = Rc::new(Resident { budget: self.clone(), bytes, layer });
        let mut residents = self.residents.borrow_mut();
        // Those that were merged stand among the others, and there may be room for all of them.
        residents.retain(|one| one.upgrade().is_some_and(|one| one.is_there()));
        residents.push_back(Rc::downgrade(&resident));
        drop(residents);
        #[cfg(test)]
        if NO_RESIDENTS.get() {
            resident.take();
        }
        resident
    }

    /// Takes out the resident layers for which there is no room any more. Whoever calls lets go of
    /// them where that holds up nobody: they are large.
    pub fn evict(&self) -> Vec<Arc<FrozenLayer>> {
        let mut evicted = Vec::new();
        while self.used_bytes() + self.resident_bytes.get() > self.limit_bytes {
            let Some(oldest) = self.residents.borrow_mut().pop_front() else { break };
            evicted.extend(oldest.upgrade().and_then(|oldest| oldest.take()));
        }
        evicted
    }

    /// Bytes of all resident layers.
    pub fn resident_bytes(&self) -> u64 {
        self.resident_bytes.get()
    }

    /// A part for one more timeline. `wake` gets a message when its layer should be frozen; a
    /// full channel counts as told.
    pub fn share(self: &Rc<Self>, wake: async_channel::Sender<()>) -> Share {
        let (open, frozen, asked) = Default::default();
        let account = Rc::new(Account { open, frozen, asked, wake });
        let mut shares = self.shares.borrow_mut();
        shares.retain(|share| share.strong_count() > 0);
        shares.push(Rc::downgrade(&account));
        drop(shares);
        Share { budget: self.clone(), account }
    }

    /// Bytes of all open and frozen layers.
    pub fn used_bytes(&self) -> u64 {
        self.open_bytes.get() + self.frozen_bytes.get()
    }

    /// The same in percent of the budget, rounded up.
    pub fn used_percent(&self) -> u64 {
        let used = u128::from(self.used_bytes()) * 100;
        u64::try_from(used.div_ceil(u128::from(self.limit_bytes.max(1)))).unwrap_or(u64::MAX)
    }

    /// Asks for the largest open layers, as many as it takes. Half of the budget is for layers
    /// that are being written: one after the other they would all be small otherwise.
    fn ask(&self) {
        if self.used_bytes() <= self.limit_bytes {
            return;
        }
        let accounts: Vec<_> = self.shares.borrow().iter().filter_map(Weak::upgrade).collect();
        let asked = accounts.iter().filter(|one| one.asked.get());
        let mut rest = self.open_bytes.get() - asked.map(|one| one.open.get()).sum::<u64>();
        let mut others: Vec<_> = accounts.iter().filter(|one| !one.asked.get()).collect();
        others.sort_by_key(|one| std::cmp::Reverse(one.open.get()));
        for account in others {
            if rest <= self.limit_bytes / 2 || account.open.get() == 0 {
                break;
            }
            rest -= account.open.get();
            account.asked.set(true);
            // Full: it will look anyway.
            let _ = account.wake.try_send(());
        }
    }
}

impl Resident {
    /// The layer, if it is still in memory.
    pub fn layer(&self) -> Option<Arc<FrozenLayer>> {
        self.layer.borrow().clone()
    }

    fn is_there(&self) -> bool {
        self.layer.borrow().is_some()
    }

    /// Gives up the place in memory.
    pub fn take(&self) -> Option<Arc<FrozenLayer>> {
        let layer = self.layer.take();
        if layer.is_some() {
            let total = &self.budget.resident_bytes;
            total.set(total.get() - self.bytes);
        }
        layer
    }
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.take();
    }
}

impl Share {
    /// Says how much the timeline's layers take, in bytes.
    pub fn set(&self, open: u64, frozen: u64) {
        let total = &self.budget.open_bytes;
        total.set(total.get() - self.account.open.replace(open) + open);
        let total = &self.budget.frozen_bytes;
        total.set(total.get() - self.account.frozen.replace(frozen) + frozen);
        self.budget.ask();
    }

    /// The open layer should be frozen.
    pub fn is_asked(&self) -> bool {
        self.account.asked.get()
    }

    /// The open layer was frozen.
    pub fn done(&self) {
        self.account.asked.set(false);
    }

    /// All layers of the core fit into the budget.
    pub fn is_within_budget(&self) -> bool {
        self.budget.used_bytes() <= self.budget.limit_bytes
    }

    /// What all layers of the core take, in percent of the budget.
    pub fn used_percent(&self) -> u64 {
        self.budget.used_percent()
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0, 0);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::base::{Key, Lsn, Value};
    use crate::layers::OpenLayer;

    fn share(budget: &Rc<MemoryBudget>) -> (Share, async_channel::Receiver<()>) {
        let (wake, woken) = async_channel::bounded(1);
        (budget.share(wake), woken)
    }

    #[test]
    fn the_largest_goes_first_and_only_as_many_as_needed() {
        let budget = MemoryBudget::new(100);
        let shares: Vec<_> = (0..4).map(|_| share(&budget)).collect();
        for ((one, _), bytes) in shares.iter().zip([10, 60, 20, 10]) {
            one.set(bytes, 0);
        }
        let asked = || shares.iter().map(|(one, _)| one.is_asked()).collect::<Vec<_>>();
        assert_eq!(asked(), [false; 4]);
        shares[0].0.set(15, 0);
        assert_eq!(asked(), [false, true, false, false]);
        assert!(shares[1].1.try_recv().is_ok());
        // Frozen and on its way out: the others fit.
        shares[1].0.done();
        shares[1].0.set(0, 60);
        assert_eq!(asked(), [false; 4]);
        shares[2].0.set(30, 0);
        assert_eq!(asked(), [false, false, true, false]);
        assert_eq!(budget.used_bytes(), 15 + 60 + 30 + 10);
    }

    fn layer(values: u32) -> Arc<FrozenLayer> {
        let mut open = OpenLayer::new(Lsn(1), 1 << 24);
        for number in 0..values {
            let key = Key { field6: number, ..Key::MIN };
            open.put(key, Lsn(5), Value::Image(Bytes::from(vec![7; 1000])));
        }
        open.freeze(Lsn(10))
    }

    #[test]
    fn resident_layers_have_what_is_left_and_the_oldest_go_first() {
        let one_layer = layer(10).memory_bytes() as u64;
        let budget = MemoryBudget::new(3 * one_layer + 10);
        let (share, _woken) = share(&budget);
        let mut kept: Vec<_> = (0..3).map(|_| budget.keep(layer(10))).collect();
        assert!(budget.evict().is_empty());
        let there = |kept: &[Rc<Resident>]| kept.iter().map(|r| r.is_there()).collect::<Vec<_>>();
        // They do not count against what is not in files yet.
        assert!(share.is_within_budget() && share.used_percent() == 0);
        share.set(11, 0);
        assert_eq!(budget.evict().len(), 1);
        assert_eq!(there(&kept), [false, true, true]);
        kept.push(budget.keep(layer(10)));
        assert_eq!(budget.evict().len(), 1);
        assert_eq!(there(&kept), [false, false, true, true]);
        // One that was merged gives back its room, in the middle too.
        drop(kept.remove(2));
        assert_eq!(budget.resident_bytes(), one_layer);
        assert!(kept.last().unwrap().layer().is_some_and(|layer| layer.value_count() == 10));
        share.set(11, 3 * one_layer);
        assert_eq!(budget.evict().len(), 1);
        assert!(budget.evict().is_empty());
        assert_eq!((budget.resident_bytes(), budget.residents.borrow().len()), (0, 0));
        assert!(!share.is_within_budget());
    }

    #[test]
    fn all_shares_count_and_one_that_goes_gives_back() {
        let budget = MemoryBudget::new(100);
        let (one, _woken) = share(&budget);
        let (two, _woken) = share(&budget);
        one.set(40, 60);
        assert_eq!(two.used_percent(), 100);
        two.set(0, 101);
        assert_eq!(one.used_percent(), 201);
        drop(two);
        assert_eq!(one.used_percent(), 100);
        assert_eq!(budget.used_bytes(), 100);
        assert_eq!(budget.shares.borrow().iter().filter(|one| one.strong_count() > 0).count(), 1);
    }
}
