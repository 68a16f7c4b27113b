//! Every call of containerd's Task API, through `ctr` on a real node, with runc's own shim and
//! ours.
//!
//! Each test runs twice, once per runtime: what holds for one must hold for the other. The node has
//! no daemon: without a migration the shim needs none. `GODWIT_CONTAINERD=2` chooses the newer
//! containerd.

use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::{ResizePtyRequest, UpdateTaskRequest};
use containerd_client::tonic::transport::Channel;
use containerd_client::tonic::{self, Request};
use containerd_client::with_namespace;
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::{Bed, BedOptions, Containerd, Finished, Node, need};

/// One test per runtime.
macro_rules! with_both_runtimes {
    ($($test:ident,)*) => {
        mod runc {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(&crate::RUNC)
            })*
        }
        mod godwit {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(&crate::GODWIT)
            })*
        }
    };
}

#[path = "shim/calls.rs"]
mod calls;
#[path = "shim/checkpoints.rs"]
mod checkpoints;
#[path = "shim/options.rs"]
mod options;
#[path = "shim/streams.rs"]
mod streams;

/// The node that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| start().expect("the test node starts"));

const RUNC: Runtime = Runtime { name: "io.containerd.runc.v2", tag: "runc" };
const GODWIT: Runtime = Runtime { name: "io.containerd.runc.godwit.v1", tag: "godwit" };
const SOON: Duration = Duration::from_secs(10);

/// A shim under test.
struct Runtime {
    name: &'static str,
    tag: &'static str,
}

fn start() -> Result<Bed> {
    need::binaries(&["containerd-shim-godwit-v1"])?;
    let bed =
        Bed::start(&BedOptions::nodes(1).without_daemon().generation(Containerd::of_suite()))?;
    images::import(bed.node(0), Image::Busybox, "overlayfs")?;
    Ok(bed)
}

fn node() -> &'static Node {
    BED.node(0)
}

fn ctr(words: &[&str]) -> Result<Finished> {
    node().run(&[&["ctr"], words].concat())
}

fn ctr_ok(words: &[&str]) -> Result<String> {
    ctr(words)?.ok()
}

/// A container of one test; removed with its task when dropped.
struct Container {
    id: String,
}

impl Container {
    /// Runs `script` in the background; `extra` are options of `ctr run`.
    fn start(runtime: &Runtime, name: &str, extra: &[&str], script: &str) -> Result<Self> {
        let id = format!("{}-{name}", runtime.tag);
        let mut words = vec!["run", "-d", "--runtime", runtime.name];
        words.extend(extra);
        words.extend([Image::Busybox.reference(), &id, "sh", "-c", script]);
        ctr_ok(&words)?;
        Ok(Self { id })
    }

    fn status(&self) -> Result<String> {
        let tasks = ctr_ok(&["task", "ls"])?;
        let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        Ok(line.and_then(|line| line.split_whitespace().nth(2)).unwrap_or("GONE").to_owned())
    }

    fn wait_for_status(&self, status: &str) -> Result<()> {
        wait_until(&format!("{} is {status}", self.id), SOON, || Ok(self.status()? == status))
    }

    fn pid(&self) -> Result<String> {
        let tasks = ctr_ok(&["task", "ls"])?;
        let line = tasks.lines().find(|line| line.split_whitespace().next() == Some(&self.id));
        let pid = line.and_then(|line| line.split_whitespace().nth(1));
        Ok(pid.with_context(|| format!("{} has no task", self.id))?.to_owned())
    }

    /// Deletes the task, which must have ended, and returns its exit code.
    fn delete(&self) -> Result<i32> {
        let said = ctr(&["task", "rm", &self.id])?;
        ensure!(said.succeeded(), "{said}");
        // ctr tells of a code only if it is not 0, and only in a warning.
        let code = said.stderr.split("non-zero exit code ").nth(1);
        let digits = code.map(|text| text.trim_end().trim_end_matches('"'));
        Ok(digits.map_or(Ok(0), str::parse)?)
    }

