//! The Task API call by call, where `ctr` makes several at once: create without start, waits
//! before, during and after, calls that must be refused, and with which code.
//!
//! Where the two shims differ on purpose, [`Runtime::code`] names both; docs/shim.md says why.

use std::fmt::Debug;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

use anyhow::bail;
use containerd_client::services::v1::snapshots::MountsRequest;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::{
    CloseIoRequest, CreateTaskRequest, DeleteProcessRequest, DeleteTaskRequest, ExecProcessRequest,
    GetRequest, KillRequest, ListPidsRequest, StartRequest, WaitRequest,
};
use containerd_client::tonic::Code;
use containerd_client::types::Mount;
use containerd_client::types::v1::{Process, Status};
use prost_types::Any;

use super::*;

/// How long any call may take.
const CALL: Duration = Duration::from_secs(30);
/// The init process, where an exec may be named as well.
const INIT: &str = "";

impl Runtime {
    /// The code that this shim refuses something with.
    fn code(&self, of_runc: Code, of_godwit: Code) -> Code {
        if self.tag == "runc" { of_runc } else { of_godwit }
    }

    /// Code for a call that the container's state does not allow. containerd's shim has none.
    fn wrong_state(&self) -> Code {
        self.code(Code::Unknown, Code::FailedPrecondition)
    }
}

/// Names of streams, as the call has them.
#[derive(Clone, Default)]
pub(super) struct Streams {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) terminal: bool,
}

/// A FIFO in the node, open at the client's end.
pub(super) struct Fifo {
    pub(super) path: String,
    file: Option<File>,
}

impl Fifo {
    /// A FIFO whose reader is here.
    pub(super) fn new(name: &str) -> Result<Self> {
        let mut fifo = Self::without_reader(name)?;
        let mut options = File::options();
        let file =
            options.read(true).custom_flags(libc::O_NONBLOCK).open(node().path(&fifo.path))?;
        fifo.file = Some(file);
        Ok(fifo)
    }

    /// A FIFO that no client has open.
    pub(super) fn without_reader(name: &str) -> Result<Self> {
        let path = format!("/run/{name}.fifo");
        node().sh(&format!("rm -f {path}; mkfifo {path}"))?;
        Ok(Self { path, file: None })
    }

    /// What has come so far.
    pub(super) fn text(&mut self) -> Result<String> {
        let mut bytes = Vec::new();
        match self.file.as_mut().context("this has no reader")?.read_to_end(&mut bytes) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => Err(error.into()),
            _ => Ok(String::from_utf8(bytes)?),
        }
    }
}

/// Calls of containerd's Tasks service about one container. An empty exec is the init process.
pub(super) struct Task {
    pub(super) container: Container,
}

/// Makes a call, bounded in time. Errors: what it was refused with, a [`tonic::Status`].
fn call<T>(
    calls: impl AsyncFnOnce(&mut TasksClient<Channel>) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T> {
    ask(async |tasks| match tokio::time::timeout(CALL, calls(tasks)).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(tonic::Status::deadline_exceeded("no answer within the test's limit")),
    })
}

/// The code and the text that a call was refused with. Errors: it was not.
pub(super) fn refusal<T: Debug>(outcome: Result<T>) -> Result<(Code, String)> {
    match outcome {
        Ok(answer) => bail!("not refused: {answer:?}"),
        Err(error) => {
            let status = error.downcast_ref::<tonic::Status>().context("no answer at all")?;
            Ok((status.code(), status.message().to_owned()))
        }
    }
}

fn code<T: Debug>(outcome: Result<T>) -> Result<Code> {
    refusal(outcome).map(|(code, _)| code)
}

/// The mounts of a container's root file system.
fn mounts(id: &str) -> Result<Vec<Mount>> {
    let socket = node().path("/run/containerd/containerd.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut snapshots = SnapshotsClient::new(containerd_client::connect(socket).await?);
        let request = MountsRequest { snapshotter: "overlayfs".to_owned(), key: id.to_owned() };
        Ok(snapshots.mounts(with_namespace!(request, "default")).await?.into_inner().mounts)
    })
}

