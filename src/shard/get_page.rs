//! Reading: from a key and an LSN to a page or a small value.
//!
//! A branch has layers of its own only for what came after its branch point; where they have no
//! base, the read goes on in the ancestor, below the branch point ([`super::branch`]).
//!
//! A read takes a snapshot of the layers in one synchronous step (values from memory, handles of
//! files), then reads the files newest to oldest until it has a base, several at once where one is
//! not enough, then rebuilds the page.
//! Layers are immutable, so nothing that happens meanwhile can change the answer.

use std::rc::Rc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, join_all, select};
use futures_util::stream::{self, StreamExt};

use super::base_backup::{BackupError, BackupRequest, BackupSink};
use super::branch::{Older, below_branch_point};
#[cfg(test)]
use super::compact::{Planted, planted};
use super::layer_map::LayerSpan;
use super::leases::LeaseError;
use super::pages::{RebuiltPage, zero_page};
use super::reader::{PageQuota, ReadError, RequestLsn, TimelineReader};
use super::stored::StoredLayer;
use super::timeline::Timeline;
use crate::base::page::PAGE_SIZE;
use crate::base::{
    BlockNumber, Key, KeyRange, Kind, Lsn, LsnRange, RelNode, RelTag, SlruKind, Timestamp, Value,
};
use crate::io::Io;
use crate::layers::{Answer, LayerError, Lookup, Newest, Values};
use crate::limits::READ_LAYERS_CONCURRENT_MAX;
use crate::redo::plan;

/// Tablespace `pg_default`.
const DEFAULT_TABLESPACE: u32 = 1663;

#[cfg(test)]
thread_local! {
    /// Plants a bug that the simulator must find: reads leave out the version at the LSN itself,
    /// as if the range were closed at the wrong end.
    pub(crate) static CANARY_WRONG_END: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
    /// Plants another one: a page that was rebuilt lately is taken for the page of any later LSN.
    pub(crate) static CANARY_STALE_PAGES: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
    /// Layers are read one after the other, to see what reading them together is worth.
    pub(crate) static ONE_AFTER_THE_OTHER: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
}

impl<I: Io> Timeline<I> {
    /// The LSN at which a request is answered, after waiting for it if need be. Rules: the page
    /// service's facts on `request_lsn` and `not_modified_since`.
    pub(super) async fn effective_lsn(&self, lsn: RequestLsn) -> Result<Lsn, ReadError> {
        let RequestLsn { request, not_modified_since } = lsn;
        if !request.is_valid() {
            return Err(ReadError::BadLsn("request LSN is 0/0".to_owned()));
        }
        if request < not_modified_since {
            return Err(ReadError::BadLsn(format!(
                "request LSN {request} is before not-modified-since LSN {not_modified_since}"
            )));
        }
        let start = self.start_lsn();
        if request < start {
            return Err(ReadError::BelowStart { request, start });
        }
        self.check_retained(request)?;
        let needed = not_modified_since.max(start);
        if needed > self.lsns().last_record {
            self.wait_for_lsn(needed).await?;
        }
        Ok(request.min(self.lsns().last_record))
    }

    /// Waits until everything up to `lsn` is ingested.
    pub async fn wait_for_lsn(&self, lsn: Lsn) -> Result<(), ReadError> {
        if self.lsns().last_record >= lsn {
            return Ok(());
        }
        if let Some(reason) = self.broken() {
            return Err(ReadError::NotReady { timeline: self.id, reason });
        }
        if self.stopping.get() || self.gate.is_closed() {
            return Err(self.gone());
        }
        if self.source.is_none() {
            let last_record_lsn = self.lsns().last_record;
            return Err(ReadError::NoMoreWal { wanted: lsn, last_record_lsn });
        }
        let started = self.context.io.now();
        let limit = Duration::from_millis(self.context.config.get().wait_lsn_timeout_ms);
        let reached = self.waiters.register(lsn);
        let timeout = std::pin::pin!(self.context.io.sleep(limit));
        match select(reached, timeout).await {
            Either::Left((Ok(()), _)) => Ok(()),
            Either::Left((Err(_), _)) => Err(match self.broken() {
                Some(reason) => ReadError::NotReady { timeline: self.id, reason },
                None => self.gone(),
            }),
            Either::Right(_) => Err(ReadError::LsnTimeout {
                wanted: lsn,
                last_record_lsn: self.lsns().last_record,
                waited_ms: (self.context.io.now() - started).as_millis() as u64,
            }),
        }
    }

