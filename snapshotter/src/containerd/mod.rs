//! Our client of the node's containerd.
//!
//! The migration engine asks containerd for what a container is ([`Container`]), what it runs in
//! ([`Client::task`], [`Client::mounts`]) and what its image is made of ([`ImageContent`]); at the
//! destination it gives containerd the same image blob by blob, has it unpacked into a snapshotter,
//! and creates container and task:
//!
//! ```text
//! source       image -> image_content -> read_blob ...
//! destination  lease -> write_blob ... -> unpack -> create_image -> prepare -> create_container
//!              -> create_task
//! ```
//!
//! Everything before the image has a name and the container a snapshot happens under a [`Lease`],
//! or containerd's garbage collection would take it away in between.
//!
//! Promises: a [`Client`] outlives containerd's restarts, since it connects again when asked for
//! something; every call but [`Client::wait_task`] and the streams has a deadline; blobs are
//! checked against their digests; an error names the object. Nothing is retried here except a write
//! whose ref another writer holds.
//!
//! Read next: [`unpack`](Client::unpack) for how layers become snapshots, as containerd's own
//! unpacker does it.

mod containers;
mod content;
mod events;
mod images;
mod layers;
mod leases;
mod snapshots;
mod tasks;
mod unpack;

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::version_client::VersionClient;
use containerd_client::types;
use godwit_protos::{Digest, ParseDigestError};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status, TimeoutExpired};

pub use containerd_client::types::Mount;
pub use containers::{Container, Runtime};
pub use content::BLOB_BYTES_MAX_WHOLE;
pub use events::{Event, EventKind, EventStream};
pub use images::ImageContent;
pub use layers::{FoundBlob, FoundLayer};
pub use leases::Lease;
pub use snapshots::upper_dir;
pub use tasks::{Exit, Task, TaskStatus, Terminal};
pub(crate) use unpack::LABEL_REF;

/// Deadline of connecting to containerd's socket.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// Deadline of a call that only reads or changes containerd's database.
const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// Deadline of a call that moves data or waits for a shim: unpacking a layer, starting (restoring)
/// a task.
const WORK_DEADLINE: Duration = Duration::from_secs(600);
/// Longest message we take, in bytes; containerd sends none above 16 MiB.
const MESSAGE_BYTES_MAX: usize = 16 << 20;

/// A client of one containerd. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    socket: Arc<Path>,
    /// What is created through this client is held by this lease.
    lease: Option<Arc<str>>,
}

/// What containerd says of its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// For example `1.7.24~ds1`.
    pub version: String,
    /// The commit it was built from.
    pub revision: String,
}

/// Names a blob: the part of an OCI descriptor that everyone agrees on.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Descriptor {
    /// What the bytes are, for example `application/vnd.oci.image.manifest.v1+json`.
    pub media_type: String,
    /// SHA-256 of the bytes.
    pub digest: Digest,
    /// Length of the blob.
    pub size_bytes: u64,
}

/// Why containerd did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It has no such object.
    #[error("containerd has no {0}")]
    NotFound(String),
    /// It has that object already.
    #[error("containerd already has {0}")]
    AlreadyExists(String),
    /// It does not answer; later it may.
    #[error("containerd at {socket} does not answer: {reason}")]
    Unavailable {
        /// Its socket.
        socket: String,
        /// In the words of the transport.
        reason: String,
    },
    /// It did not answer in time.
    #[error("containerd did not answer in time: {what} {object}")]
    Deadline {
        /// What was asked.
        what: &'static str,
        /// Of what.
        object: String,
    },
    /// It refused or failed for a reason of its own.
    #[error("containerd failed to {what} {object}: {reason} ({code:?})")]
    Failed {
        /// What was asked.
        what: &'static str,
        /// Of what.
        object: String,
        /// gRPC's code.
        code: Code,
        /// In its words.
        reason: String,
    },
    /// A containerd namespace that is not one.
    #[error("{0:?} cannot be a containerd namespace")]
    Namespace(String),
    /// What containerd holds or answers makes no sense.
    #[error("{object} is malformed: {reason}")]
    Malformed {
        /// What.
        object: String,
        /// In what way.
        reason: String,
    },
    /// A blob that is to be held in memory is too long for that.
    #[error("blob {digest} is longer than {limit} bytes")]
    TooLong {
        /// Which.
        digest: Digest,
        /// How long it may be.
        limit: u64,
    },
    /// The bytes are not those that the digest names. What was written of them is dropped.
    #[error("bytes do not match digest {0}")]
    WrongContent(Digest),
    /// Where the bytes to be written came from failed. What was written is kept, to be resumed.
    #[error("source of blob {digest} failed")]
    Source {
        /// Which.
        digest: Digest,
        /// Why.
        source: std::io::Error,
    },
    /// An image of that name is another image. It is not replaced.
    #[error("image {name} exists and is {existing}, not {wanted}")]
    ImageDiffers {
        /// Its name.
        name: String,
        /// What it is.
        existing: Digest,
        /// What it was to be.
        wanted: Digest,
    },
}

