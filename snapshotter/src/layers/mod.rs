//! Layers of images from neighbours.
//!
//! While containerd pulls an image, it asks the snapshotter to prepare each layer under the chain
//! ID that the layer leads to. A snapshotter that can supply the layer itself commits it and
//! answers "already exists"; containerd then does not download the layer. So:
//!
//! 1. find out which layer is meant: the image's configuration is here by now, and commits to its
//!    diff ID. If no neighbour has anything, containerd goes on as with any snapshotter;
//! 2. look up in the directory who keeps the layer as an object ([`crate::content::layer`]); if
//!    no neighbour does, or those fail to deliver, have other neighbours make one of the blob that
//!    their containerd unpacked ([`make`]);
//! 3. fetch it from all of them at once, as long as that goes on fast enough ([`guard`]), and at
//!    the same time give the uncompressed bytes, in their order, to containerd under the diff ID
//!    ([`arriving`]), which it checks;
//! 4. have it unpack them into a snapshot, hashing them again, as it does with layers of its own;
//! 5. commit the snapshot, and record the object, so that this node can give on the same bytes.
//!
//! Once containerd was told that a layer is not there, it begins to download all those above at
//! once, whatever it hears of them later. So a layer whose blob is here is supplied too if one
//! above is missing.
//!
//! Promise: a snapshot is committed only with the bytes that its chain ID stands for, whichever
//! node sent them. Whatever else happens ends in "not supplied" within [`SUPPLY_MAX`], nothing is
//! left but objects that the sweep takes, and containerd asks the registry. A neighbour that let us
//! wait, or lied, is not asked for a while; one whose bytes this node failed to keep is.

mod arriving;
mod guard;
pub mod make;
mod offers;

use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Duration;

use futures::future::{Either, select};
use godwit_protos::{Digest, Subject};
use tokio::sync::{Mutex, Semaphore};

use crate::containerd::{Client, ClientError, Descriptor, FoundLayer, LABEL_REF};
use crate::content::object::{Kind, Layer};
use crate::content::{ContentError, Source};
use crate::host::unix_ms;
use crate::node::Node;
use crate::peer::backoff::{BACKOFF_LIAR, BACKOFF_SILENT};
use crate::peer::fetch::{FetchError, fetch_from};
use crate::retention::{free_bytes, has_room, record};
use crate::snapshots::{self, SnapshotError, Snapshotter};
use crate::store::{Lease, Snapshot, Store, StoreError};
use crate::supervise::{Interrupted, blocking};
use arriving::{Arriving, Coming, bytes_of};
use guard::guard;
use offers::{Neighbours, Offer, Way};

/// Layers that are supplied at once; of further ones containerd asks the registry.
const SUPPLIES_MAX: usize = 8;

/// How long a layer may take in all. containerd waits for it, and its other snapshots wait for
/// containerd's garbage collection if that wants to begin meanwhile.
const SUPPLY_MAX: Duration = Duration::from_secs(540);

/// How long what arrives is protected.
const LEASE: Duration = Duration::from_secs(600);

/// Longest wait for objects of one neighbour: the registry replaces everyone.
const PATIENCE: Duration = Duration::from_secs(2);

/// Largest layer, uncompressed.
pub const LAYER_BYTES_MAX: u64 = 64 << 30;

/// Different objects that are tried for one layer of those that are kept, and as many of those that
/// are made: all honest nodes have the same.
const OFFERS_MAX: usize = 2;

/// Pieces of a layer that wait for their reader.
const QUEUE: usize = 4;

