//! What neighbours are worth: bytes of the source fall where they hold something, `godwit plan`
//! tells beforehand, and neighbours that are of no use cost nothing but their grace.

use std::fs;
use std::net::Ipv4Addr;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::neighbours::{self, Bad};
use godwit_tests::workload::{self, memhog};
use godwit_tests::{Bed, BedOptions, Node};
use serde_json::Value;

/// Links of all nodes, in Mbit/s: slow enough to be what limits a transfer.
const LINK_MBIT: u32 = 200;

/// Resident memory of the workload, in MiB, and what it writes in a second.
const RESIDENT_MIB: usize = 48;
const DIRTY_MIB_PER_S: usize = 2;

static BED: LazyLock<Bed> = LazyLock::new(|| {
    Bed::start(&BedOptions::nodes(4).rate_mbit(LINK_MBIT)).expect("the test nodes start")
});

fn node(index: usize) -> &'static Node {
    BED.node(index)
}

fn start(
    name: &'static str,
    first: u8,
    at: usize,
    dirty_mib_per_s: usize,
) -> Result<(Vec<Ipv4Addr>, u64)> {
    // What other tests left to know and to have would change what comes from where.
    BED.nodes().iter().try_for_each(neighbours::forget)?;
    images::import(node(at), Image::Memhog, "godwit")?;
    let addresses = workload::networks(&BED, name, first)?;
    node(at).ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, RESIDENT_MIB, dirty_mib_per_s).start(node(at))?;
    let stat = workload::memhog_answers(&BED, addresses[at])?;
    Ok((addresses, stat.incarnation))
}

fn plan(name: &str, from: &Node, to: &Node) -> Result<Value> {
    let words =
        ["godwit", "--output", "json", "plan", name, "--from", from.name(), "--to", to.name()];
    Ok(serde_json::from_str(&to.ok(&words)?)?)
}

fn bytes(document: &Value, node: &Node) -> u64 {
    document["wire_bytes_by_node"][node.name()].as_u64().unwrap_or(0)
}

fn all_bytes(document: &Value) -> u64 {
    let by_node = document["wire_bytes_by_node"].as_object();
    by_node.into_iter().flatten().filter_map(|(_, bytes)| bytes.as_u64()).sum()
}

/// Within a quarter or 2 MiB, whichever is larger.
fn is_near(planned: u64, happened: u64) -> bool {
    planned.abs_diff(happened) <= (happened / 4).max(2 << 20)
}

fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name])?;
    at.ok(&["godwit", "volume", "rm", name])?;
    Ok(())
}

/// a -> b -> c -> d -> b -> a under load.
#[test]
fn a_walk_takes_less_from_the_source_where_a_neighbour_has_a_snapshot_and_the_plan_says_so()
-> Result<()> {
    let name = "walk";
    let (addresses, incarnation) = start(name, 0, 0, DIRTY_MIB_PER_S)?;
    let mut first = None;
    for (from, to) in [(0, 1), (1, 2), (2, 3), (3, 1), (1, 0)] {
        let step = format!("{} -> {}", node(from).name(), node(to).name());
        let planned = plan(name, node(from), node(to)).with_context(|| step.clone())?;
        ensure!(planned["obstacles"].as_array().is_some_and(Vec::is_empty), "{step}: {planned}");
        let report = workload::migrated(node(to), name, node(from), node(to), &[])?;
        let stat = workload::memhog_is_whole(&BED, addresses[to], incarnation)?;
        wait_until("it goes on", Duration::from_secs(10), || {
            Ok(workload::memhog_answers(&BED, addresses[to])?.beats > stat.beats)
        })?;
        let from_source = bytes(&report, node(from));
        eprintln!(
            "{step}: from the source {from_source} bytes, planned {}; in all {}, planned {}; {:.0} ms, planned {:.0}",
            bytes(&planned, node(from)),
            all_bytes(&report),
            all_bytes(&planned),
            report["total_ms"].as_f64().unwrap_or(0.0),
            planned["total_ms"].as_f64().unwrap_or(0.0),
        );
        ensure!(
            is_near(bytes(&planned, node(from)), from_source)
                && is_near(all_bytes(&planned), all_bytes(&report)),
            "{step}: planned {planned}\nhappened {report}"
        );
        let without = *first.get_or_insert(from_source);
        ensure!(
            (from, to) == (0, 1) || from_source < without * 3 / 4,
            "{step}: {from_source} bytes from the source, {without} without neighbours: {report}"
        );
    }
    remove(node(0), name)
}

