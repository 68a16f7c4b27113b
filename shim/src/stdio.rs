//! A process's standard streams: from what containerd asks for to what the OCI runtime is given.
//!
//! Outputs go to a FIFO (the usual case), a file (`file:///path`), or a logger
//! (`binary:///path?args`), whose protocol is containerd's: descriptors 3 and 4 are the process's
//! stdout and stderr, and it closes descriptor 5 when it is ready. Between the two the shim keeps a
//! pipe, or the master side of a terminal that the runtime hands over through a socket, and copies
//! without a thread of its own ([`crate::fifo`], [`crate::newest`]). Every copy reads its source
//! through [`UntilError`], so that what was read arrives before the copy ends.
//!
//! The pipe ends given to a container stay blocking; only the shim's own ends are not.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use containerd_shim::asynchronous::io::{IoTasks, Pty, Stdio};
use containerd_shim::protos::shim::oci::Options;
use godwit_protos::path;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};
use tokio::net::{UnixListener, UnixStream, unix::pipe};

use crate::fifo::Fifo;
use crate::newest::Newest;
use crate::reap::{Reaper, Waiter};
use crate::runc::Streams;
use crate::sys;

/// How long the runtime may take to hand over a terminal, and a logger to say that it is ready.
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// How long outputs may drain once the process is deleted, and a logger take to end.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(10);

/// Why streams cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WiringError {
    #[error("standard stream {uri:?}: {reason}")]
    Unusable { uri: String, reason: &'static str },
    #[error("standard stream {target}")]
    Io { target: String, source: io::Error },
    #[error("copying {target}")]
    Copy { target: String, source: containerd_shim::Error },
    #[error("logger {path} did not become ready")]
    Logger { path: String },
    #[error("the runtime handed over no terminal within {HANDSHAKE_TIME_MAX:?}")]
    NoTerminal,
}

fn io_error(target: &str) -> impl FnOnce(io::Error) -> WiringError + use<> {
    let target = target.to_owned();
    move |source| WiringError::Io { target, source }
}

/// Where one output goes.
#[derive(Debug, PartialEq, Eq)]
enum Sink {
    None,
    Fifo(String),
    File(PathBuf),
    Logger { path: String, args: Vec<String> },
}

impl Sink {
    fn parse(uri: &str) -> Result<Self, WiringError> {
        let unusable = |reason| WiringError::Unusable { uri: uri.to_owned(), reason };
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(match uri {
                "" => Self::None,
                path if is_fifo(path) => Self::Fifo(path.to_owned()),
                // Its user makes it, unlike one with a scheme: a path that leads nowhere is
                // a FIFO that is gone.
                path if Path::new(path).exists() => Self::File(path.into()),
                _ => return Err(unusable("there is no such FIFO")),
            });
        };
        match scheme {
            "fifo" => Ok(Self::Fifo(rest.to_owned())),
            "file" => Ok(Self::File(rest.into())),
            "binary" => {
                let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
                if !path.starts_with('/') {
                    return Err(unusable("the logger's path is not absolute"));
                }
                let words = query.split('&').filter(|pair| !pair.is_empty());
                let args = words.flat_map(|pair| {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    [decoded(key), decoded(value)]
                });
                let args = args.filter(|word| !word.is_empty()).collect();
                Ok(Self::Logger { path: decoded(path), args })
            }
            _ => Err(unusable("unknown scheme")),
        }
    }
}

