//! Pulling images: layers that a neighbour holds come from the neighbours and not from the
//! registry, whatever the neighbours are like, and what came from one can be given on, or run,
//! moved, and mirrored.
//!
//! The registry tells which blobs it was asked for; nothing else counts as proof.

use std::collections::BTreeSet;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_protos::{Digest, Subject};
use godwit_snapshotter::content::object::Kind;
use godwit_snapshotter::store::{Options, Snapshot, Store};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::neighbours::{self, Bad};
use godwit_tests::registry::{Registry, pull};
use godwit_tests::workload;
use godwit_tests::{Bed, BedOptions, Containerd, Node};
use serde_json::Value;

use mirror::ask_mirror;

#[path = "pull/mirror.rs"]
mod mirror;

#[allow(clippy::all, unreachable_pub, reason = "generated")]
mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// Three nodes that pull, and one with the registry, which holds nothing itself.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let options = BedOptions::nodes(4).generation(Containerd::of_suite()).config(configuration);
    Bed::start(&options).expect("the nodes start")
});

/// Every node has a mirror; the second believes what its neighbours say of tags.
fn configuration(node: &str) -> String {
    let tags = if node == "edge-b" { "neighbours" } else { "local" };
    format!("[cache]\nschedule = false\n[mirror]\nlisten = \"{MIRROR}\"\ntags = \"{tags}\"\n")
}

static REGISTRY: LazyLock<Mutex<Registry<'static>>> = LazyLock::new(|| {
    Mutex::new(Registry::start(BED.node(3), &BED.nodes()[..3]).expect("the registry starts"))
});

/// Where the mirrors listen.
const MIRROR: &str = "127.0.0.1:7947";

/// What a pull may take when a neighbour is of no use: far below what waiting for a dead peer
/// costs.
const BOUND: Duration = Duration::from_secs(15);

/// What a pull may take at all.
const PULL_MAX: Duration = Duration::from_secs(60);

fn node(index: usize) -> &'static Node {
    BED.node(index)
}

fn registry() -> MutexGuard<'static, Registry<'static>> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pushes an image that no node has by now, and returns its reference and the digests of its
/// layers. No node asks a mirror for it.
fn fresh(image: Image) -> Result<(String, BTreeSet<String>)> {
    let reference = registry().push(image)?;
    for node in &BED.nodes()[..3] {
        for namespace in ["default", "k8s.io"] {
            let images = node.ok(&["ctr", "-n", namespace, "images", "ls", "-q"])?;
            for image in images.lines() {
                node.ok(&["ctr", "-n", namespace, "images", "rm", "--sync", image])?;
            }
        }
        node.sh("rm -rf /etc/containerd/certs.d")?;
        neighbours::forget(node)?;
        let left = node.ok(&["ctr", "snapshots", "--snapshotter", "godwit", "ls"])?;
        ensure!(left.lines().count() <= 1, "{} still has\n{left}", node.name());
    }
    // Only who has it can say what it is made of.
    pull(node(0), &reference)?;
    let layers = manifest(node(0), &reference)?["layers"].as_array().context("layers")?.clone();
    let digest = |layer: &Value| layer["digest"].as_str().map(str::to_owned);
    Ok((reference, layers.iter().filter_map(digest).collect()))
}

fn digest(node: &Node, reference: &str) -> Result<String> {
    let images = node.ok(&["ctr", "images", "ls", &format!("name=={reference}")])?;
    let digest = images.split_whitespace().find(|word| word.starts_with("sha256:"));
    Ok(digest.context("a digest")?.to_owned())
}

fn manifest(node: &Node, reference: &str) -> Result<Value> {
    let digest = digest(node, reference)?;
    Ok(serde_json::from_str(&node.ok(&["ctr", "content", "get", &digest])?)?)
}

fn diff_ids(node: &Node, reference: &str) -> Result<Vec<Digest>> {
    let manifest = manifest(node, reference)?;
    let config = manifest["config"]["digest"].as_str().context("a configuration")?;
    let config: Value = serde_json::from_str(&node.ok(&["ctr", "content", "get", config])?)?;
    let ids = config["rootfs"]["diff_ids"].as_array().context("diff IDs")?.clone();
    ids.iter().map(|id| Ok(id.as_str().unwrap_or_default().parse()?)).collect()
}

