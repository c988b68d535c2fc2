//! Whose page requests go next on a core. Pure: time is given, nothing waits here.
//!
//! Requests are admitted in batches of one connection, of at most
//! [`PAGE_REQUESTS_CONCURRENT_MAX`](crate::limits::PAGE_REQUESTS_CONCURRENT_MAX) pages.
//!
//! 1. Time goes in *ticks*: between two of them the executor has looked at all sockets, so that
//!    everybody who has sent something stands in line. Within a tick each tenant may have
//!    [`FAIR_TICK_PAGES`] pages at once, without standing in line; a tenant that has had the core
//!    for itself lately may have as many as it likes.
//! 2. Who wants more stands in line. Each tick admits [`FAIR_TICK_PAGES`] pages from the line, or
//!    one batch if that is larger: first those of class [`Class::Foreground`] of any tenant, then
//!    those of class [`Class::Prefetch`]. After [`FAIR_FOREGROUND_PAGES`] pages of the first class
//!    a batch of the second is admitted, if one is there: nobody starves.
//! 3. Within a class, tenants take turns by deficit round-robin ([`FAIR_QUANTUM_PAGES`] for each
//!    turn), and the batches of one tenant are first come, first served.
//! 4. A tenant over its quota is passed over. Requests per second are a token bucket that holds
//!    [`QUOTA_BURST`] worth of requests; in flight is what was admitted and not answered yet.
//!
//! So the flood of one tenant makes the first request of another wait for one tick, whatever
//! stands in line.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::base::TenantShardId;
use crate::base::page::PAGE_SIZE;
use crate::limits::{
    FAIR_ALONE_AFTER, FAIR_FOREGROUND_PAGES, FAIR_FOREGROUND_REQUESTS_MAX, FAIR_QUANTUM_PAGES,
    FAIR_TENANTS_KEPT, FAIR_TICK_MAX, FAIR_TICK_PAGES, QUOTA_BURST,
};
use crate::shard::reader::PageQuota;

/// How urgent a batch is.
///
/// Requests do not say so, hence: a client that waits for a page sends one request, or a few. Who
/// sends more than [`FAIR_FOREGROUND_REQUESTS_MAX`] at once reads ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Somebody waits for it.
    Foreground = 0,
    /// Read ahead.
    Prefetch = 1,
}

impl Class {
    /// The class of requests that came in together.
    pub fn of_arrival(requests: usize) -> Class {
        match requests <= FAIR_FOREGROUND_REQUESTS_MAX {
            true => Class::Foreground,
            false => Class::Prefetch,
        }
    }
}

/// A batch that wants to be worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// Whose it is.
    pub tenant: TenantShardId,
    /// What that tenant may have, at the moment.
    pub quota: PageQuota,
    /// How urgent it is.
    pub class: Class,
    /// Number of requests; each counts as a page.
    pub pages: u64,
}

/// A batch that was admitted from the line.
#[derive(Debug)]
pub struct Admitted<W> {
    /// Who waits for it.
    pub waiter: W,
    /// Whose it is.
    pub tenant: TenantShardId,
    /// Number of requests.
    pub pages: u64,
    /// How long it stood in line.
    pub waited: Duration,
}

struct Waiting<W> {
    waiter: W,
    pages: u64,
    since: Duration,
}

struct Tenant<W> {
    quota: PageQuota,
    lines: [VecDeque<Waiting<W>>; 2],
    /// Pages that the tenant may still have in its turn, for each class.
    deficits: [u64; 2],
    /// Pages that were admitted and not given back.
    in_flight: u64,
    /// When the bucket is full again.
    full_at: Duration,
    /// The tick that `used` is of.
    tick: u64,
    /// Pages had in that tick without standing in line.
    used: u64,
}

impl<W> Tenant<W> {
    fn new(quota: PageQuota) -> Self {
        Tenant {
            quota,
            lines: [VecDeque::new(), VecDeque::new()],
            deficits: [0; 2],
            in_flight: 0,
            full_at: Duration::ZERO,
            tick: 0,
            used: 0,
        }
    }

    fn has_waiting(&self) -> bool {
        self.lines.iter().any(|line| !line.is_empty())
    }

