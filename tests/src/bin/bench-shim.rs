//! `make bench-shim`: what our shim costs beside containerd's own, in one run on containerd 2.
//!
//! Starts are timed in interleaved pairs, inside the node, so that whatever else the machine does
//! falls on both. Memory is that of a shim that has been idle for a while and is the only one of
//! its kind, or holds a pod of ten. Written to `target/bench/shim.json`; ratios are ours by
//! containerd's.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use godwit_tests::images::{self, Image};
use godwit_tests::{Bed, BedOptions, Containerd, Node, need, place};
use serde_json::json;

/// Ours first.
const RUNTIMES: [Runtime; 2] = [
    Runtime { name: "io.containerd.runc.godwit.v1", program: "containerd-shim-godwit-v1" },
    Runtime { name: "io.containerd.runc.v2", program: "containerd-shim-runc-v2" },
];
/// How long a shim is left alone before its memory is looked at.
const IDLE: Duration = Duration::from_secs(3);
/// Containers of a pod.
const POD: usize = 10;

#[derive(Clone, Copy)]
struct Runtime {
    name: &'static str,
    program: &'static str,
}

#[derive(Parser)]
struct Arguments {
    /// Pairs of starts.
    #[arg(long, default_value_t = 30)]
    pairs: usize,
    /// How often memory is measured.
    #[arg(long, default_value_t = 5)]
    memory_runs: usize,
}

/// Memory of one shim, in KiB.
#[derive(Clone, Copy)]
struct Memory {
    resident: u64,
    private: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    need::binaries(&["containerd-shim-godwit-v1"])?;
    let bed = Bed::start(&BedOptions::nodes(1).without_daemon().generation(Containerd::V2))?;
    let node = bed.node(0);
    images::import(node, Image::Busybox, "overlayfs")?;

    let mut starts: [Vec<u64>; 2] = Default::default();
    for pair in 0..arguments.pairs {
        // Each goes first in half of the pairs.
        for which in if pair % 2 == 0 { [0, 1] } else { [1, 0] } {
            starts[which].push(start_us(node, RUNTIMES[which])?);
        }
    }
    let mut idle: [Vec<Memory>; 2] = Default::default();
    let mut pods: [Vec<Memory>; 2] = Default::default();
    for _ in 0..arguments.memory_runs {
        for (which, runtime) in RUNTIMES.into_iter().enumerate() {
            idle[which].push(memory(node, runtime, 1)?);
            pods[which].push(memory(node, runtime, POD)?);
        }
    }
    let ratio = |[ours, theirs]: [u64; 2]| (1000.0 * ours as f64 / theirs as f64).round() / 1000.0;
    let start = starts.map(median);
    let resident = idle.each_ref().map(|runs| median(runs.iter().map(|m| m.resident).collect()));
    let private = idle.each_ref().map(|runs| median(runs.iter().map(|m| m.private).collect()));
    let pod = pods.map(|runs| median(runs.iter().map(|m| m.resident).collect()));
    eprintln!(
        "medians, ours and containerd's: start {start:?} us, resident {resident:?} KiB, \
         private {private:?} KiB, pod of {POD} resident {pod:?} KiB"
    );
    let binary_bytes = fs::metadata(place::binary(RUNTIMES[0].program))?.len();
    let result = json!({
        "start_ratio": ratio(start),
        "rss_ratio": ratio(resident),
        "private_ratio": ratio(private),
        "pod10_rss_ratio": ratio(pod),
        "binary_bytes": binary_bytes,
    });
    let path = place::target().join("bench/shim.json");
    fs::create_dir_all(path.parent().context("a directory")?)?;
    fs::write(&path, serde_json::to_string_pretty(&result)?)?;
    println!("{}", serde_json::to_string_pretty(&result)?);
    Ok(())
}

fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Time of one whole life, in microseconds.
fn start_us(node: &Node, runtime: Runtime) -> Result<u64> {
    let (name, image) = (runtime.name, Image::Busybox.reference());
    let script = format!(
        "begin=$(date +%s%N); ctr run --rm --runtime {name} {image} bench /bin/true; \
         end=$(date +%s%N); echo $(((end - begin) / 1000))"
    );
    Ok(node.sh(&script)?.trim().parse()?)
}

/// Memory of the one shim that holds `containers` idle containers.
fn memory(node: &Node, runtime: Runtime, containers: usize) -> Result<Memory> {
    let (name, image) = (runtime.name, Image::Busybox.reference());
    let ids: Vec<String> = (0..containers).map(|number| format!("idle-{number}")).collect();
    for id in &ids {
        node.sh(&format!(
            "ctr run -d --runtime {name} --annotation io.kubernetes.cri.sandbox-id=idle {image} {id} \
             sleep 600"
        ))?;
    }
    std::thread::sleep(IDLE);
    let shims = node.ok(&["pgrep", "-f", runtime.program])?;
    ensure!(shims.lines().count() == 1, "one shim is expected, not {shims}");
    let pid = shims.trim();
    let text = node.sh(&format!("cat /proc/{pid}/smaps_rollup"))?;
    let fields: HashMap<&str, u64> = text
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(':')?;
            Some((key, value.split_whitespace().next()?.parse().ok()?))
        })
        .collect();
    let field = |key: &str| fields.get(key).copied().with_context(|| format!("no {key}"));
    let private = field("Private_Clean")? + field("Private_Dirty")?;
    let found = Memory { resident: field("Rss")?, private };
    for id in ids.iter().rev() {
        node.sh(&format!("ctr task rm -f {id} > /dev/null 2>&1 || :; ctr c rm {id}"))?;
    }
    godwit_tests::command::wait_until("the shim ends", IDLE * 3, || {
        Ok(!node.run(&["pgrep", "-f", runtime.program])?.succeeded())
    })?;
    Ok(found)
}
