//! What must survive the daemon: who owns a container, and which volumes are here.
//!
//! One embedded database, `node.redb`. Every change is one transaction, durable (fsynced by redb)
//! before the function returns: the caller acts only afterwards. After a failure the next change
//! opens the database again, since redb rejects all writes until it is reopened
//! ([`godwit_disk::database::Healing`]).
//!
//! Releasing is two steps on disk: 1. write the fence that shims read, 2. journal `Released`. So an
//! error means that nothing was released. Whatever else happens, a return among it, is the other
//! way round: 1. journal, 2. remove the fence.
//! On open: a fence is written for each `Released` entry and removed where there is none, so a
//! crash between the two heals.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use godwit_disk::database::Healing;
use godwit_disk::step::reach;
use godwit_disk::trees::{self, RemoveError};
use godwit_protos::{ContainerRef, FileSystem, VolumeId};
use redb::{ReadTransaction, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::absence::Incarnation;
use super::leases::LEASES;
use super::{Ended, Epoch, Event, Ledger, Outcome, Ownership};
use crate::host;

/// Key: `NAMESPACE/ID`. Value: [`Entry`] as JSON.
const CONTAINERS: TableDefinition<&str, &[u8]> = TableDefinition::new("containers_v1");

/// Key: `NAMESPACE/ID/EPOCH`, the epoch in 16 hexadecimal digits. Value: [`Tombstone`] as JSON.
const TOMBSTONES: TableDefinition<&str, &[u8]> = TableDefinition::new("tombstones_v1");

/// Key: [`FLOOR`]. Value: the greatest epoch of the tombstones that have expired.
const EPOCHS: TableDefinition<&str, u64> = TableDefinition::new("epochs_v1");

const FLOOR: &str = "floor";

/// How long the outcome of a hand-off is kept.
pub const TOMBSTONE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Key: volume id. Value: [`VolumeEntry`] as JSON.
const VOLUMES: TableDefinition<&str, &[u8]> = TableDefinition::new("volumes_v1");

/// What is journalled of a container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Who may run it.
    pub ownership: Ownership,
    /// At a destination: the session and the annotation that brought it here.
    pub session: Option<String>,
    /// Value of the migrate-from annotation, spent once the ownership is ours.
    pub migrate_from: Option<String>,
    /// At a source: the writable volumes that go with the container.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// At a source: whether task and container are removed in the end.
    #[serde(default)]
    pub remove_source: bool,
    /// At a source: the tasks were frozen for an offer, and not thawed since.
    #[serde(default)]
    pub frozen: bool,
    /// Which container of this name it is.
    #[serde(default)]
    pub incarnation: Option<Incarnation>,
}

/// How a hand-off ended. It outlives the container, so that a question that comes late has an
/// answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// How, and the container's name at the other node.
    #[serde(flatten)]
    pub ended: Ended,
    /// Which container of the name it was.
    pub incarnation: Option<Incarnation>,
    /// When, in milliseconds since 1970.
    pub at_unix_ms: i64,
    /// The boot of the machine in which it ended so.
    pub boot: String,
}

/// What is journalled of a writable volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeEntry {
    /// The node that it moved to, if it did; its data are then gone from here.
    pub moved_to: Option<String>,
    /// What it comes here with, until the container has run here.
    #[serde(default)]
    pub arriving: Option<Arriving>,
    /// What its image holds, if it is a block volume.
    #[serde(default)]
    pub file_system: Option<FileSystem>,
}

/// What brings a volume here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arriving {
    /// The container that it comes with, `NAMESPACE/ID`.
    pub container: String,
    /// The session, whose mark the volume carries.
    pub session: String,
}

