//! What may be said once in a while only, however often there is cause: lines of the log that
//! clients can bring about.

use std::cell::Cell;
use std::time::Duration;

use crate::limits::LOG_AGAIN_AFTER;

/// Lets the first cause pass, and then one in each [`LOG_AGAIN_AFTER`].
#[derive(Debug, Default)]
pub struct Seldom {
    last: Cell<Option<Duration>>,
    kept_back: Cell<u64>,
}

impl Seldom {
    /// `Some` when it is to be said at `now`, of the monotonic clock, with the number of times that
    /// it was not since it was said last.
    pub fn pass(&self, now: Duration) -> Option<u64> {
        let since = self.last.get().map(|last| now.saturating_sub(last));
        if since.is_some_and(|since| since < LOG_AGAIN_AFTER) {
            self.kept_back.set(self.kept_back.get().saturating_add(1));
            return None;
        }
        self.last.set(Some(now));
        Some(self.kept_back.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_passes_and_then_one_in_a_while_which_tells_of_the_others() {
        let seldom = Seldom::default();
        let start = Duration::from_secs(7);
        assert_eq!(seldom.pass(start), Some(0));
        assert_eq!(seldom.pass(start), None);
        assert_eq!(seldom.pass(start + LOG_AGAIN_AFTER - Duration::from_nanos(1)), None);
        assert_eq!(seldom.pass(start + LOG_AGAIN_AFTER), Some(2));
        assert_eq!(seldom.pass(start + LOG_AGAIN_AFTER), None);
        assert_eq!(seldom.pass(start + 3 * LOG_AGAIN_AFTER), Some(1));
        assert_eq!(seldom.pass(start + 4 * LOG_AGAIN_AFTER), Some(0));
    }
}
