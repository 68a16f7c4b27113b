//! Migrations between real nodes: state arrives whole, in both modes, and the source lets go.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_snapshotter::containerd::Client;
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::load::{Load, LoadOptions};
use godwit_tests::workload::{self, Container, REDIS_PORT, memhog};
use godwit_tests::{Bed, BedOptions, Node};

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    Bed::start(&BedOptions::nodes(3).rate_mbit(1000)).expect("the test nodes start")
});

const SOON: Duration = Duration::from_secs(10);

fn node(index: usize) -> &'static Node {
    BED.node(index)
}

/// A memhog on node 0 with a volume and a network of its own name: the addresses on all nodes, and
/// which process it is.
fn start_memhog(
    name: &'static str,
    first: u8,
    mib: usize,
    dirty: usize,
) -> Result<(Vec<Ipv4Addr>, u64)> {
    images::import(node(0), Image::Memhog, "godwit")?;
    let addresses = workload::networks(&BED, name, first)?;
    node(0).ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, mib, dirty).start(node(0))?;
    let stat = workload::memhog_answers(&BED, addresses[0])?;
    Ok((addresses, stat.incarnation))
}

/// Removes what a test left running on a node.
fn remove(at: &Node, name: &str, has_volume: bool) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name])?;
    if has_volume {
        at.ok(&["godwit", "volume", "rm", name])?;
    }
    Ok(())
}

/// The source has neither task nor container nor volume any more, and nothing is staged.
fn is_gone_from(source: &Node, name: &str) -> Result<()> {
    wait_until("the source lets go", SOON, || {
        let containers = source.ok(&["ctr", "containers", "ls", "-q"])?;
        let volumes = source.ok(&["godwit", "volume", "ls"])?;
        let staged =
            source.sh("ls /var/lib/godwit/dump /var/lib/godwit/stage 2>/dev/null || true")?;
        Ok(workload::task(source, name)?.is_none()
            && !containers.lines().any(|line| line == name)
            && !volumes.contains(name)
            && staged.lines().all(|line| line.is_empty() || line.ends_with(':')))
    })
}

fn goes_on(address: Ipv4Addr, beats: u64) -> Result<()> {
    wait_until("it goes on", SOON, || Ok(workload::memhog_answers(&BED, address)?.beats > beats))
}

fn bytes_from(report: &serde_json::Value, node: &Node) -> u64 {
    report["wire_bytes_by_node"][node.name()].as_u64().unwrap_or(0)
}

fn memhog_moves(name: &'static str, first: u8, mode: &str) -> Result<()> {
    let (addresses, incarnation) = start_memhog(name, first, 32, 5)?;
    let report = workload::migrated(node(1), name, node(0), node(1), &["--mode", mode])?;
    ensure!(report["mode"] == mode && report["rounds"].as_u64() > Some(0), "{report}");
    let stat = workload::memhog_is_whole(&BED, addresses[1], incarnation)?;
    goes_on(addresses[1], stat.beats)?;
    is_gone_from(node(0), name)?;
    let beats = node(1).sh(&format!("cat /var/lib/godwit/volumes/{name}/data/beats"))?;
    godwit_tests::memhog::longest_gap(&beats).context("beats on the volume")?;
    remove(node(1), name, true)
}

#[test]
fn memory_and_volume_move_whole_in_cooperative_mode() -> Result<()> {
    memhog_moves("coop", 0, "cooperative")
}

#[test]
fn memory_and_volume_move_whole_in_traditional_mode() -> Result<()> {
    memhog_moves("trad", 10, "traditional")
}

