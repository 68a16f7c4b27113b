//! A restore whose runtime, CRIU, script or shim is killed, at every step; and what CRIU leaves.
//!
//! A witness outside hears every step of the container. Whatever dies, no step is made twice, and
//! no task runs at the destination unless the destination was granted that.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use criu_wrapper::held::{Record, Stage};
use godwit_tests::command::wait_until;
use godwit_tests::images::{self, Image};
use godwit_tests::witness::Witness;
use godwit_tests::workload::{self, memhog};
use godwit_tests::{Background, Bed, BedOptions, Node, criu};
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// The nodes that all tests share; torn down at exit.
static BED: LazyLock<Bed> = LazyLock::new(|| {
    let bed = Bed::start(&BedOptions::nodes(2).rate_mbit(1000)).expect("the test nodes start");
    images::import(bed.node(0), Image::Memhog, "godwit").expect("images can be imported");
    bed
});

const SOON: Duration = Duration::from_secs(20);
/// How long it is waited for a step of a restore.
const STEP_MAX: Duration = Duration::from_secs(20);
/// Nothing that is killed or settled within it is late.
const SETTLED: Duration = Duration::from_millis(1500);

fn source() -> &'static Node {
    BED.node(0)
}

fn destination() -> &'static Node {
    BED.node(1)
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Runtime,
    Criu,
    Script,
    Shim,
}

/// Processes that work on a restore, as the host numbers them.
struct Workers {
    runtime: Pid,
    criu: Pid,
    shim: Pid,
}

/// A container with a witness.
struct Watched {
    name: &'static str,
    addresses: Vec<Ipv4Addr>,
    witness: Witness,
}

impl Watched {
    fn start(name: &'static str, first: u8, mib: usize, lock: Option<&str>) -> Result<Self> {
        let addresses = workload::networks(&BED, name, first)?;
        let witness = Witness::start(&BED)?;
        let watched = Self { name, addresses, witness };
        watched.run(mib, lock)?;
        Ok(watched)
    }

    fn run(&self, mib: usize, lock: Option<&str>) -> Result<()> {
        source().ok(&["godwit", "volume", "create", self.name])?;
        let mut container = memhog(self.name, self.name, mib, 1);
        let words = ["--witness".to_owned(), self.witness.address().to_string()];
        container.command.extend(words);
        if let Some(lock) = lock {
            container = container.annotation("godwit.io/criu.network-lock", lock);
        }
        container.start(source())?;
        workload::memhog_answers(&BED, self.addresses[0]).map(drop)
    }

    fn migrate(&self) -> Result<Background> {
        let words = ["godwit", "migrate", self.name, "--from", "edge-a", "--to", "edge-b"];
        source().spawn(&words, &format!("migrate-{}", self.name))
    }

    /// Where the destination's shim notes how far it is.
    fn place(&self) -> PathBuf {
        destination().path(format!("/run/godwit-holds/default/{}", self.name))
    }

    fn record(&self) -> Option<Record> {
        Record::load(&self.place()).ok().flatten()
    }

