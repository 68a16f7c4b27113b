//! Starting a container whose state comes from another node, or from a cut of this one.
//!
//! 1. acquire (breaks off when cancelled; the daemon goes on)
//! 2. volumes, mounts
//! 3. restore; the claim while every task is held ([`crate::hold`])
//! 4. limits exact again, thaw: from here on the container has run
//! 5. settle: tell the daemon how it ended
//!
//! Whatever fails after 1 is reported to the daemon, and everything is undone: first CRIU, its
//! script, the runtime and the tasks are ended, then packet locks are lifted, CRIU's mounts undone,
//! and only then directories removed.
//!
//! The report says "never ran" only with proof ([`criu_wrapper::held`]). From the grant on the
//! default is that a task may have run: the source must not run the container again then.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criu_wrapper::held::{self, Process, Record, stopped_in};
use criu_wrapper::supplement::Supplement;
use godwit_protos::ContainerRef;
use godwit_protos::control::{AcquireRequest, AcquireResponse, SettleRequest};
use godwit_protos::path;

use crate::cgroup::Cgroup;
use crate::container::Container;
use crate::criu::Connections;
use crate::daemon::Daemon;
use crate::error::{TaskError, chain};
use crate::hold::Hold;
use crate::launch::{Purpose, upper_dir};
use crate::leftovers;
use crate::limits::Raised;
use crate::reap::{Reaper, Waiter};
use crate::rootfs;
use crate::spec::Spec;

/// What CRIU needs before the container's limits are lifted for it.
const CRIU_BYTES: u64 = 16 << 20;
/// Warnings about what CRIU's images lack that are logged of one restore.
const WARNINGS_MAX: usize = 16;

/// How long `delete` may take to report; containerd waits 5 s for all of it.
const REPORT_TIME_MAX: Duration = Duration::from_secs(2);

/// The init process, and its end.
type Restored = Result<(u32, Waiter), TaskError>;

/// Where it is noted how far a container is that is being restored.
pub(crate) fn record_of(name: &ContainerRef) -> PathBuf {
    Path::new(path::HOLDS).join(name.namespace()).join(name.id())
}

/// Ends the restore that a shim left behind when it died, and reports how it ended. Without one
/// this does nothing. What cannot be reported in time the daemon finds when it starts.
pub(crate) async fn end_orphan(name: &ContainerRef, reaper: &Arc<Reaper>) {
    let place = record_of(name);
    let path = place.clone();
    let ended = tokio::task::spawn_blocking(move || held::end_orphan(&path)).await;
    let record = match ended.unwrap_or_else(|panic| Err(panic.into())) {
        Ok(Some(record)) => record,
        Ok(None) => return,
        Err(error) => {
            eprintln!("ending the restore of {name}: {error}");
            return;
        }
    };
    if !record.network.is_empty() {
        leftovers::lift_locks(Path::new(&record.network), reaper, name).await;
    }
    let report = SettleRequest {
        session: record.session,
        reason: "its shim died while it was restored".to_owned(),
        may_have_run: record.may_have_run.unwrap_or(true),
        ..Default::default()
    };
    let telling = async { Daemon::connect(name).await.ok()?.settle(&report).await.then_some(()) };
    if let Ok(Some(())) = tokio::time::timeout(REPORT_TIME_MAX, telling).await {
        held::forget(&place);
    }
}

impl Container {
    /// Acquires the container's state and restores it, or starts it fresh if the annotation is
    /// spent. See the module comment.
    pub(crate) async fn start_acquired(
        self: &Arc<Self>,
        origin: AcquireRequest,
    ) -> Result<(), TaskError> {
        let mut daemon = Daemon::connect(&self.name).await?;
        let acquired = self.acquire(&daemon, origin).await?;
        if acquired.start_fresh {
            self.bind_late().await?;
            self.create_fresh().await?;
            return self.start_fresh().await;
        }
        let begun = Instant::now();
        let mut hold = None;
        let outcome = match self.prepare(&acquired).await {
            Ok(prepared) => {
                let hold = hold.insert(prepared);
                self.restore_and_thaw(hold, &mut daemon, &acquired).await
            }
            Err(error) => Err(error),
        };
        let elapsed_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        let mut report = SettleRequest { session: acquired.session.clone(), ..Default::default() };
        report.restore_us = elapsed_us;
        let outcome = match outcome {
            Ok((pid, waiter)) => {
                (report.running, report.init_pid) = (true, pid);
                self.note_restored(pid, waiter);
                Ok(())
            }
            Err(error) => {
                Err(self.undo_acquired(&acquired, hold.as_ref(), error, &mut report).await)
            }
        };
        // A record that stays is reported by the daemon when it starts.
        if daemon.settle(&report).await
            && let Some(hold) = hold
        {
            hold.forget();
        }
        outcome
    }

