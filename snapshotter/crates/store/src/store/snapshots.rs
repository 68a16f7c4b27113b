//! Snapshots: what is kept, and of what. They are the roots that a sweep marks from.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::time::Duration;

use godwit_protos::{Digest, Subject};
use prost::Message as _;
use redb::ReadableTable as _;
use tokio::sync::watch;

use super::{Store, StoreError, index};

/// Name of a recorded snapshot on this node. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SnapshotId(pub u64);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot {}", self.0)
    }
}

/// One state of one subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// What it is of.
    pub subject: Subject,
    /// Place in the subject's lineage; higher is newer. Clocks of nodes differ, this does not.
    pub sequence: u64,
    /// When it was taken, in milliseconds since 1970, by this node's clock: one that came here
    /// brought its age along.
    pub taken_at_unix_ms: i64,
    /// Digest of the manifest.
    pub root: Digest,
    /// What sort of object the root is; the number means something to the caller of
    /// [`Store::sweep`].
    pub root_kind: u8,
    /// Size of what the manifest describes, in bytes.
    pub size_bytes: u64,
    /// Node that took it.
    pub node: String,
    /// Whether it is exempt from being retired.
    pub is_pinned: bool,
}

/// A snapshot in the index. Fields are only ever added.
#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(string, tag = "1")]
    subject: String,
    #[prost(uint64, tag = "2")]
    sequence: u64,
    #[prost(int64, tag = "3")]
    taken_at_unix_ms: i64,
    #[prost(bytes = "vec", tag = "4")]
    root: Vec<u8>,
    #[prost(uint32, tag = "5")]
    root_kind: u32,
    #[prost(uint64, tag = "6")]
    size_bytes: u64,
    #[prost(string, tag = "7")]
    node: String,
    #[prost(bool, tag = "8")]
    is_pinned: bool,
}

impl Snapshot {
    /// How old it is at a time given in milliseconds since 1970; nothing for one from the future.
    pub fn age(&self, now_unix_ms: i64) -> Duration {
        let age = now_unix_ms.saturating_sub(self.taken_at_unix_ms);
        Duration::from_millis(u64::try_from(age).unwrap_or(0))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let record = Record {
            subject: self.subject.to_string(),
            sequence: self.sequence,
            taken_at_unix_ms: self.taken_at_unix_ms,
            root: self.root.as_bytes().to_vec(),
            root_kind: u32::from(self.root_kind),
            size_bytes: self.size_bytes,
            node: self.node.clone(),
            is_pinned: self.is_pinned,
        };
        record.encode_to_vec()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let record = Record::decode(bytes).ok()?;
        Some(Self {
            subject: record.subject.parse().ok()?,
            sequence: record.sequence,
            taken_at_unix_ms: record.taken_at_unix_ms,
            root: Digest::try_from(&record.root[..]).ok()?,
            root_kind: u8::try_from(record.root_kind).ok()?,
            size_bytes: record.size_bytes,
            node: record.node,
            is_pinned: record.is_pinned,
        })
    }
}

impl Store {
    /// Records a snapshot, durably and with everything flushed before. Its root must be in the
    /// store, and whatever hangs on the root too: hold the lease that it was written under until
    /// this returns.
    pub fn record(&self, snapshot: &Snapshot) -> Result<SnapshotId, StoreError> {
        self.inner.ensure_room(0)?;
        // A sweep that has not marked from this root must not go on to remove what hangs on it.
        self.inner.leases.disturb();
        let write = self.inner.index.begin_write()?;
        let id = {
            let objects = write.open_table(index::OBJECTS)?;
            if objects.get(snapshot.root.as_bytes())?.is_none() {
                return Err(StoreError::NotFound(snapshot.root));
            }
            let mut meta = write.open_table(index::META)?;
            let id = meta.get(index::META_NEXT_SNAPSHOT)?.map_or(1, |value| value.value());
            meta.insert(index::META_NEXT_SNAPSHOT, id + 1)?;
            let bytes = snapshot.to_bytes();
            write.open_table(index::SNAPSHOTS)?.insert(id, bytes.as_slice())?;
            // Whatever was said of it: it is there.
            write.open_table(index::REMOVED)?.remove(snapshot.subject.to_string().as_str())?;
            SnapshotId(id)
        };
        self.inner.index.commit_durable(write, &self.inner.packs)?;
        self.inner.snapshots_changed.send_replace(());
        Ok(id)
    }

    /// Follows recording and removing of snapshots.
    pub fn snapshots_changed(&self) -> watch::Receiver<()> {
        self.inner.snapshots_changed.subscribe()
    }

    /// Snapshots of `subject`, the highest sequence first; of equal ones the one recorded last.
    pub fn snapshots(&self, subject: &Subject) -> Result<Vec<(SnapshotId, Snapshot)>, StoreError> {
        let mut of_subject = self.all_snapshots()?;
        of_subject.retain(|(_, snapshot)| snapshot.subject == *subject);
        of_subject.sort_by_key(|(id, snapshot)| std::cmp::Reverse((snapshot.sequence, *id)));
        Ok(of_subject)
    }

