//! The destination's side of a migration: one session per container that comes here.
//!
//! ```text
//!  acquire ─► pre-copy rounds ─► stop ─► lay out ─► Ready ─► claim ─► release ─► settle ─► report
//!             container runs     frozen at the source ...            │ journal Claiming, ask, journal Owner
//! ```
//!
//! A session goes on when its caller goes away; the next `acquire` for the same container finds it
//! further on. It ends with a report, or with an error: then it sends the source an abort, and what
//! was staged here is removed. The shim asks [`claim`] when the container is restored and held.
//! Only a journalled `Owner` lets it run. A claim whose session is gone, because the daemon
//! restarted, is answered from the journal and the source's word. Read next: [`super::session`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use godwit_protos::{
    ContainerRef, Digest, MigrateFrom, ServiceRef, Subject, VolumeSource, annotation,
};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::outcome::Failure;
use super::session::begin;
use super::spec::Outline;
use super::{MigrationError, arrival, marks};
use crate::content::object::Kind;
use crate::directory::{Entry, Joined, Lookup, Query};
use crate::node::Node;
use crate::ownership::fate::{AtDestination, Fate};
use crate::ownership::journal::JournalError;
use crate::ownership::{Epoch, Event, Ownership};
use crate::peer::fetch::{PeerHealth, Peers};
use crate::peer::link::MEASURED_BYTES_MIN;
use crate::peer::{Connection, PeerError};
use crate::policy::rounds::ROUNDS_MAX;

/// How long a request waits for its session to be over: it thaws the source, and keeps what came.
const SESSION_ENDS_MAX: Duration = Duration::from_secs(30);

/// How long the reason of a failed session waits for its request, which asks within
/// [`SESSION_ENDS_MAX`] or has given up.
const FAILURE_KEPT: Duration = Duration::from_secs(600);

/// How long a migration waits for neighbours to answer a hello before it goes on without them.
const NEIGHBOURS_WAIT: Duration = Duration::from_millis(50);

/// How long a neighbour has to answer a hello; one that takes longer than [`NEIGHBOURS_WAIT`] joins
/// later.
pub(super) const NEIGHBOUR_MAX: Duration = Duration::from_secs(2);

/// How long the source has to answer a hello.
const SOURCE_MAX: Duration = Duration::from_secs(10);

/// Pause between questions for a lost answer to a release.
const ASK_PAUSE: Duration = Duration::from_millis(300);

/// How long a lost answer to a release is asked for again.
const RELEASE_RETRY_MAX: Duration = Duration::from_secs(45);

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

impl Settings {
    /// Errors: in words, more rounds than there can be.
    pub fn check(&self) -> Result<(), String> {
        if self.max_rounds > ROUNDS_MAX {
            return Err(format!("{} rounds are too many, at most {ROUNDS_MAX}", self.max_rounds));
        }
        Ok(())
    }

    /// Those that the annotations of a container's own specification ask for. Errors: in words.
    pub fn of_bundle(bundle: &Path) -> Result<Self, String> {
        let path = bundle.join("config.json");
        let unreadable = |error: &dyn Error| format!("cannot read {}: {error}", path.display());
        let json = std::fs::read(&path).map_err(|error| unreadable(&error))?;
        let spec = Outline::parse(&json).map_err(|error| unreadable(&error))?;
        let bad = |key: &str, value: &str| format!("annotation {key} cannot be {value:?}");
        let mut settings = Self::default();
        if let Some(value) = spec.annotation(annotation::MODE) {
            settings.cooperative = match value {
                "cooperative" => true,
                "traditional" => false,
                other => return Err(bad(annotation::MODE, other)),
            };
        }
        if let Some(value) = spec.annotation(annotation::MAX_ROUNDS) {
            settings.max_rounds =
                value.parse().map_err(|_cause| bad(annotation::MAX_ROUNDS, value))?;
            settings.check()?;
        }
        if let Some(value) = spec.annotation(annotation::WRITABLE_LAYER) {
            settings.writable_layer = match value {
                "yes" => true,
                "no" => false,
                other => return Err(bad(annotation::WRITABLE_LAYER, other)),
            };
        }
        Ok(settings)
    }
}

