//! Events of migrations, for those who watch them.
//!
//! A watcher that is slow misses steps and bytes, but no outcome: outcomes are few, and are kept
//! beside the queue.

use std::collections::VecDeque;
use std::error::Error;
use std::fmt::Display;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use godwit_protos::peer::Progress;
use serde::Serialize;
use tokio::sync::broadcast::{self, error::RecvError};

use crate::error::chain;

/// Events that a slow watcher may lag behind before it misses some.
const EVENTS: usize = 1024;

/// Outcomes that are kept for slow watchers.
const OUTCOMES: usize = 1024;

/// What happens in migrations that this node takes part in.
#[derive(Debug)]
pub struct Events {
    sender: broadcast::Sender<Progress>,
    outcomes: Arc<Mutex<Outcomes>>,
}

/// The latest outcomes, and where they stand among all events.
#[derive(Debug, Default)]
struct Outcomes {
    /// How many events there have been.
    events: u64,
    /// Each with the number of its event.
    latest: VecDeque<(u64, Progress)>,
}

/// Follows events from one moment on.
#[derive(Debug)]
pub struct Watcher {
    receiver: broadcast::Receiver<Progress>,
    outcomes: Arc<Mutex<Outcomes>>,
    /// Number of the event that comes next.
    next: u64,
    /// Outcomes that it was too slow for.
    missed: VecDeque<Progress>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(EVENTS).0, outcomes: Arc::default() }
    }
}

/// Whether nothing follows in this migration.
pub fn is_outcome(event: &Progress) -> bool {
    matches!(event.step.as_str(), "done" | "failed")
}

fn lock(outcomes: &Mutex<Outcomes>) -> MutexGuard<'_, Outcomes> {
    outcomes.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watcher {
    /// The next event, or an outcome that it was too slow for. `None` once the node is gone.
    pub async fn next(&mut self) -> Option<Progress> {
        loop {
            if let Some(outcome) = self.missed.pop_front() {
                return Some(outcome);
            }
            match self.receiver.recv().await {
                Ok(event) => {
                    self.next += 1;
                    return Some(event);
                }
                Err(RecvError::Lagged(missed)) => {
                    let numbers = self.next..self.next.saturating_add(missed);
                    self.next = numbers.end;
                    let outcomes = lock(&self.outcomes);
                    let of = outcomes.latest.iter().filter(|(number, _)| numbers.contains(number));
                    self.missed = of.map(|(_, event)| event.clone()).collect();
                }
                Err(RecvError::Closed) => return None,
            }
        }
    }
}

impl Events {
    /// Every event from now on.
    pub fn subscribe(&self) -> Watcher {
        // No event comes meanwhile.
        let outcomes = lock(&self.outcomes);
        let (receiver, next) = (self.sender.subscribe(), outcomes.events);
        drop(outcomes);
        Watcher { receiver, outcomes: self.outcomes.clone(), next, missed: VecDeque::new() }
    }

    fn put(&self, event: Progress) {
        let mut outcomes = lock(&self.outcomes);
        if is_outcome(&event) {
            let number = outcomes.events;
            outcomes.latest.push_back((number, event.clone()));
            if outcomes.latest.len() > OUTCOMES {
                outcomes.latest.pop_front();
            }
        }
        outcomes.events += 1;
        // There may be no watcher.
        let _ = self.sender.send(event);
    }

    fn send(&self, event: Progress) {
        tracing::info!(migration = event.migration, step = event.step, text = event.text);
        self.put(event);
    }

    /// A migration reached a step of the procedure.
    pub fn step(&self, migration: &str, step: &str, text: &str) {
        self.send(progress(migration, step, text.to_owned()));
    }

    /// Bytes that a migration has received so far, from all nodes; for a display, not for the log.
    pub fn bytes(&self, migration: &str, done_bytes: u64) {
        let event = progress(migration, "progress", String::new());
        self.put(Progress { done_bytes, ..event });
    }

    /// A migration is over, and this is what it cost.
    pub fn done(&self, migration: &str, report: &(impl Display + Serialize)) {
        let report_json = serde_json::to_string(report).unwrap_or_default();
        self.send(Progress { report_json, ..progress(migration, "done", report.to_string()) });
    }

    /// A migration failed, and what that means for its container; `undecided` while it is not
    /// known where that runs.
    pub fn failed(&self, migration: &str, error: &dyn Error, outcome: &str, undecided: bool) {
        let text = format!("{}; {outcome}", chain(error));
        self.send(Progress { undecided, ..progress(migration, "failed", text) });
    }
}

fn progress(migration: &str, step: &str, text: String) -> Progress {
    let (migration, step) = (migration.to_owned(), step.to_owned());
    Progress { migration, step, text, ..Progress::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: more events than the queue holds, with outcomes among them at its both ends and
    /// before.
    #[tokio::test]
    async fn a_watcher_that_lags_misses_no_outcome() {
        let events = Events::default();
        events.step("0", "begun", "before it watches");
        events.done("0", &"before it watches");
        let mut watcher = events.subscribe();
        for number in 0..3 * EVENTS as u64 {
            events.bytes("1", number);
            if [0, 700, 2000].contains(&number) {
                events.done(&number.to_string(), &"it runs");
            }
        }
        events.failed("1", &std::io::Error::other("broken"), "it runs on", false);
        let (mut outcomes, mut others) = (Vec::new(), 0);
        loop {
            let event = watcher.next().await.unwrap();
            let is_last = event.step == "failed";
            if is_outcome(&event) {
                outcomes.push(event.migration);
            } else {
                others += 1;
            }
            if is_last {
                break;
            }
        }
        assert_eq!(outcomes, ["0", "700", "2000", "1"]);
        assert!(others < EVENTS, "{others} came: it did not lag");
        events.step("2", "begun", "later");
        assert_eq!(watcher.next().await.unwrap().migration, "2");
        drop(events);
        assert!(watcher.next().await.is_none());
    }
}
