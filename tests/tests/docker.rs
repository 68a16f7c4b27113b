//! Docker as a client: `docker run --runtime io.containerd.runc.godwit.v1`, with Debian's Docker
//! beside the node's containerd.
//!
//! Each test runs three times: with containerd's own shim, with ours by its name, and with ours in
//! the place of containerd's. `GODWIT_CONTAINERD=2` chooses the newer containerd.

use std::sync::{LazyLock, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::command::{Background, wait_until};
use godwit_tests::images::{self, Image};
use godwit_tests::{Bed, BedOptions, Containerd, Finished, Node, need};

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| start().expect("the test nodes start"));
/// Docker's daemons in them. Statics are not dropped: each ends with its node.
static DOCKERDS: [Mutex<Option<Background>>; 2] = [const { Mutex::new(None) }; 2];

const SOON: Duration = Duration::from_secs(10);
/// How long Docker's daemon may take to answer.
const START: Duration = Duration::from_secs(30);
const IMAGE: &str = "busybox:test";
const NOTHING_LEFT: &str = "ls /run/containerd/io.containerd.runtime.v2.task/moby 2> /dev/null || :
    pgrep -a -f '[c]ontainerd-shim.*-namespace moby' || :";
/// Its data lies where the node has a real file system. The pods' bridge and firewall are not its
/// to change.
const DAEMON: &[&str] = &[
    "dockerd",
    "--containerd=/run/containerd/containerd.sock",
    "--data-root=/var/lib/containerd/docker",
    "--bridge=none",
    "--iptables=false",
    "--ip6tables=false",
    "--userland-proxy=false",
    "--live-restore",
    "--experimental",
];

/// A shim under test.
#[derive(Clone, Copy)]
struct Runtime {
    name: &'static str,
    tag: &'static str,
    /// Number of its node.
    place: usize,
}

const RUNC: Runtime = Runtime { name: "io.containerd.runc.v2", tag: "runc", place: 0 };
const GODWIT: Runtime = Runtime { name: "io.containerd.runc.godwit.v1", tag: "godwit", place: 0 };
/// On a node whose containerd finds our shim by the name of its own.
const GODWIT_AS_RUNC: Runtime =
    Runtime { name: "io.containerd.runc.v2", tag: "godwit-as-runc", place: 1 };

/// As docs/configuration.md says it.
const TAKE_THE_PLACE: &str = "ln -s /usr/local/bin/containerd-shim-godwit-v1 \
    /usr/local/sbin/containerd-shim-runc-v2";

fn start() -> Result<Bed> {
    need::binaries(&["containerd-shim-godwit-v1"])?;
    let generation = Containerd::of_suite();
    let bed = Bed::start(&BedOptions::nodes(2).without_daemon().generation(generation))?;
    bed.node(GODWIT_AS_RUNC.place).sh(TAKE_THE_PLACE)?;
    for (place, dockerd) in DOCKERDS.iter().enumerate() {
        let node = bed.node(place);
        images::import(node, Image::Busybox, "overlayfs")?;
        start_dockerd(node, dockerd)?;
        node.sh(&format!(
            "mkdir /mnt/image
             ctr images mount {} /mnt/image > /dev/null
             tar -C /mnt/image -c . | docker import - {IMAGE}
             ctr images unmount /mnt/image > /dev/null",
            Image::Busybox.reference()
        ))?;
    }
    Ok(bed)
}

fn start_dockerd(node: &Node, place: &Mutex<Option<Background>>) -> Result<()> {
    let mut daemon = node.spawn(DAEMON, "dockerd")?;
    wait_until("Docker's daemon answers", START, || {
        ensure!(daemon.ended()?.is_none(), "it ended: {}", daemon.log());
        Ok(node.run(&["docker", "info"])?.succeeded())
    })?;
    *place.lock().expect("no panic") = Some(daemon);
    Ok(())
}

impl Runtime {
    fn node(self) -> &'static Node {
        BED.node(self.place)
    }

    fn docker(self, words: &[&str]) -> Result<Finished> {
        self.node().run(&[&["docker"], words].concat())
    }

    fn docker_ok(self, words: &[&str]) -> Result<String> {
        self.docker(words)?.ok()
    }
}

/// A container of one test; removed when dropped.
struct Container {
    runtime: Runtime,
    name: String,
}

impl Container {
    /// Runs `script` in the background; `extra` are options of `docker run`.
    fn start(runtime: Runtime, name: &str, extra: &[&str], script: &str) -> Result<Self> {
        let name = format!("{}-{name}", runtime.tag);
        let run = ["run", "-d", "--network=none", "--runtime", runtime.name, "--name", &name];
        runtime.docker_ok(&[&run, extra, &[IMAGE, "sh", "-c", script]].concat())?;
        Ok(Self { runtime, name })
    }

