//! Who has which snapshot: the caches of all nodes, and the directory that knows them.
//!
//! Placing and retiring are the daemon's rules. The directory answers at once and is never wrong;
//! what asking it costs is counted.

use std::collections::{BTreeMap, BTreeSet};

use godwit_policy::place::{Neighbour, place};
use godwit_policy::retain::{Kept, Rules, retain};
use godwit_store::store::SnapshotId;
use std::time::Duration;

use super::parameters as given;
use super::whole;
use super::world::World;

/// A subject of a user: its number, and which of the three.
pub type Key = (usize, usize);

/// A snapshot on a node.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Where.
    pub node: usize,
    /// The node that took it, whose clock its time is of.
    pub by: usize,
    /// Place in the lineage.
    pub sequence: u64,
    /// What it shows: the state at this second.
    pub taken: f64,
    /// Since when it can be asked for.
    pub available: f64,
    /// When it was last served from.
    pub used: Option<f64>,
}

/// What was sent besides migrations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Traffic {
    /// Bytes of copies to neighbours.
    pub copies: f64,
    /// Messages to and from the directory.
    pub directory_messages: u64,
    /// Bytes of them.
    pub directory_bytes: f64,
}

impl Traffic {
    fn directory(&mut self, entries: usize) {
        self.directory_messages += 1;
        self.directory_bytes += given::ENTRY * (1 + entries) as f64;
    }
}

/// All caches of a site.
#[derive(Debug)]
pub struct Caches<'w> {
    world: &'w World,
    /// By user and subject.
    entries: Vec<[Vec<Entry>; 3]>,
    by_node: Vec<BTreeSet<Key>>,
    /// Bytes, by node, when it was last swept.
    stored: Vec<f64>,
    /// What was sent.
    pub traffic: Traffic,
}

const RULES: Rules = Rules {
    keep_last: given::KEEP_LAST,
    keep_within: None,
    expire_removed: Duration::MAX,
    budget_bytes: Some(given::BUDGET),
};

impl<'w> Caches<'w> {
    /// Empty caches.
    pub fn new(world: &'w World) -> Self {
        Self {
            world,
            entries: vec![[const { Vec::new() }; 3]; world.users.len()],
            by_node: vec![BTreeSet::new(); world.count()],
            stored: vec![0.0; world.count()],
            traffic: Traffic::default(),
        }
    }

    /// Snapshots of a subject, wherever.
    pub fn of(&self, (user, subject): Key) -> &[Entry] {
        &self.entries[user][subject]
    }

    /// Asks the directory for the newest snapshot of each node.
    pub fn look_up(&mut self, key: Key, now: f64) -> Vec<Entry> {
        let mut newest: BTreeMap<usize, Entry> = BTreeMap::new();
        for entry in self.of(key).iter().filter(|entry| entry.available <= now) {
            let known = newest.entry(entry.node).or_insert(*entry);
            if known.sequence < entry.sequence {
                *known = *entry;
            }
        }
        self.traffic.directory(0);
        self.traffic.directory(newest.len());
        newest.into_values().collect()
    }

    /// The newest snapshot of a subject on a node.
    pub fn newest_on(&self, key: Key, node: usize, now: f64) -> Option<Entry> {
        let here = self.of(key).iter().filter(|one| one.node == node && one.available <= now);
        here.max_by_key(|entry| entry.sequence).copied()
    }

    /// Keeps a snapshot. `is_told`: the directory learns of it.
    pub fn keep(&mut self, key: Key, entry: Entry, is_told: bool) {
        self.entries[key.0][key.1].push(entry);
        self.by_node[entry.node].insert(key);
        if is_told {
            self.traffic.directory(1);
        }
    }

    /// Nodes were served from.
    pub fn used(&mut self, key: Key, nodes: &[usize], now: f64) {
        let entries = self.entries[key.0][key.1].iter_mut();
        entries.filter(|entry| nodes.contains(&entry.node)).for_each(|one| one.used = Some(now));
    }