    /// Versions of `key` with LSNs at or below `lsn`, newest first, up to a base.
    async fn collect(&self, key: Key, lsn: Lsn) -> Result<Values, LayerError> {
        Ok(self.collect_from(key, Lsn(0), lsn).await?.values)
    }

    /// [`Self::collect`] of what is not below `start`.
    async fn collect_from(&self, key: Key, start: Lsn, lsn: Lsn) -> Result<Collected, LayerError> {
        let mut below = end_of(lsn);
        let mut collected = Collected::default();
        let mut older = self.collect_own(key, start..below, &mut collected).await?;
        while let Some(Older { timeline, lsn, _read }) = older {
            below = below_branch_point(below, lsn);
            if below <= start {
                break;
            }
            older = timeline.collect_own(key, start..below, &mut collected).await?;
        }
        Ok(collected)
    }

    /// What this timeline's own layers have within `range`; returns where the search must go on.
    async fn collect_own(
        &self,
        key: Key,
        range: LsnRange,
        collected: &mut Collected,
    ) -> Result<Option<Older<I>>, LayerError> {
        let Collected { values: found, layers: layers_read, is_absent } = collected;
        let (mut layers, older) = {
            let mutable = self.mutable.borrow();
            if mutable.open.collect(key, &range, found) != Lookup::Continue {
                return Ok(None);
            }
            for frozen in mutable.frozen.iter().rev() {
                if frozen.collect(key, &range, found) != Lookup::Continue {
                    return Ok(None);
                }
            }
            (mutable.layers.search(key, range.end), Older::of(&mutable))
        };
        let newer = of_deltas(layers.last().map(|layer| layer.span()).as_ref(), range.end);
        let newer = newer.start.max(range.start)..newer.end;
        if range.start > Lsn(0) {
            layers.retain(|layer| layer.name().lsns().end > range.start);
        }
        let found = descend(layers, key, (&range, &newer), (found, layers_read)).await?;
        *is_absent |= found == Lookup::Absent;
        match found {
            Lookup::Continue => Ok(older),
            Lookup::Complete | Lookup::Absent => Ok(None),
        }
    }

    /// The newest version at or below `lsn` of every key in a range of small values.
    pub(super) async fn scan(&self, keys: &KeyRange, lsn: Lsn) -> Result<Newest, ReadError> {
        let mut below = Lsn(lsn.0 + 1);
        let mut newest = Newest::new();
        let unreadable = |error| damaged("a directory", lsn, &error);
        let mut images = Vec::new();
        let found = self.scan_own(keys, below, &mut newest, &mut images).await;
        let mut older = found.map_err(unreadable)?;
        while let Some(Older { timeline, lsn, _read }) = older {
            below = below_branch_point(below, lsn);
            let found = timeline.scan_own(keys, below, &mut newest, &mut images).await;
            older = found.map_err(unreadable)?;
        }
        // What an image layer covers and does not have does not exist at its LSN. The layer that
        // says when it went may be gone, and one that says when it came may still be there.
        let outdated = |key: &Key, at: Lsn| {
            images.iter().any(|image| image.keys.contains(key) && image.lsns.start > at)
        };
        newest.retain(|key, (at, _)| !outdated(key, *at));
        Ok(newest)
    }

