//! One process that containerd knows: a container's init, or one added by exec.
//!
//! ```text
//! Created --start--> Running <--pause, resume--> Paused
//!    |                  |                           |
//!    +------------------+--------- exit ------------+--> Stopped
//! ```
//!
//! The phase changes only in [`Process::enter`] and [`Process::stop`]; nothing leads out of
//! `Stopped`. A restored or migrated init stays `Created` with pid 0 until it runs. An added
//! process that the runtime refused to start stays `Created` as well ([`Process::refuse`]): its
//! waiters get an answer, and only a delete is left.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim::asynchronous::io::Stdio;
use containerd_shim::protos::api::Status;
use tokio::sync::watch;

use crate::reap::Exit;
use crate::stdio::Wiring;

/// Where a process stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Created,
    Running,
    Paused,
    Stopped(Exit),
}

impl Phase {
    /// As users read it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }

    /// containerd's word for it.
    pub(crate) fn status(self) -> Status {
        match self {
            Self::Created => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Paused => Status::PAUSED,
            Self::Stopped(_) => Status::STOPPED,
        }
    }
}

/// See the module comment.
pub(crate) struct Process {
    /// Empty for a container's init process.
    pub(crate) exec_id: String,
    pub(crate) stdio: Stdio,
    wiring: Mutex<Arc<Wiring>>,
    state: Mutex<(u32, Phase)>,
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub(crate) fn new(exec_id: &str, stdio: Stdio) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            stdio,
            wiring: Mutex::default(),
            state: Mutex::new((0, Phase::Created)),
            exit: watch::channel(None).0,
        }
    }

    fn state(&self) -> MutexGuard<'_, (u32, Phase)> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its pid, 0 until it has one.
    pub(crate) fn pid(&self) -> u32 {
        self.state().0
    }

    pub(crate) fn phase(&self) -> Phase {
        self.state().1
    }

    /// How it ended, or what its waiters were told when it could not be started.
    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.state().0 = pid;
    }

    /// Moves to a phase other than `Stopped`, unless the process has stopped meanwhile.
    pub(crate) fn enter(&self, phase: Phase) {
        let mut state = self.state();
        if !matches!(state.1, Phase::Stopped(_)) {
            state.1 = phase;
        }
    }

    /// Notes its end and wakes all that wait. The first end stands.
    pub(crate) fn stop(&self, exit: Exit) {
        let mut state = self.state();
        if !matches!(state.1, Phase::Stopped(_)) {
            let exit = *self.exit.borrow().as_ref().unwrap_or(&exit);
            state.1 = Phase::Stopped(exit);
            self.exit.send_replace(Some(exit));
        }
    }

    /// Answers its waiters although it never ran; it stays `Created`.
    pub(crate) fn refuse(&self, exit: Exit) {
        let _state = self.state();
        self.exit.send_if_modified(|told| {
            let is_first = told.is_none();
            told.get_or_insert(exit);
            is_first
        });
    }

    /// Resolves when the process has ended.
    pub(crate) async fn stopped(&self) -> Exit {
        let mut exit = self.exit.subscribe();
        loop {
            if let Some(exit) = *exit.borrow_and_update() {
                return exit;
            }
            if exit.changed().await.is_err() {
                // The sender is `self`, which this borrow keeps.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Its streams.
    pub(crate) fn wiring(&self) -> Arc<Wiring> {
        Arc::clone(&self.wiring.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Forgets its streams, so that it can be started once more.
    pub(crate) fn rewire(&self) -> Arc<Wiring> {
        std::mem::take(&mut *self.wiring.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[tokio::test]
    async fn nothing_leads_out_of_stopped_and_the_first_end_stands() {
        let process = Arc::new(Process::new("", Stdio::default()));
        let waiting = tokio::spawn({
            let process = Arc::clone(&process);
            async move { process.stopped().await }
        });
        process.enter(Phase::Running);
        let exit = |code| Exit { code, at: SystemTime::UNIX_EPOCH };
        process.stop(exit(3));
        process.stop(exit(4));
        process.enter(Phase::Running);
        assert_eq!(process.phase(), Phase::Stopped(exit(3)));
        assert_eq!(waiting.await.unwrap(), exit(3));
        assert_eq!(process.stopped().await, exit(3));
    }

    #[tokio::test]
    async fn a_refused_process_stays_created_and_its_waiters_get_an_answer() {
        let process = Process::new("e", Stdio::default());
        let exit = |code| Exit { code, at: SystemTime::UNIX_EPOCH };
        process.refuse(exit(255));
        assert_eq!(process.phase(), Phase::Created);
        assert_eq!(process.stopped().await, exit(255));
        process.stop(exit(0));
        assert_eq!(process.phase(), Phase::Stopped(exit(255)));
    }
}
