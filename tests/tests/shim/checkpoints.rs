//! Checkpoint and restore with every option that containerd has, and of containers that hold more
//! than memory: connections, locks, deleted files, terminals, other processes.
//!
//! Programs are written in Perl, which the node's own `/usr` has; it is mounted into the
//! containers.

use std::sync::atomic::{AtomicU32, Ordering};

use containerd_client::services::v1::CheckpointTaskRequest;
use prost::Message as _;
use prost_types::Any;

use super::calls::{Fifo, Streams, Task, refusal};
use super::*;

/// `containerd.runc.v1.CheckpointOptions`.
#[derive(Clone, PartialEq, prost::Message)]
struct Options {
    #[prost(bool, tag = "1")]
    exit: bool,
    #[prost(bool, tag = "2")]
    open_tcp: bool,
    #[prost(bool, tag = "3")]
    external_unix_sockets: bool,
    #[prost(bool, tag = "4")]
    terminal: bool,
    #[prost(bool, tag = "5")]
    file_locks: bool,
    #[prost(string, repeated, tag = "6")]
    empty_namespaces: Vec<String>,
    #[prost(string, tag = "8")]
    image_path: String,
    #[prost(string, tag = "9")]
    work_path: String,
}

/// `containerd.runc.v1.Options`, as far as restoring needs them.
#[derive(Clone, PartialEq, prost::Message)]
struct RestoreOptions {
    #[prost(string, tag = "10")]
    criu_image_path: String,
    #[prost(string, tag = "11")]
    criu_work_path: String,
}

/// A container, and the directories of its checkpoint.
struct Subject {
    task: Task,
    directory: String,
}

impl Subject {
    /// A container that runs `script`. `extra` are options of `ctr container create`.
    fn start(
        runtime: &Runtime,
        name: &str,
        extra: &[&str],
        streams: &Streams,
        script: &str,
    ) -> Result<Self> {
        let usr = ["--mount", "type=bind,src=/usr,dst=/usr,options=rbind:ro"];
        let task = Task::of(runtime, name, &[&usr, extra].concat(), script)?;
        task.create(streams, None)?;
        task.start("")?;
        let directory = format!("/run/checkpoints/{}", task.container.id);
        node().sh(&format!("rm -rf {directory}; mkdir -p {directory}"))?;
        Ok(Self { task, directory })
    }

    /// Dumps into `directory/image`, with CRIU's log in `directory/work`. As containerd's client
    /// does, it pauses what is to go on: CRIU's own freezing gives up, now and then, on a container
    /// that forks.
    fn checkpoint(&self, options: Options) -> Result<()> {
        let id = &self.task.container.id;
        let is_paused = !options.exit && ctr(&["task", "pause", id])?.succeeded();
        let options = Options {
            image_path: format!("{}/image", self.directory),
            work_path: format!("{}/work", self.directory),
            ..options
        };
        let options = Any {
            type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
            value: options.encode_to_vec(),
        };
        let request = CheckpointTaskRequest {
            container_id: id.clone(),
            options: Some(options),
            ..Default::default()
        };
        let outcome =
            ask(async |tasks| tasks.checkpoint(with_namespace!(request, "default")).await);
        if is_paused {
            ctr_ok(&["task", "resume", id])?;
        }
        outcome.map(drop)
    }

    /// Ends the container if it runs, and begins it again from its checkpoint.
    fn restore(&self, streams: &Streams) -> Result<()> {
        if self.task.container.status()? != "STOPPED" {
            self.task.kill("", 9)?;
        }
        self.task.wait("")?;
        self.task.delete()?;
        let options = RestoreOptions {
            criu_image_path: format!("{}/image", self.directory),
            criu_work_path: format!("{}/restore", self.directory),
        };
        let options = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: options.encode_to_vec(),
        };
        self.task.create(streams, Some(options))?;
        self.task.start("").map(drop).with_context(|| {
            let log = node().path(format!("{}/restore/restore.log", self.directory));
            let text = std::fs::read_to_string(log).unwrap_or_default();
            text.lines().filter(|line| line.contains("Error")).collect::<Vec<_>>().join("\n")
        })
    }

    /// What a line of shell in the container says.
    fn says(&self, script: &str) -> Result<String> {
        // Each exec needs a name of its own.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("x{}", NEXT.fetch_add(1, Ordering::Relaxed));
        Ok(self.task.container.exec(&id, script)?.stdout.trim().to_owned())
    }

    fn wait_until_says(&self, script: &str, text: &str) -> Result<()> {
        wait_until(&format!("{script:?} says {text:?}"), SOON, || Ok(self.says(script)? == text))
            .with_context(|| self.says(script).unwrap_or_default())
    }
}

