//! What every directory promises, in one body: real daemons' parts in this process, with real
//! stores and connections between them; only the configured directory differs.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use godwit_protos::Digest;
use godwit_snapshotter::api::peer as server;
use godwit_snapshotter::config::Config;
use godwit_snapshotter::content::object::Kind;
use godwit_snapshotter::directory::{Entry, LOOKUP_MAX, Lookup, Query};
use godwit_snapshotter::migrate::destination::Sessions;
use godwit_snapshotter::node::Node;
use godwit_snapshotter::peer::Connection;
use godwit_snapshotter::store::{Snapshot, SnapshotId};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;

/// Nodes `a` to `d`. `a` asks; `d` is no peer of `a`; `c` does not give memory to other users.
const NODES: [&str; 4] = ["a", "b", "c", "d"];

const LIMIT: Duration = Duration::from_secs(5);

const OWN: &str = "memory|default|docker.io/library/redis:7|cache";

struct Site {
    nodes: Vec<Arc<Node>>,
    servers: Vec<tokio::task::JoinHandle<()>>,
    _state: tempfile::TempDir,
}

/// What of an entry does not depend on the moment.
type Told = (String, Option<String>, u64, Digest, u64);

impl Site {
    /// `directory` is the table of that name.
    async fn start(directory: &str) -> Result<Self> {
        let state = tempfile::tempdir()?;
        let mut listeners = Vec::new();
        for _ in NODES {
            listeners.push(TcpListener::bind("127.0.0.1:0").await?);
        }
        let addresses: Vec<_> =
            listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
        let (mut nodes, mut servers) = (Vec::new(), Vec::new());
        for (name, listener) in NODES.iter().zip(listeners) {
            let home = state.path().join(name);
            let mut text = format!(
                "node = '{name}'\nstate_dir = '{}'\nsibling_memory = {}\n{directory}\n",
                home.display(),
                *name != "c"
            );
            for (peer, address) in NODES.iter().zip(&addresses) {
                if peer != name && (*name, *peer) != ("a", "d") {
                    text += &format!("[[peers]]\nname = '{peer}'\naddress = '{address}'\n");
                }
            }
            let config: Config = toml::from_str(&text)?;
            let node = Node::open(config, &home.join("fences"))?;
            let served = Server::builder()
                .add_service(server::service(Arc::new(Sessions::new(node.clone()))))
                .serve_with_incoming(TcpListenerStream::new(listener));
            servers.push(tokio::spawn(async move { drop(served.await) }));
            nodes.push(node);
        }
        Ok(Self { nodes, servers, _state: state })
    }

    fn node(&self, name: &str) -> &Arc<Node> {
        &self.nodes[NODES.iter().position(|node| *node == name).expect("one of the nodes")]
    }

    /// Records a snapshot with content of its own, `age` ago.
    fn record(&self, at: &str, of: &str, sequence: u64, age: Duration) -> Result<SnapshotId> {
        let node = self.node(at);
        let lease = node.store.lease("test", LIMIT);
        let mut writer = node.store.writer(&lease);
        let root = writer.put(format!("{at} {of} {sequence}").as_bytes())?;
        writer.flush()?;
        let taken = SystemTime::now().duration_since(UNIX_EPOCH)?.saturating_sub(age);
        Ok(node.store.record(&Snapshot {
            subject: of.parse()?,
            sequence,
            taken_at_unix_ms: i64::try_from(taken.as_millis())?,
            root,
            root_kind: Kind::Chunk as u8,
            size_bytes: 1000 + sequence,
            node: at.to_owned(),
            is_pinned: false,
        })?)
    }

    /// Has every node publish what it holds, as daemons do by themselves.
    async fn publish(&self) -> Result<()> {
        for node in &self.nodes {
            node.directory.publish(node.held()?).await;
        }
        Ok(())
    }

    /// What node `a` finds.
    async fn found(&self, query: Query) -> Result<Vec<Entry>> {
        let node = self.node("a");
        let mut connections = Vec::new();
        for peer in &node.config.peers {
            if let Ok(connection) = Connection::open(&node.config, &peer.name, LIMIT).await {
                connections.push(Arc::new(connection));
            }
        }
        let (_, joined) = watch::channel(connections);
        Ok(Lookup::begin(&node.directory, query, joined).found(LOOKUP_MAX).await)
    }

