//! Volumes: writable ones by identity, read-only ones by the digest of their content.
//!
//! ```text
//! STATE/volumes/ID/data        a writable volume: a directory, or the image of a block volume; the journal says which,
//!                              and whether it is here or has moved
//! STATE/content/HEX            the tree sha256:HEX laid out, for read-only mounts; never written to again
//! STATE/content/HEX.kept       empty: the tree was imported, and is whole in the store
//! STATE/trash/N                what is being removed
//! ```
//!
//! A directory appears at its final path by a rename, complete, or not at all; it disappears by a rename into
//! `trash`. On open: what lies in `trash` is removed, and a laid-out tree without its final name is too. Who mounts the
//! image of a block volume is the shim (docs/adr/0010): here it is a file.

mod archive;
mod format;

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use godwit_protos::{ContainerRef, Digest, FileSystem, VolumeId, VolumeSource};

use crate::content::capture::{Unchanged, capture};
use crate::content::image::{capture_image, write_image};
use crate::content::materialize::materialize;
use crate::content::{ContentError, Sink, on};
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
    #[error("volume {0} is not on this node; import it with `godwit volume import DIR|TAR`")]
    NoContent(Digest),
    /// ... nor at any neighbour that answers.
    #[error(
        "volume {0} is neither on this node nor at a neighbour; import it with `godwit volume import DIR|TAR`"
    )]
    Nowhere(Digest),
    /// A writable volume mounted by digest, or read-only content mounted for writing.
    #[error("volume {0} is named by its content and can only be mounted read-only")]
    ReadOnly(Digest),
    /// A size that no block volume has.
    #[error(
        "a block volume cannot have {0} bytes: they are a multiple of 4096, at least 16 MiB and at \
         most 1 TiB"
    )]
    Size(u64),
    /// What makes a file system is not installed.
    #[error("{program} is not on this node; install the package {package}")]
    NoProgram {
        /// The program.
        program: &'static str,
        /// Debian's package of it.
        package: &'static str,
    },
    /// No file system was made, the one that is there is damaged, or an archive cannot be read.
    #[error("{program} failed: {words}")]
    Program {
        /// The program.
        program: &'static str,
        /// What it said.
        words: String,
    },
    /// A block volume from elsewhere that the configuration does not allow.
    #[error(
        "volume {id} comes as an image of {file_system}, which this node does not mount from others; \
         allow it by `admit.file_systems = [\"{file_system}\"]`"
    )]
    NotAdmitted {
        /// The volume.
        id: VolumeId,
        /// What its image holds.
        file_system: FileSystem,
    },
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
    /// There is nothing that it could be compared with.
    #[error("volume {0} is a writable tree: any content is as good as any other")]
    NotVerifiable(VolumeId),
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
    /// Where it lies; empty for content that was not mounted yet.
    pub path: PathBuf,
    /// Whether it is read-only content.
    pub read_only: bool,
    /// What the image of a block volume holds, and its size in bytes.
    pub image: Option<(FileSystem, u64)>,
}

/// What is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A directory.
    Tree,
    /// A file with a file system in it, of so many bytes.
    Block(FileSystem, u64),
}

/// Takes objects and keeps none.
struct Forgetful;

impl Sink for Forgetful {
    fn put_hashed(&mut self, _digest: Digest, _bytes: &[u8]) -> Result<(), ContentError> {
        Ok(())
    }
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
                if self.has_content(digest) {
                    self.lay_out(digest)
                } else {
                    Err(VolumeError::NoContent(*digest))
                }
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

    /// What the image of a writable volume holds; `None` for a tree.
    pub fn file_system(&self, source: &VolumeSource) -> Result<Option<FileSystem>, VolumeError> {
        match source {
            VolumeSource::Writable(id) => {
                Ok(self.journal.volume(id)?.and_then(|entry| entry.file_system))
            }
            VolumeSource::Content(_) => Ok(None),
        }
    }

