//! Where the mirror has its answers from: containerd's content store and images of this node, else the neighbours'.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt as _, stream};
use godwit_protos::Digest;
use godwit_protos::peer::LocateRequest;
use serde::Deserialize;
use serde::de::IgnoredAny;
use sha2::{Digest as _, Sha256};
use tokio::fs::File;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _, AsyncWriteExt as _};

use crate::caching::retention::{free_bytes, has_room};
use crate::config::Tags;
use crate::containerd::{BLOB_BYTES_MAX_WHOLE, ClientError};
use crate::contents::connect;
use crate::directory::LOOKUP_MAX;
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::blobs::{self, Demand};
use crate::peer::shunned::SHUN_SILENT;

/// How long a neighbour has to answer a hello.
const HELLO_MAX: Duration = Duration::from_millis(300);

/// Bytes of a blob that are read at once.
const PIECE_BYTES: usize = 256 << 10;

/// What is expected of a neighbour that sends a blob.
const DEMAND: Demand = Demand { patience: Duration::from_secs(1), rate_min: blobs::RATE_MIN };

/// A blob.
pub(super) struct Found {
    pub(super) size_bytes: u64,
    pub(super) pieces: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
}

/// A blob of this node, or of a neighbour; `None` if nobody has it.
pub(super) async fn blob(node: &Arc<Node>, digest: Digest) -> Option<Found> {
    match here(node, digest).await {
        Ok(Some(found)) => return Some(found),
        Ok(None) => {}
        Err(error) => tracing::warn!(%digest, %error, "blob cannot be read here"),
    }
    elsewhere(node, digest).await
}

async fn here(node: &Arc<Node>, digest: Digest) -> Result<Option<Found>, ClientError> {
    let Some(found) = node.containerd.find_blob(digest).await? else { return Ok(None) };
    let pieces = node.containerd.read_blob(&found.namespace, digest, 0).await?;
    let pieces = pieces.map(|piece| piece.map_err(io::Error::other));
    Ok(Some(Found { size_bytes: found.size_bytes, pieces: Box::pin(pieces) }))
}

/// A blob from the neighbours that say they have it: where one stops, the next one goes on.
///
/// It is on this node's disk, and right, before anything is passed on: containerd keeps what it got of a blob and goes on
/// behind it, so that a wrong byte would spoil every later pull too.
async fn elsewhere(node: &Arc<Node>, digest: Digest) -> Option<Found> {
    let connections = neighbours(node).await;
    let (holders, silent) = blobs::holders(connections, "", digest).await;
    node.shunned.add(&silent, SHUN_SILENT);
    let from: Vec<String> = holders.iter().map(|peer| peer.node.clone()).collect();
    let begin = Reading { node: node.clone(), digest, holders, current: None, sent: 0 };
    let pieces = stream::unfold(begin, |mut reading| async move {
        let piece = reading.next().await?;
        Some((piece, reading))
    });
    let mut pieces = Box::pin(pieces);
    let (first, size_bytes) = pieces.next().await?.ok()?;
    let rest = pieces.map(|piece| piece.map(|(data, _)| data));
    let pieces = stream::iter([Ok(first)]).chain(rest);
    if size_bytes > free_bytes(node).unwrap_or(0) || !has_room(node) {
        tracing::warn!(%digest, size_bytes, "no room for a neighbour's blob");
        return None;
    }
    match spool(&node.config.state_dir, pieces, size_bytes).await {
        Ok((file, found)) if found == digest => {
            Some(Found { size_bytes, pieces: Box::pin(read_back(file)) })
        }
        Ok(_) => {
            tracing::warn!(%digest, nodes = ?from, "other bytes came than were asked for");
            node.shunned.add(&from, SHUN_SILENT);
            None
        }
        Err(error) => {
            tracing::warn!(%digest, %error, "blob did not come whole");
            None
        }
    }
}

