//! Copies of snapshots at neighbours.
//!
//! After a capture the nearest neighbours ([`place`]) are asked to keep what was taken: they fetch
//! it from here, object by object, so what they have already does not travel again. Who they are is
//! decided again each time; the copies of one that is no longer chosen grow old and are retired
//! there.
//!
//! What a peer asks to be kept is bounded: by its announced size, by the room on this disk, and to
//! [`KEEPS_MAX`] at once. It is refused in words, and asked again when the next capture is due.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::peer::{ForgetRequest, KeepRequest, KeptSnapshot};
use godwit_protos::{Digest, Subject, is_name};
use tokio::sync::{Semaphore, mpsc};

use crate::config::mib;
use crate::content::object::Kind;
use crate::directory::SEQUENCE_MAX;
use crate::host::unix_ms;
use crate::migrate::destination::kind_told;
use crate::migrate::{MigrationError, blocking};
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::fetch::{Depth, Peers, fetch};
use crate::policy::place::{Neighbour, place};
use crate::retention::{admitted, free_bytes, has_room, record};
use crate::store::{Snapshot, Store};

/// How long a peer has to answer a hello.
const HELLO_MAX: Duration = Duration::from_secs(2);

/// Round trips below this are as good as each other: they differ by noise, in milliseconds.
const NEAR_MS: f64 = 5.0;

/// How long a neighbour has to fetch a copy.
const KEEP_MAX: Duration = Duration::from_secs(900);

/// Copies that this node fetches for others at once.
const KEEPS_MAX: usize = 2;

/// Snapshots in one request, at most.
const SNAPSHOTS_MAX: usize = 64;

/// What a copy may cost beyond its announced size, lists and protocol included.
const SIZE_SLACK: u64 = 16 << 20;

/// How fast a short round trip is forgotten: what makes one longer is noise, unless it stays so.
const FORGET: f64 = 1.1;

/// How long this node tells peers of a removal at least.
const TELL_MIN: Duration = Duration::from_secs(60);

/// How often it is looked for removals that a peer has not heard of.
const TELL_PAUSE: Duration = Duration::from_secs(2);

/// How often it is looked how much of a copy has come.
const GUARD: Duration = Duration::from_millis(200);

/// Where copies of this node's snapshots are.
#[derive(Debug, Default)]
struct Placement {
    /// By subject, who has an earlier one.
    copies: HashMap<Subject, HashSet<String>>,
    /// The shortest round trip to each peer of late, in milliseconds.
    round_trips: HashMap<String, f64>,
}

/// Has the nearest neighbours keep copies of what is `taken`, one capture after the other. Runs
/// until the daemon ends.
pub async fn copy(node: Arc<Node>, mut taken: mpsc::Receiver<Vec<Snapshot>>) {
    let mut placement = Placement::default();
    while let Some(snapshots) = taken.recv().await {
        placement.copy(&node, &snapshots).await;
    }
}

impl Placement {
    async fn copy(&mut self, node: &Arc<Node>, snapshots: &[Snapshot]) {
        let cache = &node.config.cache;
        let bytes = snapshots.iter().map(|one| one.size_bytes).sum();
        if cache.copies == 0 || snapshots.is_empty() {
            return;
        }
        let removed = node.observed.recently_removed(tell_for(node));
        self.copies.retain(|subject, _| !removed.contains(&subject.to_string()));
        let copies = snapshots.iter().filter_map(|one| self.copies.get(&one.subject));
        let earlier: HashSet<String> = copies.flatten().cloned().collect();
        let mut near = neighbours(node, &earlier).await;
        for (one, connection) in &mut near {
            let before = self.round_trips.get(&one.name).map_or(f64::MAX, |before| before * FORGET);
            if connection.is_some() {
                one.round_trip_ms = one.round_trip_ms.min(before).max(NEAR_MS);
                self.round_trips.insert(one.name.clone(), one.round_trip_ms);
            }
        }
        let connections: BTreeMap<_, _> =
            near.iter().filter_map(|(one, line)| Some((one.name.clone(), line.clone()?))).collect();
        let near: Vec<Neighbour> = near.into_iter().map(|(one, _)| one).collect();
        for name in place(cache.copies, bytes, &cache.place_on, &near, &[]) {
            let Some(connection) = connections.get(&name) else { continue };
            match ask_to_keep(node, connection, snapshots).await {
                Ok(()) => {
                    for snapshot in snapshots {
                        let copies = self.copies.entry(snapshot.subject.clone()).or_default();
                        copies.insert(name.clone());
                    }
                }
                Err(reason) => tracing::info!(node = name, reason, "no copy was kept"),
            }
        }
    }
}

