//! Fences: files that shims read, one for each container that was released.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use godwit_disk::trees::{self, RemoveError};
use godwit_protos::ContainerRef;

use super::{Journal, JournalError};
use crate::ownership::Ownership;

impl Journal {
    fn fence(&self, container: &ContainerRef) -> PathBuf {
        self.fences.join(container.namespace()).join(container.id())
    }

    pub(super) fn set_fence(
        &self,
        container: &ContainerRef,
        ownership: &Ownership,
    ) -> Result<(), JournalError> {
        let (Ownership::Released(epoch, to) | Ownership::Moved(epoch, to)) = ownership else {
            return self.remove_fence(container);
        };
        let path = self.fence(container);
        let node = to.split('/').next().unwrap_or(to);
        let text = format!("moved to {node}, epoch {}", epoch.0);
        let write = || {
            // It was flushed when it was written. So a daemon starts although the disk is full.
            if fs::read(&path).is_ok_and(|found| found == text.as_bytes()) {
                return Ok(());
            }
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let partial = path.with_extension("tmp~");
            fs::write(&partial, &text)?;
            fs::File::open(&partial)?.sync_all()?;
            fs::rename(&partial, &path)?;
            path.parent().map_or(Ok(()), |parent| fs::File::open(parent)?.sync_all())
        };
        write().map_err(|source| JournalError::Fence { path: path.clone(), source })
    }

    pub(super) fn remove_fence(&self, container: &ContainerRef) -> Result<(), JournalError> {
        match trees::remove(&self.fence(container)) {
            Err(RemoveError { path, source }) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Fence { path, source })
            }
            _ => Ok(()),
        }
    }

    /// A fence for each released container, and none for any other.
    pub(super) fn restore_fences(&self) -> Result<(), JournalError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::Fence { path, source }
        };
        fs::create_dir_all(&self.fences).map_err(failed(&self.fences))?;
        // At no moment is a released container without its fence: its shim looks whether we run or
        // not.
        let mut wanted = HashSet::new();
        for (container, entry) in self.containers()? {
            if entry.ownership.is_fenced() {
                self.set_fence(&container, &entry.ownership)?;
                wanted.insert(self.fence(&container));
            }
        }
        for other in files_below(&self.fences).into_iter().filter(|path| !wanted.contains(path)) {
            // It only refuses to create a container, and runs none.
            if let Err(RemoveError { path, source }) = trees::remove(&other) {
                tracing::error!(path = %path.display(), error = %source, "a fence stays; remove it");
            }
        }
        Ok(())
    }
}

/// What lies in the directories of `directory`; nothing if it cannot be listed.
pub(super) fn files_below(directory: &Path) -> Vec<PathBuf> {
    let list = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    list(directory).iter().flat_map(|inner| list(inner)).collect()
}
