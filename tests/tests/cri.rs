//! Pods, as a kubelet asks for them: through containerd's CRI service, with the handlers that
//! `docs/deploy/containerd/godwit.toml` has, on a node with the daemon and a CNI bridge.
//!
//! Each test runs twice, with containerd's own shim over overlayfs (handler `runc`) and with ours
//! over our snapshotter (handler `godwit`). `GODWIT_CONTAINERD=2` chooses the newer containerd.

use std::collections::BTreeMap;
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::root::CONTAINERD_2;
use godwit_tests::{Bed, BedOptions, Containerd, Node, need};
use tonic::transport::Channel;

#[allow(clippy::all, unreachable_pub, reason = "generated")]
mod v1 {
    tonic::include_proto!("runtime.v1");
}
use v1::runtime_service_client::RuntimeServiceClient;
use v1::*;

/// One test per handler.
macro_rules! with_both_handlers {
    ($($test:ident,)*) => {
        mod runc {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(crate::RUNC)
            })*
        }
        mod godwit {
            $(#[test]
            fn $test() -> anyhow::Result<()> {
                super::$test(crate::GODWIT)
            })*
        }
    };
}

#[path = "cri/checkpoints.rs"]
mod checkpoints;
#[path = "cri/example.rs"]
mod example;
#[path = "cri/streams.rs"]
mod streams;

/// The node that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| start().expect("the test node starts"));

const SOON: Duration = Duration::from_secs(10);
const CALL: Duration = Duration::from_secs(40);

/// A runtime handler under test, and its shim.
#[derive(Clone, Copy)]
struct Handler {
    name: &'static str,
    shim: &'static str,
}

const RUNC: Handler = Handler { name: "runc", shim: "containerd-shim-runc-v2" };
/// Our shim as the installed configuration names it: by its path, under the type of containerd's
/// own.
const GODWIT: Handler =
    Handler { name: "godwit", shim: "/usr/local/bin/containerd-shim-godwit-v1" };
const CRUN: Handler = Handler { name: "godwit-crun", shim: "containerd-shim-godwit-v1" };

fn start() -> Result<Bed> {
    need::binaries(&["containerd-shim-godwit-v1", "godwit-snapshotter"])?;
    let bed = Bed::start(&BedOptions::nodes(1).generation(Containerd::of_suite()))?;
    let node = bed.node(0);
    for snapshotter in ["overlayfs", "godwit"] {
        images::import_for_pods(node, Image::Pause, snapshotter)?;
        images::import_for_pods(node, Image::Busybox, snapshotter)?;
    }
    wait_until("the pods' network is ready", SOON, || {
        let status = cri_of(node, async |cri| cri.status(StatusRequest::default()).await)?;
        let conditions = status.status.map(|status| status.conditions).unwrap_or_default();
        Ok(conditions.len() >= 2 && conditions.iter().all(|condition| condition.status))
    })?;
    Ok(bed)
}

fn node() -> &'static Node {
    BED.node(0)
}

/// Makes one call of the CRI's runtime service.
fn cri<T>(
    call: impl AsyncFnOnce(
        &mut RuntimeServiceClient<Channel>,
    ) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T> {
    cri_of(node(), call)
}

fn cri_of<T>(
    node: &Node,
    call: impl AsyncFnOnce(
        &mut RuntimeServiceClient<Channel>,
    ) -> Result<tonic::Response<T>, tonic::Status>,
) -> Result<T> {
    let socket = node.path("/run/containerd/containerd.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut client = RuntimeServiceClient::new(containerd_client::connect(socket).await?);
        Ok(tokio::time::timeout(CALL, call(&mut client)).await??.into_inner())
    })
}

/// A pod; stopped and removed when dropped.
struct Pod {
    id: String,
    handler: Handler,
    config: PodSandboxConfig,
}

