//! What a restore needs, laid out as plain files at the destination.
//!
//! ```text
//! STATE/stage/SESSION/volume-ID     a volume, directory or image, patched each round, then renamed into place
//! STATE/stage/SESSION/base          the memory as of the last round, in the form of CRIU's images
//! STATE/stage/SESSION/images        CRIU's images of the cut, made of those in base
//! STATE/stage/SESSION/work          CRIU's logs
//! ```
//!
//! The writable layer is patched in the container's own upper directory, which nothing mounts
//! before the restore. What lies there already, of a stopped container that is started again, is
//! moved aside ([`Layer`]) once the source has confirmed that it has the container, and put back if
//! the container does not come.
//!
//! On open of the daemon everything below `stage` is removed: sessions live in memory.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use godwit_protos::peer::ObjectBatch;
use godwit_protos::{ContainerRef, Digest, FileSystem, Subject, VolumeId};

use super::layer::Layer;
use super::session::Parsed;
use super::{MigrationError, blocking};
use crate::content::encoding::Codec;
use crate::content::image::write_image;
use crate::content::materialize::materialize;
use crate::content::object::{Image, Kind};
use crate::content::{Source as _, on, staging};
use crate::node::Node;
use crate::ownership::journal::Arriving;
use crate::store::{Encoding, Lease, Store};
use crate::volumes::{VolumeError, Volumes};

/// A staged volume: its version, and what it holds if that is an image.
#[derive(Clone, Debug)]
struct Staged {
    id: VolumeId,
    root: Digest,
    file_system: Option<FileSystem>,
}

/// The staged state of one session.
#[derive(Clone, Debug)]
pub struct Layout {
    store: Store,
    directory: PathBuf,
    layer_dir: Option<Layer>,
    arriving: Arriving,
    volumes: Vec<Staged>,
    /// File systems whose images may come here.
    admitted: Vec<FileSystem>,
    layer: Option<Digest>,
    memory: Option<Digest>,
    installed: Vec<VolumeId>,
    /// This node's, for what they know of its disk.
    here: Volumes,
}

