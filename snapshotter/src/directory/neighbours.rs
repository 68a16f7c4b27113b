//! The directory without a service of its own: every neighbour is asked what it holds, all at once.
//!
//! There is nothing to publish and nothing that could be out of date; a lookup costs one request to
//! each neighbour.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use godwit_protos::peer::{LocateRequest, LocateResponse, Snapshot};
use godwit_protos::{Digest, Subject};
use tokio::time::Instant;

use super::{Directory, ENTRIES_MAX, Entry, Found, Joined, LOOKUP_MAX, Query};
use crate::peer::Connection;

/// See the module's comment.
#[derive(Debug)]
pub struct Neighbours;

#[async_trait]
impl Directory for Neighbours {
    async fn lookup(&self, query: &Query, neighbours: Joined, found: &Found) {
        ask(query, neighbours, found, Instant::now() + LOOKUP_MAX).await;
    }

    fn renewal(&self) -> Option<Duration> {
        None
    }

    async fn publish(&self, _held: Vec<Entry>) {}

    async fn withdraw(&self) {}

    fn status(&self) -> String {
        "neighbours".to_owned()
    }
}

/// Asks every neighbour that has joined or joins while others are waited for.
pub(super) async fn ask(query: &Query, mut neighbours: Joined, found: &Found, deadline: Instant) {
    let request = request(query);
    let mut answers = FuturesUnordered::new();
    let (mut asked, mut may_join) = (0, true);
    loop {
        let joined = neighbours.borrow_and_update()[asked..].to_vec();
        asked += joined.len();
        answers.extend(joined.into_iter().map(|peer| {
            let request = request.clone();
            async move {
                let answer = peer.client().locate(request).await;
                (peer, answer)
            }
        }));
        found.quiet(answers.is_empty());
        if answers.is_empty() && !may_join {
            return;
        }
        tokio::select! {
            Some((peer, answer)) = answers.next() => match answer {
                Ok(answer) => found.add(entries(&peer, answer.into_inner())),
                Err(status) => {
                    tracing::info!(node = peer.node, reason = status.message(), "lookup refused");
                }
            },
            changed = neighbours.changed(), if may_join => may_join = changed.is_ok(),
            () = tokio::time::sleep_until(deadline) => return,
        }
    }
}

/// The question as it is asked of a peer.
fn request(query: &Query) -> LocateRequest {
    LocateRequest {
        subjects: query.subjects.iter().map(ToString::to_string).collect(),
        services: query.services.iter().map(ToString::to_string).collect(),
        manifests: query.manifests.iter().map(|digest| digest.as_bytes().to_vec().into()).collect(),
        ..LocateRequest::default()
    }
}

/// The question of a peer; names of no known form belong to no peer.
pub fn query(asked: &LocateRequest) -> Query {
    Query {
        subjects: asked.subjects.iter().filter_map(|text| text.parse().ok()).collect(),
        services: asked.services.iter().filter_map(|text| text.parse().ok()).collect(),
        manifests: asked
            .manifests
            .iter()
            .filter_map(|bytes| Digest::try_from(&bytes[..]).ok())
            .collect(),
    }
}

/// What a peer says that it holds, as far as it can be read.
fn entries(peer: &Connection, answer: LocateResponse) -> Vec<Entry> {
    let snapshots = answer.snapshots.into_iter().take(ENTRIES_MAX).filter_map(|snapshot| {
        Some(Entry {
            node: peer.node.clone(),
            subject: Some(snapshot.subject.parse::<Subject>().ok()?),
            sequence: snapshot.sequence,
            age: Duration::from_millis(snapshot.age_ms),
            manifest: Digest::try_from(&snapshot.manifest[..]).ok()?,
            size_bytes: snapshot.size_bytes,
        })
    });
    let manifests = answer.manifests.into_iter().take(ENTRIES_MAX).filter_map(|manifest| {
        Some(Entry {
            node: peer.node.clone(),
            subject: None,
            sequence: 0,
            age: Duration::ZERO,
            manifest: Digest::try_from(&manifest[..]).ok()?,
            size_bytes: 0,
        })
    });
    snapshots.chain(manifests).collect()
}

/// The answer to a peer: snapshots and manifests.
pub fn answer(entries: Vec<Entry>) -> (Vec<Snapshot>, Vec<Bytes>) {
    let (mut snapshots, mut manifests) = (Vec::new(), Vec::new());
    for entry in entries {
        let manifest = entry.manifest.as_bytes().to_vec().into();
        match entry.subject {
            None => manifests.push(manifest),
            Some(subject) => snapshots.push(Snapshot {
                subject: subject.to_string(),
                sequence: entry.sequence,
                manifest,
                size_bytes: entry.size_bytes,
                age_ms: u64::try_from(entry.age.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    }
    (snapshots, manifests)
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    /// Method: literal bytes, field by field.
    #[test]
    fn a_lookup_and_its_answer_are_these_bytes() {
        let asked = LocateRequest {
            subjects: vec!["volume|v".to_owned()],
            services: vec!["default|redis:7".to_owned()],
            ..LocateRequest::default()
        };
        assert_eq!(asked.encode_to_vec(), b"\x0a\x08volume|v\x2a\x0fdefault|redis:7");
        let (snapshots, manifests) = answer(vec![Entry {
            node: "a".to_owned(),
            subject: Some("volume|v".parse().unwrap()),
            sequence: 2,
            age: Duration::from_millis(300),
            manifest: Digest::from_bytes([0xcd; 32]),
            size_bytes: 4096,
        }]);
        assert_eq!(manifests, Vec::<Bytes>::new());
        let mut expected = b"\x0a\x08volume|v\x10\x02\x22\x20".to_vec();
        expected.extend_from_slice(&[0xcd; 32]);
        expected.extend_from_slice(b"\x28\x80\x20\x30\xac\x02");
        assert_eq!(snapshots[0].encode_to_vec(), expected);
    }

    #[test]
    fn names_of_no_known_form_are_left_out_of_a_question() {
        let asked = LocateRequest {
            subjects: vec!["volume|v".to_owned(), "volume|../v".to_owned(), String::new()],
            services: vec!["redis:7".to_owned(), "default|redis:7".to_owned()],
            manifests: vec![vec![1; 31].into(), vec![1; 32].into()],
            ..LocateRequest::default()
        };
        let query = query(&asked);
        assert_eq!(
            (query.subjects.len(), query.services.len(), query.manifests.len()),
            (1, 1, 1),
            "{query:?}"
        );
    }
}
