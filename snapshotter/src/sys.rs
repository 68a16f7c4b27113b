//! System calls that neither std nor nix has.

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd as _;

use nix::libc;

/// Has the kernel begin to write these bytes of `file` to the disk, and does not wait for it (`sync_file_range(2)`). It is
/// advice: a file system that does not take it loses time at the next fsync and nothing else.
#[expect(unsafe_code, reason = "nix has no sync_file_range")]
pub(crate) fn begin_writing(file: &File, bytes: Range<u32>) {
    let (begin, length) = (bytes.start.into(), (bytes.end - bytes.start).into());
    // SAFETY: the call takes a descriptor, which `file` keeps open, and integers; it reads no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), begin, length, libc::SYNC_FILE_RANGE_WRITE) };
}
