//! Migrations between real nodes: state arrives whole, in both modes, and the source lets go.

use std::net::Ipv4Addr;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, memhog};
use godwit_tests::{Bed, BedOptions, Node};

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| start().expect("the test nodes start"));

fn start() -> Result<Bed> {
    Bed::start(&BedOptions::nodes(3).rate_mbit(1000))
}

fn node(index: usize) -> &'static Node {
    BED.node(index)
}

/// A memhog on node 0 with a volume and a network of its own name; the addresses on all nodes.
fn start_memhog(
    name: &'static str,
    first: u8,
    mib: usize,
    dirty: usize,
) -> Result<(Vec<Ipv4Addr>, u64)> {
    godwit_tests::images::import(node(0), Image::Memhog, "godwit")?;
    let addresses = workload::networks(&BED, name, first)?;
    node(0).ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, mib, dirty).start(node(0))?;
    let stat = workload::memhog_answers(&BED, addresses[0])?;
    Ok((addresses, stat.incarnation))
}

/// Removes what a test left running on a node.
fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name])?;
    at.ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// The source has neither task nor container nor volume any more, and nothing is staged anywhere.
fn is_gone_from(source: &Node, name: &str) -> Result<()> {
    ensure!(workload::task(source, name)?.is_none(), "the source still has a task");
    let containers = source.ok(&["ctr", "containers", "ls", "-q"])?;
    ensure!(!containers.lines().any(|line| line == name), "the source still has the container");
    let volumes = source.ok(&["godwit", "volume", "ls"])?;
    ensure!(!volumes.contains(name), "the source still has the volume: {volumes}");
    Ok(())
}

fn moves_whole(name: &'static str, first: u8, mode: &str) -> Result<()> {
    let (addresses, incarnation) = start_memhog(name, first, 32, 5)?;
    let report = workload::migrated(node(1), name, node(0), node(1), &["--mode", mode])?;
    ensure!(report["mode"] == mode && report["rounds"].as_u64() > Some(0), "{report}");
    let before = workload::memhog_is_whole(&BED, addresses[1], incarnation)?;
    wait_until("it goes on", Duration::from_secs(5), || {
        Ok(workload::memhog_answers(&BED, addresses[1])?.beats > before.beats)
    })?;
    is_gone_from(node(0), name)?;
    let beats = node(1).sh(&format!("cat /var/lib/godwit/volumes/{name}/data/beats"))?;
    godwit_tests::memhog::longest_gap(&beats).context("beats on the volume")?;
    remove(node(1), name)
}

#[test]
fn memory_and_volume_move_whole_in_cooperative_mode() -> Result<()> {
    moves_whole("coop", 0, "cooperative")
}

#[test]
fn memory_and_volume_move_whole_in_traditional_mode() -> Result<()> {
    moves_whole("trad", 10, "traditional")
}
