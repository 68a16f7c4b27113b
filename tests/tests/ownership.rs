//! Who may run a container after faults of containerd, of daemons and of machines: fences,
//! tombstones, claims.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::workload::{self, Container};
use godwit_tests::{Bed, BedOptions, Node};

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000)).expect("the test nodes start");
    workload::import_everywhere(&bed, Image::Busybox).expect("images can be imported");
    bed
});

const SOON: Duration = Duration::from_secs(20);

/// How often containerd's restart monitor looks for containers that should run.
const RESTART_INTERVAL: Duration = Duration::from_secs(10);

const METADATA: &str = "/var/lib/containerd/io.containerd.metadata.v1.bolt/meta.db";

fn source() -> &'static Node {
    BED.node(0)
}

fn destination() -> &'static Node {
    BED.node(1)
}

/// A container that does next to nothing.
fn idle(name: &str) -> Container<'_> {
    let script = "while :; do usleep 50000; done";
    Container::new(name, Image::Busybox).command(&["sh", "-c", script])
}

/// Moves a container by annotation: the source keeps its record, stopped and fenced.
fn move_by_annotation(name: &str, renamed: &str) -> Result<()> {
    let from = format!("{}/default/{name}", source().name());
    idle(renamed).annotation("godwit.io/migrate-from", &from).start(destination())?;
    wait_until("the source's task has ended", SOON, || {
        Ok(workload::task(source(), name)?.as_deref() == Some("STOPPED"))
    })?;
    ensure!(is_fenced(name), "no fence");
    Ok(())
}

fn is_fenced(name: &str) -> bool {
    source().path(format!("/var/lib/godwit/fences/default/{name}")).exists()
}

fn remove(at: &Node, name: &str) -> Result<()> {
    at.ok(&["ctr", "tasks", "rm", "-f", name])?;
    at.ok(&["ctr", "containers", "rm", name]).map(drop)
}

/// Method: a restart policy would start the source's container again. containerd runs for a while
/// on an empty root, as when a disk is mounted late, and then on a metadata database from before
/// the container.
#[test]
fn a_fence_outlives_a_containerd_that_lost_its_records() -> Result<()> {
    let (name, renamed) = ("fenced", "fenced-there");
    let node = source();
    node.stop_containerd()?;
    node.sh(&format!("cp {METADATA} /var/lib/older.db"))?;
    node.start_containerd()?;
    idle(name).options(&["--label", "containerd.io/restart.status=running"]).start(node)?;
    move_by_annotation(name, renamed)?;

    let run_for_a_while = || -> Result<()> {
        node.start_containerd()?;
        std::thread::sleep(Duration::from_secs(4));
        ensure!(!node.ok(&["ctr", "containers", "ls", "-q"])?.contains(name), "it has the record");
        node.stop_containerd()
    };
    node.stop_containerd()?;
    node.sh("mount -t tmpfs tmpfs /var/lib/containerd")?;
    run_for_a_while()?;
    node.sh(&format!("umount /var/lib/containerd; cp {METADATA} /var/lib/newer.db"))?;
    node.sh(&format!("cp /var/lib/older.db {METADATA}"))?;
    run_for_a_while()?;
    node.sh(&format!("cp /var/lib/newer.db {METADATA}"))?;
    node.start_containerd()?;

    let begun = Instant::now();
    while begun.elapsed() < RESTART_INTERVAL * 2 {
        ensure!(is_fenced(name), "the fence is gone");
        let task = workload::task(node, name)?;
        ensure!(task.as_deref() != Some("RUNNING"), "two runners");
        std::thread::sleep(Duration::from_millis(200));
    }
    ensure!(workload::task(destination(), renamed)?.as_deref() == Some("RUNNING"), "none runs");
    // A deletion that containerd reports ends it.
    node.sh(&format!(
        "ctr containers label {name} containerd.io/restart.status=; ctr tasks rm -f {name} || true"
    ))?;
    node.ok(&["ctr", "containers", "rm", name])?;
    wait_until("the fence ends", SOON, || Ok(!is_fenced(name)))?;
    remove(destination(), renamed)
}

/// Method: the daemon misses the deletion; a container of that name is created before it comes
/// back.
#[test]
fn a_container_that_was_created_again_while_the_daemon_was_away_is_not_fenced() -> Result<()> {
    let (name, renamed) = ("again", "again-there");
    let node = source();
    idle(name).start(node)?;
    move_by_annotation(name, renamed)?;
    node.kill_daemon()?;
    node.ok(&["ctr", "tasks", "rm", "-f", name])?;
    node.ok(&["ctr", "containers", "rm", name])?;
    // Its root needs the daemon's snapshotter, so another one holds it.
    images::import(node, Image::Busybox, "overlayfs")?;
    let runtime = "io.containerd.runc.godwit.v1";
    let words = ["ctr", "containers", "create", "--runtime", runtime, Image::Busybox.reference()];
    node.ok(&[&words[..], &[name, "sleep", "1000"]].concat())?;
    ensure!(is_fenced(name), "nothing could end the fence");
    node.start_daemon()?;
    wait_until("the fence ends", SOON, || Ok(!is_fenced(name)))?;
    node.ok(&["ctr", "tasks", "start", "-d", name])?;
    ensure!(workload::task(node, name)?.as_deref() == Some("RUNNING"), "it does not run");
    remove(node, name)?;
    remove(destination(), renamed)
}
