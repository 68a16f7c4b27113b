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
//! nothing but its own bytes: each object is checked against its digest before it is kept.
//!
//! On failure everything that arrived stays in the store; fetching again goes on from there.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

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

/// Longest wait for the next message of a neighbour, and of the source, which nobody can replace.
const PATIENCE: Duration = Duration::from_secs(2);
const PATIENCE_SOURCE: Duration = Duration::from_secs(20);

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
    let mut brought = Brought::new();
    let mut level: Vec<(Kind, Digest)> = roots.to_vec();
    let mut seen = HashSet::new();
    while !level.is_empty() {
        level.retain(|(_, digest)| seen.insert(*digest));
        let wanted: Vec<Digest> = level.iter().map(|(_, digest)| *digest).collect();
        let here = store.clone();
        let missing = blocking(move || Ok(here.missing(&wanted)?)).await?;
        if !missing.is_empty() {
            fetch_level(store, lease, peers, missing, &mut brought).await?;
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
    Ok(brought)
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

struct State {
    /// Objects to be asked of neighbours, each with the set of those that were asked in vain.
    open: VecDeque<(Digest, u64)>,
    /// Objects that only the source can have.
    rest: VecDeque<Digest>,
    outstanding: usize,
    /// Neighbours that still answer, as a bit set.
    alive: u64,
    source_error: Option<String>,
    nowhere: Option<Digest>,
    failed: Option<FetchError>,
    brought: Brought,
}

impl Level {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next batch for a worker; `None` when nothing is left for it, ever.
    async fn take(&self, neighbour: Option<usize>) -> Option<Vec<(Digest, u64)>> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.lock();
                let batch = state.take(neighbour);
                if !batch.is_empty() {
                    state.outstanding += batch.len();
                    return Some(batch);
                }
                if state.is_over(neighbour) {
                    return None;
                }
            }
            changed.await;
        }
    }

    /// Gives back what a peer did not deliver.
    fn give_back(&self, neighbour: Option<usize>, batch: Vec<(Digest, u64)>) {
        let mut state = self.lock();
        state.outstanding -= batch.len();
        for (digest, asked) in batch {
            match neighbour {
                Some(index) => state.open.push_back((digest, asked | 1 << index)),
                None => state.nowhere = Some(digest),
            }
        }
        state.sort_out();
        drop(state);
        self.changed.notify_waiters();
    }
}

impl State {
    fn take(&mut self, neighbour: Option<usize>) -> Vec<(Digest, u64)> {
        if self.nowhere.is_some() || self.failed.is_some() {
            return Vec::new();
        }
        let Some(index) = neighbour else {
            let count = self.rest.len().min(BATCH_OBJECTS);
            return self.rest.drain(..count).map(|digest| (digest, 0)).collect();
        };
        if self.alive & 1 << index == 0 {
            return Vec::new();
        }
        let mut batch = Vec::new();
        let mut skipped = VecDeque::new();
        while batch.len() < BATCH_OBJECTS {
            match self.open.pop_front() {
                Some((digest, asked)) if asked & 1 << index == 0 => batch.push((digest, asked)),
                Some(other) => skipped.push_back(other),
                None => break,
            }
        }
        skipped.append(&mut self.open);
        self.open = skipped;
        batch
    }

    /// Moves to the source's queue what no neighbour is left for.
    fn sort_out(&mut self) {
        let alive = self.alive;
        let rest = &mut self.rest;
        self.open.retain(|(digest, asked)| {
            let hope = alive & !asked != 0;
            if !hope {
                rest.push_back(*digest);
            }
            hope
        });
    }

    fn is_over(&self, neighbour: Option<usize>) -> bool {
        let gone = match neighbour {
            Some(index) => self.alive & 1 << index == 0,
            None => self.source_error.is_some(),
        };
        let empty = self.open.is_empty() && self.rest.is_empty() && self.outstanding == 0;
        gone || empty || self.nowhere.is_some() || self.failed.is_some()
    }
}

