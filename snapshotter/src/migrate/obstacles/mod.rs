//! Obstacles: what of a running container cannot move, or becomes different by moving.
//!
//! The source surveys its container before anything is frozen: it reads `/proc` once per process
//! ([`process`]) and passes what it read to each of [`KINDS`]. A kind is a function that looks for
//! one thing and adds
//!
//! - an *obstacle* where the move would fail or its result would be wrong: plan, migrate and
//!   consistent snapshots refuse;
//! - a *warning* where the container moves and something becomes different.
//!
//! Every finding says what it is, why it matters and what to do. `DescribeResponse` carries the
//! findings, so `godwit plan` and `godwit migrate` show the same ones. A session surveys when it
//! begins and again directly before the freeze, since a container may have changed meanwhile. What
//! concerns the destination alone is looked for there ([`super::request::pre_flight`]).
//!
//! The survey is bounded by [`process::Limits`]. What lies beyond them is left to CRIU, which
//! refuses it after the freeze; the container then runs on.
//!
//! To add a kind: write `fn(&Container, &mut Findings)` in the file of its subject, and list it in
//! [`KINDS`].

mod aio;
mod bulk;
mod clocks;
mod databases;
mod files;
mod mounts;
mod process;
mod removed;
mod sockets;
mod tasks;
mod watches;

use std::collections::{BTreeSet, HashSet};
use std::fs;

use criu_wrapper::supplement::InterfaceUse;
use oci_spec::runtime::Spec;

use super::MigrationError;
use super::describe::WritableVolume;
pub(super) use aio::check_frozen as check_frozen_aio;
pub(super) use process::Process;

/// Findings of one severity that are listed by name; the rest are counted.
const LISTED_MAX: usize = 16;

/// Looks for one thing that a container may have.
type Kind = fn(&Container, &mut Findings);

/// Everything that the survey looks for.
const KINDS: &[Kind] = &[
    tasks::outside_the_tree,
    tasks::traced,
    tasks::own_namespaces,
    tasks::stopped,
    clocks::alarm_timers,
    files::special,
    files::mappings,
    files::on_hidden_mounts,
    files::foreign_namespaces,
    files::locks,
    sockets::protocols,
    sockets::external,
    sockets::addresses,
    sockets::interfaces,
    mounts::user_namespace,
    mounts::removed_sources,
    watches::on_overlays,
    databases::open,
    aio::rings,
    removed::beside_block_volumes,
    bulk::tmpfs,
    bulk::deleted,
];

/// A running container as the kinds see it.
#[derive(Debug, Default)]
pub(super) struct Container {
    /// Its specification.
    pub(super) spec: Spec,
    /// Its init process, by its number in the daemon's process id namespace.
    pub(super) init_pid: u32,
    /// Its writable volumes.
    pub(super) volumes: Vec<WritableVolume>,
    /// Ids of the processes that exec added and that still run.
    pub(super) execs: Vec<String>,
    /// All processes of its control group, exec's too.
    pub(super) processes: Vec<Process>,
}

impl Container {
    /// Its init process, if it still runs.
    fn init(&self) -> Option<&Process> {
        self.processes.iter().find(|process| process.pid == self.init_pid)
    }

    /// The init process and its descendants: what CRIU dumps.
    fn tree(&self) -> HashSet<u32> {
        let mut tree = HashSet::from([self.init_pid]);
        // Once for each generation, of which there are few.
        loop {
            let children = self.processes.iter().filter(|child| tree.contains(&child.parent()));
            let before = tree.len();
            tree.extend(children.map(|child| child.pid).collect::<Vec<_>>());
            if tree.len() == before {
                return tree;
            }
        }
    }

    /// The processes that CRIU dumps.
    fn inside(&self) -> impl Iterator<Item = &Process> {
        let tree = self.tree();
        self.processes.iter().filter(move |process| tree.contains(&process.pid))
    }

    /// Those of its control group that CRIU does not dump.
    fn outside(&self) -> Vec<&Process> {
        let tree = self.tree();
        self.processes.iter().filter(|process| !tree.contains(&process.pid)).collect()
    }

