//! The daemon's configuration file, `/etc/godwit/godwit.toml`; docs/configuration.md lists every
//! key.
//!
//! Unknown keys are errors: a misspelt key would otherwise be a setting that silently does not
//! hold.

use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_protos::FileSystem;
use serde::Deserialize;

use crate::policy::retain::Rules;
use crate::policy::schedule::{Budget, Schedule, ScheduleError};

/// Where the file is looked for unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/godwit/godwit.toml";

/// Everything that the daemon can be told.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This node's name: what other nodes' `peers` and the migrate-from annotation call it. The
    /// host name by default.
    #[serde(default = "host_name")]
    pub node: String,
    /// Address of the peer service, for example `10.0.0.1:7946`. Absent: that of this node's own
    /// table in `peers`, and without one no other node can reach this one.
    pub listen: Option<SocketAddr>,
    /// Required to listen on a network address: peers are neither authenticated nor encrypted yet.
    #[serde(default)]
    pub insecure: bool,
    /// Store, volumes and journal; must be on a file system that can be an overlay's upper
    /// directory.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets: `control.sock` and `snapshotter.sock`.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// containerd's socket.
    #[serde(default = "default_containerd_socket")]
    pub containerd_socket: PathBuf,
    /// containerd's state directory, below which the bundles of running containers lie.
    #[serde(default = "default_containerd_state")]
    pub containerd_state: PathBuf,
    /// containerd's root directory, which is flushed before a source removes what moved here.
    #[serde(default = "default_containerd_root")]
    pub containerd_root: PathBuf,
    /// Path of the shim, for containers that select it by path and not by name.
    #[serde(default = "default_shim")]
    pub shim: PathBuf,
    /// How long a container of this node may stand still for a migration or a consistent snapshot,
    /// in seconds, until another node is given the right to run it. After that it runs on here.
    #[serde(default = "default_freeze_max_s")]
    pub freeze_max_s: u64,
    /// The other nodes of the site.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// What a migration may bring to this node.
    #[serde(default)]
    pub admit: Admit,
    /// Whether containers of this node have Multipath TCP, whose sockets CRIU cannot dump.
    #[serde(default = "enabled")]
    pub mptcp: bool,
    /// Whether memory of one user of a service may serve another one's migration, within a
    /// containerd namespace.
    #[serde(default)]
    pub sibling_memory: bool,
    /// Where it is looked up who holds what.
    #[serde(default)]
    pub directory: Directory,
    /// Layers of images, between neighbours.
    #[serde(default)]
    pub layers: Layers,
    /// A read-only registry for this node.
    #[serde(default)]
    pub mirror: Mirror,
    /// Cached snapshots: when they are taken, where copies go, what is kept.
    #[serde(default)]
    pub cache: Cache,
    /// What this node says of itself, for others' `cache.place_on`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// What a node does about cached snapshots. Sizes and times by their units; docs/configuration.md
/// explains each key.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Whether running containers are captured by schedule.
    pub schedule: bool,
    /// Shortest and longest time between two captures of a subject.
    pub period_min_s: u64,
    /// See `period_min_s`.
    pub period_max_s: u64,
    /// Expected difference to the last snapshot that makes the next one due.
    pub difference_mib: u64,
    /// Periods are longer by a share of themselves below this.
    pub jitter: f64,
    /// Share of one processor that captures may take on average.
    pub cpu_share: f64,
    /// What captures may write on average.
    pub disk_mib_per_s: u64,
    /// Runnable tasks per processor beyond which nothing is captured.
    pub load_max: f64,
    /// What is done about memory.
    pub memory: CacheMemory,
    /// Neighbours that get a copy.
    pub copies: usize,
    /// Labels that such a neighbour must have.
    pub place_on: BTreeMap<String, String>,
    /// Whether this node keeps copies for others.
    pub accept: bool,
    /// Snapshots kept of each subject.
    pub keep_last: usize,
    /// Younger ones are kept beyond that; 0 for none.
    pub keep_within_s: u64,
    /// How long snapshots outlive their container or volume.
    pub expire_removed_s: u64,
    /// What the store may hold.
    pub budget_mib: u64,
    /// Room on the disk that caching leaves to others.
    pub min_free_mib: u64,
}

