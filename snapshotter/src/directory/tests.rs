//! Lookups over scripted peers and a scripted etcd: who is asked, how long, and what is believed.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use godwit_protos::etcd::kv_server::{Kv, KvServer};
use godwit_protos::etcd::lease_server::{Lease, LeaseServer};
use godwit_protos::etcd::request_op::Request as Op;
use godwit_protos::etcd::{
    KeyValue, LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse,
    LeaseRevokeRequest, LeaseRevokeResponse, RangeRequest, RangeResponse, TxnRequest, TxnResponse,
};
use godwit_protos::peer::{LocateResponse, Snapshot as PeerSnapshot};
use tokio::time::Instant;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming};

use super::*;
use crate::peer::tests::locating;

/// More than a machine at work needs for what is not waited for.
const SOON: Duration = Duration::from_millis(150);

fn subject(text: &str) -> Subject {
    text.parse().unwrap()
}

fn digest(byte: u8) -> Digest {
    Digest::from_bytes([byte; 32])
}

fn entry(node: &str, of: &str, sequence: u64, age_s: u64) -> Entry {
    Entry {
        node: node.to_owned(),
        subject: Some(subject(of)),
        sequence,
        age: Duration::from_secs(age_s),
        manifest: digest(u8::try_from(sequence % 251).unwrap()),
        size_bytes: 1,
    }
}

fn query(subjects: &[&str], services: &[&str]) -> Query {
    Query {
        subjects: subjects.iter().map(|text| subject(text)).collect(),
        services: services.iter().map(|text| text.parse().unwrap()).collect(),
        manifests: Vec::new(),
    }
}

fn nodes(entries: &[Entry]) -> Vec<&str> {
    entries.iter().map(|entry| entry.node.as_str()).collect()
}

const OWN: &str = "memory|default|redis:7|cache";
const OTHER: &str = "memory|default|redis:7|other";

#[test]
fn lineage_decides_and_age_only_between_equals() {
    let found = Found::new(query(&[OWN], &["default|redis:7"]));
    found.add([
        entry("sibling", OTHER, 99, 1),
        entry("old", OWN, 3, 0),
        entry("new-and-aged", OWN, 7, 9000),
        entry("new", OWN, 7, 20),
        entry("younger-sibling", "memory|default|redis:7|third", 1, 0),
    ]);
    let expected = ["new", "new-and-aged", "old", "younger-sibling", "sibling"];
    assert_eq!(nodes(&found.entries()), expected);
}

#[test]
fn what_was_not_asked_for_is_not_found_and_nothing_is_found_twice_or_without_end() {
    let found = Found::new(query(&[OWN], &["default|redis:7"]));
    found.add([
        entry("a", OWN, 1, 1),
        entry("a", OWN, 1, 1),
        entry("a", "volume|data", 1, 1),
        entry("a", "memory|default|redis:8|cache", 1, 1),
        entry("a", "memory|k8s.io|redis:7|cache", 1, 1),
        entry("a", OWN, SEQUENCE_MAX + 1, 1),
        Entry { subject: None, ..entry("a", OWN, 0, 1) },
    ]);
    assert_eq!(found.entries(), [entry("a", OWN, 1, 1)]);
    found.add((0..5000).map(|number| entry(&format!("n{number}"), OWN, 1, 1)));
    found.add((0..5000).map(|number| entry(&format!("m{number}"), OWN, 1, 1)));
    assert_eq!(found.entries().len(), ENTRIES_MAX);
}

#[test]
fn of_other_users_the_newest_is_told_and_not_of_too_many() {
    let held: Vec<Entry> = (0..20)
        .flat_map(|user| {
            let of = format!("memory|default|redis:7|user{user}");
            [entry("a", &of, 1, 100 + user), entry("a", &of, 2, 50 + user)]
        })
        .chain([entry("a", OWN, 1, 1000), entry("a", OWN, 2, 900)])
        .collect();
    let told = query(&[OWN], &["default|redis:7"]).select(held.clone());
    assert_eq!(told[..2], [entry("a", OWN, 2, 900), entry("a", OWN, 1, 1000)]);
    let others: Vec<_> = told[2..].iter().map(|one| (one.sequence, one.age.as_secs())).collect();
    assert_eq!(others, (50..58).map(|age| (2, age)).collect::<Vec<_>>());
    assert_eq!(query(&[OWN], &[]).select(held).len(), 2);
}

