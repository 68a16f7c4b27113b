//! The shim's real binary between a scripted containerd, a scripted daemon and a scripted OCI
//! runtime: what a container's life looks like from outside, and that a migrated one never runs
//! without a grant.
//!
//! The runtime is a shell script whose "container" is a `sleep`; on `restore` it runs the action
//! script as CRIU does, twice at post-restore, before anything runs. Each test has a mount
//! namespace with a /run of its own, so that the daemon's fixed socket path is free. Needs root.

#![expect(clippy::unwrap_used, reason = "helpers of tests lie outside test functions here")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim::protos::api::{
    CreateTaskRequest, DeleteRequest, Empty as NoAnswer, KillRequest, StartRequest, StateRequest,
    Status, WaitRequest,
};
use containerd_shim::protos::protobuf::Message as _;
use containerd_shim::protos::shim::events::ForwardRequest;
use containerd_shim::protos::shim::oci::Options;
use containerd_shim::protos::shim_async::{Client, Events, TaskClient, create_events};
use godwit_protos::control::{
    AcquireRequest, AcquireResponse, ClaimRequest, ClaimResponse, Control, Empty, SettleRequest,
    create_control,
};
use godwit_protos::path::{CONTROL_SOCKET, HOLDS};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use tokio::sync::watch;
use ttrpc::Code;
use ttrpc::r#async::{Server, TtrpcContext};

const ID: &str = "c1";
const EVENTS: &str = "/run/events.sock";
const SOCKET: &str = "unix:///run/shim.sock";

/// A runtime with a CRIU of its own: a process in a control group of its own, whose task is stopped
/// until it is sent SIGCONT. `stop-at-STAGE` makes CRIU wait there while the file exists.
const RUNTIME: &str = r#"#!/bin/sh
log=$4; shift 6; command=$1
while [ $# -gt 0 ]; do [ "$1" = --pid-file ] && pid_file=$2; last=$1; shift; done
run() { sleep 300 & echo $! > "$pid_file"; echo "$command" >> ran; }
fail() { echo "{\"level\":\"error\",\"msg\":\"$1\"}" > "$log"; exit 1; }
group() {
  # Of the freezer's own hierarchy, or of version 2.
  group=/sys/fs/cgroup/freezer$(sed -n 's/^[0-9]*:freezer://p' /proc/self/cgroup)
  [ -d /sys/fs/cgroup/freezer ] || group=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup)
  group=$group/godwit-test-$$; mkdir "$group"; echo "$group" > group
}
wait_at() { echo "$1" >> reached; while [ -e "stop-at-$1" ]; do sleep 0.01; done; }
stage() { CRTOOLS_INIT_PID=$init CRTOOLS_SCRIPT_ACTION=$1 $script; }
undo() { kill -9 $init; echo "Error (criu/cr-restore.c:2324): Restoring FAILED." >> ../work/restore.log; exit 1; }
criu() {
  sh -c 'echo $PPID' > criu.pid
  echo "$(cat criu.pid)" > "$group/cgroup.procs"
  init=0; stage pre-restore || exit 1
  # In a session of its own, as a container: CRIU's end must not orphan a stopped group.
  setsid sh -c 'kill -STOP $$; echo restore >> ran; exec sleep 300' & init=$!
  echo $init > task.pid
  for call in 1 2; do stage post-restore || undo; done
  wait_at granted
  # Without its runtime CRIU skips the script.
  kill -0 $runtime 2> /dev/null && stage pre-resume
  wait_at frozen
  echo "Restore finished successfully. Tasks resumed." >> ../work/restore.log
}
case $command in
create) run;;
kill) kill -"$last" "$(cat init.pid)";;
delete) [ -e init.pid ] && kill -9 "$(cat init.pid)" 2>/dev/null; exit 0;;
restore)
  script=$(sed -n 's/^action-script //p' criu.conf)
  grep -q '^leave-stopped$' criu.conf || fail "tasks would run"
  runtime=$$; echo $$ > runtime.pid
  if [ -e ignore-script ]; then run; exit; fi
  group; criu & wait $! || fail "criu failed: type NOTIFY"
  cat task.pid > "$pid_file";;
esac
"#;

#[derive(Default)]
struct Containerd(Mutex<Vec<String>>);

