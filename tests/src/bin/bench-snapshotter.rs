//! `make bench-snapshotter`: what the snapshotter costs beside containerd's overlayfs, and what
//! storing a tree costs beside hashing it, in one run.
//!
//! - **lifecycle**: the snapshots of an image of ten layers are prepared, committed and removed,
//!   through containerd. Before each there is a pause, so that neither pays for what the other has
//!   left for later; what is ours of that, making directories in advance, is not in the figure. For
//!   comparison, the same with a small file in each layer. One takes some 40 ms, of which the disk
//!   decides most, so that there are more of them than of anything else.
//! - **unpack**: an image of many small files is imported whose blobs containerd has.
//! - **ingest**: `godwit volume import` of a tree, once of bytes that nothing compresses and once
//!   of text, against one core's SHA-256 as `openssl speed` gives it. The store is empty each time.
//! - **pull**: an image with a layer of 200 MiB is pulled that three neighbours have, with links of
//!   100 Mbit/s each, or only one of them. The destination's link has 1 Gbit/s, and the registry is
//!   asked for no layer.
//!
//! What is compared is interleaved, and each figure is a median. Written to
//! `target/bench/snapshotter.json`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use containerd_client::tonic::Request;
use containerd_client::tonic::transport::Channel;
use godwit_tests::command::host;
use godwit_tests::images::{self, Image};
use godwit_tests::neighbours::{self, forget};
use godwit_tests::node::CONTAINERD_SOCKET;
use godwit_tests::registry::{self, Registry};
use godwit_tests::{Bed, BedOptions, Node, pattern, place};
use serde_json::{Map, json};

/// Ours first.
const SNAPSHOTTERS: [&str; 2] = ["godwit", "overlayfs"];
const LAYERS: usize = 10;
/// Pairs of lifecycles for each run.
const LIFECYCLES: usize = 10;
/// Before a lifecycle: containerd has collected what was removed, and directories are made again.
const PAUSE: Duration = Duration::from_millis(300);
/// How long one import may take.
const WORK_MAX: Duration = Duration::from_secs(300);
/// Size of the files that are ingested.
const FILE_BYTES: usize = 16 << 20;
/// Where they lie in the node: a real file system, not an overlay.
const TREE: &str = "/var/lib/godwit/bench";
/// Rates of the neighbours' links and of the destination's, in Mbit/s.
const PULL_MBIT: (u32, u32) = (100, 1000);

