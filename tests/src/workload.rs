//! Containers that migrate: how suites, demo and benchmarks start them and move them.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::command::{Finished, wait_until};
use crate::images::{self, Image};
use crate::{Bed, Node, memhog};

/// The runtime that all of them run under.
pub const RUNTIME: &str = "io.containerd.runc.godwit.v1";

/// Port that memhog listens on.
pub const MEMHOG_PORT: u16 = 7000;

/// Port of redis.
pub const REDIS_PORT: u16 = 6379;

/// Longest wait for a migration.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(240);

/// A container to be started with `ctr run -d`.
#[derive(Clone, Debug)]
pub struct Container<'a> {
    /// Its id.
    pub name: &'a str,
    /// Its image.
    pub image: Image,
    /// Volumes as `ctr` takes them: `src=ID,dst=PATH,options=rw`.
    pub mounts: Vec<String>,
    /// Name of a network namespace of the node ([`Node::add_network`]).
    pub network: Option<&'a str>,
    /// Annotations.
    pub annotations: Vec<(&'a str, String)>,
    /// Further options of `ctr run`.
    pub options: Vec<String>,
    /// Command line; empty for the image's own.
    pub command: Vec<String>,
}

impl<'a> Container<'a> {
    /// A container without volumes, network and annotations.
    pub fn new(name: &'a str, image: Image) -> Self {
        let (mounts, annotations) = (Vec::new(), Vec::new());
        let (options, command) = (Vec::new(), Vec::new());
        Self { name, image, mounts, network: None, annotations, options, command }
    }

    /// Mounts a volume.
    pub fn volume(mut self, id: &str, destination: &str, options: &str) -> Self {
        self.mounts.push(format!("type=godwit,src={id},dst={destination},options={options}"));
        self
    }

    /// Joins a network namespace.
    pub fn network(mut self, name: &'a str) -> Self {
        self.network = Some(name);
        self
    }

    /// Sets an annotation.
    pub fn annotation(mut self, key: &'a str, value: &str) -> Self {
        self.annotations.push((key, value.to_owned()));
        self
    }

    /// Adds options of `ctr run`.
    pub fn options(mut self, words: &[&str]) -> Self {
        self.options.extend(words.iter().map(|word| (*word).to_owned()));
        self
    }

    /// Runs this instead of the image's own command.
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// Starts it on a node; the image must be there.
    pub fn run(&self, node: &Node) -> Result<Finished> {
        let words = self.words();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        node.command(&words).timeout(MIGRATION_TIMEOUT).run()
    }

    /// The command that starts it.
    pub fn words(&self) -> Vec<String> {
        let mut words: Vec<String> =
            ["ctr", "run", "-d", "--runtime", RUNTIME, "--snapshotter", "godwit"]
                .map(str::to_owned)
                .to_vec();
        for mount in &self.mounts {
            words.extend(["--mount".to_owned(), mount.clone()]);
        }
        if let Some(network) = self.network {
            words.extend(["--with-ns".to_owned(), format!("network:/run/netns/{network}")]);
        }
        for (key, value) in &self.annotations {
            words.extend(["--annotation".to_owned(), format!("{key}={value}")]);
        }
        words.extend(self.options.iter().cloned());
        words.extend([self.image.reference().to_owned(), self.name.to_owned()]);
        words.extend(self.command.iter().cloned());
        words
    }

    /// Starts it. Errors: it does not start.
    pub fn start(&self, node: &Node) -> Result<()> {
        self.run(node)?
            .ok()
            .with_context(|| format!("start {} on {}", self.name, node.name()))
            .map(drop)
    }
}

/// A memhog with a volume: what most tests migrate. It listens on the address of its network on
/// each node.
pub fn memhog<'a>(
    name: &'a str,
    volume: &str,
    resident_mib: usize,
    dirty_mib_per_s: usize,
) -> Container<'a> {
    let (resident, dirty) = (resident_mib.to_string(), dirty_mib_per_s.to_string());
    let port = MEMHOG_PORT.to_string();
    Container::new(name, Image::Memhog).volume(volume, "/data", "rw").network(name).command(&[
        "memhog",
        "--resident-mib",
        &resident,
        "--dirty-mib-per-s",
        &dirty,
        "--listen",
        &port,
        "--volume",
        "/data",
    ])
}

/// Makes a network namespace named `name` on every node, each with an address of its own; `first`
/// numbers them.
///
/// Returns the addresses in the order of the nodes.
pub fn networks(bed: &Bed, name: &str, first: u8) -> Result<Vec<Ipv4Addr>> {
    let numbered = bed.nodes().iter().zip(first..);
    numbered
        .map(|(node, number)| {
            let address = bed.container_address(number);
            node.add_network(name, address).map(|_| address)
        })
        .collect()
}

/// Imports an image into every node, for the snapshotter "godwit".
pub fn import_everywhere(bed: &Bed, image: Image) -> Result<()> {
    bed.nodes().iter().try_for_each(|node| images::import(node, image, "godwit"))
}

/// `godwit migrate`, on `at`; options follow.
pub fn migrate(
    at: &Node,
    name: &str,
    from: &Node,
    to: &Node,
    options: &[&str],
) -> Result<Finished> {
    let words =
        ["godwit", "--output", "json", "migrate", name, "--from", from.name(), "--to", to.name()];
    at.command(&[&words, options].concat()).timeout(MIGRATION_TIMEOUT).run()
}

/// A migration that must succeed; its report.
pub fn migrated(at: &Node, name: &str, from: &Node, to: &Node, options: &[&str]) -> Result<Value> {
    let done = migrate(at, name, from, to, options)?.ok()?;
    serde_json::from_str(&done).with_context(|| format!("report: {done}"))
}

/// State of a task as `ctr` prints it, or nothing.
pub fn task(node: &Node, name: &str) -> Result<Option<String>> {
    let listed = node.ok(&["ctr", "tasks", "ls"])?;
    let line = listed.lines().find(|line| line.split_whitespace().next() == Some(name));
    Ok(line.and_then(|line| line.split_whitespace().nth(2)).map(str::to_owned))
}

/// Waits until a memhog answers at `address`, and returns what it says.
pub fn memhog_answers(bed: &Bed, address: Ipv4Addr) -> Result<memhog::Stat> {
    let address = SocketAddr::from((address, MEMHOG_PORT));
    bed.as_client(|| {
        wait_until(
            "memhog answers",
            Duration::from_secs(10),
            || Ok(memhog::stat(address).is_ok()),
        )?;
        memhog::stat(address)
    })
}

/// Has a memhog check itself: no page is torn, none went back in time, and it is `incarnation`.
pub fn memhog_is_whole(bed: &Bed, address: Ipv4Addr, incarnation: u64) -> Result<memhog::Stat> {
    let at = SocketAddr::from((address, MEMHOG_PORT));
    let stat = bed.as_client(|| memhog::verify(at))?;
    ensure!(stat.bad_pages == 0, "{} bad pages at {address}", stat.bad_pages);
    ensure!(stat.incarnation == incarnation, "another process answers at {address}");
    Ok(stat)
}
