//! Restores whose shims died while no daemon could hear of it.
//!
//! A shim notes on disk how far a container is that it restores ([`criu_wrapper::held`]). When it
//! dies, containerd has its `delete` end the restore and report to the daemon. If the daemon was
//! away, or containerd died as well, the note is still there when the daemon starts: restored tasks
//! are stopped or frozen then, and stay so until [`end_all`] ends them and settles their sessions.

use std::path::{Path, PathBuf};
use std::process::Command;

use criu_wrapper::{held, locks};
use godwit_protos::ContainerRef;

use super::destination::{self, Sessions, Settlement};

/// Ends every orphaned restore noted below `holds`, and settles its session.
pub async fn end_all(sessions: &Sessions, holds: &Path) {
    for (container, path) in noted_in(holds) {
        let place = path.clone();
        let ended = tokio::task::spawn_blocking(move || {
            let record = held::end_orphan(&place)?;
            if let Some(network) = record.as_ref().map(|record| record.network.as_str())
                && !network.is_empty()
            {
                let run = |command: &mut Command| Ok(command.status()?.success());
                locks::lift(Path::new(network), &run)?;
            }
            std::io::Result::Ok(record)
        });
        let record = match ended.await.unwrap_or_else(|panic| Err(panic.into())) {
            Ok(Some(record)) => record,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(%container, %error, "an orphaned restore cannot be ended");
                continue;
            }
        };
        let may_have_run = record.may_have_run.unwrap_or(true);
        tracing::warn!(%container, may_have_run, "ended a restore whose shim died");
        let reason = "its shim died while it was restored".to_owned();
        let settlement = Settlement { running: false, reason, may_have_run };
        destination::settle(sessions, &record.session, settlement).await;
        held::forget(&path);
    }
}

/// Records below a directory, by container. Other names are skipped.
fn noted_in(holds: &Path) -> Vec<(ContainerRef, PathBuf)> {
    let list = |directory: &Path| {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect::<Vec<_>>()
    };
    let mut found = Vec::new();
    for namespace in list(holds) {
        let directory = holds.join(&namespace);
        for id in list(&directory) {
            if let Ok(container) = ContainerRef::new(&namespace, &id) {
                found.push((container, directory.join(id)));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_found_by_container_and_other_files_are_not() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(noted_in(&directory.path().join("absent")), []);
        std::fs::create_dir(directory.path().join("default")).unwrap();
        for name in ["c1", ".c1.lock", ".c1.new"] {
            std::fs::write(directory.path().join("default").join(name), "").unwrap();
        }
        let c1 = ContainerRef::new("default", "c1").unwrap();
        assert_eq!(noted_in(directory.path()), [(c1, directory.path().join("default/c1"))]);
    }
}
