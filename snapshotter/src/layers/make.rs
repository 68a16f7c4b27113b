//! Layers that a node has only as blobs of its containerd, made into objects when a neighbour asks.
//!
//! The neighbour names the blob and its diff ID. Only a blob that this node's containerd has
//! unpacked, under that very diff ID, is read; it is decompressed, hashed and cut into chunks, one
//! layer at a time. The answer is a stream, so that the caller knows that the node works; the
//! work is finished whether he still listens or not, and its result is kept like a layer that came
//! from elsewhere.

use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{Stream, StreamExt as _};
use godwit_protos::peer::{MakeLayerProgress, MakeLayerRequest};
use godwit_protos::{Digest, Subject};
use sha2::{Digest as _, Sha256};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tonic::Status;

use super::guard::Guard;
use super::{LAYER_BYTES_MAX, LEASE, LayerError, QUEUE, keep};
use crate::containerd::{ClientError, FoundLayer};
use crate::content::{layer, on};
use crate::node::Node;
use crate::peer::{Connection, blobs};
use crate::retention::has_room;
use crate::supervise::blocking;

/// Neighbours that are asked to make the same layer.
const MAKERS_MAX: usize = 3;

/// How long one may take.
const MAKE_MAX: Duration = Duration::from_secs(300);

/// How often one says that it works, and how long it is waited for to say so.
const PROGRESS: Duration = Duration::from_millis(500);
const PROGRESS_MAX: Duration = Duration::from_secs(2);

/// How long one may do next to nothing ([`Guard`]): others come first, or what is made is being
/// flushed.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Layers that wait to be made, with the one that is.
const QUEUED_MAX: usize = 16;

/// A layer that was made: its object and its length in bytes.
type Made = (Digest, u64);

/// Has neighbours that have the layer's blob make its object. Returns those who did, and the names
/// of those who left a question without an answer, or make it too slowly.
///
/// They begin at the same time; once the first is done, the others have as long again.
pub(super) async fn ask(
    connections: &[Arc<Connection>],
    layer: &FoundLayer,
) -> (Vec<(Digest, u64, Arc<Connection>)>, Vec<String>) {
    let (holders, mut silent) = blobs::holders(connections.to_vec(), "", layer.blob.digest).await;
    // The fastest come last.
    let makers = holders.into_iter().rev().take(MAKERS_MAX);
    let mut makers: FuturesUnordered<_> = makers
        .map(|peer| async move {
            let made = ask_one(&peer, layer, IDLE_MAX).await;
            (peer, made)
        })
        .collect();
    let begun = tokio::time::Instant::now();
    let (mut made, mut deadline) = (Vec::new(), begun + MAKE_MAX);
    while let Ok(Some((peer, answer))) = tokio::time::timeout_at(deadline, makers.next()).await {
        match answer {
            Ok((root, size_bytes)) => {
                if made.is_empty() {
                    deadline = tokio::time::Instant::now() + begun.elapsed();
                }
                made.push((root, size_bytes, peer));
            }
            Err(None) => silent.push(peer.node.clone()),
            Err(Some(reason)) => {
                let (node, layer) = (&peer.node, layer.diff_id);
                tracing::info!(node, %layer, reason, "layer was not made");
            }
        }
    }
    (made, silent)
}

/// Errors: why it was not made; nothing where there was no answer in time, or too little was done
/// in one `idle_max`.
async fn ask_one(
    peer: &Connection,
    layer: &FoundLayer,
    idle_max: Duration,
) -> Result<Made, Option<String>> {
    let asked = MakeLayerRequest {
        diff_id: layer.diff_id.as_bytes().to_vec().into(),
        blob: layer.blob.digest.as_bytes().to_vec().into(),
    };
    let mut client = peer.client();
    let late = |_elapsed| None;
    let failed = |status: Status| Some(status.message().to_owned());
    let call = tokio::time::timeout(PROGRESS_MAX, client.make_layer(asked));
    let mut answer = call.await.map_err(late)?.map_err(failed)?.into_inner();
    let (begun, mut guard) = (Instant::now(), Guard::new(LAYER_BYTES_MAX, idle_max));
    loop {
        let progress = tokio::time::timeout(PROGRESS_MAX, answer.message());
        let Some(progress) = progress.await.map_err(late)?.map_err(failed)? else {
            return Err(Some("its answer ended early".to_owned()));
        };
        if !progress.root.is_empty() {
            let root = Digest::try_from(&progress.root[..]);
            return Ok((root.map_err(|error| Some(error.to_string()))?, progress.done_bytes));
        }
        if guard.look(begun.elapsed(), progress.done_bytes).is_some() {
            return Err(None);
        }
    }
}

/// Makes layers for neighbours, one at a time.
#[derive(Debug)]
pub struct Maker {
    node: Arc<Node>,
    queue: Semaphore,
    turn: Mutex<()>,
}

