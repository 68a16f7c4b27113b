//! A bed: nodes on a switch, started together and torn down together.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;

use anyhow::{Context, Result};

use crate::images::{self, Image};
use crate::network::{self, Switch};
use crate::node::{Containerd, Node, Parts, tail};
use crate::root::Root;
use crate::run::Run;
use crate::{need, place};

/// Last byte of the first node's address; those of the others follow.
const FIRST_NODE: u8 = 2;
/// Where shims keep CRIU's logs in a node.
const CRIU_LOGS: &str = "/var/log/godwit";
/// Lines of each log that are shown when a test panics.
const LOG_LINES: usize = 25;

/// What a bed consists of.
#[derive(Clone, Debug)]
pub struct BedOptions {
    /// Names of the nodes, at most ten characters each.
    pub nodes: Vec<String>,
    /// Rate of every node's link, both ways, in Mbit/s; `None` for as fast as the machine is.
    pub rate_mbit: Option<u32>,
    /// Start containerd in every node.
    pub containerd: bool,
    /// Which containerd that is.
    pub generation: Containerd,
    /// Start the daemon in every node, before containerd.
    pub daemon: bool,
    /// Put Godwit's programs and all configuration files into every node.
    pub installed: bool,
    /// Further keys of every daemon's configuration.
    pub keys: String,
    /// Further tables of it, by the node's name.
    pub config: fn(&str) -> String,
}

/// Snapshots are taken when a test asks for them.
fn no_schedule(_node: &str) -> String {
    "[cache]\nschedule = false\n".to_owned()
}

impl BedOptions {
    /// `count` nodes `edge-a`, `edge-b`, ..., unshaped, with containerd and the daemon.
    pub fn nodes(count: u8) -> Self {
        let names = (b'a'..=b'z').take(count.into());
        let nodes = names.map(|letter| format!("edge-{}", char::from(letter))).collect();
        Self {
            nodes,
            rate_mbit: None,
            containerd: true,
            generation: Containerd::V1,
            daemon: true,
            installed: true,
            keys: String::new(),
            config: no_schedule,
        }
    }

    /// The same with memory of one user of a service serving others too.
    pub fn sibling_memory(mut self) -> Self {
        self.keys.push_str("sibling_memory = true\n");
        self
    }

    /// The same with shaped links.
    pub fn rate_mbit(mut self, mbit: u32) -> Self {
        self.rate_mbit = Some(mbit);
        self
    }

    /// The same with this containerd.
    pub fn generation(mut self, generation: Containerd) -> Self {
        self.generation = generation;
        self
    }

    /// The same with these tables in the daemon's configuration.
    pub fn config(mut self, config: fn(&str) -> String) -> Self {
        self.config = config;
        self
    }

    /// The same without the daemon.
    pub fn without_daemon(mut self) -> Self {
        self.daemon = false;
        self
    }

    /// The same with plain Debian nodes: nothing of Godwit is installed, configured or started.
    pub fn plain_debian(self) -> Self {
        Self { installed: false, ..self.bare() }
    }

    /// The same with nothing started in the nodes.
    pub fn bare(mut self) -> Self {
        self.daemon = false;
        self.containerd = false;
        self
    }
}

/// Running nodes. Dropping it tears everything down; in a panic it shows the logs first.
pub struct Bed {
    nodes: Vec<Node>,
    switch: Switch,
    // Last: names and directories are removed after the nodes have ended.
    run: Run,
}