/// a -> b -> c -> a. What a node had before serves the container's return.
///
/// Method: little is written, so that the node's memory of it is good for most of the pages even on
/// a machine where three moves take a minute.
#[test]
fn a_chain_of_migrations_ends_where_it_began_with_everything_whole() -> Result<()> {
    let name = "chain";
    let (addresses, incarnation) = start_memhog(name, 20, 48, 1)?;
    let mut last = None;
    for (from, to) in [(0, 1), (1, 2), (2, 0)] {
        // Asked from a node that is neither source nor destination.
        let asked = node(3 - from - to);
        let report = workload::migrated(asked, name, node(from), node(to), &[])?;
        let stat = workload::memhog_is_whole(&BED, addresses[to], incarnation)?;
        goes_on(addresses[to], stat.beats)?;
        is_gone_from(node(from), name)?;
        last = Some(report);
    }
    let report = last.context("a report")?;
    let memory = 48 << 20;
    let from_source = bytes_from(&report, node(2));
    ensure!(
        from_source < memory / 2,
        "{from_source} bytes from the source although the destination has a snapshot: {report}"
    );
    remove(node(0), name, true)
}

/// Method: the client runs on a pseudo-terminal, on a link slow enough to read along, and is
/// interrupted there.
#[test]
fn an_interrupted_client_says_that_the_daemons_go_on_and_they_do() -> Result<()> {
    let name = "ctrl-c";
    let (addresses, incarnation) = start_memhog(name, 33, 64, 1)?;
    node(0).set_rate(Some(150))?;
    let line = format!("exec godwit migrate {name} --from edge-a --to edge-b");
    let mut client = node(0).spawn(&["script", "-qec", &line, "/dev/null"], "client")?;
    wait_until("a round and its bytes are shown", SOON, || {
        let shown = node(0).log("client");
        Ok(shown.contains("pre-copy: round") && shown.contains("MiB/s"))
    })?;
    node(0).sh("kill -INT $(pidof godwit)")?;
    ensure!(client.wait(SOON)? != 0, "an interrupted client reports success");
    let shown = node(0).log("client");
    ensure!(shown.contains("the daemons go on with ctrl-c"), "{shown}");
    node(0).set_rate(Some(1000))?;
    wait_until("it runs at the destination", Duration::from_secs(60), || {
        Ok(workload::task(node(1), name)?.as_deref() == Some("RUNNING"))
    })?;
    workload::memhog_is_whole(&BED, addresses[1], incarnation)?;
    is_gone_from(node(0), name)?;
    remove(node(1), name, true)
}

/// The neighbour holds a snapshot, the destination nothing: only the difference comes from the
/// source.
#[test]
fn a_neighbours_snapshot_spares_the_source() -> Result<()> {
    let name = "spare";
    let (addresses, incarnation) = start_memhog(name, 30, 64, 1)?;
    workload::migrated(node(1), name, node(0), node(1), &[])?;
    let report = workload::migrated(node(2), name, node(1), node(2), &[])?;
    workload::memhog_is_whole(&BED, addresses[2], incarnation)?;
    let (neighbour, source) = (bytes_from(&report, node(0)), bytes_from(&report, node(1)));
    ensure!(neighbour > 32 << 20, "{neighbour} bytes from the neighbour: {report}");
    ensure!(source < 24 << 20, "{source} bytes from the source: {report}");
    remove(node(2), name, true)
}

/// Counts into a file of its writable layer.
const COUNTING: &str = "mkdir -p /a; rm -f /etc/hostname; i=0; while :; do i=$((i+1)); echo $i > /a/new; mv /a/new /a/count; usleep 20000; done";

/// What `exec` reads of the count.
fn count(at: &Node, name: &str) -> Result<u64> {
    let exec = format!("c{}", std::process::id());
    let text = at.ok(&["ctr", "tasks", "exec", "--exec-id", &exec, name, "cat", "/a/count"])?;
    text.trim().parse().with_context(|| format!("count {text:?}"))
}

/// Method: a shell counts; the count goes on where it was.
fn busybox_moves(name: &'static str, mode: &str) -> Result<()> {
    images::import(node(0), Image::Busybox, "godwit")?;
    Container::new(name, Image::Busybox).command(&["sh", "-c", COUNTING]).start(node(0))?;
    let count = |at| count(at, name);
    wait_until("it counts", SOON, || Ok(count(node(0)).is_ok_and(|count| count > 20)))?;
    let before = count(node(0))?;
    workload::migrated(node(0), name, node(0), node(1), &["--mode", mode])?;
    let after = count(node(1))?;
    ensure!(after >= before, "{after} after {before}");
    wait_until("it goes on", SOON, || Ok(count(node(1))? > after))?;
    remove(node(1), name, false)
}

