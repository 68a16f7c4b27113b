//! The control socket: what shims and `godwit` ask of this node's daemon.
//!
//! ttrpc on a Unix socket below the run directory, mode 0600 in a directory of mode 0700: it is
//! root's. Each call is translated here and answered by the module whose business it is.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use godwit_protos::control::{
    AcquireRequest, AcquireResponse, CheckRequest, CheckResponse, ClaimRequest, ClaimResponse,
    Container, Control, CreateSnapshotRequest, CreateVolumeRequest, DeleteSnapshotRequest, Empty,
    ExportVolumeRequest, ImportVolumeRequest, ListPeersResponse, ListSnapshotsResponse,
    ListVolumesResponse, MigrateRequest, OwnershipEntry, Peer, PinSnapshotRequest, PlanResponse,
    Progress, RemoveVolumeRequest, ResolveRequest, ResolveResponse, ResolveVolumesRequest,
    ResolveVolumesResponse, RestoreSnapshotRequest, SettleRequest, Snapshot, StatusResponse,
    SweepResponse, VerifyVolumeRequest, Volume,
};
use godwit_protos::{ContainerRef, FileSystem, MigrateFrom, Subject, VolumeSource, control, peer};
use ttrpc::asynchronous::{ServerStreamSender, TtrpcContext};
use ttrpc::{Code, Error, get_status};

use super::peer::{self as peer_api, Wanted};
use crate::check;
use crate::error::chain;
use crate::host::unix_ms;
use crate::migrate::destination::{self, Acquire, Acquired, Sessions, Settings, Settlement};
use crate::migrate::resolve::Verdict;
use crate::migrate::{MigrationError, Next, cut, describe, plan, resolve, restore, subjects};
use crate::node::Node;
use crate::ownership::Ownership;
use crate::ownership::leases::LeaseError;
use crate::peer::Connection;
use crate::snapshots::Snapshotter;
use crate::store::{Compaction, SnapshotId, StoreError};
use crate::volumes::{Shape, VolumeError};
use godwit_disk::leftovers::Leftovers;

/// How long a peer has to answer `godwit peers`.
const PEER_MAX: Duration = Duration::from_secs(2);

/// The control service of a node.
#[derive(Debug)]
pub struct Service {
    node: Arc<Node>,
    sessions: Arc<Sessions>,
    snapshots: Arc<Snapshotter>,
}

impl Service {
    /// The service, to be registered with `godwit_protos::control::create_control`.
    pub fn new(sessions: Arc<Sessions>, snapshots: Arc<Snapshotter>) -> Self {
        Self { node: sessions.node.clone(), sessions, snapshots }
    }

    /// Where a migration goes, and what is asked of that node.
    fn migration(&self, asked: MigrateRequest) -> ttrpc::Result<(String, peer::MigrateRequest)> {
        let wanted = container(&asked.container)?;
        if asked.from == asked.to {
            return Err(invalid(format!("source and destination are both {}", asked.to)));
        }
        let here = &self.node.config;
        for name in [&asked.from, &asked.to] {
            if *name != here.node && here.peer(name).is_none() {
                let error = crate::peer::PeerError::Unknown(name.clone());
                return Err(rpc(Code::NOT_FOUND, error.to_string()));
            }
        }
        let message = peer::MigrateRequest {
            container: Some(peer::Container {
                namespace: wanted.namespace().to_owned(),
                id: wanted.id().to_owned(),
            }),
            from: asked.from,
            mode: asked.mode,
            max_rounds: asked.max_rounds,
            without_writable_layer: asked.without_writable_layer,
            netns: asked.netns,
        };
        Ok((asked.to, message))
    }

    async fn refuse_in_use(&self, volume: &VolumeSource) -> ttrpc::Result<()> {
        let user = describe::volume_user(&self.node, volume, None).await;
        match user.map_err(|error| migration_error(&error))? {
            None => Ok(()),
            Some(user) => {
                let text = format!("volume {volume} is in use by container {user}");
                Err(rpc(Code::FAILED_PRECONDITION, text))
            }
        }
    }

    /// A volume that can be read whole: the image of a mounted file system is not all there is.
    async fn at_rest(&self, id: &str) -> ttrpc::Result<VolumeSource> {
        let volume = id.parse().map_err(invalid)?;
        let file_system = self.node.volumes.file_system(&volume);
        if file_system.map_err(|error| volume_error(&error))?.is_some() {
            self.refuse_in_use(&volume).await?;
        }
        Ok(volume)
    }

