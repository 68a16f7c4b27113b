//! Options of sockets that CRIU does not dump, in tables by kind of socket.
//!
//! The source reads every option of a socket's tables. The destination compares each with what the
//! restored socket has, and sets those that differ. So the tables need no defaults, which depend on
//! the kernel and on settings of the node.
//!
//! Absent on purpose: options that CRIU dumps (`criu/sockets.c`, `sk-inet.c`, `sk-tcp.c`), options
//! that need a privilege to be set, and what the kernel computes (`TCP_QUICKACK`,
//! `SO_INCOMING_CPU`). docs/moves.md names what is lost.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;

use super::SupplementError;
use crate::sys;

/// Longest value of an option, in bytes: a filter of ICMPv6 messages.
const VALUE_BYTES_MAX: usize = 32;

/// Congestion control algorithms that a process without privileges may choose.
const ALLOWED_CONGESTION: &str = "/proc/sys/net/ipv4/tcp_allowed_congestion_control";

/// How the bytes of an option are to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// An integer of 32 bits.
    Int,
    /// Plain bytes of at most this length.
    Bytes(usize),
    /// Plain bytes that decide where packets go: the restore fails without them.
    Route(usize),
    /// Index of an interface, which has another number at the destination; big-endian for `true`.
    Interface(bool),
    /// Name of a congestion control algorithm.
    Congestion,
}

/// An option.
#[derive(Debug)]
struct Row {
    level: i32,
    name: i32,
    label: &'static str,
    form: Form,
}

/// Declares a table: `LEVEL: NUMBER "label" form, ...;`.
macro_rules! table {
    ($($level:ident: $($number:literal $label:literal $form:expr),+;)+) => {
        &[$($(Row { level: libc::$level, name: $number, label: $label, form: $form }),+),+]
    };
}

use Form::{Bytes, Congestion, Int, Interface, Route};

/// Of every socket. Numbers: include/uapi/asm-generic/socket.h.
const ANY: &[Row] = table! {
    SOL_SOCKET:
        29 "SO_TIMESTAMP" Int, 35 "SO_TIMESTAMPNS" Int, 37 "SO_TIMESTAMPING" Bytes(8),
        63 "SO_TIMESTAMP_NEW" Int, 64 "SO_TIMESTAMPNS_NEW" Int, 40 "SO_RXQ_OVFL" Int,
        42 "SO_PEEK_OFF" Int, 44 "SO_LOCK_FILTER" Int, 47 "SO_MAX_PACING_RATE" Bytes(8),
        60 "SO_ZEROCOPY" Int, 76 "SO_PASSPIDFD" Int, 82 "SO_RCVPRIORITY" Int,
        83 "SO_PASSRIGHTS" Int;
};

/// Of IPv4 sockets, and of IPv6 sockets, which speak both. Numbers: include/uapi/linux/in.h.
const IPV4: &[Row] = table! {
    SOL_IP:
        1 "IP_TOS" Int, 2 "IP_TTL" Int, 6 "IP_RECVOPTS" Int, 7 "IP_RETOPTS" Int,
        8 "IP_PKTINFO" Int, 10 "IP_MTU_DISCOVER" Int, 11 "IP_RECVERR" Int, 12 "IP_RECVTTL" Int,
        13 "IP_RECVTOS" Int, 15 "IP_FREEBIND" Int, 18 "IP_PASSSEC" Int,
        20 "IP_RECVORIGDSTADDR" Int, 21 "IP_MINTTL" Int, 23 "IP_CHECKSUM" Int,
        24 "IP_BIND_ADDRESS_NO_PORT" Int, 25 "IP_RECVFRAGSIZE" Int, 26 "IP_RECVERR_RFC4884" Int,
        32 "IP_MULTICAST_IF" Route(4), 33 "IP_MULTICAST_TTL" Int, 34 "IP_MULTICAST_LOOP" Int,
        49 "IP_MULTICAST_ALL" Int, 50 "IP_UNICAST_IF" Interface(true),
        51 "IP_LOCAL_PORT_RANGE" Int;
};

