//! Downtime of containers of an unusual shape, beside plain CRIU's.
//!
//! A probe with many mappings, threads, processes or files is planned and moved to another node.
//! There the same container is then dumped by plain `runc checkpoint` and restored by `runc
//! restore`, on the same disk.
//!
//! Plain CRIU moves neither its images nor volumes. Nothing is added for the images. A volume must
//! be copied twice by hand: while the container runs, and what has changed since between dump and
//! restore. So the ratio is given twice: to the two commands alone, and to them
//! with that second copy, made by rsync to another directory of the same disk.

use std::fs;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container};
use godwit_tests::{Bed, BedOptions, Invocation, Node};
use serde_json::{Value, json};

use super::{LINK_MBIT, median};

/// What is measured without a choice.
pub(crate) const DEFAULT: &str = "mappings=60000,threads=2000,processes=250,files=100000";

/// Longest wait until a probe has its shape, or goes on.
const SHAPE_TIME_MAX: Duration = Duration::from_secs(120);

/// Where containerd 1.7 and our shim keep a container's bundle and runc's state.
const BUNDLES: &str = "/run/containerd/io.containerd.runtime.v2.task/default";
const STATES: &str = "/run/containerd/runc/default";

/// Where the plain dump lies, on the same disk as Godwit's.
const PLAIN: &str = "/var/lib/godwit/plain";

/// What Godwit keeps of files too.
const RSYNC: &[&str] = &["rsync", "--archive", "--hard-links", "--acls", "--xattrs", "--delete"];

/// Flags that Godwit's dumps and restores have too.
const FLAGS: &str = "--tcp-established --file-locks";

/// Many of something.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    kind: String,
    count: usize,
}

impl FromStr for Shape {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (kind, count) = text.split_once('=').context("a shape is KIND=COUNT")?;
        let known = ["mappings", "threads", "processes", "files"];
        ensure!(known.contains(&kind), "{kind:?} is none of {}", known.join(", "));
        Ok(Self { kind: kind.to_owned(), count: count.parse()? })
    }
}

impl Shape {
    fn words(&self) -> Vec<String> {
        let mut words = vec!["probe".to_owned(), self.kind.clone(), self.count.to_string()];
        match self.kind.as_str() {
            // One thread each, and pages that all share by copy-on-write.
            "processes" => words.extend(["1", "256"].map(str::to_owned)),
            "files" => words.push("/data".to_owned()),
            _ => {}
        }
        words
    }
}

/// Measures every shape, interleaved.
pub(crate) fn measure(shapes: &[Shape], runs: usize) -> Result<Value> {
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(LINK_MBIT))?;
    images::import(bed.node(0), Image::Probe, "godwit")?;
    let mut all: Vec<Vec<Value>> = vec![Vec::new(); shapes.len()];
    for run in 1..=runs {
        for (shape, measured) in shapes.iter().zip(&mut all) {
            let name = format!("{}-{run}", shape.kind);
            let one = measure_one(&bed, shape, &name)
                .with_context(|| format!("{} {}, run {run}", shape.count, shape.kind))?;
            eprintln!("{name}: {one}");
            measured.push(one);
        }
    }
    let shapes = shapes.iter().zip(&all).map(|(shape, measured)| summary(shape, measured));
    Ok(json!({"link_mbit": LINK_MBIT, "runs": runs, "shapes": shapes.collect::<Vec<_>>()}))
}

fn summary(shape: &Shape, measured: &[Value]) -> Value {
    let field = |name: &'static str| median(measured, |one| one[name].as_f64());
    json!({
        "kind": shape.kind,
        "count": shape.count,
        "downtime_ms": field("downtime_ms"),
        "plain_ms": field("plain_ms"),
        "ratio": ratio(measured, "downtime_ms", "plain_ms"),
        "plain_copy_ms": field("plain_copy_ms"),
        "ratio_with_copy": ratio(measured, "downtime_ms", "plain_with_copy_ms"),
        "predicted_ms": field("predicted_ms"),
        "predicted_ratio": ratio(measured, "predicted_ms", "downtime_ms"),
    })
}

/// The median of each run's own ratio.
fn ratio(measured: &[Value], field: &'static str, to: &'static str) -> Option<f64> {
    median(measured, |one| Some(one[field].as_f64()? / one[to].as_f64()?))
}

fn measure_one(bed: &Bed, shape: &Shape, name: &str) -> Result<Value> {
    let (source, destination) = (bed.node(0), bed.node(1));
    let words = shape.words();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let mut container = Container::new(name, Image::Probe).command(&words);
    if shape.kind == "files" {
        source.ok(&["godwit", "volume", "create", name])?;
        container = container.volume(name, "/data", "rw");
    }
    container.start(source)?;
    let init = init(source, name)?;
    wait_until("the probe has its shape", SHAPE_TIME_MAX, || is_whole(source, init, shape, 2))?;

    let plan = ["godwit", "--output", "json", "plan", name, "--from", "edge-a", "--to", "edge-b"];
    let plan: Value = serde_json::from_str(&source.ok(&plan)?)?;
    let report = workload::migrated(source, name, source, destination, &[])?;
    let restored = self::init(destination, name)?;
    goes_on(destination, restored, shape)?;

    let plain = plain(destination, name, shape);
    let clean = format!(
        "runc --root {PLAIN}/state delete -f plain 2> /dev/null || :; \
         ctr tasks rm -f {name}; ctr containers rm {name}; cd {PLAIN}; rm -rf bundle state images *.log"
    );
    destination.sh(&clean)?;
    let Plain { dump, copy, restore } = plain?;
    Ok(json!({
        "downtime_ms": report["downtime_ms"],
        "phases_ms": report["phases_ms"],
        "predicted_ms": plan["downtime_ms"],
        "plain_ms": dump + restore,
        "plain_dump_ms": dump,
        "plain_restore_ms": restore,
        "plain_copy_ms": copy,
        "plain_with_copy_ms": dump + copy.unwrap_or(0.0) + restore,
    }))
}