impl Task {
    /// A container without a task. `extra` are options of `ctr container create`.
    pub(super) fn of(runtime: &Runtime, name: &str, extra: &[&str], script: &str) -> Result<Self> {
        let id = format!("{}-{name}", runtime.tag);
        let mut words = vec!["container", "create", "--runtime", runtime.name];
        words.extend(extra);
        words.extend([Image::Busybox.reference(), &id, "sh", "-c", script]);
        ctr_ok(&words)?;
        Ok(Self { container: Container { id } })
    }

    /// A container whose task is created and not started.
    fn created(runtime: &Runtime, name: &str, script: &str) -> Result<Self> {
        let task = Self::of(runtime, name, &[], script)?;
        task.create(&Streams::default(), None)?;
        Ok(task)
    }

    /// A container whose task runs.
    pub(super) fn running(runtime: &Runtime, name: &str, script: &str) -> Result<Self> {
        let task = Self::created(runtime, name, script)?;
        task.start(INIT)?;
        Ok(task)
    }

    fn id(&self) -> String {
        self.container.id.clone()
    }

    pub(super) fn create(&self, streams: &Streams, options: Option<Any>) -> Result<u32> {
        self.create_on(mounts(&self.id())?, streams, options)
    }

    pub(super) fn create_on(
        &self,
        rootfs: Vec<Mount>,
        streams: &Streams,
        options: Option<Any>,
    ) -> Result<u32> {
        let request = CreateTaskRequest {
            container_id: self.id(),
            rootfs,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            options,
            ..Default::default()
        };
        let created = call(async |tasks| tasks.create(with_namespace!(request, "default")).await);
        created.map(|created| created.pid)
    }

    pub(super) fn start(&self, exec: &str) -> Result<u32> {
        let request = StartRequest { container_id: self.id(), exec_id: exec.to_owned() };
        let started = call(async |tasks| tasks.start(with_namespace!(request, "default")).await);
        started.map(|started| started.pid)
    }

    pub(super) fn wait(&self, exec: &str) -> Result<u32> {
        let request = WaitRequest { container_id: self.id(), exec_id: exec.to_owned() };
        let ended = call(async |tasks| tasks.wait(with_namespace!(request, "default")).await);
        ended.map(|ended| ended.exit_status)
    }

    pub(super) fn kill(&self, exec: &str, signal: u32) -> Result<()> {
        let request = KillRequest {
            container_id: self.id(),
            exec_id: exec.to_owned(),
            signal,
            ..Default::default()
        };
        call(async |tasks| tasks.kill(with_namespace!(request, "default")).await)
    }

    fn state(&self, exec: &str) -> Result<Process> {
        let request = GetRequest { container_id: self.id(), exec_id: exec.to_owned() };
        let found = call(async |tasks| tasks.get(with_namespace!(request, "default")).await)?;
        found.process.context("no process in the answer")
    }

    pub(super) fn status(&self, exec: &str) -> Result<Status> {
        Ok(self.state(exec)?.status())
    }

    pub(super) fn delete(&self) -> Result<u32> {
        let request = DeleteTaskRequest { container_id: self.id() };
        let deleted = call(async |tasks| tasks.delete(with_namespace!(request, "default")).await);
        deleted.map(|deleted| deleted.exit_status)
    }

    pub(super) fn delete_exec(&self, exec: &str) -> Result<u32> {
        let request = DeleteProcessRequest { container_id: self.id(), exec_id: exec.to_owned() };
        let deleted =
            call(async |tasks| tasks.delete_process(with_namespace!(request, "default")).await);
        deleted.map(|deleted| deleted.exit_status)
    }

