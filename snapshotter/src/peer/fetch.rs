//! Bringing what is missing from whoever has it.
//!
//! A version is fetched level by level from its root: objects that the store lacks are asked for, and what
//! arrives tells the next level. Within a level:
//!
//! - Every neighbour takes batches from one shared queue, each as fast as it can; what one lacks, fails to
//!   deliver in time or delivers wrongly goes back and is asked elsewhere.
//! - The source is asked only for what every neighbour that still answers has been asked for in vain.
//!
//! So a byte comes from the source only if nobody else has it, a dead neighbour costs one deadline, and a lying one
//! nothing but its own bytes: each object is checked against its digest before it is kept. Whoever failed once is
//! not asked again, neither in this level nor in the next ones.
//!
//! On failure everything that arrived stays in the store; fetching again goes on from there.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_protos::Digest;
use godwit_protos::peer::{FetchObjectsRequest, ObjectBatch};
use tokio::sync::Notify;

use super::Connection;
use crate::content::encoding::Codec;
use crate::content::object::{self, Kind};
use crate::content::{ContentError, Source as _};
use crate::store::{Lease, Store};

/// Objects per request; with pages of 4 KiB half a megabyte, with chunks of files 16 MiB.
const BATCH_OBJECTS: usize = 128;

/// Requests on their way to one peer at once: the next is asked for while one arrives.
const REQUESTS_PER_PEER: usize = 2;

/// Below this a neighbour is too slow to be of use: bytes per second of one request, uncompressed,
/// looked at once the request has lasted as long as the longest wait for a message.
const SLOWEST_BYTES_PER_SECOND: u64 = 64 << 10;

/// Longest wait for the next message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    pub(super) neighbour: Duration,
    /// Longer, as nobody can replace it.
    pub(super) source: Duration,
}

const PATIENCE: Patience =
    Patience { neighbour: Duration::from_secs(2), source: Duration::from_secs(20) };

/// Why a version could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Everybody was asked.
    #[error("object {0} is nowhere to be had: neither a neighbour nor the source has it")]
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

impl From<crate::store::StoreError> for FetchError {
    fn from(error: crate::store::StoreError) -> Self {
        Self::Content(error.into())
    }
}

/// What fetching brought, per node: objects and their sizes in bytes, uncompressed.
pub type Brought = BTreeMap<String, (u64, u64)>;

/// Whom to ask: neighbours in any order, and the one who has everything.
#[derive(Clone, Debug)]
pub struct Peers {
    /// Nodes that may have some of it.
    pub neighbours: Vec<Arc<Connection>>,
    /// The node that has all of it.
    pub source: Arc<Connection>,
}

/// Fetches everything that `roots` refer to and the store lacks.
///
/// - The objects are visible in the store afterwards, protected by `lease` until something refers to them.
/// - Errors: [`FetchError`]; calling again goes on where it stopped.
/// - Cancel: dropping the future leaves what arrived in the store.
pub async fn fetch(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    roots: &[(Kind, Digest)],
) -> Result<Brought, FetchError> {
    fetch_within(store, lease, peers, roots, PATIENCE).await
}

/// [`fetch`] with a given patience.
pub(super) async fn fetch_within(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    roots: &[(Kind, Digest)],
    patience: Patience,
) -> Result<Brought, FetchError> {
    let mut so_far = SoFar { alive: all_alive(peers), brought: Brought::new() };
    let mut level: Vec<(Kind, Digest)> = roots.to_vec();
    // By kind too: a file may hold the bytes of a directory, and only the directory has children.
    let mut seen = HashSet::new();
    while !level.is_empty() {
        level.retain(|one| seen.insert(*one));
        // In the order of the level, which is about the one in which a peer has them on its disk.
        let mut named = HashSet::new();
        let wanted = level.iter().map(|(_, digest)| *digest).filter(|digest| named.insert(*digest));
        let wanted: Vec<Digest> = wanted.collect();
        let here = store.clone();
        let missing = blocking(move || Ok(here.missing(&wanted)?)).await?;
        if !missing.is_empty() {
            fetch_level(store, lease, peers, missing, patience, &mut so_far).await?;
        }
        let here = store.clone();
        level = blocking(move || {
            let mut next = Vec::new();
            for (kind, digest) in level.into_iter().filter(|(kind, _)| !kind.is_leaf()) {
                let children = object::children(kind, &here.object(&digest)?)
                    .map_err(|source| ContentError::Object { digest, source })?;
                next.extend(children);
            }
            Ok(next)
        })
        .await?;
    }
    Ok(so_far.brought)
}

