//! Marks: what a session made here, and its removal by mark.
//!
//! | made by a session | carries its name |
//! |---|---|
//! | container | as label `godwit.io/session` |
//! | snapshot of its root file system | as the same label |
//! | volume | as file `arriving` beside its data ([`crate::volumes`]) |
//! | staged files | as their directory's name ([`super::layout`]) |
//!
//! Promise: only what carries the mark is removed, never a container that came ([`CAME`]), never
//! what runs, and no step follows one that failed. A name alone permits nothing: during pre-copy
//! another client may create a container of the same name. A container that came says so itself, so
//! that it does not depend on this node's journal.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::ContainerRef;

use super::{MigrationError, terminal};
use crate::containerd::{Client, ClientError, Container, TaskStatus};
use crate::node::Node;

/// Label of a container or snapshot: the session that made it.
pub(super) const SESSION: &str = "godwit.io/session";

/// Label of a container whose state came here and ran: the annotation that brought it, which is
/// spent.
pub(super) const CAME: &str = "godwit.io/came";

/// Attempts to delete a task, and the pause between them: the exit of killed processes may still be
/// on its way.
const DELETIONS_MAX: u32 = 50;
const DELETION_PAUSE: Duration = Duration::from_millis(100);

/// Attempts to note that a container came, and the pause between them.
const NOTES_MAX: u32 = 600;
const NOTE_PAUSE: Duration = Duration::from_secs(1);

/// The labels of what a session makes.
pub(super) fn labels(session: &str) -> HashMap<String, String> {
    [(SESSION.to_owned(), session.to_owned())].into()
}

/// Whether a session made what has these labels, and it has not come.
pub(super) fn are_of(labels: &HashMap<String, String>, session: &str) -> bool {
    labels.get(SESSION).is_some_and(|of| of == session) && !labels.contains_key(CAME)
}

/// Takes the labels of another node's sessions from a description.
pub(super) fn strip(labels: &mut HashMap<String, String>) {
    labels.retain(|key, _| key != SESSION && key != CAME);
}

/// Whether the container came here by this annotation before.
pub(super) fn has_spent(record: &Container, annotation: &str) -> bool {
    record.labels.get(CAME).is_some_and(|came| came == annotation)
}

/// Notes with the container that it came, and tries again if containerd does not answer.
pub(super) async fn note_came(node: &Arc<Node>, container: &ContainerRef, annotation: &str) {
    if try_note_came(&node.containerd, container, annotation).await {
        return;
    }
    let (node, container, annotation) = (node.clone(), container.clone(), annotation.to_owned());
    tokio::spawn(async move {
        for _ in 0..NOTES_MAX {
            tokio::time::sleep(NOTE_PAUSE).await;
            if try_note_came(&node.containerd, &container, &annotation).await {
                return;
            }
        }
    });
}

/// Returns whether there is nothing left to try.
async fn try_note_came(containerd: &Client, container: &ContainerRef, annotation: &str) -> bool {
    let (namespace, id) = (container.namespace(), container.id());
    match containerd.set_container_label(namespace, id, (CAME, annotation)).await {
        Ok(()) | Err(ClientError::NotFound(_)) => true,
        Err(error) => {
            tracing::warn!(%container, %error, "cannot note with the container that it came");
            false
        }
    }
}

/// Removes task, record and snapshot that `session` made for a container which will never run here.
///
/// 1. delete the task, 2. delete the record, 3. remove the snapshot. Before each step containerd is
///    asked again whether the mark is there; without it nothing is done, and the rest is left to
///    its maker. `snapshotter` is needed where the record was never made.
///
/// Errors: [`MigrationError::StillRuns`]; containerd's. What follows the step that failed is
/// untouched. Repeating it is safe.
pub(super) async fn remove_made(
    node: &Node,
    container: &ContainerRef,
    session: &str,
    snapshotter: Option<&str>,
) -> Result<(), MigrationError> {
    let (namespace, id) = (container.namespace(), container.id());
    let record = find(node, container).await?;
    if record.as_ref().is_some_and(|record| are_of(&record.labels, session)) {
        delete_task(node, container).await?;
        // Its client may have deleted it meanwhile and made another one.
        let again = find(node, container).await?;
        if again.is_some_and(|record| are_of(&record.labels, session)) {
            absent_is_done(node.containerd.delete_container(namespace, id).await)?;
        }
    }
    let of_record = record.as_ref().map(|record| record.snapshotter.as_str());
    let Some(snapshotter) = snapshotter.or(of_record) else { return Ok(()) };
    // A client that made a record of this name meanwhile may have given it this snapshot.
    let refers = |other: &Container| other.snapshotter == snapshotter && other.snapshot_key == id;
    if find(node, container).await?.as_ref().is_some_and(refers) {
        return Ok(());
    }
    let labels = node.containerd.snapshot_labels(namespace, snapshotter, id).await?;
    if labels.is_some_and(|labels| are_of(&labels, session)) {
        absent_is_done(node.containerd.remove_snapshot(namespace, snapshotter, id).await)?;
    }
    Ok(())
}

async fn find(node: &Node, container: &ContainerRef) -> Result<Option<Container>, ClientError> {
    match node.containerd.container(container.namespace(), container.id()).await {
        Ok(record) => Ok(Some(record)),
        Err(ClientError::NotFound(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn absent_is_done(removed: Result<(), ClientError>) -> Result<(), ClientError> {
    match removed {
        Err(ClientError::NotFound(_)) => Ok(()),
        other => other,
    }
}

/// Deletes a task that does not run, and the FIFOs that it names.
///
/// Errors: [`MigrationError::StillRuns`]; the shim's or containerd's.
async fn delete_task(node: &Node, container: &ContainerRef) -> Result<(), MigrationError> {
    let (namespace, id) = (container.namespace(), container.id());
    let mut attempts = 0;
    loop {
        let Some(task) = node.containerd.task(namespace, id).await? else { return Ok(()) };
        let deleted = match task.status {
            TaskStatus::Running | TaskStatus::Paused | TaskStatus::Pausing => {
                Err(MigrationError::StillRuns(container.clone()))
            }
            // The shim, too, refuses to delete what runs.
            TaskStatus::Created | TaskStatus::Stopped | TaskStatus::Unknown => {
                let deleted = node.containerd.delete_task(namespace, id).await.map(drop);
                absent_is_done(deleted).map_err(MigrationError::from)
            }
        };
        attempts += 1;
        match deleted {
            Ok(()) => {
                terminal::remove_fifos(&task.streams);
                return Ok(());
            }
            Err(error) if attempts >= DELETIONS_MAX => return Err(error),
            Err(_) => tokio::time::sleep(DELETION_PAUSE).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_session_made_and_what_never_came_is_its_own() {
        let mut made = labels("one");
        assert!(are_of(&made, "one"));
        assert!(!are_of(&made, "two"));
        assert!(!are_of(&HashMap::new(), "one"));
        made.insert(CAME.to_owned(), "edge-a/default/cache".to_owned());
        assert!(!are_of(&made, "one"));
        strip(&mut made);
        assert_eq!(made, HashMap::new());
    }
}
