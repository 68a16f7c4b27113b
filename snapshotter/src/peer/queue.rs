//! Request scheduling: which peer gets which request, and when a hedged duplicate is sent.
//!
//! The queue of one level. Pure: the workers of [`super::fetch`] tell it the time and what came, so
//! that every order of answers can be tried without a network.
//!
//! ```text
//! open --take--> neighbour --finish--> here, open again, or rest when no neighbour is left to ask
//! rest --take--> source    --finish--> here, or rest, and the source is not asked again
//! ```
//!
//! Two rules keep cooperation from ever costing more than it brings:
//!
//! - **Helping.** The source takes from the back of what neighbours still have to be asked for, as
//!   soon as they would take longer for it than the source alone for the whole level. So a slow,
//!   lying or empty neighbour leaves the source idle for no longer than the grace that every
//!   neighbour has.
//! - **Overtaking.** What is on its way from a neighbour that has been silent for longer than its
//!   own history makes likely is asked of another neighbour, or else of the source, as well.
//!   Whichever answer comes first counts; an object is on its way twice at most.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use godwit_protos::Digest;

use super::fetch::{Brought, FetchError, Patience};
use super::rate::RateEstimate;

/// Objects per request, at most; with pages of 4 KiB half a megabyte, with chunks of files some 10
/// MiB ...
pub(super) const BATCH_OBJECTS: usize = 128;

/// ... and at least, unless fewer are left.
const BATCH_OBJECTS_MIN: usize = 8;

/// About how long one request may keep a peer busy whose pace is known: what others wait for at the
/// end of a level.
const BATCH_TIME: Duration = Duration::from_millis(250);

/// How much longer than from the source alone a level may take before the source helps: the promise
/// of cooperation is never to cost more than this, and the grace.
const COST_MAX: f64 = 1.05;

/// Bytes per second of a source that was never measured, 100 Mbit/s: neighbours that are faster
/// are left alone.
const RATE_UNKNOWN: f64 = 12.5e6;

/// Objects to ask for, each with the neighbours that failed to supply it.
pub(super) type Batch = Vec<(Digest, u64)>;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// With a word on every object.
    Answered,
    /// No request waits for it any more, which says nothing against the peer but that it may have
    /// been late.
    GivenUp,
    /// The peer is not to be asked again, and why.
    Failed(String),
}

/// A request on its way.
struct Flight {
    /// `None` is the source.
    neighbour: Option<usize>,
    batch: Batch,
    begun: Instant,
    last_word: Instant,
}

/// The queue of one level, shared by all workers.
pub(super) struct Queue {
    /// What is not here yet, each with the root that it is fetched for.
    wanted: HashMap<Digest, usize>,
    /// Objects to be asked of neighbours, keyed by those that failed to supply them, which never
    /// holds all that are alive. May name objects that have come meanwhile.
    open: BTreeMap<u64, VecDeque<Digest>>,
    /// Objects that only the source can have. May name objects that have come meanwhile.
    rest: VecDeque<Digest>,
    flights: BTreeMap<u64, Flight>,
    next_flight: u64,
    /// Objects that are on their way twice.
    overtaken: HashSet<Digest>,
    patience: Patience,
    /// Objects of the level.
    objects: usize,
    /// When the first was asked for.
    begun: Option<Instant>,
    /// Objects that have come, and their bytes.
    arrived: (u64, u64),
    /// Neighbours that still answer, as a bit set.
    pub(super) alive: u64,
    /// By neighbour, and last the source.
    pub(super) paces: Vec<RateEstimate>,
    source_error: Option<String>,
    pub(super) nowhere: Option<Digest>,
    pub(super) failed: Option<FetchError>,
    /// By root.
    pub(super) brought: Vec<Brought>,
}

impl Queue {
    /// A queue for `missing` objects, each with its root; `paces` are the neighbours' and then the
    /// source's.
    pub(super) fn new(
        missing: &[(Digest, usize)],
        alive: u64,
        paces: Vec<RateEstimate>,
        patience: Patience,
        brought: Vec<Brought>,
    ) -> Self {
        let mut queue = Self {
            wanted: missing.iter().copied().collect(),
            open: BTreeMap::from([(0, missing.iter().map(|(digest, _)| *digest).collect())]),
            rest: VecDeque::new(),
            flights: BTreeMap::new(),
            next_flight: 0,
            overtaken: HashSet::new(),
            patience,
            objects: missing.len(),
            begun: None,
            arrived: (0, 0),
            alive,
            paces,
            source_error: None,
            nowhere: None,
            failed: None,
            brought,
        };
        queue.sort_out();
        queue
    }

