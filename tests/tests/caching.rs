//! Cached snapshots: taken by schedule, copied to neighbours, given up in time, and what they are
//! good for when a node dies.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container, memhog};
use godwit_tests::{Bed, BedOptions, Node};
use serde_json::Value;

/// Longest wait for something that the schedule does.
const SOON: Duration = Duration::from_secs(40);

const MIB: u64 = 1 << 20;

/// Captures as often as it can, whatever else runs on this machine.
const EAGER: &str = "[cache]\nperiod_min_s = 1\nperiod_max_s = 2\ndifference_mib = 1\ncpu_share = 1.0\n\
     disk_mib_per_s = 10000\nload_max = 10000.0\nexpire_removed_s = 4\n";

fn list(node: &Node) -> Result<Vec<Value>> {
    Ok(serde_json::from_str(&node.ok(&["godwit", "--output", "json", "snapshot", "list"])?)?)
}

/// Snapshots on a node whose subject begins with `subject`, the newest last.
fn of(node: &Node, subject: &str) -> Result<Vec<Value>> {
    let mut all = list(node)?;
    all.retain(|one| one["subject"].as_str().is_some_and(|text| text.starts_with(subject)));
    Ok(all)
}

fn has(node: &Node, subject: &str) -> Result<bool> {
    Ok(!of(node, subject)?.is_empty())
}

fn store_bytes(node: &Node) -> Result<u64> {
    let status: Value = serde_json::from_str(&node.ok(&["godwit", "--output", "json", "status"])?)?;
    status["store_bytes"].as_u64().context("the store's size")
}

/// A memhog on a node, with a volume and a network of its own name: its addresses on all nodes.
fn start(
    bed: &Bed,
    at: &Node,
    name: &'static str,
    first: u8,
    mib: usize,
) -> Result<(Vec<Ipv4Addr>, u64)> {
    images::import(at, Image::Memhog, "godwit")?;
    let addresses = workload::networks(bed, name, first)?;
    at.ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, mib, 1).start(at)?;
    let here = bed.nodes().iter().position(|node| node.name() == at.name()).context("a node")?;
    let stat = workload::memhog_answers(bed, addresses[here])?;
    Ok((addresses, stat.incarnation))
}

fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name])?;
    at.ok(&["godwit", "volume", "rm", name]).map(drop)
}

fn in_hall_two(node: &str) -> String {
    let hall = if node == "edge-c" { 2 } else { 1 };
    format!("{EAGER}place_on = {{ hall = \"2\" }}\n[labels]\nhall = \"{hall}\"\n")
}

/// Method: of two neighbours one has the label. The container then moves to the other one, and is
/// removed there.
#[test]
fn a_running_container_is_captured_copied_and_forgotten_when_it_is_removed() -> Result<()> {
    let name = "kept";
    let bed = Bed::start(&BedOptions::nodes(3).rate_mbit(400).config(in_hall_two))?;
    let [a, b, c] = [0, 1, 2].map(|index| bed.node(index));
    let (addresses, incarnation) = start(&bed, a, name, 0, 32)?;
    wait_until("the labelled neighbour has copies", SOON, || {
        Ok(has(c, "memory|")? && has(c, "volume|")? && has(c, "layer|")?)
    })?;
    ensure!(list(b)?.is_empty(), "a copy went to a neighbour without the label");
    let first = of(a, "memory|")?.last().and_then(|one| one["sequence"].as_u64());
    wait_until("it is captured again", SOON, || {
        Ok(of(a, "memory|")?.last().and_then(|one| one["sequence"].as_u64()) > first)
    })?;
    ensure!(of(a, "memory|")?.len() <= 2, "keep_last holds: {:?}", of(a, "memory|")?);

    let report = workload::migrated(b, name, a, b, &[])?;
    workload::memhog_is_whole(&bed, addresses[1], incarnation)?;
    let from = |node: &Node| report["wire_bytes_by_node"][node.name()].as_u64().unwrap_or(0);
    ensure!(from(c) > 24 * MIB && from(a) < 16 * MIB, "what was cached was not used: {report}");
    // The source has let go: that the container is gone from there does not make it removed.
    std::thread::sleep(Duration::from_secs(12));
    ensure!(has(a, "memory|")? && has(c, "memory|")?, "what moved was taken for removed");

    remove(b, name)?;
    for node in [a, b, c] {
        wait_until("snapshots of what was removed expire everywhere", SOON, || {
            Ok(list(node)?.is_empty())
        })
        .with_context(|| format!("{}: {:?}", node.name(), list(node)))?;
    }
    Ok(())
}

