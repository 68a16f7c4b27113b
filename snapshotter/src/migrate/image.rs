//! Bringing an image to a node that never saw it, without a registry.
//!
//! Its blobs come from the content stores of neighbours and, where none has them, from the
//! source's. containerd checks each blob against its digest when it is committed, and each layer
//! against its diff ID when it is unpacked.

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use godwit_protos::Digest;
use godwit_protos::peer::DescribeResponse;

use super::MigrationError;
use super::destination::Connections;
use crate::containerd::{Client, ClientError, Descriptor, ImageContent};
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::blobs::{self, Demand, RATE_MIN};

/// Blobs that are fetched at once.
const BLOBS_AT_ONCE: usize = 3;

/// Longest wait for the next piece of a blob, of a neighbour and of the source, which no other node
/// can replace.
const PATIENCE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// A neighbour is left for the next one if it is slower than this share of what the source was
/// measured at; if that was not measured yet, than [`RATE_MIN`].
const RATE_SHARE_MIN: f64 = 0.9;

/// The peers that blobs are fetched from.
#[derive(Clone, Copy, Debug)]
pub enum BlobPeers<'a> {
    /// Neighbours, and the source for what they do not deliver.
    Migration(&'a Connections),
    /// These neighbours; there is no source any more.
    Neighbours(&'a [Arc<Connection>]),
}

impl BlobPeers<'_> {
    fn neighbours(&self) -> Vec<Arc<Connection>> {
        match self {
            Self::Migration(connections) => connections.neighbours(),
            Self::Neighbours(neighbours) => neighbours.to_vec(),
        }
    }

    fn source(&self) -> Option<&Arc<Connection>> {
        match self {
            Self::Migration(connections) => Some(&connections.source),
            Self::Neighbours(_) => None,
        }
    }
}

/// The name under which the image of a described container is kept here.
///
/// It is the container's own name for it, unless that stands for other content here, or for other
/// content than the container's at the source: a migration never gives a name other content. Then
/// it is a name by digest, which no content but its own can have.
pub async fn name_here(
    node: &Node,
    namespace: &str,
    described: &DescribeResponse,
    target: &Descriptor,
) -> Result<String, MigrationError> {
    let name = &described.image;
    let is_other =
        |existing: Option<Descriptor>| existing.is_some_and(|one| one.digest != target.digest);
    let is_taken = !name.is_empty() && is_other(node.containerd.image(namespace, name).await?);
    if name.is_empty() || described.image_renamed || is_taken {
        return Ok(by_digest(name, target.digest));
    }
    Ok(name.clone())
}

/// The warning if the image is not kept under the container's name for it.
pub fn renaming_warning(described: &DescribeResponse, kept_as: &str) -> Option<String> {
    (kept_as != described.image).then(|| {
        format!(
            "the image name {:?} does not stand for the content that the container was made of; the destination keeps \
             that as {kept_as}",
            described.image
        )
    })
}

/// `REPOSITORY@DIGEST`, where `name` is `REPOSITORY:TAG`, `REPOSITORY@DIGEST` or nothing.
fn by_digest(name: &str, digest: Digest) -> String {
    let name = name.split('@').next().unwrap_or_default();
    let tag = name.rfind(':').filter(|at| !name[*at..].contains('/'));
    let repository = tag.map_or(name, |at| &name[..at]);
    let repository = if repository.is_empty() { "godwit.io/image" } else { repository };
    format!("{repository}@{digest}")
}

