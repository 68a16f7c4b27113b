//! `godwit plan`: what a migration would cost and what stands in its way, before anything moves.
//!
//! 1. The source describes its container; what would make the migration fail is looked for here.
//! 2. The source captures every subject twice while the container runs: the lists of what there is
//!    (about a hundredth of the size) come here, and what changed in between tells the rate of
//!    writing.
//! 3. The directory says which neighbours have snapshots of these subjects; their lists come too.
//!    So what each one holds of what is wanted is known object by object, not guessed.
//! 4. A few objects are fetched to see how well they compress.
//! 5. [`predict`] makes bytes by node, rounds, time and downtime of it.
//!
//! What there is of the image is asked by name alone ([`image`]).
//!
//! Nothing is frozen, created or promised; the lists stay in the store until it is swept, and serve
//! the migration.

mod image;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_protos::peer::{Begin, RoundDone};
use godwit_protos::{Digest, ServiceRef, Subject, VolumeSource};
use serde::{Deserialize, Serialize};

use super::destination::{Connections, connect, kind_told, mode_word};
use super::image::{name_here, renaming_warning};
use super::line::{Beginning, Line, Subjects, named};
use super::request::{Request, check_absent, describe_at, find_obstacles, image_of, texts};
use super::{MigrationError, blocking, choice};
use crate::content::object::{self, Kind};
use crate::content::{ContentError, Source as _};
use crate::directory::{Entry, LOOKUP_MAX};
use crate::error::chain;
use crate::node::Node;
use crate::peer::Connection;
use crate::peer::fetch::{Depth, Peers, fetch};
use crate::policy::choose::Choice;
use crate::policy::predict::{Held, Input, Part, Prediction, Shape, predict, to_u64, write_rate};
use crate::store::{Lease, Store};

/// How long what a plan brings is protected while it is made.
const PLAN_MAX: Duration = Duration::from_secs(1800);

/// Objects of each part that are fetched to see how they compress.
const SAMPLE_OBJECTS: usize = 16;

/// Snapshots of one subject whose lists are asked of one neighbour.
const SNAPSHOTS_PER_NEIGHBOUR: usize = 2;

/// A neighbour that has some of a subject, and what that is worth.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its name.
    pub node: String,
    /// Place of its newest snapshot in the subject's lineage; 0 for content by digest.
    pub sequence: u64,
    /// How long ago that was taken, by its own clock, in milliseconds; 0 for content by digest.
    pub age_ms: u64,
    /// Whether all that it has is memory of other users of the service.
    pub is_sibling: bool,
    /// Of what the destination lacks, what it has, in bytes.
    pub held_bytes: u64,
    /// What earlier migrations measured, in bytes per second.
    pub throughput_bytes_per_second: Option<f64>,
    /// Its answer to hello took so long, in milliseconds.
    pub round_trip_ms: f64,
    /// Runnable tasks per processor, as it says.
    pub load: f64,
    /// Seconds that it alone would save over the source alone, by the age of its snapshot and what
    /// is known of it.
    pub score_s: f64,
    /// Whether it will be asked.
    pub chosen: bool,
    /// The figures behind it, for people.
    pub reason: String,
}

/// What is expected of one subject, read-only volume or the image.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// `volume|ID`, `layer|...`, `memory|...`, `sha256:...`, or `image`.
    pub subject: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// What the destination lacks of it, in bytes.
    pub missing_bytes: u64,
    /// How fast it changes, in bytes per second.
    pub write_bytes_per_second: u64,
    /// Bytes on the wire for one byte of content.
    pub wire_ratio: f64,
    /// Who else has it.
    pub candidates: Vec<Candidate>,
    /// Expected bytes on the wire, by node.
    pub wire_bytes_by_node: BTreeMap<String, u64>,
}

/// The plan of a migration; docs/protocol.md explains each field.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// `NAMESPACE/CONTAINER`.
    pub container: String,
    /// Node that runs it.
    pub source: String,
    /// Node that is to run it.
    pub destination: String,
    /// "cooperative" or "traditional".
    pub mode: String,
    /// What would make it fail.
    pub obstacles: Vec<String>,
    /// What becomes different by moving.
    pub warnings: Vec<String>,
    /// Expected bytes on the wire, by node, over all phases.
    pub wire_bytes_by_node: BTreeMap<String, u64>,
    /// Of them, what follows after the stop.
    pub stop_and_copy_bytes: u64,
    /// Expected rounds of pre-copy.
    pub rounds: u32,
    /// Expected time from the request until the container runs, in milliseconds.
    pub total_ms: f64,
    /// Expected time from the freeze until it runs, in milliseconds.
    pub downtime_ms: f64,
    /// By subject.
    pub subjects: Vec<Share>,
}