    fn pace(&mut self, neighbour: Option<usize>) -> &mut RateEstimate {
        let index = neighbour.unwrap_or(self.paces.len() - 1);
        &mut self.paces[index]
    }

    fn is_alive(&self, index: usize) -> bool {
        self.alive & 1 << index != 0
    }

    /// The next batch for a peer, and the number of its flight. `None` if there is nothing for it
    /// now.
    pub(super) fn take(&mut self, neighbour: Option<usize>, now: Instant) -> Option<(u64, Batch)> {
        if self.is_over(neighbour) {
            return None;
        }
        let mut batch = match neighbour {
            Some(index) => self.take_open(index, now),
            None => self.take_rest(),
        };
        if batch.is_empty() && neighbour.is_none() && self.may_help(now) {
            batch = self.take_back();
        }
        if batch.is_empty() {
            batch = self.overtake(neighbour, now);
        }
        if batch.is_empty() {
            return None;
        }
        let number = self.next_flight;
        self.next_flight += 1;
        let flight = Flight { neighbour, batch: batch.clone(), begun: now, last_word: now };
        self.flights.insert(number, flight);
        self.pace(neighbour).begin(now);
        self.begun.get_or_insert(now);
        Some((number, batch))
    }

    fn take_open(&mut self, index: usize, now: Instant) -> Batch {
        let (mut batch, most) = (Batch::new(), self.batch_objects(index, now));
        for (asked, digests) in self.open.iter_mut().filter(|(asked, _)| *asked & 1 << index == 0) {
            while batch.len() < most
                && let Some(digest) = digests.pop_front()
            {
                if self.wanted.contains_key(&digest) {
                    batch.push((digest, *asked));
                }
            }
        }
        self.open.retain(|_, digests| !digests.is_empty());
        batch
    }

    fn take_rest(&mut self) -> Batch {
        let mut batch = Batch::new();
        while batch.len() < BATCH_OBJECTS
            && let Some(digest) = self.rest.pop_front()
        {
            if self.wanted.contains_key(&digest) {
                batch.push((digest, u64::MAX));
            }
        }
        batch
    }

    /// What neighbours would come to last.
    fn take_back(&mut self) -> Batch {
        let mut batch = Batch::new();
        for (asked, digests) in self.open.iter_mut().rev() {
            while batch.len() < BATCH_OBJECTS
                && let Some(digest) = digests.pop_back()
            {
                if self.wanted.contains_key(&digest) {
                    batch.push((digest, *asked));
                }
            }
        }
        self.open.retain(|_, digests| !digests.is_empty());
        batch
    }

    /// Whether neighbours would take longer for what is left than the source alone would have for
    /// the whole level. One that has not had its grace yet is not judged.
    fn may_help(&self, now: Instant) -> bool {
        let mut together = 0.0;
        for index in (0..self.paces.len() - 1).filter(|index| self.is_alive(*index)) {
            let pace = &self.paces[index];
            if !pace.silent().is_zero() {
                continue;
            }
            if pace.busy(now) < self.patience.grace {
                return false;
            }
            together += pace.rate(now).unwrap_or(0.0);
        }
        let is_measured = self.paces.last().is_some_and(|pace| pace.rate(now).is_some());
        if !is_measured && self.flights.values().any(|flight| flight.neighbour.is_none()) {
            // One request at a time tells enough.
            return false;
        }
        let source = self.source_rate(now);
        if together >= source {
            return false;
        }
        let with_neighbours = self.open.values().map(VecDeque::len).sum::<usize>()
            + self
                .flights
                .values()
                .filter_map(|one| one.neighbour.map(|_| one.batch.len()))
                .sum::<usize>();
        let elapsed =
            self.begun.map_or(Duration::ZERO, |begun| now.saturating_duration_since(begun));
        elapsed.as_secs_f64() + self.bytes_of(with_neighbours) / together.max(1.0)
            > self.bytes_of(self.objects) / source * COST_MAX + self.patience.grace.as_secs_f64()
    }

    /// About how much so many objects of this level are, in bytes.
    fn bytes_of(&self, objects: usize) -> f64 {
        let (arrived, bytes) = self.arrived;
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let (objects, mean) = (objects as f64, bytes as f64 / arrived.max(1) as f64);
        objects * mean.max(1.0)
    }

