//! System calls that neither std nor nix has.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use nix::libc;
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

/// Has the kernel begin to write these bytes of `file` to the disk, and does not wait for it (`sync_file_range(2)`). It is
/// advice: a file system that does not take it loses time at the next fsync and nothing else.
#[expect(unsafe_code, reason = "nix has no sync_file_range")]
pub(crate) fn begin_writing(file: &File, bytes: Range<u32>) {
    let (begin, length) = (bytes.start.into(), (bytes.end - bytes.start).into());
    // SAFETY: the call takes a descriptor, which `file` keeps open, and integers; it reads no memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), begin, length, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Says that the directories in `directory` have nothing to do with each other (`T` of chattr(1)): ext4 then puts each
/// into a part of the disk of its own. Without a journal it passes over inodes that were deleted in the minutes before
/// (`recently_deleted` of `fs/ext4/ialloc.c`), one by one and with every new file, which lie where the last layer or volume
/// was. Advice as well, and kept on disk; other file systems refuse it.
pub(crate) fn spread_out(directory: &Path) {
    let advise = || {
        let opened = File::open(directory)?;
        let flags = ioctl_getflags(&opened)?;
        if !flags.contains(IFlags::TOPDIR) {
            ioctl_setflags(&opened, flags | IFlags::TOPDIR)?;
        }
        io::Result::Ok(())
    };
    if let Err(error) = advise() {
        let path = directory.display();
        tracing::debug!(%path, %error, "the file system takes no advice on directories");
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};

    use super::*;

    #[test]
    fn ext4_takes_the_advice_and_what_is_no_directory_does_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            spread_out(dir.path());
            let flags = ioctl_getflags(File::open(dir.path()).unwrap());
            let is_taken = flags.is_ok_and(|flags| flags.contains(IFlags::TOPDIR));
            let is_ext4 = statfs(dir.path()).unwrap().filesystem_type() == EXT4_SUPER_MAGIC;
            assert!(is_taken || !is_ext4);
        }
        spread_out(Path::new("/proc/self"));
        spread_out(&dir.path().join("missing"));
    }
}