    /// Runs a script in the container. Each exec of a container needs a name of its own.
    fn exec(&self, exec: &str, script: &str) -> Result<Finished> {
        ctr(&["task", "exec", "--exec-id", exec, &self.id, "sh", "-c", script])
    }

    fn exec_ok(&self, exec: &str, script: &str) -> Result<String> {
        self.exec(exec, script)?.ok()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let remove = format!("ctr task rm -f {0} || :; ctr c rm {0}", self.id);
        if let Err(error) = node().sh(&format!("{{ {remove}; }} 2> /dev/null || :")) {
            eprintln!("{}: not removed: {error:#}", self.id);
        }
    }
}

/// Runs in the foreground, removing the container at its end.
fn foreground(runtime: &Runtime, name: &str, extra: &[&str], script: &str) -> Result<Finished> {
    let id = format!("{}-{name}", runtime.tag);
    let mut words = vec!["run", "--rm", "--runtime", runtime.name];
    words.extend(extra);
    words.extend([Image::Busybox.reference(), &id, "sh", "-c", script]);
    ctr(&words)
}

/// Method: containerd 2's overlayfs leaves it to the shim to map the layers; 1.7's cannot ask for
/// it.
fn layers_belong_to_the_users_of_the_container(runtime: &Runtime) -> Result<()> {
    if Containerd::of_suite() != Containerd::V2 {
        return Ok(());
    }
    let (ctr, id) = (Containerd::of_suite().ctr(), format!("{}-idmap", runtime.tag));
    let ids = ["--uidmap", "0:100000:65535", "--gidmap", "0:200000:65535", "--remap-labels"];
    let run = [&ctr, "run", "-d", "--runtime", runtime.name, "--snapshotter", "overlayfs"];
    let image = [Image::Busybox.reference(), &id, "sh", "-c", "touch /written; sleep 600"];
    node().ok(&[&run[..], &ids, &image].concat())?;
    let container = Container { id: id.clone() };
    let seen = container.exec_ok("look", "stat -c %u:%g / /bin/busybox /etc/passwd /written")?;
    assert_eq!(seen, "0:0\n".repeat(4));
    let root = format!("/run/containerd/io.containerd.runtime.v2.task/default/{id}");
    let outside = node().sh(&format!("stat -c %u:%g {root}/rootfs/bin/busybox; ls {root}"))?;
    assert!(outside.starts_with("100000:200000\n"), "{outside}");
    assert!(!outside.contains("mapped-layers"), "{outside}");
    Ok(())
}

/// Processes of shims of this runtime, one command line each.
fn shims(runtime: &Runtime) -> Result<Vec<String>> {
    let name =
        if runtime.tag == "runc" { "containerd-shim-runc-v2" } else { "containerd-shim-godwit-v1" };
    let found = node().run(&["pgrep", "-a", "-f", name])?;
    Ok(found.stdout.lines().map(str::to_owned).collect())
}

fn run_gives_output_and_exit_code(runtime: &Runtime) -> Result<()> {
    let finished = foreground(runtime, "fg", &[], "echo out; echo err >&2; exit 3")?;
    assert_eq!((finished.code, finished.stdout.as_str()), (3, "out\n"));
    assert!(finished.stderr.contains("err"), "{finished}");
    Ok(())
}

fn run_gives_all_of_a_long_output(runtime: &Runtime) -> Result<()> {
    let finished = foreground(runtime, "long", &[], "seq 1 200000")?;
    let expected: String = (1..=200_000).map(|line| format!("{line}\n")).collect();
    assert!(finished.stdout == expected, "{} bytes", finished.stdout.len());
    Ok(())
}

/// Method: exits race the answers to Start and Wait; one in 20 was enough to show such bugs.
fn quick_exits_are_not_missed(runtime: &Runtime) -> Result<()> {
    for round in 0..20 {
        let finished = foreground(runtime, "quick", &[], &format!("exit {round}"))?;
        assert_eq!(finished.code, round, "{finished}");
    }
    Ok(())
}

