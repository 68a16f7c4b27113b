//! One node of a bed, and what a test may do to it: run commands, kill and restart its daemons,
//! slow or cut its link, read its files and its traffic, crash it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::CloneFlags;
use nix::sys::signal::Signal;

use crate::cgroups::{self, Groups};
use crate::command::{Background, Finished, Invocation, wait_until};
use crate::network::{Counters, Port, in_namespace, on_thread_in};
use crate::root::{CONTAINERD_2, Root};
use crate::{deploy, place};

/// containerd's socket inside a node.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// The daemon's snapshots socket inside a node.
pub const SNAPSHOTTER_SOCKET: &str = "/run/godwit/snapshotter.sock";
/// The daemon's control socket inside a node.
pub const CONTROL_SOCKET: &str = "/run/godwit/control.sock";
/// Our programs that a node gets, as far as they have been built.
const PROGRAMS: &[&str] = &["containerd-shim-godwit-v1", "godwit-snapshotter", "godwit"];

/// How long namespaces and mounts of a node may take.
const BOOT_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a daemon may take to open its socket.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a daemon may take to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

const INIT: &str = include_str!("../node/init.sh");
/// Joins the cgroups named before `--`, then runs what follows.
const JOIN: &str =
    "while [ \"$1\" != -- ]; do echo 0 > \"$1/cgroup.procs\"; shift; done; shift; exec \"$@\"";
const ENVIRONMENT: &[(&str, &str)] = &[
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("LC_ALL", "C.UTF-8"),
    ("TERM", "xterm"),
];

/// The two generations of containerd that nodes have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Containerd {
    /// 1.7, of Debian 13.
    V1,
    /// 2.x, of Debian's unstable release.
    V2,
}

impl Containerd {
    /// What the environment variable `GODWIT_CONTAINERD` chooses for a suite: `1` (also when it is
    /// not set) or `2`.
    pub fn of_suite() -> Self {
        match std::env::var("GODWIT_CONTAINERD").as_deref() {
            Ok("2") => Self::V2,
            _ => Self::V1,
        }
    }

    /// The client that comes with it. What nodes call `ctr` is that of 1.7.
    pub fn ctr(self) -> String {
        match self {
            Self::V1 => "ctr".to_owned(),
            Self::V2 => format!("{CONTAINERD_2}/usr/bin/ctr"),
        }
    }
}

/// A running node. Its methods take `&self`, so that a bed can be shared by the tests of a suite.
pub struct Node {
    name: String,
    address: Ipv4Addr,
    peers: Vec<(String, Ipv4Addr)>,
    directory: PathBuf,
    root: PathBuf,
    init: AtomicU32,
    groups: Groups,
    port: Port,
    containerd: Mutex<Option<Background>>,
    generation: Mutex<Containerd>,
    daemon: Mutex<Option<Background>>,
    // Last: dropping the fields above kills what runs inside; then process 1 takes the rest along.
    unshare: Mutex<Background>,
}

/// What a node is made of.
pub(crate) struct Parts<'a> {
    pub(crate) run: u32,
    pub(crate) root: &'a Root,
    pub(crate) name: &'a str,
    pub(crate) address: Ipv4Addr,
    pub(crate) peers: Vec<(String, Ipv4Addr)>,
    /// Further keys of the daemon's configuration; `None` for a node without Godwit.
    pub(crate) keys: Option<&'a str>,
    pub(crate) directory: PathBuf,
    pub(crate) port: Port,
}

/// A network namespace for a container on a node's bridge, with an address of its own.
#[derive(Clone, Debug)]
pub struct ContainerNetwork {
    /// Path inside the node, for `ctr run --with-ns network:PATH`.
    pub path: String,
    /// Its address.
    pub address: Ipv4Addr,
    name: String,
}

