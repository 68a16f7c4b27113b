//! Packet locks that CRIU leaves in a network namespace.
//!
//! While CRIU reads or writes TCP connections it drops the packets of the namespace: by an nftables
//! table whose name begins with `CRIU-`, or by a chain `CRIU` of iptables. A CRIU that is killed
//! leaves the lock, and so does a dump that ends the container. A namespace with a name outlives
//! the container, and stays mute.
//!
//! [`lift`] removes both kinds. Tables are found and removed over netlink, since a node whose CRIU
//! locks with nftables may have no program `nft`. The namespace that this process is in is left
//! alone: its other users may have a CRIU at work, and its locks name single connections.
//!
//! [`end_repair`] takes sockets out of the mode that CRIU reads connections in, in which a program
//! cannot use them.
//!
//! Source of the message formats: linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
    setsockopt, socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::supplement::sockets_of;
use crate::sys;

/// What CRIU's tables are called.
const PREFIX: &[u8] = b"CRIU-";
/// Longest answer of the kernel, in bytes; it sends a listing in parts of at most 32 KiB.
const ANSWER_BYTES_MAX: usize = 1 << 16;
/// Answers that are read of one request.
const ANSWERS_MAX: usize = 1024;
/// Seconds that the kernel may take to answer.
const ANSWER_SECONDS_MAX: i64 = 5;
/// Jumps to CRIU's chain that are removed from another.
const JUMPS_MAX: usize = 16;

const NFTABLES: u16 = 10 << 8;
const NEW_TABLE: u16 = NFTABLES;
const GET_TABLE: u16 = NFTABLES | 1;
const DELETE_TABLE: u16 = NFTABLES | 2;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
/// Attribute with a table's name.
const NAME: u16 = 1;
const HEADER_BYTES: usize = 16;

/// An nftables table: family and name.
type Table = (u8, Vec<u8>);

/// Removes every packet lock of CRIU's in the network namespace at `path`; returns their names.
///
/// `run` runs a program to its end and tells whether it succeeded; it is called from another
/// thread, whose network namespace the program inherits. Errors: the namespace cannot be joined;
/// the kernel refuses. Without a namespace at `path` there is nothing to lift.
pub fn lift(
    path: &Path,
    run: &(dyn Fn(&mut Command) -> io::Result<bool> + Sync),
) -> io::Result<Vec<String>> {
    let namespace = match File::open(path) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => {
            return Ok(Vec::new());
        }
        opened => opened?,
    };
    let (there, here) = (namespace.metadata()?, fs::metadata("/proc/self/ns/net")?);
    if (there.dev(), there.ino()) == (here.dev(), here.ino()) {
        return Ok(Vec::new());
    }
    // A thread that ends there: the others stay where they are.
    std::thread::scope(|scope| {
        let work = || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            lift_here(run)
        };
        let lost = |_panic| Err(io::Error::other("the thread that lifts packet locks died"));
        scope.spawn(work).join().unwrap_or_else(lost)
    })
}

fn lift_here(run: &(dyn Fn(&mut Command) -> io::Result<bool> + Sync)) -> io::Result<Vec<String>> {
    let mut lifted = Vec::new();
    let netlink = open()?;
    let tables = match tables(&netlink) {
        // A kernel without nftables.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL)) => {
            Vec::new()
        }
        tables => tables?,
    };
    for (family, name) in tables.iter().filter(|(_, name)| name.starts_with(PREFIX)) {
        match delete(&netlink, *family, name) {
            // CRIU has removed it meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            done => done?,
        }
        lifted.push(String::from_utf8_lossy(name).into_owned());
    }
    // Either flavour of iptables has its table only where rules were ever set.
    let legacy = |file: &str| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}"));
        text.is_ok_and(|text| text.lines().any(|line| line == "filter"))
    };
    let is_filter = |of: u8| tables.iter().any(|(family, name)| *family == of && name == b"filter");
    for (program, family, file) in
        [("iptables", 2, "ip_tables_names"), ("ip6tables", 10, "ip6_tables_names")]
    {
        if (is_filter(family) || legacy(file)) && remove_chain(program, run)? {
            lifted.push(format!("{program} chain CRIU"));
        }
    }
    Ok(lifted)
}