    /// What this timeline's own layers have, and its image layers; returns where the scan must go
    /// on.
    async fn scan_own(
        &self,
        keys: &KeyRange,
        below: Lsn,
        newest: &mut Newest,
        images: &mut Vec<LayerSpan>,
    ) -> Result<Option<Older<I>>, LayerError> {
        let (layers, older) = {
            let mutable = self.mutable.borrow();
            mutable.open.scan(keys, below, newest);
            mutable.frozen.iter().for_each(|layer| layer.scan(keys, below, newest));
            (mutable.layers.search_range(keys, below), Older::of(&mutable))
        };
        for layer in layers {
            layer.scan(keys, below, newest).await?;
            images.extend(Some(layer.span()).filter(|span| span.is_image));
        }
        Ok(older)
    }

    /// The newest version of a small value at or below `lsn` and its LSN; `None` when the key
    /// never existed or was removed.
    pub(super) async fn metadata(
        &self,
        key: Key,
        lsn: Lsn,
    ) -> Result<Option<(Lsn, Bytes)>, ReadError> {
        let found =
            self.collect(key, lsn).await.map_err(|e| damaged(&format!("{key:?}"), lsn, &e))?;
        match found.into_iter().next() {
            None => Ok(None),
            Some((_, Value::Image(bytes))) if bytes.is_empty() => Ok(None),
            Some((at, Value::Image(bytes))) => Ok(Some((at, bytes))),
            Some((_, other)) => Err(ReadError::Damaged {
                what: format!("{key:?}"),
                lsn,
                problem: format!("a small value is stored as {other:?}"),
            }),
        }
    }

    /// A page that exists at `lsn`, and may be asked for again.
    async fn page_for_client(&self, key: Key, lsn: Lsn) -> Result<Bytes, ReadError> {
        self.context.recent.note(self.number, key);
        let (page, rebuilt_from) = self.rebuild(key, lsn).await?;
        if let Some(from) = rebuilt_from {
            let rebuilt = RebuiltPage { from, until: lsn, page: page.clone() };
            self.context.pages.put(self.number, key, rebuilt);
        }
        Ok(page)
    }

    /// A page that exists at `lsn`. It is not kept for others: who reads so reads everything.
    pub(super) async fn page(&self, key: Key, lsn: Lsn) -> Result<Bytes, ReadError> {
        Ok(self.rebuild(key, lsn).await?.0)
    }

    /// A page that exists at `lsn`, and the LSN of its newest change, unless it was found as it is:
    /// what stands in a layer or in the cache is found there as fast.
    async fn rebuild(&self, key: Key, lsn: Lsn) -> Result<(Bytes, Option<Lsn>), ReadError> {
        let what = || format!("{key:?}");
        let mut known = self.rebuilt_page(key, lsn);
        if let Some(RebuiltPage { until, page, .. }) = &known
            && lsn <= *until
        {
            self.context.counters.page_cache_hits.add(1);
            self.note_read(0, 0);
            return Ok((page.clone(), None));
        }
        let start = known.as_ref().map_or(Lsn(0), |known| end_of(known.until));
        let mut collected =
            self.collect_from(key, start, lsn).await.map_err(|e| damaged(&what(), lsn, &e))?;
        if collected.is_absent && known.take().is_some() {
            // It should not have gone; whatever there is to say of that, all of its history says.
            let all = self.collect_from(key, Lsn(0), lsn).await;
            collected = all.map_err(|e| damaged(&what(), lsn, &e))?;
        }
        let Collected { mut values, layers, .. } = collected;
        let newest = values.first().map(|(at, _)| *at);
        let mut is_stored = true;
        let base = match (values.last(), &known) {
            (Some((_, Value::Image(image))), _) => Some(image.clone()),
            (Some((_, Value::ZeroPage)), _) => Some(zero_page()),
            (Some((_, Value::WalRecord { will_init: true, .. })), _) => {
                is_stored = false;
                None
            }
            (_, Some(known)) => {
                self.context.counters.page_cache_hits.add(1);
                is_stored = false;
                Some(known.page.clone())
            }
            (Some(_) | None, None) => {
                return Err(ReadError::Damaged {
                    what: what(),
                    lsn,
                    problem: "no base version was found in any layer".to_owned(),
                });
            }
        };
        if is_stored {
            values.pop();
        }
        is_stored &= values.is_empty();
        self.note_read(layers, values.len() as u64);
        values.reverse();
        let page = plan::rebuild(&*self.context.redo, key, base, values).await?;
        if page.len() != PAGE_SIZE {
            let problem = format!("it has {} bytes instead of {PAGE_SIZE}", page.len());
            return Err(ReadError::Damaged { what: what(), lsn, problem });
        }
        let from = newest.or(known.map(|known| known.from)).filter(|_| !is_stored);
        Ok((page, from))
    }

