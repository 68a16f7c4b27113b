//! The gRPC side of [`Snapshotter`]: containerd's snapshots service, which a proxy plugin of type
//! "snapshot" calls.
//!
//! It has a thread of its own ([`serve`]), on which calls that wait for nothing are answered; the
//! rest is on others. A call whose caller has gone away still ends. The request's `snapshotter`
//! field is containerd's name for us and is ignored. SnapshotError codes are what containerd's
//! callers act on: the unpacker, for one, takes `ALREADY_EXISTS` for "another unpacker was faster".

use std::collections::{BTreeMap, HashMap};
use std::error::Error as _;
use std::fmt::Display;
use std::io;
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;

use containerd_client::services::v1::snapshots as api;
use containerd_client::types::Mount;
use futures::Stream;
use tokio::runtime::Builder;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

use crate::layers::{Layers, Wanted};
use crate::snapshots::{Info, Kind, MAPPINGS, SnapshotError, Snapshotter, Usage};
use generated::snapshots_server::{Snapshots as Api, SnapshotsServer};

/// `google.protobuf.Empty`, under a name the generated server can use.
pub type Empty = ();

/// The generated server.
pub mod generated {
    #![allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
    include!(concat!(env!("OUT_DIR"), "/containerd.services.snapshots.v1.Snapshots.rs"));
}

/// How many snapshots go into one message of a list, as containerd itself does it.
const INFOS_PER_MESSAGE: usize = 100;

/// containerd's snapshots service over [`Snapshotter`].
#[derive(Clone, Debug)]
pub struct Service {
    snapshots: Arc<Snapshotter>,
    layers: Option<Layers>,
}

/// Serves `listener`, the socket that containerd's `proxy_plugins` names, on a thread of its own
/// until `stop`. With `layers` it is a remote snapshotter: it supplies layers that can be had
/// without their registry.
///
/// Errors: the system's, when the thread cannot be started, and then the server's.
pub fn serve(
    listener: UnixListener,
    snapshots: Arc<Snapshotter>,
    layers: Option<Layers>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<impl Future<Output = io::Result<()>>> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    listener.set_nonblocking(true)?;
    let listener = {
        let _here = runtime.enter();
        UnixListenerStream::new(tokio::net::UnixListener::from_std(listener)?)
    };
    let service = SnapshotsServer::new(Service { snapshots, layers });
    let server = Server::builder().add_service(service);
    let (done, ended) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("snapshots".to_owned()).spawn(move || {
        let served = runtime.block_on(server.serve_with_incoming_shutdown(listener, stop));
        // With it the last that has the snapshots open.
        drop(runtime);
        let _ = done.send(served.map_err(io::Error::other));
    })?;
    Ok(async { ended.await.unwrap_or_else(|died| Err(io::Error::other(died))) })
}

impl Service {
    /// Answers in place calls that wait for nothing: a way to another thread and back would take as
    /// long again. Caller: has no more to do on its thread than this.
    fn at_once<T>(
        &self,
        call: &'static str,
        work: impl FnOnce(&Snapshotter) -> Result<T, SnapshotError>,
    ) -> Result<T, Status> {
        let done = catch_unwind(AssertUnwindSafe(|| work(&self.snapshots)));
        answer(call, done.map_err(|_panicked| "a panic"))
    }

    /// Makes a small change in place, but apart if it would wait, and others behind it.
    async fn change<T: Send + 'static>(
        &self,
        call: &'static str,
        work: impl FnOnce(&Snapshotter) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, Status> {
        if self.snapshots.is_busy() {
            return self.apart(call, work).await;
        }
        self.at_once(call, work)
    }

    /// Adds a snapshot in place, but apart where labels give its root directory an owner, which is
    /// flushed.
    async fn add(
        &self,
        call: &'static str,
        labels: HashMap<String, String>,
        work: impl FnOnce(&Snapshotter, BTreeMap<String, String>) -> Result<Vec<Mount>, SnapshotError>
        + Send
        + 'static,
    ) -> Result<Vec<Mount>, Status> {
        let has_owner = MAPPINGS.iter().any(|key| labels.contains_key(*key));
        let work = move |all: &Snapshotter| work(all, labels.into_iter().collect());
        if has_owner { self.apart(call, work).await } else { self.change(call, work).await }
    }

    /// Answers on a thread for blocking work what writes, reads or deletes whole trees.
    async fn apart<T: Send + 'static>(
        &self,
        call: &'static str,
        work: impl FnOnce(&Snapshotter) -> Result<T, SnapshotError> + Send + 'static,
    ) -> Result<T, Status> {
        let snapshots = self.snapshots.clone();
        answer(call, tokio::task::spawn_blocking(move || work(&snapshots)).await)
    }
}

fn answer<T>(
    call: &'static str,
    done: Result<Result<T, SnapshotError>, impl Display>,
) -> Result<T, Status> {
    let status = match done {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => status_of(&error),
        Err(panicked) => Status::internal(format!("{call} was cut short: {panicked}")),
    };
    if status.code() == Code::Internal {
        tracing::error!(call, error = status.message(), "snapshot call failed");
    }
    Err(status)
}

