//! A read-only registry on this node's loopback address, for containerd's `hosts.toml`: whatever
//! pulls an image asks here first, with any snapshotter, and also when the image's own registry is
//! away.
//!
//! ```text
//! GET|HEAD /v2/                            200: this is a registry
//! GET|HEAD /v2/NAME/manifests/sha256:...   from containerd's content store, or a neighbour's
//! GET|HEAD /v2/NAME/blobs/sha256:...       likewise
//! GET|HEAD /v2/NAME/manifests/TAG?ns=HOST  what containerd calls HOST/NAME:TAG, here or ([`Tags`]) at neighbours
//! ```
//!
//! What is not to be had is 404, and the client goes on to the next host. A name plays no part in
//! what a digest stands for, as with every registry that is asked by digest.
//!
//! Promise: an answer that ends well has the bytes that were asked for. What comes from neighbours
//! is checked before anything is passed on. What lies here is hashed on its way, and its last piece
//! held back until all are known to be right; else the connection breaks. Source: OCI distribution
//! specification; containerd's docs/hosts.md ("ns").

mod find;
mod spool;

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use godwit_protos::Digest;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::{TokioIo, TokioTimer};
use sha2::{Digest as _, Sha256};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::config::Tags;
use crate::node::Node;
use find::Found;

/// Clients that are served at once; further ones wait to be let in.
const CONNECTIONS_MAX: usize = 64;

/// How long a client may take to say what it wants.
const HEADER_MAX: Duration = Duration::from_secs(30);

/// Pause after the system refused a connection, for lack of descriptors for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Serves the mirror. Runs until the daemon ends.
pub async fn serve(node: Arc<Node>, listener: TcpListener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // Never closed.
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(error) => {
                tracing::warn!(%error, "the mirror cannot take a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let node = node.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| answer(&node, request));
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_MAX)
                .serve_connection(TokioIo::new(connection), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a client of the mirror went away");
            }
            drop(place);
        });
    }
}

/// What a path asks for.
#[derive(Debug, PartialEq, Eq)]
enum Asked<'a> {
    Base,
    Blob(Digest),
    Manifest(Digest),
    /// A name without its registry, and a tag.
    Tag(&'a str, &'a str),
}

impl<'a> Asked<'a> {
    fn parse(path: &'a str) -> Option<Self> {
        let rest = path.strip_prefix("/v2")?;
        if matches!(rest, "" | "/") {
            return Some(Self::Base);
        }
        // From the right: names have slashes.
        let (rest, last) = rest.strip_prefix('/')?.rsplit_once('/')?;
        let (name, what) = rest.rsplit_once('/')?;
        match (what, last.parse()) {
            _ if name.is_empty() => None,
            ("blobs", digest) => digest.ok().map(Self::Blob),
            ("manifests", Ok(digest)) => Some(Self::Manifest(digest)),
            ("manifests", Err(_)) if !last.contains(':') => Some(Self::Tag(name, last)),
            _ => None,
        }
    }
}

/// The registry that a query names as the one that the client means.
fn registry(query: Option<&str>) -> Option<String> {
    let mut pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs.find(|(key, _)| *key == "ns")?;
    Some(value.replace("%3A", ":").replace("%3a", ":"))
}

async fn answer(
    node: &Arc<Node>,
    request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let mut response = match method {
        Method::GET | Method::HEAD => found(node, &method, &uri).await,
        _ => {
            let mut refused = refusal(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "read-only");
            refused.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
            refused
        }
    };
    if method == Method::HEAD {
        *response.body_mut() = whole(Bytes::new());
    }
    tracing::debug!(%uri, status = %response.status(), "mirror");
    Ok(response)
}

async fn found(node: &Arc<Node>, method: &Method, uri: &Uri) -> Response<Body> {
    let unknown = |code: &'static str| {
        refusal(StatusCode::NOT_FOUND, code, "neither this node nor a neighbour has it")
    };
    let Some(asked) = Asked::parse(uri.path()) else { return unknown("NAME_INVALID") };
    let digest = match asked {
        Asked::Base => return with_content(whole("{}".into()), "application/json", 2, None),
        // For its length alone nothing is brought.
        Asked::Blob(digest) if method == Method::HEAD => {
            return match find::size(node, digest).await {
                None => unknown("BLOB_UNKNOWN"),
                Some(size_bytes) => blob(whole(Bytes::new()), size_bytes, digest),
            };
        }
        Asked::Blob(digest) => {
            return match find::blob(node, digest, u64::MAX).await {
                None => unknown("BLOB_UNKNOWN"),
                Some(Found { size_bytes, pieces }) => {
                    let pieces = verified(pieces, digest);
                    let frames = pieces.map(|piece| piece.map(Frame::data));
                    blob(StreamBody::new(frames).boxed_unsync(), size_bytes, digest)
                }
            };
        }
        Asked::Manifest(digest) => Some(digest),
        Asked::Tag(name, tag) => match (&node.config.mirror.tags, registry(uri.query())) {
            (Tags::Off, _) | (_, None) => None,
            (tags, Some(registry)) => {
                find::tag(node, &format!("{registry}/{name}:{tag}"), *tags).await
            }
        },
    };
    let Some(digest) = digest else { return unknown("MANIFEST_UNKNOWN") };
    match find::manifest(node, digest).await {
        None => unknown("MANIFEST_UNKNOWN"),
        Some((media_type, bytes)) => {
            let length = bytes.len() as u64;
            with_content(whole(bytes.into()), &media_type, length, Some(digest))
        }
    }
}

