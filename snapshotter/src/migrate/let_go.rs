//! Letting go: what the source does once the destination has all of a container on its disk.
//!
//! 1. End the tasks. 2. Remove the container, if `godwit migrate` asked for it. 3. Keep the cut as
//!    snapshots. 4. Give the volumes away. 5. Journal that it moved, and that it was deleted: the
//!    event of a deletion is lost on a daemon that is just looking for a containerd that restarted.
//!
//! A step that fails is tried again, for ever and at growing pauses: containerd may be away. On
//! open: as the journal says "released" until step 5, the destination is asked again, and it begins
//! again.

use std::sync::Arc;
use std::time::Duration;

use godwit_protos::{ContainerRef, VolumeId};

use super::MigrationError;
use super::cut::DumpDirectory;
use super::deletion::incarnation;
use super::release::end_lease;
use super::shim::Shim;
use super::subjects::{Version, newest};
use super::terminal;
use crate::containerd::{ClientError, TaskStatus};
use crate::node::Node;
use crate::ownership::absence::Incarnation;
use crate::ownership::journal::{Entry, JournalError};
use crate::ownership::{Epoch, Event};
use crate::retention::{admitted, record};
use crate::store::Lease;

/// Pauses between attempts double from the first to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
const PAUSE_LAST: Duration = Duration::from_secs(60);

/// What remains to be done once the container runs elsewhere.
pub(super) struct Remembered {
    pub(super) container: ContainerRef,
    pub(super) epoch: Epoch,
    pub(super) destination: String,
    pub(super) remove_source: bool,
    pub(super) volumes: Vec<VolumeId>,
    pub(super) versions: Vec<Version>,
    pub(super) directory: Option<Arc<DumpDirectory>>,
    pub(super) lease: Option<Arc<Lease>>,
}

impl Remembered {
    /// After a restart the session is gone: what the journal knows. The snapshots of the cut are
    /// not among it.
    pub(super) fn after_restart(
        container: &ContainerRef,
        epoch: Epoch,
        offered_as: &str,
        entry: &Entry,
    ) -> Self {
        Self {
            container: container.clone(),
            epoch,
            destination: offered_as.split('/').next().unwrap_or_default().to_owned(),
            remove_source: entry.remove_source,
            volumes: entry.volumes.iter().filter_map(|id| id.parse().ok()).collect(),
            versions: Vec::new(),
            directory: None,
            lease: None,
        }
    }

    /// Does all of it. Caller: the destination has said that all of it is on its disk.
    pub(super) async fn let_go(self, node: &Arc<Node>) {
        let container = &self.container;
        node.observed.moved_away(container);
        let mut pause = PAUSE_FIRST;
        let is_deleted = loop {
            match self.end(node).await {
                Ok(is_deleted) => break is_deleted,
                Err(error) => {
                    let error = error.chain();
                    tracing::error!(%container, error, "cannot remove what moved away; trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(PAUSE_LAST);
                }
            }
        };
        let (here, versions) = (node.clone(), self.versions);
        let kept = tokio::task::spawn_blocking(move || {
            let snapshots = newest(&here.store, &versions, &here.config.node)?;
            record(&here, &admitted(&here, snapshots))
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(%container, %error, "cannot keep the snapshots");
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
        let moved =
            node.journal.apply(container, &Event::LetGo(self.epoch), |entry| entry.frozen = false);
        let ended = match moved {
            Ok(_) if is_deleted => node.journal.forget(container),
            moved => moved.map(drop),
        };
        match ended {
            // The event of the deletion may have ended the entry already.
            Ok(()) | Err(JournalError::OutOfPhase { .. }) => {}
            Err(error) => {
                tracing::error!(%container, %error, "cannot journal that it moved; it is done again");
            }
        }
        end_lease(node, container);
        drop((self.directory, self.lease));
    }

    /// Ends the tasks, and removes the container if it is to be. Returns whether it deleted the
    /// container. Errors: something is left; calling again goes on.
    async fn end(&self, node: &Node) -> Result<bool, MigrationError> {
        let (namespace, id) = (self.container.namespace(), self.container.id());
        let entry = node.journal.container(&self.container)?;
        let journalled = entry.and_then(|entry| entry.incarnation);
        let here = match incarnation(node, &self.container).await {
            Err(MigrationError::Containerd(ClientError::NotFound(_))) => None,
            here => Some(here?),
        };
        // One of the same name that was created since is not ours to end.
        if !is_ours(journalled.as_ref(), here.as_ref()) {
            tracing::warn!(container = %self.container, "another container has its name; it stays");
            return Ok(false);
        }
        let task = node.containerd.task(namespace, id).await?;
        let is_alive = |status| !matches!(status, TaskStatus::Stopped);
        if task.as_ref().is_some_and(|task| is_alive(task.status)) {
            Shim::find(&node.config, &self.container)?.let_go(id).await?;
        }
        if !self.remove_source {
            return Ok(false);
        }
        match node.containerd.delete_task(namespace, id).await {
            Ok(_) | Err(ClientError::NotFound(_)) => {
                if let Some(task) = task {
                    terminal::remove_fifos(&task.streams);
                }
            }
            Err(error) => return Err(error.into()),
        }
        let record = match node.containerd.container(namespace, id).await {
            Err(ClientError::NotFound(_)) => return Ok(false),
            record => record?,
        };
        // The snapshot first: once the record is gone, it is no longer known which one it is.
        if !record.snapshot_key.is_empty() {
            let (snapshotter, key) = (&record.snapshotter, &record.snapshot_key);
            match node.containerd.remove_snapshot(namespace, snapshotter, key).await {
                Ok(()) | Err(ClientError::NotFound(_)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        match node.containerd.delete_container(namespace, id).await {
            Ok(()) => Ok(true),
            Err(ClientError::NotFound(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Whether the container that is here is the one that was given away, or gone.
fn is_ours(journalled: Option<&Incarnation>, here: Option<&Incarnation>) -> bool {
    match (journalled, here) {
        (Some(journalled), Some(here)) => journalled == here,
        (None, _) | (_, None) => true,
    }
}
