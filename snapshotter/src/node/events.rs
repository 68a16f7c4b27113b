//! Events of migrations, for those who watch them.

use std::error::Error;
use std::fmt::Display;

use godwit_protos::peer::Progress;
use serde::Serialize;
use tokio::sync::broadcast;

use crate::error::chain;

/// Events that a slow watcher may lag behind before it misses some.
const EVENTS: usize = 1024;

/// What happens in migrations that this node takes part in.
#[derive(Debug)]
pub struct Events {
    sender: broadcast::Sender<Progress>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(EVENTS).0 }
    }
}

impl Events {
    /// Every event from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<Progress> {
        self.sender.subscribe()
    }

    fn send(&self, event: Progress) {
        tracing::info!(migration = event.migration, step = event.step, text = event.text);
        // There may be no watcher.
        let _ = self.sender.send(event);
    }

    /// A migration reached a step of the procedure.
    pub fn step(&self, migration: &str, step: &str, text: &str) {
        self.send(progress(migration, step, text.to_owned()));
    }

    /// Bytes that a migration has received so far, from all nodes; for a display, not for the log.
    pub fn bytes(&self, migration: &str, done_bytes: u64) {
        let event = progress(migration, "progress", String::new());
        let _ = self.sender.send(Progress { done_bytes, ..event });
    }

    /// A migration is over, and this is what it cost.
    pub fn done(&self, migration: &str, report: &(impl Display + Serialize)) {
        let report_json = serde_json::to_string(report).unwrap_or_default();
        self.send(Progress { report_json, ..progress(migration, "done", report.to_string()) });
    }

    /// A migration failed, and what that means for the container; `undecided` if nobody can tell yet
    /// where it runs.
    pub fn failed(&self, migration: &str, error: &dyn Error, outcome: &str, undecided: bool) {
        let text = format!("{}; {outcome}", chain(error));
        self.send(Progress { undecided, ..progress(migration, "failed", text) });
    }
}

fn progress(migration: &str, step: &str, text: String) -> Progress {
    let (migration, step) = (migration.to_owned(), step.to_owned());
    Progress { migration, step, text, ..Progress::default() }
}