impl Pod {
    fn run(handler: Handler, name: &str, pid: NamespaceMode) -> Result<Self> {
        let name = format!("{}-{name}", handler.name);
        let logs = format!("/var/log/pods/{name}");
        node().sh(&format!("rm -rf {logs}; mkdir -p {logs}"))?;
        let namespaces = NamespaceOption { pid: pid.into(), ..Default::default() };
        let security = LinuxSandboxSecurityContext {
            namespace_options: Some(namespaces),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                name,
                attempt: 0,
            }),
            hostname: "pod".into(),
            log_directory: logs,
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/pods".into(),
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        };
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.name.into(),
        };
        let id = cri(async |cri| cri.run_pod_sandbox(request).await)?.pod_sandbox_id;
        Ok(Self { id, handler, config })
    }

    fn create(&self, name: &str, script: &str) -> Result<Member<'_>> {
        self.create_as(name, script, |_| {})
    }

    /// The same with a configuration that `change` has changed.
    fn create_as(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<Member<'_>> {
        let security = LinuxContainerSecurityContext {
            namespace_options: self
                .config
                .linux
                .as_ref()
                .and_then(|linux| linux.security_context.as_ref()?.namespace_options.clone()),
            ..Default::default()
        };
        let resources =
            LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() };
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.into(), attempt: 0 }),
            image: Some(ImageSpec {
                image: Image::Busybox.reference().into(),
                ..Default::default()
            }),
            command: ["sh", "-c", script].map(str::to_owned).into(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: Some(resources),
                security_context: Some(security),
            }),
            ..Default::default()
        };
        change(&mut config);
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let id = cri(async |cri| cri.create_container(request).await)?.container_id;
        Ok(Member { id, log: format!("{}/{name}.log", self.config.log_directory), _pod: self })
    }

    /// A container of the pod that runs.
    fn start(&self, name: &str, script: &str) -> Result<Member<'_>> {
        let member = self.create(name, script)?;
        member.start()?;
        Ok(member)
    }

    fn status(&self) -> Result<PodSandboxStatus> {
        let request = PodSandboxStatusRequest { pod_sandbox_id: self.id.clone(), verbose: false };
        let answer = cri(async |cri| cri.pod_sandbox_status(request).await)?;
        answer.status.context("a pod without a status")
    }

    fn stop(&self) -> Result<()> {
        let request = StopPodSandboxRequest { pod_sandbox_id: self.id.clone() };
        cri(async |cri| cri.stop_pod_sandbox(request).await).map(drop)
    }

    fn remove(&self) -> Result<()> {
        let request = RemovePodSandboxRequest { pod_sandbox_id: self.id.clone() };
        cri(async |cri| cri.remove_pod_sandbox(request).await).map(drop)
    }

    /// Process ids of its shims.
    fn shims(&self) -> Result<Vec<u32>> {
        let pattern = format!("{}.* -id {}", self.handler.shim, self.id);
        let found = node().run(&["pgrep", "-f", &pattern])?;
        found.stdout.lines().map(|line| Ok(line.parse()?)).collect()
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Err(error) = self.stop().and_then(|()| self.remove()) {
            eprintln!("pod {}: not removed: {error:#}", self.id);
        }
    }
}

/// A container of a pod.
struct Member<'a> {
    id: String,
    log: String,
    _pod: &'a Pod,
}

impl Member<'_> {
    fn start(&self) -> Result<()> {
        let request = StartContainerRequest { container_id: self.id.clone() };
        cri(async |cri| cri.start_container(request).await).map(drop)
    }

    fn status(&self) -> Result<ContainerStatus> {
        let request = ContainerStatusRequest { container_id: self.id.clone(), verbose: false };
        let answer = cri(async |cri| cri.container_status(request).await)?;
        answer.status.context("a container without a status")
    }

    fn wait_for_end(&self) -> Result<ContainerStatus> {
        wait_until("the container ends", SOON, || {
            Ok(self.status()?.state() == ContainerState::ContainerExited)
        })?;
        self.status()
    }

    fn stop(&self, timeout: i64) -> Result<()> {
        let request = StopContainerRequest { container_id: self.id.clone(), timeout };
        cri(async |cri| cri.stop_container(request).await).map(drop)
    }

    fn remove(&self) -> Result<()> {
        let request = RemoveContainerRequest { container_id: self.id.clone() };
        cri(async |cri| cri.remove_container(request).await).map(drop)
    }

    fn exec_within(&self, script: &str, timeout: i64) -> Result<ExecSyncResponse> {
        let cmd = ["sh", "-c", script].map(str::to_owned).into();
        let request = ExecSyncRequest { container_id: self.id.clone(), cmd, timeout };
        cri(async |cri| cri.exec_sync(request).await)
    }

    fn exec(&self, script: &str) -> Result<String> {
        let answer = self.exec_within(script, 10)?;
        let (out, error) = (answer.stdout, answer.stderr);
        let error = String::from_utf8_lossy(&error);
        ensure!(answer.exit_code == 0, "{script}: code {}: {error}", answer.exit_code);
        Ok(String::from_utf8(out)?)
    }

    /// What a container has written: stream and text of each line.
    fn lines(path: &str) -> Result<Vec<(String, String)>> {
        let text = std::fs::read_to_string(node().path(path))?;
        let line = |line: &str| {
            // TIME STREAM TAG TEXT
            let mut words = line.splitn(4, ' ').skip(1);
            let stream = words.next()?.to_owned();
            Some((stream, words.nth(1)?.to_owned()))
        };
        text.lines().map(|text| line(text).with_context(|| text.to_owned())).collect()
    }

    fn stats(&self) -> Result<ContainerStats> {
        let request = ContainerStatsRequest { container_id: self.id.clone() };
        let answer = cri(async |cri| cri.container_stats(request).await)?;
        answer.stats.context("a container without statistics")
    }
}

