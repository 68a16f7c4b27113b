//! What a container watches by inotify and fanotify on overlays, as CRIU has to be told of it.
//!
//! CRIU asks the kernel for the path of a watched inode by its file handle. An overlay gives out no
//! handles, so CRIU then looks below a few directories that are often watched (`/etc`, `/var/log`,
//! ...: `criu/irmap.c`) and below those of its option `irmap-scan-path`. [`find`] looks for the
//! paths of the others.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

/// Entries of directories that a search looks at.
const ENTRIES_MAX: usize = 500_000;

/// Watched inodes that are searched for.
const WATCHES_MAX: usize = 4096;

/// `OVERLAYFS_SUPER_MAGIC` of `linux/magic.h`.
const OVERLAY: i64 = 0x794c_7630;

/// Watched inodes on a container's root, an overlay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Watched {
    /// Their paths in the container.
    pub paths: Vec<PathBuf>,
    /// Inode numbers of those without a path that CRIU can be told of: removed ones, or beyond the
    /// search's bound.
    pub lost: Vec<u64>,
}

/// Finds what the processes `pids` watch on the root of the process `init`. Nothing if that is no
/// overlay.
///
/// It reads directories of the container, at most half a million entries, and stops at the last
/// watched inode; without watches it reads none. May block.
pub fn find(init: u32, pids: &[u32]) -> Watched {
    let root = PathBuf::from(format!("/proc/{init}/root"));
    let is_overlay =
        nix::sys::statfs::statfs(&root).is_ok_and(|found| found.filesystem_type().0 == OVERLAY);
    let Ok(device) = fs::metadata(&root).map(|root| root.dev()) else { return Watched::default() };
    if !is_overlay {
        return Watched::default();
    }
    let all = pids.iter().flat_map(|pid| descriptions(*pid));
    let watches = all.flat_map(|info| info.lines().filter_map(watch).collect::<Vec<_>>());
    let here = watches.filter(|watch| watch.device == device).map(|watch| watch.inode);
    search(&root, device, here.take(WATCHES_MAX).collect())
}

/// `fdinfo` of each inotify and fanotify descriptor of a process.
fn descriptions(pid: u32) -> Vec<String> {
    let listed = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let watching = listed.filter(|entry| {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        ["anon_inode:inotify", "anon_inode:[fanotify]"].iter().any(|kind| target == Path::new(kind))
    });
    let info = |entry: fs::DirEntry| {
        let name = entry.file_name();
        fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("fdinfo").join(name)).ok()
    };
    watching.filter_map(info).collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watch {
    /// As `st_dev` has it.
    device: u64,
    inode: u64,
}

/// A line such as `inotify wd:1 ino:2f sdev:800013 mask:fce ...` or `fanotify ino:2f sdev:800013
/// ...` (proc_pid_fdinfo(5)): numbers are hexadecimal, and the device is the kernel's own, of 12
/// and 20 bits.
fn watch(line: &str) -> Option<Watch> {
    let mut fields = line.split_ascii_whitespace();
    fields.next().filter(|kind| ["inotify", "fanotify"].contains(kind))?;
    let number = |name: &str| {
        let value = line.split_ascii_whitespace().find_map(|field| field.strip_prefix(name))?;
        u64::from_str_radix(value, 16).ok()
    };
    let device = number("sdev:")?;
    let device = nix::sys::stat::makedev(device >> 20, device & 0xf_ffff);
    Some(Watch { device, inode: number("ino:")? })
}

/// Looks for inodes below `root` breadth first, since what is watched lies rarely deep, and not on
/// other file systems.
fn search(root: &Path, device: u64, mut wanted: BTreeSet<u64>) -> Watched {
    let mut found = BTreeMap::new();
    let mut directories = VecDeque::from([PathBuf::new()]);
    let mut left = ENTRIES_MAX;
    let is_of = |path: &Path, inode: u64| {
        fs::symlink_metadata(path).is_ok_and(|it| (it.dev(), it.ino()) == (device, inode))
    };
    if let Ok(inode) = fs::metadata(root).map(|root| root.ino()) {
        // CRIU looks at the root itself unasked.
        wanted.remove(&inode);
    }
    while let Some(directory) = directories.pop_front().filter(|_| !wanted.is_empty() && left > 0) {
        let full = root.join(&directory);
        if fs::metadata(&full).map_or(true, |metadata| metadata.dev() != device) {
            continue;
        }
        for entry in fs::read_dir(&full).into_iter().flatten().flatten() {
            left = left.saturating_sub(1);
            let path = directory.join(entry.file_name());
            if wanted.contains(&entry.ino())
                && is_of(&entry.path(), entry.ino())
                && can_be_told(&path)
            {
                wanted.remove(&entry.ino());
                found.insert(entry.ino(), Path::new("/").join(&path));
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                directories.push_back(path);
            }
        }
    }
    Watched { paths: found.into_values().collect(), lost: wanted.into_iter().collect() }
}

/// CRIU parts the lines of its configuration file at blanks, and takes `#` and quotes for its own.
fn can_be_told(path: &Path) -> bool {
    let plain = |c: char| !c.is_whitespace() && !c.is_control() && !"#\"'\\".contains(c);
    path.to_str().is_some_and(|path| path.chars().all(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_fdinfo_names_device_and_inode() {
        let line =
            "inotify wd:1 ino:2f sdev:800013 mask:fce ignored_mask:0 fhandle-bytes:8 f_handle:1";
        let expected = Watch { device: nix::sys::stat::makedev(8, 19), inode: 0x2f };
        assert_eq!(watch(line), Some(expected));
        assert_eq!(watch("fanotify ino:2f sdev:800013 mflags:0 mask:1"), Some(expected));
        assert_eq!(watch("fanotify flags:10 event-flags:0"), None);
        assert_eq!(watch("mnt_id:\t15"), None);
    }

    #[test]
    fn what_is_there_is_found_and_what_is_not_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        for name in ["srv/in/deep", "srv/with blank"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::write(root.join("srv/file"), "").unwrap();
        let (device, inode) = {
            let inode = |name: &str| fs::metadata(root.join(name)).unwrap().ino();
            (fs::metadata(root).unwrap().dev(), inode)
        };
        let wanted = ["", "srv/in/deep", "srv/file", "srv/with blank"].map(inode);
        let watched = search(root, device, wanted.into_iter().chain([u64::MAX]).collect());
        let mut paths = watched.paths;
        paths.sort();
        assert_eq!(paths, ["/srv/file", "/srv/in/deep"].map(PathBuf::from));
        assert_eq!(watched.lost.len(), 2, "the blank and the one that is nowhere");
        assert_eq!(search(root, device, BTreeSet::new()), Watched::default());
    }

    #[test]
    fn a_root_that_is_no_overlay_needs_no_search() {
        let dir = tempfile::tempdir().unwrap();
        let watching =
            nix::sys::inotify::Inotify::init(nix::sys::inotify::InitFlags::empty()).unwrap();
        watching.add_watch(dir.path(), nix::sys::inotify::AddWatchFlags::IN_CREATE).unwrap();
        assert_eq!(descriptions(std::process::id()).len(), 1);
        let found = find(u32::MAX, &[std::process::id()]);
        assert_eq!(found, Watched::default());
    }
}