/// Which of the layers the registry was asked for, beyond the first `before` blobs that it ever
/// was.
fn asked_since(before: usize, layers: &BTreeSet<String>) -> Vec<String> {
    let mut asked = registry().asked_for().split_off(before);
    asked.retain(|digest| layers.contains(digest));
    asked
}

/// Pulls, and returns which of the layers the registry was asked for meanwhile, and how long it
/// took.
fn pull_from(
    node: &Node,
    (reference, layers): &(String, BTreeSet<String>),
) -> Result<(Vec<String>, Duration)> {
    let before = registry().asked_for().len();
    let took = pull(node, reference)?;
    Ok((asked_since(before, layers), took))
}

/// A digest of every file, link and mode that a container of the image sees.
fn seen(node: &Node, reference: &str) -> Result<String> {
    let script = "cd /; { find bin/ data etc lib lib64 sbin/ usr -xdev -type f -exec sha256sum {} + ; \
                  find . -xdev ! -path './proc*' ! -path './sys*' ! -path './dev*' ! -path './run*' \
                  -exec stat -c '%n %f %u %g %N %Y' {} + ; } | grep -v '^\\. ' | sort | sha256sum; ls /etc";
    let snapshotter = ["--snapshotter", "godwit", reference, "look"];
    let run = ["ctr", "run", "--rm"];
    node.ok(&[&run[..], &snapshotter, &["sh", "-c", script]].concat())
}

#[test]
fn layers_come_from_a_neighbour_and_go_on_from_whoever_got_them() -> Result<()> {
    let image = fresh(Image::Redis)?;
    ensure!(image.1.len() == 3, "{image:?}");
    let all: BTreeSet<String> = registry().asked_for().into_iter().collect();
    ensure!(image.1.is_subset(&all), "the first had no other node to ask: {all:?}");
    let (asked, _) = pull_from(node(1), &image)?;
    ensure!(asked.is_empty(), "the registry gave {asked:?}");
    let first = seen(node(0), &image.0)?;
    ensure!(first == seen(node(1), &image.0)?, "the trees differ");
    ensure!(!first.contains("issue"), "a whiteout was not kept: {first}");

    // The second has no blob of it, only what it got.
    node(0).stop_daemon()?;
    let (asked, _) = pull_from(node(2), &image)?;
    neighbours::start(node(0))?;
    ensure!(asked.is_empty(), "the registry gave {asked:?}");
    ensure!(first == seen(node(2), &image.0)?, "the trees differ");
    // A layer that is not compressed is its own blob; the others are not had as such.
    let content = node(2).ok(&["ctr", "content", "ls", "-q"])?;
    ensure!(image.1.iter().filter(|layer| content.contains(*layer)).count() <= 1, "{content}");
    Ok(())
}

/// Method: no option but the snapshotter's. The client of 1.7 fetches everything before anything is
/// unpacked.
#[test]
fn a_plain_pull_by_ctr_takes_layers_from_neighbours_if_it_is_that_of_containerd_2() -> Result<()> {
    let image = fresh(Image::Redis)?;
    let expected = if Containerd::of_suite() == Containerd::V1 { 3 } else { 0 };
    let before = registry().asked_for().len();
    let ctr = Containerd::of_suite().ctr();
    let plain = [&ctr, "images", "pull", "--snapshotter", "godwit", &image.0];
    node(1).command(&plain).timeout(PULL_MAX).ok()?;
    let asked = asked_since(before, &image.1);
    ensure!(asked.len() == expected, "the registry gave {asked:?}, not {expected}");
    ensure!(seen(node(0), &image.0)? == seen(node(1), &image.0)?, "the trees differ");
    Ok(())
}

/// Method: the lowest layer's blob is here, but no snapshot of it. Told that this layer is not
/// there, containerd would download all those above it at once.
#[test]
fn a_layer_that_is_here_only_as_a_blob_makes_the_registry_give_none_of_the_others() -> Result<()> {
    let image = fresh(Image::Redis)?;
    images::import(node(1), Image::Busybox, "overlayfs")?;
    let (asked, _) = pull_from(node(1), &image)?;
    ensure!(asked.is_empty(), "the registry gave {asked:?}");
    ensure!(seen(node(0), &image.0)? == seen(node(1), &image.0)?, "the trees differ");
    Ok(())
}

