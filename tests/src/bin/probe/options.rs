//! Sockets: memberships in multicast groups, and options that are set once and then relied upon.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::thread;

use crate::{TICK, report};

/// Group and port of the packets that the probe sends to itself.
const GROUP: (Ipv4Addr, u16) = (Ipv4Addr::new(239, 1, 1, 1), 5353);
/// An IPv6 group, joined on the loopback interface, as `/proc/net/igmp6` writes it.
const GROUP_V6: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x4711);
const GROUP_V6_TEXT: &str = "ff020000000000000000000000004711";
/// Index of the loopback interface, in every network namespace.
const LOOPBACK: u32 = 1;

/// `probe multicast [ADDRESS]`: is a member of an IPv4 group on the interface with that address, of
/// loopback without one, and of an IPv6 group, and sends to the first. The line: `heard COUNT v6
/// IS_MEMBER`, and why the last packet could not be sent.
pub(crate) fn multicast(arguments: &[String]) -> io::Result<()> {
    let member = UdpSocket::bind(("0.0.0.0", GROUP.1))?;
    let address = arguments.first().map_or(Ok(Ipv4Addr::LOCALHOST), |text| text.parse());
    member.join_multicast_v4(&GROUP.0, &address.map_err(io::Error::other)?)?;
    member.set_nonblocking(true)?;
    let member_v6 = UdpSocket::bind(("::", GROUP.1 + 1))?;
    member_v6.join_multicast_v6(&GROUP_V6, LOOPBACK)?;
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut heard = 0_u64;
    loop {
        let sent = sender.send_to(b"anyone?", GROUP);
        let mut packet = [0; 16];
        while member.recv(&mut packet).is_ok() {
            heard += 1;
        }
        let is_member = fs::read_to_string("/proc/self/net/igmp6")?.contains(GROUP_V6_TEXT);
        let failed = sent.err().map_or_else(String::new, |error| format!(" {error}"));
        report(&format!("heard {heard} v6 {is_member}{failed}"))?;
        thread::sleep(TICK);
    }
}

/// An option of a socket: level, name and value.
type Setting = (i32, i32, &'static [u8]);

/// Of a listener.
const OF_TCP: &[Setting] = &[
    (libc::SOL_TCP, libc::TCP_USER_TIMEOUT, &12_345_i32.to_ne_bytes()),
    (libc::SOL_TCP, libc::TCP_CONGESTION, b"reno"),
    (libc::SOL_TCP, libc::TCP_SYNCNT, &2_i32.to_ne_bytes()),
];
/// Of a socket for datagrams.
const OF_UDP: &[Setting] = &[
    (libc::SOL_IP, libc::IP_MULTICAST_IF, &[127, 0, 0, 1]),
    (libc::SOL_IP, libc::IP_MULTICAST_TTL, &7_i32.to_ne_bytes()),
    (libc::SOL_IP, libc::IP_MULTICAST_LOOP, &0_i32.to_ne_bytes()),
    (libc::SOL_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_DO.to_ne_bytes()),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &1_i32.to_ne_bytes()),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, &1_i32.to_ne_bytes()),
];
/// Of one for IPv6.
const OF_UDP6: &[Setting] = &[
    (libc::SOL_IPV6, libc::IPV6_TCLASS, &0x20_i32.to_ne_bytes()),
    (libc::SOL_IPV6, libc::IPV6_MULTICAST_IF, &1_i32.to_ne_bytes()),
];

/// Sets options that CRIU does not dump. The line: which of them the sockets have no more.
pub(crate) fn options(_arguments: &[String]) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let six = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
    let all = [(listener.as_fd(), OF_TCP), (datagrams.as_fd(), OF_UDP), (six.as_fd(), OF_UDP6)];
    let each = || all.iter().flat_map(|(socket, settings)| settings.iter().map(|s| (*socket, *s)));
    for (socket, setting) in each() {
        set(socket, setting)?;
    }
    loop {
        let mut lost = Vec::new();
        for (socket, (level, name, value)) in each() {
            if !get(socket, (level, name, value))?.starts_with(value) {
                lost.push(format!("{level}:{name}"));
            }
        }
        report(&format!("lost [{}]", lost.join(" ")))?;
        thread::sleep(TICK);
    }
}

#[expect(unsafe_code, reason = "nix lacks most of these options")]
fn set(socket: BorrowedFd<'_>, (level, name, value): Setting) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the kernel only reads `value`, and no more than its length.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[expect(unsafe_code, reason = "nix lacks most of these options")]
fn get(socket: BorrowedFd<'_>, (level, name, _): Setting) -> io::Result<[u8; 16]> {
    let mut value = [0; 16];
    let mut length = 16;
    // SAFETY: the kernel writes at most `length` bytes, the length of `value`.
    let done = unsafe {
        let value = value.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), level, name, value, &raw mut length)
    };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