    /// When the bucket has something in it.
    fn ready_at(&self) -> Duration {
        match self.quota.requests_per_s {
            0 => Duration::ZERO,
            _ => self.full_at.saturating_sub(QUOTA_BURST),
        }
    }

    /// A batch that is larger than the whole quota goes when nothing else is in flight.
    fn has_room(&self, pages: u64) -> bool {
        let bytes = self.in_flight.saturating_add(pages).saturating_mul(PAGE_SIZE as u64);
        self.in_flight == 0 || bytes <= self.quota.bytes_in_flight
    }

    fn may_go(&self, pages: u64, now: Duration) -> bool {
        self.ready_at() <= now && self.has_room(pages)
    }

    fn take(&mut self, pages: u64, now: Duration) {
        self.in_flight = self.in_flight.saturating_add(pages);
        let cost = pages.saturating_mul(1_000_000_000).checked_div(self.quota.requests_per_s);
        self.full_at = self.full_at.max(now) + Duration::from_nanos(cost.unwrap_or(0));
    }

    fn is_forgettable(&self, now: Duration) -> bool {
        self.in_flight == 0 && !self.has_waiting() && self.full_at <= now
    }
}

/// See the module's text. `W` stands for who waits.
pub struct FairQueue<W> {
    tenants: BTreeMap<TenantShardId, Tenant<W>>,
    /// Tenants with batches in line, for each class, in the order of their turns.
    rings: [VecDeque<TenantShardId>; 2],
    /// Pages of foreground since the last batch of prefetch, while one was in line.
    foreground_run: u64,
    tick: u64,
    tick_start: Duration,
    /// Pages that this tick has admitted from the line.
    tick_pages: u64,
    /// The tenant that came last and the last other one, with their times.
    recent: [Option<(TenantShardId, Duration)>; 2],
    waiting: u64,
    in_flight: u64,
}

impl<W> Default for FairQueue<W> {
    fn default() -> Self {
        FairQueue {
            tenants: BTreeMap::new(),
            rings: Default::default(),
            foreground_run: 0,
            tick: 1,
            tick_start: Duration::ZERO,
            tick_pages: 0,
            recent: [None; 2],
            waiting: 0,
            in_flight: 0,
        }
    }
}

impl<W> FairQueue<W> {
    /// Requests in line.
    pub fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Requests that were admitted and not given back.
    pub fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Tenants that something is known of.
    pub fn tenant_count(&self) -> usize {
        self.tenants.len()
    }

    fn tenant(&mut self, ask: &Ask) -> &mut Tenant<W> {
        let new = || Tenant::new(ask.quota);
        let tenant = self.tenants.entry(ask.tenant).or_insert_with(new);
        tenant.quota = ask.quota;
        tenant
    }

    /// Notes that a tenant has come; true if no other one has for a while.
    fn is_alone(&mut self, tenant: TenantShardId, now: Duration) -> bool {
        let [last, other] = &mut self.recent;
        match last {
            Some((id, at)) if *id == tenant => *at = now,
            _ => *other = last.replace((tenant, now)),
        }
        other.is_none_or(|(_, at)| now.saturating_sub(at) > FAIR_ALONE_AFTER)
    }

    /// Admits a batch at once, if its tenant may have it without standing in line.
    pub fn try_admit(&mut self, ask: &Ask, now: Duration) -> bool {
        let alone = self.is_alone(ask.tenant, now);
        if self.waiting == 0 && now.saturating_sub(self.tick_start) >= FAIR_TICK_MAX {
            self.start_tick(now);
        }
        let tick = self.tick;
        let tenant = self.tenant(ask);
        if tenant.tick != tick {
            (tenant.tick, tenant.used) = (tick, 0);
        }
        let used = tenant.used.saturating_add(ask.pages);
        let is_little = tenant.used == 0 || used <= FAIR_TICK_PAGES;
        let admitted =
            !tenant.has_waiting() && (alone || is_little) && tenant.may_go(ask.pages, now);
        if admitted {
            tenant.used = used;
            tenant.take(ask.pages, now);
            self.in_flight += ask.pages;
        }
        admitted
    }