#[async_trait]
impl Events for Containerd {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<NoAnswer> {
        self.0.lock().unwrap().push(request.envelope().topic().to_owned());
        Ok(NoAnswer::new())
    }
}

/// Answers as told, and remembers the report.
struct Daemon {
    /// Never answers a report.
    is_deaf: AtomicBool,
    /// Answers claims from now on.
    answers: watch::Sender<bool>,
    start_fresh: bool,
    may_run: bool,
    dir: PathBuf,
    settled: Mutex<Option<SettleRequest>>,
}

#[async_trait]
impl Control for Daemon {
    async fn acquire(&self, _: &TtrpcContext, r: AcquireRequest) -> ttrpc::Result<AcquireResponse> {
        assert_eq!(r.migrate_from, "edge-a/default/cache");
        Ok(AcquireResponse {
            start_fresh: self.start_fresh,
            session: "s1".to_owned(),
            image_path: self.dir.display().to_string(),
            work_path: self.dir.join("work").display().to_string(),
            ..Default::default()
        })
    }

    async fn claim(&self, _: &TtrpcContext, r: ClaimRequest) -> ttrpc::Result<ClaimResponse> {
        assert_eq!(r.session, "s1");
        assert!(!self.dir.join("bundle/ran").exists(), "nothing runs before the claim");
        let _ = self.answers.subscribe().wait_for(|answers| *answers).await;
        let reason = "edge-a kept it".to_owned();
        Ok(ClaimResponse { may_run: self.may_run, reason, ..Default::default() })
    }

    async fn settle(&self, _: &TtrpcContext, r: SettleRequest) -> ttrpc::Result<Empty> {
        *self.settled.lock().unwrap() = Some(r);
        if self.is_deaf.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        Ok(Empty::new())
    }
}

/// A node with a running shim for one container.
struct Node {
    dir: TempDir,
    shim: Child,
    task: TaskClient,
    containerd: Arc<Containerd>,
    _servers: Vec<Server>,
}

