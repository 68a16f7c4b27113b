//! `godwit migrate`: creating a container here that takes another node's place.
//!
//! What the source says of its container is a description. The image comes by digest, the
//! specification is derived by [`super::spec`] under this node's rules, and the container gets the
//! migrate-from annotation: from there on it is the same procedure as for any client that sets the
//! annotation itself.
//!
//! On failure nothing is left here, and the container runs at its source.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_protos::peer::{DescribeRequest, DescribeResponse, HelloResponse, ImageHeld};
use godwit_protos::{ContainerRef, MigrateFrom, VolumeSource, annotation};

use super::destination::{Prepared, Sessions, Settings, connect, mode_word};
use super::layer::Layer;
use super::{
    MigrationError, arrival, blocking, fit, image, marks, obstacles, record, spec, terminal,
};
use crate::containerd::{
    ClientError, Container, Descriptor, ImageContent, Runtime, TaskStatus, upper_dir,
};
use crate::node::Node;
use crate::ownership::Ownership;
use crate::ownership::leases::{Lease, Leased, Purpose};
use crate::volumes::VolumeError;

/// The runtime that migrated containers run under, by its name.
const RUNTIME: &str = "io.containerd.runc.godwit.v1";

/// containerd's own runtime. A container of this name that runs under Godwit's shim was made with
/// the shim's path, as the handler of the documented configuration does, and keeps that name: some
/// clients ask for more of it than of others. Here it gets this node's path of the shim.
const CONTAINERDS_RUNTIME: &str = "io.containerd.runc.v2";

/// containerd label of a container that a migration created.
const LABEL: &str = "godwit.io/migrated-from";

/// How long a shim may take to undo a restore whose daemon has died: longer than it asks for a
/// claim.
const UNDO_MAX: Duration = Duration::from_secs(75);

/// Pause before removing is tried again, and how far it grows.
const REMOVAL_PAUSE: Duration = Duration::from_secs(1);
const REMOVAL_PAUSE_MAX: Duration = Duration::from_secs(30);

/// A request to bring a container here.
#[derive(Clone, Debug)]
pub struct Request {
    /// The container at its source; it keeps its name.
    pub from: MigrateFrom,
    /// Settings.
    pub settings: Settings,
    /// Network namespace to join here instead of the one that the source names.
    pub netns: Option<String>,
}

/// Moves the container here. Events of `migration` tell how it goes, and the last one carries the
/// report.
///
/// Errors: [`MigrationError`]; the container runs at its source and nothing is left here.
pub async fn migrate(
    sessions: &Sessions,
    migration: &str,
    request: &Request,
) -> Result<(), MigrationError> {
    let node = &sessions.node;
    let begun = Instant::now();
    let container = &request.from.container;
    let namespace = container.namespace();
    node.events.step(migration, "request", &format!("{} to {}", request.from, node.config.node));
    // Before the source is asked: it need not be there to see that the container is here, or comes.
    let arriving = Arriving::begin(node, migration, container, &request.from.node).await?;
    check_absent(node, container).await?;
    let connections = connect(node, &request.from.node, &request.settings).await?;
    // From before the description until the image is here.
    let held = hold_image(&connections.source, container).await?;
    let described = describe_at(&connections.source, container).await?;
    refuse(find_obstacles(node, request, &connections.source.hello, &described).await?)?;
    let target = image_of(&described)?;
    let name = image::name_here(node, namespace, &described, &target).await?;
    for warning in described.warnings.iter().chain(&image::renaming_warning(&described, &name)) {
        node.events.step(migration, "warning", warning);
    }

    node.events.step(migration, "pre-copy", "image");
    let holders = image::BlobPeers::Migration(&connections);
    let named = (name.as_str(), &target);
    let content = image::bring(node, namespace, named, &described.snapshotter, holders).await?;
    drop(held);
    check_chain(&described, &content)?;
    let record = record(node, request, &described)?;
    let migration = migration.to_owned();
    let prepared = Prepared { migration, begun, connections, remove_source: true };
    create_and_start(sessions, arriving, record, &content, || {
        sessions.prepare(container, prepared);
    })
    .await
}

