//! One container on its way here, from the first connection to the report.
//!
//! The steps stand in [`Work::migrate`] in their order. Until the grant an error tells the source
//! to abort and removes what was staged; from the grant on nothing is removed here unless the shim
//! vouches that no task ran.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use godwit_protos::peer::{
    Begin, Manifest, Release, Settled, Stop, Stopped, from_source, to_source,
};
use godwit_protos::{Digest, Subject, VolumeSource, peer};
use tokio::sync::{mpsc, oneshot, watch};

use super::deletion::incarnation;
use super::destination::{
    Acquire, Acquired, Command, Prepared, Session, Sessions, Settlement, State, ask_again, connect,
    give_back, kind_told, mode_word,
};
use super::layout::Layout;
use super::line::{Beginning, Line, Subjects, named};
use super::outcome::{self, Failure};
use super::report::{Phases, Report, Shares};
use super::subjects::Version;
use super::{MigrationError, arrival, blocking, choice, origin, request};
use crate::containerd::TaskStatus;
use crate::content::object::Kind;
use crate::directory::{Entry, Lookup, SEQUENCE_MAX};
use crate::node::Node;
use crate::ownership::fate::Fate;
use crate::ownership::leases::{Lease as Hold, Leased, Purpose};
use crate::ownership::{Epoch, Event, Ownership};
use crate::peer::fetch::{Depth, Peers, fetch};
use crate::policy::choose::Choice;
use crate::policy::predict::criu_seconds;
use crate::policy::rounds;
use crate::retention::{admitted, record};
use crate::store::Lease;

/// How long the shim has to restore and claim, and to report the end of the restore.
const SHIM_MAX: Duration = Duration::from_secs(240);

/// How often a caller is looked for.
const CALLER_PAUSE: Duration = Duration::from_millis(100);

/// How long the shim has to end tasks that were refused.
const UNDO_MAX: Duration = Duration::from_secs(30);

/// How often the bytes that have come are published.
const COUNT_INTERVAL: Duration = Duration::from_millis(500);

/// How long who was asked in a lookup is still waited for once the answer is needed.
const LOOKUP_WAIT: Duration = Duration::from_millis(50);

/// Lifetime of the lease on what a migration brought; renewed with each round.
const LEASE: Duration = Duration::from_secs(3600);

/// How long what a failed migration brought is kept for the next attempt.
const RESUME_MAX: Duration = Duration::from_secs(600);

/// Begins a session, which goes on by itself.
pub(super) fn begin(sessions: Arc<Sessions>, asked: Acquire) -> Session {
    let node = sessions.node.clone();
    let prepared = sessions.take_prepared(&asked.container);
    let requested = prepared.as_ref().map(|prepared| prepared.migration.clone());
    let requested = requested.or_else(|| sessions.take_name(&asked.container));
    // A request that created the container removes it, too.
    let is_requested = requested.is_some();
    let id = requested.unwrap_or_else(|| node.new_id());
    let (publish, state) = watch::channel(State::Working);
    let (commands, inbox) = mpsc::channel(4);
    let session = Session { id: id.clone(), asked: asked.clone(), state, commands };
    tokio::spawn(async move {
        let container = asked.container.clone();
        let mut work = Work {
            node: node.clone(),
            asked,
            id,
            publish,
            inbox,
            may_discard: true,
            is_requested,
            claimed: None,
        };
        let outcome = match (work.lease().await, work.asked.cut) {
            (Err(error), _) => Err(error),
            (Ok(()), Some(cut)) => work.restore(&cut).await,
            (Ok(()), None) => work.run(prepared).await,
        };
        let mut failed = None;
        match outcome {
            Ok(report) => node.events.done(&work.id, &report),
            Err(error) => {
                let error = Arc::new(error);
                tracing::warn!(%container, error = error.chain(), "migration failed");
                let failure = Failure { error: error.clone(), claimed: work.claimed };
                if is_requested {
                    // The request removes what it made before it tells.
                    sessions.keep_failure(&work.id, failure);
                } else {
                    failed = Some(failure);
                }
                let _ = work.publish.send(State::Failed(error));
            }
        }
        if !is_requested {
            request::end_session(&node, &container, &work.id).await;
        }
        if let Some(failure) = failed {
            let asked = &work.asked;
            outcome::tell(&node, &work.id, &asked.from, &asked.container, &failure).await;
        }
        sessions.forget(&container, &work.id);
        // Dropping the publisher ends the session: the next acquire begins a new one.
        drop(work);
    });
    session
}

