//! What a container consists of: the source's answer to "what would I have to bring?".

use std::path::{Path, PathBuf};

use bytes::Bytes;
use criu_wrapper::live;
use criu_wrapper::supplement::InterfaceUse;
use godwit_protos::peer::{self, Blob, DescribeResponse, Shape, VolumeMount};
use godwit_protos::{ContainerRef, FileSystem, Subject, VolumeId, VolumeSource, annotation, path};
use oci_spec::runtime::Spec;

use super::obstacles::{self, Findings, Process};
use super::origin::{self, Origin};
use super::record;
use super::shim::Shim;
use super::spec::{Outline, SpecError};
use super::{MigrationError, blocking};
use crate::containerd::{Container, Lease, TaskStatus, upper_dir};
use crate::node::Node;
use crate::ownership::Ownership;
use crate::ownership::leases::{LeaseError, Leased, Purpose};

/// A container as its node knows it.
#[derive(Debug)]
pub struct Described {
    /// Its name.
    pub container: ContainerRef,
    /// containerd's record.
    pub record: Container,
    /// The image that it was made of.
    pub origin: Origin,
    /// What the image is made of, as far as it is here.
    pub image_blobs: Vec<Blob>,
    /// Its specification as text and parsed.
    pub spec_json: String,
    spec: Spec,
    /// All volumes that it mounts.
    pub volumes: Vec<VolumeMount>,
    /// The writable ones.
    pub writable_volumes: Vec<WritableVolume>,
    /// Its memory as a subject.
    pub memory: Subject,
    /// Directory of its writable layer, if its root file system has one of its own.
    pub upper_dir: Option<PathBuf>,
    /// What it does.
    pub status: TaskStatus,
    /// Its shim.
    pub shim: Shim,
    pids: Vec<u32>,
}

/// A writable volume of a container.
#[derive(Clone, Debug)]
pub struct WritableVolume {
    /// Its name.
    pub id: VolumeId,
    /// The directory, or the image of a block volume.
    pub path: PathBuf,
    /// What the image holds.
    pub file_system: Option<FileSystem>,
    /// Where the container has it.
    pub destination: PathBuf,
}

/// Looks a container up in containerd and at its shim.
///
/// Errors: [`MigrationError`] that names what is missing.
pub async fn describe(node: &Node, container: &ContainerRef) -> Result<Described, MigrationError> {
    let (namespace, id) = (container.namespace(), container.id());
    let record = match node.containerd.container(namespace, id).await {
        Err(crate::containerd::ClientError::NotFound(_)) => {
            check_not_arriving(node, container)?;
            return Err(MigrationError::NoContainer(container.clone(), node.config.node.clone()));
        }
        other => other?,
    };
    let task = node.containerd.task(namespace, id).await?;
    let status = task.map_or(TaskStatus::Stopped, |task| task.status);
    if !matches!(status, TaskStatus::Running | TaskStatus::Paused) {
        check_not_arriving(node, container)?;
        let status = format!("{status:?}").to_lowercase();
        return Err(MigrationError::NotRunning { container: container.clone(), status });
    }
    let shim = Shim::find(&node.config, container)?;
    let pids = node.containerd.pids(namespace, id).await?;
    let origin = origin::find(node, namespace, &record).await?;
    let mounts =
        node.containerd.mounts(namespace, &record.snapshotter, &record.snapshot_key).await?;
    let spec_json = String::from_utf8_lossy(&record.spec).into_owned();
    let spec = serde_json::from_slice(&record.spec).map_err(SpecError::Parse)?;
    let outline = Outline::parse(&record.spec)?;
    let (volumes, writable_volumes) = volumes(node, &outline)?;
    Ok(Described {
        container: container.clone(),
        image_blobs: image_blobs(node, namespace, &origin).await,
        origin,
        memory: memory_subject(container, &record.image, &outline),
        upper_dir: upper_dir(&mounts),
        record,
        spec_json,
        spec,
        volumes,
        writable_volumes,
        status,
        shim,
        pids,
    })
}

/// Errors: the container does not run here yet, and is on its way here.
fn check_not_arriving(node: &Node, container: &ContainerRef) -> Result<(), MigrationError> {
    let leased = Leased::Container(container.clone());
    match node.journal.lease_of(&leased).map_err(LeaseError::from)? {
        Some(lease) if lease.purpose == Purpose::Arriving => {
            Err(LeaseError::Taken(Box::new((leased, lease))).into())
        }
        _ => Ok(()),
    }
}

