//! Who may run a container.
//!
//! ```text
//!  source:        Owner --offer--> Offered --release--> Released --let go--> Moved
//!                   ^                 |abort               |returned           (until it is deleted)
//!                   '-----------------+--------------------'
//!  destination:   Claiming --granted--> Granted --ran--> Owner --durable--> Owner
//!                    '-----give back------'--> (none)     only while no task has run
//! ```
//!
//! A [`Ledger`] is what a node knows of one name: the state, and the outcome of every epoch that
//! ended. Outcomes outlive the container, so that a question that comes late has an answer, and
//! epochs are never used twice.
//!
//! Promise: a node lets the container run only in [`Ownership::Owner`] and [`Ownership::Granted`].
//! The source journals `Released` before it says so; the destination journals `Claiming` before it
//! asks, and runs the tasks only once it has journalled the grant; a lost message is asked for
//! again. So a fault can delay a hand-off but never make two runners. Read next: [`fate`] for the
//! questions and what follows from the answers, [`journal`] for the bytes on disk,
//! docs/failure-model.md for each fault.

pub mod absence;
pub mod fate;
pub mod journal;
pub mod leases;

#[cfg(test)]
mod model;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Fence of one offer. Grows by one with each offer and is never reused.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Epoch(pub u64);

impl Epoch {
    /// The fence of the next offer.
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// What this node knows of a container's owner. A container that was never offered has no state and
/// is ours. The text is the container's name at the other node: `NODE/NAMESPACE/CONTAINER`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Ownership {
    /// This node may run it. The epoch is that of its last hand-off.
    Owner(Epoch),
    /// Frozen here and offered to another node; not yet given away.
    Offered(Epoch, String),
    /// Given to another node, which has not yet said how that ended: this node must not run it.
    Released(Epoch, String),
    /// Given to another node for good; its tasks here have ended.
    Moved(Epoch, String),
    /// This node asks another one for it, or waits for the answer.
    Claiming(Epoch, String),
    /// The other node has released it: its tasks may run here from now on.
    Granted(Epoch, String),
}

/// What happens to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The source freezes the container and offers it under this name, with an epoch beyond the one
    /// given.
    Offer(String, Epoch),
    /// The source takes an offer back.
    Abort(Epoch),
    /// The source gives the container away.
    Release(Epoch),
    /// The destination has journalled that it never ran the tasks and never will.
    Returned(Epoch),
    /// The source has ended the tasks: the destination has all of it on its disk.
    LetGo(Epoch),
    /// The destination asks for the container.
    Claim(Epoch, String),
    /// The source has released it.
    Granted(Epoch),
    /// The destination gives up, and vouches that no task ran and none will.
    GiveBack(Epoch),
    /// The tasks ran at the destination, or may have.
    Ran(Epoch),
    /// What the tasks need is on the destination's disk.
    Durable(Epoch),
    /// The container was deleted from containerd.
    Deleted,
}

/// How an epoch ended, as this node knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Outcome {
    /// At a source: the offer was taken back, or the container came back without having run.
    Kept,
    /// At a source: given away for good.
    GivenAway,
    /// At a destination: no task ran here and none will.
    NeverRan,
    /// At a destination: tasks ran here, or may have.
    Ran,
    /// At a destination: tasks ran here, and what they need is on the disk.
    RanDurably,
}

/// An epoch that ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ended {
    /// How.
    pub outcome: Outcome,
    /// The container's name at the other node.
    pub peer: String,
}

/// What one node knows of one container's name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Ledger {
    /// Who may run it now; `None` if it was never given or taken, or is over.
    pub state: Option<Ownership>,
    /// Epochs that ended.
    pub ended: BTreeMap<Epoch, Ended>,
    /// No epoch up to this one is used again, although nothing else may be known of it.
    pub floor: Epoch,
}

/// What an event changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The state after it.
    pub state: Option<Ownership>,
    /// The epoch that ended, or whose outcome became another.
    pub ended: Option<(Epoch, Ended)>,
}

/// In the words of an error: "is on its way to edge-b: it cannot be offered to ...".
impl std::fmt::Display for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Offer(to, _) => write!(f, "be frozen to be offered to {to}"),
            Self::Abort(Epoch(epoch)) => write!(f, "have its offer {epoch} taken back"),
            Self::Release(Epoch(epoch)) => write!(f, "be given away by offer {epoch}"),
            Self::Returned(Epoch(epoch)) => write!(f, "come back from offer {epoch}"),
            Self::LetGo(Epoch(epoch)) => write!(f, "be let go by offer {epoch}"),
            Self::Claim(Epoch(epoch), from) => write!(f, "be claimed from {from} by offer {epoch}"),
            Self::Granted(Epoch(epoch)) => write!(f, "be granted by offer {epoch}"),
            Self::GiveBack(Epoch(epoch)) => write!(f, "be given back from offer {epoch}"),
            Self::Ran(Epoch(epoch)) => write!(f, "have run by offer {epoch}"),
            Self::Durable(Epoch(epoch)) => write!(f, "be durable by offer {epoch}"),
            Self::Deleted => write!(f, "be forgotten"),
        }
    }
}