/// Method: both have all of it, behind links of the same rate.
#[test]
fn two_neighbours_share_a_layer() -> Result<()> {
    let image = fresh(Image::Large)?;
    pull(node(1), &image.0)?;
    let holders = [node(0), node(1)];
    let sent = || Ok::<_, anyhow::Error>([holders[0].traffic()?.sent, holders[1].traffic()?.sent]);
    holders.iter().try_for_each(|holder| holder.set_rate(Some(50)))?;
    let before = sent()?;
    let pulled = pull_from(node(2), &image);
    let after = sent()?;
    holders.iter().try_for_each(|holder| holder.set_rate(None))?;
    let (asked, took) = pulled?;
    ensure!(asked.is_empty(), "the registry gave {asked:?}");
    let shares = [after[0] - before[0], after[1] - before[1]];
    let (sum, layer) = (shares[0] + shares[1], images::LARGE_BYTES as u64);
    eprintln!("{shares:?} bytes in {took:?}");
    ensure!(shares.iter().all(|share| *share > sum / 4), "one sent nearly all: {shares:?}");
    ensure!(sum > layer && sum < layer * 13 / 10, "{shares:?} bytes of a layer of {layer}");
    Ok(())
}

/// Method: two images with the same layers the other way round. containerd unpacks each chain ID
/// once at a time, but these have none in common, so it asks for the large layer twice at once.
#[test]
fn two_pulls_at_once_bring_a_layer_that_they_share_once() -> Result<()> {
    let (image, turned) = (fresh(Image::Large)?, registry().push(Image::Turned)?);
    let (told, asked) = (node(1).log_end("daemon"), registry().asked_for().len());
    let before = node(1).traffic()?.received;
    let pulled = std::thread::scope(|scope| {
        let pulls = [&image.0, &turned].map(|image| scope.spawn(|| pull(node(1), image)));
        let join = |pull: std::thread::ScopedJoinHandle<'_, Result<Duration>>| {
            pull.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        pulls.map(join).into_iter().collect::<Result<Vec<_>>>()
    });
    let (took, received) = (pulled?, node(1).traffic()?.received - before);
    eprintln!("{took:?}: {received} bytes");
    let (asked, log) = (asked_since(asked, &image.1), node(1).log_since("daemon", told));
    ensure!(asked.is_empty(), "the registry gave {asked:?}: {log}");
    let layer = images::LARGE_BYTES as u64;
    ensure!(received < layer * 13 / 10, "{received} bytes came, of a layer of {layer}: {log}");
    for image in [&image.0, &turned] {
        let run = ["ctr", "run", "--rm", "--snapshotter", "godwit", image, "look"];
        let bytes = node(1).ok(&[&run[..], &["sh", "-c", "cat /data/* | wc -c"]].concat())?;
        ensure!(bytes.trim() == layer.to_string(), "{image} has {bytes}");
    }
    Ok(())
}

/// Method: the one keeps the layers, damaged; the other has them unpacked from its containerd's
/// blobs.
#[test]
fn when_whoever_keeps_a_layer_is_of_no_use_another_makes_it() -> Result<()> {
    let image = fresh(Image::Redis)?;
    pull(node(1), &image.0)?;
    neighbours::forget(node(0))?;
    Bad::Lying.spoil(node(1))?;
    let told = node(2).log_end("daemon");
    let (asked, took) = pull_from(node(2), &image)?;
    let log = node(2).log_since("daemon", told);
    let is_refused = |line: &str| line.contains("peer failed") && line.contains("edge-b");
    ensure!(log.lines().any(is_refused), "the damaged one was not asked: {log}");
    ensure!(asked.is_empty() && took < BOUND, "{took:?}, the registry gave {asked:?}");
    ensure!(seen(node(0), &image.0)? == seen(node(2), &image.0)?, "the trees differ");
    Ok(())
}

