//! Commands with a deadline: run to the end, or in the background with a log.
//!
//! Each command is the leader of a process group of its own, so that ending it ends what it started
//! in that group (`nsenter` has the real command as a child). Output goes to files, not pipes: a
//! daemon that a command leaves behind and that holds its output open then delays no caller.
//!
//! On a machine that is slow by a known factor, the environment variable `GODWIT_PATIENCE`
//! multiplies every deadline.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long a command may take unless its caller sets a deadline.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long the kernel may take to end what was killed.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause between two looks at whether a command has ended.
const POLL_PAUSE: Duration = Duration::from_millis(2);

static PATIENCE: LazyLock<u32> = LazyLock::new(|| {
    std::env::var("GODWIT_PATIENCE").ok().and_then(|factor| factor.parse().ok()).unwrap_or(1)
});

/// A command line with its input, environment and deadline.
#[derive(Clone)]
pub struct Invocation {
    /// What the command is called in errors: the part that the caller asked for.
    label: String,
    argv: Vec<OsString>,
    stdin: Input,
    environment: Option<Vec<(OsString, OsString)>>,
    timeout: Duration,
}

/// Standard input of a command.
#[derive(Clone)]
enum Input {
    Nothing,
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// What a command that ended left: its exit code and its output.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; 128 + N after signal N, as shells have it.
    pub code: i32,
    /// Standard output, with bytes that are not UTF-8 replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
    label: String,
}

impl Invocation {
    /// A command on the host, found by PATH.
    pub fn new<S: AsRef<OsStr>>(argv: &[S]) -> Self {
        let argv: Vec<OsString> = argv.iter().map(|word| word.as_ref().to_owned()).collect();
        let label = label(&argv);
        Self { label, argv, stdin: Input::Nothing, environment: None, timeout: DEFAULT_TIMEOUT }
    }

    /// Puts `prefix` before the command; errors go on naming the command alone.
    pub(crate) fn prefixed(mut self, prefix: Vec<OsString>, place: &str) -> Self {
        self.argv.splice(0..0, prefix);
        self.label = format!("{place}: {}", self.label);
        self
    }

    /// Gives the command this input; without it, it reads from `/dev/null`.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Input::Bytes(bytes.into());
        self
    }

    /// Gives the command a file of the host as its input.
    pub fn stdin_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.stdin = Input::File(path.into());
        self
    }

    /// Replaces the inherited environment.
    pub fn environment(mut self, pairs: &[(&str, &str)]) -> Self {
        self.environment = Some(pairs.iter().map(|(k, v)| (k.into(), v.into())).collect());
        self
    }

    /// Sets the deadline, counted from the start of the command.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Runs the command to its end, whatever its exit code.
    ///
    /// Errors: it cannot be started, or its deadline passes; it is killed then.
    pub fn run(&self) -> Result<Finished> {
        let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
        let mut child = self.start(stdout.try_clone()?, stderr.try_clone()?)?;
        let status = wait(&mut child, self.timeout)?;
        if status.is_none() {
            kill_group(&child);
            child.wait()?;
        }
        let (stdout, stderr) = (read_back(&mut stdout)?, read_back(&mut stderr)?);
        let Some(status) = status else {
            let limit = self.timeout;
            bail!("{}: still running after {limit:?}; said: {stdout}{stderr}", self.label);
        };
        Ok(Finished { code: exit_code(status), stdout, stderr, label: self.label.clone() })
    }

    /// Runs the command and returns its standard output; any exit code but 0 is an error.
    pub fn ok(&self) -> Result<String> {
        self.run()?.ok()
    }

    /// Starts the command and leaves it running; its output is appended to `log`.
    pub fn spawn(&self, log: &Path) -> Result<Background> {
        let file = OpenOptions::new().create(true).append(true).open(log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        let child = self.start(file.try_clone()?, file)?;
        Ok(Background { child, log: log.to_path_buf(), label: self.label.clone() })
    }

    fn start(&self, stdout: File, stderr: File) -> Result<Child> {
        let [program, arguments @ ..] = self.argv.as_slice() else { bail!("empty command") };
        let mut command = Command::new(program);
        command.args(arguments).stdout(stdout).stderr(stderr).process_group(0);
        if let Some(environment) = &self.environment {
            command.env_clear().envs(environment.iter().map(|(k, v)| (k, v)));
        }
        match &self.stdin {
            Input::Nothing => command.stdin(Stdio::null()),
            Input::File(path) => {
                command.stdin(File::open(path).with_context(|| format!("open {}", path.display()))?)
            }
            Input::Bytes(bytes) => {
                let mut file = tempfile::tempfile()?;
                file.write_all(bytes)?;
                file.seek(SeekFrom::Start(0))?;
                command.stdin(file)
            }
        };
        command.spawn().with_context(|| format!("{}: cannot be started", self.label))
    }
}

