//! Daemons that end, and clients that interfere or go away.

use anyhow::{Context as _, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container};
use godwit_tests::{Node, criu};

use super::marks::slow_migration;
use super::{
    SOON, destination, frozen, nothing_is_left, nothing_is_left_at, refused, remove, runs_on, says,
    source, start_memhog,
};

const SLEEP: [&str; 3] = ["sh", "-c", "while :; do usleep 100000; done"];

fn comes_to_run(at: &Node, name: &str) -> Result<()> {
    wait_until("it runs at the other node", SOON, || {
        Ok(workload::task(at, name)?.as_deref() == Some("RUNNING"))
    })
}

/// Removes a memhog that has moved, so that its name is free.
fn remove_moved(name: &str) -> Result<()> {
    destination().ok(&["ctr", "tasks", "rm", "-f", name])?;
    destination().ok(&["ctr", "containers", "rm", name])?;
    destination().ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// Method: the source's daemon is killed during a pre-copy over a slow link, and stopped while the
/// container is frozen.
#[test]
fn a_source_whose_daemon_ends_keeps_its_container_running() -> Result<()> {
    let name = "ends-s";
    images::import(destination(), Image::Memhog, "godwit")?;
    let address = start_memhog(name, 56, 24)?;
    let mut running = slow_migration(name, "round 1")?;
    source().kill_daemon()?;
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"), "it does not run");
    source().set_rate(Some(1000))?;
    source().start_daemon()?;
    says(&mut running, 4, "undecided: the daemon was lost")?;
    nothing_is_left(name)?;
    runs_on(name, address)?;

    let mut migration = frozen(name, destination())?;
    source().stop_daemon()?;
    // It thaws before it ends.
    ensure!(workload::task(source(), name)?.as_deref() == Some("RUNNING"), "it is still frozen");
    source().start_daemon()?;
    says(&mut migration.running, 1, "it runs on at its source")?;
    drop(migration);
    nothing_is_left(name)?;
    runs_on(name, address)?;
    remove(name)
}

/// Method: a client resumes the container while it is frozen; then another interrupts the command
/// that migrates it.
#[test]
fn clients_change_nothing_in_a_migration() -> Result<()> {
    let name = "clients";
    start_memhog(name, 60, 8)?;
    let mut migration = frozen(name, source())?;
    let resumed = source().run(&["ctr", "tasks", "resume", name])?;
    let text = resumed.ok().expect_err("it was resumed").to_string();
    ensure!(text.contains("a migration froze it, and another node may run it"), "{text}");
    ensure!(workload::task(source(), name)?.as_deref() == Some("PAUSED"), "it is not frozen");
    // Not what has entered the node for it.
    source().sh(&format!("kill -INT $(pgrep -x -f 'godwit migrate {name} .*')"))?;
    says(&mut migration.running, 4, "interrupted: the daemons go on with")?;
    comes_to_run(destination(), name)?;
    drop(migration);
    wait_until("the source lets go", SOON, || {
        Ok(!source().ok(&["ctr", "containers", "ls", "-q"])?.contains(name))
    })?;
    remove_moved(name)
}

#[test]
fn a_volume_that_two_containers_mount_does_not_move() -> Result<()> {
    let name = "sharing";
    source().ok(&["godwit", "volume", "create", name])?;
    for container in [name, "sharing-too"] {
        let wanted = Container::new(container, Image::Busybox).volume(name, "/data", "rw");
        wanted.command(&SLEEP).start(source())?;
    }
    let text = refused(name, &[])?;
    let reason = format!("volume {name} is also mounted by container default/sharing-too");
    ensure!(text.contains(&reason), "{text}");
    nothing_is_left(name)?;
    remove(name)?;
    remove("sharing-too")?;
    source().ok(&["godwit", "volume", "rm", name]).map(drop)
}

/// Method: CRIU fails at the node that restores.
#[test]
fn a_snapshot_whose_restore_fails_is_as_it_was() -> Result<()> {
    let name = "again";
    source().ok(&["godwit", "volume", "create", name])?;
    let script = "echo before > /data/file; while :; do usleep 100000; done";
    let wanted = Container::new(name, Image::Busybox).volume(name, "/data", "rw");
    wanted.command(&["sh", "-c", script]).start(source())?;
    source().ok(&["godwit", "snapshot", "create", "--consistent", name])?;
    let listed = source().ok(&["godwit", "snapshot", "list"])?;
    let cut = listed.lines().find(|line| line.contains("container|") && line.contains(name));
    let cut = cut.and_then(|line| line.split_whitespace().next()).context(listed.clone())?;
    let pinned = source().ok(&["godwit", "snapshot", "pin", cut]);
    pinned.with_context(|| listed.clone())?;
    remove(name)?;
    source().ok(&["godwit", "volume", "rm", name])?;

    let broken = criu::broken(source())?;
    let failed = source().run(&["godwit", "snapshot", "restore", cut])?;
    ensure!(!failed.succeeded(), "CRIU failed, and it was restored");
    drop(broken);
    nothing_is_left_at(source(), name)?;
    source().ok(&["godwit", "snapshot", "restore", cut])?;
    comes_to_run(source(), name)?;
    let look = ["ctr", "tasks", "exec", "--exec-id", "look", name, "cat", "/data/file"];
    ensure!(source().ok(&look)? == "before\n", "the volume is not as it was");
    remove(name)?;
    source().ok(&["godwit", "volume", "rm", name]).map(drop)
}