    /// A field of its description, in Go's template language.
    fn inspect(&self, field: &str) -> Result<String> {
        let format = format!("--format={{{{{field}}}}}");
        Ok(self.runtime.docker_ok(&["inspect", &format, &self.name])?.trim().to_owned())
    }

    fn wait_for(&self, field: &str, value: &str) -> Result<()> {
        wait_until(&format!("{field} of {} is {value}", self.name), SOON, || {
            Ok(self.inspect(field)? == value)
        })
        .with_context(|| self.inspect("json .State").unwrap_or_default())
    }

    fn wait_for_end(&self) -> Result<String> {
        self.wait_for(".State.Status", "exited")?;
        self.inspect(".State.ExitCode")
    }

    fn exec(&self, script: &str) -> Result<Finished> {
        self.runtime.docker(&["exec", &self.name, "sh", "-c", script])
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = self.runtime.docker_ok(&["rm", "-f", &self.name]) {
            eprintln!("{}: not removed: {error:#}", self.name);
        }
    }
}

fn run_gives_output_and_exit_code(runtime: Runtime) -> Result<()> {
    let run = |extra: &[&str], words: &[&str]| {
        let run = ["run", "--rm", "--network=none", "--runtime", runtime.name];
        runtime
            .node()
            .command(&[&["docker"], &run[..], extra, &[IMAGE], words].concat())
            .stdin("typed\n")
            .run()
    };
    let finished = run(&[], &["sh", "-c", "echo out; echo err >&2; exit 5"])?;
    assert_eq!((finished.code, finished.stdout.as_str()), (5, "out\n"), "{finished}");
    assert_eq!(finished.stderr, "err\n");
    let finished = run(&["-i"], &["sh", "-c", "cat; seq 1 20000 | tail -n 1"])?;
    assert_eq!(finished.stdout, "typed\n20000\n", "{finished}");
    // Docker reads these two out of the error's text.
    let finished = run(&[], &["/no/such/program"])?;
    assert_eq!(finished.code, 127, "{finished}");
    let is_clean = finished.stderr.starts_with("docker: Error");
    assert!(is_clean && finished.stderr.contains("/no/such/program"), "{finished}");
    let finished = run(&[], &["/etc/passwd"])?;
    assert_eq!(finished.code, 126, "{finished}");
    wait_until("nothing is left", SOON, || Ok(runtime.node().sh(NOTHING_LEFT)?.is_empty()))
        .with_context(|| runtime.node().sh(NOTHING_LEFT).unwrap_or_default())
}

fn exec_gives_output_and_exit_code(runtime: Runtime) -> Result<()> {
    let healthy = ["--health-cmd=test -e /ready", "--health-interval=1s"];
    let container = Container::start(runtime, "exec", &healthy, "touch /ready; sleep 600")?;
    let finished = container.exec("echo out; echo err >&2; exit 6")?;
    assert_eq!((finished.code, finished.stdout.as_str()), (6, "out\n"), "{finished}");
    assert_eq!(finished.stderr, "err\n");
    let missing = runtime.docker(&["exec", &container.name, "/no/such/program"])?;
    assert_eq!(missing.code, 126, "{missing}");
    // Named and quoted by one line of Docker's, and by no other.
    let said = format!("{}{}", missing.stdout, missing.stderr);
    assert_eq!(said.matches("/no/such/program").count(), 2, "{missing}");
    let command = ["docker", "exec", "-i", &container.name, "sh", "-c", "cat; echo end"];
    assert_eq!(runtime.node().command(&command).stdin("typed\n").ok()?, "typed\nend\n");
    runtime.docker_ok(&["exec", "-d", &container.name, "sh", "-c", "exec sleep 607"])?;
    wait_until("it is listed", SOON, || {
        Ok(runtime.docker_ok(&["top", &container.name])?.contains("sleep 607"))
    })?;
    let terminal = format!("docker exec -t {} tty", container.name);
    let finished = runtime.node().run(&["script", "-q", "-e", "-c", &terminal, "/dev/null"])?;
    assert!(finished.stdout.contains("/dev/pts/"), "{finished}");
    container.wait_for(".State.Health.Status", "healthy")
}

fn logs_have_both_streams(runtime: Runtime) -> Result<()> {
    let script = "for i in 1 2 3; do echo out$i; echo err$i >&2; sleep 0.3; done; printf tail";
    let container = Container::start(runtime, "logs", &[], script)?;
    // Follows to the end.
    let followed = runtime.docker(&["logs", "-f", &container.name])?;
    assert_eq!(followed.stdout, "out1\nout2\nout3\ntail", "{followed}");
    assert_eq!(followed.stderr, "err1\nerr2\nerr3\n");
    assert_eq!(container.wait_for_end()?, "0");
    Ok(())
}

