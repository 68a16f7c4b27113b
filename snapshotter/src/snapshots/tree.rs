//! A snapshot's directory on disk: made, found untouched or written out, deleted.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::unistd::syncfs;

use super::{SnapshotError, Usage, usage};
use godwit_disk::trees;

/// Mode of `work`, as overlayfs has it.
pub(super) const WORK_MODE: u32 = 0o711;

/// Times of files are up to this much late: a tick of the slowest kernel clock.
pub(super) const TICK: Duration = Duration::from_millis(10);

/// Most inodes of a layer that are synced one by one.
const SYNCED_ALONE_MAX: usize = 16;

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

/// Whether a directory is as it was when a snapshot that was prepared `since` got it: made in
/// advance, and on disk ([`super::spare`]). Whatever is done to a directory gives it a new time of
/// change, which is later than `since`; or another one, if the clock is set. Where the umask
/// takes something from its mode, none counts as untouched.
pub(super) fn is_untouched(upper: &Path, since: SystemTime) -> io::Result<bool> {
    let found = fs::symlink_metadata(upper)?;
    let made = found.created()?;
    Ok(time(found.ctime(), found.ctime_nsec()) == made && made + TICK < since)
}

/// A time as stat(2) has it.
pub(super) fn time(secs: impl TryInto<u64>, nanos: impl TryInto<u32>) -> SystemTime {
    let since_epoch = secs.try_into().ok().zip(nanos.try_into().ok());
    since_epoch.map_or(UNIX_EPOCH, |(secs, nanos)| UNIX_EPOCH + Duration::new(secs, nanos))
}

/// Puts what lies in `upper`, of a snapshot that was prepared `since`, on disk, and measures it. A
/// few files and directories by themselves: syncfs(2) waits for all that every container has
/// written to the file system.
pub(super) fn write_out(upper: &Path, since: SystemTime) -> Result<Usage, SnapshotError> {
    let failed = |source| SnapshotError::Io { what: "sync", path: upper.to_owned(), source };
    if let Some(few) = few_inodes(upper).map_err(failed)? {
        if few.len() > 1 || !is_untouched(upper, since).unwrap_or(false) {
            let sync = |path: &PathBuf| File::open(path)?.sync_all();
            few.iter().try_for_each(sync).map_err(failed)?;
        }
        return measure(upper);
    }
    // One waits for the disk, the other for the processor.
    thread::scope(|scope| {
        let usage = scope.spawn(|| measure(upper));
        let written = File::open(upper).and_then(|upper| Ok(syncfs(upper)?));
        let usage = usage.join().unwrap_or_else(|panicked| resume_unwind(panicked));
        written.map_err(failed).and(usage)
    })
}

/// All that lies in `upper`, with itself, unless there is more than can be synced one by one, or
/// something that cannot be: a symbolic link or a whiteout has no descriptor to fsync, and without
/// a journal its directory's fsync does not write it.
pub(super) fn few_inodes(upper: &Path) -> io::Result<Option<Vec<PathBuf>>> {
    let (mut found, mut pending) = (Vec::new(), vec![upper.to_owned()]);
    while let Some(path) = pending.pop() {
        let kind = fs::symlink_metadata(&path)?.file_type();
        if kind.is_dir() {
            for entry in fs::read_dir(&path)? {
                pending.push(entry?.path());
                if 1 + found.len() + pending.len() > SYNCED_ALONE_MAX {
                    return Ok(None);
                }
            }
        } else if !kind.is_file() {
            return Ok(None);
        }
        found.push(path);
    }
    Ok(Some(found))
}

pub(super) fn measure(upper: &Path) -> Result<Usage, SnapshotError> {
    usage::of(upper).map_err(|(path, source)| SnapshotError::Io { what: "measure", path, source })
}

/// Deletes a directory that no snapshot has. What cannot be deleted is logged and left.
pub(super) fn discard(tree: &Path) {
    match trees::remove(tree) {
        Err(error) if error.source.kind() != io::ErrorKind::NotFound => {
            let (path, error) = (error.path.display(), error.source);
            tracing::warn!(%path, %error, "cannot delete a snapshot's directory");
        }
        _ => (),
    }
}