    /// Adds a process that runs `script`; `streams` say whether it has a terminal.
    pub(super) fn exec(&self, exec: &str, streams: &Streams, script: &str) -> Result<()> {
        self.exec_args(exec, streams, &["sh", "-c", script])
    }

    fn exec_args(&self, exec: &str, streams: &Streams, args: &[&str]) -> Result<()> {
        let spec = serde_json::json!({"args": args, "cwd": "/", "env": ["PATH=/usr/bin"],
            "user": {"uid": 0, "gid": 0}});
        self.exec_spec(exec, streams, spec.to_string())
    }

    fn exec_spec(&self, exec: &str, streams: &Streams, spec: String) -> Result<()> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: spec.into_bytes(),
        };
        let request = ExecProcessRequest {
            container_id: self.id(),
            exec_id: exec.to_owned(),
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            spec: Some(spec),
        };
        call(async |tasks| tasks.exec(with_namespace!(request, "default")).await)
    }

    pub(super) fn close_stdin(&self, exec: &str) -> Result<()> {
        let request =
            CloseIoRequest { container_id: self.id(), exec_id: exec.to_owned(), stdin: true };
        call(async |tasks| tasks.close_io(with_namespace!(request, "default")).await)
    }

    pub(super) fn resize(&self, exec: &str, width: u32, height: u32) -> Result<()> {
        let request =
            ResizePtyRequest { container_id: self.id(), exec_id: exec.to_owned(), width, height };
        call(async |tasks| tasks.resize_pty(with_namespace!(request, "default")).await)
    }
}

/// Method: one wait before the start, two while it runs, one after its end.
fn every_wait_gets_the_same_answer(runtime: &Runtime) -> Result<()> {
    let task = Task::created(runtime, "wait", "trap 'exit 7' TERM; while :; do sleep 0.1; done")?;
    assert_eq!(task.status(INIT)?, Status::Created);
    std::thread::scope(|scope| {
        let early = scope.spawn(|| task.wait(INIT));
        std::thread::sleep(Duration::from_millis(200));
        task.start(INIT)?;
        assert_eq!(task.status(INIT)?, Status::Running);
        let during = [scope.spawn(|| task.wait(INIT)), scope.spawn(|| task.wait(INIT))];
        std::thread::sleep(Duration::from_millis(300));
        assert!(!early.is_finished() && during.iter().all(|wait| !wait.is_finished()));
        task.kill(INIT, 15)?;
        for wait in during.into_iter().chain([early]) {
            assert_eq!(wait.join().expect("no panic")?, 7);
        }
        anyhow::Ok(())
    })?;
    assert_eq!(task.wait(INIT)?, 7);
    let ended = task.state(INIT)?;
    assert_eq!((ended.status(), ended.exit_status), (Status::Stopped, 7));
    assert!(ended.exited_at.is_some_and(|at| at.seconds > 0));
    assert_eq!(task.delete()?, 7);
    assert_eq!(code(task.wait(INIT))?, Code::NotFound);
    Ok(())
}

fn what_has_ended_cannot_be_killed(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "kill", "trap '' TERM; while :; do sleep 0.1; done")?;
    task.exec("e", &Streams::default(), "exit 3")?;
    assert_eq!(code(task.kill("e", 15))?, Code::FailedPrecondition, "not started yet");
    task.start("e")?;
    assert_eq!(task.wait("e")?, 3);
    assert_eq!(code(task.kill("e", 15))?, Code::NotFound);
    assert_eq!(task.delete_exec("e")?, 3);
    for missing in [code(task.kill("e", 15)), code(task.wait("e")), code(task.start("e"))] {
        assert_eq!(missing?, Code::NotFound);
    }
    task.kill(INIT, 9)?;
    assert_eq!(task.wait(INIT)?, 137);
    assert_eq!(code(task.kill(INIT, 9))?, Code::NotFound);
    task.delete()?;
    assert_eq!(code(task.kill(INIT, 9))?, Code::NotFound);
    Ok(())
}

