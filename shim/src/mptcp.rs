//! Multipath TCP, which CRIU cannot dump, switched off in a container's network namespace.
//!
//! Go programs listen with it unasked where the kernel has it, since Go 1.24, and fall back to TCP
//! where it is switched off. So a container that is to move has it off before its program starts:
//! by annotation, or for all containers of a node by the daemon's configuration, of which a file
//! tells ([`godwit_protos::path::NO_MPTCP`]).
//!
//! The switch belongs to the network namespace. The host's is never touched.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use godwit_protos::{annotation, path};
use nix::sched::{CloneFlags, setns};

use crate::criu::SettingError;

/// The switch, as the calling thread's network namespace has it.
const SWITCH: &str = "/proc/sys/net/mptcp/enabled";

/// Whether a container with these annotations is to have no MPTCP.
///
/// Errors: the annotation is neither yes nor no.
pub(crate) fn is_unwanted<'a>(
    mut annotations: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<bool, SettingError> {
    match annotations.find(|(key, _)| *key == annotation::MPTCP).map(|(_, value)| value) {
        Some("yes") => Ok(false),
        Some("no") => Ok(true),
        Some(value) => Err(SettingError::Mptcp(value.to_owned())),
        None => Ok(Path::new(path::NO_MPTCP).exists()),
    }
}

/// Switches MPTCP off in the network namespace of process `pid`; open sockets stay what they are.
///
/// Errors: it is the namespace of this process, the host's; I/O. A kernel without MPTCP is no
/// error.
pub(crate) fn switch_off(pid: u32) -> io::Result<()> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let own = fs::metadata("/proc/self/ns/net")?;
    let other = namespace.metadata()?;
    if (own.dev(), own.ino()) == (other.dev(), other.ino()) {
        let why = "the container is in the host's network namespace, whose MPTCP is not switched off for it";
        return Err(io::Error::other(why));
    }
    // A thread of its own, which never returns to where it came from.
    let switch = move || -> io::Result<()> {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        match fs::write(SWITCH, "0") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            written => written,
        }
    };
    let thread = std::thread::Builder::new().name("mptcp".into()).spawn(switch)?;
    thread.join().map_err(|_panic| io::Error::other("the thread that switches MPTCP off died"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_is_yes_or_no_and_outranks_the_node() {
        let of = |value: &'static str| {
            is_unwanted([("x", "no"), (annotation::MPTCP, value)].into_iter())
        };
        assert_eq!(of("no"), Ok(true));
        assert_eq!(of("yes"), Ok(false));
        assert!(of("off").unwrap_err().to_string().contains("godwit.io/mptcp: \"off\""));
    }

    #[test]
    fn the_hosts_namespace_is_left_alone() {
        let before = fs::read_to_string(SWITCH).ok();
        switch_off(std::process::id()).unwrap_err();
        assert_eq!(fs::read_to_string(SWITCH).ok(), before);
    }
}
