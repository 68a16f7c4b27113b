//! Fetches missing objects from several peers in parallel.
//!
//! Versions are fetched level by level from their roots, all together: objects that the store lacks
//! are asked for, and what arrives tells the next level. Within a level ([`super::queue`]):
//!
//! - Every neighbour takes batches from one shared queue, each as fast as it can; what one lacks,
//!   fails to deliver in time or delivers wrongly goes back and is asked elsewhere.
//! - The source is asked for what every neighbour that still answers failed to supply,
//!   and helps where the neighbours are slower than it is. Content that no node is the source of
//!   comes from neighbours alone.
//!
//! So a byte comes from the source only if no neighbour has it or brings it as fast, a dead
//! neighbour costs one grace, and a lying one nothing but its own bytes: each object is checked
//! against its digest before it is kept. What was learnt of a peer ([`PeerHealth`]) holds for the
//! whole migration; a peer that failed once is not asked again.
//!
//! On failure everything that arrived stays in the store, durable up to the last [`SYNC_INTERVAL`];
//! fetching again goes on from there.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_protos::Digest;
use godwit_protos::peer::{FetchObjectsRequest, ObjectBatch};
use tokio::sync::Notify;

use super::Connection;
use super::link::LinkStats;
use super::queue::{Batch, Ending, Queue};
use super::rate::RateEstimate;
use crate::content::encoding::Codec;
use crate::content::object::{self, Kind};
use crate::content::{ContentError, Source as _};
use crate::store::{Lease, Store};
use crate::supervise::{Interrupted, blocking};

/// Requests on their way to one peer at once: the next is asked for while one arrives.
const REQUESTS_PER_PEER: usize = 2;

/// Below this a neighbour is too slow to be of use: bytes per second of one request, uncompressed,
/// looked at once the request has lasted as long as the longest wait for a message.
const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;

/// How often workers that have nothing to do look whether a neighbour is late.
const TICK: Duration = Duration::from_millis(10);

/// What arrived longer ago than this is durable: a daemon that dies does not ask for it again.
const SYNC_INTERVAL: Duration = Duration::from_secs(2);

/// Longest waits for the next message.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long every neighbour is waited for before the source helps.
    pub grace: Duration,
    /// After this a neighbour is not asked again.
    pub neighbour: Duration,
    /// Longer, as no other node can replace it.
    pub source: Duration,
}

impl Patience {
    /// Where only the source has what neighbours do not bring.
    pub const USUAL: Self = Self {
        grace: Duration::from_millis(50),
        neighbour: Duration::from_secs(2),
        source: Duration::from_secs(20),
    };
}

/// Why a version could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Everybody was asked.
    #[error("object {0} was not found on the source or any neighbour")]
    Nowhere(Digest),
    /// The source failed, so that what only it has cannot come.
    #[error("the source failed while {missing} objects were still missing: {reason}")]
    SourceFailed {
        /// How many are missing.
        missing: usize,
        /// Its last error.
        reason: String,
    },
    /// What arrived could not be kept.
    #[error("cannot keep what arrived")]
    Content(#[from] ContentError),
    /// The task that keeps objects ended early.
    #[error("interrupted")]
    Interrupted,
}

impl From<Interrupted> for FetchError {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

impl From<crate::store::StoreError> for FetchError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Content(error.into())
    }
}

/// What fetching brought, per node: objects and their sizes in bytes, uncompressed.
pub type Brought = BTreeMap<String, (u64, u64)>;

/// What a migration has learnt of the peers that it asks, by name.
#[derive(Debug, Default)]
pub struct PeerHealth(Mutex<HashMap<String, Standing>>);

#[derive(Clone, Debug, Default)]
struct Standing {
    pace: RateEstimate,
    is_dead: bool,
}