/// Method: 40 is a real-time signal, 99 none at all.
fn signals_of_all_kinds_arrive_and_others_are_refused(runtime: &Runtime) -> Result<()> {
    let script = "trap 'exit 4' 40; while :; do sleep 0.1; done";
    let task = Task::running(runtime, "rt", script)?;
    task.exec("e", &Streams::default(), script)?;
    task.start("e")?;
    let refused = runtime.code(Code::Unknown, Code::InvalidArgument);
    for process in [INIT, "e"] {
        assert_eq!(code(task.kill(process, 99))?, refused);
        assert_eq!(task.status(process)?, Status::Running);
    }
    // A shell that has no handler yet dies of it.
    std::thread::sleep(Duration::from_millis(500));
    for process in ["e", INIT] {
        task.kill(process, 40)?;
        assert_eq!(task.wait(process)?, 4);
    }
    Ok(())
}

fn only_what_does_not_run_can_be_deleted(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "delete", "sleep 600")?;
    assert_eq!(code(task.delete())?, runtime.wrong_state());
    task.exec("e", &Streams::default(), "sleep 600")?;
    task.start("e")?;
    assert_eq!(code(task.delete_exec("e"))?, runtime.wrong_state());
    if runtime.tag == "godwit" {
        // containerd's own shim dies of this.
        assert_eq!(code(task.start("e"))?, Code::FailedPrecondition);
        assert_eq!(code(task.start(INIT))?, Code::FailedPrecondition);
    }
    assert_eq!(code(task.exec("e", &Streams::default(), "true"))?, Code::AlreadyExists);
    task.kill(INIT, 9)?;
    assert_eq!(task.wait(INIT)?, 137);
    assert_eq!(task.delete()?, 137);
    assert_eq!(code(task.delete())?, Code::NotFound);
    Ok(())
}

/// Method: the process that waits for its start is gone with the task, and so is the exec.
fn what_never_started_can_be_deleted(runtime: &Runtime) -> Result<()> {
    let task = Task::of(runtime, "never", &[], "sleep 600")?;
    let pid = task.create(&Streams::default(), None)?;
    assert_eq!(task.state(INIT)?.pid, pid);
    task.exec("e", &Streams::default(), "true")?;
    assert_eq!(task.status("e")?, Status::Created);
    task.delete_exec("e")?;
    assert_eq!(code(task.state("e"))?, Code::NotFound);
    task.delete()?;
    wait_until("its process is gone", SOON, || Ok(!node().path(format!("/proc/{pid}")).exists()))?;
    task.create(&Streams::default(), None)?;
    task.start(INIT)?;
    assert_eq!(task.status(INIT)?, Status::Running, "its id can be used again");
    Ok(())
}

fn a_program_that_is_missing_is_named(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "missing", "sleep 600")?;
    for (round, program) in ["/no/such/program", "nosuchprogram"].into_iter().enumerate() {
        let exec = format!("e{round}");
        let mut output = Fifo::new("missing-out")?;
        let (stdout, stderr) = (output.path.clone(), output.path.clone());
        task.exec_args(&exec, &Streams { stdout, stderr, ..Default::default() }, &[program])?;
        std::thread::scope(|scope| {
            let wait = scope.spawn(|| task.wait(&exec));
            std::thread::sleep(Duration::from_millis(200));
            let (code, text) = refusal(task.start(&exec))?;
            assert_eq!(code, Code::Unknown, "{text}");
            assert!(text.contains("OCI runtime exec failed") && text.contains(program), "{text}");
            // Its waiters wait no longer. That it succeeded is not said by us.
            let expected = if runtime.tag == "runc" { 0 } else { 255 };
            assert_eq!(wait.join().expect("no panic")?, expected);
            anyhow::Ok(())
        })?;
        assert_eq!(task.status(&exec)?, Status::Created);
        task.delete_exec(&exec)?;
        // The runtime's words are not the process's.
        assert_eq!(output.text()?, "");
    }
    assert_eq!(task.status(INIT)?, Status::Running);
    task.exec("e0", &Streams::default(), "exit 6")?;
    task.start("e0")?;
    assert_eq!(task.wait("e0")?, 6);
    Ok(())
}

