//! The content of a tmpfs, which CRIU packs with GNU tar into `tmpfs-dev-N.tar.gz.img`.
//!
//! CRIU packs while the container is frozen. [`Tmpfs::pack`] packs the same files by the same
//! options while it runs, so that most of the bytes are known before the freeze. For that both
//! archives must be equal where the files are: nothing in them depends on the time or the process
//! that packs, and neither is compressed: the shim has CRIU's tar find a `gzip` that copies.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};

use crate::leftovers::unescape;

/// `TAR_OPTIONS` for packing.
///
/// By default tar keeps whole seconds of times, no access control lists, no extended attributes and
/// no capabilities, and names extended headers after its own process. Source: tar's manual,
/// "TAR_OPTIONS", "Controlling Extended Header Keywords".
pub const PACK_OPTIONS: &str = "--format=posix \
     --pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime \
     --xattrs --xattrs-include=* --acls";

/// `TAR_OPTIONS` for unpacking.
pub const UNPACK_OPTIONS: &str = "--xattrs --xattrs-include=* --acls";

/// What CRIU passes to tar (its criu/filesystems.c), but for the compression and the directory.
const CRIU_OPTIONS: [&str; 8] = [
    "--create",
    "--no-unquote",
    "--no-wildcards",
    "--one-file-system",
    "--check-links",
    "--preserve-permissions",
    "--sparse",
    "--numeric-owner",
];

/// A tmpfs of a container.
#[derive(Debug)]
pub struct Tmpfs {
    /// Minor number of its device, which names CRIU's image of it.
    device: u32,
    directory: OwnedFd,
}

impl Tmpfs {
    /// The file name of CRIU's image.
    pub fn image_name(&self) -> String {
        image_name(self.device)
    }

    /// Starts to pack it. Errors: tar cannot be started.
    pub fn pack(&self) -> io::Result<Packing> {
        let mut command = Command::new("tar");
        command.env("TAR_OPTIONS", PACK_OPTIONS).args(CRIU_OPTIONS);
        command.args(["--directory", "/proc/self/fd/0", "."]);
        command.stdin(self.directory.try_clone()?).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn()?;
        let archive = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Packing { child, archive })
    }
}

/// A tar at work; ended when dropped.
#[derive(Debug)]
pub struct Packing {
    child: Child,
    /// What it packs.
    pub archive: ChildStdout,
}

impl Drop for Packing {
    fn drop(&mut self) {
        // It has ended, or its reader has given up on it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn image_name(device: u32) -> String {
    format!("tmpfs-dev-{device}.tar.gz.img")
}

/// Finds each tmpfs of process `pid` that CRIU will pack and that holds at least `bytes_min` bytes.
///
/// A tmpfs that this process sees as well comes from outside the container; CRIU leaves it there.
///
/// Errors: the mounts cannot be read.
pub fn find(pid: u32, bytes_min: u64) -> io::Result<Vec<Tmpfs>> {
    let outside: BTreeSet<u32> =
        mounts(Path::new("/proc/self/mountinfo"))?.into_iter().map(|(device, _)| device).collect();
    let root = File::open(format!("/proc/{pid}/root"))?;
    let (mut seen, mut found) = (outside, Vec::new());
    for (device, mounted) in mounts(Path::new(&format!("/proc/{pid}/mountinfo")))? {
        if seen.contains(&device) {
            continue;
        }
        // The container runs and may put symbolic links into the path.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let Ok(directory) = openat2(root.as_fd(), &mounted, how) else { continue };
        let Ok(stat) = fstatfs(&directory) else { continue };
        let directory = File::from(directory);
        let is_it = stat.filesystem_type() == TMPFS_MAGIC
            && directory.metadata()?.dev() == u64::from(device);
        let block = u64::try_from(stat.block_size()).unwrap_or(0);
        let used = stat.blocks().saturating_sub(stat.blocks_free()).saturating_mul(block);
        // Another mount may lie above it.
        if is_it && seen.insert(device) && used >= bytes_min {
            found.push(Tmpfs { device, directory: directory.into() });
        }
    }
    Ok(found)
}

/// Every tmpfs of a `mountinfo` that is mounted as a whole: device and directory.
pub(crate) fn mounts(mountinfo: &Path) -> io::Result<Vec<(u32, PathBuf)>> {
    let text = fs::read(mountinfo)?;
    Ok(String::from_utf8_lossy(&text).lines().filter_map(mount).collect())
}

/// `36 35 0:31 / DIR opts [optional]... - tmpfs SOURCE SUPER_OPTIONS`.
fn mount(line: &str) -> Option<(u32, PathBuf)> {
    let (left, right) = line.split_once(" - ")?;
    let mut fields = left.split(' ').skip(2);
    let (device, root, directory) = (fields.next()?, fields.next()?, fields.next()?);
    let is_whole = root == "/" && right.split(' ').next()? == "tmpfs";
    let device = device.strip_prefix("0:")?.parse().ok()?;
    is_whole.then(|| (device, unescape(directory)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn a_tmpfs_among_the_mounts() {
        let line = "61 60 0:52 / /run/a\\040b rw,nosuid - tmpfs tmpfs rw,size=65536k";
        assert_eq!(mount(line), Some((52, PathBuf::from("/run/a b"))));
        assert_eq!(mount("61 60 0:52 /sub /run rw - tmpfs tmpfs rw"), None);
        assert_eq!(mount("61 60 8:1 / /run rw - ext4 /dev/sda1 rw"), None);
    }

    #[test]
    fn two_archives_of_the_same_files_are_equal() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), [7; 5000]).unwrap();
        let tmpfs = Tmpfs { device: 9, directory: File::open(dir.path()).unwrap().into() };
        let archive = || {
            let mut bytes = Vec::new();
            tmpfs.pack().unwrap().archive.read_to_end(&mut bytes).unwrap();
            bytes
        };
        let first = archive();
        assert!(first.windows(5000).any(|part| part == [7; 5000]));
        assert!(first == archive());
        assert_eq!(tmpfs.image_name(), "tmpfs-dev-9.tar.gz.img");
    }

    #[test]
    fn a_tmpfs_from_outside_is_not_packed() {
        // This process has no other mounts than this process.
        assert!(find(std::process::id(), 0).unwrap().is_empty());
    }
}
