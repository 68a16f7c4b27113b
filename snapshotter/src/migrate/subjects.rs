//! The subjects of one container, as its node captures them: while it runs, and at the cut.
//!
//! Captures follow each other: each remembers what it saw, so that the next reads only what may
//! have changed, and stores only what did. Nothing here stops the container; [`super::cut`] does.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_protos::peer::Manifest;
use godwit_protos::{ContainerRef, Digest, FileSystem, Subject};

use super::describe::{Described, describe};
use super::{MigrationError, blocking};
use crate::content::capture::{Captured, Unchanged, capture};
use crate::content::image::capture_image;
use crate::content::memory::{self, DumpReader, Previous};
use crate::content::object::Kind;
use crate::content::{ContentError, Source as _, difference::difference, tmpfs};
use crate::host::unix_ms;
use crate::node::Node;
use crate::retention::record;
use crate::store::{Lease, Snapshot, SnapshotId, Store, StoreError};

/// How long a snapshot of a running container may take before what it wrote is no longer protected.
pub(crate) const SNAPSHOT_MAX: Duration = Duration::from_secs(3600);

/// One subject as it was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// What it is of.
    pub subject: Subject,
    /// What sort of object the root is.
    pub kind: Kind,
    /// The manifest.
    pub root: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// What differs from the capture before.
    pub changed_bytes: u64,
}

impl Version {
    /// As peers hear of it; `sequence` is its place in the lineage, 0 if it has none yet.
    pub fn manifest(&self, sequence: u64) -> Manifest {
        Manifest {
            subject: self.subject.to_string(),
            digest: self.root.as_bytes().to_vec().into(),
            size_bytes: self.size_bytes,
            changed_bytes: self.changed_bytes,
            sequence,
            kind: self.kind as u32,
        }
    }

    /// As it is recorded, taken now.
    pub fn snapshot(&self, sequence: u64, node: &str) -> Snapshot {
        Snapshot {
            subject: self.subject.clone(),
            sequence,
            taken_at_unix_ms: unix_ms(),
            root: self.root,
            root_kind: self.kind as u8,
            size_bytes: self.size_bytes,
            node: node.to_owned(),
            is_pinned: false,
        }
    }
}

/// What was captured, and as what it was recorded.
pub type Taken = (Vec<Version>, Vec<(SnapshotId, Snapshot)>);

/// A file tree or block volume, with what its captures remember.
struct TreeSubject {
    subject: Subject,
    path: PathBuf,
    image: Option<Image>,
    unchanged: Unchanged,
    last: Option<Captured>,
    changed_bytes: u64,
}

/// What a block volume is besides its image.
struct Image {
    file_system: FileSystem,
    /// Where the shim has it mounted.
    mounted: PathBuf,
}

impl TreeSubject {
    fn kind(&self) -> Kind {
        if self.image.is_some() { Kind::Image } else { Kind::Tree }
    }
}

/// The subjects of one container. What captures store is protected by the lease that is passed to
/// them; what an earlier one stored must still be there: keep its lease, or a snapshot that was
/// made of it.
pub struct Subjects {
    store: Store,
    memory: Subject,
    memory_last: Option<memory::Captured>,
    /// The files in memory of the last capture.
    files_last: Option<Digest>,
    trees: Vec<TreeSubject>,
}

impl Subjects {
    /// The subjects of a described container.
    pub fn of(node: &Node, described: &Described, writable_layer: bool) -> Self {
        let tree = |subject, path: &PathBuf, image| TreeSubject {
            subject,
            path: path.clone(),
            image,
            unchanged: Unchanged::default(),
            last: None,
            changed_bytes: 0,
        };
        let mounts = described.mounts();
        let volumes = described.writable_volumes.iter().map(|volume| {
            let mounted = mounts.join(volume.id.as_str());
            let image = volume.file_system.map(|file_system| Image { file_system, mounted });
            tree(Subject::Volume(volume.id.clone()), &volume.path, image)
        });
        let mut trees: Vec<_> = volumes.collect();
        if let Some(upper) = described.upper_dir.as_ref().filter(|_| writable_layer) {
            trees.push(tree(Subject::Layer(described.container.clone()), upper, None));
        }
        let memory = described.memory.clone();
        let store = node.store.clone();
        Self { store, memory, memory_last: None, files_last: None, trees }
    }