impl Maker {
    /// One that makes nothing yet.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node, queue: Semaphore::new(QUEUED_MAX), turn: Mutex::default() }
    }

    /// Makes the object of a layer for a neighbour, and tells how it goes until it is there.
    pub async fn make(
        self: Arc<Self>,
        (diff_id, blob): (Digest, Digest),
        send: mpsc::Sender<Result<MakeLayerProgress, Status>>,
    ) {
        let done = Arc::new(AtomicU64::new(0));
        let mut work = tokio::spawn({
            let done = done.clone();
            async move {
                let made = tokio::time::timeout(MAKE_MAX, self.make_one(diff_id, blob, done)).await;
                made.unwrap_or_else(|_elapsed| Err(Status::deadline_exceeded("it took too long")))
            }
        });
        let last = loop {
            tokio::select! {
                made = &mut work => break made.unwrap_or_else(|_| Err(Status::cancelled("stopping"))),
                () = tokio::time::sleep(PROGRESS) => {
                    let done_bytes = done.load(Ordering::Relaxed);
                    let progress = MakeLayerProgress { done_bytes, ..MakeLayerProgress::default() };
                    // A caller that does not listen any more may come back.
                    let _ = send.try_send(Ok(progress));
                }
            }
        };
        let last = last.map(|(root, done_bytes)| {
            let root = root.as_bytes().to_vec().into();
            MakeLayerProgress { done_bytes, root }
        });
        let _ = send.send(last).await;
    }

    async fn make_one(
        &self,
        diff_id: Digest,
        blob: Digest,
        done: Arc<AtomicU64>,
    ) -> Result<Made, Status> {
        let failed = |error: LayerError| Status::internal(crate::error::chain(&error));
        let unavailable = |error: ClientError| Status::unavailable(error.to_string());
        let busy = |_cause| Status::resource_exhausted("busy with other layers");
        let node = &self.node;
        let _place = self.queue.try_acquire().map_err(busy)?;
        let _turn = self.turn.lock().await;
        let kept = node.store.snapshots(&Subject::ImageLayer(diff_id));
        if let Some((_, kept)) = kept.map_err(|error| failed(error.into()))?.first() {
            return Ok((kept.root, kept.size_bytes));
        }
        let found = node.containerd.find_blob(blob).await.map_err(unavailable)?;
        let found = found.filter(|found| found.diff_id == Some(diff_id));
        let found =
            found.ok_or_else(|| Status::not_found(format!("no layer {diff_id} in {blob}")))?;
        if !has_room(node) {
            return Err(Status::resource_exhausted("the disk is short"));
        }
        let bytes =
            node.containerd.read_blob(&found.namespace, blob, 0).await.map_err(unavailable)?;
        let (reader, pump) = piped(bytes);
        let lease = node.store.lease("layer", LEASE);
        let store = node.store.clone();
        let work = blocking(move || -> Result<_, LayerError> {
            let mut writer = store.writer(&lease);
            let mut stream = Hashed { inner: plain(reader)?, hash: Sha256::new(), done };
            let (root, size_bytes) = layer::put(&mut stream, Path::new("layer"), &mut writer)?;
            writer.flush()?;
            let found = Digest::from_bytes(stream.hash.finalize().into());
            let made = if found == diff_id {
                Ok((root, size_bytes))
            } else {
                Err(ClientError::WrongContent(diff_id).into())
            };
            made.map(|made| (made, lease))
        });
        let (made, ()) = tokio::join!(work, pump);
        let ((root, size_bytes), _lease) = made.map_err(failed)?;
        keep(node, diff_id, root, size_bytes).await.map_err(failed)?;
        tracing::info!(layer = %diff_id, bytes = size_bytes, "made a layer for a neighbour");
        Ok((root, size_bytes))
    }
}

/// A reader for a thread, and what must run beside it: it moves the stream's pieces.
fn piped<E: std::error::Error + Send + Sync + 'static>(
    bytes: impl Stream<Item = Result<Bytes, E>>,
) -> (Pieces, impl Future<Output = ()>) {
    let (send, receive) = mpsc::channel(QUEUE);
    let pump = async move {
        let mut bytes = std::pin::pin!(bytes);
        while let Some(piece) = bytes.next().await {
            if send.send(piece.map_err(io::Error::other)).await.is_err() {
                return;
            }
        }
    };
    (Pieces { receive, rest: Bytes::new() }, pump)
}

/// Bytes that come in pieces.
struct Pieces {
    receive: mpsc::Receiver<io::Result<Bytes>>,
    rest: Bytes,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.receive.blocking_recv() {
                None => return Ok(0),
                Some(piece) => self.rest = piece?,
            }
        }
        let bytes = self.rest.len().min(into.len());
        into[..bytes].copy_from_slice(&self.rest.split_to(bytes));
        Ok(bytes)
    }
}

