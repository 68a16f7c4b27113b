//! Which layer a chain ID stands for, and where containerd has a blob.

use std::collections::HashMap;

use containerd_client::services::v1::{Info, InfoRequest, ListContentRequest};
use godwit_protos::Digest;
use prost_types::Timestamp;

use super::images::LABEL_CONFIG;
use super::unpack::LABEL_UNCOMPRESSED;
use super::{Client, ClientError, Descriptor, ImageContent, optional};

/// Manifests that are looked through for a chain ID, the youngest first.
const MANIFESTS_MAX: usize = 256;

/// A layer of an image that is in containerd's content store, at least by manifest and
/// configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundLayer {
    /// Digest of its uncompressed bytes.
    pub diff_id: Digest,
    /// The layer as the manifest names it, mostly compressed. containerd may have it or not.
    pub blob: Descriptor,
    /// Digests of the image's layers above it, as the manifest names them.
    pub above: Vec<Digest>,
}

/// A blob in a namespace of containerd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundBlob {
    /// The namespace.
    pub namespace: String,
    /// Its length.
    pub size_bytes: u64,
    /// Digest of its uncompressed bytes, if it is a layer that containerd has unpacked.
    pub diff_id: Option<Digest>,
}

impl Client {
    /// The layer that leads to `chain_id`, of whichever image of `namespace` has it: while an image
    /// is pulled, its manifest and configuration are there before anything is unpacked.
    ///
    /// The chain ID is computed from the configuration, so it commits to the diff ID that comes
    /// back.
    pub async fn find_layer(
        &self,
        namespace: &str,
        chain_id: Digest,
    ) -> Result<Option<FoundLayer>, ClientError> {
        for manifest in self.manifests(namespace).await? {
            // Manifests without layers, artifacts and what is half there are no images.
            let Ok(image) = self.manifest_content(namespace, &manifest).await else { continue };
            let place = image.chain_ids.iter().position(|one| *one == chain_id);
            let found = place.and_then(|place| {
                let (diff_id, blob) = (image.diff_ids.get(place)?, image.layers.get(place)?);
                let above = image.layers[place + 1..].iter().map(|layer| layer.digest).collect();
                Some(FoundLayer { diff_id: *diff_id, blob: blob.clone(), above })
            });
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The image of `namespace` whose layers all together lead to `chain_id`, by its manifest;
    /// whether it has a name or not. The youngest, if there are several.
    pub async fn find_manifest(
        &self,
        namespace: &str,
        chain_id: Digest,
    ) -> Result<Option<ImageContent>, ClientError> {
        for manifest in self.manifests(namespace).await? {
            let Ok(image) = self.manifest_content(namespace, &manifest).await else { continue };
            if image.chain_id() == Some(chain_id) {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// The youngest manifests of `namespace`: blobs that refer to a configuration.
    async fn manifests(&self, namespace: &str) -> Result<Vec<Descriptor>, ClientError> {
        let filters = vec![format!("labels.{LABEL_CONFIG:?}")];
        let failed = |status| self.failed("list", "manifests", &status);
        let request = self.request(namespace, ListContentRequest { filters })?;
        let mut answers = self.content().list(request).await.map_err(failed)?.into_inner();
        let mut all: Vec<Info> = Vec::new();
        while let Some(answer) = answers.message().await.map_err(failed)? {
            all.extend(answer.info);
        }
        let age = |info: &Info| {
            let Timestamp { seconds, nanos } = info.created_at.unwrap_or_default();
            std::cmp::Reverse((seconds, nanos))
        };
        all.sort_by_key(age);
        let manifest = |info: Info| {
            let digest = info.digest.parse().ok()?;
            let size_bytes = info.size.try_into().unwrap_or(0);
            Some(Descriptor { media_type: String::new(), digest, size_bytes })
        };
        Ok(all.into_iter().filter_map(manifest).take(MANIFESTS_MAX).collect())
    }

    /// A namespace that has the blob: one that knows its diff ID, if there is one.
    pub async fn find_blob(&self, digest: Digest) -> Result<Option<FoundBlob>, ClientError> {
        let mut found: Option<FoundBlob> = None;
        for namespace in self.namespaces().await? {
            let request = self.request(&namespace, InfoRequest { digest: digest.to_string() })?;
            let answer = self.content().info(request).await;
            let answer =
                answer.map_err(|status| self.failed("look up", digest.to_string(), &status));
            let Some(info) = optional(answer)?.and_then(|answer| answer.into_inner().info) else {
                continue;
            };
            let diff_id = diff_id(&info.labels);
            if found.is_none() || diff_id.is_some() {
                let size_bytes = info.size.try_into().unwrap_or(0);
                found = Some(FoundBlob { namespace, size_bytes, diff_id });
            }
            if diff_id.is_some() {
                break;
            }
        }
        Ok(found)
    }

    /// What an image of that name stands for, in whichever namespace has one.
    pub async fn find_image(&self, name: &str) -> Result<Option<Digest>, ClientError> {
        for namespace in self.namespaces().await? {
            if let Some(target) = self.image(&namespace, name).await? {
                return Ok(Some(target.digest));
            }
        }
        Ok(None)
    }
}

fn diff_id(labels: &HashMap<String, String>) -> Option<Digest> {
    labels.get(LABEL_UNCOMPRESSED)?.parse().ok()
}
