//! Messages of the stream, byte for byte. Streaming from a real server is tested beside
//! `source/`.

use proptest::prelude::*;

use super::*;

fn decoded(parts: &[&[u8]]) -> Result<WalMessage, SourceError> {
    decode_message(Bytes::from(parts.concat()))
}

#[test]
fn golden_messages() {
    let (at, end, clock) = (0x1122_u64.to_be_bytes(), 0x3344_u64.to_be_bytes(), [9; 8]);
    let bytes = Bytes::from_static(b"wal");
    let data = WalMessage::Data { start: Lsn(0x1122), end_of_wal: Lsn(0x3344), bytes };
    assert_eq!(decoded(&[b"w", &at, &end, &clock, b"wal"]), Ok(data));
    let alive = WalMessage::KeepAlive { end_of_wal: Lsn(0x3344), reply_requested: true };
    assert_eq!(decoded(&[b"k", &end, &clock, &[1]]), Ok(alive));

    let whole = [&b"k"[..], &end, &clock, &[1]].concat();
    for len in 0..whole.len() {
        assert!(decoded(&[&whole[..len]]).is_err(), "{len} bytes were taken");
    }
    assert!(decoded(&[&whole, b"x"]).is_err());
    assert!(decoded(&[b"w", &[255; 8], &end, &clock, b"wal"]).is_err());
    for len in 0..25 {
        assert!(decoded(&[&[&b"w"[..], &at, &end, &clock].concat()[..len]]).is_err());
    }
}

#[test]
fn golden_status() {
    let status = StandbyStatus {
        write: Lsn(3),
        flush: Lsn(2),
        apply: Lsn(1),
        unix_time_us: POSTGRES_EPOCH_US + 0x0102,
        reply_requested: true,
    };
    let expected = [
        &b"r"[..],
        &[0, 0, 0, 0, 0, 0, 0, 3],
        &[0, 0, 0, 0, 0, 0, 0, 2],
        &[0, 0, 0, 0, 0, 0, 0, 1],
        &[0, 0, 0, 0, 0, 0, 1, 2],
        &[1],
    ];
    assert_eq!(encode_status(&status).as_slice(), expected.concat());
}

proptest! {
    #[test]
    fn any_message_is_judged(message in proptest::collection::vec(any::<u8>(), 0..60)) {
        let _ = decode_message(Bytes::from(message));
    }
}
