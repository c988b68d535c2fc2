use proptest::prelude::*;

use super::*;

fn rel() -> RelTag {
    RelNode { spc: 0x0102_0304, db: 0x1112_1314, rel: 0x2122_2324 }.fork(2)
}

fn header() -> Header {
    let lsn = RequestLsn { request: Lsn(0x3132_3334_3536_3738), not_modified_since: Lsn(0x41) };
    Header { id: 0x5152_5354_5556_5758, lsn }
}

fn queries() -> Vec<Query> {
    let mut all = vec![
        Query::Exists { rel: rel() },
        Query::Nblocks { rel: rel() },
        Query::GetPage { rel: rel(), block: 0x6162_6364 },
        Query::DbSize { db: 5 },
    ];
    all.extend(SlruKind::ALL.map(|kind| Query::GetSlruSegment { kind, segment: 0x7172_7374 }));
    all
}

fn answer_to(query: &Query) -> Answer {
    match query {
        Query::Exists { .. } => Answer::Exists(true),
        Query::Nblocks { .. } => Answer::Nblocks(0x8182_8384),
        Query::GetPage { .. } => Answer::GetPage(Bytes::from(vec![0x99; PAGE_BYTES])),
        Query::DbSize { .. } => Answer::DbSize(-2),
        Query::GetSlruSegment { .. } => Answer::GetSlruSegment(vec![0x77; 2 * PAGE_BYTES].into()),
    }
}

fn request_bytes(version: Version, query: Query) -> Vec<u8> {
    let mut out = BytesMut::new();
    encode_request(version, &Request { header: header(), query }, &mut out);
    out.to_vec()
}

fn response_bytes(version: Version, response: &Response, request: &Request) -> Vec<u8> {
    let mut out = BytesMut::new();
    match &response.answer {
        Answer::Error(text) => encode_error(version, &request.header, text, &mut out),
        answer => encode_response(version, request, answer, &mut out),
    }
    out.to_vec()
}

fn all_responses(version: Version) -> Vec<(Request, Vec<u8>)> {
    let mut all = Vec::new();
    for query in queries() {
        let request = Request { header: header(), query };
        for answer in [answer_to(&query), Answer::Error("no such thing: ä".to_owned())] {
            let mut out = BytesMut::new();
            encode_response(version, &request, &answer, &mut out);
            all.push((request, out.to_vec()));
        }
    }
    all
}

#[test]
fn request_golden_bytes() {
    let query = Query::GetPage { rel: rel(), block: 0x6162_6364 };
    let v2 = "02 3132333435363738 0000000000000041 01020304 11121314 21222324 02 61626364";
    let v3 = "02 5152535455565758 3132333435363738 0000000000000041 01020304 11121314 21222324 02 61626364";
    assert_eq!(request_bytes(Version::V2, query), hex::decode(v2.replace(' ', "")).unwrap());
    assert_eq!(request_bytes(Version::V3, query), hex::decode(v3.replace(' ', "")).unwrap());
    assert_eq!(request_bytes(Version::V2, query).len(), 34);
    assert_eq!(request_bytes(Version::V3, query).len(), 42);
    let golden = |tag: u8, rest: &str| {
        let text = format!("{tag:02x} 3132333435363738 0000000000000041 {rest}");
        hex::decode(text.replace(' ', "")).unwrap()
    };
    let rel_hex = "01020304 11121314 21222324 02";
    assert_eq!(request_bytes(Version::V2, Query::Exists { rel: rel() }), golden(0, rel_hex));
    assert_eq!(request_bytes(Version::V2, Query::Nblocks { rel: rel() }), golden(1, rel_hex));
    assert_eq!(request_bytes(Version::V2, Query::DbSize { db: 5 }), golden(3, "00000005"));
    let slru = Query::GetSlruSegment { kind: SlruKind::MultiXactOffsets, segment: 9 };
    assert_eq!(request_bytes(Version::V2, slru), golden(4, "02 00000009"));
}

#[test]
fn response_golden_bytes() {
    let encode = |version, query, answer: Answer| {
        let mut out = BytesMut::new();
        encode_response(version, &Request { header: header(), query }, &answer, &mut out);
        hex::encode(&out)
    };
    let echo = "515253545556575831323334353637380000000000000041";
    let rel_hex = "01020304111213142122232402";
    let nblocks = Query::Nblocks { rel: rel() };
    assert_eq!(encode(Version::V2, nblocks, Answer::Nblocks(7)), "6500000007");
    assert_eq!(
        encode(Version::V3, nblocks, Answer::Nblocks(7)),
        format!("65{echo}{rel_hex}00000007")
    );
    let exists = Query::Exists { rel: rel() };
    assert_eq!(encode(Version::V2, exists, Answer::Exists(true)), "6401");
    assert_eq!(encode(Version::V2, exists, Answer::Error("no\0!".into())), "676e6f2100");
    assert_eq!(
        encode(Version::V3, exists, Answer::Error("no".into())),
        format!("67{echo}6e6f00"),
        "an error echoes the header only"
    );
    let size = encode(Version::V3, Query::DbSize { db: 5 }, Answer::DbSize(-2));
    assert_eq!(size, format!("68{echo}00000005fffffffffffffffe"));
    let page = encode(
        Version::V3,
        Query::GetPage { rel: rel(), block: 3 },
        Answer::GetPage(vec![0xab; PAGE_BYTES].into()),
    );
    assert_eq!(page, format!("66{echo}{rel_hex}00000003{}", "ab".repeat(PAGE_BYTES)));
    let slru = Query::GetSlruSegment { kind: SlruKind::Clog, segment: 9 };
    let segment = encode(Version::V2, slru, Answer::GetSlruSegment(vec![1; PAGE_BYTES].into()));
    assert_eq!(segment, format!("6900000001{}", "01".repeat(PAGE_BYTES)));
}

