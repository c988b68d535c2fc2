use super::*;

fn at(seconds: i64) -> Timestamp {
    Timestamp(seconds * 1_000_000)
}

fn lease(lsn: u64, end: i64) -> Lease {
    Lease { lsn: Lsn(lsn), valid_until: at(end) }
}

#[test]
fn leases_are_granted_prolonged_and_end() {
    let mut leases = Leases::default();
    assert_eq!(leases.grant(lease(50, 100), at(0), Lsn(40)), Ok(at(100)));
    assert_eq!(leases.grant(lease(50, 70), at(0), Lsn(40)), Ok(at(100)), "never shortened");
    assert!(leases.covers(Lsn(50), at(99)));
    assert!(!leases.covers(Lsn(50), at(100)));
    assert!(!leases.covers(Lsn(51), at(0)));
    let refused = leases.grant(lease(39, 100), at(0), Lsn(40)).unwrap_err();
    assert_eq!(refused, LeaseError::BelowCutoff { lsn: Lsn(39), cutoff: Lsn(40) });
    assert_eq!(refused.kind(), Kind::Invalid);
    assert!(refused.to_string().contains("gc cutoff 0/28"), "{refused}");
    // Below the cut-off it can be prolonged as long as it lasts, and not afterwards.
    assert_eq!(leases.grant(lease(50, 200), at(99), Lsn(60)), Ok(at(200)));
    assert!(leases.grant(lease(50, 300), at(200), Lsn(60)).is_err());
    assert_eq!(leases.active(at(150)).collect::<Vec<_>>(), [lease(50, 200)]);
    assert!(!leases.purge(at(199)));
    assert!(leases.purge(at(200)));
    assert_eq!(leases, Leases::default());
}

#[test]
fn the_number_of_leases_is_bounded_and_ended_ones_make_room() {
    let mut leases = Leases::default();
    for n in 0..LEASES_MAX as u64 {
        leases.grant(lease(n, 100 + n as i64), at(0), Lsn(0)).unwrap();
    }
    let refused = leases.grant(lease(5000, 200), at(0), Lsn(0)).unwrap_err();
    assert_eq!(refused, LeaseError::TooMany { lsn: Lsn(5000) });
    leases.grant(lease(3, 200), at(0), Lsn(0)).unwrap();
    leases.grant(lease(5000, 200), at(100), Lsn(0)).unwrap();
    assert_eq!(leases.active(at(100)).count(), LEASES_MAX);
}

#[test]
fn golden_bytes_and_damage() {
    let mut leases = Leases::default();
    assert_eq!(Leases::decode(&leases.encode()), Ok(leases.clone()));
    leases.grant(Lease { lsn: Lsn(0x0102), valid_until: Timestamp(-2) }, at(-9), Lsn(0)).unwrap();
    leases.grant(lease(0x1_0000_0000, 2), at(0), Lsn(0)).unwrap();
    let bytes = leases.encode();
    let golden = "01000000020000000201000000000000feffffffffffffff000000000100000080841e0000000000";
    assert_eq!(hex::encode(&bytes), golden);
    assert_eq!(Leases::decode(&bytes), Ok(leases));
    for len in 0..bytes.len() {
        assert!(Leases::decode(&bytes[..len]).is_err(), "cut to {len}");
    }
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            // The container's checksum is what detects a change; here nothing may break.
            let _ = Leases::decode(&changed);
        }
    }
}
