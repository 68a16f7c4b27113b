//! How an offer ends at the source: taken back, given away for good, or run here again.
//!
//! Before the release an offer is taken back by a thaw. After it only the destination's answer
//! counts ([`Fate::at_source`]): that the tasks ran there and all that they need is on its disk
//! ([`Remembered::let_go`] ends them here), or that they never ran ([`take_back`]).
//! [`settle_later`] asks until it gets one of the two; [`recover`] goes on with that after a
//! restart. While the destination gives neither, the container stays frozen and fenced, and `godwit
//! resolve` lets a person decide.

use std::sync::Arc;
use std::time::Duration;

use godwit_protos::peer::OwnershipRequest;
use godwit_protos::{ContainerRef, MigrateFrom};

use super::MigrationError;
use super::arrival;
use super::let_go::Remembered;
use super::shim::Shim;
use crate::containerd::TaskStatus;
use crate::node::Node;
use crate::ownership::fate::{AtSource, Fate, Recovery};
use crate::ownership::journal::JournalError;
use crate::ownership::{Epoch, Event, Ownership};
use crate::peer::Connection;
use crate::supervise::Supervisor;

/// Pauses between attempts to thaw or to ask double from the first to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_LAST: Duration = Duration::from_secs(30);

/// How long a peer has to say what became of a hand-off.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// How long a daemon that is stopping tries to thaw a container.
const STOP_MAX: Duration = Duration::from_secs(5);

/// Takes an offer back; see [`run_here`]. Before a release, which only the caller can make, no
/// other node can run the container.
///
/// Returns whether the container is known to have ended meanwhile, so that there is nothing to run
/// on.
pub(super) async fn take_offer_back(node: &Node, container: &ContainerRef, epoch: Epoch) -> bool {
    run_here(node, container, &Event::Abort(epoch)).await
}