fn eager(_node: &str) -> String {
    EAGER.to_owned()
}

#[test]
fn copies_follow_the_neighbourhood() -> Result<()> {
    let name = "follow";
    let bed = Bed::start(&BedOptions::nodes(3).rate_mbit(400).config(eager))?;
    let [a, b, c] = [0, 1, 2].map(|index| bed.node(index));
    start(&bed, a, name, 0, 16)?;
    wait_until("a neighbour has a copy", SOON, || Ok(has(b, "memory|")? || has(c, "memory|")?))?;
    let (first, other) = if has(b, "memory|")? { (b, c) } else { (c, b) };
    // A copy goes where the one before is, so that only the difference travels.
    std::thread::sleep(Duration::from_secs(6));
    ensure!(!has(other, "memory|")?, "one copy was asked for");
    first.kill_daemon()?;
    wait_until("the other neighbour has one", SOON, || has(other, "memory|"))?;
    first.start_daemon()?;
    remove(a, name)
}

/// Method: it stands still for longer than it takes to notice, as under a client that cleans up
/// later.
#[test]
fn a_container_that_ended_is_forgotten_once_it_is_deleted() -> Result<()> {
    let name = "ended";
    let bed = Bed::start(&BedOptions::nodes(1).config(eager))?;
    let node = bed.node(0);
    start(&bed, node, name, 0, 16)?;
    wait_until("it is captured", SOON, || has(node, "memory|"))?;
    node.ok(&["ctr", "tasks", "rm", "-f", name])?;
    std::thread::sleep(Duration::from_secs(12));
    ensure!(has(node, "memory|")?, "it is not deleted yet: {:?}", list(node)?);
    node.ok(&["ctr", "containers", "rm", name])?;
    node.ok(&["godwit", "volume", "rm", name])?;
    wait_until("its snapshots expire", SOON, || Ok(list(node)?.is_empty()))
}

fn no_memory(_node: &str) -> String {
    format!("{EAGER}memory = \"off\"\n")
}

#[test]
fn a_site_may_turn_caching_of_memory_off() -> Result<()> {
    let name = "secret";
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(400).config(no_memory))?;
    let [a, b] = [0, 1].map(|index| bed.node(index));
    let (addresses, incarnation) = start(&bed, a, name, 0, 16)?;
    wait_until("its volume is cached", SOON, || Ok(has(a, "volume|")? && has(b, "volume|")?))?;
    workload::migrated(b, name, a, b, &[])?;
    workload::memhog_is_whole(&bed, addresses[1], incarnation)?;
    wait_until("its volume is cached there", SOON, || has(b, "volume|"))?;
    for node in [a, b] {
        ensure!(!has(node, "memory|")?, "{}: {:?}", node.name(), list(node)?);
    }
    remove(b, name)
}

fn small_budget(_node: &str) -> String {
    "[cache]\nschedule = false\nkeep_last = 9\nbudget_mib = 64\n".to_owned()
}

/// Method: four containers of 24 MiB each leave a snapshot; there is room for two and a half.
#[test]
fn a_full_budget_costs_the_least_useful_and_never_a_pin() -> Result<()> {
    let names = ["one", "two", "three", "four"];
    let bed = Bed::start(&BedOptions::nodes(1).config(small_budget))?;
    let node = bed.node(0);
    for (name, first) in names.into_iter().zip([0, 10, 20, 30]) {
        start(&bed, node, name, first, 24)?;
        node.ok(&["godwit", "snapshot", "create", name])?;
        if name == "one" {
            let taken = of(node, "memory|")?;
            let id = taken[0]["id"].as_str().context("an id")?;
            node.ok(&["godwit", "snapshot", "pin", id])?;
            let shown = node.ok(&["godwit", "snapshot", "show", id])?;
            ensure!(shown.contains("pinned: true"), "{shown}");
        }
    }
    wait_until("the store is within its budget", SOON, || Ok(store_bytes(node)? <= 64 * MIB))?;
    let left = of(node, "memory|")?;
    let is_left = |name: &str| {
        left.iter().any(|one| one["subject"].as_str().is_some_and(|text| text.ends_with(name)))
    };
    ensure!(is_left("|one"), "the pinned one went: {left:?}");
    ensure!(left.len() == 2, "more or less was given up than needed: {left:?}");
    let id = left[0]["id"].as_str().context("an id")?;
    node.ok(&["godwit", "snapshot", "unpin", id])?;
    for wrong in ["nonsense", "4711"] {
        let refused = node.run(&["godwit", "snapshot", "pin", wrong])?;
        ensure!(!refused.succeeded() && refused.stderr.contains(wrong), "{refused:?}");
    }
    Ok(())
}

