//! Holding a restored container before its first instruction.
//!
//! CRIU calls an action script at every stage of a restore, each stage twice here. The script is
//! the shim's own binary:
//!
//! ```text
//! criu --post-restore--> script --connects--> socket in the bundle <--serves-- shim
//!                        waits for one byte              asks the daemon for the claim
//! ```
//!
//! CRIU runs a program by path, without arguments; which bundle is meant stands in
//! [`BUNDLE_VARIABLE`], inherited through the runtime. The path is the shim's `/proc/PID/exe`:
//! always the shim's own version, also when its file was replaced, and on no file system that
//! forbids execution, as /run may.
//!
//! What happens, and the stage ([`criu_wrapper::held::Stage`]) that the shim has noted on disk by
//! then:
//!
//! 1. *Held.* At `pre-restore`, before CRIU makes a task, the script says [`PREPARING`]. The shim
//!    notes who works on the restore, and lifts the container's limits ([`crate::limits`]).
//! 2. At `post-restore` every task is complete and none has run. The script says [`HELD`] and the
//!    init process's id. The shim moves CRIU and the script out of the container's freezer, into
//!    which the runtime put them.
//! 3. The shim sets again what CRIU's images lack ([`criu_wrapper::supplement`]) and obtains the
//!    verdict. It answers this and every later connection with the same byte. Anything but [`GO`],
//!    a closed socket and silence included, makes the script fail, and CRIU undo the restore.
//! 4. *Granted*, noted before [`GO`] is sent. CRIU goes on to the point from which the tasks would
//!    run, and sends each SIGSTOP (`leave-stopped`).
//! 5. *Frozen.* At `pre-resume` the script says [`RESUMING`]. The shim freezes the tasks. CRIU,
//!    which lived while they became frozen, detaches from them and ends.
//! 6. *Thawing*, noted before [`Hold::thaw`] removes the SIGSTOP and thaws. This is the only step
//!    that lets a task run.
//!
//! Should the runtime die after 4, CRIU skips the script at `pre-resume`: the tasks are stopped
//! instead of frozen. Only a CRIU that dies between 4 and 5 may let tasks run. What can be said of
//! a restore that failed follows from the stage ([`criu_wrapper::held`] has the rules);
//! [`Hold::end`] ends it.
//!
//! On the way the script brings up the loopback interface, which CRIU and runc leave down in a
//! network namespace that they made: the tasks would find no way to 127.0.0.1. It does so before
//! CRIU makes the sockets. One that is bound to 127.0.0.1 while the namespace has no table of local
//! addresses keeps no source address (`__inet_dev_addr_type` in net/ipv4/fib_frontend.c), and
//! cannot send to a multicast group.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use criu_wrapper::held::{self, Ending, Freezer, Process, Record, Stage};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

use crate::cgroup::{self, Cgroup};
use crate::limits::Raised;

/// Environment of the runtime, and so of CRIU and of the script: the bundle with the socket.
pub(crate) const BUNDLE_VARIABLE: &str = "GODWIT_HOLD_BUNDLE";
/// How CRIU names the stage.
const STAGE_VARIABLE: &str = "CRTOOLS_SCRIPT_ACTION";
/// How CRIU names the pid of the restored init process.
const INIT_VARIABLE: &str = "CRTOOLS_INIT_PID";
/// Name of the socket in the bundle.
const SOCKET_NAME: &str = "hold.sock";
/// What the script says before CRIU makes the first task.
const PREPARING: u8 = b'P';
/// What the script says once every task is complete, followed by the init process's id in 4
/// little-endian bytes.
const HELD: u8 = b'H';
/// What the script says before CRIU detaches from the tasks.
const RESUMING: u8 = b'R';
/// Verdicts.
const GO: u8 = b'G';
const ABORT: u8 = b'A';
/// How long the script waits for a verdict; longer than the shim ever takes to reach one.
const VERDICT_TIME_MAX: Duration = Duration::from_secs(180);
/// How long the script waits for the shim to do its part of the other stages. Longer than a freeze
/// may take.
const NOTE_TIME_MAX: Duration = Duration::from_secs(8);
/// CRIU's name for the stage before it makes the first task.
const STAGE_PREPARING: &str = "pre-restore";
/// CRIU's name for the stage at which the namespaces exist and no socket does.
const STAGE_NAMESPACES: &str = "post-setup-namespaces";
/// CRIU's name for the stage at which the tasks are complete and none has run.
const STAGE_HELD: &str = "post-restore";
/// CRIU's name for the stage after which it detaches from the tasks, whatever the script says.
const STAGE_RESUMING: &str = "pre-resume";

