//! `godwit snapshot restore`: a container comes back from a cut that this node has, after its host
//! died.
//!
//! 1. Lease the container, then look for it at every peer ([`Original`]). While it may be alive the
//!    request is refused, unless it says that it knows; where a peer says that it runs there, or is
//!    about to, always. As the lease comes first, of two nodes that restore at once at least one
//!    hears of the other.
//! 2. Bring the image, derive a specification, create the container with the restore-from
//!    annotation: the same as `godwit migrate` does.
//! 3. The shim asks for its state; [`Work::restore`] lays the cut out, grants the claim, and is
//!    done when the tasks run. It looks for a container that a client created with that annotation.
//!
//! What the container did after the cut is lost, and the report says how much that is. On failure
//! nothing is left here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_protos::peer::{DescribeResponse, HelloResponse};
use godwit_protos::{ContainerRef, Digest, MigrateFrom, Subject, annotation};
use prost::Message as _;

use super::destination::{Acquired, Command, NEIGHBOUR_MAX, Sessions, Settings, State, kind_told};
use super::layout::Layout;
use super::report::{Phases, Report, Share};
use super::request::{
    self, Arriving, check_absent, check_chain, create_and_start, describe_at, image_of, pre_flight,
    record_with,
};
use super::session::{Parsed, Work};
use super::source::EPOCH_MAX;
use super::{MigrationError, blocking, fit, image, obstacles};
use crate::content::Source as _;
use crate::content::object::{Cut, Kind};
use crate::host::unix_ms;
use crate::node::Node;
use crate::ownership::{Epoch, Event};
use crate::peer::{Connection, PeerError};
use crate::store::{Snapshot, SnapshotId, StoreError};

/// How long what is laid out is protected.
const RESTORE_MAX: Duration = Duration::from_secs(3600);

/// What a failure means.
pub const OUTLOOK: &str =
    "`godwit status` tells whether it came to run here; the snapshot is as it was";

/// A request to start a container from a cut.
#[derive(Clone, Debug)]
pub struct Request {
    /// The snapshot of the cut on this node.
    pub snapshot: SnapshotId,
    /// The one who asks knows that the original may still run, and wants a second one.
    pub although_it_may_run: bool,
    /// Network namespace to join here instead of the one that the description names.
    pub netns: Option<String>,
}

/// Starts the container. Events of `migration` tell how it goes, and the last one carries the
/// report.
///
/// Errors: [`MigrationError`]; nothing is left here, and the snapshot is as it was.
pub async fn restore(
    sessions: &Sessions,
    migration: &str,
    asked: &Request,
) -> Result<(), MigrationError> {
    let node = &sessions.node;
    let (snapshot, cut) = find(node, asked.snapshot).await?;
    let container = container_of(&cut)?;
    let age = snapshot.age(unix_ms()).as_secs();
    let text = format!("{container} as it was on {} {age} s ago", cut.node);
    node.events.step(migration, "request", &text);
    let arriving = Arriving::begin(node, migration, &container, &cut.node).await?;
    check_absent(node, &container).await?;
    let peers = look_for_original(node, &container, asked.although_it_may_run).await?;
    let described = description(&cut)?;
    let there =
        HelloResponse { architecture: cut.architecture.clone(), ..HelloResponse::default() };
    pre_flight(node, &there, &described)?;
    let missing = fit::obstacles(node, asked.netns.as_deref(), &described).await?;
    obstacles::check(&missing)?;
    let target = image_of(&described)?;
    let namespace = container.namespace();
    let name = image::name_here(node, namespace, &described, &target).await?;
    let named = (name.as_str(), &target);
    let holders = image::BlobPeers::Neighbours(&peers);
    let content = image::bring(node, namespace, named, &described.snapshotter, holders).await?;
    check_chain(&described, &content)?;
    let from = MigrateFrom { node: cut.node.clone(), container: container.clone() };
    let request =
        request::Request { from, settings: Settings::default(), netns: asked.netns.clone() };
    let origin = (annotation::RESTORE_FROM, snapshot.root.to_string());
    let record = record_with(node, &request, &described, origin)?;
    create_and_start(sessions, arriving, record, &content, || {
        sessions.name_next(&container, migration);
    })
    .await
}

