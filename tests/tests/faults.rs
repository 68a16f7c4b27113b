//! Migrations that fail: a clear error, the container running at its source, nothing left anywhere.

#[path = "faults/disk.rs"]
mod disk;
#[path = "faults/marks.rs"]
mod marks;
#[path = "faults/services.rs"]
mod services;
#[path = "faults/two_volumes.rs"]
mod two_volumes;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::redis::Client;
use godwit_tests::workload::{self, Container, memhog};
use godwit_tests::{Bed, BedOptions, Node, criu};

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000)).expect("the test nodes start");
    for image in [Image::Busybox, Image::Memhog] {
        images::import(bed.node(0), image, "godwit").expect("images can be imported");
    }
    bed
});

const SOON: Duration = Duration::from_secs(20);

fn source() -> &'static Node {
    BED.node(0)
}

fn destination() -> &'static Node {
    BED.node(1)
}

/// A memhog at the source, with a volume and a network of its own name: its address there.
fn start_memhog(name: &'static str, first: u8, mib: usize) -> Result<Ipv4Addr> {
    let addresses = workload::networks(&BED, name, first)?;
    source().ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, mib, 1).start(source())?;
    workload::memhog_answers(&BED, addresses[0])?;
    Ok(addresses[0])
}

fn remove(name: &str) -> Result<()> {
    source().ok(&["ctr", "tasks", "rm", "-f", name])?;
    source().ok(&["ctr", "containers", "rm", name]).map(drop)
}

/// The first process of a container at the source.
fn pid(name: &str) -> Result<String> {
    let listed = source().ok(&["ctr", "tasks", "ls"])?;
    let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
    let pid = line.and_then(|line| line.split_whitespace().nth(1)).context("no task")?;
    Ok(pid.to_owned())
}

/// A migration that must fail; what it says.
fn refused(name: &str, options: &[&str]) -> Result<String> {
    let done = workload::migrate(source(), name, source(), destination(), options)?;
    ensure!(!done.succeeded(), "{name} was migrated");
    Ok(done.ok().expect_err("it failed").to_string())
}

/// The destination has nothing of the container: no record, task, snapshot, volume, staged file.
fn nothing_is_left(name: &str) -> Result<()> {
    nothing_is_left_at(destination(), name)
}

fn nothing_is_left_at(at: &Node, name: &str) -> Result<()> {
    let left = || {
        let mut left = String::new();
        for command in [
            "ctr containers ls -q",
            "ctr tasks ls -q",
            "ctr snapshots --snapshotter godwit ls | grep Active || true",
            "godwit volume ls",
            "ls /var/lib/godwit/stage 2>/dev/null || true",
            "ls /run/containerd/io.containerd.runtime.v2.task/default 2>/dev/null || true",
            "grep -o '/var/lib/godwit/stage[^ ]*' /proc/mounts || true",
            "godwit status | grep 'in progress' || true",
        ] {
            left += &at.sh(command)?;
        }
        let name_or_stage = |line: &&str| line.contains(name) || line.contains("stage");
        anyhow::Ok(left.lines().filter(name_or_stage).collect::<Vec<_>>().join("\n"))
    };
    wait_until("nothing is left at the destination", SOON, || Ok(left()?.is_empty()))
        .with_context(|| left().unwrap_or_default())
}

/// The memhog at the source has lost nothing and goes on.
fn runs_on(name: &str, address: Ipv4Addr) -> Result<()> {
    wait_until("the source runs", SOON, || {
        Ok(workload::task(source(), name)?.as_deref() == Some("RUNNING"))
    })?;
    let before = workload::memhog_answers(&BED, address)?;
    workload::memhog_is_whole(&BED, address, before.incarnation)?;
    wait_until("it goes on", SOON, || {
        Ok(workload::memhog_answers(&BED, address)?.beats > before.beats)
    })
}

#[test]
fn an_unknown_container_is_named() -> Result<()> {
    let text = refused("nosuch", &[])?;
    ensure!(text.contains("container default/nosuch is not on node edge-a"), "{text}");
    nothing_is_left("nosuch")
}

