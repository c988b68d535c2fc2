//! A page stream: requests in, replies out, in the same order.
//!
//! Requests that came in together are worked on together, up to [`PAGE_REQUESTS_CONCURRENT_MAX`]
//! at once, once the core's [`admission`](crate::server::admission) lets them in. Replies go out in
//! order, as many in one write as are ready, and none waits for a later one.

use std::pin::pin;

use bytes::{Buf, Bytes};
use futures_util::StreamExt;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesOrdered;

use super::request::{ANY_HEADER, Reply, handle};
use super::{Conn, Fault, Session, Wanted, shutdown};
use crate::limits::{CONNECTION_REPLY_BYTES_MAX, PAGE_REQUESTS_CONCURRENT_MAX};
use crate::server::admission::Permit;
use crate::server::buffers::Page;
use crate::server::counters::count;
use crate::server::fair::{Ask, Class};
use crate::server::page_protocol::{
    PAGE_BYTES, Query, REPLY_OVERHEAD_BYTES_MAX, Version, decode_request, encode_error,
    encode_page_head, encode_response,
};
use crate::server::pq::{self, Message, SqlState};
use crate::server::socket::Stream;
use crate::shard::reader::{PageBackend, TimelineReader};

impl<S, B> Conn<'_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    /// Serves a page stream; false when the connection is over, true when the stream alone is.
    ///
    /// The timeline is looked up for every batch of requests: one that is idle may be closed
    /// between two of them, and is opened again then.
    pub(super) async fn open_stream(
        &mut self,
        wanted: Wanted,
        version: Version,
    ) -> Result<bool, Fault> {
        if self.find(&wanted).await?.is_none() {
            return Ok(true);
        }
        pq::put_copy_both(&mut self.session.unwritten);
        // Requests in `unread` that were counted.
        let mut there = 0;
        let mut class = Class::Foreground;
        loop {
            if there == 0 {
                there = pq::copy_data_count(&self.session.unread);
                class = Class::of_arrival(there);
            }
            if there > 0 {
                let batch = there.min(PAGE_REQUESTS_CONCURRENT_MAX);
                let Some(timeline) = self.find(&wanted).await? else { return Ok(true) };
                let _permit = self.admit(&wanted, &*timeline, class, batch).await?;
                self.answer(version, &timeline, batch).await?;
                there -= batch;
                // Pages that are held never wait, nor does a socket that always has more requests.
                glommio::yield_if_needed().await;
                if self.service.stop.is_closed() {
                    return Err(shutdown());
                }
                continue;
            }
            // Before a message that is none, what came before it is answered.
            match pq::decode_message(&mut self.session.unread)? {
                None => {
                    self.flush().await?;
                    if !self.read().await? {
                        return Ok(false);
                    }
                }
                // They mean nothing within COPY: drivers send them with the command that opened it.
                Some(Message::Flush | Message::Sync) => {}
                Some(Message::Terminate) => return Ok(false),
                Some(other) => {
                    let text = format!("unexpected message {} during COPY", other.name());
                    self.end_with_error(&wanted, SqlState::PROTOCOL_VIOLATION, &text);
                    return Ok(true);
                }
            }
        }
    }

    /// Waits for leave to work on the next requests. Replies that are ready do not wait with them.
    async fn admit(
        &mut self,
        wanted: &Wanted,
        timeline: &B::Timeline,
        class: Class,
        requests: usize,
    ) -> Result<Permit, Fault> {
        let service = self.service;
        let ask =
            Ask { tenant: wanted.tenant, quota: timeline.quota(), class, pages: requests as u64 };
        let now = (service.now)();
        if let Some(permit) = service.admission.try_admit(&ask, now) {
            return Ok(permit);
        }
        let admitted = service.admission.stand_in_line(&ask, now);
        self.flush().await?;
        match select(admitted, pin!(service.stop.recv())).await {
            Either::Left((Ok(permit), _)) => Ok(permit),
            Either::Left((Err(_), _)) | Either::Right(_) => Err(shutdown()),
        }
    }

    /// Answers the next `requests` messages, which are whole.
    async fn answer(
        &mut self,
        version: Version,
        timeline: &B::Timeline,
        requests: usize,
    ) -> Result<(), Fault> {
        let mut pages = self.service.buffers.take_pages();
        let answered = self.answer_held(version, timeline, requests, &mut pages);
        let unwritten = &mut self.session.unwritten;
        self.service.buffers.send_now(self.stream, unwritten, pages).map_err(Fault::Io)?;
        if self.session.unwritten.len() > CONNECTION_REPLY_BYTES_MAX {
            self.flush().await?;
        }
        match requests - answered {
            0 => Ok(()),
            rest => self.answer_rest(version, timeline, rest).await,
        }
    }

    /// Answers up to `requests` messages in one step, up to the first that is not for a page that
    /// is held; returns their number. The pages are left out of the replies, and go to `pages`. What
    /// is wrong with a message is not said here.
    fn answer_held(
        &mut self,
        version: Version,
        timeline: &B::Timeline,
        requests: usize,
        pages: &mut Vec<Page>,
    ) -> usize {
        let Session { unread, unwritten, .. } = &mut self.session;
        let start = (self.service.now)();
        let (mut rest, mut answered) = (&unread[..], 0);
        while answered < requests
            && let Some((message, behind)) = pq::split_copy_data(rest)
            && let Ok(request) = decode_request(version, message)
            && let Query::GetPage { rel, block } = request.query
            && let Some(bytes) = timeline.held_page(rel, block, request.header.lsn)
        {
            assert_eq!(bytes.len(), PAGE_BYTES, "a page has the length of a page");
            pq::put_message_head(unwritten, b'd', PAGE_BYTES, |out| {
                encode_page_head(version, &request, out);
            });
            pages.push(Page { behind: unwritten.len(), bytes });
            (rest, answered) = (behind, answered + 1);
        }
        let used = unread.len() - rest.len();
        unread.advance(used);
        if answered > 0 {
            let counters = &self.service.counters;
            let spent = (self.service.now)().saturating_sub(start);
            counters.get_page_requests.set(counters.get_page_requests.get() + answered as u64);
            counters.get_page_time.set(counters.get_page_time.get() + spent);
        }
        answered
    }

    /// Answers the next `requests` messages, which are whole, all of them at once.
    async fn answer_rest(
        &mut self,
        version: Version,
        timeline: &B::Timeline,
        requests: usize,
    ) -> Result<(), Fault> {
        let room = requests.saturating_mul(PAGE_BYTES + REPLY_OVERHEAD_BYTES_MAX);
        self.session.unwritten.reserve(room);
        let batch = self.take_requests(requests)?;
        let service = self.service;
        let mut answers: FuturesOrdered<_> =
            batch.iter().map(|message| handle(service, timeline, version, message)).collect();
        let mut stop = pin!(service.stop.recv());
        loop {
            let ready = futures_util::poll!(answers.next());
            let answer = match ready {
                std::task::Poll::Ready(answer) => answer,
                std::task::Poll::Pending => {
                    self.flush().await?;
                    match select(answers.next(), stop.as_mut()).await {
                        Either::Left((answer, _)) => answer,
                        Either::Right(_) => return Err(shutdown()),
                    }
                }
            };
            match answer {
                None => return Ok(()),
                Some(reply) => self.put_reply(version, reply)?,
            }
            if self.session.unwritten.len() > CONNECTION_REPLY_BYTES_MAX {
                self.flush().await?;
            }
        }
    }

    /// The next requests, which are all there.
    fn take_requests(&mut self, requests: usize) -> Result<Vec<Bytes>, Fault> {
        let mut batch = Vec::with_capacity(requests);
        while batch.len() < requests
            && let Some(Message::CopyData(bytes)) = pq::decode_message(&mut self.session.unread)?
        {
            batch.push(bytes);
        }
        Ok(batch)
    }

    fn put_reply(&mut self, version: Version, reply: Reply) -> Result<(), Fault> {
        let out = &mut self.session.unwritten;
        match reply {
            Reply::Answer(request, answer) => {
                pq::put_message(out, b'd', |out| encode_response(version, &request, &answer, out));
            }
            Reply::Malformed(error) => {
                count(&self.service.counters.request_errors);
                let text = error.to_string();
                // Without a header a version-3 client could not tell what this answers.
                let header = match (version, error.header) {
                    (_, Some(header)) => header,
                    (Version::V2, None) => ANY_HEADER,
                    (Version::V3, None) => {
                        return Err(Fault::Fatal(SqlState::PROTOCOL_VIOLATION, text));
                    }
                };
                pq::put_message(out, b'd', |out| encode_error(version, &header, &text, out));
            }
            Reply::Shutdown => return Err(shutdown()),
        }
        Ok(())
    }
}