fn a_frozen_container_takes_no_execs(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "frozen", "sleep 600")?;
    for exec in ["before", "running"] {
        task.exec(exec, &Streams::default(), "sleep 600")?;
    }
    task.start("running")?;
    ctr_ok(&["task", "pause", &task.id()])?;
    assert_eq!(code(task.exec("e", &Streams::default(), "true"))?, runtime.wrong_state());
    assert_eq!(code(task.start("before"))?, runtime.wrong_state());
    assert_eq!((task.status(INIT)?, task.status("running")?), (Status::Paused, Status::Paused));
    assert_eq!(code(task.delete())?, runtime.wrong_state());
    ctr_ok(&["task", "resume", &task.id()])?;
    assert_eq!((task.status(INIT)?, task.status("running")?), (Status::Running, Status::Running));
    task.exec("after", &Streams::default(), "exit 2")?;
    task.start("after")?;
    assert_eq!(task.wait("after")?, 2);
    // A frozen container can be killed.
    ctr_ok(&["task", "pause", &task.id()])?;
    task.kill(INIT, 9)?;
    assert_eq!(task.wait(INIT)?, 137);
    Ok(())
}

fn a_created_container_takes_execs(runtime: &Runtime) -> Result<()> {
    let task = Task::created(runtime, "early", "sleep 600")?;
    task.exec("e", &Streams::default(), "exit 5")?;
    task.start("e")?;
    assert_eq!(task.wait("e")?, 5);
    task.start(INIT)?;
    assert_eq!(task.status(INIT)?, Status::Running);
    Ok(())
}

fn processes_are_listed_with_their_exec(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "pids", "sleep 600")?;
    task.exec("named", &Streams::default(), "exec sleep 600")?;
    let pid = task.start("named")?;
    let request = ListPidsRequest { container_id: task.id() };
    let listed = call(async |tasks| tasks.list_pids(with_namespace!(request, "default")).await)?;
    let of_exec = listed.processes.iter().find(|process| process.pid == pid);
    let info = of_exec.and_then(|process| process.info.as_ref()).context("no information")?;
    assert_eq!(info.type_url.rsplit('/').next(), Some("containerd.runc.v1.ProcessDetails"));
    // exec_id = 1
    assert_eq!(info.value, b"\x0a\x05named");
    assert!(listed.processes.iter().all(|process| process.pid == pid || process.info.is_none()));
    Ok(())
}

fn many_execs_start_at_once(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "many", "sleep 600")?;
    std::thread::scope(|scope| {
        let execs: Vec<_> = (1..=8)
            .map(|number| {
                let task = &task;
                scope.spawn(move || {
                    let exec = format!("e{number}");
                    task.exec(&exec, &Streams::default(), &format!("exit {number}"))?;
                    task.start(&exec)?;
                    assert_eq!(task.wait(&exec)?, number);
                    assert_eq!(task.delete_exec(&exec)?, number);
                    anyhow::Ok(())
                })
            })
            .collect();
        execs.into_iter().try_for_each(|exec| exec.join().expect("no panic"))?;
        if runtime.tag == "runc" {
            // Two starts of one process are too much for it.
            return Ok(());
        }
        task.exec("twice", &Streams::default(), "sleep 600")?;
        let starts = [(); 2].map(|()| scope.spawn(|| task.start("twice").is_ok()));
        let started = starts.map(|start| start.join().expect("no panic"));
        assert_eq!(started.into_iter().filter(|started| *started).count(), 1);
        Ok(())
    })
}