fn is_fifo(path: &str) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// Percent-decoding of a URI's part.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = (byte == b'%').then(|| after.get(..2)).flatten();
        let value = hex
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match value {
            Some(value) => {
                bytes.push(value);
                rest = &after[2..];
            }
            None => {
                bytes.push(if byte == b'+' { b' ' } else { byte });
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a process gets for a stream that was not asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unasked {
    /// `/dev/null`: the runtime opens the container's own.
    Null,
    /// A pipe that is empty, or whose contents are thrown away. A restore takes what it is given,
    /// and the host's `/dev/null` lies on a mount that the next dump could not see.
    Pipe,
}

/// Whose streams they are, for loggers and for pipe owners.
pub(crate) struct Owner<'a> {
    pub(crate) namespace: &'a str,
    pub(crate) id: &'a str,
    pub(crate) options: &'a Options,
    pub(crate) reaper: &'a Arc<Reaper>,
}

/// The shim's half of a process's streams, for as long as the process is known.
#[derive(Default)]
pub(crate) struct Wiring {
    input: IoTasks,
    others: Mutex<Others>,
}

/// All but the input.
#[derive(Default)]
struct Others {
    terminal: Option<Pty>,
    outputs: Vec<tokio::task::JoinHandle<()>>,
    logger: Option<(u32, Waiter)>,
}

/// The shim's pipe ends, copied only once the runtime has started the process.
pub(crate) struct Pending {
    stdin: Option<OwnedFd>,
    outputs: Vec<(OwnedFd, Sink)>,
}

impl Wiring {
    fn others(&self) -> std::sync::MutexGuard<'_, Others> {
        self.others.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes pipes for a process without a terminal.
    ///
    /// Errors: unusable names; a logger that does not start.
    pub(crate) async fn pipes(
        &self,
        stdio: &Stdio,
        unasked: Unasked,
        owner: &Owner<'_>,
    ) -> Result<(Streams, Pending), WiringError> {
        let mut streams = Streams::default();
        let mut pending = Pending { stdin: None, outputs: Vec::new() };
        if !stdio.stdin.is_empty() {
            let (read, write) = owned_pipe(owner.options)?;
            streams.stdin = Some(read);
            pending.stdin = Some(write);
        } else if unasked == Unasked::Pipe {
            // Without a writer it reads as the end of the file.
            streams.stdin = Some(owned_pipe(owner.options)?.0);
        }
        let sinks = [Sink::parse(&stdio.stdout)?, Sink::parse(&stdio.stderr)?];
        let [stdout, stderr] = sinks;
        if let Sink::Logger { path, args } = stdout {
            let (out_read, out_write) = owned_pipe(owner.options)?;
            let (err_read, err_write) = owned_pipe(owner.options)?;
            self.start_logger(&path, &args, vec![out_read, err_read], owner).await?;
            (streams.stdout, streams.stderr) = (Some(out_write), Some(err_write));
            return Ok((streams, pending));
        }
        for (sink, stream) in [(stdout, &mut streams.stdout), (stderr, &mut streams.stderr)] {
            if sink != Sink::None || unasked == Unasked::Pipe {
                let (read, write) = owned_pipe(owner.options)?;
                *stream = Some(write);
                pending.outputs.push((read, sink));
            }
        }
        Ok((streams, pending))
    }

    /// Starts copying between containerd's ends and the pipes.
    pub(crate) fn attach(&self, stdio: &Stdio, pending: Pending) -> Result<(), WiringError> {
        if let Some(fd) = pending.stdin {
            let to = pipe::Sender::from_owned_fd(fd).map_err(io_error("stdin"))?;
            self.copy_in(&stdio.stdin, to)?;
        }
        for (fd, sink) in pending.outputs {
            let from = pipe::Receiver::from_owned_fd(fd).map_err(io_error("output pipe"))?;
            self.copy_out(from, sink)?;
        }
        Ok(())
    }

    /// Takes over the terminal that the runtime made and starts copying.
    pub(crate) async fn attach_terminal(
        &self,
        stdio: &Stdio,
        console: ConsoleSocket,
        owner: &Owner<'_>,
    ) -> Result<(), WiringError> {
        let terminal = Pty::new(console.receive().await?)
            .map_err(|source| WiringError::Copy { target: "terminal".to_owned(), source })?;
        match Sink::parse(&stdio.stdout)? {
            Sink::Logger { path, args } => {
                let (out_read, out_write) = owned_pipe(owner.options)?;
                let (err_read, _) = owned_pipe(owner.options)?;
                self.start_logger(&path, &args, vec![out_read, err_read], owner).await?;
                let mut to = pipe::Sender::from_owned_fd(out_write).map_err(io_error("logger"))?;
                let mut from = UntilError(terminal.clone());
                self.others().outputs.push(tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                }));
            }
            sink => self.copy_out(terminal.clone(), sink)?,
        }
        if !stdio.stdin.is_empty() {
            self.copy_in(&stdio.stdin, terminal.clone())?;
        }
        self.others().terminal = Some(terminal);
        Ok(())
    }

    fn copy_in<W>(&self, path: &str, to: W) -> Result<(), WiringError>
    where
        W: tokio::io::AsyncWrite + Send + Unpin + 'static,
    {
        let path = path.strip_prefix("fifo://").unwrap_or(path);
        let wrong = |source| WiringError::Copy { target: path.to_owned(), source };
        self.input.copy_from_fifo(path, to).map_err(wrong)
    }

    fn copy_out<R>(&self, from: R, sink: Sink) -> Result<(), WiringError>
    where
        R: AsyncRead + Send + Unpin + 'static,
    {
        let mut from = UntilError(from);
        match sink {
            Sink::Fifo(path) if Path::new(&path).starts_with(path::STREAMS) => {
                let mut to = Newest::open(&path).map_err(io_error(&path))?;
                self.others().outputs.push(tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                }));
                Ok(())
            }
            Sink::Fifo(path) => {
                let to = Fifo::open(&path).map_err(io_error(&path))?;
                self.others().outputs.push(tokio::spawn(to.copy(from)));
                Ok(())
            }
            Sink::File(path) => {
                let target = path.display().to_string();
                if let Some(dir) = path.parent() {
                    std::fs::create_dir_all(dir).map_err(io_error(&target))?;
                }
                let mut options = std::fs::OpenOptions::new();
                let file = options.append(true).create(true).mode(0o644).open(&path);
                let mut to = tokio::fs::File::from_std(file.map_err(io_error(&target))?);
                self.others().outputs.push(tokio::spawn(async move {
                    if let Err(error) = tokio::io::copy(&mut from, &mut to).await {
                        tracing::debug!("copying to {target}: {error}");
                    }
                    // A tokio file writes behind; what it still holds goes out here.
                    let _ = tokio::io::AsyncWriteExt::flush(&mut to).await;
                }));
                Ok(())
            }
            Sink::None => {
                self.others().outputs.push(tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
                }));
                Ok(())
            }
            Sink::Logger { .. } => Ok(()),
        }
    }

    async fn start_logger(
        &self,
        path: &str,
        args: &[String],
        outputs: Vec<OwnedFd>,
        owner: &Owner<'_>,
    ) -> Result<(), WiringError> {
        let (ready_read, ready_write) = std::io::pipe().map_err(io_error(path))?;
        let mut command = Command::new(path);
        command
            .args(args)
            .env("CONTAINER_ID", owner.id)
            .env("CONTAINER_NAMESPACE", owner.namespace);
        command.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::null());
        command.stderr(std::process::Stdio::null());
        let mut fds = outputs;
        fds.push(ready_write.into());
        sys::inherit(&mut command, fds);
        let (child, done) = owner.reaper.spawn(&mut command).map_err(io_error(path))?;
        drop(command);
        let mut ready = pipe::Receiver::from_owned_fd(ready_read.into()).map_err(io_error(path))?;
        // Ready is a byte or a closed pipe; a logger that died closed it as well.
        let answered = tokio::time::timeout(HANDSHAKE_TIME_MAX, ready.read(&mut [0])).await;
        if answered.is_err() {
            let _ = owner.reaper.signal(child.id(), Signal::SIGKILL);
            return Err(WiringError::Logger { path: path.to_owned() });
        }
        self.others().logger = Some((child.id(), done));
        Ok(())
    }

    /// Lets the process see the end of its input once what was written is read.
    pub(crate) fn close_input(&self) {
        self.input.close_input();
    }

    /// Sets the terminal's size in characters. Errors: the kernel's; not found without a terminal.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> io::Result<()> {
        let others = self.others();
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the process has no terminal");
        sys::set_window_size(others.terminal.as_ref().ok_or_else(missing)?, columns, rows)
    }

    /// Ends every copy after a failed start.
    pub(crate) async fn abort(&self, reaper: &Reaper) {
        self.input.abort().await;
        let others = std::mem::take(&mut *self.others());
        for output in others.outputs {
            output.abort();
            let _ = output.await;
        }
        if let Some((pid, _)) = others.logger {
            let _ = reaper.signal(pid, Signal::SIGTERM);
        }
    }

    /// Delivers what is still buffered, for a bounded time, and lets go of everything.
    pub(crate) async fn shutdown(&self, reaper: &Reaper) {
        self.input.shutdown().await;
        let others = std::mem::take(&mut *self.others());
        let deadline = tokio::time::Instant::now() + DRAIN_TIME_MAX;
        for mut output in others.outputs {
            if tokio::time::timeout_at(deadline, &mut output).await.is_err() {
                output.abort();
                // Its descriptors are closed once it has ended.
                let _ = output.await;
            }
        }
        if let Some((pid, done)) = others.logger {
            let _ = reaper.signal(pid, Signal::SIGTERM);
            if tokio::time::timeout(DRAIN_TIME_MAX, done).await.is_err() {
                let _ = reaper.signal(pid, Signal::SIGKILL);
            }
        }
    }
}

