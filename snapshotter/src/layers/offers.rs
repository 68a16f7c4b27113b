//! Who can give a layer's object: those who keep it, and those who make it.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::{Digest, Subject};
use tokio::sync::watch;

use super::make;
use crate::containerd::FoundLayer;
use crate::directory::{LOOKUP_MAX, Lookup, Query};
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::backoff::BACKOFF_SILENT;
use crate::peer::neighbours::connect;

/// How long a neighbour has to answer a hello.
const HELLO_MAX: Duration = Duration::from_millis(300);

/// A layer's object and who has it.
#[derive(Debug)]
pub(super) struct Offer {
    pub(super) root: Digest,
    pub(super) size_bytes: u64,
    pub(super) peers: Vec<Arc<Connection>>,
}

/// How an object comes to be at a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// He keeps it.
    Kept,
    /// He has the layer's blob, and makes it now.
    Made,
}

/// The neighbours that are asked for a layer.
pub(super) struct Neighbours<'a> {
    node: &'a Arc<Node>,
    connections: Vec<Arc<Connection>>,
}

impl<'a> Neighbours<'a> {
    pub(super) async fn connect(node: &'a Arc<Node>) -> Self {
        let (connections, absent) =
            connect(&node.config, &node.links, HELLO_MAX, &node.backoff.names()).await;
        node.backoff.add(&absent, BACKOFF_SILENT);
        Self { node, connections }
    }

    /// Who has the layer in this way; the object that most have comes first. A neighbour that was
    /// found wanting meanwhile is not asked again.
    pub(super) async fn offers(&mut self, way: Way, layer: &FoundLayer) -> Vec<Offer> {
        let backoff = self.node.backoff.names();
        self.connections.retain(|peer| !backoff.contains(&peer.node));
        match way {
            Way::Kept => self.kept(layer).await,
            Way::Made => {
                let (made, silent) = make::ask(&self.connections, layer).await;
                self.node.backoff.add(&silent, BACKOFF_SILENT);
                grouped(made)
            }
        }
    }

    async fn kept(&self, layer: &FoundLayer) -> Vec<Offer> {
        let subjects = vec![Subject::ImageLayer(layer.diff_id)];
        let (_, joined) = watch::channel(self.connections.clone());
        let query = Query { subjects, ..Query::default() };
        let found = Lookup::begin(&self.node.directory, query, joined).found(LOOKUP_MAX).await;
        let of = |node: &str| self.connections.iter().find(|peer| peer.node == node).cloned();
        let holders = found
            .iter()
            .filter_map(|entry| Some((entry.manifest, entry.size_bytes, of(&entry.node)?)));
        grouped(holders)
    }
}

/// Who offers the same belongs together.
fn grouped(holders: impl IntoIterator<Item = (Digest, u64, Arc<Connection>)>) -> Vec<Offer> {
    let mut offers: Vec<Offer> = Vec::new();
    for (root, size_bytes, peer) in holders {
        match offers.iter_mut().find(|one| (one.root, one.size_bytes) == (root, size_bytes)) {
            Some(offer) => offer.peers.push(peer),
            None => offers.push(Offer { root, size_bytes, peers: vec![peer] }),
        }
    }
    offers.sort_by_key(|offer| Reverse(offer.peers.len()));
    offers
}
