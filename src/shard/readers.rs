//! The open layer files of a core: how many there are, and how much memory their indexes and
//! filters take. Both are bounded, because a core may have any number of layers and reads open
//! one after the other. When one more is opened and a bound is passed, those go that were not
//! used for the longest time, down to some way below the bound, so that the look at all of them
//! is rare. One that a read has in hand is left alone: it goes with a later look.
//!
//! Closing takes time, and nobody waits for it.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use crate::io::{Io, TaskClass};
use crate::layers::FileLayer;
use crate::limits::{LAYER_READERS_BYTES_MAX, LAYER_READERS_KEPT_OF_8};

/// Places without an open file that are remembered before they are sorted out.
const SLOTS_EMPTY_MAX: usize = 256;

/// The place for the open file of one layer.
pub(super) struct Slot<I: Io> {
    reader: RefCell<Option<Rc<FileLayer<I>>>>,
    bytes: Cell<usize>,
    /// [`Readers::clock`] when it was used last.
    used: Cell<u64>,
}

impl<I: Io> Default for Slot<I> {
    fn default() -> Self {
        Slot { reader: RefCell::new(None), bytes: Cell::new(0), used: Cell::new(0) }
    }
}

/// See the module's text.
pub struct Readers<I: Io> {
    /// Those that had a reader when somebody looked last, or have been given one since.
    slots: RefCell<Vec<Weak<Slot<I>>>>,
    count: Cell<usize>,
    bytes: Cell<usize>,
    opened: Cell<u64>,
    clock: Cell<u64>,
    count_max: Cell<usize>,
    bytes_max: Cell<usize>,
}

impl<I: Io> Readers<I> {
    /// None yet, and at most `count_max` of them.
    pub fn new(count_max: usize) -> Self {
        Readers {
            slots: RefCell::default(),
            count: Cell::new(0),
            bytes: Cell::new(0),
            opened: Cell::new(0),
            clock: Cell::new(0),
            count_max: Cell::new(count_max),
            bytes_max: Cell::new(LAYER_READERS_BYTES_MAX),
        }
    }

    /// Layer files that are open.
    pub fn count(&self) -> usize {
        self.count.get()
    }

    /// Memory of their indexes and filters, in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.get()
    }

    /// Times that a layer file was opened.
    pub fn opened(&self) -> u64 {
        self.opened.get()
    }

    /// Other bounds than those of the program.
    #[cfg(test)]
    pub(crate) fn set_bounds(&self, count_max: usize, bytes_max: usize) {
        self.count_max.set(count_max);
        self.bytes_max.set(bytes_max);
    }

    /// The open file of this place, if there is one; it is used now.
    pub(super) fn get(&self, slot: &Slot<I>) -> Option<Rc<FileLayer<I>>> {
        let reader = slot.reader.borrow().clone()?;
        self.touch(slot);
        Some(reader)
    }

    /// Asks the open file of this place, if there is one; it is used now.
    pub(super) fn ask<T>(
        &self,
        slot: &Slot<I>,
        ask: impl FnOnce(&FileLayer<I>) -> Option<T>,
    ) -> Option<T> {
        let reader = slot.reader.borrow();
        let found = ask(reader.as_ref()?)?;
        self.touch(slot);
        Some(found)
    }

    fn touch(&self, slot: &Slot<I>) {
        let now = self.clock.get().wrapping_add(1);
        self.clock.set(now);
        slot.used.set(now);
    }

    /// Puts an open file into its place, which has none, and closes others if need be.
    pub(super) fn put(&self, slot: &Rc<Slot<I>>, reader: FileLayer<I>, io: &I) -> Rc<FileLayer<I>> {
        slot.bytes.set(reader.memory_bytes());
        let reader = Rc::new(reader);
        let before = slot.reader.replace(Some(reader.clone()));
        assert!(before.is_none(), "a layer file is opened once");
        self.count.set(self.count.get() + 1);
        self.opened.set(self.opened.get() + 1);
        self.bytes.set(self.bytes.get() + slot.bytes.get());
        self.slots.borrow_mut().push(Rc::downgrade(slot));
        self.touch(slot);
        if self.slots.borrow().len() > 2 * self.count.get() + SLOTS_EMPTY_MAX {
            self.open_slots();
        }
        let surplus = self.surplus();
        if !surplus.is_empty() {
            io.spawn(TaskClass::Background, async move {
                for reader in surplus {
                    if let Err(error) = reader.close().await {
                        tracing::warn!("a layer file that is not used any more: {error}");
                    }
                }
            });
        }
        reader
    }

    /// Takes the open file out of its place.
    pub(super) fn take(&self, slot: &Slot<I>) -> Option<Rc<FileLayer<I>>> {
        let reader = slot.reader.take()?;
        self.count.set(self.count.get().saturating_sub(1));
        self.bytes.set(self.bytes.get().saturating_sub(slot.bytes.get()));
        Some(reader)
    }

    /// The places that have an open file, the one that was used last at the end. Others are
    /// forgotten.
    fn open_slots(&self) -> Vec<Rc<Slot<I>>> {
        let mut open: Vec<Rc<Slot<I>>> =
            self.slots.borrow().iter().filter_map(Weak::upgrade).collect();
        open.retain(|slot| slot.reader.borrow().is_some());
        open.sort_unstable_by_key(|slot| slot.used.get());
        // A place that was emptied and filled again is there twice.
        open.dedup_by_key(|slot| slot.used.get());
        *self.slots.borrow_mut() = open.iter().map(Rc::downgrade).collect();
        open
    }

    /// If a bound is passed: the files that were not used for the longest time.
    fn surplus(&self) -> Vec<FileLayer<I>> {
        if self.count.get() <= self.count_max.get() && self.bytes.get() <= self.bytes_max.get() {
            return Vec::new();
        }
        let open = self.open_slots();
        let kept = |max: usize| max / 8 * LAYER_READERS_KEPT_OF_8 + max % 8;
        let (count, bytes) = (kept(self.count_max.get()), kept(self.bytes_max.get()));
        let mut surplus = Vec::new();
        for slot in open {
            if self.count.get() <= count && self.bytes.get() <= bytes {
                break;
            }
            let is_idle =
                slot.reader.borrow().as_ref().is_some_and(|one| Rc::strong_count(one) == 1);
            if is_idle {
                surplus.extend(self.take(&slot).and_then(Rc::into_inner));
            }
        }
        surplus
    }
}
