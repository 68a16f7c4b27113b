//! Sockets: `mptcp` listens as a Go program does, with Multipath TCP where the kernel has it and
//! else with TCP. The line has what that was, and what a socket is that it opens now: `listens
//! mptcp now mptcp`. `unix-server` and `unix-client` meet at `/server.sock`; the server's line is
//! `clients COUNT`.
#![expect(unsafe_code, reason = "std and nix open no socket of this protocol")]

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{Backlog, listen};

use crate::{report, undumped};

/// Where server and client meet.
const SOCKET: &str = "/server.sock";

pub(crate) fn mptcp(_arguments: &[String]) -> io::Result<()> {
    let (kind, socket) = open()?;
    // Without an address the kernel chooses a port, on all of them.
    listen(&socket, Backlog::new(16)?)?;
    let _listener = TcpListener::from(socket);
    loop {
        report(&format!("listens {kind} now {}", open()?.0))?;
        thread::sleep(Duration::from_millis(20));
    }
}

/// A socket, and what it is.
fn open() -> io::Result<(&'static str, OwnedFd)> {
    let protocols = [("mptcp", libc::IPPROTO_MPTCP), ("tcp", libc::IPPROTO_TCP)];
    for (name, protocol) in protocols {
        let fd = undumped::socket(libc::AF_INET, libc::SOCK_STREAM, protocol);
        if let Some(fd) = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0) {
            // SAFETY: the call has just returned the descriptor; nothing else has it.
            return Ok((name, unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Err(io::Error::last_os_error())
}

pub(crate) fn unix_server(_arguments: &[String]) -> io::Result<()> {
    let _ = fs::remove_file(SOCKET);
    let listener = UnixListener::bind(SOCKET)?;
    let mut clients = Vec::new();
    loop {
        report(&format!("clients {}", clients.len()))?;
        clients.push(listener.accept()?);
    }
}

pub(crate) fn unix_client(_arguments: &[String]) -> io::Result<()> {
    let _stream = UnixStream::connect(SOCKET)?;
    loop {
        thread::park();
    }
}
