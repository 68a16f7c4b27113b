//! The source's side of a migration: snapshots while the container runs, then the cut, then letting
//! go.
//!
//! ```text
//!  Begin ─► Round ... ─► Stop ─► Release ─► Settled
//!           running      │ journal Offered, freeze,      │ running: end the tasks, keep the snapshots
//!                        │ dump and read the trees,      │ never resumed: journal Owner, thaw
//!                        │ send the difference
//!                        └─ frozen from here; Abort, silence or any error thaws
//! ```
//!
//! The stream is the session. Until `Released` is journalled its end, an abort and every error lead
//! to a thaw and to `Owner`. After it nothing here may run the container, except the destination's
//! journalled word that its tasks never ran; if the stream breaks then, [`super::release`] asks the
//! destination until it answers.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use godwit_protos::peer::{
    Begin, Begun, FromSource, Manifest, ObjectBatch, Refusal, Released, RoundDone, Stopped,
    ToSource, from_source, to_source,
};
use godwit_protos::{ContainerRef, Digest, MigrateFrom, Subject};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming};

use super::cut::{self, DumpDirectory, Shared, lock};
use super::deletion::incarnation;
use super::describe::{Described, describe};
use super::let_go::Remembered;
use super::line::UNKNOWN_MESSAGE;
use super::release::{
    ask_over, end_lease, settle_later, take_back, take_offer_back, withdraw_release,
};
use super::subjects::{Subjects, Version};
use super::{MigrationError, blocking};
use crate::content::encoding::{Codec, Encoding};
use crate::content::object::Kind;
use crate::content::{ContentError, Source as _, difference::difference};
use crate::node::Node;
use crate::ownership::fate::{AtSource, Fate};
use crate::ownership::journal::JournalError;
use crate::ownership::leases::{Lease as Hold, Leased, Purpose};
use crate::ownership::{Epoch, Event};
use crate::peer::{BATCH_BYTES, Connection, PeerError};
use crate::policy::rounds::ROUNDS_MAX;
use crate::store::{Lease, Store};

/// How long a frozen container waits for the destination's next word before it is thawed.
const FROZEN_MAX: Duration = Duration::from_secs(300);

/// How long a session may be idle while the container runs.
const IDLE_MAX: Duration = Duration::from_secs(3600);

/// Largest epoch that a destination may claim to know, far beyond any that is reached.
pub(super) const EPOCH_MAX: u64 = 1 << 60;

/// How long a connection back to the destination may take.
const BACK_MAX: Duration = Duration::from_secs(10);
/// Messages on their way to the destination.
const QUEUE: usize = 4;

/// What goes to the destination.
pub type Outbound = mpsc::Sender<Result<FromSource, Status>>;

/// Serves one hand-off until it is settled.
pub async fn hand_off(node: Arc<Node>, mut inbound: Streaming<ToSource>, outbound: Outbound) {
    let refuse = |error: &MigrationError| {
        let refusal = Refusal { code: error.code().to_owned(), detail: error.chain() };
        Ok(FromSource { message: Some(from_source::Message::Refusal(refusal)) })
    };
    let begin = match next(&mut inbound, IDLE_MAX).await {
        Ok(to_source::Message::Begin(begin)) => begin,
        _ => return,
    };
    let mut session = match Session::begin(node, begin, outbound.clone()).await {
        Ok(session) => session,
        Err(error) => {
            let _ = outbound.send(refuse(&error)).await;
            return;
        }
    };
    let outcome = session.run(&mut inbound).await;
    if let Err(error) = outcome {
        let (container, error_text) = (&session.container, error.chain());
        if session.offered.is_some() {
            tracing::warn!(%container, error = error_text, "hand-off ended while frozen");
        } else {
            // A plan, for one, always ends so.
            tracing::info!(%container, error = error_text, "session ended before the freeze");
        }
        let has_ended = session.abort().await;
        let error = if has_ended {
            MigrationError::Ended { container: session.container.clone(), source: error.into() }
        } else {
            error
        };
        let _ = outbound.send(refuse(&error)).await;
    }
}

async fn next(
    inbound: &mut Streaming<ToSource>,
    patience: Duration,
) -> Result<to_source::Message, MigrationError> {
    match tokio::time::timeout(patience, inbound.next()).await {
        Err(_) => Err(MigrationError::Silent { patience }),
        Ok(Some(Ok(ToSource { message: Some(message) }))) => Ok(message),
        Ok(Some(Ok(ToSource { message: None }))) => Err(MigrationError::Protocol(UNKNOWN_MESSAGE)),
        Ok(Some(Err(status))) => Err(MigrationError::Broken(status.message().to_owned())),
        Ok(None) => Err(MigrationError::Broken("the destination hung up".to_owned())),
    }
}