/// Method: the images and CRIU's log lie where the options say; what counts goes on, here and after
/// the restore, and ends only if that was asked for.
fn a_checkpoint_lies_where_its_options_say(runtime: &Runtime) -> Result<()> {
    let script = "i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.1; done";
    let subject = Subject::start(runtime, "paths", &[], &Streams::default(), script)?;
    let count = || -> Result<u32> { Ok(subject.says("cat /count")?.parse().unwrap_or(0)) };
    wait_until("it counts", SOON, || Ok(count()? > 5))?;
    subject.checkpoint(Options::default())?;
    assert_eq!(subject.task.container.status()?, "RUNNING");
    let there = ["image/inventory.img", "image/pages-1.img", "work/dump.log", "work/stats-dump"];
    for file in there {
        node().ok(&["test", "-s", &format!("{}/{file}", subject.directory)])?;
    }
    let then = count()?;
    wait_until("it counts on", SOON, || Ok(count()? > then))?;

    node().sh(&format!("rm -r {}/image", subject.directory))?;
    subject.checkpoint(Options { exit: true, ..Options::default() })?;
    assert_eq!(subject.task.wait("")?, 137);
    subject.restore(&Streams::default())?;
    node().ok(&["test", "-s", &format!("{}/restore/restore.log", subject.directory)])?;
    wait_until("it counts on", SOON, || Ok(count()? > then + 5))?;
    Ok(())
}

/// Method: a connection within the container, whose network outlives it, as one of the CNI does;
/// one word is sent before the dump and one after.
fn open_connections_are_kept_if_asked_for(runtime: &Runtime) -> Result<()> {
    let script = r#"exec perl -MIO::Socket::INET -e '
        my $server = IO::Socket::INET->new(Listen => 1, LocalAddr => "127.0.0.1", LocalPort => 7000);
        if (!fork) {
            my $here = $server->accept;
            while (<$here>) { open my $f, ">", "/got"; print $f $_; close $f }
            open my $f, ">", "/got"; print $f "closed"; close $f; sleep 600;
        }
        my $there = IO::Socket::INET->new(PeerAddr => "127.0.0.1", PeerPort => 7000);
        $there->autoflush(1);
        while (1) { select undef, undef, undef, 0.05;
            open my $f, "<", "/send" or next; print {$there} <$f>; close $f; unlink "/send" }'"#;
    let netns = format!("{}-tcp", runtime.tag);
    node().sh(&format!("ip netns add {netns}; ip -n {netns} link set lo up"))?;
    let network = format!("network:/run/netns/{netns}");
    let extra = ["--with-ns", &network];
    let subject = Subject::start(runtime, "tcp", &extra, &Streams::default(), script)?;
    subject.says("echo one > /send")?;
    subject.wait_until_says("cat /got", "one")?;
    let (_, text) = refusal(subject.checkpoint(Options::default()))?;
    if runtime.tag == "godwit" {
        assert!(text.contains("Connected TCP socket"), "{text}");
    }
    assert_eq!(subject.task.container.status()?, "RUNNING");
    subject.says("echo two > /send")?;
    subject.wait_until_says("cat /got", "two")?;

    subject.checkpoint(Options { open_tcp: true, ..Options::default() })?;
    assert_eq!(subject.task.container.status()?, "RUNNING");
    if runtime.tag == "runc" {
        // Its restore has no word for it.
        assert!(subject.restore(&Streams::default()).is_err());
        return Ok(());
    }
    subject.restore(&Streams::default())?;
    subject.says("echo three > /send")?;
    subject.wait_until_says("cat /got", "three")
}

