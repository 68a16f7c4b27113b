//! A bundle's root file system: mounted from what containerd's snapshotter returned, unmounted with
//! all that lies above it.

use std::path::{Path, PathBuf};

use containerd_shim::protos::api::Mount;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::idmap::{Layers, Mapping};
use crate::sys;

/// Name of the directory in a bundle where mapped layers lie while they are mounted.
const LAYERS_DIRECTORY: &str = "mapped-layers";
/// Mount points below one directory that are unmounted in one go.
const MOUNTS_MAX: usize = 4096;

/// Why mounting failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    #[error("directory {path}")]
    Directory { path: PathBuf, source: std::io::Error },
    #[error("mounting {kind} on {path}")]
    Mount { kind: String, path: PathBuf, source: containerd_shim::Error },
    #[error("mapping the users of {kind} on {path}")]
    Map { kind: String, path: PathBuf, source: std::io::Error },
    #[error("unmounting {path}")]
    Unmount { path: PathBuf, source: Errno },
}

/// Mounts `mounts` in order on `bundle/rootfs`; what was mounted is undone when a later one fails.
///
/// Errors: [`RootfsError`], naming the directory.
pub(crate) async fn mount(mounts: &[Mount], bundle: &Path) -> Result<(), RootfsError> {
    if mounts.is_empty() {
        return Ok(());
    }
    let rootfs = bundle.join("rootfs");
    match std::fs::create_dir(&rootfs) {
        Err(source) if source.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(RootfsError::Directory { path: rootfs, source });
        }
        _ => {}
    }
    let (done, mounted) = tokio::sync::oneshot::channel();
    let (mounts, target, layers) = (mounts.to_vec(), rootfs.clone(), bundle.join(LAYERS_DIRECTORY));
    // A thread that ends: with many layers the mount moves its working directory away for good.
    std::thread::spawn(move || {
        let _ = done.send(mounts.iter().try_for_each(|mount| mount_one(mount, &target, &layers)));
    });
    let lost = || RootfsError::Directory {
        path: rootfs.clone(),
        source: std::io::Error::other("the mounting thread died"),
    };
    let outcome = mounted.await.unwrap_or_else(|_| Err(lost()));
    if outcome.is_err() {
        let _ = unmount(&rootfs);
    }
    outcome
}

/// Mounts one of a bundle's mounts on `target`; `layers` is where mapped layers lie meanwhile.
fn mount_one(mount: &Mount, target: &Path, layers: &Path) -> Result<(), RootfsError> {
    let unmapped =
        |source| RootfsError::Map { kind: mount.type_.clone(), path: target.to_owned(), source };
    let mut options = mount.options.clone();
    let mapping = Mapping::take(&mut options).map_err(unmapped)?;
    let mapping = mapping.map(|mapping| mapping.user_namespace()).transpose().map_err(unmapped)?;
    let is_overlay = mount.type_ == "overlay";
    let _layers = match &mapping {
        Some(namespace) if is_overlay => {
            Some(Layers::mount(&mut options, layers, namespace).map_err(unmapped)?)
        }
        _ => None,
    };
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    let (kind, source) = (some(&mount.type_), some(&mount.source));
    containerd_shim::mount::mount_rootfs(kind.as_deref(), source.as_deref(), &options, target)
        .map_err(|source| RootfsError::Mount {
            kind: mount.type_.clone(),
            path: target.to_owned(),
            source,
        })?;
    match &mapping {
        Some(namespace) if !is_overlay => {
            sys::mount_mapped(target, target, namespace, sys::Access::AsBefore).map_err(unmapped)
        }
        _ => Ok(()),
    }
}

/// Unmounts `dir` and everything below it, innermost first, lazily where it is in use.
///
/// Errors: the first failure; the rest is still tried. Not mounted is success.
pub(crate) fn unmount(dir: &Path) -> Result<(), RootfsError> {
    let mut outcome = Ok(());
    for path in mounts_below(dir)? {
        let undone = match umount2(&path, MntFlags::UMOUNT_NOFOLLOW) {
            Err(Errno::EBUSY) => umount2(&path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW),
            undone => undone,
        };
        match undone {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(source) => outcome = outcome.and(Err(RootfsError::Unmount { path, source })),
        }
    }
    outcome
}

/// Mount points at and below `dir`, the last mounted first.
pub(crate) fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>, RootfsError> {
    let mountinfo = std::fs::read_to_string("/proc/self/mountinfo")
        .map_err(|source| RootfsError::Directory { path: dir.to_owned(), source })?;
    Ok(below(&mountinfo, dir))
}

/// Of the text of `/proc/self/mountinfo`.
fn below(mountinfo: &str, dir: &Path) -> Vec<PathBuf> {
    let points = mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).map(unescaped);
    let mut found: Vec<PathBuf> =
        points.filter(|point| point.starts_with(dir)).take(MOUNTS_MAX).collect();
    found.reverse();
    found
}

/// The kernel writes blanks and backslashes of a path as three octal digits.
fn unescaped(text: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| after.get(..3)).flatten();
        let value = octal
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[3..] } else { after };
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// Unmounts what a killed restore leaves behind: CRIU's root in the runtime's state directory, and
/// control groups mounted in its work directory. Nothing may be removed there before this succeeds,
/// since a removal would reach through the mounts.
///
/// Errors: the first failure.
pub(crate) fn unmount_leftovers(state_dir: &Path, work_path: &Path) -> Result<(), RootfsError> {
    let state = unmount(state_dir);
    let work = unmount(work_path);
    state.and(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_a_directory_innermost_first() {
        let info = "\
30 1 0:1 / / rw - ext4 /dev/vda rw
31 30 0:2 / /run/b\\040c/rootfs rw - overlay overlay rw
32 31 0:3 / /run/b\\040c/rootfs/data rw - ext4 /dev/vdb rw
33 30 0:4 / /run/b\\040cd rw - tmpfs tmpfs rw
";
        let expected = ["/run/b c/rootfs/data", "/run/b c/rootfs"].map(PathBuf::from);
        assert_eq!(below(info, Path::new("/run/b c")), expected);
    }

    #[test]
    fn nothing_mounted_is_success() {
        let dir = tempfile::tempdir().unwrap();
        unmount(dir.path()).unwrap();
        unmount_leftovers(&dir.path().join("absent"), dir.path()).unwrap();
    }
}
