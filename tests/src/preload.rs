//! A daemon with a library that is loaded before the others: the daemon is the one that users run,
//! and knows nothing of it.

use std::fs;

use anyhow::Result;
use nix::errno::Errno;

use crate::Node;
use crate::root::compile_library;

const DAEMON: &str = "/usr/local/bin/godwit-snapshotter";
const FAIL_SOURCE: &str = include_str!("../preload/fail-preload.c");
/// What fails, as the library knows it.
const FAILING: &str = "/run/godwit-fail-writes";

/// A node whose daemon loads a library from its next start on. Dropping it makes the daemon as
/// before.
pub(crate) struct Preloaded<'a> {
    node: &'a Node,
}

impl<'a> Preloaded<'a> {
    /// Compiles the library of this source and has it loaded.
    pub(crate) fn install(node: &'a Node, source: &str) -> Result<Self> {
        const LIBRARY: &str = "/usr/local/lib/godwit-preload.so";
        let scratch = tempfile::tempdir()?;
        let [from, object] = ["preload.c", "preload.so"].map(|name| scratch.path().join(name));
        fs::write(&from, source)?;
        compile_library(&from, &object)?;
        fs::copy(&object, node.path(LIBRARY))?;
        node.sh(&format!(
            "mv {DAEMON} {DAEMON}.real
             printf '#!/bin/sh\\nLD_PRELOAD={LIBRARY} exec {DAEMON}.real \"$@\"\\n' > {DAEMON}
             chmod 755 {DAEMON}"
        ))?;
        Ok(Self { node })
    }

    pub(crate) fn node(&self) -> &'a Node {
        self.node
    }

    /// Whether the daemon runs.
    pub(crate) fn is_alive(&self) -> Result<bool> {
        Ok(self.node.run(&["pgrep", "-f", &format!("^{DAEMON}.real")])?.succeeded())
    }
}

impl Drop for Preloaded<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.node.sh(&format!("mv {DAEMON}.real {DAEMON}")) {
            eprintln!("the daemon is not as it was: {error:#}");
        }
    }
}

/// A node whose daemon's disk can be made to fail, from the daemon's next start on.
pub struct Failing<'a>(Preloaded<'a>);

impl<'a> Failing<'a> {
    /// Prepares a node.
    pub fn install(node: &'a Node) -> Result<Self> {
        Ok(Self(Preloaded::install(node, FAIL_SOURCE)?))
    }

    /// From now on the daemon cannot write files whose paths have this part.
    pub fn fail(&self, part: &str, error: Errno) -> Result<()> {
        let text = format!("{} {part}\n", error as i32);
        Ok(fs::write(self.0.node().path(FAILING), text)?)
    }

    /// From now on it can.
    pub fn mend(&self) -> Result<()> {
        Ok(fs::remove_file(self.0.node().path(FAILING))?)
    }

    /// Whether the daemon runs.
    pub fn is_alive(&self) -> Result<bool> {
        self.0.is_alive()
    }
}

impl Drop for Failing<'_> {
    fn drop(&mut self) {
        // It may have been mended.
        let _ = fs::remove_file(self.0.node().path(FAILING));
    }
}