/// Tells every peer once which containers and volumes were removed here. Runs until the daemon
/// ends.
pub async fn tell_removals(node: Arc<Node>) {
    // Removed subjects, each with the peers that know it.
    let mut told: HashMap<String, HashSet<String>> = HashMap::new();
    loop {
        tokio::time::sleep(TELL_PAUSE).await;
        let removed = node.observed.recently_removed(tell_for(&node));
        told.retain(|subject, _| removed.contains(subject));
        for peer in &node.config.peers {
            let knows = |subject: &String| {
                told.get(subject).is_some_and(|peers| peers.contains(&peer.name))
            };
            let subjects = removed.iter().filter(|one| !knows(one));
            let subjects: Vec<String> = subjects.take(SNAPSHOTS_MAX).cloned().collect();
            if !subjects.is_empty() && tell(&node, &peer.name, &subjects).await {
                for subject in subjects {
                    told.entry(subject).or_default().insert(peer.name.clone());
                }
            }
        }
    }
}

/// How long this node tells peers of a removal: until it has expired here.
fn tell_for(node: &Node) -> Duration {
    node.config.cache.rules().expire_removed.max(TELL_MIN)
}

/// Whether a peer has heard that these were removed.
async fn tell(node: &Node, peer: &str, subjects: &[String]) -> bool {
    let Ok(connection) = Connection::open(&node.config, peer, HELLO_MAX).await else {
        return false;
    };
    let asked = ForgetRequest { subjects: subjects.to_vec() };
    let mut client = connection.client();
    matches!(tokio::time::timeout(HELLO_MAX, client.forget(asked)).await, Ok(Ok(_)))
}

/// Every peer, with a connection to those that answer.
async fn neighbours(
    node: &Arc<Node>,
    earlier: &HashSet<String>,
) -> Vec<(Neighbour, Option<Connection>)> {
    let ask = node.config.peers.iter().map(|peer| async {
        let connection = Connection::open(&node.config, &peer.name, HELLO_MAX).await.ok();
        let channel = node.links.of(&peer.name);
        let hello = connection.as_ref().map(|connection| &connection.hello);
        let neighbour = Neighbour {
            name: peer.name.clone(),
            labels: hello
                .map(|hello| hello.labels.clone().into_iter().collect())
                .unwrap_or_default(),
            round_trip_ms: connection
                .as_ref()
                .map_or(f64::MAX, |one| one.round_trip.as_secs_f64() * 1e3),
            throughput: channel.throughput_bytes_per_second.unwrap_or(0.0),
            free_bytes: hello.map_or(0, |hello| hello.free_bytes),
            is_reachable: connection.is_some(),
            has_earlier: earlier.contains(&peer.name),
        };
        (neighbour, connection)
    });
    futures::future::join_all(ask).await
}

async fn ask_to_keep(
    node: &Node,
    connection: &Connection,
    snapshots: &[Snapshot],
) -> Result<(), String> {
    let kept = |one: &Snapshot| KeptSnapshot {
        subject: one.subject.to_string(),
        sequence: one.sequence,
        manifest: one.root.as_bytes().to_vec().into(),
        size_bytes: one.size_bytes,
        age_ms: u64::try_from(one.age(unix_ms()).as_millis()).unwrap_or(u64::MAX),
        node: one.node.clone(),
        kind: one.root_kind.into(),
    };
    let snapshots = snapshots.iter().map(kept).collect();
    let asked = KeepRequest { node: node.config.node.clone(), snapshots };
    let mut client = connection.client();
    match tokio::time::timeout(KEEP_MAX, client.keep(asked)).await {
        Err(_) => Err(format!("no answer within {} s", KEEP_MAX.as_secs())),
        Ok(Err(status)) => Err(status.message().to_owned()),
        Ok(Ok(answer)) => match answer.into_inner().refused {
            refused if refused.is_empty() => Ok(()),
            refused => Err(refused),
        },
    }
}

