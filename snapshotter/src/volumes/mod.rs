//! Volumes: writable ones by identity, read-only ones by the digest of their content.
//!
//! The journal says which writable volumes there are, what kind they are, and whether they are here
//! or have moved; where they lie, and how they come to be there and go, is in [`places`]. A
//! read-only volume is here as a tree whose objects the store keeps, and which is laid out under
//! its digest once it was mounted. Who mounts the image of a block volume is the shim
//! (docs/adr/0010): here it is a file.

mod archive;
pub mod fetch;
mod format;
mod places;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_protos::{ContainerRef, Digest, FileSystem, VolumeId, VolumeSource};

use crate::content::capture::{Unchanged, capture};
use crate::content::image::{capture_image, write_image};
use crate::content::materialize::materialize;
use crate::content::object::Tree;
use crate::content::{ContentError, Sink, on};
use crate::ownership::journal::{Arriving, Journal, JournalError, VolumeEntry};
use crate::ownership::leases::{LeaseError, Leased};
use crate::store::{Store, StoreError, Writer};
use godwit_disk::inode;
use godwit_disk::leftovers::Leftovers;
use places::Places;
pub use places::Removed;

/// How long an import may take before the sweep no longer waits for it.
const IMPORT_LEASE: Duration = Duration::from_secs(3600);

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// It was never created.
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
    /// A migration has it.
    #[error(transparent)]
    Leased(#[from] LeaseError),
    /// Not made by the session that wants to remove it.
    #[error("volume {id} does not carry the mark of session {session}: it stays")]
    NotMarked {
        /// The volume.
        id: VolumeId,
        /// The session.
        session: String,
    },
    /// Another call makes or removes it now.
    #[error("volume {0} is being made or removed; try again")]
    Busy(VolumeId),
    /// Something lies in its place that belongs to no volume.
    #[error("{} belongs to no volume that the journal has here: move it away, or restore the journal", .0.display())]
    Unjournalled(PathBuf),
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
    /// Files have what the file system here does not keep.
    #[error(
        "files of {what} have {lost}, which the file system of {} does not keep: take that from them with chattr(1), or choose \
         a node whose file system does", directory.display()
    )]
    NotKept {
        /// A volume or writable layer.
        what: String,
        /// Names of flags, or project IDs.
        lost: String,
        /// Where they would lie.
        directory: PathBuf,
    },
    /// An export would mix with what is there.
    #[error("{} is not an empty or new directory", .0.display())]
    NotEmpty(PathBuf),
    /// What is laid out is not what its name says.
    #[error(
        "volume {digest} is damaged: what is laid out is {found}; once no container has it mounted, \
         `godwit check --repair` lays it out again"
    )]
    Damaged {
        /// Its name.
        digest: Digest,
        /// What it is now.
        found: Digest,
    },
    /// What is laid out cannot be replaced now.
    #[error("volume {0} is mounted: stop the containers that use it")]
    Mounted(Digest),
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
    places: Places,
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

/// Reads all that is in a directory, and says what it is.
fn read(path: &Path) -> Result<Digest, VolumeError> {
    Ok(capture(path, &mut Forgetful, &mut Unchanged::default())?.tree)
}

/// Takes objects and keeps none.
struct Forgetful;

impl Sink for Forgetful {
    fn put_hashed(&mut self, _digest: Digest, _bytes: &[u8]) -> Result<(), ContentError> {
        Ok(())
    }
}

