//! The job that merges delta layers; runs on the background executor.
//!
//! Values stream through in order. Values of one key are gathered; where a page needs an image it
//! is rebuilt, several pages at once, and what comes after it waits in a window of bounded size.
//! A layer is cut between two keys when it is large enough, earlier at a key where an image layer
//! begins: then later merges concern fewer layers.

use std::path::PathBuf;

use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesOrdered;

use super::chain::{Bounds, Chain};
use super::job::{CompactError, JobBase, Made, Pages};
use super::points::Points;
#[cfg(test)]
use super::{Planted, planted};
use crate::base::{Key, KeyKind, Lsn, LsnRange, Value};
use crate::io::Io;
use crate::layers::{
    DeltaMerge, DeltaWriter, InputLayer, LayerDesc, LayerError, LayerName, LayerOwner, MergeEntry,
    Values,
};
use crate::limits::{
    COMPACT_GROUP_BYTES_MAX, COMPACT_KEYS_MAX, COMPACT_REDO_CONCURRENT_MAX,
    COMPACT_WINDOW_BYTES_MAX,
};

/// Delta layers to merge.
pub(super) struct MergeJob {
    pub(super) base: JobBase,
    pub(super) inputs: Vec<InputLayer>,
    /// LSN range of the result; contains those of the inputs.
    pub(super) lsns: LsnRange,
    /// Everything else that begins below its end, layers of ancestors last.
    pub(super) others: Vec<Vec<InputLayer>>,
    /// Keys where a layer is cut even if it could still grow; ascending.
    pub(super) cuts: Vec<Key>,
    /// Keys that no layer may reach over; ascending.
    pub(super) bars: Vec<Key>,
    /// A page with more records than this gets an image behind them.
    pub(super) chain_max: usize,
}

/// Values of one key, or some of them.
struct Group {
    key: Key,
    values: Values,
    bytes: usize,
}

impl Group {
    fn new(key: Key) -> Group {
        Group { key, values: Vec::new(), bytes: 0 }
    }

    fn push(&mut self, lsn: Lsn, value: Value) {
        self.bytes += value.encoded_len() + size_of::<(Lsn, Value)>();
        self.values.push((lsn, value));
    }
}

/// Writes the layers of the result.
struct Output<I: Io> {
    io: I,
    job: OutputJob,
    writer: Option<DeltaWriter<I>>,
    first: Key,
    last: Key,
    keys: u64,
    done: Vec<LayerDesc>,
}

/// What the output must know of its job.
struct OutputJob {
    dir: PathBuf,
    owner: LayerOwner,
    target_bytes: u64,
    lsns: LsnRange,
    cuts: Vec<Key>,
    bars: Vec<Key>,
    /// Names that no layer of the result may have: their files are being read.
    inputs: Vec<LayerName>,
}

impl<I: Io> Output<I> {
    fn new(io: &I, job: OutputJob) -> Self {
        let (first, last) = (Key::MIN, Key::MIN);
        Output { io: io.clone(), job, writer: None, first, last, keys: 0, done: Vec::new() }
    }

    /// True if a new layer shall begin with `key`.
    fn is_due(&self, key: Key) -> bool {
        let Some(writer) = &self.writer else { return false };
        let bytes = writer.file_bytes();
        let crosses = |places: &[Key]| {
            let next = places.partition_point(|place| *place <= self.last);
            places.get(next).is_some_and(|place| *place <= key)
        };
        bytes >= self.job.target_bytes
            || self.keys >= COMPACT_KEYS_MAX
            || crosses(&self.job.cuts) && bytes >= self.job.target_bytes / 8
            || crosses(&self.job.bars)
    }

    async fn put(&mut self, group: Group) -> Result<(), LayerError> {
        if self.writer.is_some() && group.key != self.last && self.is_due(group.key) {
            self.end_layer().await?;
        }
        if self.writer.is_none() {
            let OutputJob { dir, owner, lsns, target_bytes, .. } = &self.job;
            let (io, lsns) = (&self.io, lsns.clone());
            // At a cut it may end with so little; only the last one has less.
            let least = *target_bytes / 8;
            let writer = DeltaWriter::create(io, dir, *owner, lsns, least).await?;
            self.writer = Some(writer.pack_tightly());
            (self.first, self.keys) = (group.key, 0);
        }
        self.keys += u64::from(self.keys == 0 || group.key != self.last);
        self.last = group.key;
        let Some(writer) = &mut self.writer else { return Ok(()) };
        for (lsn, value) in &group.values {
            writer.add(group.key, *lsn, value).await?;
        }
        Ok(())
    }

