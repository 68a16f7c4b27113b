//! Sockets that CRIU cannot dump: protocols and families it does not know, and Unix connections to
//! the outside.
//!
//! `/proc` tells no socket's protocol, and MPTCP's are in no table there. So each socket is looked
//! at through a descriptor of ours ([`OpenFile::duplicate`]).

use std::collections::HashSet;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, OwnedFd};

use criu_wrapper::supplement::{self, Survey, interface_name, packet_interface};
use nix::sys::socket::{SockaddrStorage, UnixAddr, getpeername, getsockname, getsockopt, sockopt};
use rustix::net::{AddressFamily, SocketType, sockopt as options};

use super::process::OpenFile;
use super::{Container, Findings, Process};

/// Families that CRIU dumps (`dump_socket` in `criu/sockets.c`).
const FAMILIES: &[AddressFamily] = &[
    AddressFamily::UNIX,
    AddressFamily::INET,
    AddressFamily::INET6,
    AddressFamily::NETLINK,
    AddressFamily::PACKET,
];

/// Other families by their number in `linux/socket.h`.
const OTHER_FAMILIES: &[(u16, &str)] = &[
    (15, "PF_KEY (IPsec)"),
    (21, "RDS"),
    (29, "CAN"),
    (30, "TIPC"),
    (31, "Bluetooth"),
    (38, "AF_ALG (kernel cryptography)"),
    (40, "vsock"),
    (41, "KCM"),
    (42, "QIPCRTR"),
    (43, "SMC"),
    (44, "XDP"),
];

/// Protocols of internet sockets that CRIU dumps (`can_dump_ipproto` in `criu/sk-inet.c`): TCP, UDP
/// and UDP-Lite.
const PROTOCOLS: &[u32] = &[0, 6, 17, 136];
/// Multipath TCP, as listeners of Go 1.24 and later have it where the kernel does.
const MPTCP: u32 = 262;
/// Other protocols by their number.
const OTHER_PROTOCOLS: &[(u32, &str)] =
    &[(1, "ICMP (ping)"), (33, "DCCP"), (58, "ICMPv6 (ping)"), (115, "L2TP"), (132, "SCTP")];

/// Number of the loopback interface in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

/// Sockets of a protocol or family that CRIU does not know or restores wrongly.
pub(super) fn protocols(container: &Container, found: &mut Findings) {
    each(container, |process, file, socket| {
        let Ok(family) = options::socket_domain(socket) else { return };
        if !FAMILIES.contains(&family) {
            let raw = family.as_raw();
            let name = OTHER_FAMILIES.iter().find(|(known, _)| *known == raw);
            let name = name.map_or_else(|| format!("family {raw}"), |(_, name)| (*name).to_owned());
            found.obstacle(
                format!("{} has a {name} socket (descriptor {})", process.named(), file.number),
                "CRIU cannot dump it",
                "have it close the socket",
            );
            return;
        }
        if family == AddressFamily::PACKET {
            packet(process, file, socket, found);
            return;
        }
        let is_internet = matches!(family, AddressFamily::INET | AddressFamily::INET6);
        let is_raw = options::socket_type(socket).is_ok_and(|kind| kind == SocketType::RAW);
        if !is_internet || is_raw {
            return;
        }
        let protocol = options::socket_protocol(socket).ok().flatten();
        let protocol = protocol.map_or(0, |protocol| protocol.as_raw().get());
        if protocol == MPTCP {
            multipath(process, file, socket, found);
        } else if !PROTOCOLS.contains(&protocol) {
            let name = OTHER_PROTOCOLS.iter().find(|(known, _)| *known == protocol);
            let name =
                name.map_or_else(|| format!("protocol {protocol}"), |(_, name)| (*name).to_owned());
            found.obstacle(
                format!("{} has a socket of {name} (descriptor {})", process.named(), file.number),
                "CRIU cannot dump it",
                "have it close the socket",
            );
        }
    });
}

/// CRIU binds a packet socket again by its interface's number (`criu/sk-packet.c`).
fn packet(process: &Process, file: &OpenFile, socket: &OwnedFd, found: &mut Findings) {
    let bound = packet_interface(socket).filter(|index| *index != LOOPBACK_INDEX);
    let Some(index) = bound else { return };
    let name = interface_name(socket, index).unwrap_or_else(|| format!("number {index}"));
    found.obstacle(
        format!(
            "{} has a packet socket on interface {name} (descriptor {})",
            process.named(),
            file.number
        ),
        "CRIU binds it again by the interface's number, which another network namespace gives to another interface",
        "have it close the socket, or bind it to all interfaces",
    );
}

fn multipath(process: &Process, file: &OpenFile, socket: &OwnedFd, found: &mut Findings) {
    let address = local_address(socket);
    let address = address
        .map_or_else(|| format!("descriptor {}", file.number), |address| address.to_string());
    let does = if options::socket_acceptconn(socket).unwrap_or(false) {
        "listens"
    } else {
        "is connected"
    };
    found.obstacle(
        format!("{} {does} with Multipath TCP on {address}", process.named()),
        "CRIU cannot dump MPTCP sockets, which Go 1.24 and later opens wherever the kernel has them",
        "start the container with the annotation godwit.io/mptcp=no, or set `mptcp = false` in its node's configuration, \
         so that it falls back to TCP",
    );
}