/// Method: the container sends to a datagram socket of the node. CRIU looks for such sockets in the
/// container's network namespace only, and reaches them by the path that they were bound to; so
/// both are the node's.
fn unix_sockets_of_the_host_are_kept_if_asked_for(runtime: &Runtime) -> Result<()> {
    let outside = format!("/outside-{}", runtime.tag);
    node().sh(&format!("mkdir -p {outside}"))?;
    let listen = format!(
        "socket(S, AF_UNIX, SOCK_DGRAM, 0); bind(S, sockaddr_un(\"{outside}/log\")) or die; $| = 1; \
         while (1) {{ recv(S, my $m, 99, 0); print \"$m\\n\" }}"
    );
    let log = format!("log-{}", runtime.tag);
    let listener = node().spawn(&["perl", "-MSocket", "-e", &listen], &log)?;
    wait_until("it listens", SOON, || Ok(node().path(format!("{outside}/log")).exists()))?;
    let script = format!(
        "exec perl -MSocket -e 'socket(S, AF_UNIX, SOCK_DGRAM, 0); \
         connect(S, sockaddr_un(\"{outside}/log\")) or die; my $i = 0; \
         while (1) {{ send(S, \"beat \" . $i++, 0); select undef, undef, undef, 0.05 }}'"
    );
    let mount = format!("type=bind,src={outside},dst={outside},options=rbind:rw");
    let extra = ["--net-host", "--mount", &mount];
    let subject = Subject::start(runtime, "unix", &extra, &Streams::default(), &script)?;
    wait_until("it is heard", SOON, || Ok(listener.log().contains("beat 3\n")))?;
    refusal(subject.checkpoint(Options::default()))?;
    assert_eq!(subject.task.container.status()?, "RUNNING");
    subject.checkpoint(Options { external_unix_sockets: true, ..Options::default() })?;
    assert_eq!(subject.task.container.status()?, "RUNNING");
    let beats = || listener.log().lines().count();
    subject.restore(&Streams::default())?;
    let then = beats();
    wait_until("it is heard again", SOON, || Ok(beats() > then + 3))
}

/// Method: the new terminal is the client's of the restore; what was typed before is known after.
fn a_container_on_a_terminal_comes_back_on_another(runtime: &Runtime) -> Result<()> {
    let script = "while read line; do all=\"$all$line,\"; echo all=$all; stty size; done";
    let on = |round: u32| -> Result<(Streams, Fifo)> {
        let name = |kind: &str| format!("{}-terminal-{kind}{round}", runtime.tag);
        let (stdin, stdout) = (Fifo::without_reader(&name("in"))?, Fifo::new(&name("out"))?);
        let (stdin, path) = (stdin.path, stdout.path.clone());
        Ok((Streams { stdin, stdout: path, terminal: true, ..Default::default() }, stdout))
    };
    let type_line = |streams: &Streams, line: &str| -> Result<()> {
        Ok(std::fs::write(node().path(&streams.stdin), format!("{line}\n"))?)
    };
    let (streams, mut output) = on(1)?;
    let subject = Subject::start(runtime, "terminal", &["--tty"], &streams, script)?;
    type_line(&streams, "one")?;
    let mut seen = String::new();
    wait_until("it answers", SOON, || {
        seen += &output.text()?;
        Ok(seen.contains("all=one,"))
    })?;
    for (round, terminal) in [(2, false), (3, true)] {
        node().sh(&format!("rm -rf {}/*", subject.directory))?;
        subject.checkpoint(Options { terminal, ..Options::default() })?;
        assert_eq!(subject.task.container.status()?, "RUNNING");
        let (streams, mut output) = on(round)?;
        subject.restore(&streams)?;
        subject.task.resize("", 77, 22)?;
        type_line(&streams, "more")?;
        let mut seen = String::new();
        wait_until("it answers with all it knows", SOON, || {
            seen += &output.text()?;
            Ok(seen.contains("all=one,more,") && seen.contains("22 77"))
        })
        .with_context(|| seen.clone())?;
        if round == 2 {
            // The image of the next round is of a container that was restored.
            type_line(&streams, "again")?;
            wait_until("it goes on", SOON, || {
                seen += &output.text()?;
                Ok(seen.contains("again,"))
            })?;
        }
    }
    Ok(())
}