/// Why the journal could not be read or written. The daemon must not act on what it wanted to
/// journal.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// There is none, or an empty one, beside what only a journal explains.
    #[error(
        "journal {} is missing or empty, but there is {}: restore the journal. Without it, it is unknown which containers \
         and volumes belong to other nodes", path.display(), beside.display()
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
        /// A fence, or a volume.
        beside: PathBuf,
    },
    /// The database refused.
    #[error(
        "journal {} failed; check the disk, and restore the journal if it is damaged: nothing was touched", path.display()
    )]
    Database {
        /// The file.
        path: PathBuf,
        /// redb's reason.
        #[source]
        source: Box<redb::Error>,
    },
    /// An entry that this version cannot read.
    #[error(
        "journal entry {key:?} is not readable by this version of Godwit; install the one that wrote it"
    )]
    Entry {
        /// Its key.
        key: String,
        /// The reason.
        #[source]
        source: serde_json::Error,
    },
    /// The fence could not be written or removed.
    #[error("cannot update fence {}", path.display())]
    Fence {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The state does not allow the event.
    #[error(
        "container {container} is {state}, so it cannot {event}; `godwit status` tells who owns it"
    )]
    OutOfPhase {
        /// The container.
        container: ContainerRef,
        /// The state, in words.
        state: String,
        /// What was asked.
        event: Event,
    },
}

/// The journal of one node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Journal {
    database: Arc<Healing>,
    path: PathBuf,
    fences: PathBuf,
}

impl Journal {
    /// Opens or creates the journal at `path`, with the fences below `fences`.
    ///
    /// On open: a journal that is missing or empty while there are fences or volumes is an error,
    /// as an empty one would undo the fences of containers that run elsewhere. Each released
    /// container gets its fence, and no other has one.
    ///
    /// Errors: [`JournalError`], also when another daemon has it open.
    pub fn open(path: &Path, fences: &Path) -> Result<Self, JournalError> {
        let failed = |source: redb::Error| JournalError::Database {
            path: path.to_owned(),
            source: Box::new(source),
        };
        if fs::metadata(path).map_or(true, |found| found.len() == 0) {
            let volumes = path.with_file_name("volumes");
            let mut beside = files_below(fences).into_iter().chain(files_below(&volumes));
            if let Some(beside) = beside.next() {
                return Err(JournalError::Missing { path: path.to_owned(), beside });
            }
        }
        let database = Healing::open(path, redb::Builder::new).map_err(failed)?;
        let (path, fences) = (path.to_owned(), fences.to_owned());
        let journal = Self { database: Arc::new(database), path, fences };
        journal.write(|_| Ok(()))?;
        journal.restore_fences()?;
        journal.drop_dead_leases()?;
        Ok(journal)
    }

    pub(super) fn failed(&self, source: impl Into<redb::Error>) -> JournalError {
        JournalError::Database { path: self.path.clone(), source: Box::new(source.into()) }
    }

    pub(super) fn write<T>(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        let done = self.write_once(change);
        if let Err(JournalError::Database { source, .. }) = &done {
            self.database.fail(source);
        }
        done
    }

    /// Why nothing can be journalled, if the journal failed and could not be opened again yet.
    pub fn failure(&self) -> Option<String> {
        self.database.failure()
    }

