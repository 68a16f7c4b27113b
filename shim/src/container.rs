//! One container: its init process, the processes added to it, and the runtime that holds it.
//!
//! Two locks order what happens to it:
//!
//! - `operation` admits one operation at a time that changes the container (start, pause, resume,
//!   dump, update, delete). State, Wait and Kill never take it, so they answer during a long dump.
//! - `gate` orders the init's events. A create or a start holds it, beside others, until its event
//!   is queued; the init's exit takes it alone.
//!
//! An exit follows its start, however early it comes: an added process is watched only once its
//! start event is queued, and the init's exit takes the gate. The init's exit comes last. It first
//! marks the container as ended: this refuses new starts, and breaks off those under way by killing
//! the runtime. What it waits for after that is bounded by [`END_TIME_MAX`], so that a runtime that
//! hangs cannot hold back the news of an exit.
//!
//! Read next: [`crate::launch`] for create, start and restore, [`crate::exec`] for added processes,
//! [`crate::dump`] for checkpoints.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim::asynchronous::io::Stdio;
use containerd_shim::protos::api::Mount;
use containerd_shim::protos::events::task::{
    TaskDelete, TaskExit, TaskOOM, TaskPaused, TaskResumed,
};
use containerd_shim::protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim::protos::shim::oci::Options;
use godwit_protos::{ContainerRef, Digest, MigrateFrom};
use nix::sys::signal::Signal;
use tokio::sync::watch;

use crate::cgroup::Cgroup;
use crate::criu::Settings;
use crate::error::TaskError;
use crate::freeze;
use crate::process::{Phase, Process};
use crate::publisher::Publisher;
use crate::reap::{Exit, Reaper, Waiter};
use crate::rootfs;
use crate::runc::{Launch, Runc};
use crate::stdio::{ConsoleSocket, Owner, Unasked};
use crate::volumes::{self, VolumeError};

/// How long the init's exit waits for starts under way, and again for the other processes' ends;
/// how long a delete waits for the init's exit.
const END_TIME_MAX: Duration = Duration::from_secs(10);
/// Exit status of what was killed before it ran.
const KILLED: u32 = 137;

/// What all containers of a shim share.
pub(crate) struct Shared {
    pub(crate) namespace: String,
    pub(crate) reaper: Arc<Reaper>,
    pub(crate) publisher: Publisher,
}

/// Where a container's processes come from.
#[derive(Debug)]
pub(crate) enum Origin {
    /// The image: an ordinary start.
    Fresh,
    /// A CRIU image directory that containerd names.
    Image { image_path: PathBuf, work_path: PathBuf },
    /// Another node.
    Migrate(MigrateFrom),
    /// A cut that this node has.
    Restore(Digest),
}

/// A process added by exec.
pub(crate) struct Exec {
    pub(crate) process: Arc<Process>,
    pub(crate) spec: Vec<u8>,
    /// Held while it is started or deleted.
    pub(crate) operation: tokio::sync::Mutex<()>,
}

/// See the module comment.
pub(crate) struct Container {
    pub(crate) name: ContainerRef,
    pub(crate) bundle: PathBuf,
    pub(crate) options: Options,
    pub(crate) runc: Runc,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) origin: Origin,
    pub(crate) own_pid_namespace: bool,
    /// The user's own CRIU configuration file.
    pub(crate) user_criu_config: Option<PathBuf>,
    pub(crate) criu_settings: Settings,
    pub(crate) init: Arc<Process>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) operation: tokio::sync::Mutex<()>,
    pub(crate) gate: tokio::sync::RwLock<()>,
    /// Becomes true when the init process has ended, before its exit is reported.
    pub(crate) init_ended: watch::Sender<bool>,
    /// Held while a process stops and its exit is queued, so that exits are queued in their order.
    exits: Mutex<()>,
    /// Becomes true when a start that is under way is no longer wanted.
    pub(crate) cancelled: watch::Sender<bool>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    /// Control groups of the init process, noted while it was alive.
    cgroup: OnceLock<Cgroup>,
    /// Processes killed for lack of memory that were reported.
    oom_kills: AtomicU64,
    /// Processes that a signal had stopped when the container was frozen. Once it is, all look
    /// alike.
    stopped_when_frozen: Mutex<Vec<u32>>,
    /// Paths of what its processes watch that CRIU has to be told, as they were before the freeze.
    pub(crate) watched: Mutex<Vec<PathBuf>>,
    /// Frozen for a migration: only the daemon lets it run on.
    pub(crate) frozen_for_migration: AtomicBool,
    /// CRIU has dumped it since it was frozen, which interrupts system calls.
    pub(crate) is_disturbed: AtomicBool,
}

