//! Buffers that a core's connections share.
//!
//! A connection that waits for its client holds none: bytes are received into one buffer of the
//! core and moved on from there in the same step, and the buffer in which replies are collected
//! goes back when they are written and is lent to whoever is next. Ten thousand idle connections
//! cost what their tasks and sockets take.

use std::cell::RefCell;
use std::io::{IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use futures_util::AsyncRead;

use crate::limits::{
    CONNECTION_READ_BYTES, CONNECTION_REPLY_BYTES_MAX, PAGE_REQUESTS_CONCURRENT_MAX,
    REPLY_BUFFERS_SPARE_MAX,
};
use crate::server::socket::Stream;

/// The buffers of one core.
pub struct Buffers {
    received: RefCell<Vec<u8>>,
    /// Empty, but with memory.
    spare: RefCell<Vec<BytesMut>>,
    /// Empty, but with memory.
    pages: RefCell<Vec<Page>>,
}

/// A page that is part of a reply without being copied: it goes behind so many bytes of the
/// buffer in which replies are collected.
pub struct Page {
    /// Those bytes.
    pub behind: usize,
    /// The page.
    pub bytes: Bytes,
}

/// Replies of which the pages stand elsewhere, as the pieces that make them up.
fn pieces<'a>(head: &'a [u8], pages: &'a [Page]) -> impl Iterator<Item = &'a [u8]> {
    let starts = std::iter::once(0).chain(pages.iter().map(|page| page.behind));
    let with_page = starts.zip(pages).flat_map(|(start, page)| {
        [head.get(start..page.behind).unwrap_or_default(), &page.bytes[..]]
    });
    let end = pages.last().map_or(0, |page| page.behind);
    with_page.chain(head.get(end..)).filter(|piece| !piece.is_empty())
}

/// What is left of replies of which `sent` bytes are gone, in one piece.
fn rest_of(head: &[u8], pages: &[Page], mut sent: usize) -> BytesMut {
    let mut rest = BytesMut::with_capacity(pieces(head, pages).map(<[u8]>::len).sum());
    for piece in pieces(head, pages) {
        let gone = sent.min(piece.len());
        rest.extend_from_slice(piece.get(gone..).unwrap_or_default());
        sent -= gone;
    }
    rest
}

impl Default for Buffers {
    fn default() -> Self {
        let received = RefCell::new(vec![0; CONNECTION_READ_BYTES]);
        Buffers { received, spare: RefCell::default(), pages: RefCell::default() }
    }
}

impl Buffers {
    /// Appends the bytes that `stream` has to `unread`; their number is 0 at its end.
    ///
    /// While there are none, what the connection holds of `unread` and `unwritten` is given back,
    /// if there is nothing in it.
    pub fn poll_read<S: AsyncRead + Unpin>(
        &self,
        stream: &mut S,
        context: &mut Context<'_>,
        unread: &mut BytesMut,
        unwritten: &mut BytesMut,
    ) -> Poll<Result<usize>> {
        let mut received = self.received.borrow_mut();
        match Pin::new(stream).poll_read(context, &mut received) {
            Poll::Ready(Ok(length)) => {
                unread.extend_from_slice(received.get(..length).unwrap_or_default());
                if unwritten.capacity() == 0 {
                    *unwritten = self.spare.borrow_mut().pop().unwrap_or_default();
                }
                Poll::Ready(Ok(length))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                if unread.is_empty() {
                    *unread = BytesMut::new();
                }
                if unwritten.is_empty() {
                    self.give_back(std::mem::take(unwritten));
                }
                Poll::Pending
            }
        }
    }

    /// Room for the pages of some replies; empty.
    pub fn take_pages(&self) -> Vec<Page> {
        self.pages.take()
    }

    /// Sends `unwritten` with `pages`, if there are any, as far as that goes without waiting, and
    /// leaves the rest in `unwritten`, in one piece. The pages' room goes back.
    ///
    /// # Errors
    /// Those of the write.
    pub fn send_now<S: Stream>(
        &self,
        stream: &mut S,
        unwritten: &mut BytesMut,
        mut pages: Vec<Page>,
    ) -> Result<()> {
        assert!(pages.len() <= PAGE_REQUESTS_CONCURRENT_MAX, "{} pages at once", pages.len());
        if pages.is_empty() {
            self.pages.replace(pages);
            return Ok(());
        }
        let mut slices = [IoSlice::new(&[]); 2 * PAGE_REQUESTS_CONCURRENT_MAX + 1];
        let (mut used, mut total) = (0, 0);
        for (slice, piece) in slices.iter_mut().zip(pieces(unwritten, &pages)) {
            *slice = IoSlice::new(piece);
            (used, total) = (used + 1, total + piece.len());
        }
        let sent = stream.send_now(slices.get(..used).unwrap_or_default());
        match sent {
            Ok(sent) if sent == total => unwritten.clear(),
            Ok(sent) => *unwritten = rest_of(unwritten, &pages, sent),
            Err(_) => {}
        }
        pages.clear();
        self.pages.replace(pages);
        sent.map(|_| ())
    }

    fn give_back(&self, buffer: BytesMut) {
        let mut spare = self.spare.borrow_mut();
        let fits = (1..=2 * CONNECTION_REPLY_BYTES_MAX).contains(&buffer.capacity());
        if fits && spare.len() < REPLY_BUFFERS_SPARE_MAX {
            spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::task::Waker;

    use super::*;

    /// Pieces to be read; waits where there is none.
    struct Pieces(VecDeque<Option<&'static [u8]>>);

    impl AsyncRead for Pieces {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            out: &mut [u8],
        ) -> Poll<Result<usize>> {
            match self.0.pop_front() {
                Some(Some(piece)) => {
                    out[..piece.len()].copy_from_slice(piece);
                    Poll::Ready(Ok(piece.len()))
                }
                _ => Poll::Pending,
            }
        }
    }

    #[test]
    fn who_waits_holds_nothing_and_loses_nothing() {
        let buffers = Buffers::default();
        let mut context = Context::from_waker(Waker::noop());
        let mut stream = Pieces([Some(&b"ab"[..]), None, Some(b"cd"), None].into());
        let (mut unread, mut unwritten) = (BytesMut::new(), BytesMut::new());
        let mut poll = |unread: &mut BytesMut, unwritten: &mut BytesMut| {
            buffers.poll_read(&mut stream, &mut context, unread, unwritten)
        };
        assert!(matches!(poll(&mut unread, &mut unwritten), Poll::Ready(Ok(2))));
        unwritten.extend_from_slice(b"reply");
        // Half a message and an unsent reply stay.
        assert!(poll(&mut unread, &mut unwritten).is_pending());
        assert_eq!((&unread[..], &unwritten[..]), (&b"ab"[..], &b"reply"[..]));
        let memory = unwritten.as_ptr();
        unread.clear();
        unwritten.clear();
        assert!(matches!(poll(&mut unread, &mut unwritten), Poll::Ready(Ok(2))));
        assert_eq!(&unread[..], b"cd");
        unread.clear();
        assert!(poll(&mut unread, &mut unwritten).is_pending());
        assert_eq!((unread.capacity(), unwritten.capacity()), (0, 0));
        // Another connection gets the buffer.
        let mut other = Pieces([Some(&b"x"[..])].into());
        let _ = buffers.poll_read(&mut other, &mut context, &mut unread, &mut unwritten);
        assert!(unwritten.capacity() > 0 && unwritten.as_ptr() == memory);
    }

    #[test]
    fn what_was_not_sent_is_left_wherever_the_cut_is() {
        let page = |behind, text: &'static [u8]| Page { behind, bytes: Bytes::from_static(text) };
        let cases = [
            (&b"abcdef"[..], vec![page(2, b"PAGE"), page(3, b"NEXT")], &b"abPAGEcNEXTdef"[..]),
            (b"ab", vec![page(1, b"P"), page(2, b"Q")], b"aPbQ"),
            (b"ab", vec![page(0, b"P")], b"Pab"),
            (b"ab", vec![], b"ab"),
            (b"", vec![], b""),
        ];
        for (head, pages, whole) in cases {
            assert_eq!(pieces(head, &pages).collect::<Vec<_>>().concat(), whole);
            for sent in 0..=whole.len() {
                assert_eq!(rest_of(head, &pages, sent), whole[sent..], "{sent}");
            }
        }
    }

    #[test]
    fn spare_buffers_are_few() {
        let buffers = Buffers::default();
        for _ in 0..100 {
            buffers.give_back(BytesMut::with_capacity(10));
            buffers.give_back(BytesMut::with_capacity(4 * CONNECTION_REPLY_BYTES_MAX));
            buffers.give_back(BytesMut::new());
        }
        let spare = buffers.spare.borrow();
        assert_eq!(spare.len(), REPLY_BUFFERS_SPARE_MAX);
        assert!(spare.iter().all(|one| (1..100).contains(&one.capacity())));
    }
}
