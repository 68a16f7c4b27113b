//! Whether a described container fits this node: what the destination must have beside what it
//! admits.
//!
//! Plan, migrate and restore look for the same, before anything moves. A container that a client
//! creates by annotation is not looked at: its mounts and its network are the client's business,
//! and CRIU reports what they lack.

use std::fs::{self, File};
use std::net::{IpAddr, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use godwit_protos::peer::{BindMount, DescribeResponse};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{MigrationError, blocking};
use crate::node::Node;

/// Addresses that are tried.
const ADDRESSES_MAX: usize = 256;

/// What this node lacks of what the container needs, each with what to do; `netns` replaces the
/// network namespace that the description names.
pub(super) async fn obstacles(
    node: &Node,
    netns: Option<&str>,
    described: &DescribeResponse,
) -> Result<Vec<String>, MigrationError> {
    let name = node.config.node.clone();
    // A description without a specification is refused where one is derived from it.
    let spec = serde_json::from_str::<Spec>(&described.spec_json).unwrap_or_default();
    let netns = netns.map(PathBuf::from).or_else(|| network_namespace(&spec));
    let (addresses, binds) = (described.addresses.clone(), described.binds.clone());
    blocking(move || {
        let mut found: Vec<String> =
            binds.iter().filter_map(|bind| bind_obstacle(&name, bind)).collect();
        if let Some(netns) = netns {
            found.extend(network_obstacles(&name, &netns, &addresses));
        }
        Ok(found)
    })
    .await
}

/// The named network namespace that a specification has the container join.
fn network_namespace(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    let network = namespaces.iter().find(|one| one.typ() == LinuxNamespaceType::Network)?;
    network.path().clone()
}

fn bind_obstacle(node: &str, bind: &BindMount) -> Option<String> {
    let (source, point) = (&bind.source, &bind.point);
    let kind = |is_directory| if is_directory { "a directory" } else { "a file" };
    let wanted = kind(bind.is_directory);
    match fs::metadata(source) {
        Err(_) => Some(format!(
            "the source of the bind mount {source} at {point} is not on {node}: the container needs {wanted} there; \
             create it on {node}"
        )),
        Ok(here) if here.is_dir() != bind.is_directory => Some(format!(
            "the source of the bind mount {source} at {point} is {wanted} at the source and {} on {node}: \
             the container can be restored with the same kind only; replace it on {node}",
            kind(here.is_dir())
        )),
        Ok(_) => None,
    }
}

fn network_obstacles(node: &str, netns: &Path, addresses: &[String]) -> Vec<String> {
    let path = netns.display();
    let Ok(namespace) = File::open(netns) else {
        return vec![format!(
            "network namespace {path} is not on {node}: the container joins it; make it there with `ip netns add` and the \
             container's addresses, or name another one with --netns"
        )];
    };
    let parsed: Vec<IpAddr> =
        addresses.iter().take(ADDRESSES_MAX).filter_map(|address| address.parse().ok()).collect();
    if parsed.is_empty() {
        return Vec::new();
    }
    // A thread of its own, which never returns to where it came from.
    let look = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok::<_, rustix::io::Errno>(missing(&parsed))
    };
    let looked = std::thread::Builder::new().name("addresses".to_owned()).spawn(look);
    match looked.map(std::thread::JoinHandle::join) {
        Ok(Ok(Ok(missing))) => {
            missing.iter().map(|address| address_obstacle(node, netns, *address)).collect()
        }
        _ => vec![format!(
            "network namespace {path} on {node} cannot be entered: the container joins it; make it again with \
             `ip netns add`, or name another one with --netns"
        )],
    }
}

fn address_obstacle(node: &str, netns: &Path, address: IpAddr) -> String {
    let path = netns.display();
    format!(
        "address {address} is not in network namespace {path} on {node}: a socket of the container is bound to it and \
         could not be reached; add it there with `ip address add`"
    )
}

/// Those of the addresses that no interface of this thread's network namespace has: a socket cannot
/// be bound to them.
fn missing(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let is_missing = |address: &&IpAddr| {
        UdpSocket::bind((**address, 0))
            .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrNotAvailable)
    };
    addresses.iter().filter(is_missing).copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bind_mount_needs_a_source_of_the_same_kind() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().display().to_string();
        let bind = |source: &str, is_directory| BindMount {
            source: source.to_owned(),
            point: "/etc/hosts".to_owned(),
            is_directory,
        };
        assert_eq!(bind_obstacle("edge-b", &bind(&source, true)), None);
        let told = bind_obstacle("edge-b", &bind(&source, false)).unwrap();
        assert!(told.contains("is a file at the source and a directory on edge-b"), "{told}");
        let told = bind_obstacle("edge-b", &bind(&format!("{source}/none"), true)).unwrap();
        assert!(told.contains("at /etc/hosts is not on edge-b"), "{told}");
    }

    #[test]
    fn an_address_that_no_interface_has_is_missing() {
        let addresses = ["127.0.0.1", "192.0.2.7", "2001:db8::7"].map(|it| it.parse().unwrap());
        // 192.0.2.0/24 and 2001:db8::/32 are for documentation (RFC 5737, RFC 3849). Without IPv6
        // the kernel has another error.
        let missing = missing(&addresses);
        assert!(missing.contains(&addresses[1]) && !missing.contains(&addresses[0]), "{missing:?}");
        let told = network_obstacles("edge-b", Path::new("/run/netns/no-such"), &[]);
        assert!(told[0].contains("/run/netns/no-such is not on edge-b"), "{told:?}");
    }
}