impl Node {
    /// Makes the node's namespaces and file system; nothing runs in it yet but its process 1.
    pub(crate) fn boot(parts: Parts<'_>) -> Result<Self> {
        let Parts { run, root, name, address, peers, keys, directory, port } = parts;
        for part in ["upper/etc", "upper/usr/local/bin", "work", "root", "containerd", "godwit"] {
            fs::create_dir_all(directory.join(part))?;
        }
        fs::set_permissions(directory.join("godwit"), fs::Permissions::from_mode(0o700))?;
        if let Some(keys) = keys {
            deploy::configure(&directory.join("upper/etc"), name, address, &peers, keys)?;
            install_programs(&directory.join("upper/usr/local/bin"))?;
        }
        fs::write(directory.join("init.sh"), INIT)?;
        let groups = cgroups::create(run, name)?;
        let root = root.path().to_path_buf();
        let (unshare, init) = launch(name, &directory, &root, &groups, &port)?;
        let name = name.to_owned();
        let (containerd, daemon) = (Mutex::new(None), Mutex::new(None));
        let generation = Mutex::new(Containerd::V1);
        let (init, unshare) = (AtomicU32::new(init), Mutex::new(unshare));
        Ok(Self {
            name,
            address,
            peers,
            directory,
            root,
            init,
            groups,
            port,
            containerd,
            generation,
            daemon,
            unshare,
        })
    }

    /// The node's name, which is its host name and its name among its peers.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's address on the bed's network.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Process 1 of the node, as the host numbers it: `nsenter -t PID -a` enters the node.
    pub fn init(&self) -> u32 {
        self.init.load(Ordering::Relaxed)
    }

    /// A command in the node, to be given input or a deadline before it runs.
    pub fn command(&self, argv: &[&str]) -> Invocation {
        let prefix = enter_words(&self.groups.entries, &self.init().to_string());
        Invocation::new(argv).prefixed(prefix, &self.name).environment(ENVIRONMENT)
    }

    /// Runs a command in the node, whatever its exit code. Errors: its deadline passes.
    pub fn run(&self, argv: &[&str]) -> Result<Finished> {
        self.command(argv).run()
    }

    /// Runs a command in the node and returns its standard output. Errors: any exit code but 0.
    pub fn ok(&self, argv: &[&str]) -> Result<String> {
        self.command(argv).ok()
    }