/// Method: one of each kind: a lock, a deleted file, a file with another name left, a child.
fn locks_deleted_files_and_children_come_back(runtime: &Runtime) -> Result<()> {
    // The child's file always has the same size: it may be open in the dump, and goes on being
    // written before the restore, where CRIU compares sizes.
    let script = "exec 5<>/deleted; rm /deleted; exec 7<>/lock; flock 7; \
                  sh -c 'i=0; while :; do i=$((i+1)); printf %08d $i 1<>/child; sleep 0.05; done' & \
                  while :; do echo kept >&5; sleep 0.05; done";
    let subject = Subject::start(runtime, "whole", &[], &Streams::default(), script)?;
    let lines = "grep -c kept /proc/1/fd/5";
    wait_until("it is under way", SOON, || {
        Ok(subject.says(lines)?.parse::<u32>().is_ok_and(|lines| lines > 3)
            && subject.says("cat /child")?.parse::<u32>().is_ok())
    })?;
    let is_locked = "flock -n /lock true && echo free || echo locked";
    assert_eq!(subject.says(is_locked)?, "locked");
    let without = subject.checkpoint(Options::default());
    if runtime.tag == "runc" {
        refusal(without)?;
        assert_eq!(subject.task.container.status()?, "RUNNING");
        subject.checkpoint(Options { file_locks: true, ..Options::default() })?;
    } else {
        // Asked for or not: a container that locks is nothing unusual.
        without?;
    }
    let numbers = || -> Result<(u32, u32)> {
        Ok((subject.says(lines)?.parse()?, subject.says("cat /child")?.parse().unwrap_or(0)))
    };
    let then = numbers()?;
    subject.restore(&Streams::default())?;
    wait_until("parent and child go on", SOON, || {
        let now = numbers()?;
        Ok(now.0 > then.0 + 3 && now.1 > then.1 + 3)
    })?;
    // Nothing tells containerd's shim of it, or its CRIU, so the lock is lost without a word.
    let expected = if runtime.tag == "runc" { "free" } else { "locked" };
    assert_eq!(subject.says(is_locked)?, expected);
    Ok(())
}

/// Method: a file that is still open has lost one of its two names. CRIU makes another, which stays
/// only if the container ends.
fn a_file_that_lost_its_name_comes_back(runtime: &Runtime) -> Result<()> {
    let script = "exec 5<>/one; ln /one /two; rm /one; while :; do echo kept >&5; sleep 0.05; done";
    let subject = Subject::start(runtime, "link", &[], &Streams::default(), script)?;
    let lines = || -> Result<u32> { Ok(subject.says("grep -c kept /two")?.parse().unwrap_or(0)) };
    wait_until("it writes", SOON, || Ok(lines()? > 3))?;
    let outcome = subject.checkpoint(Options { exit: true, ..Options::default() });
    if runtime.tag == "runc" {
        refusal(outcome)?;
        assert_eq!(subject.task.container.status()?, "RUNNING");
        return Ok(());
    }
    outcome?;
    subject.restore(&Streams::default())?;
    let then = lines()?;
    wait_until("it writes on", SOON, || Ok(lines()? > then))
}

/// Method: the process that was added is no child of the init process: it is in no image.
fn added_processes_are_not_lost_silently(runtime: &Runtime) -> Result<()> {
    let subject = Subject::start(runtime, "execs", &[], &Streams::default(), "sleep 600")?;
    subject.task.exec("guest", &Streams::default(), "sleep 656")?;
    subject.task.start("guest")?;
    subject.checkpoint(Options::default())?;
    assert!(node().run(&["pgrep", "-f", "^sleep 656"])?.succeeded());
    if runtime.tag == "godwit" {
        let log = node().log("containerd");
        let told = log
            .lines()
            .find(|line| line.contains(&subject.task.container.id) && line.contains("guest"));
        assert!(told.is_some_and(|line| line.contains("not part of the checkpoint")), "{told:?}");
    }
    node().sh(&format!("rm -r {}/image", subject.directory))?;
    subject.checkpoint(Options { exit: true, ..Options::default() })?;
    // Its end is reported as that of any other process.
    assert_eq!((subject.task.wait("guest")?, subject.task.wait("")?), (137, 137));
    subject.restore(&Streams::default())?;
    assert_eq!(subject.says("pgrep -f '^sleep 656' || echo none")?, "none");
    Ok(())
}

