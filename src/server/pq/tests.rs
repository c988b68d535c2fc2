//! The client's side of these tests is the `postgres-protocol` crate, which is independent of
//! this module.

use fallible_iterator::FallibleIterator;
use postgres_protocol::IsNull;
use postgres_protocol::message::{backend, frontend};
use proptest::prelude::*;

use super::*;
use crate::server::page_protocol::Version;
use crate::shard::base_backup::{BackupKind, BackupRequest};

const TENANT: &str = "11223344556677881122334455667788";
const TIMELINE: &str = "aabbccddeeff00112233445566778899";

fn startup_bytes() -> BytesMut {
    let mut bytes = BytesMut::new();
    let parameters = [("user", "u"), ("application_name", "läufer")];
    frontend::startup_message(parameters, &mut bytes).unwrap();
    bytes
}

fn messages() -> Vec<(Message, BytesMut)> {
    let encode = |put: &dyn Fn(&mut BytesMut)| {
        let mut out = BytesMut::new();
        put(&mut out);
        out
    };
    let text = || "a b".to_owned();
    let data = Bytes::from_static(b"\0\x01payload");
    vec![
        (Message::Query(text()), encode(&|o| frontend::query("a b", o).unwrap())),
        (
            Message::Parse { statement: "s".into(), query: text() },
            encode(&|o| frontend::parse("s", "a b", [23, 25], o).unwrap()),
        ),
        (
            Message::Bind { portal: "p".into(), statement: "s".into() },
            encode(&|o| {
                let put = |value: &str, out: &mut BytesMut| {
                    out.extend_from_slice(value.as_bytes());
                    Ok(IsNull::No)
                };
                frontend::bind("p", "s", [1], ["v"], put, [1], o)
                    .unwrap_or_else(|_| panic!("bind"));
            }),
        ),
        (
            Message::Describe(Target::Statement("s".into())),
            encode(&|o| frontend::describe(b'S', "s", o).unwrap()),
        ),
        (
            Message::Close(Target::Portal("p".into())),
            encode(&|o| frontend::close(b'P', "p", o).unwrap()),
        ),
        (
            Message::Execute { portal: "p".into() },
            encode(&|o| frontend::execute("p", 7, o).unwrap()),
        ),
        (Message::Sync, encode(&|o| frontend::sync(o))),
        (Message::Flush, encode(&|o| frontend::flush(o))),
        (
            Message::CopyData(data.clone()),
            encode(&|o| frontend::CopyData::new(data.clone()).unwrap().write(o)),
        ),
        (Message::CopyDone, encode(&|o| frontend::copy_done(o))),
        (Message::CopyFail("why".into()), encode(&|o| frontend::copy_fail("why", o).unwrap())),
        (Message::Terminate, encode(&|o| frontend::terminate(o))),
    ]
}

#[test]
fn startup_packets_are_understood() {
    let mut bytes = startup_bytes();
    bytes.extend_from_slice(b"rest");
    let Ok(Some(Startup::Session { parameters, negotiate })) = decode_startup(&mut bytes) else {
        panic!("no session");
    };
    let has = |name: &str, value: &str| parameters.contains(&(name.to_owned(), value.to_owned()));
    assert!(has("user", "u") && has("application_name", "läufer") && !negotiate);
    assert_eq!(&bytes[..], b"rest");
    let mut ssl = BytesMut::new();
    frontend::ssl_request(&mut ssl);
    assert_eq!(decode_startup(&mut ssl), Ok(Some(Startup::Ssl)));
    let mut cancel = BytesMut::new();
    frontend::cancel_request(1, 2, &mut cancel);
    assert_eq!(decode_startup(&mut cancel), Ok(Some(Startup::Cancel)));
    let mut gss = BytesMut::from(&hex::decode("0000000804d21630").unwrap()[..]);
    assert_eq!(decode_startup(&mut gss), Ok(Some(Startup::GssEncryption)));
    let newer = hex::decode("00000012000300025f70715f2e780079000000").unwrap();
    let mut newer = BytesMut::from(&newer[..18]);
    let Ok(Some(Startup::Session { negotiate: true, parameters })) = decode_startup(&mut newer)
    else {
        panic!("protocol 3.2 is not negotiated");
    };
    let mut out = BytesMut::new();
    put_negotiate_version(&mut out, &parameters);
    assert_eq!(&out[..], b"v\0\0\0\x13\0\x03\0\0\0\0\0\x01_pq_.x\0");
}

