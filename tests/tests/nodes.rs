//! The test nodes themselves: that they are apart, that they can be disturbed, and that they go
//! away.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::load::{Load, LoadOptions};
use godwit_tests::{Bed, BedOptions, Node, memhog, place, run};

fn plain(nodes: u8) -> BedOptions {
    BedOptions::nodes(nodes).without_daemon()
}

/// `ctr run -d` with overlayfs and runc; `extra` goes before the image.
fn run_detached(
    node: &Node,
    extra: &[&str],
    image: Image,
    id: &str,
    command: &[&str],
) -> Result<()> {
    let mut words = vec!["ctr", "run", "-d"];
    words.extend(extra);
    words.extend([image.reference(), id]);
    words.extend(command);
    node.ok(&words).map(drop)
}

fn reaches(node: &Node, other: &Node) -> Result<bool> {
    let address = other.address().to_string();
    Ok(node.run(&["ping", "-q", "-c", "1", "-W", "1", &address])?.succeeded())
}

#[test]
fn nodes_are_apart_and_reach_each_other() -> Result<()> {
    let bed = Bed::start(&plain(2))?;
    let (a, b) = (bed.node(0), bed.node(1));
    assert!(reaches(a, b)? && reaches(b, a)?);
    for node in bed.nodes() {
        assert_eq!(node.ok(&["hostname"])?.trim(), node.name());
        // Process 1 is the node's own, and its groups are the top of what it sees.
        assert_eq!(node.sh("cat /proc/1/comm")?.trim(), "tini");
        let groups = node.sh("cut -d: -f3 /proc/1/cgroup | sort -u")?;
        assert!(["/", "/init"].contains(&groups.trim()), "{groups}");
        node.ok(&["criu", "check"])?;
        let plugins = node.sh("ctr plugins ls | grep -E 'cri |godwit'")?;
        assert_eq!(plugins.matches(" ok").count(), 2, "CRI and our snapshotter: {plugins}");
        let merged = node.ok(&["containerd", "config", "dump"])?;
        for part in
            ["restrict_oom_score_adj = true", "containerd.runtimes.godwit]", "runtimes.runc]"]
        {
            assert!(merged.contains(part), "{part}");
        }
    }
    node_files_are_apart(a, b)
}

fn node_files_are_apart(a: &Node, b: &Node) -> Result<()> {
    a.sh("echo here > /etc/mark")?;
    ensure!(a.path("/etc/mark").is_file() && !b.path("/etc/mark").exists());
    Ok(())
}

/// Method: the files that users install, and a containerd whose `imports` line stands below a
/// table, which containerd ignores without a word.
#[test]
fn the_shipped_configuration_starts_and_status_tells_what_containerd_lacks() -> Result<()> {
    let bed = Bed::start(&BedOptions::nodes(1).bare())?;
    let node = bed.node(0);
    let shipped = std::fs::read_to_string(place::workspace().join("docs/deploy/godwit.toml"))?;
    std::fs::write(node.path("/etc/godwit/godwit.toml"), shipped)?;
    node.start_daemon()?;
    let status = node.ok(&["godwit", "status"])?;
    ensure!(status.contains("node edge-a, godwit"), "{status}");
    ensure!(status.contains("containerd does not answer"), "{status}");
    ensure!(status.contains("listening on nowhere"), "{status}");

    let imports = "imports = [\"/etc/containerd/conf.d/*.toml\"]\n";
    for (config, words) in [
        (
            format!("version = 2\n[debug]\n  level = \"info\"\n{imports}"),
            "has NO snapshotter \"godwit\"",
        ),
        (format!("version = 2\n{imports}"), "has the snapshotter \"godwit\""),
    ] {
        std::fs::write(node.path("/etc/containerd/config.toml"), config)?;
        node.start_containerd()?;
        let status = node.ok(&["godwit", "status"])?;
        ensure!(status.contains(words), "{status}");
        if words.contains("NO") {
            wait_until("the log says so too", Duration::from_secs(10), || {
                Ok(node.log("daemon").contains("has no snapshotter \"godwit\""))
            })?;
        }
        node.stop_containerd()?;
    }
    Ok(())
}

