//! A restored container between CRIU and its first instruction, seen from outside: who works on it,
//! how far it is, and how it is ended with proof that it never ran.
//!
//! ```text
//! Held ──► Granted ──► Frozen ──► Thawing
//! ```
//!
//! The shim writes a [`Record`] to a file before each of these stages begins. It outlives the shim,
//! so that whatever clears up behind a dead shim knows what to end, and what to report.
//! [`Record::end`] ends CRIU, its action script, the runtime and every task, and tells whether a
//! task may have executed an instruction of the program:
//!
//! | stage | what keeps the tasks from running | proof that none ran |
//! |---|---|---|
//! | `Held` | CRIU waits for its script; without CRIU the tasks sleep | nothing more is needed |
//! | `Granted` | SIGSTOP, sent before CRIU detaches | CRIU's last words in its log |
//! | `Frozen` | the freezer, since a moment at which CRIU still lived | the group is still frozen |
//! | `Thawing` | nothing | none |
//!
//! At `Granted` every task must also be stopped. A CRIU that was killed then, and so left no last
//! words, may have let tasks go.
//!
//! In every case all tasks must have ended: a task that cannot be killed may run later.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message as _;

use crate::image::{self, Kind};
use crate::pagemap::ImageError;
use crate::sys;

/// How long CRIU may take to come to its end once it has been granted the resume.
const CRIU_ENDS_MAX: Duration = Duration::from_secs(5);
/// How long killed tasks may take to end.
const TASKS_END_MAX: Duration = Duration::from_secs(10);
/// How long groups whose processes have ended may be in use.
const GROUPS_GO_MAX: Duration = Duration::from_secs(1);
/// How deep groups are removed.
const DEPTH_MAX: usize = 64;
/// How long a freeze may take. The tasks are stopped or traced by then, so none is in a system
/// call.
const FREEZE_MAX: Duration = Duration::from_secs(4);
/// How often state that the kernel does not notify about is looked at.
const POLL: Duration = Duration::from_millis(1);
/// Groups below a container's own that are looked at.
const GROUPS_MAX: usize = 4096;
/// Longest record, in bytes.
const RECORD_BYTES_MAX: u64 = 1 << 16;
/// How much of the end of CRIU's log is searched for its last word, in bytes.
const LOG_BYTES_MAX: u64 = 1 << 16;
/// Longest description of a task in the images, in bytes.
const CORE_BYTES_MAX: u32 = 1 << 24;
/// State of a task in the images that a signal had stopped.
const TASK_STOPPED: u32 = 3;
/// CRIU's last words: it has detached from all tasks, each of which it had sent SIGSTOP; or it has
/// killed them.
const LAST_WORDS: [&str; 2] = ["Restore finished successfully", "Restoring FAILED"];

/// How far a restored container is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum Stage {
    /// CRIU has not been let go on.
    Held = 0,
    /// CRIU may be detaching from the tasks.
    Granted = 1,
    /// The tasks are frozen; CRIU was alive when they became so.
    Frozen = 2,
    /// The tasks run, or are about to.
    Thawing = 3,
}

/// A process that cannot be confused with a later one of the same id.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Process {
    /// Its id.
    #[prost(uint32, tag = "1")]
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    #[prost(uint64, tag = "2")]
    started: u64,
}

impl Process {
    /// Process `pid` as it is now. Errors: there is none.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "no start time");
        let started = field(&stat, 22).and_then(|word| word.parse().ok()).ok_or_else(missing)?;
        Ok(Self { pid, started })
    }

    /// The parent of process `pid`. Errors: there is no such process.
    pub fn parent_of(pid: u32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let missing = || io::Error::new(io::ErrorKind::InvalidData, "no parent");
        Self::of(field(&stat, 4).and_then(|word| word.parse().ok()).ok_or_else(missing)?)
    }

    /// A descriptor of the process, if it has not been reaped.
    pub fn open(&self) -> Option<OwnedFd> {
        let descriptor = sys::pidfd_open(self.pid).ok()?;
        // The descriptor keeps naming what it was opened for; only then the start time is compared.
        (Self::of(self.pid).ok().as_ref() == Some(self)).then_some(descriptor)
    }

    /// Whether it has not ended. A zombie has.
    pub fn is_alive(&self) -> bool {
        self.open().is_some_and(|process| !has_ended(&process, Duration::ZERO))
    }

    /// Kills it and waits a short time for its end.
    fn end(&self) {
        let Some(process) = self.open() else { return };
        let _ = kill(pid(self.pid), Signal::SIGKILL);
        has_ended(&process, CRIU_ENDS_MAX);
    }
}