/// What a new container is made of.
pub(crate) struct Parts {
    pub(crate) name: ContainerRef,
    pub(crate) bundle: PathBuf,
    pub(crate) options: Options,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) origin: Origin,
    pub(crate) own_pid_namespace: bool,
    pub(crate) user_criu_config: Option<PathBuf>,
    pub(crate) criu_settings: Settings,
    pub(crate) stdio: Stdio,
}

impl Container {
    pub(crate) fn new(parts: Parts, shared: Arc<Shared>) -> Self {
        let reaper = Arc::clone(&shared.reaper);
        let id = parts.name.id();
        let runc = Runc::new(&parts.options, &shared.namespace, id, &parts.bundle, reaper);
        Self {
            runc,
            name: parts.name,
            bundle: parts.bundle,
            options: parts.options,
            rootfs: parts.rootfs,
            origin: parts.origin,
            own_pid_namespace: parts.own_pid_namespace,
            user_criu_config: parts.user_criu_config,
            criu_settings: parts.criu_settings,
            init: Arc::new(Process::new("", parts.stdio)),
            shared,
            operation: tokio::sync::Mutex::default(),
            gate: tokio::sync::RwLock::default(),
            init_ended: watch::channel(false).0,
            exits: Mutex::default(),
            cancelled: watch::channel(false).0,
            execs: Mutex::default(),
            cgroup: OnceLock::new(),
            oom_kills: AtomicU64::new(0),
            stopped_when_frozen: Mutex::default(),
            watched: Mutex::default(),
            frozen_for_migration: AtomicBool::new(false),
            is_disturbed: AtomicBool::new(false),
        }
    }

    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<String, Arc<Exec>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Error for an operation that the container's phase does not allow.
    pub(crate) fn phase_error(&self, wanted: &'static str) -> TaskError {
        let is = self.init.phase().name();
        TaskError::Phase { container: self.name.to_string(), is, wanted }
    }

