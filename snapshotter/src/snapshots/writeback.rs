//! Layers are written to disk while containerd unpacks them, so that a commit waits for the rest
//! only.
//!
//! By itself the kernel begins to write when a file has been dirty for half a minute, or when a
//! tenth of memory is (`dirty_expire_centisecs` and `dirty_background_ratio` in
//! Documentation/admin-guide/sysctl/vm.rst). So a thread for each layer goes through its tree again
//! and again and has the kernel begin with what is new. That is advice: nothing depends on it, and
//! what cannot be read is skipped.

use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat, openat2, statat,
};
use rustix::io::Errno;

use super::tree::{TICK, time};
use godwit_disk::sys::begin_writing;

/// Layers that are followed at a time: as many as containerd unpacks at once, and a few that no
/// unpacker will finish.
const FOLLOWED_MAX: usize = 8;

/// What the paths of a layer's directories may take, in bytes: some hundred thousand of usual ones.
/// What is beyond is left to the commit.
const PATHS_BYTES_MAX: usize = 16 << 20;

/// How long a thread rests before it looks again: three times as long as it took, within these;
/// longer each time that there was nothing.
const REST: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The layers that are being unpacked, by their snapshots' numbers. A thread ends when its sender
/// is dropped.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    followed: Mutex<HashMap<u64, Sender<Infallible>>>,
}

impl Writeback {
    /// Whether a snapshot of this key is a layer to be: containerd's keys are
    /// `NAMESPACE/NUMBER/KEY`, and those of an unpacker begin with `extract-` (`UnpackKeyPrefix` in
    /// containerd's `core/snapshots/snapshotter.go`).
    pub(super) fn is_for(key: &str) -> bool {
        key.splitn(3, '/').nth(2).is_some_and(|key| key.starts_with("extract-"))
    }

    /// Follows what is unpacked into `upper`, until [`Self::leave`].
    pub(super) fn follow(&self, number: u64, upper: PathBuf) {
        let mut followed = self.followed();
        if followed.len() >= FOLLOWED_MAX {
            return;
        }
        let (sender, ended) = mpsc::channel();
        let builder = thread::Builder::new().name("writeback".to_owned());
        match builder.spawn(move || follow(&upper, &ended)) {
            Ok(_thread) => drop(followed.insert(number, sender)),
            Err(error) => tracing::debug!(%error, "a layer is not written early"),
        }
    }

    /// Has the thread for this snapshot end, if there is one, and does not wait for it.
    pub(super) fn leave(&self, number: u64) {
        self.followed().remove(&number);
    }

    fn followed(&self) -> MutexGuard<'_, HashMap<u64, Sender<Infallible>>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn follow(upper: &Path, ended: &Receiver<Infallible>) {
    let Ok(mut walk) = Walk::new(upper) else { return };
    let mut rest = REST.0;
    loop {
        match ended.recv_timeout(rest) {
            Ok(never) => match never {},
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => (),
        }
        let begun = Instant::now();
        let files = walk.pass(|| ended.try_recv() == Err(TryRecvError::Disconnected));
        rest = if files > 0 { begun.elapsed() * 3 } else { rest * 2 };
        rest = rest.clamp(REST.0, REST.1);
    }
}

/// What is known of a tree that grows.
struct Walk {
    /// Below it nothing leads out: no symbolic link is followed, whatever an image puts where a
    /// directory was.
    root: File,
    /// Every directory by its path from there, and the last time of change of what it has, when it
    /// was listed.
    directories: HashMap<PathBuf, SystemTime>,
    /// What the paths may still take, in bytes.
    room: usize,
    /// When the last pass began, and the one before: what changed since then is new, and where
    /// something did since the one before, something may grow, which does not change its directory.
    since: [SystemTime; 2],
}

impl Walk {
    /// Errors: the system's.
    fn new(upper: &Path) -> io::Result<Self> {
        let directories = [(PathBuf::from("."), UNIX_EPOCH)].into();
        let (root, since) = (File::open(upper)?, [UNIX_EPOCH; 2]);
        Ok(Self { root, directories, room: PATHS_BYTES_MAX, since })
    }

    /// Has the files written that changed since the pass before. Returns how many.
    fn pass(&mut self, is_over: impl Fn() -> bool) -> u64 {
        let now = SystemTime::now();
        let mut pending: Vec<PathBuf> = self.directories.keys().cloned().collect();
        let mut files = 0;
        while let Some(path) = pending.pop() {
            match self.look(&path, &mut pending, &is_over) {
                Ok(written) => files += written,
                // It is gone, or was replaced.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV) => {
                    self.directories.remove(&path);
                    self.room += path.as_os_str().len();
                }
                Err(_) => (),
            }
            if is_over() {
                return files;
            }
        }
        self.since = [now - TICK, self.since[0]];
        files
    }

    /// The same for one directory. Adds those in it that were not known to `pending`.
    fn look(
        &mut self,
        path: &Path,
        pending: &mut Vec<PathBuf>,
        is_over: impl Fn() -> bool,
    ) -> rustix::io::Result<u64> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let directory = openat2(&self.root, path, flags, Mode::empty(), resolve)?;
        let [since, before] = self.since;
        let known = self.directories.get(path).copied().unwrap_or(UNIX_EPOCH);
        if changed(&fstat(&directory)?).max(known) < before {
            return Ok(0);
        }
        let (mut files, mut last) = (0, UNIX_EPOCH);
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if [c".", c".."].contains(&name) {
                continue;
            }
            if is_over() {
                break;
            }
            let Ok(found) = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            match FileType::from_raw_mode(found.st_mode) {
                FileType::Directory => {
                    let below = path.join(OsStr::from_bytes(name.to_bytes()));
                    let bytes = below.as_os_str().len();
                    if !self.directories.contains_key(&below) && bytes <= self.room {
                        self.room -= bytes;
                        self.directories.insert(below.clone(), UNIX_EPOCH);
                        pending.push(below);
                    }
                }
                FileType::RegularFile => {
                    last = last.max(changed(&found));
                    files += u64::from(changed(&found) >= since && write(&directory, name));
                }
                _ => {}
            }
        }
        self.directories.insert(path.to_owned(), last);
        Ok(files)
    }
}