/// The snapshot of a cut on this node, and the cut. Errors: it is none.
async fn find(node: &Node, id: SnapshotId) -> Result<(Snapshot, Cut), MigrationError> {
    let store = node.store.clone();
    blocking(move || {
        let all = store.all_snapshots()?.into_iter();
        let found = all.into_iter().find(|(one, _)| *one == id).map(|(_, snapshot)| snapshot);
        let snapshot = found.ok_or(StoreError::UnknownSnapshot(id))?;
        if snapshot.root_kind != Kind::Cut as u8 {
            return Err(MigrationError::NoCut(id));
        }
        let cut = store.decode::<Cut>(&snapshot.root)?;
        Ok((snapshot, cut))
    })
    .await
}

/// Whose cut it is. Errors: it is not on this node.
pub async fn origin(node: &Node, cut: Digest) -> Result<MigrateFrom, MigrationError> {
    let store = node.store.clone();
    let cut = blocking(move || Ok(store.decode::<Cut>(&cut)?)).await?;
    Ok(MigrateFrom { node: cut.node.clone(), container: container_of(&cut)? })
}

fn container_of(cut: &Cut) -> Result<ContainerRef, MigrationError> {
    let wrong = MigrationError::Protocol("a cut without a container's name");
    let (namespace, id) = cut.container.split_once('/').ok_or(wrong)?;
    Ok(ContainerRef::new(namespace, id)?)
}

fn description(cut: &Cut) -> Result<DescribeResponse, MigrationError> {
    let unreadable = |_cause| MigrationError::Protocol("a cut whose description cannot be read");
    DescribeResponse::decode(&cut.description[..]).map_err(unreadable)
}

/// What a peer says of the original.
#[derive(Debug, PartialEq, Eq)]
enum Original {
    Absent,
    /// It runs there, or is on its way there.
    Elsewhere(String),
    Present(String),
    Unknown(String),
}

/// Asks every peer for the original. Returns those that answer.
///
/// Errors: [`MigrationError::RunsElsewhere`]; [`MigrationError::MayRun`] unless it `may` or every
/// peer has answered that it has no such container.
async fn look_for_original(
    node: &Arc<Node>,
    container: &ContainerRef,
    may: bool,
) -> Result<Vec<Arc<Connection>>, MigrationError> {
    let ask = node.config.peers.iter().map(|peer| async {
        let opened = Connection::open(&node.config, &peer.name, NEIGHBOUR_MAX).await;
        let asked = async {
            let connection = Arc::new(opened?);
            let limit = NEIGHBOUR_MAX;
            let described = tokio::time::timeout(limit, describe_at(&connection, container)).await;
            let late = PeerError::Slow { node: peer.name.clone(), limit };
            Ok::<_, MigrationError>((connection, described.map_err(|_elapsed| late)?))
        };
        match asked.await {
            Err(error) => (Original::Unknown(error.chain()), None),
            Ok((connection, Ok(_))) => {
                (Original::Elsewhere(format!("runs on {}", peer.name)), Some(connection))
            }
            Ok((connection, Err(MigrationError::Peer(PeerError::Refused { status, .. })))) => {
                let words = format!("is on {}: {}", peer.name, status.message());
                let original = match status.code() {
                    tonic::Code::NotFound => Original::Absent,
                    tonic::Code::Aborted => Original::Elsewhere(words),
                    _ => Original::Present(words),
                };
                (original, Some(connection))
            }
            Ok((_, Err(error))) => (Original::Unknown(error.chain()), None),
        }
    });
    let answers = futures::future::join_all(ask).await;
    let (mut elsewhere, mut doubts) = (Vec::new(), Vec::new());
    for (original, _) in &answers {
        match original {
            Original::Absent => {}
            Original::Elsewhere(words) => elsewhere.push(words.as_str()),
            Original::Present(words) | Original::Unknown(words) => doubts.push(words.as_str()),
        }
    }
    if !elsewhere.is_empty() {
        let (container, there) = (container.clone(), elsewhere.join("; "));
        return Err(MigrationError::RunsElsewhere { container, there });
    }
    let doubts = doubts.join("; ");
    if !doubts.is_empty() && !may {
        return Err(MigrationError::MayRun { container: container.clone(), doubts });
    }
    Ok(answers.into_iter().filter_map(|(_, connection)| connection).collect())
}

