//! Blobs in containerd's content store.
//!
//! Writing a blob is a dialogue on one stream, one answer to each message: `STAT` opens the ref
//! (ours is the blob's digest, so the next writer goes on where the last one stopped) and
//! tells how much is there; `WRITE` appends at that offset; `COMMIT` has containerd check length
//! and digest, and gives the blob its name.

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::{
    AbortRequest, Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction,
    WriteContentRequest, WriteContentResponse,
};
use futures::{Stream, StreamExt as _};
use godwit_protos::Digest;
use prost_types::FieldMask;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::{
    CALL_DEADLINE, Client, ClientError, MESSAGE_BYTES_MAX, WORK_DEADLINE, optional, present,
};

/// Longest blob that is read into memory as a whole: manifests and configurations, 8 MiB.
pub const BLOB_BYTES_MAX_WHOLE: u64 = 8 << 20;

/// Bytes of a blob in one message; containerd takes messages of up to 16 MiB.
const PIECE_BYTES_MAX: usize = 1 << 20;

/// How long another writer of the same blob is waited for before giving up.
const LOCKED_DEADLINE: Duration = Duration::from_secs(60);
const LOCKED_PAUSE: Duration = Duration::from_millis(50);

fn blob(digest: Digest) -> String {
    format!("blob {digest}")
}