impl PeerHealth {
    /// Begins with the rates, in bytes per second, that earlier migrations measured.
    pub fn known(rates: impl IntoIterator<Item = (String, f64)>) -> Self {
        let standing = |rate| Standing { pace: RateEstimate::known(Some(rate)), is_dead: false };
        Self(Mutex::new(rates.into_iter().map(|(node, rate)| (node, standing(rate))).collect()))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Who still answers, as a bit set, and the paces of all, the source's last.
    fn of(&self, neighbours: &[Arc<Connection>], source: Option<&str>) -> (u64, Vec<RateEstimate>) {
        let health = self.lock();
        let of = |node: &str| health.get(node).cloned().unwrap_or_default();
        let (mut alive, mut paces) = (0, Vec::new());
        for (index, neighbour) in neighbours.iter().enumerate() {
            let Standing { pace, is_dead } = of(&neighbour.node);
            alive |= u64::from(!is_dead) << index;
            paces.push(pace);
        }
        paces.push(source.map(|source| of(source).pace).unwrap_or_default());
        (alive, paces)
    }

    fn keep(
        &self,
        asked: &[Arc<Connection>],
        source: Option<&str>,
        alive: u64,
        paces: &[RateEstimate],
    ) {
        let mut health = self.lock();
        let nodes = asked.iter().map(|peer| peer.node.as_str()).chain(source);
        for (index, (node, pace)) in nodes.zip(paces).enumerate() {
            let is_dead = index < asked.len() && alive & 1 << index == 0;
            health.insert(node.to_owned(), Standing { pace: pace.clone(), is_dead });
        }
    }

    /// Rates in bytes per second of the peers that sent at least `bytes_min`.
    pub fn measured(&self, bytes_min: u64) -> Vec<(String, f64)> {
        let (health, now) = (self.lock(), Instant::now());
        let rate = |standing: &Standing| standing.pace.measured(now, bytes_min);
        health.iter().filter_map(|(node, one)| Some((node.clone(), rate(one)?))).collect()
    }
}

/// The peers to ask: neighbours in any order, and the one that has everything, if there is one.
#[derive(Clone, Debug)]
pub struct Peers {
    /// Nodes that may have some of it.
    pub neighbours: Vec<Arc<Connection>>,
    /// The node that has all of it.
    pub source: Option<Arc<Connection>>,
    /// What is known of them; shared by all fetches of a migration.
    pub health: Arc<PeerHealth>,
}

/// What a fetch goes down to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Everything.
    Content,
    /// Everything but leaves: what a version consists of, a hundredth of its size.
    Lists,
}

/// Fetches everything that `roots` refer to and the store lacks. Returns what it brought, root by
/// root; what several roots refer to counts for the first.
///
/// - The objects are visible in the store afterwards, protected by `lease` until something refers
///   to them.
/// - Errors: [`FetchError`]; calling again goes on where it stopped.
/// - Cancel: dropping the future leaves what arrived in the store.
pub async fn fetch(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    roots: &[(Kind, Digest)],
    depth: Depth,
) -> Result<Vec<Brought>, FetchError> {
    fetch_within(store, lease, peers, roots, depth, Patience::USUAL).await
}

/// [`fetch`] with a given patience.
pub async fn fetch_within(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    roots: &[(Kind, Digest)],
    depth: Depth,
    patience: Patience,
) -> Result<Vec<Brought>, FetchError> {
    let mut brought = vec![Brought::new(); roots.len()];
    let numbered = roots.iter().enumerate();
    let mut level: Vec<_> = numbered.map(|(root, (kind, digest))| (*kind, *digest, root)).collect();
    // By kind too: a file may hold the bytes of a directory, and only the directory has children.
    let mut seen = HashSet::new();
    while !level.is_empty() {
        level.retain(|(kind, digest, _)| {
            seen.insert((*kind, *digest)) && !(depth == Depth::Lists && kind.is_leaf())
        });
        let here = store.clone();
        let (asked, missing) = blocking(move || -> Result<_, FetchError> {
            let missing = missing(&here, &level)?;
            Ok((level, missing))
        })
        .await?;
        if !missing.is_empty() {
            fetch_level(store, lease, peers, &missing, patience, &mut brought).await?;
        }
        let here = store.clone();
        level = blocking(move || children(&here, asked)).await?;
    }
    Ok(brought)
}

type Items = Vec<(Kind, Digest, usize)>;

/// What the store lacks of a level, in the level's order, which is about the one in which a peer
/// has it on its disk.
fn missing(store: &Store, level: &Items) -> Result<Vec<(Digest, usize)>, FetchError> {
    let mut roots = HashMap::new();
    let digests = level.iter().filter_map(|(_, digest, root)| match roots.entry(*digest) {
        Entry::Occupied(_) => None,
        Entry::Vacant(entry) => {
            entry.insert(*root);
            Some(*digest)
        }
    });
    let digests: Vec<Digest> = digests.collect();
    let missing = store.missing(&digests)?;
    Ok(missing.into_iter().filter_map(|digest| Some((digest, *roots.get(&digest)?))).collect())
}

fn children(store: &Store, level: Items) -> Result<Items, FetchError> {
    let mut next = Vec::new();
    for (kind, digest, root) in level.into_iter().filter(|(kind, ..)| !kind.is_leaf()) {
        let children = object::children(kind, &store.object(&digest)?)
            .map_err(|source| ContentError::Object { digest, source })?;
        next.extend(children.into_iter().map(|(kind, digest)| (kind, digest, root)));
    }
    Ok(next)
}

/// The neighbours that are asked at all: a bit set of them fits in a word.
fn asked_neighbours(peers: &Peers) -> &[Arc<Connection>] {
    &peers.neighbours[..peers.neighbours.len().min(63)]
}

