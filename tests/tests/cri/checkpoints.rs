//! The CRI's checkpoints: an archive of a container that runs on, and a container made from one.
//! containerd 1.7 has none of it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};

use super::*;

/// Our shim by its name. containerd gives CRIU a work directory only under the name of its own.
const BY_NAME: Handler = Handler { name: "godwit-by-name", shim: "containerd-shim-godwit-v1" };
/// Where the base image of a checkpoint is asked for, although the node has it.
const REGISTRY: &str = "localhost:5000";

impl Member<'_> {
    /// Makes a checkpoint; `None` where containerd has none.
    fn checkpoint(&self, name: &str) -> Result<Option<String>> {
        let location = format!("/var/lib/containerd/{name}.tar");
        node().sh(&format!("rm -f {location}"))?;
        let request = CheckpointContainerRequest {
            container_id: self.id.clone(),
            location: location.clone(),
            timeout: 0,
        };
        let outcome = cri(async |cri| cri.checkpoint_container(request).await);
        if Containerd::of_suite() == Containerd::V2 {
            return outcome.map(|_| Some(location));
        }
        let refused = outcome.expect_err("containerd 1.7 has no checkpoints");
        let code = refused.downcast_ref::<tonic::Status>().map(tonic::Status::code);
        assert_eq!(code, Some(tonic::Code::Unimplemented), "{refused}");
        Ok(None)
    }
}

/// Asserts that the archive holds the whole container.
fn is_complete(handler: Handler, archive: &str, file: &str) -> Result<()> {
    let listed = node().ok(&["tar", "-tf", archive])?;
    let mut expected = vec!["config.dump", "spec.dump", "status.dump", "container.log", "status"];
    expected.extend(["rootfs-diff.tar", "checkpoint/inventory.img", "checkpoint/pages-1.img"]);
    if handler.name != BY_NAME.name {
        expected.extend(["dump.log", "stats-dump"]);
    }
    for name in expected {
        assert!(listed.lines().any(|line| line == name), "no {name}: {listed}");
    }
    let layer = node().sh(&format!("tar -xOf {archive} rootfs-diff.tar | tar -tzf -"))?;
    assert!(layer.lines().any(|line| line == file), "{layer}");
    Ok(())
}

fn a_checkpoint_is_complete_and_its_container_runs_on(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "checkpoint", NamespaceMode::Container)?;
    let script = "i=0; while :; do i=$((i+1)); echo $i; echo $i > /count; sleep 0.05; done";
    let member = pod.start("main", script)?;
    let count = || -> Result<u32> { Ok(member.exec("cat /count")?.trim().parse().unwrap_or(0)) };
    wait_until("it counts", SOON, || Ok(count()? > 3))?;
    for round in ["first", "second"] {
        let Some(archive) = member.checkpoint(&format!("{}-{round}", handler.name))? else {
            return Ok(());
        };
        is_complete(handler, &archive, "count")?;
        assert_eq!(member.status()?.state(), ContainerState::ContainerRunning);
        let then = count()?;
        wait_until("it counts on", SOON, || Ok(count()? > then))?;
        node().ok(&["rm", &archive])?;
    }
    Ok(())
}

#[test]
fn a_handler_by_name_checkpoints_too() -> Result<()> {
    a_checkpoint_is_complete_and_its_container_runs_on(BY_NAME)
}

fn a_terminal_is_checkpointed_too(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "terminal", NamespaceMode::Container)?;
    let terminal = |config: &mut ContainerConfig| (config.stdin, config.tty) = (true, true);
    let member = pod.create_as("main", "echo ready > /ready; read line", terminal)?;
    member.start()?;
    wait_until("it waits", SOON, || Ok(member.exec("cat /ready").is_ok()))?;
    if let Some(archive) = member.checkpoint(&format!("{}-terminal", handler.name))? {
        is_complete(handler, &archive, "ready")?;
        assert_eq!(member.status()?.state(), ContainerState::ContainerRunning);
        node().ok(&["rm", &archive])?;
    }
    Ok(())
}

/// Method: connections are not asked for by containerd, so they are refused.
fn a_checkpoint_that_fails_leaves_its_container_alone(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "refused", NamespaceMode::Container)?;
    let script = "(sleep 600 | nc -l -p 7000) & sleep 0.5; sleep 600 | nc 127.0.0.1 7000";
    let member = pod.start("main", script)?;
    let ended = pod.start("ended", "exit 0")?;
    wait_until("it is connected", SOON, || {
        Ok(member.exec("netstat -tn")?.contains("ESTABLISHED"))
    })?;
    let name = format!("{}-refused", handler.name);
    ended.wait_for_end()?;
    for refused in [member.checkpoint(&name), ended.checkpoint(&name)] {
        if Containerd::of_suite() == Containerd::V2 {
            let why = refused.expect_err("it cannot be dumped").to_string();
            let is_told = why.contains("Connected TCP socket") || why.contains("EXITED");
            assert!(is_told || handler.name == "runc", "{why}");
        }
        assert!(!node().path(format!("/var/lib/containerd/{name}.tar")).exists());
    }
    assert_eq!(member.status()?.state(), ContainerState::ContainerRunning);
    Ok(())
}

