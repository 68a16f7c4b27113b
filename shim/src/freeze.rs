//! Stopping every process of a container, also while its disk is slow.
//!
//! The freezer cannot stop a task in uninterruptible sleep: it waits until the task's system call
//! ends. With version 1 of the control groups runc waits for some 0.4 s, and then thaws and reports
//! "unable to freeze". A direct write to a busy disk takes longer. So the shim lets the container
//! run until no task sleeps like that, and calls runc again, for [`TIME_MAX`] in all. When that
//! fails too, the container runs.

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

/// Freezes every process of the container in `cgroup`. Errors: the runtime's last one.
pub(crate) async fn freeze(runc: &Runc, cgroup: &Cgroup) -> Result<(), RuncError> {
    let deadline = Instant::now() + TIME_MAX;
    loop {
        match runc.pause().await {
            Err(error) if error.is_unfrozen() && Instant::now() < deadline => {
                tracing::info!("a task waits for its disk, freezing is tried again");
            }
            done => return done,
        }
        let attempt = Instant::now() + PAUSE_MAX;
        while Instant::now() < attempt && cgroup.waits_uninterruptibly() {
            tokio::time::sleep(POLL).await;
        }
    }
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
    async fn frozen(dir: &Path, message: &str) -> (Result<(), RuncError>, usize) {
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
        done.unwrap();
        assert_eq!(calls, 3);
        let dir = tempfile::tempdir().unwrap();
        let (done, calls) = frozen(dir.path(), "container does not exist").await;
        assert!(done.unwrap_err().is_gone());
        assert_eq!(calls, 1);
    }
}