#[test]
fn an_unknown_node_is_named() -> Result<()> {
    for (from, to) in [("edge-a", "edge-z"), ("edge-z", "edge-a")] {
        let done = source().run(&["godwit", "migrate", "x", "--from", from, "--to", to])?;
        let text = done.ok().expect_err("it failed").to_string();
        ensure!(text.contains("\"edge-z\" is not among this node's peers"), "{text}");
    }
    let same = source().run(&["godwit", "migrate", "x", "--from", "edge-a", "--to", "edge-a"])?;
    let text = same.ok().expect_err("it failed").to_string();
    ensure!(text.contains("both edge-a"), "{text}");
    Ok(())
}

#[test]
fn an_unknown_volume_is_named_with_what_to_do() -> Result<()> {
    let wanted = Container::new("novolume", Image::Busybox).volume("nosuch", "/data", "rw");
    let text = wanted.run(source())?.ok().expect_err("it failed").to_string();
    ensure!(text.contains("volume nosuch is not on this node"), "{text}");
    ensure!(text.contains("godwit volume create nosuch"), "{text}");
    let content = format!("sha256:{}", "0".repeat(64));
    let wanted = Container::new("nocontent", Image::Busybox).volume(&content, "/data", "ro");
    let text = wanted.run(source())?.ok().expect_err("it failed").to_string();
    ensure!(text.contains("godwit volume import"), "{text}");
    let left =
        source().sh("ctr tasks ls -q; ls /run/containerd/io.containerd.runtime.v2.task/default")?;
    ensure!(!left.contains("novolume") && !left.contains("nocontent"), "{left}");
    Ok(())
}

#[test]
fn a_stopped_container_and_one_of_another_runtime_are_refused() -> Result<()> {
    Container::new("ended", Image::Busybox).command(&["true"]).start(source())?;
    wait_until("it ends", SOON, || {
        Ok(workload::task(source(), "ended")?.as_deref() == Some("STOPPED"))
    })?;
    let text = refused("ended", &[])?;
    ensure!(text.contains("container default/ended is stopped, not running"), "{text}");
    remove("ended")?;
    let image = Image::Busybox.reference();
    source().ok(&[
        "ctr",
        "run",
        "-d",
        "--snapshotter",
        "godwit",
        image,
        "plain",
        "sleep",
        "1000",
    ])?;
    let text = refused("plain", &[])?;
    ensure!(text.contains("does not run under Godwit's shim"), "{text}");
    remove("plain")
}

#[test]
fn a_name_that_is_taken_at_the_destination_is_refused() -> Result<()> {
    let name = "taken";
    let address = start_memhog(name, 0, 8)?;
    images::import(destination(), Image::Busybox, "godwit")?;
    let image = Image::Busybox.reference();
    destination().ok(&["ctr", "containers", "create", "--snapshotter", "godwit", image, name])?;
    let text = refused(name, &[])?;
    ensure!(text.contains("container default/taken exists on this node already"), "{text}");
    destination().ok(&["ctr", "containers", "rm", name])?;

    destination().ok(&["godwit", "volume", "create", name])?;
    let text = refused(name, &[])?;
    ensure!(text.contains("volume taken exists on this node already"), "{text}");
    destination().ok(&["godwit", "volume", "rm", name])?;
    runs_on(name, address)?;
    nothing_is_left(name)?;
    remove(name)
}

#[test]
fn a_node_that_does_not_answer_is_named() -> Result<()> {
    let name = "unheard";
    let address = start_memhog(name, 4, 8)?;
    destination().kill_daemon()?;
    let text = refused(name, &[])?;
    ensure!(text.contains("node edge-b does not answer at"), "{text}");
    destination().start_daemon()?;
    runs_on(name, address)?;
    remove(name)
}

