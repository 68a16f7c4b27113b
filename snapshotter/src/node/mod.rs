//! What all parts of one daemon share: handles of its leaves, which know nothing of each other.
//!
//! Whatever acts on it (a session, a layer that is made, the schedule of captures) holds an
//! `Arc<Node>`; the node holds none of them.

mod events;
mod observed;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use godwit_protos::Subject;
use tokio::sync::watch;

use crate::config::Config;
use crate::containerd::Client;
use crate::content::object::{self, Kind, ObjectError};
use crate::content::on;
use crate::directory::{self, Directory};
use crate::host::unix_ms;
use crate::ownership::journal::Journal;
use crate::peer::backoff::Backoff;
use crate::peer::freeze_gate::FreezeGate;
use crate::peer::link::LinkStats;
use crate::store::{Compaction, Options, SnapshotId, Store, StoreError, SweepReport};
use crate::supervise::on_thread;
use crate::volumes::fetch::Fetcher;
use crate::volumes::{VolumeError, Volumes};
pub use events::{Events, is_outcome};
use godwit_disk::leftovers::Leftovers;
use godwit_disk::trees::{self, RemoveError};
pub use observed::Observed;

/// How often unreferenced objects are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(600);

/// How often removing a dump is tried while a process writes into it, and the time between: ten
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
    pub links: LinkStats,
    /// What goes before answers to peers.
    pub freeze_gate: FreezeGate,
    /// Who holds what elsewhere.
    pub directory: Arc<dyn Directory>,
    /// containerd.
    pub containerd: Client,
    /// Neighbours that are not asked for images now.
    pub backoff: Backoff,
    /// What was seen of containers and volumes.
    pub observed: Observed,
    /// What happens, for watchers.
    pub events: Events,
    /// What `criu --version` says; empty when there is no CRIU.
    pub criu_version: String,
    ids: AtomicU64,
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
        let links = LinkStats::open(&state.join("peers.json"));
        let directory = directory::open(&config);
        Ok(Arc::new(Self {
            config,
            store,
            journal,
            volumes,
            links,
            freeze_gate: FreezeGate::default(),
            directory,
            containerd,
            backoff: Backoff::default(),
            observed: Observed::default(),
            events: Events::default(),
            criu_version,
            ids: AtomicU64::new(0),
        }))
    }

    /// Databases that failed and could not be opened again yet, each with the reason.
    pub fn failures(&self) -> Vec<String> {
        let parts =
            [("index of the store", self.store.failure()), ("journal", self.journal.failure())];
        let failed = parts.into_iter().filter_map(|(what, reason)| Some((what, reason?)));
        failed.map(|(what, reason)| format!("the {what} failed: {reason}")).collect()
    }

    /// Opens databases again that failed, as their next use would.
    pub fn heal(&self) {
        let done = [
            self.store.heal().map_err(|error| crate::error::chain(&error)),
            self.journal.heal().map_err(|error| crate::error::chain(&error)),
        ];
        for error in done.into_iter().filter_map(Result::err) {
            tracing::debug!(error, "a database cannot be opened again yet");
        }
    }

    /// An identifier that is new on this node, and in practice anywhere.
    pub fn new_id(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let number = self.ids.fetch_add(1, Ordering::Relaxed);
        format!("{now:x}{:x}{number:x}", std::process::id())
    }

    /// A container or volume was removed here: its snapshots expire, here and at every peer.
    pub fn note_removed(&self, subject: Subject) -> Result<(), StoreError> {
        self.store.note_removed(&subject, unix_ms())?;
        self.observed.removed(subject);
        Ok(())
    }

    /// What fetches read-only volumes that this node lacks.
    pub fn fetcher(&self) -> Fetcher<'_> {
        Fetcher {
            config: &self.config,
            store: &self.store,
            volumes: &self.volumes,
            links: &self.links,
            directory: &self.directory,
        }
    }

    /// Frees what no snapshot, read-only volume or lease refers to.
    ///
    /// Errors: [`VolumeError`] for a list of volumes that cannot be read, or the store's; nothing
    /// is removed then.
    pub fn sweep(&self, compaction: Compaction) -> Result<SweepReport, VolumeError> {
        self.store
            .sweep(&children, is_leaf, &|| Ok(self.content_roots()?), compaction)
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

    /// Sweeps from time to time, and tries again to remove leftovers. Runs until the daemon ends.
    pub async fn sweep_regularly(self: Arc<Self>) {
        loop {
            tokio::time::sleep(SWEEP_INTERVAL).await;
            let node = self.clone();
            let work = move || {
                node.volumes.leftovers().retry();
                node.store.leftovers().retry();
                if let Err(error) = node.journal.expire(unix_ms()) {
                    tracing::warn!(error = crate::error::chain(&error), "old outcomes are kept");
                }
                node.sweep(Compaction::Usual)
            };
            match on_thread(work).await {
                Some(Ok(report)) => tracing::info!(?report, "swept"),
                Some(Err(error)) => {
                    tracing::info!(error = crate::error::chain(&error), "not swept");
                }
                None => return,
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
            match on_thread(move || node.held()).await {
                Some(Ok(held)) => self.directory.publish(held).await,
                Some(Err(error)) => {
                    tracing::warn!(
                        error = crate::error::chain(&error),
                        "cannot publish what this node holds"
                    );
                }
                None => break,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: a thread that goes on making files for a while, as long as the directory is there.
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