/// What is left of pods in the node: shims, runtime state, mounts, control groups, networks.
fn traces(ids: &[&str]) -> Result<String> {
    let mut found = String::new();
    for id in ids {
        found += &node().run(&["pgrep", "-a", "-f", &format!("-id {id}")])?.stdout;
        found += &node().sh(&format!(
            "ls -d /run/containerd/io.containerd.runtime.v2.task/k8s.io/{id} \
                 /run/containerd/runc/k8s.io/{id} 2> /dev/null || :
             grep {id} /proc/mounts || :
             find /sys/fs/cgroup -type d -name {id}"
        ))?;
    }
    Ok(found)
}

fn a_pod_goes_through_its_life(handler: Handler) -> Result<()> {
    let networks = || node().sh("mkdir -p /run/netns; ls /run/netns");
    let before = networks()?;
    let pod = Pod::run(handler, "life", NamespaceMode::Container)?;
    let status = pod.status()?;
    assert_eq!(status.state(), PodSandboxState::SandboxReady);
    assert_eq!(status.runtime_handler, handler.name);
    let ip = status.network.context("a pod without a network")?.ip;
    node().ok(&["ping", "-q", "-c", "1", "-W", "5", &ip])?;

    let first = pod.create("first", "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done")?;
    assert_eq!(first.status()?.state(), ContainerState::ContainerCreated);
    first.start()?;
    assert_eq!(first.status()?.state(), ContainerState::ContainerRunning);
    let second = pod.start("second", "trap '' TERM; while :; do sleep 0.1; done")?;
    assert_eq!(pod.shims()?.len(), 1, "one shim holds the pod");
    assert!(first.exec("ip addr show eth0")?.contains(&format!("{ip}/")));
    assert_eq!(first.exec("hostname")?, "pod\n");

    wait_until("its output is logged", SOON, || Ok(!Member::lines(&first.log)?.is_empty()))?;
    first.stop(10)?;
    let ended = first.status()?;
    assert_eq!((ended.state(), ended.exit_code), (ContainerState::ContainerExited, 9));
    assert!(ended.finished_at >= ended.started_at && ended.started_at >= ended.created_at);
    // Deaf to the request: killed once the time is over.
    second.stop(1)?;
    assert_eq!(second.wait_for_end()?.exit_code, 137);
    first.remove()?;
    assert!(first.status().is_err());
    assert_eq!(pod.status()?.state(), PodSandboxState::SandboxReady);
    pod.stop()?;
    assert_eq!(pod.status()?.state(), PodSandboxState::SandboxNotready);
    pod.stop()?;
    pod.remove()?;
    let ids = [pod.id.as_str(), &first.id, &second.id];
    wait_until("nothing is left", SOON, || Ok(traces(&ids)?.is_empty()))
        .with_context(|| traces(&ids).unwrap_or_default())?;
    assert_eq!(networks()?, before);
    Ok(())
}

/// Method: the pod is removed with its containers running, as after a kubelet's loss of patience.
fn a_pod_takes_its_containers_along(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "along", NamespaceMode::Container)?;
    let running = pod.start("running", "sleep 600")?;
    let created = pod.create("created", "sleep 600")?;
    let ended = pod.start("ended", "exit 3")?;
    assert_eq!(ended.wait_for_end()?.exit_code, 3);
    pod.stop()?;
    assert_eq!(running.wait_for_end()?.exit_code, 137);
    pod.remove()?;
    let ids = [pod.id.as_str(), &running.id, &created.id, &ended.id];
    wait_until("nothing is left", SOON, || Ok(traces(&ids)?.is_empty()))
        .with_context(|| traces(&ids).unwrap_or_default())
}

