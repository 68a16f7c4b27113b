//! Containers and namespaces: containerd's records, before anything runs.

use std::collections::HashMap;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::{self as api, container};
use prost_types::{Any, Timestamp};
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::{CALL_DEADLINE, Client, ClientError, MESSAGE_BYTES_MAX, present};

/// Type of a runtime specification in JSON, as containerd registers it.
const SPEC_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// A container as containerd records it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Container {
    /// Its id within its namespace.
    pub id: String,
    /// Name of the image it was made from; empty if from none.
    pub image: String,
    /// What runs it.
    pub runtime: Runtime,
    /// Name of the snapshotter that holds its root file system.
    pub snapshotter: String,
    /// Key of the active snapshot there.
    pub snapshot_key: String,
    /// containerd's labels.
    pub labels: HashMap<String, String>,
    /// The OCI runtime specification, JSON.
    pub spec: Vec<u8>,
    /// Names of what its client keeps with it; read, never written.
    pub extensions: Vec<String>,
    /// The sandbox that it belongs to; read, never written.
    pub sandbox: Option<String>,
    /// When it was created, in nanoseconds since 1970; read, never written.
    pub created_at_ns: i64,
}

/// A runtime and its options.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Runtime {
    /// For example `io.containerd.runc.v2`.
    pub name: String,
    /// A message of the runtime's own type.
    pub options: Option<Any>,
}

impl From<api::Container> for Container {
    fn from(found: api::Container) -> Self {
        let runtime = found.runtime.unwrap_or_default();
        let Timestamp { seconds, nanos } = found.created_at.unwrap_or_default();
        Self {
            id: found.id,
            image: found.image,
            runtime: Runtime { name: runtime.name, options: runtime.options },
            snapshotter: found.snapshotter,
            snapshot_key: found.snapshot_key,
            labels: found.labels,
            spec: found.spec.map(|spec| spec.value).unwrap_or_default(),
            extensions: found.extensions.into_keys().collect(),
            sandbox: Some(found.sandbox).filter(|sandbox| !sandbox.is_empty()),
            created_at_ns: seconds.saturating_mul(1_000_000_000).saturating_add(nanos.into()),
        }
    }
}

impl From<Container> for api::Container {
    fn from(new: Container) -> Self {
        let Container { id, image, runtime, snapshotter, snapshot_key, labels, spec, .. } = new;
        let Runtime { name, options } = runtime;
        Self {
            id,
            labels,
            image,
            runtime: Some(container::Runtime { name, options }),
            spec: Some(Any { type_url: SPEC_TYPE.to_owned(), value: spec }),
            snapshotter,
            snapshot_key,
            ..Self::default()
        }
    }
}

impl Client {
    fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone()).max_decoding_message_size(MESSAGE_BYTES_MAX)
    }

    /// Errors: [`ClientError::NotFound`].
    pub async fn container(&self, namespace: &str, id: &str) -> Result<Container, ClientError> {
        let object = || format!("container {namespace}/{id}");
        let request = self.request(namespace, api::GetContainerRequest { id: id.to_owned() })?;
        let answer = self.containers().get(request).await;
        let answer = answer.map_err(|status| self.failed("get", object(), &status))?;
        present(answer.into_inner().container, object).map(Container::from)
    }

    /// The containers of one namespace, in containerd's order.
    pub async fn list_containers(&self, namespace: &str) -> Result<Vec<Container>, ClientError> {
        let failed =
            |status: Status| self.failed("list", format!("containers of {namespace}"), &status);
        let request = self.request(namespace, api::ListContainersRequest::default())?;
        // As a stream: one message of them all would be too long on a large node.
        let answer = self.containers().list_stream(request).await;
        let mut stream = answer.map_err(failed)?.into_inner();
        let mut containers = Vec::new();
        while let Some(message) = stream.message().await.map_err(failed)? {
            containers.extend(message.container.map(Container::from));
        }
        Ok(containers)
    }

    /// Errors: [`ClientError::AlreadyExists`].
    pub async fn create_container(
        &self,
        namespace: &str,
        container: Container,
    ) -> Result<(), ClientError> {
        let object = format!("container {namespace}/{}", container.id);
        let container = Some(container.into());
        let request = self.request(namespace, api::CreateContainerRequest { container })?;
        let answer = self.containers().create(request).await;
        answer.map(drop).map_err(|status| self.failed("create", object, &status))
    }

    /// Sets one label of a container and leaves the others. Errors: [`ClientError::NotFound`].
    pub async fn set_container_label(
        &self,
        namespace: &str,
        id: &str,
        label: (&str, &str),
    ) -> Result<(), ClientError> {
        let (key, value) = label;
        let container = api::Container {
            id: id.to_owned(),
            labels: [(key.to_owned(), value.to_owned())].into(),
            ..api::Container::default()
        };
        let update_mask = Some(prost_types::FieldMask { paths: vec![format!("labels.{key}")] });
        let message = api::UpdateContainerRequest { container: Some(container), update_mask };
        let answer = self.containers().update(self.request(namespace, message)?).await;
        let object = || format!("container {namespace}/{id}");
        answer.map(drop).map_err(|status| self.failed("label", object(), &status))
    }

    /// Deletes the record; task and snapshot stay. Errors: [`ClientError::NotFound`].
    pub async fn delete_container(&self, namespace: &str, id: &str) -> Result<(), ClientError> {
        let request = self.request(namespace, api::DeleteContainerRequest { id: id.to_owned() })?;
        let answer = self.containers().delete(request).await;
        let object = || format!("container {namespace}/{id}");
        answer.map(drop).map_err(|status| self.failed("delete", object(), &status))
    }

    /// Names of all containerd namespaces.
    pub async fn namespaces(&self) -> Result<Vec<String>, ClientError> {
        let mut request = Request::new(api::ListNamespacesRequest::default());
        request.set_timeout(CALL_DEADLINE);
        let answer = NamespacesClient::new(self.channel.clone()).list(request).await;
        let answer = answer.map_err(|status| self.failed("list", "namespaces", &status))?;
        Ok(answer.into_inner().namespaces.into_iter().map(|namespace| namespace.name).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_created_as_it_was_read() {
        let container = Container {
            id: "cache".to_owned(),
            image: "docker.io/library/redis:7".to_owned(),
            runtime: Runtime {
                name: "io.containerd.runc.v2".to_owned(),
                options: Some(Any { type_url: "options".to_owned(), value: vec![1, 2] }),
            },
            snapshotter: "godwit".to_owned(),
            snapshot_key: "cache".to_owned(),
            labels: [("k".to_owned(), "v".to_owned())].into(),
            spec: b"{}".to_vec(),
            ..Container::default()
        };
        let sent = api::Container::from(container.clone());
        assert_eq!(sent.spec.as_ref().unwrap().type_url, SPEC_TYPE);
        assert_eq!(Container::from(sent), container);
    }
}