impl Change {
    fn to(state: Ownership) -> Option<Self> {
        Some(Self { state: Some(state), ended: None })
    }

    fn ending(
        state: Option<Ownership>,
        epoch: Epoch,
        outcome: Outcome,
        peer: &str,
    ) -> Option<Self> {
        let ended = Ended { outcome, peer: peer.to_owned() };
        Some(Self { state, ended: Some((epoch, ended)) })
    }
}

impl Ledger {
    /// What `event` changes, or `None` if it is stale or out of phase.
    ///
    /// Pure: the caller journals the change first and only then acts on it.
    pub fn on(&self, event: &Event) -> Option<Change> {
        use {Event as E, Ownership as S};
        let is_new = |epoch: &Epoch| *epoch > self.last();
        match (&self.state, event) {
            (None | Some(S::Owner(_)), E::Offer(to, known)) => {
                Change::to(S::Offered(self.last().max(*known).next(), to.clone()))
            }
            (Some(S::Offered(now, to)), E::Abort(of)) if of == now => {
                Change::ending(Some(S::Owner(*now)), *now, Outcome::Kept, to)
            }
            (Some(S::Offered(now, to)), E::Release(of)) if of == now => {
                Change::to(S::Released(*now, to.clone()))
            }
            (Some(S::Released(now, to)), E::Returned(of)) if of == now => {
                Change::ending(Some(S::Owner(*now)), *now, Outcome::Kept, to)
            }
            (Some(S::Released(now, to)), E::LetGo(of)) if of == now => {
                let moved = S::Moved(*now, to.clone());
                Change::ending(Some(moved), *now, Outcome::GivenAway, to)
            }
            // It was here before and comes back.
            (None | Some(S::Owner(_) | S::Moved(..)), E::Claim(epoch, from)) if is_new(epoch) => {
                Change::to(S::Claiming(*epoch, from.clone()))
            }
            // An earlier attempt, which was never granted, is superseded.
            (Some(S::Claiming(old, earlier)), E::Claim(epoch, from)) if is_new(epoch) => {
                let claiming = S::Claiming(*epoch, from.clone());
                Change::ending(Some(claiming), *old, Outcome::NeverRan, earlier)
            }
            (Some(S::Claiming(now, from)), E::Granted(of)) if of == now => {
                Change::to(S::Granted(*now, from.clone()))
            }
            (Some(S::Claiming(now, from) | S::Granted(now, from)), E::GiveBack(of))
                if of == now =>
            {
                Change::ending(None, *now, Outcome::NeverRan, from)
            }
            (Some(S::Granted(now, from)), E::Ran(of)) if of == now => {
                Change::ending(Some(S::Owner(*now)), *now, Outcome::Ran, from)
            }
            (state, E::Durable(of)) => {
                let ended = self.ended.get(of)?;
                let ran = matches!(ended.outcome, Outcome::Ran | Outcome::RanDurably);
                let durable =
                    || Change::ending(state.clone(), *of, Outcome::RanDurably, &ended.peer);
                ran.then(durable)?
            }
            (None | Some(S::Owner(_) | S::Moved(..)), E::Deleted) => {
                Some(Change { state: None, ended: None })
            }
            (Some(S::Released(now, to)), E::Deleted) => {
                Change::ending(None, *now, Outcome::GivenAway, to)
            }
            // Listed, not `_`: a new state or event must be decided here.
            (
                None,
                E::Abort(_)
                | E::Release(_)
                | E::Returned(_)
                | E::LetGo(_)
                | E::Claim(..)
                | E::Granted(_)
                | E::GiveBack(_)
                | E::Ran(_),
            )
            | (
                Some(S::Owner(_)),
                E::Abort(_)
                | E::Release(_)
                | E::Returned(_)
                | E::LetGo(_)
                | E::Claim(..)
                | E::Granted(_)
                | E::GiveBack(_)
                | E::Ran(_),
            )
            | (
                Some(S::Offered(..) | S::Released(..) | S::Moved(..)),
                E::Offer(..)
                | E::Abort(_)
                | E::Release(_)
                | E::Returned(_)
                | E::LetGo(_)
                | E::Claim(..)
                | E::Granted(_)
                | E::GiveBack(_)
                | E::Ran(_),
            )
            | (
                Some(S::Claiming(..) | S::Granted(..)),
                E::Offer(..)
                | E::Abort(_)
                | E::Release(_)
                | E::Returned(_)
                | E::LetGo(_)
                | E::Claim(..)
                | E::Granted(_)
                | E::GiveBack(_)
                | E::Ran(_)
                | E::Deleted,
            )
            | (Some(S::Offered(..)), E::Deleted) => None,
        }
    }