    /// What there is to capture.
    pub fn all(&self) -> impl Iterator<Item = &Subject> {
        self.trees.iter().map(|tree| &tree.subject).chain([&self.memory])
    }

    /// The last capture of each.
    pub fn versions(&self) -> Vec<Version> {
        let tree = |tree: &TreeSubject| {
            tree.last.map(|last| Version {
                subject: tree.subject.clone(),
                kind: tree.kind(),
                root: last.tree,
                size_bytes: last.bytes,
                changed_bytes: tree.changed_bytes,
            })
        };
        let memory = self.memory_last.as_ref().map(|last| Version {
            subject: self.memory.clone(),
            kind: Kind::Memory,
            root: last.digest,
            size_bytes: last.bytes,
            changed_bytes: last.changed_bytes,
        });
        self.trees.iter().filter_map(tree).chain(memory).collect()
    }

    /// Captures those subjects that are `wanted` while the processes `pids` run. May block.
    pub fn capture_live(
        &mut self,
        lease: &Lease,
        pids: &[u32],
        wanted: &dyn Fn(&Subject) -> bool,
    ) -> Result<(), MigrationError> {
        let before: Vec<_> =
            self.trees.iter().map(|tree| tree.last.map(|last| last.tree)).collect();
        for tree in self.trees.iter().filter(|tree| wanted(&tree.subject)) {
            if let Some(image) = &tree.image {
                flush(&image.mounted);
            }
        }
        self.capture_trees(lease, wanted)?;
        for (tree, before) in self.trees.iter_mut().zip(before) {
            if let Some(last) = tree.last.filter(|_| wanted(&tree.subject)) {
                tree.changed_bytes = changed_bytes(&self.store, tree.kind(), last.tree, before)?;
            }
        }
        if wanted(&self.memory) {
            self.capture_memory(lease, pids)?;
        }
        Ok(())
    }

    /// Captures the memory of running processes, and with it the files that only memory keeps.
    fn capture_memory(&mut self, lease: &Lease, pids: &[u32]) -> Result<(), MigrationError> {
        let (mut writer, before) = (self.store.writer(lease), self.memory_before()?);
        let files = match pids.first() {
            Some(init) => tmpfs::capture(*init, &mut writer)?,
            None => None,
        };
        let tree = files.map(|files| files.tree);
        let mut memory = memory::capture_live(pids, &mut writer, &before, tree)?;
        writer.flush()?;
        if let Some(files) = files {
            memory.bytes += files.bytes;
            memory.changed_bytes +=
                changed_bytes(&self.store, Kind::Tree, files.tree, self.files_last)?;
        }
        (self.memory_last, self.files_last) = (Some(memory), tree);
        Ok(())
    }

    /// Captures the trees that are `wanted`. May block.
    ///
    /// Errors: what was captured may not have been stored, so the next capture reads all again.
    pub fn capture_trees(
        &mut self,
        lease: &Lease,
        wanted: &dyn Fn(&Subject) -> bool,
    ) -> Result<(), MigrationError> {
        let begun = Instant::now();
        let captured = self.try_capture_trees(lease, wanted);
        if captured.is_err() {
            self.forget_trees();
        }
        tracing::debug!(elapsed = ?begun.elapsed(), "trees read");
        captured
    }