    pub(crate) fn owner(&self) -> Owner<'_> {
        Owner {
            namespace: &self.shared.namespace,
            id: self.name.id(),
            options: &self.options,
            reaper: &self.shared.reaper,
        }
    }

    /// The init process, or the one added as `exec_id`.
    pub(crate) fn process(&self, exec_id: &str) -> Result<Arc<Process>, TaskError> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        self.exec(exec_id).map(|exec| Arc::clone(&exec.process))
    }

    pub(crate) fn exec(&self, exec_id: &str) -> Result<Arc<Exec>, TaskError> {
        let missing =
            || TaskError::NoExec { container: self.name.to_string(), exec: exec_id.to_owned() };
        self.execs().get(exec_id).cloned().ok_or_else(missing)
    }

    /// Phase of a process of this container: whatever freezes the container freezes all of them.
    pub(crate) fn phase_of(&self, process: &Process) -> Phase {
        match (self.init.phase(), process.phase()) {
            (Phase::Paused, Phase::Running) => Phase::Paused,
            (_, phase) => phase,
        }
    }

    /// Id of the added process with this pid.
    pub(crate) fn exec_id_of(&self, pid: u32) -> Option<String> {
        let execs = self.execs();
        execs.iter().find(|(_, exec)| exec.process.pid() == pid).map(|(id, _)| id.clone())
    }

    /// Ids of the added processes that run.
    pub(crate) fn running_execs(&self) -> Vec<String> {
        let execs = self.execs();
        let running = execs.iter().filter(|(_, exec)| exec.process.phase() == Phase::Running);
        running.map(|(id, _)| id.clone()).collect()
    }

    /// Its control groups. Errors: it has none, for lack of a living init process.
    pub(crate) fn cgroup(&self) -> Result<Cgroup, TaskError> {
        if let Some(cgroup) = self.cgroup.get() {
            return Ok(cgroup.clone());
        }
        match self.init.pid() {
            0 => Err(self.phase_error("it has no process yet")),
            pid => {
                Cgroup::of(pid).map_err(TaskError::io(format!("control groups of {}", self.name)))
            }
        }
    }

    /// Notes the control groups of a process that has just been started.
    pub(crate) fn note_cgroup(&self) {
        if let Ok(cgroup) = Cgroup::of(self.init.pid()) {
            let _ = self.cgroup.set(cgroup);
        }
    }

    /// Reports kills for lack of memory, of which the kernel keeps a count per group. Looked at
    /// when a process ends, so that the report comes before that end's, and when [`crate::oom`]
    /// hears of one. Returns whether there was any.
    pub(crate) fn report_oom(&self) -> bool {
        let kills = self.cgroup.get().map_or(0, Cgroup::oom_kills);
        let is_new = self.oom_kills.fetch_max(kills, Ordering::Relaxed) < kills;
        if is_new {
            let container_id = self.name.id().to_owned();
            self.shared.publisher.publish(TaskOOM { container_id, ..Default::default() });
        }
        is_new
    }

    /// Reports the end of `process` when `waiter` says so, after everything that must come before
    /// it.
    pub(crate) fn report_exit(self: &Arc<Self>, process: Arc<Process>, waiter: Waiter) {
        let container = Arc::clone(self);
        tokio::spawn(async move {
            let Ok(exit) = waiter.await else { return };
            let is_init = process.exec_id.is_empty();
            let _gate = if is_init { container.settle_others().await } else { None };
            container.note_exit(&process, exit);
        });
    }

    fn note_exit(&self, process: &Process, exit: Exit) {
        let _order = self.exits.lock().unwrap_or_else(PoisonError::into_inner);
        self.report_oom();
        process.stop(exit);
        let is_init = process.exec_id.is_empty();
        self.shared.publisher.publish(TaskExit {
            container_id: self.name.id().to_owned(),
            id: if is_init { self.name.id().to_owned() } else { process.exec_id.clone() },
            pid: process.pid(),
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
    }

    /// Sees to it, for a bounded time, that no start is under way and no other process is left.
    async fn settle_others(&self) -> Option<tokio::sync::RwLockWriteGuard<'_, ()>> {
        self.init_ended.send_replace(true);
        let gate = tokio::time::timeout(END_TIME_MAX, self.gate.write()).await.ok();
        if tokio::time::timeout(END_TIME_MAX, self.end_others()).await.is_err() {
            tracing::warn!("added processes of {} outlive its init process", self.name);
        }
        gate
    }

    /// Ends what outlives the init process, and waits for the ends of added processes.
    async fn end_others(&self) {
        if !self.own_pid_namespace
            && let Err(error) = self.runc.kill(Signal::SIGKILL as u32, true).await
            && !error.is_gone()
        {
            tracing::warn!("ending the processes of {}: {error}", self.name);
        }
        let execs: Vec<_> = self.execs().values().map(|exec| Arc::clone(&exec.process)).collect();
        for process in execs.iter().filter(|process| process.phase() == Phase::Running) {
            process.stopped().await;
        }
    }

    /// Sets up a process's streams around the runtime command that starts it.
    pub(crate) async fn wire(
        &self,
        process: &Process,
        unasked: Unasked,
        pid_file: &std::path::Path,
        command: impl AsyncFnOnce(Launch<'_>) -> Result<(), crate::runc::RuncError>,
    ) -> Result<(), TaskError> {
        let (wiring, stdio) = (process.wiring(), &process.stdio);
        if stdio.terminal {
            let console = ConsoleSocket::bind(&self.bundle, &process.exec_id)?;
            let streams = crate::runc::Streams::default();
            command(Launch { pid_file, console_socket: Some(console.name()), streams }).await?;
            wiring.attach_terminal(stdio, console, &self.owner()).await?;
        } else {
            let (streams, pending) = wiring.pipes(stdio, unasked, &self.owner()).await?;
            command(Launch { pid_file, console_socket: None, streams }).await?;
            // Not before: what a runtime prints when it fails is not the container's output.
            wiring.attach(stdio, pending)?;
        }
        Ok(())
    }

    /// Signals a process, or with `all` every process of the container.
    ///
    /// Errors: [`TaskError::Finished`] when it has ended.
    pub(crate) async fn kill(
        &self,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let process = self.process(exec_id)?;
        let number = i32::try_from(signal).ok().filter(|number| *number <= libc::SIGRTMAX());
        let number =
            number.ok_or_else(|| TaskError::Invalid(format!("{signal} is not a signal")))?;
        let has_none = process.pid() == 0 && process.phase() == Phase::Created;
        if !exec_id.is_empty() {
            if has_none {
                return Err(self.phase_error("the added process was not started yet"));
            }
            let sent = self.shared.reaper.signal_number(process.pid(), number);
            return sent.map_err(|_gone| TaskError::Finished);
        }
        if has_none {
            if signal != Signal::SIGKILL as u32 && signal != Signal::SIGTERM as u32 {
                return Err(self.phase_error("it has no process yet"));
            }
            return self.cancel().await;
        }
        if matches!(process.phase(), Phase::Stopped(_)) {
            return Err(TaskError::Finished);
        }
        self.runc.kill(signal, all).await?;
        if signal == Signal::SIGKILL as u32 && process.phase() == Phase::Paused {
            // In a frozen group of version 1 even this signal waits.
            self.cgroup()?.thaw().map_err(TaskError::io("thawing the killed container"))?;
        }
        Ok(())
    }

    /// Ends a container that waits to be restored; a start under way is broken off where that is
    /// safe.
    async fn cancel(&self) -> Result<(), TaskError> {
        self.cancelled.send_replace(true);
        let _operation = self.operation.lock().await;
        if self.init.pid() != 0 {
            // The restore was past the point where it can be broken off.
            return Ok(self.runc.kill(Signal::SIGKILL as u32, true).await?);
        }
        let _gate = self.gate.write().await;
        if self.init.phase() == Phase::Created {
            self.note_exit(&self.init, Exit { code: KILLED, at: SystemTime::now() });
        }
        Ok(())
    }

    /// Does something about the block volumes, of which there may be none.
    pub(crate) async fn on_volumes(
        &self,
        act: fn(&Path) -> Result<(), VolumeError>,
    ) -> Result<(), TaskError> {
        let directory = volumes::directory(&self.name);
        if !directory.exists() {
            return Ok(());
        }
        Ok(volumes::blocking(move || act(&directory)).await?)
    }

    /// Freezes every process. Errors: the container does not run.
    pub(crate) async fn pause(&self) -> Result<(), TaskError> {
        let _operation = self.operation.lock().await;
        self.pause_locked().await.map(drop)
    }

    /// [`Container::pause`] for a caller that holds the operation. Returns whether CRIU can dump
    /// the container now.
    pub(crate) async fn pause_locked(&self) -> Result<bool, TaskError> {
        if self.init.phase() != Phase::Running {
            return Err(self.phase_error("a running container can be paused only"));
        }
        let stopped = self.cgroup()?.stopped_processes();
        *self.stopped_when_frozen.lock().unwrap_or_else(PoisonError::into_inner) = stopped;
        let can_be_dumped = freeze::freeze(&self.runc, &self.cgroup()?).await?;
        self.init.enter(Phase::Paused);
        let container_id = self.name.id().to_owned();
        self.shared.publisher.publish(TaskPaused { container_id, ..Default::default() });
        Ok(can_be_dumped)
    }

    /// Undoes [`Container::pause`]. Errors: the container is not paused.
    pub(crate) async fn resume(&self) -> Result<(), TaskError> {
        let _operation = self.operation.lock().await;
        if self.init.phase() != Phase::Paused {
            return Err(self.phase_error("a paused container can be resumed only"));
        }
        if self.frozen_for_migration.load(Ordering::SeqCst) {
            return Err(self.phase_error("a migration froze it, and another node may run it"));
        }
        self.runc.resume().await?;
        self.note_resumed();
        Ok(())
    }

    /// Processes that a signal stopped, now or before the container was frozen.
    pub(crate) fn stopped_processes(&self, cgroup: &Cgroup) -> Vec<u32> {
        let mut stopped = cgroup.stopped_processes();
        if self.init.phase() == Phase::Paused {
            let noted = self.stopped_when_frozen.lock().unwrap_or_else(PoisonError::into_inner);
            stopped.extend(noted.iter());
        }
        stopped.sort_unstable();
        stopped.dedup();
        stopped
    }

    /// Notes that the processes run again.
    pub(crate) fn note_resumed(&self) {
        self.init.enter(Phase::Running);
        let container_id = self.name.id().to_owned();
        self.shared.publisher.publish(TaskResumed { container_id, ..Default::default() });
    }

    /// Sets resource limits from the OCI specification's JSON.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<(), TaskError> {
        let _operation = self.operation.lock().await;
        Ok(self.runc.update(resources).await?)
    }

    /// Removes a container that does not run: what the runtime holds, its mounts, its streams.
    ///
    /// Errors: it still runs; the runtime's; a mount that cannot be undone. It can be called again
    /// then.
    pub(crate) async fn delete(&self) -> Result<(u32, Exit), TaskError> {
        let _operation = self.operation.lock().await;
        let phase = self.init.phase();
        if matches!(phase, Phase::Running | Phase::Paused) {
            return Err(self.phase_error("task must be stopped before deletion"));
        }
        if self.init.pid() != 0 {
            match self.runc.delete(phase == Phase::Created).await {
                Err(error) if !error.is_gone() => return Err(error.into()),
                _ => {}
            }
            if tokio::time::timeout(END_TIME_MAX, self.init.stopped()).await.is_err() {
                tracing::warn!("no exit of {} was seen", self.name);
            }
        }
        self.init.wiring().shutdown(&self.shared.reaper).await;
        let leftovers: Vec<_> = self.execs().drain().map(|(_, exec)| exec).collect();
        for exec in leftovers {
            exec.process.wiring().abort(&self.shared.reaper).await;
            exec.process.stop(never_ran());
        }
        self.init.stop(never_ran());
        if !self.rootfs.is_empty() {
            rootfs::unmount(&self.bundle.join("rootfs"))?;
        }
        self.on_volumes(volumes::release).await?;
        let exit = self.init.exit().unwrap_or(never_ran());
        self.shared.publisher.publish(TaskDelete {
            container_id: self.name.id().to_owned(),
            pid: self.init.pid(),
            exit_status: exit.code,
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        });
        Ok((self.init.pid(), exit))
    }
}

/// The end of what never began.
pub(crate) fn never_ran() -> Exit {
    Exit { code: 0, at: SystemTime::now() }
}

/// Reads a file with a pid.
pub(crate) fn read_pid(path: &std::path::Path) -> Result<u32, TaskError> {
    let text = std::fs::read_to_string(path).map_err(TaskError::io(path.display().to_string()))?;
    let wrong = |_| TaskError::Invalid(format!("{} holds no pid", path.display()));
    text.trim().parse().map_err(wrong)
}

/// A moment in protobuf's form.
pub(crate) fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: since.subsec_nanos().cast_signed(),
        ..Default::default()
    }
}
