//! The load generator against a server of the tests' own, which gives right and wrong replies.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};

use bytes::BytesMut;

use super::*;
use crate::base::page::set_page_lsn;
use crate::server::page_protocol::{
    Answer, Header, Query, Request, decode_request, encode_response,
};
use crate::server::pq::{self, Message};

/// What the server does wrong, to each request with a number that is a multiple of 10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrong {
    Nothing,
    Number,
    Lsn,
    Block,
    PageHeader,
    PageTooNew,
    Refuses,
    HangsUp,
    OtherKind,
}

const LSN: Lsn = Lsn(0x1000);
const BLOCKS: u32 = 50;

fn good_page() -> Vec<u8> {
    let mut page = vec![0; 8192];
    page[12..20].copy_from_slice(&[24, 0, 0, 32, 0, 32, 4, 32]);
    set_page_lsn(&mut page, LSN);
    page
}

fn answer(request: &mut Request, nth: u64, wrong: Wrong) -> Answer {
    let Query::GetPage { rel, block } = request.query else { return Answer::Nblocks(BLOCKS) };
    let mut page = good_page();
    if nth.is_multiple_of(10) {
        let Header { id, lsn } = &mut request.header;
        match wrong {
            Wrong::Number => *id += 1,
            Wrong::Lsn => lsn.not_modified_since = Lsn(lsn.not_modified_since.0 + 8),
            Wrong::Block => request.query = Query::GetPage { rel, block: block + 1 },
            Wrong::PageHeader => page[18] = 9,
            Wrong::PageTooNew => set_page_lsn(&mut page, Lsn(LSN.0 + 8)),
            Wrong::Refuses => return Answer::Error("not today".to_owned()),
            Wrong::OtherKind => {
                request.query = Query::Nblocks { rel };
                return Answer::Nblocks(1);
            }
            Wrong::Nothing | Wrong::HangsUp => {}
        }
    }
    Answer::GetPage(page.into())
}

fn serve_one(mut stream: TcpStream, wrong: Wrong) -> std::io::Result<()> {
    let (mut input, mut out) = (BytesMut::new(), BytesMut::new());
    let (mut started, mut nth) = (false, 0);
    let mut version = Version::V3;
    let mut buffer = [0; 4096];
    loop {
        let len = stream.read(&mut buffer)?;
        if len == 0 {
            return Ok(());
        }
        input.extend_from_slice(&buffer[..len]);
        if !started && pq::decode_startup(&mut input).unwrap().is_some() {
            started = true;
            pq::put_welcome(&mut out);
        }
        while started && let Some(message) = pq::decode_message(&mut input).unwrap() {
            match message {
                Message::Query(text) => {
                    version = if text.contains("v2") { Version::V2 } else { Version::V3 };
                    pq::put_copy_both(&mut out);
                }
                Message::CopyData(bytes) => {
                    let mut request = decode_request(version, &bytes).unwrap();
                    let is_page = matches!(request.query, Query::GetPage { .. });
                    nth += u64::from(is_page);
                    if is_page && wrong == Wrong::HangsUp && nth > 100 {
                        return Ok(());
                    }
                    let answer = answer(&mut request, nth, wrong);
                    pq::put_message(&mut out, b'd', |out| {
                        encode_response(version, &request, &answer, out);
                    });
                }
                other => panic!("{other:?}"),
            }
        }
        stream.write_all(&out)?;
        out.clear();
    }
}

/// A server that goes on until the tests end.
fn server(wrong: Wrong) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that goes away in the middle of a reply is no matter.
            std::thread::spawn(move || serve_one(stream.unwrap(), wrong));
        }
    });
    address
}