    /// A connection to another node's daemon.
    async fn at(&self, node: &str) -> ttrpc::Result<Connection> {
        let opened = Connection::open(&self.node.config, node, PEER_MAX).await;
        opened.map_err(|error| rpc(Code::UNAVAILABLE, chain(&error)))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Node) -> Result<T, VolumeError> + Send + 'static,
    ) -> ttrpc::Result<T> {
        let node = self.node.clone();
        let done = tokio::task::spawn_blocking(move || work(&node)).await;
        done.map_err(|_cause| rpc(Code::CANCELLED, "the daemon is stopping"))?
            .map_err(|error| volume_error(&error))
    }
}

fn rpc(code: Code, text: impl Into<String>) -> Error {
    Error::RpcStatus(get_status(code, text.into()))
}

fn invalid(error: impl std::fmt::Display) -> Error {
    rpc(Code::INVALID_ARGUMENT, error.to_string())
}

fn volume_error(error: &VolumeError) -> Error {
    let code = match error {
        VolumeError::Unknown(_)
        | VolumeError::NoContent(_)
        | VolumeError::Nowhere(_)
        | VolumeError::Store(StoreError::UnknownSnapshot(_)) => Code::NOT_FOUND,
        VolumeError::Exists(_) | VolumeError::NotEmpty(_) => Code::ALREADY_EXISTS,
        VolumeError::Size(_) => Code::INVALID_ARGUMENT,
        VolumeError::Damaged { .. } => Code::DATA_LOSS,
        VolumeError::Moved { .. }
        | VolumeError::ReadOnly(_)
        | VolumeError::NotMarked { .. }
        | VolumeError::Leased(LeaseError::Taken(_))
        | VolumeError::NoProgram { .. }
        | VolumeError::NotAdmitted { .. }
        | VolumeError::NotKept { .. }
        | VolumeError::Mounted(_)
        | VolumeError::Unjournalled(_) => Code::FAILED_PRECONDITION,
        VolumeError::Busy(_) => Code::ABORTED,
        VolumeError::Program { .. }
        | VolumeError::Journal(_)
        | VolumeError::Leased(LeaseError::Journal(_))
        | VolumeError::Content(_)
        | VolumeError::Store(_)
        | VolumeError::Sweep(_) => Code::INTERNAL,
    };
    rpc(code, chain(error))
}

fn migration_error(error: &MigrationError) -> Error {
    if let MigrationError::Volume(error) = error {
        return volume_error(error);
    }
    let code = match error.next() {
        Next::Retry => Code::UNAVAILABLE,
        Next::GiveUp => Code::FAILED_PRECONDITION,
    };
    rpc(code, error.chain())
}

fn container(asked: &Container) -> ttrpc::Result<ContainerRef> {
    ContainerRef::new(&asked.namespace, &asked.id).map_err(invalid)
}

#[async_trait]
impl Control for Service {
    async fn resolve_volumes(
        &self,
        _context: &TtrpcContext,
        asked: ResolveVolumesRequest,
    ) -> ttrpc::Result<ResolveVolumesResponse> {
        let mounts: Vec<(VolumeSource, bool)> = asked
            .mounts
            .iter()
            .map(|mount| mount.volume.parse().map(|source| (source, mount.read_only)))
            .collect::<Result<_, _>>()
            .map_err(invalid)?;
        for (source, read_only) in &mounts {
            if let (VolumeSource::Content(digest), true) = (source, read_only) {
                let brought = self.node.fetcher().bring(*digest).await;
                brought.map_err(|error| migration_error(&error.into()))?;
            }
        }
        let user = container(&asked.container)?;
        self.blocking(move |node| {
            let mut answer = ResolveVolumesResponse::new();
            for (source, read_only) in &mounts {
                let path = node.volumes.path_for(&user, source, *read_only)?;
                answer.paths.push(path.to_string_lossy().into_owned());
                answer.file_systems.push(text(node.volumes.file_system(source)?));
            }
            Ok(answer)
        })
        .await
    }

