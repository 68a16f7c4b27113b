//! What a killed restore leaves mounted.
//!
//! CRIU mounts cgroup hierarchies (`.criu.cgyard.*`) and the root to be (`criu.mntns.*`) below its
//! work directory. When it is killed they stay: removing the directory recursively then
//! would remove cgroups. So: unmount first, always.

use std::io;
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
    fn a_directory_without_mounts_below_is_left_alone() {
        unmount_below(Path::new("/nonexistent")).unwrap();
    }
}
