//! The mirror: what the neighbours' blobs are worth to a client that pulls with any snapshotter.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context, Result, ensure};
use godwit_protos::Digest;
use godwit_tests::Node;
use godwit_tests::images::Image;

use super::{
    BOUND, MIRROR, PULL_MAX, asked_since, digest, fresh, manifest, node, pull_for_pods, registry,
};

/// Has clients in the node ask its mirror before the registry.
fn use_mirror(node: &Node) -> Result<()> {
    let registry = registry().address();
    let directory = format!("/etc/containerd/certs.d/{registry}");
    let text = format!(
        "server = \"https://{registry}\"\n\
         [host.\"http://{MIRROR}\"]\n  capabilities = [\"pull\", \"resolve\"]\n"
    );
    node.ok(&["mkdir", "-p", &directory])?;
    Ok(fs::write(node.path(directory).join("hosts.toml"), text)?)
}

/// Pulls with containerd's own snapshotter.
fn pull_plainly(node: &Node, reference: &str) -> Result<()> {
    let pull = ["ctr", "images", "pull", "--local", "--hosts-dir", "/etc/containerd/certs.d"];
    let snapshotter = ["--snapshotter", "overlayfs", reference];
    node.command(&[&pull[..], &snapshotter].concat()).timeout(PULL_MAX).ok().map(drop)
}

/// What the mirror of a node answers: the head, with its status, and the body.
pub(super) fn ask_mirror(node: &Node, method: &str, path: &str) -> Result<String> {
    node.in_network(|| {
        let mut connection = TcpStream::connect(MIRROR)?;
        connection.set_read_timeout(Some(BOUND))?;
        let close = "Connection: close\r\nContent-Length: 0";
        write!(connection, "{method} {path} HTTP/1.1\r\nHost: mirror\r\n{close}\r\n\r\n")?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    })
}

#[test]
fn a_mirror_has_what_neighbours_have_while_the_registry_is_away() -> Result<()> {
    let image = fresh(Image::Redis)?;
    [1, 2].into_iter().try_for_each(|index| use_mirror(node(index)))?;
    registry().stop()?;
    let served = (|| {
        // It believes its neighbours' tags, the third node none but its own.
        pull_plainly(node(1), &image.0)?;
        let run = ["ctr", "run", "--rm", "--snapshotter", "overlayfs", &image.0, "x", "ls", "/etc"];
        let etc = node(1).ok(&run)?;
        ensure!(etc.contains("passwd") && !etc.contains("issue"), "{etc}");
        let tag = pull_plainly(node(2), &image.0);
        ensure!(tag.is_err(), "a neighbour's tag was believed");
        let (name, _) = image.0.rsplit_once(':').context("a tag")?;
        pull_plainly(node(2), &format!("{name}@{}", digest(node(1), &image.0)?))?;
        // By now it has the image by digest only.
        let manifest = format!("/v2/redis/manifests/{}", digest(node(1), &image.0)?);
        let head = ask_mirror(node(2), "HEAD", &manifest)?;
        ensure!(head.starts_with("HTTP/1.1 200") && head.contains("manifest.v1+json"), "{head}");
        ensure!(head.ends_with("\r\n\r\n"), "a body after a HEAD: {head}");
        let nothing = Digest::of(b"nothing");
        for (method, path, status) in [
            ("GET", format!("/v2/redis/blobs/{nothing}"), 404),
            ("GET", format!("/v2/redis/manifests/{nothing}"), 404),
            ("GET", "/v2/redis/manifests/test".to_owned(), 404),
            ("GET", "/v2/redis/blobs/../../etc/passwd".to_owned(), 404),
            ("POST", "/v2/redis/blobs/uploads/".to_owned(), 405),
            ("GET", "/v2/".to_owned(), 200),
        ] {
            let answer = ask_mirror(node(1), method, &path)?;
            ensure!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
        }
        let elsewhere = format!("{}:7947", node(1).address());
        let outside = node(2).in_network(|| Ok(TcpStream::connect(&elsewhere).is_ok()))?;
        ensure!(!outside, "another node reaches the mirror");
        Ok(())
    })();
    registry().restart()?;
    served
}

/// Method: as docs/configuration.md says it, for a handler of each snapshotter; `config_path` is in
/// every node's configuration. By tag where the neighbours' word on it counts, else by digest.
#[test]
fn a_kubelet_pulls_through_a_mirror_while_the_registry_is_away() -> Result<()> {
    let image = fresh(Image::Redis)?;
    [1, 2].into_iter().try_for_each(|index| use_mirror(node(index)))?;
    let (name, _) = image.0.rsplit_once(':').context("a tag")?;
    let by_digest = format!("{name}@{}", digest(node(0), &image.0)?);
    registry().stop()?;
    let pulled = (|| {
        let refused = pull_for_pods(node(2), &image.0, "godwit");
        ensure!(refused.is_err(), "a neighbour's tag was believed");
        for (at, reference, handler, snapshotter) in
            [(node(1), &image.0, "runc", "overlayfs"), (node(2), &by_digest, "godwit", "godwit")]
        {
            pull_for_pods(at, reference, handler).with_context(|| handler.to_owned())?;
            let run = ["ctr", "-n", "k8s.io", "run", "--rm", "--snapshotter", snapshotter];
            let etc = at.ok(&[&run[..], &[reference, "look", "ls", "/etc"]].concat())?;
            ensure!(etc.contains("passwd") && !etc.contains("issue"), "{handler}: {etc}");
        }
        Ok(())
    })();
    registry().restart()?;
    pulled
}