    async fn acquire(
        &self,
        _context: &TtrpcContext,
        asked: AcquireRequest,
    ) -> ttrpc::Result<AcquireResponse> {
        let volumes = asked.volumes.iter().map(|mount| mount.volume.parse());
        let upper = (!asked.rootfs_upper.is_empty()).then(|| PathBuf::from(&asked.rootfs_upper));
        let (from, cut) = if asked.restore_from.is_empty() {
            (asked.migrate_from.parse::<MigrateFrom>().map_err(invalid)?, None)
        } else {
            let cut = asked.restore_from.parse().map_err(invalid)?;
            let from = restore::origin(&self.node, cut).await;
            (from.map_err(|error| migration_error(&error))?, Some(cut))
        };
        let wanted = Acquire {
            container: container(&asked.container)?,
            from,
            cut,
            upper_dir: upper,
            volumes: volumes.collect::<Result<_, _>>().map_err(invalid)?,
            settings: Settings::of_bundle(Path::new(&asked.bundle)).map_err(invalid)?,
        };
        let mut answer = AcquireResponse::new();
        match destination::acquire(&self.sessions, wanted).await {
            Ok(Acquired::StartFresh) => answer.start_fresh = true,
            Ok(Acquired::Restore { session, image_path, work_path }) => {
                answer.session = session;
                answer.image_path = image_path.to_string_lossy().into_owned();
                answer.work_path = work_path.to_string_lossy().into_owned();
            }
            Err(error) => return Err(migration_error(&error)),
        }
        Ok(answer)
    }

    async fn claim(
        &self,
        _context: &TtrpcContext,
        asked: ClaimRequest,
    ) -> ttrpc::Result<ClaimResponse> {
        let mut answer = ClaimResponse::new();
        match destination::claim(&self.sessions, &asked.session).await {
            Ok(()) => answer.may_run = true,
            Err(reason) => answer.reason = reason,
        }
        Ok(answer)
    }

    async fn settle(&self, _context: &TtrpcContext, asked: SettleRequest) -> ttrpc::Result<Empty> {
        let (running, may_have_run) = (asked.running, asked.may_have_run);
        let settlement = Settlement { running, reason: asked.reason, may_have_run };
        destination::settle(&self.sessions, &asked.session, settlement).await;
        Ok(Empty::new())
    }

    async fn migrate(
        &self,
        _context: &TtrpcContext,
        asked: MigrateRequest,
        answer: ServerStreamSender<Progress>,
    ) -> ttrpc::Result<()> {
        let (to, message) = self.migration(asked)?;
        let mut events = if to == self.node.config.node {
            let wanted = peer_api::wanted(message).map_err(|status| invalid(status.message()))?;
            peer_api::follow(&self.sessions, Wanted::Migrate(wanted))
        } else {
            let events = self.at(&to).await?.client().migrate(message).await;
            let events = events.map_err(|status| rpc(Code::UNAVAILABLE, status.message()))?;
            events.into_inner().boxed()
        };
        while let Some(event) = events.next().await {
            let event = event.map_err(|status| rpc(Code::UNAVAILABLE, status.message()))?;
            answer.send(&progress(event)).await?;
        }
        Ok(())
    }

    async fn restore_snapshot(
        &self,
        _context: &TtrpcContext,
        asked: RestoreSnapshotRequest,
        answer: ServerStreamSender<Progress>,
    ) -> ttrpc::Result<()> {
        let wanted = restore::Request {
            snapshot: snapshot_id(&asked.id)?,
            although_it_may_run: asked.although_it_may_run_elsewhere,
            netns: (!asked.netns.is_empty()).then_some(asked.netns),
        };
        let mut events = peer_api::follow(&self.sessions, Wanted::Restore(wanted));
        while let Some(event) = events.next().await {
            let event = event.map_err(|status| rpc(Code::UNAVAILABLE, status.message()))?;
            answer.send(&progress(event)).await?;
        }
        Ok(())
    }

    async fn plan(
        &self,
        _context: &TtrpcContext,
        asked: MigrateRequest,
    ) -> ttrpc::Result<PlanResponse> {
        let (to, message) = self.migration(asked)?;
        let mut answer = PlanResponse::new();
        answer.plan_json = if to == self.node.config.node {
            let wanted = peer_api::wanted(message).map_err(|status| invalid(status.message()))?;
            let plan = plan::plan(&self.node, &wanted).await;
            let plan = plan.map_err(|error| migration_error(&error))?;
            serde_json::to_string(&plan).map_err(|error| rpc(Code::INTERNAL, error.to_string()))?
        } else {
            let plan = self.at(&to).await?.client().plan(message).await;
            plan.map_err(|status| rpc(Code::UNAVAILABLE, status.message()))?.into_inner().plan_json
        };
        Ok(answer)
    }

