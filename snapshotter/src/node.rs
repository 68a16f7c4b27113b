//! What all parts of one daemon share.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_protos::ContainerRef;
use godwit_protos::peer::Progress;
use tokio::sync::{broadcast, watch};

use crate::capture::Caching;
use crate::config::Config;
use crate::containerd::{Client, Event, EventKind};
use crate::content::object::{self, Kind, ObjectError};
use crate::content::on;
use crate::directory::{self, Directory};
use crate::layers::make::Making;
use crate::leftovers::Leftovers;
use crate::migrate::deletion::{Absence, LOOK_INTERVAL};
use crate::migrate::destination::Sessions;
use crate::migrate::report::Report;
use crate::migrate::{MigrationError, request};
use crate::ownership::journal::Journal;
use crate::peer::channel::Channels;
use crate::peer::precedence::Precedence;
use crate::peer::shunned::Shunned;
use crate::store::{Options, SnapshotId, Store, SweepReport, Thrift};
use crate::trees::{self, RemoveError};
use crate::volumes::{VolumeError, Volumes};

/// Events that a slow watcher may lag behind before it misses some.
const EVENTS: usize = 1024;

/// How often unreferenced objects are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(600);

/// How long until what an earlier daemon left is seen to again.
const RECOVER_PAUSE: Duration = Duration::from_secs(10);

/// How often removing a dump is tried while somebody writes into it, and the time between: ten
/// seconds in all.
const CLEAR_TRIES: usize = 200;
const CLEAR_PAUSE: Duration = Duration::from_millis(50);

/// One node's daemon.
#[derive(Debug)]
pub struct Node {
    /// Its configuration.
    pub config: Config,
    /// Objects and snapshots.
    pub store: Store,
    /// Who owns which container.
    pub journal: Journal,
    /// Volumes.
    pub volumes: Volumes,
    /// What is known of the ways to the peers.
    pub channels: Channels,
    /// What goes before answers to peers.
    pub precedence: Precedence,
    /// Who holds what elsewhere.
    pub directory: Arc<dyn Directory>,
    /// containerd.
    pub containerd: Client,
    /// Containers that are coming here.
    pub sessions: Sessions,
    /// Neighbours that are not asked for images now.
    pub shunned: Shunned,
    /// Layers of images that are made for neighbours.
    pub making: Making,
    /// What the schedule of snapshots is told.
    pub caching: Caching,
    /// What happens, for whoever watches.
    pub events: Events,
    /// What `criu --version` says; empty when there is no CRIU.
    pub criu_version: String,
    ids: AtomicU64,
    /// Whether what an earlier daemon left in containerd was seen to.
    recovered: AtomicBool,
}