    fn try_capture_trees(
        &mut self,
        lease: &Lease,
        wanted: &dyn Fn(&Subject) -> bool,
    ) -> Result<(), MigrationError> {
        let mut writer = self.store.writer(lease);
        for tree in self.trees.iter_mut().filter(|tree| wanted(&tree.subject)) {
            tree.last = Some(match &tree.image {
                Some(image) => capture_image(&tree.path, image.file_system, &mut writer)?,
                None => capture(&tree.path, &mut writer, &mut tree.unchanged)?,
            });
        }
        Ok(writer.flush()?)
    }

    fn forget_trees(&mut self) {
        for tree in &mut self.trees {
            (tree.unchanged, tree.last) = (Unchanged::default(), None);
        }
    }

    /// Begins to read the memory from the dump into `images`, an empty directory, while CRIU writes
    /// it. May block.
    pub fn begin_dump(&self, images: &Path) -> Result<DumpReader, MigrationError> {
        Ok(DumpReader::begin(images, self.memory_before()?))
    }

    /// Reads the memory from CRIU's images, which are complete now. May block.
    pub fn finish_dump(&mut self, lease: &Lease, dump: DumpReader) -> Result<(), MigrationError> {
        let mut writer = self.store.writer(lease);
        let captured = dump.finish(&mut writer)?;
        writer.flush()?;
        self.memory_last = Some(captured);
        Ok(())
    }

    /// Begins again unless all of these snapshots, as which earlier captures were recorded, are
    /// there: what the captures remember may be gone from the store otherwise. Call it under a
    /// lease, so that what is there stays.
    pub fn rely_on(&mut self, last: &[SnapshotId]) -> Result<(), StoreError> {
        let known: HashSet<_> = self.store.all_snapshots()?.into_iter().map(|(id, _)| id).collect();
        if !last.iter().all(|id| known.contains(id)) {
            (self.memory_last, self.files_last) = (None, None);
            self.forget_trees();
        }
        Ok(())
    }

    fn memory_before(&self) -> Result<Previous, ContentError> {
        Previous::load(&self.store, self.memory_last.as_ref().map(|last| last.digest))
    }
}

/// Has a mounted file system write to its image what it holds back, so that less is left for after
/// the freeze.
fn flush(mounted: &Path) {
    let flushed = File::open(mounted).map(nix::unistd::syncfs);
    if !matches!(flushed, Ok(Ok(()))) {
        // It is only slower without: the freeze flushes too.
        tracing::info!(path = %mounted.display(), "cannot flush a block volume");
    }
}

fn changed_bytes(
    store: &Store,
    kind: Kind,
    new: Digest,
    before: Option<Digest>,
) -> Result<u64, ContentError> {
    let mut bytes = 0;
    difference(store, kind, new, before, &mut |changed| {
        bytes += store.object(&changed.digest)?.len() as u64;
        Ok(())
    })?;
    Ok(bytes)
}

/// Versions as snapshots at the end of their lineages.
pub fn newest(
    store: &Store,
    versions: &[Version],
    node: &str,
) -> Result<Vec<Snapshot>, StoreError> {
    let snapshot = |one: &Version| Ok(one.snapshot(store.next_sequence(&one.subject)?, node));
    versions.iter().map(snapshot).collect()
}

/// Takes a snapshot of every subject of a running container, without freezing it, and records them.
///
/// Such snapshots serve as bases for a migration; they are not consistent with each other.
pub async fn take_snapshots(
    node: &Arc<Node>,
    container: &ContainerRef,
) -> Result<Vec<(SnapshotId, Snapshot)>, MigrationError> {
    let described = describe(node, container).await?;
    let pids = node.containerd.pids(container.namespace(), container.id()).await?;
    let lease = node.store.lease("snapshot", SNAPSHOT_MAX);
    let mut subjects = Subjects::of(node, &described, true);
    let node = node.clone();
    blocking(move || {
        subjects.capture_live(&lease, &pids, &|_| true)?;
        let snapshots = newest(&node.store, &subjects.versions(), &node.config.node)?;
        let ids = record(&node, &snapshots)?;
        Ok(ids.into_iter().zip(snapshots).collect())
    })
    .await
}
