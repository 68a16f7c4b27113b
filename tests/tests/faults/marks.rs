//! A failing migration removes what it made, and nothing else.

use std::time::Duration;

use anyhow::{Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container};
use godwit_tests::{Background, Node};

use super::{SOON, destination, nothing_is_left, runs_on, source, start_memhog};

/// Longer than a daemon that starts waits before it removes what an earlier one had left.
const LATER: Duration = Duration::from_secs(85);

const SLEEP: [&str; 3] = ["sh", "-c", "while :; do usleep 100000; done"];

/// Rate of the source's link at which the image and the memory of these tests take some seconds.
const SLOW_MBIT: u32 = 8;

/// `godwit migrate` in the background over a slow link, once it has reached this step.
pub(super) fn slow_migration(name: &str, step: &str) -> Result<Background> {
    let mut watching = destination().spawn(&["godwit", "watch"], &format!("watch-{name}"))?;
    source().set_rate(Some(SLOW_MBIT))?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let running = source().spawn(&words, &format!("migrate-{name}"))?;
    wait_until(step, SOON, || Ok(watching.log().contains(step)))?;
    watching.kill()?;
    Ok(running)
}

fn is_running(at: &Node, name: &str) -> Result<bool> {
    Ok(workload::task(at, name)?.as_deref() == Some("RUNNING"))
}

/// Method: while the image comes over a slow link, a container of the same name is created and
/// started at the destination, over another snapshotter and runtime.
#[test]
fn a_namesake_that_starts_during_pre_copy_stays() -> Result<()> {
    let name = "namesake";
    images::import(destination(), Image::Busybox, "overlayfs")?;
    let address = start_memhog(name, 40, 8)?;
    let memhog = Image::Memhog.reference();
    destination().run(&["ctr", "images", "rm", "--sync", memhog])?;
    destination().ok(&["ctr", "content", "prune", "references"])?;
    let mut running = slow_migration(name, "image")?;
    let words =
        ["ctr", "run", "-d", "--snapshotter", "overlayfs", Image::Busybox.reference(), name];
    destination().ok(&[&words[..], &SLEEP[..]].concat())?;
    let early = running.ended()?;
    let code = running.wait(Duration::from_secs(120))?;
    source().set_rate(Some(1000))?;
    ensure!(early.is_none(), "the image was there too soon: {}", running.log());
    ensure!(code != 0, "it was migrated: {}", running.log());
    ensure!(is_running(destination(), name)?, "the namesake does not run");
    destination().ok(&["ctr", "containers", "info", name])?;
    destination().ok(&["ctr", "snapshots", "--snapshotter", "overlayfs", "info", name])?;
    let lived = ["ctr", "tasks", "exec", "--exec-id", "look", name, "ls", "/bin/sh"];
    destination().ok(&lived)?;
    runs_on(name, address)?;

    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "containers", "rm", name])?;
    nothing_is_left(name)?;
    // Its own attempt is not in the way of the next one.
    workload::migrated(source(), name, source(), destination(), &[])?;
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "containers", "rm", name])?;
    destination().ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// Method: the destination's daemon is started on the journal that it had before the container
/// came, as after a restored backup; later the container is stopped and started again.
#[test]
fn an_older_journal_removes_no_container_that_came_and_empties_no_layer() -> Result<()> {
    let (name, annotated) = ("older", "older-by-annotation");
    for node in [source(), destination()] {
        images::import(node, Image::Busybox, "godwit")?;
    }
    for name in [name, annotated] {
        Container::new(name, Image::Busybox).command(&SLEEP).start(source())?;
        write(source(), name, "before")?;
    }
    destination().stop_daemon()?;
    destination().sh("cp /var/lib/godwit/node.redb /var/lib/godwit.older")?;
    destination().start_daemon()?;
    workload::migrated(source(), name, source(), destination(), &[])?;
    let from = format!("{}/default/{annotated}", source().name());
    Container::new(annotated, Image::Busybox)
        .annotation("godwit.io/migrate-from", &from)
        .command(&SLEEP)
        .start(destination())?;
    for name in [name, annotated] {
        write(destination(), name, "after")?;
    }
    destination().kill_daemon()?;
    destination().sh("mv /var/lib/godwit.older /var/lib/godwit/node.redb")?;
    destination().start_daemon()?;
    std::thread::sleep(LATER);
    for name in [name, annotated] {
        ensure!(is_running(destination(), name)?, "{name} does not run");
        ensure!(read(name)? == "before\nafter\n", "{name} lost its layer");
        destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    }
    for name in [name, annotated] {
        destination().ok(&["ctr", "tasks", "start", "-d", name])?;
        ensure!(read(name)? == "before\nafter\n", "{name} was emptied at its start");
        destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    }
    // Without that note, the source is asked, and nothing is touched before it answers.
    for name in [name, annotated] {
        destination().ok(&["ctr", "containers", "label", name, "godwit.io/came="])?;
        let started = destination().run(&["ctr", "tasks", "start", "-d", name])?;
        ensure!(!started.succeeded(), "{name} came a second time");
        let mounts = destination().ok(&[
            "ctr",
            "snapshots",
            "--snapshotter",
            "godwit",
            "mounts",
            "/mnt",
            name,
        ])?;
        let upper = mounts.split("upperdir=").nth(1).and_then(|rest| rest.split(',').next());
        let upper = upper.unwrap_or_default();
        ensure!(!upper.is_empty(), "{mounts}");
        let found = destination().sh(&format!("cat {upper}/tmp/file"))?;
        ensure!(found == "before\nafter\n", "{name} was emptied: {found}");
        destination().run(&["ctr", "tasks", "rm", "-f", name])?;
        destination().ok(&["ctr", "containers", "rm", name])?;
    }
    source().run(&["ctr", "tasks", "rm", "-f", annotated])?;
    source().ok(&["ctr", "containers", "rm", annotated]).map(drop)
}

