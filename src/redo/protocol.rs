//! The messages of the wal-redo process (`pgxn/neon_walredo`), over its stdin and stdout.
//!
//! Request: u8 tag, u32 big-endian length of the body, body. Numbers are big-endian.
//!
//! | tag | body | meaning |
//! |---|---|---|
//! | `B` | u8 fork, u32 tablespace, u32 database, u32 relation, u32 block (17 bytes) | begin |
//! | `P` | page, 8,192 bytes | the page before the first record |
//! | `A` | u64 LSN after the record, the record | apply |
//! | `G` | none | end, reply with the page |
//! | `H` | none | ping |
//! | `S` | u8: hint bits are logged | settings; the reply is that to a ping |
//!
//! Reply: u32 big-endian length of the payload, u8 status, payload. Replies come in the order of
//! the requests (`G`, `H` and `S` have one). After an error the process ends.
//!
//! | status | payload |
//! |---|---|
//! | 0 | page, 8,192 bytes |
//! | 1 | error text |
//! | 2 | pong: `walredo 2 postgres 150000 sandbox seccomp hint-bits on` |

use bytes::{Buf, BufMut, Bytes};

use super::{RedoError, RedoRequest, RedoSettings};
use crate::base::page::PAGE_SIZE;
use crate::base::{Lsn, RelNode};
use crate::limits::{REDO_RECORD_BYTES_MAX, REDO_TEXT_BYTES_MAX};

/// First words of the answer to a ping: the version of this protocol.
pub const PONG_PREFIX: &str = "walredo 2 postgres 15";

const REPLY_HEADER: usize = 5;
/// Longest reply, in bytes.
pub const REPLY_BYTES_MAX: usize = REPLY_HEADER + PAGE_SIZE;

const _: () = assert!(REDO_TEXT_BYTES_MAX <= PAGE_SIZE);

/// What the process answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reply {
    /// The page.
    Page(Bytes),
    /// Redo failed, with PostgreSQL's message; the process has ended.
    Error(String),
    /// Answer to a ping.
    Pong(String),
}

/// Why bytes are no reply.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the wal-redo process sent a reply of status {status} with {len} bytes")]
pub struct ReplyError {
    /// The status byte.
    pub status: u8,
    /// Length of the payload in bytes.
    pub len: usize,
}

fn put_message(out: &mut Vec<u8>, tag: u8, body: &[&[u8]]) {
    let len: usize = body.iter().map(|part| part.len()).sum();
    out.put_u8(tag);
    out.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    body.iter().for_each(|part| out.put_slice(part));
}

/// Appends a ping.
pub fn encode_ping(out: &mut Vec<u8>) {
    put_message(out, b'H', &[]);
}

/// Appends what binds a process to a cluster.
pub fn encode_settings(settings: RedoSettings, out: &mut Vec<u8>) {
    put_message(out, b'S', &[&[u8::from(settings.hint_bits_logged)]]);
}

/// Why bytes are no request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no request of redo: {problem} at byte {at}")]
pub struct RequestError {
    /// What is wrong.
    pub problem: &'static str,
    /// Where, counted from the start of the request.
    pub at: usize,
}

/// Takes the messages of one request apart again; for inputs that were kept on disk.
pub fn decode_request(bytes: &Bytes) -> Result<RedoRequest, RequestError> {
    let mut at = 0;
    let mut request: Option<RedoRequest> = None;
    loop {
        let fail = |problem| RequestError { problem, at };
        let header = bytes.get(at..).and_then(|rest| rest.first_chunk::<5>());
        let &[tag, a, b, c, d] = header.ok_or(fail("it is cut off"))?;
        let len = u32::from_be_bytes([a, b, c, d]) as usize;
        let start = at + 5;
        let end = start.checked_add(len).filter(|end| *end <= bytes.len());
        let mut body = bytes.slice(start..end.ok_or(fail("a message is cut off"))?);
        match (tag, &mut request) {
            (b'B', None) if len == 17 => {
                let fork = body.get_u8();
                let (spc, db, rel) = (body.get_u32(), body.get_u32(), body.get_u32());
                let rel = RelNode { spc, db, rel }.fork(fork);
                let block = body.get_u32();
                request = Some(RedoRequest { rel, block, base: None, records: Vec::new() });
            }
            (b'P', Some(request))
                if len == PAGE_SIZE && request.base.is_none() && request.records.is_empty() =>
            {
                request.base = Some(body);
            }
            (b'A', Some(request)) if len >= 8 => {
                let lsn = Lsn(body.get_u64());
                request.records.push((lsn, body));
            }
            (b'G', Some(_)) if len == 0 => {
                if start != bytes.len() {
                    return Err(fail("more follows its end"));
                }
                return request.ok_or(RequestError { problem: "it has no beginning", at });
            }
            _ => return Err(fail("a message does not belong here")),
        }
        at = start + len;
    }
}

/// Appends the messages of one request. The records must have passed [`super::record::check`];
/// only sizes are looked at here.
pub fn encode_request(request: &RedoRequest, out: &mut Vec<u8>) -> Result<(), RedoError> {
    let RedoRequest { rel, block, base, records } = request;
    let bodies: usize = records.iter().map(|(_, record)| record.len() + 13).sum();
    out.reserve_exact(27 + bodies + base.as_ref().map_or(0, |_| 5 + PAGE_SIZE));
    let [spc, db, node] = [rel.node.spc, rel.node.db, rel.node.rel].map(u32::to_be_bytes);
    put_message(out, b'B', &[&[rel.fork], &spc, &db, &node, &block.to_be_bytes()]);
    if let Some(page) = base {
        if page.len() != PAGE_SIZE {
            return Err(RedoError::Refused {
                rel: *rel,
                block: *block,
                message: format!("the base page has {} bytes", page.len()),
            });
        }
        put_message(out, b'P', &[page]);
    }
    for (lsn, record) in records {
        if record.len() > REDO_RECORD_BYTES_MAX {
            return Err(RedoError::BadRecord {
                lsn: *lsn,
                rel: *rel,
                block: *block,
                problem: format!("it has {} bytes", record.len()),
            });
        }
        put_message(out, b'A', &[&lsn.0.to_be_bytes(), record]);
    }
    put_message(out, b'G', &[]);
    Ok(())
}