/// Fetches `root`, and all that it refers to, from `holders` at once. Returns who brought what.
///
/// `patience` is the longest wait for one of them. Errors: [`FetchError::Nowhere`] when they do not
/// bring all of it.
pub async fn fetch_from(
    store: &Store,
    links: &LinkStats,
    holders: Vec<Arc<Connection>>,
    root: (Kind, Digest),
    lease: &Arc<Lease>,
    patience: Duration,
) -> Result<Brought, FetchError> {
    let health = Arc::new(PeerHealth::known(links.rates()));
    let peers = Peers { neighbours: holders, source: None, health };
    let patience = Patience { neighbour: patience, ..Patience::USUAL };
    let (roots, depth) = ([root], Depth::Content);
    let brought = fetch_within(store, lease, &peers, &roots, depth, patience).await?;
    Ok(brought.into_iter().next().unwrap_or_default())
}

/// The queue of one level, shared by all workers.
struct Level {
    queue: Mutex<Queue>,
    changed: Notify,
}

impl Level {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch for a worker and its flight; `None` when nothing is left for it, ever.
    async fn take(&self, neighbour: Option<usize>) -> Option<(u64, Batch)> {
        loop {
            // Registered before looking, so that no change between the look and the wait is missed.
            let changed = self.changed.notified();
            {
                let mut queue = self.lock();
                if let Some(flight) = queue.take(neighbour, Instant::now()) {
                    return Some(flight);
                }
                if queue.is_over(neighbour) {
                    return None;
                }
            }
            // That a neighbour is late is no event.
            let _ = tokio::time::timeout(TICK, changed).await;
        }
    }

    /// Waits until this peer is not to be asked any more, because of what another worker met.
    async fn gives_up(&self, neighbour: Option<usize>) {
        loop {
            let changed = self.changed.notified();
            if self.lock().has_given_up(neighbour) {
                return;
            }
            changed.await;
        }
    }

    /// Tells everyone about a change of the queue.
    fn change<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let changed = change(&mut self.lock());
        self.changed.notify_waiters();
        changed
    }
}

async fn fetch_level(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    missing: &[(Digest, usize)],
    patience: Patience,
    brought: &mut Vec<Brought>,
) -> Result<(), FetchError> {
    let asked = asked_neighbours(peers);
    let source = peers.source.as_ref().map(|source| source.node.as_str());
    let (alive, paces) = peers.health.of(asked, source);
    let queue = Queue::new(missing, alive, paces, patience, std::mem::take(brought));
    let level = Arc::new(Level { queue: Mutex::new(queue), changed: Notify::new() });
    let mut workers = tokio::task::JoinSet::new();
    let neighbours = asked.iter().enumerate();
    let neighbours = neighbours.map(|(index, one)| (Some(index), one, patience.neighbour));
    let source_too = peers.source.iter().map(|source| (None, source, patience.source));
    for (neighbour, peer, patience) in neighbours.chain(source_too) {
        for _ in 0..REQUESTS_PER_PEER {
            let worker = Worker {
                level: level.clone(),
                peer: peer.clone(),
                neighbour,
                patience,
                store: store.clone(),
                lease: lease.clone(),
            };
            workers.spawn(worker.run());
        }
    }
    let mut sync = tokio::time::interval_at((Instant::now() + SYNC_INTERVAL).into(), SYNC_INTERVAL);
    sync.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            done = workers.join_next() => match done {
                None => break,
                // A worker that panicked has taken its batch along; leaving stops the others, who
                // may wait for it.
                Some(Err(_)) => return Err(FetchError::Interrupted),
                Some(Ok(())) => {}
            },
            _ = sync.tick() => {
                let store = store.clone();
                let synced = blocking(move || store.sync().map_err(FetchError::from));
                synced.await?;
            }
        }
    }
    let mut queue = level.lock();
    peers.health.keep(asked, source, queue.alive, &queue.paces);
    *brought = std::mem::take(&mut queue.brought);
    queue.outcome(source.is_some())
}

struct Worker {
    level: Arc<Level>,
    peer: Arc<Connection>,
    neighbour: Option<usize>,
    patience: Duration,
    store: Store,
    lease: Arc<Lease>,
}

impl Worker {
    async fn run(self) {
        while let Some((flight, batch)) = self.level.take(self.neighbour).await {
            let ending = self.request(flight, &batch).await.err().unwrap_or(Ending::Answered);
            if let Ending::Failed(reason) = &ending {
                tracing::warn!(node = %self.peer.node, %reason, "peer failed; asking elsewhere");
            }
            self.level.change(|queue| queue.finish(flight, ending, Instant::now()));
        }
    }

