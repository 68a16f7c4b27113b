//! The OCI runtime as a program: one method for each of its commands that the shim needs.
//!
//! Every call writes its log to a file of its own, from which an error's text is taken; what the
//! program prints belongs to the container (for `create`, `exec` and `restore` its standard streams
//! become the container's). Waiting goes through the [`Reaper`].

use std::ffi::{OsStr, OsString};
use std::io::{Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use containerd_shim::protos::shim::oci::Options;
use nix::sys::signal::Signal;

use crate::hold;
use crate::packing::{self, Packing};
use crate::reap::Reaper;
use crate::time_namespace::Inside;

/// Deadline of every command without one of its own: none of them waits for the container's
/// programs.
const CALL_TIME_MAX: Duration = Duration::from_secs(120);
/// Longest error text taken from a log, in bytes.
const MESSAGE_BYTES_MAX: usize = 2048;
/// Largest log that is read, in bytes.
const LOG_BYTES_MAX: u64 = 1 << 20;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuncError {
    #[error("cannot start the OCI runtime {binary}")]
    Start { binary: String, source: std::io::Error },
    #[error("OCI runtime {command} failed: {message}")]
    Failed { command: &'static str, message: String },
    #[error("{binary} {command} did not finish within {limit:?} and was killed")]
    TimedOut { binary: String, command: &'static str, limit: Duration },
    #[error("the kernel does not freeze or thaw the container")]
    Freeze(#[source] std::io::Error),
    #[error("OCI runtime {command} was broken off, since the container has ended")]
    BrokenOff { command: &'static str },
}

impl RuncError {
    /// Whether the runtime gave up a freeze and thawed what it had frozen.
    pub(crate) fn is_unfrozen(&self) -> bool {
        matches!(self, Self::Failed { message, .. } if message.contains("unable to freeze"))
    }

    /// Whether the runtime says that the container, or the process, is not there any more.
    pub(crate) fn is_gone(&self) -> bool {
        const GONE: [&str; 4] =
            ["does not exist", "process already finished", "not running", "no such process"];
        let Self::Failed { message, .. } = self else { return false };
        // crun repeats the kernel's words, which begin with a capital letter.
        let message = message.to_lowercase();
        GONE.iter().any(|text| message.contains(text))
    }
}

/// Standard streams of a command. Where one is absent it is /dev/null.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

/// What `create`, `exec` and `restore` have in common.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    pub(crate) pid_file: &'a Path,
    pub(crate) console_socket: Option<&'a Path>,
    pub(crate) streams: Streams,
}

/// One container's runtime: the program with its global options.
#[derive(Debug)]
pub(crate) struct Runc {
    binary: String,
    root: PathBuf,
    systemd_cgroup: bool,
    no_pivot: bool,
    no_new_keyring: bool,
    bundle: PathBuf,
    id: String,
    calls: AtomicU32,
    reaper: Arc<Reaper>,
}

impl std::fmt::Debug for Reaper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reaper")
    }
}

/// The program that the task's options name.
pub(crate) fn binary_of(options: &Options) -> &str {
    if options.binary_name.is_empty() { "runc" } else { &options.binary_name }
}

impl Runc {
    /// The runtime of container `id` in `namespace`, as the task's options say.
    pub(crate) fn new(
        options: &Options,
        namespace: &str,
        id: &str,
        bundle: &Path,
        reaper: Arc<Reaper>,
    ) -> Self {
        let root = if options.root.is_empty() { "/run/containerd/runc" } else { &options.root };
        Self {
            binary: binary_of(options).to_owned(),
            root: Path::new(root).join(namespace),
            systemd_cgroup: options.systemd_cgroup,
            no_pivot: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            bundle: bundle.to_owned(),
            id: id.to_owned(),
            calls: AtomicU32::new(0),
            reaper,
        }
    }

    /// Name or path of the program.
    pub(crate) fn binary(&self) -> &str {
        &self.binary
    }

    /// Whether this is crun, whose dumps take neither our flags nor our CRIU settings.
    pub(crate) fn is_crun(&self) -> bool {
        Path::new(&self.binary)
            .file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(b"crun"))
    }

    /// Directory where the runtime keeps this container's state.
    pub(crate) fn state_dir(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// Makes the container; its init process waits for [`Runc::start`].
    pub(crate) async fn create(&self, launch: Launch<'_>) -> Result<(), RuncError> {
        let mut args = vec!["--bundle".into(), self.bundle.clone().into()];
        if self.no_pivot {
            args.push("--no-pivot".into());
        }
        if self.no_new_keyring {
            args.push("--no-new-keyring".into());
        }
        self.launch("create", args, launch, None, CALL_TIME_MAX).await
    }

    /// Lets the init process run the container's program.
    pub(crate) async fn start(&self) -> Result<(), RuncError> {
        self.simple("start", &[]).await
    }

    /// Restores the container from a CRIU image directory.
    pub(crate) async fn restore(
        &self,
        image_path: &Path,
        work_path: &Path,
        launch: Launch<'_>,
        limit: Duration,
    ) -> Result<(), RuncError> {
        let mut args: Vec<OsString> = vec!["--bundle".into(), self.bundle.clone().into()];
        args.extend(["--image-path".into(), image_path.into()]);
        args.extend(["--work-path".into(), work_path.into()]);
        // The shim, not the runtime, is to become the parent of what is restored.
        args.extend(["--detach".into(), "--no-subreaper".into()]);
        if self.no_pivot {
            args.push("--no-pivot".into());
        }
        self.launch("restore", args, launch, None, limit).await
    }

    /// Dumps the container with CRIU. `flags` are the command's own.
    pub(crate) async fn checkpoint(
        &self,
        image_path: &Path,
        work_path: &Path,
        (flags, packing): (&[&str], Packing),
        limit: Duration,
    ) -> Result<(), RuncError> {
        let mut args: Vec<OsString> = vec!["--image-path".into(), image_path.into()];
        args.extend(["--work-path".into(), work_path.into()]);
        args.extend(flags.iter().map(OsString::from));
        args.push(self.id.clone().into());
        let streams = Streams::default();
        self.call_in("checkpoint", &args, streams, None, Some(packing), limit).await
    }

    /// Starts another process in the container, unless `ended` resolves first: the runtime is
    /// killed then. `process` is a file with its OCI description; `inside` leads to the container's
    /// clock.
    pub(crate) async fn exec(
        &self,
        process: &Path,
        launch: Launch<'_>,
        inside: Option<&Inside>,
        ended: impl Future<Output = ()>,
    ) -> Result<(), RuncError> {
        let args = vec!["--process".into(), process.into(), "--detach".into()];
        let call = self.launch("exec", args, launch, inside, CALL_TIME_MAX);
        tokio::select! {
            biased;
            done = call => done,
            () = ended => Err(RuncError::BrokenOff { command: "exec" }),
        }
    }

    /// Signals the init process, or with `all` every process.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<(), RuncError> {
        let mut args: Vec<OsString> = Vec::new();
        if all {
            args.push("--all".into());
        }
        args.extend([self.id.clone().into(), signal.to_string().into()]);
        self.call("kill", &args, Streams::default(), CALL_TIME_MAX).await
    }

    /// Removes what the runtime holds of the container, killing it first with `force`.
    pub(crate) async fn delete(&self, force: bool) -> Result<(), RuncError> {
        self.simple("delete", if force { &["--force"] } else { &[] }).await
    }

    /// Freezes every process.
    pub(crate) async fn pause(&self) -> Result<(), RuncError> {
        self.simple("pause", &[]).await
    }

    /// Undoes [`Runc::pause`].
    pub(crate) async fn resume(&self) -> Result<(), RuncError> {
        self.simple("resume", &[]).await
    }

    /// Sets resource limits from the OCI specification's JSON.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<(), RuncError> {
        let wrong = |source| RuncError::Start { binary: self.binary.clone(), source };
        let mut file =
            nix::sys::memfd::memfd_create("resources", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
                .map(std::fs::File::from)
                .map_err(|errno| wrong(errno.into()))?;
        file.write_all(resources).and_then(|()| file.rewind()).map_err(wrong)?;
        let streams = Streams { stdin: Some(file.into()), ..Default::default() };
        let args = ["--resources".into(), "-".into(), self.id.clone().into()];
        self.call("update", &args, streams, CALL_TIME_MAX).await
    }

    async fn simple(&self, command: &'static str, flags: &[&str]) -> Result<(), RuncError> {
        let mut args: Vec<OsString> = flags.iter().map(OsString::from).collect();
        args.push(self.id.clone().into());
        self.call(command, &args, Streams::default(), CALL_TIME_MAX).await
    }

    async fn launch(
        &self,
        command: &'static str,
        mut args: Vec<OsString>,
        launch: Launch<'_>,
        inside: Option<&Inside>,
        limit: Duration,
    ) -> Result<(), RuncError> {
        args.extend(["--pid-file".into(), launch.pid_file.into()]);
        if let Some(socket) = launch.console_socket {
            args.extend(["--console-socket".into(), socket.into()]);
        }
        args.push(self.id.clone().into());
        let packing = (command == "restore").then_some(Packing::Unpacked);
        self.call_in(command, &args, launch.streams, inside, packing, limit).await
    }

    async fn call(
        &self,
        command: &'static str,
        args: &[OsString],
        streams: Streams,
        limit: Duration,
    ) -> Result<(), RuncError> {
        self.call_in(command, args, streams, None, None, limit).await
    }

    async fn call_in(
        &self,
        command: &'static str,
        args: &[OsString],
        streams: Streams,
        inside: Option<&Inside>,
        packing: Option<Packing>,
        limit: Duration,
    ) -> Result<(), RuncError> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let log = self.bundle.join(format!(".runc-{command}-{number}.json"));
        let (mut program, root) = match inside {
            Some(inside) => (inside.command(&self.binary, &log), inside.root()),
            None => (Command::new(&self.binary), self.root.as_path()),
        };
        program.arg("--root").arg(root).arg("--log").arg(&log).args(["--log-format", "json"]);
        program.envs(packing.map(packing::environment).unwrap_or_default());
        let outcome = self.run(program, command, args, streams, limit).await;
        let failed = |message| RuncError::Failed { command, message };
        let outcome = match outcome {
            Ok(0) => Ok(()),
            Ok(code) => Err(failed(
                last_error(&log)
                    .unwrap_or_else(|| format!("exit code {code}, and no error in its log")),
            )),
            Err(error) => Err(error),
        };
        let _ = std::fs::remove_file(&log);
        outcome
    }

    async fn run(
        &self,
        mut program: Command,
        command: &'static str,
        args: &[OsString],
        streams: Streams,
        limit: Duration,
    ) -> Result<u32, RuncError> {
        if self.systemd_cgroup {
            program.arg("--systemd-cgroup");
        }
        // Relative socket paths, which stay short, are relative to the bundle.
        program.arg(command).args(args.iter().map(OsStr::new)).current_dir(&self.bundle);
        if command == "restore" {
            program.env(hold::BUNDLE_VARIABLE, &self.bundle);
        }
        let or_null = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        program.stdin(or_null(streams.stdin));
        program.stdout(or_null(streams.stdout)).stderr(or_null(streams.stderr));
        let spawned = self.reaper.spawn(&mut program);
        // The container's ends of its pipes now belong to the program alone.
        drop(program);
        let (child, done) =
            spawned.map_err(|source| RuncError::Start { binary: self.binary.clone(), source })?;
        // Only the caller of an exec gives up on it; any other command is seen to its end.
        let _guard = (command == "exec")
            .then(|| KillOnDrop { reaper: self.reaper.as_ref(), pid: child.id() });
        match tokio::time::timeout(limit, done).await {
            Ok(exit) => Ok(exit.map_or(255, |exit| exit.code)),
            Err(_) => {
                let _ = self.reaper.signal(child.id(), Signal::SIGKILL);
                Err(RuncError::TimedOut { binary: self.binary.clone(), command, limit })
            }
        }
    }
}

