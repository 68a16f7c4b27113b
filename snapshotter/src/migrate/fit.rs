//! Whether a described container fits this node: what the destination must have beside what it
//! admits.
//!
//! Plan, migrate and restore look for the same, before anything moves. A container that a client
//! creates by annotation is not looked at: its mounts and its network are the client's business,
//! and CRIU reports what they lack.

use std::fmt;
use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use criu_wrapper::supplement;
use godwit_protos::peer::{BindMount, DescribeResponse, InterfaceUse};
use nix::net::if_::if_nametoindex;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::{MigrationError, blocking};
use crate::node::Node;

/// Addresses, and interfaces, that are looked for.
const ADDRESSES_MAX: usize = 256;
/// The interface that every network namespace has.
const LOOPBACK: &str = "lo";

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
    let network = match netns {
        Some(path) => Network::Named(path.into()),
        None => network(&spec),
    };
    let binds = described.binds.clone();
    let interfaces = described.interfaces.iter().take(ADDRESSES_MAX).cloned().collect();
    let addresses = described.addresses.iter().take(ADDRESSES_MAX);
    let addresses = addresses.filter_map(|address| Bound::parse(address)).collect();
    let needs = Needs { addresses, interfaces };
    blocking(move || {
        let mut found: Vec<String> =
            binds.iter().filter_map(|bind| bind_obstacle(&name, bind)).collect();
        match network {
            Network::Named(netns) => found.extend(network_obstacles(&name, &netns, needs)),
            Network::New => found.extend(new_network_obstacles(&name, &needs)),
            Network::Hosts => {}
        }
        Ok(found)
    })
    .await
}

/// The network namespace that a container gets here.
enum Network {
    /// One that `ip netns` keeps.
    Named(PathBuf),
    /// One of its own, with nothing but loopback.
    New,
    /// The node's. It is refused where the specification is derived.
    Hosts,
}

/// What the container's sockets need of a network namespace.
struct Needs {
    addresses: Vec<Bound>,
    interfaces: Vec<InterfaceUse>,
}

/// An address that a socket is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Bound {
    address: IpAddr,
    /// The interface of an IPv6 address of one link.
    interface: Option<String>,
}

impl Bound {
    fn parse(text: &str) -> Option<Self> {
        let (address, interface) = match text.split_once('%') {
            Some((address, interface)) => (address, Some(interface.to_owned())),
            None => (text, None),
        };
        Some(Self { address: address.parse().ok()?, interface })
    }

    /// Whether no interface of this thread's network namespace has it: a socket cannot be bound to
    /// it.
    fn is_missing(&self) -> bool {
        let address = match (self.address, &self.interface) {
            (IpAddr::V6(address), Some(interface)) => {
                let Ok(index) = if_nametoindex(&interface[..]) else { return true };
                SocketAddr::V6(SocketAddrV6::new(address, 0, 0, index))
            }
            (address, _) => SocketAddr::new(address, 0),
        };
        UdpSocket::bind(address)
            .is_err_and(|error| error.kind() == std::io::ErrorKind::AddrNotAvailable)
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}", self.address)?;
        self.interface.iter().try_for_each(|interface| write!(to, "%{interface}"))
    }
}

