//! containerd's Task service: finds the container, calls it, answers. No decision is taken here,
//! apart from what a new container is made of.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::asynchronous::ExitSignal;
use containerd_shim::asynchronous::io::Stdio;
use containerd_shim::protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim::protos::events::task::{TaskCreate, TaskIO};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::shim::oci::{CheckpointOptions, Options, ProcessDetails};
use containerd_shim::protos::shim_async::Task;
use containerd_shim::util::convert_to_any;
use containerd_shim::{TtrpcContext, TtrpcResult};
use godwit_protos::{ContainerRef, annotation, path};

use crate::container::{Container, Origin, Parts, Shared, timestamp};
use crate::criu::{self, SettingError, Settings};
use crate::error::TaskError;
use crate::launch;
use crate::mptcp;
use crate::options;
use crate::process::Phase;
use crate::server::OPTIONS_FILE;
use crate::spec::{CRIU_CONFIG, Spec};
use crate::stats;

/// How long a shutdown waits for events that containerd has not taken yet.
const FLUSH_TIME_MAX: Duration = Duration::from_secs(2);
/// `CheckpointOptions` as containerd names it.
const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

enum Slot {
    /// Being created: the name is taken, and there is nothing to call yet.
    Reserved,
    Ready(Arc<Container>),
}

/// The containers of this shim.
pub(crate) struct Containers {
    slots: Mutex<HashMap<String, Slot>>,
    shared: Arc<Shared>,
}

impl Containers {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { slots: Mutex::default(), shared }
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Errors: [`TaskError::NoContainer`], also while it is being created.
    pub(crate) fn get(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match self.slots().get(id) {
            Some(Slot::Ready(container)) => Ok(Arc::clone(container)),
            Some(Slot::Reserved) | None => Err(TaskError::NoContainer(id.to_owned())),
        }
    }

    fn reserve(&self, id: &str) -> Result<(), TaskError> {
        let mut slots = self.slots();
        if slots.contains_key(id) {
            return Err(TaskError::Exists(format!("container {id}")));
        }
        slots.insert(id.to_owned(), Slot::Reserved);
        Ok(())
    }
}

/// See the module comment.
pub(crate) struct TaskService {
    pub(crate) containers: Arc<Containers>,
    pub(crate) exit: Arc<ExitSignal>,
    /// The address that this shim serves on.
    pub(crate) address: String,
}

impl TaskService {
    async fn create_container(
        &self,
        request: &CreateTaskRequest,
    ) -> Result<Arc<Container>, TaskError> {
        let shared = Arc::clone(&self.containers.shared);
        let name = ContainerRef::new(&shared.namespace, &request.id)?;
        launch::check_fence(launch::fences(), &name)?;
        let options = options::decode(request.options.as_ref())?;
        let bundle = PathBuf::from(&request.bundle);
        let mut spec = Spec::load(&bundle)?;
        let origin = origin_of(request, &options, &spec, &bundle)?;
        let user_criu_config = spec.annotation(CRIU_CONFIG).map(PathBuf::from);
        let criu_settings = Settings::of(spec.annotations())?;
        mptcp::is_unwanted(spec.annotations())?;
        if user_criu_config.is_some() && criu_settings != Settings::default() {
            return Err(SettingError::OwnFile.into());
        }

        let address_file = bundle.join(path::SHIM_ADDRESS_FILE);
        std::fs::write(address_file, &self.address).map_err(TaskError::io("address file"))?;
        let encoded = options.write_to_bytes().map_err(std::io::Error::other);
        let kept = encoded.and_then(|bytes| std::fs::write(bundle.join(OPTIONS_FILE), bytes));
        kept.map_err(TaskError::io("file of runtime options"))?;
        // The volumes of a migrated container arrive with its state.
        let mut changed = !matches!(origin, Origin::Migrate(_) | Origin::Restore(_))
            && launch::bind_volumes(&mut spec, &name).await?;
        if user_criu_config.is_none() {
            let config = bundle.join(criu::CONFIG_FILE);
            spec.annotate(CRIU_CONFIG, &config.display().to_string());
            // A client that drives the runtime past this shim finds a file there.
            let settings = criu_settings.clone();
            criu::Config { settings, ..Default::default() }.write(&bundle)?;
            changed = true;
        }
        if changed {
            spec.save()?;
        }
        let terminal = request.terminal;
        let stdio = Stdio::new(&request.stdin, &request.stdout, &request.stderr, terminal);
        let own_pid_namespace = spec.has_own_pid_namespace();
        let rootfs = request.rootfs.clone();
        let parts = Parts {
            name,
            bundle,
            options,
            rootfs,
            origin,
            own_pid_namespace,
            user_criu_config,
            criu_settings,
            stdio,
        };
        let container = Arc::new(Container::new(parts, shared));
        // A created container's exit must not become visible before its creation.
        let gate = container.gate.read().await;
        container.create().await?;
        container.shared.publisher.publish(TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: Some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal,
                ..Default::default()
            })
            .into(),
            checkpoint: request.checkpoint.clone(),
            pid: container.init.pid(),
            ..Default::default()
        });
        drop(gate);
        Ok(container)
    }
}