fn needs_room(_node: &str) -> String {
    format!("{EAGER}min_free_mib = 200\n")
}

/// Method: the neighbour's state lies on a small disk that is nearly full.
#[test]
fn a_full_disk_stops_caching_and_no_migration() -> Result<()> {
    let name = "tight";
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(400).config(needs_room))?;
    let [a, b] = [0, 1].map(|index| bed.node(index));
    b.stop_containerd()?;
    b.stop_daemon()?;
    b.sh("mount -t tmpfs -o size=300m tmpfs /var/lib/godwit; fallocate -l 120M /var/lib/godwit/filler")?;
    b.start_daemon()?;
    b.start_containerd()?;
    let (addresses, incarnation) = start(&bed, a, name, 0, 24)?;
    wait_until("it is cached where there is room", SOON, || has(a, "memory|"))?;
    wait_until("the copy is refused", SOON, || Ok(a.log("daemon").contains("there is no room")))?;
    ensure!(list(b)?.is_empty(), "a copy came to a full disk");
    workload::migrated(b, name, a, b, &[])?;
    workload::memhog_is_whole(&bed, addresses[1], incarnation)?;
    b.stop_containerd()?;
    b.kill_daemon()?;
    Ok(())
}

fn consistent(_node: &str) -> String {
    format!("{EAGER}memory = \"consistent\"\n")
        .replace("period_max_s = 2", "period_max_s = 8")
        .replace("expire_removed_s = 4", "expire_removed_s = 60")
}

fn restore(at: &Node, id: &str, options: &[&str]) -> Result<godwit_tests::command::Finished> {
    let words = ["godwit", "--output", "json", "snapshot", "restore", id];
    at.command(&[&words, options].concat()).timeout(Duration::from_secs(120)).run()
}

#[test]
fn a_container_comes_back_from_a_consistent_snapshot_after_its_host_died() -> Result<()> {
    let name = "phoenix";
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(400).config(consistent))?;
    let [a, b] = [0, 1].map(|index| bed.node(index));
    let (addresses, incarnation) = start(&bed, a, name, 0, 24)?;
    images::import(b, Image::Memhog, "godwit")?;
    wait_until("the neighbour has all of it", SOON, || has(b, "container|"))?;
    let newest = || -> Result<String> {
        let all = of(b, "container|")?;
        let newest = all.last().context("a snapshot of the container")?;
        Ok(newest["id"].as_str().context("an id")?.to_owned())
    };
    // While the original runs, and while it is unknown.
    let refused = restore(b, &newest()?, &[])?;
    ensure!(!refused.succeeded() && refused.stderr.contains("runs on edge-a"), "{refused:?}");
    let refused = restore(b, &newest()?, &["--although-it-may-run-elsewhere"])?;
    ensure!(!refused.succeeded() && refused.stderr.contains("runs on edge-a"), "{refused:?}");
    let cut = of(b, "container|")?.last().context("a snapshot")?["manifest"].clone();
    let wanted = Container::new(name, Image::Memhog)
        .annotation("godwit.io/restore-from", cut.as_str().context("its digest")?);
    let refused = wanted.run(b)?;
    ensure!(!refused.succeeded() && refused.stderr.contains("runs on edge-a"), "{refused:?}");
    b.run(&["ctr", "tasks", "rm", "-f", name])?;
    b.run(&["ctr", "containers", "rm", name])?;
    let memory = of(b, "memory|")?.last().and_then(|one| one["id"].as_str().map(str::to_owned));
    let refused = restore(b, &memory.context("a snapshot of memory")?, &[])?;
    ensure!(
        !refused.succeeded() && refused.stderr.contains("not of a whole container"),
        "{refused:?}"
    );
    let before = workload::memhog_is_whole(&bed, addresses[0], incarnation)?;
    a.crash()?;
    let refused = restore(b, &newest()?, &[])?;
    ensure!(
        !refused.succeeded() && refused.stderr.contains("may still run elsewhere"),
        "{refused:?}"
    );
    ensure!(!b.ok(&["ctr", "containers", "ls", "-q"])?.contains(name), "something was made");

    let report = restore(b, &newest()?, &["--although-it-may-run-elsewhere"])?.ok()?;
    let report: Value = serde_json::from_str(&report).with_context(|| report.clone())?;
    ensure!(report["mode"] == "restore" && report["source"] == "edge-a", "{report}");
    let after = workload::memhog_is_whole(&bed, addresses[1], incarnation)?;
    ensure!(after.beats <= before.beats + 500, "it cannot know what came after the snapshot");
    wait_until("it goes on", SOON, || {
        Ok(workload::memhog_answers(&bed, addresses[1])?.beats > after.beats)
    })?;
    // It is an ordinary container again.
    ensure!(b.ok(&["godwit", "volume", "ls"])?.contains(name), "its volume is here");
    let twice = restore(b, &newest()?, &["--although-it-may-run-elsewhere"])?;
    ensure!(
        !twice.succeeded() && twice.stderr.contains("exists on this node already"),
        "{twice:?}"
    );
    remove(b, name)
}