    async fn watch(
        &self,
        _context: &TtrpcContext,
        _asked: Empty,
        answer: ServerStreamSender<Progress>,
    ) -> ttrpc::Result<()> {
        let mut events = self.node.events.subscribe();
        while let Some(event) = events.next().await {
            answer.send(&progress(event)).await?;
        }
        Ok(())
    }

    async fn status(
        &self,
        _context: &TtrpcContext,
        _asked: Empty,
    ) -> ttrpc::Result<StatusResponse> {
        let snapshots = self.snapshots.clone();
        // The answer names what cannot be read: a failure is when people ask.
        let read =
            move |node: &Node| {
                let usage = node.store.usage().map_err(|error| chain(&error));
                let entries = node.journal.containers().map_err(|error| chain(&error));
                let leases = node.journal.leases().map_err(|error| chain(&error));
                let mut failures = node.failures();
                failures.extend(snapshots.failure().map(|reason| {
                    format!("the database of containerd's snapshots failed: {reason}")
                }));
                failures.extend(usage.as_ref().err().cloned());
                failures.extend(entries.as_ref().err().cloned());
                Ok((usage, entries.unwrap_or_default(), leases.unwrap_or_default(), failures))
            };
        let (usage, entries, leases, failures) = self.blocking(read).await?;
        let mut answer = StatusResponse::new();
        answer.failures = failures;
        answer.node = self.node.config.node.clone();
        answer.version = env!("CARGO_PKG_VERSION").to_owned();
        answer.criu_version = self.node.criu_version.clone();
        answer.listen = self.node.config.listen.map_or_else(String::new, |at| at.to_string());
        if let Ok(usage) = usage {
            answer.store_bytes = usage.bytes;
            answer.objects = usage.objects;
        }
        answer.directory = self.node.directory.status();
        let containerd = &self.node.containerd;
        if let Ok(version) = containerd.version().await {
            answer.containerd_version = version.version;
            let registered = containerd.has_snapshotter(godwit_protos::SNAPSHOTTER).await;
            answer.snapshotter_is_registered = registered.unwrap_or(false);
        }
        let node = &self.node;
        let parts = [node.volumes.leftovers(), node.store.leftovers(), self.snapshots.leftovers()];
        answer.leftovers = parts.into_iter().flat_map(Leftovers::reasons).collect();
        answer.leases = leases.iter().map(|(leased, lease)| format!("{leased} {lease}")).collect();
        answer.ownership = entries
            .into_iter()
            .map(|(container, entry)| {
                let mut line = OwnershipEntry::new();
                let mut named = Container::new();
                named.namespace = container.namespace().to_owned();
                named.id = container.id().to_owned();
                line.container = Some(named).into();
                line.state = state(&entry.ownership).into();
                line.epoch = entry.epoch().0;
                line.peer = entry.ownership.peer().unwrap_or_default().to_owned();
                line
            })
            .collect();
        Ok(answer)
    }

    async fn list_peers(
        &self,
        _context: &TtrpcContext,
        _asked: Empty,
    ) -> ttrpc::Result<ListPeersResponse> {
        let config = &self.node.config;
        let ask = config.peers.iter().map(|configured| async {
            let mut line = Peer::new();
            line.name = configured.name.clone();
            line.address = configured.address.clone();
            match Connection::open(config, &configured.name, PEER_MAX).await {
                Ok(connection) => {
                    line.reachable = true;
                    line.round_trip_ms = connection.round_trip.as_secs_f64() * 1e3;
                    line.load = connection.hello.load;
                    self.node.links.greeted(&connection);
                    line.detail = format!("protocol {}", connection.hello.version);
                }
                Err(error) => line.detail = chain(&error),
            }
            let channel = self.node.links.of(&configured.name);
            line.throughput_bytes_per_second =
                channel.throughput_bytes_per_second.unwrap_or_default();
            line
        });
        let mut answer = ListPeersResponse::new();
        answer.peers = futures::future::join_all(ask).await;
        Ok(answer)
    }

    async fn list_snapshots(
        &self,
        _context: &TtrpcContext,
        _asked: Empty,
    ) -> ttrpc::Result<ListSnapshotsResponse> {
        let snapshots = self.blocking(|node| Ok(node.store.all_snapshots()?)).await?;
        let mut answer = ListSnapshotsResponse::new();
        answer.snapshots = snapshots.into_iter().map(|(id, one)| snapshot(id, &one)).collect();
        Ok(answer)
    }