#[test]
fn a_plan_of_what_cannot_be_moved_says_why_and_moves_nothing() -> Result<()> {
    let name = "planned";
    let (addresses, incarnation) = start(name, 30, 2, DIRTY_MIB_PER_S)?;
    let unknown = node(3).run(&[
        "godwit",
        "plan",
        "edge-z",
        "--from",
        node(2).name(),
        "--to",
        node(3).name(),
    ])?;
    ensure!(!unknown.succeeded() && unknown.stderr.contains("edge-z"), "{unknown:?}");
    // The name is taken at the destination.
    images::import(node(3), Image::Memhog, "godwit")?;
    node(3).ok(&[
        "ctr",
        "containers",
        "create",
        "--snapshotter",
        "godwit",
        Image::Memhog.reference(),
        name,
    ])?;
    let taken =
        node(3).run(&["godwit", "plan", name, "--from", node(2).name(), "--to", node(3).name()])?;
    ensure!(
        !taken.succeeded() && taken.stderr.contains("exists on this node already"),
        "{taken:?}"
    );
    ensure!(taken.stdout.contains("would fail"), "{taken:?}");
    node(3).ok(&["ctr", "containers", "rm", name])?;
    let stat = workload::memhog_is_whole(&BED, addresses[2], incarnation)?;
    ensure!(stat.beats > 0, "it runs on");
    ensure!(!node(3).ok(&["godwit", "volume", "ls"])?.contains(name), "nothing was made");
    remove(node(2), name)
}

/// Whatever is wrong with all neighbours, the container arrives whole. `make bench-peers` measures
/// what it costs.
#[test]
fn with_neighbours_of_no_use_everything_comes_from_the_source() -> Result<()> {
    for (bad, name, first) in [
        (Bad::Empty, "empty", 40),
        (Bad::Dead, "dead", 50),
        (Bad::Unreachable, "unreachable", 60),
        (Bad::Slow, "slow", 80),
        (Bad::Lying, "lying", 90),
    ] {
        let (addresses, incarnation) = start(name, first, 2, DIRTY_MIB_PER_S)?;
        for (from, to) in [(2, 3), (3, 0)] {
            workload::migrated(node(to), name, node(from), node(to), &[])?;
        }
        [2, 3].into_iter().try_for_each(|neighbour| bad.spoil(node(neighbour)))?;
        let moved = workload::migrated(node(1), name, node(0), node(1), &[]);
        [2, 3].into_iter().try_for_each(|neighbour| bad.heal(node(neighbour), LINK_MBIT))?;
        let report = moved.with_context(|| format!("{bad:?}"))?;
        workload::memhog_is_whole(&BED, addresses[1], incarnation)?;
        let (from_source, size) = (bytes(&report, node(0)), (RESIDENT_MIB as u64) << 20);
        ensure!(
            from_source > size * 9 / 10,
            "{bad:?}: {from_source} bytes from the source: {report}"
        );
        remove(node(1), name)?;
    }
    Ok(())
}