/// Method: the namespace is made again, so what was configured in it is not there.
fn a_namespace_may_be_left_empty(runtime: &Runtime) -> Result<()> {
    let capability = ["--cap-add", "CAP_NET_ADMIN"];
    let script = "ip addr add 10.9.9.9/32 dev lo; touch /ready; sleep 600";
    let subject = Subject::start(runtime, "empty", &capability, &Streams::default(), script)?;
    subject.wait_until_says("ls /ready", "/ready")?;
    let empty_namespaces = vec!["network".to_owned()];
    subject.checkpoint(Options { empty_namespaces, ..Options::default() })?;
    assert_eq!(subject.task.container.status()?, "RUNNING");
    assert!(subject.says("ip addr")?.contains("10.9.9.9"));
    subject.restore(&Streams::default())?;
    assert!(!subject.says("ip addr")?.contains("10.9.9.9"));
    Ok(())
}

fn a_checkpoint_that_fails_is_told(runtime: &Runtime) -> Result<()> {
    let subject = Subject::start(runtime, "fails", &[], &Streams::default(), "sleep 600")?;
    let unknown = vec!["nosuch".to_owned()];
    let refused =
        refusal(subject.checkpoint(Options { empty_namespaces: unknown, ..Options::default() }));
    assert!(!refused?.1.is_empty());
    assert_eq!(subject.task.container.status()?, "RUNNING");
    // A file in the directory's place.
    node().sh(&format!("rm -rf {0}/image; touch {0}/image", subject.directory))?;
    refusal(subject.checkpoint(Options::default()))?;
    assert_eq!(subject.task.container.status()?, "RUNNING");
    subject.task.kill("", 9)?;
    subject.task.wait("")?;
    refusal(subject.checkpoint(Options::default()))?;
    Ok(())
}

/// Method: what works by default and is switched off; and what makes no sense.
#[test]
fn annotations_choose_what_criu_is_told() -> Result<()> {
    let no = "exec 5<>/big; rm /big; dd if=/dev/zero bs=64k count=1 >&5; \
              exec 7<>/lock; flock 7; touch /ready; sleep 600";
    for (name, annotation, reason) in [
        ("locks", "godwit.io/criu.file-locks=no", "file locks"),
        ("ghosts", "godwit.io/criu.ghost-limit=4K", "increase limit"),
    ] {
        let extra = ["--annotation", annotation];
        let subject = Subject::start(&GODWIT, name, &extra, &Streams::default(), no)?;
        subject.wait_until_says("ls /ready", "/ready")?;
        let (_, text) = refusal(subject.checkpoint(Options::default()))?;
        assert!(text.contains(reason), "{text}");
        assert_eq!(subject.task.container.status()?, "RUNNING");
    }
    for annotation in ["godwit.io/criu.ghost-limit=much", "godwit.io/criu.nosuch=yes"] {
        let task = Task::of(&GODWIT, "nonsense", &["--annotation", annotation], "true")?;
        let (code, text) = refusal(task.create(&Streams::default(), None))?;
        assert_eq!(code, tonic::Code::InvalidArgument, "{text}");
        assert!(text.contains(annotation.split('=').next().unwrap_or_default()), "{text}");
    }
    Ok(())
}

with_both_runtimes! {
    a_checkpoint_lies_where_its_options_say,
    open_connections_are_kept_if_asked_for,
    unix_sockets_of_the_host_are_kept_if_asked_for,
    a_container_on_a_terminal_comes_back_on_another,
    locks_deleted_files_and_children_come_back,
    a_file_that_lost_its_name_comes_back,
    added_processes_are_not_lost_silently,
    a_namespace_may_be_left_empty,
    a_checkpoint_that_fails_is_told,
}
