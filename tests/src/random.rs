//! Chance in fault tests: what a run draws follows from its seed, which is printed and taken back
//! from `GODWIT_SEED`.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::pattern::next_random;

/// A sequence of numbers that follows from its seed.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The sequence of this run's seed.
    pub fn of_run() -> Result<Self> {
        let seed = match std::env::var("GODWIT_SEED") {
            Ok(text) => text.parse().context("GODWIT_SEED")?,
            Err(_) => u64::from(std::process::id()) ^ std::time::UNIX_EPOCH.elapsed()?.as_secs(),
        };
        eprintln!("GODWIT_SEED={seed}");
        Ok(Self(seed))
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        next_random(&mut self.0) % limit
    }

    /// A time shorter than `limit`, which has milliseconds.
    pub fn shorter(&mut self, limit: Duration) -> Duration {
        Duration::from_millis(self.below(u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)))
    }

    /// Another sequence, for a thread of its own.
    pub fn split(&mut self) -> Self {
        Self(next_random(&mut self.0))
    }
}
