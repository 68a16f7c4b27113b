//! Many containers, killed in every way and at any time, and nothing of them is left.
//!
//! Method: on a node of each containerd, in rounds: containers are started, processes added,
//! containerd is killed and started again while some of them end, and then each goes in a way of
//! its own: asked, killed, with its shim killed, or by itself. Beside them a pod stays that others
//! join and leave, whose shim must not grow. The seed is printed and taken back from `GODWIT_SEED`.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::random::Random;
use godwit_tests::{Bed, BedOptions, Containerd, Node, need};

const RUNTIME: &str = "io.containerd.runc.godwit.v1";
const SHIM: &str = "containerd-shim-godwit-v1";
/// Containers of each node are this many, in rounds with a restart of containerd between two.
const ROUNDS: usize = 6;
const CONTAINERS_PER_ROUND: usize = 17;
/// Threads that work on one node at a time.
const WORKERS: usize = 3;
/// How long what was removed may take to vanish.
const SETTLE: Duration = Duration::from_secs(20);
/// How much an idle pod's shim may grow by the others that came and went, in KiB.
const GROWTH_KIB_MAX: u64 = 2048;

/// What a node holds, one thing a line. FIFOs are ctr's, which does not remove those of a task
/// whose shim was killed.
fn holdings(node: &Node) -> Result<BTreeSet<String>> {
    let text = node.sh(
        "ps -e -o args= | grep -v -e '^ps ' -e '^sh -e' -e '^grep ' -e '^sed ' -e '^\\[' | sed 's/^/process /'
         cut -d' ' -f2 /proc/mounts | sed 's/^/mount /'
         find /sys/fs/cgroup -mindepth 2 -type d | sed 's/^/group /'
         find /run/containerd -mindepth 1 -path /run/containerd/fifo -prune -o -print | sed 's/^/file /'
         ls -d /var/lib/containerd/io.containerd.runtime.v2.task/*/* 2> /dev/null | sed 's/^/file /'
         ctr snapshots ls | sed 's/ .*//; s/^/snapshot /'",
    )?;
    Ok(text.lines().map(str::to_owned).collect())
}

/// Descriptors, threads, children and resident memory in KiB of a shim.
fn load_of(node: &Node, shim: &str) -> Result<[u64; 4]> {
    let text = node.sh(&format!(
        "ls /proc/{shim}/fd | wc -l; ls /proc/{shim}/task | wc -l; ps --ppid {shim} -o pid= | wc -l
         sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/{shim}/status"
    ))?;
    let numbers =
        text.lines().map(|line| Ok(line.trim().parse()?)).collect::<Result<Vec<u64>>>()?;
    numbers.try_into().ok().context("four numbers")
}

/// One container of a round.
struct Container<'a> {
    node: &'a Node,
    id: String,
    joins_pod: bool,
}

impl Container<'_> {
    fn start(&self, random: &mut Random) -> Result<()> {
        let script = match random.below(4) {
            0 => "exit 3".to_owned(),
            1 => format!("sleep 0.{}; exit 4", random.below(10)),
            2 => "trap '' TERM; sleep 600 & (sleep 600 &); while :; do sleep 0.2; done".to_owned(),
            _ => "seq 1 1000; exec sleep 600".to_owned(),
        };
        let mut words = vec!["ctr", "run", "-d", "--runtime", RUNTIME];
        if self.joins_pod {
            words.extend(["--annotation", "io.kubernetes.cri.sandbox-id=stays"]);
        }
        words.extend([Image::Busybox.reference(), &self.id, "sh", "-c", &script]);
        self.node.ok(&words).map(drop)
    }

    /// Adds processes, which may fail: the container may have ended.
    fn exec(&self, random: &mut Random) -> Result<()> {
        for number in 0..random.below(3) {
            let script = ["true", "exit 5", "sleep 600 & exit 0", "sleep 600"]
                [usize::try_from(random.below(4))?];
            let exec = format!("e{number}");
            let words = [
                "timeout",
                "1",
                "ctr",
                "task",
                "exec",
                "--exec-id",
                &exec,
                &self.id,
                "sh",
                "-c",
                script,
            ];
            self.node.run(&words)?;
        }
        Ok(())
    }

    fn kill(&self, random: &mut Random) -> Result<()> {
        let id = &self.id;
        match random.below(6) {
            0 => self.node.run(&["ctr", "task", "kill", id])?,
            1 => self.node.run(&["ctr", "task", "kill", "-a", "-s", "SIGKILL", id])?,
            2 => self.node.run(&["ctr", "task", "pause", id])?,
            3 => self.node.run(&["pkill", "-KILL", "-f", &format!("{SHIM}.* -id {id} ")])?,
            4 => self.node.run(&[
                "sh",
                "-c",
                &format!("kill -9 $(ctr task ls | awk '$1 == \"{id}\" {{print $2}}')"),
            ])?,
            _ => return Ok(()),
        };
        Ok(())
    }

    fn remove(&self) -> Result<()> {
        let id = &self.id;
        wait_until(&format!("{id} is removed"), SETTLE, || {
            self.node.run(&["ctr", "task", "rm", "-f", id])?;
            let removed = self.node.run(&["ctr", "container", "rm", id])?;
            Ok(removed.succeeded() || removed.stderr.contains("not found"))
        })
    }
}