fn a_terminal_is_one(runtime: &Runtime) -> Result<()> {
    let id = format!("{}-tty", runtime.tag);
    let image = Image::Busybox.reference();
    let command = "if [ -t 0 ] && [ -t 1 ]; then echo term''inal; fi; exit 4";
    let run =
        format!("ctr run --rm -t --runtime {} {image} {id} sh -c \"{command}\"", runtime.name);
    let finished = node().run(&["script", "-q", "-e", "-c", &run, "/dev/null"])?;
    assert!(finished.code == 4 && finished.stdout.contains("terminal"), "{finished}");
    let container = Container::start(runtime, "exec-tty", &[], "sleep 600")?;
    let exec = format!("ctr task exec -t --exec-id t {} sh -c \"{command}\"", container.id);
    let finished = node().run(&["script", "-q", "-e", "-c", &exec, "/dev/null"])?;
    assert!(finished.code == 4 && finished.stdout.contains("terminal"), "{finished}");
    Ok(())
}

fn exec_gives_output_and_exit_code(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "exec", &[], "sleep 600")?;
    let finished = container.exec("e1", "echo out; exit 5")?;
    assert_eq!((finished.code, finished.stdout.as_str()), (5, "out\n"));
    assert!(!container.exec("e2", "exec /no/such/program")?.succeeded());
    assert_eq!(container.exec_ok("e1", "hostname; echo $$ > /dev/null")?.lines().count(), 1);
    assert_eq!(container.status()?, "RUNNING");
    Ok(())
}

fn exec_reads_its_input_to_the_end(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "stdin", &[], "sleep 600")?;
    let words = ["ctr", "task", "exec", "--exec-id", "in", &container.id, "sh", "-c", "wc -c"];
    let counted = node().command(&words).stdin(vec![b'x'; 1 << 20]).timeout(SOON).ok()?;
    assert_eq!(counted.trim(), "1048576");
    Ok(())
}

fn a_task_goes_through_its_states(runtime: &Runtime) -> Result<()> {
    let container = Container::start(
        runtime,
        "states",
        &[],
        "trap 'exit 9' TERM; while :; do sleep 0.1; done",
    )?;
    assert_eq!(container.status()?, "RUNNING");
    assert!(!ctr(&["task", "rm", &container.id])?.succeeded(), "a running task cannot be deleted");
    let again = Container::start(runtime, "states", &[], "true").map(std::mem::forget);
    let error = again.expect_err("an id is unique").to_string();
    assert!(error.contains("already exists"), "{error}");
    assert_eq!(container.status()?, "RUNNING");
    ctr_ok(&["task", "kill", &container.id])?;
    container.wait_for_status("STOPPED")?;
    assert_eq!(container.delete()?, 9);
    assert_eq!(container.status()?, "GONE");
    // The container object is still there and can be started again.
    ctr_ok(&["task", "start", "-d", &container.id])?;
    assert_eq!(container.status()?, "RUNNING");
    Ok(())
}

fn signals_reach_one_process_or_all(runtime: &Runtime) -> Result<()> {
    let script = "trap 'echo usr1 > /mark' USR1; sleep 600 & while :; do wait; sleep 0.1; done";
    let container = Container::start(runtime, "signals", &[], script)?;
    ctr_ok(&["task", "kill", "-s", "SIGUSR1", &container.id])?;
    let mut round = 0;
    wait_until("the signal arrives", SOON, || {
        round += 1;
        Ok(container.exec(&format!("m{round}"), "test -e /mark")?.succeeded())
    })?;
    ctr_ok(&["task", "kill", "--all", "-s", "SIGKILL", &container.id])?;
    container.wait_for_status("STOPPED")?;
    assert_eq!(container.delete()?, 137);
    Ok(())
}

/// Method: the end of process 1 ends the PID namespace, so the exec ends with it and says how.
fn an_exec_ends_with_its_container(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "exec-end", &[], "sleep 600")?;
    let words = ["ctr", "task", "exec", "--exec-id", "long", &container.id, "sleep", "600"];
    let mut exec = node().spawn(&words, "exec-end")?;
    wait_until("the exec runs", SOON, || {
        Ok(ctr_ok(&["task", "ps", &container.id])?.lines().count() == 3)
    })?;
    ctr_ok(&["task", "kill", "-s", "SIGKILL", &container.id])?;
    assert_eq!(exec.wait(SOON)?, 137);
    Ok(())
}