/// Runs a frozen container here again: 1. journal `event`, 2. thaw, 3. journal that it is thawed.
/// On open: what is ours and frozen is thawed.
///
/// The journal decides, not the caller: what is in another state is left as it is. Where the
/// journal cannot be written, the container is thawed first, and `event` journalled once it can be:
/// the caller knows that no other node runs it, and that a daemon that starts meanwhile comes to
/// the same event.
///
/// Returns as [`take_offer_back`].
async fn run_here(node: &Node, container: &ContainerRef, event: &Event) -> bool {
    let mut pause = PAUSE_FIRST;
    loop {
        match node.journal.apply(container, event, |_| {}) {
            Ok(_) => return thaw(node, container).await,
            Err(error @ JournalError::OutOfPhase { .. }) => {
                tracing::warn!(%container, %error, "it stays as it is");
                return false;
            }
            Err(error) => {
                let error = crate::error::chain(&error);
                tracing::error!(%container, error, "the journal fails; thawing nevertheless");
                thaw(node, container).await;
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_LAST);
    }
}

/// Ends an offer whose release could not be journalled for certain: the destination was refused,
/// but the disk may have the release.
///
/// Nothing runs here until either the journal can be read again, which then decides, or the
/// destination has journalled that it will never run it.
pub(super) async fn withdraw_release(
    node: &Arc<Node>,
    container: &ContainerRef,
    epoch: Epoch,
    remembered: Remembered,
    there: &MigrateFrom,
) {
    let mut pause = PAUSE_FIRST;
    loop {
        match node.journal.apply(container, &Event::Abort(epoch), |_| {}) {
            Ok(_) => {
                thaw(node, container).await;
                return;
            }
            Err(JournalError::OutOfPhase { .. }) => {
                return settle_later(node, container, Some(remembered)).await;
            }
            Err(error) => {
                tracing::error!(%container, error = crate::error::chain(&error), "the journal fails");
            }
        }
        if let Ok(Fate::NeverRan) = ask(node, &there.to_string(), epoch, container).await {
            thaw(node, container).await;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_LAST);
    }
}

/// Runs a released container here again; see [`run_here`]. The destination has journalled that it
/// never ran it and never will.
pub(super) async fn take_back(node: &Node, container: &ContainerRef, epoch: Epoch) {
    tracing::warn!(%container, epoch = epoch.0, "the destination never ran it; thawing");
    run_here(node, container, &Event::Returned(epoch)).await;
}

/// Ends the lease of a container that was leaving.
pub(super) fn end_lease(node: &Node, container: &ContainerRef) {
    if let Err(error) = node.journal.end_leaving(container) {
        tracing::error!(%container, %error, "its lease stays until the daemon starts again");
    }
}

/// Thaws a container that is ours until it succeeds, or until there is nothing left to thaw: then
/// the result is true.
async fn thaw(node: &Node, container: &ContainerRef) -> bool {
    let mut pause = PAUSE_FIRST;
    let has_ended = loop {
        match thaw_once(node, container).await {
            Ok(has_ended) => break has_ended,
            Err(error) => {
                tracing::error!(%container, error = error.chain(), "cannot thaw; trying again");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_LAST);
    };
    if let Err(error) = node.journal.note(container, |entry| entry.frozen = false) {
        tracing::error!(%container, %error, "cannot journal the thaw; it is repeated");
    }
    end_lease(node, container);
    has_ended
}

/// Returns whether there was nothing to thaw. Errors: it is frozen, as far as is known.
async fn thaw_once(node: &Node, container: &ContainerRef) -> Result<bool, MigrationError> {
    let thawed = match Shim::find(&node.config, container) {
        Ok(shim) => shim.thaw(container.id()).await,
        Err(error) => Err(error),
    };
    let Err(error) = thawed else { return Ok(false) };
    // Deleted, or ended, while it was frozen.
    match node.containerd.task(container.namespace(), container.id()).await {
        Ok(None) => tracing::warn!(%container, "nothing to thaw: it has no task"),
        Ok(Some(task)) if task.status == TaskStatus::Stopped => {
            tracing::warn!(%container, "nothing to thaw: its task has ended");
        }
        _ => return Err(error),
    }
    Ok(true)
}

/// Asks the destination how the hand-off of a released container ended, until its answer ends it
/// here.
pub(super) async fn settle_later(
    node: &Arc<Node>,
    container: &ContainerRef,
    mut remembered: Option<Remembered>,
) {
    let (mut pause, mut last) = (PAUSE_FIRST, None);
    loop {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_LAST);
        let entry = match node.journal.container(container) {
            Ok(Some(entry)) => entry,
            Ok(None) => return end_lease(node, container),
            Err(error) => {
                tracing::error!(%container, error = crate::error::chain(&error), "journal");
                continue;
            }
        };
        let Ownership::Released(epoch, to) = entry.ownership.clone() else { return };
        let fate = match ask(node, &to, epoch, container).await {
            Ok(fate) => fate,
            Err(error) => {
                tracing::warn!(%container, error = error.chain(), "waiting for the destination");
                continue;
            }
        };
        if last.replace(fate) != Some(fate) {
            tracing::info!(%container, epoch = epoch.0, %fate, "at the destination");
        }
        match fate.at_source() {
            AtSource::LetGo => {
                let remembered = remembered.take();
                let known = || Remembered::after_restart(container, epoch, &to, &entry);
                return remembered.unwrap_or_else(known).let_go(node).await;
            }
            AtSource::TakeBack => return take_back(node, container, epoch).await,
            AtSource::AskAgain => {}
        }
    }
}

/// What the node of `there`, `NODE/NAMESPACE/CONTAINER`, says became of `epoch`; `here` is the
/// container on this node. Errors: it does not answer.
pub(super) async fn ask(
    node: &Node,
    there: &str,
    epoch: Epoch,
    here: &ContainerRef,
) -> Result<Fate, MigrationError> {
    let there: MigrateFrom = there.parse()?;
    let connection = Connection::open(&node.config, &there.node, ANSWER_MAX).await?;
    ask_over(&connection, node, &there.container, epoch, here).await
}

/// The same over a connection that is open.
pub(super) async fn ask_over(
    connection: &Connection,
    node: &Node,
    there: &ContainerRef,
    epoch: Epoch,
    here: &ContainerRef,
) -> Result<Fate, MigrationError> {
    let request = OwnershipRequest {
        container: Some(super::line::named(there)),
        epoch: epoch.0,
        peer: format!("{}/{here}", node.config.node),
    };
    let response = tokio::time::timeout(ANSWER_MAX, connection.client().ownership(request)).await;
    let response = response.map_err(|_late| MigrationError::Silent { patience: ANSWER_MAX })?;
    let response = response.map_err(|status| connection.refused(status))?.into_inner();
    Ok(response.fate().into())
}

/// Goes on after a restart with what the journal holds: an offer is taken back, a release is
/// settled, a claim given back.
pub fn recover(node: &Arc<Node>, supervisor: &Supervisor) -> Result<(), MigrationError> {
    for (container, entry) in node.journal.containers()? {
        let node = node.clone();
        match node.journal.ledger(&container)?.recovery(entry.frozen) {
            Recovery::TakeOfferBack(epoch) => {
                supervisor.run("taking back an offer", async move {
                    take_offer_back(&node, &container, epoch).await;
                });
            }
            Recovery::AskDestination(_) => {
                supervisor.run("settling a release", async move {
                    settle_later(&node, &container, None).await;
                });
            }
            Recovery::Thaw => {
                supervisor.run("thawing", async move {
                    thaw(&node, &container).await;
                });
            }
            Recovery::GiveBack(epoch) => {
                supervisor.run("giving back a claim", async move {
                    arrival::give_back_unless_claimed(&node, &container, epoch).await;
                });
            }
            // Once containerd is here: `request::settle_what_came`.
            Recovery::FindOut(_) | Recovery::Nothing => {}
        }
    }
    arrival::recover(node)
}

/// Takes back every offer, before the daemon ends.
pub async fn take_offers_back(node: &Node) {
    for (container, entry) in node.journal.containers().unwrap_or_default() {
        if let Ownership::Offered(epoch, _) = entry.ownership {
            let taken = take_offer_back(node, &container, epoch);
            let _ = tokio::time::timeout(STOP_MAX, taken).await;
        }
    }
}
