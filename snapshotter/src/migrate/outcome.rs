//! What became of a container whose migration failed: what both journals say, not what the error
//! suggests.
//!
//! A source thaws by itself, but only when it has learnt of the failure, and it may have released
//! meanwhile; a container may have ended, or moved to another node. So the source is asked, and
//! where it does not answer, the outcome is undecided.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use godwit_protos::peer::DescribeRequest;
use godwit_protos::{ContainerRef, MigrateFrom};
use tokio::time::Instant;
use tonic::Code;

use super::release::ask_over;
use super::request::has_come;
use super::{MigrationError, line};
use crate::node::Node;
use crate::ownership::Epoch;
use crate::ownership::fate::Fate;
use crate::ownership::leases::Leased;
use crate::peer::Connection;

/// How long a source is asked: longer than it takes to miss a peer and to thaw.
const ASK_MAX: Duration = Duration::from_secs(15);
const ASK_PAUSE: Duration = Duration::from_millis(200);

/// How long one connection to it may take.
const CONNECT_MAX: Duration = Duration::from_secs(3);

/// A session that failed.
#[derive(Clone, Debug)]
pub struct Failure {
    /// Why.
    pub error: Arc<MigrationError>,
    /// The epoch that this node claimed; `None` if it came to no claim, so that the source froze
    /// nothing.
    pub claimed: Option<Epoch>,
}

impl Failure {
    /// Before anything was claimed.
    pub fn of(error: MigrationError) -> Self {
        Self { error: Arc::new(error), claimed: None }
    }
}

/// What a failed migration means for its container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The source was asked for nothing but what it has.
    NothingMoved,
    /// The source says that it runs there.
    RunsOn,
    /// The source says that it does not run there, and why, and that this node has nothing to do
    /// with it.
    Ended(String),
    /// This node was granted it, or cannot read its journal.
    Came,
    /// The source does not say: its name, and what it said last.
    Unknown(String, String),
}

impl Outcome {
    /// What became of the container that came `from` another node and is called `here`. Waits for
    /// the source, at most twice [`ASK_MAX`].
    pub async fn of(
        node: &Node,
        migration: &str,
        from: &MigrateFrom,
        here: &ContainerRef,
        failure: &Failure,
    ) -> Self {
        if !matches!(has_come(node, here, migration), Ok(false)) {
            return Self::Came;
        }
        if failure.claimed.is_none() && failure.error.left_source_alone() {
            return Self::NothingMoved;
        }
        let deadline = Instant::now() + ASK_MAX;
        loop {
            let late = failure.claimed.is_none() || Instant::now() > deadline;
            let asked = ask_source(node, from, here, failure.claimed);
            let answer = tokio::time::timeout(ASK_MAX, asked).await;
            match answer.unwrap_or(Err(MigrationError::Silent { patience: ASK_MAX })) {
                Ok(Said::Runs) => return Self::RunsOn,
                Ok(Said::Gone(reason)) => return Self::Ended(reason),
                // What was frozen may be about to thaw.
                Ok(Said::Idle(reason)) if late => return Self::Ended(reason),
                Ok(Said::Open(fate)) if late => {
                    return Self::Unknown(from.node.clone(), format!("it is {fate} there"));
                }
                Err(error) if Instant::now() > deadline => {
                    return Self::Unknown(from.node.clone(), error.chain());
                }
                Ok(Said::Idle(_) | Said::Open(_)) | Err(_) => tokio::time::sleep(ASK_PAUSE).await,
            }
        }
    }

    /// Whether it is known where the container runs, if anywhere.
    pub fn is_decided(&self) -> bool {
        matches!(self, Self::NothingMoved | Self::RunsOn | Self::Ended(_))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NothingMoved => write!(f, "nothing was moved"),
            Self::RunsOn => write!(f, "it runs on at its source"),
            Self::Ended(reason) => write!(f, "it does not run at its source: {reason}"),
            Self::Came => write!(
                f,
                "undecided: this node was granted it, or cannot read its journal; `godwit status` on both \
                 nodes tells who owns it"
            ),
            Self::Unknown(source, reason) => write!(
                f,
                "undecided: nothing of it runs here, and {source} does not say that it runs there \
                 ({reason}); it runs it on once it knows: ask it with `godwit status`"
            ),
        }
    }
}

/// Publishes that a migration failed, and what that means for the container.
pub async fn tell(
    node: &Node,
    migration: &str,
    from: &MigrateFrom,
    here: &ContainerRef,
    failure: &Failure,
) {
    let outcome = Outcome::of(node, migration, from, here, failure).await;
    let text = match outcome {
        Outcome::RunsOn | Outcome::Ended(_) => format!("{outcome}, and {}", left_here(node, here)),
        _ => outcome.to_string(),
    };
    node.events.failed(migration, &failure.error, &text, !outcome.is_decided());
}

/// Whether all of what a failed migration made here has been removed, in words.
fn left_here(node: &Node, container: &ContainerRef) -> &'static str {
    match node.journal.lease_of(&Leased::Container(container.clone())) {
        Ok(None) => "nothing is left here",
        _ => "what came of it is still being removed here",
    }
}

/// What a source says of a container.
enum Said {
    Runs,
    /// It does not run at this moment, and why.
    Idle(String),
    /// There is none.
    Gone(String),
    /// The hand-off is not over.
    Open(Fate),
}

/// Errors: it does not answer.
async fn ask_source(
    node: &Node,
    from: &MigrateFrom,
    here: &ContainerRef,
    claimed: Option<Epoch>,
) -> Result<Said, MigrationError> {
    let container = &from.container;
    let source = Connection::open(&node.config, &from.node, CONNECT_MAX).await?;
    if let Some(epoch) = claimed {
        match ask_over(&source, node, container, epoch, here).await? {
            // It was not offered, or is its source's again.
            Fate::Unknown | Fate::Kept => {}
            open => return Ok(Said::Open(open)),
        }
    }
    let asked = DescribeRequest { container: Some(line::named(container)) };
    match source.client().describe(asked).await {
        Ok(_) => Ok(Said::Runs),
        Err(status) => match status.code() {
            Code::NotFound => Ok(Said::Gone(status.message().to_owned())),
            Code::FailedPrecondition => Ok(Said::Idle(status.message().to_owned())),
            _ => Err(source.refused(status).into()),
        },
    }
}