/// Bytes of objects that are not what their names say.
#[test]
fn a_neighbour_with_wrong_bytes_costs_time_and_nothing_else() -> Result<()> {
    let image = fresh(Image::Redis)?;
    // Now it has made objects of its layers.
    pull(node(2), &image.0)?;
    neighbours::forget(node(2))?;
    Bad::Lying.spoil(node(0))?;
    let (told, sent) = (node(1).log_end("daemon"), node(0).traffic()?.sent);
    let (asked, took) = pull_from(node(1), &image)?;
    ensure!(asked.len() == 3 && took < BOUND, "{took:?}, the registry gave {asked:?}");
    let log = node(1).log_since("daemon", told);
    let is_refused = |line: &str| line.contains("peer failed") && line.contains("edge-a");
    ensure!(log.lines().any(is_refused), "nothing was asked of the liar: {log}");
    let sent = node(0).traffic()?.sent - sent;
    // It is found out with the first object, the list of the layer's chunks.
    ensure!(sent > 1 << 10, "the liar sent only {sent} bytes");
    ensure!(seen(node(0), &image.0)? == seen(node(1), &image.0)?, "the trees differ");
    Ok(())
}

/// Objects that are sound, but of another layer than it is said: the sum is wrong, and no part of
/// it.
#[test]
fn a_neighbour_that_passes_one_layer_off_as_another_is_found_out() -> Result<()> {
    let image = fresh(Image::Redis)?;
    pull(node(1), &image.0)?;
    let ids = diff_ids(node(0), &image.0)?;
    node(0).stop_daemon()?;
    {
        let store = Store::open(&node(0).path("/var/lib/godwit/store"), Options::default())?;
        let root_of = |id: &Digest| {
            Ok::<_, anyhow::Error>(store.snapshots(&Subject::ImageLayer(*id))?[0].clone())
        };
        let honest: Vec<_> = ids.iter().map(root_of).collect::<Result<_>>()?;
        for (index, (id, kept)) in honest.iter().enumerate() {
            ensure!(kept.root_kind == Kind::Layer as u8, "{kept:?}");
            let (_, other) = &honest[(index + 1) % honest.len()];
            let (root, size_bytes) = (other.root, other.size_bytes);
            store.record(&Snapshot { root, size_bytes, ..kept.clone() })?;
            store.remove_snapshot(*id)?;
        }
    }
    neighbours::start(node(0))?;
    // The second is honest, but away.
    node(1).stop_daemon()?;
    let (told, sent) = (node(2).log_end("daemon"), node(0).traffic()?.sent);
    let (asked, took) = pull_from(node(2), &image)?;
    neighbours::start(node(1))?;
    ensure!(asked.len() == 3 && took < BOUND, "{took:?}, the registry gave {asked:?}");
    let log = node(2).log_since("daemon", told);
    ensure!(log.contains("bytes do not match"), "no node noticed: {log}");
    let sent = node(0).traffic()?.sent - sent;
    ensure!(sent > 512 << 10, "the liar sent only {sent} bytes");
    ensure!(seen(node(1), &image.0)? == seen(node(2), &image.0)?, "the trees differ");
    Ok(())
}