    /// Puts copies of a snapshot that `host` has just taken on its neighbours.
    pub fn copy(&mut self, key: Key, host: usize, sequence: u64, now: f64) {
        let subject = self.world.users[key.0].subjects[key.1];
        let earlier = |node: usize| self.newest_on(key, node, now).map(|entry| entry.taken);
        let bytes = |node: usize| {
            earlier(node).map_or(subject.size, |taken| subject.differs_after(now - taken))
        };
        let neighbour = |node: &usize| Neighbour {
            name: node.to_string(),
            round_trip_ms: self.world.round_trip(host, *node) * 1e3,
            free_bytes: whole(given::BUDGET as f64 - self.stored[*node]) as u64,
            is_reachable: true,
            has_earlier: earlier(*node).is_some(),
            ..Neighbour::default()
        };
        let neighbours: Vec<_> = self.world.peers(host).iter().map(neighbour).collect();
        let needed = whole(subject.size) as u64;
        let placed = place(given::COPIES, needed, &BTreeMap::new(), &neighbours, &[]);
        let nodes = placed.iter().filter_map(|name| name.parse().ok());
        for (node, bytes) in nodes.map(|node| (node, bytes(node))).collect::<Vec<_>>() {
            // Copies have the lowest priority: they fill what migrations leave, here half of each
            // link.
            let rate = self.world.serves(host, now).min(self.world.takes_in(node, now)) / 2.0;
            let available = now + bytes / rate;
            self.traffic.copies += bytes;
            self.keep(
                key,
                Entry { node, by: host, sequence, taken: now, available, used: None },
                true,
            );
        }
    }

    /// Retires snapshots of a node. Returns the bytes that it then stores.
    pub fn sweep(&mut self, node: usize, now: f64, is_told: bool) -> f64 {
        let (mut kept, mut where_from, mut total) = (Vec::new(), Vec::new(), 0.0);
        for key in &self.by_node[node] {
            let subject = self.world.users[key.0].subjects[key.1];
            let mut here: Vec<&Entry> =
                self.of(*key).iter().filter(|one| one.node == node).collect();
            here.sort_by_key(|entry| entry.sequence);
            let gaps: Vec<f64> = here
                .windows(2)
                .map(|two| subject.differs_after(two[1].taken - two[0].taken))
                .collect();
            total += subject.size + gaps.iter().sum::<f64>();
            for (index, entry) in here.iter().enumerate() {
                let before = index.checked_sub(1).and_then(|before| gaps.get(before));
                let freed = before.into_iter().chain(gaps.get(index)).copied();
                let freed = freed.reduce(f64::min).unwrap_or(subject.size);
                kept.push(kept_of(kept.len(), *key, entry, freed, now));
                where_from.push((*key, entry.sequence));
            }
        }
        for removal in retain(&kept, &RULES, whole(total) as u64) {
            let Ok(index) = usize::try_from(removal.id.0) else { continue };
            let (key, sequence) = where_from[index];
            let entries = &mut self.entries[key.0][key.1];
            entries.retain(|entry| entry.node != node || entry.sequence != sequence);
            if entries.iter().all(|entry| entry.node != node) {
                self.by_node[node].remove(&key);
            }
            total -= kept[index].bytes_freed as f64;
            if is_told {
                self.traffic.directory(1);
            }
        }
        self.stored[node] = total;
        total
    }
}

fn kept_of(id: usize, key: Key, entry: &Entry, freed: f64, now: f64) -> Kept {
    let since = |then: f64| Duration::from_secs_f64((now - then).max(0.0));
    Kept {
        id: SnapshotId(id as u64),
        subject: format!("{}/{}", key.0, key.1),
        sequence: entry.sequence,
        age: since(entry.taken),
        bytes_freed: whole(freed) as u64,
        is_pinned: false,
        // What is still on its way is in use.
        is_leased: entry.available > now,
        subject_exists: true,
        removed_for: None,
        last_used: entry.used.map(since),
    }
}