impl Node {
    async fn new(annotations: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let bundle = dir.path().join("bundle");
        std::fs::create_dir(&bundle).unwrap();
        let spec = format!(r#"{{"annotations": {{{annotations}}}, "mounts": []}}"#);
        std::fs::write(bundle.join("config.json"), spec).unwrap();
        // In place of containerd's FIFO.
        std::fs::write(bundle.join("log"), "").unwrap();
        let runtime = dir.path().join("runtime");
        std::fs::write(&runtime, RUNTIME).unwrap();
        std::fs::set_permissions(&runtime, std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .unwrap();

        let containerd = Arc::new(Containerd::default());
        let service = create_events(Arc::clone(&containerd) as Arc<_>);
        let address = format!("unix://{EVENTS}");
        let mut events = Server::new().bind(&address).unwrap().register_service(service);
        events.start().await.unwrap();

        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-godwit-v1"));
        command.args(["-namespace", "default", "-id", ID, "-address", "/run/x", "-socket", SOCKET]);
        command.current_dir(&bundle).env("TTRPC_ADDRESS", EVENTS).stdout(Stdio::piped());
        let mut shim = command.spawn().unwrap();
        // It closes its output once it serves.
        std::io::copy(&mut shim.stdout.take().unwrap(), &mut std::io::sink()).unwrap();
        let task = TaskClient::new(Client::connect(SOCKET).await.unwrap());
        Self { dir, shim, task, containerd, _servers: vec![events] }
    }

    fn bundle(&self) -> PathBuf {
        self.dir.path().join("bundle")
    }

    async fn with_daemon(&mut self, start_fresh: bool, may_run: bool) -> Arc<Daemon> {
        std::fs::create_dir_all(Path::new(CONTROL_SOCKET).parent().unwrap()).unwrap();
        let dir = self.dir.path().to_owned();
        let daemon = Arc::new(Daemon {
            is_deaf: AtomicBool::new(false),
            answers: watch::channel(true).0,
            start_fresh,
            may_run,
            dir,
            settled: Mutex::default(),
        });
        let service = create_control(Arc::clone(&daemon) as Arc<_>);
        let address = format!("unix://{CONTROL_SOCKET}");
        let mut server = Server::new().bind(&address).unwrap().register_service(service);
        server.start().await.unwrap();
        self._servers.push(server);
        daemon
    }

    async fn create(&self) -> Result<u32, ttrpc::Error> {
        let binary_name = self.dir.path().join("runtime").display().to_string();
        let options = Options { binary_name, ..Default::default() };
        let mut any = containerd_shim::protos::protobuf::well_known_types::any::Any::new();
        any.type_url = "containerd.runc.v1.Options".to_owned();
        any.value = options.write_to_bytes().unwrap();
        let bundle = self.bundle().display().to_string();
        let request = CreateTaskRequest {
            id: ID.to_owned(),
            bundle,
            options: Some(any).into(),
            ..Default::default()
        };
        self.task.create(ttrpc::context::Context::default(), &request).await.map(|r| r.pid)
    }

    async fn start(&self) -> Result<u32, ttrpc::Error> {
        let request = StartRequest { id: ID.to_owned(), ..Default::default() };
        self.task.start(ttrpc::context::Context::default(), &request).await.map(|r| r.pid)
    }

    async fn status(&self) -> (Status, u32) {
        let request = StateRequest { id: ID.to_owned(), ..Default::default() };
        let state = self.task.state(ttrpc::context::Context::default(), &request).await.unwrap();
        (state.status(), state.pid)
    }

    async fn kill_and_wait(&self) -> u32 {
        let context = ttrpc::context::Context::default;
        let kill = KillRequest { id: ID.to_owned(), signal: 9, ..Default::default() };
        self.task.kill(context(), &kill).await.unwrap();
        let wait = WaitRequest { id: ID.to_owned(), ..Default::default() };
        self.task.wait(context(), &wait).await.unwrap().exit_status
    }

    async fn delete(&self) {
        let request = DeleteRequest { id: ID.to_owned(), ..Default::default() };
        self.task.delete(ttrpc::context::Context::default(), &request).await.unwrap();
    }

    async fn topics(&self, wanted: usize) -> Vec<String> {
        for _ in 0..100 {
            if self.containerd.0.lock().unwrap().len() >= wanted {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.containerd.0.lock().unwrap().clone()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.bundle().join("log")).unwrap_or_default();
            eprintln!("the shim's log:\n{log}");
        }
        let _ = self.shim.kill();
        let _ = self.shim.wait();
        // What a failed test left running, if the pid is still its own.
        let pid = std::fs::read_to_string(self.bundle().join("init.pid")).unwrap_or_default();
        let name =
            std::fs::read_to_string(format!("/proc/{}/comm", pid.trim())).unwrap_or_default();
        if name.trim() == "sleep" {
            let _ = Command::new("kill").args(["-9", pid.trim()]).status();
        }
        if let Ok(group) = std::fs::read_to_string(self.bundle().join("group")) {
            for pid in tasks_in(&group) {
                let _ = Command::new("kill").args(["-9", &pid]).status();
            }
            let _ = std::fs::write(Path::new(group.trim()).join("freezer.state"), "THAWED");
            for _ in 0..100 {
                if std::fs::remove_dir(group.trim()).is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Processes of a control group; none of one that is gone.
fn tasks_in(group: &str) -> Vec<String> {
    let tasks = std::fs::read_to_string(Path::new(group.trim()).join("cgroup.procs"));
    tasks.unwrap_or_default().lines().map(str::to_owned).collect()
}

/// Runs a test in a mount namespace with an empty /run; says so where that is not allowed.
fn on_a_node(test: impl AsyncFnOnce()) {
    let none = None::<&str>;
    let isolated = unshare(CloneFlags::CLONE_NEWNS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
        .and_then(|()| mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none));
    if let Err(error) = isolated {
        assert!(std::env::var_os("CI").is_none(), "needs root: {error}");
        eprintln!("skipped: needs root ({error})");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(60), test()).await })
        .unwrap();
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..1000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not in time: {what}");
}

fn refusal(error: ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other}"),
    }
}

const MIGRATE: &str = r#""godwit.io/migrate-from": "edge-a/default/cache""#;

#[test]
fn an_ordinary_container_needs_no_daemon_and_its_events_come_in_order_and_once() {
    on_a_node(async || {
        let node = Node::new("").await;
        let pid = node.create().await.unwrap();
        assert_eq!(node.status().await, (Status::CREATED, pid));
        assert_eq!(refusal(node.create().await.unwrap_err()).0, Code::ALREADY_EXISTS);
        assert_eq!(node.start().await.unwrap(), pid);
        assert_eq!(refusal(node.start().await.unwrap_err()).0, Code::FAILED_PRECONDITION);
        assert_eq!(node.status().await, (Status::RUNNING, pid));
        assert_eq!(node.kill_and_wait().await, 137);
        node.delete().await;
        let expected = ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"];
        assert_eq!(node.topics(4).await, expected);
        let address = std::fs::read_to_string(node.bundle().join("godwit-address")).unwrap();
        assert_eq!(address, SOCKET);
    });
}

#[test]
fn a_migrated_container_runs_after_its_claim_is_granted() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        let daemon = node.with_daemon(false, true).await;
        assert_eq!(node.create().await.unwrap(), 0);
        let pid = node.start().await.unwrap();
        assert_eq!(node.status().await, (Status::RUNNING, pid));
        let report = daemon.settled.lock().unwrap().take().unwrap();
        assert_eq!((report.session.as_str(), report.running, report.init_pid), ("s1", true, pid));
        let ran = || std::fs::read_to_string(node.bundle().join("ran")).unwrap_or_default();
        until("it runs", || ran() == "restore\n").await;
        assert!(!Path::new(HOLDS).join("default").join(ID).exists(), "it was reported");
        assert_eq!(node.kill_and_wait().await, 137);
        node.delete().await;
    });
}

