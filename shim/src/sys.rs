//! The few system calls without a safe wrapper. One call to a block; nothing else in the crate is
//! unsafe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::errno::Errno;

/// Sends a signal, which may be a real-time one. Errors: the kernel's.
#[expect(unsafe_code, reason = "nix knows no real-time signals")]
pub(crate) fn kill(pid: libc::pid_t, signal: i32) -> Result<(), Errno> {
    // SAFETY: the call takes two integers and touches no memory.
    Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Sets the size of a terminal, given its master side, in characters.
///
/// Errors: the kernel's, `ENOTTY` when `terminal` is none.
#[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
pub(crate) fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the descriptor is borrowed for the call, and the kernel only reads `size`.
    let done =
        unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets the program that `command` starts inherit `fds` as descriptors 3, 4, 5, ...
#[expect(unsafe_code, reason = "std passes on descriptors 0 to 2 only")]
pub(crate) fn inherit(command: &mut Command, fds: Vec<OwnedFd>) {
    // First out of the way of each other's final numbers, then into place.
    let place = move || -> io::Result<()> {
        let first_free: RawFd = 3 + i32::try_from(fds.len()).unwrap_or(0);
        let mut parked = [-1; 8];
        for (slot, fd) in parked.iter_mut().zip(&fds) {
            // SAFETY: duplicates a descriptor that `fds` owns; no memory is involved.
            *slot = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first_free) };
            if *slot < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        for (target, slot) in (3..first_free).zip(parked) {
            // SAFETY: as above; `dup2` clears close-on-exec, which is the point.
            if unsafe { libc::dup2(slot, target) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: no allocation, no lock.
    unsafe { command.pre_exec(place) };
}

/// Brings up the loopback interface of the network namespace that the calling thread is in.
///
/// Errors: the kernel's; `EPERM` without the right to.
#[expect(unsafe_code, reason = "no safe wrapper for these ioctls")]
pub(crate) fn raise_loopback() -> io::Result<()> {
    let socket = std::net::UdpSocket::bind(("0.0.0.0", 0))?;
    // SAFETY: `ifreq` is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = from.cast_signed();
    }
    // SAFETY: the descriptor is open, and the kernel writes the flags into `request`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    const UP: libc::c_short = 1;
    const _: () = assert!(UP as libc::c_int == libc::IFF_UP);
    // SAFETY: the call before this one has set the flags.
    unsafe { request.ifr_ifru.ifru_flags |= UP };
    // SAFETY: the descriptor is open, and the kernel only reads `request`.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