    /// Asks for a batch. Errors: why this peer is not to be asked again.
    async fn request(&self, flight: u64, batch: &[(Digest, u64)]) -> Result<(), Ending> {
        let begun = Instant::now();
        let mut unanswered: HashSet<Digest> = batch.iter().map(|(digest, _)| *digest).collect();
        let digests = batch.iter().map(|(digest, _)| digest.as_bytes().to_vec().into()).collect();
        let mut client = self.peer.client();
        let call = client.fetch_objects(FetchObjectsRequest { digests });
        let mut stream = self.patiently(call).await?.into_inner();
        let (mut bytes, mut asked) = (0, begun);
        while let Some(message) = self.patiently(stream.message()).await? {
            let (before, wait) = (unanswered.len(), asked.elapsed());
            let missing = message.missing.clone();
            bytes += self.keep(flight, message, &mut unanswered, wait).await?;
            asked = Instant::now();
            for digest in missing.iter().filter_map(|digest| Digest::try_from(&digest[..]).ok()) {
                if unanswered.remove(&digest) && self.neighbour.is_none() {
                    self.level.change(|queue| queue.nowhere = Some(digest));
                }
            }
            if unanswered.len() == before {
                // An honest answer may end with an empty message; one that goes on with them never
                // ends.
                let done = unanswered.is_empty();
                return if done { Ok(()) } else { Err(failed("it sent a message of nothing")) };
            }
            if self.neighbour.is_some() && !unanswered.is_empty() && self.is_too_slow(bytes, begun)
            {
                return Err(failed(format!(
                    "only {bytes} bytes in {} ms",
                    begun.elapsed().as_millis()
                )));
            }
        }
        match unanswered.len() {
            0 => Ok(()),
            count => Err(failed(format!("its answer ended without a word on {count} objects"))),
        }
    }

    fn is_too_slow(&self, bytes: u64, begun: Instant) -> bool {
        let elapsed = begun.elapsed();
        elapsed > self.patience
            && u128::from(bytes) * 1000 < u128::from(SLOWEST_BYTES_PER_SECOND) * elapsed.as_millis()
    }

    /// Waits for a peer's answer, but not too long, and not when another worker has given the peer
    /// up.
    async fn patiently<T>(
        &self,
        answer: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Result<T, Ending> {
        tokio::select! {
            answer = tokio::time::timeout(self.patience, answer) => match answer {
                Ok(answer) => answer.map_err(|status| Ending::Failed(status.message().to_owned())),
                Err(_) => Err(failed(format!("no answer within {} ms", self.patience.as_millis()))),
            },
            () = self.level.gives_up(self.neighbour) => Err(Ending::GivenUp),
        }
    }

    /// Keeps the objects of a message that came after `wait`, and takes them out of `unanswered`.
    /// Returns their bytes.
    async fn keep(
        &self,
        flight: u64,
        message: ObjectBatch,
        unanswered: &mut HashSet<Digest>,
        wait: Duration,
    ) -> Result<u64, Ending> {
        let (store, lease, wanted) = (self.store.clone(), self.lease.clone(), unanswered.clone());
        let kept =
            tokio::task::spawn_blocking(move || keep(&store, &lease, &message, wanted)).await;
        let (kept, wrong) = match kept {
            Ok(Ok(kept)) => kept,
            Ok(Err(error)) => {
                self.level.change(|queue| queue.failed = Some(error.into()));
                return Err(Ending::GivenUp);
            }
            Err(_) => return Err(Ending::GivenUp),
        };
        for (digest, _) in &kept {
            unanswered.remove(digest);
        }
        let node = &self.peer.node;
        self.level.change(|queue| queue.arrived(flight, node, &kept, wait, Instant::now()));
        let bytes = kept.iter().map(|(_, bytes)| bytes).sum();
        wrong.map_or(Ok(bytes), |wrong| Err(failed(wrong)))
    }
}

fn failed(reason: impl Into<String>) -> Ending {
    Ending::Failed(reason.into())
}

/// Objects that were kept, with their bytes, and what was wrong with others.
type Kept = (Vec<(Digest, u64)>, Option<String>);

/// Checks and stores the objects of a message.
fn keep(
    store: &Store,
    lease: &Lease,
    message: &ObjectBatch,
    mut wanted: HashSet<Digest>,
) -> Result<Kept, ContentError> {
    let mut writer = store.writer(lease);
    let (mut codec, mut kept, mut wrong) = (Codec::default(), Vec::new(), None);
    for object in &message.objects {
        let Some(digest) =
            Digest::try_from(&object.digest[..]).ok().filter(|digest| wanted.contains(digest))
        else {
            wrong = Some("it sent an object that was not requested".to_owned());
            continue;
        };
        let size = u64::from(object.size_bytes);
        match codec.decode(&digest, object.encoding, size, &object.data, &[]) {
            Ok(data) => {
                writer.put_hashed(digest, &data)?;
                wanted.remove(&digest);
                kept.push((digest, size));
            }
            Err(error) => wrong = Some(error.to_string()),
        }
    }
    writer.flush()?;
    Ok((kept, wrong))
}
