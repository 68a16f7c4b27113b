//! Downtime of containers of an unusual shape, beside plain CRIU's.
//!
//! A probe with many mappings, threads, processes or files is planned and moved to another node.
//! There the same container is then dumped by plain `runc checkpoint` and restored by `runc
//! restore`, on the same disk. Plain downtime is the time of these two commands: plain CRIU moves
//! neither images nor volumes, so nothing is added for that.

use std::fs;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container};
use godwit_tests::{Bed, BedOptions, Node};
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
        "ratio": median(measured, |one| Some(one["downtime_ms"].as_f64()? / one["plain_ms"].as_f64()?)),
        "predicted_ms": field("predicted_ms"),
        "predicted_ratio":
            median(measured, |one| Some(one["predicted_ms"].as_f64()? / one["downtime_ms"].as_f64()?)),
    })
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
    destination.sh(&format!(
        "runc --root {PLAIN}/state delete -f plain 2> /dev/null || :; rm -rf {PLAIN}; \
         ctr tasks rm -f {name}; ctr containers rm {name}"
    ))?;
    let (dump, restore) = plain?;
    Ok(json!({
        "downtime_ms": report["downtime_ms"],
        "phases_ms": report["phases_ms"],
        "predicted_ms": plan["downtime_ms"],
        "plain_ms": dump + restore,
        "plain_dump_ms": dump,
        "plain_restore_ms": restore,
    }))
}

/// Dumps the container and restores it under another id. Returns the time of each.
fn plain(node: &Node, name: &str, shape: &Shape) -> Result<(f64, f64)> {
    let (bundle, images) = (format!("{BUNDLES}/{name}"), format!("{PLAIN}/images"));
    node.sh(&format!("mkdir -p {PLAIN}/bundle {PLAIN}/state {images}"))?;
    let text = fs::read(node.path(format!("{bundle}/config.json")))?;
    let mut config: Value = serde_json::from_slice(&text)?;
    config["root"]["path"] = format!("{bundle}/rootfs").into();
    // Our shim tells CRIU by this file how to restore; runc reads it at the dump too.
    if let Some(told) = config["annotations"]["org.criu.config"].as_str() {
        fs::write(node.path(told), "")?;
    }
    config.as_object_mut().context("a specification")?.remove("annotations");
    fs::write(node.path(format!("{PLAIN}/bundle/config.json")), config.to_string())?;
    let dump = timed(
        node,
        &format!(
            "runc --root {STATES} checkpoint {FLAGS} --image-path {images} --work-path {PLAIN} {name}"
        ),
    )?;
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
    Ok((dump, restore))
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