/// What the shim and its side of the script's connections share.
struct Shared {
    /// Where the record is kept.
    place: PathBuf,
    record: Mutex<Record>,
    /// The container's limits, once they are lifted.
    limits: Mutex<Option<Raised>>,
    delivery: Mutex<Delivery>,
}

/// What became of the verdict.
#[derive(Default)]
struct Delivery {
    /// Scripts that [`GO`] was sent to and that may have received it.
    grants: usize,
    /// No script gets it any more.
    is_closed: bool,
}

impl Shared {
    fn delivery(&self) -> MutexGuard<'_, Delivery> {
        self.delivery.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self) -> MutexGuard<'_, Record> {
        // A record is changed by assignments only, none of which panics half way.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a stage on disk, and then here. Errors: I/O, and the stage is as before.
    fn enter(&self, stage: Stage) -> io::Result<()> {
        let mut record = self.record();
        if record.stage() >= stage {
            return Ok(());
        }
        let mut next = record.clone();
        next.enter(stage);
        next.save(&self.place)?;
        *record = next;
        Ok(())
    }

    /// Notes who works on the restore, and lifts the limits, once. `script` is a child of CRIU.
    fn prepare(&self, script: u32) {
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if limits.is_none() {
            match Raised::raise(script) {
                Ok(raised) => *limits = Some(raised),
                Err(error) => tracing::warn!("restoring within the container's limits: {error}"),
            }
        }
        drop(limits);
        if let Err(error) = self.note_workers(script) {
            // Held without a freezer is refused.
            tracing::warn!("the restore cannot be followed: {error}");
        }
    }

    fn note_workers(&self, script: u32) -> io::Result<()> {
        let missing = || io::Error::other("the container has no freezer of its own");
        let freezer = Cgroup::of(script)?.freezer().ok_or_else(missing)?;
        let ours = Cgroup::of(std::process::id())?.freezer().ok_or_else(missing)?;
        if ours.directory().starts_with(freezer.directory()) {
            return Err(missing());
        }
        let criu = Process::parent_of(script)?;
        let runtime = Process::parent_of(criu.pid)?;
        let mut record = self.record();
        record.freezer = Some(freezer);
        record.groups = cgroup::groups_apart(script)?;
        record.runtime = (runtime.pid != std::process::id() && runtime.pid > 1).then_some(runtime);
        record.criu = Some(criu);
        record.save(&self.place)
    }

    /// Moves the script and CRIU to the shim's own freezer: otherwise they would freeze with the
    /// tasks, and those could not be ended without thawing them.
    fn part(&self, script: u32) -> io::Result<()> {
        let criu = self.record().criu.as_ref().map(|criu| criu.pid);
        let missing = || io::Error::other("CRIU or its freezer is not known");
        let ours = Cgroup::of(std::process::id())?.freezer().ok_or_else(missing)?;
        for pid in [criu.ok_or_else(missing)?, script] {
            ours.admit(pid)?;
        }
        Ok(())
    }

    /// Freezes the tasks from which CRIU is about to detach. Errors: they may be stopped only.
    fn freeze(&self) -> io::Result<()> {
        let record = self.record().clone();
        if record.stage() >= Stage::Frozen {
            return Ok(());
        }
        let (Some(freezer), Some(criu)) = (record.freezer, record.criu) else {
            return Err(io::Error::other("the container's freezer is not known"));
        };
        freezer.freeze()?;
        if !criu.is_alive() {
            // It may have died before the tasks were frozen.
            return Err(io::Error::other("CRIU died meanwhile"));
        }
        self.enter(Stage::Frozen)
    }

    /// See [`Hold::thaw`].
    fn thaw(&self, stopped: &BTreeSet<u32>) -> io::Result<()> {
        let freezer = self.record().freezer.clone();
        let missing = || io::Error::other("the container's freezer is not known");
        let freezer = freezer.ok_or_else(missing)?;
        if !freezer.is_frozen() {
            // CRIU has skipped `pre-resume`: they are stopped.
            freezer.freeze()?;
        }
        self.enter(Stage::Thawing)?;
        freezer.resume(stopped)
    }
}

