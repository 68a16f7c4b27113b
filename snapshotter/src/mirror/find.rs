//! Where the mirror has its answers from: containerd's content store and images of this node, else
//! the neighbours'.

use std::collections::HashMap;
use std::hash::Hash;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use godwit_protos::Digest;
use godwit_protos::peer::{LocateRequest, LocateResponse};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::spool;
use crate::config::Tags;
use crate::containerd::{BLOB_BYTES_MAX_WHOLE, ClientError};
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::backoff::BACKOFF_SILENT;
use crate::peer::blobs;
use crate::peer::neighbours::connect;
use crate::retention::{free_bytes, has_room};

/// How long a neighbour has to answer a hello.
const HELLO_MAX: Duration = Duration::from_millis(300);

/// A blob.
pub(super) struct Found {
    pub(super) size_bytes: u64,
    pub(super) pieces: Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>,
}

/// A blob of this node, or of a neighbour if it has at most `most` bytes; `None` if no node has it.
pub(super) async fn blob(node: &Arc<Node>, digest: Digest, most: u64) -> Option<Found> {
    match here(node, digest).await {
        Ok(Some(found)) => return Some(found),
        Ok(None) => {}
        Err(error) => tracing::warn!(%digest, %error, "blob cannot be read here"),
    }
    elsewhere(node, digest, most).await
}

async fn here(node: &Arc<Node>, digest: Digest) -> Result<Option<Found>, ClientError> {
    let Some(found) = node.containerd.find_blob(digest).await? else { return Ok(None) };
    let pieces = node.containerd.read_blob(&found.namespace, digest, 0).await?;
    let pieces = pieces.map(|piece| piece.map_err(io::Error::other));
    Ok(Some(Found { size_bytes: found.size_bytes, pieces: Box::pin(pieces) }))
}

/// A blob from the neighbours that say they have it.
///
/// It is on this node's disk, and right, before anything is passed on: containerd keeps what it got
/// of a blob and goes on behind it, so that a wrong byte would spoil every later pull too.
async fn elsewhere(node: &Arc<Node>, digest: Digest, most: u64) -> Option<Found> {
    let connections = neighbours(node).await;
    let (holders, silent) = blobs::holders(connections, "", digest).await;
    node.backoff.add(&silent, BACKOFF_SILENT);
    let fits = |size_bytes| {
        size_bytes <= most && size_bytes <= free_bytes(node).unwrap_or(0) && has_room(node)
    };
    match spool::bring(&node.config.state_dir, digest, holders, &node.backoff, fits).await {
        Ok(found) => found.map(|(file, size_bytes)| {
            let pieces = Box::pin(spool::read_back(file));
            Found { size_bytes, pieces }
        }),
        Err(error) => {
            tracing::warn!(%digest, %error, "a neighbour's blob cannot be kept");
            None
        }
    }
}

async fn neighbours(node: &Arc<Node>) -> Vec<Arc<Connection>> {
    let (connections, absent) =
        connect(&node.config, &node.links, HELLO_MAX, &node.backoff.names()).await;
    node.backoff.add(&absent, BACKOFF_SILENT);
    connections
}

/// How long a blob of this node is, or as most of the neighbours say who have it; `None` if no node
/// has it.
pub(super) async fn size(node: &Arc<Node>, digest: Digest) -> Option<u64> {
    match node.containerd.find_blob(digest).await {
        Ok(Some(found)) => return Some(found.size_bytes),
        Ok(None) => {}
        Err(error) => tracing::warn!(%digest, %error, "blob cannot be looked up here"),
    }
    let blobs = vec![digest.to_string()];
    let answers = ask(node, LocateRequest { blobs, ..LocateRequest::default() }).await;
    most_said(answers.iter().filter_map(|answer| answer.blob_sizes.first().copied()))
}

/// A manifest or index, checked, and its media type.
pub(super) async fn manifest(node: &Arc<Node>, digest: Digest) -> Option<(String, Vec<u8>)> {
    let Found { size_bytes, mut pieces } = blob(node, digest, BLOB_BYTES_MAX_WHOLE).await?;
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

/// What an image's name stands for here, in whichever namespace; else what most of the neighbours
/// say that it does.
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
    let answers = ask(node, asked).await;
    most_said(answers.iter().filter_map(|answer| {
        let image = answer.images.first()?;
        Digest::try_from(&image.digest[..]).ok()
    }))
}

/// What the neighbours answer to a lookup.
async fn ask(node: &Arc<Node>, asked: LocateRequest) -> Vec<LocateResponse> {
    let answers = blobs::locate(neighbours(node).await, asked).await;
    answers.into_iter().filter_map(|(_, answer)| answer).collect()
}

fn most_said<T: Ord + Hash + Copy>(said: impl Iterator<Item = T>) -> Option<T> {
    let mut votes: HashMap<T, usize> = HashMap::new();
    for one in said {
        *votes.entry(one).or_default() += 1;
    }
    votes.into_iter().max_by_key(|(one, votes)| (*votes, *one)).map(|(one, _)| one)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_most_say_counts() {
        assert_eq!(most_said([7, 9, 7].into_iter()), Some(7));
        assert_eq!(most_said([].into_iter()), None::<u64>);
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