/// Method: a socket bound to an address that the destination's network loses after it was looked
/// for.
#[test]
fn a_restore_that_fails_leaves_the_source_running_and_gives_crius_reason() -> Result<()> {
    let name = "bound";
    images::import(source(), Image::Redis, "godwit")?;
    let address = workload::networks(&BED, name, 8)?[0];
    let words =
        ["redis-server", "--bind", &address.to_string(), "--protected-mode", "no", "--save", ""];
    Container::new(name, Image::Redis).network(name).command(&words).start(source())?;
    let at = SocketAddr::from((address, workload::REDIS_PORT));
    let connect = || Client::connect(at, Duration::from_secs(2));
    BED.as_client(|| {
        wait_until("redis answers", SOON, || {
            Ok(connect().is_ok_and(|mut redis| redis.ping().is_ok()))
        })?;
        Ok(connect()?.set("key", b"kept")?)
    })?;
    let alias = format!("{address}/32");
    destination().ok(&["ip", "-n", name, "address", "add", &alias, "dev", "lo"])?;
    let logged = destination().log_end("daemon");
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let mut running = source().spawn(&words, "migrate-bound")?;
    wait_until("pre-copy begins", SOON, || {
        Ok(destination().log_since("daemon", logged).contains("round 1"))
    })?;
    destination().ok(&["ip", "-n", name, "address", "del", &alias, "dev", "lo"])?;
    ensure!(running.wait(Duration::from_secs(60))? != 0, "{name} was migrated");
    let text = source().log("migrate-bound");
    ensure!(text.contains("bind") && text.contains("runs on at its source"), "{text}");
    ensure!(!text.contains("errno 0"), "CRIU's reason is missing: {text}");
    let kept = BED.as_client(|| {
        wait_until("redis answers again", SOON, || {
            Ok(connect().is_ok_and(|mut redis| redis.ping().is_ok()))
        })?;
        Ok(connect()?.get("key")?)
    })?;
    ensure!(kept.as_deref() == Some(b"kept"), "{kept:?}");
    nothing_is_left(name)?;
    remove(name)
}

/// Method: an unlinked open file beyond the limit that the container sets for CRIU, which refuses
/// it at the dump.
#[test]
fn a_dump_that_criu_refuses_leaves_the_container_running_and_gives_the_reason() -> Result<()> {
    let name = "ghost";
    let script = "dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null; exec 3</big; rm /big; while :; do usleep 50000; done";
    Container::new(name, Image::Busybox)
        .command(&["sh", "-c", script])
        .annotation("godwit.io/criu.ghost-limit", "1M")
        .start(source())?;
    wait_until("the file has lost its name", SOON, || {
        Ok(source().sh(&format!("ls -l /proc/{}/fd", pid(name)?))?.contains("(deleted)"))
    })?;
    let text = refused(name, &[])?;
    ensure!(text.to_lowercase().contains("ghost"), "{text}");
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"), "not running");
    nothing_is_left(name)?;
    remove(name)
}

#[test]
fn a_stopped_process_is_refused_before_criu_would_hang() -> Result<()> {
    let name = "sigstop";
    let script = "sleep 1000 & kill -STOP $!; while :; do usleep 50000; done";
    Container::new(name, Image::Busybox).command(&["sh", "-c", script]).start(source())?;
    wait_until("the process is stopped", SOON, || {
        // It may be stopped before it runs `sleep`, and then has the name of the shell.
        let processes = source().ok(&["ps", "-e", "-o", "stat=,args="])?;
        Ok(processes.lines().any(|line| line.starts_with('T') && line.contains("sleep 1000")))
    })?;
    let text = refused(name, &[])?;
    ensure!(text.contains("stopped") || text.contains("SIGSTOP"), "{text}");
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"), "not running");
    remove(name)
}

/// Method: a bed of its own, whose destination has its state on a small disk from the start.
#[test]
fn a_full_disk_at_the_destination_leaves_the_source_running() -> Result<()> {
    let name = "full";
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000))?;
    let (from, to) = (bed.node(0), bed.node(1));
    to.stop_containerd()?;
    to.stop_daemon()?;
    to.sh("mount -t tmpfs -o size=180m tmpfs /var/lib/godwit")?;
    to.start_daemon()?;
    to.start_containerd()?;
    images::import(from, Image::Memhog, "godwit")?;
    let addresses = workload::networks(&bed, name, 0)?;
    from.ok(&["godwit", "volume", "create", name])?;
    memhog(name, name, 160, 1).start(from)?;
    let before = workload::memhog_answers(&bed, addresses[0])?;

    let done = workload::migrate(from, name, from, to, &[])?;
    ensure!(!done.succeeded(), "it was migrated onto a full disk");
    let text = done.ok().expect_err("it failed").to_string();
    ensure!(text.contains("no room left") || text.contains("No space left"), "{text}");
    ensure!(text.contains("runs on at its source"), "{text}");
    nothing_is_left_at(to, name)?;
    let after = workload::memhog_is_whole(&bed, addresses[0], before.incarnation)?;
    ensure!(after.beats > before.beats, "it does not go on");
    to.stop_containerd()?;
    to.stop_daemon()?;
    to.sh("umount /var/lib/godwit").map(drop)
}

