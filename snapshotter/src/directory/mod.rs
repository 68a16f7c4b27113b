//! The directory: which nodes hold a snapshot of a subject, and which hold a manifest.
//!
//! A migration asks it once, while its source captures the first round, and then asks no node for
//! objects but the nodes that it names, and the source. One trait, two backends: [`neighbours`]
//! asks every configured peer, [`etcd`] asks etcd, where each node publishes what it holds. A
//! [`Lookup`] collects what is found until its caller has waited long enough.
//!
//! What comes back is advice from strangers. [`Found`] keeps only what answers the question, up to
//! a limit; an entry that is out of date or a lie costs a refused request, as every object is
//! checked against its digest anyway. Entries of one subject are ordered by their place in its
//! lineage; ages are durations, each measured on one clock, and decide between equal places and
//! between different users of a service only.

pub mod etcd;
pub mod neighbours;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use godwit_protos::{Digest, ServiceRef, Subject};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::config::{Backend, Config};
use crate::host::unix_ms;
use crate::peer::Connection;
pub use crate::peer::LOOKUP_MAX;
use crate::store::Snapshot;

/// Largest place in a lineage that another node may name, far beyond any that is reached.
pub const SEQUENCE_MAX: u64 = 1 << 60;

/// Entries of one answer and of one lookup that are looked at.
const ENTRIES_MAX: usize = 1024;

/// Other users whose memory one node names for a service, the youngest first.
const SIBLINGS_MAX: usize = 8;

/// Connections to the neighbours that have answered so far; more may join until its sender is gone.
pub type Joined = watch::Receiver<Vec<Arc<Connection>>>;

/// Something that a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The node.
    pub node: String,
    /// What it is a snapshot of; `None` says only that the node has the manifest and all that it
    /// refers to.
    pub subject: Option<Subject>,
    /// Place in the subject's lineage; higher is newer.
    pub sequence: u64,
    /// How long ago it was taken, by the clock of its node, at least.
    pub age: Duration,
    /// Digest of the manifest.
    pub manifest: Digest,
    /// Size of what the manifest describes, in bytes; 0 if unknown.
    pub size_bytes: u64,
}

/// What is looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query {
    /// Snapshots of these.
    pub subjects: Vec<Subject>,
    /// Memory of any user of these.
    pub services: Vec<ServiceRef>,
    /// The nodes that have these whole.
    pub manifests: Vec<Digest>,
}

/// Who holds what. Implementations differ in the nodes that they ask, never in what they answer.
#[async_trait]
pub trait Directory: Debug + Send + Sync {
    /// Adds to `found` who holds what is asked for, as it becomes known.
    ///
    /// - Returns when there is nothing more to come, at the latest after [`LOOKUP_MAX`].
    /// - Errors: none; who does not answer in time holds nothing.
    /// - Cancel: dropping the future leaves what was found so far.
    async fn lookup(&self, query: &Query, neighbours: Joined, found: &Found);

    /// How often [`Self::publish`] must be called for entries to stay; `None` if there is nothing
    /// to publish.
    fn renewal(&self) -> Option<Duration>;

    /// Makes `held`, and nothing else, known as what this node holds. What cannot be published now
    /// is published with a later call.
    async fn publish(&self, held: Vec<Entry>);

    /// Makes it known at once that this node is leaving.
    async fn withdraw(&self);

    /// Which directory it is and how it does, in a few words.
    fn status(&self) -> String;
}

/// The directory that the configuration names.
pub fn open(config: &Config) -> Arc<dyn Directory> {
    match config.directory.backend {
        Backend::Neighbours => Arc::new(neighbours::Neighbours),
        Backend::Etcd => Arc::new(etcd::Etcd::new(config)),
    }
}

impl Query {
    /// Whether this entry answers the question.
    fn admits(&self, entry: &Entry) -> bool {
        entry.sequence <= SEQUENCE_MAX
            && match &entry.subject {
                Some(subject) => self.subjects.contains(subject) || self.is_sibling(subject),
                None => self.manifests.contains(&entry.manifest),
            }
    }

    /// Whether this is memory of a service that is asked for.
    fn is_sibling(&self, subject: &Subject) -> bool {
        ServiceRef::of(subject).is_some_and(|service| self.services.contains(&service))
    }

    /// Best first: snapshots of what was asked for before those of other users, the newest of each
    /// lineage first, then the youngest.
    fn sort(&self, entries: &mut [Entry]) {
        entries.sort_by_cached_key(|entry| {
            let own = entry.subject.clone().filter(|subject| self.subjects.contains(subject));
            let is_sibling = own.is_none() && entry.subject.is_some();
            // Places in different lineages say nothing of each other.
            let place = Reverse(if is_sibling { 0 } else { entry.sequence });
            (is_sibling, own, place, entry.age, entry.node.clone(), entry.manifest)
        });
    }

