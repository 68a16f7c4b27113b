//! From a request to a running container, by one of four ways ([`Origin`]).
//!
//! | | Create | Start |
//! |---|---|---|
//! | fresh | volumes, mount, `runc create` | `runc start` |
//! | image | volumes, mount | `runc restore` |
//! | migrate, from another node | nothing but checks | [`crate::handoff`] |
//! | restore, from a cut of this node | the same | the same |
//!
//! Restoring belongs to Start: containerd may fill the root file system between the two, and Create
//! must answer quickly. A start that fails leaves no process and, for a migration, no mount; the
//! container stays created, and can be started again or deleted.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use containerd_shim::protos::events::task::TaskStart;
use godwit_protos::control::{AcquireRequest, VolumeMount};
use godwit_protos::{ContainerRef, FileSystem, path};

use crate::container::{Container, Origin, read_pid};
use crate::criu::{self, Connections};
use crate::daemon::Daemon;
use crate::error::{TaskError, chain};
use crate::logs;
use crate::mptcp;
use crate::oom;
use crate::process::Phase;
use crate::reap::{Mark, Waiter};
use crate::rootfs;
use crate::spec::{CRIU_CONFIG, Spec};
use crate::stdio::Unasked;
use crate::volumes;

/// Deadline of a restore: a gigabyte takes about a second, the wait for the claim at most a minute.
const RESTORE_TIME_MAX: Duration = Duration::from_secs(900);
/// Longest text of a fence that is repeated to the user, in bytes.
const FENCE_BYTES_MAX: usize = 512;

/// What CRIU is to work for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose<'a> {
    /// containerd's Checkpoint, or a restore of its images.
    Checkpoint,
    /// The dump of a container that another node may run.
    Departure,
    /// The restore of a container whose right to run here is yet to be claimed; CRIU runs this
    /// script.
    Arrival { script: &'a str },
}

/// Refuses a container that was released to another node.
///
/// Errors: [`TaskError::Fenced`]; [`TaskError::Fence`] when that cannot be told.
pub(crate) fn check_fence(fences: &Path, name: &ContainerRef) -> Result<(), TaskError> {
    let path = fences.join(name.namespace()).join(name.id());
    let container = name.to_string();
    match std::fs::read(&path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(FENCE_BYTES_MAX)]);
            Err(TaskError::Fenced { container, text: text.trim().to_owned() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(TaskError::Fence { container, path, source }),
    }
}

/// Turns volume mounts into bind mounts, and mounts what block volumes hold; without any the daemon
/// is not asked.
///
/// Errors: none is mounted then.
pub(crate) async fn bind_volumes(spec: &mut Spec, name: &ContainerRef) -> Result<bool, TaskError> {
    let volumes = spec.volumes()?;
    if volumes.is_empty() {
        return Ok(false);
    }
    let directory = volumes::directory(name);
    let resolved = Daemon::connect(name).await?.resolve_volumes(volumes.clone()).await?;
    let mount = move || {
        // What lies there is of an earlier container of this name, whose shim and containerd died
        // together.
        volumes::release(&directory)?;
        let one = |(volume, (path, kind)): (&VolumeMount, (String, Option<FileSystem>))| match kind
        {
            None => Ok(path),
            Some(kind) => {
                let image = Path::new(&path);
                let mounted = volumes::mount_image(&directory, &volume.volume, image, kind)?;
                Ok(mounted.display().to_string())
            }
        };
        let paths: Result<Vec<String>, _> = volumes.iter().zip(resolved).map(one).collect();
        if paths.is_err() {
            volumes::release(&directory)?;
        }
        paths
    };
    spec.bind_volumes(&volumes::blocking(mount).await?)?;
    Ok(true)
}

/// Value of `upperdir=` among the root file system's mounts, empty when there is none.
pub(crate) fn upper_dir(container: &Container) -> String {
    let options = container.rootfs.iter().flat_map(|mount| &mount.options);
    let mut upper = options.filter_map(|option| option.strip_prefix("upperdir="));
    upper.next().unwrap_or_default().to_owned()
}

impl Container {
    /// The part of Create that the origin asks for.
    pub(crate) async fn create(self: &Arc<Self>) -> Result<(), TaskError> {
        if !matches!(self.origin, Origin::Fresh) {
            self.check_runtime()?;
        }
        match self.origin {
            Origin::Migrate(_) | Origin::Restore(_) => Ok(()),
            Origin::Image { .. } => Ok(rootfs::mount(&self.rootfs, &self.bundle).await?),
            Origin::Fresh => self.create_fresh().await,
        }
    }