    /// Runs a line of shell in the node and returns its standard output.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.ok(&["sh", "-e", "-c", script])
    }

    /// Starts a command in the node that goes on until it is dropped; its log is named `log`.
    pub fn spawn(&self, argv: &[&str], log: &str) -> Result<Background> {
        self.command(argv).spawn(&self.log_path(log))
    }

    /// A path inside the node, as the host can open it while the node runs.
    pub fn path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let root = PathBuf::from(format!("/proc/{}/root", self.init()));
        root.join(inside.strip_prefix("/").unwrap_or(inside))
    }

    /// A path below `/var/lib/godwit`, where the host has it unless a disk is mounted there: for
    /// programs that do not work across mount namespaces.
    pub fn state_path(&self, below: &str) -> PathBuf {
        self.directory.join("godwit").join(below)
    }

    /// Path on the host of a log of this node: `init`, `containerd`, `daemon`, or what was spawned.
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    /// Text of a log of this node; empty if there is none.
    pub fn log(&self, name: &str) -> String {
        let bytes = fs::read(self.log_path(name)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Where a log ends now, for [`Self::log_since`].
    pub fn log_end(&self, name: &str) -> usize {
        self.log(name).len()
    }

    /// What a log of this node says behind `end`: logs outlive tests, and daemons that are started
    /// again.
    pub fn log_since(&self, name: &str, end: usize) -> String {
        self.log(name).get(end..).unwrap_or_default().to_owned()
    }

    /// Copies a program of the host into the node's PATH, in place of one of the same name.
    pub fn install(&self, program: &Path, name: &str) -> Result<()> {
        let to = self.path("/usr/local/bin").join(name);
        let new = to.with_extension("new");
        fs::copy(program, &new).with_context(|| format!("copy {}", program.display()))?;
        fs::rename(&new, &to)?;
        Ok(())
    }

    /// Starts the containerd that ran here last, at first Debian 13's, and waits for its socket.
    pub fn start_containerd(&self) -> Result<()> {
        let generation = *self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        self.start_containerd_of(generation)
    }

    /// Starts a containerd of either generation and waits for its socket.
    pub fn start_containerd_of(&self, generation: Containerd) -> Result<()> {
        *self.generation.lock().unwrap_or_else(PoisonError::into_inner) = generation;
        // Its own shims first.
        let second =
            format!("PATH={CONTAINERD_2}/usr/bin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        let argv: &[&str] = match generation {
            Containerd::V1 => &["containerd", "--log-level", "info"],
            Containerd::V2 => &["env", &second, "containerd", "--log-level", "info"],
        };
        self.start(&self.containerd, "containerd", argv, &[CONTAINERD_SOCKET])
    }

    /// Writes the daemon's configuration again, with these keys besides; it is read when the daemon
    /// starts.
    pub fn configure(&self, keys: &str) -> Result<()> {
        let text = deploy::daemon(&self.name, self.address, &self.peers, keys)?;
        Ok(fs::write(self.path("/etc/godwit/godwit.toml"), text)?)
    }

    /// Starts the daemon and waits for its sockets, and until a containerd that runs has found it:
    /// after a failed connection containerd fails all calls for up to 3 s without a new attempt.
    pub fn start_daemon(&self) -> Result<()> {
        let sockets = [SNAPSHOTTER_SOCKET, CONTROL_SOCKET];
        let command = deploy::daemon_command()?;
        let words: Vec<&str> = command.split_whitespace().collect();
        self.start(&self.daemon, "daemon", &words, &sockets)?;
        if !self.containerd_runs()? {
            return Ok(());
        }
        let listing = ["ctr", "--timeout", "2s", "snapshots", "--snapshotter", "godwit", "ls"];
        wait_until(&format!("{}: containerd finds the daemon", self.name), SERVICE_TIMEOUT, || {
            if let Some(code) = lock(&self.daemon).as_mut().context("no daemon")?.ended()? {
                bail!("{}: the daemon ended, code {code}", self.name);
            }
            Ok(self.run(&listing)?.succeeded())
        })
    }

    fn containerd_runs(&self) -> Result<bool> {
        Ok(match lock(&self.containerd).as_mut() {
            Some(service) => service.ended()?.is_none(),
            None => false,
        })
    }

    /// Kills containerd as a crash would; its shims and containers go on.
    pub fn kill_containerd(&self) -> Result<()> {
        end(&self.containerd, "containerd", Signal::SIGKILL)
    }

    /// Kills the daemon as a crash would.
    pub fn kill_daemon(&self) -> Result<()> {
        end(&self.daemon, "daemon", Signal::SIGKILL)
    }

    /// Stops the daemon where it is: it holds its connections and answers nothing.
    pub fn pause_daemon(&self) -> Result<()> {
        self.signal_daemon(Signal::SIGSTOP)
    }

    /// Lets a paused daemon go on.
    pub fn resume_daemon(&self) -> Result<()> {
        self.signal_daemon(Signal::SIGCONT)?;
        // What entered the node learns only now that its child was stopped, and stops too.
        std::thread::sleep(Duration::from_millis(200));
        self.signal_daemon(Signal::SIGCONT)
    }

    fn signal_daemon(&self, signal: Signal) -> Result<()> {
        lock(&self.daemon).as_ref().context("the daemon does not run")?.signal(signal)
    }

    /// Stops containerd with SIGTERM and waits for its end.
    pub fn stop_containerd(&self) -> Result<()> {
        end(&self.containerd, "containerd", Signal::SIGTERM)
    }

    /// Stops the daemon with SIGTERM and waits for its end.
    pub fn stop_daemon(&self) -> Result<()> {
        end(&self.daemon, "daemon", Signal::SIGTERM)
    }

    /// Runs `work` on a thread in the node's network; sockets made there stay there.
    pub fn in_network<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        in_namespace(self.port.namespace(), work)
    }

    /// Runs `work` on a thread among the node's mounts: paths, mounts and the programs that it
    /// starts are the node's.
    pub fn in_mounts<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = PathBuf::from(format!("/proc/{}/ns/mnt", self.init()));
        on_thread_in(&path, CloneFlags::CLONE_NEWNS, work)
    }

    /// Sets the rate of the node's link, both ways, in Mbit/s; `None` lifts the limit.
    pub fn set_rate(&self, mbit: Option<u32>) -> Result<()> {
        self.port.shape(mbit)
    }

    /// Cuts the node's link: packets vanish, without an error.
    pub fn cut_link(&self) -> Result<()> {
        self.port.cut()
    }

    /// Mends the node's link.
    pub fn mend_link(&self) -> Result<()> {
        self.port.mend()
    }

    /// What went through the node's uplink so far.
    pub fn traffic(&self) -> Result<Counters> {
        let read = |counter: &str| -> Result<u64> {
            let path = self.path("/sys/class/net/uplink/statistics").join(counter);
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            Ok(text.trim().parse()?)
        };
        Ok(Counters { received: read("rx_bytes")?, sent: read("tx_bytes")? })
    }

    /// Makes a network namespace for a container, attached to the node's bridge.
    ///
    /// `name` has at most 13 bytes; `address` is one of [`crate::network::Switch::address`].
    pub fn add_network(&self, name: &str, address: Ipv4Addr) -> Result<ContainerNetwork> {
        self.sh(&format!(
            "ip netns add {name}
             ip link add v-{name} type veth peer name eth0 netns {name}
             ip -n {name} link set lo up
             ip -n {name} addr add {address}/24 dev eth0
             ip -n {name} link set eth0 up
             ip link set v-{name} master br0 up"
        ))?;
        let path = format!("/run/netns/{name}");
        Ok(ContainerNetwork { path, address, name: name.to_owned() })
    }

    /// Takes a container's network off the bridge; its address stays.
    pub fn detach(&self, network: &ContainerNetwork) -> Result<()> {
        self.sh(&format!("ip link set v-{} nomaster", network.name)).map(drop)
    }

    /// Puts a container's network onto the bridge again and announces its address.
    pub fn attach(&self, network: &ContainerNetwork) -> Result<()> {
        let ContainerNetwork { name, address, .. } = network;
        self.sh(&format!(
            "ip link set v-{name} master br0
             ip netns exec {name} arping -q -U -c 1 -I eth0 {address}"
        ))
        .map(drop)
    }

    /// Crashes the node: every process in it is killed, and its link goes down.
    pub fn crash(&self) -> Result<()> {
        self.port.cut()?;
        let proc = PathBuf::from(format!("/proc/{}", self.init()));
        let mounted = fs::read_to_string(proc.join("mounts")).context("the node's mounts")?;
        let mounts = File::open(proc.join("ns/mnt")).context("the node's mounts")?;
        Invocation::new(&["kill", "-KILL", &self.init().to_string()]).ok()?;
        wait_until("the node is gone", STOP_TIMEOUT, || {
            // A frozen process does not die; a machine takes it along.
            self.groups.thaw();
            Ok(!proc.exists())
        })?;
        // Nor does a frozen file system, which would keep its loop device.
        let mounts = PathBuf::from(format!("/proc/self/fd/{}", mounts.as_raw_fd()));
        on_thread_in(&mounts, CloneFlags::CLONE_NEWNS, || thaw_file_systems(&mounted))
    }

    /// Starts a node that [`Self::crash`] ended: its disks are as they were, nothing runs in it,
    /// and its link is up.
    ///
    /// What was mounted on `/var/lib/godwit` is not mounted any more.
    pub fn revive(&self) -> Result<()> {
        // What entered the node died with it.
        for service in [&self.containerd, &self.daemon] {
            drop(lock(service).take());
        }
        self.groups.empty(STOP_TIMEOUT)?;
        fs::remove_file(self.directory.join("init.pid"))?;
        let (unshare, init) =
            launch(&self.name, &self.directory, &self.root, &self.groups, &self.port)?;
        *self.unshare.lock().unwrap_or_else(PoisonError::into_inner) = unshare;
        self.init.store(init, Ordering::Relaxed);
        self.port.mend()
    }

    fn start(
        &self,
        slot: &Mutex<Option<Background>>,
        name: &str,
        argv: &[&str],
        sockets: &[&str],
    ) -> Result<()> {
        let mut slot = lock(slot);
        if slot.is_some() {
            bail!("{}: {name} runs already", self.name);
        }
        // A process that was killed may still listen for a moment: its last threads end after it is
        // a zombie.
        for socket in sockets {
            if let Err(error) = fs::remove_file(self.path(socket))
                && error.kind() != std::io::ErrorKind::NotFound
            {
                return Err(error).with_context(|| format!("{}: remove {socket}", self.name));
            }
        }
        let mut service = self.spawn(argv, name)?;
        for socket in sockets {
            let path = self.path(socket);
            wait_until(&format!("{}: {name} opens {socket}", self.name), SERVICE_TIMEOUT, || {
                if let Some(code) = service.ended()? {
                    bail!("{}: {name} ended, code {code}: {}", self.name, tail(&service.log(), 20));
                }
                Ok(UnixStream::connect(&path).is_ok())
            })?;
        }
        *slot = Some(service);
        Ok(())
    }
}