#[test]
fn a_snapshot_from_the_future_is_young_and_every_manifest_is_named_once() {
    let snapshot = |taken_at_unix_ms| Snapshot {
        subject: subject(OWN),
        sequence: 1,
        taken_at_unix_ms,
        root: digest(1),
        root_kind: 0,
        size_bytes: 1,
        node: "a".to_owned(),
        is_pinned: false,
    };
    let held = held("a", vec![snapshot(i64::MAX), snapshot(-1)], [digest(1), digest(2)].into());
    let manifests: Vec<_> = held.iter().filter(|entry| entry.subject.is_none()).collect();
    assert_eq!(manifests.len(), 2, "{manifests:?}");
    let ages: Vec<_> = held.iter().filter(|one| one.subject.is_some()).map(|one| one.age).collect();
    assert_eq!(ages[0], Duration::ZERO);
    assert!(ages[1] > Duration::from_secs(1 << 30));
}

/// What a scripted peer says that it holds.
fn says(of: &str, sequence: u64) -> Option<LocateResponse> {
    let manifest = digest(1).as_bytes().to_vec().into();
    let subject = of.to_owned();
    let snapshot = PeerSnapshot { subject, sequence, manifest, size_bytes: 1, age_ms: 1000 };
    Some(LocateResponse { snapshots: vec![snapshot], ..LocateResponse::default() })
}

fn neighbours() -> Arc<dyn Directory> {
    Arc::new(neighbours::Neighbours)
}

#[tokio::test]
async fn a_silent_neighbour_costs_the_callers_patience_and_the_others_are_found() {
    let all = vec![locating("near", says(OWN, 3)).await, locating("silent", None).await];
    let (_joining, joined) = watch::channel(all);
    let begun = Instant::now();
    let lookup = Lookup::begin(&neighbours(), query(&[OWN], &[]), joined.clone());
    let found = lookup.found(SOON).await;
    assert_eq!(nodes(&found), ["near"]);
    assert!(begun.elapsed() >= SOON, "the silent one was not waited for");
    let found = Found::new(query(&[OWN], &[]));
    let begun = Instant::now();
    neighbours().lookup(&query(&[OWN], &[]), joined, &found).await;
    assert!(begun.elapsed() < LOOKUP_MAX + SOON, "{:?}", begun.elapsed());
    assert_eq!(nodes(&found.entries()), ["near"]);
}

#[tokio::test]
async fn who_joins_during_a_lookup_is_asked_and_who_may_join_is_not_waited_for() {
    let (joining, joined) = watch::channel(vec![locating("near", says(OWN, 3)).await]);
    let late = locating("late", says(OWN, 4)).await;
    let lookup = Lookup::begin(&neighbours(), query(&[OWN], &[]), joined);
    let begun = Instant::now();
    assert_eq!(nodes(&lookup.found(LOOKUP_MAX).await), ["near"]);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    joining.send_modify(|all| all.push(late));
    drop(joining);
    tokio::time::sleep(SOON).await;
    assert_eq!(nodes(&lookup.found(LOOKUP_MAX).await), ["late", "near"]);
}

