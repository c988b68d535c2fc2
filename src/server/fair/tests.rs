use proptest::prelude::*;

use super::*;
use crate::base::TenantId;
use crate::limits::PAGE_REQUESTS_CONCURRENT_MAX;

const QUOTA: PageQuota = PageQuota { requests_per_s: 0, bytes_in_flight: u64::MAX };

fn tenant(n: u8) -> TenantShardId {
    TenantShardId::unsharded(TenantId([n; 16]))
}

fn ask(n: u8, class: Class, pages: u64) -> Ask {
    Ask { tenant: tenant(n), quota: QUOTA, class, pages }
}

fn at_us(us: u64) -> Duration {
    Duration::from_micros(us)
}

/// All of one tick; gives everything back at its end.
fn tick<W>(queue: &mut FairQueue<W>, now: Duration) -> Vec<(TenantShardId, u64)> {
    queue.start_tick(now);
    let mut all = Vec::new();
    while let Some(one) = queue.next(now) {
        all.push((one.tenant, one.pages));
    }
    all.iter().for_each(|(tenant, pages)| queue.release(*tenant, *pages));
    all
}

#[test]
fn who_is_alone_never_waits_and_a_guest_ends_that() {
    let mut queue = FairQueue::<()>::default();
    let flood = ask(1, Class::Prefetch, 32);
    for us in 0..1000 {
        assert!(queue.try_admit(&flood, at_us(us)));
        queue.release(flood.tenant, flood.pages);
    }
    // The guest is admitted at once; from now on the other one has its share of a tick.
    assert!(queue.try_admit(&ask(2, Class::Foreground, 1), at_us(1000)));
    let admitted = (0..100).filter(|us| queue.try_admit(&flood, at_us(1000 + us))).count();
    assert!(admitted <= 1, "{admitted}");
    // Long after the guest has gone it is as before.
    let later = at_us(1100) + FAIR_ALONE_AFTER;
    assert!((0..100).all(|us| queue.try_admit(&flood, later + at_us(us))));
}

#[test]
fn ticks_go_by_where_nobody_waits() {
    let mut queue = FairQueue::<()>::default();
    for round in 0..100u64 {
        for n in [1, 2] {
            let now = at_us(round * FAIR_TICK_MAX.as_micros() as u64);
            assert!(queue.try_admit(&ask(n, Class::Foreground, 32), now), "{round} {n}");
        }
    }
}

#[test]
fn a_flood_makes_another_wait_for_one_tick_at_most() {
    let mut queue = FairQueue::default();
    // 64 connections with two batches each.
    for n in 0..128 {
        queue.enqueue(&ask(1, Class::Prefetch, 32), n, at_us(0));
    }
    tick(&mut queue, at_us(1));
    // What comes between two ticks goes at once, and what it sends on stands in front.
    let lone = ask(2, Class::Foreground, 1);
    assert!(queue.try_admit(&lone, at_us(2)));
    queue.release(lone.tenant, 1);
    queue.enqueue(&ask(2, Class::Foreground, 4), 1000, at_us(3));
    assert_eq!(tick(&mut queue, at_us(4))[0], (tenant(2), 4));
    // Read-ahead against read-ahead: each has the half.
    for n in 0..8 {
        queue.enqueue(&ask(2, Class::Prefetch, 32), n, at_us(5));
    }
    let mut had = [0, 0];
    for us in 0..8 {
        for (id, pages) in tick(&mut queue, at_us(6 + us)) {
            had[usize::from(id == tenant(2))] += pages;
        }
    }
    assert_eq!(had, [128, 128]);
}

#[test]
fn small_batches_and_large_ones_have_the_same_share_of_pages() {
    let mut queue = FairQueue::default();
    for n in 0..400 {
        queue.enqueue(&ask(1, Class::Foreground, 32), n, at_us(0));
        queue.enqueue(&ask(2, Class::Foreground, 3), n, at_us(0));
    }
    let mut had = [0u64; 2];
    for us in 0..50 {
        for (id, pages) in tick(&mut queue, at_us(us)) {
            had[usize::from(id == tenant(2))] += pages;
        }
    }
    assert!(had[0].abs_diff(had[1]) <= 2 * 32, "{had:?}");
}

#[test]
fn foreground_goes_first_and_read_ahead_does_not_starve() {
    let mut queue = FairQueue::default();
    queue.enqueue(&ask(1, Class::Prefetch, 32), 0, at_us(0));
    let (mut pages_before, mut us) = (0, 1);
    loop {
        // Never without foreground of others.
        for n in [2, 3, 4, 5, 2, 3, 4, 5, 2, 3] {
            queue.enqueue(&ask(n, Class::Foreground, 4), 1, at_us(us));
        }
        let batch = tick(&mut queue, at_us(us));
        if let Some(place) = batch.iter().position(|(id, _)| *id == tenant(1)) {
            pages_before += batch[..place].iter().map(|(_, pages)| pages).sum::<u64>();
            break;
        }
        pages_before += batch.iter().map(|(_, pages)| pages).sum::<u64>();
        us += 1;
        assert!(pages_before < 10_000, "read-ahead starves");
    }
    let bounds = FAIR_FOREGROUND_PAGES..=FAIR_FOREGROUND_PAGES + 4;
    assert!(bounds.contains(&pages_before), "{pages_before}");
}