/// Leases a container and its writable volumes for a session that takes them away.
///
/// Errors: who has them.
async fn lease(
    node: &Node,
    session: &str,
    described: &Described,
    destination: &str,
) -> Result<(), MigrationError> {
    let container = &described.container;
    let lease = Hold::new(session, Purpose::Leaving, container, destination);
    let volumes = described.writable_volumes.iter().map(|one| Leased::Volume(one.id.clone()));
    let leased: Vec<_> =
        std::iter::once(Leased::Container(container.clone())).chain(volumes).collect();
    Ok(node.journal.take_lease_soon(&leased, &lease).await?)
}

struct Session {
    node: Arc<Node>,
    container: ContainerRef,
    /// The destination's node, and what the container is called there.
    destination: String,
    offered_as: MigrateFrom,
    known_epoch: Epoch,
    remove_source: bool,
    described: Described,
    subjects: Shared,
    directory: Arc<DumpDirectory>,
    lease: Arc<Lease>,
    outbound: Outbound,
    /// A connection back to the destination, so that nothing is frozen that could not be settled.
    back: JoinHandle<Result<Connection, PeerError>>,
    /// The epoch that the destination was told.
    begun: Epoch,
    /// Set from the journal's `Offered` on.
    offered: Option<Epoch>,
}

impl Session {
    async fn begin(
        node: Arc<Node>,
        begin: Begin,
        outbound: Outbound,
    ) -> Result<Self, MigrationError> {
        let asked = begin.container.unwrap_or_default();
        let container = ContainerRef::new(&asked.namespace, &asked.id)?;
        if node.config.peer(&begin.destination).is_none() {
            return Err(PeerError::Unknown(begin.destination).into());
        }
        let asked = begin.r#as.unwrap_or_default();
        let offered_as = MigrateFrom {
            node: begin.destination.clone(),
            container: ContainerRef::new(&asked.namespace, &asked.id)?,
        };
        let described = describe(&node, &container).await?;
        described.check_movable(&node)?;
        described.survey(&node).await?.check()?;
        let session = node.new_id();
        lease(&node, &session, &described, &begin.destination).await?;
        let subjects = Subjects::of(&node, &described, !begin.without_writable_layer);
        let directory = Arc::new(DumpDirectory::of(&node, &session));
        let lease = Arc::new(node.store.lease("migration", IDLE_MAX));
        let (here, destination) = (node.clone(), begin.destination.clone());
        let back =
            tokio::spawn(
                async move { Connection::open(&here.config, &destination, BACK_MAX).await },
            );
        Ok(Self {
            destination: begin.destination,
            offered_as,
            known_epoch: Epoch(begin.known_epoch.min(EPOCH_MAX)),
            remove_source: begin.remove_source,
            back,
            begun: Epoch::default(),
            offered: None,
            node,
            container,
            described,
            subjects: Arc::new(Mutex::new(subjects)),
            directory,
            lease,
            outbound,
        })
    }

    async fn send(&self, message: from_source::Message) -> Result<(), MigrationError> {
        let sending = self.outbound.send(Ok(FromSource { message: Some(message) }));
        let sent = tokio::time::timeout(FROZEN_MAX, sending).await;
        let sent = sent.map_err(|_late| MigrationError::Silent { patience: FROZEN_MAX })?;
        sent.map_err(|_cause| MigrationError::Broken("the destination hung up".to_owned()))
    }