/// What an image is made of; nothing if it is not here.
async fn image_blobs(node: &Node, namespace: &str, origin: &Origin) -> Vec<Blob> {
    let Some((_, content)) = &origin.image else { return Vec::new() };
    let mut blobs = Vec::new();
    for blob in content.blobs() {
        let place = content.layers.iter().position(|layer| layer == blob);
        let diff_id = place.and_then(|place| content.diff_ids.get(place));
        let has = node.containerd.has_blob(namespace, blob.digest).await;
        blobs.push(Blob {
            digest: blob.digest.to_string(),
            size_bytes: blob.size_bytes,
            diff_id: diff_id.map_or_else(Bytes::new, |id| id.as_bytes().to_vec().into()),
            is_absent: matches!(has, Ok(None)),
        });
    }
    blobs
}

fn memory_subject(container: &ContainerRef, image: &str, spec: &Outline) -> Subject {
    let annotated = |key: &str| spec.annotation(key).map(str::to_owned);
    let named = |text: String, instead: &str| {
        // A subject's text form parts by '|'.
        let text = text.replace('|', "_");
        if text.is_empty() { instead.to_owned() } else { text }
    };
    Subject::Memory {
        namespace: container.namespace().to_owned(),
        service: named(annotated(annotation::SERVICE).unwrap_or_else(|| image.to_owned()), "none"),
        user: named(annotated(annotation::USER).unwrap_or_default(), container.id()),
    }
}

type Volumes = (Vec<VolumeMount>, Vec<WritableVolume>);

fn volumes(node: &Node, spec: &Outline) -> Result<Volumes, MigrationError> {
    let (mut all, mut writable) = (Vec::new(), Vec::new());
    for mount in spec.volumes() {
        let volume: VolumeSource = mount.source().parse()?;
        let read_only = mount.is_read_only();
        let path = node.volumes.path(&volume, read_only)?;
        let file_system = node.volumes.file_system(&volume)?;
        all.push(VolumeMount {
            volume: volume.to_string(),
            destination: mount.destination.clone(),
            read_only,
            file_system: file_system.map_or_else(String::new, |one| one.to_string()),
        });
        if let VolumeSource::Writable(id) = volume {
            let destination = mount.destination.clone().into();
            writable.push(WritableVolume { id, path, file_system, destination });
        }
    }
    Ok((all, writable))
}

impl Described {
    /// Whether this node may give the container away now. Errors: [`MigrationError::NotRunning`] or
    /// [`MigrationError::Busy`]; the same request may succeed later.
    pub fn check_movable(&self, node: &Node) -> Result<(), MigrationError> {
        let container = &self.container;
        if self.status == TaskStatus::Paused {
            let status = "paused".to_owned();
            return Err(MigrationError::NotRunning { container: container.clone(), status });
        }
        let entry = node.journal.container(container)?;
        if let Some(
            Ownership::Offered(_, to) | Ownership::Released(_, to) | Ownership::Moved(_, to),
        ) = entry.map(|entry| entry.ownership)
        {
            return Err(MigrationError::Busy { container: container.clone(), to });
        }
        Ok(())
    }

    /// Holds the blobs of its image in containerd until the lease is released.
    ///
    /// Errors: containerd's. A blob that is not here is not held; [`Self::survey`] tells of it.
    pub async fn hold_image(&self, node: &Node) -> Result<Lease, MigrationError> {
        let lease = node.containerd.lease(self.container.namespace()).await?;
        for blob in self.image_blobs.iter().filter(|blob| !blob.is_absent) {
            lease.hold_blob(blob.digest.parse()?).await?;
        }
        Ok(lease)
    }

    /// Looks for what cannot move, or becomes different by moving, as the container is now.
    ///
    /// Errors: containerd or the shim does not answer.
    pub async fn survey(&self, node: &Node) -> Result<Findings, MigrationError> {
        let (namespace, id) = (self.container.namespace(), self.container.id());
        let pids = node.containerd.pids(namespace, id).await?;
        let at_shim = self.shim.describe(id).await?;
        let mut container = obstacles::Container {
            spec: self.spec.clone(),
            init_pid: at_shim.init_pid,
            volumes: self.writable_volumes.clone(),
            execs: at_shim.execs,
            processes: Vec::new(),
        };
        let mut findings = blocking(move || {
            container.processes = Process::read_all(&pids);
            Ok(obstacles::survey(&container))
        })
        .await?;
        for WritableVolume { id, .. } in &self.writable_volumes {
            let volume = VolumeSource::Writable(id.clone());
            if let Some(other) = volume_user(node, &volume, Some(&self.container)).await? {
                findings.obstacle(
                    format!("volume {id} is also mounted by container {other}"),
                    "moving it would take it from the other one",
                    "stop the other one first, or give each a volume of its own",
                );
            }
        }
        Ok(findings)
    }

