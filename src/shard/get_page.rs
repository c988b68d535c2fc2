//! Reading: from a key and an LSN to a page or a small value.
//!
//! A read takes a snapshot of the layers in one synchronous step (values from memory, handles of
//! files), then reads the files newest to oldest until it has a base, then rebuilds the page.
//! Layers are immutable, so nothing that happens meanwhile can change the answer.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::future::{Either, select};

use super::reader::{ReadError, RequestLsn, TimelineReader};
use super::timeline::Timeline;
use crate::base::page::PAGE_SIZE;
use crate::base::{BlockNumber, Key, KeyRange, Lsn, RelNode, RelTag, SlruKind, Value};
use crate::io::Io;
use crate::layers::{LayerError, Lookup, Newest};
use crate::redo::plan;

/// Tablespace `pg_default`.
const DEFAULT_TABLESPACE: u32 = 1663;

#[cfg(test)]
thread_local! {
    /// Plants a bug that the simulator must find: reads leave out the version at the LSN itself,
    /// as if the range were closed at the wrong end.
    pub(crate) static CANARY_WRONG_END: std::cell::Cell<bool> =
        const { std::cell::Cell::new(false) };
}

impl<I: Io> Timeline<I> {
    /// The LSN at which a request is answered, after waiting for it if need be. Rules: the page
    /// service's facts on `request_lsn` and `not_modified_since`.
    async fn effective_lsn(&self, lsn: RequestLsn) -> Result<Lsn, ReadError> {
        let RequestLsn { request, not_modified_since } = lsn;
        if !request.is_valid() {
            return Err(ReadError::BadLsn("request LSN is 0/0".to_owned()));
        }
        if request < not_modified_since {
            return Err(ReadError::BadLsn(format!(
                "request LSN {request} is before not-modified-since LSN {not_modified_since}"
            )));
        }
        if request < self.start_lsn {
            return Err(ReadError::BelowStart { request, start: self.start_lsn });
        }
        self.check_retained(request)?;
        let needed = not_modified_since.max(self.start_lsn);
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
        if self.stopping.get() {
            return Err(ReadError::Shutdown);
        }
        let started = self.context.io.now();
        let limit = Duration::from_millis(self.context.config.wait_lsn_timeout_ms);
        let reached = self.waiters.register(lsn);
        let timeout = std::pin::pin!(self.context.io.sleep(limit));
        match select(reached, timeout).await {
            Either::Left((Ok(()), _)) => Ok(()),
            Either::Left((Err(_), _)) => Err(match self.broken() {
                Some(reason) => ReadError::NotReady { timeline: self.id, reason },
                None => ReadError::Shutdown,
            }),
            Either::Right(_) => Err(ReadError::LsnTimeout {
                wanted: lsn,
                last_record_lsn: self.lsns().last_record,
                waited_ms: (self.context.io.now() - started).as_millis() as u64,
            }),
        }
    }

    /// Versions of `key` with LSNs at or below `lsn`, newest first, up to a base.
    async fn collect(&self, key: Key, lsn: Lsn) -> Result<Vec<(Lsn, Value)>, LayerError> {
        let below = Lsn(lsn.0 + 1);
        #[cfg(test)]
        let below = if CANARY_WRONG_END.get() { lsn } else { below };
        let range = Lsn(0)..below;
        let mut found = Vec::new();
        let layers = {
            let mutable = self.mutable.borrow();
            if mutable.open.collect(key, &range, &mut found) != Lookup::Continue {
                return Ok(found);
            }
            for frozen in mutable.frozen.iter().rev() {
                if frozen.collect(key, &range, &mut found) != Lookup::Continue {
                    return Ok(found);
                }
            }
            mutable.layers.search(key, below)
        };
        for layer in layers {
            if layer.collect(key, &range, &mut found).await? != Lookup::Continue {
                break;
            }
        }
        Ok(found)
    }