/// A container that this node creates for a session. Owns its lease, and what is made for it, until
/// it has come.
pub(super) struct Arriving {
    node: Arc<Node>,
    session: String,
    container: ContainerRef,
    is_over: bool,
}

impl Arriving {
    /// Leases the container for `session`. Errors: another session has it.
    pub(super) async fn begin(
        node: &Arc<Node>,
        session: &str,
        container: &ContainerRef,
        source: &str,
    ) -> Result<Self, MigrationError> {
        let lease = Lease::new(session, Purpose::Arriving, container, source);
        let leased = [Leased::Container(container.clone())];
        node.journal.take_lease_soon(&leased, &lease).await?;
        let (node, session, container) = (node.clone(), session.to_owned(), container.clone());
        Ok(Self { node, session, container, is_over: false })
    }

    /// The lease ends; nothing was made, or what was made has come.
    fn end(mut self) {
        self.is_over = true;
        end_lease(&self.node, &self.session);
    }

    /// Removes what was made, unless it has come, and ends the lease. What cannot be removed now is
    /// tried again, and leased until then.
    async fn undo(mut self, snapshotter: Option<&str>) {
        self.is_over = true;
        let (node, container, session) = (&self.node, &self.container, &self.session);
        if let Err(error) = remove_unless_come(node, container, session, snapshotter).await {
            tracing::warn!(%container, error = error.chain(), "cannot be removed; trying again");
            let (node, container, session) = (node.clone(), container.clone(), session.clone());
            let snapshotter = snapshotter.map(str::to_owned);
            tokio::spawn(async move {
                remove_at_last(&node, &container, &session, snapshotter.as_deref()).await;
            });
        }
    }
}

impl Drop for Arriving {
    /// On failure before anything was made.
    fn drop(&mut self) {
        if !self.is_over {
            end_lease(&self.node, &self.session);
        }
    }
}

fn end_lease(node: &Node, session: &str) {
    if let Err(error) = node.journal.end_lease(session) {
        tracing::error!(session, %error, "a lease stays until the daemon starts again");
    }
}

/// Ends a session that no request stands behind: removes what it made, unless its container has
/// come, and its lease.
pub(super) async fn end_session(node: &Arc<Node>, container: &ContainerRef, session: &str) {
    let (node, container) = (node.clone(), container.clone());
    let arriving = Arriving { node, session: session.to_owned(), container, is_over: true };
    arriving.undo(None).await;
}

/// Removes what a session made for a container that has not come, and ends its lease.
///
/// Errors: [`MigrationError::Unsettled`] for a granted container until it is known whether it ran;
/// the first step that failed. What follows is untouched, the lease included.
async fn remove_unless_come(
    node: &Node,
    container: &ContainerRef,
    session: &str,
    snapshotter: Option<&str>,
) -> Result<(), MigrationError> {
    if is_in(node, container, session, |state| matches!(state, Ownership::Granted(..)))? {
        return Err(MigrationError::Unsettled(container.clone()));
    }
    if !has_come(node, container, session)? {
        put_layer_back(node, container).await?;
        marks::remove_made(node, container, session, snapshotter).await?;
        let mut volumes = node.volumes.arriving_by(session)?.into_iter();
        volumes.try_for_each(|id| node.volumes.uninstall(&id, session))?;
    }
    Ok(node.journal.end_lease(session)?)
}

