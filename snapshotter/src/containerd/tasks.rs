//! Tasks: what runs of a container.

use std::path::Path;

use containerd_client::services::v1 as api;
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::types::v1::Status as ApiStatus;
use tonic::transport::Channel;

use super::{Client, ClientError, Mount, optional, present};

/// A container's init process as containerd sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its pid in containerd's pid namespace; 0 if it has none yet.
    pub pid: u32,
    /// What it does.
    pub status: TaskStatus,
    /// Meaningful once it has stopped.
    pub exit_status: u32,
    /// Paths or URIs of its standard streams, empty where it has none.
    pub streams: [String; 3],
}

/// FIFOs of a terminal: what its programs read, and what they print.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Terminal {
    /// Path of the input.
    pub stdin: String,
    /// Path of the output.
    pub stdout: String,
}

/// What a task does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskStatus {
    /// The shim says something that this version does not know.
    Unknown,
    /// Created, not started; of a restore: not restored.
    Created,
    /// Running.
    Running,
    /// Its init process has ended.
    Stopped,
    /// Frozen.
    Paused,
    /// Being frozen.
    Pausing,
}

/// How a task ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The process' exit status, or 128 and the signal that killed it.
    pub status: u32,
}

impl From<ApiStatus> for TaskStatus {
    fn from(status: ApiStatus) -> Self {
        match status {
            ApiStatus::Unknown => Self::Unknown,
            ApiStatus::Created => Self::Created,
            ApiStatus::Running => Self::Running,
            ApiStatus::Stopped => Self::Stopped,
            ApiStatus::Paused => Self::Paused,
            ApiStatus::Pausing => Self::Pausing,
        }
    }
}

fn task_of(namespace: &str, id: &str) -> String {
    format!("task {namespace}/{id}")
}

impl Client {
    fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }

    /// The task of a container, if it has one.
    pub async fn task(&self, namespace: &str, id: &str) -> Result<Option<Task>, ClientError> {
        let message = api::GetRequest { container_id: id.to_owned(), exec_id: String::new() };
        let answer = self.tasks().get(self.request(namespace, message)?).await;
        let answer = answer.map_err(|status| self.failed("get", task_of(namespace, id), &status));
        let Some(answer) = optional(answer)? else { return Ok(None) };
        let process = present(answer.into_inner().process, || task_of(namespace, id))?;
        let status = process.status().into();
        let (pid, exit_status) = (process.pid, process.exit_status);
        let streams = [process.stdin, process.stdout, process.stderr];
        Ok(Some(Task { pid, status, exit_status, streams }))
    }

    /// Creates the task of a container over `rootfs`, on `terminal` or without standard streams;
    /// its pid comes back, or 0 when the runtime tells it only at the start, as for a restore.
    ///
    /// Errors: [`ClientError::AlreadyExists`]; [`ClientError::NotFound`] without the container.
    pub async fn create_task(
        &self,
        namespace: &str,
        id: &str,
        rootfs: Vec<Mount>,
        terminal: Option<Terminal>,
        runtime_path: Option<&Path>,
    ) -> Result<u32, ClientError> {
        let container_id = id.to_owned();
        let mut message = api::CreateTaskRequest { container_id, rootfs, ..Default::default() };
        if let Some(path) = runtime_path {
            message.runtime_path = path.to_string_lossy().into_owned();
        }
        if let Some(Terminal { stdin, stdout }) = terminal {
            (message.stdin, message.stdout, message.terminal) = (stdin, stdout, true);
        }
        let answer = self.tasks().create(self.work_request(namespace, message)?).await;
        let answer =
            answer.map_err(|status| self.failed("create", task_of(namespace, id), &status))?;
        Ok(answer.into_inner().pid)
    }

    /// Starts a created task, or restores it; its pid comes back. Errors:
    /// [`ClientError::NotFound`].
    pub async fn start_task(&self, namespace: &str, id: &str) -> Result<u32, ClientError> {
        let message = api::StartRequest { container_id: id.to_owned(), exec_id: String::new() };
        // A start with the migrate-from annotation takes as long as the migration.
        let answer = self.tasks().start(self.open_request(namespace, message)?).await;
        let answer =
            answer.map_err(|status| self.failed("start", task_of(namespace, id), &status))?;
        Ok(answer.into_inner().pid)
    }

    /// Sends `signal` to the init process, or to `all` processes. Errors:
    /// [`ClientError::NotFound`], also when the process has ended.
    pub async fn kill_task(
        &self,
        namespace: &str,
        id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), ClientError> {
        let (container_id, exec_id) = (id.to_owned(), String::new());
        let message = api::KillRequest { container_id, exec_id, signal, all };
        let answer = self.tasks().kill(self.request(namespace, message)?).await;
        answer.map(drop).map_err(|status| self.failed("kill", task_of(namespace, id), &status))
    }

    /// Waits until the task has ended, however long that takes. Errors: [`ClientError::NotFound`].
    pub async fn wait_task(&self, namespace: &str, id: &str) -> Result<Exit, ClientError> {
        let message = api::WaitRequest { container_id: id.to_owned(), exec_id: String::new() };
        let answer = self.tasks().wait(self.open_request(namespace, message)?).await;
        let answer =
            answer.map_err(|status| self.failed("wait for", task_of(namespace, id), &status))?;
        Ok(Exit { status: answer.into_inner().exit_status })
    }

    /// Deletes a task that has ended or was never started. Errors: [`ClientError::NotFound`];
    /// containerd's own "failed precondition" while it runs.
    pub async fn delete_task(&self, namespace: &str, id: &str) -> Result<Exit, ClientError> {
        let message = api::DeleteTaskRequest { container_id: id.to_owned() };
        let answer = self.tasks().delete(self.work_request(namespace, message)?).await;
        let answer =
            answer.map_err(|status| self.failed("delete", task_of(namespace, id), &status))?;
        Ok(Exit { status: answer.into_inner().exit_status })
    }

    /// Pids of all processes in the container, in containerd's pid namespace. Errors:
    /// [`ClientError::NotFound`].
    pub async fn pids(&self, namespace: &str, id: &str) -> Result<Vec<u32>, ClientError> {
        let message = api::ListPidsRequest { container_id: id.to_owned() };
        let answer = self.tasks().list_pids(self.request(namespace, message)?).await;
        let answer = answer
            .map_err(|status| self.failed("list pids of", task_of(namespace, id), &status))?;
        Ok(answer.into_inner().processes.into_iter().map(|process| process.pid).collect())
    }
}
