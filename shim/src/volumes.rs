//! Block volumes of a container: mounted before it is made, unmounted when it is deleted.
//!
//! ```text
//! image ── loop device ── file system, at /run/godwit-volumes/NAMESPACE/CONTAINER/VOLUME ── bind mount in the container
//! ```
//!
//! Each container has a mount of its own; the image has one loop device however many containers use
//! it, so that the kernel has one file system for it and never two that know nothing of each other.
//! A device is found again by the name that we give it, which is made of the image's device and
//! inode number. It goes with the last mount (`LO_FLAGS_AUTOCLEAR`), whichever process dies.
//!
//! For a cut the file system is frozen after the tasks ([`freeze`]) and thawed before them. A
//! frozen file system outlives its mounts, so whatever unmounts thaws first ([`release`]): also the
//! `delete` that clears up after a dead shim.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use godwit_protos::{ContainerRef, FileSystem, path};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};

use crate::rootfs::{self, RootfsError};
use crate::sys;

/// Free loop devices that are tried when others are faster.
const ATTEMPTS_MAX: u32 = 64;

/// Why a block volume cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VolumeError {
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("no loop device for {path} (is the module loop there?)")]
    Loop { path: PathBuf, source: io::Error },
    #[error("mounting the {kind} of {path}")]
    Mount { kind: FileSystem, path: PathBuf, source: Errno },
    #[error("freezing the file system at {path}")]
    Freeze { path: PathBuf, source: Errno },
    #[error("thawing the file system at {path}")]
    Thaw { path: PathBuf, source: Errno },
    #[error(transparent)]
    Unmount(#[from] RootfsError),
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> VolumeError + use<> {
    let path = path.to_owned();
    move |source| VolumeError::Io { path, source }
}

/// Runs what may wait for a disk on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    let lost = |error: tokio::task::JoinError| VolumeError::Io {
        path: PathBuf::from(path::MOUNTS),
        source: io::Error::other(error),
    };
    tokio::task::spawn_blocking(work).await.map_err(lost)?
}

/// Where a container's block volumes are mounted.
pub(crate) fn directory(name: &ContainerRef) -> PathBuf {
    Path::new(path::MOUNTS).join(name.namespace()).join(name.id())
}

/// Mounts an image below `directory` under the volume's name and returns where. Mounted there
/// already is success.
pub(crate) fn mount_image(
    directory: &Path,
    volume: &str,
    image: &Path,
    kind: FileSystem,
) -> Result<PathBuf, VolumeError> {
    let target = directory.join(volume);
    if rootfs::mounts_below(&target)?.contains(&target) {
        return Ok(target);
    }
    std::fs::create_dir_all(&target).map_err(io_at(&target))?;
    let mut options = File::options();
    let file = options.read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(image);
    let file = file.map_err(io_at(image))?;
    // The second caller finds the first one's device.
    let lock = Flock::lock(file, FlockArg::LockExclusive);
    let file = lock.map_err(|(_, errno)| io_at(image)(errno.into()))?;
    let (device, number) =
        attach(&file).map_err(|source| VolumeError::Loop { path: image.to_owned(), source })?;
    let options = match kind {
        // Whatever the image itself asks for: it may come from another node.
        FileSystem::Ext4 => "errors=remount-ro,discard",
        // A copy of the image has its identity, and may be here too: a volume of another name, or
        // of another test node.
        FileSystem::Xfs => "nouuid,discard",
    };
    let source = format!("/dev/loop{number}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let mounted = mount(Some(source.as_str()), &target, Some(kind.as_str()), flags, Some(options));
    // Until here, so that the device did not go before it was mounted.
    drop(device);
    let wrong = |source| VolumeError::Mount { kind, path: image.to_owned(), source };
    mounted.map_err(wrong).map(|()| target)
}

/// The loop device of an image, open, and its number.
fn attach(image: &File) -> io::Result<(File, u32)> {
    let stat = image.metadata()?;
    let name = format!("godwit:{}:{}", stat.dev(), stat.ino());
    if let Some(found) = find(&name)? {
        return Ok(found);
    }
    let control = File::options().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS_MAX {
        let number = sys::free_loop(control.as_fd())?;
        let device = open(number)?;
        let configure = |direct| sys::configure_loop(device.as_fd(), image.as_fd(), &name, direct);
        match configure(true) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => continue,
            // Not every file system can read and write past the page cache.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => configure(false)?,
            configured => configured?,
        }
        return Ok((device, number));
    }
    Err(Errno::EBUSY.into())
}