    /// How many objects a neighbour is asked for at once: as many as it sends within
    /// [`BATCH_TIME`].
    fn batch_objects(&self, index: usize, now: Instant) -> usize {
        let Some(rate) = self.paces[index].rate(now) else { return BATCH_OBJECTS };
        let fits = |objects: &usize| self.bytes_of(*objects) <= rate * BATCH_TIME.as_secs_f64();
        (BATCH_OBJECTS_MIN..BATCH_OBJECTS).rev().find(fits).unwrap_or(BATCH_OBJECTS_MIN)
    }

    /// Bytes per second.
    fn source_rate(&self, now: Instant) -> f64 {
        self.paces.last().and_then(|pace| pace.rate(now)).unwrap_or(RATE_UNKNOWN).max(1.0)
    }

    /// What is on its way from a neighbour that is later than usual.
    fn overtake(&mut self, neighbour: Option<usize>, now: Instant) -> Batch {
        let mut batch = Batch::new();
        for flight in self.flights.values() {
            let Some(late) = flight.neighbour.filter(|late| Some(*late) != neighbour) else {
                continue;
            };
            if !self.is_late(flight, late, neighbour, now) {
                continue;
            }
            for (digest, asked) in &flight.batch {
                let asked = asked | 1 << late;
                let is_new = neighbour.is_none_or(|index| asked & 1 << index == 0);
                if batch.len() < BATCH_OBJECTS
                    && is_new
                    && self.wanted.contains_key(digest)
                    && self.overtaken.insert(*digest)
                {
                    batch.push((*digest, asked));
                }
            }
        }
        batch
    }

    /// Whether a flight of neighbour `late` is to be overtaken by `by`, which has nothing better to
    /// do.
    fn is_late(&self, flight: &Flight, late: usize, by: Option<usize>, now: Instant) -> bool {
        let (pace, grace) = (&self.paces[late], self.patience.grace);
        let mut delay = pace.hedge_delay(grace);
        let mut others = (0..self.paces.len() - 1).filter(|other| *other != late);
        if by.is_none()
            && others.any(|other| self.is_alive(other) && self.paces[other].silent().is_zero())
        {
            // Another neighbour first, if there is one that answers.
            delay = delay.max(grace) * 2;
        }
        let faster = match by {
            // Among equals chance decides who is a little faster.
            Some(index) => self.paces[index].rate(now).unwrap_or(0.0) / 2.0,
            None => self.source_rate(now),
        };
        let is_slow = pace.rate(now).unwrap_or(0.0) < faster;
        now.saturating_duration_since(flight.last_word) >= delay
            || (is_slow && now.saturating_duration_since(flight.begun) >= grace * 4)
    }

    /// Objects have come. `fetched` is their size in bytes.
    pub(super) fn arrived(
        &mut self,
        flight: u64,
        node: &str,
        objects: &[(Digest, u64)],
        wait: Duration,
        now: Instant,
    ) {
        let Some(flight) = self.flights.get_mut(&flight) else { return };
        flight.last_word = now;
        let neighbour = flight.neighbour;
        self.pace(neighbour).progress(objects.iter().map(|(_, bytes)| bytes).sum(), wait);
        for (digest, bytes) in objects {
            let Some(root) = self.wanted.remove(digest) else { continue };
            let count = self.brought[root].entry(node.to_owned()).or_default();
            count.0 += 1;
            count.1 += bytes;
            self.arrived.0 += 1;
            self.arrived.1 += bytes;
        }
    }

    /// A request is over.
    pub(super) fn finish(&mut self, flight: u64, ending: Ending, now: Instant) {
        let Some(Flight { neighbour, batch, last_word, .. }) = self.flights.remove(&flight) else {
            return;
        };
        let waited = now.saturating_duration_since(last_word);
        let grace = self.patience.grace;
        let pace = self.pace(neighbour);
        let in_vain = ending != Ending::Answered && waited >= pace.hedge_delay(grace);
        pace.end(now, if in_vain { waited } else { Duration::ZERO });
        let is_silent = pace.silent() >= self.patience.neighbour;
        let bit = neighbour.map_or(0, |index| 1 << index);
        for (digest, asked) in batch {
            if !self.wanted.contains_key(&digest) {
                continue;
            }
            if self.overtaken.remove(&digest) {
                self.still_on_its_way(&digest, bit);
            } else if neighbour.is_none() && asked == u64::MAX {
                self.rest.push_back(digest);
            } else {
                self.open.entry(asked | bit).or_default().push_back(digest);
            }
        }
        match (neighbour, ending) {
            (Some(_), Ending::Failed(_)) => self.alive &= !bit,
            (Some(_), Ending::GivenUp) if is_silent => self.alive &= !bit,
            // The first reason is the cause, the other worker's often a consequence.
            (None, Ending::Failed(reason)) => _ = self.source_error.get_or_insert(reason),
            (_, Ending::GivenUp | Ending::Answered) => {}
        }
        self.sort_out();
    }

