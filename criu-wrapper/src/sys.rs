//! System calls without a safe wrapper: which pages of a process exist, and descriptors of other
//! processes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};

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
    // SAFETY: the kernel has just returned `fd` to us; nobody else owns it.
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
            // SAFETY: mapped readable and writable, with this length, until it is dropped; nobody else has it.
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
