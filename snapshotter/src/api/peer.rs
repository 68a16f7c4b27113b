//! Answering peers.
//!
//! Every request meets a limit before it meets memory, and every answer is a stream whose flow
//! control holds back a fast reader of a slow disk, and a slow reader of a fast one.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use godwit_protos::peer::peer_server::{Peer, PeerServer};
use godwit_protos::peer::{
    BlobPiece, DescribeRequest, DescribeResponse, FetchObjectsRequest, ForgetRequest,
    ForgetResponse, FromSource, HelloRequest, HelloResponse, Image, ImageHeld, KeepRequest,
    KeepResponse, LocateRequest, LocateResponse, MakeLayerProgress, MakeLayerRequest,
    MigrateRequest, ObjectBatch, OwnershipRequest, OwnershipResponse, PlanResponse, Progress,
    ReadBlobRequest, ToSource,
};
use godwit_protos::{ContainerRef, Digest, MigrateFrom, peer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::capture::placement::{self, Keeper};
use crate::containerd::ClientError;
use crate::directory::{Query, neighbours};
use crate::error::chain;
use crate::host::load;
use crate::layers::make::Maker;
use crate::migrate::destination::{Sessions, Settings};
use crate::migrate::outcome::{self, Failure};
use crate::migrate::{MigrationError, describe::describe, plan, request, restore, source};
use crate::node::{Node, is_outcome};
use crate::ownership::journal::JournalError;
use crate::ownership::{Epoch, Ownership};
use crate::peer::{
    BATCH_BYTES, MESSAGE_BYTES_MAX, OBJECTS_PER_REQUEST_MAX, Version, stored_object,
};
use crate::retention::free_bytes;

/// Names in one lookup, at most.
const LOOKUPS_MAX: usize = 1024;

/// Bytes of a piece of a blob, at most.
const PIECE_BYTES_MAX: usize = 512 << 10;

/// How long an image is held for a peer that goes on asking.
const HELD_MAX: Duration = Duration::from_secs(3600);

/// Messages of one answer that wait for the network.
const QUEUE: usize = 4;

/// The peer service of a node.
#[derive(Clone, Debug)]
pub struct Service {
    node: Arc<Node>,
    sessions: Arc<Sessions>,
    maker: Arc<Maker>,
    keeper: Arc<Keeper>,
}

/// The service, to be added to a server.
pub fn service(sessions: Arc<Sessions>) -> PeerServer<Service> {
    let node = sessions.node.clone();
    let maker = Arc::new(Maker::new(node.clone()));
    let keeper = Arc::new(Keeper::new(node.clone()));
    PeerServer::new(Service { node, sessions, maker, keeper })
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
}

impl Service {
    /// A namespace that has the blob, and its length: this one, or any if it is empty.
    async fn find_blob(
        &self,
        namespace: &str,
        digest: Digest,
    ) -> Result<Option<(String, u64)>, ClientError> {
        let containerd = &self.node.containerd;
        if namespace.is_empty() {
            let found = containerd.find_blob(digest).await?;
            return Ok(found.map(|found| (found.namespace, found.size_bytes)));
        }
        let size = containerd.has_blob(namespace, digest).await?;
        Ok(size.map(|size| (namespace.to_owned(), size)))
    }
}

type Answer<T> = Result<Response<T>, Status>;
type Pinned<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// The gRPC form of an error: its code in front, the chain behind.
fn status(error: &MigrationError) -> Status {
    let text = error.chain();
    match error {
        MigrationError::NoContainer(..) => Status::not_found(text),
        // The container is on its way here: see `migrate/restore.rs`.
        MigrationError::Leased(_) => Status::aborted(text),
        MigrationError::NotRunning { .. }
        | MigrationError::NoShim(_)
        | MigrationError::Busy { .. }
        | MigrationError::Obstacles(_)
        | MigrationError::RunsHere { .. }
        | MigrationError::Exists { .. } => Status::failed_precondition(text),
        MigrationError::Name(_) | MigrationError::Digest(_) => Status::invalid_argument(text),
        _ => Status::internal(text),
    }
}

fn named(container: Option<godwit_protos::peer::Container>) -> Result<ContainerRef, Status> {
    let container = container.unwrap_or_default();
    ContainerRef::new(&container.namespace, &container.id)
        .map_err(|error| Status::invalid_argument(error.to_string()))
}

#[tonic::async_trait]
impl Peer for Service {
    async fn hello(&self, request: Request<HelloRequest>) -> Answer<HelloResponse> {
        let hello = request.into_inner();
        let Some(version) = Version::agree(hello.oldest_version, hello.newest_version) else {
            return Err(Status::failed_precondition(format!(
                "node {} speaks versions {} to {} of the peer protocol, this node {} to {}",
                hello.node,
                hello.oldest_version,
                hello.newest_version,
                Version::OLDEST as u32,
                Version::NEWEST as u32
            )));
        };
        Ok(Response::new(HelloResponse {
            version,
            node: self.node.config.node.clone(),
            features: Vec::new(),
            load: load(),
            criu_version: self.node.criu_version.clone(),
            free_bytes: free_bytes(&self.node).unwrap_or(0),
            architecture: std::env::consts::ARCH.to_owned(),
            labels: self.node.config.labels.clone().into_iter().collect(),
        }))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Answer<LocateResponse> {
        let asked = request.into_inner();
        let names =
            [asked.subjects.len(), asked.services.len(), asked.blobs.len(), asked.images.len()];
        if asked.manifests.len() + names.iter().sum::<usize>() > LOOKUPS_MAX {
            let text = format!("more than {LOOKUPS_MAX} names in one lookup");
            return Err(Status::invalid_argument(text));
        }
        let mut query = neighbours::query(&asked);
        if !self.node.config.sibling_memory {
            query.services.clear();
        }
        let mut answer = LocateResponse { load: load(), ..LocateResponse::default() };
        for blob in asked.blobs {
            let Ok(digest) = blob.parse() else { continue };
            if let Ok(Some((_, size_bytes))) = self.find_blob(&asked.namespace, digest).await {
                answer.blobs.push(blob);
                answer.blob_sizes.push(size_bytes);
            }
        }
        for name in asked.images {
            if let Ok(Some(digest)) = self.node.containerd.find_image(&name).await {
                let digest = digest.as_bytes().to_vec().into();
                answer.images.push(Image { name, digest });
            }
        }
        if query != Query::default() {
            let node = self.node.clone();
            let held = tokio::task::spawn_blocking(move || node.held()).await;
            let held = held.map_err(|_cause| Status::cancelled("stopping"))?;
            let held = held.map_err(|error| Status::internal(crate::error::chain(&error)))?;
            (answer.snapshots, answer.manifests) = neighbours::answer(query.select(held));
        }
        Ok(Response::new(answer))
    }

    type FetchObjectsStream = ReceiverStream<Result<ObjectBatch, Status>>;

    async fn fetch_objects(
        &self,
        request: Request<FetchObjectsRequest>,
    ) -> Answer<Self::FetchObjectsStream> {
        let digests = request.into_inner().digests;
        if digests.len() > OBJECTS_PER_REQUEST_MAX {
            let text = format!("more than {OBJECTS_PER_REQUEST_MAX} objects in one request");
            return Err(Status::invalid_argument(text));
        }
        let digests: Vec<Digest> = digests
            .iter()
            .map(|digest| Digest::try_from(&digest[..]))
            .collect::<Result<_, _>>()
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let (send, receive) = mpsc::channel(QUEUE);
        let node = self.node.clone();
        tokio::task::spawn_blocking(move || send_objects(&node, &digests, &send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    type ReadBlobStream = Pinned<BlobPiece>;

    async fn read_blob(&self, request: Request<ReadBlobRequest>) -> Answer<Self::ReadBlobStream> {
        let asked = request.into_inner();
        let digest: Digest =
            asked.digest.parse().map_err(|error: godwit_protos::ParseDigestError| {
                Status::invalid_argument(error.to_string())
            })?;
        let missing = |error: ClientError| Status::not_found(error.to_string());
        let containerd = &self.node.containerd;
        let found = self.find_blob(&asked.namespace, digest).await.map_err(missing)?;
        let (namespace, total_bytes) =
            found.ok_or_else(|| Status::not_found(format!("no blob {digest}")))?;
        let pieces =
            containerd.read_blob(&namespace, digest, asked.offset).await.map_err(missing)?;
        let node = self.node.clone();
        let pieces = pieces.then(move |piece| {
            let node = node.clone();
            async move {
                node.freeze_gate.give_way().await;
                piece
            }
        });
        let pieces = pieces.flat_map(move |piece| {
            let cut = match piece {
                Err(error) => vec![Err(Status::internal(error.to_string()))],
                Ok(mut bytes) => {
                    let mut cut = Vec::new();
                    while !bytes.is_empty() {
                        let data = bytes.split_to(bytes.len().min(PIECE_BYTES_MAX));
                        cut.push(Ok(BlobPiece { data, total_bytes }));
                    }
                    cut
                }
            };
            futures::stream::iter(cut)
        });
        Ok(Response::new(Box::pin(pieces)))
    }

    type MakeLayerStream = ReceiverStream<Result<MakeLayerProgress, Status>>;

    async fn make_layer(
        &self,
        request: Request<MakeLayerRequest>,
    ) -> Answer<Self::MakeLayerStream> {
        if !self.node.config.layers.make {
            return Err(Status::permission_denied("this node makes no layers for others"));
        }
        let MakeLayerRequest { diff_id, blob } = request.into_inner();
        let digest = |bytes: &[u8]| {
            Digest::try_from(bytes).map_err(|error| Status::invalid_argument(error.to_string()))
        };
        let layer = (digest(&diff_id)?, digest(&blob)?);
        let (send, receive) = mpsc::channel(QUEUE);
        // On its own: what was begun is of use to the next who asks.
        tokio::spawn(self.maker.clone().make(layer, send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn describe(&self, request: Request<DescribeRequest>) -> Answer<DescribeResponse> {
        let container = named(request.into_inner().container)?;
        let described = describe(&self.node, &container).await.map_err(|error| status(&error))?;
        described.check_movable(&self.node).map_err(|error| status(&error))?;
        let findings = described.survey(&self.node).await.map_err(|error| status(&error))?;
        Ok(Response::new(described.response(&self.node, findings)))
    }

    type HoldImageStream = ReceiverStream<Result<ImageHeld, Status>>;

    async fn hold_image(&self, request: Request<DescribeRequest>) -> Answer<Self::HoldImageStream> {
        let container = named(request.into_inner().container)?;
        let described = describe(&self.node, &container).await.map_err(|error| status(&error))?;
        let held = described.hold_image(&self.node).await.map_err(|error| status(&error))?;
        let (send, receive) = mpsc::channel(1);
        tokio::spawn(async move {
            if send.send(Ok(ImageHeld {})).await.is_ok() {
                // A peer that hangs up, or loses the connection, has what it wanted or never will.
                let _ = tokio::time::timeout(HELD_MAX, send.closed()).await;
            }
            if let Err(error) = held.release().await {
                tracing::warn!(%container, %error, "cannot release its image; the lease expires");
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    type HandOffStream = ReceiverStream<Result<FromSource, Status>>;

    async fn hand_off(&self, request: Request<Streaming<ToSource>>) -> Answer<Self::HandOffStream> {
        let (send, receive) = mpsc::channel(QUEUE);
        // On its own, so that it ends in a thaw even when the answer's stream is dropped.
        tokio::spawn(source::hand_off(self.node.clone(), request.into_inner(), send));
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    async fn ownership(&self, request: Request<OwnershipRequest>) -> Answer<OwnershipResponse> {
        let request = request.into_inner();
        let container = named(request.container)?;
        let failed = |error: JournalError| Status::internal(chain(&error));
        let ledger = self.node.journal.ledger(&container).map_err(failed)?;
        let entry = self.node.journal.container(&container).map_err(failed)?;
        let epoch = Epoch(request.epoch);
        let ended = ledger.ended.get(&epoch).map(|ended| ended.peer.clone());
        let open = ledger.state.as_ref().filter(|state| state.epoch() == epoch);
        let open = open.and_then(Ownership::peer).map(str::to_owned);
        let incarnation = entry.and_then(|entry| entry.incarnation);
        Ok(Response::new(OwnershipResponse {
            fate: peer::Fate::from(ledger.fate(epoch, &request.peer)).into(),
            epoch: ledger.last().0,
            recipient: ended.or(open).unwrap_or_default(),
            incarnation: incarnation.map(|one| one.to_string()).unwrap_or_default(),
        }))
    }

    async fn keep(&self, request: Request<KeepRequest>) -> Answer<KeepResponse> {
        let keeper = self.keeper.clone();
        // On its own: what has come is kept even if the caller does not wait.
        let kept = tokio::spawn(async move { keeper.keep(request.into_inner()).await });
        let kept = kept.await.map_err(|_cause| Status::cancelled("stopping"))?;
        Ok(Response::new(KeepResponse { refused: kept.err().unwrap_or_default() }))
    }

    async fn forget(&self, request: Request<ForgetRequest>) -> Answer<ForgetResponse> {
        let node = self.node.clone();
        let noted =
            tokio::task::spawn_blocking(move || placement::forget(&node, &request.into_inner()));
        let noted = noted.await.map_err(|_cause| Status::cancelled("stopping"))?;
        noted.map_err(Status::internal)?;
        Ok(Response::new(ForgetResponse {}))
    }

    type MigrateStream = Pinned<Progress>;

    async fn migrate(&self, request: Request<MigrateRequest>) -> Answer<Self::MigrateStream> {
        let wanted = Wanted::Migrate(wanted(request.into_inner())?);
        Ok(Response::new(follow(&self.sessions, wanted)))
    }

    async fn plan(&self, request: Request<MigrateRequest>) -> Answer<PlanResponse> {
        let wanted = wanted(request.into_inner())?;
        let plan = plan::plan(&self.node, &wanted).await.map_err(|error| status(&error))?;
        let plan_json = serde_json::to_string(&plan);
        let plan_json = plan_json.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(PlanResponse { plan_json }))
    }
}

/// What is asked for. Errors: a name or a mode that there is not.
pub fn wanted(asked: MigrateRequest) -> Result<request::Request, Status> {
    let container = named(asked.container.clone())?;
    let settings = settings(&asked).map_err(Status::invalid_argument)?;
    let from = MigrateFrom { node: asked.from, container };
    let netns = (!asked.netns.is_empty()).then_some(asked.netns);
    Ok(request::Request { from, settings, netns })
}

fn settings(asked: &MigrateRequest) -> Result<Settings, String> {
    let cooperative = match asked.mode.as_str() {
        "" | "cooperative" => true,
        "traditional" => false,
        other => return Err(format!("mode {other:?} is neither cooperative nor traditional")),
    };
    let writable_layer = !asked.without_writable_layer;
    let settings = Settings { cooperative, max_rounds: asked.max_rounds, writable_layer };
    settings.check()?;
    Ok(settings)
}

/// What is known of a container when the work for it was cut short.
const UNKNOWN: &str = "`godwit status` at both nodes says which of them has it";

/// What brings a container to this node.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// From the node that runs it.
    Migrate(request::Request),
    /// From a cut that is here.
    Restore(restore::Request),
}

/// Starts bringing a container here and follows the events to the last one.
pub fn follow(sessions: &Arc<Sessions>, wanted: Wanted) -> Pinned<Progress> {
    let node = &sessions.node;
    let migration = node.new_id();
    let mut events = node.events.subscribe();
    let (send, receive) = mpsc::channel(QUEUE);
    let (node, sessions) = (node.clone(), sessions.clone());
    // On its own: a client that goes away does not stop a migration.
    tokio::spawn(async move {
        let work = tokio::spawn({
            let (node, migration) = (node.clone(), migration.clone());
            async move {
                let asked = match &wanted {
                    Wanted::Migrate(wanted) => {
                        request::migrate(&sessions, &migration, wanted).await
                    }
                    Wanted::Restore(wanted) => {
                        restore::restore(&sessions, &migration, wanted).await
                    }
                };
                // The session knows better than its shim's client.
                let failure = sessions.failure_of(&migration).await;
                match (failure.or(asked.err().map(Failure::of)), &wanted) {
                    (None, _) => {}
                    (Some(failure), Wanted::Migrate(wanted)) => {
                        let from = &wanted.from;
                        outcome::tell(&node, &migration, from, &from.container, &failure).await;
                    }
                    (Some(failure), Wanted::Restore(_)) => {
                        node.events.failed(&migration, &failure.error, restore::OUTLOOK, false);
                    }
                }
            }
        });
        // A client that waits must hear of a panic, too.
        tokio::spawn({
            let (node, migration) = (node.clone(), migration.clone());
            async move {
                if work.await.is_err() {
                    node.events.failed(&migration, &MigrationError::Interrupted, UNKNOWN, true);
                }
            }
        });
        while let Some(event) = events.next().await {
            if event.migration != migration {
                continue;
            }
            let is_last = is_outcome(&event);
            let is_gone = send.send(Ok(event)).await.is_err();
            if is_last || is_gone {
                break;
            }
        }
    });
    Box::pin(ReceiverStream::new(receive))
}

/// Sends what the store has, in its stored form, and the names of what it has not.
fn send_objects(node: &Node, digests: &[Digest], send: &mpsc::Sender<Result<ObjectBatch, Status>>) {
    let send = |batch| {
        tokio::runtime::Handle::current().block_on(node.freeze_gate.give_way());
        send.blocking_send(Ok(batch))
    };
    let (mut batch, mut bytes) = (ObjectBatch::default(), 0);
    for digest in digests {
        match node.store.get_stored(digest) {
            Ok(Some(stored)) => {
                if bytes + stored.bytes.len() > BATCH_BYTES && !batch.objects.is_empty() {
                    bytes = 0;
                    if send(std::mem::take(&mut batch)).is_err() {
                        return;
                    }
                }
                bytes += stored.bytes.len();
                batch.objects.push(stored_object(*digest, stored));
            }
            Ok(None) => batch.missing.push(digest.as_bytes().to_vec().into()),
            Err(error) => {
                tracing::warn!(%digest, %error, "object cannot be served");
                batch.missing.push(digest.as_bytes().to_vec().into());
            }
        }
    }
    let _ = send(batch);
}