/// Whether memory, which holds secrets, is cached, and how it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMemory {
    /// While the container runs: good as a base, not to be restored from.
    Live,
    /// Under a freeze, with everything else of the container: also a snapshot to restore from.
    Consistent,
    /// Not at all, neither by schedule nor after a migration nor for others.
    Off,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            schedule: true,
            period_min_s: 60,
            period_max_s: 3600,
            difference_mib: 16,
            jitter: 0.2,
            cpu_share: 0.1,
            disk_mib_per_s: 20,
            load_max: 0.8,
            memory: CacheMemory::Live,
            copies: 1,
            place_on: BTreeMap::new(),
            accept: true,
            keep_last: 2,
            keep_within_s: 0,
            expire_removed_s: 24 * 3600,
            budget_mib: 16 << 10,
            min_free_mib: 1024,
        }
    }
}

/// Mebibytes in bytes; what is more than there can be is as much as there can be.
pub fn mib(mebibytes: u64) -> u64 {
    mebibytes.saturating_mul(1 << 20)
}

impl Cache {
    /// When subjects are captured.
    pub fn schedule(&self) -> Result<Schedule, ScheduleError> {
        let (min, max) =
            (Duration::from_secs(self.period_min_s), Duration::from_secs(self.period_max_s));
        Schedule::new(min, max, mib(self.difference_mib), self.jitter)
    }

    /// What captures may take of the node.
    pub fn budget(&self) -> Result<Budget, ScheduleError> {
        Budget::new(self.cpu_share, mib(self.disk_mib_per_s))
    }

    /// What is kept.
    pub fn rules(&self) -> Rules {
        Rules {
            keep_last: self.keep_last,
            keep_within: (self.keep_within_s > 0).then(|| Duration::from_secs(self.keep_within_s)),
            expire_removed: Duration::from_secs(self.expire_removed_s),
            budget_bytes: None,
        }
    }
}

/// What is done about layers of images while containerd pulls.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Layers {
    /// Whether this node takes layers from its neighbours before it asks a registry.
    pub fetch: bool,
    /// Whether it makes layers for them of what its containerd has.
    pub make: bool,
}

impl Default for Layers {
    fn default() -> Self {
        Self { fetch: true, make: true }
    }
}

/// A read-only registry on this node's loopback address.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Mirror {
    /// Where it listens, for example `127.0.0.1:7947`. Absent: there is none.
    pub listen: Option<SocketAddr>,
    /// What it says of tags.
    pub tags: Tags,
}

/// Where the mirror learns what a tag stands for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tags {
    /// Nowhere: it is asked by digest.
    Off,
    /// From this node's own images.
    #[default]
    Local,
    /// From the neighbours' too, who are then believed.
    Neighbours,
}

/// Which directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Every peer is asked.
    #[default]
    Neighbours,
    /// etcd is.
    Etcd,
}

/// How nodes learn what others hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Directory {
    /// Which directory.
    pub backend: Backend,
    /// etcd's addresses, `http://HOST:PORT`, asked in this order.
    pub endpoints: Vec<String>,
    /// Nodes of one site see each other's entries.
    pub site: String,
}

impl Default for Directory {
    fn default() -> Self {
        let (backend, endpoints) = (Backend::default(), Vec::new());
        Self { backend, endpoints, site: "default".to_owned() }
    }
}

/// Another node.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name.
    pub name: String,
    /// `HOST:PORT` of its peer service.
    pub address: String,
}

/// What `godwit migrate` may create on this node. The source describes its container; this says
/// what of it may run.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admit {
    /// Host paths, with everything below them, that a container may bind-mount.
    pub bind_sources: Vec<PathBuf>,
    /// Capabilities that a container may hold.
    pub capabilities: Vec<String>,
    /// File systems of block volumes that this node mounts although their images come from other
    /// nodes.
    pub file_systems: Vec<FileSystem>,
}