/// What one level hands on to the next.
struct SoFar {
    /// Neighbours that still answer, as a bit set.
    alive: u64,
    brought: Brought,
}

/// The neighbours that are asked at all: a bit set of them fits in a word.
fn asked_neighbours(peers: &Peers) -> &[Arc<Connection>] {
    &peers.neighbours[..peers.neighbours.len().min(63)]
}

fn all_alive(peers: &Peers) -> u64 {
    (1 << asked_neighbours(peers).len()) - 1
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FetchError> + Send + 'static,
) -> Result<T, FetchError> {
    tokio::task::spawn_blocking(work).await.map_err(|_cancelled| FetchError::Interrupted)?
}

/// The queue of one level, shared by all workers.
struct Level {
    state: Mutex<State>,
    changed: Notify,
}

/// Where each object of a level is: open, in the rest, with a worker, or in the store.
///
/// ```text
/// open --take--> neighbour --give_back--> open, or rest when no neighbour is left to ask
/// rest --take--> source    --give_back--> rest, and the source is not asked again
/// ```
struct State {
    /// Objects to be asked of neighbours, by the set of those that were asked in vain, which never
    /// holds all that are alive.
    open: BTreeMap<u64, VecDeque<Digest>>,
    /// Objects that only the source can have.
    rest: VecDeque<Digest>,
    /// Objects that neighbours are being asked for: they may come back to `open` or `rest`.
    with_neighbours: usize,
    /// Neighbours that still answer, as a bit set.
    alive: u64,
    source_error: Option<String>,
    nowhere: Option<Digest>,
    failed: Option<FetchError>,
    brought: Brought,
}

/// Objects on their way, each with the set of neighbours that were asked in vain.
type Batch = Vec<(Digest, u64)>;

impl Level {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch for a worker; `None` when nothing is left for it, ever.
    async fn take(&self, neighbour: Option<usize>) -> Option<Batch> {
        loop {
            // Registered before looking, so that no change between the look and the wait is missed.
            let changed = self.changed.notified();
            {
                let mut state = self.lock();
                let batch = state.take(neighbour);
                if !batch.is_empty() {
                    return Some(batch);
                }
                if state.is_over(neighbour) {
                    return None;
                }
            }
            changed.await;
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

    /// Tells everyone about a change of the state.
    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_waiters();
    }
}

impl State {
    fn new(missing: Vec<Digest>, so_far: &mut SoFar) -> Self {
        let mut state = Self {
            open: BTreeMap::from([(0, missing.into())]),
            rest: VecDeque::new(),
            with_neighbours: 0,
            alive: so_far.alive,
            source_error: None,
            nowhere: None,
            failed: None,
            brought: std::mem::take(&mut so_far.brought),
        };
        state.sort_out();
        state
    }

    fn take(&mut self, neighbour: Option<usize>) -> Batch {
        let mut batch = Batch::new();
        if self.has_given_up(neighbour) {
            return batch;
        }
        let Some(index) = neighbour else {
            let count = self.rest.len().min(BATCH_OBJECTS);
            return self.rest.drain(..count).map(|digest| (digest, 0)).collect();
        };
        for (asked, digests) in self.open.iter_mut().filter(|(asked, _)| *asked & 1 << index == 0) {
            let count = digests.len().min(BATCH_OBJECTS - batch.len());
            batch.extend(digests.drain(..count).map(|digest| (digest, *asked)));
        }
        self.open.retain(|_, digests| !digests.is_empty());
        self.with_neighbours += batch.len();
        batch
    }