/// Where the processes of the requested container come from.
fn origin_of(
    request: &CreateTaskRequest,
    options: &Options,
    spec: &Spec,
    bundle: &Path,
) -> Result<Origin, TaskError> {
    // containerd's own restore wins: it names the directory in so many words.
    let image = [&request.checkpoint, &options.criu_image_path].into_iter().find(|p| !p.is_empty());
    if let Some(image_path) = image {
        let work_path = match options.criu_work_path.as_str() {
            "" => bundle.join("work"),
            path => path.into(),
        };
        return Ok(Origin::Image { image_path: image_path.into(), work_path });
    }
    let annotated = |key| spec.annotation(key);
    match (annotated(annotation::MIGRATE_FROM), annotated(annotation::RESTORE_FROM)) {
        (Some(from), None) => Ok(Origin::Migrate(from.parse()?)),
        (None, Some(cut)) => {
            let wrong =
                |error| TaskError::Invalid(format!("{}: {error}", annotation::RESTORE_FROM));
            Ok(Origin::Restore(cut.parse().map_err(wrong)?))
        }
        (None, None) => Ok(Origin::Fresh),
        (Some(_), Some(_)) => {
            let why = format!("{} and {}", annotation::MIGRATE_FROM, annotation::RESTORE_FROM);
            Err(TaskError::Invalid(format!("{why} exclude each other")))
        }
    }
}

