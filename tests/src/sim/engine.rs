//! One run: a site, a policy, two hours of virtual time.
//!
//! A migration is the daemon's, phase by phase: looking up and choosing, a first round from
//! neighbours and source at once, rounds from the source alone as long as `migrate::rounds` says
//! so, then freeze, dump, difference and restore. What is written while one round goes on is the
//! source's in the next. The rules know what a daemon knows: rates that earlier migrations *to
//! the same node* measured, loads as nodes tell them, ages by clocks that may be wrong, write rates
//! as the last two captures showed them. They are never told what holds at that moment.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeMap, BinaryHeap};

use godwit_policy::choose::{Candidate, Source, Wanted};
use godwit_policy::predict::MEASURED_BYTES_MIN;
use godwit_policy::predict::{RATE_UNKNOWN, to_u64, write_rate};
use godwit_policy::rounds;
use godwit_policy::schedule::{Budget, Schedule, ScheduleError, may_run, seed};

use super::asking::{Policy, duration};
use super::cache::{Caches, Entry, Key, Traffic};
use super::network::{Due, Network, Pool, Sender, Transfer};
use super::parameters as given;
use super::world::World;

/// A capture that may not run now is tried again after this many seconds.
const POSTPONED: f64 = 60.0;

/// Share of a new measurement in what is remembered, as in `peer/channel.rs`.
const NEW_SHARE: f64 = 0.5;

/// What happens.
#[derive(Clone, Copy, Debug)]
enum Event {
    /// A user has come nearer to another node.
    Move(usize),
    /// A subject is due.
    Capture(Key),
    /// A transfer may be done.
    Look(Due),
    /// A migration goes on.
    Step(usize),
    /// A node retires snapshots.
    Sweep(usize),
}

/// An event at its time; of the same instant, what was planned first happens first.
#[derive(Clone, Copy, Debug)]
struct Planned {
    at: f64,
    number: u64,
    event: Event,
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> Ordering {
        self.at.total_cmp(&other.at).then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Planned {}

/// What a migration does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    First,
    Round,
    Stop,
    Restored,
}

/// A migration under way.
#[derive(Clone, Debug)]
struct Migration {
    user: usize,
    source: usize,
    destination: usize,
    requested: f64,
    phase: Phase,
    /// The state that was brought last is of this second.
    captured: f64,
    rounds: Vec<u64>,
    frozen: f64,
    from_source: f64,
    from_others: f64,
    asked: usize,
}

/// A migration that is over.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moved {
    /// Who.
    pub user: usize,
    /// When it was requested, in seconds.
    pub requested: f64,
    /// Seconds from the request until it ran.
    pub total: f64,
    /// Seconds from the freeze until it ran.
    pub downtime: f64,
    /// Bytes from the source.
    pub from_source: f64,
    /// Bytes from neighbours.
    pub from_others: f64,
    /// Neighbours that were asked.
    pub asked: usize,
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Migrations that were requested after the warm-up.
    pub moved: Vec<Moved>,
    /// Bytes that each node stored after its last sweep.
    pub stored: Vec<f64>,
    /// What was sent besides.
    pub traffic: Traffic,
}

/// What is remembered of a subject at its host.
#[derive(Clone, Copy, Debug, Default)]
struct Lineage {
    sequence: u64,
    taken: Option<f64>,
    write_rate: Option<f64>,
}

struct Engine<'w> {
    world: &'w World,
    policy: Policy,
    schedule: Schedule,
    budget: Budget,
    caches: Caches<'w>,
    network: Network<'w>,
    events: BinaryHeap<Reverse<Planned>>,
    numbered: u64,
    migrations: Vec<Option<Migration>>,
    by_transfer: BTreeMap<usize, usize>,
    /// By user: where its container is and is to be, how far along its path, and whether it is
    /// moving.
    hosts: Vec<usize>,
    wanted: Vec<usize>,
    steps: Vec<usize>,
    is_moving: Vec<bool>,
    lineages: Vec<[Lineage; 3]>,
    /// By node: bytes per second that other nodes were measured at, and when it may capture again.
    known: Vec<BTreeMap<usize, f64>>,
    may_capture: Vec<f64>,
    outcome: Outcome,
}