/// Reads `R` up to its first error, which counts as the end of the file.
///
/// The master side of a terminal ends with `EIO` once the last process has closed the other side.
/// `tokio::io::copy` reads ahead while its writer is busy, and an error of the reader makes it drop
/// what it holds. At the end of the file it delivers that first.
struct UntilError<R>(R);

impl<R: AsyncRead + Unpin> AsyncRead for UntilError<R> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut self.0).poll_read(context, buffer));
        if let Err(error) = read
            && error.raw_os_error() != Some(libc::EIO)
        {
            tracing::warn!("reading a container's output: {error}");
        }
        Poll::Ready(Ok(()))
    }
}

/// A pipe, owned by the user that the task's options name. Both ends block and close on exec.
fn owned_pipe(options: &Options) -> Result<(OwnedFd, OwnedFd), WiringError> {
    let (read, write) = std::io::pipe().map_err(io_error("pipe"))?;
    if options.io_uid != 0 || options.io_gid != 0 {
        for fd in [read.as_raw_fd(), write.as_raw_fd()] {
            let path = format!("/proc/self/fd/{fd}");
            let owner = (Some(options.io_uid), Some(options.io_gid));
            std::os::unix::fs::chown(path, owner.0, owner.1).map_err(io_error("pipe"))?;
        }
    }
    Ok((read.into(), write.into()))
}

