//! Layers whose directories are gone, and how one comes back.

use std::fs::{self, File};

use super::tree::{discard, write_out};
use super::{Info, Kind, SnapshotError, Snapshotter};
use godwit_disk::step;

impl Snapshotter {
    /// The committed snapshots whose directories are missing, parents first.
    pub fn lost(&self) -> Result<Vec<Info>, SnapshotError> {
        let mut lost = self.metadata.all()?;
        lost.retain(|(_, row)| row.kind == Kind::Committed && self.missing_of(row).is_some());
        lost.sort_by_key(|(_, row)| row.number);
        Ok(lost.into_iter().map(|(name, row)| row.into_info(&name)).collect())
    }

    /// Makes what the active snapshot `key` holds the committed one `name` again, whose directory
    /// is missing; `key` is gone.
    ///
    /// 1. write the files out, 2. rename the directory, 3. flush that, 4. commit the database
    ///    without `key`.
    ///
    /// On open: before step 3 `name` is missing still, or not any more; `key` is there, and after
    /// step 2 it is made again, empty. containerd does not know it and has it removed.
    ///
    /// Caller: nothing writes to it any more, and it is what `name` was. Errors:
    /// [`SnapshotError::NotFound`] for either; [`SnapshotError::AlreadyExists`] if `name` is whole,
    /// or not committed; [`SnapshotError::NotActive`]; and the disk's.
    pub fn put_back(&self, name: &str, key: &str) -> Result<(), SnapshotError> {
        let from = self.metadata.get(key)?;
        if from.kind != Kind::Active {
            return Err(SnapshotError::NotActive { key: key.to_owned(), kind: from.kind });
        }
        step::reach("put back 1");
        write_out(&self.upper(from.number), from.created)?;
        // Inside it nothing is removed either.
        let change = self.metadata.begin()?;
        let to = self.metadata.get(name)?;
        if to.kind != Kind::Committed || self.missing_of(&to).is_none() {
            return Err(SnapshotError::AlreadyExists(name.to_owned()));
        }
        let number = change.remove(key)?;
        if number != from.number {
            // It was removed and prepared again meanwhile.
            return Err(SnapshotError::NotFound(key.to_owned()));
        }
        let (source, target) = (self.tree(number), self.tree(to.number));
        let failed = |source| SnapshotError::Io { what: "put back", path: target.clone(), source };
        step::reach("put back 2");
        discard(&target);
        fs::rename(source, &target).map_err(failed)?;
        step::reach("put back 3");
        File::open(&self.trees).and_then(|trees| trees.sync_all()).map_err(failed)?;
        step::reach("put back 4");
        change.commit_to_disk()
    }
}