fn execs_answer_with_output_and_code(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "exec", NamespaceMode::Container)?;
    let member = pod.start("main", "sleep 600")?;
    let answer = member.exec_within("echo out; echo err >&2; exit 5", 10)?;
    let expected = (b"out\n".to_vec(), b"err\n".to_vec(), 5);
    assert_eq!((answer.stdout, answer.stderr, answer.exit_code), expected);
    let long = member.exec("seq 1 100000")?;
    assert_eq!(long.lines().count(), 100_000);
    let slow = member.exec_within("sleep 60", 1).expect_err("it takes too long").to_string();
    assert!(slow.contains("timeout") || slow.contains("deadline"), "{slow}");
    wait_until("the slow one is killed", SOON, || Ok(!member.exec("ps")?.contains("sleep 60\n")))?;
    let missing = ExecSyncRequest {
        container_id: member.id.clone(),
        cmd: vec!["/no/such/program".into()],
        timeout: 10,
    };
    let error = cri(async |cri| cri.exec_sync(missing).await).expect_err("no such program");
    // runc reports, now and then, that its child went away before it could say why.
    let is_told = error.to_string().contains("/no/such/program");
    assert!(is_told || error.to_string().contains("init-p: connection reset"), "{error}");
    Ok(())
}

/// Method: what a kubelet does: the file is moved away while the container writes, then opened
/// again.
fn logs_can_be_rotated(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "logs", NamespaceMode::Container)?;
    let script = "i=0; while [ $i -lt 300 ]; do i=$((i+1)); echo $i; echo e$i >&2; sleep 0.005; done; \
                  printf tail";
    let member = pod.start("main", script)?;
    let count = |path: &str| Ok::<_, anyhow::Error>(Member::lines(path)?.len());
    wait_until("something is logged", SOON, || Ok(count(&member.log).unwrap_or(0) > 20))?;
    let rotated = format!("{}.1", member.log);
    node().ok(&["mv", &member.log, &rotated])?;
    let request = ReopenContainerLogRequest { container_id: member.id.clone() };
    cri(async |cri| cri.reopen_container_log(request).await)?;
    assert_eq!(member.wait_for_end()?.exit_code, 0);
    assert!(count(&rotated)? > 20 && count(&member.log)? > 20);
    let mut streams: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (stream, text) in [Member::lines(&rotated)?, Member::lines(&member.log)?].concat() {
        streams.entry(stream).or_default().push(text);
    }
    let numbers = |prefix: &str| (1..=300).map(|i| format!("{prefix}{i}")).collect::<Vec<_>>();
    assert_eq!(streams["stderr"], numbers("e"));
    assert_eq!(streams["stdout"][..300], numbers(""));
    assert_eq!(streams["stdout"][300..], ["tail"]);
    Ok(())
}

fn statistics_tell_of_containers_and_pod(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "stats", NamespaceMode::Container)?;
    let script = "dd if=/dev/zero of=/file bs=1M count=8 2> /dev/null; \
                  i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; sleep 600";
    let member = pod.start("main", script)?;
    wait_until("CPU time and memory are counted", SOON, || {
        let stats = member.stats()?;
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |n| n.value);
        let memory = stats.memory.context("no memory")?;
        let working = memory.working_set_bytes.context("no working set")?.value;
        let available = memory.available_bytes.context("no available bytes")?.value;
        ensure!(working > 0 && available < 64 << 20, "{working}, {available}");
        Ok(cpu > 10_000_000)
    })?;
    // containerd measures the writable layers of its default snapshotter only.
    if handler.name == "runc" {
        wait_until("the writable layer is measured", Duration::from_secs(20), || {
            let used = member.stats()?.writable_layer.and_then(|layer| layer.used_bytes);
            Ok(used.is_some_and(|used| used.value >= 8 << 20))
        })?;
    }
    let request = PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
    let stats = cri(async |cri| cri.pod_sandbox_stats(request).await)?.stats;
    let linux = stats.and_then(|stats| stats.linux).context("no statistics of the pod")?;
    assert!(linux.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).is_some_and(|n| n.value > 0));
    assert!(linux.memory.and_then(|m| m.working_set_bytes).is_some_and(|n| n.value > 0));
    assert_eq!(linux.containers.len(), 1);
    assert!(linux.process.and_then(|p| p.process_count).is_some_and(|n| n.value >= 1));
    Ok(())
}

