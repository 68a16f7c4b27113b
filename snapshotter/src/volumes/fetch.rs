//! Read-only content that a container mounts and this node lacks: brought from neighbours, by
//! digest.
//!
//! 1. Say hello to every peer; 2. look up in the directory who has the manifest; 3. fetch from all
//!    of them at once; 4. lay it out. Everything is checked against its digest as it arrives, so a
//!    neighbour that lies costs time only; what has come stays for the next attempt. Two that want
//!    the same fetch it twice at worst, and lay it out once.

use std::sync::Arc;
use std::time::Duration;

use godwit_protos::Digest;
use tokio::sync::watch;

use super::VolumeError;
use crate::content::object::Kind;
use crate::directory::{LOOKUP_MAX, Lookup, Query};
use crate::migrate::{MigrationError, blocking};
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::fetch::{Brought, Depth, FetchError, Patience, Peers, Standings, fetch_within};
use crate::store::Lease;

/// How long a neighbour has to answer a hello.
pub(crate) const HELLO_MAX: Duration = Duration::from_millis(500);

/// How long what arrives is protected until it is laid out.
const BRING_MAX: Duration = Duration::from_secs(3600);

/// Makes the content `digest` available here, from neighbours if it is not.
///
/// Errors: [`VolumeError::Nowhere`] when no neighbour has it; else why it could not be had from
/// those that said they do, the last one's reason.
pub async fn bring(node: &Arc<Node>, digest: Digest) -> Result<(), MigrationError> {
    if node.volumes.has_content(&digest) {
        return Ok(());
    }
    let holders = holders(node, digest).await;
    if holders.is_empty() {
        return Err(VolumeError::Nowhere(digest).into());
    }
    let lease = Arc::new(node.store.lease("volume", BRING_MAX));
    let patience = Patience::USUAL.source;
    fetch_from(node, holders, (Kind::Tree, digest), &lease, patience).await?;
    let volumes = node.volumes.clone();
    blocking(move || Ok(volumes.lay_out(&digest).map(drop)?)).await
}

/// Fetches `root`, and all that it refers to, from `holders` at once. Returns who brought what.
///
/// `patience` is the longest wait for one of them. Errors: [`FetchError::Nowhere`] when they do not
/// bring all of it.
pub async fn fetch_from(
    node: &Node,
    holders: Vec<Arc<Connection>>,
    root: (Kind, Digest),
    lease: &Arc<Lease>,
    patience: Duration,
) -> Result<Brought, FetchError> {
    let standings = Arc::new(Standings::known(node.channels.rates()));
    let peers = Peers { neighbours: holders, source: None, standings };
    let patience = Patience { neighbour: patience, ..Patience::USUAL };
    let (roots, depth) = ([root], Depth::Content);
    let brought = fetch_within(&node.store, lease, &peers, &roots, depth, patience).await?;
    Ok(brought.into_iter().next().unwrap_or_default())
}

/// Connections to the peers that answer a hello within `limit`, the fastest last, and the names of
/// those that do not. Those of `except` are not asked.
pub async fn connect(
    node: &Node,
    limit: Duration,
    except: &[String],
) -> (Vec<Arc<Connection>>, Vec<String>) {
    let peers = node.config.peers.iter().filter(|peer| !except.contains(&peer.name));
    let open = peers.map(|peer| async {
        let opened = Connection::open(&node.config, &peer.name, limit).await;
        opened.map(Arc::new).map_err(|_absent| peer.name.clone())
    });
    let (mut connections, mut absent) = (Vec::new(), Vec::new());
    for opened in futures::future::join_all(open).await {
        match opened {
            Ok(connection) => connections.push(connection),
            Err(name) => absent.push(name),
        }
    }
    let rate = |peer: &Arc<Connection>| {
        node.channels.of(&peer.node).throughput_bytes_per_second.unwrap_or(0.0)
    };
    connections.sort_by(|one, other| rate(one).total_cmp(&rate(other)));
    (connections, absent)
}

/// Neighbours that say they have it, the fastest last.
async fn holders(node: &Node, digest: Digest) -> Vec<Arc<Connection>> {
    let (mut holders, _) = connect(node, HELLO_MAX, &[]).await;
    let query = Query { manifests: vec![digest], ..Query::default() };
    let (_, joined) = watch::channel(holders.clone());
    let found = Lookup::begin(&node.directory, query, joined).found(LOOKUP_MAX).await;
    holders.retain(|peer| found.iter().any(|entry| entry.node == peer.node));
    holders
}