/// Unix sockets whose other end no process of the container holds.
pub(super) fn external(container: &Container, found: &mut Findings) {
    let (mut own, tree) = (HashSet::new(), container.tree());
    each(container, |_, _, socket| own.extend(local_name(socket)));
    each(container, |process, file, socket| {
        let is_unix =
            options::socket_domain(socket).is_ok_and(|family| family == AddressFamily::UNIX);
        if !is_unix {
            return;
        }
        let Some(peer) = peer_name(socket) else { return };
        let other = if options::socket_type(socket).is_ok_and(|kind| kind == SocketType::DGRAM) {
            // The kernel keeps no credentials of it.
            if peer.is_empty() || own.contains(&peer) {
                return;
            }
            "a process outside the container".to_owned()
        } else {
            let Ok(credentials) = getsockopt(socket, sockopt::PeerCredentials) else { return };
            let pid = u32::try_from(credentials.pid()).unwrap_or(0);
            // One that has ended may have left its end to a process of the container.
            if tree.contains(&pid) || (pid != 0 && !is_alive(pid)) {
                return;
            }
            container.named(pid)
        };
        let through = if peer.is_empty() { String::new() } else { format!(" through {peer}") };
        found.obstacle(
            format!(
                "{} is connected to {other}{through} by a Unix socket (descriptor {})",
                process.named(),
                file.number
            ),
            "CRIU cannot dump one end of a connection",
            "end that process or close the connection first",
        );
    });
}

/// Addresses that sockets are bound to: CRIU binds them again, and clients that know such an
/// address connect to it.
pub(super) fn addresses(container: &Container, found: &mut Findings) {
    each(container, |_, _, socket| {
        let is_connection = options::socket_type(socket)
            .is_ok_and(|kind| kind == SocketType::STREAM)
            && getpeername::<SockaddrStorage>(socket.as_raw_fd()).is_ok();
        // A connection is restored as a closed one.
        let Some(bound) = local_address(socket).filter(|_| !is_connection) else { return };
        let address = bound.ip().to_canonical();
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return;
        }
        // An address of one link is one of its interface only.
        let interface = match bound {
            SocketAddr::V6(six) if six.ip().is_unicast_link_local() => {
                interface_name(socket, six.scope_id())
            }
            _ => None,
        };
        let interface = interface.map(|name| format!("%{name}")).unwrap_or_default();
        found.addresses.insert(format!("{address}{interface}"));
    });
}

/// Interfaces of the container's network namespace that sockets refer to: they are looked for again
/// at the restore.
pub(super) fn interfaces(container: &Container, found: &mut Findings) {
    // The dump says why the list cannot be read, if it is still so.
    let Ok(survey) = Survey::of(container.init_pid) else { return };
    each(container, |process, _, socket| {
        for mut used in survey.uses(socket) {
            used.what = format!("{} {}", process.named(), used.what);
            found.interfaces.insert(used);
        }
        let address = supplement::source_address(socket).filter(|address| !address.is_loopback());
        found.addresses.extend(address.map(|address| address.to_string()));
    });
}

/// The address of an internet socket.
fn local_address(socket: &OwnedFd) -> Option<SocketAddr> {
    // Whatever protocol it has: the address is asked of the socket alone.
    TcpListener::from(socket.try_clone().ok()?).local_addr().ok()
}

fn is_alive(pid: u32) -> bool {
    std::path::Path::new("/proc").join(pid.to_string()).exists()
}

/// Looks at each socket that would be dumped once, however many descriptors it has.
fn each(container: &Container, mut look: impl FnMut(&Process, &OpenFile, &OwnedFd)) {
    let mut seen = HashSet::new();
    for process in container.inside() {
        for file in process.files.iter().filter(|file| file.is_socket()) {
            // What was closed meanwhile is no obstacle.
            if seen.insert(&file.target)
                && let Ok(socket) = file.duplicate()
            {
                look(process, file, &socket);
            }
        }
    }
}

/// The name of a Unix socket; `None` for others, and for those without one.
fn local_name(socket: &OwnedFd) -> Option<String> {
    let address = getsockname::<UnixAddr>(socket.as_raw_fd()).ok()?;
    Some(name_of(&address)).filter(|name| !name.is_empty())
}

/// The name of the other end, empty if it has none; `None` for a socket that is not connected.
fn peer_name(socket: &OwnedFd) -> Option<String> {
    getpeername::<UnixAddr>(socket.as_raw_fd()).ok().as_ref().map(name_of)
}

fn name_of(address: &UnixAddr) -> String {
    match (address.path(), address.as_abstract()) {
        (Some(path), _) => path.display().to_string(),
        (None, Some(name)) => format!("@{}", String::from_utf8_lossy(name)),
        (None, None) => String::new(),
    }
}
