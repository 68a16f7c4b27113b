//! The index: which object lies where, which packs there are, and the snapshots. A redb database in
//! one file.
//!
//! | table | key | value |
//! |---|---|---|
//! | `meta` | `version`, `next_snapshot` | u64 |
//! | `objects` | digest | [`Location`], 17 bytes |
//! | `packs` | number | bytes of the pack that belong to objects and what lies between them |
//! | `quarantine` | digest | the location where it was found damaged |
//! | `snapshots` | id | a [`super::Snapshot`] in protobuf |
//! | `removed` | subject | when its container or volume was removed, in milliseconds since 1970 |
//!
//! Commits are of two kinds. A *flush* makes objects visible at once and durable some time later. A
//! *durable* commit takes everything before it along, so it comes after an fsync of the packs, and
//! while it holds the database's only write transaction: no flush can slip in between whose bytes
//! have not been synced.
//!
//! A failed index is reopened as of its last durable commit ([`Healing`]), also when packs could
//! not be synced: it may then name bytes that the disk has not. Objects that were flushed since are
//! gone. So leases end with it ([`super::lease`]), and a caller that goes on from what it read
//! before compares [`Index::generation`].

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use godwit_protos::Digest;
use redb::{Durability, ReadableTable as _, TableDefinition};

use super::encoding::Encoding;
use super::error::{OpenError, StoreError};
use super::pack::{self, Packs};
use godwit_disk::database::Healing;
use godwit_disk::step;

pub(super) type ObjectsTable = redb::ReadOnlyTable<&'static [u8; 32], &'static [u8; 17]>;

pub(super) const OBJECTS: TableDefinition<'_, &[u8; 32], &[u8; 17]> =
    TableDefinition::new("objects");
pub(super) const PACKS: TableDefinition<'_, u32, u32> = TableDefinition::new("packs");
pub(super) const QUARANTINE: TableDefinition<'_, &[u8; 32], &[u8; 17]> =
    TableDefinition::new("quarantine");
pub(super) const SNAPSHOTS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("snapshots");
pub(super) const REMOVED: TableDefinition<'_, &str, i64> = TableDefinition::new("removed");
pub(super) const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const META_VERSION: &str = "version";
pub(super) const META_NEXT_SNAPSHOT: &str = "next_snapshot";

/// Memory for cached pages of the index, in bytes: the entries of about a million objects.
const CACHE_BYTES: usize = 64 << 20;

/// Where an object lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Location {
    pub(super) pack: u32,
    /// Of the record, in bytes from the start of the pack.
    pub(super) offset: u32,
    /// Length of the stored form, in bytes.
    pub(super) stored_len: u32,
    /// Length of the object, in bytes.
    pub(super) size: u32,
    pub(super) encoding: Encoding,
}

impl Location {
    pub(super) fn to_bytes(self) -> [u8; 17] {
        let mut bytes = [0; 17];
        let words = [self.pack, self.offset, self.stored_len, self.size];
        for (place, word) in bytes.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes[16] = self.encoding as u8;
        bytes
    }

    /// `None` if the bytes cannot be a location, as after damage to the index.
    pub(super) fn from_bytes(bytes: &[u8; 17]) -> Option<Self> {
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let encoding = Encoding::from_byte(bytes[16])?;
        let (stored_len, size) = (word(8), word(12));
        let max = u32::try_from(super::OBJECT_BYTES_MAX).unwrap_or(u32::MAX);
        if size == 0 || size > max || stored_len == 0 || stored_len > max {
            return None;
        }
        Some(Self { pack: word(0), offset: word(4), stored_len, size, encoding })
    }

    /// Length of the whole record, in bytes.
    pub(super) fn record_len(&self) -> usize {
        pack::RECORD_BYTES + self.stored_len as usize
    }

    /// Where the record ends, in bytes from the start of the pack.
    pub(super) fn end(&self) -> u64 {
        u64::from(self.offset) + self.record_len() as u64
    }
}

pub(super) struct Index {
    db: Healing,
}