async fn fetch_level(
    store: &Store,
    lease: &Arc<Lease>,
    peers: &Peers,
    missing: Vec<Digest>,
    brought: &mut Brought,
) -> Result<(), FetchError> {
    // A bit set of neighbours fits in a word.
    let neighbours = &peers.neighbours[..peers.neighbours.len().min(63)];
    let mut state = State {
        open: missing.into_iter().map(|digest| (digest, 0)).collect(),
        rest: VecDeque::new(),
        outstanding: 0,
        alive: (1u64 << neighbours.len()) - 1,
        source_error: None,
        nowhere: None,
        failed: None,
        brought: std::mem::take(brought),
    };
    state.sort_out();
    let level = Arc::new(Level { state: Mutex::new(state), changed: Notify::new() });
    let mut workers = tokio::task::JoinSet::new();
    let everyone = neighbours.iter().enumerate().map(|(index, one)| (Some(index), one));
    for (neighbour, peer) in everyone.chain([(None, &peers.source)]) {
        for _ in 0..REQUESTS_PER_PEER {
            let worker = Worker {
                level: level.clone(),
                peer: peer.clone(),
                neighbour,
                store: store.clone(),
                lease: lease.clone(),
            };
            workers.spawn(worker.run());
        }
    }
    while let Some(done) = workers.join_next().await {
        if done.is_err() {
            return Err(FetchError::Interrupted);
        }
    }
    let mut state = level.lock();
    *brought = std::mem::take(&mut state.brought);
    if let Some(error) = state.failed.take() {
        return Err(error);
    }
    if let Some(digest) = state.nowhere {
        return Err(FetchError::Nowhere(digest));
    }
    let missing = state.open.len() + state.rest.len();
    match state.source_error.take() {
        Some(reason) if missing > 0 => Err(FetchError::SourceFailed { missing, reason }),
        _ => Ok(()),
    }
}

struct Worker {
    level: Arc<Level>,
    peer: Arc<Connection>,
    neighbour: Option<usize>,
    store: Store,
    lease: Arc<Lease>,
}

impl Worker {
    async fn run(self) {
        while let Some(batch) = self.level.take(self.neighbour).await {
            let mut left: BTreeMap<Digest, u64> = batch.iter().copied().collect();
            let outcome = self.request(&batch, &mut left).await;
            let delivered = batch.len() - left.len();
            self.level.lock().outstanding -= delivered;
            if let Err(reason) = outcome {
                tracing::warn!(node = %self.peer.node, %reason, "peer failed; asking elsewhere");
                let mut state = self.level.lock();
                match self.neighbour {
                    Some(index) => state.alive &= !(1 << index),
                    None => {
                        state.outstanding -= left.len();
                        state.rest.extend(left.keys());
                        left.clear();
                        state.source_error = Some(reason);
                    }
                }
            }
            self.level.give_back(self.neighbour, left.into_iter().collect());
        }
        self.level.changed.notify_waiters();
    }

    /// Asks for a batch and takes out of `left` what arrived. Errors: why this peer is not to be asked again.
    async fn request(
        &self,
        batch: &[(Digest, u64)],
        left: &mut BTreeMap<Digest, u64>,
    ) -> Result<(), String> {
        let patience = if self.neighbour.is_some() { PATIENCE } else { PATIENCE_SOURCE };
        let late = |_| format!("no answer within {} ms", patience.as_millis());
        let digests = batch.iter().map(|(digest, _)| digest.as_bytes().to_vec().into()).collect();
        let mut client = self.peer.client();
        let call = client.fetch_objects(FetchObjectsRequest { digests });
        let mut stream = tokio::time::timeout(patience, call)
            .await
            .map_err(late)?
            .map_err(|status| status.message().to_owned())?
            .into_inner();
        loop {
            let message = tokio::time::timeout(patience, stream.message()).await.map_err(late)?;
            match message.map_err(|status| status.message().to_owned())? {
                None => return Ok(()),
                Some(message) => self.keep(message, left).await?,
            }
        }
    }

    async fn keep(
        &self,
        message: ObjectBatch,
        left: &mut BTreeMap<Digest, u64>,
    ) -> Result<(), String> {
        let (store, lease) = (self.store.clone(), self.lease.clone());
        let wanted: HashSet<Digest> = left.keys().copied().collect();
        let kept =
            tokio::task::spawn_blocking(move || keep(&store, &lease, &message, &wanted)).await;
        let (kept, bytes, wrong) = match kept {
            Ok(Ok(kept)) => kept,
            Ok(Err(error)) => {
                self.level.lock().failed = Some(error.into());
                return Err("what arrived cannot be kept".into());
            }
            Err(_) => return Err("interrupted".into()),
        };
        for digest in &kept {
            left.remove(digest);
        }
        let mut state = self.level.lock();
        let count = state.brought.entry(self.peer.node.clone()).or_default();
        count.0 += kept.len() as u64;
        count.1 += bytes;
        wrong.map_or(Ok(()), Err)
    }
}

/// Checks and stores the objects of a message. Returns what was kept, its bytes, and what was wrong with the rest.
fn keep(
    store: &Store,
    lease: &Lease,
    message: &ObjectBatch,
    wanted: &HashSet<Digest>,
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
                kept.push(digest);
            }
            Err(error) => wrong = Some(error.to_string()),
        }
    }
    writer.flush()?;
    Ok((kept, bytes, wrong))
}
