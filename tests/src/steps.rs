//! A daemon that is killed at a step: just before its N-th call that changes a name on disk, or has
//! the disk written.
//!
//! A library that is loaded before the others counts the calls (`preload/step-preload.c`); the
//! daemon is the one that users run, and knows nothing of it.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Node;
use crate::command::{Invocation, wait_until};
use crate::preload::Preloaded;

const SOURCE: &str = include_str!("../preload/step-preload.c");
/// Where the number of the step stands, as the library knows it.
const ARMED: &str = "/run/godwit-kill-before";
const SOON: Duration = Duration::from_secs(10);

/// A node whose daemon can be killed at a step, from its next start on. Dropping it makes the
/// daemon as before.
pub struct Steps<'a>(Preloaded<'a>);

impl<'a> Steps<'a> {
    /// Prepares a node.
    pub fn install(node: &'a Node) -> Result<Self> {
        Ok(Self(Preloaded::install(node, SOURCE)?))
    }

    /// Runs `command` while the daemon is killed just before step `number`, from 1. Returns whether
    /// it was: with fewer steps than that it goes on. If it was killed, it can be started again.
    ///
    /// Errors: the command fails although the daemon goes on.
    pub fn killed_before(&self, number: usize, command: &Invocation) -> Result<bool> {
        fs::write(self.0.node().path(ARMED), number.to_string())?;
        let ended = command.run();
        // What it does after it has answered, it does soon.
        std::thread::sleep(Duration::from_millis(20));
        fs::remove_file(self.0.node().path(ARMED))?;
        let ended = ended?;
        if !ended.succeeded() {
            wait_until("the daemon is gone", SOON, || Ok(!self.0.is_alive()?))
                .with_context(|| ended.to_string())?;
        }
        let was_killed = !self.0.is_alive()?;
        if was_killed {
            self.0.node().kill_daemon()?;
        }
        Ok(was_killed)
    }
}