impl Work {
    /// The session of a restore: lays the cut out and hands it to the shim.
    ///
    /// The grant is this node's own: no other node is asked, as none could release the container.
    pub(super) async fn restore(&mut self, root: &Digest) -> Result<Report, MigrationError> {
        let begun = Instant::now();
        let (store, digest) = (self.node.store.clone(), *root);
        let lease = self.node.store.lease("restore", RESTORE_MAX);
        let cut = blocking(move || Ok(store.decode::<Cut>(&digest)?)).await?;
        if !self.is_requested {
            // A request has looked for it.
            look_for_original(&self.node, &self.asked.container, false).await?;
        }
        let manifests = self.parts(&cut)?;
        self.check_image(&description(&cut)?.chain_id).await?;
        let mut layout = self.layout()?;
        let outcome = self.lay_out_and_run(&cut, manifests, &mut layout).await;
        let (volumes, failed) = (self.node.volumes.clone(), outcome.is_err());
        let may_discard = self.may_discard;
        let cleared = tokio::task::spawn_blocking(move || {
            if !failed {
                layout.settle();
                layout.remove_staged();
            } else if may_discard {
                layout.discard(&volumes);
            }
        });
        let _ = cleared.await;
        drop(lease);
        let running = outcome?;
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        let total = millis(running - begun);
        Ok(Report {
            migration: self.id.clone(),
            container: self.asked.container.to_string(),
            mode: "restore".to_owned(),
            source: cut.node,
            destination: self.node.config.node.clone(),
            total_ms: total,
            downtime_ms: total,
            phases_ms: Phases { restore: total, ..Phases::default() },
            subjects: cut
                .parts
                .into_iter()
                .map(|part| Share { subject: part.subject, ..Share::default() })
                .collect(),
            ..Report::default()
        })
    }

    /// The parts of the cut. Errors: a volume that the container does not mount here.
    fn parts(&self, cut: &Cut) -> Result<Parsed, MigrationError> {
        if container_of(cut)? != self.asked.container {
            return Err(MigrationError::Protocol("a cut of another container"));
        }
        let parse = |part: &crate::content::object::Part| -> Result<_, MigrationError> {
            let subject: Subject = part.subject.parse()?;
            let kind = kind_told(&subject, part.kind.into());
            let kind =
                kind.ok_or(MigrationError::Protocol("a kind that the subject cannot have"))?;
            Ok((subject, (kind, part.root), 0))
        };
        let parts = cut.parts.iter().map(parse).collect::<Result<Parsed, _>>()?;
        for (subject, ..) in &parts {
            let Subject::Volume(id) = subject else { continue };
            let mounted = godwit_protos::VolumeSource::Writable(id.clone());
            if !self.asked.volumes.contains(&mounted) {
                return Err(MigrationError::Protocol("a volume that is not the container's"));
            }
            self.node.volumes.may_receive(id)?;
        }
        Ok(parts)
    }

    async fn lay_out_and_run(
        &mut self,
        cut: &Cut,
        manifests: Parsed,
        layout: &mut Layout,
    ) -> Result<Instant, MigrationError> {
        layout.clear_layer()?;
        let volumes = self.node.volumes.clone();
        layout.work_on(move |layout| layout.finish(&manifests, &volumes)).await?;
        self.node.events.step(&self.id, "hand-off", "restoring");
        let _ = self.publish.send(State::Ready(Acquired::Restore {
            session: self.id.clone(),
            image_path: layout.images(),
            work_path: layout.work(),
        }));
        let answer = match self.command().await? {
            Command::Claim(answer) => answer,
            Command::Settle(settlement, done) => {
                let _ = done.send(());
                return Err(MigrationError::Restore(settlement.reason));
            }
        };
        let container = self.asked.container.clone();
        let known = self.node.journal.ledger(&container)?.last();
        let epoch = known.max(Epoch(cut.epoch.min(EPOCH_MAX))).next();
        self.journal_claim(epoch).await?;
        self.node.journal.apply(&container, &Event::Granted(epoch), |_| {})?;
        self.may_discard = false;
        let _ = answer.send(Ok(()));
        self.settled(None, epoch).await
    }
}