    pub(crate) async fn create_fresh(self: &Arc<Self>) -> Result<(), TaskError> {
        rootfs::mount(&self.rootfs, &self.bundle).await?;
        let since = self.shared.reaper.mark();
        let pid_file = self.pid_file();
        let created = self
            .wire(&self.init, Unasked::Null, &pid_file, async |launch| {
                self.runc.create(launch).await
            })
            .await;
        match created.and_then(|()| read_pid(&pid_file)) {
            Ok(pid) => {
                self.init.set_pid(pid);
                self.choose_protocols(pid);
                let waiter = self.shared.reaper.watch(pid, since);
                self.report_exit(Arc::clone(&self.init), waiter);
                Ok(())
            }
            Err(error) => {
                self.undo(&self.bundle.join("work")).await;
                self.unmount().await;
                Err(error)
            }
        }
    }

    /// Starts the init process, or restores it. Returns its pid.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<u32, TaskError> {
        let _operation = self.operation.lock().await;
        let _gate = self.gate.read().await;
        if self.init.phase() != Phase::Created {
            return Err(self.phase_error("only a created container can be started"));
        }
        match &self.origin {
            Origin::Fresh => self.start_fresh().await?,
            Origin::Image { image_path, work_path } => {
                self.start_image(image_path, work_path).await?;
            }
            Origin::Migrate(from) => {
                let migrate_from = from.to_string();
                let origin = AcquireRequest { migrate_from, ..Default::default() };
                self.start_acquired(origin).await?;
            }
            Origin::Restore(cut) => {
                let restore_from = cut.to_string();
                let origin = AcquireRequest { restore_from, ..Default::default() };
                self.start_acquired(origin).await?;
            }
        }
        Ok(self.init.pid())
    }

    pub(crate) async fn start_fresh(self: &Arc<Self>) -> Result<(), TaskError> {
        self.runc.start().await?;
        self.note_started();
        Ok(())
    }

    /// The gate is held: an exit that happened already is reported after this.
    fn note_started(self: &Arc<Self>) {
        self.note_cgroup();
        oom::watch(self);
        self.init.enter(Phase::Running);
        self.shared.publisher.publish(TaskStart {
            container_id: self.name.id().to_owned(),
            pid: self.init.pid(),
            ..Default::default()
        });
    }

    pub(crate) fn note_restored(self: &Arc<Self>, pid: u32, waiter: Waiter) {
        self.init.set_pid(pid);
        self.note_started();
        self.report_exit(Arc::clone(&self.init), waiter);
    }

    async fn start_image(
        self: &Arc<Self>,
        image_path: &Path,
        work_path: &Path,
    ) -> Result<(), TaskError> {
        let keeps = criu::has_open_tcp(image_path);
        let connections = if keeps { Connections::Keep } else { Connections::Close };
        self.write_criu_config(connections, Purpose::Checkpoint).await?;
        std::fs::create_dir_all(work_path).map_err(TaskError::io("CRIU's work directory"))?;
        let since = self.shared.reaper.mark();
        match self.restore(image_path, work_path, since).await {
            Ok((pid, waiter)) => {
                self.note_restored(pid, waiter);
                Ok(())
            }
            Err(error) => Err(self.restore_failed(work_path, &error).await),
        }
    }

    pub(crate) async fn bind_late(&self) -> Result<(), TaskError> {
        let mut spec = Spec::load(&self.bundle)?;
        if bind_volumes(&mut spec, &self.name).await? {
            spec.save()?;
        }
        Ok(())
    }

    pub(crate) async fn restore(
        &self,
        image_path: &Path,
        work_path: &Path,
        since: Mark,
    ) -> Result<(u32, Waiter), TaskError> {
        // The log of an earlier attempt must not explain this one.
        let _ = std::fs::remove_file(work_path.join("restore.log"));
        let pid_file = self.pid_file();
        let command = async |launch: crate::runc::Launch<'_>| {
            self.runc.restore(image_path, work_path, launch, RESTORE_TIME_MAX).await
        };
        self.wire(&self.init, Unasked::Pipe, &pid_file, command).await?;
        let pid = read_pid(&pid_file)?;
        // What was listening listens on; this is for what begins to.
        self.choose_protocols(pid);
        Ok((pid, self.shared.reaper.watch(pid, since)))
    }

    /// Switches MPTCP off in the network namespace of the init process, if its container is to have
    /// none.
    fn choose_protocols(&self, pid: u32) {
        let spec = Spec::load(&self.bundle);
        let is_unwanted = spec.is_ok_and(|spec| mptcp::is_unwanted(spec.annotations()) == Ok(true));
        if is_unwanted && let Err(error) = mptcp::switch_off(pid) {
            tracing::warn!("{}: MPTCP stays on, so it may not move: {error}", self.name);
        }
    }

    /// Copies CRIU's log to where it outlives the attempt and its container. Returns where it is.
    pub(crate) fn keep_log(&self, log: PathBuf, what: &str) -> PathBuf {
        let name = format!("{}-{}.{what}.log", self.name.namespace(), self.name.id());
        logs::keep(&log, Path::new(path::LOGS), &name).unwrap_or(log)
    }

    /// Clears up after a failed restore and tells CRIU's reason for it.
    pub(crate) async fn restore_failed(&self, work_path: &Path, error: &TaskError) -> TaskError {
        let log = work_path.join("restore.log");
        let reason = match error {
            TaskError::Runc(_) => criu::reason(&log, &chain(error)),
            other => chain(other),
        };
        let log = self.keep_log(log, "restore");
        self.undo(work_path).await;
        TaskError::Restore { container: self.name.to_string(), reason, log }
    }

    /// Ends whatever a failed create or restore left: processes, mounts, runtime state, streams.
    pub(crate) async fn undo(&self, work_path: &Path) {
        // CRIU's mounts first: the runtime removes its state directory, and must not reach through
        // them.
        if let Err(error) = rootfs::unmount_leftovers(&self.runc.state_dir(), work_path) {
            tracing::error!("after a failed start of {}: {}", self.name, chain(&error));
        } else if let Err(error) = self.runc.delete(true).await
            && !error.is_gone()
        {
            tracing::warn!("after a failed start of {}: {error}", self.name);
        }
        self.init.rewire().abort(&self.shared.reaper).await;
    }

    pub(crate) async fn unmount(&self) {
        if !self.rootfs.is_empty()
            && let Err(error) = rootfs::unmount(&self.bundle.join("rootfs"))
        {
            tracing::error!("unmounting the root of {}: {}", self.name, chain(&error));
        }
        if let Err(error) = self.on_volumes(volumes::release).await {
            tracing::error!("unmounting the volumes of {}: {}", self.name, chain(&error));
        }
    }

    /// Writes the CRIU configuration for the dump or restore that follows. A user's own file is
    /// left to rule, except in a migration's restore, where its lines come first.
    pub(crate) async fn write_criu_config(
        &self,
        connections: Connections,
        purpose: Purpose<'_>,
    ) -> Result<(), TaskError> {
        let files_are_frozen = self.frozen_for_migration.load(Ordering::SeqCst)
            && !rootfs::mounts_below(&volumes::directory(&self.name))?.is_empty();
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let action_script = match purpose {
            Purpose::Arrival { script } => Some(script),
            Purpose::Checkpoint | Purpose::Departure => None,
        };
        let config = criu::Config {
            is_migration: purpose != Purpose::Checkpoint,
            settings: self.criu_settings.clone(),
            connections,
            action_script,
            watched,
            files_are_frozen,
            user_file: self.user_criu_config.as_deref(),
            version: criu::version(&self.shared.reaper).await,
        };
        config.write(&self.bundle)?;
        if action_script.is_some() && self.user_criu_config.is_some() {
            self.annotate_criu_config()?;
        }
        Ok(())
    }

    fn annotate_criu_config(&self) -> Result<(), TaskError> {
        let mut spec = Spec::load(&self.bundle)?;
        let path = self.bundle.join(criu::CONFIG_FILE);
        spec.annotate(CRIU_CONFIG, &path.display().to_string());
        Ok(spec.save()?)
    }

    fn pid_file(&self) -> PathBuf {
        self.bundle.join("init.pid")
    }
}

/// The directory of fences.
pub(crate) fn fences() -> &'static Path {
    Path::new(path::FENCES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fence_refuses_and_so_does_one_that_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let name = ContainerRef::new("default", "cache").unwrap();
        check_fence(dir.path(), &name).unwrap();
        check_fence(&dir.path().join("absent"), &name).unwrap();

        std::fs::create_dir(dir.path().join("default")).unwrap();
        std::fs::write(dir.path().join("default/cache"), "moved to edge-b, epoch 3\n").unwrap();
        let refused = check_fence(dir.path(), &name).unwrap_err().to_string();
        assert!(
            refused.starts_with("container default/cache moved to edge-b, epoch 3; "),
            "{refused}"
        );

        // A directory in the file's place stands for any read error.
        std::fs::create_dir(dir.path().join("default/other")).unwrap();
        let name = ContainerRef::new("default", "other").unwrap();
        assert!(matches!(check_fence(dir.path(), &name), Err(TaskError::Fence { .. })));
    }
}