impl Default for Admit {
    /// No host paths, no images of file systems, and the capabilities that containerd gives an
    /// unprivileged container.
    fn default() -> Self {
        let capabilities = [
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
            "CAP_AUDIT_WRITE",
        ];
        Self {
            bind_sources: Vec::new(),
            capabilities: capabilities.map(str::to_owned).to_vec(),
            file_systems: Vec::new(),
        }
    }
}

/// Why the daemon cannot use its configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The file is not of the documented form.
    #[error("{} is not a valid configuration", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Peers could reach the daemon, and nothing would tell friend from foe.
    #[error(
        "refusing to listen on {0}: peers are not authenticated yet; on a trusted network, set `insecure = true`"
    )]
    Insecure(SocketAddr),
    /// Every client that reaches the mirror can read every image.
    #[error(
        "refusing to serve the mirror on {0}: it is for this node alone, on a loopback address"
    )]
    Mirror(SocketAddr),
    /// A schedule that makes no sense.
    #[error("[cache] is not usable")]
    Cache(#[from] ScheduleError),
    /// What is removed elsewhere would be forgotten before its owner could say that it is there.
    #[error("`cache.expire_removed_s` must be at least twice `cache.period_max_s`")]
    Expiry,
    /// Other nodes could not name this one: not in `peers`, nor in an annotation.
    #[error(
        "{0:?} cannot be a node's name: `node` (by default the host name) has letters, digits, '_', '.' and '-'"
    )]
    NodeName(String),
    /// Two peers of one name.
    #[error("peer name {0:?} is not unique")]
    PeerName(String),
    /// The address of this node's own table in `peers` does not resolve.
    #[error("cannot resolve {address:?}, this node's own address in `peers`")]
    Own {
        /// The address as configured.
        address: String,
        /// The resolver's error.
        source: std::io::Error,
    },
    /// Keys of the directory that do not fit together.
    #[error("[directory] {0}")]
    Directory(&'static str),
}

/// The host's name as far as it can name a node; [`Config::read`] refuses an empty one.
fn host_name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn enabled() -> bool {
    true
}

fn default_freeze_max_s() -> u64 {
    60
}

fn default_state_dir() -> PathBuf {
    "/var/lib/godwit".into()
}

fn default_run_dir() -> PathBuf {
    "/run/godwit".into()
}

fn default_containerd_socket() -> PathBuf {
    "/run/containerd/containerd.sock".into()
}

fn default_containerd_root() -> PathBuf {
    "/var/lib/containerd".into()
}

fn default_shim() -> PathBuf {
    "/usr/local/bin/containerd-shim-godwit-v1".into()
}

fn default_containerd_state() -> PathBuf {
    "/run/containerd".into()
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// Errors: [`ConfigError`]; nothing was started.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let mut config: Self = toml::from_str(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        config.take_own_peer()?;
        config.check()?;
        Ok(config)
    }

    /// Takes this node's own table out of the peers, so that all nodes of a site can have one file.
    /// Its address becomes `listen`, unless that is given.
    fn take_own_peer(&mut self) -> Result<(), ConfigError> {
        let Some(index) = self.peers.iter().position(|peer| peer.name == self.node) else {
            return Ok(());
        };
        let own = self.peers.remove(index);
        if self.listen.is_none() {
            let address = own.address.clone();
            let listen = own.resolve().map_err(|source| ConfigError::Own { address, source })?;
            self.listen = Some(listen);
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        if let Some(listen) = self.listen.filter(|listen| !listen.ip().is_loopback())
            && !self.insecure
        {
            return Err(ConfigError::Insecure(listen));
        }
        if let Some(listen) = self.mirror.listen.filter(|listen| !listen.ip().is_loopback()) {
            return Err(ConfigError::Mirror(listen));
        }
        if !godwit_protos::is_name(&self.node) {
            return Err(ConfigError::NodeName(self.node.clone()));
        }
        self.cache.schedule()?;
        self.cache.budget()?;
        if self.cache.expire_removed_s < 2 * self.cache.period_max_s {
            return Err(ConfigError::Expiry);
        }
        let mut names = BTreeMap::from([(self.node.as_str(), ())]);
        for peer in &self.peers {
            if names.insert(&peer.name, ()).is_some() {
                return Err(ConfigError::PeerName(peer.name.clone()));
            }
        }
        self.directory.check()
    }

    /// How long a container may stand still. At least a second: with less none could be moved.
    pub fn freeze_max(&self) -> Duration {
        Duration::from_secs(self.freeze_max_s.max(1))
    }

    /// The peer of this name.
    pub fn peer(&self, name: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.name == name)
    }
}