    async fn run(&mut self, inbound: &mut Streaming<ToSource>) -> Result<(), MigrationError> {
        let epoch = self.epoch()?;
        self.begun = epoch;
        let subjects: Vec<Subject> = lock(&self.subjects).all().cloned().collect();
        let rate = |subject| self.node.observed.write_rate(subject).unwrap_or_default();
        let begun = Begun {
            epoch: epoch.0,
            shape: Some(self.described.shape().await?),
            write_rates: subjects.iter().map(rate).collect(),
            subjects: subjects.iter().map(ToString::to_string).collect(),
            chain_id: self.described.origin.chain_id_text(),
        };
        self.send(from_source::Message::Begun(begun)).await?;
        // Each costs reading all memory, so a destination has a limited number of them.
        let mut rounds = 1..=ROUNDS_MAX;
        loop {
            match next(inbound, IDLE_MAX).await? {
                to_source::Message::Round(round) => {
                    if rounds.next() != Some(round.number) {
                        return Err(MigrationError::Protocol(
                            "a round out of order, or one too many",
                        ));
                    }
                    self.round(round.number).await?;
                }
                to_source::Message::Stop(_) => break,
                to_source::Message::Abort(abort) => {
                    return Err(MigrationError::Aborted(abort.reason));
                }
                _ => return Err(MigrationError::Protocol("expected a round, a stop or an abort")),
            }
        }
        // One deadline from the freeze to the release, however each step of it gets on.
        let limit = self.node.config.freeze_max();
        let stopped = async {
            self.stop().await?;
            next(inbound, FROZEN_MAX).await
        };
        let stopped = tokio::time::timeout(limit, stopped).await;
        let epoch = match stopped.map_err(|_late| MigrationError::FrozenTooLong(limit))?? {
            to_source::Message::Release(release) => Epoch(release.epoch),
            to_source::Message::Abort(abort) => return Err(MigrationError::Aborted(abort.reason)),
            _ => return Err(MigrationError::Protocol("expected a release or an abort")),
        };
        let (container, to) = (self.container.clone(), self.destination.clone());
        let released = self.node.journal.apply(&container, &Event::Release(epoch), |_| {});
        if let Err(error) = released {
            if matches!(error, JournalError::Database { .. }) {
                self.withdraw_release(epoch);
            }
            return Err(error.into());
        }
        // The point of no return: from here on only the destination's word lets the tasks run here
        // again.
        self.offered = None;
        tracing::info!(%container, %to, epoch = epoch.0, "released");
        let told = self.send(from_source::Message::Released(Released { epoch: epoch.0 })).await;
        let settled = match told {
            Ok(()) => next(inbound, FROZEN_MAX).await,
            Err(error) => Err(error),
        };
        let fate = match settled {
            Ok(to_source::Message::Settled(settled)) => settled.fate().into(),
            _ => Fate::Unknown,
        };
        let remembered = self.remembered(epoch);
        match fate.at_source() {
            AtSource::LetGo => remembered.let_go(&self.node).await,
            AtSource::TakeBack => take_back(&self.node, &container, epoch).await,
            AtSource::AskAgain => {
                let node = self.node.clone();
                tokio::spawn(
                    async move { settle_later(&node, &container, Some(remembered)).await },
                );
            }
        }
        Ok(())
    }

    /// Whether the disk has the release is not known: [`withdraw_release`] finds out, and thaws.
    fn withdraw_release(&mut self, epoch: Epoch) {
        self.offered = None;
        let remembered = self.remembered(epoch);
        let (node, container) = (self.node.clone(), self.container.clone());
        let there = self.offered_as.clone();
        tokio::spawn(async move {
            withdraw_release(&node, &container, epoch, remembered, &there).await;
        });
    }

    fn epoch(&self) -> Result<Epoch, MigrationError> {
        let last = self.node.journal.ledger(&self.container)?.last();
        Ok(last.max(self.known_epoch).next())
    }

    async fn round(&mut self, number: u32) -> Result<(), MigrationError> {
        let begun = Instant::now();
        self.lease.renew()?;
        let pids =
            self.node.containerd.pids(self.container.namespace(), self.container.id()).await?;
        let (subjects, lease) = (self.subjects.clone(), self.lease.clone());
        let versions = blocking(move || {
            let mut subjects = lock(&subjects);
            subjects.capture_live(&lease, &pids, &|_| true)?;
            Ok(subjects.versions())
        })
        .await?;
        let manifests = versions.iter().map(|version| version.manifest(0)).collect();
        let elapsed_us = micros(begun.elapsed());
        self.send(from_source::Message::RoundDone(RoundDone { number, manifests, elapsed_us }))
            .await
    }

    /// Asks the destination, at its configured address, whether it claims what it is about to be
    /// offered.
    /// Errors: it does not: the node that sent the messages of this session is not that node, or it
    /// has given up.
    async fn confirm(&mut self) -> Result<(), MigrationError> {
        let connection = (&mut self.back).await.map_err(|_cause| MigrationError::Interrupted)??;
        let there = &self.offered_as.container;
        let fate = ask_over(&connection, &self.node, there, self.begun, &self.container).await?;
        if fate.confirms_offer() {
            return Ok(());
        }
        Err(MigrationError::Unconfirmed { node: self.destination.clone(), fate })
    }

