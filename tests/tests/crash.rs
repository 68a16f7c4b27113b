//! The daemon is killed at any time: what containerd lists, what the daemon knows and what lies on
//! the disk agree when it is there again, containers do not notice, and nothing is left.
//!
//! Every kill is SIGKILL, of a real daemon on a real node.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::random::Random;
use godwit_tests::steps::Steps;
use godwit_tests::workload::Container;
use godwit_tests::{Bed, BedOptions, Node, neighbours};

use state::{Held, agrees, collect_garbage, held, volumes_agree};

#[path = "crash/state.rs"]
mod state;

/// The node that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let bed = Bed::start(&BedOptions::nodes(1)).expect("the test node starts");
    bed.import(Image::Busybox, "godwit").expect("an image can be imported");
    bed
});

/// How often the daemon is killed under load.
const KILLS: usize = 12;
/// Longest time between the end of the checks and the next kill.
const CALM_MAX: Duration = Duration::from_millis(1500);
const SOON: Duration = Duration::from_secs(15);

fn node() -> &'static Node {
    BED.node(0)
}

/// What the workers and the killer share.
#[derive(Default)]
struct Load {
    stop: AtomicBool,
    /// Grows when the daemon is about to be killed and again when containerd has found the next
    /// one: odd in between.
    disturbances: AtomicU64,
    /// Held by each worker, so that none works while the state is looked at.
    gate: RwLock<()>,
    /// What failed although the daemon was there all along.
    failed: Mutex<Vec<String>>,
    done: AtomicU64,
    /// What failed because of a kill.
    cut_short: AtomicU64,
}

impl Load {
    /// Works until it is stopped. Whatever a kill falls into may fail, and nothing else.
    fn work(&self, mut act: impl FnMut(u64) -> Result<()>) {
        for number in 0.. {
            let before = self.disturbances.load(Ordering::SeqCst);
            let done = {
                let _open = self.gate.read().unwrap_or_else(PoisonError::into_inner);
                if self.stop.load(Ordering::SeqCst) {
                    return;
                }
                act(number)
            };
            let is_calm =
                before.is_multiple_of(2) && before == self.disturbances.load(Ordering::SeqCst);
            match done {
                Ok(()) => drop(self.done.fetch_add(1, Ordering::SeqCst)),
                Err(error) if is_calm => {
                    let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                    failed.push(format!("{error:#}"));
                }
                Err(_) => drop(self.cut_short.fetch_add(1, Ordering::SeqCst)),
            }
        }
    }
}

/// An image of three layers comes and goes.
fn images_come_and_go(_number: u64) -> Result<()> {
    images::import(node(), Image::Redis, "godwit")?;
    node().ok(&["ctr", "images", "rm", "--sync", Image::Redis.reference()]).map(drop)
}

/// Layers are made of the image's own, as an unpacker makes them.
fn layers_come_and_go(base: &str, number: u64) -> Result<()> {
    let ctr = "ctr snapshots --snapshotter godwit";
    node()
        .sh(&format!(
            "{ctr} prepare work-{number} {base} > /dev/null
             {ctr} commit layer-{number} work-{number}
             {ctr} prepare over-{number} layer-{number} > /dev/null
             {ctr} rm over-{number}
             {ctr} rm layer-{number}"
        ))
        .map(drop)
}

fn images_are_mounted(number: u64) -> Result<()> {
    let (image, at) = (Image::Busybox.reference(), format!("/mnt/look-{number}"));
    node()
        .sh(&format!(
            "mkdir -p {at}
             ctr images mount --snapshotter godwit {image} {at} > /dev/null
             test -x {at}/bin/sh
             ctr images unmount --snapshotter godwit --rm {at} > /dev/null
             rmdir {at}"
        ))
        .map(drop)
}

/// Their output goes to a file: `ctr run` of containerd 1.7 closes the FIFO of a container that has
/// ended, read or not.
fn containers_run_to_their_end(number: u64) -> Result<()> {
    let said = format!("/run/said-{number}");
    let log = format!("file://{said}");
    let ours =
        ["--snapshotter", "godwit", "--runtime", "io.containerd.runc.godwit.v1", "--log-uri", &log];
    let tail = [
        Image::Busybox.reference(),
        &format!("short-{number}"),
        "sh",
        "-c",
        "echo done > /mark; cat /mark",
    ];
    node().ok(&[&["ctr", "run", "--rm"][..], &ours, &tail].concat())?;
    let said = node().sh(&format!("cat {said}; rm {said}"))?;
    ensure!(said == "done\n", "a container said {said:?}");
    Ok(())
}

