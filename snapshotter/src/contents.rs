//! Read-only content that a container mounts and this node lacks: brought from neighbours, by digest.
//!
//! 1. Say hello to every peer; 2. look up in the directory who has the manifest; 3. fetch from all of them at once; 4. lay
//!    it out. Everything is checked against its digest as it arrives, so a neighbour that lies costs time only; what has come
//!    stays for the next attempt. Two that want the same fetch it twice at worst, and lay it out once.

use std::sync::Arc;
use std::time::Duration;

use godwit_protos::Digest;
use tokio::sync::watch;

use crate::content::object::Kind;
use crate::directory::{LOOKUP_MAX, Lookup, Query};
use crate::migrate::{MigrationError, blocking};
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::fetch::{Depth, Peers, Standings, fetch};
use crate::volumes::VolumeError;

/// How long a neighbour has to answer a hello.
const HELLO_MAX: Duration = Duration::from_millis(500);

/// How long what arrives is protected until it is laid out.
const BRING_MAX: Duration = Duration::from_secs(3600);

/// Makes the content `digest` available here, from neighbours if it is not.
///
/// Errors: [`VolumeError::Nowhere`] when no neighbour has it; else why it could not be had from those that said they
/// do, the last one's reason.
pub async fn bring(node: &Arc<Node>, digest: Digest) -> Result<(), MigrationError> {
    if node.volumes.has_content(&digest) {
        return Ok(());
    }
    let mut holders = holders(node, digest).await;
    let lease = Arc::new(node.store.lease("volume", BRING_MAX));
    let standings = Arc::new(Standings::known(node.channels.rates()));
    let mut outcome = Err(VolumeError::Nowhere(digest).into());
    // Each takes the place of the one who has everything until one really has.
    while let Some(source) = holders.pop() {
        let peers = Peers { neighbours: holders.clone(), source, standings: standings.clone() };
        let root = [(Kind::Tree, digest)];
        match fetch(&node.store, &lease, &peers, &root, Depth::Content).await {
            Ok(_) => {
                let volumes = node.volumes.clone();
                return blocking(move || Ok(volumes.lay_out(&digest).map(drop)?)).await;
            }
            Err(error) => outcome = Err(error.into()),
        }
    }
    outcome
}

/// Neighbours that say they have it, the fastest last.
async fn holders(node: &Node, digest: Digest) -> Vec<Arc<Connection>> {
    let open = node.config.peers.iter().map(|peer| async {
        let opened = Connection::open(&node.config, &peer.name, HELLO_MAX).await;
        opened.ok().map(Arc::new)
    });
    let connections: Vec<_> = futures::future::join_all(open).await.into_iter().flatten().collect();
    let query = Query { manifests: vec![digest], ..Query::default() };
    let (_, joined) = watch::channel(connections.clone());
    let found = Lookup::begin(&node.directory, query, joined).found(LOOKUP_MAX).await;
    let mut holders = connections;
    holders.retain(|peer| found.iter().any(|entry| entry.node == peer.node));
    let rate = |peer: &Arc<Connection>| {
        node.channels.of(&peer.node).throughput_bytes_per_second.unwrap_or(0.0)
    };
    holders.sort_by(|one, other| rate(one).total_cmp(&rate(other)));
    holders
}
