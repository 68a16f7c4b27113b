//! Holding a restored container before its first instruction.
//!
//! CRIU calls an action script at every stage of a restore, each stage twice here. At `pre-restore`
//! no task exists yet, and the shim lifts the container's limits ([`crate::limits`]). At
//! `post-restore` every task is complete and none has run; a script that fails there makes CRIU
//! undo everything. So the script is where ownership moves:
//!
//! ```text
//! criu --post-restore--> shim's own binary --connects--> socket in the bundle <--serves-- shim
//!                        waits for one byte              asks the daemon for the claim
//! ```
//!
//! CRIU runs a program by path, without arguments; which bundle is meant stands in
//! [`BUNDLE_VARIABLE`], inherited through the runtime. The path is the shim's `/proc/PID/exe`:
//! always the shim's own version, also when its file was replaced, and on no file system that
//! forbids execution, as /run may.
//!
//! 0. At `pre-restore` the script says [`PREPARING`] and waits for the answer.
//! 1. CRIU calls the script; it connects and says [`HELD`], and the init process's id.
//! 2. The first connection tells the shim, which sets again what CRIU's images lack
//!    ([`criu_wrapper::supplement`]) and then obtains the verdict.
//! 3. It answers this and every later connection with the same byte.
//! 4. [`GO`] lets the script succeed; anything else, a closed socket and silence included, makes it
//!    fail.
//! 5. At `pre-resume` the script says [`RESUMING`] and waits for the answer: from then on the shim
//!    can no longer vouch that no task ran, should the restore fail yet.
//!
//! On the way the script brings up the loopback interface, which CRIU and runc leave down in a
//! network namespace that they made: the tasks would find no way to 127.0.0.1. It does so before
//! CRIU makes the sockets. One that is bound to 127.0.0.1 while the namespace has no table of local
//! addresses keeps no source address (`__inet_dev_addr_type` in net/ipv4/fib_frontend.c), and
//! cannot send to a multicast group.
//!
//! So the tasks run only after an explicit grant, whichever process dies meanwhile.

use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};

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
/// What the script says before the tasks are let run.
const RESUMING: u8 = b'R';
/// Verdicts.
const GO: u8 = b'G';
const ABORT: u8 = b'A';
/// How long the script waits for a verdict; longer than the shim ever takes to reach one.
const VERDICT_TIME_MAX: Duration = Duration::from_secs(180);
/// How long the script waits for the shim to take note of [`RESUMING`]; CRIU goes on in any case.
const NOTE_TIME_MAX: Duration = Duration::from_secs(5);
/// CRIU's name for the stage before it makes the first task.
const STAGE_PREPARING: &str = "pre-restore";
/// CRIU's name for the stage at which the namespaces exist and no socket does.
const STAGE_NAMESPACES: &str = "post-setup-namespaces";
/// CRIU's name for the stage at which the tasks are complete and none has run.
const STAGE_HELD: &str = "post-restore";
/// CRIU's name for the stage after which the tasks run, whatever the script says.
const STAGE_RESUMING: &str = "pre-resume";

/// The container's limits, once they are lifted.
type Lifted = Arc<Mutex<Option<Raised>>>;

/// The shim's side.
pub(crate) struct Hold {
    path: PathBuf,
    held: mpsc::Receiver<u32>,
    verdict: watch::Sender<Option<bool>>,
    resuming: Arc<AtomicBool>,
    limits: Lifted,
    server: tokio::task::JoinHandle<()>,
}

impl Hold {
    /// Listens in `bundle`. Errors: I/O.
    pub(crate) fn listen(bundle: &Path) -> std::io::Result<Self> {
        let listener = crate::stdio::bind_in(bundle, SOCKET_NAME)?;
        let (tell, held) = mpsc::channel(8);
        let (verdict, decided) = watch::channel(None);
        let resuming = Arc::new(AtomicBool::new(false));
        let limits = Lifted::default();
        let server = tokio::spawn(serve(listener, tell, decided, resuming.clone(), limits.clone()));
        Ok(Self { path: bundle.join(SOCKET_NAME), held, verdict, resuming, limits, server })
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
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map(act)
    }

    /// Lets the tasks run, or makes CRIU undo the restore. The first verdict stands.
    pub(crate) fn decide(&self, may_run: bool) {
        self.verdict.send_if_modified(|verdict| {
            let is_first = verdict.is_none();
            verdict.get_or_insert(may_run);
            is_first
        });
    }

    /// Whether a task may have executed an instruction.
    pub(crate) fn may_have_run(&self) -> bool {
        self.resuming.load(Ordering::SeqCst)
    }