/// Makes a node's namespaces and file system: its process 1, and what waits for it.
fn launch(
    name: &str,
    directory: &Path,
    root: &Path,
    groups: &Groups,
    port: &Port,
) -> Result<(Background, u32)> {
    let namespace = format!("--net={}", port.path().display());
    let mut command: Vec<OsString> = join(&groups.tops);
    command.extend(["nsenter", &namespace, "unshare"].map(OsString::from));
    let flags = ["-m", "-u", "-i", "-C", "-p", "-f", "--kill-child", "--propagation", "private"];
    command.extend(flags.map(OsString::from));
    command.push("sh".into());
    command.extend([directory.join("init.sh"), directory.into(), root.into()].map(OsString::from));
    command.push(name.into());
    command.extend(groups.mounts.iter().map(OsString::from));
    let mut unshare = Invocation::new(&command).spawn(&directory.join("init.log"))?;

    let pid_file = directory.join("init.pid");
    let mut init = None;
    wait_until(&format!("{name} starts"), BOOT_TIMEOUT, || {
        if let Some(code) = unshare.ended()? {
            bail!("{name} does not start, exit code {code}: {}", unshare.log());
        }
        init = fs::read_to_string(&pid_file).ok().and_then(|text| text.trim().parse().ok());
        Ok(init.is_some())
    })?;
    let init = init.context("process 1 of the node")?;
    groups.settle(unshare.id())?;
    Ok((unshare, init))
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Thaws what is mounted from loop devices, by the lines of `/proc/PID/mounts`.
fn thaw_file_systems(mounted: &str) -> Result<()> {
    let points =
        mounted.lines().filter_map(|line| line.strip_prefix("/dev/loop")?.split(' ').nth(1));
    for point in points {
        // It fails for those that are not frozen.
        Command::new("fsfreeze").args(["--unfreeze", point]).stderr(Stdio::null()).status()?;
    }
    Ok(())
}

fn lock(slot: &Mutex<Option<Background>>) -> MutexGuard<'_, Option<Background>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn end(slot: &Mutex<Option<Background>>, name: &str, signal: Signal) -> Result<()> {
    let Some(service) = lock(slot).take() else { bail!("{name} does not run") };
    service.signal(signal)?;
    // `nsenter` stops with what it wraps, and may have seen it stopped once more after it had been
    // continued.
    service.signal(Signal::SIGCONT)?;
    service.wait_for_group(STOP_TIMEOUT)
}