fn volumes_come_and_go(number: u64) -> Result<()> {
    node()
        .sh(&format!(
            "godwit volume create tree-{number}
             godwit volume create block-{number} --kind block --size 16M
             mkdir -p /tmp/imported
             head -c 100000 /dev/urandom > /tmp/imported/file
             digest=$(godwit volume import /tmp/imported)
             godwit volume rm $digest
             godwit volume rm tree-{number}
             godwit volume rm block-{number}"
        ))
        .map(drop)
}

/// A container that counts in its own layer and on a volume.
struct Steady {
    name: &'static str,
    pid: String,
    counted: u64,
}

impl Steady {
    fn start(name: &'static str, options: &[&str]) -> Result<Self> {
        node().ok(&[&["godwit", "volume", "create", name], options].concat())?;
        let script = "i=0; while :; do i=$((i+1)); echo $i > /n; mv /n /count; cp /count /data/count; usleep 20000; done";
        Container::new(name, Image::Busybox)
            .volume(name, "/data", "rw")
            .command(&["sh", "-c", script])
            .start(node())?;
        Ok(Self { name, pid: pid_of(name)?, counted: 0 })
    }

    /// It is the same process, and has gone on counting.
    fn goes_on(&mut self) -> Result<()> {
        ensure!(pid_of(self.name)? == self.pid, "{} was started again", self.name);
        let read = ["ctr", "tasks", "exec", "--exec-id", "look", self.name, "cat", "/count"];
        let counted = node().ok(&read)?.trim().parse()?;
        ensure!(counted > self.counted, "{} stands still at {counted}", self.name);
        self.counted = counted;
        Ok(())
    }

    fn remove(self) -> Result<()> {
        node().ok(&["ctr", "tasks", "rm", "-f", self.name])?;
        node().ok(&["ctr", "containers", "rm", self.name])?;
        node().ok(&["godwit", "volume", "rm", self.name]).map(drop)
    }
}

fn pid_of(name: &str) -> Result<String> {
    let tasks = node().ok(&["ctr", "tasks", "ls"])?;
    let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(name));
    let words: Vec<_> =
        line.with_context(|| format!("{name} has no task"))?.split_whitespace().collect();
    ensure!(words.get(2) == Some(&"RUNNING"), "{name}: {words:?}");
    Ok(words[1].to_owned())
}

/// The one committed snapshot of the image's one layer.
fn base() -> Result<String> {
    let list = node().ok(&["ctr", "snapshots", "--snapshotter", "godwit", "ls"])?;
    let line = list
        .lines()
        .find(|line| line.trim_end().ends_with("Committed") && line.starts_with("sha256:"));
    let name = line.and_then(|line| line.split_whitespace().next());
    Ok(name.context("the image has a layer")?.to_owned())
}

/// Method: workers prepare, commit, mount and remove without pause, by every kind of client, while
/// the daemon is killed and started again. What they left is removed by the same clients in the
/// end; then all is as it was before.
#[test]
fn a_daemon_killed_at_random_under_load_loses_and_leaks_nothing() -> Result<()> {
    let mut random = Random::of_run()?;
    let base = base()?;
    images_come_and_go(0)?;
    collect_garbage(node())?;
    let before = held(node())?;
    let mut steady = [
        Steady::start("steady-tree", &[])?,
        Steady::start("steady-block", &["--kind", "block", "--size", "16M"])?,
    ];
    let load = Load::default();
    std::thread::scope(|scope| {
        scope.spawn(|| load.work(images_come_and_go));
        scope.spawn(|| load.work(|number| layers_come_and_go(&base, number)));
        scope.spawn(|| load.work(images_are_mounted));
        scope.spawn(|| load.work(containers_run_to_their_end));
        scope.spawn(|| load.work(volumes_come_and_go));
        let killed = (0..KILLS).try_for_each(|kill| {
            std::thread::sleep(random.shorter(CALM_MAX));
            let begun = Instant::now();
            load.disturbances.fetch_add(1, Ordering::SeqCst);
            node().kill_daemon()?;
            neighbours::start(node())?;
            load.disturbances.fetch_add(1, Ordering::SeqCst);
            let reached = begun.elapsed();
            let _shut = load.gate.write().unwrap_or_else(PoisonError::into_inner);
            let unknown = agrees(node()).with_context(|| format!("after kill {kill}"))?;
            eprintln!("kill {kill}: back after {reached:?}, {unknown} snapshots to be collected");
            steady.iter_mut().try_for_each(Steady::goes_on)
        });
        load.stop.store(true, Ordering::SeqCst);
        killed
    })?;
    let failed = load.failed.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(failed.is_empty(), "failed while the daemon was there: {failed:#?}");
    let [done, cut_short] = [&load.done, &load.cut_short].map(|one| one.load(Ordering::SeqCst));
    eprintln!("{done} rounds of work were done, {cut_short} were cut short");
    ensure!(done > 0 && cut_short > 0, "no load, or no kill that met it");
    steady.into_iter().try_for_each(Steady::remove)?;
    clear_up()?;
    ensure!(agrees(node())? == 0, "snapshots are left that containerd does not know");
    is_as_before(&before)
}