/// Publishes from time to time how much has come.
async fn count_bytes(node: Arc<Node>, migration: String, prepared: &Prepared) -> Infallible {
    loop {
        tokio::time::sleep(COUNT_INTERVAL).await;
        let received = prepared.connections.received();
        node.events.bytes(&migration, received.values().sum());
    }
}

pub(super) struct Work {
    pub(super) node: Arc<Node>,
    pub(super) asked: Acquire,
    pub(super) id: String,
    pub(super) publish: watch::Sender<State>,
    inbox: mpsc::Receiver<Command>,
    /// False from the grant on: the tasks may have run, so what they run on stays.
    pub(super) may_discard: bool,
    /// Whether a request created the container; else a client did, with an annotation.
    pub(super) is_requested: bool,
    /// The epoch that this node claimed.
    claimed: Option<Epoch>,
}

impl Work {
    /// Leases the container and its writable volumes until the session ends, or the request that it
    /// belongs to.
    async fn lease(&self) -> Result<(), MigrationError> {
        let Acquire { container, from, .. } = &self.asked;
        let lease = Hold::new(&self.id, Purpose::Arriving, container, &from.node);
        let mut leased = vec![Leased::Container(self.asked.container.clone())];
        leased.extend(self.asked.volumes.iter().filter_map(|volume| match volume {
            VolumeSource::Writable(id) => Some(Leased::Volume(id.clone())),
            VolumeSource::Content(_) => None,
        }));
        Ok(self.node.journal.take_lease_soon(&leased, &lease).await?)
    }