/// The shim's side.
pub(crate) struct Hold {
    path: PathBuf,
    held: mpsc::Receiver<u32>,
    verdict: watch::Sender<Option<bool>>,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

impl Hold {
    /// Listens in `bundle` and notes at `place` what is about to be restored. Errors: I/O.
    pub(crate) fn listen(bundle: &Path, place: PathBuf, record: Record) -> io::Result<Self> {
        record.save(&place)?;
        let listener = crate::stdio::bind_in(bundle, SOCKET_NAME)?;
        let (tell, held) = mpsc::channel(8);
        let (verdict, decided) = watch::channel(None);
        let shared = Arc::new(Shared {
            place,
            record: Mutex::new(record),
            limits: Mutex::default(),
            delivery: Mutex::default(),
        });
        let server = tokio::spawn(serve(listener, tell, decided, Arc::clone(&shared)));
        Ok(Self { path: bundle.join(SOCKET_NAME), held, verdict, shared, server })
    }

    /// The program that CRIU is to run.
    pub(crate) fn script() -> String {
        format!("/proc/{}/exe", std::process::id())
    }

    /// Resolves to the init process's id once every task is restored and held. Cancel-safe.
    pub(crate) async fn held(&mut self) -> u32 {
        match self.held.recv().await {
            Some(init) => init,
            // No script will connect any more: the restore's own end decides.
            None => std::future::pending().await,
        }
    }

    /// Calls `act` with the lifted limits, if CRIU got so far.
    pub(crate) fn with_limits<T>(&self, act: impl FnOnce(&mut Raised) -> T) -> Option<T> {
        self.shared.limits.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
    }

    /// Lets CRIU go on, or makes it undo the restore. The first verdict stands.
    ///
    /// Errors: a grant cannot be noted, and becomes a refusal.
    pub(crate) fn decide(&self, may_run: bool) -> io::Result<()> {
        let noted = if may_run { self.shared.enter(Stage::Granted) } else { Ok(()) };
        self.verdict.send_if_modified(|verdict| {
            let is_first = verdict.is_none();
            verdict.get_or_insert(may_run && noted.is_ok());
            is_first
        });
        noted
    }

    /// Whether CRIU was let go on.
    pub(crate) fn was_granted(&self) -> bool {
        *self.verdict.borrow() == Some(true)
    }

    /// Whether CRIU works on the restore.
    pub(crate) fn has_criu(&self) -> bool {
        self.shared.record().criu.as_ref().is_some_and(Process::is_alive)
    }

    /// Notes the group of tasks that CRIU restored without ever calling the script.
    pub(crate) fn note_group(&self, freezer: Option<Freezer>) {
        let mut record = self.shared.record();
        record.freezer = record.freezer.take().or(freezer);
    }

    /// Lets the tasks run. `stopped` are the processes (ids inside the container) that were stopped
    /// when they were dumped.
    ///
    /// Errors: I/O. [`Hold::end`] tells whether a task may have run.
    pub(crate) async fn thaw(&self, stopped: BTreeSet<u32>) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let thaw = tokio::task::spawn_blocking(move || shared.thaw(&stopped));
        thaw.await.unwrap_or_else(|panic| Err(panic.into()))
    }

