//! The directory of a container's writable layer while a session writes into it.
//!
//! ```text
//! UPPER                  what the session writes
//! UPPER.godwit-before    what was there before, if anything: from `clear` to `settle` or `put_back`
//! ```
//!
//! A container that this node creates has an empty layer. One that a client created with an
//! annotation may have been stopped after it ran, and its files are nowhere else. They are moved
//! aside and not deleted, until the container has come from its source. A session that died leaves
//! both directories: the next one writes into a fresh `UPPER` and still has the older files to put
//! back; a daemon that starts puts them back ([`super::request::remove_abandoned`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use crate::content::{ContentError, on};
use godwit_disk::trees;

/// What the name of the directory that is kept ends in.
const BEFORE: &str = ".godwit-before";

/// The writable layer of one container.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    path: PathBuf,
    /// The session has begun to write.
    is_cleared: bool,
}

impl Layer {
    /// The layer whose upper directory is `path`.
    pub(super) fn at(path: PathBuf) -> Self {
        Self { path, is_cleared: false }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn before(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(BEFORE);
        name.into()
    }

    /// Makes the directory empty. What was in it is kept beside it; what a dead session wrote is
    /// removed.
    ///
    /// Errors: I/O; the older files are at one of the two places then.
    pub(super) fn clear(&mut self) -> Result<(), ContentError> {
        let before = self.before();
        if is_there(&before)? {
            trees::clear(&self.path)?;
        } else if !is_empty(&self.path)? {
            let data = fs::metadata(&self.path).map_err(on("look at", &self.path))?;
            fs::rename(&self.path, &before).map_err(on("move aside", &self.path))?;
            self.is_cleared = true;
            fs::create_dir(&self.path).map_err(on("make directory", &self.path))?;
            std::os::unix::fs::chown(&self.path, Some(data.uid()), Some(data.gid()))
                .map_err(on("change the owner of", &self.path))?;
            let mode = fs::Permissions::from_mode(data.mode());
            fs::set_permissions(&self.path, mode).map_err(on("change the mode of", &self.path))?;
        }
        self.is_cleared = true;
        Ok(())
    }

    /// The container has come. Returns what was kept, to be removed.
    pub(super) fn settle(&mut self) -> Option<PathBuf> {
        self.is_cleared = false;
        let before = self.before();
        before.exists().then_some(before)
    }

    /// Makes the layer as it was before the session wrote into it.
    ///
    /// Errors: I/O; what was kept stays where it is, and calling again is safe.
    pub(super) fn put_back(&mut self) -> Result<(), ContentError> {
        if !self.is_cleared {
            return Ok(());
        }
        self.restore()
    }

    /// [`Self::put_back`] for a session that died: only what it had moved aside is touched.
    pub(super) fn put_back_of_dead(mut self) -> Result<(), ContentError> {
        if is_there(&self.before())? { self.restore() } else { Ok(()) }
    }

    fn restore(&mut self) -> Result<(), ContentError> {
        let before = self.before();
        if self.path.exists() {
            trees::clear(&self.path)?;
        }
        if is_there(&before)? {
            if self.path.exists() {
                fs::remove_dir(&self.path).map_err(on("remove", &self.path))?;
            }
            fs::rename(&before, &self.path).map_err(on("move back", &self.path))?;
        }
        self.is_cleared = false;
        Ok(())
    }
}

fn is_there(path: &Path) -> Result<bool, ContentError> {
    fs::exists(path).map_err(on("look at", path))
}

fn is_empty(path: &Path) -> Result<bool, ContentError> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) => Err(on("list", path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(dir: &Path) -> Layer {
        let path = dir.join("fs");
        fs::create_dir(&path).unwrap();
        fs::write(path.join("mine"), "before").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o711)).unwrap();
        Layer::at(path)
    }

    #[test]
    fn a_session_that_fails_leaves_the_layer_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut layer = full(dir.path());
        layer.put_back().unwrap();
        assert!(layer.path().join("mine").exists(), "nothing was cleared yet");
        layer.clear().unwrap();
        assert!(is_empty(layer.path()).unwrap());
        assert_eq!(fs::metadata(layer.path()).unwrap().mode() & 0o777, 0o711);
        fs::write(layer.path().join("theirs"), "").unwrap();
        layer.put_back().unwrap();
        assert_eq!(fs::read(layer.path().join("mine")).unwrap(), b"before");
        assert!(!layer.path().join("theirs").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_dead_session_moved_aside_is_put_back_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut dead = full(dir.path());
        dead.clear().unwrap();
        fs::write(dead.path().join("half"), "").unwrap();
        drop(dead);
        let mut next = Layer::at(dir.path().join("fs"));
        next.clear().unwrap();
        assert!(is_empty(next.path()).unwrap());
        next.put_back().unwrap();
        assert!(next.path().join("mine").exists());
        next.put_back_of_dead().unwrap();

        let mut dead = Layer::at(dir.path().join("fs"));
        dead.clear().unwrap();
        Layer::at(dir.path().join("fs")).put_back_of_dead().unwrap();
        assert!(dead.path().join("mine").exists());
    }

    #[test]
    fn when_the_container_has_come_the_older_files_go() {
        let dir = tempfile::tempdir().unwrap();
        let mut layer = full(dir.path());
        layer.clear().unwrap();
        fs::write(layer.path().join("theirs"), "").unwrap();
        trees::remove(&layer.settle().unwrap()).unwrap();
        layer.put_back().unwrap();
        assert!(layer.path().join("theirs").exists());
        assert!(layer.settle().is_none());
    }
}