/// The device of this name. Open it stays ours, also if it is unmounted meanwhile.
fn find(name: &str) -> io::Result<Option<(File, u32)>> {
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        let number =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        // Without the directory "loop" it has no image.
        let Some(number) = number.filter(|_| entry.path().join("loop").exists()) else { continue };
        let device = open(number)?;
        if sys::loop_status(device.as_fd()).is_ok_and(|info| info.name() == name.as_bytes()) {
            return Ok(Some((device, number)));
        }
    }
    Ok(None)
}

fn open(number: u32) -> io::Result<File> {
    File::options().read(true).write(true).open(format!("/dev/loop{number}"))
}

/// Has the file systems mounted below `directory` write what they hold back, without stopping
/// anyone.
pub(crate) fn flush(directory: &Path) -> Result<(), VolumeError> {
    for path in rootfs::mounts_below(directory)? {
        let opened = File::open(&path).map_err(io_at(&path))?;
        nix::unistd::syncfs(opened).map_err(|errno| io_at(&path)(errno.into()))?;
    }
    Ok(())
}

/// Freezes the file systems mounted below `directory`: their images are whole then, and stay as
/// they are.
///
/// Errors: the first; those that were frozen by then are thawed. Frozen already is success.
pub(crate) fn freeze(directory: &Path) -> Result<(), VolumeError> {
    let frozen = rootfs::mounts_below(directory)?.into_iter().try_for_each(|path| {
        let opened = File::open(&path).map_err(io_at(&path))?;
        match sys::freeze_file_system(opened, true) {
            Ok(()) | Err(Errno::EBUSY) => Ok(()),
            Err(source) => Err(VolumeError::Freeze { path, source }),
        }
    });
    if frozen.is_err() {
        thaw(directory)?;
    }
    frozen
}

/// Undoes [`freeze`]. Errors: the first; the rest is still tried. Not frozen is success.
pub(crate) fn thaw(directory: &Path) -> Result<(), VolumeError> {
    let mut outcome = Ok(());
    for path in rootfs::mounts_below(directory)? {
        let thawed =
            File::open(&path).map_err(io_at(&path)).and_then(
                |opened| match sys::freeze_file_system(opened, false) {
                    Ok(()) | Err(Errno::EINVAL) => Ok(()),
                    Err(source) => Err(VolumeError::Thaw { path: path.clone(), source }),
                },
            );
        outcome = outcome.and(thawed);
    }
    outcome
}

/// Thaws and unmounts what is mounted below `directory`, and removes the directories. None there is
/// success.
pub(crate) fn release(directory: &Path) -> Result<(), VolumeError> {
    thaw(directory)?;
    rootfs::unmount(directory)?;
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        // Not recursive: what is still mounted keeps its data.
        let _ = std::fs::remove_dir(entry.path());
    }
    let _ = std::fs::remove_dir(directory);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_nothing_is_mounted_there_is_nothing_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let none = dir.path().join("default/cache");
        for act in [flush, freeze, thaw, release] {
            act(&none).unwrap();
        }
        std::fs::create_dir_all(none.join("data")).unwrap();
        release(&none).unwrap();
        assert!(!none.exists());
    }

    #[test]
    fn a_directory_with_files_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("data")).unwrap();
        std::fs::write(dir.path().join("data/row"), "1").unwrap();
        release(dir.path()).unwrap();
        assert!(dir.path().join("data/row").exists());
    }
}