    /// Place of the next snapshot of `subject` in its lineage.
    pub fn next_sequence(&self, subject: &Subject) -> Result<u64, StoreError> {
        Ok(self.snapshots(subject)?.first().map_or(0, |(_, newest)| newest.sequence) + 1)
    }

    /// All snapshots, in the order in which they were recorded.
    ///
    /// Errors: [`StoreError::SnapshotRecord`] if one cannot be read; it is kept.
    pub fn all_snapshots(&self) -> Result<Vec<(SnapshotId, Snapshot)>, StoreError> {
        let table = self.inner.index.begin_read()?.open_table(index::SNAPSHOTS)?;
        let mut snapshots = Vec::new();
        for entry in table.iter()? {
            let (id, bytes) = entry?;
            let id = SnapshotId(id.value());
            let snapshot = Snapshot::from_bytes(bytes.value());
            snapshots.push((id, snapshot.ok_or(StoreError::SnapshotRecord(id))?));
        }
        Ok(snapshots)
    }

    /// Forgets a snapshot, pinned or not, durably. Its objects go with the next sweep.
    pub fn remove_snapshot(&self, id: SnapshotId) -> Result<(), StoreError> {
        self.remove_snapshots(&[id])
    }

    /// Forgets several, durably, and with the last one of a subject that it was removed.
    pub fn remove_snapshots(&self, ids: &[SnapshotId]) -> Result<(), StoreError> {
        let write = self.inner.index.begin_write()?;
        {
            let mut table = write.open_table(index::SNAPSHOTS)?;
            for id in ids {
                if table.remove(id.0)?.is_none() {
                    return Err(StoreError::UnknownSnapshot(*id));
                }
            }
            let mut left = HashSet::new();
            for entry in table.iter()? {
                left.extend(
                    Snapshot::from_bytes(entry?.1.value()).map(|one| one.subject.to_string()),
                );
            }
            // That a subject was removed matters as long as it has snapshots.
            write.open_table(index::REMOVED)?.retain(|subject, _| left.contains(subject))?;
        }
        self.inner.index.commit_durable(write, &self.inner.packs)?;
        self.inner.snapshots_changed.send_replace(());
        Ok(())
    }

    /// Exempts a snapshot from being retired, or ends that, durably.
    pub fn pin(&self, id: SnapshotId, is_pinned: bool) -> Result<(), StoreError> {
        let write = self.inner.index.begin_write()?;
        {
            let mut table = write.open_table(index::SNAPSHOTS)?;
            let bytes = table.get(id.0)?.map(|value| value.value().to_vec());
            let bytes = bytes.ok_or(StoreError::UnknownSnapshot(id))?;
            let snapshot = Snapshot::from_bytes(&bytes).ok_or(StoreError::SnapshotRecord(id))?;
            let bytes = Snapshot { is_pinned, ..snapshot }.to_bytes();
            table.insert(id.0, bytes.as_slice())?;
        }
        self.inner.index.commit_durable(write, &self.inner.packs)
    }

    /// Notes, durably, that the container or volume of a subject was removed now; recording a
    /// snapshot of it takes that back. Subjects without snapshots are not noted, nor is one twice.
    pub fn note_removed(&self, subject: &Subject, now_unix_ms: i64) -> Result<(), StoreError> {
        if self.snapshots(subject)?.is_empty() {
            return Ok(());
        }
        let text = subject.to_string();
        let write = self.inner.index.begin_write()?;
        {
            let mut table = write.open_table(index::REMOVED)?;
            if table.get(text.as_str())?.is_none() {
                table.insert(text.as_str(), now_unix_ms)?;
            }
        }
        self.inner.index.commit_durable(write, &self.inner.packs)
    }

    /// Subjects whose containers or volumes were removed, and when, in milliseconds since 1970.
    pub fn removed(&self) -> Result<BTreeMap<String, i64>, StoreError> {
        let table = self.inner.index.begin_read()?.open_table(index::REMOVED)?;
        let mut removed = BTreeMap::new();
        for entry in table.iter()? {
            let (subject, at) = entry?;
            removed.insert(subject.value().to_owned(), at.value());
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The record of version 1, byte by byte.
    #[test]
    fn a_snapshot_is_a_protobuf_message() {
        let snapshot = Snapshot {
            subject: "volume|data".parse().unwrap(),
            sequence: 2,
            taken_at_unix_ms: 300,
            root: Digest::from_bytes([0xcd; 32]),
            root_kind: 1,
            size_bytes: 4096,
            node: "a".to_owned(),
            is_pinned: true,
        };
        let mut expected = b"\x0a\x0bvolume|data\x10\x02\x18\xac\x02\x22\x20".to_vec();
        expected.extend_from_slice(&[0xcd; 32]);
        expected.extend_from_slice(b"\x28\x01\x30\x80\x20\x3a\x01a\x40\x01");
        assert_eq!(snapshot.to_bytes(), expected);
        assert_eq!(Snapshot::from_bytes(&expected), Some(snapshot));
        assert_eq!(Snapshot::from_bytes(b"\x0a\x01x"), None);
    }
}