    /// The page at `lsn` or before, if it was rebuilt lately.
    pub(super) fn rebuilt_page(&self, key: Key, lsn: Lsn) -> Option<RebuiltPage> {
        let known = self.context.pages.get(self.number, key, lsn);
        #[cfg(test)]
        if CANARY_STALE_PAGES.get() {
            return known.map(|known| RebuiltPage { until: Lsn::MAX, ..known });
        }
        known
    }

    /// Counts a read of a page.
    pub(super) fn note_read(&self, layers: u64, records: u64) {
        self.context.counters.read_layers.note(layers);
        self.context.counters.read_records.note(records);
    }

    /// Size in blocks of a fork at `lsn`; `None` when it does not exist.
    pub(super) async fn fork_size(
        &self,
        rel: RelTag,
        lsn: Lsn,
    ) -> Result<Option<BlockNumber>, ReadError> {
        if let Some(blocks) = self.known_size(rel, lsn) {
            return Ok(blocks);
        }
        let stored = self.stored_u32(Key::rel_size(rel), lsn).await?;
        if let Some((since, blocks)) = stored {
            self.found_sizes.put(rel, (since, lsn), Some(blocks));
        }
        Ok(stored.map(|(_, blocks)| blocks))
    }

    /// A little-endian u32 that is stored under `key`, and its LSN.
    pub(super) async fn stored_u32(
        &self,
        key: Key,
        lsn: Lsn,
    ) -> Result<Option<(Lsn, u32)>, ReadError> {
        let Some((at, bytes)) = self.metadata(key, lsn).await? else { return Ok(None) };
        match <[u8; 4]>::try_from(&bytes[..]) {
            Ok(number) => Ok(Some((at, u32::from_le_bytes(number)))),
            Err(_) => Err(ReadError::Damaged {
                what: format!("{key:?}"),
                lsn,
                problem: format!("a size has {} bytes instead of 4", bytes.len()),
            }),
        }
    }

    /// Forks of all relations of one database in one tablespace at `lsn`.
    pub(super) async fn database_forks(
        &self,
        spc: u32,
        db: u32,
        lsn: Lsn,
    ) -> Result<Vec<RelTag>, ReadError> {
        let newest = self.scan(&Key::rel_dir_range(spc, db), lsn).await?;
        let exists = |value: &Value| matches!(value, Value::Image(bytes) if !bytes.is_empty());
        let present = newest.into_iter().filter(|(_, (_, value))| exists(value));
        Ok(present.filter_map(|(key, _)| key.as_rel_dir()).collect())
    }
}

/// What a read has found.
#[derive(Default)]
struct Collected {
    /// Newest first, up to a base.
    values: Values,
    /// Layer files of which blocks were needed.
    layers: u64,
    /// An image layer ended it that does not have the key.
    is_absent: bool,
}

/// Where a read at `lsn` ends.
pub(super) fn end_of(lsn: Lsn) -> Lsn {
    #[cfg(test)]
    if CANARY_WRONG_END.get() {
        return lsn;
    }
    Lsn(lsn.0.saturating_add(1))
}

/// The LSNs that a read below `below` takes from delta layers. One may reach below the image that
/// the read ends at, the `last` of its layers: what it has there is in the image already.
pub(super) fn of_deltas(last: Option<&LayerSpan>, below: Lsn) -> LsnRange {
    #[cfg(test)]
    if planted(Planted::ReadBelowImage) {
        return Lsn(0)..below;
    }
    last.filter(|span| span.is_image).map_or(Lsn(0), |span| span.lsns.end)..below
}

