//! The cache of verified, decompressed blocks of one executor.
//!
//! The algorithm is S3-FIFO: three queues in place of one.
//!
//! 1. A block that was never seen enters the *small* queue, a tenth of the budget. At its end it
//!    goes to the main queue if it was hit meanwhile; otherwise it is dropped, and only its
//!    name is remembered in the *ghost* queue.
//! 2. A block whose name is in the ghost queue enters the *main* queue at once.
//! 3. At the end of the main queue, a block that was hit goes round once more for each hit, up to
//!    three; otherwise it is dropped.
//!
//! So a scan over many blocks that are read once flows through the small queue and leaves the
//! main queue alone. A hit only counts up a number: no list is reordered.
//!
//! The budget bounds what the cache holds. Values that a reader still has keep the block that they
//! are part of alive beyond that.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;
use foldhash::fast::RandomState;

/// Hits beyond this number are not counted.
const HITS_MAX: u8 = 3;
/// The small queue gets one part in this many of the budget.
const SMALL_PART: usize = 10;
/// Memory that a block takes beside its bytes.
const ENTRY_OVERHEAD_BYTES: usize = 128;
/// Names that the ghost queue keeps for each block in the cache, and at least this many in all.
const GHOSTS_MIN: usize = 64;

/// Number of an open layer file within its cache; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerNumber(u64);

type Name = (LayerNumber, u32);

/// Counters of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockCacheStats {
    /// Lookups that found their block.
    pub hits: u64,
    /// Lookups that did not.
    pub misses: u64,
    /// Memory held, in bytes, with overhead.
    pub held_bytes: usize,
    /// Number of blocks held.
    pub block_count: usize,
}

/// Blocks by layer and number within it.
#[derive(Debug)]
pub struct BlockCache {
    state: RefCell<State>,
    layers: Cell<u64>,
}

#[derive(Debug)]
struct Block {
    bytes: Bytes,
    hits: u8,
    in_main: bool,
}

#[derive(Debug, Default)]
struct State {
    budget_bytes: usize,
    blocks: HashMap<Name, Block, RandomState>,
    small: VecDeque<Name>,
    main: VecDeque<Name>,
    ghosts: VecDeque<Name>,
    ghost_names: HashSet<Name, RandomState>,
    small_bytes: usize,
    main_bytes: usize,
    hits: u64,
    misses: u64,
}

fn cost(bytes: &Bytes) -> usize {
    bytes.len() + ENTRY_OVERHEAD_BYTES
}

impl BlockCache {
    /// A cache that holds up to `budget_bytes`. With 0 it holds nothing.
    pub fn new(budget_bytes: usize) -> BlockCache {
        let state = State { budget_bytes, ..State::default() };
        BlockCache { state: RefCell::new(state), layers: Cell::new(0) }
    }

    /// A number for a layer that is being opened.
    pub(super) fn next_layer(&self) -> LayerNumber {
        let number = self.layers.get();
        self.layers.set(number + 1);
        LayerNumber(number)
    }

    /// The block, if it is held.
    pub(super) fn get(&self, layer: LayerNumber, block: u32) -> Option<Bytes> {
        let found = self.held(layer, block);
        if found.is_none() {
            self.state.borrow_mut().misses += 1;
        }
        found
    }

    /// The same for who comes again by [`Self::get`] if it is not held: that counts the miss.
    pub(super) fn held(&self, layer: LayerNumber, block: u32) -> Option<Bytes> {
        let state = &mut *self.state.borrow_mut();
        let found = state.blocks.get_mut(&(layer, block))?;
        found.hits = (found.hits + 1).min(HITS_MAX);
        state.hits += 1;
        Some(found.bytes.clone())
    }

    /// Takes in a block. One that is larger than the small queue's part of the budget is not kept:
    /// it would push out too much.
    pub(super) fn insert(&self, layer: LayerNumber, block: u32, bytes: Bytes) {
        self.state.borrow_mut().insert((layer, block), bytes);
    }

    /// Drops what is held of a layer, when it is closed.
    pub(super) fn forget(&self, layer: LayerNumber) {
        self.state.borrow_mut().forget(layer);
    }

    /// Counters.
    pub fn stats(&self) -> BlockCacheStats {
        let state = self.state.borrow();
        BlockCacheStats {
            hits: state.hits,
            misses: state.misses,
            held_bytes: state.small_bytes + state.main_bytes,
            block_count: state.blocks.len(),
        }
    }
}

impl State {
    fn insert(&mut self, name: Name, bytes: Bytes) {
        let cost = cost(&bytes);
        if cost > self.budget_bytes / SMALL_PART || self.blocks.contains_key(&name) {
            return;
        }
        let in_main = self.ghost_names.remove(&name);
        if in_main {
            self.main.push_back(name);
            self.main_bytes += cost;
        } else {
            self.small.push_back(name);
            self.small_bytes += cost;
        }
        self.blocks.insert(name, Block { bytes, hits: 0, in_main });
        while self.small_bytes + self.main_bytes > self.budget_bytes {
            self.evict();
        }
    }

