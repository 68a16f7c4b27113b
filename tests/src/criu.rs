//! A CRIU that takes its time or fails, so that a test can do something while a container is frozen
//! or restored.

use anyhow::Result;

use crate::Node;

/// CRIU at a node takes `seconds` longer for everything.
pub fn slow(node: &Node, seconds: u32) -> Result<()> {
    begins_with(node, &format!("sleep {seconds}"))
}

/// CRIU at a node fails at everything.
pub fn broken(node: &Node) -> Result<()> {
    begins_with(node, "exit 1")
}

fn begins_with(node: &Node, command: &str) -> Result<()> {
    node.sh(&format!(
        "[ -e /usr/local/bin/criu ] && [ ! -e /usr/local/bin/criu.real ] && mv /usr/local/bin/criu /usr/local/bin/criu.real
         real=/usr/local/bin/criu.real; [ -e $real ] || real=/usr/sbin/criu
         printf '#!/bin/sh\\n[ \"$1\" = swrk ] && {command}\\nexec %s \"$@\"\\n' $real > /usr/local/bin/criu
         chmod 755 /usr/local/bin/criu"
    ))
    .map(drop)
}

/// CRIU as it was before.
pub fn normal(node: &Node) -> Result<()> {
    let script = "rm /usr/local/bin/criu; \
        [ ! -e /usr/local/bin/criu.real ] || mv /usr/local/bin/criu.real /usr/local/bin/criu";
    node.sh(script).map(drop)
}