/// Field `number` of `/proc/PID/stat`, from 1; the name, field 2, may hold anything.
fn field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(number.checked_sub(3)?)
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed())
}

/// Whether the process of a pidfd ends within `limit`.
fn has_ended(process: &OwnedFd, limit: Duration) -> bool {
    let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    poll(&mut fds, limit).is_ok_and(|ready| ready > 0)
}

/// The control group by which a container is frozen and its tasks are found.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Freezer {
    /// Its directory.
    #[prost(string, tag = "1")]
    directory: String,
    #[prost(bool, tag = "2")]
    is_version_2: bool,
}

impl Freezer {
    /// The group at `directory`: of the freezer's own hierarchy, or of version 2.
    pub fn new(directory: &Path, is_version_2: bool) -> Self {
        Self { directory: directory.to_string_lossy().into_owned(), is_version_2 }
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        Path::new(&self.directory)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    /// Moves process `pid` into this group. Errors: I/O.
    pub fn admit(&self, pid: u32) -> io::Result<()> {
        fs::write(self.file("cgroup.procs"), pid.to_string())
    }

    /// Processes in the group and in those below it.
    pub fn processes(&self) -> BTreeSet<u32> {
        let mut pids = BTreeSet::new();
        let mut queue = vec![self.directory().to_owned()];
        let mut seen = 0;
        while let Some(group) = queue.pop().filter(|_| seen < GROUPS_MAX) {
            seen += 1;
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
            let below = fs::read_dir(&group).into_iter().flatten().flatten();
            let directories = below.filter(|entry| entry.file_type().is_ok_and(|it| it.is_dir()));
            queue.extend(directories.map(|entry| entry.path()));
        }
        pids
    }

    /// Whether every task of the group stands still by it.
    pub fn is_frozen(&self) -> bool {
        if self.is_version_2 {
            let events = fs::read_to_string(self.file("cgroup.events")).unwrap_or_default();
            return events.lines().any(|line| line == "frozen 1");
        }
        fs::read_to_string(self.file("freezer.state")).is_ok_and(|state| state.trim() == "FROZEN")
    }

    /// Freezes the group and waits until it is. Errors: I/O; it takes longer than [`FREEZE_MAX`].
    pub fn freeze(&self) -> io::Result<()> {
        if self.try_freeze(FREEZE_MAX)? {
            return Ok(());
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, "the tasks do not freeze"))
    }

    /// Freezes the group and waits until it is, for `limit` at most. Returns whether it is; if not,
    /// some of its tasks may be. Errors: I/O.
    pub fn try_freeze(&self, limit: Duration) -> io::Result<bool> {
        let (file, word) =
            if self.is_version_2 { ("cgroup.freeze", "1") } else { ("freezer.state", "FROZEN") };
        fs::write(self.file(file), word)?;
        let deadline = Instant::now() + limit;
        while !self.is_frozen() {
            if Instant::now() > deadline {
                return Ok(false);
            }
            std::thread::sleep(POLL);
        }
        Ok(true)
    }

    /// Thaws the group. Errors: I/O.
    pub fn thaw(&self) -> io::Result<()> {
        let (file, word) =
            if self.is_version_2 { ("cgroup.freeze", "0") } else { ("freezer.state", "THAWED") };
        fs::write(self.file(file), word)
    }