/// Answers, in the node, for the manifest that its containerd has; on a thread that ends with the
/// process.
fn serve_manifest(digest: String, manifest: Vec<u8>) -> Result<()> {
    let listener = node().in_network(|| Ok(TcpListener::bind("127.0.0.1:5000")?))?;
    let answer = move |stream: TcpStream| -> Result<()> {
        stream.set_read_timeout(Some(SOON))?;
        let mut lines = BufReader::new(&stream).lines();
        let asked = lines.next().context("no request")??;
        while !lines.next().context("half a request")??.is_empty() {}
        let mut words = asked.split(' ');
        let (method, path) = (words.next(), words.next().unwrap_or_default());
        if path != format!("/v2/redis/manifests/{digest}") {
            return Ok(write!(&stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?);
        }
        write!(
            &stream,
            "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\n\
             Docker-Content-Digest: {digest}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            manifest.len()
        )?;
        let body = if method == Some("GET") { manifest.as_slice() } else { &[] };
        Ok((&stream).write_all(body)?)
    };
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            if let Err(error) = answer(stream) {
                eprintln!("registry: {error:#}");
            }
        }
    });
    Ok(())
}

/// The image of redis under a name of our registry alone, for both snapshotters.
static REDIS: LazyLock<String> = LazyLock::new(|| redis().expect("the image can be had"));

fn redis() -> Result<String> {
    for snapshotter in ["overlayfs", "godwit"] {
        images::import_for_pods(node(), Image::Redis, snapshotter)?;
    }
    let (old, new) = (Image::Redis.reference(), format!("{REGISTRY}/redis:test"));
    let ctr = |words: &[&str]| node().ok(&[&["ctr", "-n", "k8s.io"], words].concat());
    ctr(&["images", "tag", old, &new])?;
    let listed = ctr(&["images", "ls", &format!("name=={new}")])?;
    let digest = listed.split_whitespace().find(|word| word.starts_with("sha256:"));
    let digest = digest.context("an image without a digest")?.to_owned();
    // The name that a pull would have left, which is the one that a checkpoint notes.
    ctr(&["images", "tag", &new, &format!("{REGISTRY}/redis@{digest}")])?;
    ctr(&["images", "rm", "--sync", old])?;
    let manifest = ctr(&["content", "get", &digest])?;
    serve_manifest(digest, manifest.into_bytes())?;
    wait_until("the CRI knows the image", SOON, || {
        let request = ImageStatusRequest {
            image: Some(ImageSpec { image: new.clone(), ..Default::default() }),
            ..Default::default()
        };
        Ok(image(request)?.image.is_some_and(|image| !image.repo_digests.is_empty()))
    })?;
    Ok(new)
}

fn image(request: ImageStatusRequest) -> Result<ImageStatusResponse> {
    let socket = node().path("/run/containerd/containerd.sock");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let channel = containerd_client::connect(socket).await?;
        let mut client = v1::image_service_client::ImageServiceClient::new(channel);
        Ok(tokio::time::timeout(CALL, client.image_status(request)).await??.into_inner())
    })
}

/// Method: what redis knows in memory, and what lies in the container's writable layer.
fn a_container_comes_back_from_its_archive(handler: Handler) -> Result<()> {
    let pod = Pod::run(handler, "before", NamespaceMode::Container)?;
    let command = ["redis-server", "--save", "", "--protected-mode", "no"].map(str::to_owned);
    let of_image = |reference: String| {
        let command = command.clone();
        move |config: &mut ContainerConfig| {
            config.image = Some(ImageSpec { image: reference, ..Default::default() });
            config.command = command.into();
        }
    };
    let member = pod.create_as("main", "", of_image(REDIS.clone()))?;
    member.start()?;
    let answers =
        |member: &Member<'_>| member.exec("redis-cli ping").is_ok_and(|said| said == "PONG\n");
    wait_until("redis answers", SOON, || Ok(answers(&member)))?;
    member.exec("redis-cli set key value; echo text > /file")?;
    let Some(archive) = member.checkpoint(&format!("{}-redis", handler.name))? else {
        return Ok(());
    };
    drop(pod);

    let other = Pod::run(handler, "after", NamespaceMode::Container)?;
    let restored = other.create_as("main", "", of_image(archive.clone()))?;
    restored.start()?;
    wait_until("redis answers again", SOON, || Ok(answers(&restored)))?;
    assert_eq!(restored.exec("redis-cli get key; cat /file")?, "value\ntext\n");
    assert_eq!(restored.status()?.state(), ContainerState::ContainerRunning);
    assert_eq!(other.shims()?.len(), 1);
    restored.stop(10)?;
    assert_eq!(restored.status()?.exit_code, 0);
    node().ok(&["rm", &archive]).map(drop)
}

with_both_handlers! {
    a_checkpoint_is_complete_and_its_container_runs_on,
    a_terminal_is_checkpointed_too,
    a_checkpoint_that_fails_leaves_its_container_alone,
    a_container_comes_back_from_its_archive,
}