    async fn run(&mut self, prepared: Option<Prepared>) -> Result<Report, MigrationError> {
        let prepared = match prepared {
            Some(prepared) => prepared,
            None => Prepared {
                migration: self.id.clone(),
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
        let mut layout = self.layout()?;
        let begin = self.beginning(&prepared)?;
        let mut line = Line::open(&prepared.connections.source, begin).await?;
        let counting = count_bytes(self.node.clone(), self.id.clone(), &prepared);
        let outcome = tokio::select! {
            outcome = self.migrate(&prepared, &lease, &mut layout, &mut line) => outcome,
            never = counting => match never {},
        };
        if let Err(error) = &outcome {
            self.give_claim_back();
            line.abort(error.chain()).await;
            // The source thaws before anything is removed here.
            drop(line);
            prepared.connections.remember(&self.node);
            self.keep_for_resuming(lease).await;
            if self.may_discard {
                let volumes = self.node.volumes.clone();
                let _ = tokio::task::spawn_blocking(move || layout.discard(&volumes)).await;
            }
        }
        outcome
    }

    /// A claim that was not granted ends with its session: nothing ran here, and nothing will.
    fn give_claim_back(&self) {
        let container = &self.asked.container;
        let entry = self.node.journal.container(container).ok().flatten();
        let ours = entry.filter(|entry| entry.session.as_deref() == Some(&self.id));
        if let Some(Ownership::Claiming(epoch, _)) = ours.map(|entry| entry.ownership)
            && let Err(error) = give_back(&self.node, container, epoch)
        {
            tracing::error!(%container, %error, "cannot give the claim back; it is done after a restart");
        }
    }

    pub(super) fn layout(&self) -> Result<Layout, MigrationError> {
        let Acquire { container, upper_dir, .. } = &self.asked;
        Layout::begin(&self.node, &self.id, container, upper_dir.clone())
    }

    /// What came stays for the next attempt, also if this daemon is killed.
    async fn keep_for_resuming(&self, lease: Arc<Lease>) {
        let store = self.node.store.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.sync()).await {
            tracing::warn!(%error, "cannot keep what arrived for the next attempt");
        }
        tokio::spawn(async move {
            tokio::time::sleep(RESUME_MAX).await;
            drop(lease);
        });
    }

    /// Whether a subject is part of the container that was asked for.
    fn is_asked(&self, subject: &Subject) -> bool {
        let from = &self.asked.from.container;
        match subject {
            Subject::Volume(id) => self.asked.volumes.contains(&VolumeSource::Writable(id.clone())),
            Subject::Layer(container) => container == from,
            Subject::Memory { namespace, .. } => namespace == from.namespace(),
            Subject::Container(_) | Subject::ImageLayer(_) => false,
        }
    }

    /// Errors: also a subject that is not part of the container that was asked for.
    fn parse_manifests(&self, manifests: &[Manifest]) -> Result<Parsed, MigrationError> {
        let parse = |manifest: &Manifest| -> Result<_, MigrationError> {
            let subject: Subject = manifest.subject.parse()?;
            if !self.is_asked(&subject) || manifest.sequence > SEQUENCE_MAX {
                return Err(MigrationError::Protocol("a subject that is not the container's"));
            }
            let kind = kind_told(&subject, manifest.kind);
            let kind =
                kind.ok_or(MigrationError::Protocol("a kind that the subject cannot have"))?;
            let root = (kind, Digest::try_from(&manifest.digest[..])?);
            Ok((subject, root, manifest.sequence))
        };
        let parsed = manifests.iter().map(parse).collect::<Result<Parsed, _>>()?;
        let memories =
            parsed.iter().filter(|(subject, ..)| matches!(subject, Subject::Memory { .. }));
        if memories.count() == 1 {
            Ok(parsed)
        } else {
            Err(MigrationError::Protocol("not exactly one memory"))
        }
    }

    fn beginning(&self, prepared: &Prepared) -> Result<Begin, MigrationError> {
        let known = self.node.journal.ledger(&self.asked.container)?.last();
        Ok(Begin {
            container: Some(named(&self.asked.from.container)),
            destination: self.node.config.node.clone(),
            migration: self.id.clone(),
            without_writable_layer: !self.asked.settings.writable_layer
                || self.asked.upper_dir.is_none(),
            remove_source: prepared.remove_source,
            known_epoch: known.0,
            r#as: Some(named(&self.asked.container)),
        })
    }

    async fn migrate(
        &mut self,
        prepared: &Prepared,
        lease: &Arc<Lease>,
        layout: &mut Layout,
        line: &mut Line,
    ) -> Result<Report, MigrationError> {
        let Beginning { epoch, mut subjects, chain_id, shape } = line.begun().await?;
        self.check_image(&chain_id).await?;
        layout.clear_layer()?;
        subjects.retain(|subject, _| self.is_asked(subject));
        let lookup = prepared.connections.look_up(
            &self.node,
            &self.asked.container,
            subjects.keys().cloned().collect(),
            self.missing_contents().into_iter().collect(),
        );
        let mut shares = Shares::default();
        self.bring_contents(prepared, &lookup, lease, &mut shares).await?;
        let found = (&lookup, &subjects);
        let rounds = self.pre_copy(prepared, found, lease, layout, line, &mut shares).await?;
        lease.renew()?;

        self.somebody_waits().await?;
        // Before the stop: the source freezes nothing for a node whose journal does not say so.
        self.journal_claim(epoch).await?;
        let pre_copy = prepared.begun.elapsed();
        let received = prepared.connections.source.traffic.received();
        let stop = Instant::now();
        self.node.events.step(&self.id, "stop", "freezing the container at its source");
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

        self.node.events.step(&self.id, "hand-off", "restoring");
        let _ = self.publish.send(State::Ready(Acquired::Restore {
            session: self.id.clone(),
            image_path: layout.images(),
            work_path: layout.work(),
        }));
        let running = self.hand_off(line, epoch).await?;

        self.finish(lease, layout, &stopped).await;
        // The reader of the report may move the container back at once.
        line.ended().await;
        let millis = |duration: Duration| duration.as_secs_f64() * 1e3;
        let source_ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1e3;
        let (freeze, dump) = (source_ms(stopped.freeze_us), source_ms(stopped.dump_us));
        let transfer = (millis(ready - stop) - freeze - dump).max(0.0);
        let restore = millis(running - ready);
        let memory = stopped.manifests.iter().find(|told| told.subject.starts_with("memory|"));
        let predicted = criu_seconds(&shape, memory.map_or(0, |told| told.size_bytes));
        // What reading file trees takes beyond it says nothing of CRIU's pace.
        let criu = if stopped.criu_us > 0 { source_ms(stopped.criu_us) } else { dump };
        self.node.links.frozen(&self.asked.from.node, (criu + restore) / 1e3, predicted);
        prepared.connections.remember(&self.node);
        Ok(Report {
            migration: self.id.clone(),
            container: self.asked.container.to_string(),
            mode: mode_word(&self.asked.settings).to_owned(),
            source: self.asked.from.node.clone(),
            destination: self.node.config.node.clone(),
            total_ms: millis(running - prepared.begun),
            downtime_ms: millis(running - stop),
            rounds,
            phases_ms: Phases { pre_copy: millis(pre_copy), freeze, dump, transfer, restore },
            wire_bytes_by_node: prepared.connections.received(),
            stop_and_copy_bytes,
            subjects: shares.into_list(),
        })
    }

    /// Nothing is frozen for a caller that has gone away: another one may come, such as a kubelet's
    /// second attempt.
    async fn somebody_waits(&self) -> Result<(), MigrationError> {
        let deadline = Instant::now() + SHIM_MAX;
        // The session itself holds one receiver.
        while self.publish.receiver_count() < 2 {
            if Instant::now() > deadline {
                return Err(MigrationError::Unclaimed(SHIM_MAX));
            }
            tokio::time::sleep(CALLER_PAUSE).await;
        }
        Ok(())
    }

    /// Read-only volumes that are not here.
    fn missing_contents(&self) -> BTreeSet<Digest> {
        let contents = self.asked.volumes.iter().filter_map(|volume| match volume {
            VolumeSource::Content(digest) => Some(*digest),
            VolumeSource::Writable(_) => None,
        });
        contents.filter(|digest| !self.node.volumes.has_content(digest)).collect()
    }

    /// Read-only volumes, by digest: neighbours that have them first.
    async fn bring_contents(
        &self,
        prepared: &Prepared,
        lookup: &Lookup,
        lease: &Arc<Lease>,
        shares: &mut Shares,
    ) -> Result<(), MigrationError> {
        for digest in self.missing_contents() {
            self.node.events.step(&self.id, "pre-copy", &format!("volume {digest}"));
            let found = lookup.found(LOOKUP_WAIT).await;
            let root = [(Kind::Tree, digest)];
            let peers = prepared.connections.holders(&found, |entry| entry.manifest == digest);
            let brought = fetch(&self.node.store, lease, &peers, &root, Depth::Content).await?;
            shares.add(&digest.to_string(), &brought[0]);
            let volumes = self.node.volumes.clone();
            blocking(move || Ok(volumes.lay_out(&digest).map(drop)?)).await?;
        }
        Ok(())
    }

    async fn pre_copy(
        &self,
        prepared: &Prepared,
        (lookup, subjects): (&Lookup, &Subjects),
        lease: &Arc<Lease>,
        layout: &mut Layout,
        line: &mut Line,
        shares: &mut Shares,
    ) -> Result<u32, MigrationError> {
        let (mut changed, mut number, mut captured) = (Vec::new(), 0, Instant::now());
        while rounds::another(&changed, self.asked.settings.max_rounds) {
            number += 1;
            self.node.events.step(&self.id, "pre-copy", &format!("round {number}"));
            let done = line.round(number).await?;
            let sizes = done.manifests.iter().map(|manifest| manifest.changed_bytes);
            changed.push(sizes.fold(0, u64::saturating_add));
            lease.renew()?;
            let manifests = self.parse_manifests(&done.manifests)?;
            let since = std::mem::replace(&mut captured, Instant::now()).elapsed();
            if number > 1 {
                // It will be this node's to tell.
                for ((subject, ..), told) in manifests.iter().zip(&done.manifests) {
                    let (size, changed) = (told.size_bytes, told.changed_bytes);
                    self.node.observed.learn(subject, size, changed, since);
                }
            }
            // What has changed since a round is nowhere but at the source.
            let first = number == 1;
            let mut peers = prepared.connections.source_alone();
            if first {
                let found = lookup.found(LOOKUP_WAIT).await;
                peers =
                    self.worth_asking(prepared, (&found, subjects), &done.manifests, &manifests);
            }
            let roots: Vec<_> = manifests.iter().map(|(_, root, _)| *root).collect();
            let brought = fetch(&self.node.store, lease, &peers, &roots, Depth::Content).await?;
            for ((subject, ..), brought) in manifests.iter().zip(&brought) {
                shares.add(&subject.to_string(), brought);
            }
            // Patching trees each round keeps what is left for after the stop small; memory is
            // staged once, below.
            layout.work_on(move |layout| layout.stage(&manifests)).await?;
        }
        layout.work_on(Layout::stage_memory).await?;
        Ok(number)
    }

    /// Of the neighbours that were found those that bring the end nearer.
    fn worth_asking(
        &self,
        prepared: &Prepared,
        (found, rates): (&[Entry], &Subjects),
        told: &[Manifest],
        manifests: &Parsed,
    ) -> Peers {
        let connections = &prepared.connections;
        let (mut all, subjects) = (Vec::new(), manifests.iter().map(|(subject, ..)| subject));
        for (subject, told) in subjects.clone().zip(told) {
            let rate = rates.get(subject).copied().flatten();
            let of = (subject, told.size_bytes);
            all.extend(choice::choices(&self.node, connections, found, of, rate));
        }
        for Choice { node, reason, score, .. } in &all {
            tracing::info!(migration = self.id, node, %reason, saves_s = score, "a neighbour");
        }
        let asked = choice::asked(&all, found, &subjects.collect::<Vec<_>>());
        connections.among(&asked)
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
                    return Err(MigrationError::Protocol(
                        "expected objects or the end of the stop",
                    ));
                }
            }
        };
        drop(batches);
        keeping.await.map_err(|_cause| MigrationError::Interrupted)??;
        let stopped = stopped.ok_or(MigrationError::Interrupted)?;
        let manifests = self.parse_manifests(&stopped.manifests)?;
        let volumes = self.node.volumes.clone();
        layout.work_on(move |layout| layout.finish(&manifests, &volumes)).await?;
        Ok(stopped)
    }

    /// From the shim's claim to its word on how the restore ended.
    /// Returns when the tasks ran here.
    async fn hand_off(&mut self, line: &mut Line, epoch: Epoch) -> Result<Instant, MigrationError> {
        let container = self.asked.container.clone();
        let answer = match self.command().await? {
            Command::Claim(answer) => answer,
            Command::Settle(settlement, done) => {
                let _ = done.send(());
                return Err(MigrationError::Restore(settlement.reason));
            }
        };
        let from = self.asked.from.to_string();
        // A source that has hung up may have sent a refusal before, which has the reason.
        let _ = line.send(to_source::Message::Release(Release { epoch: epoch.0 })).await;
        let verdict = match line.next().await {
            Ok(from_source::Message::Released(released)) if Epoch(released.epoch) == epoch => {
                let granted = self.node.journal.apply(&container, &Event::Granted(epoch), |_| {});
                granted.map(drop).map_err(|error| error.to_string())
            }
            Err(MigrationError::Refused { code, detail }) => {
                give_back(&self.node, &container, epoch)?;
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
                tokio::time::timeout(UNDO_MAX, self.command()).await
            {
                let _ = done.send(());
            }
            return Err(MigrationError::Restore(reason));
        }
        self.settled(Some(line), epoch).await
    }

    /// Journals that this node asks for the container, before it does.
    pub(super) async fn journal_claim(&mut self, epoch: Epoch) -> Result<(), MigrationError> {
        // Without it the entry ends only when containerd reports the deletion.
        let incarnation = incarnation(&self.node, &self.asked.container).await.ok();
        let (session, annotation) = (self.id.clone(), self.asked.annotation());
        let claim = Event::Claim(epoch, self.asked.from.to_string());
        let journalled = self.node.journal.apply(&self.asked.container, &claim, |entry| {
            entry.incarnation = incarnation;
            entry.session = Some(session);
            entry.migrate_from = Some(annotation);
        });
        journalled?;
        self.claimed = Some(epoch);
        Ok(())
    }

    /// Waits for the shim's word on how the restore ended, and passes it on to the source, if there
    /// is one.
    pub(super) async fn settled(
        &mut self,
        line: Option<&mut Line>,
        epoch: Epoch,
    ) -> Result<Instant, MigrationError> {
        let container = self.asked.container.clone();
        let (settlement, done) = loop {
            match self.command().await {
                Ok(Command::Settle(settlement, done)) => break (settlement, done),
                // The shim asks again when it lost the answer.
                Ok(Command::Claim(answer)) => drop(answer.send(Ok(()))),
                Err(error) if !self.runs_here().await => {
                    tracing::error!(
                        %container,
                        "the shim died between grant and report; the source keeps the container frozen: \
                         `godwit status` there names it"
                    );
                    return Err(error);
                }
                Err(_) => {
                    let (settlement, (done, _)) = (Settlement::running(), oneshot::channel());
                    break (settlement, done);
                }
            }
        };
        let running = Instant::now();
        let ran = settlement.running || settlement.may_have_run;
        if ran {
            arrival::ran(&self.node, &container).await?;
        } else {
            give_back(&self.node, &container, epoch)?;
            self.may_discard = true;
        }
        let _ = done.send(());
        let mut fate = Fate::NeverRan;
        if ran {
            // The source removes its copy when it hears of it.
            fate = Fate::Ran;
            match arrival::make_durable(&self.node, &container, epoch).await {
                Ok(()) => fate = Fate::RanDurably,
                Err(error) => {
                    tracing::error!(%container, error = error.chain(), "cannot flush what came");
                    arrival::make_durable_later(&self.node, &container, epoch);
                }
            }
        }
        if let Some(line) = line {
            // What may have run here is ours, also when it has ended.
            let fate = peer::Fate::from(fate).into();
            let told = Settled { fate, reason: settlement.reason.clone() };
            // Should it be lost, the source asks.
            let _ = line.send(to_source::Message::Settled(told)).await;
        }
        if settlement.running {
            Ok(running)
        } else {
            Err(MigrationError::Restore(settlement.reason))
        }
    }

    /// Errors: the container here was made of another image than the one whose chain ID is `there`.
    pub(super) async fn check_image(&self, there: &str) -> Result<(), MigrationError> {
        let (namespace, id) = (self.asked.container.namespace(), self.asked.container.id());
        let record = self.node.containerd.container(namespace, id).await?;
        origin::check_same(&self.node, namespace, &record, there).await
    }

    /// Whether containerd has a running task of the container.
    async fn runs_here(&self) -> bool {
        let (namespace, id) = (self.asked.container.namespace(), self.asked.container.id());
        let task = self.node.containerd.task(namespace, id).await;
        matches!(task, Ok(Some(task)) if task.status == TaskStatus::Running)
    }

    pub(super) async fn command(&mut self) -> Result<Command, MigrationError> {
        match tokio::time::timeout(SHIM_MAX, self.inbox.recv()).await {
            Ok(Some(command)) => Ok(command),
            Ok(None) => Err(MigrationError::Interrupted),
            Err(_) => Err(MigrationError::Unclaimed(SHIM_MAX)),
        }
    }

    /// Keeps the cut as snapshots, which serve the next migration, and removes what was staged.
    async fn finish(&self, lease: &Arc<Lease>, layout: &mut Layout, stopped: &Stopped) {
        let Ok(manifests) = self.parse_manifests(&stopped.manifests) else { return };
        let sizes = stopped.manifests.iter().map(|manifest| manifest.size_bytes);
        let name = &self.node.config.node;
        let snapshots = manifests.into_iter().zip(sizes).map(
            |((subject, (kind, root), sequence), size_bytes)| {
                Version { subject, kind, root, size_bytes, changed_bytes: 0 }
                    .snapshot(sequence, name)
            },
        );
        let snapshots: Vec<_> = snapshots.collect();
        let node = self.node.clone();
        let (lease, mut layout) = (lease.clone(), layout.clone());
        let kept = tokio::task::spawn_blocking(move || {
            let kept = record(&node, &admitted(&node, snapshots));
            layout.settle();
            layout.remove_staged();
            drop(lease);
            kept
        });
        if let Ok(Err(error)) = kept.await {
            tracing::warn!(container = %self.asked.container, %error, "cannot keep the snapshots");
        }
    }
}

/// Subject, root and sequence of each manifest.
pub(super) type Parsed = Vec<(Subject, (Kind, Digest), u64)>;
