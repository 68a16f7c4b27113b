//! Unpacking an image into a snapshotter, as containerd's own unpacker does it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::{ApplyRequest, ApplyResponse};
use godwit_protos::Digest;

use super::images::child_label;
use super::{Client, ClientError, Descriptor, ImageContent, Mount, parse_digest, present};

/// How often a layer is prepared again when another caller unpacks it at the same time.
const ATTEMPTS_MAX: u32 = 3;

/// Asks a remote snapshotter for the layer: it may answer "already exists" and have it.
pub(crate) const LABEL_REF: &str = "containerd.io/snapshot.ref";
/// Digest of a layer's uncompressed bytes, once they have been seen.
pub(super) const LABEL_UNCOMPRESSED: &str = "containerd.io/uncompressed";

impl Client {
    /// Unpacks the image `target` into `snapshotter` and tells containerd what refers to what, so
    /// that nothing of it is collected while the image has a name.
    ///
    /// 1. label each index, and the manifest, with its children;
    /// 2. for each layer whose chain ID is not there: prepare a snapshot on the chain ID below,
    ///    have the layer applied, compare what came out with the diff ID, commit it as the chain
    ///    ID;
    /// 3. label the configuration with the last chain ID.
    ///
    /// Each step can be done twice; two unpackers of one image do not disturb each other.
    /// Everything happens under this client's lease, or one of its own.
    ///
    /// The content comes back; [`ImageContent::chain_id`] is the parent for a container's snapshot.
    /// Errors: [`ClientError::NotFound`] for a blob that is not there;
    /// [`ClientError::WrongContent`] for a layer that is not what the configuration says.
    pub async fn unpack(
        &self,
        namespace: &str,
        target: &Descriptor,
        snapshotter: &str,
    ) -> Result<ImageContent, ClientError> {
        if self.lease.is_some() {
            return self.unpack_leased(namespace, target, snapshotter).await;
        }
        let lease = self.lease(namespace).await?;
        let content = lease.client().unpack_leased(namespace, target, snapshotter).await?;
        lease.release().await?;
        Ok(content)
    }

    async fn unpack_leased(
        &self,
        namespace: &str,
        target: &Descriptor,
        snapshotter: &str,
    ) -> Result<ImageContent, ClientError> {
        let content = self.image_content(namespace, target).await?;
        for index in &content.indexes {
            let children = self.index_children(namespace, index).await?;
            self.label_blob(namespace, index.digest, labels_of(&children)).await?;
        }
        let parts: Vec<_> =
            std::iter::once(&content.config).chain(&content.layers).cloned().collect();
        self.label_blob(namespace, content.manifest.digest, labels_of(&parts)).await?;

        let mut below = None;
        let ids = content.diff_ids.iter().zip(&content.chain_ids);
        for (layer, (diff_id, chain_id)) in content.layers.iter().zip(ids) {
            let step = LayerStep { namespace, snapshotter, layer, diff_id, chain_id, below };
            self.unpack_layer(&step).await?;
            below = Some(chain_id);
        }
        let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
        let chain_id = content.chain_id().map(|id| id.to_string()).unwrap_or_default();
        self.label_blob(namespace, content.config.digest, [(label, chain_id)].into()).await?;
        Ok(content)
    }

    async fn unpack_layer(&self, step: &LayerStep<'_>) -> Result<(), ClientError> {
        let LayerStep { namespace, snapshotter, chain_id, .. } = *step;
        let name = chain_id.to_string();
        let mut attempts = 0;
        let (key, mounts) = loop {
            if self.has_snapshot(namespace, snapshotter, &name).await? {
                return Ok(());
            }
            let key = extract_key(chain_id);
            let below = step.below.map(Digest::to_string);
            let labels = step.labels();
            match self
                .prepare_labelled(namespace, snapshotter, &key, below.as_deref(), labels)
                .await
            {
                Ok(mounts) => break (key, mounts),
                // The snapshotter has the layer by now: look again.
                Err(ClientError::AlreadyExists(_)) if attempts < ATTEMPTS_MAX => attempts += 1,
                Err(other) => return Err(other),
            }
        };
        let done = self.fill_layer(step, &key, mounts).await;
        if done.is_err()
            && let Err(error) = self.remove_snapshot(namespace, snapshotter, &key).await
        {
            tracing::warn!(key, %error, "cannot remove a layer that was not unpacked");
        }
        match done {
            // Another unpacker was faster.
            Err(ClientError::AlreadyExists(_)) => Ok(()),
            other => other,
        }
    }

