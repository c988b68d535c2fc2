//! A page stream: requests in, replies out, in the same order.
//!
//! Requests that came in together are worked on together, once the core's
//! [`admission`](crate::server::admission) lets them in, and beside those that came before: up to
//! [`PAGE_REQUESTS_CONCURRENT_MAX`] of a connection are under way at once. Replies go out in order,
//! as many in one write as are ready, and none waits for a later one.

use std::future::poll_fn;
use std::io::{Error, ErrorKind};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes, BytesMut};
use futures_channel::oneshot;
use futures_util::StreamExt;
use futures_util::future::LocalBoxFuture;
use futures_util::stream::FuturesOrdered;

use super::request::{ANY_HEADER, Reply, handle};
use super::{Conn, Fault, Service, Session, Wanted, shutdown};
use crate::limits::{
    CONNECTION_READ_BYTES, CONNECTION_REPLY_BYTES_MAX, PAGE_REQUESTS_CONCURRENT_MAX,
};
use crate::server::admission::Permit;
use crate::server::buffers::Page;
use crate::server::counters::count;
use crate::server::fair::{Ask, Class};
use crate::server::page_protocol::{
    Answer, PAGE_BYTES, Query, Request, Version, decode_request, encode_error, encode_page_head,
    encode_response,
};
use crate::server::pq::{self, Message, SqlState};
use crate::server::socket::Stream;
use crate::shard::reader::{PageBackend, TimelineReader};

/// A stream that is open: what came in and is not answered yet.
struct Window<'s, B: PageBackend> {
    service: &'s Service<B>,
    wanted: Wanted,
    version: Version,
    /// Whole requests that wait in the session.
    there: usize,
    class: Class,
    /// The next of them, if they are in line for a permit.
    line: Option<Line<B>>,
    /// Those that are being worked on.
    answers: FuturesOrdered<LocalBoxFuture<'s, Reply>>,
    /// The timeline that they are of. It is looked up again when nothing is under way: one that is
    /// idle may be closed, and is opened again then.
    timeline: Option<Rc<B::Timeline>>,
    /// Pages of replies whose heads stand in the session.
    pages: Vec<Page>,
    /// The client sends no more.
    ended: bool,
}

/// Requests in line.
struct Line<B: PageBackend> {
    admitted: oneshot::Receiver<Permit>,
    requests: usize,
    timeline: Rc<B::Timeline>,
}

/// What a stream waits for.
enum Event {
    Answer(Reply),
    Admitted(Permit),
    Read(Result<usize, Error>),
    Stop,
}

impl<B: PageBackend> Window<'_, B> {
    /// Requests that can be taken in now.
    fn room(&self) -> usize {
        let is_closed = self.line.is_some() || (self.timeline.is_none() && self.is_busy());
        if is_closed { 0 } else { PAGE_REQUESTS_CONCURRENT_MAX - self.answers.len() }
    }

    /// Puts the reply to a request for a page into `out`, but for the page, which is sent from where
    /// it stands.
    fn put_page(&mut self, request: &Request, bytes: Bytes, out: &mut BytesMut) {
        assert_eq!(bytes.len(), PAGE_BYTES, "a page has the length of a page");
        pq::put_message_head(out, b'd', PAGE_BYTES, |out| {
            encode_page_head(self.version, request, out);
        });
        if self.pages.capacity() == 0 {
            self.pages = self.service.buffers.take_pages();
        }
        self.pages.push(Page { behind: out.len(), bytes });
    }

    /// Requests are under way.
    fn is_busy(&self) -> bool {
        !self.answers.is_empty()
    }
}

