//! What could not be removed: set aside, reported, and tried again.
//!
//! A mount in a tree, or a disk that fails, must not keep the daemon from starting, nor an ID from
//! being used again. So a removal takes two steps: its caller moves the thing to a name that
//! nothing else will have, and then hands it to [`Leftovers::remove`], which does not fail. What
//! stays is named by `godwit check` and `godwit status`. The daemon tries again when it starts and
//! with every sweep, and so does `godwit check --repair`.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::trees::{self, RemoveError};

/// The leftovers of one part of the node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leftovers {
    reasons: Arc<Mutex<BTreeMap<PathBuf, String>>>,
    is_in_use: fn(&Path) -> bool,
}

impl Default for Leftovers {
    fn default() -> Self {
        Self::sparing(|_| false)
    }
}

impl Leftovers {
    /// Leftovers that stay while `is_in_use` says so.
    pub fn sparing(is_in_use: fn(&Path) -> bool) -> Self {
        Self { reasons: Arc::default(), is_in_use }
    }

    /// Removes a file or directory. If that fails, it becomes a leftover.
    ///
    /// Caller: nothing else will ever have this name, since the removal is tried again later.
    pub fn remove(&self, path: &Path) {
        if (self.is_in_use)(path) {
            self.add(path, format!("{} is still mounted by a process; unmount it", path.display()));
        } else {
            self.note(path, trees::remove(path));
        }
    }

    /// Takes note of how a removal of `path` ended.
    pub fn note(&self, path: &Path, removed: Result<(), RemoveError>) {
        match removed {
            Err(RemoveError { path: stays, source })
                if source.kind() != io::ErrorKind::NotFound =>
            {
                self.add(path, format!("cannot remove {}: {source}", stays.display()));
            }
            _ => drop(self.lock().remove(path)),
        }
    }

    /// Adds a leftover, with what is the matter with it.
    pub fn add(&self, path: &Path, reason: String) {
        let known = self.lock().insert(path.to_owned(), reason.clone());
        if known.as_ref() != Some(&reason) {
            tracing::warn!("{reason}; it is set aside and tried again");
        }
    }

    /// Tries to remove every leftover.
    pub fn retry(&self) {
        let paths: Vec<_> = self.lock().keys().cloned().collect();
        paths.iter().for_each(|path| self.remove(path));
    }

    /// What stays, and why, each in words.
    pub fn reasons(&self) -> Vec<String> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, String>> {
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
