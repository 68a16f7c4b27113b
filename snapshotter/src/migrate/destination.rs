//! The destination's side of a migration: one session per container that comes here.
//!
//! ```text
//!  acquire ─► pre-copy rounds ─► stop ─► lay out ─► Ready ─► claim ─► release ─► settle ─► report
//!             container runs     frozen at the source ...            │ journal Claiming, ask, journal Owner
//! ```
//!
//! A session goes on when its caller goes away; the next `acquire` for the same container finds it further on. It ends
//! with a report, or with an error: then the source is told to abort, and what was staged here is removed. The shim asks
//! [`claim`] when the container is restored and held. Only a journalled `Owner` lets it run. A claim whose session is
//! gone, because the daemon restarted, is answered from the journal and the source's word.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_protos::peer::{
    Abort, Begin, FromSource, Manifest, Release, Round, Settled, Stop, Stopped, ToSource,
    from_source, to_source,
};
use godwit_protos::{ContainerRef, Digest, MigrateFrom, Subject, VolumeId, VolumeSource};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::layout::Layout;
use super::ownership::{Epoch, Event, Ownership};
use super::report::{Phases, Report, Share};
use super::{MigrationError, rounds};
use crate::content::object::Kind;
use crate::node::Node;
use crate::peer::fetch::{Brought, fetch};
use crate::peer::{Connection, PeerError};
use crate::store::Lease;

/// How long a neighbour has to answer a hello and a lookup. Whoever is slower is not asked.
pub const LOOKUP_MAX: Duration = Duration::from_millis(300);

/// How long the source has to answer a hello.
const SOURCE_MAX: Duration = Duration::from_secs(10);

/// How long the source has for a round and for the cut.
const SOURCE_WORK_MAX: Duration = Duration::from_secs(600);

/// How long the shim has to restore and claim, and to report the end of the restore.
const SHIM_MAX: Duration = Duration::from_secs(240);

/// How long a lost answer to a release is asked for again.
const RELEASE_RETRY_MAX: Duration = Duration::from_secs(45);

/// Lifetime of the lease on what a migration brought; renewed with each round.
const LEASE: Duration = Duration::from_secs(3600);

/// Settings of one migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Whether neighbours are asked.
    pub cooperative: bool,
    /// Rounds of pre-copy at most; 0 is the default.
    pub max_rounds: u32,
    /// Whether the writable layer comes along.
    pub writable_layer: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self { cooperative: true, max_rounds: 0, writable_layer: true }
    }
}

/// Open connections of one migration, made before its container was created here.
#[derive(Clone, Debug)]
pub struct Connections {
    /// The node that runs the container.
    pub source: Arc<Connection>,
    /// Nodes that answered in time; none in traditional mode.
    pub neighbours: Vec<Arc<Connection>>,
}

/// What a migration starts from.
#[derive(Clone, Debug)]
pub struct Prepared {
    /// Its identifier in logs and events.
    pub migration: String,
    /// When it was asked for.
    pub begun: Instant,
    /// Connections, so that their traffic counts.
    pub connections: Connections,
    /// Remove task and container at the source in the end.
    pub remove_source: bool,
}

/// What a shim asks for.
#[derive(Clone, Debug)]
pub struct Acquire {
    /// The container, as it is called here.
    pub container: ContainerRef,
    /// Where it comes from.
    pub from: MigrateFrom,
    /// Directory of its writable layer here, if it has one.
    pub upper_dir: Option<PathBuf>,
    /// The volumes that its own specification mounts.
    pub volumes: Vec<VolumeSource>,
    /// Settings from its annotations.
    pub settings: Settings,
}

/// What a shim gets.
#[derive(Clone, Debug)]
pub enum Acquired {
    /// The annotation is spent: start in the ordinary way.
    StartFresh,
    /// Restore from here.
    Restore {
        /// Names the session in `claim` and `settle`.
        session: String,
        /// CRIU's image directory.
        image_path: PathBuf,
        /// A directory for logs.
        work_path: PathBuf,
    },
}

#[derive(Clone, Debug)]
enum State {
    Working,
    Ready(Acquired),
    Failed(Arc<MigrationError>),
}

/// How the restore of a claimed container ended.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// Whether the tasks run.
    pub running: bool,
    /// Why not.
    pub reason: String,
}