/// Method: one neighbour has it; it is mounted where it never was, and where no node has it.
#[test]
fn a_read_only_volume_is_brought_from_whoever_has_it_by_digest() -> Result<()> {
    let (here, there) = (node(0), node(3));
    there.sh("mkdir -p /srv/model && head -c 20000000 /dev/urandom > /srv/model/weights && echo v1 > /srv/model/name")?;
    let same_times = "touch -d @1700000000 /srv/model/* /srv/model";
    there.sh(same_times)?;
    let digest = there.ok(&["godwit", "volume", "import", "/srv/model"])?;
    let digest = digest.trim();
    // The same tree anywhere has the same digest.
    let elsewhere = node(1);
    elsewhere.sh("mkdir -p /srv/model")?;
    for file in ["/srv/model/weights", "/srv/model/name"] {
        fs::copy(there.path(file), elsewhere.path(file))?;
    }
    elsewhere.sh(same_times)?;
    let again = elsewhere.ok(&["godwit", "volume", "import", "/srv/model"])?;
    ensure!(again.trim() == digest, "{again} is not {digest}");
    elsewhere.ok(&["godwit", "volume", "rm", digest])?;
    images::import(here, Image::Busybox, "godwit")?;
    let run = |name: &'static str, volume: &str| {
        let script = "sha256sum < /model/weights; cat /model/name; ! touch /model/x";
        let container = workload::Container::new(name, Image::Busybox);
        let container = container.volume(volume, "/model", "ro").command(&["sh", "-c", script]);
        container.run(here)
    };
    run("reader", digest)?.ok()?;
    ensure!(here.ok(&["godwit", "volume", "ls"])?.contains(digest), "it is here now");
    let expected = there.sh("sha256sum < /srv/model/weights")?;
    let found =
        here.sh(&format!("sha256sum < /var/lib/godwit/content/{}/weights", &digest[7..]))?;
    ensure!(found == expected, "{found} is not {expected}");
    here.ok(&["godwit", "volume", "verify", digest])?;
    here.ok(&["godwit", "volume", "export", digest, "/srv/copy"])?;
    here.sh("[ \"$(cat /srv/copy/name)\" = v1 ]")?;
    let again = here.run(&["godwit", "volume", "export", digest, "/srv/copy"])?;
    ensure!(!again.succeeded() && again.stderr.contains("/srv/copy"), "{again:?}");

    let unknown = format!("sha256:{}", "5".repeat(64));
    let refused = run("unknown", &unknown)?;
    ensure!(
        !refused.succeeded() && refused.stderr.contains("neither on this node nor"),
        "{refused:?}"
    );
    let holds = workload::Container::new("holds", Image::Busybox).volume(digest, "/model", "ro");
    holds.command(&["sleep", "600"]).start(here)?;
    let remove = ["godwit", "volume", "rm", digest];
    let in_use = here.run(&remove)?;
    ensure!(
        !in_use.succeeded() && in_use.stderr.contains("in use by container default/holds"),
        "{in_use:?}"
    );
    here.ok(&["ctr", "tasks", "exec", "--exec-id", "x", "holds", "cat", "/model/name"])?;
    here.ok(&["ctr", "tasks", "rm", "-f", "holds"])?;
    here.ok(&["ctr", "containers", "rm", "holds"])?;
    wait_until("it has ended", Duration::from_secs(10), || {
        Ok(workload::task(here, "reader")?.as_deref() == Some("STOPPED"))
    })?;
    here.ok(&["ctr", "tasks", "rm", "reader"])?;
    here.sh("ctr containers rm reader; ctr containers rm unknown || true")?;
    here.ok(&remove)?;
    ensure!(!here.ok(&["godwit", "volume", "ls"])?.contains(digest), "it is still here");
    Ok(())
}