    /// Drops or moves one block. Called while over budget, so that a queue has something in it.
    fn evict(&mut self) {
        let from_small = self.small_bytes > self.budget_bytes / SMALL_PART || self.main.is_empty();
        let queue = if from_small { &mut self.small } else { &mut self.main };
        let name = queue.pop_front().expect("a cache over its budget holds a block");
        let block = self.blocks.get_mut(&name).expect("a queued block is held");
        assert_eq!(block.in_main, !from_small);
        let cost = cost(&block.bytes);
        if from_small {
            self.small_bytes -= cost;
            if block.hits > 0 {
                *block = Block { bytes: block.bytes.clone(), hits: 0, in_main: true };
                self.main.push_back(name);
                self.main_bytes += cost;
            } else {
                self.blocks.remove(&name);
                self.remember(name);
            }
        } else if block.hits > 0 {
            block.hits -= 1;
            self.main.push_back(name);
        } else {
            self.blocks.remove(&name);
            self.main_bytes -= cost;
        }
    }

    fn remember(&mut self, name: Name) {
        if self.ghost_names.insert(name) {
            self.ghosts.push_back(name);
        }
        while self.ghosts.len() > self.blocks.len().max(GHOSTS_MIN) {
            let oldest = self.ghosts.pop_front().expect("the queue is longer than its bound");
            self.ghost_names.remove(&oldest);
        }
    }

    fn forget(&mut self, layer: LayerNumber) {
        let State { blocks, small_bytes, main_bytes, .. } = self;
        blocks.retain(|(of, _), block| {
            if *of == layer {
                let total = if block.in_main { &mut *main_bytes } else { &mut *small_bytes };
                *total -= cost(&block.bytes);
            }
            *of != layer
        });
        self.small.retain(|(of, _)| *of != layer);
        self.main.retain(|(of, _)| *of != layer);
        self.ghosts.retain(|(of, _)| *of != layer);
        self.ghost_names.retain(|(of, _)| *of != layer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCK: usize = 1000 - ENTRY_OVERHEAD_BYTES;

    fn block(n: u32) -> Bytes {
        let mut bytes = vec![0; BLOCK];
        bytes[..4].copy_from_slice(&n.to_le_bytes());
        bytes.into()
    }

    /// Reads a block as a reader does; true if it was there.
    fn touch(cache: &BlockCache, layer: LayerNumber, n: u32) -> bool {
        match cache.get(layer, n) {
            Some(bytes) => {
                assert_eq!(bytes, block(n));
                true
            }
            None => {
                cache.insert(layer, n, block(n));
                false
            }
        }
    }

    #[test]
    fn a_scan_leaves_the_working_set_alone() {
        let cache = BlockCache::new(100_000);
        let layer = cache.next_layer();
        for _ in 0..3 {
            for n in 0..50 {
                touch(&cache, layer, n);
            }
        }
        for n in 1000..11_000 {
            touch(&cache, layer, n);
        }
        let kept = (0..50).filter(|n| cache.get(layer, *n).is_some()).count();
        assert_eq!(kept, 50);
    }

    #[test]
    fn a_block_that_comes_back_soon_is_kept() {
        let cache = BlockCache::new(20_000);
        let layer = cache.next_layer();
        assert!(!touch(&cache, layer, 0));
        for n in 1..40 {
            touch(&cache, layer, n);
        }
        assert!(!touch(&cache, layer, 0), "block 0 was dropped, its name is remembered");
        for n in 100..1000 {
            touch(&cache, layer, n);
        }
        assert!(touch(&cache, layer, 0), "it came back into the main queue");
    }

    #[test]
    fn a_closed_layer_leaves_nothing() {
        let cache = BlockCache::new(20_000);
        let (one, two) = (cache.next_layer(), cache.next_layer());
        for n in 0..100 {
            touch(&cache, one, n % 30);
            touch(&cache, two, n % 7);
        }
        cache.forget(one);
        cache.forget(two);
        let stats = cache.stats();
        assert_eq!((stats.held_bytes, stats.block_count), (0, 0));
        assert!(!touch(&cache, one, 0));
    }

    #[test]
    fn a_huge_block_and_a_cache_without_budget_hold_nothing() {
        let cache = BlockCache::new(10_000);
        let layer = cache.next_layer();
        cache.insert(layer, 0, vec![0; 2000].into());
        assert!(cache.get(layer, 0).is_none());
        let cache = BlockCache::new(0);
        cache.insert(layer, 0, Bytes::new());
        assert!(cache.get(layer, 0).is_none());
    }

    proptest! {
        #[test]
        fn books_balance(
            budget in 0usize..60_000,
            steps in prop::collection::vec((0u8..20, 0u32..80), 0..600),
        ) {
            let cache = BlockCache::new(budget);
            let layers = [cache.next_layer(), cache.next_layer()];
            for (action, n) in steps {
                let layer = layers[(n % 2) as usize];
                if action == 0 {
                    cache.forget(layer);
                } else {
                    touch(&cache, layer, n);
                }
                let state = cache.state.borrow();
                let held: usize = state.blocks.values().map(|block| cost(&block.bytes)).sum();
                prop_assert_eq!(held, state.small_bytes + state.main_bytes);
                prop_assert!(held <= budget);
                prop_assert_eq!(state.blocks.len(), state.small.len() + state.main.len());
                prop_assert!(state.ghosts.len() <= 80.max(GHOSTS_MIN));
            }
        }
    }
}