#[test]
fn a_shell_and_its_writable_layer_move_in_cooperative_mode() -> Result<()> {
    busybox_moves("shell-c", "cooperative")
}

#[test]
fn a_shell_and_its_writable_layer_move_in_traditional_mode() -> Result<()> {
    busybox_moves("shell-t", "traditional")
}

fn redis(name: &'static str) -> Container<'static> {
    Container::new(name, Image::Redis).volume(name, "/data", "rw").network(name).command(&[
        "redis-server",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--dir",
        "/data",
        "--appendonly",
        "yes",
        "--auto-aof-rewrite-percentage",
        "0",
    ])
}

/// Method: a client writes all the time and remembers what was acknowledged; no value may be lost
/// or torn.
fn redis_moves(name: &'static str, first: u8, mode: &str) -> Result<()> {
    images::import(node(0), Image::Redis, "godwit")?;
    let addresses = workload::networks(&BED, name, first)?;
    node(0).ok(&["godwit", "volume", "create", name])?;
    redis(name).start(node(0))?;
    let sockets: Vec<_> =
        addresses.iter().map(|address| SocketAddr::from((*address, REDIS_PORT))).collect();
    let options = LoadOptions {
        addresses: sockets.clone(),
        bytes_per_s: 2 << 20,
        value_bytes: 4096,
        keys: 2000,
    };
    let load = Load::start(BED.client_namespace(), options)?;
    load.wait_for(1000, Duration::from_secs(20))?;
    workload::migrated(node(1), name, node(0), node(1), &["--mode", mode])?;
    load.wait_for(300, Duration::from_secs(20))?;
    let seen = load.stop()?;
    let verdict = BED.as_client(|| seen.ledger.verify(sockets[1]))?;
    ensure!(verdict.wrong.is_empty() && verdict.values > 300, "{verdict:?}");
    ensure!(seen.beats[1] > 0, "no beat from the destination: {:?}", seen.beats);
    remove(node(1), name, true)
}

#[test]
fn redis_keeps_every_acknowledged_write_in_cooperative_mode() -> Result<()> {
    redis_moves("redis-c", 40, "cooperative")
}

#[test]
fn redis_keeps_every_acknowledged_write_in_traditional_mode() -> Result<()> {
    redis_moves("redis-t", 50, "traditional")
}

/// Plain `ctr run` with the annotation, under another id; the source keeps its container, fenced.
#[test]
fn an_annotation_brings_a_container_here_under_another_id() -> Result<()> {
    let name = "annotated";
    let (addresses, incarnation) = start_memhog(name, 60, 16, 1)?;
    images::import(node(1), Image::Memhog, "godwit")?;
    let from = format!("{}/default/{name}", node(0).name());
    let mut here = memhog(name, name, 1, 0).annotation("godwit.io/migrate-from", &from);
    here.name = "renamed";
    here.start(node(1))?;
    workload::memhog_is_whole(&BED, addresses[1], incarnation)?;

    // The source's container is stopped and may not be started again.
    wait_until("the source's task has ended", SOON, || {
        Ok(workload::task(node(0), name)?.as_deref() == Some("STOPPED"))
    })?;
    node(0).ok(&["ctr", "tasks", "rm", name])?;
    let again = node(0).run(&["ctr", "tasks", "start", "-d", name])?;
    let text = again.ok().expect_err("it failed").to_string();
    ensure!(text.contains(&format!("moved to {}, epoch 1", node(1).name())), "{text}");
    node(0).ok(&["ctr", "containers", "rm", name])?;

    // The annotation is spent: a restart here is an ordinary start.
    node(1).ok(&["ctr", "tasks", "rm", "-f", "renamed"])?;
    node(1).ok(&["ctr", "tasks", "start", "-d", "renamed"])?;
    let fresh = workload::memhog_answers(&BED, addresses[1])?;
    ensure!(fresh.incarnation != incarnation, "it was restored a second time");
    remove(node(1), "renamed", false)?;
    node(1).ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// The procedure of the first experiment: one round, and no writable layer.
#[test]
fn one_round_without_the_writable_layer_is_possible() -> Result<()> {
    let name = "document";
    let (addresses, incarnation) = start_memhog(name, 70, 16, 1)?;
    let options = ["--max-rounds", "1", "--writable-layer", "no"];
    let report = workload::migrated(node(0), name, node(0), node(1), &options)?;
    ensure!(report["rounds"] == 1, "{report}");
    let subjects = report["subjects"].to_string();
    ensure!(!subjects.contains("layer|"), "{subjects}");
    workload::memhog_is_whole(&BED, addresses[1], incarnation)?;
    remove(node(1), name, true)
}

/// Regular files, directories, links, holes, modes, owners, times, attributes and odd names, on a
/// volume.
#[test]
fn a_volume_and_a_read_only_volume_survive_bit_for_bit() -> Result<()> {
    let name = "odd";
    images::import(node(0), Image::Busybox, "godwit")?;
    node(0).ok(&["godwit", "volume", "create", name])?;
    node(0).sh(&format!(
        "cd /var/lib/godwit/volumes/{name}/data
         mkdir -p d/e; echo one > d/one; ln d/one two; ln -s ../nowhere d/link; mkfifo pipe
         truncate -s 40M sparse; printf x | dd of=sparse bs=1 seek=20000000 conv=notrunc status=none
         printf odd > \"$(printf 'new\\nline \\377')\"; chmod 4711 d/one; chown 12:34 d/e
         head -c 3000000 /dev/urandom > noise; touch -d '2001-02-03 04:05:06.789' noise d
         setfattr -n user.colour -v blue noise"
    ))?;
    // Everything that a tree has to keep, and no more: access times are not part of it.
    let listing = "find . ! -type d -printf '%P|%y|%m|%U:%G|%s|%n|%T@|%l\\n' -o -printf '%P|%y|%m|%U:%G|%T@\\n' | LC_ALL=C sort; \
        find . -type f -exec sha256sum -b {} + | LC_ALL=C sort; getfattr -hdm- -R . 2>/dev/null || true; \
        [ $(stat -c %b sparse) -lt 1000 ] && echo sparse";
    let tree = |at: &Node, path: &str| at.sh(&format!("cd {path} && {{ {listing} ; }}"));
    let path = format!("/var/lib/godwit/volumes/{name}/data");
    let before = tree(node(0), &path)?;
    let imported = node(0).ok(&["godwit", "volume", "import", &path])?.trim().to_owned();
    let archive = "/var/lib/godwit/tree.tar.gz";
    node(0).sh(&format!(
        "tar --create --gzip --format=posix --sparse --xattrs --xattrs-include='*' -C {path} -f {archive} ."
    ))?;
    let unpacked = node(0).ok(&["godwit", "volume", "import", archive])?;
    ensure!(unpacked.trim() == imported, "an archive of the tree is {unpacked}");

    Container::new(name, Image::Busybox)
        .volume(name, "/data", "rw")
        .volume(&imported, "/content", "ro")
        .command(&["sh", "-c", "while :; do usleep 100000; done"])
        .start(node(0))?;
    let denied =
        node(0).run(&["ctr", "tasks", "exec", "--exec-id", "w", name, "touch", "/content/x"])?;
    ensure!(!denied.succeeded(), "read-only content was written to");
    workload::migrated(node(2), name, node(0), node(2), &[])?;
    let after = tree(node(2), &path)?;
    ensure!(after == before, "before:\n{before}\nafter:\n{after}");
    let content = imported.trim_start_matches("sha256:");
    let content = tree(node(2), &format!("/var/lib/godwit/content/{content}"))?;
    ensure!(content == before, "read-only content:\n{content}");
    remove(node(2), name, true)?;
    node(2).ok(&["godwit", "volume", "rm", &imported]).map(drop)
}

/// As a handler with `runtime_path` makes it: the runtime is containerd's by its name, the shim is
/// ours. There and back, it stays so.
#[test]
fn a_container_that_selects_the_shim_by_its_path_keeps_its_runtimes_name() -> Result<()> {
    let (name, runtime) = ("by-path", "io.containerd.runc.v2");
    let shim = Path::new("/usr/local/bin/containerd-shim-godwit-v1");
    images::import(node(0), Image::Busybox, "godwit")?;
    let image = Image::Busybox.reference();
    let created = ["ctr", "containers", "create", "--runtime", runtime, "--snapshotter", "godwit"];
    node(0).ok(&[&created[..], &[image, name, "sh", "-c", COUNTING]].concat())?;
    let asynchronous = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    asynchronous.block_on(async {
        let client = Client::connect(&node(0).path("/run/containerd/containerd.sock"));
        let mounts = client.mounts("default", "godwit", name).await?;
        client.create_task("default", name, mounts, None, Some(shim)).await?;
        client.start_task("default", name).await
    })?;
    wait_until("it counts", SOON, || Ok(count(node(0), name).is_ok_and(|count| count > 20)))?;
    for (from, to) in [(0, 1), (1, 0)] {
        let before = count(node(from), name)?;
        workload::migrated(node(2), name, node(from), node(to), &[])?;
        let after = count(node(to), name)?;
        ensure!(after >= before, "{after} after {before}");
        let info = node(to).ok(&["ctr", "containers", "info", name])?;
        let info: serde_json::Value = serde_json::from_str(&info)?;
        ensure!(info["Runtime"]["Name"] == runtime, "{info:#}");
        is_gone_from(node(from), name)?;
    }
    remove(node(0), name, false)
}

/// Method: the copy takes seconds; once it has begun, the image loses its name at the source, and
/// containerd collects garbage.
#[test]
fn an_image_that_loses_its_name_at_the_source_is_held_until_it_is_copied() -> Result<()> {
    let name = "nameless";
    let image = Image::Sqlite;
    images::import(node(0), image, "godwit")?;
    Container::new(name, image).command(&["sh", "-c", COUNTING]).start(node(0))?;
    wait_until("it counts", SOON, || Ok(count(node(0), name).is_ok_and(|count| count > 20)))?;
    let blobs = || -> Result<Vec<String>> {
        let listed = node(0).ok(&["ctr", "content", "ls", "-q"])?;
        Ok(listed.lines().map(str::to_owned).collect())
    };
    let before = blobs()?;
    node(0).set_rate(Some(4))?;
    let words = ["godwit", "migrate", name, "--from", node(0).name(), "--to", node(1).name()];
    let mut client = node(1).spawn(&words, name)?;
    wait_until("a blob is on its way", SOON, || {
        let active = node(1).ok(&["ctr", "content", "active"])?;
        Ok(active.contains("sha256"))
    })?;
    node(0).ok(&["ctr", "images", "rm", "--sync", image.reference()])?;
    let held = blobs()?;
    ensure!(client.ended()?.is_none(), "the copy was too fast to tell: {}", client.log());
    node(0).set_rate(Some(1000))?;
    ensure!(held == before, "{held:?} of {before:?}");
    let code = client.wait(Duration::from_secs(60))?;
    ensure!(code == 0, "exit {code}: {}", client.log());
    let after = count(node(1), name)?;
    wait_until("it goes on", SOON, || Ok(count(node(1), name)? > after))?;
    wait_until("the source lets go of the image", SOON, || {
        node(0).ok(&["ctr", "content", "prune", "references"])?;
        Ok(blobs()?.len() < before.len())
    })?;
    remove(node(1), name, false)
}