fn blob(body: Body, size_bytes: u64, digest: Digest) -> Response<Body> {
    with_content(body, "application/octet-stream", size_bytes, Some(digest))
}

fn whole(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

fn with_content(
    body: Body,
    media_type: &str,
    length: u64,
    digest: Option<Digest>,
) -> Response<Body> {
    let mut response = Response::builder()
        .header("Docker-Distribution-Api-Version", "registry/2.0")
        .header(CONTENT_TYPE, media_type)
        .header(CONTENT_LENGTH, length);
    if let Some(digest) = digest {
        response = response.header("Docker-Content-Digest", digest.to_string());
    }
    // A media type that is no header.
    response.body(body).unwrap_or_else(|_| {
        refusal(StatusCode::NOT_FOUND, "MANIFEST_INVALID", "its media type is not one")
    })
}

/// An error in the form of the specification, "Error Codes".
fn refusal(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    let text = serde_json::json!({"errors": [{"code": code, "message": message}]}).to_string();
    let mut response = Response::new(whole(text.into()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// The same pieces, each behind the next one, and an error instead of the last if they are not what
/// `digest` names: what lies on a disk may have changed there.
fn verified(
    pieces: impl Stream<Item = io::Result<Bytes>> + Send + Unpin,
    digest: Digest,
) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let begin = Some((pieces, Sha256::new(), Bytes::new()));
    futures::stream::unfold(begin, move |rest| async move {
        let (mut pieces, mut hash, held) = rest?;
        match pieces.next().await {
            Some(Ok(piece)) => {
                hash.update(&piece);
                Some((Ok(held), Some((pieces, hash, piece))))
            }
            Some(Err(error)) => Some((Err(error), None)),
            None if Digest::from_bytes(hash.finalize().into()) == digest => Some((Ok(held), None)),
            None => {
                tracing::warn!(%digest, "blob is damaged");
                Some((Err(io::ErrorKind::InvalidData.into()), None))
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_a_manifest_a_blob_or_a_tag() {
        let digest = Digest::of(b"x");
        let path = |what: &str| format!("/v2/library/a/{what}/{digest}");
        assert_eq!(Asked::parse("/v2/"), Some(Asked::Base));
        assert_eq!(Asked::parse("/v2"), Some(Asked::Base));
        assert_eq!(Asked::parse(&path("blobs")), Some(Asked::Blob(digest)));
        assert_eq!(Asked::parse(&path("manifests")), Some(Asked::Manifest(digest)));
        let tag = Asked::parse("/v2/library/redis/manifests/7");
        assert_eq!(tag, Some(Asked::Tag("library/redis", "7")));
        for wrong in [
            "/",
            "/v1/a/manifests/b",
            "/v2/manifests/x",
            "/v2/a/blobs/latest",
            "/v2/a/manifests/sha256:12",
            "/v2/a/tags/list",
            "/v2//manifests/x",
        ] {
            assert_eq!(Asked::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_query_names_the_registry_that_is_meant() {
        assert_eq!(registry(Some("ns=docker.io")).as_deref(), Some("docker.io"));
        assert_eq!(registry(Some("a=b&ns=10.0.0.1%3A5000")).as_deref(), Some("10.0.0.1:5000"));
        assert_eq!(registry(Some("x=y")), None);
        assert_eq!(registry(None), None);
    }

    #[tokio::test]
    async fn bytes_that_are_not_asked_for_never_end_well() {
        let of = |pieces: &[&'static str], fails: bool| {
            let mut pieces: Vec<io::Result<Bytes>> =
                pieces.iter().map(|piece| Ok(Bytes::from_static(piece.as_bytes()))).collect();
            if fails {
                pieces.push(Err(io::ErrorKind::TimedOut.into()));
            }
            let pieces = futures::stream::iter(pieces);
            verified(pieces, Digest::of(b"one two")).collect::<Vec<_>>()
        };
        let good: Vec<_> = of(&["one", " ", "two"], false).await;
        let bytes: Vec<u8> = good.into_iter().flat_map(|piece| piece.unwrap().to_vec()).collect();
        assert_eq!(bytes, b"one two");
        for (wrong, fails) in
            [(&["one", " twx"][..], false), (&["one"], false), (&["one two"], true), (&[], false)]
        {
            let pieces = of(wrong, fails).await;
            assert!(pieces.last().unwrap().is_err(), "{wrong:?}");
            let sent: usize = pieces.iter().flatten().map(Bytes::len).sum();
            assert!(sent < b"one two".len(), "the last piece was sent");
        }
    }
}
