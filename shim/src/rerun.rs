//! Lets system calls run again that a dump has interrupted, when the container goes on at its
//! source.
//!
//! CRIU leaves every thread that slept in a call such as `nanosleep` with `EINTR` as the call's
//! result, without any signal handler having run ([`criu_wrapper::waits`] says why). Between the
//! thaw and the thread's next instruction this module replaces that result. A child process of the
//! shim does it, the shim's own binary with [`COMMAND`] as its first argument:
//!
//! 1. It traces every thread whose call may run again, and requests a stop. Threads in a frozen
//!    group of version 1 stop only once thawed; all others stop at once.
//! 2. It thaws the group. Each thread stops before it returns to the program.
//! 3. For `EINTR` it sets the result to the kernel's own code for "restart unless a handler is to
//!    run". So a signal that arrives meanwhile still ends the call.
//! 4. It detaches.
//!
//! The process is a child so that nothing can go wrong for longer than [`TIME_MAX`]: when it ends
//! or is killed, the kernel detaches what it traced, and the threads go on with `EINTR` as before.
//! The shim itself must not trace: its reaper waits for every child and would take the stops.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use criu_wrapper::waits;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::reap::Reaper;

/// First argument of the child.
const COMMAND: &str = "rerun-interrupted-calls";
/// How long the child may take.
const TIME_MAX: Duration = Duration::from_secs(1);
/// Most threads that are stopped; each takes some 20 us in which it does not run.
const THREADS_MAX: usize = 4096;

/// Thaws a frozen group so that calls which a dump interrupted run again. Best effort: the caller
/// thaws it afterwards in any case.
pub(crate) async fn thaw(cgroup: &Cgroup, reaper: &Reaper) {
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let threads = waiting_threads(&cgroup.processes());
    let Some((file, word)) = cgroup.thaw_switch().filter(|_| !threads.is_empty()) else { return };
    if threads.len() > THREADS_MAX {
        tracing::warn!("{} threads wait in system calls, which return EINTR", threads.len());
        return;
    }
    let mut command = Command::new("/proc/self/exe");
    command.arg(COMMAND).arg(file).arg(word).args(threads.iter().map(u32::to_string));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let (child, ended) = match reaper.spawn(&mut command) {
        Ok(started) => started,
        Err(error) => {
            tracing::warn!("system calls that the dump interrupted return EINTR: {error}");
            return;
        }
    };
    match tokio::time::timeout(TIME_MAX, ended).await {
        Ok(Ok(exit)) if exit.code == 0 => {}
        Ok(_) => tracing::warn!("some system calls that the dump interrupted return EINTR"),
        Err(_late) => {
            let _ = reaper.signal(child.id(), Signal::SIGKILL);
            tracing::warn!("threads do not stop: their interrupted system calls return EINTR");
        }
    }
}

/// Threads of these processes that are in a call which may run again.
fn waiting_threads(processes: &BTreeSet<u32>) -> Vec<u32> {
    let mut threads = Vec::new();
    for process in processes {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
        for task in tasks.into_iter().flatten().flatten() {
            // Of a thread that runs the file says "running", outside of calls "-1".
            let call = std::fs::read_to_string(task.path().join("syscall")).unwrap_or_default();
            let number = call.split_ascii_whitespace().next().and_then(|word| word.parse().ok());
            if number.is_some_and(waits::may_run_again) {
                threads.extend(task.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
            }
        }
    }
    threads
}

/// Whether this process is the child.
pub(crate) fn is_child(arguments: &[OsString]) -> bool {
    arguments.get(1).is_some_and(|argument| argument == COMMAND)
}

/// The child: the freezer's file, what to write there, the threads.
pub(crate) fn child_main(arguments: &[OsString]) -> ExitCode {
    let [_, _, file, word, threads @ ..] = arguments else { return ExitCode::FAILURE };
    let threads = threads.iter().filter_map(|thread| thread.to_str()?.parse().ok());
    let mut traced = BTreeSet::new();
    for thread in threads.map(Pid::from_raw) {
        let stop = || ptrace::interrupt(thread);
        if ptrace::seize(thread, ptrace::Options::empty()).and_then(|()| stop()).is_ok() {
            traced.insert(thread);
        }
    }
    if std::fs::write(Path::new(file), word.as_encoded_bytes()).is_err() {
        return ExitCode::FAILURE;
    }
    let mut all_done = true;
    while !traced.is_empty() {
        let Ok(status) = waitpid(Pid::from_raw(-1), Some(WaitPidFlag::__WALL)) else {
            return ExitCode::FAILURE;
        };
        let (thread, signal) = match status {
            WaitStatus::PtraceEvent(thread, ..) => (thread, None),
            // About to be delivered. The kernel looks at the result afterwards.
            WaitStatus::Stopped(thread, signal) => (thread, Some(signal)),
            WaitStatus::Exited(thread, _) | WaitStatus::Signaled(thread, ..) => {
                traced.remove(&thread);
                continue;
            }
            _ => continue,
        };
        all_done &= rerun(thread).is_ok();
        all_done &= ptrace::detach(thread, signal).is_ok();
        traced.remove(&thread);
    }
    if all_done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Replaces the result of a stopped thread's interrupted call.
#[cfg(target_arch = "x86_64")]
fn rerun(thread: Pid) -> nix::Result<()> {
    let mut registers = ptrace::getregs(thread)?;
    if !waits::is_interrupted(registers.rax, registers.orig_rax, registers.cs) {
        return Ok(());
    }
    registers.rax = waits::RESTART_IF_NO_HANDLER;
    ptrace::setregs(thread, registers)
}

/// Other kernels restart the calls themselves.
#[cfg(not(target_arch = "x86_64"))]
fn rerun(_thread: Pid) -> nix::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: the test's thread sleeps in a call that may run again while another looks.
    #[test]
    fn a_thread_in_a_wait_is_found() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let sleeper = std::thread::spawn(move || wait.recv_timeout(Duration::from_secs(60)));
        let processes = BTreeSet::from([std::process::id()]);
        while waiting_threads(&processes).is_empty() {}
        drop(end);
        assert!(sleeper.join().unwrap().is_err());
    }

    #[test]
    fn the_child_is_known_by_its_first_argument() {
        let arguments = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        assert!(is_child(&arguments(&["shim", COMMAND, "/file", "0", "7"])));
        assert!(!is_child(&arguments(&["shim", "-namespace", COMMAND])));
        assert!(!is_child(&arguments(&["shim"])));
    }
}
