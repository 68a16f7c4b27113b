//! Memberships in multicast groups, which CRIU does not dump.
//!
//! `/proc/PID/net/igmp` and `igmp6` say which groups a network namespace has joined on which
//! interface, but not which sockets did. So every socket is asked about every group with
//! `MCAST_MSFILTER`, which fails with `EADDRNOTAVAIL` where the socket is no member
//! (`ip_mc_gsfget` in net/ipv4/igmp.c, `ip6_mc_msfget` in net/ipv6/mcast.c).
//!
//! The destination joins the same groups on the interface of the same name, else on the one that
//! has the same IPv4 address.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use nix::errno::Errno;

use super::interfaces::InterfaceUse;
use super::options::Sort;
use super::{SupplementError, is_gone};
use crate::sys;

/// Most sources of one membership that are read. Linux allows 10 by default.
const SOURCES_MAX: usize = 64;

/// Size of `struct sockaddr_storage`, in bytes.
const ADDRESS_BYTES: usize = size_of::<libc::sockaddr_storage>();

/// Offset of the first address in `struct group_req` and its like: it is aligned to 8 bytes.
const ADDRESS_OFFSET: usize = 8;

/// Offset of mode, number and list of sources in `struct group_filter`.
const MODE_OFFSET: usize = ADDRESS_OFFSET + ADDRESS_BYTES;
const COUNT_OFFSET: usize = MODE_OFFSET + 4;
const SOURCES_OFFSET: usize = COUNT_OFFSET + 4;

/// Options of both levels. Source: include/uapi/linux/in.h.
const MCAST_JOIN_GROUP: i32 = 42;
const MCAST_BLOCK_SOURCE: i32 = 43;
const MCAST_JOIN_SOURCE_GROUP: i32 = 46;
const MCAST_MSFILTER: i32 = 48;
/// Mode of a membership that receives from the listed sources only; else from all others.
const MCAST_INCLUDE: u32 = 1;

/// Groups that a network namespace has joined.
#[derive(Debug, Default)]
pub(super) struct Groups(Vec<Group>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Group {
    address: IpAddr,
    index: u32,
    interface: String,
}

/// A socket's membership in a group.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Membership {
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    group: Vec<u8>,
    /// Name at the source.
    #[prost(string, tag = "2")]
    interface: String,
    /// First IPv4 address of the interface at the source; may be empty.
    #[prost(bytes = "vec", tag = "3")]
    address: Vec<u8>,
    /// Whether it receives from `sources` only, and not from all others.
    #[prost(bool, tag = "4")]
    includes: bool,
    #[prost(bytes = "vec", repeated, tag = "5")]
    sources: Vec<Vec<u8>>,
}