/// Lengths and offsets are signed on the wire.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// One open write.
struct Writer {
    digest: Digest,
    size_bytes: u64,
    offset: u64,
    messages: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl Client {
    pub(super) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Length of a blob in bytes, if containerd has it in that namespace.
    pub async fn has_blob(
        &self,
        namespace: &str,
        digest: Digest,
    ) -> Result<Option<u64>, ClientError> {
        let request = self.request(namespace, InfoRequest { digest: digest.to_string() })?;
        let answer = self.content().info(request).await;
        let answer = answer.map_err(|status| self.failed("look up", blob(digest), &status));
        let Some(answer) = optional(answer)? else { return Ok(None) };
        let info = present(answer.into_inner().info, || blob(digest))?;
        Ok(Some(info.size.try_into().unwrap_or(0)))
    }

    /// The bytes of a blob from `offset` on, in pieces of at most some MiB. They are not checked
    /// here: a part of a blob has no digest.
    ///
    /// Errors: [`ClientError::NotFound`], at once; any later, in the stream.
    pub async fn read_blob(
        &self,
        namespace: &str,
        digest: Digest,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Send + use<>, ClientError> {
        // containerd would answer "out of range" to an offset at the very end.
        let size = self.has_blob(namespace, digest).await?;
        let size = size.ok_or_else(|| ClientError::NotFound(blob(digest)))?;
        let message =
            ReadContentRequest { digest: digest.to_string(), offset: signed(offset), size: 0 };
        let pieces = if offset < size {
            let answer = self.content().read(self.open_request(namespace, message)?).await;
            let answer = answer.map_err(|status| self.failed("read", blob(digest), &status))?;
            Some(answer.into_inner())
        } else {
            None
        };
        let client = self.clone();
        Ok(futures::stream::iter(pieces).flatten().map(move |piece| match piece {
            Ok(piece) => Ok(Bytes::from(piece.data)),
            Err(status) => Err(client.failed("read", blob(digest), &status)),
        }))
    }

    /// A whole blob of at most `limit` bytes, checked against its digest.
    ///
    /// Errors: [`ClientError::NotFound`], [`ClientError::TooLong`], [`ClientError::WrongContent`].
    pub async fn read_blob_whole(
        &self,
        namespace: &str,
        digest: Digest,
        limit: u64,
    ) -> Result<Vec<u8>, ClientError> {
        let mut pieces = std::pin::pin!(self.read_blob(namespace, digest, 0).await?);
        let mut bytes = Vec::new();
        while let Some(piece) = pieces.next().await {
            bytes.extend_from_slice(&piece?);
            if bytes.len() as u64 > limit {
                return Err(ClientError::TooLong { digest, limit });
            }
        }
        if Digest::of(&bytes) == digest {
            Ok(bytes)
        } else {
            Err(ClientError::WrongContent(digest))
        }
    }

    /// Has containerd store a blob of `size_bytes`. `source` is asked, at most once, for the bytes
    /// from an offset on: an earlier write that was cut is gone on with. A blob that is there
    /// already is a success.
    ///
    /// - Errors: [`ClientError::Source`] when the source fails or ends early, what came so far is
    ///   kept; [`ClientError::WrongContent`] when the bytes do not match, or are more; what came is
    ///   dropped.
    /// - Cancel: dropping the future keeps what containerd has got.
    /// - Caller: a lease, or the blob may be collected before something refers to it.
    pub async fn write_blob<S>(
        &self,
        namespace: &str,
        digest: Digest,
        size_bytes: u64,
        source: impl FnOnce(u64) -> S,
    ) -> Result<(), ClientError>
    where
        S: Stream<Item = io::Result<Bytes>>,
    {
        let Some(mut writer) = self.begin_write(namespace, digest, size_bytes).await? else {
            return Ok(());
        };
        let filled = self.fill(&mut writer, source).await;
        writer.close().await;
        match filled {
            Err(ClientError::AlreadyExists(_)) => Ok(()),
            Err(error @ ClientError::WrongContent(_)) => {
                // Or the next attempt would go on behind wrong bytes.
                if let Err(error) = self.abort_write(namespace, digest).await {
                    tracing::warn!(%digest, %error, "cannot drop what was written of a blob");
                }
                Err(error)
            }
            other => other,
        }
    }

    async fn fill<S>(
        &self,
        writer: &mut Writer,
        source: impl FnOnce(u64) -> S,
    ) -> Result<(), ClientError>
    where
        S: Stream<Item = io::Result<Bytes>>,
    {
        let digest = writer.digest;
        let failed = |source| ClientError::Source { digest, source };
        if writer.offset < writer.size_bytes {
            let mut source = std::pin::pin!(source(writer.offset));
            while let Some(bytes) = source.next().await {
                let mut bytes = bytes.map_err(failed)?;
                if bytes.len() as u64 > writer.size_bytes - writer.offset {
                    return Err(ClientError::WrongContent(digest));
                }
                while !bytes.is_empty() {
                    let piece = bytes.split_to(bytes.len().min(PIECE_BYTES_MAX));
                    self.append(writer, piece).await?;
                }
            }
        }
        if writer.offset < writer.size_bytes {
            return Err(failed(io::ErrorKind::UnexpectedEof.into()));
        }
        let (offset, total) = (signed(writer.offset), signed(writer.size_bytes));
        let (action, expected) = (WriteAction::Commit.into(), digest.to_string());
        let message = WriteContentRequest { action, offset, total, expected, ..Default::default() };
        match writer.exchange(message).await {
            Ok(_) => Ok(()),
            // containerd's words for a wrong digest or length.
            Err(status) if status.code() == Code::FailedPrecondition => {
                Err(ClientError::WrongContent(digest))
            }
            Err(status) => Err(self.failed("commit", blob(digest), &status)),
        }
    }

    async fn append(&self, writer: &mut Writer, piece: Bytes) -> Result<(), ClientError> {
        let end = writer.offset + piece.len() as u64;
        let message = WriteContentRequest {
            action: WriteAction::Write.into(),
            offset: signed(writer.offset),
            data: piece.into(),
            ..Default::default()
        };
        let answer = writer.exchange(message).await;
        let answer = answer.map_err(|status| self.failed("write", blob(writer.digest), &status))?;
        if answer.offset != signed(end) {
            let reason = format!("containerd has {} bytes of it, not {end}", answer.offset);
            return Err(ClientError::Malformed { object: blob(writer.digest), reason });
        }
        writer.offset = end;
        Ok(())
    }

    /// `None` if containerd has the blob. Waits for another writer of the same blob.
    async fn begin_write(
        &self,
        namespace: &str,
        digest: Digest,
        size_bytes: u64,
    ) -> Result<Option<Writer>, ClientError> {
        let give_up = Instant::now() + LOCKED_DEADLINE;
        loop {
            match self.try_begin_write(namespace, digest, size_bytes).await {
                Ok(writer) => return Ok(Some(writer)),
                Err(ClientError::AlreadyExists(_)) => return Ok(None),
                Err(ClientError::Unavailable { reason, .. })
                    if reason.contains("locked") && Instant::now() < give_up =>
                {
                    sleep(LOCKED_PAUSE).await;
                }
                Err(other) => return Err(other),
            }
        }
    }

    async fn try_begin_write(
        &self,
        namespace: &str,
        digest: Digest,
        size_bytes: u64,
    ) -> Result<Writer, ClientError> {
        let failed = |status: Status| self.failed("write", blob(digest), &status);
        let (messages, received) = mpsc::channel(1);
        let open = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: write_ref(digest),
            total: signed(size_bytes),
            expected: digest.to_string(),
            ..Default::default()
        };
        // There is room for one message, so this does not wait.
        let _ = messages.send(open).await;
        let request = self.open_request(namespace, ReceiverStream::new(received))?;
        let answers = self.content().write(request).await.map_err(failed)?.into_inner();
        let mut writer = Writer { digest, size_bytes, offset: 0, messages, answers };
        let there = writer.answer().await.map_err(failed)?.offset;
        // More than the whole is not the beginning of it: writing at 0 makes containerd drop it.
        writer.offset = u64::try_from(there).ok().filter(|there| *there <= size_bytes).unwrap_or(0);
        Ok(writer)
    }

    /// Drops what was written of a blob, if anything.
    pub async fn abort_write(&self, namespace: &str, digest: Digest) -> Result<(), ClientError> {
        let request = self.request(namespace, AbortRequest { r#ref: write_ref(digest) })?;
        let answer = self.content().abort(request).await;
        optional(answer.map_err(|status| self.failed("abort", blob(digest), &status))).map(drop)
    }

    /// Adds `labels` to a blob's. Errors: [`ClientError::NotFound`].
    pub(super) async fn label_blob(
        &self,
        namespace: &str,
        digest: Digest,
        labels: HashMap<String, String>,
    ) -> Result<(), ClientError> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = Info { digest: digest.to_string(), labels, ..Default::default() };
        let update_mask = Some(FieldMask { paths });
        let request = self.request(namespace, UpdateRequest { info: Some(info), update_mask })?;
        let answer = self.content().update(request).await;
        answer.map(drop).map_err(|status| self.failed("label", blob(digest), &status))
    }
}

fn write_ref(digest: Digest) -> String {
    format!("godwit-{digest}")
}

impl Writer {
    /// Sends one message and waits for its answer.
    async fn exchange(
        &mut self,
        message: WriteContentRequest,
    ) -> Result<WriteContentResponse, Status> {
        // If containerd has ended the stream, its reason is the answer.
        let _ = self.messages.send(message).await;
        self.answer().await
    }

    /// Waits until containerd has let go of the ref, so that the next writer finds it free.
    async fn close(self) {
        let Self { messages, mut answers, .. } = self;
        drop(messages);
        let end = async { while let Ok(Some(_)) = answers.message().await {} };
        let _ = timeout(CALL_DEADLINE, end).await;
    }

    async fn answer(&mut self) -> Result<WriteContentResponse, Status> {
        match timeout(WORK_DEADLINE, self.answers.message()).await {
            Ok(Ok(Some(answer))) => Ok(answer),
            Ok(Ok(None)) => Err(Status::aborted("containerd ended the write without an answer")),
            Ok(Err(status)) => Err(status),
            Err(_elapsed) => Err(Status::deadline_exceeded("no answer")),
        }
    }
}
