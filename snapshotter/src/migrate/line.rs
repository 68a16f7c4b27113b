//! The hand-off's stream, as the destination holds it: what is said to the source, and what it
//! answers.
//!
//! The stream is the session: dropping the line ends it, and the source thaws unless it has
//! released the container. docs/protocol.md has the order of the messages; [`super::source`] is the
//! other end.

use std::collections::HashMap;
use std::time::Duration;

use godwit_protos::peer::{
    self, Abort, Begin, Container as PeerContainer, FromSource, Refusal, Round, RoundDone,
    ToSource, from_source, to_source,
};
use godwit_protos::{ContainerRef, Subject};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::MigrationError;
use crate::ownership::Epoch;
use crate::peer::Connection;
use crate::policy::predict::Shape;

/// How long the source has for a round and for the cut.
const SOURCE_WORK_MAX: Duration = Duration::from_secs(600);

/// How long the destination waits for the source to let go before it reports success. Otherwise an
/// immediate move back would find the container still there.
const LET_GO_MAX: Duration = Duration::from_secs(15);

/// What a field reads as that only a newer version knows.
pub(super) const UNKNOWN_MESSAGE: &str =
    "a message that is empty, or that this version does not know";

/// Subjects of a container that are looked up: volumes, layer and memory.
const SUBJECTS_MAX: usize = 64;

/// What the rounds will bring, and how fast it is written, in bytes per second, where that was
/// measured.
pub(super) type Subjects = HashMap<Subject, Option<f64>>;

/// What the source says of a container before the first round.
pub(super) struct Beginning {
    /// The epoch of an offer to come.
    pub(super) epoch: Epoch,
    /// What the rounds will bring.
    pub(super) subjects: Subjects,
    /// Chain ID of the image that the container was made of; empty if it is not known.
    pub(super) chain_id: String,
    /// What CRIU will have to dump and restore.
    pub(super) shape: Shape,
}

/// The two directions of the hand-off stream.
pub(super) struct Line {
    to: mpsc::Sender<ToSource>,
    from: Streaming<FromSource>,
}

impl Line {
    /// Opens the stream and says what is wanted.
    pub(super) async fn open(source: &Connection, begin: Begin) -> Result<Self, MigrationError> {
        let (to, outbound) = mpsc::channel(8);
        let message = Some(to_source::Message::Begin(begin));
        let sent = to.send(ToSource { message }).await;
        sent.map_err(|_cause| MigrationError::Interrupted)?;
        let call = source.client().hand_off(ReceiverStream::new(outbound)).await;
        let from = call.map_err(|status| source.refused(status))?.into_inner();
        Ok(Self { to, from })
    }

    /// What has begun.
    pub(super) async fn begun(&mut self) -> Result<Beginning, MigrationError> {
        match self.next().await? {
            from_source::Message::Begun(begun) => {
                let rates = begun.write_rates.into_iter().chain(std::iter::repeat(0.0));
                let subjects = begun.subjects.iter().take(SUBJECTS_MAX).zip(rates);
                let parse = |(text, rate): (&String, f64)| {
                    Ok::<_, MigrationError>((text.parse()?, (rate > 0.0).then_some(rate)))
                };
                Ok(Beginning {
                    epoch: Epoch(begun.epoch),
                    subjects: subjects.map(parse).collect::<Result<_, _>>()?,
                    chain_id: begun.chain_id,
                    shape: shape(begun.shape.unwrap_or_default()),
                })
            }
            _ => Err(MigrationError::Protocol("expected begun")),
        }
    }

    /// Has the source capture every subject while the container runs.
    pub(super) async fn round(&mut self, number: u32) -> Result<RoundDone, MigrationError> {
        self.send(to_source::Message::Round(Round { number })).await?;
        match self.next().await? {
            from_source::Message::RoundDone(done) if done.number == number => Ok(done),
            _ => Err(MigrationError::Protocol("expected the end of the round")),
        }
    }

    /// Ends the session at the source, where the container runs on.
    pub(super) async fn abort(&self, reason: String) {
        let _ = self.send(to_source::Message::Abort(Abort { reason })).await;
    }

    /// Waits until the source has ended the session, or for [`LET_GO_MAX`]. The source does so once
    /// it has let go of the container and its volumes.
    pub(super) async fn ended(&mut self) {
        let until_the_end = async { while let Ok(Some(_)) = self.from.message().await {} };
        if tokio::time::timeout(LET_GO_MAX, until_the_end).await.is_err() {
            tracing::info!("the source is still removing what moved away");
        }
    }

    /// Sends a message. Errors: [`MigrationError::Broken`].
    pub(super) async fn send(&self, message: to_source::Message) -> Result<(), MigrationError> {
        let sent = self.to.send(ToSource { message: Some(message) }).await;
        sent.map_err(|_cause| MigrationError::Broken("the source hung up".to_owned()))
    }

    /// The next message. Errors: a refusal, silence, or the end of the stream.
    pub(super) async fn next(&mut self) -> Result<from_source::Message, MigrationError> {
        match tokio::time::timeout(SOURCE_WORK_MAX, self.from.message()).await {
            Err(_) => Err(MigrationError::Silent { patience: SOURCE_WORK_MAX }),
            Ok(Err(status)) => Err(MigrationError::Broken(status.message().to_owned())),
            Ok(Ok(None)) => Err(MigrationError::Broken("the source hung up".to_owned())),
            Ok(Ok(Some(answer))) => understood(answer),
        }
    }
}

/// What the source says. Errors: it refuses, or says what only a newer version knows.
fn understood(answer: FromSource) -> Result<from_source::Message, MigrationError> {
    match answer.message {
        None => Err(MigrationError::Protocol(UNKNOWN_MESSAGE)),
        Some(from_source::Message::Refusal(Refusal { code, detail })) => {
            Err(MigrationError::Refused { code, detail })
        }
        Some(message) => Ok(message),
    }
}

/// A container as a peer's message names it.
pub(super) fn named(container: &ContainerRef) -> PeerContainer {
    let (namespace, id) = (container.namespace().to_owned(), container.id().to_owned());
    PeerContainer { namespace, id }
}

fn shape(told: peer::Shape) -> Shape {
    let peer::Shape { processes, threads, mappings } = told;
    Shape { processes: processes.into(), threads: threads.into(), mappings: mappings.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    /// Method: the bytes of a message with field 31, which no version has yet.
    #[test]
    fn a_message_of_a_newer_version_says_what_to_install() {
        let newer = FromSource::decode(&[0xfa, 0x01, 0x00][..]).unwrap();
        let error = understood(newer).unwrap_err().to_string();
        assert!(error.contains("that this version does not know"), "{error}");
        assert!(error.contains("install the same version of Godwit on both nodes"), "{error}");
    }
}
