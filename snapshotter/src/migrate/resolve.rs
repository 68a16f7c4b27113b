//! `godwit resolve`: a person decides how a hand-off ended, where no journal can tell.
//!
//! The rules are one pure function, [`decide`]: from what this node's journal and the other node
//! say to what is journalled, or why not. It refuses what a journal contradicts; what remains is
//! named as a risk before the person confirms.

use std::sync::Arc;

use godwit_protos::ContainerRef;

use super::destination::Sessions;
use super::let_go::Remembered;
use super::{MigrationError, arrival, release};
use crate::containerd::TaskStatus;
use crate::node::Node;
use crate::ownership::fate::Fate;
use crate::ownership::{Epoch, Event, Ledger, Ownership};

/// What a person says: whether the container's tasks ran at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They ran, so the source's copy is given up.
    Ran,
    /// They never ran, so the source runs them again.
    NeverRan,
}

/// What is known, and what follows from the verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// The epoch in question.
    pub epoch: Epoch,
    /// What this node's journal says.
    pub here: String,
    /// The container's name at the other node, and what that node says; `None` if it does not
    /// answer.
    pub peer: String,
    /// What that node says, in words.
    pub there: String,
    /// What happens, and what is lost or run twice if the verdict is wrong.
    pub risk: &'static str,
}

/// What is done once the person has confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    LetGo,
    TakeBack,
    Ran,
    GiveBack,
    CallDurable,
}

/// What this node itself shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Shown {
    /// A session of the container is under way.
    is_live: bool,
    /// containerd runs a task of it.
    runs: bool,
}

