//! `godwit migrate`: creating a container here that takes another node's place.
//!
//! What the source says of its container is a description. The image comes by digest, the specification is derived by
//! [`super::spec`] under this node's rules, and the container gets the migrate-from annotation: from there on it is the
//! same procedure as for any client that sets the annotation itself.
//!
//! On failure nothing is left here, and the container runs at its source.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use godwit_protos::peer::{Container as PeerContainer, DescribeRequest, DescribeResponse};
use godwit_protos::{ContainerRef, MigrateFrom, annotation};

use super::destination::{Prepared, Settings, connect, mode_word};
use super::{MigrationError, image, spec};
use crate::containerd::{ClientError, Container, Descriptor, Runtime};
use crate::node::Node;

/// The runtime that migrated containers run under.
const RUNTIME: &str = "io.containerd.runc.godwit.v1";

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

/// Moves the container here. Events of `migration` tell how it goes, and the last one carries the report.
///
/// Errors: [`MigrationError`]; the container runs at its source and nothing is left here.
pub async fn migrate(
    node: &Arc<Node>,
    migration: &str,
    request: &Request,
) -> Result<(), MigrationError> {
    let begun = Instant::now();
    let container = &request.from.container;
    let (namespace, id) = (container.namespace(), container.id());
    node.events.step(migration, "request", &format!("{} to {}", request.from, node.config.node));
    match node.containerd.container(namespace, id).await {
        Err(ClientError::NotFound(_)) => {}
        Ok(_) => return Err(MigrationError::Exists(container.clone())),
        Err(error) => return Err(error.into()),
    }
    let connections = connect(node, &request.from.node, &request.settings).await?;
    let described = describe_at(&connections.source, container).await?;
    pre_flight(node, &described)?;
    for warning in &described.warnings {
        node.events.step(migration, "request", warning);
    }

    node.events.step(migration, "pre-copy", "image");
    let target = image_of(&described)?;
    let named = (described.image.as_str(), &target);
    let content =
        image::bring(node, namespace, named, &described.snapshotter, &connections).await?;
    let record = record(node, request, &described)?;
    let chain_id = content.chain_id().map(|chain_id| chain_id.to_string());
    let mounts =
        node.containerd.prepare(namespace, &described.snapshotter, id, chain_id.as_deref()).await?;

    let started = async {
        node.containerd.create_container(namespace, record).await?;
        let migration = migration.to_owned();
        let prepared = Prepared { migration, begun, connections, remove_source: true };
        node.sessions.prepare(container, prepared);
        node.containerd.create_task(namespace, id, mounts).await?;
        node.containerd.start_task(namespace, id).await
    };
    match started.await {
        Ok(_) => Ok(()),
        Err(error) => {
            node.sessions.take_prepared(container);
            super::remove_container(node, container).await;
            let _ = node.containerd.remove_snapshot(namespace, &described.snapshotter, id).await;
            Err(match error {
                ClientError::Failed { reason, .. } => MigrationError::Restore(reason),
                other => other.into(),
            })
        }
    }
}

/// What the source says of a container.
pub async fn describe_at(
    source: &crate::peer::Connection,
    container: &ContainerRef,
) -> Result<DescribeResponse, MigrationError> {
    let asked = DescribeRequest {
        container: Some(PeerContainer {
            namespace: container.namespace().to_owned(),
            id: container.id().to_owned(),
        }),
    };
    let answer = source.client().describe(asked).await;
    Ok(answer.map_err(|status| source.refused(status))?.into_inner())
}

fn image_of(described: &DescribeResponse) -> Result<Descriptor, MigrationError> {
    if described.image_digest.is_empty() {
        return Err(MigrationError::NoImage(described.image.clone()));
    }
    Ok(Descriptor {
        media_type: described.image_media_type.clone(),
        digest: described.image_digest.parse()?,
        size_bytes: u64::try_from(described.image_size).unwrap_or(0),
    })
}

/// What would make the restore fail, before anything moves.
fn pre_flight(node: &Node, described: &DescribeResponse) -> Result<(), MigrationError> {
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

fn record(
    node: &Node,
    request: &Request,
    described: &DescribeResponse,
) -> Result<Container, MigrationError> {
    let yes_no = |yes| if yes { "yes" } else { "no" }.to_owned();
    let settings = [
        (annotation::MODE, mode_word(&request.settings).to_owned()),
        (annotation::MAX_ROUNDS, request.settings.max_rounds.to_string()),
        (annotation::WRITABLE_LAYER, yes_no(request.settings.writable_layer)),
    ];
    let netns = request.netns.as_deref().map(Path::new);
    let wanted = spec::Wanted { from: &request.from, netns, settings: &settings };
    let spec = spec::derive(&described.spec_json, &node.config.admit, &wanted)?;
    let id = request.from.container.id().to_owned();
    Ok(Container {
        snapshot_key: id.clone(),
        id,
        image: described.image.clone(),
        runtime: Runtime { name: RUNTIME.to_owned(), options: None },
        snapshotter: described.snapshotter.clone(),
        labels: described.labels.clone(),
        spec: serde_json::to_vec(&spec).map_err(spec::SpecError::Parse)?,
    })
}
