//! A container's shim, asked over ttrpc: freeze, dump, thaw, let go.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_protos::shim::{ContainerRequest, Description, DumpRequest, ShimClient};
use godwit_protos::{ContainerRef, path};
use ttrpc::context::Context;

use super::MigrationError;
use crate::config::Config;

/// Deadline of calls that take milliseconds.
const SHORT: Duration = Duration::from_secs(15);

/// Deadline of ending a container's tasks. The shim's own, 30 s for the processes to end, passes
/// first: its reason is better than silence.
const END: Duration = Duration::from_secs(60);

/// Deadline of a freeze, which has block volumes write what they hold back.
const FREEZE: Duration = Duration::from_secs(120);

/// Deadline of a dump: the shim's own watchdog, which grows with the memory, ends it earlier.
const DUMP: Duration = Duration::from_secs(3600);

/// The shim of one running container.
#[derive(Clone)]
pub struct Shim {
    address: String,
    bundle: PathBuf,
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shim({})", self.address)
    }
}

impl Shim {
    /// Finds the shim by the address that it wrote into the container's bundle.
    ///
    /// Errors: [`MigrationError::NoShim`] when the container does not run under Godwit's runtime,
    /// or not at all; [`MigrationError::ShimUnknown`] when that cannot be told, as with too many
    /// open files.
    pub fn find(config: &Config, container: &ContainerRef) -> Result<Self, MigrationError> {
        let bundle = config
            .containerd_state
            .join("io.containerd.runtime.v2.task")
            .join(container.namespace())
            .join(container.id());
        match std::fs::read_to_string(bundle.join(path::SHIM_ADDRESS_FILE)) {
            Ok(address) => Ok(Self { address: address.trim().to_owned(), bundle }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(MigrationError::NoShim(container.clone()))
            }
            Err(source) => {
                Err(MigrationError::ShimUnknown { container: container.clone(), source })
            }
        }
    }

    /// The container's bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    async fn client(&self) -> Result<ShimClient, MigrationError> {
        let connect = ttrpc::asynchronous::Client::connect(&self.address);
        match tokio::time::timeout(SHORT, connect).await {
            Ok(Ok(client)) => Ok(ShimClient::new(client)),
            Ok(Err(error)) => Err(self.failed("connect", &error)),
            Err(_) => Err(self.failed("connect", &ttrpc::Error::Others("no answer".to_owned()))),
        }
    }

    fn failed(&self, what: &'static str, error: &ttrpc::Error) -> MigrationError {
        let reason = match error {
            ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
            other => other.to_string(),
        };
        MigrationError::Shim { what, reason }
    }

    /// What the shim says of the container.
    pub async fn describe(&self, id: &str) -> Result<Description, MigrationError> {
        let client = self.client().await?;
        let answer = client.describe(deadline(SHORT), &request(id)).await;
        answer.map_err(|error| self.failed("describe the container", &error))
    }

    /// Stops every task where it is, and freezes the file systems of block volumes.
    pub async fn freeze(&self, id: &str) -> Result<(), MigrationError> {
        let client = self.client().await?;
        let answer = client.freeze(deadline(FREEZE), &request(id)).await;
        answer.map(drop).map_err(|error| self.failed("freeze the container", &error))
    }

    /// Lets a frozen container run on.
    pub async fn thaw(&self, id: &str) -> Result<(), MigrationError> {
        let client = self.client().await?;
        let answer = client.thaw(deadline(SHORT), &request(id)).await;
        answer.map(drop).map_err(|error| self.failed("thaw the container", &error))
    }

    /// Ends every task of a container that runs elsewhere now.
    pub async fn let_go(&self, id: &str) -> Result<(), MigrationError> {
        let client = self.client().await?;
        let answer = client.let_go(deadline(END), &request(id)).await;
        answer.map(drop).map_err(|error| self.failed("end the tasks", &error))
    }

    /// Dumps a frozen container into the empty directory `images`. The shim thaws the container
    /// when that takes longer than `limit`.
    pub async fn dump(
        &self,
        id: &str,
        images: &Path,
        work: &Path,
        limit: Duration,
    ) -> Result<(), MigrationError> {
        let client = self.client().await?;
        let mut dump = DumpRequest::new();
        dump.id = id.to_owned();
        dump.limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
        dump.image_path = images.to_string_lossy().into_owned();
        dump.work_path = work.to_string_lossy().into_owned();
        let answer = client.dump(deadline(DUMP), &dump).await;
        answer.map(drop).map_err(|error| self.failed("dump the container", &error))
    }
}

fn request(id: &str) -> ContainerRequest {
    let mut request = ContainerRequest::new();
    request.id = id.to_owned();
    request
}

fn deadline(limit: Duration) -> Context {
    ttrpc::context::with_duration(limit)
}