fn status_of(error: &SnapshotError) -> Status {
    let code = match error {
        SnapshotError::NotFound(_) | SnapshotError::ParentMissing(_) => Code::NotFound,
        SnapshotError::AlreadyExists(_) => Code::AlreadyExists,
        SnapshotError::NotActive { .. }
        | SnapshotError::NotMountable(_)
        | SnapshotError::HasChildren(_) => Code::FailedPrecondition,
        SnapshotError::ParentNotCommitted(_)
        | SnapshotError::Key(_)
        | SnapshotError::Label { .. }
        | SnapshotError::IdMapping(_)
        | SnapshotError::Immutable { .. }
        | SnapshotError::Filter(_) => Code::InvalidArgument,
        SnapshotError::Damaged { .. } | SnapshotError::Database(_) | SnapshotError::Io { .. } => {
            Code::Internal
        }
    };
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        message.push_str(": ");
        message.push_str(&next.to_string());
        cause = next.source();
    }
    Status::new(code, message)
}

/// The empty text stands for "no parent" on the wire.
fn parent(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn sorted(labels: HashMap<String, String>) -> BTreeMap<String, String> {
    labels.into_iter().collect()
}

fn to_api(info: Info) -> api::Info {
    let kind = match info.kind {
        Kind::View => api::Kind::View,
        Kind::Active => api::Kind::Active,
        Kind::Committed => api::Kind::Committed,
    };
    api::Info {
        name: info.name,
        parent: info.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(info.created.into()),
        updated_at: Some(info.updated.into()),
        labels: info.labels.into_iter().collect(),
    }
}

#[async_trait::async_trait]
impl Api for Service {
    type ListStream =
        Pin<Box<dyn Stream<Item = Result<api::ListSnapshotsResponse, Status>> + Send>>;

    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Result<Response<api::PrepareSnapshotResponse>, Status> {
        let api::PrepareSnapshotRequest { key, parent: below, labels, .. } = request.into_inner();
        if let (Some(layers), Some(wanted)) =
            (&self.layers, Wanted::of(&key, parent(&below), &labels))
        {
            let chain_id = wanted.chain_id();
            if layers.supply(wanted).await {
                return Err(Status::already_exists(format!("layer {chain_id} is there")));
            }
        }
        let work = move |all: &Snapshotter, labels| all.prepare(&key, parent(&below), labels);
        let mounts = self.add("prepare", labels, work).await?;
        Ok(Response::new(api::PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Result<Response<api::ViewSnapshotResponse>, Status> {
        let api::ViewSnapshotRequest { key, parent: below, labels, .. } = request.into_inner();
        let work = move |all: &Snapshotter, labels| all.view(&key, parent(&below), labels);
        let mounts = self.add("view", labels, work).await?;
        Ok(Response::new(api::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<api::MountsRequest>,
    ) -> Result<Response<api::MountsResponse>, Status> {
        let key = request.into_inner().key;
        let mounts = self.at_once("mounts", |all| all.mounts(&key))?;
        Ok(Response::new(api::MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<api::CommitSnapshotRequest>,
    ) -> Result<Response<Empty>, Status> {
        let api::CommitSnapshotRequest { name, key, labels, .. } = request.into_inner();
        self.apart("commit", move |all| all.commit(&name, &key, sorted(labels))).await?;
        Ok(Response::new(()))
    }

    async fn remove(
        &self,
        request: Request<api::RemoveSnapshotRequest>,
    ) -> Result<Response<Empty>, Status> {
        let key = request.into_inner().key;
        self.change("remove", move |all| all.remove(&key)).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Result<Response<api::StatSnapshotResponse>, Status> {
        let key = request.into_inner().key;
        let info = self.at_once("stat", |all| all.stat(&key))?;
        Ok(Response::new(api::StatSnapshotResponse { info: Some(to_api(info)) }))
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Result<Response<api::UpdateSnapshotResponse>, Status> {
        let api::UpdateSnapshotRequest { info, update_mask, .. } = request.into_inner();
        let info = info.ok_or_else(|| Status::invalid_argument("update lacks the snapshot"))?;
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let work = move |all: &Snapshotter| all.update(&info.name, sorted(info.labels), &fields);
        let info = self.change("update", work).await?;
        Ok(Response::new(api::UpdateSnapshotResponse { info: Some(to_api(info)) }))
    }

    async fn list(
        &self,
        request: Request<api::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let filters = request.into_inner().filters;
        let infos = self.apart("list", move |all| all.list(&filters)).await?;
        let messages: Vec<_> = infos
            .chunks(INFOS_PER_MESSAGE)
            .map(|some| {
                let info = some.iter().cloned().map(to_api).collect();
                Ok(api::ListSnapshotsResponse { info })
            })
            .collect();
        Ok(Response::new(Box::pin(futures::stream::iter(messages))))
    }

    async fn usage(
        &self,
        request: Request<api::UsageRequest>,
    ) -> Result<Response<api::UsageResponse>, Status> {
        let key = request.into_inner().key;
        let Usage { size_bytes, inodes } = self.apart("usage", move |all| all.usage(&key)).await?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let usage = api::UsageResponse { size: signed(size_bytes), inodes: signed(inodes) };
        Ok(Response::new(usage))
    }

    async fn cleanup(
        &self,
        _request: Request<api::CleanupRequest>,
    ) -> Result<Response<Empty>, Status> {
        self.apart("cleanup", Snapshotter::cleanup).await?;
        Ok(Response::new(()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::snapshots::KEY_BYTES_MAX;
    use crate::snapshots::tests::{fixture, holding_a_change, layer, none};

    /// Method: another caller's change takes a second. The calls have one thread, as they have in
    /// the daemon.
    #[tokio::test]
    async fn who_only_asks_does_not_wait_behind_a_change_that_waits() {
        let (_dir, snapshots) = fixture();
        snapshots.prepare("x", None, none()).unwrap();
        let snapshots = Arc::new(snapshots);
        let (begun, is_begun) = std::sync::mpsc::channel();
        let holding = std::thread::spawn({
            let snapshots = snapshots.clone();
            move || {
                holding_a_change(&snapshots, || {
                    begun.send(()).unwrap();
                    std::thread::sleep(Duration::from_secs(1));
                });
            }
        });
        is_begun.recv().unwrap();
        let server = Service { snapshots, layers: None };
        let request = api::PrepareSnapshotRequest { key: "y".to_owned(), ..Default::default() };
        let mut prepared = server.prepare(Request::new(request));
        assert!(futures::poll!(&mut prepared).is_pending());
        let request = api::StatSnapshotRequest { key: "x".to_owned(), ..Default::default() };
        server.stat(Request::new(request)).await.unwrap();
        assert!(!holding.is_finished());
        prepared.await.unwrap();
        holding.join().unwrap();
    }

    #[tokio::test]
    async fn errors_arrive_as_the_codes_that_containerd_expects() {
        let (_dir, snapshots) = fixture();
        layer(&snapshots, "a", None);
        snapshots.prepare("x", Some("a"), none()).unwrap();
        snapshots.view("v", Some("a"), none()).unwrap();
        let server = Service { snapshots: Arc::new(snapshots), layers: None };
        let prepare = async |key: &str, parent: &str| {
            let (key, parent) = (key.to_owned(), parent.to_owned());
            let request = api::PrepareSnapshotRequest { key, parent, ..Default::default() };
            server.prepare(Request::new(request)).await.map(drop).map_err(|status| status.code())
        };
        assert_eq!(prepare("x", "a").await, Err(Code::AlreadyExists));
        assert_eq!(prepare("a", "").await, Err(Code::AlreadyExists));
        assert_eq!(prepare("y", "none").await, Err(Code::NotFound));
        assert_eq!(prepare("y", "x").await, Err(Code::InvalidArgument));
        assert_eq!(prepare("", "").await, Err(Code::InvalidArgument));
        assert_eq!(prepare(&"k".repeat(KEY_BYTES_MAX + 1), "").await, Err(Code::InvalidArgument));

        let commit = async |name: &str, key: &str| {
            let (name, key) = (name.to_owned(), key.to_owned());
            let request = api::CommitSnapshotRequest { name, key, ..Default::default() };
            server.commit(Request::new(request)).await.map(drop).map_err(|status| status.code())
        };
        assert_eq!(commit("a", "x").await, Err(Code::AlreadyExists));
        assert_eq!(commit("b", "none").await, Err(Code::NotFound));
        assert_eq!(commit("b", "v").await, Err(Code::FailedPrecondition));
        assert_eq!(commit("b", "a").await, Err(Code::FailedPrecondition));

        let remove = async |key: &str| {
            let request = api::RemoveSnapshotRequest { key: key.to_owned(), ..Default::default() };
            server.remove(Request::new(request)).await.map(drop).map_err(|status| status.code())
        };
        assert_eq!(remove("a").await, Err(Code::FailedPrecondition));
        assert_eq!(remove("none").await, Err(Code::NotFound));

        let mounts = async |key: &str| {
            let request = api::MountsRequest { key: key.to_owned(), ..Default::default() };
            server.mounts(Request::new(request)).await.map(drop).map_err(|status| status.code())
        };
        assert_eq!(mounts("a").await, Err(Code::FailedPrecondition));
        assert_eq!(mounts("none").await, Err(Code::NotFound));

        let bad_update = api::UpdateSnapshotRequest {
            info: Some(api::Info { name: "a".to_owned(), ..Default::default() }),
            update_mask: Some(prost_types::FieldMask { paths: vec!["name".to_owned()] }),
            ..Default::default()
        };
        let status = server.update(Request::new(bad_update)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let filters = vec!["name~=x".to_owned()];
        let list = api::ListSnapshotsRequest { filters, ..Default::default() };
        let status = server.list(Request::new(list)).await.err().unwrap();
        assert_eq!(status.code(), Code::InvalidArgument);
        let usage = api::UsageRequest { key: "none".to_owned(), ..Default::default() };
        assert_eq!(server.usage(Request::new(usage)).await.unwrap_err().code(), Code::NotFound);
    }
}