/// The socket through which the runtime hands over a terminal. It lies in the bundle; the runtime,
/// which runs there, knows it by its file name, since the whole path may be too long for a socket.
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
    name: String,
}

impl ConsoleSocket {
    /// Errors: I/O.
    pub(crate) fn bind(bundle: &Path, process: &str) -> Result<Self, WiringError> {
        let name = format!("pty{process}.sock");
        // An exec's id may be long as well.
        let name = if name.len() <= 90 { name } else { format!("pty{process:.80}.sock") };
        let path = bundle.join(&name);
        let listener = bind_in(bundle, &name).map_err(io_error(&name))?;
        Ok(Self { listener, path, name })
    }

    /// Its name within the bundle.
    pub(crate) fn name(&self) -> &Path {
        Path::new(&self.name)
    }

    async fn receive(&self) -> Result<File, WiringError> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            receive_fd(&stream).await
        };
        match tokio::time::timeout(HANDSHAKE_TIME_MAX, receive).await {
            Ok(file) => file.map_err(io_error("terminal")),
            Err(_) => Err(WiringError::NoTerminal),
        }
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens on the socket `name` in `dir`, however long the path of `dir` is. Errors: I/O.
pub(crate) fn bind_in(dir: &Path, name: &str) -> io::Result<UnixListener> {
    let dir_fd = File::open(dir)?;
    match std::fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let short = format!("/proc/self/fd/{}/{name}", dir_fd.as_raw_fd());
    UnixListener::bind(short)
}

