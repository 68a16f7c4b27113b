//! OCI image archives, written from directories: layers, configuration, manifest, index.
//!
//! The same content gives the same bytes, so an image has the same digest on every machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::command::{Invocation, host};

/// Time of all files of a layer, in seconds since 1970.
pub(crate) const MTIME: u64 = 1_700_000_000;

/// A layer: the tree to be packed, and whether it is compressed.
pub(crate) struct Layer {
    pub(crate) tree: PathBuf,
    pub(crate) gzip: bool,
}

/// What a container of the image runs.
pub(crate) struct Configuration<'a> {
    pub(crate) command: &'a [&'a str],
    pub(crate) working_directory: &'a str,
}

/// Writes the archive of an image called `name` (for example `docker.io/library/redis:test`).
///
/// `scratch` is an empty directory on the same file system as `out`.
pub(crate) fn write_archive(
    name: &str,
    layers: &[Layer],
    configuration: &Configuration<'_>,
    scratch: &Path,
    out: &Path,
) -> Result<()> {
    let blobs = scratch.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let (mut diff_ids, mut descriptors) = (Vec::new(), Vec::new());
    for layer in layers {
        let (diff_id, descriptor) = pack(layer, &blobs)?;
        diff_ids.push(diff_id);
        descriptors.push(descriptor);
    }
    let history: Vec<_> = layers.iter().map(|_| json!({"created_by": "godwit-tests"})).collect();
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Cmd": configuration.command,
            "WorkingDir": configuration.working_directory,
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": history,
    });
    let config = put(&config, "application/vnd.oci.image.config.v1+json", &blobs)?;
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": descriptors,
    });
    let mut manifest = put(&manifest, manifest_type, &blobs)?;
    manifest["annotations"] = json!({"io.containerd.image.name": name});
    manifest["platform"] = json!({"architecture": architecture(), "os": "linux"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(scratch.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(scratch.join("oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}")?;
    tar(scratch, out)
}

/// Packs a layer into the blobs; returns its diff ID and its descriptor.
fn pack(layer: &Layer, blobs: &Path) -> Result<(String, Value)> {
    let plain = blobs.join("layer");
    tar(&layer.tree, &plain)?;
    let diff_id = digest(&plain)?;
    let mut media_type = "application/vnd.oci.image.layer.v1.tar".to_owned();
    let mut packed = plain.clone();
    if layer.gzip {
        // -n: no time in the header, so that the bytes are always the same.
        host(&["gzip", "-n", "-1", &plain.display().to_string()])?;
        packed = blobs.join("layer.gz");
        media_type.push_str("+gzip");
    }
    let (digest, size) = (digest(&packed)?, fs::metadata(&packed)?.len());
    fs::rename(&packed, blobs.join(digest.trim_start_matches("sha256:")))?;
    Ok((diff_id, json!({"mediaType": media_type, "digest": digest, "size": size})))
}

/// Stores a JSON document as a blob; returns its descriptor.
fn put(document: &Value, media_type: &str, blobs: &Path) -> Result<Value> {
    let bytes = serde_json::to_vec(document)?;
    let hex = hex(&bytes);
    fs::write(blobs.join(&hex), &bytes)?;
    let digest = format!("sha256:{hex}");
    Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
}

fn tar(tree: &Path, out: &Path) -> Result<()> {
    let (tree, out) = (tree.display().to_string(), out.display().to_string());
    let mtime = format!("--mtime=@{MTIME}");
    let same = ["--sort=name", &mtime, "--numeric-owner", "--owner=0", "--group=0"];
    let mut command = vec!["tar", "-C", &tree, "--format=pax"];
    command.extend(same);
    // Without these, pax headers hold the times of packing.
    command.extend(["--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime"]);
    command.extend(["-cf", &out, "."]);
    Invocation::new(&command).ok().map(drop)
}

fn digest(file: &Path) -> Result<String> {
    let bytes = fs::read(file).with_context(|| format!("read {}", file.display()))?;
    Ok(format!("sha256:{}", hex(&bytes)))
}

/// SHA-256 of some bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