fn limits_can_be_changed(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "update", NamespaceMode::Container)?;
    let member = pod.start("main", "sleep 600")?;
    let limit = || -> Result<u64> {
        let file = format!("/sys/fs/cgroup/memory/pods/{}/memory.limit_in_bytes", member.id);
        Ok(node().ok(&["cat", &file])?.trim().parse()?)
    };
    assert_eq!(limit()?, 64 << 20);
    let linux = LinuxContainerResources {
        memory_limit_in_bytes: 96 << 20,
        cpu_shares: 512,
        ..Default::default()
    };
    let request = UpdateContainerResourcesRequest {
        container_id: member.id.clone(),
        linux: Some(linux),
        ..Default::default()
    };
    cri(async |cri| cri.update_container_resources(request).await)?;
    assert_eq!(limit()?, 96 << 20);
    let shares = format!("/sys/fs/cgroup/cpu/pods/{}/cpu.shares", member.id);
    assert_eq!(
        node()
            .sh(&format!(
                "cat {shares} 2> /dev/null || cat /sys/fs/cgroup/cpu*/pods/{}/cpu.shares",
                member.id
            ))?
            .trim(),
        "512"
    );
    Ok(())
}

/// Method: containers see each other's processes; what one leaves behind ends with it, and what
/// lost its parent is taken in by the pause container.
fn containers_may_share_their_processes(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "shared", NamespaceMode::Pod)?;
    let first = pod.start("first", "sh -c 'sleep 701 & exit 0'; sleep 702 & exec sleep 703")?;
    let second = pod.start("second", "exec sleep 704")?;
    wait_until("the second sees the first", SOON, || {
        let seen = second.exec("ps -o args")?;
        Ok(["sleep 701", "sleep 702", "sleep 703", "sleep 704"].iter().all(|s| seen.contains(s)))
    })?;
    // By signal, from the other container.
    second.exec("kill -9 $(ps -o pid,args | sed -n 's/^ *\\([0-9]*\\) sleep 703$/\\1/p')")?;
    assert_eq!(first.wait_for_end()?.exit_code, 137);
    wait_until("nothing of the first is left", SOON, || {
        let seen = second.exec("ps -o args")?;
        Ok(["sleep 701", "sleep 702", "sleep 703"].iter().all(|sleep| !seen.contains(sleep)))
    })?;
    assert_eq!(second.status()?.state(), ContainerState::ContainerRunning);
    let zombies = second.exec("ps -o stat,args")?;
    assert!(!zombies.lines().any(|line| line.trim_start().starts_with('Z')), "{zombies}");
    Ok(())
}

fn ends_are_told_with_their_reason(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "reasons", NamespaceMode::Container)?;
    let too_much = "exec dd if=/dev/zero of=/dev/null bs=256M count=1";
    for (name, script, code, reason) in [
        ("done", "exit 0", 0, "Completed"),
        ("wrong", "exit 7", 7, "Error"),
        ("signal", "sh -c 'kill -9 $$'; exit $?", 137, "Error"),
        ("memory", too_much, 137, "OOMKilled"),
    ] {
        let ended = pod.start(name, script)?.wait_for_end()?;
        assert_eq!((ended.exit_code, ended.reason.as_str()), (code, reason), "{name}");
    }
    let missing = pod.create("missing", "true")?;
    drop(missing);
    let request = ContainerStatusRequest { container_id: "nosuch".into(), verbose: false };
    assert!(cri(async |cri| cri.container_status(request).await).is_err());
    Ok(())
}

/// Method: one container ends while containerd is away, one lives through it.
fn pods_outlive_containerd(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "restart", NamespaceMode::Container)?;
    let lives = pod.start("lives", "while :; do echo tick; sleep 0.1; done")?;
    let ends = pod.start("ends", "sleep 1.5; exit 8")?;
    let shims = pod.shims()?;
    node().kill_containerd()?;
    wait_until("it ends while containerd is away", SOON, || {
        Ok(!node().run(&["pgrep", "-f", "^sleep 1.5$"])?.succeeded())
    })?;
    node().start_containerd()?;
    wait_until("the CRI answers", SOON, || Ok(pod.status().is_ok()))?;
    assert_eq!(pod.status()?.state(), PodSandboxState::SandboxReady);
    let code = ends.wait_for_end()?.exit_code;
    // Of a shim whose only process has ended, containerd's does not always tell the code any more.
    assert!(code == 8 || (handler.name == "runc" && code == 255), "{code}");
    assert_eq!(lives.status()?.state(), ContainerState::ContainerRunning);
    assert_eq!(lives.exec("echo yes")?, "yes\n");
    assert_eq!(pod.shims()?, shims);
    let before = Member::lines(&lives.log)?.len();
    wait_until("its output is logged on", SOON, || Ok(Member::lines(&lives.log)?.len() > before))?;
    let again = pod.start("again", "exit 4")?;
    assert_eq!(again.wait_for_end()?.exit_code, 4);
    Ok(())
}