    /// Opens the journal again if it has failed, as the next change would. Errors: it cannot be
    /// opened.
    pub fn heal(&self) -> Result<(), JournalError> {
        self.database.heal().map_err(|error| self.failed(error))
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, JournalError> {
        self.database.begin_read().map_err(|error| self.failed(error))
    }

    fn write_once<T>(
        &self,
        change: impl FnOnce(&redb::WriteTransaction) -> Result<T, JournalError>,
    ) -> Result<T, JournalError> {
        let transaction = self.database.begin_write().map_err(|error| self.failed(error))?;
        transaction.open_table(CONTAINERS).map_err(|error| self.failed(error))?;
        transaction.open_table(VOLUMES).map_err(|error| self.failed(error))?;
        transaction.open_table(TOMBSTONES).map_err(|error| self.failed(error))?;
        transaction.open_table(EPOCHS).map_err(|error| self.failed(error))?;
        transaction.open_table(LEASES).map_err(|error| self.failed(error))?;
        let done = change(&transaction)?;
        transaction.commit().map_err(|error| self.failed(error))?;
        Ok(done)
    }

    /// The entry of a container, if this node ever gave or took it.
    pub fn container(&self, container: &ContainerRef) -> Result<Option<Entry>, JournalError> {
        Ok(self.containers()?.into_iter().find(|(one, _)| one == container).map(|(_, entry)| entry))
    }

    /// Every entry.
    pub fn containers(&self) -> Result<Vec<(ContainerRef, Entry)>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(CONTAINERS).map_err(|error| self.failed(error))?;
        let mut entries = Vec::new();
        for row in table.iter().map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            let entry = parse(key.value(), value.value())?;
            if let Some((namespace, id)) = key.value().split_once('/')
                && let Ok(container) = ContainerRef::new(namespace, id)
            {
                entries.push((container, entry));
            }
        }
        Ok(entries)
    }

    /// Takes `event`, changes the rest of the entry by `change`, and returns the greatest epoch of
    /// this name once all of it is durable: after an offer, the offer's.
    ///
    /// Errors: [`JournalError::OutOfPhase`] when the state does not allow it; nothing changed then.
    pub fn apply(
        &self,
        container: &ContainerRef,
        event: &Event,
        change: impl FnOnce(&mut Entry),
    ) -> Result<Epoch, JournalError> {
        let key = container.to_string();
        let (epoch, is_fenced) = self.write(|transaction| {
            let mut table =
                transaction.open_table(CONTAINERS).map_err(|error| self.failed(error))?;
            let mut tombstones =
                transaction.open_table(TOMBSTONES).map_err(|error| self.failed(error))?;
            let epochs = transaction.open_table(EPOCHS).map_err(|error| self.failed(error))?;
            let before: Option<Entry> = table
                .get(key.as_str())
                .map_err(|error| self.failed(error))?
                .map(|value| parse(&key, value.value()))
                .transpose()?;
            let mut ledger = self.ledger_of(container, before.as_ref(), &tombstones, &epochs)?;
            let changed = ledger.on(event).ok_or_else(|| JournalError::OutOfPhase {
                container: container.clone(),
                state: ledger.state.as_ref().map_or("not known here", Ownership::word).to_owned(),
                event: event.clone(),
            })?;
            let ended = changed.ended.clone();
            ledger.apply(changed);
            let incarnation = before.as_ref().and_then(|entry| entry.incarnation.clone());
            let after = ledger.state.clone().map(|ownership| {
                let fresh = || Entry::new(ownership.clone());
                let mut entry =
                    Entry { ownership: ownership.clone(), ..before.unwrap_or_else(fresh) };
                change(&mut entry);
                entry
            });
            if let Some((epoch, ended)) = ended {
                let key = tombstone_key(container, epoch);
                let tombstone = Tombstone::new(ended, incarnation);
                put(&mut tombstones, &key, &tombstone).map_err(|error| self.failed(error))?;
            }
            match &after {
                Some(entry) if entry.ownership.is_fenced() => {
                    reach("release 1");
                    self.set_fence(container, &entry.ownership)?;
                    reach("release 2");
                    put(&mut table, &key, entry).map_err(|error| self.failed(error))?;
                }
                Some(entry) => put(&mut table, &key, entry).map_err(|error| self.failed(error))?,
                None => {
                    let removed = table.remove(key.as_str()).map(drop);
                    removed.map_err(|error| self.failed(error))?;
                }
            }
            Ok((ledger.last(), after.is_some_and(|entry| entry.ownership.is_fenced())))
        })?;
        reach("return 2");
        if !is_fenced && let Err(error) = self.remove_fence(container) {
            // It keeps the container from being created again here, no more; opening removes it.
            tracing::error!(%container, %error, "a fence stays");
        }
        Ok(epoch)
    }

    fn ledger_of(
        &self,
        container: &ContainerRef,
        entry: Option<&Entry>,
        tombstones: &impl ReadableTable<&'static str, &'static [u8]>,
        epochs: &impl ReadableTable<&'static str, u64>,
    ) -> Result<Ledger, JournalError> {
        let state = entry.map(|entry| entry.ownership.clone());
        let floor = epochs.get(FLOOR).map_err(|error| self.failed(error))?;
        let floor = Epoch(floor.map_or(0, |value| value.value()));
        let mut ledger = Ledger { state, floor, ..Ledger::default() };
        // No name has a slash in it, and zero follows it.
        let range = format!("{container}/")..format!("{container}0");
        let rows = tombstones.range::<&str>(range.start.as_str()..range.end.as_str());
        for row in rows.map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            let tombstone: Tombstone = parse(key.value(), value.value())?;
            if let Some((_, epoch)) = parse_tombstone_key(key.value()) {
                ledger.ended.insert(epoch, tombstone.ended);
            }
        }
        Ok(ledger)
    }

    /// All that is known of a container's name.
    pub fn ledger(&self, container: &ContainerRef) -> Result<Ledger, JournalError> {
        let entry = self.container(container)?;
        let read = self.begin_read()?;
        let tombstones = read.open_table(TOMBSTONES).map_err(|error| self.failed(error))?;
        let epochs = read.open_table(EPOCHS).map_err(|error| self.failed(error))?;
        self.ledger_of(container, entry.as_ref(), &tombstones, &epochs)
    }

    /// Every hand-off that ended, by container and epoch.
    pub fn tombstones(&self) -> Result<Vec<(ContainerRef, Epoch, Tombstone)>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(TOMBSTONES).map_err(|error| self.failed(error))?;
        let mut all = Vec::new();
        for row in table.iter().map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            if let Some((container, epoch)) = parse_tombstone_key(key.value()) {
                all.push((container, epoch, parse(key.value(), value.value())?));
            }
        }
        Ok(all)
    }

    /// Removes tombstones that are older than [`TOMBSTONE_MAX`] at `now`, in milliseconds
    /// since 1970. Their epochs are not used again.
    pub fn expire(&self, now_unix_ms: i64) -> Result<(), JournalError> {
        let kept_ms = i64::try_from(TOMBSTONE_MAX.as_millis()).unwrap_or(i64::MAX);
        let all = self.tombstones()?.into_iter();
        let expired =
            all.filter(|(_, _, one)| now_unix_ms.saturating_sub(one.at_unix_ms) > kept_ms);
        let expired: Vec<_> = expired.map(|(container, epoch, _)| (container, epoch)).collect();
        let Some(greatest) = expired.iter().map(|(_, epoch)| *epoch).max() else { return Ok(()) };
        self.write(|transaction| {
            let mut epochs = transaction.open_table(EPOCHS).map_err(|error| self.failed(error))?;
            let floor = epochs.get(FLOOR).map_err(|error| self.failed(error))?;
            let floor = floor.map_or(0, |value| value.value()).max(greatest.0);
            epochs.insert(FLOOR, floor).map_err(|error| self.failed(error))?;
            let mut table =
                transaction.open_table(TOMBSTONES).map_err(|error| self.failed(error))?;
            for (container, epoch) in &expired {
                let removed = table.remove(tombstone_key(container, *epoch).as_str());
                removed.map(drop).map_err(|error| self.failed(error))?;
            }
            Ok(())
        })
    }

    /// Changes what an entry says besides the ownership. A container without an entry is left
    /// without one.
    pub fn note(
        &self,
        container: &ContainerRef,
        change: impl FnOnce(&mut Entry),
    ) -> Result<(), JournalError> {
        let key = container.to_string();
        self.write(|transaction| {
            let mut table =
                transaction.open_table(CONTAINERS).map_err(|error| self.failed(error))?;
            let value = table.get(key.as_str()).map_err(|error| self.failed(error))?;
            let Some(mut entry) =
                value.map(|value| parse::<Entry>(&key, value.value())).transpose()?
            else {
                return Ok(());
            };
            change(&mut entry);
            put(&mut table, &key, &entry).map_err(|error| self.failed(error))
        })
    }

    /// Ends the entry of a container that was deleted. Its tombstones stay, so that epochs go on.
    pub fn forget(&self, container: &ContainerRef) -> Result<(), JournalError> {
        self.apply(container, &Event::Deleted, |_| {}).map(drop)
    }

    /// The entry of a volume.
    pub fn volume(&self, id: &VolumeId) -> Result<Option<VolumeEntry>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(VOLUMES).map_err(|error| self.failed(error))?;
        let value = table.get(id.as_str()).map_err(|error| self.failed(error))?;
        value.map(|value| parse(id.as_str(), value.value())).transpose()
    }

    /// Writes the entry of a volume, or removes it.
    pub fn set_volume(
        &self,
        id: &VolumeId,
        entry: Option<&VolumeEntry>,
    ) -> Result<(), JournalError> {
        self.write(|transaction| {
            let mut table = transaction.open_table(VOLUMES).map_err(|error| self.failed(error))?;
            match entry {
                Some(entry) => put(&mut table, id.as_str(), entry),
                None => table.remove(id.as_str()).map(drop),
            }
            .map_err(|error| self.failed(error))
        })
    }

    /// Every volume.
    pub fn volumes(&self) -> Result<Vec<(VolumeId, VolumeEntry)>, JournalError> {
        let read = self.begin_read()?;
        let table = read.open_table(VOLUMES).map_err(|error| self.failed(error))?;
        let mut entries = Vec::new();
        for row in table.iter().map_err(|error| self.failed(error))? {
            let (key, value) = row.map_err(|error| self.failed(error))?;
            if let Ok(id) = key.value().parse() {
                entries.push((id, parse(key.value(), value.value())?));
            }
        }
        Ok(entries)
    }

    fn fence(&self, container: &ContainerRef) -> PathBuf {
        self.fences.join(container.namespace()).join(container.id())
    }

    fn set_fence(
        &self,
        container: &ContainerRef,
        ownership: &Ownership,
    ) -> Result<(), JournalError> {
        let (Ownership::Released(epoch, to) | Ownership::Moved(epoch, to)) = ownership else {
            return self.remove_fence(container);
        };
        let path = self.fence(container);
        let node = to.split('/').next().unwrap_or(to);
        let text = format!("moved to {node}, epoch {}", epoch.0);
        let write = || {
            // It was flushed when it was written. So a daemon starts although the disk is full.
            if fs::read(&path).is_ok_and(|found| found == text.as_bytes()) {
                return Ok(());
            }
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let partial = path.with_extension("tmp~");
            fs::write(&partial, &text)?;
            fs::File::open(&partial)?.sync_all()?;
            fs::rename(&partial, &path)?;
            path.parent().map_or(Ok(()), |parent| fs::File::open(parent)?.sync_all())
        };
        write().map_err(|source| JournalError::Fence { path: path.clone(), source })
    }

    fn remove_fence(&self, container: &ContainerRef) -> Result<(), JournalError> {
        match trees::remove(&self.fence(container)) {
            Err(RemoveError { path, source }) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Fence { path, source })
            }
            _ => Ok(()),
        }
    }

    /// A fence for each released container, and none for any other.
    fn restore_fences(&self) -> Result<(), JournalError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Fence { path, source }
        };
        fs::create_dir_all(&self.fences).map_err(failed(&self.fences))?;
        // At no moment is a released container without its fence: its shim looks whether we run or
        // not.
        let mut wanted = HashSet::new();
        for (container, entry) in self.containers()? {
            if entry.ownership.is_fenced() {
                self.set_fence(&container, &entry.ownership)?;
                wanted.insert(self.fence(&container));
            }
        }
        for other in files_below(&self.fences).into_iter().filter(|path| !wanted.contains(path)) {
            // It only refuses to create a container, and runs none.
            if let Err(RemoveError { path, source }) = trees::remove(&other) {
                tracing::error!(path = %path.display(), error = %source, "a fence stays; remove it");
            }
        }
        Ok(())
    }
}