/// A migration in the background, whose destination restores slowly until this is dropped.
struct Frozen {
    running: godwit_tests::Background,
    _slow: criu::Changed<'static>,
}

/// Starts a migration and waits until the source is frozen and the destination has called CRIU for
/// the restore. `client` is where it is asked for.
fn frozen(name: &'static str, client: &Node) -> Result<Frozen> {
    let slow = criu::slow(destination(), 6)?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let running = client.spawn(&words, &format!("migrate-{name}"))?;
    wait_until("the source is frozen", SOON, || {
        Ok(workload::task(source(), name)?.as_deref() == Some("PAUSED"))
    })?;
    slow.wait_for_call()?;
    Ok(Frozen { running, _slow: slow })
}

/// A client ends with `code` and says `text`.
fn says(client: &mut godwit_tests::Background, code: i32, text: &str) -> Result<()> {
    let ended = client.wait(Duration::from_secs(120))?;
    let said = client.log();
    ensure!(ended == code && said.contains(text), "exit code {ended}: {said}");
    Ok(())
}

#[test]
fn a_destination_that_dies_while_it_restores_leaves_the_source_running() -> Result<()> {
    let name = "dies-d";
    let address = start_memhog(name, 16, 8)?;
    let mut migration = frozen(name, source())?;
    destination().kill_daemon()?;
    runs_on(name, address)?;
    destination().start_daemon()?;
    says(&mut migration.running, 4, "undecided: the daemon was lost")?;
    drop(migration);
    // The restore that is still held there asks the new daemon, and is refused.
    wait_until("the destination's task is gone", Duration::from_secs(60), || {
        Ok(!matches!(workload::task(destination(), name)?.as_deref(), Some("RUNNING" | "PAUSED")))
    })?;
    runs_on(name, address)?;
    wait_until("the destination is cleaned up", Duration::from_secs(120), || {
        Ok(!destination().ok(&["ctr", "containers", "ls", "-q"])?.contains(name))
    })?;
    nothing_is_left(name)?;
    remove(name)
}

#[test]
fn a_source_whose_daemon_dies_while_frozen_runs_on_after_its_restart() -> Result<()> {
    let name = "dies-s";
    let address = start_memhog(name, 20, 8)?;
    let mut migration = frozen(name, destination())?;
    source().kill_daemon()?;
    source().start_daemon()?;
    runs_on(name, address)?;
    says(&mut migration.running, 1, "it runs on at its source")?;
    drop(migration);
    nothing_is_left(name)?;
    runs_on(name, address)?;
    remove(name)
}

#[test]
fn a_link_that_is_cut_while_frozen_thaws_the_source() -> Result<()> {
    let name = "cut";
    let address = start_memhog(name, 24, 8)?;
    let mut migration = frozen(name, destination())?;
    destination().cut_link()?;
    runs_on(name, address)?;
    says(&mut migration.running, 4, "edge-a does not say that it runs there")?;
    destination().mend_link()?;
    drop(migration);
    nothing_is_left(name)?;
    runs_on(name, address)?;
    remove(name)
}

/// The source's daemon with further keys, until this is dropped.
struct Configured;

impl Configured {
    fn with(keys: &str) -> Result<Self> {
        let configured = Self;
        Self::restart(keys).map(|()| configured)
    }

    fn restart(keys: &str) -> Result<()> {
        source().stop_daemon()?;
        source().configure(keys)?;
        source().start_daemon()
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        if let Err(error) = Self::restart("") {
            eprintln!("the source's configuration is not as it was: {error:#}");
        }
    }
}

