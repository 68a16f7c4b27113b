//! Output into a FIFO that a client of containerd reads.
//!
//! The shim keeps its own reader while it copies, so that a client can go and another can come.
//! When the process has closed its output, the shim waits until the client has read all of it,
//! because a client may drop what is left: containerd 1.7's library closes its end as soon as
//! Delete returns, whatever the FIFO still holds. The wait is bounded: a client that does not read
//! for [`UNREAD_TIME_MAX`] holds back nothing, and without a client there is no wait.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::AsyncRead;
use tokio::net::unix::pipe;

use crate::sys;

/// How long a client may leave the rest of an output unread.
pub(crate) const UNREAD_TIME_MAX: Duration = Duration::from_secs(2);
/// Pause between two looks at what is unread.
const LOOK_PAUSE: Duration = Duration::from_millis(2);

/// See the module comment.
pub(crate) struct Fifo {
    to: pipe::Sender,
    own_reader: File,
}

impl Fifo {
    /// Opens the FIFO at `path`, with or without a client. Errors: I/O.
    pub(crate) fn open(path: &str) -> io::Result<Self> {
        let own_reader = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
        // Driven by the reactor: a copy parks no thread, and cancelling it closes the FIFO at once.
        let to = pipe::OpenOptions::new().open_sender(path)?;
        Ok(Self { to, own_reader })
    }

    /// Copies `from` to its end, then waits until the client has read it.
    pub(crate) async fn copy<R: AsyncRead + Unpin>(self, mut from: R) {
        let Self { mut to, own_reader } = self;
        if let Err(error) = tokio::io::copy(&mut from, &mut to).await {
            tracing::debug!("copying a container's output: {error}");
        }
        drop(from);
        // From here on an error condition on the FIFO says that no client has it open.
        drop(own_reader);
        let (mut unread, mut since) = (usize::MAX, Instant::now());
        while let Ok(left @ 1..) = sys::unread_bytes(&to)
            && has_reader(&to)
        {
            if left != unread {
                (unread, since) = (left, Instant::now());
            } else if since.elapsed() > UNREAD_TIME_MAX {
                tracing::info!("a client left {left} bytes of a container's output unread");
                return;
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        }
    }
}

fn has_reader(to: &pipe::Sender) -> bool {
    let mut fds = [PollFd::new(to.as_fd(), PollFlags::empty())];
    let polled = poll(&mut fds, PollTimeout::ZERO);
    let error = fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR));
    polled.is_ok() && !error
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::path::Path;

    fn fifo(dir: &Path) -> String {
        let path = dir.join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn client(path: &str) -> File {
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap()
    }

    /// Copies a few bytes of a process that has ended.
    fn copy_of_ended(path: &str) -> impl Future<Output = Duration> + use<> {
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(b"the end").unwrap();
        let from = pipe::Receiver::from_owned_fd(read.into()).unwrap();
        let fifo = Fifo::open(path).unwrap();
        async move {
            let begun = Instant::now();
            fifo.copy(from).await;
            begun.elapsed()
        }
    }

    #[tokio::test]
    async fn a_copy_ends_when_the_client_has_read_everything() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut client = client(&path);
        let copy = tokio::spawn(copy_of_ended(&path));
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!copy.is_finished());
        let mut text = [0; 32];
        assert_eq!(client.read(&mut text).unwrap(), 7);
        let took = copy.await.unwrap();
        assert!(took < UNREAD_TIME_MAX, "{took:?}");
        assert_eq!(client.read(&mut text).unwrap(), 0, "the FIFO is released");
    }

    #[tokio::test]
    async fn nobody_waits_for_a_client_that_is_gone_or_does_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let took = copy_of_ended(&path).await;
        assert!(took < UNREAD_TIME_MAX / 2, "without a client: {took:?}");
        let _client = client(&path);
        let took = copy_of_ended(&path).await;
        assert!((UNREAD_TIME_MAX..UNREAD_TIME_MAX * 3).contains(&took), "{took:?}");
    }
}
