//! The procedure: a running container moves from one node to another.
//!
//! The destination drives. [`destination`] holds one session per container that comes here: it asks
//! neighbours and source for what this node lacks while the container runs, has the source make the
//! cut, lays everything out, and hands over to the shim, which restores the tasks, holds them, and
//! asks [`destination::claim`] for the right to let them run. [`source`] is the other side.
//! [`request`] starts it all: it creates the container here with the migrate-from annotation, under
//! a specification derived by [`spec`].
//!
//! What is promised on failure is in [`crate::ownership`] (never two runners) and [`source`]
//! (frozen, not killed, until the destination runs); docs/failure-model.md has the table.

mod arrival;
pub mod choice;
pub mod cut;
pub mod deletion;
pub mod describe;
pub mod destination;
mod fit;
pub mod follow;
pub mod image;
mod layer;
pub mod layout;
mod let_go;
mod line;
mod links;
mod marks;
pub mod obstacles;
pub mod origin;
pub mod orphans;
pub mod outcome;
pub mod plan;
mod record;
pub mod release;
pub mod report;
pub mod request;
pub mod resolve;
pub mod restore;
pub mod session;
pub mod shim;
pub mod source;
pub mod spec;
pub mod subjects;
mod terminal;

use std::time::Duration;

use godwit_protos::{ContainerRef, Digest, ParseDigestError, ParseNameError};

use crate::containerd::ClientError;
use crate::content::ContentError;
use crate::ownership::fate::Fate;
use crate::ownership::leases::LeaseError;
use crate::peer::PeerError;
use crate::peer::fetch::FetchError;
use crate::store::{SnapshotId, StoreError};
use crate::supervise::{self, Interrupted};
use crate::volumes::VolumeError;
use crate::volumes::fetch::BringError;