    /// Whether a migration may bring a volume of this name here. Errors: [`VolumeError::Exists`].
    pub fn may_receive(&self, id: &VolumeId) -> Result<(), VolumeError> {
        match self.journal.volume(id)? {
            // One that was arriving with a container that never ran here is replaced.
            Some(VolumeEntry { moved_to: None, arriving: None, .. }) => {
                Err(VolumeError::Exists(id.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Makes an empty writable volume.
    ///
    /// 1. remove what no entry names, 2. make directory or image, 3. journal the volume.
    ///
    /// Errors: [`VolumeError`]; there is no such volume then.
    pub fn create(&self, id: &VolumeId, shape: Shape) -> Result<PathBuf, VolumeError> {
        match self.writable(id) {
            Err(VolumeError::Unknown(_)) => {}
            Ok(_) => return Err(VolumeError::Exists(id.clone())),
            Err(error) => return Err(error),
        }
        let path = self.data_path(id);
        self.discard(&path)?;
        let parent = path.parent().unwrap_or(&path);
        fs::create_dir_all(parent).map_err(on("make directory", parent))?;
        let file_system = match shape {
            Shape::Tree => {
                fs::create_dir(&path).map_err(on("make directory", &path))?;
                None
            }
            Shape::Block(file_system, bytes) => {
                format::make(&path, file_system, bytes).inspect_err(|_| {
                    let _ = fs::remove_file(&path);
                })?;
                Some(file_system)
            }
        };
        let entry = VolumeEntry { file_system, ..VolumeEntry::default() };
        self.journal.set_volume(id, Some(&entry))?;
        Ok(path)
    }

    /// Makes the directory, or the image of a `file_system`, at `staged` the writable volume `id`; it must lie on the same
    /// file system. It counts as arriving with `container` until [`Volumes::arrived`].
    ///
    /// 1. move what is left of the volume to the trash, 2. rename, 3. journal. Repeating it after a crash is safe
    ///    as long as `staged` is still there; before 3. the volume counts as not here.
    pub fn install(
        &self,
        id: &VolumeId,
        (staged, file_system): (&Path, Option<FileSystem>),
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
        let entry = VolumeEntry { moved_to: None, arriving, file_system };
        Ok(self.journal.set_volume(id, Some(&entry))?)
    }

    /// The container that volumes came with has run here: they are this node's.
    pub fn arrived(&self, container: &ContainerRef) -> Result<(), VolumeError> {
        for id in self.arriving_with(container)? {
            let entry = self.journal.volume(&id)?.unwrap_or_default();
            self.journal.set_volume(&id, Some(&VolumeEntry { arriving: None, ..entry }))?;
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
        let entry = VolumeEntry { moved_to: Some(node.to_owned()), ..VolumeEntry::default() };
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
                if !self.has_content(digest) {
                    return Err(VolumeError::NoContent(*digest));
                }
                self.discard(&self.kept_path(digest))?;
                self.discard(&self.content_path(digest))
            }
        }
    }

    /// Reads a directory, or what a tar archive unpacks to, into the store as read-only content, which is laid out when it
    /// is first mounted.
    ///
    /// 1. write its objects, 2. make them durable, 3. make `HEX.kept`, 4. fsync the directory. On open: without step 3 the
    ///    objects are swept.
    pub fn import(&self, from: &Path) -> Result<Digest, VolumeError> {
        let lease = self.store.lease("volume import", IMPORT_LEASE);
        let tree = if fs::metadata(from).map_err(on("import", from))?.is_file() {
            let unpacked = self.temporary("import")?;
            let tree =
                archive::unpack(from, &unpacked).and_then(|()| self.capture(&unpacked, &lease));
            self.discard(&unpacked)?;
            tree?
        } else {
            self.capture(from, &lease)?
        };
        self.store.sync()?;
        let kept = self.kept_path(&tree);
        fs::File::create(&kept).map_err(on("make", &kept))?;
        let directory = self.state_dir.join("content");
        let synced = fs::File::open(&directory).and_then(|directory| directory.sync_all());
        synced.map_err(on("sync", &directory))?;
        Ok(tree)
    }

    /// Writes a copy of a volume into the directory, which must be new or empty: of a writable one as it is now. Of a
    /// block volume it is the file `ID.img`; nothing may have it mounted.
    ///
    /// Errors: the copy may then be incomplete; the volume is as it was.
    pub fn export(&self, source: &VolumeSource, directory: &Path) -> Result<(), VolumeError> {
        fs::create_dir_all(directory).map_err(on("make directory", directory))?;
        let mut entries = fs::read_dir(directory).map_err(on("list", directory))?;
        if entries.next().is_some() {
            return Err(VolumeError::NotEmpty(directory.to_owned()));
        }
        let lease = self.store.lease("volume export", IMPORT_LEASE);
        let path = match source {
            VolumeSource::Content(digest) if self.has_content(digest) => {
                return Ok(materialize(&self.store, digest, None, directory)?);
            }
            source => self.path(source, true)?,
        };
        let Some(file_system) = self.file_system(source)? else {
            let tree = self.capture(&path, &lease)?;
            return Ok(materialize(&self.store, &tree, None, directory)?);
        };
        let mut writer = self.store.writer(&lease);
        let image = capture_image(&path, file_system, &mut writer)?.tree;
        writer.flush()?;
        Ok(write_image(&self.store, &image, None, &directory.join(format!("{source}.img")))?)
    }

    /// As [`Self::verify`], but leaves the store as it is.
    pub fn compare(&self, digest: &Digest) -> Result<(), VolumeError> {
        let path = self.path(&VolumeSource::Content(*digest), true)?;
        let none = HashSet::new();
        let found = capture(&path, &mut Forgetful, &mut Unchanged::default(), &none)?.tree;
        if found == *digest { Ok(()) } else { Err(VolumeError::Damaged { digest: *digest, found }) }
    }

    /// Reads read-only content as it is laid out and compares; has the file system of a block volume checked, which
    /// nothing may have mounted.
    ///
    /// Errors: [`VolumeError::Damaged`], [`VolumeError::Program`]; nothing is repaired.
    pub fn verify(&self, source: &VolumeSource) -> Result<(), VolumeError> {
        let path = self.path(source, true)?;
        let digest = match (source, self.file_system(source)?) {
            (VolumeSource::Content(digest), _) => digest,
            (VolumeSource::Writable(_), Some(file_system)) => {
                return format::check(&path, file_system);
            }
            (VolumeSource::Writable(id), None) => {
                return Err(VolumeError::NotVerifiable(id.clone()));
            }
        };
        let lease = self.store.lease("volume verify", IMPORT_LEASE);
        let found = self.capture(&path, &lease)?;
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
        let path = self.content_path(tree);
        if path.is_dir() {
            return Ok(path);
        }
        let partial = self.temporary(&tree.hex())?;
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

    /// A new directory beside read-only content, which the next opening removes.
    fn temporary(&self, name: &str) -> Result<PathBuf, VolumeError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = self.state_dir.join("content").join(format!("{name}-{number}.tmp"));
        fs::create_dir(&path).map_err(on("make directory", &path))?;
        Ok(path)
    }

    /// The digests of the read-only content that is here.
    pub fn contents(&self) -> Result<BTreeSet<Digest>, VolumeError> {
        let names = self.names("content")?;
        let hex = names.iter().map(|name| name.strip_suffix(".kept").unwrap_or(name));
        Ok(hex.filter_map(|hex| format!("sha256:{hex}").parse().ok()).collect())
    }

    /// The digests of the read-only content that was mounted here.
    pub fn laid_out(&self) -> Result<Vec<Digest>, VolumeError> {
        let contents = self.contents()?.into_iter();
        Ok(contents.filter(|digest| self.content_path(digest).is_dir()).collect())
    }

    /// Whether this content is here: whole in the store, and perhaps laid out.
    pub fn has_content(&self, digest: &Digest) -> bool {
        self.content_path(digest).is_dir() || self.kept_path(digest).exists()
    }

    /// Every volume that is here.
    pub fn list(&self) -> Result<Vec<Listed>, VolumeError> {
        let writable = self.journal.volumes()?.into_iter();
        let mut listed: Vec<Listed> = writable
            .filter(|(_, entry)| entry.moved_to.is_none())
            .map(|(id, entry)| {
                let path = self.data_path(&id);
                let size = || fs::metadata(&path).map_or(0, |image| image.len());
                let image = entry.file_system.map(|file_system| (file_system, size()));
                Listed { name: id.to_string(), path, read_only: false, image }
            })
            .collect();
        listed.extend(self.contents()?.into_iter().map(|digest| Listed {
            name: digest.to_string(),
            path: Some(self.content_path(&digest)).filter(|path| path.is_dir()).unwrap_or_default(),
            read_only: true,
            image: None,
        }));
        Ok(listed)
    }

    fn data_path(&self, id: &VolumeId) -> PathBuf {
        self.state_dir.join("volumes").join(id.as_str()).join("data")
    }

    fn content_path(&self, digest: &Digest) -> PathBuf {
        self.state_dir.join("content").join(digest.hex())
    }

    fn kept_path(&self, digest: &Digest) -> PathBuf {
        self.content_path(digest).with_extension("kept")
    }

    fn names(&self, directory: &str) -> Result<Vec<String>, VolumeError> {
        let path = self.state_dir.join(directory);
        let entries: io::Result<Vec<_>> = fs::read_dir(&path).and_then(Iterator::collect);
        let names = entries.map_err(on("list", &path))?.into_iter();
        Ok(names.filter_map(|entry| entry.file_name().into_string().ok()).collect())
    }

    /// Removes a directory or image in two steps, so that it is never half there under its name.
    fn discard(&self, path: &Path) -> Result<(), VolumeError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let trash = self.state_dir.join("trash").join(format!("{}-{number}", std::process::id()));
        match fs::rename(path, &trash) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(on("remove", path)(error).into()),
            Ok(()) => Ok(remove(&trash)?),
        }
    }

    fn empty_trash(&self) -> Result<(), VolumeError> {
        for name in self.names("trash")? {
            remove(&self.state_dir.join("trash").join(name))?;
        }
        Ok(())
    }
}

/// Removes a directory or file that nobody knows any more.
fn remove(path: &Path) -> Result<(), ContentError> {
    let kind = fs::symlink_metadata(path).map_err(on("stat", path))?;
    let removed = if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(on("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

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
        let path = volumes.create(&id, Shape::Tree).unwrap();
        fs::write(path.join("f"), b"x").unwrap();
        assert!(matches!(volumes.create(&id, Shape::Tree), Err(VolumeError::Exists(_))));
        volumes.give_away(&id, "edge-b").unwrap();
        assert!(!path.exists());
        let error = volumes.path(&named("data"), false).unwrap_err();
        assert!(error.to_string().contains("edge-b"), "{error}");
        assert!(matches!(volumes.create(&id, Shape::Tree), Err(VolumeError::Moved { .. })));
        let staged = dir.path().join("staged");
        fs::create_dir(&staged).unwrap();
        let container = ContainerRef::new("default", "cache").unwrap();
        volumes.install(&id, (&staged, None), &container).unwrap();
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
        drop(volumes);
        let volumes = open(dir.path());
        assert_eq!(volumes.contents().unwrap(), [digest].into());
        assert_eq!(volumes.list().unwrap()[0].path, Path::new(""), "it was not mounted yet");
        let path = volumes.path(&source, true).unwrap();
        assert_eq!(fs::read(path.join("f")).unwrap(), b"content");
        assert!(matches!(volumes.path(&source, false), Err(VolumeError::ReadOnly(_))));
        volumes.verify(&source).unwrap();
        let copy = dir.path().join("copy");
        volumes.export(&source, &copy).unwrap();
        assert_eq!(fs::read(copy.join("f")).unwrap(), b"content");
        assert!(matches!(volumes.export(&source, &copy), Err(VolumeError::NotEmpty(_))));
        fs::write(path.join("f"), b"changed").unwrap();
        assert!(matches!(volumes.verify(&source), Err(VolumeError::Damaged { .. })));
        volumes.remove(&source).unwrap();
        assert!(matches!(volumes.path(&source, true), Err(VolumeError::NoContent(_))));
        assert!(!path.exists() && volumes.contents().unwrap().is_empty());
    }

    #[test]
    fn a_tar_archive_is_the_tree_that_it_unpacks_to() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("below")).unwrap();
        fs::write(tree.join("below/file"), b"content").unwrap();
        fs::hard_link(tree.join("below/file"), tree.join("twice")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", tree.join("link")).unwrap();
        let digest = volumes.import(&tree).unwrap();
        let tar = dir.path().join("tree.tar.gz");
        let packed = std::process::Command::new("tar")
            .args(["--create", "--gzip", "--format=posix", "--directory"])
            .args([&tree, Path::new("--file"), &tar, Path::new(".")])
            .status();
        assert!(packed.unwrap().success());
        assert_eq!(volumes.import(&tar).unwrap(), digest);
        fs::write(&tar, b"not an archive").unwrap();
        let error = volumes.import(&tar).unwrap_err();
        assert!(matches!(error, VolumeError::Program { program: "tar", .. }), "{error}");
        assert!(volumes.import(&dir.path().join("nowhere")).is_err());
        assert_eq!(fs::read_dir(dir.path().join("content")).unwrap().count(), 1, "nothing is left");
    }

    #[test]
    fn a_block_volume_is_made_checked_copied_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let (id, source): (VolumeId, _) = ("data".parse().unwrap(), named("data"));
        let shape = Shape::Block(FileSystem::Ext4, 64 << 20);
        let path = volumes.create(&id, shape).unwrap();
        assert!(matches!(volumes.create(&id, Shape::Tree), Err(VolumeError::Exists(_))));
        assert_eq!(volumes.path(&source, false).unwrap(), path);
        assert_eq!(volumes.file_system(&source).unwrap(), Some(FileSystem::Ext4));
        let image = fs::metadata(&path).unwrap();
        assert_eq!((image.len(), image.mode() & 0o777), (64 << 20, 0o600));
        assert!(image.blocks() * 512 < 8 << 20, "{} blocks of a new file system", image.blocks());
        assert_eq!(volumes.list().unwrap()[0].image, Some((FileSystem::Ext4, 64 << 20)));
        volumes.verify(&source).unwrap();
        let copy = dir.path().join("copy");
        volumes.export(&source, &copy).unwrap();
        assert!(fs::read(copy.join("data.img")).unwrap() == fs::read(&path).unwrap());
        // The root directory's inode is not where the file system says.
        let file = fs::File::options().write(true).open(&path).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[0xff; 4096], 4096).unwrap();
        let error = volumes.verify(&source).unwrap_err();
        assert!(matches!(error, VolumeError::Program { program: "e2fsck", .. }), "{error}");
        volumes.remove(&source).unwrap();
        assert!(!path.exists());
        assert!(matches!(volumes.path(&source, false), Err(VolumeError::Unknown(_))));
    }