    /// Lets a frozen group run: removes the SIGSTOP that CRIU queued, and thaws. The tasks see no
    /// stop. A program that catches SIGCONT sees one, except in a process of `stopped` (ids inside
    /// the container): it was stopped when it was dumped, and stays so.
    ///
    /// Errors: the group is not frozen, and none of its tasks runs then; I/O.
    pub fn resume(&self, stopped: &BTreeSet<u32>) -> io::Result<()> {
        if !self.is_frozen() {
            return Err(io::Error::other("the restored tasks are not frozen"));
        }
        for process in self.processes() {
            if !inner_id(process).is_some_and(|id| stopped.contains(&id)) {
                match kill(pid(process), Signal::SIGCONT) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        self.thaw()
    }

    /// Kills every process of the group, frozen or not, and waits until it is empty. None of a
    /// frozen group executes another instruction of its program. Returns whether all have ended.
    pub fn kill(&self) -> bool {
        let deadline = Instant::now() + TASKS_END_MAX;
        loop {
            let processes = self.processes();
            if processes.contains(&std::process::id()) {
                // Killing this group would kill more than the container.
                return false;
            }
            for process in &processes {
                let _ = kill(pid(*process), Signal::SIGKILL);
            }
            // In a frozen group of version 1 even this signal waits.
            let _ = self.thaw();
            if processes.is_empty() {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
    }

    /// Whether every thread is stopped by a signal, or dead.
    fn all_stopped(&self) -> bool {
        self.processes().iter().all(|process| {
            let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
            threads.flatten().all(|thread| {
                let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
                matches!(field(&stat, 3), Some("T" | "Z" | "X") | None)
            })
        })
    }
}

/// What is known about a container that is being restored. See the module comment.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Record {
    /// The daemon's name for the restore.
    #[prost(string, tag = "1")]
    pub session: String,
    /// [`Record::stage`] as a number.
    #[prost(int32, tag = "2")]
    pub stage_number: i32,
    /// The shim that writes the record.
    #[prost(message, optional, tag = "3")]
    pub shim: Option<Process>,
    /// CRIU, once it has called its script.
    #[prost(message, optional, tag = "4")]
    pub criu: Option<Process>,
    /// The OCI runtime that started CRIU.
    #[prost(message, optional, tag = "5")]
    pub runtime: Option<Process>,
    /// The container's group, once CRIU has called its script.
    #[prost(message, optional, tag = "6")]
    pub freezer: Option<Freezer>,
    /// CRIU's log.
    #[prost(string, tag = "7")]
    pub log: String,
    /// The network namespace that the container joins, if it has a name.
    #[prost(string, tag = "8")]
    pub network: String,
    /// Directories that CRIU mounts in.
    #[prost(string, repeated, tag = "9")]
    pub mounts: Vec<String>,
    /// The container's group in every hierarchy, to be removed with it.
    #[prost(string, repeated, tag = "11")]
    pub groups: Vec<String>,
    /// Set when the container was ended: whether a task may have run.
    #[prost(bool, optional, tag = "10")]
    pub may_have_run: Option<bool>,
}

/// How a restored container ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Every task is gone.
    pub all_ended: bool,
    /// It is certain that none has executed an instruction of its program.
    pub never_ran: bool,
}

impl Record {
    /// Reads a record. `None` without one. Errors: I/O; the file is no record.
    pub fn load(path: &Path) -> io::Result<Option<Self>> {
        use std::io::Read as _;
        let mut bytes = Vec::new();
        match fs::File::open(path) {
            Ok(file) => file.take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let damaged = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        Self::decode(&bytes[..]).map(Some).map_err(damaged)
    }

    /// Writes the record in place of the last one. It need not survive the machine: the tasks do
    /// not either.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let fresh = beside(path, "new");
        fs::write(&fresh, self.encode_to_vec())?;
        fs::rename(&fresh, path)
    }

    /// How far the container is. A stage of a later version is taken for the last.
    pub fn stage(&self) -> Stage {
        Stage::try_from(self.stage_number).unwrap_or(Stage::Thawing)
    }

    /// Notes that the container is at `stage`.
    pub fn enter(&mut self, stage: Stage) {
        self.stage_number = stage as i32;
    }

    /// Ends everything that works on the container, and the container: CRIU's script, CRIU, the
    /// runtime, every task. What CRIU mounted is unmounted then.
    ///
    /// `is_granted_by_mistake`: the grant was noted, and it is certain that CRIU's script never
    /// received it.
    pub fn end(&self, is_granted_by_mistake: bool) -> Ending {
        let stage = self.stage();
        let stage = match stage {
            Stage::Granted if is_granted_by_mistake => Stage::Held,
            stage => stage,
        };
        let stood_still = match (stage, &self.freezer) {
            (Stage::Held, _) => true,
            (Stage::Granted, Some(freezer)) => {
                self.criu_ended_by_itself() && (freezer.all_stopped() || freezer.is_frozen())
            }
            (Stage::Frozen, Some(freezer)) => freezer.is_frozen(),
            (Stage::Granted | Stage::Frozen, None) | (Stage::Thawing, _) => false,
        };
        if let Some(criu) = &self.criu {
            // The script first: CRIU then undoes the restore by itself.
            if criu.is_alive() {
                children_of(criu.pid).iter().for_each(Process::end);
            }
            criu.end();
        }
        if let Some(runtime) = &self.runtime {
            runtime.end();
        }
        let all_ended = self.freezer.as_ref().is_none_or(Freezer::kill);
        for directory in &self.mounts {
            // Errors show when the directory is removed, which does not reach through mounts.
            let _ = crate::leftovers::unmount_below(Path::new(directory));
        }
        if all_ended {
            // The runtime does so only if it got far enough to know them.
            let deadline = Instant::now() + GROUPS_GO_MAX;
            for group in &self.groups {
                remove_group(Path::new(group), 0, deadline);
            }
        }
        Ending { all_ended, never_ran: stood_still && all_ended }
    }

    /// Waits for CRIU's end and looks for its last words.
    fn criu_ended_by_itself(&self) -> bool {
        if let Some(criu) = self.criu.as_ref().and_then(Process::open)
            && !has_ended(&criu, CRIU_ENDS_MAX)
        {
            return false;
        }
        let end = tail(Path::new(&self.log)).unwrap_or_default();
        LAST_WORDS.iter().any(|words| end.contains(words))
    }
}

/// The id of a process inside its container.
fn inner_id(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_ascii_whitespace().last()?.parse().ok()
}

/// `core_entry` of CRIU's images/core.proto, as far as it is of use here.
#[derive(Clone, PartialEq, prost::Message)]
struct Core {
    #[prost(message, optional, tag = "3")]
    task: Option<CoreTask>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CoreTask {
    #[prost(uint32, optional, tag = "1")]
    state: Option<u32>,
}

/// Ids of the processes that a signal had stopped when they were dumped into `images`.
///
/// Errors: an image cannot be read, or breaks its format.
pub fn stopped_in(images: &Path) -> Result<BTreeSet<u32>, ImageError> {
    let wrong = |path: &Path| {
        let path = path.to_owned();
        move |source| ImageError::Io { doing: "read", path, source }
    };
    let mut stopped = BTreeSet::new();
    for entry in fs::read_dir(images).map_err(wrong(images))? {
        let path = entry.map_err(wrong(images))?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let id = name.strip_prefix("core-").and_then(|id| id.parse::<u32>().ok());
        let Some(id) = id else { continue };
        let bytes = fs::read(&path).map_err(wrong(&path))?;
        let broken = |offset, rule| ImageError::Malformed { name: name.clone(), offset, rule };
        let messages = image::messages(&bytes, Kind::Core, CORE_BYTES_MAX);
        for framed in messages.map_err(|error| broken(error.offset, error.rule))? {
            let framed = framed.map_err(|error| broken(error.offset, error.rule))?;
            let core = Core::decode(framed.message);
            let core = core.map_err(|_malformed| broken(framed.offset, "no core entry"))?;
            if core.task.and_then(|task| task.state) == Some(TASK_STOPPED) {
                stopped.insert(id);
            }
        }
    }
    Ok(stopped)
}

/// Ends the restore of the record at `path` if the shim that wrote it has died, and notes in the
/// record whether a task may have run. Returns the record, if there is one of a dead shim.
///
/// Several callers at a time are served one after the other, and all get the first one's result.
/// Errors: I/O.
pub fn end_orphan(path: &Path) -> io::Result<Option<Record>> {
    if !path.exists() {
        return Ok(None);
    }
    let lock = fs::File::create(beside(path, "lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let Some(mut record) = Record::load(path)? else { return Ok(None) };
    if record.shim.as_ref().is_some_and(Process::is_alive) {
        return Ok(None);
    }
    if record.may_have_run.is_none() {
        let ending = record.end(false);
        record.may_have_run = Some(!ending.never_ran);
        record.save(path)?;
    }
    Ok(Some(record))
}

/// A file of our own beside a record. No container's name ends like this: it would begin with a
/// dot.
fn beside(path: &Path, kind: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{kind}"))
}

/// Forgets the record at `path`: its restore was reported.
pub fn forget(path: &Path) {
    for path in [path.to_owned(), beside(path, "lock")] {
        let _ = fs::remove_file(path);
    }
}

/// Removes a control group and those below it. One that is in use stays.
fn remove_group(group: &Path, depth: usize, deadline: Instant) {
    if depth > DEPTH_MAX {
        return;
    }
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path(), depth + 1, deadline);
        }
    }
    // A killed process leaves its groups a moment after it has ended.
    while matches!(fs::remove_dir(group), Err(error) if error.raw_os_error() == Some(libc::EBUSY))
        && Instant::now() < deadline
    {
        std::thread::sleep(POLL);
    }
}

/// Children of all threads of a process, if the kernel tells.
fn children_of(pid: u32) -> Vec<Process> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists =
        threads.filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok());
    let parse = |list: String| {
        list.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<_>>()
    };
    lists.flat_map(parse).filter_map(|pid| Process::of(pid).ok()).collect()
}

