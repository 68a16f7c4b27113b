//! Entries of containers: who owns them, and the outcomes of hand-offs, which outlive them.

use std::time::Duration;

use godwit_disk::step::reach;
use godwit_protos::ContainerRef;
use redb::{ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::{Journal, JournalError, parse, put};
use crate::host;
use crate::ownership::absence::Incarnation;
use crate::ownership::{Ended, Epoch, Event, Ledger, Outcome, Ownership};

/// Key: `NAMESPACE/ID`. Value: [`Entry`] as JSON.
pub(super) const CONTAINERS: TableDefinition<&str, &[u8]> = TableDefinition::new("containers_v1");

/// Key: `NAMESPACE/ID/EPOCH`, the epoch in 16 hexadecimal digits. Value: [`Tombstone`] as JSON.
pub(super) const TOMBSTONES: TableDefinition<&str, &[u8]> = TableDefinition::new("tombstones_v1");

/// Key: [`FLOOR`]. Value: the greatest epoch of the tombstones that have expired.
pub(super) const EPOCHS: TableDefinition<&str, u64> = TableDefinition::new("epochs_v1");

const FLOOR: &str = "floor";

/// How long the outcome of a hand-off is kept.
pub const TOMBSTONE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

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

impl Journal {
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
