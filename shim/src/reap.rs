//! The one place where children end: programs that the shim started, and container processes that
//! became its children because it is a subreaper.
//!
//! A single loop waits for SIGCHLD and calls `waitpid(-1)` until nothing is left; nothing else in
//! this process may wait for a child (`Child::wait`, `Command::output` and tokio's `Child` would
//! race for the status). A caller that is interested in an exit gets a [`Waiter`]:
//!
//! - of a program: [`Reaper::spawn`] starts it under the lock, so its exit cannot be missed;
//! - of a container process, known by pid only afterwards: [`Reaper::mark`] before the runtime
//!   starts it, [`Reaper::watch`] once the pid is known. Exits since the mark that no caller
//!   claimed are kept, so that a process which ended at once is not lost, and one that had the same
//!   pid before is not taken for it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys;

/// Exits of processes without a waiter, kept for a later [`Reaper::watch`].
const UNCLAIMED_MAX: usize = 1024;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 and the signal that killed it.
    pub(crate) code: u32,
    pub(crate) at: SystemTime,
}

/// Resolves when the process has ended. An error means that the reaper is gone.
pub(crate) type Waiter = oneshot::Receiver<Exit>;

/// A moment in the order of exits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u64);

#[derive(Default)]
struct Table {
    exits_seen: u64,
    waiting: HashMap<i32, oneshot::Sender<Exit>>,
    unclaimed: VecDeque<(u64, i32, Exit)>,
}

impl Table {
    fn ended(&mut self, pid: i32, exit: Exit) {
        self.exits_seen += 1;
        if let Some(waiter) = self.waiting.remove(&pid) {
            // The one who waited may have given up meanwhile.
            let _ = waiter.send(exit);
            return;
        }
        if self.unclaimed.len() == UNCLAIMED_MAX {
            self.unclaimed.pop_front();
        }
        self.unclaimed.push_back((self.exits_seen, pid, exit));
    }

    fn watch(&mut self, pid: i32, since: Mark) -> Waiter {
        let (sender, waiter) = oneshot::channel();
        let of_it = |(seen, of, _): &(u64, i32, Exit)| *of == pid && *seen > since.0;
        if let Some(found) = self.unclaimed.iter().position(of_it) {
            if let Some((_, _, exit)) = self.unclaimed.remove(found) {
                let _ = sender.send(exit);
            }
        } else {
            self.waiting.insert(pid, sender);
        }
        waiter
    }
}

/// See the module comment.
#[derive(Default)]
pub(crate) struct Reaper {
    table: Mutex<Table>,
}

impl Reaper {
    fn table(&self) -> MutexGuard<'_, Table> {
        // The table is consistent between any two statements that could panic.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a program. Errors: those of starting it.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<(Child, Waiter)> {
        let mut table = self.table();
        let since = Mark(table.exits_seen);
        let child = command.spawn()?;
        let waiter = table.watch(pid_of(&child), since);
        Ok((child, waiter))
    }

    /// Now, for a later [`Reaper::watch`].
    pub(crate) fn mark(&self) -> Mark {
        Mark(self.table().exits_seen)
    }

    /// Waits for a process that became a child after `since`.
    pub(crate) fn watch(&self, pid: u32, since: Mark) -> Waiter {
        self.table().watch(pid.cast_signed(), since)
    }

    /// Sends a signal to a process that has a waiter. Errors: `ESRCH` when it has ended; its
    /// pid may be another's by then, so nothing is sent.
    pub(crate) fn signal(&self, pid: u32, signal: Signal) -> Result<(), Errno> {
        self.signal_number(pid, signal as i32)
    }

    /// The same with a number, since real-time signals have no name. Errors: `EINVAL` as well, when
    /// there is no such signal.
    pub(crate) fn signal_number(&self, pid: u32, signal: i32) -> Result<(), Errno> {
        let table = self.table();
        let pid = pid.cast_signed();
        // Reaping takes the same lock: as long as it is held, the pid stays taken.
        if table.waiting.contains_key(&pid) { sys::kill(pid, signal) } else { Err(Errno::ESRCH) }
    }

    fn reap(&self) {
        let mut table = self.table();
        loop {
            let (pid, code) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, 128 + signal as i32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(error) => {
                    tracing::error!("waiting for children: {error}");
                    return;
                }
            };
            table.ended(pid.as_raw(), Exit { code: code.cast_unsigned(), at: SystemTime::now() });
        }
    }

    /// Starts the loop. Errors: the signal handler cannot be installed.
    pub(crate) fn start(self: &Arc<Self>) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        let reaper = Arc::clone(self);
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                reaper.reap();
            }
        });
        Ok(())
    }
}

#[cfg(test)]
impl Reaper {
    /// The one reaper of the test process, on a thread of its own: several would take each other's
    /// children.
    pub(crate) fn for_tests() -> Arc<Self> {
        static SHARED: std::sync::OnceLock<Arc<Reaper>> = std::sync::OnceLock::new();
        let start = || {
            let reaper = Arc::new(Self::default());
            let (ready, started) = std::sync::mpsc::channel();
            let on_thread = Arc::clone(&reaper);
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
                runtime.unwrap().block_on(async {
                    on_thread.start().unwrap();
                    ready.send(()).unwrap();
                    std::future::pending::<()>().await;
                });
            });
            started.recv().unwrap();
            reaper
        };
        Arc::clone(SHARED.get_or_init(start))
    }
}

/// Pid of a child in the kernel's own type.
fn pid_of(child: &Child) -> i32 {
    child.id().cast_signed()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(code: u32) -> Exit {
        Exit { code, at: SystemTime::UNIX_EPOCH }
    }

    #[test]
    fn an_exit_before_the_watch_is_not_lost() {
        let mut table = Table::default();
        let mark = Mark(table.exits_seen);
        table.ended(7, exit(3));
        assert_eq!(table.watch(7, mark).try_recv(), Ok(exit(3)));
        assert!(table.unclaimed.is_empty());
    }

    #[test]
    fn an_earlier_process_with_the_same_pid_is_not_taken_for_it() {
        let mut table = Table::default();
        table.ended(7, exit(3));
        let mut waiter = table.watch(7, Mark(table.exits_seen));
        assert!(waiter.try_recv().is_err());
        table.ended(7, exit(4));
        assert_eq!(waiter.try_recv(), Ok(exit(4)));
    }

    #[test]
    fn unclaimed_exits_are_bounded() {
        let mut table = Table::default();
        for pid in 1..=2000 {
            table.ended(pid, exit(0));
        }
        assert_eq!(table.unclaimed.len(), UNCLAIMED_MAX);
        assert_eq!(table.watch(2000, Mark(0)).try_recv(), Ok(exit(0)));
    }

    #[tokio::test]
    async fn programs_and_signals() {
        let reaper = Reaper::for_tests();
        let (_, done) = reaper.spawn(Command::new("sh").args(["-c", "exit 5"])).unwrap();
        assert_eq!(done.await.unwrap().code, 5);
        let (child, done) = reaper.spawn(Command::new("sleep").arg("60")).unwrap();
        reaper.signal(child.id(), Signal::SIGKILL).unwrap();
        assert_eq!(done.await.unwrap().code, 137);
        assert_eq!(reaper.signal(child.id(), Signal::SIGKILL), Err(Errno::ESRCH));
    }
}