#[test]
fn requests_per_second_are_those_of_the_quota() {
    let quota = PageQuota { requests_per_s: 1000, bytes_in_flight: u64::MAX };
    let mut queue = FairQueue::default();
    let mine = Ask { quota, ..ask(1, Class::Foreground, 10) };
    let mut now = Duration::from_secs(5);
    let end = now + Duration::from_secs(10);
    let mut had = 0;
    while now < end {
        match queue.try_admit(&mine, now) {
            true => {
                had += 10;
                queue.release(mine.tenant, 10);
            }
            false => {
                assert!(queue.is_over_quota(&mine, now));
                // Another tenant is not held up.
                assert!(queue.try_admit(&ask(2, Class::Foreground, 1), now + FAIR_TICK_MAX));
                queue.enqueue(&mine, (), now);
                queue.start_tick(now);
                assert!(queue.next(now).is_none());
                let time = queue.next_time().unwrap();
                assert!(time > now && time <= now + Duration::from_millis(10));
                now = time;
                queue.start_tick(now);
                assert_eq!(queue.next(now).map(|one| one.pages), Some(10));
                had += 10;
                queue.release(mine.tenant, 10);
            }
        }
    }
    // Ten seconds, and the bucket that was full at the beginning.
    assert!((10_080..=10_120).contains(&had), "{had}");
}

#[test]
fn bytes_in_flight_are_bounded_and_come_back() {
    let quota = PageQuota { requests_per_s: 0, bytes_in_flight: 40 * PAGE_SIZE as u64 };
    let mut queue = FairQueue::default();
    let mine = Ask { quota, ..ask(1, Class::Foreground, 20) };
    assert!(queue.try_admit(&mine, at_us(0)) && queue.try_admit(&mine, at_us(0)));
    assert!(!queue.try_admit(&mine, at_us(0)) && queue.is_over_quota(&mine, at_us(0)));
    queue.enqueue(&mine, (), at_us(0));
    queue.start_tick(at_us(1));
    assert!(queue.next(at_us(1)).is_none() && queue.next_time().is_none());
    queue.release(mine.tenant, 20);
    assert_eq!(queue.next_time(), Some(Duration::ZERO));
    assert!(queue.next(at_us(2)).is_some());
    // A batch that is larger than the quota is not stuck for ever.
    queue.release(mine.tenant, 40);
    assert!(queue.try_admit(&Ask { pages: 50, ..mine }, at_us(3)));
}

#[test]
fn tenants_that_want_nothing_are_forgotten() {
    let mut queue = FairQueue::<()>::default();
    for n in 0..10_000u32 {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&n.to_le_bytes());
        let tenant = TenantShardId::unsharded(TenantId(id));
        let one = Ask { tenant, ..ask(0, Class::Foreground, 1) };
        assert!(queue.try_admit(&one, at_us(u64::from(n) * 1000)));
        queue.release(tenant, 1);
    }
    assert!(queue.tenant_count() <= FAIR_TENANTS_KEPT + 1, "{}", queue.tenant_count());
}

proptest! {
    /// Everything that stands in line is admitted, each once, in the order of its tenant and
    /// class, and the books balance.
    #[test]
    fn nothing_is_lost_or_doubled(
        asks in prop::collection::vec((0u8..5, any::<bool>(), 1..=PAGE_REQUESTS_CONCURRENT_MAX as u64), 1..200),
        bytes_in_flight in 1u64..1_000_000,
    ) {
        let mut queue = FairQueue::default();
        let mut sent = BTreeMap::<_, Vec<usize>>::new();
        for (number, (n, ahead, pages)) in asks.iter().enumerate() {
            let class = if *ahead { Class::Prefetch } else { Class::Foreground };
            let quota = PageQuota { requests_per_s: 0, bytes_in_flight };
            queue.enqueue(&Ask { quota, ..ask(*n, class, *pages) }, number, at_us(0));
            sent.entry((tenant(*n), *ahead)).or_default().push(number);
        }
        let mut got = BTreeMap::<_, Vec<usize>>::new();
        let mut ticks = 0;
        while queue.waiting() > 0 {
            ticks += 1;
            prop_assert!(ticks <= asks.len(), "a tick admitted nothing");
            queue.start_tick(at_us(ticks as u64));
            let mut held = Vec::new();
            while let Some(one) = queue.next(at_us(ticks as u64)) {
                let (_, ahead, pages) = asks[one.waiter];
                prop_assert_eq!(pages, one.pages);
                got.entry((one.tenant, ahead)).or_default().push(one.waiter);
                held.push((one.tenant, one.pages));
            }
            let pages = held.iter().map(|(_, pages)| pages).sum::<u64>();
            prop_assert_eq!(queue.in_flight(), pages);
            prop_assert!(pages < FAIR_TICK_PAGES + PAGE_REQUESTS_CONCURRENT_MAX as u64);
            held.into_iter().for_each(|(tenant, pages)| queue.release(tenant, pages));
        }
        prop_assert_eq!(got, sent);
        prop_assert_eq!((queue.in_flight(), queue.next_time()), (0, None));
    }
}
