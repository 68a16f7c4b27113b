//! Dumping a container with CRIU, for containerd's Checkpoint and for a migration, and what goes
//! with the latter: freezing, thawing, and letting go of a container that runs elsewhere.
//!
//! A dump must not hang a node. A process held by SIGSTOP makes CRIU wait for ever when the freezer
//! of version 1 holds it too, so such processes are looked for first; and a watchdog thaws the
//! container when a dump takes longer than it can, on which CRIU fails and the container runs on.

use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use containerd_shim::protos::events::task::TaskCheckpointed;
use containerd_shim::protos::shim::oci::CheckpointOptions;
use criu_wrapper::supplement::{self, SupplementError};
use criu_wrapper::watches;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::criu::{self, Connections};
use crate::error::{TaskError, chain};
use crate::launch::Purpose;
use crate::leftovers;
use crate::packing::Packing;
use crate::process::Phase;
use crate::rerun;
use crate::runc::RuncError;
use crate::volumes;

/// How long a dump may take before the watchdog thaws the container ...
const DUMP_TIME_MAX: Duration = Duration::from_secs(120);
/// ... and how much longer for each GiB of memory.
const DUMP_TIME_MAX_PER_GIB: Duration = Duration::from_secs(10);
/// How long a dump may take to fail once thawed, before the runtime is killed.
const BREAK_OFF_TIME_MAX: Duration = Duration::from_secs(15);
/// How long the processes of a container that was let go of may take to end.
const END_TIME_MAX: Duration = Duration::from_secs(30);

/// What a dump is to do.
struct Dump<'a> {
    image_path: &'a Path,
    work_path: &'a Path,
    connections: Connections,
    purpose: Purpose<'a>,
    flags: Vec<&'a str>,
    packing: Packing,
    /// After which it is broken off, if that is earlier than [`dump_limit`].
    limit: Option<Duration>,
}

impl Container {
    /// containerd's Checkpoint: dumps into `image_path`, and ends the container if `options` say
    /// so.
    ///
    /// Errors: the container does not run; [`TaskError::InVfork`]; [`TaskError::Dump`] with CRIU's
    /// reason.
    pub(crate) async fn checkpoint(
        &self,
        image_path: &Path,
        options: &CheckpointOptions,
    ) -> Result<(), TaskError> {
        let _operation = self.operation.lock().await;
        if !matches!(self.init.phase(), Phase::Running | Phase::Paused) {
            return Err(self.phase_error("a running or paused container can be dumped only"));
        }
        self.check_runtime()?;
        if self.init.phase() == Phase::Paused && self.cgroup()?.waits_in_vfork() {
            return Err(TaskError::InVfork { container: self.name.to_string() });
        }
        let work_path = match options.work_path.as_str() {
            "" => self.bundle.join("work"),
            path => PathBuf::from(path),
        };
        std::fs::create_dir_all(&work_path).map_err(TaskError::io("CRIU's work directory"))?;
        let mut flags: Vec<&str> = Vec::new();
        for (wanted, flag) in [
            (!options.exit, "--leave-running"),
            (options.open_tcp, "--tcp-established"),
            (options.external_unix_sockets, "--ext-unix-sk"),
            (options.terminal, "--shell-job"),
            (options.file_locks, "--file-locks"),
        ] {
            flags.extend(wanted.then_some(flag));
        }
        flags.extend(options.empty_namespaces.iter().flat_map(|kind| ["--empty-ns", kind]));
        if !options.cgroups_mode.is_empty() {
            flags.extend(["--manage-cgroups-mode", &options.cgroups_mode]);
        }
        let connections = if options.open_tcp { Connections::Keep } else { Connections::Refuse };
        let execs = self.running_execs().join(", ");
        self.note_watched().await?;
        let (work_path, purpose) = (work_path.as_path(), Purpose::Checkpoint);
        let packing = Packing::Compressed;
        let dump =
            Dump { image_path, work_path, connections, purpose, flags, packing, limit: None };
        self.dump_with(dump).await?;
        if !execs.is_empty() {
            // No children of the init process, so CRIU passes them over without a word.
            tracing::warn!(
                "{}: added processes are not part of the checkpoint: {execs}",
                self.name
            );
        }
        if options.open_tcp {
            criu::note_open_tcp(image_path).map_err(TaskError::io("checkpoint directory"))?;
        }
        self.shared.publisher.publish(TaskCheckpointed {
            container_id: self.name.id().to_owned(),
            checkpoint: image_path.display().to_string(),
            ..Default::default()
        });
        Ok(())
    }