/// The uncompressed bytes of a layer, by what it begins with: gzip (RFC 1952), zstd (RFC 8878), or
/// a plain tar stream.
fn plain(mut blob: impl Read + Send + 'static) -> Result<Box<dyn Read + Send>, LayerError> {
    let unreadable = |source: io::Error| on("read", Path::new("layer"))(source);
    let mut begin = Vec::new();
    blob.by_ref().take(4).read_to_end(&mut begin).map_err(unreadable)?;
    let (is_gzip, is_zstd) =
        (begin.starts_with(&[0x1f, 0x8b]), begin.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]));
    let blob = BufReader::new(io::Cursor::new(begin).chain(blob));
    Ok(if is_gzip {
        Box::new(flate2::bufread::MultiGzDecoder::new(blob))
    } else if is_zstd {
        Box::new(zstd::stream::read::Decoder::with_buffer(blob).map_err(unreadable)?)
    } else {
        Box::new(blob)
    })
}

/// Hashes and counts what is read, and ends with an error beyond the largest layer.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
    done: Arc<AtomicU64>,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let bytes = self.inner.read(into)?;
        self.hash.update(&into[..bytes]);
        let before = self.done.fetch_add(bytes as u64, Ordering::Relaxed);
        if before + bytes as u64 > LAYER_BYTES_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::Descriptor;
    use crate::peer::tests::{Script, locating, making};
    use godwit_protos::peer::LocateResponse;
    use std::io::Write as _;

    #[tokio::test]
    async fn whoever_falls_silent_over_a_layer_is_not_waited_for_beside_one_who_makes_it() {
        let digest = Digest::of(b"blob");
        let blob = Descriptor { media_type: String::new(), digest, size_bytes: 1 };
        let layer = FoundLayer { diff_id: Digest::of(b"layer"), blob, above: Vec::new() };
        let peers = [
            locating("empty", Some(LocateResponse::default())).await,
            making("mute", digest, Script::Stalls).await,
            making("honest", digest, Script::Honest).await,
        ];
        let begun = Instant::now();
        let (made, _) = ask(&peers, &layer).await;
        assert!(begun.elapsed() < PROGRESS_MAX, "{:?}", begun.elapsed());
        let made: Vec<_> =
            made.into_iter().map(|(root, bytes, peer)| (root, bytes, peer.node.clone())).collect();
        assert_eq!(made, [(Digest::of(b"root"), 7, "honest".to_owned())]);
        let (made, silent) = ask(&peers[..2], &layer).await;
        assert!(made.is_empty() && silent == ["mute"], "{silent:?}");
        assert!(begun.elapsed() < 3 * PROGRESS_MAX, "{:?}", begun.elapsed());
    }

    /// Method: it says that it works, and has done as much as before.
    #[tokio::test]
    async fn whoever_only_says_that_he_makes_a_layer_is_given_up_on() {
        let digest = Digest::of(b"blob");
        let blob = Descriptor { media_type: String::new(), digest, size_bytes: 1 };
        let layer = FoundLayer { diff_id: Digest::of(b"layer"), blob, above: Vec::new() };
        let peer = making("idle", digest, Script::Chatters).await;
        let (begun, second) = (Instant::now(), Duration::from_secs(1));
        assert_eq!(ask_one(&peer, &layer, second).await.unwrap_err(), None);
        assert!((second..2 * second).contains(&begun.elapsed()), "{:?}", begun.elapsed());
    }

    /// Pieces as short as can be, so that a header never comes in one.
    async fn unpacked(blob: Vec<u8>) -> Result<Vec<u8>, String> {
        let pieces: Vec<io::Result<Bytes>> =
            blob.chunks(3).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let (reader, pump) = piped(futures::stream::iter(pieces));
        let work = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            let read = plain(reader).map_err(|error| error.to_string());
            read?.read_to_end(&mut bytes).map_err(|error| error.to_string())?;
            Ok(bytes)
        });
        tokio::join!(work, pump).0.unwrap()
    }

    #[tokio::test]
    async fn layers_are_read_whatever_they_are_compressed_with() {
        let plain = b"a tar stream, or nearly so. ".repeat(3000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = zstd::bulk::compress(&plain, 1).unwrap();
        let twice = [gzip.clone(), gzip.clone()].concat();
        for (blob, expected) in [
            (plain.clone(), plain.clone()),
            (gzip.clone(), plain.clone()),
            (zstd, plain.clone()),
            (twice, plain.repeat(2)),
            (Vec::new(), Vec::new()),
        ] {
            assert!(unpacked(blob).await.unwrap() == expected);
        }
        assert!(unpacked(gzip[..gzip.len() / 2].to_vec()).await.is_err(), "cut short");
    }
}
