//! What a migration cost: the document that ends it. docs/protocol.md explains each field.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::peer::fetch::Brought;

/// Milliseconds of each phase. All but `pre_copy` add up to the downtime.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Phases {
    /// From the request to the stop; the container runs.
    pub pre_copy: f64,
    /// Freezing every task at the source.
    pub freeze: f64,
    /// CRIU's dump at the source, with the cut of volumes and writable layer.
    pub dump: f64,
    /// From the end of the dump until the destination has everything in place.
    pub transfer: f64,
    /// From there until the tasks run at the destination, the hand-off included.
    pub restore: f64,
}

/// One subject's share.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The subject, for example `volume|redis-data`.
    pub subject: String,
    /// Its size at the cut, in bytes.
    pub size_bytes: u64,
    /// Bytes of objects brought before the stop, uncompressed, by node.
    pub raw_bytes_by_node: BTreeMap<String, u64>,
}

/// A migration's report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Identifier of the migration, as in the logs of both nodes.
    pub migration: String,
    /// `NAMESPACE/CONTAINER`.
    pub container: String,
    /// "cooperative" or "traditional".
    pub mode: String,
    /// Node that ran the container before.
    pub source: String,
    /// Node that runs it now.
    pub destination: String,
    /// From the request to the container running at the destination, in milliseconds.
    pub total_ms: f64,
    /// From the freeze to the container running at the destination, in milliseconds.
    pub downtime_ms: f64,
    /// Rounds of pre-copy.
    pub rounds: u32,
    /// Where the time went.
    pub phases_ms: Phases,
    /// Bytes that the destination received on its connections, protocol included, by node.
    pub wire_bytes_by_node: BTreeMap<String, u64>,
    /// Bytes sent after the freeze, protocol included.
    pub stop_and_copy_bytes: u64,
    /// Share of each subject.
    pub subjects: Vec<Share>,
}

/// What each subject cost, for the report.
#[derive(Default)]
pub(super) struct Shares(HashMap<String, Share>);

impl Shares {
    fn of(&mut self, subject: &str) -> &mut Share {
        let fresh = || Share { subject: subject.to_owned(), ..Share::default() };
        self.0.entry(subject.to_owned()).or_insert_with(fresh)
    }

    pub(super) fn add(&mut self, subject: &str, brought: &Brought) {
        let share = self.of(subject);
        for (node, (_, bytes)) in brought {
            *share.raw_bytes_by_node.entry(node.clone()).or_default() += bytes;
        }
    }

    pub(super) fn size(&mut self, subject: &str, bytes: u64) {
        self.of(subject).size_bytes = bytes;
    }

    pub(super) fn into_list(self) -> Vec<Share> {
        let mut list: Vec<Share> = self.0.into_values().collect();
        list.sort_by(|one, other| one.subject.cmp(&other.subject));
        list
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| {
            #[expect(clippy::cast_precision_loss, reason = "for people")]
            let bytes = bytes as f64;
            bytes / f64::from(1 << 20)
        };
        let Phases { pre_copy, freeze, dump, transfer, restore } = self.phases_ms;
        writeln!(f, "{}: {} -> {} ({})", self.container, self.source, self.destination, self.mode)?;
        writeln!(
            f,
            "  total {:.0} ms, downtime {:.0} ms, {} rounds",
            self.total_ms, self.downtime_ms, self.rounds
        )?;
        writeln!(
            f,
            "  pre-copy {pre_copy:.0} ms | freeze {freeze:.0} | dump {dump:.0} | transfer {transfer:.0} | restore {restore:.0}"
        )?;
        for (node, bytes) in &self.wire_bytes_by_node {
            writeln!(f, "  from {node}: {:.2} MiB on the wire", mib(*bytes))?;
        }
        write!(f, "  after the stop: {:.2} MiB", mib(self.stop_and_copy_bytes))
    }
}