/// Why a migration failed. Until the release the container runs on at its source.
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// No such container.
    #[error("container {0} is not on node {1}; check its name, its namespace and --from")]
    NoContainer(ContainerRef, String),
    /// It is not running, so there is nothing to move while it runs.
    #[error("container {container} is {status}, not running: start or resume it first")]
    NotRunning {
        /// Which.
        container: ContainerRef,
        /// What it is instead.
        status: String,
    },
    /// It runs under another runtime.
    #[error(
        "container {0} does not run under Godwit's shim: start it with the runtime \
         io.containerd.runc.godwit.v1, or a handler whose runtime_path is containerd-shim-godwit-v1"
    )]
    NoShim(ContainerRef),
    /// Its shim may be there, but where cannot be read.
    #[error("cannot tell whether container {container} runs under Godwit's shim")]
    ShimUnknown {
        /// Which.
        container: ContainerRef,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is being moved already.
    #[error(
        "container {container} is already on its way to {to}; `godwit status` tells how far it is"
    )]
    Busy {
        /// Which.
        container: ContainerRef,
        /// Where to.
        to: String,
    },
    /// Starting it from a snapshot could make a second runner.
    #[error(
        "container {container} may still run elsewhere: {doubts}; if it does not, add --although-it-may-run-elsewhere"
    )]
    MayRun {
        /// Which.
        container: ContainerRef,
        /// What each peer said that does not rule it out.
        doubts: String,
    },
    /// Starting it from a snapshot would make a second runner.
    #[error("container {container} {there}: a second one is never started from a snapshot")]
    RunsElsewhere {
        /// Which.
        container: ContainerRef,
        /// What peers said: `runs on edge-a`.
        there: String,
    },
    /// A snapshot of one subject cannot be run.
    #[error("{0} is not of a whole container; `godwit snapshot create --consistent` takes such")]
    NoCut(SnapshotId),
    /// The container runs where it is to go.
    #[error(
        "container {container} exists on this node already, {node}, and runs: if a migration is to take it away from \
         {node}, exchange --from and --to"
    )]
    RunsHere {
        /// Which.
        container: ContainerRef,
        /// The destination.
        node: String,
    },
    /// A name that is taken at the destination, by a container that does not run.
    #[error(
        "container {container} exists on this node already, {node}, and does not run: if nothing needs it, delete it there"
    )]
    Exists {
        /// Which.
        container: ContainerRef,
        /// The destination.
        node: String,
    },
    /// A survey found what cannot move; docs/moves.md lists the kinds.
    #[error("it cannot be moved: {}", .0.join("; also, "))]
    Obstacles(Vec<String>),
    /// A label of the container's record that would act on this node.
    #[error(
        "this node does not take over the container's label {0}: containerd acts on it outside the container; start \
         the container without it"
    )]
    Label(String),
    /// What a leftover of another container would be in the way of.
    #[error(
        "snapshot {key:?} of {snapshotter} exists on this node already; remove it first (`ctr snapshots rm`)"
    )]
    SnapshotExists {
        /// Its key.
        key: String,
        /// Which snapshotter has it.
        snapshotter: String,
    },
    /// The source does not say what the image is made of.
    #[error(
        "the source does not have the image {0:?} of the container; pull or import it there again"
    )]
    NoImage(String),
    /// The root file system was made by hand.
    #[error(
        "container {0} has a root file system that no snapshotter holds; only containers that were made of an image move"
    )]
    NoSnapshot(String),
    /// The container here was made of another image than the one at the source.
    #[error(
        "the container here was made of another image (chain ID {here}) than the running one (chain ID {there}), \
         although it may have the same name, {image:?}; create it from the running one's image"
    )]
    OtherImage {
        /// The image's name here.
        image: String,
        /// What the container here was made of.
        here: Digest,
        /// What the running one was made of.
        there: Digest,
    },
    /// A blob of an image that no node delivers.
    #[error(
        "blob {0} of the image was found on neither the source nor a neighbour; pull or import the image at the source again"
    )]
    NoBlob(Digest),
    /// The two nodes cannot have the same container.
    #[error("{0}")]
    Incompatible(String),
    /// The FIFOs of its terminal cannot be made.
    #[error("cannot make the FIFOs of the container's terminal")]
    Terminal(#[source] std::io::Error),
    /// The shim refused; for a dump, with CRIU's reason.
    #[error("cannot {what}: {reason}")]
    Shim {
        /// What was asked.
        what: &'static str,
        /// Its words.
        reason: String,
    },
    /// The source refused.
    #[error("the source refused ({code}): {detail}")]
    Refused {
        /// docs/protocol.md's code.
        code: String,
        /// Its words.
        detail: String,
    },
    /// The node that is to get the container does not claim it.
    #[error(
        "node {node} does not confirm that it asks for the container: its journal says {fate}; nothing was frozen, try again"
    )]
    Unconfirmed {
        /// The destination.
        node: String,
        /// What it says.
        fate: Fate,
    },
    /// What a person says of a hand-off is contradicted, or there is nothing to say.
    #[error("container {container} cannot be resolved so: {why}")]
    Unresolvable {
        /// Which.
        container: ContainerRef,
        /// Why not.
        why: &'static str,
    },
    /// The other side ended the migration.
    #[error("aborted by the destination: {0}")]
    Aborted(String),
    /// The other side was silent.
    #[error(
        "no response from the other node for {} s; check its daemon and the link",
        patience.as_secs()
    )]
    Silent {
        /// How long.
        patience: Duration,
    },
    /// The connection broke.
    #[error("the connection broke: {0}; check the other node's daemon and the link")]
    Broken(String),
    /// The other side does not keep to the protocol.
    #[error("what came breaks the protocol: {0}; install the same version of Godwit on both nodes")]
    Protocol(&'static str),
    /// The restore failed here, before any task ran.
    #[error("restore failed: {0}")]
    Restore(String),
    /// A container that was to be removed runs.
    #[error("container {0} runs, so it stays; stop it first if it is to go")]
    StillRuns(ContainerRef),
    /// A container that was granted to this node, whose shim has not said yet whether it ran.
    #[error(
        "it is not known yet whether container {0} ran here; `godwit status` tells who owns it"
    )]
    Unsettled(ContainerRef),
    /// Another migration has the container or one of its volumes.
    #[error(transparent)]
    Leased(#[from] LeaseError),
    /// The container stood still for as long as it may.
    #[error(
        "the container was frozen for {} s, which is as long as `freeze_max_s` lets it: move it over \
         a faster link, or raise the limit at its source", .0.as_secs()
    )]
    FrozenTooLong(Duration),
    /// The container's tasks, or its shim, ended while it was frozen.
    #[error("container {container} has ended at its source meanwhile")]
    Ended {
        /// Which.
        container: ContainerRef,
        /// What failed.
        #[source]
        source: Box<MigrationError>,
    },
    /// No shim asked for the restored container in time.
    #[error(
        "the shim did not go on with the restore within {} s; containerd's log has its words",
        .0.as_secs()
    )]
    Unclaimed(Duration),
    /// The daemon is stopping.
    #[error("interrupted: a daemon is stopping; try again")]
    Interrupted,
    /// A specification that this node does not admit.
    #[error(transparent)]
    Spec(#[from] spec::SpecError),
    /// A name of a wrong form.
    #[error(transparent)]
    Name(#[from] ParseNameError),
    /// A digest of a wrong form.
    #[error(transparent)]
    Digest(#[from] ParseDigestError),
    /// A peer cannot be talked to.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// Content could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// Content could not be read or laid out.
    #[error(transparent)]
    Content(#[from] ContentError),
    /// A volume stands in the way.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The journal failed: nothing was acted on.
    #[error(transparent)]
    Journal(#[from] crate::ownership::journal::JournalError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// containerd failed.
    #[error(transparent)]
    Containerd(#[from] ClientError),
}

impl From<Interrupted> for MigrationError {
    fn from(_: Interrupted) -> Self {
        Self::Interrupted
    }
}

impl From<BringError> for MigrationError {
    fn from(error: BringError) -> Self {
        match error {
            BringError::Volume(error) => error.into(),
            BringError::Fetch(error) => error.into(),
            BringError::Interrupted => Self::Interrupted,
        }
    }
}

/// Codes of a refusal by a source that has no such container, or does not run it.
const SOURCE_UNTOUCHED: &[&str] = &["no-container", "not-running", "wrong-runtime", "busy"];

/// What a failure asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The same request may succeed later: a node or link was gone, or the disk full.
    Retry,
    /// The request itself must change.
    GiveUp,
}

impl MigrationError {
    /// What to do next. Whatever it is, before the release the source thaws.
    pub fn next(&self) -> Next {
        match self {
            Self::Silent { .. }
            | Self::FrozenTooLong(_)
            | Self::ShimUnknown { .. }
            | Self::Broken(_)
            | Self::Interrupted
            | Self::Unclaimed(_)
            | Self::Peer(PeerError::Unreachable { .. } | PeerError::Slow { .. })
            | Self::Fetch(FetchError::SourceFailed { .. } | FetchError::Interrupted)
            | Self::Leased(LeaseError::Taken(_))
            | Self::Busy { .. } => Next::Retry,
            other if other.is_disk_full() => Next::Retry,
            _ => Next::GiveUp,
        }
    }

    /// Whether nothing was asked of the source but what it has: no session of this migration began
    /// there.
    pub fn left_source_alone(&self) -> bool {
        match self {
            Self::NoContainer(..)
            | Self::NotRunning { .. }
            | Self::NoShim(_)
            | Self::RunsHere { .. }
            | Self::Exists { .. }
            | Self::NoCut(_)
            | Self::MayRun { .. }
            | Self::RunsElsewhere { .. }
            | Self::NoImage(_)
            | Self::Leased(_)
            | Self::Peer(_) => true,
            Self::Refused { code, .. } => SOURCE_UNTOUCHED.contains(&code.as_str()),
            _ => false,
        }
    }

    fn is_disk_full(&self) -> bool {
        match self {
            Self::Content(error) | Self::Fetch(FetchError::Content(error)) => error.is_disk_full(),
            Self::Volume(VolumeError::Content(error)) => error.is_disk_full(),
            Self::Store(error) => matches!(error, StoreError::Full { .. }),
            _ => false,
        }
    }

    /// The protocol's code.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoContainer(..) => "no-container",
            Self::NotRunning { .. } => "not-running",
            Self::NoShim(_) => "wrong-runtime",
            Self::Busy { .. } | Self::Leased(LeaseError::Taken(_)) => "busy",
            Self::Obstacles(_) => "obstacles",
            Self::NoSnapshot(_) | Self::OtherImage { .. } => "image",
            Self::Shim { .. } => "criu",
            Self::Ended { .. } => "ended",
            Self::Volume(_) => "volume",
            Self::Spec(_) | Self::Label(_) | Self::Name(_) | Self::Digest(_) => "invalid",
            error if error.is_disk_full() => "disk-full",
            _ => "failed",
        }
    }

    /// The error with all its causes in one line.
    pub fn chain(&self) -> String {
        crate::error::chain(self)
    }
}

/// [`supervise::blocking`] for this module's work.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MigrationError> + Send + 'static,
) -> Result<T, MigrationError> {
    supervise::blocking(work).await
}
