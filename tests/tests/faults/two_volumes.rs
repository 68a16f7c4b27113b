//! A container with two volumes, of which one fails: both stay at the source, as they were.

use anyhow::{Context as _, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::Image;
use godwit_tests::workload::{self, Container};
use godwit_tests::{Background, criu};

use super::marks::slow_migration;
use super::{SOON, destination, remove, source};

const VOLUMES: [&str; 2] = ["two-a", "two-b"];
/// Rate of the nodes' links.
const FAST_MBIT: u32 = 1000;
const AT: &str = "/var/lib/godwit/volumes";

/// Counts in both volumes, each in its turn.
const COUNT: &str = "i=0; while :; do i=$((i+1)); for v in a b; do echo $i > /$v/n; mv /$v/n /$v/count; done; usleep 20000; done";

fn counted(volume: &str) -> Result<u64> {
    let count = source().ok(&["cat", &format!("{AT}/{volume}/data/count")])?;
    count.trim().parse().context(volume.to_owned())
}

/// It counts in both, and the destination has none of them.
fn goes_on(name: &str, what: &str) -> Result<()> {
    wait_until("the source runs", SOON, || {
        Ok(workload::task(source(), name)?.as_deref() == Some("RUNNING"))
    })
    .with_context(|| what.to_owned())?;
    for volume in VOLUMES {
        let before = counted(volume)?;
        wait_until("it counts", SOON, || Ok(counted(volume)? > before))
            .with_context(|| format!("{what}, {volume}"))?;
        let fixed = source().ok(&["cat", &format!("{AT}/{volume}/data/fixed")])?;
        ensure!(fixed == volume, "{what}: {volume} has {fixed}");
    }
    let left = || destination().ok(&["godwit", "volume", "ls"]);
    wait_until("no volume is left", SOON, || Ok(!left()?.contains("two-")))
        .with_context(|| format!("{what}: {}", left().unwrap_or_default()))?;
    let stages = || destination().sh("ls /var/lib/godwit/stage");
    wait_until("no staged file is left", SOON, || Ok(stages()?.is_empty()))
}

fn fails(mut migration: Background, what: &str) -> Result<()> {
    ensure!(migration.wait(SOON)? != 0, "{what}: it was migrated");
    let text = migration.log();
    ensure!(text.contains("runs on at its source"), "{what}: {text}");
    Ok(())
}

/// A migration whose first round takes some seconds, once it has begun.
fn slow(name: &str) -> Result<Background> {
    source().sh(&format!("head -c 3000000 /dev/urandom > {AT}/two-a/data/bulk"))?;
    slow_migration(name, "round 1")
}

/// Method: the second volume's directory is away when it is captured; a directory is in the way
/// where it is staged; one is in the way where it is put into place, and where the first is; the
/// restore fails when both are in place.
#[test]
fn one_volume_of_two_that_fails_leaves_both_where_they_are() -> Result<()> {
    let name = "two";
    for volume in VOLUMES {
        source().ok(&["godwit", "volume", "create", volume])?;
        source().sh(&format!("printf {volume} > {AT}/{volume}/data/fixed"))?;
    }
    Container::new(name, Image::Busybox)
        .volume("two-a", "/a", "rw")
        .volume("two-b", "/b", "rw")
        .command(&["sh", "-c", COUNT])
        .start(source())?;

    let second = format!("{AT}/two-b/data");
    let migration = slow(name)?;
    source().sh(&format!("mv {second} {AT}/../away"))?;
    let failed = fails(migration, "capture");
    source().set_rate(Some(FAST_MBIT))?;
    failed?;
    source().sh(&format!("mv {AT}/../away {second}"))?;
    goes_on(name, "capture")?;

    let migration = slow(name)?;
    wait_until("the session has begun", SOON, || {
        let made = destination().run(&[
            "sh",
            "-c",
            "mkdir $(echo /var/lib/godwit/stage/*)/volume-two-b",
        ])?;
        Ok(made.succeeded())
    })?;
    let failed = fails(migration, "transfer");
    source().set_rate(Some(FAST_MBIT))?;
    failed?;
    goes_on(name, "transfer")?;

    for volume in VOLUMES {
        let what = format!("{volume} into place");
        let slow = criu::slow(source(), 2)?;
        let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
        let migration = source().spawn(&words, &format!("migrate-{volume}"))?;
        slow.wait_for_call()?;
        destination().sh(&format!("mkdir -p {AT}/{volume}/data"))?;
        let failed = fails(migration, &what);
        drop(slow);
        destination().sh(&format!("rm -r {AT}/{volume}"))?;
        failed?;
        goes_on(name, &what)?;
    }

    let broken = criu::broken(destination())?;
    let words = ["godwit", "migrate", name, "--from", "edge-a", "--to", "edge-b"];
    let failed = fails(source().spawn(&words, "migrate-restore")?, "restore");
    drop(broken);
    failed?;
    goes_on(name, "restore")?;
    remove(name)?;
    VOLUMES.iter().try_for_each(|one| source().ok(&["godwit", "volume", "rm", one]).map(drop))
}
