//! Volumes: writable ones by identity, read-only ones by the digest of their content.
//!
//! ```text
//! STATE/volumes/ID/data        a writable volume; the journal says whether it is here or has moved
//! STATE/content/HEX            the tree sha256:HEX laid out, for read-only mounts; never written to again
//! STATE/trash/N                what is being removed
//! ```
//!
//! A directory appears at its final path by a rename, complete, or not at all; it disappears by a rename into
//! `trash`. On open: what lies in `trash` is removed, and a laid-out tree without its final name is too.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use godwit_protos::{ContainerRef, Digest, VolumeId, VolumeSource};

use crate::content::capture::{Unchanged, capture};
use crate::content::materialize::materialize;
use crate::content::{ContentError, on};
use crate::migrate::journal::{Journal, JournalError, VolumeEntry};
use crate::store::{Lease, Store, StoreError};

/// How long an import may take before the sweep no longer waits for it.
const IMPORT_LEASE: Duration = Duration::from_secs(3600);

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// Nobody created it.
    #[error("volume {0} is not on this node; create it with `godwit volume create {0}`")]
    Unknown(VolumeId),
    /// It went with a container.
    #[error(
        "volume {id} moved to {to}; remove what is left of it here with `godwit volume rm {id}`"
    )]
    Moved {
        /// The volume.
        id: VolumeId,
        /// The node that has it.
        to: String,
    },
    /// Its name is taken.
    #[error("volume {0} exists on this node already")]
    Exists(VolumeId),
    /// Read-only content that is not here.
    #[error("volume {0} is not on this node; import it with `godwit volume import DIRECTORY`")]
    NoContent(Digest),
    /// ... nor at any neighbour that answers.
    #[error(
        "volume {0} is neither on this node nor at a neighbour; import it with `godwit volume import DIRECTORY`"
    )]
    Nowhere(Digest),
    /// A writable volume mounted by digest, or read-only content mounted for writing.
    #[error("volume {0} is named by its content and can only be mounted read-only")]
    ReadOnly(Digest),
    /// An export would mix with what is there.
    #[error("{} is not an empty or new directory", .0.display())]
    NotEmpty(PathBuf),
    /// What is laid out is not what its name says.
    #[error(
        "volume {digest} is damaged: what is laid out is {found}; remove it with `godwit volume rm {digest}`"
    )]
    Damaged {
        /// Its name.
        digest: Digest,
        /// What it is now.
        found: Digest,
    },
    /// The journal failed.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// Laying out or reading the content failed.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nothing was swept.
    #[error("nothing was swept")]
    Sweep(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The volumes of one node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Volumes {
    state_dir: PathBuf,
    journal: Journal,
    store: Store,
}

/// One line of `godwit volume ls`.
#[derive(Debug)]
pub struct Listed {
    /// A volume id or `sha256:...`.
    pub name: String,
    /// Where it lies.
    pub path: PathBuf,
    /// Whether it is read-only content.
    pub read_only: bool,
}

impl Volumes {
    /// Opens the volumes below `state_dir`. Errors: [`VolumeError::Content`] for a directory that cannot be made.
    pub fn open(state_dir: &Path, journal: Journal, store: Store) -> Result<Self, VolumeError> {
        let volumes = Self { state_dir: state_dir.to_owned(), journal, store };
        for name in ["volumes", "content", "trash"] {
            let path = state_dir.join(name);
            fs::create_dir_all(&path).map_err(on("make directory", &path))?;
        }
        volumes.empty_trash()?;
        for unfinished in volumes.names("content")?.iter().filter(|name| name.ends_with(".tmp")) {
            let path = state_dir.join("content").join(unfinished);
            fs::remove_dir_all(&path).map_err(on("remove", &path))?;
        }
        Ok(volumes)
    }

    /// Where what `source` names lies on this node.
    ///
    /// Errors: [`VolumeError`] that says what to do when it does not.
    pub fn path(&self, source: &VolumeSource, read_only: bool) -> Result<PathBuf, VolumeError> {
        match source {
            VolumeSource::Writable(id) => self.writable(id),
            VolumeSource::Content(digest) if !read_only => Err(VolumeError::ReadOnly(*digest)),
            VolumeSource::Content(digest) => {
                let path = self.content_path(digest);
                if path.is_dir() { Ok(path) } else { Err(VolumeError::NoContent(*digest)) }
            }
        }
    }

    fn writable(&self, id: &VolumeId) -> Result<PathBuf, VolumeError> {
        match self.journal.volume(id)? {
            None => Err(VolumeError::Unknown(id.clone())),
            Some(VolumeEntry { moved_to: Some(to), .. }) => {
                Err(VolumeError::Moved { id: id.clone(), to })
            }
            Some(VolumeEntry { moved_to: None, .. }) => Ok(self.data_path(id)),
        }
    }

    /// Whether a migration may bring a volume of this name here. Errors: [`VolumeError::Exists`].
    pub fn may_receive(&self, id: &VolumeId) -> Result<(), VolumeError> {
        match self.journal.volume(id)? {
            // One that was arriving with a container that never ran here is replaced.
            Some(VolumeEntry { moved_to: None, arriving: None }) => {
                Err(VolumeError::Exists(id.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Makes an empty writable volume.
    ///
    /// 1. remove a directory that no entry names, 2. make it, 3. journal the volume.
    pub fn create(&self, id: &VolumeId) -> Result<PathBuf, VolumeError> {
        match self.writable(id) {
            Err(VolumeError::Unknown(_)) => {}
            Ok(_) => return Err(VolumeError::Exists(id.clone())),
            Err(error) => return Err(error),
        }
        let path = self.data_path(id);
        self.discard(&path)?;
        fs::create_dir_all(&path).map_err(on("make directory", &path))?;
        self.journal.set_volume(id, Some(&VolumeEntry { moved_to: None, arriving: None }))?;
        Ok(path)
    }

    /// Makes the directory `staged` the writable volume `id`; it must lie on the same file system. It counts as
    /// arriving with `container` until [`Volumes::arrived`].
    ///
    /// 1. move what is left of the volume to the trash, 2. rename, 3. journal. Repeating it after a crash is safe
    ///    as long as `staged` is still there; before 3. the volume counts as not here.
    pub fn install(
        &self,
        id: &VolumeId,
        staged: &Path,
        container: &ContainerRef,
    ) -> Result<(), VolumeError> {
        self.may_receive(id)?;
        let path = self.data_path(id);
        self.discard(&path)?;
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(on("make directory", parent))?;
        }
        fs::rename(staged, &path).map_err(on("move into place", &path))?;
        let arriving = Some(container.to_string());
        Ok(self.journal.set_volume(id, Some(&VolumeEntry { moved_to: None, arriving }))?)
    }

    /// The container that volumes came with has run here: they are this node's.
    pub fn arrived(&self, container: &ContainerRef) -> Result<(), VolumeError> {
        for id in self.arriving_with(container)? {
            self.journal.set_volume(&id, Some(&VolumeEntry { moved_to: None, arriving: None }))?;
        }
        Ok(())
    }

    /// Volumes that were arriving with a container.
    pub fn arriving_with(&self, container: &ContainerRef) -> Result<Vec<VolumeId>, VolumeError> {
        let name = container.to_string();
        let entries = self.journal.volumes()?.into_iter();
        let arriving = entries.filter(|(_, entry)| entry.arriving.as_ref() == Some(&name));
        Ok(arriving.map(|(id, _)| id).collect())
    }

    /// Every container that volumes are arriving with.
    pub fn arriving(&self) -> Result<Vec<ContainerRef>, VolumeError> {
        let entries = self.journal.volumes()?.into_iter();
        let names = entries.filter_map(|(_, entry)| entry.arriving);
        let parts = |name: String| {
            let (namespace, id) = name.split_once('/')?;
            ContainerRef::new(namespace, id).ok()
        };
        Ok(names.filter_map(parts).collect())
    }

    /// Undoes [`Volumes::install`] for a container that will never run here.
    pub fn uninstall(&self, id: &VolumeId) -> Result<(), VolumeError> {
        self.journal.set_volume(id, None)?;
        self.discard(&self.data_path(id))
    }

    /// Notes that a volume moved to `node` and removes its data, which the store still has as a snapshot.
    ///
    /// 1. journal, 2. move to the trash. Repeating it is safe.
    pub fn give_away(&self, id: &VolumeId, node: &str) -> Result<(), VolumeError> {
        let entry = VolumeEntry { moved_to: Some(node.to_owned()), arriving: None };
        self.journal.set_volume(id, Some(&entry))?;
        self.discard(&self.data_path(id))
    }

    /// Removes a volume and what is known of it.
    pub fn remove(&self, source: &VolumeSource) -> Result<(), VolumeError> {
        match source {
            VolumeSource::Writable(id) => {
                if self.journal.volume(id)?.is_none() {
                    return Err(VolumeError::Unknown(id.clone()));
                }
                self.journal.set_volume(id, None)?;
                self.discard(&self.data_path(id))
            }
            VolumeSource::Content(digest) => {
                let path = self.content_path(digest);
                if !path.is_dir() {
                    return Err(VolumeError::NoContent(*digest));
                }
                self.discard(&path)
            }
        }
    }

    /// Reads a directory into the store and lays it out as read-only content.
    pub fn import(&self, directory: &Path) -> Result<Digest, VolumeError> {
        let lease = self.store.lease("volume import", IMPORT_LEASE);
        let tree = self.capture(directory, &lease)?;
        self.store.sync()?;
        self.lay_out(&tree)?;
        Ok(tree)
    }

    /// Writes a copy of a volume into the directory, which must be new or empty: of a writable one as it is now.
    ///
    /// Errors: the copy may then be incomplete; the volume is as it was.
    pub fn export(&self, source: &VolumeSource, directory: &Path) -> Result<(), VolumeError> {
        fs::create_dir_all(directory).map_err(on("make directory", directory))?;
        let mut entries = fs::read_dir(directory).map_err(on("list", directory))?;
        if entries.next().is_some() {
            return Err(VolumeError::NotEmpty(directory.to_owned()));
        }
        let lease = self.store.lease("volume export", IMPORT_LEASE);
        let tree = self.capture(&self.path(source, true)?, &lease)?;
        Ok(materialize(&self.store, &tree, None, directory)?)
    }

    /// Reads what is laid out of `digest` and compares. Errors: [`VolumeError::Damaged`].
    pub fn verify(&self, digest: &Digest) -> Result<(), VolumeError> {
        let lease = self.store.lease("volume verify", IMPORT_LEASE);
        let found = self.capture(&self.path(&VolumeSource::Content(*digest), true)?, &lease)?;
        if found == *digest { Ok(()) } else { Err(VolumeError::Damaged { digest: *digest, found }) }
    }

    fn capture(&self, directory: &Path, lease: &Lease) -> Result<Digest, VolumeError> {
        let mut writer = self.store.writer(lease);
        let none = HashSet::new();
        let captured = capture(directory, &mut writer, &mut Unchanged::default(), &none)?;
        writer.flush()?;
        Ok(captured.tree)
    }

    /// Lays out a tree that the store holds as read-only content, unless it is there already.
    ///
    /// 1. write `HEX-N.tmp`, 2. make it and the objects durable, 3. rename it to `HEX`. Two at once do not meet: the one
    ///    that comes second drops its own.
    pub fn lay_out(&self, tree: &Digest) -> Result<PathBuf, VolumeError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.content_path(tree);
        if path.is_dir() {
            return Ok(path);
        }
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let partial = path.with_file_name(format!("{}-{number}.tmp", tree.hex()));
        fs::create_dir(&partial).map_err(on("make directory", &partial))?;
        let laid_out = materialize(&self.store, tree, None, &partial).and_then(|()| {
            self.store.sync()?;
            let directory = fs::File::open(&partial).map_err(on("open", &partial))?;
            nix::unistd::syncfs(directory).map_err(on("sync", &partial))
        });
        match laid_out.map(|()| fs::rename(&partial, &path)) {
            Ok(Ok(())) => Ok(path),
            Ok(Err(_)) if path.is_dir() => {
                self.discard(&partial)?;
                Ok(path)
            }
            Ok(Err(error)) => Err(on("move into place", &path)(error).into()),
            Err(error) => {
                self.discard(&partial)?;
                Err(error.into())
            }
        }
    }

    /// The digests of the read-only content that is laid out here.
    pub fn contents(&self) -> Result<Vec<Digest>, VolumeError> {
        let names = self.names("content")?;
        Ok(names.iter().filter_map(|name| format!("sha256:{name}").parse().ok()).collect())
    }

    /// Whether this content is laid out here, and so is whole in the store.
    pub fn has_content(&self, digest: &Digest) -> bool {
        self.content_path(digest).is_dir()
    }

    /// Every volume that is here.
    pub fn list(&self) -> Result<Vec<Listed>, VolumeError> {
        let writable = self.journal.volumes()?.into_iter();
        let mut listed: Vec<Listed> = writable
            .filter(|(_, entry)| entry.moved_to.is_none())
            .map(|(id, _)| Listed {
                name: id.to_string(),
                path: self.data_path(&id),
                read_only: false,
            })
            .collect();
        listed.extend(self.contents()?.into_iter().map(|digest| Listed {
            name: digest.to_string(),
            path: self.content_path(&digest),
            read_only: true,
        }));
        Ok(listed)
    }

    fn data_path(&self, id: &VolumeId) -> PathBuf {
        self.state_dir.join("volumes").join(id.as_str()).join("data")
    }

    fn content_path(&self, digest: &Digest) -> PathBuf {
        self.state_dir.join("content").join(digest.hex())
    }

    fn names(&self, directory: &str) -> Result<Vec<String>, VolumeError> {
        let path = self.state_dir.join(directory);
        let entries: io::Result<Vec<_>> = fs::read_dir(&path).and_then(Iterator::collect);
        let names = entries.map_err(on("list", &path))?.into_iter();
        Ok(names.filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    /// Removes a directory in two steps, so that it is never half there under its name.
    fn discard(&self, path: &Path) -> Result<(), VolumeError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let trash = self.state_dir.join("trash").join(format!("{}-{number}", std::process::id()));
        match fs::rename(path, &trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(on("remove", path)(error).into()),
            Ok(()) => {
                fs::remove_dir_all(&trash).map_err(on("remove", &trash))?;
                Ok(())
            }
        }
    }

    fn empty_trash(&self) -> Result<(), VolumeError> {
        for name in self.names("trash")? {
            let path = self.state_dir.join("trash").join(name);
            fs::remove_dir_all(&path).map_err(on("remove", &path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Volumes {
        let journal = Journal::open(&dir.join("node.redb"), &dir.join("fences")).unwrap();
        let store = Store::open(&dir.join("store"), crate::store::Options::default()).unwrap();
        Volumes::open(dir, journal, store).unwrap()
    }

    fn named(id: &str) -> VolumeSource {
        id.parse().unwrap()
    }

    #[test]
    fn a_volume_that_moved_is_neither_here_nor_overwritten_by_create() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let id: VolumeId = "data".parse().unwrap();
        let path = volumes.create(&id).unwrap();
        fs::write(path.join("f"), b"x").unwrap();
        assert!(matches!(volumes.create(&id), Err(VolumeError::Exists(_))));
        volumes.give_away(&id, "edge-b").unwrap();
        assert!(!path.exists());
        let error = volumes.path(&named("data"), false).unwrap_err();
        assert!(error.to_string().contains("edge-b"), "{error}");
        assert!(matches!(volumes.create(&id), Err(VolumeError::Moved { .. })));
        let staged = dir.path().join("staged");
        fs::create_dir(&staged).unwrap();
        let container = ContainerRef::new("default", "cache").unwrap();
        volumes.install(&id, &staged, &container).unwrap();
        volumes.may_receive(&id).expect("what never ran here is replaced");
        volumes.arrived(&container).unwrap();
        assert_eq!(volumes.path(&named("data"), false).unwrap(), path);
        assert!(matches!(volumes.may_receive(&id), Err(VolumeError::Exists(_))));
    }

    #[test]
    fn the_same_content_has_the_same_name_and_is_only_read() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let from = tempfile::tempdir().unwrap();
        fs::write(from.path().join("f"), b"content").unwrap();
        let digest = volumes.import(from.path()).unwrap();
        assert_eq!(volumes.import(from.path()).unwrap(), digest);
        let source = VolumeSource::Content(digest);
        let path = volumes.path(&source, true).unwrap();
        assert_eq!(fs::read(path.join("f")).unwrap(), b"content");
        assert!(matches!(volumes.path(&source, false), Err(VolumeError::ReadOnly(_))));
        volumes.verify(&digest).unwrap();
        let copy = dir.path().join("copy");
        volumes.export(&source, &copy).unwrap();
        assert_eq!(fs::read(copy.join("f")).unwrap(), b"content");
        assert!(matches!(volumes.export(&source, &copy), Err(VolumeError::NotEmpty(_))));
        fs::write(path.join("f"), b"changed").unwrap();
        assert!(matches!(volumes.verify(&digest), Err(VolumeError::Damaged { .. })));
        volumes.remove(&source).unwrap();
        assert!(matches!(volumes.path(&source, true), Err(VolumeError::NoContent(_))));
    }

    #[test]
    fn an_unknown_volume_is_named_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = open(dir.path()).path(&named("nosuch"), false).unwrap_err();
        assert_eq!(
            error.to_string(),
            "volume nosuch is not on this node; create it with `godwit volume create nosuch`"
        );
    }
}