/// Looks into layers, newest first, until one has a base. `images` and `deltas` are the LSNs that
/// are taken from each kind.
///
/// One layer after the other, until one has a record but no base: more must be read then, and all
/// that are left are read at once. What they have is used in their order, up to the first base, and
/// an error counts only if no newer layer has one. So a page whose newest version is a base, which
/// is the most frequent case, costs one read and no more, and any other the time of about two.
async fn descend<I: Io>(
    layers: Vec<Rc<StoredLayer<I>>>,
    key: Key,
    (images, deltas): (&LsnRange, &LsnRange),
    (found, layers_read): (&mut Values, &mut u64),
) -> Result<Lookup, LayerError> {
    let range = |layer: &StoredLayer<I>| if layer.name().is_image() { images } else { deltas };
    let mut layers = layers.into_iter();
    for layer in layers.by_ref() {
        let before = found.len();
        let Answer { lookup: done, is_read } =
            layer.source().await?.collect(key, range(&layer), found).await?;
        *layers_read += u64::from(is_read);
        if done != Lookup::Continue {
            return Ok(done);
        }
        if found.len() > before && !is_sequential() {
            break;
        }
    }
    // A read may be given up half way, the opening of a file may not: it would stay open.
    let opened = join_all(layers.as_slice().iter().map(|layer| layer.source())).await;
    let reads = layers.zip(opened).map(|(layer, source)| async move {
        let mut values = Vec::new();
        let answer = source?.collect(key, range(&layer), &mut values).await?;
        Ok::<_, LayerError>((answer, values))
    });
    let mut reads = stream::iter(reads).buffered(READ_LAYERS_CONCURRENT_MAX);
    while let Some(read) = reads.next().await {
        let (Answer { lookup: done, is_read }, values) = read?;
        found.extend(values);
        *layers_read += u64::from(is_read);
        if done != Lookup::Continue {
            return Ok(done);
        }
    }
    Ok(Lookup::Continue)
}

/// For tests: layers are read one after the other.
fn is_sequential() -> bool {
    #[cfg(test)]
    return ONE_AFTER_THE_OTHER.get();
    #[cfg(not(test))]
    false
}

fn damaged(what: &str, lsn: Lsn, error: &LayerError) -> ReadError {
    ReadError::Damaged { what: what.to_owned(), lsn, problem: error.to_string() }
}

pub(super) fn check_rel(rel: RelTag) -> Result<(), ReadError> {
    let RelNode { rel: number, .. } = rel.node;
    if number == 0 {
        return Err(ReadError::BadRequest("relation number 0".to_owned()));
    }
    if rel.fork > crate::base::key::FORK_INIT {
        return Err(ReadError::BadRequest(format!("unknown fork number {}", rel.fork)));
    }
    Ok(())
}

impl<I: Io> TimelineReader for Timeline<I> {
    async fn get_page(
        &self,
        rel: RelTag,
        block: BlockNumber,
        lsn: RequestLsn,
    ) -> Result<Bytes, ReadError> {
        check_rel(rel)?;
        let _read = self.enter()?;
        let lsn = self.effective_lsn(lsn).await?;
        let blocks = self.fork_size(rel, lsn).await;
        let blocks = self.noted(self.still_retained(lsn, blocks))?.unwrap_or(0);
        if block >= blocks {
            return Ok(zero_page());
        }
        let result = self.page_for_client(Key::rel_block(rel, block), lsn).await;
        self.noted(self.still_retained(lsn, result))
    }

    fn held_page(&self, rel: RelTag, block: BlockNumber, lsn: RequestLsn) -> Option<Bytes> {
        self.page_if_held(rel, block, lsn)
    }

    fn quota(&self) -> PageQuota {
        self.context.config.get().page_quota
    }

