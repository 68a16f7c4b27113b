//! System calls that neither std nor nix has.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use nix::libc;
use nix::sys::ioctl::ioctl_num_type;
use nix::{request_code_read, request_code_write};
use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};

/// `RWF_DONTCACHE` of Linux 6.14 (`linux/fs.h`), which rustix does not name yet.
const DONT_CACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
/// The smallest page there is. Of a larger one more would stay in memory, and nothing worse.
const PAGE_BYTES: u64 = 4096;

/// Has the kernel begin to write these bytes of `file` to the disk, and does not wait for it
/// (`sync_file_range(2)`); with no bytes, all from there on. It is advice: a file system that does
/// not take it loses time at the next fsync and nothing else.
#[expect(unsafe_code, reason = "nix has no sync_file_range")]
pub fn begin_writing(file: impl AsFd, bytes: Range<u32>) {
    let (begin, length) = (bytes.start.into(), (bytes.end - bytes.start).into());
    let file = file.as_fd();
    // SAFETY: the call takes a descriptor, which `file` keeps open, and integers; it reads no
    // memory of ours.
    unsafe { libc::sync_file_range(file.as_raw_fd(), begin, length, libc::SYNC_FILE_RANGE_WRITE) };
}

/// `F_SETSIG` of `asm-generic/fcntl.h`, which libc does not name on every platform.
const SET_SIGNAL: libc::c_int = 10;

/// Whether anything on this machine may still write to `file`: a process has it open for writing or
/// mapped from such a descriptor, through an overlay too, or a request in flight refers to it.
///
/// The kernel answers: it grants a read lease (`fcntl(2)`, `F_SETLEASE`) on a file without writers
/// only. The lease is returned at once. A process that opens the file for writing in between waits
/// for that; only with `O_NONBLOCK` it fails with `EWOULDBLOCK`, so ask of files only that have
/// been still for a while. Where the kernel grants no leases, the answer is that there may be a
/// writer.
///
/// `file` must be open for reading only.
#[expect(unsafe_code, reason = "nix has no F_SETLEASE")]
pub fn may_have_writer(file: impl AsFd) -> bool {
    let file = file.as_fd();
    let set = |what, value: libc::c_int| {
        // SAFETY: both commands take a descriptor, which `file` keeps open, and an integer.
        unsafe { libc::fcntl(file.as_raw_fd(), what, value) == 0 }
    };
    // A process that is made to wait has the holder of the lease signalled: by a signal that is
    // ignored, not by SIGIO, which would end this process.
    let granted = set(SET_SIGNAL, libc::SIGURG) && set(libc::F_SETLEASE, libc::F_RDLCK);
    !(granted && set(libc::F_SETLEASE, libc::F_UNLCK))
}

/// As `write_all_at`, and but for the last page no copy stays in memory once it is on the disk: it
/// takes no memory from what is in use, and the same pages serve again. Where kernel or file system
/// cannot, it is an ordinary write.
pub fn write_uncached(file: &File, bytes: &[u8], mut offset: u64) -> io::Result<()> {
    // The last page, if it is not full, stays: the next write goes on in it.
    let rest = (offset + bytes.len() as u64) % PAGE_BYTES;
    let (mut bytes, rest) = bytes.split_at(bytes.len().saturating_sub(rest as usize));
    while !bytes.is_empty() {
        match pwritev2(file, &[IoSlice::new(bytes)], offset, DONT_CACHE) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = &bytes[written..];
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => break,
            Err(error) => return Err(error.into()),
        }
    }
    file.write_all_at(bytes, offset)?;
    file.write_all_at(rest, offset + bytes.len() as u64)
}

/// Says that the directories in `directory` have nothing to do with each other (`T` of chattr(1)):
/// ext4 then puts each into a part of the disk of its own. Without a journal it skips inodes
/// that were deleted in the minutes before (`recently_deleted` of `fs/ext4/ialloc.c`), one by one
/// and with every new file, which lie where the last layer or volume was. Advice as well, and kept
/// on disk; other file systems refuse it.
pub fn spread_out(directory: &Path) {
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

/// `struct fsxattr` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Extended {
    flags: u32,
    extent_bytes: u32,
    extents: u32,
    project: u32,
    copy_extent_bytes: u32,
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR` of `linux/fs.h`.
const GET_EXTENDED: ioctl_num_type = request_code_read!(b'X', 31, size_of::<Extended>());
/// `FS_IOC_FSSETXATTR` of `linux/fs.h`.
const SET_EXTENDED: ioctl_num_type = request_code_write!(b'X', 32, size_of::<Extended>());

#[expect(unsafe_code, reason = "neither nix nor rustix has this ioctl")]
fn extended(file: impl AsFd) -> io::Result<Extended> {
    let mut found = Extended::default();
    let file = file.as_fd();
    // SAFETY: the call writes a `struct fsxattr`, which `found` is, and `file` is open.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), GET_EXTENDED, &raw mut found) };
    nix::errno::Errno::result(done)?;
    Ok(found)
}

/// The project ID for quotas of an open file or directory. Errors: the system's.
pub fn project(file: impl AsFd) -> io::Result<u32> {
    Ok(extended(file)?.project)
}

/// Gives an open file or directory another project ID. Errors: the system's.
#[expect(unsafe_code, reason = "neither nix nor rustix has this ioctl")]
pub fn set_project(file: impl AsFd, project: u32) -> io::Result<()> {
    let (file, wanted) = (file.as_fd(), Extended { project, ..extended(&file)? });
    // SAFETY: the call reads a `struct fsxattr`, which `wanted` is, and `file` is open.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), SET_EXTENDED, &raw const wanted) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::sys::statfs::{EXT4_SUPER_MAGIC, statfs};

    use super::*;

    #[test]
    fn what_is_written_uncached_is_there() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        // Also what ends at a page, in the one it began in, and nothing.
        let (first, others) = bytes.split_at(3 * 4096 - 5);
        for (part, offset) in [(first, 5), (&others[..7], 3 * 4096), (&others[7..], 3 * 4096 + 7)] {
            write_uncached(&file, part, offset).unwrap();
        }
        write_uncached(&file, &[], 5).unwrap();
        let mut found = vec![0; bytes.len()];
        file.read_exact_at(&mut found, 5).unwrap();
        assert_eq!(
            (found == bytes, file.metadata().unwrap().len()),
            (true, bytes.len() as u64 + 5)
        );
        // No file system takes the flag for a pipe, and a pipe takes no offset.
        let (_end, pipe) = io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        write_uncached(&pipe, &bytes, 0).unwrap_err();
    }

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

    #[test]
    #[expect(unsafe_code, reason = "nix and std map no files without it")]
    fn a_writer_is_an_open_descriptor_or_what_is_mapped_from_one() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::fs::write(file.path(), [7; 4096]).unwrap();
        let path = file.into_temp_path();
        let read = File::open(&path).unwrap();
        assert!(!may_have_writer(&read));
        let write = File::options().read(true).write(true).open(&path).unwrap();
        assert!(may_have_writer(&read));
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let length = 4096;
        // SAFETY: a new mapping of a file of that length; nothing else knows its address.
        let mapped = unsafe {
            libc::mmap(std::ptr::null_mut(), length, access, libc::MAP_SHARED, write.as_raw_fd(), 0)
        };
        assert_ne!(mapped, libc::MAP_FAILED);
        drop(write);
        assert!(may_have_writer(&read), "the mapping is left");
        // SAFETY: what was mapped above, and no reference to it exists.
        assert_eq!(unsafe { libc::munmap(mapped, length) }, 0);
        assert!(!may_have_writer(&read));
    }
}