enum Command {
    Claim(oneshot::Sender<Result<(), String>>),
    Settle(Settlement, oneshot::Sender<()>),
}

struct Session {
    id: String,
    state: watch::Receiver<State>,
    commands: mpsc::Sender<Command>,
}

/// The sessions of a node, and what [`super::request`] has prepared for sessions to come.
#[derive(Default)]
pub struct Sessions {
    live: Mutex<HashMap<ContainerRef, Arc<Session>>>,
    prepared: Mutex<HashMap<ContainerRef, Prepared>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sessions({})", self.live().len())
    }
}

impl Sessions {
    fn live(&self) -> MutexGuard<'_, HashMap<ContainerRef, Arc<Session>>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves what is prepared for the session that the container's shim will begin.
    pub fn prepare(&self, container: &ContainerRef, prepared: Prepared) {
        let mut all = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(container.clone(), prepared);
    }

    /// Takes back what was prepared.
    pub fn take_prepared(&self, container: &ContainerRef) -> Option<Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).remove(container)
    }

    fn by_id(&self, id: &str) -> Option<Arc<Session>> {
        self.live().values().find(|session| session.id == id).cloned()
    }
}

/// Opens connections to the source and, in cooperative mode, to every neighbour that answers in time.
///
/// Errors: [`PeerError`] when the source does not answer; a neighbour that does not is left out.
pub async fn connect(
    node: &Node,
    source: &str,
    settings: &Settings,
) -> Result<Connections, PeerError> {
    let others = node.config.peers.iter().filter(|peer| peer.name != source);
    let neighbours = others.filter(|_| settings.cooperative).map(|peer| async {
        match Connection::open(&node.config, &peer.name, LOOKUP_MAX).await {
            Ok(connection) => Some(Arc::new(connection)),
            Err(error) => {
                tracing::info!(node = %peer.name, error = super::chain(&error), "not asked");
                None
            }
        }
    });
    let (source, neighbours) = tokio::join!(
        Connection::open(&node.config, source, SOURCE_MAX),
        futures::future::join_all(neighbours)
    );
    let neighbours = neighbours.into_iter().flatten().collect();
    Ok(Connections { source: Arc::new(source?), neighbours })
}

/// Brings a container's state here and has the source stop it. See the module's comment.
///
/// - Cancel: dropping the future leaves the session going; call again to wait on.
/// - Errors: why the session failed. The container runs at its source.
pub async fn acquire(node: &Arc<Node>, asked: Acquire) -> Result<Acquired, Arc<MigrationError>> {
    let entry = node.journal.container(&asked.container).map_err(|error| Arc::new(error.into()))?;
    if entry.is_some_and(|entry| entry.has_spent(&asked.from.to_string())) {
        return Ok(Acquired::StartFresh);
    }
    let session = {
        let mut live = node.sessions.live();
        match live.get(&asked.container) {
            Some(session) if session.state.has_changed().is_ok() => session.clone(),
            _ => {
                let session = Arc::new(begin(node.clone(), asked.clone()));
                live.insert(asked.container.clone(), session.clone());
                session
            }
        }
    };
    let mut state = session.state.clone();
    let outcome = state.wait_for(|state| !matches!(state, State::Working)).await;
    match outcome.map(|state| state.clone()) {
        Ok(State::Ready(acquired)) => Ok(acquired),
        Ok(State::Failed(error)) => Err(error),
        Ok(State::Working) | Err(_) => Err(Arc::new(MigrationError::Interrupted)),
    }
}

/// Asks for the right to let a restored, held container run.
///
/// Returns why not, in words, when it must never run.
pub async fn claim(node: &Arc<Node>, session: &str) -> Result<(), String> {
    if let Some(session) = node.sessions.by_id(session) {
        let (answer, answered) = oneshot::channel();
        if session.commands.send(Command::Claim(answer)).await.is_ok()
            && let Ok(verdict) = answered.await
        {
            return verdict;
        }
    }
    claim_from_journal(node, session).await
}