/// Runs a policy in a world.
pub fn run(world: &World, policy: Policy) -> Result<Outcome, ScheduleError> {
    let (min, max) = given::PERIOD;
    let hosts: Vec<usize> = world.users.iter().map(|user| user.path[0].1).collect();
    let mut engine = Engine {
        world,
        policy,
        schedule: Schedule::new(min, max, given::TARGET_BYTES, given::JITTER)?,
        budget: Budget::new(given::CPU_SHARE, given::DISK)?,
        caches: Caches::new(world),
        network: Network::new(world),
        events: BinaryHeap::new(),
        numbered: 0,
        migrations: Vec::new(),
        by_transfer: BTreeMap::new(),
        wanted: hosts.clone(),
        steps: vec![0; hosts.len()],
        is_moving: vec![false; hosts.len()],
        lineages: vec![[Lineage::default(); 3]; hosts.len()],
        hosts,
        known: vec![BTreeMap::new(); world.count()],
        may_capture: vec![0.0; world.count()],
        outcome: Outcome { stored: vec![0.0; world.count()], ..Outcome::default() },
    };
    engine.begin();
    while let Some(Reverse(Planned { at, event, .. })) = engine.events.pop() {
        engine.on(at, event);
        for due in std::mem::take(&mut engine.network.due) {
            engine.at(due.at, Event::Look(due));
        }
    }
    engine.outcome.traffic = engine.caches.traffic;
    Ok(engine.outcome)
}

