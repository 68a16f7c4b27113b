//! One arm of the demo: from fresh nodes to a verified redis at the destination.
//!
//! 1. four nodes, the image and the read-only volume on the first neighbour alone; redis starts
//!    there
//! 2. the client fills it; redis moves to the source, which leaves a snapshot on the neighbour
//! 3. every value is checked; part of them changes; digests are taken: this is the starting state
//! 4. the source's link becomes slow; redis moves to the destination while the client writes
//! 5. every value is checked, the volumes are, and the values once more out of the append-only file
//!
//! What goes wrong with the machinery is an error; what is wrong with the data is a problem of the
//! [`Outcome`], so that the other arm and the report still come.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use godwit_tests::images::{self, Image};
use godwit_tests::load::{self, Ledger, Load, LoadOptions};
use godwit_tests::network::Counters;
use godwit_tests::workload::{self, Container, REDIS_PORT};
use godwit_tests::{Bed, BedOptions, Node};
use serde_json::Value;

use crate::report::MigrationReport;
use crate::state::{self, Files, VALUE_BYTES};
use crate::{Settings, Story};

/// Node that redis is measured leaving.
pub(crate) const SOURCE: &str = "edge-a";
/// Node that redis is measured coming to.
pub(crate) const DESTINATION: &str = "edge-b";
/// Node that redis ran on before.
pub(crate) const NEIGHBOUR: &str = "edge-c";
/// Node that never had anything to do with it.
pub(crate) const BYSTANDER: &str = "edge-d";

/// Name of the container and of its network.
const NAME: &str = "redis";
/// The writable volume.
const VOLUME: &str = "redis-data";
/// Where the read-only volume comes from, in the node.
const REFERENCE: &str = "/root/reference";
/// Writes of the client before and after the measured move.
const LOAD_MARGIN: u64 = 64;
/// Deadline of those.
const LOAD_PATIENCE: Duration = Duration::from_secs(30);
/// Deadline of the first answer of redis.
const START_PATIENCE: Duration = Duration::from_secs(20);

/// Nodes that the destination asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// The source alone.
    Traditional,
    /// Its neighbours, and the source for the rest.
    Cooperative,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Traditional => "traditional",
            Self::Cooperative => "cooperative",
        })
    }
}

/// What the measured move started from; the same in both arms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Start {
    /// SHA-256 of all keys and values.
    pub(crate) data: String,
    /// SHA-256 of the writable volume's files.
    pub(crate) volume: String,
    /// Name of the read-only volume: the digest of its content.
    pub(crate) read_only: String,
    /// Objects in the destination's store.
    pub(crate) destination_objects: u64,
    /// Images at the destination.
    pub(crate) destination_images: usize,
}

/// What an arm found.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Nodes that the destination asked.
    pub(crate) mode: Mode,
    /// What it started from.
    pub(crate) start: Start,
    /// What `godwit migrate` says it cost.
    pub(crate) report: MigrationReport,
    /// The longest time that the client had no answer.
    pub(crate) longest_gap: Duration,
    /// What went through each node's uplink meanwhile, in the order of the bed.
    pub(crate) uplinks: Vec<(String, Counters)>,
    /// What is wrong with the data; nothing, if all is well.
    pub(crate) problems: Vec<String>,
}

/// What the measured move showed.
struct Moved {
    report: MigrationReport,
    seen: load::Report,
    uplinks: Vec<(String, Counters)>,
}

/// Builds everything, moves redis twice, and checks. Errors: a step fails; the logs are kept then.
pub(crate) fn run(settings: &Settings, mode: Mode, story: Story) -> Result<Outcome> {
    let nodes = [SOURCE, DESTINATION, NEIGHBOUR, BYSTANDER].map(str::to_owned).to_vec();
    let options = BedOptions::nodes(4).rate_mbit(settings.link_mbit).sibling_memory();
    let options = BedOptions { nodes, ..options };
    let bed = Bed::start(&options).context("start the nodes")?;
    story.tell("four fresh nodes run containerd and godwit-snapshotter");
    let arm = Arm::new(&bed, settings, mode, story)?;
    arm.run().inspect_err(|_| bed.show_logs()).with_context(|| format!("{mode} arm"))
}

struct Arm<'a> {
    bed: &'a Bed,
    source: &'a Node,
    destination: &'a Node,
    neighbour: &'a Node,
    /// Address of redis on each node, in the order of the bed.
    addresses: Vec<Ipv4Addr>,
    keys: usize,
    settings: &'a Settings,
    mode: Mode,
    story: Story,
}