    /// Dumps a frozen container for a migration; it stays frozen, also when the dump fails (but not
    /// when the watchdog had to thaw it).
    ///
    /// What CRIU leaves out is recorded beside its images ([`criu_wrapper::supplement`]).
    ///
    /// Errors: not frozen; [`TaskError::StoppedBySignal`], [`TaskError::Dump`],
    /// [`TaskError::DumpHung`], [`TaskError::Supplement`].
    pub(crate) async fn dump(
        &self,
        image_path: &Path,
        work_path: &Path,
        limit: Option<Duration>,
    ) -> Result<(), TaskError> {
        let _operation = self.operation.lock().await;
        if self.init.phase() != Phase::Paused {
            return Err(self.phase_error("a frozen container can be dumped for a migration only"));
        }
        let flags = vec!["--leave-running", "--file-locks"];
        // The restore closes them. CRIU does not even look at them then: one that is killed leaves
        // none in a mode that the program cannot use.
        let connections = Connections::Close;
        let ended = |error: tokio::task::JoinError| TaskError::io("supplement")(error.into());
        let (init, cpus) = (self.init.pid(), self.cgroup()?.processors());
        let record = move || supplement::record(init, &cpus);
        let mut supplement = tokio::task::spawn_blocking(record).await.map_err(ended)??;
        // Trees of files may be large, so these are read while CRIU works.
        let names = tokio::task::spawn_blocking(move || {
            supplement.add_names(init)?;
            Ok::<_, SupplementError>(supplement)
        });
        let (purpose, packing) = (Purpose::Departure, Packing::Plain);
        let dump = Dump { image_path, work_path, connections, purpose, flags, packing, limit };
        let dumped = self.dump_with(dump).await;
        let supplement = names.await.map_err(ended)?;
        dumped?;
        Ok(supplement?.save(image_path)?)
    }

    async fn dump_with(&self, dump: Dump<'_>) -> Result<(), TaskError> {
        let cgroup = self.cgroup()?;
        self.check_stopped(&cgroup)?;
        self.write_criu_config(dump.connections, dump.purpose).await?;
        // The log of an earlier attempt must not explain this one.
        let _ = std::fs::remove_file(dump.work_path.join("dump.log"));
        let limit = dump_limit(&cgroup).min(dump.limit.unwrap_or(Duration::MAX));
        let call = self.runc.checkpoint(
            dump.image_path,
            dump.work_path,
            (&dump.flags, dump.packing),
            limit + BREAK_OFF_TIME_MAX,
        );
        let mut call = std::pin::pin!(call);
        self.is_disturbed.store(true, Ordering::SeqCst);
        let outcome = tokio::select! {
            outcome = &mut call => {
                outcome.map_err(|error| self.dump_failed(dump.work_path, &error))
            }
            () = tokio::time::sleep(limit) => self.break_off(call, &cgroup, limit).await,
        };
        if outcome.is_err() {
            let processes = cgroup.processes();
            let (init, reaper) = (self.init.pid(), &self.shared.reaper);
            leftovers::after_dump(init, processes, reaper, &self.name).await;
        }
        outcome
    }

    /// Looks for the paths of watched files that CRIU has to be told of.
    async fn note_watched(&self) -> Result<(), TaskError> {
        let pids: Vec<u32> = self.cgroup()?.processes().into_iter().collect();
        let init = self.init.pid();
        let looking = tokio::task::spawn_blocking(move || watches::find(init, &pids).paths);
        let paths = looking
            .await
            .map_err(|error| TaskError::io("looking for watched files")(error.into()))?;
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = paths;
        Ok(())
    }

    /// Refuses an OCI runtime that cannot dump and restore as we need it.
    pub(crate) fn check_runtime(&self) -> Result<(), TaskError> {
        if self.runc.is_crun() {
            return Err(TaskError::NeedsRunc { container: self.name.to_string() });
        }
        Ok(())
    }

    /// Refuses processes that a signal stopped, where they would block the dump.
    fn check_stopped(&self, cgroup: &Cgroup) -> Result<(), TaskError> {
        let pids = self.stopped_processes(cgroup);
        if pids.is_empty() || matches!(cgroup, Cgroup::V2(_)) {
            return Ok(());
        }
        Err(TaskError::StoppedBySignal { container: self.name.to_string(), pids })
    }

    /// The watchdog: thaws, waits for CRIU to fail, and says that the container runs.
    async fn break_off(
        &self,
        call: impl Future<Output = Result<(), RuncError>>,
        cgroup: &Cgroup,
        limit: Duration,
    ) -> Result<(), TaskError> {
        tracing::error!("the dump of {} hangs: thawing the container", self.name);
        if let Err(error) = self.on_volumes(volumes::thaw).await {
            tracing::error!("thawing the volumes of {}: {}", self.name, chain(&error));
        }
        if let Err(error) = cgroup.thaw() {
            tracing::error!("thawing {}: {error}", self.name);
        }
        // Even a dump that succeeds now is not used: the container runs on without it.
        let _ = call.await;
        if self.init.phase() == Phase::Paused {
            self.note_resumed();
        }
        Err(TaskError::DumpHung { container: self.name.to_string(), limit })
    }

    fn dump_failed(&self, work_path: &Path, error: &RuncError) -> TaskError {
        let log = work_path.join("dump.log");
        let reason = criu::reason(&log, &chain(error));
        let log = self.keep_log(log, "dump");
        TaskError::Dump { container: self.name.to_string(), reason, log }
    }

