//! New layers are opened and read before they take the place of others.
//!
//! What compaction replaces is in the block cache where it is read often, and what it makes is not.
//! Without more, every such page would wait for the device once after each merge, just while that is
//! busy with compaction. So the core remembers which pages were asked for last, and reads the new
//! layers there before the layer map has them. No read waits for that, only the next step of
//! compaction. Leaper (Yang et al., VLDB 2020) does the same with a prediction in place of a memory.

use std::cell::RefCell;
use std::hash::BuildHasher;
use std::rc::Rc;
use std::time::Duration;

use foldhash::fast::FixedState;
use futures_util::stream::{self, StreamExt};

use super::layer_map::LayerSpan;
use super::pages::TimelineNumber;
use super::stored::StoredLayer;
use super::timeline::Timeline;
use crate::base::{Key, Lsn};
use crate::io::Io;
use crate::layers::{FileLayer, LayerDesc, LayerError, LayerOwner};
use crate::limits::{
    LAYER_WARM_UP_CONCURRENT, LAYER_WARM_UP_MAX, LAYER_WARM_UP_MIN, LAYER_WARM_UP_SHARE,
    RECENT_PAGES,
};

type Page = (TimelineNumber, Key);

/// The pages of a core that were asked for last: one for each of [`RECENT_PAGES`] hashes.
#[derive(Default)]
pub struct RecentPages {
    /// Empty before the first page.
    slots: RefCell<Vec<Option<Page>>>,
}

impl RecentPages {
    /// The page was asked for.
    pub(super) fn note(&self, timeline: TimelineNumber, key: Key) {
        let mut slots = self.slots.borrow_mut();
        if slots.is_empty() {
            slots.resize(RECENT_PAGES, None);
        }
        let place = FixedState::default().hash_one((timeline, key)) % RECENT_PAGES as u64;
        if let Some(slot) = slots.get_mut(place as usize) {
            *slot = Some((timeline, key));
        }
    }

    /// Those of one timeline, in order.
    fn of(&self, timeline: TimelineNumber) -> Vec<Key> {
        let slots = self.slots.borrow();
        let own = slots.iter().flatten().filter(|(of, _)| *of == timeline);
        let mut keys: Vec<Key> = own.map(|(_, key)| *key).collect();
        keys.sort_unstable();
        keys
    }
}

impl<I: Io> Timeline<I> {
    /// Layer files of this timeline, in the cache where pages were asked for lately, unless it is
    /// stopping. Those without such pages are not opened. Takes a share of the time that it took
    /// to make them: compaction shall get its work done.
    pub(super) async fn warmed_up(
        &self,
        files: &[LayerDesc],
        took: Duration,
    ) -> Vec<(LayerSpan, Rc<StoredLayer<I>>)> {
        let owner = LayerOwner { shard: self.tenant, timeline: self.id };
        let mut layers = Vec::with_capacity(files.len());
        let recent = self.context.recent.of(self.number);
        let end = self.context.io.now()
            + (took / LAYER_WARM_UP_SHARE).clamp(LAYER_WARM_UP_MIN, LAYER_WARM_UP_MAX);
        for desc in files {
            let name = desc.name.clone();
            let layer = StoredLayer::new(&self.context, name, desc.file_bytes, owner);
            let span = layer.span();
            let first = recent.partition_point(|key| *key < span.keys.start);
            let last = recent.partition_point(|key| *key < span.keys.end);
            let keys = recent.get(first..last).unwrap_or_default();
            let is_over = || self.context.io.now() >= end || self.compaction.has_ended();
            layer.warm_up(keys, &self.context.io, is_over).await;
            layers.push((span, layer));
        }
        layers
    }
}

impl<I: Io> StoredLayer<I> {
    /// Brings what these pages need of this layer into the cache, until it is over or there is an
    /// error: reads try again, and are told what is wrong.
    async fn warm_up(self: &Rc<Self>, keys: &[Key], io: &I, is_over: impl Fn() -> bool) {
        if keys.is_empty() || is_over() {
            return;
        }
        let Ok(reader) = self.reader().await else { return };
        let (mut last, reader, is_over) = (None, &reader, &is_over);
        let is_new = |key: &&Key| {
            let block = reader.block_of(**key);
            block.is_none() || std::mem::replace(&mut last, block) != block
        };
        let reads = stream::iter(keys.iter().filter(is_new)).map(|key| async move {
            io.yield_if_needed().await;
            !is_over() && read_twice(reader, *key).await.is_ok()
        });
        let mut reads = reads.buffered(LAYER_WARM_UP_CONCURRENT);
        while reads.next().await == Some(true) {}
    }
}

/// Brings what the newest version of a page needs of a layer into the cache, to stay there: a block
/// that is used once is the first that the cache drops.
async fn read_twice<I: Io>(reader: &FileLayer<I>, key: Key) -> Result<(), LayerError> {
    for _ in 0..2 {
        reader.collect(key, &(Lsn(0)..Lsn::MAX), &mut Vec::new()).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::RelNode;
    use crate::shard::pages::PageCache;

    #[test]
    fn the_last_pages_of_each_timeline_are_remembered() {
        let pages = RecentPages::default();
        let key = |block| Key::rel_block(RelNode { spc: 1, db: 2, rel: 3 }.fork(0), block);
        let numbers = PageCache::new(0);
        let [one, other] = [numbers.next_timeline(), numbers.next_timeline()];
        assert!(pages.of(one).is_empty());
        for block in [5, 3, 5, 4] {
            pages.note(one, key(block));
        }
        pages.note(other, key(9));
        assert_eq!(pages.of(one), [key(3), key(4), key(5)]);
        assert_eq!(pages.of(other), [key(9)]);
        // Many more than there is room for: newer ones take the places, and most of the last
        // are there.
        let many = 4 * RECENT_PAGES as u32;
        (0..many).for_each(|block| pages.note(one, key(block)));
        let kept = pages.of(one);
        assert!(kept.len() <= RECENT_PAGES);
        let newest = kept.iter().filter(|kept| **kept >= key(many - RECENT_PAGES as u32)).count();
        assert!(newest > RECENT_PAGES / 2, "{newest}");
    }
}
