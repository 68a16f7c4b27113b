//! How an offer ends at the source: taken back, given away for good, or run here again.
//!
//! Before the release an offer is taken back by a thaw. After it only the destination's word counts: that the tasks have run
//! there ([`Remembered::let_go`] ends them here), or that they never did ([`take_back`]). If that word was lost,
//! [`settle_later`] asks for it until it comes; [`recover`] goes on with that after a restart. A destination whose journal
//! does not know the container answers neither, and the container stays frozen and fenced for an operator to decide.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::peer::OwnershipRequest;
use godwit_protos::{ContainerRef, MigrateFrom, VolumeId};

use super::MigrationError;
use super::shim::Shim;
use super::subjects::{Version, newest};
use crate::node::Node;
use crate::ownership::journal::Entry;
use crate::ownership::{Epoch, Event, Ownership};
use crate::peer::Connection;
use crate::retention::{admitted, record};
use crate::store::Lease;
use crate::supervise::Supervisor;

/// Attempts to thaw: a dump that hangs holds the container until its watchdog ends it.
const THAWS_MAX: u32 = 300;

/// Pause between them.
const THAW_PAUSE: Duration = Duration::from_secs(2);

/// Takes an offer back: 1. journal, 2. thaw, 3. journal that it is thawed. On open: what is ours and frozen is thawed.
///
/// The journal decides, not the caller: what is not `Offered` any more is left as it is.
pub(super) async fn take_offer_back(node: &Node, container: &ContainerRef, epoch: Epoch) {
    match node.journal.apply(container, &Event::Abort(epoch), |_| {}) {
        Ok(_) => thaw(node, container).await,
        Err(error) => tracing::warn!(%container, %error, "the offer cannot be taken back"),
    }
}

/// Runs a released container here again, in the same steps: the destination has journalled that it never ran it.
pub(super) async fn take_back(node: &Node, container: &ContainerRef, epoch: Epoch) {
    tracing::warn!(%container, epoch = epoch.0, "the destination never ran it; thawing");
    match node.journal.apply(container, &Event::Returned(epoch), |_| {}) {
        Ok(_) => thaw(node, container).await,
        Err(error) => tracing::error!(%container, %error, "cannot journal the return"),
    }
}

/// Thaws a container that is ours until it succeeds, or until there is nothing left to thaw.
async fn thaw(node: &Node, container: &ContainerRef) {
    for attempt in 0..THAWS_MAX {
        let thawed = match Shim::find(&node.config, container) {
            Ok(shim) => shim.thaw(container.id()).await,
            Err(error) => {
                tracing::warn!(%container, error = error.chain(), "nothing to thaw");
                Ok(())
            }
        };
        match thawed {
            Ok(()) => {
                if let Err(error) = node.journal.note(container, |entry| entry.frozen = false) {
                    tracing::error!(%container, %error, "cannot journal the thaw; it is repeated");
                }
                return;
            }
            Err(error) => {
                tracing::error!(%container, attempt, error = error.chain(), "cannot thaw");
            }
        }
        tokio::time::sleep(THAW_PAUSE).await;
    }
}

/// Asks the destination how the restore of a released container ended, until it answers.
pub(super) async fn settle_later(
    node: &Arc<Node>,
    container: &ContainerRef,
    remembered: Option<Remembered>,
) {
    let mut pause = Duration::from_millis(200);
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(30));
        let entry = match node.journal.container(container) {
            Ok(Some(entry)) => match entry.ownership.clone() {
                Ownership::Released(epoch, to) => (epoch, to, entry),
                _ => return,
            },
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%container, %error, "journal");
                continue;
            }
        };
        let answer = ask_owner(node, &entry.1).await;
        let answer =
            answer.map(|(state, epoch)| if epoch < entry.0 { "unknown".to_owned() } else { state });
        match answer.as_deref() {
            // The node that gave it on has owned it.
            Ok("owner" | "offered" | "released") => {
                let remembered = match remembered {
                    Some(remembered) => remembered,
                    None => Remembered::after_restart(container, &entry.1, &entry.2),
                };
                return remembered.let_go(node).await;
            }
            Ok("returned") => return take_back(node, container, entry.0).await,
            Ok(state) => tracing::info!(%container, state, "waiting for the destination"),
            Err(error) => {
                tracing::warn!(%container, error = error.chain(), "waiting for the destination");
            }
        }
    }
}