    async fn told(&self, query: Query) -> Result<Vec<Told>> {
        let told = |entry: Entry| {
            let subject = entry.subject.map(|subject| subject.to_string());
            (entry.node, subject, entry.sequence, entry.manifest, entry.size_bytes)
        };
        Ok(self.found(query).await?.into_iter().map(told).collect())
    }

    async fn leave(&self, name: &str) {
        self.node(name).directory.withdraw().await;
        let index = NODES.iter().position(|node| *node == name).expect("one of the nodes");
        self.servers[index].abort();
    }
}

fn of(subjects: &[&str]) -> Result<Query> {
    let subjects = subjects.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    Ok(Query { subjects, ..Query::default() })
}

fn told(node: &str, of: &str, sequence: u64) -> Told {
    let manifest = Digest::of(format!("{node} {of} {sequence}").as_bytes());
    (node.to_owned(), Some(of.to_owned()), sequence, manifest, 1000 + sequence)
}

/// The body.
pub(crate) async fn conforms(directory: &str) -> Result<()> {
    let site = Site::start(directory).await?;
    site.publish().await?;
    for node in &site.nodes {
        let status = node.directory.status();
        assert!(!status.contains("not reachable"), "{status}");
    }
    assert_eq!(site.told(of(&[OWN])?).await?, [], "no node holds anything");

    // The lineage decides, whatever the ages; of equal places the younger is better.
    let minutes = |count: u64| Duration::from_secs(60 * count);
    let old = site.record("b", OWN, 1, minutes(1))?;
    site.record("b", OWN, 2, minutes(300))?;
    site.record("c", OWN, 3, minutes(900))?;
    site.record("b", "volume|data", 7, minutes(60))?;
    site.record("c", "volume|data", 7, minutes(40))?;
    // Neither its own nor those of a node that it does not know.
    site.record("a", OWN, 9, minutes(1))?;
    site.record("d", OWN, 9, minutes(1))?;
    site.publish().await?;
    let memory = [told("c", OWN, 3), told("b", OWN, 2), told("b", OWN, 1)];
    assert_eq!(site.told(of(&[OWN])?).await?, memory);
    let volume = [told("c", "volume|data", 7), told("b", "volume|data", 7)];
    assert_eq!(site.told(of(&["volume|data"])?).await?, volume);
    assert_eq!(site.told(of(&[OWN, "volume|data", "volume|other"])?).await?.len(), 5);
    for entry in site.found(of(&[OWN])?).await? {
        let age = entry.age.as_secs() / 60;
        let expected = [1, 300, 900][usize::try_from(entry.sequence)? - 1];
        assert!((expected..expected + 2).contains(&age), "{entry:?}");
    }

    // By digest: roots of snapshots and read-only volumes.
    let content = tempfile::tempdir()?;
    std::fs::write(content.path().join("file"), "read-only")?;
    let volume = site.node("c").volumes.import(content.path())?;
    site.publish().await?;
    let root = told("b", OWN, 2).3;
    let query = Query { manifests: vec![volume, root, Digest::of(b"?")], ..Query::default() };
    let mut holders = site.told(query).await?;
    holders.sort();
    let whole = |node: &str, digest| (node.to_owned(), None, 0, digest, 0);
    assert_eq!(holders, [whole("b", root), whole("c", volume)]);

    // Another user's memory: of nodes that give it, the newest, in this namespace, after one's own.
    let other = OWN.replace("cache", "other");
    for (node, of) in [("b", &other), ("c", &other), ("b", &OWN.replace("default", "k8s.io"))] {
        site.record(node, of, 1, minutes(10))?;
        site.record(node, of, 2, minutes(5))?;
    }
    site.publish().await?;
    let service = "default|docker.io/library/redis:7".parse()?;
    let query = Query { services: vec![service], ..of(&[OWN])? };
    assert_eq!(site.told(of(&[OWN])?).await?, memory);
    assert_eq!(site.told(query).await?[3..], [told("b", &other, 2)]);

    // What is removed is gone, and so is who leaves.
    site.node("b").store.remove_snapshot(old)?;
    site.publish().await?;
    assert_eq!(site.told(of(&[OWN])?).await?, memory[..2]);
    site.leave("c").await;
    let left = site.told(of(&[OWN])?).await.context("after a node has left")?;
    assert_eq!(left, memory[1..2]);
    Ok(())
}
