//! Layers are written to disk while containerd unpacks them, so that a commit waits for the rest only.
//!
//! By itself the kernel begins to write when a file has been dirty for half a minute, or when a tenth of memory is
//! (`dirty_expire_centisecs` and `dirty_background_ratio` in Documentation/admin-guide/sysctl/vm.rst). So a thread for each
//! layer goes through its tree again and again and has the kernel begin with what is new. That is advice: nothing
//! depends on it, and what cannot be read is passed over.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::libc::{O_NOFOLLOW, O_NONBLOCK};

use super::tree::{TICK, changed};
use crate::sys::begin_writing;

/// Layers that are followed at a time: as many as containerd unpacks at once, and a few that nobody will finish.
const FOLLOWED_MAX: usize = 8;

/// How long a thread rests before it looks again: three times as long as it took, within these; longer each time that there
/// was nothing.
const REST: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The layers that are being unpacked, by their snapshots' numbers. A thread ends when its sender is dropped.
#[derive(Debug, Default)]
pub(super) struct Writeback {
    followed: Mutex<HashMap<u64, Sender<Infallible>>>,
}

impl Writeback {
    /// Whether a snapshot of this key is a layer to be: containerd's keys are `NAMESPACE/NUMBER/KEY`, and those of an
    /// unpacker begin with `extract-` (`UnpackKeyPrefix` in containerd's `core/snapshots/snapshotter.go`).
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
        match builder.spawn(move || follow(upper, &ended)) {
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

fn follow(upper: PathBuf, ended: &Receiver<Infallible>) {
    let mut walk = Walk::new(upper);
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
    /// Every directory, and the last time of change of what it has, when it was listed.
    directories: HashMap<PathBuf, SystemTime>,
    /// When the last pass began, and the one before: what changed since then is new, and where something did since the one
    /// before, something may grow, which does not change its directory.
    since: [SystemTime; 2],
}

impl Walk {
    fn new(upper: PathBuf) -> Self {
        Self { directories: [(upper, UNIX_EPOCH)].into(), since: [UNIX_EPOCH; 2] }
    }

    /// Has the files written that changed since the pass before. Returns how many.
    fn pass(&mut self, is_over: impl Fn() -> bool) -> u64 {
        let now = SystemTime::now();
        let [since, before] = self.since;
        let mut pending: Vec<PathBuf> = self.directories.keys().cloned().collect();
        let mut files = 0;
        while let Some(directory) = pending.pop() {
            let Ok(found) = fs::symlink_metadata(&directory) else {
                self.directories.remove(&directory);
                continue;
            };
            let known = self.directories.entry(directory.clone()).or_insert(UNIX_EPOCH);
            if !found.is_dir() || changed(&found).max(*known) < before {
                continue;
            }
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            let mut last = UNIX_EPOCH;
            for entry in entries.flatten() {
                if is_over() {
                    return files;
                }
                let Ok(found) = entry.metadata() else { continue };
                let path = entry.path();
                if found.is_dir() && !self.directories.contains_key(&path) {
                    pending.push(path);
                } else if found.is_file() {
                    last = last.max(changed(&found));
                    if changed(&found) >= since && write(&path) {
                        files += 1;
                    }
                }
            }
            self.directories.insert(directory, last);
        }
        self.since = [now - TICK, since];
        files
    }
}

fn write(path: &Path) -> bool {
    let opened = File::options().read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path);
    opened.inspect(|file| begin_writing(file, 0..0)).is_ok()
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::super::Snapshots;
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

        let mut walk = Walk::new(dir.path().to_owned());
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
        // A directory that somebody has put a link in the place of, and one that is gone.
        fs::remove_dir_all(at("c/d")).unwrap();
        symlink(outside.path(), at("c/d")).unwrap();
        fs::remove_dir_all(at("a")).unwrap();
        assert_eq!((pass(), pass()), (0, 0));
        fs::remove_dir_all(dir.path()).unwrap();
        assert_eq!(pass(), 0);
        assert!(walk.directories.is_empty());
    }

    #[test]
    fn a_pass_ends_when_it_is_told_to() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..10 {
            fs::write(dir.path().join(number.to_string()), "x").unwrap();
        }
        let asked = std::cell::Cell::new(0);
        let is_over = || asked.replace(asked.get() + 1) == 4;
        assert_eq!(Walk::new(dir.path().to_owned()).pass(is_over), 4);
    }

    /// Method: the file has a place on the disk long before the kernel would give it one, in half a minute.
    #[test]
    fn a_layer_is_on_its_way_to_the_disk_before_it_is_committed() {
        let dir = tempfile::tempdir().unwrap();
        let snapshots = Snapshots::open(dir.path()).unwrap();
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
        let snapshots = Snapshots::open(dir.path()).unwrap();
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
        let snapshots = Snapshots::open(dir.path()).unwrap();
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
