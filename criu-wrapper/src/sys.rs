//! System calls without a safe wrapper: which pages of a process exist, descriptors of other
//! processes, socket options as plain bytes, priorities of input and output.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

use nix::errno::Errno;

/// The page belongs to a file and has not been copied on write.
pub(crate) const IS_FILE: u64 = 1 << 2;
/// The page is in memory.
pub(crate) const IS_PRESENT: u64 = 1 << 3;
/// The page is in swap.
pub(crate) const IS_SWAPPED: u64 = 1 << 4;
/// The page is the kernel's page of zeros.
pub(crate) const IS_ZERO: u64 = 1 << 5;

/// Consecutive pages, addresses in bytes; `struct page_region` of linux/fs.h.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

/// `struct pm_scan_arg` of linux/fs.h.
#[derive(Default)]
#[repr(C)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = (3 << 30) | ((size_of::<ScanArg>() as u64) << 16) | (0x66 << 8) | 16;

/// Finds the pages in `start..end` that are present or swapped and neither a file's nor the zero
/// page.
///
/// `pagemap` is `/proc/PID/pagemap`. Returns how many of `regions` were filled and where the walk
/// stopped. Errors: `ENOTTY` or `EINVAL` before Linux 6.7.
#[expect(unsafe_code, reason = "neither std nor nix has this ioctl")]
pub(crate) fn scan_private_pages(
    pagemap: &File,
    start: u64,
    end: u64,
    regions: &mut [Region],
) -> io::Result<(usize, u64)> {
    let mut arg = ScanArg {
        size: size_of::<ScanArg>() as u64,
        start,
        end,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        category_inverted: IS_FILE | IS_ZERO,
        category_mask: IS_FILE | IS_ZERO,
        category_anyof_mask: IS_PRESENT | IS_SWAPPED,
        return_mask: IS_PRESENT | IS_SWAPPED,
        ..ScanArg::default()
    };
    // SAFETY: `arg` and `regions` are ours and live through the call; the kernel writes at most
    // `vec_len` regions, which are plain integers, and fields of `arg`.
    let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as libc::Ioctl, &mut arg) };
    let filled = usize::try_from(filled).map_err(|_negative| io::Error::last_os_error())?;
    Ok((filled.min(regions.len()), arg.walk_end))
}

/// Opens a pidfd. Errors: `ESRCH` if there is no such process.
pub(crate) fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    descriptor(libc::SYS_pidfd_open, i64::from(pid), 0)
}

/// Duplicates descriptor `fd` of another process. Errors: `EBADF` if it has none of that number;
/// `EPERM` without the right to trace it.
pub(crate) fn pidfd_getfd(process: &OwnedFd, fd: u32) -> io::Result<OwnedFd> {
    descriptor(libc::SYS_pidfd_getfd, i64::from(process.as_raw_fd()), i64::from(fd))
}