/// Errors: why not, in words.
fn decide(
    ledger: &Ledger,
    torn: Option<Epoch>,
    verdict: Verdict,
    there: Option<Fate>,
    shown: Shown,
) -> Result<(Action, Epoch, &'static str), &'static str> {
    use {Ownership as S, Verdict as V};
    if shown.is_live {
        return Err("a migration of it is under way here; wait for its end");
    }
    match (&ledger.state, verdict, there) {
        (Some(S::Released(..)), V::Ran, Some(Fate::NeverRan)) => {
            Err("the destination's journal says that it never ran there")
        }
        (Some(S::Released(epoch, _)), V::Ran, _) => Ok((
            Action::LetGo,
            *epoch,
            "the frozen container here is ended and removed with its volumes: if it did not run at \
             the destination, or what it needs is not on that node's disk, it is lost",
        )),
        (Some(S::Released(..)), V::NeverRan, Some(Fate::RanDurably)) => {
            Err("the destination's journal says that it ran there")
        }
        (Some(S::Released(..)), V::NeverRan, Some(Fate::Claiming | Fate::Granted)) => {
            Err("the destination may still let it run: resolve it there first")
        }
        (Some(S::Released(epoch, _)), V::NeverRan, _) => Ok((
            Action::TakeBack,
            *epoch,
            "the container here runs on from where it was frozen: if it runs at the destination, or \
             that node starts it later, there are two of it; delete it there first",
        )),
        (Some(S::Claiming(..)), V::Ran, _) => {
            Err("it was not granted to this node, so it cannot have run")
        }
        (Some(S::Granted(..)), V::NeverRan, _) if shown.runs => Err("containerd runs it here"),
        (Some(S::Claiming(epoch, _) | S::Granted(epoch, _)), V::NeverRan, _) => Ok((
            Action::GiveBack,
            *epoch,
            "the source runs it again as soon as it asks: if tasks ran here, what they did is done twice",
        )),
        (Some(S::Granted(epoch, _)), V::Ran, _) => Ok((
            Action::Ran,
            *epoch,
            "the source ends and removes its frozen copy: if no task ran here, the container is lost",
        )),
        (_, V::Ran, _) if torn.is_some() => Ok((
            Action::CallDurable,
            torn.unwrap_or_default(),
            "the source ends and removes its frozen copy: what this machine had not written when it \
             stopped is lost",
        )),
        (_, V::NeverRan, _) if torn.is_some() => Err(
            "it ran here; to go on with the source's copy instead, delete it here and resolve it there",
        ),
        (Some(S::Offered(..)), ..) => Err("an offer ends by itself: the container is thawed"),
        (None | Some(S::Owner(_) | S::Moved(..)), ..) => Err("nothing about it is undecided here"),
    }
}

/// Shows what both sides know, and does what the verdict asks for if `is_confirmed`.
///
/// Errors: [`MigrationError::Unresolvable`]; nothing changed then.
pub async fn resolve(
    sessions: &Arc<Sessions>,
    container: &ContainerRef,
    verdict: Verdict,
    is_confirmed: bool,
) -> Result<Resolution, MigrationError> {
    let node = &sessions.node;
    let ledger = node.journal.ledger(container)?;
    let torn = node.journal.tombstones()?.into_iter();
    let mut torn = torn.filter(|(name, _, one)| name == container && one.is_torn());
    let torn = torn.next_back().map(|(_, epoch, one)| (epoch, one.ended.peer));
    let of_torn = || torn.clone();
    let state = ledger.state.as_ref().filter(|state| state.is_open());
    let open = state.and_then(|state| Some((state.epoch(), state.peer()?.to_owned())));
    let (epoch, peer) = open.or_else(of_torn).unwrap_or_default();
    let there = release::ask(node, &peer, epoch, container).await;
    let task = node.containerd.task(container.namespace(), container.id()).await?;
    let runs = task.is_some_and(|task| task.status == TaskStatus::Running);
    let shown = Shown { is_live: sessions.is_live(container), runs };
    let torn = torn.map(|(epoch, _)| epoch);
    let decided = decide(&ledger, torn, verdict, there.as_ref().ok().copied(), shown);
    let (action, epoch, risk) = decided
        .map_err(|why| MigrationError::Unresolvable { container: container.clone(), why })?;
    let here = ledger.state.as_ref().map_or("not known", Ownership::word).to_owned();
    let there = match &there {
        Ok(fate) => fate.to_string(),
        Err(error) => format!("no answer ({})", error.chain()),
    };
    let resolution = Resolution { epoch, here, peer: peer.clone(), there, risk };
    if is_confirmed {
        tracing::warn!(%container, ?verdict, ?resolution, "resolved by a person");
        act(node, container, action, epoch, &peer).await?;
    }
    Ok(resolution)
}

async fn act(
    node: &Arc<Node>,
    container: &ContainerRef,
    action: Action,
    epoch: Epoch,
    peer: &str,
) -> Result<(), MigrationError> {
    match action {
        Action::LetGo => {
            if let Some(entry) = node.journal.container(container)? {
                Remembered::after_restart(container, epoch, peer, &entry).let_go(node).await;
            }
        }
        Action::TakeBack => release::take_back(node, container, epoch).await,
        Action::Ran => {
            arrival::ran(node, container).await?;
            arrival::make_durable(node, container, epoch).await?;
        }
        Action::GiveBack => {
            node.journal.apply(container, &Event::GiveBack(epoch), |_| {})?;
        }
        Action::CallDurable => arrival::make_durable(node, container, epoch).await?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const E: Epoch = Epoch(3);

    fn decided(
        state: Option<Ownership>,
        verdict: Verdict,
        there: Option<Fate>,
    ) -> Result<Action, &'static str> {
        let ledger = Ledger { state, ..Ledger::default() };
        decide(&ledger, None, verdict, there, Shown::default()).map(|(action, ..)| action)
    }

    fn released() -> Option<Ownership> {
        Some(Ownership::Released(E, "b/d/c".into()))
    }

    fn granted() -> Option<Ownership> {
        Some(Ownership::Granted(E, "a/d/c".into()))
    }

    #[test]
    fn what_a_journal_contradicts_is_refused() {
        decided(released(), Verdict::Ran, Some(Fate::NeverRan)).unwrap_err();
        for fate in [Fate::RanDurably, Fate::Claiming, Fate::Granted] {
            decided(released(), Verdict::NeverRan, Some(fate)).unwrap_err();
        }
        let claiming = Some(Ownership::Claiming(E, "a/d/c".into()));
        decided(claiming, Verdict::Ran, None).unwrap_err();
        decided(Some(Ownership::Owner(E)), Verdict::Ran, None).unwrap_err();
        decided(None, Verdict::NeverRan, None).unwrap_err();
    }

    #[test]
    fn where_no_journal_can_tell_the_person_decides() {
        for there in [None, Some(Fate::Unknown), Some(Fate::Ran)] {
            assert_eq!(decided(released(), Verdict::Ran, there), Ok(Action::LetGo));
            assert_eq!(decided(released(), Verdict::NeverRan, there), Ok(Action::TakeBack));
        }
        assert_eq!(decided(granted(), Verdict::Ran, None), Ok(Action::Ran));
        assert_eq!(decided(granted(), Verdict::NeverRan, None), Ok(Action::GiveBack));
    }

    #[test]
    fn what_runs_here_did_run_and_what_is_under_way_is_waited_for() {
        let ledger = Ledger { state: granted(), ..Ledger::default() };
        let runs = Shown { runs: true, ..Shown::default() };
        decide(&ledger, None, Verdict::NeverRan, None, runs).unwrap_err();
        let is_live = Shown { is_live: true, ..Shown::default() };
        decide(&ledger, None, Verdict::Ran, None, is_live).unwrap_err();
    }

    #[test]
    fn what_a_power_cut_may_have_torn_is_called_safe_here_or_given_up_there() {
        let ledger = Ledger { state: Some(Ownership::Owner(E)), ..Ledger::default() };
        let shown = Shown::default();
        let (action, epoch, _) = decide(&ledger, Some(E), Verdict::Ran, None, shown).unwrap();
        assert_eq!((action, epoch), (Action::CallDurable, E));
        decide(&ledger, Some(E), Verdict::NeverRan, None, shown).unwrap_err();
    }
}