/// Removes what clients that were interrupted left, by the means of their users.
fn clear_up() -> Result<()> {
    node()
        .sh(&format!(
            "for id in $(ctr containers ls -q); do ctr tasks rm -f $id 2> /dev/null || :; ctr containers rm $id; done
             for at in $(cut -d' ' -f2 /proc/mounts | grep ^/mnt/ || :); do umount $at; done
             for id in $(ctr leases ls -q); do ctr leases rm --sync $id; done
             ctr images rm --sync {} 2> /dev/null || :
             for name in $(godwit volume ls | awk 'NR > 1 {{print $1}}'); do godwit volume rm $name; done
             rm -rf /mnt/look-*",
            Image::Redis.reference()
        ))
        .context("clear up")?;
    // Children before their parents.
    node().sh(
        "for round in 1 2 3; do
             for name in $(ctr snapshots --snapshotter godwit ls | awk 'NR > 1 && $1 !~ /^sha256:/ {print $1}'); do
                 ctr snapshots --snapshotter godwit rm $name 2> /dev/null || :
             done
         done",
    )?;
    collect_garbage(node())
}

fn is_as_before(before: &Held) -> Result<()> {
    wait_until("all is as before", SOON, || Ok(held(node())? == *before)).with_context(|| {
        let after = held(node()).unwrap_or_default();
        let more: Vec<_> = after.difference(before).collect();
        let less: Vec<_> = before.difference(&after).collect();
        format!("left: {more:#?}; gone: {less:#?}")
    })
}

/// Scripts of an operation that is tried again and again; `$n` is another number each time.
struct Operation {
    name: &'static str,
    before: &'static str,
    act: &'static str,
    after: &'static str,
    /// Steps that it has at least: fewer, and the kills would not be where they should be.
    steps_min: usize,
}

const OF_SNAPSHOTS: [Operation; 6] = [
    Operation {
        name: "prepare",
        before: "",
        act: "$ctr prepare step-$n $base > /dev/null",
        after: "$ctr rm step-$n",
        steps_min: 4,
    },
    Operation {
        name: "view",
        before: "",
        act: "$ctr view step-$n $base > /dev/null",
        after: "$ctr rm step-$n",
        steps_min: 4,
    },
    // containerd hands over those that begin so.
    Operation {
        name: "label",
        before: "$ctr prepare step-$n $base > /dev/null",
        act: "$ctr label step-$n containerd.io/snapshot/step=$n > /dev/null",
        after: "$ctr rm step-$n",
        steps_min: 1,
    },
    Operation {
        name: "commit",
        before: "$ctr prepare step-$n $base > /dev/null
                 upper=$($ctr mounts /mnt step-$n | sed 's/.*upperdir=\\([^,]*\\).*/\\1/'); echo $n > $upper/row",
        act: "$ctr commit layer-$n step-$n",
        after: "$ctr rm layer-$n || $ctr rm step-$n",
        steps_min: 2,
    },
    Operation {
        name: "remove",
        before: "$ctr prepare step-$n $base > /dev/null",
        act: "$ctr rm step-$n; ctr content prune references",
        after: "",
        steps_min: 4,
    },
    // containerd asks for it when something was removed.
    Operation {
        name: "clean up",
        before: "$ctr prepare step-$n $base > /dev/null; mkdir -p /var/lib/godwit/snapshots/fs/999999/fs",
        act: "$ctr rm step-$n; ctr content prune references; test ! -e /var/lib/godwit/snapshots/fs/999999",
        after: "",
        steps_min: 6,
    },
];

