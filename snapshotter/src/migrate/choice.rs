//! The neighbours that a migration asks for a subject: what the directory found and what is known
//! of the nodes, put to [`crate::policy::choose`]. A plan and the migration ask the same question
//! and get the same answer.

use std::collections::{BTreeMap, HashSet};

use godwit_protos::Subject;

use super::destination::Connections;
use crate::directory::Entry;
use crate::node::Node;
use crate::policy::choose::{Candidate, Choice, Source, Wanted, choose};
use crate::policy::predict::RATE_UNKNOWN;

/// Decides about every neighbour that has a snapshot of `subject`; the best first.
pub fn choices(
    node: &Node,
    connections: &Connections,
    entries: &[Entry],
    (subject, size_bytes): (&Subject, u64),
    write_rate: Option<f64>,
) -> Vec<Choice> {
    let mut newest = BTreeMap::<&str, &Entry>::new();
    for entry in entries.iter().filter(|entry| entry.subject.as_ref() == Some(subject)) {
        let known = newest.entry(&entry.node).or_insert(entry);
        if known.sequence < entry.sequence {
            *known = entry;
        }
    }
    let head = newest.values().map(|entry| entry.sequence).max().unwrap_or(0);
    let neighbours = connections.neighbours();
    let candidates: Vec<Candidate> = neighbours
        .iter()
        .filter_map(|peer| {
            let entry = newest.get(peer.node.as_str())?;
            Some(Candidate {
                node: peer.node.clone(),
                lag: head - entry.sequence,
                age: entry.age,
                rate: node.links.of(&peer.node).throughput_bytes_per_second,
                round_trip: peer.round_trip,
                load: peer.hello.load,
            })
        })
        .collect();
    let source = &connections.source;
    let rate = node.links.of(&source.node).throughput_bytes_per_second;
    let of_source = Source { rate, round_trip: source.round_trip, load: source.hello.load };
    // However many send, this node takes in no more than it ever did.
    let rates = node.links.rates().into_iter().map(|(_, rate)| rate);
    let ingest = rates.fold(RATE_UNKNOWN, f64::max);
    #[expect(clippy::cast_precision_loss, reason = "an estimate")]
    let size = size_bytes as f64;
    // What is here already is not known before the lists are: no neighbour is left out for it.
    let wanted = Wanted { size_bytes: size, missing_bytes: size, write_rate };
    choose(&wanted, &candidates, &of_source, ingest)
}

/// The nodes that are asked: those chosen for at least one subject, and those that have memory of
/// another user, whose worth no rule tells.
pub fn asked<'a>(
    choices: impl IntoIterator<Item = &'a Choice>,
    entries: &[Entry],
    subjects: &[&Subject],
) -> HashSet<String> {
    let chosen = choices.into_iter().filter(|choice| choice.chosen).map(|choice| &choice.node);
    let siblings = entries.iter().filter(|entry| is_sibling(entry, subjects));
    chosen.chain(siblings.map(|entry| &entry.node)).cloned().collect()
}

/// Whether an entry is memory of a user other than those that are asked for.
fn is_sibling(entry: &Entry, subjects: &[&Subject]) -> bool {
    entry.subject.as_ref().is_some_and(|subject| !subjects.contains(&subject))
}