    /// One of two that were asked for an object did not bring it: should the other not either, it
    /// is not asked again.
    fn still_on_its_way(&mut self, digest: &Digest, bit: u64) {
        for flight in self.flights.values_mut() {
            for (_, asked) in flight.batch.iter_mut().filter(|(one, _)| one == digest) {
                *asked |= bit;
            }
        }
    }

    /// Moves to the source's queue what no neighbour is left for.
    fn sort_out(&mut self) {
        let alive = self.alive;
        for (_, digests) in self.open.extract_if(.., |asked, _| alive & !*asked == 0) {
            self.rest.extend(digests);
        }
    }

    /// Whether this peer is not to be asked any more, whatever is left: also that everything has
    /// come.
    pub(super) fn has_given_up(&self, neighbour: Option<usize>) -> bool {
        let gone = match neighbour {
            Some(index) => !self.is_alive(index),
            None => self.source_error.is_some(),
        };
        gone || self.wanted.is_empty() || self.nowhere.is_some() || self.failed.is_some()
    }

    /// Whether there will never be anything for this peer again.
    ///
    /// While something is on its way from a neighbour it may come back, or be overtaken.
    pub(super) fn is_over(&self, neighbour: Option<usize>) -> bool {
        let flying = self.flights.values().any(|flight| flight.neighbour.is_some());
        let source_flies = self.flights.values().any(|flight| flight.neighbour.is_none());
        let waits = match neighbour {
            // What the source took from the back comes back if the source fails.
            Some(_) => flying || source_flies || !self.open.is_empty(),
            None => flying || !self.open.is_empty() || !self.rest.is_empty(),
        };
        !waits || self.has_given_up(neighbour)
    }

