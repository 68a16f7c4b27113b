//! Supervision of background tasks: none of them ends silently.
//!
//! A task that panics, or that ends although the daemon needs it until the end, ends the daemon
//! with an error that names it; systemd starts the daemon again (`Restart=on-failure`). So a daemon
//! that runs does all of its work.

use std::any::Any;
use std::panic::resume_unwind;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Why the daemon ends by itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Death {
    /// A bug.
    #[error("background task {task:?} panicked: {message}")]
    Panicked {
        /// Its name.
        task: &'static str,
        /// What it said.
        message: String,
    },
    /// The reason is in the log.
    #[error("background task {task:?} ended")]
    Ended {
        /// Its name.
        task: &'static str,
    },
    /// The daemon must start again.
    #[error("{reason}")]
    Gave {
        /// Why.
        reason: String,
    },
}

/// Starts background tasks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Supervisor(mpsc::UnboundedSender<Death>);

/// Reports the deaths of a supervisor's tasks.
#[derive(Debug)]
pub struct Deaths(mpsc::UnboundedReceiver<Death>);

impl Supervisor {
    /// A supervisor without tasks, and what reports their deaths.
    pub fn new() -> (Self, Deaths) {
        let (send, receive) = mpsc::unbounded_channel();
        (Self(send), Deaths(receive))
    }

    /// Starts a task that must run until the daemon ends.
    pub fn serve(&self, task: &'static str, work: impl Future<Output = ()> + Send + 'static) {
        drop(self.start(task, work, true));
    }

    /// Starts a task that ends only when the daemon must start again, and says why.
    pub fn watch(&self, task: &'static str, work: impl Future<Output = String> + Send + 'static) {
        let deaths = self.0.clone();
        let told = async move {
            let reason = work.await;
            // The daemon may be stopping already.
            let _ = deaths.send(Death::Gave { reason });
        };
        drop(self.start(task, told, false));
    }

    /// Starts a task that ends when its work is done, and returns what waits for that.
    pub fn run(
        &self,
        task: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        self.start(task, work, false)
    }

    fn start(
        &self,
        task: &'static str,
        work: impl Future<Output = ()> + Send + 'static,
        must_last: bool,
    ) -> JoinHandle<()> {
        let deaths = self.0.clone();
        tokio::spawn(async move {
            let death = match tokio::spawn(work).await {
                Ok(()) if must_last => Death::Ended { task },
                Ok(()) => return,
                Err(error) => match error.try_into_panic() {
                    Ok(panic) => Death::Panicked { task, message: message(&*panic) },
                    // The runtime is shutting down.
                    Err(_cancelled) => return,
                },
            };
            // The daemon may be stopping already.
            let _ = deaths.send(death);
        })
    }
}

impl Deaths {
    /// The next death. Pending as long as all tasks live.
    pub async fn next(&mut self) -> Death {
        match self.0.recv().await {
            Some(death) => death,
            None => std::future::pending().await,
        }
    }
}

/// Work on another thread was cut short: by a panic, or since the daemon stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Runs work that waits for disk or processor on another thread. Errors: its own, or
/// [`Interrupted`].
pub async fn blocking<T: Send + 'static, E: From<Interrupted> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    tokio::task::spawn_blocking(work).await.map_err(|_cause| Interrupted)?
}

/// Runs blocking work on another thread. A panic there is one here; `None` when the runtime is
/// shutting down.
pub async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) => error.try_into_panic().map_or(None, |panic| resume_unwind(panic)),
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_reported_with_the_name_of_its_task() {
        let (supervisor, mut deaths) = Supervisor::new();
        supervisor.serve("sweeps", async { panic!("slot {} is empty", 7) });
        assert_eq!(
            deaths.next().await.to_string(),
            "background task \"sweeps\" panicked: slot 7 is empty"
        );
    }

    #[tokio::test]
    async fn a_panic_on_a_thread_for_blocking_work_is_the_tasks_own() {
        let (supervisor, mut deaths) = Supervisor::new();
        supervisor.run("publishing", async {
            on_thread(|| panic!("no entry")).await;
        });
        let (task, message) = ("publishing", "no entry".to_owned());
        assert_eq!(deaths.next().await, Death::Panicked { task, message });
    }

    #[tokio::test]
    async fn a_task_can_end_the_daemon_with_its_reason() {
        let (supervisor, mut deaths) = Supervisor::new();
        supervisor.watch("databases", async { "the disk failed".to_owned() });
        assert_eq!(deaths.next().await.to_string(), "the disk failed");
    }

    #[tokio::test]
    async fn only_a_task_that_must_last_is_reported_when_it_ends() {
        let (supervisor, mut deaths) = Supervisor::new();
        supervisor.run("recovery", async {});
        supervisor.serve("capture", std::future::pending());
        let death = tokio::time::timeout(Duration::from_millis(100), deaths.next()).await;
        assert!(death.is_err(), "{death:?}");
        supervisor.serve("peers", async {});
        assert_eq!(deaths.next().await, Death::Ended { task: "peers" });
    }
}