/// The network namespace that a specification asks for.
fn network(spec: &Spec) -> Network {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let is_network = |one: &&LinuxNamespace| one.typ() == LinuxNamespaceType::Network;
    match namespaces.into_iter().flatten().find(is_network) {
        None => Network::Hosts,
        Some(network) => network.path().clone().map_or(Network::New, Network::Named),
    }
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

fn network_obstacles(node: &str, netns: &Path, needs: Needs) -> Vec<String> {
    let path = netns.display();
    let Ok(namespace) = File::open(netns) else {
        return vec![format!(
            "network namespace {path} is not on {node}: the container joins it; make it there with `ip netns add` and the \
             container's addresses, or name another one with --netns"
        )];
    };
    if needs.addresses.is_empty() && needs.interfaces.is_empty() {
        return Vec::new();
    }
    // A thread of its own, which never returns to where it came from.
    let look = move || {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let mut addresses = needs.addresses;
        addresses.retain(Bound::is_missing);
        Ok::<_, std::io::Error>((addresses, missing_interfaces(needs.interfaces)?))
    };
    let looked = std::thread::Builder::new().name("network".to_owned()).spawn(look);
    match looked.map(std::thread::JoinHandle::join) {
        Ok(Ok(Ok((addresses, interfaces)))) => {
            let addresses = addresses.iter().map(|address| address_obstacle(node, netns, address));
            let interfaces =
                interfaces.iter().map(|missing| interface_obstacle(node, netns, missing));
            addresses.chain(interfaces).collect()
        }
        _ => vec![format!(
            "network namespace {path} on {node} cannot be entered: the container joins it; make it again with \
             `ip netns add`, or name another one with --netns"
        )],
    }
}

fn address_obstacle(node: &str, netns: &Path, address: &Bound) -> String {
    let path = netns.display();
    format!(
        "address {address} is not in network namespace {path} on {node}: a socket of the container is bound to it, or \
         sends multicast packets from it; add it there with `ip address add`"
    )
}

fn interface_obstacle(node: &str, netns: &Path, used: &InterfaceUse) -> String {
    let (path, name, what) = (netns.display(), &used.name, &used.what);
    let or_address = match <[u8; 4]>::try_from(&used.address[..]) {
        Ok(address) => {
            format!(", or give another interface its address, {}", Ipv4Addr::from(address))
        }
        Err(_) => String::new(),
    };
    format!(
        "interface {name} is not in network namespace {path} on {node}: {what}; create it there{or_address}"
    )
}

/// What a network namespace with nothing but loopback lacks.
fn new_network_obstacles(node: &str, needs: &Needs) -> Vec<String> {
    let text = |missing: String, what: &str| {
        format!(
            "{missing} is not in the network namespace of its own that the container gets on {node}: {what}; \
             make one there by `ip netns add`, and name it with --netns"
        )
    };
    let addresses = needs.addresses.iter().map(|address| {
        let what = "a socket of the container is bound to it, or sends multicast packets from it";
        text(format!("address {address}"), what)
    });
    let interfaces = needs.interfaces.iter().filter(|used| used.name != LOOPBACK);
    let interfaces =
        interfaces.map(|InterfaceUse { name, what, .. }| text(format!("interface {name}"), what));
    addresses.chain(interfaces).collect()
}

/// What this thread's network namespace lacks of the interfaces.
fn missing_interfaces(wanted: Vec<InterfaceUse>) -> std::io::Result<Vec<InterfaceUse>> {
    let any = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let is_missing = |used: &InterfaceUse| {
        let InterfaceUse { what, name, address } = used.clone();
        let (interface, address) = (name, address.to_vec());
        !supplement::InterfaceUse { what, interface, address }.is_met(&any)
    };
    Ok(wanted.into_iter().filter(is_missing).collect())
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

    fn needs(interfaces: &[InterfaceUse]) -> Needs {
        Needs { addresses: Vec::new(), interfaces: interfaces.to_vec() }
    }

    #[test]
    fn an_interface_is_found_by_its_name_or_its_address() {
        let used = |name: &str, address: &[u8]| InterfaceUse {
            what: "mdnsd (process 7) is a member of multicast group 224.0.0.251".to_owned(),
            name: name.to_owned(),
            address: address.to_vec().into(),
        };
        let here = Path::new("/proc/self/ns/net");
        let met = [used("lo", &[]), used("gone0", &[127, 0, 0, 1])];
        assert_eq!(missing_interfaces(met.to_vec()).unwrap(), []);
        let gone = used("gone0", &[192, 0, 2, 9]);
        assert_eq!(missing_interfaces(vec![gone.clone()]).unwrap(), std::slice::from_ref(&gone));
        let told = interface_obstacle("edge-b", here, &gone);
        assert!(told.contains("interface gone0 is not in network namespace /proc"), "{told}");
        assert!(told.contains("its address, 192.0.2.9") && told.contains("mdnsd"), "{told}");
        let mut needs = needs(&[used("lo", &[]), gone]);
        needs.addresses.extend(Bound::parse("192.0.2.7"));
        let told = new_network_obstacles("edge-b", &needs);
        let [address, interface] = &told[..] else { panic!("{told:?}") };
        assert!(address.starts_with("address 192.0.2.7 is not in"), "{address}");
        assert!(interface.contains("gets on edge-b: mdnsd"), "{interface}");
        assert!(interface.contains("--netns"), "{interface}");
    }

    #[test]
    fn an_address_that_no_interface_has_is_missing() {
        let is_missing = |text: &str| Bound::parse(text).unwrap().is_missing();
        // 192.0.2.0/24 is for documentation (RFC 5737).
        assert!(is_missing("192.0.2.7") && !is_missing("127.0.0.1"));
        assert!(is_missing("fe80::7%gone0"));
        assert_eq!(Bound::parse("fe80::7%eth0").unwrap().to_string(), "fe80::7%eth0");
        assert_eq!(Bound::parse("eth0"), None);
        let told = network_obstacles("edge-b", Path::new("/run/netns/no-such"), needs(&[]));
        assert!(told[0].contains("/run/netns/no-such is not on edge-b"), "{told:?}");
    }
}