/// What containerd calls the uncompressed bytes of a layer.
const MEDIA_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Why a layer was not supplied although a neighbour seems to have it.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// containerd failed, or found that the bytes are not the layer's.
    #[error(transparent)]
    Containerd(#[from] ClientError),
    /// The object is not in the store, or is not what it should be.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The snapshotter failed.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It could not be fetched.
    #[error("cannot fetch it")]
    Fetch(#[from] FetchError),
    /// It arrived too slowly, or is more than it should be.
    #[error("{0}")]
    Guard(&'static str),
    /// Offered as larger than any layer, or than the disk has room.
    #[error("{0} bytes are too many")]
    TooLarge(u64),
    /// It has another length than its giver said.
    #[error("{found} bytes, and {offered} were offered")]
    Length {
        /// What the object says.
        found: u64,
        /// What was said of it.
        offered: u64,
    },
    /// It took longer than it may.
    #[error("it took longer than {} s", SUPPLY_MAX.as_secs())]
    Late,
    /// The daemon is stopping.
    #[error("interrupted")]
    Interrupted,
}

impl From<Interrupted> for LayerError {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

impl LayerError {
    /// Whether the object is to blame, so that neither it nor who gave it is to be trusted.
    fn is_lie(&self) -> bool {
        let is_bad = matches!(self, Self::Containerd(ClientError::WrongContent(_)));
        let is_other = matches!(self, Self::Length { .. });
        is_bad || is_other || matches!(self.content(), Some(ContentError::Object { .. }))
    }

    /// Whether what this node keeps of the layer is of no use: it is a lie, or the disk lost
    /// something of it.
    fn is_damage(&self) -> bool {
        use ContentError::{Missing, Store};
        let is_lost = |error| matches!(error, &Missing(_) | &Store(StoreError::Corrupt { .. }));
        self.is_lie() || self.content().is_some_and(is_lost)
    }

    /// How long those who gave the object are skipped; `None` if it is this node that failed.
    fn shuns(&self) -> Option<Duration> {
        match self {
            _ if self.is_lie() => Some(BACKOFF_LIAR),
            Self::Fetch(FetchError::Content(_) | FetchError::Interrupted) => None,
            Self::Fetch(_) | Self::Guard(_) => Some(BACKOFF_SILENT),
            Self::TooLarge(_)
            | Self::Length { .. }
            | Self::Containerd(_)
            | Self::Content(_)
            | Self::Store(_)
            | Self::Snapshot(_)
            | Self::Late
            | Self::Interrupted => None,
        }
    }

    /// Why the object could not be read, also where containerd was to be given what it holds.
    fn content(&self) -> Option<&ContentError> {
        match self {
            Self::Content(error) => Some(error),
            Self::Containerd(ClientError::Source { source, .. }) => {
                source.get_ref()?.downcast_ref()
            }
            _ => None,
        }
    }
}

/// A layer that containerd wants to be prepared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// containerd's namespace.
    namespace: String,
    /// Key of the snapshot that is to be prepared.
    key: String,
    /// Name of the committed one below.
    parent: Option<String>,
    /// What the layer leads to.
    chain_id: Digest,
    /// Name that it is committed under: as unique as the key.
    name: String,
    /// Labels that it gets.
    labels: BTreeMap<String, String>,
    /// It is committed, and has lost its directory.
    is_lost: bool,
}

impl Wanted {
    /// The layer, if it is one that may be supplied: containerd's keys are `NAMESPACE/NUMBER/KEY`.
    pub fn of(key: &str, parent: Option<&str>, labels: &HashMap<String, String>) -> Option<Self> {
        let chain_id: Digest = labels.get(LABEL_REF)?.parse().ok()?;
        let (namespace, rest) = key.split_once('/')?;
        let (number, _) = rest.split_once('/')?;
        Some(Self {
            namespace: namespace.to_owned(),
            key: key.to_owned(),
            parent: parent.map(str::to_owned),
            chain_id,
            name: format!("{namespace}/{number}/{chain_id}"),
            labels: labels.clone().into_iter().collect(),
            is_lost: false,
        })
    }

    /// A committed layer that has lost its directory: containerd's names are those of its keys,
    /// with the chain ID for a key. The key it is unpacked under is another each time, and
    /// containerd removes one that an attempt cut short has left.
    fn again(lost: snapshots::Info) -> Option<Self> {
        let snapshots::Info { name, parent, labels, .. } = lost;
        let (namespace, number_and_key) = name.split_once('/')?;
        let chain_id: Digest = number_and_key.split_once('/')?.1.parse().ok()?;
        let key = format!("{namespace}/0/again-{} {chain_id}", unix_ms());
        let namespace = namespace.to_owned();
        Some(Self { namespace, key, parent, chain_id, name, labels, is_lost: true })
    }

    /// What the layer leads to.
    pub fn chain_id(&self) -> Digest {
        self.chain_id
    }
}

/// Supplies layers to the snapshotter's service. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Layers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    node: Arc<Node>,
    snapshots: Arc<Snapshotter>,
    runtime: tokio::runtime::Handle,
    turns: Semaphore,
    /// Who supplies which layer: a second who wants it finds it kept.
    busy: std::sync::Mutex<HashMap<Digest, Weak<Mutex<()>>>>,
}

impl Layers {
    /// For this node and its snapshots. Caller: is on the runtime that is to do the work, whichever
    /// thread asks for it.
    pub fn new(node: Arc<Node>, snapshots: Arc<Snapshotter>) -> Self {
        let runtime = tokio::runtime::Handle::current();
        let (turns, busy) = (Semaphore::new(SUPPLIES_MAX), std::sync::Mutex::default());
        Self(Arc::new(Inner { node, snapshots, runtime, turns, busy }))
    }

    /// Commits the layer if it can be had without the registry, and says whether it is there now.
    ///
    /// Cancel: it goes on; what no caller asks for again, containerd has removed.
    pub async fn supply(&self, wanted: Wanted) -> bool {
        let here = self.0.clone();
        let supplied = self.0.runtime.spawn(async move {
            let Ok(_turn) = here.turns.try_acquire() else { return false };
            let supplied = match tokio::time::timeout(SUPPLY_MAX, here.supply(&wanted)).await {
                Ok(supplied) => supplied,
                Err(_) => {
                    here.clear(wanted.key).await;
                    Err(LayerError::Late)
                }
            };
            match supplied {
                Ok(supplied) => supplied,
                Err(error) => {
                    let (layer, error) = (wanted.chain_id, crate::error::chain(&error));
                    tracing::warn!(%layer, error, "no layer from the neighbours; asking the registry");
                    false
                }
            }
        });
        supplied.await.unwrap_or(false)
    }

    /// Has the layers that lost their directories unpacked again, as far as they can be had without
    /// their registry.
    pub async fn put_back(&self) -> Result<(), SnapshotError> {
        let snapshots = self.0.snapshots.clone();
        let lost = tokio::task::spawn_blocking(move || snapshots.lost()).await;
        for wanted in lost.unwrap_or(Ok(Vec::new()))?.into_iter().filter_map(Wanted::again) {
            let (layer, is_back) = (wanted.chain_id, self.supply(wanted).await);
            tracing::info!(%layer, is_back, "a layer had lost its directory");
        }
        Ok(())
    }
}

impl Inner {
    async fn supply(&self, wanted: &Wanted) -> Result<bool, LayerError> {
        if !wanted.is_lost && self.is_committed(wanted).await? {
            return Ok(true);
        }
        let containerd = &self.node.containerd;
        let found = containerd.find_layer(&wanted.namespace, wanted.chain_id).await?;
        let Some(layer) = found else { return Ok(false) };
        let turn = self.turn(layer.diff_id);
        let _turn = turn.lock().await;
        if let Some(found) = containerd.find_blob(layer.blob.digest).await? {
            let supplied = self.supply_blob(wanted, &layer, &found.namespace).await;
            match &supplied {
                Err(error) if wanted.is_lost => {
                    tracing::warn!(layer = %layer.diff_id, %error, "cannot use a layer's blob");
                }
                _ => return supplied,
            }
        }
        let lease = Arc::new(self.node.store.lease("layer", LEASE));
        if self.supply_kept(wanted, &layer).await? {
            return Ok(true);
        }
        if !has_room(&self.node) || !self.node.config.layers.fetch {
            return Ok(false);
        }
        let mut outcome = Ok(false);
        let mut neighbours = Neighbours::connect(&self.node).await;
        for way in [Way::Kept, Way::Made] {
            let offers = neighbours.offers(way, &layer).await;
            let free = free_bytes(&self.node).unwrap_or(u64::MAX);
            let (small, large): (Vec<_>, Vec<_>) =
                offers.into_iter().partition(|one| one.size_bytes <= LAYER_BYTES_MAX.min(free));
            if let Some(offer) = large.first() {
                outcome = Err(LayerError::TooLarge(offer.size_bytes));
            }
            for offer in small.into_iter().take(OFFERS_MAX) {
                match self.take(wanted, &layer, &offer, &lease).await {
                    Ok(()) => return Ok(true),
                    Err(error) => {
                        // What is wrong with this node would be so with the next offer.
                        let Some(time) = error.shuns() else { return Err(error) };
                        let names = offer.peers.iter().map(|peer| &peer.node);
                        self.node.backoff.add(names, time);
                        outcome = Err(error);
                    }
                }
            }
        }
        outcome
    }

    /// What is locked while a layer of that diff ID is supplied.
    fn turn(&self, diff_id: Digest) -> Arc<Mutex<()>> {
        let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        busy.retain(|_, turn| turn.strong_count() > 0);
        busy.get(&diff_id).and_then(Weak::upgrade).unwrap_or_else(|| {
            let turn = Arc::default();
            busy.insert(diff_id, Arc::downgrade(&turn));
            turn
        })
    }

    /// Whether the layer is committed already, for another namespace: containerd takes it by its
    /// label and parent.
    async fn is_committed(&self, wanted: &Wanted) -> Result<bool, LayerError> {
        let (chain_id, parent) = (wanted.chain_id, wanted.parent.clone());
        self.blocking(move |all| {
            let filter = format!("labels.{LABEL_REF:?}=={chain_id}");
            let infos = all.list(&[filter])?;
            let is_it = |info: &snapshots::Info| {
                info.kind == snapshots::Kind::Committed && info.parent == parent
            };
            Ok(infos.iter().any(is_it))
        })
        .await
    }

    /// Supplies a layer whose blob is in `namespace`, unless containerd has nothing to download for
    /// this image.
    async fn supply_blob(
        &self,
        wanted: &Wanted,
        layer: &FoundLayer,
        namespace: &str,
    ) -> Result<bool, LayerError> {
        let containerd = &self.node.containerd;
        let mut is_needed = wanted.is_lost;
        for above in &layer.above {
            is_needed =
                is_needed || containerd.has_blob(&wanted.namespace, *above).await?.is_none();
        }
        if !is_needed {
            return Ok(false);
        }
        self.unpack(containerd, wanted, (namespace, &layer.blob), layer.diff_id).await?;
        // Neighbours can ask for it then; the layer is there whether they can or not.
        let (blob, diff_id) = (layer.blob.digest, layer.diff_id);
        if let Err(error) = containerd.label_unpacked(namespace, blob, diff_id).await {
            tracing::warn!(%blob, %error, "cannot note what a layer's blob holds");
        }
        Ok(true)
    }

    /// Supplies a layer that this node keeps as an object. One that proves wrong is forgotten.
    async fn supply_kept(&self, wanted: &Wanted, layer: &FoundLayer) -> Result<bool, LayerError> {
        let subject = Subject::ImageLayer(layer.diff_id);
        for (id, kept) in self.blocking_store(move |store| store.snapshots(&subject)).await? {
            match self.put_kept(wanted, layer, (kept.root, kept.size_bytes)).await {
                Ok(()) => return Ok(true),
                Err(error) if error.is_damage() => {
                    tracing::warn!(layer = %layer.diff_id, "what was kept of a layer is damaged");
                    self.blocking_store(move |store| store.remove_snapshot(id)).await?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Fetches what is offered and commits it. Errors: nothing is committed.
    async fn take(
        &self,
        wanted: &Wanted,
        layer: &FoundLayer,
        offer: &Offer,
        lease: &Arc<Lease>,
    ) -> Result<(), LayerError> {
        let Offer { root, size_bytes, peers } = offer;
        let held = self.node.containerd.lease(&wanted.namespace).await?;
        let coming = Coming::default();
        let arriving = Arriving::new(self.node.store.clone(), &coming);
        let write = pin!(self.write(held.client(), wanted, layer, arriving, (*root, *size_bytes)));
        let fetch = pin!(async {
            let root = (Kind::Layer, *root);
            tokio::select! {
                brought = fetch_from(&self.node.store, &self.node.links, peers.clone(), root, lease, PATIENCE) => Ok(brought?),
                why = guard(peers, *size_bytes) => Err(LayerError::Guard(why)),
            }
        });
        let (brought, blob) = match select(fetch, write).await {
            Either::Left((brought, write)) => {
                drop(coming);
                // Ends soon, and leaves nothing half written. That something is missing is then no
                // lie.
                let written = write.await;
                (brought?, written?)
            }
            Either::Right((written, fetch)) => {
                let blob = written?;
                (fetch.await?, blob)
            }
        };
        let here = (wanted.namespace.as_str(), &blob);
        self.unpack(held.client(), wanted, here, layer.diff_id).await?;
        let layer = layer.diff_id;
        tracing::info!(%layer, bytes = size_bytes, ?brought, "layer from the neighbours");
        // The layer is there whether it can be given on or not.
        if let Err(error) = keep(&self.node, layer, *root, *size_bytes).await {
            tracing::warn!(%layer, error = crate::error::chain(&error), "cannot keep a layer");
        }
        Ok(())
    }

    /// Commits the snapshot that the object `root` makes, which is in the store.
    async fn put_kept(
        &self,
        wanted: &Wanted,
        layer: &FoundLayer,
        root: (Digest, u64),
    ) -> Result<(), LayerError> {
        let held = self.node.containerd.lease(&wanted.namespace).await?;
        let store = self.node.store.clone();
        let blob = self.write(held.client(), wanted, layer, store, root).await?;
        let here = (wanted.namespace.as_str(), &blob);
        self.unpack(held.client(), wanted, here, layer.diff_id).await
    }

    /// Gives containerd the bytes of the object `root`, of which there are `offered`, under their
    /// diff ID.
    ///
    /// It drops its copy once the lease of `containerd` is gone. Letting go of that is not waited
    /// for: its garbage collection waits for the call that this answers.
    async fn write(
        &self,
        containerd: &Client,
        wanted: &Wanted,
        layer: &FoundLayer,
        objects: impl Source + Clone + Send + 'static,
        (root, offered): (Digest, u64),
    ) -> Result<Descriptor, LayerError> {
        let of = objects.clone();
        let found =
            blocking(move || of.decode::<Layer>(&root).map_err(LayerError::from)).await?.bytes;
        // One chunk, named again and again, would fill the disk and cost the sender nothing.
        if found != offered {
            return Err(LayerError::Length { found, offered });
        }
        let (namespace, digest) = (wanted.namespace.as_str(), layer.diff_id);
        let bytes = |offset| bytes_of(objects, root, offset);
        let written = containerd.write_blob(namespace, digest, offered, bytes).await;
        if let Err(ClientError::Source { .. }) = &written {
            // Or the next attempt would go on behind what a broken object began with.
            containerd.abort_write(namespace, digest).await?;
        }
        written?;
        Ok(Descriptor { media_type: MEDIA_TYPE.to_owned(), digest, size_bytes: offered })
    }

    /// Has the layer `blob` of `namespace` unpacked into a snapshot, and commits that. Errors:
    /// nothing is left.
    async fn unpack(
        &self,
        containerd: &Client,
        wanted: &Wanted,
        blob: (&str, &Descriptor),
        diff_id: Digest,
    ) -> Result<(), LayerError> {
        let unpacked = self.try_unpack(containerd, wanted, blob, diff_id).await;
        if unpacked.is_err() {
            self.clear(wanted.key.clone()).await;
        }
        unpacked
    }

    async fn try_unpack(
        &self,
        containerd: &Client,
        wanted: &Wanted,
        (namespace, blob): (&str, &Descriptor),
        diff_id: Digest,
    ) -> Result<(), LayerError> {
        let Wanted { key, parent, .. } = wanted.clone();
        let prepare =
            move |all: &Snapshotter| all.prepare(&key, parent.as_deref(), BTreeMap::new());
        let mounts = self.blocking(prepare).await?;
        if containerd.apply(namespace, blob, mounts).await? != diff_id {
            return Err(ClientError::WrongContent(diff_id).into());
        }
        let Wanted { key, name, labels, is_lost, .. } = wanted.clone();
        self.blocking(move |all| match is_lost {
            true => all.put_back(&name, &key),
            false => all.commit(&name, &key, labels),
        })
        .await
    }

    /// Removes what an attempt has left under its key, so that containerd finds it free.
    async fn clear(&self, key: String) {
        let removed = self.blocking(move |all| match all.remove(&key) {
            Err(SnapshotError::NotFound(_)) => Ok(()),
            other => other.and_then(|()| all.cleanup()),
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "cannot remove a layer that was not unpacked");
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Snapshotter) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, LayerError> {
        let snapshots = self.snapshots.clone();
        blocking(move || Ok(work(&snapshots)?)).await
    }

    async fn blocking_store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, LayerError> {
        let store = self.node.store.clone();
        blocking(move || Ok(work(&store)?)).await
    }
}

/// Records that this node has the layer whole, as the object `root`.
async fn keep(
    node: &Arc<Node>,
    diff_id: Digest,
    root: Digest,
    size_bytes: u64,
) -> Result<(), LayerError> {
    let node = node.clone();
    blocking(move || {
        let subject = Subject::ImageLayer(diff_id);
        if node.store.snapshots(&subject)?.iter().any(|(_, kept)| kept.root == root) {
            return Ok(());
        }
        let snapshot = Snapshot {
            subject,
            sequence: 1,
            taken_at_unix_ms: unix_ms(),
            root,
            root_kind: Kind::Layer as u8,
            size_bytes,
            node: node.config.node.clone(),
            is_pinned: false,
        };
        record(&node, &[snapshot])?;
        Ok(())
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::object::ObjectError;

    fn labels(chain_id: &str) -> HashMap<String, String> {
        [(LABEL_REF.to_owned(), chain_id.to_owned())].into()
    }

    /// Method: what reading an object for containerd ends with.
    #[test]
    fn whoever_lied_is_passed_over_and_nobody_is_for_what_this_disk_did() {
        let digest = Digest::of(b"x");
        let reading = |error: ContentError| {
            let source = std::io::Error::other(error);
            LayerError::from(ClientError::Source { digest, source })
        };
        let rule = "pieces add up to the whole size";
        let broken = || ContentError::Object {
            digest,
            source: ObjectError::Rule { kind: Kind::Layer, rule },
        };
        let unreadable = || {
            let (doing, path, source) = ("read", "pack".into(), std::io::Error::other("EIO"));
            ContentError::Store(StoreError::Io { doing, path, source })
        };
        let damaged = || {
            let why = crate::store::Mismatch::Content;
            ContentError::Store(StoreError::Corrupt { digest, pack: 1, offset: 2, why })
        };
        let cut = std::io::ErrorKind::UnexpectedEof.into();
        let (lie, silent) = (Some(BACKOFF_LIAR), Some(BACKOFF_SILENT));
        for (error, is_damage, shuns) in [
            (reading(broken()), true, lie),
            (broken().into(), true, lie),
            (ClientError::WrongContent(digest).into(), true, lie),
            (reading(unreadable()), false, None),
            (unreadable().into(), false, None),
            (reading(damaged()), true, None),
            (reading(ContentError::Missing(digest)), true, None),
            (ClientError::Source { digest, source: cut }.into(), false, None),
            (FetchError::Content(unreadable()).into(), false, None),
            (FetchError::Nowhere(digest).into(), false, silent),
            (LayerError::Guard("it came too slowly"), false, silent),
            (LayerError::Late, false, None),
            (LayerError::TooLarge(1 << 40), false, None),
            (LayerError::Length { found: 1 << 36, offered: 1 }, true, lie),
        ] {
            assert_eq!((error.is_damage(), error.shuns()), (is_damage, shuns), "{error:?}");
        }
    }

    #[test]
    fn only_what_containerd_unpacks_by_chain_id_may_be_supplied() {
        let chain_id = Digest::of(b"x").to_string();
        let key = format!("k8s.io/12/extract-3-abc {chain_id}");
        let wanted = Wanted::of(&key, Some("k8s.io/1/sha256:ab"), &labels(&chain_id)).unwrap();
        assert_eq!((wanted.namespace.as_str(), &wanted.key), ("k8s.io", &key));
        assert_eq!(wanted.name, format!("k8s.io/12/{chain_id}"));
        assert_eq!(wanted.labels.len(), 1);
        assert_eq!(Wanted::of(&key, None, &HashMap::new()), None, "a container's own");
        assert_eq!(Wanted::of(&key, None, &labels("sha512:ab")), None);
        assert_eq!(Wanted::of("extract", None, &labels(&chain_id)), None, "not containerd's");
    }

    #[test]
    fn a_layer_that_was_lost_is_known_by_its_name() {
        let chain_id = Digest::of(b"x").to_string();
        let info = |name: &str| snapshots::Info {
            name: name.to_owned(),
            parent: Some("k8s.io/1/sha256:ab".to_owned()),
            kind: snapshots::Kind::Committed,
            labels: BTreeMap::new(),
            created: std::time::SystemTime::UNIX_EPOCH,
            updated: std::time::SystemTime::UNIX_EPOCH,
        };
        let wanted = Wanted::again(info(&format!("k8s.io/12/{chain_id}"))).unwrap();
        assert_eq!((wanted.namespace.as_str(), wanted.chain_id.to_string()), ("k8s.io", chain_id));
        assert_eq!(wanted.parent.as_deref(), Some("k8s.io/1/sha256:ab"));
        assert!(wanted.is_lost && wanted.key.starts_with("k8s.io/"));
        for name in ["k8s.io/12/layer", "layer", "k8s.io/sha256:ab"] {
            assert_eq!(Wanted::again(info(name)), None, "{name}");
        }
    }
}
