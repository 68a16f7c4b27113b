//! A disk that is full or fails, and works again: the daemon goes on, or ends with the reason.

use anyhow::{Context as _, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::preload::Failing;
use godwit_tests::workload::{self, Container};
use godwit_tests::{Bed, BedOptions, Node};
use nix::errno::Errno;

use super::{SOON, destination, frozen, nothing_is_left, refused, runs_on, source, start_memhog};

const SLEEP: [&str; 3] = ["sh", "-c", "while :; do usleep 100000; done"];

/// How often a database is changed until it meets the end of the disk.
const CHANGES_MAX: usize = 200;

/// What `godwit status` says of failed databases.
fn failures(node: &Node) -> Result<String> {
    let lines = node.ok(&["godwit", "status"])?;
    Ok(lines.lines().filter(|line| line.starts_with("FAILED: ")).collect::<Vec<_>>().join("\n"))
}

fn works_again(node: &Node) -> Result<()> {
    wait_until("no database is failed", SOON, || Ok(failures(node)?.is_empty()))
}

/// Method: the source's state is on a small file system. The blocks of the store's index that hold
/// nothing are given back, as on a file system that keeps none in advance, and a file takes all
/// the room.
#[test]
fn a_disk_that_was_full_is_not_the_end_of_the_store() -> Result<()> {
    let (name, state) = ("was-full", "/var/lib/godwit");
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000))?;
    let (from, to) = (bed.node(0), bed.node(1));
    from.stop_containerd()?;
    from.stop_daemon()?;
    from.sh(&format!("mount -t tmpfs -o size=300m tmpfs {state}"))?;
    from.start_daemon()?;
    from.start_containerd()?;
    images::import(from, Image::Busybox, "godwit")?;
    Container::new(name, Image::Busybox).command(&SLEEP).start(from)?;
    from.ok(&["godwit", "snapshot", "create", name])?;
    let index = format!("{state}/store/index.redb");
    from.sh(&format!(
        "fallocate --dig-holes {index}; truncate -s $(stat -c %s {index}) {index}
         ! cat /dev/zero > {state}/filler 2> /dev/null"
    ))?;
    let mut refused = None;
    for number in 0..CHANGES_MAX {
        let pin = if number % 2 == 0 { "pin" } else { "unpin" };
        let done = from.run(&["godwit", "snapshot", pin, "1"])?;
        if !done.succeeded() {
            refused = Some(done.stderr);
            break;
        }
    }
    let refused = refused.context("the index never met the end of the disk")?;
    ensure!(refused.contains("no room left on the disk"), "{refused}");
    from.ok(&["godwit", "status"])?;
    from.sh(&format!("rm {state}/filler"))?;
    works_again(from)?;
    workload::migrated(from, name, from, to, &[])?;
    ensure!(workload::task(to, name)?.as_deref() == Some("RUNNING"), "it does not run");
    from.stop_containerd()?;
    from.stop_daemon()?;
    from.sh(&format!("umount {state}")).map(drop)
}

/// Method: while the destination restores, the source's journal cannot be written any more, and
/// the destination's link is cut. Then the source's disk has no room for what it captures, and none
/// for a fence.
#[test]
fn a_journal_that_cannot_be_written_keeps_nothing_frozen() -> Result<()> {
    let name = "unwritten";
    let failing = Failing::install(source())?;
    source().stop_daemon()?;
    source().start_daemon()?;
    let address = start_memhog(name, 52, 8)?;
    let mut migration = frozen(name, source())?;
    failing.fail("/node.redb", Errno::ENOSPC)?;
    destination().cut_link()?;
    runs_on(name, address)?;
    wait_until("the status names the journal", SOON, || {
        Ok(failures(source())?.contains("journal failed"))
    })?;
    failing.mend()?;
    works_again(source())?;
    ensure!(migration.running.wait(SOON)? != 0, "it was migrated");
    drop(migration);
    destination().mend_link()?;
    nothing_is_left(name)?;
    for part in ["/store/", "/fences/"] {
        failing.fail(part, Errno::ENOSPC)?;
        let text = refused(name, &[])?;
        ensure!(text.contains("room left") || text.contains("No space left"), "{part}: {text}");
        runs_on(name, address)?;
        failing.mend()?;
        works_again(source())?;
        nothing_is_left(name)?;
    }
    workload::migrated(source(), name, source(), destination(), &[])?;
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "containers", "rm", name])?;
    destination().ok(&["godwit", "volume", "rm", name])?;
    source().stop_daemon()?;
    drop(failing);
    source().start_daemon()
}

/// Method: the disk refuses what the daemon writes for containerd's snapshots, and later a test of
/// whether it takes writes again.
#[test]
fn a_daemon_whose_snapshots_cannot_be_written_ends_once_they_can() -> Result<()> {
    let bed = Bed::start(&BedOptions::nodes(1))?;
    let node = bed.node(0);
    let failing = Failing::install(node)?;
    node.stop_daemon()?;
    node.start_daemon()?;
    let prepare =
        |key: &str| node.run(&["ctr", "snapshots", "--snapshotter", "godwit", "prepare", key]);
    prepare("first")?.ok()?;
    failing.fail("/godwit/snapshots/", Errno::EIO)?;
    // The first may be answered before it is on disk.
    prepare("second")?;
    let refused = prepare("third")?;
    ensure!(!refused.succeeded(), "{refused}");
    let failed = "the database of containerd's snapshots failed";
    wait_until("the status says so", SOON, || Ok(failures(node)?.contains(failed)))?;
    wait_until("the daemon waits for the disk", SOON, || {
        Ok(node.log("daemon").contains("waiting for the disk"))
    })?;
    ensure!(node.ok(&["ctr", "snapshots", "--snapshotter", "godwit", "ls"])?.contains("first"));
    ensure!(failing.is_alive()?, "it has ended although the disk takes no writes");
    failing.mend()?;
    wait_until("the daemon ends", SOON, || Ok(!failing.is_alive()?))?;
    ensure!(node.log("daemon").contains("it is opened again at the next start"), "no reason");
    node.kill_daemon()?;
    node.start_daemon()?;
    prepare("fourth")?.ok()?;
    ensure!(failures(node)?.is_empty(), "{}", failures(node)?);
    node.stop_daemon()
}