/// Method: the shim dies; a kubelet sees the end of pod and containers, and can make room.
fn a_pod_without_its_shim_is_over(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "noshim", NamespaceMode::Container)?;
    let member = pod.start("main", "sleep 705")?;
    let [shim] = pod.shims()?[..] else { bail!("a pod has one shim") };
    node().ok(&["kill", "-KILL", &shim.to_string()])?;
    assert_ne!(member.wait_for_end()?.exit_code, 0);
    wait_until("the pod is not ready", SOON, || {
        Ok(pod.status()?.state() == PodSandboxState::SandboxNotready)
    })?;
    pod.stop()?;
    pod.remove()?;
    if handler.name == "runc" && Containerd::of_suite() == Containerd::V2 {
        // There containerd cleans up behind the pause container alone, and its shim does not see to
        // the rest.
        return Ok(());
    }
    let ids = [pod.id.as_str(), &member.id];
    wait_until("nothing is left", SOON, || {
        let runs = node().run(&["pgrep", "-f", "^sleep 705"])?.succeeded();
        Ok(!runs && traces(&ids)?.is_empty())
    })
    .with_context(|| traces(&ids).unwrap_or_default())
}

/// Method: containerd hands over the options of a handler as TOML.
#[test]
fn options_of_a_handler_choose_crun() -> Result<()> {
    let pod = Pod::run(CRUN, "crun", NamespaceMode::Container)?;
    let member = pod.start("main", "trap 'exit 6' TERM; while :; do sleep 0.1; done")?;
    node().ok(&["test", "-f", &format!("/run/containerd/runc/k8s.io/{}/status", member.id)])?;
    assert_eq!(member.exec("echo yes")?, "yes\n");
    assert_eq!(pod.shims()?.len(), 1);
    member.stop(10)?;
    assert_eq!(member.status()?.exit_code, 6);
    Ok(())
}

/// Method: the shim's answer to `-info`, and what containerd 2 makes of it; 1.7 never asks.
#[test]
fn our_shim_tells_the_features_of_runc() -> Result<()> {
    let inspected = |runtime: &str| -> Result<serde_json::Value> {
        let ctr = format!("{CONTAINERD_2}/usr/bin/ctr");
        let told = node().ok(&[&ctr, "plugins", "inspect-runtime", "--runtime", runtime])?;
        Ok(serde_json::from_str(&told)?)
    };
    let features: serde_json::Value = serde_json::from_str(&node().ok(&["runc", "features"])?)?;
    let said = node().ok(&[GODWIT.shim, "-info"])?;
    let (begin, end) = (said.find('{').context("no JSON")?, said.rfind('}').context("no JSON")?);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&said[begin..=end])?, features);
    if Containerd::of_suite() == Containerd::V2 {
        let (ours, theirs) =
            (inspected("io.containerd.runc.godwit.v1")?, inspected("io.containerd.runc.v2")?);
        assert_eq!(ours["Name"], "io.containerd.runc.godwit.v1");
        assert!(ours["Features"]["linux"].is_object(), "{ours}");
        assert_eq!(ours["Features"], theirs["Features"]);
    }
    Ok(())
}

/// containerd tells what pods may ask of each handler: user namespaces, recursive read-only mounts.
#[test]
fn pods_may_ask_for_as_much_as_under_runc() -> Result<()> {
    let status = cri(async |cri| cri.status(StatusRequest::default()).await)?;
    let features = |handler: Handler| {
        let mut all = status.runtime_handlers.iter();
        all.find(|told| told.name == handler.name).and_then(|told| told.features)
    };
    assert_eq!(features(GODWIT), features(RUNC));
    if Containerd::of_suite() == Containerd::V2 {
        let ours = features(GODWIT).context("containerd tells no features")?;
        // User namespaces need a newer runc than the nodes have, under either shim.
        assert!(ours.recursive_read_only_mounts, "{ours:?}");
    }
    Ok(())
}

with_both_handlers! {
    a_pod_goes_through_its_life,
    a_pod_takes_its_containers_along,
    execs_answer_with_output_and_code,
    logs_can_be_rotated,
    statistics_tell_of_containers_and_pod,
    limits_can_be_changed,
    containers_may_share_their_processes,
    ends_are_told_with_their_reason,
    pods_outlive_containerd,
    a_pod_without_its_shim_is_over,
}
