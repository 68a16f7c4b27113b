//! What can go wrong with snapshots: when they are opened, and later with one of them.

use std::io;
use std::path::PathBuf;

use super::{FilterError, KEY_BYTES_MAX, Kind, LABEL_BYTES_MAX};

/// Why a directory of snapshots cannot be opened. Nothing in it has been changed.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another daemon works on it.
    #[error("snapshots in {0} are in use by another daemon")]
    Locked(PathBuf),
    /// overlayfs takes its directories in one text, parted by these characters.
    #[error("snapshots cannot live in {0}: overlayfs allows no ':', ',' or '\\' in a path")]
    Path(PathBuf),
    /// There are snapshots, but not what is known of them.
    #[error("snapshots exist, but their database {0} does not: restore it or remove them")]
    MetadataMissing(PathBuf),
    /// The database cannot be read; it is never emptied.
    #[error(
        "database of snapshots {path} cannot be opened and was left as it is; check the disk, and if the file is damaged, \
         restore it, or remove its directory with all layers and then their containers and images, and pull again"
    )]
    Database {
        /// The file.
        path: PathBuf,
        /// What redb found.
        source: Box<redb::Error>,
    },
    /// The database was written by a daemon of another version.
    #[error("database of snapshots {path} has format {found}, this daemon knows {known}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
        /// Ours.
        known: u64,
    },
    /// A row of the database cannot be read, so what may be deleted is not known.
    #[error("database of snapshots cannot be read")]
    Unreadable(#[source] SnapshotError),
    /// The file system refused.
    #[error("cannot open snapshots at {path}")]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Why something could not be done with a snapshot. `api::snapshots` maps each to the code
/// containerd expects.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// No snapshot of that key or name.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// The key or name is taken.
    #[error("snapshot {0:?} already exists")]
    AlreadyExists(String),
    /// The parent asked for is not there.
    #[error("parent snapshot {0:?} does not exist")]
    ParentMissing(String),
    /// Only committed snapshots can be parents.
    #[error("parent snapshot {0:?} is not committed")]
    ParentNotCommitted(String),
    /// Only active snapshots can be committed.
    #[error("snapshot {key:?} is not active but {kind:?}")]
    NotActive {
        /// Which.
        key: String,
        /// What it is instead.
        kind: Kind,
    },
    /// A committed snapshot is mounted through a view of it.
    #[error("snapshot {0:?} is committed and has no mounts of its own")]
    NotMountable(String),
    /// It is another one's parent. containerd's own words, which its clients look for.
    #[error("cannot remove snapshot with child: {0:?} is the parent of another")]
    HasChildren(String),
    /// The key is empty or too long.
    #[error("snapshot key of {0} bytes is not valid: expected 1 to {KEY_BYTES_MAX}")]
    Key(usize),
    /// The label is too long.
    #[error("label {key:?} is too long: at most {LABEL_BYTES_MAX} bytes with its value")]
    Label {
        /// Its key, cut to a readable length.
        key: String,
    },
    /// Labels ask for a mapping of ids that does not say who root is.
    #[error("{0:?} is no mapping of user and group ids: expected 0:HOST:SIZE, for both")]
    IdMapping(String),
    /// Only labels can be updated.
    #[error("field {field:?} of snapshot {key:?} cannot be updated")]
    Immutable {
        /// Which snapshot.
        key: String,
        /// Which field.
        field: String,
    },
    /// The filter cannot be understood.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// What the database says of a snapshot makes no sense.
    #[error("database entry of snapshot {key:?} is damaged: {reason}")]
    Damaged {
        /// Which.
        key: String,
        /// In what way.
        reason: String,
    },
    /// The database failed.
    #[error("database of snapshots failed")]
    Database(#[source] Box<redb::Error>),
    /// The file system failed.
    #[error("cannot {what} {path}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