/// Makes the plan of a migration to this node.
///
/// Errors: the source does not answer, has no such container or cannot give it away now. What would
/// make the migration fail otherwise is an obstacle of the plan.
pub async fn plan(node: &Arc<Node>, request: &Request) -> Result<Plan, MigrationError> {
    if let Err(error @ MigrationError::RunsHere { .. }) =
        check_absent(node, &request.from.container).await
    {
        return Err(error);
    }
    let connections = connect(node, &request.from.node, &request.settings).await?;
    let described = describe_at(&connections.source, &request.from.container).await?;
    let hello = &connections.source.hello;
    let mut obstacles = texts(&find_obstacles(node, request, hello, &described).await?);
    let mut warnings = described.warnings.clone();
    if let Ok(target) = image_of(&described) {
        let namespace = request.from.container.namespace();
        let name = name_here(node, namespace, &described, &target).await?;
        warnings.extend(renaming_warning(&described, &name));
    }
    if !described.obstacles.is_empty() {
        // The source would refuse a session, and captures would be work for nothing.
        let nothing = Prediction::default();
        return Ok(document(node, request, Vec::new(), &nothing, (obstacles, warnings)));
    }
    let lease = Arc::new(node.store.lease("plan", PLAN_MAX));
    let survey = Survey { node, connections: &connections, lease: &lease };
    let mut surveyed = Vec::new();
    surveyed.push(survey.image(&described, &request.from.container).await?);
    let volumes = described.volumes.iter().filter_map(|mount| mount.volume.parse().ok());
    let contents: Vec<Digest> = volumes
        .filter_map(|volume| match volume {
            VolumeSource::Content(digest) => Some(digest),
            VolumeSource::Writable(_) => None,
        })
        .collect();
    let Captures { subjects, capture, found, shape } = survey.subjects(request, &contents).await?;
    obstacles.extend(subjects.iter().filter_map(|one| one.obstacle.clone()));
    surveyed.extend(subjects);
    for digest in contents {
        let has_it = found.iter().filter(|entry| entry.manifest == digest);
        let entries: Vec<Entry> = has_it.cloned().collect();
        let root = (Kind::Tree, digest);
        surveyed.push(survey.tree(digest.to_string(), root, None, (&entries, &[])).await?);
    }
    let mut rates: BTreeMap<_, _> = node.links.rates().into_iter().collect();
    rates.extend(connections.measured());
    let input = Input {
        parts: surveyed.iter().map(|one| one.part.clone()).collect(),
        source: request.from.node.clone(),
        rates,
        capture,
        shape,
        pace: node.links.of(&request.from.node).frozen_pace.unwrap_or(1.0),
        max_rounds: request.settings.max_rounds,
    };
    let told = predict(&input);
    Ok(document(node, request, surveyed, &told, (obstacles, warnings)))
}

/// A part with what the document says of it.
struct Surveyed {
    name: String,
    part: Part,
    wire_ratio: f64,
    candidates: Vec<Candidate>,
    /// Why it cannot be laid out here.
    obstacle: Option<String>,
}

/// What two captures at the source say.
struct Captures {
    subjects: Vec<Surveyed>,
    /// How long the first one took.
    capture: Duration,
    /// What the directory says of them.
    found: Vec<Entry>,
    shape: Shape,
}

struct Survey<'a> {
    node: &'a Arc<Node>,
    connections: &'a Connections,
    lease: &'a Arc<Lease>,
}