/// Tells how the restore ended. Idempotent.
pub async fn settle(node: &Arc<Node>, session: &str, settlement: Settlement) {
    if let Some(session) = node.sessions.by_id(session) {
        let (answer, answered) = oneshot::channel();
        let command = Command::Settle(settlement.clone(), answer);
        if session.commands.send(command).await.is_ok() && answered.await.is_ok() {
            return;
        }
    }
    if let Some((container, entry)) = journalled(node, session) {
        let outcome = match (&entry.ownership, settlement.running) {
            (_, true) => node.journal.mark_resumed(&container),
            (Ownership::Claiming(epoch, from), false) => {
                give_back(node, &container, *epoch, from.clone())
            }
            (_, false) => Ok(()),
        };
        if let Err(error) = outcome {
            tracing::error!(%container, %error, "cannot journal how the restore ended");
        }
    }
}

fn journalled(node: &Node, session: &str) -> Option<(ContainerRef, super::journal::Entry)> {
    let entries = node.journal.containers().ok()?;
    entries.into_iter().find(|(_, entry)| entry.session.as_deref() == Some(session))
}

fn give_back(
    node: &Node,
    container: &ContainerRef,
    epoch: Epoch,
    to: String,
) -> Result<(), super::journal::JournalError> {
    node.journal.apply(container, &Event::GiveBack(epoch, to), |_| {}).map(drop)
}

/// A claim after a restart: what the journal says, and the source if the answer to the release was lost.
async fn claim_from_journal(node: &Node, session: &str) -> Result<(), String> {
    let Some((container, entry)) = journalled(node, session) else {
        return Err("the migration is over; the container runs at its source".to_owned());
    };
    match entry.ownership {
        Ownership::Owner(_) => Ok(()),
        Ownership::Claiming(epoch, from) => ask_again(node, &container, epoch, &from).await,
        other => Err(format!("the container is {} here", other.word())),
    }
}

