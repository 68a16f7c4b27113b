//! The one system call without a safe wrapper: asking the kernel which pages of a process exist.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;

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