fn stop_and_kill_end_it(runtime: Runtime) -> Result<()> {
    let deaf = "trap '' TERM; while :; do sleep 0.1; done";
    let polite = "trap 'exit 9' TERM; trap 'echo usr' USR1; echo up; while :; do sleep 0.1; done";
    let container = Container::start(runtime, "stop", &[], polite)?;
    let says = |text: &str| {
        wait_until(text, SOON, || Ok(runtime.docker_ok(&["logs", &container.name])?.contains(text)))
    };
    says("up")?;
    runtime.docker_ok(&["kill", "-s", "USR1", &container.name])?;
    says("usr")?;
    assert_eq!(container.inspect(".State.Status")?, "running");
    runtime.docker_ok(&["stop", &container.name])?;
    assert_eq!(container.wait_for_end()?, "9");
    runtime.docker_ok(&["start", &container.name])?;
    says("up\nusr\nup")?;
    runtime.docker_ok(&["kill", &container.name])?;
    assert_eq!(container.wait_for_end()?, "137");
    assert!(!runtime.docker(&["kill", &container.name])?.succeeded());

    let container = Container::start(runtime, "deaf", &[], deaf)?;
    runtime.docker_ok(&["stop", "-t", "1", &container.name])?;
    assert_eq!(container.wait_for_end()?, "137");
    assert_eq!(runtime.docker_ok(&["wait", &container.name])?.trim(), "137");
    Ok(())
}

fn statistics_and_limits(runtime: Runtime) -> Result<()> {
    let container = Container::start(runtime, "stats", &["-m", "64m"], "sleep 600 & sleep 600")?;
    let format = "--format={{.PIDs}} {{.MemUsage}}";
    let stats = || runtime.docker_ok(&["stats", "--no-stream", format, &container.name]);
    let said = stats()?;
    assert!(said.starts_with("3 ") || said.starts_with("2 "), "{said}");
    assert!(said.trim().ends_with("/ 64MiB") && !said.contains(" 0B /"), "{said}");
    runtime.docker_ok(&["update", "-m", "96m", "--memory-swap", "96m", &container.name])?;
    assert!(stats()?.trim().ends_with("/ 96MiB"));
    runtime.docker_ok(&["pause", &container.name])?;
    assert_eq!(container.inspect(".State.Status")?, "paused");
    assert!(!container.exec("true")?.succeeded());
    runtime.docker_ok(&["unpause", &container.name])?;
    assert!(container.exec("true")?.succeeded());
    Ok(())
}

fn too_much_memory_is_told(runtime: Runtime) -> Result<()> {
    let limit = ["-m", "16m", "--memory-swap", "16m"];
    let script = "exec dd if=/dev/zero of=/dev/null bs=64M count=1";
    let container = Container::start(runtime, "oom", &limit, script)?;
    assert_eq!(container.wait_for_end()?, "137");
    // The news of it comes to Docker beside that of the exit.
    container.wait_for(".State.OOMKilled", "true")
}

fn restart_policies_hold(runtime: Runtime) -> Result<()> {
    let twice = Container::start(runtime, "twice", &["--restart=on-failure:2"], "exit 3")?;
    let always = Container::start(runtime, "always", &["--restart=always"], "sleep 600")?;
    let pid = always.inspect(".State.Pid")?;
    runtime.node().ok(&["kill", "-KILL", &pid])?;
    always.wait_for(".RestartCount", "1")?;
    always.wait_for(".State.Status", "running")?;
    assert_ne!(always.inspect(".State.Pid")?, pid);
    assert!(always.exec("true")?.succeeded());
    twice.wait_for(".RestartCount", "2")?;
    assert_eq!(twice.wait_for_end()?, "3");
    runtime.docker_ok(&["stop", "-t", "0", &always.name])?;
    assert_eq!(always.wait_for_end()?, "137");
    Ok(())
}