/// Method: it stops answering, or vanishes, before the pull or in the middle of a layer, or sends
/// it too slowly.
#[test]
fn neighbours_that_stall_or_die_are_waited_for_only_so_long() -> Result<()> {
    for bad in ["stopped", "cut off midway", "killed midway", "trickles"] {
        let image = fresh(Image::Redis)?;
        match bad {
            "stopped" => node(0).pause_daemon()?,
            "trickles" => node(0).set_rate(Some(1))?,
            _ => node(0).set_rate(Some(8))?,
        }
        let told = node(1).log_end("daemon");
        let (before, received) = (registry().asked_for().len(), node(1).traffic()?.received);
        let (asked, took) = std::thread::scope(|scope| {
            let pulled = scope.spawn(|| pull_from(node(1), &image));
            if bad.ends_with("midway") {
                wait_until("a layer is on its way", BOUND, || {
                    Ok(node(1).traffic()?.received > received + (512 << 10))
                })?;
                let asked = asked_since(before, &image.1);
                match bad {
                    "cut off midway" => node(0).cut_link()?,
                    _ => node(0).kill_daemon()?,
                }
                ensure!(asked.is_empty(), "{bad}: it came from the registry: {asked:?}");
            }
            pulled.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        eprintln!("{bad}: {took:?}");
        match bad {
            "stopped" => node(0).resume_daemon()?,
            "killed midway" => neighbours::start(node(0))?,
            "cut off midway" => node(0).mend_link()?,
            _ => {}
        }
        node(0).set_rate(None)?;
        ensure!(!asked.is_empty() && took < BOUND, "{bad}: {took:?}, the registry gave {asked:?}");
        let log = node(1).log_since("daemon", told);
        ensure!(bad != "trickles" || log.contains("no layer from the neighbours"), "{log}");
        ensure!(seen(node(0), &image.0)? == seen(node(1), &image.0)?, "{bad}: the trees differ");
    }
    Ok(())
}

/// Method: killed while containerd waits for a layer that a neighbour sends; no node asked the
/// registry for one by then.
#[test]
fn a_daemon_that_dies_while_it_brings_a_layer_fails_the_pull_and_leaves_nothing() -> Result<()> {
    let (image, at) = (fresh(Image::Redis)?, node(1));
    let (asked, received) = (registry().asked_for().len(), at.traffic()?.received);
    node(0).set_rate(Some(8))?;
    let begun = Instant::now();
    let failed = std::thread::scope(|scope| {
        let pulling = scope.spawn(|| pull(at, &image.0));
        wait_until("a layer is on its way", BOUND, || {
            Ok(at.traffic()?.received > received + (512 << 10))
        })?;
        let asked = asked_since(asked, &image.1);
        at.kill_daemon()?;
        let pulled = pulling.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ensure!(asked.is_empty(), "the registry gave {asked:?}");
        Ok(pulled.err())
    })?;
    node(0).set_rate(None)?;
    let failed = failed.context("the pull did not fail")?.to_string();
    ensure!(begun.elapsed() < BOUND && failed.contains("Unavailable"), "{failed}");
    neighbours::start(at)?;
    let (asked, _) = pull_from(at, &image)?;
    ensure!(asked.is_empty(), "the registry gave {asked:?}");
    ensure!(seen(node(0), &image.0)? == seen(at, &image.0)?, "the trees differ");
    at.ok(&["godwit", "check"])?;
    at.ok(&["ctr", "images", "rm", "--sync", &image.0])?;
    let left = "ctr leases ls -q; ls /var/lib/godwit/snapshots/fs";
    wait_until("nothing is left", BOUND, || Ok(at.sh(left)?.is_empty()))
        .with_context(|| at.sh(left).unwrap_or_default())
}

/// A kubelet's way to pull, for pods of a handler.
fn pull_for_pods(node: &Node, reference: &str, handler: &str) -> Result<()> {
    let socket = node.path("/run/containerd/containerd.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = containerd_client::connect(socket).await?;
        let mut client = v1::image_service_client::ImageServiceClient::new(channel);
        let handler = ("io.containerd.cri.runtime-handler".to_owned(), handler.to_owned());
        let spec = v1::ImageSpec { image: reference.to_owned(), ..v1::ImageSpec::default() };
        let pod = v1::PodSandboxConfig {
            annotations: [handler].into(),
            ..v1::PodSandboxConfig::default()
        };
        let pull = v1::PullImageRequest {
            image: Some(spec),
            sandbox_config: Some(pod),
            ..v1::PullImageRequest::default()
        };
        tokio::time::timeout(PULL_MAX, client.pull_image(pull)).await??;
        Ok(())
    })
}

/// For pods of the handler that has our snapshotter.
#[test]
fn the_cri_pulls_layers_from_neighbours() -> Result<()> {
    let image = fresh(Image::Memhog)?;
    let before = registry().asked_for().len();
    pull_for_pods(node(1), &image.0, "godwit")?;
    let asked = registry().asked_for().split_off(before);
    ensure!(!asked.iter().any(|digest| image.1.contains(digest)), "the registry gave {asked:?}");
    let list = ["ctr", "-n", "k8s.io", "snapshots", "--snapshotter", "godwit", "ls"];
    let snapshots = node(1).ok(&list)?;
    ensure!(snapshots.matches("Committed").count() == 3, "{snapshots}");
    Ok(())
}

/// No node has the compressed layers of the image any more, and none can ask the registry.
#[test]
fn a_container_whose_layers_came_from_neighbours_moves_without_the_registry() -> Result<()> {
    let image = fresh(Image::Redis)?;
    pull(node(1), &image.0)?;
    node(0).ok(&["ctr", "images", "rm", "--sync", &image.0])?;
    for one in &BED.nodes()[..3] {
        let content = one.ok(&["ctr", "content", "ls", "-q"])?;
        let blobs = image.1.iter().filter(|layer| content.contains(*layer)).count();
        ensure!(blobs <= 1, "{} has {blobs} layers as blobs", one.name());
    }
    let contents = BED.nodes()[..3].iter().map(|one| one.ok(&["ctr", "content", "ls", "-q"]));
    let contents = contents.collect::<Result<Vec<_>>>()?.concat();
    let nowhere: Vec<_> = image.1.iter().filter(|layer| !contents.contains(*layer)).collect();
    let layers = manifest(node(1), &image.0)?["layers"].as_array().context("layers")?.clone();
    let is_nowhere = |layer: &&Value| nowhere.iter().any(|digest| layer["digest"] == ***digest);
    let in_chunks: u64 =
        layers.iter().filter(is_nowhere).filter_map(|layer| layer["size"].as_u64()).sum();
    registry().stop()?;
    let moved = (|| {
        // Mirrors have no use for chunks: the compressed bytes are not to be had of them.
        for layer in &nowhere {
            let answer = ask_mirror(node(2), "GET", &format!("/v2/redis/blobs/{layer}"))?;
            ensure!(answer.starts_with("HTTP/1.1 404"), "{layer}: {:?}", answer.lines().next());
        }
        let script = "read id < /proc/sys/kernel/random/uuid; i=0; \
                      while :; do i=$((i+1)); echo $id $i > /count; usleep 20000; done";
        let run = ["ctr", "run", "-d", "--runtime", "io.containerd.runc.godwit.v1"];
        let rest = ["--snapshotter", "godwit", &image.0, "moves", "sh", "-c", script];
        node(1).ok(&[&run[..], &rest].concat())?;
        let (id, before) = counted(node(1), "moves")?;
        let planned = planned_image("moves", node(1), node(2))?;
        let of = |node: &Node| planned["wire_bytes_by_node"][node.name()].as_u64().unwrap_or(0);
        // The first has no blob any more, and made the layers for the second.
        ensure!(planned["candidates"][0]["node"] == node(0).name(), "{planned}");
        let held = planned["candidates"][0]["held_bytes"].as_u64().unwrap_or(0);
        ensure!(held == in_chunks && of(node(0)) == in_chunks, "not {in_chunks}: {planned}");
        workload::migrated(node(2), "moves", node(1), node(2), &[])?;
        ensure!(workload::task(node(2), "moves")?.as_deref() == Some("RUNNING"), "it does not run");
        let (same, after) = counted(node(2), "moves")?;
        ensure!(same == id && after > before, "{id} {before} became {same} {after}");
        wait_until("it goes on", BOUND, || Ok(counted(node(2), "moves")?.1 > after))?;
        node(2).ok(&["ctr", "tasks", "rm", "-f", "moves"])?;
        node(2).ok(&["ctr", "containers", "rm", "moves"]).map(drop)
    })();
    registry().restart()?;
    ensure!(nowhere.len() == 2, "of the compressed layers there are blobs: {contents}");
    moved
}

/// What `godwit plan` says of an image.
fn planned_image(name: &str, from: &Node, to: &Node) -> Result<Value> {
    let words =
        ["godwit", "--output", "json", "plan", name, "--from", from.name(), "--to", to.name()];
    let plan: Value = serde_json::from_str(&to.ok(&words)?)?;
    let subjects = plan["subjects"].as_array().context("subjects")?;
    let image = subjects.iter().find(|one| one["subject"] == "image");
    Ok(image.context("the image")?.clone())
}

/// What a container that counts has written last: who it is, and how far it has come.
fn counted(node: &Node, name: &str) -> Result<(String, u64)> {
    let mut found = None;
    wait_until("it counts", BOUND, || {
        let text =
            node.ok(&["ctr", "tasks", "exec", "--exec-id", "look", name, "cat", "/count"])?;
        // Nothing at all while it is written again.
        found = text.trim().split_once(' ').map(|(id, count)| (id.to_owned(), count.to_owned()));
        Ok(found.is_some())
    })?;
    let (id, count) = found.context("a count")?;
    Ok((id, count.parse()?))
}