/// Of a container that runs, with a volume, as `stored`.
const OF_STORE: [Operation; 2] = [
    Operation {
        name: "take snapshots",
        before: "",
        act: "godwit snapshot create stored > /dev/null",
        after: DELETE_SNAPSHOTS,
        steps_min: 4,
    },
    // First what is most of a pack, so that the rest of it is copied elsewhere; then all.
    Operation {
        name: "delete snapshots and sweep",
        before: "head -c 8000000 /dev/urandom > /var/lib/godwit/volumes/stored/data/rows
                 godwit snapshot create stored > /dev/null",
        act: DELETE_SNAPSHOTS,
        after: DELETE_SNAPSHOTS,
        steps_min: 12,
    },
];

const DELETE_SNAPSHOTS: &str = "for subject in ^volume ^.; do
         for id in $(godwit snapshot list | awk -v subject=$subject 'NR > 1 && $2 ~ subject {print $1}'); do
             godwit snapshot delete $id
         done
         godwit sweep
     done";

const OF_VOLUMES: [Operation; 4] = [
    Operation {
        name: "create a tree",
        before: "",
        act: "godwit volume create step-$n",
        after: "godwit volume rm step-$n",
        steps_min: 8,
    },
    Operation {
        name: "create a block volume",
        before: "",
        act: "godwit volume create step-$n --kind block --size 16M",
        after: "godwit volume rm step-$n",
        steps_min: 8,
    },
    Operation {
        name: "remove a volume",
        before: "godwit volume create step-$n; echo 1 > /var/lib/godwit/volumes/step-$n/data/row",
        act: "godwit volume rm step-$n",
        after: "godwit volume rm step-$n",
        steps_min: 5,
    },
    Operation {
        name: "import and remove content",
        before: "mkdir -p /tmp/step; echo $n > /tmp/step/row",
        act: "id=$(godwit volume import /tmp/step); godwit volume verify $id; godwit volume rm $id",
        after: "for one in $(godwit volume ls | grep -o 'sha256:[0-9a-f]*'); do godwit volume rm $one; done",
        steps_min: 10,
    },
];

/// No operation has as many steps.
const STEPS_MAX: usize = 60;

impl Operation {
    fn script(&self, script: &str, number: usize) -> Result<String> {
        let base = base()?;
        Ok(format!("n={number}; base={base}; ctr='ctr snapshots --snapshotter godwit'\n{script}"))
    }

    /// Kills the daemon before each step, and calls `check` when it is there again.
    fn killed_before_every_step(
        &self,
        steps: &Steps<'_>,
        check: impl Fn() -> Result<()>,
    ) -> Result<()> {
        for number in 1..=STEPS_MAX {
            node().sh(&self.script(self.before, number)?)?;
            let act = self.script(self.act, number)?;
            let act = node().command(&["sh", "-e", "-c", &act]);
            let was_killed = steps.killed_before(number, &act)?;
            if !was_killed {
                // What it has counted by now is not the next one's.
                node().kill_daemon()?;
            }
            neighbours::start(node())?;
            check().with_context(|| format!("{}, killed before step {number}", self.name))?;
            // It may or may not have happened.
            node().run(&["sh", "-c", &self.script(self.after, number)?])?;
            if !was_killed {
                eprintln!("{}: {} steps", self.name, number - 1);
                ensure!(number > self.steps_min, "{} has {} steps", self.name, number - 1);
                return Ok(());
            }
        }
        bail!("{} has more than {STEPS_MAX} steps", self.name)
    }
}

#[test]
fn a_daemon_killed_before_any_step_leaves_snapshots_that_containerd_knows() -> Result<()> {
    collect_garbage(node())?;
    let before = held(node())?;
    let steps = Steps::install(node())?;
    node().stop_daemon()?;
    neighbours::start(node())?;
    for operation in OF_SNAPSHOTS {
        operation.killed_before_every_step(&steps, || agrees(node()).map(drop))?;
    }
    collect_garbage(node())?;
    is_as_before(&before)
}

