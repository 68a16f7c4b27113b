//! Requests of native AIO (`io_setup(2)`), which go on while their process is frozen.
//!
//! The kernel completes such a request without the process. What it stores after the freeze, data
//! or the completion itself, is missing at the destination, and CRIU does not wait for it. Nothing
//! tells how many requests are in flight: the ring that the kernel shares with the process has
//! completed ones only, no file of `/proc` counts them, and a request such as a poll may never
//! complete. So a ring may move only if it was never used: it has no completion, and the process
//! has no file open for direct I/O. Other requests for files are complete when `io_submit(2)`
//! returns. Programs such as nginx make a ring at their start and use it only where that is
//! configured.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::libc;

use super::{Container, Findings, Process};
use crate::migrate::MigrationError;

/// How `/proc/PID/maps` shows a ring.
const RING: &str = "/[aio]";
/// Number of requests for which all rings of the machine have room (sysctl(5), "aio-nr").
const RESERVED: &str = "/proc/sys/fs/aio-nr";
/// Length of the ring's head, behind which its events begin (`struct aio_ring` of the kernel's
/// fs/aio.c).
const HEAD_BYTES: usize = 32;
/// Length of an event.
const EVENT_BYTES: usize = 32;

/// Refuses processes that use native AIO.
pub(super) fn rings(container: &Container, found: &mut Findings) {
    for process in container.processes.iter().filter(|process| uses_ring(process)) {
        found.obstacle(
            format!("{} uses native AIO", process.named()),
            "the kernel goes on with its requests while the process stands still, and what they do then would be lost",
            "switch native AIO off and restart it (MySQL and MariaDB: innodb_use_native_aio=OFF, nginx: aio off)",
        );
    }
}

/// The same check for a container that has just been frozen: a ring may have been used since the
/// survey. May block.
///
/// Errors: [`MigrationError::Obstacles`].
pub(in crate::migrate) fn check_frozen(pids: &[u32]) -> Result<(), MigrationError> {
    // Reading the mappings takes longest, and few machines have a ring at all.
    if fs::read_to_string(RESERVED).is_ok_and(|reserved| reserved.trim() == "0") {
        return Ok(());
    }
    let processes = Process::read_all(pids);
    let used = processes.iter().filter(|process| uses_ring(process));
    let used = used.map(|process| format!("{} began to use native AIO meanwhile", process.named()));
    super::check(&used.collect::<Vec<_>>())
}

fn uses_ring(process: &Process) -> bool {
    let mut rings = process.mappings.iter().filter(|mapping| mapping.path.starts_with(RING));
    let has_direct_file = || {
        process.files.iter().any(|file| {
            let flags = file.info("flags").and_then(|flags| i32::from_str_radix(flags, 8).ok());
            flags.is_some_and(|flags| flags & libc::O_DIRECT != 0)
        })
    };
    let memory = format!("/proc/{}/mem", process.pid);
    rings.any(|ring| {
        // What cannot be read may have been used.
        let head = read_head(Path::new(&memory), ring.range.start);
        head.is_none_or(|head| has_completions(&head)) || has_direct_file()
    })
}

fn read_head(memory: &Path, address: u64) -> Option<[u8; HEAD_BYTES + EVENT_BYTES]> {
    let mut head = [0; HEAD_BYTES + EVENT_BYTES];
    File::open(memory).ok()?.read_exact_at(&mut head, address).ok()?;
    Some(head)
}

/// Whether the ring has completed a request: its head or tail moved or, since both return to 0, its
/// first event is filled.
fn has_completions(head: &[u8; HEAD_BYTES + EVENT_BYTES]) -> bool {
    let (indices, event) = (&head[8..16], &head[HEAD_BYTES..]);
    indices.iter().chain(event).any(|byte| *byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_was_used_if_an_index_moved_or_the_first_event_is_filled() {
        let mut head = [0; HEAD_BYTES + EVENT_BYTES];
        // Its number and size, the magic number and the length of the head.
        head[0..8].copy_from_slice(&[7, 0, 0, 0, 128, 0, 0, 0]);
        head[16..20].copy_from_slice(&0xa10a_10a1_u32.to_le_bytes());
        head[28] = 32;
        assert!(!has_completions(&head));
        for at in [8, 12, HEAD_BYTES + 8] {
            let mut used = head;
            used[at] = 1;
            assert!(has_completions(&used), "byte {at}");
        }
    }
}
