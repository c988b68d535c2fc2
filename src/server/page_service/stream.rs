//! A page stream: requests in, replies out, in the same order.
//!
//! Requests that came in together are worked on together, up to [`PAGE_REQUESTS_CONCURRENT_MAX`]
//! at once, once the core's [`admission`](crate::server::admission) lets them in. Replies go out in
//! order, as many in one write as are ready, and none waits for a later one.

use std::pin::pin;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::{Either, select};
use futures_util::stream::FuturesOrdered;

use super::request::{ANY_HEADER, Reply, handle};
use super::{Conn, Fault, Wanted, shutdown};
use crate::limits::{CONNECTION_REPLY_BYTES_MAX, PAGE_REQUESTS_CONCURRENT_MAX};
use crate::server::admission::Permit;
use crate::server::counters::count;
use crate::server::fair::{Ask, Class};
use crate::server::page_protocol::{
    PAGE_BYTES, REPLY_OVERHEAD_BYTES_MAX, Version, encode_error, encode_response,
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

    /// Answers the next `requests` messages, which are whole, all of them at once.
    async fn answer(
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