    /// Undoes what a failed start did. Returns the error with CRIU's reason, and completes the
    /// report.
    async fn undo_acquired(
        &self,
        acquired: &AcquireResponse,
        hold: Option<&Hold>,
        error: TaskError,
        report: &mut SettleRequest,
    ) -> TaskError {
        // Before it is looked for a reason: what may run must not.
        if let Some(hold) = hold {
            let ending = hold.end().await;
            report.may_have_run = !ending.never_ran;
            if !ending.all_ended {
                tracing::error!("some restored tasks of {} cannot be ended", self.name);
            }
        }
        let work_path = Path::new(&acquired.work_path);
        let error = match error {
            error @ (TaskError::NotGranted { .. }
            | TaskError::NoMemory { .. }
            | TaskError::Cancelled(_)) => {
                self.undo(work_path).await;
                error
            }
            error => self.restore_failed(work_path, &error).await,
        };
        self.lift_locks().await;
        self.unmount().await;
        report.reason = chain(&error);
        error
    }

    /// Lifts packet locks in the network namespace that the container joins.
    async fn lift_locks(&self) {
        let spec = Spec::load(&self.bundle);
        let Some(network) = spec.as_ref().ok().and_then(Spec::network) else { return };
        leftovers::lift_locks(network, &self.shared.reaper, &self.name).await;
    }

    async fn acquire(
        &self,
        daemon: &Daemon,
        origin: AcquireRequest,
    ) -> Result<AcquireResponse, TaskError> {
        let request = AcquireRequest {
            bundle: self.bundle.display().to_string(),
            rootfs_upper: upper_dir(self),
            volumes: Spec::load(&self.bundle)?.volumes()?,
            ..origin
        };
        let mut cancelled = self.cancelled.subscribe();
        tokio::select! {
            acquired = daemon.acquire(request) => {
                let acquired = acquired?;
                let paths = [&acquired.image_path, &acquired.work_path];
                if !acquired.start_fresh && paths.iter().any(|path| !path.starts_with('/')) {
                    let why = "the daemon names no directory to restore from".to_owned();
                    return Err(TaskError::Invalid(why));
                }
                Ok(acquired)
            }
            _ = cancelled.wait_for(|cancelled| *cancelled) => {
                Err(TaskError::Cancelled(self.name.to_string()))
            }
        }
    }

    async fn prepare(&self, acquired: &AcquireResponse) -> Result<Hold, TaskError> {
        self.bind_late().await?;
        // What an earlier restore left in a namespace with a name.
        self.lift_locks().await;
        rootfs::mount(&self.rootfs, &self.bundle).await?;
        let own = Process::of(std::process::id()).map_err(TaskError::io("this process"))?;
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let work_path = Path::new(&acquired.work_path);
        let network = Spec::load(&self.bundle)?.network().map(text).unwrap_or_default();
        let record = Record {
            session: acquired.session.clone(),
            shim: Some(own),
            log: text(&work_path.join("restore.log")),
            network,
            mounts: vec![text(&self.runc.state_dir()), text(work_path)],
            ..Default::default()
        };
        let hold = Hold::listen(&self.bundle, record_of(&self.name), record);
        let hold = hold.map_err(TaskError::io("socket for the hand-off"))?;
        let script = Hold::script();
        let purpose = Purpose::Arrival { script: &script };
        self.write_criu_config(Connections::Close, purpose).await?;
        std::fs::create_dir_all(work_path).map_err(TaskError::io("CRIU's work directory"))?;
        Ok(hold)
    }

    /// Restores, and lets the tasks run only with the daemon's grant.
    async fn restore_and_thaw(
        &self,
        hold: &mut Hold,
        daemon: &mut Daemon,
        acquired: &AcquireResponse,
    ) -> Restored {
        let images = PathBuf::from(&acquired.image_path);
        let stopped = tokio::task::spawn_blocking(move || stopped_in(&images)).await;
        let stopped = stopped.map_err(|error| TaskError::io("images")(error.into()))?;
        let stopped: BTreeSet<u32> = stopped.map_err(|error| {
            let reason = chain(&error);
            TaskError::Invalid(format!("the images of {} cannot be read: {reason}", self.name))
        })?;
        let (pid, waiter) = self.restore_held(hold, daemon, acquired).await?;
        if let Some(Err(error)) = hold.with_limits(Raised::put_back_exactly) {
            tracing::error!("{} runs above its limit: {error}", self.name);
        }
        hold.thaw(stopped).await.map_err(TaskError::io("thawing the restored tasks"))?;
        Ok((pid, waiter))
    }