fn tail(path: &Path) -> io::Result<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES_MAX)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn record(directory: &Path, stage: Stage) -> Record {
        let log = directory.join("restore.log").display().to_string();
        let freezer = Some(Freezer::new(directory, false));
        let mut record = Record { session: "s1".to_owned(), log, freezer, ..Default::default() };
        record.enter(stage);
        record
    }

    /// Method: plain files in place of the kernel's; the group is empty.
    #[test]
    fn each_stage_has_its_proof() {
        let directory = tempfile::tempdir().unwrap();
        let at = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        let never_ran = |stage, by_mistake| {
            let record = record(directory.path(), stage);
            record.end(by_mistake).never_ran
        };
        assert!(never_ran(Stage::Held, false));
        assert!(!never_ran(Stage::Granted, false), "CRIU said nothing");
        assert!(never_ran(Stage::Granted, true), "nothing was granted");
        at("restore.log", "(00.1) Error (criu/cr-restore.c:2324): Restoring FAILED.\n");
        assert!(never_ran(Stage::Granted, false));
        at("restore.log", "(00.1) Restore finished successfully. Tasks resumed.\n");
        assert!(never_ran(Stage::Granted, false));
        at("freezer.state", "FROZEN\n");
        assert!(never_ran(Stage::Frozen, false));
        assert!(!never_ran(Stage::Frozen, false), "it was thawed by the last end");
        for by_mistake in [false, true] {
            assert!(!never_ran(Stage::Thawing, by_mistake));
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_anything_else_is_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("default/c1");
        assert_eq!(Record::load(&path).unwrap(), None);
        let mut written = record(directory.path(), Stage::Frozen);
        written.shim = Some(Process::of(std::process::id()).unwrap());
        written.may_have_run = Some(false);
        written.save(&path).unwrap();
        assert_eq!(Record::load(&path).unwrap(), Some(written));
        fs::write(&path, b"\xff\xff").unwrap();
        assert!(Record::load(&path).is_err());
        let later = Record { stage_number: 9, ..Default::default() };
        assert_eq!(later.stage(), Stage::Thawing);
    }

    #[test]
    fn a_process_is_told_from_a_later_one_of_its_id() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of(child.id()).unwrap();
        assert_eq!(Process::parent_of(child.id()).unwrap().pid, std::process::id());
        assert!(process.is_alive());
        let other = Process { started: process.started + 1, ..process.clone() };
        assert!(!other.is_alive() && other.open().is_none());
        assert!(children_of(std::process::id()).contains(&process));
        process.end();
        assert!(!process.is_alive(), "a zombie has ended");
        child.wait().unwrap();
        assert!(process.open().is_none());
    }

    /// Method: the second caller finds no group any more that could prove anything.
    #[test]
    fn an_orphan_is_ended_once_and_its_outcome_is_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c1");
        assert_eq!(end_orphan(&path).unwrap(), None);
        fs::write(directory.path().join("freezer.state"), "FROZEN\n").unwrap();
        let mut left = record(directory.path(), Stage::Frozen);
        left.shim = Process::of(std::process::id()).ok();
        left.save(&path).unwrap();
        assert_eq!(end_orphan(&path).unwrap(), None, "its shim lives");
        left.shim = None;
        left.save(&path).unwrap();
        for _ in 0..2 {
            let ended = end_orphan(&path).unwrap().unwrap();
            assert_eq!((ended.session.as_str(), ended.may_have_run), ("s1", Some(false)));
        }
        forget(&path);
        assert_eq!(end_orphan(&path).unwrap(), None);
    }

    /// Method: what protobuf makes of `{mtype: 1, tc: {task_state: N, exit_code: 0}}`.
    #[test]
    fn stopped_processes_are_known_from_the_images() {
        let directory = tempfile::tempdir().unwrap();
        let at = |pid: u32, state: u8| {
            let mut bytes = image::empty(Kind::Core);
            image::push(&mut bytes, &[8, 1, 26, 4, 8, state, 16, 0]);
            fs::write(directory.path().join(format!("core-{pid}.img")), bytes).unwrap();
        };
        at(1, 1);
        at(7, 3);
        fs::write(directory.path().join("core-x.img"), "").unwrap();
        assert_eq!(stopped_in(directory.path()).unwrap(), BTreeSet::from([7]));
        fs::write(directory.path().join("core-8.img"), "damaged").unwrap();
        assert!(stopped_in(directory.path()).is_err());
    }

    #[test]
    fn our_own_group_is_never_killed() {
        let directory = tempfile::tempdir().unwrap();
        let own = std::process::id().to_string();
        fs::write(directory.path().join("cgroup.procs"), own).unwrap();
        assert!(!Freezer::new(directory.path(), true).kill());
    }
}