impl Directory {
    fn check(&self) -> Result<(), ConfigError> {
        let is_etcd = self.backend == Backend::Etcd;
        if is_etcd == self.endpoints.is_empty() {
            return Err(ConfigError::Directory("`endpoints` goes with `backend = \"etcd\"`"));
        }
        if !self.endpoints.iter().all(|endpoint| endpoint.starts_with("http://")) {
            return Err(ConfigError::Directory("`endpoints` have the form http://HOST:PORT"));
        }
        if !godwit_protos::is_name(&self.site) {
            return Err(ConfigError::Directory("`site` has letters, digits, '_', '.' and '-'"));
        }
        Ok(())
    }
}

impl Peer {
    /// The first address that the name resolves to. Errors: the resolver's.
    pub fn resolve(&self) -> std::io::Result<SocketAddr> {
        self.address.to_socket_addrs()?.next().ok_or_else(|| std::io::ErrorKind::NotFound.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Config::read(file.path())
    }

    #[test]
    fn a_network_address_needs_insecure_in_so_many_words() {
        let refused = read("node = 'a'\nlisten = '10.0.0.1:1'");
        assert!(matches!(refused, Err(ConfigError::Insecure(_))));
        assert!(read("node = 'a'\nlisten = '10.0.0.1:1'\ninsecure = true").is_ok());
        assert!(read("node = 'a'\nlisten = '127.0.0.1:1'").is_ok());
        assert!(read("node = 'a'").is_ok());
    }

    #[test]
    fn a_node_is_called_as_its_host_unless_told_otherwise() {
        let host = nix::unistd::gethostname().unwrap();
        assert_eq!(read("").unwrap().node, host.to_string_lossy());
        assert_eq!(read("node = 'a'").unwrap().node, "a");
        for wrong in ["", "a/b", "a b"] {
            let refused = read(&format!("node = '{wrong}'"));
            assert!(matches!(refused, Err(ConfigError::NodeName(_))), "{wrong:?}");
        }
    }

    /// Method: the very file that users install. The daemon's start with it is in the suite
    /// `nodes`.
    #[test]
    fn the_shipped_configuration_is_valid_and_listens_nowhere() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/deploy/godwit.toml");
        let config = Config::read(&path).unwrap();
        assert!(config.listen.is_none() && config.peers.is_empty());
    }

    #[test]
    fn the_mirror_is_for_this_node_alone() {
        let mirror = |keys: &str| read(&format!("node = 'a'\ninsecure = true\n[mirror]\n{keys}"));
        let config = mirror("listen = '127.0.0.1:7947'").unwrap();
        assert_eq!(config.mirror.tags, Tags::Local);
        assert!(mirror("listen = '[::1]:7947'\ntags = 'neighbours'").is_ok());
        for wrong in ["0.0.0.0:7947", "10.0.0.1:7947", "[::]:7947"] {
            let refused = mirror(&format!("listen = '{wrong}'"));
            assert!(matches!(refused, Err(ConfigError::Mirror(_))), "{wrong}");
        }
        assert!(matches!(mirror("tags = 'x'"), Err(ConfigError::Parse { .. })));
        assert!(read("node = 'a'").unwrap().mirror.listen.is_none());
    }