#[tokio::test]
async fn a_neighbours_nonsense_is_not_found() {
    let manifest = digest(1).as_bytes().to_vec();
    let snapshot = |of: &str, sequence, manifest: Vec<u8>| PeerSnapshot {
        subject: of.to_owned(),
        sequence,
        manifest: manifest.into(),
        ..PeerSnapshot::default()
    };
    let nonsense = LocateResponse {
        snapshots: vec![
            snapshot("not a subject", 1, manifest.clone()),
            snapshot(OWN, u64::MAX, manifest.clone()),
            snapshot(OWN, 1, vec![1; 31]),
            snapshot(OTHER, 1, manifest.clone()),
            snapshot("volume|not-asked", 1, manifest.clone()),
        ],
        manifests: vec![manifest.into(), vec![1].into()],
        ..LocateResponse::default()
    };
    let (_, joined) = watch::channel(vec![locating("near", Some(nonsense)).await]);
    let lookup = Lookup::begin(&neighbours(), query(&[OWN], &[]), joined);
    assert_eq!(lookup.found(LOOKUP_MAX).await, []);
}

#[tokio::test]
async fn a_question_for_nothing_is_asked_of_nobody() {
    let (_joining, joined) = watch::channel(vec![locating("silent", None).await]);
    let begun = Instant::now();
    let lookup = Lookup::begin(&neighbours(), Query::default(), joined);
    assert_eq!(lookup.found(LOOKUP_MAX).await, []);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

/// An etcd that has what it was given, and fails on command.
#[derive(Debug, Default)]
struct FakeEtcd {
    keys: BTreeMap<Vec<u8>, (Vec<u8>, i64)>,
    leases: Vec<i64>,
    granted: i64,
    writes: usize,
    reads_hang: bool,
    writes_fail: bool,
}

#[derive(Clone, Debug, Default)]
struct Fake(Arc<Mutex<FakeEtcd>>);

impl Fake {
    fn lock(&self) -> MutexGuard<'_, FakeEtcd> {
        self.0.lock().unwrap()
    }

    async fn serve(&self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(KvServer::new(self.clone()))
            .add_service(LeaseServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
        address
    }

    fn put(&self, key: &str, value: &[u8]) {
        self.lock().keys.insert(key.as_bytes().to_vec(), (value.to_vec(), 0));
    }

    fn keys(&self) -> Vec<String> {
        let keys = self.lock().keys.keys().cloned().collect::<Vec<_>>();
        keys.into_iter().map(|key| String::from_utf8(key).unwrap()).collect()
    }

    /// As after an outage that lasted longer than the lease.
    fn forget_everything(&self) {
        let mut all = self.lock();
        all.keys.clear();
        all.leases.clear();
    }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl Kv for Fake {
    async fn range(&self, request: Request<RangeRequest>) -> Answer<RangeResponse> {
        if self.lock().reads_hang {
            std::future::pending::<()>().await;
        }
        let asked = request.into_inner();
        let all = self.lock();
        let range = all.keys.range(asked.key.to_vec()..asked.range_end.to_vec());
        let kvs = range.take(usize::try_from(asked.limit).unwrap()).map(|(key, (value, _))| {
            KeyValue { key: key.clone().into(), value: value.clone().into() }
        });
        Ok(Response::new(RangeResponse { kvs: kvs.collect() }))
    }

    async fn txn(&self, request: Request<TxnRequest>) -> Answer<TxnResponse> {
        let mut all = self.lock();
        if all.writes_fail {
            return Err(Status::unavailable("etcdserver: no leader"));
        }
        for op in request.into_inner().success {
            all.writes += 1;
            match op.request.unwrap() {
                Op::RequestPut(put) => {
                    all.keys.insert(put.key.to_vec(), (put.value.to_vec(), put.lease));
                }
                Op::RequestDeleteRange(delete) => drop(all.keys.remove(&delete.key[..])),
            }
        }
        Ok(Response::new(TxnResponse {}))
    }
}

#[tonic::async_trait]
impl Lease for Fake {
    async fn lease_grant(&self, _: Request<LeaseGrantRequest>) -> Answer<LeaseGrantResponse> {
        let mut all = self.lock();
        all.granted += 1;
        let id = all.granted;
        all.leases.push(id);
        Ok(Response::new(LeaseGrantResponse { id }))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Answer<LeaseRevokeResponse> {
        let (id, mut all) = (request.into_inner().id, self.lock());
        all.leases.retain(|lease| *lease != id);
        all.keys.retain(|_, (_, lease)| *lease != id);
        Ok(Response::new(LeaseRevokeResponse {}))
    }

    type LeaseKeepAliveStream =
        futures::stream::Iter<std::vec::IntoIter<Result<LeaseKeepAliveResponse, Status>>>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Answer<Self::LeaseKeepAliveStream> {
        let asked = request.into_inner().message().await?.unwrap();
        let ttl = if self.lock().leases.contains(&asked.id) { 10 } else { 0 };
        let answer = vec![Ok(LeaseKeepAliveResponse { ttl })];
        Ok(Response::new(futures::stream::iter(answer)))
    }
}

/// The directory of node `a`, whose peers are `b` and `c`.
fn etcd_at(endpoints: &[SocketAddr], more: &str) -> Arc<dyn Directory> {
    let endpoints: Vec<String> = endpoints.iter().map(|at| format!("'http://{at}'")).collect();
    let endpoints = endpoints.join(", ");
    let text = format!(
        "node = 'a'\n{more}\n[directory]\nbackend = 'etcd'\nendpoints = [{endpoints}]\n\
         [[peers]]\nname = 'b'\naddress = 'x:1'\n[[peers]]\nname = 'c'\naddress = 'x:2'"
    );
    open(&toml::from_str(&text).unwrap())
}

const SUBJECT_KEYS: &str = "/godwit/v1/default/subject";

fn value(siblings: bool) -> Vec<u8> {
    let manifest = digest(7);
    let text = format!(
        r#"{{"snapshots":[{{"sequence":7,"manifest":"{manifest}","size_bytes":1,"age_ms":1}}],"siblings":{siblings}}}"#
    );
    text.into_bytes()
}

async fn look_up(directory: &Arc<dyn Directory>, query: &Query, joined: Joined) -> Vec<Entry> {
    let found = Found::new(query.clone());
    directory.lookup(query, joined, &found).await;
    found.entries()
}

fn no_peer() -> Joined {
    watch::channel(Vec::new()).1
}

#[tokio::test]
async fn only_differences_are_written_and_a_lost_lease_means_everything_again() {
    let fake = Fake::default();
    let directory = etcd_at(&[fake.serve().await], "");
    let held = vec![entry("a", OWN, 1, 5), Entry { subject: None, ..entry("a", OWN, 1, 5) }];
    directory.publish(held.clone()).await;
    let (keys, written) = (fake.keys(), fake.lock().writes);
    assert_eq!((keys.len(), written), (2, 2), "{keys:?}");
    assert!(directory.status().ends_with(": connected"), "{}", directory.status());
    directory.publish(held.clone()).await;
    assert_eq!(fake.lock().writes, 2, "nothing has changed");
    directory.publish(held[..1].to_vec()).await;
    assert_eq!((fake.keys(), fake.lock().writes), (vec![format!("{SUBJECT_KEYS}/{OWN}/a")], 3));
    fake.forget_everything();
    directory.publish(held).await;
    assert_eq!((fake.keys(), fake.lock().granted), (keys, 2));
    directory.withdraw().await;
    assert_eq!(fake.keys(), Vec::<String>::new());
}

#[tokio::test]
async fn what_was_half_written_is_written_again() {
    let fake = Fake::default();
    let directory = etcd_at(&[fake.serve().await], "");
    fake.lock().writes_fail = true;
    directory.publish(vec![entry("a", OWN, 1, 5)]).await;
    let status = directory.status();
    assert!(status.contains("not reachable for 0 s (etcdserver: no leader)"), "{status}");
    fake.lock().writes_fail = false;
    directory.publish(vec![entry("a", OWN, 1, 5)]).await;
    assert_eq!(fake.keys().len(), 1);
    assert!(directory.status().ends_with(": connected"), "{}", directory.status());
}

#[tokio::test]
async fn of_two_endpoints_the_second_is_asked_where_the_first_is_dead() {
    let fake = Fake::default();
    // No process listens on port 1.
    let directory = etcd_at(&["127.0.0.1:1".parse().unwrap(), fake.serve().await], "");
    directory.publish(vec![entry("a", OWN, 1, 5)]).await;
    assert_eq!(fake.keys().len(), 1);
}

#[tokio::test]
async fn what_strangers_wrote_is_not_believed() {
    let fake = Fake::default();
    let directory = etcd_at(&[fake.serve().await], "");
    directory.publish(Vec::new()).await;
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/b"), &value(false));
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/stranger"), &value(false));
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/a"), &value(false));
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/c"), b"no json");
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/deeper/b"), &value(false));
    let found = look_up(&directory, &query(&[OWN], &[]), no_peer()).await;
    assert_eq!(nodes(&found), ["b"]);
}

#[tokio::test]
async fn another_users_memory_is_found_only_if_its_node_gives_it_and_in_its_namespace() {
    let fake = Fake::default();
    let directory = etcd_at(&[fake.serve().await], "");
    directory.publish(Vec::new()).await;
    fake.put(&format!("{SUBJECT_KEYS}/{OTHER}/b"), &value(false));
    fake.put(&format!("{SUBJECT_KEYS}/{OTHER}/c"), &value(true));
    fake.put(&format!("{SUBJECT_KEYS}/memory|k8s.io|redis:7|other/c"), &value(true));
    fake.put(&format!("{SUBJECT_KEYS}/memory|default|redis:70|other/c"), &value(true));
    let found = look_up(&directory, &query(&[OWN], &["default|redis:7"]), no_peer()).await;
    let found: Vec<_> = found.iter().map(|one| (one.node.as_str(), one.subject.clone())).collect();
    assert_eq!(found, [("c", Some(subject(OTHER)))]);
    assert_eq!(look_up(&directory, &query(&[OWN], &[]), no_peer()).await, []);
}

/// Method: etcd is reached, then hangs, then answers again.
#[tokio::test]
async fn while_etcd_does_not_answer_the_neighbours_do_and_in_time() {
    let fake = Fake::default();
    let directory = etcd_at(&[fake.serve().await], "");
    directory.publish(Vec::new()).await;
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/b"), &value(false));
    let (_joining, joined) = watch::channel(vec![locating("c", says(OWN, 3)).await]);
    let asked = query(&[OWN], &[]);
    fake.lock().reads_hang = true;
    let begun = Instant::now();
    let lookup = Lookup::begin(&directory, asked.clone(), joined.clone());
    assert_eq!(nodes(&lookup.found(LOOKUP_MAX).await), ["c"]);
    assert!(begun.elapsed() < LOOKUP_MAX, "{:?}", begun.elapsed());
    assert!(directory.status().contains("neighbours are asked instead"), "{}", directory.status());
    // Now it is known: the neighbours are asked at once.
    let begun = Instant::now();
    let lookup = Lookup::begin(&directory, asked.clone(), joined.clone());
    assert_eq!(nodes(&lookup.found(LOOKUP_MAX).await), ["c"]);
    assert!(begun.elapsed() < SOON / 2, "{:?}", begun.elapsed());
    fake.lock().reads_hang = false;
    directory.publish(Vec::new()).await;
    assert_eq!(nodes(&look_up(&directory, &asked, joined).await), ["b"]);
}

#[tokio::test]
async fn an_answer_beyond_the_limit_is_no_answer() {
    let fake = Fake::default();
    let directory = etcd_at(&[fake.serve().await], "");
    directory.publish(Vec::new()).await;
    fake.put(&format!("{SUBJECT_KEYS}/{OWN}/b"), &vec![b' '; 2 << 20]);
    let (_joining, joined) = watch::channel(vec![locating("c", says(OWN, 3)).await]);
    assert_eq!(nodes(&look_up(&directory, &query(&[OWN], &[]), joined).await), ["c"]);
}