#[derive(Parser)]
struct Arguments {
    /// Pairs of unpackings, imports of each kind of tree, and a tenth of the pairs of lifecycles.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// Pulls from three neighbours and from one.
    #[arg(long, default_value_t = 5)]
    pulls: usize,
    /// Size of the tree that is ingested, in MiB.
    #[arg(long, default_value_t = 1024)]
    tree_mib: usize,
    /// Measure one part and no other, and write no file.
    #[arg(long)]
    only: Option<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Lifecycle,
    Unpack,
    Ingest,
    Pull,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let runs = arguments.runs;
    let is_wanted = |part| arguments.only.is_none_or(|only| only == part);
    let mut result = Map::new();
    let mut note = |name: &str, ratio: f64| {
        result.insert(name.to_owned(), json!((1000.0 * ratio).round() / 1000.0));
    };
    let bed = Bed::start(&BedOptions::nodes(1))?;
    let node = bed.node(0);
    if is_wanted(Part::Lifecycle) {
        let [ours, theirs] = lifecycle(node, runs, true)?;
        eprintln!("lifecycle with a file in each layer: {ours:.4} and {theirs:.4} s");
        let [ours, theirs] = lifecycle(node, runs, false)?;
        eprintln!("lifecycle: {ours:.4} and {theirs:.4} s");
        note("lifecycle_ratio", ours / theirs);
    }
    if is_wanted(Part::Unpack) {
        let [ours, theirs] = unpack(node, runs)?;
        eprintln!("unpack: {ours:.2} and {theirs:.2} s");
        note("unpack_ratio", ours / theirs);
    }
    if is_wanted(Part::Ingest) {
        let hashes = sha256_bytes_per_second()?;
        let (plain, text) = (ingest(node, &arguments, false)?, ingest(node, &arguments, true)?);
        eprintln!("SHA-256 {hashes:.0} B/s, ingest {plain:.0} B/s, compressed {text:.0} B/s");
        note("ingest_of_sha256_speed", plain / hashes);
        note("ingest_compressed_of_sha256_speed", text / hashes);
    }
    drop(bed);
    if is_wanted(Part::Pull) {
        let [three, one] = pull_from_neighbours(arguments.pulls)?;
        eprintln!("pull from three {three:.2} s, from one {one:.2} s");
        note("three_peer_speedup", one / three);
    }
    println!("{}", serde_json::to_string_pretty(&result)?);
    if arguments.only.is_some() {
        return Ok(());
    }
    let path = place::target().join("bench/snapshotter.json");
    fs::create_dir_all(path.parent().context("a directory")?)?;
    Ok(fs::write(&path, serde_json::to_string_pretty(&result)?)?)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Medians of `work` for both of `kinds`, each of which goes first in half of the runs.
fn medians<K: Copy>(
    kinds: [K; 2],
    runs: usize,
    mut work: impl FnMut(K) -> Result<f64>,
) -> Result<[f64; 2]> {
    let mut times: [Vec<f64>; 2] = Default::default();
    for run in 0..runs {
        for which in if run % 2 == 0 { [0, 1] } else { [1, 0] } {
            times[which].push(work(kinds[which])?);
        }
    }
    Ok(times.map(median))
}

/// Seconds of one lifecycle of ten layers, whose files, if they have any, are written by the way.
fn lifecycle(node: &Node, runs: usize, has_files: bool) -> Result<[f64; 2]> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = runtime.block_on(async {
        let channel = containerd_client::connect(node.path(CONTAINERD_SOCKET)).await?;
        anyhow::Ok(SnapshotsClient::new(channel))
    })?;
    medians(SNAPSHOTTERS, LIFECYCLES * runs, |snapshotter| {
        std::thread::sleep(PAUSE);
        let begun = Instant::now();
        runtime.block_on(live(client.clone(), snapshotter, has_files.then_some(node)))?;
        Ok(begun.elapsed().as_secs_f64())
    })
}

async fn live(
    mut client: SnapshotsClient<Channel>,
    snapshotter: &str,
    writer: Option<&Node>,
) -> Result<()> {
    let name = |layer: usize| if layer == 0 { String::new() } else { format!("layer-{layer}") };
    for layer in 1..=LAYERS {
        let (snapshotter, key) = (snapshotter.to_owned(), format!("key-{layer}"));
        // Or containerd collects what nothing refers to.
        let labels = HashMap::from([("containerd.io/gc.root".to_owned(), "bench".to_owned())]);
        let prepare = PrepareSnapshotRequest {
            snapshotter: snapshotter.clone(),
            key: key.clone(),
            parent: name(layer - 1),
            labels: labels.clone(),
        };
        let prepared = client.prepare(named(prepare)).await?.into_inner();
        if let Some(node) = writer {
            let mount = prepared.mounts.first().context("no mount")?;
            let upper = mount.options.iter().find_map(|option| option.strip_prefix("upperdir="));
            fs::write(node.path(upper.unwrap_or(&mount.source)).join("file"), "of a layer")?;
        }
        let commit = CommitSnapshotRequest { snapshotter, key, name: name(layer), labels };
        client.commit(named(commit)).await?;
    }
    for layer in (1..=LAYERS).rev() {
        let (snapshotter, key) = (snapshotter.to_owned(), name(layer));
        client.remove(named(RemoveSnapshotRequest { snapshotter, key })).await?;
    }
    Ok(())
}

fn named<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let namespace = containerd_client::tonic::metadata::MetadataValue::from_static("bench");
    request.metadata_mut().insert("containerd-namespace", namespace);
    request
}