    #[test]
    fn a_misspelt_key_is_an_error() {
        assert!(matches!(
            read("node = 'a'\nlissten = '127.0.0.1:1'"),
            Err(ConfigError::Parse { .. })
        ));
    }

    #[test]
    fn a_schedule_that_makes_no_sense_is_refused() {
        for wrong in [
            "cpu_share = 0.0",
            "period_min_s = 0",
            "jitter = 1.5",
            "memory = 'x'",
            "expire_removed_s = 1",
        ] {
            let error = read(&format!("node = 'a'\n[cache]\n{wrong}")).unwrap_err();
            let key = wrong.split(' ').next().unwrap();
            let text = crate::error::chain(&error);
            assert!(text.contains(key), "{text} does not name {key}");
        }
        let huge = read("node = 'a'\n[cache]\nbudget_mib = 1000000000000000000").unwrap();
        assert_eq!(mib(huge.cache.budget_mib), u64::MAX);
        assert!(read("node = 'a'\n[cache]\nmemory = 'off'\ncopies = 3").is_ok());
    }

    #[test]
    fn etcd_needs_endpoints_and_nothing_else_takes_them() {
        let directory = |keys: &str| read(&format!("node = 'a'\n[directory]\n{keys}"));
        let etcd = directory("backend = 'etcd'\nendpoints = ['http://x:2379']").unwrap().directory;
        assert_eq!((etcd.backend, etcd.site.as_str()), (Backend::Etcd, "default"));
        assert_eq!(read("node = 'a'").unwrap().directory.backend, Backend::Neighbours);
        for wrong in [
            "backend = 'etcd'",
            "endpoints = ['http://x:2379']",
            "backend = 'etcd'\nendpoints = ['https://x:2379']",
            "backend = 'etcd'\nendpoints = ['http://x:2379']\nsite = 'a/b'",
        ] {
            assert!(matches!(directory(wrong), Err(ConfigError::Directory(_))), "{wrong}");
        }
        for wrong in ["backend = 'zookeeper'", "endpoint = 'http://x:2379'"] {
            assert!(matches!(directory(wrong), Err(ConfigError::Parse { .. })), "{wrong}");
        }
    }

    #[test]
    fn two_peers_of_one_name_are_refused() {
        for name in ["a", "b"] {
            let peer = format!("[[peers]]\nname = '{name}'\naddress = '127.0.0.1:1'\n");
            let twice = format!("node = 'a'\n{peer}{peer}");
            assert!(matches!(read(&twice), Err(ConfigError::PeerName(_))), "{name}");
        }
    }

    #[test]
    fn all_nodes_of_a_site_can_have_one_file() {
        let peers = "[[peers]]\nname = 'a'\naddress = '127.0.0.1:1'\n\
                     [[peers]]\nname = 'b'\naddress = '127.0.0.1:2'\n";
        for (node, listen, other) in [("a", "127.0.0.1:1", "b"), ("b", "127.0.0.1:2", "a")] {
            let config = read(&format!("node = '{node}'\n{peers}")).unwrap();
            assert_eq!(config.listen, Some(listen.parse().unwrap()));
            assert!(config.peers.iter().map(|peer| peer.name.as_str()).eq([other]));
        }
        let explicit = read(&format!("node = 'a'\nlisten = '127.0.0.1:9'\n{peers}")).unwrap();
        assert_eq!(explicit.listen, Some("127.0.0.1:9".parse().unwrap()));
        let network = "node = 'a'\n[[peers]]\nname = 'a'\naddress = '192.0.2.1:1'";
        assert!(matches!(read(network), Err(ConfigError::Insecure(_))));
        let odd = "node = 'a'\n[[peers]]\nname = 'a'\naddress = 'no port'";
        assert!(matches!(read(odd), Err(ConfigError::Own { .. })));
    }
}