/// Of IPv6 sockets. Numbers: include/uapi/linux/in6.h and ipv6.h.
const IPV6: &[Row] = table! {
    SOL_IPV6:
        16 "IPV6_UNICAST_HOPS" Int, 17 "IPV6_MULTICAST_IF" Interface(false),
        18 "IPV6_MULTICAST_HOPS" Int, 19 "IPV6_MULTICAST_LOOP" Int, 23 "IPV6_MTU_DISCOVER" Int,
        25 "IPV6_RECVERR" Int, 29 "IPV6_MULTICAST_ALL" Int, 31 "IPV6_RECVERR_RFC4884" Int,
        33 "IPV6_FLOWINFO_SEND" Int, 49 "IPV6_RECVPKTINFO" Int, 51 "IPV6_RECVHOPLIMIT" Int,
        53 "IPV6_RECVHOPOPTS" Int, 56 "IPV6_RECVRTHDR" Int, 58 "IPV6_RECVDSTOPTS" Int,
        60 "IPV6_RECVPATHMTU" Int, 62 "IPV6_DONTFRAG" Int, 66 "IPV6_RECVTCLASS" Int,
        67 "IPV6_TCLASS" Int, 70 "IPV6_AUTOFLOWLABEL" Int, 72 "IPV6_ADDR_PREFERENCES" Int,
        73 "IPV6_MINHOPCOUNT" Int, 74 "IPV6_RECVORIGDSTADDR" Int,
        76 "IPV6_UNICAST_IF" Interface(true), 77 "IPV6_RECVFRAGSIZE" Int, 78 "IPV6_FREEBIND" Int;
};

/// Of TCP sockets. Numbers: include/uapi/linux/tcp.h.
const TCP: &[Row] = table! {
    SOL_TCP:
        7 "TCP_SYNCNT" Int, 8 "TCP_LINGER2" Int, 9 "TCP_DEFER_ACCEPT" Int,
        13 "TCP_CONGESTION" Congestion, 16 "TCP_THIN_LINEAR_TIMEOUTS" Int,
        18 "TCP_USER_TIMEOUT" Int, 23 "TCP_FASTOPEN" Int, 25 "TCP_NOTSENT_LOWAT" Int,
        27 "TCP_SAVE_SYN" Int, 30 "TCP_FASTOPEN_CONNECT" Int, 34 "TCP_FASTOPEN_NO_COOKIE" Int,
        36 "TCP_INQ" Int, 37 "TCP_TX_DELAY" Int;
};

/// Of UDP sockets. Numbers: include/uapi/linux/udp.h.
const UDP: &[Row] = table! {
    SOL_UDP:
        101 "UDP_NO_CHECK6_TX" Int, 102 "UDP_NO_CHECK6_RX" Int, 103 "UDP_SEGMENT" Int,
        104 "UDP_GRO" Int;
};

/// Of raw sockets. Numbers: include/uapi/linux/icmp.h and icmpv6.h.
const RAW: &[Row] = table! {
    SOL_RAW: 1 "ICMP_FILTER" Bytes(4);
    SOL_ICMPV6: 1 "ICMP6_FILTER" Bytes(32);
};

/// Of netlink sockets. Numbers: include/uapi/linux/netlink.h.
const NETLINK: &[Row] = table! {
    SOL_NETLINK:
        3 "NETLINK_PKTINFO" Int, 4 "NETLINK_BROADCAST_ERROR" Int, 5 "NETLINK_NO_ENOBUFS" Int,
        10 "NETLINK_CAP_ACK" Int, 11 "NETLINK_EXT_ACK" Int, 12 "NETLINK_GET_STRICT_CHK" Int;
};