impl Finished {
    /// Standard output if the command succeeded; otherwise an error with what it said.
    pub fn ok(self) -> Result<String> {
        if self.code == 0 { Ok(self.stdout) } else { bail!("{self}") }
    }

    /// Whether the exit code is 0.
    pub fn succeeded(&self) -> bool {
        self.code == 0
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: exit code {}", self.label, self.code)?;
        for text in [&self.stderr, &self.stdout] {
            if !text.trim().is_empty() {
                write!(f, "\n    {}", text.trim().replace('\n', "\n    "))?;
            }
        }
        Ok(())
    }
}

/// A command in the background; dropping it kills its process group.
pub struct Background {
    child: Child,
    log: PathBuf,
    label: String,
}

impl Background {
    /// Process id of the command as started on the host (of its wrapper, inside a node).
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        std::fs::read(&self.log)
            .map(|b| String::from_utf8_lossy(&b).into_owned())
            .unwrap_or_default()
    }

    /// Exit code if it has ended.
    pub fn ended(&mut self) -> Result<Option<i32>> {
        Ok(self.child.try_wait()?.map(exit_code))
    }

    /// Sends a signal to the command and to what it started in its group.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        match killpg(group(&self.child), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(errno) => Err(errno).context(format!("{}: signal {signal}", self.label)),
        }
    }

    /// Waits for the end. Errors: the command is still running after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<i32> {
        match wait(&mut self.child, timeout)? {
            Some(status) => Ok(exit_code(status)),
            None => bail!("{}: still running after {timeout:?}", self.label),
        }
    }

    /// Kills it as a crash would, and waits until it is gone.
    pub fn kill(&mut self) -> Result<()> {
        kill_group(&self.child);
        self.child.wait()?;
        self.wait_for_group(KILL_TIMEOUT)
    }

    /// Waits until nothing of the command's group is left: the command may be a wrapper that ended
    /// before what it wraps.
    pub fn wait_for_group(&self, timeout: Duration) -> Result<()> {
        let group = self.child.id().to_string();
        wait_until(&format!("{}: all of it ends", self.label), timeout, || {
            Ok(!std::fs::read_dir("/proc")?.flatten().any(|entry| {
                let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
                // After the name in parentheses: state, parent, group. The dead (Z) only wait to be
                // reaped by someone else.
                let after_name = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
                let mut fields = after_name.split(' ');
                let (state, in_group) = (fields.next(), fields.nth(1) == Some(&group));
                in_group && state != Some("Z")
            }))
        })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if self.kill().is_err() {
            eprintln!("{}: cannot be waited for", self.label);
        }
    }
}

/// Runs a command on the host and returns its standard output; see [`Invocation::ok`].
pub fn host(argv: &[&str]) -> Result<String> {
    Invocation::new(argv).ok()
}

/// Repeats `check` until it is true. Errors: `timeout` passes, or a check fails.
pub fn wait_until(
    what: &str,
    timeout: Duration,
    mut check: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let (begin, timeout) = (Instant::now(), timeout * *PATIENCE);
    while !check()? {
        if begin.elapsed() > timeout {
            bail!("{what}: not within {timeout:?}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let (begin, timeout) = (Instant::now(), timeout * *PATIENCE);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if begin.elapsed() > timeout {
            return Ok(None);
        }
        std::thread::sleep(POLL_PAUSE);
    }
}

fn group(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

fn kill_group(child: &Child) {
    // ESRCH: the group has ended by itself, which is what we want.
    let _ = killpg(group(child), Signal::SIGKILL);
}

fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn read_back(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn label(argv: &[OsString]) -> String {
    let words: Vec<_> = argv.iter().map(|word| word.to_string_lossy()).collect();
    words.join(" ")
}