fn pause_stops_the_clockwork(runtime: &Runtime) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.01; done";
    let container = Container::start(runtime, "pause", &[], script)?;
    let count = || -> Result<String> {
        Ok(std::fs::read_to_string(node().path(format!("/proc/{}/root/count", container.pid()?)))?)
    };
    wait_until("it counts", SOON, || Ok(count().is_ok_and(|text| !text.is_empty())))?;
    ctr_ok(&["task", "pause", &container.id])?;
    assert_eq!(container.status()?, "PAUSED");
    let frozen = count()?;
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(count()?, frozen);
    ctr_ok(&["task", "resume", &container.id])?;
    assert_eq!(container.status()?, "RUNNING");
    wait_until("it counts on", SOON, || Ok(count()? != frozen))
}

fn metrics_are_filled(runtime: &Runtime) -> Result<()> {
    let script = "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 600";
    let container = Container::start(runtime, "metrics", &["--memory-limit", "67108864"], script)?;
    wait_until("CPU time is counted", SOON, || {
        let text = ctr_ok(&["task", "metrics", "--format", "json", &container.id])?;
        let metrics: serde_json::Value = serde_json::from_str(&text)?;
        let number = |pointers: &[&str]| {
            let found = pointers.iter().find_map(|pointer| metrics.pointer(pointer));
            let text = found.map(|v| v.as_str().map_or(v.to_string(), str::to_owned));
            text.and_then(|text| text.parse::<u64>().ok()).unwrap_or(0)
        };
        // Version 1 and version 2 of cgroups have different messages.
        let limit = number(&["/memory/usage/limit", "/memory/usage_limit"]);
        let used = number(&["/memory/usage/usage", "/memory/usage"]);
        ensure!(limit == 67_108_864 && used > 0, "memory: {text}");
        ensure!(number(&["/pids/current"]) >= 1, "pids: {text}");
        Ok(number(&["/cpu/usage/total", "/cpu/usage_usec"]) > 10_000)
    })
}

fn ps_lists_the_processes(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "ps", &[], "sleep 600 & sleep 600 & wait")?;
    wait_until("three processes are listed", SOON, || {
        let list = ctr_ok(&["task", "ps", &container.id])?;
        Ok(list.lines().count() == 4 && list.contains(&container.pid()?))
    })
}

fn too_much_memory_kills(runtime: &Runtime) -> Result<()> {
    let options = ["--memory-limit", "16777216"];
    let script = "exec dd if=/dev/zero of=/dev/null bs=64M count=1";
    let finished = foreground(runtime, "oom", &options, script)?;
    assert_eq!(finished.code, 137, "{finished}");
    Ok(())
}

/// Method: a count in the memory of a process and the last count in its writable layer.
fn a_checkpoint_comes_back_under_its_own_and_another_id(runtime: &Runtime) -> Result<()> {
    let script = "i=1000; while :; do i=$((i+1)); echo $i >> /count; sleep 0.01; done";
    let container = Container::start(runtime, "ckpt", &[], script)?;
    let image = format!("checkpoint-of-{}", container.id);
    let counts = |container: &Container, exec: &str| -> Result<Vec<u64>> {
        let text = container.exec_ok(exec, "cat /count")?;
        Ok(text.lines().map(str::parse).collect::<Result<_, _>>()?)
    };
    wait_until("it counts", SOON, || Ok(container.exec("c0", "test -s /count")?.succeeded()))?;
    ctr_ok(&["c", "checkpoint", "--rw", "--task", "--image", &container.id, &image])?;
    assert_eq!(container.status()?, "RUNNING");
    let before = counts(&container, "c1")?.len();
    ctr_ok(&["task", "rm", "-f", &container.id])?;
    ctr_ok(&["c", "rm", &container.id])?;
    for id in [container.id.clone(), format!("{}-other", container.id)] {
        ctr_ok(&["c", "restore", "--rw", "--live", &id, &image])?;
        let restored = Container { id };
        assert_eq!(restored.status()?, "RUNNING");
        let mut round = 0;
        wait_until("it counts on", SOON, || {
            round += 1;
            Ok(counts(&restored, &format!("r{round}"))?.len() > before + 10)
        })?;
        let all = counts(&restored, "all")?;
        // One number after the other: nothing was lost, done twice or begun again.
        assert!(all.iter().copied().eq(1001..1001 + all.len() as u64), "{all:?}");
        assert_eq!(restored.exec("x", "exit 6")?.code, 6);
        ctr_ok(&["task", "kill", "-s", "SIGKILL", &restored.id])?;
        restored.wait_for_status("STOPPED")?;
    }
    ctr_ok(&["image", "rm", &image]).map(drop)
}