impl Layout {
    /// Makes the directories of a session for a container whose writable layer is to lie in
    /// `upper_dir`.
    pub fn begin(
        node: &Node,
        session: &str,
        container: &ContainerRef,
        upper_dir: Option<PathBuf>,
    ) -> Result<Self, MigrationError> {
        let directory = node.config.state_dir.join("stage").join(session);
        for name in ["base", "images", "work"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).map_err(on("make directory", &path))?;
        }
        Ok(Self {
            store: node.store.clone(),
            directory,
            layer_dir: upper_dir.map(Layer::at),
            arriving: Arriving { container: container.to_string(), session: session.to_owned() },
            volumes: Vec::new(),
            admitted: node.config.admit.file_systems.clone(),
            layer: None,
            memory: None,
            installed: Vec::new(),
            here: node.volumes.clone(),
        })
    }

    /// Works on it on a thread for blocking work. What was done is noted also when that fails, so
    /// that [`Self::discard`] removes it.
    pub async fn work_on(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), MigrationError> + Send + 'static,
    ) -> Result<(), MigrationError> {
        let mut at = self.clone();
        let (at, done) = blocking(move || {
            let done = work(&mut at);
            Ok((at, done))
        })
        .await?;
        *self = at;
        done
    }

    /// CRIU's image directory.
    pub fn images(&self) -> PathBuf {
        self.directory.join("images")
    }

    /// Directory for CRIU's logs.
    pub fn work(&self) -> PathBuf {
        self.directory.join("work")
    }

    fn base(&self) -> PathBuf {
        self.directory.join("base")
    }

    /// Brings volumes and writable layer to these versions; of memory it notes the version.
    pub fn stage(&mut self, manifests: &Parsed) -> Result<(), MigrationError> {
        for (subject, (kind, root), _) in manifests {
            if *kind == Kind::Tree {
                self.here.check_kept(&subject.to_string(), &self.store.decode(root)?)?;
            }
            match subject {
                Subject::Memory { .. } => self.memory = Some(*root),
                // The holder of a cut names its parts; images come another way.
                Subject::Container(_) | Subject::ImageLayer(_) => {}
                Subject::Layer(_) => {
                    let Some(layer) = &self.layer_dir else { continue };
                    materialize(&self.store, root, self.layer.as_ref(), layer.path())?;
                    self.layer = Some(*root);
                }
                Subject::Volume(id) => self.stage_volume(id, (*kind, root))?,
            }
        }
        Ok(())
    }

    fn staged(&self, id: &VolumeId) -> PathBuf {
        self.directory.join(format!("volume-{id}"))
    }

    fn stage_volume(
        &mut self,
        id: &VolumeId,
        (kind, root): (Kind, &Digest),
    ) -> Result<(), MigrationError> {
        let path = self.staged(id);
        let known = self.volumes.iter().position(|known| known.id == *id);
        let base = known.map(|index| self.volumes.swap_remove(index));
        let mut file_system = None;
        if kind == Kind::Image {
            let named = self.store.decode::<Image>(root)?.file_system;
            if !self.admitted.contains(&named) {
                let id = id.clone();
                return Err(VolumeError::NotAdmitted { id, file_system: named }.into());
            }
            file_system = Some(named);
        }
        if base.as_ref().is_some_and(|base| base.file_system != file_system) {
            return Err(MigrationError::Protocol("a volume that changes its kind"));
        }
        let before = base.as_ref().map(|base| &base.root);
        if file_system.is_some() {
            write_image(&self.store, root, before, &path)?;
        } else {
            if before.is_none() {
                fs::create_dir(&path).map_err(on("make directory", &path))?;
            }
            materialize(&self.store, root, before, &path)?;
        }
        self.volumes.push(Staged { id: id.clone(), root: *root, file_system });
        Ok(())
    }

    /// Writes the memory of the last round as images.
    pub fn stage_memory(&mut self) -> Result<(), MigrationError> {
        if let Some(memory) = &self.memory {
            staging::stage_base(&self.store, memory, &self.base())?;
        }
        Ok(())
    }

    /// Empties the writable layer, and keeps what was in it until [`Self::settle`] or
    /// [`Self::discard`].
    ///
    /// Caller: once the source has confirmed that it has the container.
    pub fn clear_layer(&mut self) -> Result<(), MigrationError> {
        Ok(self.layer_dir.as_mut().map_or(Ok(()), Layer::clear)?)
    }

    /// The container has come: removes what was kept of an earlier writable layer.
    pub fn settle(&mut self) {
        if let Some(kept) = self.layer_dir.as_mut().and_then(Layer::settle) {
            self.here.leftovers().remove(&kept);
        }
    }

    /// Brings everything to the cut and puts the volumes into place.
    ///
    /// Errors: some volumes may be in place then; [`Self::discard`] removes them.
    pub fn finish(&mut self, manifests: &Parsed, volumes: &Volumes) -> Result<(), MigrationError> {
        let base = self.memory;
        let cut = manifests.iter().find(|(subject, ..)| matches!(subject, Subject::Memory { .. }));
        let (_, (_, cut), _) = cut.ok_or(MigrationError::Protocol("the cut has no memory"))?;
        staging::stage_images(&self.store, cut, base.as_ref(), &self.base(), &self.images())?;
        self.stage(manifests)?;
        for Staged { id, file_system, .. } in &self.volumes {
            // Before it is there: one that came half into place is removed, too.
            self.installed.push(id.clone());
            volumes.install(id, (&self.staged(id), *file_system), &self.arriving)?;
        }
        Ok(())
    }

    /// Removes all that was staged or put into place, for a container that will not run here.
    pub fn discard(&mut self, volumes: &Volumes) {
        for id in std::mem::take(&mut self.installed) {
            match volumes.uninstall(&id, &self.arriving.session) {
                // The session did not get so far, or found another's volume there.
                Ok(()) | Err(VolumeError::NotMarked { .. }) => {}
                Err(error) => tracing::warn!(volume = %id, %error, "cannot remove"),
            }
        }
        if let Some(Err(error)) = self.layer_dir.as_mut().map(Layer::put_back) {
            tracing::warn!(%error, "cannot put the writable layer back as it was");
        }
        self.remove_staged();
    }

    /// Removes the staged files, keeping what is in place. CRIU's logs go too unless the restore
    /// failed.
    pub fn remove_staged(&self) {
        if let Err(error) = criu_wrapper::leftovers::unmount_below(&self.directory) {
            tracing::warn!(%error, "CRIU left mounts that cannot be removed; staged files stay");
            return;
        }
        self.here.leftovers().remove(&self.directory);
    }
}

/// Keeps the objects of a stop-and-copy stream: each is decoded, checked against its digest, and
/// stored.
pub fn keep_stream(
    store: &Store,
    lease: &Lease,
    batches: &Receiver<ObjectBatch>,
) -> Result<(), MigrationError> {
    let (mut writer, mut codec) = (store.writer(lease), Codec::default());
    for batch in batches {
        for object in &batch.objects {
            let digest = Digest::try_from(&object.digest[..])?;
            let base = match &object.base[..] {
                [] => Vec::new(),
                base => store.object(&Digest::try_from(base)?)?,
            };
            let size = u64::from(object.size_bytes);
            let data = codec.decode(&digest, object.encoding, size, &object.data, &base).map_err(
                |error| MigrationError::Refused {
                    code: "damaged".to_owned(),
                    detail: format!("object {digest} of the stop-and-copy stream: {error}"),
                },
            )?;
            // What came compressed need not be compressed again.
            let stored = u8::try_from(object.encoding).ok().and_then(Encoding::from_byte);
            match stored {
                Some(encoding) => writer.put_stored(digest, encoding, &object.data, data.len())?,
                None => writer.put_hashed(digest, &data)?,
            };
        }
    }
    Ok(writer.flush()?)
}