/// Makes `name` an image of this node, unpacked for `snapshotter`, and returns what it is made of.
///
/// Errors: [`MigrationError::NoBlob`] when no node delivers a blob; containerd's errors, also when
/// the name stands for another image here.
pub async fn bring(
    node: &Node,
    namespace: &str,
    (name, target): (&str, &Descriptor),
    snapshotter: &str,
    holders: BlobPeers<'_>,
) -> Result<ImageContent, MigrationError> {
    if let Some(existing) = node.containerd.image(namespace, name).await?
        && existing.digest != target.digest
    {
        let (name, existing, wanted) = (name.to_owned(), existing.digest, target.digest);
        return Err(ClientError::ImageDiffers { name, existing, wanted }.into());
    }
    let lease = node.containerd.lease(namespace).await?;
    let source = holders.source().map(|source| node.links.of(&source.node));
    let source = source.and_then(|channel| channel.throughput_bytes_per_second);
    let bring = Bring {
        client: lease.client(),
        namespace,
        holders,
        rate_min: source.map_or(RATE_MIN, |rate| rate * RATE_SHARE_MIN),
        silent: Mutex::default(),
    };
    let brought = async {
        bring.blob(target).await?;
        // Indexes name manifests, manifests name the rest: each must be here before the next can be
        // read.
        let content = loop {
            match bring.client.image_content(namespace, target).await {
                Ok(content) => break content,
                Err(ClientError::NotFound(object)) => bring.missing(&object).await?,
                Err(error) => return Err(error.into()),
            }
        };
        let (blobs, bring, layers) = (content.blobs().cloned(), &bring, &content.layers);
        // Of a layer that came from neighbours no node may have a blob: our snapshotter gets it in
        // the same way again.
        let missing = stream::iter(blobs.collect::<Vec<_>>())
            .map(|blob| async move {
                match bring.blob(&blob).await {
                    Err(MigrationError::NoBlob(digest)) if layers.contains(&blob) => {
                        Ok(Some(digest))
                    }
                    other => other.map(|()| None),
                }
            })
            .buffer_unordered(BLOBS_AT_ONCE)
            .try_collect::<Vec<_>>()
            .await?;
        let unpacked = bring.client.unpack(namespace, target, snapshotter).await;
        let unpacked = unpacked.map_err(|error| match missing.into_iter().flatten().next() {
            Some(digest) => MigrationError::NoBlob(digest),
            None => error.into(),
        })?;
        bring.client.create_image(namespace, name, target).await?;
        Ok(unpacked)
    };
    let brought = brought.await;
    lease.release().await?;
    brought
}

struct Bring<'a> {
    client: &'a Client,
    namespace: &'a str,
    holders: BlobPeers<'a>,
    /// Bytes per second below which a neighbour is not worth waiting for.
    rate_min: f64,
    /// Neighbours that let a lookup or a blob wait for too long: not asked again.
    silent: Mutex<HashSet<String>>,
}

impl Bring<'_> {
    /// Fetches a blob that containerd said it has not; a node that has it says its size.
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
        let [neighbour, source] = PATIENCE;
        let of_neighbour = Demand { patience: neighbour, rate_min: self.rate_min };
        let of_source = Demand { patience: source, rate_min: 0.0 };
        let holders = self.holders(digest).await;
        let neighbours = holders.iter().map(|peer| (peer, of_neighbour));
        let source = self.holders.source().map(|source| (source, of_source));
        for (peer, demand) in neighbours.chain(source) {
            match self.fetch_from(peer, digest, size, demand).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    self.silent().insert(peer.node.clone());
                    let error = crate::error::chain(&error);
                    tracing::warn!(node = %peer.node, %digest, error, "cannot fetch a blob; asking another node");
                }
            }
        }
        Err(MigrationError::NoBlob(digest))
    }

    fn silent(&self) -> MutexGuard<'_, HashSet<String>> {
        self.silent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Neighbours that say they have the blob.
    async fn holders(&self, digest: Digest) -> Vec<Arc<Connection>> {
        let mut neighbours = self.holders.neighbours();
        neighbours.retain(|peer| !self.silent().contains(&peer.node));
        let (holders, silent) = blobs::holders(neighbours, self.namespace, digest).await;
        self.silent().extend(silent);
        holders
    }

    async fn fetch_from(
        &self,
        peer: &Arc<Connection>,
        digest: Digest,
        size: Option<u64>,
        demand: Demand,
    ) -> Result<(), MigrationError> {
        let size = match size {
            Some(size) => size,
            None => {
                let mut pieces = blobs::open(peer, self.namespace, digest, 0, demand).await?;
                let first = pieces.next().await;
                first
                    .transpose()
                    .map_err(|error| MigrationError::Broken(error.to_string()))?
                    .map_or(0, |(_, total)| total)
            }
        };
        let (peer, namespace) = (peer.clone(), self.namespace.to_owned());
        let pieces = move |offset| {
            stream::once(async move {
                let opened = blobs::open(&peer, &namespace, digest, offset, demand).await;
                opened.map_err(io::Error::other)
            })
            .try_flatten()
            .map_ok(|(data, _)| data)
        };
        Ok(self.client.write_blob(self.namespace, digest, size, pieces).await?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_by_digest_has_no_tag() {
        let digest = Digest::of(b"x");
        let names = [
            ("docker.io/library/redis:7", "docker.io/library/redis"),
            ("localhost:5000/redis", "localhost:5000/redis"),
            ("localhost:5000/redis:7@sha256:00", "localhost:5000/redis"),
            ("", "godwit.io/image"),
        ];
        for (name, repository) in names {
            assert_eq!(by_digest(name, digest), format!("{repository}@{digest}"));
        }
    }
}