/// Removes the chain `CRIU` of iptables. Returns whether there was one.
fn remove_chain(
    program: &str,
    run: &(dyn Fn(&mut Command) -> io::Result<bool> + Sync),
) -> io::Result<bool> {
    let call = |words: &[&str]| {
        let mut command = Command::new(program);
        command.args(["-w", "5"]).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        match run(&mut command) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            done => done,
        }
    };
    if !call(&["-S", "CRIU"])? {
        return Ok(false);
    }
    for chain in ["INPUT", "OUTPUT"] {
        for _ in 0..JUMPS_MAX {
            if !call(&["-D", chain, "-j", "CRIU"])? {
                break;
            }
        }
    }
    call(&["-F", "CRIU"])?;
    if call(&["-X", "CRIU"])? { Ok(true) } else { Err(io::Error::other("chain CRIU stays")) }
}

fn open() -> io::Result<OwnedFd> {
    let netlink = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    setsockopt(&netlink, ReceiveTimeout, &TimeVal::seconds(ANSWER_SECONDS_MAX))?;
    Ok(netlink)
}

/// A message: header, address family, and what belongs to it.
fn message(kind: u16, flags: u16, family: u8, resource: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER_BYTES + 4 + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | REQUEST).to_ne_bytes());
    // Sequence and port: one request at a time on a socket of its own.
    bytes.extend([0; 8]);
    bytes.extend([family, 0]);
    bytes.extend(resource.to_be_bytes());
    bytes.extend(body);
    bytes
}

