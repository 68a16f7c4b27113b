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

    fn send(&self, migration: &str, step: &str, text: String, report_json: String) {
        tracing::info!(migration, step, text);
        // There may be no watcher.
        let _ = self.sender.send(Progress {
            migration: migration.to_owned(),
            step: step.to_owned(),
            text,
            report_json,
            ..Progress::default()
        });
    }

    /// A migration reached a step of the procedure.
    pub fn step(&self, migration: &str, step: &str, text: &str) {
        self.send(migration, step, text.to_owned(), String::new());
    }

    /// Bytes that a migration has received so far, from all nodes; for a display, not for the log.
    pub fn bytes(&self, migration: &str, done_bytes: u64) {
        let (migration, step) = (migration.to_owned(), "progress".to_owned());
        let _ = self.sender.send(Progress { migration, step, done_bytes, ..Progress::default() });
    }

    /// A migration is over, and this is what it cost.
    pub fn done(&self, migration: &str, report: &(impl Display + Serialize)) {
        let json = serde_json::to_string(report).unwrap_or_default();
        self.send(migration, "done", report.to_string(), json);
    }

    /// A migration failed, and what that means for the container.
    pub fn failed(&self, migration: &str, error: &dyn Error, outlook: &str) {
        self.send(migration, "failed", format!("{}; {outlook}", chain(error)), String::new());
    }
}
