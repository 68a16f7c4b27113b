//! A CRIU that takes its time or fails, so that a test can do something while a container is frozen
//! or restored.

use std::time::Duration;

use anyhow::Result;

use crate::Node;
use crate::command::wait_until;

/// Written by the changed CRIU once it has been called for a dump or a restore.
const CALLED: &str = "/run/godwit-criu-called";
const SOON: Duration = Duration::from_secs(30);

/// A node whose CRIU is changed. Dropping it makes CRIU as it was.
#[must_use = "dropping it makes CRIU as it was"]
pub struct Changed<'a> {
    node: &'a Node,
}

impl Changed<'_> {
    /// Waits until CRIU has been called at the node for a dump or a restore, and so stands still if
    /// it is slow.
    pub fn wait_for_call(&self) -> Result<()> {
        wait_until("CRIU is called", SOON, || Ok(self.node.path(CALLED).exists()))
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        let script = format!(
            "rm -f /usr/local/bin/criu {CALLED}
             [ ! -e /usr/local/bin/criu.real ] || mv /usr/local/bin/criu.real /usr/local/bin/criu"
        );
        if let Err(error) = self.node.sh(&script) {
            eprintln!("{}: CRIU is not as it was: {error:#}", self.node.name());
        }
    }
}

/// CRIU at a node takes `seconds` longer for everything.
pub fn slow(node: &Node, seconds: u32) -> Result<Changed<'_>> {
    begins_with(node, &format!("sleep {seconds}"))
}

/// CRIU at a node fails at everything.
pub fn broken(node: &Node) -> Result<Changed<'_>> {
    begins_with(node, "exit 1")
}

fn begins_with<'a>(node: &'a Node, command: &str) -> Result<Changed<'a>> {
    node.sh(&format!(
        "rm -f {CALLED}
         [ -e /usr/local/bin/criu ] && [ ! -e /usr/local/bin/criu.real ] && mv /usr/local/bin/criu /usr/local/bin/criu.real
         real=/usr/local/bin/criu.real; [ -e $real ] || real=/usr/sbin/criu
         printf '#!/bin/sh\\n[ \"$1\" = swrk ] && touch {CALLED} && {command}\\nexec %s \"$@\"\\n' $real > /usr/local/bin/criu
         chmod 755 /usr/local/bin/criu"
    ))?;
    Ok(Changed { node })
}