    /// What of `held` answers the question; of each other user's memory the newest.
    pub fn select(&self, mut held: Vec<Entry>) -> Vec<Entry> {
        held.retain(|entry| self.admits(entry));
        self.sort(&mut held);
        let (mut newest, mut others) = (BTreeMap::new(), Vec::new());
        held.retain(|entry| match &entry.subject {
            Some(subject) if !self.subjects.contains(subject) => {
                let other = newest.entry(subject.clone()).or_insert_with(|| entry.clone());
                if other.sequence < entry.sequence {
                    *other = entry.clone();
                }
                false
            }
            _ => true,
        });
        others.extend(newest.into_values());
        self.sort(&mut others);
        held.extend(others.into_iter().take(SIBLINGS_MAX));
        held
    }
}

/// What a node holds: its snapshots, and the read-only volumes `contents`, with all manifests by
/// digest too.
pub fn held(node: &str, snapshots: Vec<Snapshot>, contents: BTreeSet<Digest>) -> Vec<Entry> {
    let now = unix_ms();
    let manifest = |manifest: Digest| Entry {
        node: node.to_owned(),
        subject: None,
        sequence: 0,
        age: Duration::ZERO,
        manifest,
        size_bytes: 0,
    };
    let roots = snapshots.iter().map(|snapshot| snapshot.root).chain(contents);
    let manifests: BTreeSet<Digest> = roots.collect();
    let mut held: Vec<Entry> = manifests.into_iter().map(manifest).collect();
    held.extend(snapshots.into_iter().map(|snapshot| {
        let age = snapshot.age(now);
        Entry {
            node: node.to_owned(),
            subject: Some(snapshot.subject),
            sequence: snapshot.sequence,
            age,
            manifest: snapshot.root,
            size_bytes: snapshot.size_bytes,
        }
    }));
    held
}

/// What a lookup has found so far.
#[derive(Clone, Debug)]
pub struct Found {
    query: Arc<Query>,
    entries: Arc<Mutex<Vec<Entry>>>,
    /// Whether everybody who was asked has answered; others may still join.
    is_quiet: watch::Sender<bool>,
}

impl Found {
    /// Nothing yet.
    pub fn new(query: Query) -> Self {
        let (entries, is_quiet) = (Arc::default(), watch::Sender::new(false));
        Self { query: Arc::new(query), entries, is_quiet }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps of an answer what was asked for, each entry once, up to a limit.
    pub fn add(&self, answer: impl IntoIterator<Item = Entry>) {
        let mut entries = self.lock();
        for entry in answer.into_iter().take(ENTRIES_MAX) {
            let is_same = |one: &Entry| {
                (&one.node, &one.subject, one.manifest)
                    == (&entry.node, &entry.subject, entry.manifest)
            };
            if entries.len() < ENTRIES_MAX
                && self.query.admits(&entry)
                && !entries.iter().any(is_same)
            {
                entries.push(entry);
            }
        }
    }

    /// Says whether everybody who was asked has answered.
    fn quiet(&self, is_quiet: bool) {
        self.is_quiet.send_replace(is_quiet);
    }

    /// What was found, the best first.
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = self.lock().clone();
        self.query.sort(&mut entries);
        entries
    }
}

/// A lookup that goes on by itself; dropping it ends it.
#[derive(Debug)]
pub struct Lookup {
    found: Found,
    task: JoinHandle<()>,
}

impl Lookup {
    /// Begins to look for what `query` asks. One that asks for nothing finds nothing, and asks
    /// no node.
    pub fn begin(directory: &Arc<dyn Directory>, query: Query, neighbours: Joined) -> Self {
        let (directory, found) = (directory.clone(), Found::new(query));
        let task = tokio::spawn({
            let found = found.clone();
            async move {
                if *found.query != Query::default() {
                    directory.lookup(&found.query, neighbours, &found).await;
                }
                found.quiet(true);
            }
        });
        Self { found, task }
    }

    /// What was found, the best first. Waits for those who were asked, for `patience` at most.
    pub async fn found(&self, patience: Duration) -> Vec<Entry> {
        let mut is_quiet = self.found.is_quiet.subscribe();
        let _ = tokio::time::timeout(patience, is_quiet.wait_for(|is_quiet| *is_quiet)).await;
        self.found.entries()
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[cfg(test)]
mod tests;