    /// Takes a change over.
    pub fn apply(&mut self, change: Change) {
        self.state = change.state;
        self.ended.extend(change.ended);
    }

    /// The greatest epoch that was ever used for this name.
    pub fn last(&self) -> Epoch {
        let state = self.state.as_ref().map_or(self.floor, Ownership::epoch);
        let ended = self.ended.keys().next_back().copied().unwrap_or_default();
        self.floor.max(state).max(ended)
    }
}

impl Ownership {
    /// The epoch of the state.
    pub fn epoch(&self) -> Epoch {
        match self {
            Self::Owner(epoch)
            | Self::Offered(epoch, _)
            | Self::Released(epoch, _)
            | Self::Moved(epoch, _)
            | Self::Claiming(epoch, _)
            | Self::Granted(epoch, _) => *epoch,
        }
    }

    /// The container's name at the other node, where there is one.
    pub fn peer(&self) -> Option<&str> {
        match self {
            Self::Owner(_) => None,
            Self::Offered(_, peer)
            | Self::Released(_, peer)
            | Self::Moved(_, peer)
            | Self::Claiming(_, peer)
            | Self::Granted(_, peer) => Some(peer),
        }
    }

    /// Whether a task of this name must not be created here.
    pub fn is_fenced(&self) -> bool {
        matches!(self, Self::Released(..) | Self::Moved(..))
    }

    /// Whether a hand-off is under way.
    pub fn is_open(&self) -> bool {
        match self {
            Self::Owner(_) | Self::Moved(..) => false,
            Self::Offered(..) | Self::Released(..) | Self::Claiming(..) | Self::Granted(..) => true,
        }
    }

    /// The state in one word, for people.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Owner(_) => "owner",
            Self::Offered(..) => "offered",
            Self::Released(..) => "released",
            Self::Moved(..) => "moved",
            Self::Claiming(..) => "claiming",
            Self::Granted(..) => "granted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(events: &[Event]) -> Ledger {
        let mut ledger = Ledger::default();
        for event in events {
            let change = ledger.on(event).unwrap_or_else(|| panic!("{event:?} in {ledger:?}"));
            ledger.apply(change);
        }
        ledger
    }

    fn offer() -> Event {
        Event::Offer("b/d/c".into(), Epoch(0))
    }

    fn claim(epoch: u64) -> Event {
        Event::Claim(Epoch(epoch), "a/d/c".into())
    }

    #[test]
    fn a_stale_release_is_refused() {
        let offered = ledger(&[Event::Offer("b/d/c".into(), Epoch(2))]);
        assert_eq!(offered.on(&Event::Release(Epoch(2))), None);
        assert!(offered.on(&Event::Release(Epoch(3))).is_some());
    }

    #[test]
    fn an_epoch_is_never_reused_not_even_by_a_namesake_of_a_deleted_container() {
        let again = ledger(&[offer(), Event::Abort(Epoch(1)), offer()]);
        assert_eq!(again.last(), Epoch(2));
        let again = ledger(&[offer(), Event::Abort(Epoch(1)), Event::Deleted, offer()]);
        assert_eq!(again.last(), Epoch(2));
        let came = ledger(&[claim(7), Event::GiveBack(Epoch(7))]);
        assert_eq!((came.on(&claim(7)), came.last()), (None, Epoch(7)));
        let expired = Ledger { floor: Epoch(7), ..Ledger::default() };
        assert_eq!(expired.on(&claim(7)), None);
        assert!(expired.on(&claim(8)).is_some());
    }

    #[test]
    fn what_was_given_back_leaves_its_name_free() {
        let back = ledger(&[claim(1), Event::GiveBack(Epoch(1))]);
        assert_eq!(back.state, None);
        assert_eq!(ledger(&[claim(1), Event::GiveBack(Epoch(1)), offer()]).last(), Epoch(2));
    }

    #[test]
    fn only_what_was_granted_can_have_run_and_what_ran_is_never_given_back() {
        let (granted, ran) = (Event::Granted(Epoch(1)), Event::Ran(Epoch(1)));
        assert_eq!(ledger(&[claim(1)]).on(&ran), None);
        let here = ledger(&[claim(1), granted, ran]);
        assert_eq!(here.on(&Event::GiveBack(Epoch(1))), None);
        assert_eq!(here.state, Some(Ownership::Owner(Epoch(1))));
        assert_eq!(here.on(&Event::Durable(Epoch(2))), None);
    }

    #[test]
    fn what_is_under_way_is_not_forgotten_and_what_was_released_is_given_away() {
        for open in [vec![offer()], vec![claim(1)], vec![claim(1), Event::Granted(Epoch(1))]] {
            assert_eq!(ledger(&open).on(&Event::Deleted), None, "{open:?}");
        }
        let gone = ledger(&[offer(), Event::Release(Epoch(1)), Event::Deleted]);
        assert_eq!(gone.ended[&Epoch(1)].outcome, Outcome::GivenAway);
    }
}
