//! Files and directories that are watched.

use std::path::Path;

use super::{Container, Findings};

/// Links of the descriptors that watch.
const WATCHING: &[&str] = &["anon_inode:inotify", "anon_inode:[fanotify]"];

/// Watches on the root file system, of which CRIU has to be told the paths: the shim does, if there
/// is one.
pub(super) fn on_overlays(container: &Container, found: &mut Findings) {
    let is_watching = |kind: &Path| WATCHING.iter().any(|known| kind == Path::new(known));
    let mut watching = container
        .inside()
        .filter(|process| process.files.iter().any(|file| is_watching(&file.target)));
    let Some(first) = watching.next() else { return };
    let pids: Vec<u32> = container.inside().map(|process| process.pid).collect();
    let lost = criu_wrapper::watches::find(container.init_pid, &pids).lost;
    if !lost.is_empty() {
        found.obstacle(
            format!(
                "{} or another process watches {} files or directories of the root file system that have no path",
                first.named(),
                lost.len()
            ),
            "CRIU restores a watch by its path, which was removed or has blanks or quotes in it",
            "have it watch directories that stay, or those of a volume",
        );
    }
}