impl Survey<'_> {
    /// Has the source capture everything twice, and asks the directory for it and for `contents`.
    async fn subjects(
        &self,
        request: &Request,
        contents: &[Digest],
    ) -> Result<Captures, MigrationError> {
        let begin = Begin {
            container: Some(named(&request.from.container)),
            destination: self.node.config.node.clone(),
            migration: "plan".to_owned(),
            without_writable_layer: !request.settings.writable_layer,
            remove_source: false,
            known_epoch: 0,
            r#as: Some(named(&request.from.container)),
        };
        let mut line = Line::open(&self.connections.source, begin).await?;
        let Beginning { subjects, shape, .. } = line.begun().await?;
        let container = &request.from.container;
        let asked = subjects.keys().cloned().collect();
        let lookup = self.connections.look_up(self.node, container, asked, contents.to_vec());
        let begun = Instant::now();
        let first = line.round(1).await?;
        let capture = begun.elapsed();
        let found = lookup.found(LOOKUP_MAX).await;
        let surveyed = self.first_round(&first, &found, &subjects).await;
        let between = begun.elapsed();
        let second = line.round(2).await;
        // The first capture stores everything and is slower: a page in its middle was read that
        // much later.
        let recapture = begun.elapsed().saturating_sub(between);
        let between = between.saturating_sub(capture.saturating_sub(recapture) / 2);
        line.abort("only a plan was asked for".to_owned()).await;
        let (mut surveyed, second) = (surveyed?, second?);
        for (one, later) in surveyed.iter_mut().zip(&second.manifests) {
            #[expect(clippy::cast_precision_loss, reason = "a rate")]
            let changed = later.changed_bytes as f64;
            one.part.write_rate = write_rate(one.part.size, changed, between.as_secs_f64());
        }
        Ok(Captures { subjects: surveyed, capture, found, shape })
    }

    async fn first_round(
        &self,
        round: &RoundDone,
        found: &[Entry],
        rates: &Subjects,
    ) -> Result<Vec<Surveyed>, MigrationError> {
        let mut surveyed = Vec::new();
        for manifest in &round.manifests {
            let subject: Subject = manifest.subject.parse()?;
            let kind = kind_told(&subject, manifest.kind);
            let kind =
                kind.ok_or(MigrationError::Protocol("a kind that the subject cannot have"))?;
            let root = (kind, Digest::try_from(&manifest.digest[..])?);
            let is_of = |entry: &&Entry| {
                entry.subject.as_ref().is_some_and(|other| {
                    *other == subject || (ServiceRef::of(other).is_some() && root.0 == Kind::Memory)
                })
            };
            let entries: Vec<Entry> = found.iter().filter(is_of).cloned().collect();
            let (of, rate) = ((&subject, manifest.size_bytes), rates.get(&subject).copied());
            let choices =
                choice::choices(self.node, self.connections, &entries, of, rate.flatten());
            let size = Some(manifest.size_bytes);
            let mut one = self.tree(subject.to_string(), root, size, (&entries, &choices)).await?;
            one.part.is_memory = root.0 == Kind::Memory;
            if root.0 == Kind::Tree {
                let (node, what) = (self.node.clone(), subject.to_string());
                let kept = move || {
                    let tree = node.store.decode(&root.1)?;
                    Ok(node.volumes.check_kept(&what, &tree).err())
                };
                one.obstacle = blocking(kept).await?.map(|error| chain(&error));
            }
            surveyed.push(one);
        }
        Ok(surveyed)
    }

    /// What is missing of a version, and who of those that `entries` name has it. A node of which
    /// `choices` say nothing is asked: a holder of read-only content has all of it.
    async fn tree(
        &self,
        name: String,
        root: (Kind, Digest),
        size: Option<u64>,
        (entries, choices): (&[Entry], &[Choice]),
    ) -> Result<Surveyed, MigrationError> {
        let leaves = self.leaves(&self.connections.source_alone(), root).await?;
        let size = size.unwrap_or(leaves.size);
        let here = self.node.store.clone();
        let all: Vec<Digest> = leaves.digests.iter().copied().collect();
        let missing = blocking(move || Ok(here.missing(&all)?)).await?;
        let mut candidates = Vec::new();
        let mut union = HashSet::new();
        for peer in self.connections.holders(entries, |_| true).neighbours {
            let theirs = entries.iter().filter(|entry| entry.node == peer.node);
            let theirs: Vec<&Entry> = theirs.take(SNAPSHOTS_PER_NEIGHBOUR).collect();
            let held = self.held(&peer, root, &theirs, &missing).await;
            if let (Some(best), false) = (theirs.first(), held.is_empty()) {
                let is_sibling = best.subject.as_ref().is_some_and(|of| of.to_string() != name);
                let sequence = if is_sibling { 0 } else { best.sequence };
                let age_ms = u64::try_from(best.age.as_millis()).unwrap_or(u64::MAX);
                let choice = choices.iter().find(|choice| choice.node == peer.node);
                let chosen = choice.is_none_or(|choice| choice.chosen);
                let known = Candidate {
                    sequence,
                    age_ms,
                    is_sibling,
                    chosen,
                    score_s: choice.map_or(0.0, |choice| choice.score),
                    reason: choice.map_or_else(String::new, |choice| choice.reason.to_string()),
                    ..Candidate::default()
                };
                candidates.push((peer, known, held.len()));
                if chosen {
                    union.extend(held);
                }
            }
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let of = |objects: usize| size as f64 * objects as f64 / leaves.digests.len().max(1) as f64;
        let holders = candidates
            .iter()
            .filter(|(_, known, _)| known.chosen)
            .map(|(peer, _, held)| Held { node: peer.node.clone(), bytes: of(*held) });
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let part = Part {
            size: size as f64,
            missing: of(missing.len()),
            held: of(union.len()),
            entries: leaves.entries as f64,
            holders: holders.collect(),
            ..Part::default()
        };
        let wire_ratio = self.sample(&missing).await?;
        let candidates = candidates
            .into_iter()
            .map(|(peer, known, held)| self.candidate(&peer, known, of(held), &part))
            .collect();
        Ok(Surveyed { name, part, wire_ratio, candidates, obstacle: None })
    }

    /// What a neighbour has of `missing`, by its best snapshots.
    async fn held(
        &self,
        peer: &Arc<Connection>,
        (kind, root): (Kind, Digest),
        theirs: &[&Entry],
        missing: &[Digest],
    ) -> HashSet<Digest> {
        let roots = theirs.iter().map(|entry| entry.manifest);
        let peers =
            Peers { neighbours: Vec::new(), source: Some(peer.clone()), health: Arc::default() };
        let mut has = HashSet::new();
        for theirs in roots.collect::<BTreeSet<_>>() {
            if theirs == root {
                has.extend(missing);
                continue;
            }
            match self.leaves(&peers, (kind, theirs)).await {
                Ok(leaves) => has.extend(leaves.digests),
                // Stale: it was retired meanwhile.
                Err(error) => tracing::info!(node = peer.node, %error, "not in the plan"),
            }
        }
        missing.iter().filter(|digest| has.contains(digest)).copied().collect()
    }

    /// What help from `peer` is worth, of which `known` says what it has.
    fn candidate(&self, peer: &Connection, known: Candidate, held: f64, part: &Part) -> Candidate {
        let channel = self.node.links.of(&peer.node);
        let share = format!("{:.0}% of what is missing", 100.0 * held / part.missing.max(1.0));
        let words = [share.as_str(), known.reason.as_str()];
        let reason =
            words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join("; ");
        Candidate {
            node: peer.node.clone(),
            held_bytes: to_u64(held),
            throughput_bytes_per_second: channel.throughput_bytes_per_second,
            round_trip_ms: channel.round_trip_ms,
            load: channel.load,
            reason,
            ..known
        }
    }

    /// The leaves of a version, whose lists are fetched if they are not here.
    async fn leaves(&self, peers: &Peers, root: (Kind, Digest)) -> Result<Leaves, MigrationError> {
        fetch(&self.node.store, self.lease, peers, &[root], Depth::Lists).await?;
        let store = self.node.store.clone();
        blocking(move || Ok(Leaves::of(&store, root)?)).await
    }

    /// Bytes on the wire for one of content, from a few of `missing`.
    async fn sample(&self, missing: &[Digest]) -> Result<f64, MigrationError> {
        let step = (missing.len() / SAMPLE_OBJECTS).max(1);
        let sample = missing.iter().step_by(step).take(SAMPLE_OBJECTS);
        let sample: Vec<_> = sample.map(|digest| (Kind::Chunk, *digest)).collect();
        if sample.is_empty() {
            return Ok(1.0);
        }
        let (peers, traffic) = (self.connections.source_alone(), &self.connections.source.traffic);
        let before = traffic.received();
        let brought = fetch(&self.node.store, self.lease, &peers, &sample, Depth::Content).await?;
        let raw: u64 = brought.iter().flat_map(|one| one.values()).map(|(_, bytes)| bytes).sum();
        #[expect(clippy::cast_precision_loss, reason = "a ratio")]
        let ratio = (traffic.received() - before) as f64 / raw.max(1) as f64;
        Ok(ratio.clamp(0.01, 1.1))
    }
}