#[test]
fn commands_give_their_output_code_and_keep_their_deadline() -> Result<()> {
    let bed = Bed::start(&BedOptions::nodes(1).bare())?;
    let node = bed.node(0);
    let finished = node.run(&["sh", "-c", "echo out; echo err >&2; exit 7"])?;
    assert_eq!(
        (finished.code, finished.stdout.as_str(), finished.stderr.as_str()),
        (7, "out\n", "err\n")
    );
    assert_eq!(node.command(&["cat"]).stdin("in").ok()?, "in");
    let begin = Instant::now();
    let error = node.command(&["sleep", "60"]).timeout(Duration::from_millis(300)).run();
    assert!(error.unwrap_err().to_string().contains("still running"));
    assert!(begin.elapsed() < Duration::from_secs(5));
    // The command itself is gone, not only what was waiting for it outside.
    wait_until("sleep 60 is killed", Duration::from_secs(5), || {
        Ok(!node.run(&["pgrep", "-f", "^sleep 60"])?.succeeded())
    })
}

#[test]
fn links_are_shaped_cut_and_mended_and_their_bytes_are_counted() -> Result<()> {
    let bed = Bed::start(&BedOptions::nodes(2).bare().rate_mbit(80))?;
    let (a, b) = (bed.node(0), bed.node(1));
    let transfer = || -> Result<f64> {
        let listener = b.in_network(|| Ok(TcpListener::bind((b.address(), 9000))?))?;
        let begin = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                a.in_network(|| {
                    let mut stream = TcpStream::connect((b.address(), 9000))?;
                    Ok(stream.write_all(&vec![7; 4 << 20])?)
                })
            });
            let received = std::io::copy(&mut listener.accept()?.0, &mut std::io::sink())?;
            ensure!(received == 4 << 20, "{received} bytes arrived");
            Ok(begin.elapsed().as_secs_f64())
        })
    };
    let before = (a.traffic()?, b.traffic()?);
    let slow = transfer()?;
    let (sent, received) = ((a.traffic()? - before.0).sent, (b.traffic()? - before.1).received);
    // 4 MiB at 80 Mbit/s are 0.42 s, less what the bucket holds; a busy machine takes longer.
    assert!((0.35..3.0).contains(&slow), "{slow} s");
    assert!(sent > 4 << 20 && received > 4 << 20 && sent < 5 << 20, "{sent} {received}");
    a.set_rate(None)?;
    b.set_rate(None)?;
    let fast = transfer()?;
    assert!(fast < slow, "unlimited {fast} s, limited {slow} s");
    a.cut_link()?;
    assert!(!reaches(a, b)?);
    a.mend_link()?;
    assert!(reaches(a, b)?);
    Ok(())
}

#[test]
fn beds_run_side_by_side_with_the_same_node_names() -> Result<()> {
    let (first, second) = (Bed::start(&plain(1))?, Bed::start(&plain(1))?);
    assert_ne!(first.number(), second.number());
    assert_ne!(first.node(0).address(), second.node(0).address());
    for bed in [&first, &second] {
        images::import(bed.node(0), Image::Busybox, "overlayfs")?;
        run_detached(bed.node(0), &[], Image::Busybox, "same", &["sleep", "600"])?;
    }
    drop(first);
    let tasks = second.node(0).ok(&["ctr", "task", "ls"])?;
    assert!(tasks.contains("same") && tasks.contains("RUNNING"), "{tasks}");
    Ok(())
}