/// What another node's journal says of a container.
pub(super) async fn ask_owner(node: &Node, there: &str) -> Result<(String, Epoch), MigrationError> {
    let MigrateFrom { node: peer, container } = there.parse()?;
    let connection = Connection::open(&node.config, &peer, Duration::from_secs(5)).await?;
    let asked = OwnershipRequest {
        container: Some(godwit_protos::peer::Container {
            namespace: container.namespace().to_owned(),
            id: container.id().to_owned(),
        }),
    };
    let answer = connection.client().ownership(asked).await;
    let answer = answer.map_err(|status| connection.refused(status))?.into_inner();
    Ok((answer.state, Epoch(answer.epoch)))
}

/// Goes on after a restart with what the journal holds: an offer is taken back, a release is settled.
pub fn recover(node: &Arc<Node>, supervisor: &Supervisor) -> Result<(), MigrationError> {
    for (container, entry) in node.journal.containers()? {
        let node = node.clone();
        match entry.ownership {
            Ownership::Offered(epoch, _) => {
                supervisor.run("taking back an offer", async move {
                    take_offer_back(&node, &container, epoch).await;
                });
            }
            Ownership::Released(..) if !entry.let_go => {
                supervisor.run("settling a release", async move {
                    settle_later(&node, &container, None).await;
                });
            }
            Ownership::Owner(_) if entry.frozen => {
                supervisor.run("thawing", async move { thaw(&node, &container).await });
            }
            Ownership::Released(..)
            | Ownership::Owner(_)
            | Ownership::Claiming(..)
            | Ownership::Returned(..) => {}
        }
    }
    Ok(())
}

/// Takes back every offer, before the daemon ends.
pub async fn take_offers_back(node: &Node) {
    for (container, entry) in node.journal.containers().unwrap_or_default() {
        if let Ownership::Offered(epoch, _) = entry.ownership {
            take_offer_back(node, &container, epoch).await;
        }
    }
}

/// What remains to be done once the container runs elsewhere.
pub(super) struct Remembered {
    pub(super) container: ContainerRef,
    pub(super) destination: String,
    pub(super) remove_source: bool,
    pub(super) volumes: Vec<VolumeId>,
    pub(super) versions: Vec<Version>,
    pub(super) directory: Option<PathBuf>,
    pub(super) lease: Option<Arc<Lease>>,
}

impl Remembered {
    /// After a restart the session is gone: what the journal knows. The snapshots of the cut are not among it.
    fn after_restart(container: &ContainerRef, offered_as: &str, entry: &Entry) -> Self {
        Self {
            container: container.clone(),
            destination: offered_as.split('/').next().unwrap_or_default().to_owned(),
            remove_source: entry.remove_source,
            volumes: entry.volumes.iter().filter_map(|id| id.parse().ok()).collect(),
            versions: Vec::new(),
            directory: None,
            lease: None,
        }
    }

    /// Ends the tasks, keeps the snapshots, gives the volumes away. Each step is safe to leave undone: a snapshot less
    /// makes the next migration slower, and a volume that stays is fenced with its container.
    pub(super) async fn let_go(self, node: &Arc<Node>) {
        let container = &self.container;
        let ended = async { Shim::find(&node.config, container)?.let_go(container.id()).await };
        if let Err(error) = ended.await {
            tracing::error!(%container, error = error.chain(), "cannot end the tasks that moved away");
        }
        node.observed.moved_away(container);
        let (here, versions) = (node.clone(), self.versions);
        let kept = tokio::task::spawn_blocking(move || {
            let snapshots = newest(&here.store, &versions, &here.config.node)?;
            record(&here, &admitted(&here, snapshots))
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(%container, %error, "cannot keep the snapshots");
        }
        if self.remove_source {
            super::remove_container(node, container).await;
        }
        let (volumes, ids, to) = (node.volumes.clone(), self.volumes, self.destination);
        let given = tokio::task::spawn_blocking(move || {
            let give = |id: &VolumeId| (id.clone(), volumes.give_away(id, &to));
            ids.iter().map(give).collect::<Vec<_>>()
        });
        for (volume, given) in given.await.unwrap_or_default() {
            match given {
                // It may come back from now on; deleting takes as long as it is large.
                Ok(removed) => drop(tokio::task::spawn_blocking(|| removed.delete())),
                Err(error) => {
                    tracing::warn!(%container, %volume, %error, "cannot remove a volume that moved away");
                }
            }
        }
        if let Err(error) = node.journal.note(container, |entry| entry.let_go = true) {
            tracing::error!(%container, %error, "cannot journal that it was let go");
        }
        if let Some(directory) = self.directory {
            let _ = tokio::fs::remove_dir_all(directory).await;
        }
        drop(self.lease);
    }
}