/// Method: streams that do not exist, and a description that is none.
fn nonsense_is_refused_and_harms_nobody(runtime: &Runtime) -> Result<()> {
    let task = Task::running(runtime, "nonsense", "sleep 600")?;
    let invalid = runtime.code(Code::Unknown, Code::InvalidArgument);
    assert_eq!(code(task.exec_spec("e", &Streams::default(), "{".to_owned()))?, invalid);
    assert_eq!(code(task.state("e"))?, Code::NotFound);
    let bad = Streams { stdout: "nosuch:///x".to_owned(), ..Default::default() };
    task.exec("e", &bad, "true")?;
    assert_eq!(code(task.start("e"))?, Code::Unknown);
    task.delete_exec("e")?;
    assert_eq!(task.status(INIT)?, Status::Running);
    Ok(())
}

/// Method: each container shares the node's pid namespace, so that a process that loses its parent
/// becomes the shim's child.
fn orphans_are_reaped_and_end_with_the_container(runtime: &Runtime) -> Result<()> {
    let shared = ["--with-ns", "pid:/proc/1/ns/pid"];
    let script = "(sleep 0.3; exit 1) & sh -c 'sleep 777 & exit 0'; while :; do sleep 0.1; done";
    let task = Task::of(runtime, "orphans", &shared, script)?;
    task.create(&Streams::default(), None)?;
    task.start(INIT)?;
    for round in 0..3 {
        let exec = format!("e{round}");
        task.exec(&exec, &Streams::default(), "sh -c '(sleep 0.2; exit 3) & exit 0'; exit 4")?;
        task.start(&exec)?;
        assert_eq!(task.wait(&exec)?, 4);
    }
    let shim = shims(runtime)?.into_iter().find(|shim| shim.contains(&task.id()));
    let shim =
        shim.as_deref().and_then(|shim| shim.split(' ').next()).context("no shim")?.to_owned();
    let children = || node().run(&["ps", "-o", "stat=,args=", "--ppid", &shim]);
    wait_until("the orphans have come to the shim", SOON, || {
        Ok(children()?.stdout.contains("sleep 777"))
    })?;
    std::thread::sleep(Duration::from_millis(500));
    let children = children()?.stdout;
    assert!(!children.lines().any(|line| line.starts_with('Z')), "{children}");
    task.kill(INIT, 9)?;
    assert_eq!(task.wait(INIT)?, 137);
    wait_until("the orphan has ended as well", SOON, || {
        Ok(!node().run(&["pgrep", "-f", "^sleep 777"])?.succeeded())
    })
}

/// Method: the program that takes too much is not the init process, which survives it.
fn a_kill_for_want_of_memory_is_told_at_once(runtime: &Runtime) -> Result<()> {
    let events = node().spawn(&["ctr", "events"], &format!("events-oom-{}", runtime.tag))?;
    wait_until("the events are subscribed to", SOON, || {
        ctr_ok(&["namespaces", "label", "default", "godwit.io/test=oom"])?;
        Ok(events.log().contains("/namespaces/update"))
    })?;
    let script = "dd if=/dev/zero of=/dev/null bs=64M count=1; exec sleep 600";
    let limit = ["--memory-limit", "16777216"];
    let container = Container::start(runtime, "oom-child", &limit, script)?;
    let told = |topic: &str| {
        let log = events.log();
        log.lines().filter(|line| line.contains(topic) && line.contains(&container.id)).count()
    };
    wait_until("the kill is reported", SOON, || Ok(told("/tasks/oom") > 0))?;
    assert_eq!((container.status()?.as_str(), told("/tasks/exit")), ("RUNNING", 0));
    ctr_ok(&["task", "kill", "-s", "SIGKILL", &container.id])?;
    wait_until("the exit is reported", SOON, || Ok(told("/tasks/exit") > 0))?;
    assert_eq!(told("/tasks/oom"), 1);
    Ok(())
}

