//! Images within delta layers: where a page has many records since its newest base, the page as
//! it is after the last of them is put behind them, at their LSN.
//!
//! The records stay, so every LSN can still be read; a read at or after the image stops there. A
//! page that changes often has images so, and one that does not costs nothing.
//!
//! An image stands after all values of its LSN: one WAL record may give several.
//!
//! A merge may reach across an image layer, and garbage collection may have left a hole in the
//! records below that: what the image layer has counts as read, and the row of records begins
//! anew behind it.

use crate::base::{Key, KeyKind, Lsn, LsnRange, Value};
use crate::io::Io;
use crate::layers::Values;
use crate::limits::COMPACT_HISTORY_IMAGE_BYTES;

use super::job::Pages;

/// Where images may be and when they are due.
#[derive(Clone, Copy)]
pub(super) struct Bounds<'a> {
    /// First LSN of images: every page can be rebuilt from there on.
    pub(super) start: Lsn,
    /// LSNs of the values.
    pub(super) lsns: &'a LsnRange,
    /// Records of a page behind its newest base that need no image.
    pub(super) chain_max: usize,
}

impl Bounds<'_> {
    /// True if a row of so many values of a key may need an image.
    pub(super) fn may_need_image(&self, key: Key, count: usize) -> bool {
        count > self.chain_max && key.kind() != KeyKind::Metadata
    }
}

/// The values of one page since its newest base.
pub(super) struct Chain<'a> {
    bounds: Bounds<'a>,
    /// LSNs of image layers that lie above the values so far, the lowest last.
    images: Vec<Lsn>,
    /// They begin with a base if `has_base`; otherwise older layers have it, below this LSN.
    values: Values,
    below: Lsn,
    bytes: usize,
    has_base: bool,
    /// The page cannot be rebuilt.
    given_up: bool,
}

impl<'a> Chain<'a> {
    /// No values of `key` yet.
    pub(super) fn new<I: Io>(bounds: Bounds<'a>, pages: &Pages<I>, key: Key) -> Self {
        let images = pages.points.image_lsns(key, bounds.lsns);
        let below = bounds.lsns.start;
        let values = Vec::new();
        Chain { bounds, images, values, below, bytes: 0, has_base: false, given_up: false }
    }

    fn clear(&mut self) {
        self.values.clear();
        self.bytes = 0;
        self.has_base = false;
    }

    fn push(&mut self, lsn: Lsn, value: &Value) {
        while let Some(image) = self.images.pop_if(|image| *image < lsn) {
            self.clear();
            self.below = Lsn(image.0.saturating_add(1));
            self.given_up = false;
        }
        if value.is_base() {
            self.clear();
            self.has_base = true;
        }
        if !self.given_up {
            self.bytes += value.encoded_len();
            self.values.push((lsn, value.clone()));
        }
    }

    fn is_long(&self) -> bool {
        self.values.len() > self.bounds.chain_max
    }

    fn is_heavy(&self) -> bool {
        self.is_long() && self.bytes >= COMPACT_HISTORY_IMAGE_BYTES
    }

    /// Takes more values of the page, all that there are of their last LSN, and gives them back
    /// with images between. `is_last` tells that no more will come.
    pub(super) async fn extend<I: Io>(
        &mut self,
        pages: &Pages<I>,
        key: Key,
        values: Values,
        is_last: bool,
    ) -> Values {
        let mut out = Vec::with_capacity(values.len() + 1);
        let mut rest = values.into_iter().peekable();
        while let Some((lsn, value)) = rest.next() {
            self.push(lsn, &value);
            out.push((lsn, value));
            let next = rest.peek().map(|(lsn, _)| *lsn);
            let is_end = is_last && next.is_none();
            let due = self.is_heavy() || is_end && self.is_long();
            if !due || next == Some(lsn) || lsn < self.bounds.start {
                continue;
            }
            match self.page(pages, key).await {
                Some(page) => {
                    self.push(lsn, &page);
                    out.push((lsn, page));
                }
                None => {
                    self.clear();
                    self.given_up = true;
                }
            }
        }
        out
    }

    /// The page after all values.
    async fn page<I: Io>(&self, pages: &Pages<I>, key: Key) -> Option<Value> {
        let mut values = Vec::new();
        if !self.has_base {
            match pages.points.collect(key, self.below).await {
                Ok(found) => values = found,
                Err(error) => {
                    pages.failed(key, &error);
                    return None;
                }
            }
            values.reverse();
        }
        values.extend(self.values.iter().cloned());
        match pages.rebuild(key, values).await {
            Ok(page) => Some(Value::Image(page)),
            Err(error) => {
                pages.failed(key, &error);
                None
            }
        }
    }
}