    /// The newest version at or below `lsn` of every key in a range of small values.
    pub(super) async fn scan(&self, keys: &KeyRange, lsn: Lsn) -> Result<Newest, ReadError> {
        let below = Lsn(lsn.0 + 1);
        let mut newest = Newest::new();
        let layers = {
            let mutable = self.mutable.borrow();
            mutable.open.scan(keys, below, &mut newest);
            mutable.frozen.iter().for_each(|layer| layer.scan(keys, below, &mut newest));
            mutable.layers.search_range(keys, below)
        };
        for layer in &layers {
            layer
                .scan(keys, below, &mut newest)
                .await
                .map_err(|error| damaged("a directory", lsn, &error))?;
        }
        // What an image layer covers and does not have does not exist at its LSN. The layer that
        // says when it went may be gone, and one that says when it came may still be there.
        let spans = layers.iter().map(|layer| layer.span());
        let images: Vec<_> = spans.filter(|span| span.is_image).collect();
        let outdated = |key: &Key, at: Lsn| {
            images.iter().any(|image| image.keys.contains(key) && image.lsns.start > at)
        };
        newest.retain(|key, (at, _)| !outdated(key, *at));
        Ok(newest)
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

    /// A page that exists at `lsn`.
    pub(super) async fn page(&self, key: Key, lsn: Lsn) -> Result<Bytes, ReadError> {
        let what = || format!("{key:?}");
        let mut values = self.collect(key, lsn).await.map_err(|e| damaged(&what(), lsn, &e))?;
        let base = match values.last() {
            Some((_, Value::Image(image))) => Some(image.clone()),
            Some((_, Value::ZeroPage)) => Some(zero_page()),
            Some((_, Value::WalRecord { will_init: true, .. })) => None,
            Some(_) | None => {
                return Err(ReadError::Damaged {
                    what: what(),
                    lsn,
                    problem: "no base version was found in any layer".to_owned(),
                });
            }
        };
        if base.is_some() {
            values.pop();
        }
        values.reverse();
        let page = plan::rebuild(&*self.context.redo, key, base, values).await?;
        if page.len() != PAGE_SIZE {
            let problem = format!("it has {} bytes instead of {PAGE_SIZE}", page.len());
            return Err(ReadError::Damaged { what: what(), lsn, problem });
        }
        Ok(page)
    }

    /// Size in blocks of a fork at `lsn`; `None` when it does not exist.
    pub(super) async fn fork_size(
        &self,
        rel: RelTag,
        lsn: Lsn,
    ) -> Result<Option<BlockNumber>, ReadError> {
        let cached = self.mutable.borrow().sizes.rel(rel);
        if let Some(size) = cached.filter(|size| size.since <= lsn) {
            return Ok(size.blocks);
        }
        Ok(self.stored_u32(Key::rel_size(rel), lsn).await?.map(|(_, blocks)| blocks))
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

/// 8,192 zeros.
pub(super) fn zero_page() -> Bytes {
    static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    Bytes::from_static(&ZEROS)
}

fn damaged(what: &str, lsn: Lsn, error: &LayerError) -> ReadError {
    ReadError::Damaged { what: what.to_owned(), lsn, problem: error.to_string() }
}

fn check_rel(rel: RelTag) -> Result<(), ReadError> {
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
        let lsn = self.effective_lsn(lsn).await?;
        let blocks = self.fork_size(rel, lsn).await;
        let blocks = self.still_retained(lsn, blocks)?.unwrap_or(0);
        if block >= blocks {
            return Ok(zero_page());
        }
        let result = self.page(Key::rel_block(rel, block), lsn).await;
        let result = self.still_retained(lsn, result);
        if let Err(error) = &result {
            tracing::error!(tenant = %self.tenant, timeline = %self.id, "{error}");
        }
        result
    }

    async fn rel_exists(&self, rel: RelTag, lsn: RequestLsn) -> Result<bool, ReadError> {
        check_rel(rel)?;
        let lsn = self.effective_lsn(lsn).await?;
        let size = self.fork_size(rel, lsn).await;
        Ok(self.still_retained(lsn, size)?.is_some())
    }

    async fn rel_size(&self, rel: RelTag, lsn: RequestLsn) -> Result<BlockNumber, ReadError> {
        check_rel(rel)?;
        let lsn = self.effective_lsn(lsn).await?;
        let size = self.fork_size(rel, lsn).await;
        Ok(self.still_retained(lsn, size)?.unwrap_or(0))
    }

    async fn db_size(&self, db: u32, lsn: RequestLsn) -> Result<i64, ReadError> {
        let lsn = self.effective_lsn(lsn).await?;
        let bytes = self.database_bytes(db, lsn).await;
        self.still_retained(lsn, bytes)
    }

    async fn slru_segment(
        &self,
        kind: SlruKind,
        segment: u32,
        lsn: RequestLsn,
    ) -> Result<Bytes, ReadError> {
        let lsn = self.effective_lsn(lsn).await?;
        let pages = self.slru_pages(kind, segment, lsn).await;
        self.still_retained(lsn, pages)
    }
}

impl<I: Io> Timeline<I> {
    async fn database_bytes(&self, db: u32, lsn: Lsn) -> Result<i64, ReadError> {
        let mut blocks = 0i64;
        for rel in self.database_forks(DEFAULT_TABLESPACE, db, lsn).await? {
            blocks += i64::from(self.fork_size(rel, lsn).await?.unwrap_or(0));
        }
        Ok(blocks * PAGE_SIZE as i64)
    }

    async fn slru_pages(&self, kind: SlruKind, segment: u32, lsn: Lsn) -> Result<Bytes, ReadError> {
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
        Ok(out.freeze())
    }
}