fn write(at: &Node, name: &str, line: &str) -> Result<()> {
    let script = format!("echo {line} >> /tmp/file");
    let id = format!("write-{line}");
    at.ok(&["ctr", "tasks", "exec", "--exec-id", &id, name, "sh", "-c", &script]).map(drop)
}

fn read(name: &str) -> Result<String> {
    destination().ok(&["ctr", "tasks", "exec", "--exec-id", "read", name, "cat", "/tmp/file"])
}

/// Method: during a pre-copy over a slow link, everything that may get in its way is tried.
#[test]
fn what_is_leaving_is_leased_at_its_source() -> Result<()> {
    let name = "leased";
    images::import(source(), Image::Busybox, "godwit")?;
    let address = start_memhog(name, 44, 24)?;
    // A process outside the container that has the volume mounted.
    let data = format!("/var/lib/godwit/volumes/{name}/data");
    source().sh(&format!("mkdir -p /run/watch-{name}; touch {data}/mine"))?;
    let pid = format!("/run/watch-{name}.pid");
    let script = format!("mount --bind {data} /run/watch-{name}; echo $$ > {pid}; exec sleep 1000");
    let mut watcher = source().spawn(&["unshare", "-m", "sh", "-c", &script], "watcher")?;
    images::import(destination(), Image::Memhog, "godwit")?;
    let mut running = slow_migration(name, "round 1")?;

    let second =
        Container::new("second", Image::Busybox).volume(name, "/data", "rw").run(source())?;
    let text = second.ok().expect_err("the volume was mounted").to_string();
    let reason = format!("volume {name} is leaving with container default/{name} to edge-b");
    ensure!(text.contains(&reason), "{text}");
    let removed = source().run(&["godwit", "volume", "rm", name])?;
    ensure!(!removed.succeeded(), "the volume was removed");
    let captured = source().run(&["godwit", "snapshot", "create", "--consistent", name])?;
    let text = captured.ok().expect_err("a snapshot was taken").to_string();
    ensure!(text.contains(&format!("container default/{name} is leaving")), "{text}");
    let other = workload::migrate(source(), name, source(), destination(), &[])?;
    let text = other.ok().expect_err("it was migrated twice").to_string();
    ensure!(text.contains(&format!("container default/{name} is arriving")), "{text}");
    let made = destination().run(&["godwit", "volume", "create", name])?;
    let text = made.ok().expect_err("a volume was created").to_string();
    ensure!(text.contains(&format!("volume {name} is arriving")), "{text}");

    ensure!(running.ended()?.is_none(), "the migration ended too soon: {}", running.log());
    let code = running.wait(Duration::from_secs(120))?;
    source().set_rate(Some(1000))?;
    ensure!(code == 0, "{}", running.log());
    let moved = workload::memhog_answers(&super::BED, address);
    ensure!(moved.is_err(), "it still answers at its source");

    let seen = format!("nsenter -t $(cat {pid}) -m ls /run/watch-{name}/mine");
    source().sh(&seen)?;
    let status = source().ok(&["godwit", "status"])?;
    ensure!(status.contains("still mounted"), "{status}");
    watcher.kill()?;
    source().run(&["godwit", "check", "--repair"])?;
    let status = source().ok(&["godwit", "status"])?;
    ensure!(!status.contains("still mounted"), "{status}");
    source().run(&["ctr", "containers", "rm", "second"])?;
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "containers", "rm", name])?;
    destination().ok(&["godwit", "volume", "rm", name]).map(drop)
}
