//! One connection of a load generator: requests that wait to be sent, requests that wait for their
//! replies. Never blocks.
//!
//! Closed loop: as soon as a reply is there, the next request goes out, so that there are always
//! `depth` of them. Open loop: requests have their times, drawn so that they come at random at the
//! wanted rate, whatever the server does; a request for which there is no room at its time goes
//! later, and its latency counts from its time all the same.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fastrand::Rng;

use super::distribution::Keys;
use super::pages::{PageSpace, problem_of};
use super::report::Tally;
use crate::limits::PAGE_CLIENT_MESSAGE_BYTES_MAX;
use crate::server::page_protocol::{
    Answer, Header, Request, Version, decode_response, encode_request,
};
use crate::shard::reader::RequestLsn;

/// What all clients have in common.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Which messages.
    pub version: Version,
    /// LSNs of every request.
    pub lsn: RequestLsn,
    /// The page must not be newer than this.
    pub newest: Option<crate::base::Lsn>,
    /// Requests in flight.
    pub depth: usize,
    /// Open loop: requests of one client in one second.
    pub rate: Option<f64>,
    /// A reply that comes later after its time has missed it.
    pub deadline: Duration,
}

/// See the module's text.
pub struct Client<'a> {
    stream: TcpStream,
    manner: Manner,
    pages: &'a PageSpace,
    keys: Keys,
    rng: Rng,
    next_id: u64,
    /// Open loop: when the next request is due.
    due: Instant,
    /// When each request should have left, in order.
    in_flight: VecDeque<(Request, Instant)>,
    out: BytesMut,
    input: BytesMut,
}

impl<'a> Client<'a> {
    /// A client on an open page stream. `keys` draws from `pages`.
    ///
    /// # Errors
    /// The socket's.
    pub fn new(
        stream: TcpStream,
        manner: Manner,
        pages: &'a PageSpace,
        keys: Keys,
        rng: Rng,
    ) -> std::io::Result<Client<'a>> {
        stream.set_nonblocking(true)?;
        let mut client = Client {
            stream,
            manner,
            pages,
            keys,
            rng,
            next_id: 1,
            due: Instant::now(),
            in_flight: VecDeque::new(),
            out: BytesMut::new(),
            input: BytesMut::with_capacity(1 << 16),
        };
        client.advance_due();
        Ok(client)
    }

    /// The socket, to wait for.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Bytes wait to be sent.
    pub fn is_sending(&self) -> bool {
        !self.out.is_empty()
    }

    /// Requests without a reply.
    pub fn unanswered(&self) -> usize {
        self.in_flight.len()
    }

    /// When there is something to do even if the socket is silent.
    pub fn wakes_at(&self) -> Option<Instant> {
        (self.manner.rate.is_some() && self.in_flight.len() < self.manner.depth).then_some(self.due)
    }

    /// Moves the time of the next request on: exponential pauses make Poisson arrivals.
    fn advance_due(&mut self) {
        if let Some(rate) = self.manner.rate {
            let pause = -(1.0 - self.rng.f64()).ln() / rate;
            self.due += Duration::from_secs_f64(pause.min(1e6));
        }
    }

    /// Queues what is to be sent now, and sends it as far as the socket takes it.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn send(&mut self, now: Instant) -> Result<(), String> {
        while self.in_flight.len() < self.manner.depth {
            let due = match self.manner.rate {
                None => now,
                Some(_) if self.due <= now => self.due,
                Some(_) => break,
            };
            self.advance_due();
            let Some(query) = self.pages.query(self.keys.draw(&mut self.rng)) else { break };
            let id = if self.manner.version == Version::V3 { self.next_id } else { 0 };
            self.next_id = self.next_id.wrapping_add(1);
            let request = Request { header: Header { id, lsn: self.manner.lsn }, query };
            let mut message = BytesMut::new();
            encode_request(self.manner.version, &request, &mut message);
            self.out.put_u8(b'd');
            self.out.put_u32(message.len() as u32 + 4);
            self.out.put_slice(&message);
            self.in_flight.push_back((request, due));
        }
        self.flush()
    }

    /// Sends what waits, as far as the socket takes it.
    ///
    /// # Errors
    /// The connection is gone.
    pub fn flush(&mut self) -> Result<(), String> {
        while !self.out.is_empty() {
            match self.stream.write(&self.out) {
                Ok(0) => return Err("the server takes no more bytes".to_owned()),
                Ok(sent) => self.out.advance(sent),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("send: {error}")),
            }
        }
        Ok(())
    }

    /// Takes in what has arrived.
    ///
    /// # Errors
    /// The connection is gone, or what comes is no page stream.
    pub fn receive(&mut self, tally: &mut Tally) -> Result<(), String> {
        let mut buffer = [0; 1 << 16];
        match self.stream.read(&mut buffer) {
            Ok(0) => return Err("the server closed the connection".to_owned()),
            Ok(len) => self.input.extend_from_slice(buffer.get(..len).unwrap_or_default()),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Ok(());
            }
            Err(error) => return Err(format!("receive: {error}")),
        }
        let now = Instant::now();
        while let Some((tag, body)) = take_message(&mut self.input)? {
            match tag {
                b'd' => self.reply(&body, now, tally)?,
                b'E' => return Err(format!("the server ends: {}", printable(&body))),
                b'N' | b'S' => {}
                tag => return Err(format!("unexpected message '{}'", tag.escape_ascii())),
            }
        }
        Ok(())
    }

    fn reply(&mut self, body: &Bytes, now: Instant, tally: &mut Tally) -> Result<(), String> {
        let (request, due) = self.in_flight.pop_front().ok_or("a reply to no request")?;
        let latency = now.saturating_duration_since(due);
        let response = decode_response(self.manner.version, body);
        match response.and_then(|response| response.answer_to(&request)) {
            Err(error) => {
                tally.wrong += 1;
                tally.say(|| format!("reply to {:?}: {error}", request.query));
            }
            Ok(Answer::GetPage(page)) => match problem_of(&page, self.manner.newest) {
                Some(problem) => {
                    tally.wrong += 1;
                    tally.say(|| format!("reply to {:?}: {problem}", request.query));
                }
                None => {
                    let is_zero = crate::base::page::page_is_new(&page);
                    tally.zero_pages += u64::from(is_zero);
                    tally.missed += u64::from(latency > self.manner.deadline);
                    tally.done(latency);
                }
            },
            Ok(Answer::Error(text)) => {
                tally.errors += 1;
                tally.say(|| format!("{:?}: {text}", request.query));
            }
            Ok(other) => {
                tally.wrong += 1;
                tally.say(|| format!("{:?} is answered by {other:?}", request.query));
            }
        }
        Ok(())
    }
}

/// Takes a message off the front: tag and body.
fn take_message(input: &mut BytesMut) -> Result<Option<(u8, Bytes)>, String> {
    let Some(&[tag, ref length @ ..]) = input.first_chunk::<5>() else { return Ok(None) };
    let length = u32::from_be_bytes(*length) as usize;
    if !(4..=PAGE_CLIENT_MESSAGE_BYTES_MAX + 4).contains(&length) {
        return Err(format!("a message of {length} bytes"));
    }
    if input.len() < 1 + length {
        return Ok(None);
    }
    let mut message = input.split_to(1 + length);
    message.advance(5);
    Ok(Some((tag, message.freeze())))
}

fn printable(body: &[u8]) -> String {
    String::from_utf8_lossy(body).replace('\0', " ").trim().to_owned()
}
