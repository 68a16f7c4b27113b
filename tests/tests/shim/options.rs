//! The runtime options of a task, and with them the other OCI runtime, crun.
//!
//! Not run against containerd's shim where that would only show what crun does.

use containerd_client::types::v1::Status;
use prost_types::Any;

use super::calls::{Streams, Task, refusal, traces};
use super::*;

/// `containerd.runc.v1.Options` with these fields.
fn options(binary_name: &str, root: &str, systemd_cgroup: bool) -> Any {
    let mut value = Vec::new();
    for (tag, text) in [(0x32, binary_name), (0x3a, root)] {
        if !text.is_empty() {
            value.extend([tag, u8::try_from(text.len()).expect("a short text")]);
            value.extend(text.as_bytes());
        }
    }
    if systemd_cgroup {
        value.extend([0x48, 1]);
    }
    Any { type_url: "containerd.runc.v1.Options".to_owned(), value }
}

/// A task that runs under crun.
fn under_crun(runtime: &Runtime, name: &str, script: &str) -> Result<Task> {
    let task = Task::of(runtime, name, &["--memory-limit", "67108864"], script)?;
    task.create(&Streams::default(), Some(options("crun", "", false)))?;
    task.start("")?;
    Ok(task)
}

/// A runtime that holds an exec until the test lets it go on.
const SLOW_EXEC: &str = "#!/bin/sh
case \"$*\" in *' exec '*) : > /run/slow-exec.ready; read line < /run/slow-exec.fifo ;; esac
exec runc \"$@\"
";

/// Method: the init process is killed while the runtime hangs in an exec, and another exec comes.
fn an_init_that_ends_while_execs_start_waits_for_no_runtime(runtime: &Runtime) -> Result<()> {
    let install = "cat > /run/slow-runc; chmod 755 /run/slow-runc; cd /run; \
                   rm -f slow-exec.*; mkfifo slow-exec.fifo";
    node().command(&["sh", "-c", install]).stdin(SLOW_EXEC).ok()?;
    let task = Task::of(runtime, "slowexec", &[], "sleep 600")?;
    task.create(&Streams::default(), Some(options("/run/slow-runc", "", false)))?;
    task.start("")?;
    let execs = ["e1", "e2"];
    execs.iter().try_for_each(|exec| task.exec(exec, &Streams::default(), "sleep 601"))?;
    std::thread::scope(|scope| {
        let first = scope.spawn(|| refusal(task.start("e1")));
        let is_held = || Ok(node().path("/run/slow-exec.ready").exists());
        wait_until("the runtime hangs in the first exec", SOON, is_held)?;
        node().ok(&["kill", "-9", &task.container.pid()?])?;
        let second = scope.spawn(|| refusal(task.start("e2")));
        if runtime.tag == "runc" {
            // It waits for the runtime, which has to go on here.
            let go_on = "timeout 3 sh -c 'while :; do echo > /run/slow-exec.fifo; done' || :";
            node().sh(go_on)?;
        }
        task.container.wait_for_status("STOPPED")?;
        first.join().expect("no panic")?;
        second.join().expect("no panic")?;
        anyhow::Ok(())
    })?;
    for exec in execs {
        assert_eq!(task.status(exec)?, Status::Created);
        task.delete_exec(exec)?;
    }
    assert_eq!(task.delete()?, 137);
    Ok(())
}

fn crun_does_what_runc_does(runtime: &Runtime) -> Result<()> {
    let task = under_crun(runtime, "crun", "trap 'exit 9' TERM; while :; do sleep 0.1; done")?;
    let container = &task.container;
    // crun's own state, so it is crun that runs it.
    node().ok(&["test", "-f", &format!("/run/containerd/runc/default/{}/status", container.id)])?;
    assert_eq!(container.exec("e1", "exit 5")?.code, 5);
    assert_eq!(container.exec_ok("e2", "echo out")?, "out\n");
    ctr_ok(&["task", "pause", &container.id])?;
    assert_eq!(container.status()?, "PAUSED");
    ctr_ok(&["task", "resume", &container.id])?;
    assert_eq!(container.status()?, "RUNNING");
    let metrics: serde_json::Value =
        serde_json::from_str(&ctr_ok(&["task", "metrics", "--format", "json", &container.id])?)?;
    let limit = metrics.pointer("/memory/usage/limit").or(metrics.pointer("/memory/usage_limit"));
    assert_eq!(limit.context("no limit")?.to_string().trim_matches('"'), "67108864");
    update_memory(&container.id, 96 << 20)?;
    let file = format!("/sys/fs/cgroup/memory/default/{}/memory.limit_in_bytes", container.id);
    assert_eq!(node().ok(&["cat", &file])?.trim(), "100663296");
    ctr_ok(&["task", "kill", &container.id])?;
    container.wait_for_status("STOPPED")?;
    assert_eq!(refusal(task.kill("", 9))?.0, tonic::Code::NotFound);
    assert_eq!(container.delete()?, 9);
    wait_until("nothing is left", SOON, || Ok(traces(runtime, &container.id)?.is_empty()))
}