/// What the shim reports of a process: with its id, if it was added under one.
fn process_info(container: &Container, pid: u32) -> containerd_shim::Result<ProcessInfo> {
    let details = container
        .exec_id_of(pid)
        .map(|exec_id| convert_to_any(Box::new(ProcessDetails { exec_id, ..Default::default() })));
    Ok(ProcessInfo { pid, info: details.transpose()?.into(), ..Default::default() })
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        r: CreateTaskRequest,
    ) -> TtrpcResult<CreateTaskResponse> {
        self.containers.reserve(&r.id)?;
        let created = self.create_container(&r).await;
        let mut slots = self.containers.slots();
        match created {
            Ok(container) => {
                let pid = container.init.pid();
                slots.insert(r.id, Slot::Ready(container));
                Ok(CreateTaskResponse { pid, ..Default::default() })
            }
            Err(error) => {
                slots.remove(&r.id);
                Err(error.into())
            }
        }
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> TtrpcResult<StartResponse> {
        let container = self.containers.get(&r.id)?;
        let pid = match r.exec_id.as_str() {
            "" => container.start().await?,
            exec_id => container.start_exec(exec_id).await?,
        };
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> TtrpcResult<StateResponse> {
        let container = self.containers.get(&r.id)?;
        let process = container.process(&r.exec_id)?;
        let mut response = StateResponse {
            id: if r.exec_id.is_empty() { r.id } else { r.exec_id.clone() },
            exec_id: r.exec_id,
            bundle: container.bundle.display().to_string(),
            pid: process.pid(),
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            ..Default::default()
        };
        response.set_status(container.phase_of(&process).status());
        if let Phase::Stopped(exit) = process.phase() {
            response.exit_status = exit.code;
            response.exited_at = Some(timestamp(exit.at)).into();
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> TtrpcResult<WaitResponse> {
        let exit = self.containers.get(&r.id)?.process(&r.exec_id)?.stopped().await;
        let exited_at = Some(timestamp(exit.at)).into();
        Ok(WaitResponse { exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> TtrpcResult<Empty> {
        self.containers.get(&r.id)?.kill(&r.exec_id, r.signal, r.all).await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> TtrpcResult<Empty> {
        let stdio = Stdio::new(&r.stdin, &r.stdout, &r.stderr, r.terminal);
        let spec = r.spec.into_option().map(|any| any.value).unwrap_or_default();
        self.containers.get(&r.id)?.add_exec(&r.exec_id, stdio, &spec)?;
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> TtrpcResult<PidsResponse> {
        let container = self.containers.get(&r.id)?;
        let init = container.init.pid();
        // Always with the init process, alive or not: after a restart containerd takes an empty
        // answer for a shim without a task, and removes it.
        let others = container.cgroup().map(|cgroup| cgroup.processes()).unwrap_or_default();
        let pids = std::iter::once(init).chain(others.into_iter().filter(|pid| *pid != init));
        let processes: Result<_, _> = pids.map(|pid| process_info(&container, pid)).collect();
        let processes = processes.map_err(|error| TaskError::Invalid(error.to_string()))?;
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> TtrpcResult<Empty> {
        self.containers.get(&r.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> TtrpcResult<Empty> {
        self.containers.get(&r.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: CheckpointTaskRequest) -> TtrpcResult<Empty> {
        let options = match r.options.as_ref() {
            Some(any) if any.type_url.rsplit('/').next() == Some(CHECKPOINT_OPTIONS) => {
                let decoded = CheckpointOptions::parse_from_bytes(&any.value);
                decoded
                    .map_err(|error| TaskError::Invalid(format!("checkpoint options: {error}")))?
            }
            // containerd sends none for most runtime names.
            Some(_) | None => CheckpointOptions::new(),
        };
        self.containers.get(&r.id)?.checkpoint(Path::new(&r.path), &options).await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> TtrpcResult<Empty> {
        let resources = r.resources.into_option().map(|any| any.value).unwrap_or_default();
        self.containers.get(&r.id)?.update(&resources).await?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> TtrpcResult<StatsResponse> {
        let cgroup = self.containers.get(&r.id)?.cgroup()?;
        let stats = stats::collect(&cgroup).map_err(TaskError::io("statistics"))?;
        Ok(StatsResponse { stats: Some(stats).into(), ..Default::default() })
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> TtrpcResult<Empty> {
        let process = self.containers.get(&r.id)?.process(&r.exec_id)?;
        let clamp = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        // Resizing before the start, or without a terminal, is nothing to fail for.
        match process.wiring().resize(clamp(r.width), clamp(r.height)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(TaskError::io("resizing the terminal")(error).into())
            }
            _ => Ok(Empty::new()),
        }
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> TtrpcResult<Empty> {
        let process = self.containers.get(&r.id)?.process(&r.exec_id)?;
        if r.stdin {
            process.wiring().close_input();
        }
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> TtrpcResult<DeleteResponse> {
        let container = self.containers.get(&r.id)?;
        let (pid, exit) = if r.exec_id.is_empty() {
            let deleted = container.delete().await?;
            self.containers.slots().remove(&r.id);
            deleted
        } else {
            container.delete_exec(&r.exec_id).await?
        };
        let exited_at = Some(timestamp(exit.at)).into();
        Ok(DeleteResponse { pid, exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, r: ConnectRequest) -> TtrpcResult<ConnectResponse> {
        let task_pid = self.containers.get(&r.id).map(|container| container.init.pid());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: task_pid.unwrap_or(0),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> TtrpcResult<Empty> {
        // Others of the pod may still live here.
        if self.containers.slots().is_empty() {
            self.containers.shared.publisher.flush(FLUSH_TIME_MAX).await;
            self.exit.signal();
        }
        Ok(Empty::new())
    }
}