impl Tombstone {
    fn new(ended: Ended, incarnation: Option<Incarnation>) -> Self {
        Self { ended, incarnation, at_unix_ms: host::unix_ms(), boot: host::boot_id() }
    }

    /// At a destination: the tasks ran, and the machine stopped before what they need was on its
    /// disk.
    pub fn is_torn(&self) -> bool {
        self.ended.outcome == Outcome::Ran && self.boot != host::boot_id()
    }
}

fn tombstone_key(container: &ContainerRef, epoch: Epoch) -> String {
    format!("{container}/{:016x}", epoch.0)
}

fn parse_tombstone_key(key: &str) -> Option<(ContainerRef, Epoch)> {
    let (container, epoch) = key.rsplit_once('/')?;
    let (namespace, id) = container.split_once('/')?;
    let epoch = u64::from_str_radix(epoch, 16).ok()?;
    Some((ContainerRef::new(namespace, id).ok()?, Epoch(epoch)))
}

impl Entry {
    fn new(ownership: Ownership) -> Self {
        Self {
            ownership,
            session: None,
            migrate_from: None,
            volumes: Vec::new(),
            remove_source: false,
            frozen: false,
            incarnation: None,
        }
    }

    /// Whether the tasks of this container came here by this annotation and were let run: the
    /// annotation is spent.
    pub fn has_spent(&self, migrate_from: &str) -> bool {
        matches!(self.ownership, Ownership::Owner(_))
            && self.migrate_from.as_deref() == Some(migrate_from)
    }

