//! Images: names, and what a name stands for.
//!
//! ```text
//! name -> target: index? -> ... -> manifest -> configuration (diff IDs)
//!                                         `--> layers
//! ```
//!
//! The JSON is read by what is needed of it, so that an odd field elsewhere does no harm. It comes
//! from outside: its length is limited, its bytes are checked against the digest, its nesting is
//! bounded.

use containerd_client::services::v1 as api;
use containerd_client::services::v1::images_client::ImagesClient;
use godwit_protos::Digest;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tonic::transport::Channel;

use super::{
    BLOB_BYTES_MAX_WHOLE, Client, ClientError, Descriptor, optional, parse_digest, present,
};

/// How many indexes may lie between a name and its manifest.
const INDEX_DEPTH_MAX: usize = 4;
/// Most layers of an image: overlayfs takes 500 lower directories.
const LAYERS_MAX: usize = 500;

/// What an image is made of on this machine's architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageContent {
    /// The indexes on the way from the image's target to its manifest, outermost first; often none.
    pub indexes: Vec<Descriptor>,
    /// The manifest.
    pub manifest: Descriptor,
    /// The image's configuration.
    pub config: Descriptor,
    /// The layers, lowest first, as they are stored: mostly compressed.
    pub layers: Vec<Descriptor>,
    /// Digest of each layer's uncompressed bytes.
    pub diff_ids: Vec<Digest>,
    /// Name of the snapshot that each layer leads to; see [`chain_ids`].
    pub chain_ids: Vec<Digest>,
}

impl ImageContent {
    /// Every blob that another node needs to have the same image, the ones that name others first.
    pub fn blobs(&self) -> impl Iterator<Item = &Descriptor> {
        let parts = [std::slice::from_ref(&self.manifest), std::slice::from_ref(&self.config)];
        self.indexes.iter().chain(parts.into_iter().flatten()).chain(&self.layers)
    }

    /// Name of the snapshot of the whole image; `None` if it has no layers.
    pub fn chain_id(&self) -> Option<Digest> {
        self.chain_ids.last().copied()
    }
}

/// Name of the snapshot after each of the layers: the first is the layer's diff ID, each further
/// one the digest of `<chain ID below> <diff ID>`.
///
/// Source: OCI image specification, config.md, "Layer ChainID".
pub(super) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let next = |below: &mut Option<Digest>, diff_id: &Digest| {
        let chain_id = match below {
            None => *diff_id,
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        };
        *below = Some(chain_id);
        Some(chain_id)
    };
    diff_ids.iter().scan(None, next).collect()
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciDescriptor {
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<OciPlatform>,
}

#[derive(Debug, Deserialize)]
struct OciPlatform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