/// Method: two hold it, of which the one that lies has the faster link; then the liar alone.
#[test]
fn a_read_only_volume_comes_from_a_holder_that_does_not_lie_or_not_at_all() -> Result<()> {
    let (here, liar, honest) = (node(0), node(1), node(2));
    BED.nodes().iter().try_for_each(neighbours::forget)?;
    images::import(here, Image::Busybox, "godwit")?;
    let import = |at: &Node| {
        at.sh("mkdir -p /srv/lied && seq 1 500000 > /srv/lied/rows")?;
        at.sh("touch -d @1700000000 /srv/lied/rows /srv/lied; godwit volume import /srv/lied")
    };
    let digest = import(honest)?;
    ensure!(import(liar)? == digest, "the trees differ");
    let digest = digest.trim();
    Bad::Lying.spoil(liar)?;
    let run = |name| {
        let told = here.log_end("daemon");
        let container = workload::Container::new(name, Image::Busybox);
        let container = container.volume(digest, "/lied", "ro").command(&["sleep", "600"]);
        let done = container.run(here)?;
        let log = here.log_since("daemon", told);
        let is_refused = |line: &str| line.contains("peer failed") && line.contains("edge-b");
        ensure!(log.lines().any(is_refused), "the liar was not asked: {log}");
        Ok(done)
    };

    honest.set_rate(Some(LINK_MBIT / 10))?;
    run("told-both")?.ok()?;
    honest.set_rate(Some(LINK_MBIT))?;
    let exec = ["ctr", "tasks", "exec", "--exec-id", "look", "told-both"];
    let seen = here.ok(&[&exec[..], &["sha256sum", "/lied/rows"]].concat())?;
    let expected = honest.ok(&["sha256sum", "/srv/lied/rows"])?;
    ensure!(seen[..64] == expected[..64], "{seen} is not {expected}");
    here.ok(&["ctr", "tasks", "rm", "-f", "told-both"])?;
    here.ok(&["ctr", "containers", "rm", "told-both"])?;
    for had in [here, honest] {
        had.ok(&["godwit", "volume", "rm", digest])?;
        neighbours::forget(had)?;
    }

    let refused = run("told-lies")?;
    let said = format!("object {digest} was not found");
    ensure!(!refused.succeeded() && refused.stderr.contains(&said), "{refused:?}");
    here.ok(&["ctr", "containers", "rm", "told-lies"])?;
    let left = here.sh("ctr tasks ls -q; cd /var/lib/godwit; find content trash -mindepth 1
         grep godwit/content /proc/mounts || :")?;
    ensure!(left.is_empty(), "{left}");
    here.ok(&["godwit", "check"])?;
    liar.ok(&["godwit", "volume", "rm", digest])?;
    Bad::Lying.heal(liar, LINK_MBIT)
}

/// Method: the destination's daemon is killed while memory arrives over a slow link; what had come
/// is not sent again.
#[test]
fn a_cut_transfer_is_resumed_also_after_the_daemon_died() -> Result<()> {
    let name = "resumed";
    let (addresses, incarnation) = start(name, 110, 0, 0)?;
    let (source, destination) = (node(0), node(1));
    source.set_rate(Some(80))?;
    let words = ["godwit", "migrate", name, "--from", source.name(), "--to", destination.name()];
    let options = ["--mode", "traditional", "--max-rounds", "1"];
    let sent = source.traffic()?.sent;
    let mut running = source.spawn(&[&words[..], &options[..]].concat(), "migrate-resumed")?;
    // Most of 48 MiB at 10 MB/s.
    wait_until("most has come", Duration::from_secs(20), || {
        Ok(source.traffic()?.sent > sent + (30 << 20))
    })?;
    destination.kill_daemon()?;
    ensure!(running.wait(Duration::from_secs(60))? != 0, "it was migrated without a daemon");
    destination.start_daemon()?;
    let kept = destination.ok(&["godwit", "--output", "json", "status"])?;
    wait_until("what was begun is removed", Duration::from_secs(120), || {
        Ok(!destination.ok(&["ctr", "containers", "ls", "-q"])?.contains(name))
    })?;
    let report = workload::migrated(destination, name, source, destination, &options)?;
    source.set_rate(Some(LINK_MBIT))?;
    workload::memhog_is_whole(&BED, addresses[1], incarnation)?;
    // 48 MiB less 30, and again what the last two seconds and a batch had brought.
    let again = bytes(&report, source);
    ensure!(again < 40 << 20, "{again} bytes were sent again: {report}; kept: {kept}");
    remove(destination, name)
}
