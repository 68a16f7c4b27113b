//! The few system calls without a safe wrapper. One call to a block; nothing else in the crate is
//! unsafe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
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

/// Number of bytes that a pipe or FIFO holds. Errors: the kernel's.
#[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
pub(crate) fn unread_bytes(pipe: impl AsFd) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is borrowed for the call, and the kernel writes one integer.
    let done = unsafe { libc::ioctl(pipe.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(usize::try_from(bytes).unwrap_or(0)) }
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

/// `struct loop_info64` of the kernel's `linux/loop.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoopInfo {
    _device: u64,
    _inode: u64,
    _rdevice: u64,
    _offset: u64,
    _sizelimit: u64,
    _number: u32,
    _encrypt_type: u32,
    _encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    _crypt_name: [u8; 64],
    _encrypt_key: [u8; 32],
    _init: [u64; 2],
}

impl LoopInfo {
    /// Name that the device got when it was configured, up to its first NUL.
    pub(crate) fn name(&self) -> &[u8] {
        self.file_name.split(|byte| *byte == 0).next().unwrap_or_default()
    }
}

/// `struct loop_config` of the kernel's `linux/loop.h`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    _reserved: [u64; 8],
}

/// The device goes when it is neither open nor mounted any more (`LO_FLAGS_AUTOCLEAR`).
const LOOP_AUTOCLEAR: u32 = 4;
/// Reads and writes go past the page cache of the image (`LO_FLAGS_DIRECT_IO`).
const LOOP_DIRECT_IO: u32 = 16;

/// What the kernel knows of a loop device. Errors: `ENXIO` when it has no image.
#[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
pub(crate) fn loop_status(device: impl AsFd) -> io::Result<LoopInfo> {
    const LOOP_GET_STATUS64: libc::c_ulong = 0x4c05;
    // SAFETY: `LoopInfo` is plain integers, for which all zeroes is a value.
    let mut info: LoopInfo = unsafe { std::mem::zeroed() };
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: the descriptor is borrowed for the call, and the kernel fills in `info`, which has
    // its layout.
    let done = unsafe { libc::ioctl(fd, LOOP_GET_STATUS64, &raw mut info) };
    if done == 0 { Ok(info) } else { Err(io::Error::last_os_error()) }
}

/// Number of a loop device that is free, which another process may take first.
#[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
pub(crate) fn free_loop(control: impl AsFd) -> io::Result<u32> {
    const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
    // SAFETY: the descriptor is borrowed for the call, which takes no other argument.
    let number = unsafe { libc::ioctl(control.as_fd().as_raw_fd(), LOOP_CTL_GET_FREE) };
    u32::try_from(number).map_err(|_cause| io::Error::last_os_error())
}

/// Makes a free loop device show `image`, in sectors of 4096 bytes, under a name of at most 63
/// bytes.
///
/// Errors: the kernel's, `EBUSY` when it is not free.
#[expect(unsafe_code, reason = "no safe wrapper for this ioctl")]
pub(crate) fn configure_loop(
    device: impl AsFd,
    image: impl AsFd,
    name: &str,
    direct: bool,
) -> io::Result<()> {
    const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
    // SAFETY: `LoopConfig` is plain integers, for which all zeroes is a value.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = image.as_fd().as_raw_fd().cast_unsigned();
    config.block_size = 4096;
    config.info.flags = LOOP_AUTOCLEAR | if direct { LOOP_DIRECT_IO } else { 0 };
    for (to, from) in config.info.file_name[..63].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    let fd = device.as_fd().as_raw_fd();
    // SAFETY: both descriptors are borrowed for the call, and the kernel only reads `config`, which
    // has its layout.
    let done = unsafe { libc::ioctl(fd, LOOP_CONFIGURE, &raw const config) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has a file system write everything to its device and hold all further writes back (`FIFREEZE`),
/// or lets them go on (`FITHAW`).
///
/// Errors: the kernel's, `EBUSY` when it is frozen already and `EINVAL` when it is not.
#[expect(unsafe_code, reason = "no safe wrapper for these ioctls")]
pub(crate) fn freeze_file_system(directory: impl AsFd, freeze: bool) -> Result<(), Errno> {
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    const FITHAW: libc::c_ulong = 0xc004_5878;
    let request = if freeze { FIFREEZE } else { FITHAW };
    let unused: libc::c_int = 0;
    // SAFETY: the descriptor is borrowed for the call; the kernel ignores the argument.
    let done = unsafe { libc::ioctl(directory.as_fd().as_raw_fd(), request, &raw const unused) };
    Errno::result(done).map(drop)
}

/// What may be done to the files of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// As at its source.
    AsBefore,
    ReadOnly,
}

/// Mounts the tree at `from` once more at `at`, with the users of its files mapped as by the user
/// namespace `namespace`.
///
/// Errors: the kernel's, `EINVAL` for a file system without ID-mapped mounts.
#[expect(unsafe_code, reason = "no safe wrappers for these calls")]
pub(crate) fn mount_mapped(
    from: &Path,
    at: &Path,
    namespace: &OwnedFd,
    access: Access,
) -> io::Result<()> {
    const RECURSIVE: libc::c_int = libc::AT_RECURSIVE;
    let tree_flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    let tree_flags = tree_flags | RECURSIVE.cast_unsigned();
    let (from, at) = (c_path(from)?, c_path(at)?);
    // SAFETY: the kernel reads the path, which ends in a NUL and outlives the call.
    let tree =
        unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, from.as_ptr(), tree_flags) };
    let tree = RawFd::try_from(tree).ok().filter(|fd| *fd >= 0);
    let tree = tree.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just returned the descriptor to us; nothing else owns it.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    // SAFETY: `mount_attr` is plain integers, for which all zeroes is a value.
    let mut attributes: libc::mount_attr = unsafe { std::mem::zeroed() };
    attributes.attr_set = libc::MOUNT_ATTR_IDMAP;
    if access == Access::ReadOnly {
        attributes.attr_set |= libc::MOUNT_ATTR_RDONLY;
    }
    attributes.propagation = libc::MS_PRIVATE;
    attributes.userns_fd = u64::from(namespace.as_raw_fd().cast_unsigned());
    let (fd, empty) = (tree.as_raw_fd(), c"".as_ptr());
    // SAFETY: both descriptors are open for the call, and the kernel only reads `attributes`, whose
    // size that it is given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            empty,
            libc::AT_EMPTY_PATH | RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(done)?;
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH;
    // SAFETY: the descriptor is open for the call, and the kernel reads the paths, which end in a
    // NUL.
    let done = unsafe {
        libc::syscall(libc::SYS_move_mount, fd, empty, libc::AT_FDCWD, at.as_ptr(), flags)
    };
    Errno::result(done).map(drop).map_err(io::Error::from)
}

fn c_path(path: &Path) -> io::Result<std::ffi::CString> {
    use std::os::unix::ffi::OsStrExt as _;
    Ok(std::ffi::CString::new(path.as_os_str().as_bytes())?)
}