/// Of packet sockets. Numbers: include/uapi/linux/if_packet.h.
const PACKET: &[Row] = table! {
    SOL_PACKET:
        19 "PACKET_TX_HAS_OFF" Int, 20 "PACKET_QDISC_BYPASS" Int, 23 "PACKET_IGNORE_OUTGOING" Int;
};

/// Options of one socket.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Profile {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Value>,
}

/// An option's value: the kernel's bytes, or the name of an interface.
#[derive(Clone, PartialEq, prost::Message)]
struct Value {
    #[prost(uint32, tag = "1")]
    level: u32,
    #[prost(uint32, tag = "2")]
    name: u32,
    #[prost(bytes = "vec", tag = "3")]
    bytes: Vec<u8>,
}

/// What a socket is: `SO_DOMAIN`, `SO_TYPE` and `SO_PROTOCOL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sort {
    pub(super) domain: i32,
    pub(super) kind: i32,
    pub(super) protocol: i32,
}

impl Sort {
    /// Errors: `ENOTSOCK`.
    pub(super) fn of(socket: impl AsFd) -> Result<Self, Errno> {
        let ask = |name| {
            let mut value = [0; 4];
            sys::getsockopt(socket.as_fd(), libc::SOL_SOCKET, name, &mut value)?;
            Ok::<_, Errno>(i32::from_ne_bytes(value))
        };
        Ok(Self {
            domain: ask(libc::SO_DOMAIN)?,
            kind: ask(libc::SO_TYPE)?,
            protocol: ask(libc::SO_PROTOCOL)?,
        })
    }

    fn tables(self) -> Vec<&'static [Row]> {
        let mut tables = vec![ANY];
        match self.domain {
            libc::AF_INET => tables.push(IPV4),
            libc::AF_INET6 => tables.extend([IPV4, IPV6]),
            libc::AF_NETLINK => tables.push(NETLINK),
            libc::AF_PACKET => tables.push(PACKET),
            _ => {}
        }
        if matches!(self.domain, libc::AF_INET | libc::AF_INET6) {
            tables.extend(match (self.kind, self.protocol) {
                (_, libc::IPPROTO_TCP) => Some(TCP),
                (_, libc::IPPROTO_UDP) => Some(UDP),
                (libc::SOCK_RAW, _) => Some(RAW),
                _ => None,
            });
        }
        tables
    }
}

/// Reads every option that a socket has of its tables.
pub(super) fn read(socket: impl AsFd) -> Profile {
    let rows = Sort::of(socket.as_fd()).map(Sort::tables).unwrap_or_default();
    let value = |row: &Row| {
        let bytes = row.read(socket.as_fd())?;
        Some(Value {
            level: row.level.cast_unsigned(),
            name: row.name.cast_unsigned(),
            bytes: match row.form {
                Interface(_) => row.interface(socket.as_fd(), &bytes)?.into_bytes(),
                Int | Bytes(_) | Route(_) | Congestion => bytes,
            },
        })
    };
    Profile { values: rows.into_iter().flatten().filter_map(value).collect() }
}

/// The options by which `socket` names an interface, each with its name.
pub(super) fn interfaces(socket: BorrowedFd<'_>) -> Vec<(&'static str, String)> {
    let tables = Sort::of(socket).map(Sort::tables).unwrap_or_default();
    let rows = tables.into_iter().flatten().filter(|row| matches!(row.form, Interface(_)));
    let named = |row: &Row| {
        let name = row.interface(socket, &row.read(socket)?)?;
        (!name.is_empty()).then_some((row.label, name))
    };
    rows.filter_map(named).collect()
}

/// The IPv4 address by which `socket` names an interface to send through, if it does.
pub(super) fn source_address(socket: BorrowedFd<'_>) -> Option<[u8; 4]> {
    let tables = Sort::of(socket).map(Sort::tables).unwrap_or_default();
    let row = tables.into_iter().flatten().find(|row| matches!(row.form, Route(_)))?;
    let address = <[u8; 4]>::try_from(row.read(socket)?).ok()?;
    (address != [0; 4]).then_some(address)
}

