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

use super::{VolumeError, Volumes};
use crate::config::Config;
use crate::content::object::Kind;
use crate::directory::{Directory, LOOKUP_MAX, Lookup, Query};
use crate::peer::Connection;
use crate::peer::fetch::{FetchError, Patience, fetch_from};
use crate::peer::link::LinkStats;
use crate::peer::neighbours::{HELLO_MAX, connect};
use crate::store::Store;
use crate::supervise::{Interrupted, blocking};

/// How long what arrives is protected until it is laid out.
const BRING_MAX: Duration = Duration::from_secs(3600);

/// Why content that a container mounts is not here.
#[derive(Debug, thiserror::Error)]
pub enum BringError {
    /// No neighbour has it, or it cannot be laid out.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// Those that say they have it do not deliver it.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The daemon is stopping.
    #[error("interrupted")]
    Interrupted,
}

impl From<Interrupted> for BringError {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

/// What of a node takes part in fetching content.
#[derive(Clone, Copy, Debug)]
pub struct Fetcher<'a> {
    /// Names the peers.
    pub config: &'a Config,
    /// Takes the objects.
    pub store: &'a Store,
    /// Lays the content out.
    pub volumes: &'a Volumes,
    /// Tells which peers are fast.
    pub links: &'a LinkStats,
    /// Tells which peers have it.
    pub directory: &'a Arc<dyn Directory>,
}

impl Fetcher<'_> {
    /// Makes the content `digest` available here, from neighbours if it is not.
    ///
    /// Errors: [`VolumeError::Nowhere`] when no neighbour has it; else why it could not be had from
    /// those that said they do, the last one's reason.
    pub async fn bring(self, digest: Digest) -> Result<(), BringError> {
        if self.volumes.has_content(&digest) {
            return Ok(());
        }
        let holders = self.holders(digest).await;
        if holders.is_empty() {
            return Err(VolumeError::Nowhere(digest).into());
        }
        let lease = Arc::new(self.store.lease("volume", BRING_MAX));
        let (root, patience) = ((Kind::Tree, digest), Patience::USUAL.source);
        fetch_from(self.store, self.links, holders, root, &lease, patience).await?;
        let volumes = self.volumes.clone();
        blocking(move || Ok(volumes.lay_out(&digest).map(drop)?)).await
    }

    /// Neighbours that say they have it, the fastest last.
    async fn holders(self, digest: Digest) -> Vec<Arc<Connection>> {
        let (mut holders, _) = connect(self.config, self.links, HELLO_MAX, &[]).await;
        let query = Query { manifests: vec![digest], ..Query::default() };
        let (_, joined) = watch::channel(holders.clone());
        let found = Lookup::begin(self.directory, query, joined).found(LOOKUP_MAX).await;
        holders.retain(|peer| found.iter().any(|entry| entry.node == peer.node));
        holders
    }
}
