//! What a core's page service counts.

use std::cell::Cell;
use std::time::Duration;

use crate::base::Seldom;

/// Counters of one core's page service.
#[derive(Default)]
pub struct Counters {
    /// Connections accepted by this core.
    pub accepted: Cell<u64>,
    /// Connections handed to another core.
    pub moved: Cell<u64>,
    /// Connections being served; a gauge.
    pub open: Cell<u64>,
    /// GetPage requests.
    pub get_page_requests: Cell<u64>,
    /// Time spent in them.
    pub get_page_time: Cell<Duration>,
    /// Other requests.
    pub other_requests: Cell<u64>,
    /// Requests answered with an error.
    pub request_errors: Cell<u64>,
    /// Connections that were not taken in were told of.
    pub refusals_told: Seldom,
}

/// Adds one to a counter.
pub(crate) fn count(counter: &Cell<u64>) {
    counter.set(counter.get().wrapping_add(1));
}