/// Method: CRIU at the destination takes three times as long as the source lets the container stand
/// still, and then CRIU at the source. Everything answers meanwhile.
#[test]
fn a_freeze_ends_at_its_deadline() -> Result<()> {
    let name = "deadline";
    let address = start_memhog(name, 32, 8)?;
    let limited = Configured::with("freeze_max_s = 2")?;
    let mut migration = frozen(name, source())?;
    let begun = Instant::now();
    runs_on(name, address)?;
    ensure!(begun.elapsed() < Duration::from_secs(5), "it stood still for {:?}", begun.elapsed());
    let code = migration.running.wait(Duration::from_secs(120))?;
    let log = migration.running.log();
    ensure!(code != 0 && log.contains("freeze_max_s"), "{code}: {log}");
    drop(migration);
    runs_on(name, address)?;
    nothing_is_left(name)?;
    let slow = criu::slow(source(), 6)?;
    let text = refused(name, &[])?;
    drop(slow);
    ensure!(text.contains("hung for") || text.contains("freeze_max_s"), "{text}");
    drop(limited);
    runs_on(name, address)?;
    nothing_is_left(name)?;
    remove(name)
}

/// Method: the container is killed during pre-copy over a slow link.
#[test]
fn a_container_that_ends_meanwhile_is_not_said_to_run_on() -> Result<()> {
    let name = "ends";
    start_memhog(name, 48, 32)?;
    source().set_rate(Some(30))?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let before = destination().traffic()?.received;
    let mut running = destination().spawn(&words, "migrate-ends")?;
    wait_until("some of it has come", SOON, || {
        Ok(destination().traffic()?.received > before + (8 << 20))
    })?;
    source().ok(&["ctr", "tasks", "kill", "-s", "KILL", name])?;
    says(&mut running, 1, "it does not run at its source: container default/ends is stopped")?;
    source().set_rate(Some(1000))?;
    nothing_is_left(name)?;
    remove(name)
}

#[test]
fn a_container_that_dies_with_its_shim_while_frozen_is_not_said_to_run_on() -> Result<()> {
    let name = "no-shim";
    start_memhog(name, 36, 8)?;
    let slow = criu::slow(source(), 4)?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let mut running = source().spawn(&words, "migrate-no-shim")?;
    slow.wait_for_call()?;
    source().sh(&format!("kill -KILL $(pgrep -f 'shim-godwit-v[1].* -id {name} ')"))?;
    let code = running.wait(Duration::from_secs(120))?;
    let log = running.log();
    ensure!(code != 0 && log.contains("it does not run at its source: "), "{code}: {log}");
    drop(slow);
    nothing_is_left(name)?;
    source().run(&["ctr", "tasks", "rm", "-f", name])?;
    source().ok(&["ctr", "containers", "rm", name]).map(drop)
}

/// Method: the link is cut during pre-copy over a slow link.
#[test]
fn a_cut_during_pre_copy_costs_nothing() -> Result<()> {
    let name = "precopy";
    let address = start_memhog(name, 28, 32)?;
    source().set_rate(Some(30))?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let before = destination().traffic()?.received;
    let mut running = source().spawn(&words, "migrate-precopy")?;
    wait_until("some of it has come", SOON, || {
        Ok(destination().traffic()?.received > before + (4 << 20))
    })?;
    destination().cut_link()?;
    let mut code = None;
    wait_until("the migration fails", Duration::from_secs(60), || {
        let task = workload::task(source(), name)?;
        ensure!(task.as_deref() == Some("RUNNING"), "{task:?} after the cut");
        code = running.ended()?;
        Ok(code.is_some())
    })?;
    // The destination notices by itself, at its own time, and would go on if the link came back
    // before that.
    nothing_is_left(name)?;
    destination().mend_link()?;
    source().set_rate(Some(1000))?;
    ensure!(code != Some(0), "it was migrated over a cut link");
    runs_on(name, address)?;
    // What arrived serves the next attempt.
    workload::migrated(source(), name, source(), destination(), &[])?;
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "containers", "rm", name])?;
    destination().ok(&["godwit", "volume", "rm", name]).map(drop)
}