    /// Takes back what is left of a batch of `taken` objects. `failure`: why the peer is not to be asked again.
    fn give_back(
        &mut self,
        neighbour: Option<usize>,
        taken: usize,
        left: Batch,
        failure: Option<String>,
    ) {
        let Some(index) = neighbour else {
            self.rest.extend(left.into_iter().map(|(digest, _)| digest));
            // The first reason is the cause, the other worker's often a consequence.
            self.source_error = self.source_error.take().or(failure);
            return;
        };
        self.with_neighbours -= taken;
        for (digest, asked) in left {
            self.open.entry(asked | 1 << index).or_default().push_back(digest);
        }
        if failure.is_some() {
            self.alive &= !(1 << index);
        }
        self.sort_out();
    }

    /// Moves to the source's queue what no neighbour is left for.
    fn sort_out(&mut self) {
        let alive = self.alive;
        for (_, digests) in self.open.extract_if(.., |asked, _| alive & !*asked == 0) {
            self.rest.extend(digests);
        }
    }

    /// Whether this peer is not to be asked any more, whatever is left.
    fn has_given_up(&self, neighbour: Option<usize>) -> bool {
        let gone = match neighbour {
            Some(index) => self.alive & 1 << index == 0,
            None => self.source_error.is_some(),
        };
        gone || self.nowhere.is_some() || self.failed.is_some()
    }

    /// Whether a worker that finds nothing to take will never find anything.
    ///
    /// Its queue grows only by what comes back from a neighbour, or for the source by what a neighbour still has
    /// to be asked for; what comes back from the source goes to nobody.
    fn is_over(&self, neighbour: Option<usize>) -> bool {
        let settled = self.with_neighbours == 0 && (neighbour.is_some() || self.open.is_empty());
        settled || self.has_given_up(neighbour)
    }

    /// How a level that all workers have left went.
    fn outcome(&mut self) -> Result<(), FetchError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if let Some(digest) = self.nowhere {
            return Err(FetchError::Nowhere(digest));
        }
        let missing = self.open.values().map(VecDeque::len).sum::<usize>() + self.rest.len();
        match self.source_error.take() {
            Some(reason) if missing > 0 => Err(FetchError::SourceFailed { missing, reason }),
            _ => Ok(()),
        }
    }
}