/// Puts back what a session that died had moved out of a container's writable layer.
async fn put_layer_back(node: &Node, container: &ContainerRef) -> Result<(), MigrationError> {
    let (namespace, id) = (container.namespace(), container.id());
    let record = match node.containerd.container(namespace, id).await {
        Err(ClientError::NotFound(_)) => return Ok(()),
        record => record?,
    };
    if record.snapshot_key.is_empty() {
        return Ok(());
    }
    // What is mounted is not touched.
    if let Some(task) = node.containerd.task(namespace, id).await?
        && !matches!(task.status, TaskStatus::Created | TaskStatus::Stopped)
    {
        return Ok(());
    }
    let mounts = node.containerd.mounts(namespace, &record.snapshotter, &record.snapshot_key);
    if let Some(upper) = upper_dir(&mounts.await?) {
        blocking(move || Ok(Layer::at(upper).put_back_of_dead()?)).await?;
    }
    Ok(())
}

/// [`remove_unless_come`], until it succeeds.
async fn remove_at_last(
    node: &Node,
    container: &ContainerRef,
    session: &str,
    snapshotter: Option<&str>,
) {
    let mut pause = REMOVAL_PAUSE;
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(REMOVAL_PAUSE_MAX);
        match remove_unless_come(node, container, session, snapshotter).await {
            Ok(()) => return,
            Err(error) => {
                tracing::info!(%container, error = error.chain(), "cannot be removed yet");
            }
        }
    }
}

/// Creates container and task and starts it, which asks for its state; `before` runs before the
/// task is created.
///
/// Errors: nothing of it is left, unless it was granted to this node and may have run.
pub(super) async fn create_and_start(
    sessions: &Sessions,
    arriving: Arriving,
    mut record: Container,
    content: &ImageContent,
    before: impl FnOnce(),
) -> Result<(), MigrationError> {
    let node = &sessions.node;
    let (namespace, id) = (arriving.container.namespace(), arriving.container.id());
    let snapshotter = record.snapshotter.clone();
    let runtime_path =
        (record.runtime.name == CONTAINERDS_RUNTIME).then_some(node.config.shim.as_path());
    let chain_id = content.chain_id().map(|chain_id| chain_id.to_string());
    let has_terminal = has_terminal(&record);
    let labels = marks::labels(&arriving.session);
    record.labels.extend(labels.clone());
    let started = async {
        // Until the container refers to its snapshot, containerd's garbage collection would take
        // it.
        let lease = node.containerd.lease(namespace).await?;
        let (client, parent) = (lease.client(), chain_id.as_deref());
        let mounts = client.prepare_labelled(namespace, &snapshotter, id, parent, labels).await?;
        node.containerd.create_container(namespace, record).await?;
        lease.release().await?;
        // The name is this session's from here on.
        let terminal = has_terminal.then(|| terminal::make(&arriving.container)).transpose();
        let terminal = terminal.map_err(MigrationError::Terminal)?;
        before();
        let created = node.containerd.create_task(namespace, id, mounts, terminal, runtime_path);
        if let Err(error) = created.await {
            terminal::discard(&arriving.container);
            return Err(error.into());
        }
        Ok(node.containerd.start_task(namespace, id).await?)
    };
    let started: Result<u32, MigrationError> = started.await;
    sessions.take_prepared(&arriving.container);
    sessions.take_name(&arriving.container);
    match started {
        Ok(_) => {
            arriving.end();
            Ok(())
        }
        Err(error) => {
            // An error of the call says nothing of the container, which may have come and run. If
            // the shim died, containerd has its `delete` report, or else the session gives up.
            let asks = |state: &Ownership| {
                matches!(state, Ownership::Claiming(..) | Ownership::Granted(..))
            };
            if is_in(node, &arriving.container, &arriving.session, asks).unwrap_or(true) {
                let ended = sessions.ended(&arriving.session);
                let _ = tokio::time::timeout(UNDO_MAX, ended).await;
            }
            arriving.undo(Some(&snapshotter)).await;
            Err(match error {
                MigrationError::Containerd(ClientError::Failed { reason, .. }) => {
                    MigrationError::Restore(reason)
                }
                other => other,
            })
        }
    }
}