fn args(address: String) -> GetPageArgs {
    let target = format!("{}/{}", "11".repeat(16), "22".repeat(16));
    GetPageArgs {
        address,
        tenants: vec![target.parse().unwrap()],
        clients: 3,
        threads: 2,
        depth: 4,
        time: 0.3,
        rate: None,
        deadline: 100.0,
        progress: 0.0,
        key_distribution: Distribution::Uniform,
        latest: false,
        lsn: Some(LSN),
        relations: vec!["1663/5/16384".parse().unwrap(), "1663/5/16385_vm".parse().unwrap()],
        database: 5,
        probe_to: 100,
        protocol: Protocol::V3,
        seed: 1,
        json: true,
    }
}

#[test]
fn right_replies_are_counted() {
    let address = server(Wrong::Nothing);
    for (protocol, kind) in [
        (Protocol::V3, Distribution::Uniform),
        (Protocol::V2, Distribution::Zipf),
        (Protocol::V3, Distribution::Sequential),
    ] {
        let args = GetPageArgs { protocol, key_distribution: kind, ..args(address.clone()) };
        let (tally, took) = load(&args).unwrap();
        assert_eq!((tally.errors, tally.wrong, &tally.texts), (0, 0, &Vec::new()));
        assert!(tally.answered() > 50, "{}", tally.answered());
        assert!(took >= Duration::from_millis(300));
    }
    // Without names, relations are found by their sizes.
    let args = GetPageArgs { relations: Vec::new(), lsn: None, ..args(address) };
    let (tally, _) = load(&args).unwrap();
    assert!(tally.answered() > 50 && tally.wrong == 0);
}

#[test]
fn wrong_replies_are_reported() {
    for (wrong, text) in [
        (Wrong::Number, "request id or LSN"),
        (Wrong::Lsn, "request id or LSN"),
        (Wrong::Block, "request body"),
        (Wrong::PageHeader, "the page header is broken"),
        (Wrong::PageTooNew, "asked for at"),
        (Wrong::OtherKind, "request body"),
    ] {
        let args = args(server(wrong));
        let (tally, _) = load(&args).unwrap();
        let share = (tally.answered() + tally.wrong) / 10;
        assert!(tally.wrong > 0 && tally.wrong.abs_diff(share) <= 3, "{wrong:?}: {}", tally.wrong);
        assert!(tally.texts.iter().all(|found| found.contains(text)), "{:?}", tally.texts);
        let error = run(&args).unwrap_err().to_string();
        assert!(error.contains("wrong replies") && error.contains(text), "{error}");
    }
}

#[test]
fn errors_are_reported() {
    let (tally, _) = load(&args(server(Wrong::Refuses))).unwrap();
    assert!(tally.errors > 0 && tally.wrong == 0 && tally.answered() > 0);
    assert!(tally.texts[0].contains("not today"));
    let (tally, _) = load(&args(server(Wrong::HangsUp))).unwrap();
    assert!(tally.errors > 0 && tally.answered() > 0);
    assert!(!tally.texts.is_empty());
}

#[test]
fn an_open_loop_keeps_its_rate() {
    let address = server(Wrong::Nothing);
    let quick = GetPageArgs { rate: Some(300.0), time: 1.0, ..args(address.clone()) };
    let (tally, _) = load(&quick).unwrap();
    assert!((180..420).contains(&tally.answered()), "{}", tally.answered());
    // Every reply misses a deadline that nobody can keep.
    let strict = GetPageArgs { deadline: 0.000_1, ..quick };
    let (tally, _) = load(&strict).unwrap();
    assert_eq!(tally.missed, tally.answered());
}

#[test]
fn arguments_are_checked() {
    let with = |change: &dyn Fn(&mut GetPageArgs)| {
        let mut args = args("127.0.0.1:1".to_owned());
        change(&mut args);
        load(&args).unwrap_err().to_string()
    };
    assert!(with(&|args| args.clients = 0).contains("--clients"));
    assert!(with(&|args| args.threads = 4).contains("--threads"));
    assert!(with(&|args| args.depth = 100_000).contains("--depth"));
    assert!(with(&|args| args.time = -1.0).contains("--time"));
    assert!(with(&|args| args.rate = Some(0.0)).contains("--rate"));
    assert!(with(&|_| {}).contains("127.0.0.1:1"));
}