    /// Ends a restore that failed: its script, CRIU, the runtime and every task. Resolves when they
    /// have ended.
    pub(crate) async fn end(&self) -> Ending {
        self.server.abort();
        let shared = Arc::clone(&self.shared);
        let end = move || {
            let mut delivery = shared.delivery();
            delivery.is_closed = true;
            let was_never_sent = delivery.grants == 0;
            drop(delivery);
            let record = shared.record().clone();
            record.end(was_never_sent)
        };
        let ended = tokio::task::spawn_blocking(end).await;
        ended.unwrap_or(Ending { all_ended: false, never_ran: false })
    }

    /// Forgets the restore: it was reported.
    pub(crate) fn forget(&self) {
        held::forget(&self.shared.place);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.server.abort();
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn serve(
    listener: UnixListener,
    tell: mpsc::Sender<u32>,
    decided: watch::Receiver<Option<bool>>,
    shared: Arc<Shared>,
) {
    while let Ok((stream, _)) = listener.accept().await {
        tokio::spawn(answer(stream, tell.clone(), decided.clone(), Arc::clone(&shared)));
    }
}

/// Serves one call of the script.
async fn answer(
    mut stream: tokio::net::UnixStream,
    tell: mpsc::Sender<u32>,
    mut decided: watch::Receiver<Option<bool>>,
    shared: Arc<Shared>,
) {
    let script = stream.peer_cred().ok().and_then(|peer| peer.pid()?.try_into().ok());
    let (Ok(what), Some(script)) = (stream.read_u8().await, script) else { return };
    match what {
        PREPARING => {
            let prepare = tokio::task::spawn_blocking(move || shared.prepare(script));
            let _ = prepare.await;
            let _ = stream.write_u8(GO).await;
        }
        HELD => {
            let Ok(init) = stream.read_u32_le().await else { return };
            if let Err(error) = shared.part(script) {
                tracing::error!("the restored tasks cannot be held: {error}");
                let _ = stream.write_u8(ABORT).await;
                return;
            }
            let _ = tell.try_send(init);
            let may_run = match decided.wait_for(Option::is_some).await {
                Ok(verdict) => *verdict == Some(true),
                Err(_) => false,
            };
            pronounce(&mut stream, may_run, &shared).await;
        }
        RESUMING => {
            let freeze = tokio::task::spawn_blocking(move || shared.freeze()).await;
            match freeze {
                Ok(Ok(())) => drop(stream.write_u8(GO).await),
                Ok(Err(error)) => tracing::warn!("freezing the restored tasks: {error}"),
                Err(error) => tracing::warn!("freezing the restored tasks: {error}"),
            }
        }
        _ => {}
    }
}

/// Sends the verdict. A grant that cannot be delivered is none.
async fn pronounce(stream: &mut tokio::net::UnixStream, may_run: bool, shared: &Shared) {
    let is_granted = {
        let mut delivery = shared.delivery();
        let is_granted = may_run && !delivery.is_closed;
        // Before it is sent: `end` must not take a grant on its way for one that never left.
        delivery.grants += usize::from(is_granted);
        is_granted
    };
    let sent = stream.write_u8(if is_granted { GO } else { ABORT }).await;
    if is_granted && sent.is_err() {
        shared.delivery().grants -= 1;
    }
}

/// Whether this process is the script.
pub(crate) fn is_script() -> bool {
    std::env::var_os(STAGE_VARIABLE).is_some()
}

/// The script's side: it succeeds where the restore may go on.
pub(crate) fn script_main() -> ExitCode {
    let bundle = std::env::var_os(BUNDLE_VARIABLE);
    let init = std::env::var(INIT_VARIABLE).ok().and_then(|pid| pid.parse().ok());
    match std::env::var(STAGE_VARIABLE).as_deref() {
        Ok(STAGE_NAMESPACES) => {
            raise_loopback_of(init);
            return ExitCode::SUCCESS;
        }
        Ok(STAGE_HELD) => {}
        Ok(stage @ (STAGE_PREPARING | STAGE_RESUMING)) => {
            let note = if stage == STAGE_RESUMING { RESUMING } else { PREPARING };
            let noted = bundle.map(|bundle| ask(Path::new(&bundle), &[note], NOTE_TIME_MAX));
            return if matches!(noted, Some(Ok(GO))) {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            };
        }
        _ => return ExitCode::SUCCESS,
    }
    let Some(init) = init else {
        eprintln!("CRIU does not say in {INIT_VARIABLE} what it restored");
        return ExitCode::FAILURE;
    };
    // Should CRIU have taken it down with what it restored of the namespace.
    raise_loopback_of(Some(init));
    match bundle.map(|bundle| ask(Path::new(&bundle), &held(init), VERDICT_TIME_MAX)) {
        Some(Ok(GO)) => ExitCode::SUCCESS,
        Some(Ok(_) | Err(_)) | None => ExitCode::FAILURE,
    }
}

/// A container that needs no loopback interface runs without one.
fn raise_loopback_of(init: Option<u32>) {
    if let Some(Err(error)) = init.map(raise_loopback) {
        eprintln!("loopback interface of the restored container: {error}");
    }
}

/// Joins the network namespace of process `pid`; the script does nothing in its own afterwards.
fn raise_loopback(pid: u32) -> std::io::Result<()> {
    let namespace = std::fs::File::open(format!("/proc/{pid}/ns/net"))?;
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
    crate::sys::raise_loopback()
}

/// What the script says of the init process that is held.
fn held(init: u32) -> Vec<u8> {
    [&[HELD][..], &init.to_le_bytes()].concat()
}

fn ask(bundle: &Path, what: &[u8], limit: Duration) -> std::io::Result<u8> {
    let dir = std::fs::File::open(bundle)?;
    let mut stream =
        UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET_NAME}", dir.as_raw_fd()))?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(what)?;
    let mut verdict = [0];
    stream.read_exact(&mut verdict)?;
    Ok(verdict[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(300);
    const INIT: u32 = 4711;

    /// A hold whose CRIU and whose freezer are made up: this process, and a group of plain files.
    fn hold_in(directory: &Path) -> Hold {
        let place = directory.join("holds/c1");
        let hold = Hold::listen(directory, place, Record::default()).unwrap();
        hold.shared.record().criu = Process::of(std::process::id()).ok();
        hold.note_group(Some(Freezer::new(directory, false)));
        hold
    }

    async fn ask_in(bundle: &Path, what: &[u8], limit: Duration) -> io::Result<u8> {
        let (bundle, what) = (bundle.to_owned(), what.to_owned());
        tokio::task::spawn_blocking(move || ask(&bundle, &what, limit)).await.unwrap()
    }

    /// The stage that another process would find.
    fn noted(directory: &Path) -> Stage {
        Record::load(&directory.join("holds/c1")).unwrap().unwrap().stage()
    }

    /// Method: CRIU's two calls, one before and one after the verdict, and a verdict too late to
    /// count. "CRIU" is this process, which moves to where it is: needs root.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn both_calls_of_the_script_get_the_first_verdict() {
        if !nix::unistd::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "needs root");
            return;
        }
        for (may_run, byte) in [(true, GO), (false, ABORT)] {
            let dir = tempfile::tempdir().unwrap();
            let mut hold = hold_in(dir.path());
            let bundle = dir.path().to_owned();
            let asked = async move { ask_in(&bundle, &held(INIT), VERDICT_TIME_MAX).await };
            let first = tokio::spawn(asked);
            assert_eq!(hold.held().await, INIT);
            assert_eq!(noted(dir.path()), Stage::Held);
            hold.decide(may_run).unwrap();
            assert_eq!(noted(dir.path()), if may_run { Stage::Granted } else { Stage::Held });
            assert_eq!(first.await.unwrap().unwrap(), byte);
            hold.decide(!may_run).unwrap();
            assert_eq!(ask_in(dir.path(), &held(INIT), VERDICT_TIME_MAX).await.unwrap(), byte);
            assert_eq!(hold.was_granted(), may_run);
            assert_eq!(hold.shared.delivery().grants, if may_run { 2 } else { 0 });
        }
    }