/// What a runtime, its shim and the kernel hold under this id.
pub(super) fn traces(runtime: &Runtime, id: &str) -> Result<String> {
    let shims: Vec<String> = shims(runtime)?.into_iter().filter(|shim| shim.contains(id)).collect();
    let others = node().sh(&format!(
        "ls -d /run/containerd/io.containerd.runtime.v2.task/default/{id} \
         /run/containerd/runc/default/{id} 2> /dev/null || :
         grep {id} /proc/mounts || :
         find /sys/fs/cgroup -type d -name {id}"
    ))?;
    Ok(shims.join("\n") + &others)
}

/// Method: each step of Create is made to fail: the mount, the streams, the logger, the runtime.
fn a_create_that_fails_half_way_leaves_nothing(runtime: &Runtime) -> Result<()> {
    let whole = |stdout: &str| Streams { stdout: stdout.to_owned(), ..Default::default() };
    let cases = [
        ("mount", true, whole(""), "true"),
        ("scheme", false, whole("nosuch:///x"), "true"),
        ("fifo", false, whole("/run/no-such.fifo"), "true"),
        ("logger", false, whole("binary:///no/such/logger"), "true"),
    ];
    for (name, breaks_mount, streams, script) in cases {
        let task = Task::of(runtime, &format!("half-{name}"), &[], script)?;
        let mut rootfs = mounts(&task.id())?;
        if breaks_mount {
            // The first succeeds, so that there is something to undo.
            rootfs.push(Mount {
                r#type: "nosuchfs".into(),
                source: "x".into(),
                ..Default::default()
            });
        }
        let refused = refusal(task.create_on(rootfs, &streams, None));
        refused.with_context(|| format!("{name} does not fail"))?;
        assert_eq!(code(task.state(INIT))?, Code::NotFound, "{name}");
        wait_until(&format!("nothing is left after {name}"), SOON, || {
            Ok(traces(runtime, &task.id())?.is_empty())
        })?;
        task.create(&Streams::default(), None).with_context(|| format!("again after {name}"))?;
    }
    Ok(())
}

/// Method: an end at every moment from the start on; the answers to Start and Wait race it.
fn an_init_that_exits_during_start_is_not_lost(runtime: &Runtime) -> Result<()> {
    let task = Task::of(runtime, "short", &[], "exit 9")?;
    for _ in 0..5 {
        task.create(&Streams::default(), None)?;
        let begun = Instant::now();
        assert!(task.start(INIT)? > 0);
        assert_eq!(task.wait(INIT)?, 9);
        assert_eq!(task.delete()?, 9);
        assert!(begun.elapsed() < CALL / 3, "{:?}", begun.elapsed());
    }
    Ok(())
}

/// Not containerd's shim: there this waits for ever (docs/shim.md).
#[test]
fn nobody_waits_for_what_was_deleted() -> Result<()> {
    let task = Task::running(&GODWIT, "unstarted", "sleep 600")?;
    task.exec("e", &Streams::default(), "true")?;
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| task.wait("e"));
        std::thread::sleep(Duration::from_millis(200));
        assert!(!wait.is_finished());
        task.delete_exec("e")?;
        wait.join().expect("no panic").map(drop)
    })
}

with_both_runtimes! {
    every_wait_gets_the_same_answer,
    what_has_ended_cannot_be_killed,
    signals_of_all_kinds_arrive_and_others_are_refused,
    only_what_does_not_run_can_be_deleted,
    what_never_started_can_be_deleted,
    a_program_that_is_missing_is_named,
    a_frozen_container_takes_no_execs,
    a_created_container_takes_execs,
    processes_are_listed_with_their_exec,
    many_execs_start_at_once,
    nonsense_is_refused_and_harms_nobody,
    orphans_are_reaped_and_end_with_the_container,
    a_kill_for_want_of_memory_is_told_at_once,
    a_create_that_fails_half_way_leaves_nothing,
    an_init_that_exits_during_start_is_not_lost,
}