#[test]
fn a_daemon_killed_before_any_step_leaves_whole_volumes_or_none() -> Result<()> {
    let before = held(node())?;
    let steps = Steps::install(node())?;
    node().stop_daemon()?;
    node().start_daemon()?;
    for operation in OF_VOLUMES {
        operation.killed_before_every_step(&steps, || volumes_agree(node()))?;
    }
    is_as_before(&before)
}

#[test]
fn a_daemon_killed_before_any_step_leaves_a_whole_store() -> Result<()> {
    collect_garbage(node())?;
    let before = held(node())?;
    let mut stored = Steady::start("stored", &[])?;
    let steps = Steps::install(node())?;
    node().stop_daemon()?;
    // Or captures by schedule would keep the sweep waiting.
    node().configure("[cache]\nschedule = false")?;
    node().start_daemon()?;
    for operation in OF_STORE {
        operation.killed_before_every_step(&steps, || node().ok(&["godwit", "check"]).map(drop))?;
    }
    stored.goes_on()?;
    stored.remove()?;
    node().configure("")?;
    collect_garbage(node())?;
    is_as_before(&before)
}

/// Method: with the same configuration, and with sockets and ports of its own, so that the state
/// alone can tell.
#[test]
fn a_second_daemon_on_the_same_state_is_refused_and_the_first_works_on() -> Result<()> {
    let sockets = "stat -c '%n %i' /run/godwit/*.sock";
    let before = (held(node())?, node().sh(sockets)?);
    node().sh("sed -e '/^listen/d; s|^run_dir.*|run_dir = \"/run/second\"|' /etc/godwit/godwit.toml > /etc/godwit/second.toml")?;
    for configuration in ["/etc/godwit/godwit.toml", "/etc/godwit/second.toml"] {
        let refused = node().run(&["godwit-snapshotter", "--config", configuration])?;
        ensure!(refused.code == 1, "{refused}");
        let said = "/var/lib/godwit/snapshots are in use by another daemon";
        ensure!(refused.stderr.contains(said), "{refused}");
    }
    ensure!((held(node())?, node().sh(sockets)?) == before, "something has changed");
    ensure!(!node().path("/run/second").exists(), "the second has made its sockets");
    layers_come_and_go(&base()?, 0)?;
    volumes_come_and_go(0)?;
    agrees(node()).map(drop)
}

/// Method: the state is on a small file system of its own, which a file fills; long keys fill the
/// database.
#[test]
fn a_full_disk_refuses_new_snapshots_and_harms_none() -> Result<()> {
    const MANY: usize = 2000;
    let bed = Bed::start(&BedOptions::nodes(1))?;
    let node = bed.node(0);
    node.stop_containerd()?;
    node.stop_daemon()?;
    node.sh("mount -t tmpfs -o size=64m tmpfs /var/lib/godwit")?;
    node.start_daemon()?;
    node.start_containerd()?;
    let snapshots = |words: &[&str]| {
        node.command(&[&["ctr", "snapshots", "--snapshotter", "godwit"], words].concat()).run()
    };
    let key = |number: usize| format!("{number:03900}");
    let listed = || Ok::<_, anyhow::Error>(snapshots(&["ls"])?.stdout.matches("Active").count());
    let fill = || node.sh("! cat /dev/zero > /var/lib/godwit/filler").map(drop);
    ensure!(snapshots(&["prepare", &key(0)])?.succeeded());
    fill()?;
    let mut made = 1;
    let refused = loop {
        let prepared = snapshots(&["prepare", &key(made)])?;
        if !prepared.succeeded() {
            break prepared.stderr;
        }
        made += 1;
        ensure!(made < MANY, "the disk has room");
    };
    ensure!(refused.contains("cannot keep room"), "after {made}: {refused}");
    ensure!(listed()? == made);
    // What there is can go, and once there is room again, more can come.
    ensure!(snapshots(&["rm", &key(0)])?.succeeded());
    node.sh("rm /var/lib/godwit/filler")?;
    ensure!(snapshots(&["prepare", &key(0)])?.succeeded());
    fill()?;
    node.kill_daemon()?;
    node.start_daemon()?;
    ensure!(listed()? == made);
    ensure!(snapshots(&["rm", &key(0)])?.succeeded());
    node.sh("rm /var/lib/godwit/filler")?;
    ensure!(snapshots(&["prepare", &key(made)])?.succeeded());
    ensure!(listed()? == made);
    node.stop_containerd()?;
    node.kill_daemon()
}