#[test]
fn everything_survives_a_round_trip() {
    for version in [Version::V2, Version::V3] {
        for query in queries() {
            let mut expected = Request { header: header(), query };
            let bytes = request_bytes(version, query);
            if version == Version::V2 {
                expected.header.id = 0;
            }
            assert_eq!(decode_request(version, &bytes).unwrap(), expected);
        }
        for (request, bytes) in all_responses(version) {
            let response = decode_response(version, &bytes.clone().into()).unwrap();
            assert_eq!(response_bytes(version, &response, &request), bytes);
            let answer = response.answer_to(&request).unwrap();
            assert!(matches!(answer, Answer::Error(_)) || answer == answer_to(&request.query));
        }
    }
}

/// The format has no checksum, so a changed byte may give another valid message. What must hold:
/// no panic, and what is accepted says exactly what the bytes say.
#[test]
fn a_changed_byte_is_refused_or_read_as_it_stands() {
    for version in [Version::V2, Version::V3] {
        for query in queries() {
            let bytes = request_bytes(version, query);
            for at in 0..bytes.len() {
                for flip in [1, 0x10, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= flip;
                    check_request(version, &changed);
                }
            }
        }
        for (request, bytes) in all_responses(version) {
            let interesting = (0..bytes.len().min(80)).chain([bytes.len() - 1]);
            for at in interesting {
                for flip in [1, 0x10, 0x80, 0xff] {
                    let mut changed = bytes.clone();
                    changed[at] ^= flip;
                    check_response(version, &changed, &request);
                }
            }
        }
    }
}

fn check_request(version: Version, bytes: &[u8]) {
    if let Ok(request) = decode_request(version, bytes) {
        let mut out = BytesMut::new();
        encode_request(version, &request, &mut out);
        assert_eq!(out, bytes);
    }
}

fn check_response(version: Version, bytes: &[u8], request: &Request) {
    let Ok(response) = decode_response(version, &bytes.to_vec().into()) else { return };
    let echoed = Request {
        header: response.header.unwrap_or(request.header),
        query: response.query.unwrap_or(request.query),
    };
    let known = fits(&echoed.query, &response.answer);
    if known {
        assert_eq!(response_bytes(version, &response, &echoed), bytes);
    }
    if version == Version::V3 && echoed != *request {
        let not_an_error = !matches!(response.answer, Answer::Error(_));
        let differs = echoed.header != request.header || not_an_error;
        assert!(!differs || response.answer_to(request).is_err(), "a stray reply was taken");
    }
}

#[test]
fn a_cut_or_lengthened_message_is_refused() {
    for version in [Version::V2, Version::V3] {
        for query in queries() {
            let bytes = request_bytes(version, query);
            for length in 0..bytes.len() {
                let error = decode_request(version, &bytes[..length]).unwrap_err();
                let header_end = bytes.len() - (bytes.len() - header_bytes(version));
                assert_eq!(error.header.is_some(), length >= header_end, "at {length}");
            }
            let mut long = bytes.clone();
            long.push(0);
            let problem = decode_request(version, &long).unwrap_err().problem;
            assert!(matches!(problem, ProtocolError::Long { excess: 1, .. }), "{problem}");
        }
        for (_, bytes) in all_responses(version) {
            for length in (0..bytes.len()).filter(|l| *l < 80 || l % 1000 == 0) {
                assert!(decode_response(version, &bytes[..length].to_vec().into()).is_err());
            }
            let mut long = bytes.clone();
            long.push(1);
            assert!(decode_response(version, &long.into()).is_err());
        }
    }
}

fn header_bytes(version: Version) -> usize {
    if version == Version::V2 { 17 } else { 25 }
}

#[test]
fn nonsense_is_named() {
    let mut bytes = request_bytes(Version::V3, queries()[2]);
    bytes[0] = 77;
    let error = decode_request(Version::V3, &bytes).unwrap_err();
    assert_eq!(error.problem, ProtocolError::Tag { tag: 77 });
    assert_eq!(error.header, Some(header()));
    let mut no_relation = request_bytes(Version::V3, queries()[2]);
    no_relation[33..37].fill(0);
    let error = decode_request(Version::V3, &no_relation).unwrap_err();
    assert_eq!(error.problem, ProtocolError::Field { field: "relation", value: 0 });
    let mut bad_fork = request_bytes(Version::V3, queries()[0]);
    *bad_fork.last_mut().unwrap() = 4;
    let error = decode_request(Version::V3, &bad_fork).unwrap_err();
    assert_eq!(error.problem, ProtocolError::Field { field: "fork", value: 4 });
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..64), tag in 0u8..6) {
        let mut bytes = bytes;
        for version in [Version::V2, Version::V3] {
            check_request(version, &bytes);
            if let Some(first) = bytes.first_mut() {
                *first = tag;
            }
            check_request(version, &bytes);
            if let Some(first) = bytes.first_mut() {
                *first = 100 + tag;
            }
            let request = Request { header: header(), query: Query::DbSize { db: 5 } };
            check_response(version, &bytes, &request);
        }
    }
}
