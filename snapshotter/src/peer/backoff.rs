//! Neighbours that are skipped for a while when an image is brought, so that one who does not
//! answer is waited for once and not for every layer.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a neighbour is skipped that did not answer, or did not deliver ...
pub const BACKOFF_SILENT: Duration = Duration::from_secs(30);

/// ... and one that gave other bytes than it said.
pub const BACKOFF_LIAR: Duration = Duration::from_secs(600);

/// Names, and until when.
#[derive(Debug, Default)]
pub struct Backoff(Mutex<HashMap<String, Instant>>);

impl Backoff {
    /// Those that are skipped now.
    pub fn names(&self) -> Vec<String> {
        let now = Instant::now();
        let mut all = self.lock();
        all.retain(|_, until| *until > now);
        all.keys().cloned().collect()
    }

    /// Passes these over for `time` at least.
    pub fn add<'a>(&self, nodes: impl IntoIterator<Item = &'a String>, time: Duration) {
        let until = Instant::now() + time;
        let mut all = self.lock();
        for node in nodes {
            let one = all.entry(node.clone()).or_insert(until);
            *one = until.max(*one);
        }
    }

    /// How long one is skipped yet.
    #[cfg(test)]
    pub(crate) fn time_left(&self, node: &str) -> Option<Duration> {
        Some(self.lock().get(node)?.saturating_duration_since(Instant::now()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_lied_is_passed_over_longer_than_whoever_was_silent() {
        let backoff = Backoff::default();
        let [a, b] = ["a", "b"].map(str::to_owned);
        backoff.add([&a, &b], Duration::from_millis(5));
        backoff.add([&b], BACKOFF_LIAR);
        backoff.add([&b], Duration::ZERO);
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(backoff.names(), [b]);
    }
}
