//! Runs: who owns which names on this machine, and how all of it is removed again.
//!
//! A run is a number with a lock file, `/run/godwit-testbed/<N>`; its text names the run's
//! directory. The holder of the lock owns everything that is derived from the number:
//!
//! ```text
//! gwN-*          network namespaces        10.(100+N).0.0/24   addresses
//! godwit-N.*     cgroups                   runs/<N>            directory with all state
//! ```
//!
//! 1. lock the first free number; a text in it means that its owner was killed: tear
//!    that run down first;
//! 2. write our directory into it, and only then make anything;
//! 3. tear down: kill every process of the cgroups, remove cgroups, network namespaces (their links
//!    go with them) and the directory, then the lock file.
//!
//! No other record is needed, so a run that was killed at any point is removed by its number alone.
//! Node mounts exist only in the nodes' mount namespaces and go with their last process.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::command::host;
use crate::root::{progress, remove_tree};
use crate::{cgroups, network, place, sys};

/// Where all checkouts on this machine agree on numbers.
const LOCKS: &str = "/run/godwit-testbed";
/// Runs on one machine at a time, and so the numbers 0 to 99.
const NUMBERS: u32 = 100;
/// Processes that do not die within this time are stuck in the kernel.
const TEARDOWN_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs of this process that still exist, for the end of the process.
static LIVE: Mutex<Vec<Owned>> = Mutex::new(Vec::new());

/// A run of this process; torn down when dropped.
#[derive(Debug)]
pub(crate) struct Run {
    number: u32,
    directory: PathBuf,
}

/// A number that is ours while its lock is held.
struct Owned {
    number: u32,
    directory: PathBuf,
    lock: Flock<File>,
}

impl Run {
    /// Takes a free number and makes its directory, cleaning up after its last owner if need be.
    ///
    /// Errors: all numbers are taken; leftovers cannot be removed.
    pub(crate) fn begin() -> Result<Self> {
        prepare_for_the_end()?;
        fs::create_dir_all(LOCKS).with_context(|| format!("create {LOCKS}"))?;
        for number in 0..NUMBERS {
            let Some(mut owned) = Owned::take(number)? else { continue };
            if let Some(left) = owned.recorded()? {
                progress(&format!("removing what killed run {number} left"));
                tear_down(number, &left)?;
            }
            let directory = directory_of(number);
            remove_tree(&directory)?;
            owned.record(&directory)?;
            fs::create_dir_all(&directory)?;
            LIVE.lock().unwrap_or_else(PoisonError::into_inner).push(owned);
            return Ok(Self { number, directory });
        }
        bail!("all {NUMBERS} numbers of test runs are taken; see {LOCKS}")
    }

    /// The number that names are made from.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Directory of the run's state.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let mut live = LIVE.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = live.iter().position(|owned| owned.number == self.number) else { return };
        let owned = live.swap_remove(index);
        drop(live);
        end(owned);
    }
}

impl Owned {
    /// Locks a number; `None` if someone else holds it.
    fn take(number: u32) -> Result<Option<Self>> {
        let path = lock_path(number);
        let open =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path);
        let file = open.with_context(|| format!("open {}", path.display()))?;
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, Errno::EWOULDBLOCK)) => return Ok(None),
            Err((_, errno)) => return Err(errno).context(format!("lock {}", path.display())),
        };
        // Its last owner may have removed the file between our open and our lock.
        let same =
            fs::metadata(&path).is_ok_and(|m| lock.metadata().is_ok_and(|n| m.ino() == n.ino()));
        Ok(same.then_some(Self { number, directory: PathBuf::new(), lock }))
    }

    /// Directory that a killed owner recorded.
    fn recorded(&mut self) -> Result<Option<PathBuf>> {
        let mut text = String::new();
        self.lock.read_to_string(&mut text)?;
        Ok(text.lines().next().map(PathBuf::from))
    }

    fn record(&mut self, directory: &Path) -> Result<()> {
        self.directory = directory.to_path_buf();
        let text = format!("{}\nprocess {}\n", directory.display(), std::process::id());
        fs::write(lock_path(self.number), text)?;
        Ok(())
    }

    /// Gives the number back. Only after a complete teardown: the text is what finds leftovers.
    fn release(self) -> Result<()> {
        fs::remove_file(lock_path(self.number))?;
        Ok(())
    }
}

