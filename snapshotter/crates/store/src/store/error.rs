//! How the store fails. A full disk is a variant of its own everywhere, because it has a cure of
//! its own.

use std::io;
use std::path::{Path, PathBuf};

use godwit_protos::Digest;

use super::SnapshotId;

/// Why an operation on an open store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing was changed; free space (retire snapshots, sweep) and try again.
    #[error("no room left on the disk of {path}")]
    Full {
        /// The file or directory that was to grow.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("{doing} {path}")]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The index refused. It is left as it is.
    #[error("index of the store")]
    Index(#[source] Box<redb::Error>),
    /// The object's bytes are not what its name says. It is quarantined: from now on the store does
    /// not have it.
    #[error("object {digest} is damaged in pack {pack} at offset {offset}: {why}")]
    Corrupt {
        /// The object.
        digest: Digest,
        /// Number of its pack.
        pack: u32,
        /// Offset of its record in the pack, in bytes.
        offset: u32,
        /// What was found.
        why: Mismatch,
    },
    /// The store does not hold the object.
    #[error("object {0} is not in the store")]
    NotFound(Digest),
    /// An object must have 1 byte to 4 MiB, stored or not.
    #[error("an object of {0} bytes; 1 to {max} are allowed", max = super::OBJECT_BYTES_MAX)]
    ObjectSize(usize),
    /// What was written under the lease may have been swept: begin again under a new lease.
    #[error("lease {0:?} has expired")]
    LeaseExpired(String),
    /// The index failed and was reopened meanwhile, so that what was read before is out of date:
    /// begin again.
    #[error("the store's index failed and was reopened meanwhile")]
    Reopened,
    /// No snapshot with this id is recorded.
    #[error("{0} is not recorded")]
    UnknownSnapshot(SnapshotId),
    /// A snapshot's record cannot be read. It is left as it is.
    #[error("record of {0} is damaged")]
    SnapshotRecord(SnapshotId),
}

/// In what way a record differs from what the index says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// The pack is not there or ends before the record does.
    #[error("the pack ends before it")]
    Gone,
    /// Another record lies there, or none.
    #[error("another record lies there")]
    Header,
    /// zstd cannot restore the announced number of bytes.
    #[error("it does not decompress")]
    Compression,
    /// The content has another SHA-256.
    #[error("its SHA-256 differs")]
    Content,
    /// The index entry makes no sense.
    #[error("its index entry is not readable")]
    Entry,
}

/// Why a store cannot be opened. It is left as it was.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process, or this one, has the store open.
    #[error("store {0} is in use")]
    InUse(PathBuf),
    /// There are packs but no index. Making a new index would declare them all garbage.
    #[error(
        "store {0} has packs but no index; restore index.redb, or remove the packs to begin again"
    )]
    IndexMissing(PathBuf),
    /// The index cannot be opened.
    #[error(
        "index {path} of the store cannot be opened and was left as it is; check the disk, and if the file is damaged, \
         restore it, or remove the directory: it holds cached snapshots and copies of volumes, no volume itself"
    )]
    Index {
        /// Path of `index.redb`.
        path: PathBuf,
        /// What the database said.
        #[source]
        source: Box<redb::Error>,
    },
    /// The store was written by another version of this program.
    #[error("{path} has format version {found}, not {known}", known = super::pack::VERSION)]
    Version {
        /// The index or a pack.
        path: PathBuf,
        /// Version found there.
        found: u64,
    },
    /// A file with the name of a pack is something else.
    #[error("{0} is not the pack its name says")]
    ForeignPack(PathBuf),
    /// Anything that can also happen later.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl StoreError {
    pub(super) fn io(doing: &'static str, path: &Path, source: io::Error) -> Self {
        if is_full(&source) {
            return Self::Full { path: path.to_owned() };
        }
        Self::Io { doing, path: path.to_owned(), source }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// All of the database's error types become one; the file is always the index.
macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                match redb::Error::from(error) {
                    redb::Error::Io(source) if is_full(&source) => {
                        Self::Full { path: PathBuf::from(super::INDEX_FILE) }
                    }
                    other => Self::Index(Box::new(other)),
                }
            }
        }
    )*};
}
from_redb!(
    redb::Error,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError,
    redb::DatabaseError,
    redb::SetDurabilityError
);