#[derive(Debug, Deserialize)]
struct OciIndex {
    manifests: Vec<OciDescriptor>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciManifest {
    media_type: Option<String>,
    config: OciDescriptor,
    layers: Vec<OciDescriptor>,
}

#[derive(Debug, Deserialize)]
struct OciConfig {
    rootfs: OciRootfs,
}

#[derive(Debug, Deserialize)]
struct OciRootfs {
    diff_ids: Vec<String>,
}

impl OciDescriptor {
    fn parse(&self, inside: &Descriptor) -> Result<Descriptor, ClientError> {
        let digest = parse_digest(&self.digest, || format!("descriptor in {}", inside.digest))?;
        Ok(Descriptor { media_type: self.media_type.clone(), digest, size_bytes: self.size })
    }
}

fn is_index(media_type: &str) -> bool {
    [
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    ]
    .contains(&media_type)
}

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn is_manifest(media_type: &str) -> bool {
    [MANIFEST, "application/vnd.docker.distribution.manifest.v2+json"].contains(&media_type)
}

/// Label by which a manifest refers to its configuration, for containerd's garbage collection.
pub(super) const LABEL_CONFIG: &str = "containerd.io/gc.ref.content.config";

/// Label by which a blob refers to its `index`th child of this kind, for containerd's garbage
/// collection.
pub(super) fn child_label(media_type: &str, index: usize) -> String {
    let is_layer = media_type.starts_with("application/vnd.oci.image.layer.")
        || media_type.starts_with("application/vnd.docker.image.rootfs.");
    let is_config = [
        "application/vnd.oci.image.config.v1+json",
        "application/vnd.docker.container.image.v1+json",
    ]
    .contains(&media_type);
    match () {
        () if is_config => LABEL_CONFIG.to_owned(),
        () if is_manifest(media_type) => format!("containerd.io/gc.ref.content.m.{index}"),
        () if is_layer => format!("containerd.io/gc.ref.content.l.{index}"),
        () => format!("containerd.io/gc.ref.content.{index}"),
    }
}

/// Go's name for the architecture this program was built for, which is the one image indexes use.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// The manifest or index of `index` for this machine. The plain variant comes before special ones;
/// one without a platform is taken if none has the right one.
fn choose(index: &OciIndex) -> Option<&OciDescriptor> {
    let rank = |entry: &&OciDescriptor| match &entry.platform {
        Some(platform) if platform.os != "linux" || platform.architecture != architecture() => None,
        Some(platform) => match platform.variant.as_deref() {
            None | Some("" | "v1" | "v8") => Some(0),
            Some(_) => Some(1),
        },
        None => Some(2),
    };
    let known =
        |entry: &&OciDescriptor| is_index(&entry.media_type) || is_manifest(&entry.media_type);
    let ranked =
        index.manifests.iter().filter(known).filter_map(|entry| Some((rank(&entry)?, entry)));
    ranked.min_by_key(|(rank, _)| *rank).map(|(_, entry)| entry)
}

impl Client {
    fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone())
    }

    /// What the name stands for, if containerd knows it.
    pub async fn image(
        &self,
        namespace: &str,
        name: &str,
    ) -> Result<Option<Descriptor>, ClientError> {
        let object = || format!("image {name}");
        let request = self.request(namespace, api::GetImageRequest { name: name.to_owned() })?;
        let answer = self.images().get(request).await;
        let answer = answer.map_err(|status| self.failed("get", object(), &status));
        let Some(answer) = optional(answer)? else { return Ok(None) };
        let target = answer.into_inner().image.and_then(|image| image.target);
        let target = present(target, object)?;
        Ok(Some(Descriptor {
            digest: parse_digest(&target.digest, object)?,
            media_type: target.media_type,
            size_bytes: target.size.try_into().unwrap_or(0),
        }))
    }

    /// Gives `target` a name. That it has it already is a success.
    ///
    /// Errors: [`ClientError::ImageDiffers`] when the name stands for something else, which stays
    /// so.
    pub async fn create_image(
        &self,
        namespace: &str,
        name: &str,
        target: &Descriptor,
    ) -> Result<(), ClientError> {
        let image =
            api::Image { name: name.to_owned(), target: Some(target.into()), ..Default::default() };
        let message = api::CreateImageRequest { image: Some(image), source_date_epoch: None };
        let answer = self.images().create(self.request(namespace, message)?).await;
        let object = || format!("image {name}");
        match answer.map_err(|status| self.failed("create", object(), &status)) {
            Err(ClientError::AlreadyExists(_)) => (),
            other => return other.map(drop),
        }
        let existing = self.image(namespace, name).await?;
        let existing = existing.ok_or_else(|| ClientError::NotFound(object()))?.digest;
        if existing == target.digest {
            return Ok(());
        }
        let (name, wanted) = (name.to_owned(), target.digest);
        Err(ClientError::ImageDiffers { name, existing, wanted })
    }

    /// What an image is made of, on this machine's architecture. Index, manifest and configuration
    /// must be in containerd's content store; layers need not.
    ///
    /// Errors: [`ClientError::NotFound`]; [`ClientError::Malformed`], also for an image of another
    /// architecture.
    pub async fn image_content(
        &self,
        namespace: &str,
        target: &Descriptor,
    ) -> Result<ImageContent, ClientError> {
        let mut indexes = Vec::new();
        let mut manifest = target.clone();
        while is_index(&manifest.media_type) {
            if indexes.len() == INDEX_DEPTH_MAX {
                return Err(malformed(target, format!("more than {INDEX_DEPTH_MAX} indexes deep")));
            }
            let index: OciIndex = self.read_json(namespace, &manifest).await?;
            let chosen = choose(&index).ok_or_else(|| {
                malformed(&manifest, format!("nothing for linux/{}", architecture()))
            })?;
            let next = chosen.parse(&manifest)?;
            indexes.push(std::mem::replace(&mut manifest, next));
        }
        let content = self.manifest_content(namespace, &manifest).await?;
        Ok(ImageContent { indexes, ..content })
    }

    /// What the image of a manifest is made of, whatever its architecture. A media type that
    /// `manifest` lacks is added.
    pub(super) async fn manifest_content(
        &self,
        namespace: &str,
        manifest: &Descriptor,
    ) -> Result<ImageContent, ClientError> {
        let parsed: OciManifest = self.read_json(namespace, manifest).await?;
        let config = parsed.config.parse(manifest)?;
        let layers: Vec<_> =
            parsed.layers.iter().map(|layer| layer.parse(manifest)).collect::<Result<_, _>>()?;
        let OciConfig { rootfs } = self.read_json(namespace, &config).await?;
        if layers.len() != rootfs.diff_ids.len() || layers.len() > LAYERS_MAX {
            let (layers, diff_ids) = (layers.len(), rootfs.diff_ids.len());
            let reason = format!("{layers} layers and {diff_ids} diff IDs, at most {LAYERS_MAX}");
            return Err(malformed(manifest, reason));
        }
        let diff_ids: Vec<_> = rootfs
            .diff_ids
            .iter()
            .map(|diff_id| parse_digest(diff_id, || format!("diff ID in {}", config.digest)))
            .collect::<Result<_, _>>()?;
        let chain_ids = chain_ids(&diff_ids);
        let (indexes, mut manifest) = (Vec::new(), manifest.clone());
        if manifest.media_type.is_empty() {
            // OCI's manifests need not say what they are, Docker's do.
            manifest.media_type = parsed.media_type.unwrap_or_else(|| MANIFEST.to_owned());
        }
        Ok(ImageContent { indexes, manifest, config, layers, diff_ids, chain_ids })
    }

    /// The children that an index names, whether containerd has them or not.
    pub(super) async fn index_children(
        &self,
        namespace: &str,
        index: &Descriptor,
    ) -> Result<Vec<Descriptor>, ClientError> {
        let parsed: OciIndex = self.read_json(namespace, index).await?;
        parsed.manifests.iter().map(|entry| entry.parse(index)).collect()
    }

    async fn read_json<T: DeserializeOwned>(
        &self,
        namespace: &str,
        blob: &Descriptor,
    ) -> Result<T, ClientError> {
        let bytes = self.read_blob_whole(namespace, blob.digest, BLOB_BYTES_MAX_WHOLE).await?;
        serde_json::from_slice(&bytes).map_err(|error| malformed(blob, error.to_string()))
    }
}