/// How long each step takes, in milliseconds.
struct Plain {
    dump: f64,
    /// Of what has changed in the volume, if there is one.
    copy: Option<f64>,
    restore: f64,
}

/// Dumps the container and restores it under another id.
fn plain(node: &Node, name: &str, shape: &Shape) -> Result<Plain> {
    let (bundle, images) = (format!("{BUNDLES}/{name}"), format!("{PLAIN}/images"));
    node.sh(&format!("mkdir -p {PLAIN}/bundle {PLAIN}/state {PLAIN}/volume-{name} {images}"))?;
    let text = fs::read(node.path(format!("{bundle}/config.json")))?;
    let mut config: Value = serde_json::from_slice(&text)?;
    config["root"]["path"] = format!("{bundle}/rootfs").into();
    // Our shim tells CRIU by this file how to restore; runc reads it at the dump too.
    if let Some(told) = config["annotations"]["org.criu.config"].as_str() {
        fs::write(node.path(told), "")?;
    }
    config.as_object_mut().context("a specification")?.remove("annotations");
    fs::write(node.path(format!("{PLAIN}/bundle/config.json")), config.to_string())?;
    let has_volume = shape.kind == "files";
    if has_volume {
        // As often as Godwit does by then.
        copy_volume(node, name)?;
        copy_volume(node, name)?;
    }
    let dump = timed(
        node,
        &format!(
            "runc --root {STATES} checkpoint {FLAGS} --image-path {images} --work-path {PLAIN} {name}"
        ),
    )?;
    let copy = has_volume.then(|| copy_volume(node, name)).transpose()?;
    let restore = timed(
        node,
        &format!(
            "runc --root {PLAIN}/state restore -d {FLAGS} --image-path {images} --work-path {PLAIN} \
         --bundle {PLAIN}/bundle plain < /dev/null > /dev/null 2>&1"
        ),
    )?;
    let state = node.ok(&["runc", "--root", &format!("{PLAIN}/state"), "state", "plain"])?;
    let state: Value = serde_json::from_str(&state)?;
    let init = state["pid"].as_u64().context("no process")?;
    goes_on(node, u32::try_from(init)?, shape)?;
    Ok(Plain { dump, copy, restore })
}

/// Brings a copy of the volume up to date, which stays until the node is removed. Returns how long
/// that took, in milliseconds.
fn copy_volume(node: &Node, name: &str) -> Result<f64> {
    let from = node.state_path(&format!("volumes/{name}/data"));
    let to = node.state_path(&format!("plain/volume-{name}"));
    // With a slash it is the content that is copied.
    let ends = [from, to].map(|path| format!("{}/", path.display()));
    let words: Vec<&str> = RSYNC.iter().copied().chain(ends.iter().map(String::as_str)).collect();
    let begun = Instant::now();
    Invocation::new(&words).timeout(SHAPE_TIME_MAX).ok()?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// How long a command takes inside the node, in milliseconds.
fn timed(node: &Node, command: &str) -> Result<f64> {
    let begun = Instant::now();
    let done = node.command(&["sh", "-c", command]).timeout(SHAPE_TIME_MAX).ok();
    done.with_context(|| node.sh(&format!("tail -n 5 {PLAIN}/*.log")).unwrap_or_default())?;
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

fn init(node: &Node, name: &str) -> Result<u32> {
    let listed = node.ok(&["ctr", "tasks", "ls"])?;
    let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
    let pid = line.and_then(|line| line.split_whitespace().nth(1)).context("no such task")?;
    Ok(pid.parse()?)
}

/// How often the probe has beaten. Errors: it found something wrong.
fn beats(node: &Node, init: u32, shape: &Shape) -> Result<u64> {
    let line = node.sh(&format!("cat /proc/{init}/root/status"))?;
    let right = format!("{} {} wrong 0 beats ", shape.kind, shape.count);
    let beats = line.strip_prefix(&right).ok_or_else(|| anyhow!("the probe says {line:?}"))?;
    Ok(beats.trim().parse()?)
}

/// Whether every part of the probe has been there `at_least` times.
fn is_whole(node: &Node, init: u32, shape: &Shape, at_least: u64) -> Result<bool> {
    let is_reported = node.run(&["test", "-e", &format!("/proc/{init}/root/status")])?.succeeded();
    Ok(is_reported && beats(node, init, shape)? >= at_least)
}

/// Every part of the probe takes part in beats, and none has found anything wrong.
fn goes_on(node: &Node, init: u32, shape: &Shape) -> Result<()> {
    let now = beats(node, init, shape)?;
    wait_until("the probe goes on", SHAPE_TIME_MAX, || is_whole(node, init, shape, now + 2))
}