    /// Waits, without a pause worth mentioning, until the restore is at `stage` or beyond.
    fn reaches(&self, stage: Stage) -> Result<Record> {
        let deadline = Instant::now() + STEP_MAX;
        loop {
            if let Some(record) =
                self.record().filter(|it| it.criu.is_some() && it.stage() >= stage)
            {
                return Ok(record);
            }
            ensure!(Instant::now() < deadline, "{}: {stage:?} is not reached", self.name);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    /// The source has lost nothing and goes on; nothing ran or is left at the destination.
    fn runs_on_at_its_source(&self) -> Result<()> {
        wait_until("the source runs", SOON, || {
            Ok(workload::task(source(), self.name)?.as_deref() == Some("RUNNING"))
        })?;
        let before = workload::memhog_answers(&BED, self.addresses[0])?;
        workload::memhog_is_whole(&BED, self.addresses[0], before.incarnation)?;
        let heard = self.witness.steps_from(self.addresses[0]);
        wait_until("it goes on", SOON, || Ok(self.witness.steps_from(self.addresses[0]) > heard))?;
        let there = self.witness.steps_from(self.addresses[1]);
        ensure!(there == 0, "{there} steps at the destination, which the source repeats");
        self.nothing_is_left()
    }

    fn nothing_is_left(&self) -> Result<()> {
        let name = self.name;
        let left = || {
            destination().sh(&format!(
                "ctr tasks ls -q | grep -x {name} || :
                 ctr containers ls -q | grep -x {name} || :
                 godwit volume ls | grep -w {name} || :
                 ls -d /sys/fs/cgroup/*/default/{name} /sys/fs/cgroup/default/{name} \
                    /run/godwit-holds/default/{name} /run/containerd/runc/default/{name} \
                    /run/containerd/io.containerd.runtime.v2.task/default/{name} 2> /dev/null || :
                 grep -o '[^ ]*criu.cgyard[^ ]*' /proc/mounts || :
                 pgrep -x criu || :
                 ip netns exec {name} nft list tables | grep CRIU || :"
            ))
        };
        wait_until("nothing is left at the destination", SOON, || Ok(left()?.is_empty()))
            .with_context(|| left().unwrap_or_default())
    }

    /// Also checks that no dump is left, which is as large as the memory.
    fn remove(&self) -> Result<()> {
        wait_until("the dump is removed", SOON, || {
            Ok(source().sh("ls /var/lib/godwit/dump 2>/dev/null || true")?.is_empty())
        })?;
        source().ok(&["ctr", "tasks", "rm", "-f", self.name])?;
        source().ok(&["ctr", "containers", "rm", self.name])?;
        source().ok(&["godwit", "volume", "rm", self.name]).map(drop)
    }
}

/// A process of a node.
struct Process {
    on_host: Pid,
    inside: u32,
    name: String,
}

/// Processes of a node, as the host numbers them, too.
fn processes_of(node: &Node) -> Result<Vec<Process>> {
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid"));
    let of_node = namespace(&node.init().to_string())?;
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let number = entry.file_name().to_string_lossy().into_owned();
        let Ok(pid) = number.parse() else { continue };
        if !namespace(&number).is_ok_and(|it| it == of_node) {
            continue;
        }
        let status = std::fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let inside =
            field("NSpid:").and_then(|ids| ids.split_ascii_whitespace().last()?.parse().ok());
        if let (Some(inside), Some(name)) = (inside, field("Name:")) {
            found.push(Process { on_host: Pid::from_raw(pid), inside, name: name.to_owned() });
        }
    }
    Ok(found)
}

/// Whether a process has not ended; a zombie has.
fn is_alive(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, state)| !state.starts_with('Z'))
}

/// The host's number of the destination's process `pid`.
fn on_host(pid: u32) -> Result<Pid> {
    let found = processes_of(destination())?.into_iter().find(|process| process.inside == pid);
    Ok(found.with_context(|| format!("the destination has no process {pid}"))?.on_host)
}

fn workers(record: &Record) -> Result<Workers> {
    let pid = |process: &Option<criu_wrapper::held::Process>| {
        on_host(process.as_ref().context("a process is not noted")?.pid)
    };
    let (runtime, criu) = (pid(&record.runtime)?, pid(&record.criu)?);
    Ok(Workers { runtime, criu, shim: pid(&record.shim)? })
}

/// The script that CRIU waits for, once it does.
fn script_of(criu: Pid) -> Result<Pid> {
    let mut found = None;
    wait_until("CRIU waits for its script", STEP_MAX, || {
        let children = std::fs::read_to_string(format!("/proc/{criu}/task/{criu}/children"))?;
        let is_script = |pid: &&str| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let stage = b"CRTOOLS_SCRIPT_ACTION=post-restore";
            environment.split(|byte| *byte == 0).any(|variable| variable == stage)
        };
        let script = children.split_ascii_whitespace().find(is_script);
        found = script.and_then(|pid| pid.parse().ok()).map(Pid::from_raw);
        Ok(found.is_some())
    })?;
    found.context("no script")
}

/// Has CRIU stop for this thread whenever it starts a script.
fn trace_scripts(criu: Pid) -> Result<()> {
    let forks =
        Options::PTRACE_O_TRACEFORK | Options::PTRACE_O_TRACEVFORK | Options::PTRACE_O_TRACECLONE;
    Ok(ptrace::seize(criu, forks)?)
}

/// Stops CRIU, which is traced, once it has started its next script. The script goes on.
fn stop_beside_next_script(criu: Pid) -> Result<Pid> {
    loop {
        match waitpid(criu, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceEvent(_, _, libc::PTRACE_EVENT_STOP) => ptrace::cont(criu, None)?,
            WaitStatus::PtraceEvent(..) => {
                let script = Pid::from_raw(ptrace::getevent(criu)?.try_into()?);
                kill(criu, Signal::SIGSTOP)?;
                waitpid(script, Some(WaitPidFlag::__WALL))?;
                ptrace::detach(script, None)?;
                ptrace::detach(criu, None)?;
                return Ok(script);
            }
            WaitStatus::Stopped(_, signal) => ptrace::cont(criu, signal)?,
            other => anyhow::bail!("CRIU: {other:?}"),
        }
    }
}

/// Stops CRIU, which is traced, beside the script by which `watched` is frozen: it would detach
/// from the tasks as soon as that has ended.
fn stop_before_it_detaches(watched: &Watched, criu: Pid) -> Result<()> {
    loop {
        let script = stop_beside_next_script(criu)?;
        wait_until("the script ends", STEP_MAX, || Ok(!is_alive(script)))?;
        if watched.reaches(Stage::Granted)?.stage() >= Stage::Frozen {
            return Ok(());
        }
        trace_scripts(criu)?;
        kill(criu, Signal::SIGCONT)?;
    }
}

/// Kills `victim` when the restore of `watched` is at `stage`, and lets the rest go on.
fn kill_at(watched: &Watched, victim: Victim, stage: Stage) -> Result<()> {
    let mut migrating = watched.migrate()?;
    let record = watched.reaches(Stage::Held).with_context(|| migrating.log())?;
    // The claim waits: the source does not answer.
    source().pause_daemon()?;
    let workers = workers(&record)?;
    let script = script_of(workers.criu)?;
    ensure!(watched.reaches(Stage::Held)?.stage() == Stage::Held, "it was too fast");
    let pid = match victim {
        Victim::Runtime => workers.runtime,
        Victim::Criu => workers.criu,
        Victim::Script => script,
        Victim::Shim => workers.shim,
    };
    if stage == Stage::Granted {
        // It goes nowhere with its grant.
        kill(workers.criu, Signal::SIGSTOP)?;
    }
    if stage == Stage::Frozen {
        trace_scripts(workers.criu)?;
    }
    if stage == Stage::Held {
        kill(pid, Signal::SIGKILL)?;
        source().resume_daemon()?;
    } else {
        // Beside the look-out: resuming it takes longer than the restore.
        std::thread::scope(|scope| {
            let resuming = scope.spawn(|| source().resume_daemon());
            if stage == Stage::Frozen {
                stop_before_it_detaches(watched, workers.criu)?;
            }
            watched.reaches(stage)?;
            if stage == Stage::Granted {
                std::thread::sleep(Duration::from_millis(200));
            }
            kill(pid, Signal::SIGKILL)?;
            resuming.join().map_err(|_panic| anyhow::anyhow!("the thread died"))?
        })?;
    }
    if matches!(stage, Stage::Granted | Stage::Frozen) && victim != Victim::Criu {
        std::thread::sleep(Duration::from_millis(200));
        // The shim may have ended it by now.
        let _ = kill(workers.criu, Signal::SIGCONT);
    }
    let _ = migrating.wait(Duration::from_secs(60))?;
    std::thread::sleep(SETTLED);
    watched.witness.check()
}

/// Method: all steps at which the source may still run the container, one after the other.
#[test]
fn a_death_before_a_task_ran_leaves_the_source_running_and_nothing_repeated() -> Result<()> {
    let watched = Watched::start("dies", 0, 8, None)?;
    for (victim, stage) in [
        (Victim::Runtime, Stage::Held),
        (Victim::Criu, Stage::Held),
        (Victim::Script, Stage::Held),
        (Victim::Shim, Stage::Held),
        (Victim::Runtime, Stage::Granted),
        (Victim::Shim, Stage::Granted),
        (Victim::Runtime, Stage::Frozen),
        (Victim::Criu, Stage::Frozen),
        (Victim::Shim, Stage::Frozen),
    ] {
        kill_at(&watched, victim, stage)
            .and_then(|()| watched.runs_on_at_its_source())
            .with_context(|| format!("{victim:?} killed at {stage:?}"))?;
    }
    // Nothing that was left stands in the way of the next.
    let mut migrating = watched.migrate()?;
    ensure!(migrating.wait(Duration::from_secs(60))? == 0, "{}", migrating.log());
    wait_until("it runs there", SOON, || Ok(watched.witness.steps_from(watched.addresses[1]) > 0))?;
    watched.witness.check()?;
    destination().ok(&["ctr", "tasks", "rm", "-f", watched.name])?;
    destination().ok(&["ctr", "containers", "rm", watched.name])?;
    destination().ok(&["godwit", "volume", "rm", watched.name]).map(drop)
}

/// Method: a CRIU that was granted the resume and is killed before it could have come to it. That
/// it did not is not known, so the source must let go; and a shim that is killed once it has
/// thawed.
#[test]
fn where_a_task_may_have_run_the_source_does_not_run_it_again() -> Result<()> {
    let cases =
        [("ran-a", 4, Victim::Criu, Stage::Granted), ("ran-b", 8, Victim::Shim, Stage::Thawing)];
    for (name, first, victim, stage) in cases {
        let watched = Watched::start(name, first, 8, None)?;
        kill_at(&watched, victim, stage)?;
        wait_until("the source lets go", SOON, || {
            Ok(workload::task(source(), name)?.is_none_or(|status| status == "STOPPED"))
        })?;
        let heard = watched.witness.steps_from(watched.addresses[0]);
        std::thread::sleep(SETTLED);
        ensure!(watched.witness.steps_from(watched.addresses[0]) == heard, "{name} runs on");
        watched.witness.check()?;
        let status = workload::task(destination(), name)?;
        ensure!(status.as_deref() != Some("RUNNING"), "{name} runs");
    }
    Ok(())
}

/// Whether the namespace `name` of a node lets packets pass: an address of it answers, if only by a
/// refusal.
fn packets_pass(at: &Node, name: &str, address: Ipv4Addr) -> Result<()> {
    let tables = at.sh(&format!("ip netns exec {name} nft list tables"))?;
    ensure!(!tables.contains("CRIU"), "{}: {tables}", at.name());
    let rules = at.sh(&format!("ip netns exec {name} iptables -S 2> /dev/null || :"))?;
    ensure!(!rules.contains("CRIU"), "{}: {rules}", at.name());
    BED.as_client(|| {
        let limit = Duration::from_secs(3);
        let port = workload::MEMHOG_PORT;
        match TcpStream::connect_timeout(&SocketAddr::from((address, port)), limit) {
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionRefused => {
                Err(error).with_context(|| format!("{name} at {address} is mute"))
            }
            _ => Ok(()),
        }
    })
}

/// Method: a restore whose CRIU is killed while it holds the tasks, with and without CRIU's lock.
#[test]
fn an_undone_restore_leaves_no_packet_lock() -> Result<()> {
    for (name, first, lock) in
        [("lock-a", 12, None), ("lock-b", 16, Some("nftables")), ("lock-c", 20, Some("iptables"))]
    {
        let watched = Watched::start(name, first, 8, lock)?;
        kill_at(&watched, Victim::Criu, Stage::Held)?;
        watched.runs_on_at_its_source()?;
        for (node, address) in [(source(), 0), (destination(), 1)] {
            packets_pass(node, name, watched.addresses[address])?;
        }
        watched.remove()?;
    }
    Ok(())
}

/// Method: CRIU is killed while it writes the memory of a container with an open connection.
#[test]
fn a_dump_whose_criu_is_killed_leaves_no_packet_lock_and_connections_work() -> Result<()> {
    for (name, first, lock) in
        [("dump-a", 24, None), ("dump-b", 28, Some("nftables")), ("dump-c", 32, Some("iptables"))]
    {
        let watched = Watched::start(name, first, 64, lock)?;
        let at = SocketAddr::from((watched.addresses[0], workload::MEMHOG_PORT));
        let stream = BED.as_client(|| Ok(TcpStream::connect(at)?))?;
        // So that it is known before it begins.
        let slow = criu::slow(source(), 1)?;
        let mut migrating = watched.migrate()?;
        let logs = source().path("/var/lib/godwit/dump");
        let writes_memory = || {
            let dumps = std::fs::read_dir(&logs).into_iter().flatten().flatten();
            dumps.map(|dump| dump.path().join("work/dump.log")).any(|log| {
                std::fs::read_to_string(log).is_ok_and(|text| text.contains("Dumping task"))
            })
        };
        let deadline = Instant::now() + STEP_MAX;
        // The runtime calls CRIU before the dump, too: to hear its version.
        let mut criu = None;
        while !(writes_memory() && criu.is_some()) {
            ensure!(Instant::now() < deadline, "no dump");
            if criu.is_none_or(|criu| !is_alive(criu)) {
                let all = processes_of(source())?.into_iter();
                let alive = all.filter(|it| it.name == "criu").map(|it| it.on_host);
                criu = alive.into_iter().find(|criu| is_alive(*criu));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        kill(criu.context("no CRIU")?, Signal::SIGKILL)?;
        ensure!(migrating.wait(Duration::from_secs(60))? != 0, "{name} was migrated");
        drop(slow);
        watched.runs_on_at_its_source()?;
        packets_pass(source(), name, watched.addresses[0])?;
        ask(&stream).with_context(|| format!("the connection of {name}"))?;
        watched.witness.check()?;
        watched.remove()?;
    }
    Ok(())
}

/// A connection that was there before is answered.
fn ask(mut stream: &TcpStream) -> Result<()> {
    use std::io::{BufRead as _, BufReader, Write as _};
    stream.set_read_timeout(Some(SOON))?;
    stream.write_all(b"stat\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    ensure!(line.contains("beats"), "{line:?}");
    Ok(())
}