#[expect(unsafe_code, reason = "descriptors in a message arrive as numbers")]
async fn receive_fd(stream: &UnixStream) -> io::Result<File> {
    loop {
        stream.readable().await?;
        let received = stream.try_io(tokio::io::Interest::READABLE, || {
            let mut name = [0; 4096];
            let mut buffers = [IoSliceMut::new(&mut name)];
            let mut control = nix::cmsg_space!([std::os::fd::RawFd; 1]);
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<()>(stream.as_raw_fd(), &mut buffers, Some(&mut control), flags)?;
            let rights = message.cmsgs()?.find_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
                _ => None,
            });
            rights.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no descriptor sent"))
        });
        match received {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // SAFETY: the kernel has just made this descriptor for us; nothing else owns it.
            received => return received.map(|fd| unsafe { File::from_raw_fd(fd) }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};

    use nix::sys::termios::SetArg;

    #[test]
    fn names_of_sinks() {
        assert_eq!(Sink::parse("").unwrap(), Sink::None);
        assert_eq!(Sink::parse("file:///var/log/x").unwrap(), Sink::File("/var/log/x".into()));
        assert_eq!(Sink::parse("fifo:///f").unwrap(), Sink::Fifo("/f".to_owned()));
        let logger = Sink::parse("binary:///bin/log?_LOGGING=%2Fa%20b&flag").unwrap();
        let args = ["_LOGGING", "/a b", "flag"].map(str::to_owned).to_vec();
        assert_eq!(logger, Sink::Logger { path: "/bin/log".to_owned(), args });
        for wrong in ["binary://relative", "http://x"] {
            assert!(matches!(Sink::parse(wrong), Err(WiringError::Unusable { .. })), "{wrong}");
        }
    }

    #[tokio::test]
    async fn output_to_a_file_is_complete_after_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("deep/out.log");
        let (reaper, options) = (Reaper::for_tests(), Options::default());
        let owner = Owner { namespace: "ns", id: "c", options: &options, reaper: &reaper };
        let stdio = Stdio::new("", &format!("file://{}", log.display()), "", false);
        let wiring = Wiring::default();
        let (streams, pending) = wiring.pipes(&stdio, Unasked::Null, &owner).await.unwrap();
        wiring.attach(&stdio, pending).unwrap();
        let mut command = Command::new("seq");
        command.arg("20000").stdout(streams.stdout.unwrap());
        let (_, done) = reaper.spawn(&mut command).unwrap();
        drop(command);
        done.await.unwrap();
        wiring.shutdown(&reaper).await;
        assert_eq!(std::fs::read_to_string(log).unwrap().lines().count(), 20000);
    }

    /// A terminal that holds `bytes` bytes of output, whose last process has gone.
    fn ended_terminal(bytes: usize) -> (Pty, std::thread::JoinHandle<()>) {
        let pty = nix::pty::openpty(None, None).unwrap();
        let mut settings = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut settings);
        nix::sys::termios::tcsetattr(&pty.slave, SetArg::TCSANOW, &settings).unwrap();
        let mut slave = File::from(pty.slave);
        let writer = std::thread::spawn(move || slave.write_all(&vec![b'x'; bytes]).unwrap());
        (Pty::new(File::from(pty.master)).unwrap(), writer)
    }

    /// Method: the process ends while the FIFO is full, and the client reads only after that.
    #[tokio::test]
    async fn the_end_of_a_terminals_output_waits_for_a_slow_reader() {
        const BYTES: usize = (64 << 10) + 9000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stdout");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let wiring = Wiring::default();
        let (terminal, writer) = ended_terminal(BYTES);
        let sink = Sink::Fifo(path.to_str().unwrap().to_owned());
        wiring.copy_out(terminal, sink).unwrap();
        let written = tokio::task::spawn_blocking(|| writer.join().unwrap());
        // Without an end where the FIFO holds less: a short write may take a page of it.
        let _ = tokio::time::timeout(Duration::from_secs(5), written).await;
        // The copy meets the end of the terminal, if it does not wait for the FIFO.
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut output = Vec::new();
        client.read_to_end(&mut output).await.unwrap();
        assert_eq!(output.len(), BYTES);
    }

    #[tokio::test]
    async fn the_end_of_a_terminals_output_reaches_a_file() {
        const BYTES: usize = 9000;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.log");
        let wiring = Wiring::default();
        let (terminal, writer) = ended_terminal(BYTES);
        wiring.copy_out(terminal, Sink::File(path.clone())).unwrap();
        tokio::task::spawn_blocking(|| writer.join().unwrap()).await.unwrap();
        wiring.shutdown(&Reaper::for_tests()).await;
        assert_eq!(std::fs::metadata(&path).unwrap().len(), BYTES as u64);
    }

    /// Method: a shell script that speaks the loggers' protocol.
    #[tokio::test]
    async fn a_logger_gets_both_outputs_on_descriptors_3_and_4() {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("logger");
        let text = "#!/bin/sh\nexec 5>&-\necho \"$CONTAINER_NAMESPACE/$CONTAINER_ID $1\" > \"$1\"\n\
                    cat <&3 >> \"$1\"\ncat <&4 >> \"$1\"\n";
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();
        let out = dir.path().join("out");
        let (reaper, options) = (Reaper::for_tests(), Options::default());
        let owner = Owner { namespace: "ns", id: "c", options: &options, reaper: &reaper };
        let uri = format!("binary://{}?{}", script.display(), out.display());
        let stdio = Stdio::new("", &uri, &uri, false);
        let wiring = Wiring::default();
        let (streams, pending) = wiring.pipes(&stdio, Unasked::Null, &owner).await.unwrap();
        wiring.attach(&stdio, pending).unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", "echo one; echo two >&2"]);
        command.stdout(streams.stdout.unwrap()).stderr(streams.stderr.unwrap());
        let (_, done) = reaper.spawn(&mut command).unwrap();
        drop(command);
        done.await.unwrap();
        let (_, logger) = wiring.others().logger.take().unwrap();
        logger.await.unwrap();
        let mut text = String::new();
        File::open(&out).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, format!("ns/c {}\none\ntwo\n", out.display()));
    }

    #[tokio::test]
    async fn a_terminal_is_received_through_a_socket_in_a_deep_bundle() {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("b".repeat(120));
        std::fs::create_dir(&bundle).unwrap();
        let console = ConsoleSocket::bind(&bundle, "").unwrap();
        let name = console.name().to_owned();
        let sender = std::thread::spawn(move || {
            let dir = File::open(&bundle).unwrap();
            let path = format!("/proc/self/fd/{}/{}", dir.as_raw_fd(), name.display());
            let stream = std::os::unix::net::UnixStream::connect(path).unwrap();
            let fds = [File::open("/dev/null").unwrap().into()].map(|fd: OwnedFd| fd);
            let raw = [fds[0].as_raw_fd()];
            let message = [nix::sys::socket::ControlMessage::ScmRights(&raw)];
            let name = [std::io::IoSlice::new(b"/dev/ptmx")];
            let flags = MsgFlags::empty();
            nix::sys::socket::sendmsg::<()>(stream.as_raw_fd(), &name, &message, flags, None)
                .unwrap();
        });
        let mut received = console.receive().await.unwrap();
        sender.join().unwrap();
        assert_eq!(received.read(&mut [0]).unwrap(), 0);
    }
}