impl<S, B> Conn<'_, S, B>
where
    S: Stream,
    B: PageBackend,
{
    /// Serves a page stream; false when the connection is over, true when the stream alone is.
    pub(super) async fn open_stream(
        &mut self,
        wanted: Wanted,
        version: Version,
    ) -> Result<bool, Fault> {
        if self.find(&wanted).await?.is_none() {
            return Ok(true);
        }
        pq::put_copy_both(&mut self.session.unwritten);
        let mut window = Window {
            service: self.service,
            wanted,
            version,
            there: 0,
            class: Class::Foreground,
            line: None,
            answers: FuturesOrdered::new(),
            timeline: None,
            pages: Vec::new(),
            ended: false,
        };
        let end = self.run_stream(&mut window).await;
        // Whatever is said now is said behind all replies.
        self.send(&mut window)?;
        end
    }

    async fn run_stream(&mut self, window: &mut Window<'_, B>) -> Result<bool, Fault> {
        loop {
            if window.there == 0 && window.room() > 0 {
                window.there = pq::copy_data_count(&self.session.unread);
                // Those that it waits for already belong to the same reading ahead.
                window.class = Class::of_arrival(window.answers.len() + window.there);
            }
            if window.there.min(window.room()) > 0 {
                if !self.take_in(window).await? {
                    return Ok(true);
                }
                continue;
            }
            if window.is_busy() || window.line.is_some() {
                self.go_on(window).await?;
                continue;
            }
            // Before a message that is no request, what came before it is answered.
            match pq::decode_message(&mut self.session.unread)? {
                None => {
                    window.timeline = None;
                    self.send_all(window).await?;
                    if window.ended || !self.read().await? {
                        return Ok(false);
                    }
                }
                // They mean nothing within COPY: drivers send them with the command that opened it.
                Some(Message::Flush | Message::Sync) => {}
                Some(Message::Terminate) => {
                    self.send_all(window).await?;
                    return Ok(false);
                }
                Some(other) => {
                    let text = format!("unexpected message {} during COPY", other.name());
                    self.end_with_error(&window.wanted, SqlState::PROTOCOL_VIOLATION, &text);
                    return Ok(true);
                }
            }
        }
    }

    /// Asks for leave to work on the next requests, and begins with them or puts them in line; false
    /// if the stream has ended.
    async fn take_in(&mut self, window: &mut Window<'_, B>) -> Result<bool, Fault> {
        let service = window.service;
        let timeline = match (&window.timeline, window.is_busy()) {
            (Some(timeline), true) => timeline.clone(),
            _ => match self.find(&window.wanted).await? {
                Some(timeline) => timeline,
                None => return Ok(false),
            },
        };
        let requests = window.there.min(window.room());
        let (tenant, class) = (window.wanted.tenant, window.class);
        let ask = Ask { tenant, quota: timeline.quota(), class, pages: requests as u64 };
        window.timeline = Some(timeline.clone());
        let now = (service.now)();
        match service.admission.try_admit(&ask, now) {
            Some(permit) => self.begin(window, requests, timeline, permit).await?,
            None => {
                let admitted = service.admission.stand_in_line(&ask, now);
                window.line = Some(Line { admitted, requests, timeline });
            }
        }
        Ok(true)
    }

    /// Begins with the next `requests`, which are whole.
    async fn begin(
        &mut self,
        window: &mut Window<'_, B>,
        requests: usize,
        timeline: Rc<B::Timeline>,
        permit: Permit,
    ) -> Result<(), Fault> {
        window.there -= requests;
        let (service, version) = (window.service, window.version);
        let mut rest = requests;
        if !window.is_busy() {
            self.send(window)?;
            rest -= self.answer_held(window, &timeline, requests);
            self.send(window)?;
        }
        let permit = Rc::new(permit);
        while rest > 0
            && let Some(Message::CopyData(message)) = pq::decode_message(&mut self.session.unread)?
        {
            let (timeline, permit) = (timeline.clone(), permit.clone());
            window.answers.push_back(Box::pin(async move {
                let reply = handle(service, &timeline, version, &message).await;
                drop(permit);
                reply
            }));
            rest -= 1;
        }
        drop(permit);
        self.send_many(window).await?;
        // Pages that are held never wait, nor does a socket that always has more requests.
        glommio::yield_if_needed().await;
        if service.stop.is_closed() { Err(shutdown()) } else { Ok(()) }
    }

    /// Waits for the next event, and does what it asks for. Replies that are ready do not wait.
    async fn go_on(&mut self, window: &mut Window<'_, B>) -> Result<(), Fault> {
        let now = poll_fn(|context| Poll::Ready(self.poll_event(window, context))).await;
        let event = match now {
            Poll::Ready(event) => event,
            Poll::Pending if !self.session.unwritten.is_empty() => {
                return self.send_all(window).await;
            }
            Poll::Pending => poll_fn(|context| self.poll_event(window, context)).await,
        };
        match event {
            Event::Answer(reply) => {
                self.put_reply(window, reply)?;
                self.send_many(window).await?;
            }
            Event::Admitted(permit) => {
                if let Some(Line { requests, timeline, .. }) = window.line.take() {
                    self.begin(window, requests, timeline, permit).await?;
                }
            }
            Event::Read(Ok(length)) => window.ended = length == 0,
            // It is the client who waits, not the node.
            Event::Read(Err(error)) if error.kind() == ErrorKind::TimedOut => {}
            Event::Read(Err(error)) => return Err(error.into()),
            Event::Stop => return Err(shutdown()),
        }
        Ok(())
    }

    fn poll_event(&mut self, window: &mut Window<'_, B>, context: &mut Context<'_>) -> Poll<Event> {
        if window.is_busy()
            && let Poll::Ready(Some(reply)) = window.answers.poll_next_unpin(context)
        {
            return Poll::Ready(Event::Answer(reply));
        }
        if let Some(line) = &mut window.line
            && let Poll::Ready(admitted) = Pin::new(&mut line.admitted).poll(context)
        {
            // Nobody admits any more when the core stops.
            return Poll::Ready(admitted.map_or(Event::Stop, Event::Admitted));
        }
        if self.stop.poll_next_unpin(context).is_ready() {
            return Poll::Ready(Event::Stop);
        }
        let Session { unread, unwritten, .. } = &mut self.session;
        // What is ready is sent first, and what cannot be taken in is left to the socket.
        let wants_more = unwritten.is_empty()
            && window.there == 0
            && window.room() > 0
            && unread.len() < CONNECTION_READ_BYTES;
        if !wants_more || window.ended {
            return Poll::Pending;
        }
        let buffers = &window.service.buffers;
        buffers.poll_read(self.stream, context, unread, unwritten).map(Event::Read)
    }

    /// Sends the replies that have pages, as far as that goes without waiting.
    fn send(&mut self, window: &mut Window<'_, B>) -> Result<(), Fault> {
        if window.pages.is_empty() {
            return Ok(());
        }
        let pages = std::mem::take(&mut window.pages);
        let unwritten = &mut self.session.unwritten;
        self.service.buffers.send_now(self.stream, unwritten, pages).map_err(Fault::Io)
    }

    /// Sends all replies that are ready.
    async fn send_all(&mut self, window: &mut Window<'_, B>) -> Result<(), Fault> {
        self.send(window)?;
        self.flush().await
    }

    /// The same, if they are many.
    async fn send_many(&mut self, window: &mut Window<'_, B>) -> Result<(), Fault> {
        match self.session.unwritten.len() > CONNECTION_REPLY_BYTES_MAX {
            true => self.send_all(window).await,
            false => Ok(()),
        }
    }

    /// Answers up to `requests` messages in one step, up to the first that is not for a page that
    /// is held; returns their number. What is wrong with a message is not said here.
    fn answer_held(
        &mut self,
        window: &mut Window<'_, B>,
        timeline: &B::Timeline,
        requests: usize,
    ) -> usize {
        let Session { unread, unwritten, .. } = &mut self.session;
        let start = (self.service.now)();
        let (mut rest, mut answered) = (&unread[..], 0);
        while answered < requests
            && let Some((message, behind)) = pq::split_copy_data(rest)
            && let Ok(request) = decode_request(window.version, message)
            && let Query::GetPage { rel, block } = request.query
            && let Some(bytes) = timeline.held_page(rel, block, request.header.lsn)
        {
            window.put_page(&request, bytes, unwritten);
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

    /// Puts a reply behind those that are ready.
    fn put_reply(&mut self, window: &mut Window<'_, B>, reply: Reply) -> Result<(), Fault> {
        let (version, out) = (window.version, &mut self.session.unwritten);
        match reply {
            Reply::Answer(request, Answer::GetPage(bytes)) => {
                window.put_page(&request, bytes, out);
                if window.pages.len() == PAGE_REQUESTS_CONCURRENT_MAX {
                    self.send(window)?;
                }
            }
            Reply::Answer(request, answer) => {
                if matches!(answer, Answer::Error(_)) {
                    // Perhaps the timeline has gone.
                    window.timeline = None;
                }
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