#[test]
fn a_refused_claim_leaves_a_created_container_that_can_be_deleted() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        let daemon = node.with_daemon(false, false).await;
        node.create().await.unwrap();
        let (code, text) = refusal(node.start().await.unwrap_err());
        let expected = "container default/c1 may not run here: edge-a kept it";
        assert_eq!((code, text.as_str()), (Code::FAILED_PRECONDITION, expected));
        assert_eq!(node.status().await, (Status::CREATED, 0));
        assert!(!node.bundle().join("ran").exists());
        let report = daemon.settled.lock().unwrap().take().unwrap();
        assert_eq!((report.running, report.reason.as_str()), (false, expected));
        node.delete().await;
        assert_eq!(node.topics(2).await, ["/tasks/create", "/tasks/delete"]);
    });
}

/// Method: a file of what CRIU leaves out that no source wrote. The daemon would grant the claim.
#[test]
fn what_cannot_be_set_again_undoes_the_restore_before_the_claim() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        let daemon = node.with_daemon(false, true).await;
        std::fs::write(node.dir.path().join("godwit-supplement"), b"\xff").unwrap();
        node.create().await.unwrap();
        let (_, text) = refusal(node.start().await.unwrap_err());
        assert!(text.contains("godwit-supplement is damaged"), "{text}");
        assert_eq!(node.status().await, (Status::CREATED, 0));
        assert!(!node.bundle().join("ran").exists());
        let report = daemon.settled.lock().unwrap().take().unwrap();
        assert!(!report.running && !report.may_have_run);
        node.delete().await;
    });
}

/// Method: a runtime that restores without running the script, as an old CRIU would.
#[test]
fn tasks_that_were_not_held_are_killed() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        let daemon = node.with_daemon(false, true).await;
        std::fs::write(node.bundle().join("ignore-script"), "").unwrap();
        node.create().await.unwrap();
        assert_eq!(refusal(node.start().await.unwrap_err()).0, Code::FAILED_PRECONDITION);
        assert_eq!(node.status().await, (Status::CREATED, 0));
        assert!(!daemon.settled.lock().unwrap().take().unwrap().running);
        let pid = std::fs::read_to_string(node.bundle().join("init.pid")).unwrap();
        let mut gone = false;
        for _ in 0..100 {
            gone = !Path::new("/proc").join(pid.trim()).exists();
            if gone {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(gone, "the unheld process lives on");
    });
}

#[test]
fn a_spent_annotation_means_an_ordinary_start() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        let _daemon = node.with_daemon(true, false).await;
        node.create().await.unwrap();
        let pid = node.start().await.unwrap();
        assert_eq!(node.status().await, (Status::RUNNING, pid));
        assert_eq!(std::fs::read_to_string(node.bundle().join("ran")).unwrap(), "create\n");
        node.kill_and_wait().await;
        node.delete().await;
    });
}

