//! Following containerd: a container that is deleted there is forgotten here, and what an earlier
//! daemon left there is seen to once.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use godwit_protos::ContainerRef;

use super::deletion::{Absence, LOOK_INTERVAL};
use super::{MigrationError, request};
use crate::containerd::{Event, EventKind};
use crate::node::Node;
use crate::supervise::Supervisor;

/// How long until what an earlier daemon left is seen to again.
const RECOVER_PAUSE: Duration = Duration::from_secs(10);

/// Follows containerd: what is deleted there is forgotten here. Runs until the daemon ends.
pub async fn containerd(node: Arc<Node>, supervisor: Supervisor) {
    let mut follower =
        Follower { node, supervisor, absence: Absence::default(), has_recovered: false };
    loop {
        if let Err(error) = follower.follow().await {
            tracing::warn!(error = error.chain(), "lost containerd; trying again");
        }
        follower.absence.lost_contact();
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

struct Follower {
    node: Arc<Node>,
    supervisor: Supervisor,
    absence: Absence,
    /// Whether what an earlier daemon left in containerd is being seen to.
    has_recovered: bool,
}

impl Follower {
    async fn follow(&mut self) -> Result<(), MigrationError> {
        let filter = r#"topic=="/containers/delete""#;
        let mut events = self.node.containerd.subscribe(&[filter]).await?;
        if !self.node.containerd.has_snapshotter(godwit_protos::SNAPSHOTTER).await? {
            tracing::warn!(
                "containerd's configuration has no snapshotter {:?}: see docs/deploy/containerd/godwit.toml; \
                 its `imports` line must stand above the first table of config.toml",
                godwit_protos::SNAPSHOTTER
            );
        }
        // Subscribed first, so that no deletion falls between the two. The stream ends with the
        // containerd that it comes from, so that its events are those of this UUID.
        let uuid = self.node.containerd.uuid().await?;
        self.absence.forget_deleted(&self.node, &uuid).await?;
        if !std::mem::replace(&mut self.has_recovered, true) {
            self.supervisor.run("recovery", recover_containers(self.node.clone()));
        }
        loop {
            match tokio::time::timeout(LOOK_INTERVAL, events.next()).await {
                Err(_elapsed) => {}
                Ok(None) => return Ok(()),
                Ok(Some(event)) => {
                    let Event { namespace, kind, .. } = event?;
                    let EventKind::ContainerDeleted { id } = kind else { continue };
                    tracing::debug!(namespace, id, "container deleted");
                    if let Ok(container) = ContainerRef::new(&namespace, &id) {
                        self.absence.reported(container, &uuid);
                    }
                }
            }
            self.absence.forget_deleted(&self.node, &uuid).await?;
        }
    }
}

/// Sees to what an earlier daemon left in containerd. While one container cannot be seen to,
/// this tries again, and the others are served.
async fn recover_containers(node: Arc<Node>) {
    let mut is_tidy = false;
    loop {
        let settled = request::settle_what_came(&node).await;
        let mut done = settled.and(delete_abandoned_leases(&node).await);
        if !is_tidy {
            let removed = request::remove_abandoned(&node);
            is_tidy = removed.is_ok();
            done = done.and(removed);
        }
        match done {
            Ok(()) => return,
            Err(error) => {
                let error = error.chain();
                tracing::warn!(
                    error,
                    "not all that an earlier daemon left could be seen to; trying again"
                );
            }
        }
        tokio::time::sleep(RECOVER_PAUSE).await;
    }
}

async fn delete_abandoned_leases(node: &Node) -> Result<(), MigrationError> {
    Ok(node.containerd.delete_abandoned_leases().await?)
}