/// When it was last changed, its attributes included.
fn changed(found: &Stat) -> SystemTime {
    time(found.st_ctime, found.st_ctime_nsec)
}

fn write(directory: &OwnedFd, name: &CStr) -> bool {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = openat(directory, name, flags, Mode::empty());
    opened.inspect(|file| begin_writing(file, 0..0)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::super::Snapshotter;
    use super::*;

    #[test]
    fn a_pass_finds_what_changed_since_the_one_before() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| dir.path().join(name);
        fs::write(outside.path().join("not ours"), "x").unwrap();
        symlink(outside.path(), at("link")).unwrap();
        symlink(outside.path().join("not ours"), at("other link")).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), "x").unwrap();
        fs::write(at("file"), "x").unwrap();

        let mut walk = Walk::new(dir.path()).unwrap();
        let mut pass = || {
            thread::sleep(2 * TICK);
            walk.pass(|| false)
        };
        assert_eq!((pass(), pass()), (2, 0));
        // What is renamed, what lies in a new directory, and what grows from then on.
        fs::rename(at("file"), at("a/renamed")).unwrap();
        fs::create_dir_all(at("c/d")).unwrap();
        fs::write(at("c/d/file"), "x").unwrap();
        let mut growing = File::create(at("c/grows")).unwrap();
        assert_eq!(pass(), 3);
        for _ in 0..3 {
            growing.write_all(b"x").unwrap();
            assert_eq!(pass(), 1);
        }
        // A directory that was replaced by a link, or of one above, and one that
        // is gone.
        fs::create_dir(outside.path().join("d")).unwrap();
        for replaced in ["c/d", "c"] {
            fs::write(outside.path().join("d/not ours"), replaced).unwrap();
            fs::remove_dir_all(at(replaced)).unwrap();
            symlink(outside.path(), at(replaced)).unwrap();
            assert_eq!((pass(), pass()), (0, 0));
        }
        fs::remove_dir_all(at("a")).unwrap();
        assert_eq!(pass(), 0);
        let known: usize = walk.directories.keys().map(|path| path.as_os_str().len()).sum();
        assert_eq!((walk.directories.len(), walk.room + known), (1, PATHS_BYTES_MAX + 1));
    }

    #[test]
    fn a_pass_ends_when_it_is_told_to() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..10 {
            fs::write(dir.path().join(number.to_string()), "x").unwrap();
        }
        let asked = std::cell::Cell::new(0);
        let is_over = || asked.replace(asked.get() + 1) >= 4;
        assert_eq!(Walk::new(dir.path()).unwrap().pass(is_over), 4);
    }

    /// Method: the file has a place on the disk long before the kernel would give it one, in half a
    /// minute.
    #[test]
    fn a_layer_is_on_its_way_to_the_disk_before_it_is_committed() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        snapshots.prepare("default/1/extract-1 x", None, Default::default()).unwrap();
        let file = dir.path().join("fs/1/fs/file");
        fs::write(&file, vec![1; 1 << 20]).unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let extents = Command::new("filefrag").arg("-v").arg(&file).output().unwrap();
            let extents = String::from_utf8(extents.stdout).unwrap();
            if extents.contains("last") && !extents.contains("delalloc") {
                break;
            }
            assert!(Instant::now() < deadline, "{extents}");
            thread::sleep(TICK);
        }
    }

    #[test]
    fn what_an_unpacker_prepares_is_followed_until_it_is_committed_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        let followed = || snapshots.writeback.followed().len();
        for key in ["extract-1 x", "default/1/x", "default/extract-1 x", "default/1/x/extract-"] {
            snapshots.prepare(key, None, Default::default()).unwrap();
        }
        assert_eq!(followed(), 0);
        let key = |number: usize| format!("default/1/extract-{number} x");
        for number in 0..FOLLOWED_MAX + 1 {
            snapshots.prepare(&key(number), None, Default::default()).unwrap();
        }
        assert_eq!(followed(), FOLLOWED_MAX);
        snapshots.remove(&key(0)).unwrap();
        snapshots.commit("layer", &key(1), Default::default()).unwrap();
        assert_eq!(followed(), FOLLOWED_MAX - 2);
        snapshots.view("default/1/extract-view", Some("layer"), Default::default()).unwrap();
        assert_eq!(followed(), FOLLOWED_MAX - 2);
    }
    #[test]
    fn what_is_removed_as_soon_as_it_is_there_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshotter::open(dir.path()).unwrap();
        let (key, deadline) = ("default/1/extract-1 x", Instant::now() + Duration::from_secs(10));
        let again_and_again = |work: &(dyn Fn() -> bool + Sync)| {
            for _ in 0..2 * FOLLOWED_MAX {
                while !work() {
                    assert!(Instant::now() < deadline);
                }
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| again_and_again(&|| snapshots.remove(key).is_ok()));
            again_and_again(&|| snapshots.prepare(key, None, Default::default()).is_ok());
        });
        assert_eq!(snapshots.writeback.followed().len(), 0);
    }
}