#[test]
fn bad_startup_packets_are_refused_at_once() {
    let decode = |text: &str| decode_startup(&mut BytesMut::from(&hex::decode(text).unwrap()[..]));
    assert_eq!(decode("00000000"), Err(PqError::StartupLength { length: 0 }));
    assert_eq!(decode("00000007"), Err(PqError::StartupLength { length: 7 }));
    assert_eq!(decode("00002711"), Err(PqError::StartupLength { length: 10_001 }));
    assert_eq!(decode("ffffffff"), Err(PqError::StartupLength { length: u32::MAX }));
    let http = decode_startup(&mut BytesMut::from(&b"GET / HTTP/1.1\r\n"[..]));
    assert!(matches!(http, Err(PqError::StartupLength { .. })));
    assert_eq!(decode("0000001000020000"), Err(PqError::Version { major: 2, minor: 0 }));
    assert!(matches!(decode("000000090003000041"), Err(PqError::StartupLayout { .. })));
    assert!(matches!(decode("0000000a000300000000"), Err(PqError::StartupLayout { .. })));
    assert!(matches!(decode("0000000b00030000ff0000"), Err(PqError::StartupLayout { .. })));
}

#[test]
fn every_message_is_understood_and_leaves_the_rest() {
    for (expected, bytes) in messages() {
        let mut buffer = bytes.clone();
        buffer.extend_from_slice(b"X");
        let decoded = decode_message(&mut buffer);
        assert_eq!(decoded, Ok(Some(expected)));
        assert_eq!(&buffer[..], b"X");
    }
}

#[test]
fn a_part_of_a_message_waits_for_the_rest() {
    let startup = startup_bytes();
    for length in 0..startup.len() {
        let mut part = BytesMut::from(&startup[..length]);
        assert_eq!(decode_startup(&mut part), Ok(None), "at {length}");
        assert_eq!(part.len(), length);
    }
    for (message, bytes) in messages() {
        for length in 0..bytes.len() {
            let mut part = BytesMut::from(&bytes[..length]);
            assert_eq!(decode_message(&mut part), Ok(None), "{message:?} at {length}");
            assert_eq!(part.len(), length);
        }
    }
}

#[test]
fn bad_messages_are_refused_at_once() {
    let decode = |bytes: &[u8]| decode_message(&mut BytesMut::from(bytes));
    assert_eq!(decode(b"\0"), Err(PqError::MessageType { tag: 0 }));
    assert_eq!(decode(b"Q\0\0\0\x03"), Err(PqError::MessageLength { tag: b'Q', length: 3 }));
    let long = decode(b"d\0\x01\0\x01");
    assert_eq!(long, Err(PqError::MessageLength { tag: b'd', length: 65_537 }));
    for broken in [
        &b"Q\0\0\0\x05x"[..],
        b"Q\0\0\0\x06\xff\0",
        b"Q\0\0\0\x07x\0y",
        b"S\0\0\0\x05\0",
        b"D\0\0\0\x06Xs\0",
        b"P\0\0\0\x08\0\0\0\x01",
        b"E\0\0\0\x05\0",
    ] {
        let broken_length = 1 + peek_u32(&broken[1..]).unwrap() as usize;
        let mut bytes = broken.to_vec();
        bytes.resize(broken_length.max(broken.len()), 0xff);
        let decoded = decode(&bytes);
        assert!(matches!(decoded, Err(PqError::MessageLayout { .. })), "{broken:?}: {decoded:?}");
    }
}

