//! The snapshotter "godwit" behind a real containerd: images and containers as under overlayfs, and
//! nothing left. What containerd's contract says call by call is in `snapshots.rs`.

use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::{Bed, BedOptions, Containerd, Node};

/// The node that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| start().expect("the test node starts"));

const SOON: Duration = Duration::from_secs(10);
/// Options that select everything of ours.
const OURS: &[&str] = &["--snapshotter", "godwit", "--runtime", "io.containerd.runc.godwit.v1"];

fn start() -> Result<Bed> {
    let bed = Bed::start(&BedOptions::nodes(1).generation(Containerd::of_suite()))?;
    for snapshotter in ["godwit", "overlayfs"] {
        images::import(bed.node(0), Image::Redis, snapshotter)?;
        images::import(bed.node(0), Image::Busybox, snapshotter)?;
    }
    Ok(bed)
}

fn node() -> &'static Node {
    BED.node(0)
}

/// `ctr snapshots` of our snapshotter.
fn snapshots(words: &[&str]) -> Result<String> {
    node().ok(&[&["ctr", "snapshots", "--snapshotter", "godwit"], words].concat())
}

/// Names and kinds of all snapshots.
fn list() -> Result<Vec<(String, String)>> {
    let text = snapshots(&["ls"])?;
    let lines = text.lines().skip(1).map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (name, kind) = (words.first().copied(), words.last().copied());
        (name.unwrap_or_default().to_owned(), kind.unwrap_or_default().to_owned())
    });
    Ok(lines.collect())
}

/// Directories that the snapshotter keeps, one per snapshot, once containerd has collected garbage.
fn directories() -> Result<usize> {
    node().ok(&["ctr", "content", "prune", "references"])?;
    Ok(node().sh("ls /var/lib/godwit/snapshots/fs | wc -l")?.trim().parse()?)
}

struct Container {
    id: String,
}

impl Container {
    fn start(id: &str, image: Image, options: &[&str], script: &str) -> Result<Self> {
        let head = ["ctr", "run", "-d"];
        let tail = [image.reference(), id, "sh", "-c", script];
        node().ok(&[&head, options, &tail].concat())?;
        Ok(Self { id: id.to_owned() })
    }

    fn exec(&self, exec: &str, script: &str) -> Result<String> {
        node().ok(&["ctr", "task", "exec", "--exec-id", exec, &self.id, "sh", "-c", script])
    }

    fn is_running(&self) -> Result<bool> {
        let tasks = node().ok(&["ctr", "task", "ls"])?;
        Ok(tasks.lines().any(|line| line.contains(&self.id) && line.contains("RUNNING")))
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let id = &self.id;
        if let Err(error) =
            node().sh(&format!("ctr task rm -f {id} 2> /dev/null || :; ctr c rm {id}"))
        {
            eprintln!("{id}: not removed: {error:#}");
        }
    }
}

/// Method: every file of the mounted images with type, mode, owner, size, link and content.
#[test]
fn images_unpack_to_the_same_trees_as_under_overlayfs() -> Result<()> {
    for image in [Image::Busybox, Image::Redis] {
        let tree = |snapshotter: &str| {
            node().sh(&format!(
                "mkdir -p /mnt/{snapshotter}
                 ctr images mount --snapshotter {snapshotter} {} /mnt/{snapshotter} > /dev/null
                 cd /mnt/{snapshotter}
                 find . -printf '%p %y %#m %U:%G %l\\n' | sort
                 find . -type f -print0 | sort -z | xargs -0 sha256sum
                 cd /; umount /mnt/{snapshotter}
                 ctr snapshots --snapshotter {snapshotter} rm /mnt/{snapshotter}",
                image.reference()
            ))
        };
        let (ours, overlayfs) = (tree("godwit")?, tree("overlayfs")?);
        assert!(ours == overlayfs, "{image:?}\n{ours}\n---\n{overlayfs}");
        assert!(ours.lines().count() > 50);
        assert_eq!(ours.contains("./etc/issue"), image == Image::Busybox);
    }
    Ok(())
}

#[test]
fn containers_write_to_layers_of_their_own() -> Result<()> {
    let before = (list()?.len(), directories()?);
    let one = Container::start("one", Image::Busybox, OURS, "rm /etc/passwd; sleep 600")?;
    let two = Container::start("two", Image::Busybox, &OURS[..2], "echo two > /mark; sleep 600")?;
    assert_eq!(two.exec("e", "cat /mark; wc -l < /etc/passwd")?.lines().next(), Some("two"));
    wait_until("the file is removed", SOON, || {
        Ok(one.exec("e", "test ! -e /etc/passwd && test ! -e /mark").is_ok())
    })?;
    assert_eq!(list()?.len(), before.0 + 2);
    drop((one, two));
    wait_until("their layers are gone", SOON, || Ok((list()?.len(), directories()?) == before))
}