/// What a version consists of.
struct Leaves {
    digests: HashSet<Digest>,
    /// Size that its tree states, in bytes.
    size: u64,
    /// Files and directories in it.
    entries: usize,
}

impl Leaves {
    fn of(store: &Store, root: (Kind, Digest)) -> Result<Self, ContentError> {
        let mut leaves = Self { digests: HashSet::new(), size: 0, entries: 0 };
        if root.0 == Kind::Tree {
            leaves.size = store.decode::<object::Tree>(&root.1)?.bytes;
        }
        let (mut todo, mut seen) = (vec![root], HashSet::from([root]));
        while let Some((kind, digest)) = todo.pop() {
            if kind.is_leaf() {
                leaves.digests.insert(digest);
                continue;
            }
            if kind == Kind::Directory
                && let object::Directory::Entries(entries) = store.decode(&digest)?
            {
                leaves.entries += entries.len();
            }
            let children = object::children(kind, &store.object(&digest)?)
                .map_err(|source| ContentError::Object { digest, source })?;
            todo.extend(children.into_iter().filter(|child| seen.insert(*child)));
        }
        Ok(leaves)
    }
}

fn document(
    node: &Node,
    request: &Request,
    surveyed: Vec<Surveyed>,
    told: &Prediction,
    (obstacles, warnings): (Vec<String>, Vec<String>),
) -> Plan {
    let mut by_node = BTreeMap::new();
    let mut subjects = Vec::new();
    for (one, shares) in surveyed.into_iter().zip(&told.parts) {
        let wire = |bytes: &f64| to_u64(bytes * one.wire_ratio);
        let wire_bytes_by_node: BTreeMap<_, _> =
            shares.iter().map(|(node, bytes)| (node.clone(), wire(bytes))).collect();
        for (node, bytes) in &wire_bytes_by_node {
            *by_node.entry(node.clone()).or_default() += bytes;
        }
        subjects.push(Share {
            subject: one.name,
            size_bytes: to_u64(one.part.size),
            missing_bytes: to_u64(one.part.missing),
            write_bytes_per_second: to_u64(one.part.write_rate),
            wire_ratio: one.wire_ratio,
            candidates: one.candidates,
            wire_bytes_by_node,
        });
    }
    Plan {
        container: request.from.container.to_string(),
        source: request.from.node.clone(),
        destination: node.config.node.clone(),
        mode: mode_word(&request.settings).to_owned(),
        obstacles,
        warnings,
        wire_bytes_by_node: by_node,
        stop_and_copy_bytes: to_u64(told.stop_and_copy),
        rounds: u32::try_from(told.rounds.len()).unwrap_or(u32::MAX),
        total_ms: told.total.as_secs_f64() * 1e3,
        downtime_ms: told.downtime.as_secs_f64() * 1e3,
        subjects,
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| {
            #[expect(clippy::cast_precision_loss, reason = "for people")]
            let bytes = bytes as f64;
            bytes / f64::from(1 << 20)
        };
        writeln!(f, "{}: {} -> {} ({})", self.container, self.source, self.destination, self.mode)?;
        for obstacle in &self.obstacles {
            writeln!(f, "  would fail: {obstacle}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "  note: {warning}")?;
        }
        if self.subjects.is_empty() {
            return Ok(());
        }
        writeln!(
            f,
            "  about {:.1} s in all, {:.0} ms of downtime, {} rounds",
            self.total_ms / 1e3,
            self.downtime_ms,
            self.rounds
        )?;
        for (node, bytes) in &self.wire_bytes_by_node {
            writeln!(f, "  from {node}: {:.1} MiB", mib(*bytes))?;
        }
        for share in &self.subjects {
            writeln!(
                f,
                "  {}: {:.1} MiB, {:.1} MiB missing here, {:.1} MiB/s written",
                share.subject,
                mib(share.size_bytes),
                mib(share.missing_bytes),
                mib(share.write_bytes_per_second)
            )?;
            for candidate in &share.candidates {
                let verdict = if candidate.chosen { "asked" } else { "not asked" };
                writeln!(f, "    {}: {verdict}, {}", candidate.node, candidate.reason)?;
            }
        }
        Ok(())
    }
}