/// Method: a container is removed whose snapshots two nodes have, and both restore it at once.
#[test]
fn of_two_nodes_that_restore_at_once_at_most_one_does() -> Result<()> {
    let name = "twins";
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(400).config(consistent))?;
    let nodes = [0, 1].map(|index| bed.node(index));
    start(&bed, nodes[0], name, 0, 8)?;
    images::import(nodes[1], Image::Memhog, "godwit")?;
    wait_until("the neighbour has all of it", SOON, || has(nodes[1], "container|"))?;
    let newest = |at: &Node| -> Result<String> {
        let all = of(at, "container|")?;
        Ok(all.last().context("a snapshot")?["id"].as_str().context("an id")?.to_owned())
    };
    remove(nodes[0], name)?;
    let ids = [newest(nodes[0])?, newest(nodes[1])?];
    let [first, second] = std::thread::scope(|scope| {
        let begun = [0, 1].map(|index| {
            let (node, id) = (nodes[index], &ids[index]);
            scope.spawn(move || restore(node, id, &["--although-it-may-run-elsewhere"]))
        });
        begun.map(|one| one.join().expect("the thread lives"))
    });
    let (first, second) = (first?, second?);
    ensure!(!first.succeeded() || !second.succeeded(), "both did: {first:?} {second:?}");
    for (done, other) in [(&first, "edge-b"), (&second, "edge-a")] {
        let says = done.stderr.contains(other) && done.stderr.contains("a second one is never");
        ensure!(done.succeeded() || says, "{done:?}");
    }
    let runs = |at: &Node| Ok::<_, anyhow::Error>(workload::task(at, name)?.is_some());
    let said = [first.succeeded(), second.succeeded()];
    ensure!(said == [runs(nodes[0])?, runs(nodes[1])?], "another one runs: {said:?}");
    // A later request works if both were refused.
    let at = if second.succeeded() { nodes[1] } else { nodes[0] };
    if !first.succeeded() && !second.succeeded() {
        restore(nodes[0], &ids[0], &[])?.ok()?;
    }
    ensure!(workload::task(at, name)?.as_deref() == Some("RUNNING"), "it does not run");
    remove(at, name)
}

/// Method: the daemon is killed while the container is frozen for a consistent snapshot.
#[test]
fn a_daemon_that_dies_during_a_consistent_snapshot_leaves_the_container_running() -> Result<()> {
    let name = "thawed";
    let bed = Bed::start(&BedOptions::nodes(1))?;
    let node = bed.node(0);
    let (addresses, incarnation) = start(&bed, node, name, 0, 128)?;
    let words = ["godwit", "snapshot", "create", "--consistent", name];
    let mut running = node.spawn(&words, "snapshot")?;
    wait_until("it is frozen", SOON, || {
        Ok(workload::task(node, name)?.as_deref() == Some("PAUSED"))
    })?;
    node.kill_daemon()?;
    ensure!(running.wait(SOON)? != 0, "it was taken without a daemon");
    node.start_daemon()?;
    wait_until("it runs", SOON, || Ok(workload::task(node, name)?.as_deref() == Some("RUNNING")))?;
    let stat = workload::memhog_is_whole(&bed, addresses[0], incarnation)?;
    wait_until("it goes on", SOON, || {
        Ok(workload::memhog_answers(&bed, addresses[0])?.beats > stat.beats)
    })?;
    ensure!(list(node)?.is_empty(), "half a snapshot was recorded");
    node.ok(&words)?;
    let taken = of(node, "container|")?;
    ensure!(taken.len() == 1, "{taken:?}");
    workload::memhog_is_whole(&bed, addresses[0], incarnation).map(drop)
}
