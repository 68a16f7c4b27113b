//! Names of Unix sockets in a tmpfs. CRIU packs a tmpfs with tar, which leaves sockets out, and
//! makes only those that a process has bound. The others are names that a program once left behind;
//! it may look for them, or fail to bind where it expects one.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, mknodat, utimensat};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat};

use super::SupplementError;
use crate::tmpfs;

/// Most files of all tmpfs of a container that are looked at.
const FILES_MAX: usize = 1 << 20;

/// The name of a socket.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SocketName {
    /// Minor number of the tmpfs at the source, which names CRIU's image of it.
    #[prost(uint32, tag = "1")]
    device: u32,
    /// Path in the container.
    #[prost(bytes = "vec", tag = "2")]
    path: Vec<u8>,
    #[prost(uint32, tag = "3")]
    mode: u32,
    #[prost(uint32, tag = "4")]
    uid: u32,
    #[prost(uint32, tag = "5")]
    gid: u32,
    #[prost(int64, tag = "6")]
    modified_s: i64,
    #[prost(int64, tag = "7")]
    modified_ns: i64,
}

/// Finds the sockets in every tmpfs that process `pid` sees.
///
/// Errors: I/O. Files beyond [`FILES_MAX`] are not looked at.
pub(super) fn record(pid: u32) -> Result<Vec<SocketName>, SupplementError> {
    let path = PathBuf::from(format!("/proc/{pid}/mountinfo"));
    let mounts = tmpfs::mounts(&path).map_err(SupplementError::io(&path))?;
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let (mut devices, mut names) = (BTreeSet::new(), Vec::new());
    let mut budget = FILES_MAX;
    for (device, mounted) in mounts {
        if devices.insert(device) {
            walk(&root, (device, mounted), &mut budget, &mut names)?;
        }
    }
    Ok(names)
}

/// The tasks are frozen, so no name becomes a symbolic link on the way.
fn walk(
    root: &Path,
    (device, mounted): (u32, PathBuf),
    budget: &mut usize,
    names: &mut Vec<SocketName>,
) -> Result<(), SupplementError> {
    let at = |inside: &Path| root.join(inside.strip_prefix("/").unwrap_or(inside));
    let is_device = |metadata: &fs::Metadata| metadata.dev() == u64::from(device);
    let mut queue = vec![mounted];
    while let Some(directory) = queue.pop() {
        let path = at(&directory);
        match fs::symlink_metadata(&path) {
            // Another mount may lie above this one.
            Ok(metadata) if is_device(&metadata) => {}
            Ok(_) | Err(_) => continue,
        }
        for entry in fs::read_dir(&path).map_err(SupplementError::io(&path))? {
            let entry = entry.map_err(SupplementError::io(&path))?;
            let Some(left) = budget.checked_sub(1) else { return Ok(()) };
            *budget = left;
            let inside = directory.join(entry.file_name());
            let kind = entry.file_type().map_err(SupplementError::io(&path))?;
            if kind.is_dir() {
                queue.push(inside);
            } else if kind.is_socket() {
                let metadata = entry.metadata().map_err(SupplementError::io(&path))?;
                names.push(SocketName {
                    device,
                    path: inside.into_os_string().into_vec(),
                    mode: metadata.mode() & 0o7777,
                    uid: metadata.uid(),
                    gid: metadata.gid(),
                    modified_s: metadata.mtime(),
                    modified_ns: metadata.mtime_nsec(),
                });
            }
        }
    }
    Ok(())
}

impl SocketName {
    /// Whether `images` have the tmpfs: CRIU leaves out those that come from outside the container.
    pub(super) fn is_dumped(&self, images: &Path) -> bool {
        images.join(tmpfs::image_name(self.device)).exists()
    }

    /// Makes the name in a restored container, unless CRIU did; a failure is a warning.
    pub(super) fn make(&self, root: &File, warnings: &mut BTreeSet<String>) {
        let path = Path::new(std::ffi::OsStr::from_bytes(&self.path));
        if let Err(errno) = self.make_at(root, path) {
            let path = path.display();
            warnings.insert(format!("the name of the socket {path} is lost: {}", errno.desc()));
        }
    }

    fn make_at(&self, root: &File, path: &Path) -> Result<(), Errno> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::EINVAL);
        };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let directory = openat2(root, directory, how)?;
        if fstatfs(&directory)?.filesystem_type() != TMPFS_MAGIC {
            return Err(Errno::EXDEV);
        }
        let link = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let before = fs::metadata(&link).map_err(os_error)?;
        let mode = Mode::from_bits_truncate(self.mode);
        match mknodat(&directory, name, SFlag::S_IFSOCK, mode, 0) {
            Err(Errno::EEXIST) => return Ok(()),
            made => made?,
        }
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        fchownat(&directory, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
        // The shim's mask of modes is not the container's.
        fchmodat(&directory, name, mode, FchmodatFlags::FollowSymlink)?;
        let modified = TimeSpec::new(self.modified_s, self.modified_ns);
        utimensat(&directory, name, &modified, &modified, UtimensatFlags::NoFollowSymlink)?;
        let modified = TimeSpec::new(before.mtime(), before.mtime_nsec());
        let read = TimeSpec::new(before.atime(), before.atime_nsec());
        utimensat(AT_FDCWD, &link[..], &read, &modified, UtimensatFlags::FollowSymlink)
    }
}

fn os_error(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Method: a name that leads out of the container by a symbolic link, and one on another kind
    /// of file system.
    #[test]
    fn a_name_of_a_hostile_peer_is_not_made_elsewhere() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("out")).unwrap();
        let root = File::open(dir.path()).unwrap();
        for path in ["/out/socket", "/../../socket", "relative", "/"] {
            let name = SocketName { path: path.into(), ..Default::default() };
            let mut warnings = BTreeSet::new();
            name.make(&root, &mut warnings);
            assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0, "{path}");
        }
    }
}