    async fn end_layer(&mut self) -> Result<(), LayerError> {
        if let Some(writer) = self.writer.take() {
            let keys = self.first..self.last.next();
            let name = LayerName::Delta { keys: keys.clone(), lsns: self.job.lsns.clone() };
            if self.job.inputs.contains(&name) {
                writer.abort().await;
                let (file, lsn) = (self.job.dir.join(name.to_string()), name.lsns().start);
                let what = "a merge would replace one of its inputs";
                return Err(LayerError::Misplaced { file, key: self.first, lsn, what });
            }
            self.done.push(writer.finish(keys).await?);
        }
        Ok(())
    }

    /// Removes what was written: nothing of it is named anywhere.
    async fn abort(self) {
        if let Some(writer) = self.writer {
            writer.abort().await;
        }
        for desc in self.done {
            let _ = self.io.remove(&self.job.dir.join(desc.name.to_string())).await;
        }
    }
}

/// Merges. The layers of the result are durable when this returns; after an error there are none.
pub(super) async fn run<I: Io>(io: I, job: MergeJob) -> Result<Made, CompactError> {
    let MergeJob { base, inputs, lsns, others, cuts, bars, chain_max } = job;
    let JobBase { owner, dir, target_bytes, start_lsn, redo, flags } = base;
    let pages = Pages::new(Points::new(&io, others), redo());
    let names = inputs.iter().map(|input| input.name.clone()).collect();
    let mut merge = DeltaMerge::new(&io, inputs, Key::MIN..Key::MAX);
    let span = lsns.clone();
    let bounds = Bounds { start: start_lsn, lsns: &span, chain_max };
    let to_write = OutputJob { dir, owner, target_bytes, lsns, cuts, bars, inputs: names };
    let mut out = Output::new(&io, to_write);
    let mut stream = Stream::new(&io, &pages, bounds);
    let mut merged = async {
        while let Some(entry) = merge.next().await? {
            if flags.is_cancelled() {
                return Err(CompactError::Cancelled);
            }
            #[cfg(test)]
            if planted(Planted::DropValues) && entry.1.0 % 97 == 0 {
                continue;
            }
            stream.take(entry, &mut out).await?;
        }
        stream.end(&mut out).await
    }
    .await;
    if merged.is_ok() {
        merged = out.end_layer().await.map_err(CompactError::Layer);
    }
    merge.close().await;
    stream.close().await;
    let (made, failures) = (pages.made.get(), pages.failures.get());
    pages.close().await;
    match merged {
        Ok(()) => Ok(Made { layers: out.done, pages: made, failures, error: None }),
        Err(error) => {
            out.abort().await;
            Err(error)
        }
    }
}

/// Groups whose pages are being rebuilt, and those behind them, in order.
#[derive(Default)]
struct Window<'a> {
    groups: FuturesOrdered<LocalBoxFuture<'a, Group>>,
    bytes: usize,
}

/// What is between the merge and the output.
struct Stream<'a, I: Io> {
    io: &'a I,
    pages: &'a Pages<I>,
    bounds: Bounds<'a>,
    /// The key that values come of.
    group: Option<Group>,
    /// Of a key whose first values have gone their way: what its next image is made from.
    chain: Option<Chain<'a>>,
    window: Window<'a>,
}

impl<'a, I: Io> Stream<'a, I> {
    fn new(io: &'a I, pages: &'a Pages<I>, bounds: Bounds<'a>) -> Self {
        Stream { io, pages, bounds, group: None, chain: None, window: Window::default() }
    }

    /// Ends what is under way. A page that is given up while it opens a layer leaves the file open.
    async fn close(mut self) {
        while self.window.groups.next().await.is_some() {}
    }

    async fn take(
        &mut self,
        (key, lsn, value): MergeEntry,
        out: &mut Output<I>,
    ) -> Result<(), CompactError> {
        match &self.group {
            Some(group) if group.key == key => {
                let is_new_lsn = group.values.last().is_some_and(|(last, _)| *last != lsn);
                if group.bytes > COMPACT_GROUP_BYTES_MAX && is_new_lsn {
                    self.send_part(false, out).await?;
                }
            }
            _ => self.end_group(out).await?,
        }
        self.group.get_or_insert_with(|| Group::new(key)).push(lsn, value);
        Ok(())
    }