/// Keeps the pieces in a file without a name below `dir`, and returns it with the digest of what is in it.
async fn spool(
    dir: &Path,
    pieces: impl Stream<Item = io::Result<Bytes>>,
    size_bytes: u64,
) -> io::Result<(File, Digest)> {
    let mut options = File::options();
    let mut file =
        options.read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(dir).await?;
    let (mut hash, mut written) = (Sha256::new(), 0);
    let mut pieces = std::pin::pin!(pieces);
    while let Some(piece) = pieces.next().await {
        let piece = piece?;
        written += piece.len() as u64;
        if written > size_bytes {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        hash.update(&piece);
        file.write_all(&piece).await?;
    }
    file.flush().await?;
    file.rewind().await?;
    Ok((file, Digest::from_bytes(hash.finalize().into())))
}

/// The bytes of a file.
fn read_back(file: File) -> impl Stream<Item = io::Result<Bytes>> + Send {
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

async fn neighbours(node: &Arc<Node>) -> Vec<Arc<Connection>> {
    let (connections, absent) = connect(node, HELLO_MAX, &node.shunned.names()).await;
    node.shunned.add(&absent, SHUN_SILENT);
    connections
}

/// A blob on its way from one neighbour after the other.
struct Reading {
    node: Arc<Node>,
    digest: Digest,
    /// Who else has it, the fastest last.
    holders: Vec<Arc<Connection>>,
    current: Option<(Arc<Connection>, blobs::Pieces)>,
    sent: u64,
}

impl Reading {
    /// The next piece and the size of the whole. `None` at its end; an error when nobody has the rest.
    async fn next(&mut self) -> Option<io::Result<(Bytes, u64)>> {
        loop {
            let Some((peer, pieces)) = &mut self.current else {
                let Some(peer) = self.holders.pop() else {
                    return Some(Err(io::ErrorKind::UnexpectedEof.into()));
                };
                match blobs::open(&peer, "", self.digest, self.sent, DEMAND).await {
                    Ok(pieces) => self.current = Some((peer, pieces)),
                    Err(_) => self.node.shunned.add([&peer.node], SHUN_SILENT),
                }
                continue;
            };
            match pieces.next().await {
                Some(Ok((data, size_bytes))) => {
                    self.sent += data.len() as u64;
                    return Some(Ok((data, size_bytes)));
                }
                // The length that was announced to the client tells whether this is all.
                None => return None,
                Some(Err(error)) => {
                    tracing::info!(node = peer.node, %error, "blob was cut; asking elsewhere");
                    self.node.shunned.add([&peer.node], SHUN_SILENT);
                    self.current = None;
                }
            }
        }
    }
}

/// A manifest or index, checked, and its media type.
pub(super) async fn manifest(node: &Arc<Node>, digest: Digest) -> Option<(String, Vec<u8>)> {
    let Found { size_bytes, mut pieces } = blob(node, digest).await?;
    if size_bytes > BLOB_BYTES_MAX_WHOLE {
        return None;
    }
    let mut bytes = Vec::new();
    while bytes.len() as u64 <= size_bytes {
        let Some(piece) = pieces.next().await else { break };
        bytes.extend_from_slice(&piece.ok()?);
    }
    if Digest::of(&bytes) != digest {
        return None;
    }
    let media_type = media_type(&bytes)?;
    Some((media_type, bytes))
}

/// What a manifest says it is; the media type is optional in OCI's.
fn media_type(bytes: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Manifest {
        media_type: Option<String>,
        manifests: Option<IgnoredAny>,
        layers: Option<IgnoredAny>,
    }
    let manifest: Manifest = serde_json::from_slice(bytes).ok()?;
    let of_kind = |kind: &str| format!("application/vnd.oci.image.{kind}.v1+json");
    let implied = match manifest {
        Manifest { manifests: Some(_), .. } => Some(of_kind("index")),
        Manifest { layers: Some(_), .. } => Some(of_kind("manifest")),
        Manifest { .. } => None,
    };
    manifest.media_type.or(implied)
}

/// What an image's name stands for here, in whichever namespace; else what most of the neighbours say that it does.
pub(super) async fn tag(node: &Arc<Node>, name: &str, tags: Tags) -> Option<Digest> {
    match node.containerd.find_image(name).await {
        Ok(Some(target)) => return Some(target),
        Ok(None) => {}
        Err(error) => tracing::warn!(name, %error, "image cannot be looked up here"),
    }
    if tags != Tags::Neighbours {
        return None;
    }
    let asked = LocateRequest { images: vec![name.to_owned()], ..LocateRequest::default() };
    let asks = neighbours(node).await.into_iter().map(|peer| {
        let asked = asked.clone();
        async move {
            let mut client = peer.client();
            let answer = tokio::time::timeout(LOOKUP_MAX, client.locate(asked)).await.ok()?.ok()?;
            Digest::try_from(&answer.into_inner().images.first()?.digest[..]).ok()
        }
    });
    let mut votes: HashMap<Digest, usize> = HashMap::new();
    for digest in futures::future::join_all(asks).await.into_iter().flatten() {
        *votes.entry(digest).or_default() += 1;
    }
    votes.into_iter().max_by_key(|(digest, votes)| (*votes, *digest)).map(|(digest, _)| digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_blob_is_whole_on_disk_and_hashed_before_it_is_passed_on() {
        let dir = tempfile::tempdir().unwrap();
        let pieces = |texts: &[&'static str]| {
            let pieces = texts.iter().map(|text| Ok(Bytes::from_static(text.as_bytes())));
            stream::iter(pieces.collect::<Vec<io::Result<Bytes>>>())
        };
        let (file, digest) = spool(dir.path(), pieces(&["one ", "two"]), 7).await.unwrap();
        assert_eq!(digest, Digest::of(b"one two"));
        let back: Vec<_> = read_back(file).collect().await;
        let back: Vec<u8> = back.into_iter().flat_map(|piece| piece.unwrap().to_vec()).collect();
        assert_eq!(back, b"one two");
        let longer = spool(dir.path(), pieces(&["one ", "two"]), 6).await;
        assert!(longer.is_err(), "more came than was announced");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "something is left");
    }

    #[test]
    fn a_manifest_without_a_media_type_is_told_by_what_it_holds() {
        let of = |text: &str| media_type(text.as_bytes());
        let docker = "application/vnd.docker.distribution.manifest.v2+json";
        let text = format!("{{\"mediaType\": \"{docker}\", \"layers\": []}}");
        assert_eq!(of(&text).as_deref(), Some(docker));
        let index = "application/vnd.oci.image.index.v1+json";
        assert_eq!(of("{\"manifests\": []}").as_deref(), Some(index));
        let manifest = "application/vnd.oci.image.manifest.v1+json";
        assert_eq!(of("{\"layers\": [], \"config\": {}}").as_deref(), Some(manifest));
        assert_eq!(of("{\"rootfs\": {}}"), None, "a configuration");
        assert_eq!(of("ustar"), None, "a layer");
    }
}
