//! Cached snapshots of what runs here: taken by schedule, copied to neighbours, retired.
//!
//! ```text
//!  running containers ──capture when due──► store ──copies──► the nearest neighbours (placement)
//!                                             │
//!                                             └──retire──► sweep                      (retention)
//! ```
//!
//! [`run`] looks every [`TICK`] whether something is due; copies and word of what was removed go
//! out beside it. What is due, where copies go and what is given up is decided by
//! [`crate::policy`]; here are the clocks and the hands. Nothing is captured while the node is
//! loaded, while a container comes here, or when the disk is short: a capture that is late makes
//! the next migration slower, and nothing else.
//!
//! On failure: a capture or copy that fails is tried again when the next is due. All of this is
//! memory only: after a restart every subject is due at once, within the budget.

pub mod placement;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_protos::{ContainerRef, Subject};
use tokio::sync::mpsc;

use crate::config::CacheMemory;
use crate::containerd::{ClientError, TaskStatus};
use crate::host::load;
use crate::migrate::cut::{self, Shared, lock};
use crate::migrate::describe::describe;
use crate::migrate::destination::Sessions;
use crate::migrate::shim::Shim;
use crate::migrate::subjects::{SNAPSHOT_MAX, Subjects, Taken, Version, newest};
use crate::migrate::{MigrationError, blocking};
use crate::node::Node;
use crate::policy::schedule::{may_run, seed};
use crate::retention::{self, Lack, has_room, record};
use crate::store::{Snapshot, SnapshotId};
use crate::supervise::Supervisor;

/// How often it is looked whether a subject is due.
const TICK: Duration = Duration::from_secs(1);

/// How often containerd is asked what runs.
const LOOK: Duration = Duration::from_secs(5);

/// Captures whose copies wait for slow neighbours, at most; what is taken meanwhile is copied the
/// next time.
const COPIES_WAITING: usize = 2;

/// When a subject is captured next, and what is known of it.
#[derive(Clone, Copy, Debug)]
struct Due {
    at: Instant,
    last: Option<(Instant, SnapshotId)>,
    write_rate: Option<f64>,
}

/// A container that runs here, or did and is not deleted yet.
struct Tracked {
    subjects: Shared,
    due: HashMap<Subject, Due>,
    is_running: bool,
    /// After a failure: nothing of it is captured before.
    not_before: Instant,
}

struct Runner {
    node: Arc<Node>,
    sessions: Arc<Sessions>,
    tracked: HashMap<ContainerRef, Tracked>,
    looked: Option<Instant>,
    /// The budget allows no capture before.
    not_before: Instant,
    /// What was taken, to be copied.
    copies: mpsc::Sender<Vec<Snapshot>>,
    /// What the last look found lacking, and logged.
    lack: Option<Lack>,
}

/// Takes, copies and retires snapshots. Runs until the daemon ends.
pub async fn run(sessions: Arc<Sessions>, supervisor: Supervisor) {
    let node = sessions.node.clone();
    let (copies, taken) = mpsc::channel(COPIES_WAITING);
    supervisor.serve("copies", placement::copy(node.clone(), taken));
    supervisor.serve("removals", placement::tell_removals(node.clone()));
    let (tracked, not_before) = (HashMap::new(), Instant::now());
    let mut runner =
        Runner { node, sessions, tracked, looked: None, not_before, copies, lack: None };
    loop {
        tokio::time::sleep(TICK).await;
        if runner.looked.is_none_or(|looked| looked.elapsed() >= LOOK) {
            runner.looked = Some(Instant::now());
            if let Err(error) = runner.look().await {
                tracing::warn!(error = error.chain(), "cannot list the containers that run here");
            }
            let lack = retention::retire_if_full(&runner.node).await;
            if let Some(lack) = lack.filter(|_| lack != runner.lack) {
                tracing::warn!("{lack}");
            }
            runner.lack = lack;
        }
        if let Some(container) = runner.next() {
            let begun = Instant::now();
            match runner.capture(&container).await {
                Ok(bytes) => {
                    let budget = runner.node.config.cache.budget();
                    let pause = budget.map(|budget| budget.next_start(begun.elapsed(), bytes));
                    runner.not_before = begun + pause.unwrap_or(LOOK);
                }
                Err(error) => {
                    tracing::info!(%container, error = error.chain(), "not captured");
                    runner.postpone(&container);
                }
            }
        }
    }
}

