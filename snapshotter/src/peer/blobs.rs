//! Blobs of containerd's content store, from peers.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt as _, stream};
use godwit_protos::Digest;
use godwit_protos::peer::{LocateRequest, LocateResponse, ReadBlobRequest};

use super::LOOKUP_MAX;
use super::{Connection, PeerError};

/// Bytes per second below which a neighbour is not worth waiting for ...
pub const RATE_MIN: f64 = 256e3;

/// ... once it has had this long.
const RATE_AFTER: Duration = Duration::from_millis(250);

/// What is expected of a peer that sends a blob.
#[derive(Clone, Copy, Debug)]
pub struct Demand {
    /// Longest wait for the next piece.
    pub patience: Duration,
    /// Bytes per second.
    pub rate_min: f64,
}

/// Pieces of a blob, not checked, each with the size of the whole.
pub type Pieces = BoxStream<'static, io::Result<(Bytes, u64)>>;

/// Those of `peers` that say they have a blob in `namespace`, or in any if that is empty; and the
/// names of those that left the question without an answer.
pub async fn holders(
    peers: Vec<Arc<Connection>>,
    namespace: &str,
    digest: Digest,
) -> (Vec<Arc<Connection>>, Vec<String>) {
    let asked = LocateRequest {
        blobs: vec![digest.to_string()],
        namespace: namespace.to_owned(),
        ..LocateRequest::default()
    };
    let (mut holders, mut silent) = (Vec::new(), Vec::new());
    for (peer, answer) in locate(peers, asked).await {
        match answer {
            Some(answer) if answer.blobs.is_empty() => {}
            Some(_) => holders.push(peer),
            None => silent.push(peer.node.clone()),
        }
    }
    (holders, silent)
}

/// What each of `peers` answers; `None` for one that does not in time.
pub async fn locate(
    peers: Vec<Arc<Connection>>,
    asked: LocateRequest,
) -> Vec<(Arc<Connection>, Option<LocateResponse>)> {
    let asks = peers.into_iter().map(|peer| {
        let (mut client, asked) = (peer.client(), asked.clone());
        async move {
            let answer = tokio::time::timeout(LOOKUP_MAX, client.locate(asked)).await;
            (peer, answer.ok().and_then(Result::ok).map(tonic::Response::into_inner))
        }
    });
    futures::future::join_all(asks).await
}

/// Begins to read a blob from `offset` on. Errors: at once when the peer refuses or is silent;
/// later in the stream.
pub async fn open(
    peer: &Connection,
    namespace: &str,
    digest: Digest,
    offset: u64,
    demand: Demand,
) -> Result<Pieces, PeerError> {
    let asked =
        ReadBlobRequest { namespace: namespace.to_owned(), digest: digest.to_string(), offset };
    let mut client = peer.client();
    let begun = Instant::now();
    let Demand { patience, rate_min } = demand;
    let answer = tokio::time::timeout(patience, client.read_blob(asked)).await;
    let slow = |_elapsed| PeerError::Slow { node: peer.node.clone(), limit: patience };
    let pieces = answer.map_err(slow)?.map_err(|status| peer.refused(status))?.into_inner();
    let pieces = stream::unfold(Some((pieces, 0u64)), move |rest| async move {
        let (mut pieces, mut bytes) = rest?;
        match tokio::time::timeout(patience, pieces.message()).await {
            Err(_) => Some((Err(io::ErrorKind::TimedOut.into()), None)),
            Ok(Err(status)) => Some((Err(io::Error::other(status.message().to_owned())), None)),
            Ok(Ok(None)) => None,
            Ok(Ok(Some(piece))) => {
                bytes += piece.data.len() as u64;
                let is_whole = offset + bytes >= piece.total_bytes;
                if begun.elapsed() > RATE_AFTER && !is_whole && rate(bytes, begun) < rate_min {
                    let text = format!("only {bytes} bytes in {} ms", begun.elapsed().as_millis());
                    return Some((Err(io::Error::other(text)), None));
                }
                Some((Ok((piece.data, piece.total_bytes)), Some((pieces, bytes))))
            }
        }
    });
    Ok(pieces.boxed())
}

/// Bytes per second.
fn rate(bytes: u64, since: Instant) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let bytes = bytes as f64;
    bytes / since.elapsed().as_secs_f64()
}
