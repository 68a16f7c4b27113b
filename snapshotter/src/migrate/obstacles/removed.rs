//! Open files whose own name was removed.

use super::{Container, Findings};
use crate::migrate::links::removed_files;

/// CRIU gives a removed file that another hard link leads to a name for the dump. It cannot while a
/// block volume is frozen, since making a name there would wait for the thaw.
pub(super) fn beside_block_volumes(container: &Container, found: &mut Findings) {
    if !container.volumes.iter().any(|volume| volume.file_system.is_some()) {
        return;
    }
    let pids: Vec<u32> = container.processes.iter().map(|process| process.pid).collect();
    let mut paths: Vec<_> = removed_files(&pids).into_keys().collect();
    paths.sort_unstable();
    for path in paths {
        found.obstacle(
            format!(
                "the open file {} was removed while another hard link to it is left",
                path.display()
            ),
            "CRIU needs a new name for it, and the container's block volume takes none during a dump",
            "have the process that uses it close it, or keep the container's data on tree volumes",
        );
    }
}