#[test]
fn a_container_survives_containerd_and_goes_through_criu() -> Result<()> {
    let bed = Bed::start(&plain(1))?;
    let node = bed.node(0);
    images::import(node, Image::Busybox, "overlayfs")?;
    run_detached(node, &[], Image::Busybox, "c1", &["sh", "-c", "while :; do sleep 0.1; done"])?;
    node.kill_containerd()?;
    node.start_containerd()?;
    assert!(node.ok(&["ctr", "task", "ls"])?.contains("RUNNING"));
    node.ok(&["ctr", "c", "checkpoint", "--rw", "--task", "--image", "c1", "kept"])?;
    node.sh("ctr task rm -f c1; ctr c rm c1")?;
    node.ok(&["ctr", "c", "restore", "--rw", "--live", "c1", "kept"])?;
    assert!(node.ok(&["ctr", "task", "ls"])?.contains("RUNNING"));
    Ok(())
}

/// Method: redis as another user, so that its dump needs the preload library where root is not
/// whole.
#[test]
fn redis_is_watched_by_a_client_that_checks_every_value() -> Result<()> {
    let bed = Bed::start(&plain(1))?;
    let node = bed.node(0);
    images::import(node, Image::Redis, "overlayfs")?;
    let network = node.add_network("redis", bed.container_address(1))?;
    let namespace = format!("network:{}", network.path);
    let command = ["redis-server", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];
    run_detached(
        node,
        &["--with-ns", &namespace, "--user", "101:101"],
        Image::Redis,
        "redis",
        &command,
    )?;
    let address = SocketAddr::from((network.address, 6379));
    let unused = SocketAddr::from((bed.container_address(2), 6379));
    let options = LoadOptions {
        addresses: vec![unused, address],
        bytes_per_s: 4 << 20,
        value_bytes: 4096,
        keys: 500,
    };
    let load = Load::start(bed.client_namespace(), options)?;
    load.wait_for(500, Duration::from_secs(20))?;
    // An outage of half a second is seen as one: the container is frozen meanwhile.
    node.ok(&["ctr", "task", "pause", "redis"])?;
    std::thread::sleep(Duration::from_millis(500));
    node.ok(&["ctr", "task", "resume", "redis"])?;
    load.wait_for(500, Duration::from_secs(20))?;
    let report = load.stop()?;
    assert!((450..1000).contains(&report.longest_gap.as_millis()), "{:?}", report.gaps);
    assert_eq!(report.beats[0], 0);
    let verdict = bed.as_client(|| report.ledger.verify(address))?;
    assert!(verdict.wrong.is_empty() && verdict.values > 100, "{verdict:?}");
    assert!(
        node.run(&["ctr", "task", "exec", "--exec-id", "x", "redis", "test", "-e", "/etc/issue"])?
            .code
            == 1
    );
    node.ok(&["ctr", "task", "checkpoint", "redis"])?;
    // Values that someone else writes are noticed.
    bed.as_client(|| {
        let mut client = godwit_tests::redis::Client::connect(address, Duration::from_secs(1))?;
        client.set("key:1", b"torn")?;
        ensure!(report.ledger.verify(address)?.wrong.len() == 1);
        Ok(())
    })
}

#[test]
fn memhog_beats_and_checks_its_memory() -> Result<()> {
    let bed = Bed::start(&plain(1))?;
    let node = bed.node(0);
    images::import(node, Image::Memhog, "overlayfs")?;
    let network = node.add_network("hog", bed.container_address(1))?;
    node.sh("mkdir -p /var/lib/godwit/volume")?;
    run_detached(
        node,
        &[
            "--with-ns",
            &format!("network:{}", network.path),
            "--mount",
            "type=bind,src=/var/lib/godwit/volume,dst=/data,options=rbind:rw",
        ],
        Image::Memhog,
        "hog",
        &[
            "memhog",
            "--resident-mib",
            "16",
            "--dirty-mib-per-s",
            "8",
            "--listen",
            "7000",
            "--volume",
            "/data",
        ],
    )?;
    let address = SocketAddr::from((network.address, 7000));
    let beats = || std::fs::read_to_string(node.path("/var/lib/godwit/volume/beats"));
    wait_until("memhog beats", Duration::from_secs(20), || {
        Ok(beats().is_ok_and(|b| b.len() > 1000))
    })?;
    let first = bed.as_client(|| memhog::stat(address))?;
    wait_until("it beats on", Duration::from_secs(5), || {
        Ok(bed.as_client(|| memhog::stat(address))?.beats > first.beats + 10)
    })?;
    let second = bed.as_client(|| memhog::verify(address))?;
    assert_eq!((second.pages, second.bad_pages, second.incarnation), (4096, 0, first.incarnation));
    assert!(second.writes > first.writes);
    let text = beats()?;
    let whole = &text[..text.rfind('\n').unwrap_or(0)];
    assert!(memhog::longest_gap(whole)? < Duration::from_secs(2));
    Ok(())
}

