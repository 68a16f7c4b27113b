//! The image that a container was made of.
//!
//! A name can get other content while a container runs: a newer `latest` is pulled. What the
//! container was made of is said by its snapshot alone, whose parent is named by a chain ID, which
//! commits to all layers. So the image is found by chain ID, under the container's name for it if
//! that still has it, or else under any other or none. If containerd has collected it, the
//! container cannot be moved: nothing makes the same bytes of unpacked layers.

use godwit_protos::Digest;

use super::MigrationError;
use super::obstacles::Findings;
use crate::containerd::{ClientError, Container, Descriptor, ImageContent};
use crate::node::Node;

/// What a container was made of.
#[derive(Debug)]
pub struct Origin {
    /// Chain ID of its snapshot's parent; `None` if it has none or that is no layer of an image.
    pub chain_id: Option<Digest>,
    /// The image, if containerd still has it.
    pub image: Option<(Descriptor, ImageContent)>,
    /// The container's name for the image stands for something else by now, or for nothing.
    pub is_renamed: bool,
}

/// Finds the image of a container.
///
/// Errors: containerd's; [`MigrationError::NoSnapshot`] if no snapshotter holds the root file
/// system.
pub async fn find(
    node: &Node,
    namespace: &str,
    record: &Container,
) -> Result<Origin, MigrationError> {
    let parent = parent(node, namespace, record).await?;
    let chain_id: Option<Digest> = parent.as_ref().and_then(|parent| parent.parse().ok());
    let is_origin =
        |content: &ImageContent| content.chain_id().map(|chain_id| chain_id.to_string()) == parent;
    let named = named(node, namespace, &record.image).await?;
    if let Some(image) = named.filter(|(_, content)| is_origin(content)) {
        return Ok(Origin { chain_id, image: Some(image), is_renamed: false });
    }
    let found = match chain_id {
        Some(chain_id) => node.containerd.find_manifest(namespace, chain_id).await?,
        None => None,
    };
    let image = found.map(|content| (content.manifest.clone(), content));
    Ok(Origin { chain_id, image, is_renamed: true })
}

/// Name of the committed snapshot that a container's is made on; `None` if on none.
///
/// Errors: as [`find`].
pub async fn parent(
    node: &Node,
    namespace: &str,
    record: &Container,
) -> Result<Option<String>, MigrationError> {
    if record.snapshot_key.is_empty() {
        return Err(MigrationError::NoSnapshot(record.id.clone()));
    }
    let (snapshotter, key) = (&record.snapshotter, &record.snapshot_key);
    Ok(node.containerd.snapshot_parent(namespace, snapshotter, key).await?)
}

/// What the name stands for, if all that says so is here.
async fn named(
    node: &Node,
    namespace: &str,
    name: &str,
) -> Result<Option<(Descriptor, ImageContent)>, ClientError> {
    if name.is_empty() {
        return Ok(None);
    }
    let Some(target) = node.containerd.image(namespace, name).await? else { return Ok(None) };
    match node.containerd.image_content(namespace, &target).await {
        Ok(content) => Ok(Some((target, content))),
        Err(ClientError::NotFound(_) | ClientError::Malformed { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Origin {
    /// The chain ID as messages carry it: empty if there is none.
    pub fn chain_id_text(&self) -> String {
        self.chain_id.map_or_else(String::new, |id| id.to_string())
    }

    /// Adds an obstacle if the image is not here: the destination cannot have it then.
    pub fn survey(&self, name: &str, findings: &mut Findings) {
        if self.image.is_some() {
            return;
        }
        let of = self.chain_id.map_or_else(String::new, |id| format!(" (chain ID {id})"));
        findings.obstacle(
            format!("the image {name:?} that the container was made of{of}"),
            "containerd does not have it any more; the name may stand for a newer one",
            "pull or import the container's own image again, under any name",
        );
    }
}

/// Why a container here cannot take the place of one that was made on `there`, a chain ID; "" if
/// that is not known.
///
/// A snapshot on something that is no layer of an image, such as Docker's, is not compared.
pub async fn check_same(
    node: &Node,
    namespace: &str,
    record: &Container,
    there: &str,
) -> Result<(), MigrationError> {
    let Ok(there) = there.parse::<Digest>() else { return Ok(()) };
    let here = parent(node, namespace, record).await?;
    match here.and_then(|here| here.parse().ok()) {
        Some(here) if here != there => {
            Err(MigrationError::OtherImage { image: record.image.clone(), here, there })
        }
        _ => Ok(()),
    }
}
