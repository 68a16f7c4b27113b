//! What a destination journals of a container that came: that its tasks ran, that all of it is on
//! the disk, or that no task ran and none will.
//!
//! A source removes its copy only when it hears that all of it is on this node's disk. A machine
//! that stopped between the two steps never says so: what came may be torn, and a person decides
//! (`godwit resolve`).

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::ContainerRef;

use super::{MigrationError, blocking, marks};
use crate::content::on;
use crate::node::Node;
use crate::ownership::{Epoch, Event, Outcome, Ownership};

/// How long after a restart a shim may still ask for a container that was claimed: it asks every
/// 200 ms.
const CLAIM_GRACE: Duration = Duration::from_secs(5);

/// How often making it durable is tried again.
const DURABLE_PAUSE: Duration = Duration::from_secs(10);

/// Journals that the tasks of a granted container ran, or may have, and notes it with the
/// container. Idempotent.
pub(super) async fn ran(
    node: &Arc<Node>,
    container: &ContainerRef,
) -> Result<Option<Epoch>, MigrationError> {
    let ledger = node.journal.ledger(container)?;
    let epoch = match ledger.state {
        Some(Ownership::Granted(epoch, _)) => {
            node.journal.apply(container, &Event::Ran(epoch), |_| {})?;
            epoch
        }
        Some(Ownership::Owner(epoch)) if ledger.ended.contains_key(&epoch) => epoch,
        _ => return Ok(None),
    };
    node.volumes.arrived(container)?;
    let annotation = node.journal.container(container)?.and_then(|entry| entry.migrate_from);
    if let Some(annotation) = annotation {
        marks::note_came(node, container, &annotation).await;
    }
    Ok(Some(epoch))
}

/// Has the disk write all that came: volumes, snapshots and journal, and containerd's record of the
/// container. Then journals that.
///
/// Errors: the disk fails; the source keeps its copy until this succeeds.
pub(super) async fn make_durable(
    node: &Arc<Node>,
    container: &ContainerRef,
    epoch: Epoch,
) -> Result<(), MigrationError> {
    let places = [node.config.state_dir.clone(), node.config.containerd_root.clone()];
    blocking(move || places.iter().try_for_each(|place| sync_file_system(place))).await?;
    node.journal.apply(container, &Event::Durable(epoch), |_| {})?;
    Ok(())
}

/// The same until it succeeds.
pub(super) fn make_durable_later(node: &Arc<Node>, container: &ContainerRef, epoch: Epoch) {
    let (node, container) = (node.clone(), container.clone());
    tokio::spawn(async move {
        while let Err(error) = make_durable(&node, &container, epoch).await {
            tracing::error!(%container, error = error.chain(), "cannot flush what came; trying again");
            tokio::time::sleep(DURABLE_PAUSE).await;
        }
    });
}

/// Makes everything on the file system of `path` durable. One that is not there has nothing on it.
fn sync_file_system(path: &Path) -> Result<(), MigrationError> {
    let directory = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(on("open", path))?,
    };
    Ok(nix::unistd::syncfs(directory).map_err(on("sync", path))?)
}

/// Gives a claim back whose session ended with an earlier daemon, unless a shim asks for it
/// meanwhile.
pub(super) async fn give_back_unless_claimed(node: &Node, container: &ContainerRef, epoch: Epoch) {
    tokio::time::sleep(CLAIM_GRACE).await;
    // Granted by then, or given back: out of phase.
    if node.journal.apply(container, &Event::GiveBack(epoch), |_| {}).is_ok() {
        tracing::warn!(%container, epoch = epoch.0, "claimed by an earlier daemon; given back");
    }
}

/// After a restart: what ran here before and is not known to be on the disk.
pub(super) fn recover(node: &Arc<Node>) -> Result<(), MigrationError> {
    for (container, epoch, tombstone) in node.journal.tombstones()? {
        if tombstone.is_torn() {
            tracing::error!(
                %container, epoch = epoch.0, peer = tombstone.ended.peer,
                "this machine stopped before all that came was on its disk; the source keeps its copy: see `godwit resolve`"
            );
        } else if tombstone.ended.outcome == Outcome::Ran {
            make_durable_later(node, &container, epoch);
        }
    }
    Ok(())
}