/// Method: a running and a frozen container, a cut link, and a daemon of our own in the background.
#[test]
fn a_bed_that_is_dropped_leaves_nothing() -> Result<()> {
    let bed = Bed::start(&plain(2))?;
    let number = bed.number();
    let node = bed.node(0);
    images::import(node, Image::Busybox, "overlayfs")?;
    for id in ["running", "frozen"] {
        run_detached(node, &[], Image::Busybox, id, &["sleep", "600"])?;
    }
    node.ok(&["ctr", "task", "pause", "frozen"])?;
    node.sh("setsid sleep 1234 > /dev/null 2>&1 &")?;
    bed.node(1).crash()?;
    drop(bed);
    assert_eq!(run::traces(number)?, [""; 0]);
    Ok(())
}

#[test]
fn a_bed_that_panics_leaves_nothing() -> Result<()> {
    let mut number = None;
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let bed = Bed::start(&plain(1)).unwrap();
        number = Some(bed.number());
        panic!("on purpose, for the test of the teardown");
    }));
    assert!(outcome.is_err());
    assert_eq!(run::traces(number.context("the bed did not start")?)?, [""; 0]);
    Ok(())
}

/// `testbed up` as a process of its own, and the number of its run.
fn testbed_up() -> Result<(Child, u32)> {
    let log = tempfile::NamedTempFile::new()?;
    let child = Command::new(env!("CARGO_BIN_EXE_testbed"))
        .args(["up", "1", "--without-daemon"])
        .stdout(Stdio::from(log.reopen()?))
        .spawn()?;
    let mut number = None;
    wait_until("testbed up is ready", Duration::from_secs(60), || {
        let text = std::fs::read_to_string(log.path())?;
        let line = text.lines().find_map(|line| line.strip_prefix("run "));
        number = line.and_then(|line| line.split(',').next()).and_then(|n| n.parse().ok());
        Ok(number.is_some())
    })?;
    Ok((child, number.context("no number")?))
}

fn signal(child: &Child, name: &str) -> Result<()> {
    let status = Command::new("kill").args([name, &child.id().to_string()]).status()?;
    ensure!(status.success(), "kill {name}");
    Ok(())
}

#[test]
fn a_run_that_is_interrupted_leaves_nothing() -> Result<()> {
    for name in ["-INT", "-TERM", "-HUP"] {
        let (mut child, number) = testbed_up()?;
        signal(&child, name)?;
        assert!(!child.wait()?.success());
        // The lock file's text stays for the next run to look after, and says so.
        let traces = run::traces(number)?;
        let lock_only = traces.iter().all(|trace| trace.starts_with("lock file"));
        assert!(lock_only, "{name}: {traces:?}");
    }
    run::clean()?;
    Ok(())
}

#[test]
fn a_run_that_is_killed_is_removed_by_clean() -> Result<()> {
    let (mut child, number) = testbed_up()?;
    let trace = PathBuf::from(format!("/run/netns/gw{number}-edge-a"));
    assert!(trace.exists());
    // As long as its owner lives, no other process touches it.
    assert!(!run::clean()?.contains(&number));
    signal(&child, "-KILL")?;
    child.wait()?;
    assert!(trace.exists());
    assert!(run::clean()?.contains(&number));
    assert_eq!(run::traces(number)?, [""; 0]);
    Ok(())
}