/// Seconds of importing the image of small files when its blobs are there already, so that it is
/// unpacked and no more.
fn unpack(node: &Node, runs: usize) -> Result<[f64; 2]> {
    let (archive, reference) = (images::archive(Image::Files)?, Image::Files.reference());
    let import = |options: &[&str]| {
        let words = [&["ctr", "images", "import"], options, &["-"]].concat();
        node.command(&words).stdin_file(&archive).timeout(WORK_MAX).ok()
    };
    medians(SNAPSHOTTERS, runs, |snapshotter| {
        import(&["--no-unpack"])?;
        let begun = Instant::now();
        import(&["--snapshotter", snapshotter])?;
        let took = begun.elapsed();
        node.ok(&["ctr", "images", "rm", "--sync", reference])?;
        Ok(took.as_secs_f64())
    })
}

/// Bytes per second of one core, for pieces as large as a chunk.
fn sha256_bytes_per_second() -> Result<f64> {
    let command = ["openssl", "speed", "-mr", "-seconds", "3", "-bytes", "65536", "-evp", "sha256"];
    let text = host(&command)?;
    let line = text.lines().find(|line| line.starts_with("+F:")).context("no result")?;
    Ok(line.rsplit(':').next().context("no figure")?.trim().parse()?)
}

/// Bytes per second of an import.
fn ingest(node: &Node, arguments: &Arguments, is_text: bool) -> Result<f64> {
    let tree = node.path(TREE);
    fs::create_dir_all(&tree)?;
    let files = (arguments.tree_mib << 20) / FILE_BYTES;
    for number in 0..files {
        write(&tree.join(number.to_string()), number as u64, is_text)?;
    }
    let mut times = Vec::new();
    for _ in 0..arguments.runs {
        forget(node)?;
        let begun = Instant::now();
        let import = node.command(&["godwit", "volume", "import", TREE]);
        let digest = import.timeout(WORK_MAX).ok()?;
        times.push(begun.elapsed().as_secs_f64());
        ensure!(digest.contains("sha256:"), "{digest}");
        node.ok(&["godwit", "volume", "rm", digest.trim()])?;
    }
    fs::remove_dir_all(&tree)?;
    Ok((files * FILE_BYTES) as f64 / median(times))
}

/// A file of bytes that nothing compresses, or of words of hexadecimal digits: half as many bits as
/// bytes.
fn write(path: &Path, number: u64, is_text: bool) -> Result<()> {
    let mut bytes = vec![0; FILE_BYTES];
    if is_text {
        let mut half = vec![0; FILE_BYTES / 2];
        pattern::fill(number, 1, &mut half);
        for (two, byte) in bytes.chunks_mut(2).zip(half) {
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value & 15)];
            two.copy_from_slice(&[digit(byte), digit(byte >> 4)]);
        }
    } else {
        pattern::fill(number, 2, &mut bytes);
    }
    Ok(fs::write(path, bytes)?)
}

/// Seconds of a pull from three neighbours and from one. What is not measured is unshaped.
fn pull_from_neighbours(runs: usize) -> Result<[f64; 2]> {
    let bed = Bed::start(&BedOptions::nodes(5))?;
    let (neighbours, destination) = (&bed.nodes()[..3], bed.node(3));
    let registry = Registry::start(bed.node(4), &bed.nodes()[..4])?;
    let reference = registry.push(Image::Large)?;
    for node in neighbours {
        registry::pull(node, &reference)?;
    }
    neighbours.iter().try_for_each(|node| node.set_rate(Some(PULL_MBIT.0)))?;
    destination.set_rate(Some(PULL_MBIT.1))?;
    medians([3, 1], runs, |count| {
        neighbours[count..].iter().try_for_each(Node::stop_daemon)?;
        forget(destination)?;
        let before = registry.asked_for().len();
        let took = registry::pull(destination, &reference)?;
        eprintln!("from {count}: {took:?}");
        let asked = registry.asked_for().split_off(before);
        ensure!(asked.len() <= 1, "more than the configuration came from the registry: {asked:?}");
        destination.ok(&["ctr", "images", "rm", "--sync", &reference])?;
        neighbours[count..].iter().try_for_each(neighbours::start)?;
        Ok(took.as_secs_f64())
    })
}