    /// Where its shim mounts block volumes, each by its name.
    pub fn mounts(&self) -> PathBuf {
        Path::new(path::MOUNTS).join(self.container.namespace()).join(self.container.id())
    }

    /// What CRIU will have to dump and restore besides bytes.
    pub async fn shape(&self) -> Result<Shape, MigrationError> {
        let pids = self.pids.clone();
        blocking(move || Ok(shape(&pids))).await
    }

    /// The answer to a peer that is to make the container, and so needs its image.
    pub fn response(&self, node: &Node, mut findings: Findings) -> DescribeResponse {
        self.origin.survey(&self.record.image, &mut findings);
        record::survey(&self.record, &mut findings);
        let pages: u64 = self.pids.iter().map(|pid| resident_pages(*pid)).sum();
        let target = self.origin.image.as_ref().map(|(target, _)| target);
        DescribeResponse {
            image: self.record.image.clone(),
            image_media_type: target.map_or_else(String::new, |target| target.media_type.clone()),
            image_digest: target.map_or_else(String::new, |target| target.digest.to_string()),
            image_size: target.map_or(0, |target| i64::try_from(target.size_bytes).unwrap_or(0)),
            runtime: self.record.runtime.name.clone(),
            snapshotter: self.record.snapshotter.clone(),
            labels: self.record.labels.clone(),
            spec_json: self.spec_json.clone(),
            volumes: self.volumes.clone(),
            memory_subject: self.memory.to_string(),
            layer_subject: String::new(),
            status: format!("{:?}", self.status).to_lowercase(),
            memory_bytes: pages * crate::content::object::PAGE_BYTES as u64,
            criu_version: node.criu_version.clone(),
            obstacles: findings.obstacles,
            warnings: findings.warnings,
            addresses: findings.addresses.into_iter().collect(),
            binds: findings.binds.into_iter().map(Into::into).collect(),
            interfaces: findings.interfaces.into_iter().map(interface_use).collect(),
            image_blobs: self.image_blobs.clone(),
            chain_id: self.origin.chain_id_text(),
            image_renamed: self.origin.is_renamed,
        }
    }
}

/// What a socket needs an interface for, as peers get it.
fn interface_use(used: InterfaceUse) -> peer::InterfaceUse {
    peer::InterfaceUse { what: used.what, name: used.interface, address: used.address.into() }
}

/// Resident pages of a process (proc(5), "statm", second field).
fn resident_pages(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    statm.split_ascii_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

/// A container on this node, other than `besides`, with a task that mounts `volume`.
pub async fn volume_user(
    node: &Node,
    volume: &VolumeSource,
    besides: Option<&ContainerRef>,
) -> Result<Option<String>, MigrationError> {
    let name = volume.to_string();
    for namespace in node.containerd.namespaces().await? {
        for other in node.containerd.list_containers(&namespace).await? {
            let this = (namespace.as_str(), other.id.as_str());
            if besides.is_some_and(|besides| this == (besides.namespace(), besides.id())) {
                continue;
            }
            // A specification of another kind than OCI's mounts no volume.
            let Ok(spec) = Outline::parse(&other.spec) else { continue };
            let uses = spec.volumes().any(|mount| mount.source() == name);
            if uses && node.containerd.task(&namespace, &other.id).await?.is_some() {
                return Ok(Some(format!("{namespace}/{}", other.id)));
            }
        }
    }
    Ok(None)
}

/// What CRIU will have to dump and restore of these processes besides bytes.
fn shape(pids: &[u32]) -> Shape {
    let mut shape = Shape::default();
    for pid in live::leaders(pids).unwrap_or_default() {
        // A process that has ended counts as one without threads and mappings.
        let read = |name| std::fs::read_to_string(format!("/proc/{pid}/{name}"));
        let status = read("status").unwrap_or_default();
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:"));
        let threads = threads.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
        let mappings = read("maps").unwrap_or_default().lines().count();
        shape.processes = shape.processes.saturating_add(1);
        shape.threads = shape.threads.saturating_add(threads);
        shape.mappings = shape.mappings.saturating_add(u32::try_from(mappings).unwrap_or(u32::MAX));
    }
    shape
}