    /// The fence of the next offer.
    pub fn epoch(&self) -> Epoch {
        self.ownership.epoch()
    }
}

/// What lies in the directories of `directory`; nothing if it cannot be listed.
fn files_below(directory: &Path) -> Vec<PathBuf> {
    let list = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    list(directory).iter().flat_map(|inner| list(inner)).collect()
}

pub(super) fn parse<T: serde::de::DeserializeOwned>(
    key: &str,
    value: &[u8],
) -> Result<T, JournalError> {
    serde_json::from_slice(value)
        .map_err(|source| JournalError::Entry { key: key.to_owned(), source })
}

pub(super) fn put<T: Serialize>(
    table: &mut redb::Table<'_, &'static str, &'static [u8]>,
    key: &str,
    value: &T,
) -> Result<(), redb::StorageError> {
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    table.insert(key, bytes.as_slice()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ownership::fate::Fate;
    use godwit_disk::step::stop_before;

    fn container() -> ContainerRef {
        ContainerRef::new("default", "cache").unwrap()
    }

    fn open(dir: &Path) -> Journal {
        Journal::open(&dir.join("node.redb"), &dir.join("fences")).unwrap()
    }

    #[test]
    fn a_release_is_fenced_and_survives_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        journal
            .apply(&container(), &Event::Offer("edge-b/default/cache".into(), Epoch(0)), |_| {})
            .unwrap();
        journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
        let fence = dir.path().join("fences/default/cache");
        assert_eq!(fs::read_to_string(&fence).unwrap(), "moved to edge-b, epoch 1");
        drop(journal);
        // The directory was lost: with a state that was copied, say.
        fs::remove_file(&fence).unwrap();
        let journal = open(dir.path());
        assert!(fence.exists());
        let entry = journal.container(&container()).unwrap().unwrap();
        assert_eq!(entry.ownership, Ownership::Released(Epoch(1), "edge-b/default/cache".into()));
        journal.forget(&container()).unwrap();
        assert!(!fence.exists());
        assert_eq!(journal.container(&container()).unwrap(), None);
    }

    /// Method: something is mounted where a fence of no container lies, and the fence of a released
    /// one cannot be replaced.
    #[test]
    fn a_fence_that_cannot_be_removed_keeps_no_journal_from_opening() {
        use nix::mount::{MsFlags, mount, umount};
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        let offer = Event::Offer("edge-b/default/cache".into(), Epoch(0));
        journal.apply(&container(), &offer, |_| {}).unwrap();
        journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
        drop(journal);
        let fences = [("cache", "moved to edge-b, epoch 1"), ("other", "stale")];
        let fences =
            fences.map(|(name, text)| (dir.path().join("fences/default").join(name), text));
        let none = None::<&str>;
        for (fence, text) in &fences {
            fs::write(fence, text).unwrap();
            mount(Some(fence), fence, none, MsFlags::MS_BIND, none).unwrap();
        }
        let journal = open(dir.path());
        assert!(fences.iter().all(|(fence, _)| fence.exists()), "it only refuses");
        journal.forget(&container()).unwrap();
        assert_eq!(journal.container(&container()).unwrap(), None);
        drop(journal);
        fences.iter().for_each(|(fence, _)| umount(fence).unwrap());
        drop(open(dir.path()));
        assert!(fences.iter().all(|(fence, _)| !fence.exists()));
    }

    /// Method: a release stops before either of its steps, and a return between its two.
    #[test]
    fn fence_and_journal_agree_on_open_wherever_the_daemon_died() {
        let offer = Event::Offer("edge-b/default/cache".into(), Epoch(0));
        for step in ["release 1", "release 2", "return 2"] {
            let dir = tempfile::tempdir().unwrap();
            let fence = dir.path().join("fences/default/cache");
            let journal = open(dir.path());
            journal.apply(&container(), &offer, |_| {}).unwrap();
            if step == "return 2" {
                journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
                let returned = Event::Returned(Epoch(1));
                stop_before(step, || journal.apply(&container(), &returned, |_| {}));
            } else {
                let release = Event::Release(Epoch(1));
                stop_before(step, || journal.apply(&container(), &release, |_| {}));
            }
            assert_eq!(fence.exists(), step != "release 1", "{step}");
            drop(journal);
            let journal = open(dir.path());
            assert!(!fence.exists(), "{step}");
            let entry = journal.container(&container()).unwrap().unwrap();
            assert!(!matches!(entry.ownership, Ownership::Released(..)), "{step}: {entry:?}");
        }
    }

    #[test]
    fn a_volumes_entry_is_this_text_and_those_from_before_block_volumes_are_trees() {
        let block = r#"{"moved_to":null,"arriving":{"container":"d/c","session":"1"},"file_system":"ext4"}"#;
        let entry: VolumeEntry = serde_json::from_str(block).unwrap();
        assert_eq!(entry.file_system, Some(FileSystem::Ext4));
        assert_eq!(serde_json::to_string(&entry).unwrap(), block);
        let tree: VolumeEntry = serde_json::from_str(r#"{"moved_to":null}"#).unwrap();
        assert_eq!(tree, VolumeEntry::default());
    }

    #[test]
    fn an_event_out_of_phase_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        let refused = journal.apply(&container(), &Event::Release(Epoch(1)), |_| {});
        assert!(matches!(refused, Err(JournalError::OutOfPhase { .. })));
        assert_eq!(journal.containers().unwrap(), []);
    }

    #[test]
    fn an_annotation_is_spent_only_by_tasks_that_ran() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        let from = "edge-a/default/cache";
        journal
            .apply(&container(), &Event::Claim(Epoch(4), "edge-a".into()), |entry| {
                entry.migrate_from = Some(from.into());
            })
            .unwrap();
        let has_spent = || journal.container(&container()).unwrap().unwrap().has_spent(from);
        journal.apply(&container(), &Event::Granted(Epoch(4)), |_| {}).unwrap();
        assert!(!has_spent());
        journal.apply(&container(), &Event::Ran(Epoch(4)), |_| {}).unwrap();
        assert!(has_spent());
    }

    #[test]
    fn an_outcome_outlives_the_container_and_its_epoch_is_not_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        let other = ContainerRef::new("default", "cache2").unwrap();
        let offer = || Event::Offer("edge-b/default/cache".into(), Epoch(0));
        assert_eq!(journal.apply(&other, &offer(), |_| {}).unwrap(), Epoch(1));
        journal.apply(&container(), &offer(), |_| {}).unwrap();
        journal.apply(&container(), &Event::Release(Epoch(1)), |_| {}).unwrap();
        journal.apply(&container(), &Event::LetGo(Epoch(1)), |_| {}).unwrap();
        journal.forget(&container()).unwrap();
        drop(journal);
        let journal = open(dir.path());
        assert_eq!(journal.container(&container()).unwrap(), None);
        let fate = |peer| journal.ledger(&container()).unwrap().fate(Epoch(1), peer);
        assert_eq!(fate("edge-b/default/cache"), Fate::Released);
        assert_eq!(fate("edge-c/default/cache"), Fate::Unknown);
        assert_eq!(journal.ledger(&other).unwrap().ended.len(), 0, "a name that only begins alike");
        // Long after, nothing is known of it, but its epoch.
        journal.expire(i64::MAX).unwrap();
        assert_eq!(journal.tombstones().unwrap(), []);
        assert_eq!(journal.apply(&container(), &offer(), |_| {}).unwrap(), Epoch(2));
    }

    /// Method: as after a write that failed; then the file is gone, and then it is there again.
    #[test]
    fn a_journal_that_failed_is_opened_again_and_never_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let journal = open(dir.path());
        let offer = Event::Offer("edge-b/default/cache".into(), Epoch(0));
        journal.apply(&container(), &offer, |_| {}).unwrap();
        let fail = || journal.database.fail("the disk is full");
        fail();
        journal.apply(&container(), &Event::Abort(Epoch(1)), |_| {}).unwrap();
        let (path, away) = (dir.path().join("node.redb"), dir.path().join("away"));
        fs::rename(&path, &away).unwrap();
        fail();
        assert!(journal.apply(&container(), &offer, |_| {}).is_err());
        assert!(journal.containers().is_err() && !path.exists());
        fs::rename(&away, &path).unwrap();
        assert_eq!(journal.apply(&container(), &offer, |_| {}).unwrap(), Epoch(2));
    }

    /// Method: the file is deleted, or emptied, beside a fence, and beside a volume.
    #[test]
    fn a_journal_that_is_gone_undoes_no_fence_and_forgets_no_volume() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |beside: &Path| {
            for is_empty in [false, true] {
                let path = dir.path().join("node.redb");
                if is_empty {
                    fs::write(&path, "").unwrap();
                }
                let opened = Journal::open(&path, &dir.path().join("fences"));
                let found = matches!(opened, Err(JournalError::Missing { beside: found, .. }) if found == beside);
                assert!(found && beside.exists(), "{}", beside.display());
                let _ = fs::remove_file(path);
            }
        };
        for beside in ["fences/default/cache", "volumes/data/data"] {
            let beside = dir.path().join(beside);
            fs::create_dir_all(beside.parent().unwrap()).unwrap();
            fs::write(&beside, "moved to b, epoch 1").unwrap();
            refused(&beside);
            fs::remove_file(&beside).unwrap();
        }
        open(dir.path());
    }

    #[test]
    fn a_second_daemon_on_the_same_journal_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _first = open(dir.path());
        let second = Journal::open(&dir.path().join("node.redb"), &dir.path().join("fences"));
        assert!(matches!(second, Err(JournalError::Database { .. })));
    }
}
