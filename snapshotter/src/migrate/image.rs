//! Bringing an image to a node that never saw it, without a registry.
//!
//! Its blobs come from the content stores of neighbours and, where none has them, from the source's. containerd checks
//! each blob against its digest when it is committed, and each layer against its diff ID when it is unpacked.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use godwit_protos::Digest;
use godwit_protos::peer::{LocateRequest, ReadBlobRequest};

use super::MigrationError;
use super::destination::{Connections, LOOKUP_MAX};
use crate::containerd::{Client, ClientError, Descriptor, ImageContent};
use crate::node::Node;
use crate::peer::Connection;

/// Blobs that are fetched at once.
const BLOBS_AT_ONCE: usize = 3;

/// Longest wait for the next piece of a blob.
const PATIENCE: Duration = Duration::from_secs(10);

/// Makes `name` an image of this node, unpacked for `snapshotter`, and returns what it is made of.
///
/// Errors: [`MigrationError::NoBlob`] when nobody delivers a blob; containerd's errors, also when the name stands for
/// another image here.
pub async fn bring(
    node: &Node,
    namespace: &str,
    (name, target): (&str, &Descriptor),
    snapshotter: &str,
    connections: &Connections,
) -> Result<ImageContent, MigrationError> {
    if let Some(existing) = node.containerd.image(namespace, name).await?
        && existing.digest != target.digest
    {
        let (name, existing, wanted) = (name.to_owned(), existing.digest, target.digest);
        return Err(ClientError::ImageDiffers { name, existing, wanted }.into());
    }
    let lease = node.containerd.lease(namespace).await?;
    let bring = Bring { client: lease.client(), namespace, connections };
    let brought = async {
        bring.blob(target).await?;
        // Indexes name manifests, manifests name the rest: each must be here before the next can be read.
        let content = loop {
            match bring.client.image_content(namespace, target).await {
                Ok(content) => break content,
                Err(ClientError::NotFound(object)) => bring.missing(&object).await?,
                Err(error) => return Err(error.into()),
            }
        };
        let (blobs, bring) = (content.blobs().cloned().collect::<Vec<_>>(), &bring);
        stream::iter(blobs)
            .map(|blob| async move { bring.blob(&blob).await })
            .buffer_unordered(BLOBS_AT_ONCE)
            .try_collect::<Vec<()>>()
            .await?;
        bring.client.create_image(namespace, name, target).await?;
        Ok(bring.client.unpack(namespace, target, snapshotter).await?)
    };
    let brought = brought.await;
    lease.release().await?;
    brought
}

struct Bring<'a> {
    client: &'a Client,
    namespace: &'a str,
    connections: &'a Connections,
}

impl Bring<'_> {
    /// Fetches a blob that containerd said it has not; its size is asked of whoever has it.
    async fn missing(&self, object: &str) -> Result<(), MigrationError> {
        let digest = object.split_ascii_whitespace().find_map(|word| word.parse::<Digest>().ok());
        let digest = digest.ok_or_else(|| ClientError::NotFound(object.to_owned()))?;
        self.fetch(digest, None).await
    }

    async fn blob(&self, blob: &Descriptor) -> Result<(), MigrationError> {
        if self.client.has_blob(self.namespace, blob.digest).await?.is_some() {
            return Ok(());
        }
        self.fetch(blob.digest, Some(blob.size_bytes)).await
    }

    async fn fetch(&self, digest: Digest, size: Option<u64>) -> Result<(), MigrationError> {
        let holders = self.holders(digest).await;
        for peer in holders.iter().chain([&self.connections.source]) {
            match self.fetch_from(peer, digest, size).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let error = super::chain(&error);
                    tracing::warn!(node = %peer.node, %digest, error, "blob not had; asking elsewhere");
                }
            }
        }
        Err(MigrationError::NoBlob(digest))
    }

    /// Neighbours that say they have the blob.
    async fn holders(&self, digest: Digest) -> Vec<Arc<Connection>> {
        let asked = LocateRequest {
            blobs: vec![digest.to_string()],
            namespace: self.namespace.to_owned(),
            ..LocateRequest::default()
        };
        let ask = self.connections.neighbours.iter().map(|peer| {
            let asked = asked.clone();
            async move {
                let mut client = peer.client();
                let answer = tokio::time::timeout(LOOKUP_MAX, client.locate(asked)).await;
                let has = matches!(answer, Ok(Ok(answer)) if !answer.get_ref().blobs.is_empty());
                has.then(|| peer.clone())
            }
        });
        futures::future::join_all(ask).await.into_iter().flatten().collect()
    }

    async fn fetch_from(
        &self,
        peer: &Arc<Connection>,
        digest: Digest,
        size: Option<u64>,
    ) -> Result<(), MigrationError> {
        let size = match size {
            Some(size) => size,
            None => {
                let first = open(peer, self.namespace, digest, 0).await?.next().await;
                first
                    .transpose()
                    .map_err(|error| MigrationError::Broken(error.to_string()))?
                    .map_or(0, |(_, total)| total)
            }
        };
        let (peer, namespace) = (peer.clone(), self.namespace.to_owned());
        let pieces = move |offset| {
            stream::once(async move {
                let opened = open(&peer, &namespace, digest, offset).await;
                opened.map_err(io::Error::other)
            })
            .try_flatten()
            .map_ok(|(data, _)| data)
        };
        Ok(self.client.write_blob(self.namespace, digest, size, pieces).await?)
    }
}

/// Pieces of a blob, each with the size of the whole as far as the peer told it.
async fn open(
    peer: &Connection,
    namespace: &str,
    digest: Digest,
    offset: u64,
) -> Result<impl Stream<Item = io::Result<(Bytes, u64)>> + Send + Unpin + use<>, MigrationError> {
    let asked =
        ReadBlobRequest { namespace: namespace.to_owned(), digest: digest.to_string(), offset };
    let mut client = peer.client();
    let late = || MigrationError::Silent { patience: PATIENCE };
    let answer =
        tokio::time::timeout(PATIENCE, client.read_blob(asked)).await.map_err(|_cause| late())?;
    let pieces = answer.map_err(|status| peer.refused(status))?.into_inner();
    Ok(Box::pin(stream::unfold(Some(pieces), |pieces| async {
        let mut pieces = pieces?;
        match tokio::time::timeout(PATIENCE, pieces.message()).await {
            Err(_) => Some((Err(io::ErrorKind::TimedOut.into()), None)),
            Ok(Err(status)) => Some((Err(io::Error::other(status.message().to_owned())), None)),
            Ok(Ok(None)) => None,
            Ok(Ok(Some(piece))) => Some((Ok((piece.data, piece.total_bytes)), Some(pieces))),
        }
    })))
}