fn malformed(blob: &Descriptor, reason: String) -> ClientError {
    ClientError::Malformed { object: format!("{} {}", blob.media_type, blob.digest), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        Digest::of(text.as_bytes())
    }

    #[test]
    fn a_chain_id_commits_to_every_layer_below() {
        let [a, b, c] = ["a", "b", "c"].map(digest);
        let ab = digest(&format!("{a} {b}"));
        let abc = digest(&format!("{ab} {c}"));
        assert_eq!(chain_ids(&[a, b, c]), [a, ab, abc]);
        assert!(chain_ids(&[]).is_empty());
    }

    /// Name, and operating system, architecture and variant.
    type Entry<'a> = (&'a str, Option<(&'a str, &'a str, Option<&'a str>)>);

    fn index(entries: &[Entry<'_>]) -> OciIndex {
        let entry = |(name, platform): &Entry<'_>| OciDescriptor {
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            digest: digest(name).to_string(),
            size: 1,
            platform: platform.map(|(os, architecture, variant)| OciPlatform {
                architecture: architecture.to_owned(),
                os: os.to_owned(),
                variant: variant.map(str::to_owned),
            }),
        };
        OciIndex { manifests: entries.iter().map(entry).collect() }
    }

    #[test]
    fn this_machines_manifest_is_chosen_and_the_plain_variant_first() {
        let here = architecture();
        let chosen = |entries: &[_]| choose(&index(entries)).map(|entry| entry.digest.clone());
        let plain = Some(digest("plain").to_string());
        let unknown = ("none", Some(("unknown", "unknown", None)));
        let other = ("other", Some(("linux", "mips", None)));
        let windows = ("windows", Some(("windows", here, None)));
        let special = ("special", Some(("linux", here, Some("v3"))));
        let ours = ("plain", Some(("linux", here, None)));
        assert_eq!(chosen(&[unknown, other, windows, special, ours]), plain);
        assert_eq!(chosen(&[special, ("bare", None)]), Some(digest("special").to_string()));
        assert_eq!(chosen(&[other, ("plain", None)]), plain);
        assert_eq!(chosen(&[unknown, other, windows]), None);
    }

    #[test]
    fn children_are_labelled_as_containerd_does() {
        let labels = [
            ("application/vnd.oci.image.config.v1+json", "config"),
            ("application/vnd.docker.container.image.v1+json", "config"),
            ("application/vnd.docker.distribution.manifest.v2+json", "m.3"),
            ("application/vnd.oci.image.layer.v1.tar+zstd", "l.3"),
            ("application/vnd.docker.image.rootfs.diff.tar.gzip", "l.3"),
            ("application/vnd.oci.image.index.v1+json", "3"),
        ];
        for (media_type, suffix) in labels {
            let label = format!("containerd.io/gc.ref.content.{suffix}");
            assert_eq!(child_label(media_type, 3), label, "{media_type}");
        }
    }

    #[test]
    fn a_manifest_with_fields_of_the_future_is_read() {
        let text = format!(
            concat!(
                r#"{{"schemaVersion":2,"new":[1],"layers":[],"#,
                r#""config":{{"mediaType":"c","digest":"{}","size":2,"data":"e30="}}}}"#
            ),
            digest("c")
        );
        let manifest: OciManifest = serde_json::from_str(&text).unwrap();
        assert_eq!((manifest.config.size, manifest.layers.len()), (2, 0));
    }
}