impl<'a> Arm<'a> {
    fn new(bed: &'a Bed, settings: &'a Settings, mode: Mode, story: Story) -> Result<Self> {
        let (source, destination, neighbour) = (bed.node(0), bed.node(1), bed.node(2));
        let addresses = workload::networks(bed, NAME, 0)?;
        let keys = state::keys(settings.data_mib);
        Ok(Self { bed, source, destination, neighbour, addresses, keys, settings, mode, story })
    }

    fn run(&self) -> Result<Outcome> {
        let mut problems = Vec::new();
        let read_only = self.start_redis()?;
        let mut ledger = Ledger::new(self.keys, VALUE_BYTES);
        self.bed.as_client(|| state::fill(self.address(2), &mut ledger, self.keys))?;
        let mib = self.settings.data_mib;
        self.story.tell(&format!("a client has filled redis: {} keys, {mib} MiB", self.keys));

        let first = self.migrate(self.neighbour, self.source, Mode::Cooperative)?;
        self.story.tell(&format!(
            "redis has moved from {NEIGHBOUR} to {SOURCE} in {:.1} s, all links still at {} Mbit/s; \
             {NEIGHBOUR} keeps {}",
            first.total_ms / 1e3,
            self.settings.link_mbit,
            self.cached_snapshots()?,
        ));
        self.check_data(0, &ledger, &mut problems)?;

        let (start, volume) = self.starting_state(&mut ledger, &read_only)?;
        let Moved { report, seen, uplinks } = self.measured_move(ledger)?;
        self.check_arrival(&seen.ledger, &start, &volume, &mut problems)?;
        let (mode, longest_gap) = (self.mode, seen.longest_gap);
        Ok(Outcome { mode, start, report, longest_gap, uplinks, problems })
    }

    /// Starts redis on the neighbour; returns the name of its read-only volume.
    fn start_redis(&self) -> Result<String> {
        let node = self.neighbour;
        images::import(node, Image::Redis, "godwit")?;
        let mib = self.settings.read_only_mib;
        state::make_read_only(&node.path(REFERENCE), mib)?;
        let read_only = node.ok(&["godwit", "volume", "import", REFERENCE])?.trim().to_owned();
        node.ok(&["godwit", "volume", "create", VOLUME])?;
        let mut redis = Container::new(NAME, Image::Redis)
            .volume(VOLUME, "/data", "rw")
            .volume(&read_only, "/reference", "ro")
            .network(NAME);
        // The preamble would have the time of its making in it, and DEBUG reloads the file in the
        // end.
        redis.command = "redis-server --protected-mode no --dir /data --appendonly yes \
                         --appendfsync everysec --auto-aof-rewrite-percentage 0 \
                         --aof-use-rdb-preamble no --enable-debug-command yes --save"
            .split_whitespace()
            .map(str::to_owned)
            .chain([String::new()])
            .collect();
        redis.start(node)?;
        let address = self.address(2);
        self.bed.as_client(|| state::wait_for_answer(address, START_PATIENCE))?;
        self.story.tell(&format!(
            "redis runs on {NEIGHBOUR}, with an append-only file on volume {VOLUME} and {mib} MiB read-only"
        ));
        Ok(read_only)
    }

    /// What the neighbour has kept, in words. Errors: nothing, so that there is nothing to show.
    fn cached_snapshots(&self) -> Result<String> {
        let listed = self.neighbour.ok(&["godwit", "--output", "json", "snapshot", "ls"])?;
        let listed: Vec<Value> = serde_json::from_str(&listed).context("list of snapshots")?;
        ensure!(!listed.is_empty(), "{NEIGHBOUR} keeps no snapshot");
        let bytes: u64 = listed.iter().filter_map(|one| one["size_bytes"].as_u64()).sum();
        Ok(format!("{} snapshots of {} MiB", listed.len(), bytes >> 20))
    }

    /// Changes part of the data, and takes the digests of everything. The link is still fast.
    fn starting_state(&self, ledger: &mut Ledger, read_only: &str) -> Result<(Start, Files)> {
        let percent = self.settings.changed_percent;
        let changed = self.keys * usize::try_from(percent)? / 100;
        let address = self.address(0);
        let data = self.bed.as_client(|| {
            state::change(address, ledger, self.keys, changed)?;
            state::digest_of_data(address, self.keys)
        })?;
        let volume = Files::read(&volume_directory(self.source))?;
        let status = self.destination.ok(&["godwit", "--output", "json", "status"])?;
        let status: Value = serde_json::from_str(&status).context("status of the destination")?;
        let images = self.destination.ok(&["ctr", "images", "ls", "-q"])?;
        let start = Start {
            data,
            volume: volume.digest(),
            read_only: read_only.to_owned(),
            destination_objects: status["objects"].as_u64().context("objects of the store")?,
            destination_images: images.lines().count(),
        };
        let Start { destination_objects: objects, destination_images: images, .. } = &start;
        self.story.tell(&format!("{changed} keys ({percent}%) have changed; starting state:"));
        self.story.tell(&format!("  data set   sha256:{}", start.data));
        self.story.tell(&format!("  {VOLUME} sha256:{}", start.volume));
        self.story.tell(&format!("  read-only  {}", start.read_only));
        self.story
            .tell(&format!("  {DESTINATION}     {objects} objects in store, {images} images"));
        Ok((start, volume))
    }