/// The reply at the front of `input`, and its length; `None` when it is not complete yet.
pub fn decode_reply(input: &[u8]) -> Result<Option<(Reply, usize)>, ReplyError> {
    let Some(&[a, b, c, d, status]) = input.first_chunk::<REPLY_HEADER>() else {
        return Ok(None);
    };
    let len = u32::from_be_bytes([a, b, c, d]) as usize;
    let fits = match status {
        0 => len == PAGE_SIZE,
        1 | 2 => len <= REDO_TEXT_BYTES_MAX,
        _ => false,
    };
    if !fits {
        return Err(ReplyError { status, len });
    }
    let end = REPLY_HEADER + len;
    let Some(payload) = input.get(REPLY_HEADER..end) else {
        return Ok(None);
    };
    let text = || String::from_utf8_lossy(payload).into_owned();
    let reply = match status {
        0 => Reply::Page(Bytes::copy_from_slice(payload)),
        1 => Reply::Error(text()),
        _ => Reply::Pong(text()),
    };
    Ok(Some((reply, end)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> RedoRequest {
        RedoRequest {
            rel: RelNode { spc: 1663, db: 5, rel: 16384 }.fork(2),
            block: 7,
            base: None,
            records: vec![(Lsn(0x1_0000_0020), Bytes::from_static(b"rec"))],
        }
    }

    #[test]
    fn golden_request() {
        let mut out = Vec::new();
        encode_request(&request(), &mut out).unwrap();
        let expected = [
            &b"B\0\0\0\x11\x02\0\0\x06\x7f\0\0\0\x05\0\0\x40\0\0\0\0\x07"[..],
            b"A\0\0\0\x0b\0\0\0\x01\0\0\0\x20rec",
            b"G\0\0\0\0",
        ]
        .concat();
        assert_eq!(out, expected);
    }

    #[test]
    fn requests_are_taken_apart_again_and_damage_is_seen_or_harmless() {
        let mut whole = request();
        whole.base = Some(vec![9; PAGE_SIZE].into());
        whole.records.push((Lsn(0x1_0000_0040), Bytes::from_static(b"second")));
        for request in [request(), whole] {
            let mut out = Vec::new();
            encode_request(&request, &mut out).unwrap();
            let bytes = Bytes::from(out);
            let again = decode_request(&bytes).unwrap();
            assert_eq!((again.rel, again.block), (request.rel, request.block));
            assert_eq!((&again.base, &again.records), (&request.base, &request.records));
            for cut in 0..bytes.len() {
                assert!(decode_request(&bytes.slice(..cut)).is_err(), "{cut}");
            }
            for at in 0..bytes.len() {
                let mut bad = bytes.to_vec();
                bad[at] ^= 0x41;
                // Whatever is read of it, it is that.
                if let Ok(read) = decode_request(&bad.clone().into()) {
                    let mut out = Vec::new();
                    encode_request(&read, &mut out).unwrap();
                    assert_eq!(out, bad, "{at}");
                }
            }
        }
    }

    /// It would be written in another order.
    #[test]
    fn a_base_page_behind_a_record_is_refused() {
        let mut out = Vec::new();
        encode_request(&request(), &mut out).unwrap();
        let end = out.split_off(out.len() - 5);
        out.extend_from_slice(b"P\0\0\x20\0");
        out.extend_from_slice(&[0; PAGE_SIZE]);
        out.extend_from_slice(&end);
        assert!(decode_request(&out.into()).is_err());
    }

    #[test]
    fn wrong_sizes_are_not_sent() {
        let mut short = request();
        short.base = Some(Bytes::from_static(b"short"));
        assert!(encode_request(&short, &mut Vec::new()).is_err());
        let mut long = request();
        long.records[0].1 = vec![0; REDO_RECORD_BYTES_MAX + 1].into();
        assert!(encode_request(&long, &mut Vec::new()).is_err());
    }

    #[test]
    fn replies_cut_anywhere_and_changed_anywhere() {
        let mut golden = b"\0\0\0\x02\x01no\0\0\0\x02\x02up".to_vec();
        assert_eq!(decode_reply(&golden), Ok(Some((Reply::Error("no".into()), 7))));
        assert_eq!(decode_reply(&golden[7..]), Ok(Some((Reply::Pong("up".into()), 7))));
        assert_eq!(decode_reply(&golden[14..]), Ok(None));
        for cut in 0..7 {
            assert_eq!(decode_reply(&golden[..cut]), Ok(None));
        }
        golden = [&b"\0\0\x20\0\0"[..], &[7; PAGE_SIZE]].concat();
        let page = Reply::Page(Bytes::from(vec![7; PAGE_SIZE]));
        assert_eq!(decode_reply(&golden), Ok(Some((page, golden.len()))));
        for at in 0..REPLY_HEADER {
            for bit in 0..8 {
                let mut bad = golden.clone();
                bad[at] ^= 1 << bit;
                assert!(decode_reply(&bad).is_err(), "{at} {bit}");
            }
        }
    }
}
