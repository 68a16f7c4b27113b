//! Processes that cannot be dumped, or are not dumped.

use super::{Container, Findings};

/// Processes that `exec` added are no children of the init process: CRIU does not see them.
pub(super) fn added_by_exec(container: &Container, found: &mut Findings) {
    if !container.execs.is_empty() {
        found.warning(
            format!("processes added by exec do not move: {}", container.execs.join(", ")),
            "CRIU dumps the init process and its descendants",
            "start them again at the destination",
        );
    }
}

/// CRIU attaches to every task by ptrace, of which a task can have one at a time.
pub(super) fn traced(container: &Container, found: &mut Findings) {
    for process in &container.processes {
        if let Some(tracer) = process.status("TracerPid").filter(|tracer| *tracer != "0") {
            found.obstacle(
                format!("{} is traced by process {tracer} of the node", process.named()),
                "CRIU cannot dump a process while a debugger is attached",
                "detach it",
            );
        }
    }
}
