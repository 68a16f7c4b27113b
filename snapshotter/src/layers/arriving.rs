//! The bytes of a layer in their order, also while its objects still arrive in another: containerd
//! is given the first bytes long before the last have come.
//!
//! A reader waits for the object that it needs next, until the fetch is over ([`Coming`] dropped),
//! and then ends with an error if that never came.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use godwit_protos::Digest;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::QUEUE;
use crate::content::{ContentError, Source, layer};
use crate::store::Store;

/// Bytes of a layer that containerd is given at once.
const PIECE_BYTES: usize = 512 << 10;

/// How often is looked whether the next object has come.
const LOOK: Duration = Duration::from_millis(5);

/// A fetch that goes on; dropping it is its end.
#[derive(Debug, Default)]
pub(super) struct Coming(Arc<AtomicBool>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The objects of a fetch as they come: what is not here yet is waited for until the fetch is over.
/// For threads.
#[derive(Clone)]
pub(super) struct Arriving {
    store: Store,
    is_over: Arc<AtomicBool>,
}

impl Arriving {
    pub(super) fn new(store: Store, coming: &Coming) -> Self {
        Self { store, is_over: coming.0.clone() }
    }
}

impl Source for Arriving {
    fn object(&self, digest: &Digest) -> Result<Vec<u8>, ContentError> {
        loop {
            // Looked at first, or what comes last might be missed.
            let is_over = self.is_over.load(Ordering::Acquire);
            match self.store.object(digest) {
                Err(ContentError::Missing(_)) if !is_over => std::thread::sleep(LOOK),
                found => return found,
            }
        }
    }
}

/// The bytes of a layer's object from `offset` on.
pub(super) fn bytes_of(
    objects: impl Source + Send + 'static,
    root: Digest,
    offset: u64,
) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin {
    let (send, receive) = mpsc::channel(QUEUE);
    tokio::task::spawn_blocking(move || {
        let mut piece = BytesMut::new();
        let read = layer::read(&objects, &root, offset, &mut |data| {
            piece.extend_from_slice(&data);
            piece.len() < PIECE_BYTES || send.blocking_send(Ok(piece.split().freeze())).is_ok()
        });
        // A reader that does not listen any more does not mind.
        let _ = send.blocking_send(read.map(|()| piece.freeze()).map_err(io::Error::other));
    });
    ReceiverStream::new(receive)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use futures::StreamExt as _;

    use super::*;
    use crate::store::Options;

    async fn all(mut bytes: impl Stream<Item = io::Result<Bytes>> + Unpin) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(piece) = bytes.next().await {
            all.extend_from_slice(&piece?);
        }
        Ok(all)
    }

    /// Method: the objects of a layer are put into the store one by one, the last first, while it
    /// is read.
    #[tokio::test]
    async fn a_layer_is_read_while_it_arrives_and_not_beyond_the_end_of_that() {
        let bytes: Vec<u8> = (0..400_000u32).flat_map(|number| number.to_le_bytes()).collect();
        let mut objects = crate::content::fake::Objects::default();
        let (root, _) = layer::put(&bytes[..], Path::new("layer"), &mut objects).unwrap();
        let parts: Vec<_> = objects.0.values().cloned().collect();
        for arrive in [parts.len(), parts.len() - 1] {
            let directory = tempfile::tempdir().unwrap();
            let options = Options { reserve_bytes: 0, ..Options::default() };
            let store = Store::open(directory.path(), options).unwrap();
            let coming = Coming::default();
            let reading = bytes_of(Arriving::new(store.clone(), &coming), root, 0);
            let lease = store.lease("test", Duration::from_secs(60));
            let arriving = async {
                for part in parts.iter().rev().take(arrive) {
                    let mut writer = store.writer(&lease);
                    writer.put(part).unwrap();
                    writer.flush().unwrap();
                    tokio::time::sleep(LOOK / 4).await;
                }
                drop(coming);
            };
            let (read, ()) = tokio::join!(all(reading), arriving);
            assert_eq!(read.is_ok(), arrive == parts.len());
            assert!(read.map_or(true, |read| read == bytes));
        }
    }
}
