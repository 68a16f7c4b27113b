//! Interfaces that sockets refer to, which the destination must have before anything moves.
//!
//! [`Survey`] finds them while the container runs. [`InterfaceUse::is_met`] asks the destination's
//! network namespace by the same rule by which the restore looks for them.

use std::net::Ipv4Addr;
use std::os::fd::AsFd;

use super::SupplementError;
use super::multicast::{self, Groups};
use super::options::{self, Sort};
use crate::sys;

/// Option with the name of the interface that a socket is bound to. CRIU restores it.
const BOUND: (i32, i32) = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);

/// Size of an interface's name with its end, in bytes.
const NAME_BYTES: usize = libc::IF_NAMESIZE;

/// What a socket needs an interface for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct InterfaceUse {
    /// Such as `is a member of multicast group 239.1.1.1`.
    pub what: String,
    /// Its name at the source.
    pub interface: String,
    /// IPv4 address by which an interface of another name will do; empty if none will.
    pub address: Vec<u8>,
}

/// Looks at the sockets of one network namespace.
#[derive(Debug)]
pub struct Survey(Groups);

impl Survey {
    /// Of the network namespace of process `pid`. Errors: I/O.
    pub fn of(pid: u32) -> Result<Self, SupplementError> {
        Groups::of(pid).map(Self)
    }

    /// What `socket` uses interfaces for. A membership that cannot be read is left to the dump.
    pub fn uses(&self, socket: impl AsFd) -> Vec<InterfaceUse> {
        let socket = socket.as_fd();
        let Ok(sort) = Sort::of(socket) else { return Vec::new() };
        let mut found = multicast::uses(socket, &self.0);
        let by_name =
            |what: String, interface| InterfaceUse { what, interface, address: Vec::new() };
        for (option, interface) in options::interfaces(socket) {
            found.push(by_name(format!("sends through it ({option})"), interface));
        }
        let mut name = [0; NAME_BYTES];
        let is_internet = matches!(sort.domain, libc::AF_INET | libc::AF_INET6);
        if is_internet && let Ok(length) = sys::getsockopt(socket, BOUND.0, BOUND.1, &mut name) {
            let name = name[..length].split(|byte| *byte == 0).next().unwrap_or_default();
            if !name.is_empty() {
                let name = String::from_utf8_lossy(name).into_owned();
                found.push(by_name("is bound to it".to_owned(), name));
            }
        }
        found
    }
}

/// The address of the interface through which `socket` sends to multicast groups, if it chose one.
pub fn source_address(socket: impl AsFd) -> Option<Ipv4Addr> {
    options::source_address(socket.as_fd()).map(Ipv4Addr::from)
}

/// Name of the interface `index` in the network namespace of `socket`; `None` if there is none.
pub fn interface_name(socket: impl AsFd, index: u32) -> Option<String> {
    sys::interface_name(socket, index).ok()
}

/// Number of the interface that a packet socket is bound to; `None` for other sockets and for one
/// that is bound to none.
pub fn packet_interface(socket: impl AsFd) -> Option<u32> {
    sys::packet_interface(socket).ok().filter(|index| *index != 0)
}

impl InterfaceUse {
    /// Whether the network namespace of `socket`, an IPv4 socket, has such an interface.
    pub fn is_met(&self, socket: impl AsFd) -> bool {
        multicast::find_interface(socket.as_fd(), &self.interface, &self.address).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_membership_names_its_interface_and_another_with_its_address_will_do() {
        let member = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        let plain = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        member.join_multicast_v4(&Ipv4Addr::new(239, 1, 1, 9), &Ipv4Addr::LOCALHOST).unwrap();
        let survey = Survey::of(std::process::id()).unwrap();
        assert_eq!(survey.uses(&plain), []);
        let uses = survey.uses(&member);
        let [one] = &uses[..] else { panic!("{uses:?}") };
        assert_eq!(one.what, "is a member of multicast group 239.1.1.9");
        assert_eq!((one.interface.as_str(), &one.address[..]), ("lo", &[127, 0, 0, 1][..]));
        assert!(one.is_met(&plain));
        let renamed = InterfaceUse { interface: "none0".to_owned(), ..one.clone() };
        assert!(renamed.is_met(&plain));
        assert!(!InterfaceUse { address: vec![192, 0, 2, 9], ..renamed }.is_met(&plain));
    }
}
