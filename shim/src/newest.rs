//! A FIFO that keeps the newest output while no client reads it.
//!
//! The FIFOs of a container that a migration created have no client at first, and perhaps never one
//! (`ctr tasks attach`). A container must not block on output that no client reads, so once the
//! FIFO has been full for [`PATIENCE_MAX`], the oldest half of it is discarded. From then on it is
//! discarded after [`PATIENCE_MIN`], until a client makes room by reading: a client that reads
//! loses nothing, and one that comes late finds what was printed last.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::AsyncWrite;
use tokio::net::unix::pipe;
use tokio::time::Sleep;

/// How long a full FIFO waits for a client that has read before, as one on a slow line does.
const PATIENCE_MAX: Duration = Duration::from_secs(1);
/// How long it waits for one that has not.
const PATIENCE_MIN: Duration = Duration::from_millis(10);
/// What is discarded at once, in bytes: half of what a FIFO holds.
const DISCARDED_BYTES: usize = 32 << 10;

/// See the module comment.
pub(crate) struct Newest {
    to: pipe::Sender,
    /// Where the oldest output is discarded; it also keeps the FIFO open.
    from: pipe::Receiver,
    patience: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
    has_discarded: bool,
}

impl Newest {
    /// Opens the FIFO at both ends. Errors: I/O.
    pub(crate) fn open(path: &str) -> io::Result<Self> {
        let from = pipe::OpenOptions::new().open_receiver(path)?;
        let to = pipe::OpenOptions::new().open_sender(path)?;
        Ok(Self { to, from, patience: PATIENCE_MAX, waiting: None, has_discarded: false })
    }

    fn discard(&mut self) {
        let mut oldest = [0; DISCARDED_BYTES / 8];
        for _ in 0..8 {
            if !matches!(self.from.try_read(&mut oldest), Ok(1..)) {
                break;
            }
        }
        (self.patience, self.has_discarded) = (PATIENCE_MIN, true);
    }
}

impl AsyncWrite for Newest {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            if let Poll::Ready(written) = Pin::new(&mut self.to).poll_write(context, bytes) {
                let was_full = self.waiting.take().is_some();
                if was_full && !self.has_discarded {
                    // A client has made room.
                    self.patience = PATIENCE_MAX;
                }
                self.has_discarded = false;
                return Poll::Ready(written);
            }
            let patience = self.patience;
            let waiting =
                self.waiting.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
            ready!(waiting.as_mut().poll(context));
            self.waiting = None;
            self.discard();
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    fn fifo(dir: &std::path::Path) -> String {
        let path = dir.join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test]
    async fn without_a_client_the_newest_output_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut newest = Newest::open(&path).unwrap();
        for block in 0..64u8 {
            newest.write_all(&[block; 4096]).await.unwrap();
        }
        let mut client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        drop(newest);
        let mut seen = Vec::new();
        client.read_to_end(&mut seen).await.unwrap();
        assert!((DISCARDED_BYTES..=64 << 10).contains(&seen.len()), "{}", seen.len());
        assert!(seen.ends_with(&[63; 4096]));
        assert!(seen.is_sorted(), "only the oldest is discarded");
    }

    #[tokio::test]
    async fn a_slow_client_loses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut newest = Newest::open(&path).unwrap();
        let mut client = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let reading = tokio::spawn(async move {
            let (mut seen, mut buffer) = (0, vec![0; 32 << 10]);
            while seen < 256 << 10 {
                tokio::time::sleep(Duration::from_millis(30)).await;
                seen += client.read(&mut buffer).await.unwrap();
            }
            seen
        });
        newest.write_all(&vec![1; 256 << 10]).await.unwrap();
        assert_eq!(reading.await.unwrap(), 256 << 10);
    }
}