/// Keeps copies for peers, a few at once.
#[derive(Debug)]
pub struct Keeper {
    node: Arc<Node>,
    slots: Semaphore,
}

impl Keeper {
    /// One that keeps nothing yet.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node, slots: Semaphore::new(KEEPS_MAX) }
    }

    /// Fetches snapshots from a peer and keeps them. Returns why not, in words for that peer.
    pub async fn keep(&self, asked: KeepRequest) -> Result<(), String> {
        let node = &self.node;
        let cache = &node.config.cache;
        if !cache.accept {
            return Err("this node keeps no copies for others".to_owned());
        }
        let _turn = self.slots.try_acquire().map_err(|_cause| "busy with other copies")?;
        let snapshots = parse(&asked)?;
        let snapshots = admitted(node, snapshots);
        if snapshots.is_empty() {
            return Err("this node keeps no memory".to_owned());
        }
        let size = snapshots.iter().map(|one| one.size_bytes).fold(0, u64::saturating_add);
        let free = free_bytes(node).unwrap_or(0);
        if size > mib(cache.budget_mib) || !has_room(node) || size > free {
            return Err("there is no room".to_owned());
        }
        let fetched = fetch_copies(node, &asked.node, snapshots, size).await;
        fetched.map_err(|error| error.chain())
    }
}

fn parse(asked: &KeepRequest) -> Result<Vec<Snapshot>, String> {
    if asked.snapshots.is_empty() || asked.snapshots.len() > SNAPSHOTS_MAX {
        return Err(format!("1 to {SNAPSHOTS_MAX} snapshots at once"));
    }
    let parse = |one: &KeptSnapshot| -> Result<Snapshot, String> {
        let subject: Subject = one
            .subject
            .parse()
            .map_err(|error: godwit_protos::ParseNameError| error.to_string())?;
        if matches!(subject, Subject::ImageLayer(_)) {
            return Err(format!("{subject}: only this node says what it holds of an image"));
        }
        if one.sequence > SEQUENCE_MAX {
            return Err(format!("{subject}: a place in a lineage that is never reached"));
        }
        if !is_name(&one.node) {
            return Err(format!("{subject}: {:?} is not a node's name", one.node));
        }
        let kind = kind_told(&subject, one.kind);
        let kind =
            kind.ok_or_else(|| format!("{subject}: it has no object of kind {}", one.kind))?;
        Ok(Snapshot {
            root_kind: kind as u8,
            subject,
            sequence: one.sequence,
            taken_at_unix_ms: unix_ms().saturating_sub_unsigned(one.age_ms),
            root: Digest::try_from(&one.manifest[..]).map_err(|error| error.to_string())?,
            size_bytes: one.size_bytes,
            node: one.node.clone(),
            is_pinned: false,
        })
    };
    asked.snapshots.iter().map(parse).collect()
}

async fn fetch_copies(
    node: &Arc<Node>,
    from: &str,
    snapshots: Vec<Snapshot>,
    size: u64,
) -> Result<(), MigrationError> {
    let source = Arc::new(Connection::open(&node.config, from, HELLO_MAX).await?);
    let peers =
        Peers { neighbours: Vec::new(), source: Some(source.clone()), health: Arc::default() };
    let lease = Arc::new(node.store.lease("copy", KEEP_MAX));
    let root = |one: &Snapshot| Some((Kind::try_from(one.root_kind).ok()?, one.root));
    let roots: Vec<_> = snapshots.iter().filter_map(root).collect();
    tokio::select! {
        fetched = fetch(&node.store, &lease, &peers, &roots, Depth::Content) => { fetched?; }
        why = too_much(node, &source, size) => return Err(MigrationError::Protocol(why)),
    }
    let here = node.clone();
    blocking(move || {
        let known = |one: &Snapshot| is_known(&here.store, one);
        let mut fresh = Vec::new();
        for snapshot in snapshots {
            if !known(&snapshot)? {
                fresh.push(snapshot);
            }
        }
        record(&here, &fresh)?;
        drop(lease);
        Ok(())
    })
    .await
}

