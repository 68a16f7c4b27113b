//! Which journalled containers containerd has deleted, looked for on this node; [`absence`] has the
//! rules.
//!
//! [`absence`]: crate::ownership::absence

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use godwit_protos::ContainerRef;

use super::{MigrationError, blocking};
use crate::containerd::ClientError;
use crate::node::Node;
use crate::ownership::Ownership;
use crate::ownership::absence::{Incarnation, Seen, Watched, is_deleted};
use crate::ownership::journal::Entry;

/// How often absent containers are looked for.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Directories of control groups that are searched for a name at most.
const CGROUPS_MAX: usize = 100_000;

/// The journalled containers that containerd may have deleted.
#[derive(Debug, Default)]
pub struct Absence {
    /// Each with the UUID of the containerd that reported it.
    reported: HashMap<ContainerRef, String>,
    watched: HashMap<ContainerRef, Watched>,
}

impl Absence {
    /// The containerd `uuid` reported a deletion.
    pub fn reported(&mut self, container: ContainerRef, uuid: &str) {
        self.reported.insert(container, uuid.to_owned());
    }

    /// containerd was lost: what was absent may have come and gone.
    pub fn lost_contact(&mut self) {
        self.watched.values_mut().for_each(Watched::lost_contact);
    }

    /// Forgets those journalled containers that were deleted from the containerd `uuid`, whose
    /// events were [reported](Self::reported).
    ///
    /// Errors: containerd does not answer, or the journal fails; calling again goes on.
    pub async fn forget_deleted(&mut self, node: &Node, uuid: &str) -> Result<(), MigrationError> {
        let mut before = std::mem::take(&mut self.watched);
        let entries = node.journal.containers()?;
        for (container, _) in &entries {
            let mut watched = before.remove(container).unwrap_or_default();
            if let Some(uuid) = self.reported.remove(container) {
                watched.deleted_in = Some(uuid);
            }
            self.watched.insert(container.clone(), watched);
        }
        self.reported.clear();
        for (container, entry) in entries {
            if !may_be_forgotten(&entry) {
                continue;
            }
            let seen = look(node, &container).await?;
            let watched = self.watched.entry(container.clone()).or_default();
            let evidence = watched.look(uuid, seen, Instant::now());
            if is_deleted(entry.incarnation.as_ref(), uuid, &evidence) {
                // Another containerd may have answered: one that was started on another root.
                if node.containerd.uuid().await? != uuid {
                    return Ok(());
                }
                tracing::info!(%container, ?evidence, "deleted; its entry ends");
                node.journal.forget(&container)?;
                self.watched.remove(&container);
            }
        }
        Ok(())
    }
}

/// Whether the entry of a deleted container may end. What is being handed over is settled first; a
/// released container that was deleted is given away.
fn may_be_forgotten(entry: &Entry) -> bool {
    !entry.ownership.is_open() || matches!(entry.ownership, Ownership::Released(..))
}

/// Which container of this name containerd has. Errors: also that it has none.
pub async fn incarnation(
    node: &Node,
    container: &ContainerRef,
) -> Result<Incarnation, MigrationError> {
    let uuid = node.containerd.uuid().await?;
    let record = node.containerd.container(container.namespace(), container.id()).await?;
    Ok(Incarnation { containerd: uuid, created_at_ns: record.created_at_ns })
}

/// What is seen of a name. Errors: containerd cannot tell.
async fn look(node: &Node, container: &ContainerRef) -> Result<Seen, MigrationError> {
    let (namespace, id) = (container.namespace(), container.id());
    match node.containerd.container(namespace, id).await {
        Ok(record) => return Ok(Seen::Listed { created_at_ns: record.created_at_ns }),
        Err(ClientError::NotFound(_)) => {}
        Err(error) => return Err(error.into()),
    }
    if node.containerd.task(namespace, id).await?.is_some() {
        return Ok(Seen::Traces);
    }
    let bundle = node.config.containerd_state.join("io.containerd.runtime.v2.task");
    let bundle = bundle.join(namespace).join(id);
    let id = id.to_owned();
    blocking(move || {
        let has_traces = fs::symlink_metadata(bundle).is_ok()
            || runs_in_cgroup_of(Path::new("/sys/fs/cgroup"), &id);
        Ok(if has_traces { Seen::Traces } else { Seen::Nothing })
    })
    .await
}

/// Whether a control group below `root` that is named after the container holds a process: `ID`, or
/// `PREFIX-ID.scope` as systemd has it.
fn runs_in_cgroup_of(root: &Path, id: &str) -> bool {
    let scope = format!("-{id}.scope");
    let (mut left, mut todo) = (CGROUPS_MAX, vec![root.to_owned()]);
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            let Some(fewer) = left.checked_sub(1) else {
                // Cannot tell.
                return true;
            };
            left = fewer;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if (*name == *id || name.ends_with(&scope)) && has_process(&entry.path()) {
                return true;
            }
            todo.push(entry.path());
        }
    }
    false
}

/// Whether a control group, or one below it, holds a process.
fn has_process(cgroup: &Path) -> bool {
    let processes = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    let inner = fs::read_dir(cgroup).into_iter().flatten().flatten();
    !processes.trim().is_empty()
        || inner
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .any(|entry| has_process(&entry.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_in_a_control_group_of_the_name_is_a_trace_and_an_empty_group_is_none() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("memory/default/cache");
        fs::create_dir_all(group.join("inner")).unwrap();
        let procs = |text: &str| fs::write(group.join("inner/cgroup.procs"), text).unwrap();
        procs("\n");
        assert!(!runs_in_cgroup_of(root.path(), "cache"));
        procs("17\n");
        assert!(runs_in_cgroup_of(root.path(), "cache"));
        assert!(!runs_in_cgroup_of(root.path(), "che"));
        let scope = root.path().join("kubepods.slice/cri-containerd-cafe.scope");
        fs::create_dir_all(&scope).unwrap();
        fs::write(scope.join("cgroup.procs"), "18\n").unwrap();
        assert!(runs_in_cgroup_of(root.path(), "cafe"));
    }
}