#[test]
fn without_a_daemon_the_start_says_so_and_can_be_tried_again() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        node.create().await.unwrap();
        let (code, text) = refusal(node.start().await.unwrap_err());
        assert_eq!(code, Code::UNAVAILABLE);
        assert!(
            text.contains(CONTROL_SOCKET) && text.contains("start godwit-snapshotter"),
            "{text}"
        );
        let _daemon = node.with_daemon(false, true).await;
        node.start().await.unwrap();
        node.kill_and_wait().await;
        node.delete().await;
    });
}

#[test]
fn a_container_that_waits_to_be_restored_can_be_killed() {
    on_a_node(async || {
        let node = Node::new(MIGRATE).await;
        node.create().await.unwrap();
        assert_eq!(node.kill_and_wait().await, 137);
        node.delete().await;
        assert_eq!(node.topics(3).await, ["/tasks/create", "/tasks/exit", "/tasks/delete"]);
    });
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Runtime,
    Criu,
    Script,
    Shim,
}

/// How far the restore is by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Held,
    Granted,
    Frozen,
    /// Thawed, and not reported yet.
    Thawed,
}

impl Node {
    fn pid_in(&self, file: &str) -> String {
        std::fs::read_to_string(self.bundle().join(file)).unwrap_or_default().trim().to_owned()
    }

    /// Kills one of those who work on the restore.
    fn kill(&mut self, victim: Victim) {
        let mut pid = match victim {
            Victim::Runtime => self.pid_in("runtime.pid"),
            Victim::Criu => self.pid_in("criu.pid"),
            Victim::Shim => self.shim.id().to_string(),
            Victim::Script => String::new(),
        };
        if victim == Victim::Script {
            let criu = self.pid_in("criu.pid");
            let children =
                std::fs::read_to_string(format!("/proc/{criu}/task/{criu}/children")).unwrap();
            let task = self.pid_in("task.pid");
            pid = children.split_whitespace().rfind(|child| *child != task).unwrap().to_owned();
        }
        assert!(Command::new("kill").args(["-9", &pid]).status().unwrap().success());
        if victim == Victim::Shim {
            self.shim.wait().unwrap();
        }
    }

    /// What containerd does when it misses a shim.
    async fn delete_behind_the_shim(&self) {
        let mut command =
            tokio::process::Command::new(env!("CARGO_BIN_EXE_containerd-shim-godwit-v1"));
        command.args(["-namespace", "default", "-id", ID, "-address", "/run/x", "-bundle"]);
        command.arg(self.bundle()).arg("delete").current_dir(self.bundle());
        assert!(command.stdout(Stdio::null()).status().await.unwrap().success());
    }
}

