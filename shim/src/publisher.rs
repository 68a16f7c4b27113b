//! Events to containerd: queued in order, delivered in order, and delivered again after containerd
//! was away.
//!
//! Any failure drops the connection, and the event at the head of the queue is sent again over a
//! new one, so a restart of containerd loses nothing that fits the queue. containerd may see an
//! event twice if it stopped between accepting and answering; it tolerates that, and not the
//! opposite.

use std::time::{Duration, Instant};

use containerd_shim::event::Event;
use containerd_shim::protos::shim::event::Envelope;
use containerd_shim::protos::shim::events::ForwardRequest;
use containerd_shim::protos::shim_async::{Client, EventsClient};
use containerd_shim::protos::ttrpc;
use containerd_shim::util::{convert_to_any, timestamp};
use tokio::sync::{mpsc, oneshot};

/// Events that wait for containerd. Beyond it, new ones are dropped and logged.
const QUEUE_MAX: usize = 4096;
/// How long one event is tried before it is given up for the sake of those behind it.
const DELIVERY_TIME_MAX: Duration = Duration::from_secs(600);
/// Deadline of one attempt.
const ATTEMPT_TIME_MAX: Duration = Duration::from_secs(5);
/// Pauses between attempts grow from the first to the second.
const RETRY_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

/// A handle on the queue.
#[derive(Clone)]
pub(crate) struct Publisher {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl Publisher {
    /// Starts delivering to containerd's ttrpc socket at `address`.
    pub(crate) fn new(address: String, namespace: String) -> Self {
        let (queue, items) = mpsc::channel(QUEUE_MAX);
        tokio::spawn(Delivery { address, client: None }.run(items));
        Self { namespace, queue }
    }

    /// Queues an event; never waits.
    pub(crate) fn publish(&self, event: impl Event + 'static) {
        let topic = event.topic();
        let envelope = timestamp().and_then(|now| {
            let mut envelope = Envelope::new();
            envelope.set_timestamp(now);
            envelope.set_namespace(self.namespace.clone());
            envelope.set_topic(topic.clone());
            envelope.set_event(convert_to_any(Box::new(event))?);
            Ok(envelope)
        });
        match envelope {
            Ok(envelope) => {
                if self.queue.try_send(Item::Event(Box::new(envelope))).is_err() {
                    tracing::error!(
                        "event {topic} dropped: {QUEUE_MAX} events wait for containerd"
                    );
                }
            }
            Err(error) => tracing::error!("event {topic} cannot be encoded: {error}"),
        }
    }

    /// Waits until everything queued so far is delivered, at most `limit`.
    pub(crate) async fn flush(&self, limit: Duration) {
        let (done, delivered) = oneshot::channel();
        let flush = async {
            if self.queue.send(Item::Flush(done)).await.is_ok() {
                let _ = delivered.await;
            }
        };
        if tokio::time::timeout(limit, flush).await.is_err() {
            tracing::warn!("events still undelivered after {limit:?}");
        }
    }
}

struct Delivery {
    address: String,
    client: Option<EventsClient>,
}

impl Delivery {
    async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(item) = items.recv().await {
            match item {
                Item::Flush(done) => {
                    let _ = done.send(());
                }
                Item::Event(envelope) => self.deliver(*envelope).await,
            }
        }
    }

    async fn deliver(&mut self, envelope: Envelope) {
        let mut request = ForwardRequest::new();
        request.set_envelope(envelope);
        let begun = Instant::now();
        let mut pause = RETRY_PAUSE.0;
        loop {
            match self.attempt(&request).await {
                Ok(()) => return,
                Err(error) if begun.elapsed() > DELIVERY_TIME_MAX => {
                    tracing::error!("event {} given up: {error}", request.envelope().topic());
                    return;
                }
                Err(error) => {
                    tracing::debug!(
                        "event {} not delivered yet: {error}",
                        request.envelope().topic()
                    );
                    self.client = None;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY_PAUSE.1);
                }
            }
        }
    }

    async fn attempt(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match self.client.take() {
            Some(client) => client,
            None => EventsClient::new(Client::connect(&unix_address(&self.address)).await?),
        };
        let mut context = ttrpc::context::with_duration(ATTEMPT_TIME_MAX);
        // containerd files an event under the namespace in the call's metadata.
        let namespace = request.envelope().namespace().to_owned();
        context.add("containerd-namespace-ttrpc".to_owned(), namespace);
        client.forward(context, request).await?;
        self.client = Some(client);
        Ok(())
    }
}

/// containerd names its socket by path; ttrpc wants a scheme.
fn unix_address(address: &str) -> String {
    if address.contains("://") { address.to_owned() } else { format!("unix://{address}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    use async_trait::async_trait;
    use containerd_shim::protos::api::Empty;
    use containerd_shim::protos::events::task::TaskOOM;
    use containerd_shim::protos::shim_async::{Events, create_events};
    use containerd_shim::protos::ttrpc::r#async::{Server, TtrpcContext};

    #[derive(Default)]
    struct Containerd(Mutex<Vec<String>>);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let event = TaskOOM::default();
            let _ = event;
            let id = String::from_utf8_lossy(&request.envelope().event().value[2..]).into_owned();
            self.0.lock().unwrap().push(id);
            Ok(Empty::new())
        }
    }

    fn oom(id: &str) -> TaskOOM {
        TaskOOM { container_id: id.to_owned(), ..Default::default() }
    }

    async fn serve(address: &str, log: &Arc<Containerd>) -> Server {
        let service = create_events(Arc::clone(log) as Arc<_>);
        let mut server = Server::new().bind(address).unwrap().register_service(service);
        server.start().await.unwrap();
        server
    }

    #[tokio::test]
    async fn events_survive_a_restart_of_containerd_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("events.sock");
        let address = format!("unix://{}", path.display());
        let publisher = Publisher::new(path.display().to_string(), "default".to_owned());
        publisher.publish(oom("before"));

        let log = Arc::new(Containerd::default());
        let mut server = serve(&address, &log).await;
        publisher.publish(oom("first"));
        publisher.flush(Duration::from_secs(10)).await;
        server.shutdown().await.unwrap();
        drop(server);
        let _ = std::fs::remove_file(&path);

        publisher.publish(oom("while away"));
        let _server = serve(&address, &log).await;
        publisher.publish(oom("after"));
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(*log.0.lock().unwrap(), ["before", "first", "while away", "after"]);
    }
}