    async fn create_snapshot(
        &self,
        _context: &TtrpcContext,
        asked: CreateSnapshotRequest,
    ) -> ttrpc::Result<ListSnapshotsResponse> {
        let wanted = container(&asked.container)?;
        let taken = if asked.consistent {
            cut::take(&self.node, &wanted).await
        } else {
            subjects::take_snapshots(&self.node, &wanted).await
        };
        let taken = taken.map_err(|error| migration_error(&error))?;
        let mut answer = ListSnapshotsResponse::new();
        answer.snapshots = taken.iter().map(|(id, one)| snapshot(*id, one)).collect();
        Ok(answer)
    }

    async fn delete_snapshot(
        &self,
        _context: &TtrpcContext,
        asked: DeleteSnapshotRequest,
    ) -> ttrpc::Result<Empty> {
        let id = snapshot_id(&asked.id)?;
        self.blocking(move |node| Ok(node.store.remove_snapshot(id)?)).await?;
        Ok(Empty::new())
    }

    async fn pin_snapshot(
        &self,
        _context: &TtrpcContext,
        asked: PinSnapshotRequest,
    ) -> ttrpc::Result<Empty> {
        let id = snapshot_id(&asked.id)?;
        self.blocking(move |node| Ok(node.store.pin(id, asked.pinned)?)).await?;
        Ok(Empty::new())
    }

    async fn create_volume(
        &self,
        _context: &TtrpcContext,
        asked: CreateVolumeRequest,
    ) -> ttrpc::Result<Volume> {
        let id: godwit_protos::VolumeId = asked.id.parse().map_err(invalid)?;
        let mut shape = Shape::Tree;
        if !asked.file_system.is_empty() {
            shape = Shape::Block(asked.file_system.parse().map_err(invalid)?, asked.size_bytes);
        }
        let path = self.blocking(move |node| node.volumes.create(&id, shape)).await?;
        let mut answer = Volume::new();
        answer.id = asked.id;
        (answer.file_system, answer.size_bytes) = (asked.file_system, asked.size_bytes);
        answer.path = path.to_string_lossy().into_owned();
        Ok(answer)
    }

    async fn import_volume(
        &self,
        _context: &TtrpcContext,
        asked: ImportVolumeRequest,
    ) -> ttrpc::Result<Volume> {
        let path = absolute(asked.path)?;
        let digest = self.blocking(move |node| node.volumes.import(&path)).await?;
        let mut answer = Volume::new();
        answer.id = digest.to_string();
        answer.read_only = true;
        Ok(answer)
    }

    async fn export_volume(
        &self,
        _context: &TtrpcContext,
        asked: ExportVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let wanted = self.at_rest(&asked.id).await?;
        let directory = absolute(asked.directory)?;
        self.blocking(move |node| node.volumes.export(&wanted, &directory)).await?;
        Ok(Empty::new())
    }

    async fn verify_volume(
        &self,
        _context: &TtrpcContext,
        asked: VerifyVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let wanted = self.at_rest(&asked.id).await?;
        self.blocking(move |node| node.volumes.verify(&wanted)).await?;
        Ok(Empty::new())
    }

    async fn list_volumes(
        &self,
        _context: &TtrpcContext,
        _asked: Empty,
    ) -> ttrpc::Result<ListVolumesResponse> {
        let volumes = self.blocking(|node| node.volumes.list()).await?;
        let mut answer = ListVolumesResponse::new();
        answer.volumes = volumes
            .into_iter()
            .map(|listed| {
                let mut line = Volume::new();
                line.id = listed.name;
                line.path = listed.path.to_string_lossy().into_owned();
                line.read_only = listed.read_only;
                line.file_system = text(listed.image.map(|(file_system, _)| file_system));
                line.size_bytes = listed.image.map_or(0, |(_, bytes)| bytes);
                line
            })
            .collect();
        Ok(answer)
    }

    async fn remove_volume(
        &self,
        _context: &TtrpcContext,
        asked: RemoveVolumeRequest,
    ) -> ttrpc::Result<Empty> {
        let wanted: VolumeSource = asked.id.parse().map_err(invalid)?;
        self.refuse_in_use(&wanted).await?;
        self.blocking(move |node| {
            // One that moved away lives on elsewhere.
            let was_here = node.volumes.path(&wanted, false).is_ok();
            node.volumes.remove(&wanted)?;
            match wanted {
                VolumeSource::Writable(id) if was_here => {
                    Ok(node.note_removed(Subject::Volume(id))?)
                }
                _ => Ok(()),
            }
        })
        .await?;
        Ok(Empty::new())
    }