/// Nothing guards these bytes, so all that can be asked for is: no panic, and never more bytes
/// taken than the message has.
#[test]
fn a_changed_byte_does_no_harm() {
    let all = messages().into_iter().map(|(_, bytes)| bytes).chain([startup_bytes()]);
    for bytes in all {
        for at in 0..bytes.len() {
            for flip in [1, 2, 4, 8, 0x10, 0x20, 0x40, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                let _ = decode_startup(&mut changed.clone());
                let before = changed.len();
                let expected = changed.get(1..).and_then(peek_u32).map(|l| l as usize + 1);
                if let Ok(Some(_)) = decode_message(&mut changed) {
                    assert_eq!(before - changed.len(), expected.unwrap());
                }
            }
        }
    }
}

#[test]
fn the_servers_messages_are_understood_by_clients() {
    let mut out = BytesMut::new();
    put_welcome(&mut out);
    put_empty(&mut out, b'1');
    put_empty(&mut out, b'2');
    put_empty(&mut out, b'3');
    put_empty(&mut out, b'n');
    put_empty(&mut out, b'I');
    put_no_parameters(&mut out);
    put_command_complete(&mut out, "SELECT 1");
    put_message(&mut out, b'd', |out| out.put_slice(b"hello"));
    put_error(&mut out, Severity::Fatal, SqlState::ADMIN_SHUTDOWN, "good\0bye");
    put_ready(&mut out);
    let mut names = Vec::new();
    while let Some(message) = backend::Message::parse(&mut out).unwrap() {
        names.push(match message {
            backend::Message::AuthenticationOk => "auth ok".to_owned(),
            backend::Message::ParameterStatus(body) => {
                format!("{}={}", body.name().unwrap(), body.value().unwrap())
            }
            backend::Message::ReadyForQuery(body) => format!("ready {}", body.status() as char),
            backend::Message::ParseComplete => "parsed".to_owned(),
            backend::Message::BindComplete => "bound".to_owned(),
            backend::Message::CloseComplete => "closed".to_owned(),
            backend::Message::NoData => "no data".to_owned(),
            backend::Message::EmptyQueryResponse => "empty".to_owned(),
            backend::Message::ParameterDescription(_) => "parameters".to_owned(),
            backend::Message::CommandComplete(body) => body.tag().unwrap().to_owned(),
            backend::Message::CopyData(body) => format!("{:?}", body.data()),
            backend::Message::ErrorResponse(body) => {
                let fields = body.fields().map(|f| {
                    Ok(format!("{}{}", f.type_() as char, String::from_utf8_lossy(f.value_bytes())))
                });
                fields.collect::<Vec<_>>().unwrap().join(" ")
            }
            _ => "something else".to_owned(),
        });
    }
    let expected = [
        "auth ok",
        "client_encoding=UTF8",
        "integer_datetimes=on",
        "server_version=14.1",
        "ready I",
        "parsed",
        "bound",
        "closed",
        "no data",
        "empty",
        "parameters",
        "SELECT 1",
        "[104, 101, 108, 108, 111]",
        "SFATAL VFATAL C57P01 Mgoodbye",
        "ready I",
    ];
    assert_eq!(names, expected);
    assert!(out.is_empty());
    put_copy_both(&mut out);
    assert_eq!(&out[..], b"W\0\0\0\x07\x01\0\0");
}

#[test]
fn rows_and_warnings_have_the_bytes_of_the_protocol() {
    let mut out = BytesMut::new();
    put_row_description(&mut out, "c");
    let column = b"T\0\0\0\x1a\0\x01c\0\0\0\0\0\0\0\0\0\0\x19\xff\xff\xff\xff\xff\xff\0\0";
    assert_eq!(&out[..], column);
    out.clear();
    put_data_row(&mut out, Some("17"));
    put_data_row(&mut out, None);
    assert_eq!(&out[..], b"D\0\0\0\x0c\0\x01\0\0\0\x0217D\0\0\0\x0a\0\x01\xff\xff\xff\xff");
    out.clear();
    put_warning(&mut out, "ware");
    assert_eq!(&out[..], b"N\0\0\0\x24SWARNING\0VWARNING\0C01000\0Mware\0\0");
}

