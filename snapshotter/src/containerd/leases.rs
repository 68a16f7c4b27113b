//! Leases: what keeps containerd's garbage collection away from things nothing refers to yet.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest, DeleteRequest, ListRequest, Resource,
};
use godwit_protos::Digest;
use prost_types::Timestamp;

use super::{Client, ClientError, optional, present};

/// A lease that its daemon did not release is void after this time.
const LEASE_EXPIRY: Duration = Duration::from_secs(24 * 3600);

/// Label of our leases, and what it says: which run of which daemon has it.
const LABEL: &str = "godwit.io/daemon";
static THIS_RUN: LazyLock<String> = LazyLock::new(|| {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", std::process::id(), since.as_nanos())
});

/// Holds what is created through [`Lease::client`] until it is released or dropped.
#[derive(Debug)]
pub struct Lease {
    client: Client,
    namespace: String,
    id: String,
    is_released: bool,
}

impl Client {
    /// A new lease in `namespace`. If the daemon dies, the next one deletes it; it expires by
    /// itself after a day.
    pub async fn lease(&self, namespace: &str) -> Result<Lease, ClientError> {
        let expiry = Timestamp::from(SystemTime::now() + LEASE_EXPIRY).to_string();
        let expires = ("containerd.io/gc.expire".to_owned(), expiry);
        let labels = [expires, (LABEL.to_owned(), THIS_RUN.clone())].into();
        // containerd picks the id.
        let request = self.request(namespace, CreateRequest { id: String::new(), labels })?;
        let answer = LeasesClient::new(self.channel.clone()).create(request).await;
        let answer = answer.map_err(|status| self.failed("create", "a lease", &status))?;
        let id = present(answer.into_inner().lease, || "new lease".to_owned())?.id;
        let client = Self { lease: Some(id.as_str().into()), ..self.clone() };
        Ok(Lease { client, namespace: namespace.to_owned(), id, is_released: false })
    }

    /// Deletes the leases, in every namespace, of daemons that died: what they held, no daemon goes
    /// on with.
    pub async fn delete_abandoned_leases(&self) -> Result<(), ClientError> {
        let mut deleted = Ok(());
        for namespace in self.namespaces().await? {
            let filters = vec![format!("labels.{LABEL:?}")];
            let request = self.request(&namespace, ListRequest { filters })?;
            let answer = LeasesClient::new(self.channel.clone()).list(request).await;
            let answer = answer.map_err(|status| self.failed("list", "leases", &status))?;
            for lease in answer.into_inner().leases {
                let of = lease.labels.get(LABEL);
                if of.is_some_and(|run| *run != *THIS_RUN) {
                    deleted = deleted.and(self.delete_lease(&namespace, &lease.id).await);
                }
            }
        }
        deleted
    }

    async fn delete_lease(&self, namespace: &str, id: &str) -> Result<(), ClientError> {
        let request = self.request(namespace, DeleteRequest { id: id.to_owned(), sync: false })?;
        let answer = LeasesClient::new(self.channel.clone()).delete(request).await;
        let answer = answer.map_err(|status| self.failed("delete", format!("lease {id}"), &status));
        optional(answer).map(drop)
    }
}

impl Lease {
    /// The client through which to create what the lease is to hold.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Holds a blob that is there, and what its labels refer to.
    pub async fn hold_blob(&self, digest: Digest) -> Result<(), ClientError> {
        let resource = Resource { id: digest.to_string(), r#type: "content".to_owned() };
        let (id, resource) = (self.id.clone(), Some(resource));
        let request = self.client.request(&self.namespace, AddResourceRequest { id, resource })?;
        let added = LeasesClient::new(self.client.channel.clone()).add_resource(request).await;
        let failed = |status| self.client.failed("hold", format!("blob {digest}"), &status);
        added.map(drop).map_err(failed)
    }

    /// Lets go: what nothing refers to by now will be collected.
    pub async fn release(mut self) -> Result<(), ClientError> {
        self.is_released = true;
        self.client.delete_lease(&self.namespace, &self.id).await
    }
}

impl Drop for Lease {
    /// A cancelled migration must not hold its blobs for a day.
    fn drop(&mut self) {
        if self.is_released {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (client, namespace, id) =
            (self.client.clone(), self.namespace.clone(), self.id.clone());
        runtime.spawn(async move {
            if let Err(error) = client.delete_lease(&namespace, &id).await {
                tracing::warn!(lease = id, %error, "cannot delete a lease; it expires by itself");
            }
        });
    }
}