/// Why a daemon cannot start.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A directory cannot be made.
    #[error(transparent)]
    Content(#[from] crate::content::ContentError),
    /// The store cannot be opened.
    #[error("cannot open the store")]
    Store(#[from] crate::store::OpenError),
    /// The journal cannot be opened.
    #[error("cannot open the journal")]
    Journal(#[from] crate::ownership::journal::JournalError),
    /// The volumes cannot be opened.
    #[error("cannot open the volumes")]
    Volumes(#[from] VolumeError),
}

/// Why it is not known what is in use.
#[derive(Debug, thiserror::Error)]
enum UseError {
    /// An object does not say what it refers to.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// The read-only volumes cannot be listed.
    #[error(transparent)]
    Volumes(#[from] VolumeError),
}

impl Node {
    /// Opens everything below the state directory.
    ///
    /// On open: staged files and dumps of sessions that died are removed, unmounting first what
    /// CRIU left in them; the parts' own rules do the rest. What cannot be removed is a leftover,
    /// and no error.
    ///
    /// Caller: inside a tokio runtime. Errors: [`OpenError`]; nothing is emptied to make it work.
    pub fn open(config: Config, fences: &Path) -> Result<Arc<Self>, OpenError> {
        let state = &config.state_dir;
        fs::create_dir_all(state).map_err(on("make directory", state))?;
        let store = Store::open(&state.join("store"), Options::default())?;
        let journal = Journal::open(&state.join("node.redb"), fences)?;
        let volumes = Volumes::open(state, journal.clone(), store.clone())?;
        for name in ["stage", "dump"] {
            remove_sessions(&state.join(name), volumes.leftovers());
        }
        let criu = criu_wrapper::version::Version::of("criu");
        let criu_version = criu.as_ref().map_or_else(|_| String::new(), ToString::to_string);
        if let Err(error) = criu {
            tracing::warn!(%error, "CRIU cannot be used: containers can neither leave nor come");
        }
        let containerd = Client::connect(&config.containerd_socket);
        let channels = Channels::open(&state.join("peers.json"));
        let directory = directory::open(&config);
        let (sessions, events) = (Sessions::default(), Events::default());
        let ids = AtomicU64::new(0);
        Ok(Arc::new(Self {
            config,
            store,
            journal,
            volumes,
            channels,
            precedence: Precedence::default(),
            directory,
            containerd,
            sessions,
            shunned: Shunned::default(),
            making: Making::default(),
            caching: Caching::default(),
            events,
            criu_version,
            ids,
            recovered: AtomicBool::new(false),
        }))
    }

    /// An identifier that is new on this node, and in practice anywhere.
    pub fn new_id(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{now:x}{:x}{number:x}", std::process::id())
    }

    /// Frees what no snapshot, read-only volume or lease refers to.
    ///
    /// Errors: [`VolumeError`] for a list of volumes that cannot be read, or the store's; nothing
    /// is removed then.
    pub fn sweep(&self, thrift: Thrift) -> Result<SweepReport, VolumeError> {
        self.store
            .sweep(&children, is_leaf, &|| Ok(self.content_roots()?), thrift)
            .map_err(|error| VolumeError::Sweep(Box::new(error)))
    }

    /// For each snapshot the bytes that its removal frees. Errors: as of [`Self::sweep`].
    pub fn exclusive_bytes(&self) -> Result<BTreeMap<SnapshotId, u64>, VolumeError> {
        self.store
            .exclusive_bytes(&children, is_leaf, &self.content_roots()?)
            .map_err(|error| VolumeError::Sweep(Box::new(error)))
    }

    fn content_roots(&self) -> Result<Vec<(u8, godwit_protos::Digest)>, VolumeError> {
        let contents = self.volumes.contents()?.into_iter();
        Ok(contents.map(|digest| (Kind::Tree as u8, digest)).collect())
    }

    /// Follows containerd: what is deleted there is forgotten here. Runs until the daemon ends.
    pub async fn follow_containerd(self: Arc<Self>) {
        let mut absence = Absence::default();
        loop {
            if let Err(error) = self.clone().follow_once(&mut absence).await {
                tracing::warn!(error = error.chain(), "lost containerd; trying again");
            }
            absence.lost_contact();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn follow_once(self: Arc<Self>, absence: &mut Absence) -> Result<(), MigrationError> {
        use futures::StreamExt as _;
        let filter = r#"topic=="/containers/delete""#;
        let mut events = self.containerd.subscribe(&[filter]).await?;
        if !self.containerd.has_snapshotter(godwit_protos::SNAPSHOTTER).await? {
            tracing::warn!(
                "containerd's configuration has no snapshotter {:?}: see docs/deploy/containerd/godwit.toml; \
                 its `imports` line must stand above the first table of config.toml",
                godwit_protos::SNAPSHOTTER
            );
        }
        // Subscribed first, so that no deletion falls between the two. The stream ends with the
        // containerd that it comes from, so that its events are those of this UUID.
        let uuid = self.containerd.uuid().await?;
        absence.forget_deleted(&self, &uuid).await?;
        if !self.recovered.swap(true, Ordering::Relaxed) {
            tokio::spawn(self.clone().recover_containers());
        }
        loop {
            match tokio::time::timeout(LOOK_INTERVAL, events.next()).await {
                Err(_elapsed) => {}
                Ok(None) => return Ok(()),
                Ok(Some(event)) => {
                    let Event { namespace, kind, .. } = event?;
                    let EventKind::ContainerDeleted { id } = kind else { continue };
                    tracing::debug!(namespace, id, "container deleted");
                    if let Ok(container) = ContainerRef::new(&namespace, &id) {
                        absence.reported(container);
                    }
                }
            }
            absence.forget_deleted(&self, &uuid).await?;
        }
    }

    /// Sees to what an earlier daemon left in containerd. While one container cannot be seen to,
    /// this tries again, and the others are served.
    async fn recover_containers(self: Arc<Self>) {
        let mut is_tidy = false;
        loop {
            let settled = request::settle_what_came(&self).await;
            let mut done = settled.and(self.delete_abandoned_leases().await);
            if !is_tidy {
                let removed = request::remove_abandoned(&self).await;
                is_tidy = removed.is_ok();
                done = done.and(removed);
            }
            match done {
                Ok(()) => return,
                Err(error) => {
                    let error = error.chain();
                    tracing::warn!(
                        error,
                        "not all that an earlier daemon left could be seen to; trying again"
                    );
                }
            }
            tokio::time::sleep(RECOVER_PAUSE).await;
        }
    }

    async fn delete_abandoned_leases(&self) -> Result<(), MigrationError> {
        Ok(self.containerd.delete_abandoned_leases().await?)
    }

    /// Sweeps from time to time, and tries again to remove leftovers. Runs until the daemon ends.
    pub async fn sweep_regularly(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            let node = self.clone();
            let work = move || {
                node.volumes.leftovers().retry();
                node.store.leftovers().retry();
                node.sweep(Thrift::Usual)
            };
            match tokio::task::spawn_blocking(work).await {
                Ok(Ok(report)) => tracing::info!(?report, "swept"),
                Ok(Err(error)) => {
                    tracing::info!(error = crate::error::chain(&error), "not swept");
                }
                Err(_) => return,
            }
        }
    }

    /// What this node can serve whole: its snapshots and its read-only volumes.
    pub fn held(&self) -> Result<Vec<directory::Entry>, VolumeError> {
        let snapshots = self.store.all_snapshots()?;
        let snapshots = snapshots.into_iter().map(|(_, snapshot)| snapshot);
        Ok(directory::held(&self.config.node, snapshots.collect(), self.volumes.contents()?))
    }

    /// Has the directory know what this node holds, until `stopped` says that it leaves.
    pub async fn publish_until(self: Arc<Self>, mut stopped: watch::Receiver<bool>) {
        let Some(renewal) = self.directory.renewal() else { return };
        let mut changed = self.store.snapshots_changed();
        while !*stopped.borrow() {
            changed.mark_unchanged();
            let node = self.clone();
            match tokio::task::spawn_blocking(move || node.held()).await {
                Ok(Ok(held)) => self.directory.publish(held).await,
                Ok(Err(error)) => {
                    tracing::warn!(error = crate::error::chain(&error), "nothing is published");
                }
                Err(_) => break,
            }
            tokio::select! {
                _ = tokio::time::timeout(renewal, changed.changed()) => {}
                _ = stopped.changed() => break,
            }
        }
        self.directory.withdraw().await;
    }
}

/// Removes what sessions that died left in `directory`. Their names are never used again.
fn remove_sessions(directory: &Path, leftovers: &Leftovers) {
    let sessions: Vec<_> = match fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => return,
    };
    if let Err(error) = criu_wrapper::leftovers::unmount_below(directory) {
        // What CRIU mounted may be a hierarchy of control groups, which a removal would enter if it
        // came by another way.
        let reason =
            format!("cannot unmount what CRIU left below {}: {error}", directory.display());
        sessions.iter().for_each(|session| leftovers.add(session, reason.clone()));
        return;
    }
    for session in sessions {
        leftovers.note(&session, clear(&session));
    }
}

/// Removes `path` and all below it. CRIU outlives a daemon that was killed, and may go on writing
/// there until a directory is gone.
fn clear(path: &Path) -> Result<(), RemoveError> {
    for _ in 0..CLEAR_TRIES {
        match trees::remove(path) {
            Err(error) if error.source.kind() == io::ErrorKind::DirectoryNotEmpty => {
                std::thread::sleep(CLEAR_PAUSE);
            }
            done => return done,
        }
    }
    trees::remove(path)
}

/// What an object of the store refers to, for marking.
fn children(kind: u8, bytes: &[u8]) -> Result<Vec<(u8, godwit_protos::Digest)>, UseError> {
    let all = object::children(Kind::try_from(kind)?, bytes)?;
    Ok(all.into_iter().map(|(kind, digest)| (kind as u8, digest)).collect())
}

fn is_leaf(kind: u8) -> bool {
    kind == Kind::Chunk as u8
}

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
        // Nobody may be watching.
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
    pub fn done(&self, migration: &str, report: &Report) {
        let json = serde_json::to_string(report).unwrap_or_default();
        self.send(migration, "done", report.to_string(), json);
    }

    /// A migration failed, and what that means for the container.
    pub fn failed(&self, migration: &str, error: &MigrationError, outlook: &str) {
        self.send(migration, "failed", format!("{}; {outlook}", error.chain()), String::new());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: somebody who goes on making files for a while, as long as the directory is there.
    #[test]
    fn what_is_being_written_to_can_be_cleared() {
        let dir = tempfile::tempdir().unwrap();
        let dump = dir.path().join("dump");
        fs::create_dir_all(dump.join("deep")).unwrap();
        let (started, path) = (std::sync::mpsc::channel(), dump.join("deep"));
        let writer = std::thread::spawn(move || {
            for number in 0..2000 {
                if fs::write(path.join(number.to_string()), "").is_err() {
                    return;
                }
                let _ = started.0.send(());
            }
        });
        started.1.recv().unwrap();
        clear(&dump).unwrap();
        assert!(!dump.exists());
        writer.join().unwrap();
    }

    /// Method: an immutable file is in one session's directory, and a mount in another's.
    #[test]
    fn what_a_session_left_is_removed_or_set_aside() {
        use nix::mount::{MsFlags, mount, umount};
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let stage = dir.path().join("stage");
        let (one, other) = (stage.join("1/volume-data"), stage.join("2/images"));
        fs::create_dir_all(&one).unwrap();
        fs::create_dir_all(&other).unwrap();
        fs::write(one.join("fixed"), "x").unwrap();
        let file = fs::File::open(one.join("fixed")).unwrap();
        rustix::fs::ioctl_setflags(file, rustix::fs::IFlags::IMMUTABLE).unwrap();
        let none = None::<&str>;
        mount(Some(&other), &other, none, MsFlags::MS_BIND, none).unwrap();
        let leftovers = Leftovers::default();
        // As after `unmount_below` could not see it.
        leftovers.note(&stage.join("2"), clear(&stage.join("2")));
        assert_eq!(leftovers.reasons().len(), 1);
        remove_sessions(&stage, &leftovers);
        assert_eq!(leftovers.reasons(), [""; 0]);
        assert_eq!(fs::read_dir(&stage).unwrap().count(), 0);
        umount(&other).unwrap_err();
        remove_sessions(&dir.path().join("missing"), &leftovers);
    }
}
