//! The node's daemon, as the shim asks it: where volumes lie, state to restore from, and the right
//! to run.
//!
//! A container without volumes and without a *migrate-from* annotation never gets here: plain
//! containers run whether the daemon does or not.

use std::time::{Duration, Instant};

use godwit_protos::control::{
    AcquireRequest, AcquireResponse, ClaimRequest, ClaimResponse, Container, ControlClient,
    ResolveVolumesRequest, SettleRequest, VolumeMount,
};
use godwit_protos::{ContainerRef, FileSystem, ParseNameError, path};
use ttrpc::asynchronous::Client;
use ttrpc::context;

/// Deadline of calls that only look something up.
const CALL_TIME_MAX: Duration = Duration::from_secs(30);
/// Deadline of [`Daemon::resolve_volumes`], which may bring read-only content from neighbours.
const RESOLVE_TIME_MAX: Duration = Duration::from_secs(600);
/// Deadline of [`Daemon::acquire`], which moves all the data.
const ACQUIRE_TIME_MAX: Duration = Duration::from_secs(3600);
/// How long a claim without an answer is asked again before the restore is undone.
const CLAIM_TIME_MAX: Duration = Duration::from_secs(60);
/// How often a report without an answer is sent again.
const SETTLE_ATTEMPTS_MAX: u32 = 300;
/// Pause between attempts.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Why the daemon did not help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DaemonError {
    #[error(
        "the Godwit daemon does not answer on {socket} ({reason}): start godwit-snapshotter on this node, \
         or run the container without Godwit volumes and without the migrate-from annotation"
    )]
    Unreachable { socket: &'static str, reason: String },
    #[error("{0}")]
    Refused(String),
    #[error("the Godwit daemon's answer is not usable: {0}")]
    Answer(String),
}

impl DaemonError {
    fn of(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::Refused(status.message),
            other => Self::unreachable(&other),
        }
    }

    fn unreachable(error: &dyn std::fmt::Display) -> Self {
        Self::Unreachable { socket: path::CONTROL_SOCKET, reason: error.to_string() }
    }
}

/// A connection to the daemon on behalf of one container.
pub(crate) struct Daemon {
    container: Container,
    client: ControlClient,
}

impl Daemon {
    /// Errors: [`DaemonError::Unreachable`].
    pub(crate) async fn connect(container: &ContainerRef) -> Result<Self, DaemonError> {
        let client = connect().await?;
        let container = Container {
            namespace: container.namespace().to_owned(),
            id: container.id().to_owned(),
            ..Default::default()
        };
        Ok(Self { container, client })
    }

    fn container(&self) -> protobuf::MessageField<Container> {
        Some(self.container.clone()).into()
    }

    /// Host paths of `mounts`, in their order, each with what it holds if it is the image of a
    /// block volume.
    pub(crate) async fn resolve_volumes(
        &self,
        mounts: Vec<VolumeMount>,
    ) -> Result<Vec<(String, Option<FileSystem>)>, DaemonError> {
        let wanted = mounts.len();
        let request =
            ResolveVolumesRequest { container: self.container(), mounts, ..Default::default() };
        let context = context::with_duration(RESOLVE_TIME_MAX);
        let answer = self.client.resolve_volumes(context, &request).await;
        let mut answer = answer.map_err(DaemonError::of)?;
        // A daemon from before there were block volumes names none.
        answer.file_systems.resize(answer.paths.len(), String::new());
        if answer.paths.len() != wanted {
            let text = format!("{} paths for {wanted} volumes", answer.paths.len());
            return Err(DaemonError::Answer(text));
        }
        let kind = |text: String| match text.as_str() {
            "" => Ok(None),
            named => named.parse().map(Some),
        };
        let kinds: Result<Vec<_>, ParseNameError> =
            answer.file_systems.into_iter().map(kind).collect();
        let kinds = kinds.map_err(|error| DaemonError::Answer(error.to_string()))?;
        Ok(answer.paths.into_iter().zip(kinds).collect())
    }

    /// Brings the container's state here and freezes it at its source.
    pub(crate) async fn acquire(
        &self,
        request: AcquireRequest,
    ) -> Result<AcquireResponse, DaemonError> {
        let request = AcquireRequest { container: self.container(), ..request };
        let context = context::with_duration(ACQUIRE_TIME_MAX);
        self.client.acquire(context, &request).await.map_err(DaemonError::of)
    }

    /// Asks for the right to run. Without an answer it is asked again, over a new connection, for a
    /// bounded time; without one in that time the answer is no.
    pub(crate) async fn claim(&mut self, session: &str) -> ClaimResponse {
        let request = ClaimRequest { session: session.to_owned(), ..Default::default() };
        let begun = Instant::now();
        loop {
            let left = CLAIM_TIME_MAX.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let reason = format!("no answer to the claim within {CLAIM_TIME_MAX:?}");
                return ClaimResponse { may_run: false, reason, ..Default::default() };
            }
            match self.client.claim(context::with_duration(left), &request).await {
                Ok(response) => return response,
                Err(error) => tracing::warn!("claiming session {session}: {error}"),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
            if let Ok(client) = connect().await {
                self.client = client;
            }
        }
    }

    /// Reports how a restore ended; a report that is lost is sent again a few times. Returns
    /// whether the daemon has it.
    pub(crate) async fn settle(&mut self, request: &SettleRequest) -> bool {
        for _ in 0..SETTLE_ATTEMPTS_MAX {
            let context = context::with_duration(CALL_TIME_MAX);
            match self.client.settle(context, request).await {
                Ok(_) => return true,
                Err(error) => tracing::warn!("reporting session {}: {error}", request.session),
            }
            tokio::time::sleep(RETRY_PAUSE).await;
            if let Ok(client) = connect().await {
                self.client = client;
            }
        }
        tracing::error!("the end of session {} could not be reported", request.session);
        false
    }
}

async fn connect() -> Result<ControlClient, DaemonError> {
    let address = format!("unix://{}", path::CONTROL_SOCKET);
    let client = Client::connect(&address).await;
    client.map(ControlClient::new).map_err(|error| DaemonError::unreachable(&error))
}
