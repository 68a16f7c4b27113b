//! Processes around processes. `nested` runs a child in process id and user namespaces of its own,
//! as the sandboxes of browsers do; `traces` has a child of its own traced, as a debugger does. The
//! line is the kind's name.
#![expect(unsafe_code, reason = "work between fork and exec, and ptrace, have no safe form")]

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};

use crate::report;

pub(crate) fn nested(_arguments: &[String]) -> io::Result<()> {
    let mut shell = Command::new("sh");
    shell.args(["-c", "sleep 1000 & echo $! > /dev/null; wait"]);
    // SAFETY: between fork and exec there is only a system call.
    unsafe {
        shell.pre_exec(|| Ok(unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWPID)?));
    }
    let _child = shell.spawn()?;
    report("nested")?;
    loop {
        thread::park();
    }
}

pub(crate) fn traces(_arguments: &[String]) -> io::Result<()> {
    let child = Command::new("sleep").arg("1000").spawn()?;
    let pid = child.id().cast_signed();
    // SAFETY: PTRACE_SEIZE neither reads nor writes our memory.
    let seized = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) };
    if seized != 0 {
        return Err(io::Error::last_os_error());
    }
    report("traces")?;
    loop {
        thread::park();
    }
}