/// Words that run a command in a node of a run of this checkout, put before the command.
///
/// `name` is a node's name, `number` its run's. Errors: no run has such a node; several have one
/// and `number` does not choose.
pub fn enter(name: &str, number: Option<u32>) -> Result<Vec<OsString>> {
    let found = nodes_called(name, &place::testbed().join("runs"))?;
    let (number, pid) = choose(name, found, number)?;
    Ok(enter_words(&cgroups::groups_of_node(number, name)?, &pid))
}

/// The runs below `runs` that have a node `name`, each with the node's process 1.
fn nodes_called(name: &str, runs: &Path) -> Result<Vec<(u32, String)>> {
    let mut found = Vec::new();
    for run in fs::read_dir(runs).with_context(|| runs.display().to_string())? {
        let run = run?;
        let Ok(pid) = fs::read_to_string(run.path().join(name).join("init.pid")) else { continue };
        let number = run.file_name().to_str().and_then(|number| number.parse().ok());
        found.push((number.context("a run without a number")?, pid.trim().to_owned()));
    }
    found.sort();
    Ok(found)
}

fn choose(name: &str, found: Vec<(u32, String)>, number: Option<u32>) -> Result<(u32, String)> {
    let mut matching = found;
    matching.retain(|(run, _)| number.is_none_or(|number| number == *run));
    if matching.len() > 1 {
        let runs: Vec<String> = matching.iter().map(|(run, _)| run.to_string()).collect();
        bail!("runs {} have a node {name}: choose one by --run N", runs.join(", "));
    }
    let run = number.map(|number| format!(" {number}")).unwrap_or_default();
    matching.pop().with_context(|| format!("no run{run} has a node {name}"))
}