    async fn rel_exists(&self, rel: RelTag, lsn: RequestLsn) -> Result<bool, ReadError> {
        check_rel(rel)?;
        let _read = self.enter()?;
        let lsn = self.effective_lsn(lsn).await?;
        let size = self.fork_size(rel, lsn).await;
        Ok(self.noted(self.still_retained(lsn, size))?.is_some())
    }

    async fn rel_size(&self, rel: RelTag, lsn: RequestLsn) -> Result<BlockNumber, ReadError> {
        check_rel(rel)?;
        let _read = self.enter()?;
        let lsn = self.effective_lsn(lsn).await?;
        let size = self.fork_size(rel, lsn).await;
        Ok(self.noted(self.still_retained(lsn, size))?.unwrap_or(0))
    }

    async fn db_size(&self, db: u32, lsn: RequestLsn) -> Result<i64, ReadError> {
        let _read = self.enter()?;
        let lsn = self.effective_lsn(lsn).await?;
        let bytes = self.database_bytes(db, lsn).await;
        self.noted(self.still_retained(lsn, bytes))
    }

    async fn slru_segment(
        &self,
        kind: SlruKind,
        segment: u32,
        lsn: RequestLsn,
    ) -> Result<Bytes, ReadError> {
        let _read = self.enter()?;
        let lsn = self.effective_lsn(lsn).await?;
        let pages = self.slru_pages(kind, segment, lsn).await;
        self.noted(self.still_retained(lsn, pages))
    }

    async fn lease_lsn(&self, lsn: Lsn) -> Result<Timestamp, LeaseError> {
        self.lease(lsn, None).await.map(|lease| lease.valid_until)
    }

    async fn backup<S: BackupSink>(
        &self,
        request: BackupRequest,
        sink: &mut S,
    ) -> Result<Lsn, BackupError> {
        self.write_backup(request, sink).await
    }
}

impl<I: Io> Timeline<I> {
    /// Tells the operator of a read that failed by the node's fault, now and then, and of what is
    /// damaged.
    pub(super) fn noted<T>(&self, result: Result<T, ReadError>) -> Result<T, ReadError> {
        if let Err(error) = &result {
            let mut health = self.health.borrow_mut();
            if matches!(error, ReadError::Damaged { .. }) {
                health.damage(error.to_string());
            }
            let told = match error.kind() {
                Kind::Corrupt => Some(&health.damage_told),
                // A client may ask for an LSN that will never come.
                Kind::Retry if !matches!(error, ReadError::LsnTimeout { .. }) => {
                    Some(&health.failures_told)
                }
                _ => None,
            };
            if let Some(kept_back) = told.and_then(|told| told.pass(self.context.io.now())) {
                tracing::error!(tenant = %self.tenant, timeline = %self.id, kept_back, "{error}");
            }
        }
        result
    }

    async fn database_bytes(&self, db: u32, lsn: Lsn) -> Result<i64, ReadError> {
        let mut blocks = 0i64;
        for rel in self.database_forks(DEFAULT_TABLESPACE, db, lsn).await? {
            blocks += i64::from(self.fork_size(rel, lsn).await?.unwrap_or(0));
        }
        Ok(blocks * PAGE_SIZE as i64)
    }

    pub(super) async fn slru_pages(
        &self,
        kind: SlruKind,
        segment: u32,
        lsn: Lsn,
    ) -> Result<Bytes, ReadError> {
        let Some((_, blocks)) = self.stored_u32(Key::slru_size(kind, segment), lsn).await? else {
            return Err(ReadError::BadRequest(format!(
                "segment {}/{segment:04X} does not exist at {lsn}",
                kind.directory()
            )));
        };
        let blocks = blocks.min(crate::base::key::SLRU_PAGES_PER_SEGMENT);
        let mut out = BytesMut::with_capacity(blocks as usize * PAGE_SIZE);
        for block in 0..blocks {
            out.extend_from_slice(&self.page(Key::slru_block(kind, segment, block), lsn).await?);
        }
        self.still_readable(lsn)?;
        Ok(out.freeze())
    }
}