/// Ends when a copy turns out larger than it was announced, or the disk gets short.
async fn too_much(node: &Node, source: &Connection, size: u64) -> &'static str {
    let most = size.saturating_add(size / 4).saturating_add(SIZE_SLACK);
    loop {
        tokio::time::sleep(GUARD).await;
        if source.traffic.received() > most {
            return "a copy is larger than it was announced";
        }
        if !has_room(node) {
            return "the disk is short";
        }
    }
}

fn is_known(store: &Store, snapshot: &Snapshot) -> Result<bool, MigrationError> {
    let same =
        |(_, one): &(_, Snapshot)| one.root == snapshot.root && one.sequence == snapshot.sequence;
    Ok(store.snapshots(&snapshot.subject)?.iter().any(same))
}

/// A peer says that containers or volumes were removed: what is kept of them expires.
pub fn forget(node: &Node, asked: &ForgetRequest) -> Result<(), String> {
    if asked.subjects.len() > SNAPSHOTS_MAX {
        return Err(format!("more than {SNAPSHOTS_MAX} subjects at once"));
    }
    for subject in asked.subjects.iter().filter_map(|text| text.parse().ok()) {
        node.store.note_removed(&subject, unix_ms()).map_err(|error| error.to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(one: KeptSnapshot) -> KeepRequest {
        KeepRequest { node: "edge-a".to_owned(), snapshots: vec![one] }
    }

    fn kept() -> KeptSnapshot {
        KeptSnapshot {
            subject: "volume|data".to_owned(),
            sequence: 3,
            manifest: vec![7; 32].into(),
            size_bytes: 10,
            age_ms: 5000,
            node: "edge-a".to_owned(),
            kind: 0,
        }
    }

    #[test]
    fn what_a_peer_wants_kept_gets_a_time_of_this_nodes_clock() {
        let parsed = parse(&wanted(kept())).unwrap().remove(0);
        assert_eq!((parsed.sequence, parsed.size_bytes, parsed.is_pinned), (3, 10, false));
        let age = parsed.age(unix_ms());
        assert!(age >= Duration::from_secs(5) && age < Duration::from_secs(60), "{age:?}");
        let ancient =
            parse(&wanted(KeptSnapshot { age_ms: u64::MAX, ..kept() })).unwrap().remove(0);
        assert!(ancient.age(unix_ms()) > Duration::from_secs(1 << 32), "no clock overflows");
    }

    #[test]
    fn what_a_peer_wants_kept_is_refused_before_anything_is_fetched() {
        let layer = format!("image-layer|{}", Digest::of(b"x"));
        for (wrong, word) in [
            (KeptSnapshot { subject: "volume|../x".to_owned(), ..kept() }, "volume id"),
            (KeptSnapshot { sequence: SEQUENCE_MAX + 1, ..kept() }, "lineage"),
            (KeptSnapshot { manifest: vec![7; 31].into(), ..kept() }, "digest"),
            (KeptSnapshot { node: "a\nb".to_owned(), ..kept() }, "node's name"),
            (KeptSnapshot { subject: layer, ..kept() }, "image"),
            (KeptSnapshot { kind: Kind::Memory as u32, ..kept() }, "kind 5"),
        ] {
            let refused = parse(&wanted(wrong)).unwrap_err();
            assert!(refused.contains(word), "{refused} does not say {word}");
        }
        let none = KeepRequest { node: "edge-a".to_owned(), snapshots: Vec::new() };
        let many = KeepRequest { snapshots: vec![kept(); SNAPSHOTS_MAX + 1], ..none.clone() };
        for wrong in [none, many] {
            assert!(parse(&wrong).unwrap_err().contains("64"));
        }
    }
}
