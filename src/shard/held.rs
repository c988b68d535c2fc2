//! Pages that can be told at once: nothing has to be waited for.
//!
//! Most requests are for pages whose newest version is an image in the block cache, or that were
//! rebuilt lately. Those are answered here in one synchronous step. Whatever stands in the way, a
//! block that is not in memory, records that must be applied, WAL that has not come, an error of any
//! kind, leads to "not held"; then [`super::get_page`] reads the page, and its word is the one that
//! counts. What is looked at and in which order is the same in both, but that no second look at the
//! retained history is needed where nothing can happen in between.

use bytes::Bytes;

use super::branch::{Ancestor, below_branch_point};
use super::get_page::{check_rel, end_of, of_deltas};
use super::layer_map::{LayerId, Steps};
use super::pages::zero_page;
use super::reader::RequestLsn;
use super::timeline::{Mutable, Timeline};
use crate::base::page::PAGE_SIZE;
use crate::base::{BlockNumber, Key, Lsn, LsnRange, RelTag, Value};
use crate::io::Io;
use crate::layers::{Answer, Lookup, Values};

#[cfg(test)]
thread_local! {
    /// Plants a bug that the simulator must find: what is in memory only is not looked at.
    pub(crate) static CANARY_NOT_THE_NEWEST: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
}

/// What such reads use over and over, empty.
#[derive(Default)]
pub(super) struct Room {
    values: Values,
    layers: Vec<LayerId>,
}

impl<I: Io> Timeline<I> {
    /// The page, as [`super::reader::TimelineReader::get_page`] would give it, if it is held.
    pub(super) fn page_if_held(
        &self,
        rel: RelTag,
        block: BlockNumber,
        lsn: RequestLsn,
    ) -> Option<Bytes> {
        if check_rel(rel).is_err() || self.archived.get() || self.gate.is_closed() {
            return None;
        }
        let lsn = self.lsn_if_held(lsn)?;
        let mut room = self.held.take();
        let page = self.page_in(rel, block, lsn, &mut room);
        room.values.clear();
        self.held.set(room);
        page
    }

    fn page_in(&self, rel: RelTag, block: BlockNumber, lsn: Lsn, room: &mut Room) -> Option<Bytes> {
        if block >= self.size_if_held(rel, lsn, room)? {
            return Some(zero_page());
        }
        let key = Key::rel_block(rel, block);
        self.context.recent.note(self.number, key);
        if let Some(rebuilt) = self.rebuilt_page(key, lsn).filter(|known| lsn <= known.until) {
            self.context.counters.page_cache_hits.add(1);
            self.note_read(0, 0);
            return Some(rebuilt.page);
        }
        let layers = self.collect_if_held(key, lsn, room)?;
        let page = match room.values.pop()? {
            (_, Value::Image(page)) if page.len() == PAGE_SIZE => page,
            (_, Value::ZeroPage) => zero_page(),
            _ => return None,
        };
        self.note_read(layers, 0);
        Some(page)
    }

    /// The LSN at which the request is answered, if it is there and may be read.
    fn lsn_if_held(&self, lsn: RequestLsn) -> Option<Lsn> {
        let RequestLsn { request, not_modified_since } = lsn;
        let (own_start, is_branch, last) = {
            let mutable = self.mutable.borrow();
            (mutable.start_lsn, mutable.ancestor.is_some(), mutable.lsns.last_record)
        };
        let start = if is_branch { self.start_lsn() } else { own_start };
        let is_there = not_modified_since.max(start) <= last;
        if !request.is_valid() || request < not_modified_since.max(start) || !is_there {
            return None;
        }
        let lsn = request.min(last);
        let is_retained = |lsn| match is_branch || lsn < self.gc_cutoff() {
            true => self.check_retained(lsn).is_ok(),
            false => true,
        };
        (is_retained(request) && is_retained(lsn)).then_some(lsn)
    }

    /// The fork's size in blocks at `lsn`, if it is in memory; `Some(None)`: it does not exist.
    pub(super) fn known_size(&self, rel: RelTag, lsn: Lsn) -> Option<Option<BlockNumber>> {
        let newest = self.mutable.borrow().sizes.rel(rel).filter(|size| size.since <= lsn);
        newest.map(|size| size.blocks).or_else(|| self.found_sizes.get(rel, lsn))
    }

    /// The fork's size in blocks; 0 where there is none.
    fn size_if_held(&self, rel: RelTag, lsn: Lsn, room: &mut Room) -> Option<BlockNumber> {
        if let Some(blocks) = self.known_size(rel, lsn) {
            return Some(blocks.unwrap_or(0));
        }
        self.collect_if_held(Key::rel_size(rel), lsn, room)?;
        let Some((since, value)) = room.values.pop() else { return Some(0) };
        let blocks = match value {
            Value::Image(bytes) if bytes.is_empty() => None,
            Value::Image(bytes) => Some(u32::from_le_bytes(<[u8; 4]>::try_from(&bytes[..]).ok()?)),
            _ => return None,
        };
        self.found_sizes.put(rel, (since, lsn), blocks);
        Some(blocks.unwrap_or(0))
    }

    /// The base that is the newest version of `key` at or below `lsn`, or nothing where there is
    /// none, into `room`; and how many layer files were looked into.
    fn collect_if_held(&self, key: Key, lsn: Lsn, room: &mut Room) -> Option<u64> {
        room.values.clear();
        let (mut below, mut layers) = (end_of(lsn), 0);
        let mut older = self.collect_own_if_held(key, below, room, &mut layers)?;
        while let Some(Ancestor { timeline, lsn }) = older {
            below = below_branch_point(below, lsn);
            older = timeline.collect_own_if_held(key, below, room, &mut layers)?;
        }
        Some(layers)
    }

    /// What this timeline's own layers have; returns where the search must go on.
    fn collect_own_if_held(
        &self,
        key: Key,
        below: Lsn,
        room: &mut Room,
        layers_read: &mut u64,
    ) -> Option<Option<Ancestor<I>>> {
        let range = Lsn(0)..below;
        let mutable: &Mutable<I> = &self.mutable.borrow();
        let Room { values, layers } = room;
        if in_memory(mutable, key, &range, values)? != Lookup::Continue {
            return Some(None);
        }
        mutable.layers.search_into(key, below, &mut Steps::default(), layers);
        let last = layers.last().map(|id| mutable.layers.found(*id).0);
        let newer = of_deltas(last, below);
        for id in layers.iter() {
            let (span, layer) = mutable.layers.found(*id);
            let lsns = if span.is_image { &range } else { &newer };
            let Answer { lookup: done, is_read } = layer.held(key, lsns, values)?;
            *layers_read += u64::from(is_read);
            match done {
                Lookup::Continue if values.is_empty() => {}
                // Records without their base, or with it.
                _ if values.len() > 1 || done == Lookup::Continue => return None,
                Lookup::Continue | Lookup::Complete | Lookup::Absent => return Some(None),
            }
        }
        Some(mutable.ancestor.clone())
    }
}

/// What the layers have that are in memory only.
fn in_memory<I: Io>(
    mutable: &Mutable<I>,
    key: Key,
    lsns: &LsnRange,
    values: &mut Values,
) -> Option<Lookup> {
    #[cfg(test)]
    if CANARY_NOT_THE_NEWEST.get() {
        return Some(Lookup::Continue);
    }
    let mut found = mutable.open.newest(key, lsns, values)?;
    for frozen in mutable.frozen.iter().rev() {
        if found == Lookup::Continue {
            found = frozen.newest(key, lsns, values)?;
        }
    }
    Some(found)
}
