//! A neighbour's blob on this node's disk: whole, and right, before anything of it is passed on.
//!
//! 1. ask one who has it, from its beginning;
//! 2. where one breaks off or ends early, the next one goes on;
//! 3. hash what has come. If it is something else and came from one alone, it lied: it is
//!    skipped, and the others are asked from the beginning. If it came from several, it is unknown
//!    which: the last of them is asked for all of it, alone.
//!
//! Promise: a neighbour that lies or breaks off costs time, and never the blob while another has it
//! and sends it well: with every turn one of those asked is done with.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, stream};
use godwit_protos::Digest;
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use crate::peer::backoff::{BACKOFF_LIAR, BACKOFF_SILENT, Backoff};
use crate::peer::blobs::{self, Demand};
use crate::peer::{Connection, PeerError};

/// Bytes that are read back at once.
const PIECE_BYTES: usize = 256 << 10;

/// What is expected of a neighbour that sends a blob.
const DEMAND: Demand = Demand { patience: Duration::from_secs(1), rate_min: blobs::RATE_MIN };

/// How a neighbour's part of a blob ended, if not well.
#[derive(Debug, thiserror::Error)]
enum SpoolError {
    /// This node's disk failed.
    #[error("cannot keep it")]
    Here(#[source] io::Error),
    /// There is no room for what was announced.
    #[error("there is no room for {0} bytes")]
    NoRoom(u64),
    /// It refused, or did not answer.
    #[error("it was not had")]
    Refused(#[source] PeerError),
    /// It broke off, or was too slow.
    #[error("it was cut after {0} bytes")]
    Cut(u64, #[source] io::Error),
    /// It ended well before its end.
    #[error("it ended after {0} bytes")]
    Early(u64),
    /// The lengths that were announced, or what came, contradict each other.
    #[error("it is of another length")]
    Length,
}

/// Brings the blob from `holders`, the last of them first, into a file without a name below `dir`,
/// and returns that with its length. `None`: no neighbour sent it well. Those to blame for that go
/// to `backoff`.
///
/// Errors: this node's disk. `fits` says whether there is room for so many bytes.
pub(super) async fn bring(
    dir: &Path,
    digest: Digest,
    mut holders: Vec<Arc<Connection>>,
    backoff: &Backoff,
    fits: impl Fn(u64) -> bool,
) -> io::Result<Option<(File, u64)>> {
    let mut spool = Spool::begin(dir, digest).await?;
    while let Some(peer) = holders.pop() {
        let node = &peer.node;
        match spool.go_on(&peer, &fits).await {
            Ok(()) if spool.is_right() => return spool.finish().await.map(Some),
            Ok(()) | Err(SpoolError::Length) => {
                tracing::warn!(%digest, nodes = ?spool.from, "other bytes came than were asked for");
                if spool.from.len() > 1 {
                    holders.push(peer);
                } else {
                    backoff.add([node], BACKOFF_LIAR);
                }
                spool = Spool::begin(dir, digest).await?;
            }
            Err(SpoolError::Here(error)) => return Err(error),
            Err(error @ SpoolError::NoRoom(_)) => tracing::warn!(%digest, node, %error, "no blob"),
            Err(error) => {
                let error = crate::error::chain(&error);
                tracing::info!(%digest, node, error, "blob did not come whole; asking elsewhere");
                backoff.add([node], BACKOFF_SILENT);
            }
        }
    }
    Ok(None)
}

/// What has come of a blob.
struct Spool {
    digest: Digest,
    file: File,
    hash: Sha256,
    written: u64,
    /// The length that was announced.
    size_bytes: Option<u64>,
    /// Who sent something.
    from: Vec<String>,
}

impl Spool {
    async fn begin(dir: &Path, digest: Digest) -> io::Result<Self> {
        let mut options = File::options();
        let options = options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE);
        let (file, hash) = (options.open(dir).await?, Sha256::new());
        Ok(Self { digest, file, hash, written: 0, size_bytes: None, from: Vec::new() })
    }

    /// Adds what `peer` sends from where it stopped. `Ok` once it is as long as was announced.
    async fn go_on(
        &mut self,
        peer: &Connection,
        fits: &impl Fn(u64) -> bool,
    ) -> Result<(), SpoolError> {
        let opened = blobs::open(peer, "", self.digest, self.written, DEMAND).await;
        let mut pieces = opened.map_err(SpoolError::Refused)?;
        let mut is_first = true;
        loop {
            let Some(piece) = pieces.next().await else {
                return Err(SpoolError::Early(self.written));
            };
            let (data, announced) = piece.map_err(|error| SpoolError::Cut(self.written, error))?;
            if std::mem::take(&mut is_first) {
                if self.size_bytes.is_none() && !fits(announced) {
                    return Err(SpoolError::NoRoom(announced));
                }
                self.from.push(peer.node.clone());
            }
            let size_bytes = *self.size_bytes.get_or_insert(announced);
            if announced != size_bytes || data.len() as u64 > size_bytes - self.written {
                return Err(SpoolError::Length);
            }
            self.hash.update(&data);
            self.file.write_all(&data).await.map_err(SpoolError::Here)?;
            self.written += data.len() as u64;
            if self.written == size_bytes {
                return Ok(());
            }
        }
    }

    fn is_right(&self) -> bool {
        Digest::from_bytes(self.hash.clone().finalize().into()) == self.digest
    }

    /// The file, to be read from its beginning.
    async fn finish(mut self) -> io::Result<(File, u64)> {
        self.file.flush().await?;
        self.file.rewind().await?;
        Ok((self.file, self.written))
    }
}

/// The bytes of a file.
pub(super) fn read_back(file: File) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(file), |file| async move {
        let mut file = file?;
        let mut piece = BytesMut::with_capacity(PIECE_BYTES);
        match file.read_buf(&mut piece).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(piece.freeze()), Some(file))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::tests::{Sends, sending};

    /// What `script` brings of `blob`, the last one asked first, and who is skipped for it as
    /// silent and as a liar.
    async fn brought(
        blob: &[u8],
        script: Vec<(&str, Sends)>,
    ) -> (Option<Vec<u8>>, Vec<String>, Vec<String>) {
        let (dir, backoff) = (tempfile::tempdir().unwrap(), Backoff::default());
        let mut holders = Vec::new();
        for (name, sends) in script {
            holders.push(sending(name, sends).await);
        }
        let fits = |size_bytes| size_bytes <= 1 << 20;
        let found = bring(dir.path(), Digest::of(blob), holders, &backoff, fits).await.unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something has a name");
        let mut bytes = None;
        if let Some((file, size_bytes)) = found {
            let pieces: Vec<_> = read_back(file).collect().await;
            let read: Vec<u8> = pieces.into_iter().flat_map(|piece| piece.unwrap()).collect();
            assert_eq!(read.len() as u64, size_bytes);
            bytes = Some(read);
        }
        let is_liar = |name: &String| backoff.time_left(name).unwrap() > BACKOFF_SILENT;
        let mut names = backoff.names();
        names.sort();
        let (liars, silent) = names.into_iter().partition(is_liar);
        (bytes, silent, liars)
    }

    fn blob() -> Vec<u8> {
        (0..40_000u32).flat_map(u32::to_le_bytes).collect()
    }

    fn flipped(at: usize) -> Vec<u8> {
        let mut bytes = blob();
        bytes[at] ^= 1;
        bytes
    }

    #[tokio::test]
    async fn whoever_sends_something_else_is_found_out_and_the_others_are_asked_for_all_of_it() {
        let (blob, size) = (blob(), blob().len() as u64);
        let honest = || ("honest", Sends::all(blob.clone()));
        let longer = [&blob[..], b"more"].concat();
        let shorter = Sends::all(blob[..1000].to_vec());
        let overlong = Sends { announced: size - 1, ..Sends::all(longer) };
        for lie in [Sends::all(flipped(0)), Sends::all(flipped(159_999)), shorter, overlong] {
            let script = vec![("unasked", Sends::all(flipped(0))), honest(), ("liar", lie)];
            let (bytes, silent, liars) = brought(&blob, script).await;
            assert!(bytes.as_ref() == Some(&blob));
            assert!(silent.is_empty() && liars == ["liar"], "{silent:?} {liars:?}");
        }
        let liars = vec![("a", Sends::all(flipped(0))), ("b", Sends::all(flipped(7)))];
        let (bytes, silent, liars) = brought(&blob, liars).await;
        assert!(bytes.is_none() && silent.is_empty() && liars == ["a", "b"], "{liars:?}");
    }

    #[tokio::test]
    async fn where_one_breaks_off_or_ends_early_the_next_goes_on() {
        let blob = blob();
        for breaks in [true, false] {
            let announced = blob.len() as u64;
            let part = Sends { announced, breaks, bytes: blob[..99_000].to_vec() };
            let nothing = Sends { announced, breaks, bytes: Vec::new() };
            let script =
                vec![("honest", Sends::all(blob.clone())), ("part", part), ("nothing", nothing)];
            let (bytes, silent, liars) = brought(&blob, script).await;
            assert!(bytes.as_ref() == Some(&blob), "breaks: {breaks}");
            assert!(liars.is_empty() && silent == ["nothing", "part"], "{silent:?} {liars:?}");
        }
    }

    /// Method: wrong bytes, or a wrong length, and then nothing more. The one who goes on behind
    /// them is not to blame.
    #[tokio::test]
    async fn whoever_goes_on_behind_a_lie_is_asked_for_all_of_it_and_not_taken_for_the_liar() {
        let blob = blob();
        let begun = |bytes: Vec<u8>, announced| Sends { announced, breaks: true, bytes };
        let size = blob.len() as u64;
        for lie in [begun(flipped(0)[..99_000].to_vec(), size), begun(blob[..99].to_vec(), 7000)] {
            let script = vec![("honest", Sends::all(blob.clone())), ("liar", lie)];
            let (bytes, silent, liars) = brought(&blob, script).await;
            assert!(bytes.as_ref() == Some(&blob));
            assert!(liars.is_empty() && silent == ["liar"], "{silent:?} {liars:?}");
        }
    }

    #[tokio::test]
    async fn whoever_announces_more_than_there_is_room_for_is_not_waited_for() {
        let blob = blob();
        let boasts = Sends { announced: 1 << 50, ..Sends::all(blob.clone()) };
        let script = vec![("honest", Sends::all(blob.clone())), ("boasts", boasts)];
        let (bytes, silent, liars) = brought(&blob, script).await;
        assert!(bytes.as_ref() == Some(&blob));
        assert!(silent.is_empty() && liars.is_empty(), "{silent:?} {liars:?}");
    }
}
