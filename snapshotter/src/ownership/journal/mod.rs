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
//!
//! [`containers`] has the containers and what became of them, [`volumes`] the volumes, [`fences`]
//! the files for shims.

mod containers;
mod fences;
#[cfg(test)]
mod tests;
mod volumes;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use godwit_disk::database::Healing;
use godwit_protos::ContainerRef;
use redb::ReadTransaction;
use serde::Serialize;

use super::Event;
use super::leases::LEASES;
use containers::{CONTAINERS, EPOCHS, TOMBSTONES};
pub use containers::{Entry, TOMBSTONE_MAX, Tombstone};
use fences::files_below;
use volumes::VOLUMES;
pub use volumes::{Arriving, VolumeEntry};

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
