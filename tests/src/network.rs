//! The network of a bed: a switch, shaped links to nodes, and a place for clients.
//!
//! Everything lies in network namespaces named `gwN-...`; nothing of it is visible in the host's
//! own. Links are shaped by a token bucket (TBF) at both ends, so that each direction has the rate.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};

use crate::command::{Invocation, host};

/// Where `ip netns` keeps its names.
const NAMESPACES: &str = "/run/netns";
/// Milliseconds that a packet may wait at a shaped link before it is dropped.
const QUEUE_MS: u32 = 50;
/// Last byte of the client's address.
const CLIENT: u8 = 250;

/// The switch of a bed, and the client's network beside it.
#[derive(Clone, Debug)]
pub struct Switch {
    run: u32,
}

/// A node's port at the switch.
#[derive(Clone, Debug)]
pub(crate) struct Port {
    switch: Switch,
    namespace: String,
    port: String,
}

/// Bytes that went through a node's uplink since the node started, headers included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that the node received.
    pub received: u64,
    /// Bytes that the node sent.
    pub sent: u64,
}

impl std::ops::Sub for Counters {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self { received: self.received - earlier.received, sent: self.sent - earlier.sent }
    }
}

impl Switch {
    /// Makes the switch and the client's namespace of a run.
    pub(crate) fn create(run: u32) -> Result<Self> {
        let switch = Self { run };
        let (here, client) = (switch.namespace("switch"), switch.client());
        host(&["ip", "netns", "add", &here])?;
        host(&["ip", "netns", "add", &client])?;
        batch(
            &here,
            &format!(
                "link add sw0 type bridge\n\
                 link set sw0 up\n\
                 link add client type veth peer name eth0 netns {client}\n\
                 link set client master sw0 up\n"
            ),
        )?;
        let address = switch.address(CLIENT);
        batch(
            &client,
            &format!("link set lo up\naddr add {address}/24 dev eth0\nlink set eth0 up\n"),
        )?;
        Ok(switch)
    }

    /// Address `10.(100+N).0.host` of this bed's network.
    pub fn address(&self, host: u8) -> Ipv4Addr {
        // Numbers of runs end at 99.
        let second = u8::try_from(100 + self.run).unwrap_or(u8::MAX);
        Ipv4Addr::new(10, second, 0, host)
    }

    /// Network namespace of the clients, for [`in_namespace`].
    pub fn client(&self) -> String {
        self.namespace("client")
    }

    fn namespace(&self, name: &str) -> String {
        format!("gw{}-{name}", self.run)
    }

    /// Makes the network namespace of a node: bridge `br0` with its address, link `uplink` to here.
    pub(crate) fn plug(&self, node: &str, index: u8, address: Ipv4Addr) -> Result<Port> {
        let namespace = self.namespace(node);
        let switch = self.namespace("switch");
        let port = format!("port{index}");
        host(&["ip", "netns", "add", &namespace])?;
        // The bridge's own MAC address: otherwise it follows the lowest of its ports and changes
        // under everyone's feet when a container comes.
        let mac = format!("02:67:77:00:{:02x}:{index:02x}", self.run);
        batch(
            &namespace,
            &format!(
                "link set lo up\n\
                 link add uplink type veth peer name {port} netns {switch}\n\
                 link add br0 type bridge\n\
                 link set br0 address {mac}\n\
                 link set uplink master br0 up\n\
                 addr add {address}/24 dev br0\n\
                 link set br0 up\n"
            ),
        )?;
        batch(&switch, &format!("link set {port} master sw0 up\n"))?;
        Ok(Port { switch: self.clone(), namespace, port })
    }
}

impl Port {
    /// Name of the node's network namespace.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Path of the node's network namespace.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACES).join(&self.namespace)
    }

    /// Sets the rate of both directions in Mbit/s; `None` lifts the limit.
    pub(crate) fn shape(&self, mbit: Option<u32>) -> Result<()> {
        let switch = self.switch.namespace("switch");
        for (namespace, device) in [(&self.namespace, "uplink"), (&switch, self.port.as_str())] {
            let Some(mbit) = mbit else {
                // Fails where there was no limit, which is what is wanted.
                Invocation::new(&["tc", "-n", namespace, "qdisc", "del", "dev", device, "root"])
                    .run()?;
                continue;
            };
            // The bucket holds what the rate brings between two timer ticks (10 ms is more than one
            // at any HZ), and never less than two of the largest packets.
            let burst = (u64::from(mbit) * 1_000_000 / 8 / 100).max(128 * 1024);
            let command = format!(
                "tc -n {namespace} qdisc replace dev {device} root tbf \
                 rate {mbit}mbit burst {burst} latency {QUEUE_MS}ms"
            );
            host(&command.split_whitespace().collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// Cuts the link: packets vanish in both directions, without an error.
    pub(crate) fn cut(&self) -> Result<()> {
        batch(&self.switch.namespace("switch"), &format!("link set {} nomaster\n", self.port))
    }

    /// Mends a cut link.
    pub(crate) fn mend(&self) -> Result<()> {
        batch(&self.switch.namespace("switch"), &format!("link set {} master sw0\n", self.port))
    }
}

/// Runs `work` on a thread inside a network namespace; sockets made there stay there.
///
/// Errors: there is no such namespace; those of `work`. A panic of `work` goes on in the caller.
pub fn in_namespace<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    on_thread_in(&PathBuf::from(NAMESPACES).join(name), CloneFlags::CLONE_NEWNET, work)
}

/// Runs `work` on a thread that has joined the namespace at `path`, which is of `kind`.
pub(crate) fn on_thread_in<T: Send>(
    path: &Path,
    kind: CloneFlags,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let namespace = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            if kind == CloneFlags::CLONE_NEWNS {
                // Mounts are joined only by who shares root and working directory with no other
                // thread.
                unshare(CloneFlags::CLONE_FS).context("have a working directory of its own")?;
            }
            setns(&namespace, kind).context("enter the namespace")?;
            work()
        });
        thread.join()
    });
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Names of the network namespaces of a run.
pub(crate) fn namespaces_of(run: u32) -> Result<Vec<String>> {
    let prefix = format!("gw{run}-");
    let entries = match fs::read_dir(NAMESPACES) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().into_string();
        let name = name.map_err(|name| anyhow!("odd network namespace {}", name.display()))?;
        if name.starts_with(&prefix) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Runs lines of `ip` in a network namespace, all of them in one process.
fn batch(namespace: &str, lines: &str) -> Result<()> {
    Invocation::new(&["ip", "-n", namespace, "-batch", "-"]).stdin(lines).ok()?;
    Ok(())
}