    /// Freezes the container, makes the cut and sends what the destination lacks.
    async fn stop(&mut self) -> Result<(), MigrationError> {
        let container = self.container.clone();
        // Again: pre-copy may have taken minutes.
        self.described.survey(&self.node).await?.check()?;
        self.confirm().await?;
        let offer = Event::Offer(self.offered_as.to_string(), self.known_epoch);
        let volumes =
            self.described.writable_volumes.iter().map(|one| one.id.to_string()).collect();
        let remove_source = self.remove_source;
        let incarnation = incarnation(&self.node, &container).await?;
        let offered = self.node.journal.apply(&container, &offer, |entry| {
            entry.incarnation = Some(incarnation);
            entry.volumes = volumes;
            entry.remove_source = remove_source;
            entry.frozen = true;
        });
        let epoch = offered?;
        self.offered = Some(epoch);
        if epoch != self.begun {
            // It was offered meanwhile, as for a consistent snapshot, and taken back.
            return Err(MigrationError::Interrupted);
        }

        let before = lock(&self.subjects).versions();
        let subjects = (&self.subjects, &self.lease);
        let cut =
            cut::freeze_and_dump(&self.node, &self.described, subjects, self.directory.path());
        let cut = cut.await?;
        let begun = Instant::now();
        let node = self.node.clone();
        let _urgent = node.freeze_gate.take();
        let (freeze_us, dump_us) = (micros(cut.freeze), micros(cut.dump));
        let criu_us = micros(cut.criu);
        let versions = cut::read_dump(subjects, cut).await?;
        let manifests = self.manifests(&versions)?;
        let base = |version: &Version| {
            let before = before.iter().find(|before| before.subject == version.subject);
            before.map(|before| before.root)
        };
        // Memory first: it is what the restore waits for.
        let pairs = versions.iter().rev();
        let pairs = pairs.map(|version| (version.kind, version.root, base(version))).collect();
        self.send_difference(pairs).await?;
        let difference_us = micros(begun.elapsed());
        let epoch = epoch.0;
        let stopped = Stopped { epoch, manifests, freeze_us, dump_us, difference_us, criu_us };
        self.send(from_source::Message::Stopped(stopped)).await
    }

    fn manifests(&self, versions: &[Version]) -> Result<Vec<Manifest>, MigrationError> {
        let store = &self.node.store;
        let manifest = |version: &Version| -> Result<_, MigrationError> {
            Ok(version.manifest(store.next_sequence(&version.subject)?))
        };
        versions.iter().map(manifest).collect()
    }

    async fn send_difference(
        &self,
        pairs: Vec<(Kind, Digest, Option<Digest>)>,
    ) -> Result<(), MigrationError> {
        let (send, mut receive) = mpsc::channel(QUEUE);
        let store = self.node.store.clone();
        let reading = tokio::task::spawn_blocking(move || stream_difference(&store, &pairs, &send));
        while let Some(batch) = receive.recv().await {
            self.send(from_source::Message::Objects(batch)).await?;
        }
        Ok(reading.await.map_err(|_cause| MigrationError::Interrupted)??)
    }

    /// What is to be done once the container runs elsewhere.
    fn remembered(&self, epoch: Epoch) -> Remembered {
        let volumes = self.described.writable_volumes.iter().map(|one| one.id.clone());
        Remembered {
            container: self.container.clone(),
            epoch,
            destination: self.destination.clone(),
            remove_source: self.remove_source,
            volumes: volumes.collect(),
            versions: lock(&self.subjects).versions(),
            directory: Some(self.directory.clone()),
            lease: Some(self.lease.clone()),
        }
    }

    /// Back to running here, unless the container has ended meanwhile: then the result is true.
    /// Only before the release.
    async fn abort(&mut self) -> bool {
        let mut has_ended = false;
        if let Some(epoch) = self.offered.take() {
            has_ended = take_offer_back(&self.node, &self.container, epoch).await;
        }
        end_lease(&self.node, &self.container);
        has_ended
    }
}

/// Encodes the difference of each pair into batches.
fn stream_difference(
    store: &Store,
    pairs: &[(Kind, Digest, Option<Digest>)],
    send: &mpsc::Sender<ObjectBatch>,
) -> Result<(), ContentError> {
    let (mut codec, mut batch, mut bytes) = (Codec::default(), ObjectBatch::default(), 0);
    for (kind, new, base) in pairs {
        difference(store, *kind, *new, *base, &mut |changed| {
            let Some(stored) = store.get_stored(&changed.digest)? else {
                return Err(ContentError::Missing(changed.digest));
            };
            let mut object = crate::peer::stored_object(changed.digest, stored);
            if let Some(base) = changed.base {
                let (data, base_data) = (store.object(&changed.digest)?, store.object(&base)?);
                if let Some(patch) = codec.patch(&data, &base_data, object.data.len()) {
                    object.encoding = Encoding::Patch as u32;
                    object.base = base.as_bytes().to_vec().into();
                    object.data = patch.into();
                }
            }
            if bytes + object.data.len() > BATCH_BYTES && !batch.objects.is_empty() {
                bytes = 0;
                // A receiver that is gone has ended the session; the rest of the walk is cheap.
                let _ = send.blocking_send(std::mem::take(&mut batch));
            }
            bytes += object.data.len();
            batch.objects.push(object);
            Ok(())
        })?;
    }
    let _ = send.blocking_send(batch);
    Ok(())
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
