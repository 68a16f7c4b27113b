//! The directory in etcd: each node publishes what it holds under a lease, and lookups ask etcd
//! alone.
//!
//! ```text
//!  /godwit/v1/SITE/subject/SUBJECT/NODE     JSON: the node's snapshots of the subject, newest first
//!  /godwit/v1/SITE/manifest/sha256:HEX/NODE  empty: the node has the manifest and all that it refers to
//! ```
//!
//! One lease per daemon, renewed every [`RENEWAL`]: entries of a node that dies vanish
//! [`LEASE_TTL`] after its last renewal. Each renewal, and each change of the store, writes the
//! difference to what was published. When a renewal fails, nothing is taken to be published any
//! more: the next one that succeeds begins with a new lease and everything.
//!
//! A lookup is one round of reads, answered by whichever member is asked from what it has. If etcd
//! is away or takes longer than [`ETCD_MAX`], the neighbours are asked in what is left of
//! [`LOOKUP_MAX`], and until a renewal succeeds they are asked at once. Keys and values are
//! whatever any host wrote: counts and sizes are limited, what cannot be read is skipped, and nodes
//! that are not this node's peers are ignored.
//!
//! An age is written as a duration and grows while it lies there. It is written again when it has
//! doubled, so that what is read is at least about half the true age, and no two nodes' clocks are
//! compared.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use godwit_protos::etcd::kv_client::KvClient;
use godwit_protos::etcd::lease_client::LeaseClient;
use godwit_protos::etcd::range_request::{SortOrder, SortTarget};
use godwit_protos::etcd::request_op::Request as Op;
use godwit_protos::etcd::{
    DeleteRangeRequest, KeyValue, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
    PutRequest, RangeRequest, RequestOp, TxnRequest,
};
use godwit_protos::{Digest, Subject, is_name};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::{Directory, Entry, Found, Joined, LOOKUP_MAX, Query, neighbours};
use crate::config::Config;

/// How long entries of a node outlive its last renewal.
pub const LEASE_TTL: Duration = Duration::from_secs(10);

/// How often the lease is renewed, and what is published compared with what is held.
const RENEWAL: Duration = Duration::from_secs(3);

/// How long etcd has for a lookup before the neighbours are asked.
const ETCD_MAX: Duration = Duration::from_millis(100);

/// How long etcd has for everything that a renewal writes, and for a withdrawal.
const PUBLISH_MAX: Duration = Duration::from_secs(5);
const WITHDRAW_MAX: Duration = Duration::from_secs(1);

/// Writes in one transaction; etcd's own limit is 128.
const WRITES_MAX: usize = 100;

/// Nodes of one subject or manifest that are looked at: those that wrote last.
const NODES_MAX: i64 = 128;

/// Largest answer that is taken, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// Largest value, in bytes, and snapshots in it.
const VALUE_BYTES_MAX: usize = 4096;
const SNAPSHOTS_MAX: usize = 16;

/// How much an age may grow beyond its double before it is written again.
const AGE_SLACK_MS: u64 = 60_000;

/// How long one endpoint has to answer.
const CONNECT_MAX: Duration = Duration::from_secs(1);

/// Bytes of a key that are shown in the log.
const KEY_SHOWN_MAX: usize = 256;

/// The value of a subject's key. Fields are only ever added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Value {
    snapshots: Vec<Listed>,
    /// Whether the node gives this memory to other users of its service.
    siblings: bool,
}

/// One snapshot in a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Listed {
    sequence: u64,
    manifest: String,
    size_bytes: u64,
    /// When it was written.
    age_ms: u64,
}

/// What stands under each key; nothing for a manifest.
type Values = BTreeMap<String, Option<Value>>;

/// See the module's comment.
#[derive(Debug)]
pub struct Etcd {
    endpoints: Vec<String>,
    /// `/godwit/v1/SITE/`
    prefix: String,
    node: String,
    peers: HashSet<String>,
    /// Whether memory of this node is given to other users of its service.
    siblings: bool,
    session: tokio::sync::Mutex<Option<Session>>,
    state: Mutex<State>,
    has_complained: AtomicBool,
}