impl Client {
    /// A client of the containerd at `socket`. It connects with the first call, and again whenever
    /// it must.
    ///
    /// Caller: inside a tokio runtime.
    pub fn connect(socket: &Path) -> Self {
        let socket: Arc<Path> = socket.into();
        let path = socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address is for the "authority" header alone; the connector decides.
        let endpoint = Endpoint::from_static("http://containerd").connect_timeout(CONNECT_DEADLINE);
        Self { channel: endpoint.connect_with_connector_lazy(connector), socket, lease: None }
    }

    /// containerd's version. Errors: [`ClientError::Unavailable`] if it is not there.
    pub async fn version(&self) -> Result<Version, ClientError> {
        let mut request = Request::new(());
        request.set_timeout(CALL_DEADLINE);
        let answer = VersionClient::new(self.channel.clone()).version(request).await;
        let answer = answer.map_err(|status| self.failed("tell", "its version", &status))?;
        let answer = answer.into_inner();
        Ok(Version { version: answer.version, revision: answer.revision })
    }

    /// UUID of this containerd, which lies below its root directory: an empty root has another.
    ///
    /// Errors: [`ClientError::Unavailable`] if containerd is not there.
    pub async fn uuid(&self) -> Result<String, ClientError> {
        let mut request = Request::new(());
        request.set_timeout(CALL_DEADLINE);
        let answer = IntrospectionClient::new(self.channel.clone()).server(request).await;
        let answer = answer.map_err(|status| self.failed("tell", "its UUID", &status))?;
        Ok(answer.into_inner().uuid)
    }

    /// Whether containerd's configuration registers a snapshotter of this name.
    ///
    /// A proxy plugin is listed as soon as containerd has read its configuration, also while the
    /// daemon behind it is down.
    ///
    /// Errors: [`ClientError::Unavailable`] if containerd is not there.
    pub async fn has_snapshotter(&self, name: &str) -> Result<bool, ClientError> {
        let filters = vec![format!("type==io.containerd.snapshotter.v1,id=={name}")];
        let mut request = Request::new(PluginsRequest { filters });
        request.set_timeout(CALL_DEADLINE);
        let listed = IntrospectionClient::new(self.channel.clone()).plugins(request).await;
        let listed = listed.map_err(|status| self.failed("list", "its plugins", &status))?;
        Ok(!listed.into_inner().plugins.is_empty())
    }

    /// A request for an object of `namespace`, without a deadline.
    fn open_request<T>(&self, namespace: &str, message: T) -> Result<Request<T>, ClientError> {
        let bad = |_not_ascii| ClientError::Namespace(namespace.to_owned());
        let mut request = Request::new(message);
        let metadata = request.metadata_mut();
        metadata.insert("containerd-namespace", namespace.parse().map_err(bad)?);
        if let Some(lease) = &self.lease {
            metadata.insert("containerd-lease", lease.parse().map_err(bad)?);
        }
        Ok(request)
    }

    /// A request that is answered from containerd's database.
    fn request<T>(&self, namespace: &str, message: T) -> Result<Request<T>, ClientError> {
        let mut request = self.open_request(namespace, message)?;
        request.set_timeout(CALL_DEADLINE);
        Ok(request)
    }

    /// A request that takes the time of the work it asks for.
    fn work_request<T>(&self, namespace: &str, message: T) -> Result<Request<T>, ClientError> {
        let mut request = self.open_request(namespace, message)?;
        request.set_timeout(WORK_DEADLINE);
        Ok(request)
    }