impl Runner {
    /// Which containers run here, and which were removed.
    async fn look(&mut self) -> Result<(), MigrationError> {
        let node = self.node.clone();
        let mut running = HashSet::new();
        for namespace in node.containerd.namespaces().await? {
            for record in node.containerd.list_containers(&namespace).await? {
                let container = ContainerRef::new(&namespace, &record.id)?;
                // Whatever its runtime is called: our shim may run under the name of containerd's.
                match Shim::find(&node.config, &container) {
                    Err(MigrationError::NoShim(_)) => continue,
                    // What cannot be told must not be taken for a container that went away.
                    found => drop(found?),
                }
                let task = node.containerd.task(&namespace, &record.id).await?;
                if task.is_some_and(|task| task.status == TaskStatus::Running) {
                    running.insert(container);
                }
            }
        }
        let known = |(_, tracked): &(_, &Tracked)| tracked.is_running;
        let known: HashSet<_> =
            self.tracked.iter().filter(known).map(|(container, _)| container.clone()).collect();
        self.forget_deleted(&running).await?;
        for container in running.difference(&known) {
            match describe(&node, container).await {
                Ok(described) => self.track(container, Subjects::of(&node, &described, true)),
                // It may have ended meanwhile; the next look finds out.
                Err(error) => tracing::debug!(%container, error = error.chain(), "not tracked"),
            }
        }
        Ok(())
    }

    /// Begins to capture a container that was started here.
    fn track(&mut self, container: &ContainerRef, subjects: Subjects) {
        // Whatever moved away under this name has come back.
        self.node.observed.take_moved(container);
        let earliest = self.tracked.get(container).map(|before| before.not_before);
        let not_before = earliest.unwrap_or_else(Instant::now);
        let due = Due { at: not_before.max(Instant::now()), last: None, write_rate: None };
        let due = subjects.all().map(|subject| (subject.clone(), due)).collect();
        let subjects = Arc::new(Mutex::new(subjects));
        let tracked = Tracked { subjects, due, is_running: true, not_before };
        self.tracked.insert(container.clone(), tracked);
    }

    /// Of the containers that do not run any more: those that containerd has forgotten were
    /// removed, or moved away.
    async fn forget_deleted(
        &mut self,
        running: &HashSet<ContainerRef>,
    ) -> Result<(), MigrationError> {
        let node = self.node.clone();
        let ended = |(container, tracked): (&ContainerRef, &mut Tracked)| {
            tracked.is_running &= running.contains(container);
            (!running.contains(container)).then(|| container.clone())
        };
        let ended: Vec<ContainerRef> = self.tracked.iter_mut().filter_map(ended).collect();
        for container in ended {
            let record = node.containerd.container(container.namespace(), container.id()).await;
            if !matches!(record, Err(ClientError::NotFound(_))) {
                continue;
            }
            let Some(tracked) = self.tracked.remove(&container) else { continue };
            if !node.observed.take_moved(&container) {
                self.removed(&container, tracked).await?;
            }
        }
        Ok(())
    }

    /// A container was removed: what is cached of its memory and layer expires. Its volumes are
    /// removed on their own.
    async fn removed(
        &mut self,
        container: &ContainerRef,
        tracked: Tracked,
    ) -> Result<(), MigrationError> {
        let mut gone: Vec<Subject> = tracked.due.into_keys().collect();
        gone.retain(|subject| !matches!(subject, Subject::Volume(_)));
        gone.push(Subject::Container(container.clone()));
        tracing::info!(%container, "removed; its snapshots will expire");
        let node = self.node.clone();
        blocking(move || {
            let mut gone = gone.into_iter();
            Ok(gone.try_for_each(|subject| node.note_removed(subject))?)
        })
        .await
    }

    /// The container whose subject has been due for longest, if anything may be captured now.
    fn next(&self) -> Option<ContainerRef> {
        let (node, now) = (&self.node, Instant::now());
        let cache = &node.config.cache;
        if !cache.schedule
            || now < self.not_before
            || !may_run(load(), cache.load_max)
            || self.sessions.is_busy()
        {
            return None;
        }
        let is_wanted = |subject: &Subject| {
            cache.memory != CacheMemory::Off || !matches!(subject, Subject::Memory { .. })
        };
        let running = self.tracked.iter().filter(|(_, tracked)| tracked.is_running);
        let earliest = running.filter_map(|(container, tracked)| {
            let due = tracked.due.iter().filter(|(subject, _)| is_wanted(subject));
            Some((due.map(|(_, due)| due.at).min()?, container))
        });
        let (at, container) = earliest.min_by_key(|(at, _)| *at)?;
        (at <= now && has_room(node)).then(|| container.clone())
    }