    /// How messages name any process, by its number in the daemon's process id namespace.
    fn named(&self, pid: u32) -> String {
        let known = |all: &[Process]| all.iter().find(|one| one.pid == pid).map(Process::named);
        if pid == 0 {
            return "a process outside the container".to_owned();
        }
        if let Some(name) = known(&self.processes) {
            let is_added = self.outside().iter().any(|process| process.pid == pid);
            return if is_added { format!("{name}, which exec added,") } else { name };
        }
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("process {pid} ({}) of the node", name.trim())
    }
}

/// What a survey found, as text for people.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// What makes the move fail or its result wrong.
    pub obstacles: Vec<String>,
    /// What becomes different by moving.
    pub warnings: Vec<String>,
    /// Addresses that its sockets use, which the destination must have.
    pub addresses: BTreeSet<String>,
    /// Interfaces that its sockets use, which the destination must have.
    pub interfaces: BTreeSet<InterfaceUse>,
    /// Its bind mounts, whose sources the destination must have.
    pub binds: Vec<Bind>,
}

/// A bind mount from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bind {
    /// On the host.
    pub source: String,
    /// In the container.
    pub point: String,
    /// Whether it is a directory.
    pub is_directory: bool,
}

impl Findings {
    /// Adds an obstacle: what there is, why it cannot move, and what the user can do.
    pub(super) fn obstacle(
        &mut self,
        what: impl Into<String>,
        why: impl Into<String>,
        cure: impl Into<String>,
    ) {
        add(&mut self.obstacles, sentence(what.into(), why.into(), cure.into()));
    }

    /// Adds a warning: what there is, what becomes different, and what the user can do about it.
    pub(super) fn warning(
        &mut self,
        what: impl Into<String>,
        why: impl Into<String>,
        cure: impl Into<String>,
    ) {
        add(&mut self.warnings, sentence(what.into(), why.into(), cure.into()));
    }

    /// Errors: [`MigrationError::Obstacles`], if there are any.
    pub fn check(&self) -> Result<(), MigrationError> {
        check(&self.obstacles)
    }

    /// As a peer and the user get it: long lists are cut.
    fn listed(mut self) -> Self {
        for list in [&mut self.obstacles, &mut self.warnings] {
            let beyond = list.len().saturating_sub(LISTED_MAX);
            if beyond > 0 {
                list.truncate(LISTED_MAX);
                list.push(format!("and {beyond} more of the kind"));
            }
        }
        self
    }
}

impl From<Bind> for godwit_protos::peer::BindMount {
    fn from(Bind { source, point, is_directory }: Bind) -> Self {
        Self { source, point, is_directory }
    }
}

/// Refuses a container of which there are obstacles. Errors: [`MigrationError::Obstacles`].
pub fn check(obstacles: &[String]) -> Result<(), MigrationError> {
    if obstacles.is_empty() {
        return Ok(());
    }
    Err(MigrationError::Obstacles(obstacles.to_vec()))
}

fn sentence(what: String, why: String, cure: String) -> String {
    [what, ": ".to_owned(), why, "; ".to_owned(), cure].concat()
}

/// Several processes may share what was found, such as an open file: it is listed once.
fn add(list: &mut Vec<String>, text: String) {
    if !list.contains(&text) {
        list.push(text);
    }
}

/// Looks for every kind. May block.
pub(super) fn survey(container: &Container) -> Findings {
    let mut findings = Findings::default();
    for kind in KINDS {
        kind(container, &mut findings);
    }
    findings.listed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_are_listed_once_and_long_lists_are_counted() {
        let mut findings = Findings::default();
        assert!(findings.check().is_ok());
        for number in 0..20 {
            for _ in 0..2 {
                findings.obstacle(format!("file {number}"), "is odd", "close it");
            }
        }
        findings.warning("a clock", "may jump", "look at it");
        let findings = findings.listed();
        assert_eq!(findings.obstacles.len(), LISTED_MAX + 1);
        assert_eq!(findings.obstacles[0], "file 0: is odd; close it");
        assert_eq!(findings.obstacles[LISTED_MAX], "and 4 more of the kind");
        assert_eq!(findings.warnings, ["a clock: may jump; look at it"]);
        let refused = findings.check().unwrap_err();
        assert!(refused.to_string().contains("file 3: is odd; close it"), "{refused}");
    }
}