impl Groups {
    /// The groups of the network namespace of process `pid`.
    pub(super) fn of(pid: u32) -> Result<Self, SupplementError> {
        let read = |name: &str| {
            let path = PathBuf::from(format!("/proc/{pid}/net/{name}"));
            match fs::read_to_string(&path) {
                // A kernel without IPv6 has no such file.
                Err(error) if is_gone(&error) => Ok(String::new()),
                other => other.map_err(SupplementError::io(&path)),
            }
        };
        let mut groups = parse_igmp(&read("igmp")?);
        groups.extend(read("igmp6")?.lines().filter_map(parse_igmp6));
        Ok(Self(groups))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A line for each interface, followed by an indented line for each of its groups. A group is the
/// hexadecimal number of its bytes as this machine reads them.
fn parse_igmp(text: &str) -> Vec<Group> {
    let mut groups = Vec::new();
    let mut current = None;
    for line in text.lines().skip(1) {
        let mut fields = line.split_ascii_whitespace();
        let Some(first) = fields.next() else { continue };
        if line.starts_with(char::is_whitespace) {
            let Some((index, interface)) = &current else { continue };
            let Ok(number) = u32::from_str_radix(first, 16) else { continue };
            groups.push(Group {
                address: Ipv4Addr::from(number.to_ne_bytes()).into(),
                index: *index,
                interface: String::clone(interface),
            });
        } else if let (Ok(index), Some(name)) = (first.parse::<u32>(), fields.next()) {
            current = Some((index, name.trim_end_matches(':').to_owned()));
        }
    }
    groups
}

/// `2    eth0            ff0200000000000000000000000000fb     1 00000004 0`
fn parse_igmp6(line: &str) -> Option<Group> {
    let mut fields = line.split_ascii_whitespace();
    let (index, interface) = (fields.next()?.parse().ok()?, fields.next()?.to_owned());
    let number = u128::from_str_radix(fields.next()?, 16).ok()?;
    Some(Group { address: Ipv6Addr::from(number.to_be_bytes()).into(), index, interface })
}

/// The memberships of a socket of process `pid`, which is named so in errors only.
pub(super) fn read(
    socket: impl AsFd,
    pid: u32,
    groups: &Groups,
) -> Result<Vec<Membership>, SupplementError> {
    let socket = socket.as_fd();
    let Ok(sort) = Sort::of(socket) else { return Ok(Vec::new()) };
    // A connection cannot join; an IPv6 socket joins groups of both.
    if sort.kind == libc::SOCK_STREAM {
        return Ok(Vec::new());
    }
    let asks = |group: &&Group| match sort.domain {
        libc::AF_INET => group.address.is_ipv4(),
        libc::AF_INET6 => true,
        _ => false,
    };
    let mut found = Vec::new();
    for group in groups.0.iter().filter(asks) {
        let Some((includes, sources)) = filter(socket, group, pid)? else { continue };
        let address = sys::interface_address(socket, &group.interface);
        found.push(Membership {
            group: octets(group.address),
            interface: group.interface.clone(),
            address: address.map(Vec::from).unwrap_or_default(),
            includes,
            sources: sources.into_iter().map(octets).collect(),
        });
    }
    Ok(found)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// Mode and sources of a socket's membership; `None` if it is no member.
fn filter(
    socket: BorrowedFd<'_>,
    group: &Group,
    pid: u32,
) -> Result<Option<(bool, Vec<IpAddr>)>, SupplementError> {
    let mut buffer = [0; SOURCES_OFFSET + SOURCES_MAX * ADDRESS_BYTES];
    buffer[..4].copy_from_slice(&group.index.to_ne_bytes());
    put_address(&mut buffer[ADDRESS_OFFSET..], group.address);
    let room = u32::try_from(SOURCES_MAX).unwrap_or(u32::MAX);
    buffer[COUNT_OFFSET..SOURCES_OFFSET].copy_from_slice(&room.to_ne_bytes());
    if sys::getsockopt(socket, level(group.address), MCAST_MSFILTER, &mut buffer).is_err() {
        return Ok(None);
    }
    let number = |at: usize| {
        buffer[at..].first_chunk().map_or(0, |bytes: &[u8; 4]| u32::from_ne_bytes(*bytes))
    };
    let count = usize::try_from(number(COUNT_OFFSET)).unwrap_or(usize::MAX);
    if count >= SOURCES_MAX {
        return Err(SupplementError::Sources { pid, group: group.address.to_string() });
    }
    let sources = buffer[SOURCES_OFFSET..].chunks_exact(ADDRESS_BYTES).take(count);
    let sources = sources.map(|bytes| match group.address {
        IpAddr::V4(_) => bytes[4..].first_chunk::<4>().map(|octets| IpAddr::from(*octets)),
        IpAddr::V6(_) => bytes[8..].first_chunk::<16>().map(|octets| IpAddr::from(*octets)),
    });
    Ok(Some((number(MODE_OFFSET) == MCAST_INCLUDE, sources.flatten().collect())))
}

/// Writes `struct sockaddr_in` or `sockaddr_in6` with an address and no port.
fn put_address(to: &mut [u8], address: IpAddr) {
    let (family, at) = match address {
        IpAddr::V4(_) => (libc::AF_INET, 4),
        IpAddr::V6(_) => (libc::AF_INET6, 8),
    };
    let family = libc::sa_family_t::try_from(family).unwrap_or(0).to_ne_bytes();
    to[..family.len()].copy_from_slice(&family);
    let octets = octets(address);
    to[at..at + octets.len()].copy_from_slice(&octets);
}

fn level(address: IpAddr) -> i32 {
    match address {
        IpAddr::V4(_) => libc::SOL_IP,
        IpAddr::V6(_) => libc::SOL_IPV6,
    }
}

fn address_of(octets: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(octets).map(IpAddr::from);
    v4.or_else(|_length| <[u8; 16]>::try_from(octets).map(IpAddr::from)).ok()
}

impl Membership {
    /// Joins again with a restored socket of process `pid`, which is named so in errors only.
    ///
    /// Errors: [`SupplementError::NoInterface`], [`SupplementError::Join`],
    /// [`SupplementError::Damaged`].
    pub(super) fn join(&self, socket: BorrowedFd<'_>, pid: u32) -> Result<(), SupplementError> {
        let damaged = || SupplementError::Damaged("an address has 4 or 16 bytes".to_owned());
        let group = address_of(&self.group).ok_or_else(damaged)?;
        let (index, interface) = find_interface(socket, &self.interface, &self.address)
            .ok_or_else(|| SupplementError::NoInterface {
                pid,
                group: group.to_string(),
                interface: self.interface.clone(),
            })?;
        let failed = |source| SupplementError::Join {
            pid,
            group: group.to_string(),
            interface: interface.clone(),
            source,
        };
        if !self.includes {
            join_any_source(socket, group, index, &interface).map_err(failed)?;
        }
        let option = if self.includes { MCAST_JOIN_SOURCE_GROUP } else { MCAST_BLOCK_SOURCE };
        for source in &self.sources {
            let source = address_of(source).ok_or_else(damaged)?;
            // `struct group_source_req`
            let mut request = [0; ADDRESS_OFFSET + 2 * ADDRESS_BYTES];
            request[..4].copy_from_slice(&index.to_ne_bytes());
            put_address(&mut request[ADDRESS_OFFSET..], group);
            put_address(&mut request[ADDRESS_OFFSET + ADDRESS_BYTES..], source);
            once(sys::setsockopt(socket, level(group), option, &request)).map_err(failed)?;
        }
        Ok(())
    }
}

/// Index and name of the interface `name` in the network namespace of `socket`, else of the first
/// one with this IPv4 address; an address of another length matches none.
pub(super) fn find_interface(
    socket: BorrowedFd<'_>,
    name: &str,
    address: &[u8],
) -> Option<(u32, String)> {
    if let Ok(index) = sys::interface_index(socket, name) {
        return Some((index, name.to_owned()));
    }
    let wanted = <[u8; 4]>::try_from(address).ok()?;
    // Indices are given from 1 on and are seldom given back; beyond that nothing is looked for.
    const INDEX_MAX: u32 = 4096;
    (1..=INDEX_MAX).find_map(|index| {
        let name = sys::interface_name(socket, index).ok()?;
        let has = sys::interface_address(socket, &name).ok()?;
        (has == wanted).then_some((index, name))
    })
}

/// The interfaces that a socket's memberships need, as far as they can be read.
pub(super) fn uses(socket: BorrowedFd<'_>, groups: &Groups) -> Vec<InterfaceUse> {
    let memberships = read(socket, 0, groups).unwrap_or_default();
    let of_one = |one: Membership| {
        let what = format!("is a member of multicast group {}", address_of(&one.group)?);
        Some(InterfaceUse { what, interface: one.interface, address: one.address })
    };
    memberships.into_iter().filter_map(of_one).collect()
}

/// Joins a group for packets of all sources.
fn join_any_source(
    socket: BorrowedFd<'_>,
    group: IpAddr,
    index: u32,
    interface: &str,
) -> Result<(), Errno> {
    if let IpAddr::V4(group) = group {
        // With the interface's address, so that a program that joined by that can leave by it.
        let address = sys::interface_address(socket, interface).unwrap_or_default();
        // `struct ip_mreqn`
        let request = [group.octets(), address, index.to_ne_bytes()].concat();
        return once(sys::setsockopt(socket, libc::SOL_IP, libc::IP_ADD_MEMBERSHIP, &request));
    }
    // `struct group_req`
    let mut request = [0; ADDRESS_OFFSET + ADDRESS_BYTES];
    request[..4].copy_from_slice(&index.to_ne_bytes());
    put_address(&mut request[ADDRESS_OFFSET..], group);
    once(sys::setsockopt(socket, level(group), MCAST_JOIN_GROUP, &request))
}

/// A second membership is the first.
fn once(joined: Result<(), Errno>) -> Result<(), Errno> {
    if joined == Err(Errno::EADDRINUSE) { Ok(()) } else { joined }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: what `cat` printed on a little-endian machine.
    #[cfg(target_endian = "little")]
    #[test]
    fn groups_as_the_kernel_lists_them() {
        let igmp = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
                    1\tlo        :     1      V3\n\
                    \t\t\t\t010000E0     1 0:00000000\t\t0\n\
                    12\tverylongname12:     2      V3\n\
                    \t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        let group = |address: &str, index, interface: &str| Group {
            address: address.parse().unwrap(),
            index,
            interface: interface.to_owned(),
        };
        let expected = [group("224.0.0.1", 1, "lo"), group("224.0.0.251", 12, "verylongname12")];
        assert_eq!(parse_igmp(igmp), expected);
        let igmp6 = "2    eth0            ff0200000000000000000000000000fb     1 00000004 0";
        assert_eq!(parse_igmp6(igmp6), Some(group("ff02::fb", 2, "eth0")));
        assert_eq!(parse_igmp6("2 eth0 xyz"), None);
    }
}