#[test]
fn commands_are_understood() {
    let parse = |text: &str| parse_command(text);
    let expected = |version| Command::PageStream {
        version,
        tenant: TENANT.parse().unwrap(),
        timeline: TIMELINE.parse().unwrap(),
    };
    let v3 = format!("  PageStream_V3  {TENANT}\t{TIMELINE} ;");
    assert_eq!(parse(&v3), Ok(expected(Version::V3)));
    assert_eq!(parse(&format!("pagestream_v2 {TENANT} {TIMELINE}")), Ok(expected(Version::V2)));
    let (tenant, timeline) = (TENANT.parse().unwrap(), TIMELINE.parse().unwrap());
    let lease = Command::Lease { tenant, timeline, lsn: crate::base::Lsn(0x1_0000_00a8) };
    assert_eq!(parse(&format!("LEASE Lsn {TENANT} {TIMELINE} 1/A8;")), Ok(lease));
    let backup = |kind, lsn: Option<u64>, previous: Option<u64>, gzip| {
        let (lsn, previous) = (lsn.map(crate::base::Lsn), previous.map(crate::base::Lsn));
        Ok(Command::Backup {
            tenant,
            timeline,
            request: BackupRequest { kind, lsn, previous },
            gzip,
        })
    };
    for (text, expected) in [
        ("basebackup T L", backup(BackupKind::Base, None, None, false)),
        ("basebackup T L latest --replica", backup(BackupKind::Base, None, None, false)),
        ("BaseBackup T L 0/17 --gzip", backup(BackupKind::Base, Some(0x17), None, true)),
        ("fullbackup --gzip T L", backup(BackupKind::Full, None, None, true)),
        ("fullbackup T L 0/17 0/8;", backup(BackupKind::Full, Some(0x17), Some(8), false)),
    ] {
        assert_eq!(parse(&text.replace('T', TENANT).replace('L', TIMELINE)), expected, "{text}");
    }
    assert_eq!(parse("SET client_encoding TO 'UTF8'"), Ok(Command::Set));
    assert_eq!(parse(" ; "), Ok(Command::Empty));
    for (text, message) in [
        ("select 1", "unknown command 'select'"),
        ("basebackup x y", "'x' is no tenant shard id"),
        ("fullbackup", "the tenant is missing; write: fullbackup TENANT TIMELINE [LSN [PREV"),
        (&format!("basebackup {TENANT} {TIMELINE} --zstd"), "unknown option --zstd"),
        (&format!("fullbackup {TENANT} {TIMELINE} --replica"), "unknown option --replica"),
        (&format!("basebackup {TENANT} --gzip {TIMELINE} --gzip"), "--gzip is there twice"),
        (&format!("basebackup {TENANT} {TIMELINE} 0/1 0/2"), "too many arguments"),
        (&format!("basebackup {TENANT} {TIMELINE} newest"), "the LSN: 'newest'"),
        ("lease", "only an LSN can be leased; write: lease lsn TENANT TIMELINE LSN"),
        ("lease lsn a b c", "'a' is no tenant shard id"),
        (&format!("lease lsn {TENANT} {TIMELINE}"), "the LSN is missing"),
        (&format!("lease lsn {TENANT} {TIMELINE} 17"), "17"),
        (&format!("lease lsn {TENANT} {TIMELINE} 0/17 x"), "too many arguments"),
        ("pagestream_v2", "the tenant is missing"),
        (&format!("pagestream_v2 {TENANT}"), "the timeline is missing"),
        ("pagestream_v2 x y", "'x' is no tenant shard id"),
        (&format!("pagestream_v3 {TENANT} y"), "'y' is no timeline id"),
        (&format!("pagestream_v3 {TENANT} {TIMELINE} z"), "too many arguments"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains(message), "{text}: {error}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut buffer = BytesMut::from(&bytes[..]);
        let _ = decode_startup(&mut buffer);
        let mut buffer = BytesMut::from(&bytes[..]);
        while let Ok(Some(_)) = decode_message(&mut buffer) {}
        let _ = parse_command(&String::from_utf8_lossy(&bytes));
    }
}
