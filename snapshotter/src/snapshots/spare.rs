//! Directories for snapshots to come, made in advance and on disk before they are wanted.
//!
//! Making one takes ext4 0.15 ms, and without a journal, when many files were deleted in the
//! minutes before, 1 ms; renaming one takes 0.03 ms. They wait under `fs/.spare`, where a thread
//! makes more: when no prepare has taken one for a moment, or when few are left. What is there when
//! the snapshots are opened belongs to none and is deleted.
//!
//! Where a file system puts a directory is decided when it is made, and here it is asked to give
//! each a place of its own.

use std::collections::VecDeque;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::tree::{WORK_MODE, discard, make_dir};
use godwit_disk::sys::spread_out;

/// How many there are: for some containers at once and the layers of an image.
const COUNT: usize = 32;

/// With fewer than these the thread does not wait.
const FEW: usize = 8;

/// How long none was taken.
const QUIET: Duration = Duration::from_millis(20);

#[derive(Debug)]
pub(super) struct Spares {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    dir: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The oldest first.
    ready: VecDeque<PathBuf>,
    /// Name of the next.
    next: u64,
    /// How many were wanted.
    wanted: u64,
    /// None can be made; the next prepare tries again, and gets the error.
    has_failed: bool,
    is_closed: bool,
}

impl Spares {
    /// Makes them in `dir`. Caller: has the lock of the snapshots. Errors: no thread can be
    /// started.
    pub(super) fn open(dir: PathBuf) -> io::Result<Self> {
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %dir.display(), %error, "cannot delete directories of no snapshot");
            }
            _ => (),
        }
        let shared = Arc::new(Shared { dir, state: Mutex::default(), changed: Condvar::new() });
        let of_thread = shared.clone();
        // A test knows the thread by its name (`tests/preload/step-preload.c`).
        let builder = thread::Builder::new().name("spares".to_owned());
        let thread = builder.spawn(move || of_thread.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Whether the next has to be made first.
    pub(super) fn is_empty(&self) -> bool {
        self.shared.state().ready.is_empty()
    }

    /// Makes `path`, which is not there, a snapshot's directory with `fs`, root's, and `work`. All
    /// of it is on disk, but its name.
    pub(super) fn take(&self, path: &Path) -> io::Result<()> {
        loop {
            let mut state = self.shared.state();
            let spare = state.ready.pop_front();
            state.wanted += 1;
            state.has_failed = false;
            drop(state);
            self.shared.changed.notify_all();
            let made_now = spare.is_none();
            let spare = spare.map_or_else(|| self.shared.make(), Ok)?;
            match fs::rename(&spare, path) {
                // It was deleted meanwhile.
                Err(_) if !made_now && !spare.exists() => (),
                Err(error) => {
                    discard(&spare);
                    return Err(error);
                }
                Ok(()) => return Ok(()),
            }
        }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        self.shared.state().is_closed = true;
        self.shared.changed.notify_all();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        // It begins with none wanted, and so with nothing to do.
        let mut seen = 0;
        loop {
            let is_idle = |state: &mut State| {
                let has_work = state.ready.len() < COUNT && state.wanted > 0 && !state.has_failed;
                !has_work && !state.is_closed
            };
            let state = self.changed.wait_while(self.state(), is_idle);
            let state = state.unwrap_or_else(PoisonError::into_inner);
            if state.is_closed {
                return;
            }
            if state.ready.len() >= FEW && state.wanted != seen {
                seen = state.wanted;
                let is_quiet = |state: &mut State| state.wanted == seen && !state.is_closed;
                drop(self.changed.wait_timeout_while(state, QUIET, is_quiet));
                continue;
            }
            drop(state);
            let made = self.make();
            let mut state = self.state();
            match made {
                Ok(spare) => state.ready.push_back(spare),
                Err(error) => {
                    tracing::debug!(%error, "cannot make a snapshot's directory in advance");
                    state.has_failed = true;
                }
            }
        }
    }

    fn make(&self) -> io::Result<PathBuf> {
        match DirBuilder::new().mode(0o700).create(&self.dir) {
            Ok(()) => spread_out(&self.dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
            // Such as a full disk: what follows would only say that the directory is missing.
            Err(error) => return Err(error),
        }
        let spare = loop {
            let mut state = self.state();
            let spare = self.dir.join(state.next.to_string());
            state.next += 1;
            drop(state);
            match make_dir(&spare, 0o700) {
                // What could not be deleted.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (),
                made => break made.map(|()| spare)?,
            }
        };
        let (upper, work) = (spare.join("fs"), spare.join("work"));
        let made =
            make_dir(&work, WORK_MODE).and_then(|()| make_dir(&upper, 0o755)).and_then(|()| {
                [&upper, &work, &spare]
                    .into_iter()
                    .try_for_each(|path| File::open(path)?.sync_all())
            });
        made.inspect_err(|_| discard(&spare)).map(|()| spare)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::time::Instant;

    use super::*;

    fn ready(spares: &Spares, count: usize) {
        let begun = Instant::now();
        while spares.shared.state().ready.len() != count {
            assert!(begun.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn each_is_taken_once_and_more_are_made_before_they_are_out() {
        let dir = tempfile::tempdir().unwrap();
        let spares = Spares::open(dir.path().join("spare")).unwrap();
        for number in 0..3 * COUNT {
            let path = dir.path().join(number.to_string());
            spares.take(&path).unwrap();
            let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o7777;
            let modes = (mode(&path), mode(&path.join("fs")), mode(&path.join("work")));
            assert_eq!(modes, (0o700, 0o755, 0o711));
            assert_eq!(fs::read_dir(&path).unwrap().count(), 2);
        }
        ready(&spares, COUNT);
        assert_eq!(fs::read_dir(dir.path().join("spare")).unwrap().count(), COUNT);
    }

    #[test]
    fn what_was_deleted_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let spare = dir.path().join("spare");
        fs::create_dir_all(spare.join("7/left by a killed one")).unwrap();
        let spares = Spares::open(spare.clone()).unwrap();
        assert!(!spare.exists());
        spares.take(&dir.path().join("first")).unwrap();
        ready(&spares, COUNT);
        fs::remove_dir_all(&spare).unwrap();
        spares.take(&dir.path().join("second")).unwrap();
        ready(&spares, COUNT);
        assert_eq!(fs::read_dir(spare).unwrap().count(), COUNT);
    }

    /// Method: a file is where they should be made, and a place where none can be put.
    #[test]
    fn what_cannot_be_made_or_put_is_told_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let spare = dir.path().join("spare");
        fs::write(&spare, "a file").unwrap();
        let spares = Spares::open(spare.clone()).unwrap();
        spares.take(&dir.path().join("first")).unwrap_err();
        let begun = Instant::now();
        while !spares.shared.state().has_failed {
            assert!(begun.elapsed() < Duration::from_secs(10));
            thread::sleep(Duration::from_millis(1));
        }
        fs::remove_file(&spare).unwrap();
        spares.take(&dir.path().join("second")).unwrap();
        ready(&spares, COUNT);
        spares.take(&dir.path().join("missing/third")).unwrap_err();
        ready(&spares, COUNT);
        assert_eq!(fs::read_dir(spare).unwrap().count(), COUNT);
    }

    /// Method: a path that is too long fails when the directory of all is made, as a full disk
    /// does.
    #[test]
    fn the_error_is_that_of_the_directory_that_could_not_be_made() {
        let dir = tempfile::tempdir().unwrap();
        let spares = Spares::open(dir.path().join("x".repeat(300))).unwrap();
        let error = spares.take(&dir.path().join("first")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidFilename, "{error}");
    }
}