/// Makes a call of containerd's Tasks service that `ctr` has no command for.
fn ask<T>(
    call: impl AsyncFnOnce(&mut TasksClient<Channel>) -> Result<T, tonic::Status>,
) -> Result<T> {
    let socket = node().path("/run/containerd/containerd.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = containerd_client::connect(socket).await?;
        Ok(call(&mut TasksClient::new(channel)).await?)
    })
}

fn an_update_changes_the_limit(runtime: &Runtime) -> Result<()> {
    let container =
        Container::start(runtime, "update", &["--memory-limit", "67108864"], "sleep 600")?;
    let limit = || -> Result<u64> {
        // Under cgroups of version 1, and of version 2 (`make test-vm`).
        let (id, top) = (&container.id, "/sys/fs/cgroup");
        let files = format!(
            "{top}/memory/default/{id}/memory.limit_in_bytes {top}/default/{id}/memory.max"
        );
        Ok(node().sh(&format!("cat {files} 2> /dev/null || :"))?.trim().parse()?)
    };
    assert_eq!(limit()?, 64 << 20);
    update_memory(&container.id, 96 << 20)?;
    assert_eq!(limit()?, 96 << 20);
    Ok(())
}

fn update_memory(id: &str, limit: u64) -> Result<()> {
    let resources = prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
        value: format!("{{\"memory\": {{\"limit\": {limit}}}}}").into_bytes(),
    };
    let request = UpdateTaskRequest {
        container_id: id.to_owned(),
        resources: Some(resources),
        ..Default::default()
    };
    ask(async |tasks| tasks.update(with_namespace!(request, "default")).await).map(drop)
}

fn a_terminal_can_be_resized(runtime: &Runtime) -> Result<()> {
    let container = Container { id: format!("{}-resize", runtime.tag) };
    let (name, image, id) = (runtime.name, Image::Busybox.reference(), &container.id);
    let report = "while :; do stty size > /size; sleep 0.1; done";
    let run = format!("ctr run --rm -t --runtime {name} {image} {id} sh -c \"{report}\"");
    let _client = node().spawn(&["script", "-q", "-e", "-c", &run, "/dev/null"], id)?;
    container.wait_for_status("RUNNING")?;
    let request = ResizePtyRequest {
        container_id: container.id.clone(),
        width: 123,
        height: 45,
        ..Default::default()
    };
    ask(async |tasks| tasks.resize_pty(with_namespace!(request, "default")).await)?;
    let mut round = 0;
    wait_until("the terminal has its new size", SOON, || {
        round += 1;
        Ok(container.exec_ok(&format!("r{round}"), "cat /size")?.trim() == "45 123")
    })
}

fn containerd_may_restart(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "restart", &[], "sleep 600")?;
    let ending = Container::start(runtime, "ending", &[], "sleep 1; exit 8")?;
    let pid = ending.pid()?;
    node().kill_containerd()?;
    wait_until("it ends while containerd is away", SOON, || {
        Ok(!node().run(&["kill", "-0", &pid])?.succeeded())
    })?;
    node().start_containerd()?;
    // containerd takes a shim whose only process has ended for a leaked one and may remove it.
    wait_until("the end is known", SOON, || Ok(ending.status()? != "RUNNING"))?;
    if ending.status()? == "STOPPED" {
        assert_eq!(ending.delete()?, 8);
    }
    assert_eq!(container.status()?, "RUNNING");
    assert_eq!(container.exec("after", "exit 3")?.code, 3);
    let events = node().spawn(&["ctr", "events"], &format!("events-{}", container.id))?;
    wait_until("events arrive", SOON, || {
        ctr_ok(&["namespaces", "label", "default", "probe=1"])?;
        Ok(events.log().contains("/namespaces/update"))
    })?;
    ctr_ok(&["task", "kill", "-s", "SIGKILL", &container.id])?;
    container.wait_for_status("STOPPED")?;
    wait_until("the exit event arrives", SOON, || Ok(events.log().contains("/tasks/exit")))
}

