//! A snapshot's directory on disk: made, found untouched or written out, deleted.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// Mode of `work`, as overlayfs has it.
pub(super) const WORK_MODE: u32 = 0o711;

/// Times of files are up to this much late: a tick of the slowest kernel clock.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// Most inodes of a layer that are synced one by one.
pub(super) const SYNCED_ALONE_MAX: u64 = 16;

pub(super) fn tree_names(trees: &Path) -> io::Result<Vec<String>> {
    let name = |entry: io::Result<fs::DirEntry>| entry.map(|e| e.file_name().into_string().ok());
    fs::read_dir(trees)?.filter_map(|entry| name(entry).transpose()).collect()
}

/// The number that a directory's name is, in the one way we write it.
pub(super) fn tree_number(name: &str) -> Option<u64> {
    name.parse().ok().filter(|number: &u64| number.to_string() == name)
}

/// Makes a directory of exactly this mode, whatever the umask is.
pub(super) fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().mode(mode).create(path)?;
    if fs::symlink_metadata(path)?.mode() & 0o7777 == mode {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Whether a directory is as it was when a snapshot that was prepared `since` got it: made in advance, and on disk
/// ([`super::spare`]). Whatever is done to a directory gives it a new time of change, which is later than `since`; or
/// another one, if somebody sets the clock. Where the umask takes something from its mode, none counts as untouched.
pub(super) fn is_untouched(upper: &Path, since: SystemTime) -> io::Result<bool> {
    let found = fs::symlink_metadata(upper)?;
    let made = found.created()?;
    let changed = u64::try_from(found.ctime()).ok().zip(u32::try_from(found.ctime_nsec()).ok());
    let changed = changed.map(|(secs, nanos)| SystemTime::UNIX_EPOCH + Duration::new(secs, nanos));
    Ok(changed == Some(made) && made + TICK < since)
}

/// Puts what lies in `upper` on disk. A few files by themselves: syncfs(2) waits for all that every container has written
/// to the file system.
pub(super) fn write_out(upper: &Path, inodes: u64) -> io::Result<()> {
    if inodes > SYNCED_ALONE_MAX {
        return Ok(nix::unistd::syncfs(File::open(upper)?)?);
    }
    let mut pending = vec![upper.to_owned()];
    while let Some(path) = pending.pop() {
        let kind = fs::symlink_metadata(&path)?.file_type();
        // What else there is, is all in its directory.
        if kind.is_file() || kind.is_dir() {
            File::open(&path)?.sync_all()?;
        }
        if kind.is_dir() {
            for entry in fs::read_dir(&path)? {
                pending.push(entry?.path());
            }
        }
    }
    Ok(())
}

/// Deletes a directory that no snapshot has. What cannot be deleted is logged and left.
pub(super) fn discard(tree: &Path) {
    match fs::remove_dir_all(tree) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            let path = tree.display();
            tracing::warn!(%path, %error, "cannot delete a snapshot's directory");
        }
        _ => (),
    }
}
