//! What a plan expects of a container's image: blobs, which neighbours have or the source sends,
//! and layers of which neither has a blob. Those came from neighbours before, and will again, in
//! chunks, from the neighbours that keep them ([`crate::layers`]); what they cost is taken to be
//! what the blob would.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use godwit_protos::peer::{Blob, DescribeResponse, LocateRequest};
use godwit_protos::{ContainerRef, Digest, Subject};

use super::{Candidate, MigrationError, Survey, Surveyed, blocking};
use crate::directory::LOOKUP_MAX;
use crate::peer::{Connection, blobs};
use crate::policy::predict::{Held, Part};

/// Names of blobs.
type Blobs = BTreeSet<String>;

impl Survey<'_> {
    /// What is missing of the image, and who has it.
    pub(super) async fn image(
        &self,
        described: &DescribeResponse,
        container: &ContainerRef,
    ) -> Result<Surveyed, MigrationError> {
        let (namespace, mut size, mut missing) = (container.namespace(), 0, BTreeMap::new());
        for blob in &described.image_blobs {
            size += blob.size_bytes;
            let has = self.node.containerd.has_blob(namespace, blob.digest.parse()?).await?;
            if has.is_none() && !self.keeps(blob).await? {
                missing.insert(blob.digest.clone(), blob);
            }
        }
        let blobs = missing.keys().cloned().collect();
        let asked =
            LocateRequest { blobs, namespace: namespace.to_owned(), ..LocateRequest::default() };
        let mut union = Blobs::new();
        let mut holders: BTreeMap<String, (Arc<Connection>, Blobs)> = BTreeMap::new();
        for (peer, answer) in blobs::locate(self.connections.neighbours(), asked).await {
            let blobs = answer.unwrap_or_default().blobs.into_iter();
            let has: Blobs = blobs.filter(|blob| missing.contains_key(blob)).collect();
            union.extend(has.iter().cloned());
            holders.insert(peer.node.clone(), (peer, has));
        }
        let in_chunks =
            missing.values().filter(|blob| blob.is_absent && !union.contains(&blob.digest));
        for (peer, blob) in self.keepers(in_chunks.copied(), container).await {
            union.insert(blob.clone());
            holders.entry(peer.node.clone()).or_insert((peer, Blobs::new())).1.insert(blob);
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let of = |blobs: &Blobs| {
            let sizes = blobs.iter().filter_map(|blob| Some(missing.get(blob)?.size_bytes));
            sizes.sum::<u64>() as f64
        };
        let mut holders: Vec<_> =
            holders.into_values().map(|(peer, blobs)| (peer, of(&blobs))).collect();
        holders.retain(|(_, bytes)| *bytes > 0.0);
        let held = |(peer, bytes): &(Arc<Connection>, f64)| Held {
            node: peer.node.clone(),
            bytes: *bytes,
        };
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let part = Part {
            size: size as f64,
            missing: of(&missing.keys().cloned().collect()),
            held: of(&union),
            holders: holders.iter().map(held).collect(),
            ..Part::default()
        };
        let candidate = |(peer, held): &(Arc<Connection>, f64)| {
            let known = Candidate { chosen: true, ..Candidate::default() };
            self.candidate(peer, known, *held, &part)
        };
        let candidates = holders.iter().map(candidate).collect();
        let name = "image".to_owned();
        Ok(Surveyed { name, part, wire_ratio: 1.0, candidates, obstacle: None })
    }

    /// Whether this node keeps the layer of an absent blob in chunks.
    async fn keeps(&self, blob: &Blob) -> Result<bool, MigrationError> {
        let (Some(layer), true) = (layer_of(blob), blob.is_absent) else { return Ok(false) };
        let store = self.node.store.clone();
        blocking(move || Ok(!store.snapshots(&layer)?.is_empty())).await
    }

    /// Neighbours that keep these layers in chunks, each with the name of the blob.
    async fn keepers<'b>(
        &self,
        blobs: impl Iterator<Item = &'b Blob>,
        container: &ContainerRef,
    ) -> Vec<(Arc<Connection>, String)> {
        let layers: BTreeMap<Subject, &Blob> =
            blobs.filter_map(|blob| Some((layer_of(blob)?, blob))).collect();
        let subjects = layers.keys().cloned().collect();
        let lookup = self.connections.look_up(self.node, container, subjects, Vec::new());
        let found = lookup.found(LOOKUP_MAX).await;
        let neighbours = self.connections.neighbours();
        let keeper = |entry: &crate::directory::Entry| {
            let peer = neighbours.iter().find(|peer| peer.node == entry.node)?;
            Some((peer.clone(), layers.get(entry.subject.as_ref()?)?.digest.clone()))
        };
        found.iter().filter_map(keeper).collect()
    }
}

/// The subject as which nodes keep a layer; `None` for what is none.
fn layer_of(blob: &Blob) -> Option<Subject> {
    Digest::try_from(&blob.diff_id[..]).ok().map(Subject::ImageLayer)
}
