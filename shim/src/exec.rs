//! Processes added to a container by exec: added, started, removed.
//!
//! A start runs beside others and beside the container's end: [`crate::container`] says in which
//! order their events come.

use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim::asynchronous::io::Stdio;
use containerd_shim::protos::events::task::{TaskExecAdded, TaskExecStarted};
use godwit_protos::ContainerRef;
use nix::sys::signal::Signal;

use crate::container::{Container, Exec, never_ran, read_pid};
use crate::error::TaskError;
use crate::process::{Phase, Process};
use crate::reap::{Exit, Mark};
use crate::spec;
use crate::stdio::Unasked;
use crate::time_namespace::Inside;

/// Exit status of an added process that the runtime could not start: containerd's "unknown".
const NOT_STARTED: u32 = 255;

impl Container {
    /// Adds a process, to be started later.
    ///
    /// - `spec`: the OCI specification's process as JSON.
    /// - Errors: the id is taken or no name; no such specification; the container does not allow
    ///   it.
    pub(crate) fn add_exec(
        &self,
        exec_id: &str,
        stdio: Stdio,
        spec: &[u8],
    ) -> Result<(), TaskError> {
        // It becomes part of file names in the bundle.
        ContainerRef::new(&self.shared.namespace, exec_id)?;
        let spec = spec::process(spec, stdio.terminal)?;
        self.check_takes_execs()?;
        let mut execs = self.execs();
        if execs.contains_key(exec_id) {
            return Err(TaskError::Exists(format!("process {exec_id} of container {}", self.name)));
        }
        let process = Arc::new(Process::new(exec_id, stdio));
        let exec = Exec { process, spec, operation: tokio::sync::Mutex::default() };
        execs.insert(exec_id.to_owned(), Arc::new(exec));
        drop(execs);
        self.shared.publisher.publish(TaskExecAdded {
            container_id: self.name.id().to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        });
        Ok(())
    }

    /// A created container has its namespaces, and takes processes, unless it waits to be restored.
    fn check_takes_execs(&self) -> Result<(), TaskError> {
        if *self.init_ended.borrow() {
            return Err(self.phase_error("its init process has ended"));
        }
        match self.init.phase() {
            Phase::Running => Ok(()),
            Phase::Created if self.init.pid() != 0 => Ok(()),
            Phase::Created | Phase::Paused | Phase::Stopped(_) => {
                Err(self.phase_error("processes can be added to a running container only"))
            }
        }
    }

    /// Starts an added process. Errors: its phase or the container's; the runtime's, and then it
    /// can only be deleted.
    pub(crate) async fn start_exec(self: &Arc<Self>, exec_id: &str) -> Result<u32, TaskError> {
        let exec = self.exec(exec_id)?;
        let _operation = exec.operation.lock().await;
        // Before the gate as well: the init's exit may wait there, and this start would wait behind
        // it.
        self.check_takes_execs()?;
        let _gate = self.gate.read().await;
        self.check_takes_execs()?;
        if exec.process.phase() != Phase::Created || exec.process.exit().is_some() {
            return Err(self.phase_error("the process was started already"));
        }
        let since = self.shared.reaper.mark();
        match self.run_exec(&exec, since).await {
            Ok(pid) => {
                exec.process.set_pid(pid);
                exec.process.enter(Phase::Running);
                self.shared.publisher.publish(TaskExecStarted {
                    container_id: self.name.id().to_owned(),
                    exec_id: exec_id.to_owned(),
                    pid,
                    ..Default::default()
                });
                let waiter = self.shared.reaper.watch(pid, since);
                self.report_exit(Arc::clone(&exec.process), waiter);
                Ok(pid)
            }
            Err(error) => {
                exec.process.rewire().abort(&self.shared.reaper).await;
                exec.process.refuse(Exit { code: NOT_STARTED, at: SystemTime::now() });
                Err(error)
            }
        }
    }

    async fn run_exec(&self, exec: &Exec, since: Mark) -> Result<u32, TaskError> {
        let id = &exec.process.exec_id;
        let spec_file = self.bundle.join(format!("exec-{id}.json"));
        let pid_file = self.bundle.join(format!("exec-{id}.pid"));
        std::fs::write(&spec_file, &exec.spec).map_err(TaskError::io("process description"))?;
        let (init, root) = (self.init.pid(), self.bundle.join(format!("exec-{id}.root")));
        let inside = Inside::of(init, self.runc.state_dir(), &root);
        let inside = inside.map_err(TaskError::io(root.display().to_string()))?;
        let started = self
            .wire(&exec.process, Unasked::Null, &pid_file, async |launch| {
                let mut ended = self.init_ended.subscribe();
                let ended = async { drop(ended.wait_for(|ended| *ended).await) };
                self.runc.exec(&spec_file, launch, inside.as_ref(), ended).await
            })
            .await;
        let pid = read_pid(&pid_file);
        for file in [spec_file, pid_file] {
            let _ = std::fs::remove_file(file);
        }
        if let (Err(_), Ok(pid)) = (&started, &pid) {
            // It may run, and nothing would ever end it.
            let _ended = self.shared.reaper.watch(*pid, since);
            let _ = self.shared.reaper.signal(*pid, Signal::SIGKILL);
        }
        started.and(pid)
    }

    /// Removes an added process that does not run.
    pub(crate) async fn delete_exec(&self, exec_id: &str) -> Result<(u32, Exit), TaskError> {
        let exec = self.exec(exec_id)?;
        let _operation = exec.operation.lock().await;
        if matches!(exec.process.phase(), Phase::Running | Phase::Paused) {
            return Err(self.phase_error("the added process still runs"));
        }
        exec.process.wiring().shutdown(&self.shared.reaper).await;
        self.execs().remove(exec_id);
        // A caller that waits for one that was never started gets its answer.
        exec.process.stop(never_ran());
        Ok((exec.process.pid(), exec.process.exit().unwrap_or(never_ran())))
    }
}