fn events_come_in_order_and_once(runtime: &Runtime) -> Result<()> {
    let events = node().spawn(&["ctr", "events"], &format!("events-order-{}", runtime.tag))?;
    // Events are not kept for those who come late.
    wait_until("the events are subscribed to", SOON, || {
        ctr_ok(&["namespaces", "label", "default", "godwit.io/test=events"])?;
        Ok(events.log().contains("/namespaces/update"))
    })?;
    let container = Container::start(runtime, "events", &[], "sleep 600")?;
    container.exec_ok("one", "true")?;
    ctr_ok(&["task", "pause", &container.id])?;
    ctr_ok(&["task", "resume", &container.id])?;
    ctr_ok(&["task", "kill", "-s", "SIGKILL", &container.id])?;
    container.wait_for_status("STOPPED")?;
    // Fails with the task's exit code, 137; what it did shows in the events.
    let removed = ctr(&["task", "rm", &container.id])?;
    let last =
        wait_until("the last event arrives", SOON, || Ok(events.log().contains("/tasks/delete")));
    // containerd's shim of 2.1 ends, now and then, before it has sent its last event.
    let is_lost = last.is_err() && runtime.name == RUNC.name;
    if !is_lost {
        last.with_context(|| format!("{removed:?}: {}", events.log()))?;
    }
    let log = events.log();
    let of_tasks = log.lines().filter(|line| line.contains(&container.id));
    let topics =
        of_tasks.filter_map(|line| line.split_whitespace().find(|w| w.starts_with("/tasks/")));
    let topics: Vec<&str> = topics.collect();
    let expected = [
        "create",
        "start",
        "exec-added",
        "exec-started",
        "exit",
        "paused",
        "resumed",
        "exit",
        "delete",
    ];
    let expected = &expected[..expected.len() - usize::from(is_lost)];
    let expected: Vec<String> = expected.iter().map(|topic| format!("/tasks/{topic}")).collect();
    assert_eq!(topics, expected);
    Ok(())
}

fn a_killed_shim_takes_its_container_along(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "orphan", &[], "sleep 654")?;
    let shim = shims(runtime)?.into_iter().find(|line| line.contains(&container.id));
    let shim = shim.context("no shim of this container")?;
    let pid = shim.split_whitespace().next().unwrap_or_default();
    node().ok(&["kill", "-KILL", pid])?;
    wait_until("its process is killed", SOON, || {
        Ok(!node().run(&["pgrep", "-f", "^sleep 654"])?.succeeded())
    })?;
    // containerd no longer lists the task while it still cleans up behind the shim.
    wait_until("the id can be used again", SOON, || {
        ctr(&["task", "rm", "-f", &container.id])?;
        Ok(ctr(&["task", "start", "-d", &container.id])?.succeeded())
    })?;
    assert_eq!(container.status()?, "RUNNING");
    Ok(())
}

fn a_pod_has_one_shim(runtime: &Runtime) -> Result<()> {
    let before = shims(runtime)?.len();
    let sandbox = format!("io.kubernetes.cri.sandbox-id={}-pod", runtime.tag);
    let options = ["--annotation", sandbox.as_str()];
    let pod = Container::start(runtime, "pod", &options, "sleep 600")?;
    let first = Container::start(runtime, "pod-1", &options, "sleep 600")?;
    let second = Container::start(runtime, "pod-2", &options, "exit 2")?;
    assert_eq!(shims(runtime)?.len(), before + 1);
    second.wait_for_status("STOPPED")?;
    assert_eq!(second.delete()?, 2);
    assert_eq!((pod.status()?, first.status()?), ("RUNNING".into(), "RUNNING".into()));
    drop((first, pod));
    wait_until("the pod's shim ends", SOON, || Ok(shims(runtime)?.len() == before))
}