    /// Unpacks the layer `blob` into `mounts`, and returns the digest of its uncompressed bytes.
    ///
    /// Errors: [`ClientError::NotFound`] without the blob.
    pub async fn apply(
        &self,
        namespace: &str,
        blob: &Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<Digest, ClientError> {
        let message = ApplyRequest { diff: Some(blob.into()), mounts, ..ApplyRequest::default() };
        let answer = DiffClient::new(self.channel.clone())
            .apply(self.work_request(namespace, message)?)
            .await;
        let object = || format!("layer {}", blob.digest);
        let ApplyResponse { applied } =
            answer.map_err(|status| self.failed("apply", object(), &status))?.into_inner();
        parse_digest(&present(applied, object)?.digest, object)
    }

    async fn fill_layer(
        &self,
        step: &LayerStep<'_>,
        key: &str,
        mounts: Vec<Mount>,
    ) -> Result<(), ClientError> {
        let LayerStep { namespace, snapshotter, layer, diff_id, chain_id, .. } = *step;
        if self.apply(namespace, layer, mounts).await? != *diff_id {
            return Err(ClientError::WrongContent(*diff_id));
        }
        let names = (chain_id.to_string(), key);
        self.commit_labelled(namespace, snapshotter, (&names.0, names.1), step.labels()).await?;
        self.label_unpacked(namespace, layer.digest, *diff_id).await
    }

    /// Notes of a layer's blob what its uncompressed bytes have been seen to be.
    pub async fn label_unpacked(
        &self,
        namespace: &str,
        blob: Digest,
        diff_id: Digest,
    ) -> Result<(), ClientError> {
        let seen = [(LABEL_UNCOMPRESSED.to_owned(), diff_id.to_string())];
        self.label_blob(namespace, blob, seen.into()).await
    }
}

/// One layer on its way into a snapshotter.
struct LayerStep<'a> {
    namespace: &'a str,
    snapshotter: &'a str,
    layer: &'a Descriptor,
    diff_id: &'a Digest,
    chain_id: &'a Digest,
    /// Chain ID of the layer below.
    below: Option<&'a Digest>,
}

impl LayerStep<'_> {
    fn labels(&self) -> HashMap<String, String> {
        [(LABEL_REF.to_owned(), self.chain_id.to_string())].into()
    }
}

/// One label for each child, numbered by kind.
fn labels_of(children: &[Descriptor]) -> HashMap<String, String> {
    let mut counts: HashMap<String, usize> = HashMap::new();
    let mut labels = HashMap::new();
    for child in children {
        let count = counts.entry(child_label(&child.media_type, 0)).or_default();
        labels.insert(child_label(&child.media_type, *count), child.digest.to_string());
        *count += 1;
    }
    labels
}

/// A key that no other caller uses; the form is containerd's own, by which snapshotters know an
/// unpack.
fn extract_key(chain_id: &Digest) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("extract-{}-godwit{}-{count} {chain_id}", since.as_nanos(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_numbered_by_kind() {
        let child = |media_type: &str, name: &str| Descriptor {
            media_type: media_type.to_owned(),
            digest: Digest::of(name.as_bytes()),
            size_bytes: 0,
        };
        let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
        let config = "application/vnd.oci.image.config.v1+json";
        let labels = labels_of(&[child(config, "c"), child(layer, "a"), child(layer, "b")]);
        let of = |name: &str| labels.get(&format!("containerd.io/gc.ref.content.{name}")).cloned();
        assert_eq!(of("config"), Some(Digest::of(b"c").to_string()));
        assert_eq!(of("l.0"), Some(Digest::of(b"a").to_string()));
        assert_eq!(of("l.1"), Some(Digest::of(b"b").to_string()));
        assert_eq!(labels.len(), 3);
    }

    #[test]
    fn keys_differ_and_end_with_the_chain_id() {
        let id = Digest::of(b"x");
        let (first, second) = (extract_key(&id), extract_key(&id));
        assert_ne!(first, second);
        assert!(first.starts_with("extract-") && first.ends_with(&format!(" {id}")));
    }
}