async fn fetch_level(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    missing: Vec<Digest>,
    patience: Patience,
    so_far: &mut SoFar,
) -> Result<(), FetchError> {
    let state = Mutex::new(State::new(missing, so_far));
    let level = Arc::new(Level { state, changed: Notify::new() });
    let mut workers = tokio::task::JoinSet::new();
    let neighbours = asked_neighbours(peers).iter().enumerate();
    let everyone = neighbours.map(|(index, one)| (Some(index), one, patience.neighbour));
    for (neighbour, peer, patience) in everyone.chain([(None, &peers.source, patience.source)]) {
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
    while let Some(done) = workers.join_next().await {
        // A worker that panicked has taken its batch along; leaving stops the others, who may wait for it.
        if done.is_err() {
            return Err(FetchError::Interrupted);
        }
    }
    let mut state = level.lock();
    so_far.alive = state.alive;
    so_far.brought = std::mem::take(&mut state.brought);
    state.outcome()
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
        while let Some(batch) = self.level.take(self.neighbour).await {
            let mut left: HashMap<Digest, u64> = batch.iter().copied().collect();
            let failure = self.request(&batch, &mut left).await.err();
            let left = left.into_iter().collect();
            self.level.change(|state| {
                if let Some(reason) = failure.as_ref().filter(|_| !state.has_given_up(self.neighbour)) {
                    tracing::warn!(node = %self.peer.node, %reason, "peer failed; asking elsewhere");
                }
                state.give_back(self.neighbour, batch.len(), left, failure);
            });
        }
    }

    /// Asks for a batch and takes out of `left` what arrived. Errors: why this peer is not to be asked again.
    async fn request(
        &self,
        batch: &[(Digest, u64)],
        left: &mut HashMap<Digest, u64>,
    ) -> Result<(), String> {
        let begun = Instant::now();
        let mut unanswered: HashSet<Digest> = left.keys().copied().collect();
        let digests = batch.iter().map(|(digest, _)| digest.as_bytes().to_vec().into()).collect();
        let mut client = self.peer.client();
        let call = client.fetch_objects(FetchObjectsRequest { digests });
        let mut stream = self.patiently(call).await?.into_inner();
        let mut bytes = 0;
        while let Some(message) = self.patiently(stream.message()).await? {
            let before = unanswered.len();
            let missing = message.missing.clone();
            bytes += self.keep(message, &mut unanswered, left).await?;
            for digest in missing.iter().filter_map(|digest| Digest::try_from(&digest[..]).ok()) {
                if unanswered.remove(&digest) && self.neighbour.is_none() {
                    self.level.change(|state| state.nowhere = Some(digest));
                }
            }
            if unanswered.len() == before {
                // An honest answer may end with an empty message; one that goes on with them never ends.
                let done = unanswered.is_empty();
                return if done { Ok(()) } else { Err("it sent a message of nothing".into()) };
            }
            if self.neighbour.is_some() && !unanswered.is_empty() && self.is_too_slow(bytes, begun)
            {
                return Err(format!("only {bytes} bytes in {} ms", begun.elapsed().as_millis()));
            }
        }
        match unanswered.len() {
            0 => Ok(()),
            count => Err(format!("its answer ended without a word on {count} objects")),
        }
    }

    fn is_too_slow(&self, bytes: u64, begun: Instant) -> bool {
        let elapsed = begun.elapsed();
        elapsed > self.patience
            && u128::from(bytes) * 1000 < u128::from(SLOWEST_BYTES_PER_SECOND) * elapsed.as_millis()
    }

    /// Waits for a peer's answer, but not too long, and not when another worker has given the peer up.
    async fn patiently<T>(
        &self,
        answer: impl Future<Output = Result<T, tonic::Status>>,
    ) -> Result<T, String> {
        tokio::select! {
            answer = tokio::time::timeout(self.patience, answer) => match answer {
                Ok(answer) => answer.map_err(|status| status.message().to_owned()),
                Err(_) => Err(format!("no answer within {} ms", self.patience.as_millis())),
            },
            () = self.level.gives_up(self.neighbour) => Err("given up".to_owned()),
        }
    }

    /// Keeps the objects of a message and takes them out of `unanswered` and `left`. Returns their bytes.
    async fn keep(
        &self,
        message: ObjectBatch,
        unanswered: &mut HashSet<Digest>,
        left: &mut HashMap<Digest, u64>,
    ) -> Result<u64, String> {
        let (store, lease, wanted) = (self.store.clone(), self.lease.clone(), unanswered.clone());
        let kept =
            tokio::task::spawn_blocking(move || keep(&store, &lease, &message, wanted)).await;
        let (kept, bytes, wrong) = match kept {
            Ok(Ok(kept)) => kept,
            Ok(Err(error)) => {
                self.level.change(|state| state.failed = Some(error.into()));
                return Err("what arrived cannot be kept".into());
            }
            Err(_) => return Err("interrupted".into()),
        };
        for digest in &kept {
            unanswered.remove(digest);
            left.remove(digest);
        }
        if !kept.is_empty() {
            let mut state = self.level.lock();
            let count = state.brought.entry(self.peer.node.clone()).or_default();
            count.0 += kept.len() as u64;
            count.1 += bytes;
        }
        wrong.map_or(Ok(bytes), Err)
    }
}