    /// Method: a script that is killed while it waits.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_grant_that_no_script_received_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let hold = hold_in(dir.path());
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut stream = tokio::net::UnixStream::from_std(ours).unwrap();
        drop(theirs);
        pronounce(&mut stream, true, &hold.shared).await;
        assert_eq!(hold.shared.delivery().grants, 0);

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut stream = tokio::net::UnixStream::from_std(ours).unwrap();
        hold.shared.delivery().is_closed = true;
        pronounce(&mut stream, true, &hold.shared).await;
        let mut verdict = [0];
        theirs.read_exact(&mut verdict).unwrap();
        assert_eq!(verdict, [ABORT], "it was being ended");
        assert_eq!(hold.shared.delivery().grants, 0);
    }

    /// Method: a record that cannot be written, since a directory has its place.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_grant_that_cannot_be_noted_is_a_refusal() {
        let dir = tempfile::tempdir().unwrap();
        let hold = hold_in(dir.path());
        std::fs::create_dir(dir.path().join("holds/.c1.new")).unwrap();
        assert!(hold.decide(true).is_err());
        assert!(!hold.was_granted());
        assert_eq!(noted(dir.path()), Stage::Held);
    }

    /// Method: the script's note, with plain files in place of the kernel's.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tasks_are_frozen_before_criu_detaches_and_thawed_only_when_that_is_noted() {
        let dir = tempfile::tempdir().unwrap();
        let hold = hold_in(dir.path());
        hold.decide(true).unwrap();
        let resuming = || ask_in(dir.path(), &[RESUMING], NOTE_TIME_MAX);
        assert_eq!(resuming().await.unwrap(), GO);
        assert_eq!(noted(dir.path()), Stage::Frozen);
        let state = || std::fs::read_to_string(dir.path().join("freezer.state")).unwrap();
        assert_eq!(state(), "FROZEN");
        assert_eq!(resuming().await.unwrap(), GO, "CRIU calls twice");

        std::fs::create_dir(dir.path().join("holds/.c1.new")).unwrap();
        hold.thaw(BTreeSet::new()).await.unwrap_err();
        assert_eq!(state(), "FROZEN", "it was thawed without a note");
        std::fs::remove_dir(dir.path().join("holds/.c1.new")).unwrap();
        hold.thaw(BTreeSet::new()).await.unwrap();
        assert_eq!((state().as_str(), noted(dir.path())), ("THAWED", Stage::Thawing));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_criu_that_died_before_the_freeze_proves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let hold = hold_in(dir.path());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        hold.shared.record().criu = Process::of(child.id()).ok();
        child.wait().unwrap();
        hold.decide(true).unwrap();
        assert!(ask_in(dir.path(), &[RESUMING], NOTE_TIME_MAX).await.is_err());
        assert_eq!(noted(dir.path()), Stage::Granted);
    }

    /// Method: the script is in the test's own group, whose limits must not be touched.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_restore_goes_on_if_no_limits_can_be_lifted_but_is_not_held_in_our_own_group() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("holds/c1");
        let hold = Hold::listen(dir.path(), place, Record::default()).unwrap();
        assert_eq!(ask_in(dir.path(), &[PREPARING], NOTE_TIME_MAX).await.unwrap(), GO);
        assert!(hold.with_limits(|_| ()).is_none());
        assert_eq!(ask_in(dir.path(), &held(INIT), NOTE_TIME_MAX).await.unwrap(), ABORT);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn silence_a_dead_shim_and_no_shim_are_refusals() {
        let dir = tempfile::tempdir().unwrap();
        let asked = |limit| ask_in(dir.path(), &[HELD], limit);
        assert!(asked(SHORT).await.is_err(), "no shim listens");
        let hold = hold_in(dir.path());
        assert!(asked(SHORT).await.is_err(), "no verdict in time");
        let bundle = dir.path().to_owned();
        let waiting =
            tokio::spawn(async move { ask_in(&bundle, &held(INIT), VERDICT_TIME_MAX).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(hold);
        assert!(matches!(waiting.await.unwrap(), Ok(ABORT) | Err(_)), "the shim went away");
    }
}