impl Volumes {
    /// Opens the volumes below `state_dir`. What a daemon that died left half done is finished or
    /// undone ([`places`]).
    ///
    /// Errors: [`VolumeError`] for what cannot be read or moved.
    pub fn open(state_dir: &Path, journal: Journal, store: Store) -> Result<Self, VolumeError> {
        let places = Places::open(state_dir, journal.clone())?;
        Ok(Self { places, journal, store })
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

    /// Where a volume lies that `container` is about to mount. Errors: as [`Self::path`]; a
    /// migration has the volume, and the container is not the one that moves.
    pub fn path_for(
        &self,
        container: &ContainerRef,
        source: &VolumeSource,
        read_only: bool,
    ) -> Result<PathBuf, VolumeError> {
        if let VolumeSource::Writable(id) = source {
            self.journal.check_lease(&Leased::Volume(id.clone()), Some(container))?;
        }
        self.path(source, read_only)
    }

    fn writable(&self, id: &VolumeId) -> Result<PathBuf, VolumeError> {
        match self.journal.volume(id)? {
            None => Err(VolumeError::Unknown(id.clone())),
            Some(VolumeEntry { moved_to: Some(to), .. }) => {
                Err(VolumeError::Moved { id: id.clone(), to })
            }
            Some(VolumeEntry { moved_to: None, .. }) => Ok(self.places.data(id)),
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

    /// Whether a migration may bring a volume of this name here.
    ///
    /// Errors: [`VolumeError::Exists`], [`VolumeError::Unjournalled`], [`VolumeError::Busy`]; why
    /// what is left of an earlier volume of this name cannot be moved away.
    pub fn may_receive(&self, id: &VolumeId) -> Result<(), VolumeError> {
        match self.journal.volume(id)? {
            // One that was arriving with a container that never ran here is replaced.
            Some(VolumeEntry { moved_to: None, arriving: Some(arriving), .. })
                if self.places.is_marked(id, &arriving.session)? =>
            {
                Ok(())
            }
            Some(VolumeEntry { moved_to: None, .. }) => Err(VolumeError::Exists(id.clone())),
            Some(VolumeEntry { moved_to: Some(_), .. }) | None => self.places.check_free(id),
        }
    }

    /// Checks that the file system here keeps the flags and project IDs of a tree, which is `what`.
    ///
    /// Errors: [`VolumeError::NotKept`], the disk's.
    pub fn check_kept(&self, what: &str, tree: &Tree) -> Result<(), VolumeError> {
        if tree.flags == 0 && !tree.has_projects {
            return Ok(());
        }
        let probe = self.places.temporary("flags")?;
        let lost = inode::not_kept(&probe, tree.flags, tree.has_projects);
        self.places.leftovers().remove(&probe);
        let lost = lost.map_err(on("probe", &probe))?.join(", ");
        if lost.is_empty() {
            return Ok(());
        }
        let directory = probe.parent().unwrap_or(&probe).to_owned();
        Err(VolumeError::NotKept { what: what.to_owned(), lost, directory })
    }

    /// Makes an empty writable volume. Errors: [`VolumeError`]; there is no such volume then.
    pub fn create(&self, id: &VolumeId, shape: Shape) -> Result<PathBuf, VolumeError> {
        self.journal.check_lease(&Leased::Volume(id.clone()), None)?;
        match self.writable(id) {
            Err(VolumeError::Unknown(_)) => {}
            Ok(_) => return Err(VolumeError::Exists(id.clone())),
            Err(error) => return Err(error),
        }
        let file_system = match shape {
            Shape::Tree => None,
            Shape::Block(file_system, _) => Some(file_system),
        };
        let entry = VolumeEntry { file_system, ..VolumeEntry::default() };
        self.places.put(id, &entry, |path| match shape {
            Shape::Tree => Ok(fs::create_dir(path).map_err(on("make directory", path))?),
            Shape::Block(file_system, bytes) => format::make(path, file_system, bytes),
        })
    }

    /// Makes the directory, or the image of a `file_system`, at `staged` the writable volume `id`;
    /// it must lie on the same file system. Until [`Volumes::arrived`] it counts as arriving and
    /// carries the session's mark. It replaces one that another session had made and given up.
    ///
    /// Errors: [`VolumeError`]. Repeating it is safe as long as `staged` is still there.
    pub fn install(
        &self,
        id: &VolumeId,
        (staged, file_system): (&Path, Option<FileSystem>),
        arriving: &Arriving,
    ) -> Result<(), VolumeError> {
        self.may_receive(id)?;
        let before = self.journal.volume(id)?.filter(|entry| entry.moved_to.is_none());
        if let Some(before) = before.and_then(|entry| entry.arriving) {
            self.uninstall(id, &before.session)?;
        }
        let entry = VolumeEntry { moved_to: None, arriving: Some(arriving.clone()), file_system };
        let moved =
            |path: &Path| Ok(fs::rename(staged, path).map_err(on("move into place", path))?);
        self.places.put(id, &entry, moved).map(drop)
    }

    /// The container that volumes came with has run here: they are this node's, and no session's
    /// any more.
    pub fn arrived(&self, container: &ContainerRef) -> Result<(), VolumeError> {
        let name = container.to_string();
        for (id, entry) in self.journal.volumes()? {
            if entry.arriving.as_ref().is_some_and(|arriving| arriving.container == name) {
                // The mark first: without it nothing removes the volume, whatever the journal says.
                self.places.unmark(&id)?;
                self.journal.set_volume(&id, Some(&VolumeEntry { arriving: None, ..entry }))?;
            }
        }
        Ok(())
    }

    /// Volumes that a session has installed for a container that has not run here.
    pub fn arriving_by(&self, session: &str) -> Result<Vec<VolumeId>, VolumeError> {
        let entries = self.journal.volumes()?.into_iter();
        let is_its =
            |entry: &VolumeEntry| entry.arriving.as_ref().is_some_and(|by| by.session == session);
        Ok(entries.filter(|(_, entry)| is_its(entry)).map(|(id, _)| id).collect())
    }

    /// Undoes [`Volumes::install`] of `session` for a container that will never run here.
    ///
    /// Errors: [`VolumeError::NotMarked`] when the volume is not the session's; it stays then.
    pub fn uninstall(&self, id: &VolumeId, session: &str) -> Result<(), VolumeError> {
        let entry = self.journal.volume(id)?.and_then(|entry| entry.arriving);
        let is_journalled = entry.is_some_and(|arriving| arriving.session == session);
        if !is_journalled || !self.places.is_marked(id, session)? {
            return Err(VolumeError::NotMarked { id: id.clone(), session: session.to_owned() });
        }
        self.places.remove(id, None).map(Removed::delete)
    }

    /// Notes that a volume moved to `node`. From then on it may come back; the caller deletes its
    /// data, which the store still has as a snapshot. Repeating it is safe.
    pub fn give_away(&self, id: &VolumeId, node: &str) -> Result<Removed, VolumeError> {
        let entry = VolumeEntry { moved_to: Some(node.to_owned()), ..VolumeEntry::default() };
        self.places.remove(id, Some(&entry))
    }

    /// Removes a volume and what is known of it.
    pub fn remove(&self, source: &VolumeSource) -> Result<(), VolumeError> {
        if let VolumeSource::Writable(id) = source {
            self.journal.check_lease(&Leased::Volume(id.clone()), None)?;
        }
        match source {
            VolumeSource::Writable(id) if self.journal.volume(id)?.is_none() => {
                Err(VolumeError::Unknown(id.clone()))
            }
            VolumeSource::Writable(id) => self.places.remove(id, None).map(Removed::delete),
            VolumeSource::Content(digest) => self.places.remove_content(digest),
        }
    }

    /// Reads a directory, or what a tar archive unpacks to, into the store as read-only content,
    /// which is laid out when it is first mounted.
    ///
    /// 1. write its objects, 2. make them durable, 3. note that they are to be kept
    ///    ([`Places::keep`]). On open: without step 3 they are swept.
    pub fn import(&self, from: &Path) -> Result<Digest, VolumeError> {
        let lease = self.store.lease("volume import", IMPORT_LEASE);
        let tree = if fs::metadata(from).map_err(on("import", from))?.is_file() {
            let unpacked = self.places.temporary("import")?;
            let tree = archive::unpack(from, &unpacked)
                .and_then(|()| put_tree(&unpacked, self.store.writer(&lease).cold()));
            self.places.leftovers().remove(&unpacked);
            tree?
        } else {
            put_tree(from, self.store.writer(&lease).cold())?
        };
        self.store.sync()?;
        self.places.keep(&tree)?;
        Ok(tree)
    }

    /// Writes a copy of a volume into the directory, which must be new or empty: of a writable one
    /// as it is now. Of a block volume it is the file `ID.img`; nothing may have it mounted.
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
            let tree = put_tree(&path, self.store.writer(&lease))?;
            return Ok(materialize(&self.store, &tree, None, directory)?);
        };
        let mut writer = self.store.writer(&lease);
        let image = capture_image(&path, file_system, &mut writer)?.tree;
        writer.flush()?;
        Ok(write_image(&self.store, &image, None, &directory.join(format!("{source}.img")))?)
    }

    /// As [`Self::verify`], but leaves the store as it is.
    pub fn compare(&self, digest: &Digest) -> Result<(), VolumeError> {
        let found = read(&self.path(&VolumeSource::Content(*digest), true)?)?;
        if found == *digest { Ok(()) } else { Err(VolumeError::Damaged { digest: *digest, found }) }
    }

    /// Reads read-only content as it is laid out and compares; has the file system of a block
    /// volume checked, which nothing may have mounted; and reads all of a writable tree as a
    /// migration would, since nothing says what it should be.
    ///
    /// Errors: [`VolumeError::Damaged`], [`VolumeError::Program`], [`VolumeError::Content`];
    /// nothing is repaired.
    pub fn verify(&self, source: &VolumeSource) -> Result<(), VolumeError> {
        let path = self.path(source, true)?;
        let digest = match (source, self.file_system(source)?) {
            (VolumeSource::Content(digest), _) => digest,
            (VolumeSource::Writable(_), Some(file_system)) => {
                return format::check(&path, file_system);
            }
            (VolumeSource::Writable(_), None) => return read(&path).map(drop),
        };
        let lease = self.store.lease("volume verify", IMPORT_LEASE);
        let found = put_tree(&path, self.store.writer(&lease).cold())?;
        if found == *digest { Ok(()) } else { Err(VolumeError::Damaged { digest: *digest, found }) }
    }

    /// Lays out a tree that the store holds as read-only content, unless it is there already. Its
    /// objects are durable then.
    pub fn lay_out(&self, tree: &Digest) -> Result<PathBuf, VolumeError> {
        // Or it may be removed, and swept, while it is read.
        let _lease = self.store.lease("volume lay-out", IMPORT_LEASE);
        self.places.put_content(tree, |partial| self.write_out(tree, partial))
    }

    /// Lays out once more what [`Self::compare`] found damaged.
    ///
    /// Errors: [`VolumeError::Mounted`]; [`ContentError::Missing`] if the store does not have all
    /// of it. What is laid out is then as it was.
    pub fn lay_out_again(&self, tree: &Digest) -> Result<(), VolumeError> {
        let _lease = self.store.lease("volume lay-out", IMPORT_LEASE);
        self.places.replace_content(tree, |partial| self.write_out(tree, partial))
    }

    fn write_out(&self, tree: &Digest, partial: &Path) -> Result<(), VolumeError> {
        materialize(&self.store, tree, None, partial)?;
        self.store.sync()?;
        let directory = fs::File::open(partial).map_err(on("open", partial))?;
        Ok(nix::unistd::syncfs(directory).map_err(on("sync", partial))?)
    }

    /// The digests of the read-only content that is here.
    pub fn contents(&self) -> Result<BTreeSet<Digest>, VolumeError> {
        self.places.contents()
    }

    /// The digests of the read-only content that was mounted here.
    pub fn laid_out(&self) -> Result<Vec<Digest>, VolumeError> {
        let contents = self.contents()?.into_iter();
        Ok(contents.filter(|digest| self.places.content(digest).is_dir()).collect())
    }

    /// What could not be removed so far.
    pub fn leftovers(&self) -> &Leftovers {
        self.places.leftovers()
    }

    /// What is wrong with the places of volumes, each in words that say what to do.
    pub fn contradictions(&self) -> Result<Vec<String>, VolumeError> {
        self.places.contradictions()
    }

    /// Whether this content is here: whole in the store, and perhaps laid out.
    pub fn has_content(&self, digest: &Digest) -> bool {
        self.places.has_content(digest)
    }

    /// Every volume that is here.
    pub fn list(&self) -> Result<Vec<Listed>, VolumeError> {
        let writable = self.journal.volumes()?.into_iter();
        let mut listed: Vec<Listed> = writable
            .filter(|(_, entry)| entry.moved_to.is_none())
            .map(|(id, entry)| {
                let path = self.places.data(&id);
                let size = || fs::metadata(&path).map_or(0, |image| image.len());
                let image = entry.file_system.map(|file_system| (file_system, size()));
                Listed { name: id.to_string(), path, read_only: false, image }
            })
            .collect();
        listed.extend(self.contents()?.into_iter().map(|digest| Listed {
            name: digest.to_string(),
            path:
                Some(self.places.content(&digest)).filter(|path| path.is_dir()).unwrap_or_default(),
            read_only: true,
            image: None,
        }));
        Ok(listed)
    }
}

/// Writes a directory's objects, and says what names it then.
fn put_tree(directory: &Path, mut writer: Writer) -> Result<Digest, VolumeError> {
    let captured = capture(directory, &mut writer, &mut Unchanged::default())?;
    writer.flush()?;
    Ok(captured.tree)
}