/// Whether the container's process is to have a terminal.
fn has_terminal(record: &Container) -> bool {
    let spec = serde_json::from_slice::<serde_json::Value>(&record.spec).unwrap_or_default();
    spec.pointer("/process/terminal") == Some(&serde_json::Value::Bool(true))
}

/// Removes what sessions of an earlier daemon made for containers that have not come.
///
/// A session's lease in the journal, and its mark on what it made, are both needed: a journal that
/// is older than what is here, or newer, removes nothing.
///
/// Caller: once per run of the daemon, after [`settle_what_came`]. Errors: the journal's; nothing
/// is removed then, and calling again is safe.
pub fn remove_abandoned(node: &Arc<Node>) -> Result<(), MigrationError> {
    for (leased, lease) in node.journal.leases()? {
        let (Leased::Container(container), Purpose::Arriving) = (leased, lease.purpose) else {
            continue;
        };
        let node = node.clone();
        tokio::spawn(async move {
            tracing::warn!(%container, "left by a migration that was cut short");
            // Its shim may ask again meanwhile, and be granted.
            tokio::time::sleep(UNDO_MAX).await;
            remove_at_last(&node, &container, &lease.session, None).await;
        });
    }
    Ok(())
}

/// Journals as run those containers that were granted to this node, run here, and whose shim could
/// not report it to a daemon that had died.
///
/// Errors: the first of those that could not be seen to; all others were. Call again then.
pub async fn settle_what_came(node: &Arc<Node>) -> Result<(), MigrationError> {
    let mut settled = Ok(());
    for (container, entry) in node.journal.containers()? {
        if matches!(entry.ownership, Ownership::Granted(..)) {
            settled = settled.and(settle_if_it_runs(node, &container).await);
        }
    }
    settled
}

async fn settle_if_it_runs(
    node: &Arc<Node>,
    container: &ContainerRef,
) -> Result<(), MigrationError> {
    let task = node.containerd.task(container.namespace(), container.id()).await?;
    let runs = |status| matches!(status, TaskStatus::Running | TaskStatus::Paused);
    if task.is_some_and(|task| runs(task.status))
        && let Some(epoch) = arrival::ran(node, container).await?
    {
        arrival::make_durable_later(node, container, epoch);
    }
    Ok(())
}

/// Whether a container is in one of these states by this session.
fn is_in(
    node: &Node,
    container: &ContainerRef,
    session: &str,
    states: impl Fn(&Ownership) -> bool,
) -> Result<bool, MigrationError> {
    let entry = node.journal.container(container)?;
    let ours = entry.filter(|entry| entry.session.as_deref() == Some(session));
    Ok(ours.is_some_and(|entry| states(&entry.ownership)))
}

/// Whether a container was given to this node by this session.
pub(super) fn has_come(
    node: &Node,
    container: &ContainerRef,
    session: &str,
) -> Result<bool, MigrationError> {
    is_in(node, container, session, |state| !matches!(state, Ownership::Claiming(..)))
}

/// Has the source keep the image of a container while the returned stream is open.
async fn hold_image(
    source: &crate::peer::Connection,
    container: &ContainerRef,
) -> Result<tonic::Streaming<ImageHeld>, MigrationError> {
    let asked = DescribeRequest { container: Some(super::line::named(container)) };
    let answer = source.client().hold_image(asked).await;
    Ok(answer.map_err(|status| source.refused(status))?.into_inner())
}

/// What the source says of a container.
pub async fn describe_at(
    source: &crate::peer::Connection,
    container: &ContainerRef,
) -> Result<DescribeResponse, MigrationError> {
    let asked = DescribeRequest { container: Some(super::line::named(container)) };
    let answer = source.client().describe(asked).await;
    Ok(answer.map_err(|status| source.refused(status))?.into_inner())
}