#[test]
fn containers_go_on_while_the_daemon_is_away_and_after() -> Result<()> {
    let container = Container::start("steady", Image::Busybox, OURS, "sleep 600")?;
    let before = list()?;
    node().kill_daemon()?;
    let away = while_the_daemon_is_away(&container);
    node().start_daemon()?;
    away?;
    // containerd's connection to a snapshotter waits up to 3 s before it tries again.
    wait_until("containerd reaches the daemon again", SOON, || Ok(list().is_ok()))?;
    assert_eq!(list()?, before);
    assert_eq!(container.exec("back", "cat /while-away")?.trim(), "written");
    let later = Container::start("later", Image::Busybox, OURS, "sleep 600")?;
    assert!(container.is_running()? && later.is_running()?);
    // In the order in which systemd stops them, and in the order in which it starts them.
    node().stop_containerd()?;
    node().stop_daemon()?;
    node().start_daemon()?;
    node().start_containerd()?;
    assert_eq!(list()?.len(), before.len() + 1);
    assert!(container.is_running()? && later.is_running()?);
    Ok(())
}

fn while_the_daemon_is_away(container: &Container) -> Result<()> {
    container.exec("away", "echo written > /while-away; sync")?;
    let overlayfs = Container::start("plain", Image::Busybox, &[], "sleep 600")?;
    ensure!(overlayfs.is_running()?, "plain containerd does not need the daemon");
    let failed = Container::start("failing", Image::Busybox, OURS, "sleep 600");
    ensure!(failed.is_err(), "a layer cannot be made without the daemon");
    Ok(())
}

/// Method: containerd's client copies the layers with other owners, and the container has a layer
/// over the copy. All of it is looked at from both sides.
#[test]
fn a_container_in_a_user_namespace_has_an_image_of_its_own_roots() -> Result<()> {
    let ctr = Containerd::of_suite().ctr();
    let ids = ["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"];
    let files = "/ /bin/busybox /tmp /written /etc/issue";
    let script = "touch /written; chown 7:8 /etc/issue; sleep 600";
    for (id, shim) in [("mapped", OURS), ("mapped-runc", &OURS[..2])] {
        let image = [Image::Busybox.reference(), id, "sh", "-c", script];
        node().ok(&[&[&ctr, "run", "-d"][..], shim, &ids, &image].concat())?;
        let container = Container { id: id.to_owned() };
        let look = format!("cat /proc/self/uid_map /proc/self/gid_map; stat -c %u:%g {files}");
        let inside = "0 100000 65536\n0 200000 65536\n0:0\n0:0\n0:0\n0:0\n7:8";
        wait_until("its files are its root's", SOON, || {
            let seen = container.exec("look", &look).unwrap_or_default();
            Ok(seen.split_whitespace().eq(inside.split_whitespace()))
        })
        .with_context(|| container.exec("look", &look).unwrap_or_default())?;
        let strangers = "find / -xdev \\( ! -user 0 -o ! -group 0 \\) ! -path /etc/issue ! -path /proc ! -path /sys";
        let strangers = container.exec("strangers", strangers)?;
        ensure!(strangers.is_empty(), "not its root's: {strangers}");
        let root = format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}/rootfs");
        let seen =
            node().sh(&format!("cd {root}; for f in {files}; do stat -c %u:%g .$f; done"))?;
        let root = "100000:200000\n";
        assert_eq!(seen, format!("{}100007:200008\n", root.repeat(4)));
    }
    Ok(())
}

/// Method: the options of its mount are longer than the page that mount(2) takes, so runtimes
/// shorten them.
#[test]
fn a_container_runs_on_128_layers() -> Result<()> {
    images::import(node(), Image::Deep, "godwit")?;
    let mounts = snapshots(&["ls"])?.lines().count();
    ensure!(mounts > images::DEEP_LAYERS, "{mounts} snapshots");
    for (id, options) in [("deep", OURS), ("deep-runc", &OURS[..2])] {
        let container = Container::start(id, Image::Deep, options, "sleep 600")?;
        let seen = container.exec("look", "ls /layers | wc -l; touch /layers/new")?;
        ensure!(seen.trim() == (images::DEEP_LAYERS - 1).to_string(), "{id} sees {seen}");
    }
    node().ok(&["ctr", "images", "rm", "--sync", Image::Deep.reference()]).map(drop)
}

#[test]
fn a_checkpoint_takes_the_writable_layer_along() -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i >> /count; sleep 0.01; done";
    let container = Container::start("kept", Image::Busybox, OURS, script)?;
    wait_until("it counts", SOON, || Ok(container.exec("c0", "test -s /count").is_ok()))?;
    node().ok(&["ctr", "c", "checkpoint", "--rw", "--task", "--image", "kept", "kept-image"])?;
    drop(container);
    node().ok(&["ctr", "c", "restore", "--rw", "--live", "kept", "kept-image"])?;
    let restored = Container { id: "kept".into() };
    restored.exec("c1", "until [ $(wc -l < /count) -gt 10 ]; do sleep 0.1; done")?;
    let text = restored.exec("c2", "cat /count")?;
    let counts: Vec<u64> = text.lines().map(str::parse).collect::<Result<_, _>>()?;
    assert!(counts.len() > 10 && counts.iter().copied().eq(1..=counts.len() as u64), "{counts:?}");
    node().ok(&["ctr", "images", "rm", "--sync", "kept-image"]).map(drop)
}

/// Method: last by name, since it takes the images away.
#[test]
fn zz_removing_the_images_removes_every_layer() -> Result<()> {
    for image in [Image::Redis, Image::Busybox] {
        node().ok(&["ctr", "images", "rm", "--sync", image.reference()])?;
    }
    wait_until("no snapshot is left", SOON, || Ok(list()?.is_empty()))?;
    wait_until("no directory is left", SOON, || Ok(directories()? == 0))
}
