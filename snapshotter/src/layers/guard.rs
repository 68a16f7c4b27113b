//! When the neighbours are given up on although they still send: the registry may be faster.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::peer::Connection;

/// How long a layer's objects may take, so that what has begun is ended in time.
const FETCH_MAX: Duration = Duration::from_secs(480);

/// Bytes per second of all neighbours together below which the registry is asked instead ...
const RATE_MIN: u64 = 256 << 10;

/// ... over this long.
const RATE_OVER: Duration = Duration::from_secs(5);

/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(500);

/// What a layer may cost beyond twice its announced size, lists and protocol included: an object is
/// on its way from two neighbours when the one is late.
const SIZE_SLACK: u64 = 16 << 20;

/// Ends when the peers are too slow all together, or send more than they announced.
pub(super) async fn guard(peers: &[Arc<Connection>], size_bytes: u64) -> &'static str {
    let received = || peers.iter().map(|peer| peer.traffic.received()).sum::<u64>();
    let (begun, before) = (Instant::now(), received());
    let mut guard = Guard::new(size_bytes, RATE_OVER);
    loop {
        tokio::time::sleep(LOOK).await;
        if let Some(why) = guard.look(begun.elapsed(), received() - before) {
            return why;
        }
    }
}

/// What is remembered from one look to the next.
pub(super) struct Guard {
    most: u64,
    over: Duration,
    /// When the rate was looked at last, since the beginning, and what had come by then.
    last: (Duration, u64),
}

impl Guard {
    /// For a layer of that size, which must come fast enough `over` each such time.
    pub(super) fn new(size_bytes: u64, over: Duration) -> Self {
        let most = size_bytes.saturating_mul(2).saturating_add(SIZE_SLACK);
        Self { most, over, last: (Duration::ZERO, 0) }
    }

    /// Why to give up, `elapsed` after the beginning, when so many bytes have come by then.
    pub(super) fn look(&mut self, elapsed: Duration, received: u64) -> Option<&'static str> {
        if received > self.most {
            return Some("it is larger than it was announced");
        }
        if elapsed > FETCH_MAX {
            return Some("it took too long");
        }
        let (since, before) = self.last;
        if elapsed - since >= self.over {
            if received.saturating_sub(before) < RATE_MIN * self.over.as_secs() {
                return Some("it came too slowly");
            }
            self.last = (elapsed, received);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When a layer of `size_bytes` is given up on and why, if so many bytes come with each look.
    fn given_up(size_bytes: u64, bytes: impl Fn(Duration) -> u64) -> (Duration, &'static str) {
        let (mut guard, mut elapsed, mut received) =
            (Guard::new(size_bytes, RATE_OVER), Duration::ZERO, 0);
        loop {
            elapsed += LOOK;
            received += bytes(elapsed);
            if let Some(why) = guard.look(elapsed, received) {
                return (elapsed, why);
            }
        }
    }

    #[test]
    fn neighbours_are_given_up_on_when_they_are_too_slow_or_send_too_much_or_never_end() {
        let (second, gib) = (Duration::from_secs(1), 1 << 30);
        let enough = RATE_MIN / 2;
        let slow = given_up(gib, |_| enough - 1);
        assert_eq!(slow, (5 * second, "it came too slowly"));
        let halt = given_up(gib, |elapsed| if elapsed <= 8 * second { enough * 2 } else { 0 });
        assert_eq!(halt, (15 * second, "it came too slowly"), "three seconds of five were enough");
        let endless = given_up(gib, |_| enough);
        assert_eq!(endless, (FETCH_MAX + LOOK, "it took too long"));
        // Twice the layer and the slack are 48 MiB.
        let much = given_up(16 << 20, |_| 1 << 20);
        assert_eq!(much, (49 * LOOK, "it is larger than it was announced"));
        assert_eq!(given_up(u64::MAX, |_| gib).1, "it took too long", "no overflow");
        let mut guard = Guard::new(gib, RATE_OVER);
        assert_eq!(guard.look(5 * second, gib), None);
        assert_eq!(guard.look(10 * second, 0), Some("it came too slowly"), "fewer than before");
    }
}
