//! When a subject is captured next.
//!
//! A base is worth as much as it resembles the state that a migration will want. So the period
//! follows the write rate: the next capture is due when the expected difference to the last one
//! ([`predict::changed`](changed)) reaches a set size. Three things hold it back: a smallest
//! period, a [`Budget`] of processor and disk, and the node's load ([`may_run`]).

use std::time::Duration;

#[cfg(doc)]
use crate::predict::changed;

/// No period is longer than this.
pub const PERIOD_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// A setting that makes no sense, by its key in the daemon's configuration.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// The shortest period.
    #[error("`period_min_s` must be more than nothing")]
    Min,
    /// The longest period.
    #[error("`period_max_s` must be at least `period_min_s`, and a year at most")]
    Max,
    /// The difference that makes a capture due.
    #[error("`difference_mib` must be more than nothing")]
    TargetBytes,
    /// The spread of periods.
    #[error("`jitter` is {0}, but must be at least 0 and less than 1")]
    Jitter(f64),
    /// The share of a processor.
    #[error("`cpu_share` is {0}, but must be more than 0 and at most 1")]
    CpuShare(f64),
    /// The share of the disk's bandwidth.
    #[error("`disk_mib_per_s` must be more than nothing")]
    Disk,
}

/// How often subjects are captured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    min: Duration,
    max: Duration,
    target_bytes: u64,
    jitter: f64,
}

impl Schedule {
    /// Captures between every `min` and every `max`, when about `target_bytes` have changed; each
    /// period is longer by a share of itself below `jitter`, so that subjects that began together
    /// do not stay together.
    pub fn new(
        min: Duration,
        max: Duration,
        target_bytes: u64,
        jitter: f64,
    ) -> Result<Self, ScheduleError> {
        if min.is_zero() {
            return Err(ScheduleError::Min);
        }
        if max < min || max > PERIOD_MAX {
            return Err(ScheduleError::Max);
        }
        if target_bytes == 0 {
            return Err(ScheduleError::TargetBytes);
        }
        if !(0.0..1.0).contains(&jitter) {
            return Err(ScheduleError::Jitter(jitter));
        }
        Ok(Self { min, max, target_bytes, jitter })
    }

    /// How long after one capture the next is due.
    ///
    /// A subject whose write rate was never measured is captured again after `min`: two captures
    /// tell the rate. The jitter comes after the bounds, or subjects at a bound would all keep
    /// step.
    ///
    /// - Units: `write_rate` in bytes per second; what overwrites a byte again counts again.
    /// - `seed`: the same for the same capture, for example of [`seed`].
    pub fn period(&self, size_bytes: u64, write_rate: Option<f64>, seed: u64) -> Duration {
        let due = match write_rate {
            None => self.min,
            Some(rate) => self.due(size_bytes as f64, rate),
        };
        due.mul_f64(1.0 + self.jitter * share_of(seed))
    }

    /// When `target_bytes` of `size` are expected to differ, within the bounds.
    fn due(&self, size: f64, rate: f64) -> Duration {
        let target = self.target_bytes as f64;
        if target >= size || rate.is_nan() || rate <= 0.0 {
            return self.max;
        }
        let seconds = -size / rate * (-target / size).ln_1p();
        Duration::try_from_secs_f64(seconds).unwrap_or(self.max).clamp(self.min, self.max)
    }
}

/// What captures may take of the node, on average.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    cpu_share: f64,
    disk_bytes_per_s: u64,
}

impl Budget {
    /// A share of one processor, and bytes per second that may be written.
    pub fn new(cpu_share: f64, disk_bytes_per_s: u64) -> Result<Self, ScheduleError> {
        if !(cpu_share > 0.0 && cpu_share <= 1.0) {
            return Err(ScheduleError::CpuShare(cpu_share));
        }
        if disk_bytes_per_s == 0 {
            return Err(ScheduleError::Disk);
        }
        Ok(Self { cpu_share, disk_bytes_per_s })
    }

    /// The earliest start of the next capture of any subject, counted from the start of one that
    /// took `busy` and wrote `bytes`: then the average over that time stays within the budget.
    pub fn next_start(&self, busy: Duration, bytes: u64) -> Duration {
        let by_cpu = busy.as_secs_f64() / self.cpu_share;
        let by_disk = bytes as f64 / self.disk_bytes_per_s as f64;
        Duration::try_from_secs_f64(by_cpu.max(by_disk)).unwrap_or(PERIOD_MAX).min(PERIOD_MAX)
    }
}

/// Whether a node of this load may capture anything now. Runnable tasks per processor, as peers
/// hear too; a load that is not known is too high.
pub fn may_run(load: f64, load_max: f64) -> bool {
    load <= load_max
}

/// A number that is the same for the same capture on every node and after every restart (FNV-1a).
pub fn seed(node: &str, subject: &str, sequence: u64) -> u64 {
    let parts = [node.as_bytes(), b"\0", subject.as_bytes(), b"\0", &sequence.to_le_bytes()];
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    parts.iter().copied().flatten().fold(0xcbf2_9ce4_8422_2325, step)
}