/// Does `work` on all containers, some at a time.
fn each(
    containers: &[Container<'_>],
    random: &mut Random,
    work: impl Fn(&Container<'_>, &mut Random) -> Result<()> + Sync,
) -> Result<()> {
    std::thread::scope(|scope| {
        let workers: Vec<_> = containers
            .chunks(containers.len().div_ceil(WORKERS))
            .map(|chunk| {
                let (mut random, work) = (random.split(), &work);
                scope.spawn(move || chunk.iter().try_for_each(|one| work(one, &mut random)))
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    })
}

fn soak(node: &Node, mut random: Random) -> Result<()> {
    images::import(node, Image::Busybox, "overlayfs")?;
    let stays = Container { node, id: "stays".to_owned(), joins_pod: true };
    let image = Image::Busybox.reference();
    let pod = "io.kubernetes.cri.sandbox-id=stays";
    node.ok(&[
        "ctr",
        "run",
        "-d",
        "--runtime",
        RUNTIME,
        "--annotation",
        pod,
        image,
        &stays.id,
        "sleep",
        "6000",
    ])?;
    let visitor =
        |number: usize| Container { node, id: format!("visitor-{number}"), joins_pod: true };
    let shim = node.ok(&["pgrep", "-f", &format!("{SHIM}.* -id stays ")])?.trim().to_owned();
    // Once through everything, so that what is made only once is there.
    each(&[visitor(0)], &mut random, |one, random| one.start(random))?;
    visitor(0).remove()?;
    let (before, load_before) = (holdings(node)?, load_of(node, &shim)?);

    for round in 0..ROUNDS {
        let containers: Vec<_> = (0..CONTAINERS_PER_ROUND)
            .map(|number| Container {
                node,
                id: format!("r{round}-{number}"),
                joins_pod: number % 4 == 0,
            })
            .collect();
        each(&containers, &mut random, |one, random| {
            one.start(random)?;
            one.exec(random)
        })?;
        if round + 1 < ROUNDS {
            node.kill_containerd()?;
            // Without containerd, only these ways are open.
            for _ in 0..2 {
                let id = format!("r{round}-{}", random.below(CONTAINERS_PER_ROUND as u64));
                node.run(&["pkill", "-KILL", "-f", &format!("{SHIM}.* -id {id} ")])?;
            }
            node.run(&["pkill", "-KILL", "-n", "-f", "^sleep 600$"])?;
            node.start_containerd()?;
        }
        each(&containers, &mut random, |one, random| {
            one.kill(random)?;
            one.remove()
        })?;
    }
    ensure!(node.ok(&["ctr", "task", "ls"])?.contains("stays"), "the pod that stays is gone");
    wait_until("nothing is left", SETTLE, || Ok(holdings(node)? == before)).with_context(|| {
        let after = holdings(node).unwrap_or_default();
        let more: Vec<_> = after.difference(&before).collect();
        let less: Vec<_> = before.difference(&after).collect();
        format!("left: {more:#?}; gone: {less:#?}")
    })?;
    // A thread or two may rest between two calls.
    let load = load_of(node, &shim)?;
    eprintln!(
        "{}: descriptors, threads, children, KiB: {load_before:?}, then {load:?}",
        node.name()
    );
    let [fds, threads, children, resident] = load;
    // containerd may still be about to let go of a connection.
    assert!(fds <= load_before[0] + 2 && children <= load_before[2], "{load_before:?} {load:?}");
    assert!(threads <= load_before[1].max(6), "{load_before:?} {load:?}");
    assert!(resident <= load_before[3] + GROWTH_KIB_MAX, "{load_before:?} {load:?}");
    stays.remove()?;
    wait_until("no shim is left", SETTLE, || Ok(!node.run(&["pgrep", "-f", SHIM])?.succeeded()))
}

#[test]
fn many_containers_leave_nothing() -> Result<()> {
    need::binaries(&[SHIM])?;
    let bed = Bed::start(&BedOptions::nodes(2).bare())?;
    let mut random = Random::of_run()?;
    std::thread::scope(|scope| {
        let nodes: Vec<_> = bed
            .nodes()
            .iter()
            .zip([Containerd::V1, Containerd::V2])
            .map(|(node, generation)| {
                let random = random.split();
                scope.spawn(move || {
                    node.start_containerd_of(generation)?;
                    soak(node, random).with_context(|| format!("{generation:?}"))
                })
            })
            .collect();
        nodes.into_iter().try_for_each(|node| node.join().expect("no panic"))
    })
    .inspect_err(|_| bed.show_logs())
}