/// Kills a program when it is dropped, unless the program has ended.
struct KillOnDrop<'a> {
    reaper: &'a Reaper,
    pid: u32,
}

impl Drop for KillOnDrop<'_> {
    fn drop(&mut self) {
        let _ = self.reaper.signal(self.pid, Signal::SIGKILL);
    }
}

/// Text of the last error in a log of JSON lines, in one line.
fn last_error(log: &Path) -> Option<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(log).ok()?.take(LOG_BYTES_MAX).read_to_string(&mut text).ok()?;
    last_error_in(&text)
}

fn last_error_in(text: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        level: String,
        msg: String,
    }
    let mut lines = text.lines().filter_map(|line| serde_json::from_str::<Line>(line).ok());
    let mut message = lines.rfind(|line| matches!(line.level.as_str(), "error" | "fatal"))?.msg;
    message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let end = message.floor_char_boundary(MESSAGE_BYTES_MAX);
    message.truncate(end);
    Some(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_told_in_one_line() {
        let log = concat!(
            "{\"level\":\"warning\",\"msg\":\"odd\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"first\",\"time\":\"t\"}\n",
            "{\"level\":\"error\",\"msg\":\"exec failed:\\n  no such file\",\"time\":\"t\"}\n",
            "not json\n",
        );
        assert_eq!(last_error_in(log).as_deref(), Some("exec failed: no such file"));
        assert_eq!(last_error_in(""), None);
    }

    /// Method: a script in the runtime's place, which notes its arguments.
    #[tokio::test]
    async fn commands_and_their_errors() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("fake-runc");
        std::fs::write(
            &script,
            "#!/bin/sh\necho \"$@\" >> args\ncase \"$*\" in *pause*) \
             echo '{\"level\":\"error\",\"msg\":\"container does not exist\"}' > \"$4\"; exit 1;; esac\n",
        )
        .unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let reaper = Reaper::for_tests();
        let binary_name = script.to_str().unwrap().to_owned();
        let options = Options { binary_name, root: "/r".to_owned(), ..Default::default() };
        let runc = Runc::new(&options, "ns", "c1", dir.path(), reaper);
        runc.kill(9, true).await.unwrap();
        let error = runc.pause().await.unwrap_err();
        assert!(error.is_gone(), "{error}");
        let args = std::fs::read_to_string(dir.path().join("args")).unwrap();
        assert!(args.starts_with("--root /r/ns --log "), "{args}");
        assert!(args.contains("--log-format json kill --all c1 9\n"), "{args}");
    }
}