/// Asks the source whether it has released the container; until it answers, nobody may run it here.
async fn ask_again(
    node: &Node,
    container: &ContainerRef,
    epoch: Epoch,
    from: &str,
) -> Result<(), String> {
    let deadline = Instant::now() + RELEASE_RETRY_MAX;
    loop {
        let answer = super::source::ask_owner(node, from).await;
        match answer {
            Ok((state, at)) if state == "released" && at == epoch => {
                let granted = node.journal.apply(container, &Event::Granted(epoch), |_| {});
                return granted.map(drop).map_err(|error| error.to_string());
            }
            Ok((state, _)) if state != "offered" => {
                let given = give_back(node, container, epoch, from.to_owned());
                given.map_err(|error| error.to_string())?;
                return Err(format!("the source did not release it: it is {state} there"));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%container, error = error.chain(), "asking for the release again");
            }
        }
        if Instant::now() > deadline {
            return Err("the source does not say whether it released the container".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn begin(node: Arc<Node>, asked: Acquire) -> Session {
    let prepared = node.sessions.take_prepared(&asked.container);
    let id = node.new_id();
    let (publish, state) = watch::channel(State::Working);
    let (commands, inbox) = mpsc::channel(4);
    let session = Session { id: id.clone(), state, commands };
    tokio::spawn(async move {
        let container = asked.container.clone();
        let migration =
            prepared.as_ref().map_or_else(|| id.clone(), |prepared| prepared.migration.clone());
        let mut work =
            Work { node: node.clone(), asked, id, publish, inbox, migration, may_discard: true };
        match work.run(prepared).await {
            Ok(report) => node.events.done(&work.migration, &report),
            Err(error) => {
                let error = Arc::new(error);
                tracing::warn!(%container, error = error.chain(), "migration failed");
                node.events.failed(&work.migration, &error);
                let _ = work.publish.send(State::Failed(error));
            }
        }
        // Dropping the publisher ends the session: the next acquire begins a new one.
        drop(work);
    });
    session
}

struct Work {
    node: Arc<Node>,
    asked: Acquire,
    id: String,
    migration: String,
    publish: watch::Sender<State>,
    inbox: mpsc::Receiver<Command>,
    /// False from the grant on: the tasks may have run, so what they run on stays.
    may_discard: bool,
}

/// The two directions of the hand-off stream.
struct Line {
    to: mpsc::Sender<ToSource>,
    from: Streaming<FromSource>,
}

impl Line {
    async fn send(&self, message: to_source::Message) -> Result<(), MigrationError> {
        let sent = self.to.send(ToSource { message: Some(message) }).await;
        sent.map_err(|_cause| MigrationError::Broken("the source hung up".to_owned()))
    }

    async fn next(&mut self) -> Result<from_source::Message, MigrationError> {
        match tokio::time::timeout(SOURCE_WORK_MAX, self.from.message()).await {
            Err(_) => Err(MigrationError::Silent { patience: SOURCE_WORK_MAX }),
            Ok(Err(status)) => Err(MigrationError::Broken(status.message().to_owned())),
            Ok(Ok(None)) => Err(MigrationError::Broken("the source hung up".to_owned())),
            Ok(Ok(Some(FromSource { message: None }))) => {
                Err(MigrationError::Protocol("an empty message"))
            }
            Ok(Ok(Some(FromSource { message: Some(from_source::Message::Refusal(refusal)) }))) => {
                Err(MigrationError::Refused { code: refusal.code, detail: refusal.detail })
            }
            Ok(Ok(Some(FromSource { message: Some(message) }))) => Ok(message),
        }
    }
}

impl Work {
    async fn run(&mut self, prepared: Option<Prepared>) -> Result<Report, MigrationError> {
        let prepared = match prepared {
            Some(prepared) => prepared,
            None => Prepared {
                migration: self.migration.clone(),
                begun: Instant::now(),
                connections: connect(&self.node, &self.asked.from.node, &self.asked.settings)
                    .await?,
                remove_source: false,
            },
        };
        for volume in &self.asked.volumes {
            if let VolumeSource::Writable(id) = volume {
                self.node.volumes.may_receive(id)?;
            }
        }
        let lease = Arc::new(self.node.store.lease("migration", LEASE));
        let mut layout = Layout::begin(&self.node, &self.id, self.asked.upper_dir.clone())?;
        let mut line = self.open_line(&prepared).await?;
        let outcome = self.migrate(&prepared, &lease, &mut layout, &mut line).await;
        if let Err(error) = &outcome {
            let reason = error.chain();
            let _ = line.send(to_source::Message::Abort(Abort { reason })).await;
            if self.may_discard {
                let volumes = self.node.volumes.clone();
                let _ = tokio::task::spawn_blocking(move || layout.discard(&volumes)).await;
            }
        }
        outcome
    }

    async fn open_line(&self, prepared: &Prepared) -> Result<Line, MigrationError> {
        let source = &prepared.connections.source;
        let (to, outbound) = mpsc::channel(8);
        let begin = Begin {
            container: Some(godwit_protos::peer::Container {
                namespace: self.asked.from.container.namespace().to_owned(),
                id: self.asked.from.container.id().to_owned(),
            }),
            destination: self.node.config.node.clone(),
            migration: self.migration.clone(),
            without_writable_layer: !self.asked.settings.writable_layer
                || self.asked.upper_dir.is_none(),
            remove_source: prepared.remove_source,
            r#as: Some(godwit_protos::peer::Container {
                namespace: self.asked.container.namespace().to_owned(),
                id: self.asked.container.id().to_owned(),
            }),
        };
        let message = Some(to_source::Message::Begin(begin));
        let sent = to.send(ToSource { message }).await;
        sent.map_err(|_cause| MigrationError::Interrupted)?;
        let call = source.client().hand_off(ReceiverStream::new(outbound)).await;
        let from = call.map_err(|status| source.refused(status))?.into_inner();
        Ok(Line { to, from })
    }

    async fn migrate(
        &mut self,
        prepared: &Prepared,
        lease: &Arc<Lease>,
        layout: &mut Layout,
        line: &mut Line,
    ) -> Result<Report, MigrationError> {
        let epoch = match line.next().await? {
            from_source::Message::Begun(begun) => Epoch(begun.epoch),
            _ => return Err(MigrationError::Protocol("expected begun")),
        };
        let mut shares = Shares::default();
        self.bring_contents(prepared, lease, &mut shares).await?;
        let rounds = self.pre_copy(prepared, lease, layout, line, &mut shares).await?;
        lease.renew()?;

        let pre_copy = prepared.begun.elapsed();
        let received = prepared.connections.source.traffic.received();
        let stop = Instant::now();
        self.node.events.step(&self.migration, "stop", "freezing the container at its source");
        line.send(to_source::Message::Stop(Stop { held: Vec::new() })).await?;
        let stopped = self.stop_and_copy(lease, layout, line).await?;
        if Epoch(stopped.epoch) != epoch {
            return Err(MigrationError::Protocol("the epoch changed"));
        }
        for manifest in &stopped.manifests {
            shares.size(&manifest.subject, manifest.size_bytes);
        }
        let stop_and_copy_bytes = prepared.connections.source.traffic.received() - received;
        let ready = Instant::now();

        self.node.events.step(&self.migration, "hand-off", "restoring");
        let _ = self.publish.send(State::Ready(Acquired::Restore {
            session: self.id.clone(),
            image_path: layout.images(),
            work_path: layout.work(),
        }));
        self.hand_off(line, epoch).await?;
        let running = Instant::now();

        self.finish(lease, layout, &stopped).await;
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        let source_ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1e3;
        let (freeze, dump) = (source_ms(stopped.freeze_us), source_ms(stopped.dump_us));
        let transfer = (millis(ready - stop) - freeze - dump).max(0.0);
        let sources = std::iter::once(&prepared.connections.source);
        Ok(Report {
            migration: self.migration.clone(),
            container: self.asked.container.to_string(),
            mode: mode_word(&self.asked.settings).to_owned(),
            source: self.asked.from.node.clone(),
            destination: self.node.config.node.clone(),
            total_ms: millis(running - prepared.begun),
            downtime_ms: millis(running - stop),
            rounds,
            phases_ms: Phases {
                pre_copy: millis(pre_copy),
                freeze,
                dump,
                transfer,
                restore: millis(running - ready),
            },
            wire_bytes_by_node: sources
                .chain(&prepared.connections.neighbours)
                .map(|peer| (peer.node.clone(), peer.traffic.received()))
                .collect(),
            stop_and_copy_bytes,
            subjects: shares.into_list(),
        })
    }

    /// Read-only volumes, by digest: neighbours first.
    async fn bring_contents(
        &self,
        prepared: &Prepared,
        lease: &Arc<Lease>,
        shares: &mut Shares,
    ) -> Result<(), MigrationError> {
        for volume in &self.asked.volumes {
            let VolumeSource::Content(digest) = volume else { continue };
            if self.node.volumes.has_content(digest) {
                continue;
            }
            self.node.events.step(&self.migration, "pre-copy", &format!("volume {digest}"));
            let root = [(Kind::Tree, *digest)];
            let brought =
                fetch(&self.node.store, lease, &prepared.connections.peers(), &root).await?;
            shares.add(&volume.to_string(), &brought);
            let (volumes, digest) = (self.node.volumes.clone(), *digest);
            blocking(move || Ok(volumes.lay_out(&digest).map(drop)?)).await?;
        }
        Ok(())
    }

    async fn pre_copy(
        &self,
        prepared: &Prepared,
        lease: &Arc<Lease>,
        layout: &mut Layout,
        line: &mut Line,
        shares: &mut Shares,
    ) -> Result<u32, MigrationError> {
        let (mut changed, mut number) = (Vec::new(), 0);
        while rounds::another(&changed, self.asked.settings.max_rounds) {
            number += 1;
            self.node.events.step(&self.migration, "pre-copy", &format!("round {number}"));
            line.send(to_source::Message::Round(Round { number })).await?;
            let done = match line.next().await? {
                from_source::Message::RoundDone(done) if done.number == number => done,
                _ => return Err(MigrationError::Protocol("expected the end of the round")),
            };
            changed.push(done.manifests.iter().map(|manifest| manifest.changed_bytes).sum());
            lease.renew()?;
            let manifests = parse_manifests(&done.manifests)?;
            let peers = prepared.connections.peers();
            for (subject, root, _) in &manifests {
                let root = [(kind_of(subject), *root)];
                let brought = fetch(&self.node.store, lease, &peers, &root).await?;
                shares.add(&subject.to_string(), &brought);
            }
            // Patching trees each round keeps what is left for after the stop small; memory is staged once, below.
            let (mut at, trees) = (layout.clone(), manifests);
            *layout = blocking(move || at.stage(&trees).map(|()| at)).await?;
        }
        let mut at = layout.clone();
        *layout = blocking(move || at.stage_memory().map(|()| at)).await?;
        Ok(number)
    }

    async fn stop_and_copy(
        &self,
        lease: &Arc<Lease>,
        layout: &mut Layout,
        line: &mut Line,
    ) -> Result<Stopped, MigrationError> {
        let (batches, receive) = std::sync::mpsc::sync_channel(4);
        let (store, lease) = (self.node.store.clone(), lease.clone());
        let keeping = tokio::task::spawn_blocking(move || {
            super::layout::keep_stream(&store, &lease, &receive)
        });
        let stopped = loop {
            match line.next().await? {
                from_source::Message::Objects(batch) => {
                    let batches = batches.clone();
                    let sent = tokio::task::spawn_blocking(move || batches.send(batch)).await;
                    if !matches!(sent, Ok(Ok(()))) {
                        break None;
                    }
                }
                from_source::Message::Stopped(stopped) => break Some(stopped),
                _ => {
                    return Err(MigrationError::Protocol("expected objects or the end of the stop"));
                }
            }
        };
        drop(batches);
        keeping.await.map_err(|_cause| MigrationError::Interrupted)??;
        let stopped = stopped.ok_or(MigrationError::Interrupted)?;
        let manifests = parse_manifests(&stopped.manifests)?;
        let mut at = layout.clone();
        let volumes = self.node.volumes.clone();
        *layout = blocking(move || at.finish(&manifests, &volumes).map(|()| at)).await?;
        Ok(stopped)
    }

    /// From the shim's claim to its word on how the restore ended.
    async fn hand_off(&mut self, line: &mut Line, epoch: Epoch) -> Result<(), MigrationError> {
        let container = self.asked.container.clone();
        let answer = match self.command().await? {
            Command::Claim(answer) => answer,
            Command::Settle(settlement, done) => {
                let _ = done.send(());
                return Err(MigrationError::Restore(settlement.reason));
            }
        };
        let from = self.asked.from.to_string();
        let (session, migrate_from) = (self.id.clone(), from.clone());
        self.node.journal.apply(&container, &Event::Claim(epoch, from.clone()), |entry| {
            entry.session = Some(session);
            entry.migrate_from = Some(migrate_from);
            entry.resumed = false;
        })?;
        let asked = line.send(to_source::Message::Release(Release { epoch: epoch.0 })).await;
        let told = match asked {
            Ok(()) => line.next().await,
            Err(error) => Err(error),
        };
        let verdict = match told {
            Ok(from_source::Message::Released(released)) if Epoch(released.epoch) == epoch => {
                let granted = self.node.journal.apply(&container, &Event::Granted(epoch), |_| {});
                granted.map(drop).map_err(|error| error.to_string())
            }
            Err(MigrationError::Refused { code, detail }) => {
                give_back(&self.node, &container, epoch, from)?;
                Err(format!("the source refused ({code}): {detail}"))
            }
            // The answer is lost, which says nothing about the release.
            _ => ask_again(&self.node, &container, epoch, &from).await,
        };
        self.may_discard = verdict.is_err();
        let _ = answer.send(verdict.clone());
        if let Err(reason) = verdict {
            // The shim ends the held tasks before what they are made of goes.
            if let Ok(Ok(Command::Settle(_, done))) =
                tokio::time::timeout(Duration::from_secs(30), self.command()).await
            {
                let _ = done.send(());
            }
            return Err(MigrationError::Restore(reason));
        }
        self.settled(line, epoch).await
    }

    async fn settled(&mut self, line: &mut Line, epoch: Epoch) -> Result<(), MigrationError> {
        let container = self.asked.container.clone();
        let (settlement, done) = loop {
            match self.command().await? {
                Command::Settle(settlement, done) => break (settlement, done),
                // The shim asks again when it lost the answer.
                Command::Claim(answer) => drop(answer.send(Ok(()))),
            }
        };
        if settlement.running {
            self.node.journal.mark_resumed(&container)?;
        } else {
            give_back(&self.node, &container, epoch, self.asked.from.to_string())?;
            self.may_discard = true;
        }
        let _ = done.send(());
        let told = Settled { running: settlement.running, reason: settlement.reason.clone() };
        // Should it be lost, the source asks.
        let _ = line.send(to_source::Message::Settled(told)).await;
        if settlement.running { Ok(()) } else { Err(MigrationError::Restore(settlement.reason)) }
    }

    async fn command(&mut self) -> Result<Command, MigrationError> {
        match tokio::time::timeout(SHIM_MAX, self.inbox.recv()).await {
            Ok(Some(command)) => Ok(command),
            Ok(None) => Err(MigrationError::Interrupted),
            Err(_) => Err(MigrationError::Unclaimed(SHIM_MAX)),
        }
    }

    /// Keeps the cut as snapshots, which serve the next migration, and removes what was staged.
    async fn finish(&self, lease: &Arc<Lease>, layout: &mut Layout, stopped: &Stopped) {
        let Ok(manifests) = parse_manifests(&stopped.manifests) else { return };
        let node = self.node.config.node.clone();
        let sizes = stopped.manifests.iter().map(|manifest| manifest.size_bytes);
        let snapshots = manifests.iter().zip(sizes).map(|((subject, root, sequence), bytes)| {
            super::snapshot(subject, kind_of(subject), *root, bytes, *sequence, &node)
        });
        let (store, keep, snapshots) =
            (self.node.store.clone(), self.node.config.keep_last, snapshots.collect());
        let (lease, layout) = (lease.clone(), layout.clone());
        let kept = tokio::task::spawn_blocking(move || {
            let kept = super::keep_snapshots(&store, snapshots, keep);
            layout.remove_staged();
            drop(lease);
            kept
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(container = %self.asked.container, %error, "cannot keep the snapshots");
        }
    }
}

impl Connections {
    /// Whom to fetch from.
    pub fn peers(&self) -> crate::peer::fetch::Peers {
        let (neighbours, source) = (self.neighbours.clone(), self.source.clone());
        crate::peer::fetch::Peers { neighbours, source }
    }
}

/// "cooperative" or "traditional".
pub fn mode_word(settings: &Settings) -> &'static str {
    if settings.cooperative { "cooperative" } else { "traditional" }
}

/// The kind of object that a subject's manifest is.
pub fn kind_of(subject: &Subject) -> Kind {
    match subject {
        Subject::Volume(_) | Subject::Layer(_) => Kind::Tree,
        Subject::Memory { .. } => Kind::Memory,
    }
}

/// Subject, root and sequence of each manifest.
pub(super) type Parsed = Vec<(Subject, Digest, u64)>;

fn parse_manifests(manifests: &[Manifest]) -> Result<Parsed, MigrationError> {
    let parse = |manifest: &Manifest| -> Result<_, MigrationError> {
        let root = Digest::try_from(&manifest.digest[..])?;
        Ok((manifest.subject.parse()?, root, manifest.sequence))
    };
    manifests.iter().map(parse).collect()
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MigrationError> + Send + 'static,
) -> Result<T, MigrationError> {
    tokio::task::spawn_blocking(work).await.map_err(|_cause| MigrationError::Interrupted)?
}

/// What each subject cost, for the report.
#[derive(Default)]
struct Shares(HashMap<String, Share>);

impl Shares {
    fn of(&mut self, subject: &str) -> &mut Share {
        let fresh = || Share { subject: subject.to_owned(), ..Share::default() };
        self.0.entry(subject.to_owned()).or_insert_with(fresh)
    }

    fn add(&mut self, subject: &str, brought: &Brought) {
        let share = self.of(subject);
        for (node, (_, bytes)) in brought {
            *share.raw_bytes_by_node.entry(node.clone()).or_default() += bytes;
        }
    }

    fn size(&mut self, subject: &str, bytes: u64) {
        self.of(subject).size_bytes = bytes;
    }

    fn into_list(self) -> Vec<Share> {
        let mut list: Vec<Share> = self.0.into_values().collect();
        list.sort_by(|one, other| one.subject.cmp(&other.subject));
        list
    }
}

/// Volumes that a layout has put in place.
pub(super) type Installed = Vec<VolumeId>;

/// Removes everything below a directory, but not the directory.
pub(super) fn clear(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            std::fs::remove_dir_all(entry.path())?;
        } else {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
