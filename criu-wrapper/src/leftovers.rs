//! What a CRIU that was killed leaves in the file system.
//!
//! A dump makes a hard link `link_remap.N` beside the removed name of an open file that has another
//! name left, and removes it at its end. [`remove_links`] does that for a dump that was killed.
//!
//! CRIU mounts cgroup hierarchies (`.criu.cgyard.*`) and the root to be (`criu.mntns.*`) below its
//! work directory. When it is killed they stay: removing the directory recursively then
//! would remove cgroups. So: unmount first, always.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

/// Detaches every mount below `directory`, innermost first, in this mount namespace.
///
/// Errors: when the mounts cannot be listed or one cannot be detached; then do not remove the
/// directory.
/// Source: proc(5), "mountinfo": the fifth field is the mount point, with octal escapes.
pub fn unmount_below(directory: &Path) -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let mut below: Vec<PathBuf> = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(unescape)
        .filter(|point| point.starts_with(directory) && point != directory)
        .collect();
    // Later lines were mounted later, and over earlier ones.
    below.reverse();
    for point in below {
        umount2(&point, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// Removes the hard links that a killed dump of these processes left. Returns how many.
///
/// Only a name of CRIU's form is removed, beside a removed name that a process still has open or
/// mapped, and only if it is a link to that very file. What cannot be looked at is skipped: such a
/// link takes a name and no room.
pub fn remove_links(processes: &BTreeSet<u32>) -> usize {
    let mut removed = 0;
    for pid in processes {
        for kind in ["fd", "map_files"] {
            let opened = fs::read_dir(format!("/proc/{pid}/{kind}"));
            for entry in opened.into_iter().flatten().flatten() {
                removed += remove_links_to(*pid, &entry.path());
            }
        }
    }
    removed
}

/// The same for one open file of process `pid`.
fn remove_links_to(pid: u32, opened: &Path) -> usize {
    let Ok(name) = fs::read_link(opened) else { return 0 };
    let name = name.to_string_lossy();
    let Some(name) = name.strip_suffix(" (deleted)").filter(|name| name.starts_with('/')) else {
        return 0;
    };
    let (Ok(file), Some(parent)) = (fs::metadata(opened), Path::new(name).parent()) else {
        return 0;
    };
    if !file.is_file() || file.nlink() == 0 {
        return 0;
    }
    let parent = format!("/proc/{pid}/root{}", parent.display());
    let mut removed = 0;
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("link_remap."));
        let is_crius = number.is_some_and(|it| it.bytes().all(|byte| byte.is_ascii_digit()));
        let is_same = |other: fs::Metadata| (other.dev(), other.ino()) == (file.dev(), file.ino());
        if is_crius
            && fs::symlink_metadata(entry.path()).is_ok_and(is_same)
            && fs::remove_file(entry.path()).is_ok()
        {
            removed += 1;
        }
    }
    removed
}

/// `\040` and the like become the bytes that they stand for.
pub(crate) fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_escapes_are_undone() {
        assert_eq!(unescape(r"/a\040b\134c"), Path::new(r"/a b\c"));
        assert_eq!(unescape(r"/a\0"), Path::new(r"/a\0"));
    }

    #[test]
    fn links_to_open_files_that_crius_name_are_removed_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        fs::write(at("removed"), "x").unwrap();
        fs::write(at("link_remap.9"), "another file").unwrap();
        let open = fs::File::open(at("removed")).unwrap();
        for link in ["kept", "link_remap.7", "link_remap.x"] {
            fs::hard_link(at("removed"), at(link)).unwrap();
        }
        let own = BTreeSet::from([std::process::id()]);
        assert_eq!(remove_links(&own), 0, "its name is still there");
        fs::remove_file(at("removed")).unwrap();
        assert_eq!(remove_links(&own), 1);
        for kept in ["kept", "link_remap.x", "link_remap.9"] {
            assert!(at(kept).exists(), "{kept}");
        }
        drop(open);
    }

    #[test]
    fn a_directory_without_mounts_below_is_left_alone() {
        unmount_below(Path::new("/nonexistent")).unwrap();
    }
}