/// An attribute with a name, padded to 4 bytes.
fn name_attribute(name: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + name.len() + 1).unwrap_or(u16::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(NAME.to_ne_bytes());
    bytes.extend(name);
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn tables(netlink: &OwnedFd) -> io::Result<Vec<Table>> {
    send(netlink.as_raw_fd(), &message(GET_TABLE, DUMP, 0, 0, &[]), MsgFlags::empty())?;
    let mut found = Vec::new();
    answers(netlink, |kind, payload| {
        if kind == NEW_TABLE
            && let Some((family, name)) = table_in(payload)
        {
            found.push((family, name));
        }
        Ok(false)
    })?;
    Ok(found)
}

/// Family and name in the description of a table.
fn table_in(payload: &[u8]) -> Option<Table> {
    let family = *payload.first()?;
    let mut rest = payload.get(4..)?;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_ne_bytes(*length));
        let (kind, _) = after.split_first_chunk::<2>()?;
        // The two upper bits are flags.
        let kind = u16::from_ne_bytes(*kind) & 0x3fff;
        let value = rest.get(4..length)?;
        if kind == NAME {
            return Some((family, value.split(|byte| *byte == 0).next()?.to_vec()));
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn delete(netlink: &OwnedFd, family: u8, name: &[u8]) -> io::Result<()> {
    let mut batch = message(BATCH_BEGIN, 0, 0, NFTABLES >> 8, &[]);
    batch.extend(message(DELETE_TABLE, ACKNOWLEDGE, family, 0, &name_attribute(name)));
    batch.extend(message(BATCH_END, 0, 0, NFTABLES >> 8, &[]));
    send(netlink.as_raw_fd(), &batch, MsgFlags::empty())?;
    answers(netlink, |kind, _| Ok(kind == ERROR))
}

/// Hands the kernel's messages to `take` until it returns true or the listing ends. Errors: the
/// kernel's.
fn answers(
    netlink: impl AsFd,
    mut take: impl FnMut(u16, &[u8]) -> io::Result<bool>,
) -> io::Result<()> {
    let mut buffer = vec![0; ANSWER_BYTES_MAX];
    for _ in 0..ANSWERS_MAX {
        let length = recv(netlink.as_fd().as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let mut rest = &buffer[..length];
        while let Some((head, _)) = rest.split_first_chunk::<HEADER_BYTES>() {
            let length = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]);
            let kind = u16::from_ne_bytes([head[4], head[5]]);
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            let broken = || io::Error::new(io::ErrorKind::InvalidData, "a cut netlink message");
            let payload = rest.get(HEADER_BYTES..length).ok_or_else(broken)?;
            if kind == DONE {
                return Ok(());
            }
            if kind == ERROR {
                let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                if code != 0 {
                    return Err(Errno::from_raw(-code).into());
                }
            }
            if take(kind, payload)? {
                return Ok(());
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "the kernel's answer does not end"))
}

/// Ends the repair mode of every TCP socket of these processes. Returns how many were in it.
///
/// Processes and sockets that end meanwhile are skipped.
pub fn end_repair(processes: &BTreeSet<u32>) -> usize {
    let (mut seen, mut ended) = (BTreeSet::new(), 0);
    for pid in processes {
        let (Ok(sockets), Ok(process)) = (sockets_of(*pid), sys::pidfd_open(*pid)) else {
            continue;
        };
        for (fd, inode) in sockets {
            if !seen.insert(inode) {
                continue;
            }
            let Ok(there) = sys::pidfd_getfd(&process, fd) else { continue };
            let mut mode = [0; 4];
            let asked = sys::getsockopt(&there, libc::IPPROTO_TCP, libc::TCP_REPAIR, &mut mode);
            if asked.is_ok() && mode != [0; 4] {
                let off = 0_i32.to_ne_bytes();
                let done = sys::setsockopt(&there, libc::IPPROTO_TCP, libc::TCP_REPAIR, &off);
                ended += usize::from(done.is_ok());
            }
        }
    }
    ended
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn run(command: &mut Command) -> io::Result<bool> {
        command.status().map(|status| status.success())
    }

    #[test]
    fn a_table_is_asked_for_and_removed_in_the_kernel_s_format() {
        let asked = message(GET_TABLE, DUMP, 0, 0, &[]);
        assert_eq!(asked, b"\x14\0\0\0\x01\x0a\x01\x03\0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(name_attribute(b"CRIU-1"), b"\x0b\0\x01\0CRIU-1\0\0");
        let described = [&[1, 0, 0, 0][..], &name_attribute(b"CRIU-1")].concat();
        assert_eq!(table_in(&described), Some((1, b"CRIU-1".to_vec())));
        for cut in 0..described.len() {
            let _ = table_in(&described[..cut]);
        }
    }

    /// Method: a namespace of a thread of this test; needs root.
    #[test]
    fn locks_are_lifted_and_other_tables_stay() {
        let inside = std::thread::spawn(|| {
            if let Err(error) = nix::sched::unshare(CloneFlags::CLONE_NEWNET) {
                assert!(std::env::var_os("CI").is_none(), "needs root: {error}");
                eprintln!("skipped: needs root ({error})");
                return None;
            }
            let netlink = open().unwrap();
            let add = |name: &[u8]| {
                let mut batch = message(BATCH_BEGIN, 0, 0, NFTABLES >> 8, &[]);
                let body = name_attribute(name);
                batch.extend(message(NEW_TABLE, ACKNOWLEDGE | 0x400, 1, 0, &body));
                batch.extend(message(BATCH_END, 0, 0, NFTABLES >> 8, &[]));
                send(netlink.as_raw_fd(), &batch, MsgFlags::empty()).unwrap();
                answers(&netlink, |kind, _| Ok(kind == ERROR)).unwrap();
            };
            for name in [&b"CRIU-0123"[..], b"other", b"CRIU-9"] {
                add(name);
            }
            let path = format!("/proc/self/task/{}/ns/net", nix::unistd::gettid());
            let mut lifted = lift(Path::new(&path), &run).unwrap();
            lifted.sort_unstable();
            assert_eq!(lifted, ["CRIU-0123", "CRIU-9"]);
            assert_eq!(lift(Path::new(&path), &run).unwrap(), [""; 0]);
            Some(tables(&netlink).unwrap())
        });
        if let Some(left) = inside.join().unwrap() {
            assert_eq!(left, [(1, b"other".to_vec())]);
        }
    }

    #[test]
    fn our_own_namespace_and_one_that_is_gone_are_left_alone() {
        assert_eq!(lift(Path::new("/proc/self/ns/net"), &run).unwrap(), [""; 0]);
        assert_eq!(lift(Path::new("/run/netns/no-such-namespace"), &run).unwrap(), [""; 0]);
    }

    /// Method: a connection of this process's own; needs CAP_NET_ADMIN to set the mode.
    #[test]
    fn sockets_in_repair_mode_can_be_used_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let on = 1_i32.to_ne_bytes();
        if let Err(error) = sys::setsockopt(&stream, libc::IPPROTO_TCP, libc::TCP_REPAIR, &on) {
            assert!(std::env::var_os("CI").is_none(), "needs root: {error}");
            return;
        }
        assert!(io::Write::write(&mut stream, b"x").is_err());
        assert_eq!(end_repair(&BTreeSet::from([std::process::id()])), 1);
        assert!(io::Write::write(&mut stream, b"x").is_ok());
    }
}
