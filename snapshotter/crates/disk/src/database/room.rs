//! Room on the disk for a database's file before it is needed.
//!
//! redb takes no change any more once it could not write one, until it is opened again, and its
//! file has holes where nothing was written yet. So that a full disk is not the end of
//! it, every byte of the file has its place, and beyond its end there is room for the next growth:
//! as much again (`grow` of redb's `page_manager.rs`), unless one value takes more than half of it.

use std::fs::File;
use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use redb::backends::FileBackend;
use redb::{BackendError, StorageBackend};

/// What is kept beyond the end of a file at most, in bytes. A larger database grows by more, and
/// then may fail.
const GROWTH_MAX: u64 = 64 << 20;

/// Keeps room for one file. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Room(Arc<(File, AtomicU64)>);

impl Room {
    pub(super) fn of(file: File) -> Self {
        Self(Arc::new((file, AtomicU64::new(0))))
    }

    /// Makes sure that the file can grow. Errors: the disk is full, or failed; what is in the file
    /// is as it was.
    pub fn ensure(&self) -> io::Result<()> {
        let (file, kept) = &*self.0;
        let length = file.metadata()?.len();
        let wanted = length + length.min(GROWTH_MAX);
        if kept.load(Ordering::Relaxed) == wanted {
            return Ok(());
        }
        let signed = i64::try_from(wanted).map_err(io::Error::other)?;
        match fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, signed) {
            // A file system that cannot promise it: things are as they would be without.
            Ok(()) | Err(Errno::EOPNOTSUPP) => kept.store(wanted, Ordering::Relaxed),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// The same, where nothing can be done about it yet.
    pub(super) fn try_to_keep(&self) {
        if let Err(error) = self.ensure() {
            tracing::warn!(%error, "no room for a database to grow");
        }
    }
}

/// A file whose place is kept.
#[derive(Debug)]
pub(super) struct Roomy {
    inner: FileBackend,
    room: Room,
}

impl Roomy {
    /// Caller: has opened `file` for reading and writing. Errors: redb's; it is open already.
    pub(super) fn new(file: File) -> Result<(Self, Room), redb::Error> {
        let room = Room::of(file.try_clone()?);
        room.try_to_keep();
        Ok((Self { inner: FileBackend::new(file)?, room: room.clone() }, room))
    }
}

impl StorageBackend for Roomy {
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.inner.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)?;
        // Cutting a file frees what is behind.
        self.room.0.1.store(0, Ordering::Relaxed);
        self.room.try_to_keep();
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.inner.write(offset, data)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }

    fn close(&self) -> io::Result<()> {
        self.inner.close()
    }

    fn try_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.try_lock_range(start, end)
    }

    fn try_lock_shared_range(
        &self,
        start: Bound<u64>,
        end: Bound<u64>,
    ) -> Result<bool, BackendError> {
        self.inner.try_lock_shared_range(start, end)
    }

    fn lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_range(start, end)
    }

    fn lock_shared_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.lock_shared_range(start, end)
    }

    fn unlock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<(), BackendError> {
        self.inner.unlock_range(start, end)
    }

    fn query_lock_range(&self, start: Bound<u64>, end: Bound<u64>) -> Result<bool, BackendError> {
        self.inner.query_lock_range(start, end)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use redb::{Database, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("table");

    #[test]
    fn a_database_has_all_its_bytes_and_as_many_again_on_the_disk() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let (file, room) = Roomy::new(path.reopen().unwrap()).unwrap();
        let database = Database::builder().create_with_backend(file).unwrap();
        let mut lengths = std::collections::BTreeSet::new();
        for key in 0..400 {
            room.ensure().unwrap();
            let found = path.as_file().metadata().unwrap();
            assert!(found.blocks() * 512 >= 2 * found.len(), "{found:?}");
            lengths.insert(found.len());
            let write = database.begin_write().unwrap();
            write.open_table(TABLE).unwrap().insert(key, vec![1; 16 << 10].as_slice()).unwrap();
            write.commit().unwrap();
        }
        let lengths: Vec<u64> = lengths.into_iter().collect();
        assert!(lengths.len() > 2, "{lengths:?}");
        assert!(lengths.windows(2).all(|pair| pair[1] <= 2 * pair[0]), "{lengths:?}");
    }
}