/// Sets on a restored socket what differs from `profile`; `at` is its process and descriptor.
///
/// Errors: [`SupplementError::Option`] for an option that decides where packets go, or
/// [`SupplementError::Damaged`]. Others are warnings.
pub(super) fn apply(
    socket: BorrowedFd<'_>,
    at: (u32, u32),
    profile: &Profile,
    warnings: &mut BTreeSet<String>,
) -> Result<(), SupplementError> {
    let (pid, fd) = at;
    let damaged =
        |why: &str| SupplementError::Damaged(format!("descriptor {fd} of process {pid}: {why}"));
    let sort = Sort::of(socket).map_err(|_errno| damaged("it is not a socket"))?;
    let tables = sort.tables();
    for value in &profile.values {
        let is_it = |row: &&Row| {
            (row.level.cast_unsigned(), row.name.cast_unsigned()) == (value.level, value.name)
        };
        let Some(row) = tables.iter().copied().flatten().find(is_it) else {
            return Err(damaged("an option that such a socket does not have"));
        };
        if value.bytes.len() > VALUE_BYTES_MAX {
            return Err(damaged("the value of an option is too long"));
        }
        let Err(source) = row.set(socket, &value.bytes) else { continue };
        let option = row.label;
        if matches!(row.form, Route(_) | Interface(_)) {
            return Err(SupplementError::Option { pid, fd, option, source });
        }
        warnings.insert(format!(
            "option {option} of descriptor {fd} of process {pid} is not what it was: {}",
            source.desc()
        ));
    }
    Ok(())
}

impl Row {
    /// The value; `None` if the socket, in its state, or the kernel has none.
    fn read(&self, socket: BorrowedFd<'_>) -> Option<Vec<u8>> {
        let mut value = [0; VALUE_BYTES_MAX];
        let room = match self.form {
            Int | Interface(_) => 4,
            Bytes(length) | Route(length) => length,
            Congestion => 16,
        };
        let length = sys::getsockopt(socket, self.level, self.name, &mut value[..room]).ok()?;
        Some(value[..length].to_vec())
    }

    /// Name of the interface that `bytes` means; empty for none. `None` if it is gone.
    fn interface(&self, socket: BorrowedFd<'_>, bytes: &[u8]) -> Option<String> {
        let bytes: [u8; 4] = bytes.try_into().ok()?;
        let index = match self.form {
            Interface(true) => u32::from_be_bytes(bytes),
            _ => u32::from_ne_bytes(bytes),
        };
        if index == 0 {
            return Some(String::new());
        }
        sys::interface_name(socket, index).ok()
    }

    /// Sets a value as [`read`] recorded it, unless the socket has it already.
    fn set(&self, socket: BorrowedFd<'_>, recorded: &[u8]) -> Result<(), Errno> {
        let there = self.read(socket);
        let wanted = match self.form {
            Int | Bytes(_) | Route(_) | Congestion => recorded.to_vec(),
            Interface(is_big_endian) => {
                let name = str::from_utf8(recorded).map_err(|_bytes| Errno::ENODEV)?;
                let index = if name.is_empty() { 0 } else { sys::interface_index(socket, name)? };
                if is_big_endian { index.to_be_bytes() } else { index.to_ne_bytes() }.to_vec()
            }
        };
        if there.as_ref() == Some(&wanted) {
            return Ok(());
        }
        if self.form == Congestion && !is_allowed(&wanted) {
            // As root we could set any, and have the kernel load a module for it.
            return Err(Errno::EPERM);
        }
        sys::setsockopt(socket, self.level, self.name, &wanted)
    }
}

/// Whether any process may choose this congestion control algorithm on this node.
fn is_allowed(name: &[u8]) -> bool {
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let allowed = fs::read_to_string(ALLOWED_CONGESTION).unwrap_or_default();
    allowed.split_ascii_whitespace().any(|one| one.as_bytes() == name)
}
