//! Processes that cannot be dumped, or are not dumped.

use super::{Container, Findings, Process};

/// Kinds of namespaces of which CRIU dumps those of the init process only (`generate_ns_id` in
/// `criu/namespaces.c`). A second mount namespace moves.
const SINGLE: &[(&str, &str)] = &[
    ("pid", "process id"),
    ("net", "network"),
    ("user", "user"),
    ("ipc", "IPC"),
    ("uts", "UTS"),
    ("time", "time"),
    ("cgroup", "control group"),
];

/// Processes that CRIU does not see, since they do not descend from the init process: those that
/// `exec` added.
pub(super) fn outside_the_tree(container: &Container, found: &mut Findings) {
    let outside = container.outside();
    if outside.is_empty() && container.execs.is_empty() {
        return;
    }
    let mut names: Vec<String> = outside.iter().map(|process| process.named()).collect();
    if names.is_empty() {
        names.clone_from(&container.execs);
    }
    found.warning(
        format!("processes added by exec do not move: {}", names.join(", ")),
        "CRIU dumps the init process and its descendants, and these end at the source",
        "start them again at the destination",
    );
}

/// CRIU attaches to every task by ptrace, of which a task can have one at a time.
pub(super) fn traced(container: &Container, found: &mut Findings) {
    for process in container.inside() {
        if let Some(tracer) = process.status("TracerPid").filter(|tracer| *tracer != "0") {
            let tracer = container.named(tracer.parse().unwrap_or(0));
            found.obstacle(
                format!("{} is traced by {tracer}", process.named()),
                "CRIU cannot dump a process while a debugger is attached",
                "detach it",
            );
        }
    }
}

/// Namespaces that a process of the container made for itself, as a browser's or a build's sandbox
/// does.
pub(super) fn own_namespaces(container: &Container, found: &mut Findings) {
    let Some(init) = container.init() else { return };
    for process in container.inside() {
        for (kind, name) in SINGLE {
            let of = |process: &Process| process.namespaces.get(*kind).cloned();
            // A namespace that the process can no longer be asked for is not another one.
            if of(process).is_none_or(|own| Some(own) == of(init)) {
                continue;
            }
            found.obstacle(
                format!("{} is in a {name} namespace of its own", process.named()),
                "CRIU does not dump a second one inside a container",
                "end it, or run it without the sandbox that makes the namespace",
            );
        }
    }
}

/// On version 1 of control groups CRIU waits for ever for a process that a signal stopped.
pub(super) fn stopped(container: &Container, found: &mut Findings) {
    for process in container.inside() {
        let is_stopped = process.status("State").is_some_and(|state| state.starts_with('T'));
        if is_stopped && has_freezer(process.pid) {
            found.obstacle(
                format!("{} is stopped by a signal", process.named()),
                "on version 1 of control groups its dump would hang",
                "continue it with SIGCONT, or end it",
            );
        }
    }
}

/// Whether the control groups of a process are of version 1.
fn has_freezer(pid: u32) -> bool {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    groups.lines().any(|line| line.split(':').nth(1) == Some("freezer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, parent: u32, more: &str, net: &str) -> Process {
        Process {
            pid,
            status: format!("Name:\tp{pid}\nNSpid:\t{pid}\nPPid:\t{parent}\n{more}"),
            namespaces: [("net".to_owned(), net.to_owned())].into(),
            ..Process::default()
        }
    }

    /// Method: pids beyond the largest that Linux gives, so that no process of this machine is one
    /// of them.
    const INIT: u32 = 1 << 30;

    fn found(kind: fn(&Container, &mut Findings), processes: Vec<Process>) -> Findings {
        let mut found = Findings::default();
        kind(&Container { init_pid: INIT, processes, ..Container::default() }, &mut found);
        found
    }

    #[test]
    fn what_does_not_descend_from_init_is_named() {
        let ours = || process(INIT, 1, "", "a");
        let tree =
            vec![process(INIT + 2, INIT + 1, "", "a"), ours(), process(INIT + 1, INIT, "", "a")];
        assert_eq!(found(outside_the_tree, tree), Findings::default());
        let told = found(outside_the_tree, vec![ours(), process(INIT + 3, 7, "", "a")]).warnings;
        assert!(told[0].contains(&format!("process {} (p{})", INIT + 3, INIT + 3)), "{told:?}");
    }

    #[test]
    fn a_tracer_is_named_and_what_exec_added_is_not_looked_at() {
        let traced = |parent| process(INIT + 1, parent, &format!("TracerPid:\t{INIT}\n"), "a");
        let told =
            found(super::traced, vec![process(INIT, 1, "TracerPid:\t0\n", "a"), traced(INIT)]);
        let expected = format!("is traced by process {INIT} (p{INIT})");
        assert!(told.obstacles[0].contains(&expected), "{told:?}");
        let added = found(super::traced, vec![process(INIT, 1, "", "a"), traced(1)]);
        assert_eq!(added, Findings::default());
    }

    #[test]
    fn a_second_network_namespace_is_an_obstacle() {
        let told = found(
            own_namespaces,
            vec![process(INIT, 1, "", "net:[1]"), process(INIT + 1, INIT, "", "net:[2]")],
        );
        assert!(told.obstacles[0].contains("a network namespace of its own"), "{told:?}");
    }
}