/// Open connections of one migration, made before its container was created here.
#[derive(Clone, Debug)]
pub struct Connections {
    /// The node that runs the container.
    pub source: Arc<Connection>,
    /// Nodes that have answered so far; none in traditional mode.
    neighbours: Joined,
    is_cooperative: bool,
    health: Arc<PeerHealth>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Acquire {
    /// The container, as it is called here.
    pub container: ContainerRef,
    /// Where it comes from; with a cut, who had it when that was taken.
    pub from: MigrateFrom,
    /// The cut to restore, instead of asking that node.
    pub cut: Option<Digest>,
    /// Directory of its writable layer here, if it has one.
    pub upper_dir: Option<PathBuf>,
    /// The volumes that its own specification mounts.
    pub volumes: Vec<VolumeSource>,
    /// Settings from its annotations.
    pub settings: Settings,
}

impl Acquire {
    /// The value of the annotation that asks for it.
    pub fn annotation(&self) -> String {
        self.cut.map_or_else(|| self.from.to_string(), |cut| cut.to_string())
    }
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
pub(super) enum State {
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
    /// Although they do not run now, some task may have executed an instruction.
    pub may_have_run: bool,
}

impl Settlement {
    pub(super) fn running() -> Self {
        Self { running: true, reason: String::new(), may_have_run: true }
    }
}

pub(super) enum Command {
    Claim(oneshot::Sender<Result<(), String>>),
    Settle(Settlement, oneshot::Sender<()>),
}

pub(super) struct Session {
    pub(super) id: String,
    pub(super) asked: Acquire,
    pub(super) state: watch::Receiver<State>,
    pub(super) commands: mpsc::Sender<Command>,
}

/// The sessions of a node, and what [`super::request`] has prepared for sessions to come.
pub struct Sessions {
    /// The node.
    pub node: Arc<Node>,
    live: Mutex<HashMap<ContainerRef, Arc<Session>>>,
    prepared: Mutex<HashMap<ContainerRef, Prepared>>,
    names: Mutex<HashMap<ContainerRef, String>>,
    failures: Mutex<HashMap<String, (Instant, Failure)>>,
}

impl std::fmt::Debug for Sessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Sessions({})", self.live().len())
    }
}

impl Sessions {
    /// Those of `node`: none yet.
    pub fn new(node: Arc<Node>) -> Self {
        let (live, prepared, names) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { node, live, prepared, names, failures: Mutex::default() }
    }

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

    /// Whether any container is coming here.
    pub fn is_busy(&self) -> bool {
        !self.live().is_empty()
    }

    /// Whether this container is coming here.
    pub(super) fn is_live(&self, container: &ContainerRef) -> bool {
        self.live().contains_key(container)
    }

    /// What the next session of the container is called in events.
    pub(super) fn name_next(&self, container: &ContainerRef, migration: &str) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.insert(container.clone(), migration.to_owned());
    }

    /// Takes that name back.
    pub(super) fn take_name(&self, container: &ContainerRef) -> Option<String> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).remove(container)
    }

    /// Keeps why a session failed for the request that it belongs to.
    pub(super) fn keep_failure(&self, session: &str, failure: Failure) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.retain(|_, (kept, _)| kept.elapsed() < FAILURE_KEPT);
        failures.insert(session.to_owned(), (Instant::now(), failure));
    }

    /// Waits until the session is over, at most [`SESSION_ENDS_MAX`], and takes why it failed, if
    /// it did.
    pub async fn failure_of(&self, session: &str) -> Option<Failure> {
        let _ = tokio::time::timeout(SESSION_ENDS_MAX, self.ended(session)).await;
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.remove(session).map(|(_, failure)| failure)
    }

    /// Drops an ended session, unless a newer one has taken its place.
    pub(super) fn forget(&self, container: &ContainerRef, id: &str) {
        let mut live = self.live();
        if live.get(container).is_some_and(|session| session.id == id) {
            live.remove(container);
        }
    }

    /// Resolves when the session has ended, at once if there is none.
    pub(super) async fn ended(&self, id: &str) {
        let Some(mut state) = self.by_id(id).map(|session| session.state.clone()) else { return };
        while state.changed().await.is_ok() {}
    }

    fn by_id(&self, id: &str) -> Option<Arc<Session>> {
        self.live().values().find(|session| session.id == id).cloned()
    }
}

