//! `undumped`: holds each thing that CRIU cannot dump and that the kernel lets it have. The line
//! names them: `holds io_uring memfd_secret ...`.
#![expect(unsafe_code, reason = "std and nix have none of these calls")]

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::thread;

use crate::report;

/// Opens one thing: a descriptor, or a negative number where the kernel refuses it.
type Open = fn() -> libc::c_long;

/// What is tried, by the word that the line has for it.
const THINGS: &[(&str, Open)] = &[
    ("io_uring", io_uring),
    ("memfd_secret", memfd_secret),
    ("userfaultfd", userfaultfd),
    ("landlock", landlock),
    ("mqueue", mqueue),
    ("vsock", vsock),
    ("alg", alg),
    ("sctp", sctp),
];

pub(crate) fn hold(_arguments: &[String]) -> io::Result<()> {
    let mut held: Vec<(&str, OwnedFd)> = Vec::new();
    for (name, open) in THINGS {
        if let Some(fd) = RawFd::try_from(open()).ok().filter(|fd| *fd >= 0) {
            // SAFETY: the call has just returned the descriptor; nothing else has it.
            held.push((name, unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let names: Vec<&str> = held.iter().map(|(name, _)| *name).collect();
    report(&format!("holds {}", names.join(" ")))?;
    loop {
        thread::park();
    }
}

fn io_uring() -> libc::c_long {
    // `struct io_uring_params` of `linux/io_uring.h`.
    let mut parameters = [0_u8; 120];
    // SAFETY: the kernel writes into the 120 bytes, which outlive the call.
    unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) }
}

fn memfd_secret() -> libc::c_long {
    // SAFETY: the call takes an integer.
    unsafe { libc::syscall(libc::SYS_memfd_secret, 0) }
}

fn userfaultfd() -> libc::c_long {
    const USER_MODE_ONLY: libc::c_int = 1;
    // SAFETY: the call takes an integer.
    unsafe { libc::syscall(libc::SYS_userfaultfd, USER_MODE_ONLY) }
}

fn landlock() -> libc::c_long {
    let handled_access: u64 = 1;
    // SAFETY: the kernel reads the eight bytes, which outlive the call.
    unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const handled_access,
            size_of::<u64>(),
            0,
        )
    }
}

fn mqueue() -> libc::c_long {
    let attributes: *const libc::c_void = std::ptr::null();
    let (flags, mode) = (libc::O_CREAT | libc::O_RDWR, 0o600);
    // SAFETY: the name is a string with an end, and no attributes are given.
    unsafe { libc::syscall(libc::SYS_mq_open, c"probe".as_ptr(), flags, mode, attributes) }
}

fn vsock() -> libc::c_long {
    socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)
}

fn alg() -> libc::c_long {
    socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)
}

fn sctp() -> libc::c_long {
    socket(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_SCTP)
}

/// socket(2): a descriptor, or -1.
pub(crate) fn socket(
    family: libc::c_int,
    kind: libc::c_int,
    protocol: libc::c_int,
) -> libc::c_long {
    // SAFETY: the call takes integers.
    unsafe { libc::socket(family, kind, protocol) }.into()
}