pub(super) fn image_of(described: &DescribeResponse) -> Result<Descriptor, MigrationError> {
    if described.image_digest.is_empty() {
        return Err(MigrationError::NoImage(described.image.clone()));
    }
    Ok(Descriptor {
        media_type: described.image_media_type.clone(),
        digest: described.image_digest.parse()?,
        size_bytes: u64::try_from(described.image_size).unwrap_or(0),
    })
}

/// Errors: the container exists here, or containerd does not answer.
pub(super) async fn check_absent(
    node: &Node,
    container: &ContainerRef,
) -> Result<(), MigrationError> {
    let (namespace, id) = (container.namespace(), container.id());
    match node.containerd.container(namespace, id).await {
        Err(ClientError::NotFound(_)) => return Ok(()),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    let (container, name) = (container.clone(), node.config.node.clone());
    let task = node.containerd.task(namespace, id).await?;
    Err(match task.map(|task| task.status) {
        None | Some(TaskStatus::Stopped) => MigrationError::Exists { container, node: name },
        Some(_) => MigrationError::RunsHere { container, node: name },
    })
}

/// Everything that would make the migration fail, as far as both nodes can tell before anything
/// moves. `godwit plan` lists it, `godwit migrate` refuses it ([`refuse`]).
///
/// Errors: containerd does not answer.
pub(super) async fn find_obstacles(
    node: &Node,
    request: &Request,
    source: &HelloResponse,
    described: &DescribeResponse,
) -> Result<Vec<MigrationError>, MigrationError> {
    let container = &request.from.container;
    let mut found: Vec<MigrationError> =
        obstacles::check(&described.obstacles).err().into_iter().collect();
    match check_absent(node, container).await {
        Err(MigrationError::Containerd(error)) => return Err(error.into()),
        checked => found.extend(checked.err()),
    }
    let lacking = fit::obstacles(node, request.netns.as_deref(), described).await?;
    found.extend(obstacles::check(&lacking).err());
    found.extend(pre_flight(node, source, described).err());
    found.extend(record(node, request, described).err());
    found.extend(check_snapshotter(node, container, &described.snapshotter).await.err());
    for mount in &described.volumes {
        if let Ok(VolumeSource::Writable(id)) = mount.volume.parse() {
            found.extend(node.volumes.may_receive(&id).err().map(Into::into));
        }
    }
    Ok(found)
}

/// Errors: what was found; several as one.
fn refuse(mut found: Vec<MigrationError>) -> Result<(), MigrationError> {
    if found.len() > 1 {
        return Err(MigrationError::Obstacles(texts(&found)));
    }
    found.pop().map_or(Ok(()), Err)
}

/// Obstacles as texts, those that the source found one by one.
pub(super) fn texts(found: &[MigrationError]) -> Vec<String> {
    let each = |error: &MigrationError| match error {
        MigrationError::Obstacles(all) => all.clone(),
        other => vec![other.chain()],
    };
    found.iter().flat_map(each).collect()
}

/// Errors: this node does not have the snapshotter, or that has a snapshot of the container's name.
async fn check_snapshotter(
    node: &Node,
    container: &ContainerRef,
    snapshotter: &str,
) -> Result<(), MigrationError> {
    let (namespace, key) = (container.namespace(), container.id());
    match node.containerd.has_snapshot(namespace, snapshotter, key).await {
        Ok(false) => Ok(()),
        Ok(true) => {
            let (key, snapshotter) = (key.to_owned(), snapshotter.to_owned());
            Err(MigrationError::SnapshotExists { key, snapshotter })
        }
        Err(ClientError::Failed { reason, .. }) => Err(MigrationError::Incompatible(format!(
            "containerd on this node cannot use the container's snapshotter {snapshotter:?}: {reason}"
        ))),
        Err(error) => Err(error.into()),
    }
}

/// Errors: the image that came is not the one that the container was made of.
pub(super) fn check_chain(
    described: &DescribeResponse,
    content: &ImageContent,
) -> Result<(), MigrationError> {
    let chain_id = content.chain_id().map(|id| id.to_string()).unwrap_or_default();
    // A source of an older version does not say.
    if described.chain_id.is_empty() || described.chain_id == chain_id {
        return Ok(());
    }
    Err(MigrationError::Protocol("an image that is not the one that the container was made of"))
}

/// What would make the restore fail, before anything moves.
pub(super) fn pre_flight(
    node: &Node,
    source: &HelloResponse,
    described: &DescribeResponse,
) -> Result<(), MigrationError> {
    if source.architecture != std::env::consts::ARCH {
        return Err(MigrationError::Incompatible(format!(
            "the source is {}, this node is {}",
            source.architecture,
            std::env::consts::ARCH
        )));
    }
    for mount in described.volumes.iter().filter(|mount| !mount.file_system.is_empty()) {
        let (id, file_system) = (mount.volume.parse()?, mount.file_system.parse()?);
        if !node.config.admit.file_systems.contains(&file_system) {
            return Err(VolumeError::NotAdmitted { id, file_system }.into());
        }
    }
    let parse = |text: &str| text.parse::<criu_wrapper::version::Version>().ok();
    let (there, here) = (parse(&described.criu_version), parse(&node.criu_version));
    match (there, here) {
        (Some(there), Some(here)) if there.major > here.major => Err(MigrationError::Incompatible(
            format!("CRIU {here} here cannot restore what CRIU {there} dumps"),
        )),
        (_, None) => Err(MigrationError::Incompatible(
            "CRIU is not installed on this node; Godwit needs 4.2 or newer on kernels since 6.16"
                .to_owned(),
        )),
        (None, _) => {
            Err(MigrationError::Incompatible("CRIU is not installed on the source".to_owned()))
        }
        _ => Ok(()),
    }
}

pub(super) fn record(
    node: &Node,
    request: &Request,
    described: &DescribeResponse,
) -> Result<Container, MigrationError> {
    let annotation = (annotation::MIGRATE_FROM, request.from.to_string());
    record_with(node, request, described, annotation)
}

/// The container that takes the described one's place here, with the annotation that says where its
/// state is.
pub(super) fn record_with(
    node: &Node,
    request: &Request,
    described: &DescribeResponse,
    origin: (&'static str, String),
) -> Result<Container, MigrationError> {
    let yes_no = |yes| if yes { "yes" } else { "no" }.to_owned();
    let annotations = [
        origin,
        (annotation::MODE, mode_word(&request.settings).to_owned()),
        (annotation::MAX_ROUNDS, request.settings.max_rounds.to_string()),
        (annotation::WRITABLE_LAYER, yes_no(request.settings.writable_layer)),
    ];
    let netns = request.netns.as_deref().map(Path::new);
    let container = &request.from.container;
    let wanted = spec::Wanted { container, netns, annotations: &annotations };
    let machine = spec::Machine::read(Path::new("/sys"));
    let spec = spec::derive(&described.spec_json, &node.config.admit, &machine, &wanted)?;
    let id = request.from.container.id().to_owned();
    let is_containerds = described.runtime == CONTAINERDS_RUNTIME;
    let runtime = if is_containerds { CONTAINERDS_RUNTIME } else { RUNTIME };
    record::check_labels(&described.labels)?;
    let mut labels = described.labels.clone();
    marks::strip(&mut labels);
    labels.insert(LABEL.to_owned(), request.from.to_string());
    Ok(Container {
        snapshot_key: id.clone(),
        id,
        image: described.image.clone(),
        runtime: Runtime { name: runtime.to_owned(), options: None },
        snapshotter: described.snapshotter.clone(),
        labels,
        spec: serde_json::to_vec(&spec).map_err(spec::SpecError::Parse)?,
        ..Container::default()
    })
}