    /// How a level that all workers have left went, with or without a source.
    pub(super) fn outcome(&mut self, has_source: bool) -> Result<(), FetchError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let missing = self.wanted.keys().next().filter(|_| !has_source);
        if let Some(digest) = self.nowhere.or(missing.copied()) {
            return Err(FetchError::Nowhere(digest));
        }
        match (self.wanted.len(), self.source_error.take()) {
            (0, _) => Ok(()),
            (missing, reason) => {
                let reason = reason.unwrap_or_else(|| "it was not asked".to_owned());
                Err(FetchError::SourceFailed { missing, reason })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MS: Duration = Duration::from_millis(1);

    const PATIENCE: Patience = Patience {
        grace: MS.saturating_mul(50),
        neighbour: MS.saturating_mul(2000),
        source: MS.saturating_mul(20_000),
    };

    fn digests(count: u32) -> Vec<(Digest, usize)> {
        (0..count).map(|number| (Digest::of(&number.to_le_bytes()), 0)).collect()
    }

    fn queue(objects: u32, paces: Vec<RateEstimate>) -> Queue {
        let alive = (1 << (paces.len() - 1)) - 1;
        Queue::new(&digests(objects), alive, paces, PATIENCE, vec![Brought::new()])
    }

    fn deliver(queue: &mut Queue, flight: u64, batch: &Batch, now: Instant) {
        let objects: Vec<_> = batch.iter().map(|(digest, _)| (*digest, 4096)).collect();
        queue.arrived(flight, "n", &objects, MS, now);
        queue.finish(flight, Ending::Answered, now);
    }

    #[test]
    fn the_source_waits_for_the_grace_of_neighbours_and_then_helps_unless_they_are_faster() {
        let begun = Instant::now();
        for (rate, helps) in [(None, true), (Some(1e6), false), (Some(1e9), true)] {
            let mut queue = queue(1000, vec![RateEstimate::default(), RateEstimate::known(rate)]);
            let (flight, batch) = queue.take(Some(0), begun).unwrap();
            assert!(queue.take(None, begun + MS).is_none(), "within the grace");
            // 128 pages in 100 ms are some 5 MB/s.
            deliver(&mut queue, flight, &batch, begun + 100 * MS);
            queue.take(Some(0), begun + 100 * MS).unwrap();
            assert_eq!(queue.take(None, begun + 100 * MS).is_some(), helps, "{rate:?}");
        }
    }

    #[test]
    fn what_a_silent_neighbour_was_asked_for_is_asked_of_another_and_then_of_the_source() {
        let begun = Instant::now();
        let mut queue = queue(
            100,
            vec![RateEstimate::default(), RateEstimate::default(), RateEstimate::default()],
        );
        let (silent, batch) = queue.take(Some(0), begun).unwrap();
        assert_eq!(batch.len(), 100);
        assert!(queue.take(Some(1), begun + 20 * MS).is_none());
        assert!(queue.take(None, begun + 60 * MS).is_none(), "a neighbour comes first");
        let (flight, again) = queue.take(Some(1), begun + 60 * MS).unwrap();
        assert_eq!(again.len(), 100);
        assert!(queue.take(None, begun + 900 * MS).is_none(), "nothing flies three times");
        deliver(&mut queue, flight, &again[..50].to_vec(), begun + 70 * MS);
        assert_eq!(queue.wanted.len(), 50);
        queue.finish(silent, Ending::Failed("no answer".to_owned()), begun + 2000 * MS);
        let (flight, rest) = queue.take(None, begun + 2000 * MS).unwrap();
        assert_eq!(rest.len(), 50, "what neither of them brought");
        deliver(&mut queue, flight, &rest, begun + 2001 * MS);
        assert!(queue.outcome(true).is_ok());
        assert_eq!(queue.brought[0]["n"], (100, 100 * 4096), "each object counts once");
    }

    #[test]
    fn a_neighbour_that_everything_overtook_is_not_waited_for_again() {
        let begun = Instant::now();
        let mut queue = queue(10, vec![RateEstimate::default(), RateEstimate::default()]);
        let (silent, _) = queue.take(Some(0), begun).unwrap();
        let (flight, batch) = queue.take(None, begun + 60 * MS).unwrap();
        deliver(&mut queue, flight, &batch, begun + 61 * MS);
        assert!(queue.has_given_up(Some(0)) && queue.is_over(None), "everything is here");
        queue.finish(silent, Ending::GivenUp, begun + 61 * MS);
        assert_eq!(queue.alive, 1, "it may still be of use");
        let mut next =
            Queue::new(&digests(20), queue.alive, queue.paces, PATIENCE, vec![Brought::new()]);
        next.take(Some(0), begun + 62 * MS).unwrap();
        assert!(next.take(None, begun + 62 * MS).is_some(), "nothing is waited for");
    }

    /// Method: each sends 12.5 MB/s in all, more or less, to its two workers in turn, message by
    /// message of 512 KiB.
    #[test]
    fn equals_without_a_source_share_a_level_and_send_little_twice() {
        const OBJECT: u64 = 75 << 10;
        const OBJECTS: u32 = 2800;
        let (begun, tick) = (Instant::now(), 5 * MS);
        let alive = (1 << 3) - 1;
        let paces = vec![RateEstimate::default(); 4];
        let mut queue = Queue::new(&digests(OBJECTS), alive, paces, PATIENCE, vec![Brought::new()]);
        // What was asked of each worker and has not been sent, with the time of the last message.
        type Asked = Option<(u64, Batch, Instant)>;
        let mut workers: Vec<(usize, Asked)> =
            [0, 1, 2, 0, 1, 2].into_iter().map(|index| (index, None)).collect();
        let (mut now, mut credit, mut sent) = (begun, [0; 3], 0u64);
        while !queue.wanted.is_empty() {
            now += tick;
            for (credit, rate) in credit.iter_mut().zip([12_500_000, 12_300_000, 12_700_000]) {
                *credit += rate / 200;
            }
            workers.rotate_left(3);
            for (index, asking) in &mut workers {
                if asking.is_none() {
                    *asking =
                        queue.take(Some(*index), now).map(|(flight, batch)| (flight, batch, now));
                }
                let Some((flight, batch, since)) = asking else { continue };
                let message = batch.len().min(7);
                if credit[*index] < message as u64 * OBJECT {
                    continue;
                }
                credit[*index] -= message as u64 * OBJECT;
                sent += message as u64;
                let objects: Vec<_> =
                    batch.drain(..message).map(|(one, _)| (one, OBJECT)).collect();
                queue.arrived(*flight, "n", &objects, now - *since, now);
                *since = now;
                if batch.is_empty() {
                    queue.finish(*flight, Ending::Answered, now);
                    *asking = None;
                }
            }
        }
        let took = (now - begun).as_secs_f64();
        let ideal = f64::from(OBJECTS) * 75.0 * 1024.0 / 37.5e6;
        assert!(took < ideal * 1.05, "{took} s instead of {ideal} s");
        assert!(sent < u64::from(OBJECTS) * 103 / 100, "{sent} of {OBJECTS} were sent");
        assert!(queue.outcome(false).is_ok());
    }

    /// A worker without its network: idle, on its way with a batch, or gone.
    enum Doing {
        Nothing,
        Asking(u64, Batch),
        Gone,
    }

    struct Model {
        queue: Queue,
        now: Instant,
        workers: Vec<(Option<usize>, Doing)>,
    }

    impl Model {
        fn new(neighbours: usize, objects: u32) -> Self {
            let peers = (0..neighbours).map(Some).chain([None]);
            let workers =
                peers.flat_map(|peer| [(peer, Doing::Nothing), (peer, Doing::Nothing)]).collect();
            let queue = queue(objects, vec![RateEstimate::default(); neighbours + 1]);
            Self { queue, now: Instant::now(), workers }
        }

        /// Lets a worker take the next step. Returns whether there was one to take.
        fn step(&mut self, worker: usize, outcome: u8) -> bool {
            self.now += MS * u32::from(outcome);
            let (now, queue) = (self.now, &mut self.queue);
            let (peer, doing) = &mut self.workers[worker];
            match std::mem::replace(doing, Doing::Nothing) {
                Doing::Gone => *doing = Doing::Gone,
                Doing::Nothing => {
                    if let Some((flight, batch)) = queue.take(*peer, now) {
                        assert!(batch.iter().all(|(digest, _)| queue.wanted.contains_key(digest)));
                        *doing = Doing::Asking(flight, batch);
                        return true;
                    }
                    if queue.is_over(*peer) {
                        *doing = Doing::Gone;
                        return true;
                    }
                }
                Doing::Asking(flight, batch) => {
                    let taken = batch.len();
                    let arrives = [taken, taken / 2, taken / 2, 0][usize::from(outcome % 4)];
                    // What the source neither sends nor fails to send is nowhere, which ends
                    // everything at once.
                    let fails = outcome % 4 >= 2 || (peer.is_none() && arrives < taken);
                    let objects: Vec<_> =
                        batch[..arrives].iter().map(|(digest, _)| (*digest, 1)).collect();
                    queue.arrived(flight, "n", &objects, MS, now);
                    let ending =
                        if fails { Ending::Failed("cut".to_owned()) } else { Ending::Answered };
                    queue.finish(flight, ending, now);
                    return true;
                }
            }
            false
        }
    }

    proptest! {
        /// Method: workers without a network take, deliver, lack and fail in any order; after that
        /// all deliver.
        #[test]
        fn in_any_order_of_answers_nothing_is_lost_and_nobody_waits_for_ever(
            neighbours in 0usize..4,
            objects in 1u32..900,
            steps: Vec<(u8, u8)>,
        ) {
            let mut model = Model::new(neighbours, objects);
            let count = model.workers.len();
            for (worker, outcome) in steps {
                model.step(usize::from(worker) % count, outcome);
            }
            // Idle workers look again after a while, as those of a fetch do.
            for _ in 0..100 {
                while (0..count).any(|worker| model.step(worker, 0)) {}
                model.now += MS * 100;
            }
            let waits = |(_, doing): &(Option<usize>, Doing)| !matches!(doing, Doing::Gone);
            prop_assert!(!model.workers.iter().any(waits), "a worker waits for ever");
            let delivered = model.queue.brought[0].values().map(|(count, _)| *count).sum::<u64>();
            match model.queue.outcome(true) {
                Ok(()) => prop_assert_eq!(delivered, u64::from(objects)),
                Err(FetchError::SourceFailed { missing, .. }) => {
                    prop_assert_eq!(delivered + missing as u64, u64::from(objects));
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }
    }
}