/// Method: the only neighbour has lost the blob of the lowest layer, and keeps none as an object.
/// Once containerd has heard that no neighbour supplies that one, it downloads all; a mirror then
/// has what the neighbour has.
#[test]
fn of_layers_above_one_that_nobody_has_a_mirror_spares_the_registry_those_that_somebody_has()
-> Result<()> {
    for with_mirror in [false, true] {
        let image = fresh(Image::Redis)?;
        let layers = manifest(node(0), &image.0)?["layers"].clone();
        let lowest = layers[0]["digest"].as_str().context("a digest")?.to_owned();
        node(0).ok(&["ctr", "content", "rm", &lowest])?;
        if with_mirror {
            use_mirror(node(1))?;
        }
        let before = registry().asked_for().len();
        pull_for_pods(node(1), &image.0, "godwit")?;
        let asked: BTreeSet<String> = asked_since(before, &image.1).into_iter().collect();
        let wanted = if with_mirror { BTreeSet::from([lowest]) } else { image.1.clone() };
        ensure!(
            asked == wanted,
            "with a mirror {with_mirror}: asked for {asked:?}, not {wanted:?}"
        );
    }
    Ok(())
}

/// What is asked for is the length.
#[test]
fn a_head_of_a_blob_at_a_mirror_brings_none_of_it() -> Result<()> {
    let image = fresh(Image::Redis)?;
    let layer = manifest(node(0), &image.0)?["layers"][2].clone();
    let (digest, size) = (layer["digest"].as_str(), layer["size"].as_u64());
    let (digest, size) = (digest.context("a digest")?, size.context("a size")?);
    ensure!(size > 1 << 20, "{layer} is too small to tell");
    let path = format!("/v2/redis/blobs/{digest}");
    let received = node(1).traffic()?.received;
    let head = ask_mirror(node(1), "HEAD", &path)?;
    let received = node(1).traffic()?.received - received;
    let lines: BTreeSet<String> = head.lines().map(str::to_lowercase).collect();
    ensure!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    ensure!(lines.contains(&format!("content-length: {size}")), "not {size}: {head}");
    ensure!(lines.contains(&format!("docker-content-digest: {digest}")), "{head}");
    ensure!(received < 64 << 10, "{received} bytes came");
    let nothing = format!("/v2/redis/blobs/{}", Digest::of(b"nothing"));
    let head = ask_mirror(node(1), "HEAD", &nothing)?;
    ensure!(head.starts_with("HTTP/1.1 404"), "{head}");
    Ok(())
}

/// Changes a byte of a blob in a node's content store.
fn spoil_blob(node: &Node, digest: &Digest) -> Result<()> {
    let blobs = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256";
    let path = node.path(blobs).join(digest.hex());
    let mut bytes = fs::read(&path)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    Ok(fs::write(&path, bytes)?)
}

/// Method: two have the blob, the one with a wrong byte. Each of them is asked first once; and
/// he is the faster one.
#[test]
fn a_mirror_goes_on_to_an_honest_neighbour_after_a_liar() -> Result<()> {
    let mut caught = 0;
    for (liar, honest) in [(node(0), node(1)), (node(1), node(0))] {
        let image = fresh(Image::Redis)?;
        use_mirror(node(2))?;
        pull_plainly(node(1), &image.0)?;
        let largest = manifest(node(0), &image.0)?["layers"][2]["digest"].clone();
        let blob: Digest = largest.as_str().context("a digest")?.parse()?;
        spoil_blob(liar, &blob)?;
        honest.set_rate(Some(100))?;
        let (name, _) = image.0.rsplit_once(':').context("a tag")?;
        let reference = format!("{name}@{}", digest(node(0), &image.0)?);
        let told = node(2).log_end("daemon");
        registry().stop()?;
        let pulled = pull_plainly(node(2), &reference);
        registry().restart()?;
        honest.set_rate(None)?;
        // Or it would be there for the next test.
        liar.ok(&["ctr", "content", "rm", &blob.to_string()])?;
        pulled?;
        let text = node(2).sh(&format!("ctr content get {blob} | sha256sum"))?;
        ensure!(text.starts_with(&blob.hex()), "{blob} has {text}");
        let log = node(2).log_since("daemon", told);
        caught += log.lines().filter(|line| line.contains("other bytes came")).count();
    }
    ensure!(caught > 0, "the liar was never asked");
    Ok(())
}

/// Method: a blob in the only neighbour's content store has a wrong byte. containerd keeps what it
/// got of a blob for the next attempt, so not even a part may come through.
#[test]
fn wrong_bytes_do_not_come_through_a_mirror() -> Result<()> {
    let image = fresh(Image::Redis)?;
    use_mirror(node(1))?;
    let largest = manifest(node(0), &image.0)?["layers"][2]["digest"].clone();
    let digest: Digest = largest.as_str().context("a digest")?.parse()?;
    spoil_blob(node(0), &digest)?;
    let told = node(1).log_end("daemon");
    pull_plainly(node(1), &image.0)?;
    let log = node(1).log_since("daemon", told);
    ensure!(log.contains("other bytes came"), "no node noticed: {log}");
    let text = node(1).sh(&format!("ctr content get {digest} | sha256sum"))?;
    ensure!(text.starts_with(&digest.hex()), "{digest} has {text}");
    // Or it would be there for the next test.
    node(0).ok(&["ctr", "content", "rm", &digest.to_string()])?;
    Ok(())
}