/// A system call of two integers and no flags that returns a new descriptor.
#[expect(unsafe_code, reason = "neither std nor nix has these calls")]
fn descriptor(call: libc::c_long, first: i64, second: i64) -> io::Result<OwnedFd> {
    // SAFETY: both calls take integers and neither reads nor writes our memory.
    let fd = unsafe { libc::syscall(call, first, second, 0_i64) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0);
    let fd = fd.ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel has just returned `fd` to us; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks for the time left on a timerfd, on which the kernel arms an expired periodic one again.
#[expect(unsafe_code, reason = "nix has it for descriptors of its own type only")]
pub(crate) fn timerfd_gettime(timer: &OwnedFd) -> io::Result<()> {
    let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let mut left = libc::itimerspec { it_interval: zero, it_value: zero };
    // SAFETY: the descriptor is borrowed for the call, and the kernel writes one `itimerspec`.
    let done = unsafe { libc::timerfd_gettime(timer.as_raw_fd(), &raw mut left) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads a socket option into `value`, whose content the kernel may read too. Returns its length.
#[expect(unsafe_code, reason = "nix knows options by type only, and few of them")]
pub(crate) fn getsockopt(
    socket: impl AsFd,
    level: i32,
    name: i32,
    value: &mut [u8],
) -> Result<usize, Errno> {
    let mut length = libc::socklen_t::try_from(value.len()).map_err(|_large| Errno::EINVAL)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `length` bytes, the length of `value`, and updates
    // `length`.
    let done =
        unsafe { libc::getsockopt(fd, level, name, value.as_mut_ptr().cast(), &raw mut length) };
    Errno::result(done)?;
    Ok(usize::try_from(length).unwrap_or(usize::MAX).min(value.len()))
}

/// Sets a socket option. Errors: the kernel's.
#[expect(unsafe_code, reason = "nix knows options by type only, and few of them")]
pub(crate) fn setsockopt(
    socket: impl AsFd,
    level: i32,
    name: i32,
    value: &[u8],
) -> Result<(), Errno> {
    let length = libc::socklen_t::try_from(value.len()).map_err(|_large| Errno::EINVAL)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel only reads `value`, and no more than its length.
    let done = unsafe { libc::setsockopt(fd, level, name, value.as_ptr().cast(), length) };
    Errno::result(done).map(drop)
}

/// Index of the interface `name` in the network namespace of `socket`. Errors: `ENODEV`.
#[expect(unsafe_code, reason = "nix asks in the namespace of the calling thread only")]
pub(crate) fn interface_index(socket: impl AsFd, name: &str) -> Result<u32, Errno> {
    let mut request = interface_request(name)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads the name in `request` and writes the index into it.
    Errno::result(unsafe { libc::ioctl(fd, libc::SIOCGIFINDEX, &raw mut request) })?;
    // SAFETY: the call has set this field.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex }.cast_unsigned())
}

/// Name of the interface `index` in the network namespace of `socket`. Errors: `ENODEV`.
#[expect(unsafe_code, reason = "nix asks in the namespace of the calling thread only")]
pub(crate) fn interface_name(socket: impl AsFd, index: u32) -> Result<String, Errno> {
    let mut request = interface_request("")?;
    request.ifr_ifru.ifru_ifindex = index.cast_signed();
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads the index in `request` and writes the name into it.
    Errno::result(unsafe { libc::ioctl(fd, libc::SIOCGIFNAME, &raw mut request) })?;
    let bytes: Vec<u8> = request.ifr_name.iter().map(|byte| unsigned(*byte)).collect();
    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// Number of the interface that a packet socket is bound to; 0 stands for all.
#[expect(unsafe_code, reason = "nix takes no address that is shorter than its structure")]
pub(crate) fn packet_interface(socket: impl AsFd) -> Result<u32, Errno> {
    // SAFETY: all of its fields are numbers.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sockaddr_ll>();
    let mut length = libc::socklen_t::try_from(size).map_err(|_large| Errno::EINVAL)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes no more than `length` bytes into `address`.
    Errno::result(unsafe { libc::getsockname(fd, (&raw mut address).cast(), &raw mut length) })?;
    if i32::from(address.sll_family) != libc::AF_PACKET {
        return Err(Errno::EAFNOSUPPORT);
    }
    Ok(address.sll_ifindex.cast_unsigned())
}

/// First IPv4 address of the interface `name`, asked of an IPv4 socket. Errors: it has none.
#[expect(unsafe_code, reason = "nix asks in the namespace of the calling thread only")]
pub(crate) fn interface_address(socket: impl AsFd, name: &str) -> Result<[u8; 4], Errno> {
    let mut request = interface_request(name)?;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads the name in `request` and writes a `sockaddr_in` into it.
    Errno::result(unsafe { libc::ioctl(fd, libc::SIOCGIFADDR, &raw mut request) })?;
    // SAFETY: the call has set this field; the address follows family and port.
    let data = unsafe { request.ifr_ifru.ifru_addr }.sa_data;
    Ok([data[2], data[3], data[4], data[5]].map(unsigned))
}

/// `c_char` is signed on some architectures only.
fn unsigned(byte: libc::c_char) -> u8 {
    byte.to_ne_bytes()[0]
}

#[expect(unsafe_code, reason = "`ifreq` has a union")]
fn interface_request(name: &str) -> Result<libc::ifreq, Errno> {
    // SAFETY: `ifreq` is plain data, for which all zeroes is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(Errno::ENODEV);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

/// `IOPRIO_WHO_PROCESS`: one thread.
const IOPRIO_THREAD: libc::c_int = 1;

/// Priority of a thread's input and output: class and level, as ioprio_set(2) has them; 0 if unset.
#[expect(unsafe_code, reason = "neither std nor nix has this call")]
pub(crate) fn io_priority(thread: u32) -> Result<u32, Errno> {
    // SAFETY: the call takes two integers and touches no memory.
    let value = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_THREAD, thread.cast_signed()) };
    u32::try_from(Errno::result(value)?).map_err(|_negative| Errno::EINVAL)
}

/// Sets what [`io_priority`] reads.
#[expect(unsafe_code, reason = "neither std nor nix has this call")]
pub(crate) fn set_io_priority(thread: u32, value: u32) -> Result<(), Errno> {
    let (thread, value) = (thread.cast_signed(), value.cast_signed());
    // SAFETY: the call takes three integers and touches no memory.
    let done = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_THREAD, thread, value) };
    Errno::result(done).map(drop)
}

#[cfg(test)]
pub(crate) mod tests {
    /// Shared anonymous memory.
    pub(crate) struct SharedMemory(*mut libc::c_void, usize);

    impl SharedMemory {
        #[expect(unsafe_code, reason = "std maps no memory")]
        pub(crate) fn new(bytes: usize) -> Self {
            let (protection, flags) =
                (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
            // SAFETY: a new mapping, wherever the kernel likes.
            let address =
                unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
            assert_ne!(address, libc::MAP_FAILED);
            Self(address, bytes)
        }

        #[expect(unsafe_code, reason = "std maps no memory")]
        pub(crate) fn bytes(&mut self) -> &mut [u8] {
            // SAFETY: mapped readable and writable, with this length, until it is dropped; nothing
            // else has it.
            unsafe { std::slice::from_raw_parts_mut(self.0.cast(), self.1) }
        }
    }

    impl Drop for SharedMemory {
        #[expect(unsafe_code, reason = "std maps no memory")]
        fn drop(&mut self) {
            // SAFETY: mapped by us, and no slice outlives it.
            unsafe { libc::munmap(self.0, self.1) };
        }
    }
}