    async fn check(
        &self,
        _context: &TtrpcContext,
        asked: CheckRequest,
    ) -> ttrpc::Result<CheckResponse> {
        let kept = check::Kept::of(&self.node, self.snapshots.clone());
        let report = check::online(&self.node, kept, asked.repair).await;
        let report = report.map_err(|error| rpc(Code::INTERNAL, chain(&error)))?;
        let json = serde_json::to_string(&report);
        let mut answer = CheckResponse::new();
        answer.report_json = json.map_err(|error| rpc(Code::INTERNAL, error.to_string()))?;
        Ok(answer)
    }

    async fn resolve(
        &self,
        _context: &TtrpcContext,
        asked: ResolveRequest,
    ) -> ttrpc::Result<ResolveResponse> {
        let verdict = match asked.verdict.enum_value_or_default() {
            control::Verdict::VERDICT_RAN => Verdict::Ran,
            control::Verdict::VERDICT_NEVER_RAN => Verdict::NeverRan,
            control::Verdict::VERDICT_UNSPECIFIED => return Err(invalid("no verdict")),
        };
        let wanted = container(&asked.container)?;
        let resolved = resolve::resolve(&self.sessions, &wanted, verdict, asked.is_confirmed).await;
        let resolved = resolved.map_err(|error| migration_error(&error))?;
        let mut answer = ResolveResponse::new();
        answer.epoch = resolved.epoch.0;
        (answer.here, answer.peer, answer.there) = (resolved.here, resolved.peer, resolved.there);
        answer.risk = resolved.risk.to_owned();
        Ok(answer)
    }

    async fn sweep(&self, _context: &TtrpcContext, _asked: Empty) -> ttrpc::Result<SweepResponse> {
        let report = self.blocking(|node| node.sweep(Compaction::Usual)).await?;
        let mut answer = SweepResponse::new();
        answer.freed_bytes = report.bytes_freed;
        answer.kept_objects = report.objects_kept;
        Ok(answer)
    }
}

fn state(ownership: &Ownership) -> control::Ownership {
    match ownership {
        Ownership::Owner(_) => control::Ownership::OWNERSHIP_OWNER,
        Ownership::Offered(..) => control::Ownership::OWNERSHIP_OFFERED,
        Ownership::Released(..) => control::Ownership::OWNERSHIP_RELEASED,
        Ownership::Moved(..) => control::Ownership::OWNERSHIP_MOVED,
        Ownership::Claiming(..) => control::Ownership::OWNERSHIP_CLAIMING,
        Ownership::Granted(..) => control::Ownership::OWNERSHIP_GRANTED,
    }
}

/// As messages have it: empty for a tree.
fn text(file_system: Option<FileSystem>) -> String {
    file_system.map_or_else(String::new, |one| one.to_string())
}

fn absolute(path: String) -> ttrpc::Result<PathBuf> {
    let path = PathBuf::from(path);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(invalid(format!("{} is not an absolute path", path.display())))
}

fn snapshot_id(text: &str) -> ttrpc::Result<SnapshotId> {
    let id = text.parse().map(SnapshotId);
    id.map_err(|_cause| invalid(format!("{text:?} is not a snapshot's number")))
}

fn snapshot(id: SnapshotId, taken: &crate::store::Snapshot) -> Snapshot {
    let mut line = Snapshot::new();
    line.id = id.0.to_string();
    line.subject = taken.subject.to_string();
    line.sequence = taken.sequence;
    line.taken_at_unix_ms = taken.taken_at_unix_ms;
    line.manifest = taken.root.to_string();
    line.size_bytes = taken.size_bytes;
    line.node = taken.node.clone();
    line.pinned = taken.is_pinned;
    line.age_ms = u64::try_from(taken.age(unix_ms()).as_millis()).unwrap_or(u64::MAX);
    line
}

fn progress(event: peer::Progress) -> Progress {
    let mut line = Progress::new();
    line.migration = event.migration;
    line.step = event.step;
    line.text = event.text;
    line.done_bytes = event.done_bytes;
    line.total_bytes = event.total_bytes;
    line.report_json = event.report_json;
    line.undecided = event.undecided;
    line
}