fn enter_words(groups: &[PathBuf], pid: &str) -> Vec<OsString> {
    let mut words = join(groups);
    let enter = ["nsenter", "-t", pid, "-m", "-u", "-i", "-n", "-p", "-C", "--"];
    words.extend(enter.map(OsString::from));
    words
}

fn join(groups: &[PathBuf]) -> Vec<OsString> {
    let mut words: Vec<OsString> = ["sh", "-c", JOIN, "join"].map(OsString::from).into();
    words.extend(groups.iter().map(OsString::from));
    words.push("--".into());
    words
}

fn install_programs(directory: &Path) -> Result<()> {
    for name in PROGRAMS {
        let program = place::binary(name);
        if program.is_file() {
            fs::copy(&program, directory.join(name))
                .with_context(|| format!("copy {}", program.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_entered_by_its_name_only_if_one_run_has_it() -> Result<()> {
        let runs = tempfile::tempdir()?;
        for (run, pid) in [("3", "1003\n"), ("12", "1012\n")] {
            let directory = runs.path().join(run).join("edge-a");
            fs::create_dir_all(&directory)?;
            fs::write(directory.join("init.pid"), pid)?;
        }
        let found = nodes_called("edge-a", runs.path())?;
        let ambiguous = choose("edge-a", found.clone(), None).unwrap_err().to_string();
        assert_eq!(ambiguous, "runs 3, 12 have a node edge-a: choose one by --run N");
        assert_eq!(choose("edge-a", found.clone(), Some(12))?, (12, "1012".to_owned()));
        assert_eq!(choose("edge-a", found[..1].to_vec(), None)?, (3, "1003".to_owned()));
        let missing = choose("edge-a", found, Some(4)).unwrap_err().to_string();
        assert_eq!(missing, "no run 4 has a node edge-a");
        assert!(nodes_called("edge-z", runs.path())?.is_empty());
        Ok(())
    }
}