/// A number in 0..1, evenly spread over seeds (the last step of SplitMix64).
fn share_of(seed: u64) -> f64 {
    let mixed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ mixed >> 31) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predict::changed;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const MIN: Duration = Duration::from_secs(60);
    const MAX: Duration = Duration::from_secs(24 * 3600);

    fn schedule(jitter: f64) -> Schedule {
        Schedule::new(MIN, MAX, 16 * MIB, jitter).unwrap()
    }

    #[test]
    fn an_error_names_the_key() {
        let bad = |min, max, target, jitter| Schedule::new(min, max, target, jitter).unwrap_err();
        assert_eq!(bad(Duration::ZERO, MAX, 1, 0.0), ScheduleError::Min);
        assert_eq!(bad(MAX, MIN, 1, 0.0), ScheduleError::Max);
        assert_eq!(bad(MIN, PERIOD_MAX + MIN, 1, 0.0), ScheduleError::Max);
        assert_eq!(bad(MIN, MAX, 0, 0.0), ScheduleError::TargetBytes);
        for jitter in [-0.1, 1.0, f64::NAN] {
            assert!(bad(MIN, MAX, 1, jitter).to_string().contains("`jitter`"));
        }
        for share in [0.0, 1.1, f64::NAN] {
            assert!(Budget::new(share, 1).unwrap_err().to_string().contains("`cpu_share`"));
        }
        assert_eq!(Budget::new(0.5, 0), Err(ScheduleError::Disk));
    }

    #[test]
    fn what_never_changes_that_much_is_captured_at_the_longest_period() {
        let schedule = schedule(0.0);
        assert_eq!(schedule.period(1024 * MIB, Some(0.0), 1), MAX);
        assert_eq!(schedule.period(1024 * MIB, Some(f64::NAN), 1), MAX);
        assert_eq!(schedule.period(16 * MIB, Some(1e9), 1), MAX, "not larger than the target");
        assert_eq!(schedule.period(0, None, 1), MIN, "two captures tell the rate");
        assert_eq!(schedule.period(1024 * MIB, Some(f64::INFINITY), 1), MIN);
    }

    #[test]
    fn the_average_stays_within_the_budget() {
        let budget = Budget::new(0.1, 10_000_000).unwrap();
        assert_eq!(budget.next_start(Duration::from_secs(2), 1000), Duration::from_secs(20));
        assert_eq!(budget.next_start(Duration::from_secs(2), 500_000_000), Duration::from_secs(50));
        assert_eq!(budget.next_start(Duration::MAX, u64::MAX), PERIOD_MAX);
    }

    #[test]
    fn a_loaded_node_captures_nothing() {
        assert!(may_run(0.5, 0.8));
        assert!(!may_run(0.9, 0.8));
        assert!(!may_run(f64::NAN, 0.8));
    }

    /// Seeds must survive a new compiler and agree between nodes: literal values.
    #[test]
    fn a_seed_is_the_same_everywhere() {
        assert_eq!(seed("a", "memory|x", 7), 0xc5dd_c9a1_5110_7da6);
        assert_ne!(seed("a", "bc", 1), seed("ab", "c", 1));
        assert_ne!(seed("a", "b", 1), seed("a", "b", 2));
    }

    #[test]
    fn jitter_spreads_evenly() {
        let shares: Vec<f64> = (0..1000).map(share_of).collect();
        let mean = shares.iter().sum::<f64>() / 1000.0;
        assert!((0.45..0.55).contains(&mean), "{mean}");
        assert!(shares.iter().all(|share| (0.0..1.0).contains(share)));
    }

    proptest! {
        /// Method: periods between the bounds; the model that migrations are planned with says how
        /// much has changed.
        #[test]
        fn a_period_ends_when_the_target_has_changed(size in 17 * MIB..4096 * MIB, rate in 1e3f64..1e7) {
            let period = schedule(0.0).period(size, Some(rate), 0);
            prop_assert!((MIN..=MAX).contains(&period));
            let differs = changed(size as f64, rate, period.as_secs_f64());
            if period > MIN {
                prop_assert!(differs <= 16.01 * MIB as f64);
            }
            if period < MAX {
                prop_assert!(differs >= 15.99 * MIB as f64);
            }
        }

        #[test]
        fn jitter_comes_after_the_bounds_and_only_delays(
            size: u64, rate in proptest::option::of(0.0f64..1e12), jitter in 0.0f64..0.99, seed: u64,
        ) {
            let exact = schedule(0.0).period(size, rate, seed);
            let period = schedule(jitter).period(size, rate, seed);
            prop_assert!(period >= exact && period <= exact.mul_f64(1.0 + jitter));
            prop_assert_eq!(period, schedule(jitter).period(size, rate, seed));
        }

        #[test]
        fn faster_writers_are_never_captured_less_often(size: u64, rate in 0.0f64..1e9, more in 0.0f64..1e9) {
            let schedule = schedule(0.3);
            prop_assert!(schedule.period(size, Some(rate + more), 7) <= schedule.period(size, Some(rate), 7));
        }
    }
}