impl Bed {
    /// Starts the nodes side by side.
    ///
    /// Errors: not root; no Debian root can be made; a node or a daemon in it does not start.
    pub fn start(options: &BedOptions) -> Result<Self> {
        need::root()?;
        if options.daemon {
            need::binaries(&["containerd-shim-godwit-v1", "godwit-snapshotter"])?;
        }
        let root = Root::open()?;
        let run = Run::begin()?;
        let switch = Switch::create(run.number())?;
        let mut bed = Self { nodes: Vec::new(), switch, run };
        let addresses: Vec<(String, Ipv4Addr)> = (FIRST_NODE..)
            .zip(&options.nodes)
            .map(|(host, name)| (name.clone(), bed.switch.address(host)))
            .collect();
        for (index, name) in (0..).zip(&options.nodes) {
            let keys = format!("{}{}", options.keys, (options.config)(name));
            let keys = options.installed.then_some(keys.as_str());
            let node = bed.boot(&root, index, name, &addresses, keys);
            bed.nodes.push(node.with_context(|| format!("start node {name}"))?);
        }
        std::thread::scope(|scope| {
            let starts: Vec<_> = bed
                .nodes
                .iter()
                .map(|node| scope.spawn(move || start_services(node, options)))
                .collect();
            let outcomes = starts.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            outcomes.collect::<Result<Vec<()>>>()
        })
        .inspect_err(|_| bed.show_logs())?;
        Ok(bed)
    }

    fn boot(
        &self,
        root: &Root,
        index: u8,
        name: &str,
        addresses: &[(String, Ipv4Addr)],
        keys: Option<&str>,
    ) -> Result<Node> {
        let (own, peers): (Vec<_>, Vec<_>) =
            addresses.iter().cloned().partition(|(other, _)| other == name);
        let address = own.first().context("a node without an address")?.1;
        let port = self.switch.plug(name, index, address)?;
        let directory = self.run.directory().join(name);
        let run = self.run.number();
        Node::boot(Parts { run, root, name, address, peers, keys, directory, port })
    }

    /// The nodes in the order of the options.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// One node by its place in the options; there must be one.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// Imports an image into every node and unpacks it for `snapshotter`.
    pub fn import(&self, image: Image, snapshotter: &str) -> Result<()> {
        self.nodes.iter().try_for_each(|node| images::import(node, image, snapshotter))
    }

    /// The number that all names of this bed are made from.
    pub fn number(&self) -> u32 {
        self.run.number()
    }

    /// An address on the bed's network that no node has: for the container numbered `container`.
    pub fn container_address(&self, container: u8) -> Ipv4Addr {
        self.switch.address(100 + container % 100)
    }

    /// Runs `work` on a thread in the clients' network, which reaches nodes and containers.
    pub fn as_client<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        network::in_namespace(&self.switch.client(), work)
    }

    /// Name of the clients' network namespace, for [`network::in_namespace`] on a thread of its
    /// own.
    pub fn client_namespace(&self) -> String {
        self.switch.client()
    }

    /// Shows the ends of all logs on standard error and keeps the logs for a closer look.
    pub fn show_logs(&self) {
        for node in &self.nodes {
            for log in ["init", "containerd", "daemon"] {
                let text = node.log(log);
                if !text.is_empty() {
                    eprintln!("--- {} {log}, last lines:\n{}", node.name(), tail(&text, LOG_LINES));
                }
            }
        }
        match self.keep_logs() {
            Ok(kept) => eprintln!("--- whole logs: {kept}"),
            Err(error) => eprintln!("--- logs cannot be kept: {error:#}"),
        }
    }

    fn keep_logs(&self) -> Result<String> {
        let kept = place::testbed().join("failed").join(self.run.number().to_string());
        for node in &self.nodes {
            let to = kept.join(node.name());
            fs::create_dir_all(&to)?;
            copy_files(&self.run.directory().join(node.name()), &to)?;
            // CRIU's logs of the last failed dump and restore of each container; the shims write
            // them, so there may be none, and a node that has crashed shows none.
            let criu = node.path(CRIU_LOGS);
            if criu.is_dir() {
                copy_files(&criu, &to)?;
            }
        }
        Ok(kept.display().to_string())
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_logs();
        }
    }
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            fs::copy(&path, to.join(name))?;
        }
    }
    Ok(())
}

/// The daemon first: containerd asks its snapshotters for their capabilities when it starts.
fn start_services(node: &Node, options: &BedOptions) -> Result<()> {
    node.set_rate(options.rate_mbit)?;
    if options.daemon {
        node.start_daemon()?;
    }
    if options.containerd {
        node.start_containerd_of(options.generation)?;
    }
    Ok(())
}
