//! What a CRIU that came to no good end leaves: looked for after every such dump and restore,
//! before every restore for a migration, and by `delete` behind a dead shim.
//!
//! | left | where | removed by |
//! |---|---|---|
//! | packet locks | network namespace | [`lift_locks`] |
//! | TCP sockets in repair mode, which no program can use | the dumped tasks | [`after_dump`] |
//! | links beside removed names of open files | the dumped tasks' files | [`after_dump`] |
//! | CRIU, its script, tasks | the container's control group | [`criu_wrapper::held::Record`] |
//! | mounts | CRIU's work directory, the runtime's state | [`crate::rootfs::unmount_leftovers`] |
//!
//! Names of Unix sockets that a restore made lie in the copies that it worked on, which go with it.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use criu_wrapper::{leftovers, locks};
use godwit_protos::ContainerRef;

use crate::reap::Reaper;

/// Lifts CRIU's packet locks in the network namespace at `path`.
pub(crate) async fn lift_locks(path: &Path, reaper: &Arc<Reaper>, name: &ContainerRef) {
    let (path, reaper) = (path.to_owned(), Arc::clone(reaper));
    let lifted = tokio::task::spawn_blocking(move || {
        let run = |command: &mut Command| {
            let (_, ended) = reaper.spawn(command)?;
            Ok(ended.blocking_recv().is_ok_and(|exit| exit.code == 0))
        };
        locks::lift(&path, &run)
    });
    match lifted.await.unwrap_or_else(|panic| Err(io::Error::other(panic))) {
        Ok(lifted) if lifted.is_empty() => {}
        Ok(lifted) => tracing::warn!("{name}: lifted CRIU's packet locks: {}", lifted.join(", ")),
        Err(error) => tracing::error!("{name}: CRIU's packet locks may be left: {error}"),
    }
}

/// Removes what a failed dump left of the container, whose init process is `init`.
pub(crate) async fn after_dump(
    init: u32,
    processes: BTreeSet<u32>,
    reaper: &Arc<Reaper>,
    name: &ContainerRef,
) {
    lift_locks(Path::new(&format!("/proc/{init}/ns/net")), reaper, name).await;
    let removing = tokio::task::spawn_blocking(move || {
        (locks::end_repair(&processes), leftovers::remove_links(&processes))
    });
    if let Ok((sockets, links)) = removing.await
        && sockets + links > 0
    {
        tracing::warn!("{name}: CRIU left {sockets} connections in repair, {links} links");
    }
}