fn events_come_in_order(runtime: Runtime) -> Result<()> {
    let begun = runtime.node().ok(&["date", "+%s.%N"])?.trim().to_owned();
    let container = Container::start(runtime, "events", &[], "sleep 600")?;
    assert!(container.exec("true")?.succeeded());
    runtime.docker_ok(&["pause", &container.name])?;
    runtime.docker_ok(&["unpause", &container.name])?;
    runtime.docker_ok(&["kill", &container.name])?;
    let of_it = format!("container={}", container.name);
    drop(container);
    let until = runtime.node().ok(&["date", "+%s.%N"])?.trim().to_owned();
    let words = ["events", "--since", &begun, "--until", &until, "--filter", &of_it];
    let events = runtime.docker_ok(&[&words[..], &["--format={{.Action}}"]].concat())?;
    // With the command of an exec, after a colon.
    let actions: Vec<_> = events.lines().filter_map(|line| line.split(':').next()).collect();
    let expected = [
        "create",
        "start",
        "exec_create",
        "exec_start",
        "exec_die",
        "pause",
        "unpause",
        "kill",
        "die",
        "destroy",
    ];
    assert_eq!(actions, expected, "{events}");
    Ok(())
}

/// Method: one container ends while the daemon is away, one lives through it.
fn containers_outlive_dockers_daemon(runtime: Runtime) -> Result<()> {
    let lives = Container::start(runtime, "lives", &[], "while :; do echo tick; sleep 0.1; done")?;
    let ends = Container::start(runtime, "ends", &[], "sleep 2; exit 8")?;
    let pid = lives.inspect(".State.Pid")?;
    let ending = ends.inspect(".State.Pid")?;
    let dockerd = &DOCKERDS[runtime.place];
    let daemon = dockerd.lock().expect("no panic").take().context("no daemon")?;
    daemon.signal(nix::sys::signal::Signal::SIGKILL)?;
    drop(daemon);
    wait_until("it ends while the daemon is away", SOON, || {
        Ok(!runtime.node().run(&["kill", "-0", &ending])?.succeeded())
    })?;
    runtime.node().sh("rm -f /run/docker.pid /var/run/docker.pid")?;
    start_dockerd(runtime.node(), dockerd)?;
    assert_eq!(lives.inspect(".State.Pid")?, pid);
    assert_eq!(ends.wait_for_end()?, "8");
    assert_eq!(lives.exec("exit 4")?.code, 4);
    let ticks =
        || Ok::<_, anyhow::Error>(runtime.docker_ok(&["logs", &lives.name])?.lines().count());
    let before = ticks()?;
    wait_until("it is logged on", SOON, || Ok(ticks()? > before))?;
    runtime.docker_ok(&["stop", "-t", "0", &lives.name])?;
    assert_eq!(lives.wait_for_end()?, "137");
    Ok(())
}

/// Method: a count in memory goes on from where it was. Docker passes on that the container is to
/// end with its checkpoint for the name of containerd's shim alone. By its own name ours does not
/// learn of it: the container goes on, and is set back.
fn a_checkpoint_comes_back(runtime: Runtime) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
    let container = Container::start(runtime, "checkpoint", &[], script)?;
    let numbers = || -> Result<Vec<u32>> {
        let text = runtime.docker_ok(&["logs", &container.name])?;
        Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
    };
    wait_until("it counts", SOON, || Ok(numbers()?.len() > 5))?;
    runtime.docker_ok(&["checkpoint", "create", &container.name, "point"])?;
    let goes_on = runtime.name == GODWIT.name;
    if goes_on {
        let then = numbers()?.len();
        wait_until("it goes on", SOON, || Ok(numbers()?.len() > then))?;
        runtime.docker_ok(&["kill", &container.name])?;
    }
    assert_eq!(container.wait_for_end()?, "137");
    let before = numbers()?.len();
    // Docker uploads the checkpoint again, and fails where the first copy was not collected yet.
    runtime.node().ok(&["ctr", "-n", "moby", "content", "prune", "references"])?;
    runtime.docker_ok(&["start", "--checkpoint", "point", &container.name])?;
    wait_until("it counts on", SOON, || Ok(numbers()?.len() > before + 5))?;
    let all = numbers()?;
    let set_back = all.windows(2).filter(|pair| pair[1] != pair[0] + 1).collect::<Vec<_>>();
    assert_eq!(set_back.len(), usize::from(goes_on), "{all:?}");
    // Not to its beginning.
    assert!(set_back.iter().all(|pair| pair[1] > 5), "{all:?}");
    Ok(())
}

macro_rules! with_each_runtime {
    ($($test:ident,)*) => {
        mod runc {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(super::RUNC)
            })*
        }
        mod godwit {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(super::GODWIT)
            })*
        }
        mod godwit_as_runc {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(super::GODWIT_AS_RUNC)
            })*
        }
    };
}

with_each_runtime! {
    run_gives_output_and_exit_code,
    exec_gives_output_and_exit_code,
    logs_have_both_streams,
    stop_and_kill_end_it,
    statistics_and_limits,
    too_much_memory_is_told,
    restart_policies_hold,
    events_come_in_order,
    containers_outlive_dockers_daemon,
    a_checkpoint_comes_back,
}
