//! What a node has seen of its containers and volumes: how fast they are written, which moved away,
//! and which were removed. In memory only.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_protos::{ContainerRef, Subject};

use crate::policy::predict::write_rate;

/// Subjects whose write rates are remembered, at most.
const RATES_MAX: usize = 4096;

/// What a node has seen of its containers and volumes.
#[derive(Debug, Default)]
pub struct Observed {
    moved: Mutex<HashSet<ContainerRef>>,
    removed: Mutex<Vec<(Subject, Instant)>>,
    /// Bytes per second that were seen to be written.
    rates: Mutex<HashMap<Subject, f64>>,
}

impl Observed {
    /// A container or volume was removed here.
    pub(super) fn removed(&self, subject: Subject) {
        self.rates().remove(&subject);
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        removed.push((subject, Instant::now()));
    }

    /// What was removed here within `age`.
    pub fn recently_removed(&self, age: Duration) -> Vec<String> {
        let mut removed = self.removed.lock().unwrap_or_else(PoisonError::into_inner);
        removed.retain(|(_, at)| at.elapsed() < age);
        removed.iter().map(|(subject, _)| subject.to_string()).collect()
    }

    fn rates(&self) -> MutexGuard<'_, HashMap<Subject, f64>> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `changed` of `size` bytes of a subject were seen to differ after `since`. Returns its write
    /// rate.
    pub fn learn(&self, subject: &Subject, size: u64, changed: u64, since: Duration) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let rate = write_rate(size as f64, changed as f64, since.as_secs_f64());
        let mut rates = self.rates();
        if rates.len() < RATES_MAX || rates.contains_key(subject) {
            rates.insert(subject.clone(), rate);
        }
        rate
    }

    /// Bytes per second that are written to a subject, as last seen.
    pub fn write_rate(&self, subject: &Subject) -> Option<f64> {
        self.rates().get(subject).copied()
    }

    /// A container runs elsewhere now: that it disappears here does not mean that it was removed.
    pub fn moved_away(&self, container: &ContainerRef) {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner).insert(container.clone());
    }

    /// Whether it had moved away; it counts as here from now on.
    pub fn take_moved(&self, container: &ContainerRef) -> bool {
        self.moved.lock().unwrap_or_else(PoisonError::into_inner).remove(container)
    }
}