/// What is known of etcd.
#[derive(Clone, Debug)]
enum State {
    Connected(KvClient<Channel>),
    Away { since: Instant, reason: String },
}

/// What lives as long as a lease.
#[derive(Debug)]
struct Session {
    kv: KvClient<Channel>,
    leases: LeaseClient<Channel>,
    lease: i64,
    published: Values,
}

impl Etcd {
    /// Connects with the first publication.
    pub fn new(config: &Config) -> Self {
        let reason = "not asked yet".to_owned();
        Self {
            endpoints: config.directory.endpoints.clone(),
            prefix: format!("/godwit/v1/{}/", config.directory.site),
            node: config.node.clone(),
            peers: config.peers.iter().map(|peer| peer.name.clone()).collect(),
            siblings: config.sibling_memory,
            session: tokio::sync::Mutex::default(),
            state: Mutex::new(State::Away { since: Instant::now(), reason }),
            has_complained: AtomicBool::new(false),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note_connected(&self, kv: KvClient<Channel>) {
        let before = std::mem::replace(&mut *self.state(), State::Connected(kv));
        if let State::Away { .. } = before {
            tracing::info!(endpoints = ?self.endpoints, "etcd is reached");
        }
    }

    fn note_away(&self, status: &Status) {
        let (mut state, reason) = (self.state(), status.message().to_owned());
        let since = match &*state {
            State::Away { since, .. } => *since,
            State::Connected(_) => {
                tracing::warn!(reason, "etcd is not reached; neighbours are asked instead");
                Instant::now()
            }
        };
        *state = State::Away { since, reason };
    }

    /// What etcd knows of the query.
    async fn ask(&self, kv: &KvClient<Channel>, query: &Query) -> Result<Vec<Entry>, Status> {
        let subjects = query.subjects.iter().map(|subject| format!("subject/{subject}/"));
        let services = query.services.iter().map(|service| format!("subject/memory|{service}|"));
        let manifests = query.manifests.iter().map(|digest| format!("manifest/{digest}/"));
        let reads = subjects.chain(services).chain(manifests).map(|rest| {
            let (mut kv, request) = (kv.clone(), below(&format!("{}{rest}", self.prefix)));
            async move { kv.range(request).await }
        });
        let answers = futures::future::try_join_all(reads).await?;
        let pairs = answers.into_iter().flat_map(|answer| answer.into_inner().kvs);
        let mut by_node: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
        for parsed in pairs.filter_map(|pair| self.understood(&pair, query)) {
            by_node.entry(parsed.node).or_default().extend(parsed.entries);
        }
        Ok(by_node.into_values().flat_map(|entries| query.select(entries)).collect())
    }

    /// What a key says, if it is written as nodes write, by a peer of this node, for any caller.
    fn understood(&self, pair: &KeyValue, query: &Query) -> Option<Parsed> {
        let Some(parsed) = parse(&self.prefix, pair) else {
            if !self.has_complained.swap(true, Ordering::Relaxed) {
                let key = String::from_utf8_lossy(&pair.key[..pair.key.len().min(KEY_SHOWN_MAX)]);
                tracing::warn!(%key, "skipped in etcd, like all that cannot be read there");
            }
            return None;
        };
        if !self.peers.contains(&parsed.node) {
            if parsed.node != self.node {
                tracing::debug!(node = parsed.node, "named by etcd, but no peer of this node");
            }
            return None;
        }
        let is_given = |entry: &Entry| match &entry.subject {
            Some(subject) => parsed.siblings || query.subjects.contains(subject),
            None => true,
        };
        parsed.entries.iter().all(is_given).then_some(parsed)
    }

    /// Makes `values` what is published: under the lease that there is, or else under a new one.
    async fn write(&self, session: &mut Option<Session>, values: &Values) -> Result<(), Status> {
        if let Some(current) = session {
            match current.renew(values).await {
                Ok(()) => return Ok(()),
                Err(status) => tracing::debug!(reason = status.message(), "lease not renewed"),
            }
        }
        *session = None;
        let mut new = self.connect().await?;
        new.renew(values).await?;
        *session = Some(new);
        Ok(())
    }

    /// Asks the endpoints in their order for a lease.
    async fn connect(&self) -> Result<Session, Status> {
        let mut last = Status::unavailable("no endpoints");
        for endpoint in &self.endpoints {
            match tokio::time::timeout(CONNECT_MAX, Session::open(endpoint)).await {
                Ok(Ok(session)) => return Ok(session),
                Ok(Err(status)) => last = status,
                Err(_) => last = Status::deadline_exceeded(format!("{endpoint} does not answer")),
            }
        }
        Err(last)
    }

    /// What is to stand under each key, so that others find `held`.
    fn values(&self, held: Vec<Entry>) -> Values {
        let mut values = Values::new();
        for entry in held {
            let Some(subject) = &entry.subject else {
                values.insert(self.key(&format!("manifest/{}", entry.manifest)), None);
                continue;
            };
            let siblings = self.siblings && matches!(subject, Subject::Memory { .. });
            let new = || Some(Value { snapshots: Vec::new(), siblings });
            let value = values.entry(self.key(&format!("subject/{subject}"))).or_insert_with(new);
            value.iter_mut().for_each(|value| value.snapshots.push(Listed::of(&entry)));
        }
        for value in values.values_mut().flatten() {
            value.snapshots.sort_by_key(|one| (Reverse(one.sequence), one.age_ms));
            value.snapshots.truncate(SNAPSHOTS_MAX);
        }
        values
    }

    fn key(&self, rest: &str) -> String {
        format!("{}{rest}/{}", self.prefix, self.node)
    }
}

#[async_trait]
impl Directory for Etcd {
    async fn lookup(&self, query: &Query, neighbours: Joined, found: &Found) {
        let deadline = Instant::now() + LOOKUP_MAX;
        let state = self.state().clone();
        if let State::Connected(kv) = state {
            let answer = tokio::time::timeout(ETCD_MAX, self.ask(&kv, query)).await;
            let late = |_late| Err(Status::deadline_exceeded("no answer to a lookup"));
            match answer.unwrap_or_else(late) {
                Ok(entries) => return found.add(entries),
                Err(status) => self.note_away(&status),
            }
        }
        neighbours::ask(query, neighbours, found, deadline).await;
    }

    fn renewal(&self) -> Option<Duration> {
        Some(RENEWAL)
    }

    async fn publish(&self, held: Vec<Entry>) {
        let values = self.values(held);
        let mut session = self.session.lock().await;
        let written = tokio::time::timeout(PUBLISH_MAX, self.write(&mut session, &values)).await;
        let late = |_late| Err(Status::deadline_exceeded("no answer to a publication"));
        match (written.unwrap_or_else(late), &*session) {
            (Ok(()), Some(session)) => self.note_connected(session.kv.clone()),
            (Ok(()), None) => {}
            (Err(status), _) => {
                // What of it was written is unknown.
                *session = None;
                self.note_away(&status);
            }
        }
    }

    async fn withdraw(&self) {
        let Some(mut session) = self.session.lock().await.take() else { return };
        let revoke = session.leases.lease_revoke(LeaseRevokeRequest { id: session.lease });
        let revoked = tokio::time::timeout(WITHDRAW_MAX, revoke).await;
        if !matches!(revoked, Ok(Ok(_))) {
            tracing::info!("what etcd has of this node will only vanish with its lease");
        }
    }

    fn status(&self) -> String {
        let endpoints = self.endpoints.join(", ");
        match &*self.state() {
            State::Connected(_) => format!("etcd {endpoints}: connected"),
            State::Away { since, reason } => format!(
                "etcd {endpoints}: not reachable for {} s ({reason}); neighbours are asked instead",
                since.elapsed().as_secs()
            ),
        }
    }
}

impl Session {
    async fn open(endpoint: &str) -> Result<Self, Status> {
        let unreachable = |error: tonic::transport::Error| {
            Status::unavailable(format!("{endpoint}: {}", crate::error::chain(&error)))
        };
        let channel = Endpoint::from_shared(endpoint.to_owned()).map_err(unreachable)?;
        let channel = channel.connect().await.map_err(unreachable)?;
        let kv = KvClient::new(channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX);
        let mut leases = LeaseClient::new(channel);
        let ttl = i64::try_from(LEASE_TTL.as_secs()).unwrap_or(i64::MAX);
        let lease = leases.lease_grant(LeaseGrantRequest { ttl }).await?.into_inner().id;
        Ok(Self { kv, leases, lease, published: Values::new() })
    }

    /// Renews the lease and writes what differs from what was published under it.
    async fn renew(&mut self, values: &Values) -> Result<(), Status> {
        let request = LeaseKeepAliveRequest { id: self.lease };
        let once = futures::stream::once(std::future::ready(request));
        let renewed = self.leases.lease_keep_alive(once).await?.into_inner().message().await?;
        if renewed.is_none_or(|renewed| renewed.ttl <= 0) {
            return Err(Status::not_found("the lease has expired"));
        }
        let gone = self.published.keys().filter(|key| !values.contains_key(*key));
        let gone =
            gone.map(|key| Op::RequestDeleteRange(DeleteRangeRequest { key: key.clone().into() }));
        let changed = values.iter().filter(|(key, value)| {
            self.published
                .get(*key)
                .is_none_or(|before| is_worth_writing(before.as_ref(), value.as_ref()))
        });
        let changed: Values = changed.map(|(key, value)| (key.clone(), value.clone())).collect();
        let puts = changed.iter().map(|(key, value)| {
            let value = value.as_ref().map(serde_json::to_vec).transpose();
            let value = value.ok().flatten().unwrap_or_default();
            let (key, value) = (key.clone().into(), value.into());
            Op::RequestPut(PutRequest { key, value, lease: self.lease })
        });
        let writes: Vec<_> =
            gone.chain(puts).map(|request| RequestOp { request: Some(request) }).collect();
        for success in writes.chunks(WRITES_MAX) {
            self.kv.txn(TxnRequest { success: success.to_vec() }).await?;
        }
        self.published.retain(|key, _| values.contains_key(key));
        self.published.extend(changed);
        Ok(())
    }
}

/// Whether a value says something new, or its ages have become much too small.
fn is_worth_writing(before: Option<&Value>, now: Option<&Value>) -> bool {
    let (Some(before), Some(now)) = (before, now) else { return before != now };
    let is_same = |(before, now): (&Listed, &Listed)| {
        let age_max = before.age_ms.saturating_mul(2).saturating_add(AGE_SLACK_MS);
        *before == Listed { age_ms: before.age_ms, ..now.clone() } && now.age_ms <= age_max
    };
    before.siblings != now.siblings
        || before.snapshots.len() != now.snapshots.len()
        || !before.snapshots.iter().zip(&now.snapshots).all(is_same)
}

impl Listed {
    fn of(entry: &Entry) -> Self {
        Self {
            sequence: entry.sequence,
            manifest: entry.manifest.to_string(),
            size_bytes: entry.size_bytes,
            age_ms: u64::try_from(entry.age.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// The keys that begin with `prefix`, those written last first.
fn below(prefix: &str) -> RangeRequest {
    let mut range_end = prefix.as_bytes().to_vec();
    // The prefix ends in '/' or '|', so that there is a next byte.
    if let Some(last) = range_end.last_mut() {
        *last += 1;
    }
    RangeRequest {
        key: prefix.as_bytes().to_vec().into(),
        range_end: range_end.into(),
        limit: NODES_MAX,
        sort_order: SortOrder::Descend.into(),
        sort_target: SortTarget::Mod.into(),
        serializable: true,
    }
}

/// What a key and its value say.
#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    node: String,
    entries: Vec<Entry>,
    /// Whether the entries are for other users of the service too.
    siblings: bool,
}

/// Reads a key; `None` if it is not of the form that nodes write.
fn parse(prefix: &str, pair: &KeyValue) -> Option<Parsed> {
    let key = std::str::from_utf8(&pair.key).ok()?.strip_prefix(prefix)?;
    let (what, node) = key.rsplit_once('/')?;
    if !is_name(node) || pair.value.len() > VALUE_BYTES_MAX {
        return None;
    }
    let entry = Entry {
        node: node.to_owned(),
        subject: None,
        sequence: 0,
        age: Duration::ZERO,
        manifest: Digest::of(&[]),
        size_bytes: 0,
    };
    if let Some(digest) = what.strip_prefix("manifest/") {
        let entries = vec![Entry { manifest: digest.parse().ok()?, ..entry }];
        return Some(Parsed { node: node.to_owned(), entries, siblings: false });
    }
    let subject: Subject = what.strip_prefix("subject/")?.parse().ok()?;
    let value: Value = serde_json::from_slice(&pair.value).ok()?;
    let listed = value.snapshots.into_iter().take(SNAPSHOTS_MAX).map(|listed| {
        Some(Entry {
            subject: Some(subject.clone()),
            sequence: listed.sequence,
            age: Duration::from_millis(listed.age_ms),
            manifest: listed.manifest.parse().ok()?,
            size_bytes: listed.size_bytes,
            ..entry.clone()
        })
    });
    let entries = listed.collect::<Option<Vec<_>>>()?;
    Some(Parsed { node: node.to_owned(), entries, siblings: value.siblings })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PREFIX: &str = "/godwit/v1/default/";
    const MEMORY: &str = "memory|default|docker.io/library/redis:7|cache";

    fn etcd(more: &str) -> Etcd {
        let text = format!("node = 'a'\n{more}\n[[peers]]\nname = 'b'\naddress = 'x:1'");
        Etcd::new(&toml::from_str(&text).unwrap())
    }

    fn entry(subject: &str, sequence: u64, age_s: u64) -> Entry {
        Entry {
            node: "a".to_owned(),
            subject: Some(subject.parse().unwrap()),
            sequence,
            age: Duration::from_secs(age_s),
            manifest: Digest::from_bytes([0xab; 32]),
            size_bytes: 4096,
        }
    }

    fn pair(key: &str, value: &[u8]) -> KeyValue {
        KeyValue { key: key.to_owned().into_bytes().into(), value: value.to_vec().into() }
    }

    /// Version 1, byte by byte: other nodes and `etcdctl` read it.
    #[test]
    fn what_is_published_are_these_keys_and_bytes() {
        let hex = "ab".repeat(32);
        let digest = Digest::from_bytes([0xab; 32]);
        let held = vec![
            entry(MEMORY, 1, 9),
            entry(MEMORY, 2, 3),
            Entry { subject: None, size_bytes: 0, ..entry(MEMORY, 0, 0) },
        ];
        let values = etcd("sibling_memory = true").values(held.clone());
        let (manifest, memory) =
            (format!("{PREFIX}manifest/{digest}/a"), format!("{PREFIX}subject/{MEMORY}/a"));
        assert_eq!(values.keys().collect::<Vec<_>>(), [&manifest, &memory]);
        assert_eq!(values[&manifest], None);
        let expected = format!(
            "{{\"snapshots\":[{{\"sequence\":2,\"manifest\":\"sha256:{hex}\",\"size_bytes\":4096,\
             \"age_ms\":3000}},{{\"sequence\":1,\"manifest\":\"sha256:{hex}\",\"size_bytes\":4096,\
             \"age_ms\":9000}}],\"siblings\":true}}"
        );
        assert_eq!(serde_json::to_string(&values[&memory]).unwrap(), expected);
        let parsed = parse(PREFIX, &pair(&memory, expected.as_bytes())).unwrap();
        assert_eq!((parsed.node.as_str(), parsed.siblings), ("a", true));
        assert_eq!(parsed.entries, [held[1].clone(), held[0].clone()]);
        let parsed = parse(PREFIX, &pair(&manifest, b"")).unwrap();
        assert_eq!(parsed.entries, [held[2].clone()]);
        // Only memory is ever given to others, and only where that is configured.
        assert!(!etcd("").values(held)[&memory].as_ref().unwrap().siblings);
        let volume = etcd("sibling_memory = true").values(vec![entry("volume|v", 1, 0)]);
        assert!(volume.values().flatten().all(|value| !value.siblings));
    }

    #[test]
    fn what_no_node_would_write_is_not_read() {
        let good = br#"{"snapshots":[],"siblings":false}"#;
        assert!(parse(PREFIX, &pair(&format!("{PREFIX}subject/volume|v/b"), good)).is_some());
        let more = br#"{"snapshots":[],"siblings":false,"later":1}"#;
        assert!(parse(PREFIX, &pair(&format!("{PREFIX}subject/volume|v/b"), more)).is_some());
        for key in [
            "subject/volume|v/b",
            "/godwit/v1/default/subject/volume|v",
            "/godwit/v1/default/subject/volume|v/",
            "/godwit/v1/default/subject/volume|v/../b",
            "/godwit/v1/default/subject/volume|v/b c",
            "/godwit/v1/default/manifest/sha256:12/b",
            "/godwit/v1/default/other/volume|v/b",
            "/godwit/v2/default/subject/volume|v/b",
        ] {
            assert_eq!(parse(PREFIX, &pair(key, good)), None, "{key}");
        }
        let large =
            format!(r#"{{"snapshots":[],"siblings":false{}}}"#, " ".repeat(VALUE_BYTES_MAX));
        for value in [
            &b""[..],
            b"[]",
            br#"{"snapshots":[{"sequence":1,"manifest":"x","size_bytes":1,"age_ms":1}],"siblings":false}"#,
            br#"{"snapshots":[{"sequence":-1,"manifest":"x","size_bytes":1,"age_ms":1}],"siblings":false}"#,
            large.as_bytes(),
        ] {
            let pair = pair(&format!("{PREFIX}subject/volume|v/b"), value);
            assert_eq!(parse(PREFIX, &pair), None, "{}", String::from_utf8_lossy(value));
        }
    }

    #[test]
    fn a_value_that_says_nothing_new_is_not_written_again_until_its_ages_have_doubled() {
        let value = |sequence, age_s| {
            let listed = Listed::of(&entry(MEMORY, sequence, age_s));
            Some(Value { snapshots: vec![listed], siblings: false })
        };
        let written = |before: &Option<Value>, now: &Option<Value>| {
            is_worth_writing(before.as_ref(), now.as_ref())
        };
        assert!(!written(&value(1, 100), &value(1, 260)));
        assert!(written(&value(1, 100), &value(1, 261)));
        assert!(!written(&value(1, 0), &value(1, 60)));
        assert!(written(&value(1, 100), &value(2, 100)));
        assert!(!written(&None, &None));
        let none = Some(Value::default());
        assert!(written(&value(1, 1), &none) && written(&none, &value(1, 1)));
        let given = value(1, 1).map(|value| Value { siblings: true, ..value });
        assert!(written(&value(1, 1), &given));
    }

    #[test]
    fn a_range_holds_what_begins_with_a_prefix_and_nothing_else() {
        let range = below("/a/");
        assert_eq!((&range.key[..], &range.range_end[..]), (&b"/a/"[..], &b"/a0"[..]));
        let range = below("memory|ns|redis|");
        assert_eq!(&range.range_end[..], b"memory|ns|redis}");
    }

    proptest! {
        #[test]
        fn reading_never_panics(key in "(/godwit/v1/default/)?[a-z/|:]{0,30}", value: Vec<u8>) {
            let _ = parse(PREFIX, &pair(&key, &value));
        }
    }
}