impl Engine<'_> {
    fn at(&mut self, at: f64, event: Event) {
        self.numbered += 1;
        self.events.push(Reverse(Planned { at, number: self.numbered, event }));
    }

    fn begin(&mut self) {
        let spread = |index: usize, of: usize, span: f64| span * index as f64 / of as f64;
        for user in 0..self.hosts.len() {
            self.next_move(user);
            if self.policy != Policy::None {
                let at = spread(user, self.hosts.len(), given::PERIOD.0.as_secs_f64());
                (0..3).for_each(|subject| self.at(at, Event::Capture((user, subject))));
            }
        }
        for node in 0..self.world.count() {
            let sweep = given::SWEEP.as_secs_f64();
            self.at(sweep + spread(node, self.world.count(), sweep), Event::Sweep(node));
        }
    }

    fn next_move(&mut self, user: usize) {
        self.steps[user] += 1;
        if let Some((at, _)) = self.world.users[user].path.get(self.steps[user]) {
            self.at(*at, Event::Move(user));
        }
    }

    fn on(&mut self, now: f64, event: Event) {
        match event {
            Event::Move(user) => {
                self.wanted[user] = self.world.users[user].path[self.steps[user]].1;
                self.next_move(user);
                self.follow(now, user);
            }
            Event::Capture(key) => self.capture(now, key),
            Event::Sweep(node) => {
                let is_told = self.policy != Policy::None;
                self.outcome.stored[node] = self.caches.sweep(node, now, is_told);
                let next = now + given::SWEEP.as_secs_f64();
                if next < given::RUN.as_secs_f64() {
                    self.at(next, Event::Sweep(node));
                }
            }
            Event::Step(number) => self.step(now, number),
            Event::Look(due) => {
                if let Some(done) = self.network.look(now, due)
                    && let Some(number) = self.by_transfer.remove(&due.transfer)
                {
                    self.arrived(now, number, &done);
                }
            }
        }
    }

    fn capture(&mut self, now: f64, key: Key) {
        if now >= given::RUN.as_secs_f64() {
            return;
        }
        let (user, host) = (key.0, self.hosts[key.0]);
        let is_free = may_run(self.world.told_load(host, now), given::LOAD_MAX);
        if self.is_moving[user] || !is_free {
            self.at(now + POSTPONED, Event::Capture(key));
            return;
        }
        if self.may_capture[host] > now {
            self.at(self.may_capture[host], Event::Capture(key));
            return;
        }
        let subject = self.world.users[user].subjects[key.1];
        let before = self.lineages[user][key.1].taken;
        let written = before.map_or(subject.size, |before| subject.differs_after(now - before));
        let busy = subject.size / given::CAPTURE;
        self.may_capture[host] =
            now + self.budget.next_start(duration(busy), to_u64(written)).as_secs_f64();
        let sequence = self.taken(now, key, host);
        let entry =
            Entry { node: host, by: host, sequence, taken: now, available: now + busy, used: None };
        self.caches.keep(key, entry, true);
        self.caches.copy(key, host, sequence, now);
        let seed = seed(&host.to_string(), &format!("{}/{}", user, key.1), sequence);
        let rate = self.lineages[user][key.1].write_rate;
        let period = self.schedule.period(to_u64(subject.size), rate, seed);
        self.at(now + period.as_secs_f64(), Event::Capture(key));
    }

    /// A snapshot was taken: its sequence, and what it tells of the write rate.
    fn taken(&mut self, now: f64, key: Key, node: usize) -> u64 {
        let subject = self.world.users[key.0].subjects[key.1];
        let lineage = &mut self.lineages[key.0][key.1];
        if let Some(before) = lineage.taken.filter(|before| *before < now) {
            let differs = self.world.measures(subject.differs_after(now - before), node, now);
            lineage.write_rate = Some(write_rate(subject.size, differs, now - before));
        }
        lineage.taken = Some(now);
        lineage.sequence += 1;
        lineage.sequence
    }

    /// Begins a migration if the container is not where it is to be.
    fn follow(&mut self, now: f64, user: usize) {
        let (source, destination) = (self.hosts[user], self.wanted[user]);
        if source == destination || self.is_moving[user] {
            return;
        }
        self.is_moving[user] = true;
        let number = self.migrations.len();
        self.migrations.push(Some(Migration {
            user,
            source,
            destination,
            requested: now,
            phase: Phase::First,
            captured: now,
            rounds: Vec::new(),
            frozen: now,
            from_source: 0.0,
            from_others: 0.0,
            asked: 0,
        }));
        // Asking the directory and saying hello; the directory is on the first node.
        let greet =
            if self.policy == Policy::None { 0.0 } else { self.world.round_trip(destination, 0) };
        self.at(now + given::BEGIN + greet, Event::Step(number));
    }

    /// The source has something to send: it captures, and a transfer begins.
    fn step(&mut self, now: f64, number: usize) {
        let Some(mut migration) = self.migrations[number].take() else { return };
        let subjects = self.world.users[migration.user].subjects;
        let memory = subjects[0].size;
        let whole: f64 = subjects.iter().map(|subject| subject.size).sum();
        let changed: f64 =
            subjects.iter().map(|one| one.differs_after(now - migration.captured)).sum();
        let begins = |after: f64| now + after;
        let (senders, pools, begun) = match migration.phase {
            Phase::First => {
                let begun = begins(whole / given::CAPTURE);
                let (senders, pools) = self.first_round(now, begun, &mut migration);
                migration.rounds.push(to_u64(whole));
                (senders, pools, begun)
            }
            Phase::Round => {
                migration.rounds.push(to_u64(changed));
                let begun = begins(whole / given::CAPTURE);
                (
                    self.source_alone(&migration, begun),
                    vec![Pool { senders: 1, bytes: changed }],
                    begun,
                )
            }
            Phase::Stop => {
                migration.frozen = now;
                let begun = begins(given::DUMP.0 + given::DUMP.1 * memory);
                (
                    self.source_alone(&migration, begun),
                    vec![Pool { senders: 1, bytes: changed }],
                    begun,
                )
            }
            Phase::Restored => {
                self.restored(now, &migration);
                return;
            }
        };
        migration.captured = now;
        let (into, is_urgent) = (migration.destination, matches!(migration.phase, Phase::Stop));
        let transfer = self.network.begin(now, begun, into, senders, pools, is_urgent);
        self.by_transfer.insert(transfer, number);
        self.migrations[number] = Some(migration);
    }

    fn source_alone(&self, migration: &Migration, begun: f64) -> Vec<Sender> {
        let way = self.world.round_trip(migration.source, migration.destination);
        vec![Sender::new(migration.source, begun + way)]
    }

    /// Chooses neighbours for every subject.
    fn first_round(
        &mut self,
        now: f64,
        begun: f64,
        migration: &mut Migration,
    ) -> (Vec<Sender>, Vec<Pool>) {
        let (user, source, destination) = (migration.user, migration.source, migration.destination);
        let mut nodes = vec![source];
        let mut pools: Vec<Pool> = Vec::new();
        for subject in 0..3 {
            let key = (user, subject);
            let part = self.world.users[user].subjects[subject];
            let own = self.caches.newest_on(key, destination, now);
            let missing = own.map_or(part.size, |own| part.differs_after(now - own.taken));
            let mut asked = self.ask(now, key, source, destination, missing);
            asked.sort_by(|one, other| other.taken.total_cmp(&one.taken));
            let used: Vec<usize> = asked.iter().map(|entry| entry.node).collect();
            self.caches.used(key, &used, now);
            // Freshest first: what it lacks only the source has, what the next one lacks only those
            // before it ...
            let (mut held_by, mut left) = (1, missing);
            for entry in asked {
                let lacks = part.differs_after(now - entry.taken).min(missing);
                let has = missing - lacks;
                pools.push(Pool { senders: held_by, bytes: left - has });
                left = has;
                let index = nodes.iter().skip(1).position(|node| *node == entry.node);
                let index = index.map_or(nodes.len(), |index| index + 1);
                if index == nodes.len() {
                    nodes.push(entry.node);
                }
                held_by |= 1 << index;
            }
            pools.push(Pool { senders: held_by, bytes: left });
        }
        migration.asked = nodes.len() - 1;
        // Three questions, one after another: what there is, the lists, the first contents.
        let sender = |node: &usize| {
            Sender::new(*node, begun + 3.0 * self.world.round_trip(*node, destination))
        };
        (nodes.iter().map(sender).collect(), together(pools))
    }

    fn ask(
        &mut self,
        now: f64,
        key: Key,
        source: usize,
        destination: usize,
        missing: f64,
    ) -> Vec<Entry> {
        if self.policy == Policy::None {
            return Vec::new();
        }
        let mut entries = self.caches.look_up(key, now);
        let newest = entries.iter().map(|entry| entry.sequence).max().unwrap_or(0);
        entries.retain(|entry| entry.node != source && entry.node != destination);
        let lineage = self.lineages[key.0][key.1];
        let wanted = Wanted {
            size_bytes: self.world.users[key.0].subjects[key.1].size,
            missing_bytes: missing,
            write_rate: lineage.write_rate,
        };
        let known = &self.known[destination];
        // What clocks say: the destination's, and that of the node that took the snapshot.
        let told = |entry: &Entry| entry.taken + self.world.clock_error(entry.by);
        let clock = now + self.world.clock_error(destination);
        let candidate = |entry: &Entry| Candidate {
            node: entry.node.to_string(),
            lag: newest - entry.sequence,
            age: duration(clock - told(entry)),
            rate: known.get(&entry.node).copied(),
            round_trip: duration(self.world.round_trip(entry.node, destination)),
            load: self.world.told_load(entry.node, now),
        };
        let candidates: Vec<Candidate> = entries.iter().map(candidate).collect();
        let source = Source {
            rate: known.get(&source).copied(),
            round_trip: duration(self.world.round_trip(source, destination)),
            load: self.world.told_load(source, now),
        };
        let ingest = known.values().copied().fold(RATE_UNKNOWN, f64::max);
        let asked = self.policy.ask(&wanted, &candidates, &source, ingest);
        entries.retain(|entry| asked.contains(&entry.node.to_string()));
        entries
    }

    /// A transfer is done: what comes next?
    fn arrived(&mut self, now: f64, number: usize, done: &Transfer) {
        let Some(migration) = self.migrations[number].as_mut() else { return };
        let known = &mut self.known[migration.destination];
        for (index, sender) in done.senders.iter().enumerate() {
            let bytes =
                if index == 0 { &mut migration.from_source } else { &mut migration.from_others };
            *bytes += sender.sent;
            if sender.sent >= MEASURED_BYTES_MIN as f64 {
                let rate = self.world.measures(sender.sent / sender.busy, sender.node, now);
                let remembered = known.entry(sender.node).or_insert(rate);
                *remembered += (rate - *remembered) * NEW_SHARE;
            }
        }
        let memory = self.world.users[migration.user].subjects[0].size;
        let after = match migration.phase {
            Phase::First | Phase::Round if rounds::another(&migration.rounds, 0) => {
                migration.phase = Phase::Round;
                given::STAGE
            }
            Phase::First | Phase::Round => {
                migration.phase = Phase::Stop;
                given::STAGE
            }
            Phase::Stop | Phase::Restored => {
                migration.phase = Phase::Restored;
                given::RESTORE.0 + given::RESTORE.1 * memory
            }
        };
        self.at(now + after, Event::Step(number));
    }

    /// The container runs at the destination; both keep what it was at the cut.
    fn restored(&mut self, now: f64, migration: &Migration) {
        let Migration { user, source, destination, requested, frozen, .. } = *migration;
        for subject in 0..3 {
            let key = (user, subject);
            let sequence = self.taken(frozen, key, destination);
            for node in [source, destination] {
                let entry =
                    Entry { node, by: source, sequence, taken: frozen, available: now, used: None };
                self.caches.keep(key, entry, self.policy != Policy::None);
            }
        }
        if requested >= given::WARM_UP.as_secs_f64() {
            self.outcome.moved.push(Moved {
                user,
                requested,
                total: now - requested,
                downtime: now - frozen,
                from_source: migration.from_source,
                from_others: migration.from_others,
                asked: migration.asked,
            });
        }
        self.hosts[user] = destination;
        self.is_moving[user] = false;
        self.follow(now, user);
    }
}

/// Joins pools of the same senders.
fn together(pools: Vec<Pool>) -> Vec<Pool> {
    let mut joined: BTreeMap<u64, f64> = BTreeMap::new();
    for pool in pools {
        *joined.entry(pool.senders).or_default() += pool.bytes;
    }
    joined.into_iter().map(|(senders, bytes)| Pool { senders, bytes }).collect()
}