    /// Restores up to frozen tasks, if the daemon grants that they run.
    async fn restore_held(
        &self,
        hold: &mut Hold,
        daemon: &mut Daemon,
        acquired: &AcquireResponse,
    ) -> Restored {
        let (image, work) = (Path::new(&acquired.image_path), Path::new(&acquired.work_path));
        let since = self.shared.reaper.mark();
        let restore = self.restore(image, work, since);
        let mut restore = std::pin::pin!(restore);
        let not_granted =
            |reason| Err(TaskError::NotGranted { container: self.name.to_string(), reason });
        let init = tokio::select! {
            restored = &mut restore => {
                let reason = |error| self.killed_for_memory(hold).unwrap_or(error);
                let (pid, _) = restored.map_err(reason)?;
                hold.note_group(Cgroup::of(pid).ok().and_then(|cgroup| cgroup.freezer()));
                return not_granted("CRIU did not hold the restored tasks".to_owned());
            }
            init = hold.held() => init,
        };
        if let Err(error) = self.apply_supplement(image, init).await {
            self.decide(hold, false);
            let _ = restore.await;
            return Err(error);
        }
        let refusal = match hold.with_limits(Raised::put_back) {
            // Before the claim: the source can still run it.
            Some(Err(error)) => Some(error.to_string()),
            Some(Ok(())) | None => {
                let mut claim = std::pin::pin!(daemon.claim(&acquired.session));
                tokio::select! {
                    biased;
                    claim = &mut claim => (!claim.may_run).then_some(claim.reason),
                    restored = &mut restore => {
                        self.decide(hold, false);
                        // The daemon must hear the claim before the report.
                        let _ = claim.await;
                        let error = restored.err().unwrap_or(TaskError::Finished);
                        return Err(self.killed_for_memory(hold).unwrap_or(error));
                    }
                }
            }
        };
        // From this byte on it is not known whether the container runs here, unless there is proof
        // that it does not.
        self.decide(hold, refusal.is_none() && hold.has_criu());
        let restored = restore.await;
        match (restored, refusal) {
            (_, Some(reason)) => not_granted(reason),
            (Ok(_), None) if !hold.was_granted() => {
                not_granted("CRIU could not be let go on".to_owned())
            }
            (Err(error), None) => Err(self.killed_for_memory(hold).unwrap_or(error)),
            (restored, None) => restored,
        }
    }

    fn decide(&self, hold: &Hold, may_run: bool) {
        if let Err(error) = hold.decide(may_run) {
            tracing::error!("the grant for {} cannot be noted: {error}", self.name);
        }
    }

    /// The error of a restore during which the kernel OOM-killed a task.
    fn killed_for_memory(&self, hold: &Hold) -> Option<TaskError> {
        let limit = Spec::load(&self.bundle).ok().and_then(|spec| spec.memory_limit());
        let reason = match (hold.with_limits(|limits| limits.oom_kills()), limit) {
            // CRIU did not get so far as to have the limits lifted.
            (None, Some(limit)) if limit < CRIU_BYTES => {
                format!("CRIU needs more than the container's memory limit of {limit} bytes")
            }
            (None | Some(0), _) => return None,
            (Some(_), _) => {
                "the kernel killed a task of it for lack of memory; its own limits were \
                             lifted, so a group above its own or this node has too little"
                    .to_owned()
            }
        };
        Some(TaskError::NoMemory { container: self.name.to_string(), reason })
    }

    /// Sets on the held tasks what CRIU's images lack. Errors: something that cannot be left out.
    async fn apply_supplement(&self, images: &Path, init: u32) -> Result<(), TaskError> {
        let images = images.to_owned();
        let apply = move || Supplement::load(&images)?.apply(init);
        let applied = tokio::task::spawn_blocking(apply).await;
        let warnings = applied.map_err(|error| TaskError::io("supplement")(error.into()))??;
        for warning in warnings.iter().take(WARNINGS_MAX) {
            tracing::warn!("{}: {warning}", self.name);
        }
        if let Some(beyond) = warnings.len().checked_sub(WARNINGS_MAX).filter(|count| *count > 0) {
            tracing::warn!("{}: and {beyond} more that CRIU's images lack", self.name);
        }
        Ok(())
    }
}
