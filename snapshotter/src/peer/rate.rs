//! How fast a peer is, as far as this node has seen: what decides whether it is waited for.
//!
//! Pure: every call takes the time as an argument. A pace is kept per peer and migration
//! ([`super::fetch::PeerHealth`]), and begins with what earlier migrations measured
//! ([`super::link`]).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Waits that are remembered of one peer.
const WAITS_MAX: usize = 64;

/// A peer that has been busy for less than this has no rate of its own yet: a burst says little of
/// a link.
const MEASURED_MIN: Duration = Duration::from_millis(100);

/// What was seen of one peer.
#[derive(Clone, Debug, Default)]
pub(super) struct RateEstimate {
    /// Bytes per second of earlier migrations, if there were any.
    known_rate: Option<f64>,
    bytes: u64,
    busy: Duration,
    /// Requests on their way, and since when there are any.
    flights: u32,
    busy_since: Option<Instant>,
    /// How long each of the last messages was waited for.
    waits: VecDeque<Duration>,
    /// Time waited since its last response.
    silent: Duration,
}

impl RateEstimate {
    /// A peer of which earlier migrations measured `rate` in bytes per second.
    pub(super) fn known(rate: Option<f64>) -> Self {
        Self { known_rate: rate, ..Self::default() }
    }

    /// A request goes out.
    pub(super) fn begin(&mut self, now: Instant) {
        self.flights += 1;
        self.busy_since.get_or_insert(now);
    }

    /// A message with `bytes` of objects, uncompressed, came after a wait.
    pub(super) fn progress(&mut self, bytes: u64, wait: Duration) {
        self.bytes += bytes;
        self.silent = Duration::ZERO;
        if self.waits.len() == WAITS_MAX {
            self.waits.pop_front();
        }
        self.waits.push_back(wait);
    }

    /// A request is over; `in_vain` is how long nothing had come when it was given up.
    pub(super) fn end(&mut self, now: Instant, in_vain: Duration) {
        self.flights = self.flights.saturating_sub(1);
        self.silent += in_vain;
        if self.flights == 0
            && let Some(since) = self.busy_since.take()
        {
            self.busy += now.saturating_duration_since(since);
        }
    }

    /// How long requests have been on their way, in all.
    pub(super) fn busy(&self, now: Instant) -> Duration {
        self.busy
            + self.busy_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since))
    }

    /// Bytes per second while requests were on their way, or of earlier migrations; `None` if
    /// neither is known.
    pub(super) fn rate(&self, now: Instant) -> Option<f64> {
        let busy = self.busy(now);
        if busy < MEASURED_MIN {
            return self.known_rate;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let bytes = self.bytes as f64;
        Some(bytes / busy.as_secs_f64())
    }

    /// The rate, if enough came to remember it for the next migration.
    pub(super) fn measured(&self, now: Instant, bytes_min: u64) -> Option<f64> {
        (self.bytes >= bytes_min).then(|| self.rate(now)).flatten()
    }

    /// How long its next message may take before it is overtaken: twice the 95th percentile of its
    /// own history, at least `grace`; nothing for one that did not respond.
    pub(super) fn hedge_delay(&self, grace: Duration) -> Duration {
        if !self.silent.is_zero() {
            return Duration::ZERO;
        }
        let mut waits: Vec<Duration> = self.waits.iter().copied().collect();
        waits.sort_unstable();
        let high = waits.get((waits.len() * 95 / 100).min(waits.len().saturating_sub(1)));
        high.map_or(grace, |high| (*high * 2).max(grace))
    }

    /// Time waited since its last response.
    pub(super) fn silent(&self) -> Duration {
        self.silent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_rate_is_bytes_over_the_time_with_requests_on_their_way() {
        let begun = Instant::now();
        let mut pace = RateEstimate::known(Some(7.0));
        assert_eq!(pace.rate(begun), Some(7.0));
        pace.begin(begun);
        pace.begin(begun);
        pace.progress(1000, MS);
        pace.end(begun + 50 * MS, Duration::ZERO);
        assert_eq!(pace.rate(begun + 40 * MS), Some(7.0), "too early to tell");
        pace.end(begun + 100 * MS, Duration::ZERO);
        assert_eq!(pace.rate(begun + 900 * MS), Some(10_000.0), "idle time does not count");
        pace.begin(begun + 900 * MS);
        assert_eq!(pace.rate(begun + 1000 * MS), Some(5_000.0), "waiting does");
    }

    #[test]
    fn who_was_slow_before_is_given_more_time_and_who_was_silent_none() {
        let mut pace = RateEstimate::default();
        assert_eq!(pace.hedge_delay(50 * MS), 50 * MS);
        for _ in 0..100 {
            pace.progress(1, 80 * MS);
        }
        assert_eq!(pace.hedge_delay(50 * MS), 160 * MS);
        pace.end(Instant::now(), 70 * MS);
        assert_eq!(pace.hedge_delay(50 * MS), Duration::ZERO);
        pace.progress(1, MS);
        assert_eq!(pace.hedge_delay(50 * MS), 160 * MS, "a word makes up for it");
    }
}