    /// Stops every process where it is, and then has the block volumes' images be whole; a frozen
    /// container stays so. Returns how long it took.
    ///
    /// From here until [`Container::thaw`] only the daemon resumes it: another node may be about to
    /// run it. Errors: a user has paused it, and only a user may resume it; [`TaskError::InVfork`].
    pub(crate) async fn freeze(&self) -> Result<Duration, TaskError> {
        let _operation = self.operation.lock().await;
        self.check_runtime()?;
        // While it runs: what is written now need not be written while it stands still.
        self.on_volumes(volumes::flush).await?;
        self.note_watched().await?;
        let begun = Instant::now();
        let is_paused = self.init.phase() == Phase::Paused;
        if is_paused && !self.frozen_for_migration.load(Ordering::SeqCst) {
            // A thaw could not tell it from a container that ran before the freeze.
            return Err(self.phase_error("it was paused before the freeze; resume it first"));
        }
        if !is_paused {
            // What would block the dump costs no downtime when it is found here.
            self.check_stopped(&self.cgroup()?)?;
            self.is_disturbed.store(false, Ordering::SeqCst);
            self.frozen_for_migration.store(true, Ordering::SeqCst);
            match self.pause_locked().await {
                Ok(true) => {}
                Ok(false) => {
                    self.thaw_tasks()?;
                    return Err(TaskError::InVfork { container: self.name.to_string() });
                }
                Err(error) => {
                    self.frozen_for_migration.store(false, Ordering::SeqCst);
                    return Err(error);
                }
            }
        }
        if let Err(error) = self.on_volumes(volumes::freeze).await {
            self.thaw_tasks()?;
            return Err(error);
        }
        Ok(begun.elapsed())
    }

    /// Lets a frozen container run on; a running one does already, and one that a user has paused
    /// stays so.
    pub(crate) async fn thaw(&self) -> Result<Duration, TaskError> {
        let begun = Instant::now();
        let _operation = self.operation.lock().await;
        self.on_volumes(volumes::thaw).await?;
        if self.init.phase() == Phase::Paused && !self.frozen_for_migration.load(Ordering::SeqCst) {
            return Ok(begun.elapsed());
        }
        if self.is_disturbed.swap(false, Ordering::SeqCst) {
            rerun::thaw(&self.cgroup()?, &self.shared.reaper).await;
        }
        self.thaw_tasks()?;
        Ok(begun.elapsed())
    }

    fn thaw_tasks(&self) -> Result<(), TaskError> {
        // Whatever the phase says: a freeze that was broken off may have got half way.
        self.cgroup()?.thaw().map_err(TaskError::io("thawing the container"))?;
        self.frozen_for_migration.store(false, Ordering::SeqCst);
        if self.init.phase() == Phase::Paused {
            self.note_resumed();
        }
        Ok(())
    }

    /// Ends every process of a frozen container that runs elsewhere now. None of them runs another
    /// instruction: they are killed while frozen, and the thaw only lets them die.
    ///
    /// Errors: the container is not frozen; its processes do not end. A stopped container succeeds.
    pub(crate) async fn let_go(&self) -> Result<Duration, TaskError> {
        let begun = Instant::now();
        let _operation = self.operation.lock().await;
        match self.init.phase() {
            Phase::Stopped(_) => {
                self.on_volumes(volumes::release).await?;
                return Ok(begun.elapsed());
            }
            Phase::Paused => {}
            Phase::Created | Phase::Running => {
                return Err(self.phase_error("a frozen container can be let go of only"));
            }
        }
        let cgroup = self.cgroup()?;
        let pids = cgroup.processes();
        if pids.contains(&std::process::id()) {
            // Whatever runtime put it there: killing this group would kill more than the container.
            return Err(self.phase_error("its control group is not its own"));
        }
        for pid in pids {
            match kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => {
                    return Err(TaskError::io(format!("killing process {pid}"))(errno.into()));
                }
            }
        }
        // A process whose files are frozen cannot end. What still reaches the images belongs to no
        // process.
        self.on_volumes(volumes::thaw).await?;
        cgroup.thaw().map_err(TaskError::io("thawing the killed container"))?;
        if tokio::time::timeout(END_TIME_MAX, self.init.stopped()).await.is_err() {
            return Err(self.phase_error("its processes do not end although they were killed"));
        }
        self.on_volumes(volumes::release).await?;
        Ok(begun.elapsed())
    }
}

/// The watchdog's limit, by the memory to be written.
fn dump_limit(cgroup: &Cgroup) -> Duration {
    let file = match cgroup {
        Cgroup::V1(_) => "memory.usage_in_bytes",
        Cgroup::V2(_) => "memory.current",
    };
    let text = cgroup.dir("memory").and_then(|dir| std::fs::read_to_string(dir.join(file)).ok());
    let bytes: u64 = text.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let gib = u32::try_from(bytes >> 30).unwrap_or(u32::MAX);
    DUMP_TIME_MAX + DUMP_TIME_MAX_PER_GIB.saturating_mul(gib)
}