    /// Whether the tasks were ever let run.
    pub(crate) fn was_granted(&self) -> bool {
        *self.verdict.borrow() == Some(true)
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
    resuming: Arc<AtomicBool>,
    limits: Lifted,
) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let (tell, mut decided) = (tell.clone(), decided.clone());
        let (resuming, limits) = (resuming.clone(), limits.clone());
        tokio::spawn(async move {
            let init = match stream.read_u8().await {
                Ok(HELD) => stream.read_u32_le().await,
                Ok(PREPARING) => {
                    lift(&limits, &stream);
                    let _ = stream.write_u8(GO).await;
                    return;
                }
                Ok(RESUMING) => {
                    resuming.store(true, Ordering::SeqCst);
                    let _ = stream.write_u8(GO).await;
                    return;
                }
                Ok(_) | Err(_) => return,
            };
            let Ok(init) = init else { return };
            let _ = tell.try_send(init);
            let may_run = match decided.wait_for(Option::is_some).await {
                Ok(verdict) => *verdict == Some(true),
                Err(_) => false,
            };
            let _ = stream.write_u8(if may_run { GO } else { ABORT }).await;
        });
    }
}

/// Lifts the limits of the container that the script at the other end belongs to, once.
fn lift(limits: &Lifted, script: &tokio::net::UnixStream) {
    let pid = script.peer_cred().ok().and_then(|peer| peer.pid());
    let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) else { return };
    let mut limits = limits.lock().unwrap_or_else(PoisonError::into_inner);
    if limits.is_none() {
        match Raised::raise(pid) {
            Ok(raised) => *limits = Some(raised),
            Err(error) => tracing::warn!("restoring within the container's limits: {error}"),
        }
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

    async fn ask_in(bundle: &Path, limit: Duration) -> std::io::Result<u8> {
        let bundle = bundle.to_owned();
        tokio::task::spawn_blocking(move || ask(&bundle, &held(INIT), limit)).await.unwrap()
    }

    /// Method: CRIU's two calls, one before and one after the verdict, and a verdict too late to
    /// count.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn both_calls_of_the_script_get_the_first_verdict() {
        for (may_run, byte) in [(true, GO), (false, ABORT)] {
            let dir = tempfile::tempdir().unwrap();
            let mut hold = Hold::listen(dir.path()).unwrap();
            let bundle = dir.path().to_owned();
            let first = tokio::spawn(async move { ask_in(&bundle, VERDICT_TIME_MAX).await });
            assert_eq!(hold.held().await, INIT);
            hold.decide(may_run);
            assert_eq!(first.await.unwrap().unwrap(), byte);
            hold.decide(!may_run);
            assert_eq!(ask_in(dir.path(), VERDICT_TIME_MAX).await.unwrap(), byte);
            assert_eq!(hold.was_granted(), may_run);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_may_have_run_is_noted_before_it_runs() {
        let dir = tempfile::tempdir().unwrap();
        let hold = Hold::listen(dir.path()).unwrap();
        assert!(!hold.may_have_run());
        let bundle = dir.path().to_owned();
        let noted =
            tokio::task::spawn_blocking(move || ask(&bundle, &[RESUMING], NOTE_TIME_MAX)).await;
        assert_eq!(noted.unwrap().unwrap(), GO);
        assert!(hold.may_have_run());
    }

    /// Method: the script is in the test's own group, whose limits must not be touched.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_restore_goes_on_if_no_limits_can_be_lifted() {
        let dir = tempfile::tempdir().unwrap();
        let hold = Hold::listen(dir.path()).unwrap();
        let bundle = dir.path().to_owned();
        let asked =
            tokio::task::spawn_blocking(move || ask(&bundle, &[PREPARING], NOTE_TIME_MAX)).await;
        assert_eq!(asked.unwrap().unwrap(), GO);
        assert!(hold.with_limits(|_| ()).is_none());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn silence_a_dead_shim_and_no_shim_are_refusals() {
        let dir = tempfile::tempdir().unwrap();
        assert!(ask_in(dir.path(), SHORT).await.is_err(), "no shim listens");
        let hold = Hold::listen(dir.path()).unwrap();
        assert!(ask_in(dir.path(), SHORT).await.is_err(), "no verdict in time");
        let bundle = dir.path().to_owned();
        let waiting = tokio::spawn(async move { ask_in(&bundle, VERDICT_TIME_MAX).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(hold);
        assert!(matches!(waiting.await.unwrap(), Ok(ABORT) | Err(_)), "the shim went away");
    }
}
