//! Stopping every process of a container, also while its disk is slow, at an instant at which CRIU
//! can dump it.
//!
//! The freezer cannot stop a task in uninterruptible sleep: it waits until the task's system call
//! ends. With version 1 of the control groups runc waits for some 0.4 s, and then thaws and reports
//! "unable to freeze". A direct write to a busy disk takes longer. So the shim lets the container
//! run until no task sleeps like that, and calls runc again, for [`TIME_MAX`] in all. When that
//! fails too, the container runs.
//!
//! A thread that has called vfork(2), as posix_spawn(3), shells, Java and Go do to start a program,
//! waits until its child has called execve(2). CRIU stops the child first and then waits for the
//! parent, which cannot stop before the child goes on; after 10 s the dump fails. So where the
//! freeze meets such a thread the container runs on for a moment and is frozen again, until it
//! meets none.

use std::io;
use std::time::{Duration, Instant};

use crate::cgroup::Cgroup;
use crate::runc::{Runc, RuncError};

/// How long a freeze is tried. A disk that blocks a task for longer is not merely slow.
const TIME_MAX: Duration = Duration::from_secs(10);
/// How long the container runs between two attempts at most: other tasks may begin to wait for the
/// disk all the time.
const PAUSE_MAX: Duration = Duration::from_millis(500);
/// How often the tasks are looked at between two attempts.
const POLL: Duration = Duration::from_millis(5);

/// How often the threads are looked at while one waits in vfork(2), and how long at most before the
/// next attempt.
const VFORK_POLL: Duration = Duration::from_micros(500);
const VFORK_PAUSE_MAX: Duration = Duration::from_millis(20);

/// Freezes every process of the container in `cgroup`. Returns whether CRIU can dump it: at the
/// deadline it is frozen although a thread still waits in vfork(2).
///
/// Errors: the runtime's last one, or the kernel's; the container runs.
pub(crate) async fn freeze(runc: &Runc, cgroup: &Cgroup) -> Result<bool, RuncError> {
    let deadline = Instant::now() + TIME_MAX;
    loop {
        match runc.pause().await {
            Err(error) if error.is_unfrozen() && Instant::now() < deadline => {
                tracing::info!("a task waits for its disk, freezing is tried again");
            }
            Err(error) => return Err(error),
            Ok(()) => return leave_vfork(cgroup, deadline).await,
        }
        let attempt = Instant::now() + PAUSE_MAX;
        while Instant::now() < attempt && cgroup.waits_uninterruptibly() {
            tokio::time::sleep(POLL).await;
        }
    }
}

/// Thaws and freezes a frozen container until no thread of it waits in vfork(2). Returns whether
/// none does.
async fn leave_vfork(cgroup: &Cgroup, deadline: Instant) -> Result<bool, RuncError> {
    let Some(freezer) = cgroup.freezer() else { return Ok(true) };
    let mut is_frozen = true;
    while !is_frozen || cgroup.waits_in_vfork() {
        if is_frozen && Instant::now() > deadline {
            return Ok(false);
        }
        freezer.thaw().map_err(RuncError::Freeze)?;
        if Instant::now() > deadline {
            let late = io::Error::new(io::ErrorKind::TimedOut, "its tasks do not freeze");
            return Err(RuncError::Freeze(late));
        }
        let attempt = Instant::now() + VFORK_PAUSE_MAX;
        tokio::time::sleep(VFORK_POLL).await;
        while Instant::now() < attempt && cgroup.waits_in_vfork() {
            tokio::time::sleep(VFORK_POLL).await;
        }
        // With version 1 a child that is frozen before its parent keeps the group from being so.
        is_frozen = freezer.try_freeze(VFORK_PAUSE_MAX).map_err(RuncError::Freeze)?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;
    use std::path::Path;

    use containerd_shim::protos::shim::oci::Options;

    use super::*;
    use crate::reap::Reaper;

    /// Method: a script in the runtime's place that fails with `message` in all but the third call.
    async fn frozen(dir: &Path, message: &str) -> (Result<bool, RuncError>, usize) {
        let script = dir.join("fake-runc");
        let text = format!(
            "#!/bin/sh\necho x >>calls\n[ $(wc -l <calls) = 3 ] && exit 0\n\
             echo '{{\"level\":\"error\",\"msg\":\"{message}\"}}' >\"$4\"; exit 1\n"
        );
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let binary_name = script.to_str().unwrap().to_owned();
        let options = Options { binary_name, root: "/r".to_owned(), ..Default::default() };
        let runc = Runc::new(&options, "ns", "c1", dir, Reaper::for_tests());
        let done = freeze(&runc, &Cgroup::V1(HashMap::new())).await;
        (done, fs::read_to_string(dir.join("calls")).unwrap().lines().count())
    }

    #[tokio::test]
    async fn a_freeze_that_gave_up_is_tried_again_and_no_other_failure_is() {
        let dir = tempfile::tempdir().unwrap();
        let (done, calls) = frozen(dir.path(), "unable to freeze").await;
        assert!(done.unwrap());
        assert_eq!(calls, 3);
        let dir = tempfile::tempdir().unwrap();
        let (done, calls) = frozen(dir.path(), "container does not exist").await;
        assert!(done.unwrap_err().is_gone());
        assert_eq!(calls, 1);
    }
}