fn builder() -> redb::Builder {
    let mut builder = redb::Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

impl Index {
    /// Opens the index at `path`, or makes an empty one.
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        let wrong = |error: redb::Error| match error {
            redb::Error::DatabaseAlreadyOpen => OpenError::InUse(path.to_owned()),
            other => OpenError::Index { path: path.to_owned(), source: Box::new(other) },
        };
        let index = Self { db: Healing::open(path, builder).map_err(wrong)? };
        let found = index.ensure_tables()?;
        if found != pack::VERSION {
            return Err(OpenError::Version { path: path.to_owned(), found });
        }
        Ok(index)
    }

    /// Version of the index; a new one gets its tables and ours.
    fn ensure_tables(&self) -> Result<u64, StoreError> {
        let write = self.begin_write()?;
        let version = {
            let mut meta = write.open_table(META)?;
            let found = meta.get(META_VERSION)?.map(|value| value.value());
            if found.is_none() {
                meta.insert(META_VERSION, pack::VERSION)?;
            }
            found.unwrap_or(pack::VERSION)
        };
        if version != pack::VERSION {
            write.abort()?;
            return Ok(version);
        }
        write.open_table(OBJECTS)?;
        write.open_table(PACKS)?;
        write.open_table(QUARANTINE)?;
        write.open_table(SNAPSHOTS)?;
        write.open_table(REMOVED)?;
        write.commit()?;
        Ok(version)
    }

    /// Waits for its turn: there is one write transaction at a time.
    pub(super) fn begin_write(&self) -> Result<redb::WriteTransaction, StoreError> {
        let mut write = self.db.begin_write()?;
        // A commit that is damaged can then not be taken for one that a power cut interrupted.
        write.set_two_phase_commit(true);
        Ok(write)
    }

    /// As [`Self::begin_write`], by a caller that goes on from what it read in `generation`.
    /// Errors: [`StoreError::Reopened`].
    pub(super) fn begin_write_of(
        &self,
        generation: u64,
    ) -> Result<redb::WriteTransaction, StoreError> {
        let write = self.begin_write()?;
        if self.generation() != generation {
            return Err(StoreError::Reopened);
        }
        Ok(write)
    }

    pub(super) fn begin_read(&self) -> Result<redb::ReadTransaction, StoreError> {
        Ok(self.db.begin_read()?)
    }

    /// Opens it again if it has failed.
    pub(super) fn heal(&self) -> Result<(), StoreError> {
        Ok(self.db.heal()?)
    }

    /// Has it reopened as of its last durable commit, before it is used again.
    pub(super) fn fail(&self, reason: impl std::fmt::Display) {
        self.db.fail(reason);
    }

    /// Why it takes no change.
    pub(super) fn failure(&self) -> Option<String> {
        self.db.failure()
    }

    /// How often it was reopened.
    pub(super) fn generation(&self) -> u64 {
        self.db.generation()
    }

    /// The same number, to be followed.
    pub(super) fn generations(&self) -> Arc<AtomicU64> {
        self.db.generations()
    }

    /// Makes sure that the file can grow. Errors: the disk is full, or failed.
    pub(super) fn ensure_room(&self) -> std::io::Result<()> {
        self.db.ensure_room()
    }

    /// Syncs the packs. If that fails, nothing that the index has said of them since its last
    /// durable commit can be relied on.
    pub(super) fn sync_packs(&self, packs: &Packs) -> Result<(), StoreError> {
        let synced = packs.sync(self.generation());
        if let Err(error) = &synced {
            self.fail(error);
        }
        synced
    }

    /// Makes the changes of `write`, and everything made visible before, durable. See the module's
    /// comment for the order.
    pub(super) fn commit_durable(
        &self,
        mut write: redb::WriteTransaction,
        packs: &Packs,
    ) -> Result<(), StoreError> {
        step::reach("before the packs are synced");
        self.sync_packs(packs)?;
        step::reach("before the index is committed");
        write.set_durability(Durability::Immediate)?;
        write.commit()?;
        step::reach("after the index is committed");
        Ok(())
    }

    pub(super) fn objects(&self) -> Result<ObjectsTable, StoreError> {
        Ok(self.begin_read()?.open_table(OBJECTS)?)
    }
}

/// Makes the changes of `write` visible. They become durable with the next durable commit.
pub(super) fn commit_visible(mut write: redb::WriteTransaction) -> Result<(), StoreError> {
    write.set_durability(Durability::None)?;
    Ok(write.commit()?)
}

/// Tells the table of packs that the index names a record that lies at `at`.
pub(super) fn extend_pack(
    packs: &mut redb::Table<'_, u32, u32>,
    at: &Location,
) -> Result<(), StoreError> {
    let end = u32::try_from(at.end()).unwrap_or(u32::MAX);
    let known = packs.get(at.pack)?.map_or(0, |value| value.value());
    if end > known {
        packs.insert(at.pack, end)?;
    }
    Ok(())
}

/// What `objects` says about `digest`: absent, unreadable (`Err` with the raw entry) or a location.
pub(super) fn lookup(
    objects: &impl redb::ReadableTable<&'static [u8; 32], &'static [u8; 17]>,
    digest: &Digest,
) -> Result<Option<Result<Location, [u8; 17]>>, StoreError> {
    let entry = objects.get(digest.as_bytes())?;
    Ok(entry.map(|value| Location::from_bytes(value.value()).ok_or(*value.value())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_four_words_and_an_encoding() {
        let at = Location {
            pack: 1,
            offset: 0x0200,
            stored_len: 0x0003_0000,
            size: 4,
            encoding: Encoding::Zstd,
        };
        let bytes = [1, 0, 0, 0, 0, 2, 0, 0, 0, 0, 3, 0, 4, 0, 0, 0, 1];
        assert_eq!(at.to_bytes(), bytes);
        assert_eq!(Location::from_bytes(&bytes), Some(at));
        let mut unknown = bytes;
        unknown[16] = 2;
        assert_eq!(Location::from_bytes(&unknown), None);
        let mut huge = bytes;
        huge[15] = 1;
        assert_eq!(Location::from_bytes(&huge), None);
    }
}
