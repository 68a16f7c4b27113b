//! Processes of a node, found and signalled from outside: entering the node would take longer than
//! some phases last.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use godwit_tests::Node;
use godwit_tests::command::wait_until;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cell::Program;

/// How long what was stopped takes until what waits for it has stopped, too.
const WAITER: Duration = Duration::from_millis(200);

/// A process, by the number that the host has for it.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    pub(crate) pid: i32,
    pub(crate) arguments: String,
}

/// Processes of a node itself: those of its containers have process namespaces of their own.
pub(crate) fn of_node(node: &Node) -> Vec<Process> {
    let namespace = |pid: &str| fs::read_link(PathBuf::from("/proc").join(pid).join("ns/pid")).ok();
    let Some(own) = namespace(&node.init().to_string()) else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let of_this_node = pids.filter(|pid| namespace(pid).as_ref() == Some(&own));
    of_this_node
        .filter_map(|pid| {
            let words = fs::read(PathBuf::from("/proc").join(&pid).join("cmdline")).ok()?;
            let arguments = String::from_utf8_lossy(&words).replace('\0', " ");
            Some(Process { pid: pid.parse().ok()?, arguments })
        })
        .collect()
}

/// Processes of a program at a node; the shim is that of the container `name`.
pub(crate) fn find(node: &Node, program: Program, name: &str) -> Vec<Process> {
    let mut found = of_node(node);
    found.retain(|process| {
        let words: Vec<&str> = process.arguments.split(' ').collect();
        let command = words.first().and_then(|word| word.rsplit('/').next()).unwrap_or_default();
        match program {
            Program::Daemon(_) => command == "godwit-snapshotter",
            Program::Containerd(_) => command == "containerd",
            Program::Shim(_) => {
                command == "containerd-shim-godwit-v1"
                    && words.windows(2).any(|pair| pair == ["-id", name])
            }
            Program::Criu => command == "criu",
            Program::Runc => {
                command == "runc" && (words.contains(&"checkpoint") || words.contains(&"restore"))
            }
            Program::Client => command == "godwit" && words.contains(&"migrate"),
        }
    });
    found
}

/// Sends a signal. Returns whether the process was there.
pub(crate) fn signal(pid: i32, signal: Signal) -> Result<bool> {
    match kill(Pid::from_raw(pid), signal) {
        Ok(()) => Ok(true),
        Err(Errno::ESRCH) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Lets stopped processes go on, and those that wait for them: `nsenter` stops with what it wraps.
pub(crate) fn go_on(pids: &[i32]) -> Result<()> {
    for _ in 0..2 {
        for &pid in pids {
            let waiter = parent(pid);
            signal(pid, Signal::SIGCONT)?;
            if let Some(waiter) = waiter.filter(|&waiter| waiter > 1) {
                signal(waiter, Signal::SIGCONT)?;
            }
        }
        std::thread::sleep(WAITER);
    }
    Ok(())
}

/// Waits until processes are gone. Errors: `timeout` passes.
pub(crate) fn wait_for_end(pids: &[i32], timeout: Duration) -> Result<()> {
    wait_until("processes end", timeout, || Ok(pids.iter().all(|&pid| !is_alive(pid))))
}

fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|fields| fields.first().is_some_and(|state| state != "Z"))
}

fn parent(pid: i32) -> Option<i32> {
    stat(pid)?.get(1)?.parse().ok()
}

/// Fields of `/proc/PID/stat` behind the name: state, parent, ...
fn stat(pid: i32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = text.rsplit_once(") ")?;
    Some(fields.split(' ').map(str::to_owned).collect())
}
