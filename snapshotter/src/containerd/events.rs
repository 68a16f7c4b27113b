//! What happens in containerd, as it tells it.

use std::pin::Pin;
use std::time::Duration;

use containerd_client::events::{ContainerDelete, TaskExit};
use containerd_client::services::v1::SubscribeRequest;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::types::Envelope;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use prost::Message as _;
use tokio::time::timeout;
use tonic::Request;

use super::{Client, ClientError};

/// How long containerd takes at most to set a subscription up.
const STANDS_AFTER: Duration = Duration::from_millis(200);

/// Something that happened in some namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Where.
    pub namespace: String,
    /// containerd's topic, for example `/tasks/exit`.
    pub topic: String,
    /// What, if it is of a kind we care for.
    pub kind: EventKind,
}

/// The kinds of events we care for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A container's record was deleted.
    ContainerDeleted {
        /// Its id.
        id: String,
    },
    /// A process of a container ended.
    TaskExited {
        /// The container.
        container_id: String,
        /// The container's id for the init process, the exec's for another.
        exec_id: String,
        /// Its pid.
        pid: u32,
        /// Its exit status.
        exit_status: u32,
    },
    /// Something else.
    Other,
}

/// Events as they come; ends, or has an error last, when containerd goes away.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, ClientError>> + Send>>;

impl Client {
    /// Events of all namespaces, those that any of `filters` matches, such as
    /// `topic=="/tasks/exit"`.
    ///
    /// containerd does not say that a subscription stands, it answers with the first event. So this
    /// waits for [`STANDS_AFTER`], in which a refusal would come, and then takes it to stand: what
    /// happens after this returns is in the stream. What happened before, or after the stream has
    /// ended, is to be looked up.
    ///
    /// Errors: [`ClientError::Unavailable`], here or last in the stream.
    pub async fn subscribe(&self, filters: &[&str]) -> Result<EventStream, ClientError> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let client = self.clone();
        let mut answer = Box::pin(async move {
            let request = Request::new(SubscribeRequest { filters });
            let answer = EventsClient::new(client.channel.clone()).subscribe(request).await;
            let answer =
                answer.map_err(|status| client.failed("subscribe to", "events", &status))?;
            Ok(answer.into_inner().map(move |message| match message {
                Ok(envelope) => decode(envelope),
                Err(status) => Err(client.failed("tell of", "events", &status)),
            }))
        });
        match timeout(STANDS_AFTER, &mut answer).await {
            Ok(events) => Ok(Box::pin(events?)),
            Err(_elapsed) => Ok(Box::pin(futures::stream::once(answer).try_flatten())),
        }
    }
}

fn decode(envelope: Envelope) -> Result<Event, ClientError> {
    let Envelope { namespace, topic, event, .. } = envelope;
    let bytes = event.map(|event| event.value).unwrap_or_default();
    let malformed = |error: prost::DecodeError| ClientError::Malformed {
        object: format!("event {topic}"),
        reason: error.to_string(),
    };
    let kind = match topic.as_str() {
        "/containers/delete" => {
            let ContainerDelete { id } = ContainerDelete::decode(&*bytes).map_err(malformed)?;
            EventKind::ContainerDeleted { id }
        }
        "/tasks/exit" => {
            let exit = TaskExit::decode(&*bytes).map_err(malformed)?;
            let TaskExit { container_id, id: exec_id, pid, exit_status, .. } = exit;
            EventKind::TaskExited { container_id, exec_id, pid, exit_status }
        }
        _ => EventKind::Other,
    };
    Ok(Event { namespace, topic, kind })
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::Any;

    fn envelope(topic: &str, value: Vec<u8>) -> Envelope {
        let event = Some(Any { type_url: String::new(), value });
        Envelope {
            timestamp: None,
            namespace: "default".to_owned(),
            topic: topic.to_owned(),
            event,
        }
    }

    #[test]
    fn deletes_and_exits_are_decoded_and_the_rest_is_passed_on() {
        let delete = ContainerDelete { id: "cache".to_owned() }.encode_to_vec();
        let event = decode(envelope("/containers/delete", delete)).unwrap();
        assert_eq!(event.kind, EventKind::ContainerDeleted { id: "cache".to_owned() });
        let exit =
            TaskExit { container_id: "c".to_owned(), exit_status: 137, ..TaskExit::default() };
        let event = decode(envelope("/tasks/exit", exit.encode_to_vec())).unwrap();
        assert!(matches!(event.kind, EventKind::TaskExited { exit_status: 137, .. }));
        let event = decode(envelope("/snapshot/prepare", vec![0xff])).unwrap();
        assert_eq!((event.namespace.as_str(), event.kind), ("default", EventKind::Other));
        assert!(decode(envelope("/tasks/exit", vec![0xff])).is_err());
    }
}