    #[test]
    fn what_is_no_size_makes_no_volume_and_a_tree_cannot_be_verified() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let id: VolumeId = "data".parse().unwrap();
        for bytes in [0, 4096, (64 << 20) + 1, (1 << 40) + 4096, u64::MAX] {
            let error = volumes.create(&id, Shape::Block(FileSystem::Ext4, bytes)).unwrap_err();
            assert!(matches!(error, VolumeError::Size(_)), "{error}");
            assert_eq!(volumes.list().unwrap().len(), 0);
        }
        volumes.create(&id, Shape::Tree).unwrap();
        let error = volumes.verify(&named("data")).unwrap_err();
        assert!(matches!(error, VolumeError::NotVerifiable(_)), "{error}");
    }

    #[test]
    fn an_image_that_came_is_a_block_volume_here() {
        let dir = tempfile::tempdir().unwrap();
        let volumes = open(dir.path());
        let id: VolumeId = "data".parse().unwrap();
        let container = ContainerRef::new("default", "cache").unwrap();
        for name in ["first", "second"] {
            // The second replaces the first, which never came to run here.
            let staged = dir.path().join(name);
            fs::write(&staged, name).unwrap();
            volumes.install(&id, (&staged, Some(FileSystem::Xfs)), &container).unwrap();
        }
        volumes.arrived(&container).unwrap();
        assert_eq!(volumes.file_system(&named("data")).unwrap(), Some(FileSystem::Xfs));
        assert_eq!(fs::read(volumes.path(&named("data"), false).unwrap()).unwrap(), b"second");
        volumes.give_away(&id, "edge-b").unwrap();
        assert_eq!(volumes.list().unwrap().len(), 0);
        assert_eq!(fs::read_dir(dir.path().join("trash")).unwrap().count(), 0);
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