    /// True if a quota is what the batch would wait for.
    pub fn is_over_quota(&self, ask: &Ask, now: Duration) -> bool {
        self.tenants.get(&ask.tenant).is_some_and(|tenant| !tenant.may_go(ask.pages, now))
    }

    /// Puts a batch in line.
    pub fn enqueue(&mut self, ask: &Ask, waiter: W, now: Duration) {
        let class = ask.class as usize;
        let tenant = self.tenant(ask);
        let is_first = tenant.lines[class].is_empty();
        tenant.lines[class].push_back(Waiting { waiter, pages: ask.pages, since: now });
        if is_first {
            tenant.deficits[class] = FAIR_QUANTUM_PAGES;
            self.rings[class].push_back(ask.tenant);
        }
        self.waiting += ask.pages;
    }

    /// The executor has looked at all sockets.
    pub fn start_tick(&mut self, now: Duration) {
        self.tick += 1;
        self.tick_start = now;
        self.tick_pages = 0;
        if self.tenants.len() > FAIR_TENANTS_KEPT {
            self.tenants.retain(|_, tenant| !tenant.is_forgettable(now));
        }
    }

    /// The next batch from the line that this tick admits.
    pub fn next(&mut self, now: Duration) -> Option<Admitted<W>> {
        if self.tick_pages >= FAIR_TICK_PAGES {
            return None;
        }
        let is_due = self.foreground_run >= FAIR_FOREGROUND_PAGES;
        let order = match is_due {
            true => [Class::Prefetch, Class::Foreground],
            false => [Class::Foreground, Class::Prefetch],
        };
        let (class, admitted) =
            order.into_iter().find_map(|class| Some((class, self.next_of(class, now)?)))?;
        self.foreground_run = match class {
            Class::Foreground if !self.rings[Class::Prefetch as usize].is_empty() => {
                self.foreground_run.saturating_add(admitted.pages)
            }
            _ => 0,
        };
        self.tick_pages = self.tick_pages.saturating_add(admitted.pages);
        self.waiting -= admitted.pages;
        self.in_flight += admitted.pages;
        Some(admitted)
    }

    fn next_of(&mut self, class: Class, now: Duration) -> Option<Admitted<W>> {
        let class = class as usize;
        let ring = &mut self.rings[class];
        let mut passed = 0;
        // Ends: whoever is not passed over gets closer to its turn each time it is looked at.
        while passed < ring.len() {
            let id = *ring.front()?;
            let tenant = self.tenants.get_mut(&id)?;
            let pages = tenant.lines[class].front()?.pages;
            if !tenant.may_go(pages, now) {
                ring.rotate_left(1);
                passed += 1;
                continue;
            }
            if tenant.deficits[class] < pages {
                tenant.deficits[class] += FAIR_QUANTUM_PAGES;
                ring.rotate_left(1);
                passed = 0;
                continue;
            }
            let first = tenant.lines[class].pop_front()?;
            tenant.deficits[class] -= pages;
            tenant.take(pages, now);
            if tenant.lines[class].is_empty() {
                ring.pop_front();
            }
            let waited = now.saturating_sub(first.since);
            return Some(Admitted { waiter: first.waiter, tenant: id, pages, waited });
        }
        None
    }

    /// Gives back what was admitted: it is answered, or nobody wants it any more.
    pub fn release(&mut self, tenant: TenantShardId, pages: u64) {
        if let Some(tenant) = self.tenants.get_mut(&tenant) {
            tenant.in_flight = tenant.in_flight.saturating_sub(pages);
        }
        self.in_flight = self.in_flight.saturating_sub(pages);
    }

    /// When the next batch can be admitted if nothing is given back meanwhile: at once if the time
    /// has come; `None` if there is none, or all wait for something to be given back.
    pub fn next_time(&self) -> Option<Duration> {
        let heads = self.rings.iter().enumerate().flat_map(|(class, ring)| {
            let head = move |id| Some((self.tenants.get(id)?, class));
            ring.iter().filter_map(head)
        });
        let roomy = heads.filter_map(|(tenant, class)| {
            let first = tenant.lines[class].front()?;
            tenant.has_room(first.pages).then(|| tenant.ready_at())
        });
        roomy.min()
    }
}

#[cfg(test)]
mod tests;
