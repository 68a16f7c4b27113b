//! A database that is opened again after it failed.
//!
//! redb rejects all writes after a read or write of its file that failed, until it is reopened: a
//! disk that was full for a moment would be the end of it. Here the next transaction reopens it:
//!
//! 1. close it. Nothing more is made durable, since its gate is shut ([`super::gate`]);
//! 2. open the file as at a start, which compares every page with its checksum. What is there is
//!    the last change that was made durable before the failure;
//! 3. count the reopening ([`Healing::generation`]).
//!
//! Changes that were visible and not yet durable are gone. A user who makes such changes compares
//! the generation after the beginning of a transaction with the one at which it saw them.
//! If the file cannot be opened, or is gone, every transaction fails and tries again; a file is
//! never recreated.

use std::fmt::Display;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use redb::{Builder, Database, ReadTransaction, ReadableDatabase as _, WriteTransaction};

use super::gate::Failure;
use super::{Opened, Room};

/// A database that survives its failures.
#[derive(Debug)]
pub struct Healing {
    path: PathBuf,
    builder: fn() -> Builder,
    state: RwLock<State>,
    generation: Arc<AtomicU64>,
}

#[derive(Debug)]
struct State {
    /// `None` while it could not be opened again. A thread that waits for its turn to write has it
    /// too, and holds no lock meanwhile: the thread that it waits for may have to take the lock.
    open: Option<Arc<Database>>,
    room: Room,
    /// Of the database that was opened last.
    failure: Failure,
}

impl State {
    fn of(Opened { database, room, failure }: Opened) -> Self {
        room.try_to_keep();
        Self { open: Some(Arc::new(database)), room, failure }
    }
}

impl Healing {
    /// Opens the database at `path`, or makes an empty one; see [`super::open`].
    pub fn open(path: &Path, builder: fn() -> Builder) -> Result<Self, redb::Error> {
        let opened = super::open(path, builder(), |_| Ok(()))?;
        let (path, state) = (path.to_owned(), RwLock::new(State::of(opened)));
        Ok(Self { path, builder, state, generation: Arc::default() })
    }

    /// How often it was opened again. Grows before the first transaction of the reopened database
    /// begins.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The same number, to be followed.
    pub fn generations(&self) -> Arc<AtomicU64> {
        self.generation.clone()
    }

    /// Why it takes no change, if it has failed and was not opened again.
    pub fn failure(&self) -> Option<String> {
        self.read().failure.reason()
    }

    /// Has the next transaction open the database again, as of the last durable change: what was
    /// changed since must not be made durable.
    pub fn fail(&self, reason: impl Display) {
        self.read().failure.note(reason);
    }

    /// Makes sure that the file can grow. Errors: the disk is full, or failed.
    pub fn ensure_room(&self) -> io::Result<()> {
        self.read().room.ensure()
    }

    /// Begins a write transaction once it is its turn.
    pub fn begin_write(&self) -> Result<WriteTransaction, redb::Error> {
        self.with(|database| Ok(database.begin_write()?))
    }

    /// Begins a read transaction.
    pub fn begin_read(&self) -> Result<ReadTransaction, redb::Error> {
        self.with(|database| Ok(database.begin_read()?))
    }

    fn with<T>(
        &self,
        begin: impl FnOnce(&Database) -> Result<T, redb::Error>,
    ) -> Result<T, redb::Error> {
        self.heal()?;
        let (open, failure) = {
            let state = self.read();
            (state.open.clone(), state.failure.clone())
        };
        let closed = || redb::Error::Io(io::Error::other("it could not be opened again yet"));
        let begun = begin(&*open.ok_or_else(closed)?);
        if let Err(error) = &begun {
            failure.note(error);
        }
        begun
    }

    /// Opens the database again if it has failed. Errors: it cannot be opened.
    pub fn heal(&self) -> Result<(), redb::Error> {
        if !self.read().failure.has_happened() {
            return Ok(());
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let Some(reason) = state.failure.reason() else { return Ok(()) };
        if state.open.take().is_some() {
            tracing::error!(path = %self.path.display(), reason, "a database failed");
        }
        // One that is not there, because a disk is gone, must not be made again.
        if fs::metadata(&self.path)?.len() == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        *state = State::of(super::open(&self.path, (self.builder)(), |_| Ok(()))?);
        self.generation.fetch_add(1, Ordering::SeqCst);
        tracing::warn!(path = %self.path.display(), reason, "a database was opened again");
        Ok(())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use redb::{Durability, ReadableTable as _, TableDefinition};

    use super::*;

    const TABLE: TableDefinition<'_, u64, u64> = TableDefinition::new("table");

    fn add(database: &Healing, row: u64, durability: Durability) -> Result<(), redb::Error> {
        let mut write = database.begin_write()?;
        write.set_durability(durability)?;
        write.open_table(TABLE)?.insert(row, row)?;
        Ok(write.commit()?)
    }

    fn rows(database: &Healing) -> Result<Vec<u64>, redb::Error> {
        let table = database.begin_read()?.open_table(TABLE)?;
        table.iter()?.map(|row| Ok(row?.0.value())).collect()
    }

    fn open() -> (tempfile::TempDir, Healing) {
        let dir = tempfile::tempdir().unwrap();
        let database = Healing::open(&dir.path().join("one.redb"), Builder::new).unwrap();
        add(&database, 1, Durability::Immediate).unwrap();
        (dir, database)
    }

    #[test]
    fn a_failed_database_is_reopened_as_of_its_last_durable_change() {
        let (_dir, database) = open();
        add(&database, 2, Durability::None).unwrap();
        assert_eq!(rows(&database).unwrap(), [1, 2]);
        database.fail("the disk is full");
        assert_eq!(database.failure().as_deref(), Some("the disk is full"));
        add(&database, 3, Durability::Immediate).unwrap();
        assert_eq!(rows(&database).unwrap(), [1, 3]);
        assert_eq!((database.generation(), database.failure()), (1, None));
    }

    /// Method: a transaction that began before the failure ends after it.
    #[test]
    fn what_began_before_a_failure_is_refused_and_closes_the_old_one() {
        let (_dir, database) = open();
        let write = database.begin_write().unwrap();
        write.open_table(TABLE).unwrap().insert(2, 2).unwrap();
        database.fail("the disk is full");
        assert!(rows(&database).is_err(), "two of them would have the file open");
        assert!(write.commit().is_err());
        assert_eq!(rows(&database).unwrap(), [1]);
    }

    #[test]
    fn one_that_is_gone_is_not_recreated_and_comes_back() {
        let (dir, database) = open();
        let (path, away) = (dir.path().join("one.redb"), dir.path().join("away"));
        fs::rename(&path, &away).unwrap();
        database.fail("the disk is gone");
        assert!(add(&database, 2, Durability::Immediate).is_err());
        fs::write(&path, "").unwrap();
        assert!(rows(&database).is_err());
        assert_eq!(fs::metadata(&path).unwrap().len(), 0);
        fs::rename(&away, &path).unwrap();
        assert_eq!(rows(&database).unwrap(), [1]);
    }
}