/// Opens connections to the source and, in cooperative mode, to every neighbour. A dead neighbour
/// costs [`NEIGHBOURS_WAIT`]; a slow one joins as soon as it answers.
///
/// Errors: [`PeerError`] when the source does not answer; a neighbour that does not is left out.
pub async fn connect(
    node: &Arc<Node>,
    source: &str,
    settings: &Settings,
) -> Result<Connections, PeerError> {
    let deadline = tokio::time::Instant::now() + NEIGHBOURS_WAIT;
    let (joined, neighbours) = watch::channel(Vec::new());
    let joined = Arc::new(joined);
    let mut joining = JoinSet::new();
    let others = node.config.peers.iter().filter(|peer| peer.name != source);
    for peer in others.filter(|_| settings.cooperative).cloned() {
        let (node, joined) = (node.clone(), joined.clone());
        joining.spawn(async move {
            match Connection::open(&node.config, &peer.name, NEIGHBOUR_MAX).await {
                Ok(connection) => {
                    node.links.greeted(&connection);
                    joined.send_modify(|all| all.push(Arc::new(connection)));
                }
                Err(error) => {
                    tracing::info!(node = %peer.name, error = crate::error::chain(&error), "neighbour is not asked");
                }
            }
        });
    }
    let source = Connection::open(&node.config, source, SOURCE_MAX).await?;
    node.links.greeted(&source);
    let all = async { while joining.join_next().await.is_some() {} };
    let _ = tokio::time::timeout_at(deadline, all).await;
    // Who has not answered yet goes on trying.
    joining.detach_all();
    let health = Arc::new(PeerHealth::known(node.links.rates()));
    let (source, is_cooperative) = (Arc::new(source), settings.cooperative);
    Ok(Connections { source, neighbours, is_cooperative, health })
}