/// Kills `victim` at a stage of a restore that is granted. No task runs before the grant, none that
/// did is reported as one that never ran, and none is left.
async fn killed(victim: Victim, at: At) {
    let mut node = Node::new(MIGRATE).await;
    let daemon = node.with_daemon(false, true).await;
    let stop = |stage: &str| std::fs::write(node.bundle().join(format!("stop-at-{stage}")), "");
    match at {
        At::Held => drop(daemon.answers.send_replace(false)),
        At::Granted => stop("granted").unwrap(),
        At::Frozen => stop("frozen").unwrap(),
        At::Thawed => daemon.is_deaf.store(true, Ordering::SeqCst),
    }
    node.create().await.unwrap();
    let client = TaskClient::new(Client::connect(SOCKET).await.unwrap());
    let starting = tokio::spawn(async move {
        let request = StartRequest { id: ID.to_owned(), ..Default::default() };
        client.start(ttrpc::context::Context::default(), &request).await
    });
    let bundle = node.bundle();
    let has_reached = |stage: &str| {
        let reached = std::fs::read_to_string(bundle.join("reached")).unwrap_or_default();
        reached.lines().any(|line| line == stage)
    };
    let held = || Path::new(HOLDS).join("default").join(ID).exists();
    let script_waits = || {
        let criu = std::fs::read_to_string(bundle.join("criu.pid")).unwrap_or_default();
        let criu = criu.trim();
        let children = std::fs::read_to_string(format!("/proc/{criu}/task/{criu}/children"));
        bundle.join("task.pid").exists()
            && children.is_ok_and(|children| children.split_whitespace().count() == 2)
    };
    until("the stage is reached", || match at {
        At::Held => held() && script_waits(),
        At::Granted => has_reached("granted"),
        At::Frozen => has_reached("frozen"),
        At::Thawed => daemon.settled.lock().unwrap().is_some(),
    })
    .await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let has_run = || bundle.join("ran").exists();
    assert_eq!(has_run(), at == At::Thawed, "{victim:?} {at:?}: it ran");
    daemon.settled.lock().unwrap().take();

    node.kill(victim);
    // The processes that are left go on.
    daemon.is_deaf.store(false, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(50)).await;
    daemon.answers.send_replace(true);
    for stage in ["granted", "frozen"] {
        let _ = std::fs::remove_file(node.bundle().join(format!("stop-at-{stage}")));
    }
    let started = starting.await.unwrap();
    if victim == Victim::Shim {
        node.delete_behind_the_shim().await;
    }
    assert!(started.is_err(), "{victim:?} {at:?}: started");
    until("the report is there", || daemon.settled.lock().unwrap().is_some()).await;
    let report = daemon.settled.lock().unwrap().take().unwrap();
    let says_ran = report.running || report.may_have_run;
    assert!(says_ran || !has_run(), "{victim:?} {at:?}: a lie: {report:?}");
    // Proof that it never ran is there for all but these.
    let is_unknown = matches!((victim, at), (Victim::Criu, At::Granted) | (_, At::Thawed));
    assert_eq!(says_ran, is_unknown, "{victim:?} {at:?}: {report:?}");
    assert_eq!(has_run(), at == At::Thawed, "{victim:?} {at:?}: it ran afterwards");
    let group = std::fs::read_to_string(bundle.join("group")).unwrap();
    assert_eq!(tasks_in(&group), [""; 0], "{victim:?} {at:?}: left");
    assert!(!held(), "{victim:?} {at:?}: reported, and still noted");
}

#[test]
fn a_runtime_that_dies_lets_no_task_run() {
    for at in [At::Held, At::Granted, At::Frozen] {
        on_a_node(async || killed(Victim::Runtime, at).await);
    }
}

#[test]
fn a_criu_that_dies_lets_no_task_run_unless_it_may_have_and_then_that_is_said() {
    for at in [At::Held, At::Granted, At::Frozen] {
        on_a_node(async || killed(Victim::Criu, at).await);
    }
}

#[test]
fn a_script_that_dies_lets_no_task_run() {
    on_a_node(async || killed(Victim::Script, At::Held).await);
}

#[test]
fn a_shim_that_dies_lets_no_task_run_and_what_clears_up_behind_it_knows_whether_one_did() {
    for at in [At::Held, At::Granted, At::Frozen, At::Thawed] {
        on_a_node(async || killed(Victim::Shim, at).await);
    }
}

/// Method: the daemon is away when containerd clears up behind the shim.
#[test]
fn what_cannot_be_reported_stays_noted_with_its_outcome() {
    on_a_node(async || {
        let mut node = Node::new(MIGRATE).await;
        let _daemon = node.with_daemon(false, true).await;
        std::fs::write(node.bundle().join("stop-at-frozen"), "").unwrap();
        node.create().await.unwrap();
        let client = TaskClient::new(Client::connect(SOCKET).await.unwrap());
        tokio::spawn(async move {
            let request = StartRequest { id: ID.to_owned(), ..Default::default() };
            client.start(ttrpc::context::Context::default(), &request).await
        });
        let bundle = node.bundle();
        let reached = || std::fs::read_to_string(bundle.join("reached")).unwrap_or_default();
        until("it is frozen", || reached().contains("frozen")).await;
        node.kill(Victim::Shim);
        node.kill(Victim::Runtime);
        std::fs::remove_file(CONTROL_SOCKET).unwrap();
        node.delete_behind_the_shim().await;
        assert!(!bundle.join("ran").exists());
        let group = std::fs::read_to_string(bundle.join("group")).unwrap();
        assert_eq!(tasks_in(&group), [""; 0]);
        let record = criu_wrapper::held::Record::load(&Path::new(HOLDS).join("default").join(ID));
        assert_eq!(record.unwrap().unwrap().may_have_run, Some(false));
    });
}
