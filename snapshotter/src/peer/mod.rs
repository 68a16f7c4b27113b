//! What daemons ask each other: gRPC over TCP, one connection per peer and purpose.
//!
//! [`Connection::open`] says hello, agrees on a version and counts every byte that crosses the
//! socket, so that a report can name what came from which node. [`fetch`] brings objects from
//! several peers at once; `api::peer` answers them. Every call has a deadline, and a peer that went
//! silent is noticed by HTTP/2 pings within [`SILENCE_MAX`].

pub mod backoff;
pub mod blobs;
pub mod fetch;
pub mod freeze_gate;
pub mod link;
pub mod neighbours;
mod queue;
mod rate;

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use godwit_protos::Digest;
use godwit_protos::peer::peer_client::PeerClient;
use godwit_protos::peer::{HelloRequest, HelloResponse, Object};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};

use crate::config::Config;
use crate::store::Stored;

/// Versions of the peer protocol, oldest first; docs/protocol.md tells what each brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Version {
    /// The first: objects by digest, blobs, hand-off.
    V1 = 1,
}

impl Version {
    /// The oldest that this build speaks.
    pub const OLDEST: Self = Self::V1;
    /// The newest that this build speaks.
    pub const NEWEST: Self = Self::V1;

    /// The newest version that both sides speak, if there is one.
    pub fn agree(oldest: u32, newest: u32) -> Option<u32> {
        let newest = newest.min(Self::NEWEST as u32);
        (newest >= oldest.max(Self::OLDEST as u32)).then_some(newest)
    }
}

/// Largest message in bytes: one object of 4 MiB and its frame.
pub const MESSAGE_BYTES_MAX: usize = (4 << 20) + (64 << 10);

/// Objects in one request, at most.
pub const OBJECTS_PER_REQUEST_MAX: usize = 1024;

/// Bytes of objects that a message carries before the next one begins.
pub const BATCH_BYTES: usize = 512 << 10;

/// After this long without a sign of life a connection counts as dead.
pub const SILENCE_MAX: Duration = Duration::from_secs(6);

/// Interval of pings on an otherwise silent connection.
pub const PING_INTERVAL: Duration = Duration::from_secs(2);

/// Bytes that may be on their way per stream and per connection: 1 Gbit/s at 100 ms and more.
pub(crate) const WINDOW_BYTES: u32 = 16 << 20;

/// How long a peer has to answer a lookup.
pub const LOOKUP_MAX: Duration = Duration::from_millis(300);

/// A stored object as it is sent, in the form in which it is stored.
pub fn stored_object(digest: Digest, stored: Stored) -> Object {
    Object {
        digest: digest.as_bytes().to_vec().into(),
        encoding: stored.encoding as u32,
        base: bytes::Bytes::new(),
        data: stored.bytes.into(),
        size_bytes: stored.size,
    }
}

/// Why a peer cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// No peer of this name is configured.
    #[error("node {0:?} is not among this node's peers; add it to [[peers]] in the configuration")]
    Unknown(String),
    /// Its address does not resolve or no daemon answers there.
    #[error("node {node} does not answer at {address}; check its daemon, the link and [[peers]]")]
    Unreachable {
        /// Its name.
        node: String,
        /// Where it should be.
        address: String,
        /// The reason.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answers, but it is another node.
    #[error(
        "node {expected} was expected at {address}, but {found:?} answers there; correct [[peers]]"
    )]
    Impostor {
        /// The name in the configuration.
        expected: String,
        /// Where.
        address: String,
        /// What it calls itself.
        found: String,
    },
    /// It answered with an error.
    #[error("node {node} refused: {}", status.message())]
    Refused {
        /// Its name.
        node: String,
        /// Its words.
        status: Box<tonic::Status>,
    },
    /// It did not answer in time.
    #[error("node {node} did not answer within {} ms; check its load and the link", limit.as_millis())]
    Slow {
        /// Its name.
        node: String,
        /// The deadline.
        limit: Duration,
    },
}

/// Bytes that crossed a connection, everything included.
#[derive(Debug, Default)]
pub struct Traffic {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Traffic {
    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

/// An open connection to a peer that has said hello.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The peer's name.
    pub node: String,
    /// What it said of itself.
    pub hello: HelloResponse,
    /// How long its answer to hello took.
    pub round_trip: Duration,
    /// What crossed the connection.
    pub traffic: Arc<Traffic>,
    client: PeerClient<Channel>,
}

impl Connection {
    /// Connects to the peer named `node` and says hello.
    ///
    /// Errors: [`PeerError`], at the latest after `limit`.
    pub async fn open(config: &Config, node: &str, limit: Duration) -> Result<Self, PeerError> {
        let peer = config.peer(node).ok_or_else(|| PeerError::Unknown(node.to_owned()))?;
        let unreachable = |source: Box<dyn std::error::Error + Send + Sync>| {
            PeerError::Unreachable { node: node.to_owned(), address: peer.address.clone(), source }
        };
        let named = peer.clone();
        let address = tokio::task::spawn_blocking(move || named.resolve())
            .await
            .map_err(|error| unreachable(error.into()))?
            .map_err(|error| unreachable(error.into()))?;
        let connect = Self::connect(config, node, address);
        match tokio::time::timeout(limit, connect).await {
            Ok(Ok(connection)) if connection.node == node => Ok(connection),
            Ok(Ok(connection)) => Err(PeerError::Impostor {
                expected: node.to_owned(),
                address: peer.address.clone(),
                found: connection.node,
            }),
            Ok(Err(source)) => Err(unreachable(source)),
            Err(_) => Err(PeerError::Slow { node: node.to_owned(), limit }),
        }
    }

    async fn connect(
        config: &Config,
        node: &str,
        address: SocketAddr,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let traffic = Arc::new(Traffic::default());
        let counter = traffic.clone();
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let traffic = counter.clone();
            async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok::<_, io::Error>(TokioIo::new(Counted { stream, traffic }))
            }
        });
        let channel = Endpoint::from_shared(format!("http://{address}"))?
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES)
            .http2_keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(SILENCE_MAX - PING_INTERVAL)
            .keep_alive_while_idle(true)
            .connect_with_connector(connector)
            .await?;
        let mut client = PeerClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let asked = Instant::now();
        let hello = client
            .hello(HelloRequest {
                oldest_version: Version::OLDEST as u32,
                newest_version: Version::NEWEST as u32,
                node: config.node.clone(),
            })
            .await
            .map_err(|status| format!("node {node}: {}", status.message()))?
            .into_inner();
        let round_trip = asked.elapsed();
        if Version::agree(hello.version, hello.version).is_none() {
            return Err(format!("it chose version {} of the protocol", hello.version).into());
        }
        Ok(Self { node: hello.node.clone(), hello, round_trip, traffic, client })
    }

    /// The generated client; clones share the connection.
    pub fn client(&self) -> PeerClient<Channel> {
        self.client.clone()
    }

    /// An error of a call on this connection.
    pub fn refused(&self, status: tonic::Status) -> PeerError {
        PeerError::Refused { node: self.node.clone(), status: Box::new(status) }
    }
}

/// A stream that counts what crosses it.
struct Counted {
    stream: TcpStream,
    traffic: Arc<Traffic>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(context, buffer);
        let read = buffer.filled().len() - before;
        self.traffic.received.fetch_add(read as u64, Ordering::Relaxed);
        done
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(written)) = &done {
            self.traffic.sent.fetch_add(*written as u64, Ordering::Relaxed);
        }
        done
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
pub(crate) mod tests;