    /// Captures what is due of a container, records it and has it copied. Returns how much was
    /// written.
    async fn capture(&mut self, container: &ContainerRef) -> Result<u64, MigrationError> {
        let Some(tracked) = self.tracked.get(container) else { return Ok(0) };
        let (node, now) = (self.node.clone(), Instant::now());
        let memory = node.config.cache.memory;
        let last = tracked.due.values().filter_map(|due| due.last.map(|(_, id)| id)).collect();
        let before = (tracked.subjects.clone(), last);
        let (versions, taken) = if memory == CacheMemory::Consistent {
            cut::take_after(&node, container, Some(before)).await?
        } else {
            let due: HashSet<Subject> = tracked
                .due
                .iter()
                .filter(|(subject, due)| {
                    due.at <= now
                        && (memory == CacheMemory::Live
                            || !matches!(subject, Subject::Memory { .. }))
                })
                .map(|(subject, _)| subject.clone())
                .collect();
            capture_live(&node, container, before, due).await?
        };
        let written = versions.iter().map(|version| version.changed_bytes).sum();
        self.note(container, now, &versions, &taken);
        let snapshots: Vec<Snapshot> = taken.into_iter().map(|(_, snapshot)| snapshot).collect();
        if self.copies.try_send(snapshots).is_err() {
            tracing::info!(%container, "neighbours are slow; this capture is not copied");
        }
        Ok(written)
    }

    /// Learns the write rates and sets the next captures.
    fn note(
        &mut self,
        container: &ContainerRef,
        now: Instant,
        versions: &[Version],
        taken: &[(SnapshotId, Snapshot)],
    ) {
        let Ok(schedule) = self.node.config.cache.schedule() else { return };
        let Some(tracked) = self.tracked.get_mut(container) else { return };
        for (id, snapshot) in taken {
            let Some(due) = tracked.due.get_mut(&snapshot.subject) else { continue };
            let version = versions.iter().find(|version| version.subject == snapshot.subject);
            if let (Some(version), Some((before, _))) = (version, due.last) {
                let (size, changed) = (version.size_bytes, version.changed_bytes);
                let observed = &self.node.observed;
                due.write_rate =
                    Some(observed.learn(&version.subject, size, changed, now - before));
            }
            let name = snapshot.subject.to_string();
            let seed = seed(&self.node.config.node, &name, snapshot.sequence);
            due.at = now + schedule.period(snapshot.size_bytes, due.write_rate, seed);
            due.last = Some((now, *id));
        }
    }

    /// Begins again with a container after a failure, not before the shortest period has passed: it
    /// may be another one of the same name, so the next look describes it again.
    fn postpone(&mut self, container: &ContainerRef) {
        let pause = Duration::from_secs(self.node.config.cache.period_min_s);
        if let Some(tracked) = self.tracked.get_mut(container) {
            (tracked.is_running, tracked.not_before) = (false, Instant::now() + pause);
        }
    }
}

/// Captures `due` while the container runs, on top of what was captured `before`.
async fn capture_live(
    node: &Arc<Node>,
    container: &ContainerRef,
    (subjects, last): (Shared, Vec<SnapshotId>),
    due: HashSet<Subject>,
) -> Result<Taken, MigrationError> {
    let pids = node.containerd.pids(container.namespace(), container.id()).await?;
    let node = node.clone();
    blocking(move || {
        // From here on nothing is swept, so what is there now stays.
        let lease = node.store.lease("schedule", SNAPSHOT_MAX);
        let mut subjects = lock(&subjects);
        subjects.rely_on(&last)?;
        subjects.capture_live(&lease, &pids, &|subject| due.contains(subject))?;
        let mut versions = subjects.versions();
        versions.retain(|version| due.contains(&version.subject));
        let snapshots = newest(&node.store, &versions, &node.config.node)?;
        let ids = record(&node, &snapshots)?;
        Ok((versions, ids.into_iter().zip(snapshots).collect()))
    })
    .await
}