    /// The move that counts: over the source's slow link, while the client writes.
    fn measured_move(&self, ledger: Ledger) -> Result<Moved> {
        let Settings { source_mbit, load_kib_per_s, .. } = self.settings;
        self.source.set_rate(Some(*source_mbit))?;
        self.story.tell(&format!(
            "the link of {SOURCE} has {source_mbit} Mbit/s now, a client writes {load_kib_per_s} KiB/s; \
             redis moves to {DESTINATION}"
        ));
        let options = LoadOptions {
            addresses: vec![self.address(0), self.address(1)],
            bytes_per_s: u64::from(*load_kib_per_s) << 10,
            value_bytes: VALUE_BYTES,
            keys: self.keys,
        };
        let load = Load::resume(self.bed.client_namespace(), options, ledger)?;
        load.wait_for(LOAD_MARGIN, LOAD_PATIENCE).context("the client, before the move")?;
        let before = self.traffic()?;
        let report = self.migrate(self.source, self.destination, self.mode)?;
        let after = self.traffic()?;
        load.wait_for(LOAD_MARGIN, LOAD_PATIENCE).context("the client, after the move")?;
        let seen = load.stop()?;
        ensure!(seen.beats[1] > 0, "no redis answers the client at {DESTINATION}");
        self.story.tell(&format!(
            "redis runs on {DESTINATION}: {:.1} s in all, {:.0} ms of downtime, {:.0} ms without an \
             answer to the client, which has {} writes acknowledged",
            report.total_ms / 1e3,
            report.downtime_ms,
            seen.longest_gap.as_secs_f64() * 1e3,
            seen.acknowledged,
        ));
        let names = self.bed.nodes().iter().map(|node| node.name().to_owned());
        let deltas = after.into_iter().zip(before).map(|(after, before)| after - before);
        Ok(Moved { report, seen, uplinks: names.zip(deltas).collect() })
    }

    /// Checks everything at the destination, where no client writes any more.
    fn check_arrival(
        &self,
        ledger: &Ledger,
        start: &Start,
        volume: &Files,
        problems: &mut Vec<String>,
    ) -> Result<()> {
        self.check_data(1, ledger, problems)?;
        if !volume.have_grown_to(&volume_directory(self.destination))? {
            problems.push(format!("volume {VOLUME} has lost or changed bytes it had at the start"));
        }
        let original = Files::read(&self.neighbour.path(REFERENCE))?;
        let name = start.read_only.trim_start_matches("sha256:");
        let laid_out = self.destination.path("/var/lib/godwit/content").join(name);
        if Files::read(&laid_out)? != original {
            problems.push("the read-only volume is another one than at the start".to_owned());
        }
        self.bed.as_client(|| state::reload(self.address(1)))?;
        self.story.tell("redis has started over from its append-only file");
        self.check_data(1, ledger, problems)
    }

    fn check_data(&self, at: usize, ledger: &Ledger, problems: &mut Vec<String>) -> Result<()> {
        let address = self.address(at);
        let node = self.bed.node(at).name();
        match self.bed.as_client(|| state::check(address, ledger, self.keys))? {
            None => {
                let keys = self.keys;
                self.story.tell(&format!("every value on {node} is right: {keys} keys read"));
            }
            Some(problem) => {
                self.story.tell(&format!("WRONG on {node}: {problem}"));
                problems.push(format!("on {node}: {problem}"));
            }
        }
        Ok(())
    }

    fn migrate(&self, from: &Node, to: &Node, mode: Mode) -> Result<MigrationReport> {
        let report = workload::migrated(to, NAME, from, to, &["--mode", &mode.to_string()])?;
        serde_json::from_value(report).context("report of the migration")
    }

    fn traffic(&self) -> Result<Vec<Counters>> {
        self.bed.nodes().iter().map(Node::traffic).collect()
    }

    /// Address of redis on the node at this place of the bed.
    fn address(&self, at: usize) -> SocketAddr {
        (self.addresses[at], REDIS_PORT).into()
    }
}

fn volume_directory(node: &Node) -> std::path::PathBuf {
    node.path(format!("/var/lib/godwit/volumes/{VOLUME}/data"))
}
