//! Kills for lack of memory, reported when they happen: also those that the init process survives.
//!
//! Version 1 of control groups signals an eventfd before it kills, version 2 changes a file after
//! it has. Both keep a count of kills, and the report is of that count ([`Container::report_oom`]),
//! so that a kill is reported once, whether it shows here first or at the exit of the process. The
//! watch ends with the group: its removal signals as well.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe;

use crate::cgroup::Cgroup;
use crate::container::Container;

/// How often, and how long, the count is looked at after version 1 has signalled.
const LOOKS: u32 = 50;
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Enough for one event of either kind.
const EVENT_BYTES_MAX: usize = 512;

/// What becomes readable when a group runs out of memory. Nothing but readiness matters.
fn open(cgroup: &Cgroup, dir: &Path) -> io::Result<pipe::Receiver> {
    let fd = match cgroup {
        Cgroup::V1(_) => {
            let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
            let control = File::open(dir.join("memory.oom_control"))?;
            let pair = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
            std::fs::write(dir.join("cgroup.event_control"), pair)?;
            event.as_fd().try_clone_to_owned()?
        }
        Cgroup::V2(_) => {
            let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
            inotify.add_watch(&dir.join("memory.events"), AddWatchFlags::IN_MODIFY)?;
            inotify.as_fd().try_clone_to_owned()?
        }
    };
    // No pipe, but read like one.
    pipe::Receiver::from_file_unchecked(fd.into())
}

/// Watches the memory of `container` until its group is gone.
pub(crate) fn watch(container: &Arc<Container>) {
    let Ok(cgroup) = container.cgroup() else { return };
    let Some(dir) = cgroup.dir("memory").map(Path::to_owned) else { return };
    let source = match open(&cgroup, &dir) {
        Ok(source) => source,
        Err(error) => {
            // Then kills are reported at the next exit only.
            return tracing::warn!("watching the memory of {}: {error}", container.name);
        }
    };
    let container = Arc::downgrade(container);
    tokio::spawn(async move {
        while source.readable().await.is_ok() {
            while source.try_read(&mut [0; EVENT_BYTES_MAX]).is_ok_and(|bytes| bytes > 0) {}
            if !dir.exists() || !reported(&container).await {
                return;
            }
        }
    });
}

/// Reports kills; version 1 signals before it kills, so they are waited for. `false` when the
/// container is gone.
async fn reported(container: &Weak<Container>) -> bool {
    for _ in 0..LOOKS {
        match container.upgrade() {
            Some(container) if container.report_oom() => return true,
            Some(_) => {}
            None => return false,
        }
        tokio::time::sleep(LOOK_PAUSE).await;
    }
    true
}