    /// Writes the values that were gathered of a key that has too many of them, alone.
    async fn send_part(&mut self, is_last: bool, out: &mut Output<I>) -> Result<(), CompactError> {
        while !self.window.groups.is_empty() {
            self.write_one(out).await?;
        }
        let Some(group) = self.group.take() else { return Ok(()) };
        let Group { key, mut values, bytes } = group;
        if key.kind() != KeyKind::Metadata {
            let bounds = self.bounds;
            let chain = self.chain.get_or_insert_with(|| Chain::new(bounds, self.pages, key));
            values = chain.extend(self.pages, key, values, is_last).await;
        }
        out.put(Group { key, values, bytes }).await?;
        self.group = (!is_last).then(|| Group::new(key));
        Ok(())
    }

    async fn end_group(&mut self, out: &mut Output<I>) -> Result<(), CompactError> {
        self.io.yield_if_needed().await;
        if self.chain.is_some() {
            self.send_part(true, out).await?;
            self.chain = None;
        }
        let Some(group) = self.group.take() else { return Ok(()) };
        let needs_work = self.bounds.may_need_image(group.key, group.values.len());
        if !needs_work && self.window.groups.is_empty() {
            return Ok(out.put(group).await?);
        }
        let (pages, bounds) = (self.pages, self.bounds);
        self.window.bytes += group.bytes;
        self.window.groups.push_back(Box::pin(async move {
            let Group { key, values, bytes } = group;
            let values = match needs_work {
                true => Chain::new(bounds, pages, key).extend(pages, key, values, true).await,
                false => values,
            };
            Group { key, values, bytes }
        }));
        while self.window.groups.len() > COMPACT_REDO_CONCURRENT_MAX
            || self.window.bytes > COMPACT_WINDOW_BYTES_MAX
        {
            self.write_one(out).await?;
        }
        Ok(())
    }

    async fn write_one(&mut self, out: &mut Output<I>) -> Result<(), CompactError> {
        if let Some(group) = self.window.groups.next().await {
            self.window.bytes = self.window.bytes.saturating_sub(group.bytes);
            out.put(group).await?;
        }
        Ok(())
    }

    async fn end(&mut self, out: &mut Output<I>) -> Result<(), CompactError> {
        self.end_group(out).await?;
        while !self.window.groups.is_empty() {
            self.write_one(out).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;

    use super::*;
    use crate::base::{KeyRange, TenantId, TenantShardId, TimelineId};
    use crate::sim::{SimOptions, SimWorld};

    #[test]
    fn a_layer_reaches_over_no_bar() {
        let key = |n| Key { field6: n, ..Key::MIN };
        let mut world = SimWorld::new(1, SimOptions::default());
        let story = world.run(|io| async move {
            let dir = PathBuf::from("/layers");
            io.create_dir(&dir).await.unwrap();
            let tenant = TenantShardId::unsharded(TenantId([1; 16]));
            let owner = LayerOwner { shard: tenant, timeline: TimelineId([2; 16]) };
            let (cuts, bars) = (vec![key(2)], vec![key(5), key(7), key(20), key(30)]);
            let (target_bytes, lsns) = (1 << 20, Lsn(8)..Lsn(16));
            let inputs = vec![LayerName::Delta { keys: key(40)..key(43), lsns: lsns.clone() }];
            let job = OutputJob { dir, owner, target_bytes, lsns, cuts, bars, inputs };
            let mut out = Output::new(&io, job);
            for n in [1, 3, 9, 10, 19, 20, 29] {
                let mut group = Group::new(key(n));
                group.push(Lsn(8), Value::Image(Bytes::from_static(b"small")));
                out.put(group).await.unwrap();
            }
            out.end_layer().await.unwrap();
            let keys: Vec<KeyRange> =
                out.done.iter().map(|desc| desc.name.keys().clone()).collect();
            assert_eq!(keys, [key(1)..key(4), key(9)..key(20), key(20)..key(30)]);
            // The name of an input is refused.
            for n in [40, 42] {
                let mut group = Group::new(key(n));
                group.push(Lsn(8), Value::Image(Bytes::from_static(b"small")));
                out.put(group).await.unwrap();
            }
            assert!(matches!(out.end_layer().await, Err(LayerError::Misplaced { .. })));
            assert_eq!(io.list(Path::new("/layers")).await.unwrap().len(), 3);
        });
        assert_eq!(story, Ok(()), "{world}");
    }
}