/// Checks and stores the objects of a message. Returns what was kept, its bytes, and what was wrong with the rest.
fn keep(
    store: &Store,
    lease: &Lease,
    message: &ObjectBatch,
    mut wanted: HashSet<Digest>,
) -> Result<(Vec<Digest>, u64, Option<String>), ContentError> {
    let mut writer = store.writer(lease);
    let (mut codec, mut kept, mut bytes, mut wrong) = (Codec::default(), Vec::new(), 0, None);
    for object in &message.objects {
        let Some(digest) =
            Digest::try_from(&object.digest[..]).ok().filter(|digest| wanted.contains(digest))
        else {
            wrong = Some("it sent an object that nobody asked for".to_owned());
            continue;
        };
        let size = u64::from(object.size_bytes);
        match codec.decode(&digest, object.encoding, size, &object.data, &[]) {
            Ok(data) => {
                writer.put_hashed(digest, &data)?;
                bytes += size;
                wanted.remove(&digest);
                kept.push(digest);
            }
            Err(error) => wrong = Some(error.to_string()),
        }
    }
    writer.flush()?;
    Ok((kept, bytes, wrong))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A worker without its network: idle, on its way with a batch, or gone.
    enum Doing {
        Nothing,
        Asking(Batch),
        Gone,
    }

    struct Model {
        state: State,
        workers: Vec<(Option<usize>, Doing)>,
        delivered: HashSet<Digest>,
        /// By object: which neighbours have answered for it.
        answered: HashMap<Digest, u64>,
    }

    impl Model {
        fn new(neighbours: usize, objects: u32) -> Self {
            let missing = (0..objects).map(|number| Digest::of(&number.to_le_bytes())).collect();
            let mut so_far = SoFar { alive: (1 << neighbours) - 1, brought: Brought::new() };
            let peers = (0..neighbours).map(Some).chain([None]);
            let workers =
                peers.flat_map(|peer| [(peer, Doing::Nothing), (peer, Doing::Nothing)]).collect();
            let state = State::new(missing, &mut so_far);
            Self { state, workers, delivered: HashSet::new(), answered: HashMap::new() }
        }

        /// Lets a worker take the next step. Returns whether there was one to take.
        fn step(&mut self, worker: usize, outcome: u8) -> bool {
            let (peer, doing) = &mut self.workers[worker];
            match std::mem::replace(doing, Doing::Nothing) {
                Doing::Gone => *doing = Doing::Gone,
                Doing::Nothing => {
                    let batch = self.state.take(*peer);
                    if batch.is_empty() {
                        let is_over = self.state.is_over(*peer);
                        *doing = if is_over { Doing::Gone } else { Doing::Nothing };
                        return is_over;
                    }
                    for (digest, _) in batch.iter().filter(|_| peer.is_none()) {
                        let answered = self.answered.get(digest).copied().unwrap_or(0);
                        assert_eq!(self.state.alive & !answered, 0, "a neighbour was left out");
                    }
                    *doing = Doing::Asking(batch);
                    return true;
                }
                Doing::Asking(batch) => {
                    let taken = batch.len();
                    let arrives = [taken, taken / 2, taken / 2, 0][usize::from(outcome % 4)];
                    // What the source neither sends nor fails to send is nowhere, which ends everything at once.
                    let fails = outcome % 4 >= 2 || (peer.is_none() && arrives < taken);
                    let mut left = batch;
                    for (digest, _) in left.drain(..arrives) {
                        assert!(self.delivered.insert(digest), "it came twice");
                    }
                    for (digest, _) in &left {
                        let bit = peer.map_or(0, |index| 1 << index);
                        *self.answered.entry(*digest).or_default() |= bit;
                    }
                    self.state.give_back(*peer, taken, left, fails.then(|| "cut".to_owned()));
                    return true;
                }
            }
            false
        }
    }

    proptest! {
        /// Method: workers without a network take, deliver, lack and fail in any order; after that all deliver.
        #[test]
        fn in_any_order_of_answers_nothing_is_lost_and_nobody_waits_for_ever(
            neighbours in 0usize..4,
            objects in 0u32..900,
            steps: Vec<(u8, u8)>,
        ) {
            let mut model = Model::new(neighbours, objects);
            let count = model.workers.len();
            for (worker, outcome) in steps {
                model.step(usize::from(worker) % count, outcome);
            }
            while (0..count).any(|worker| model.step(worker, 0)) {}
            let waits = |(_, doing): &(Option<usize>, Doing)| !matches!(doing, Doing::Gone);
            prop_assert!(!model.workers.iter().any(waits), "a worker waits for ever");
            prop_assert_eq!(model.state.with_neighbours, 0);
            let delivered = model.delivered.len();
            match model.state.outcome() {
                Ok(()) => prop_assert_eq!(delivered, objects as usize),
                Err(FetchError::SourceFailed { missing, .. }) => {
                    prop_assert_eq!(delivered + missing, objects as usize);
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