fn a_start_that_fails_leaves_nothing(runtime: &Runtime) -> Result<()> {
    let before = shims(runtime)?.len();
    let id = format!("{}-none", runtime.tag);
    let image = Image::Busybox.reference();
    let failed = ctr(&["run", "-d", "--runtime", runtime.name, image, &id, "/no/such/program"])?;
    assert!(!failed.succeeded() && failed.stderr.contains("/no/such/program"), "{failed}");
    ctr(&["c", "rm", &id])?;
    wait_until("its shim ends", SOON, || Ok(shims(runtime)?.len() == before))
}

fn what_was_removed_is_gone(runtime: &Runtime) -> Result<()> {
    let container = Container::start(runtime, "gone", &[], "sleep 600")?;
    let (id, pid) = (container.id.clone(), container.pid()?);
    drop(container);
    wait_until("its shim ends", SOON, || {
        Ok(!shims(runtime)?.iter().any(|shim| shim.contains(&id)))
    })?;
    let left = node().sh(&format!(
        "ls -d /run/containerd/io.containerd.runtime.v2.task/default/{id} /run/containerd/runc/default/{id} \
         /proc/{pid} 2> /dev/null || :
         grep {id} /proc/mounts || :
         find /sys/fs/cgroup -type d -name {id}
         ctr snapshots ls | grep {id} || :"
    ))?;
    assert_eq!(left, "");
    Ok(())
}

/// The suite runs under the containerd that it was asked to run under.
#[test]
fn containerd_is_of_the_chosen_generation() -> Result<()> {
    let said = ctr_ok(&["version"])?;
    let server = said.split("Server:").nth(1).context("no server in `ctr version`")?;
    let version = server.lines().find_map(|line| line.trim().strip_prefix("Version:"));
    let first = match Containerd::of_suite() {
        Containerd::V1 => "1.7",
        Containerd::V2 => "2.",
    };
    assert!(version.is_some_and(|version| version.trim().starts_with(first)), "{said}");
    Ok(())
}

/// A shim is there once per container: what it holds, the machine holds many times.
#[test]
fn our_shim_is_small() -> Result<()> {
    let container = Container::start(&GODWIT, "small", &[], "sleep 600")?;
    container.exec_ok("e", "true")?;
    let shim = shims(&GODWIT)?.into_iter().find(|line| line.contains(&container.id));
    let pid = shim.as_deref().and_then(|line| line.split(' ').next()).context("no shim")?;
    let status = node().sh(&format!("cat /proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line =
            status.lines().find_map(|line| line.strip_prefix(name)).context("no such field")?;
        Ok(line.split_whitespace().next().unwrap_or_default().parse()?)
    };
    let (resident_kib, threads) = (field("VmRSS:")?, field("Threads:")?);
    assert!(resident_kib < 12 * 1024 && threads <= 6, "{resident_kib} KiB, {threads} threads");
    Ok(())
}

with_both_runtimes! {
    layers_belong_to_the_users_of_the_container,
    an_update_changes_the_limit,
    a_terminal_can_be_resized,
    run_gives_output_and_exit_code,
    run_gives_all_of_a_long_output,
    quick_exits_are_not_missed,
    a_terminal_is_one,
    exec_gives_output_and_exit_code,
    exec_reads_its_input_to_the_end,
    a_task_goes_through_its_states,
    signals_reach_one_process_or_all,
    an_exec_ends_with_its_container,
    pause_stops_the_clockwork,
    metrics_are_filled,
    ps_lists_the_processes,
    too_much_memory_kills,
    a_checkpoint_comes_back_under_its_own_and_another_id,
    containerd_may_restart,
    events_come_in_order_and_once,
    a_killed_shim_takes_its_container_along,
    a_pod_has_one_shim,
    a_start_that_fails_leaves_nothing,
    what_was_removed_is_gone,
}