    /// The error that `status` stands for, when `what` was asked of `object`.
    fn failed(
        &self,
        what: &'static str,
        object: impl Into<String>,
        status: &Status,
    ) -> ClientError {
        let object = object.into();
        match status.code() {
            Code::NotFound => ClientError::NotFound(object),
            Code::AlreadyExists => ClientError::AlreadyExists(object),
            Code::DeadlineExceeded => ClientError::Deadline { what, object },
            Code::Cancelled if causes(status).any(|cause| cause.is::<TimeoutExpired>()) => {
                ClientError::Deadline { what, object }
            }
            // A status with a cause was made on this side of the socket: the connection broke.
            code if code == Code::Unavailable || status.source().is_some() => {
                let socket = self.socket.display().to_string();
                ClientError::Unavailable { socket, reason: root_cause(status) }
            }
            code => ClientError::Failed { what, object, code, reason: status.message().to_owned() },
        }
    }
}

/// Why the transport gave this status, outermost first.
fn causes(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(status.source(), |cause: &&'_ (dyn Error + 'static)| (**cause).source())
}

/// The innermost cause of a status says most: the outer ones only name the layers it came through.
fn root_cause(status: &Status) -> String {
    causes(status).last().map_or_else(|| status.message().to_owned(), ToString::to_string)
}

/// A field that containerd must fill, but the encoding allows to be left out.
fn present<T>(field: Option<T>, object: impl FnOnce() -> String) -> Result<T, ClientError> {
    let reason = "containerd's answer lacks it".to_owned();
    field.ok_or_else(|| ClientError::Malformed { object: object(), reason })
}

/// `None` where containerd has no such object.
fn optional<T>(found: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match found {
        Ok(object) => Ok(Some(object)),
        Err(ClientError::NotFound(_)) => Ok(None),
        Err(other) => Err(other),
    }
}

fn parse_digest(text: &str, object: impl FnOnce() -> String) -> Result<Digest, ClientError> {
    text.parse().map_err(|error: ParseDigestError| ClientError::Malformed {
        object: object(),
        reason: error.to_string(),
    })
}

impl From<&Descriptor> for types::Descriptor {
    fn from(ours: &Descriptor) -> Self {
        Self {
            media_type: ours.media_type.clone(),
            digest: ours.digest.to_string(),
            size: i64::try_from(ours.size_bytes).unwrap_or(i64::MAX),
            annotations: [].into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use std::io;

    /// The migration engine spawns what it does with containerd; this must compile.
    #[tokio::test]
    async fn every_call_can_be_spawned() {
        fn spawnable(_future: impl Future + Send + 'static) {}
        let client = Client::connect(Path::new("/nonexistent.sock"));
        let digest = Digest::of(b"");
        let target = Descriptor { media_type: String::new(), digest, size_bytes: 0 };
        spawnable({
            let (client, target) = (client.clone(), target.clone());
            async move {
                let lease = client.lease("default").await?;
                let source = |_offset| futures::stream::empty::<io::Result<Bytes>>();
                lease.client().write_blob("default", digest, 0, source).await?;
                lease.client().unpack("default", &target, "godwit").await?;
                lease.client().create_image("default", "name", &target).await?;
                lease.release().await
            }
        });
        spawnable(async move {
            let content = client.image_content("default", &target).await?;
            for blob in content.blobs() {
                client.read_blob_whole("default", blob.digest, BLOB_BYTES_MAX_WHOLE).await?;
            }
            client.list_containers("default").await
        });
    }

    #[tokio::test]
    async fn an_absent_containerd_is_told_apart_from_a_refusal() {
        let error = Client::connect(Path::new("/nonexistent.sock")).version().await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "containerd at /nonexistent.sock does not answer: \
             No such file or directory (os error 2)"
        );
        let client = Client::connect(Path::new("/nonexistent.sock"));
        let error = client.subscribe(&[]).await.err();
        assert!(matches!(error, Some(ClientError::Unavailable { .. })), "{error:?}");
        // It goes away in the middle of a call.
        let dir = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                let mut settings = [0; 9];
                let _ = tokio::io::AsyncReadExt::read_exact(&mut connection, &mut settings).await;
            }
        });
        let broken = Client::connect(&dir.path().join("socket")).version().await.unwrap_err();
        assert!(matches!(broken, ClientError::Unavailable { .. }), "{broken}");
        let error = client.container("no\nname", "x").await.unwrap_err();
        assert!(matches!(error, ClientError::Namespace(_)), "{error}");
    }
}