/// Brings a container's state here and has the source stop it. See the module's comment.
///
/// - Cancel: dropping the future leaves the session going; call again to wait on.
/// - Errors: why the session failed. The container runs at its source.
pub async fn acquire(
    sessions: &Arc<Sessions>,
    asked: Acquire,
) -> Result<Acquired, Arc<MigrationError>> {
    let node = &sessions.node;
    if is_spent(node, &asked).await.map_err(Arc::new)? {
        return Ok(Acquired::StartFresh);
    }
    let session = {
        let mut live = sessions.live();
        match live.get(&asked.container) {
            Some(session) if session.state.has_changed().is_ok() => {
                if session.asked != asked {
                    let (container, to) = (asked.container, node.config.node.clone());
                    return Err(Arc::new(MigrationError::Busy { container, to }));
                }
                session.clone()
            }
            _ => {
                let session = Arc::new(begin(sessions.clone(), asked.clone()));
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

/// Whether the container came by this annotation before, by the journal or by what was noted with
/// the container: the journal may be an older copy.
async fn is_spent(node: &Node, asked: &Acquire) -> Result<bool, MigrationError> {
    let annotation = asked.annotation();
    let entry = node.journal.container(&asked.container)?;
    if entry.is_some_and(|entry| entry.has_spent(&annotation)) {
        return Ok(true);
    }
    let (namespace, id) = (asked.container.namespace(), asked.container.id());
    let record = node.containerd.container(namespace, id).await?;
    Ok(marks::has_spent(&record, &annotation))
}

/// Asks for the right to let a restored, held container run.
///
/// Returns why not, in words, when it must never run.
pub async fn claim(sessions: &Sessions, session: &str) -> Result<(), String> {
    if let Some(session) = sessions.by_id(session) {
        let (answer, answered) = oneshot::channel();
        if session.commands.send(Command::Claim(answer)).await.is_ok()
            && let Ok(verdict) = answered.await
        {
            return verdict;
        }
    }
    claim_from_journal(&sessions.node, session).await
}

/// Tells how the restore ended. Idempotent.
pub async fn settle(sessions: &Sessions, session: &str, settlement: Settlement) {
    let node = &sessions.node;
    if let Some(session) = sessions.by_id(session) {
        let (answer, answered) = oneshot::channel();
        let command = Command::Settle(settlement.clone(), answer);
        if session.commands.send(command).await.is_ok() && answered.await.is_ok() {
            return;
        }
    }
    if let Some((container, entry)) = journalled(node, session) {
        let ran = settlement.running || settlement.may_have_run;
        let outcome = match (&entry.ownership, ran) {
            (Ownership::Granted(..), true) => arrival::ran(node, &container).await.map(|epoch| {
                epoch.into_iter().for_each(|epoch| {
                    arrival::make_durable_later(node, &container, epoch);
                });
            }),
            // What was not granted did not run, whatever its shim says.
            (Ownership::Granted(epoch, _), false) | (Ownership::Claiming(epoch, _), _) => {
                give_back(node, &container, *epoch).map_err(Into::into)
            }
            _ => Ok(()),
        };
        if let Err(error) = outcome {
            let error = error.chain();
            tracing::error!(%container, error, "cannot journal how the restore ended");
        }
    }
}

fn journalled(
    node: &Node,
    session: &str,
) -> Option<(ContainerRef, crate::ownership::journal::Entry)> {
    let entries = node.journal.containers().ok()?;
    entries.into_iter().find(|(_, entry)| entry.session.as_deref() == Some(session))
}

pub(super) fn give_back(
    node: &Node,
    container: &ContainerRef,
    epoch: Epoch,
) -> Result<(), JournalError> {
    node.journal.apply(container, &Event::GiveBack(epoch), |_| {}).map(drop)
}

/// A claim after a restart: what the journal says, and the source if the answer to the release was
/// lost.
async fn claim_from_journal(node: &Node, session: &str) -> Result<(), String> {
    let Some((container, entry)) = journalled(node, session) else {
        return Err("the migration is over; the container runs at its source".to_owned());
    };
    match entry.ownership {
        Ownership::Owner(_) | Ownership::Granted(..) => Ok(()),
        Ownership::Claiming(epoch, from) => ask_again(node, &container, epoch, &from).await,
        other => Err(format!("the container is {} here", other.word())),
    }
}

/// Asks the source whether it has released the container; until it answers, no task may run here.
pub(super) async fn ask_again(
    node: &Node,
    container: &ContainerRef,
    epoch: Epoch,
    from: &str,
) -> Result<(), String> {
    let deadline = Instant::now() + RELEASE_RETRY_MAX;
    loop {
        let answer = super::release::ask(node, from, epoch, container).await;
        let answer = match answer {
            Ok(fate) => Some(fate),
            Err(error) => {
                tracing::warn!(%container, error = error.chain(), "asking the source for the release again");
                None
            }
        };
        let next = Fate::at_destination(answer, Instant::now() > deadline);
        if let Some(event) = next.event(epoch) {
            let journalled = node.journal.apply(container, &event, |_| {});
            journalled.map_err(|error| error.to_string())?;
        }
        match (next, answer) {
            (AtDestination::Grant, _) => return Ok(()),
            (AtDestination::GiveBack, Some(fate)) => {
                return Err(format!("the source did not release it: there it is {fate}"));
            }
            // Nothing has run and nothing will: should the source have released it, it may run it
            // again.
            (AtDestination::GiveBack, None) => {
                let reason = "the source does not say whether it released the container";
                return Err(reason.to_owned());
            }
            (AtDestination::AskAgain, _) => tokio::time::sleep(ASK_PAUSE).await,
        }
    }
}

impl Connections {
    /// Neighbours that have answered so far.
    pub fn neighbours(&self) -> Vec<Arc<Connection>> {
        self.neighbours.borrow().clone()
    }

    /// Begins to look for who holds what of a container that comes to `to`: snapshots of `subjects`
    /// and, where this node may use them, of its service's other users; and `contents` by digest.
    /// No neighbour is asked in traditional mode.
    pub fn look_up(
        &self,
        node: &Node,
        to: &ContainerRef,
        subjects: Vec<Subject>,
        contents: Vec<Digest>,
    ) -> Lookup {
        let mut query = Query::default();
        if self.is_cooperative {
            let may_share = |subject: &&Subject| {
                node.config.sibling_memory
                    && matches!(subject, Subject::Memory { namespace, .. } if namespace == to.namespace())
            };
            let services = subjects.iter().filter(may_share).filter_map(ServiceRef::of).collect();
            query = Query { subjects, services, manifests: contents };
        }
        Lookup::begin(&node.directory, query, self.neighbours.clone())
    }

    /// The peers to fetch from: the source, and the neighbours of those entries for which `holds`
    /// is true.
    pub fn holders(&self, entries: &[Entry], holds: impl Fn(&Entry) -> bool) -> Peers {
        let nodes = entries.iter().filter(|entry| holds(entry)).map(|entry| entry.node.clone());
        self.among(&nodes.collect())
    }

    /// The peers to fetch from: the source, and these neighbours.
    pub fn among(&self, nodes: &HashSet<String>) -> Peers {
        let mut neighbours = self.neighbours();
        neighbours.retain(|peer| nodes.contains(&peer.node));
        Peers { neighbours, ..self.source_alone() }
    }

    /// The source without its neighbours.
    pub fn source_alone(&self) -> Peers {
        let (source, health) = (Some(self.source.clone()), self.health.clone());
        Peers { neighbours: Vec::new(), source, health }
    }

    /// Bytes received from each node so far, protocol included.
    pub fn received(&self) -> BTreeMap<String, u64> {
        let all = std::iter::once(self.source.clone()).chain(self.neighbours());
        all.map(|peer| (peer.node.clone(), peer.traffic.received())).collect()
    }

    /// Bytes per second of the peers that have sent enough to tell.
    pub fn measured(&self) -> Vec<(String, f64)> {
        self.health.measured(MEASURED_BYTES_MIN)
    }

    /// Keeps what was learnt of the peers for the next migration.
    pub fn remember(&self, node: &Node) {
        node.links.measured(&self.measured());
    }
}

/// "cooperative" or "traditional".
pub fn mode_word(settings: &Settings) -> &'static str {
    if settings.cooperative { "cooperative" } else { "traditional" }
}

/// The kind of object that a subject's manifest is, as its node told it; `None` if such a subject
/// has no such manifest.
pub fn kind_told(subject: &Subject, told: u32) -> Option<Kind> {
    let usual = match subject {
        Subject::Volume(_) | Subject::Layer(_) => Kind::Tree,
        Subject::Memory { .. } => Kind::Memory,
        Subject::Container(_) => Kind::Cut,
        Subject::ImageLayer(_) => Kind::Layer,
    };
    let is_block = matches!(subject, Subject::Volume(_)) && told == Kind::Image as u32;
    // Who knows of no block volumes tells nothing.
    if is_block { Some(Kind::Image) } else { [0, usual as u32].contains(&told).then_some(usual) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_rounds_than_there_can_be_are_refused() {
        let bundle = tempfile::tempdir().unwrap();
        let settings = |rounds: &str| {
            let annotations = serde_json::json!({"annotations": {annotation::MAX_ROUNDS: rounds}});
            std::fs::write(bundle.path().join("config.json"), annotations.to_string()).unwrap();
            Settings::of_bundle(bundle.path())
        };
        assert_eq!(settings("30").unwrap().max_rounds, 30);
        assert_eq!(settings("31").unwrap_err(), "31 rounds are too many, at most 30");
    }

    #[test]
    fn only_a_volume_may_be_an_image_and_silence_is_no_image() {
        let volume: Subject = "volume|data".parse().unwrap();
        let layer: Subject = "layer|default|cache".parse().unwrap();
        let memory: Subject = "memory|default|redis|cache".parse().unwrap();
        let (tree, image) = (Kind::Tree as u32, Kind::Image as u32);
        assert_eq!(
            [0, tree, image, 99].map(|told| kind_told(&volume, told)),
            [Some(Kind::Tree), Some(Kind::Tree), Some(Kind::Image), None]
        );
        assert_eq!(kind_told(&layer, image), None);
        assert_eq!([0, tree].map(|told| kind_told(&memory, told)), [Some(Kind::Memory), None]);
    }
}