fn crun_names_a_program_that_is_missing(runtime: &Runtime) -> Result<()> {
    let task = under_crun(runtime, "crun-missing", "sleep 600")?;
    let finished = task.container.exec("e", "exec /no/such/program")?;
    assert_eq!(finished.code, 127, "{finished}");
    let words = ["task", "exec", "--exec-id", "m", &task.container.id, "/no/such/program"];
    let finished = ctr(&words)?;
    assert!(!finished.succeeded() && finished.stderr.contains("/no/such/program"), "{finished}");
    assert_eq!(task.container.status()?, "RUNNING");
    Ok(())
}

fn a_killed_shim_takes_crun_containers_along(runtime: &Runtime) -> Result<()> {
    let task = under_crun(runtime, "crun-orphan", "sleep 655")?;
    let shim = shims(runtime)?.into_iter().find(|shim| shim.contains(&task.container.id));
    let shim = shim.context("no shim of this container")?;
    node().ok(&["kill", "-KILL", shim.split_whitespace().next().unwrap_or_default()])?;
    wait_until("nothing is left", SOON, || {
        let runs = node().run(&["pgrep", "-f", "^sleep 655"])?.succeeded();
        Ok(!runs && traces(runtime, &task.container.id)?.is_empty())
    })
}

fn state_is_kept_where_root_says(runtime: &Runtime) -> Result<()> {
    let root = format!("/run/other-{}", runtime.tag);
    let task = Task::of(runtime, "root", &[], "sleep 600")?;
    task.create(&Streams::default(), Some(options("", &root, false)))?;
    task.start("")?;
    let id = &task.container.id;
    node().ok(&["test", "-f", &format!("{root}/default/{id}/state.json")])?;
    assert_eq!(task.container.exec("e", "exit 3")?.code, 3);
    // The clean-up behind a killed shim finds it as well.
    let shim = shims(runtime)?.into_iter().find(|shim| shim.contains(id)).context("no shim")?;
    node().ok(&["kill", "-KILL", shim.split_whitespace().next().unwrap_or_default()])?;
    wait_until("nothing is left", SOON, || {
        Ok(node().sh(&format!("ls {root}/default"))?.is_empty() && traces(runtime, id)?.is_empty())
    })
}

/// Method: the nodes have no systemd, which the runtime says when it is asked to use it.
fn systemd_is_asked_for_control_groups_if_the_options_say_so(runtime: &Runtime) -> Result<()> {
    let task = Task::of(runtime, "systemd", &[], "sleep 600")?;
    let refused = task.create(&Streams::default(), Some(options("", "", true)));
    let (_, text) = refusal(refused)?;
    assert!(text.contains("systemd"), "{text}");
    wait_until("nothing is left", SOON, || Ok(traces(runtime, &task.container.id)?.is_empty()))
}

fn a_runtime_that_is_missing_is_named(runtime: &Runtime) -> Result<()> {
    let task = Task::of(runtime, "norunc", &[], "sleep 600")?;
    let refused = task.create(&Streams::default(), Some(options("no-such-runc", "", false)));
    let (_, text) = refusal(refused)?;
    assert!(text.contains("no-such-runc"), "{text}");
    wait_until("nothing is left", SOON, || Ok(traces(runtime, &task.container.id)?.is_empty()))
}

/// What cannot be moved is refused before anything is frozen, with the reason.
#[test]
fn crun_containers_are_not_dumped() -> Result<()> {
    let task = under_crun(&GODWIT, "crun-dump", "sleep 600")?;
    let id = &task.container.id;
    let refused = ctr(&["task", "checkpoint", id])?;
    assert!(refused.stderr.contains("crun") && refused.stderr.contains("runc"), "{refused}");
    assert_eq!(task.container.status()?, "RUNNING");
    Ok(())
}

with_both_runtimes! {
    an_init_that_ends_while_execs_start_waits_for_no_runtime,
    crun_does_what_runc_does,
    crun_names_a_program_that_is_missing,
    a_killed_shim_takes_crun_containers_along,
    state_is_kept_where_root_says,
    systemd_is_asked_for_control_groups_if_the_options_say_so,
    a_runtime_that_is_missing_is_named,
}