fn lock_path(number: u32) -> PathBuf {
    Path::new(LOCKS).join(number.to_string())
}

/// Tears a run down and gives its number back; what fails is left for the next cleaning.
fn end(owned: Owned) {
    let ended = tear_down(owned.number, &owned.directory).and_then(|()| owned.release());
    if let Err(error) = ended {
        eprintln!("testbed: teardown is incomplete: {error:#}");
    }
}

fn tear_down(number: u32, directory: &Path) -> Result<()> {
    cgroups::kill_all(number, TEARDOWN_TIMEOUT)?;
    cgroups::remove_all(number, TEARDOWN_TIMEOUT)?;
    for name in network::namespaces_of(number)? {
        host(&["ip", "netns", "delete", &name])?;
    }
    remove_tree(directory)
}

/// Removes what killed runs left, on this machine. Returns the numbers of the runs removed.
///
/// Errors: leftovers cannot be removed; the rest has been.
pub fn clean() -> Result<Vec<u32>> {
    let mut removed = Vec::new();
    let entries = match fs::read_dir(LOCKS) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(removed),
        entries => entries?,
    };
    let mut failure = None;
    for entry in entries {
        let name = entry?.file_name();
        let Some(number) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(mut owned) = Owned::take(number)? else { continue };
        let left = owned.recorded()?;
        let outcome = left.as_ref().map_or(Ok(()), |left| tear_down(number, left));
        match outcome.and_then(|()| owned.release()) {
            Ok(()) if left.is_some() => removed.push(number),
            Ok(()) => {}
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(removed), Err)
}

/// What exists of a run that should be gone: one line per thing. For tests of the teardown.
///
/// Another run may have taken the number meanwhile; then nothing can be said, and nothing is.
pub fn traces(number: u32) -> Result<Vec<String>> {
    fs::create_dir_all(LOCKS)?;
    let Some(mut owned) = Owned::take(number)? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    if let Some(record) = owned.recorded()? {
        found.push(format!("lock file with {}", record.display()));
    } else {
        owned.release()?;
    }
    found.extend(network::namespaces_of(number)?);
    found.extend(cgroups::groups_of(number)?.iter().map(|group| group.display().to_string()));
    let directory = directory_of(number);
    if directory.exists() {
        found.push(directory.display().to_string());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let directory = format!("{}/", directory.display());
    found.extend(mounts.lines().filter(|line| line.contains(&directory)).map(str::to_owned));
    Ok(found)
}

fn directory_of(number: u32) -> PathBuf {
    place::testbed().join("runs").join(number.to_string())
}

/// Sees to it that runs end with the process: also shared ones that are never dropped, also on
/// Ctrl-C.
fn prepare_for_the_end() -> Result<()> {
    static ONCE: Once = Once::new();
    let mut outcome = Ok(());
    ONCE.call_once(|| {
        outcome = sys::at_exit(end_all).and_then(|()| sys::on_signal(stop));
    });
    outcome.context("prepare teardown at exit")
}

extern "C" fn end_all() {
    let live = std::mem::take(&mut *LIVE.lock().unwrap_or_else(PoisonError::into_inner));
    live.into_iter().for_each(end);
}

#[expect(clippy::exit, reason = "the answer to a signal that asks the process to end")]
fn stop(signal: i32) {
    eprintln!("\ntestbed: signal {signal}, tearing down");
    // Other threads may be making nodes at this moment: they are stopped by the exit, and what they
    // made after the teardown is found by its number. So the lock files keep their text.
    let live = std::mem::take(&mut *LIVE.lock().unwrap_or_else(PoisonError::into_inner));
    for owned in &live {
        if let Err(error) = tear_down(owned.number, &owned.directory) {
            eprintln!("testbed: teardown is incomplete: {error:#}");
        }
    }
    std::process::exit(128 + signal);
}
